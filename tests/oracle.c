/* The method in double precision: see oracle.h. Built and linked into the tests by
 *     make test */
#include "oracle.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static double *doubles(size_t n)
{
    double *list = (double *)alloc_checked(n * sizeof *list);
    memset(list, 0, n * sizeof *list);
    return list;
}

static double dot(const float *a, const float *b, int dim)
{
    double sum = 0;
    int i;
    for (i = 0; i < dim; i++) sum += (double)a[i] * (double)b[i];
    return sum;
}

/* The logit of one voting query a for token j: its group's, folded. */
static double group_logit(oracle_head *out, const float *key, const float *queries, int dim,
                          int group, double scale, double softcap)
{
    double best = -INFINITY;
    int g, i;
    for (g = 0; g < group; g++) {
        const float *query = queries + (size_t)g * (size_t)out->votes * (size_t)dim;
        double logit = dot(query, key, dim) * scale, size = 0;
        for (i = 0; i < dim; i++) size += fabs((double)query[i] * (double)key[i]) * scale;
        if (size > out->logit_size) out->logit_size = size;
        if (softcap > 0) logit = softcap * tanh(logit / softcap);
        if (logit > best) best = logit;
    }
    return best;
}

static void softmax(double *x, int n)
{
    double top = -INFINITY, sum = 0;
    int i;
    for (i = 0; i < n; i++)
        if (x[i] > top) top = x[i];
    for (i = 0; i < n; i++) sum += x[i] = exp(x[i] - top);
    for (i = 0; i < n; i++) x[i] /= sum;
}

/* out[j] = max of x over [j - pool/2, j + (pool-1)/2], clipped to [0, n). */
static void max_pool(const double *x, double *out, int n, int pool)
{
    int left = pool / 2, right = (pool - 1) / 2, j, k;
    for (j = 0; j < n; j++) {
        out[j] = x[j];
        for (k = j - left < 0 ? 0 : j - left; k <= j + right && k < n; k++)
            if (x[k] > out[j]) out[j] = x[k];
    }
}

/* out[j] = mean of x over the same; what lies outside counts as 0. */
static void mean_pool(const double *x, double *out, int n, int pool)
{
    int left = pool / 2, right = (pool - 1) / 2, j, k;
    for (j = 0; j < n; j++) {
        out[j] = 0;
        for (k = j - left; k <= j + right; k++)
            if (k >= 0 && k < n) out[j] += x[k] / pool;
    }
}

static void pool_over(const rkv_config *config, double *x, int n)
{
    double *pooled = doubles((size_t)n);
    if (config->mean_pool)
        mean_pool(x, pooled, n, config->pool ? config->pool : 7);
    else
        max_pool(x, pooled, n, config->pool ? config->pool : 7);
    memcpy(x, pooled, (size_t)n * sizeof *x);
    free(pooled);
}

/* The query of row n_tokens - votes + a sees the candidates up to that row. */
static void importance(oracle_head *out, const rkv_config *config, const float *keys,
                       const float *queries, int dim, int group, float scale, float softcap)
{
    int candidates = out->n_tokens - out->window, a, j;
    double factor = scale != 0 ? (double)scale : 1 / sqrt((double)dim);
    double *p = doubles((size_t)candidates);
    for (a = 0; a < out->votes; a++) {
        int row = out->n_tokens - out->votes + a;
        for (j = 0; j < candidates; j++)
            p[j] = j > row ? -INFINITY
                           : group_logit(out, keys + (size_t)j * (size_t)dim,
                                         queries + (size_t)a * (size_t)dim, dim, group, factor,
                                         (double)softcap);
        softmax(p, candidates);
        if (config->variant == RKV_PAPER) pool_over(config, p, candidates);
        for (j = 0; j < candidates; j++) out->importance[j] += p[j] / out->votes;
    }
    if (config->variant == RKV_PUBLISHED) pool_over(config, out->importance, candidates);
    free(p);
}

static double *cosines(const float *keys, int n, int dim, double *norms)
{
    double *s = doubles((size_t)n * (size_t)n);
    int i, j;
    for (i = 0; i < n; i++) {
        const float *key = keys + (size_t)i * (size_t)dim;
        norms[i] = sqrt(dot(key, key, dim));
    }
    for (i = 0; i < n; i++)
        for (j = 0; j < i; j++) {
            double value =
                dot(keys + (size_t)i * (size_t)dim, keys + (size_t)j * (size_t)dim, dim) /
                ((norms[i] + 1e-8) * (norms[j] + 1e-8));
            s[(size_t)i * (size_t)n + (size_t)j] = value;
            s[(size_t)j * (size_t)n + (size_t)i] = value;
        }
    return s;
}

/* Zeroes in row i the entries of its `recent` most recent similar keys. A zero key's cosines and
 * the diagonal are exact, all others have a margin. */
static void exempt_row(oracle_head *out, const rkv_config *config, double *row, int i, int n,
                       const double *norms)
{
    double threshold = (double)config->threshold;
    int recent = config->recent ? config->recent : 1, found = 0, j;
    for (j = n - 1; j >= 0 && found < recent; j--) {
        double margin = fabs(row[j] - threshold);
        if (j != i && norms[i] > 0 && norms[j] > 0 && margin < out->margin) out->margin = margin;
        if (row[j] > threshold) {
            row[j] = 0;
            found++;
        }
    }
    if (!found && config->variant == RKV_PUBLISHED) row[0] = 0;
}

