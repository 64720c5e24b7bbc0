/* The policies beside R-KV: generated rounds against the oracle, on every CPU path, staged and in
 * one call, on 1, 2 and 7 threads, each with a fault; histories of many rounds; golden vectors.
 *     make test                              one round again: build/tests/test_policies SEED
 *     build/tests/test_policies FIRST COUNT runs a range; RKV_TEST_CASES sets the default count. */
#include "golden_policy.h"
#include "harness.h"
#include "oracle_policies.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_JOBS = 3, MAX_FAILED = 20, N_POLICIES = RKV_POLICY_OWN_SCORE + 1 };

static const char *const policy_names[N_POLICIES] = { "rkv", "traces", "prose",    "h2o",
                                                      "tri", "random", "own score" };

static const rkv_backend *backends[MAX_BACKENDS];
static int n_backends;
static rkv_threads *two_threads, *seven_threads;
static long rows_decided[N_POLICIES], rows_open[N_POLICIES]; /* of rows that rounding may turn */
static long heads_compared, heads_near_threshold, faults_planted[6];

static int reads_queries(const rkv_config *config)
{
    return (config->policy == RKV_POLICY_RKV && config->lambda > 0) ||
           config_state_floats(config) > 0;
}

static int reads_keys(const rkv_config *config)
{
    return config->policy != RKV_POLICY_RANDOM && config->policy != RKV_POLICY_OWN_SCORE;
}

static int needs_rope(const rkv_config *config)
{
    return config_state_floats(config) == 2 || config->policy == RKV_POLICY_TRIATTENTION;
}

/* Runs a call; a status that is not wanted is explained. 1 if it is. */
static int expect_call(const char *at, stage_function call, const rkv_backend *backend,
                       const rkv_config *config, job *jobs, int n_jobs)
{
    rkv_config with_record = *config;
    rkv_error record = { "of an earlier call", RKV_ERROR_DEVICE, 7, 7, 7 };
    rkv_status status;
    char text[256];
    with_record.error = &record;
    status = call_stage(call, backend, &with_record, jobs, n_jobs);
    expect_int("status of the record", 0, record.status, status);
    if (status == RKV_OK) return expect_true("record, nothing wrong", record.rule == NULL);
    case_fail("%s: %s", at, rkv_explain(&record, text, sizeof text));
    return 0;
}

/* ---- generating a round ----
 * What one seed stands for. */
typedef struct trial {
    rkv_config config;
    job jobs[MAX_JOBS];
    int n_jobs;
    oracle_round *heads[MAX_JOBS];
    double work;
    /* The answers of the first run, which every other must repeat bit by bit; state before
     * compaction. */
    int32_t *kept[MAX_JOBS];
    float *scores[MAX_JOBS], *shared[MAX_JOBS], *state[MAX_JOBS];
} trial;

/* How the results are asked for. */
typedef struct request {
    const char *name;
    const rkv_backend *backend;
    int staged;
    int n_threads; /* 0: reversed_for */
    int bare;      /* without what is optional */
} request;

static int make_votes(rng *r, const rkv_config *c, int n_tokens)
{
    int window = config_window(c), most = c->policy == RKV_POLICY_RKV ? c->budget : n_tokens + 40;
    switch (rng_below(r, 4)) {
    case 0: return 0;
    case 1: return window;
    case 2: return 1 + rng_below(r, most < 12 ? most : 12);
    default: return 1 + rng_below(r, most < 70 ? most : 70);
    }
}

static rkv_config make_config(rng *r, int n_tokens)
{
    static const int windows[] = { 0, 0, 1, 2, 3, 8, 16 };
    static const int pools[] = { 0, 1, 2, 3, 4, 5, 15, 1001 };
    static const int pinned[] = { 0, 0, 0, 1, 4, 17 };
    static const int lambdas[] = { 0, 10, 30, 50, 50, 90, 100 };
    static const int decays[] = { 0, 0, 500, 900, 999, 1000 };
    rkv_config c = rkv_config_default(1);
    int least;
    c.policy = (rkv_policy)rng_below(r, N_POLICIES);
    c.window = RNG_PICK(r, windows);
    if (config_window(&c) >= n_tokens) c.window = 1 + rng_below(r, n_tokens);
    c.protect = rng_below(r, 3) ? 0 : rng_below(r, n_tokens);
    c.pinned = RNG_PICK(r, pinned);
    if (config_protect(&c) + c.pinned > n_tokens) c.pinned = 0;
    least = config_protect(&c) + c.pinned;
    c.budget = least + rng_below(r, n_tokens - least + 1);
    c.pool = RNG_PICK(r, pools);
    c.mean_pool = rng_below(r, 2) * 5;
    c.recent = rng_below(r, 3);
    c.lambda = (float)RNG_PICK(r, lambdas) / 100.0f;
    c.scope = (rkv_scope)(rng_below(r, 2) ? 0 : rng_below(r, 3));
    c.variant = rng_below(r, 3) ? RKV_PUBLISHED : RKV_PAPER;
    c.votes = make_votes(r, &c, n_tokens);
    c.decay = (float)RNG_PICK(r, decays) / 1000.0f;
    c.seed = (uint32_t)rng_next(r);
    return c;
}

static void make_lengths(rng *r, shape *s, const rkv_config *config)
{
    static const int dims[] = { 2, 4, 7, 20, 32, 64, 64, 67, 80, 96, 128, 128, 160, 256 };
    static const int groups[] = { 1, 1, 2, 3, 4, 4, 5, 7, 8, 16, 33 };
    int votes = config_votes(config);
    s->kv_heads = 1 + rng_below(r, 4);
    s->head_dim = RNG_PICK(r, dims);
    s->group = RNG_PICK(r, groups);
    while (s->group > 1 && (double)s->kv_heads * s->group * votes * s->n_tokens * s->head_dim > 3e6)
        s->group /= 2;
    while (s->kv_heads > 1 &&
           (double)s->kv_heads * s->n_tokens * s->n_tokens / 2 * s->head_dim > 6e6)
        s->kv_heads--;
    s->capacity = s->n_tokens + rng_below(r, 20);
    s->value_dim = 1 + rng_below(r, 40);
}

static void make_types(rng *r, shape *s)
{
    static const int exponents[] = { 0, 0, 0, -5, 6 };
    s->dtype = (rkv_dtype)rng_below(r, 3);
    s->keys = (layout)rng_below(r, N_KEY_LAYOUTS);
    s->values = (layout)rng_below(r, N_KEY_LAYOUTS);
    s->queries = (layout)rng_below(r, N_KEY_LAYOUTS);
    s->kind = (key_kind)rng_below(r, N_KEY_KINDS);
    s->strength = 0.2 + 0.75 * rng_unit(r);
    s->sharpness = 0.5 + rng_below(r, 3);
    s->key_exponent = s->kind == KEYS_TINY ? 0 : RNG_PICK(r, exponents);
    s->misalign = rng_below(r, 3) ? 0 : (size_t)rng_below(r, 16);
    if (rng_below(r, 3)) return;
    s->key_dtype = (rkv_dtype)(1 + rng_below(r, RKV_Q8_0));
    if (s->key_dtype != RKV_Q8_0) return;
    s->head_dim = (s->head_dim + 31) / 32 * 32;
    s->value_dim = (s->value_dim + 31) / 32 * 32;
}

static void make_rotary(rng *r, const rkv_config *config, shape *s)
{
    static const int bases[] = { 0, 10000, 500000, 1000000, 100 };
    static const int firsts[] = { 0, 0, 0, 300, 5000, 130000, 1000000 };
    s->first_position = RNG_PICK(r, firsts);
    if (!needs_rope(config)) return;
    s->pairing = (rkv_pairing)(RKV_ROPE_NONE + rng_below(r, 3));
    s->rope_base = (float)RNG_PICK(r, bases);
    s->table = rng_below(r, 3) == 0;
    if (s->head_dim % 2 || rng_below(r, 3) == 0)
        s->rope_dims = 2 * (1 + rng_below(r, s->head_dim / 2));
}

static shape make_shape(rng *r, const rkv_config *config, int n_tokens)
{
    static const int pins[] = { 0, 0, 0, 3, 20, 60 };
    shape s;
    memset(&s, 0, sizeof s);
    s.n_tokens = n_tokens;
    make_lengths(r, &s, config);
    make_types(r, &s);
    make_rotary(r, config, &s);
    s.n_new = 1 + rng_below(r, rng_below(r, 2) || n_tokens < 40 ? n_tokens : 40);
    s.first_query = rng_below(r, config_votes(config));
    s.bias = config->policy == RKV_POLICY_OWN_SCORE || rng_below(r, 3) == 0;
    s.tied = rng_below(r, 3) == 0;
    if (rng_below(r, 2)) s.row_stride = s.capacity + rng_below(r, 3);
    s.pins = RNG_PICK(r, pins);
    return s;
}

static int make_n_tokens(rng *r)
{
    int top = rng_below(r, 20) == 0 ? 500 : 200;
    return 2 + (int)(exp(rng_unit(r) * log((double)top)));
}

/* A ring that is not full yet holds anything: so do slots that no vote needs. */
static void spoil_unused_queries(job *j)
{
    int head, age;
    if (j->state_floats == 0) return;
    for (head = 0; head < j->queries.tensor.heads; head++)
        for (age = j->layer.n_new; age < j->votes; age++)
            view_store_one(&j->queries, head,
                           (j->layer.first_query - 1 - age + 2 * j->votes) % j->votes, 0, NAN);
    block_remember(&j->queries.memory);
}

