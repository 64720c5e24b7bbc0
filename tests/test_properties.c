/* What must hold whatever the numbers: invariances, ties, pinned and protected rows, rounds,
 * layouts, threads, error records.
 *     make test        or: build/tests/test_properties */
#define _POSIX_C_SOURCE 200809L
#include "harness.h"
#include "oracle.h"

#include <float.h>
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static const rkv_backend *backends[MAX_BACKENDS];
static int n_backends;

static shape plain_shape(int kv_heads, int group, int head_dim, int n_tokens)
{
    shape s;
    memset(&s, 0, sizeof s);
    s.kv_heads = kv_heads;
    s.group = group;
    s.head_dim = head_dim;
    s.n_tokens = n_tokens;
    s.kind = KEYS_SHARED;
    s.strength = 0.5;
    return s;
}

static int run(stage_function call, const rkv_backend *backend, const rkv_config *config, job *jobs,
               int n_jobs)
{
    return expect_status("status", call_stage(call, backend, config, jobs, n_jobs), RKV_OK);
}

/* Are the scores of two jobs of the same shape the same bits? */
static void expect_same_scores(const char *at, const job *a, const job *b)
{
    expect_int("score bytes", 0, (int64_t)a->scores.bytes, (int64_t)b->scores.bytes);
    expect_bytes(at, a->scores.data, b->scores.data, a->scores.bytes);
}

/* ---- invariances ---- */
/* A cosine does not see a key's length: powers of two are exact, so the bits stay. */
static void test_key_scale(const rkv_backend *backend)
{
    rng r = rng_seed(11);
    rkv_config config = rkv_config_default(40);
    shape s = plain_shape(2, 2, 67, 90);
    size_t count = 2 * 90 * 67, i;
    job a, b;
    float *keys;
    if (FLT_EVAL_METHOD != 0) {
        skip("%s: keys times powers of two: this compiler computes floats in more precision",
             backend->name);
        return;
    }
    case_begin("%s: keys times powers of two, redundancy alone", backend->name);
    config.lambda = 0;
    job_make(&a, &r, &config, &s);
    keys = (float *)alloc_checked(count * sizeof *keys);
    for (i = 0; i < count; i++) keys[i] = (float)ldexp((double)a.keys_f32[i], (int)(i / 67 % 21));
    job_make_from(&b, &r, &config, &s, keys, a.queries_f32);
    run(rkv_score, backend, &config, &a, 1);
    run(rkv_score, backend, &config, &b, 1);
    expect_same_scores("scores", &a, &b);
    free(keys);
    job_free(&a);
    job_free(&b);
}

/* lambda 1: neither the redundancy options nor the window's keys matter. */
static void test_attention_only(const rkv_backend *backend)
{
    rng r = rng_seed(12);
    rkv_config config = rkv_config_snapkv(40), other;
    shape s = plain_shape(2, 4, 64, 90);
    job a, b;
    int t, i;
    case_begin("%s: lambda 1 is attention alone", backend->name);
    job_make(&a, &r, &config, &s);
    for (t = 90 - 8; t < 90; t++)
        for (i = 0; i < 64; i++) a.keys_f32[t * 64 + i] *= 3;
    job_make_from(&b, &r, &config, &s, a.keys_f32, a.queries_f32);
    other = rkv_config_default(40);
    other.lambda = 1;
    other.threshold = -0.5f;
    other.recent = 4;
    run(rkv_score, backend, &config, &a, 1);
    run(rkv_score, backend, &other, &b, 1);
    expect_same_scores("scores", &a, &b);
    config.variant = other.variant = RKV_PAPER; /* the pooling differs, nothing else counts */
    run(rkv_score, backend, &config, &a, 1);
    run(rkv_score, backend, &other, &b, 1);
    expect_same_scores("scores, paper", &a, &b);
    job_free(&a);
    job_free(&b);
}

/* Every other key's logit comes out below the middle of two floats by less than a double can tell:
 * rounded once it equals its neighbour's, by way of double it would not. */
static void test_round_once(const rkv_backend *backend)
{
    enum { N = 40, D = 64, W = 8 };
    rng r = rng_seed(17);
    rkv_config config = rkv_config_snapkv(20);
    shape s = plain_shape(1, 1, D, N);
    float keys[N * D] = { 0 }, queries[W * D] = { 0 };
    float big = 1024.0f, tiny = 1.0f / (1 << 18);
    job j;
    int t, a;
    if (FLT_EVAL_METHOD != 0) {
        skip("%s: one rounding: this compiler computes floats in more precision", backend->name);
        return;
    }
    case_begin("%s: multiply-adds round once", backend->name);
    for (t = 0; t < N; t++) {
        keys[t * D] = big * (1 + FLT_EPSILON);
        keys[t * D + 1] = t % 2 ? big * (1 - tiny) : 0;
    }
    for (a = 0; a < W; a++) {
        queries[a * D] = 1;
        queries[a * D + 1] = FLT_EPSILON / 2 * (1 + tiny);
    }
    config.pool = 1;
    job_make_from(&j, &r, &config, &s, keys, queries);
    run(rkv_score, backend, &config, &j, 1);
    for (t = 1; t < N - W; t++)
        expect_bytes("score", job_scores(&j), job_scores(&j) + t, sizeof(float));
    job_free(&j);
}

