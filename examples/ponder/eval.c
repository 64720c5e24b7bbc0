/* eval.c - the whole study: policies, budgets, buffers and settings on held-out problems.
 * Build and run: make eval        (or: build/eval --help)
 *
 * Every run adds a line to a CSV file; what is in the file already is not run again, so that the
 * study can be stopped and gone on with at any time. The settings are swept on validation problems;
 * the comparison of the methods uses test problems, which decide nothing.
 */
#define _POSIX_C_SOURCE 200809L
#include "options.h"
#include "plot.h"
#include "study.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_RUNS = 1024, MAX_MODELS = 8, MAX_METHODS = 16, MAX_PROBLEMS = 4096, MAX_LINE = 512 };

typedef struct run {
    const char *model; /* file */
    task_split split;
    double percent; /* of a whole chain of thought; 100: the full cache */
    policy policy;
} run;

typedef struct plan {
    run runs[MAX_RUNS];
    int n_runs, length;
    const task *task;
} plan;

typedef struct options {
    const char *models[MAX_MODELS], *csv, *svg;
    const task *task;
    const char *methods[MAX_METHODS]; /* none: all */
    int n_models, n_methods, n_problems, n_threads, quick;
    uint64_t seed;
} options;

const char program_name[] = "eval";

/* ---- what to run --------------------------------------------------------------------------- */

static run *plan_run(plan *p, const char *file, const char *method, double percent, int buffer)
{
    if (p->n_runs == MAX_RUNS) die("too many runs");
    run *r = &p->runs[p->n_runs++];
    r->model = file;
    r->split = SPLIT_TEST;
    r->percent = percent;
    if (!policy_make(&r->policy, method, (int)(p->length * percent / 100.0), buffer))
        die("no policy %s", method);
    return r;
}

static int is_wanted(const options *o, const char *method)
{
    int found = o->n_methods == 0;
    for (int i = 0; i < o->n_methods; i++) found |= strcmp(o->methods[i], method) == 0;
    return found;
}

/* Methods x budgets x buffers, on test problems. Quick: with one buffer. */
static void plan_grid(plan *p, const options *o, const char *file, int quick)
{
    static const double percents[] = { 10, 16, 25, 34, 50 };
    static const int buffers[] = { 32, 16, 64 };
    plan_run(p, file, "full", 100, 32);
    for (int b = 0; b < (quick ? 1 : 3); b++)
        for (int k = 0; k < 5; k++)
            for (int i = 1; policy_name(i); i++) /* 0 is the full cache */
                if (is_wanted(o, policy_name(i)))
                    plan_run(p, file, policy_name(i), percents[k], buffers[b]);
}

/* One run of a sweep, at a budget where settings matter; the caller changes one of them. */
static rkv_config *plan_sweep(plan *p, const char *file)
{
    return &plan_run(p, file, "rkv", 10, 32)->policy.config;
}

/* One setting at a time away from R-KV without pooling, on validation problems. */
static void plan_sweeps(plan *p, const char *file)
{
    static const float lambdas[] = { 0.0f, 0.01f, 0.03f, 0.1f, 0.3f, 1.0f };
    static const float thresholds[] = { 0.3f, 0.5f, 0.7f, 0.9f };
    static const int recents[] = { 1, 2, 4, 8 }, pools[] = { 1, 3, 5, 7 };
    static const rkv_scope scopes[] = { RKV_PER_HEAD, RKV_PER_LAYER, RKV_PER_SEQUENCE };
    const int first = p->n_runs;
    for (int i = 0; i < 6; i++) plan_sweep(p, file)->lambda = lambdas[i];
    for (int i = 0; i < 4; i++) plan_sweep(p, file)->threshold = thresholds[i];
    for (int i = 0; i < 4; i++) plan_sweep(p, file)->recent = recents[i];
    for (int i = 0; i < 4; i++) plan_sweep(p, file)->pool = pools[i];
    for (int i = 0; i < 3; i++) plan_sweep(p, file)->scope = scopes[i];
    for (int i = first; i < p->n_runs; i++) p->runs[i].split = SPLIT_VALIDATION;
}