static void make_trial(trial *t, uint64_t seed)
{
    rng r = rng_seed(seed ^ 0x706f6c);
    int n_tokens = make_n_tokens(&r), sequence = 3, i;
    memset(t, 0, sizeof *t);
    t->config = make_config(&r, n_tokens);
    t->n_jobs = 1 + (rng_below(&r, 3) == 0 ? rng_below(&r, MAX_JOBS) : 0);
    for (i = 0; i < t->n_jobs; i++) {
        shape s;
        int joins = i > 0 && t->config.scope == RKV_PER_SEQUENCE && rng_below(&r, 3) > 0;
        if (i > 0 && !joins) {
            n_tokens = make_n_tokens(&r);
            sequence++;
        }
        s = make_shape(&r, &t->config, n_tokens);
        s.sequence = sequence;
        s.follower = joins;
        job_make(&t->jobs[i], &r, &t->config, &s);
        spoil_unused_queries(&t->jobs[i]);
        t->jobs[i].layer.scale = rng_below(&r, 4) ? 0.0f : (float)(0.5 / sqrt((double)s.head_dim));
        t->jobs[i].layer.softcap = rng_below(&r, 5) ? 0.0f : 3.0f;
        t->jobs[i].remembered = t->jobs[i].layer;
        t->work += (double)s.kv_heads * s.n_tokens * s.head_dim *
                   (s.n_tokens / 2.0 + s.group * config_votes(&t->config));
    }
}

/* ---- what follows from a trial ---- */
static int loses_rows(const trial *t, int i)
{
    return t->jobs[i].shape.n_tokens > t->config.budget;
}

static int is_scored(const trial *t, int i) /* more rows than the budget, and a choice to make */
{
    return loses_rows(t, i) && t->config.budget > config_protect(&t->config) + t->config.pinned;
}

static int leader_of(const trial *t, int i)
{
    while (t->jobs[i].shape.follower) i--;
    return i;
}

static int end_of_set(const trial *t, int leader)
{
    int end = leader + 1;
    while (end < t->n_jobs && t->jobs[end].shape.follower) end++;
    return end;
}

static int score_count(const job *j) /* per head */
{
    return j->shape.n_tokens - j->window;
}

static int n_kept_of(const trial *t, int i)
{
    return loses_rows(t, i) ? t->config.budget : t->jobs[i].shape.n_tokens;
}

static void *copy_of(const void *data, size_t bytes)
{
    void *copy = alloc_checked(bytes);
    if (bytes) memcpy(copy, data, bytes);
    return copy;
}

/* ---- judging the first run against the oracle ---- */
static void judge_plane(const char *at, const float *got, const double *want, int n,
                        double relative, double absolute)
{
    int row;
    for (row = 0; row < n; row++)
        if (!expect_near(at, row, (double)got[row], want[row], relative * want[row] + absolute))
            break;
}

static void judge_state(const trial *t, int i)
{
    const job *j = &t->jobs[i];
    const int stride = job_row_stride(j), n = j->shape.n_tokens;
    const float *made =
        (const float *)(const void *)(j->state.image + (j->state.data - j->state.base));
    int h, plane;
    for (h = 0; h < j->shape.kv_heads; h++) {
        const oracle_round *head = &t->heads[i][h];
        judge_plane("importance carried on", job_state(j, h, 0), head->importance, n,
                    head->importance_error, 1e-37);
        if (j->state_floats == 2)
            judge_plane("later copies carried on", job_state(j, h, 1), head->later_copy, n, 0,
                        ORACLE_COSINE_ERROR);
        for (plane = 0; plane < j->state_floats; plane++)
            expect_bytes("state of rows not in use", job_state(j, h, plane) + n,
                         made + (h * j->state_floats + plane) * stride + n,
                         (size_t)(stride - n) * sizeof(float));
    }
    expect_int("n_new after scoring", i, j->layer.n_new, 0);
}

/* Ranks and mix from the very state that rkv carries on: exact but for one rounding. */
static void judge_mix(const trial *t, int i)
{
    const job *j = &t->jobs[i];
    int h, k, m = score_count(j);
    double *want = (double *)alloc_checked((size_t)m * sizeof *want);
    for (h = 0; h < j->shape.kv_heads; h++) {
        const float *scores = job_scores(j) + h * m;
        oracle_state_score(&t->config, job_state(j, h, 0), job_state(j, h, 1), job_bias(j, h), m,
                           want);
        for (k = 0; k < m; k++)
            if (!expect_near("score of the state", h * m + k, (double)scores[k], want[k],
                             3e-7 * (1 + fabs(want[k]))))
                break;
    }
    free(want);
}

static void judge_scores(const trial *t, int i)
{
    const job *j = &t->jobs[i];
    int h, k, m = score_count(j);
    for (h = 0; h < j->shape.kv_heads; h++) {
        const oracle_round *head = &t->heads[i][h];
        int exact = t->config.policy == RKV_POLICY_RANDOM && !j->layer.bias;
        if (head->near_threshold) heads_near_threshold++;
        if (head->near_threshold) continue;
        heads_compared++;
        for (k = 0; k < m; k++) {
            double slack = exact ? 0 : 2e-7 * (fabs(head->score[k]) + (double)j->shape.bias);
            if (t->config.policy == RKV_POLICY_MEMORY_TRACES) slack += 1e-7;
            if (!expect_near("score against the oracle", h * m + k,
                             (double)job_scores(j)[h * m + k], head->score[k],
                             head->tolerance[k] + slack))
                break;
        }
    }
}

/* The kept set that these very scores ask for: exact, ties included. */
static void judge_choice(const trial *t, int leader, int set)
{
    const job *j = &t->jobs[leader];
    int m = score_count(j), budget = t->config.budget, n, k;
    const float *scores = t->config.scope == RKV_PER_HEAD ? job_scores(j) + set * m : job_shared(j);
    double *exact = (double *)alloc_checked((size_t)m * sizeof *exact), gap;
    int32_t *want = (int32_t *)alloc_checked((size_t)j->shape.n_tokens * sizeof *want);
    for (k = 0; k < m; k++) exact[k] = (double)scores[k];
    n = oracle_select(&t->config, exact, job_pins(j, set), j->shape.n_tokens, want, &gap);
    for (k = 0; k < n; k++)
        if (!expect_int("kept, given the scores", k, job_kept(j)[set * budget + k], want[k])) break;
    free(exact);
    free(want);
}

/* Compares a kept list with what the oracle's scores decide; counts what they leave open. */
static void judge_rows(const char *at, const rkv_config *config, const double *score,
                       const double *tolerance, const uint8_t *pins, int n, const int32_t *kept)
{
    signed char *fates = (signed char *)alloc_checked((size_t)n);
    int row, k = 0;
    oracle_fates(config, score, tolerance, pins, n, fates);
    for (row = 0; row < n; row++) {
        int is_kept = k < config->budget && kept[k] == row;
        k += is_kept;
        if (row >= config->pinned && row < n - config_protect(config)) {
            rows_open[config->policy] += fates[row] == 0;
            rows_decided[config->policy] += fates[row] != 0;
        }
        if (fates[row] && !expect_int(at, row, is_kept, fates[row] > 0)) break;
    }
    free(fates);
}

/* The sum of the layers' means, and how far it may be. */
static void judge_shared(const trial *t, int leader)
{
    const job *j = &t->jobs[leader];
    int m = score_count(j), i, h, k, near = 0;
    double *sum = (double *)alloc_checked((size_t)m * sizeof *sum);
    double *slack = (double *)alloc_checked((size_t)m * sizeof *slack);
    for (k = 0; k < m; k++) sum[k] = 0;
    for (k = 0; k < m; k++) slack[k] = 1e-6;
    for (i = leader; i < end_of_set(t, leader); i++)
        for (h = 0; h < t->jobs[i].shape.kv_heads; h++) {
            const oracle_round *head = &t->heads[i][h];
            near |= head->near_threshold;
            for (k = 0; k < m; k++) {
                double share = 1.0 / t->jobs[i].shape.kv_heads;
                sum[k] += share * head->score[k];
                slack[k] += share * (head->tolerance[k] + 1e-6 * fabs(head->score[k]));
            }
        }
    for (k = 0; k < m && !near; k++)
        if (!expect_near("shared score", k, (double)job_shared(j)[k], sum[k], slack[k])) break;
    if (!near)
        judge_rows("kept against the oracle, shared", &t->config, sum, slack, job_pins(j, 0),
                   j->shape.n_tokens, job_kept(j));
    free(sum);
    free(slack);
}

static void judge_kept(const trial *t, int i)
{
    const job *j = &t->jobs[i];
    int set;
    if (j->shape.follower || !is_scored(t, i)) return;
    for (set = 0; set < j->sets; set++) {
        const oracle_round *head = &t->heads[i][set];
        judge_choice(t, i, set);
        if (t->config.scope != RKV_PER_HEAD)
            judge_shared(t, i);
        else if (!head->near_threshold)
            judge_rows("kept against the oracle", &t->config, head->score, head->tolerance,
                       job_pins(j, set), j->shape.n_tokens, job_kept(j) + set * t->config.budget);
    }
}

/* ---- running ---- */
static void lend_threads(rkv_config *config, const request *q)
{
    if (q->n_threads == 0) {
        config->n_threads = 3;
        config->parallel_for = reversed_for;
    } else if (q->n_threads > 1) {
        rkv_threads_use(q->n_threads == 2 ? two_threads : seven_threads, config);
    }
}

static int needs_positions(const trial *t)
{
    int i, turned = 0;
    for (i = 0; i < t->n_jobs; i++) turned |= t->jobs[i].shape.pairing > RKV_ROPE_NONE;
    return turned || t->config.policy == RKV_POLICY_RANDOM;
}

static void strip_optional(trial *t)
{
    int i;
    for (i = 0; i < t->n_jobs; i++) {
        rkv_layer *l = &t->jobs[i].layer;
        l->kept = NULL;
        l->scores = l->shared_scores = NULL;
        l->values.data = NULL;
        if (!reads_queries(&t->config)) l->queries.data = NULL;
        if (!needs_positions(t)) l->positions = NULL;
    }
}

static void snapshot(trial *t)
{
    int i;
    for (i = 0; i < t->n_jobs; i++) {
        const job *j = &t->jobs[i];
        t->kept[i] = (int32_t *)copy_of(j->kept.data, j->kept.bytes);
        t->scores[i] = (float *)copy_of(j->scores.data, j->scores.bytes);
        t->shared[i] = (float *)copy_of(j->shared.data, j->shared.bytes);
    }
}

