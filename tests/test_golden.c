/* Golden vectors: what the published PyTorch code computes, against the oracle and every CPU path.
 *     make test        or: build/tests/test_golden [directory of the .rkvg files] */
#include "golden_file.h"
#include "golden_names.h"
#include "harness.h"
#include "oracle.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static size_t product(int a, int b, int c)
{
    return (size_t)a * (size_t)b * (size_t)c;
}

static rkv_config golden_config(const golden *g)
{
    rkv_config config = rkv_config_default(g->budget);
    config.window = g->window;
    config.pool = g->pool;
    config.lambda = g->lambda;
    config.threshold = g->threshold;
    return config;
}

static shape golden_shape(const golden *g, int n_tokens)
{
    shape s;
    memset(&s, 0, sizeof s);
    s.kv_heads = g->kv_heads;
    s.group = g->group;
    s.head_dim = g->dim;
    s.n_tokens = n_tokens;
    s.dtype = g->dtype;
    return s;
}

static double largest(const float *x, size_t n)
{
    double top = 0;
    size_t i;
    for (i = 0; i < n; i++)
        if (fabs((double)x[i]) > top) top = fabs((double)x[i]);
    return top;
}

static int compare_ints(const void *a, const void *b)
{
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

static void expect_same_set(const char *at, const int32_t *got, const int32_t *want, int n)
{
    int32_t *a = (int32_t *)alloc_checked((size_t)n * sizeof *a);
    int32_t *b = (int32_t *)alloc_checked((size_t)n * sizeof *b);
    int i;
    memcpy(a, got, (size_t)n * sizeof *a);
    memcpy(b, want, (size_t)n * sizeof *b);
    qsort(a, (size_t)n, sizeof *a, compare_ints);
    qsort(b, (size_t)n, sizeof *b, compare_ints);
    for (i = 0; i < n && expect_int(at, i, a[i], b[i]); i++) continue;
    free(a);
    free(b);
}

/* marks[i]: how often the n listed rows name row i; the caller frees them. */
static unsigned char *marks(const int32_t *rows, int n, int n_rows)
{
    unsigned char *list = (unsigned char *)alloc_checked((size_t)n_rows);
    int i;
    memset(list, 0, (size_t)n_rows);
    for (i = 0; i < n; i++)
        if (expect_true("row in range", rows[i] >= 0 && rows[i] < n_rows)) list[rows[i]]++;
    return list;
}

/* ---- one implementation, oracle or backend, behind one function ---- */
typedef struct answer {
    double *score; /* [kv_heads][n - window] */
    int32_t *kept; /* [kv_heads][budget], rows */
} answer;

static answer answer_make(const golden *g, int n_tokens)
{
    answer a;
    a.score = (double *)alloc_checked(product(g->kv_heads, n_tokens, sizeof(double)));
    a.kept = (int32_t *)alloc_checked(product(g->kv_heads, g->budget, sizeof(int32_t)));
    return a;
}

static void answer_free(answer *a)
{
    free(a->score);
    free(a->kept);
}

static void ask_oracle(answer *a, const golden *g, const rkv_config *config, const job *j)
{
    int candidates = j->shape.n_tokens - g->window, h;
    oracle_head *heads = oracle_score_job(j, config);
    for (h = 0; h < g->kv_heads; h++) {
        double gap;
        memcpy(a->score + h * candidates, heads[h].score, (size_t)candidates * sizeof(double));
        oracle_select(config, heads[h].score, NULL, j->shape.n_tokens, a->kept + h * g->budget,
                      &gap);
    }
    oracle_free_job(heads, j);
}

static void ask_backend(answer *a, const golden *g, const rkv_config *config, job *j,
                        const rkv_backend *backend)
{
    size_t scored = product(g->kv_heads, j->shape.n_tokens - g->window, 1), i;
    rkv_status status = call_stage(rkv_compress, backend, config, j, 1);
    expect_status("rkv_compress", status, RKV_OK);
    for (i = 0; i < scored; i++) a->score[i] = (double)job_scores(j)[i];
    memcpy(a->kept, job_kept(j), j->kept.bytes);
    expect_true("guards", job_guards("guards", j));
    if (status == RKV_OK) job_compacted("compaction", j, job_kept(j), g->budget, g->budget);
}

/* Scores and kept rows of these keys and queries. backend NULL asks the oracle. */
static void ask(answer *a, const golden *g, const rkv_config *config, const rkv_backend *backend,
                const float *keys, const float *queries, int n_tokens)
{
    rng r = rng_seed(1);
    shape s = golden_shape(g, n_tokens);
    job j;
    job_make_from(&j, &r, config, &s, keys, queries);
    if (backend)
        ask_backend(a, g, config, &j, backend);
    else
        ask_oracle(a, g, config, &j);
    job_free(&j);
}

static const char *who(const rkv_backend *backend)
{
    return backend ? backend->name : "oracle";
}

/* ---- single-round files ---- */
/* got is `sign` times want[head * stride + j], for every candidate j. */
static void expect_scores(const char *at, const golden *g, const double *got, double sign,
                          const float *want, int stride, double tolerance)
{
    int candidates = g->n_tokens - g->window, h, j;
    double top = largest(want, product(g->kv_heads, stride, 1));
    for (h = 0; h < g->kv_heads; h++)
        for (j = 0; j < candidates; j++)
            if (!expect_near(at, j, got[h * candidates + j], sign * (double)want[h * stride + j],
                             tolerance * top))
                return;
}

/* The kept set of one head, as far as rounding cannot turn it: scores within 1e-5 of the head's
 * largest may swap two tokens that lie closer to each other than `swap`, and no others. */
static void expect_kept(const golden *g, int h, const int32_t *got)
{
    int candidates = g->n_tokens - g->window, j;
    const float *score = g->score + product(h, candidates, 1);
    const int32_t *kept = g->kept + product(h, g->budget, 1);
    double swap = fmin(1e-6, 2e-5 * largest(score, (size_t)candidates));
    double last_kept = INFINITY, first_dropped = -INFINITY;
    unsigned char *want = marks(kept, g->budget, g->n_tokens);
    unsigned char *have = marks(got, g->budget, g->n_tokens);
    for (j = 0; j < candidates; j++) {
        if (want[j]) last_kept = fmin(last_kept, (double)score[j]);
        if (!want[j]) first_dropped = fmax(first_dropped, (double)score[j]);
    }
    expect_near("gap of the file", h, last_kept - first_dropped, (double)g->gap[h], 1e-9);
    for (j = 0; j < g->n_tokens; j++) {
        int decided = j >= candidates || (want[j] ? (double)score[j] > first_dropped + swap
                                                  : (double)score[j] < last_kept - swap);
        if (decided && !expect_int("kept", h * g->n_tokens + j, have[j], want[j])) break;
    }
    free(want);
    free(have);
}

static void test_single(const char *name, const golden *g, const rkv_backend *backend)
{
    rkv_config config = golden_config(g);
    int candidates = g->n_tokens - g->window, h;
    const golden_round *d = &g->round[0];
    answer a = answer_make(g, g->n_tokens);
    case_begin("%s, %s", who(backend), name);
    ask(&a, g, &config, backend, d->keys, d->queries, g->n_tokens);
    expect_scores("score", g, a.score, 1, g->score, candidates, 1e-5);
    for (h = 0; h < g->kv_heads; h++) expect_kept(g, h, a.kept + h * g->budget);
    config.lambda = 1;
    ask(&a, g, &config, backend, d->keys, d->queries, g->n_tokens);
    expect_scores("importance", g, a.score, 1, g->importance, candidates,
                  strstr(name, "offset") ? 1e-4 : 1e-5);
    config.lambda = 0;
    ask(&a, g, &config, backend, d->keys, d->queries, g->n_tokens);
    expect_scores("redundancy", g, a.score, -1, g->redundancy, g->n_tokens, 1e-5);
    case_end();
    answer_free(&a);
}

/* ---- multi-round files ---- */
/* The cache before round r: true positions [kv_heads][rows], earlier survivors (from `kept`, in
 * its order) and then the appended tokens. */
static int32_t *cache_positions(const golden *g, int r, const int32_t *kept)
{
    int rows = golden_round_rows(g, r), old = rows - g->round[r].appended, first = 0, h, i;
    int32_t *list = (int32_t *)alloc_checked(product(g->kv_heads, rows, sizeof *list));
    for (i = 0; i < r; i++) first += g->round[i].appended;
    for (h = 0; h < g->kv_heads; h++)
        for (i = 0; i < rows; i++)
            list[h * rows + i] = i < old ? kept[h * g->budget + i] : first + i - old;
    return list;
}

static const float *key_at(const golden *g, int head, int position)
{
    int r = 0;
    while (position >= g->round[r].appended) position -= g->round[r++].appended;
    return g->round[r].keys + product(head * g->round[r].appended + position, g->dim, 1);
}

static float *keys_at(const golden *g, const int32_t *positions, int rows)
{
    float *keys = (float *)alloc_checked(product(g->kv_heads, rows, g->dim) * sizeof *keys);
    int h, i;
    for (h = 0; h < g->kv_heads; h++)
        for (i = 0; i < rows; i++)
            memcpy(keys + product(h * rows + i, g->dim, 1), key_at(g, h, positions[h * rows + i]),
                   (size_t)g->dim * sizeof *keys);
    return keys;
}

static void map_to_positions(const golden *g, int32_t *kept, const int32_t *positions, int rows)
{
    int h, i;
    for (h = 0; h < g->kv_heads; h++)
        for (i = 0; i < g->budget; i++)
            kept[h * g->budget + i] = positions[h * rows + kept[h * g->budget + i]];
}

/* One round from the cache whose rows are `before` (round 0: NULL); answers in a. */
static void ask_round(answer *a, const golden *g, const rkv_config *config,
                      const rkv_backend *backend, int r, const int32_t *before)
{
    int rows = golden_round_rows(g, r);
    int32_t *positions = cache_positions(g, r, before);
    float *keys = keys_at(g, positions, rows);
    ask(a, g, config, backend, keys, g->round[r].queries, rows);
    map_to_positions(g, a->kept, positions, rows);
    free(keys);
    free(positions);
}

static void expect_round(const golden *g, int r, const answer *a, const float *score,
                         const int32_t *kept)
{
    size_t scored = product(g->kv_heads, golden_round_rows(g, r) - g->window, 1), i;
    double top = largest(score, scored);
    char at[32];
    int h;
    snprintf(at, sizeof at, "round %d score", r);
    for (i = 0; i < scored; i++)
        if (!expect_near(at, (int)i, a->score[i], (double)score[i], 1e-5 * top)) break;
    snprintf(at, sizeof at, "round %d kept", r);
    for (h = 0; h < g->kv_heads; h++)
        expect_same_set(at, a->kept + h * g->budget, kept + h * g->budget, g->budget);
}

/* Published order: each round is fed from the file, as its README asks. */
static void test_published(const char *name, const golden *g, const rkv_backend *backend)
{
    rkv_config config = golden_config(g);
    int r;
    case_begin("%s, %s, published", who(backend), name);
    for (r = 0; r < g->rounds; r++) {
        const int32_t *before = r ? g->round[r - 1].kept_published : NULL;
        answer a = answer_make(g, golden_round_rows(g, r));
        ask_round(&a, g, &config, backend, r, before);
        expect_round(g, r, &a, g->round[r].score_published, g->round[r].kept_published);
        answer_free(&a);
    }
    case_end();
}

/* Positional order: each round starts from what this implementation kept in the one before. */
static void test_positional(const char *name, const golden *g, const rkv_backend *backend)
{
    rkv_config config = golden_config(g);
    int32_t *before = NULL;
    int r;
    case_begin("%s, %s, positional", who(backend), name);
    for (r = 0; r < g->rounds; r++) {
        answer a = answer_make(g, golden_round_rows(g, r));
        ask_round(&a, g, &config, backend, r, before);
        expect_round(g, r, &a, g->round[r].score_positional, g->round[r].kept_positional);
        free(before);
        before = a.kept;
        free(a.score);
    }
    free(before);
    case_end();
}

int main(int argc, char **argv)
{
    const char *directory = argc > 1 ? argv[1] : "tests/golden";
    const rkv_backend *backends[MAX_BACKENDS + 1];
    int n_backends = usable_backends(backends), b;
    size_t i;
    backends[n_backends++] = NULL; /* the oracle is on trial too */
    for (i = 0; i < N_GOLDEN; i++) {
        golden g;
        case_begin("%s/%s.rkvg", directory, golden_names[i]);
        if (!expect_true("readable golden file", golden_read(&g, directory, golden_names[i]))) {
            golden_free(&g);
            continue;
        }
        if (g.n_tokens > 700 && wanted_cases(1000) < 100) { /* emulators: minutes */
            skip("%s: where RKV_TEST_CASES asks for few cases", golden_names[i]);
            golden_free(&g);
            continue;
        }
        for (b = 0; b < n_backends; b++) {
            if (g.rounds == 1) {
                test_single(golden_names[i], &g, backends[b]);
            } else {
                test_published(golden_names[i], &g, backends[b]);
                test_positional(golden_names[i], &g, backends[b]);
            }
        }
        golden_free(&g);
    }
    return close_tests();
}
