/* Refusals on every path: the right status, a record that names the field, and not one byte of the
 * caller's changed. test_refusals.c walks the texts one by one.
 *     make test        or: build/tests/test_errors */
#include "harness.h"

#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* keys, values, kept, positions, scores, shared_scores, pins, queries */
enum { BUFFERS = 8, BUFFER_QUERIES = 7 };

enum { N_LAYERS = 2, HEADS = 2, GROUP = 2, DIM = 16, WINDOW = 8, TOKENS = 40, BUDGET = 24 };

static const rkv_backend *backends[MAX_BACKENDS];
static int n_backends;

/* Two layers that are in order; each test spoils the last one. */
typedef struct scene {
    rkv_config config;
    rkv_error error;
    job jobs[N_LAYERS];
    block workspace;
} scene;

/* pins: so many rows in a hundred. */
static scene scene_make_pinned(rkv_scope scope, rkv_dtype dtype, int pins)
{
    rng r = rng_seed(40);
    rkv_layer layers[N_LAYERS];
    size_t bytes = 0;
    shape s;
    scene sc;
    int i;
    memset(&sc, 0, sizeof sc);
    memset(&s, 0, sizeof s);
    s.kv_heads = HEADS;
    s.group = GROUP;
    s.head_dim = DIM;
    s.n_tokens = TOKENS;
    s.capacity = TOKENS + 4;
    s.dtype = dtype;
    s.pins = pins;
    sc.config = rkv_config_default(BUDGET);
    sc.config.window = WINDOW;
    sc.config.scope = scope;
    for (i = 0; i < N_LAYERS; i++) {
        s.follower = scope == RKV_PER_SEQUENCE && i > 0;
        job_make(&sc.jobs[i], &r, &sc.config, &s);
        layers[i] = sc.jobs[i].layer;
    }
    rkv_workspace_size(NULL, &sc.config, layers, N_LAYERS, &bytes);
    block_make(&sc.workspace, bytes + 4096, 0, 1);
    return sc;
}

static scene scene_make(rkv_scope scope, rkv_dtype dtype)
{
    return scene_make_pinned(scope, dtype, 0);
}

static void scene_free(scene *sc)
{
    int i;
    for (i = 0; i < N_LAYERS; i++) job_free(&sc->jobs[i]);
    block_free(&sc->workspace);
}

static void expect_scene_unchanged(const char *at, scene *sc)
{
    int i;
    for (i = 0; i < N_LAYERS; i++) job_unchanged(at, &sc->jobs[i]);
    block_guards("guards of the workspace", &sc->workspace);
}

/* The call gives `want`, with a record and without one, and changes nothing but the workspace and
 * the record, which says what is wrong. */
static void refuse(const char *at, stage_function call, const rkv_backend *backend, scene *sc,
                   rkv_status want)
{
    rkv_config config;
    int i, with;
    for (with = 0; with < 2; with++) {
        memset(&sc->error, 0x55, sizeof sc->error);
        sc->config.error = with ? &sc->error : NULL;
        for (i = 0; i < N_LAYERS; i++) sc->jobs[i].remembered = sc->jobs[i].layer;
        memcpy(&config, &sc->config, sizeof config);
        expect_status(at,
                      call_with(call, backend, &sc->config, sc->jobs, N_LAYERS, sc->workspace.data,
                                sc->workspace.bytes),
                      want);
        expect_same_config("config", &sc->config, &config);
        expect_scene_unchanged(at, sc);
    }
    expect_int("error.status", 0, sc->error.status, want);
    expect_true("error.rule", sc->error.rule && strstr(sc->error.rule, ": "));
}

static void expect_place(const scene *sc, int layer, int head, int token)
{
    expect_int("error.layer", 0, sc->error.layer, layer);
    expect_int("error.head", 0, sc->error.head, head);
    expect_int("error.token", 0, sc->error.token, token);
}

static void expect_rule(const scene *sc, const char *word)
{
    if (!expect_true(word, sc->error.rule && strstr(sc->error.rule, word)))
        case_fail("the rule is: %s", sc->error.rule ? sc->error.rule : "none");
}

/* As refuse, for rkv_compress, whose rule must hold `word`, and, where the data does not matter,
 * for rkv_workspace_size, which must give the same rule. */
static void refuse_argument(const rkv_backend *backend, scene *sc, const char *word, int at,
                            int sized)
{
    rkv_layer layers[N_LAYERS];
    const char *rule;
    size_t bytes = 77;
    int i;
    refuse("rkv_compress", rkv_compress, backend, sc, RKV_ERROR_ARGUMENT);
    expect_place(sc, at, -1, -1);
    expect_rule(sc, word);
    if (!sized) return;
    rule = sc->error.rule;
    memset(&sc->error, 0x55, sizeof sc->error);
    for (i = 0; i < N_LAYERS; i++) layers[i] = sc->jobs[i].layer;
    expect_status("rkv_workspace_size",
                  rkv_workspace_size(backend, &sc->config, layers, N_LAYERS, &bytes),
                  RKV_ERROR_ARGUMENT);
    expect_int("bytes", 0, (int64_t)bytes, 77);
    expect_true("the same rule", sc->error.rule == rule);
    expect_place(sc, at, -1, -1);
}

/* The description alone: a call that it passes asks for a workspace next. */
static int is_refused(const rkv_config *config, rkv_layer *layers, int n_layers, rkv_error *error)
{
    rkv_config recorded = *config;
    rkv_status status;
    memset(error, 0x55, sizeof *error);
    recorded.error = error;
    status = rkv_compress(NULL, &recorded, layers, n_layers, NULL, 0);
    expect_true("an argument or the workspace",
                status == RKV_ERROR_ARGUMENT || status == RKV_ERROR_WORKSPACE);
    expect_int("error.status", 0, error->status, status);
    return status == RKV_ERROR_ARGUMENT;
}

/* clang-format off: one line per fault */

/* ---- arguments ---- */
/* Spoils one field; returns its name, then a word on how, or NULL behind the last. The name must
 * come up in the rule. */
