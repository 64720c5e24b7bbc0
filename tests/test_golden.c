/* Golden vectors: what the published PyTorch code computes, against the oracle and every CPU path.
 *     make test        or: build/tests/test_golden [directory of the .rkvg files] */
#include "golden_names.h"
#include "harness.h"
#include "oracle.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* One file: see tests/golden/README.md. Little endian on disk, numbers of this machine here. */
typedef struct round_data {
    int appended;
    float *queries, *keys;                     /* decoded */
    int32_t *kept_published, *kept_positional; /* true positions */
    float *score_published, *score_positional;
} round_data;

enum { MAX_ROUNDS = 8 };
typedef struct golden {
    unsigned char *bytes;
    size_t size, at;
    int kv_heads, group, dim, n_tokens, budget, window, pool, rounds;
    rkv_dtype dtype;
    float lambda, threshold;
    round_data round[MAX_ROUNDS];                 /* a single-round file uses round[0] */
    float *importance, *redundancy, *score, *gap; /* single-round files only */
    int32_t *kept;
} golden;

static uint32_t take_u32(golden *g)
{
    uint32_t x = 0;
    int i;
    for (i = 0; i < 4; i++)
        if (g->at < g->size) x |= (uint32_t)g->bytes[g->at++] << (8 * i);
    return x;
}

