/* Compares rkv_cuda.cu with the CPU: on a GPU, or without one as C++ over tests/cuda/shim.h.
 *     make test (shim)    make test-cuda-ptx (PTX, over tests/cuda/ptx.cc)    make test-cuda (GPU)
 * test_cuda FIRST COUNT runs generated cases only; test_cuda policy [FIRST COUNT] those of policies
 * beside R-KV. test_cuda kernels [COUNT] runs every kernel in
 * little time, for the sanitizers: chosen cases and the first COUNT generated ones. */
#ifndef RKV_CUDA_SHIM
#include <cuda_runtime.h>
#endif
#define RKV_CUDA
extern "C" {
#include "golden_names.h"
#include "harness.h"
#include "oracle.h"
}
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vector>

#ifdef RKV_CUDA_SHIM
static const bool on_gpu = false;
static const uint64_t default_cases = 80;
#else
static const bool on_gpu = true;
static const uint64_t default_cases = 1500;
#endif

static double worst_score; /* largest difference from the CPU, as a share of the largest score */
static long sets_equal, sets_differ_in_ties;

/* ---- A backend that works on host memory by way of the device -------------------------------
 * The harness knows host memory only. So each stage copies everything to the device, byte for byte
 * at the same alignment, runs the CUDA stage, and copies it back. A fault that the device has found
 * becomes the status. config.device_error may be host memory here. */
static void must(const char *what, bool holds)
{
    if (holds) return;
    printf("FAIL  %s\n0 passed, 1 failed, 0 skipped\n", what);
    exit(1);
}
static void to_device(void *device, const void *host, size_t bytes)
{
    must("copy to the device",
         cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, NULL) == cudaSuccess &&
             cudaStreamSynchronize(NULL) == cudaSuccess);
}
static void to_host(void *host, const void *device, size_t bytes)
{
    must("copy to the host",
         cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, NULL) == cudaSuccess &&
             cudaStreamSynchronize(NULL) == cudaSuccess);
}

struct mirror {
    struct piece {
        char *base, *device;
        void *host;
        size_t bytes;
        bool writable;
    };
    std::vector<piece> pieces;
    ~mirror()
    {
        for (size_t i = 0; i < pieces.size(); i++) (void)cudaFree(pieces[i].base);
    }
    /* Memory on the device at the same alignment, with nothing in it nor behind it. */
    template <typename T> T *reserve(T *host, size_t bytes, bool writable)
    {
        void *base = NULL;
        const size_t skew = reinterpret_cast<uintptr_t>(host) % 16;
        must("device memory", cudaMalloc(&base, skew + (bytes ? bytes : 1)) == cudaSuccess);
        piece p = { static_cast<char *>(base), static_cast<char *>(base) + skew,
                    const_cast<void *>(static_cast<const void *>(host)), bytes, writable };
        pieces.push_back(p);
        return reinterpret_cast<T *>(p.device);
    }
    template <typename T> T *add(T *host, size_t bytes, bool writable)
    {
        if (!host) return NULL;
        T *device = reserve(host, bytes, writable);
        to_device(pieces.back().device, host, bytes);
        return device;
    }
    /* The same of an array that ends later than what is used of it. */
    template <typename T> T *add_part(T *host, size_t used, size_t bytes)
    {
        if (!host) return NULL;
        T *device = reserve(host, bytes, true);
        pieces.back().bytes = used;
        to_device(pieces.back().device, host, used);
        return device;
    }
    void copy_back() const
    {
        for (size_t i = 0; i < pieces.size(); i++)
            if (pieces[i].writable) to_host(pieces[i].host, pieces[i].device, pieces[i].bytes);
    }
};

static size_t or_else(int64_t given, size_t otherwise)
{
    return given ? static_cast<size_t>(given) : otherwise;
}
static rkv_tensor mirror_tensor(mirror *m, const rkv_tensor &host, int n_tokens, bool writable)
{
    rkv_tensor t = host;
    const bool is_opaque = t.dtype == RKV_OPAQUE; /* strides in bytes */
    const size_t dim = static_cast<size_t>(is_opaque ? t.element_bytes : t.dim);
    const size_t heads = static_cast<size_t>(t.heads);
    const size_t numbers = static_cast<size_t>(element_dims(t.dtype)); /* of an element */
    const size_t rows = static_cast<size_t>(t.block_table ? t.block_tokens : t.tokens);
    const size_t element =
        t.element_bytes && !is_opaque ? static_cast<size_t>(t.element_bytes) : dtype_bytes(t.dtype);
    size_t last = (dim - 1) * or_else(t.dim_stride, 1) + (rows - 1) * or_else(t.token_stride, dim) +
                  (heads - 1) * or_else(t.head_stride, rows * dim);
    if (!t.data) return t;
    if (t.block_table) {
        const int n_blocks = (n_tokens + t.block_tokens - 1) / t.block_tokens;
        int32_t highest = 0;
        for (int i = 0; i < n_blocks; i++)
            if (t.block_table[i] > highest) highest = t.block_table[i];
        last += static_cast<size_t>(highest) * or_else(t.block_stride, heads * rows * dim);
        t.block_table =
            m->add(t.block_table, static_cast<size_t>(n_blocks) * sizeof(int32_t), false);
    }
    t.data = m->add(static_cast<char *>(t.data), (last / numbers + 1) * element, writable);
    return t;
}

static size_t n_frequencies(const rkv_layer &layer)
{
    return static_cast<size_t>(layer.rope.dims ? layer.rope.dims : layer.keys.dim) / 2;
}

static rkv_layer mirror_layer(mirror *m, const rkv_config *config, const rkv_layer &host,
                              bool leads)
{
    rkv_layer layer = host;
    const size_t sets =
        config->scope == RKV_PER_HEAD ? static_cast<size_t>(host.keys.heads) : leads;
    const size_t candidates =
        host.n_tokens > config->window ? static_cast<size_t>(host.n_tokens - config->window) : 0;
    const size_t stride = or_else(host.row_stride, static_cast<size_t>(host.keys.tokens));
    const size_t last = sets == 0 ? 0 : (sets - 1) * stride + static_cast<size_t>(host.n_tokens);
    layer.keys = mirror_tensor(m, host.keys, host.n_tokens, true);
    layer.values = mirror_tensor(m, host.values, host.n_tokens, true);
    const size_t planes = static_cast<size_t>(host.keys.heads * rkv_state_floats(config));
    const size_t n_rows = static_cast<size_t>(host.n_tokens);
    layer.queries =
        mirror_tensor(m, host.queries, config->votes ? config->votes : config->window, false);
    layer.kept = m->add(host.kept, sets * static_cast<size_t>(config->budget) * 4, true);
    layer.positions = m->add_part(host.positions, last * 4, sets * stride * 4);
    layer.pins = m->add_part(host.pins, last, sets * stride);
    layer.scores = m->add(host.scores, static_cast<size_t>(host.keys.heads) * candidates * 4, true);
    layer.shared_scores = m->add(host.shared_scores, candidates * 4, true);
    const size_t heads = static_cast<size_t>(host.keys.heads);
    layer.bias = m->add_part(host.bias, ((heads - 1) * stride + n_rows) * 4, heads * stride * 4);
    layer.state = NULL;
    if (planes)
        layer.state =
            m->add_part(host.state, ((planes - 1) * stride + n_rows) * 4, planes * stride * 4);
    layer.rope.frequencies = m->add(host.rope.frequencies, n_frequencies(host) * 4, false);
    layer.query_means = m->add(
        host.query_means, rkv_query_means_floats(host.queries.heads, host.keys.dim) * 4, false);
    return layer;
}

static const rkv_backend *cuda()
{
    return rkv_backend_find("cuda");
}
static const stage_function stages[] = { rkv_score, rkv_select, rkv_compact, rkv_compress };

static rkv_status run_mirrored(const rkv_backend *, const rkv_call *call)
{
    const size_t guard_bytes = 64;
    const rkv_config *config = call->config;
    std::vector<unsigned char> guard(guard_bytes, 0x5a);
    std::vector<rkv_layer> on_device;
    rkv_error found = { NULL, RKV_OK, -7, -7, -7 };
    rkv_error *const record = config->device_error ? config->device_error : &found;
    rkv_config device_config = *config;
    mirror m;
    for (int l = 0; l < call->n_layers; l++) {
        const rkv_layer *layers = call->layers;
        const bool leads = config->scope != RKV_PER_SEQUENCE || l == 0 ||
                           layers[l].sequence != layers[l - 1].sequence;
        on_device.push_back(mirror_layer(&m, config, layers[l], leads));
    }
    device_config.device_error = m.add(record, sizeof *record, true);
    unsigned char *workspace = m.reserve(guard.data() + 1, call->bytes + guard_bytes, false);
    to_device(workspace + call->bytes, guard.data(), guard_bytes);
    rkv_status status = stages[call->stage](cuda(), &device_config, on_device.data(),
                                            call->n_layers, workspace, call->bytes);
    if (cuda()->synchronize(cuda()) != RKV_OK) return RKV_ERROR_DEVICE;
    m.copy_back();
    to_host(guard.data(), workspace + call->bytes, guard_bytes);
    for (size_t i = 0; i < guard_bytes; i++)
        if (!expect_int("behind the workspace", static_cast<int>(i), guard[i], 0x5a)) break;
    if (status == RKV_OK) status = static_cast<rkv_status>(record->status);
    for (int l = 0; l < call->n_layers && status == RKV_OK; l++) {
        call->layers[l].n_tokens = on_device[static_cast<size_t>(l)].n_tokens;
        call->layers[l].n_kept = on_device[static_cast<size_t>(l)].n_kept;
        call->layers[l].n_new = on_device[static_cast<size_t>(l)].n_new;
    }
    return status;
}
static rkv_status mirrored_size(const rkv_backend *, const rkv_config *config,
                                const rkv_layer *layers, int n_layers, size_t *bytes)
{
    return cuda()->workspace_size(cuda(), config, layers, n_layers, bytes);
}

static const rkv_backend mirrored = { "cuda by way of host memory",
                                      NULL,
                                      mirrored_size,
                                      run_mirrored,
                                      NULL,
                                      NULL,
                                      NULL,
                                      NULL,
                                      NULL,
                                      NULL,
                                      NULL };

/* Sets the order of blocks and threads; every other order runs on few blocks. */
static void shim_order_is(int order)
{
#ifdef RKV_CUDA_SHIM
    shim().order = order % SHIM_ORDERS;
    shim().max_blocks = order % 2 ? 3 : 0;
#else
    (void)order;
#endif
}

/* ---- Judging a run -------------------------------------------------------------------------- */
enum { MAX_JOBS = 40, FEW_JOBS = 4 };
struct trial {
    rkv_config config;
    job cpu[MAX_JOBS], gpu[MAX_JOBS];
    int n_jobs;
    bool staged;
};

static bool is_scored(const trial &t, int i)
{
    const rkv_config &c = t.config;
    return t.cpu[i].shape.n_tokens > c.budget && c.budget > config_protect(&c) + c.pinned;
}

/* The scores of a head or a set must equal the CPU's within 1e-5 of the largest, or of the largest
 * of the two terms where these cancel: a softmax over n has a value of at least 1 / n. Returns that
 * bound. */
static double judge_scores(const char *at, const rkv_config *config, const float *got,
                           const float *want, int n)
{
    const double lambda = static_cast<double>(config->lambda);
    double largest = fmax(lambda, 1 - lambda) / (n + config_window(config));
    for (int j = 0; j < n; j++) largest = fmax(largest, fabs(static_cast<double>(want[j])));
    for (int j = 0; j < n; j++) {
        const double difference = fabs(static_cast<double>(got[j]) - static_cast<double>(want[j]));
        worst_score = fmax(worst_score, difference / largest);
        if (!expect_near(at, j, static_cast<double>(got[j]), static_cast<double>(want[j]),
                         1e-5 * largest))
            break;
    }
    return 1e-5 * largest;
}

/* The kept set must follow exactly from the GPU's own scores, and equal the CPU's except for near
 * ties. */
