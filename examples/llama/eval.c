/* eval.c - rkv-llama eval: what eviction costs, by policy and budget, on texts with facts in them.
 * Build: part of `make llama`.
 *
 * Every document is read token by token (teacher-forced) under every policy. Loss and divergence
 * are those of the text's tokens from position largest budget + buffer on, so that all budgets are
 * measured on the same tokens, all of them behind the first round. Questions about facts stand at
 * the end; a question counts only if the full cache's most probable tokens are the answer, all of
 * them, and is solved if they still are.
 *
 * A call decodes many tokens at once. The adapter makes its rounds where they would be with one
 * token at a time, and attention sees the same tokens.
 */
#define _DEFAULT_SOURCE
#include "commands.h"
#include "document.h"
#include "session.h"
#include "stats.h"
#include "../ponder/options.h"
#include "../ponder/plot.h"
#include "../ponder/seconds.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PART = 256, MAX_RUNS = 1 + MAX_BUDGETS * 2 * (N_POLICIES - 1) };

typedef struct run {
    const policy *policy;
    int is_pinned, budget;
} run;

/* What one run made of one document. */
typedef struct outcome {
    double loss, divergence; /* sums over n_prose tokens */
    int n_prose;
    double answer_loss[MAX_PROBES];
    unsigned char is_right[MAX_PROBES];
} outcome;

/* What the full cache makes of a document's text. */
typedef struct reference {
    float *logits; /* [n_prose][n_vocab] */
    double *norm;  /* [n_prose] log_sum_exp */
} reference;

/* A document, and whether it has been read; in memory that all jobs share. */
typedef struct reading {
    int is_done, n_probes;
    probe probes[MAX_PROBES];
    outcome outcomes[MAX_RUNS];
} reading;

typedef struct study {
    const settings *settings;
    struct llama_model *model;
    run runs[MAX_RUNS]; /* the first is the full cache */
    int n_runs, n_runs_per_budget, n_documents, n_vocab;
    int start;         /* first position that is scored */
    reading *readings; /* [n_documents] */
} study;

/* ---- one document under one policy ---------------------------------------------------------- */

static void score_prose(const study *st, const float *logits, llama_token target, int row,
                        int is_full, reference *ref, outcome *out)
{
    const size_t at = (size_t)row * (size_t)st->n_vocab;
    const double norm = log_sum_exp(logits, st->n_vocab);
    out->loss += norm - logits[target];
    if (is_full) {
        memcpy(ref->logits + at, logits, (size_t)st->n_vocab * sizeof *logits);
        ref->norm[row] = norm;
        return;
    }
    out->divergence += divergence(ref->logits + at, ref->norm[row], logits, norm, st->n_vocab);
}

static const probe *probe_at(const document *d, int position)
{
    for (int i = 0; i < d->n_probes; i++)
        if (position >= d->probes[i].first && position < d->probes[i].first + d->probes[i].n)
            return &d->probes[i];
    return NULL;
}

static unsigned char is_scored(const study *st, const document *d, int position)
{
    return position >= st->start && (d->is_prose[position] || probe_at(d, position) != NULL);
}

/* logits: for the token at `position`. */
static void score_token(const study *st, const document *d, int position, const float *logits,
                        int is_full, reference *ref, outcome *out)
{
    const llama_token target = d->tokens.at[position];
    const probe *p = probe_at(d, position);
    if (d->is_prose[position]) score_prose(st, logits, target, out->n_prose++, is_full, ref, out);
    if (!p) return;
    const int i = (int)(p - d->probes);
    out->answer_loss[i] += log_sum_exp(logits, st->n_vocab) - logits[target];
    if (arg_max(logits, st->n_vocab) != target) out->is_right[i] = 0;
}

