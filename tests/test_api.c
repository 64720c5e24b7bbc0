/* The doors around the method: presets, status texts, registry, workspace sizes, moves and runs.
 *     make test        or: build/tests/test_api */
#include "harness.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- presets and texts ---- */
static void expect_config(const char *name, rkv_config c, int window, int pool, int pinned,
                          double lambda)
{
    case_begin("preset %s", name);
    expect_int("budget", 0, c.budget, 100);
    expect_int("window", 0, config_window(&c), window);
    expect_int("pool", 0, c.pool ? c.pool : 7, pool);
    expect_int("recent", 0, c.recent ? c.recent : 1, 1);
    expect_int("pinned", 0, c.pinned, pinned);
    expect_near("lambda", 0, (double)c.lambda, lambda, 1e-7);
    expect_int("order", 0, c.order, RKV_BY_POSITION);
    expect_true("no threads, no fault", !c.parallel_for && !c.fault && c.n_threads <= 1);
}

static void test_presets(void)
{
    rkv_config c = rkv_config_default(100);
    expect_config("default", c, 8, 7, 0, 0.1);
    expect_near("threshold", 0, (double)c.threshold, 0.5, 0);
    expect_true("the published code",
                c.scope == RKV_PER_HEAD && c.pooling == RKV_POOL_AFTER_MEAN &&
                    c.grouping == RKV_GROUP_MAX && c.redundancy == RKV_REDUNDANCY_ROW &&
                    c.span == RKV_SPAN_ALL && c.column0 == RKV_COLUMN0_EXEMPT);
    c = rkv_config_paper(100);
    expect_config("paper", c, 8, 7, 0, 0.1);
    expect_near("threshold", 0, (double)c.threshold, 0.5, 0);
    expect_true("the paper's equations",
                c.scope == RKV_PER_LAYER && c.pooling == RKV_POOL_BEFORE_MEAN &&
                    c.grouping == RKV_GROUP_MAX && c.redundancy == RKV_REDUNDANCY_OWN &&
                    c.span == RKV_SPAN_CANDIDATES);
    expect_config("snapkv", rkv_config_snapkv(100), 8, 7, 0, 1);
    expect_config("h2o", rkv_config_h2o(100), 1, 1, 0, 1);
    c = rkv_config_streaming(100);
    case_begin("preset streaming");
    expect_int("pinned", 0, c.pinned, 4);
    expect_int("window", 0, c.window, 96);
    expect_int("budget", 0, c.budget, 100);
}

static void test_status_strings(void)
{
    int a, b;
    case_begin("status strings");
    for (a = 0; a <= RKV_ERROR_DEVICE; a++) {
        const char *text = rkv_status_string((rkv_status)a);
        if (!expect_true("a text", text != NULL && *text)) continue;
        for (b = 0; b < a; b++)
            expect_true("distinct texts", strcmp(text, rkv_status_string((rkv_status)b)) != 0);
    }
    expect_true("unknown status", rkv_status_string((rkv_status)99) != NULL);
}

static void test_tensor_make(void)
{
    float data[24];
    rkv_tensor t = rkv_tensor_make(data, RKV_BF16, 2, 3, 4);
    case_begin("rkv_tensor_make");
    expect_true("data", t.data == data);
    expect_int("dtype", 0, t.dtype, RKV_BF16);
    expect_int("heads", 0, t.heads, 2);
    expect_int("tokens", 0, t.tokens, 3);
    expect_int("dim", 0, t.dim, 4);
    expect_true("no table", t.block_table == NULL);
    expect_int("element_bytes", 0, t.element_bytes ? t.element_bytes : 2, 2);
    expect_int("dim_stride", 0, t.dim_stride ? t.dim_stride : 1, 1);
    expect_int("token_stride", 0, t.token_stride ? t.token_stride : 4, 4);
    expect_int("head_stride", 0, t.head_stride ? t.head_stride : 12, 12);
}

/* ---- workspace sizes ---- */
/* A layer of n tokens in memory that does not exist: sizes must not read it. */
static rkv_layer absent_layer(int index, int n_tokens, int window)
{
    uintptr_t step = UINTPTR_MAX / 16, nowhere = 4096 + (uintptr_t)index * 3 * step;
    rkv_layer l = RKV_INIT;
    l.keys = rkv_tensor_make((void *)nowhere, RKV_F16, 8, n_tokens, 128);
    l.values = rkv_tensor_make((void *)(nowhere + step), RKV_F16, 8, n_tokens, 128);
    l.queries = rkv_tensor_make((void *)(nowhere + 2 * step), RKV_F16, 32, window, 128);
    l.n_tokens = n_tokens;
    return l;
}