/* A ring of queries may start anywhere. */
static void test_query_order(const rkv_backend *backend)
{
    enum { W = 8, D = 64, N = 100, G = 4 };
    rng r = rng_seed(13);
    rkv_config config = rkv_config_default(50);
    shape s = plain_shape(1, G, D, N);
    float turned[G * W * D];
    job a, b;
    int g, a_row, k;
    case_begin("%s: order of the queries", backend->name);
    job_make(&a, &r, &config, &s);
    for (g = 0; g < G; g++)
        for (a_row = 0; a_row < W; a_row++)
            memcpy(turned + (g * W + (a_row + 3) % W) * D, a.queries_f32 + (g * W + a_row) * D,
                   D * sizeof *turned);
    job_make_from(&b, &r, &config, &s, a.keys_f32, turned);
    run(rkv_compress, backend, &config, &a, 1);
    run(rkv_compress, backend, &config, &b, 1);
    for (k = 0; k < N - W; k++)
        expect_near("score", k, (double)job_scores(&a)[k], (double)job_scores(&b)[k], 1e-8);
    expect_bytes("kept", a.kept.data, b.kept.data, a.kept.bytes);
    job_free(&a);
    job_free(&b);
}

/* A head's answer does not depend on the other heads and layers of the call. */
static void test_independence(const rkv_backend *backend)
{
    enum { H = 3, N = 150, D = 96, G = 2, W = 8 };
    rng r = rng_seed(14);
    rkv_config config = rkv_config_default(64);
    shape s = plain_shape(H, G, D, N), one = plain_shape(1, G, D, N);
    job all[2], alone;
    int h;
    case_begin("%s: a head alone and among others", backend->name);
    job_make(&all[1], &r, &config, &s);
    s.n_tokens = 77;
    job_make(&all[0], &r, &config, &s);
    run(rkv_compress, backend, &config, all, 2);
    for (h = 0; h < H; h++) {
        job_make_from(&alone, &r, &config, &one, all[1].keys_f32 + h * N * D,
                      all[1].queries_f32 + h * G * W * D);
        run(rkv_compress, backend, &config, &alone, 1);
        expect_bytes("scores", alone.scores.data, job_scores(&all[1]) + h * (N - W),
                     (N - W) * sizeof(float));
        expect_bytes("kept", alone.kept.data, job_kept(&all[1]) + h * 64, 64 * sizeof(int32_t));
        job_free(&alone);
    }
    job_free(&all[0]);
    job_free(&all[1]);
}

/* Every finite code of a half format is read as the number that it is: the same keys in f32 give
 * the same bits. 64 adjacent codes a row have one exponent or two, so each of them counts. bf16's
 * exponents are kept within what a norm may be. */
static void test_half_codes(const rkv_backend *backend, rkv_dtype dtype)
{
    enum { D = 64, G = 1 };
    rng r = rng_seed(15);
    rkv_config config = rkv_config_default(100);
    shape s = plain_shape(1, G, D, 0);
    float *keys = (float *)alloc_checked(65536 * sizeof *keys), *queries;
    job half, full;
    int code, n = 0, i;
    case_begin("%s: every %s code", backend->name, dtype == RKV_F16 ? "f16" : "bf16");
    for (code = 0; code < 65536; code++) {
        float x = dtype == RKV_F16 ? f16_to_float((uint16_t)code) : bf16_to_float((uint16_t)code);
        int coarse = dtype == RKV_BF16 && (code >> 7 & 0xFF) > 180;
        if (isnan(x) || isinf(x) || coarse) continue;
        expect_true("conversion and back",
                    code == (dtype == RKV_F16 ? f16_from_float(x) : bf16_from_float(x)));
        keys[n++] = x;
    }
    s.n_tokens = n / D;
    queries = (float *)alloc_checked(8 * D * sizeof *queries);
    for (i = 0; i < 8 * D; i++)
        queries[i] = round_to(dtype, (float)ldexp(rng_normal(&r), dtype == RKV_F16 ? -12 : -50));
    s.dtype = dtype;
    job_make_from(&half, &r, &config, &s, keys, queries);
    s.dtype = RKV_F32;
    job_make_from(&full, &r, &config, &s, keys, queries);
    run(rkv_score, backend, &config, &half, 1);
    run(rkv_score, backend, &config, &full, 1);
    expect_same_scores("scores", &half, &full);
    free(keys);
    free(queries);
    job_free(&half);
    job_free(&full);
}

/* Is the pair at rows i < j of a head among the exempt? Its score in j says so: with the pair, and
 * without it, the oracle gives two values far apart. -1 where it is neither. */
static int pair_is_exempt(const rkv_backend *backend, rkv_config config, const float *keys, int n,
                          int dim, int j)
{
    rng r = rng_seed(19);
    shape s = plain_shape(1, 1, dim, n);
    double away[2], tolerance[2];
    int exempt, is = -1;
    job one;
    job_make(&one, &r, &config, &s);
    view_store(&one.keys, keys, n);
    run(rkv_score, backend, &config, &one, 1);
    for (exempt = 0; exempt < 2; exempt++) {
        oracle_head head;
        config.threshold = exempt ? 0.4999f : 0.5001f;
        oracle_score(&head, &config, keys, one.queries_f32, n, dim, 1, 0, 0);
        away[exempt] = fabs((double)job_scores(&one)[j] - head.score[j]);
        tolerance[exempt] = oracle_tolerance(&head, &config);
        oracle_free(&head);
    }
    for (exempt = 0; exempt < 2; exempt++)
        if (away[exempt] <= tolerance[exempt] && away[!exempt] > 4 * tolerance[!exempt])
            is = exempt;
    job_free(&one);
    return is;
}

