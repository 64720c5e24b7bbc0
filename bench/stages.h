/* Where the time of rkv_score goes: its parts, each timed by itself on one layer.
 * Part of bench/bench.c; shown by: make bench BENCH=--stages */
#ifndef BENCH_STAGES_H
#define BENCH_STAGES_H

#include "bench/job.h"

typedef struct bench_part {
    const char *name;
    double us;    /* least time, the KV heads together, from a warm cache */
    double flops; /* that it cannot do without; a multiply-add counts as two; 0: no such part */
} bench_part;

enum {
    BENCH_NORMS = 2,
    BENCH_SUM,
    BENCH_TILE,
    BENCH_NEWEST = 6,
    BENCH_SECOND_PASS = 8,
    BENCH_SEARCH,
    BENCH_WHOLE,
    BENCH_N_PARTS
};

/* Times the parts on the CPU path `backend` for `seconds` in all. Ends the program with a message
 * when the layer is refused. */
void bench_time_parts(const bench_job *job, const char *backend, double seconds,
                      bench_part parts[BENCH_N_PARTS]);

#endif
