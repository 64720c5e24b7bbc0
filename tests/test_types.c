/* Keys, values and queries of every type: fp8, q8_0, and what a row loader reads. Each number is
 * what a table or a plain decoder says, on every CPU path.
 *     make test        or: build/tests/test_types */
#include "harness.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { W = 8 };

static shape plain_shape(int kv_heads, int group, int dim, int n)
{
    shape s;
    memset(&s, 0, sizeof s);
    s.kv_heads = kv_heads;
    s.group = group;
    s.head_dim = dim;
    s.n_tokens = n;
    return s;
}

static void run(stage_function call, const rkv_backend *backend, const rkv_config *config, job *j)
{
    expect_status("call", call_stage(call, backend, config, j, 1), RKV_OK);
}

/* The record says which row of which head it is, and nothing has changed. */
static void expect_fault(stage_function call, const rkv_backend *backend, rkv_config config, job *j,
                         const char *rule, int head, int token)
{
    rkv_error error;
    memset(&error, 0, sizeof error);
    config.error = &error;
    expect_status(rule, call_stage(call, backend, &config, j, 1), RKV_ERROR_NONFINITE);
    if (!error.rule || strcmp(error.rule, rule) != 0)
        case_fail("the rule is \"%s\"", error.rule ? error.rule : "none");
    expect_int("layer", 0, error.layer, 0);
    expect_int("head", 0, error.head, head);
    expect_int("token", 0, error.token, token);
    job_unchanged(rule, j);
}

static const char key_rule[] = "layer.keys: a key is NaN, infinite or of a norm above 1e18";
static const char query_rule[] = "layer.queries: a query is NaN, infinite or of a norm above 1e18";
static const char key_load_rule[] = "layer.keys.load: the row loader does not give a key";
static const char query_load_rule[] = "layer.queries.load: the row loader does not give a query";

/* ---- fp8 ---- */
/* From the OCP specification, and by Python's struct of the upper byte of a half. */
/* clang-format off */
static const double e4m3_numbers[127] = {
    0, 0.001953125, 0.00390625, 0.005859375, 0.0078125, 0.009765625, 0.01171875, 0.013671875,
    0.015625, 0.017578125, 0.01953125, 0.021484375, 0.0234375, 0.025390625, 0.02734375,
    0.029296875, 0.03125, 0.03515625, 0.0390625, 0.04296875, 0.046875, 0.05078125, 0.0546875,
    0.05859375, 0.0625, 0.0703125, 0.078125, 0.0859375, 0.09375, 0.1015625, 0.109375, 0.1171875,
    0.125, 0.140625, 0.15625, 0.171875, 0.1875, 0.203125, 0.21875, 0.234375, 0.25, 0.28125,
    0.3125, 0.34375, 0.375, 0.40625, 0.4375, 0.46875, 0.5, 0.5625, 0.625, 0.6875, 0.75, 0.8125,
    0.875, 0.9375, 1, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875, 2, 2.25, 2.5, 2.75, 3, 3.25,
    3.5, 3.75, 4, 4.5, 5, 5.5, 6, 6.5, 7, 7.5, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20, 22, 24,
    26, 28, 30, 32, 36, 40, 44, 48, 52, 56, 60, 64, 72, 80, 88, 96, 104, 112, 120, 128, 144, 160,
    176, 192, 208, 224, 240, 256, 288, 320, 352, 384, 416, 448
};
static const double e5m2_numbers[124] = {
    0, 1.52587890625e-05, 3.0517578125e-05, 4.57763671875e-05, 6.103515625e-05, 7.62939453125e-05,
    9.1552734375e-05, 0.0001068115234375, 0.0001220703125, 0.000152587890625, 0.00018310546875,
    0.000213623046875, 0.000244140625, 0.00030517578125, 0.0003662109375, 0.00042724609375,
    0.00048828125, 0.0006103515625, 0.000732421875, 0.0008544921875, 0.0009765625, 0.001220703125,
    0.00146484375, 0.001708984375, 0.001953125, 0.00244140625, 0.0029296875, 0.00341796875,
    0.00390625, 0.0048828125, 0.005859375, 0.0068359375, 0.0078125, 0.009765625, 0.01171875,
    0.013671875, 0.015625, 0.01953125, 0.0234375, 0.02734375, 0.03125, 0.0390625, 0.046875,
    0.0546875, 0.0625, 0.078125, 0.09375, 0.109375, 0.125, 0.15625, 0.1875, 0.21875, 0.25, 0.3125,
    0.375, 0.4375, 0.5, 0.625, 0.75, 0.875, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 10,
    12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384,
    448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096, 5120, 6144,
    7168, 8192, 10240, 12288, 14336, 16384, 20480, 24576, 28672, 32768, 40960, 49152, 57344
};
/* clang-format on */

