/* A cache of a type that rkv does not know, here ggml's q4_0: a row loader reads the keys, rows
 * move as bytes, and no other copy of K exists. (fp8 and q8_0 need no loader.)
 * cc -O2 -I. examples/quantised.c -o quantised -lm && ./quantised */
#define RKV_IMPLEMENTATION
#include "rkv.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { kv_heads = 2, query_heads = 4, head_dim = 64, window = 8, budget = 96, rows = 128 };

/* 32 numbers: an f16 scale, then 4 bits each, number i beside number i + 16. */
typedef struct block_q4 {
    uint16_t scale;
    uint8_t pairs[16];
} block_q4;
enum { row_blocks = head_dim / 32, row_bytes = row_blocks * (int)sizeof(block_q4) };

static block_q4 keys[kv_heads][rows][row_blocks], values[kv_heads][rows][row_blocks];
static float decoded[kv_heads][rows][head_dim]; /* to compare with */
static float queries[query_heads][window][head_dim];

static void decode(const block_q4 *block, float *out)
{
    /* powers of two are all the scales that this program uses */
    const float scale = ldexpf(1.0f, (block->scale >> 10) - 15);
    for (int i = 0; i < 16; i++) {
        out[i] = scale * (float)((block->pairs[i] & 15) - 8);
        out[i + 16] = scale * (float)((block->pairs[i] >> 4) - 8);
    }
}

/* rkv calls it with as many rows as lie evenly spaced, from each of its threads. */
static int load_q4(void *user, const rkv_rows *from, float *dst)
{
    (void)user;
    for (int r = 0; r < from->n_rows; r++) {
        const char *row = (const char *)from->data + (size_t)r * from->stride;
        for (int b = 0; b < from->dim / 32; b++, dst += 32)
            decode((const block_q4 *)(const void *)row + b, dst);
    }
    return from->n_rows; /* fewer: the next row is at fault */
}

static void fill(void)
{
    unsigned state = 1;
    for (int h = 0; h < kv_heads; h++)
        for (int t = 0; t < rows; t++)
            for (int b = 0; b < row_blocks; b++) {
                block_q4 *block = &keys[h][t][b];
                block->scale = (uint16_t)((12 + t % 4) << 10); /* 1/8, 1/4, 1/2, 1 */
                for (int i = 0; i < 16; i++)
                    block->pairs[i] = (uint8_t)((state = state * 1664525u + 1013904223u) >> 24);
                values[h][t][b] = *block;
                decode(block, &decoded[h][t][32 * b]);
            }
    for (int h = 0; h < query_heads; h++)
        for (int t = 0; t < window; t++)
            for (int i = 0; i < head_dim; i++)
                queries[h][t][i] = (float)((h + 3 * t + 7 * i) % 11 - 5) / 5.0f;
}

/* One round; a kept list of budget rows per KV head. */
static rkv_status compress(rkv_tensor k, rkv_tensor v, int32_t *kept)
{
    rkv_config config = rkv_config_default(budget);
    rkv_layer layer = RKV_INIT;
    size_t bytes = 0;
    layer.keys = k;
    layer.values = v;
    layer.queries = rkv_tensor_make(queries, RKV_F32, query_heads, window, head_dim);
    layer.n_tokens = rows;
    layer.kept = kept;
    rkv_status status = rkv_workspace_size(NULL, &config, &layer, 1, &bytes);
    void *workspace = malloc(bytes);
    if (status == RKV_OK) status = rkv_compress(NULL, &config, &layer, 1, workspace, bytes);
    free(workspace);
    return status;
}

int main(void)
{
    static int32_t kept[kv_heads][budget], wanted[kv_heads][budget];
    const rkv_tensor none = RKV_INIT;
    fill();
    rkv_tensor k = rkv_tensor_make(keys, RKV_OPAQUE, kv_heads, rows, head_dim);
    k.element_bytes = row_bytes; /* strides would be in bytes too; 0: without gaps */
    k.load = load_q4;
    rkv_tensor v = rkv_tensor_make(values, RKV_OPAQUE, kv_heads, rows, head_dim);
    v.element_bytes = row_bytes; /* values are moved, not read */
    if (compress(k, v, kept[0]) != RKV_OK) return 1;
    rkv_tensor f32 = rkv_tensor_make(decoded, RKV_F32, kv_heads, rows, head_dim);
    if (compress(f32, none, wanted[0]) != RKV_OK) return 1;
    if (memcmp(kept, wanted, sizeof kept) != 0) return 1;
    for (int h = 0; h < kv_heads; h++)
        if (memcmp(keys[h], values[h], budget * row_bytes) != 0) return 1;
    printf("q4_0: %d of %d rows kept, the same as of an f32 copy; %d bytes a row\n", budget, rows,
           row_bytes);
    return 0;
}
