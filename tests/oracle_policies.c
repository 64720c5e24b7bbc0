/* The policies beside R-KV in double precision: see oracle_policies.h. Built and linked into the
 * tests by
 *     make test */
#include "oracle_policies.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static double *doubles(size_t n)
{
    double *list = (double *)alloc_checked(n * sizeof *list);
    size_t i;
    for (i = 0; i < n; i++) list[i] = 0;
    return list;
}

static int is_memory(const rkv_config *config)
{
    return config->policy == RKV_POLICY_MEMORY_TRACES || config->policy == RKV_POLICY_MEMORY_PROSE;
}

/* ---- rotary embedding ---- */
int oracle_rope_dims(const rkv_rope *rope, int dim)
{
    if (rope->pairing != RKV_ROPE_HALVES && rope->pairing != RKV_ROPE_ADJACENT) return 0;
    return rope->dims ? rope->dims : dim;
}

void oracle_pair(const rkv_rope *rope, int dim, int f, int *x, int *y)
{
    if (rope->pairing == RKV_ROPE_HALVES) {
        *x = f;
        *y = f + oracle_rope_dims(rope, dim) / 2;
    } else {
        *x = 2 * f;
        *y = 2 * f + 1;
    }
}

static double frequency(const rkv_rope *rope, int dim, int f)
{
    double base = rope->base != 0 ? (double)rope->base : 10000;
    if (rope->frequencies) return (double)rope->frequencies[f];
    return (double)(float)pow(base, -2.0 * f / oracle_rope_dims(rope, dim));
}

/* Turns every pair of a row by direction * position * frequency. */
static void turn(double *out, const float *row, const rkv_rope *rope, int dim, double position,
                 int direction)
{
    int i, f, x, y;
    for (i = 0; i < dim; i++) out[i] = (double)row[i];
    for (f = 0; f < oracle_rope_dims(rope, dim) / 2; f++) {
        double angle = direction * position * frequency(rope, dim, f);
        oracle_pair(rope, dim, f, &x, &y);
        out[x] = (double)row[x] * cos(angle) - (double)row[y] * sin(angle);
        out[y] = (double)row[x] * sin(angle) + (double)row[y] * cos(angle);
    }
}

void oracle_unrotate(double *out, const float *row, const rkv_rope *rope, int dim, int position)
{
    turn(out, row, rope, dim, position, -1);
}

void oracle_rotate(double *out, const float *row, const rkv_rope *rope, int dim, int position)
{
    turn(out, row, rope, dim, position, 1);
}

/* ---- attention ---- */
/* The slot of the query of a row: the newest row's is the one before the oldest. */
static const float *query_of(const oracle_input *in, int g, int row)
{
    int votes = config_votes(in->config), age = in->n_tokens - 1 - row;
    int slot = (in->first_query - 1 - age + 2 * votes) % votes;
    return in->queries + ((size_t)g * (size_t)votes + (size_t)slot) * (size_t)in->dim;
}

/* p[i] for the rows i <= row: what one query head at that row looks at. *size: the largest
 * sum |q_d k_d| * scale, which the error of a logit grows with. */
static void attention(const oracle_input *in, int g, int row, double *p, double *size)
{
    const float *query = query_of(in, g, row);
    double scale = in->scale != 0 ? (double)in->scale : 1 / sqrt((double)in->dim);
    double top = -INFINITY, sum = 0;
    int i, d;
    for (i = 0; i <= row; i++) {
        const float *key = in->keys + (size_t)i * (size_t)in->dim;
        double logit = 0, absolute = 0;
        for (d = 0; d < in->dim; d++) {
            logit += scale * (double)query[d] * (double)key[d];
            absolute += fabs(scale * (double)query[d] * (double)key[d]);
        }
        if (in->softcap > 0) logit = (double)in->softcap * tanh(logit / (double)in->softcap);
        p[i] = logit;
        if (logit > top) top = logit;
        if (absolute > *size) *size = absolute;
    }
    for (i = 0; i <= row; i++) sum += p[i] = exp(p[i] - top);
    for (i = 0; i <= row; i++) p[i] /= sum;
}

