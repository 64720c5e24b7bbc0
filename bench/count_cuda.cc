/* Counts what the CUDA kernels execute for one rkv_compress of one layer. tests/cuda/ptx.cc
 * interprets the PTX: no GPU, no clock, the same numbers every time.
 *     make count-cuda        (one case: RKV_PTX_COUNTS=1 build/cuda/ptx/count_cuda KV_HEADS GROUP
 *                             HEAD_DIM N BUDGET f32|f16|bf16 KEYS [POLICY], keys as in bench/job.c,
 *                             a preset's name; or NAME, a single-round file of tests/golden)
 *
 * The assembler turns PTX into other instructions, but about as many. A call for many layers
 * executes fewer per layer: each block then has several tiles and loads its queries once. */
#define RKV_CUDA
extern "C" {
#include "bench/job.h"
#include "tests/golden_file.h"
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

static rkv_config preset(const char *name, int budget)
{
    static const struct {
        const char *name;
        rkv_config (*make)(int budget);
    } presets[] = {
        { "default", rkv_config_default },
        { "wide", rkv_config_wide },
        { "memory_traces", rkv_config_memory_traces },
        { "memory_prose", rkv_config_memory_prose },
        { "h2o", rkv_config_h2o },
        { "triattention", rkv_config_triattention },
    };
    for (const auto &each : presets)
        if (strcmp(name, each.name) == 0) return each.make(budget);
    must(strcmp(name, "random") == 0, "no such policy");
    return rkv_config_random(budget, 1);
}

static bench_job made_job(char **arguments, const char *policy)
{
    bench_job job;
    bench_shape shape = {};
    int *const numbers[] = { &shape.kv_heads, &shape.group, &shape.head_dim, &shape.n_tokens,
                             &shape.budget };
    bool has_type = false, has_keys = false;
    for (int i = 0; i < 5; i++) *numbers[i] = atoi(arguments[i]);
    for (int type = RKV_F32; type <= RKV_BF16; type++)
        if (strcmp(arguments[5], bench_dtype_name(static_cast<rkv_dtype>(type))) == 0)
            shape.dtype = static_cast<rkv_dtype>(type), has_type = true;
    for (int keys = 0; keys < BENCH_KEYS_COUNT; keys++)
        if (strcmp(arguments[6], bench_keys_name(static_cast<bench_keys>(keys))) == 0)
            shape.keys = static_cast<bench_keys>(keys), has_keys = true;
    must(has_type && has_keys, "no such type or keys");
    const rkv_config config = preset(policy, shape.budget);
    if (strcmp(policy, "default") == 0)
        bench_job_make(&job, &shape);
    else
        bench_job_make_for(&job, &shape, &config);
    return job;
}

static bench_job golden_job(const char *name)
{
    bench_job job;
    golden g;
    must(golden_read(&g, "tests/golden", name) && g.rounds == 1, "no such file in tests/golden");
    const bench_shape shape = { BENCH_GIVEN, g.dtype, g.n_tokens, g.budget,
                                g.kv_heads,  g.group, g.dim };
    rkv_config config = rkv_config_default(g.budget);
    config.window = g.window;
    config.pool = g.pool;
    config.lambda = g.lambda;
    config.threshold = g.threshold;
    bench_job_make_from(&job, &shape, &config, name, g.round[0].keys, g.round[0].queries, g.window);
    golden_free(&g);
    return job;
}

int main(int argc, char **argv)
{
    must(argc == 8 || argc == 9 || argc == 2,
         "arguments: KV_HEADS GROUP HEAD_DIM N BUDGET f32|f16|bf16 KEYS [POLICY], or NAME");
    bench_job job =
        argc > 2 ? made_job(argv + 1, argc == 9 ? argv[8] : "default") : golden_job(argv[1]);
    const bench_shape &shape = job.shape;
    const rkv_layer &host = job.layers[0];
    rkv_backend cuda;
    rkv_layer layer = RKV_INIT;
    size_t bytes = 0;
    const size_t query_bytes = job.key_bytes / static_cast<size_t>(shape.n_tokens) *
                               static_cast<size_t>(shape.group * host.queries.tokens);
    const size_t rows = static_cast<size_t>(shape.kv_heads) * static_cast<size_t>(shape.n_tokens);
    const size_t floats = static_cast<size_t>(rkv_state_floats(&job.config));
    must(rkv_cuda_backend(&cuda, NULL, NULL) == RKV_OK, "rkv_cuda_backend");
    layer.keys = host.keys;
    layer.values = host.values;
    layer.queries = host.queries;
    layer.keys.data = device_memory(job.key_bytes, host.keys.data);
    layer.values.data = device_memory(job.key_bytes, host.values.data);
    layer.queries.data = device_memory(query_bytes, host.queries.data);
    layer.n_tokens = shape.n_tokens;
    layer.n_new = floats ? shape.n_tokens - shape.budget : 0;
    layer.rope = host.rope;
    if (floats) layer.state = static_cast<float *>(device_memory(rows * floats * 4, host.state));
    if (host.positions)
        layer.positions = static_cast<int32_t *>(device_memory(rows * 4, host.positions));
    if (host.query_means)
        layer.query_means = static_cast<const float *>(device_memory(
            rkv_query_means_floats(host.queries.heads, shape.head_dim) * 4, host.query_means));
    must(rkv_workspace_size(&cuda, &job.config, &layer, 1, &bytes) == RKV_OK, "rkv_workspace_size");
    printf("# %d kv heads, group %d, head dim %d, %d -> %d tokens, %s, %s%s%s\n", shape.kv_heads,
           shape.group, shape.head_dim, shape.n_tokens, shape.budget, bench_dtype_name(shape.dtype),
           argc > 2 ? argv[7] : argv[1], argc == 9 ? ", " : "", argc == 9 ? argv[8] : "");
    must(rkv_compress(&cuda, &job.config, &layer, 1, device_memory(bytes, NULL), bytes) == RKV_OK,
         "rkv_compress");
    bench_job_free(&job);
    return 0;
}
