/* Policies that remember: what rkv_config_memory_traces needs beside R-KV, in an engine with a
 * cache of its own. A needle is looked up now and then, but never by the last queries before a
 * round: SnapKV forgets it, memory does not.
 * cc -O2 -I. examples/memory.c -o memory -lm && ./memory */
#define RKV_IMPLEMENTATION
#include "rkv.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { kv_heads = 2, group = 2, query_heads = kv_heads * group, head_dim = 64 };
enum { budget = 96, buffer = 32, capacity = budget + buffer, most_votes = 32 };
enum { needle = 40 }; /* the token that some queries look for */

typedef struct engine {
    float keys[kv_heads][capacity][head_dim];
    float queries[query_heads][most_votes][head_dim]; /* a ring: token t in slot t % votes */
    int32_t positions[kv_heads][capacity];            /* true positions: un-rotation needs them */
    float state[kv_heads][2][capacity];               /* rkv_state_floats(&config) = 2 at most */
    int rows, position, n_new;                        /* n_new: rows since the last round */
    rkv_error error;
    rkv_config config;
    rkv_layer layer;
    void *workspace;
    size_t bytes;
} engine;

static rkv_status start(engine *e, rkv_config config)
{
    const int votes = config.votes > 0 ? config.votes : config.window;
    memset(e, 0, sizeof *e);
    e->config = config;
    e->config.error = &e->error;
    e->layer.keys = rkv_tensor_make(e->keys, RKV_F32, kv_heads, capacity, head_dim);
    e->layer.queries = rkv_tensor_make(e->queries, RKV_F32, query_heads, votes, head_dim);
    e->layer.queries.head_stride = most_votes * head_dim;
    e->layer.positions = e->positions[0];
    e->layer.state = e->state[0][0];         /* moves with the rows; needs no first value */
    e->layer.rope.pairing = RKV_ROPE_HALVES; /* how this engine rotates, base 10000 */
    e->layer.n_tokens = capacity;
    rkv_status status = rkv_workspace_size(NULL, &e->config, &e->layer, 1, &e->bytes);
    if (status == RKV_OK) e->workspace = malloc(e->bytes);
    return status;
}

static float noise(void)
{
    return (float)rand() / (float)RAND_MAX - 0.5f;
}

/* Rotary embedding of a row at a position. */
static void rotate(float *row, int position)
{
    for (int f = 0; f < head_dim / 2; f++) {
        const double angle = position * pow(10000.0, -2.0 * f / head_dim);
        const float c = (float)cos(angle), s = (float)sin(angle);
        const float a = row[f], b = row[f + head_dim / 2];
        row[f] = a * c - b * s;
        row[f + head_dim / 2] = a * s + b * c;
    }
}

/* One token. Keys are noise; the needle's points where the slow pairs of a row are, which rotary
 * embedding hardly turns. Queries look there in the first half of every 32 tokens, and away from
 * there in the second. */
static void store(engine *e)
{
    const int votes = e->layer.queries.tokens, looks = e->position % buffer < buffer / 2;
    for (int h = 0; h < kv_heads; h++) {
        float *key = e->keys[h][e->rows];
        for (int i = 0; i < head_dim; i++)
            key[i] = 2 * noise() + (e->position == needle && i % 32 >= 24 ? 4.0f : 0.0f);
        rotate(key, e->position);
        e->positions[h][e->rows] = e->position;
    }
    for (int h = 0; h < query_heads; h++) {
        float *query = e->queries[h][e->position % votes];
        for (int i = 0; i < head_dim; i++)
            query[i] = noise() + (i % 32 < 24 ? 0.0f : looks ? 2.0f : -1.0f);
        rotate(query, e->position);
    }
}

static rkv_status token_done(engine *e)
{
    rkv_layer *layer = &e->layer;
    e->position++;
    e->n_new++;
    if (++e->rows < capacity) return RKV_OK;
    layer->n_tokens = e->rows;
    layer->n_new = e->n_new;
    layer->first_query = e->position % layer->queries.tokens; /* slot of the oldest query */
    rkv_status status = rkv_compress(NULL, &e->config, layer, 1, e->workspace, e->bytes);
    if (status != RKV_OK) return status;
    e->rows = layer->n_tokens;
    e->n_new = 0;
    return RKV_OK;
}

/* How many of the heads still hold the needle after n tokens. */
static int decode(engine *e, rkv_config config, int n)
{
    char text[256];
    int holding = 0;
    rkv_status status = start(e, config);
    for (int t = 0; t < n && status == RKV_OK; t++) {
        store(e);
        status = token_done(e);
    }
    if (status != RKV_OK) {
        printf("%s\n", rkv_explain(&e->error, text, sizeof text));
        exit(1);
    }
    free(e->workspace);
    for (int h = 0; h < kv_heads; h++)
        for (int row = 0; row < e->rows; row++) holding += e->positions[h][row] == needle;
    return holding;
}

int main(void)
{
    static engine e;
    const int n = capacity + 40 * buffer;
    const int snapkv = decode(&e, rkv_config_snapkv(budget), n);
    const int memory = decode(&e, rkv_config_memory_traces(budget), n);
    printf(
        "after %d tokens in %d rows, token %d is held by %d of %d heads under SnapKV, by %d under "
        "memory_traces\n",
        n, budget, needle, snapkv, kv_heads, memory);
    return memory == kv_heads && snapkv < kv_heads ? 0 : 1;
}
