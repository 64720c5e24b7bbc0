/* What this machine is, and can do at most: fused multiply-adds and copied bytes per second.
 * Part of bench/bench.c and bench/decode.c; built by: make bench bench-decode */
#ifndef BENCH_MACHINE_H
#define BENCH_MACHINE_H

typedef struct bench_machine {
    double flops; /* per second; a fused multiply-add counts as two                          */
    double copy;  /* bytes read + bytes written per second, 64 MiB to another 64 MiB         */
    double move;  /* the same, 64 MiB moved down by some 50 KB: what compaction does             */
    double cache; /* the same as copy, 256 KiB blocks                                        */
} bench_machine;

/* Measures all four with `n_threads` at once and raises `machine` to what it saw: the highest
 * figure of several calls, spread over a run, is the one that no other load disturbed. `isa` is
 * the name of the rkv backend whose registers are to be used. */
void bench_machine_measure(bench_machine *machine, const char *isa, int n_threads);

/* Prints a line of '#', versions of rkv and compiler, the compiler's flags, the CPU. */
void bench_machine_title(const char *flags);

#endif