static void read_document(const study *st, const document *d, const run *r, reference *ref,
                          outcome *out)
{
    session s;
    const int is_full = !r->policy->config, last = d->tokens.n - 1;
    memset(out, 0, sizeof *out);
    memset(out->is_right, 1, sizeof out->is_right);
    session_open(&s, st->model, st->settings, r->policy, r->budget, d->tokens.n,
                 r->is_pinned ? d->n_prompt : PIN_NONE);
    for (int i = 0; i < last; i += PART) { /* the last token predicts nothing */
        const int n = last - i < PART ? last - i : PART;
        unsigned char wanted[PART];
        for (int k = 0; k < n; k++) wanted[k] = is_scored(st, d, i + k + 1);
        session_decode(&s, d->tokens.at + i, n, wanted);
        for (int k = 0; k < n; k++)
            if (wanted[k]) score_token(st, d, i + k + 1, session_logits(&s, k), is_full, ref, out);
    }
    session_close(&s);
}

/* ---- all documents --------------------------------------------------------------------------- */

static void show_progress(const study *st)
{
    static const char mark[] = "########################";
    const int width = (int)sizeof mark - 1;
    int done = 0;
    if (!isatty(2)) return;
    for (int i = 0; i < st->n_documents; i++) done += st->readings[i].is_done;
    const int filled = done * width / st->n_documents;
    fprintf(stderr, "\r[%.*s%*s] %d of %d documents ", filled, mark, width - filled, "", done,
            st->n_documents);
}

/* The i-th of n documents, spread evenly over the texts and over each text. */
static void make_document(const study *st, const token_list *texts, int i, document *d)
{
    const settings *s = st->settings;
    const int n_texts = s->n_texts, which = i % n_texts, turn = i / n_texts;
    const int of_this = (s->n_documents - which + n_texts - 1) / n_texts;
    const int n_facts[N_PROBE_KINDS] = { s->facts, s->facts, s->facts };
    const int slack = texts[which].n - s->n_tokens;
    prng random = { (uint64_t)s->seed * 1000 + (uint64_t)i };
    if (slack < (of_this - 1) * s->n_tokens)
        die("%s: too short for %d documents of %d tokens", s->texts[which], of_this, s->n_tokens);
    const int from = of_this > 1 ? (int)((double)slack * turn / (of_this - 1)) : slack / 2;
    document_make(d, llama_model_get_vocab(st->model), texts[which].at + from, s->n_tokens, n_facts,
                  &random);
}

/* Where no bar can be shown. */
static void show_document(const reading *r, int i)
{
    int solved = 0;
    if (isatty(2)) return;
    for (int k = 0; k < r->n_probes; k++) solved += r->outcomes[0].is_right[k];
    fprintf(stderr, "document %d: %d tokens of text scored, %d of %d questions solved\n", i + 1,
            r->outcomes[0].n_prose, solved, r->n_probes);
}

static void read_one(const study *st, const token_list *texts, int i)
{
    reading *to = &st->readings[i];
    const size_t most = (size_t)st->settings->n_tokens; /* tokens that are scored, at most */
    document d;
    reference ref;
    make_document(st, texts, i, &d);
    ref.logits = allocate(most * (size_t)st->n_vocab, sizeof *ref.logits);
    ref.norm = allocate(most, sizeof *ref.norm);
    for (int k = 0; k < st->n_runs; k++)
        read_document(st, &d, &st->runs[k], &ref, &to->outcomes[k]);
    memcpy(to->probes, d.probes, sizeof to->probes);
    to->n_probes = d.n_probes;
    to->is_done = 1;
    show_document(to, i);
    free(ref.logits);
    free(ref.norm);
    document_free(&d);
}

/* Every n_jobs-th document from number `job` on, as long as the time is likely to last. */
static void work(const study *st, const token_list *texts, int job)
{
    const double started = seconds(), limit = 60.0 * st->settings->minutes;
    int n = 0;
    for (int i = job; i < st->n_documents; i += st->settings->n_jobs) {
        const double spent = seconds() - started;
        if (limit > 0.0 && n > 0 && spent * (n + 1) / n > limit) return;
        show_progress(st);
        read_one(st, texts, i);
        n++;
    }
    show_progress(st);
}

