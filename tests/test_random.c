/* Thousands of generated cases against the oracle, on every CPU path, staged and in one call, on
 * 1, 2 and 7 threads, and with a fault in each.
 *     make test                                  one case again: build/tests/test_random SEED
 *     build/tests/test_random FIRST COUNT runs a range; RKV_TEST_CASES sets the default count. */
#include "harness.h"
#include "oracle.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_FAULTS = 4 };
enum { MAX_JOBS = 3, MAX_FAILED = 20 /* more say nothing new */ };

/* What one seed stands for. */
typedef struct trial {
    rkv_config config;
    job jobs[MAX_JOBS];
    int n_jobs;
    oracle_head *heads[MAX_JOBS];
    double work; /* multiplications of a naive pass, to keep slow paths to small trials */
    /* The answers of the first run, which every other must repeat bit by bit. */
    int32_t *kept[MAX_JOBS];
    float *scores[MAX_JOBS], *shared[MAX_JOBS];
} trial;

/* How the results are asked for. */
typedef struct request {
    const char *name;
    const rkv_backend *backend;
    int staged;    /* rkv_score, _select, _compact instead of rkv_compress */
    int n_threads; /* 0: reversed_for */
    int bare;      /* without kept, scores, shared_scores and values */
} request;

static rkv_threads *two_threads, *seven_threads;
static long heads_compared, heads_near_threshold, sets_compared, sets_near_tie;
static long faults_planted[N_FAULTS];

/* ---- generating a trial ---- */
/* No protected tokens, fewer than the window, as many, or more. */
static int make_protect(rng *r, int window, int n_tokens)
{
    int more = window + 1 + rng_below(r, 20);
    switch (rng_below(r, 8)) {
    case 0: return rng_below(r, window);
    case 1: return window;
    case 2:
    case 3: return more < n_tokens ? more : n_tokens;
    default: return 0;
    }
}

static rkv_config make_config(rng *r, int n_tokens)
{
    static const int windows[] = { 0, 0, 1, 2, 3, 5, 8, 16, 32 };
    static const int pools[] = { 0, 0, 1, 1, 2, 3, 4, 5, 8, 15, 64, 1001 };
    static const int recents[] = { 0, 0, 1, 2, 3, 5 };
    static const int pinned[] = { 0, 0, 0, 1, 4, 17 };
    static const int thresholds[] = { -20, 0, 50, 50, 50, 70, 99, 100 };
    static const int lambdas[] = { 0, 1, 7, 10, 10, 10, 50, 90, 100 };
    rkv_config c = rkv_config_default(1);
    int least, room;
    c.window = RNG_PICK(r, windows);
    if (config_window(&c) >= n_tokens) c.window = 1 + rng_below(r, n_tokens);
    c.protect = make_protect(r, config_window(&c), n_tokens);
    c.pinned = RNG_PICK(r, pinned);
    if (config_protect(&c) + c.pinned > n_tokens) c.pinned = 0;
    least = config_protect(&c) + c.pinned;
    room = n_tokens - least;
    c.budget = least + rng_below(r, room + 1 + (rng_below(r, 8) == 0 ? 3 : 0));
    c.pool = RNG_PICK(r, pools);
    c.recent = RNG_PICK(r, recents);
    c.threshold = (float)RNG_PICK(r, thresholds) / 100.0f;
    c.lambda = (float)RNG_PICK(r, lambdas) / 100.0f;
    c.scope = (rkv_scope)rng_below(r, 3);
    c.variant = rng_below(r, 5) < 2 ? RKV_PAPER : RKV_PUBLISHED;
    return c;
}