/* Two keys are similar or not, wherever they lie: in the newest columns, which the second pass
 * over K meets, and further back, among keys that resemble none, even where their cosine is the
 * threshold up to rounding. */
static void test_place_of_a_pair(const rkv_backend *backend)
{
    enum { N = 72, W = 8, PLACES = 5, PAIRS = 8, MOST = 100 };
    static const int dims[] = { 48, 67, MOST };
    static const int places[PLACES][2] = {
        { 1, N - W - 1 }, { 30, N - W - 1 }, { 30, N - W - 2 }, { 30, N - W - 3 }, { 5, 40 },
    };
    rng r = rng_seed(18);
    int d, trial, place, seen[2] = { 0, 0 };
    case_begin("%s: a pair at the threshold, in several places", backend->name);
    for (d = 0; d < 3; d++)
        for (trial = 0; trial < PAIRS; trial++) {
            static float pair[2 * MOST], keys[N * MOST];
            rkv_config config = rkv_config_default(40);
            const int dim = dims[d];
            const size_t row = (size_t)dim * sizeof *keys;
            double dot = 0, square[2] = { 0, 0 };
            int i, first = -1;
            config.lambda = 0;
            config.variant = RKV_PAPER;
            make_keys(&r, KEYS_HALF, 0, pair, 1, 2, dim);
            make_keys(&r, KEYS_ISOTROPIC, 0, keys, 1, N, dim);
            for (i = 0; i < dim; i++) {
                dot += (double)pair[i] * (double)pair[dim + i];
                square[0] += (double)pair[i] * (double)pair[i];
                square[1] += (double)pair[dim + i] * (double)pair[dim + i];
            }
            if (fabs(dot / sqrt(square[0] * square[1]) - 0.5) > 1e-5) continue; /* the same */
            for (place = 0; place < PLACES; place++) {
                int exempt, at[2] = { places[place][0], places[place][1] };
                static float placed[N * MOST];
                memcpy(placed, keys, (size_t)N * row);
                memcpy(placed + at[0] * dim, pair, row);
                memcpy(placed + at[1] * dim, pair + dim, row);
                exempt = pair_is_exempt(backend, config, placed, N, dim, at[1]);
                expect_true("one or the other", exempt >= 0);
                if (place == 0) first = exempt;
                expect_int("as in the first place", place, exempt, first);
                if (exempt >= 0) seen[exempt]++;
            }
        }
    expect_true("both came up", seen[0] > 10 && seen[1] > 10);
}

/* Few tokens, many of them similar by a threshold below 0: the search meets columns that are no
 * whole register, whose unused lanes hold zeros, and no zero is a similar key. */
static void test_small_spans(const rkv_backend *backend, rkv_variant variant)
{
    enum { W = 4, D = 24, MOST = 70 };
    rng r = rng_seed(34);
    int n, recent, k;
    case_begin("%s: few tokens, a negative threshold, variant %d", backend->name, (int)variant);
    for (n = W + 2; n <= MOST; n++)
        for (recent = 1; recent <= 9; recent += 4) {
            rkv_config config = rkv_config_default(W + 1);
            shape s = plain_shape(1, 1, D, n);
            oracle_head want;
            job j;
            config.window = W;
            config.variant = variant;
            config.threshold = -0.15f;
            config.recent = recent;
            config.lambda = 0;
            s.kind = KEYS_ISOTROPIC;
            job_make(&j, &r, &config, &s);
            run(rkv_score, backend, &config, &j, 1);
            oracle_score(&want, &config, j.keys_f32, j.queries_f32, n, D, 1, 0, 0);
            for (k = 0; k < n - W && want.margin > 5e-6; k++)
                expect_near("score", n * 100 + k, (double)job_scores(&j)[k], want.score[k],
                            oracle_tolerance(&want, &config));
            oracle_free(&want);
            job_free(&j);
        }
}

/* ---- ties and no-ops ---- */
/* All scores equal: the pinned rows, those with a pin of their own and the newest stay. */
static void test_ties(const rkv_backend *backend, float lambda, rkv_scope scope, int pinned)
{
    enum { N = 70, BUDGET = 30, PINS = 6 };
    rng r = rng_seed(16);
    rkv_config config = rkv_config_default(BUDGET);
    shape s = plain_shape(2, 2, 20, N);
    job j;
    int set, k;
    case_begin("%s: all scores equal, lambda %.0f, scope %d, pinned %d", backend->name,
               (double)lambda, (int)scope, pinned);
    config.lambda = lambda;
    config.scope = scope;
    config.pinned = pinned;
    s.kind = KEYS_ZERO;
    s.pins = 1;
    job_make(&j, &r, &config, &s);
    memset(j.pins.data, 0, j.pins.bytes);
    run(rkv_compress, backend, &config, &j, 1);
    for (set = 0; set < j.sets; set++)
        for (k = 0; k < BUDGET; k++)
            expect_int("kept", k, job_kept(&j)[set * BUDGET + k], k < pinned ? k : N - BUDGET + k);
    job_restore(&j);
    memset(j.pins.data, 0, j.pins.bytes);
    for (set = 0; set < j.sets; set++)
        for (k = 0; k < PINS; k++) j.pins.data[set * N + 10 + 3 * k] = (uint8_t)(1 << k);
    run(rkv_compress, backend, &config, &j, 1);
    for (set = 0; set < j.sets; set++)
        for (k = 0; k < BUDGET; k++)
            expect_int("kept, with pins", k, job_kept(&j)[set * BUDGET + k],
                       k < pinned          ? k
                       : k < pinned + PINS ? 10 + 3 * (k - pinned)
                                           : N - BUDGET + k);
    job_free(&j);
}

