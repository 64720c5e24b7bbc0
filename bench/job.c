/* One attention layer to be compressed: its keys made to order, its runs checked and timed.
 * Part of bench/bench.c and of the library that bench/peer_torch.py loads; built by: make bench */
#define _POSIX_C_SOURCE 200809L
#include "bench/job.h"
#include "tests/harness.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define COLD_BYTES ((size_t)64 << 20) /* beyond any private cache */
#define PHRASE     96                 /* tokens, BENCH_REPEATS */

double bench_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

const char *bench_keys_name(bench_keys keys)
{
    static const char *const names[BENCH_KEYS_COUNT] = { "cosine 0.7", "cosine 0.4", "12% outliers",
                                                         "repeats",    "identical",  "all zero",
                                                         "distinct" };
    return names[keys];
}

const char *bench_dtype_name(rkv_dtype dtype)
{
    return dtype == RKV_OPAQUE ? "loader" : dtype_name(dtype);
}

static void require(rkv_status status, const char *what)
{
    if (status == RKV_OK) return;
    fprintf(stderr, "bench: %s: %s\n", what, rkv_status_string(status));
    exit(1);
}

/* ==== Data ================================================================================== */

/* What the rows of keys and values are made of. */
static rkv_dtype stored_as(const bench_shape *s)
{
    return s->dtype == RKV_OPAQUE ? RKV_Q8_0 : s->dtype;
}

static rkv_dtype query_dtype(const bench_shape *s)
{
    return s->dtype > RKV_BF16 ? RKV_F16 : s->dtype;
}

static size_t key_row_bytes(const bench_shape *s)
{
    return row_bytes(stored_as(s), s->head_dim);
}

/* n rows of floats, encoded. */
static void store_rows(void *out, rkv_dtype dtype, const float *rows, size_t n, int dim)
{
    const size_t bytes = row_bytes(dtype, dim);
    for (size_t r = 0; r < n; r++)
        encode_row(dtype, rows + r * (size_t)dim, dim, (unsigned char *)out + r * bytes);
}