/* I of MEMORY and H2O: the newest of the new queries vote. */
static void remember_importance(oracle_round *out, const oracle_input *in)
{
    const rkv_config *config = in->config;
    int votes = config_votes(config) < in->n_new ? config_votes(config) : in->n_new, row, g, i;
    double decay = config->decay != 0 ? (double)config->decay : 0.995, size = 0;
    double *p = doubles((size_t)in->n_tokens), *I = out->importance;
    for (i = 0; i < in->n_tokens - in->n_new; i++)
        I[i] = is_memory(config) ? pow(decay, in->n_new) * in->importance[i] : in->importance[i];
    for (row = in->n_tokens - votes; row < in->n_tokens; row++)
        for (g = 0; g < in->group; g++) {
            attention(in, g, row, p, &size);
            if (is_memory(config)) {
                for (i = 0; i < row; i++)
                    if (p[i] > I[i]) I[i] = p[i];
            } else {
                for (i = 0; i <= row; i++) I[i] += p[i];
            }
        }
    out->importance_error = 5e-6 + 3e-7 * size;
    free(p);
}

/* ---- later copies ---- */
static double cosine(const double *a, const double *b, int dim)
{
    double dot = 0, aa = 0, bb = 0;
    int d;
    for (d = 0; d < dim; d++) {
        dot += a[d] * b[d];
        aa += a[d] * a[d];
        bb += b[d] * b[d];
    }
    return dot / ((sqrt(aa) + 1e-8) * (sqrt(bb) + 1e-8));
}

static void remember_copies(oracle_round *out, const oracle_input *in)
{
    const int n = in->n_tokens, old = n - in->n_new, dim = in->dim;
    double *keys = doubles((size_t)n * (size_t)dim), *D = out->later_copy;
    int i, j;
    for (i = 0; i < n; i++)
        oracle_unrotate(keys + (size_t)i * (size_t)dim, in->keys + (size_t)i * (size_t)dim,
                        &in->rope, dim, in->positions ? in->positions[i] : 0);
    for (i = 0; i < old; i++) D[i] = in->later_copy[i];
    for (i = 0; i < n; i++)
        for (j = i + 1 > old ? i + 1 : old; j < n; j++) {
            double c = cosine(keys + (size_t)i * (size_t)dim, keys + (size_t)j * (size_t)dim, dim);
            if (c > D[i]) D[i] = c;
        }
    free(keys);
}

/* ---- ranks ---- */
static int rank_of(const double *x, int n, int i)
{
    int j, rank = 0;
    for (j = 0; j < n; j++) rank += x[j] < x[i] || (j < i && x[j] == x[i]);
    return rank;
}

/* How many of the others might be on the other side of i. */
static int rank_error(const double *x, int n, int i, double relative, double absolute)
{
    int j, close = 0;
    for (j = 0; j < n; j++)
        close += j != i && fabs(x[j] - x[i]) <= relative * (fabs(x[i]) + fabs(x[j])) + 2 * absolute;
    return close;
}

static double memory_score(const rkv_config *config, const double *I, const double *D, int m, int i)
{
    double lambda = (double)config->lambda, importance = rank_of(I, m, i);
    if (config->policy == RKV_POLICY_MEMORY_TRACES)
        return (lambda * importance - (1 - lambda) * rank_of(D, m, i)) / m;
    return lambda * importance / m - (1 - lambda) * D[i];
}

