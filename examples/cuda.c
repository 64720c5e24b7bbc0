/* A C engine on a GPU: cache and workspace lie in device memory, a call is queued on a stream, and
 * what the device finds wrong with the data shows after the stream has got there.
 * make examples-cuda    or: nvcc -O3 -c rkv_cuda.cu && cc -O2 -I. -c examples/cuda.c &&
 *                           nvcc cuda.o rkv_cuda.o -o cuda -lm && ./cuda */
#define RKV_CUDA
#define RKV_IMPLEMENTATION
#include "rkv.h"
#include <stdio.h>
#include <stdlib.h>

enum { kv_heads = 8, query_heads = 32, head_dim = 128, window = 8, n_tokens = 1152, budget = 1024 };
static float keys[kv_heads][n_tokens][head_dim], values[kv_heads][n_tokens][head_dim];
static float queries[query_heads][window][head_dim];
static int32_t positions[kv_heads][n_tokens], cpu_positions[kv_heads][n_tokens];

static void require(rkv_status status, const rkv_error *error)
{
    char text[256];
    if (status == RKV_OK) return;
    printf("%s\n", rkv_explain(error, text, sizeof text));
    exit(1);
}

/* An engine has its memory from cudaMalloc. The memory functions of the backend do the same, and
 * spare this program the headers of CUDA. */
static void *device_copy(const rkv_backend *gpu, const void *host, size_t bytes)
{
    void *memory = gpu->alloc(gpu, bytes);
    if (!memory || gpu->copy(gpu, memory, host, bytes) != RKV_OK) {
        printf("no device memory\n");
        exit(1);
    }
    return memory;
}

static rkv_layer describe(void *k, void *v, void *q, void *p)
{
    rkv_layer layer = RKV_INIT;
    layer.keys = rkv_tensor_make(k, RKV_F32, kv_heads, n_tokens, head_dim);
    layer.values = rkv_tensor_make(v, RKV_F32, kv_heads, n_tokens, head_dim);
    layer.queries = rkv_tensor_make(q, RKV_F32, query_heads, window, head_dim);
    layer.positions = (int32_t *)p;
    layer.n_tokens = n_tokens;
    return layer;
}

static void fill(float *x, size_t bytes)
{
    for (size_t i = 0; i < bytes / sizeof *x; i++) x[i] = (float)rand() / (float)RAND_MAX - 0.3f;
}

int main(void)
{
    rkv_error error, none = { NULL, RKV_OK, -1, -1, -1 };
    rkv_config config = rkv_config_default(budget);
    void *stream = NULL; /* a cudaStream_t; NULL is the default stream */
    char text[256];
    size_t bytes = 0;
    int n_same = 0;
    config.error = &error;
    if (rkv_cuda_register(stream, &error) != RKV_OK) { /* once, at start-up */
        printf("skip  no GPU: %s\n", rkv_explain(&error, text, sizeof text));
        return 0;
    }
    const rkv_backend *gpu = rkv_backend_find("cuda");
    if (!gpu) return 1; /* NULL would mean the CPU, which must not get device pointers */

    fill(keys[0][0], sizeof keys);
    fill(values[0][0], sizeof values);
    fill(queries[0][0], sizeof queries);
    for (int h = 0; h < kv_heads; h++)
        for (int row = 0; row < n_tokens; row++) positions[h][row] = cpu_positions[h][row] = row;
    rkv_layer layer = describe(
        device_copy(gpu, keys, sizeof keys), device_copy(gpu, values, sizeof values),
        device_copy(gpu, queries, sizeof queries), device_copy(gpu, positions, sizeof positions));
    rkv_error *device_error = (rkv_error *)device_copy(gpu, &none, sizeof none);
    config.device_error = device_error;

    require(rkv_workspace_size(gpu, &config, &layer, 1, &bytes), &error);
    void *workspace = gpu->alloc(gpu, bytes);
    require(rkv_compress(gpu, &config, &layer, 1, workspace, bytes), &error); /* queued */
    require(gpu->synchronize(gpu), &error);
    require(gpu->copy(gpu, &error, device_error, sizeof error), &error);
    require((rkv_status)error.status, &error); /* a NaN in a key would show here */
    require(gpu->copy(gpu, positions, layer.positions, sizeof positions), &error);

    /* The same on the CPU. Scores agree to 1e-5: near the edge a token may differ. */
    rkv_layer host = describe(keys, values, queries, cpu_positions);
    config.device_error = NULL;
    require(rkv_workspace_size(NULL, &config, &host, 1, &bytes), &error);
    void *host_workspace = malloc(bytes);
    require(rkv_compress(NULL, &config, &host, 1, host_workspace, bytes), &error);
    for (int h = 0; h < kv_heads; h++)
        for (int i = 0, j = 0; i < budget; i++) {
            while (j < budget && cpu_positions[h][j] < positions[h][i]) j++;
            n_same += j < budget && cpu_positions[h][j] == positions[h][i];
        }
    printf("GPU: %d of %d tokens kept per KV head; %d of all %d are those that the CPU keeps\n",
           layer.n_tokens, n_tokens, n_same, kv_heads * budget);
    free(host_workspace);
    gpu->free(gpu, layer.keys.data);
    gpu->free(gpu, layer.values.data);
    gpu->free(gpu, layer.queries.data);
    gpu->free(gpu, layer.positions);
    gpu->free(gpu, device_error);
    gpu->free(gpu, workspace);
    return n_same >= kv_heads * (budget - 2) ? 0 : 1;
}