static void judge_set(const trial &t, int i, int set, const float *got, const float *want,
                      double tolerance)
{
    const job &gpu = t.gpu[i], &cpu = t.cpu[i];
    const int n = gpu.shape.n_tokens, candidates = n - gpu.window, budget = t.config.budget;
    const int32_t *kept = job_kept(&gpu) + set * budget, *other = job_kept(&cpu) + set * budget;
    std::vector<double> exact(got, got + candidates);
    std::vector<int32_t> chosen(static_cast<size_t>(n));
    std::vector<char> differs(static_cast<size_t>(n), 0);
    double gap, cut = INFINITY;
    const uint8_t *pins = job_pins(&gpu, set);
    const int n_kept = oracle_select(&t.config, exact.data(), pins, n, chosen.data(), &gap);
    for (int k = 0; k < n_kept; k++)
        if (!expect_int("kept, given the scores", k, kept[k], chosen[static_cast<size_t>(k)]))
            return;
    for (int k = 0; k < n_kept; k++) {
        differs[static_cast<size_t>(kept[k])] ^= 1;
        differs[static_cast<size_t>(other[k])] ^= 1;
        if (other[k] >= t.config.pinned && other[k] < n - config_protect(&t.config) &&
            !(pins && pins[other[k]]))
            cut = fmin(cut, static_cast<double>(want[other[k]]));
    }
    bool equal = true;
    for (int j = 0; j < candidates; j++)
        if (differs[static_cast<size_t>(j)]) {
            equal = false;
            expect_near("kept by one only, so near the cut", j, static_cast<double>(want[j]), cut,
                        2 * tolerance);
        }
    (equal ? sets_equal : sets_differ_in_ties)++;
}

static void judge_sets(const trial &t, int i)
{
    const job &gpu = t.gpu[i], &cpu = t.cpu[i];
    const int candidates = gpu.shape.n_tokens - gpu.window;
    for (int h = 0; h < gpu.shape.kv_heads && is_scored(t, i); h++) {
        const float *got = job_scores(&gpu) + h * candidates,
                    *want = job_scores(&cpu) + h * candidates;
        const double tolerance = judge_scores("score", &t.config, got, want, candidates);
        if (t.config.scope == RKV_PER_HEAD) judge_set(t, i, h, got, want, tolerance);
    }
    if (t.config.scope == RKV_PER_HEAD || gpu.shape.follower || !is_scored(t, i)) return;
    const double tolerance =
        judge_scores("shared score", &t.config, job_shared(&gpu), job_shared(&cpu), candidates);
    judge_set(t, i, 0, job_shared(&gpu), job_shared(&cpu), tolerance);
}

static void judge(const trial &t)
{
    int leader = 0;
    for (int i = 0; i < t.n_jobs; i++) {
        const job &gpu = t.gpu[i];
        const int n = gpu.shape.n_tokens, n_kept = n < t.config.budget ? n : t.config.budget;
        if (!gpu.shape.follower) leader = i;
        judge_sets(t, i);
        job_guards("guards", &gpu);
        job_compacted("compacted", &gpu, job_kept(&t.gpu[leader]), t.config.budget, n_kept);
        expect_int("n_tokens", i, gpu.layer.n_tokens, n_kept);
        expect_int("n_kept", i, gpu.layer.n_kept, n_kept);
    }
}

static bool run_trial(trial *t)
{
    const rkv_backend *best = rkv_backend_find(NULL);
    const rkv_status cpu = call_stage(rkv_compress, best, &t->config, t->cpu, t->n_jobs);
    const rkv_status gpu = t->staged
                               ? call_stages(&mirrored, &t->config, t->gpu, t->n_jobs)
                               : call_stage(rkv_compress, &mirrored, &t->config, t->gpu, t->n_jobs);
    if (!expect_status("CPU", cpu, RKV_OK) || !expect_status("CUDA", gpu, RKV_OK)) return false;
    judge(*t);
    return true;
}
static void add_job(trial *t, rng *r, const shape &s, float scale, float softcap)
{
    rng again = *r;
    job *cpu = &t->cpu[t->n_jobs], *gpu = &t->gpu[t->n_jobs];
    t->n_jobs++;
    job_make(cpu, r, &t->config, &s);
    job_make(gpu, &again, &t->config, &s);
    cpu->layer.scale = gpu->layer.scale = scale;
    cpu->layer.softcap = gpu->layer.softcap = softcap;
    cpu->remembered = cpu->layer;
    gpu->remembered = gpu->layer;
}
static void free_trial(trial *t)
{
    for (int i = 0; i < t->n_jobs; i++) {
        job_free(&t->cpu[i]);
        job_free(&t->gpu[i]);
    }
    t->n_jobs = 0;
}

/* ---- Generated cases ------------------------------------------------------------------------ */
static rkv_config any_config(rng *r, int n)
{
    static const int protects[] = { 0, 0, 0, 1, 12, 40 };
    static const int windows[] = { 0, 0, 1, 2, 8, 17, 33 }, pools[] = { 0, 0, 1, 2, 5, 64 };
    static const int recents[] = { 0, 0, 0, 2, 3, 17, 100 }, pins[] = { 0, 0, 1, 4 };
    static const int thresholds[] = { -20, 0, 50, 50, 50, 70, 99 },
                     lambdas[] = { 0, 7, 10, 10, 50, 100 };
    rkv_config c = rkv_config_default(1);
    c.window = RNG_PICK(r, windows);
    if (config_window(&c) >= n) c.window = 1;
    c.pinned = RNG_PICK(r, pins);
    c.protect = RNG_PICK(r, protects);
    if (config_protect(&c) >= n) c.protect = 0;
    const int least = config_protect(&c) + c.pinned;
    c.budget = least + (n > least ? rng_below(r, n - least + 1) : 0);
    c.pool = RNG_PICK(r, pools);
    c.recent = RNG_PICK(r, recents);
    c.threshold = static_cast<float>(RNG_PICK(r, thresholds)) / 100.0f;
    c.lambda = static_cast<float>(RNG_PICK(r, lambdas)) / 100.0f;
    c.scope = static_cast<rkv_scope>(rng_below(r, 3));
    c.variant = static_cast<rkv_variant>(rng_below(r, 3) == 0);
    return c;
}
/* Lengths around the 64 rows of a tile and around the steps of the scan: 16, 80, 144 and 208
 * columns, with or without the window. */
static int any_length(rng *r)
{
    static const int edges[] = { 15, 16, 17, 24, 63, 64, 65, 79, 81, 88, 127, 128, 129, 145, 152 };
    static const int far_edges[] = { 192, 200, 207, 208, 209, 215, 216, 217, 257, 320, 513, 640 };
    if (rng_below(r, 8) == 0) return RNG_PICK(r, far_edges);
    return rng_below(r, 2) ? RNG_PICK(r, edges) : 1 + rng_below(r, 180);
}
/* Keys and values of another type than the queries, at any address. */
static void other_keys(rng *r, shape *s)
{
    static const rkv_dtype types[] = { RKV_F16, RKV_BF16, RKV_F8_E4M3, RKV_F8_E5M2, RKV_Q8_0 };
    s->key_dtype = types[rng_below(r, 5)];
    s->misalign = static_cast<size_t>(rng_below(r, 16));
    if (s->key_dtype == s->dtype) s->misalign = 0;
    if (s->key_dtype != RKV_Q8_0) return;
    s->head_dim = (s->head_dim + 31) / 32 * 32;
    s->value_dim = (s->value_dim + 31) / 32 * 32;
    s->value_bytes = 0;
    if (s->values >= N_KEY_LAYOUTS) s->values = LAYOUT_PAGED_NHD;
}

static shape any_shape(rng *r, int n, int window)
{
    static const int dims[] = { 1, 7, 16, 20, 64, 64, 67, 96, 128, 128, 136, 192, 256, 576 };
    static const int groups[] = { 1, 2, 4, 4, 7, 8, 71 }, sizes[] = { 0, 0, 0, 1, 3, 8, 16, 34 };
    static const int exponents[] = { 0, 0, 0, 0, -6, 5 }, percents[] = { 2, 20, 100 };
    shape s;
    memset(&s, 0, sizeof s);
    s.kv_heads = 1 + rng_below(r, 3);
    s.head_dim = RNG_PICK(r, dims);
    s.group = RNG_PICK(r, groups);
    s.n_tokens = n;
    while (!on_gpu && s.head_dim > 64 && static_cast<double>(n) * n * s.head_dim > 8e6)
        s.head_dim /= 2;
    while (!on_gpu && s.group > 1 && s.group * window > 80) s.group /= 2;
    s.capacity = n + rng_below(r, 20);
    s.value_dim = 1 + rng_below(r, 90);
    s.dtype = static_cast<rkv_dtype>(rng_below(r, 3));
    s.value_bytes = RNG_PICK(r, sizes);
    s.keys = static_cast<layout>(rng_below(r, N_KEY_LAYOUTS));
    s.values = static_cast<layout>(rng_below(r, N_LAYOUTS));
    s.queries = static_cast<layout>(rng_below(r, N_KEY_LAYOUTS));
    s.kind = static_cast<key_kind>(rng_below(r, N_KEY_KINDS));
    s.strength = 0.2 + 0.75 * rng_unit(r);
    s.sharpness = 0.5 + rng_unit(r);
    if (s.kind != KEYS_TINY) s.key_exponent = RNG_PICK(r, exponents);
    s.misalign = rng_below(r, 3) ? 0 : 4 * static_cast<size_t>(rng_below(r, 4));
    if (rng_below(r, 3) == 0) other_keys(r, &s);
    if (rng_below(r, 2)) s.row_stride = s.capacity + rng_below(r, 3);
    if (rng_below(r, 3) == 0) s.pins = RNG_PICK(r, percents);
    return s;
}

static void test_generated(uint64_t seed)
{
    rng r = rng_seed(seed);
    int n = any_length(&r), sequence = 1;
    trial t;
    memset(&t, 0, sizeof t);
    t.config = any_config(&r, n);
    t.staged = seed % 2 == 0;
    const int n_jobs = 1 + (rng_below(&r, 3) == 0 ? rng_below(&r, FEW_JOBS) : 0);
    for (int i = 0; i < n_jobs; i++) {
        const bool joins = i > 0 && t.config.scope == RKV_PER_SEQUENCE && rng_below(&r, 3) > 0;
        if (i > 0 && !joins) n = any_length(&r), sequence++;
        shape s = any_shape(&r, n, config_window(&t.config));
        s.sequence = sequence;
        s.follower = joins;
        const float scale = rng_below(&r, 4) ? 0.0f : 0.1f,
                    softcap = rng_below(&r, 5) ? 0.0f : 3.0f;
        add_job(&t, &r, s, scale, softcap);
    }
    const shape &s = t.cpu[0].shape;
    const rkv_config &c = t.config;
    case_begin(
        "build/tests/test_cuda %lu 1: H%d G%d d%d n%d type %d %s keys, %s, budget %d window "
        "%d protect %d pinned %d pins %d recent %d lambda %.2f T %.2f scope %d variant %d, %d "
        "layers",
        static_cast<unsigned long>(seed), s.kv_heads, s.group, s.head_dim, s.n_tokens, s.dtype,
        key_kind_name(s.kind), layout_name(s.keys), c.budget, c.window, c.protect, c.pinned, s.pins,
        c.recent, static_cast<double>(c.lambda), static_cast<double>(c.threshold), c.scope,
        c.variant, t.n_jobs);
    shim_order_is(static_cast<int>(seed / 2 % 6));
    run_trial(&t);
    case_end();
    free_trial(&t);
}

/* ---- Chosen cases --------------------------------------------------------------------------- */
static shape plain_shape(int heads, int group, int dim, int n, rkv_dtype dtype)
{
    shape s;
    memset(&s, 0, sizeof s);
    s.kv_heads = heads;
    s.group = group;
    s.head_dim = dim;
    s.n_tokens = n;
    s.dtype = dtype;
    s.kind = KEYS_SHARED;
    s.strength = 0.5;
    return s;
}
static void run_one(const rkv_config &config, const shape &s, uint64_t seed)
{
    rng r = rng_seed(seed);
    trial t;
    memset(&t, 0, sizeof t);
    t.config = config;
    add_job(&t, &r, s, 0, 0);
    run_trial(&t);
    free_trial(&t);
}

