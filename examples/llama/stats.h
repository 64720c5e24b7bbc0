/* stats.h - losses from logits, and intervals over documents. */
#ifndef STATS_H
#define STATS_H

/* In double, from f32 logits of n tokens. */
double log_sum_exp(const float *logits, int n);
int arg_max(const float *logits, int n); /* the first of equals */

/* The divergence of q from p, sum of p (log p - log q), in nats. p_norm and q_norm: log_sum_exp. */
double divergence(const float *p, double p_norm, const float *q, double q_norm, int n);

typedef struct interval {
    double mean, low, high;
} interval;

/* sum(part) / sum(whole) over n documents, with the 95 % interval of 4000 bootstrap resamples of
 * the documents (percentiles, a fixed seed: two calls resample alike, so differences are paired).
 * All zero where sum(whole) is 0. */
interval bootstrap(const double *part, const double *whole, int n);

double median(double *values, int n); /* sorts them */

#endif