static const char *spoil_config(int which, rkv_config *c)
{
    switch (which) {
    case 0: c->budget = 0; return "budget 0";
    case 1: c->budget = -5; return "budget negative";
    case 2: c->budget = WINDOW - 1; return "budget below the window";
    case 3: c->pinned = BUDGET - WINDOW + 1; return "budget below window + pinned";
    case 4: c->window = -1; return "window negative";
    case 5: c->pool = -1; return "pool negative";
    case 6: c->recent = -1; return "recent negative";
    case 7: c->pinned = -1; return "pinned negative";
    case 8: c->lambda = -0.01f; return "lambda below 0";
    case 9: c->lambda = 1.01f; return "lambda above 1";
    case 10: c->lambda = NAN; return "lambda NaN";
    case 11: c->threshold = -1.01f; return "threshold below -1";
    case 12: c->threshold = 1.01f; return "threshold above 1";
    case 13: c->threshold = NAN; return "threshold NaN";
    case 14: c->scope = (rkv_scope)3; return "scope unknown";
    case 15: c->scope = (rkv_scope)-1; return "scope unknown: -1";
    case 16: c->variant = (rkv_variant)2; return "variant unknown";
    case 17: c->variant = (rkv_variant)-1; return "variant unknown: -1";
    case 18: c->protect = -1; return "protect negative";
    case 19: c->protect = BUDGET + 1; return "budget below protect";
    case 20:
        c->protect = BUDGET - 1;
        c->pinned = 2;
        return "budget below protect + pinned";
    case 21: c->n_threads = -1; return "n_threads negative";
    case 22: c->pinned = INT_MAX; return "pinned huge: no overflow with the window";
    case 23:
        c->pinned = 1;
        c->protect = INT_MAX;
        return "protect huge: no overflow with pinned";
    case 24: c->window = INT_MAX; return "window huge";
    default: return NULL;
    }
}

static const char *spoil_views(int which, rkv_layer *l)
{
    switch (which) {
    case 0: l->n_tokens = -1; return "n_tokens negative";
    case 1: l->n_tokens = TOKENS + 5; return "tokens: fewer rows than n_tokens";
    case 2: l->keys.data = NULL; return "keys without data";
    case 3: l->keys.heads = 0; return "keys of no head";
    case 4: l->keys.dim = 0; return "keys of no dim";
    case 5: l->keys.dim = -DIM; return "keys of negative dim";
    case 6: l->keys.dtype = (rkv_dtype)7; return "keys of unknown dtype";
    case 7: l->keys.dim_stride = 2; return "keys with a dim_stride";
    case 8: l->keys.token_stride = -DIM; return "keys with a negative stride";
    case 9: l->queries.data = NULL; return "queries without data";
    case 10: l->queries.tokens = WINDOW - 1; return "queries: a partial window";
    case 11: l->queries.heads = HEADS * GROUP - 1; return "queries: heads no multiple";
    case 12: l->queries.heads = 0; return "queries of no head";
    case 13: l->queries.dim = DIM - 1; return "queries of another dim";
    case 14: l->queries.dim_stride = 3; return "queries with a dim_stride";
    case 15: l->queries.dtype = (rkv_dtype)-1; return "queries of unknown dtype";
    case 16: l->values.heads = HEADS + 1; return "values of other heads";
    case 17: l->values.dim = 0; return "values of no dim";
    case 18: l->values.tokens = TOKENS - 1; return "values: fewer rows than n_tokens";
    case 19: l->values.element_bytes = -1; return "values: negative element_bytes";
    case 20: l->row_stride = TOKENS - 1; return "row_stride below n_tokens";
    case 21: l->scale = NAN; return "scale NaN";
    case 22: l->scale = INFINITY; return "scale infinite";
    case 23: l->softcap = -1; return "softcap negative";
    case 24: l->softcap = NAN; return "softcap NaN";
    case 25: l->keys.head_stride = 1; return "keys: heads that overlap";
    case 26: l->keys.token_stride = DIM - 1; return "keys: tokens that overlap";
    case 27: l->values.head_stride = DIM; return "values: heads that overlap";
    case 28: l->scale = 100.5f; return "scale above 100";
    case 29: l->softcap = 1.1e6f; return "softcap above 1e6";
    case 30: l->scale = -0.1f; return "scale negative";
    case 31: l->row_stride = -1; return "row_stride negative";
    case 32: l->values.dim_stride = 2; return "values: rows that overlap, by dim_stride";
    case 33: l->keys.element_bytes = 2; return "keys of another element size";
    case 34: l->queries.element_bytes = 8; return "queries of another element size";
    default: return NULL;
    }
}

static const char *spoil_sizes(int which, rkv_layer *l)
{
    switch (which) {
    case 0: l->keys.token_stride = INT64_MAX / 4; return "keys beyond the address space";
    case 1: l->keys.head_stride = INT64_MAX - 3; return "keys beyond the address space: heads";
    case 2: l->values.dim_stride = INT64_MAX / 8; return "values beyond the address space";
    case 3:
        l->values.element_bytes = INT_MAX;
        l->values.token_stride = INT64_MAX / INT_MAX;
        return "values beyond the address space: element_bytes";
    case 4: l->queries.head_stride = INT64_MAX / 3; return "queries beyond the address space";
    case 5:
        l->keys.heads = INT_MAX;
        l->keys.dim = INT_MAX;
        l->keys.tokens = INT_MAX;
        return "keys: a product that overflows";
    default: return NULL;
    }
}

static const char *spoil_overlaps(int which, rkv_layer *l, rkv_layer *other)
{
    switch (which) {
    case 0: l->values.data = l->keys.data; return "overlap: values on keys";
    case 1: l->keys.data = other->keys.data; return "overlap: keys of two layers";
    case 2: l->values.data = other->values.data; return "overlap: values of two layers";
    case 3: l->values.data = (char *)l->keys.data + 4; return "overlap: values on keys, shifted";
    case 4: l->kept = (int32_t *)l->keys.data; return "overlap: kept on keys";
    case 5: l->positions = (int32_t *)l->values.data; return "overlap: positions on values";
    case 6: l->scores = (float *)l->queries.data; return "overlap: scores on queries";
    case 7: l->kept = other->kept; return "overlap: kept of two layers";
    case 8: l->positions = other->positions; return "overlap: positions of two layers";
    case 9: l->pins = (uint8_t *)l->keys.data; return "overlap: pins on keys";
    case 10: l->pins = (uint8_t *)l->positions; return "overlap: pins on positions";
    case 11: l->pins = other->pins; return "overlap: pins of two layers";
    default: return NULL;
    }
}

/* clang-format on */

static void copy_word(char word[32], const char *text)
{
    size_t n = strcspn(text, " :");
    memcpy(word, text, n < 31 ? n : 31);
    word[n < 31 ? n : 31] = 0;
}

enum { SPOIL_CONFIG, SPOIL_VIEWS, SPOIL_SIZES, SPOIL_OVERLAPS, SPOIL_KINDS };