static int is_finite_f8(rkv_dtype dtype, int code)
{
    return (code & 0x7F) < (dtype == RKV_F8_E4M3 ? 0x7F : 0x7C);
}

static float f8_number(rkv_dtype dtype, int code)
{
    double size = (dtype == RKV_F8_E4M3 ? e4m3_numbers : e5m2_numbers)[code & 0x7F];
    return (float)(code & 0x80 ? -size : size);
}

/* The tests' own conversions, which the generated cases use. */
static void test_f8_conversions(rkv_dtype dtype)
{
    int code;
    case_begin("%s: the tests' conversions", dtype_name(dtype));
    for (code = 0; code < 256; code++) {
        const float x = f8_to_float(dtype, (unsigned char)code);
        if (is_finite_f8(dtype, code)) {
            expect_near("number", code, (double)x, (double)f8_number(dtype, code), 0);
            expect_int("and back", code, f8_from_float(dtype, x), code);
        } else {
            expect_true("no number", !(fabsf(x) <= 1e30f));
        }
    }
    expect_near("a tie goes to even", 0, (double)round_to(dtype, 1.0625f), 1.0, 0);
    expect_near("saturates", 0, (double)round_to(dtype, 1e9f), dtype == RKV_F8_E4M3 ? 448 : 57344,
                0);
}

/* Every finite code at every place of a register: the same keys in f32 give the same bits. A row
 * has 16 adjacent codes, and so two or four exponents, so that each of them counts. */
static void test_f8_codes(const rkv_backend *backend, rkv_dtype dtype, int dim)
{
    enum { N = 256 };
    rng r = rng_seed(15);
    rkv_config config = rkv_config_default(100);
    shape s = plain_shape(1, 1, dim, N);
    const size_t n_keys = N * (size_t)dim;
    float *keys = (float *)alloc_checked(n_keys * sizeof *keys), queries[W * 64];
    unsigned char *codes = (unsigned char *)alloc_checked(n_keys);
    job eight, full;
    int row, i;
    case_begin("%s: every %s code, head dim %d", backend->name, dtype_name(dtype), dim);
    for (row = 0; row < N; row++)
        for (i = 0; i < dim; i++) {
            int code = row % 16 * 16 + (i + row / 16) % 16;
            if (!is_finite_f8(dtype, code)) code &= 0xF3;
            codes[row * dim + i] = (unsigned char)code;
            keys[row * dim + i] = f8_number(dtype, code);
        }
    for (i = 0; i < W * dim; i++) queries[i] = (float)ldexp(rng_normal(&r), -12);
    job_make_from(&full, &r, &config, &s, keys, queries);
    s.key_dtype = dtype;
    job_make_from(&eight, &r, &config, &s, keys, queries);
    memcpy(eight.keys.memory.data, codes, n_keys); /* the table alone has made them */
    run(rkv_score, backend, &config, &full);
    run(rkv_score, backend, &config, &eight);
    expect_bytes("scores", eight.scores.data, full.scores.data, full.scores.bytes);
    free(keys);
    free(codes);
    job_free(&eight);
    job_free(&full);
}