/* A row loader as an engine would write it first. */
static float plain_half(uint16_t half)
{
    const uint32_t sign = (uint32_t)(half & 0x8000u) << 16, exponent = half >> 10 & 31u;
    uint32_t bits = sign | (exponent + 112) << 23 | (uint32_t)(half & 0x3ffu) << 13;
    float x;
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * (float)(half & 0x3ff) / 16777216.0f;
    if (exponent == 31) bits |= 0x7f800000u;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* One block. restrict, as ggml has it: the compiler may then use vectors. */
static void plain_q8_0(const unsigned char *restrict from, float *restrict dst)
{
    uint16_t half;
    memcpy(&half, from, sizeof half);
    const float scale = plain_half(half);
    for (int k = 0; k < 32; k++) dst[k] = scale * (float)(int8_t)from[2 + k];
}

static int load_q8_0(void *user, const rkv_rows *rows, float *dst)
{
    (void)user;
    for (int r = 0; r < rows->n_rows; r++) {
        const unsigned char *row = (const unsigned char *)rows->data + (size_t)r * rows->stride;
        for (int i = 0; i < rows->dim; i += 32, dst += 32) plain_q8_0(row + i / 32 * 34, dst);
    }
    return rows->n_rows;
}

/* Cosine of two different keys of the case, which is the share of their common direction. */
static float common_share(bench_keys keys, int outlier)
{
    if (keys == BENCH_COSINE_07) return 0.7f;
    if (keys == BENCH_COSINE_04) return 0.4f;
    if (keys == BENCH_OUTLIERS && !outlier) return 0.52f; /* 0.88 * 0.88 * 0.52 = 0.4 */
    return 0.0f;
}

/* The seed of a row's own direction: rows with equal seeds are equal. */
static uint64_t row_seed(bench_keys keys, int head, int token)
{
    if (keys == BENCH_REPEATS) token %= PHRASE;
    if (keys == BENCH_IDENTICAL) token = 0;
    return (uint64_t)head << 32 | (uint64_t)token;
}

void bench_fill_keys(void *out, const bench_shape *s)
{
    const size_t dim = (size_t)s->head_dim;
    float *common = (float *)alloc_checked(2 * dim * sizeof *common), *row = common + dim;
    unsigned char *at = (unsigned char *)out;
    for (int h = 0; h < s->kv_heads; h++) {
        rng direction = rng_seed(~(uint64_t)h); /* a row never has it */
        for (size_t i = 0; i < dim; i++) common[i] = (float)rng_normal(&direction);
        for (int j = 0; j < s->n_tokens; j++) {
            rng own = rng_seed(row_seed(s->keys, h, j));
            const float share = common_share(s->keys, rng_below(&own, 100) < 12);
            const float a = sqrtf(share), b = sqrtf(1.0f - share);
            for (size_t i = 0; i < dim; i++) {
                const float x = a * common[i] + b * (float)rng_normal(&own);
                row[i] = s->keys == BENCH_ZERO ? 0.0f : x;
            }
            store_rows(at, stored_as(s), row, 1, s->head_dim);
            at += key_row_bytes(s);
        }
    }
    free(common);
}

void bench_fill_queries(void *out, const bench_shape *s, int window)
{
    const size_t rows = (size_t)s->kv_heads * (size_t)s->group * (size_t)window;
    const size_t count = rows * (size_t)s->head_dim;
    float *numbers = (float *)alloc_checked(count * sizeof *numbers);
    rng random = rng_seed(12345);
    for (size_t i = 0; i < count; i++) numbers[i] = (float)rng_normal(&random);
    store_rows(out, query_dtype(s), numbers, rows, s->head_dim);
    free(numbers);
}

/* ==== How far the scan has to go ============================================================= */

/* A key divided by its norm; zero when it is zero. */
static void unit_row(const bench_job *run, int head, int token, float *unit)
{
    const bench_shape *s = &run->shape;
    const size_t dim = (size_t)s->head_dim;
    const size_t at = (size_t)head * (size_t)s->n_tokens + (size_t)token;
    float norm = 0;
    decode_row(stored_as(s), (const unsigned char *)run->pristine + at * key_row_bytes(s),
               s->head_dim, unit);
    for (size_t i = 0; i < dim; i++) norm += unit[i] * unit[i];
    norm = norm > 0 ? 1.0f / sqrtf(norm) : 0;
    for (size_t i = 0; i < dim; i++) unit[i] *= norm;
}

/* Rows from the newest back to the first that is similar to row `token`. */
static int steps_back(const bench_job *run, int head, int token, float *own, float *other)
{
    int j = run->shape.n_tokens - 1;
    unit_row(run, head, token, own);
    for (; j >= 0; j--) {
        float cosine = 0;
        if (j == token) continue;
        unit_row(run, head, j, other);
        for (int i = 0; i < run->shape.head_dim; i++) cosine += own[i] * other[i];
        if (cosine > run->config.threshold) break;
    }
    return run->shape.n_tokens - (j < 0 ? 0 : j);
}

/* Estimated from every 16th row. */
static double pairs_to_look_at(const bench_job *run)
{
    enum { SAMPLE = 16 };
    const bench_shape *s = &run->shape;
    const double all = (double)s->kv_heads * s->n_tokens * (s->n_tokens - 1) / 2;
    double pairs = 0;
    if (s->keys == BENCH_ZERO) return 0; /* a zero key has no similar key, and needs no search */
    if (s->keys == BENCH_DISTINCT) return all;
    float *rows = (float *)alloc_checked(2 * (size_t)s->head_dim * sizeof *rows);
    for (int h = 0; h < s->kv_heads; h++)
        for (int i = 0; i < s->n_tokens; i += SAMPLE)
            pairs += SAMPLE * steps_back(run, h, i, rows, rows + s->head_dim);
    free(rows);
    return fmin(pairs, all);
}

/* ==== The layer and its copies ============================================================== */

static int votes_of(const rkv_config *config)
{
    return config->votes > 0 ? config->votes : config->window;
}

/* What policies beside R-KV need: no state yet, positions that are row numbers, and the means of
 * queries that say nothing. */
static void add_policy_arrays(const bench_job *run, rkv_layer *layer)
{
    const bench_shape *s = &run->shape;
    const size_t rows = (size_t)s->kv_heads * (size_t)s->n_tokens;
    const size_t floats = rows * (size_t)rkv_state_floats(&run->config);
    const size_t means = rkv_query_means_floats(s->kv_heads * s->group, s->head_dim);
    float *numbers = (float *)alloc_checked(means * sizeof *numbers);
    rng random = rng_seed(54321);
    layer->state = (float *)alloc_checked(floats * sizeof *layer->state);
    layer->positions = (int32_t *)alloc_checked(rows * sizeof *layer->positions);
    for (size_t i = 0; i < floats; i++) layer->state[i] = 0;
    for (size_t i = 0; i < rows; i++) layer->positions[i] = (int32_t)(i % (size_t)s->n_tokens);
    for (size_t i = 0; i < means; i++) numbers[i] = (float)rng_unit(&random);
    layer->query_means = numbers;
    layer->rope.pairing = RKV_ROPE_HALVES;
}

static rkv_layer make_layer(const bench_job *run, void *queries)
{
    const bench_shape *s = &run->shape;
    const size_t sets = (size_t)s->kv_heads;
    rkv_layer layer = RKV_INIT;
    layer.keys = rkv_tensor_make(alloc_checked(run->key_bytes), s->dtype, s->kv_heads, s->n_tokens,
                                 s->head_dim);
    layer.values = rkv_tensor_make(alloc_checked(run->key_bytes), s->dtype, s->kv_heads,
                                   s->n_tokens, s->head_dim);
    layer.queries = rkv_tensor_make(queries, query_dtype(s), s->kv_heads * s->group,
                                    votes_of(&run->config), s->head_dim);
    if (run->config.policy != RKV_POLICY_RKV) add_policy_arrays(run, &layer);
    if (s->dtype == RKV_OPAQUE) {
        layer.keys.element_bytes = layer.values.element_bytes = (int)key_row_bytes(s);
        layer.keys.load = load_q8_0;
    }
    memcpy(layer.keys.data, run->pristine, run->key_bytes);
    memcpy(layer.values.data, run->pristine, run->key_bytes);
    layer.n_tokens = s->n_tokens;
    layer.kept = (int32_t *)alloc_checked(sets * (size_t)s->budget * sizeof *layer.kept);
    layer.scores = (float *)alloc_checked(sets * (size_t)s->n_tokens * sizeof *layer.scores);
    return layer;
}

/* The copies, once the keys are in run->pristine; takes the queries over. */
static void make_copies(bench_job *run, void *queries)
{
    run->n_copies = (int)(COLD_BYTES / (2 * run->key_bytes)) + 1;
    run->layers = (rkv_layer *)alloc_checked((size_t)run->n_copies * sizeof *run->layers);
    for (int c = 0; c < run->n_copies; c++) run->layers[c] = make_layer(run, queries);
    run->pairs = pairs_to_look_at(run);
}

static size_t query_rows(const bench_shape *s, const rkv_config *config)
{
    return (size_t)s->kv_heads * (size_t)s->group * (size_t)votes_of(config);
}

static void start_job(bench_job *run, const bench_shape *s, const rkv_config *config,
                      const char *name)
{
    memset(run, 0, sizeof *run);
    run->shape = *s;
    run->config = *config;
    run->name = name;
    run->key_bytes = (size_t)s->kv_heads * (size_t)s->n_tokens * key_row_bytes(s);
    run->pristine = alloc_checked(run->key_bytes);
}

void bench_job_make_for(bench_job *run, const bench_shape *s, const rkv_config *config)
{
    void *queries = alloc_checked(query_rows(s, config) * row_bytes(query_dtype(s), s->head_dim));
    start_job(run, s, config, bench_keys_name(s->keys));
    bench_fill_keys(run->pristine, s);
    bench_fill_queries(queries, s, votes_of(config));
    make_copies(run, queries);
}

void bench_job_make(bench_job *run, const bench_shape *s)
{
    rkv_config config = rkv_config_default(s->budget);
    /* Of 65536 unrelated keys of dim 128 a few pairs pass cosine 0.5 by chance, none 0.65. */
    if (s->keys == BENCH_DISTINCT) config.threshold = 0.65f;
    bench_job_make_for(run, s, &config);
}

void bench_job_make_from(bench_job *run, const bench_shape *s, const rkv_config *config,
                         const char *name, const float *keys, const float *queries, int n_queries)
{
    const size_t n = query_rows(s, config), row = row_bytes(query_dtype(s), s->head_dim);
    unsigned char *own = (unsigned char *)alloc_checked(n * row);
    const size_t votes = (size_t)votes_of(config), given = (size_t)n_queries;
    start_job(run, s, config, name);
    store_rows(run->pristine, stored_as(s), keys, (size_t)s->kv_heads * (size_t)s->n_tokens,
               s->head_dim);
    for (size_t i = 0; i < n; i++)
        store_rows(own + i * row, query_dtype(s),
                   queries + (i / votes * given + i % votes % given) * (size_t)s->head_dim, 1,
                   s->head_dim);
    make_copies(run, own);
}

void bench_job_free(bench_job *run)
{
    free(run->layers[0].queries.data); /* shared by all copies */
    for (int c = 0; c < run->n_copies; c++) {
        free(run->layers[c].keys.data);
        free(run->layers[c].values.data);
        free(run->layers[c].kept);
        free(run->layers[c].scores);
        free(run->layers[c].state);
        free(run->layers[c].positions);
        free((void *)(uintptr_t)run->layers[c].query_means);
    }
    free(run->layers);
    free(run->pristine);
    free(run->workspace);
}

static void reserve_workspace(bench_job *run, const rkv_backend *backend)
{
    size_t bytes = 0;
    run->layers[0].n_tokens = run->shape.n_tokens;
    require(rkv_workspace_size(backend, &run->config, run->layers, 1, &bytes), "workspace size");
    if (bytes > run->workspace_bytes) {
        free(run->workspace);
        run->workspace = alloc_checked(bytes);
        memset(run->workspace, 0, bytes); /* page faults are not what is timed */
        run->workspace_bytes = bytes;
    }
}

void bench_job_run(bench_job *run, const rkv_backend *backend, bench_stage stage, int copy)
{
    static rkv_status (*const stages[])(const rkv_backend *, const rkv_config *, rkv_layer *, int,
                                        void *, size_t) = { rkv_score, rkv_select, rkv_compact,
                                                            rkv_compress };
    rkv_layer *layer = run->layers + copy;
    layer->n_tokens = run->shape.n_tokens;
    layer->n_new = run->shape.n_tokens - run->shape.budget;
    require(stages[stage](backend, &run->config, layer, 1, run->workspace, run->workspace_bytes),
            "rkv");
}

/* Puts the keys back that a compaction moved; which values lie where changes no time. Positions and
 * state begin again. */
static void restore(bench_job *run, int copy)
{
    const bench_shape *s = &run->shape;
    const size_t rows = (size_t)s->kv_heads * (size_t)s->n_tokens;
    const size_t floats = rows * (size_t)rkv_state_floats(&run->config);
    rkv_layer *layer = run->layers + copy;
    memcpy(layer->keys.data, run->pristine, run->key_bytes);
    for (size_t i = 0; i < floats; i++) layer->state[i] = 0;
    for (size_t i = 0; layer->positions && i < rows; i++)
        layer->positions[i] = (int32_t)(i % (size_t)s->n_tokens);
}

/* ==== Check and time ======================================================================== */

/* Do the first rows of each head hold the pristine rows that the kept set names? */
static int rows_are_kept(const bench_job *run, const rkv_layer *layer)
{
    const bench_shape *s = &run->shape;
    const size_t row = key_row_bytes(s);
    for (int h = 0; h < s->kv_heads; h++) {
        const size_t head = (size_t)h * (size_t)s->n_tokens * row;
        const char *now = (const char *)layer->keys.data + head;
        const char *before = (const char *)run->pristine + head;
        const int32_t *kept = layer->kept + (size_t)h * (size_t)s->budget;
        for (int i = 0; i < layer->n_kept; i++)
            if (memcmp(now + (size_t)i * row, before + (size_t)kept[i] * row, row)) return 0;
    }
    return 1;
}

int bench_job_check(bench_job *run, const rkv_backend *backend, const rkv_backend *reference)
{
    const bench_shape *s = &run->shape;
    const size_t sets = (size_t)s->kv_heads;
    const size_t score_bytes = sets * (size_t)(s->n_tokens - run->config.window) * sizeof(float);
    const size_t kept_bytes = sets * (size_t)s->budget * sizeof(int32_t);
    rkv_layer *layer = run->layers;
    float *scores = (float *)alloc_checked(score_bytes);
    int32_t *kept = (int32_t *)alloc_checked(kept_bytes);
    int equal;

    reserve_workspace(run, reference);
    bench_job_run(run, reference, BENCH_SCORE, 0);
    bench_job_run(run, reference, BENCH_SELECT, 0);
    memcpy(scores, layer->scores, score_bytes);
    memcpy(kept, layer->kept, kept_bytes);

    restore(run, 0);
    reserve_workspace(run, backend);
    bench_job_run(run, backend, BENCH_COMPRESS, 0);
    equal = !memcmp(scores, layer->scores, score_bytes) && !memcmp(kept, layer->kept, kept_bytes) &&
            rows_are_kept(run, layer);
    restore(run, 0);
    free(scores);
    free(kept);
    return equal;
}

double bench_job_time(bench_job *run, const rkv_backend *backend, bench_stage stage, double seconds)
{
    const double start = bench_seconds();
    double best = HUGE_VAL;
    reserve_workspace(run, backend);
    for (int c = 0; c < run->n_copies && stage != BENCH_SCORE && stage != BENCH_COMPRESS; c++) {
        bench_job_run(run, backend, BENCH_SCORE, c); /* what the stage under test reads */
        bench_job_run(run, backend, BENCH_SELECT, c);
    }
    do {
        for (int c = 0; c < run->n_copies && stage == BENCH_COMPRESS; c++) restore(run, c);
        for (int c = 0; c < run->n_copies; c++) {
            const double before = bench_seconds();
            bench_job_run(run, backend, stage, c);
            best = fmin(best, bench_seconds() - before);
            if (bench_seconds() - start > seconds) break;
        }
    } while (bench_seconds() - start < seconds);
    for (int c = 0; c < run->n_copies; c++) restore(run, c);
    return best * 1e6;
}
