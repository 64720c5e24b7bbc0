/* real.c - examples/llama/rkv_llama.h with models that others have trained, where there are any.
 * make test-llama        (needs llama.cpp: make llama-cpp; models: make llama-models) */
#include "bed.h"
#include "stats.h"
#include "tokens.h"

#define RKV_LLAMA_IMPLEMENTATION
#include "rkv_llama.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

const char program_name[] = "llama_real";

typedef struct real_model {
    const char *path;
    int budget, buffer, n_tokens; /* of text */
    double worse;                 /* the most that eviction may add to the loss, nats a token */
} real_model;

/* Gemma 3's sliding window of 512 tokens must fit into the budget. */
static const real_model models[] = {
    { REAL_MODELS "/smollm2-135m.gguf", 160, 32, 420, 0.5 },
    { REAL_MODELS "/gemma3-270m.gguf", 640, 64, 780, 0.5 },
};

static int is_there(const char *path)
{
    FILE *file = fopen(path, "rb");
    if (file) fclose(file);
    return file != NULL;
}

/* The start of the project's own README. */
static void read_tokens(token_list *list, const bed *b)
{
    char *text = read_text("README.md");
    tokens_add_text(list, llama_model_get_vocab(b->model), text, 1, 0);
    free(text);
}

/* All outputs, or the last one. */
static int decode_text(bed *b, int begin, llama_token *tokens, int n, int all)
{
    if (all) return decode_tokens(b, 0, begin, tokens, n);
    if (b->r) return rkv_llama_decode(b->r, llama_batch_get_one(tokens, n));
    return llama_decode(b->ctx, llama_batch_get_one(tokens, n));
}

/* Decodes the text and returns the mean loss of its tokens from the first round on. */
static double read_all(bed *b, const token_list *text, const real_model *m)
{
    enum { PART = 128 };
    const int first = m->budget + m->buffer, last = m->n_tokens - 1;
    double sum = 0;
    int i, k, n;
    for (i = 0; i < last; i += n) {
        const int is_scored = i >= first - 1, end = is_scored ? last : first - 1;
        n = end - i < PART ? end - i : PART;
        if (decode_text(b, i, text->at + i, n, is_scored) != 0) {
            case_fail("decode at %d: %s", i, b->r ? rkv_llama_error(b->r) : "llama.cpp");
            return NAN;
        }
        for (k = 0; k < n && is_scored; k++) {
            const float *logits =
                b->r ? rkv_llama_logits(b->r, k) : llama_get_logits_ith(b->ctx, k);
            sum += log_sum_exp(logits, b->n_vocab) - logits[text->at[i + k + 1]];
        }
    }
    return sum / (m->n_tokens - first);
}

static void test_hook(const real_model *m)
{
    setup s = setup_of(TINY_LLAMA, -1, 0);
    token_list text = { NULL, 0, 0 };
    bed with, without;
    int i;
    case_begin("%s: equal logits with the hook, nothing evicted", m->path);
    s.path = m->path;
    bed_open(&with, &s);
    s.is_plain = 1;
    bed_open(&without, &s);
    expect_int("attach", 0, with.attached, 0);
    read_tokens(&text, &with);
    for (i = 0; i < 120; i += i < 100 ? 100 : 1) {
        expect_int("decode", i, decode_tokens(&with, 0, i, text.at + i, i < 100 ? 100 : 1), 0);
        expect_int("decode", i, decode_tokens(&without, 0, i, text.at + i, i < 100 ? 100 : 1), 0);
        expect_same_logits("logits", &with, &without);
    }
    free(text.at);
    bed_close(&with);
    bed_close(&without);
    case_end();
}