/* Each code that is no number is found, whether it lies where 16 numbers are loaded at a time or
 * behind that. */
static void test_f8_faults(const rkv_backend *backend, rkv_dtype dtype)
{
    enum { D = 37, N = 100 };
    rng r = rng_seed(16);
    rkv_config config = rkv_config_default(40);
    shape s = plain_shape(2, 1, D, N);
    job j;
    int code, turn = 0;
    case_begin("%s: %s codes that are no numbers", backend->name, dtype_name(dtype));
    s.key_dtype = dtype;
    job_make(&j, &r, &config, &s);
    for (code = 0; code < 256; code++) {
        const int head = code & 1, token = turn * 31 % N, i = turn * 7 % D;
        if (is_finite_f8(dtype, code)) continue;
        turn++;
        *view_at(&j.keys, head, token, i) = (unsigned char)code;
        block_remember(&j.keys.memory);
        expect_fault(turn % 2 ? rkv_score : rkv_compress, backend, config, &j, key_rule, head,
                     token);
        *view_at(&j.keys, head, token, i) = 0;
    }
    expect_int("codes", 0, turn, dtype == RKV_F8_E4M3 ? 2 : 8);
    job_free(&j);
}

/* A scale for the whole tensor is not seen by cosines and goes into rkv_layer.scale. */
static void test_f8_scale(const rkv_backend *backend)
{
    enum { D = 64, N = 90, G = 4 };
    const float scale = 0.375f;
    rng r = rng_seed(17);
    rkv_config config = rkv_config_default(40);
    shape s = plain_shape(1, G, D, N);
    float *scaled = (float *)alloc_checked(N * D * sizeof *scaled);
    job eight, full;
    int i;
    case_begin("%s: an fp8 tensor with a scale", backend->name);
    s.key_dtype = RKV_F8_E4M3;
    job_make(&eight, &r, &config, &s);
    for (i = 0; i < N * D; i++) scaled[i] = scale * eight.keys_f32[i];
    s.key_dtype = RKV_F32;
    job_make_from(&full, &r, &config, &s, scaled, eight.queries_f32);
    eight.layer.scale = scale / 8; /* 1 / sqrt(D) */
    run(rkv_score, backend, &config, &full);
    run(rkv_score, backend, &config, &eight);
    for (i = 0; i < N - W; i++)
        expect_near("score", i, (double)job_scores(&eight)[i], (double)job_scores(&full)[i], 1e-7);
    free(scaled);
    job_free(&eight);
    job_free(&full);
}

/* ---- q8_0 ---- */

/* What ggml's dequantize_row_q8_0 does, from its description. */
static void plain_q8_0(const unsigned char *bytes, float *out)
{
    uint16_t half;
    int i;
    memcpy(&half, bytes, 2);
    for (i = 0; i < 32; i++) {
        const int number = bytes[2 + i];
        out[i] = f16_to_float(half) * (float)(number > 127 ? number - 256 : number);
    }
}

/* Random blocks, every byte and scales down to the smallest: the same keys in f32 give the same
 * bits. */
