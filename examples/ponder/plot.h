/* plot.h - pictures (SVG): accuracy against budget, with error bars; cache size over time. */
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

enum { PLOT_MAX_SIZES = 300 };

typedef struct plot_sizes {
    const char *name, *label; /* a policy's name, for the colour; what stands at the line's end */
    int n_points;
    struct plot_size {
        double tokens, kib;
    } points[PLOT_MAX_SIZES]; /* ascending in tokens, from 0 on */
} plot_sizes;

void plot_cache_sizes(FILE *f, const char *title, const plot_sizes *lines, int n_lines);

#endif
