/* plot.c - see plot.h. Build: part of `make demo` and `make eval`. */
#include "plot.h"

#include <string.h>

enum { WIDTH = 720, HEIGHT = 400, LEFT = 64, RIGHT = 160, TOP = 44, BOTTOM = 52 };

static const struct {
    const char *name, *color;
} colors[] = { { "full", "#444444" },          { "rkv", "#0060b0" },
               { "rkv-pool7", "#4aa3e0" },     { "rkv-pool1", "#4aa3e0" },
               { "rkv-paper", "#6a51a3" },     { "rkv-paper-pool1", "#a78bda" },
               { "memory-traces", "#e69f00" }, { "memory-wide", "#8c510a" },
               { "snapkv", "#d55e00" },        { "h2o", "#009e73" },
               { "streaming", "#cc79a7" },     { "random", "#999999" } };

static const char *color_of(const char *name)
{
    for (size_t i = 0; i < sizeof colors / sizeof *colors; i++)
        if (strcmp(colors[i].name, name) == 0) return colors[i].color;
    return "#000000";
}

typedef struct range {
    double low, high;
} range;

static double x_of(range r, double budget)
{
    return LEFT + (budget - r.low) / (r.high - r.low) * (WIDTH - LEFT - RIGHT);
}

static double y_of(double accuracy)
{
    return TOP + (1.0 - accuracy) * (HEIGHT - TOP - BOTTOM);
}

static range budgets(const plot_series *series, int n_series)
{
    range r = { 100.0, 0.0 };
    for (int i = 0; i < n_series; i++)
        for (int k = 0; series[i].n_points > 1 && k < series[i].n_points; k++) {
            const double budget = series[i].points[k].budget;
            if (budget < r.low) r.low = budget;
            if (budget > r.high) r.high = budget;
        }
    if (r.low < r.high) return r;
    r.low = 0.0;
    r.high = 100.0;
    return r;
}

