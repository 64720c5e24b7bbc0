/* compare.c - rkv-llama compare: the full cache and a small one, in turns, on the same tokens.
 * Build: part of `make llama`.
 *
 * The full cache is llama.cpp's own, without a callback. It samples the tokens; the other cache
 * decodes the same ones. They take turns in blocks, so that whatever else the machine does meets
 * both. Sampling is not timed. With --policy full nothing is evicted: the difference is what the
 * callback costs.
 */
#define _POSIX_C_SOURCE 200809L
#include "chat.h"
#include "commands.h"
#include "session.h"
#include "stats.h"
#include "../ponder/options.h"
#include "../ponder/plot.h"
#include "../ponder/seconds.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { BLOCK = 16 }; /* tokens in a turn */

static const char default_prompt[] =
    "Tell me a long story about a lighthouse keeper who finds a map. Do not stop.";

static const policy hook_alone = { "hook", "the callback, nothing evicted", rkv_config_default };

/* One turn of both. */
typedef struct turn {
    double full, small;         /* seconds */
    double full_cpu, small_cpu; /* seconds of the processors */
    double rkv;                 /* of the small one's: rounds, copies of queries, freeing cells */
    int position, same;         /* after it; tokens on which the two agree */
    int live;                   /* the small one's tokens, the most in the turn */
} turn;

typedef struct pair {
    session full, small;
    const policy *policy;
    turn *turns;
    int n_turns, n_prompt;
    size_t bytes_per_cell;
} pair;

static double cpu_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void timed_decode(session *s, const llama_token *token, double *wall, double *cpu)
{
    const double wall_start = seconds(), cpu_start = cpu_seconds();
    session_decode(s, token, 1, NULL);
    *wall += seconds() - wall_start;
    *cpu += cpu_seconds() - cpu_start;
}

static double adapter_seconds(session *s)
{
    const rkv_llama_counters c = session_counters(s);
    return c.seconds_rkv + c.seconds_copies + c.seconds_removes;
}

static void take_turn(pair *p, struct llama_sampler *sampler, const token_list *ends, int n_vocab)
{
    llama_token tokens[BLOCK];
    int expected[BLOCK]; /* by the full cache, greedily, behind each token */
    turn *t = &p->turns[p->n_turns++];
    memset(t, 0, sizeof *t);
    for (int i = 0; i < BLOCK; i++) {
        float *logits = session_logits(&p->full, -1);
        for (int k = 0; k < ends->n; k++) logits[ends->at[k]] = -INFINITY;
        tokens[i] = llama_sampler_sample(sampler, p->full.context, -1);
        timed_decode(&p->full, &tokens[i], &t->full, &t->full_cpu);
        expected[i] = arg_max(session_logits(&p->full, -1), n_vocab);
    }
    const double before = adapter_seconds(&p->small);
    for (int i = 0; i < BLOCK; i++) {
        timed_decode(&p->small, &tokens[i], &t->small, &t->small_cpu);
        t->same += arg_max(session_logits(&p->small, -1), n_vocab) == expected[i];
        if (session_live(&p->small) > t->live) t->live = session_live(&p->small);
    }
    t->rkv = adapter_seconds(&p->small) - before;
    t->position = p->full.position;
}

/* ---- results ------------------------------------------------------------------------------- */

typedef struct result {
    int position;
    double full_rate, small_rate;         /* tokens a second */
    double full_cpu_rate, small_cpu_rate; /* of processor time, all threads together */
    interval ratio, cpu_ratio;
    double rkv_percent, same_percent;
    double full_mib, small_mib, live_mib; /* small: of the cells reserved; live: of those in use */
} result;

