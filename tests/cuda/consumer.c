/* A program in C that uses rkv_cuda.cu through rkv.h alone, over tests/cuda/shim.h: make test
 * As C it is linked with the objects of both; tests/cuda/one_unit.cc compiles all three as one. */
#ifndef RKV_CUDA
#define RKV_CUDA
#endif
#include "rkv.h"

#include <stdio.h>
#include <string.h>

enum { HEADS = 2, ROWS = 300, DIM = 16, BUDGET = 100, WINDOW = 8, BYTES = HEADS * ROWS * DIM * 4 };

static int passed, failed;
static void expect(const char *what, int holds)
{
    passed += holds;
    failed += !holds;
    if (!holds) printf("FAIL  consumer: %s\n", what);
}

static float keys[HEADS * ROWS * DIM], queries[HEADS * WINDOW * DIM], got[HEADS * ROWS * DIM];
static int32_t kept[2][HEADS * BUDGET];
static unsigned char cpu_workspace[1 << 20];

/* The rows that a backend keeps; `memory` are the backend's copies of keys, queries and kept. */
static rkv_status compress(const rkv_backend *backend, void *const memory[3], rkv_error *error,
                           void *workspace, size_t bytes)
{
    rkv_config config = rkv_config_default(BUDGET);
    rkv_layer layer = RKV_INIT;
    config.error = error;
    layer.keys = rkv_tensor_make(memory[0], RKV_F32, HEADS, ROWS, DIM);
    layer.queries = rkv_tensor_make(memory[1], RKV_F32, HEADS, WINDOW, DIM);
    layer.kept = (int32_t *)memory[2];
    layer.n_tokens = ROWS;
    return rkv_compress(backend, &config, &layer, 1, workspace, bytes);
}

static void compare_with_cpu(const rkv_backend *cuda)
{
    rkv_error error;
    void *host[3], *device[3], *workspace;
    unsigned state = 1;
    int i;
    for (i = 0; i < HEADS * ROWS * DIM; i++) {
        state = state * 1664525u + 1013904223u;
        keys[i] = (float)(state >> 8) / 8388608.0f - 1;
        if (i < HEADS * WINDOW * DIM) queries[i] = keys[i] * 3;
    }
    device[0] = cuda->alloc(cuda, BYTES);
    device[1] = cuda->alloc(cuda, sizeof queries);
    device[2] = cuda->alloc(cuda, sizeof kept[1]);
    workspace = cuda->alloc(cuda, sizeof cpu_workspace);
    expect("copies to the device",
           cuda->copy(cuda, device[0], keys, BYTES) == RKV_OK &&
               cuda->copy(cuda, device[1], queries, sizeof queries) == RKV_OK);
    expect("compress on the device",
           compress(cuda, device, &error, workspace, sizeof cpu_workspace) == RKV_OK);
    expect("copies to the host",
           cuda->copy(cuda, got, device[0], BYTES) == RKV_OK &&
               cuda->copy(cuda, kept[1], device[2], sizeof kept[1]) == RKV_OK);
    host[0] = keys;
    host[1] = queries;
    host[2] = kept[0];
    expect("compress on the CPU",
           compress(NULL, host, &error, cpu_workspace, sizeof cpu_workspace) == RKV_OK);
    expect("the same kept sets", memcmp(kept[0], kept[1], sizeof kept[0]) == 0);
    expect("the same rows", memcmp(keys, got, BYTES) == 0);
    for (i = 0; i < 3; i++) cuda->free(cuda, device[i]);
    cuda->free(cuda, workspace);
}

int main(void)
{
    rkv_error error;
    rkv_backend table;
    const rkv_backend *cuda;
    int other;
    expect("register", rkv_cuda_register(NULL, &error) == RKV_OK && error.rule == NULL);
    expect("register with another stream",
           rkv_cuda_register(&other, &error) == RKV_ERROR_ARGUMENT && error.rule != NULL);
    expect("a table", rkv_cuda_backend(&table, &other, NULL) == RKV_OK && table.context == &other);
    cuda = rkv_backend_find("cuda");
    expect("find", cuda != NULL && cuda->context == NULL);
    if (cuda) compare_with_cpu(cuda);
    printf("%d passed, %d failed, 0 skipped\n", passed, failed);
    return failed > 0;
}