/* Sums of ranks are exact where lambda is one half, and so are their ties. */
static void score_memory(oracle_round *out, const rkv_config *config)
{
    const double *I = out->importance, *D = out->later_copy;
    double lambda = (double)config->lambda, rounding = lambda != 0.5 ? 1e-6 : 0;
    int m = out->n_candidates, i;
    for (i = 0; i < m; i++) {
        out->score[i] = memory_score(config, I, D, m, i);
        out->tolerance[i] = lambda * rank_error(I, m, i, out->importance_error, 1e-37) / m;
        if (config->policy == RKV_POLICY_MEMORY_TRACES)
            out->tolerance[i] +=
                (1 - lambda) * rank_error(D, m, i, 0, ORACLE_COSINE_ERROR) / m + rounding;
        else
            out->tolerance[i] += (1 - lambda) * ORACLE_COSINE_ERROR + 1e-6;
    }
}

void oracle_state_score(const rkv_config *config, const float *importance, const float *later_copy,
                        const float *bias, int n_candidates, double *score)
{
    double *I = doubles((size_t)n_candidates), *D = doubles((size_t)n_candidates);
    int i;
    for (i = 0; i < n_candidates; i++) {
        I[i] = (double)importance[i];
        if (later_copy) D[i] = (double)later_copy[i];
    }
    for (i = 0; i < n_candidates; i++) {
        score[i] = is_memory(config) ? memory_score(config, I, D, n_candidates, i) : I[i];
        if (bias) score[i] += (double)bias[i];
    }
    free(I);
    free(D);
}

static void score_h2o(oracle_round *out)
{
    int i;
    for (i = 0; i < out->n_candidates; i++) {
        out->score[i] = out->importance[i];
        out->tolerance[i] = out->importance_error * out->importance[i] + 1e-37;
    }
}

/* ---- TriAttention ---- */
/* The mean of E[q'] turned to 1, 2, 4, ..., 512 tokens after the newest. */
static void expected_query(const oracle_input *in, int g, double *u)
{
    double *turned = doubles((size_t)in->dim);
    int newest = in->positions ? in->positions[in->n_tokens - 1] : 0, offset, d;
    for (d = 0; d < in->dim; d++) u[d] = 0;
    for (offset = 1; offset <= 512; offset *= 2) {
        oracle_rotate(turned, in->mean_queries + (size_t)g * (size_t)in->dim, &in->rope, in->dim,
                      newest + offset);
        for (d = 0; d < in->dim; d++) u[d] += turned[d] / 10;
    }
    free(turned);
}

/* s of every candidate for one query head; returns how large the sums inside are. */
static double expected_logits(const oracle_input *in, int g, int m, double *s)
{
    const float *mean = in->mean_queries + (size_t)g * (size_t)in->dim;
    const float *sizes = in->mean_sizes + (size_t)g * (size_t)(in->dim / 2);
    double *u = doubles((size_t)in->dim), largest = 0;
    int i, d, f, x, y;
    expected_query(in, g, u);
    for (i = 0; i < m; i++) {
        const float *key = in->keys + (size_t)i * (size_t)in->dim;
        double absolute = 0;
        s[i] = 0;
        for (d = 0; d < in->dim; d++) {
            s[i] += u[d] * (double)key[d];
            absolute += fabs((double)mean[d] * (double)key[d]);
        }
        for (f = 0; f < oracle_rope_dims(&in->rope, in->dim) / 2; f++) {
            double spread, length;
            oracle_pair(&in->rope, in->dim, f, &x, &y);
            spread = (double)sizes[f] - hypot((double)mean[x], (double)mean[y]);
            length = hypot((double)key[x], (double)key[y]);
            s[i] += spread * length;
            absolute += fabs(spread * length);
        }
        s[i] /= sqrt((double)in->dim);
        absolute /= sqrt((double)in->dim);
        if (absolute > largest) largest = absolute;
    }
    free(u);
    return largest;
}

