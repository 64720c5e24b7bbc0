/* Every text by which rkv.h refuses a call, read from its source: each must be provoked here, must
 * name a field, must stand for one rule, and the call must change nothing but the record.
 *     make test        or: build/tests/test_refusals [path of rkv.h] */
#include "harness.h"

#include <ctype.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- the texts of the source ------------------------------------------------------------------
 * All string literals of rkv.h between its rooms 6 and 24, apart from those that are not texts of
 * rules. A new refusal is among them, and fails here until it is provoked below. */
typedef struct text {
    char *words;
    int line, occurs, provoked;
} text;

enum { MAX_TEXTS = 1000, MAX_WORDS = 300 };
static text texts[MAX_TEXTS];
static int n_texts;
static char *source; /* NULL: not there */

static text *find_text(const char *words)
{
    int i;
    for (i = 0; i < n_texts; i++)
        if (strcmp(texts[i].words, words) == 0) return &texts[i];
    return NULL;
}

static void add_text(const char *words, int line)
{
    text *t = find_text(words);
    if (!t) {
        if (n_texts == MAX_TEXTS) {
            case_fail("more than %d texts", MAX_TEXTS);
            return;
        }
        t = &texts[n_texts++];
        t->words = (char *)alloc_checked(strlen(words) + 1);
        strcpy(t->words, words);
        t->line = line;
    }
    t->occurs++;
}

static char *read_file(const char *path)
{
    FILE *file = fopen(path, "rb");
    size_t size = 0, room = 1 << 16, n;
    char *all = (char *)alloc_checked(room + 1);
    if (!file) {
        free(all);
        return NULL;
    }
    while ((n = fread(all + size, 1, room - size, file)) > 0) {
        size += n;
        if (size == room) {
            char *more = (char *)alloc_checked(2 * room + 1);
            memcpy(more, all, size);
            free(all);
            all = more;
            room *= 2;
        }
    }
    fclose(file);
    all[size] = 0;
    return all;
}

/* What stands right before a literal: an identifier, or the one before an opening bracket. */
static void word_before(const char *begin, const char *at, char word[64])
{
    const char *end;
    size_t n;
    while (at > begin && (isspace((unsigned char)at[-1]) || at[-1] == '(')) at--;
    for (end = at; at > begin && (isalnum((unsigned char)at[-1]) || at[-1] == '_');) at--;
    n = (size_t)(end - at) < 63 ? (size_t)(end - at) : 63;
    memcpy(word, at, n);
    word[n] = 0;
}

static int line_holds(const char *begin, const char *at, const char *word)
{
    const char *end = at + strcspn(at, "\n");
    const size_t n = strlen(word);
    while (at > begin && at[-1] != '\n') at--;
    for (; at + n <= end; at++)
        if (strncmp(at, word, n) == 0) return 1;
    return 0;
}

/* Literals of compilers and CPUs, and what is put together with numbers. */
static int is_no_rule(const char *begin, const char *at, const char *words, const char *function)
{
    static const char *const lines[] = { "_Pragma",  "#pragma", "#error",
                                         "#include", "target(", "_TARGET(" };
    static const char *const others[] = { "scalar",   "neon",   "avx2",  "avx512",
                                          "RKVCACHE", "layer ", "head ", "token ",
                                          ", ",       ": ",     "" };
    size_t i;
    int status;
    if (!*words) return strcmp(function, "rkv_explain") == 0;
    for (i = 0; i < sizeof lines / sizeof *lines; i++)
        if (line_holds(begin, at, lines[i])) return 1;
    for (i = 0; i < sizeof others / sizeof *others; i++)
        if (strcmp(words, others[i]) == 0) return 1;
    for (status = 0; status <= RKV_ERROR_DEVICE + 1; status++)
        if (strcmp(words, rkv_status_string((rkv_status)status)) == 0) return 1;
    return 0;
}

/* Statuses that are returned, or recorded, without a text, by function. */
typedef struct bare {
    char function[64], status[64];
    int line;
} bare;
enum { MAX_BARE = 200 };
static bare bares[MAX_BARE];
static int n_bares;

static void add_bare(const char *at, const char *function, int line)
{
    size_t n = 0;
    bare *b = &bares[n_bares];
    if (n_bares == MAX_BARE) return;
    while (isalnum((unsigned char)at[n]) || at[n] == '_') n++;
    if (n > 63 || (at[n] != ';' && strncmp(at + n, ", NULL,", 7) != 0)) return; /* has a text */
    memcpy(b->status, at, n);
    b->status[n] = 0;
    strcpy(b->function, function);
    b->line = line;
    n_bares++;
}

static void note_function(const char *line, char function[64])
{
    const char *bracket = line + strcspn(line, "(\n"), *at = bracket;
    size_t n;
    if (!isalpha((unsigned char)*line) || *bracket != '(') return;
    while (at > line && (isalnum((unsigned char)at[-1]) || at[-1] == '_')) at--;
    n = (size_t)(bracket - at) < 63 ? (size_t)(bracket - at) : 63;
    memcpy(function, at, n);
    function[n] = 0;
}

/* Endings in the macro of the views' rules, one text of each for every name it is given. */
enum { MAX_ENDINGS = 40, MAX_NAMES = 10 };
static char endings[MAX_ENDINGS][236], names[MAX_NAMES][64];
static int n_endings, n_names, views_line;

static void sort_literal(const char *begin, const char *at, const char *words, int line,
                         const char *function)
{
    char before[64];
    word_before(begin, at, before);
    if (strcmp(before, "view") == 0 && n_endings < MAX_ENDINGS) {
        snprintf(endings[n_endings++], sizeof *endings, "%.235s", words);
        views_line = line;
    } else if (strcmp(before, "RKVI_VIEW_RULES") == 0 && n_names < MAX_NAMES) {
        snprintf(names[n_names++], sizeof *names, "%.63s", words);
    } else if (!is_no_rule(begin, at, words, function)) {
        add_text(words, line);
    }
}

/* at: behind the opening quote. Returns behind the closing one, of the last that are adjacent. */
static const char *read_literal(const char *at, char words[MAX_WORDS], int *line)
{
    size_t n = 0;
    for (;;) {
        const char *next;
        for (; *at && *at != '"'; at++) {
            if (*at == '\\' && at[1]) at++;
            if (n + 1 < MAX_WORDS) words[n++] = *at;
        }
        if (*at) at++;
        next = at + strspn(at, " \t\n");
        if (*next != '"') break;
        for (; at < next; at++) *line += *at == '\n';
        at++;
    }
    words[n] = 0;
    return at;
}

static void read_texts(const char *all)
{
    const char *begin = strstr(all, "\n/* ==== 6. "), *end = strstr(all, "\n/* ==== 24. "), *at;
    char function[64] = "", words[MAX_WORDS];
    int line = 1, i, k;
    if (!expect_true("rooms 6 to 23", begin && end)) return;
    for (at = all; at < begin; at++) line += *at == '\n';
    for (; at < end; at++) {
        if (*at == '\n') {
            line++;
            note_function(at + 1, function);
        }
        if (at[0] == '/' && at[1] == '*') {
            for (at += 2; at[0] != '*' || at[1] != '/'; at++) line += *at == '\n';
            at++;
        } else if (strncmp(at, "__asm__", 7) == 0) {
            for (; *at != ';'; at++) line += *at == '\n'; /* no rule in it, and no such sign */
        } else if (*at == '\'') {
            for (at++; *at != '\''; at++) at += *at == '\\';
        } else if (*at == '"') {
            const char *first = at;
            const int first_line = line;
            at = read_literal(at + 1, words, &line) - 1;
            sort_literal(begin, first, words, first_line, function);
        } else if (strncmp(at, "RKV_ERROR_", 10) == 0) {
            add_bare(at, function, line);
        }
    }
    for (i = 0; i < n_names; i++)
        for (k = 0; k < n_endings; k++) {
            snprintf(words, sizeof words, "%.63s%.235s", names[i], endings[k]);
            add_text(words, views_line);
        }
}

/* ---- provoked ---- */

/* A record that no call writes. */
static const rkv_error poison = { "not written", 777, 777, 777, 777 };

/* The call gave `want`, and the record holds exactly this text and place. */
static void expect_refusal(const char *rule, rkv_status got, rkv_status want,
                           const rkv_error *error, int layer, int head, int token)
{
    text *t;
    int right = expect_status(rule, got, want) & expect_int(rule, 0, error->status, want);
    if (!error->rule || strcmp(error->rule, rule) != 0) {
        case_fail("the rule is \"%s\", not \"%s\"", error->rule ? error->rule : "none", rule);
        right = 0;
    }
    right &= expect_int("layer", 0, error->layer, layer) & expect_int("head", 0, error->head, head);
    right &= expect_int("token", 0, error->token, token);
    t = find_text(rule);
    if (source && !t) case_fail("not a text of rkv.h: \"%s\"", rule);
    if (t && right) t->provoked = 1;
}

/* ---- scenes: calls that are in order, to be spoilt ---- */
enum { N_LAYERS = 3, HEADS = 2, GROUP = 2, DIM = 8, WINDOW = 4, TOKENS = 30, BUDGET = 16 };
enum { CAPACITY = TOKENS + 2, PINS = 8 };

typedef struct scene {
    const rkv_backend *backend;
    rkv_config config;
    rkv_error error;
    job jobs[N_LAYERS];
    rkv_layer layers[N_LAYERS]; /* what the calls are given */
    block workspace;
} scene;

/* A workspace of 1000 bytes more than needed. */
static void scene_reserve(scene *sc)
{
    size_t bytes = 0;
    expect_status(
        "size", rkv_workspace_size(sc->backend, &sc->config, sc->layers, N_LAYERS, &bytes), RKV_OK);
    if (sc->workspace.base) block_free(&sc->workspace);
    block_make(&sc->workspace, bytes + 1000, 0, 1);
}

/* All layers scored and selected: each of the calls has what it needs. */
static void scene_make(scene *sc, const rkv_backend *backend, rkv_scope scope)
{
    rng r = rng_seed(60);
    shape s;
    int l;
    memset(sc, 0, sizeof *sc);
    memset(&s, 0, sizeof s);
    s.kv_heads = HEADS;
    s.group = GROUP;
    s.head_dim = DIM;
    s.n_tokens = TOKENS;
    s.capacity = CAPACITY;
    s.pins = PINS;
    sc->backend = backend;
    sc->config = rkv_config_default(BUDGET);
    sc->config.window = WINDOW;
    sc->config.protect = WINDOW + 1;
    sc->config.pinned = 2;
    sc->config.scope = scope;
    for (l = 0; l < N_LAYERS; l++) {
        s.follower = scope == RKV_PER_SEQUENCE && l > 0;
        job_make(&sc->jobs[l], &r, &sc->config, &s);
    }
    expect_status("score", call_stage(rkv_score, backend, &sc->config, sc->jobs, N_LAYERS), RKV_OK);
    expect_status("select", call_stage(rkv_select, backend, &sc->config, sc->jobs, N_LAYERS),
                  RKV_OK);
    for (l = 0; l < N_LAYERS; l++) {
        job *j = &sc->jobs[l];
        if (j->kept.base) block_remember(&j->kept);
        if (j->shared.base) block_remember(&j->shared);
        block_remember(&j->scores);
        j->remembered = j->layer;
        sc->layers[l] = j->layer;
    }
    scene_reserve(sc);
}

static void scene_free(scene *sc)
{
    int l;
    for (l = 0; l < N_LAYERS; l++) job_free(&sc->jobs[l]);
    block_free(&sc->workspace);
}

/* As made, for the next to be spoilt. */
static void scene_mend(scene *sc, const rkv_config *config)
{
    int l;
    sc->config = *config;
    for (l = 0; l < N_LAYERS; l++) {
        job_restore(&sc->jobs[l]);
        sc->layers[l] = sc->jobs[l].layer;
    }
}

