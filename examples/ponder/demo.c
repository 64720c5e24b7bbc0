/* demo.c - a small model reasons step by step while rkv.h keeps its cache at a fixed size.
 * Build and run: make demo        (or: build/demo --help)
 *
 * First one problem, aloud: the chain of thought under R-KV and the size of its cache beside that
 * of the full one. Then held-out problems under several policies, and a page with both.
 */
#define _POSIX_C_SOURCE 200809L
#include "managed_cache.h"
#include "options.h"
#include "page.h"
#include "study.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { LINE_WORDS = 64, MAX_PROBLEMS = 4096, N_BUDGETS = 3 };

static const char *const methods[] = { "rkv", "snapkv", "h2o", "streaming" };
enum { N_METHODS = sizeof methods / sizeof *methods, N_RUNS = 1 + N_METHODS * N_BUDGETS };
static const double budgets[N_BUDGETS] = { 16, 25, 34 }; /* percent of a whole chain of thought */

typedef struct options {
    const char *model, *html, *svg, *prompt;
    const task *task;
    double budget, seconds, temperature;
    int buffer, n_problems, n_threads;
    uint64_t seed;
} options;

const char program_name[] = "demo";

/* ---- one problem, aloud -------------------------------------------------------------------- */

static void note_round(trace *t, const managed_cache *c)
{
    if (t->n_rounds == TRACE_MAX_ROUNDS) return;
    struct trace_round *round = &t->rounds[t->n_rounds++];
    memset(round->kept, 0, sizeof round->kept);
    round->n_tokens = rkv_cache_position(c->rows, 0);
    round->n_rows = rkv_cache_rows(c->rows, 0);
    for (int layer = 0; layer < c->shape.n_layers; layer++)
        for (int head = 0; head < c->shape.n_kv_heads; head++) {
            const int32_t *positions = rkv_cache_positions(c->rows, layer, head);
            for (int row = 0; row < round->n_rows; row++) round->kept[positions[row]]++;
        }
}

static size_t cache_bytes(const model_shape *s, int n_rows)
{
    return 2 * sizeof(float) * (size_t)s->n_layers * (size_t)shape_kv_dim(s) * (size_t)n_rows;
}

static void show_bar(const char *name, const model_shape *s, int rows, int full)
{
    enum { CELLS = 16 };
    const int filled = (rows * CELLS + full - 1) / full;
    printf("  %s ", name);
    for (int i = 0; i < CELLS; i++) fputc(i < filled ? '#' : '.', stdout);
    printf(" %4.0f KiB", (double)cache_bytes(s, rows) / 1024.0);
}

/* Prints a word; at a line's end the two caches' sizes beside it. */
static void show_word(const char *word, int *column, const managed_cache *c, int full)
{
    const struct timespec pause = { 0, 4000000 };
    const int rows = rkv_cache_rows(c->rows, 0), all = rkv_cache_position(c->rows, 0);
    printf("%s ", word);
    *column += (int)strlen(word) + 1;
    if (*column > LINE_WORDS - 8) {
        printf("%*s", LINE_WORDS - *column, "");
        show_bar("full", &c->shape, all, full);
        show_bar("R-KV", &c->shape, rows, full);
        fputc('\n', stdout);
        *column = 0;
    }
    fflush(stdout);
    if (isatty(1)) nanosleep(&pause, NULL);
}

