/* The engine of the examples: against a plain decoder in double, and its two caches side by side.
 *     make test        or: build/tests/test_engine */
#include "harness.h"

#include "../examples/ponder/managed_cache.h"
#include "../examples/ponder/model.h"
#include "../examples/ponder/own_cache.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    LAYERS = 2,
    DIM = 48,
    HEADS = 6,
    KV_HEADS = 2,
    HEAD_DIM = 8,
    FFN = 40,
    VOCABULARY = 37,
    CONTEXT = 256,
    TOKENS = 24,
    Q_DIM = HEADS * HEAD_DIM,
    KV_DIM = KV_HEADS * HEAD_DIM
};
static const double rope_base = 1000.0, norm_eps = 1e-5;

/* ---- a model of random weights ---- */

typedef struct variant {
    const char *name, *architecture;
    int untied;
} variant;

static const variant variants[] = { { "adjacent pairs, tied output", "llama", 0 },
                                    { "halves, untied output", "exaone", 1 } };

/* Weights follow from tensor's number and element alone, so that the reference needs no file. */
static float weight(int tensor, int i, int is_norm)
{
    rng r = rng_seed((uint64_t)tensor * 1000003u + (uint64_t)i);
    return (float)((is_norm ? 1.0 : 0.0) + 0.2 * rng_normal(&r));
}

enum { T_EMBEDDING, T_OUTPUT, T_NORM, T_LAYER };
enum { L_ATTN_NORM, L_Q, L_K, L_V, L_O, L_FFN_NORM, L_GATE, L_UP, L_DOWN, N_LAYER_TENSORS };
static const struct {
    const char *name;
    int rows, cols; /* rows 0: a norm's vector */
} layer_tensors[N_LAYER_TENSORS] = {
    { "attn_norm", 0, DIM },   { "attn_q", Q_DIM, DIM },      { "attn_k", KV_DIM, DIM },
    { "attn_v", KV_DIM, DIM }, { "attn_output", DIM, Q_DIM }, { "ffn_norm", 0, DIM },
    { "ffn_gate", FFN, DIM },  { "ffn_up", FFN, DIM },        { "ffn_down", DIM, FFN },
};

static int layer_tensor(int layer, int which)
{
    return T_LAYER + layer * N_LAYER_TENSORS + which;
}

static void put(gguf_writer *w, const char *name, int tensor, int rows, int cols)
{
    const int n = (rows > 0 ? rows : 1) * cols;
    float *values = alloc_checked((size_t)n * sizeof *values);
    for (int i = 0; i < n; i++) values[i] = weight(tensor, i, rows == 0);
    gguf_put_tensor(w, name, GGUF_F32, (uint64_t)rows, (uint64_t)cols, values);
    free(values);
}

static void put_number(gguf_writer *w, const char *architecture, const char *key, int number)
{
    char name[96];
    snprintf(name, sizeof name, "%s.%s", architecture, key);
    gguf_put_u32(w, name, (uint32_t)number);
}

static void put_metadata(gguf_writer *w, const char *architecture)
{
    gguf_put_string(w, "general.architecture", architecture);
    put_number(w, architecture, "block_count", LAYERS);
    put_number(w, architecture, "embedding_length", DIM);
    put_number(w, architecture, "feed_forward_length", FFN);
    put_number(w, architecture, "context_length", CONTEXT);
    put_number(w, architecture, "attention.head_count", HEADS);
    put_number(w, architecture, "attention.head_count_kv", KV_HEADS);
    put_number(w, architecture, "rope.freq_base", (int)rope_base);
}

