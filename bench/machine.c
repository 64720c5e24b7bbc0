/* What this machine is, and can do at most: fused multiply-adds and copied bytes per second.
 * Part of bench/bench.c and bench/decode.c; built by: make bench bench-decode */
#define _POSIX_C_SOURCE 200809L
#include "bench/machine.h"
#include "bench/job.h"
#include "tests/harness.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

/* Latency times ports on every core so far is at most 4 x 4; sixteen registers hide it, and fit. */
#define ACCUMULATORS 16
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

/* Each loop runs `rounds` times ACCUMULATORS multiply-adds and returns something that depends on
 * all of them. The values stay at 1: nothing subnormal, nothing infinite. */
static float fma_scalar(size_t rounds)
{
    float acc[ACCUMULATORS], sum = 0;
    volatile float one = 1.0f, zero = 0.0f;
    const float a = one, b = zero;
    for (int i = 0; i < ACCUMULATORS; i++) acc[i] = a;
    for (size_t r = 0; r < rounds; r++) {
        UNROLL for (int i = 0; i < ACCUMULATORS; i++) acc[i] = acc[i] * a + b;
    }
    for (int i = 0; i < ACCUMULATORS; i++) sum += acc[i];
    return sum;
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) static float fma_avx2(size_t rounds)
{
    __m256 acc[ACCUMULATORS - 4]; /* 16 registers in all, two of them the factors */
    volatile float one = 1.0f, zero = 0.0f;
    const __m256 a = _mm256_set1_ps(one), b = _mm256_set1_ps(zero);
    float sum[8];
    for (int i = 0; i < ACCUMULATORS - 4; i++) acc[i] = a;
    for (size_t r = 0; r < rounds; r++) {
        UNROLL for (int i = 0; i < ACCUMULATORS - 4; i++) acc[i] = _mm256_fmadd_ps(acc[i], a, b);
    }
    for (int i = 1; i < ACCUMULATORS - 4; i++) acc[0] = _mm256_add_ps(acc[0], acc[i]);
    _mm256_storeu_ps(sum, acc[0]);
    return sum[0] + sum[7];
}

__attribute__((target("avx512f"))) static float fma_avx512(size_t rounds)
{
    __m512 acc[ACCUMULATORS];
    volatile float one = 1.0f, zero = 0.0f;
    const __m512 a = _mm512_set1_ps(one), b = _mm512_set1_ps(zero);
    float sum[16];
    for (int i = 0; i < ACCUMULATORS; i++) acc[i] = a;
    for (size_t r = 0; r < rounds; r++) {
        UNROLL for (int i = 0; i < ACCUMULATORS; i++) acc[i] = _mm512_fmadd_ps(acc[i], a, b);
    }
    for (int i = 1; i < ACCUMULATORS; i++) acc[0] = _mm512_add_ps(acc[0], acc[i]);
    _mm512_storeu_ps(sum, acc[0]);
    return sum[0] + sum[15];
}
#elif defined(__aarch64__)
static float fma_neon(size_t rounds)
{
    float32x4_t acc[ACCUMULATORS];
    volatile float one = 1.0f, zero = 0.0f;
    const float32x4_t a = vdupq_n_f32(one), b = vdupq_n_f32(zero);
    for (int i = 0; i < ACCUMULATORS; i++) acc[i] = a;
    for (size_t r = 0; r < rounds; r++) {
        UNROLL for (int i = 0; i < ACCUMULATORS; i++) acc[i] = vfmaq_f32(b, acc[i], a);
    }
    for (int i = 1; i < ACCUMULATORS; i++) acc[0] = vaddq_f32(acc[0], acc[i]);
    return vgetq_lane_f32(acc[0], 0) + vgetq_lane_f32(acc[0], 3);
}
#endif

static const struct {
    const char *isa;
    float (*loop)(size_t rounds);
    int flops_per_round;
} loops[] = {
#if defined(__x86_64__)
    { "avx2", fma_avx2, 2 * 8 * (ACCUMULATORS - 4) },
    { "avx512", fma_avx512, 2 * 16 * ACCUMULATORS },
#elif defined(__aarch64__)
    { "neon", fma_neon, 2 * 4 * ACCUMULATORS },
#endif
    { "scalar", fma_scalar, 2 * ACCUMULATORS }
};

/* One worker's part of a measurement: the same work for each, in memory of its own. */
typedef struct share {
    float (*loop)(size_t rounds);
    int flops_per_round;
    char *block; /* [2 * LARGE] */
    char *from, *to;
    size_t bytes, times;
    float result;
} share;