enum { SIZE = 1, SCORE = 2, SELECT = 4, COMPACT = 8, COMPRESS = 16, N_CALLS = 5 };
enum { DATA = SCORE | SELECT | COMPACT | COMPRESS, ALL = DATA | SIZE };

static rkv_status call_one(int call, scene *sc, const rkv_config *config, rkv_layer *layers,
                           int n_layers, size_t *size, void *workspace, size_t bytes)
{
    static const stage_function stages[] = { rkv_score, rkv_select, rkv_compact, rkv_compress };
    if (call == 0) return rkv_workspace_size(sc->backend, config, layers, n_layers, size);
    return stages[call - 1](sc->backend, config, layers, n_layers, workspace, bytes);
}

/* Makes each of `calls`, with a record and without; all must be refused with this text, and not a
 * byte of config, layers, buffers and result may change. */
static void refuse_with(scene *sc, int calls, rkv_status want, const char *rule, int layer,
                        int head, int token, int n_layers, void *workspace, size_t bytes)
{
    rkv_layer before[N_LAYERS];
    rkv_config config;
    block blocks[N_LAYERS][4];
    int call, with, l;
    memset(blocks, 0, sizeof blocks);
    memcpy(before, sc->layers, sizeof before);
    for (call = 0; call < N_CALLS; call++)
        for (with = 0; with < 2 && (calls >> call & 1); with++) {
            size_t size = 4711;
            rkv_status status;
            sc->error = poison;
            sc->config.error = with ? &sc->error : NULL;
            memcpy(&config, &sc->config, sizeof config);
            for (l = 0; l < N_LAYERS; l++) { /* a scene may have spoilt the data itself */
                block_remember(&sc->jobs[l].keys.memory);
                block_remember(&sc->jobs[l].queries.memory);
                block_remember(&sc->jobs[l].scores);
                if (sc->jobs[l].pins.base) block_remember(&sc->jobs[l].pins);
                if (sc->jobs[l].kept.base) block_remember(&sc->jobs[l].kept);
                if (sc->jobs[l].shared.base) block_remember(&sc->jobs[l].shared);
            }
            status = call_one(call, sc, &sc->config, sc->layers, n_layers, &size, workspace, bytes);
            if (with)
                expect_refusal(rule, status, want, &sc->error, layer, head, token);
            else
                expect_status(rule, status, want);
            expect_int("size", call, (int64_t)size, 4711);
            expect_same_config("config", &sc->config, &config);
            for (l = 0; l < N_LAYERS; l++) {
                expect_same_layer("layer", &sc->layers[l], &before[l]);
                job_unchanged(rule, &sc->jobs[l]);
            }
            block_guards("guards of the workspace", &sc->workspace);
        }
}

static void refuse(scene *sc, int calls, const char *rule, int layer)
{
    refuse_with(sc, calls, RKV_ERROR_ARGUMENT, rule, layer, -1, -1, N_LAYERS, sc->workspace.data,
                sc->workspace.bytes);
}

static void refuse_data(scene *sc, int calls, rkv_status want, const char *rule, int layer,
                        int head, int token)
{
    refuse_with(sc, calls, want, rule, layer, head, token, N_LAYERS, sc->workspace.data,
                sc->workspace.bytes);
}

/* A spoiler changes something and returns the text that the call must give, NULL behind the last;
 * an empty text is none of its own, only one number more. */

/* ---- the config ---- */
static const char budget_rule[] =
    "config.budget: must hold pinned + window, or pinned + protect if that is more";

/* clang-format off */
static const char *spoil_config(int which, rkv_config *c)
{
    switch (which) {
    case 0: c->budget = 0; return "config.budget: must be at least 1";
    case 1: c->budget = INT_MIN; return "config.budget: must be at least 1";
    case 2: c->pinned = -1; return "config.pinned: must not be negative";
    case 3: c->n_threads = -1; return "config.n_threads: must not be negative";
    case 4: c->window = -1; return "config.window: must not be negative";
    case 5: c->protect = -1; return "config.protect: must not be negative";
    case 6: c->pool = -1; return "config.pool: must not be negative";
    case 7: c->recent = -1; return "config.recent: must not be negative";
    case 8: c->pinned = BUDGET - WINDOW; return budget_rule;
    case 9: c->protect = BUDGET - 1; return budget_rule;
    case 10: c->window = BUDGET - 1; return budget_rule;
    case 11: c->pinned = BUDGET + 1; return budget_rule;
    case 12: c->protect = INT_MAX; return budget_rule;
    case 13: c->lambda = -0.5f; return "config.lambda: must be in [0, 1]";
    case 14: c->lambda = NAN; return "config.lambda: must be in [0, 1]";
    case 15: c->threshold = 1.5f; return "config.threshold: must be in [-1, 1]";
    case 16: c->threshold = NAN; return "config.threshold: must be in [-1, 1]";
    case 17: c->scope = (rkv_scope)3; return "config.scope: no such scope";
    case 18: c->scope = (rkv_scope)-1; return "config.scope: no such scope";
    case 19: c->variant = (rkv_variant)2; return "config.variant: no such variant";
    case 20: c->variant = (rkv_variant)-1; return "config.variant: no such variant";
    case 21: c->policy = (rkv_policy)-1; return "config.policy: no such policy";
    case 22: c->policy = (rkv_policy)7; return "config.policy: no such policy";
    case 23: c->votes = -1; return "config.votes: must not be negative";
    case 24: c->votes = BUDGET + 1;
             return "config.votes: must not be above budget (RKV_POLICY_RKV)";
    case 25: c->decay = 1.5f; return "config.decay: must be in [0, 1]";
    case 26: c->decay = NAN; return "config.decay: must be in [0, 1]";
    default: return NULL;
    }
}
/* clang-format on */

static rkv_cache_config cache_config(rkv_error *error);

static void expect_not_created(const char *rule, rkv_status want, const rkv_cache_config *config,
                               int layer, int token)
{
    rkv_cache_config before;
    rkv_cache *cache = (rkv_cache *)(void *)&before;
    rkv_status status;
    memcpy(&before, config, sizeof before);
    *config->compress.error = poison;
    status = rkv_cache_create(&cache, config);
    expect_refusal(rule, status, want, config->compress.error, layer, -1, token);
    expect_true("no cache", cache == NULL);
    expect_same_config("config.compress", &config->compress, &before.compress);
    expect_bytes("config", &config->n_layers, &before.n_layers,
                 sizeof before - offsetof(rkv_cache_config, n_layers));
}

static void test_config(scene *sc)
{
    const rkv_config good = sc->config;
    const char *rule;
    int which;
    for (which = 0; (rule = spoil_config(which, &sc->config)) != NULL; which++) {
        rkv_cache_config config = cache_config(&sc->error);
        case_begin("%s, case %d: %s", sc->backend->name, which, rule);
        refuse(sc, ALL, rule, -1);
        config.compress = sc->config;
        config.compress.error = &sc->error;
        expect_not_created(rule, RKV_ERROR_ARGUMENT, &config, -1, -1);
        scene_mend(sc, &good);
    }
    case_begin("%s: layers", sc->backend->name);
    refuse_with(sc, ALL, RKV_ERROR_ARGUMENT, "n_layers: must not be negative", -1, -1, -1, -1,
                sc->workspace.data, sc->workspace.bytes);
    for (which = 0; which < N_CALLS; which++) {
        size_t bytes = 4711;
        sc->error = poison;
        sc->config.error = &sc->error;
        expect_refusal("layers: is NULL",
                       call_one(which, sc, &sc->config, NULL, 1, &bytes, sc->workspace.data,
                                sc->workspace.bytes),
                       RKV_ERROR_ARGUMENT, &sc->error, -1, -1, -1);
        expect_int("bytes", which, (int64_t)bytes, 4711);
    }
    scene_mend(sc, &good);
}

/* ---- views ----
 * Rules that all views have, and those of views that are read (keys, queries, what is appended) or
 * moved. `name` is what the text begins with. */
static const int32_t some_blocks[CAPACITY] = { 0 };

/* Reads f32. */
static int no_rows_after_17(void *user, const rkv_rows *rows, float *dst)
{
    int r;
    (void)user;
    for (r = 0; r < rows->n_rows && rows->token + r < 17; r++)
        memcpy(dst + (size_t)r * (size_t)rows->dim,
               (const unsigned char *)rows->data + (size_t)r * rows->stride,
               (size_t)rows->dim * sizeof *dst);
    return r;
}

static int no_rows(void *user, const rkv_rows *rows, float *dst)
{
    (void)user;
    (void)rows;
    (void)dst;
    return 0;
}

/* clang-format off */
static const char *spoil_view(int which, rkv_tensor *t)
{
    switch (which) {
    case 0: t->dtype = (rkv_dtype)7; return ".dtype: no such type";
    case 1: t->dtype = (rkv_dtype)-1; return ".dtype: no such type";
    case 2: t->element_bytes = -1; return ".element_bytes: must not be negative";
    case 3: t->heads = 0; return ".heads: must be at least 1";
    case 4: t->tokens = -1; return ".tokens: must not be negative";
    case 5: t->dim = 0; return ".dim: must be at least 1";
    case 6: t->dim = -1; return ".dim: must be at least 1";
    case 7: t->head_stride = -1; return ".head_stride: negative, a broadcast, or above PTRDIFF_MAX";
    case 8: t->token_stride = -1;
            return ".token_stride: negative, a broadcast, or above PTRDIFF_MAX";
    case 9: t->dim_stride = -1; return ".dim_stride: negative, a broadcast, or above PTRDIFF_MAX";
    case 10: t->block_table = some_blocks; t->block_tokens = 1; t->block_stride = INT64_MIN;
             return ".block_stride: negative, a broadcast, or above PTRDIFF_MAX";
    case 11: t->block_table = some_blocks; t->block_tokens = 0;
             return ".block_tokens: must be at least 1 with a block table";
    case 12: t->block_table = some_blocks; t->block_tokens = -7;
             return ".block_tokens: must be at least 1 with a block table";
    case 13: t->token_stride = INT64_MAX; /* on 32 bits a stride by itself */
             return sizeof(size_t) >= 8
                        ? ": its size overflows"
                        : ".token_stride: negative, a broadcast, or above PTRDIFF_MAX";
    case 14: t->heads = t->tokens = t->dim = INT_MAX; return ": its size overflows";
    case 15: *t = rkv_tensor_strided(t->data, t->dtype, 2, t->tokens, t->dim, 0, t->dim, 1);
             return ".head_stride: negative, a broadcast, or above PTRDIFF_MAX";
    case 16: *t = rkv_tensor_strided(t->data, t->dtype, t->heads, t->tokens, t->dim, 1, 0, 1);
             return ".token_stride: negative, a broadcast, or above PTRDIFF_MAX";
    case 17: *t = rkv_tensor_strided(t->data, t->dtype, t->heads, t->tokens, t->dim, 1, 1, 0);
             return ".dim_stride: negative, a broadcast, or above PTRDIFF_MAX";
    case 18: t->dtype = RKV_OPAQUE;
             return ".element_bytes: must be the bytes of a row (RKV_OPAQUE)";
    case 19: t->load = no_rows_after_17; return ".load: is for RKV_OPAQUE only";
    case 20: t->dtype = RKV_OPAQUE; t->element_bytes = 9; t->dim_stride = 2;
             return ".dim_stride: must be 0 or 1, the elements of a row must be adjacent";
    case 21: t->dtype = RKV_Q8_0; t->dim = 32; t->dim_stride = 32;
             return ".dim_stride: must be 0 or 1, the elements of a row must be adjacent";
    case 22: t->dtype = RKV_Q8_0; t->dim = 80; return ".dim: must be a multiple of 32 (RKV_Q8_0)";
    case 23: case 24: case 25: t->dtype = RKV_Q8_0; t->dim = 32;
             *(which == 23 ? &t->token_stride : which == 24 ? &t->head_stride : &t->block_stride) =
                 32 * 99 + 17;
             return ": its strides must be multiples of 32 (RKV_Q8_0)";
    case 26: t->dtype = RKV_Q8_0; t->dim = 32; t->element_bytes = 1;
             return ".element_bytes: must be 0 or the dtype's";
    default: return NULL;
    }
}

