/* minimal.c - text without end from a llama.cpp context of fixed size.
 * make llama && build/llama-minimal model.gguf "Tell me a story." 1024 */
#define RKV_IMPLEMENTATION
#define RKV_LLAMA_IMPLEMENTATION
#include "rkv_llama.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BUDGET = 768, BUFFER = 128, MAX_PROMPT = 4096 };

static int fail(const char *what)
{
    fprintf(stderr, "llama-minimal: %s\n", what);
    return 1;
}

static void quiet(enum ggml_log_level level, const char *text, void *user)
{
    (void)user;
    if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

static void print_token(const struct llama_vocab *vocab, llama_token token)
{
    char text[256];
    const int n = llama_token_to_piece(vocab, token, text, (int)sizeof text, 0, false);
    if (n > 0) fwrite(text, 1, (size_t)n, stdout);
    fflush(stdout);
}

int main(int argc, char **argv)
{
    static llama_token tokens[MAX_PROMPT];
    const int n_tokens = argc > 3 ? atoi(argv[3]) : 1024;
    rkv_llama_options options = { 0 };
    rkv_llama *r;
    if (argc < 3) return fail("usage: llama-minimal model.gguf prompt [tokens]");
    llama_log_set(quiet, NULL);
    ggml_backend_load_all();
    struct llama_model *model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) return fail("the model cannot be loaded");
    const struct llama_vocab *vocab = llama_model_get_vocab(model);

    options.budget = BUDGET;
    options.buffer = BUFFER;
    const char *wrong = rkv_llama_create(&r, &options);
    if (wrong) return fail(wrong);
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = BUDGET + BUFFER;
    rkv_llama_hook(r, &params);
    struct llama_context *ctx = llama_init_from_model(model, params);
    if (!ctx) return fail("no context");
    if (rkv_llama_attach(r, ctx) != 0) return fail(rkv_llama_error(r));

    struct llama_sampler *sampler = llama_sampler_init_greedy();
    int n = llama_tokenize(vocab, argv[2], (int)strlen(argv[2]), tokens, MAX_PROMPT, true, true);
    if (n < 1) return fail("the prompt is empty, or too long");
    for (int i = 0; i < n_tokens; i++) {
        if (rkv_llama_decode(r, llama_batch_get_one(tokens, n)) != 0)
            return fail(rkv_llama_error(r));
        tokens[0] = llama_sampler_sample(sampler, ctx, -1);
        n = 1;
        if (llama_vocab_is_eog(vocab, tokens[0])) break;
        print_token(vocab, tokens[0]);
    }
    const rkv_llama_counters c = rkv_llama_get_counters(r);
    printf("\n%lld tokens in %d cells at most; %lld rounds, %.2f s\n", (long long)c.n_tokens,
           c.peak_live, (long long)c.n_rounds, c.seconds_rkv + c.seconds_copies);
    llama_sampler_free(sampler);
    llama_free(ctx);
    rkv_llama_destroy(r);
    llama_model_free(model);
    return 0;
}
