/* One attention layer to be compressed: its keys made to order, its runs checked and timed.
 * Part of bench/bench.c and of the library that bench/peer_torch.py loads; built by: make bench */
#ifndef BENCH_JOB_H
#define BENCH_JOB_H

#ifndef RKV_PTHREADS
#define RKV_PTHREADS
#endif
#include "rkv.h"

/* How the keys of a layer relate. The cost of redundancy depends on nothing else. */
typedef enum bench_keys {
    BENCH_COSINE_07, /* a common direction: any two keys have cosine 0.7, give or take      */
    BENCH_COSINE_04, /* ... 0.4: a similar key every few tens of tokens                     */
    BENCH_OUTLIERS,  /* mean cosine 0.4, and 12 % of the keys resemble no other             */
    BENCH_REPEATS,   /* a phrase of 96 unrelated keys, over and over, to the bit            */
    BENCH_IDENTICAL, /* every key the same                                                  */
    BENCH_ZERO,      /* every key zero                                                      */
    BENCH_DISTINCT,  /* no two keys similar: the worst case                                 */
    BENCH_KEYS_COUNT,
    BENCH_GIVEN = BENCH_KEYS_COUNT /* not made here: see bench_job_make_from                */
} bench_keys;

typedef enum bench_stage { BENCH_SCORE, BENCH_SELECT, BENCH_COMPACT, BENCH_COMPRESS } bench_stage;

typedef struct bench_shape {
    bench_keys keys;
    rkv_dtype dtype; /* of keys and values, and of queries unless it is quantised: then f16. With
                        RKV_OPAQUE a row loader in plain C reads q8_0 */
    int n_tokens, budget, kv_heads, group, head_dim;
} bench_shape;

/* The layer stands in memory `n_copies` times, 64 MiB in all if it is smaller than that, and the
 * runs take turns over the copies: each finds its rows as cold as an engine leaves them. */
typedef struct bench_job {
    bench_shape shape;
    const char *name; /* of the keys */
    rkv_config config;
    rkv_layer *layers; /* [n_copies]                                                         */
    int n_copies;
    void *pristine; /* the keys before any compaction                                        */
    size_t key_bytes;
    double pairs; /* of keys that redundancy has to look at: for each row those from the newest
                     back to its first similar key, no pair twice; of all heads              */
    void *workspace;
    size_t workspace_bytes;
} bench_job;

double bench_seconds(void); /* a clock that never goes back */
const char *bench_keys_name(bench_keys keys);
const char *bench_dtype_name(rkv_dtype dtype);

/* [kv_heads][n_tokens][head_dim] and [kv_heads * group][window][head_dim], in the shape's dtype */
void bench_fill_keys(void *out, const bench_shape *shape);
void bench_fill_queries(void *out, const bench_shape *shape, int window);

/* All of these end the program with a message when memory or a call fails. */
void bench_job_make(bench_job *job, const bench_shape *shape);
/* By another policy, or with other options, than the published ones. */
void bench_job_make_for(bench_job *job, const bench_shape *shape, const rkv_config *config);
/* From given numbers, rounded to the shape's dtype: keys [kv_heads][n_tokens][head_dim], queries
 * [kv_heads * group][n_queries][head_dim], over again where more vote. The name must outlive the
 * job. */
void bench_job_make_from(bench_job *job, const bench_shape *shape, const rkv_config *config,
                         const char *name, const float *keys, const float *queries, int n_queries);
void bench_job_free(bench_job *job);
void bench_job_run(bench_job *job, const rkv_backend *backend, bench_stage stage, int copy);

/* Compares `backend` with `reference`: equal scores to the bit, equal kept sets, and after
 * rkv_compress the rows that the set names. Returns 1 when all is equal. */
int bench_job_check(bench_job *job, const rkv_backend *backend, const rkv_backend *reference);

/* Least time of one run, in microseconds, over as many as fit in `seconds` (at least one). */
double bench_job_time(bench_job *job, const rkv_backend *backend, bench_stage stage,
                      double seconds);

#endif