/* Decodes with the managed cache and notes what it keeps; aloud: prints as it goes. */
static void think(const model *m, const options *o, const problem *p, const policy *rule,
                  int length, int aloud, trace *t)
{
    const model_shape *s = model_get_shape(m);
    managed_cache c;
    char why[256];
    int positions[TASK_MAX_TOKENS], column = 0, n_evicted, n_new = p->n_prompt;
    prng random = { o->seed };
    model_scratch *scratch = model_scratch_create(m, p->n_prompt);
    rkv_status status = managed_cache_create(&c, s, rule, p->n_prompt);
    if (status != RKV_OK) die("no cache: %s", rkv_explain(&c.error, why, sizeof why));
    if (!scratch) die("out of memory");
    t->policy = *rule;
    t->n_sets = s->n_layers * s->n_kv_heads;
    t->n_prompt = t->n_tokens = p->n_prompt;
    memcpy(t->tokens, p->tokens, (size_t)p->n_prompt * sizeof *t->tokens);
    for (int i = 0; i < p->n_prompt; i++) positions[i] = i;
    for (;;) { /* the prompt, then token by token: the last n_new tokens are new to the cache */
        float *logits = model_forward(m, scratch, n_new, t->tokens + t->n_tokens - n_new, positions,
                                      managed_cache_attend, &c);
        status = managed_cache_step(&c, &n_evicted);
        if (status != RKV_OK) die("%s", rkv_explain(&c.error, why, sizeof why));
        if (n_evicted > 0) note_round(t, &c);
        const int next = model_choose(logits + (ptrdiff_t)(n_new - 1) * s->vocabulary,
                                      s->vocabulary, (float)o->temperature, &random);
        t->tokens[t->n_tokens++] = next;
        if (aloud) show_word(model_word(m, next), &column, &c, length);
        if (task_is_end(next) || t->n_tokens >= length || t->n_tokens >= s->context) break;
        positions[0] = rkv_cache_position(c.rows, 0);
        n_new = 1;
    }
    note_round(t, &c);
    if (aloud) printf("\n");
    managed_cache_destroy(&c);
    model_scratch_destroy(scratch);
}

static void show_prompt(const model *m, const problem *p)
{
    printf("\nThe problem:  ");
    for (int i = 1; i < p->n_prompt; i++) printf("%s ", model_word(m, p->tokens[i]));
    printf("\n\n");
}

static trace *run_traces(const model *m, const options *o, const problem *p, int length)
{
    static const struct {
        const char *name, *about;
    } shown[] = { { "rkv", "R-KV without pooling" }, { "snapkv", "SnapKV" } };
    trace *traces = allocate(2, sizeof *traces);
    for (int i = 0; i < 2; i++) {
        policy rule;
        policy_make(&rule, shown[i].name, (int)(length * o->budget / 100.0), o->buffer);
        traces[i].about = shown[i].about;
        think(m, o, p, &rule, length + 32 < TRACE_MAX_TOKENS ? length + 32 : TRACE_MAX_TOKENS - 1,
              i == 0, &traces[i]);
    }
    return traces;
}

static void show_answers(const model *m, const trace *traces, int answer)
{
    for (int i = 0; i < 2; i++) {
        const trace *t = &traces[i];
        const int got = task_answer(t->tokens, t->n_tokens);
        printf("%-8s answers %s", t->about[0] == 'R' ? "R-KV" : t->about,
               got >= 0 ? model_word(m, got) : "nothing");
        if (answer >= 0) printf(", %s", got == answer ? "right" : "wrong");
        printf("; %d tokens thought, at most %d held per head\n", t->n_tokens,
               t->policy.config.budget + t->policy.buffer);
    }
}

/* ---- many problems ------------------------------------------------------------------------- */

static void show_progress(void *user, double done)
{
    static const char mark[] = "########################";
    const int width = (int)sizeof mark - 1, filled = (int)(done * width);
    (void)user;
    if (isatty(2))
        fprintf(stderr, "\r[%.*s%*s] %3.0f %%%s", filled, mark, width - filled, "", 100.0 * done,
                done >= 1.0 ? "\n" : "");
}

static void show_row(const page_row *row)
{
    const tally *t = &row->tally;
    double low, high;
    wilson(t->n_right, t->n_problems, &low, &high);
    printf("%-10s %5.0f %%   %5.1f %%  (%4.1f to %5.1f)   %6.0f KiB   %7.0f   %5.2f %%\n",
           row->method, row->budget, 100.0 * t->n_right / t->n_problems, 100.0 * low, 100.0 * high,
           (double)t->peak_bytes / 1024.0, (double)t->n_tokens / t->seconds,
           100.0 * t->compress_seconds / t->seconds);
}

