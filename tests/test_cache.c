/* The managed cache against the same decode done by hand with rkv_compress, and the thread pool.
 *     make test        or: build/tests/test_cache */
#define _POSIX_C_SOURCE 200809L
#include "harness.h"

#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifndef _WIN32
#include <sys/wait.h>
#include <unistd.h>
#endif

/* ---- texts ----------------------------------------------------------------------------------
 * A text is a list of numbers, one per token. All rows of a token follow from its number and its
 * position, so that any part of any history can be made again. */
typedef enum row_kind { KEY, VALUE, QUERY } row_kind;

static uint64_t text_token(int text, int position)
{
    rng r = rng_seed((uint64_t)text * 100003u + (uint64_t)position);
    return rng_next(&r);
}

/* One of twelve contents of this head, and some noise: tokens have similar keys. */
static void make_row(rkv_dtype dtype, row_kind kind, int layer, int head, int position,
                     uint64_t token, int dim, unsigned char *row)
{
    const uint64_t place = ((uint64_t)kind * 64u + (uint64_t)layer) * 64u + (uint64_t)head;
    rng content = rng_seed(place * 16u + token % 12u);
    rng noise = rng_seed(token ^ (place << 20) ^ (uint64_t)position);
    float *numbers = (float *)alloc_checked((size_t)dim * sizeof *numbers);
    int i;
    for (i = 0; i < dim; i++) numbers[i] = (float)(rng_normal(&content) + 0.4 * rng_normal(&noise));
    encode_row(dtype, numbers, dim, row);
    free(numbers);
}

/* ---- cases ---- */
typedef struct setup {
    const char *name;
    rkv_config (*preset)(int budget);
    int budget, buffer, capacity; /* capacity 0: budget + buffer                                 */
    int window, pinned, protect;  /* 0: the preset's                                             */
    rkv_scope scope;
    rkv_dtype dtype;
    int n_layers, kv_heads, query_heads, head_dim, value_dim;
    float scale, softcap;
} setup;

static rkv_config redundancy_alone(int budget)
{
    rkv_config config = rkv_config_default(budget);
    config.lambda = 0.0f;
    return config;
}

/* Attention of the newest token alone, and no pooling. */
static rkv_config newest_query(int budget)
{
    rkv_config config = rkv_config_snapkv(budget);
    config.window = 1;
    config.pool = 1;
    return config;
}

/* R-KV with more votes than the window: as many as tokens that no round has thinned. */
static rkv_config wide(int budget)
{
    rkv_config config = rkv_config_wide(budget);
    config.window = 4;
    config.votes = 16;
    return config;
}

static rkv_config traces_few_votes(int budget)
{
    rkv_config config = rkv_config_memory_traces(budget);
    config.votes = 7;
    config.decay = 0.9f;
    return config;
}

static rkv_config prose_few_votes(int budget)
{
    rkv_config config = rkv_config_memory_prose(budget);
    config.window = 5;
    config.votes = 0; /* the window's */
    return config;
}

static rkv_config h2o_few_votes(int budget)
{
    rkv_config config = rkv_config_h2o(budget);
    config.votes = 10;
    return config;
}

static rkv_config random_rows(int budget)
{
    return rkv_config_random(budget, 7);
}

/* A cache has no scores of the caller's: all are equal. */
static rkv_config own_score(int budget)
{
    rkv_config config = rkv_config_default(budget);
    config.policy = RKV_POLICY_OWN_SCORE;
    return config;
}

/* The rows of a policy with state when nothing is to be chosen. */
static rkv_config traces_protected(int budget)
{
    rkv_config config = rkv_config_memory_traces(budget);
    config.protect = budget;
    return config;
}

/* clang-format off */
static const setup setups[] = {
    { "f32, per head", rkv_config_default, 32, 16, 0, 0, 0, 0, RKV_PER_HEAD, RKV_F32,
      2, 2, 4, 16, 0, 0, 0 },
    { "f16, per head, pinned", rkv_config_default, 40, 8, 0, 4, 5, 0, RKV_PER_HEAD, RKV_F16,
      2, 2, 2, 20, 0, 0, 0 },
    { "bf16, per layer", rkv_config_paper, 32, 32, 0, 0, 0, 0, RKV_PER_LAYER, RKV_BF16,
      3, 2, 6, 16, 24, 0.4f, 0.5f },
    { "f32, per sequence", rkv_config_default, 24, 9, 0, 0, 2, 0, RKV_PER_SEQUENCE, RKV_F32,
      3, 2, 4, 16, 8, 0.7f, 0 },
    { "f16, protect beyond the window", rkv_config_default, 32, 16, 0, 0, 0, 19, RKV_PER_HEAD,
      RKV_F16, 1, 3, 3, 16, 0, 0, 0 },
    { "bf16, streaming", rkv_config_streaming, 32, 16, 0, 0, 0, 0, RKV_PER_HEAD, RKV_BF16,
      2, 1, 4, 16, 5, 0, 0 },
    { "f32, newest query, one new row", newest_query, 16, 1, 0, 0, 0, 0, RKV_PER_HEAD, RKV_F32,
      1, 2, 4, 7, 0, 0, 0 },
    { "f32, redundancy alone", redundancy_alone, 24, 12, 0, 0, 0, 0, RKV_PER_HEAD, RKV_F32,
      2, 2, 4, 16, 0, 0, 0 },
    { "bf16, pinned and protected fill the budget", rkv_config_default, 32, 12, 0, 0, 7, 25,
      RKV_PER_LAYER, RKV_BF16, 2, 2, 4, 16, 0, 0, 0 },
    { "f32, per sequence, protect and pinned", rkv_config_default, 40, 9, 0, 3, 3, 14,
      RKV_PER_SEQUENCE, RKV_F32, 3, 2, 4, 16, 8, 0, 0 },
    { "bf16, protect below the window", rkv_config_paper, 32, 8, 0, 0, 0, 5, RKV_PER_LAYER,
      RKV_BF16, 2, 2, 2, 8, 0, 0, 0 },
    { "f32, protect all but one", newest_query, 24, 6, 40, 0, 0, 23, RKV_PER_HEAD, RKV_F32,
      2, 2, 2, 8, 0, 0, 0 },
    { "f16, room for a long prompt", rkv_config_snapkv, 32, 16, 300, 5, 0, 0, RKV_PER_HEAD,
      RKV_F16, 2, 2, 4, 16, 0, 0, 0 },
    { "e4m3, per head, pinned", rkv_config_default, 40, 8, 0, 4, 5, 0, RKV_PER_HEAD, RKV_F8_E4M3,
      2, 2, 4, 20, 7, 0, 0 },
    { "e5m2, per sequence", rkv_config_default, 24, 9, 0, 0, 0, 0, RKV_PER_SEQUENCE, RKV_F8_E5M2,
      2, 1, 2, 16, 0, 0.1f, 0 },
    { "q8_0, per head", rkv_config_default, 32, 16, 0, 0, 0, 0, RKV_PER_HEAD, RKV_Q8_0,
      2, 2, 4, 64, 96, 0, 0 },
    { "q8_0, per layer", rkv_config_paper, 32, 12, 60, 5, 2, 0, RKV_PER_LAYER, RKV_Q8_0,
      3, 2, 2, 32, 0, 0, 0 },
    /* the other policies */
    { "wide, f32, per head", wide, 24, 12, 0, 0, 0, 0, RKV_PER_HEAD, RKV_F32,
      2, 2, 4, 16, 0, 0, 0 },
    { "traces, f32, per head, votes beyond the buffer", rkv_config_memory_traces, 32, 13, 0, 0, 0,
      0, RKV_PER_HEAD, RKV_F32, 2, 2, 4, 16, 0, 0, 0 },
    { "traces, f16, per layer, pinned, few votes", traces_few_votes, 24, 12, 50, 3, 2, 6,
      RKV_PER_LAYER, RKV_F16, 3, 2, 2, 20, 9, 0.3f, 2.0f },
    { "prose, bf16, per sequence", prose_few_votes, 24, 9, 0, 0, 0, 0, RKV_PER_SEQUENCE, RKV_BF16,
      3, 2, 4, 16, 8, 0, 0 },
    { "prose, q8_0, per head", rkv_config_memory_prose, 24, 11, 0, 0, 2, 0, RKV_PER_HEAD, RKV_Q8_0,
      2, 2, 4, 64, 32, 0, 0 },
    { "h2o, f32, per head, votes beyond the capacity", rkv_config_h2o, 24, 12, 0, 0, 0, 0,
      RKV_PER_HEAD, RKV_F32, 2, 2, 4, 16, 0, 0, 0 },
    { "h2o, e4m3, per sequence, few votes", h2o_few_votes, 24, 13, 90, 0, 3, 0, RKV_PER_SEQUENCE,
      RKV_F8_E4M3, 2, 2, 2, 16, 0, 0, 1.5f },
    { "triattention, f32, per head", rkv_config_triattention, 32, 13, 0, 0, 0, 0, RKV_PER_HEAD,
      RKV_F32, 2, 2, 4, 16, 0, 0, 0 },
    { "triattention, bf16, per layer", rkv_config_triattention, 24, 9, 60, 6, 0, 9, RKV_PER_LAYER,
      RKV_BF16, 3, 2, 6, 20, 8, 0, 0 },
    { "triattention, e5m2, per sequence", rkv_config_triattention, 24, 10, 0, 0, 0, 0,
      RKV_PER_SEQUENCE, RKV_F8_E5M2, 2, 2, 2, 16, 0, 0, 0 },
    { "random, f16, per head", random_rows, 32, 12, 0, 0, 4, 0, RKV_PER_HEAD, RKV_F16,
      2, 2, 4, 16, 0, 0, 0 },
    { "random, f32, per sequence", random_rows, 24, 12, 0, 5, 0, 0, RKV_PER_SEQUENCE, RKV_F32,
      2, 2, 4, 16, 0, 0, 0 },
    { "own scores, f16, per layer", own_score, 24, 12, 0, 0, 3, 0, RKV_PER_LAYER, RKV_F16,
      2, 2, 4, 16, 0, 0, 0 },
    { "traces that protect all", traces_protected, 24, 12, 0, 0, 0, 0, RKV_PER_HEAD, RKV_F32,
      2, 2, 4, 16, 0, 0, 0 },
};
/* clang-format on */
enum { N_SETUPS = (int)(sizeof setups / sizeof *setups) };

static const setup *setup_named(const char *name)
{
    int i;
    for (i = 0; i < N_SETUPS; i++)
        if (strcmp(setups[i].name, name) == 0) return &setups[i];
    case_fail("no setup is named %s", name);
    return &setups[0];
}

/* Queries of a quantised cache are f32. */
static rkv_dtype kind_dtype(const setup *s, row_kind kind)
{
    return kind == QUERY && s->dtype > RKV_BF16 ? RKV_F32 : s->dtype;
}

static int setup_value_dim(const setup *s)
{
    return s->value_dim ? s->value_dim : s->head_dim;
}

static int setup_capacity(const setup *s)
{
    return s->capacity ? s->capacity : s->budget + s->buffer;
}

static rkv_config setup_options(const setup *s)
{
    rkv_config options = s->preset(s->budget);
    if (s->window) options.window = s->window;
    if (s->pinned) options.pinned = s->pinned;
    if (s->protect) options.protect = s->protect;
    options.scope = s->scope;
    return options;
}

static int setup_votes(const setup *s)
{
    const rkv_config options = setup_options(s);
    return options.votes ? options.votes : options.window;
}

/* Is anything to be chosen? */
static int setup_scores(const setup *s)
{
    const rkv_config options = setup_options(s);
    return config_protect(&options) + options.pinned < options.budget;
}

/* Floats of state per row and KV head that rounds leave. */
static int setup_planes(const setup *s)
{
    const rkv_config options = setup_options(s);
    return setup_scores(s) ? rkv_state_floats(&options) : 0;
}

static size_t setup_means(const setup *s)
{
    const int has = setup_options(s).policy == RKV_POLICY_TRIATTENTION && setup_scores(s);
    return has ? rkv_query_means_floats(s->query_heads, s->head_dim) : 0;
}

/* Those that last, up to the count. */
static size_t setup_lasting_means(const setup *s)
{
    if (setup_means(s) == 0) return 0;
    return (size_t)(s->query_heads * (s->head_dim + s->head_dim / 2) + 1);
}

/* Does a token that has been taken back leave a trace, even one that was part of no round? */
static int setup_remembers_drafts(const setup *s)
{
    return setup_means(s) > 0;
}

/* Must queries of a round be told in order? */
static int setup_orders_queries(const setup *s)
{
    return setup_planes(s) > 0 || setup_votes(s) > setup_options(s).window;
}

static rkv_rope setup_rope(const setup *s)
{
    static const float frequencies[] = { 1.0f, 0.5f, 0.7f, 0.01f };
    rkv_rope rope = RKV_INIT;
    if (s->scope == RKV_PER_HEAD) {
        rope.pairing = RKV_ROPE_HALVES;
    } else if (s->scope == RKV_PER_LAYER) {
        rope.pairing = RKV_ROPE_ADJACENT;
        rope.dims = s->head_dim / 4 * 2;
        rope.base = 500.0f;
    } else {
        rope.pairing = RKV_ROPE_HALVES;
        rope.dims = 8;
        rope.frequencies = frequencies;
    }
    return rope;
}

/* For policies that need none it is not told. */
static int setup_needs_rope(const setup *s)
{
    const rkv_policy policy = setup_options(s).policy;
    return policy == RKV_POLICY_MEMORY_TRACES || policy == RKV_POLICY_MEMORY_PROSE ||
           policy == RKV_POLICY_TRIATTENTION;
}

static rkv_cache_config setup_config(const setup *s, const rkv_backend *backend)
{
    rkv_cache_config config = RKV_INIT;
    config.compress = setup_options(s);
    config.backend = backend;
    config.n_layers = s->n_layers;
    config.kv_heads = s->kv_heads;
    config.query_heads = s->query_heads;
    config.head_dim = s->head_dim;
    config.value_dim = s->value_dim;
    config.dtype = s->dtype;
    config.buffer = s->buffer;
    config.capacity = s->capacity;
    config.scale = s->scale;
    config.softcap = s->softcap;
    if (setup_needs_rope(s)) config.rope = setup_rope(s);
    return config;
}

static rkv_cache *cache_of(const setup *s, const rkv_backend *backend)
{
    const rkv_cache_config config = setup_config(s, backend);
    rkv_cache *cache = NULL;
    if (expect_status("create", rkv_cache_create(&cache, &config), RKV_OK)) return cache;
    exit(close_tests()); /* nothing else here can be tested */
}

/* [heads][n][dim] rows of the tokens at `position` and after */
static rkv_tensor rows_of(const setup *s, row_kind kind, int layer, int text, int position, int n)
{
    const int heads = kind == QUERY ? s->query_heads : s->kv_heads;
    const int dim = kind == VALUE ? setup_value_dim(s) : s->head_dim;
    const rkv_dtype dtype = kind_dtype(s, kind);
    const size_t bytes = row_bytes(dtype, dim);
    unsigned char *rows = (unsigned char *)alloc_checked((size_t)(heads * n) * bytes);
    int h, t;
    for (h = 0; h < heads; h++)
        for (t = 0; t < n; t++)
            make_row(dtype, kind, layer, h, position + t, text_token(text, position + t), dim,
                     rows + (size_t)(h * n + t) * bytes);
    return rkv_tensor_make(rows, dtype, heads, n, dim);
}

static int says(const rkv_error *error, const char *words)
{
    return error->rule && strstr(error->rule, words);
}

static rkv_status feed_layer(const setup *s, rkv_cache *cache, int layer, int text, int n)
{
    const int position = rkv_cache_position(cache, layer);
    rkv_tensor keys = rows_of(s, KEY, layer, text, position, n);
    rkv_tensor values = rows_of(s, VALUE, layer, text, position, n);
    rkv_tensor queries = rows_of(s, QUERY, layer, text, position, n);
    rkv_status status = rkv_cache_append(cache, layer, n, &keys, &values, &queries);
    free(keys.data);
    free(values.data);
    free(queries.data);
    return status;
}

/* The next n tokens of a text, to all layers; the last layer first in every other call. */
static void feed(const setup *s, rkv_cache *cache, int text, int n)
{
    const int reversed = rkv_cache_position(cache, 0) % 2;
    int l;
    for (l = 0; l < s->n_layers; l++)
        expect_status("append", feed_layer(s, cache, reversed ? s->n_layers - 1 - l : l, text, n),
                      RKV_OK);
}

static int step(rkv_cache *cache)
{
    int n_evicted = -1;
    expect_status("step", rkv_cache_step(cache, &n_evicted), RKV_OK);
    return n_evicted;
}

/* Decodes n tokens one by one. */
static void decode(const setup *s, rkv_cache *cache, int text, int n)
{
    for (; n > 0; n--) {
        feed(s, cache, text, 1);
        step(cache);
    }
}

/* ---- images: two caches are equal when what they save is ---- */
static void put_u32(unsigned char *at, uint32_t value)
{
    int i;
    for (i = 0; i < 4; i++) at[i] = (unsigned char)(value >> (8 * i));
}