static const char *spoil_read_view(int which, rkv_tensor *t)
{
    switch (which) {
    case 0: t->dim_stride = 2;
            return ".dim_stride: must be 0 or 1, the elements of a row must be adjacent";
    case 1: t->element_bytes = 2; return ".element_bytes: must be 0 or the dtype's";
    case 2: t->dtype = RKV_OPAQUE; t->element_bytes = 9;
            return ".load: RKV_OPAQUE needs a row loader";
    default: return NULL;
    }
}

static const char *spoil_moved_view(int which, rkv_tensor *t)
{
    switch (which) {
    case 0: t->tokens = TOKENS - 1; return ".tokens: fewer than n_tokens";
    case 1: t->token_stride = DIM - 1; return ": rows overlap, a stride is too small";
    case 2: t->head_stride = DIM; return ": rows overlap, a stride is too small";
    default: return NULL;
    }
}
/* clang-format on */

typedef const char *(*view_spoiler)(int which, rkv_tensor *t);

static rkv_tensor *view_of(rkv_layer *layer, int which)
{
    return which == 0 ? &layer->keys : which == 1 ? &layer->values : &layer->queries;
}

static void test_views(scene *sc, int which_view, view_spoiler spoil)
{
    static const char *const prefix[] = { "layer.keys", "layer.values", "layer.queries" };
    const rkv_config good = sc->config;
    const char *ending;
    char rule[MAX_WORDS];
    int which;
    for (which = 0;; which++, scene_mend(sc, &good)) {
        ending = spoil(which, view_of(&sc->layers[1], which_view));
        if (!ending) break;
        snprintf(rule, sizeof rule, "%s%s", prefix[which_view], ending);
        case_begin("%s, view case %d: %s", sc->backend->name, which, rule);
        refuse(sc, ALL, rule, 1);
    }
}

/* ---- layers ---- */
/* clang-format off */
static const char *spoil_layer(int which, rkv_layer *l, int *calls)
{
    *calls = ALL;
    switch (which) {
    case 0: l->n_tokens = -1; return "layer.n_tokens: must not be negative";
    case 1: l->n_tokens = INT_MAX / 2 + 1; return "layer.n_tokens: must be below 2^30";
    case 2: l->values.heads = HEADS + 1; return "layer.values.heads: must equal keys.heads";
    case 3: l->queries.dim = DIM - 1; return "layer.queries.dim: must equal keys.dim";
    case 4: l->queries.heads = HEADS * GROUP - 1;
            return "layer.queries.heads: must be a multiple of keys.heads";
    case 5: l->queries.tokens = WINDOW - 1;
            return "layer.queries.tokens: must equal config.votes, or window if that is 0";
    case 6: l->queries.tokens = WINDOW + 1;
            return "layer.queries.tokens: must equal config.votes, or window if that is 0";
    case 7: l->scale = 100.5f; return "layer.scale: must be in [0, 100]";
    case 8: l->scale = NAN; return "layer.scale: must be in [0, 100]";
    case 9: l->softcap = -1; return "layer.softcap: must be in [0, 1e6]";
    case 10: l->softcap = NAN; return "layer.softcap: must be in [0, 1e6]";
    case 11: l->row_stride = TOKENS - 1; return "layer.row_stride: must be 0 or at least n_tokens";
    case 12: l->row_stride = -1; l->positions = NULL;
             return "layer.row_stride: must be 0 or at least n_tokens";
    case 13: *calls = DATA; l->keys.data = NULL; return "layer.keys: it or its data is NULL";
    case 14: *calls = DATA; l->queries.data = NULL; return "layer.queries: it or its data is NULL";
    case 15: *calls = DATA; l->values.data = l->keys.data;
             return "layer: two of its buffers overlap";
    case 16: *calls = DATA; l->pins = (uint8_t *)l->kept;
             return "layer: two of its buffers overlap";
    case 17: *calls = SCORE | SELECT; l->scores = NULL; return "layer.scores: is NULL";
    case 18: *calls = SELECT | COMPACT; l->kept = NULL; return "layer.kept: is NULL";
    case 19: *calls = COMPACT; l->n_kept = 0;
             return "layer.n_kept: must be at least 1, the rows of the kept list";
    case 20: *calls = COMPACT; l->n_kept = BUDGET + 1;
             return "layer.n_kept: more than config.budget";
    case 21: *calls = COMPACT; l->n_kept = 1; return "layer.n_kept: fewer than config.pinned";
    default: return NULL;
    }
}

/* In a sequence of three layers, of which the first owns the set. */
static const char *spoil_sequence(int which, rkv_layer *layers, int *layer, int *calls)
{
    static int32_t others[CAPACITY];
    static uint8_t pins[CAPACITY];
    rkv_layer *l = &layers[2];
    *layer = 2;
    *calls = ALL;
    switch (which) {
    case 0: l->kept = others; return "layer.kept: only in the first layer of a sequence";
    case 1: l->positions = others; return "layer.positions: only in the first layer of a sequence";
    case 2: l->pins = pins; return "layer.pins: only in the first layer of a sequence";
    case 3: l->shared_scores = l->scores;
            return "layer.shared_scores: only in the first layer of a sequence";
    case 4: l->n_tokens--; return "layer.n_tokens: must be equal in all layers of a sequence";
    case 5: layers[1].sequence = 6; /* and the third is of the first one's again */
            return "layer.sequence: the layers of a sequence must be adjacent";
    case 6: *layer = 0; *calls = SCORE | SELECT; layers[0].shared_scores = NULL;
            return "layer.shared_scores: is NULL";
    default: return NULL;
    }
}
/* clang-format on */

static void test_layers(scene *sc)
{
    const rkv_config good = sc->config;
    const char *rule;
    int which, calls;
    for (which = 0;; which++, scene_mend(sc, &good)) {
        rule = spoil_layer(which, &sc->layers[1], &calls);
        if (!rule) break;
        case_begin("%s, layer case %d: %s", sc->backend->name, which, rule);
        refuse(sc, calls, rule, 1);
    }
    case_begin("%s: two layers that overlap", sc->backend->name);
    sc->layers[2].values.data = sc->layers[0].keys.data;
    refuse(sc, DATA, "layer: one of its buffers overlaps one of an earlier layer", 2);
    scene_mend(sc, &good);
    case_begin("%s: workspaces", sc->backend->name);
    refuse_with(sc, DATA, RKV_ERROR_WORKSPACE, "workspace: is NULL", -1, -1, -1, N_LAYERS, NULL,
                sc->workspace.bytes);
    refuse_with(sc, DATA, RKV_ERROR_WORKSPACE,
                "workspace: smaller than rkv_workspace_size asks for", -1, -1, -1, N_LAYERS,
                sc->workspace.data, sc->workspace.bytes - 1001);
    refuse_with(sc, DATA, RKV_ERROR_ARGUMENT, "workspace: overlaps a buffer of this layer", 2, -1,
                -1, N_LAYERS, sc->layers[2].scores, 4);
}

static void test_sequences(const rkv_backend *backend)
{
    scene sc;
    rkv_config good;
    const char *rule;
    int which, layer, calls;
    scene_make(&sc, backend, RKV_PER_SEQUENCE);
    good = sc.config;
    for (which = 0;; which++, scene_mend(&sc, &good)) {
        rule = spoil_sequence(which, sc.layers, &layer, &calls);
        if (!rule) break;
        case_begin("%s, sequence case %d: %s", backend->name, which, rule);
        refuse(&sc, calls, rule, layer);
    }
    scene_free(&sc);
}

/* ---- policies beside R-KV ---- */
enum { MEANS = 4 * 8 * HEADS * GROUP * DIM };
static float policy_state[N_LAYERS][2 * HEADS * CAPACITY], policy_bias[N_LAYERS][HEADS * CAPACITY];
static float policy_means[N_LAYERS][MEANS];
static const float frequencies[DIM / 2] = { 1, 0.5f, 0.25f, 4.5f };

/* What all policies need, in a scene that has been made for R-KV. */
static void scene_for_policy(scene *sc, rkv_config *good, rkv_policy policy)
{
    int l;
    *good = sc->config;
    good->policy = policy;
    memset(policy_state, 0, sizeof policy_state);
    memset(policy_bias, 0, sizeof policy_bias);
    memset(policy_means, 0, sizeof policy_means);
    for (l = 0; l < N_LAYERS; l++) {
        rkv_layer *layer = &sc->jobs[l].remembered;
        layer->state = policy_state[l];
        layer->bias = policy_bias[l];
        layer->query_means = policy_means[l];
        layer->n_new = TOKENS / 2;
        layer->rope.pairing = RKV_ROPE_HALVES;
    }
    scene_mend(sc, good);
    scene_reserve(sc);
}

/* clang-format off */
static const char *spoil_policy(int which, rkv_config *c, rkv_layer *l, int *calls)
{
    *calls = ALL;
    switch (which) {
    case 0: l->n_new = -1; return "layer.n_new: must not be negative";
    case 1: l->n_new = TOKENS + 1; return "layer.n_new: more than n_tokens";
    case 2: l->rope.pairing = RKV_ROPE_UNKNOWN;
            return "rope.pairing: is needed by this policy, also if it is RKV_ROPE_NONE";
    case 3: l->rope.pairing = (rkv_pairing)4; return "rope.pairing: no such pairing";
    case 4: l->rope.dims = DIM + 2; return "rope.dims: must be even and not above head_dim";
    case 5: l->rope.dims = 3; return "rope.dims: must be even and not above head_dim";
    case 6: l->rope.dims = -2; return "rope.dims: must be even and not above head_dim";
    case 7: l->rope.base = -1; return "rope.base: must be positive, or 0";
    case 8: l->rope.base = NAN; return "rope.base: must be positive, or 0";
    case 9: l->positions = NULL;
            return "layer.positions: this policy needs the true positions of rows";
    case 10: l->first_query = -1; return "layer.first_query: must be in [0, votes)";
    case 11: l->first_query = WINDOW; return "layer.first_query: must be in [0, votes)";
    case 12: *calls = DATA; l->state = NULL; return "layer.state: is NULL";
    case 13: *calls = SCORE | COMPRESS; l->n_new = 0;
             return "layer.n_new: must be at least 1, the tokens since the last round";
    case 14: *calls = DATA; l->bias = l->state; return "layer: two of its buffers overlap";
    case 15: *calls = DATA; c->policy = RKV_POLICY_TRIATTENTION; l->query_means = NULL;
             return "layer.query_means: is NULL";
    case 16: c->policy = RKV_POLICY_TRIATTENTION; l->queries.heads = HEADS * GROUP - 1;
             return "layer.queries.heads: must be a multiple of keys.heads";
    case 17: c->policy = RKV_POLICY_RANDOM; l->positions = NULL;
             return "layer.positions: this policy needs the true positions of rows";
    case 18: *calls = DATA; l->rope.frequencies = frequencies;
             return "rope.frequencies: one is not in [0, 4]";
    default: return NULL;
    }
}
/* clang-format on */