static void test_no_op(const rkv_backend *backend, int n_tokens)
{
    rng r = rng_seed(17);
    rkv_config config = rkv_config_default(50);
    shape s = plain_shape(2, 2, 64, n_tokens);
    job j;
    int k;
    case_begin("%s: %d tokens within a budget of 50", backend->name, n_tokens);
    job_make(&j, &r, &config, &s);
    j.layer.queries.data = NULL; /* nothing to choose: not read */
    run(rkv_compress, backend, &config, &j, 1);
    job_inputs_unchanged("inputs", &j);
    block_unchanged("scores", &j.scores);
    expect_int("n_tokens", 0, j.layer.n_tokens, n_tokens);
    expect_int("n_kept", 0, j.layer.n_kept, n_tokens);
    for (k = 0; k < n_tokens; k++) {
        expect_int("kept, head 0", k, job_kept(&j)[k], k);
        expect_int("kept, head 1", k, job_kept(&j)[50 + k], k);
    }
    job_free(&j);
}

/* What lies behind the rows in use is no key, whatever it holds. */
static void test_unused_rows(const rkv_backend *backend)
{
    rng r = rng_seed(18);
    rkv_config config = rkv_config_default(20);
    shape s = plain_shape(2, 1, 16, 40);
    job j;
    int h, t, i;
    case_begin("%s: NaN behind the rows in use", backend->name);
    s.capacity = 60;
    job_make(&j, &r, &config, &s);
    for (h = 0; h < 2; h++)
        for (t = 40; t < 60; t++)
            for (i = 0; i < 16; i++) view_store_one(&j.keys, h, t, i, NAN);
    block_remember(&j.keys.memory);
    run(rkv_compress, backend, &config, &j, 1);
    job_compacted("compaction", &j, job_kept(&j), 20, 20);
    job_free(&j);
}

/* ---- protected and pinned rows ---- */
/* The newest `protect` rows are kept and the scores stay what they are; up to the window nothing
 * changes at all. */
static void test_protect(const rkv_backend *backend, int protect)
{
    enum { N = 120, W = 8, BUDGET = 50 };
    rng r = rng_seed(31);
    rkv_config config = rkv_config_default(BUDGET), protects = config;
    shape s = plain_shape(2, 2, 64, N);
    double *exact = (double *)alloc_checked(N * sizeof *exact), gap;
    int32_t want[BUDGET];
    job a, b;
    int h, k;
    case_begin("%s: %d newest rows protected", backend->name, protect);
    protects.protect = protect;
    job_make(&a, &r, &config, &s);
    job_make_from(&b, &r, &protects, &s, a.keys_f32, a.queries_f32);
    run(rkv_compress, backend, &config, &a, 1);
    run(rkv_compress, backend, &protects, &b, 1);
    if (protect < BUDGET) expect_same_scores("scores", &a, &b); /* else nothing is chosen */
    if (protect <= W) expect_bytes("kept", a.kept.data, b.kept.data, a.kept.bytes);
    for (h = 0; h < 2; h++) {
        const int32_t *kept = job_kept(&b) + h * BUDGET;
        for (k = 0; k < N - W; k++) exact[k] = (double)job_scores(&b)[h * (N - W) + k];
        expect_int("rows", h, oracle_select(&protects, exact, NULL, N, want, &gap), BUDGET);
        expect_bytes("kept, given the scores", kept, want, sizeof want);
        for (k = 1; k <= protect; k++) expect_int("protected", k, kept[BUDGET - k], N - k);
    }
    job_compacted("compaction", &b, job_kept(&b), BUDGET, BUDGET);
    job_free(&a);
    job_free(&b);
    free(exact);
}

static int by_rising_score(const void *a, const void *b)
{
    const float *x = *(const float *const *)a, *y = *(const float *const *)b;
    return (*x > *y) - (*x < *y);
}

/* The `n_pins` worst candidates of one head are pinned: they stay, and the best of the others; one
 * pin for every place is an error that names the set. */
static void test_worst_are_pinned(const rkv_backend *backend, int n_pins)
{
    enum { N = 120, W = 8, BUDGET = 50, PLACES = BUDGET - W, PLAIN = 0, WORST = 1 };
    rng r = rng_seed(32);
    rkv_error error;
    rkv_config config = rkv_config_default(BUDGET);
    shape s = plain_shape(2, 2, 64, N);
    const float *rising[N - W];
    job j;
    int k, at = 0;
    case_begin("%s: the %d worst candidates are pinned", backend->name, n_pins);
    config.error = &error;
    s.pins = 1;
    job_make(&j, &r, &config, &s);
    memset(j.pins.data, 0, j.pins.bytes);
    run(rkv_score, backend, &config, &j, 1);
    for (k = 0; k < N - W; k++) rising[k] = job_scores(&j) + WORST * (N - W) + k;
    qsort(rising, N - W, sizeof *rising, by_rising_score);
    for (k = 0; k < n_pins; k++) {
        ptrdiff_t row = rising[k] - job_scores(&j) - WORST * (N - W);
        j.pins.data[WORST * N + row] = 200;
    }
    block_remember(&j.pins);
    if (n_pins >= PLACES) {
        int before = job_kept(&j)[0];
        expect_status("too many", call_stage(rkv_select, backend, &config, &j, 1),
                      RKV_ERROR_ARGUMENT);
        expect_int("layer", 0, error.layer, 0);
        expect_int("set", 0, error.head, WORST);
        expect_int("token", 0, error.token, -1);
        expect_int("kept, unchanged", 0, job_kept(&j)[0], before);
        expect_status("too many, in one call", call_stage(rkv_compress, backend, &config, &j, 1),
                      RKV_ERROR_ARGUMENT);
        job_inputs_unchanged("inputs", &j);
        job_free(&j);
        return;
    }
    run(rkv_compress, backend, &config, &j, 1);
    for (k = 0; k < N - W; k++) { /* kept: the n_pins lowest and the PLACES - n_pins highest */
        float score = job_scores(&j)[WORST * (N - W) + k];
        int is_low = n_pins > 0 && score <= *rising[n_pins - 1];
        int is_high = score >= *rising[N - W - (PLACES - n_pins)];
        int is_kept = job_kept(&j)[WORST * BUDGET + at] == k;
        expect_int("kept", k, is_kept, is_low || is_high);
        at += is_kept;
    }
    job_compacted("compaction", &j, job_kept(&j), BUDGET, BUDGET);
    job_free(&j);
}

