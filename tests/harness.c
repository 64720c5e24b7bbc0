/* The shared part of the tests: see harness.h. Built and linked into every one of them by
 *     make test */
#include "harness.h"

#include <float.h>
#include <fenv.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- checks ---- */
static int passed, failed, skipped; /* cases */
static int case_failures, case_open;
static char case_name[512];

enum { MAX_PRINTED = 6 }; /* failures of one case: the first ones say what is wrong */

void case_begin(const char *format, ...)
{
    va_list arguments;
    case_end();
    va_start(arguments, format);
    vsnprintf(case_name, sizeof case_name, format, arguments);
    va_end(arguments);
    case_open = 1;
    case_failures = 0;
}

void case_end(void)
{
    if (!case_open) return;
    if (case_failures > MAX_PRINTED)
        printf("FAIL  %s: %d failures in all\n", case_name, case_failures);
    if (case_failures)
        failed++;
    else
        passed++;
    case_open = 0;
    fflush(stdout);
}

const char *case_text(void)
{
    return case_name;
}

/* Counts a failure; true when it is to be printed. */
static int fails(void)
{
    if (!case_open) case_begin("outside any case");
    return ++case_failures <= MAX_PRINTED;
}

void case_fail(const char *format, ...)
{
    va_list arguments;
    if (!fails()) return;
    printf("FAIL  %s: ", case_name);
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    printf("\n");
}

int expect_true(const char *at, int holds)
{
    if (holds) return 1;
    if (fails()) printf("FAIL  %s: %s does not hold\n", case_name, at);
    return 0;
}

int expect_int(const char *at, int i, int64_t got, int64_t want)
{
    if (got == want) return 1;
    if (fails())
        printf("FAIL  %s: %s [%d] got %lld want %lld\n", case_name, at, i, (long long)got,
               (long long)want);
    return 0;
}

int expect_near(const char *at, int i, double got, double want, double tolerance)
{
    double error = fabs(got - want);
    if (error <= tolerance) return 1; /* not error > tolerance: a NaN must fail */
    if (fails())
        printf("FAIL  %s: %s [%d] got %.9g want %.9g err %.1e > %.0e\n", case_name, at, i, got,
               want, error, tolerance);
    return 0;
}

int expect_bytes(const char *at, const void *got, const void *want, size_t bytes)
{
    const unsigned char *a = (const unsigned char *)got, *b = (const unsigned char *)want;
    size_t i;
    if (bytes == 0 || memcmp(a, b, bytes) == 0) return 1;
    for (i = 0; a[i] == b[i]; i++) continue;
    if (fails())
        printf("FAIL  %s: %s: byte %lu of %lu is %02x, not %02x\n", case_name, at, (unsigned long)i,
               (unsigned long)bytes, a[i], b[i]);
    return 0;
}

int expect_status(const char *at, rkv_status got, rkv_status want)
{
    if (got == want) return 1;
    if (fails())
        printf("FAIL  %s: %s: status \"%s\", want \"%s\"\n", case_name, at, rkv_status_string(got),
               rkv_status_string(want));
    return 0;
}

int expect_same_config(const char *at, const rkv_config *got, const rkv_config *want)
{
    return expect_bytes(at, got, want, offsetof(rkv_config, seed) + sizeof got->seed) &
           expect_true(at, got->device_error == want->device_error);
}

static int same_tensor(const rkv_tensor *a, const rkv_tensor *b)
{
    return a->data == b->data && a->dtype == b->dtype && a->heads == b->heads &&
           a->tokens == b->tokens && a->dim == b->dim && a->head_stride == b->head_stride &&
           a->token_stride == b->token_stride && a->dim_stride == b->dim_stride &&
           a->element_bytes == b->element_bytes && a->block_table == b->block_table &&
           a->block_tokens == b->block_tokens && a->block_stride == b->block_stride &&
           a->load == b->load && a->load_user == b->load_user;
}

int expect_same_layer(const char *at, const rkv_layer *got, const rkv_layer *want)
{
    return expect_true(at, same_tensor(&got->keys, &want->keys) &&
                               same_tensor(&got->values, &want->values) &&
                               same_tensor(&got->queries, &want->queries) &&
                               got->positions == want->positions && got->pins == want->pins &&
                               got->kept == want->kept && got->scores == want->scores &&
                               got->shared_scores == want->shared_scores) &
           expect_bytes(at, &got->scale, &want->scale, sizeof got->scale) &
           expect_bytes(at, &got->softcap, &want->softcap, sizeof got->softcap) &
           expect_int(at, 0, got->n_tokens, want->n_tokens) &
           expect_int(at, 1, got->n_kept, want->n_kept) &
           expect_int(at, 2, got->row_stride, want->row_stride) &
           expect_int(at, 3, got->sequence, want->sequence) &
           expect_int(at, 4, got->n_new, want->n_new) &
           expect_int(at, 5, got->first_query, want->first_query);
}

void skip(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    printf("skip  ");
    vprintf(format, arguments);
    printf("\n");
    va_end(arguments);
    skipped++;
}

int cases_failed(void)
{
    return failed;
}

int close_tests(void)
{
    case_end();
    printf("%d passed, %d failed, %d skipped\n", passed, failed, skipped);
    return failed != 0 || passed == 0;
}

/* Is `name` one of the words of `list`? */
static int names(const char *list, const char *name)
{
    size_t length = strlen(name);
    const char *at = list;
    while (list && (at = strstr(at, name)) != NULL) {
        int starts = at == list || at[-1] == ' ' || at[-1] == ',';
        if (starts && (at[length] == 0 || at[length] == ' ' || at[length] == ',')) return 1;
        at += length;
    }
    return 0;
}

static const char *const cpu_paths[] = { "avx512", "avx2", "neon", "scalar" };

/* A misspelt name would demand nothing. */
static void check_expected(const char *list)
{
    while (list && *(list += strspn(list, " ,"))) {
        size_t length = strcspn(list, " ,"), i, known = 0;
        for (i = 0; i < sizeof cpu_paths / sizeof *cpu_paths; i++)
            known |= strlen(cpu_paths[i]) == length && !strncmp(cpu_paths[i], list, length);
        case_begin("EXPECT");
        if (!known) case_fail("there is no CPU path %.*s", (int)length, list);
        case_end();
        list += length;
    }
}

uint64_t wanted_cases(uint64_t usual)
{
    const char *text = getenv("RKV_TEST_CASES");
    char *end;
    uint64_t wanted;
    if (!text || !*text) return usual;
    wanted = strtoull(text, &end, 10);
    if (*end == 0 && wanted > 0) return wanted;
    printf("FAIL  RKV_TEST_CASES is no number of cases: %s\n", text);
    exit(1);
}

int usable_backends(const rkv_backend *list[MAX_BACKENDS])
{
    const char *expected = getenv("EXPECT");
    int n = 0;
    size_t i;
    check_expected(expected);
    for (i = 0; i < sizeof cpu_paths / sizeof *cpu_paths; i++) {
        const rkv_backend *found = rkv_backend_find(cpu_paths[i]);
        if (found) {
            list[n++] = found;
        } else if (names(expected, cpu_paths[i])) {
            case_begin("backend %s", cpu_paths[i]);
            expect_true("usable, as EXPECT demands", 0);
            case_end();
        } else {
            skip("%s: not usable on this CPU", cpu_paths[i]);
        }
    }
    return n;
}

/* ---- memory ---- */
enum { GUARD = 64 };

void *alloc_checked(size_t bytes)
{
    void *memory = malloc(bytes ? bytes : 1);
    if (memory) return memory;
    printf("FAIL  out of memory: %lu bytes\n", (unsigned long)bytes);
    exit(1);
}