/* skip_tensor: the name of one to leave out, or NULL. */
static model *make_model(const variant *v, const char *skip_tensor, gguf_error *error)
{
    char name[64];
    size_t bytes;
    gguf *g;
    model *m = NULL;
    gguf_writer *w = gguf_writer_create();
    put_metadata(w, v->architecture);
    put(w, "token_embd.weight", T_EMBEDDING, VOCABULARY, DIM);
    put(w, "output_norm.weight", T_NORM, 0, DIM);
    if (v->untied) put(w, "output.weight", T_OUTPUT, VOCABULARY, DIM);
    for (int l = 0; l < LAYERS; l++)
        for (int i = 0; i < N_LAYER_TENSORS; i++) {
            snprintf(name, sizeof name, "blk.%d.%s.weight", l, layer_tensors[i].name);
            if (!skip_tensor || strcmp(name, skip_tensor) != 0)
                put(w, name, layer_tensor(l, i), layer_tensors[i].rows, layer_tensors[i].cols);
        }
    const unsigned char *file = gguf_bytes(w, &bytes);
    if (gguf_parse(&g, file, bytes, error)) {
        model_from_gguf(&m, g, error);
        gguf_close(g);
    }
    gguf_writer_destroy(w);
    return m;
}

/* ---- the reference, in double, one token after another ---- */

typedef struct reference {
    double keys[LAYERS][TOKENS][KV_DIM], values[LAYERS][TOKENS][KV_DIM];
} reference;

static void norm(const double *x, int tensor, double *y)
{
    double square = 0.0;
    for (int i = 0; i < DIM; i++) square += x[i] * x[i];
    for (int i = 0; i < DIM; i++)
        y[i] = x[i] / sqrt(square / DIM + norm_eps) * (double)weight(tensor, i, 1);
}

static void apply(int tensor, int rows, int cols, const double *x, double *y)
{
    for (int r = 0; r < rows; r++) {
        y[r] = 0.0;
        for (int c = 0; c < cols; c++) y[r] += (double)weight(tensor, r * cols + c, 0) * x[c];
    }
}

static void turn(double *x, int n_heads, int position, int halves)
{
    for (int h = 0; h < n_heads; h++)
        for (int i = 0; i < HEAD_DIM / 2; i++) {
            const double angle = position * pow(rope_base, -2.0 * i / HEAD_DIM);
            const int a = h * HEAD_DIM + (halves ? i : 2 * i);
            const int b = halves ? a + HEAD_DIM / 2 : a + 1;
            const double xa = x[a], xb = x[b];
            x[a] = xa * cos(angle) - xb * sin(angle);
            x[b] = xa * sin(angle) + xb * cos(angle);
        }
}

static void attend(const reference *ref, int l, int position, const double *q, double *out)
{
    for (int h = 0; h < HEADS; h++) {
        const int kv = h / (HEADS / KV_HEADS) * HEAD_DIM;
        double p[TOKENS], sum = 0.0;
        for (int t = 0; t <= position; t++) {
            double logit = 0.0;
            for (int i = 0; i < HEAD_DIM; i++)
                logit += q[h * HEAD_DIM + i] * ref->keys[l][t][kv + i];
            sum += p[t] = exp(logit / sqrt((double)HEAD_DIM));
        }
        for (int i = 0; i < HEAD_DIM; i++) {
            out[h * HEAD_DIM + i] = 0.0;
            for (int t = 0; t <= position; t++)
                out[h * HEAD_DIM + i] += p[t] / sum * ref->values[l][t][kv + i];
        }
    }
}

