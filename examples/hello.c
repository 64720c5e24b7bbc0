/* The smallest whole program: one layer's cache, 1152 tokens long, is compressed to 1024.
 * cc -O2 -I. examples/hello.c -o hello -lm && ./hello */
#define RKV_IMPLEMENTATION
#include "rkv.h"
#include <stdio.h>
#include <stdlib.h>

enum { kv_heads = 8, query_heads = 32, head_dim = 128, window = 8, n_tokens = 1152 };
static float k[kv_heads][n_tokens][head_dim], v[kv_heads][n_tokens][head_dim];
static float q[query_heads][window][head_dim];

int main(void)
{
    float *x = &k[0][0][0], *y = &q[0][0][0]; /* an engine has these already; here, noise */
    for (size_t i = 0; i < sizeof k / sizeof *x; i++) x[i] = (float)rand() / (float)RAND_MAX;
    for (size_t i = 0; i < sizeof q / sizeof *y; i++) y[i] = (float)rand() / (float)RAND_MAX;

    rkv_error error;
    rkv_config config = rkv_config_default(1024);
    config.error = &error;
    rkv_layer layer = RKV_INIT;
    layer.keys = rkv_tensor_make(k, RKV_F32, kv_heads, n_tokens, head_dim);
    layer.values = rkv_tensor_make(v, RKV_F32, kv_heads, n_tokens, head_dim);
    layer.queries = rkv_tensor_make(q, RKV_F32, query_heads, window, head_dim);
    layer.n_tokens = n_tokens;

    char text[256];
    size_t bytes = 0;
    rkv_status status = rkv_workspace_size(NULL, &config, &layer, 1, &bytes);
    void *workspace = malloc(bytes);
    if (status == RKV_OK) status = rkv_compress(NULL, &config, &layer, 1, workspace, bytes);
    if (status == RKV_OK)
        printf("%d of %d tokens kept per KV head, with %zu bytes of workspace\n", layer.n_kept,
               n_tokens, bytes);
    else
        printf("%s\n", rkv_explain(&error, text, sizeof text));
    free(workspace);
    return status == RKV_OK ? 0 : 1;
}