static void make_lengths(rng *r, shape *s, int n_tokens, int window)
{
    static const int dims[] = { 1, 2, 7, 20, 64, 64, 67, 80, 96, 128, 128, 192, 256, 576 };
    static const int groups[] = { 1, 1, 2, 3, 4, 4, 5, 7, 8, 16, 71, 128 };
    double pairs = (double)n_tokens * n_tokens / 2, limit = n_tokens < 900 ? 6e6 : 9e7;
    s->kv_heads = 1 + rng_below(r, 4);
    s->head_dim = RNG_PICK(r, dims);
    s->group = RNG_PICK(r, groups);
    s->n_tokens = n_tokens;
    while (s->head_dim > 8 && pairs * s->kv_heads * s->head_dim > limit) {
        if (s->kv_heads > 1)
            s->kv_heads--;
        else
            s->head_dim /= 2;
    }
    while (s->group > 1 && (double)s->kv_heads * s->group * window * n_tokens * s->head_dim > 4e6)
        s->group /= 2;
    s->capacity = n_tokens + rng_below(r, 20);
    s->value_dim = 1 + rng_below(r, 2 * s->head_dim > 90 ? 90 : 2 * s->head_dim);
}

/* Keys and values of another type than the queries. */
static void make_other_keys(rng *r, shape *s)
{
    s->key_dtype = (rkv_dtype)(1 + rng_below(r, RKV_Q8_0));
    if (s->key_dtype == RKV_Q8_0) {
        s->head_dim = (s->head_dim + 31) / 32 * 32;
        s->value_dim = (s->value_dim + 31) / 32 * 32;
        s->value_bytes = 0;
    }
    if (s->key_dtype != RKV_OPAQUE && s->key_dtype != RKV_Q8_0) return;
    if (s->values >= N_KEY_LAYOUTS) s->values = LAYOUT_ROW_LIST; /* no transposed rows */
}

static shape make_shape(rng *r, const rkv_config *config, int n_tokens)
{
    static const int element_sizes[] = { 0, 0, 0, 1, 2, 3, 4, 5, 8, 16, 34 };
    static const int sharpness[] = { 5, 10, 10, 30, 80 };
    static const int pins[] = { 0, 0, 0, 0, 3, 20, 60, 100 };
    static const int wide[] = { 0, 0, 0, 0, -30, -8, 7, 40 }, narrow[] = { 0, 0, 0, -5, 6 };
    shape s;
    int is_narrow;
    memset(&s, 0, sizeof s);
    make_lengths(r, &s, n_tokens, config_window(config));
    s.dtype = (rkv_dtype)rng_below(r, 3);
    s.value_bytes = RNG_PICK(r, element_sizes);
    s.keys = (layout)rng_below(r, N_KEY_LAYOUTS);
    s.values = (layout)rng_below(r, N_LAYOUTS);
    s.queries = (layout)rng_below(r, N_KEY_LAYOUTS);
    s.kind = (key_kind)rng_below(r, N_KEY_KINDS);
    s.strength = 0.2 + 0.75 * rng_unit(r);
    s.sharpness = RNG_PICK(r, sharpness) / 10.0;
    if (rng_below(r, 3) == 0) make_other_keys(r, &s);
    is_narrow = s.dtype == RKV_F16 ||
                (s.key_dtype != 0 && s.key_dtype != RKV_BF16 && s.key_dtype != RKV_OPAQUE);
    s.key_exponent = is_narrow ? RNG_PICK(r, narrow) : RNG_PICK(r, wide);
    if (s.kind == KEYS_TINY) s.key_exponent = 0;
    s.misalign = rng_below(r, 3) ? 0 : (size_t)rng_below(r, 16);
    if (rng_below(r, 2)) s.row_stride = s.capacity + rng_below(r, 3);
    s.pins = RNG_PICK(r, pins);
    return s;
}

/* Mostly short, some long: cost grows with the square. Few are so long that the search for
 * similar keys has many blocks to go through. */
static int make_n_tokens(rng *r)
{
    int top = rng_below(r, 20) == 0 ? 700 : 280;
    if (rng_below(r, 300) == 0) return 900 + rng_below(r, 1100);
    return 1 + (int)(exp(rng_unit(r) * log((double)top)));
}

/* Most keys resemble others now and then only: rows of the cosine matrix find similar keys at
 * all distances, some one by one, some together with many. */
