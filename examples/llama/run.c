/* run.c - rkv-llama run: an answer of any length from a cache of fixed size.
 * Build: part of `make llama`.
 */
#define _POSIX_C_SOURCE 200809L
#include "chat.h"
#include "commands.h"
#include "screen.h"
#include "session.h"
#include "../ponder/options.h"
#include "../ponder/seconds.h"

#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static volatile sig_atomic_t is_interrupted;

static void interrupt(int signal_number)
{
    (void)signal_number;
    is_interrupted = 1;
}

/* Where it stands, beside a cache that had kept every token. */
static void describe(session *s, double rate, char *text, size_t size)
{
    const rkv_llama_counters c = session_counters(s);
    const double mib = (double)c.bytes_per_cell / 1048576.0;
    if (!s->adapter)
        snprintf(text, size, "[%d tokens, %.1f/s; every one is kept]", s->position, rate);
    else
        snprintf(text, size,
                 "[%d tokens, %.1f/s; %d kept in %d cells, %lld rounds; KV %.1f MiB, of every "
                 "token %.1f MiB]",
                 s->position, rate, session_live(s), session_cells(s), (long long)c.n_rounds,
                 mib * session_cells(s), mib * s->position);
}

static int is_among(const token_list *list, llama_token token)
{
    for (int i = 0; i < list->n; i++)
        if (list->at[i] == token) return 1;
    return 0;
}

static void generate(session *s, const struct llama_vocab *vocab, const settings *set)
{
    struct llama_sampler *sampler = chat_sampler(set);
    token_list ends = { NULL, 0, 0 };
    char text[256];
    int n = 0;
    const double start = seconds();
    chat_ends(&ends, vocab);
    screen_open();
    while (!is_interrupted && (set->n_tokens == 0 || n < set->n_tokens)) {
        float *logits = session_logits(s, -1);
        for (int i = 0; set->ignore_end && i < ends.n; i++) logits[ends.at[i]] = -INFINITY;
        const llama_token token = llama_sampler_sample(sampler, s->context, -1);
        if (is_among(&ends, token)) break;
        screen_text(text, (size_t)token_text(vocab, token, text, sizeof text));
        n++;
        if (!s->adapter && s->position == session_cells(s)) break;
        session_decode(s, &token, 1, NULL);
        if (!screen_is_due()) continue;
        describe(s, n / (seconds() - start), text, sizeof text);
        screen_status(text);
    }
    describe(s, n / (seconds() - start), text, sizeof text);
    screen_close(text);
    free(ends.at);
    llama_sampler_free(sampler);
}

int command_run(const settings *set)
{
    const policy *p = policy_find(set->policy, strlen(set->policy));
    struct llama_model *model = model_open(set->model);
    token_list prompt = { NULL, 0, 0 };
    session s;
    chat_tokens(&prompt, model, set->prompt, set);
    const int n_full = prompt.n + (set->n_tokens > 0 ? set->n_tokens : 4096);
    session_open(&s, model, set, p, set->budgets[0], n_full, set->no_pin ? PIN_NONE : PIN_PROMPT);
    signal(SIGINT, interrupt);
    session_decode(&s, prompt.at, prompt.n, NULL);
    generate(&s, llama_model_get_vocab(model), set);
    session_close(&s);
    llama_model_free(model);
    free(prompt.at);
    return ferror(stdout) ? 1 : 0;
}