static void test_policy_data(scene *sc, const rkv_config *good)
{
    const int calls = SCORE | COMPRESS;
    case_begin("%s: data of other policies", sc->backend->name);
    policy_state[1][CAPACITY + 3] = NAN; /* plane 1 of head 0 */
    refuse_data(sc, calls, RKV_ERROR_NONFINITE,
                "layer.state: a number is negative, NaN or infinite", 1, 0, 3);
    policy_state[1][CAPACITY + 3] = -1;
    refuse_data(sc, calls, RKV_ERROR_NONFINITE,
                "layer.state: a number is negative, NaN or infinite", 1, 0, 3);
    policy_state[1][CAPACITY + 3] = 0;
    policy_bias[2][CAPACITY + 7] = NAN;
    refuse_data(sc, calls, RKV_ERROR_NONFINITE, "layer.bias: a score with it is NaN", 2, 1, 7);
    policy_bias[2][CAPACITY + 7] = 0;
    sc->config.policy = RKV_POLICY_TRIATTENTION;
    policy_means[0][DIM + 2] = INFINITY; /* query head 1 */
    refuse_data(sc, calls, RKV_ERROR_NONFINITE,
                "layer.query_means: a mean is NaN, infinite or too large", 0, 1, -1);
    policy_means[0][DIM + 2] = 0;
    scene_mend(sc, good);
}

static void test_policies(scene *sc)
{
    rkv_config first = sc->config, good;
    const char *rule;
    int which, calls, odd;
    scene_for_policy(sc, &good, RKV_POLICY_MEMORY_TRACES);
    for (which = 0;; which++, scene_mend(sc, &good)) {
        rule = spoil_policy(which, &sc->config, &sc->layers[1], &calls);
        if (!rule) break;
        case_begin("%s, policy case %d: %s", sc->backend->name, which, rule);
        odd = strncmp(rule, "rope.frequencies", 16) == 0; /* says which one */
        refuse_data(sc, calls, RKV_ERROR_ARGUMENT, rule, 1, -1, odd ? 3 : -1);
    }
    test_policy_data(sc, &good);
    for (which = 0; which < N_LAYERS; which++) {
        rkv_layer *layer = &sc->jobs[which].remembered;
        layer->state = layer->bias = NULL;
        layer->query_means = NULL;
        layer->n_new = 0;
    }
    scene_mend(sc, &first);
    scene_reserve(sc);
}

/* rkv_query_means_update. */
typedef struct means_scene {
    rkv_tensor queries;
    rkv_rope rope;
    rkv_backend backend;
    int slot, n, position;
    float *means;
} means_scene;

/* clang-format off */
static const char *spoil_means(int which, means_scene *m, rkv_status *want, int *head, int *token)
{
    static float data[HEADS * GROUP * WINDOW * (DIM + 1)];
    *want = RKV_ERROR_ARGUMENT;
    *head = *token = -1;
    m->queries = rkv_tensor_make(data, RKV_F32, HEADS * GROUP, WINDOW, DIM);
    memset(&m->rope, 0, sizeof m->rope);
    m->rope.pairing = RKV_ROPE_ADJACENT;
    m->backend = *rkv_backend_find(NULL);
    m->slot = 1;
    m->n = 2;
    m->position = 7;
    m->means = policy_means[0];
    memset(data, 0, sizeof data);
    switch (which) {
    case 0: m->queries.data = NULL; return "queries: it or its data is NULL";
    case 1: m->means = NULL; return "means: is NULL";
    case 2: m->slot = -1; return "slot, n: they leave the rows of the view";
    case 3: m->n = WINDOW; return "slot, n: they leave the rows of the view";
    case 4: m->n = -1; return "slot, n: they leave the rows of the view";
    case 5: m->position = -1; return "position: negative or too large";
    case 6: m->position = INT_MAX; return "position: negative or too large";
    case 7: m->queries.dim = DIM + 1; return "rope.dims: must be given where head_dim is odd";
    case 8: m->rope.frequencies = frequencies; *token = 3;
            return "rope.frequencies: one is not in [0, 4]";
    case 9: m->backend.update_means = NULL; *want = RKV_ERROR_UNSUPPORTED;
            return "backend.update_means: this backend has none";
    case 10: data[(2 * WINDOW + 2) * DIM] = NAN; *want = RKV_ERROR_NONFINITE; *head = *token = 2;
             return "layer.queries: a query is NaN, infinite or of a norm above 1e18";
    default: return NULL;
    }
}
/* clang-format on */

static void test_means(void)
{
    means_scene m;
    rkv_config config = rkv_config_triattention(BUDGET);
    rkv_error error;
    rkv_status want;
    const size_t count = (size_t)(HEADS * GROUP * (DIM + DIM / 2) + 1);
    float before[MEANS];
    const char *rule;
    int which, head, token;
    config.error = &error;
    memset(policy_means, 0, sizeof policy_means);
    memcpy(before, policy_means[0], sizeof before);
    for (which = 0;; which++) {
        rule = spoil_means(which, &m, &want, &head, &token);
        if (!rule) break;
        case_begin("query means, case %d: %s", which, rule);
        error = poison;
        expect_refusal(rule,
                       rkv_query_means_update(&m.backend, &config, &m.rope, &m.queries, m.slot, m.n,
                                              m.position, m.means),
                       want, &error, -1, head, token);
        expect_bytes("means", policy_means[0], before, count * sizeof(float));
    }
    case_begin("query means: NULL");
    error = poison;
    expect_refusal("rope: is NULL",
                   rkv_query_means_update(&m.backend, &config, NULL, &m.queries, 0, 1, 9, m.means),
                   RKV_ERROR_NULL, &error, -1, -1, -1);
    expect_status("no config",
                  rkv_query_means_update(NULL, NULL, &m.rope, &m.queries, 0, 1, 9, m.means),
                  RKV_ERROR_NULL);
}

/* A backend that is no whole one, given to a call or registered. */
static rkv_status no_size(const rkv_backend *self, const rkv_config *config,
                          const rkv_layer *layers, int n_layers, size_t *bytes)
{
    (void)self, (void)config, (void)layers, (void)n_layers;
    *bytes = 0;
    return RKV_OK;
}

static rkv_status no_run(const rkv_backend *self, const rkv_call *call)
{
    (void)self, (void)call;
    return RKV_OK;
}

/* clang-format off */
static const char *spoil_backend(int which, rkv_backend *b)
{
    switch (which) {
    case 0: b->name = NULL; return "backend.name: must not be empty";
    case 1: b->name = ""; return "backend.name: must not be empty";
    case 2: b->workspace_size = NULL; return "backend.workspace_size: is NULL";
    case 3: b->run = NULL; return "backend.run: is NULL";
    default: return NULL;
    }
}
/* clang-format on */

static void expect_not_registered(const char *rule, rkv_status want, const rkv_backend *backend)
{
    rkv_error error = poison;
    const rkv_status status = rkv_backend_register(backend, &error);
    expect_refusal(rule, status, want, &error, -1, -1, -1);
    expect_status(rule, rkv_backend_register(backend, NULL), want);
}

static void test_backends(scene *sc)
{
    static rkv_backend many[17];
    static char many_names[17][16];
    const rkv_backend *usual = sc->backend;
    const rkv_config good = sc->config;
    const char *rule;
    rkv_backend b;
    int which, i;
    for (which = 0;; which++) {
        memset(&b, 0, sizeof b);
        b.name = "partial";
        b.workspace_size = no_size;
        b.run = no_run;
        rule = spoil_backend(which, &b);
        if (!rule) break;
        case_begin("backend case %d: %s", which, rule);
        sc->backend = &b;
        refuse(sc, ALL, rule, -1);
        sc->backend = usual;
        scene_mend(sc, &good);
        expect_not_registered(rule, RKV_ERROR_ARGUMENT, &b);
    }
    case_begin("registering backends");
    expect_not_registered("backend: is NULL", RKV_ERROR_ARGUMENT, NULL);
    b.name = "scalar";
    expect_not_registered("backend.name: is that of a built-in backend", RKV_ERROR_ARGUMENT, &b);
    for (i = 0; i < 17; i++) {
        snprintf(many_names[i], sizeof *many_names, "full%d", i);
        many[i] = b;
        many[i].name = many_names[i];
        if (i < 16) expect_status("register", rkv_backend_register(&many[i], NULL), RKV_OK);
    }
    expect_not_registered("backend: 16 are registered already", RKV_ERROR_MEMORY, &many[16]);
}

/* ---- what only the data shows ---- */
static void test_data(scene *sc)
{
    const rkv_config good = sc->config;
    int32_t blocks[CAPACITY], query_blocks[WINDOW];
    int which, i, kept = SELECT | COMPRESS;
    job *j = &sc->jobs[1];
    for (i = 0; i < CAPACITY; i++) blocks[i] = i;
    case_begin("%s: numbers that are none", sc->backend->name);
    view_store_one(&j->keys, 1, 17, 3, INFINITY);
    refuse_data(sc, SCORE | COMPRESS, RKV_ERROR_NONFINITE,
                "layer.keys: a key is NaN, infinite or of a norm above 1e18", 1, 1, 17);
    view_store_one(&j->keys, 1, 17, 3, 0);
    view_store_one(&j->queries, 3, 2, 0, NAN);
    refuse_data(sc, SCORE | COMPRESS, RKV_ERROR_NONFINITE,
                "layer.queries: a query is NaN, infinite or of a norm above 1e18", 1, 3, 2);
    view_store_one(&j->queries, 3, 2, 0, 0);
    sc->layers[1].scores[(TOKENS - WINDOW) + 5] = NAN;
    refuse_data(sc, SELECT, RKV_ERROR_NONFINITE, "layer.scores: a score is NaN", 1, 1, 5);
    sc->layers[1].scores[(TOKENS - WINDOW) + 5] = 0;

    case_begin("%s: row loaders", sc->backend->name);
    for (which = 0; which < 2; which++) {
        rkv_tensor *t = which ? &sc->layers[1].queries : &sc->layers[1].keys, was = *t;
        t->dtype = RKV_OPAQUE;
        t->element_bytes = DIM * (int)sizeof(float);
        t->load = which ? no_rows : no_rows_after_17;
        refuse_data(sc, SCORE | COMPRESS, RKV_ERROR_NONFINITE,
                    which ? "layer.queries.load: the row loader does not give a query"
                          : "layer.keys.load: the row loader does not give a key",
                    1, 0, which ? 0 : 17);
        *t = was;
    }

    case_begin("%s: block tables", sc->backend->name);
    for (which = 0; which < 2; which++) {
        static const char *const rules[] = {
            "layer.keys.block_table: a block is negative or occurs twice",
            "layer.values.block_table: a block is negative or occurs twice"
        };
        rkv_tensor *t = view_of(&sc->layers[1], which), was = *t;
        t->block_table = blocks;
        t->block_tokens = 1;
        blocks[9] = -1;
        refuse_data(sc, SCORE | COMPACT | COMPRESS, RKV_ERROR_ARGUMENT, rules[which], 1, -1, 9);
        blocks[9] = 4;
        refuse_data(sc, SCORE | COMPACT | COMPRESS, RKV_ERROR_ARGUMENT, rules[which], 1, -1, 9);
        blocks[9] = 9;
        *t = was;
    }
    for (i = 0; i < WINDOW; i++) query_blocks[i] = i;
    query_blocks[2] = -1;
    sc->layers[1].queries.block_table = query_blocks;
    sc->layers[1].queries.block_tokens = 1;
    refuse_data(sc, SCORE | COMPRESS, RKV_ERROR_ARGUMENT,
                "layer.queries.block_table: a block is negative or occurs twice", 1, -1, 2);
    scene_mend(sc, &good);

    case_begin("%s: pins", sc->backend->name);
    memset(sc->layers[1].pins + CAPACITY, 1, CAPACITY);
    refuse_data(sc, kept, RKV_ERROR_ARGUMENT,
                "layer.pins: so many rows are pinned that none is left to choose", 1, 1, -1);
    memset(sc->layers[1].pins + CAPACITY, 0, CAPACITY);

    case_begin("%s: kept lists", sc->backend->name);
    {
        int32_t *list = sc->layers[1].kept + BUDGET, third = list[3], row;
        list[3] = TOKENS;
        refuse_data(sc, COMPACT, RKV_ERROR_ARGUMENT,
                    "layer.kept: a row is negative or not below n_tokens", 1, 1, 3);
        list[3] = -1;
        refuse_data(sc, COMPACT, RKV_ERROR_ARGUMENT,
                    "layer.kept: a row is negative or not below n_tokens", 1, 1, 3);
        list[3] = list[2];
        refuse_data(sc, COMPACT, RKV_ERROR_ARGUMENT,
                    "layer.kept: rows must ascend, each listed once", 1, 1, 3);
        list[3] = third;
        list[1] = 2;
        list[2] = 3;
        list[3] = 4;
        list[4] = 5;
        for (i = 5; i < BUDGET; i++) list[i] = TOKENS - BUDGET + i;
        refuse_data(sc, COMPACT, RKV_ERROR_ARGUMENT,
                    "layer.kept: the first `pinned` rows must stay in their places", 1, 1, 1);
        for (i = 0; i < 5; i++) list[i] = i;
        row = TOKENS - BUDGET + 2; /* the rows 5 to TOKENS - BUDGET + 4 are not listed */
        sc->layers[1].pins[CAPACITY + row] = 1;
        refuse_data(sc, COMPACT, RKV_ERROR_ARGUMENT,
                    "layer.kept: a row that layer.pins protects is not listed", 1, 1, row);
    }
    scene_mend(sc, &good);
}