static unsigned char guard_byte(size_t i)
{
    return (unsigned char)(0xA5u ^ (unsigned)(i * 37u));
}

void block_make(block *b, size_t bytes, size_t misalign, int rear_guard)
{
    size_t i;
    b->bytes = bytes;
    b->total = GUARD + misalign + bytes + (rear_guard ? GUARD : 0);
    b->base = (unsigned char *)alloc_checked(b->total);
    b->data = b->base + GUARD + misalign;
    b->image = (unsigned char *)alloc_checked(b->total);
    for (i = 0; i < b->total; i++) b->base[i] = guard_byte(i);
    block_remember(b);
}

void block_free(block *b)
{
    free(b->base);
    free(b->image);
    memset(b, 0, sizeof *b);
}

void block_remember(block *b)
{
    memcpy(b->image, b->base, b->total);
}

void block_restore(block *b)
{
    memcpy(b->base, b->image, b->total);
}

int block_unchanged(const char *at, const block *b)
{
    return b->base == NULL || expect_bytes(at, b->base, b->image, b->total);
}

/* The remembered contents. */
static const unsigned char *block_before(const block *b)
{
    return b->base ? b->image + (b->data - b->base) : NULL;
}

int block_guards(const char *at, const block *b)
{
    size_t front = b->base ? (size_t)(b->data - b->base) : 0;
    if (b->base == NULL) return 1;
    return expect_bytes(at, b->base, b->image, front) &&
           expect_bytes(at, b->data + b->bytes, b->image + front + b->bytes,
                        b->total - front - b->bytes);
}

/* ---- random numbers ---- */
rng rng_seed(uint64_t seed)
{
    rng r;
    r.state = seed * 0x9E3779B97F4A7C15u + 0x1234567u;
    rng_next(&r);
    return r;
}

