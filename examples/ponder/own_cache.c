/* own_cache.c - see own_cache.h. Build: part of `make demo` and `make eval`. */
#include "own_cache.h"
#include "model.h"
#include "seconds.h"

#include <stdlib.h>
#include <string.h>

/* Where the library finds everything: set once, n_tokens apart. */
static void describe_layer(own_cache *c, int l, rkv_layer *layer)
{
    const model_shape *s = &c->shape;
    const ptrdiff_t kv_dim = shape_kv_dim(s), q_dim = shape_q_dim(s);
    const ptrdiff_t rows = (ptrdiff_t)l * c->capacity, sets = (ptrdiff_t)l * s->n_kv_heads;
    rkv_tensor kv =
        rkv_tensor_make(c->keys + rows * kv_dim, RKV_F32, s->n_kv_heads, c->capacity, s->head_dim);
    kv.token_stride = kv_dim;
    kv.head_stride = s->head_dim;
    layer->keys = layer->values = kv;
    layer->values.data = c->values + rows * kv_dim;
    layer->queries = rkv_tensor_make(c->queries + (ptrdiff_t)l * c->window * q_dim, RKV_F32,
                                     s->n_heads, c->window, s->head_dim);
    layer->queries.token_stride = q_dim;
    layer->queries.head_stride = s->head_dim;
    layer->scores = c->scores + sets * c->capacity;
    if (c->policy.config.scope == RKV_PER_SEQUENCE && l > 0) return; /* all follow the first */
    layer->positions = c->positions + sets * c->capacity;
    layer->kept = c->kept + sets * c->policy.config.budget;
}

static int allocate(own_cache *c)
{
    const model_shape *s = &c->shape;
    const size_t layers = (size_t)s->n_layers, rows = layers * (size_t)c->capacity;
    const size_t sets = layers * (size_t)s->n_kv_heads;
    c->keys = calloc(rows * (size_t)shape_kv_dim(s), sizeof(float));
    c->values = calloc(rows * (size_t)shape_kv_dim(s), sizeof(float));
    c->queries = calloc(layers * (size_t)c->window * (size_t)shape_q_dim(s), sizeof(float));
    c->positions = calloc(sets * (size_t)c->capacity, sizeof(int32_t));
    c->sums = calloc(sets * (size_t)c->capacity, sizeof(float));
    c->scores = calloc(sets * (size_t)c->capacity, sizeof(float));
    c->kept = calloc(sets * (size_t)c->policy.config.budget, sizeof(int32_t));
    c->weights = calloc((size_t)c->capacity, sizeof(float));
    c->layers = calloc(layers, sizeof *c->layers);
    return c->keys && c->values && c->queries && c->positions && c->sums && c->scores && c->kept &&
           c->weights && c->layers;
}

own_cache *own_cache_create(const model_shape *s, const policy *p, int max_tokens, const char **why)
{
    own_cache *c = calloc(1, sizeof *c);
    int ok = c != NULL;
    *why = "out of memory";
    if (!ok) return NULL;
    const int full = p->kind == POLICY_FULL, bounded = p->config.budget + p->buffer;
    c->shape = *s;
    c->policy = *p;
    c->policy.config.error = &c->error;
    c->backend = rkv_backend_find(NULL);
    c->capacity = full || max_tokens > bounded ? max_tokens : bounded;
    c->window = p->config.window > 0 ? p->config.window : 8;
    ok = allocate(c);
    for (int l = 0; ok && l < s->n_layers; l++) {
        describe_layer(c, l, &c->layers[l]);
        c->layers[l].n_tokens = c->capacity;
    }
    if (ok && !full) {
        ok = rkv_workspace_size(c->backend, &c->policy.config, c->layers, s->n_layers,
                                &c->workspace_bytes) == RKV_OK;
        if (!ok) *why = c->error.rule; /* static text */
        ok = ok && (c->workspace = malloc(c->workspace_bytes)) != NULL;
    }
    if (ok) {
        own_cache_reset(c, 0);
        return c;
    }
    own_cache_destroy(c);
    return NULL;
}

void own_cache_destroy(own_cache *c)
{
    if (!c) return;
    void *all[] = { c->keys,   c->values, c->queries, c->positions, c->sums,
                    c->scores, c->kept,   c->weights, c->layers,    c->workspace };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    free(c);
}

