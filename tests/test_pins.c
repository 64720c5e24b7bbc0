/* Rows that must stay: pinned, protected, and by layer.pins; chosen and moved in every scope and
 * layout, against lists made here by hand.
 *     make test        or: build/tests/test_pins */
#include "harness.h"

#include <stdlib.h>
#include <string.h>

static const rkv_backend *backends[MAX_BACKENDS];
static int n_backends;

/* ---- the kept list by hand ---- */

/* Must row i stay, whatever its score? */
static int is_forced(const rkv_config *config, const uint8_t *pins, int n_tokens, int row)
{
    return row < config->pinned || row >= n_tokens - config_protect(config) ||
           (pins && pins[row] != 0);
}

/* The forced rows, then one by one the best of the others; the newest of equals. */
static int keep_by_hand(const rkv_config *config, const float *scores, const uint8_t *pins,
                        int n_tokens, int32_t *kept)
{
    const int n_kept = n_tokens < config->budget ? n_tokens : config->budget;
    char *stays = (char *)alloc_checked((size_t)n_tokens);
    int n = 0, row, best;
    for (row = 0; row < n_tokens; row++) {
        stays[row] = (char)(n_kept == n_tokens || is_forced(config, pins, n_tokens, row));
        n += stays[row];
    }
    for (; n < n_kept; n++) {
        for (row = 0, best = -1; row < n_tokens; row++)
            if (!stays[row] && (best < 0 || scores[row] >= scores[best])) best = row;
        stays[best] = 1;
    }
    for (row = 0, n = 0; row < n_tokens; row++)
        if (stays[row]) kept[n++] = row;
    free(stays);
    expect_int("rows by hand", 0, n, n_kept);
    return n;
}

/* ---- cases ---- */
enum { MAX_LAYERS = 3 };
typedef struct scene {
    rkv_config config;
    job jobs[MAX_LAYERS];
    int n;
} scene;

static void scene_make(scene *sc, rng *r, const rkv_config *config, const shape *given, int n)
{
    int l;
    sc->config = *config;
    sc->n = n;
    for (l = 0; l < n; l++) {
        shape s = *given;
        s.follower = config->scope == RKV_PER_SEQUENCE && l > 0;
        if (config->scope != RKV_PER_SEQUENCE) s.n_tokens -= l; /* lengths of their own */
        job_make(&sc->jobs[l], r, config, &s);
    }
}

static void scene_free(scene *sc)
{
    int l;
    for (l = 0; l < sc->n; l++) job_free(&sc->jobs[l]);
}

/* Lists of all sets of a layer, [sets][budget], from what rkv_score has written. */
static int lists_by_hand(const scene *sc, int l, int32_t *lists)
{
    const job *j = &sc->jobs[l];
    const int n = j->shape.n_tokens - j->window;
    int set, n_kept = 0;
    for (set = 0; set < j->sets; set++) {
        const float *scores =
            sc->config.scope == RKV_PER_HEAD ? job_scores(j) + (ptrdiff_t)set * n : job_shared(j);
        n_kept = keep_by_hand(&sc->config, scores, job_pins(j, set), j->shape.n_tokens,
                              lists + (ptrdiff_t)set * sc->config.budget);
    }
    return n_kept;
}

static void expect_lists(const char *at, const scene *sc, int l, const int32_t *lists, int n_kept)
{
    const job *j = &sc->jobs[l];
    int set;
    for (set = 0; set < j->sets; set++)
        expect_bytes(at, job_kept(j) + (ptrdiff_t)set * sc->config.budget,
                     lists + (ptrdiff_t)set * sc->config.budget, (size_t)n_kept * sizeof(int32_t));
}

/* In three steps and in one: the lists are those made by hand, every row lies where they say, and
 * each byte of pins has gone with its row. */