/* Nothing is to be chosen: what compaction moves is the carried state, and new rows have none. */
static void start_new_rows(const job *j, float *state)
{
    const int stride = job_row_stride(j), n = j->shape.n_tokens;
    int plane, row;
    for (plane = 0; plane < j->shape.kv_heads * j->state_floats; plane++)
        for (row = n - j->layer.n_new; row < n; row++) state[plane * stride + row] = 0;
}

/* In three steps on one thread: each is judged. 0: a status was wrong. */
static int play_first(trial *t, const rkv_backend *backend)
{
    int i, going;
    char at[64];
    snprintf(at, sizeof at, "%s, first run", backend->name);
    going = expect_call(at, rkv_score, backend, &t->config, t->jobs, t->n_jobs);
    for (i = 0; i < t->n_jobs && going; i++) {
        job *j = &t->jobs[i];
        job_inputs_unchanged("inputs after scoring", j);
        job_guards("guards after scoring", j);
        t->state[i] = (float *)copy_of(j->state.data, j->state.bytes);
        if (loses_rows(t, i) && !is_scored(t, i)) start_new_rows(j, t->state[i]);
        if (!loses_rows(t, i)) job_unchanged("a layer within the budget", j);
        if (!is_scored(t, i)) continue;
        if (j->state_floats > 0) judge_state(t, i);
        if (j->state_floats > 0) judge_mix(t, i);
        judge_scores(t, i);
    }
    going = going && expect_call("select", rkv_select, backend, &t->config, t->jobs, t->n_jobs);
    for (i = 0; i < t->n_jobs && going; i++) judge_kept(t, i);
    snapshot(t);
    return going && expect_call("compact", rkv_compact, backend, &t->config, t->jobs, t->n_jobs);
}

/* Scores, sets and state are the first run's, bit by bit; rows lie where they belong. */
static void expect_same_answers(const trial *t, const char *name, int bare)
{
    int i;
    for (i = 0; i < t->n_jobs; i++) {
        const job *j = &t->jobs[i];
        const int32_t *kept = t->kept[leader_of(t, i)];
        job_guards(name, j);
        if (!bare) {
            expect_bytes("kept", j->kept.data, t->kept[i], j->kept.bytes);
            if (is_scored(t, i)) {
                expect_bytes("scores", j->scores.data, t->scores[i], j->scores.bytes);
                expect_bytes("shared", j->shared.data, t->shared[i], j->shared.bytes);
            }
        }
        job_compacted(name, j, kept, t->config.budget, n_kept_of(t, i));
        job_state_gathered("state after compaction", j, t->state[i], kept, t->config.budget,
                           n_kept_of(t, i));
        if (j->state_floats > 0)
            expect_int("n_new", i, j->layer.n_new, loses_rows(t, i) ? 0 : j->remembered.n_new);
    }
}

static void restore(trial *t)
{
    int i;
    for (i = 0; i < t->n_jobs; i++) job_restore(&t->jobs[i]);
}

static int call_steps(const char *name, const rkv_backend *backend, const rkv_config *config,
                      job *jobs, int n_jobs)
{
    return expect_call(name, rkv_score, backend, config, jobs, n_jobs) &&
           expect_call(name, rkv_select, backend, config, jobs, n_jobs) &&
           expect_call(name, rkv_compact, backend, config, jobs, n_jobs);
}

static int run_request(trial *t, const rkv_backend *backend, const request *q)
{
    rkv_config config = t->config;
    char name[96];
    int going;
    snprintf(name, sizeof name, "%s, %s", backend->name, q->name);
    restore(t);
    if (q->bare) strip_optional(t);
    lend_threads(&config, q);
    going = q->staged ? call_steps(name, backend, &config, t->jobs, t->n_jobs)
                      : expect_call(name, rkv_compress, backend, &config, t->jobs, t->n_jobs);
    if (going) expect_same_answers(t, name, q->bare);
    return going;
}

/* ---- one fault in a trial ---- */
enum { FAULT_KEY, FAULT_QUERY, FAULT_BIAS, FAULT_IMPORTANCE, FAULT_COPY, FAULT_MEAN, N_FAULTS };

/* What the record says of each kind. */
static const char *const fault_rules[N_FAULTS] = { "layer.keys: ",  "layer.queries: ",
                                                   "layer.bias: ",  "layer.state: ",
                                                   "layer.state: ", "layer.query_means: " };

/* Damages one number that the call must read, and notes head and token in the record (-1: not
 * told); 0 if there is none of the kind. */
static int plant(trial *t, rng *r, int i, int kind, rkv_error *record)
{
    job *j = &t->jobs[i];
    const int n = j->shape.n_tokens, old = n - j->layer.n_new, m = score_count(j);
    const int stride = job_row_stride(j), head = rng_below(r, j->shape.kv_heads);
    const int new_votes = j->state_floats && j->layer.n_new < j->votes ? j->layer.n_new : j->votes;
    const float bad = rng_below(r, 2) ? NAN : INFINITY;
    const int query_head = head * j->shape.group + rng_below(r, j->shape.group);
    const int age = rng_below(r, new_votes), row = rng_below(r, m);
    const int plane = kind - FAULT_IMPORTANCE;
    float *list;
    record->rule = fault_rules[kind];
    record->head = head;
    record->token = row;
    switch (kind) {
    case FAULT_KEY:
        if (!reads_keys(&t->config)) return 0;
        if (j->keys.tensor.dtype == RKV_OPAQUE && rng_below(r, 2)) {
            *view_at(&j->keys, head, row, 0) ^= 1; /* load_opaque does not give it */
            record->rule = "layer.keys.load: ";
        } else {
            view_store_one(&j->keys, head, row, rng_below(r, j->shape.head_dim), bad);
        }
        block_remember(&j->keys.memory);
        return 1;
    case FAULT_QUERY:
        if (!reads_queries(&t->config)) return 0;
        record->head = query_head;
        record->token = (j->layer.first_query - 1 - age + 2 * j->votes) % j->votes;
        view_store_one(&j->queries, query_head, record->token, rng_below(r, j->shape.head_dim),
                       bad);
        block_remember(&j->queries.memory);
        return 1;
    case FAULT_BIAS:
        if (!j->layer.bias) return 0;
        j->layer.bias[head * stride + row] = NAN;
        block_remember(&j->bias);
        return 1;
    case FAULT_IMPORTANCE:
    case FAULT_COPY:
        if (plane >= j->state_floats || old == 0) return 0;
        record->token = rng_below(r, old);
        list = job_state(j, head, plane);
        list[record->token] = rng_below(r, 2) ? bad : -0.25f;
        block_remember(&j->state);
        return 1;
    case FAULT_MEAN:
        if (t->config.policy != RKV_POLICY_TRIATTENTION) return 0;
        record->head = query_head;
        record->token = -1;
        list = (float *)(void *)j->means.data;
        list[query_head * j->shape.head_dim + rng_below(r, j->shape.head_dim)] = bad;
        block_remember(&j->means);
        return 1;
    }
    return 0;
}

/* The call is refused and has changed nothing, in no layer. */
static void run_fault(trial *t, uint64_t seed, const rkv_backend *backend, const request *q)
{
    rng r = rng_seed(~seed);
    const int i = rng_below(&r, t->n_jobs), first = rng_below(&r, N_FAULTS);
    rkv_config config = t->config;
    stage_function call = rng_below(&r, 2) ? rkv_compress : rkv_score;
    rkv_error record, want;
    int k, kind = first, planted = 0;
    char at[96];
    restore(t);
    for (k = 0; k < N_FAULTS && !planted && is_scored(t, i); k++)
        planted = plant(t, &r, i, kind = (first + k) % N_FAULTS, &want);
    if (!planted) return;
    faults_planted[kind]++;
    lend_threads(&config, q);
    config.error = &record;
    snprintf(at, sizeof at, "%s, %s, fault %d", backend->name, q->name, kind);
    expect_status(at, call_stage(call, backend, &config, t->jobs, t->n_jobs), RKV_ERROR_NONFINITE);
    expect_true(want.rule, record.rule && strstr(record.rule, want.rule));
    expect_int("layer at fault", kind, record.layer, i);
    expect_int("head at fault", kind, record.head, want.head);
    expect_int("token at fault", kind, record.token, want.token);
    for (k = 0; k < t->n_jobs; k++) job_unchanged(at, &t->jobs[k]);
}

/* ---- trials ---- */
static void name_trial(const trial *t, uint64_t seed)
{
    const rkv_config *c = &t->config;
    const shape *s = &t->jobs[0].shape;
    case_begin("build/tests/test_policies %lu: %s, H%d G%d d%d n%d, %d new, %s %s, %s, budget %d "
               "window %d protect %d votes %d pinned %d lambda %.2f scope %d, rope %d of %d, "
               "%d layers",
               (unsigned long)seed, policy_names[c->policy], s->kv_heads, s->group, s->head_dim,
               s->n_tokens, s->n_new, dtype_name(shape_key_dtype(s)), key_kind_name(s->kind),
               layout_name(s->keys), c->budget, c->window, c->protect, c->votes, c->pinned,
               (double)c->lambda, (int)c->scope, (int)s->pairing, s->rope_dims, t->n_jobs);
}

static void free_trial(trial *t)
{
    int i;
    for (i = 0; i < t->n_jobs; i++) {
        if (t->heads[i]) oracle_free_rounds(t->heads[i], &t->jobs[i]);
        job_free(&t->jobs[i]);
        free(t->kept[i]);
        free(t->scores[i]);
        free(t->shared[i]);
        free(t->state[i]);
    }
}

static void ask_oracle(trial *t)
{
    int i;
    for (i = 0; i < t->n_jobs; i++) {
        const job *leader = &t->jobs[leader_of(t, i)];
        if (is_scored(t, i))
            t->heads[i] = oracle_play_job(&t->jobs[i], &t->config, i, job_positions(leader, 0),
                                          job_row_stride(leader));
    }
}

