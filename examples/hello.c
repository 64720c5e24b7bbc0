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

    rkv_config config = rkv_config_default(1024);
    rkv_layer layer = RKV_INIT;
    layer.keys = rkv_tensor_make(k, RKV_F32, kv_heads, n_tokens, head_dim);
    layer.values = rkv_tensor_make(v, RKV_F32, kv_heads, n_tokens, head_dim);
    layer.queries = rkv_tensor_make(q, RKV_F32, query_heads, window, head_dim);
    layer.n_tokens = n_tokens;

    size_t bytes = 0;
    rkv_workspace_size(NULL, &config, &layer, 1, &bytes);
    void *workspace = malloc(bytes);
    rkv_status status = rkv_compress(NULL, &config, &layer, 1, workspace, bytes);
    printf("%s: %d tokens kept, %d evicted per KV head, %zu bytes of workspace\n",
           rkv_status_string(status), layer.n_kept, layer.n_evicted, bytes);
    free(workspace);
    return status == RKV_OK ? 0 : 1;
}
