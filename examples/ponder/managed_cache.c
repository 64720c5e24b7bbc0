/* managed_cache.c - see managed_cache.h. Build: part of `make demo`. */
#include "managed_cache.h"

#include <stdlib.h>
#include <string.h>

rkv_status managed_cache_create(managed_cache *c, const model_shape *s, const policy *p,
                                int longest_prompt)
{
    const rkv_error no_memory = { NULL, RKV_ERROR_MEMORY, -1, -1, -1 };
    rkv_cache_config config = RKV_INIT;
    memset(c, 0, sizeof *c);
    config.compress = p->config;
    config.compress.error = &c->error;
    config.n_layers = s->n_layers;
    config.kv_heads = s->n_kv_heads;
    config.query_heads = s->n_heads;
    config.head_dim = s->head_dim;
    config.dtype = RKV_F32;
    config.buffer = p->buffer;
    config.rope.pairing = s->pairing == ROPE_HALVES ? RKV_ROPE_HALVES : RKV_ROPE_ADJACENT;
    config.rope.base = s->rope_base;
    config.capacity = p->config.budget + p->buffer;
    if (longest_prompt > config.capacity) config.capacity = longest_prompt;
    c->shape = *s;
    c->weights = calloc((size_t)config.capacity, sizeof *c->weights);
    c->error = no_memory;
    return c->weights ? rkv_cache_create(&c->rows, &config) : RKV_ERROR_MEMORY;
}

void managed_cache_destroy(managed_cache *c)
{
    rkv_cache_destroy(c->rows);
    free(c->weights);
}

/* One new token as a tensor [heads][1][head_dim]. Append only reads it. */
static rkv_tensor one_token(const model_shape *s, const float *data, int heads)
{
    return rkv_tensor_make((void *)(uintptr_t)data, RKV_F32, heads, 1, s->head_dim);
}

void managed_cache_attend(void *user, int layer, int n, const float *q, const float *k,
                          const float *v, float *out)
{
    managed_cache *c = user;
    const model_shape *s = &c->shape;
    for (int i = 0; i < n; i++) {
        const rkv_tensor key = one_token(s, k, s->n_kv_heads),
                         value = one_token(s, v, s->n_kv_heads);
        const rkv_tensor query = one_token(s, q, s->n_heads);
        if (c->status == RKV_OK)
            c->status = rkv_cache_append(c->rows, layer, 1, &key, &value, &query);
        if (c->status != RKV_OK) return; /* and c->error still explains it */
        const rkv_tensor keys = rkv_cache_keys(c->rows, layer);
        const rkv_tensor values = rkv_cache_values(c->rows, layer);
        const kv_rows rows = { keys.data, values.data, (ptrdiff_t)keys.head_stride,
                               (ptrdiff_t)keys.token_stride, keys.tokens };
        model_attend_rows(s, q, &rows, c->weights, out);
        q += shape_q_dim(s);
        k += shape_kv_dim(s);
        v += shape_kv_dim(s);
        out += shape_q_dim(s);
    }
}

rkv_status managed_cache_step(managed_cache *c, int *n_evicted)
{
    return c->status == RKV_OK ? rkv_cache_step(c->rows, n_evicted) : c->status;
}