static void score_triattention(oracle_round *out, const oracle_input *in)
{
    int m = out->n_candidates, g, i;
    double *s = doubles((size_t)m);
    for (i = 0; i < m; i++) out->score[i] = -INFINITY;
    for (g = 0; g < in->group; g++) {
        double size = expected_logits(in, g, m, s), mean = 0, variance = 0, deviation, error;
        for (i = 0; i < m; i++) mean += s[i] / m;
        for (i = 0; i < m; i++) variance += (s[i] - mean) * (s[i] - mean) / m;
        deviation = sqrt(variance);
        error = deviation > 1e-5 * size ? 2e-6 * size / deviation : size > 0 ? INFINITY : 0;
        for (i = 0; i < m; i++) {
            double z = deviation > 0 ? (s[i] - mean) / deviation : 0;
            if (z > out->score[i]) out->score[i] = z;
            z = error * (1 + fabs(z)) + 1e-6 * fabs(z);
            if (z > out->tolerance[i]) out->tolerance[i] = z;
        }
    }
    free(s);
}

/* ---- random ---- */
static double random_score(const oracle_input *in, int i)
{
    uint64_t seed = in->config->seed, layer = (uint64_t)in->layer, head = (uint64_t)in->head;
    uint64_t place = (layer << 40) ^ (head << 32);
    uint64_t h = (seed * 0x9e3779b97f4a7c15u + place) ^ (uint64_t)(uint32_t)in->positions[i];
    h ^= h >> 30;
    h *= 0xbf58476d1ce4e5b9u;
    h ^= h >> 27;
    h *= 0x94d049bb133111ebu;
    h ^= h >> 31;
    return ldexp((double)(h >> 40), -24);
}

/* ---- R-KV, also with more votes than the window ---- */
static void score_rkv(oracle_round *out, const oracle_input *in)
{
    int votes = config_votes(in->config), g, a, i;
    size_t row = (size_t)in->dim * sizeof(float);
    float *oldest_first = NULL;
    oracle_head head;
    if (in->queries) {
        oldest_first = (float *)alloc_checked((size_t)in->group * (size_t)votes * row);
        for (g = 0; g < in->group; g++)
            for (a = 0; a < votes; a++)
                memcpy(oldest_first + (size_t)(g * votes + a) * (size_t)in->dim,
                       query_of(in, g, in->n_tokens - votes + a), row);
    }
    oracle_score(&head, in->config, in->keys, oldest_first, in->n_tokens, in->dim, in->group,
                 in->scale, in->softcap);
    for (i = 0; i < out->n_candidates; i++) {
        out->score[i] = head.score[i];
        out->tolerance[i] = oracle_tolerance(&head, in->config);
    }
    out->near_threshold = head.margin < 5e-6;
    oracle_free(&head);
    free(oldest_first);
}

/* ---- a round ---- */
static void add_bias(oracle_round *out, const float *bias)
{
    int i;
    for (i = 0; i < out->n_candidates && bias; i++) {
        out->score[i] += (double)bias[i];
        if (bias[i] != 0) out->tolerance[i] += 1e-6 * (1 + fabs((double)bias[i]));
    }
}

void oracle_play(oracle_round *out, const oracle_input *in)
{
    int i;
    memset(out, 0, sizeof *out);
    out->n_tokens = in->n_tokens;
    out->n_candidates = in->n_tokens - config_window(in->config);
    out->importance = doubles((size_t)in->n_tokens);
    out->later_copy = doubles((size_t)in->n_tokens);
    out->score = doubles((size_t)in->n_tokens);
    out->tolerance = doubles((size_t)in->n_tokens);
    switch (in->config->policy) {
    case RKV_POLICY_RKV: score_rkv(out, in); break;
    case RKV_POLICY_MEMORY_TRACES:
    case RKV_POLICY_MEMORY_PROSE:
        remember_importance(out, in);
        remember_copies(out, in);
        score_memory(out, in->config);
        break;
    case RKV_POLICY_H2O:
        remember_importance(out, in);
        score_h2o(out);
        break;
    case RKV_POLICY_TRIATTENTION: score_triattention(out, in); break;
    case RKV_POLICY_RANDOM:
        for (i = 0; i < out->n_candidates; i++) out->score[i] = random_score(in, i);
        break;
    case RKV_POLICY_OWN_SCORE: break;
    }
    add_bias(out, in->bias);
}