static void make_far_similar_keys(rng *r, rkv_config *config, shape *s)
{
    config->threshold = 0.5f;
    config->recent = 1 + rng_below(r, 4);
    config->lambda = 0.1f;
    s->kind = KEYS_SHARED;
    s->strength = 0.2 + 0.25 * rng_unit(r);
    s->key_exponent = 0;
    s->head_dim = s->value_dim = 32 + rng_below(r, 3) * 16;
    if (s->key_dtype == RKV_Q8_0) s->head_dim = s->value_dim = 64;
    s->kv_heads = s->group = 1;
}

static void make_trial(trial *t, uint64_t seed)
{
    rng r = rng_seed(seed);
    const int far_similar_keys = rng_below(&r, 40) == 0;
    int n_tokens = far_similar_keys ? 300 + rng_below(&r, 300) : make_n_tokens(&r), sequence = 3, i;
    memset(t, 0, sizeof *t);
    t->config = make_config(&r, n_tokens);
    t->n_jobs = 1 + (!far_similar_keys && rng_below(&r, 3) == 0 ? rng_below(&r, MAX_JOBS) : 0);
    for (i = 0; i < t->n_jobs; i++) {
        shape s;
        int joins = i > 0 && t->config.scope == RKV_PER_SEQUENCE && rng_below(&r, 3) > 0;
        if (i > 0 && !joins) {
            n_tokens = make_n_tokens(&r);
            sequence++;
        }
        s = make_shape(&r, &t->config, n_tokens);
        if (far_similar_keys) make_far_similar_keys(&r, &t->config, &s);
        s.sequence = sequence;
        s.follower = joins;
        job_make(&t->jobs[i], &r, &t->config, &s);
        t->jobs[i].layer.scale = rng_below(&r, 4) ? 0.0f : (float)(0.5 / sqrt((double)s.head_dim));
        t->jobs[i].layer.softcap = rng_below(&r, 5) ? 0.0f : 3.0f;
        t->jobs[i].remembered = t->jobs[i].layer;
        t->work += (double)s.kv_heads * s.n_tokens * s.head_dim *
                   (s.n_tokens / 2.0 + s.group * config_window(&t->config));
    }
}

static int is_scored(const trial *t, int i) /* more rows than the budget, and a choice to make */
{
    const rkv_config *c = &t->config;
    return t->jobs[i].shape.n_tokens > c->budget && c->budget > config_protect(c) + c->pinned;
}

static size_t score_count(const job *j) /* per head */
{
    return (size_t)(j->shape.n_tokens - j->window);
}

/* ---- judging a run against the oracle ---- */
static int layers_in_set(const trial *t, int leader)
{
    int end = leader + 1;
    while (end < t->n_jobs && t->jobs[end].shape.follower) end++;
    return end - leader;
}

static int near_threshold(const oracle_head *head)
{
    return head->margin < 5e-6;
}

static void judge_scores(const trial *t, int i)
{
    const job *j = &t->jobs[i];
    int h, k, candidates = (int)score_count(j);
    for (h = 0; h < j->shape.kv_heads; h++) {
        const oracle_head *head = &t->heads[i][h];
        double tolerance = oracle_tolerance(head, &t->config);
        if (near_threshold(head)) {
            heads_near_threshold++;
            continue;
        }
        heads_compared++;
        for (k = 0; k < candidates; k++)
            if (!expect_near("score against the oracle", h * candidates + k,
                             (double)job_scores(j)[h * candidates + k], head->score[k], tolerance))
                break;
    }
}

/* The kept set that these very scores ask for: exact, ties included. */
static void judge_choice(const trial *t, int leader, int set)
{
    const job *j = &t->jobs[leader];
    int candidates = (int)score_count(j), budget = t->config.budget, n, k;
    const float *scores =
        t->config.scope == RKV_PER_HEAD ? job_scores(j) + set * candidates : job_shared(j);
    double *exact = (double *)alloc_checked((size_t)candidates * sizeof *exact), gap;
    int32_t *want = (int32_t *)alloc_checked((size_t)j->shape.n_tokens * sizeof *want);
    for (k = 0; k < candidates; k++) exact[k] = (double)scores[k];
    n = oracle_select(&t->config, exact, job_pins(j, set), j->shape.n_tokens, want, &gap);
    for (k = 0; k < n; k++)
        if (!expect_int("kept, given the scores", k, job_kept(j)[set * budget + k], want[k])) break;
    free(exact);
    free(want);
}

