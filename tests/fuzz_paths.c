/* Every CPU path that this machine has, with one task and with several, does the same to a job
 * drawn from bytes: status, error, scores, kept lists and rows, bit for bit.
 * make fuzz   (build/fuzz/fuzz_paths 60) */
#ifndef RKV_PTHREADS
#define RKV_PTHREADS
#endif
#include "fuzz.h"
#include <math.h>
#include <string.h>

#define MAX_LAYERS  2
#define MAX_BUFFERS (10 * MAX_LAYERS)
#define MAX_DIM     160
#define MAX_WORK    (1 << 20) /* kv_heads * n * n * dim of a layer: the scalar path is slow */

/* ==== A job ================================================================================= */

typedef struct buffer {
    const char *name;
    int layer;
    unsigned char *base, *data;
    size_t bytes;
} buffer;

/* Made again from the same bytes for each path, and so equal before each call. */
typedef struct job {
    rkv_config config;
    rkv_error error;
    rkv_layer layers[MAX_LAYERS];
    int n_layers;
    buffer buffers[MAX_BUFFERS];
    int n_buffers;
    int n_tasks, reversed; /* for the runs with several tasks */
    rkv_status status;
} job;

/* Ends where its allocation ends, so that a sanitizer sees a step too far. */
static void *new_buffer(job *j, const char *name, int layer, size_t bytes, size_t shift)
{
    buffer *b = &j->buffers[j->n_buffers++];
    require(j->n_buffers <= MAX_BUFFERS, "MAX_BUFFERS is too small");
    b->name = name;
    b->layer = layer;
    b->bytes = bytes;
    b->base = (unsigned char *)malloc(bytes + shift + (bytes + shift == 0));
    require(b->base != NULL, "out of memory");
    b->data = b->base + shift;
    memset(b->base, 0xa5, bytes + shift);
    return b->data;
}

static void free_job(job *j)
{
    for (int i = 0; i < j->n_buffers; i++) free(j->buffers[i].base);
}

/* ==== Numbers =============================================================================== */

static uint32_t next(uint32_t *state)
{
    *state = *state * 1664525u + 1013904223u;
    return *state >> 8; /* 24 bits */
}

static float unit(uint32_t *state) /* [-1, 1) */
{
    return (float)next(state) / 8388608.0f - 1.0f;
}

static float from_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Narrow formats cut off the bits that they have no room for and stop at their largest number. */
static void store(unsigned char *to, rkv_dtype dtype, float x)
{
    uint32_t bits;
    uint16_t half;
    memcpy(&bits, &x, sizeof bits);
    if (dtype == RKV_F32 || dtype == RKV_OPAQUE) {
        memcpy(to, &bits, sizeof bits);
        return;
    }
    if (dtype == RKV_F8_E4M3) { /* an f16 with another bias, without its last bits */
        store((unsigned char *)&half, RKV_F16, x / 256.0f);
        if ((half & 0x7fffu) > 0x3f00u) half = (half & 0x8000u) | (isfinite(x) ? 0x3f00u : 0x3f80u);
        *to = (unsigned char)(half >> 8 & 0x80u) | (unsigned char)(half >> 7 & 0x7fu);
        return;
    }
    half = (uint16_t)(bits >> 16);
    if (dtype == RKV_F16 || dtype == RKV_F8_E5M2) {
        const uint16_t sign = half & 0x8000u;
        const float size = fabsf(x);
        if (isnan(x) || isinf(x))
            half = 0x7e00u;
        else if (size >= 65504.0f)
            half = 0x7bffu;
        else if (size < 6.103515625e-5f) /* 2^-14 */
            half = (uint16_t)(size * 16777216.0f);
        else
            half = (uint16_t)(((bits & 0x7fffffffu) >> 13) - (112u << 10));
        half |= sign;
    }
    if (dtype == RKV_F8_E5M2)
        *to = (unsigned char)(half >> 8);
    else
        memcpy(to, &half, sizeof half);
}

/* 32 numbers as a block of q8_0. */
static void store_block(unsigned char *to, const float *x)
{
    float largest = 0;
    for (int i = 0; i < 32; i++) largest = fmaxf(largest, fabsf(x[i]));
    store(to, RKV_F16, largest / 127.0f);
    for (int i = 0; i < 32; i++)
        to[2 + i] = (unsigned char)(largest > 0 ? (int)(x[i] / largest * 127.0f) : 0);
}