static void run_case(const rkv_backend *backend, rng *r, const rkv_config *config, const shape *s,
                     int n_layers)
{
    int32_t *lists[MAX_LAYERS];
    int n_kept[MAX_LAYERS], l;
    scene sc;
    scene_make(&sc, r, config, s, n_layers);
    expect_status("score", call_stage(rkv_score, backend, config, sc.jobs, n_layers), RKV_OK);
    for (l = 0; l < n_layers; l++) {
        const int owner = config->scope == RKV_PER_SEQUENCE ? 0 : l;
        if (owner != l) {
            lists[l] = lists[owner];
            n_kept[l] = n_kept[owner];
            continue;
        }
        lists[l] =
            (int32_t *)alloc_checked((size_t)(s->kv_heads * config->budget) * sizeof(int32_t));
        n_kept[l] = lists_by_hand(&sc, l, lists[l]);
    }
    expect_status("select", call_stage(rkv_select, backend, config, sc.jobs, n_layers), RKV_OK);
    for (l = 0; l < n_layers; l++) {
        expect_int("n_kept", l, sc.jobs[l].layer.n_kept, n_kept[l]);
        if (sc.jobs[l].kept.base) expect_lists("selected", &sc, l, lists[l], n_kept[l]);
        job_inputs_unchanged("before compaction", &sc.jobs[l]);
    }
    expect_status("compact", call_stage(rkv_compact, backend, config, sc.jobs, n_layers), RKV_OK);
    for (l = 0; l < n_layers; l++) {
        job_compacted("in three steps", &sc.jobs[l], lists[l], config->budget, n_kept[l]);
        job_guards("in three steps", &sc.jobs[l]);
        job_restore(&sc.jobs[l]);
    }
    expect_status("compress", call_stage(rkv_compress, backend, config, sc.jobs, n_layers), RKV_OK);
    for (l = 0; l < n_layers; l++) {
        if (sc.jobs[l].kept.base) expect_lists("in one", &sc, l, lists[l], n_kept[l]);
        job_compacted("in one", &sc.jobs[l], lists[l], config->budget, n_kept[l]);
        job_guards("in one", &sc.jobs[l]);
    }
    for (l = 0; l < n_layers; l++)
        if (l == 0 || config->scope != RKV_PER_SEQUENCE) free(lists[l]);
    scene_free(&sc);
}

static void random_config(rng *r, rkv_config *config, int scope)
{
    *config = rng_below(r, 2) ? rkv_config_default(0) : rkv_config_paper(0);
    config->scope = (rkv_scope)scope;
    config->window = 1 + rng_below(r, 6);
    config->pinned = rng_below(r, 3) ? rng_below(r, 6) : 0;
    config->protect = rng_below(r, 4) ? rng_below(r, 14) : 0;
    config->budget = config->pinned + config_protect(config) + rng_below(r, 12);
    config->lambda = (float)rng_below(r, 3) / 2.0f;
}

static void random_shape(rng *r, shape *s, const rkv_config *config)
{
    static const int densities[] = { 0, 3, 10, 40, 100 };
    memset(s, 0, sizeof *s);
    s->kv_heads = 1 + rng_below(r, 3);
    s->group = 1 + rng_below(r, 2);
    s->head_dim = 1 + rng_below(r, 12);
    s->n_tokens =
        rng_below(r, 4) ? config->budget + 4 + rng_below(r, 40) : 3 + rng_below(r, config->budget);
    s->capacity = s->n_tokens + rng_below(r, 5);
    s->value_dim = 1 + rng_below(r, 9);
    s->value_bytes = rng_below(r, 2) ? 0 : 1 + rng_below(r, 5);
    s->dtype = (rkv_dtype)rng_below(r, 3);
    s->keys = (layout)rng_below(r, N_KEY_LAYOUTS);
    s->values = (layout)rng_below(r, N_LAYOUTS);
    s->queries = (layout)rng_below(r, N_KEY_LAYOUTS);
    s->kind = (key_kind)rng_below(r, N_KEY_KINDS);
    s->row_stride = rng_below(r, 2) ? 0 : s->capacity + rng_below(r, 7);
    s->pins = RNG_PICK(r, densities);
}

static void test_random(const rkv_backend *backend, int scope, int n_cases)
{
    rng r = rng_seed(80 + (uint64_t)scope);
    int i;
    for (i = 0; i < n_cases; i++) {
        rkv_config config;
        shape s;
        random_config(&r, &config, scope);
        random_shape(&r, &s, &config);
        case_begin("%s, scope %d, case %d: %d tokens, budget %d, pinned %d, protect %d, window %d, "
                   "pins %d %%, %s keys, %s values",
                   backend->name, scope, i, s.n_tokens, config.budget, config.pinned,
                   config.protect, config.window, s.pins, layout_name(s.keys),
                   layout_name(s.values));
        run_case(backend, &r, &config, &s, 1 + rng_below(&r, MAX_LAYERS));
    }
}