static void redundancy(oracle_head *out, const rkv_config *config, const float *keys, int dim)
{
    int n = out->n_tokens - (config->variant == RKV_PAPER ? out->window : 0), i, j;
    double *norms = doubles((size_t)n), *s = cosines(keys, n, dim, norms);
    for (i = 0; i < n; i++) {
        double *row = s + (size_t)i * (size_t)n;
        exempt_row(out, config, row, i, n, norms);
        for (j = 0; j < n; j++) out->redundancy[config->variant == RKV_PAPER ? i : j] += row[j] / n;
    }
    softmax(out->redundancy, n);
    free(norms);
    free(s);
}

static double largest(const double *x, int n)
{
    double top = 0;
    int i;
    for (i = 0; i < n; i++)
        if (x[i] > top) top = x[i];
    return top;
}

void oracle_score(oracle_head *out, const rkv_config *config, const float *keys,
                  const float *queries, int n_tokens, int dim, int group, float scale,
                  float softcap)
{
    double lambda = (double)config->lambda;
    int candidates, j;
    out->n_tokens = n_tokens;
    out->window = config_window(config);
    out->votes = config_votes(config);
    out->margin = INFINITY;
    out->logit_size = 0;
    candidates = n_tokens - out->window;
    out->importance = doubles((size_t)n_tokens);
    out->redundancy = doubles((size_t)n_tokens);
    out->score = doubles((size_t)n_tokens);
    if (lambda > 0) importance(out, config, keys, queries, dim, group, scale, softcap);
    if (lambda < 1) redundancy(out, config, keys, dim);
    for (j = 0; j < candidates; j++)
        out->score[j] = lambda * out->importance[j] - (1 - lambda) * out->redundancy[j];
    out->importance_max = largest(out->importance, candidates);
    out->redundancy_max = largest(out->redundancy, n_tokens);
}

void oracle_free(oracle_head *head)
{
    free(head->importance);
    free(head->redundancy);
    free(head->score);
}

/* 1e-5 of the largest value of either part, and what rounding does to large logits: an error of
 * some ulps of sum |q k| in a logit is a relative error of that size in a probability. */
double oracle_tolerance(const oracle_head *head, const rkv_config *config)
{
    double lambda = (double)config->lambda, logit_error = 3e-7 * head->logit_size;
    return lambda * head->importance_max * (1e-5 + logit_error) +
           (1 - lambda) * head->redundancy_max * 1e-5;
}

/* Sorted by score, best first; equal scores: the more recent first. */
typedef struct ranked {
    double score;
    int32_t token;
} ranked;

static int by_score(const void *a, const void *b)
{
    const ranked *x = (const ranked *)a, *y = (const ranked *)b;
    if (x->score != y->score) return x->score > y->score ? -1 : 1;
    return x->token > y->token ? -1 : 1;
}

static int by_token(const void *a, const void *b)
{
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

int oracle_select(const rkv_config *config, const double *score, const uint8_t *pins, int n_tokens,
                  int32_t *kept, double *gap)
{
    int protect = config_protect(config), pinned = config->pinned, choices, chosen, n = 0, i;
    ranked *list;
    *gap = INFINITY;
    if (n_tokens <= config->budget) {
        for (i = 0; i < n_tokens; i++) kept[i] = i;
        return n_tokens;
    }
    choices = n_tokens - protect - pinned;
    chosen = config->budget - protect - pinned;
    list = (ranked *)alloc_checked((size_t)choices * sizeof *list);
    for (i = 0; i < choices; i++) {
        list[i].token = pinned + i;
        list[i].score = chosen ? score[pinned + i] : 0;
        if (pins && pins[pinned + i]) list[i].score = INFINITY;
    }
    qsort(list, (size_t)choices, sizeof *list, by_score);
    for (i = 0; i < pinned; i++) kept[n++] = i;
    for (i = 0; i < chosen; i++) kept[n++] = list[i].token;
    for (i = n_tokens - protect; i < n_tokens; i++) kept[n++] = i;
    if (chosen) *gap = list[chosen - 1].score - list[chosen].score;
    qsort(kept, (size_t)n, sizeof *kept, by_token);
    free(list);
    return n;
}

void oracle_add_layer(double *sum, const oracle_head *heads, int n_heads)
{
    int candidates = heads->n_tokens - heads->window, h, j;
    for (j = 0; j < candidates; j++)
        for (h = 0; h < n_heads; h++) sum[j] += heads[h].score[j] / n_heads;
}

oracle_head *oracle_score_job(const job *j, const rkv_config *config)
{
    const shape *s = &j->shape;
    size_t key_step = (size_t)s->n_tokens * (size_t)s->head_dim;
    size_t query_step = (size_t)s->group * (size_t)j->window * (size_t)s->head_dim;
    oracle_head *heads = (oracle_head *)alloc_checked((size_t)s->kv_heads * sizeof *heads);
    int h;
    for (h = 0; h < s->kv_heads; h++)
        oracle_score(&heads[h], config, j->keys_f32 + (size_t)h * key_step,
                     j->queries_f32 + (size_t)h * query_step, s->n_tokens, s->head_dim, s->group,
                     j->layer.scale, j->layer.softcap);
    return heads;
}

void oracle_free_job(oracle_head *heads, const job *j)
{
    int h;
    for (h = 0; h < j->shape.kv_heads; h++) oracle_free(&heads[h]);
    free(heads);
}
