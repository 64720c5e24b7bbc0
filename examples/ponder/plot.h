/* plot.h - pictures (SVG): accuracy against budget, and lines over any two axes; error bars. */
#ifndef PLOT_H
#define PLOT_H

#include <stdio.h>

enum { PLOT_MAX_POINTS = 16 };

typedef struct plot_series {
    const char *name; /* a policy's name, which also gives the colour */
    int n_points;
    struct plot_point {
        double budget; /* percent */
        double accuracy, low, high;
    } points[PLOT_MAX_POINTS]; /* ascending in budget */
} plot_series;

/* A series of a single point is drawn as a level line: the full cache. */
void plot_accuracy(FILE *f, const char *title, const plot_series *series, int n_series);

enum { PLOT_MAX_LINE = 300 };

typedef struct plot_line {
    const char *name, *label; /* a policy's name, for the colour; what stands at the line's end */
    int is_dashed;
    int n_points;
    struct plot_xy {
        double x, y, low, high; /* low < high: an error bar */
    } points[PLOT_MAX_LINE];    /* ascending in x */
} plot_line;

/* Both axes start at 0, the upright one lower where a line goes below. */
void plot_lines(FILE *f, const char *title, const char *x_name, const char *y_name,
                const plot_line *lines, int n_lines);

#endif