/* The scalar path computes FMA in software where the CPU has none: it gets the small trials. */
static void run_trial(uint64_t seed)
{
    static const request ways[] = {
        { "one call, 1 thread", NULL, 0, 1, 0 }, { "one call, 2 threads", NULL, 0, 2, 0 },
        { "staged, 7 threads", NULL, 1, 7, 0 },  { "one call, reversed, bare", NULL, 0, 0, 1 },
        { "staged, reversed", NULL, 1, 0, 0 },   { "one call, 7 threads", NULL, 0, 7, 0 },
    };
    enum { N_WAYS = sizeof ways / sizeof *ways };
    int way, b, going;
    trial t;
    make_trial(&t, seed);
    name_trial(&t, seed);
    ask_oracle(&t);
    going = play_first(&t, backends[0]);
    if (going) expect_same_answers(&t, "first run", 0);
    for (way = 0; way < (int)N_WAYS && going; way++)
        if (seed % 8 == 0 || way == (int)(seed / 8 % N_WAYS))
            going = run_request(&t, backends[0], &ways[way]);
    for (b = 1; b < n_backends && going; b++) {
        int slow = strcmp(backends[b]->name, "scalar") == 0 && t.work > 4e5 && seed % 16;
        if (!slow) going = run_request(&t, backends[b], &ways[seed % N_WAYS]);
    }
    if (going)
        run_fault(&t, seed, backends[t.work > 4e5 ? 0 : seed % (uint64_t)n_backends],
                  &ways[seed / 2 % N_WAYS]);
    case_end();
    free_trial(&t);
}

/* ---- histories ----
 * A cache of its own, which the library alone compacts, beside a log of all tokens. The oracle
 * plays its own history from the log: its rows are numbers of tokens, its state is its own. */
enum { H_ROUNDS = 20, H_TOKENS = 1200, H_HEADS = 2, H_GROUP = 2, H_DIM = 32, H_TOPICS = 12 };

typedef struct history {
    rkv_config config;
    job j;
    int n, n_tokens; /* rows in use, tokens so far */
    float *keys, *queries, *bias;
    int32_t positions[H_TOKENS];
    float topics[H_HEADS][H_TOPICS][H_DIM];
    int rows[H_HEADS][H_TOKENS]; /* token of each row */
    double state[H_HEADS][2][H_TOKENS];
    uint64_t trace; /* of all kept lists and states: the same on every path */
    long decided, open;
} history;

static float *log_at(float *log, int head, int token)
{
    return log + (size_t)(head * H_TOKENS + token) * H_DIM;
}

/* One of a few topics, with noise, turned to its position. */
static void make_row(history *h, rng *r, int kv_head, double noise, double strength, float *row)
{
    const float *topic = h->topics[kv_head][rng_below(r, H_TOPICS)];
    float plain[H_DIM];
    double turned[H_DIM];
    int i;
    for (i = 0; i < H_DIM; i++)
        plain[i] = (float)(strength * (double)topic[i] + noise * rng_normal(r));
    oracle_rotate(turned, plain, &h->j.layer.rope, H_DIM, h->positions[h->n_tokens]);
    for (i = 0; i < H_DIM; i++) row[i] = (float)turned[i];
}

static void append_token(history *h, rng *r)
{
    job *j = &h->j;
    const int token = h->n_tokens, slot = token % j->votes, stride = job_row_stride(j);
    float row[H_DIM];
    int head, set;
    h->positions[token] = token ? h->positions[token - 1] + (rng_below(r, 9) ? 1 : 30) : 3;
    for (head = 0; head < H_HEADS; head++) {
        make_row(h, r, head, 0.35, 1, row);
        view_store_row(&j->keys, head, h->n, row);
        view_load_row(&j->keys, head, h->n, log_at(h->keys, head, token));
        h->rows[head][h->n] = token;
        h->bias[head * H_TOKENS + token] = (float)(0.1 * rng_normal(r));
        if (j->layer.bias) j->layer.bias[head * stride + h->n] = h->bias[head * H_TOKENS + token];
    }
    for (head = 0; head < H_HEADS * H_GROUP; head++) {
        make_row(h, r, head / H_GROUP, 0.5, 1.5, row);
        view_store_row(&j->queries, head, slot, row);
        view_load_row(&j->queries, head, slot, log_at(h->queries, head, token));
    }
    for (set = 0; set < j->sets; set++) {
        j->layer.positions[set * stride + h->n] = h->positions[token];
        j->layer.pins[set * stride + h->n] = (uint8_t)(token % 97 == 50);
    }
    h->n++;
    h->n_tokens++;
    j->layer.n_new++; /* no policy without state looks at it */
    j->layer.first_query = h->n_tokens % j->votes;
}

static float *gather_rows(float *log, const int *tokens, int head, int n)
{
    float *rows = (float *)alloc_checked((size_t)n * H_DIM * sizeof *rows);
    int i;
    for (i = 0; i < n; i++)
        memcpy(rows + i * H_DIM, log_at(log, head, tokens[i]), H_DIM * sizeof *rows);
    return rows;
}

/* The ring as the oracle sees it: slots of the newest tokens, from the log. */
static float *gather_ring(history *h, int head)
{
    const int votes = h->j.votes;
    float *ring = (float *)alloc_checked((size_t)(H_GROUP * votes) * H_DIM * sizeof *ring);
    int g, age;
    memset(ring, 0, (size_t)(H_GROUP * votes) * H_DIM * sizeof *ring);
    for (g = 0; g < H_GROUP; g++)
        for (age = 0; age < votes && age < h->n_tokens; age++) {
            int token = h->n_tokens - 1 - age;
            memcpy(ring + (g * votes + token % votes) * H_DIM,
                   log_at(h->queries, head * H_GROUP + g, token), H_DIM * sizeof *ring);
        }
    return ring;
}

static void play_history_head(history *h, int head, int n_new, oracle_round *out)
{
    const rkv_layer *layer = &h->j.layer;
    const float *means = layer->query_means;
    float *keys = gather_rows(h->keys, h->rows[head], head, h->n), *ring = gather_ring(h, head);
    int32_t positions[H_TOKENS];
    float bias[H_TOKENS];
    oracle_input in;
    int i;
    for (i = 0; i < h->n; i++) positions[i] = h->positions[h->rows[head][i]];
    for (i = 0; i < h->n; i++) bias[i] = h->bias[head * H_TOKENS + h->rows[head][i]];
    memset(&in, 0, sizeof in);
    in.config = &h->config;
    in.n_tokens = h->n;
    in.n_new = n_new;
    in.dim = H_DIM;
    in.group = H_GROUP;
    in.first_query = h->n_tokens % h->j.votes;
    in.head = head;
    in.keys = keys;
    in.queries = ring;
    in.positions = positions;
    in.importance = h->state[head][0];
    in.later_copy = h->state[head][1];
    if (means) {
        in.mean_queries = means + head * H_GROUP * H_DIM;
        in.mean_sizes = means + H_HEADS * H_GROUP * H_DIM + head * H_GROUP * (H_DIM / 2);
    }
    in.bias = layer->bias ? bias : NULL;
    in.rope = layer->rope;
    oracle_play(out, &in);
    free(keys);
    free(ring);
}

/* Rows lie in the cache as in the log; the pinned prefix is the first tokens. */
static void expect_history_rows(const history *h, int round)
{
    const job *j = &h->j;
    const int stride = job_row_stride(j);
    float row[H_DIM];
    int head, i;
    for (head = 0; head < H_HEADS; head++)
        for (i = 0; i < h->n; i++) {
            const int token = h->rows[head][i], set = j->sets == 1 ? 0 : head;
            view_load_row(&j->keys, head, i, row);
            if (!(expect_bytes("key of the row", row,
                               h->keys + (size_t)(head * H_TOKENS + token) * H_DIM, sizeof row) &
                  expect_int("position", i, j->layer.positions[set * stride + i],
                             h->positions[token]) &
                  expect_int("pin", i, j->layer.pins[set * stride + i], token % 97 == 50)))
                case_fail("in round %d", round);
            if (j->layer.bias)
                expect_bytes("bias", j->layer.bias + head * stride + i,
                             h->bias + head * H_TOKENS + token, sizeof(float));
            if (i < h->config.pinned) expect_int("pinned token", i, token, i);
        }
}

/* The scores and the kept set against the oracle's; then its rows follow the set. */
static void judge_history(history *h, oracle_round *heads, const uint8_t *pins)
{
    const int m = h->n - h->j.window, n = h->n, stride = job_row_stride(&h->j);
    int set, head, i;
    for (head = 0; head < H_HEADS; head++)
        for (i = 0; i < m; i++) {
            const oracle_round *o = &heads[head];
            if (!o->near_threshold &&
                !expect_near("score", head * m + i, (double)h->j.layer.scores[head * m + i],
                             o->score[i], o->tolerance[i] + 3e-7 * (1 + fabs(o->score[i]))))
                break;
        }
    for (set = 0; set < h->j.sets; set++) {
        double score[H_TOKENS], slack[H_TOKENS];
        signed char fates[H_TOKENS];
        const int32_t *kept = h->j.layer.kept + set * h->config.budget;
        int k = 0, near = 0;
        for (i = 0; i < m; i++) {
            score[i] =
                h->j.sets > 1 ? heads[set].score[i] : (heads[0].score[i] + heads[1].score[i]) / 2;
            slack[i] = h->j.sets > 1 ? heads[set].tolerance[i]
                                     : (heads[0].tolerance[i] + heads[1].tolerance[i]) / 2 + 1e-6;
        }
        for (i = 0; i < H_HEADS; i++) near |= heads[i].near_threshold;
        oracle_fates(&h->config, score, slack, pins + set * stride, n, fates);
        for (i = 0; i < n; i++) {
            int is_kept = k < h->config.budget && kept[k] == i;
            k += is_kept;
            h->open += fates[i] == 0;
            h->decided += fates[i] != 0;
            if (fates[i] && !near && !expect_int("kept", i, is_kept, fates[i] > 0)) break;
        }
    }
}

static void follow_history(history *h, const oracle_round *heads)
{
    int head, i;
    for (head = 0; head < H_HEADS; head++) {
        const int32_t *kept = h->j.layer.kept + (h->j.sets == 1 ? 0 : head) * h->config.budget;
        for (i = 0; i < h->config.budget; i++) { /* ascending: in place */
            h->rows[head][i] = h->rows[head][kept[i]];
            h->state[head][0][i] = heads[head].importance[kept[i]];
            h->state[head][1][i] = heads[head].later_copy[kept[i]];
        }
    }
    h->n = h->config.budget;
}