/* Every layout of keys with every layout of values. */
static void test_layouts(const rkv_backend *backend)
{
    rng r = rng_seed(90);
    rkv_config config = rkv_config_default(20);
    shape s;
    int keys, values, scope;
    config.window = 3;
    config.protect = 7;
    config.pinned = 2;
    memset(&s, 0, sizeof s);
    s.kv_heads = 2;
    s.group = 2;
    s.head_dim = 6;
    s.n_tokens = 45;
    s.capacity = 48;
    s.pins = 15;
    for (keys = 0; keys < N_KEY_LAYOUTS; keys++)
        for (values = 0; values < N_LAYOUTS; values++)
            for (scope = RKV_PER_HEAD; scope <= RKV_PER_SEQUENCE; scope++) {
                case_begin("%s, scope %d, %s keys, %s values", backend->name, scope,
                           layout_name((layout)keys), layout_name((layout)values));
                s.keys = (layout)keys;
                s.values = (layout)values;
                config.scope = (rkv_scope)scope;
                run_case(backend, &r, &config, &s, 2);
            }
}

/* ---- many rounds: a pinned row never leaves ---- */

/* Between rounds new tokens come, some of them pinned. The true positions of all pinned rows must
 * be there in the end, each with its own key, and the byte of pins must be its own. */
static void test_rounds(const rkv_backend *backend, rkv_scope scope)
{
    enum { TOKENS = 40, BUDGET = 24, DIM = 5, ROUNDS = 12, PROTECT = 6, SETS = 2 };
    rng r = rng_seed(95);
    rkv_config config = rkv_config_default(BUDGET);
    shape s;
    job j;
    int pinned_at[SETS][200], n_pinned[SETS] = { 0, 0 }, next = 0, round, set, row, i, k;
    case_begin("%s, scope %d: pinned rows over %d rounds", backend->name, (int)scope, ROUNDS);
    memset(&s, 0, sizeof s);
    s.kv_heads = SETS;
    s.group = 1;
    s.head_dim = DIM;
    s.n_tokens = TOKENS;
    s.keys = LAYOUT_PAGED_NHD;
    s.pins = 1;
    config.scope = scope;
    config.window = 4;
    config.protect = PROTECT;
    config.pinned = 2;
    job_make(&j, &r, &config, &s);
    memset(j.layer.pins, 0, j.pins.bytes);
    for (round = 0, row = 0; round < ROUNDS; round++) {
        for (; row < TOKENS; row++, next++) {
            for (set = 0; set < SETS; set++) {
                for (i = 0; i < DIM; i++) /* the key says which token it is */
                    view_store_one(&j.keys, set, row, i,
                                   (float)((next + 1) * (i + 1) % 97) + (float)set / 2);
                if (set >= j.sets) continue;
                j.layer.positions[set * TOKENS + row] = next;
                j.layer.pins[set * TOKENS + row] = 0;
                if (n_pinned[set] > 14 || rng_below(&r, 20)) continue;
                j.layer.pins[set * TOKENS + row] = (uint8_t)(1 + next % 255);
                pinned_at[set][n_pinned[set]++] = next;
            }
        }
        j.layer.n_tokens = TOKENS;
        expect_status("round", call_stage(rkv_compress, backend, &config, &j, 1), RKV_OK);
        row = j.layer.n_tokens;
        expect_int("rows", round, row, BUDGET);
        for (set = 0; set < j.sets; set++) {
            const int32_t *positions = j.layer.positions + set * TOKENS;
            for (i = 0; i < n_pinned[set]; i++) {
                for (k = 0; k < BUDGET && positions[k] != pinned_at[set][i]; k++) continue;
                if (!expect_true("the pinned token is there", k < BUDGET)) continue;
                expect_int("its byte", pinned_at[set][i], j.layer.pins[set * TOKENS + k],
                           1 + pinned_at[set][i] % 255);
            }
            for (k = 0; k < BUDGET; k++) {
                float key;
                memcpy(&key, view_at(&j.keys, set, k, 1), sizeof key);
                expect_near("its key", k, (double)key,
                            (positions[k] + 1) * 2 % 97 + (double)set / 2, 0);
                if (k < 2) expect_int("the first ones", k, positions[k], k);
                if (k >= BUDGET - PROTECT)
                    expect_int("the protected ones", k, positions[k], next - BUDGET + k);
            }
        }
    }
    expect_true("some are pinned", n_pinned[0] > 5);
    job_free(&j);
}

/* ---- pins that leave nothing to choose ---- */

enum { LIMIT_PINNED = 2, LIMIT_PROTECT = 5, LIMIT_TOKENS = 30 };

/* The set that is pinned in a case below, and its layer; other sets pin no candidate. */
typedef struct limit {
    const rkv_backend *backend;
    rkv_error error;
    scene scene;
    int layer, set;
} limit;

