/* The times of rkv_cuda.cu, beside the time that its memory traffic alone would take on this card.
 *     make bench-cuda        (one case: build/cuda/bench_cuda --only NAME; --stages: also the three
 *                             stages one by one, which shows where the time goes)
 *
 * Floor: the bytes that must move, divided by the bandwidth of a device copy in the same run. Keys
 * and queries are read once; of the rows that move, keys are written and values read and written.
 * Each time is the median over event pairs around one call, replayed as a graph or launched, after
 * a warm-up. The input sets are together three times the size of the L2 and are refilled before
 * every pass. The kept rows of the first layer are compared with the CPU's. */
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <chrono>
#include <vector>

#define RKV_CUDA
#include "rkv.h"

struct bench_case {
    const char *name;
    int layers, batch, kv_heads, group, head_dim, n_tokens, budget;
    rkv_dtype dtype;
    float cosine; /* mean cosine of the keys; 0: no two are similar */
    rkv_config (*preset)(int budget);
};
static rkv_config seeded_random(int budget)
{
    return rkv_config_random(budget, 1);
}
static const bench_case cases[] = {
    { "28 layers, batch 1", 28, 1, 2, 6, 128, 1152, 1024, RKV_BF16, 0.7f, rkv_config_default },
    { "28 layers, batch 16", 28, 16, 2, 6, 128, 1152, 1024, RKV_BF16, 0.7f, rkv_config_default },
    { "32 layers, batch 1", 32, 1, 8, 4, 128, 1152, 1024, RKV_BF16, 0.7f, rkv_config_default },
    { "32 layers, batch 16", 32, 16, 8, 4, 128, 1152, 1024, RKV_BF16, 0.7f, rkv_config_default },
    { "32 layers, batch 1, f16", 32, 1, 8, 4, 128, 1152, 1024, RKV_F16, 0.7f, rkv_config_default },
    { "32 layers, batch 1, f32", 32, 1, 8, 4, 128, 1152, 1024, RKV_F32, 0.7f, rkv_config_default },
    { "32 layers, batch 16, f32", 32, 16, 8, 4, 128, 1152, 1024, RKV_F32, 0.7f,
      rkv_config_default },
    { "32 layers, batch 1, none similar", 32, 1, 8, 4, 128, 1152, 1024, RKV_BF16, 0.0f,
      rkv_config_default },
    { "32 layers, batch 16, none similar", 32, 16, 8, 4, 128, 1152, 1024, RKV_BF16, 0.0f,
      rkv_config_default },
    { "36 layers, long", 36, 1, 8, 4, 128, 16807, 8403, RKV_BF16, 0.7f, rkv_config_default },
    { "36 layers, long, none similar", 36, 1, 8, 4, 128, 16807, 8403, RKV_BF16, 0.0f,
      rkv_config_default },
    { "32 layers, n 1152, R-KV", 32, 1, 8, 4, 128, 1152, 1024, RKV_BF16, 0.7f, rkv_config_default },
    { "32 layers, n 1152, wide", 32, 1, 8, 4, 128, 1152, 1024, RKV_BF16, 0.7f, rkv_config_wide },
    { "32 layers, n 1152, memory_traces", 32, 1, 8, 4, 128, 1152, 1024, RKV_BF16, 0.7f,
      rkv_config_memory_traces },
    { "32 layers, n 1152, memory_prose", 32, 1, 8, 4, 128, 1152, 1024, RKV_BF16, 0.7f,
      rkv_config_memory_prose },
    { "32 layers, n 1152, h2o", 32, 1, 8, 4, 128, 1152, 1024, RKV_BF16, 0.7f, rkv_config_h2o },
    { "32 layers, n 1152, triattention", 32, 1, 8, 4, 128, 1152, 1024, RKV_BF16, 0.7f,
      rkv_config_triattention },
    { "32 layers, n 1152, random", 32, 1, 8, 4, 128, 1152, 1024, RKV_BF16, 0.7f, seeded_random },
    { "32 layers, n 4224, R-KV", 32, 1, 8, 4, 128, 4224, 4096, RKV_BF16, 0.7f, rkv_config_default },
    { "32 layers, n 4224, wide", 32, 1, 8, 4, 128, 4224, 4096, RKV_BF16, 0.7f, rkv_config_wide },
    { "32 layers, n 4224, memory_traces", 32, 1, 8, 4, 128, 4224, 4096, RKV_BF16, 0.7f,
      rkv_config_memory_traces },
    { "32 layers, n 4224, memory_prose", 32, 1, 8, 4, 128, 4224, 4096, RKV_BF16, 0.7f,
      rkv_config_memory_prose },
    { "32 layers, n 4224, h2o", 32, 1, 8, 4, 128, 4224, 4096, RKV_BF16, 0.7f, rkv_config_h2o },
    { "32 layers, n 4224, triattention", 32, 1, 8, 4, 128, 4224, 4096, RKV_BF16, 0.7f,
      rkv_config_triattention },
    { "32 layers, n 4224, random", 32, 1, 8, 4, 128, 4224, 4096, RKV_BF16, 0.7f, seeded_random },
};
enum { N_CASES = sizeof cases / sizeof *cases, PASSES = 10 };