static void show_table(const page_row *rows, const options *o)
{
    printf("\n%d held-out problems under each policy, greedy, buffer %d tokens\n",
           rows[0].tally.n_problems, o->buffer);
    printf("method      budget  accuracy  (95 %%)            peak cache  tokens/s  compressing\n");
    for (int i = 0; i < N_RUNS; i++) show_row(&rows[i]);
}

static void run_study(const model *m, const options *o, int length, page_row *rows)
{
    problem *problems = allocate((size_t)o->n_problems, sizeof *problems);
    policy policies[N_RUNS];
    tally tallies[N_RUNS];
    prng random = { o->seed };
    const char *why;
    for (int i = 0; i < o->n_problems; i++)
        task_generate_full(o->task, SPLIT_TEST, &random, &problems[i]);
    for (int i = 0; i < N_RUNS; i++) {
        const int budget = i == 0 ? 0 : (i - 1) / N_METHODS;
        const char *name = i == 0 ? "full" : methods[(i - 1) % N_METHODS];
        rows[i].method = name;
        rows[i].budget = i == 0 ? 100.0 : budgets[budget];
        policy_make(&policies[i], name, (int)(length * budgets[budget] / 100.0), o->buffer);
        for (int k = 0; policy_name(k); k++)
            if (strcmp(policy_name(k), name) == 0) rows[i].about = policy_about(k);
    }
    const study s = { m,          problems,      o->n_problems, policies, N_RUNS, o->n_threads,
                      o->seconds, show_progress, NULL };
    printf("\nNow %d policies on held-out problems, at most %.0f seconds:\n", N_RUNS, o->seconds);
    fflush(stdout);
    if (!study_run(&s, tallies, &why)) die("%s", why);
    show_progress(NULL, 1.0);
    for (int i = 0; i < N_RUNS; i++) rows[i].tally = tallies[i];
    free(problems);
}

static struct plot_point point_of(const page_row *row)
{
    struct plot_point p = { row->budget, 0.0, 0.0, 0.0 };
    p.accuracy = (double)row->tally.n_right / row->tally.n_problems;
    wilson(row->tally.n_right, row->tally.n_problems, &p.low, &p.high);
    return p;
}

static void make_series(const page_row *rows, plot_series *series)
{
    series[0].name = "full";
    series[0].n_points = 1;
    series[0].points[0] = point_of(&rows[0]);
    for (int k = 0; k < N_METHODS; k++) {
        series[1 + k].name = methods[k];
        series[1 + k].n_points = N_BUDGETS;
        for (int b = 0; b < N_BUDGETS; b++)
            series[1 + k].points[b] = point_of(&rows[1 + b * N_METHODS + k]);
    }
}

/* ---- start --------------------------------------------------------------------------------- */

static const char usage[] =
    "usage: demo [--model FILE.gguf] [--task ponder|brief]\n"
    "            [--prompt \"A c 4 ; start a 5 ; C d #a ; D e 2 ; F b #d ? E f #c ; think\"]\n"
    "            [--budget PERCENT] [--buffer TOKENS] [--temperature X] [--seed N]\n"
    "            [--problems N] [--seconds N] [--threads N] [--html FILE] [--svg FILE]";

