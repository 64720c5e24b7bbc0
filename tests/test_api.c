/* The functions around the method: presets, texts, registry, workspace sizes, kept lists.
 *     make test        or: build/tests/test_api */
#include "harness.h"

#include <limits.h>
#include <pthread.h>
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
    expect_int("protect", 0, config_protect(&c), window);
    expect_int("pool", 0, c.pool ? c.pool : 7, pool);
    expect_int("recent", 0, c.recent ? c.recent : 1, 1);
    expect_int("pinned", 0, c.pinned, pinned);
    expect_near("lambda", 0, (double)c.lambda, lambda, 1e-7);
    expect_near("threshold", 0, (double)c.threshold, 0.5, 0);
    expect_true("no threads", !c.parallel_for && !c.pool_handle && c.n_threads <= 1);
    expect_true("no records", !c.error && !c.device_error);
}

static void test_presets(void)
{
    rkv_config c = rkv_config_default(100);
    int budget;
    expect_config("default", c, 8, 7, 0, 0.1);
    expect_true("the published code", c.scope == RKV_PER_HEAD && c.variant == RKV_PUBLISHED);
    c = rkv_config_paper(100);
    expect_config("paper", c, 8, 7, 0, 0.1);
    expect_true("the paper's equations", c.scope == RKV_PER_LAYER && c.variant == RKV_PAPER);
    expect_config("snapkv", rkv_config_snapkv(100), 8, 7, 0, 1);
    expect_config("streaming", rkv_config_streaming(100), 96, 7, 4, 0.1);
    case_begin("preset streaming, of every small budget");
    for (budget = 1; budget < 12; budget++) {
        rkv_layer none = RKV_INIT;
        size_t bytes = 0;
        c = rkv_config_streaming(budget);
        expect_int("pinned", budget, c.pinned, budget > 4 ? 4 : 0);
        expect_int("window", budget, c.window, budget - c.pinned);
        expect_status("valid", rkv_workspace_size(NULL, &c, &none, 0, &bytes), RKV_OK);
    }
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

/* What rkv_explain ought to write, by printf. */
static void explain_by_hand(const rkv_error *error, char *text, size_t size)
{
    const char *const names[3] = { "layer", "head", "token" };
    const int32_t numbers[3] = { error->layer, error->head, error->token };
    size_t at = 0;
    int i;
    for (i = 0; i < 3; i++)
        if (error->rule && numbers[i] >= 0)
            at += (size_t)snprintf(text + at, size - at, "%s%s %ld", at ? ", " : "", names[i],
                                   (long)numbers[i]);
    snprintf(text + at, size - at, "%s%s", at ? ": " : "",
             error->rule ? error->rule : rkv_status_string((rkv_status)error->status));
}

/* The sentence in memory of every size, between guards, which are behind the first `size` bytes. */
static void expect_explained(const rkv_error *error, const char *want)
{
    size_t length = strlen(want), size;
    for (size = 0; size <= length + 3; size++) {
        block memory;
        const char *got;
        size_t written = size > length ? length + 1 : size;
        block_make(&memory, size, 0, size % 2 == 0);
        got = rkv_explain(error, (char *)memory.data, size);
        if (size == 0)
            expect_true("an empty text without memory", got && !*got);
        else if (expect_true("returns its text", got == (const char *)memory.data) &&
                 expect_bytes("text", got, want, written - 1))
            expect_int("final zero", (int)size, got[written - 1], 0);
        memcpy(memory.image + (memory.data - memory.base), memory.data, written);
        block_unchanged("bytes behind the text", &memory);
        block_free(&memory);
    }
}

static void test_explain(void)
{
    static const int32_t numbers[] = { -1, 0, 9, 10, 1234567890, INT32_MAX, INT32_MIN };
    static const char *const rules[] = { NULL, "", "layer.keys: a key is NaN" };
    enum { N = (int)(sizeof numbers / sizeof *numbers) };
    rkv_error error = RKV_INIT;
    char want[256], text[8] = "before";
    int layer, head, token, rule;
    case_begin("rkv_explain, every place and size");
    for (rule = 0; rule < 3; rule++)
        for (layer = 0; layer < N; layer++)
            for (head = 0; head < N; head++)
                for (token = 0; token < N; token++) {
                    error.rule = rules[rule];
                    error.status = (layer + head + token) % (RKV_ERROR_DEVICE + 2);
                    error.layer = numbers[layer];
                    error.head = numbers[head];
                    error.token = numbers[token];
                    explain_by_hand(&error, want, sizeof want);
                    expect_explained(&error, want);
                }
    error.rule = rules[2];
    error.layer = 3;
    error.head = 1;
    error.token = 17;
    expect_explained(&error, "layer 3, head 1, token 17: layer.keys: a key is NaN");
    error.layer = error.head = -1;
    expect_explained(&error, "token 17: layer.keys: a key is NaN");
    case_begin("rkv_explain of no record, and into no memory");
    expect_explained(NULL, rkv_status_string(RKV_OK));
    expect_true("no memory", rkv_explain(&error, NULL, 100) && !*rkv_explain(&error, NULL, 100));
    rkv_explain(&error, text, 0);
    expect_bytes("size 0", text, "before", 7);
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

/* Strides as they are given; 0 where it is a broadcast is refused (see test_refusals.c). */
static void test_tensor_strided(void)
{
    float data[64];
    rkv_tensor t = rkv_tensor_strided(data, RKV_F16, 2, 3, 4, 4, 8, 1);
    rkv_layer layer = RKV_INIT;
    rkv_config config = rkv_config_streaming(2);
    size_t bytes = 0;
    case_begin("rkv_tensor_strided");
    expect_true("data", t.data == data && t.block_table == NULL);
    expect_int("dtype", 0, t.dtype, RKV_F16);
    expect_int("heads", 0, t.heads, 2);
    expect_int("tokens", 0, t.tokens, 3);
    expect_int("dim", 0, t.dim, 4);
    expect_int("head_stride", 0, t.head_stride, 4);
    expect_int("token_stride", 0, t.token_stride, 8);
    expect_int("dim_stride", 0, t.dim_stride, 1);
    layer.keys = rkv_tensor_strided(data, RKV_F16, 1, 3, 4, 0, 4, 1); /* of one head: no matter */
    layer.n_tokens = 3;
    expect_status("a stride of one step", rkv_workspace_size(NULL, &config, &layer, 1, &bytes),
                  RKV_OK);
    layer.keys = rkv_tensor_strided(data, RKV_F16, 2, 3, 4, 0, 4, 1);
    expect_status("two heads in one", rkv_workspace_size(NULL, &config, &layer, 1, &bytes),
                  RKV_ERROR_ARGUMENT);
    layer.keys = rkv_tensor_strided(data, RKV_F16, 1, 3, 4, 12, 0, 1);
    expect_status("three tokens in one", rkv_workspace_size(NULL, &config, &layer, 1, &bytes),
                  RKV_ERROR_ARGUMENT);
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

/* ---- kept lists: rkv_apply_kept, rkv_moves, rkv_evicted_runs ---- */
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

/* Values that are not there: dim 0 and no data, whatever else their view says. */
static void test_no_values(void)
{
    int32_t table[1] = { 0 };
    rkv_config config = rkv_config_default(16);
    rkv_layer layer = RKV_INIT;
    size_t plain = 0, bytes = 0;
    case_begin("no values, but a block table for them");
    layer.keys = rkv_tensor_make(NULL, RKV_F32, 1, 32, 8);
    layer.queries = rkv_tensor_make(NULL, RKV_F32, 1, 8, 8);
    layer.n_tokens = 32;
    expect_status("none", rkv_workspace_size(NULL, &config, &layer, 1, &plain), RKV_OK);
    layer.values.block_table = table; /* block_tokens stays 0 */
    expect_status("table", rkv_workspace_size(NULL, &config, &layer, 1, &bytes), RKV_OK);
    expect_int("bytes", 0, (int64_t)bytes, (int64_t)plain);
    case_end();
}

static void test_apply(void)
{
    enum { N = 40, MAX_BYTES = 12 };
    rng r = rng_seed(49);
    int32_t kept[N];
    int trial, i;
    case_begin("rkv_apply_kept");
    for (trial = 0; trial < 500; trial++) {
        int n = 1 + rng_below(&r, N), n_kept = random_kept(&r, kept, n);
        size_t size = (size_t)(1 + rng_below(&r, MAX_BYTES)), b;
        block rows;
        block_make(&rows, (size_t)n * size, (size_t)rng_below(&r, 2), rng_below(&r, 2));
        for (b = 0; b < rows.bytes; b++) rows.data[b] = (unsigned char)rng_next(&r);
        block_remember(&rows);
        expect_int("returns n_kept", trial, rkv_apply_kept(rows.data, size, kept, n_kept), n_kept);
        for (i = 0; i < n_kept; i++) {
            unsigned char *image = rows.image + (rows.data - rows.base);
            expect_bytes("a kept row", rows.data + (size_t)i * size, image + (size_t)kept[i] * size,
                         size);
        }
        /* the rows behind the kept ones are as they were */
        for (i = 0; i < n_kept; i++)
            memcpy(rows.image + (rows.data - rows.base) + (size_t)i * size,
                   rows.data + (size_t)i * size, size);
        block_unchanged("rows behind", &rows);
        block_free(&rows);
    }
    expect_int("an empty list", 0, rkv_apply_kept(NULL, 4, NULL, 0), 0);
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
        int n = rkv_moves(kept, n_kept, moves, N), at_most = rng_below(&r, N), stay = 0,
            n_moved = 0;
        expect_true("count", n >= 0 && n <= n_kept);
        while (stay < n_kept && kept[stay] == stay) stay++;
        for (i = 0; i < N; i++) rows[i] = i;
        for (i = 0; i < n; i++) {
            expect_true("towards the front", moves[i].dst < moves[i].src && moves[i].count > 0);
            if (i)
                expect_true("maximal runs", moves[i].src > moves[i - 1].src + moves[i - 1].count);
            for (k = 0; k < moves[i].count; k++) rows[moves[i].dst + k] = rows[moves[i].src + k];
            n_moved += moves[i].count;
        }
        expect_bytes("rows moved by hand", rows, kept, (size_t)n_kept * sizeof *rows);
        expect_int("rows that stay are left out", trial, n_moved, n_kept - stay);
        memset(first, 0x55, sizeof first);
        memset(moves + n, 0x55, (size_t)(N + 1 - n) * sizeof *moves);
        if (at_most < n) memset(moves + at_most, 0x55, (size_t)(N + 1 - at_most) * sizeof *moves);
        expect_int("count, cut short", trial, rkv_moves(kept, n_kept, first, at_most), n);
        expect_bytes("no more than max_moves", first, moves, sizeof first);
        expect_int("count alone", trial, rkv_moves(kept, n_kept, NULL, 0), n);
    }
    expect_int("no moves wanted", 0, rkv_moves(kept, 0, NULL, 0), 0);
    expect_int("an empty list", 0, rkv_moves(NULL, 0, moves, N), 0);
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
        expect_int("count alone", trial,
                   rkv_evicted_runs(kept, n_kept, n_tokens, with ? positions : NULL, NULL, 0), n);
    }
    expect_int("no rows", 0, rkv_evicted_runs(NULL, 0, 0, NULL, NULL, 0), 0);
    expect_int("nothing kept", 0, rkv_evicted_runs(NULL, 0, 5, NULL, runs, 1), 1);
    expect_true("one run of all", runs[0].begin == 0 && runs[0].end == 5);
}

/* Each pair and each entry looked at by itself. */
static int is_sound(const int32_t *kept, int n_kept, int64_t n_rows)
{
    int i, j;
    for (i = 0; i < n_kept; i++) {
        if (kept[i] < 0 || kept[i] >= n_rows) return 0;
        for (j = 0; j < i; j++)
            if (kept[j] >= kept[i]) return 0;
    }
    return 1;
}

/* What the three of them say of one list, and that a refused one writes nothing. */
static void expect_judged(const int32_t *kept, int n_kept, int n_tokens, const int32_t *positions)
{
    enum { N = 16 };
    int32_t array[N], array_before[N];
    rkv_move moves[N];
    rkv_run runs[N];
    unsigned char poison[N * sizeof(rkv_move)];
    const int sound = is_sound(kept, n_kept, INT32_MAX), within = is_sound(kept, n_kept, n_tokens);
    int ascends = 1, i;
    for (i = 0; positions && i + 1 < n_tokens; i++) ascends &= positions[i] < positions[i + 1];
    for (i = 0; i < N; i++) array[i] = array_before[i] = 100 + i;
    memset(moves, 0x55, sizeof moves);
    memset(runs, 0x55, sizeof runs);
    memset(poison, 0x55, sizeof poison);
    if (!sound) {
        expect_int("rkv_apply_kept", 0, rkv_apply_kept(array, sizeof *array, kept, n_kept), -1);
        expect_bytes("nothing written", array, array_before, sizeof array);
        expect_int("rkv_moves", 0, rkv_moves(kept, n_kept, moves, N), -1);
        expect_bytes("nothing written", moves, poison, sizeof moves);
    } else {
        expect_true("rkv_moves takes it", rkv_moves(kept, n_kept, moves, N) >= 0);
        if (is_sound(kept, n_kept, N)) /* else it reaches behind the array */
            expect_int("takes it", 0, rkv_apply_kept(array, sizeof *array, kept, n_kept), n_kept);
    }
    if (within && ascends) {
        expect_true("rkv_evicted_runs takes it",
                    rkv_evicted_runs(kept, n_kept, n_tokens, positions, runs, N) >= 0);
        return;
    }
    expect_int("rkv_evicted_runs", 0, rkv_evicted_runs(kept, n_kept, n_tokens, positions, runs, N),
               -1);
    expect_bytes("nothing written", runs, poison, sizeof runs);
}

/* Lists that ascend, repeat, fall, are negative or leave the range; positions likewise. */
static void test_unsound_lists(void)
{
    enum { N = 12 };
    static const int32_t wild[] = { -1, INT32_MIN, INT32_MAX, INT32_MAX - 1, 13, 1000 };
    rng r = rng_seed(53);
    int32_t kept[N], positions[N];
    int trial, i, n_sound = 0;
    case_begin("lists that are sound, and those that are not");
    for (trial = 0; trial < 20000; trial++) {
        int n_tokens = 1 + rng_below(&r, N), n_kept = random_kept(&r, kept, n_tokens);
        int spoilt = rng_below(&r, 4), with = rng_below(&r, 2);
        for (i = 0; i < n_tokens; i++) positions[i] = 3 * i - 2;
        if (spoilt == 1 && n_kept) kept[rng_below(&r, n_kept)] = RNG_PICK(&r, wild);
        if (spoilt == 2 && n_kept) kept[rng_below(&r, n_kept)] = rng_below(&r, n_tokens + 1);
        if (spoilt == 3) positions[rng_below(&r, n_tokens)] = rng_below(&r, 3 * N) - 2;
        n_sound += is_sound(kept, n_kept, n_tokens);
        expect_judged(kept, n_kept, n_tokens, with ? positions : NULL);
    }
    expect_true("both kinds came up", n_sound > 5000 && n_sound < 19000);
    case_begin("lists that are not there");
    kept[0] = 0;
    expect_int("rkv_apply_kept: no list", 0, rkv_apply_kept(positions, 4, NULL, 1), -1);
    expect_int("rkv_apply_kept: no array", 0, rkv_apply_kept(NULL, 4, kept, 1), -1);
    expect_int("rkv_apply_kept: a negative count", 0, rkv_apply_kept(positions, 4, kept, -1), -1);
    expect_int("rkv_moves: no list", 0, rkv_moves(NULL, 1, NULL, 0), -1);
    expect_int("rkv_moves: a negative count", 0, rkv_moves(kept, -1, NULL, 0), -1);
    expect_int("rkv_evicted_runs: no list", 0, rkv_evicted_runs(NULL, 1, 5, NULL, NULL, 0), -1);
    expect_int("rkv_evicted_runs: a negative count", 0,
               rkv_evicted_runs(kept, -1, 5, NULL, NULL, 0), -1);
    expect_int("rkv_evicted_runs: more than there are", 0,
               rkv_evicted_runs(kept, 1, 0, NULL, NULL, 0), -1);
}

/* ---- registry ---- */
static rkv_status fake_result;
static rkv_config fake_seen;
static rkv_stage fake_stage;
static const rkv_layer *fake_layers;
static const void *fake_workspace;

static rkv_status fake_run(const rkv_backend *self, const rkv_call *call)
{
    fake_seen = *call->config;
    fake_stage = call->stage;
    fake_layers = call->layers;
    fake_workspace = call->workspace;
    expect_int("layers passed on", 0, call->n_layers, 1);
    expect_true("its own table and context", self->context == &fake_result);
    expect_int("workspace passed on", 0, (int64_t)call->bytes, 100);
    return fake_result;
}

static rkv_status fake_size(const rkv_backend *self, const rkv_config *config,
                            const rkv_layer *layers, int n_layers, size_t *bytes)
{
    (void)self, (void)layers, (void)n_layers;
    fake_seen = *config;
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
    b.run = fake_run;
    return b;
}

/* Threads that ask for the best path at the same time; none has asked before. */
enum { N_ASKING = 8 };
static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;

static void *ask_for_best(void *answer)
{
    pthread_mutex_lock(&gate);
    pthread_mutex_unlock(&gate);
    *(const rkv_backend **)answer = rkv_backend_find(NULL);
    return NULL;
}

static void test_find_at_once(void)
{
    pthread_t threads[N_ASKING];
    const rkv_backend *answers[N_ASKING] = { NULL };
    int i;
    case_begin("rkv_backend_find(NULL) from several threads, for the first time");
    pthread_mutex_lock(&gate);
    for (i = 0; i < N_ASKING; i++)
        expect_int("thread", i, pthread_create(&threads[i], NULL, ask_for_best, &answers[i]), 0);
    pthread_mutex_unlock(&gate);
    for (i = 0; i < N_ASKING; i++) pthread_join(threads[i], NULL);
    for (i = 0; i < N_ASKING; i++)
        expect_true("the same for all", answers[i] && answers[i] == rkv_backend_find(NULL));
}

static void test_lookup(const rkv_backend *const *list, int n)
{
    int i;
    case_begin("rkv_backend_find");
    expect_true("NULL is the best path", rkv_backend_find(NULL) == list[0]);
    expect_true("scalar is everywhere", rkv_backend_find("scalar") != NULL);
    expect_true("unknown name", rkv_backend_find("no such path") == NULL);
    expect_true("part of a name", rkv_backend_find("scala") == NULL);
    expect_true("empty name", rkv_backend_find("") == NULL);
    for (i = 0; i < n; i++) {
        const rkv_backend *b = list[i];
        expect_true("found by its name", rkv_backend_find(b->name) == b);
        expect_true("computes", b->run && b->workspace_size);
        expect_true("holds memory", b->alloc && b->free && b->copy && b->copy_rows &&
                                        b->fill_positions && b->synchronize);
    }
}

/* Statuses of a backend come back as they are, and it sees a config without zeros. */
static void test_dispatch(const rkv_backend *fake)
{
    static const rkv_status statuses[] = { RKV_OK, RKV_ERROR_UNSUPPORTED, RKV_ERROR_DEVICE,
                                           RKV_ERROR_NONFINITE };
    static const stage_function calls[] = { rkv_score, rkv_select, rkv_compact, rkv_compress };
    rng r = rng_seed(52);
    rkv_config config = RKV_INIT;
    char workspace[100];
    size_t bytes = 0;
    shape s;
    job j;
    size_t i;
    int stage;
    case_begin("calls on a registered backend");
    memset(&s, 0, sizeof s);
    s.kv_heads = s.group = 1;
    s.head_dim = 8;
    s.n_tokens = 40;
    config.budget = 20;
    job_make(&j, &r, &config, &s);
    j.layer.n_kept = 20;
    for (i = 0; i < sizeof statuses / sizeof *statuses; i++)
        for (stage = RKV_SCORE; stage <= RKV_COMPRESS; stage++) {
            fake_result = statuses[i];
            fake_workspace = NULL;
            expect_status("call", calls[stage](fake, &config, &j.layer, 1, workspace, 100),
                          statuses[i]);
            expect_int("stage", 0, fake_stage, stage);
            expect_true("layers", fake_layers == &j.layer && fake_workspace == workspace);
        }
    for (i = 0; i < 2; i++) {
        if (i) memset(&fake_seen, 0, sizeof fake_seen);
        if (i) rkv_workspace_size(fake, &config, &j.layer, 1, &bytes);
        expect_int("window", (int)i, fake_seen.window, 8);
        expect_int("protect", (int)i, fake_seen.protect, 8);
        expect_int("pool", (int)i, fake_seen.pool, 7);
        expect_int("recent", (int)i, fake_seen.recent, 1);
        expect_int("n_threads", (int)i, fake_seen.n_threads, 1);
    }
    expect_int("bytes", 0, (int64_t)bytes, 100);
    config.protect = 11;
    rkv_workspace_size(fake, &config, &j.layer, 1, &bytes);
    expect_int("protect", 2, fake_seen.protect, 11);
    config.protect = 3;
    rkv_workspace_size(fake, &config, &j.layer, 1, &bytes);
    expect_int("protect below the window", 3, fake_seen.protect, 8);
    memset(&fake_seen, 0, sizeof fake_seen);
    config.budget = 0;
    expect_status("checked before", rkv_compress(fake, &config, &j.layer, 1, workspace, 100),
                  RKV_ERROR_ARGUMENT);
    expect_int("not called", 0, fake_seen.window, 0);
    job_free(&j);
}

static void expect_register(const char *at, const rkv_backend *backend, rkv_status want)
{
    rkv_error error = { "before", 77, 7, 7, 7 };
    expect_status(at, rkv_backend_register(backend, &error), want);
    expect_int("record: status", 0, error.status, want);
    expect_true("record: rule", (error.rule != NULL) == (want != RKV_OK));
    expect_true("record: no place", error.layer == -1 && error.head == -1 && error.token == -1);
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
    expect_register("new", &first, RKV_OK);
    expect_true("found", rkv_backend_find("fake") == &first);
    expect_true("not the default", rkv_backend_find(NULL) != &first);
    expect_register("replaced", &second, RKV_OK);
    expect_true("the new one", rkv_backend_find("fake") == &second);
    expect_register("NULL", NULL, RKV_ERROR_ARGUMENT);
    broken = fake_backend(NULL);
    expect_register("nameless", &broken, RKV_ERROR_ARGUMENT);
    broken.name = "";
    expect_register("empty name", &broken, RKV_ERROR_ARGUMENT);
    broken.name = "scalar";
    expect_register("built-in name", &broken, RKV_ERROR_ARGUMENT);
    broken.name = "broken";
    broken.run = NULL;
    expect_register("no run", &broken, RKV_ERROR_ARGUMENT);
    broken.run = fake_run;
    broken.workspace_size = NULL;
    expect_register("no workspace_size", &broken, RKV_ERROR_ARGUMENT);
    expect_true("not there", rkv_backend_find("broken") == NULL);
    test_dispatch(&second);
    case_begin("a full registry");
    for (i = 0, taken = 1; i < 20; i++) {
        rkv_status status;
        snprintf(names[i], sizeof names[i], "fake%d", i);
        many[i] = fake_backend(names[i]);
        status = rkv_backend_register(&many[i], NULL); /* no record wanted */
        expect_status("register", status, taken < 16 ? RKV_OK : RKV_ERROR_MEMORY);
        taken += status == RKV_OK;
    }
    expect_int("registered in all", 0, taken, 16);
    expect_register("replacing still works", &first, RKV_OK);
    expect_true("replaced", rkv_backend_find("fake") == &first);
}

static void test_threads(void)
{
    rkv_threads *threads = NULL;
    rkv_config config = rkv_config_default(10);
    int n;
    case_begin("rkv_threads");
    expect_status("no result", rkv_threads_create(NULL, 2), RKV_ERROR_NULL);
    for (n = -1; n < 2; n++) {
        threads = NULL;
        expect_status("at least one", rkv_threads_create(&threads, n < 0 ? INT_MIN : n), RKV_OK);
        rkv_threads_use(threads, &config);
        expect_int("n_threads", n, config.n_threads, 1);
        rkv_threads_destroy(threads);
    }
    expect_status("three", rkv_threads_create(&threads, 3), RKV_OK);
    rkv_threads_use(threads, &config);
    expect_int("n_threads", 0, config.n_threads, 3);
    expect_true("parallel_for", config.parallel_for != NULL);
    rkv_threads_use(NULL, &config);
    expect_true("none", !config.parallel_for && !config.pool_handle && config.n_threads <= 1);
    rkv_threads_destroy(threads);
    rkv_threads_destroy(NULL);
}

int main(void)
{
    const rkv_backend *backends[MAX_BACKENDS];
    int n, i;
    test_find_at_once(); /* before anybody else asks */
    n = usable_backends(backends);
    test_presets();
    test_status_strings();
    test_explain();
    test_tensor_make();
    test_tensor_strided();
    for (i = 0; i < n; i++) test_workspace_growth(backends[i]);
    test_no_values();
    test_apply();
    test_moves();
    test_runs();
    test_unsound_lists();
    test_lookup(backends, n);
    test_threads();
    test_register();
    return close_tests();
}