/* Layers whose scores together need more memory than there are addresses. They lie where nothing
 * is, far apart: nobody reads them. */
static void test_too_large(scene *sc)
{
    enum { N = 6 };
    const int wide = sizeof(size_t) >= 8;
    const uintptr_t step = UINTPTR_MAX / 16 + 1;
    rkv_layer layers[N];
    rkv_config config = sc->config;
    int call, l;
    case_begin("%s: layers that are too large together", sc->backend->name);
    config.lambda = 0;
    config.error = &sc->error;
    for (l = 0; l < N; l++) {
        rkv_layer layer = RKV_INIT;
        layer.keys = rkv_tensor_make((void *)(step * (uintptr_t)(l + 1)), RKV_F16,
                                     wide ? 1 << 29 : 1 << 12, wide ? (1 << 30) - 1 : 1 << 15, 1);
        layer.n_tokens = layer.keys.tokens;
        layers[l] = layer;
    }
    for (call = 0; call < N_CALLS; call += N_CALLS - 1) {
        size_t bytes = 4711;
        sc->error = poison;
        expect_refusal(
            "layers: together they need more memory than there can be",
            call_one(call, sc, &config, layers, N, &bytes, sc->workspace.data, sc->workspace.bytes),
            RKV_ERROR_ARGUMENT, &sc->error, -1, -1, -1);
        expect_int("bytes", call, (int64_t)bytes, 4711);
    }
}

/* ---- the managed cache ---- */
enum { CACHE_LAYERS = 2, CACHE_BUDGET = 8, CACHE_BUFFER = 4, CACHE_WINDOW = 3, CACHE_DIM = 4 };

static rkv_cache_config cache_config(rkv_error *error)
{
    rkv_cache_config config = RKV_INIT;
    config.compress = rkv_config_default(CACHE_BUDGET);
    config.compress.window = CACHE_WINDOW;
    config.compress.pinned = 1;
    config.compress.error = error;
    config.n_layers = CACHE_LAYERS;
    config.kv_heads = 1;
    config.query_heads = 2;
    config.head_dim = CACHE_DIM;
    config.buffer = CACHE_BUFFER;
    return config;
}

static void *scarce_alloc(void *left, size_t bytes)
{
    return --*(int *)left < 0 ? NULL : alloc_checked(bytes);
}

static void scarce_free(void *left, void *memory)
{
    (void)left;
    free(memory);
}

static int backend_allocs, backend_copies; /* how many more succeed */

static void *scarce_backend_alloc(const rkv_backend *self, size_t bytes)
{
    (void)self;
    return scarce_alloc(&backend_allocs, bytes);
}

static void scarce_backend_free(const rkv_backend *self, void *memory)
{
    (void)self;
    free(memory);
}

static rkv_status scarce_copy(const rkv_backend *self, void *dst, const void *src, size_t bytes)
{
    (void)self;
    if (--backend_copies < 0) return RKV_ERROR_DEVICE;
    memcpy(dst, src, bytes);
    return RKV_OK;
}

static rkv_status scarce_copy_rows(const rkv_backend *self, const rkv_tensor *dst, int dst_token,
                                   const rkv_tensor *src, int src_token, int n_tokens)
{
    const rkv_backend *cpu = rkv_backend_find(NULL);
    (void)self;
    if (--backend_copies < 0) return RKV_ERROR_DEVICE;
    return cpu->copy_rows(cpu, dst, dst_token, src, src_token, n_tokens);
}

static const char cache_votes_rule[] =
    "cache.buffer: with RKV_POLICY_RKV, buffer + the larger of window and protect must be at least "
    "votes";

/* clang-format off */
static const char *spoil_cache(int which, rkv_cache_config *c, rkv_status *want, int *layer)
{
    static rkv_backend broken;
    static int none_left;
    *want = RKV_ERROR_ARGUMENT;
    *layer = -1;
    switch (which) {
    case 0: c->n_layers = 0; return "cache.n_layers: must be at least 1";
    case 1: c->kv_heads = 0; return "cache.kv_heads: must be at least 1";
    case 2: c->query_heads = 0; return "cache.query_heads: must be at least 1";
    case 3: c->kv_heads = 2; c->query_heads = 3;
            return "cache.query_heads: must be a multiple of kv_heads";
    case 4: c->head_dim = 0; return "cache.head_dim: must be at least 1";
    case 5: c->value_dim = -1; return "cache.value_dim: must not be negative";
    case 6: c->dtype = (rkv_dtype)7; return "cache.dtype: no such type";
    case 21: c->dtype = RKV_OPAQUE; return "cache.dtype: a cache does not hold RKV_OPAQUE";
    case 22: c->dtype = RKV_Q8_0; c->head_dim = 33;
             return "cache.head_dim: must be a multiple of 32 (RKV_Q8_0)";
    case 23: c->dtype = RKV_Q8_0; c->head_dim = 32; c->value_dim = 40;
             return "cache.value_dim: must be a multiple of 32 (RKV_Q8_0)";
    case 7: c->buffer = -1; return "cache.buffer: must not be negative";
    case 8: c->capacity = -1; return "cache.capacity: must not be negative";
    case 9: c->alloc = scarce_alloc; return "cache.alloc, cache.free: give both or none";
    case 10: c->free = scarce_free; return "cache.alloc, cache.free: give both or none";
    case 11: c->compress.budget = INT32_MAX; return "cache.buffer: budget + buffer overflows";
    case 12: c->capacity = CACHE_BUDGET + CACHE_BUFFER - 1;
             return "cache.capacity: must be 0 or at least budget + buffer";
    case 13: c->n_layers = c->kv_heads = c->query_heads = c->head_dim = INT32_MAX;
             return "cache: its size overflows";
    case 14: broken = *rkv_backend_find(NULL); broken.fill_positions = NULL; c->backend = &broken;
             *want = RKV_ERROR_UNSUPPORTED; return "cache.backend: has no memory functions";
    case 15: broken = *rkv_backend_find(NULL); broken.run = NULL; c->backend = &broken;
             return "backend.run: is NULL";
    case 16: c->scale = -1; *layer = 0; return "layer.scale: must be in [0, 100]";
    case 17: c->alloc = scarce_alloc; c->free = scarce_free; c->user = &none_left; none_left = 0;
             *want = RKV_ERROR_MEMORY; return "cache: no memory for its records";
    case 18: case 19: case 20:
        broken = *rkv_backend_find(NULL);
        broken.alloc = scarce_backend_alloc;
        broken.free = scarce_backend_free;
        broken.copy = scarce_copy;
        c->backend = &broken;
        backend_allocs = which - 18;
        backend_copies = 0;
        *want = which == 20 ? RKV_ERROR_DEVICE : RKV_ERROR_MEMORY;
        return which == 18   ? "cache: no memory for its rows"
               : which == 19 ? "cache: no memory for the workspace"
                             : "cache: the device refused a copy";
    case 24:
        broken = *rkv_backend_find(NULL);
        broken.update_means = NULL;
        c->backend = &broken;
        c->compress.policy = RKV_POLICY_TRIATTENTION;
        *want = RKV_ERROR_UNSUPPORTED;
        return "cache.backend: has no update_means, which TRIATTENTION needs";
    case 25: c->compress.votes = CACHE_WINDOW + CACHE_BUFFER + 1; return cache_votes_rule;
    case 26: c->compress.protect = CACHE_WINDOW + 1; c->compress.votes = CACHE_BUDGET;
             c->buffer = CACHE_BUDGET - CACHE_WINDOW - 2; return cache_votes_rule;
    default: return NULL;
    }
}
/* clang-format on */

static void test_create(void)
{
    rkv_error error;
    int which;
    for (which = 0;; which++) {
        rkv_cache_config config = cache_config(&error);
        rkv_status want;
        int layer;
        const char *rule = spoil_cache(which, &config, &want, &layer);
        if (!rule) break;
        case_begin("cache case %d: %s", which, rule);
        expect_not_created(rule, want, &config, layer, -1);
    }
}

/* More votes than the window and the buffer hold: refused with R-KV alone, where queries vote. */
static void test_create_votes(void)
{
    rkv_error error;
    int which;
    for (which = 0; which < 7; which++) {
        rkv_cache_config config = cache_config(&error);
        rkv_cache *cache = NULL;
        case_begin("votes of a cache, case %d", which);
        config.compress.votes = CACHE_WINDOW + CACHE_BUFFER + 1;
        config.rope.pairing = RKV_ROPE_NONE;
        switch (which) {
        case 0: config.compress.votes--; break;
        case 1: config.buffer++; break;
        case 2: config.compress.protect = CACHE_WINDOW + 1; break;
        case 3: config.compress.lambda = 0; break;
        case 4: config.compress.protect = CACHE_BUDGET - 1; break; /* nothing is chosen */
        case 5: config.compress.policy = RKV_POLICY_H2O; break;
        default: config.compress.policy = RKV_POLICY_MEMORY_TRACES;
        }
        expect_status("create", rkv_cache_create(&cache, &config), RKV_OK);
        rkv_cache_destroy(cache);
    }
}

/* Frequencies, or a base that gives them, in two pairs: the first that is out of range is named.
 * What no round looks at is not looked at here. */