static options parse(int argc, char **argv)
{
    options o = { "examples/ponder/models/ponder.gguf",
                  "build/demo.html",
                  NULL,
                  NULL,
                  task_find("ponder"),
                  25,
                  48,
                  0,
                  32,
                  400,
                  2,
                  1 };
    for (int i = 1; i < argc; i++) {
        const char *name = argv[i], *value = i + 1 < argc ? argv[++i] : NULL;
        if (strcmp(name, "--help") == 0) {
            puts(usage);
            exit(0);
        }
        if (!value) die("%s needs a value, or is unknown; --help lists the options", name);
        if (strcmp(name, "--model") == 0)
            o.model = value;
        else if (strcmp(name, "--html") == 0)
            o.html = value;
        else if (strcmp(name, "--svg") == 0)
            o.svg = value;
        else if (strcmp(name, "--prompt") == 0)
            o.prompt = value;
        else if (strcmp(name, "--task") == 0)
            o.task = task_find(value);
        else if (strcmp(name, "--budget") == 0)
            o.budget = option_number(name, value, 2, 100);
        else if (strcmp(name, "--seconds") == 0)
            o.seconds = option_number(name, value, 1, 86400);
        else if (strcmp(name, "--temperature") == 0)
            o.temperature = option_number(name, value, 0, 100);
        else if (strcmp(name, "--buffer") == 0)
            o.buffer = (int)option_whole(name, value, 1, 1024);
        else if (strcmp(name, "--problems") == 0)
            o.n_problems = (int)option_whole(name, value, 0, MAX_PROBLEMS);
        else if (strcmp(name, "--threads") == 0)
            o.n_threads = (int)option_whole(name, value, 1, STUDY_MAX_THREADS);
        else if (strcmp(name, "--seed") == 0)
            o.seed = (uint64_t)option_whole(name, value, 0, INT64_MAX);
        else
            die("unknown option %s; --help lists the options", name);
    }
    if (!o.task) die("no such task; there are ponder and brief");
    return o;
}

/* The user's words as a problem without a known answer. */
static void read_prompt(const char *text, int room, problem *p)
{
    char word[32];
    p->n_prompt = p->n_tokens = 0;
    p->answer = -1;
    p->tokens[p->n_prompt++] = task_token("<s>");
    for (int n; sscanf(text, " %31s%n", word, &n) == 1; text += n) {
        const int token = task_token(word);
        if (token < 0) die("the model does not know the word '%s'", word);
        if (p->n_prompt >= room) die("the prompt is too long for the model");
        p->tokens[p->n_prompt++] = token;
    }
    if (p->n_prompt == 1) die("the prompt is empty");
    p->n_tokens = p->n_prompt;
}

static void write_svg(const options *o, const model_shape *s, const trace *t)
{
    FILE *f = fopen(o->svg, "w");
    if (f) page_plot_sizes(f, t, (double)cache_bytes(s, 1) / 1024.0);
    if (!f || fclose(f) != 0) die("cannot write %s", o->svg);
    printf("wrote %s\n", o->svg);
}

int main(int argc, char **argv)
{
    const options o = parse(argc, argv);
    static problem p;
    static page_row rows[N_RUNS];
    static plot_series series[1 + N_METHODS];
    gguf_error error;
    model *m;
    prng random = { o.seed };
    check_writable(o.html);
    if (o.svg) check_writable(o.svg);
    if (!model_load(&m, o.model, &error)) die("%s: %s", o.model, error.text);
    if (!solve_fits(m)) die("%s: not a model of these problems", o.model);
    const model_shape *s = model_get_shape(m);
    task_generate_full(o.task, SPLIT_TEST, &random, &p);
    const int length = p.n_tokens;
    if (o.prompt) read_prompt(o.prompt, s->context - length, &p);
    printf("%s: %d layers, width %d, %d query and %d kv heads of %d\n", o.model, s->n_layers,
           s->dim, s->n_heads, s->n_kv_heads, s->head_dim);
    show_prompt(m, &p);
    trace *traces = run_traces(m, &o, &p, length);
    show_answers(m, traces, p.answer);
    if (o.n_problems > 0) {
        run_study(m, &o, length, rows);
        show_table(rows, &o);
        make_series(rows, series);
    }
    if (!page_write(o.html, o.model, m, traces, 2, p.answer, rows, o.n_problems > 0 ? N_RUNS : 0,
                    series, 1 + N_METHODS))
        die("cannot write %s", o.html);
    printf("\nwrote %s: open it in a browser\n", o.html);
    if (o.svg) write_svg(&o, s, &traces[0]);
    free(traces);
    model_free(m);
    return 0;
}