static void must(cudaError_t error, const char *what)
{
    if (error == cudaSuccess) return;
    printf("FAIL  %s: %s\n", what, cudaGetErrorString(error));
    exit(1);
}
static rkv_error error; /* of the last call */
static void must(rkv_status status, const char *what)
{
    char text[256];
    if (status == RKV_OK) return;
    printf("FAIL  %s: %s\n", what, rkv_explain(&error, text, sizeof text));
    exit(1);
}

/* ---- Inputs ---------------------------------------------------------------------------------- */
/* A normal number from an index and a seed: splitmix64, Box-Muller. */
static __device__ float normal_at(uint64_t i, uint64_t seed)
{
    uint64_t z = i * 0x9e3779b97f4a7c15ull + seed;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    z ^= z >> 31;
    const float u = (static_cast<float>(z >> 40) + 0.5f) / 16777216.0f;
    const float v = static_cast<float>(z & 0xffffff) / 16777216.0f;
    return sqrtf(-2.0f * logf(u)) * cospif(2.0f * v);
}
static __device__ void store(float *at, float x)
{
    *at = x;
}
static __device__ void store(__half *at, float x)
{
    *at = __float2half(x);
}
static __device__ void store(__nv_bfloat16 *at, float x)
{
    *at = __float2bfloat16(x);
}

/* Rows of `dim` elements; each `rows_per_head` of them share a direction. */
template <typename T>
static __global__ void fill_rows(T *rows, uint64_t n, int dim, int rows_per_head, float cosine,
                                 uint64_t seed)
{
    const uint64_t step = static_cast<uint64_t>(gridDim.x) * blockDim.x;
    uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    for (; i < n; i += step) {
        const uint64_t head = i / static_cast<uint64_t>(dim) / static_cast<uint64_t>(rows_per_head);
        const uint64_t element = i % static_cast<uint64_t>(dim);
        const float shared = normal_at(head * 4096 + element, seed + 1);
        store(rows + i, sqrtf(cosine) * shared + sqrtf(1.0f - cosine) * normal_at(i, seed));
    }
}
static void fill(void *rows, rkv_dtype dtype, uint64_t n, int dim, int rows_per_head, float cosine,
                 uint64_t seed)
{
    if (dtype == RKV_F32)
        fill_rows<<<2048, 256>>>(static_cast<float *>(rows), n, dim, rows_per_head, cosine, seed);
    else if (dtype == RKV_F16)
        fill_rows<<<2048, 256>>>(static_cast<__half *>(rows), n, dim, rows_per_head, cosine, seed);
    else
        fill_rows<<<2048, 256>>>(static_cast<__nv_bfloat16 *>(rows), n, dim, rows_per_head, cosine,
                                 seed);
    must(cudaGetLastError(), "filling the inputs");
}

/* One set of inputs, the call on it, and the call as a graph. */
struct bench_set {
    char *keys, *values;
    std::vector<rkv_layer> layers;
    cudaGraphExec_t graph;
};
struct bench_job {
    bench_case c;
    rkv_config config;
    size_t element, row_bytes, tensor_bytes;
    int votes; /* queries of a query head */
    char *fresh_keys, *fresh_values, *queries;
    int32_t *kept, *positions, *fresh_positions;
    float *state, *means; /* of all layers; of one */
    size_t rows;          /* of all KV heads of all layers */
    void *workspace;
    size_t workspace_bytes;
    rkv_backend backend;
    cudaStream_t stream;
    std::vector<bench_set> sets;
};