static void trace_bytes(uint64_t *trace, const void *data, size_t n) /* FNV-1a */
{
    const unsigned char *bytes = (const unsigned char *)data;
    size_t i;
    for (i = 0; i < n; i++) *trace = (*trace ^ bytes[i]) * 0x100000001b3u;
}

static int run_history_round(history *h, const rkv_backend *backend, int round)
{
    job *j = &h->j;
    const int n_new = j->layer.n_new, stride = job_row_stride(j);
    uint8_t *pins = (uint8_t *)copy_of(j->layer.pins, j->pins.bytes);
    oracle_round heads[H_HEADS];
    int head, plane, i, ok;
    for (head = 0; head < H_HEADS; head++) play_history_head(h, head, n_new, &heads[head]);
    j->layer.n_tokens = h->n;
    ok = expect_call("round", rkv_compress, backend, &h->config, j, 1);
    if (ok) {
        judge_history(h, heads, pins);
        follow_history(h, heads);
        expect_int("rows left", round, j->layer.n_tokens, h->n);
        expect_int("n_new", round, j->layer.n_new, j->state_floats ? 0 : n_new);
        expect_history_rows(h, round);
        trace_bytes(&h->trace, j->layer.kept, j->kept.bytes);
    }
    for (head = 0; head < H_HEADS && ok; head++)
        for (plane = 0; plane < j->state_floats; plane++) {
            const float *state = j->layer.state + (head * j->state_floats + plane) * stride;
            trace_bytes(&h->trace, state, (size_t)h->n * sizeof *state);
            for (i = 0; i < h->n; i++)
                if (!expect_near("state", i, (double)state[i], h->state[head][plane][i],
                                 plane
                                     ? ORACLE_COSINE_ERROR
                                     : heads[head].importance_error * h->state[head][0][i] + 1e-37))
                    break;
        }
    for (head = 0; head < H_HEADS; head++) oracle_round_free(&heads[head]);
    free(pins);
    return ok;
}

/* A new row's state is whatever the evicted rows left there. */
static void open_history(history *h, rng *r, const rkv_config *config, const shape *s)
{
    int head, topic, i;
    memset(h, 0, sizeof *h);
    h->config = *config;
    h->trace = 0xcbf29ce484222325u;
    job_make(&h->j, r, config, s);
    h->j.layer.n_new = 0;
    memset(h->j.pins.data, 0, h->j.pins.bytes);
    h->keys = (float *)alloc_checked((size_t)H_HEADS * H_TOKENS * H_DIM * sizeof(float));
    h->queries =
        (float *)alloc_checked((size_t)H_HEADS * H_GROUP * H_TOKENS * H_DIM * sizeof(float));
    h->bias = (float *)alloc_checked((size_t)H_HEADS * H_TOKENS * sizeof(float));
    for (head = 0; head < H_HEADS; head++)
        for (topic = 0; topic < H_TOPICS; topic++)
            for (i = 0; i < H_DIM; i++) h->topics[head][topic][i] = (float)rng_normal(r);
}

static void close_history(history *h)
{
    job_free(&h->j);
    free(h->keys);
    free(h->queries);
    free(h->bias);
}

static shape history_shape(rkv_dtype dtype, rkv_pairing pairing, int variety)
{
    shape s;
    memset(&s, 0, sizeof s);
    s.kv_heads = H_HEADS;
    s.group = H_GROUP;
    s.head_dim = H_DIM;
    s.n_tokens = s.capacity = 96;
    s.row_stride = 100;
    s.dtype = dtype;
    s.keys = (layout)(variety % N_KEY_LAYOUTS);
    s.queries = (layout)((variety + 2) % N_KEY_LAYOUTS);
    s.pins = 1;
    s.bias = variety % 2;
    s.pairing = pairing;
    s.rope_dims = variety % 3 ? 0 : 24;
    return s;
}

/* Prompt, then rounds of different lengths until the tokens are used up. */
static uint64_t test_history(const rkv_backend *backend, const rkv_config *config, const shape *s,
                             const char *name)
{
    history *h = (history *)alloc_checked(sizeof *h);
    rng r = rng_seed(77 + (uint64_t)config->policy);
    uint64_t trace;
    int round;
    case_begin("%s: history of %s, %s, scope %d", backend->name, name, dtype_name(s->dtype),
               (int)config->scope);
    open_history(h, &r, config, s);
    for (round = 0; round < H_ROUNDS; round++) {
        int until = round % 5 == 0 ? s->capacity : config->budget + 1 + rng_below(&r, 40);
        while (h->n < until) append_token(h, &r);
        if (!run_history_round(h, backend, round)) break;
    }
    expect_true("nearly all rows are decided", h->open * 25 < h->decided);
    rows_open[config->policy] += h->open;
    rows_decided[config->policy] += h->decided;
    trace = h->trace;
    close_history(h);
    free(h);
    case_end();
    return trace;
}

static rkv_config history_config(rkv_policy policy, rkv_scope scope)
{
    rkv_config c = rkv_config_default(52);
    c.policy = policy;
    c.scope = scope;
    c.pinned = 5;
    c.votes = 20;
    c.seed = 99;
    c.decay = 0.98f;
    c.lambda = policy == RKV_POLICY_MEMORY_PROSE ? 0.3f : 0.5f;
    if (policy == RKV_POLICY_H2O) c.protect = 26;
    if (policy == RKV_POLICY_RKV) c.pool = 5;
    c.mean_pool = policy == RKV_POLICY_RKV;
    return c;
}

static void test_histories(void)
{
    static const rkv_dtype dtypes[] = { RKV_F32, RKV_F16, RKV_BF16, RKV_F8_E4M3 };
    const int varieties = wanted_cases(1500) < 200 ? 1 : 6; /* emulators: minutes */
    int policy, variety, b;
    for (policy = 0; policy < N_POLICIES; policy++)
        for (variety = 0; variety < varieties; variety++) {
            rkv_config config = history_config((rkv_policy)policy, (rkv_scope)(variety % 3));
            shape s = history_shape(dtypes[variety % 4],
                                    (rkv_pairing)(RKV_ROPE_NONE + (variety + 1) % 3), variety);
            uint64_t first = 0;
            if (policy == RKV_POLICY_OWN_SCORE) s.bias = 1;
            for (b = 0; b < n_backends; b++) {
                uint64_t trace = test_history(backends[b], &config, &s, policy_names[policy]);
                case_begin("%s: history %d of %s, the same bits as %s", backends[b]->name, variety,
                           policy_names[policy], backends[0]->name);
                if (b == 0) first = trace;
                expect_true("equal", trace == first);
                case_end();
            }
        }
}

/* ---- golden vectors ----
 * One KV head's rows, carried from round to round by what this implementation keeps. */
enum { G_ROWS = 256, G_HEADS = 4 };

typedef struct golden_cache {
    int n;
    float *keys[G_HEADS];
    int32_t positions[G_HEADS][G_ROWS];
    float bias[G_HEADS][G_ROWS], state[G_HEADS][2][G_ROWS];
} golden_cache;

static shape golden_shape(const golden_policy *g, int n_tokens, int first_query)
{
    shape s;
    memset(&s, 0, sizeof s);
    s.kv_heads = g->kv_heads;
    s.group = g->group;
    s.head_dim = g->dim;
    s.n_tokens = n_tokens;
    s.dtype = g->dtype;
    s.first_query = first_query;
    s.bias = g->has_bias;
    s.pairing = g->rope.pairing;
    s.rope_dims = g->rope.dims;
    s.rope_base = g->rope.base;
    s.table = g->frequencies != NULL;
    return s;
}

static void golden_append(golden_cache *c, const golden_policy *g, int r)
{
    const golden_policy_round *d = &g->round[r];
    const size_t row = (size_t)g->dim;
    int h, i;
    for (h = 0; h < g->kv_heads; h++) {
        memcpy(c->keys[h] + (size_t)c->n * row, d->keys + (size_t)(h * d->appended) * row,
               (size_t)d->appended * row * sizeof(float));
        for (i = 0; i < d->appended; i++) {
            c->positions[h][c->n + i] = d->positions[i];
            if (d->bias) c->bias[h][c->n + i] = d->bias[h * d->appended + i];
        }
    }
    c->n += d->appended;
}

/* The job of a round: all that the shape does not make, from the cache and the file. */
static void golden_job(job *j, const golden_cache *c, const golden_policy *g, int r)
{
    const golden_policy_round *d = &g->round[r];
    const int n = c->n;
    const size_t plane = (size_t)n * sizeof(float), head_size = (size_t)(n * g->dim);
    const size_t query_count =
        (size_t)(g->kv_heads * g->group * config_votes(&g->config)) * (size_t)g->dim;
    float *keys = (float *)alloc_checked((size_t)g->kv_heads * head_size * sizeof *keys);
    float *queries = (float *)alloc_checked(query_count * sizeof *queries);
    shape s = golden_shape(g, n, d->first_query);
    rng random = rng_seed(1);
    size_t i;
    int h, p;
    for (h = 0; h < g->kv_heads; h++)
        memcpy(keys + (size_t)h * head_size, c->keys[h], head_size * sizeof *keys);
    for (i = 0; i < query_count; i++) queries[i] = d->queries ? d->queries[i] : 0;
    s.n_new = d->appended;
    job_make_from(j, &random, &g->config, &s, keys, queries);
    for (h = 0; h < g->kv_heads; h++) {
        for (p = 0; p < g->floats; p++)
            memcpy(job_state(j, h, p), c->state[h][p], plane - (size_t)d->appended * sizeof(float));
        if (g->has_bias) memcpy(j->layer.bias + h * n, c->bias[h], plane);
        if (h < j->sets) memcpy(j->layer.positions + h * n, c->positions[h], plane);
    }
    if (g->frequencies) memcpy(j->frequencies.data, g->frequencies, j->frequencies.bytes);
    if (g->means) memcpy(j->means.data, g->means, j->means.bytes);
    if (g->floats) block_remember(&j->state);
    block_remember(&j->positions);
    if (g->has_bias) block_remember(&j->bias);
    if (g->means) block_remember(&j->means);
    if (g->frequencies) block_remember(&j->frequencies);
    j->layer.scale = g->scale;
    j->layer.softcap = g->softcap;
    j->remembered = j->layer;
    free(keys);
    free(queries);
}