/* Each job is a process of its own: the model's memory is shared, and so are the results. */
static void read_all(study *st, const token_list *texts)
{
    int n = 0, status, is_bad = 0;
    if (st->settings->n_jobs == 1) work(st, texts, 0);
    for (int job = 0; job < st->settings->n_jobs && st->settings->n_jobs > 1; job++) {
        const pid_t child = fork();
        if (child < 0) die("cannot start %d processes", st->settings->n_jobs);
        if (child > 0) continue;
        work(st, texts, job);
        _exit(0);
    }
    while (wait(&status) > 0) is_bad |= status != 0;
    if (isatty(2)) fprintf(stderr, "\r%72s\r", "");
    if (is_bad) exit(1); /* the job has said why */
    for (int i = 0; i < st->n_documents; i++)
        if (st->readings[i].is_done) st->readings[n++] = st->readings[i];
    st->n_documents = n;
    if (n < 2) die("--minutes: not even two documents in that time");
}

/* ---- measures -------------------------------------------------------------------------------- */

typedef enum measure {
    LOSS,          /* nats a token of text, more than the full cache's */
    DIVERGENCE,    /* from the full cache's predictions, nats a token of text */
    RECALL_PROMPT, /* of the questions of a kind that the full cache solves: share still solved */
    RECALL_MIDDLE,
    RECALL_RESTATED,
    RECALL,      /* of all kinds */
    ANSWER_LOSS, /* nats an answer, over the same questions */
    N_MEASURES
} measure;

static const char *const measure_names[N_MEASURES] = { "loss_minus_full", "kl",
                                                       "recall_prompt",   "recall_middle",
                                                       "recall_restated", "recall",
                                                       "answer_loss" };

/* The document's part in a measure's sum, and in what the sum is divided by. */
static void measure_one(const study *st, int document_index, int run_index, measure m, double *part,
                        double *whole)
{
    const reading *r = &st->readings[document_index];
    const outcome *full = &r->outcomes[0], *o = &r->outcomes[run_index];
    *part = m == LOSS ? o->loss - full->loss : o->divergence;
    *whole = o->n_prose;
    if (m == LOSS || m == DIVERGENCE) return;
    *part = *whole = 0.0;
    for (int i = 0; i < r->n_probes; i++) {
        const int kind = (int)r->probes[i].kind;
        if (!full->is_right[i] || (m < RECALL && kind != (int)m - RECALL_PROMPT)) continue;
        *part += m == ANSWER_LOSS ? o->answer_loss[i] : o->is_right[i];
        *whole += 1.0;
    }
}

/* minus: a run whose parts are subtracted, document by document; -1: none. */
static interval measure_run(const study *st, int run_index, int minus, measure m)
{
    double *part = allocate((size_t)st->n_documents, sizeof *part);
    double *whole = allocate((size_t)st->n_documents, sizeof *whole);
    for (int i = 0; i < st->n_documents; i++) {
        double other = 0.0;
        if (minus >= 0) measure_one(st, i, minus, m, &other, &whole[i]);
        measure_one(st, i, run_index, m, &part[i], &whole[i]);
        part[i] -= other;
    }
    const interval r = bootstrap(part, whole, st->n_documents);
    free(part);
    free(whole);
    return r;
}

static double count(const study *st, measure m)
{
    double sum = 0.0, part, whole;
    for (int i = 0; i < st->n_documents; i++) {
        measure_one(st, i, 0, m, &part, &whole);
        sum += whole;
    }
    return sum;
}

/* R-KV of the same budget, pinned or not as this run. */
static int rkv_of(const study *st, int run_index)
{
    const run *r = &st->runs[run_index];
    for (int i = 1; i < st->n_runs; i++)
        if (strcmp(st->runs[i].policy->name, "rkv") == 0 && st->runs[i].budget == r->budget &&
            st->runs[i].is_pinned == r->is_pinned)
            return i;
    return 0;
}

/* ---- results --------------------------------------------------------------------------------- */

static void print_recall(interval r)
{
    printf(" %.0f (%.0f to %.0f) |", 100.0 * r.mean, 100.0 * r.low, 100.0 * r.high);
}