static char *device_memory(size_t bytes)
{
    void *memory = NULL;
    must(cudaMalloc(&memory, bytes), "device memory");
    return static_cast<char *>(memory);
}

static int n_jobs(const bench_case &c)
{
    return c.layers * c.batch;
}

static void make_set(bench_job *job, bench_set *set)
{
    const bench_case &c = job->c;
    const size_t layer_bytes = job->tensor_bytes / static_cast<size_t>(n_jobs(c));
    const size_t query_rows = static_cast<size_t>(c.kv_heads * c.group * job->votes);
    const size_t query_bytes = query_rows * job->row_bytes;
    const size_t layer_rows = static_cast<size_t>(c.kv_heads * c.n_tokens);
    const size_t floats = static_cast<size_t>(rkv_state_floats(&job->config));
    set->keys = device_memory(job->tensor_bytes);
    set->values = device_memory(job->tensor_bytes);
    for (int l = 0; l < n_jobs(c); l++) {
        const size_t at = static_cast<size_t>(l);
        rkv_layer layer = RKV_INIT;
        layer.keys = rkv_tensor_make(set->keys + at * layer_bytes, c.dtype, c.kv_heads, c.n_tokens,
                                     c.head_dim);
        layer.values = rkv_tensor_make(set->values + at * layer_bytes, c.dtype, c.kv_heads,
                                       c.n_tokens, c.head_dim);
        layer.queries = rkv_tensor_make(job->queries + at * query_bytes, c.dtype,
                                        c.kv_heads * c.group, job->votes, c.head_dim);
        layer.n_tokens = c.n_tokens;
        layer.positions = job->positions + at * layer_rows;
        layer.state = job->state + at * layer_rows * floats;
        layer.query_means = job->means;
        layer.rope.pairing = RKV_ROPE_HALVES;
        layer.kept = job->kept + at * static_cast<size_t>(c.kv_heads * c.budget);
        set->layers.push_back(layer);
    }
}

static void compress(bench_job *job, bench_set *set)
{
    for (size_t l = 0; l < set->layers.size(); l++) {
        set->layers[l].n_tokens = job->c.n_tokens;
        set->layers[l].n_new = job->c.n_tokens - job->c.budget;
    }
    must(rkv_compress(&job->backend, &job->config, set->layers.data(),
                      static_cast<int>(set->layers.size()), job->workspace, job->workspace_bytes),
         "rkv_compress");
}

static void capture(bench_job *job, bench_set *set)
{
    cudaGraph_t graph;
    must(cudaStreamBeginCapture(job->stream, cudaStreamCaptureModeGlobal), "capture");
    compress(job, set);
    must(cudaStreamEndCapture(job->stream, &graph), "capture");
    must(cudaGraphInstantiate(&set->graph, graph, 0), "graph");
    must(cudaGraphDestroy(graph), "graph");
}

static size_t state_bytes(const bench_job &job)
{
    return job.rows * static_cast<size_t>(rkv_state_floats(&job.config)) * sizeof(float);
}

static void refill(const bench_job &job, const bench_set &set)
{
    must(cudaMemcpyAsync(set.keys, job.fresh_keys, job.tensor_bytes, cudaMemcpyDeviceToDevice,
                         job.stream),
         "copy");
    must(cudaMemcpyAsync(set.values, job.fresh_values, job.tensor_bytes, cudaMemcpyDeviceToDevice,
                         job.stream),
         "copy");
    must(cudaMemcpyAsync(job.positions, job.fresh_positions, job.rows * sizeof(int32_t),
                         cudaMemcpyDeviceToDevice, job.stream),
         "copy");
    must(cudaMemsetAsync(job.state, 0, state_bytes(job), job.stream), "memory");
}

