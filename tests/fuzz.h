/* What the fuzz targets share: fields drawn from the fuzzer's bytes, the size of a view, and a
 * main() that makes the bytes where there is no libFuzzer.
 * Included by each tests/fuzz_*.c, which defines LLVMFuzzerTestOneInput:   make fuzz */
#ifndef RKV_TESTS_FUZZ_H
#define RKV_TESTS_FUZZ_H

#include "rkv.h"
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Ends the program, so that the fuzzer keeps the input. */
static inline void require(int holds, const char *what)
{
    if (holds) return;
    fprintf(stderr, "fuzz: %s\n", what);
    abort();
}

/* ==== Bytes to fields ======================================================================= */

typedef struct input {
    const uint8_t *at;
    size_t left;
    int tame; /* only values that make sense, so that most of these inputs run to the end */
} input;

static inline unsigned take(input *in)
{
    if (!in->left) return 0;
    in->left--;
    return *in->at++;
}

static inline int chance(input *in, int one_in)
{
    return (int)(take(in) % (unsigned)one_in) == one_in - 1; /* never once the bytes are used up */
}

static inline int wrong(input *in, int one_in)
{
    return !in->tame && chance(in, one_in);
}

/* One of an enumeration's `count` constants, or the first number that is none. */
static inline unsigned pick(input *in, unsigned count)
{
    return take(in) % (in->tame ? count : count + 1);
}

static inline int number(input *in, int low, int high)
{
    static const int wild[] = { 0, -1, 1, INT_MIN, INT_MAX, 1 << 30, 65536, 4097 };
    if (wrong(in, 48)) return wild[take(in) % 8];
    return low + (int)(take(in) % (unsigned)(high - low + 1));
}

/* ==== Views ================================================================================= */

static inline size_t element_size(const rkv_tensor *t)
{
    static const size_t sizes[] = { 4, 2, 2, 1, 1, 1, 34 };
    if (t->element_bytes > 0 && t->dtype != RKV_OPAQUE) return (size_t)t->element_bytes;
    return (unsigned)t->dtype > RKV_Q8_0 ? 2 : sizes[t->dtype];
}

/* Numbers that lie together in an element. */
static inline int element_dims(const rkv_tensor *t)
{
    return t->dtype == RKV_Q8_0 && t->element_bytes <= 0 ? 32 : 1;
}

/* Strides count so many for a row without gaps. */
static inline int row_dims(const rkv_tensor *t)
{
    return t->dtype == RKV_OPAQUE ? t->element_bytes : t->dim;
}

static inline int64_t or_usual(int64_t given, int64_t usual)
{
    return given ? given : usual;
}

/* Elements from the first to the last that the view can name; negative when it goes backwards. */
static inline double extent(const rkv_tensor *t)
{
    const double dim_stride = (double)or_usual(t->dim_stride, 1);
    const int dim = row_dims(t);
    const double token_stride = (double)or_usual(t->token_stride, dim);
    const double rows = t->block_table ? t->block_tokens : t->tokens;
    const double head_stride = t->head_stride ? (double)t->head_stride : rows * dim;
    const double block_stride =
        t->block_stride ? (double)t->block_stride : (double)t->heads * rows * dim;
    double last;
    if (t->heads < 1 || t->tokens < 1 || t->dim < 1 || dim < 1 || rows < 1) return -1;
    if (head_stride < 0 || token_stride < 0 || dim_stride < 0 || block_stride < 0) return -1;
    last = (t->heads - 1) * head_stride + (rows - 1) * token_stride + (dim - 1) * dim_stride;
    if (t->block_table) last += (double)((t->tokens - 1) / t->block_tokens) * block_stride;
    return last + 1;
}

/* The same in elements of element_size. */
static inline double extent_elements(const rkv_tensor *t)
{
    const double numbers = extent(t);
    return numbers < 0 ? numbers : (numbers + element_dims(t) - 1) / element_dims(t);
}

/* ==== Without libFuzzer ===================================================================== */

#ifdef FUZZ_STANDALONE
/* fuzz_... [SECONDS [SEED]]: the target on random bytes, where there is no libFuzzer. */
int main(int argc, char **argv)
{
    const long seconds = argc > 1 ? atol(argv[1]) : 10;
    uint64_t state = argc > 2 ? strtoull(argv[2], NULL, 0) : 1;
    const time_t end = time(NULL) + (time_t)seconds;
    uint8_t bytes[512];
    unsigned long inputs = 0;
    do {
        const uint64_t seed = state;
        for (size_t i = 0; i < sizeof bytes; i++) {
            state = state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
            bytes[i] = (uint8_t)(state >> 56);
        }
        if (inputs++ % 4096 == 0)
            printf("%lu inputs, seed %llu\n", inputs - 1, (unsigned long long)seed);
        LLVMFuzzerTestOneInput(bytes, 64 + (size_t)(seed >> 40) % (sizeof bytes - 63));
    } while (time(NULL) < end);
    printf("%lu inputs, none failed\n", inputs);
    return 0;
}
#endif

#endif /* RKV_TESTS_FUZZ_H */
