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
    }
    status = beds_end();
    return n_there ? status : 0; /* where there is no model, nothing has failed */
}