/* Positions are row numbers, the state is empty, the means say nothing. */
static void add_policy_arrays(bench_job *job, size_t rows)
{
    const bench_case &c = job->c;
    const size_t n_means = rkv_query_means_floats(c.kv_heads * c.group, c.head_dim);
    std::vector<int32_t> positions(rows);
    job->rows = rows;
    for (size_t i = 0; i < rows; i++)
        positions[i] = static_cast<int32_t>(i % static_cast<size_t>(c.n_tokens));
    job->positions = reinterpret_cast<int32_t *>(device_memory(rows * sizeof(int32_t)));
    job->fresh_positions = reinterpret_cast<int32_t *>(device_memory(rows * sizeof(int32_t)));
    job->state = reinterpret_cast<float *>(device_memory(state_bytes(*job) + 1));
    job->means = reinterpret_cast<float *>(device_memory(n_means * sizeof(float)));
    must(cudaMemcpy(job->fresh_positions, positions.data(), rows * sizeof(int32_t),
                    cudaMemcpyHostToDevice),
         "copy");
    fill(job->means, RKV_F32, n_means, 1, 1, 0.0f, 4);
}

static void make_job(bench_job *job, const bench_case &c, size_t l2_bytes)
{
    const uint64_t rows = static_cast<uint64_t>(n_jobs(c)) * static_cast<uint64_t>(c.kv_heads) *
                          static_cast<uint64_t>(c.n_tokens);
    const uint64_t dim = static_cast<uint64_t>(c.head_dim);
    job->c = c;
    job->config = c.preset(c.budget);
    job->votes = job->config.votes > 0 ? job->config.votes : job->config.window;
    const uint64_t query_rows =
        static_cast<uint64_t>(n_jobs(c)) * static_cast<uint64_t>(c.kv_heads * c.group * job->votes);
    job->config.error = &error;
    job->element = c.dtype == RKV_F32 ? 4 : 2;
    job->row_bytes = dim * job->element;
    job->tensor_bytes = rows * job->row_bytes;
    must(cudaStreamCreate(&job->stream), "stream");
    must(rkv_cuda_backend(&job->backend, job->stream, &error), "rkv_cuda_backend");
    job->fresh_keys = device_memory(job->tensor_bytes);
    job->fresh_values = device_memory(job->tensor_bytes);
    job->queries = device_memory(query_rows * job->row_bytes);
    job->kept = reinterpret_cast<int32_t *>(device_memory(
        static_cast<size_t>(n_jobs(c)) * static_cast<size_t>(c.kv_heads * c.budget) * 4));
    fill(job->fresh_keys, c.dtype, rows * dim, c.head_dim, c.n_tokens, c.cosine, 1);
    fill(job->fresh_values, c.dtype, rows * dim, c.head_dim, c.n_tokens, 0.0f, 2);
    fill(job->queries, c.dtype, query_rows * dim, c.head_dim, job->votes, 0.0f, 3);
    add_policy_arrays(job, static_cast<size_t>(rows));
    must(cudaDeviceSynchronize(), "filling the inputs");
    const size_t n_sets = 1 + 3 * l2_bytes / (2 * job->tensor_bytes);
    job->sets.resize(n_sets < 2 ? 2 : n_sets);
    for (size_t i = 0; i < job->sets.size(); i++) make_set(job, &job->sets[i]);
    must(rkv_workspace_size(&job->backend, &job->config, job->sets[0].layers.data(), n_jobs(c),
                            &job->workspace_bytes),
         "rkv_workspace_size");
    job->workspace = device_memory(job->workspace_bytes);
    refill(*job, job->sets[0]);
    compress(job, &job->sets[0]); /* once outside of a capture */
    must(cudaStreamSynchronize(job->stream), "rkv_compress");
    for (size_t i = 0; i < job->sets.size(); i++) capture(job, &job->sets[i]);
}

static void free_job(bench_job *job)
{
    for (size_t i = 0; i < job->sets.size(); i++) {
        (void)cudaGraphExecDestroy(job->sets[i].graph);
        (void)cudaFree(job->sets[i].keys);
        (void)cudaFree(job->sets[i].values);
    }
    (void)cudaFree(job->fresh_keys);
    (void)cudaFree(job->fresh_values);
    (void)cudaFree(job->queries);
    (void)cudaFree(job->kept);
    (void)cudaFree(job->positions);
    (void)cudaFree(job->fresh_positions);
    (void)cudaFree(job->state);
    (void)cudaFree(job->means);
    (void)cudaFree(job->workspace);
    (void)cudaStreamDestroy(job->stream);
}

