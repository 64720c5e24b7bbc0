/* own_cache.c - see own_cache.h. Build: part of `make demo` and `make eval`. */
#include "own_cache.h"
#include "model.h"
#include "seconds.h"

#include <stdlib.h>
#include <string.h>

static rkv_rope rope_of(const model_shape *s)
{
    rkv_rope rope = RKV_INIT;
    rope.pairing = s->pairing == ROPE_HALVES ? RKV_ROPE_HALVES : RKV_ROPE_ADJACENT;
    rope.base = s->rope_base;
    return rope;
}

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
    layer->queries = rkv_tensor_make(c->queries + (ptrdiff_t)l * c->votes * q_dim, RKV_F32,
                                     s->n_heads, c->votes, s->head_dim);
    layer->queries.token_stride = q_dim;
    layer->queries.head_stride = s->head_dim;
    layer->state = c->state + sets * c->capacity * rkv_state_floats(&c->policy.config);
    layer->query_means = c->means + (size_t)l * c->n_means;
    layer->rope = rope_of(s);
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
    c->queries = calloc(layers * (size_t)c->votes * (size_t)shape_q_dim(s), sizeof(float));
    c->positions = calloc(sets * (size_t)c->capacity, sizeof(int32_t));
    c->state = calloc(sets * (size_t)c->capacity * 2, sizeof(float)); /* 2: the most that any has */
    c->means = calloc(layers * c->n_means + 1, sizeof(float));
    c->kept = calloc(sets * (size_t)c->policy.config.budget, sizeof(int32_t));
    c->weights = calloc((size_t)c->capacity, sizeof(float));
    c->layers = calloc(layers, sizeof *c->layers);
    return c->keys && c->values && c->queries && c->positions && c->state && c->means && c->kept &&
           c->weights && c->layers;
}

own_cache *own_cache_create(const model_shape *s, const policy *p, int max_tokens, const char **why)
{
    own_cache *c = calloc(1, sizeof *c);
    int ok = c != NULL;
    *why = "out of memory";
    if (!ok) return NULL;
    const int full = p->keeps_all, bounded = p->config.budget + p->buffer;
    c->shape = *s;
    c->policy = *p;
    c->policy.config.error = &c->error;
    c->backend = rkv_backend_find(NULL);
    c->capacity = full || max_tokens > bounded ? max_tokens : bounded;
    c->votes = p->config.votes > 0 ? p->config.votes : p->config.window;
    if (p->config.policy == RKV_POLICY_TRIATTENTION)
        c->n_means = rkv_query_means_floats(s->n_heads, s->head_dim);
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
    void *all[] = { c->keys,  c->values, c->queries, c->positions, c->state,
                    c->means, c->kept,   c->weights, c->layers,    c->workspace };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    free(c);
}

void own_cache_reset(own_cache *c, uint64_t seed)
{
    c->n_rows = c->position = c->n_new = c->n_rounds = c->peak_rows = 0;
    c->seconds = 0.0;
    c->status = RKV_OK;
    c->policy.config.seed = (uint32_t)(seed ^ seed >> 32);
    memset(c->means, 0, (size_t)c->shape.n_layers * c->n_means * sizeof *c->means);
}

/* TriAttention learns what the queries of this sequence are like. */
static void observe(own_cache *c, int layer, int ahead, const float *q)
{
    const model_shape *s = &c->shape;
    const rkv_tensor query =
        rkv_tensor_make((void *)(uintptr_t)q, RKV_F32, s->n_heads, 1, s->head_dim);
    const rkv_rope rope = rope_of(s);
    rkv_status status =
        rkv_query_means_update(c->backend, &c->policy.config, &rope, &query, 0, 1,
                               c->position + ahead, c->means + (size_t)layer * c->n_means);
    if (c->status == RKV_OK) c->status = status;
}

void own_cache_attend(own_cache *c, int layer, int ahead, const float *q, const float *k,
                      const float *v, float *out)
{
    const model_shape *s = &c->shape;
    const size_t kv_dim = (size_t)shape_kv_dim(s), q_dim = (size_t)shape_q_dim(s);
    const size_t first = (size_t)layer * (size_t)c->capacity, row = (size_t)(c->n_rows + ahead);
    const size_t slot = (size_t)((c->position + ahead) % c->votes);
    const size_t sets = (size_t)(layer * s->n_kv_heads) * (size_t)c->capacity;
    memcpy(c->keys + (first + row) * kv_dim, k, kv_dim * sizeof(float));
    memcpy(c->values + (first + row) * kv_dim, v, kv_dim * sizeof(float));
    memcpy(c->queries + ((size_t)layer * (size_t)c->votes + slot) * q_dim, q,
           q_dim * sizeof(float));
    for (int head = 0; head < s->n_kv_heads; head++)
        c->positions[sets + (size_t)head * (size_t)c->capacity + row] = c->position + ahead;
    if (c->n_means > 0) observe(c, layer, ahead, q);
    const kv_rows rows = { c->keys + first * kv_dim, c->values + first * kv_dim, s->head_dim,
                           (ptrdiff_t)kv_dim, (int)row + 1 };
    model_attend_rows(s, q, &rows, c->weights, out);
}

static rkv_status compress(own_cache *c)
{
    const int n = c->shape.n_layers;
    for (int l = 0; l < n; l++) {
        c->layers[l].n_tokens = c->n_rows;
        c->layers[l].n_new = c->n_new;
        c->layers[l].first_query = c->position % c->votes;
    }
    return rkv_compress(c->backend, &c->policy.config, c->layers, n, c->workspace,
                        c->workspace_bytes);
}

rkv_status own_cache_advance(own_cache *c, int n)
{
    c->n_rows += n;
    c->position += n;
    c->n_new += n;
    if (c->status != RKV_OK) return c->status;
    if (c->n_rows > c->peak_rows) c->peak_rows = c->n_rows;
    if (c->policy.keeps_all || c->n_rows < c->policy.config.budget + c->policy.buffer)
        return RKV_OK;
    const double start = seconds();
    const rkv_status status = compress(c);
    c->seconds += seconds() - start;
    c->n_rounds++;
    if (status != RKV_OK) return status;
    c->n_rows = c->layers[0].n_tokens;
    c->n_new = 0;
    return RKV_OK;
}

size_t own_cache_bytes(const own_cache *c, int n_rows)
{
    return 2 * sizeof(float) * (size_t)c->shape.n_layers * (size_t)n_rows *
           (size_t)shape_kv_dim(&c->shape);
}