static size_t size_for(const rkv_backend *backend, const rkv_config *config, int n_tokens,
                       int n_layers)
{
    rkv_layer layers[4];
    size_t bytes = 0;
    int i;
    for (i = 0; i < n_layers; i++) layers[i] = absent_layer(i, n_tokens, config_window(config));
    expect_status("rkv_workspace_size",
                  rkv_workspace_size(backend, config, layers, n_layers, &bytes), RKV_OK);
    return bytes;
}

/* The same with NULL for every data pointer. */
static size_t size_of_shapes(const rkv_backend *backend, const rkv_config *config, int n_tokens,
                             int n_layers)
{
    rkv_layer layers[4];
    size_t bytes = 0;
    int i;
    for (i = 0; i < n_layers; i++) {
        layers[i] = absent_layer(i, n_tokens, config_window(config));
        layers[i].keys.data = layers[i].values.data = layers[i].queries.data = NULL;
    }
    expect_status("rkv_workspace_size",
                  rkv_workspace_size(backend, config, layers, n_layers, &bytes), RKV_OK);
    return bytes;
}

static void test_workspace_growth(const rkv_backend *backend)
{
    static const int lengths[] = { 1, 8, 9, 64, 129, 1000, 1152, 4224, 65536, 1 << 20, 1 << 26 };
    size_t before = 0, now, i;
    rkv_config config = rkv_config_default(1024);
    int k;
    case_begin("%s: workspace never shrinks", backend->name);
    config.budget = 8;
    for (i = 0; i < sizeof lengths / sizeof *lengths; i++, before = now) {
        if (sizeof(size_t) < 8 && lengths[i] > 65536) break; /* more than there are addresses */
        now = size_for(backend, &config, lengths[i], 1);
        expect_true("in n_tokens", now >= before);
    }
    for (k = 1, before = 0; k <= 4; k++, before = now) {
        now = size_for(backend, &config, 2000, k);
        expect_true("in n_layers", now >= before);
    }
    for (k = 0, before = 0; k <= 64; k++, before = now) {
        config.n_threads = k;
        config.parallel_for = reversed_for;
        now = size_for(backend, &config, 2000, 2);
        expect_true("in n_threads", now >= before);
    }
    case_begin("%s: workspace of buffers that are not there yet", backend->name);
    now = size_for(backend, &config, 2000, 2);
    expect_int("bytes", 0, (int64_t)size_of_shapes(backend, &config, 2000, 2), (int64_t)now);
    case_begin("%s: workspace grows in proportion", backend->name);
    config = rkv_config_default(1024);
    before = size_for(backend, &config, 1 << 16, 1);
    now = size_for(backend, &config, 1 << 17, 1);
    expect_true("twice the tokens, at most twice the bytes", now <= 2 * before);
}

/* ---- moves and runs ---- */
/* Random ascending subset of n rows. */
static int random_kept(rng *r, int32_t *kept, int n)
{
    int n_kept = 0, row, stay = rng_below(r, 2);
    for (row = 0; row < n; row++) {
        if (rng_below(r, 4) == 0) stay = !stay;
        if (stay) kept[n_kept++] = row;
    }
    return n_kept;
}

static void test_moves(void)
{
    enum { N = 60 };
    rng r = rng_seed(50);
    int32_t kept[N], rows[N];
    rkv_move moves[N + 1], first[N + 1];
    int trial, i, k;
    case_begin("rkv_moves");
    for (trial = 0; trial < 500; trial++) {
        int n_kept = random_kept(&r, kept, 1 + rng_below(&r, N));
        int n = rkv_moves(kept, n_kept, moves, N), at_most = rng_below(&r, N);
        expect_true("count", n >= 0 && n <= n_kept);
        for (i = 0; i < N; i++) rows[i] = i;
        for (i = 0; i < n; i++) {
            expect_true("towards the front", moves[i].dst < moves[i].src && moves[i].count > 0);
            if (i)
                expect_true("maximal runs", moves[i].src > moves[i - 1].src + moves[i - 1].count);
            for (k = 0; k < moves[i].count; k++) rows[moves[i].dst + k] = rows[moves[i].src + k];
        }
        expect_bytes("rows moved by hand", rows, kept, (size_t)n_kept * sizeof *rows);
        memset(first, 0x55, sizeof first);
        memset(moves + n, 0x55, (size_t)(N + 1 - n) * sizeof *moves);
        if (at_most < n) memset(moves + at_most, 0x55, (size_t)(N + 1 - at_most) * sizeof *moves);
        expect_int("count, cut short", trial, rkv_moves(kept, n_kept, first, at_most), n);
        expect_bytes("no more than max_moves", first, moves, sizeof first);
    }
    expect_int("no moves wanted", 0, rkv_moves(kept, 0, NULL, 0), 0);
}