/* ---- Checking and measuring ------------------------------------------------------------------ */
/* Rows that move, over all heads; runs the call once. */
static double count_moved(bench_job *job)
{
    const size_t n =
        static_cast<size_t>(n_jobs(job->c)) * static_cast<size_t>(job->c.kv_heads * job->c.budget);
    std::vector<int32_t> kept(n);
    double moved = 0;
    refill(*job, job->sets[0]);
    compress(job, &job->sets[0]);
    must(cudaStreamSynchronize(job->stream), "rkv_compress");
    must(cudaMemcpy(kept.data(), job->kept, n * 4, cudaMemcpyDeviceToHost), "copy");
    for (size_t i = 0; i < n; i++)
        moved += kept[i] != static_cast<int32_t>(i % static_cast<size_t>(job->c.budget));
    return moved;
}

/* Tokens of the first layer that only one of CPU and GPU keeps; after count_moved. */
static int differing_tokens(const bench_job &job)
{
    const bench_case &c = job.c;
    const size_t keys =
        static_cast<size_t>(c.kv_heads) * static_cast<size_t>(c.n_tokens) * job.row_bytes;
    const size_t queries = static_cast<size_t>(c.kv_heads * c.group * job.votes) * job.row_bytes;
    const size_t rows = static_cast<size_t>(c.kv_heads) * static_cast<size_t>(c.n_tokens);
    const size_t n_means = rkv_query_means_floats(c.kv_heads * c.group, c.head_dim);
    std::vector<int32_t> positions(rows);
    std::vector<float> means(n_means), state(2 * rows, 0.0f);
    const size_t n_kept = static_cast<size_t>(c.kv_heads * c.budget);
    std::vector<char> k(keys), q(queries);
    std::vector<int32_t> kept(n_kept), want(n_kept);
    std::vector<unsigned char> workspace;
    rkv_layer layer = job.sets[0].layers[0];
    size_t bytes = 0;
    int differ = 0;
    must(cudaMemcpy(k.data(), job.fresh_keys, keys, cudaMemcpyDeviceToHost), "copy");
    must(cudaMemcpy(q.data(), job.queries, queries, cudaMemcpyDeviceToHost), "copy");
    must(cudaMemcpy(kept.data(), job.kept, n_kept * 4, cudaMemcpyDeviceToHost), "copy");
    must(cudaMemcpy(positions.data(), job.fresh_positions, rows * 4, cudaMemcpyDeviceToHost),
         "copy");
    must(cudaMemcpy(means.data(), job.means, n_means * 4, cudaMemcpyDeviceToHost), "copy");
    layer.n_tokens = c.n_tokens;
    layer.n_new = c.n_tokens - c.budget;
    layer.positions = positions.data();
    layer.state = state.data();
    layer.query_means = means.data();
    layer.keys.data = k.data();
    layer.values.data = NULL;
    layer.queries.data = q.data();
    layer.kept = want.data();
    must(rkv_workspace_size(NULL, &job.config, &layer, 1, &bytes), "rkv_workspace_size");
    workspace.resize(bytes);
    must(rkv_compress(NULL, &job.config, &layer, 1, workspace.data(), bytes), "rkv_compress");
    for (int h = 0; h < c.kv_heads; h++) {
        std::vector<char> in_want(static_cast<size_t>(c.n_tokens), 0);
        for (int i = 0; i < c.budget; i++)
            in_want[static_cast<size_t>(want[static_cast<size_t>(h * c.budget + i)])] = 1;
        for (int i = 0; i < c.budget; i++)
            differ += !in_want[static_cast<size_t>(kept[static_cast<size_t>(h * c.budget + i)])];
    }
    return differ;
}

/* Passes before the timed ones: at least two and at least a tenth of a second, since an idle card
 * runs at a low clock. */