/* State, score and kept rows of one round: what the oracle (backend NULL) or a backend says. */
typedef struct golden_answer {
    double state[G_HEADS][2][G_ROWS], score[G_HEADS][G_ROWS];
    int32_t kept[G_HEADS][G_ROWS];
} golden_answer;

static void golden_ask_oracle(golden_answer *a, const golden_policy *g, const job *j)
{
    const int n = j->shape.n_tokens, m = score_count(j);
    oracle_round *heads =
        oracle_play_job(j, &g->config, g->layer, job_positions(j, 0), job_row_stride(j));
    double mean[G_ROWS] = { 0 }, gap;
    int h, i;
    for (h = 0; h < g->kv_heads; h++) {
        memcpy(a->state[h][0], heads[h].importance, (size_t)n * sizeof(double));
        memcpy(a->state[h][1], heads[h].later_copy, (size_t)n * sizeof(double));
        memcpy(a->score[h], heads[h].score, (size_t)m * sizeof(double));
        for (i = 0; i < m; i++) mean[i] += heads[h].score[i] / g->kv_heads;
    }
    for (h = 0; h < g->sets; h++)
        oracle_select(&g->config, g->sets > 1 || g->kv_heads == 1 ? heads[h].score : mean, NULL, n,
                      a->kept[h], &gap);
    oracle_free_rounds(heads, j);
}

/* Its layer is the last of the call; those before it have one row and nothing to do. */
static int golden_ask_backend(golden_answer *a, const golden_policy *g, job *j,
                              const rkv_backend *backend)
{
    const int m = score_count(j), last = g->layer;
    shape idle = golden_shape(g, 1, 0);
    rng random = rng_seed(2);
    job jobs[4];
    int h, p, i, going;
    for (i = 0; i < last; i++) job_make(&jobs[i], &random, &g->config, &idle);
    jobs[last] = *j;
    expect_call("score", rkv_score, backend, &g->config, jobs, last + 1);
    for (h = 0; h < g->kv_heads; h++) {
        for (p = 0; p < g->floats; p++)
            for (i = 0; i < j->shape.n_tokens; i++)
                a->state[h][p][i] = (double)job_state(&jobs[last], h, p)[i];
        for (i = 0; i < m; i++) a->score[h][i] = (double)job_scores(&jobs[last])[h * m + i];
    }
    job_restore(&jobs[last]);
    going = expect_call("compress", rkv_compress, backend, &g->config, jobs, last + 1);
    for (h = 0; h < g->sets; h++)
        memcpy(a->kept[h], job_kept(&jobs[last]) + h * g->config.budget,
               (size_t)g->config.budget * sizeof(int32_t));
    if (going)
        job_compacted("compaction", &jobs[last], job_kept(&jobs[last]), g->config.budget,
                      g->config.budget);
    *j = jobs[last];
    for (i = 0; i < last; i++) job_free(&jobs[i]);
    return going;
}

/* Places in a ranking that rounding may turn move a score by a step: the file's own state says
 * which. */
static double golden_tolerance(const golden_policy *g, const golden_policy_round *d, int n, int h,
                               int i, int m)
{
    const float *I = d->state + h * g->floats * n, *D = I + n;
    const double lambda = (double)g->config.lambda;
    double turned = 0;
    int k;
    if (g->floats != 2) return 0;
    for (k = 0; k < m; k++) {
        const double x = (double)I[i], y = (double)I[k];
        if (k != i && fabs(x - y) <= 2e-5 * (x + y)) turned += lambda / m;
        if (k != i && g->config.policy == RKV_POLICY_MEMORY_TRACES &&
            fabs((double)D[i] - (double)D[k]) <= 4 * ORACLE_COSINE_ERROR)
            turned += (1 - lambda) / m;
    }
    return turned;
}

static void golden_compare(const golden_policy *g, int r, int n, const golden_answer *a)
{
    const golden_policy_round *d = &g->round[r];
    const int m = n - g->config.window;
    double top = 0;
    int h, p, i;
    for (h = 0; h < g->kv_heads; h++)
        for (p = 0; p < g->floats; p++)
            for (i = 0; i < n; i++) {
                double want = (double)d->state[(h * g->floats + p) * n + i];
                if (!expect_near(p ? "state D" : "state I", r * 1000 + i, a->state[h][p][i], want,
                                 p ? 2 * ORACLE_COSINE_ERROR : 2e-5 * want))
                    break;
            }
    for (i = 0; i < g->kv_heads * m; i++) top = fmax(top, fabs((double)d->score[i]));
    for (h = 0; h < g->kv_heads; h++)
        for (i = 0; i < m; i++) {
            double slack = g->config.policy == RKV_POLICY_RANDOM ? 0 : 1e-5 * top;
            if (!expect_near("score", r * 1000 + i, a->score[h][i], (double)d->score[h * m + i],
                             slack + golden_tolerance(g, d, n, h, i, m)))
                break;
        }
    for (h = 0; h < g->sets; h++)
        for (i = 0; i < g->config.budget; i++)
            if (!expect_int("kept", r * 1000 + i, a->kept[h][i], d->kept[h * g->config.budget + i]))
                break;
}

static void golden_follow(golden_cache *c, const golden_policy *g, const golden_answer *a)
{
    const size_t row = (size_t)g->dim;
    int h, i;
    for (h = 0; h < g->kv_heads; h++) {
        const int32_t *kept = a->kept[g->sets == 1 ? 0 : h];
        for (i = 0; i < g->config.budget; i++) {
            memmove(c->keys[h] + (size_t)i * row, c->keys[h] + (size_t)kept[i] * row,
                    row * sizeof(float));
            c->positions[h][i] = c->positions[h][kept[i]];
            c->bias[h][i] = c->bias[h][kept[i]];
            c->state[h][0][i] = (float)a->state[h][0][kept[i]];
            c->state[h][1][i] = (float)a->state[h][1][kept[i]];
        }
    }
    c->n = g->config.budget;
}

static void test_golden(const golden_policy *g, const char *name, const rkv_backend *backend)
{
    golden_cache *c = (golden_cache *)alloc_checked(sizeof *c);
    golden_answer *a = (golden_answer *)alloc_checked(sizeof *a);
    int r, h, going = 1;
    case_begin("%s, %s", backend ? backend->name : "oracle", name);
    memset(c, 0, sizeof *c);
    memset(a, 0, sizeof *a);
    for (h = 0; h < g->kv_heads; h++)
        c->keys[h] = (float *)alloc_checked((size_t)(G_ROWS * g->dim) * sizeof(float));
    for (r = 0; r < g->rounds && going; r++) {
        job j;
        golden_append(c, g, r);
        golden_job(&j, c, g, r);
        if (!backend) golden_ask_oracle(a, g, &j);
        going = !backend || golden_ask_backend(a, g, &j, backend);
        if (going) golden_compare(g, r, c->n, a);
        if (going) golden_follow(c, g, a);
        job_free(&j);
    }
    case_end();
    for (h = 0; h < g->kv_heads; h++) free(c->keys[h]);
    free(c);
    free(a);
}

/* ---- running means of queries ---- */
static void expect_means(const char *at, const float *got, const float *want, int query_heads,
                         int dim)
{
    int i, n = query_heads * (dim + dim / 2) + 1;
    for (i = 0; i < n; i++)
        if (!expect_near(at, i, (double)got[i], (double)want[i],
                         4e-6 * (1 + fabs((double)want[i]))))
            break;
}

/* The stream of a golden file, all at once and in pieces of a ring. */
static void test_golden_means(const golden_policy *g, const char *name, const rkv_backend *backend)
{
    const int query_heads = g->kv_heads * g->group;
    const size_t n_floats = rkv_query_means_floats(query_heads, g->dim);
    const rkv_config config = rkv_config_triattention(64);
    rkv_rope rope = g->rope;
    rng r = rng_seed(3);
    block means;
    view whole, ring;
    float *row = (float *)alloc_checked((size_t)g->dim * sizeof *row);
    int h, t, taken = 0;
    case_begin("%s, %s: means of the stream", backend->name, name);
    block_make(&means, n_floats * sizeof *g->means, 0, 1);
    memset(means.data, 0, means.bytes);
    view_make(&whole, &r, LAYOUT_STRIDED, g->dtype, 0, query_heads, g->n_stream, g->dim, 2);
    view_make(&ring, &r, LAYOUT_TOKEN_MAJOR, g->dtype, 0, query_heads, 7, g->dim, 0);
    view_store(&whole, g->stream, g->n_stream);
    expect_status("all at once",
                  rkv_query_means_update(backend, &config, &rope, &whole.tensor, 0, g->n_stream, 0,
                                         (float *)(void *)means.data),
                  RKV_OK);
    expect_means("all at once", (float *)(void *)means.data, g->means, query_heads, g->dim);
    view_unchanged("queries", &whole);
    memset(means.data, 0, means.bytes);
    for (t = 0; t < g->n_stream; t++) {
        for (h = 0; h < query_heads; h++) {
            view_load_row(&whole, h, t, row);
            view_store_row(&ring, h, t % 7, row);
        }
        if (t % 7 != 6 && t % 7 != 2 && t + 1 < g->n_stream) continue;
        expect_status("in pieces",
                      rkv_query_means_update(backend, &config, &rope, &ring.tensor, taken % 7,
                                             t + 1 - taken, taken, (float *)(void *)means.data),
                      RKV_OK);
        taken = t + 1;
    }
    expect_means("in pieces", (float *)(void *)means.data, g->means, query_heads, g->dim);
    block_guards("guards", &means);
    case_end();
    free(row);
    block_free(&means);
    view_free(&whole);
    view_free(&ring);
}