static void test_runs(void)
{
    enum { N = 60 };
    rng r = rng_seed(51);
    int32_t kept[N], positions[N];
    rkv_run runs[N + 1];
    int trial, i, k, row;
    case_begin("rkv_evicted_runs");
    for (trial = 0; trial < 500; trial++) {
        int n_tokens = 1 + rng_below(&r, N), n_kept = random_kept(&r, kept, n_tokens);
        int with = rng_below(&r, 2), at_most = rng_below(&r, N + 1), n;
        int expected = 0, position = 0;
        rkv_run want[N + 1];
        for (row = 0; row < n_tokens; row++)
            positions[row] = with ? position += 1 + rng_below(&r, 3) : row;
        for (row = 0, k = 0; row < n_tokens; row++) {
            int is_kept = k < n_kept && kept[k] == row;
            if (is_kept)
                k++;
            else if (row > 0 && expected && want[expected - 1].end == positions[row - 1] + 1)
                want[expected - 1].end = positions[row] + 1;
            else {
                want[expected].begin = positions[row];
                want[expected++].end = positions[row] + 1;
            }
        }
        memset(runs, 0x55, sizeof runs);
        n = rkv_evicted_runs(kept, n_kept, n_tokens, with ? positions : NULL, runs, at_most);
        expect_int("count", trial, n, expected);
        for (i = 0; i < expected && i < at_most; i++) {
            expect_int("begin", i, runs[i].begin, want[i].begin);
            expect_int("end", i, runs[i].end, want[i].end);
        }
        expect_int("no more than max_runs", i, runs[i].begin, 0x55555555);
    }
}

/* ---- registry ---- */
static rkv_status fake_result;
static rkv_config fake_seen;

static rkv_status fake_stage(const rkv_backend *self, const rkv_config *config, rkv_layer *layers,
                             int n_layers, void *workspace, size_t bytes)
{
    (void)layers, (void)workspace;
    fake_seen = *config;
    expect_int("layers handed on", 0, n_layers, 1);
    expect_true("its own table and context", self->context == &fake_result);
    expect_true("workspace handed on", bytes >= 100);
    return fake_result;
}

static rkv_status fake_size(const rkv_backend *self, const rkv_config *config,
                            const rkv_layer *layers, int n_layers, size_t *bytes)
{
    (void)self, (void)config, (void)layers, (void)n_layers;
    *bytes = 100;
    return RKV_OK;
}

static rkv_backend fake_backend(const char *name)
{
    rkv_backend b;
    memset(&b, 0, sizeof b);
    b.name = name;
    b.context = &fake_result;
    b.workspace_size = fake_size;
    b.score = b.select = b.compact = b.compress = fake_stage;
    return b;
}

static void test_lookup(const rkv_backend *const *list, int n)
{
    int i, k, seen = 0;
    case_begin("rkv_backend_find and _at");
    expect_true("NULL is the best path", rkv_backend_find(NULL) == list[0]);
    expect_true("scalar is everywhere", rkv_backend_find("scalar") != NULL);
    expect_true("unknown name", rkv_backend_find("no such path") == NULL);
    expect_true("empty name", rkv_backend_find("") == NULL);
    for (i = 0; rkv_backend_at(i); i++) {
        const rkv_backend *b = rkv_backend_at(i);
        expect_true("found by its name", rkv_backend_find(b->name) == b);
        expect_true("stages",
                    b->score && b->select && b->compact && b->compress && b->workspace_size);
        for (k = 0; k < n; k++) seen += b == list[k];
    }
    expect_int("all usable ones listed", 0, seen, n);
    expect_true("behind the last", rkv_backend_at(i) == NULL && rkv_backend_at(i + 5) == NULL);
    expect_true("before the first", rkv_backend_at(-1) == NULL);
}