/* H2O carries a state, which a refusal must leave as it was. */
static void limit_make(limit *t, const rkv_backend *backend, rkv_policy policy, rkv_scope scope,
                       int budget)
{
    rng r = rng_seed(97);
    rkv_config config = rkv_config_default(budget);
    shape s;
    t->backend = backend;
    t->layer = scope != RKV_PER_SEQUENCE;
    t->set = scope == RKV_PER_HEAD;
    config.policy = policy;
    config.scope = scope;
    config.window = 3;
    config.protect = LIMIT_PROTECT;
    config.pinned = LIMIT_PINNED;
    config.error = &t->error;
    memset(&s, 0, sizeof s);
    s.kv_heads = 2;
    s.group = 1;
    s.head_dim = 4;
    s.n_tokens = LIMIT_TOKENS;
    s.capacity = LIMIT_TOKENS + 3;
    s.n_new = 7;
    s.pins = 1;
    scene_make(&t->scene, &r, &config, &s, 2);
}

/* Pins n candidates of the set, and of every set all rows that stay anyway. */
static void limit_pin(limit *t, int n)
{
    job *j = &t->scene.jobs[t->layer];
    const int stride = j->shape.row_stride ? j->shape.row_stride : j->shape.capacity;
    const int end = j->shape.n_tokens - LIMIT_PROTECT;
    int set, row;
    for (set = 0; set < j->sets; set++) {
        uint8_t *pins = j->layer.pins + (ptrdiff_t)set * stride;
        memset(pins, 1, (size_t)stride);
        for (row = LIMIT_PINNED; row < end; row++)
            pins[row] = (uint8_t)(set == t->set && row < LIMIT_PINNED + n);
    }
    block_remember(&j->pins);
}

/* What rkv_score has written is what a later refusal must leave. */
static void limit_score(limit *t)
{
    int l;
    expect_status("score", call_stage(rkv_score, t->backend, &t->scene.config, t->scene.jobs, 2),
                  RKV_OK);
    for (l = 0; l < 2; l++) {
        job *j = &t->scene.jobs[l];
        if (j->scores.base) block_remember(&j->scores);
        if (j->shared.base) block_remember(&j->shared);
        if (j->state.base) block_remember(&j->state);
        j->remembered = j->layer;
    }
}

static void limit_refuses(limit *t, const char *name, stage_function call)
{
    int l;
    memset(&t->error, 0x55, sizeof t->error);
    expect_status(name, call_stage(call, t->backend, &t->scene.config, t->scene.jobs, 2),
                  RKV_ERROR_ARGUMENT);
    expect_true("rule", t->error.rule && !strcmp(t->error.rule, RKVI_RULE_PINS));
    expect_int("layer", 0, t->error.layer, t->layer);
    expect_int("set", 0, t->error.head, t->set);
    expect_int("token", 0, t->error.token, -1);
    for (l = 0; l < 2; l++) job_unchanged(name, &t->scene.jobs[l]);
}

/* The prefix, the pinned rows, the one that is chosen, if there is a place for it, the newest. */
static void limit_keeps(limit *t, int n_pins)
{
    const job *j = &t->scene.jobs[t->layer];
    const int budget = t->scene.config.budget;
    int32_t lists[2 * 32];
    const int32_t *list = lists + t->set * budget;
    int row;
    expect_status("select", call_stage(rkv_select, t->backend, &t->scene.config, t->scene.jobs, 2),
                  RKV_OK);
    expect_int("n_kept", 0, lists_by_hand(&t->scene, t->layer, lists), budget);
    for (row = 0; row < LIMIT_PINNED + n_pins; row++) expect_int("pinned", row, list[row], row);
    for (row = budget - LIMIT_PROTECT; row < budget; row++)
        expect_int("protected", row, list[row], j->shape.n_tokens - budget + row);
    expect_lists("kept", &t->scene, t->layer, lists, budget);
}

/* Pins may take all places but one. Without a place there is nothing to leave: none may be pinned.
 * Pinned and protected rows, and rows behind the last, do not count. */
static void test_limit(const rkv_backend *backend, rkv_policy policy, rkv_scope scope, int budget)
{
    const int places = budget - LIMIT_PINNED - LIMIT_PROTECT;
    int n;
    for (n = places > 1 ? places - 2 : 0; n < places + 2; n++) {
        const int is_refused = n > 0 && n >= places;
        limit t;
        case_begin("%s, policy %d, scope %d: %d pins in %d places", backend->name, (int)policy,
                   (int)scope, n, places);
        limit_make(&t, backend, policy, scope, budget);
        limit_pin(&t, n);
        if (is_refused) limit_refuses(&t, "compress", rkv_compress);
        limit_score(&t);
        if (is_refused)
            limit_refuses(&t, "select", rkv_select);
        else
            limit_keeps(&t, n);
        scene_free(&t.scene);
    }
}