static void test_golden_files(const char *directory)
{
    int i, b;
    for (i = 0; i < n_golden_policies; i++) {
        const char *name = golden_policy_names[i];
        golden_policy g;
        case_begin("%s/%s.rkvp", directory, name);
        if (expect_true("readable golden file", golden_policy_read(&g, directory, name)))
            for (b = -1; b < n_backends; b++) {
                test_golden(&g, name, b < 0 ? NULL : backends[b]);
                if (b >= 0 && g.stream) test_golden_means(&g, name, backends[b]);
            }
        golden_policy_free(&g);
    }
}

/* ---- single properties ---- */
static shape plain_shape(rkv_policy policy, int n_tokens)
{
    shape s;
    memset(&s, 0, sizeof s);
    s.kv_heads = 2;
    s.group = 3;
    s.head_dim = 48;
    s.n_tokens = n_tokens;
    s.n_new = 30;
    s.pairing = RKV_ROPE_HALVES;
    s.bias = policy == RKV_POLICY_OWN_SCORE;
    return s;
}

/* A score with a bias is the score without it, plus the bias. */
static void test_bias_by_hand(const rkv_backend *backend, rkv_policy policy)
{
    rng r = rng_seed(5);
    rkv_config config = history_config(policy, RKV_PER_HEAD);
    shape s = plain_shape(policy, 90);
    float bias[2 * 90], *alone;
    job j;
    int i, m;
    case_begin("%s: %s, bias added by hand", backend->name, policy_names[policy]);
    s.bias = 0;
    job_make(&j, &r, &config, &s);
    m = score_count(&j);
    expect_call("alone", rkv_score, backend, &config, &j, 1);
    alone = (float *)copy_of(j.scores.data, j.scores.bytes);
    job_restore(&j);
    for (i = 0; i < 2 * 90; i++) bias[i] = (float)rng_normal(&r);
    j.layer.bias = bias;
    expect_call("with bias", rkv_score, backend, &config, &j, 1);
    for (i = 0; i < 2 * m; i++) {
        float sum = alone[i] + bias[i / m * 90 + i % m];
        if (!expect_bytes("score", job_scores(&j) + i, &sum, sizeof sum)) break;
    }
    case_end();
    free(alone);
    j.layer.bias = NULL;
    job_free(&j);
}

/* Pools that reach beyond the candidates on one side or both, and few candidates that not all
 * votes see: against the oracle. */
static void test_short(const rkv_backend *backend, rkv_variant variant, int pool, int mean)
{
    rng r = rng_seed(11);
    int n, h, k;
    case_begin("%s: few candidates, variant %d, pool %d, %s", backend->name, (int)variant, pool,
               mean ? "mean" : "max");
    for (n = 5; n < 30; n += 4) {
        rkv_config config = rkv_config_wide(n - 1);
        shape s = plain_shape(RKV_POLICY_RKV, n);
        oracle_round *want;
        job j;
        config.window = 3;
        config.votes = n - 1;
        config.pool = pool;
        config.mean_pool = mean;
        config.variant = variant;
        config.lambda = 1;
        s.n_new = n;
        s.first_query = n / 2;
        job_make(&j, &r, &config, &s);
        expect_call("score", rkv_score, backend, &config, &j, 1);
        want = oracle_play_job(&j, &config, 0, job_positions(&j, 0), job_row_stride(&j));
        for (h = 0; h < s.kv_heads; h++)
            for (k = 0; k < n - 3; k++)
                if (!expect_near("score", n * 100 + k, (double)job_scores(&j)[h * (n - 3) + k],
                                 want[h].score[k], want[h].tolerance[k]))
                    break;
        oracle_free_rounds(want, &j);
        job_free(&j);
    }
    case_end();
}

/* RANDOM: a token has the same number in whatever row it lies, another one in another head, layer
 * or with another seed; the numbers spread over [0, 1). */
static void test_random_numbers(const rkv_backend *backend)
{
    enum { N = 500, HEADS = 2 };
    rng r = rng_seed(6);
    rkv_config config = rkv_config_random(20, 1);
    shape s = plain_shape(RKV_POLICY_RANDOM, N);
    job jobs[2];
    float first[HEADS * N];
    double sum = 0;
    int i, l, same = 0, m, gap = 37;
    case_begin("%s: random numbers of positions", backend->name);
    for (l = 0; l < 2; l++) job_make(&jobs[l], &r, &config, &s);
    m = score_count(&jobs[0]);
    for (l = 0; l < 2; l++)
        for (i = 0; i < HEADS * N; i++) jobs[l].layer.positions[i] = i % N;
    expect_call("status", rkv_score, backend, &config, jobs, 2);
    memcpy(first, jobs[0].scores.data, jobs[0].scores.bytes);
    for (i = 0; i < m; i++) {
        sum += (double)first[i] / m;
        expect_true("in [0, 1)", first[i] >= 0 && first[i] < 1);
        same += first[i] == first[m + i] || first[i] == jobs[1].layer.scores[i];
    }
    expect_near("mean", 0, sum, 0.5, 0.06);
    for (i = 0; i < HEADS * N; i++) jobs[0].layer.positions[i] = i % N + gap;
    expect_call("status", rkv_score, backend, &config, jobs, 2);
    for (i = 0; i + gap < m; i++)
        expect_bytes("the same position", jobs[0].layer.scores + i, first + i + gap, sizeof *first);
    config.seed = 2;
    expect_call("status", rkv_score, backend, &config, jobs, 2);
    for (i = 0; i + gap < m; i++) same += jobs[0].layer.scores[i] == first[i + gap];
    expect_true("different numbers", same < 3);
    case_end();
    for (l = 0; l < 2; l++) job_free(&jobs[l]);
}

/* Two layers that differ only in how many rows are new: each by its own count. A layer within the
 * budget keeps its state and its count. */
static void test_new_rows(const rkv_backend *backend, rkv_policy policy)
{
    static const int n_new[] = { 1, 90, 17, 9 }, n_tokens[] = { 90, 90, 90, 40 };
    rkv_config config = history_config(policy, RKV_PER_HEAD);
    job jobs[4], alone;
    int l;
    case_begin("%s: %s, layers with different numbers of new rows", backend->name,
               policy_names[policy]);
    for (l = 0; l < 4; l++) {
        rng r = rng_seed(7);
        shape s = plain_shape(policy, n_tokens[l]);
        s.n_new = n_new[l];
        job_make(&jobs[l], &r, &config, &s);
    }
    expect_call("together", rkv_compress, backend, &config, jobs, 4);
    for (l = 0; l < 4; l++) {
        rng r = rng_seed(7);
        shape s = plain_shape(policy, n_tokens[l]);
        s.n_new = n_new[l];
        job_make(&alone, &r, &config, &s);
        expect_call("alone", rkv_compress, backend, &config, &alone, 1);
        expect_bytes("state", jobs[l].state.data, alone.state.data, alone.state.bytes);
        expect_bytes("kept", jobs[l].kept.data, alone.kept.data, alone.kept.bytes);
        expect_int("n_new", l, jobs[l].layer.n_new, l < 3 ? 0 : 9);
        job_free(&alone);
    }
    block_unchanged("state of a layer within the budget", &jobs[3].state);
    expect_true("n_new counts", memcmp(jobs[0].kept.data, jobs[1].kept.data, jobs[0].kept.bytes));
    for (l = 0; l < 4; l++) job_free(&jobs[l]);
    case_end();
}

/* A list of the caller's own, without a round of scoring: state moves as it is, and new rows have
 * none. */
static void test_own_list(const rkv_backend *backend, rkv_policy policy)
{
    enum { N = 90, LEFT = 40 };
    rng r = rng_seed(13);
    rkv_config config = history_config(policy, RKV_PER_HEAD);
    shape s = plain_shape(policy, N);
    float *want;
    int32_t list[2 * LEFT];
    job j;
    int h, i;
    case_begin("%s: %s, a kept list of the caller's own", backend->name, policy_names[policy]);
    config.pinned = 0;
    config.budget = LEFT;
    job_make(&j, &r, &config, &s);
    for (h = 0; h < 2; h++)
        for (i = 0; i < LEFT; i++) list[h * LEFT + i] = 2 * i + h + 5;
    memcpy(j.kept.data, list, j.kept.bytes);
    j.layer.n_kept = LEFT;
    want = (float *)copy_of(j.state.data, j.state.bytes);
    start_new_rows(&j, want);
    expect_call("compact", rkv_compact, backend, &config, &j, 1);
    job_compacted("rows", &j, list, LEFT, LEFT);
    job_state_gathered("state", &j, want, list, LEFT, LEFT);
    expect_int("n_new", 0, j.layer.n_new, 0);
    case_end();
    free(want);
    job_free(&j);
}

/* Where the ring starts makes no difference, as long as first_query says so. */
static void test_ring(const rkv_backend *backend, rkv_policy policy)
{
    rkv_config config = history_config(policy, RKV_PER_HEAD);
    const int dim = 48, votes = config.votes, query_heads = 6;
    float *turned = (float *)alloc_checked((size_t)(query_heads * votes * dim) * sizeof *turned);
    job a, b;
    int offset, head, slot;
    for (offset = 1; offset < votes; offset += 9) {
        rng r = rng_seed(8), again = r;
        shape s = plain_shape(policy, 90);
        case_begin("%s: %s, a ring that starts in slot %d", backend->name, policy_names[policy],
                   offset);
        job_make(&a, &r, &config, &s);
        s.first_query = offset;
        job_make(&b, &again, &config, &s);
        for (head = 0; head < query_heads; head++)
            for (slot = 0; slot < votes; slot++)
                memcpy(turned + (head * votes + (slot + offset) % votes) * dim,
                       a.queries_f32 + (head * votes + slot) * dim, (size_t)dim * sizeof *turned);
        view_store(&b.queries, turned, votes);
        expect_call("0", rkv_compress, backend, &config, &a, 1);
        expect_call("turned", rkv_compress, backend, &config, &b, 1);
        expect_bytes("kept", a.kept.data, b.kept.data, a.kept.bytes);
        for (slot = 0; slot < 2 * score_count(&a); slot++)
            if (!expect_near("score", slot, (double)job_scores(&b)[slot],
                             (double)job_scores(&a)[slot],
                             1e-6 * (1 + fabs((double)job_scores(&a)[slot]))))
                break;
        case_end();
        job_free(&a);
        job_free(&b);
    }
    free(turned);
}

