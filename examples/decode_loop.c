/* A decode loop with the engine's own cache, bf16, [layer][KV head][row][head dim]: where the three
 * calls go, what attention reads, and what to do about a NaN in the cache.
 * cc -O2 -I. examples/decode_loop.c -o decode_loop -lm && ./decode_loop */
#define RKV_IMPLEMENTATION
#include "rkv.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { n_layers = 4, kv_heads = 2, group = 4, query_heads = kv_heads * group, head_dim = 64 };
enum { budget = 256, buffer = 64, capacity = budget + buffer, window = 8 };
enum { needle = 100 }; /* the token that all queries look for */

static struct engine {
    uint16_t keys[n_layers][kv_heads][capacity][head_dim];
    uint16_t values[n_layers][kv_heads][capacity][head_dim];
    uint16_t queries[n_layers][query_heads][window][head_dim]; /* token t in slot t % window */
    int32_t positions[n_layers][kv_heads][capacity];           /* optional: token of each row */
    int rows;     /* in use: where the next key and value are stored */
    int position; /* tokens so far: what the next rotary embedding gets */
    rkv_error error;
    rkv_config config;
    rkv_layer layers[n_layers];
    void *workspace;
    size_t bytes;
} engine;

/* 1. At the start: describe each layer's cache, and ask what a round needs. */
static rkv_status start(struct engine *e)
{
    e->config = rkv_config_default(budget);
    e->config.error = &e->error;
    for (int l = 0; l < n_layers; l++) {
        rkv_layer *layer = &e->layers[l];
        layer->keys = rkv_tensor_make(e->keys[l], RKV_BF16, kv_heads, capacity, head_dim);
        layer->values = rkv_tensor_make(e->values[l], RKV_BF16, kv_heads, capacity, head_dim);
        layer->queries = rkv_tensor_make(e->queries[l], RKV_BF16, query_heads, window, head_dim);
        layer->positions = e->positions[l][0];
        layer->n_tokens = capacity; /* of the largest round */
    }
    rkv_status status = rkv_workspace_size(NULL, &e->config, e->layers, n_layers, &e->bytes);
    if (status == RKV_OK) e->workspace = malloc(e->bytes);
    return status; /* rkv_compress refuses a workspace that is NULL */
}

static void require(const struct engine *e, rkv_status status)
{
    char text[256];
    if (status == RKV_OK) return;
    printf("%s\n", rkv_explain(&e->error, text, sizeof text));
    exit(1);
}

static uint16_t to_bf16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)(bits >> 16);
}

static float from_bf16(uint16_t x)
{
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static float noise(void)
{
    return (float)rand() / (float)RAND_MAX - 0.5f;
}

/* 2. In each layer: store the key, the value and the query. A model computes them; here all queries
 * look where the needle's key points. */
static void store(struct engine *e, int l)
{
    for (int i = 0; i < head_dim; i++) {
        for (int h = 0; h < kv_heads; h++) {
            e->keys[l][h][e->rows][i] = to_bf16(e->position == needle ? 2.0f : 2.0f * noise());
            e->values[l][h][e->rows][i] = to_bf16(noise());
        }
        for (int h = 0; h < query_heads; h++)
            e->queries[l][h][e->position % window][i] = to_bf16(1.0f + noise());
    }
    for (int h = 0; h < kv_heads; h++) e->positions[l][h][e->rows] = e->position;
}

/* Attention reads rows 0 to e->rows. What has been evicted is not among them: no mask is needed.
 * This one returns the share that the needle gets. */
static double attend(const struct engine *e, int l, int query_head)
{
    const uint16_t *query = e->queries[l][query_head][e->position % window];
    double sum = 0.0, share = 0.0;
    for (int row = 0, h = query_head / group; row <= e->rows; row++) {
        double logit = 0.0;
        for (int i = 0; i < head_dim; i++)
            logit += from_bf16(query[i]) * from_bf16(e->keys[l][h][row][i]);
        double weight = exp(logit / sqrt(head_dim));
        sum += weight;
        if (e->positions[l][h][row] == needle) share += weight;
    }
    return share / sum;
}

/* 3. After the last layer of a token: compress when the rows are used up. */
static rkv_status token_done(struct engine *e)
{
    char text[256];
    e->position++;
    if (++e->rows < capacity) return RKV_OK;
    for (int l = 0; l < n_layers; l++) e->layers[l].n_tokens = e->rows;
    rkv_status status = rkv_compress(NULL, &e->config, e->layers, n_layers, e->workspace, e->bytes);
    if (status == RKV_ERROR_NONFINITE) { /* nothing has changed; evict without reading keys */
        printf("%s\n", rkv_explain(&e->error, text, sizeof text));
        rkv_config newest = rkv_config_streaming(budget);
        newest.error = &e->error;
        status = rkv_compress(NULL, &newest, e->layers, n_layers, e->workspace, e->bytes);
    }
    e->rows = e->layers[0].n_tokens; /* the budget; after an error as before */
    return status;
}

/* Returns the least share of attention that the needle got. */
static double decode(struct engine *e, int n_tokens)
{
    double least = 1.0;
    for (; n_tokens > 0; n_tokens--) {
        for (int l = 0; l < n_layers; l++) {
            store(e, l);
            if (e->position >= needle) least = fmin(least, attend(e, l, l % query_heads));
        }
        require(e, token_done(e));
    }
    return least;
}

int main(void)
{
    struct engine *e = &engine;
    require(e, start(e));
    double least = decode(e, capacity + 3 * buffer); /* four rounds */
    printf("%d tokens, %d rows in use; attention to token %d: %.3f\n", e->position, e->rows, needle,
           least);
    int ok = least > 0.9 && e->rows == budget;

    e->keys[2][1][20][0] = 0x7fc0; /* a NaN in row 20, as a faulty kernel might leave it */
    decode(e, 2 * buffer);
    ok = ok && e->rows == budget && e->error.rule == NULL; /* the second round reads all keys */
    printf("%d tokens, %d rows in use, the NaN is gone\n", e->position, e->rows);
    free(e->workspace);
    return ok ? 0 : 1;
}