void oracle_round_free(oracle_round *round)
{
    free(round->importance);
    free(round->later_copy);
    free(round->score);
    free(round->tolerance);
}

/* ---- jobs ---- */
static double *carried(const job *j, int head, int plane, int n)
{
    const float *state = job_state(j, head, plane);
    double *list = doubles((size_t)n);
    int i;
    for (i = 0; i < n && state; i++) list[i] = (double)state[i];
    return list;
}

oracle_round *oracle_play_job(const job *j, const rkv_config *config, int layer,
                              const int32_t *positions, int stride)
{
    const shape *s = &j->shape;
    const int query_heads = s->kv_heads * s->group, old = s->n_tokens - j->remembered.n_new;
    oracle_round *rounds = (oracle_round *)alloc_checked((size_t)s->kv_heads * sizeof *rounds);
    const float *means = (const float *)(const void *)j->means.data;
    int h;
    for (h = 0; h < s->kv_heads; h++) {
        double *I = carried(j, h, 0, old), *D = carried(j, h, 1, old);
        oracle_input in;
        memset(&in, 0, sizeof in);
        in.config = config;
        in.n_tokens = s->n_tokens;
        in.n_new = j->remembered.n_new;
        in.dim = s->head_dim;
        in.group = s->group;
        in.first_query = s->first_query;
        in.layer = layer;
        in.head = h;
        in.keys = j->keys_f32 + (size_t)h * (size_t)s->n_tokens * (size_t)s->head_dim;
        in.queries = j->queries_f32 + (size_t)(h * s->group * j->votes) * (size_t)s->head_dim;
        in.positions = positions + (config->scope == RKV_PER_HEAD ? h : 0) * stride;
        in.importance = I;
        in.later_copy = D;
        if (means) {
            in.mean_queries = means + h * s->group * s->head_dim;
            in.mean_sizes = means + query_heads * s->head_dim + h * s->group * (s->head_dim / 2);
        }
        in.bias = job_bias(j, h);
        in.rope = j->remembered.rope;
        in.scale = j->remembered.scale;
        in.softcap = j->remembered.softcap;
        oracle_play(&rounds[h], &in);
        free(I);
        free(D);
    }
    return rounds;
}

void oracle_free_rounds(oracle_round *rounds, const job *j)
{
    int h;
    for (h = 0; h < j->shape.kv_heads; h++) oracle_round_free(&rounds[h]);
    free(rounds);
}

/* ---- fates ---- */
/* Is row y better than x, as far as is known: 1 surely, 0 perhaps, -1 surely not. */
static int better(const double *score, const double *tolerance, int y, int x)
{
    double slack = tolerance[x] + tolerance[y];
    if (slack == 0 && score[y] == score[x]) return y > x ? 1 : -1;
    if (score[y] > score[x] + slack) return 1;
    return score[y] < score[x] - slack ? -1 : 0;
}

void oracle_fates(const rkv_config *config, const double *score, const double *tolerance,
                  const uint8_t *pins, int n_tokens, signed char *fates)
{
    const int first = config->pinned, end = n_tokens - config_protect(config);
    int places = config->budget - first - (n_tokens - end), x, y;
    for (x = 0; x < n_tokens; x++) fates[x] = 1;
    if (n_tokens <= config->budget) return;
    for (x = first; x < end; x++) places -= pins && pins[x];
    for (x = first; x < end; x++) {
        int surely = 0, perhaps = 0;
        if (pins && pins[x]) continue;
        for (y = first; y < end; y++) {
            int is_better = y == x || (pins && pins[y]) ? -1 : better(score, tolerance, y, x);
            surely += is_better > 0;
            perhaps += is_better >= 0;
        }
        fates[x] = (signed char)(perhaps < places ? 1 : surely >= places ? -1 : 0);
    }
}