static void reference_step(reference *ref, const variant *v, int token, int position,
                           double *logits)
{
    double x[DIM], y[DIM], q[Q_DIM], out[Q_DIM], gate[FFN], up[FFN];
    const int halves = strcmp(v->architecture, "llama") != 0;
    for (int i = 0; i < DIM; i++) x[i] = (double)weight(T_EMBEDDING, token * DIM + i, 0);
    for (int l = 0; l < LAYERS; l++) {
        norm(x, layer_tensor(l, L_ATTN_NORM), y);
        apply(layer_tensor(l, L_Q), Q_DIM, DIM, y, q);
        apply(layer_tensor(l, L_K), KV_DIM, DIM, y, ref->keys[l][position]);
        apply(layer_tensor(l, L_V), KV_DIM, DIM, y, ref->values[l][position]);
        turn(q, HEADS, position, halves);
        turn(ref->keys[l][position], KV_HEADS, position, halves);
        attend(ref, l, position, q, out);
        apply(layer_tensor(l, L_O), DIM, Q_DIM, out, y);
        for (int i = 0; i < DIM; i++) x[i] += y[i];
        norm(x, layer_tensor(l, L_FFN_NORM), y);
        apply(layer_tensor(l, L_GATE), FFN, DIM, y, gate);
        apply(layer_tensor(l, L_UP), FFN, DIM, y, up);
        for (int i = 0; i < FFN; i++) gate[i] *= up[i] / (1.0 + exp(-gate[i]));
        apply(layer_tensor(l, L_DOWN), DIM, FFN, gate, y);
        for (int i = 0; i < DIM; i++) x[i] += y[i];
    }
    norm(x, T_NORM, y);
    apply(v->untied ? T_OUTPUT : T_EMBEDDING, VOCABULARY, DIM, y, logits);
}

/* ---- the two caches ---- */

static void attend_own(void *user, int layer, int n, const float *q, const float *k, const float *v,
                       float *out)
{
    for (int i = 0; i < n; i++)
        own_cache_attend(user, layer, i, q + i * Q_DIM, k + i * KV_DIM, v + i * KV_DIM,
                         out + i * Q_DIM);
}

/* The first half as a prompt, at once; the rest token by token. */
static void test_against_reference(const variant *v)
{
    enum { PROMPT = TOKENS / 2 };
    static reference ref;
    static double want[TOKENS][VOCABULARY];
    int tokens[TOKENS], positions[TOKENS];
    const char *why;
    policy p;
    gguf_error error = { "" };
    rng r = rng_seed(11);
    case_begin("logits as in double: %s", v->name);
    model *m = make_model(v, NULL, &error);
    policy_make(&p, "full", 1, 1);
    if (expect_true(error.text, m != NULL)) {
        own_cache *c = own_cache_create(model_get_shape(m), &p, TOKENS, &why);
        model_scratch *s = model_scratch_create(m, PROMPT);
        for (int t = 0; t < TOKENS; t++) {
            tokens[t] = rng_below(&r, VOCABULARY);
            positions[t] = t;
            reference_step(&ref, v, tokens[t], t, want[t]);
        }
        for (int t = 0, n = PROMPT; t < TOKENS; t += n, n = 1) {
            const float *logits = model_forward(m, s, n, tokens + t, positions + t, attend_own, c);
            own_cache_advance(c, n);
            for (int i = 0; i < n * VOCABULARY; i++)
                expect_near("logit", t * VOCABULARY + i, (double)logits[i],
                            want[t + i / VOCABULARY][i % VOCABULARY], 2e-4);
        }
        model_scratch_destroy(s);
        own_cache_destroy(c);
        model_free(m);
    }
    case_end();
}

/* Greedy decoding far beyond the budget: both ways of using the library must think the same. */
static void test_caches_agree(const char *method)
{
    enum { BUDGET = 24, BUFFER = 8, LENGTH = 200 };
    gguf_error error;
    const char *why = "";
    policy p;
    managed_cache managed;
    case_begin("own buffers and rkv_cache give the same logits: %s", method);
    model *m = make_model(&variants[0], NULL, &error);
    policy_make(&p, method, BUDGET, BUFFER);
    own_cache *own = own_cache_create(model_get_shape(m), &p, 1, &why);
    expect_true(why, own != NULL);
    expect_status("create", managed_cache_create(&managed, model_get_shape(m), &p, 1), RKV_OK);
    model_scratch *s = model_scratch_create(m, 1), *s2 = model_scratch_create(m, 1);
    for (int position = 0, token = 1; own && position < LENGTH; position++) {
        float *a = model_forward(m, s, 1, &token, &position, attend_own, own);
        float *b = model_forward(m, s2, 1, &token, &position, managed_cache_attend, &managed);
        expect_status("advance", own_cache_advance(own, 1), RKV_OK);
        expect_status("step", managed_cache_step(&managed, NULL), RKV_OK);
        expect_bytes("logits", a, b, VOCABULARY * sizeof *a);
        expect_int("rows", position, rkv_cache_rows(managed.rows, 0), own->n_rows);
        expect_true("bounded", own->n_rows < BUDGET + BUFFER);
        token = (model_choose(a, VOCABULARY, 0.0f, NULL) + position) % VOCABULARY;
    }
    model_scratch_destroy(s);
    model_scratch_destroy(s2);
    managed_cache_destroy(&managed);
    own_cache_destroy(own);
    model_free(m);
    case_end();
}

