/* plot.h - accuracy against budget as a picture (SVG), one line with error bars per method. */
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

#endif
