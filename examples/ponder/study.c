/* study.c - see study.h. Build: part of `make demo` and `make eval`. */
#define _POSIX_C_SOURCE 200809L
#include "study.h"
#include "seconds.h"

#include <pthread.h>
#include <stdlib.h>

/* The work is a row of items, SOLVE_LANES problems under one policy each; the policies take turns,
 * so that all are equally far at any time. */
typedef struct pool {
    const study *study;
    tally *items;
    int n_items, next, n_done;
    double deadline;
    const char *why; /* of the first failure */
    pthread_mutex_t lock;
} pool;

static int take_item(pool *p)
{
    int item = -1;
    pthread_mutex_lock(&p->lock);
    const int late =
        p->deadline > 0.0 && seconds() > p->deadline && p->next % p->study->n_policies == 0;
    if (!p->why && !late && p->next < p->n_items) item = p->next++;
    pthread_mutex_unlock(&p->lock);
    return item;
}

static void finish_item(pool *p, const char *why)
{
    const study *s = p->study;
    pthread_mutex_lock(&p->lock);
    if (why && !p->why) p->why = why;
    p->n_done++;
    if (s->progress) {
        double done = (double)p->n_done / p->n_items;
        const double by_time =
            s->seconds > 0.0 ? 1.0 - (p->deadline - seconds()) / s->seconds : 0.0;
        s->progress(s->user, by_time > done ? (by_time < 1.0 ? by_time : 1.0) : done);
    }
    pthread_mutex_unlock(&p->lock);
}

static const char *run_item(const study *s, solver **solvers, int item, tally *t)
{
    const int which = item % s->n_policies, first = item / s->n_policies * SOLVE_LANES;
    const int n = s->n_problems - first < SOLVE_LANES ? s->n_problems - first : SOLVE_LANES;
    const char *why = NULL;
    int prompt = 1, longest = 1;
    for (int i = 0; i < s->n_problems; i++) {
        if (s->problems[i].n_prompt > prompt) prompt = s->problems[i].n_prompt;
        if (s->problems[i].n_tokens > longest) longest = s->problems[i].n_tokens;
    }
    if (!solvers[which])
        solvers[which] = solver_create(s->model, &s->policies[which], prompt, longest, &why);
    if (!solvers[which]) return why;
    const rkv_status status = solver_run(solvers[which], s->problems + first, n, t);
    return status == RKV_OK ? NULL : rkv_status_string(status);
}

static void *work(void *arg)
{
    pool *p = arg;
    const study *s = p->study;
    solver **solvers = calloc((size_t)s->n_policies, sizeof(solver *));
    for (int item; (item = take_item(p)) >= 0;)
        finish_item(p, solvers ? run_item(s, solvers, item, &p->items[item]) : "out of memory");
    for (int i = 0; solvers && i < s->n_policies; i++) solver_destroy(solvers[i]);
    free(solvers);
    return NULL;
}

static void add(tally *sum, const tally *t)
{
    sum->n_problems += t->n_problems;
    sum->n_right += t->n_right;
    sum->n_tokens += t->n_tokens;
    sum->seconds += t->seconds;
    sum->compress_seconds += t->compress_seconds;
    sum->n_rounds += t->n_rounds;
    if (t->peak_rows > sum->peak_rows) sum->peak_rows = t->peak_rows;
    if (t->peak_bytes > sum->peak_bytes) sum->peak_bytes = t->peak_bytes;
}

int study_run(const study *s, tally *tallies, const char **why)
{
    const tally none = { 0 };
    pthread_t threads[STUDY_MAX_THREADS];
    pool p = { s, NULL, 0, 0, 0, 0.0, NULL, PTHREAD_MUTEX_INITIALIZER };
    int n_started = 0;
    p.n_items = (s->n_problems + SOLVE_LANES - 1) / SOLVE_LANES * s->n_policies;
    p.items = calloc((size_t)p.n_items, sizeof *p.items);
    *why = "out of memory";
    if (!p.items) return 0;
    if (s->seconds > 0.0) p.deadline = seconds() + s->seconds;
    while (n_started < s->n_threads - 1 && pthread_create(&threads[n_started], NULL, work, &p) == 0)
        n_started++;
    work(&p);
    for (int i = 0; i < n_started; i++) pthread_join(threads[i], NULL);
    for (int i = 0; i < s->n_policies; i++) tallies[i] = none;
    for (int i = 0; i < p.n_items; i++) add(&tallies[i % s->n_policies], &p.items[i]);
    free(p.items);
    *why = p.why;
    return p.why == NULL;
}
