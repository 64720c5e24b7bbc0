/* Reads one golden file: see tests/golden/README.md. Part of test_golden and of bench/bench.c:
 * make test, make bench. */
#ifndef RKV_TESTS_GOLDEN_FILE_H
#define RKV_TESTS_GOLDEN_FILE_H

#include <stddef.h>
#include <stdint.h>

#ifndef RKV_PTHREADS
#define RKV_PTHREADS
#endif
#include "rkv.h"

/* Little endian on disk, numbers of this machine here. */
typedef struct golden_round {
    int appended;
    float *queries, *keys;                     /* decoded: exactly what the file's dtype holds */
    int32_t *kept_published, *kept_positional; /* true positions */
    float *score_published, *score_positional;
} golden_round;

enum { GOLDEN_MAX_ROUNDS = 8 };
typedef struct golden {
    unsigned char *bytes;
    size_t size, at;
    int kv_heads, group, dim, n_tokens, budget, window, pool, rounds;
    rkv_dtype dtype;
    float lambda, threshold;
    golden_round round[GOLDEN_MAX_ROUNDS];        /* a single-round file uses round[0] */
    float *importance, *redundancy, *score, *gap; /* single-round files only */
    int32_t *kept;
} golden;

/* Reads directory/name.rkvg; returns 1 if it is a whole file and nothing more. golden_free either
 * way. */
int golden_read(golden *g, const char *directory, const char *name);
void golden_free(golden *g);
/* A whole file, to be freed; NULL: there is none. */
unsigned char *golden_bytes(const char *directory, const char *name, size_t *size);
int golden_round_rows(const golden *g, int r); /* rows of the cache before round r */

#endif