/* ---- the CSV file -------------------------------------------------------------------------- */

static const char columns[] =
    "model,task,split,seed,method,budget_percent,budget,buffer,lambda,recent,threshold,pool,scope,"
    "problems,right,accuracy,low95,high95,peak_rows,peak_kib,tokens_per_second,compress_percent\n";

/* An existing file must be one of these tables: rows are added to it. */
static void check_csv(const char *csv)
{
    char line[MAX_LINE];
    FILE *f;
    check_writable(csv);
    f = fopen(csv, "r");
    if (!f) return;
    if (!fgets(line, sizeof line, f) || strcmp(line, columns) != 0)
        die("%s is not a table of this program", csv);
    fclose(f);
}

static const char *base_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

/* The columns that say what was run. */
static void describe(const options *o, const plan *p, const run *r, char *key, size_t size)
{
    static const char *const scopes[] = { "head", "layer", "sequence" };
    const rkv_config *c = &r->policy.config;
    snprintf(key, size, "%s,%s,%s,%llu,%s,%g,%d,%d,%g,%d,%g,%d,%s,%d,", base_name(r->model),
             p->task->name, r->split == SPLIT_TEST ? "test" : "validation",
             (unsigned long long)o->seed, r->policy.name, r->percent, c->budget, r->policy.buffer,
             (double)c->lambda, c->recent, (double)c->threshold, c->pool, scopes[c->scope],
             o->n_problems);
}

/* 1 = the file has this run; *t then gets its counts. */
static int look_up(const char *csv, const char *key, tally *t)
{
    char line[MAX_LINE];
    int found = 0;
    FILE *f = fopen(csv, "r");
    if (!f) return 0;
    while (!found && fgets(line, sizeof line, f))
        if (strncmp(line, key, strlen(key)) == 0 && strchr(line, '\n'))
            found = sscanf(line + strlen(key), "%d,", &t->n_right) == 1;
    fclose(f);
    return found;
}

static void append(const char *csv, const char *key, const tally *t)
{
    double low, high;
    FILE *f = fopen(csv, "a+");
    if (!f) die("cannot write %s", csv);
    fseek(f, 0, SEEK_END);
    const int is_new = ftell(f) == 0;
    const int cut = !is_new && fseek(f, -1, SEEK_END) == 0 && fgetc(f) != '\n';
    fseek(f, 0, SEEK_END); /* between reading and writing */
    if (is_new) fputs(columns, f);
    if (cut) fputc('\n', f); /* a run that was stopped in the middle of its line */
    wilson(t->n_right, t->n_problems, &low, &high);
    fprintf(f, "%s%d,%.4f,%.4f,%.4f,%d,%.1f,%.0f,%.3f\n", key, t->n_right,
            (double)t->n_right / t->n_problems, low, high, t->peak_rows,
            (double)t->peak_bytes / 1024.0, (double)t->n_tokens / t->seconds,
            100.0 * t->compress_seconds / t->seconds);
    if (fclose(f) != 0) die("cannot write %s", csv);
}

/* ---- running ------------------------------------------------------------------------------- */

typedef struct bar {
    int run, n_runs;
} bar;

static void show_progress(void *user, double done)
{
    const bar *b = user;
    static const char mark[] = "########################";
    const int width = (int)sizeof mark - 1;
    const double all = (b->run + done) / b->n_runs;
    const int filled = (int)(all * width);
    if (isatty(2))
        fprintf(stderr, "\r[%.*s%*s] run %d of %d ", filled, mark, width - filled, "", b->run + 1,
                b->n_runs);
}

static problem *draw(const options *o, task_split split)
{
    problem *problems = allocate((size_t)o->n_problems, sizeof *problems);
    prng random = { o->seed + (uint64_t)split };
    for (int i = 0; i < o->n_problems; i++)
        task_generate_full(o->task, split, &random, &problems[i]);
    return problems;
}