static void print_budget(const study *st, int budget)
{
    printf("\nBudget %d. Loss and KL in nats a token, recall in %% of the questions that the full "
           "cache solves, (95 %%).\n\n"
           "| policy | prompt | loss - full | KL | recall: prompt | middle | restated | all | "
           "all - R-KV |\n|---|---|--:|--:|--:|--:|--:|--:|--:|\n",
           budget);
    for (int k = 1; k < st->n_runs; k++) {
        const run *r = &st->runs[k];
        if (r->budget != budget) continue;
        const interval loss = measure_run(st, k, -1, LOSS), kl = measure_run(st, k, -1, DIVERGENCE);
        printf("| %s | %s | %.3f (%.3f to %.3f) | %.3f (%.3f to %.3f) |", r->policy->about,
               r->is_pinned ? "pinned" : "-", loss.mean, loss.low, loss.high, kl.mean, kl.low,
               kl.high);
        for (int m = RECALL_PROMPT; m <= RECALL; m++)
            print_recall(measure_run(st, k, -1, (measure)m));
        if (rkv_of(st, k) == k)
            printf(" - |\n");
        else {
            print_recall(measure_run(st, k, rkv_of(st, k), RECALL));
            printf("\n");
        }
    }
}

static void print_head(const study *st)
{
    const settings *s = st->settings;
    const double prose = count(st, LOSS);
    double loss = 0.0;
    for (int i = 0; i < st->n_documents; i++) loss += st->readings[i].outcomes[0].loss;
    printf("%s, %s cache, flash attention %s, buffer %d\n"
           "%d documents of %d tokens of text, %.0f of them scored; full cache: loss %.3f, "
           "questions solved: prompt %.0f, middle %.0f, restated %.0f, of %d each\n",
           s->model, s->kv, s->flash, s->buffer, st->n_documents, s->n_tokens, prose, loss / prose,
           count(st, RECALL_PROMPT), count(st, RECALL_MIDDLE), count(st, RECALL_RESTATED),
           st->n_documents * s->facts);
}

static void write_csv(const study *st, const char *path)
{
    FILE *f = fopen(path, "w");
    if (!f) die("cannot write %s", path);
    fprintf(f, "budget,policy,pinned,measure,mean,low95,high95,minus_rkv,minus_rkv_low95,"
               "minus_rkv_high95,documents,out_of\n");
    for (int k = 1; k < st->n_runs; k++)
        for (int m = 0; m < N_MEASURES; m++) {
            const run *r = &st->runs[k];
            const interval value = measure_run(st, k, -1, (measure)m);
            const interval less = measure_run(st, k, rkv_of(st, k), (measure)m);
            fprintf(f, "%d,%s,%d,%s,%.5f,%.5f,%.5f,%.5f,%.5f,%.5f,%d,%.0f\n", r->budget,
                    r->policy->name, r->is_pinned, measure_names[m], value.mean, value.low,
                    value.high, less.mean, less.low, less.high, st->n_documents,
                    count(st, (measure)m));
        }
    if (fclose(f) != 0) die("cannot write %s", path);
    printf("wrote %s\n", path);
}

/* The line of a policy over the budgets. */
static void make_line(const study *st, const run *first, measure m, double unit, plot_line *line)
{
    static char labels[MAX_RUNS][48];
    char *label = labels[first - st->runs];
    memset(line, 0, sizeof *line);
    snprintf(label, sizeof labels[0], "%s%s", first->policy->name,
             first->is_pinned ? ", pinned" : "");
    line->name = first->policy->name;
    line->label = label;
    line->is_dashed = !first->is_pinned;
    for (int k = 1; k < st->n_runs; k++) {
        const run *r = &st->runs[k];
        if (r->policy != first->policy || r->is_pinned != first->is_pinned) continue;
        const interval v = measure_run(st, k, -1, m);
        const struct plot_xy point = { r->budget, unit * v.mean, unit * v.low, unit * v.high };
        line->points[line->n_points++] = point;
    }
}