/* Opaque rows are f32; one that begins with a NaN is not given. */
static int read_rows(void *user, const rkv_rows *rows, float *dst)
{
    const size_t bytes = (size_t)rows->dim * sizeof *dst;
    (void)user;
    for (int r = 0; r < rows->n_rows; r++, dst += rows->dim) {
        memcpy(dst, (const unsigned char *)rows->data + (size_t)r * rows->stride, bytes);
        if (isnan(*dst)) return r;
    }
    return rows->n_rows;
}

/* ==== Rows ================================================================================== */

typedef enum rows_kind {
    ROWS_NOISE,
    ROWS_EQUAL,
    ROWS_FEW,    /* four different rows, over and over */
    ROWS_SPREAD, /* four rows, each with noise of all sizes */
    ROWS_ANGLE,  /* cosine of a row and the first: the threshold, or a few roundings beside it */
    ROWS_SIGNS,  /* +-1: all cosines are multiples of 2 / dim, up to roundings */
    ROWS_TINY,   /* squares underflow, subnormals and zeros among them */
    ROWS_LARGE,  /* norms up to the largest that is allowed, and now and then beyond */
    ROWS_CANCEL, /* exponents far apart, so that any other order of additions shows */
    ROWS_BITS,   /* any finite number */
    ROWS_KINDS
} rows_kind;

typedef struct rows {
    rows_kind kind;
    uint32_t seed;
    int scale; /* an exponent of 2 */
    float threshold;
} rows;

static rows draw_rows(input *in, float threshold)
{
    rows r;
    r.kind = (rows_kind)pick(in, ROWS_KINDS);
    r.seed = take(in) * 2654435761u;
    r.scale = chance(in, 4) ? number(in, 0, 16) - 8 : 0;
    r.threshold = threshold;
    return r;
}

static void angle_row(const rows *r, uint32_t *state, int token, float *row, int dim)
{
    float cosine = r->threshold;
    for (uint32_t n = next(state) % 4; n > 0; n--)
        cosine = nextafterf(cosine, next(state) % 2 ? 2.0f : -2.0f);
    for (int i = 0; i < dim; i++) row[i] = 0;
    row[0] = 1;
    if (token % 4 == 0 || dim == 1) return;
    row[0] = cosine;
    row[1 + (int)(next(state) % (uint32_t)(dim - 1))] = sqrtf(fabsf(1 - cosine * cosine));
}

static void make_row(const rows *r, int head, int token, float *row, int dim)
{
    uint32_t own = r->seed + (uint32_t)head * 40503u + (uint32_t)token * 69069u;
    uint32_t shared = r->seed;
    float size = ldexpf(1, r->scale);
    next(&own);
    if (r->kind == ROWS_FEW || r->kind == ROWS_SPREAD) shared += next(&own) % 4 * 977;
    if (r->kind == ROWS_SPREAD) own = r->seed ^ next(&own);
    const float spread = ldexpf(1, -(int)(next(&own) % 24));
    if (r->kind == ROWS_TINY) size = ldexpf(1, -(int)(next(&own) % 150));
    if (r->kind == ROWS_LARGE) {
        const uint32_t range = next(&own) % 64 ? 17 : 24;
        size = ldexpf(1, 34 + (int)(next(&own) % range));
    }
    if (r->kind == ROWS_ANGLE) angle_row(r, &own, token, row, dim);
    for (int i = 0; i < dim; i++) {
        switch (r->kind) {
        case ROWS_EQUAL:
        case ROWS_FEW: row[i] = unit(&shared); break;
        case ROWS_SPREAD: row[i] = unit(&shared) + spread * unit(&own); break;
        case ROWS_ANGLE: break;
        case ROWS_SIGNS: row[i] = next(&own) % 4 ? 1.0f : -1.0f; break;
        case ROWS_CANCEL:
            row[i] = unit(&own);
            row[i] = ldexpf(row[i], (int)(next(&own) % 24) - 12);
            break;
        case ROWS_BITS:
            row[i] = from_bits(next(&own) << 8);
            if (!(fabsf(row[i]) < 1e14f)) row[i] = 1;
            break;
        default: row[i] = unit(&own);
        }
        row[i] *= size;
    }
    if (r->kind == ROWS_SIGNS || r->kind == ROWS_ANGLE) { /* other roundings, the same angles */
        const float length = next(&own) % 2 ? 1.0f : 1.5f + unit(&own) / 2;
        for (int i = 0; i < dim; i++) row[i] *= length;
    }
}

/* ==== Views ================================================================================= */