struct bench_warm_up {
    std::chrono::steady_clock::time_point begin;
    int passes;
};
static bench_warm_up warm_up_begin()
{
    const bench_warm_up warm_up = { std::chrono::steady_clock::now(), 0 };
    return warm_up;
}
static bool is_warm(bench_warm_up *warm_up)
{
    const std::chrono::duration<double> past = std::chrono::steady_clock::now() - warm_up->begin;
    return warm_up->passes++ >= 2 && past.count() > 0.1;
}

static double median(std::vector<double> *list)
{
    std::sort(list->begin(), list->end());
    return (*list)[list->size() / 2];
}

/* Median microseconds of one call. */
static double time_calls(bench_job *job, bool as_graph)
{
    std::vector<cudaEvent_t> begin(job->sets.size()), end(job->sets.size());
    std::vector<double> us;
    bench_warm_up warm_up = warm_up_begin();
    for (size_t i = 0; i < job->sets.size(); i++) {
        must(cudaEventCreate(&begin[i]), "event");
        must(cudaEventCreate(&end[i]), "event");
    }
    while (us.size() < PASSES * job->sets.size()) {
        const bool timed = is_warm(&warm_up);
        for (size_t i = 0; i < job->sets.size(); i++) refill(*job, job->sets[i]);
        for (size_t i = 0; i < job->sets.size(); i++) {
            must(cudaEventRecord(begin[i], job->stream), "event");
            if (as_graph)
                must(cudaGraphLaunch(job->sets[i].graph, job->stream), "graph");
            else
                compress(job, &job->sets[i]);
            must(cudaEventRecord(end[i], job->stream), "event");
        }
        must(cudaStreamSynchronize(job->stream), "a timed pass");
        for (size_t i = 0; i < job->sets.size() && timed; i++) {
            float ms = 0;
            must(cudaEventElapsedTime(&ms, begin[i], end[i]), "event");
            us.push_back(static_cast<double>(ms) * 1e3);
        }
    }
    for (size_t i = 0; i < job->sets.size(); i++) {
        (void)cudaEventDestroy(begin[i]);
        (void)cudaEventDestroy(end[i]);
    }
    return median(&us);
}

typedef rkv_status (*stage_function)(const rkv_backend *, const rkv_config *, rkv_layer *, int,
                                     void *, size_t);

/* Median microseconds of rkv_score, rkv_select and rkv_compact, as plain launches. Each of them
 * uploads the description of the layers, so together they take longer than one rkv_compress. */
static void print_stages(bench_job *job)
{
    enum { STAGES = 3 };
    static const stage_function stages[STAGES] = { rkv_score, rkv_select, rkv_compact };
    const bench_case &c = job->c;
    const size_t candidates = static_cast<size_t>(c.kv_heads * (c.n_tokens - job->config.window));
    const size_t n_layers = static_cast<size_t>(n_jobs(c));
    float *scores = reinterpret_cast<float *>(device_memory(n_layers * candidates * sizeof(float)));
    std::vector<double> us[STAGES];
    cudaEvent_t mark[STAGES + 1];
    for (int i = 0; i <= STAGES; i++) must(cudaEventCreate(&mark[i]), "event");
    bench_warm_up warm_up = warm_up_begin();
    while (us[0].size() < PASSES * job->sets.size()) {
        const bool timed = is_warm(&warm_up);
        for (size_t i = 0; i < job->sets.size(); i++) {
            std::vector<rkv_layer> layers = job->sets[i].layers;
            for (size_t l = 0; l < n_layers; l++) {
                layers[l].n_tokens = c.n_tokens;
                layers[l].n_new = c.n_tokens - c.budget;
                layers[l].scores = scores + l * candidates;
            }
            for (size_t k = 0; k < job->sets.size(); k++) refill(*job, job->sets[k]);
            must(cudaEventRecord(mark[0], job->stream), "event");
            for (int stage = 0; stage < STAGES; stage++) {
                must(stages[stage](&job->backend, &job->config, layers.data(), n_jobs(c),
                                   job->workspace, job->workspace_bytes),
                     "a stage");
                must(cudaEventRecord(mark[stage + 1], job->stream), "event");
            }
            must(cudaStreamSynchronize(job->stream), "a timed pass");
            for (int stage = 0; stage < STAGES && timed; stage++) {
                float ms = 0;
                must(cudaEventElapsedTime(&ms, mark[stage], mark[stage + 1]), "event");
                us[stage].push_back(static_cast<double>(ms) * 1e3);
            }
        }
    }
    for (int i = 0; i <= STAGES; i++) (void)cudaEventDestroy(mark[i]);
    (void)cudaFree(scores);
    printf("    score %.1f us, select %.1f us, compact %.1f us\n", median(&us[0]), median(&us[1]),
           median(&us[2]));
}