static void test_create_frequencies(void)
{
    static const struct {
        rkv_policy policy;
        rkv_pairing pairing;
        int dims, protect, is_table;
        float base, table[2];
        int bad; /* -1: none */
    } cases[] = {
        { RKV_POLICY_MEMORY_TRACES, RKV_ROPE_HALVES, 0, 0, 1, 0, { 1, 4.5f }, 1 },
        { RKV_POLICY_MEMORY_PROSE, RKV_ROPE_ADJACENT, 0, 0, 1, 0, { NAN, -1 }, 0 },
        { RKV_POLICY_TRIATTENTION, RKV_ROPE_HALVES, 0, 0, 1, 0, { 0.5f, -0.25f }, 1 },
        { RKV_POLICY_TRIATTENTION, RKV_ROPE_HALVES, 0, 0, 0, 0.01f, { 0, 0 }, 1 },
        { RKV_POLICY_MEMORY_TRACES, RKV_ROPE_HALVES, 0, 0, 1, 0, { 4, 0 }, -1 },
        { RKV_POLICY_MEMORY_TRACES, RKV_ROPE_HALVES, 2, 0, 1, 0, { 1, 4.5f }, -1 },
        { RKV_POLICY_MEMORY_TRACES, RKV_ROPE_NONE, 0, 0, 1, 0, { 1, 4.5f }, -1 },
        { RKV_POLICY_MEMORY_TRACES, RKV_ROPE_HALVES, 0, CACHE_BUDGET - 1, 1, 0, { 1, 4.5f }, -1 },
        { RKV_POLICY_H2O, RKV_ROPE_HALVES, 0, 0, 1, 0, { 1, 4.5f }, -1 },
        { RKV_POLICY_RKV, RKV_ROPE_HALVES, 0, 0, 1, 0, { 1, 4.5f }, -1 },
    };
    size_t i;
    for (i = 0; i < sizeof cases / sizeof *cases; i++) {
        rkv_error error;
        rkv_cache_config config = cache_config(&error);
        rkv_cache *cache = NULL;
        case_begin("frequencies of a cache, case %d", (int)i);
        config.compress.policy = cases[i].policy;
        config.compress.protect = cases[i].protect;
        config.rope.pairing = cases[i].pairing;
        config.rope.dims = cases[i].dims;
        config.rope.base = cases[i].base;
        if (cases[i].is_table) config.rope.frequencies = cases[i].table;
        if (cases[i].bad >= 0)
            expect_not_created("rope.frequencies: one is not in [0, 4]", RKV_ERROR_ARGUMENT,
                               &config, -1, cases[i].bad);
        else
            expect_status("create", rkv_cache_create(&cache, &config), RKV_OK);
        rkv_cache_destroy(cache);
    }
}

/* The table cannot be read, or there is no memory to read it into. */
static void test_create_unread_table(void)
{
    static const float table[] = { 1, 0.5f };
    int copies, left;
    for (copies = 0; copies < 2; copies++) {
        rkv_backend backend = *rkv_backend_find(NULL);
        rkv_error error;
        rkv_cache_config config = cache_config(&error);
        case_begin("a table of frequencies, %s", copies ? "no memory" : "a copy is refused");
        config.compress.policy = RKV_POLICY_TRIATTENTION;
        config.rope.pairing = RKV_ROPE_HALVES;
        config.rope.frequencies = table;
        config.alloc = scarce_alloc;
        config.free = scarce_free;
        config.user = &left;
        left = copies ? 1 : 2; /* the records, then the table */
        backend.copy = scarce_copy;
        config.backend = &backend;
        backend_copies = 1; /* the device's record */
        if (copies)
            expect_not_created("cache: no memory for frequencies", RKV_ERROR_MEMORY, &config, -1,
                               -1);
        else
            expect_not_created("cache: the device refused a copy", RKV_ERROR_DEVICE, &config, -1,
                               -1);
    }
}

/* A cache that is to stay as it is: its image before and after. */
typedef struct still {
    rkv_cache *cache;
    rkv_error error;
    unsigned char *image;
    size_t bytes;
} still;

static void still_watch(still *s)
{
    free(s->image);
    s->bytes = rkv_cache_save_size(s->cache);
    s->image = (unsigned char *)alloc_checked(s->bytes);
    expect_status("save", rkv_cache_save(s->cache, s->image, s->bytes), RKV_OK);
    s->error = poison;
}

/* Behind a call that gave `got`. */
static void still_refused(still *s, rkv_status got, rkv_status want, const char *rule, int layer)
{
    unsigned char *now;
    expect_refusal(rule, got, want, &s->error, layer, -1, -1);
    expect_true("the caller's record", rkv_cache_error(s->cache) == &s->error);
    if (expect_int(rule, 0, (int64_t)rkv_cache_save_size(s->cache), (int64_t)s->bytes)) {
        now = (unsigned char *)alloc_checked(s->bytes);
        expect_status("save", rkv_cache_save(s->cache, now, s->bytes), RKV_OK);
        expect_bytes(rule, now, s->image, s->bytes);
        free(now);
    }
    s->error = poison;
}

static void still_argument(still *s, rkv_status got, const char *rule, int layer)
{
    still_refused(s, got, RKV_ERROR_ARGUMENT, rule, layer);
}

static float cache_rows[3][2 * 64 * CACHE_DIM];
static int32_t cache_blocks[64];

/* Views of the newest tokens, the same for all calls. */
static void cache_views(rkv_tensor views[3])
{
    int kind, i;
    for (kind = 0; kind < 3; kind++) {
        for (i = 0; i < 2 * 64 * CACHE_DIM; i++)
            cache_rows[kind][i] = (float)((i * 37 + kind * 11) % 101) / 50.0f - 1.0f;
        views[kind] = rkv_tensor_make(cache_rows[kind], RKV_F32, kind == 2 ? 2 : 1, 64, CACHE_DIM);
    }
}

static rkv_status cache_append(rkv_cache *cache, int layer, int n)
{
    rkv_tensor views[3];
    cache_views(views);
    return rkv_cache_append(cache, layer, n, &views[0], &views[1], &views[2]);
}

static void cache_feed(rkv_cache *cache, int n)
{
    int l;
    for (l = 0; l < CACHE_LAYERS; l++) expect_status("append", cache_append(cache, l, n), RKV_OK);
}

static still still_make(rkv_cache_config *config, rkv_error *error)
{
    still s;
    memset(&s, 0, sizeof s);
    config->compress.error = error;
    expect_status("create", rkv_cache_create(&s.cache, config), RKV_OK);
    return s;
}

static void still_free(still *s)
{
    rkv_cache_destroy(s->cache);
    free(s->image);
}

/* Rules of append alone, for one view of three. */
/* clang-format off */
static const char *spoil_appended(int which, rkv_tensor *t)
{
    switch (which) {
    case 0: t->data = NULL; return ": it or its data is NULL";
    case 1: t->element_bytes = 2; return ".element_bytes: must be 0 or the dtype's";
    case 2: t->tokens = 2; return ".tokens: fewer than n_tokens";
    case 3: t->dtype = RKV_BF16; return ".dtype: not the cache's";
    case 4: t->heads++; return ".heads: not the cache's";
    case 5: t->dim--; return ".dim: not the cache's";
    default: return NULL;
    }
}
/* clang-format on */

static void test_append(void)
{
    static const char *const view_names[] = { "keys", "values", "queries" };
    rkv_error *error;
    rkv_cache_config config;
    still s;
    rkv_tensor views[3];
    const char *ending;
    char rule[MAX_WORDS];
    int kind, which, own;
    memset(&s, 0, sizeof s);
    error = &s.error;
    config = cache_config(error);
    case_begin("rkv_cache_append: layers and counts");
    expect_status("create", rkv_cache_create(&s.cache, &config), RKV_OK);
    cache_feed(s.cache, 5);
    still_watch(&s);
    still_argument(&s, cache_append(s.cache, -1, 1), "layer: must be in [0, n_layers)", -1);
    still_argument(&s, cache_append(s.cache, CACHE_LAYERS, 1), "layer: must be in [0, n_layers)",
                   -1);
    still_argument(&s, cache_append(s.cache, 1, -1), "n_tokens: must not be negative", 1);
    still_argument(&s, cache_append(s.cache, 1, rkv_cache_room(s.cache, 1) + 1),
                   "n_tokens: more than rkv_cache_room", 1);
    for (kind = 0; kind < 3; kind++)
        for (own = 0; own < 2; own++)
            for (which = 0;; which++) {
                cache_views(views);
                ending =
                    own ? spoil_appended(which, &views[kind]) : spoil_view(which, &views[kind]);
                if (!ending) break;
                snprintf(rule, sizeof rule, "%s%s", view_names[kind], ending);
                case_begin("rkv_cache_append, case %d: %s", which, rule);
                still_argument(&s, rkv_cache_append(s.cache, 1, 3, &views[0], &views[1], &views[2]),
                               rule, 1);
            }
    for (kind = 0; kind < 3; kind++) {
        const rkv_tensor *given[3];
        case_begin("rkv_cache_append: %s NULL, and a negative block", view_names[kind]);
        cache_views(views);
        for (which = 0; which < 3; which++) given[which] = which == kind ? NULL : &views[which];
        snprintf(rule, sizeof rule, "%s: it or its data is NULL", view_names[kind]);
        still_argument(&s, rkv_cache_append(s.cache, 1, 3, given[0], given[1], given[2]), rule, 1);
        for (which = 0; which < 64; which++) cache_blocks[which] = which;
        cache_blocks[2] = -1;
        views[kind].block_table = cache_blocks;
        views[kind].block_tokens = 1;
        still_argument(&s, rkv_cache_append(s.cache, 1, 3, &views[0], &views[1], &views[2]),
                       "keys, values, queries: a block table has a negative block", 1);
    }
    still_free(&s);
}

static void test_rounds(void)
{
    rkv_cache_config config;
    still s;
    int n_evicted = 4711;
    memset(&s, 0, sizeof s);
    config = cache_config(&s.error);
    config.capacity = 40;
    expect_status("create", rkv_cache_create(&s.cache, &config), RKV_OK);
    case_begin("rounds and truncation that are refused");
    cache_feed(s.cache, 20);
    expect_status("append", cache_append(s.cache, 0, 1), RKV_OK);
    still_watch(&s);
    still_argument(&s, rkv_cache_step(s.cache, &n_evicted),
                   "cache: its layers have different numbers of rows", -1);
    expect_int("evicted", 0, n_evicted, 0);
    n_evicted = 4711;
    still_argument(&s, rkv_cache_compress(s.cache, &n_evicted),
                   "cache: its layers have different numbers of rows", -1);
    expect_int("evicted", 1, n_evicted, 0);
    expect_status("truncate", rkv_cache_truncate(s.cache, 18), RKV_OK);
    still_watch(&s);
    n_evicted = 4711;
    still_argument(&s, rkv_cache_compress(s.cache, &n_evicted),
                   "cache: queries that vote are missing, append more tokens", -1);
    expect_int("evicted", 2, n_evicted, 0);
    still_argument(&s, rkv_cache_truncate(s.cache, -1),
                   "position: further back than truncation reaches", -1);
    cache_feed(s.cache, 3);
    expect_status("step", rkv_cache_step(s.cache, &n_evicted), RKV_OK);
    expect_int("evicted", 3, n_evicted, 21 - CACHE_BUDGET);
    still_watch(&s);
    still_argument(&s, rkv_cache_truncate(s.cache, 21 - CACHE_WINDOW - 1),
                   "position: further back than truncation reaches", -1);
    still_argument(&s, rkv_cache_truncate(s.cache, 1),
                   "position: further back than truncation reaches", -1);
    still_free(&s);
}

/* The sentence of a device that refuses a copy, of every call that makes one. */
static void test_refused_copies(void)
{
    rkv_backend backend = *rkv_backend_find(NULL);
    rkv_cache_config config;
    rkv_cache *fork = NULL;
    unsigned char *image;
    const char *rule = "cache: the device refused a copy";
    still s;
    memset(&s, 0, sizeof s);
    backend.copy = scarce_copy;
    backend.copy_rows = scarce_copy_rows;
    config = cache_config(&s.error);
    config.backend = &backend;
    case_begin("a device that refuses copies");
    backend_copies = INT_MAX;
    expect_status("create", rkv_cache_create(&s.cache, &config), RKV_OK);
    cache_feed(s.cache, 10);
    still_watch(&s);
#define REFUSES(call, layer)                                                  \
    do {                                                                      \
        rkv_status got;                                                       \
        backend_copies = 0;                                                   \
        got = call;                                                           \
        backend_copies = INT_MAX;                                             \
        expect_refusal(rule, got, RKV_ERROR_DEVICE, &s.error, layer, -1, -1); \
        s.error = poison;                                                     \
    } while (0)
    REFUSES(cache_append(s.cache, 1, 1), 1);
    REFUSES(rkv_cache_fork(s.cache, &fork), -1);
    expect_true("no fork", fork == NULL);
    image = (unsigned char *)alloc_checked(s.bytes);
    REFUSES(rkv_cache_save(s.cache, image, s.bytes), -1);
    REFUSES(rkv_cache_load(s.cache, s.image, s.bytes), -1);
    expect_int("empty", 0, rkv_cache_rows(s.cache, 0), 0);
    cache_feed(s.cache, 10);
    rule = "cache: the device did not answer, the cache is empty now";
    REFUSES(rkv_cache_compress(s.cache, NULL), -1);
    expect_int("empty", 1, rkv_cache_rows(s.cache, 0), 0);
#undef REFUSES
    free(image);
    still_free(&s);
}