static void test_q8_0_blocks(const rkv_backend *backend, layout keys_layout)
{
    enum { D = 96, N = 150 };
    static const int exponents[] = { 0, 0, 1, 2, 8, 14, 15, 20 };
    rng r = rng_seed(18);
    rkv_config config = rkv_config_default(60);
    shape s = plain_shape(2, 2, D, N);
    job blocks, full;
    int h, t, b, i;
    case_begin("%s: q8_0 blocks, %s", backend->name, layout_name(keys_layout));
    s.key_dtype = RKV_Q8_0;
    s.keys = s.values = keys_layout;
    job_make(&blocks, &r, &config, &s);
    for (h = 0; h < 2; h++)
        for (t = 0; t < N; t++)
            for (b = 0; b < D / 32; b++) {
                unsigned char *bytes = view_at(&blocks.keys, h, t, b);
                const uint16_t half =
                    (uint16_t)((rng_next(&r) & 0x83FF) | (unsigned)exponents[t % 8] << 10);
                memcpy(bytes, &half, sizeof half);
                for (i = 0; i < 32; i++)
                    bytes[2 + i] = (unsigned char)(t % 8 == b ? t + i : (int)rng_below(&r, 256));
                plain_q8_0(bytes, blocks.keys_f32 + (h * N + t) * D + 32 * b);
            }
    block_remember(&blocks.keys.memory);
    s.key_dtype = RKV_F32;
    job_make_from(&full, &r, &config, &s, blocks.keys_f32, blocks.queries_f32);
    run(rkv_compress, backend, &config, &full);
    run(rkv_compress, backend, &config, &blocks);
    expect_bytes("scores", blocks.scores.data, full.scores.data, full.scores.bytes);
    expect_bytes("kept", blocks.kept.data, full.kept.data, full.kept.bytes);
    job_compacted("compaction", &blocks, job_kept(&blocks), 60, 60);
    job_guards("guards", &blocks);
    job_free(&blocks);
    job_free(&full);
}

/* A scale that is no number is a fault, even where all its numbers are zero. */
static void test_q8_0_faults(const rkv_backend *backend)
{
    enum { D = 64, N = 100 };
    static const uint16_t scales[] = { 0x7C00, 0xFC00, 0x7C01, 0x7E00, 0xFFFF };
    rng r = rng_seed(19);
    rkv_config config = rkv_config_default(40);
    shape s = plain_shape(2, 1, D, N);
    job j;
    size_t i;
    case_begin("%s: q8_0 scales that are no numbers", backend->name);
    s.key_dtype = RKV_Q8_0;
    job_make(&j, &r, &config, &s);
    for (i = 0; i < sizeof scales / sizeof *scales; i++) {
        const int token = (int)i * 23 % N;
        unsigned char *bytes = view_at(&j.keys, 1, token, (int)i % 2);
        unsigned char before[34];
        memcpy(before, bytes, 34);
        memset(bytes, 0, 34);
        memcpy(bytes, &scales[i], 2);
        block_remember(&j.keys.memory);
        expect_fault(i % 2 ? rkv_score : rkv_compress, backend, config, &j, key_rule, 1, token);
        memcpy(bytes, before, 34);
    }
    job_free(&j);
}

/* K and V of a q8_0 cache in one buffer, [token][K heads, V heads]: they interleave, and share no
 * byte unless they begin too close to each other. */
static void test_q8_0_interleaved(const rkv_backend *backend)
{
    enum { H = 2, D = 64, N = 60, ROW = H * D / 32 * 34 };
    rng r = rng_seed(20);
    rkv_config config = rkv_config_default(30);
    shape s = plain_shape(H, 1, D, N);
    unsigned char *memory = (unsigned char *)alloc_checked(N * 2 * ROW);
    rkv_error error;
    job j;
    int i, h, t, kind;
    case_begin("%s: q8_0 keys and values that interleave", backend->name);
    s.key_dtype = RKV_Q8_0;
    job_make(&j, &r, &config, &s);
    for (kind = 0; kind < 2; kind++) {
        const view *from = kind ? &j.values : &j.keys;
        rkv_tensor *to = kind ? &j.layer.values : &j.layer.keys;
        for (t = 0; t < N; t++)
            for (h = 0; h < H; h++)
                for (i = 0; i < D / 32; i++)
                    memcpy(memory + (t * 2 + kind) * ROW + (h * D / 32 + i) * 34,
                           view_at(from, h, t, i), 34);
        to->data = memory + kind * ROW;
        to->head_stride = D;
        to->token_stride = 2 * H * D;
    }
    config.error = &error;
    j.layer.values.data = memory + ROW - 1;
    expect_status("too close", call_stage(rkv_compress, backend, &config, &j, 1),
                  RKV_ERROR_ARGUMENT);
    j.layer.values.data = memory + ROW;
    run(rkv_compress, backend, &config, &j);
    for (kind = 0; kind < 2; kind++)
        for (t = 0; t < 30; t++)
            for (h = 0; h < H; h++)
                for (i = 0; i < D / 32; i++)
                    expect_bytes(
                        "block", memory + (t * 2 + kind) * ROW + (h * D / 32 + i) * 34,
                        view_at(kind ? &j.values : &j.keys, h, job_kept(&j)[h * 30 + t], i), 34);
    free(memory);
    job_free(&j);
}