/* ---- error records ---- */
static void expect_clean(const char *at, const rkv_error *error)
{
    expect_true(at, error->rule == NULL && error->status == RKV_OK);
    expect_true(at, error->layer == -1 && error->head == -1 && error->token == -1);
}

/* Each call clears what an earlier one left, by itself; a fault of the data is named, and named
 * again, and forgotten once it is mended. */
static void test_records(const rkv_backend *backend)
{
    static const stage_function calls[] = { rkv_score, rkv_select, rkv_compact, rkv_compress };
    rng r = rng_seed(33);
    rkv_error error;
    rkv_config config = rkv_config_default(30);
    shape s = plain_shape(2, 2, 24, 60);
    size_t bytes = 0;
    char text[256];
    void *workspace;
    rkv_layer layers[2];
    job j[2];
    int i;
    case_begin("%s: the error record after each call", backend->name);
    config.error = &error;
    for (i = 0; i < 2; i++) job_make(&j[i], &r, &config, &s);
    for (i = 0; i < 2; i++) layers[i] = j[i].layer;
    memset(&error, 77, sizeof error);
    expect_status("size", rkv_workspace_size(backend, &config, layers, 2, &bytes), RKV_OK);
    expect_clean("record, size", &error);
    workspace = alloc_checked(bytes);
    for (i = 0; i < 4; i++) {
        memset(&error, 77, sizeof error);
        expect_status("call", call_with(calls[i], backend, &config, j, 2, workspace, bytes),
                      RKV_OK);
        expect_clean("record, call", &error);
    }
    for (i = 0; i < 2; i++) job_restore(&j[i]);
    view_store_one(&j[1].keys, 1, 17, 5, NAN);
    for (i = 0; i < 2; i++) {
        expect_status("a NaN", call_with(rkv_compress, backend, &config, j, 2, workspace, bytes),
                      RKV_ERROR_NONFINITE);
        expect_int("status in the record", i, error.status, RKV_ERROR_NONFINITE);
        rkv_explain(&error, text, sizeof text);
        expect_true(text, strcmp(text, "layer 1, head 1, token 17: " RKVI_RULE_KEY) == 0);
    }
    job_restore(&j[1]);
    expect_status("mended", call_with(rkv_compress, backend, &config, j, 2, workspace, bytes),
                  RKV_OK);
    expect_clean("record, mended", &error);
    for (i = 0; i < 2; i++) job_free(&j[i]);
    free(workspace);
}

/* ---- presets ---- */
/* The kept sets of a preset are the oracle's with the options that the method is known by. */
static void test_preset(const rkv_backend *backend, const char *name, rkv_config preset,
                        rkv_config known)
{
    rng r = rng_seed(19);
    shape s = plain_shape(2, 4, 64, 200);
    oracle_head *heads;
    job j;
    int h, k;
    case_begin("%s: preset %s keeps what the method keeps", backend->name, name);
    job_make(&j, &r, &preset, &s);
    run(rkv_compress, backend, &preset, &j, 1);
    heads = oracle_score_job(&j, &known);
    for (h = 0; h < j.sets; h++) {
        double gap, sum[200];
        int32_t want[200];
        int n;
        memset(sum, 0, sizeof sum);
        if (j.sets == 1)
            oracle_add_layer(sum, heads, 2);
        else
            memcpy(sum, heads[h].score, (size_t)(200 - j.window) * sizeof *sum);
        n = oracle_select(&known, sum, NULL, 200, want, &gap);
        expect_true("the cut is clear", gap > 2 * oracle_tolerance(&heads[h], &known));
        for (k = 0; k < n; k++) expect_int("kept", k, job_kept(&j)[h * 64 + k], want[k]);
    }
    oracle_free_job(heads, &j);
    job_free(&j);
}

static void test_presets(const rkv_backend *backend)
{
    rkv_config known = RKV_INIT;
    known.budget = 64;
    known.window = 8;
    known.pool = 7;
    known.recent = 1;
    known.lambda = 0.1f;
    known.threshold = 0.5f;
    test_preset(backend, "default", rkv_config_default(64), known);
    known.scope = RKV_PER_LAYER;
    known.variant = RKV_PAPER;
    test_preset(backend, "paper", rkv_config_paper(64), known);
    known.scope = RKV_PER_HEAD;
    known.variant = RKV_PUBLISHED;
    known.lambda = 1;
    test_preset(backend, "snapkv", rkv_config_snapkv(64), known);
}