/* Over the last turns up to turn `end`, `tokens` of them. */
static result result_at(const pair *p, int end, int tokens)
{
    enum { MOST = 4096 };
    static double full[MOST], small[MOST], full_cpu[MOST], small_cpu[MOST];
    double sums[2] = { 0.0, 0.0 }, cpu_sums[2] = { 0.0, 0.0 }, rkv = 0.0;
    int same = 0, live = 0, n = tokens / BLOCK;
    result r;
    if (n < 1) n = 1;
    if (n > end) n = end;
    if (n > MOST) n = MOST;
    for (int i = 0; i < n; i++) {
        const turn *t = &p->turns[end - n + i];
        full[i] = t->full;
        small[i] = t->small;
        full_cpu[i] = t->full_cpu;
        small_cpu[i] = t->small_cpu;
        sums[0] += t->full;
        sums[1] += t->small;
        cpu_sums[0] += t->full_cpu;
        cpu_sums[1] += t->small_cpu;
        rkv += t->rkv;
        same += t->same;
        if (t->live > live) live = t->live;
    }
    r.position = p->turns[end - 1].position;
    r.full_rate = n * BLOCK / sums[0];
    r.small_rate = n * BLOCK / sums[1];
    r.full_cpu_rate = n * BLOCK / cpu_sums[0];
    r.small_cpu_rate = n * BLOCK / cpu_sums[1];
    r.ratio = bootstrap(full, small, n);
    r.cpu_ratio = bootstrap(full_cpu, small_cpu, n);
    r.rkv_percent = 100.0 * rkv / sums[1];
    r.same_percent = 100.0 * same / (n * BLOCK);
    r.full_mib = (double)p->bytes_per_cell * r.position / 1048576.0;
    r.small_mib = (double)p->bytes_per_cell * session_cells(&p->small) / 1048576.0;
    r.live_mib = (double)p->bytes_per_cell * live / 1048576.0;
    return r;
}

static void print_row(const result *r)
{
    printf("| %d | %.1f | %.1f | %.3f (%.3f to %.3f) | %.3f (%.3f to %.3f) | %.1f | %.1f | %.1f | "
           "%.2f | %.0f |\n",
           r->position, r->full_rate, r->small_rate, r->ratio.mean, r->ratio.low, r->ratio.high,
           r->cpu_ratio.mean, r->cpu_ratio.low, r->cpu_ratio.high, r->full_mib, r->small_mib,
           r->live_mib, r->rkv_percent, r->same_percent);
    fflush(stdout);
}

static void print_head(const pair *p, const settings *s)
{
    char budget[64] = "nothing evicted";
    if (p->policy != &hook_alone)
        snprintf(budget, sizeof budget, "budget %d, buffer %d", s->budgets[0], s->buffer);
    printf("%s, %s, %s cache, flash attention %s, %d thread%s\n\n", s->model, budget, s->kv,
           s->flash, s->n_threads, s->n_threads > 1 ? "s" : "");
    printf("| position | full, tokens/s | %s, tokens/s | times faster (95 %%) | "
           "in CPU time (95 %%) | "
           "full KV, MiB | %s KV, MiB: reserved | in use, at most | rkv, %% of time | "
           "same next token, %% |\n|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n",
           p->policy->name, p->policy->name);
}

static void write_csv(const char *path, const pair *p)
{
    FILE *f = fopen(path, "w");
    if (!f) die("cannot write %s", path);
    fprintf(f, "position,full_seconds,small_seconds,full_cpu_seconds,small_cpu_seconds,"
               "rkv_seconds,full_kv_bytes,small_kv_bytes,small_live_bytes,same_tokens,"
               "block_tokens\n");
    for (int i = 0; i < p->n_turns; i++) {
        const turn *t = &p->turns[i];
        const double cell = (double)p->bytes_per_cell;
        fprintf(f, "%d,%.6f,%.6f,%.6f,%.6f,%.6f,%.0f,%.0f,%.0f,%d,%d\n", t->position, t->full,
                t->small, t->full_cpu, t->small_cpu, t->rkv, cell * t->position,
                cell * session_cells(&p->small), cell * t->live, t->same, BLOCK);
    }
    if (fclose(f) != 0) die("cannot write %s", path);
    printf("wrote %s\n", path);
}

static void add_point(plot_line *line, double x, double y)
{
    if (line->n_points == PLOT_MAX_LINE) return;
    line->points[line->n_points].x = x;
    line->points[line->n_points++].y = y;
}

static void write_picture(const char *name, const char *what, const char *title, const char *y_name,
                          const plot_line *lines)
{
    char path[1024];
    snprintf(path, sizeof path, "%s-%s.svg", name, what);
    FILE *f = fopen(path, "w");
    if (!f) die("cannot write %s", path);
    plot_lines(f, title, "position", y_name, lines, 2);
    if (fclose(f) != 0) die("cannot write %s", path);
    printf("wrote %s\n", path);
}

/* A point for every round, or so. Speed is that of processor time: what else runs on the machine
 * would be seen more clearly than the two caches. */