/* GB/s of a device copy; bytes read and bytes written both count. */
static double copy_bandwidth()
{
    const size_t bytes = static_cast<size_t>(1) << 30;
    char *from = device_memory(bytes), *to = device_memory(bytes);
    cudaEvent_t begin, end;
    std::vector<double> rate;
    bench_warm_up warm_up = warm_up_begin();
    must(cudaMemset(from, 0x3c, bytes), "memory");
    must(cudaEventCreate(&begin), "event");
    must(cudaEventCreate(&end), "event");
    while (rate.size() < PASSES) {
        const bool timed = is_warm(&warm_up);
        float ms = 0;
        must(cudaEventRecord(begin), "event");
        must(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice), "copy");
        must(cudaEventRecord(end), "event");
        must(cudaEventSynchronize(end), "copy");
        must(cudaEventElapsedTime(&ms, begin, end), "event");
        if (timed) rate.push_back(2 * static_cast<double>(bytes) / (static_cast<double>(ms) * 1e6));
    }
    (void)cudaEventDestroy(begin);
    (void)cudaEventDestroy(end);
    (void)cudaFree(from);
    (void)cudaFree(to);
    return median(&rate);
}

/* Microseconds of a case in PyTorch, from bench/peer_torch_cuda.py; 0 if it was not measured. */
static double peer_time(const char *path, const char *name)
{
    char line[256];
    double us = 0;
    FILE *file = path ? fopen(path, "r") : NULL;
    while (file && fgets(line, sizeof line, file)) {
        char *tab = strchr(line, '\t');
        if (!tab) continue;
        *tab = '\0';
        if (strcmp(line, name) == 0) us = atof(tab + 1);
    }
    if (file) fclose(file);
    return us;
}

struct bench_options {
    const char *csv, *only, *peer, *commit, *date;
    bool stages;
};

/* False, after a line on stderr, if an argument is unknown. */
static bool read_options(bench_options *options, int argc, char **argv)
{
    const struct {
        const char *name, **value;
    } list[] = {
        { "--csv", &options->csv },   { "--only", &options->only },
        { "--peer", &options->peer }, { "--commit", &options->commit },
        { "--date", &options->date },
    };
    for (int i = 1; i < argc; i++) {
        const char **value = NULL;
        if (strcmp(argv[i], "--stages") == 0) {
            options->stages = true;
            continue;
        }
        for (const auto &option : list)
            if (strcmp(argv[i], option.name) == 0) value = option.value;
        if (!value || i + 1 == argc) {
            fprintf(stderr, "bench_cuda: %s %s\n", argv[i],
                    value ? "needs a value"
                          : "is no option: --stages, or --csv, --only, --peer, --commit or --date "
                            "and a value");
            return false;
        }
        *value = argv[++i];
    }
    bool known = !options->only;
    for (int i = 0; i < N_CASES; i++) known = known || strcmp(options->only, cases[i].name) == 0;
    if (!known) {
        fprintf(stderr, "bench_cuda: there is no case \"%s\"; there are:\n", options->only);
        for (int i = 0; i < N_CASES; i++) fprintf(stderr, "  \"%s\"\n", cases[i].name);
    }
    return known;
}

