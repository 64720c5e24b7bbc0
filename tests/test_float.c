/* The caller's floating-point environment makes no difference: results are the same bits in every
 * rounding mode, with FTZ and DAZ, and with traps; the environment comes back, flags included.
 *     make test        or: build/tests/test_float; make test-float runs other tests in each mode */
#include "harness.h"

#include <math.h>
#include <string.h>

/* Keys and queries whose results depend on the environment: subnormal products, ties of zeros, and
 * ordinary ones. */
static const struct {
    const char *name;
    key_kind kind;
    int key_exponent;
    double sharpness;
    rkv_dtype dtype;
} cases[] = {
    { "ordinary", KEYS_SHARED, 0, 1, RKV_F32 },
    { "tiny keys", KEYS_TINY, 0, 1, RKV_F32 },
    { "subnormal squares", KEYS_ISOTROPIC, -66, 1e-4, RKV_F32 },
    { "subnormal halves", KEYS_ISOTROPIC, -13, 1, RKV_F16 },
    { "zero rows", KEYS_ZERO_ROWS, 0, 1, RKV_F32 },
    { "sharp", KEYS_REPEATS, 0, 30, RKV_BF16 },
};
enum { N_CASES = sizeof cases / sizeof *cases, BUDGET = 40 };

static void make(job *j, rng *r, const rkv_config *config, int i)
{
    shape s;
    memset(&s, 0, sizeof s);
    s.kv_heads = 3;
    s.group = 2;
    s.head_dim = 24;
    s.n_tokens = 150;
    s.kind = cases[i].kind;
    s.strength = 0.6;
    s.key_exponent = cases[i].key_exponent;
    s.sharpness = cases[i].sharpness;
    s.dtype = cases[i].dtype;
    job_make(j, r, config, &s);
}

/* Each task runs in another mode, as on threads of a program that has set them so. */
static void mixed_for(void *pool, int n_tasks, void (*task)(void *arg, int index), void *arg)
{
    const float_mode callers = *(const float_mode *)pool;
    int i;
    for (i = 0; i < n_tasks; i++) {
        const float_mode mode = (float_mode)((i + 1) % N_FLOAT_MODES);
        float_mode_enter(mode);
        task(arg, i);
        float_mode_leave("mode after a task", mode);
    }
    float_mode_enter(callers);
}

static void test_calls(const rkv_backend *backend, int i, float_mode mode, int n_threads)
{
    rng r = rng_seed(7), again = r;
    rkv_config config = rkv_config_default(BUDGET);
    job usual, other;
    case_begin("%s, %s, %s, %d threads", backend->name, cases[i].name, float_mode_name(mode),
               n_threads);
    make(&usual, &r, &config, i);
    make(&other, &again, &config, i);
    expect_status("usual", call_stage(rkv_compress, backend, &config, &usual, 1), RKV_OK);
    if (n_threads > 1) {
        config.n_threads = n_threads;
        config.parallel_for = mixed_for;
        config.pool_handle = &mode;
    }
    float_mode_of_calls(mode);
    expect_status("other", call_stage(rkv_compress, backend, &config, &other, 1), RKV_OK);
    float_mode_of_calls(FLOAT_USUAL);
    expect_bytes("scores", other.scores.data, usual.scores.data, usual.scores.bytes);
    expect_bytes("kept", other.kept.data, usual.kept.data, usual.kept.bytes);
    job_free(&usual);
    job_free(&other);
    case_end();
}

