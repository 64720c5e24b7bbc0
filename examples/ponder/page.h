/* page.h - demo.html: one self-contained page with the chain of thought under two policies, token
 * by token and round by round, the accuracy curve and the table.
 */
#ifndef PAGE_H
#define PAGE_H

#include "plot.h"
#include "solve.h"

enum { TRACE_MAX_ROUNDS = 128, TRACE_MAX_TOKENS = TASK_MAX_TOKENS + 1 };

/* What a policy kept while one chain of thought was written. */
typedef struct trace {
    policy policy;
    const char *about;
    int tokens[TRACE_MAX_TOKENS];
    int n_prompt, n_tokens, n_sets; /* n_sets: kept sets, layers times kv heads                */
    int n_rounds;
    struct trace_round {
        int n_tokens, n_rows;                 /* so far, and held                             */
        unsigned char kept[TRACE_MAX_TOKENS]; /* by how many sets                             */
    } rounds[TRACE_MAX_ROUNDS];               /* after each compression, and at the end */
} trace;

typedef struct page_row {
    const char *method, *about;
    double budget; /* percent; 100: the full cache */
    tally tally;
} page_row;

/* 1 = written, 0 = it could not be. */
int page_write(const char *path, const char *model_name, const model *m, const trace *traces,
               int n_traces, int answer, const page_row *rows, int n_rows,
               const plot_series *series, int n_series);

/* The cache's size over time with every token kept, and in this trace. kib: of one token. */
void page_plot_sizes(FILE *f, const trace *t, double kib);

#endif