static void draw(const char *name, const pair *p, int buffer, int n_threads)
{
    static plot_line speed[2], memory[2];
    const int most = PLOT_MAX_LINE - 1;
    int step = buffer / BLOCK > 0 ? buffer / BLOCK : 1;
    if (p->n_turns / step > most) step = p->n_turns / most + 1;
    for (int i = 0; i < 2; i++) {
        speed[i].name = memory[i].name = i == 0 ? "full" : p->policy->name;
        speed[i].label = memory[i].label = i == 0 ? "every token kept" : p->policy->about;
    }
    for (int end = step; end <= p->n_turns; end += step) {
        const result r = result_at(p, end, step * BLOCK);
        add_point(&speed[0], r.position, n_threads * r.full_cpu_rate);
        add_point(&speed[1], r.position, n_threads * r.small_cpu_rate);
        add_point(&memory[0], r.position, r.full_mib);
        add_point(&memory[1], r.position, r.small_mib);
    }
    write_picture(name, "speed", "Tokens a second, by processor time", "tokens/s", speed);
    write_picture(name, "memory", "KV cache", "MiB", memory);
}

/* ---- start --------------------------------------------------------------------------------- */

/* A row at every mark, and at the end. */
static void run_turns(pair *p, const settings *s, const struct llama_vocab *vocab)
{
    struct llama_sampler *sampler = chat_sampler(s);
    token_list ends = { NULL, 0, 0 };
    const int n_vocab = llama_vocab_n_tokens(vocab);
    int mark = s->every;
    while (mark <= p->full.position) mark += s->every;
    chat_ends(&ends, vocab);
    while (p->full.position + BLOCK <= s->n_tokens) {
        take_turn(p, sampler, &ends, n_vocab);
        const int next = p->full.position + BLOCK;
        if (next <= mark && next <= s->n_tokens) continue;
        const int two_rounds = 2 * s->buffer;
        const int is_short = p->policy != &hook_alone && two_rounds < s->every;
        const result r = result_at(p, p->n_turns, is_short ? two_rounds : s->every);
        print_row(&r);
        mark += s->every;
    }
    free(ends.at);
    llama_sampler_free(sampler);
}

/* What both caches begin with. */
static void make_start(token_list *out, const struct llama_model *model, const settings *s)
{
    if (s->n_texts == 0) {
        chat_tokens(out, model, s->prompt ? s->prompt : default_prompt, s);
        return;
    }
    char *text = read_text(s->texts[0]);
    tokens_add_text(out, llama_model_get_vocab(model), text, 1, 0);
    free(text);
    if (out->n < s->from) die("%s: only %d tokens", s->texts[0], out->n);
    out->n = s->from;
}

int command_compare(const settings *s)
{
    pair p;
    token_list prompt = { NULL, 0, 0 };
    memset(&p, 0, sizeof p);
    int budget = s->budgets[0];
    p.policy = policy_find(s->policy, strlen(s->policy));
    if (!p.policy->config) {
        p.policy = &hook_alone;
        budget = -1;
    }
    if (s->csv) check_writable(s->csv);
    struct llama_model *model = model_open(s->model);
    make_start(&prompt, model, s);
    p.n_prompt = prompt.n;
    if (p.n_prompt + BLOCK > s->n_tokens) die("--tokens: the start alone has %d", p.n_prompt);
    p.turns = allocate((size_t)(s->n_tokens / BLOCK) + 1, sizeof *p.turns);
    session_open(&p.full, model, s, &policies[0], 0, s->n_tokens, PIN_NONE);
    session_open(&p.small, model, s, p.policy, budget, s->n_tokens,
                 s->no_pin ? PIN_NONE : PIN_PROMPT);
    session_decode(&p.full, prompt.at, p.n_prompt, NULL);
    session_decode(&p.small, prompt.at, p.n_prompt, NULL);
    p.bytes_per_cell = session_counters(&p.small).bytes_per_cell;
    print_head(&p, s);
    run_turns(&p, s, llama_model_get_vocab(model));
    if (s->csv || s->svg) printf("\n");
    if (s->csv) write_csv(s->csv, &p);
    if (s->svg) draw(s->svg, &p, s->buffer, s->n_threads);
    session_close(&p.full);
    session_close(&p.small);
    llama_model_free(model);
    free(p.turns);
    free(prompt.at);
    return 0;
}