/* The second scan is for rows that have no similar key among the newest; here with a few that
 * have, in the same head. */
static void test_far_scan()
{
    static const int lengths[] = { 257, 400, 640 };
    for (int i = 0; i < 3; i++)
        for (int recent = 1; recent < 4; recent += 2)
            for (int type = RKV_F32; type <= RKV_BF16; type++) {
                rkv_config config = rkv_config_default(200);
                shape s = plain_shape(1, 2, 32, lengths[i], static_cast<rkv_dtype>(type));
                config.recent = recent;
                config.variant = recent == 1 ? RKV_PUBLISHED : RKV_PAPER;
                s.kind = type == RKV_F32 ? KEYS_ISOTROPIC : KEYS_REPEATS;
                case_begin("far scan, n %d, recent %d, type %d", lengths[i], recent, type);
                run_one(config, s, 11 + static_cast<uint64_t>(i));
                case_end();
            }
}

/* Runs a layer of these keys and queries on both. */
static void run_given(const rkv_config &config, const shape &s, const std::vector<float> &keys,
                      const std::vector<float> &queries)
{
    trial t;
    memset(&t, 0, sizeof t);
    t.config = config;
    t.n_jobs = 1;
    for (int device = 0; device < 2; device++) {
        rng r = rng_seed(61);
        job_make_from(device ? &t.gpu[0] : &t.cpu[0], &r, &t.config, &s, keys.data(),
                      queries.data());
    }
    run_trial(&t);
    free_trial(&t);
}

/* Few rows that search far: some resemble each other only, two resemble none. */
static void test_few_far_rows()
{
    static const int alike[] = { 3, 7, 100, 101, 130, 200 };
    static const rkv_dtype types[] = { RKV_F32, RKV_F16, RKV_BF16, RKV_F8_E4M3, RKV_Q8_0 };
    for (int recent = 1; recent < 4; recent += 2)
        for (rkv_dtype type : types) {
            rkv_config config = rkv_config_default(200);
            shape s = plain_shape(1, 1, 32, 640, type);
            std::vector<float> keys(640 * 32), queries(8 * 32, 0.25f);
            rng r = rng_seed(17);
            for (size_t i = 0; i < keys.size(); i++)
                keys[i] = 0.05f * static_cast<float>(rng_normal(&r)) + (i % 32 == 0 ? 1.0f : 0.0f);
            for (int row : alike) keys[static_cast<size_t>(row) * 32] = 0;
            for (int row : alike) keys[static_cast<size_t>(row) * 32 + 1] += 1.0f;
            keys[0] = keys[50 * 32] = 0; /* these resemble none; each other a little */
            keys[2] = keys[50 * 32 + 3] = 1.0f;
            keys[50 * 32 + 2] = 0.3f;
            if (type > RKV_BF16) {
                s.dtype = RKV_F16;
                s.key_dtype = type;
            }
            config.recent = recent;
            config.variant = recent == 1 ? RKV_PUBLISHED : RKV_PAPER;
            config.lambda = 0;
            case_begin("few rows of the far scan, recent %d, type %d", recent, type);
            run_given(config, s, keys, queries);
            case_end();
        }
}

/* Cosines that equal the threshold exactly: not above it, so not similar. */
static void test_at_threshold()
{
    for (int type = RKV_F32; type <= RKV_BF16; type++)
        for (int threshold = 0; threshold < 2; threshold++) {
            const shape s = plain_shape(1, 1, 16, 90, static_cast<rkv_dtype>(type));
            std::vector<float> keys(90 * 16, 0.0f), queries(8 * 16);
            rng r = rng_seed(61);
            rkv_config config = rkv_config_default(30);
            case_begin("cosines 0 and 1, threshold %d, type %d", threshold, type);
            config.threshold = static_cast<float>(threshold);
            for (size_t i = 0; i < 90; i++) keys[i * 16 + i % 4] = 1.0f;
            for (size_t i = 0; i < queries.size(); i++)
                queries[i] = static_cast<float>(rng_normal(&r));
            run_given(config, s, keys, queries);
            case_end();
        }
}

/* Cosines so close to the threshold that rounding decides: both must round in the same way. */
static void test_near_threshold()
{
    static const int dims[] = { 48, 64, 100, 160 };
    for (int i = 0; i < 4; i++)
        for (int recent = 1; recent < 4; recent += 2) {
            rkv_config config = rkv_config_default(64);
            shape s = plain_shape(2, 1, dims[i], 330, RKV_F32);
            config.recent = recent;
            s.kind = KEYS_HALF;
            case_begin("cosines of one half, d%d, recent %d", dims[i], recent);
            run_one(config, s, 71 + static_cast<uint64_t>(i));
            case_end();
        }
}

/* The same with keys that every type can represent: rows differ by a power of two and by the sign
 * of one element in eight, all of equal size, so that the order of additions decides. */
static void test_near_threshold_signs()
{
    static const int dims[] = { 48, 128, 144 };
    for (int i = 0; i < 3; i++)
        for (int type = RKV_F32; type <= RKV_BF16; type++) {
            const int n = 330, dim = dims[i];
            const shape s = plain_shape(1, 1, dim, n, static_cast<rkv_dtype>(type));
            std::vector<float> keys, queries, sizes;
            rng r = rng_seed(91);
            rkv_config config = rkv_config_default(64);
            case_begin("signs, cosines of one half, d%d, type %d", dim, type);
            config.recent = 2;
            for (int k = 0; k < dim; k += 8) sizes.push_back(static_cast<float>(rng_normal(&r)));
            for (int row = 0; row < n; row++) {
                const int against = rng_below(&r, 8);
                const float length = static_cast<float>(1 << rng_below(&r, 3));
                for (int k = 0; k < dim; k++)
                    keys.push_back(sizes[static_cast<size_t>(k / 8)] *
                                   (k % 8 == against ? -length : length));
            }
            for (int k = 0; k < 8 * dim; k++) queries.push_back(static_cast<float>(rng_normal(&r)));
            run_given(config, s, keys, queries);
            case_end();
        }
}

/* All rows exempt the same token, so the errors of its cosines add up in its score. */
static void test_common_similar_key()
{
    static const int dims[] = { 128, 256, 272 };
    for (int i = 0; i < 3; i++)
        for (int type = RKV_F16; type <= RKV_BF16; type++)
            for (int alike = 0; alike < 2; alike++) {
                rkv_config config = rkv_config_default(64);
                shape s = plain_shape(1, 1, dims[i], 270, static_cast<rkv_dtype>(type));
                s.kind = alike ? KEYS_IDENTICAL : KEYS_SHARED;
                s.strength = 0.9;
                config.lambda = 0.0f;
                case_begin("a key similar to all, %s, d%d, type %d", key_kind_name(s.kind), dims[i],
                           type);
                run_one(config, s, 81 + static_cast<uint64_t>(i));
                case_end();
            }
}

/* Many layers of many shapes, some with nothing to do: several uploads. Then: few launches. */
static void test_many_layers()
{
    static const int lengths[] = { 100, 70, 40, 129, 64 };
    trial t;
    rng r = rng_seed(5);
    case_begin("40 layers of mixed shapes");
    memset(&t, 0, sizeof t);
    t.config = rkv_config_default(64);
    for (int l = 0; l < MAX_JOBS; l++) {
        const rkv_dtype dtype = static_cast<rkv_dtype>(l < 30 ? RKV_BF16 : l % 3);
        shape s = plain_shape(l < 34 ? 2 : 3, 4, l < 36 ? 64 : 40, lengths[l % 5], dtype);
        s.keys = l % 7 == 6 ? LAYOUT_PAGED_NHD : LAYOUT_CONTIGUOUS;
        s.sequence = l / 4;
        add_job(&t, &r, s, 0, 0);
    }
    run_trial(&t);
    case_end();
    free_trial(&t);
#ifdef RKV_CUDA_SHIM
    case_begin("launches of one call");
    for (int l = 0; l < 28; l++) add_job(&t, &r, plain_shape(2, 2, 16, 80, RKV_F16), 0, 0);
    for (int scope = 0; scope < 3; scope++) {
        t.config.scope = static_cast<rkv_scope>(scope);
        for (int l = 0; l < t.n_jobs; l++) {
            job_restore(&t.gpu[l]);
            if (scope == RKV_PER_SEQUENCE && l > 0)
                t.gpu[l].layer.kept = t.gpu[l].layer.positions = NULL,
                t.gpu[l].layer.shared_scores = NULL;
        }
        const long before = shim().launches;
        expect_status("28 layers", call_stage(rkv_compress, &mirrored, &t.config, t.gpu, t.n_jobs),
                      RKV_OK);
        expect_true("at most 8", shim().launches - before <= 8);
    }
    case_end();
    free_trial(&t);
    case_begin("40 layers of one shape: an upload that is full, and another");
    t.config.scope = RKV_PER_HEAD;
    for (int l = 0; l < MAX_JOBS; l++) add_job(&t, &r, plain_shape(1, 1, 16, 80, RKV_F16), 0, 0);
    run_trial(&t);
    case_end();
    free_trial(&t);
#endif
}

/* A long sequence beside short ones: a block has several of its tiles. */
static void test_mixed_lengths()
{
    for (int type = RKV_F32; type <= RKV_BF16; type++) {
        trial t;
        rng r = rng_seed(6);
        case_begin("700 tokens beside 7 times 70, type %d", type);
        memset(&t, 0, sizeof t);
        t.config = rkv_config_default(48);
        for (int l = 0; l < 8; l++) {
            shape s = plain_shape(1, 4, 32, l == 2 ? 700 : 70, static_cast<rkv_dtype>(type));
            s.kind = l == 2 ? KEYS_REPEATS : KEYS_SHARED;
            add_job(&t, &r, s, 0, 0);
        }
        run_trial(&t);
        case_end();
        free_trial(&t);
    }
}

/* Five runs give the same bits, in whatever order blocks and threads run. */
static void test_determinism()
{
    for (int type = RKV_F32; type <= RKV_BF16; type++) {
        rkv_config config = rkv_config_default(100);
        shape s = plain_shape(2, 4, 64, 600, static_cast<rkv_dtype>(type));
        rng r = rng_seed(77);
        job j;
        std::vector<unsigned char> kept, scores, rows;
        case_begin("five runs, the same bits, type %d", type);
        s.kind = KEYS_REPEATS;
        job_make(&j, &r, &config, &s);
        for (int run = 0; run < 5; run++) {
            shim_order_is(run);
            job_restore(&j);
            expect_status("run", call_stage(rkv_compress, &mirrored, &config, &j, 1), RKV_OK);
            if (run == 0) {
                kept.assign(j.kept.data, j.kept.data + j.kept.bytes);
                scores.assign(j.scores.data, j.scores.data + j.scores.bytes);
                rows.assign(j.keys.memory.data, j.keys.memory.data + j.keys.memory.bytes);
            }
            expect_bytes("kept", j.kept.data, kept.data(), kept.size());
            expect_bytes("scores", j.scores.data, scores.data(), scores.size());
            expect_bytes("keys", j.keys.memory.data, rows.data(), rows.size());
        }
        shim_order_is(0);
        case_end();
        job_free(&j);
    }
}

/* ---- Golden vectors ------------------------------------------------------------------------- */
/* tests/golden/README.md has the formats. Numbers are read as on a little-endian host. */
struct golden {
    std::vector<unsigned char> bytes;
    size_t at;
    int heads, group, dim, n, budget, window, pool, rounds;
    rkv_dtype dtype;
    rkv_config config;
    template <typename T> std::vector<T> take(size_t count)
    {
        std::vector<T> out(count);
        must("golden file too short", at + count * sizeof(T) <= bytes.size());
        memcpy(out.data(), bytes.data() + at, count * sizeof(T));
        at += count * sizeof(T);
        return out;
    }
    std::vector<float> numbers(size_t count)
    {
        if (dtype == RKV_F32) return take<float>(count);
        const std::vector<uint16_t> bits = take<uint16_t>(count);
        std::vector<float> out(count);
        for (size_t i = 0; i < count; i++)
            out[i] = dtype == RKV_F16 ? f16_to_float(bits[i]) : bf16_to_float(bits[i]);
        return out;
    }
    size_t size(int a, int b, int c) const
    {
        return static_cast<size_t>(a) * static_cast<size_t>(b) * static_cast<size_t>(c);
    }
};