/* ---- queries and values of other types than the keys ---- */
static void test_queries(const rkv_backend *backend, rkv_dtype dtype)
{
    enum { D = 64, N = 70, G = 3 };
    rng r = rng_seed(21);
    rkv_config config = rkv_config_snapkv(40);
    shape s = plain_shape(2, G, D, N);
    job full, j;
    case_begin("%s: %s queries", backend->name, dtype_name(dtype));
    s.dtype = dtype;
    s.queries = LAYOUT_TOKEN_MAJOR;
    s.key_dtype = RKV_F16;
    job_make(&j, &r, &config, &s);
    s.dtype = RKV_F32;
    job_make_from(&full, &r, &config, &s, j.keys_f32, j.queries_f32);
    run(rkv_score, backend, &config, &full);
    run(rkv_score, backend, &config, &j);
    expect_bytes("scores", j.scores.data, full.scores.data, full.scores.bytes);
    job_inputs_unchanged("inputs", &j);
    block_remember(&j.scores);
    view_store_one(&j.queries, 4, 5, 40, NAN);
    block_remember(&j.queries.memory);
    expect_fault(rkv_compress, backend, config, &j, query_rule, 4, 5);
    if (dtype == RKV_OPAQUE) {
        *view_at(&j.queries, 3, 2, 0) ^= 1;
        block_remember(&j.queries.memory);
        expect_fault(rkv_compress, backend, config, &j, query_load_rule, 3, 2);
    }
    job_free(&full);
    job_free(&j);
}

static void test_values(const rkv_backend *backend, rkv_dtype dtype)
{
    enum { D = 20, N = 70 };
    int l;
    for (l = 0; l < N_LAYOUTS; l++) {
        rng r = rng_seed(22 + (uint64_t)l);
        rkv_config config = rkv_config_default(40);
        shape s = plain_shape(2, 1, D, N);
        job j;
        if ((dtype == RKV_Q8_0 || dtype == RKV_OPAQUE) && l >= N_KEY_LAYOUTS) continue;
        case_begin("%s: %s values, %s", backend->name, dtype_name(dtype), layout_name((layout)l));
        job_make(&j, &r, &config, &s);
        view_free(&j.values);
        view_make(&j.values, &r, (layout)l, dtype, 0, 2, N + 3, 96, (size_t)l);
        j.layer.values = j.values.tensor;
        j.layer.values.load = NULL; /* values are not read */
        run(rkv_compress, backend, &config, &j);
        job_compacted("compaction", &j, job_kept(&j), 40, 40);
        job_guards("guards", &j);
        job_free(&j);
    }
}

/* ---- row loaders ---- */

/* Reads f16 rows and checks what it is asked for. Several threads may do so. */
typedef struct watcher {
    const view *keys;
    int n_rows[100], most; /* how often each row has been asked for; the most at a time */
    int runs;
    int fail_at, calls; /* the call that fails; -1: none */
    int fail_with;      /* what that call returns */
} watcher;