static float take_f32(golden *g)
{
    uint32_t bits = take_u32(g);
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static float *take_floats(golden *g, size_t n)
{
    float *list = (float *)alloc_checked(n * sizeof *list);
    size_t i;
    for (i = 0; i < n; i++) list[i] = take_f32(g);
    return list;
}

static int32_t *take_ints(golden *g, size_t n)
{
    int32_t *list = (int32_t *)alloc_checked(n * sizeof *list);
    size_t i;
    for (i = 0; i < n; i++) list[i] = (int32_t)take_u32(g);
    return list;
}

static float *take_numbers(golden *g, size_t n) /* of the file's dtype */
{
    float *list;
    size_t i;
    if (g->dtype == RKV_F32) return take_floats(g, n);
    list = (float *)alloc_checked(n * sizeof *list);
    for (i = 0; i < n && g->at + 2 <= g->size; i++, g->at += 2) {
        uint16_t bits = (uint16_t)(g->bytes[g->at] | g->bytes[g->at + 1] << 8);
        list[i] = g->dtype == RKV_F16 ? f16_to_float(bits) : bf16_to_float(bits);
    }
    return list;
}

static int read_file(golden *g, const char *directory, const char *name)
{
    char path[512];
    FILE *file;
    long size;
    memset(g, 0, sizeof *g);
    snprintf(path, sizeof path, "%s/%s.rkvg", directory, name);
    file = fopen(path, "rb");
    if (!file) return 0;
    fseek(file, 0, SEEK_END);
    size = ftell(file);
    rewind(file);
    g->size = size > 0 ? (size_t)size : 0;
    g->bytes = (unsigned char *)alloc_checked(g->size);
    size = (long)fread(g->bytes, 1, g->size, file);
    fclose(file);
    return g->size > 56 && (size_t)size == g->size;
}

static void take_header(golden *g)
{
    g->at = 8;
    take_u32(g); /* version */
    g->kv_heads = (int)take_u32(g);
    g->group = (int)take_u32(g);
    g->dim = (int)take_u32(g);
    g->n_tokens = (int)take_u32(g);
    g->budget = (int)take_u32(g);
    g->window = (int)take_u32(g);
    g->pool = (int)take_u32(g);
    g->dtype = (rkv_dtype)take_u32(g);
    g->rounds = (int)take_u32(g);
    g->lambda = take_f32(g);
    g->threshold = take_f32(g);
}

static size_t product(int a, int b, int c)
{
    return (size_t)a * (size_t)b * (size_t)c;
}

static void take_single(golden *g)
{
    int candidates = g->n_tokens - g->window;
    g->round[0].appended = g->n_tokens;
    g->round[0].queries = take_numbers(g, product(g->kv_heads * g->group, g->window, g->dim));
    g->round[0].keys = take_numbers(g, product(g->kv_heads, g->n_tokens, g->dim));
    g->importance = take_floats(g, product(g->kv_heads, candidates, 1));
    g->redundancy = take_floats(g, product(g->kv_heads, g->n_tokens, 1));
    g->score = take_floats(g, product(g->kv_heads, candidates, 1));
    g->kept = take_ints(g, product(g->kv_heads, g->budget, 1));
    g->gap = take_floats(g, product(g->kv_heads, 1, 1));
}

static int round_rows(const golden *g, int r)
{
    return r == 0 ? g->n_tokens : g->budget + g->round[r].appended;
}

static void take_rounds(golden *g)
{
    int r;
    for (r = 0; r < g->rounds && r < MAX_ROUNDS; r++) {
        round_data *d = &g->round[r];
        int candidates;
        d->appended = (int)take_u32(g);
        candidates = round_rows(g, r) - g->window;
        d->queries = take_numbers(g, product(g->kv_heads * g->group, g->window, g->dim));
        d->keys = take_numbers(g, product(g->kv_heads, d->appended, g->dim));
        d->kept_published = take_ints(g, product(g->kv_heads, g->budget, 1));
        d->kept_positional = take_ints(g, product(g->kv_heads, g->budget, 1));
        d->score_published = take_floats(g, product(g->kv_heads, candidates, 1));
        d->score_positional = take_floats(g, product(g->kv_heads, candidates, 1));
        free(take_floats(g, product(g->kv_heads, 2, 1))); /* gaps: all large enough */
    }
}

static int golden_read(golden *g, const char *directory, const char *name)
{
    int single;
    if (!read_file(g, directory, name)) return 0;
    single = memcmp(g->bytes, "RKVGOLD1", 8) == 0;
    if (!single && memcmp(g->bytes, "RKVGOLDM", 8) != 0) return 0;
    take_header(g);
    if (single)
        take_single(g);
    else
        take_rounds(g);
    return g->at == g->size; /* all of it, and no more */
}

static void golden_free(golden *g)
{
    int r;
    for (r = 0; r < MAX_ROUNDS; r++) {
        free(g->round[r].queries);
        free(g->round[r].keys);
        free(g->round[r].kept_published);
        free(g->round[r].kept_positional);
        free(g->round[r].score_published);
        free(g->round[r].score_positional);
    }
    free(g->importance);
    free(g->redundancy);
    free(g->score);
    free(g->gap);
    free(g->kept);
    free(g->bytes);
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
        oracle_select(config, heads[h].score, j->shape.n_tokens, a->kept + h * g->budget, &gap);
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

static void test_single(const char *name, const golden *g, const rkv_backend *backend)
{
    rkv_config config = golden_config(g);
    int candidates = g->n_tokens - g->window, h;
    const round_data *d = &g->round[0];
    answer a = answer_make(g, g->n_tokens);
    case_begin("%s, %s", who(backend), name);
    ask(&a, g, &config, backend, d->keys, d->queries, g->n_tokens);
    expect_scores("score", g, a.score, 1, g->score, candidates, 1e-5);
    for (h = 0; h < g->kv_heads; h++)
        if ((double)g->gap[h] > 1e-6)
            expect_same_set("kept", a.kept + h * g->budget, g->kept + h * g->budget, g->budget);
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
    int rows = round_rows(g, r), old = rows - g->round[r].appended, first = 0, h, i;
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
    int rows = round_rows(g, r);
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
    size_t scored = product(g->kv_heads, round_rows(g, r) - g->window, 1), i;
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
    config.order = RKV_BY_SCORE;
    case_begin("%s, %s, published", who(backend), name);
    for (r = 0; r < g->rounds; r++) {
        const int32_t *before = r ? g->round[r - 1].kept_published : NULL;
        answer a = answer_make(g, round_rows(g, r));
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
        answer a = answer_make(g, round_rows(g, r));
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