/* A layer within its budget keeps every row and moves none: it may have any pins. */
static void test_keep_all(const rkv_backend *backend, rkv_scope scope)
{
    rng r = rng_seed(99);
    rkv_config config = rkv_config_default(30);
    shape s;
    job j;
    int set, row;
    case_begin("%s, scope %d: every row pinned in a layer that keeps all", backend->name,
               (int)scope);
    config.scope = scope;
    config.protect = 12;
    memset(&s, 0, sizeof s);
    s.kv_heads = 2;
    s.group = 1;
    s.head_dim = 4;
    s.n_tokens = 30;
    s.pins = 1;
    job_make(&j, &r, &config, &s);
    memset(j.layer.pins, 1, j.pins.bytes);
    block_remember(&j.pins);
    expect_status("select", call_stage(rkv_select, backend, &config, &j, 1), RKV_OK);
    expect_status("compact", call_stage(rkv_compact, backend, &config, &j, 1), RKV_OK);
    expect_status("compress", call_stage(rkv_compress, backend, &config, &j, 1), RKV_OK);
    job_inputs_unchanged("nothing moved", &j);
    expect_int("n_tokens", 0, j.layer.n_tokens, 30);
    for (set = 0; set < j.sets; set++)
        for (row = 0; row < 30; row++) expect_int("kept", row, j.layer.kept[set * 30 + row], row);
    j.layer.n_tokens = 7; /* fewer than are protected */
    expect_status("select", call_stage(rkv_select, backend, &config, &j, 1), RKV_OK);
    expect_int("n_kept", 0, j.layer.n_kept, 7);
    job_free(&j);
}

/* Protected tokens do not vote: scores are those of the window alone. */
static void test_protect_does_not_vote(const rkv_backend *backend)
{
    rkv_config config = rkv_config_default(20);
    shape s;
    job a, b;
    rng r;
    case_begin("%s: protected tokens do not vote", backend->name);
    config.window = 4;
    memset(&s, 0, sizeof s);
    s.kv_heads = 2;
    s.group = 2;
    s.head_dim = 8;
    s.n_tokens = 50;
    r = rng_seed(98);
    job_make(&a, &r, &config, &s);
    r = rng_seed(98);
    config.protect = 11;
    job_make(&b, &r, &config, &s);
    expect_status("score", call_stage(rkv_score, backend, &config, &b, 1), RKV_OK);
    config.protect = 0;
    expect_status("score", call_stage(rkv_score, backend, &config, &a, 1), RKV_OK);
    expect_int("bytes of scores", 0, (int64_t)a.scores.bytes, (int64_t)b.scores.bytes);
    expect_bytes("scores", a.scores.data, b.scores.data, a.scores.bytes);
    config.protect = 4; /* no more than the window: the same as none */
    job_restore(&b);
    expect_status("select", call_stages(backend, &config, &b, 1), RKV_OK);
    config.protect = 0;
    job_restore(&a);
    expect_status("select", call_stages(backend, &config, &a, 1), RKV_OK);
    expect_bytes("kept", a.kept.data, b.kept.data, a.kept.bytes);
    job_free(&a);
    job_free(&b);
}

int main(void)
{
    int i, scope;
    n_backends = usable_backends(backends);
    for (i = 0; i < n_backends; i++) {
        test_layouts(backends[i]);
        test_protect_does_not_vote(backends[i]);
        for (scope = RKV_PER_HEAD; scope <= RKV_PER_SEQUENCE; scope++) {
            test_random(backends[i], scope, (int)wanted_cases(200));
            test_rounds(backends[i], (rkv_scope)scope);
            test_keep_all(backends[i], (rkv_scope)scope);
            test_limit(backends[i], RKV_POLICY_RKV, (rkv_scope)scope, 12);
            test_limit(backends[i], RKV_POLICY_H2O, (rkv_scope)scope, 12);
            test_limit(backends[i], RKV_POLICY_RKV, (rkv_scope)scope, 8); /* one place */
            test_limit(backends[i], RKV_POLICY_RKV, (rkv_scope)scope, 7); /* none */
        }
    }
    return close_tests();
}