static bool golden_open(golden *g, const char *name)
{
    char path[256];
    snprintf(path, sizeof path, "tests/golden/%s.rkvg", name);
    FILE *file = fopen(path, "rb");
    if (!file) return false;
    int byte;
    while ((byte = fgetc(file)) != EOF) g->bytes.push_back(static_cast<unsigned char>(byte));
    fclose(file);
    g->at = 12;
    const std::vector<int32_t> head = g->take<int32_t>(9);
    const std::vector<float> reals = g->take<float>(2);
    g->heads = head[0], g->group = head[1], g->dim = head[2], g->n = head[3], g->budget = head[4];
    g->window = head[5], g->pool = head[6], g->dtype = static_cast<rkv_dtype>(head[7]);
    g->rounds = head[8];
    g->config = rkv_config_default(g->budget);
    g->config.window = g->window;
    g->config.pool = g->pool;
    g->config.lambda = reals[0];
    g->config.threshold = reals[1];
    return true;
}

/* One round: n rows whose true positions are slot[head][row]; kept holds the expected ones. */
static void golden_round(const golden &g, const char *name, int n, const std::vector<float> &keys,
                         const std::vector<float> &queries, const std::vector<float> &score,
                         const std::vector<int32_t> &kept, const std::vector<int32_t> &slot)
{
    const shape s = plain_shape(g.heads, g.group, g.dim, n, g.dtype);
    const int candidates = n - g.window;
    double largest = 0;
    rng r = rng_seed(1);
    job j;
    job_make_from(&j, &r, &g.config, &s, keys.data(), queries.data());
    if (expect_status(name, call_stage(rkv_compress, &mirrored, &g.config, &j, 1), RKV_OK)) {
        for (size_t i = 0; i < score.size(); i++)
            largest = fmax(largest, fabs(static_cast<double>(score[i])));
        /* offset_logits: logits near 93, so the importance may differ by 1e-4 */
        const double tolerance = (strstr(name, "offset") ? 1e-4 : 1e-5) * largest;
        for (int i = 0; i < g.heads * candidates; i++)
            if (!expect_near("score", i, static_cast<double>(job_scores(&j)[i]),
                             static_cast<double>(score[static_cast<size_t>(i)]), tolerance))
                break;
        for (int h = 0; h < g.heads && !strstr(name, "tie"); h++) {
            std::vector<char> wanted(static_cast<size_t>(100000), 0);
            for (int k = 0; k < g.budget; k++)
                wanted[static_cast<size_t>(kept[static_cast<size_t>(h * g.budget + k)])] = 1;
            for (int k = 0; k < g.budget; k++) {
                const int row = job_kept(&j)[h * g.budget + k];
                if (!expect_true(
                        "kept",
                        wanted[static_cast<size_t>(slot[static_cast<size_t>(h * n + row)])]))
                    break;
            }
        }
    }
    job_free(&j);
}

static void golden_single(golden *g, const char *name)
{
    const size_t candidates = g->size(g->heads, g->n - g->window, 1);
    const std::vector<float> queries = g->numbers(g->size(g->heads * g->group, g->window, g->dim));
    const std::vector<float> keys = g->numbers(g->size(g->heads, g->n, g->dim));
    g->take<float>(candidates + g->size(g->heads, g->n, 1)); /* importance, redundancy */
    const std::vector<float> score = g->take<float>(candidates);
    const std::vector<int32_t> kept = g->take<int32_t>(g->size(g->heads, g->budget, 1));
    std::vector<int32_t> slot(g->size(g->heads, g->n, 1));
    for (size_t i = 0; i < slot.size(); i++) slot[i] = static_cast<int32_t>(i) % g->n;
    golden_round(*g, name, g->n, keys, queries, score, kept, slot);
}

/* Each round gets its input from the file: the rows that the round before kept, in either order,
 * then the new ones. */
static void golden_multi(golden *g, const char *name)
{
    std::vector<float> all[64]; /* per head, every key so far */
    std::vector<int32_t> before[2];
    int total = 0;
    must("heads of a golden file", g->heads <= 64);
    for (int round = 0; round < g->rounds; round++) {
        const int appended = g->take<int32_t>(1)[0],
                  n = round == 0 ? appended : g->budget + appended;
        const std::vector<float> queries =
            g->numbers(g->size(g->heads * g->group, g->window, g->dim));
        const std::vector<float> fresh = g->numbers(g->size(g->heads, appended, g->dim));
        std::vector<int32_t> kept[2];
        std::vector<float> score[2];
        const size_t per_head = g->size(appended, g->dim, 1), dim = static_cast<size_t>(g->dim);
        for (int i = 0; i < 2; i++) kept[i] = g->take<int32_t>(g->size(g->heads, g->budget, 1));
        for (int i = 0; i < 2; i++) score[i] = g->take<float>(g->size(g->heads, n - g->window, 1));
        g->take<float>(g->size(g->heads, 2, 1));
        for (int h = 0; h < g->heads; h++)
            all[h].insert(
                all[h].end(), fresh.begin() + static_cast<long>(static_cast<size_t>(h) * per_head),
                fresh.begin() + static_cast<long>((static_cast<size_t>(h) + 1) * per_head));
        for (int i = 0; i < 2; i++) {
            std::vector<int32_t> slot;
            std::vector<float> keys;
            for (int h = 0; h < g->heads; h++) {
                for (int k = 0; k < n - appended; k++)
                    slot.push_back(before[i][static_cast<size_t>(h * g->budget + k)]);
                for (int k = 0; k < appended; k++) slot.push_back(total + k);
            }
            for (size_t k = 0; k < slot.size(); k++) {
                const std::vector<float> &from = all[k / static_cast<size_t>(n)];
                const size_t row = static_cast<size_t>(slot[k]) * dim;
                keys.insert(keys.end(), from.begin() + static_cast<long>(row),
                            from.begin() + static_cast<long>(row + dim));
            }
            golden_round(*g, name, n, keys, queries, score[i], kept[i], slot);
            before[i] = kept[i];
        }
        total += appended;
    }
}

static void test_golden()
{
    for (size_t i = 0; i < N_GOLDEN; i++) {
        golden g;
        case_begin("golden %s", golden_names[i]);
        if (!expect_true("tests/golden has it (run from the top folder)",
                         golden_open(&g, golden_names[i]))) {
            case_end();
            continue;
        }
        if (g.bytes[7] == '1')
            golden_single(&g, golden_names[i]);
        else
            golden_multi(&g, golden_names[i]);
        expect_true("the whole file was read", g.at <= g.bytes.size());
        case_end();
    }
}

/* ---- Errors --------------------------------------------------------------------------------- */
/* The text and the place of a record. */
static void expect_record(const char *at, const rkv_error *got, const rkv_error *want)
{
    char a[256], b[256];
    expect_int("error.status", 0, got->status, want->status);
    if (strcmp(rkv_explain(got, a, sizeof a), rkv_explain(want, b, sizeof b)) != 0)
        case_fail("%s: got \"%s\", want \"%s\"", at, a, b);
}

/* A call that the host refuses: this record, and nothing changes. */
static void expect_host_refusal(const rkv_config &given, job *jobs, int n_jobs, stage_function call,
                                rkv_status status, const char *explanation)
{
    rkv_config config = given;
    rkv_error error;
    char text[256];
    memset(&error, 0, sizeof error);
    config.error = &error;
    for (int i = 0; i < n_jobs; i++) block_remember(&jobs[i].kept);
    expect_status(explanation, call_stage(call, &mirrored, &config, jobs, n_jobs), status);
    expect_int("error.status", 0, error.status, status);
    if (strcmp(rkv_explain(&error, text, sizeof text), explanation) != 0)
        case_fail("got \"%s\", want \"%s\"", text, explanation);
    for (int i = 0; i < n_jobs; i++) job_unchanged(explanation, &jobs[i]);
}

/* The CPU and the device find the same fault in the same data, and leave everything as it was. */
static void expect_refused(const rkv_config &given, job *jobs, int n_jobs, stage_function call,
                           rkv_status want)
{
    rkv_config config = given;
    rkv_error on_host, on_device, on_cpu = { NULL, RKV_OK, -1, -1, -1 };
    for (int device = 0; device < 2; device++) {
        memset(&on_host, 0, sizeof on_host);
        memset(&on_device, 0, sizeof on_device);
        config.error = device ? NULL : &on_host;
        config.device_error = device ? &on_device : NULL;
        for (int i = 0; i < n_jobs; i++) block_remember(&jobs[i].kept);
        expect_status(
            device ? "CUDA" : "CPU",
            call_stage(call, device ? &mirrored : rkv_backend_find(NULL), &config, jobs, n_jobs),
            want);
        for (int i = 0; i < n_jobs; i++) job_unchanged(device ? "CUDA" : "CPU", &jobs[i]);
        if (!device) on_cpu = on_host;
    }
    expect_record("the device's record", &on_device, &on_cpu);
}

#include "policies.h"

static void test_faults()
{
    static const struct {
        const char *name;
        int layer, query, head, token;
        float value;
        rkv_dtype key_dtype; /* 0: the queries' */
    } cases[] = {
        { "NaN in a key", 1, 0, 1, 70, NAN, RKV_F32 },
        { "infinity in a key", 0, 0, 0, 0, INFINITY, RKV_F32 },
        { "a huge key", 2, 0, 1, 99, 3e18f, RKV_F32 },
        { "NaN in the window", 0, 0, 1, 97, NAN, RKV_F32 },
        { "NaN in a query", 1, 1, 5, 3, NAN, RKV_F32 },
        { "infinity in a query", 2, 1, 7, 7, -INFINITY, RKV_F32 },
        { "NaN in an e4m3 key", 1, 0, 1, 70, NAN, RKV_F8_E4M3 },
        { "infinity in an e5m2 key", 0, 0, 0, 99, INFINITY, RKV_F8_E5M2 },
        { "NaN in a scale of q8_0", 2, 0, 1, 5, NAN, RKV_Q8_0 },
        { "infinity in a scale of q8_0", 2, 0, 1, 98, INFINITY, RKV_Q8_0 },
        { "NaN in a query beside q8_0", 0, 1, 2, 1, NAN, RKV_Q8_0 },
    };
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        rkv_config config = rkv_config_default(50);
        job jobs[3];
        rng r = rng_seed(c);
        case_begin("%s", cases[c].name);
        for (int i = 0; i < 3; i++) {
            shape s = plain_shape(2, 4, 32, 100, static_cast<rkv_dtype>(c % 2 ? RKV_F16 : RKV_F32));
            s.key_dtype = cases[c].key_dtype;
            job_make(&jobs[i], &r, &config, &s);
        }
        job *bad = &jobs[cases[c].layer];
        view *where = cases[c].query ? &bad->queries : &bad->keys;
        float value = cases[c].value;
        if (bad->shape.dtype != RKV_F32 && value > 1e6f) value = NAN; /* f16 has no huge keys */
        view_store_one(where, cases[c].head, cases[c].token, 5, value);
        view_store_one(where, cases[c].head, cases[c].token, 6, value);
        block_remember(&where->memory);
        shim_order_is(static_cast<int>(c));
        expect_refused(config, jobs, 3, rkv_compress, RKV_ERROR_NONFINITE);
        shim_order_is(0);
        case_end();
        for (int i = 0; i < 3; i++) job_free(&jobs[i]);
    }
}

/* Every finite fp8 code, at every place in a row: the scores are the CPU's. A row has 16 adjacent
 * codes, and so few exponents that each of them counts. */