static int watch(void *user, const rkv_rows *rows, float *dst)
{
    watcher *w = (watcher *)user;
    const int dim = w->keys->tensor.dim;
    int r, i;
    expect_int("dim", 0, rows->dim, dim);
    expect_true("rows", rows->n_rows >= 1 && rows->token >= 0 && rows->token + rows->n_rows <= 100);
    if (rows->n_rows == 1) expect_int("stride of one row", 0, (int64_t)rows->stride, 0);
    for (r = 0; r < rows->n_rows; r++) {
        const unsigned char *row = (const unsigned char *)rows->data + (size_t)r * rows->stride;
        expect_true("address", row == view_at(w->keys, rows->head, rows->token + r, 0));
        w->n_rows[rows->token + r]++;
        for (i = 0; i < dim; i++) {
            uint16_t half;
            memcpy(&half, row + 2 * i, sizeof half);
            *dst++ = f16_to_float(half);
        }
    }
    if (rows->n_rows > w->most) w->most = rows->n_rows;
    w->runs++;
    return w->calls++ == w->fail_at ? w->fail_with : rows->n_rows;
}

/* The view of f16 keys as one of opaque rows: strides in bytes. */
static rkv_tensor opaque_of(const view *keys, watcher *w)
{
    rkv_tensor t = keys->tensor;
    const int64_t rows = t.block_table ? t.block_tokens : t.tokens;
    const int64_t token = t.token_stride ? t.token_stride : t.dim;
    const int64_t head = t.head_stride ? t.head_stride : rows * t.dim;
    const int64_t apart = t.block_stride ? t.block_stride : t.heads * rows * t.dim;
    t.dtype = RKV_OPAQUE;
    t.element_bytes = 2 * t.dim;
    t.token_stride = 2 * token;
    t.head_stride = 2 * head;
    t.block_stride = 2 * apart;
    t.dim_stride = 0;
    t.load = watch;
    t.load_user = w;
    memset(w, 0, sizeof *w);
    w->keys = keys;
    w->fail_at = -1;
    return t;
}

/* The same bits as without the loader; each row is asked for, many at a time where they are evenly
 * spaced. */
static void test_loader(const rkv_backend *backend, layout l, int dim)
{
    enum { N = 100 };
    rng r = rng_seed(40 + (uint64_t)l);
    rkv_config config = rkv_config_default(60);
    shape s = plain_shape(2, 2, dim, N);
    watcher w;
    job j, plain;
    int t;
    case_begin("%s: a row loader, %s, head dim %d", backend->name, layout_name(l), dim);
    s.key_dtype = RKV_F16;
    s.keys = l;
    job_make(&j, &r, &config, &s);
    s.keys = LAYOUT_CONTIGUOUS;
    job_make_from(&plain, &r, &config, &s, j.keys_f32, j.queries_f32);
    run(rkv_score, backend, &config, &plain);
    j.layer.keys = opaque_of(&j.keys, &w);
    run(rkv_score, backend, &config, &j);
    expect_bytes("scores", j.scores.data, plain.scores.data, plain.scores.bytes);
    for (t = 0; t < N; t++) expect_true("both heads, twice", w.n_rows[t] >= 4);
    if (l == LAYOUT_CONTIGUOUS || l == LAYOUT_STRIDED || l == LAYOUT_TOKEN_MAJOR)
        expect_int("rows at a time", 0, w.most, 48);
    run(rkv_compress, backend, &config, &j);
    job_compacted("compaction", &j, job_kept(&j), 60, 60);
    job_free(&j);
    job_free(&plain);
}

/* A list of rows that are mostly adjacent is read in runs. */
static void test_loader_runs(const rkv_backend *backend)
{
    enum { D = 32, N = 96 };
    rng r = rng_seed(50);
    rkv_config config = rkv_config_default(60);
    shape s = plain_shape(1, 1, D, N);
    int32_t list[N];
    watcher w;
    job j;
    int i;
    case_begin("%s: a row loader and runs of a list", backend->name);
    s.key_dtype = RKV_F16;
    job_make(&j, &r, &config, &s);
    config.lambda = 1; /* one pass over the keys */
    for (i = 0; i < N; i++) list[i] = i < 40 ? i + 56 : i - 40;
    j.keys.tensor.block_table = list;
    j.keys.tensor.block_tokens = 1;
    j.layer.keys = opaque_of(&j.keys, &w);
    run(rkv_score, backend, &config, &j);
    expect_int("runs", 0, w.runs, 3); /* rows 0 to 39, 40 to 47, 48 to 95 */
    expect_int("rows at a time", 0, w.most, 48);
    job_free(&j);
}