static unsigned char *element_at(const rkv_tensor *t, int head, int token, int i)
{
    const int64_t height = t->block_table ? t->block_tokens : t->tokens;
    const int64_t heads_apart = or_usual(t->head_stride, height * row_dims(t));
    const int64_t blocks_apart = or_usual(t->block_stride, t->heads * height * row_dims(t));
    const int dims = element_dims(t);
    int64_t at = head * heads_apart + i / dims * dims * or_usual(t->dim_stride, 1);
    if (t->block_table) {
        at += t->block_table[token / t->block_tokens] * blocks_apart;
        token %= t->block_tokens;
    }
    at += token * or_usual(t->token_stride, row_dims(t));
    return (unsigned char *)t->data + (size_t)(at / dims) * element_size(t);
}

/* Blocks in some order without repetition. */
static void make_pages(input *in, job *j, int layer, rkv_tensor *t)
{
    const int descend = chance(in, 2), rotate = (int)take(in);
    t->block_tokens = number(in, 1, 8);
    const int n = (t->tokens - 1) / t->block_tokens + 1;
    int32_t *table = (int32_t *)new_buffer(j, "block table", layer, (size_t)n * sizeof *table, 0);
    for (int b = 0; b < n; b++) table[b] = ((descend ? n - 1 - b : b) + rotate) % n;
    t->block_table = table;
}

static void lay_out(input *in, job *j, int layer, rkv_tensor *t, int is_values)
{
    const int has_axis = t->dtype != RKV_OPAQUE && t->dtype != RKV_Q8_0;
    const int dim = row_dims(t), dims = element_dims(t);
    switch (take(in) % (is_values && has_axis ? 5u : 4u)) {
    case 1: /* [token][head][dim], a gap between tokens */
        t->head_stride = dim;
        t->token_stride = (int64_t)t->heads * dim + number(in, 0, 3) * dims;
        break;
    case 2: /* a gap behind each row */
        t->token_stride = dim + number(in, 0, 17) * dims;
        t->head_stride = t->token_stride * t->tokens;
        break;
    case 3: make_pages(in, j, layer, t); break;
    case 4: /* transposed */
        t->token_stride = 1;
        t->dim_stride = t->tokens;
        break;
    default: break;
    }
}

static rkv_tensor make_view(input *in, job *j, const char *name, int layer, rkv_tensor t,
                            int is_values)
{
    if (t.dtype == RKV_OPAQUE) {
        t.element_bytes = t.dim * (int)sizeof(float);
        t.load = read_rows;
    }
    lay_out(in, j, layer, &t, is_values);
    const double elements = extent_elements(&t);
    require(elements > 0, "a view of nothing");
    t.data = new_buffer(j, name, layer, (size_t)elements * element_size(&t),
                        chance(in, 4) ? take(in) % 8 : 0);
    return t;
}

static void fill_rows(const rkv_tensor *t, const rows *r)
{
    float row[MAX_DIM];
    for (int h = 0; h < t->heads; h++)
        for (int n = 0; n < t->tokens; n++) {
            make_row(r, h, n, row, t->dim);
            for (int i = 0; i < t->dim; i += element_dims(t))
                if (t->dtype == RKV_Q8_0)
                    store_block(element_at(t, h, n, i), row + i);
                else
                    store(element_at(t, h, n, t->dtype == RKV_OPAQUE ? 4 * i : i), t->dtype,
                          row[i]);
        }
}

/* Single elements, where and what the bytes say; not finite now and then. */
static void poke(input *in, const rkv_tensor *t)
{
    static const float odd[] = { 0.0f, -0.0f, 1e-45f, -1e-38f, 1.0f, -1.0f, 1e8f, 9e17f };
    for (unsigned n = take(in) % 4; n > 0; n--) {
        const int h = (int)take(in) % t->heads, token = (int)(take(in) * 7) % t->tokens;
        const int i = (int)take(in) % t->dim;
        unsigned char *to = element_at(t, h, token, t->dtype == RKV_OPAQUE ? 4 * i : i);
        if (t->dtype == RKV_F8_E4M3 || t->dtype == RKV_F8_E5M2 || t->dtype == RKV_Q8_0) {
            to[chance(in, 2) && t->dtype == RKV_Q8_0] = (unsigned char)take(in);
            continue;
        }
        if (!chance(in, 16))
            store(to, t->dtype, odd[take(in) % 8]);
        else
            store(to, t->dtype, chance(in, 2) ? (float)NAN : (float)INFINITY);
    }
}

/* ==== Bytes to a job ======================================================================== */

