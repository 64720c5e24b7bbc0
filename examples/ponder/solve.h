/* solve.h - lets the model think its way through problems under a cache policy, several problems
 * in lockstep, so that one pass over the weights serves them all. One solver per thread.
 */
#ifndef SOLVE_H
#define SOLVE_H

#include "model.h"
#include "policy.h"
#include "task.h"

enum { SOLVE_LANES = 8 }; /* problems at a time */

typedef struct tally {
    int n_problems, n_right;
    int64_t n_tokens;
    double seconds, compress_seconds; /* of this thread */
    int n_rounds, peak_rows;
    size_t peak_bytes; /* keys and values of one problem, all layers */
} tally;

/* Whether the model's words are the task's and its context is long enough. */
int solve_fits(const model *m);

typedef struct solver solver;

/* NULL: *why tells the reason. The problems' longest prompt and longest chain of thought, prompt
 * included, say how much room a solver needs. */
solver *solver_create(const model *m, const policy *p, int longest_prompt, int longest,
                      const char **why);
void solver_destroy(solver *s); /* takes NULL */

/* Solves n <= SOLVE_LANES problems and adds to the tally. A chain of thought that is still going
 * 32 tokens after the right one's end is cut off and counts as wrong. */
rkv_status solver_run(solver *s, const problem *problems, int n, tally *t);

/* Wilson score interval, 95 %. */
void wilson(int n_right, int n, double *low, double *high);

#endif