static void test_f8_codes()
{
    enum { N = 256, DIM = 80 };
    for (int type = RKV_F8_E4M3; type <= RKV_F8_E5M2; type++) {
        const rkv_dtype dtype = static_cast<rkv_dtype>(type);
        const int finite = type == RKV_F8_E4M3 ? 0x7F : 0x7C;
        rng r = rng_seed(static_cast<uint64_t>(type));
        trial t;
        memset(&t, 0, sizeof t);
        t.config = rkv_config_default(100);
        shape s = plain_shape(1, 2, DIM, N, RKV_F16);
        s.key_dtype = dtype;
        case_begin("every %s code", dtype_name(dtype));
        add_job(&t, &r, s, 1e-3f, 0);
        for (int row = 0; row < N; row++)
            for (int i = 0; i < DIM; i++) {
                int code = row % 16 * 16 + (i + row / 16) % 16;
                if ((code & 0x7F) >= finite) code &= 0xF3;
                *view_at(&t.cpu[0].keys, 0, row, i) = static_cast<unsigned char>(code);
                *view_at(&t.gpu[0].keys, 0, row, i) = static_cast<unsigned char>(code);
                t.cpu[0].keys_f32[row * DIM + i] =
                    f8_to_float(dtype, static_cast<unsigned char>(code));
            }
        block_remember(&t.cpu[0].keys.memory);
        block_remember(&t.gpu[0].keys.memory);
        run_trial(&t);
        case_end();
        free_trial(&t);
    }
}

/* A fault of any kind that one stage finds stops the stages queued behind it. */
static void test_queued_stages()
{
    static const struct {
        const char *name;
        int first; /* stage that finds it */
        rkv_status status;
        int token;
    } cases[] = {
        { "a NaN among the keys", 0, RKV_ERROR_NONFINITE, 3 },
        { "a query table with an entry twice", 0, RKV_ERROR_ARGUMENT, 5 },
        { "a NaN among the caller's scores", 1, RKV_ERROR_NONFINITE, 7 },
        { "a pin for every place", 1, RKV_ERROR_ARGUMENT, -1 },
    };
    for (int c = 0; c < 4; c++) {
        rkv_config config = rkv_config_default(50);
        rkv_error error;
        job j;
        rng r = rng_seed(3);
        shape s = plain_shape(2, 4, 32, 100, RKV_F32);
        case_begin("stages queued behind %s", cases[c].name);
        memset(&error, 0, sizeof error);
        config.device_error = &error;
        if (c == 1) s.queries = LAYOUT_ROW_LIST;
        if (c == 3) s.pins = 1;
        job_make(&j, &r, &config, &s);
        int32_t *kept = reinterpret_cast<int32_t *>(j.kept.data);
        for (int i = 0; i < 100; i++) kept[i] = i % 50 * 2;
        if (c == 0) view_store_one(&j.keys, 1, 3, 0, NAN);
        if (c == 1) {
            int32_t *table = reinterpret_cast<int32_t *>(j.queries.table.data);
            table[5] = table[1];
            block_remember(&j.queries.table);
        }
        if (c == 2) reinterpret_cast<float *>(j.scores.data)[7] = NAN;
        if (c == 3) {
            memset(j.pins.data, 1, 42); /* of 92 candidates 42 can be kept */
            memset(j.pins.data + 42, 0, 58);
            block_remember(&j.pins);
            for (int i = 0; i < 184; i++) reinterpret_cast<float *>(j.scores.data)[i] = 0;
        }
        block_remember(&j.keys.memory);
        block_remember(&j.scores);
        block_remember(&j.kept);
        for (int i = cases[c].first; i < 3; i++) {
            j.layer.n_kept = i == 2 ? 50 : 0;
            j.remembered = j.layer;
            expect_status("stage", call_stage(stages[i], &mirrored, &config, &j, 1),
                          cases[c].status);
            job_unchanged("stage", &j);
            expect_int("the fault stays", i, error.status, cases[c].status);
            expect_int("in its place", i, error.token, cases[c].token);
        }
        case_end();
        job_free(&j);
    }
}

/* Kept lists that rkv_compact must refuse. */
static void test_bad_lists()
{
    static const struct {
        const char *name;
        int at, value, pin;
    } cases[] = {
        { "a kept row twice", 20, 19, -1 },
        { "a kept row out of range", 49, 100, -1 },
        { "a negative kept row", 30, -1, -1 },
        { "a pinned row elsewhere", 1, 2, -1 },
        { "descending rows", 30, 90, -1 },
        { "a row with a pin that is not listed", 49, 60, 55 },
        { "a bad row and a row with a pin that is not listed", 49, 100, 0 },
        { "a row out of range, and then rows that descend", 30, 200, -1 },
    };
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++)
        for (int scope = RKV_PER_HEAD; scope <= RKV_PER_LAYER; scope++) {
            rkv_config config = rkv_config_default(50);
            job j;
            rng r = rng_seed(c);
            shape s = plain_shape(2, 1, 32, 100, RKV_BF16);
            case_begin("%s, scope %d", cases[c].name, scope);
            config.pinned = 3;
            config.scope = static_cast<rkv_scope>(scope);
            s.pins = 1;
            job_make(&j, &r, &config, &s);
            const int set = j.sets - 1;
            int32_t *kept = reinterpret_cast<int32_t *>(j.kept.data);
            memset(j.pins.data, 0, j.pins.bytes);
            for (int i = 0; i < 50 * j.sets; i++) kept[i] = i % 50;
            kept[50 * set + cases[c].at] = cases[c].value;
            if (cases[c].pin >= 0) {
                j.pins.data[100 * set + cases[c].pin] = 1;
                j.pins.data[100 * set + 70] = 1;
            }
            block_remember(&j.pins);
            j.layer.n_kept = 50;
            j.remembered = j.layer;
            shim_order_is(static_cast<int>(c));
            expect_refused(config, &j, 1, rkv_compact, RKV_ERROR_ARGUMENT);
            shim_order_is(0);
            case_end();
            job_free(&j);
        }
}

/* One to four faults at random places of three layers. */
static void put_fault(rng *r, job *j)
{
    view *const views[] = { &j->keys, &j->values, &j->queries };
    const int n = j->shape.n_tokens, kind = rng_below(r, 9);
    if (kind < 2) { /* a key, a query */
        view *v = kind == 0 ? &j->keys : &j->queries;
        view_store_one(v, rng_below(r, v->tensor.heads), rng_below(r, kind == 0 ? n : j->window),
                       rng_below(r, j->shape.head_dim), rng_below(r, 2) ? NAN : INFINITY);
        block_remember(&v->memory);
    } else if (kind < 5) { /* a block table */
        view *v = views[kind - 2];
        int32_t *table = reinterpret_cast<int32_t *>(v->table.data);
        const int entries = ((kind == 4 ? j->window : n) - 1) / v->tensor.block_tokens + 1;
        const int at = rng_below(r, entries);
        table[at] = rng_below(r, 2) ? -1 : table[rng_below(r, entries)];
        block_remember(&v->table);
    } else if (kind == 5 && j->layer.pins) { /* as many pins as places, or just a row */
        const size_t row = static_cast<size_t>(rng_below(r, static_cast<int>(j->pins.bytes)));
        memset(j->pins.data + row, 1, rng_below(r, 2) ? 1 : j->pins.bytes - row);
        block_remember(&j->pins);
    } else if (kind == 6) {
        block *b = j->shared.bytes >= 4 && rng_below(r, 2) ? &j->shared : &j->scores;
        reinterpret_cast<float *>(b->data)[rng_below(r, static_cast<int>(b->bytes / 4))] = NAN;
        block_remember(b);
    } else if (kind > 6 && j->kept.bytes > 0) {
        const int entries = static_cast<int>(j->kept.bytes / 4);
        reinterpret_cast<int32_t *>(j->kept.data)[rng_below(r, entries)] = rng_below(r, n + 4) - 2;
    }
}

/* Of several faults in one call both report the same, whatever the order of threads and blocks. */
static void test_many_faults(uint64_t seed)
{
    enum { LAYERS = 3, BUDGET = 40 };
    rng r = rng_seed(seed);
    rkv_config config = rkv_config_default(BUDGET);
    rkv_error on_cpu, on_device = { NULL, RKV_OK, -1, -1, -1 };
    job jobs[LAYERS];
    const int stage = static_cast<int>(seed % 4), n = 100 + rng_below(&r, 60);
    config.scope = static_cast<rkv_scope>(rng_below(&r, 3));
    config.variant = static_cast<rkv_variant>(rng_below(&r, 2));
    config.pinned = 2;
    config.protect = rng_below(&r, 4) ? 10 : BUDGET - config.pinned;
    case_begin("faults, seed %lu, stage %d, scope %d", static_cast<unsigned long>(seed), stage,
               config.scope);
    for (int l = 0; l < LAYERS; l++) {
        const bool joins = config.scope == RKV_PER_SEQUENCE && l > 0;
        shape s = plain_shape(1 + rng_below(&r, 2), 2, 16, joins ? n : n + l, RKV_F32);
        s.keys = rng_below(&r, 2) ? LAYOUT_ROW_LIST : LAYOUT_PAGED_NHD;
        s.values = rng_below(&r, 2) ? LAYOUT_ROW_LIST : LAYOUT_PAGED_HND;
        s.queries = LAYOUT_ROW_LIST;
        s.sequence = 1;
        s.follower = joins;
        s.pins = joins ? 0 : 3;
        job *j = &jobs[l];
        job_make(j, &r, &config, &s);
        memset(j->scores.data, 0, j->scores.bytes);
        memset(j->shared.data, 0, j->shared.bytes);
        for (size_t i = 0; i < j->kept.bytes / 4; i++)
            reinterpret_cast<int32_t *>(j->kept.data)[i] = static_cast<int32_t>(i % BUDGET);
        j->layer.n_kept = BUDGET;
        j->remembered = j->layer;
        block_remember(&j->scores);
        block_remember(&j->shared);
    }
    for (int i = 1 + rng_below(&r, 4); i > 0; i--) put_fault(&r, &jobs[rng_below(&r, LAYERS)]);
    for (int l = 0; l < LAYERS; l++) block_remember(&jobs[l].kept);
    config.error = &on_cpu;
    const rkv_status want =
        call_stage(stages[stage], rkv_backend_find(NULL), &config, jobs, LAYERS);
    for (int l = 0; l < LAYERS && want == RKV_OK; l++) job_restore(&jobs[l]);
    config.error = NULL;
    config.device_error = &on_device;
    shim_order_is(static_cast<int>(seed / 4 % 6));
    expect_status("CUDA", call_stage(stages[stage], &mirrored, &config, jobs, LAYERS), want);
    shim_order_is(0);
    expect_record("the device's record", &on_device, &on_cpu);
    for (int l = 0; l < LAYERS; l++) {
        if (want != RKV_OK) job_unchanged("a refused call", &jobs[l]);
        job_free(&jobs[l]);
    }
    case_end();
}

/* Pins for all places but one are kept; one more is refused, in whatever stage. Where there is no
 * place, one is. */