static void test_arguments(const rkv_backend *backend, int kind)
{
    int which;
    for (which = 0;; which++) {
        scene sc = scene_make_pinned(RKV_PER_HEAD, RKV_F32, 10);
        rkv_layer *l = &sc.jobs[1].layer;
        const char *what = kind == SPOIL_CONFIG  ? spoil_config(which, &sc.config)
                           : kind == SPOIL_VIEWS ? spoil_views(which, l)
                           : kind == SPOIL_SIZES ? spoil_sizes(which, l)
                                                 : spoil_overlaps(which, l, &sc.jobs[0].layer);
        char word[32];
        if (what) {
            int needs_data = kind == SPOIL_OVERLAPS || strstr(what, "without data") != NULL;
            case_begin("%s refuses %s", backend->name, what);
            copy_word(word, what);
            refuse_argument(backend, &sc, word, kind == SPOIL_CONFIG ? -1 : 1, !needs_data);
        }
        scene_free(&sc);
        if (!what) break;
    }
}

/* Block tables: of the keys of the last layer, contiguous pages of 4 tokens. */
/* clang-format off */
static const char *spoil_table(int which, rkv_tensor *t, int32_t *table)
{
    switch (which) {
    case 0: t->block_tokens = 0; return "keys: block_tokens 0";
    case 1: t->block_tokens = -4; return "keys: block_tokens negative";
    case 2: t->block_stride = 2 * DIM; return "keys: blocks that overlap";
    case 3: t->block_stride = INT64_MAX / 2; return "keys beyond the address space: blocks";
    case 4: table[3] = table[7]; return "an entry twice"; /* rkv_workspace_size does not look */
    case 5: table[0] = -1; return "a negative entry";
    case 6: table[9] = table[0]; return "the last entry in use is the first";
    default: return NULL;
    }
}
/* clang-format on */

/* The entry that the record of each of these names. */
static const int spoiled_block[] = { -1, -1, -1, -1, 7, 0, 9 };

static void test_tables(const rkv_backend *backend)
{
    int which, i;
    for (which = -1;; which++) {
        int32_t table[(TOKENS + 4) / 4];
        scene sc = scene_make(RKV_PER_HEAD, RKV_F32);
        rkv_tensor *t = &sc.jobs[1].layer.keys;
        const char *what;
        char word[32];
        memset(sc.jobs[1].keys.memory.data, 0, sc.jobs[1].keys.memory.bytes); /* all finite */
        block_remember(&sc.jobs[1].keys.memory);
        for (i = 0; i < (TOKENS + 4) / 4; i++) table[i] = i;
        t->block_table = table;
        t->block_tokens = 4;
        what = which < 0 ? NULL : spoil_table(which, t, table);
        case_begin("%s, %s", backend->name, what ? what : "block table in order");
        if (what && strncmp(what, "keys", 4) == 0) {
            copy_word(word, what);
            refuse_argument(backend, &sc, word, 1, 1);
        } else if (what) {
            refuse("rkv_compress", rkv_compress, backend, &sc, RKV_ERROR_ARGUMENT);
            expect_place(&sc, 1, -1, 4 * spoiled_block[which]);
            refuse("rkv_score", rkv_score, backend, &sc, RKV_ERROR_ARGUMENT);
            expect_place(&sc, 1, -1, 4 * spoiled_block[which]);
            expect_rule(&sc, "keys.block_table");
        } else if (which < 0) {
            expect_status("in order",
                          call_with(rkv_compress, backend, &sc.config, sc.jobs, N_LAYERS,
                                    sc.workspace.data, sc.workspace.bytes),
                          RKV_OK);
        }
        scene_free(&sc);
        if (!what && which >= 0) break;
    }
}

/* Row numbers and sums of cosines stay clear of the ends of their integers. */
static void test_longest(const rkv_backend *backend)
{
    scene sc = scene_make(RKV_PER_HEAD, RKV_F32);
    rkv_layer layer = sc.jobs[0].layer;
    size_t bytes = 0;
    case_begin("%s: the most rows", backend->name);
    layer.values.data = NULL;
    layer.values.dim = 0;
    layer.keys.head_stride = DIM;
    layer.keys.token_stride = HEADS * DIM;
    layer.keys.tokens = layer.n_tokens = INT32_MAX / 2;
    /* On a 32-bit machine that is more than there are addresses. */
    expect_status("2^30 - 1", rkv_workspace_size(backend, &sc.config, &layer, 1, &bytes),
                  sizeof(size_t) < 8 ? RKV_ERROR_ARGUMENT : RKV_OK);
    layer.keys.tokens = layer.n_tokens = INT32_MAX / 2 + 1;
    expect_status("2^30", rkv_workspace_size(backend, &sc.config, &layer, 1, &bytes),
                  RKV_ERROR_ARGUMENT);
    scene_free(&sc);
}

/* Queries are only read, but a wild block number would be read too. */
static void test_query_blocks(const rkv_backend *backend)
{
    int bad;
    for (bad = 0; bad < 2; bad++) {
        int32_t table[WINDOW];
        scene sc = scene_make(RKV_PER_HEAD, RKV_F32);
        rkv_tensor *t = &sc.jobs[1].layer.queries;
        int i;
        for (i = 0; i < WINDOW; i++) table[i] = i;
        table[WINDOW - 1] = bad ? -1 : 0;
        t->block_table = table;
        t->block_tokens = 1;
        case_begin("%s, query block table: %s", backend->name, bad ? "negative" : "twice");
        refuse("rkv_compress", rkv_compress, backend, &sc, RKV_ERROR_ARGUMENT);
        refuse("rkv_score", rkv_score, backend, &sc, RKV_ERROR_ARGUMENT);
        expect_place(&sc, 1, -1, WINDOW - 1);
        expect_rule(&sc, "queries.block_table");
        scene_free(&sc);
    }
}

/* Values have a table of their own; without data they are not looked at. */
static void test_value_blocks(const rkv_backend *backend)
{
    int bad;
    for (bad = 0; bad < 3; bad++) {
        int32_t table[TOKENS + 4];
        scene sc = scene_make(RKV_PER_HEAD, RKV_F32);
        rkv_tensor *t = &sc.jobs[1].layer.values;
        int i;
        for (i = 0; i < TOKENS + 4; i++) table[i] = i;
        table[TOKENS - 1] = bad == 1 ? 5 : -1;
        t->block_table = table;
        t->block_tokens = 1;
        if (bad == 2) t->data = NULL;
        case_begin("%s, value block table: %s", backend->name,
                   bad == 0   ? "negative"
                   : bad == 1 ? "twice"
                              : "of no data");
        if (bad < 2) {
            refuse("rkv_compress", rkv_compress, backend, &sc, RKV_ERROR_ARGUMENT);
            expect_place(&sc, 1, -1, TOKENS - 1);
            expect_rule(&sc, "values.block_table");
        } else {
            expect_status("rkv_compress",
                          call_stage(rkv_compress, backend, &sc.config, sc.jobs, N_LAYERS), RKV_OK);
        }
        scene_free(&sc);
    }
}