/* The same key again and again, in attention of no preference: the most recent rows stay. */
static void test_ties(const rkv_backend *backend, rkv_policy policy)
{
    rng r = rng_seed(9);
    rkv_config config = history_config(policy, RKV_PER_HEAD);
    shape s = plain_shape(policy, 90);
    job j;
    int i, h;
    case_begin("%s: %s, all rows equal", backend->name, policy_names[policy]);
    config.protect = 0;
    config.votes = 0;
    s.kind = KEYS_ZERO;
    s.n_new = 8;
    s.bias = 0;
    job_make(&j, &r, &config, &s);
    for (i = 0; i < (int)(j.state.bytes / sizeof(float)); i++) j.layer.state[i] = 0.25f;
    expect_call("status", rkv_compress, backend, &config, &j, 1);
    for (h = 0; h < 2; h++)
        for (i = 0; i < config.budget; i++)
            expect_int("kept", h * 100 + i, job_kept(&j)[h * config.budget + i],
                       i < config.pinned ? i : 90 - config.budget + i);
    case_end();
    job_free(&j);
}

/* Rows beyond those in use, and policies that read no keys or queries, see no NaN. */
static void test_unread(const rkv_backend *backend, rkv_policy policy)
{
    rng r = rng_seed(10);
    rkv_config config = history_config(policy, RKV_PER_HEAD);
    shape s = plain_shape(policy, 90);
    int row, head;
    job j;
    case_begin("%s: %s, numbers that are not read", backend->name, policy_names[policy]);
    s.capacity = 99;
    job_make(&j, &r, &config, &s);
    for (head = 0; head < 2; head++)
        for (row = reads_keys(&config) ? 90 : 0; row < 99; row++)
            view_store_one(&j.keys, head, row, 3, NAN);
    for (head = 0; head < 6 && !reads_queries(&config); head++)
        for (row = 0; row < j.votes; row++) view_store_one(&j.queries, head, row, 3, NAN);
    expect_call("status", rkv_compress, backend, &config, &j, 1);
    case_end();
    job_free(&j);
}

/* A NaN in a later query of the call: the means are as they were. */
static void test_means_refused(const rkv_backend *backend)
{
    enum { HEADS = 3, DIM = 20, N = 6 };
    const rkv_config config = rkv_config_triattention(64);
    rng r = rng_seed(12);
    rkv_rope rope;
    view queries;
    block means;
    float rows[HEADS * N * DIM];
    int i;
    memset(&rope, 0, sizeof rope);
    rope.pairing = RKV_ROPE_ADJACENT;
    case_begin("%s: means of queries that are not finite", backend->name);
    for (i = 0; i < HEADS * N * DIM; i++) rows[i] = (float)rng_normal(&r);
    view_make(&queries, &r, LAYOUT_CONTIGUOUS, RKV_BF16, 0, HEADS, N, DIM, 0);
    view_store(&queries, rows, N);
    block_make(&means, rkv_query_means_floats(HEADS, DIM) * sizeof(float), 0, 1);
    memset(means.data, 0, means.bytes);
    expect_status("a first batch",
                  rkv_query_means_update(backend, &config, &rope, &queries.tensor, 0, N, 10,
                                         (float *)(void *)means.data),
                  RKV_OK);
    block_remember(&means);
    view_store_one(&queries, 2, 4, 19, INFINITY);
    expect_status("a second one",
                  rkv_query_means_update(backend, &config, &rope, &queries.tensor, 1, 4, 16,
                                         (float *)(void *)means.data),
                  RKV_ERROR_NONFINITE);
    expect_means("means", (float *)(void *)means.data,
                 (const float *)(const void *)(means.image + (means.data - means.base)), HEADS,
                 DIM);
    expect_status("the four first tokens",
                  rkv_query_means_update(backend, &config, &rope, &queries.tensor, 2, 4, 0,
                                         (float *)(void *)means.data),
                  RKV_OK);
    expect_means("the four first tokens", (float *)(void *)means.data,
                 (const float *)(const void *)(means.image + (means.data - means.base)), HEADS,
                 DIM);
    case_end();
    view_free(&queries);
    block_free(&means);
}

static void test_presets(void)
{
    rkv_config c = rkv_config_wide(300);
    case_begin("presets");
    expect_int("wide", 0, c.policy, RKV_POLICY_RKV);
    expect_int("wide votes", 0, config_votes(&c), 64);
    expect_int("wide window", 0, config_window(&c), 8);
    expect_int("wide pool", 0, c.pool, 5);
    expect_true("wide mean pooling", c.mean_pool);
    expect_near("wide lambda", 0, (double)c.lambda, 0.5, 0);
    c = rkv_config_memory_traces(300);
    expect_int("traces", 0, c.policy, RKV_POLICY_MEMORY_TRACES);
    expect_int("traces votes", 0, config_votes(&c), 32);
    expect_near("traces lambda", 0, (double)c.lambda, 0.5, 0);
    expect_int("traces state", 0, rkv_state_floats(&c), 2);
    c = rkv_config_memory_prose(300);
    expect_int("prose", 0, c.policy, RKV_POLICY_MEMORY_PROSE);
    expect_int("prose votes", 0, config_votes(&c), 32);
    expect_near("prose lambda", 0, (double)c.lambda, 0.3, 1e-7);
    expect_int("prose state", 0, rkv_state_floats(&c), 2);
    c = rkv_config_memory_wide(300);
    expect_int("wide memory", 0, c.policy, RKV_POLICY_MEMORY_PROSE);
    expect_int("wide memory votes", 0, config_votes(&c), 128);
    expect_int("wide memory newest", 0, config_protect(&c), 75);
    expect_near("wide memory lambda", 0, (double)c.lambda, 0.3, 1e-7);
    c = rkv_config_h2o(300);
    expect_int("h2o", 0, c.policy, RKV_POLICY_H2O);
    expect_int("h2o votes", 0, config_votes(&c), 128);
    expect_int("h2o newest", 0, config_protect(&c), 150);
    expect_int("h2o state", 0, rkv_state_floats(&c), 1);
    c = rkv_config_triattention(300);
    expect_int("triattention", 0, c.policy, RKV_POLICY_TRIATTENTION);
    expect_int("triattention pinned", 0, c.pinned, 4);
    expect_int("triattention state", 0, rkv_state_floats(&c), 0);
    c = rkv_config_random(300, 77);
    expect_int("random", 0, c.policy, RKV_POLICY_RANDOM);
    expect_int("random seed", 0, (int)c.seed, 77);
    case_end();
}

static void test_properties(const rkv_backend *backend)
{
    static const int pools[] = { 1, 2, 5, 8, 16, 999 };
    int policy, i;
    for (policy = 0; policy < N_POLICIES; policy++) {
        rkv_config config = history_config((rkv_policy)policy, RKV_PER_HEAD);
        test_bias_by_hand(backend, (rkv_policy)policy);
        test_unread(backend, (rkv_policy)policy);
        if (reads_queries(&config)) test_ring(backend, (rkv_policy)policy);
        if (config_state_floats(&config) == 0) continue;
        test_new_rows(backend, (rkv_policy)policy);
        test_own_list(backend, (rkv_policy)policy);
        test_ties(backend, (rkv_policy)policy);
    }
    test_ties(backend, RKV_POLICY_TRIATTENTION);
    test_ties(backend, RKV_POLICY_OWN_SCORE);
    for (i = 0; i < 24; i++)
        test_short(backend, i / 2 % 2 ? RKV_PAPER : RKV_PUBLISHED, pools[i / 4], i % 2);
    test_random_numbers(backend);
    test_means_refused(backend);
}

int main(int argc, char **argv)
{
    const int whole = argc < 2 || strspn(argv[1], "0123456789") != strlen(argv[1]);
    uint64_t first = whole ? 1 : strtoull(argv[1], NULL, 10);
    uint64_t count = whole ? wanted_cases(1500) : 1, seed;
    int b, policy;
    n_backends = usable_backends(backends);
    if (n_backends == 0) return close_tests();
    if (!whole && argc > 2) count = strtoull(argv[2], NULL, 10);
    case_begin("thread pools");
    if (!expect_status("2", rkv_threads_create(&two_threads, 2), RKV_OK)) return close_tests();
    if (!expect_status("7", rkv_threads_create(&seven_threads, 7), RKV_OK)) return close_tests();
    if (whole) {
        test_presets();
        test_golden_files(argc > 1 ? argv[1] : "tests/golden");
        for (b = 0; b < n_backends; b++) test_properties(backends[b]);
        if (cases_failed() < MAX_FAILED) test_histories();
    }
    for (seed = first; seed < first + count && cases_failed() < MAX_FAILED; seed++) run_trial(seed);
    rkv_threads_destroy(two_threads);
    rkv_threads_destroy(seven_threads);
    printf(
        "compared with the oracle: %ld heads (%ld too near the threshold); faults %ld, %ld, %ld, "
        "%ld, %ld, %ld; rows decided, open to rounding:",
        heads_compared, heads_near_threshold, faults_planted[0], faults_planted[1],
        faults_planted[2], faults_planted[3], faults_planted[4], faults_planted[5]);
    for (policy = 0; policy < N_POLICIES; policy++)
        printf(" %s %ld, %ld%s", policy_names[policy], rows_decided[policy], rows_open[policy],
               policy + 1 < N_POLICIES ? ";" : "\n");
    case_begin("share of comparable results");
    for (policy = 0; policy < N_POLICIES && count >= 100 && cases_failed() == 0; policy++)
        expect_true("three of four rows", rows_decided[policy] > 3 * rows_open[policy]);
    for (b = 0; b < N_FAULTS && count >= 100; b++)
        expect_true("faults of each kind", faults_planted[b] > (long)count / 70);
    return close_tests();
}