/* The set that these exact scores keep is the set kept. */
static void judge_set(const trial *t, const double *score, const job *j, int set, double tolerance)
{
    const int32_t *kept = job_kept(j) + set * t->config.budget;
    int32_t *want = (int32_t *)alloc_checked((size_t)j->shape.n_tokens * sizeof *want);
    double gap;
    int n = oracle_select(&t->config, score, job_pins(j, set), j->shape.n_tokens, want, &gap), k;
    if (gap < 2 * tolerance) {
        sets_near_tie++;
    } else {
        sets_compared++;
        for (k = 0; k < n && expect_int("kept against the oracle", k, kept[k], want[k]); k++)
            continue;
    }
    free(want);
}

/* One head's set against the oracle. */
static void judge_head_set(const trial *t, int i, int head)
{
    const job *j = &t->jobs[i];
    const oracle_head *want = &t->heads[i][head];
    if (!near_threshold(want))
        judge_set(t, want->score, j, head, oracle_tolerance(want, &t->config));
}

/* The set that several heads and layers share, and the sums it was chosen by. */
static void judge_shared_set(const trial *t, int leader)
{
    const job *j = &t->jobs[leader];
    int candidates = (int)score_count(j), last = leader + layers_in_set(t, leader), i, h, k;
    double *sum = (double *)alloc_checked((size_t)candidates * sizeof *sum), tolerance = 0;
    int near = 0;
    memset(sum, 0, (size_t)candidates * sizeof *sum);
    for (i = leader; i < last; i++) {
        oracle_add_layer(sum, t->heads[i], t->jobs[i].shape.kv_heads);
        for (h = 0; h < t->jobs[i].shape.kv_heads; h++) {
            tolerance += oracle_tolerance(&t->heads[i][h], &t->config);
            near |= near_threshold(&t->heads[i][h]);
        }
    }
    for (k = 0; k < candidates && !near; k++)
        if (!expect_near("shared score against the oracle", k, (double)job_shared(j)[k], sum[k],
                         tolerance))
            break;
    if (!near) judge_set(t, sum, j, 0, tolerance);
    free(sum);
}

/* What must be kept when there is nothing to choose. */
static void judge_given(const trial *t, int leader, int set)
{
    const job *j = &t->jobs[leader];
    int32_t *want = (int32_t *)alloc_checked((size_t)j->shape.n_tokens * sizeof *want);
    double gap;
    int n = oracle_select(&t->config, NULL, job_pins(j, set), j->shape.n_tokens, want, &gap), k;
    for (k = 0; k < n; k++)
        expect_int("kept, no choice", k, job_kept(j)[set * t->config.budget + k], want[k]);
    free(want);
}