static void test_null_arguments(const rkv_backend *backend)
{
    static const stage_function calls[] = { rkv_compress, rkv_score, rkv_select, rkv_compact };
    scene sc = scene_make(RKV_PER_HEAD, RKV_F32);
    size_t bytes = 77;
    int i;
    case_begin("%s: null pointers and counts", backend->name);
    sc.config.error = &sc.error;
    for (i = 0; i < 4; i++) {
        memset(&sc.error, 0x55, sizeof sc.error);
        expect_status(
            "config",
            calls[i](backend, NULL, &sc.jobs[0].layer, 1, sc.workspace.data, sc.workspace.bytes),
            RKV_ERROR_NULL);
        expect_status("layers",
                      calls[i](backend, &sc.config, NULL, 1, sc.workspace.data, sc.workspace.bytes),
                      RKV_ERROR_ARGUMENT);
        expect_rule(&sc, "layers: is NULL");
        expect_place(&sc, -1, -1, -1);
        expect_status("n_layers",
                      calls[i](backend, &sc.config, &sc.jobs[0].layer, -1, sc.workspace.data,
                               sc.workspace.bytes),
                      RKV_ERROR_ARGUMENT);
        expect_rule(&sc, "n_layers: must not be negative");
        expect_place(&sc, -1, -1, -1);
    }
    expect_status("config", rkv_workspace_size(backend, NULL, &sc.jobs[0].layer, 1, &bytes),
                  RKV_ERROR_NULL);
    expect_status("bytes", rkv_workspace_size(backend, &sc.config, &sc.jobs[0].layer, 1, NULL),
                  RKV_ERROR_NULL);
    expect_status("layers", rkv_workspace_size(backend, &sc.config, NULL, 1, &bytes),
                  RKV_ERROR_ARGUMENT);
    expect_status("n_layers", rkv_workspace_size(backend, &sc.config, NULL, -1, &bytes),
                  RKV_ERROR_ARGUMENT);
    sc.config.budget = 0;
    expect_status("workspace_size checks",
                  rkv_workspace_size(backend, &sc.config, &sc.jobs[0].layer, 1, &bytes),
                  RKV_ERROR_ARGUMENT);
    expect_rule(&sc, "config.budget");
    expect_int("bytes", 0, (int64_t)bytes, 77);
    expect_scene_unchanged("all buffers", &sc);
    scene_free(&sc);
}

/* What a single stage needs that rkv_compress does not. */
static void test_stage_outputs(const rkv_backend *backend)
{
    scene alone = scene_make(RKV_PER_HEAD, RKV_F32), shared = scene_make(RKV_PER_LAYER, RKV_F32);
    case_begin("%s: buffers that a stage requires", backend->name);
    alone.jobs[1].layer.scores = NULL;
    refuse("rkv_score without scores", rkv_score, backend, &alone, RKV_ERROR_ARGUMENT);
    expect_rule(&alone, "layer.scores: is NULL");
    refuse("rkv_select without scores", rkv_select, backend, &alone, RKV_ERROR_ARGUMENT);
    expect_rule(&alone, "layer.scores: is NULL");
    shared.jobs[1].layer.shared_scores = NULL;
    refuse("rkv_score without shared_scores", rkv_score, backend, &shared, RKV_ERROR_ARGUMENT);
    expect_rule(&shared, "layer.shared_scores: is NULL");
    refuse("rkv_select without shared_scores", rkv_select, backend, &shared, RKV_ERROR_ARGUMENT);
    expect_rule(&shared, "layer.shared_scores: is NULL");
    shared.jobs[1].layer = shared.jobs[1].remembered;
    shared.jobs[1].layer.shared_scores = (float *)(void *)shared.jobs[1].shared.data;
    shared.jobs[1].layer.kept = NULL;
    refuse("rkv_select without kept", rkv_select, backend, &shared, RKV_ERROR_ARGUMENT);
    expect_rule(&shared, "layer.kept: is NULL");
    shared.jobs[0].layer.n_kept = shared.jobs[1].layer.n_kept = BUDGET;
    refuse("rkv_compact without kept", rkv_compact, backend, &shared, RKV_ERROR_ARGUMENT);
    expect_rule(&shared, "layer.kept: is NULL");
    scene_free(&alone);
    scene_free(&shared);
}

/* Scores that come from elsewhere may be anything but NaN. */
static void test_given_scores(const rkv_backend *backend)
{
    scene sc = scene_make(RKV_PER_HEAD, RKV_F32);
    float *scores = sc.jobs[1].layer.scores + (TOKENS - WINDOW);
    int i, l;
    case_begin("%s: rkv_select of NaN and of infinities", backend->name);
    for (l = 0; l < N_LAYERS; l++)
        for (i = 0; i < HEADS * (TOKENS - WINDOW); i++) sc.jobs[l].layer.scores[i] = 0;
    scores[TOKENS - WINDOW - 1] = NAN;
    block_remember(&sc.jobs[0].scores);
    block_remember(&sc.jobs[1].scores);
    refuse("rkv_select", rkv_select, backend, &sc, RKV_ERROR_NONFINITE);
    expect_rule(&sc, "layer.scores");
    expect_place(&sc, 1, 1, TOKENS - WINDOW - 1);
    scores[TOKENS - WINDOW - 1] = -INFINITY;
    scores[2] = INFINITY;
    expect_status("infinities", call_stage(rkv_select, backend, &sc.config, sc.jobs, N_LAYERS),
                  RKV_OK);
    expect_int("the best row is kept", 0, sc.jobs[1].layer.kept[BUDGET], 2);
    expect_int("the worst is not", 0, sc.jobs[1].layer.kept[2 * BUDGET - WINDOW - 1],
               TOKENS - WINDOW - 2);
    scene_free(&sc);
}

/* Zeros are equal, whatever their sign: the newer of two is kept. */
static void test_zeros(const rkv_backend *backend)
{
    scene sc = scene_make(RKV_PER_HEAD, RKV_F32);
    const int n = TOKENS - WINDOW, n_keep = BUDGET - WINDOW;
    int i, l;
    case_begin("%s: rkv_select among zeros of both signs", backend->name);
    for (l = 0; l < N_LAYERS; l++)
        for (i = 0; i < HEADS * n; i++)
            sc.jobs[l].layer.scores[i] = i % 3 && i % n > n / 2 ? -0.0f : 0.0f;
    expect_status("rkv_select", call_stage(rkv_select, backend, &sc.config, sc.jobs, N_LAYERS),
                  RKV_OK);
    for (l = 0; l < N_LAYERS; l++)
        for (i = 0; i < HEADS * n_keep; i++)
            expect_int("kept", i, sc.jobs[l].layer.kept[i / n_keep * BUDGET + i % n_keep],
                       n - n_keep + i % n_keep);
    scene_free(&sc);
}