static model *load(const char *path)
{
    gguf_error error;
    model *m;
    if (!model_load(&m, path, &error)) die("%s: %s", path, error.text);
    if (!solve_fits(m)) die("%s: not a model of these problems", path);
    return m;
}

static void run_all(const options *o, const plan *p)
{
    problem *problems[3] = { NULL, draw(o, SPLIT_VALIDATION), draw(o, SPLIT_TEST) };
    const char *loaded = NULL, *why;
    model *m = NULL;
    for (int i = 0; i < p->n_runs; i++) {
        const run *r = &p->runs[i];
        char key[MAX_LINE];
        tally t;
        bar b = { i, p->n_runs };
        describe(o, p, r, key, sizeof key);
        if (look_up(o->csv, key, &t)) continue;
        if (loaded != r->model) {
            model_free(m);
            m = load(loaded = r->model);
        }
        const study s = { m, problems[r->split], o->n_problems, &r->policy,
                          1, o->n_threads,       0.0,           show_progress,
                          &b };
        if (!study_run(&s, &t, &why)) die("%s", why);
        append(o->csv, key, &t);
        printf("%s%-16s %3.0f %%  buffer %2d  %5.1f %%\n", isatty(2) ? "\r" : "", r->policy.name,
               r->percent, r->policy.buffer, 100.0 * t.n_right / t.n_problems);
        fflush(stdout);
    }
    model_free(m);
    free(problems[SPLIT_VALIDATION]);
    free(problems[SPLIT_TEST]);
}

/* ---- the picture and the table -------------------------------------------------------------- */

/* Test problems with a buffer of 32 under one method, by ascending budget, models `first` to
 * `last` together. */
static void collect(const options *o, const plan *p, const char *method, int first, int last,
                    plot_series *s)
{
    s->name = method;
    s->n_points = 0;
    for (int i = 0; i < p->n_runs; i++) {
        const run *r = &p->runs[i];
        int right = 0, problems = 0;
        if (r->split != SPLIT_TEST || r->policy.buffer != 32 || r->model != o->models[first] ||
            strcmp(r->policy.name, method) != 0 || s->n_points == PLOT_MAX_POINTS)
            continue;
        for (int k = first; k <= last; k++) {
            char key[MAX_LINE];
            tally t;
            run same = *r;
            same.model = o->models[k];
            describe(o, p, &same, key, sizeof key);
            if (!look_up(o->csv, key, &t)) continue;
            right += t.n_right;
            problems += o->n_problems;
        }
        if (problems == 0) continue;
        struct plot_point *point = &s->points[s->n_points++];
        point->budget = r->percent;
        point->accuracy = (double)right / problems;
        wilson(right, problems, &point->low, &point->high);
    }
}

/* In Markdown: accuracy in percent and its 95 % interval by method and budget. */
static void print_table(const options *o, const plan *p, int first, int last)
{
    static plot_series s;
    collect(o, p, policy_name(0), first, last, &s);
    printf("\n%s%s; %s %.1f (%.0f to %.0f)\n\n", base_name(o->models[first]),
           last > first ? " and the others" : "", policy_name(0), 100.0 * s.points[0].accuracy,
           100.0 * s.points[0].low, 100.0 * s.points[0].high);
    for (int i = 1; policy_name(i); i++) {
        if (!is_wanted(o, policy_name(i))) continue;
        collect(o, p, policy_name(i), first, last, &s);
        printf("| %s |", policy_about(i));
        for (int k = 0; k < s.n_points; k++)
            printf(" %.1f (%.0f to %.0f) |", 100.0 * s.points[k].accuracy, 100.0 * s.points[k].low,
                   100.0 * s.points[k].high);
        printf("\n");
    }
}