/* First 4 and newest budget - 4, from keys alone, without a query or a score; the newest alone
 * where the budget is no more than 4. */
static void test_streaming(const rkv_backend *backend, int budget)
{
    rng r = rng_seed(20);
    rkv_config config = rkv_config_streaming(budget);
    const int first = budget > 4 ? 4 : 0;
    shape s = plain_shape(2, 2, 20, 60);
    job j;
    int h, k;
    case_begin("%s: preset streaming, %d rows", backend->name, budget);
    job_make(&j, &r, &config, &s);
    memset(&j.layer.queries, 0, sizeof j.layer.queries);
    j.layer.scores = NULL;
    run(rkv_compress, backend, &config, &j, 1);
    for (h = 0; h < 2; h++)
        for (k = 0; k < budget; k++)
            expect_int("kept", k, job_kept(&j)[h * budget + k], k < first ? k : 60 - budget + k);
    job_compacted("compaction", &j, job_kept(&j), budget, budget);
    job_free(&j);
}

/* ---- pinned rows, on pages that cannot be written ---- */
/* [token][head][dim] rows of one page each; the pinned ones read-only. A write would end the
 * program, which run.sh reports. */
static void test_pinned_pages(const rkv_backend *backend)
{
    enum { N = 24, PINNED = 4, HEADS = 2, BUDGET = 14 };
    size_t page = (size_t)sysconf(_SC_PAGESIZE), i;
    int dim = (int)(page / sizeof(float) / HEADS);
    rng r = rng_seed(21);
    rkv_config config = rkv_config_default(BUDGET);
    shape s = plain_shape(HEADS, 1, dim, N);
    void *memory[2] = { NULL, NULL };
    job j;
    int v;
    case_begin("%s: pinned rows on read-only pages", backend->name);
    config.pinned = PINNED;
    s.keys = s.values = LAYOUT_TOKEN_MAJOR;
    job_make(&j, &r, &config, &s);
    for (v = 0; v < 2; v++) {
        view *from = v ? &j.values : &j.keys;
        rkv_tensor *to = v ? &j.layer.values : &j.layer.keys;
        int h, t;
        if (posix_memalign(&memory[v], page, N * page)) memory[v] = NULL;
        if (!expect_true("pages", memory[v] != NULL)) return;
        to->data = memory[v];
        to->head_stride = dim;
        to->token_stride = HEADS * dim;
        for (t = 0; t < N; t++)
            for (h = 0; h < HEADS; h++)
                memcpy((float *)memory[v] + (t * HEADS + h) * dim, view_at(from, h, t, 0),
                       (size_t)dim * sizeof(float));
        expect_int("mprotect", v, mprotect(memory[v], PINNED * page, PROT_READ), 0);
    }
    run(rkv_compress, backend, &config, &j, 1);
    for (v = 0; v < 2; v++) {
        for (i = 0; i < BUDGET * HEADS; i++) {
            int h = (int)i % HEADS, row = (int)i / HEADS;
            expect_bytes("row", (float *)memory[v] + i * (size_t)dim,
                         view_at(v ? &j.values : &j.keys, h, job_kept(&j)[h * BUDGET + row], 0),
                         (size_t)dim * sizeof(float));
        }
        mprotect(memory[v], N * page, PROT_READ | PROT_WRITE);
        free(memory[v]);
    }
    job_free(&j);
}

/* ---- many rounds ---- */
/* Which tokens of a long run are pinned: one in fifty, each with a byte of its own. */
static uint8_t pin_of(int position)
{
    return (uint8_t)(position % 50 == 7 ? 1 + position / 50 : 0);
}

enum { ROUNDS_HEADS = 2, ROUNDS_ROWS = 64 };

/* After a round: rows carry their positions and pins, ascending; what must be kept has been. */
static void expect_rows(const job *j, const rkv_config *config, int n, int position)
{
    int h, row, protect = config_protect(config);
    for (h = 0; h < ROUNDS_HEADS; h++) {
        const int32_t *list = j->layer.positions + (h % j->sets) * ROUNDS_ROWS;
        const uint8_t *pins = j->layer.pins + (h % j->sets) * ROUNDS_ROWS;
        int n_pins = 0;
        for (row = 0; row < n; row++) {
            int32_t carried;
            memcpy(&carried, view_at(&j->values, h, row, 0), sizeof carried);
            expect_int("position of the row", row, list[row], carried);
            expect_int("pin of the row", row, pins[row], pin_of(carried));
            if (row) expect_true("ascending", list[row] > list[row - 1]);
            if (row < config->pinned) expect_int("pinned", row, list[row], row);
            if (row >= n - protect) expect_int("protected", row, list[row], position - n + row);
            n_pins += pins[row] != 0;
        }
        expect_int("rows with a pin", h, n_pins, (position + 42) / 50);
    }
}