/* With a set per head nothing is shared: the buffer is neither wanted nor written. */
static void test_unshared_scores(const rkv_backend *backend)
{
    scene sc = scene_make(RKV_PER_HEAD, RKV_F32);
    float shared[TOKENS - WINDOW] = { 0 };
    int i;
    case_begin("%s: shared_scores with a set per head", backend->name);
    shared[3] = 5;
    sc.jobs[1].layer.shared_scores = shared;
    expect_status("rkv_compress", call_stage(rkv_compress, backend, &sc.config, sc.jobs, N_LAYERS),
                  RKV_OK);
    for (i = 0; i < TOKENS - WINDOW; i++)
        expect_near("shared", i, (double)shared[i], i == 3 ? 5 : 0, 0);
    scene_free(&sc);
}

/* clang-format off */
static const char *spoil_sequence(int which, rkv_layer *l, rkv_layer *first)
{
    static uint8_t pins[TOKENS + 4];
    switch (which) {
    case 0: l->n_tokens--; return "n_tokens: not the same in a sequence";
    case 1: l->kept = first->kept + BUDGET; return "kept in a follower";
    case 2: l->positions = first->positions; return "positions in a follower";
    case 3: l->shared_scores = l->scores; return "shared_scores in a follower";
    case 4: l->pins = pins; return "pins in a follower";
    default: return NULL;
    }
}
/* clang-format on */

static void test_sequences(const rkv_backend *backend)
{
    int which;
    for (which = 0;; which++) {
        scene sc = scene_make(RKV_PER_SEQUENCE, RKV_F32);
        const char *what = spoil_sequence(which, &sc.jobs[1].layer, &sc.jobs[0].layer);
        char word[32];
        if (what) {
            case_begin("%s refuses %s", backend->name, what);
            copy_word(word, what);
            refuse_argument(backend, &sc, word, 1, 1);
        }
        scene_free(&sc);
        if (!what) break;
    }
}

/* ---- kept lists that rkv_compact must not carry out ---- */
/* clang-format off */
static const char *spoil_kept(int which, int32_t *kept, rkv_config *c, rkv_layer *l, int *entry)
{
    int32_t swapped = kept[1];
    *entry = -1; /* the one that the record names, or a row */
    switch (which) {
    case 0: kept[5] = kept[6]; *entry = 6; return "a row twice";
    case 1: kept[0] = -1; *entry = 0; return "a negative row";
    case 2: kept[BUDGET - 1] = TOKENS; *entry = BUDGET - 1; return "a row behind the last";
    case 3: kept[1] = kept[2]; kept[2] = swapped; *entry = 2; return "rows not ascending";
    case 4: c->pinned = 2; kept[1] = 2; kept[2] = 3; kept[3] = 4; *entry = 1;
            return "a pinned row dropped";
    case 5: c->pinned = 2; kept[0] = 1; kept[1] = 2; kept[2] = 3; kept[3] = 4; *entry = 0;
            return "the first row dropped, which is pinned";
    case 6: kept[9] = kept[3]; *entry = 9; return "a row twice, far apart";
    case 7: kept[BUDGET - 1] = INT32_MAX; *entry = BUDGET - 1; return "a row far away";
    case 8: l->n_kept = -1; return "n_kept negative";
    case 9: l->n_kept = BUDGET + 1; return "n_kept above the budget";
    case 10: l->n_kept = 0; return "n_kept 0: a list that nobody chose";
    case 11: c->pinned = 3; l->n_kept = 2; return "n_kept below pinned";
    case 12: kept[0] = INT32_MIN; *entry = 0; return "the most negative row";
    case 13: l->pins[TOKENS + 4 + 17] = 1; *entry = 17; return "a row of layer.pins left out";
    case 14: l->pins[TOKENS + 4 + 4] = 255; *entry = 4; return "a gap's first row, in layer.pins";
    case 15: l->n_kept = BUDGET - 1; l->pins[TOKENS + 4 + TOKENS - 1] = 1; *entry = TOKENS - 1;
             return "the last row, in layer.pins, of a shorter list";
    default: return NULL;
    }
}
/* clang-format on */

static void test_kept_lists(const rkv_backend *backend)
{
    int which, i, entry = -1;
    for (which = -1;; which++) {
        scene sc = scene_make(RKV_PER_HEAD, RKV_F32);
        uint8_t pins[HEADS * (TOKENS + 4)] = { 0 };
        const char *what = NULL;
        sc.jobs[1].layer.pins = pins;
        for (i = 0; i < 4; i++) pins[i] = pins[TOKENS + 4 + i] = 1; /* all lists have these */
        for (i = 0; i < N_LAYERS; i++) {
            int k;
            for (k = 0; k < HEADS * BUDGET; k++) {
                int row = k % BUDGET;
                sc.jobs[i].layer.kept[k] = row < 4 ? row : TOKENS - BUDGET + row;
            }
            sc.jobs[i].layer.n_kept = BUDGET;
        }
        if (which >= 0)
            what = spoil_kept(which, sc.jobs[1].layer.kept + BUDGET, &sc.config, &sc.jobs[1].layer,
                              &entry);
        for (i = 0; i < N_LAYERS; i++) block_remember(&sc.jobs[i].kept);
        case_begin("%s, rkv_compact of %s", backend->name, what ? what : "a list in order");
        if (what) {
            uint8_t pins_before[sizeof pins];
            memcpy(pins_before, pins, sizeof pins);
            refuse(what, rkv_compact, backend, &sc, RKV_ERROR_ARGUMENT);
            expect_bytes("pins", pins, pins_before, sizeof pins);
            expect_place(&sc, 1, entry >= 0 ? 1 : -1, entry);
            expect_rule(&sc, entry >= 0 ? "layer.kept" : "layer.n_kept");
        }
        if (which < 0)
            expect_status("in order",
                          call_with(rkv_compact, backend, &sc.config, sc.jobs, N_LAYERS,
                                    sc.workspace.data, sc.workspace.bytes),
                          RKV_OK);
        scene_free(&sc);
        if (!what && which >= 0) break;
    }
}

