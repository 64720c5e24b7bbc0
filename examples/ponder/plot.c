/* plot.c - see plot.h. Build: part of `make demo` and `make eval`. */
#include "plot.h"

#include <string.h>

enum { WIDTH = 720, HEIGHT = 400, LEFT = 64, RIGHT = 160, TOP = 44, BOTTOM = 52 };

static const struct {
    const char *name, *color;
} colors[] = { { "full", "#444444" },
               { "rkv", "#0060b0" },
               { "rkv-pool7", "#4aa3e0" },
               { "rkv-paper", "#6a51a3" },
               { "rkv-paper-pool1", "#a78bda" },
               { "snapkv", "#d55e00" },
               { "h2o", "#009e73" },
               { "streaming", "#cc79a7" },
               { "random", "#999999" } };

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

static double last_accuracy(const plot_series *s)
{
    return s->points[s->n_points - 1].accuracy;
}

/* Names at the right, in the order of the lines' ends, none on top of another. */
static void draw_names(FILE *f, const plot_series *series, int n_series)
{
    enum { MAX_NAMES = 32, LINE = 16 };
    const plot_series *ranked[MAX_NAMES];
    double y[MAX_NAMES];
    int n = 0;
    for (int i = 0; i < n_series && n < MAX_NAMES; i++) {
        if (series[i].n_points == 0) continue;
        int at = n++;
        for (; at > 0 && last_accuracy(ranked[at - 1]) < last_accuracy(&series[i]); at--)
            ranked[at] = ranked[at - 1];
        ranked[at] = &series[i];
    }
    for (int i = 0; i < n; i++) {
        y[i] = y_of(last_accuracy(ranked[i])) + 4.0;
        if (i > 0 && y[i] < y[i - 1] + LINE) y[i] = y[i - 1] + LINE;
    }
    for (int i = n - 1, low = HEIGHT - LINE / 2; i >= 0; i--, low -= LINE)
        if (y[i] > low) y[i] = low;
    for (int i = 0; i < n; i++)
        fprintf(f, "<text x='%d' y='%.1f' fill='%s' font-weight='600'>%s</text>\n",
                WIDTH - RIGHT + 12, y[i], color_of(ranked[i]->name), ranked[i]->name);
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

void plot_cache_sizes(FILE *f, const char *title, const plot_sizes *lines, int n_lines)
{
    const double width = WIDTH - LEFT - RIGHT, height = HEIGHT - TOP - BOTTOM;
    struct plot_size most = { 1.0, 1.0 };
    for (int i = 0; i < n_lines; i++)
        for (int k = 0; k < lines[i].n_points; k++) {
            const struct plot_size *p = &lines[i].points[k];
            if (p->tokens > most.tokens) most.tokens = p->tokens;
            if (p->kib > most.kib) most.kib = p->kib;
        }
    begin(f, title);
    for (double kib = 0.0; kib <= most.kib; kib += grid_step(most.kib)) {
        const double y = TOP + (1.0 - kib / most.kib) * height;
        fprintf(f,
                "<line x1='%d' y1='%.1f' x2='%d' y2='%.1f' stroke='#dddddd'/>"
                "<text x='%d' y='%.1f' text-anchor='end'>%g</text>\n",
                LEFT, y, WIDTH - RIGHT, y, LEFT - 8, y + 4, kib);
    }
    for (double tokens = 0.0; tokens <= most.tokens; tokens += grid_step(most.tokens))
        fprintf(f, "<text x='%.1f' y='%d' text-anchor='middle'>%g</text>\n",
                LEFT + tokens / most.tokens * width, HEIGHT - BOTTOM + 20, tokens);
    fprintf(f, "<text x='%d' y='%d' text-anchor='middle'>tokens</text>\n",
            (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12);
    fprintf(f, "<text x='%d' y='%d' text-anchor='end'>KiB</text>\n", LEFT - 8, TOP - 14);
    for (int i = 0; i < n_lines; i++) {
        const char *color = color_of(lines[i].name);
        double y = TOP;
        fprintf(f, "<polyline fill='none' stroke='%s' stroke-width='2.2' points='", color);
        for (int k = 0; k < lines[i].n_points; k++) {
            y = TOP + (1.0 - lines[i].points[k].kib / most.kib) * height;
            fprintf(f, "%.1f,%.1f ", LEFT + lines[i].points[k].tokens / most.tokens * width, y);
        }
        fprintf(f, "'/>\n<text x='%d' y='%.1f' fill='%s' font-weight='600'>%s</text>\n",
                WIDTH - RIGHT + 12, y + 4, color, lines[i].label);
    }
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