/* Whichever call it is that does not give its rows, and whatever it returns: a fault with its
 * place, and nothing changes. */
static void test_loader_faults(const rkv_backend *backend)
{
    /* The newest keys are read first, one by one: as many as the 8 queries leave places free. */
    enum { D = 20, N = 100, SECOND_CHUNK = 8 + 1 };
    static const int returns[] = { 0, -1, 1000, 7 };
    rng r = rng_seed(51);
    rkv_config config = rkv_config_default(60);
    shape s = plain_shape(1, 1, D, N);
    watcher w;
    job j;
    int at, n_calls;
    case_begin("%s: a row loader that fails", backend->name);
    s.key_dtype = RKV_F16;
    job_make(&j, &r, &config, &s);
    j.layer.keys = opaque_of(&j.keys, &w);
    j.remembered = j.layer;
    run(rkv_score, backend, &config, &j);
    n_calls = w.calls;
    expect_true("more than one pass", n_calls > 4);
    block_remember(&j.scores);
    for (at = 0; at < n_calls; at++) {
        rkv_error error;
        w.calls = 0;
        w.fail_at = at;
        w.fail_with = returns[at % 3];
        memset(&error, 0, sizeof error);
        config.error = &error;
        expect_status("fails",
                      call_stage(at % 2 ? rkv_score : rkv_compress, backend, &config, &j, 1),
                      RKV_ERROR_NONFINITE);
        expect_true("rule", error.rule && strcmp(error.rule, key_load_rule) == 0);
        expect_true("token", error.token >= 0 && error.token < N);
        if (at == SECOND_CHUNK) expect_int("token of the second chunk", 0, error.token, 48);
        job_unchanged("nothing", &j);
    }
    w.calls = 0;
    w.fail_at = SECOND_CHUNK;
    w.fail_with = returns[3]; /* seven rows of the second chunk, not the next */
    expect_fault(rkv_compress, backend, config, &j, key_load_rule, 0, 48 + 7);
    w.calls = 0;
    view_store_one(&j.keys, 0, 50, 3, NAN); /* before it */
    block_remember(&j.keys.memory);
    expect_fault(rkv_compress, backend, config, &j, key_rule, 0, 50);
    job_free(&j);
}

int main(void)
{
    static const rkv_dtype f8[] = { RKV_F8_E4M3, RKV_F8_E5M2 };
    const rkv_backend *backends[MAX_BACKENDS];
    const int n = usable_backends(backends);
    int b, k, l;
    for (k = 0; k < 2; k++) test_f8_conversions(f8[k]);
    for (b = 0; b < n; b++) {
        for (k = 0; k < 2; k++) {
            test_f8_codes(backends[b], f8[k], 16);
            test_f8_codes(backends[b], f8[k], 13); /* and behind the last register */
            test_f8_codes(backends[b], f8[k], 64);
            test_f8_faults(backends[b], f8[k]);
        }
        test_f8_scale(backends[b]);
        test_q8_0_faults(backends[b]);
        test_q8_0_interleaved(backends[b]);
        for (k = RKV_F32; k <= RKV_Q8_0; k++) {
            test_queries(backends[b], (rkv_dtype)k);
            test_values(backends[b], (rkv_dtype)k);
        }
        for (l = 0; l < N_KEY_LAYOUTS; l++) {
            test_q8_0_blocks(backends[b], (layout)l);
            test_loader(backends[b], (layout)l, 64);
            test_loader(backends[b], (layout)l, 37);
        }
        test_loader_runs(backends[b]);
        test_loader_faults(backends[b]);
    }
    return close_tests();
}