static void test_rounds(const real_model *m)
{
    enum { GOES_ON = 64 };
    setup s = setup_of(TINY_LLAMA, m->budget, m->buffer);
    token_list text = { NULL, 0, 0 };
    rkv_llama_counters c;
    bed full, small;
    double full_loss, small_loss;
    llama_token token, last = -1;
    int i, n_changes = 0;
    case_begin("%s: rounds", m->path);
    s.path = m->path;
    s.n_ctx = m->budget + m->buffer;
    bed_open(&small, &s);
    s.is_plain = 1;
    s.n_ctx = m->n_tokens;
    bed_open(&full, &s);
    read_tokens(&text, &full);
    full_loss = read_all(&full, &text, m);
    small_loss = read_all(&small, &text, m);
    expect_true("the model knows the language", full_loss < 0.5 * log(full.n_vocab));
    expect_near("loss, full cache and small", 0, small_loss, full_loss, m->worse);
    for (i = 0; i < GOES_ON; i++) {
        token = arg_max(llama_get_logits_ith(small.ctx, -1), small.n_vocab);
        n_changes += token != last;
        last = token;
        if (decode_tokens(&small, 0, m->n_tokens - 1 + i, &token, 1) != 0) {
            case_fail("token %d: %s", i, rkv_llama_error(small.r));
            break;
        }
    }
    expect_true("the text goes on", n_changes > GOES_ON / 2);
    c = rkv_llama_get_counters(small.r);
    expect_true("rounds", c.n_rounds >= 3);
    expect_true("bounded", c.peak_live <= m->budget + m->buffer);
    expect_int("tokens", 0, c.n_live + c.n_evicted, m->n_tokens - 1 + GOES_ON);
    free(text.at);
    bed_close(&full);
    bed_close(&small);
    case_end();
}

/* Turns a key back by a description and returns its largest distance to `first`, in parts of the
 * key's length; writes `first` where is_first is set. */
static double turned_back(const rkv_rope *rope, int dim, int position, const float *x,
                          double *first, int is_first)
{
    double worst = 0, square = 0;
    int f, i;
    for (f = 0; f < dim / 2; f++) {
        const int halves = rope->pairing == RKV_ROPE_HALVES, turned = f < rope->dims / 2;
        const int a = halves ? f : 2 * f, b = halves ? f + dim / 2 : 2 * f + 1;
        const double angle = turned ? -position * (double)rope->frequencies[f] : 0;
        const double now[2] = { (double)x[a] * cos(angle) - (double)x[b] * sin(angle),
                                (double)x[a] * sin(angle) + (double)x[b] * cos(angle) };
        for (i = 0; i < 2; i++) {
            double *at = &first[i ? b : a];
            if (is_first) *at = now[i];
            worst = fmax(worst, fabs(now[i] - *at));
            square += now[i] * now[i];
        }
    }
    return worst / sqrt(square);
}

/* One token over and over: its keys in a layer differ by their positions alone, but for small
 * differences of what attention makes of equal values. Quantised keys are in another basis. */
static void test_rope(const real_model *m)
{
    enum { N = 150, MOST = 512 }; /* fewer than any budget */
    const rkv_config config = rkv_config_memory_traces(m->budget);
    setup s = setup_of(TINY_LLAMA, m->budget, m->buffer);
    llama_token tokens[N];
    bed b;
    int l, i;
    case_begin("%s: keys of one token, turned back, are equal", m->path);
    s.path = m->path;
    s.n_ctx = m->budget + m->buffer;
    s.keys = GGML_TYPE_F32;
    s.options.config = &config;
    for (i = 0; i < N; i++) tokens[i] = 1000;
    bed_open(&b, &s);
    expect_int("decode", 0, decode_tokens(&b, 0, 0, tokens, N), 0);
    for (l = 0; l < b.r->n_layers; l++) {
        const rkvli_layer *layer = &b.r->layers[l];
        float keys[MOST] = { 0 };
        double first[MOST], worst = 0;
        expect_true("whole heads", layer->rope.dims == layer->dim && layer->keys->ne[0] <= MOST);
        for (i = 0; i < N && layer->keys->ne[0] <= MOST; i++) {
            read_row(layer->keys, b.r->sequences[0].cells[layer->group][i], keys);
            worst = fmax(worst, turned_back(&layer->rope, layer->dim, i, keys, first, i == 0));
        }
        expect_near("turned back", l, worst, 0,
                    l                                    ? 0.1
                    : layer->keys->type == GGML_TYPE_F32 ? 1e-4
                                                         : 1e-3);
    }
    bed_close(&b);
    s.keys = GGML_TYPE_Q8_0;
    bed_open(&b, &s);
    expect_refusal("quantised keys", &b, decode_tokens(&b, 0, 0, tokens, 10), "quantised caches");
    bed_close(&b);
    case_end();
}

int main(void)
{
    size_t i, n_there = 0;
    int status;
    beds_begin();
    for (i = 0; i < sizeof models / sizeof *models; i++) {
        if (!is_there(models[i].path)) {
            skip("%s: not there, make llama-models fetches it", models[i].path);
            continue;
        }
        n_there++;
        test_hook(&models[i]);
        test_rounds(&models[i]);
        test_rope(&models[i]);
    }
    status = beds_end();
    return n_there ? status : 0; /* where there is no model, nothing has failed */
}