/* Every policy holds no more rows than it says, and true positions, ascending. */
static void test_policies(void)
{
    enum { BUDGET = 24, BUFFER = 8, LENGTH = 120 };
    gguf_error error;
    model *m = make_model(&variants[0], NULL, &error);
    model_scratch *s = model_scratch_create(m, 1);
    for (int i = 1; policy_name(i); i++) {
        const char *why = "";
        policy p;
        case_begin("bounded, positions true: %s", policy_name(i));
        expect_true("made", policy_make(&p, policy_name(i), BUDGET, BUFFER));
        own_cache *c = own_cache_create(model_get_shape(m), &p, 1, &why);
        expect_true(why, c != NULL);
        for (int position = 0; c && position < LENGTH; position++) {
            const int token = position * 7 % VOCABULARY;
            model_forward(m, s, 1, &token, &position, attend_own, c);
            expect_status("advance", own_cache_advance(c, 1), RKV_OK);
        }
        const int step = p.config.scope == RKV_PER_HEAD ? 1 : KV_HEADS; /* heads of one set */
        for (int set = 0; c && set < LAYERS * KV_HEADS; set += step) {
            const int32_t *positions = c->positions + set * c->capacity;
            for (int row = 1; row < c->n_rows; row++)
                expect_true("ascending", positions[row - 1] < positions[row]);
            expect_int("newest", set, positions[c->n_rows - 1], LENGTH - 1);
        }
        if (c) expect_int("peak", 0, c->peak_rows, BUDGET + BUFFER);
        own_cache_destroy(c);
        case_end();
    }
    model_scratch_destroy(s);
    model_free(m);
}

static void test_refusals(void)
{
    static const char *const names[] = { "blk.0.attn_k.weight", "blk.1.ffn_norm.weight" };
    for (int i = 0; i < 2; i++) {
        gguf_error error = { "" };
        case_begin("a model without %s", names[i]);
        expect_true("refused", make_model(&variants[0], names[i], &error) == NULL);
        expect_true(error.text, strstr(error.text, names[i]) != NULL);
        case_end();
    }
    gguf_error error = { "" };
    const variant foreign = { "", "mamba", 0 };
    case_begin("a foreign architecture");
    expect_true("refused", make_model(&foreign, NULL, &error) == NULL);
    expect_true(error.text, strstr(error.text, "architecture") != NULL);
    case_end();
}

static void test_choice(void)
{
    prng r = { 5 };
    int count[3] = { 0 };
    case_begin("a temperature draws by the softmax");
    for (int i = 0; i < 30000; i++) {
        float logits[3] = { 0.0f, logf(2.0f), logf(5.0f) };
        count[model_choose(logits, 3, 1.0f, &r)]++;
    }
    expect_near("share", 0, count[0] / 30000.0, 1.0 / 8, 0.01);
    expect_near("share", 1, count[1] / 30000.0, 2.0 / 8, 0.01);
    expect_near("share", 2, count[2] / 30000.0, 5.0 / 8, 0.01);
    case_end();
}

int main(void)
{
    for (size_t i = 0; i < sizeof variants / sizeof *variants; i++)
        test_against_reference(&variants[i]);
    test_caches_agree("rkv");
    test_caches_agree("rkv-paper");
    test_caches_agree("streaming");
    test_policies();
    test_refusals();
    test_choice();
    return close_tests();
}