static bool run_case(const bench_case &c, const bench_options &options, size_t l2_bytes,
                     double bandwidth, FILE *csv)
{
    static const char *const types[] = { "f32", "f16", "bf16" };
    bench_job job;
    make_job(&job, c, l2_bytes);
    const double row = static_cast<double>(job.row_bytes), jobs = n_jobs(c);
    const double rows = jobs * c.kv_heads * (c.n_tokens + c.group * job.votes);
    const double bytes = rows * row + 3 * count_moved(&job) * row;
    const int differ = differing_tokens(job);
    const double floor_us = bytes / (bandwidth * 1e3);
    const double graph_us = time_calls(&job, true), stream_us = time_calls(&job, false);
    const double peer_us = peer_time(options.peer, c.name);
    printf("  %-32s %6d %6d %5s %8.3f %9.1f %10.1f %10.1f %8.2f %7d", c.name, c.n_tokens, c.budget,
           types[c.dtype], bytes * 1e-9, floor_us, graph_us, stream_us, graph_us / floor_us,
           differ);
    if (peer_us > 0)
        printf(" %12.0f %8.0f\n", peer_us, peer_us / graph_us);
    else
        printf(" %12s %8s\n", "-", "-");
    if (options.stages) print_stages(&job);
    fflush(stdout);
    if (csv)
        fprintf(csv, "\"%s\",%d,%d,%d,%d,%d,%d,%d,%s,%.0f,%.1f,%.1f,%.1f,%.3f,%d,%zu,%.0f\n",
                c.name, c.layers, c.batch, c.kv_heads, c.group, c.head_dim, c.n_tokens, c.budget,
                types[c.dtype], bytes, floor_us, graph_us, stream_us, graph_us / floor_us, differ,
                job.workspace_bytes, peer_us);
    free_job(&job);
    return differ * 200 <= c.kv_heads * c.budget; /* near ties may differ */
}

static void print_head(FILE *out, const bench_options &options, const cudaDeviceProp &device,
                       double bandwidth)
{
    int runtime = 0, driver = 0;
    (void)cudaRuntimeGetVersion(&runtime);
    (void)cudaDriverGetVersion(&driver);
    fprintf(out,
            "# rkv %d.%d.%d, commit %s, %s, %s, %d SMs, L2 %.0f MB, CUDA %d.%d (driver %d.%d), "
            "device copy %.0f GB/s\n",
            RKV_VERSION_MAJOR, RKV_VERSION_MINOR, RKV_VERSION_PATCH, options.commit, options.date,
            device.name, device.multiProcessorCount, device.l2CacheSize * 1e-6, runtime / 1000,
            runtime % 1000 / 10, driver / 1000, driver % 1000 / 10, bandwidth);
}

int main(int argc, char **argv)
{
    bench_options options = { NULL, NULL, NULL, "-", "-", false };
    cudaDeviceProp device;
    int failed = 0, n_devices = 0;
    if (!read_options(&options, argc, argv)) return 1;
    if (cudaGetDeviceCount(&n_devices) != cudaSuccess || n_devices < 1) {
        printf("skip  bench_cuda: no CUDA device\n");
        return 0;
    }
    must(cudaGetDeviceProperties(&device, 0), "device");
    const double bandwidth = copy_bandwidth();
    FILE *csv = options.csv ? fopen(options.csv, "w") : NULL;
    if (options.csv && !csv) {
        fprintf(stderr, "bench_cuda: cannot write %s\n", options.csv);
        return 1;
    }
    print_head(stdout, options, device, bandwidth);
    printf("# graph, stream: one rkv_compress call for all layers, replayed or launched; x floor: "
           "graph over floor;\n# differ: tokens of the first layer that only the GPU keeps; torch: "
           "the plain formulation on this card\n# %-32s %6s %6s %5s %8s %9s %10s %10s %8s %7s %12s "
           "%8s\n",
           "case", "n", "kept", "type", "GB", "floor us", "graph us", "stream us", "x floor",
           "differ", "torch us", "x graph");
    if (csv) {
        print_head(csv, options, device, bandwidth);
        fprintf(csv,
                "case,layers,batch,kv_heads,group,head_dim,n_tokens,budget,dtype,bytes,floor_us,"
                "graph_us,stream_us,x_floor,differ,workspace_bytes,torch_us\n");
    }
    for (int i = 0; i < N_CASES; i++)
        if (!options.only || strcmp(options.only, cases[i].name) == 0)
            failed += !run_case(cases[i], options, static_cast<size_t>(device.l2CacheSize),
                                bandwidth, csv);
    if (csv) fclose(csv);
    if (failed) printf("FAIL  %d cases keep other rows than the CPU\n", failed);
    return failed > 0;
}