static void test_pins()
{
    for (int scope = RKV_PER_HEAD; scope <= RKV_PER_SEQUENCE; scope++)
        for (int c = 0; c < 6; c++)
            for (int stage = 0; stage < 2; stage++) {
                static const struct {
                    int places, pins;
                } cases[] = { { 27, 26 }, { 27, 27 }, { 1, 0 }, { 1, 1 }, { 0, 0 }, { 0, 1 } };
                const int places = cases[c].places, pins = cases[c].pins;
                rkv_config config = rkv_config_default(20 + 3 + places);
                rng r = rng_seed(19);
                shape s = plain_shape(2, 2, 32, 300, RKV_F16);
                trial t;
                case_begin("pins in %d of %d places, scope %d, stage %d", pins, places, scope,
                           stage);
                memset(&t, 0, sizeof t);
                config.pinned = 3;
                config.protect = 20;
                config.scope = static_cast<rkv_scope>(scope);
                t.config = config;
                t.staged = stage == 0;
                s.pins = 1;
                add_job(&t, &r, s, 0, 0);
                for (int device = 0; device < 2; device++) {
                    job *j = device ? &t.gpu[0] : &t.cpu[0];
                    const int set = j->sets - 1;
                    memset(j->pins.data, 0, j->pins.bytes);
                    for (int i = 0; i < pins; i++)
                        j->pins.data[300 * set + 3 + 10 * i] = static_cast<uint8_t>(1 + 9 * i);
                    j->pins.data[300 * set] = 1;        /* pinned anyway */
                    j->pins.data[300 * set + 290] = 20; /* protected anyway */
                    block_remember(&j->pins);
                }
                if (pins > 0 && pins >= places) {
                    float *scores = reinterpret_cast<float *>(t.cpu[0].scores.data);
                    float *shared = reinterpret_cast<float *>(t.cpu[0].shared.data);
                    for (int i = 0; i < 2 * 292; i++) scores[i] = NAN; /* found only after pins */
                    if (scope != RKV_PER_HEAD)
                        for (int i = 0; i < 292; i++) shared[i] = NAN;
                    block_remember(&t.cpu[0].scores);
                    block_remember(&t.cpu[0].shared);
                    view_store_one(&t.cpu[0].keys, 0, 5, 0, NAN);
                    block_remember(&t.cpu[0].keys.memory);
                    expect_refused(config, t.cpu, 1, stage ? rkv_compress : rkv_select,
                                   RKV_ERROR_ARGUMENT);
                } else
                    run_trial(&t);
                case_end();
                free_trial(&t);
            }
}

/* The newest tokens that do not vote are protected all the same; the rest of the budget, if there
 * is any, goes by score. */
static void test_protect()
{
    static const int protects[] = { 3, 8, 9, 64, 99, 100 };
    for (size_t i = 0; i < sizeof protects / sizeof *protects; i++)
        for (int variant = RKV_PUBLISHED; variant <= RKV_PAPER; variant++) {
            rkv_config config = rkv_config_default(104);
            shape s = plain_shape(2, 4, 64, 300, RKV_BF16);
            config.pinned = 4;
            config.protect = protects[i];
            config.variant = static_cast<rkv_variant>(variant);
            case_begin("%d protected tokens, variant %d", protects[i], variant);
            run_one(config, s, 23);
            s.pins = 5;
            run_one(config, s, 24);
            case_end();
        }
}

static void test_bad_tables()
{
    for (int c = 0; c < 6; c++) {
        rkv_config config = rkv_config_default(50);
        job j;
        rng r = rng_seed(static_cast<uint64_t>(c));
        shape s = plain_shape(2, 1, 32, 100, RKV_F16);
        view *const views[] = { &j.keys, &j.values, &j.queries }, *bad = views[c / 2];
        s.keys = s.values = c < 2 ? LAYOUT_PAGED_NHD : LAYOUT_ROW_LIST;
        s.queries = LAYOUT_ROW_LIST;
        case_begin("table %d with %s, %s", c / 2, c % 2 ? "a negative entry" : "an entry twice",
                   layout_name(s.keys));
        job_make(&j, &r, &config, &s);
        int32_t *table = reinterpret_cast<int32_t *>(bad->table.data);
        table[3] = c % 2 ? -5 : table[1];
        block_remember(&bad->table);
        expect_refused(config, &j, 1, rkv_compress, RKV_ERROR_ARGUMENT);
        expect_refused(config, &j, 1, rkv_score, RKV_ERROR_ARGUMENT);
        for (int i = 0; i < 100; i++) reinterpret_cast<int32_t *>(j.kept.data)[i] = 200;
        j.layer.n_kept = 50;
        j.remembered = j.layer;
        expect_refused(config, &j, 1, rkv_compact, RKV_ERROR_ARGUMENT);
        j.layer.n_kept = 0;
        config.protect = 50; /* nothing is scored, but rows would move */
        j.remembered = j.layer;
        if (bad != &j.queries) expect_refused(config, &j, 1, rkv_score, RKV_ERROR_ARGUMENT);
        if (bad != &j.queries) expect_refused(config, &j, 1, rkv_compress, RKV_ERROR_ARGUMENT);
        case_end();
        job_free(&j);
    }
}

/* Of several entries that occur twice the first is reported, in whatever order the threads run. */
static void test_first_bad_entry()
{
    for (int order = 0; order < 3; order++) {
        rkv_config config = rkv_config_default(50);
        rkv_error error;
        job j;
        rng r = rng_seed(17);
        shape s = plain_shape(2, 1, 32, 100, RKV_F16);
        s.keys = LAYOUT_ROW_LIST;
        case_begin("the first of three bad entries, order %d", order);
        memset(&error, 0, sizeof error);
        config.device_error = &error;
        job_make(&j, &r, &config, &s);
        int32_t *table = reinterpret_cast<int32_t *>(j.keys.table.data);
        table[90] = table[40] = table[20] = table[2];
        block_remember(&j.keys.table);
        shim_order_is(order);
        expect_status("CUDA", call_stage(rkv_compress, &mirrored, &config, &j, 1),
                      RKV_ERROR_ARGUMENT);
        shim_order_is(0);
        expect_int("error.token", order, error.token, 20);
        case_end();
        job_free(&j);
    }
}

/* What the host refuses: each with a sentence. */
static void test_refusals()
{
    rkv_config config = rkv_config_default(50);
    rng r = rng_seed(9);
    shape s = plain_shape(2, 2, 32, 100, RKV_F16);
    size_t bytes = 0, more = 0;
    rkv_error error;
    char text[256];
    job j[2];
    case_begin("refusals");
    for (int i = 0; i < 2; i++) job_make(&j[i], &r, &config, &s);
    config.error = &error;
    expect_status("size", rkv_workspace_size(cuda(), &config, &j[0].layer, 1, &bytes), RKV_OK);
    expect_status("too small", call_with(rkv_compress, &mirrored, &config, j, 1, &s, bytes - 1),
                  RKV_ERROR_WORKSPACE);
    expect_true("its rule", error.rule && strcmp(error.rule, RKVI_RULE_WORKSPACE_SIZE) == 0);
    expect_status("none", rkv_compress(cuda(), &config, &j[0].layer, 1, NULL, bytes),
                  RKV_ERROR_WORKSPACE);
    expect_true("its rule", error.rule && strcmp(error.rule, RKVI_RULE_WORKSPACE_NULL) == 0);
    for (int i = 0; i < 2; i++) {
        rkv_tensor *tensor = i ? &j[1].layer.queries : &j[1].layer.keys, was = *tensor;
        tensor->dtype = RKV_OPAQUE;
        tensor->element_bytes = tensor->dim;
        tensor->load = load_opaque;
        j[1].remembered = j[1].layer;
        expect_host_refusal(config, j, 2, rkv_compress, RKV_ERROR_UNSUPPORTED,
                            i ? "layer 1: layer.queries.load: \"cuda\" has no row loaders"
                              : "layer 1: layer.keys.load: \"cuda\" has no row loaders");
        *tensor = was;
    }
    j[1].remembered = j[1].layer;
    reinterpret_cast<float *>(j[0].scores.data)[92 + 5] = NAN;
    block_remember(&j[0].scores);
    expect_refused(config, j, 1, rkv_select, RKV_ERROR_NONFINITE);
    for (int i = 0; i < 2; i++) job_free(&j[i]);
    s.misalign = 1;
    job_make(&j[0], &r, &config, &s);
    expect_host_refusal(config, j, 1, rkv_compress, RKV_ERROR_UNSUPPORTED,
                        "layer 0: layer.keys: \"cuda\" needs data and strides aligned to the "
                        "element size");
    job_free(&j[0]);
    s.misalign = 0;
    job_make(&j[0], &r, &config, &s);
    j[0].layer.queries.data = static_cast<char *>(j[0].layer.queries.data) + 1;
    j[0].remembered = j[0].layer;
    expect_host_refusal(config, j, 1, rkv_score, RKV_ERROR_UNSUPPORTED,
                        "layer 0: layer.queries: \"cuda\" needs data and strides aligned to the "
                        "element size");
    job_free(&j[0]);
    rkv_layer wide = RKV_INIT; /* addresses that nobody reads */
    wide.keys = rkv_tensor_make(reinterpret_cast<void *>(1ull << 20), RKV_F16, 1, 100, 32);
    wide.queries = rkv_tensor_make(reinterpret_cast<void *>(1ull << 21), RKV_F16, 2, 8, 32);
    wide.values = rkv_tensor_make(reinterpret_cast<void *>(1ull << 40), RKV_F16, 1, 100, 1 << 30);
    wide.n_tokens = 100;
    void *const nowhere = reinterpret_cast<void *>(1ull << 30);
    size_t needed = 0;
    expect_status("size", rkv_workspace_size(cuda(), &config, &wide, 1, &needed), RKV_OK);
    expect_status("wide", rkv_compress(cuda(), &config, &wide, 1, nowhere, needed),
                  RKV_ERROR_UNSUPPORTED);
    expect_true("its text",
                strcmp(rkv_explain(&error, text, sizeof text),
                       "layer 0: layer.values.dim: \"cuda\" takes rows below 2 GB") == 0);
    config.error = NULL; /* may be NULL */
    expect_status("wide", rkv_compress(cuda(), &config, &wide, 1, nowhere, needed),
                  RKV_ERROR_UNSUPPORTED);
    config.error = &error;
    wide.values = rkv_tensor_make(NULL, RKV_F16, 0, 0, 0);
    wide.keys.heads = 1 << 26;
    wide.keys.head_stride = 1;
    wide.keys.token_stride = 1 << 30;
    wide.queries.heads = 1 << 26;
    wide.queries.head_stride = 1;
    wide.keys.dim = wide.queries.dim = 1;
    expect_status("many heads", rkv_workspace_size(cuda(), &config, &wide, 1, &needed),
                  RKV_ERROR_UNSUPPORTED);
    expect_true("its text",
                strcmp(rkv_explain(&error, text, sizeof text),
                       "layer 0: layers: \"cuda\" takes fewer than 2^26 KV heads in a call") == 0);
    expect_status("no layers", rkv_compress(cuda(), &config, NULL, 0, NULL, 0),
                  RKV_ERROR_WORKSPACE);
    bytes = 0;
    for (int n = 60; n < 200; n += 20) { /* never shrinks */
        rkv_layer layer = RKV_INIT;
        layer.keys = rkv_tensor_make(&bytes, RKV_F16, 2, n, 32);
        layer.queries = rkv_tensor_make(&bytes, RKV_F16, 4, 8, 32);
        layer.n_tokens = n;
        expect_status("size", rkv_workspace_size(cuda(), &config, &layer, 1, &bytes), RKV_OK);
        expect_true("grows", bytes >= more);
        more = bytes;
    }
    case_end();
}

/* The two functions that make a backend. */
static void test_register()
{
    rkv_error error = { NULL, 7, 7, 7, 7 };
    rkv_backend table;
    int other = 0;
    case_begin("register, and tables of one's own");
    memset(&table, 0, sizeof table);
    expect_status("the same stream again", rkv_cuda_register(NULL, &error), RKV_OK);
    expect_true("nothing to say",
                error.rule == NULL && error.status == RKV_OK && error.layer == -1);
    const rkv_backend *before = cuda();
    expect_status("another stream", rkv_cuda_register(&other, &error), RKV_ERROR_ARGUMENT);
    expect_true("its rule", error.rule && strstr(error.rule, "another stream") != NULL);
    expect_int("its status", 0, error.status, RKV_ERROR_ARGUMENT);
    expect_status("without a record", rkv_cuda_register(&other, NULL), RKV_ERROR_ARGUMENT);
    expect_true("as it was", cuda() == before && cuda()->context == NULL);
    expect_status("no table", rkv_cuda_backend(NULL, NULL, &error), RKV_ERROR_NULL);
    expect_status("no table", rkv_cuda_backend(NULL, NULL, NULL), RKV_ERROR_NULL);
    expect_status("a table of one's own", rkv_cuda_backend(&table, &other, &error), RKV_OK);
    expect_true("its stream", table.context == &other && error.rule == NULL);
#ifdef RKV_CUDA_SHIM
    shim_kernels().is_missing = true;
    expect_status("no code for this device", rkv_cuda_backend(&table, NULL, &error),
                  RKV_ERROR_DEVICE);
    expect_true("its rule", error.rule && strstr(error.rule, "not compiled for it") != NULL);
    expect_true("the table is as it was", table.context == &other);
    shim_kernels().is_missing = false;
    shim_error().fail_next = true;
    expect_status("no driver", rkv_cuda_backend(&table, NULL, &error), RKV_ERROR_DEVICE);
    expect_true("a rule", error.rule != NULL && error.status == RKV_ERROR_DEVICE);
    shim_error().fail_next = true;
    expect_status("no driver", rkv_cuda_register(NULL, &error), RKV_ERROR_DEVICE);
    expect_true("as it was", cuda() == before && cuda()->run != NULL);
    shim_error().fail_next = true;
    expect_status("a copy", cuda()->copy(cuda(), NULL, NULL, 0), RKV_ERROR_DEVICE);
    void *memory = cuda()->alloc(cuda(), 4);
    shim_error().fail_next = true;
    expect_status("a copy", cuda()->copy(cuda(), memory, &other, 4), RKV_ERROR_DEVICE);
    cuda()->free(cuda(), memory);
    expect_true("no error is left behind", cudaGetLastError() == cudaSuccess);
#endif
    case_end();
}