/* ---- snapshots ---- */
static void put_number(unsigned char *at, uint64_t value, int n)
{
    int i;
    for (i = 0; i < n; i++) at[i] = (unsigned char)(value >> (8 * i));
}

/* clang-format off */
static const char *spoil_shape(int which, rkv_cache_config *c)
{
    switch (which) {
    case 0: c->n_layers = 1; return "memory: a snapshot of a cache with another number of layers";
    case 1: c->kv_heads = 2; return "memory: a snapshot of a cache with another number of KV heads";
    case 2: c->query_heads = 3;
            return "memory: a snapshot of a cache with another number of query heads";
    case 3: c->head_dim = 5; c->value_dim = CACHE_DIM;
            return "memory: a snapshot of a cache with another head dim";
    case 4: c->value_dim = 5; return "memory: a snapshot of a cache with another value dim";
    case 5: c->dtype = RKV_F16; return "memory: a snapshot of a cache with another dtype";
    case 6: c->compress.budget = 9; return "memory: a snapshot of a cache with another budget";
    case 7: c->compress.window = 2; return "memory: a snapshot of a cache with another window";
    case 8: c->compress.pinned = 2;
            return "memory: a snapshot of a cache with another number of pinned tokens";
    case 9: c->compress.scope = RKV_PER_LAYER;
            return "memory: a snapshot of a cache with another scope";
    case 10: c->compress.protect = 4;
             return "memory: a snapshot of a cache with another number of protected tokens";
    case 11: c->compress.lambda = 0;
             return "memory: a snapshot of a cache that keeps queries, or does not";
    case 12: c->compress.policy = RKV_POLICY_H2O;
             return "memory: a snapshot of a cache with another policy";
    case 13: c->compress.votes = CACHE_WINDOW + 1;
             return "memory: a snapshot of a cache with another number of votes";
    default: return NULL;
    }
}
/* clang-format on */

/* Into a cache that differs in one number. */
static void test_foreign_snapshots(void)
{
    rkv_error error;
    rkv_cache_config config = cache_config(&error);
    still from = still_make(&config, &error), s;
    int which;
    case_begin("snapshots of other caches");
    cache_feed(from.cache, 10);
    still_watch(&from);
    memset(&s, 0, sizeof s);
    for (which = 0;; which++) {
        const char *rule;
        config = cache_config(&s.error);
        rule = spoil_shape(which, &config);
        if (!rule) break;
        case_begin("shape case %d: %s", which, rule);
        expect_status("create", rkv_cache_create(&s.cache, &config), RKV_OK);
        still_watch(&s);
        still_argument(&s, rkv_cache_load(s.cache, from.image, from.bytes), rule, -1);
        rkv_cache_destroy(s.cache);
    }
    s.cache = NULL;
    still_free(&s);
    still_free(&from);
}

/* After a round: 13 tokens, 8 kept, 5 more. Where its numbers lie in the image. */
enum { AT_VERSION = 8, AT_ROUNDS = 68, AT_EVICTED = 76, AT_SETTLED = 84 };
enum { AT_ROWS = 92, AT_QUERIES = 96, AT_POSITIONS = 92 + 8 * CACHE_LAYERS };

static uint64_t checksum_step(uint64_t sum, uint64_t word)
{
    sum ^= word;
    return (sum << 29 | sum >> 35) * 0x9e3779b97f4a7c15u;
}

/* As rkv.h says it: four sums over 8-byte words in turn, then one over these and the last bytes. */
static uint64_t checksum(const unsigned char *image, size_t bytes)
{
    const size_t n_words = bytes / 32 * 4;
    uint64_t sums[4] = { 1, 2, 3, 4 }, total = bytes;
    size_t word, i;
    for (word = 0; word < n_words; word++) {
        uint64_t value = 0;
        for (i = 8; i-- > 0;) value = value << 8 | image[8 * word + i];
        sums[word % 4] = checksum_step(sums[word % 4], value);
    }
    for (i = 0; i < 4; i++) total = checksum_step(total, sums[i]);
    for (i = 8 * n_words; i < bytes; i++) total = checksum_step(total, image[i]);
    return total;
}

static void test_damaged_snapshots(void)
{
    static const char counters[] = "memory: a damaged snapshot, its counters are impossible";
    static const char rounds[] = "memory: a damaged snapshot, its rounds are impossible";
    static const char settled[] = "memory: a damaged snapshot, its settled rows are impossible";
    static const char positions[] = "memory: a damaged snapshot, its positions are impossible";
    static const struct {
        int at, n_bytes;
        uint64_t value;
        const char *rule;
    } list[] = {
        { 0, 1, 'X', "memory: no snapshot of rkv_cache_save" },
        { AT_VERSION, 4, 1, "memory: a snapshot of another version of rkv.h" },
        { AT_ROUNDS, 8, 0, rounds },
        { AT_ROUNDS, 8, 6, rounds },
        { AT_EVICTED, 8, (uint64_t)1 << 31, rounds },
        { AT_SETTLED, 8, CACHE_BUDGET, settled },
        { AT_ROWS, 4, 0xffffffffu, counters },
        { AT_ROWS, 4, CACHE_BUDGET - CACHE_WINDOW - 1, counters },
        { AT_QUERIES, 4, CACHE_WINDOW + 1, counters },
        { AT_ROWS, 4, CACHE_BUDGET + CACHE_BUFFER + 1,
          "memory: a snapshot of more rows than the cache's capacity" },
        { AT_QUERIES, 4, 0, "memory: no room for the queries that the snapshot still lacks" },
        { AT_ROWS, 4, 9, "bytes: not the size of this snapshot" },
        { AT_POSITIONS + 16, 4, 0, positions },
        { AT_POSITIONS, 4, 1, positions },
        { AT_POSITIONS + 16, 4, 10, positions },
    };
    rkv_cache_config config;
    still s;
    unsigned char *forged;
    size_t i, bytes;
    memset(&s, 0, sizeof s);
    config = cache_config(&s.error);
    case_begin("snapshots that are damaged");
    expect_status("create", rkv_cache_create(&s.cache, &config), RKV_OK);
    cache_feed(s.cache, 12);
    expect_status("step", rkv_cache_step(s.cache, NULL), RKV_OK);
    cache_feed(s.cache, 3);
    still_watch(&s);
    bytes = s.bytes;
    forged = (unsigned char *)alloc_checked(bytes + 1);
    for (i = 0; i < sizeof list / sizeof *list; i++) {
        memcpy(forged, s.image, bytes);
        put_number(forged + list[i].at, list[i].value, list[i].n_bytes);
        put_number(forged + bytes - 8, checksum(forged, bytes - 8), 8);
        still_argument(&s, rkv_cache_load(s.cache, forged, bytes), list[i].rule, -1);
    }
    memcpy(forged, s.image, bytes);
    forged[bytes - 9] ^= 1;
    still_argument(&s, rkv_cache_load(s.cache, forged, bytes),
                   "memory: a damaged snapshot, its checksum differs", -1);
    still_argument(&s, rkv_cache_load(s.cache, NULL, bytes), "memory: is NULL", -1);
    still_argument(&s, rkv_cache_load(s.cache, s.image, 8), "bytes: too few for a snapshot", -1);
    still_argument(&s, rkv_cache_load(s.cache, s.image, 0), "bytes: too few for a snapshot", -1);
    still_argument(&s, rkv_cache_load(s.cache, s.image, AT_POSITIONS),
                   "bytes: too few for a snapshot of this cache", -1);
    still_argument(&s, rkv_cache_load(s.cache, s.image, bytes - 1),
                   "bytes: not the size of this snapshot", -1);
    still_argument(&s, rkv_cache_load(s.cache, s.image, bytes + 1),
                   "bytes: not the size of this snapshot", -1);
    still_argument(&s, rkv_cache_save(s.cache, NULL, bytes), "memory: is NULL", -1);
    memset(forged, 0x5a, bytes);
    still_argument(&s, rkv_cache_save(s.cache, forged, bytes - 1),
                   "bytes: less than rkv_cache_save_size", -1);
    for (i = 0; i < bytes; i++) expect_int("nothing written", (int)i, forged[i], 0x5a);
    expect_status("load", rkv_cache_load(s.cache, s.image, bytes), RKV_OK);
    free(forged);
    still_free(&s);
}

/* What a policy carries, in snapshots that no cache can have written. Its numbers come after the
 * positions. */
static void test_damaged_carried(void)
{
    static const struct {
        rkv_policy policy;
        uint32_t bits; /* of its first number */
        const char *rule;
    } list[] = {
        { RKV_POLICY_MEMORY_PROSE, 0x7fc00000u,
          "memory: a damaged snapshot, its state is impossible" },
        { RKV_POLICY_H2O, 0xbf800000u, "memory: a damaged snapshot, its state is impossible" },
        { RKV_POLICY_TRIATTENTION, 0x7f800000u,
          "memory: a damaged snapshot, its means are impossible" },
    };
    const size_t at = AT_POSITIONS + 4 * CACHE_LAYERS * (CACHE_BUDGET - CACHE_WINDOW);
    size_t i;
    for (i = 0; i < sizeof list / sizeof *list; i++) {
        rkv_cache_config config;
        unsigned char *forged;
        still s;
        memset(&s, 0, sizeof s);
        config = cache_config(&s.error);
        config.compress.policy = list[i].policy;
        config.rope.pairing = RKV_ROPE_HALVES;
        case_begin("carried numbers that are damaged, policy %d", (int)list[i].policy);
        expect_status("create", rkv_cache_create(&s.cache, &config), RKV_OK);
        cache_feed(s.cache, 12);
        expect_status("step", rkv_cache_step(s.cache, NULL), RKV_OK);
        cache_feed(s.cache, 3);
        still_watch(&s);
        forged = (unsigned char *)alloc_checked(s.bytes);
        memcpy(forged, s.image, s.bytes);
        put_number(forged + at, list[i].bits, 4);
        put_number(forged + s.bytes - 8, checksum(forged, s.bytes - 8), 8);
        still_argument(&s, rkv_cache_load(s.cache, forged, s.bytes), list[i].rule, -1);
        free(forged);
        still_free(&s);
    }
}