/* The layers of a sequence are adjacent: a number does not come back behind another one. */
static void test_sequence_order(void)
{
    static const struct {
        int sequence[4], bad;
    } list[] = { { { 0, 0, 1, 2 }, -1 }, { { 9, 5, 5, -3 }, -1 }, { { 1, 0, 1, 1 }, 2 },
                 { { 4, 4, 7, 4 }, 3 },  { { 2, 3, 1, 3 }, 3 },   { { 6, -1, -2, -1 }, 3 } };
    static float rows[4][TOKENS * DIM], queries[WINDOW * DIM];
    rkv_config config = rkv_config_default(BUDGET);
    size_t i;
    int l;
    case_begin("sequence numbers in order and out of it");
    config.scope = RKV_PER_SEQUENCE;
    for (i = 0; i < sizeof list / sizeof *list; i++) {
        rkv_layer layers[4];
        rkv_error error;
        size_t bytes;
        for (l = 0; l < 4; l++) {
            rkv_layer layer = RKV_INIT;
            layer.keys = rkv_tensor_make(rows[l], RKV_F32, 1, TOKENS, DIM);
            layer.queries = rkv_tensor_make(queries, RKV_F32, 1, WINDOW, DIM);
            layer.n_tokens = TOKENS;
            layer.sequence = list[i].sequence[l];
            layers[l] = layer;
        }
        memset(&error, 0x55, sizeof error);
        config.error = &error;
        expect_status("rkv_workspace_size", rkv_workspace_size(NULL, &config, layers, 4, &bytes),
                      list[i].bad < 0 ? RKV_OK : RKV_ERROR_ARGUMENT);
        expect_int("layer", (int)i, error.layer, list[i].bad);
        expect_true("a word on it", list[i].bad < 0 ? error.rule == NULL
                                                    : error.rule && strstr(error.rule, "sequence"));
    }
}

/* Threads that could find no work are given no scratch. */
static void test_idle_threads(const rkv_backend *backend)
{
    scene sc = scene_make(RKV_PER_HEAD, RKV_F32);
    size_t bytes[2] = { 0, 1 };
    int i;
    case_begin("%s: more threads than heads", backend->name);
    sc.config.parallel_for = reversed_for;
    for (i = 0; i < 2; i++) {
        sc.config.n_threads = i ? 1000 : HEADS;
        rkv_workspace_size(backend, &sc.config, &sc.jobs[0].layer, 1, &bytes[i]);
    }
    expect_int("bytes", 0, (int64_t)bytes[1], (int64_t)bytes[0]);
    scene_free(&sc);
}

/* ---- workspace ---- */
static void test_workspace(const rkv_backend *backend)
{
    static const stage_function calls[] = { rkv_compress, rkv_score, rkv_select, rkv_compact };
    scene sc = scene_make(RKV_PER_HEAD, RKV_F32);
    rkv_layer layers[N_LAYERS];
    size_t bytes = 0, i;
    case_begin("%s: workspace missing or a byte too small", backend->name);
    layers[0] = sc.jobs[0].layer;
    layers[1] = sc.jobs[1].layer;
    expect_status("size", rkv_workspace_size(backend, &sc.config, layers, N_LAYERS, &bytes),
                  RKV_OK);
    for (i = 0; i < sizeof calls / sizeof *calls; i++) {
        if (calls[i] == rkv_compact) { /* wants a list in order first */
            call_with(rkv_score, backend, &sc.config, sc.jobs, N_LAYERS, sc.workspace.data, bytes);
            call_with(rkv_select, backend, &sc.config, sc.jobs, N_LAYERS, sc.workspace.data, bytes);
            block_remember(&sc.jobs[0].kept);
            block_remember(&sc.jobs[1].kept);
            block_remember(&sc.jobs[0].scores);
            block_remember(&sc.jobs[1].scores);
        }
        sc.jobs[0].remembered = sc.jobs[0].layer;
        sc.jobs[1].remembered = sc.jobs[1].layer;
        sc.config.error = &sc.error;
        expect_status("too small",
                      call_with(calls[i], backend, &sc.config, sc.jobs, N_LAYERS, sc.workspace.data,
                                bytes - 1),
                      RKV_ERROR_WORKSPACE);
        expect_rule(&sc, "workspace: smaller");
        expect_place(&sc, -1, -1, -1);
        expect_status("NULL",
                      call_with(calls[i], backend, &sc.config, sc.jobs, N_LAYERS, NULL, bytes),
                      RKV_ERROR_WORKSPACE);
        expect_rule(&sc, "workspace: is NULL");
        expect_scene_unchanged("all buffers", &sc);
    }
    scene_free(&sc);
}

/* A workspace that lies in any of the buffers, at either end. It is looked at before its size. */
static void test_workspace_overlap(const rkv_backend *backend)
{
    int buffer, end;
    for (buffer = 0; buffer < BUFFERS; buffer++)
        for (end = 0; end < 2; end++) {
            scene sc = scene_make_pinned(RKV_PER_LAYER, RKV_F32, 10);
            rkv_layer *l = &sc.jobs[1].layer;
            const int rows = DIM * (TOKENS + 4);
            const struct {
                void *data;
                int bytes;
            } list[BUFFERS] = {
                { l->keys.data, 4 * HEADS * rows },
                { l->values.data, 4 * HEADS * rows },
                { l->kept, 4 * BUDGET },
                { l->positions, 4 * (TOKENS + 4) },
                { l->scores, 4 * HEADS * (TOKENS - WINDOW) },
                { l->shared_scores, 4 * (TOKENS - WINDOW) },
                { l->pins, TOKENS + 4 },
                { l->queries.data, 4 * HEADS * GROUP * WINDOW * DIM },
            };
            char *at = (char *)list[buffer].data + (end ? list[buffer].bytes - 1 : 0);
            case_begin("%s: workspace in buffer %d, at its %s", backend->name, buffer,
                       end ? "end" : "start");
            expect_true("there is such a buffer", list[buffer].data != NULL);
            sc.config.error = &sc.error;
            expect_status("rkv_compress",
                          call_with(rkv_compress, backend, &sc.config, sc.jobs, N_LAYERS, at, 4),
                          RKV_ERROR_ARGUMENT);
            expect_rule(&sc, "workspace: overlaps");
            expect_place(&sc, 1, -1, -1);
            expect_scene_unchanged("all buffers", &sc);
            scene_free(&sc);
        }
}

/* ---- buffers of many layers ---- */
enum { MANY = 90, WITHIN = 64, SLOT = 256, ARENA = MANY * BUFFERS };

/* Byte offsets of every buffer of every layer, and how long each is. */
typedef struct placing {
    int at[MANY][BUFFERS], bytes[BUFFERS], n;
} placing;