static void draw(const study *st, const char *name, const char *what, const char *title,
                 const char *unit_name, measure m, double unit)
{
    static plot_line lines[2 * N_POLICIES];
    char path[1024];
    const int n = st->n_runs_per_budget;
    for (int i = 0; i < n; i++) make_line(st, &st->runs[1 + i], m, unit, &lines[i]);
    snprintf(path, sizeof path, "%s-%s.svg", name, what);
    FILE *f = fopen(path, "w");
    if (!f) die("cannot write %s", path);
    plot_lines(f, title, "budget, tokens", unit_name, lines, n);
    if (fclose(f) != 0) die("cannot write %s", path);
    printf("wrote %s\n", path);
}

/* ---- start ----------------------------------------------------------------------------------- */

static int ascending(const void *a, const void *b)
{
    return *(const int *)a - *(const int *)b;
}

/* Is a policy asked for? R-KV always is: the others are compared with it. */
static int is_wanted(const policy *p, const char *names)
{
    const char *end;
    if (!p->config) return 0;
    if (!*names || strcmp(p->name, "rkv") == 0) return 1;
    for (;; names = end + 1) {
        end = names + strcspn(names, ",");
        if (policy_find(names, (size_t)(end - names)) == p) return 1;
        if (!*end) return 0;
    }
}

static void plan(study *st, const settings *s)
{
    const int has_pins = strcmp(s->pins, "off") != 0, has_none = strcmp(s->pins, "on") != 0;
    int budgets[MAX_BUDGETS];
    if (has_pins && has_none && strcmp(s->pins, "both") != 0)
        die("--pins: on, off or both, not %s", s->pins);
    memcpy(budgets, s->budgets, sizeof budgets);
    qsort(budgets, (size_t)s->n_budgets, sizeof *budgets, ascending);
    st->runs[st->n_runs++].policy = &policies[0];
    for (int b = 0; b < s->n_budgets; b++)
        for (int i = 1; i < N_POLICIES; i++)
            for (int is_pinned = has_pins; is_pinned >= !has_none; is_pinned--) {
                if (!is_wanted(&policies[i], s->policy)) continue;
                run *r = &st->runs[st->n_runs++];
                r->policy = &policies[i];
                r->is_pinned = is_pinned;
                r->budget = budgets[b];
            }
    st->n_runs_per_budget = (st->n_runs - 1) / s->n_budgets;
    st->start = budgets[s->n_budgets - 1] + s->buffer;
    if (st->start >= s->n_tokens)
        die("--tokens: %d are not more than the largest budget and the buffer, %d", s->n_tokens,
            st->start);
}

static void read_texts(token_list *texts, const settings *s, const struct llama_vocab *vocab)
{
    for (int i = 0; i < s->n_texts; i++) {
        char *text = read_text(s->texts[i]);
        tokens_add_text(&texts[i], vocab, text, 0, 0);
        free(text);
    }
}

int command_eval(const settings *s)
{
    token_list texts[MAX_TEXTS];
    static study st;
    memset(texts, 0, sizeof texts);
    st.settings = s;
    plan(&st, s);
    if (s->csv) check_writable(s->csv);
    st.model = model_open(s->model);
    st.n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(st.model));
    st.n_documents = s->n_documents;
    st.readings = mmap(NULL, (size_t)st.n_documents * sizeof *st.readings, PROT_READ | PROT_WRITE,
                       MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (st.readings == MAP_FAILED) die("out of memory");
    read_texts(texts, s, llama_model_get_vocab(st.model));
    read_all(&st, texts);
    print_head(&st);
    for (int k = 1; k < st.n_runs; k += st.n_runs_per_budget) print_budget(&st, st.runs[k].budget);
    if (s->csv || s->svg) printf("\n");
    if (s->csv) write_csv(&st, s->csv);
    if (s->svg) {
        draw(&st, s->svg, "loss", "Loss on the text, more than the full cache's", "nats", LOSS,
             1.0);
        draw(&st, s->svg, "recall", "Facts recalled, of those that the full cache recalls", "%",
             RECALL, 100.0);
    }
    for (int i = 0; i < s->n_texts; i++) free(texts[i].at);
    llama_model_free(st.model);
    return 0;
}