/* Statuses of a backend come back as they are, and it sees a config without zeros. */
static void test_dispatch(const rkv_backend *fake)
{
    static const rkv_status statuses[] = { RKV_OK, RKV_ERROR_UNSUPPORTED, RKV_ERROR_DEVICE,
                                           RKV_ERROR_NONFINITE };
    rng r = rng_seed(52);
    rkv_config config = RKV_INIT;
    char workspace[100];
    shape s;
    job j;
    size_t i;
    case_begin("calls on a registered backend");
    memset(&s, 0, sizeof s);
    s.kv_heads = s.group = 1;
    s.head_dim = 8;
    s.n_tokens = 40;
    config.budget = 20;
    job_make(&j, &r, &config, &s);
    for (i = 0; i < sizeof statuses / sizeof *statuses; i++) {
        fake_result = statuses[i];
        expect_status("rkv_compress", rkv_compress(fake, &config, &j.layer, 1, workspace, 100),
                      statuses[i]);
        expect_status("rkv_score", rkv_score(fake, &config, &j.layer, 1, workspace, 100),
                      statuses[i]);
        expect_status("rkv_select", rkv_select(fake, &config, &j.layer, 1, workspace, 100),
                      statuses[i]);
    }
    expect_int("window", 0, fake_seen.window, 8);
    expect_int("pool", 0, fake_seen.pool, 7);
    expect_int("recent", 0, fake_seen.recent, 1);
    expect_true("n_threads", fake_seen.n_threads >= 1);
    config.budget = 0;
    expect_status("checked before", rkv_compress(fake, &config, &j.layer, 1, workspace, 100),
                  RKV_ERROR_ARGUMENT);
    job_free(&j);
}

/* Comes last: what is registered stays. */
static void test_register(void)
{
    static rkv_backend first, second, broken, many[20];
    static char names[20][16];
    int i, taken;
    case_begin("rkv_backend_register");
    first = fake_backend("fake");
    second = fake_backend("fake");
    expect_status("new", rkv_backend_register(&first), RKV_OK);
    expect_true("found", rkv_backend_find("fake") == &first);
    expect_true("not the default", rkv_backend_find(NULL) != &first);
    expect_status("replaced", rkv_backend_register(&second), RKV_OK);
    expect_true("the new one", rkv_backend_find("fake") == &second);
    expect_status("NULL", rkv_backend_register(NULL), RKV_ERROR_ARGUMENT);
    broken = fake_backend(NULL);
    expect_status("nameless", rkv_backend_register(&broken), RKV_ERROR_ARGUMENT);
    broken.name = "";
    expect_status("empty name", rkv_backend_register(&broken), RKV_ERROR_ARGUMENT);
    broken.name = "scalar";
    expect_status("built-in name", rkv_backend_register(&broken), RKV_ERROR_ARGUMENT);
    broken.name = "broken";
    broken.select = NULL;
    expect_status("missing stage", rkv_backend_register(&broken), RKV_ERROR_ARGUMENT);
    expect_true("not there", rkv_backend_find("broken") == NULL);
    test_dispatch(&second);
    case_begin("a full registry");
    for (i = 0, taken = 1; i < 20; i++) {
        rkv_status status;
        snprintf(names[i], sizeof names[i], "fake%d", i);
        many[i] = fake_backend(names[i]);
        status = rkv_backend_register(&many[i]);
        expect_status("register", status, taken < 16 ? RKV_OK : RKV_ERROR_MEMORY);
        taken += status == RKV_OK;
    }
    expect_int("registered in all", 0, taken, 16);
    expect_status("replacing still works", rkv_backend_register(&first), RKV_OK);
    expect_true("replaced", rkv_backend_find("fake") == &first);
}

static void test_threads(void)
{
    rkv_threads *threads = NULL;
    rkv_config config = rkv_config_default(10);
    case_begin("rkv_threads");
    expect_status("none", rkv_threads_create(&threads, 0), RKV_ERROR_ARGUMENT);
    expect_status("no result", rkv_threads_create(NULL, 2), RKV_ERROR_ARGUMENT);
    expect_status("one", rkv_threads_create(&threads, 1), RKV_OK);
    rkv_threads_destroy(threads);
    expect_status("three", rkv_threads_create(&threads, 3), RKV_OK);
    rkv_threads_use(threads, &config);
    expect_int("n_threads", 0, config.n_threads, 3);
    expect_true("parallel_for", config.parallel_for != NULL);
    rkv_threads_destroy(threads);
    rkv_threads_destroy(NULL);
}

int main(void)
{
    const rkv_backend *backends[MAX_BACKENDS];
    int n = usable_backends(backends), i;
    test_presets();
    test_status_strings();
    test_tensor_make();
    for (i = 0; i < n; i++) test_workspace_growth(backends[i]);
    test_moves();
    test_runs();
    test_lookup(backends, n);
    test_threads();
    test_register();
    return close_tests();
}
