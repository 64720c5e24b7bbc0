/* stats.c - see stats.h. Build: part of `make llama`. */
#include "stats.h"
#include "../ponder/prng.h"

#include <math.h>
#include <stdlib.h>

double log_sum_exp(const float *logits, int n)
{
    const int best = arg_max(logits, n);
    double sum = 1.0; /* the largest one's */
    for (int i = 0; i < n; i++)
        if (i != best) sum += exp((double)logits[i] - (double)logits[best]);
    return logits[best] + log(sum);
}

int arg_max(const float *logits, int n)
{
    int best = 0;
    for (int i = 1; i < n; i++)
        if (logits[i] > logits[best]) best = i;
    return best;
}

double divergence(const float *p, double p_norm, const float *q, double q_norm, int n)
{
    double sum = 0.0;
    for (int i = 0; i < n; i++) {
        const double log_p = p[i] - p_norm;
        sum += exp(log_p) * (log_p - (q[i] - q_norm));
    }
    return sum;
}

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double median(double *values, int n)
{
    qsort(values, (size_t)n, sizeof *values, ascending);
    return n % 2 ? values[n / 2] : 0.5 * (values[n / 2 - 1] + values[n / 2]);
}

interval bootstrap(const double *part, const double *whole, int n)
{
    enum { RESAMPLES = 4000 };
    static double ratios[RESAMPLES];
    double parts = 0.0, wholes = 0.0;
    interval r = { 0.0, 0.0, 0.0 };
    prng random = { 1 };
    int n_ratios = 0;
    for (int i = 0; i < n; i++) {
        parts += part[i];
        wholes += whole[i];
    }
    if (wholes == 0.0) return r;
    r.mean = parts / wholes;
    for (int k = 0; k < RESAMPLES; k++) {
        parts = wholes = 0.0;
        for (int i = 0; i < n; i++) {
            const int at = prng_below(&random, n);
            parts += part[at];
            wholes += whole[at];
        }
        if (wholes > 0.0) ratios[n_ratios++] = parts / wholes;
    }
    qsort(ratios, (size_t)n_ratios, sizeof *ratios, ascending);
    r.low = ratios[(int)(0.025 * n_ratios)];
    r.high = ratios[(int)(0.975 * n_ratios)];
    return r;
}