static float draw_threshold(input *in)
{
    static const float list[] = { 0.5f, 0.0f, -1.0f, -0.5f, 0.25f, 0.75f, 0.9f, 1.0f };
    float x = list[take(in) % 8];
    if (chance(in, 4)) x = (float)take(in) / 128.0f - 1.0f;
    for (unsigned n = take(in) % 3; n > 0; n--) x = nextafterf(x, 0);
    return x;
}

static void make_config(input *in, rkv_config *c, int n)
{
    static rkv_config (*const presets[])(int) = { rkv_config_default, rkv_config_paper,
                                                  rkv_config_snapkv };
    const int window = number(in, 1, 12), pinned = chance(in, 4) ? number(in, 0, 8) : 0;
    const int budget = window + pinned + (int)(take(in) * 2) % n;
    *c = presets[take(in) % 3](budget);
    c->window = window;
    c->pinned = pinned;
    c->pool = number(in, 0, 9);
    c->recent = chance(in, 2) ? number(in, 0, 5) : 1;
    if (chance(in, 2)) c->lambda = (float)take(in) / 255.0f;
    c->threshold = draw_threshold(in);
    c->scope = (rkv_scope)pick(in, 3);
    if (chance(in, 2)) c->variant = (rkv_variant)pick(in, 2);
    if (chance(in, 4)) c->protect = number(in, 0, budget - pinned);
}

static void make_outputs(input *in, job *j, int l)
{
    rkv_layer *layer = &j->layers[l];
    const rkv_config *c = &j->config;
    const size_t heads = (size_t)layer->keys.heads;
    const size_t sets = c->scope == RKV_PER_HEAD ? heads : 1;
    const size_t n_scores = layer->n_tokens > c->window ? (size_t)(layer->n_tokens - c->window) : 0;
    layer->scores =
        (float *)new_buffer(j, "scores", l, heads * n_scores * sizeof *layer->scores, 0);
    if (c->scope == RKV_PER_SEQUENCE && l > 0 && layer->sequence == layer[-1].sequence) return;
    layer->kept =
        (int32_t *)new_buffer(j, "kept list", l, sets * (size_t)c->budget * sizeof *layer->kept, 0);
    if (c->scope != RKV_PER_HEAD)
        layer->shared_scores =
            (float *)new_buffer(j, "shared scores", l, n_scores * sizeof *layer->shared_scores, 0);
    const size_t n = sets * (size_t)layer->keys.tokens;
    if (chance(in, 4)) {
        layer->pins = (uint8_t *)new_buffer(j, "pins", l, n, 0);
        for (size_t i = 0; i < n; i++) layer->pins[i] = (uint8_t)(i % 64 == take(in) % 64u);
    }
    if (!chance(in, 2)) return;
    layer->positions = (int32_t *)new_buffer(j, "positions", l, n * sizeof *layer->positions, 0);
    for (size_t i = 0; i < n; i++) layer->positions[i] = (int32_t)i * 3;
}

static void make_layer(input *in, job *j, int l, int n)
{
    static const int dims[] = { 1, 2, 15, 16, 17, 31, 32, 48, 64, 67, 80, 96, 112, 128, 130, 160 };
    rkv_layer *layer = &j->layers[l];
    int kv_heads = number(in, 1, 3), at_dim = (int)take(in) % 16;
    const int group = number(in, 1, 6), capacity = n + number(in, 0, 4);
    const rkv_dtype dtype = (rkv_dtype)pick(in, 7);
    const rkv_dtype query_dtype = chance(in, 4) ? (rkv_dtype)pick(in, 7) : dtype;
    const int whole = dtype == RKV_Q8_0 || query_dtype == RKV_Q8_0 ? 32 : 1;
    while (kv_heads * n * n * dims[at_dim] > MAX_WORK && kv_heads > 1) kv_heads--;
    while (n * n * dims[at_dim] > MAX_WORK && at_dim > 0) at_dim--;
    const int dim = (dims[at_dim] + whole - 1) / whole * whole;
    const rows keys = draw_rows(in, j->config.threshold);
    const rows queries = draw_rows(in, j->config.threshold);
    layer->n_tokens = n;
    layer->sequence = (int)take(in) % 2 * l;
    if (chance(in, 4)) layer->scale = (float)take(in) / 64.0f;
    if (chance(in, 4)) layer->softcap = (float)take(in) / 4.0f;
    layer->keys =
        make_view(in, j, "keys", l, rkv_tensor_make(NULL, dtype, kv_heads, capacity, dim), 0);
    layer->queries =
        make_view(in, j, "queries", l,
                  rkv_tensor_make(NULL, query_dtype, kv_heads * group, j->config.window, dim), 0);
    fill_rows(&layer->keys, &keys);
    fill_rows(&layer->queries, &queries);
    poke(in, &layer->keys);
    poke(in, &layer->queries);
    if (!chance(in, 4)) {
        const int value_dim = (number(in, 1, 40) + whole - 1) / whole * whole;
        rkv_tensor t = rkv_tensor_make(NULL, dtype, kv_heads, capacity, value_dim);
        if (chance(in, 4) && dtype != RKV_Q8_0) t.element_bytes = number(in, 1, 8);
        layer->values = make_view(in, j, "values", l, t, 1);
        const buffer *b = &j->buffers[j->n_buffers - 1];
        for (size_t i = 0; i < b->bytes; i++) b->data[i] = (unsigned char)(i * 31 + i / 256);
    }
    make_outputs(in, j, l);
}

