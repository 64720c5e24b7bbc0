/* study.h - runs many problems under many policies on a few threads, and counts. */
#ifndef STUDY_H
#define STUDY_H

#include "solve.h"

enum { STUDY_MAX_THREADS = 64 };

typedef struct study {
    const model *model;
    const problem *problems;
    int n_problems;
    const policy *policies;
    int n_policies;
    int n_threads;
    double seconds; /* stop after about this long, with equally many problems for every policy;
                       0: no limit */
    void (*progress)(void *user, double done); /* 0 .. 1; may be NULL; one call at a time */
    void *user;
} study;

/* tallies: [n_policies]. 1 = done, 0 = *why tells what went wrong. */
int study_run(const study *s, tally *tallies, const char **why);

#endif
