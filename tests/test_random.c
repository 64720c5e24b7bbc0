/* Thousands of generated cases against the oracle, on every CPU path, staged and in one call, on
 * 1, 2 and 7 threads: make test     one case again: build/tests/test_random SEED
 *     build/tests/test_random FIRST COUNT runs a range; RKV_TEST_CASES sets the default count. */
#include "harness.h"
#include "oracle.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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
typedef struct variant {
    const char *name;
    const rkv_backend *backend;
    int staged;    /* rkv_score, _select, _compact instead of rkv_compress */
    int n_threads; /* 0: reversed_for */
    int bare;      /* without kept, scores, shared_scores and values */
} variant;

static rkv_threads *two_threads, *seven_threads;
static long heads_compared, heads_near_threshold, sets_compared, sets_near_tie;

/* ---- generating a trial ---- */
static rkv_config make_config(rng *r, int n_tokens)
{
    static const int windows[] = { 0, 0, 1, 2, 3, 5, 8, 16, 32 };
    static const int pools[] = { 0, 0, 1, 1, 2, 3, 4, 5, 8, 15, 64, 1001 };
    static const int recents[] = { 0, 0, 1, 2, 3, 5 };
    static const int pins[] = { 0, 0, 0, 1, 4, 17 };
    static const int thresholds[] = { -20, 0, 50, 50, 50, 70, 99, 100 };
    static const int lambdas[] = { 0, 1, 7, 10, 10, 10, 50, 90, 100 };
    rkv_config c = rkv_config_default(1);
    int window, least, room;
    c.window = RNG_PICK(r, windows);
    window = config_window(&c);
    if (window >= n_tokens) c.window = window = 1 + rng_below(r, n_tokens);
    c.pinned = RNG_PICK(r, pins);
    if (window + c.pinned > n_tokens) c.pinned = 0;
    least = window + c.pinned;
    room = n_tokens - least;
    c.budget = least + rng_below(r, room + 1 + (rng_below(r, 8) == 0 ? 3 : 0));
    c.pool = RNG_PICK(r, pools);
    c.recent = RNG_PICK(r, recents);
    c.threshold = (float)RNG_PICK(r, thresholds) / 100.0f;
    c.lambda = (float)RNG_PICK(r, lambdas) / 100.0f;
    c.scope = (rkv_scope)rng_below(r, 3);
    c.pooling = (rkv_pooling)rng_below(r, 2);
    c.grouping = (rkv_grouping)(rng_below(r, 3) == 0);
    c.redundancy = (rkv_redundancy)(rng_below(r, 3) == 0);
    c.span = (rkv_span)(rng_below(r, 3) == 0);
    c.column0 = (rkv_column0)(rng_below(r, 4) == 0);
    c.order = (rkv_order)(rng_below(r, 5) == 0);
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

static shape make_shape(rng *r, const rkv_config *config, int n_tokens)
{
    static const int element_sizes[] = { 0, 0, 0, 1, 2, 3, 4, 5, 8, 16, 34 };
    static const int sharpness[] = { 5, 10, 10, 30, 80 };
    static const int wide[] = { 0, 0, 0, 0, -30, -8, 7, 40 }, narrow[] = { 0, 0, 0, -5, 6 };
    shape s;
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
    s.key_exponent = s.dtype == RKV_F16 ? RNG_PICK(r, narrow) : RNG_PICK(r, wide);
    if (s.kind == KEYS_TINY) s.key_exponent = 0;
    s.misalign = rng_below(r, 3) ? 0 : (size_t)rng_below(r, 16);
    if (rng_below(r, 2)) s.position_stride = s.capacity + rng_below(r, 3);
    return s;
}

/* Mostly short, some long: cost grows with the square. Few are so long that the search for
 * look-alikes has many blocks to go through. */
static int make_n_tokens(rng *r)
{
    int top = rng_below(r, 20) == 0 ? 700 : 280;
    if (rng_below(r, 300) == 0) return 900 + rng_below(r, 1100);
    return 1 + (int)(exp(rng_unit(r) * log((double)top)));
}

/* Most keys resemble others now and then only: rows of the cosine matrix find their look-alikes at
 * all distances, some one by one, some together with many. */
static void make_far_look_alikes(rng *r, rkv_config *config, shape *s)
{
    config->threshold = 0.5f;
    config->recent = 1 + rng_below(r, 4);
    config->lambda = 0.1f;
    s->kind = KEYS_SHARED;
    s->strength = 0.2 + 0.25 * rng_unit(r);
    s->key_exponent = 0;
    s->head_dim = s->value_dim = 32 + rng_below(r, 3) * 16;
    s->kv_heads = s->group = 1;
}

static void make_trial(trial *t, uint64_t seed)
{
    rng r = rng_seed(seed);
    const int far_look_alikes = rng_below(&r, 40) == 0;
    int n_tokens = far_look_alikes ? 300 + rng_below(&r, 300) : make_n_tokens(&r), sequence = 3, i;
    memset(t, 0, sizeof *t);
    t->config = make_config(&r, n_tokens);
    t->n_jobs = 1 + (!far_look_alikes && rng_below(&r, 3) == 0 ? rng_below(&r, MAX_JOBS) : 0);
    for (i = 0; i < t->n_jobs; i++) {
        shape s;
        int joins = i > 0 && t->config.scope == RKV_PER_SEQUENCE && rng_below(&r, 3) > 0;
        if (i > 0 && !joins) {
            n_tokens = make_n_tokens(&r);
            sequence++;
        }
        s = make_shape(&r, &t->config, n_tokens);
        if (far_look_alikes) make_far_look_alikes(&r, &t->config, &s);
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
    return t->jobs[i].shape.n_tokens > c->budget && c->budget > config_window(c) + c->pinned;
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
    n = oracle_select(&t->config, exact, j->shape.n_tokens, want, &gap);
    for (k = 0; k < n; k++)
        if (!expect_int("kept, given the scores", k, job_kept(j)[set * budget + k], want[k])) break;
    free(exact);
    free(want);
}

static int by_value(const void *a, const void *b)
{
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

/* The set that these exact scores keep is the set kept, in whatever order. */
static void judge_set(const trial *t, const double *score, int n_tokens, const int32_t *kept,
                      double tolerance)
{
    rkv_config ascending = t->config;
    int32_t *want = (int32_t *)alloc_checked((size_t)n_tokens * sizeof *want);
    int32_t *got = (int32_t *)alloc_checked((size_t)n_tokens * sizeof *got);
    double gap;
    int n, k;
    ascending.order = RKV_BY_POSITION;
    n = oracle_select(&ascending, score, n_tokens, want, &gap);
    memcpy(got, kept, (size_t)n * sizeof *got);
    qsort(got, (size_t)n, sizeof *got, by_value);
    if (gap < 2 * tolerance) {
        sets_near_tie++;
    } else {
        sets_compared++;
        for (k = 0; k < n && expect_int("kept against the oracle", k, got[k], want[k]); k++)
            continue;
    }
    free(want);
    free(got);
}

/* One head's set against the oracle. */
static void judge_head_set(const trial *t, int i, int head)
{
    const job *j = &t->jobs[i];
    const oracle_head *want = &t->heads[i][head];
    if (!near_threshold(want))
        judge_set(t, want->score, j->shape.n_tokens, job_kept(j) + head * t->config.budget,
                  oracle_tolerance(want, &t->config));
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
    if (!near) judge_set(t, sum, j->shape.n_tokens, job_kept(j), tolerance);
    free(sum);
}

/* What must be kept when there is nothing to choose. */
static void judge_given(const trial *t, int leader, int set)
{
    const job *j = &t->jobs[leader];
    int32_t *want = (int32_t *)alloc_checked((size_t)j->shape.n_tokens * sizeof *want);
    double gap;
    int n = oracle_select(&t->config, NULL, j->shape.n_tokens, want, &gap), k;
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
static void lend_threads(rkv_config *config, const variant *v)
{
    if (v->n_threads == 0) {
        config->n_threads = 3;
        config->parallel_for = reversed_for;
    } else if (v->n_threads > 1) {
        rkv_threads_use(v->n_threads == 2 ? two_threads : seven_threads, config);
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

/* Runs the variant from the trial's first state; 1 when it returned RKV_OK. */
static int run_variant(trial *t, const variant *v)
{
    rkv_config config = t->config;
    rkv_status status;
    int i;
    for (i = 0; i < t->n_jobs; i++) job_restore(&t->jobs[i]);
    if (v->bare) strip_optional(t);
    lend_threads(&config, v);
    status = v->staged ? call_stages(v->backend, &config, t->jobs, t->n_jobs)
                       : call_stage(rkv_compress, v->backend, &config, t->jobs, t->n_jobs);
    for (i = 0; i < t->n_jobs; i++) job_guards("guards", &t->jobs[i]);
    return expect_status(v->name, status, RKV_OK);
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
static void expect_same_answers(const trial *t, const variant *v)
{
    int i, leader = 0;
    char at[160];
    snprintf(at, sizeof at, "%s, same bits as the first run", v->name);
    for (i = 0; i < t->n_jobs; i++) {
        const job *j = &t->jobs[i];
        int n_kept = j->shape.n_tokens < t->config.budget ? j->shape.n_tokens : t->config.budget;
        if (!j->shape.follower) leader = i;
        if (!v->bare) {
            if (j->kept.bytes) expect_bytes(at, j->kept.data, t->kept[i], j->kept.bytes);
            if (is_scored(t, i) && j->scores.bytes)
                expect_bytes(at, j->scores.data, t->scores[i], j->scores.bytes);
            if (is_scored(t, i) && j->shared.bytes)
                expect_bytes(at, j->shared.data, t->shared[i], j->shared.bytes);
        }
        job_compacted(v->name, j, t->kept[leader], t->config.budget, n_kept);
        expect_int("n_kept", i, j->layer.n_kept, n_kept);
        expect_int("n_evicted", i, j->layer.n_evicted, j->shape.n_tokens - n_kept);
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
               "pool %d recent %d pinned %d lambda %.2f T %.2f options %d%d%d%d%d%d%d, %d layers",
               (unsigned long)seed, s->kv_heads, s->group, s->head_dim, s->n_tokens,
               key_kind_name(s->kind), layout_name(s->keys), c->budget, c->window, c->pool,
               c->recent, c->pinned, (double)c->lambda, (double)c->threshold, (int)c->scope,
               (int)c->pooling, (int)c->grouping, (int)c->redundancy, (int)c->span, (int)c->column0,
               (int)c->order, t->n_jobs);
}

/* The first run is judged and remembered, every later one must repeat it. 0 on a wrong status. */
static int run_and_judge(trial *t, const rkv_backend *backend, const variant *way)
{
    variant v = *way;
    char name[96];
    snprintf(name, sizeof name, "%s, %s", backend->name, way->name);
    v.name = name;
    v.backend = backend;
    if (!run_variant(t, &v)) return 0;
    if (!t->kept[0]) {
        keep_answers(t);
        judge(t);
    }
    expect_same_answers(t, &v);
    return 1;
}

/* The best path in some ways, every eighth trial in all; each other path in one way. The scalar
 * path computes FMA in software where the CPU has none: it gets the small trials. */
static void run_trial(uint64_t seed, const rkv_backend **backends, int n_backends)
{
    static const variant ways[] = {
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
    case_end();
    free_trial(&t);
}

int main(int argc, char **argv)
{
    const rkv_backend *backends[MAX_BACKENDS];
    uint64_t first = argc > 1 ? strtoull(argv[1], NULL, 10) : 1;
    uint64_t count = wanted_cases(2500), seed;
    int n_backends = usable_backends(backends);
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
           "%ld kept sets (%ld too near a tie)\n",
           heads_compared, heads_near_threshold, sets_compared, sets_near_tie);
    if (count >= 100 && cases_failed() == 0) {
        case_begin("share of comparable results");
        expect_true("four of five heads", heads_compared > 4 * heads_near_threshold);
        expect_true("half of the kept sets", sets_compared > sets_near_tie);
    }
    return close_tests();
}