static uint32_t get_u32(const unsigned char *at)
{
    return at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

static uint32_t float_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

typedef struct image {
    unsigned char *bytes;
    size_t size;
} image;

static image image_of(const rkv_cache *cache)
{
    image saved;
    saved.size = rkv_cache_save_size(cache);
    saved.bytes = (unsigned char *)alloc_checked(saved.size + 1);
    saved.bytes[saved.size] = 0x5a;
    expect_status("save", rkv_cache_save(cache, saved.bytes, saved.size), RKV_OK);
    expect_int("byte behind the image", 0, saved.bytes[saved.size], 0x5a);
    return saved;
}

static int expect_image(const char *at, const rkv_cache *cache, const image *want)
{
    image got = image_of(cache);
    const int equal = expect_int("image bytes", 0, (int64_t)got.size, (int64_t)want->size) &&
                      expect_bytes(at, got.bytes, want->bytes, want->size);
    free(got.bytes);
    return equal;
}

static void expect_equal_caches(const char *at, const rkv_cache *got, const rkv_cache *want)
{
    image saved = image_of(want);
    expect_image(at, got, &saved);
    free(saved.bytes);
}

/* ---- the same by hand -----------------------------------------------------------------------
 * Rows token-major, as an engine may lay them out; queries made again from the texts. */
enum { MAX_POSITIONS = 2000 };
typedef struct plain {
    const setup *s;
    rkv_config options;
    unsigned char *keys, *values; /* [layer][capacity][kv_head][dim]                             */
    int32_t *positions;           /* [layer][kv_head][capacity]                                  */
    float *state;                 /* [layer][kv_head][plane][capacity]                           */
    float *means;                 /* [layer][setup_means]                                        */
    int texts[MAX_POSITIONS];     /* of which text the token at a position is                    */
    int rows, next;               /* physical and logical length                                 */
    int settled;                  /* with state: rows that were part of a round                  */
    int rounds;
} plain;

static size_t plain_row_bytes(const plain *p, int dim)
{
    return row_bytes(p->s->dtype, dim) * (size_t)p->s->kv_heads;
}

static unsigned char *plain_row(const plain *p, row_kind kind, int layer, int row, int head)
{
    const int dim = kind == KEY ? p->s->head_dim : setup_value_dim(p->s);
    return (kind == KEY ? p->keys : p->values) +
           (size_t)(layer * setup_capacity(p->s) + row) * plain_row_bytes(p, dim) +
           (size_t)head * row_bytes(p->s->dtype, dim);
}

static size_t plain_state_floats(const plain *p)
{
    return (size_t)(p->s->kv_heads * rkv_state_floats(&p->options)) * (size_t)setup_capacity(p->s);
}

static void plain_make(plain *p, const setup *s)
{
    const size_t rows = (size_t)(s->n_layers * setup_capacity(s));
    size_t state_bytes, mean_bytes;
    p->s = s;
    p->options = setup_options(s);
    p->keys = (unsigned char *)alloc_checked(rows * plain_row_bytes(p, s->head_dim));
    p->values = (unsigned char *)alloc_checked(rows * plain_row_bytes(p, setup_value_dim(s)));
    p->positions = (int32_t *)alloc_checked(rows * (size_t)s->kv_heads * sizeof(int32_t));
    state_bytes = (size_t)s->n_layers * plain_state_floats(p) * sizeof(float);
    mean_bytes = (size_t)s->n_layers * setup_means(s) * sizeof(float);
    p->state = (float *)alloc_checked(state_bytes);
    p->means = (float *)alloc_checked(mean_bytes);
    memset(p->state, 0xff, state_bytes); /* NaN: it needs no first value */
    memset(p->means, 0, mean_bytes);
    p->rows = p->next = p->settled = p->rounds = 0;
}

static void plain_free(plain *p)
{
    free(p->keys);
    free(p->values);
    free(p->positions);
    free(p->state);
    free(p->means);
}

static int32_t *plain_positions(const plain *p, int layer, int head)
{
    int set = layer * p->s->kv_heads + head;
    if (p->s->scope == RKV_PER_LAYER) set = layer;
    if (p->s->scope == RKV_PER_SEQUENCE) set = 0;
    return p->positions + set * setup_capacity(p->s);
}

/* The queries of the next n tokens, after which they are as good as forgotten. */
static void plain_add_to_means(plain *p, int text, int n)
{
    const setup *s = p->s;
    const rkv_rope rope = setup_rope(s);
    const size_t n_means = setup_means(s);
    int l;
    for (l = 0; l < s->n_layers && n_means > 0; l++) {
        rkv_tensor queries = rows_of(s, QUERY, l, text, p->next, n);
        expect_status("means by hand",
                      rkv_query_means_update(NULL, &p->options, &rope, &queries, 0, n, p->next,
                                             p->means + (size_t)l * n_means),
                      RKV_OK);
        free(queries.data);
    }
}

static void plain_append(plain *p, int text, int n)
{
    const setup *s = p->s;
    int l, h;
    plain_add_to_means(p, text, n);
    for (; n > 0; n--, p->rows++, p->next++) {
        p->texts[p->next] = text;
        for (l = 0; l < s->n_layers; l++)
            for (h = 0; h < s->kv_heads; h++) {
                const uint64_t token = text_token(text, p->next);
                make_row(s->dtype, KEY, l, h, p->next, token, s->head_dim,
                         plain_row(p, KEY, l, p->rows, h));
                make_row(s->dtype, VALUE, l, h, p->next, token, setup_value_dim(s),
                         plain_row(p, VALUE, l, p->rows, h));
                plain_positions(p, l, h)[p->rows] = p->next;
            }
    }
}

static void plain_truncate(plain *p, int n)
{
    p->rows -= n;
    p->next -= n;
    if (p->settled > p->rows) p->settled = p->rows;
}

static rkv_tensor plain_view(const plain *p, row_kind kind, int layer)
{
    const int dim = kind == KEY ? p->s->head_dim : setup_value_dim(p->s);
    rkv_tensor rows = rkv_tensor_make(plain_row(p, kind, layer, 0, 0), p->s->dtype, p->s->kv_heads,
                                      setup_capacity(p->s), dim);
    rows.token_stride = (int64_t)p->s->kv_heads * dim;
    rows.head_stride = dim;
    return rows;
}

/* A ring of the last queries, slot = position modulo votes. (Where any order is allowed, it still
 * decides how sums are rounded.) What nobody may read is NaN. */
static rkv_tensor plain_queries(const plain *p, int layer)
{
    const setup *s = p->s;
    const int votes = setup_votes(s), n_new = p->rows - p->settled;
    const int n = setup_planes(s) > 0 && n_new < votes ? n_new : votes;
    const rkv_dtype dtype = kind_dtype(s, QUERY);
    const size_t bytes = row_bytes(dtype, s->head_dim), all = (size_t)(s->query_heads * votes);
    unsigned char *rows = (unsigned char *)alloc_checked(all * bytes);
    int h, position;
    memset(rows, 0xff, all * bytes);
    for (h = 0; h < s->query_heads; h++)
        for (position = p->next > n ? p->next - n : 0; position < p->next; position++)
            make_row(dtype, QUERY, layer, h, position, text_token(p->texts[position], position),
                     s->head_dim, rows + (size_t)(h * votes + position % votes) * bytes);
    return rkv_tensor_make(rows, dtype, s->query_heads, votes, s->head_dim);
}

static rkv_layer plain_layer(plain *p, int l)
{
    const setup *s = p->s;
    rkv_layer layer = RKV_INIT;
    layer.keys = plain_view(p, KEY, l);
    layer.values = plain_view(p, VALUE, l);
    layer.queries = plain_queries(p, l);
    layer.scale = s->scale;
    layer.softcap = s->softcap;
    layer.n_tokens = p->rows;
    layer.row_stride = setup_capacity(s);
    if (l == 0 || s->scope != RKV_PER_SEQUENCE) layer.positions = plain_positions(p, l, 0);
    if (setup_needs_rope(s)) layer.rope = setup_rope(s);
    if (setup_orders_queries(s)) layer.first_query = p->next % setup_votes(s);
    if (plain_state_floats(p) > 0) {
        layer.state = p->state + (size_t)l * plain_state_floats(p);
        layer.n_new = p->rows - p->settled;
    }
    if (setup_means(s) > 0) layer.query_means = p->means + (size_t)l * setup_means(s);
    return layer;
}

static void plain_round(plain *p, const rkv_backend *backend)
{
    enum { MAX_LAYERS = 4 };
    const setup *s = p->s;
    rkv_layer layers[MAX_LAYERS];
    void *workspace;
    size_t bytes = 0;
    int l;
    for (l = 0; l < s->n_layers; l++) layers[l] = plain_layer(p, l);
    expect_status("size by hand",
                  rkv_workspace_size(backend, &p->options, layers, s->n_layers, &bytes), RKV_OK);
    workspace = alloc_checked(bytes);
    expect_status("compress by hand",
                  rkv_compress(backend, &p->options, layers, s->n_layers, workspace, bytes),
                  RKV_OK);
    free(workspace);
    for (l = 0; l < s->n_layers; l++) free(layers[l].queries.data);
    if (p->rows <= s->budget) return;
    p->rounds++;
    p->rows = s->budget;
    if (setup_planes(s) > 0) p->settled = s->budget;
}

static void expect_rows(const plain *p, row_kind kind, int layer, const rkv_tensor *got)
{
    const rkv_dtype dtype = p->s->dtype;
    int h, row;
    if (!expect_int("rows of the view", layer, got->tokens, p->rows)) return;
    for (h = 0; h < p->s->kv_heads; h++)
        for (row = 0; row < p->rows; row++) {
            const int64_t at = h * got->head_stride + row * got->token_stride;
            if (!expect_bytes(kind == KEY ? "key row" : "value row",
                              (const unsigned char *)got->data +
                                  (size_t)(at / element_dims(dtype)) * dtype_bytes(dtype),
                              plain_row(p, kind, layer, row, h), row_bytes(dtype, got->dim)))
                return;
        }
}

/* Where things lie in an image: see rkv.h. */
enum {
    IMAGE_VERSION = 8,
    IMAGE_ROUNDS = 68,
    IMAGE_EVICTED = 76,
    IMAGE_SETTLED = 84,
    IMAGE_ROWS = 92, /* and n_queries, of each layer */
    IMAGE_N_QUERIES = 96
};

/* State and means in an image, bit for bit. */
static void expect_carried(const rkv_cache *cache, const plain *p)
{
    const setup *s = p->s;
    const size_t sets = (size_t)(s->scope == RKV_PER_HEAD    ? s->n_layers * s->kv_heads
                                 : s->scope == RKV_PER_LAYER ? s->n_layers
                                                             : 1);
    const size_t fixed = p->rounds > 0 ? (size_t)(s->budget - config_protect(&p->options)) : 0;
    const size_t n_planes = (size_t)(s->n_layers * s->kv_heads * setup_planes(s));
    image saved = image_of(cache);
    const unsigned char *at = saved.bytes + IMAGE_ROWS + 8 * (size_t)s->n_layers + 4 * sets * fixed;
    size_t plane, l, i;
    if (!expect_int("settled rows", 0, (int64_t)get_u32(saved.bytes + IMAGE_SETTLED), p->settled) ||
        !expect_int("rounds", 0, (int64_t)get_u32(saved.bytes + IMAGE_ROUNDS), p->rounds)) {
        free(saved.bytes);
        return;
    }
    for (plane = 0; plane < n_planes; plane++)
        for (i = 0; i < (size_t)p->settled; i++, at += 4)
            if (!expect_int("state", (int)i, (int64_t)get_u32(at),
                            (int64_t)float_bits(p->state[plane * (size_t)setup_capacity(s) + i]))) {
                free(saved.bytes);
                return;
            }
    for (l = 0; l < (size_t)s->n_layers; l++)
        for (i = 0; i < setup_lasting_means(s); i++, at += 4)
            expect_int("means", (int)i, (int64_t)get_u32(at),
                       (int64_t)float_bits(p->means[l * setup_means(s) + i]));
    free(saved.bytes);
}

static void expect_like_plain(const rkv_cache *cache, const plain *p)
{
    int l, h;
    expect_carried(cache, p);
    for (l = 0; l < p->s->n_layers; l++) {
        const rkv_tensor keys = rkv_cache_keys(cache, l), values = rkv_cache_values(cache, l);
        expect_int("rows", l, rkv_cache_rows(cache, l), p->rows);
        expect_int("position", l, rkv_cache_position(cache, l), p->next);
        expect_int("room", l, rkv_cache_room(cache, l), setup_capacity(p->s) - p->rows);
        expect_rows(p, KEY, l, &keys);
        expect_rows(p, VALUE, l, &values);
        for (h = 0; h < p->s->kv_heads; h++)
            expect_bytes("positions", rkv_cache_positions(cache, l, h), plain_positions(p, l, h),
                         (size_t)p->rows * sizeof(int32_t));
    }
    expect_int("rounds", 0, rkv_cache_get_stats(cache).rounds, p->rounds);
    expect_int("evicted", 0, rkv_cache_get_stats(cache).n_evicted, p->next - p->rows);
}

/* ---- decoding ---- */

/* The prompt in chunks of at most `chunk` tokens, then token by token. */
static void test_decode(const setup *s, const rkv_backend *backend, int prompt, int chunk)
{
    enum { TEXT = 7, LENGTH = 300, ROUNDS = 20 };
    const int length = s->budget + ROUNDS * s->buffer;
    rkv_cache *cache = cache_of(s, backend);
    plain p;
    plain_make(&p, s);
    while (p.next < length || p.next < LENGTH) {
        const int room = rkv_cache_room(cache, 0);
        int n = p.next < prompt ? prompt - p.next : 1, evicted;
        if (n > chunk) n = chunk;
        if (n > room) n = room;
        if (!expect_true("room", n > 0)) break;
        feed(s, cache, TEXT, n);
        plain_append(&p, TEXT, n);
        evicted = 0;
        if (p.rows >= s->budget + s->buffer) {
            evicted = p.rows - s->budget;
            plain_round(&p, backend);
        }
        expect_int("evicted by step", p.next, step(cache), evicted);
        if (evicted > 0 || p.next % 16 == 0) expect_like_plain(cache, &p);
    }
    expect_like_plain(cache, &p);
    expect_true("some rounds", p.rounds > 1);
    plain_free(&p);
    rkv_cache_destroy(cache);
}

/* A prompt compressed right away, due or not, and a second call that finds nothing to do. */
static void test_forced_round(const setup *s)
{
    enum { TEXT = 3 };
    rkv_cache *cache = cache_of(s, NULL);
    plain p;
    int n_evicted = -1;
    plain_make(&p, s);
    expect_status("empty", rkv_cache_compress(cache, &n_evicted), RKV_OK);
    expect_int("evicted", 0, n_evicted, 0);
    feed(s, cache, TEXT, s->budget);
    plain_append(&p, TEXT, s->budget);
    expect_status("at the budget", rkv_cache_compress(cache, &n_evicted), RKV_OK);
    expect_int("evicted", 1, n_evicted, 0);
    feed(s, cache, TEXT, 1);
    plain_append(&p, TEXT, 1);
    plain_round(&p, NULL);
    expect_status("one more", rkv_cache_compress(cache, &n_evicted), RKV_OK);
    expect_int("evicted", 2, n_evicted, 1);
    expect_status("again", rkv_cache_compress(cache, NULL), RKV_OK);
    expect_like_plain(cache, &p);
    plain_free(&p);
    rkv_cache_destroy(cache);
}

static void test_unequal_layers(const setup *s)
{
    rkv_cache *cache = cache_of(s, NULL);
    int n_evicted = -1;
    feed(s, cache, 1, s->budget);
    expect_status("first layer alone", feed_layer(s, cache, 0, 1, s->buffer), RKV_OK);
    expect_status("step", rkv_cache_step(cache, &n_evicted), RKV_ERROR_ARGUMENT);
    expect_status("compress", rkv_cache_compress(cache, &n_evicted), RKV_ERROR_ARGUMENT);
    expect_int("evicted", 0, n_evicted, 0);
    expect_int("rows", 0, rkv_cache_rows(cache, 0), s->budget + s->buffer);
    expect_int("rows", 1, rkv_cache_rows(cache, 1), s->budget);
    /* the way out of a token that failed half way: forget it everywhere */
    expect_status("truncate", rkv_cache_truncate(cache, s->budget), RKV_OK);
    expect_int("rows", 0, rkv_cache_rows(cache, 0), s->budget);
    expect_status("step", rkv_cache_step(cache, NULL), RKV_OK);
    rkv_cache_destroy(cache);
}

/* Appended views of every layout give the same rows. */
static void test_append_layouts(const setup *s, layout keys_layout, layout values_layout)
{
    enum { N = 11, FIRST = 3, TEXT = 5 };
    rkv_cache *cache = cache_of(s, NULL), *want = cache_of(s, NULL);
    rng r = rng_seed(1);
    int l;
    if (s->dtype == RKV_Q8_0 && values_layout >= N_KEY_LAYOUTS) values_layout = LAYOUT_ROW_LIST;
    feed(s, cache, TEXT, FIRST);
    feed(s, want, TEXT, FIRST + N);
    for (l = 0; l < s->n_layers; l++) {
        view views[3];
        int kind, h, t;
        for (kind = KEY; kind <= QUERY; kind++) {
            rkv_tensor from = rows_of(s, (row_kind)kind, l, TEXT, FIRST, N);
            const size_t bytes = row_bytes(from.dtype, from.dim);
            int i;
            view_make(&views[kind], &r, kind == VALUE ? values_layout : keys_layout, from.dtype, 0,
                      from.heads, N + 2, from.dim, 1);
            for (h = 0; h < from.heads; h++)
                for (t = 0; t < N; t++)
                    for (i = 0; i < views[kind].n_elements; i++)
                        memcpy(view_at(&views[kind], h, t, i),
                               (unsigned char *)from.data + (size_t)(h * N + t) * bytes +
                                   (size_t)i * dtype_bytes(from.dtype),
                               dtype_bytes(from.dtype));
            free(from.data);
        }
        expect_status("append",
                      rkv_cache_append(cache, l, N, &views[KEY].tensor, &views[VALUE].tensor,
                                       &views[QUERY].tensor),
                      RKV_OK);
        for (kind = KEY; kind <= QUERY; kind++) view_free(&views[kind]);
    }
    expect_equal_caches("rows appended", cache, want);
    rkv_cache_destroy(cache);
    rkv_cache_destroy(want);
}

/* ---- rollback ---- */

/* Now and then a draft of another text is appended and taken back: the cache must be as if it
 * had never been there. */
static void test_drafts(const setup *s)
{
    enum { TEXT = 11, DRAFT = 12, LENGTH = 200 };
    rkv_cache *cache = cache_of(s, NULL), *want = cache_of(s, NULL);
    rng r = rng_seed(5);
    int position = 0, n;
    for (; position < LENGTH; position += n) {
        int room = s->budget + s->buffer - rkv_cache_rows(want, 0);
        if (!expect_true("room", room > 0)) break;
        n = 1 + rng_below(&r, room < 5 ? room : 5);
        feed(s, cache, DRAFT, n);
        expect_status("truncate", rkv_cache_truncate(cache, position), RKV_OK);
        expect_int("position", position, rkv_cache_position(cache, 0), position);
        /* confirm at least as many: only then is the ring whole as it was */
        feed(s, cache, TEXT, n);
        feed(s, want, TEXT, n);
        if (!setup_remembers_drafts(s)) expect_equal_caches("after a draft", cache, want);
        expect_int("step", position, step(cache), step(want));
    }
    expect_true("some rounds", rkv_cache_get_stats(want).rounds > 1);
    if (!setup_remembers_drafts(s)) expect_equal_caches("in the end", cache, want);
    rkv_cache_destroy(cache);
    rkv_cache_destroy(want);
}

/* How far back: to the start at first, then over the new tokens and the protected ones. */
static void test_truncate_reach(const setup *s)
{
    const rkv_config options = setup_options(s);
    const int protect = config_protect(&options), evicted = s->buffer;
    const int oldest = s->budget + evicted - protect;
    rkv_cache *cache = cache_of(s, NULL);
    image before;
    int position;
    feed(s, cache, 1, s->budget - 1);
    for (position = s->budget; position >= 0; position -= 1 + position / 3) {
        expect_status("back step by step", rkv_cache_truncate(cache, position), RKV_OK);
        expect_int("rows", position, rkv_cache_rows(cache, 0),
                   position < s->budget ? position : s->budget - 1);
        if (position == 0) break;
    }
    feed(s, cache, 1, s->budget + s->buffer);
    expect_int("evicted", 0, step(cache), evicted);
    feed(s, cache, 1, 1);
    before = image_of(cache);
    for (position = -1; position < oldest; position++) {
        if (position == 0) continue; /* empties the cache */
        expect_status("too far", rkv_cache_truncate(cache, position), RKV_ERROR_ARGUMENT);
        expect_true("why", says(rkv_cache_error(cache), "position: "));
    }
    expect_status("as negative as can be", rkv_cache_truncate(cache, INT32_MIN),
                  RKV_ERROR_ARGUMENT);
    expect_status("nothing to forget", rkv_cache_truncate(cache, rkv_cache_position(cache, 0) + 5),
                  RKV_OK);
    expect_status("nothing to forget", rkv_cache_truncate(cache, INT32_MAX), RKV_OK);
    expect_true("no rule", rkv_cache_error(cache)->rule == NULL);
    expect_image("unchanged", cache, &before);
    expect_status("as far as it goes", rkv_cache_truncate(cache, oldest), RKV_OK);
    expect_int("rows", 1, rkv_cache_rows(cache, 0), s->budget - protect);
    expect_int("position", 1, rkv_cache_position(cache, 0), oldest);
    expect_status("no further", rkv_cache_truncate(cache, oldest - 1), RKV_ERROR_ARGUMENT);
    feed(s, cache, 1, protect + 1);
    if (setup_planes(s) == 0 && !setup_remembers_drafts(s))
        expect_image("appended again", cache, &before);
    expect_status("to the start", rkv_cache_truncate(cache, 0), RKV_OK);
    expect_int("rows", 2, rkv_cache_rows(cache, 0), 0);
    expect_int("position", 2, rkv_cache_position(cache, 0), 0);
    free(before.bytes);
    rkv_cache_destroy(cache);
}

/* After a round has kept them, protected tokens are taken back and come again as other ones. The
 * same is done by hand. */
static void test_protected_drafts(const setup *s)
{
    enum { TEXT = 21, OTHER = 22 };
    const rkv_config options = setup_options(s);
    const int protect = config_protect(&options), due = s->budget + s->buffer;
    rkv_cache *cache = cache_of(s, NULL);
    plain p;
    int back, l, h, row;
    for (back = 1; back <= protect; back += 1 + back / 2) {
        plain_make(&p, s);
        expect_status("empty", rkv_cache_truncate(cache, 0), RKV_OK);
        feed(s, cache, TEXT, due);
        plain_append(&p, TEXT, due);
        expect_int("evicted", back, step(cache), s->buffer);
        plain_round(&p, NULL);
        expect_status("back", rkv_cache_truncate(cache, due - back), RKV_OK);
        plain_truncate(&p, back);
        expect_like_plain(cache, &p);
        feed(s, cache, OTHER, back);
        plain_append(&p, OTHER, back);
        expect_like_plain(cache, &p);
        for (l = 0; l < s->n_layers; l++)
            for (h = 0; h < s->kv_heads; h++)
                for (row = s->budget - protect; row < s->budget; row++)
                    expect_int("a protected row's position", row,
                               rkv_cache_positions(cache, l, h)[row], row + s->buffer);
        plain_free(&p);
    }
    rkv_cache_destroy(cache);
}

/* A round needs the whole window: refused when forced, put off when due. */
static void test_partial_window(const setup *s)
{
    const int window = setup_options(s).window, due = s->budget + s->buffer;
    rkv_cache *cache = cache_of(s, NULL), *want = cache_of(s, NULL);
    image before;
    int n_evicted = -1;
    feed(s, cache, 1, due + 3 * window);
    expect_status("truncate", rkv_cache_truncate(cache, due + window), RKV_OK);
    before = image_of(cache);
    expect_status("forced", rkv_cache_compress(cache, &n_evicted), RKV_ERROR_ARGUMENT);
    expect_int("evicted", 0, n_evicted, 0);
    expect_int("put off", 0, step(cache), 0);
    expect_image("unchanged", cache, &before);
    feed(s, cache, 1, window - 1);
    expect_int("put off", 1, step(cache), 0);
    feed(s, cache, 1, 1);
    expect_int("due", 2, step(cache), s->buffer + 2 * window);
    feed(s, want, 1, due + 2 * window);
    expect_int("due", 3, step(want), s->buffer + 2 * window);
    expect_equal_caches("as if never truncated", cache, want);
    free(before.bytes);
    rkv_cache_destroy(cache);
    rkv_cache_destroy(want);
}

/* A fork, or another cache that has loaded what this one saved, in its place. */
static rkv_cache *replaced(const setup *s, rkv_cache *cache, int by_fork)
{
    rkv_cache *other = NULL;
    if (by_fork) {
        expect_status("fork", rkv_cache_fork(cache, &other), RKV_OK);
    } else {
        image saved = image_of(cache);
        other = cache_of(s, NULL);
        expect_status("load", rkv_cache_load(other, saved.bytes, saved.size), RKV_OK);
        free(saved.bytes);
    }
    rkv_cache_destroy(cache);
    return other;
}

/* Tokens come and are taken back at random, as far as truncation reaches: rows that were part of a
 * round too. Now and then another cache goes on. The same calls by hand give the same rows, state
 * and means. */
static void test_truncated_histories(const setup *s, uint64_t seed)
{
    enum { LENGTH = 500 };
    const rkv_config options = setup_options(s);
    rkv_cache *cache = cache_of(s, NULL);
    rng r = rng_seed(seed);
    plain p;
    int text = 1, evicted = 0, calls;
    plain_make(&p, s);
    for (calls = 0; calls < 300 && p.next < LENGTH; calls++) {
        const int reach = p.rows - (evicted ? s->budget - config_protect(&options) : 1);
        if (rng_below(&r, 3) == 0 && reach > 0) {
            const int n = 1 + rng_below(&r, reach < 7 ? reach : 7);
            expect_status("truncate", rkv_cache_truncate(cache, p.next - n), RKV_OK);
            plain_truncate(&p, n);
            text++;
        } else {
            const int room = rkv_cache_room(cache, 0);
            const int n = 1 + rng_below(&r, room < 6 ? room : 6);
            feed(s, cache, text, n);
            plain_append(&p, text, n);
        }
        if (rng_below(&r, 10) == 0) cache = replaced(s, cache, rng_below(&r, 2));
        if (step(cache) > 0) {
            evicted = 1;
            plain_round(&p, NULL);
            expect_like_plain(cache, &p);
        } else if (calls % 8 == 0) {
            expect_like_plain(cache, &p);
        }
        if (!expect_int("rows", calls, rkv_cache_rows(cache, 0), p.rows) ||
            !expect_true("room", rkv_cache_room(cache, 0) > 0))
            break;
    }
    expect_like_plain(cache, &p);
    expect_true("some rounds", p.rounds > 5);
    plain_free(&p);
    rkv_cache_destroy(cache);
}

/* With state a round needs the queries of the new rows only, and of these no more than vote. */
static void test_missing_votes(void)
{
    const setup *s = setup_named("traces, f16, per layer, pinned, few votes");
    const int votes = setup_votes(s);
    rkv_cache *cache = cache_of(s, NULL);
    int n_evicted = -1, i;
    feed(s, cache, 1, s->budget + votes);
    expect_status("back", rkv_cache_truncate(cache, s->budget + votes - 3), RKV_OK);
    for (i = 0; i < 3; i++) { /* more new rows than queries */
        expect_status("too few votes", rkv_cache_compress(cache, &n_evicted), RKV_ERROR_ARGUMENT);
        expect_true("why", says(rkv_cache_error(cache), "cache: queries"));
        feed(s, cache, 2, 1);
    }
    expect_status("enough", rkv_cache_compress(cache, &n_evicted), RKV_OK);
    expect_int("evicted", 0, n_evicted, votes);
    /* new rows that are fewer than the votes: all of their queries are there, or none was needed */
    feed(s, cache, 2, 3);
    expect_status("back", rkv_cache_truncate(cache, s->budget + votes + 1), RKV_OK);
    expect_status("one new row", rkv_cache_compress(cache, &n_evicted), RKV_OK);
    expect_int("evicted", 1, n_evicted, 1);
    /* taken back into the rows of the last round: what comes then is new */
    expect_status("back", rkv_cache_truncate(cache, rkv_cache_position(cache, 0) - 2), RKV_OK);
    feed(s, cache, 3, 4);
    expect_status("four new rows", rkv_cache_compress(cache, &n_evicted), RKV_OK);
    expect_int("evicted", 2, n_evicted, 2);
    rkv_cache_destroy(cache);
}

/* The least buffer with which the tokens of all queries that vote have a row in every round. */
static int least_buffer(const setup *s)
{
    const rkv_config options = setup_options(s);
    const int least = setup_votes(s) - config_protect(&options);
    return setup_planes(s) == 0 && setup_orders_queries(s) && least > 1 ? least : 1;
}

/* The queries that vote are those of the last rows, in every head: row and position agree. */
static void expect_voters_have_rows(const setup *s, const rkv_cache *cache)
{
    const int rows = rkv_cache_rows(cache, 0), votes = setup_votes(s);
    const int next = rkv_cache_position(cache, 0);
    int l, h, i;
    for (l = 0; l < s->n_layers; l++)
        for (h = 0; h < s->kv_heads; h++)
            for (i = 1; i <= votes; i++)
                expect_int("position of a voter", i, rkv_cache_positions(cache, l, h)[rows - i],
                           next - i);
}

/* R-KV with more votes than are protected: a round that is forced waits until enough tokens have
 * come after the last one, or after truncation; one that is due never does. */
static void test_votes_of_evicted_tokens(void)
{
    const setup *s = setup_named("wide, f32, per head");
    const int votes = setup_votes(s);
    const rkv_config options = setup_options(s);
    const int protect = config_protect(&options);
    rkv_cache *cache = cache_of(s, NULL);
    int back, n, n_evicted = -1;
    expect_int("no buffer to spare", 0, s->buffer, least_buffer(s));
    feed(s, cache, 1, s->budget + 1);
    expect_status("the first round", rkv_cache_compress(cache, &n_evicted), RKV_OK);
    for (back = 0; back < 3; back++) {
        const int missing = votes - protect + back;
        expect_status("back", rkv_cache_truncate(cache, rkv_cache_position(cache, 0) - back),
                      RKV_OK);
        for (n = 1; n <= missing; n++) {
            const int is_late = n < missing && rkv_cache_rows(cache, 0) + 1 > s->budget;
            image before;
            feed(s, cache, 1, 1);
            if (!is_late) continue;
            before = image_of(cache);
            expect_status("forced", rkv_cache_compress(cache, NULL), RKV_ERROR_ARGUMENT);
            expect_true("why", says(rkv_cache_error(cache), "cache: queries"));
            expect_status("not due", rkv_cache_step(cache, &n_evicted), RKV_OK);
            expect_int("evicted", n, n_evicted, 0);
            expect_image("as it was", cache, &before);
            free(before.bytes);
        }
        expect_voters_have_rows(s, cache);
        if (back % 2) /* at that very length, it is due */
            expect_status("due", rkv_cache_step(cache, &n_evicted), RKV_OK);
        else
            expect_status("forced", rkv_cache_compress(cache, &n_evicted), RKV_OK);
        expect_int("evicted", back, n_evicted, s->buffer);
    }
    rkv_cache_destroy(cache);
}

/* ---- fork, empty, counts ---- */

static void test_fork(const setup *s)
{
    enum { TRUNK = 70, BRANCH = 60 };
    rkv_cache *cache = cache_of(s, NULL), *want = cache_of(s, NULL), *fork = NULL;
    decode(s, cache, 1, TRUNK);
    expect_status("fork", rkv_cache_fork(cache, &fork), RKV_OK);
    expect_equal_caches("fork", fork, cache);
    decode(s, cache, 2, BRANCH);
    decode(s, want, 1, TRUNK);
    expect_equal_caches("fork, the other having gone on", fork, want);
    rkv_cache_destroy(cache);
    decode(s, fork, 3, BRANCH);
    decode(s, want, 3, BRANCH);
    expect_equal_caches("fork, gone on alone", fork, want);
    rkv_cache_destroy(fork);
    rkv_cache_destroy(want);
}

static void expect_equal_positions(const char *at, const rkv_cache *got, const rkv_cache *want,
                                   const setup *s)
{
    int l, h;
    for (l = 0; l < s->n_layers; l++)
        for (h = 0; h < s->kv_heads; h++)
            expect_bytes(at, rkv_cache_positions(got, l, h), rkv_cache_positions(want, l, h),
                         (size_t)rkv_cache_rows(want, l) * sizeof(int32_t));
}

static void test_fork_between_layers(const setup *s)
{
    rkv_cache *cache = cache_of(s, NULL), *fork = NULL;
    int l;
    decode(s, cache, 1, s->budget + s->buffer + 2);
    expect_status("append", feed_layer(s, cache, 0, 1, 1), RKV_OK);
    expect_status("fork", rkv_cache_fork(cache, &fork), RKV_OK);
    expect_equal_caches("fork", fork, cache);
    expect_equal_positions("fork", fork, cache, s);
    for (l = 1; l < s->n_layers; l++) {
        expect_status("append", feed_layer(s, cache, l, 1, 1), RKV_OK);
        expect_status("append", feed_layer(s, fork, l, 1, 1), RKV_OK);
    }
    expect_int("step", 0, step(fork), step(cache));
    expect_equal_caches("fork, the token completed", fork, cache);
    decode(s, cache, 2, 2 * s->buffer + 1);
    decode(s, fork, 2, 2 * s->buffer + 1);
    expect_equal_caches("fork, two rounds on", fork, cache);
    expect_equal_positions("fork, two rounds on", fork, cache, s);
    rkv_cache_destroy(fork);
    expect_status("empty fork", rkv_cache_fork(NULL, &fork), RKV_ERROR_NULL);
    expect_true("no fork", fork == NULL);
    rkv_cache_destroy(cache);
}

static void test_empty(const setup *s)
{
    rkv_cache *cache = cache_of(s, NULL), *fresh = cache_of(s, NULL);
    decode(s, cache, 1, s->budget + s->buffer + 3);
    expect_status("empty", rkv_cache_truncate(cache, 0), RKV_OK);
    expect_equal_caches("as created", cache, fresh);
    decode(s, cache, 2, s->budget + s->buffer + 3);
    decode(s, fresh, 2, s->budget + s->buffer + 3);
    expect_equal_caches("used again", cache, fresh);
    rkv_cache_destroy(cache);
    rkv_cache_destroy(fresh);
}

static void test_stats(void)
{
    static const setup s = {
        "", rkv_config_default, 32, 16, 64, 0, 0, 0, RKV_PER_HEAD, RKV_F16, 2, 3, 6, 16, 24, 0, 0
    };
    rkv_cache *cache = cache_of(&s, NULL);
    rkv_cache_stats stats = rkv_cache_get_stats(cache);
    expect_int("held", 0, (int64_t)stats.bytes_held,
               2 * 2 * (3 * 64 * (16 + 24) + 6 * 8 * 16)); /* layers, bytes, (k + v, queries) */
    expect_int("full", 0, (int64_t)stats.bytes_full, 0);
    expect_int("rounds", 0, stats.rounds, 0);
    decode(&s, cache, 1, 100);
    stats = rkv_cache_get_stats(cache);
    expect_int("full", 1, (int64_t)stats.bytes_full, 2 * 2 * 3 * 100 * (16 + 24));
    expect_int("rounds", 1, stats.rounds, 4); /* at 48, 64, 80 and 96 tokens */
    expect_int("evicted", 1, stats.n_evicted, 64);
    expect_int("no cache", 0, rkv_cache_get_stats(NULL).rounds, 0);
    rkv_cache_destroy(cache);
}

/* What a policy carries is counted; without a policy that does, nothing is held for it. */
static void test_stats_of_policies(void)
{
    enum {
        LAYERS = 2,
        ROWS = 45,
        KV_HEADS = 2,
        QUERY_HEADS = 4,
        DIM = 16,
        KV = 2 * DIM * KV_HEADS
    };
    static const struct {
        rkv_config (*preset)(int budget);
        int floats; /* of a layer */
    } list[] = {
        { random_rows, ROWS * KV },
        { rkv_config_streaming, ROWS * KV },
        { traces_protected, ROWS * KV + 2 * ROWS * KV_HEADS },
        { rkv_config_default, ROWS * KV + 8 * QUERY_HEADS * DIM },
        { traces_few_votes, ROWS * KV + 7 * QUERY_HEADS * DIM + 2 * ROWS * KV_HEADS },
        { h2o_few_votes, ROWS * KV + 10 * QUERY_HEADS * DIM + ROWS * KV_HEADS },
        { rkv_config_triattention, ROWS * KV }, /* and the means */
    };
    size_t i;
    for (i = 0; i < sizeof list / sizeof *list; i++) {
        setup s = setups[0];
        rkv_cache *cache;
        s.preset = list[i].preset;
        s.capacity = 0;
        s.budget = ROWS - 5;
        s.buffer = 5;
        cache = cache_of(&s, NULL);
        expect_int("held", (int)i, (int64_t)rkv_cache_get_stats(cache).bytes_held,
                   (int64_t)(sizeof(float) * LAYERS * ((size_t)list[i].floats + setup_means(&s))));
        rkv_cache_destroy(cache);
    }
}

/* ---- save and load ---- */

static void test_save(const setup *s, int length)
{
    setup larger = *s;
    rkv_cache *cache = cache_of(s, NULL), *same, *roomy;
    image saved;
    plain p;
    larger.capacity = setup_capacity(s) + 7;
    same = cache_of(s, NULL);
    roomy = cache_of(&larger, NULL);
    decode(s, cache, 1, length);
    saved = image_of(cache);
    decode(s, same, 2, 90); /* a cache in use: its rows go */
    expect_status("load", rkv_cache_load(same, saved.bytes, saved.size), RKV_OK);
    expect_status("load", rkv_cache_load(roomy, saved.bytes, saved.size), RKV_OK);
    expect_image("loaded", same, &saved);
    expect_image("loaded with more room", roomy, &saved);
    decode(s, cache, 3, 75);
    decode(s, same, 3, 75);
    decode(&larger, roomy, 3, 75);
    expect_equal_caches("gone on", same, cache);
    expect_equal_caches("gone on with more room", roomy, cache);

    /* against what was decoded, and at an odd address */
    if (length <= s->budget) {
        unsigned char *odd = (unsigned char *)alloc_checked(saved.size + 1);
        memcpy(odd + 1, saved.bytes, saved.size);
        plain_make(&p, s);
        plain_append(&p, 1, length);
        expect_status("load", rkv_cache_load(same, odd + 1, saved.size), RKV_OK);
        expect_like_plain(same, &p);
        plain_free(&p);
        free(odd);
    }
    free(saved.bytes);
    rkv_cache_destroy(cache);
    rkv_cache_destroy(same);
    rkv_cache_destroy(roomy);
}

static uint64_t checksum_step(uint64_t sum, uint64_t word)
{
    sum ^= word;
    return (sum << 29 | sum >> 35) * 0x9e3779b97f4a7c15u;
}

/* The checksum, written here once more: for images with a field changed. */
static void reseal(image *forged)
{
    const size_t bytes = forged->size - 8, n_words = bytes / 32 * 4;
    uint64_t sums[4] = { 1, 2, 3, 4 }, total = bytes;
    size_t word, i;
    for (word = 0; word < n_words; word++) {
        uint64_t value = 0;
        for (i = 8; i-- > 0;) value = value << 8 | forged->bytes[8 * word + i];
        sums[word % 4] = checksum_step(sums[word % 4], value);
    }
    for (i = 0; i < 4; i++) total = checksum_step(total, sums[i]);
    for (i = 8 * n_words; i < bytes; i++) total = checksum_step(total, forged->bytes[i]);
    for (i = 0; i < 8; i++) forged->bytes[bytes + i] = (unsigned char)(total >> (8 * i));
}

static const setup small = {
    "", rkv_config_default, 6, 3, 0, 2, 1, 0, RKV_PER_LAYER, RKV_F16, 2, 1, 1, 4, 3, 0, 0
};
enum { SMALL_EVICTED = 6 }; /* after 14 tokens: 9 - 3, + 3 - 3, + 2 */

static rkv_cache *small_cache(void)
{
    rkv_cache *cache = cache_of(&small, NULL);
    decode(&small, cache, 1, 14);
    return cache;
}

/* The same of policies that carry something. */
static setup small_of(rkv_config (*preset)(int budget))
{
    setup s = small;
    s.preset = preset;
    s.query_heads = 2;
    s.window = 2;
    return s;
}

static void expect_refused(const char *at, rkv_cache *cache, const image *before,
                           const unsigned char *bytes, size_t size)
{
    expect_status(at, rkv_cache_load(cache, bytes, size), RKV_ERROR_ARGUMENT);
    expect_image(at, cache, before);
}

/* Every bit of an image turned, and the image cut or lengthened anywhere. */
static void test_damaged_images(const setup *s)
{
    rkv_cache *cache = cache_of(s, NULL), *other = cache_of(s, NULL);
    image saved, before;
    unsigned char *copy;
    size_t i, bit;
    decode(s, cache, 1, 14);
    saved = image_of(cache);
    copy = (unsigned char *)alloc_checked(saved.size + 9);
    decode(s, other, 2, 11);
    before = image_of(other);
    for (i = 0; i < saved.size; i++)
        for (bit = 0; bit < 8; bit++) {
            memcpy(copy, saved.bytes, saved.size);
            copy[i] ^= (unsigned char)(1u << bit);
            expect_refused("a bit turned", other, &before, copy, saved.size);
        }
    for (i = 0; i < saved.size; i++) {
        unsigned char *exact = (unsigned char *)alloc_checked(i); /* sanitizers see its end */
        memcpy(exact, saved.bytes, i);
        expect_refused("cut", other, &before, exact, i);
        free(exact);
    }
    memset(copy, 0, saved.size + 9);
    memcpy(copy, saved.bytes, saved.size);
    for (i = 1; i < 10; i++) expect_refused("lengthened", other, &before, copy, saved.size + i);
    expect_refused("nothing", other, &before, NULL, saved.size);
    expect_status("the image itself", rkv_cache_load(other, saved.bytes, saved.size), RKV_OK);
    expect_image("loaded", other, &saved);
    free(copy);
    free(saved.bytes);
    free(before.bytes);
    rkv_cache_destroy(cache);
    rkv_cache_destroy(other);
}

/* Images whose checksum is right and whose contents no cache can have. */
static void test_forged_images(void)
{
    enum {
        POSITIONS = IMAGE_ROWS + 2 * 8, /* [2 layers][4 rows]: budget 6, window 2 */
        ROW_BYTES = 2 * (4 + 3)
    };
    static const struct {
        const char *name;
        int at;
        uint32_t value;
    } forgeries[] = {
        { "an older version", IMAGE_VERSION, 2 },
        { "a newer version", IMAGE_VERSION, 4 },
        { "no rounds, but evicted", IMAGE_ROUNDS, 0 },
        { "more rounds than evicted", IMAGE_ROUNDS, SMALL_EVICTED + 1 },
        { "huge rounds", IMAGE_ROUNDS + 4, 1 },
        { "nothing evicted by a round", IMAGE_EVICTED, 0 },
        { "evicted beyond all positions", IMAGE_EVICTED, 0x7fffffff },
        { "negative evicted", IMAGE_EVICTED + 4, 0x80000000u },
        { "settled rows without state", IMAGE_SETTLED, 6 },
        { "rows beyond the capacity", IMAGE_ROWS, 10 },
        { "another number of rows", IMAGE_ROWS, 7 },
        { "negative rows", IMAGE_ROWS, 0xfffffff8u },
        { "queries beyond the window", IMAGE_N_QUERIES, 3 },
        { "no room for the queries that are missing", IMAGE_N_QUERIES, 0 },
        { "a pinned row moved", POSITIONS, 1 },
        { "positions that do not ascend", POSITIONS + 12, 0 },
        { "a position of the window", POSITIONS + 12, SMALL_EVICTED + 4 },
        { "a negative position", POSITIONS + 4, 0xffffffffu },
    };
    rkv_cache *cache = small_cache(), *other = cache_of(&small, NULL);
    image saved = image_of(cache), before, forged;
    size_t i;
    expect_int("evicted", 0, rkv_cache_get_stats(cache).n_evicted, SMALL_EVICTED);
    decode(&small, other, 2, 11);
    before = image_of(other);
    forged.size = saved.size;
    forged.bytes = (unsigned char *)alloc_checked(saved.size);
    for (i = 0; i < sizeof forgeries / sizeof *forgeries; i++) {
        memcpy(forged.bytes, saved.bytes, saved.size);
        put_u32(forged.bytes + forgeries[i].at, forgeries[i].value);
        reseal(&forged);
        expect_refused(forgeries[i].name, other, &before, forged.bytes, forged.size);
    }
    /* fewer rows in the first layer, in an image that is as long as it says: down to the fixed ones
     * it is one of a token between two layers */
    for (i = 8; i >= 2; i--) {
        rkv_cache *scratch = small_cache();
        memcpy(forged.bytes, saved.bytes, saved.size);
        forged.size = saved.size - ROW_BYTES * (8 - i);
        put_u32(forged.bytes + IMAGE_ROWS, (uint32_t)i);
        reseal(&forged);
        expect_status("fewer rows", rkv_cache_load(scratch, forged.bytes, forged.size),
                      i < 4 ? RKV_ERROR_ARGUMENT : RKV_OK);
        expect_int("rows", (int)i, rkv_cache_rows(scratch, 0), i < 4 ? 8 : (int)i);
        rkv_cache_destroy(scratch);
    }
    forged.size = saved.size;
    /* resealing itself is right: an unchanged image still loads */
    memcpy(forged.bytes, saved.bytes, saved.size);
    reseal(&forged);
    expect_status("resealed", rkv_cache_load(other, forged.bytes, forged.size), RKV_OK);
    expect_image("resealed", other, &saved);

    /* a sequence at the end of all positions: room ends before the rows do */
    put_u32(forged.bytes + IMAGE_EVICTED, 0x7fffffff - 8 - 1);
    reseal(&forged);
    expect_status("a very long one", rkv_cache_load(other, forged.bytes, forged.size), RKV_OK);
    expect_int("rows", 0, rkv_cache_rows(other, 0), 8);
    expect_int("room", 0, rkv_cache_room(other, 0), 1);
    expect_status("one too many", feed_layer(&small, other, 0, 1, 2), RKV_ERROR_ARGUMENT);
    feed(&small, other, 1, 1);
    expect_int("room", 1, rkv_cache_room(other, 0), 0);
    free(forged.bytes);
    free(saved.bytes);
    free(before.bytes);
    rkv_cache_destroy(cache);
    rkv_cache_destroy(other);
}

/* One number of an image changed, in every way of a list, with a checksum that is right. */
typedef struct forgery {
    const char *name;
    int at;
    uint32_t value;
    int loads;
} forgery;

static void expect_forgeries(const setup *s, int length, const forgery *list, size_t n)
{
    rkv_cache *cache = cache_of(s, NULL), *other = cache_of(s, NULL);
    image saved, before, forged;
    size_t i;
    decode(s, cache, 1, length);
    saved = image_of(cache);
    decode(s, other, 2, 11);
    before = image_of(other);
    forged.size = saved.size;
    forged.bytes = (unsigned char *)alloc_checked(saved.size);
    for (i = 0; i < n; i++) {
        memcpy(forged.bytes, saved.bytes, saved.size);
        put_u32(forged.bytes + list[i].at, list[i].value);
        reseal(&forged);
        if (list[i].loads) {
            rkv_cache *scratch = cache_of(s, NULL);
            expect_status(list[i].name, rkv_cache_load(scratch, forged.bytes, forged.size), RKV_OK);
            expect_image(list[i].name, scratch, &forged);
            decode(s, scratch, 3, 20);
            rkv_cache_destroy(scratch);
        } else {
            expect_refused(list[i].name, other, &before, forged.bytes, forged.size);
        }
    }
    free(forged.bytes);
    free(saved.bytes);
    free(before.bytes);
    rkv_cache_destroy(cache);
    rkv_cache_destroy(other);
}

/* After 14 tokens: 8 rows, 6 settled, 4 of them fixed, which have positions, in 2 layers of one KV
 * head. */
static void test_forged_state(void)
{
    enum { STATE = IMAGE_ROWS + 2 * 8 + 4 * 2 * 4, END = STATE + 4 * 2 * 2 * 6 };
    static const forgery list[] = {
        { "settled beyond the budget", IMAGE_SETTLED, 7, 0 },
        { "settled below the fixed rows", IMAGE_SETTLED, 3, 0 },
        { "fewer settled than there is state for", IMAGE_SETTLED, 5, 0 },
        { "huge settled", IMAGE_SETTLED + 4, 1, 0 },
        { "rows below the settled", IMAGE_ROWS, 5, 0 },
        { "queries beyond the votes", IMAGE_N_QUERIES, 8, 0 },
        { "queries of no new row", IMAGE_N_QUERIES, 0, 0 },
        { "queries of one new row of two", IMAGE_N_QUERIES, 1, 0 },
        { "NaN", STATE, 0x7fc00000u, 0 },
        { "infinite", STATE + 4, 0x7f800000u, 0 },
        { "negative", STATE + 8, 0xbf800000u, 0 },
        { "the last one infinite", END - 4, 0x7f800000u, 0 },
        { "minus nothing", STATE, 0x80000000u, 1 },
        { "the largest number", STATE, 0x7f7fffffu, 1 },
        { "a subnormal one", END - 4, 1, 1 },
    };
    const setup s = small_of(traces_few_votes);
    expect_forgeries(&s, 14, list, sizeof list / sizeof *list);
}

/* Other numbers of settled rows, of rows, in images that are as long as they say. */
static void test_forged_sizes(void)
{
    enum { STATE = IMAGE_ROWS + 2 * 8 + 4 * 2 * 4, PLANES = 2 * 2, ROW_BYTES = 2 * (4 + 3) };
    static const struct {
        int settled, rows, loads;
    } list[] = { { 6, 8, 1 }, { 5, 8, 1 }, { 4, 8, 1 }, { 3, 8, 0 }, { 0, 8, 0 },
                 { 6, 6, 1 }, { 6, 5, 0 }, { 5, 5, 1 }, { 4, 4, 1 }, { 5, 4, 0 } };
    const setup s = small_of(traces_few_votes);
    rkv_cache *cache = cache_of(&s, NULL);
    image saved, forged;
    size_t i, plane;
    decode(&s, cache, 1, 14);
    saved = image_of(cache);
    forged.bytes = (unsigned char *)alloc_checked(saved.size);
    for (i = 0; i < sizeof list / sizeof *list; i++) {
        const size_t settled = (size_t)list[i].settled;
        const size_t end = STATE + 4 * PLANES * settled, after = STATE + 4 * PLANES * 6;
        rkv_cache *other = cache_of(&s, NULL);
        memcpy(forged.bytes, saved.bytes, saved.size);
        for (plane = 0; plane < PLANES; plane++)
            memcpy(forged.bytes + STATE + 4 * plane * settled, saved.bytes + STATE + 4 * plane * 6,
                   4 * settled);
        forged.size = saved.size - (after - end) - (size_t)(ROW_BYTES * (8 - list[i].rows));
        memcpy(forged.bytes + end, saved.bytes + after, forged.size - end);
        put_u32(forged.bytes + IMAGE_SETTLED, (uint32_t)settled);
        put_u32(forged.bytes + IMAGE_ROWS, (uint32_t)list[i].rows);
        reseal(&forged);
        expect_status("another size", rkv_cache_load(other, forged.bytes, forged.size),
                      list[i].loads ? RKV_OK : RKV_ERROR_ARGUMENT);
        expect_int("rows", (int)i, rkv_cache_rows(other, 0), list[i].loads ? list[i].rows : 0);
        rkv_cache_destroy(other);
    }
    free(saved.bytes);
    free(forged.bytes);
    rkv_cache_destroy(cache);
}

static void test_forged_settled_rows(void)
{
    static const forgery list[] = {
        { "settled without a round", IMAGE_SETTLED, 4, 0 },
        { "none settled", IMAGE_SETTLED, 0, 1 },
    };
    const setup s = small_of(rkv_config_h2o);
    expect_forgeries(&s, 5, list, sizeof list / sizeof *list);
}

static void test_forged_means(void)
{
    enum { FLOATS = 2 * 4 + 2 * 2 + 1, MEANS = IMAGE_ROWS + 2 * 8 + 4 * 2 * 4 };
    enum { END = MEANS + 4 * 2 * FLOATS };
    static const forgery list[] = {
        { "NaN", MEANS, 0xffc00000u, 0 },
        { "infinite", MEANS + 4, 0xff800000u, 0 },
        { "larger than any query", MEANS + 8, 0x60000000u, 0 },
        { "a negative number of tokens", MEANS + 4 * (FLOATS - 1), 0xc0000000u, 0 },
        { "the last one negative", END - 4, 0xbf800000u, 0 },
        { "another mean", MEANS, 0xc1200000u, 1 },
        { "no token", END - 4, 0, 1 },
        { "settled rows without state", IMAGE_SETTLED, 6, 0 },
    };
    const setup s = small_of(rkv_config_triattention);
    expect_forgeries(&s, 14, list, sizeof list / sizeof *list);
}

/* Means that are too large for a round, which each of their numbers may be: the way out is to empty
 * the cache. */
static void test_huge_means(void)
{
    enum { MEANS = IMAGE_ROWS + 2 * 8 + 4 * 2 * 4 };
    const setup s = small_of(rkv_config_triattention);
    rkv_cache *cache = cache_of(&s, NULL), *want = cache_of(&s, NULL);
    image forged;
    int i;
    decode(&s, cache, 1, 14);
    forged = image_of(cache);
    for (i = 0; i < 4; i++) put_u32(forged.bytes + MEANS + 4 * i, float_bits(1e18f));
    reseal(&forged);
    expect_status("load", rkv_cache_load(cache, forged.bytes, forged.size), RKV_OK);
    feed(&s, cache, 1, 1);
    expect_status("a round", rkv_cache_step(cache, NULL), RKV_ERROR_NONFINITE);
    expect_true("why", says(rkv_cache_error(cache), "layer.query_means"));
    expect_int("the token of all", 0, rkv_cache_error_position(cache), 0);
    expect_status("empty", rkv_cache_truncate(cache, rkv_cache_error_position(cache)), RKV_OK);
    decode(&s, cache, 2, 20);
    decode(&s, want, 2, 20);
    expect_equal_caches("begun again", cache, want);
    free(forged.bytes);
    rkv_cache_destroy(cache);
    rkv_cache_destroy(want);
}

typedef rkv_config (*preset_function)(int budget);

/* Of another policy, whatever else is equal. */
static void test_foreign_policies(void)
{
    static const preset_function presets[] = { rkv_config_default,
                                               traces_few_votes,
                                               prose_few_votes,
                                               h2o_few_votes,
                                               random_rows,
                                               rkv_config_triattention,
                                               rkv_config_memory_traces,
                                               rkv_config_memory_prose };
    enum { N = (int)(sizeof presets / sizeof *presets) };
    int i, j;
    for (i = 0; i < N; i++)
        for (j = 0; j < N; j++) {
            const setup from = small_of(presets[i]), to = small_of(presets[j]);
            rkv_cache *cache = cache_of(&from, NULL), *other = cache_of(&to, NULL);
            image saved, before = image_of(other);
            decode(&from, cache, 1, 14);
            saved = image_of(cache);
            if (i == j)
                expect_status("its own", rkv_cache_load(other, saved.bytes, saved.size), RKV_OK);
            else
                expect_refused("of another policy", other, &before, saved.bytes, saved.size);
            free(saved.bytes);
            free(before.bytes);
            rkv_cache_destroy(cache);
            rkv_cache_destroy(other);
        }
}

/* An image fits only a cache of the same shape and rules. */
static void test_foreign_images(void)
{
    setup others[10];
    rkv_cache *cache = small_cache();
    image saved = image_of(cache), before;
    size_t i;
    for (i = 0; i < 10; i++) others[i] = small;
    others[0].n_layers = 1;
    others[1].query_heads = 2;
    others[2].head_dim = 3;
    others[3].value_dim = 4;
    others[4].dtype = RKV_BF16;
    others[5].budget = 7;
    others[6].window = 3;
    others[7].pinned = 2;
    others[8].protect = 3;
    others[9].scope = RKV_PER_HEAD; /* one kv head: as many sets, another meaning */
    for (i = 0; i < 10; i++) {
        rkv_cache *other = cache_of(&others[i], NULL);
        before = image_of(other);
        expect_refused("of another shape", other, &before, saved.bytes, saved.size);
        free(before.bytes);
        rkv_cache_destroy(other);
    }
    expect_status("too short", rkv_cache_save(cache, saved.bytes, saved.size - 1),
                  RKV_ERROR_ARGUMENT);
    expect_status("nowhere", rkv_cache_save(cache, NULL, saved.size), RKV_ERROR_ARGUMENT);
    expect_status("nothing", rkv_cache_save(NULL, saved.bytes, saved.size), RKV_ERROR_NULL);
    expect_int("size of nothing", 0, (int64_t)rkv_cache_save_size(NULL), 0);
    expect_status("into nothing", rkv_cache_load(NULL, saved.bytes, saved.size), RKV_ERROR_NULL);
    free(saved.bytes);
    rkv_cache_destroy(cache);
}

/* The first bytes of a known image, so that the format cannot drift unseen. */
static void test_image_format(void)
{
    /* clang-format off */
    static const unsigned char head[] = {
        'R', 'K', 'V', 'C', 'A', 'C', 'H', 'E', 3, 0, 0, 0, /* version                           */
        2, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0,                 /* layers, kv heads, query heads      */
        4, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0,                 /* head dim, value dim, f16           */
        6, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0,                 /* budget, window, pinned             */
        1, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0,                 /* per layer, 2 protected, a ring     */
        0, 0, 0, 0, 2, 0, 0, 0,                             /* R-KV, 2 votes                      */
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,     /* rounds, evicted                    */
        0, 0, 0, 0, 0, 0, 0, 0,                             /* settled                            */
        2, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0,     /* rows and queries of both layers    */
    };
    /* clang-format on */
    /* two rows of 1, 2, 3, ... in every tensor: keys, values, the ring */
    static const unsigned char layer[] = {
        0x00, 0x3c, 0x00, 0x40, 0x00, 0x42, 0x00, 0x44, 0x00, 0x45, 0x00, 0x46, 0x00, 0x47, 0x00,
        0x48, 0x00, 0x3c, 0x00, 0x40, 0x00, 0x42, 0x00, 0x44, 0x00, 0x45, 0x00, 0x46, 0x00, 0x3c,
        0x00, 0x40, 0x00, 0x42, 0x00, 0x44, 0x00, 0x45, 0x00, 0x46, 0x00, 0x47, 0x00, 0x48,
    };
    uint16_t numbers[8];
    rkv_cache *cache = cache_of(&small, NULL);
    rkv_tensor rows = rkv_tensor_make(numbers, RKV_F16, 1, 2, 4);
    rkv_tensor values = rkv_tensor_make(numbers, RKV_F16, 1, 2, 3);
    image saved;
    int i;
    for (i = 0; i < 8; i++) numbers[i] = f16_from_float((float)(i + 1));
    for (i = 0; i < 2; i++)
        expect_status("append", rkv_cache_append(cache, i, 2, &rows, &values, &rows), RKV_OK);
    saved = image_of(cache);
    expect_int("bytes", 0, (int64_t)saved.size, (int64_t)(sizeof head + 2 * sizeof layer + 8));
    expect_bytes("head", saved.bytes, head, sizeof head);
    expect_bytes("first layer", saved.bytes + sizeof head, layer, sizeof layer);
    expect_bytes("second layer", saved.bytes + sizeof head + sizeof layer, layer, sizeof layer);
    free(saved.bytes);
    rkv_cache_destroy(cache);
}

/* The scale of q8_0 is little-endian too, and nothing else of a block changes its place. */
static void test_q8_0_image(void)
{
    enum {
        HEAD = IMAGE_ROWS + 8,
        N = 40
    }; /* a part of the image that needs more than one swap buffer */
    setup s = setups[15];
    rkv_cache *cache, *loaded;
    unsigned char row[N][34];
    rkv_tensor rows = rkv_tensor_make(row, RKV_Q8_0, 1, N, 32), keys;
    const uint16_t half = 0x3c01;
    image saved;
    int t, i;
    s.preset = redundancy_alone;
    s.budget = N;
    s.n_layers = s.kv_heads = s.query_heads = 1;
    s.head_dim = s.value_dim = 32;
    cache = cache_of(&s, NULL);
    loaded = cache_of(&s, NULL);
    for (t = 0; t < N; t++) {
        memcpy(row[t], &half, sizeof half);
        for (i = 2; i < 34; i++) row[t][i] = (unsigned char)(t + i);
    }
    expect_status("append", rkv_cache_append(cache, 0, N, &rows, &rows, NULL), RKV_OK);
    saved = image_of(cache);
    expect_int("bytes", 0, (int64_t)saved.size, HEAD + 2 * N * 34 + 8);
    for (t = 0; t < 2 * N; t++) {
        const unsigned char *in_image = saved.bytes + HEAD + 34 * t;
        expect_int("low byte", t, in_image[0], 0x01);
        expect_int("high byte", t, in_image[1], 0x3c);
        expect_bytes("numbers", in_image + 2, row[t % N] + 2, 32);
    }
    expect_status("load", rkv_cache_load(loaded, saved.bytes, saved.size), RKV_OK);
    keys = rkv_cache_keys(loaded, 0);
    expect_bytes("loaded", keys.data, row, sizeof row);
    free(saved.bytes);
    rkv_cache_destroy(cache);
    rkv_cache_destroy(loaded);
}

/* ---- memory and devices that fail ---- */

/* One budget of allocations and one of copies, for host and backend together; -1: no end. */
static int allocations_left = -1, copies_left = -1, blocks_held;

static int spend(int *left)
{
    if (*left == 0) return 0;
    if (*left > 0) --*left;
    return 1;
}

static void *scarce_alloc(void *user, size_t bytes)
{
    expect_true("the caller's handle", user == (void *)&blocks_held);
    if (!spend(&allocations_left)) return NULL;
    blocks_held++;
    return alloc_checked(bytes);
}

static void scarce_free(void *user, void *memory)
{
    expect_true("the caller's handle", user == (void *)&blocks_held);
    blocks_held--;
    free(memory);
}

static void *scarce_backend_alloc(const rkv_backend *self, size_t bytes)
{
    (void)self;
    return scarce_alloc(&blocks_held, bytes);
}

static void scarce_backend_free(const rkv_backend *self, void *memory)
{
    (void)self;
    scarce_free(&blocks_held, memory);
}

static rkv_status scarce_copy(const rkv_backend *self, void *dst, const void *src, size_t bytes)
{
    (void)self;
    if (!spend(&copies_left)) return RKV_ERROR_DEVICE;
    memcpy(dst, src, bytes);
    return RKV_OK;
}

static rkv_status scarce_copy_rows(const rkv_backend *self, const rkv_tensor *dst, int dst_token,
                                   const rkv_tensor *src, int src_token, int n_tokens)
{
    (void)self;
    if (!spend(&copies_left)) return RKV_ERROR_DEVICE;
    return rkv_backend_find(NULL)->copy_rows(rkv_backend_find(NULL), dst, dst_token, src, src_token,
                                             n_tokens);
}

static rkv_backend scarce_backend(void)
{
    rkv_backend backend = *rkv_backend_find(NULL);
    backend.alloc = scarce_backend_alloc;
    backend.free = scarce_backend_free;
    backend.copy = scarce_copy;
    backend.copy_rows = scarce_copy_rows;
    return backend;
}

static rkv_cache_config scarce_config(const setup *s, const rkv_backend *backend)
{
    rkv_cache_config config = setup_config(s, backend);
    config.alloc = scarce_alloc;
    config.free = scarce_free;
    config.user = &blocks_held;
    return config;
}

static void test_failing_allocations(const setup *s)
{
    const rkv_backend backend = scarce_backend();
    const rkv_cache_config config = scarce_config(s, &backend);
    rkv_cache *cache = NULL, *fork = NULL;
    int n, n_needed, held;
    for (n = 0; n < 100; n++) {
        allocations_left = n;
        if (rkv_cache_create(&cache, &config) == RKV_OK) break;
        expect_true("no cache", cache == NULL);
        expect_int("blocks held after a failure", n, blocks_held, 0);
    }
    n_needed = n;
    expect_true("host and backend both asked", n_needed >= 2);
    held = blocks_held;
    allocations_left = -1;
    decode(s, cache, 1, s->budget + s->buffer + 1);
    expect_int("blocks taken by decoding", 0, blocks_held, held);
    for (n = 0; n < n_needed; n++) {
        allocations_left = n;
        expect_status("fork", rkv_cache_fork(cache, &fork), RKV_ERROR_MEMORY);
        expect_true("no fork", fork == NULL);
        expect_int("blocks held after a failed fork", n, blocks_held, held);
    }
    allocations_left = -1;
    expect_status("fork", rkv_cache_fork(cache, &fork), RKV_OK);
    rkv_cache_destroy(fork);
    rkv_cache_destroy(cache);
    rkv_cache_destroy(NULL);
    expect_int("blocks held in the end", 0, blocks_held, 0);
}

static void expect_device_error(const char *at, const rkv_cache *cache, rkv_status status,
                                int layer)
{
    const rkv_error *error = rkv_cache_error(cache);
    expect_status(at, status, RKV_ERROR_DEVICE);
    expect_int("error.status", 0, error->status, RKV_ERROR_DEVICE);
    expect_int("error.layer", 0, error->layer, layer);
    expect_true("error.rule", says(error, "cache: the device refused"));
}

/* The n-th copy fails, for every n: nothing has been appended, and trying again succeeds. */
static void test_failing_copies(const setup *s)
{
    const rkv_backend backend = scarce_backend();
    const rkv_cache_config config = scarce_config(s, &backend);
    rkv_cache *cache = NULL, *want = NULL;
    image before;
    int n, l;
    expect_status("create", rkv_cache_create(&cache, &config), RKV_OK);
    expect_status("create", rkv_cache_create(&want, &config), RKV_OK);
    decode(s, cache, 1, s->budget + s->buffer - 5);
    decode(s, want, 1, s->budget + s->buffer);
    for (l = 0; l < s->n_layers; l++)
        for (n = 0; n < 200; n++) {
            const int rows = rkv_cache_rows(cache, l);
            rkv_status status;
            copies_left = n;
            status = feed_layer(s, cache, l, 1, 5);
            copies_left = -1;
            if (status == RKV_OK) break;
            expect_device_error("append", cache, status, l);
            expect_int("rows", l, rkv_cache_rows(cache, l), rows);
        }
    step(cache);
    expect_equal_caches("after trying again", cache, want);

    before = image_of(want);
    for (n = 0; n < 200; n++) {
        rkv_status status;
        copies_left = n;
        status = rkv_cache_load(cache, before.bytes, before.size);
        copies_left = -1;
        if (status == RKV_OK) break;
        expect_device_error("load", cache, status, -1);
        expect_int("rows after a failed load", n, rkv_cache_rows(cache, 0), 0);
    }
    expect_image("loaded", cache, &before);
    for (n = 0; n < 200; n++) {
        image again;
        rkv_status status;
        again.size = before.size;
        again.bytes = (unsigned char *)alloc_checked(again.size);
        copies_left = n;
        status = rkv_cache_save(cache, again.bytes, again.size);
        copies_left = -1;
        if (status == RKV_OK) expect_bytes("saved", again.bytes, before.bytes, before.size);
        free(again.bytes);
        if (status == RKV_OK) break;
        expect_device_error("save", cache, status, -1);
    }
    rkv_cache_destroy(want);
    for (n = 0; n < 200; n++) {
        rkv_status status;
        copies_left = n;
        status = rkv_cache_fork(cache, &want);
        copies_left = -1;
        if (status == RKV_OK) break;
        expect_device_error("fork", cache, status, -1);
        expect_true("no fork", want == NULL);
    }
    expect_true("some of them failed", n > 1);
    expect_image("forked", want, &before);
    rkv_cache_destroy(want);
    free(before.bytes);
    rkv_cache_destroy(cache);
    expect_int("blocks held in the end", 0, blocks_held, 0);
}

/* A copy into the ring that breaks off: its slots hold nobody's queries, so that no round can be
 * made until the tokens have been appended again. */
static void test_failing_ring(const setup *s)
{
    enum { N = 6, COPIES_BEFORE = 2 }; /* keys, values */
    const rkv_backend backend = scarce_backend();
    const rkv_cache_config config = scarce_config(s, &backend);
    const int window = setup_options(s).window, start = s->budget + 3;
    rkv_cache *cache = NULL, *want = NULL;
    int wraps, l;
    for (wraps = 0; wraps < 2; wraps++) { /* the first or the second of two copies fails */
        expect_true("the ring wraps", start % window + N > window);
        expect_status("create", rkv_cache_create(&cache, &config), RKV_OK);
        expect_status("create", rkv_cache_create(&want, &config), RKV_OK);
        feed(s, cache, 1, start);
        feed(s, want, 1, start + N);
        copies_left = COPIES_BEFORE + wraps;
        expect_device_error("append", cache, feed_layer(s, cache, 0, 1, N), 0);
        copies_left = -1;
        expect_status("compress", rkv_cache_compress(cache, NULL), RKV_ERROR_ARGUMENT);
        expect_true("why", says(rkv_cache_error(cache), "cache: queries"));
        for (l = 0; l < s->n_layers; l++)
            expect_status("again", feed_layer(s, cache, l, 1, N), RKV_OK);
        expect_equal_caches("after trying again", cache, want);
        expect_status("compress", rkv_cache_compress(cache, NULL), RKV_OK);
        expect_int("rows", wraps, rkv_cache_rows(cache, 0), s->budget);
        rkv_cache_destroy(cache);
        rkv_cache_destroy(want);
    }
}

/* own: the record is the cache's. */
static void test_nonfinite_key(const setup *s, int own)
{
    float bad[32] = { 0 }; /* as many as an element may hold */
    rkv_cache_config config = setup_config(s, NULL);
    rkv_cache *cache = NULL;
    const rkv_error *found;
    rkv_error error = RKV_INIT;
    image before;
    int n_evicted = -1;
    config.compress.error = own ? NULL : &error;
    expect_status("create", rkv_cache_create(&cache, &config), RKV_OK);
    expect_true("whose record", own || rkv_cache_error(cache) == &error);
    feed(s, cache, 1, s->budget + s->buffer);
    bad[0] = strtof("inf", NULL);
    encode_row(s->dtype, bad, element_dims(s->dtype),
               (unsigned char *)rkv_cache_keys(cache, 1).data);
    before = image_of(cache);
    expect_status("step", rkv_cache_step(cache, &n_evicted), RKV_ERROR_NONFINITE);
    expect_int("evicted", 0, n_evicted, 0);
    found = rkv_cache_error(cache);
    expect_int("error.status", 0, found->status, RKV_ERROR_NONFINITE);
    expect_int("error.layer", 0, found->layer, 1);
    expect_int("error.head", 0, found->head, 0);
    expect_int("error.token", 0, found->token, 0);
    expect_true("error.rule", says(found, "layer.keys: "));
    expect_image("unchanged", cache, &before); /* saving clears the record */
    expect_int("error.status", 1, found->status, RKV_OK);
    expect_true("error.rule", found->rule == NULL && found->layer == -1);
    free(before.bytes);
    rkv_cache_destroy(cache);
}

/* The next n tokens, with a query that is not finite in the last row of the last head. */
static rkv_status feed_bad_query(const setup *s, rkv_cache *cache, int layer, int text, int n)
{
    const int position = rkv_cache_position(cache, layer);
    rkv_tensor keys = rows_of(s, KEY, layer, text, position, n);
    rkv_tensor values = rows_of(s, VALUE, layer, text, position, n);
    rkv_tensor queries = rows_of(s, QUERY, layer, text, position, n);
    const size_t bytes = row_bytes(queries.dtype, queries.dim);
    rkv_status status;
    memset((unsigned char *)queries.data + bytes * (size_t)(queries.heads * n - 1), 0xff, bytes);
    status = rkv_cache_append(cache, layer, n, &keys, &values, &queries);
    free(keys.data);
    free(values.data);
    free(queries.data);
    return status;
}

/* A query that is not finite: the round says where, truncation forgets it. Before: tokens in front
 * of it; after: behind it. */
static void test_nonfinite_query(const setup *s, int before, int after)
{
    rkv_cache *cache = cache_of(s, NULL), *want = cache_of(s, NULL);
    const rkv_error *error;
    int l;
    decode(s, cache, 1, before);
    decode(s, want, 1, before);
    for (l = 0; l < s->n_layers; l++)
        expect_status("append",
                      l == 1 ? feed_bad_query(s, cache, l, 2, 1) : feed_layer(s, cache, l, 2, 1),
                      RKV_OK);
    feed(s, cache, 2, after);
    expect_status("a round", rkv_cache_compress(cache, NULL), RKV_ERROR_NONFINITE);
    error = rkv_cache_error(cache);
    expect_int("layer", 0, error->layer, 1);
    expect_int("head", 0, error->head, s->query_heads - 1);
    expect_int("slot", 0, error->token, before % setup_votes(s));
    expect_int("position", 0, rkv_cache_error_position(cache), before);
    expect_status("forget", rkv_cache_truncate(cache, rkv_cache_error_position(cache)), RKV_OK);
    decode(s, cache, 3, 3 * s->buffer);
    decode(s, want, 3, 3 * s->buffer);
    expect_equal_caches("as if it had never come", cache, want);
    rkv_cache_destroy(cache);
    rkv_cache_destroy(want);
}

/* Under TRIATTENTION append reads the queries, and refuses one that is not finite. */
static void test_refused_query(const setup *s, int before)
{
    rkv_cache *cache = cache_of(s, NULL), *want = cache_of(s, NULL);
    const rkv_error *error;
    image saved;
    int l;
    decode(s, cache, 1, before);
    decode(s, want, 1, before);
    saved = image_of(cache);
    for (l = 0; l < s->n_layers; l++) {
        expect_status("append", feed_bad_query(s, cache, l, 2, l + 1), RKV_ERROR_NONFINITE);
        error = rkv_cache_error(cache);
        expect_int("layer", 0, error->layer, l);
        expect_int("head", 0, error->head, s->query_heads - 1);
        expect_int("row of the view", 0, error->token, l);
        expect_true("why", says(error, "quer"));
        expect_int("in no row", l, rkv_cache_error_position(cache), -1);
        expect_image("nothing appended", cache, &saved);
    }
    decode(s, cache, 3, 2 * s->buffer);
    decode(s, want, 3, 2 * s->buffer);
    expect_equal_caches("gone on", cache, want);
    free(saved.bytes);
    rkv_cache_destroy(cache);
    rkv_cache_destroy(want);
}

/* Means are those of one sequence: emptied, a cache begins again; taken back to its first tokens it
 * does not. */
static void test_means_begin(const setup *s)
{
    rkv_cache *cache = cache_of(s, NULL);
    plain p;
    decode(s, cache, 1, 9);
    expect_status("empty", rkv_cache_truncate(cache, 0), RKV_OK);
    plain_make(&p, s);
    feed(s, cache, 2, 9);
    plain_append(&p, 2, 9);
    expect_like_plain(cache, &p);
    expect_status("to the first tokens", rkv_cache_truncate(cache, 2), RKV_OK);
    plain_truncate(&p, 7);
    feed(s, cache, 3, 5);
    plain_append(&p, 3, 5);
    expect_like_plain(cache, &p);
    plain_free(&p);
    rkv_cache_destroy(cache);
}

/* ---- appends that are refused ---- */

/* Queries count as much as rows do: a refused append must not use up the window. */
static void expect_still_due(const setup *s, rkv_cache *cache, const char *at)
{
    rkv_cache *fork = NULL;
    expect_status("fork", rkv_cache_fork(cache, &fork), RKV_OK);
    expect_status(at, rkv_cache_compress(fork, NULL), RKV_OK);
    expect_int("rows", 0, rkv_cache_rows(fork, 0), s->budget);
    rkv_cache_destroy(fork);
}

/* A negative block in any place of any table: nothing is appended, and nothing is forgotten. */
static void test_negative_blocks(const setup *s)
{
    enum { N = 6 };
    const int window = setup_options(s).window;
    rkv_cache *cache = cache_of(s, NULL);
    rkv_tensor views[3];
    int32_t table[N];
    image before;
    int kind, at, i;
    feed(s, cache, 1, s->budget + 3); /* the next slot of the ring is not its first: N wraps */
    expect_true("the ring wraps", (s->budget + 3) % window + N > window);
    for (kind = KEY; kind <= QUERY; kind++)
        views[kind] = rows_of(s, (row_kind)kind, 0, 1, s->budget + 3, N);
    before = image_of(cache);
    for (kind = KEY; kind <= QUERY; kind++)
        for (at = 0; at < N; at++) {
            rkv_tensor bad[3];
            memcpy(bad, views, sizeof bad);
            for (i = 0; i < N; i++) table[i] = i == at ? -1 : i;
            bad[kind].block_table = table;
            bad[kind].block_tokens = 1;
            bad[kind].head_stride = (int64_t)N * bad[kind].dim;
            bad[kind].block_stride = bad[kind].dim;
            expect_status("a negative block",
                          rkv_cache_append(cache, 0, N, &bad[KEY], &bad[VALUE], &bad[QUERY]),
                          RKV_ERROR_ARGUMENT);
            expect_true("why", says(rkv_cache_error(cache), "negative block"));
            expect_int("where", 0, rkv_cache_error(cache)->layer, 0);
            if (!expect_image("unchanged", cache, &before))
                case_fail("view %d, block %d of %d", kind, at, N);
            expect_still_due(s, cache, "a round after it");
            table[at] = at;
            if (at + 1 < N) continue;
            expect_status("in order", /* the last of a kind: this one goes in, and out again */
                          rkv_cache_append(cache, 0, N, &bad[KEY], &bad[VALUE], &bad[QUERY]),
                          RKV_OK);
            expect_int("rows", 0, rkv_cache_rows(cache, 0), s->budget + 3 + N);
            rkv_cache_destroy(cache);
            cache = cache_of(s, NULL);
            feed(s, cache, 1, s->budget + 3);
        }
    /* what the reports began with: a table of one block that is not there yet */
    for (kind = KEY; kind <= QUERY; kind++) {
        rkv_tensor bad[3];
        memcpy(bad, views, sizeof bad);
        table[0] = -1;
        bad[kind].block_table = table;
        bad[kind].block_tokens = N;
        expect_status("block table { -1 }",
                      rkv_cache_append(cache, 0, 1, &bad[KEY], &bad[VALUE], &bad[QUERY]),
                      RKV_ERROR_ARGUMENT);
        expect_image("unchanged", cache, &before);
        expect_still_due(s, cache, "a round after it");
    }
    for (kind = KEY; kind <= QUERY; kind++) free(views[kind].data);
    free(before.bytes);
    rkv_cache_destroy(cache);
}

/* Strides whose products with anything leave the address space. */
static void test_huge_strides(const setup *s)
{
    enum { N = 3 };
    static const int64_t huge[] = { INT64_MAX, INT64_MAX - 1, INT64_MAX / 2, -1, INT64_MIN };
    rkv_cache *cache = cache_of(s, NULL);
    rkv_tensor views[3];
    const int32_t table[N] = { 0, 1, 2 };
    image before;
    int kind, field;
    size_t i;
    feed(s, cache, 2, 2);
    before = image_of(cache);
    for (kind = KEY; kind <= QUERY; kind++) views[kind] = rows_of(s, (row_kind)kind, 0, 1, 0, N);
    for (kind = KEY; kind <= QUERY; kind++)
        for (field = 0; field < 4; field++)
            for (i = 0; i < sizeof huge / sizeof *huge; i++) {
                rkv_tensor bad[3];
                rkv_tensor *t = &bad[kind];
                memcpy(bad, views, sizeof bad);
                if (field == 3) {
                    t->block_table = table;
                    t->block_tokens = 1;
                }
                *(field == 0   ? &t->head_stride
                  : field == 1 ? &t->token_stride
                  : field == 2 ? &t->dim_stride
                               : &t->block_stride) = huge[i];
                expect_status("a huge stride",
                              rkv_cache_append(cache, 0, N, &bad[KEY], &bad[VALUE], &bad[QUERY]),
                              RKV_ERROR_ARGUMENT);
                expect_true("why", says(rkv_cache_error(cache), "stride") ||
                                       says(rkv_cache_error(cache), "overflows"));
                expect_image("unchanged", cache, &before);
            }
    for (kind = KEY; kind <= QUERY; kind++) free(views[kind].data);
    free(before.bytes);
    rkv_cache_destroy(cache);
}

/* ---- a cache never gets stuck ---- */

/* An image of a cache with more room, whose window lacks more queries than there is room for. */
static void test_load_without_room(void)
{
    setup wide = setups[0], narrow = setups[0];
    rkv_cache *cache, *other;
    image saved, before;
    int rows;
    wide.budget = narrow.budget = 16;
    wide.buffer = narrow.buffer = 8;
    wide.capacity = 64;
    for (rows = 16; rows <= 24; rows++) {
        const int missing = 30 - rows < 8 ? 30 - rows : 8, fits = rows + missing <= 24;
        cache = cache_of(&wide, NULL);
        other = cache_of(&narrow, NULL);
        decode(&narrow, other, 2, 5);
        before = image_of(other);
        feed(&wide, cache, 1, 30);
        expect_status("truncate", rkv_cache_truncate(cache, rows), RKV_OK);
        saved = image_of(cache);
        expect_status("load", rkv_cache_load(other, saved.bytes, saved.size),
                      fits ? RKV_OK : RKV_ERROR_ARGUMENT);
        if (!fits) expect_true("why", says(rkv_cache_error(other), "memory: no room"));
        expect_image("loaded, or as it was", other, fits ? &saved : &before);
        decode(&narrow, other, 1, 40); /* and goes on */
        free(saved.bytes);
        free(before.bytes);
        rkv_cache_destroy(cache);
        rkv_cache_destroy(other);
    }
}

/* From here a round can be reached, by appending alone; told on a fork. */
static int expect_alive(const setup *s, const rkv_cache *cache)
{
    const int votes = setup_votes(s);
    rkv_cache *fork = NULL;
    rkv_status status = RKV_ERROR_ARGUMENT;
    int l, most = 0, tries, alive;
    if (!expect_status("fork", rkv_cache_fork(cache, &fork), RKV_OK)) return 0;
    for (l = 0; l < s->n_layers; l++)
        if (rkv_cache_rows(fork, l) > most) most = rkv_cache_rows(fork, l);
    if (most <= s->budget) most = s->budget + 1;
    for (l = 0; l < s->n_layers; l++)
        expect_status("to equal length", feed_layer(s, fork, l, 9, most - rkv_cache_rows(fork, l)),
                      RKV_OK);
    for (tries = 0; tries <= votes && status != RKV_OK; tries++) {
        status = rkv_cache_compress(fork, NULL);
        if (status == RKV_OK) break;
        expect_true("why", says(rkv_cache_error(fork), "cache: queries"));
        if (rkv_cache_room(fork, 0) < 1) break;
        feed(s, fork, 9, 1);
    }
    alive = expect_status("a round is reached", status, RKV_OK) &&
            expect_int("rows after it", 0, rkv_cache_rows(fork, 0), s->budget);
    rkv_cache_destroy(fork);
    return alive;
}

enum { ACTIONS = 9 };

/* One call of any kind, most of them sound; returns the text that the newest tokens are of. */
static void act(const setup *s, rkv_cache **cache, rkv_cache *other, rng *r)
{
    const int position = rkv_cache_position(*cache, 0), room = rkv_cache_room(*cache, 0);
    const int kind = rng_below(r, ACTIONS), layer = rng_below(r, s->n_layers);
    rkv_cache *fork = NULL;
    image saved;
    int l, n;
    switch (kind) {
    case 0: /* to one layer alone */
        n = rng_below(r, 4);
        if (n <= rkv_cache_room(*cache, layer)) feed_layer(s, *cache, layer, 1, n);
        break;
    case 1: /* to all, one by one or many */
    case 2:
        n = room > 0 ? 1 + rng_below(r, kind == 1 || room < 4 ? room : 4) : 0;
        for (l = 0; l < s->n_layers; l++)
            if (n <= rkv_cache_room(*cache, l)) feed_layer(s, *cache, l, 1, n);
        break;
    case 3: /* the layers to equal length, and perhaps a round */
        for (l = 0, n = 0; l < s->n_layers; l++)
            if (rkv_cache_rows(*cache, l) > n) n = rkv_cache_rows(*cache, l);
        for (l = 0; l < s->n_layers; l++)
            feed_layer(s, *cache, l, 1, n - rkv_cache_rows(*cache, l));
        rkv_cache_step(*cache, NULL);
        break;
    case 4: rkv_cache_compress(*cache, NULL); break;
    case 5: rkv_cache_truncate(*cache, position - rng_below(r, 12)); break;
    case 6: rkv_cache_truncate(*cache, rng_below(r, position + 1)); break;
    case 7: /* out, and into a cache with other room, which may refuse; then back */
        saved = image_of(*cache);
        if (rkv_cache_load(other, saved.bytes, saved.size) == RKV_OK) {
            free(saved.bytes);
            saved = image_of(other);
            expect_status("back", rkv_cache_load(*cache, saved.bytes, saved.size), RKV_OK);
        }
        free(saved.bytes);
        break;
    default:
        expect_status("fork", rkv_cache_fork(*cache, &fork), RKV_OK);
        rkv_cache_destroy(*cache);
        *cache = fork;
    }
}

/* Random calls, in search of a sequence that leaves a cache which can neither append nor compress.
 * Copies of the backend fail now and then, in the middle of anything. */
static void test_never_stuck(const setup *base, int extra_capacity, uint64_t seed)
{
    const rkv_backend backend = scarce_backend();
    rkv_cache_config config;
    setup s = *base, t;
    rkv_cache *cache = NULL, *other = NULL;
    rng r = rng_seed(seed);
    int calls;
    s.capacity = s.budget + s.buffer + extra_capacity;
    t = s;
    t.buffer = least_buffer(&t) + rng_below(&r, s.buffer + 8);
    t.capacity = t.budget + t.buffer + rng_below(&r, 30);
    config = scarce_config(&s, &backend);
    expect_status("create", rkv_cache_create(&cache, &config), RKV_OK);
    config = scarce_config(&t, &backend);
    expect_status("create", rkv_cache_create(&other, &config), RKV_OK);
    for (calls = 0; calls < 100; calls++) {
        if (rng_below(&r, 6) == 0) { /* an append of one layer that breaks off somewhere */
            const int n = 1 + rng_below(&r, 8), layer = rng_below(&r, s.n_layers);
            copies_left = rng_below(&r, 5);
            if (n <= rkv_cache_room(cache, layer)) feed_layer(&s, cache, layer, 1, n);
            copies_left = -1;
        }
        act(&s, &cache, other, &r);
        if (!expect_alive(&s, cache) || !expect_alive(&t, other)) {
            case_fail("after %d calls of seed %ld", calls + 1, (long)seed);
            break;
        }
    }
    rkv_cache_destroy(cache);
    rkv_cache_destroy(other);
    expect_int("blocks held in the end", 0, blocks_held, 0);
}

/* ---- a device ---------------------------------------------------------------------------------
 * A backend whose memory the host cannot read: its pointers lie where nothing is. Every call
 * translates them. It finds faults in the data only after a call, as a GPU does. */
enum { MAX_DEVICE_BLOCKS = 64 };
static struct device {
    const rkv_backend *cpu;
    struct {
        unsigned char *host;
        size_t bytes;
    } blocks[MAX_DEVICE_BLOCKS];
    int n_runs, fails; /* what is to go wrong: see below */
    rkv_error *seen;   /* device_error of the last run, as the device was given it */
} device;
enum {
    DEVICE_WORKS,
    DEVICE_FINDS_A_FAULT, /* run succeeds; the fault stands in device_error */
    DEVICE_REFUSES_RUN,
    DEVICE_REFUSES_COPY,
    DEVICE_REFUSES_COPY_ROWS,
    DEVICE_REFUSES_FILL,
    DEVICE_REFUSES_SYNCHRONIZE,
    DEVICE_REFUSES_MEANS
};
static const char device_rule[] = "layer.keys: a fault that the device found";
static const char refused_rule[] = "layer.keys: a device does not do this";

/* Far from every address in use; where there is no such place, the memory itself. */
static const uintptr_t device_offset = sizeof(void *) < 8 ? 0 : UINTPTR_MAX / 4 + 1;

static void *device_alloc(const rkv_backend *self, size_t bytes)
{
    int i;
    (void)self;
    for (i = 0; i < MAX_DEVICE_BLOCKS; i++)
        if (!device.blocks[i].host) {
            device.blocks[i].host = (unsigned char *)alloc_checked(bytes);
            device.blocks[i].bytes = bytes;
            memset(device.blocks[i].host, 0xd5, bytes);
            return (void *)((uintptr_t)device.blocks[i].host + device_offset);
        }
    return NULL;
}

/* The block that an address lies in, or -1: host memory. */
static int device_block(const void *at)
{
    int i;
    for (i = 0; i < MAX_DEVICE_BLOCKS; i++) {
        const uintptr_t begin = (uintptr_t)device.blocks[i].host + device_offset;
        if (device.blocks[i].host && (uintptr_t)at - begin < device.blocks[i].bytes) return i;
    }
    return -1;
}

static void *device_to_host(const void *at)
{
    return (void *)((uintptr_t)at - (device_block(at) < 0 ? 0 : device_offset));
}

static void device_free(const rkv_backend *self, void *memory)
{
    const int i = device_block(memory);
    (void)self;
    if (!expect_true("memory of the device", i >= 0)) return;
    free(device.blocks[i].host);
    device.blocks[i].host = NULL;
}

static rkv_status device_copy(const rkv_backend *self, void *dst, const void *src, size_t bytes)
{
    (void)self;
    if (device.fails == DEVICE_REFUSES_COPY) return RKV_ERROR_DEVICE;
    memcpy(device_to_host(dst), device_to_host(src), bytes);
    return RKV_OK;
}

static rkv_status device_copy_rows(const rkv_backend *self, const rkv_tensor *dst, int dst_token,
                                   const rkv_tensor *src, int src_token, int n_tokens)
{
    rkv_tensor to = *dst, from = *src;
    (void)self;
    if (device.fails == DEVICE_REFUSES_COPY_ROWS) return RKV_ERROR_DEVICE;
    to.data = device_to_host(dst->data);
    from.data = device_to_host(src->data);
    return device.cpu->copy_rows(device.cpu, &to, dst_token, &from, src_token, n_tokens);
}

static rkv_status device_fill(const rkv_backend *self, int32_t *positions, int n_sets, int stride,
                              int row, int first, int n)
{
    (void)self;
    if (device.fails == DEVICE_REFUSES_FILL) return RKV_ERROR_DEVICE;
    return device.cpu->fill_positions(device.cpu, (int32_t *)device_to_host(positions), n_sets,
                                      stride, row, first, n);
}

static rkv_status device_synchronize(const rkv_backend *self)
{
    (void)self;
    return device.fails == DEVICE_REFUSES_SYNCHRONIZE ? RKV_ERROR_DEVICE : RKV_OK;
}

static rkv_status device_size(const rkv_backend *self, const rkv_config *config,
                              const rkv_layer *layers, int n_layers, size_t *bytes)
{
    (void)self;
    return device.cpu->workspace_size(device.cpu, config, layers, n_layers, bytes);
}

/* Runs on the CPU with translated pointers. As on a GPU, the record is cleared first, and n_tokens
 * are those of a round without faults, for the host knows nothing else. */
static rkv_status device_run(const rkv_backend *self, const rkv_call *call)
{
    enum { MAX_LAYERS = 4 };
    static const rkv_error nothing = { NULL, RKV_OK, -1, -1, -1 };
    const rkv_error fault = { device_rule, RKV_ERROR_NONFINITE, 1, 0, 5 };
    rkv_layer layers[MAX_LAYERS];
    rkv_call host = *call;
    rkv_error *found;
    rkv_status status = RKV_OK;
    int l;
    (void)self;
    device.n_runs++;
    device.seen = call->config->device_error;
    if (!expect_true("a device_error", device.seen != NULL)) return RKV_ERROR_UNSUPPORTED;
    found = (rkv_error *)device_to_host(device.seen);
    memcpy(found, &nothing, sizeof *found);
    if (device.fails == DEVICE_REFUSES_RUN) {
        if (call->config->error) {
            *call->config->error = fault;
            call->config->error->rule = refused_rule;
            call->config->error->status = RKV_ERROR_UNSUPPORTED;
        }
        return RKV_ERROR_UNSUPPORTED;
    }
    for (l = 0; l < call->n_layers; l++) {
        layers[l] = call->layers[l];
        layers[l].keys.data = device_to_host(layers[l].keys.data);
        layers[l].values.data = device_to_host(layers[l].values.data);
        layers[l].queries.data = device_to_host(layers[l].queries.data);
        layers[l].positions = (int32_t *)device_to_host(layers[l].positions);
        layers[l].state = (float *)device_to_host(layers[l].state);
        layers[l].query_means = (const float *)device_to_host(layers[l].query_means);
    }
    host.layers = layers;
    host.workspace = device_to_host(call->workspace);
    if (device.fails == DEVICE_FINDS_A_FAULT)
        memcpy(found, &fault, sizeof *found);
    else
        status = device.cpu->run(device.cpu, &host);
    for (l = 0; l < call->n_layers; l++) {
        if (call->layers[l].n_tokens > call->config->budget)
            call->layers[l].n_tokens = call->config->budget;
        call->layers[l].n_kept = call->layers[l].n_tokens;
        call->layers[l].n_new = 0;
    }
    return status;
}

static rkv_status device_update_means(const rkv_backend *self, const rkv_means_call *call)
{
    rkv_means_call host = *call;
    rkv_tensor queries = *call->queries;
    (void)self;
    if (device.fails == DEVICE_REFUSES_MEANS) return RKV_ERROR_DEVICE;
    queries.data = device_to_host(queries.data);
    host.queries = &queries;
    host.means = (float *)device_to_host(call->means);
    return device.cpu->update_means(device.cpu, &host);
}

static rkv_backend device_backend(void)
{
    rkv_backend backend;
    memset(&backend, 0, sizeof backend);
    device.cpu = rkv_backend_find(NULL);
    device.fails = DEVICE_WORKS;
    device.n_runs = 0;
    backend.name = "device";
    backend.workspace_size = device_size;
    backend.run = device_run;
    backend.alloc = device_alloc;
    backend.free = device_free;
    backend.copy = device_copy;
    backend.copy_rows = device_copy_rows;
    backend.fill_positions = device_fill;
    backend.synchronize = device_synchronize;
    backend.update_means = device_update_means;
    return backend;
}

static void expect_device_empty(void)
{
    int i, held = 0;
    for (i = 0; i < MAX_DEVICE_BLOCKS; i++) held += device.blocks[i].host != NULL;
    expect_int("blocks of the device", 0, held, 0);
}

static void expect_record(const rkv_cache *cache, const rkv_error *want)
{
    const rkv_error *got = rkv_cache_error(cache);
    expect_true("error.rule", got->rule == want->rule);
    expect_int("error.status", 0, got->status, want->status);
    expect_int("error.layer", 0, got->layer, want->layer);
    expect_int("error.head", 0, got->head, want->head);
    expect_int("error.token", 0, got->token, want->token);
}

/* Decoding on the device gives what decoding on the CPU gives. */
static void test_device_decode(const setup *s)
{
    const rkv_backend backend = device_backend();
    rkv_cache *cache = cache_of(s, &backend), *want = cache_of(s, NULL), *fork = NULL;
    image saved;
    decode(s, cache, 1, 2 * (s->budget + s->buffer));
    decode(s, want, 1, 2 * (s->budget + s->buffer));
    expect_true("rounds on the device", device.n_runs > 1);
    expect_equal_caches("on a device", cache, want);
    expect_status("fork", rkv_cache_fork(cache, &fork), RKV_OK);
    expect_equal_caches("forked on a device", fork, want);
    saved = image_of(want);
    expect_status("empty", rkv_cache_truncate(fork, 0), RKV_OK);
    expect_status("load", rkv_cache_load(fork, saved.bytes, saved.size), RKV_OK);
    decode(s, fork, 2, s->buffer + 1);
    decode(s, want, 2, s->buffer + 1);
    expect_equal_caches("loaded on a device", fork, want);
    free(saved.bytes);
    rkv_cache_destroy(cache);
    rkv_cache_destroy(fork);
    rkv_cache_destroy(want);
    expect_device_empty();
}

/* A fault that the device finds: the round reports it and the cache is as it was. */
static void test_device_fault(const setup *s)
{
    static const rkv_error fault = { device_rule, RKV_ERROR_NONFINITE, 1, 0, 5 };
    const rkv_backend backend = device_backend();
    rkv_cache *cache = cache_of(s, &backend), *want = cache_of(s, NULL), *fork = NULL;
    rkv_error *seen;
    image before;
    int n_evicted = -1, l;
    feed(s, cache, 1, s->budget + s->buffer);
    feed(s, want, 1, s->budget + s->buffer);
    before = image_of(cache);
    device.fails = DEVICE_FINDS_A_FAULT;
    expect_status("step", rkv_cache_step(cache, &n_evicted), RKV_ERROR_NONFINITE);
    expect_record(cache, &fault);
    seen = device.seen;
    expect_true("a record on the device", device_block(seen) >= 0);
    expect_int("evicted", 0, n_evicted, 0);
    for (l = 0; l < s->n_layers; l++)
        expect_int("rows", l, rkv_cache_rows(cache, l), s->budget + s->buffer);
    expect_int("rounds", 0, rkv_cache_get_stats(cache).rounds, 0);
    expect_image("unchanged", cache, &before);
    n_evicted = -1;
    expect_status("compress", rkv_cache_compress(cache, &n_evicted), RKV_ERROR_NONFINITE);
    expect_record(cache, &fault);
    expect_int("evicted", 1, n_evicted, 0);
    expect_image("unchanged", cache, &before);
    /* a fork has a record of its own on the device, and on the host */
    expect_status("fork", rkv_cache_fork(cache, &fork), RKV_OK);
    expect_status("step", rkv_cache_step(fork, NULL), RKV_ERROR_NONFINITE);
    expect_record(fork, &fault);
    expect_true("a record of its own", device.seen != seen && device_block(device.seen) >= 0);
    expect_true("the parent's", rkv_cache_error(cache)->rule == NULL);
    /* the device recovers, and so do both */
    device.fails = DEVICE_WORKS;
    expect_int("step", 0, step(cache), s->buffer);
    expect_true("no rule", rkv_cache_error(cache)->rule == NULL);
    expect_int("step", 1, step(fork), s->buffer);
    step(want);
    expect_equal_caches("after the fault", cache, want);
    expect_equal_caches("after the fault, forked", fork, want);
    /* what run itself refuses comes back as run wrote it */
    feed(s, cache, 1, s->buffer);
    device.fails = DEVICE_REFUSES_RUN;
    expect_status("step", rkv_cache_step(cache, &n_evicted), RKV_ERROR_UNSUPPORTED);
    expect_true("run's text", rkv_cache_error(cache)->rule == refused_rule);
    expect_int("rows", 2, rkv_cache_rows(cache, 0), s->budget + s->buffer);
    device.fails = DEVICE_WORKS;
    expect_int("step", 2, step(cache), s->buffer);
    free(before.bytes);
    rkv_cache_destroy(cache);
    rkv_cache_destroy(fork);
    rkv_cache_destroy(want);
    expect_device_empty();
}

/* With a device_error of the caller's the cache does not look: step succeeds, and the caller finds
 * the fault. */
static void test_device_error_of_caller(const setup *s)
{
    const rkv_backend backend = device_backend();
    rkv_cache_config config = setup_config(s, &backend);
    rkv_cache *cache = NULL, *fork = NULL;
    rkv_error *mine = (rkv_error *)device_alloc(&backend, sizeof(rkv_error)), found;
    int i;
    config.compress.device_error = mine;
    expect_status("create", rkv_cache_create(&cache, &config), RKV_OK);
    feed(s, cache, 1, s->budget + s->buffer);
    expect_status("fork", rkv_cache_fork(cache, &fork), RKV_OK);
    for (i = 0; i < 2; i++) {
        rkv_cache *c = i ? fork : cache;
        device.fails = DEVICE_FINDS_A_FAULT;
        device.seen = NULL;
        expect_int("step", i, step(c), s->buffer);
        expect_true("the caller's record", device.seen == mine);
        expect_true("no rule", rkv_cache_error(c)->rule == NULL);
        expect_int("rows", i, rkv_cache_rows(c, 0), s->budget);
        device.fails = DEVICE_WORKS;
        device_copy(&backend, &found, mine, sizeof found);
        expect_true("found", found.rule == device_rule && found.status == RKV_ERROR_NONFINITE);
    }
    /* no copy is made to look: a device that refuses them does not stop the round */
    feed(s, cache, 1, s->buffer);
    device.fails = DEVICE_REFUSES_COPY;
    expect_int("step without a copy", 0, step(cache), s->buffer);
    device.fails = DEVICE_WORKS;
    /* the way out of a lost cache: empty it */
    expect_status("empty", rkv_cache_truncate(cache, 0), RKV_OK);
    decode(s, cache, 1, s->budget + s->buffer + 1);
    rkv_cache_destroy(fork);
    rkv_cache_destroy(cache);
    device_free(&backend, mine);
    expect_device_empty();
}

/* A device that refuses one of its memory functions: RKV_ERROR_DEVICE, and a sentence. */
static void test_device_refusals(const setup *s)
{
    const rkv_backend backend = device_backend();
    const rkv_cache_config config = setup_config(s, &backend);
    rkv_cache *cache = NULL, *fork = NULL;
    image saved;
    int l;
    device.fails = DEVICE_REFUSES_COPY;
    expect_status("create", rkv_cache_create(&cache, &config), RKV_ERROR_DEVICE);
    expect_true("no cache", cache == NULL);
    expect_device_empty();
    device.fails = DEVICE_WORKS;
    expect_status("create", rkv_cache_create(&cache, &config), RKV_OK);
    feed(s, cache, 1, s->budget + s->buffer - 1);
    for (device.fails = DEVICE_REFUSES_COPY_ROWS; device.fails <= DEVICE_REFUSES_FILL;
         device.fails++)
        expect_device_error("append", cache, feed_layer(s, cache, 1, 1, 1), 1);
    device.fails = DEVICE_WORKS;
    feed(s, cache, 1, 1);
    saved = image_of(cache);
    device.fails = DEVICE_REFUSES_SYNCHRONIZE;
    expect_device_error("save", cache, rkv_cache_save(cache, saved.bytes, saved.size), -1);
    device.fails = DEVICE_REFUSES_COPY;
    expect_device_error("save", cache, rkv_cache_save(cache, saved.bytes, saved.size), -1);
    expect_device_error("fork", cache, rkv_cache_fork(cache, &fork), -1);
    device.fails = DEVICE_REFUSES_COPY_ROWS;
    expect_device_error("fork", cache, rkv_cache_fork(cache, &fork), -1);
    expect_true("no fork", fork == NULL);
    device.fails = DEVICE_WORKS;
    free(saved.bytes);
    saved = image_of(cache);
    device.fails = DEVICE_REFUSES_COPY; /* cannot be looked at: nobody knows where the rows are */
    expect_status("step", rkv_cache_step(cache, NULL), RKV_ERROR_DEVICE);
    for (l = 0; l < s->n_layers; l++) expect_int("rows", l, rkv_cache_rows(cache, l), 0);
    for (device.fails = DEVICE_REFUSES_COPY; device.fails <= DEVICE_REFUSES_SYNCHRONIZE;
         device.fails++) {
        if (device.fails == DEVICE_REFUSES_COPY_ROWS) continue;
        expect_device_error("load", cache, rkv_cache_load(cache, saved.bytes, saved.size), -1);
        for (l = 0; l < s->n_layers; l++) expect_int("rows", l, rkv_cache_rows(cache, l), 0);
    }
    device.fails = DEVICE_WORKS;
    expect_status("load", rkv_cache_load(cache, saved.bytes, saved.size), RKV_OK);
    expect_image("loaded", cache, &saved);
    free(saved.bytes);
    rkv_cache_destroy(cache);
    expect_device_empty();
}

/* Copies and updates of means that a device refuses: nothing is appended, and trying again is as if
 * nothing had been tried. */
static void test_device_refuses_means(const setup *s)
{
    static const int fails[] = { DEVICE_REFUSES_MEANS, DEVICE_REFUSES_COPY };
    const rkv_backend backend = device_backend();
    rkv_cache *cache = cache_of(s, &backend), *want = cache_of(s, NULL);
    int i, n;
    for (n = 0; n < 2; n++) /* the first tokens, then others */
        for (i = 0; i < 2; i++) {
            rkv_status status;
            device.fails = fails[i];
            status = feed_layer(s, cache, 0, 1, 5);
            device.fails = DEVICE_WORKS;
            if (status == RKV_OK) /* no copy is needed but that of the zeros */
                expect_int("a copy that is not made", n, fails[i], DEVICE_REFUSES_COPY);
            else
                expect_status("append", status, RKV_ERROR_DEVICE);
            expect_int("rows", n, rkv_cache_rows(cache, 0), status == RKV_OK ? 10 : 5 * n);
            if (i == 1) {
                if (status != RKV_OK) expect_status("again", feed_layer(s, cache, 0, 1, 5), RKV_OK);
                expect_status("the others", feed_layer(s, cache, 1, 1, 5), RKV_OK);
                feed(s, want, 1, 5);
            }
        }
    expect_equal_caches("after trying again", cache, want);
    rkv_cache_destroy(cache);
    rkv_cache_destroy(want);
    expect_device_empty();
}

/* ---- arguments ---- */

static void expect_not_created(const char *at, const rkv_cache_config *config, rkv_status want)
{
    rkv_cache *cache = (rkv_cache *)(void *)&cache;
    expect_status(at, rkv_cache_create(&cache, config), want);
    expect_true("no cache", cache == NULL);
}

static void test_create_arguments(void)
{
    const setup *s = &setups[0];
    const rkv_cache_config good = setup_config(s, NULL);
    rkv_backend bare = *rkv_backend_find(NULL);
    rkv_cache_config c;
    rkv_cache *cache = NULL;
    expect_status("no out", rkv_cache_create(NULL, &good), RKV_ERROR_NULL);
    expect_not_created("no config", NULL, RKV_ERROR_NULL);
#define REFUSED(change) c = good, change, expect_not_created(#change, &c, RKV_ERROR_ARGUMENT)
    REFUSED(c.n_layers = 0);
    REFUSED(c.n_layers = -1);
    REFUSED(c.kv_heads = 0);
    REFUSED(c.query_heads = 0);
    REFUSED(c.query_heads = 3);
    REFUSED(c.head_dim = 0);
    REFUSED(c.value_dim = -1);
    REFUSED(c.buffer = -1);
    REFUSED(c.capacity = -1);
    REFUSED(c.capacity = s->budget + s->buffer - 1);
    REFUSED(c.dtype = (rkv_dtype)9);
    REFUSED(c.compress.budget = 0);
    REFUSED(c.compress.budget = INT32_MAX);
    REFUSED(c.compress.window = -1);
    REFUSED(c.compress.window = s->budget + 1);
    REFUSED(c.compress.pinned = -1);
    REFUSED(c.compress.pinned = s->budget);
    REFUSED(c.compress.protect = -1);
    REFUSED(c.compress.protect = s->budget + 1);
    REFUSED((c.compress.protect = s->budget, c.compress.pinned = 1));
    REFUSED(c.compress.variant = (rkv_variant)2);
    REFUSED(c.scale = -1);
    REFUSED(c.softcap = -1);
    REFUSED(c.compress.lambda = 2.0f);
    REFUSED(c.alloc = scarce_alloc);
    REFUSED(c.free = scarce_free);
    REFUSED((c.n_layers = c.kv_heads = c.query_heads = INT32_MAX, c.head_dim = INT32_MAX));
#undef REFUSED
    bare.copy_rows = NULL;
    c = good;
    c.backend = &bare;
    expect_not_created("a backend without memory", &c, RKV_ERROR_UNSUPPORTED);
    bare = *rkv_backend_find(NULL);
    bare.update_means = NULL;
    c = setup_config(setup_named("triattention, f32, per head"), &bare);
    expect_not_created("a backend without means", &c, RKV_ERROR_UNSUPPORTED);
    c.compress = rkv_config_memory_traces(s->budget);
    expect_status("which others do without", rkv_cache_create(&cache, &c), RKV_OK);
    rkv_cache_destroy(cache);
    cache = NULL;

    /* zeros mean their defaults */
    c = good;
    c.compress.window = 0;
    c.buffer = 0;
    expect_status("defaults", rkv_cache_create(&cache, &c), RKV_OK);
    expect_int("room", 0, rkv_cache_room(cache, 0), s->budget + 128);
    expect_int("value dim", 0, rkv_cache_values(cache, 0).dim, s->head_dim);
    expect_int("bytes", 0, (int64_t)rkv_cache_get_stats(cache).bytes_held,
               2 * 4 * (2 * (s->budget + 128) * 2 * 16 + 4 * 8 * 16));
    rkv_cache_destroy(cache);
}

static void test_append_arguments(void)
{
    enum { N = 3 };
    const setup *s = &setups[2]; /* values wider than keys */
    rkv_cache *cache = cache_of(s, NULL);
    const rkv_tensor keys = rows_of(s, KEY, 0, 1, 0, N), values = rows_of(s, VALUE, 0, 1, 0, N);
    const rkv_tensor queries = rows_of(s, QUERY, 0, 1, 0, N);
    const rkv_tensor *const good[3] = { &keys, &values, &queries };
    const int32_t table[1] = { 0 };
    image before;
    int i;
    feed(s, cache, 2, 2);
    before = image_of(cache);
#define REFUSED(layer, n, k, v, q)                        \
    expect_status(#layer ", " #n ", " #k ", " #v ", " #q, \
                  rkv_cache_append(cache, layer, n, k, v, q), RKV_ERROR_ARGUMENT)
    REFUSED(-1, N, &keys, &values, &queries);
    REFUSED(3, N, &keys, &values, &queries);
    REFUSED(0, -1, &keys, &values, &queries);
    REFUSED(0, N + 1, &keys, &values, &queries);
    REFUSED(0, N, NULL, &values, &queries);
    REFUSED(0, N, &keys, NULL, &queries);
    REFUSED(0, N, &keys, &values, NULL);
    REFUSED(0, N, &queries, &values, &queries);
    REFUSED(0, N, &keys, &keys, &queries);
    REFUSED(0, N, &keys, &values, &keys);
#undef REFUSED
    for (i = 0; i < 3; i++) {
        rkv_tensor bad[8];
        int b;
        for (b = 0; b < 8; b++) bad[b] = *good[i];
        bad[0].data = NULL;
        bad[1].heads++;
        bad[2].dim--;
        bad[3].dtype = RKV_F16;
        bad[4].element_bytes = 4;
        bad[5].tokens = N - 1;
        bad[6].token_stride = -1;
        bad[7].block_table = table;
        for (b = 0; b < 8; b++)
            if (!expect_status("a bad view",
                               rkv_cache_append(cache, 0, N, i == 0 ? &bad[b] : &keys,
                                                i == 1 ? &bad[b] : &values,
                                                i == 2 ? &bad[b] : &queries),
                               RKV_ERROR_ARGUMENT))
                expect_int("which view, which fault", i, b, -1);
    }
    expect_status("no cache", rkv_cache_append(NULL, 0, N, &keys, &values, &queries),
                  RKV_ERROR_NULL);
    expect_image("unchanged", cache, &before);
    expect_status("none", rkv_cache_append(cache, 0, 0, NULL, NULL, NULL), RKV_OK);
    expect_image("unchanged", cache, &before);
    expect_status("more than the room", feed_layer(s, cache, 0, 1, rkv_cache_room(cache, 0) + 1),
                  RKV_ERROR_ARGUMENT);
    expect_image("unchanged", cache, &before);
    expect_status("all of the room", feed_layer(s, cache, 0, 1, rkv_cache_room(cache, 0)), RKV_OK);
    expect_int("room", 0, rkv_cache_room(cache, 0), 0);
    for (i = 0; i < 3; i++) free(good[i]->data);
    free(before.bytes);
    rkv_cache_destroy(cache);
}

/* Where no query is ever read, none need be given. */
static void test_no_queries(const setup *s)
{
    const rkv_config options = setup_options(s);
    rkv_cache *cache = cache_of(s, NULL), *want = cache_of(s, NULL);
    int t, l;
    for (t = 0; t < 100; t++) {
        for (l = 0; l < s->n_layers; l++) {
            rkv_tensor keys = rows_of(s, KEY, l, 1, t, 1), values = rows_of(s, VALUE, l, 1, t, 1);
            expect_status("append", rkv_cache_append(cache, l, 1, &keys, &values, NULL), RKV_OK);
            free(keys.data);
            free(values.data);
        }
        step(cache);
    }
    decode(s, want, 1, 100);
    expect_equal_caches("without queries", cache, want);
    expect_true("no ring held",
                rkv_cache_get_stats(cache).bytes_held ==
                    (size_t)(s->n_layers * s->kv_heads * setup_capacity(s)) *
                        (dtype_bytes(s->dtype) * (size_t)(s->head_dim + setup_value_dim(s)) +
                         sizeof(float) * (size_t)rkv_state_floats(&options)));
    rkv_cache_destroy(cache);
    rkv_cache_destroy(want);
}

static void test_views_out_of_range(void)
{
    static const int outside[] = { -1, 2 };
    rkv_cache *cache = cache_of(&setups[0], NULL);
    int i;
    feed(&setups[0], cache, 1, 4);
    for (i = 0; i < 3; i++) {
        const rkv_cache *c = i < 2 ? cache : NULL;
        const int layer = i < 2 ? outside[i] : 0;
        expect_true("keys", rkv_cache_keys(c, layer).data == NULL);
        expect_true("values", rkv_cache_values(c, layer).data == NULL);
        expect_true("positions", rkv_cache_positions(c, layer, 0) == NULL);
        expect_int("rows", i, rkv_cache_rows(c, layer), 0);
        expect_int("room", i, rkv_cache_room(c, layer), 0);
        expect_int("position", i, rkv_cache_position(c, layer), 0);
    }
    expect_true("positions", rkv_cache_positions(cache, 0, 2) == NULL);
    expect_true("positions", rkv_cache_positions(cache, 0, -1) == NULL);
    expect_status("step", rkv_cache_step(NULL, NULL), RKV_ERROR_NULL);
    expect_status("compress", rkv_cache_compress(NULL, NULL), RKV_ERROR_NULL);
    expect_status("truncate", rkv_cache_truncate(NULL, 0), RKV_ERROR_NULL);
    expect_status("fork", rkv_cache_fork(cache, NULL), RKV_ERROR_NULL);
    expect_int("the record of no cache", 0, rkv_cache_error(NULL)->status, RKV_ERROR_NULL);
    rkv_cache_destroy(cache);
}

/* ---- thread pool ---- */

typedef struct tally {
    pthread_mutex_t mutex;
    unsigned char seen[1000];
} tally;

static void count_index(void *arg, int index)
{
    tally *t = (tally *)arg;
    pthread_mutex_lock(&t->mutex);
    t->seen[index]++;
    pthread_mutex_unlock(&t->mutex);
}

static void run_tally(const rkv_config *config, int n_tasks)
{
    tally t;
    int i, wrong = 0;
    memset(t.seen, 0, sizeof t.seen);
    pthread_mutex_init(&t.mutex, NULL);
    config->parallel_for(config->pool_handle, n_tasks, count_index, &t);
    pthread_mutex_destroy(&t.mutex);
    for (i = 0; i < 1000; i++) wrong += t.seen[i] != (i < n_tasks);
    expect_int("indices not done once", n_tasks, wrong, 0);
}

static void test_threads(int n_threads)
{
    static const int counts[] = { 0, 1, 2, 3, 7, 64, 1000 };
    rkv_config config = rkv_config_default(32);
    rkv_threads *threads = NULL;
    size_t i;
    int repeat;
    expect_status("create", rkv_threads_create(&threads, n_threads), RKV_OK);
    rkv_threads_use(threads, &config);
    expect_int("threads", 0, config.n_threads, n_threads);
    for (repeat = 0; repeat < 20; repeat++)
        for (i = 0; i < sizeof counts / sizeof *counts; i++) run_tally(&config, counts[i]);
    rkv_threads_use(NULL, &config);
    expect_true("taken away", config.parallel_for == NULL && config.pool_handle == NULL);
    rkv_threads_destroy(threads);
}

static void *call_many_times(void *arg)
{
    const rkv_config *config = (const rkv_config *)arg;
    tally t;
    int i, call, *wrong = (int *)calloc(1, sizeof(int));
    pthread_mutex_init(&t.mutex, NULL);
    for (call = 0; call < 50; call++) {
        memset(t.seen, 0, sizeof t.seen);
        config->parallel_for(config->pool_handle, 100, count_index, &t);
        for (i = 0; i < 1000; i++) *wrong += t.seen[i] != (i < 100);
    }
    pthread_mutex_destroy(&t.mutex);
    return wrong;
}

/* Callers on several threads take turns. */
static void test_threads_shared(void)
{
    pthread_t callers[3];
    rkv_config config = rkv_config_default(32);
    rkv_threads *threads = NULL;
    int i;
    expect_status("create", rkv_threads_create(&threads, 3), RKV_OK);
    rkv_threads_use(threads, &config);
    for (i = 0; i < 3; i++)
        expect_int("caller", i, pthread_create(&callers[i], NULL, call_many_times, &config), 0);
    for (i = 0; i < 3; i++) {
        void *wrong = NULL;
        pthread_join(callers[i], &wrong);
        expect_int("indices not done once", i, *(int *)wrong, 0);
        free(wrong);
    }
    rkv_threads_destroy(threads);
}

/* A cache decodes the same rows with any number of threads. */
static void test_threads_decode(const setup *s, int n_threads)
{
    rkv_cache *want = cache_of(s, NULL), *cache = NULL;
    rkv_cache_config config = setup_config(s, NULL);
    rkv_threads *threads = NULL;
    expect_status("create", rkv_threads_create(&threads, n_threads), RKV_OK);
    rkv_threads_use(threads, &config.compress);
    expect_status("create", rkv_cache_create(&cache, &config), RKV_OK);
    decode(s, want, 1, 120);
    decode(s, cache, 1, 120);
    expect_equal_caches("with threads", cache, want);
    rkv_cache_destroy(cache);
    rkv_cache_destroy(want);
    rkv_threads_destroy(threads);
}

/* A child of fork() has no workers, and destroy does not wait for them there. */
static void test_threads_forked(void)
{
#ifdef _WIN32
    skip("no fork() on this system");
#else
    rkv_threads *threads = NULL;
    pid_t child;
    int status = -1;
    expect_status("create", rkv_threads_create(&threads, 3), RKV_OK);
    fflush(stdout);
    child = fork();
    if (child == 0) {
        alarm(20); /* a child that hangs dies of it */
        rkv_threads_destroy(threads);
        _exit(0);
    }
    expect_true("fork", child > 0);
    expect_true("waitpid", waitpid(child, &status, 0) == child);
    expect_int("status of the child", 0, status, 0);
    rkv_threads_destroy(threads);
#endif
}

static void test_threads_arguments(void)
{
    rkv_threads *threads = (rkv_threads *)(void *)&threads;
    rkv_config config = rkv_config_default(32);
    expect_status("no threads: one", rkv_threads_create(&threads, 0), RKV_OK);
    rkv_threads_use(threads, &config);
    expect_int("threads", 0, config.n_threads, 1);
    run_tally(&config, 10);
    rkv_threads_destroy(threads);
    expect_status("no out", rkv_threads_create(NULL, 2), RKV_ERROR_NULL);
    rkv_threads_destroy(NULL);
    rkv_threads_use(NULL, NULL);
}

/* ---- all ---- */

/* The cache's own logic is the same over every table: one schedule shows that they fit. Emulators
 * and valgrind, where all setups take minutes, do every third or sixth. */
static int setup_step(void)
{
    const uint64_t cases = wanted_cases(1000);
    return cases < 50 ? 6 : cases < 100 ? 3 : 1;
}

static void run_on_backend(const rkv_backend *backend)
{
    int i;
    for (i = 0; i < N_SETUPS; i += setup_step()) {
        case_begin("%s, %s: prompt in chunks of 7", backend->name, setups[i].name);
        test_decode(&setups[i], backend, 150, 7);
    }
}

static void run_on_setup(const setup *s)
{
    int length;
    case_begin("%s: decode", s->name);
    test_decode(s, NULL, 0, 1);
    case_begin("%s: prompt in one", s->name);
    test_decode(s, NULL, 280, 1000);
    case_begin("%s: forced round", s->name);
    test_forced_round(s);
    case_begin("%s: drafts taken back", s->name);
    test_drafts(s);
    case_begin("%s: how far truncate reaches", s->name);
    test_truncate_reach(s);
    case_begin("%s: protected tokens taken back", s->name);
    test_protected_drafts(s);
    case_begin("%s: histories with truncations", s->name);
    test_truncated_histories(s, 1);
    test_truncated_histories(s, 2);
    case_begin("%s: fork", s->name);
    test_fork(s);
    case_begin("%s: fork between two layers", s->name);
    test_fork_between_layers(s);
    case_begin("%s: emptied", s->name);
    test_empty(s);
    for (length = 0; length < 100; length += 33) {
        case_begin("%s: save after %d tokens", s->name, length);
        test_save(s, length);
    }
    case_begin("%s: failing allocations", s->name);
    test_failing_allocations(s);
    case_begin("%s: failing copies", s->name);
    test_failing_copies(s);
    case_begin("%s: two and five threads", s->name);
    test_threads_decode(s, 2);
    test_threads_decode(s, 5);
}

static void run_damage(void)
{
    const setup with_state = small_of(traces_few_votes),
                with_means = small_of(rkv_config_triattention);
    case_begin("damaged images");
    test_damaged_images(&small);
    test_damaged_images(&with_state);
    test_damaged_images(&with_means);
    case_begin("forged images");
    test_forged_images();
    case_begin("forged images: state");
    test_forged_state();
    test_forged_settled_rows();
    test_forged_sizes();
    case_begin("forged images: means");
    test_forged_means();
    test_huge_means();
    case_begin("foreign images");
    test_foreign_images();
    case_begin("images of other policies");
    test_foreign_policies();
}

int main(void)
{
    const rkv_backend *backends[MAX_BACKENDS];
    const int n_backends = usable_backends(backends);
    const int step = setup_step();
    int i, j;
    for (i = 0; i < n_backends; i++) run_on_backend(backends[i]);
    for (i = 0; i < N_SETUPS; i += step) run_on_setup(&setups[i]);
    for (i = 0; i < N_KEY_LAYOUTS; i++)
        for (j = 0; j < N_LAYOUTS; j++) {
            case_begin("append: %s keys, %s values", layout_name((layout)i),
                       layout_name((layout)j));
            test_append_layouts(&setups[2], (layout)i, (layout)j);
            test_append_layouts(&setups[15], (layout)i, (layout)j);
        }
    case_begin("layers of unequal length");
    test_unequal_layers(&setups[0]);
    case_begin("a partial window");
    test_partial_window(&setups[12]);
    case_begin("votes that are missing");
    test_missing_votes();
    case_begin("votes of tokens that were evicted");
    test_votes_of_evicted_tokens();
    case_begin("a copy into the ring that fails");
    test_failing_ring(&setups[0]);
    case_begin("an infinite key");
    test_nonfinite_key(&setups[0], 0);
    test_nonfinite_key(&setups[0], 1);
    test_nonfinite_key(&setups[13], 0);
    test_nonfinite_key(&setups[15], 0);
    test_nonfinite_key(setup_named("traces, f32, per head, votes beyond the buffer"), 0);
    test_nonfinite_key(setup_named("prose, q8_0, per head"), 1);
    test_nonfinite_key(setup_named("triattention, f32, per head"), 0);
    case_begin("a query that is not finite");
    test_nonfinite_query(&setups[0], 41, 5);
    test_nonfinite_query(setup_named("wide, f32, per head"), 30, 4);
    test_nonfinite_query(setup_named("traces, f32, per head, votes beyond the buffer"), 46, 3);
    test_nonfinite_query(setup_named("prose, bf16, per sequence"), 26, 4);
    test_nonfinite_query(setup_named("h2o, e4m3, per sequence, few votes"), 30, 2);
    case_begin("a query that append refuses");
    test_refused_query(setup_named("triattention, f32, per head"), 50);
    test_refused_query(setup_named("triattention, bf16, per layer"), 7);
    case_begin("means of queries begin");
    test_means_begin(setup_named("triattention, f32, per head"));
    test_means_begin(setup_named("triattention, e5m2, per sequence"));
    for (i = 0; i < N_SETUPS; i += 2 * step) {
        case_begin("%s: on a device", setups[i].name);
        test_device_decode(&setups[i]);
    }
    case_begin("a fault that the device finds");
    test_device_fault(&setups[0]);
    test_device_fault(setup_named("traces, f32, per head, votes beyond the buffer"));
    test_device_fault(setup_named("h2o, f32, per head, votes beyond the capacity"));
    case_begin("a device record of the caller's");
    test_device_error_of_caller(&setups[0]);
    case_begin("a device that refuses");
    test_device_refusals(&setups[0]);
    test_device_refusals(setup_named("traces, f32, per head, votes beyond the buffer"));
    case_begin("a device that refuses to take means");
    test_device_refuses_means(setup_named("triattention, f32, per head"));
    case_begin("appends with negative blocks");
    test_negative_blocks(&setups[0]);
    test_negative_blocks(&setups[3]);
    case_begin("appends with huge strides");
    test_huge_strides(&setups[2]);
    case_begin("a snapshot without room for its queries");
    test_load_without_room();
    for (i = 0; i < N_SETUPS; i += step)
        for (j = 0; j < 3; j++) {
            case_begin("%s: never stuck, search %d", setups[i].name, j);
            test_never_stuck(&setups[i], j * 13, (uint64_t)(100 * i + j));
        }
    case_begin("stats");
    test_stats();
    test_stats_of_policies();
    case_begin("image format");
    test_image_format();
    case_begin("an image of q8_0");
    test_q8_0_image();
    run_damage();
    case_begin("arguments of create");
    test_create_arguments();
    case_begin("arguments of append");
    test_append_arguments();
    case_begin("no queries: streaming");
    test_no_queries(&setups[5]);
    case_begin("no queries: redundancy alone");
    test_no_queries(&setups[7]);
    case_begin("no queries: pinned and protected tokens alone");
    test_no_queries(&setups[8]);
    test_no_queries(setup_named("traces that protect all"));
    case_begin("no queries: random");
    test_no_queries(setup_named("random, f16, per head"));
    test_no_queries(setup_named("random, f32, per sequence"));
    case_begin("no queries: own scores");
    test_no_queries(setup_named("own scores, f16, per layer"));
    case_begin("views out of range");
    test_views_out_of_range();
    for (i = 1; i <= 8; i++) {
        case_begin("a pool of %d threads", i);
        test_threads(i);
    }
    case_begin("a pool with three callers");
    test_threads_shared();
    case_begin("a pool after fork()");
    test_threads_forked();
    case_begin("arguments of the pool");
    test_threads_arguments();
    return close_tests();
}