void own_cache_reset(own_cache *c, uint64_t seed)
{
    c->n_rows = c->position = c->n_rounds = c->peak_rows = 0;
    c->seconds = 0.0;
    c->random.state = seed;
}

void own_cache_attend(own_cache *c, int layer, int ahead, const float *q, const float *k,
                      const float *v, float *out)
{
    const model_shape *s = &c->shape;
    const size_t kv_dim = (size_t)shape_kv_dim(s), q_dim = (size_t)shape_q_dim(s);
    const size_t first = (size_t)layer * (size_t)c->capacity, row = (size_t)(c->n_rows + ahead);
    const size_t ring = (size_t)((c->position + ahead) % c->window);
    const size_t sets = (size_t)(layer * s->n_kv_heads) * (size_t)c->capacity;
    memcpy(c->keys + (first + row) * kv_dim, k, kv_dim * sizeof(float));
    memcpy(c->values + (first + row) * kv_dim, v, kv_dim * sizeof(float));
    memcpy(c->queries + ((size_t)layer * (size_t)c->window + ring) * q_dim, q,
           q_dim * sizeof(float));
    for (int head = 0; head < s->n_kv_heads; head++) {
        const size_t at = sets + (size_t)head * (size_t)c->capacity + row;
        c->positions[at] = c->position + ahead;
        c->sums[at] = 0.0f;
    }
    const kv_rows rows = { c->keys + first * kv_dim, c->values + first * kv_dim, s->head_dim,
                           (ptrdiff_t)kv_dim, (int)row + 1 };
    model_attend_rows(s, q, &rows, c->weights,
                      c->policy.kind == POLICY_SUMS ? c->sums + sets : NULL, c->capacity, out);
}

/* Scores of our own, for rkv_select: [kv heads][candidates] of every layer. */
static void fill_scores(own_cache *c)
{
    const int n = c->n_rows - c->window;
    for (int set = 0; set < c->shape.n_layers * c->shape.n_kv_heads; set++) {
        const int l = set / c->shape.n_kv_heads, head = set % c->shape.n_kv_heads;
        const float *sums = c->sums + (ptrdiff_t)set * c->capacity;
        float *scores = c->layers[l].scores + (ptrdiff_t)head * n;
        for (int i = 0; i < n; i++)
            scores[i] = c->policy.kind == POLICY_SUMS ? sums[i] : prng_uniform(&c->random);
    }
}

static void compact_sums(own_cache *c)
{
    for (int set = 0; set < c->shape.n_layers * c->shape.n_kv_heads; set++) {
        float *sums = c->sums + (ptrdiff_t)set * c->capacity;
        const int32_t *kept = c->kept + (ptrdiff_t)set * c->policy.config.budget;
        rkv_apply_kept(sums, sizeof *sums, kept, c->layers[0].n_kept);
    }
}

static rkv_status compress(own_cache *c)
{
    const rkv_config *config = &c->policy.config;
    const int n = c->shape.n_layers;
    for (int l = 0; l < n; l++) c->layers[l].n_tokens = c->n_rows;
    if (c->policy.kind == POLICY_CONFIG)
        return rkv_compress(c->backend, config, c->layers, n, c->workspace, c->workspace_bytes);
    fill_scores(c);
    rkv_status status =
        rkv_select(c->backend, config, c->layers, n, c->workspace, c->workspace_bytes);
    if (status == RKV_OK)
        status = rkv_compact(c->backend, config, c->layers, n, c->workspace, c->workspace_bytes);
    if (status == RKV_OK) compact_sums(c);
    return status;
}

rkv_status own_cache_advance(own_cache *c, int n)
{
    c->n_rows += n;
    c->position += n;
    if (c->n_rows > c->peak_rows) c->peak_rows = c->n_rows;
    if (c->policy.kind == POLICY_FULL || c->n_rows < c->policy.config.budget + c->policy.buffer)
        return RKV_OK;
    const double start = seconds();
    const rkv_status status = compress(c);
    c->seconds += seconds() - start;
    c->n_rounds++;
    if (status == RKV_OK) c->n_rows = c->layers[0].n_tokens;
    return status;
}

size_t own_cache_bytes(const own_cache *c, int n_rows)
{
    return 2 * sizeof(float) * (size_t)c->shape.n_layers * (size_t)n_rows *
           (size_t)shape_kv_dim(&c->shape);
}