/* Byte by byte: is any of them in two buffers? Queries are only read and may be the same. */
static int shares_a_byte(const placing *p)
{
    static int owner[(ARENA + 2) * SLOT];
    int l, i, b;
    memset(owner, 0, sizeof owner);
    for (l = 0; l < p->n; l++)
        for (i = 0; i < BUFFERS; i++)
            for (b = p->at[l][i]; b < p->at[l][i] + p->bytes[i]; b++) {
                int mine = i == BUFFER_QUERIES ? -1 : 1;
                if (owner[b] && owner[b] + mine != -2) return 1;
                owner[b] = mine;
            }
    return 0;
}

static rkv_layer layer_at(char *arena, const int at[BUFFERS], int heads)
{
    rkv_layer l = RKV_INIT;
    l.n_tokens = 6;
    l.keys = rkv_tensor_make(arena + at[0], RKV_F32, heads, 6, 2);
    l.values = rkv_tensor_make(arena + at[1], RKV_BF16, heads, 6, 3);
    l.kept = (int32_t *)(void *)(arena + at[2]);
    l.positions = (int32_t *)(void *)(arena + at[3]);
    l.scores = (float *)(void *)(arena + at[4]);
    l.shared_scores = (float *)(void *)(arena + at[5]);
    l.pins = (uint8_t *)(arena + at[6]);
    l.row_stride = 8;
    l.queries = rkv_tensor_make(arena + at[BUFFER_QUERIES], RKV_F32, 2 * heads, 2, 2);
    return l;
}

/* Up to 90 layers in memory in order, backwards or anyhow; then one buffer moves to where it
 * touches another, or lies on it, at most 64 layers away. */
static void test_many_layers(void)
{
    static char arena[(ARENA + 2) * SLOT];
    rkv_config config = rkv_config_default(4);
    rng r = rng_seed(77);
    int trial, l, i, found[2] = { 0, 0 };
    config.window = 2;
    case_begin("buffers of many layers that meet, or not");
    for (trial = 0; trial < 1000; trial++) {
        static int slots[ARENA];
        static rkv_layer layers[MANY];
        static placing p;
        int heads = 1 + rng_below(&r, 2), a, b, ka, kb, shared;
        const int bytes[BUFFERS] = { heads * 48, heads * 36, heads * 16, heads * 32,
                                     heads * 16, 16,         heads * 8,  heads * 32 };
        rkv_error error;
        p.n = 2 + rng_below(&r, MANY - 1);
        memcpy(p.bytes, bytes, sizeof bytes);
        for (i = 0; i < ARENA; i++) slots[i] = trial % 3 == 1 ? ARENA - 1 - i : i;
        for (i = ARENA - 1; trial % 3 == 2 && i > 0; i--) {
            int j = rng_below(&r, i + 1), t = slots[i];
            slots[i] = slots[j];
            slots[j] = t;
        }
        for (l = 0; l < p.n; l++)
            for (i = 0; i < BUFFERS; i++) p.at[l][i] = SLOT * (1 + slots[l * BUFFERS + i]);
        a = rng_below(&r, p.n);
        b = a - WITHIN > 0 ? a - WITHIN : 0;
        b += rng_below(&r, (a + WITHIN < p.n ? a + WITHIN + 1 : p.n) - b);
        if (trial % 4 == 3 && a >= WITHIN) b = a - WITHIN; /* as far as is looked */
        ka = rng_below(&r, BUFFERS);
        kb = rng_below(&r, BUFFERS);
        if (trial % 5 && (a != b || ka != kb)) /* from touching in front to touching behind */
            p.at[a][ka] =
                p.at[b][kb] - bytes[ka] + 4 * rng_below(&r, (bytes[ka] + bytes[kb]) / 4 + 1);
        for (l = 0; l < p.n; l++) layers[l] = layer_at(arena, p.at[l], heads);
        shared = shares_a_byte(&p);
        found[shared]++;
        if (!expect_int("refused", trial, is_refused(&config, layers, p.n, &error), shared) ||
            (shared && !expect_true("for that", strstr(error.rule, "overlap") != NULL))) {
            case_fail("trial %d: buffer %d of layer %d and %d of %d", trial, ka, a, kb, b);
            break;
        }
        if (!shared) continue;
        expect_int("the later layer", trial, error.layer, a > b ? a : b);
        expect_true("an earlier layer, or itself",
                    (strstr(error.rule, "earlier") != NULL) == (a != b));
    }
    if (trial == 1000) expect_true("both kinds came up", found[0] > 150 && found[1] > 150);
}

/* ---- keys and values in one buffer ---- */
/* Marks the floats of a view of 2 heads and 10 tokens of 4; returns how many were marked before. */
static int mark_floats(unsigned char *map, int at, int head_stride, int token_stride)
{
    int h, t, i, shared = 0;
    for (h = 0; h < 2; h++)
        for (t = 0; t < 10; t++)
            for (i = 0; i < 4; i++) {
                unsigned char *mark = &map[at + h * head_stride + t * token_stride + i];
                shared += *mark;
                *mark = 1;
            }
    return shared;
}

/* Rows of keys and values that take turns are refused where they share a float, and, as long as
 * their strides are the same, only there. */
static void test_interleaved(void)
{
    enum { ROOM = 1024, AT = 400 };
    static float memory[ROOM], queries[2 * 2 * 4];
    static const struct {
        const char *name;
        int head, token, value_head, value_token; /* strides */
    } list[] = {
        { "[token][k|v][head][dim]", 4, 16, 4, 16 },
        { "[token][head][k|v][dim]", 8, 16, 8, 16 },
        { "[head][token][k|v][dim]", 80, 8, 80, 8 },
        { "[k|v][head][token][dim]", 40, 4, 40, 4 },
        { "[head][k|v][token][dim]", 80, 4, 80, 4 },
        { "with gaps", 9, 37, 9, 37 },
        { "unlike tokens", 8, 16, 8, 20 },
        { "unlike heads", 8, 16, 4, 16 },
        { "transposed to each other", 80, 8, 4, 16 },
    };
    rkv_config config = rkv_config_default(4);
    size_t i;
    int off, found[2] = { 0, 0 };
    config.window = 2;
    for (i = 0; i < sizeof list / sizeof *list; i++) {
        case_begin("keys and values in one buffer, %s", list[i].name);
        for (off = -200; off <= 200; off++) {
            unsigned char map[ROOM] = { 0 };
            rkv_layer l = RKV_INIT;
            rkv_error error;
            int shared, refused;
            l.n_tokens = 10;
            l.keys = rkv_tensor_make(memory + AT, RKV_F32, 2, 10, 4);
            l.keys.head_stride = list[i].head;
            l.keys.token_stride = list[i].token;
            l.values = rkv_tensor_make(memory + AT + off, RKV_F32, 2, 10, 4);
            l.values.head_stride = list[i].value_head;
            l.values.token_stride = list[i].value_token;
            l.queries = rkv_tensor_make(queries, RKV_F32, 2, 2, 4);
            mark_floats(map, AT, list[i].head, list[i].token);
            shared = mark_floats(map, AT + off, list[i].value_head, list[i].value_token) > 0;
            found[shared]++;
            refused = is_refused(&config, &l, 1, &error);
            if (!shared && list[i].token != list[i].value_token) continue;
            if (!expect_int("refused", off, refused, shared))
                case_fail("values %d floats behind the keys", off);
        }
    }
    expect_true("both kinds came up", found[0] > 200 && found[1] > 200);
}