static void draw_picture(const options *o, const plan *p)
{
    static const char *const drawn[] = { "full",          "rkv",         "rkv-pool7",
                                         "memory-traces", "memory-wide", "snapkv",
                                         "h2o",           "streaming",   "random",
                                         "random+prompt" };
    enum { N_DRAWN = sizeof drawn / sizeof *drawn };
    static plot_series series[N_DRAWN];
    char title[128];
    for (int i = 0; i < N_DRAWN; i++) collect(o, p, drawn[i], 0, o->n_models - 1, &series[i]);
    snprintf(title, sizeof title, "Problems solved, task %s, buffer 32, %d problems x %d model%s",
             o->task->name, o->n_problems, o->n_models, o->n_models > 1 ? "s" : "");
    FILE *f = fopen(o->svg, "w");
    if (!f) die("cannot write %s", o->svg);
    plot_accuracy(f, title, series, N_DRAWN);
    if (fclose(f) != 0) die("cannot write %s", o->svg);
}

/* ---- start --------------------------------------------------------------------------------- */

static const char usage[] =
    "usage: eval --model FILE.gguf [--model FILE.gguf ..] --csv FILE --svg FILE\n"
    "            [--method NAME ..] [--task ponder|brief] [--problems N] [--threads N] [--seed N]\n"
    "            [--quick]\n"
    "  Several models are several training seeds of one task. The first gets every buffer and the\n"
    "  sweeps of the settings, the others a buffer of 32 tokens; so does the first with --quick.\n"
    "  --method limits the study to some of the methods.";

static const char *method_name(const char *text)
{
    policy p;
    if (!policy_make(&p, text, 1, 1)) die("no policy %s", text);
    return p.name;
}

static options parse(int argc, char **argv)
{
    options o = { .task = task_find("ponder"), .n_problems = 200, .n_threads = 2, .seed = 7000 };
    for (int i = 1; i < argc; i++) {
        const char *name = argv[i];
        if (strcmp(name, "--help") == 0) {
            puts(usage);
            exit(0);
        }
        if (strcmp(name, "--quick") == 0) {
            o.quick = 1;
            continue;
        }
        if (++i >= argc) die("%s needs a value, or is unknown; --help lists the options", name);
        if (strcmp(name, "--model") == 0 && o.n_models < MAX_MODELS)
            o.models[o.n_models++] = argv[i];
        else if (strcmp(name, "--method") == 0 && o.n_methods < MAX_METHODS)
            o.methods[o.n_methods++] = method_name(argv[i]);
        else if (strcmp(name, "--csv") == 0)
            o.csv = argv[i];
        else if (strcmp(name, "--svg") == 0)
            o.svg = argv[i];
        else if (strcmp(name, "--task") == 0)
            o.task = task_find(argv[i]);
        else if (strcmp(name, "--problems") == 0)
            o.n_problems = (int)option_whole(name, argv[i], 1, MAX_PROBLEMS);
        else if (strcmp(name, "--threads") == 0)
            o.n_threads = (int)option_whole(name, argv[i], 1, STUDY_MAX_THREADS);
        else if (strcmp(name, "--seed") == 0)
            o.seed = (uint64_t)option_whole(name, argv[i], 0, INT64_MAX);
        else
            die("unknown option %s; --help lists the options", name);
    }
    if (!o.task) die("no such task; there are ponder and brief");
    if (o.n_models == 0 || !o.csv || !o.svg)
        die("--model, --csv and --svg are needed; --help says more");
    return o;
}

int main(int argc, char **argv)
{
    const options o = parse(argc, argv);
    static plan p;
    static problem sample;
    prng random = { o.seed };
    check_csv(o.csv);
    check_writable(o.svg);
    task_generate_full(o.task, SPLIT_TEST, &random, &sample);
    p.task = o.task;
    p.length = sample.n_tokens;
    for (int i = 0; i < o.n_models; i++) plan_grid(&p, &o, o.models[i], o.quick || i > 0);
    if (!o.quick && is_wanted(&o, "rkv")) plan_sweeps(&p, o.models[0]);
    run_all(&o, &p);
    draw_picture(&o, &p);
    for (int i = 0; o.n_models > 1 && i < o.n_models; i++) print_table(&o, &p, i, i);
    print_table(&o, &p, 0, o.n_models - 1);
    return 0;
}