/* What validation compares may be NaN: a refusal, no SIGFPE. */
static void test_nan_options(float_mode mode)
{
    rng r = rng_seed(9);
    rkv_config config = rkv_config_default(BUDGET);
    rkv_cache_config cache_config = RKV_INIT;
    rkv_cache *cache;
    size_t bytes = 0;
    rkv_status status;
    job j;
    case_begin("NaN as an option, %s", float_mode_name(mode));
    make(&j, &r, &config, 0);
    j.layer.scale = NAN;
    float_mode_enter(mode);
    status = rkv_workspace_size(NULL, &config, &j.layer, 1, &bytes);
    float_mode_leave("rkv_workspace_size", mode);
    expect_status("scale", status, RKV_ERROR_ARGUMENT);
    config.lambda = NAN;
    cache_config.compress = config;
    float_mode_enter(mode);
    status = rkv_compress(NULL, &config, &j.layer, 1, NULL, 0);
    float_mode_leave("rkv_compress", mode);
    expect_status("lambda", status, RKV_ERROR_ARGUMENT);
    float_mode_enter(mode);
    status = rkv_cache_create(&cache, &cache_config);
    float_mode_leave("rkv_cache_create", mode);
    expect_status("lambda of a cache", status, RKV_ERROR_ARGUMENT);
    job_free(&j);
    case_end();
}

/* Everything that a managed cache does; its snapshot at the end, for comparison. */
static size_t run_cache(float_mode mode, float lambda, unsigned char *image, size_t room)
{
    enum { HEADS = 2, DIM = 16, TOKENS = 70 };
    rkv_cache_config config = RKV_INIT;
    rkv_cache *cache;
    rng r = rng_seed(3);
    rkv_status status;
    size_t bytes;
    int t, i;
    config.compress = rkv_config_default(24);
    config.compress.lambda = lambda;
    config.n_layers = 1;
    config.kv_heads = config.query_heads = HEADS;
    config.head_dim = DIM;
    config.buffer = 8;
    float_mode_enter(mode);
    status = rkv_cache_create(&cache, &config);
    float_mode_leave("rkv_cache_create", mode);
    expect_status("create", status, RKV_OK);
    for (t = 0; t < TOKENS; t++) {
        float row[HEADS * DIM];
        rkv_tensor token = rkv_tensor_make(row, RKV_F32, HEADS, 1, DIM);
        for (i = 0; i < HEADS * DIM; i++) row[i] = (float)(rng_normal(&r) * 1e-18);
        float_mode_enter(mode);
        status = rkv_cache_append(cache, 0, 1, &token, &token, &token);
        if (status == RKV_OK) status = rkv_cache_step(cache, NULL);
        float_mode_leave("append and step", mode);
        expect_status("append and step", status, RKV_OK);
    }
    bytes = rkv_cache_save_size(cache);
    expect_true("room for the snapshot", bytes <= room);
    expect_status("save", rkv_cache_save(cache, image, room), RKV_OK);
    rkv_cache_destroy(cache);
    return bytes;
}

static void test_cache(float_mode mode, float lambda)
{
    enum { ROOM = 1 << 16 };
    static unsigned char usual[ROOM], other[ROOM];
    size_t bytes, again;
    case_begin("managed cache, lambda %g, %s", (double)lambda, float_mode_name(mode));
    bytes = run_cache(FLOAT_USUAL, lambda, usual, ROOM);
    again = run_cache(mode, lambda, other, ROOM);
    if (expect_int("bytes", 0, (int64_t)again, (int64_t)bytes))
        expect_bytes("snapshot", other, usual, bytes);
    case_end();
}

int main(void)
{
    const rkv_backend *backends[MAX_BACKENDS];
    int n_backends = usable_backends(backends), b, i, m;
    for (m = FLOAT_USUAL; m < N_FLOAT_MODES; m++) {
        const float_mode mode = (float_mode)m;
        if (!float_mode_exists(mode)) {
            skip("%s: this machine lacks it", float_mode_name(mode));
            continue;
        }
        for (b = 0; b < n_backends; b++)
            for (i = 0; i < N_CASES; i++) {
                test_calls(backends[b], i, mode, 1);
                test_calls(backends[b], i, mode, 3);
            }
        test_nan_options(mode);
        test_cache(mode, 0.1f);
        test_cache(mode, 1e-40f); /* subnormal: not 0, also where those are flushed */
    }
    return close_tests();
}