/* Decodes 600 tokens; each value row carries its token's position, and so must `positions`. */
static void test_rounds(const rkv_backend *backend, rkv_scope scope, int pinned, int protect)
{
    enum { BUDGET = 40, BUFFER = ROUNDS_ROWS - BUDGET, D = 32, TOKENS = 600 };
    rng r = rng_seed(22);
    rkv_config config = rkv_config_default(BUDGET);
    shape s = plain_shape(ROUNDS_HEADS, 2, D, ROUNDS_ROWS);
    int n = 0, position, h, i, rounds = 0;
    job j;
    case_begin("%s: %d tokens, scope %d, pinned %d, protect %d", backend->name, TOKENS, (int)scope,
               pinned, protect);
    config.scope = scope;
    config.pinned = pinned;
    config.protect = protect;
    s.value_dim = 1;
    s.value_bytes = 4;
    s.pins = 1;
    job_make(&j, &r, &config, &s);
    j.layer.kept = NULL;
    j.layer.scores = j.layer.shared_scores = NULL;
    for (position = 0; position < TOKENS; position++, n++) {
        if (n == ROUNDS_ROWS) {
            j.layer.n_tokens = n;
            if (!run(rkv_compress, backend, &config, &j, 1)) break;
            expect_int("rows left", rounds, n = j.layer.n_tokens, BUDGET);
            expect_int("rows kept", rounds++, j.layer.n_kept, BUDGET);
            expect_rows(&j, &config, n, position);
        }
        for (h = 0; h < ROUNDS_HEADS; h++) {
            for (i = 0; i < D; i++) view_store_one(&j.keys, h, n, i, (float)rng_normal(&r));
            memcpy(view_at(&j.values, h, n, 0), &position, 4);
            j.layer.positions[(h % j.sets) * ROUNDS_ROWS + n] = position;
            j.layer.pins[(h % j.sets) * ROUNDS_ROWS + n] = pin_of(position);
        }
    }
    expect_int("rounds", 0, rounds, (TOKENS - BUDGET - 1) / BUFFER);
    job_free(&j);
}

/* ---- pools that hold more than one view ---- */
/* Keys and values of two layers in one allocation, interleaved as engines do: pages of
 * [block][key or value][token][head][dim], or rows of [token][layer][key or value][head][dim]. */
static void test_fused_pool(const rkv_backend *backend, int paged)
{
    enum { LAYERS = 2, PAGE = 4, PAGES = 10, N = PAGE * PAGES, H = 2, D = 16, ROW = H * D };
    rng r = rng_seed(23);
    rkv_config config = rkv_config_default(20);
    shape s = plain_shape(H, 2, D, N);
    static int32_t table[LAYERS][PAGES];
    float *pool = (float *)alloc_checked(LAYERS * 2 * N * ROW * sizeof *pool);
    job jobs[LAYERS];
    int l, i, h, t;
    case_begin("%s: one pool for keys and values, %s", backend->name, paged ? "paged" : "rows");
    for (l = 0; l < LAYERS; l++) {
        rkv_layer *layer;
        job_make(&jobs[l], &r, &config, &s);
        layer = &jobs[l].layer;
        for (i = 0; i < PAGES; i++) table[l][i] = (i * 7 % PAGES) * LAYERS + l;
        layer->keys.head_stride = layer->values.head_stride = D;
        layer->keys.data = pool + (paged ? 0 : l * 2 * ROW);
        layer->values.data = (float *)layer->keys.data + (paged ? PAGE * ROW : ROW);
        layer->keys.token_stride = paged ? ROW : LAYERS * 2 * ROW;
        if (paged) {
            layer->keys.block_table = table[l];
            layer->keys.block_tokens = PAGE;
            layer->keys.block_stride = 2 * PAGE * ROW;
        }
        layer->values.token_stride = layer->keys.token_stride;
        layer->values.block_table = layer->keys.block_table;
        layer->values.block_tokens = layer->keys.block_tokens;
        layer->values.block_stride = layer->keys.block_stride;
        for (t = 0; t < N; t++)
            for (h = 0; h < H; h++) {
                int64_t at = h * D + (paged ? table[l][t / PAGE] * 2 * PAGE * ROW + t % PAGE * ROW
                                            : t * layer->keys.token_stride);
                memcpy((float *)layer->keys.data + at, view_at(&jobs[l].keys, h, t, 0), D * 4);
                memcpy((float *)layer->values.data + at, view_at(&jobs[l].values, h, t, 0), D * 4);
            }
    }
    run(rkv_compress, backend, &config, jobs, LAYERS);
    for (l = 0; l < LAYERS; l++) {
        const rkv_layer *layer = &jobs[l].layer;
        for (t = 0; t < 20; t++)
            for (h = 0; h < H; h++) {
                int from = job_kept(&jobs[l])[h * 20 + t];
                int64_t at = h * D + (paged ? table[l][t / PAGE] * 2 * PAGE * ROW + t % PAGE * ROW
                                            : t * layer->keys.token_stride);
                expect_bytes("key", (float *)layer->keys.data + at,
                             view_at(&jobs[l].keys, h, from, 0), D * 4);
                expect_bytes("value", (float *)layer->values.data + at,
                             view_at(&jobs[l].values, h, from, 0), D * 4);
            }
        job_free(&jobs[l]);
    }
    free(pool);
}

/* ---- shared scopes ---- */
/* Two ranks hold two heads each of one layer; with their sums added, each selects what one rank
 * with all four heads selects. */
