/* solve.c - see solve.h. Build: part of `make demo` and `make eval`. */
#include "solve.h"
#include "own_cache.h"
#include "seconds.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { GRACE = 32 };

typedef struct lane {
    own_cache *cache;
    int tokens[TASK_MAX_TOKENS + GRACE];
    int n_tokens, limit;
} lane;

struct solver {
    const model *model;
    model_scratch *scratch;
    lane lanes[SOLVE_LANES];
    own_cache *cache_of[TASK_MAX_TOKENS]; /* of each token in the current call */
    int ahead_of[TASK_MAX_TOKENS];        /* new tokens of the same cache before it */
};

int solve_fits(const model *m)
{
    const model_shape *s = model_get_shape(m);
    if (s->vocabulary != task_vocabulary() || s->context < TASK_MAX_TOKENS) return 0;
    for (int i = 0; i < task_vocabulary(); i++)
        if (strcmp(model_word(m, i), task_word(i)) != 0) return 0;
    return 1;
}

solver *solver_create(const model *m, const policy *p, int longest_prompt, int longest,
                      const char **why)
{
    const int rows = p->keeps_all ? longest + GRACE : longest_prompt;
    solver *s = calloc(1, sizeof *s);
    const policy fitted = policy_for_prompt(p, longest_prompt);
    *why = "out of memory";
    if (!s) return NULL;
    s->model = m;
    s->scratch =
        model_scratch_create(m, longest_prompt > SOLVE_LANES ? longest_prompt : SOLVE_LANES);
    int ok = s->scratch != NULL;
    for (int i = 0; ok && i < SOLVE_LANES; i++) {
        s->lanes[i].cache = own_cache_create(model_get_shape(m), &fitted, rows, why);
        ok = s->lanes[i].cache != NULL;
    }
    if (ok) return s;
    solver_destroy(s);
    return NULL;
}

void solver_destroy(solver *s)
{
    if (!s) return;
    for (int i = 0; i < SOLVE_LANES; i++) own_cache_destroy(s->lanes[i].cache);
    model_scratch_destroy(s->scratch);
    free(s);
}

static void attend(void *user, int layer, int n, const float *q, const float *k, const float *v,
                   float *out)
{
    solver *s = user;
    const model_shape *shape = model_get_shape(s->model);
    const ptrdiff_t q_dim = shape_q_dim(shape), kv_dim = shape_kv_dim(shape);
    for (int i = 0; i < n; i++)
        own_cache_attend(s->cache_of[i], layer, s->ahead_of[i], q + i * q_dim, k + i * kv_dim,
                         v + i * kv_dim, out + i * q_dim);
}

static int choose(const solver *s, float *logits, int row)
{
    const int n = model_get_shape(s->model)->vocabulary;
    return model_choose(logits + (ptrdiff_t)row * n, n, 0.0f, NULL);
}

/* The prompt goes through at once, and gives the first token. What is random depends on the
 * problem alone, not on the thread that gets it. */
static rkv_status read_prompt(solver *s, lane *l, const problem *p)
{
    int positions[TASK_MAX_TOKENS];
    uint64_t seed = 0;
    for (int i = 0; i < p->n_prompt; i++) seed = seed * 31 + (uint64_t)p->tokens[i];
    own_cache_reset(l->cache, seed);
    memcpy(l->tokens, p->tokens, (size_t)p->n_prompt * sizeof *l->tokens);
    for (int i = 0; i < p->n_prompt; i++) {
        s->cache_of[i] = l->cache;
        s->ahead_of[i] = positions[i] = i;
    }
    float *logits =
        model_forward(s->model, s->scratch, p->n_prompt, l->tokens, positions, attend, s);
    l->n_tokens = p->n_prompt;
    l->tokens[l->n_tokens++] = choose(s, logits, p->n_prompt - 1);
    const int context = model_get_shape(s->model)->context;
    l->limit = p->n_tokens + GRACE < context ? p->n_tokens + GRACE : context;
    return own_cache_advance(l->cache, p->n_prompt);
}

/* One token for every lane that has not ended; *n_active gets how many those were. */
static rkv_status decode_step(solver *s, int n_lanes, int *n_active)
{
    int tokens[SOLVE_LANES], positions[SOLVE_LANES], n = 0;
    lane *active[SOLVE_LANES];
    rkv_status status = RKV_OK;
    for (int i = 0; i < n_lanes; i++) {
        lane *l = &s->lanes[i];
        const int last = l->tokens[l->n_tokens - 1];
        if (task_is_end(last) || l->n_tokens >= l->limit) continue;
        active[n] = l;
        tokens[n] = last;
        positions[n] = l->cache->position;
        s->cache_of[n] = l->cache;
        s->ahead_of[n] = 0;
        n++;
    }
    *n_active = n;
    if (n == 0) return RKV_OK;
    float *logits = model_forward(s->model, s->scratch, n, tokens, positions, attend, s);
    for (int i = 0; i < n && status == RKV_OK; i++) {
        active[i]->tokens[active[i]->n_tokens++] = choose(s, logits, i);
        status = own_cache_advance(active[i]->cache, 1);
    }
    return status;
}

static void count_lane(const lane *l, const problem *p, tally *t)
{
    const own_cache *c = l->cache;
    const int ended = task_is_end(l->tokens[l->n_tokens - 1]);
    t->n_problems++;
    t->n_right += ended && task_answer(l->tokens, l->n_tokens) == p->answer;
    t->n_tokens += l->n_tokens;
    t->compress_seconds += c->seconds;
    t->n_rounds += c->n_rounds;
    if (c->peak_rows > t->peak_rows) t->peak_rows = c->peak_rows;
    t->peak_bytes = own_cache_bytes(c, t->peak_rows);
}

rkv_status solver_run(solver *s, const problem *problems, int n, tally *t)
{
    const double start = seconds();
    rkv_status status = RKV_OK;
    for (int i = 0; i < n && status == RKV_OK; i++)
        status = read_prompt(s, &s->lanes[i], &problems[i]);
    for (int active = n; active > 0 && status == RKV_OK;) status = decode_step(s, n, &active);
    for (int i = 0; i < n && status == RKV_OK; i++) count_lane(&s->lanes[i], &problems[i], t);
    t->seconds += seconds() - start;
    return status;
}

void wilson(int n_right, int n, double *low, double *high)
{
    const double z = 1.959963985, p = (double)n_right / n, zz = z * z / n;
    const double middle = (p + zz / 2.0) / (1.0 + zz);
    const double half = z / (1.0 + zz) * sqrt(p * (1.0 - p) / n + zz / (4.0 * n));
    *low = fmax(0.0, middle - half);
    *high = fmin(1.0, middle + half);
}
