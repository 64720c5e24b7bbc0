/* ponder.c - the project's model that reasons, inside llama.cpp: the share of problems that it
 * solves under each cache policy, all with one kept set per sequence.
 * make llama-ponder      (needs llama.cpp: make llama-cpp) */
#define RKV_LLAMA_IMPLEMENTATION
#include "rkv_llama.h"

#include "options.h"
#include "task.h"

#include <stdio.h>
#include <string.h>

/* In solve.h, which cannot stand beside llama.h: both bring an enum gguf_type. */
void wilson(int n_right, int n, double *low, double *high);

const char program_name[] = "llama-ponder";

enum { BUFFER = 32, GRACE = 32, SEED = 7000, MAX_PROBLEMS = 1000 };

typedef struct method {
    const char *name;
    rkv_config (*config)(int budget);
    int pool, is_random, is_full;
} method;

static const method methods[] = {
    { "full cache", rkv_config_default, 7, 0, 1 },
    { "R-KV, no pooling", rkv_config_default, 1, 0, 0 },
    { "R-KV, rkv_config_default (pool 7)", rkv_config_default, 7, 0, 0 },
    { "SnapKV, rkv_config_snapkv", rkv_config_snapkv, 7, 0, 0 },
    { "StreamingLLM, rkv_config_streaming", rkv_config_streaming, 7, 0, 0 },
    { "random", rkv_config_default, 7, 1, 0 },
};
enum { N_METHODS = sizeof methods / sizeof *methods };

static struct llama_model *load(const char *path)
{
    struct llama_model *m = llama_model_load_from_file(path, llama_model_default_params());
    if (!m) die("%s: llama.cpp does not load it", path);
    if (llama_vocab_n_tokens(llama_model_get_vocab(m)) != task_vocabulary())
        die("%s: not a model of this task", path);
    return m;
}

typedef struct engine {
    rkv_llama *r;
    struct llama_context *ctx;
    uint64_t random;
} engine;

static void open_engine(engine *e, struct llama_model *m, const method *how, int budget,
                        int is_pinned)
{
    struct llama_context_params params = llama_context_default_params();
    rkv_config config = how->config(budget);
    rkv_llama_options options;
    const char *wrong;
    memset(&options, 0, sizeof options);
    config.pool = how->pool;
    options.budget = how->is_full ? -1 : budget;
    options.buffer = BUFFER;
    options.config = how->is_full ? NULL : &config;
    options.pin_limit = is_pinned ? TASK_MAX_TOKENS : -1;
    options.score = how->is_random ? rkv_llama_score_random : NULL;
    options.score_user = &e->random;
    wrong = rkv_llama_create(&e->r, &options);
    if (wrong) die("%s", wrong);
    params.n_ctx = how->is_full ? TASK_MAX_TOKENS : (uint32_t)(budget + BUFFER);
    params.n_threads = params.n_threads_batch = 1;
    params.type_k = params.type_v = GGML_TYPE_F32;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    rkv_llama_hook(e->r, &params);
    e->ctx = llama_init_from_model(m, params);
    if (!e->ctx) die("llama.cpp makes no context");
    if (rkv_llama_attach(e->r, e->ctx)) die("%s", rkv_llama_error(e->r));
}

static void close_engine(engine *e)
{
    llama_free(e->ctx);
    rkv_llama_destroy(e->r);
}

static int most_likely(const float *logits)
{
    int i, best = 0;
    for (i = 1; i < task_vocabulary(); i++)
        if (logits[i] > logits[best]) best = i;
    return best;
}

/* Greedy, until the end or until it has gone on for too long. Returns whether it was right. */
static int solve(engine *e, const problem *p)
{
    llama_token tokens[TASK_MAX_TOKENS + GRACE];
    int all[TASK_MAX_TOKENS + GRACE], n = p->n_prompt, i;
    const int limit = p->n_tokens + GRACE < TASK_MAX_TOKENS ? p->n_tokens + GRACE : TASK_MAX_TOKENS;
    uint64_t seed = 0;
    for (i = 0; i < n; i++) {
        tokens[i] = all[i] = p->tokens[i];
        seed = seed * 31 + (uint64_t)p->tokens[i];
    }
    e->random = seed;
    rkv_llama_clear(e->r);
    if (rkv_llama_decode(e->r, llama_batch_get_one(tokens, n))) die("%s", rkv_llama_error(e->r));
    for (;;) {
        all[n] = most_likely(rkv_llama_logits(e->r, -1));
        if (task_is_end(all[n++]) || n >= limit) break;
        tokens[0] = all[n - 1];
        if (rkv_llama_decode(e->r, llama_batch_get_one(tokens, 1)))
            die("%s", rkv_llama_error(e->r));
    }
    return task_is_end(all[n - 1]) && task_answer(all, n) == p->answer;
}

static void run(struct llama_model *m, const method *how, int budget, int is_pinned,
                const problem *problems, int n, int percent)
{
    engine e;
    double low, high;
    int i, n_right = 0;
    open_engine(&e, m, how, budget, is_pinned);
    for (i = 0; i < n; i++) n_right += solve(&e, &problems[i]);
    wilson(n_right, n, &low, &high);
    printf("%-36s %-7s %4d %%  %5d  %5.1f  (%.0f to %.0f)\n", how->name, is_pinned ? "pinned" : "-",
           percent, rkv_llama_get_counters(e.r).peak_live, 100.0 * n_right / n, 100 * low,
           100 * high);
    fflush(stdout);
    close_engine(&e);
}

static void quiet(enum ggml_log_level level, const char *text, void *user)
{
    (void)user;
    if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

int main(int argc, char **argv)
{
    static const int percents[] = { 16, 25, 34 };
    static problem problems[MAX_PROBLEMS];
    const char *path = argc > 1 ? argv[1] : "examples/ponder/models/ponder.gguf";
    const int n = argc > 2 ? (int)option_whole("problems", argv[2], 1, MAX_PROBLEMS) : 100;
    struct llama_model *m;
    double length = 0;
    prng random = { SEED };
    int i, k, pinned;
    llama_log_set(quiet, NULL);
    m = load(path);
    for (i = 0; i < n; i++) {
        task_generate_full(task_find("ponder"), SPLIT_TEST, &random, &problems[i]);
        length += (double)problems[i].n_tokens / n;
    }
    printf("# %s in llama.cpp: %d test problems of %.0f tokens on average,\n", path, n, length);
    printf(
        "# greedy; f32 cache, one kept set per sequence, buffer %d. Budget in %% of these tokens;\n"
        "# cells in use at most; %% of problems right, with the 95 %% interval.\n",
        BUFFER);
    printf("%-36s %-7s %6s  %5s  %5s\n", "# policy", "prompt", "budget", "cells", "right");
    run(m, &methods[0], (int)length, 0, problems, n, 100);
    for (pinned = 0; pinned < 2; pinned++)
        for (k = 0; k < 3; k++)
            for (i = 1; i < N_METHODS; i++)
                run(m, &methods[i], (int)(length * percents[k] / 100), pinned, problems, n,
                    percents[k]);
    llama_model_free(m);
    return 0;
}
