/* rkv_cache for an engine without a cache of its own: append, attend, step; rejected draft tokens
 * are taken back; a session is saved and loaded.
 * cc -O2 -I. examples/managed_cache.c -o managed_cache -lm && ./managed_cache */
#define RKV_IMPLEMENTATION
#include "rkv.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { n_layers = 2, kv_heads = 2, group = 2, query_heads = kv_heads * group, head_dim = 32 };
enum { budget = 96, buffer = 32 };
static float key[kv_heads * head_dim], value[kv_heads * head_dim]; /* of one token in one layer */
static float query[query_heads * head_dim], output[query_heads * head_dim];

/* What a model computes for a token: here numbers that depend on layer, word and position alone. */
static void project(int layer, int word, int position)
{
    uint32_t state = (uint32_t)(layer * 1000003 + word * 10007 + position * 101);
    for (int i = 0; i < query_heads * head_dim; i++) {
        state = state * 1664525u + 1013904223u;
        query[i] = (float)(state >> 8) / 8388608.0f - 1.0f;
        if (i >= kv_heads * head_dim) continue;
        key[i] = (float)(state >> 6 & 0xffff) / 32768.0f - 1.0f;
        value[i] = (float)(state >> 4 & 0xffff) / 32768.0f - 1.0f;
    }
}

/* Over the rows that the cache holds: no mask, no positions. */
static void attend(const rkv_cache *cache, int layer)
{
    rkv_tensor keys = rkv_cache_keys(cache, layer), values = rkv_cache_values(cache, layer);
    memset(output, 0, sizeof output);
    for (int h = 0; h < query_heads; h++) {
        const float *k = (const float *)keys.data + h / group * keys.head_stride;
        const float *v = (const float *)values.data + h / group * values.head_stride;
        const float *q = query + h * head_dim;
        float *out = output + h * head_dim, sum = 0.0f;
        for (int row = 0; row < keys.tokens; row++, k += keys.token_stride) {
            float logit = 0.0f;
            for (int i = 0; i < head_dim; i++) logit += q[i] * k[i];
            float weight = expf(logit / sqrtf(head_dim));
            for (int i = 0; i < head_dim; i++) out[i] += weight * v[row * values.token_stride + i];
            sum += weight;
        }
        for (int i = 0; i < head_dim; i++) out[i] /= sum;
    }
}

/* One token through all layers. The caller steps, once the token is confirmed. */
static rkv_status forward(rkv_cache *cache, int word)
{
    rkv_tensor k = rkv_tensor_make(key, RKV_F32, kv_heads, 1, head_dim);
    rkv_tensor v = rkv_tensor_make(value, RKV_F32, kv_heads, 1, head_dim);
    rkv_tensor q = rkv_tensor_make(query, RKV_F32, query_heads, 1, head_dim);
    for (int layer = 0; layer < n_layers; layer++) {
        project(layer, word, rkv_cache_position(cache, layer)); /* rotary embedding gets it too */
        rkv_status status = rkv_cache_append(cache, layer, 1, &k, &v, &q);
        if (status != RKV_OK) return status;
        attend(cache, layer);
    }
    return RKV_OK;
}

static void require(const rkv_cache *cache, rkv_status status)
{
    char text[256];
    if (status == RKV_OK) return;
    printf("%s\n", rkv_explain(rkv_cache_error(cache), text, sizeof text));
    exit(1);
}

/* Returns the sum of all outputs: equal caches give equal sums. */
static double decode(rkv_cache *cache, int n_tokens)
{
    double sum = 0.0;
    for (int word = 0; word < n_tokens; word++) {
        require(cache, forward(cache, word));
        require(cache, rkv_cache_step(cache, NULL)); /* a round, when one is due */
        for (int i = 0; i < query_heads * head_dim; i++) sum += output[i];
    }
    return sum;
}

int main(void)
{
    rkv_cache *cache, *other, *loaded;
    rkv_cache_config config = RKV_INIT;
    config.compress = rkv_config_default(budget);
    config.n_layers = n_layers;
    config.kv_heads = kv_heads;
    config.query_heads = query_heads;
    config.head_dim = head_dim;
    config.buffer = buffer;
    if (rkv_cache_create(&cache, &config) != RKV_OK) return 1;
    decode(cache, 150);
    if (rkv_cache_fork(cache, &other) != RKV_OK) return 1;

    /* Three draft tokens, of which the model confirms the first: the other two are taken back, and
     * what the model wants instead takes their place. */
    int first = rkv_cache_position(cache, 0);
    for (int word = 7; word < 10; word++) require(cache, forward(cache, word));
    require(cache, rkv_cache_truncate(cache, first + 1));
    require(cache, forward(cache, 4));

    require(other, forward(other, 7)); /* the same without a draft */
    require(other, forward(other, 4));
    int drafts = decode(cache, 100) == decode(other, 100);

    /* A session, for a file or another process. */
    size_t bytes = rkv_cache_save_size(cache);
    void *snapshot = malloc(bytes);
    require(cache, rkv_cache_save(cache, snapshot, bytes));
    if (rkv_cache_create(&loaded, &config) != RKV_OK) return 1;
    require(loaded, rkv_cache_load(loaded, snapshot, bytes));
    int loads = decode(cache, 100) == decode(loaded, 100);

    printf("%d tokens, %d rows; rejected drafts leave %s, a loaded cache goes on %s\n",
           rkv_cache_position(cache, 0), rkv_cache_rows(cache, 0), drafts ? "no trace" : "a trace",
           loads ? "as the saved one" : "differently");
    free(snapshot);
    rkv_cache_destroy(loaded);
    rkv_cache_destroy(other);
    rkv_cache_destroy(cache);
    return drafts && loads ? 0 : 1;
}