static void test_tensor_parallel(const rkv_backend *backend)
{
    enum { N = 120, D = 64, G = 2, W = 8, BUDGET = 50 };
    rng r = rng_seed(24);
    rkv_config config = rkv_config_default(BUDGET);
    shape whole = plain_shape(4, G, D, N), half = plain_shape(2, G, D, N);
    job all, rank[2];
    int k, i;
    case_begin("%s: shared scores reduced over two ranks", backend->name);
    config.scope = RKV_PER_LAYER;
    job_make(&all, &r, &config, &whole);
    run(rkv_score, backend, &config, &all, 1);
    for (i = 0; i < 2; i++) {
        job_make_from(&rank[i], &r, &config, &half, all.keys_f32 + i * 2 * N * D,
                      all.queries_f32 + i * 2 * G * W * D);
        run(rkv_score, backend, &config, &rank[i], 1);
    }
    for (k = 0; k < N - W; k++) {
        float sum = rank[0].layer.shared_scores[k] + rank[1].layer.shared_scores[k];
        expect_near("sum", k, (double)sum / 2, (double)job_shared(&all)[k], 1e-8);
        rank[0].layer.shared_scores[k] = rank[1].layer.shared_scores[k] = sum;
    }
    run(rkv_select, backend, &config, &all, 1);
    for (i = 0; i < 2; i++) {
        run(rkv_select, backend, &config, &rank[i], 1);
        expect_bytes("kept", rank[i].kept.data, all.kept.data, all.kept.bytes);
        job_free(&rank[i]);
    }
    job_free(&all);
}

/* ---- threads ---- */
typedef struct caller {
    job job;
    rkv_config config;
    const rkv_backend *backend;
    void *workspace;
    size_t bytes;
    rkv_status status;
} caller;

static void *call_one(void *argument)
{
    caller *c = (caller *)argument;
    c->status = rkv_compress(c->backend, &c->config, &c->job.layer, 1, c->workspace, c->bytes);
    return NULL;
}

/* Calls on distinct data at the same time give what they give one by one. */
static void test_concurrent_calls(const rkv_backend *backend)
{
    enum { CALLERS = 4 };
    caller list[CALLERS];
    pthread_t thread[CALLERS];
    int i;
    case_begin("%s: calls at the same time", backend->name);
    for (i = 0; i < CALLERS; i++) {
        rng r = rng_seed((uint64_t)(25 + i));
        shape s = plain_shape(2, 4, 64, 300 + i);
        list[i].config = rkv_config_default(100);
        list[i].backend = backend;
        job_make(&list[i].job, &r, &list[i].config, &s);
        rkv_workspace_size(backend, &list[i].config, &list[i].job.layer, 1, &list[i].bytes);
        list[i].workspace = alloc_checked(list[i].bytes);
    }
    for (i = 0; i < CALLERS; i++) pthread_create(&thread[i], NULL, call_one, &list[i]);
    for (i = 0; i < CALLERS; i++) pthread_join(thread[i], NULL);
    for (i = 0; i < CALLERS; i++) {
        int32_t *kept = (int32_t *)alloc_checked(list[i].job.kept.bytes);
        expect_status("status", list[i].status, RKV_OK);
        memcpy(kept, list[i].job.kept.data, list[i].job.kept.bytes);
        job_restore(&list[i].job);
        run(rkv_compress, backend, &list[i].config, &list[i].job, 1);
        expect_bytes("kept", list[i].job.kept.data, kept, list[i].job.kept.bytes);
        free(kept);
        free(list[i].workspace);
        job_free(&list[i].job);
    }
}

static void test_parallel_for_is_used(const rkv_backend *backend)
{
    rng r = rng_seed(30);
    rkv_config config = rkv_config_default(40);
    shape s = plain_shape(4, 1, 64, 100);
    int calls = 0;
    job j;
    case_begin("%s: parallel_for is given tasks", backend->name);
    config.n_threads = 3;
    config.parallel_for = reversed_for;
    config.pool_handle = &calls;
    job_make(&j, &r, &config, &s);
    run(rkv_compress, backend, &config, &j, 1);
    expect_true("called", calls > 0);
    job_free(&j);
}

static void test_all(const rkv_backend *backend)
{
    int pinned;
    test_key_scale(backend);
    test_attention_only(backend);
    test_round_once(backend);
    test_query_order(backend);
    test_independence(backend);
    test_place_of_a_pair(backend);
    test_small_spans(backend, RKV_PUBLISHED);
    test_small_spans(backend, RKV_PAPER);
    test_half_codes(backend, RKV_F16);
    test_half_codes(backend, RKV_BF16);
    for (pinned = 0; pinned <= 5; pinned += 5) {
        test_ties(backend, 0, RKV_PER_HEAD, pinned);
        test_ties(backend, 1, RKV_PER_HEAD, pinned);
        test_ties(backend, 0, RKV_PER_LAYER, pinned);
        test_rounds(backend, RKV_PER_HEAD, pinned, 0);
        test_rounds(backend, RKV_PER_LAYER, pinned, 0);
        test_rounds(backend, RKV_PER_HEAD, pinned, 20);
    }
    test_no_op(backend, 1);
    test_no_op(backend, 8);
    test_no_op(backend, 50);
    test_unused_rows(backend);
    test_protect(backend, 3);
    test_protect(backend, 8);
    test_protect(backend, 9);
    test_protect(backend, 49);
    test_protect(backend, 50);
    test_worst_are_pinned(backend, 0);
    test_worst_are_pinned(backend, 1);
    test_worst_are_pinned(backend, 41);
    test_worst_are_pinned(backend, 42);
    test_records(backend);
    test_presets(backend);
    test_streaming(backend, 24);
    test_streaming(backend, 5);
    test_streaming(backend, 4);
    test_streaming(backend, 1);
    test_pinned_pages(backend);
    test_fused_pool(backend, 0);
    test_fused_pool(backend, 1);
    test_tensor_parallel(backend);
    test_concurrent_calls(backend);
    test_parallel_for_is_used(backend);
}

int main(void)
{
    int i;
    n_backends = usable_backends(backends);
    for (i = 0; i < n_backends; i++) test_all(backends[i]);
    return close_tests();
}