#ifdef RKV_CUDA_SHIM
/* A launch that the device refuses, each of a call in turn: a status, a sentence, no count set. */
static void test_launch_errors()
{
    rkv_config config = rkv_config_default(50);
    rkv_error error;
    rng r = rng_seed(9);
    const shape s = plain_shape(2, 2, 32, 300, RKV_F16);
    job j;
    case_begin("launches that fail");
    config.error = &error;
    for (int n = 0; n < 12; n++) {
        memset(&error, 0, sizeof error);
        job_make(&j, &r, &config, &s);
        shim().fail_launch = n + 1;
        const rkv_status status = call_stage(rkv_compress, &mirrored, &config, &j, 1);
        const bool failed = shim().fail_launch == 0;
        shim().fail_launch = 0;
        expect_status("the call", status, failed ? RKV_ERROR_DEVICE : RKV_OK);
        expect_true("a rule where it failed", failed == (error.rule != NULL));
        expect_int("error.status", n, error.status, status);
        expect_int("n_tokens", n, j.layer.n_tokens, failed ? 300 : 50);
        if (failed) job_inputs_unchanged("rows", &j);
        job_free(&j);
        if (!failed && n > 3) break;
        expect_true("one of the launches", n < 11);
    }
    expect_true("no error is left behind", cudaGetLastError() == cudaSuccess);
    case_end();
}
#endif

/* copy_rows: rows of negative blocks do not exist; the others are copied. */
static void test_copy_rows()
{
    enum { ROWS = 12, DIM = 8 };
    static const int32_t source[] = { 2, -1, 0, 1 }, target[] = { 0, 1, -7, 2 };
    float host[3 * 3 * DIM], got[3 * 3 * DIM];
    mirror m;
    case_begin("copy_rows and negative blocks");
    for (int i = 0; i < 3 * 3 * DIM; i++) host[i] = static_cast<float>(i), got[i] = -1;
    rkv_tensor from = rkv_tensor_make(m.add(host, sizeof host, false), RKV_F32, 1, ROWS, DIM);
    rkv_tensor to = rkv_tensor_make(m.add(got, sizeof got, true), RKV_F32, 1, ROWS, DIM);
    from.block_table = m.add(source, sizeof source, false);
    to.block_table = m.add(target, sizeof target, false);
    from.block_tokens = to.block_tokens = 3;
    expect_status("copy_rows", cuda()->copy_rows(cuda(), &to, 0, &from, 0, ROWS), RKV_OK);
    expect_status("synchronize", cuda()->synchronize(cuda()), RKV_OK);
    m.copy_back();
    for (int i = 0; i < 3 * DIM; i++) {
        expect_int("block 0 from block 2", i, static_cast<int>(got[i]), 2 * 3 * DIM + i);
        expect_int("block 1 from nowhere", i, static_cast<int>(got[3 * DIM + i]), -1);
        expect_int("block 2 from block 1", i, static_cast<int>(got[6 * DIM + i]), 3 * DIM + i);
    }
    case_end();
}

/* ---- The managed cache on device memory ------------------------------------------------------ */
struct cache_pair {
    rkv_cache *cpu, *gpu;
};
enum { CACHE_HEADS = 2, CACHE_GROUP = 2, CACHE_DIM = 32, CACHE_LAYERS = 2 };

static void append_both(cache_pair pair, rng *r, int layer, int n)
{
    const size_t rows = static_cast<size_t>(n) * CACHE_DIM;
    std::vector<float> data[3];
    rkv_tensor host[3], device[3];
    mirror m;
    for (int i = 0; i < 3; i++) {
        const int heads = i == 2 ? CACHE_HEADS * CACHE_GROUP : CACHE_HEADS;
        data[i].resize(static_cast<size_t>(heads) * rows);
        for (size_t k = 0; k < data[i].size(); k++) data[i][k] = static_cast<float>(rng_normal(r));
        host[i] = rkv_tensor_make(data[i].data(), RKV_F32, heads, n, CACHE_DIM);
        device[i] = mirror_tensor(&m, host[i], n, false);
    }
    expect_status("append", rkv_cache_append(pair.cpu, layer, n, &host[0], &host[1], &host[2]),
                  RKV_OK);
    expect_status("append on the device",
                  rkv_cache_append(pair.gpu, layer, n, &device[0], &device[1], &device[2]), RKV_OK);
    expect_status("synchronize", cuda()->synchronize(cuda()), RKV_OK);
}

static void compare_caches(cache_pair pair)
{
    for (int layer = 0; layer < CACHE_LAYERS; layer++) {
        const int rows = rkv_cache_rows(pair.cpu, layer);
        if (!expect_int("rows", layer, rkv_cache_rows(pair.gpu, layer), rows)) return;
        for (int h = 0; h < CACHE_HEADS; h++) {
            const size_t n = static_cast<size_t>(rows), row_bytes = CACHE_DIM * sizeof(float);
            std::vector<int32_t> positions(n);
            to_host(positions.data(), rkv_cache_positions(pair.gpu, layer, h), n * 4);
            expect_bytes("positions", positions.data(), rkv_cache_positions(pair.cpu, layer, h),
                         n * 4);
            for (int values = 0; values < 2; values++) {
                rkv_tensor (*const view_of)(const rkv_cache *, int) =
                    values ? rkv_cache_values : rkv_cache_keys;
                const rkv_tensor a = view_of(pair.cpu, layer), b = view_of(pair.gpu, layer);
                const size_t stride =
                    static_cast<size_t>(a.head_stride) * sizeof(float) * static_cast<size_t>(h);
                std::vector<float> rows_there(n * CACHE_DIM);
                to_host(rows_there.data(), static_cast<char *>(b.data) + stride, n * row_bytes);
                expect_bytes(values ? "values" : "keys", rows_there.data(),
                             static_cast<char *>(a.data) + stride, n * row_bytes);
            }
        }
    }
}

static rkv_config preset(rkv_policy policy, int budget); /* policies.h */

/* R-KV in every scope, then the other policies and R-KV with many votes. */
static void test_cache()
{
    enum { SCOPES = RKV_PER_SEQUENCE + 1, POLICIES = RKV_POLICY_RANDOM + 1 };
    for (int i = 0; i < SCOPES + POLICIES; i++) {
        const rkv_scope scope = static_cast<rkv_scope>(i < SCOPES ? i : RKV_PER_HEAD);
        cache_pair pair = { NULL, NULL };
        rkv_cache_config config;
        rng r = rng_seed(21);
        int rounds = 0;
        memset(&config, 0, sizeof config);
        config.compress = rkv_config_default(40);
        if (i >= SCOPES) config.compress = preset(static_cast<rkv_policy>(i - SCOPES), 40);
        if (config.compress.votes > 32) config.compress.votes = 32;
        config.compress.scope = scope;
        config.rope.pairing = RKV_ROPE_HALVES;
        config.n_layers = CACHE_LAYERS;
        config.kv_heads = CACHE_HEADS;
        config.query_heads = CACHE_HEADS * CACHE_GROUP;
        config.head_dim = CACHE_DIM;
        config.buffer = 24;
        config.capacity = 100;
        case_begin("managed cache on the device, policy %d, scope %d", config.compress.policy,
                   scope);
        expect_status("create", rkv_cache_create(&pair.cpu, &config), RKV_OK);
        config.backend = cuda();
        if (expect_status("create on the device", rkv_cache_create(&pair.gpu, &config), RKV_OK)) {
            for (int step = 0; step < 60; step++) {
                int evicted[2] = { 0, 0 };
                const int n = step == 0 ? 90 : 1;
                for (int layer = 0; layer < CACHE_LAYERS; layer++) append_both(pair, &r, layer, n);
                expect_status("step", rkv_cache_step(pair.cpu, &evicted[0]), RKV_OK);
                expect_status("step on the device", rkv_cache_step(pair.gpu, &evicted[1]), RKV_OK);
                expect_int("evicted", step, evicted[1], evicted[0]);
                rounds += evicted[0] > 0;
                if (evicted[0] > 0 || step == 0) compare_caches(pair);
            }
            expect_true("several rounds", rounds >= 2);
        }
        case_end();
        rkv_cache_destroy(pair.cpu);
        rkv_cache_destroy(pair.gpu);
    }
}

/* A table of frequencies lies in the device's memory; create reads it. */
static void test_cache_frequencies()
{
    for (int bad = 0; bad < 2; bad++) {
        std::vector<float> table(CACHE_DIM / 2, 0.5f);
        rkv_cache *cache = NULL;
        rkv_cache_config config;
        rkv_error error;
        mirror m;
        case_begin("frequencies of a managed cache on the device, %s",
                   bad ? "one too large" : "all right");
        memset(&config, 0, sizeof config);
        memset(&error, 0, sizeof error);
        config.compress = rkv_config_triattention(40);
        config.compress.error = &error;
        config.n_layers = CACHE_LAYERS;
        config.kv_heads = CACHE_HEADS;
        config.query_heads = CACHE_HEADS * CACHE_GROUP;
        config.head_dim = CACHE_DIM;
        config.backend = cuda();
        if (bad) table[3] = 4.5f;
        config.rope.pairing = RKV_ROPE_HALVES;
        config.rope.frequencies = m.add(table.data(), table.size() * 4, false);
        expect_status("create", rkv_cache_create(&cache, &config),
                      bad ? RKV_ERROR_ARGUMENT : RKV_OK);
        expect_true("a cache", (cache != NULL) == (bad == 0));
        if (bad) {
            expect_true("rule", error.rule && strcmp(error.rule, RKVI_RULE_FREQUENCY) == 0);
            expect_int("which", 0, error.token, 3);
        }
        case_end();
        rkv_cache_destroy(cache);
    }
}

/* A NaN in a key or a query: the round is refused and changes nothing; without that token the
 * cache goes on as one that has never seen it. */
static void append_one(cache_pair pair, rng *r, int layer, float poison, int where)
{
    std::vector<float> data[3];
    rkv_tensor host[3], device[3];
    mirror m;
    for (int i = 0; i < 3; i++) {
        const int heads = i == 2 ? CACHE_HEADS * CACHE_GROUP : CACHE_HEADS;
        data[i].resize(static_cast<size_t>(heads) * CACHE_DIM);
        for (size_t k = 0; k < data[i].size(); k++) data[i][k] = static_cast<float>(rng_normal(r));
        if (i == where && poison != 0 && layer == 1) data[i][CACHE_DIM + 3] = poison; /* head 1 */
        host[i] = rkv_tensor_make(data[i].data(), RKV_F32, heads, 1, CACHE_DIM);
        device[i] = mirror_tensor(&m, host[i], 1, false);
    }
    if (poison == 0)
        expect_status("append", rkv_cache_append(pair.cpu, layer, 1, &host[0], &host[1], &host[2]),
                      RKV_OK);
    expect_status("append on the device",
                  rkv_cache_append(pair.gpu, layer, 1, &device[0], &device[1], &device[2]), RKV_OK);
    expect_status("synchronize", cuda()->synchronize(cuda()), RKV_OK);
}

