/* Tokens that must stay for a while: a tool call in progress is pinned row by row, and let go when
 * it is complete. The newest tokens, which may be the start of a stop string, are protected.
 * cc -O2 -I. examples/pins.c -o pins -lm && ./pins */
#define RKV_IMPLEMENTATION
#include "rkv.h"
#include <stdio.h>
#include <stdlib.h>

enum { kv_heads = 2, query_heads = 4, head_dim = 32, window = 8, budget = 64, capacity = 96 };
static float keys[kv_heads][capacity][head_dim], values[kv_heads][capacity][head_dim];
static float queries[query_heads][window][head_dim]; /* token t in slot t % window */
static int32_t positions[kv_heads][capacity];
static uint8_t pins[kv_heads][capacity]; /* move with the rows, as positions do */

static void store(int row, int position, int is_pinned)
{
    for (int i = 0; i < head_dim; i++) {
        for (int h = 0; h < kv_heads; h++) keys[h][row][i] = (float)(rand() % 2001 - 1000) / 1000;
        for (int h = 0; h < query_heads; h++)
            queries[h][position % window][i] = (float)(rand() % 2001 - 1000) / 1000;
    }
    for (int h = 0; h < kv_heads; h++) {
        positions[h][row] = position;
        pins[h][row] = (uint8_t)is_pinned;
    }
}

static int count(int h, int rows, int begin, int end) /* rows that hold tokens [begin, end) */
{
    int n = 0;
    for (int row = 0; row < rows; row++) n += positions[h][row] >= begin && positions[h][row] < end;
    return n;
}

int main(void)
{
    enum { call_begin = 50, call_end = 70, reply = 150, last = 256, stop = 12 };
    char text[256];
    size_t bytes = 0;
    int rows = 0, during = 0, after = 0, newest = 0;
    rkv_error error;
    rkv_config config = rkv_config_default(budget);
    rkv_layer layer = RKV_INIT;
    config.error = &error;
    config.protect = stop; /* the newest 12 tokens stay; the newest 8 vote */
    layer.keys = rkv_tensor_make(keys, RKV_F32, kv_heads, capacity, head_dim);
    layer.values = rkv_tensor_make(values, RKV_F32, kv_heads, capacity, head_dim);
    layer.queries = rkv_tensor_make(queries, RKV_F32, query_heads, window, head_dim);
    layer.positions = positions[0];
    layer.pins = pins[0];
    layer.n_tokens = capacity;
    rkv_status status = rkv_workspace_size(NULL, &config, &layer, 1, &bytes);
    void *workspace = malloc(bytes);
    for (int position = 0; position < last && status == RKV_OK; position++) {
        store(rows++, position, position >= call_begin && position < call_end);
        if (position == reply) /* the tool has replied: its call may go */
            for (int h = 0; h < kv_heads; h++)
                for (int row = 0; row < rows; row++) pins[h][row] = 0;
        if (rows < capacity) continue;
        layer.n_tokens = rows;
        status = rkv_compress(NULL, &config, &layer, 1, workspace, bytes);
        rows = layer.n_tokens;
        if (position < reply) during = count(1, rows, call_begin, call_end);
        after = count(1, rows, call_begin, call_end);
        newest = count(1, rows, position + 1 - stop, position + 1);
    }
    if (status != RKV_OK) printf("%s\n", rkv_explain(&error, text, sizeof text));
    printf("a call of 20 tokens: %d kept while it is pinned, %d afterwards; the newest %d of %d\n",
           during, after, newest, stop);
    free(workspace);
    return status == RKV_OK && during == 20 && after < 20 && newest == stop ? 0 : 1;
}