uint64_t rng_next(rng *r) /* splitmix64 */
{
    uint64_t z = r->state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

int rng_below(rng *r, int n)
{
    return (int)(rng_next(r) % (uint64_t)n);
}

int rng_pick(rng *r, const int *list, int n)
{
    return list[rng_below(r, n)];
}

double rng_unit(rng *r)
{
    return (double)(rng_next(r) >> 11) / 9007199254740992.0;
}

double rng_normal(rng *r) /* twelve uniforms: no libm, so the same numbers everywhere */
{
    double sum = -6.0;
    int i;
    for (i = 0; i < 6; i++) {
        uint64_t bits = rng_next(r);
        sum += (double)(bits >> 32) / 4294967296.0 + (double)(bits & 0xFFFFFFFFu) / 4294967296.0;
    }
    return sum;
}

/* ---- number formats ---- */
/* Rounds x to `mantissa` bits below the leading one, exponents down to min_exponent. */
static double round_binary(double x, int mantissa, int min_exponent)
{
    int exponent;
    double step, scaled;
    if (x == 0 || !(fabs(x) <= DBL_MAX)) return x; /* zero, infinity, NaN */
    frexp(x, &exponent);
    exponent = exponent - 1 < min_exponent ? min_exponent : exponent - 1;
    step = ldexp(1.0, exponent - mantissa);
    scaled = x / step;
    return nearbyint(scaled) * step; /* the default rounding: to nearest, ties to even */
}

uint16_t f16_from_float(float x)
{
    double rounded = round_binary((double)x, 10, -14), size = fabs(rounded);
    unsigned sign = signbit(x) ? 0x8000u : 0u;
    int exponent;
    if (isnan(x)) return (uint16_t)(sign | 0x7E00u);
    if (size > 65504.0) return (uint16_t)(sign | 0x7C00u);
    if (size < ldexp(1.0, -14)) return (uint16_t)(sign | (unsigned)(size * ldexp(1.0, 24)));
    frexp(size, &exponent);
    return (uint16_t)(sign | ((unsigned)(exponent + 14) << 10) |
                      ((unsigned)ldexp(size, 11 - exponent) & 0x3FFu));
}

float f16_to_float(uint16_t bits)
{
    int exponent = (bits >> 10) & 31, mantissa = bits & 0x3FF;
    double size = exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
    if (exponent == 31) size = mantissa ? (double)NAN : (double)INFINITY;
    return (float)(bits & 0x8000 ? -size : size);
}

uint16_t bf16_from_float(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (isnan(x)) return (uint16_t)((bits >> 16) | 0x40u);
    return (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

float bf16_to_float(uint16_t bits)
{
    uint32_t wide = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &wide, sizeof x);
    return x;
}

/* Four bits of exponent and three of mantissa, or five and two. */
float f8_to_float(rkv_dtype dtype, unsigned char code)
{
    const int mantissa_bits = dtype == RKV_F8_E4M3 ? 3 : 2, bias = dtype == RKV_F8_E4M3 ? 7 : 15;
    const int magnitude = code & 0x7F, one = 1 << mantissa_bits;
    const int exponent = magnitude >> mantissa_bits, mantissa = magnitude % one;
    double size = exponent ? ldexp(one + mantissa, exponent - bias - mantissa_bits)
                           : ldexp(mantissa, 1 - bias - mantissa_bits);
    if (dtype == RKV_F8_E4M3 && magnitude == 0x7F) size = (double)NAN;
    if (dtype == RKV_F8_E5M2 && magnitude >= 0x7C)
        size = magnitude == 0x7C ? (double)INFINITY : (double)NAN;
    return (float)(code & 0x80 ? -size : size);
}

unsigned char f8_from_float(rkv_dtype dtype, float x)
{
    const int last = dtype == RKV_F8_E4M3 ? 0x7E : 0x7B, sign = signbit(x) ? 0x80 : 0;
    const double size = fabs((double)x);
    double below, above;
    int low = 0, high = last; /* codes ascend with the numbers */
    if (isnan(x)) return (unsigned char)(sign | 0x7F);
    if (isinf(x)) return (unsigned char)(sign | (dtype == RKV_F8_E4M3 ? 0x7F : 0x7C));
    while (low < high) { /* the largest code whose number is not above size */
        const int middle = (low + high + 1) / 2;
        if ((double)f8_to_float(dtype, (unsigned char)middle) <= size)
            low = middle;
        else
            high = middle - 1;
    }
    if (low == last) return (unsigned char)(sign | last);
    below = (double)f8_to_float(dtype, (unsigned char)low);
    above = (double)f8_to_float(dtype, (unsigned char)(low + 1));
    if (size - below > above - size || (size - below >= above - size && low % 2)) low++;
    return (unsigned char)(sign | low);
}

const char *dtype_name(rkv_dtype dtype)
{
    static const char *const list[] = { "f32", "f16", "bf16", "opaque", "e4m3", "e5m2", "q8_0" };
    return list[dtype];
}

size_t dtype_bytes(rkv_dtype dtype)
{
    static const size_t list[] = { 4, 2, 2, 1, 1, 1, 34 };
    return list[dtype];
}

int element_dims(rkv_dtype dtype)
{
    return dtype == RKV_Q8_0 ? 32 : 1;
}

float round_to(rkv_dtype dtype, float x)
{
    if (dtype == RKV_F16) return f16_to_float(f16_from_float(x));
    if (dtype == RKV_BF16) return bf16_to_float(bf16_from_float(x));
    if (dtype == RKV_F8_E4M3 || dtype == RKV_F8_E5M2)
        return f8_to_float(dtype, f8_from_float(dtype, x));
    return x;
}

size_t row_bytes(rkv_dtype dtype, int dim)
{
    if (dtype == RKV_OPAQUE) return 1 + 4 * (size_t)dim;
    return dtype_bytes(dtype) * (size_t)(dim / element_dims(dtype));
}

/* As ggml's reference: the scale is a 127th of the largest number. A number that is not finite
 * goes into the scale. */
static void encode_q8_0(const float *numbers, unsigned char *out)
{
    float largest = 0, scale;
    uint16_t half;
    int i, finite = 1;
    for (i = 0; i < 32; i++) {
        if (fabsf(numbers[i]) > largest) largest = fabsf(numbers[i]);
        finite &= fabs((double)numbers[i]) <= DBL_MAX;
    }
    scale = largest / 127;
    half = f16_from_float(scale > 65504 ? 65504.0f : scale);
    for (i = 0; i < 32; i++) {
        double number = scale > 0 ? nearbyint((double)numbers[i] / (double)scale) : 0;
        out[2 + i] = (unsigned char)(!finite         ? 1
                                     : number > 127  ? 127
                                     : number < -127 ? -127
                                                     : (int)number);
        if (isnan(numbers[i])) half = f16_from_float(numbers[i]);
    }
    if (!finite && !isnan(f16_to_float(half))) half = f16_from_float(INFINITY);
    memcpy(out, &half, sizeof half);
}

static void decode_q8_0(const unsigned char *in, float *numbers)
{
    uint16_t half;
    int i;
    memcpy(&half, in, sizeof half);
    for (i = 0; i < 32; i++)
        numbers[i] = (float)(in[2 + i] < 128 ? in[2 + i] : in[2 + i] - 256) * f16_to_float(half);
}

/* Opaque rows: a sign that depends on the length; then the numbers, the last one first, with all
 * bits inverted. */
static unsigned char opaque_sign(int dim)
{
    return (unsigned char)(0xC3 ^ dim);
}

void encode_row(rkv_dtype dtype, const float *row, int dim, unsigned char *out)
{
    const size_t bytes = dtype_bytes(dtype);
    int i;
    if (dtype == RKV_OPAQUE) *out = opaque_sign(dim);
    for (i = 0; i < dim; i++) {
        uint16_t half = dtype == RKV_F16 ? f16_from_float(row[i]) : bf16_from_float(row[i]);
        uint32_t bits;
        memcpy(&bits, &row[i], sizeof bits);
        bits = ~bits;
        switch (dtype) {
        case RKV_F32: memcpy(out + 4 * (size_t)i, &row[i], sizeof row[i]); break;
        case RKV_F16:
        case RKV_BF16: memcpy(out + bytes * (size_t)i, &half, sizeof half); break;
        case RKV_OPAQUE: memcpy(out + 1 + 4 * (size_t)(dim - 1 - i), &bits, sizeof bits); break;
        case RKV_F8_E4M3:
        case RKV_F8_E5M2: out[i] = f8_from_float(dtype, row[i]); break;
        case RKV_Q8_0:
            if (i % 32 == 0) encode_q8_0(row + i, out + 34 * (size_t)(i / 32));
            break;
        }
    }
}

void decode_row(rkv_dtype dtype, const unsigned char *in, int dim, float *row)
{
    const size_t bytes = dtype_bytes(dtype);
    int i;
    for (i = 0; i < dim; i++) {
        uint16_t half = 0;
        uint32_t bits;
        if (dtype == RKV_F16 || dtype == RKV_BF16)
            memcpy(&half, in + bytes * (size_t)i, sizeof half);
        switch (dtype) {
        case RKV_F32: memcpy(&row[i], in + 4 * (size_t)i, sizeof row[i]); break;
        case RKV_F16: row[i] = f16_to_float(half); break;
        case RKV_BF16: row[i] = bf16_to_float(half); break;
        case RKV_OPAQUE:
            memcpy(&bits, in + 1 + 4 * (size_t)(dim - 1 - i), sizeof bits);
            bits = ~bits;
            memcpy(&row[i], &bits, sizeof bits);
            break;
        case RKV_F8_E4M3:
        case RKV_F8_E5M2: row[i] = f8_to_float(dtype, in[i]); break;
        case RKV_Q8_0:
            if (i % 32 == 0) decode_q8_0(in + 34 * (size_t)(i / 32), row + i);
            break;
        }
    }
}

static int opaque_user; /* its address is what the loader must be given */

int load_opaque(void *user, const rkv_rows *rows, float *dst)
{
    int r;
    if (user != &opaque_user || rows->head < 0 || rows->token < 0) return 0;
    for (r = 0; r < rows->n_rows; r++) {
        const unsigned char *row = (const unsigned char *)rows->data + (size_t)r * rows->stride;
        if (*row != opaque_sign(rows->dim)) return r;
        decode_row(RKV_OPAQUE, row, rows->dim, dst + (size_t)r * (size_t)rows->dim);
    }
    return r;
}

/* ---- keys ---- */
const char *key_kind_name(key_kind kind)
{
    static const char *const list[N_KEY_KINDS] = {
        "isotropic", "shared direction", "repeats", "exact repeats", "identical",  "zero",
        "zero rows", "outlier channel",  "rotary",  "tiny",          "half alike",
    };
    return list[kind];
}

static void noise_rows(rng *r, float *rows, int n, int dim, double scale)
{
    size_t i, count = (size_t)n * (size_t)dim;
    for (i = 0; i < count; i++) rows[i] = (float)(scale * rng_normal(r));
}

/* key = sqrt(c) u + sqrt(1 - c) noise, with |u| as long as the noise: cosines average c. */
static void shared_rows(rng *r, double strength, float *rows, int n, int dim)
{
    float *direction = (float *)alloc_checked((size_t)dim * sizeof(float));
    int t, i;
    noise_rows(r, direction, 1, dim, sqrt(strength));
    noise_rows(r, rows, n, dim, sqrt(1 - strength));
    for (t = 0; t < n; t++)
        for (i = 0; i < dim; i++) rows[(size_t)t * (size_t)dim + (size_t)i] += direction[i];
    free(direction);
}

/* Segments of 3 to 12 rows; about half of them are earlier ones said again. */
static void repeated_rows(rng *r, double noise, float *rows, int n, int dim)
{
    int t = 0, k, i;
    while (t < n) {
        int length = 3 + rng_below(r, 10), source = -1;
        if (length > n - t) length = n - t;
        if (t >= length && rng_below(r, 2)) source = rng_below(r, t - length + 1);
        for (k = 0; k < length; k++)
            for (i = 0; i < dim; i++) {
                size_t at = (size_t)(t + k) * (size_t)dim + (size_t)i;
                size_t from = (size_t)(source + k) * (size_t)dim + (size_t)i;
                rows[at] =
                    source < 0 ? (float)rng_normal(r) : rows[from] + (float)(noise * rng_normal(r));
            }
        t += length;
    }
}

/* Rows of rank at most 4, repeated, turned by their position: pairs (i, i + dim/2). */
static void rotary_rows(rng *r, float *rows, int n, int dim)
{
    int rank = dim < 4 ? dim : 4, half = dim / 2, t, i, k;
    float *basis = (float *)alloc_checked((size_t)(rank * dim) * sizeof(float));
    float *content = (float *)alloc_checked((size_t)n * (size_t)rank * sizeof(float));
    noise_rows(r, basis, rank, dim, 1.0);
    repeated_rows(r, 0.05, content, n, rank);
    for (t = 0; t < n; t++) {
        float *row = rows + (size_t)t * (size_t)dim;
        for (i = 0; i < dim; i++) {
            double sum = 0;
            for (k = 0; k < rank; k++)
                sum += (double)content[t * rank + k] * (double)basis[k * dim + i];
            row[i] = (float)sum;
        }
        for (i = 0; i < half; i++) {
            double angle = t * pow(10000.0, -2.0 * i / dim), c = cos(angle), s = sin(angle);
            double x = (double)row[i], y = (double)row[i + half];
            row[i] = (float)(c * x - s * y);
            row[i + half] = (float)(s * x + c * y);
        }
    }
    free(basis);
    free(content);
}

/* The sum of one unit vector that all rows share and one of dim - 1 others, mirrored in a random
 * direction so that every element counts, and of random length. */
static void half_rows(rng *r, float *rows, int n, int dim)
{
    float *mirror = (float *)alloc_checked((size_t)dim * sizeof(float));
    double square = 0;
    int t, i;
    noise_rows(r, mirror, 1, dim, 1.0);
    for (i = 0; i < dim; i++) square += (double)mirror[i] * (double)mirror[i];
    for (t = 0; t < n; t++) {
        const int own = dim > 1 ? 1 + rng_below(r, dim - 1) : 0;
        const double length = 0.5 + rng_unit(r);
        const double twice = 2.0 * ((double)mirror[0] + (double)mirror[own]) / square;
        for (i = 0; i < dim; i++)
            rows[(size_t)t * (size_t)dim + (size_t)i] =
                (float)(length * ((i == 0) + (i == own) - twice * (double)mirror[i]));
    }
    free(mirror);
}

static void head_keys(rng *r, key_kind kind, double strength, float *rows, int n, int dim)
{
    size_t width = (size_t)dim;
    int t, channel;
    switch (kind) {
    case KEYS_SHARED: shared_rows(r, strength, rows, n, dim); break;
    case KEYS_REPEATS: repeated_rows(r, 0.1, rows, n, dim); break;
    case KEYS_EXACT: repeated_rows(r, 0.0, rows, n, dim); break;
    case KEYS_ROTARY: rotary_rows(r, rows, n, dim); break;
    case KEYS_ZERO: memset(rows, 0, (size_t)n * width * sizeof(float)); break;
    case KEYS_IDENTICAL:
        noise_rows(r, rows, 1, dim, 1.0);
        for (t = 1; t < n; t++) memcpy(rows + (size_t)t * width, rows, width * sizeof(float));
        break;
    case KEYS_ZERO_ROWS:
        noise_rows(r, rows, n, dim, 1.0);
        for (t = 0; t < n; t++)
            if (rng_below(r, 4) == 0) memset(rows + (size_t)t * width, 0, width * sizeof(float));
        break;
    case KEYS_OUTLIER:
        noise_rows(r, rows, n, dim, 1.0);
        channel = rng_below(r, dim);
        for (t = 0; t < n; t++) rows[(size_t)t * width + (size_t)channel] += 20.0f;
        break;
    case KEYS_TINY: noise_rows(r, rows, n, dim, 1e-8 / sqrt((double)dim)); break;
    case KEYS_HALF: half_rows(r, rows, n, dim); break;
    case KEYS_ISOTROPIC:
    case N_KEY_KINDS: noise_rows(r, rows, n, dim, 1.0); break;
    }
}

void make_keys(rng *r, key_kind kind, double strength, float *keys, int heads, int n, int dim)
{
    int h;
    for (h = 0; h < heads; h++)
        head_keys(r, kind, strength, keys + (size_t)h * (size_t)n * (size_t)dim, n, dim);
}

/* ---- views ---- */
const char *layout_name(layout l)
{
    static const char *const list[N_LAYOUTS] = {
        "contiguous", "strided",  "token-major", "paged NHD",
        "paged HND",  "row list", "transposed",  "paged transposed",
    };
    return list[l];
}

/* A block table of distinct blocks in random order, out of a few more than are needed. */
static void make_table(view *v, rng *r, int n_blocks, int n_pool)
{
    int32_t *pool = (int32_t *)alloc_checked((size_t)n_pool * sizeof *pool);
    int i;
    for (i = 0; i < n_pool; i++) pool[i] = i;
    for (i = 0; i < n_blocks; i++) {
        int other = i + rng_below(r, n_pool - i);
        int32_t taken = pool[other];
        pool[other] = pool[i];
        pool[i] = taken;
    }
    block_make(&v->table, (size_t)n_blocks * sizeof *pool, 0, 1);
    memcpy(v->table.data, pool, v->table.bytes);
    block_remember(&v->table);
    free(pool);
    v->tensor.block_table = (const int32_t *)(const void *)v->table.data;
}

/* Strides of the unpaged layouts; returns the elements that the view spans. */
static size_t plain_strides(view *v, rng *r, layout l)
{
    rkv_tensor *t = &v->tensor;
    int64_t gap = l == LAYOUT_CONTIGUOUS ? 0 : rng_below(r, 4);
    int64_t heads = t->heads, tokens = t->tokens, dim = v->n_elements;
    if (l == LAYOUT_TOKEN_MAJOR) {
        t->head_stride = dim + gap;
        t->token_stride = heads * t->head_stride + rng_below(r, 3);
        return (size_t)((tokens - 1) * t->token_stride + heads * t->head_stride);
    }
    if (l == LAYOUT_TRANSPOSED) {
        t->token_stride = 1;
        t->dim_stride = tokens + gap;
        t->head_stride = dim * t->dim_stride;
        return (size_t)(heads * t->head_stride);
    }
    if (l == LAYOUT_STRIDED) {
        t->dim_stride = 1;
        t->token_stride = dim + gap;
        t->head_stride = tokens * t->token_stride + rng_below(r, 9);
        return (size_t)((heads - 1) * t->head_stride + tokens * t->token_stride);
    }
    return (size_t)(heads * tokens * dim);
}

static size_t paged_strides(view *v, rng *r, layout l)
{
    static const int page_sizes[] = { 1, 2, 3, 5, 16, 32 };
    rkv_tensor *t = &v->tensor;
    int64_t heads = t->heads, dim = v->n_elements, page, n_blocks, n_pool;
    t->block_tokens = l == LAYOUT_ROW_LIST ? 1 : RNG_PICK(r, page_sizes);
    page = t->block_tokens;
    n_blocks = (t->tokens + page - 1) / page;
    n_pool = n_blocks + rng_below(r, 4);
    make_table(v, r, (int)n_blocks, (int)n_pool);
    if (l == LAYOUT_PAGED_NHD || l == LAYOUT_ROW_LIST) {
        t->head_stride = dim;
        t->token_stride = heads * dim;
    } else if (l == LAYOUT_PAGED_TRANSPOSED) {
        t->token_stride = 1;
        t->dim_stride = page;
        t->head_stride = dim * page;
    }
    if (rng_below(r, 2)) t->block_stride = heads * page * dim + rng_below(r, 5);
    return (size_t)(n_pool * (t->block_stride ? t->block_stride : heads * page * dim));
}

void view_make(view *v, rng *r, layout l, rkv_dtype dtype, int element_bytes, int heads, int tokens,
               int dim, size_t misalign)
{
    size_t span, i;
    memset(v, 0, sizeof *v);
    v->tensor = rkv_tensor_make(NULL, dtype, heads, tokens, dim);
    v->tensor.head_stride = v->tensor.token_stride = v->tensor.dim_stride = 0;
    v->tensor.block_stride = 0;
    v->tensor.element_bytes = element_bytes;
    v->element = element_bytes ? (size_t)element_bytes : dtype_bytes(dtype);
    v->n_elements = dim / element_dims(dtype);
    if (dtype == RKV_OPAQUE) {
        v->element = 1;
        v->n_elements = element_bytes ? element_bytes : (int)row_bytes(dtype, dim);
        v->tensor.element_bytes = v->n_elements;
        v->tensor.load = load_opaque;
        v->tensor.load_user = &opaque_user;
    }
    if (l == LAYOUT_PAGED_NHD || l == LAYOUT_PAGED_HND || l == LAYOUT_ROW_LIST ||
        l == LAYOUT_PAGED_TRANSPOSED)
        span = paged_strides(v, r, l);
    else
        span = plain_strides(v, r, l);
    v->tensor.head_stride *= element_dims(dtype);
    v->tensor.token_stride *= element_dims(dtype);
    v->tensor.block_stride *= element_dims(dtype);
    block_make(&v->memory, span * v->element, misalign, rng_below(r, 2));
    v->tensor.data = v->memory.data;
    for (i = 0; i < v->memory.bytes; i++) v->memory.data[i] = (unsigned char)rng_next(r);
    block_remember(&v->memory);
}

void view_free(view *v)
{
    block_free(&v->memory);
    block_free(&v->table);
}

/* Byte offset of an element (of RKV_Q8_0: a block), from the formula in rkv.h. */
static size_t view_offset(const view *v, int head, int token, int i)
{
    const rkv_tensor *t = &v->tensor;
    const int dims = element_dims(t->dtype);
    int64_t row = (int64_t)v->n_elements * dims;
    int64_t per_block = t->block_table ? t->block_tokens : t->tokens;
    int64_t dim_stride = t->dim_stride ? t->dim_stride : 1;
    int64_t token_stride = t->token_stride ? t->token_stride : row;
    int64_t head_stride = t->head_stride ? t->head_stride : per_block * row;
    int64_t block_stride = t->block_stride ? t->block_stride : t->heads * per_block * row;
    int64_t at = head * head_stride + (int64_t)i * dims * dim_stride;
    if (t->block_table)
        at += t->block_table[token / t->block_tokens] * block_stride +
              token % t->block_tokens * token_stride;
    else
        at += token * token_stride;
    return (size_t)(at / dims) * v->element;
}

unsigned char *view_at(const view *v, int head, int token, int i)
{
    return v->memory.data + view_offset(v, head, token, i);
}

/* An encoded row to where the view has it, and back. */
static void put_row(const view *v, int head, int token, const unsigned char *row)
{
    int e;
    for (e = 0; e < v->n_elements; e++)
        memcpy(view_at(v, head, token, e), row + (size_t)e * v->element, v->element);
}

static void get_row(const view *v, int head, int token, unsigned char *row)
{
    int e;
    for (e = 0; e < v->n_elements; e++)
        memcpy(row + (size_t)e * v->element, view_at(v, head, token, e), v->element);
}

void view_store_row(view *v, int head, int token, const float *row)
{
    unsigned char *bytes =
        (unsigned char *)alloc_checked(row_bytes(v->tensor.dtype, v->tensor.dim));
    encode_row(v->tensor.dtype, row, v->tensor.dim, bytes);
    put_row(v, head, token, bytes);
    free(bytes);
}

void view_load_row(const view *v, int head, int token, float *row)
{
    unsigned char *bytes =
        (unsigned char *)alloc_checked(row_bytes(v->tensor.dtype, v->tensor.dim));
    get_row(v, head, token, bytes);
    decode_row(v->tensor.dtype, bytes, v->tensor.dim, row);
    free(bytes);
}

void view_store_one(view *v, int head, int token, int i, float value)
{
    float *row = (float *)alloc_checked((size_t)v->tensor.dim * sizeof *row);
    view_load_row(v, head, token, row);
    row[i] = value;
    view_store_row(v, head, token, row);
    free(row);
}

void view_store(view *v, const float *values, int n_tokens)
{
    const int dim = v->tensor.dim;
    unsigned char *bytes = (unsigned char *)alloc_checked(row_bytes(v->tensor.dtype, dim));
    int h, t;
    for (h = 0; h < v->tensor.heads; h++)
        for (t = 0; t < n_tokens; t++, values += dim) {
            encode_row(v->tensor.dtype, values, dim, bytes);
            put_row(v, h, t, bytes);
        }
    free(bytes);
    block_remember(&v->memory);
}

void view_restore(view *v)
{
    if (v->memory.base) block_restore(&v->memory);
}

int view_unchanged(const char *at, const view *v)
{
    return block_unchanged(at, &v->memory) & block_unchanged(at, &v->table);
}

int view_gathered(const char *at, const view *v, const int32_t *kept, int kept_stride, int n_kept)
{
    unsigned char *want, *want_data;
    const unsigned char *before = block_before(&v->memory);
    int h, row, i, same;
    if (v->memory.base == NULL) return 1;
    want = (unsigned char *)alloc_checked(v->memory.total);
    want_data = want + (v->memory.data - v->memory.base);
    memcpy(want, v->memory.image, v->memory.total);
    for (h = 0; h < v->tensor.heads; h++)
        for (row = 0; row < n_kept; row++)
            for (i = 0; i < v->n_elements; i++)
                memcpy(want_data + view_offset(v, h, row, i),
                       before + view_offset(v, h, kept[h * kept_stride + row], i), v->element);
    same = expect_bytes(at, v->memory.base, want, v->memory.total);
    free(want);
    return same & block_unchanged(at, &v->table);
}

/* ---- jobs ---- */
rkv_dtype shape_key_dtype(const shape *s)
{
    return s->key_dtype ? s->key_dtype : s->dtype;
}

/* What the type makes of n rows. */
static void round_rows(rkv_dtype dtype, const float *rows, size_t n, int dim, float *out)
{
    unsigned char *bytes = (unsigned char *)alloc_checked(row_bytes(dtype, dim));
    for (; n > 0; n--, rows += dim, out += dim) {
        encode_row(dtype, rows, dim, bytes);
        decode_row(dtype, bytes, dim, out);
    }
    free(bytes);
}

int config_window(const rkv_config *config)
{
    return config->window ? config->window : 8;
}

int config_votes(const rkv_config *config)
{
    return config->votes ? config->votes : config_window(config);
}

int config_state_floats(const rkv_config *config)
{
    switch (config->policy) {
    case RKV_POLICY_MEMORY_TRACES:
    case RKV_POLICY_MEMORY_PROSE: return 2;
    case RKV_POLICY_H2O: return 1;
    case RKV_POLICY_RKV:
    case RKV_POLICY_TRIATTENTION:
    case RKV_POLICY_RANDOM:
    case RKV_POLICY_OWN_SCORE: break;
    }
    return 0;
}

int config_protect(const rkv_config *config)
{
    return config->protect > config_window(config) ? config->protect : config_window(config);
}

/* As many rows as asked for, and so many among the candidates that one is left to choose. */
static void make_pins(job *j, rng *r, const rkv_config *config, int stride)
{
    int first = config->pinned, end = j->shape.n_tokens - config_protect(config), set, row;
    block_make(&j->pins, (size_t)j->sets * (size_t)stride, 0, rng_below(r, 2));
    j->layer.pins = j->pins.data;
    for (set = 0; set < j->sets; set++) {
        int left = config->budget - config_protect(config) - first - 1;
        for (row = 0; row < stride; row++) {
            int is_candidate = row >= first && row < end;
            int pin = rng_below(r, 100) < j->shape.pins && (!is_candidate || left-- > 0);
            j->layer.pins[set * stride + row] = (uint8_t)(pin ? 1 + rng_below(r, 255) : 0);
        }
    }
    block_remember(&j->pins);
}

/* n numbers and as much room as the job has, the rest NaN: made by `number`. */
static void make_plane(float *plane, int stride, int n, rng *r, int tied, double (*number)(rng *))
{
    int row;
    for (row = 0; row < stride; row++) {
        double x = row < n ? number(r) : 0;
        if (tied) x = nearbyint(x * 8) / 8;
        plane[row] = row < n ? (float)x : NAN;
    }
}

static double some_importance(rng *r) /* few rows have much of it */
{
    return pow(rng_unit(r), 4);
}

static double some_bias(rng *r)
{
    return 0.3 * rng_normal(r);
}

static void make_state(job *j, rng *r)
{
    const shape *s = &j->shape;
    int stride = job_row_stride(j), old = s->n_new ? s->n_tokens - s->n_new : 0, plane;
    const size_t planes = (size_t)s->kv_heads * (size_t)j->state_floats;
    if (planes > 0) {
        block_make(&j->state, planes * (size_t)stride * sizeof(float), 0, rng_below(r, 2));
        j->layer.state = (float *)(void *)j->state.data;
        j->layer.n_new = s->n_tokens - old;
        for (plane = 0; plane < (int)planes; plane++)
            make_plane(j->layer.state + plane * stride, stride, old, r, s->tied,
                       plane % j->state_floats ? rng_unit : some_importance);
        block_remember(&j->state);
    }
    if (s->bias) {
        block_make(&j->bias, (size_t)s->kv_heads * (size_t)stride * sizeof(float), 0,
                   rng_below(r, 2));
        j->layer.bias = (float *)(void *)j->bias.data;
        for (plane = 0; plane < s->kv_heads; plane++)
            make_plane(j->layer.bias + plane * stride, stride, s->n_tokens, r, s->tied, some_bias);
        block_remember(&j->bias);
    }
}

/* Rotary embedding as the shape tells; a table of its own is the base's, each a little off. */
static void make_rope(job *j, rng *r)
{
    const shape *s = &j->shape;
    int dims = s->rope_dims ? s->rope_dims : s->head_dim, f;
    double base = s->rope_base != 0 ? (double)s->rope_base : 10000;
    float *list;
    j->layer.rope.pairing = s->pairing;
    j->layer.rope.dims = s->rope_dims;
    j->layer.rope.base = s->rope_base;
    if (!s->table || s->pairing <= RKV_ROPE_NONE) return;
    block_make(&j->frequencies, (size_t)(dims / 2) * sizeof *list, 0, 1);
    list = (float *)(void *)j->frequencies.data;
    for (f = 0; f < dims / 2; f++)
        list[f] = (float)(pow(base, -2.0 * f / dims) * (0.5 + 3.5 * rng_unit(r)));
    j->layer.rope.frequencies = list;
    block_remember(&j->frequencies);
}

/* Means of queries as they may be: E|q'_f| is no less than |E q'_f|. */
static void make_means(job *j, rng *r)
{
    const int query_heads = j->shape.kv_heads * j->shape.group, dim = j->shape.head_dim;
    const int half = dim / 2;
    float *mean, *size;
    int head, i;
    block_make(&j->means, ((size_t)query_heads * (size_t)(dim + half) + 1) * sizeof *mean, 0,
               rng_below(r, 2));
    mean = (float *)(void *)j->means.data;
    size = mean + query_heads * dim;
    for (head = 0; head < query_heads; head++) {
        for (i = 0; i < dim; i++) mean[head * dim + i] = (float)rng_normal(r);
        for (i = 0; i < half; i++) size[head * half + i] = (float)(2 + 3 * rng_unit(r));
    }
    size[query_heads * half] = 77;
    j->layer.query_means = mean;
    block_remember(&j->means);
}

/* Outputs of a job: memory for as many sets as the scope has, sentinels in it. */
static void make_outputs(job *j, rng *r, const rkv_config *config)
{
    const shape *s = &j->shape;
    int stride = job_row_stride(j), set, row;
    size_t scored = s->n_tokens > j->window ? (size_t)(s->n_tokens - j->window) : 0;
    size_t sets = (size_t)j->sets, heads = (size_t)s->kv_heads;
    int32_t *positions;
    block_make(&j->scores, heads * scored * sizeof(float), 0, rng_below(r, 2));
    j->layer.scores = (float *)(void *)j->scores.data;
    if (s->follower) return;
    block_make(&j->kept, sets * (size_t)config->budget * sizeof(int32_t), 0, rng_below(r, 2));
    block_make(&j->positions, sets * (size_t)stride * sizeof(int32_t), 0, rng_below(r, 2));
    j->layer.kept = (int32_t *)(void *)j->kept.data;
    positions = j->layer.positions = (int32_t *)(void *)j->positions.data;
    for (set = 0; set < j->sets; set++) {
        int32_t position = s->first_position + rng_below(r, 5);
        for (row = 0; row < s->n_tokens; row++) {
            positions[(size_t)set * (size_t)stride + (size_t)row] = position;
            position += 1 + (rng_below(r, 4) ? 0 : rng_below(r, 50));
        }
    }
    block_remember(&j->positions);
    if (s->pins) make_pins(j, r, config, stride);
    if (config->scope == RKV_PER_HEAD) return;
    block_make(&j->shared, scored * sizeof(float), 0, rng_below(r, 2));
    j->layer.shared_scores = (float *)(void *)j->shared.data;
}

static void normalise_shape(shape *s)
{
    if (!s->capacity) s->capacity = s->n_tokens;
    if (!s->value_dim) s->value_dim = s->head_dim;
    if (s->sharpness == 0) s->sharpness = 1;
}

void job_make_from(job *j, rng *r, const rkv_config *config, const shape *given, const float *keys,
                   const float *queries)
{
    shape *s = &j->shape;
    size_t key_rows, query_rows, row_size;
    memset(j, 0, sizeof *j);
    *s = *given;
    normalise_shape(s);
    j->window = config_window(config);
    j->votes = config_votes(config);
    j->state_floats = config_state_floats(config);
    j->sets = config->scope == RKV_PER_HEAD ? s->kv_heads : 1;
    key_rows = (size_t)s->kv_heads * (size_t)s->n_tokens;
    query_rows = (size_t)(s->kv_heads * s->group) * (size_t)j->votes;
    row_size = (size_t)s->head_dim * sizeof(float);
    j->keys_f32 = (float *)alloc_checked(key_rows * row_size);
    j->queries_f32 = (float *)alloc_checked(query_rows * row_size);
    round_rows(shape_key_dtype(s), keys, key_rows, s->head_dim, j->keys_f32);
    round_rows(s->dtype, queries, query_rows, s->head_dim, j->queries_f32);
    view_make(&j->keys, r, s->keys, shape_key_dtype(s), 0, s->kv_heads, s->capacity, s->head_dim,
              s->misalign);
    view_make(&j->values, r, s->values, shape_key_dtype(s), s->value_bytes, s->kv_heads,
              s->capacity, s->value_dim, s->misalign);
    view_make(&j->queries, r, s->queries, s->dtype, 0, s->kv_heads * s->group, j->votes,
              s->head_dim, s->misalign);
    view_store(&j->keys, j->keys_f32, s->n_tokens);
    view_store(&j->queries, j->queries_f32, j->votes);
    j->layer.keys = j->keys.tensor;
    j->layer.values = j->values.tensor;
    j->layer.queries = j->queries.tensor;
    j->layer.n_tokens = s->n_tokens;
    j->layer.sequence = s->sequence;
    j->layer.row_stride = s->row_stride;
    j->layer.first_query = s->first_query;
    make_outputs(j, r, config);
    make_state(j, r);
    make_rope(j, r);
    if (config->policy == RKV_POLICY_TRIATTENTION) make_means(j, r);
    j->remembered = j->layer;
}

void job_make(job *j, rng *r, const rkv_config *config, const shape *given)
{
    shape s = *given;
    int votes = config_votes(config);
    size_t i, key_count, query_count;
    float *keys, *queries;
    normalise_shape(&s);
    key_count = (size_t)s.kv_heads * (size_t)s.n_tokens * (size_t)s.head_dim;
    query_count = (size_t)(s.kv_heads * s.group) * (size_t)votes * (size_t)s.head_dim;
    keys = (float *)alloc_checked(key_count * sizeof(float));
    queries = (float *)alloc_checked(query_count * sizeof(float));
    make_keys(r, s.kind, s.strength, keys, s.kv_heads, s.n_tokens, s.head_dim);
    for (i = 0; i < key_count; i++) keys[i] = (float)ldexp((double)keys[i], s.key_exponent);
    for (i = 0; i < query_count; i++)
        queries[i] = (float)ldexp(s.sharpness * rng_normal(r), -s.key_exponent);
    job_make_from(j, r, config, &s, keys, queries);
    free(keys);
    free(queries);
}

void job_free(job *j)
{
    free(j->keys_f32);
    free(j->queries_f32);
    view_free(&j->keys);
    view_free(&j->values);
    view_free(&j->queries);
    block_free(&j->kept);
    block_free(&j->positions);
    block_free(&j->pins);
    block_free(&j->scores);
    block_free(&j->shared);
    block_free(&j->bias);
    block_free(&j->state);
    block_free(&j->means);
    block_free(&j->frequencies);
    memset(j, 0, sizeof *j);
}

void job_restore(job *j)
{
    view_restore(&j->keys);
    view_restore(&j->values);
    view_restore(&j->queries);
    if (j->kept.base) block_restore(&j->kept);
    if (j->positions.base) block_restore(&j->positions);
    if (j->pins.base) block_restore(&j->pins);
    if (j->scores.base) block_restore(&j->scores);
    if (j->shared.base) block_restore(&j->shared);
    if (j->bias.base) block_restore(&j->bias);
    if (j->state.base) block_restore(&j->state);
    j->layer = j->remembered;
}

int job_inputs_unchanged(const char *at, const job *j)
{
    return view_unchanged(at, &j->keys) & view_unchanged(at, &j->values) &
           view_unchanged(at, &j->queries) & block_unchanged(at, &j->positions) &
           block_unchanged(at, &j->pins) & block_unchanged(at, &j->bias) &
           block_unchanged(at, &j->means) & block_unchanged(at, &j->frequencies);
}

static int layer_unchanged(const char *at, const rkv_layer *now, const rkv_layer *before)
{
    int same = now->keys.data == before->keys.data && now->values.data == before->values.data &&
               now->queries.data == before->queries.data && now->kept == before->kept &&
               now->positions == before->positions && now->pins == before->pins &&
               now->scores == before->scores && now->shared_scores == before->shared_scores &&
               now->state == before->state && now->bias == before->bias;
    return expect_true(at, same) & expect_int(at, 0, now->n_tokens, before->n_tokens) &
           expect_int(at, 1, now->n_kept, before->n_kept) &
           expect_int(at, 2, now->n_new, before->n_new);
}

int job_unchanged(const char *at, const job *j)
{
    return job_inputs_unchanged(at, j) & block_unchanged(at, &j->kept) &
           block_unchanged(at, &j->scores) & block_unchanged(at, &j->shared) &
           block_unchanged(at, &j->state) & layer_unchanged(at, &j->layer, &j->remembered);
}

int job_guards(const char *at, const job *j)
{
    return block_guards(at, &j->keys.memory) & block_guards(at, &j->values.memory) &
           block_guards(at, &j->queries.memory) & block_guards(at, &j->kept) &
           block_guards(at, &j->positions) & block_guards(at, &j->pins) &
           block_guards(at, &j->scores) & block_guards(at, &j->shared) &
           block_guards(at, &j->bias) & block_guards(at, &j->state);
}

/* Positions and pins of each set: gathered in front, all others as they were. */
static int positions_gathered(const char *at, const job *j, const int32_t *sets, int budget,
                              int n_kept)
{
    const int32_t *before = (const int32_t *)(const void *)block_before(&j->positions);
    const int32_t *now = (const int32_t *)(const void *)j->positions.data;
    const uint8_t *pins_before = block_before(&j->pins);
    int stride = job_row_stride(j), set, row;
    if (j->positions.base == NULL || j->layer.positions == NULL) return 1;
    for (set = 0; set < j->sets; set++)
        for (row = 0; row < stride; row++) {
            int from = row < n_kept ? sets[set * budget + row] : row;
            if (!expect_int(at, row, now[set * stride + row], before[set * stride + from]))
                return 0;
            if (j->layer.pins && !expect_int("pins", row, j->pins.data[set * stride + row],
                                             pins_before[set * stride + from]))
                return 0;
        }
    return 1;
}

static int bias_gathered(const char *at, const job *j, const int32_t *sets, int kept_stride,
                         int n_kept)
{
    int stride = job_row_stride(j), head, row;
    for (head = 0; j->layer.bias && head < j->shape.kv_heads; head++)
        for (row = 0; row < stride; row++) {
            int from = row < n_kept ? sets[head * kept_stride + row] : row;
            if (!expect_bytes(at, j->layer.bias + head * stride + row, job_bias(j, head) + from,
                              sizeof(float)))
                return 0;
        }
    return 1;
}

int job_state_gathered(const char *at, const job *j, const float *before, const int32_t *sets,
                       int budget, int n_kept)
{
    const float *made = (const float *)(const void *)block_before(&j->state);
    const int stride = job_row_stride(j), kept_stride = j->sets == 1 ? 0 : budget;
    int plane, row;
    for (plane = 0; plane < j->shape.kv_heads * j->state_floats; plane++) {
        const int32_t *kept = sets + plane / j->state_floats * kept_stride;
        const float *now = j->layer.state + plane * stride, *was = before + plane * stride;
        for (row = 0; row < n_kept; row++)
            if (!expect_bytes(at, now + row, was + kept[row], sizeof *now)) return 0;
        row = j->shape.n_tokens;
        if (!expect_bytes(at, now + row, made + plane * stride + row,
                          (size_t)(stride - row) * sizeof *now))
            return 0;
    }
    return 1;
}

int job_compacted(const char *at, const job *j, const int32_t *sets, int budget, int n_kept)
{
    int kept_stride = j->sets == 1 ? 0 : budget; /* one set serves all heads */
    return view_gathered(at, &j->keys, sets, kept_stride, n_kept) &
           (j->layer.values.data == NULL
                ? view_unchanged(at, &j->values)
                : view_gathered(at, &j->values, sets, kept_stride, n_kept)) &
           positions_gathered(at, j, sets, budget, n_kept) & view_unchanged(at, &j->queries) &
           bias_gathered("bias", j, sets, kept_stride, n_kept) & block_unchanged(at, &j->means) &
           block_unchanged(at, &j->frequencies) &
           expect_int("n_tokens after compaction", 0, j->layer.n_tokens, n_kept);
}

const int32_t *job_kept(const job *j)
{
    return (const int32_t *)(const void *)j->kept.data;
}

int job_row_stride(const job *j)
{
    return j->shape.row_stride ? j->shape.row_stride : j->shape.capacity;
}

const uint8_t *job_pins(const job *j, int set)
{
    return j->layer.pins ? block_before(&j->pins) + (ptrdiff_t)set * job_row_stride(j) : NULL;
}

float *job_state(const job *j, int head, int plane)
{
    if (plane >= j->state_floats) return NULL;
    return (float *)(void *)j->state.data + (head * j->state_floats + plane) * job_row_stride(j);
}

const float *job_bias(const job *j, int head)
{
    const float *before = (const float *)(const void *)block_before(&j->bias);
    return j->layer.bias ? before + head * job_row_stride(j) : NULL;
}

const int32_t *job_positions(const job *j, int set)
{
    return (const int32_t *)(const void *)block_before(&j->positions) + set * job_row_stride(j);
}

const float *job_scores(const job *j)
{
    return (const float *)(const void *)j->scores.data;
}

const float *job_shared(const job *j)
{
    return (const float *)(const void *)j->shared.data;
}

/* ---- floating-point modes ---- */
static const char *const float_modes[N_FLOAT_MODES] = { "usual", "down", "up",   "zero",
                                                        "ftz",   "daz",  "traps" };

const char *float_mode_name(float_mode mode)
{
    return float_modes[mode];
}

#if defined(__GNUC__) && defined(__x86_64__)
/* MXCSR without flags. */
static const unsigned mode_registers[N_FLOAT_MODES] = { 0x1f80, 0x3f80, 0x5f80, 0x7f80,
                                                        0x9f80, 0x1fc0, 0x1900 };
static unsigned read_mode(void)
{
    unsigned now;
    __asm__ volatile("stmxcsr %0" : "=m"(now) : : "memory");
    return now;
}
static void write_mode(unsigned value)
{
    __asm__ volatile("ldmxcsr %0" : : "m"(value) : "memory");
}
#elif defined(__GNUC__) && defined(__aarch64__)
/* FPCR: rounding, FZ; no DAZ of its own, and no traps on most. Shifted up: FPSR in the low bits. */
static const unsigned mode_registers[N_FLOAT_MODES] = { 0,        2u << 22, 1u << 22, 3u << 22,
                                                        1u << 24, 0,        0 };
static unsigned read_mode(void)
{
    uint64_t control, status;
    __asm__ volatile("mrs %0, fpcr\n\tmrs %1, fpsr" : "=r"(control), "=r"(status) : : "memory");
    return (unsigned)control | ((unsigned)status & 0x9f);
}
static void write_mode(unsigned value)
{
    uint64_t control = value;
    __asm__ volatile("msr fpcr, %0\n\tmsr fpsr, xzr" : : "r"(control) : "memory");
}
#else
static const unsigned mode_registers[N_FLOAT_MODES] = { 0, 1, 2, 3, 0, 0, 0 };
static unsigned read_mode(void)
{
    const int now = fegetround();
    return (now == FE_DOWNWARD     ? 1u
            : now == FE_UPWARD     ? 2u
            : now == FE_TOWARDZERO ? 3u
                                   : 0u) |
           (unsigned)fetestexcept(FE_ALL_EXCEPT) << 8;
}
static void write_mode(unsigned value)
{
    static const int roundings[] = { FE_TONEAREST, FE_DOWNWARD, FE_UPWARD, FE_TOWARDZERO };
    fesetround(roundings[value]);
    feclearexcept(FE_ALL_EXCEPT);
}
#endif

/* valgrind, say, lets no program set FTZ, DAZ or traps. */
int float_mode_exists(float_mode mode)
{
    unsigned now;
    if (mode == FLOAT_USUAL) return 1;
    write_mode(mode_registers[mode]);
    now = read_mode();
    write_mode(mode_registers[FLOAT_USUAL]);
    return now == mode_registers[mode] && now != mode_registers[FLOAT_USUAL];
}

void float_mode_enter(float_mode mode)
{
    write_mode(mode_registers[mode]);
}

int float_mode_leave(const char *at, float_mode mode)
{
    const unsigned now = read_mode();
    write_mode(mode_registers[FLOAT_USUAL]);
    return expect_int(at, (int)mode, now, mode_registers[mode]);
}

static float_mode mode_of_calls = FLOAT_USUAL;

void float_mode_of_calls(float_mode mode)
{
    mode_of_calls = mode;
}

/* The mode of the next call or task, as RKV_TEST_FLOAT says. */
static float_mode wanted_mode(void)
{
    static unsigned turn;
    const char *wanted = getenv("RKV_TEST_FLOAT");
    int mode;
    if (!wanted || !*wanted) return mode_of_calls;
    if (strcmp(wanted, "mixed") == 0) return (float_mode)(turn++ % N_FLOAT_MODES);
    for (mode = 0; mode < N_FLOAT_MODES; mode++)
        if (strcmp(wanted, float_modes[mode]) == 0) return (float_mode)mode;
    printf("FAIL  RKV_TEST_FLOAT=%s: no such mode\n", wanted);
    exit(1);
}

/* ---- calls ---- */
static rkv_layer *layers_of(const job *jobs, int n_jobs)
{
    rkv_layer *layers = (rkv_layer *)alloc_checked((size_t)n_jobs * sizeof *layers);
    int i;
    for (i = 0; i < n_jobs; i++) layers[i] = jobs[i].layer;
    return layers;
}

rkv_status call_with(stage_function call, const rkv_backend *backend, const rkv_config *config,
                     job *jobs, int n_jobs, void *workspace, size_t bytes)
{
    rkv_layer *layers = layers_of(jobs, n_jobs);
    const float_mode mode = wanted_mode();
    rkv_status status;
    int i;
    float_mode_enter(mode);
    status = call(backend, config, layers, n_jobs, workspace, bytes);
    float_mode_leave("floating-point mode after a call", mode);
    for (i = 0; i < n_jobs; i++) jobs[i].layer = layers[i];
    free(layers);
    return status;
}

rkv_status call_stage(stage_function call, const rkv_backend *backend, const rkv_config *config,
                      job *jobs, int n_jobs)
{
    static int turn; /* every other workspace ends where its allocation does */
    rkv_layer *layers = layers_of(jobs, n_jobs);
    block workspace;
    size_t bytes = 0;
    rkv_status status = rkv_workspace_size(backend, config, layers, n_jobs, &bytes);
    free(layers);
    if (status != RKV_OK) return status;
    turn = !turn;
    block_make(&workspace, bytes, 1, turn);
    status = call_with(call, backend, config, jobs, n_jobs, workspace.data, bytes);
    block_guards("guards of the workspace", &workspace);
    block_free(&workspace);
    return status;
}

rkv_status call_stages(const rkv_backend *backend, const rkv_config *config, job *jobs, int n_jobs)
{
    rkv_status status = call_stage(rkv_score, backend, config, jobs, n_jobs);
    if (status == RKV_OK) status = call_stage(rkv_select, backend, config, jobs, n_jobs);
    if (status == RKV_OK) status = call_stage(rkv_compact, backend, config, jobs, n_jobs);
    return status;
}

void reversed_for(void *pool, int n_tasks, void (*task)(void *arg, int index), void *arg)
{
    int *calls = (int *)pool;
    const unsigned callers = read_mode();
    const char *wanted = getenv("RKV_TEST_FLOAT");
    const int mixed = wanted && strcmp(wanted, "mixed") == 0;
    if (calls) ++*calls;
    while (n_tasks-- > 0) {
        const float_mode mode = mixed ? wanted_mode() : FLOAT_USUAL;
        if (mixed) float_mode_enter(mode);
        task(arg, n_tasks);
        if (mixed) float_mode_leave("floating-point mode after a task", mode);
    }
    write_mode(callers);
}