static int draw_length(input *in)
{
    const int n = 1 + (int)take(in);
    return chance(in, 4) ? n + (int)take(in) : n;
}

static void make_job(job *j, const uint8_t *data, size_t size)
{
    input in = { data, size, 1 };
    memset(j, 0, sizeof *j);
    const int n = draw_length(&in);
    j->n_tasks = number(&in, 2, 5);
    j->reversed = chance(&in, 2);
    make_config(&in, &j->config, n);
    j->config.error = &j->error;
    j->n_layers = number(&in, 1, MAX_LAYERS);
    for (int l = 0; l < j->n_layers; l++) make_layer(&in, j, l, n);
}

/* ==== Runs ================================================================================== */

static void in_turn(void *handle, int n_tasks, void (*task)(void *arg, int index), void *arg)
{
    const job *j = (const job *)handle;
    for (int i = 0; i < n_tasks; i++) task(arg, j->reversed ? n_tasks - 1 - i : i);
}

/* The workspace holds other garbage in every run. */
static void run(job *j, const rkv_backend *backend, int n_tasks, int garbage)
{
    size_t bytes = 0;
    if (n_tasks > 1) {
        j->config.n_threads = n_tasks;
        j->config.parallel_for = in_turn;
        j->config.pool_handle = j;
    }
    if (rkv_workspace_size(backend, &j->config, j->layers, j->n_layers, &bytes) != RKV_OK)
        require(0, j->error.rule);
    unsigned char *workspace = (unsigned char *)malloc(bytes + (size_t)garbage);
    require(workspace != NULL, "out of memory");
    memset(workspace, garbage * 0x55, bytes + (size_t)garbage);
    j->status =
        rkv_compress(backend, &j->config, j->layers, j->n_layers, workspace + garbage, bytes);
    free(workspace);
}

static int differs(int holds, const char *path, int n_tasks, int layer, const char *what)
{
    if (holds)
        fprintf(stderr, "fuzz_paths: %s, %d tasks, layer %d: not scalar's %s\n", path, n_tasks,
                layer, what);
    return holds;
}

static void require_same(const job *got, const job *want, const char *path, int n_tasks)
{
    int n = differs(got->status != want->status, path, n_tasks, -1, "status");
    n += differs(memcmp(&got->error, &want->error, sizeof got->error) != 0, path, n_tasks, -1,
                 "error");
    for (int l = 0; l < got->n_layers; l++) {
        const rkv_layer *a = &got->layers[l], *b = &want->layers[l];
        n += differs(a->n_tokens != b->n_tokens || a->n_kept != b->n_kept, path, n_tasks, l,
                     "counts");
    }
    for (int i = 0; i < got->n_buffers; i++) {
        const buffer *a = &got->buffers[i], *b = &want->buffers[i];
        n += differs(memcmp(a->data, b->data, a->bytes) != 0, path, n_tasks, a->layer, a->name);
    }
    require(n == 0, "two paths differ");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char *const paths[] = { "scalar", "avx2", "avx512", "neon" };
    job want, got;
    make_job(&want, data, size);
    run(&want, rkv_backend_find("scalar"), 1, 0);
    for (int i = 0; i < 8; i++) {
        const rkv_backend *backend = rkv_backend_find(paths[i / 2]);
        if (!backend || i == 0) continue; /* not on this CPU; the one that ran */
        make_job(&got, data, size);
        const int n_tasks = i % 2 ? got.n_tasks : 1;
        run(&got, backend, n_tasks, 1 + i % 3);
        require_same(&got, &want, paths[i / 2], n_tasks);
        free_job(&got);
    }
    free_job(&want);
    return 0;
}