static void judge(const trial *t)
{
    int i, set;
    for (i = 0; i < t->n_jobs; i++) {
        if (is_scored(t, i)) judge_scores(t, i);
        if (t->jobs[i].shape.follower) continue;
        for (set = 0; set < t->jobs[i].sets; set++) {
            if (!is_scored(t, i)) {
                judge_given(t, i, set);
                continue;
            }
            judge_choice(t, i, set);
            if (t->config.scope == RKV_PER_HEAD)
                judge_head_set(t, i, set);
            else
                judge_shared_set(t, i);
        }
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

static void strip_optional(trial *t)
{
    int i;
    for (i = 0; i < t->n_jobs; i++) {
        rkv_layer *l = &t->jobs[i].layer;
        l->kept = NULL;
        l->scores = l->shared_scores = NULL;
        l->values.data = NULL;
        if (t->config.lambda == 0) l->queries.data = NULL;
    }
}

/* What the record of an earlier call may look like. */
static const rkv_error stale = { "of an earlier call", RKV_ERROR_DEVICE, 7, 7, 7 };

static void expect_record(const char *at, const rkv_error *got, const rkv_error *want)
{
    int same = want->rule ? got->rule && strstr(got->rule, want->rule) : !got->rule;
    if (!same) case_fail("%s: rule %s", at, got->rule ? got->rule : "none");
    expect_int(at, 0, got->status, want->status);
    expect_int(at, 1, got->layer, want->layer);
    expect_int(at, 2, got->head, want->head);
    expect_int(at, 3, got->token, want->token);
}

/* Runs a request from the trial's first state; 1 when it returned RKV_OK. */
static int run_request(trial *t, const request *q)
{
    static const rkv_error nothing = { NULL, RKV_OK, -1, -1, -1 };
    rkv_config config = t->config;
    rkv_error record = stale;
    rkv_status status;
    int i;
    for (i = 0; i < t->n_jobs; i++) job_restore(&t->jobs[i]);
    if (q->bare) strip_optional(t);
    lend_threads(&config, q);
    config.error = &record;
    status = q->staged ? call_stages(q->backend, &config, t->jobs, t->n_jobs)
                       : call_stage(rkv_compress, q->backend, &config, t->jobs, t->n_jobs);
    for (i = 0; i < t->n_jobs; i++) job_guards("guards", &t->jobs[i]);
    expect_record("record, nothing wrong", &record, &nothing);
    return expect_status(q->name, status, RKV_OK);
}

static void keep_answers(trial *t)
{
    int i;
    for (i = 0; i < t->n_jobs; i++) {
        job *j = &t->jobs[i];
        t->kept[i] = (int32_t *)alloc_checked(j->kept.bytes);
        t->scores[i] = (float *)alloc_checked(j->scores.bytes);
        t->shared[i] = (float *)alloc_checked(j->shared.bytes);
        if (j->kept.bytes) memcpy(t->kept[i], j->kept.data, j->kept.bytes);
        if (j->scores.bytes) memcpy(t->scores[i], j->scores.data, j->scores.bytes);
        if (j->shared.bytes) memcpy(t->shared[i], j->shared.data, j->shared.bytes);
    }
}

/* Scores and kept sets are the first run's, bit by bit; rows lie where they belong. */
static void expect_same_answers(const trial *t, const request *q)
{
    int i, leader = 0;
    char at[160];
    snprintf(at, sizeof at, "%s, same bits as the first run", q->name);
    for (i = 0; i < t->n_jobs; i++) {
        const job *j = &t->jobs[i];
        int n_kept = j->shape.n_tokens < t->config.budget ? j->shape.n_tokens : t->config.budget;
        if (!j->shape.follower) leader = i;
        if (!q->bare) {
            if (j->kept.bytes) expect_bytes(at, j->kept.data, t->kept[i], j->kept.bytes);
            if (is_scored(t, i) && j->scores.bytes)
                expect_bytes(at, j->scores.data, t->scores[i], j->scores.bytes);
            if (is_scored(t, i) && j->shared.bytes)
                expect_bytes(at, j->shared.data, t->shared[i], j->shared.bytes);
        }
        job_compacted(q->name, j, t->kept[leader], t->config.budget, n_kept);
        expect_int("n_kept", i, j->layer.n_kept, n_kept);
    }
}

static void free_trial(trial *t)
{
    int i;
    for (i = 0; i < t->n_jobs; i++) {
        if (t->heads[i]) oracle_free_job(t->heads[i], &t->jobs[i]);
        job_free(&t->jobs[i]);
        free(t->kept[i]);
        free(t->scores[i]);
        free(t->shared[i]);
    }
}

static void name_trial(const trial *t, uint64_t seed)
{
    const rkv_config *c = &t->config;
    const shape *s = &t->jobs[0].shape;
    case_begin("build/tests/test_random %lu: H%d G%d d%d n%d %s keys, %s, budget %d window %d "
               "protect %d pool %d recent %d pinned %d pins %d%% lambda %.2f T %.2f scope %d "
               "variant %d, %d layers",
               (unsigned long)seed, s->kv_heads, s->group, s->head_dim, s->n_tokens,
               key_kind_name(s->kind), layout_name(s->keys), c->budget, c->window, c->protect,
               c->pool, c->recent, c->pinned, s->pins, (double)c->lambda, (double)c->threshold,
               (int)c->scope, (int)c->variant, t->n_jobs);
}

/* The first run is judged and remembered, every later one must repeat it. 0 on a wrong status. */
static int run_and_judge(trial *t, const rkv_backend *backend, const request *given)
{
    request q = *given;
    char name[96];
    snprintf(name, sizeof name, "%s, %s", backend->name, given->name);
    q.name = name;
    q.backend = backend;
    if (!run_request(t, &q)) return 0;
    if (!t->kept[0]) {
        keep_answers(t);
        judge(t);
    }
    expect_same_answers(t, &q);
    return 1;
}

/* ---- one fault in a trial ---- */
/* What was damaged, and what the call must say of it; no rule: nothing was. */
typedef struct fault {
    stage_function call;
    rkv_error record;
    int64_t order; /* of several faults the one of the lowest order is reported */
} fault;

static void note_fault(fault *f, stage_function call, const char *rule, rkv_status status,
                       int layer, int head, int token)
{
    f->call = call;
    f->record.rule = rule;
    f->record.status = (int32_t)status;
    f->record.layer = layer;
    f->record.head = head;
    f->record.token = token;
}

static int loses_rows(const trial *t, int i)
{
    return t->jobs[i].shape.n_tokens > t->config.budget;
}

/* A key or query that is not finite. A head's queries are read before its keys. */
static void plant_number(trial *t, rng *r, fault *f)
{
    const int i = rng_below(r, t->n_jobs), is_query = t->config.lambda > 0 && rng_below(r, 3) == 0;
    job *j = &t->jobs[i];
    view *v = is_query ? &j->queries : &j->keys;
    const int head = rng_below(r, v->tensor.heads),
              kv_head = is_query ? head / j->shape.group : head;
    const int token = rng_below(r, is_query ? j->window : j->shape.n_tokens);
    const char *rule = is_query ? "layer.queries: a query is" : "layer.keys: a key is";
    const int64_t order =
        (((int64_t)(i * 64 + kv_head) * 2 + !is_query) * 1024 + head) * 65536 + token;
    if (!is_scored(t, i)) return;
    if (v->tensor.dtype == RKV_OPAQUE && f->record.rule == NULL && rng_below(r, 2)) {
        *view_at(v, head, token, 0) ^= 1; /* load_opaque does not give it */
        rule = "layer.keys.load: the row loader";
    } else {
        view_store_one(v, head, token, rng_below(r, j->shape.head_dim),
                       rng_below(r, 2) ? NAN : INFINITY);
    }
    block_remember(&v->memory);
    if (f->record.rule && f->order < order) return;
    f->order = order;
    note_fault(f, rng_below(r, 2) ? rkv_compress : rkv_score, rule, RKV_ERROR_NONFINITE, i, head,
               token);
}

static void plant_numbers(trial *t, rng *r, fault *f)
{
    int n = 1 + rng_below(r, 4);
    while (n-- > 0) plant_number(t, r, f);
}

static uint8_t *pins_of(const job *j, int set)
{
    return j->pins.data + set * (j->shape.row_stride ? j->shape.row_stride : j->shape.capacity);
}

/* All rows of a set are pinned. */
static void plant_pins(trial *t, rng *r, fault *f)
{
    const int i = rng_below(r, t->n_jobs), set = rng_below(r, t->jobs[i].sets);
    job *j = &t->jobs[i];
    if (!j->layer.pins || !loses_rows(t, i)) return;
    memset(pins_of(j, set), 1, (size_t)j->shape.n_tokens);
    block_remember(&j->pins);
    note_fault(f, rng_below(r, 2) ? rkv_compress : rkv_select, "layer.pins", RKV_ERROR_ARGUMENT, i,
               set, -1);
}

/* A block that is negative, or there twice. */
static void plant_block(trial *t, rng *r, fault *f)
{
    static const char *const rules[] = { "layer.keys.block_table", "layer.values.block_table",
                                         "layer.queries.block_table" };
    const int i = rng_below(r, t->n_jobs), which = rng_below(r, 3);
    job *j = &t->jobs[i];
    view *v = which == 0 ? &j->keys : which == 1 ? &j->values : &j->queries;
    const int rows = which == 2 ? j->window : j->shape.n_tokens, step = v->tensor.block_tokens;
    int32_t *table = (int32_t *)(void *)v->table.data;
    int at;
    if (!loses_rows(t, i) || !v->tensor.block_table || rows <= step) return;
    if (which == 2 && (!is_scored(t, i) || t->config.lambda == 0)) return;
    at = 1 + rng_below(r, (rows - 1) / step);
    table[at] = rng_below(r, 3) ? table[rng_below(r, at)] : -1 - rng_below(r, 9);
    block_remember(&v->table);
    note_fault(f, which != 1 && is_scored(t, i) && rng_below(r, 2) ? rkv_score : rkv_compress,
               rules[which], RKV_ERROR_ARGUMENT, i, -1, at * step);
}

static int is_listed(const int32_t *list, int n, int row)
{
    int k = 0;
    while (k < n && list[k] != row) k++;
    return k < n;
}

/* A kept list with a row out of range, one twice, or without one that is pinned. */
static void plant_entry(trial *t, rng *r, fault *f)
{
    const int i = rng_below(r, t->n_jobs), budget = t->config.budget;
    job *j = &t->jobs[i];
    const int set = rng_below(r, j->sets);
    int32_t *list;
    int k, at = rng_below(r, budget);
    if (j->shape.follower || !loses_rows(t, i)) return;
    list = (int32_t *)(void *)j->kept.data + set * budget;
    for (k = 0; k < t->n_jobs; k++) {
        job *each = &t->jobs[k];
        each->layer.n_kept = each->shape.n_tokens < budget ? each->shape.n_tokens : budget;
        each->remembered.n_kept = each->layer.n_kept;
        if (each->kept.bytes) memcpy(each->kept.data, t->kept[k], each->kept.bytes);
        if (each->kept.bytes && k != i) block_remember(&each->kept);
    }
    if (j->layer.pins && rng_below(r, 2)) {
        do at = rng_below(r, j->shape.n_tokens);
        while (is_listed(list, budget, at));
        pins_of(j, set)[at] = 1;
        block_remember(&j->pins);
    } else if (at > 0 && rng_below(r, 2)) {
        list[at] = list[at - 1];
    } else {
        list[at] = rng_below(r, 2) ? -1 - rng_below(r, 9) : j->shape.n_tokens + rng_below(r, 9);
    }
    block_remember(&j->kept);
    note_fault(f, rkv_compact, "layer.kept", RKV_ERROR_ARGUMENT, i, set, at);
}

/* The call finds the fault, says where it is, and has changed nothing. */
static void run_fault(trial *t, uint64_t seed, const request *q)
{
    static void (*const plant[N_FAULTS])(trial *, rng *, fault *) = { plant_numbers, plant_pins,
                                                                      plant_block, plant_entry };
    rng r = rng_seed(~seed);
    rkv_config config = t->config;
    rkv_error record = stale;
    fault f;
    char at[96];
    int i, kind = 0;
    memset(&f, 0, sizeof f);
    for (i = 0; i < t->n_jobs; i++) job_restore(&t->jobs[i]);
    for (i = 0; i < N_FAULTS && !f.record.rule; i++)
        plant[kind = (int)((seed + (uint64_t)i) % N_FAULTS)](t, &r, &f);
    if (!f.record.rule) return;
    faults_planted[kind]++;
    lend_threads(&config, q);
    config.error = &record;
    snprintf(at, sizeof at, "%s, %s, fault %d", q->backend->name, q->name, kind);
    expect_status(at, call_stage(f.call, q->backend, &config, t->jobs, t->n_jobs),
                  (rkv_status)f.record.status);
    expect_record(at, &record, &f.record);
    for (i = 0; i < t->n_jobs; i++) job_unchanged(at, &t->jobs[i]);
}

/* The best path in some ways, every eighth trial in all; each other path in one way. The scalar
 * path computes FMA in software where the CPU has none: it gets the small trials. */
static void run_trial(uint64_t seed, const rkv_backend **backends, int n_backends)
{
    static const request ways[] = {
        { "staged, 1 thread", NULL, 1, 1, 0 },    { "one call, 1 thread", NULL, 0, 1, 0 },
        { "one call, 2 threads", NULL, 0, 2, 0 }, { "staged, 7 threads", NULL, 1, 7, 0 },
        { "staged, reversed", NULL, 1, 0, 0 },    { "one call, reversed, bare", NULL, 0, 0, 1 },
        { "one call, 7 threads", NULL, 0, 7, 0 },
    };
    enum { N_WAYS = sizeof ways / sizeof *ways };
    int way, b, going = 1;
    trial t;
    make_trial(&t, seed);
    name_trial(&t, seed);
    for (b = 0; b < t.n_jobs; b++)
        if (is_scored(&t, b)) t.heads[b] = oracle_score_job(&t.jobs[b], &t.config);
    for (way = 0; way < (int)N_WAYS && going; way++)
        if (way == 0 || seed % 8 == 0 || way == 1 + (int)(seed / 8 % (N_WAYS - 1)))
            going = run_and_judge(&t, backends[0], &ways[way]);
    for (b = 1; b < n_backends && going; b++) {
        int slow = strcmp(backends[b]->name, "scalar") == 0 && t.work > 4e5 && seed % 16;
        if (!slow) going = run_and_judge(&t, backends[b], &ways[seed % N_WAYS]);
    }
    if (going) {
        request q = ways[seed / 2 % N_WAYS];
        q.backend = backends[t.work > 4e5 ? 0 : seed % (uint64_t)n_backends];
        run_fault(&t, seed, &q); /* last: the data stay damaged */
    }
    case_end();
    free_trial(&t);
}

int main(int argc, char **argv)
{
    const rkv_backend *backends[MAX_BACKENDS];
    uint64_t first = argc > 1 ? strtoull(argv[1], NULL, 10) : 1;
    uint64_t count = wanted_cases(2500), seed;
    int n_backends = usable_backends(backends), kind;
    if (n_backends == 0) return close_tests();
    if (argc > 1) count = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    case_begin("thread pools");
    if (!expect_status("2", rkv_threads_create(&two_threads, 2), RKV_OK)) return close_tests();
    if (!expect_status("7", rkv_threads_create(&seven_threads, 7), RKV_OK)) return close_tests();
    for (seed = first; seed < first + count && cases_failed() < MAX_FAILED; seed++)
        run_trial(seed, backends, n_backends);
    rkv_threads_destroy(two_threads);
    rkv_threads_destroy(seven_threads);
    printf("compared with the oracle: %ld heads' scores (%ld too near the threshold), "
           "%ld kept sets (%ld too near a tie); faults found: %ld numbers, %ld pins, %ld blocks, "
           "%ld lists\n",
           heads_compared, heads_near_threshold, sets_compared, sets_near_tie, faults_planted[0],
           faults_planted[1], faults_planted[2], faults_planted[3]);
    if (count >= 100 && cases_failed() == 0) {
        case_begin("share of comparable results");
        expect_true("four of five heads", heads_compared > 4 * heads_near_threshold);
        expect_true("half of the kept sets", sets_compared > sets_near_tie);
        for (kind = 0; kind < N_FAULTS; kind++)
            expect_true("faults of each kind", faults_planted[kind] > (long)count / 50);
    }
    return close_tests();
}