enum { ROUNDS = 100000, REPEATS = 5, PIECE = 4096 };
enum { DOWN = (48 << 10) + 832 }; /* not a multiple of a page */
#define LARGE ((size_t)64 << 20)

static void multiply(void *arg, int index)
{
    share *s = (share *)arg + index;
    s->result = s->loop(ROUNDS);
}

static void copy(void *arg, int index)
{
    share *s = (share *)arg + index;
    for (size_t i = 0; i < s->times; i++) {
        /* In pieces, as rows are moved: a whole block may go past the caches, at another speed. */
        for (size_t at = 0; at < s->bytes; at += PIECE)
            memmove(s->to + at, s->from + at, s->bytes - at < PIECE ? s->bytes - at : PIECE);
        s->from[i % s->bytes]++; /* no two copies are the same, so none can be left out */
    }
}

static double run_seconds(const rkv_config *threads, void (*task)(void *, int), share *shares)
{
    const int n = threads->parallel_for ? threads->n_threads : 1;
    const double before = bench_seconds();
    if (n > 1)
        threads->parallel_for(threads->pool_handle, n, task, shares);
    else
        task(shares, 0);
    return bench_seconds() - before;
}

/* Copies by all workers; `down` > 0 moves within one block, 0 copies to another. */
static double copy_rate(const rkv_config *threads, share *shares, int n, size_t bytes, size_t times,
                        size_t down)
{
    for (int t = 0; t < n; t++) {
        shares[t].from = shares[t].block + down;
        shares[t].to = down ? shares[t].block : shares[t].block + LARGE;
        shares[t].bytes = bytes - down;
        shares[t].times = times;
    }
    return (double)n * 2.0 * (double)(bytes - down) * (double)times /
           run_seconds(threads, copy, shares);
}

static void raise_to(double *best, double seen)
{
    if (seen > *best) *best = seen;
}

static share *make_shares(int n, const char *isa)
{
    const int last = (int)(sizeof loops / sizeof *loops) - 1;
    share *shares = (share *)alloc_checked((size_t)n * sizeof *shares);
    int which = 0;
    while (which < last && strcmp(loops[which].isa, isa) != 0) which++;
    for (int t = 0; t < n; t++) {
        shares[t].loop = loops[which].loop;
        shares[t].flops_per_round = loops[which].flops_per_round;
        shares[t].block = (char *)alloc_checked(2 * LARGE);
        memset(shares[t].block, t + 1, 2 * LARGE);
    }
    return shares;
}

void bench_machine_measure(bench_machine *machine, const char *isa, int n_threads)
{
    const double flops = (double)n_threads * ROUNDS;
    rkv_config threads = rkv_config_default(16);
    rkv_threads *pool = NULL;
    share *shares = make_shares(n_threads, isa);
    if (rkv_threads_create(&pool, n_threads) == RKV_OK) rkv_threads_use(pool, &threads);
    for (int r = 0; r < REPEATS; r++) {
        raise_to(&machine->flops,
                 flops * shares->flops_per_round / run_seconds(&threads, multiply, shares));
        raise_to(&machine->copy, copy_rate(&threads, shares, n_threads, LARGE, 1, 0));
        raise_to(&machine->move, copy_rate(&threads, shares, n_threads, LARGE, 1, DOWN));
        raise_to(&machine->cache, copy_rate(&threads, shares, n_threads, 256 << 10, 64, 0));
    }
    rkv_threads_destroy(pool);
    for (int t = 0; t < n_threads; t++) free(shares[t].block);
    free(shares);
}

#ifdef __clang__
#define COMPILER __VERSION__
#else
#define COMPILER "gcc " __VERSION__
#endif

static void cpu_name(char *out, size_t bytes)
{
    char line[256];
    FILE *file = fopen("/proc/cpuinfo", "r");
    snprintf(out, bytes, "unnamed CPU");
    while (file && fgets(line, sizeof line, file)) {
        if (strncmp(line, "model name", 10) != 0 || !strchr(line, ':')) continue;
        snprintf(out, bytes, "%.*s", (int)strcspn(strchr(line, ':') + 2, "\n"),
                 strchr(line, ':') + 2);
        break;
    }
    if (file) fclose(file);
}

void bench_machine_title(const char *flags)
{
    char cpu[128];
    cpu_name(cpu, sizeof cpu);
    printf("# rkv %d.%d.%d  " COMPILER " %s  %s\n", RKV_VERSION_MAJOR, RKV_VERSION_MINOR,
           RKV_VERSION_PATCH, flags, cpu);
}