static void draw_axes(FILE *f, const plot_series *series, int n_series, range r)
{
    for (int i = 0; i <= 5; i++)
        fprintf(f,
                "<line x1='%d' y1='%.1f' x2='%d' y2='%.1f' stroke='#dddddd'/>"
                "<text x='%d' y='%.1f' text-anchor='end'>%d %%</text>\n",
                LEFT, y_of(i / 5.0), WIDTH - RIGHT, y_of(i / 5.0), LEFT - 8, y_of(i / 5.0) + 4,
                20 * i);
    for (int i = 0; i < n_series; i++) {
        if (series[i].n_points < 2) continue;
        for (int k = 0; k < series[i].n_points; k++)
            fprintf(f, "<text x='%.1f' y='%d' text-anchor='middle'>%g %%</text>\n",
                    x_of(r, series[i].points[k].budget), HEIGHT - BOTTOM + 20,
                    series[i].points[k].budget);
        break; /* all series have the same budgets */
    }
    fprintf(f,
            "<text x='%d' y='%d' text-anchor='middle'>budget, share of the full cache's "
            "tokens</text>\n",
            (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12);
}

static void draw_series(FILE *f, const plot_series *s, range r)
{
    const char *color = color_of(s->name);
    fprintf(f, "<polyline fill='none' stroke='%s' stroke-width='2.2' points='", color);
    for (int k = 0; k < s->n_points; k++)
        fprintf(f, "%.1f,%.1f ", x_of(r, s->points[k].budget), y_of(s->points[k].accuracy));
    fprintf(f, "'/>\n");
    for (int k = 0; k < s->n_points; k++) {
        const double x = x_of(r, s->points[k].budget);
        fprintf(f,
                "<line x1='%.1f' x2='%.1f' y1='%.1f' y2='%.1f' stroke='%s'/>"
                "<circle cx='%.1f' cy='%.1f' r='3.4' fill='%s'/>\n",
                x, x, y_of(s->points[k].low), y_of(s->points[k].high), color, x,
                y_of(s->points[k].accuracy), color);
    }
}

static void draw_level(FILE *f, const plot_series *s)
{
    const double y = y_of(s->points[0].accuracy);
    fprintf(f,
            "<line x1='%d' x2='%d' y1='%.1f' y2='%.1f' stroke='%s' stroke-width='2' "
            "stroke-dasharray='6 4'/>\n",
            LEFT, WIDTH - RIGHT, y, y, color_of(s->name));
}

/* Where a line ends, and what it is called. */
typedef struct line_end {
    double y;
    const char *color, *label;
} line_end;

enum { MAX_ENDS = 32 };

/* Labels at the right, in the order of the lines' ends, none on top of another. */
static void draw_labels(FILE *f, const line_end *ends, int n)
{
    enum { LINE = 16 };
    line_end ranked[MAX_ENDS];
    for (int i = 0; i < n; i++) {
        int at = i;
        for (; at > 0 && ranked[at - 1].y > ends[i].y; at--) ranked[at] = ranked[at - 1];
        ranked[at] = ends[i];
    }
    for (int i = 0; i < n; i++) {
        ranked[i].y += 4.0;
        if (i > 0 && ranked[i].y < ranked[i - 1].y + LINE) ranked[i].y = ranked[i - 1].y + LINE;
    }
    for (int i = n - 1, low = HEIGHT - LINE / 2; i >= 0; i--, low -= LINE)
        if (ranked[i].y > low) ranked[i].y = low;
    for (int i = 0; i < n; i++)
        fprintf(f, "<text x='%d' y='%.1f' fill='%s' font-weight='600'>%s</text>\n",
                WIDTH - RIGHT + 12, ranked[i].y, ranked[i].color, ranked[i].label);
}

static void draw_names(FILE *f, const plot_series *series, int n_series)
{
    line_end ends[MAX_ENDS];
    int n = 0;
    for (int i = 0; i < n_series && n < MAX_ENDS; i++) {
        const plot_series *s = &series[i];
        if (s->n_points == 0) continue;
        ends[n].y = y_of(s->points[s->n_points - 1].accuracy);
        ends[n].color = color_of(s->name);
        ends[n++].label = s->name;
    }
    draw_labels(f, ends, n);
}

static void begin(FILE *f, const char *title)
{
    fprintf(f,
            "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 %d %d' role='img' "
            "aria-label='%s' font-family='system-ui,sans-serif' font-size='12' fill='#222222' "
            "style='max-width:%dpx;width:100%%'>\n<rect width='%d' height='%d' fill='#ffffff'/>\n"
            "<text x='%d' y='24' font-weight='600' font-size='15'>%s</text>\n",
            WIDTH, HEIGHT, title, WIDTH, WIDTH, HEIGHT, LEFT, title);
}

/* The step between lines of a grid: 1, 2 or 5 times a power of ten, about five of them. */
static double grid_step(double most)
{
    double step = 1.0;
    while (step * 10.0 < most) step *= 10.0;
    while (step * 2.5 > most) step /= 2.0;
    return step;
}

/* What the axes span. */
typedef struct span {
    double x_most, y_least, y_most;
} span;

static span span_of(const plot_line *lines, int n_lines)
{
    span s = { 0.0, 0.0, 0.0 };
    for (int i = 0; i < n_lines; i++)
        for (int k = 0; k < lines[i].n_points; k++) {
            const struct plot_xy *p = &lines[i].points[k];
            const double low = p->low < p->high ? p->low : p->y;
            const double high = p->low < p->high ? p->high : p->y;
            if (p->x > s.x_most) s.x_most = p->x;
            if (low < s.y_least) s.y_least = low;
            if (high > s.y_most) s.y_most = high;
        }
    if (s.x_most == 0.0) s.x_most = 1.0;
    if (s.y_most == s.y_least) s.y_most = s.y_least + 1.0;
    return s;
}

static double across(const span *s, double x)
{
    return LEFT + x / s->x_most * (WIDTH - LEFT - RIGHT);
}

static double up(const span *s, double y)
{
    return TOP + (s->y_most - y) / (s->y_most - s->y_least) * (HEIGHT - TOP - BOTTOM);
}

static void draw_grid(FILE *f, const span *s, const char *x_name, const char *y_name)
{
    const double x_step = grid_step(s->x_most), y_step = grid_step(s->y_most - s->y_least);
    int first = 0;
    while ((first - 1) * y_step >= s->y_least) first--;
    for (int i = first; i * y_step <= s->y_most; i++)
        fprintf(f,
                "<line x1='%d' y1='%.1f' x2='%d' y2='%.1f' stroke='#dddddd'/>"
                "<text x='%d' y='%.1f' text-anchor='end'>%g</text>\n",
                LEFT, up(s, i * y_step), WIDTH - RIGHT, up(s, i * y_step), LEFT - 8,
                up(s, i * y_step) + 4, i * y_step);
    for (int i = 0; i * x_step <= s->x_most; i++)
        fprintf(f, "<text x='%.1f' y='%d' text-anchor='middle'>%g</text>\n", across(s, i * x_step),
                HEIGHT - BOTTOM + 20, i * x_step);
    fprintf(f, "<text x='%d' y='%d' text-anchor='middle'>%s</text>\n", (LEFT + WIDTH - RIGHT) / 2,
            HEIGHT - 12, x_name);
    fprintf(f, "<text x='%d' y='%d' text-anchor='end'>%s</text>\n", LEFT - 8, TOP - 14, y_name);
}

static void draw_line(FILE *f, const span *s, const plot_line *line)
{
    const char *color = color_of(line->name);
    fprintf(f, "<polyline fill='none' stroke='%s' stroke-width='2.2'%s points='", color,
            line->is_dashed ? " stroke-dasharray='6 4'" : "");
    for (int k = 0; k < line->n_points; k++)
        fprintf(f, "%.1f,%.1f ", across(s, line->points[k].x), up(s, line->points[k].y));
    fprintf(f, "'/>\n");
    for (int k = 0; k < line->n_points; k++) {
        const struct plot_xy *p = &line->points[k];
        if (!(p->low < p->high)) continue;
        fprintf(f,
                "<line x1='%.1f' x2='%.1f' y1='%.1f' y2='%.1f' stroke='%s'/>"
                "<circle cx='%.1f' cy='%.1f' r='3.4' fill='%s'/>\n",
                across(s, p->x), across(s, p->x), up(s, p->low), up(s, p->high), color,
                across(s, p->x), up(s, p->y), color);
    }
}

void plot_lines(FILE *f, const char *title, const char *x_name, const char *y_name,
                const plot_line *lines, int n_lines)
{
    const span s = span_of(lines, n_lines);
    line_end ends[MAX_ENDS];
    int n = 0;
    begin(f, title);
    draw_grid(f, &s, x_name, y_name);
    for (int i = 0; i < n_lines; i++) {
        if (lines[i].n_points == 0) continue;
        draw_line(f, &s, &lines[i]);
        if (n == MAX_ENDS) continue;
        ends[n].y = up(&s, lines[i].points[lines[i].n_points - 1].y);
        ends[n].color = color_of(lines[i].name);
        ends[n++].label = lines[i].label;
    }
    draw_labels(f, ends, n);
    fprintf(f, "</svg>\n");
}

void plot_accuracy(FILE *f, const char *title, const plot_series *series, int n_series)
{
    const range r = budgets(series, n_series);
    begin(f, title);
    draw_axes(f, series, n_series, r);
    for (int i = 0; i < n_series; i++)
        if (series[i].n_points > 1)
            draw_series(f, &series[i], r);
        else if (series[i].n_points == 1)
            draw_level(f, &series[i]);
    draw_names(f, series, n_series);
    fprintf(f, "</svg>\n");
}
