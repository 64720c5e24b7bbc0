/* Counts what the CUDA kernels execute for one rkv_compress of one layer. tests/cuda/ptx.cc
 * interprets the PTX: no GPU, no clock, the same numbers every time.
 *     make count-cuda        (one case: RKV_PTX_COUNTS=1 build/cuda/ptx/count_cuda KV_HEADS GROUP
 *                             HEAD_DIM N BUDGET f32|f16|bf16 KEYS, keys as in bench/job.c)
 *
 * The assembler turns PTX into other instructions, but about as many. A call for many layers
 * executes fewer per layer: each block then has several tiles and loads its queries once. */
#define RKV_CUDA
extern "C" {
#include "bench/job.h"
}

static void must(bool holds, const char *what)
{
    if (holds) return;
    fprintf(stderr, "count_cuda: %s\n", what);
    exit(1);
}
/* Device memory, filled from the host's if that is not NULL. */
static void *device_memory(size_t bytes, const void *host)
{
    void *memory = NULL;
    must(cudaMalloc(&memory, bytes) == cudaSuccess, "no memory");
    if (host) (void)cudaMemcpyAsync(memory, host, bytes, cudaMemcpyHostToDevice, NULL);
    return memory;
}

int main(int argc, char **argv)
{
    bench_shape shape = {};
    int *const numbers[] = { &shape.kv_heads, &shape.group, &shape.head_dim, &shape.n_tokens,
                             &shape.budget };
    bool has_type = false, has_keys = false;
    must(argc == 8, "arguments: KV_HEADS GROUP HEAD_DIM N BUDGET f32|f16|bf16 KEYS");
    for (int i = 0; i < 5; i++) *numbers[i] = atoi(argv[1 + i]);
    for (int type = RKV_F32; type <= RKV_BF16; type++)
        if (strcmp(argv[6], bench_dtype_name(static_cast<rkv_dtype>(type))) == 0)
            shape.dtype = static_cast<rkv_dtype>(type), has_type = true;
    for (int keys = 0; keys < BENCH_KEYS_COUNT; keys++)
        if (strcmp(argv[7], bench_keys_name(static_cast<bench_keys>(keys))) == 0)
            shape.keys = static_cast<bench_keys>(keys), has_keys = true;
    must(has_type && has_keys, "no such type or keys");

    const rkv_config config = rkv_config_default(shape.budget);
    const size_t row = static_cast<size_t>(shape.head_dim) * (shape.dtype == RKV_F32 ? 4 : 2);
    const size_t heads = static_cast<size_t>(shape.kv_heads);
    const size_t key_bytes = heads * static_cast<size_t>(shape.n_tokens) * row;
    const size_t query_bytes = heads * static_cast<size_t>(shape.group * config.window) * row;
    std::vector<char> keys(key_bytes), queries(query_bytes);
    bench_fill_keys(keys.data(), &shape);
    bench_fill_queries(queries.data(), &shape, config.window);

    rkv_backend cuda;
    rkv_layer layer = RKV_INIT;
    size_t bytes = 0;
    must(rkv_cuda_backend(&cuda, NULL, NULL) == RKV_OK, "rkv_cuda_backend");
    layer.keys = rkv_tensor_make(device_memory(key_bytes, keys.data()), shape.dtype, shape.kv_heads,
                                 shape.n_tokens, shape.head_dim);
    layer.values = rkv_tensor_make(device_memory(key_bytes, keys.data()), shape.dtype,
                                   shape.kv_heads, shape.n_tokens, shape.head_dim);
    layer.queries = rkv_tensor_make(device_memory(query_bytes, queries.data()), shape.dtype,
                                    shape.kv_heads * shape.group, config.window, shape.head_dim);
    layer.n_tokens = shape.n_tokens;
    must(rkv_workspace_size(&cuda, &config, &layer, 1, &bytes) == RKV_OK, "rkv_workspace_size");
    printf("# %d kv heads, group %d, head dim %d, %d -> %d tokens, %s, %s\n", shape.kv_heads,
           shape.group, shape.head_dim, shape.n_tokens, shape.budget, argv[6], argv[7]);
    must(rkv_compress(&cuda, &config, &layer, 1, device_memory(bytes, NULL), bytes) == RKV_OK,
         "rkv_compress");
    return 0;
}