static void test_cache_fault()
{
    for (int given = 0; given < 2; given++) {
        cache_pair pair = { NULL, NULL };
        rkv_cache_config config;
        rkv_error error;
        rng r = rng_seed(27);
        char text[256];
        memset(&config, 0, sizeof config);
        memset(&error, 0, sizeof error);
        config.compress = rkv_config_default(40);
        config.compress.pinned = 2;
        config.n_layers = CACHE_LAYERS;
        config.kv_heads = CACHE_HEADS;
        config.query_heads = CACHE_HEADS * CACHE_GROUP;
        config.head_dim = CACHE_DIM;
        config.buffer = 24;
        case_begin("a NaN in a managed cache on the device, %s record", given ? "given" : "own");
        expect_status("create", rkv_cache_create(&pair.cpu, &config), RKV_OK);
        if (given) config.compress.error = &error;
        config.backend = cuda();
        expect_status("create on the device", rkv_cache_create(&pair.gpu, &config), RKV_OK);
        for (int round = 0; round < 3; round++) {
            int evicted = -1, rows;
            while ((rows = rkv_cache_rows(pair.cpu, 0)) < 63)
                for (int layer = 0; layer < CACHE_LAYERS; layer++) append_both(pair, &r, layer, 1);
            const int position = rkv_cache_position(pair.gpu, 0);
            for (int layer = 0; layer < CACHE_LAYERS; layer++)
                append_one(pair, &r, layer, round == 1 ? INFINITY : NAN, round == 2 ? 2 : 0);
            expect_status("step on the device", rkv_cache_step(pair.gpu, &evicted),
                          RKV_ERROR_NONFINITE);
            const rkv_error *found = rkv_cache_error(pair.gpu);
            rkv_explain(found, text, sizeof text);
            const char *want = "layer 1, head 1, token 63: " RKVI_RULE_KEY;
            if (round == 2) want = "layer 1, head 1, token "; /* a slot of the ring of queries */
            if (strncmp(text, want, strlen(want)) != 0 ||
                (round == 2) != (found->rule && strcmp(found->rule, RKVI_RULE_QUERY) == 0))
                case_fail("got \"%s\"", text);
            expect_true("whose record", (found == &error) == (given == 1));
            expect_int("its position", round, rkv_cache_error_position(pair.gpu), position);
            expect_int("evicted", round, evicted, 0);
            expect_int("rows", round, rkv_cache_rows(pair.gpu, 0), 64);
            expect_int("position", round, rkv_cache_position(pair.gpu, 1), position + 1);
            expect_status("the bad token", rkv_cache_truncate(pair.gpu, position), RKV_OK);
            compare_caches(pair);
            for (int layer = 0; layer < CACHE_LAYERS; layer++) append_one(pair, &r, layer, 0, 0);
            for (int n = 0; n < 9; n++) { /* the queries that the window lacks */
                expect_status("step", rkv_cache_step(pair.cpu, NULL), RKV_OK);
                expect_status("step on the device", rkv_cache_step(pair.gpu, &evicted), RKV_OK);
            }
            expect_int("evicted", round, evicted, 0);
            expect_int("rows", round, rkv_cache_rows(pair.gpu, 0), 40);
            compare_caches(pair);
        }
        case_end();
        rkv_cache_destroy(pair.cpu);
        rkv_cache_destroy(pair.gpu);
    }
}

/* ---- Graphs and streams --------------------------------------------------------------------- */
/* A call captured in a graph: each replay works on what the buffers hold then. */
static void test_graph()
{
    rkv_config config = rkv_config_default(256);
    const shape s = plain_shape(2, 4, 128, on_gpu ? 1152 : 300, RKV_BF16);
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    rkv_backend backend;
    mirror m, work; /* a replay refills m, not the workspace */
    job j;
    size_t bytes = 0;
    rng r = rng_seed(31);
    case_begin("a captured graph, replayed on new data");
    must("a stream", cudaStreamCreate(&stream) == cudaSuccess);
    must("a table", rkv_cuda_backend(&backend, stream, NULL) == RKV_OK);
    job_make(&j, &r, &config, &s);
    rkv_layer layer = mirror_layer(&m, &config, j.layer, true);
    expect_status("size", rkv_workspace_size(&backend, &config, &layer, 1, &bytes), RKV_OK);
    char *workspace = work.reserve(static_cast<char *>(NULL), bytes, false);
    must("capture", cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess);
    expect_status("captured", rkv_compress(&backend, &config, &layer, 1, workspace, bytes), RKV_OK);
    must("end of capture", cudaStreamEndCapture(stream, &graph) == cudaSuccess);
    must("instance", cudaGraphInstantiate(&exec, graph, 0) == cudaSuccess);
    job_free(&j);
    for (int replay = 0; replay < 4; replay++) {
        trial t;
        memset(&t, 0, sizeof t);
        t.config = config;
        add_job(&t, &r, s, 0, 0);
        job *gpu = &t.gpu[0], *cpu = &t.cpu[0];
        mirror fresh;
        mirror_layer(&fresh, &config, gpu->layer, true);
        for (size_t i = 0; i < m.pieces.size(); i++) {
            m.pieces[i].host = fresh.pieces[i].host;
            to_device(m.pieces[i].device, m.pieces[i].host, m.pieces[i].bytes);
        }
        must("replay", cudaGraphLaunch(exec, stream) == cudaSuccess &&
                           cudaStreamSynchronize(stream) == cudaSuccess);
        m.copy_back();
        gpu->layer.n_tokens = gpu->layer.n_kept = config.budget;
        expect_status("CPU", call_stage(rkv_compress, rkv_backend_find(NULL), &config, cpu, 1),
                      RKV_OK);
        judge(t);
        free_trial(&t);
    }
    case_end();
    (void)cudaGraphExecDestroy(exec);
    (void)cudaGraphDestroy(graph);
    (void)cudaStreamDestroy(stream);
}

static void test_two_streams()
{
    enum { STREAMS = 2 };
    rkv_config config = rkv_config_default(256);
    const shape s = plain_shape(2, 4, 128, on_gpu ? 1152 : 300, RKV_F16);
    rng r = rng_seed(41);
    trial t;
    cudaStream_t stream[STREAMS];
    rkv_backend backend[STREAMS];
    rkv_layer layer[STREAMS];
    mirror m[STREAMS];
    case_begin("two streams at a time");
    memset(&t, 0, sizeof t);
    t.config = config;
    for (int i = 0; i < STREAMS; i++) {
        size_t bytes = 0;
        must("a stream", cudaStreamCreate(&stream[i]) == cudaSuccess);
        must("a table", rkv_cuda_backend(&backend[i], stream[i], NULL) == RKV_OK);
        add_job(&t, &r, s, 0, 0);
        layer[i] = mirror_layer(&m[i], &config, t.gpu[i].layer, true);
        expect_status("size", rkv_workspace_size(&backend[i], &config, &layer[i], 1, &bytes),
                      RKV_OK);
        char *workspace = m[i].reserve(static_cast<char *>(NULL), bytes, false);
        expect_status("call", rkv_compress(&backend[i], &config, &layer[i], 1, workspace, bytes),
                      RKV_OK);
    }
    for (int i = 0; i < STREAMS; i++) {
        must("the stream", cudaStreamSynchronize(stream[i]) == cudaSuccess);
        m[i].copy_back();
        t.gpu[i].layer.n_tokens = t.gpu[i].layer.n_kept = layer[i].n_kept;
        (void)cudaStreamDestroy(stream[i]);
    }
    expect_status("CPU", call_stage(rkv_compress, rkv_backend_find(NULL), &config, t.cpu, STREAMS),
                  RKV_OK);
    judge(t);
    case_end();
    free_trial(&t);
}

/* ---- What only a GPU can show --------------------------------------------------------------- */
#if defined(RKV_CUDA_SHIM) && !defined(RKV_CUDA_PTX)
static void test_on_gpu()
{
    skip("graphs and streams of a real device: needs a GPU");
    skip("tensor cores, warps and blocks that run at the same time: needs a GPU");
    skip("16k tokens and more: needs a GPU, or make test-cuda-ptx");
    skip("compute-sanitizer memcheck, racecheck, initcheck, synccheck: needs a GPU");
}
#else
static void test_on_gpu()
{
    static const int lengths[] = { 1152, 4224, 16807 };
    for (int i = 0; i < 3; i++)
        for (int type = RKV_F32; type <= RKV_BF16; type++)
            for (int kind = 0; kind < (on_gpu ? 2 : 1); kind++) { /* the PTX: what goes fast */
                shape s = plain_shape(2, 4, 128, lengths[i], static_cast<rkv_dtype>(type));
                s.kind = kind ? KEYS_REPEATS : KEYS_SHARED;
                case_begin("n %d, type %d, %s keys", lengths[i], type, key_kind_name(s.kind));
                run_one(rkv_config_default(lengths[i] / 2), s, 51 + static_cast<uint64_t>(i));
                case_end();
            }
}
#endif

static void test_chosen()
{
    test_golden();
    test_far_scan();
    test_few_far_rows();
    test_at_threshold();
    test_near_threshold();
    test_near_threshold_signs();
    test_common_similar_key();
    test_many_layers();
    test_mixed_lengths();
    test_determinism();
    test_faults();
    test_f8_codes();
    test_queued_stages();
    test_bad_lists();
    test_bad_tables();
    test_first_bad_entry();
    for (uint64_t seed = 1; seed <= 200; seed++) test_many_faults(seed);
    test_pins();
    test_protect();
    test_refusals();
    test_register();
#ifdef RKV_CUDA_SHIM
    test_launch_errors();
#endif
    test_copy_rows();
    test_cache();
    test_cache_frequencies();
    test_cache_fault();
    test_graph();
    test_two_streams();
    test_chosen_policies();
    test_on_gpu();
}

/* The far scan in every type, the copies of the managed cache, every check, a graph; the first
 * generated cases cover the rest. */
static void test_kernels(uint64_t count)
{
    test_far_scan();
    test_few_far_rows();
    test_mixed_lengths();
    test_cache();
    test_bad_lists();
    test_bad_tables();
    test_pins();
    test_copy_rows();
    test_f8_codes();
    test_graph();
    for (uint64_t seed = 1; seed <= count; seed++) test_generated(seed);
    for (uint64_t seed = 1; seed <= (count + 1) / 2; seed++) test_policy(seed);
    for (uint64_t seed = 1; seed <= 4; seed++) test_query_means(seed);
    test_unscored_state();
}

int main(int argc, char **argv)
{
    const bool kernels = argc > 1 && strcmp(argv[1], "kernels") == 0;
    const bool policies = argc > 1 && strcmp(argv[1], "policy") == 0;
    if (policies) argc--, argv++;
    const uint64_t first = argc > 1 ? strtoull(argv[1], NULL, 10) : 1;
    const uint64_t count = argc > 2  ? strtoull(argv[2], NULL, 10)
                           : kernels ? 30
                                     : wanted_cases(default_cases);
    int n_devices = 0;
    if (rkv_cuda_register(NULL, NULL) != RKV_OK) {
        must("this program has no code for the device",
             cudaGetDeviceCount(&n_devices) != cudaSuccess || n_devices < 1);
        skip("rkv_cuda.cu on a GPU: no CUDA device");
        return close_tests();
    }
    if (kernels) test_kernels(count);
    if (argc <= 1 && !policies) test_chosen();
    if (argc <= 1 && policies) test_chosen_policies();
    for (uint64_t seed = first; seed < first + count && !kernels; seed++) {
        if (!policies) test_generated(seed);
        if (policies || seed % 4 == 0) test_policy(seed); /* each is a history: slow */
    }
    printf("scores differ from the CPU's by at most %.1e of the largest; %ld kept sets equal, %ld "
           "but for near ties\n",
           worst_score, sets_equal, sets_differ_in_ties);
    return close_tests();
}
