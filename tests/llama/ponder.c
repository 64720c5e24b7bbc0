/* ponder.c - the project's model inside llama.cpp thinks what it thinks in the project's own
 * engine, token for token, with the full cache.
 * make test-llama        (needs llama.cpp: make llama-cpp) */
#include "harness.h"

#define RKV_LLAMA_IMPLEMENTATION
#include "rkv_llama.h"

#include "mind.h"
#include "task.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PROBLEMS = 12, GRACE = 32 };

static int most_likely(const float *logits)
{
    int i, best = 0;
    for (i = 1; i < task_vocabulary(); i++)
        if (logits[i] > logits[best]) best = i;
    return best;
}

static int step_theirs(rkv_llama *r, const int *tokens, int n)
{
    llama_token copy[TASK_MAX_TOKENS];
    int i;
    for (i = 0; i < n; i++) copy[i] = tokens[i];
    if (rkv_llama_decode(r, llama_batch_get_one(copy, n))) {
        case_fail("%s", rkv_llama_error(r));
        return -1;
    }
    return most_likely(rkv_llama_logits(r, -1));
}

static void compare(mind *ours, rkv_llama *r, const problem *p)
{
    int tokens[TASK_MAX_TOKENS + GRACE], n = p->n_prompt, fed = 0;
    memcpy(tokens, p->tokens, (size_t)n * sizeof *tokens);
    mind_forget(ours);
    rkv_llama_clear(r);
    while (n < p->n_tokens + GRACE && n < TASK_MAX_TOKENS && !task_is_end(tokens[n - 1])) {
        const int mine = mind_step(ours, tokens + fed, n - fed);
        const int theirs = step_theirs(r, tokens + fed, n - fed);
        if (!expect_int("token", n, theirs, mine)) return;
        fed = n;
        tokens[n++] = mine;
    }
    expect_int("answer", 0, task_answer(tokens, n), p->answer);
}

static void quiet(enum ggml_log_level level, const char *text, void *user)
{
    (void)user;
    if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

static rkv_llama *open_theirs(struct llama_model *m, int flash, enum ggml_type type,
                              struct llama_context **ctx)
{
    struct llama_context_params params = llama_context_default_params();
    rkv_llama_options options = { 0 };
    rkv_llama *r;
    options.budget = -1;
    if (rkv_llama_create(&r, &options)) exit(1);
    params.n_ctx = TASK_MAX_TOKENS;
    params.n_threads = params.n_threads_batch = 1;
    params.type_k = params.type_v = type;
    params.flash_attn_type = flash ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    rkv_llama_hook(r, &params);
    *ctx = llama_init_from_model(m, params);
    if (!*ctx || rkv_llama_attach(r, *ctx)) exit(1);
    return r;
}

int main(void)
{
    static const struct {
        int flash;
        enum ggml_type type;
    } ways[] = { { 0, GGML_TYPE_F32 }, { 1, GGML_TYPE_F16 } };
    struct llama_model *theirs;
    mind *ours = mind_open(PONDER);
    size_t w;
    int i;
    llama_log_set(quiet, NULL);
    theirs = llama_model_load_from_file(PONDER, llama_model_default_params());
    if (!theirs || !ours) {
        skip("%s cannot be loaded", PONDER);
        return close_tests();
    }
    for (w = 0; w < sizeof ways / sizeof *ways; w++) {
        struct llama_context *ctx;
        rkv_llama *r = open_theirs(theirs, ways[w].flash, ways[w].type, &ctx);
        prng random = { 4321 };
        for (i = 0; i < PROBLEMS; i++) {
            problem p;
            task_generate_full(task_find("ponder"), SPLIT_TEST, &random, &p);
            case_begin("problem %d, %s cache, flash attention %d", i, ggml_type_name(ways[w].type),
                       ways[w].flash);
            compare(ours, r, &p);
            case_end();
        }
        llama_free(ctx);
        rkv_llama_destroy(r);
    }
    mind_close(ours);
    llama_model_free(theirs);
    return close_tests();
}