/* ---- no place for a sentence ---- */
static void test_null_results(void)
{
    rkv_error error = poison;
    rkv_cache_config config = cache_config(&error);
    rkv_layer layer = RKV_INIT;
    rkv_cache *cache = (rkv_cache *)(void *)&layer;
    size_t bytes = 4711;
    int n_evicted = 4711;
    const rkv_error *none = rkv_cache_error(NULL);
    case_begin("config, cache or result NULL");
    expect_status("size", rkv_workspace_size(NULL, NULL, &layer, 1, &bytes), RKV_ERROR_NULL);
    expect_refusal("bytes: is NULL", rkv_workspace_size(NULL, &config.compress, &layer, 0, NULL),
                   RKV_ERROR_NULL, &error, -1, -1, -1);
    expect_status("score", rkv_score(NULL, NULL, &layer, 1, &bytes, 8), RKV_ERROR_NULL);
    expect_status("select", rkv_select(NULL, NULL, &layer, 1, &bytes, 8), RKV_ERROR_NULL);
    expect_status("compact", rkv_compact(NULL, NULL, &layer, 1, &bytes, 8), RKV_ERROR_NULL);
    expect_status("compress", rkv_compress(NULL, NULL, &layer, 1, &bytes, 8), RKV_ERROR_NULL);
    expect_int("bytes", 0, (int64_t)bytes, 4711);
    error = poison;
    expect_refusal("out: is NULL", rkv_cache_create(NULL, &config), RKV_ERROR_NULL, &error, -1, -1,
                   -1);
    expect_status("create", rkv_cache_create(NULL, NULL), RKV_ERROR_NULL);
    expect_status("create", rkv_cache_create(&cache, NULL), RKV_ERROR_NULL);
    expect_true("no cache", cache == NULL);
    expect_status("append", rkv_cache_append(NULL, 0, 0, NULL, NULL, NULL), RKV_ERROR_NULL);
    expect_status("step", rkv_cache_step(NULL, &n_evicted), RKV_ERROR_NULL);
    expect_int("evicted", 0, n_evicted, 0);
    n_evicted = 4711;
    expect_status("compress", rkv_cache_compress(NULL, &n_evicted), RKV_ERROR_NULL);
    expect_int("evicted", 1, n_evicted, 0);
    expect_status("truncate", rkv_cache_truncate(NULL, 0), RKV_ERROR_NULL);
    cache = (rkv_cache *)(void *)&layer;
    expect_status("fork", rkv_cache_fork(NULL, &cache), RKV_ERROR_NULL);
    expect_true("no fork", cache == NULL);
    expect_status("save", rkv_cache_save(NULL, &bytes, 8), RKV_ERROR_NULL);
    expect_status("load", rkv_cache_load(NULL, &bytes, 8), RKV_ERROR_NULL);
    expect_status("threads", rkv_threads_create(NULL, 2), RKV_ERROR_NULL);
    expect_refusal("cache: is NULL", (rkv_status)none->status, RKV_ERROR_NULL, none, -1, -1, -1);
}

/* ---- what is said of the texts themselves ---- */

/* Texts that no call can bring about. */
static const struct {
    const char *words, *why;
} unreachable[] = {
    { "layer.values: it or its data is NULL", "values without data are allowed" },
    { "layer.values.load: RKV_OPAQUE needs a row loader", "values are not read" },
    { "keys.load: RKV_OPAQUE needs a row loader", "a cache holds none" },
    { "values.load: RKV_OPAQUE needs a row loader", "likewise" },
    { "queries.load: RKV_OPAQUE needs a row loader", "likewise" },
    { "layer.queries.tokens: fewer than n_tokens", "queries have a text of their own for it" },
    { "layer.queries: rows overlap, a stride is too small", "queries are only read" },
    { "layer.keys.dtype: not the cache's", "a text of rkv_cache_append" },
    { "layer.keys.heads: not the cache's", "likewise" },
    { "layer.keys.dim: not the cache's", "likewise" },
    { "layer.values.dtype: not the cache's", "likewise" },
    { "layer.values.heads: not the cache's", "likewise" },
    { "layer.values.dim: not the cache's", "likewise" },
    { "layer.queries.dtype: not the cache's", "likewise" },
    { "layer.queries.heads: not the cache's", "likewise" },
    { "layer.queries.dim: not the cache's", "likewise" },
    { "keys: rows overlap, a stride is too small", "what is appended is only read" },
    { "values: rows overlap, a stride is too small", "likewise" },
    { "queries: rows overlap, a stride is too small", "likewise" },
    { RKVI_RULE_LOGITS, "the limits of norms and scale keep logits below 1e38" },
};

/* Texts of one rule that several calls check. */
static const char *const repeated[] = {
    "cache: the device refused a copy", /* create, append, step, fork, save, load */
    "memory: is NULL",                  /* save, load */
    "out: is NULL",                     /* create, fork */
};

/* Functions that return an error without a text. RKV_ERROR_NULL never has one. */
static const struct {
    const char *function, *status, *why;
} silent[] = {
    { "rkvi_nonfinite", "RKV_ERROR_NONFINITE", "writes the worker's record" },
    { "rkvi_cpu_run", "RKV_ERROR_UNSUPPORTED", "a stage that is not in the enum" },
    { "rkvi_cpu_copy_rows", "RKV_ERROR_ARGUMENT", "rkv_cache_append has the text" },
    { "rkv_threads_create", "RKV_ERROR_MEMORY", "there is no config" },
};

static void test_provoked(void)
{
    size_t i;
    int k;
    case_begin("every text of rkv.h is provoked");
    expect_true("there are texts", n_texts > 150);
    for (k = 0; k < n_texts; k++) {
        int excused = 0;
        for (i = 0; i < sizeof unreachable / sizeof *unreachable; i++)
            excused |= strcmp(unreachable[i].words, texts[k].words) == 0;
        if (!texts[k].provoked && !excused)
            case_fail("rkv.h:%d: no test provokes \"%s\"", texts[k].line, texts[k].words);
        if (texts[k].provoked && excused)
            case_fail("rkv.h:%d: provoked after all: \"%s\"", texts[k].line, texts[k].words);
    }
    for (i = 0; i < sizeof unreachable / sizeof *unreachable; i++)
        if (!find_text(unreachable[i].words))
            case_fail("excused, but not in rkv.h: \"%s\"", unreachable[i].words);
}

static void test_one_rule_each(void)
{
    size_t i;
    int k;
    case_begin("no text stands for two rules");
    for (k = 0; k < n_texts; k++) {
        int known = 0;
        for (i = 0; i < sizeof repeated / sizeof *repeated; i++)
            known |= strcmp(repeated[i], texts[k].words) == 0;
        if (texts[k].occurs > 1 && !known)
            case_fail("rkv.h:%d: %d times: \"%s\"", texts[k].line, texts[k].occurs, texts[k].words);
    }
}

/* Does this struct of rkv.h have this field? */
static int has_field(const char *type, const char *field, size_t n)
{
    char open[80], close[80];
    const char *at, *end;
    snprintf(open, sizeof open, "struct %s {", type);
    snprintf(close, sizeof close, "} %s;", type);
    at = strstr(source, open);
    end = at ? strstr(at, close) : NULL;
    if (!end) { /* struct rkv_backend has no typedef with it */
        snprintf(close, sizeof close, "\n};");
        end = at ? strstr(at, close) : NULL;
    }
    for (; end && at + n < end; at++)
        if (strncmp(at, field, n) == 0 && !isalnum((unsigned char)at[-1]) && at[-1] != '_' &&
            !isalnum((unsigned char)at[n]) && at[n] != '_')
            return 1;
    return 0;
}

/* "config.budget", "layer.keys.dtype", "queries.dim", "workspace": a field or an argument. */
static int names_something(const char *place, size_t n)
{
    static const struct {
        const char *name, *type;
    } roots[] = { { "config", "rkv_config" },      { "layer", "rkv_layer" },
                  { "cache", "rkv_cache_config" }, { "backend", "rkv_backend" },
                  { "keys", "rkv_tensor" },        { "values", "rkv_tensor" },
                  { "queries", "rkv_tensor" },     { "rope", "rkv_rope" } };
    static const char *const arguments[] = { "n_layers", "layers", "workspace", "layer", "n_tokens",
                                             "position", "memory", "bytes",     "cache", "backend",
                                             "keys",     "values", "queries",   "out",   "rope",
                                             "means",    "slot",   "n" };
    const char *dot = (const char *)memchr(place, '.', n), *type = NULL;
    size_t first = dot ? (size_t)(dot - place) : n, length, i;
    if (!dot) {
        for (i = 0; i < sizeof arguments / sizeof *arguments; i++)
            if (strlen(arguments[i]) == n && strncmp(arguments[i], place, n) == 0) return 1;
        return 0;
    }
    for (i = 0; i < sizeof roots / sizeof *roots; i++)
        if (strlen(roots[i].name) == first && strncmp(roots[i].name, place, first) == 0)
            type = roots[i].type;
    place += first + 1;
    n -= first + 1;
    dot = (const char *)memchr(place, '.', n);
    length = dot ? (size_t)(dot - place) : n;
    if (!type || !has_field(type, place, length)) return 0;
    return !dot || has_field("rkv_tensor", dot + 1, n - length - 1);
}

/* A text names its fields, a colon follows, and then words; with the largest numbers in front it
 * still fits into the 256 bytes that rkv.h promises. */
static void test_specific(void)
{
    int k;
    case_begin("every text is specific");
    for (k = 0; k < n_texts; k++) {
        const char *words = texts[k].words, *colon = strstr(words, ": "), *at = words;
        rkv_error error = { NULL, RKV_ERROR_ARGUMENT, INT32_MAX, INT32_MAX, INT32_MAX };
        char sentence[2 * MAX_WORDS];
        int specific = colon != NULL;
        while (specific && at < colon) {
            size_t n = strcspn(at, ",:");
            specific = names_something(at, n);
            at += n + (at + n < colon ? strspn(at + n, ", ") : 0);
        }
        if (!specific || strlen(colon) < 7)
            case_fail("rkv.h:%d: names no field: \"%s\"", texts[k].line, words);
        if (words[0] && words[strlen(words) - 1] == '.')
            case_fail("rkv.h:%d: ends in a full stop: \"%s\"", texts[k].line, words);
        error.rule = words;
        if (strlen(rkv_explain(&error, sentence, sizeof sentence)) > 255)
            case_fail("rkv.h:%d: longer than 255: \"%s\"", texts[k].line, words);
    }
}

static void test_silent(void)
{
    size_t i;
    int k;
    case_begin("no error without a text");
    expect_true("there are some", n_bares > 10);
    for (k = 0; k < n_bares; k++) {
        int known = strcmp(bares[k].status, "RKV_ERROR_NULL") == 0;
        for (i = 0; i < sizeof silent / sizeof *silent; i++)
            known |= strcmp(silent[i].function, bares[k].function) == 0 &&
                     strcmp(silent[i].status, bares[k].status) == 0;
        if (!known)
            case_fail("rkv.h:%d: %s returns %s without a text", bares[k].line, bares[k].function,
                      bares[k].status);
    }
}

static void run_on_backend(const rkv_backend *backend)
{
    scene sc;
    int which;
    scene_make(&sc, backend, RKV_PER_HEAD);
    test_config(&sc);
    for (which = 0; which < 3; which++) {
        test_views(&sc, which, spoil_view);
        if (which != 1) test_views(&sc, which, spoil_read_view);
        if (which != 2) test_views(&sc, which, spoil_moved_view);
    }
    test_layers(&sc);
    test_policies(&sc);
    test_data(&sc);
    test_too_large(&sc);
    scene_free(&sc);
    test_sequences(backend);
}

int main(int argc, char **argv)
{
    const char *path = argc > 1 ? argv[1] : "rkv.h";
    const rkv_backend *backends[MAX_BACKENDS];
    const int n = usable_backends(backends);
    scene sc;
    int i;
    source = read_file(path);
    if (source) {
        case_begin("the texts of %s", path);
        read_texts(source);
    } else {
        skip("the texts of rkv.h: there is no file %s", path);
    }
    for (i = 0; i < n; i++) run_on_backend(backends[i]);
    test_means();
    test_create();
    test_create_votes();
    test_create_frequencies();
    test_create_unread_table();
    test_append();
    test_rounds();
    test_refused_copies();
    test_foreign_snapshots();
    test_damaged_snapshots();
    test_damaged_carried();
    test_null_results();
    case_begin("backends");
    scene_make(&sc, NULL, RKV_PER_HEAD);
    sc.backend = rkv_backend_find(NULL);
    test_backends(&sc);
    scene_free(&sc);
    if (source) {
        test_provoked();
        test_one_rule_each();
        test_specific();
        test_silent();
    }
    for (i = 0; i < n_texts; i++) free(texts[i].words);
    free(source);
    return close_tests();
}