/* ---- numbers that are none ---- */
typedef struct poison {
    const char *name;
    int query, layer, head, token, i;
    double value;
} poison;

static void test_poison(const rkv_backend *backend, const poison *p, rkv_dtype dtype,
                        rkv_scope scope, stage_function call)
{
    scene sc = scene_make(scope, dtype);
    job *j = &sc.jobs[p->layer];
    view *v = p->query ? &j->queries : &j->keys;
    case_begin("%s: %s, dtype %d, scope %d", backend->name, p->name, (int)dtype, (int)scope);
    view_store_one(v, p->head, p->token, p->i, (float)p->value);
    block_remember(&v->memory);
    refuse("call", call, backend, &sc, RKV_ERROR_NONFINITE);
    expect_place(&sc, p->layer, p->head, p->token);
    expect_rule(&sc, p->query ? "layer.queries: a query is" : "layer.keys: a key is");
    scene_free(&sc);
}

static void test_nonfinite(const rkv_backend *backend)
{
    static const poison list[] = {
        { "NaN in the first key", 0, 0, 0, 0, 0, (double)NAN },
        { "NaN in the last key", 0, N_LAYERS - 1, HEADS - 1, TOKENS - 1, DIM - 1, (double)NAN },
        { "infinity in a key", 0, 0, 1, 20, 3, (double)INFINITY },
        { "minus infinity in a key", 0, 1, 0, 31, 15, -(double)INFINITY },
        { "NaN in a window key", 0, 1, 1, TOKENS - WINDOW, 7, (double)NAN },
        { "NaN in the first query", 1, 0, 0, 0, 0, (double)NAN },
        { "NaN in the last query", 1, 1, HEADS * GROUP - 1, WINDOW - 1, DIM - 1, (double)NAN },
        { "infinity in a query", 1, 1, 2, 3, 4, (double)INFINITY },
        { "minus infinity in a query", 1, 0, 1, 7, 9, -(double)INFINITY },
    };
    static const poison large[] = {
        { "a key of norm 1e19", 0, 1, 1, 12, 2, 1e19 },
        { "a key whose square overflows", 0, 1, 0, 39, 0, 3e38 },
        { "a query of norm 1e19", 1, 1, 3, 2, 1, -1e19 },
        { "a query whose square overflows", 1, 0, 0, 1, 1, 3e38 },
    };
    size_t i;
    int dtype;
    for (i = 0; i < sizeof list / sizeof *list; i++)
        for (dtype = RKV_F32; dtype <= RKV_BF16; dtype++) {
            test_poison(backend, &list[i], (rkv_dtype)dtype, RKV_PER_HEAD, rkv_compress);
            test_poison(backend, &list[i], (rkv_dtype)dtype, RKV_PER_SEQUENCE, rkv_score);
        }
    for (i = 0; i < sizeof large / sizeof *large; i++) {
        test_poison(backend, &large[i], RKV_F32, RKV_PER_LAYER, rkv_compress);
        test_poison(backend, &large[i], RKV_BF16, RKV_PER_HEAD, rkv_score);
    }
}

/* A call that finds nothing wrong says so: the record of the call before does not stay. */
static void test_record_after_success(const rkv_backend *backend)
{
    static const stage_function calls[] = { rkv_score, rkv_select, rkv_compact, rkv_compress };
    scene sc = scene_make(RKV_PER_HEAD, RKV_F32);
    rkv_layer layers[N_LAYERS];
    size_t bytes, i;
    case_begin("%s: the record of a call that succeeds", backend->name);
    sc.config.error = &sc.error;
    for (i = 0; i < 5; i++) {
        memset(&sc.error, 0x55, sizeof sc.error);
        layers[0] = sc.jobs[0].layer;
        layers[1] = sc.jobs[1].layer;
        if (i < 4)
            expect_status("call",
                          call_with(calls[i], backend, &sc.config, sc.jobs, N_LAYERS,
                                    sc.workspace.data, sc.workspace.bytes),
                          RKV_OK);
        else
            expect_status("size", rkv_workspace_size(backend, &sc.config, layers, N_LAYERS, &bytes),
                          RKV_OK);
        expect_int("error.status", (int)i, sc.error.status, RKV_OK);
        expect_true("no rule", sc.error.rule == NULL);
        expect_place(&sc, -1, -1, -1);
    }
    scene_free(&sc);
}

/* lambda 0 reads no query: what they hold, or say of themselves, is no matter. */
static void test_unread_queries(const rkv_backend *backend)
{
    static const int dims[] = { DIM, 100 * DIM, 0, -1 };
    int i;
    for (i = 0; i < 4; i++) {
        scene sc = scene_make(RKV_PER_HEAD, RKV_F32);
        case_begin("%s: NaN in a query that is not read, dim %d", backend->name, dims[i]);
        view_store_one(&sc.jobs[1].queries, 0, 0, 0, NAN);
        sc.jobs[1].layer.queries.dim = dims[i];
        sc.config.lambda = 0;
        expect_status("rkv_compress",
                      call_stage(rkv_compress, backend, &sc.config, sc.jobs, N_LAYERS), RKV_OK);
        scene_free(&sc);
    }
}

int main(void)
{
    int i, kind;
    n_backends = usable_backends(backends);
    for (i = 0; i < n_backends; i++) {
        for (kind = 0; kind < SPOIL_KINDS; kind++) test_arguments(backends[i], kind);
        test_tables(backends[i]);
        test_null_arguments(backends[i]);
        test_stage_outputs(backends[i]);
        test_given_scores(backends[i]);
        test_zeros(backends[i]);
        test_unshared_scores(backends[i]);
        test_sequences(backends[i]);
        test_kept_lists(backends[i]);
        test_workspace(backends[i]);
        test_idle_threads(backends[i]);
        test_workspace_overlap(backends[i]);
        test_nonfinite(backends[i]);
        test_record_after_success(backends[i]);
        test_longest(backends[i]);
        test_query_blocks(backends[i]);
        test_value_blocks(backends[i]);
        test_unread_queries(backends[i]);
    }
    test_sequence_order();
    test_many_layers();
    test_interleaved();
    return close_tests();
}
