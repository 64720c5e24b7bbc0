/* train.c - trains the small reasoning model from nothing and writes it as a GGUF file.
 * Build and run: make train        (or: build/train --task ponder --seed 2 --out FILE.gguf)
 *
 * First a curriculum: copying, then problems without checks, then with them; each level lasts until
 * nine of ten of its problems come out right, or for its share of the tokens. Then full problems
 * with random key drop: in nine of ten sequences every layer and kv head loses a random part of
 * its older keys, most often the larger part, so that the model learns not to rely on any single
 * one. It never sees a cache policy. Checkpoints are written as it goes; the same command takes up
 * where it was stopped. The number of threads does not change the result.
 */
#define _POSIX_C_SOURCE 200809L
#include "backprop.h"
#include "gguf.h"
#include "model_put.h"
#include "options.h"
#include "seconds.h"
#include "task.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    SHARES = 4, /* of a batch, each with a gradient of its own: whatever the threads, equal sums */
    MAX_BATCH = 128,     /* sequences a step                                                 */
    BATCH_TOKENS = 2048, /* tokens a step, at least                                          */
    KEY_DROP_AGE = 8,    /* newer keys are never dropped                                     */
    WARMUP_STEPS = 60,
    CHECKPOINT_SECONDS = 60
};

#define KEY_DROP_MOST 0.97f /* share of the older keys */

static const struct level {
    int n_variables, n_checks;
    double until; /* share of the first phase's tokens: lasts no longer */
} levels[] = {
    { 0, 0, 0.21 }, { 6, 0, 0.85 }, { 8, 1, 1.0 }, { TASK_MAX_VARIABLES, TASK_MAX_CHECKS, 1.0 }
};
enum { N_LEVELS = sizeof levels / sizeof *levels };

typedef struct options {
    const task *task;
    const char *out, *checkpoint;
    uint64_t seed;
    int n_threads, n_validate, check, write_only;
    double tokens[2]; /* of the two phases */
    double learning_rate;
} options;

/* What a checkpoint holds, followed by the weights and the two moments of AdamW. */
typedef struct progress {
    char magic[8];
    uint64_t n_weights;
    prng random;
    int64_t step; /* of the optimiser */
    int32_t phase, phase_step, level, padding;
    double phase_tokens;
    double loss, right, solved; /* running means: per token, per token, per problem            */
} progress;

typedef struct job {
    problem p;
    sequence seq;
    uint8_t *dropped;
    int full; /* of the current level */
    sequence_result result;
} job;

typedef struct trainer {
    options opt;
    model_shape shape;
    size_t n;
    progress at;
    float *weights, *transposed, *moment1, *moment2;
    float *gradient[SHARES];
    backprop *worker[SHARES]; /* one a thread */
    job jobs[MAX_BATCH];
    int n_jobs;
    float scale;
} trainer;

const char program_name[] = "train";

/* ---- data ---------------------------------------------------------------------------------- */

static struct level current_level(const trainer *t)
{
    struct level now = levels[t->at.level];
    if (now.n_variables > t->opt.task->n_variables) now.n_variables = t->opt.task->n_variables;
    if (now.n_checks > t->opt.task->n_checks) now.n_checks = t->opt.task->n_checks;
    return now;
}

/* The first level: random words, and the same again. Looking things up in the prompt is learned
 * much sooner here than from problems. */
static void draw_copy(trainer *t, problem *p)
{
    prng *r = &t->at.random;
    const int n = 8 + prng_below(r, 25), first = task_token("0");
    for (int i = 0; i < n; i++) {
        p->tokens[i] = first + prng_below(r, task_vocabulary() - first);
        p->tokens[n + 1 + i] = p->tokens[i];
    }
    p->tokens[n] = task_token("?");
    p->n_prompt = n + 1;
    p->n_tokens = 2 * n + 1;
}

/* Half of the problems are of the current level, the others have fewer variables: with one size
 * alone the model would learn where to look by counting. */
static void draw_problem(trainer *t, job *j)
{
    struct level size = current_level(t);
    prng *r = &t->at.random;
    j->full =
        size.n_variables == 0 || (t->at.phase == 1 ? prng_below(r, 10) > 0 : prng_below(r, 2));
    if (size.n_variables == 0) {
        draw_copy(t, &j->p);
        return;
    }
    if (!j->full) size.n_variables = 2 + prng_below(r, size.n_variables - 1);
    task_generate(t->opt.task, size.n_variables, size.n_checks, SPLIT_TRAIN, r, &j->p);
}

static void draw_key_drop(trainer *t, job *j)
{
    prng *r = &t->at.random;
    j->seq.dropped = NULL;
    if (t->at.phase == 0 || prng_below(r, 10) == 0) return;
    const int n = t->shape.n_layers * t->shape.n_kv_heads * j->seq.n_tokens;
    const float rate = KEY_DROP_MOST * sqrtf(prng_uniform(r));
    for (int i = 0; i < n; i++) j->dropped[i] = prng_uniform(r) < rate;
    j->seq.dropped = j->dropped;
}

static int draw_batch(trainer *t)
{
    int n_tokens = 0, n_predicted = 0;
    for (t->n_jobs = 0; t->n_jobs < MAX_BATCH && n_tokens < BATCH_TOKENS; t->n_jobs++) {
        job *j = &t->jobs[t->n_jobs];
        draw_problem(t, j);
        j->seq.tokens = j->p.tokens;
        j->seq.n_tokens = j->p.n_tokens;
        j->seq.first = j->p.n_prompt - 1;
        j->seq.age = KEY_DROP_AGE;
        draw_key_drop(t, j);
        n_tokens += j->p.n_tokens;
        n_predicted += j->p.n_tokens - j->p.n_prompt;
    }
    t->scale = 1.0f / (float)n_predicted;
    return n_tokens;
}

/* ---- one step ------------------------------------------------------------------------------ */

typedef struct worker {
    trainer *t;
    int thread;
} worker;

static void run_share(trainer *t, int share, backprop *b)
{
    memset(t->gradient[share], 0, t->n * sizeof(float));
    for (int i = share; i < t->n_jobs; i += SHARES)
        t->jobs[i].result = backprop_run(b, t->weights, t->transposed, &t->jobs[i].seq, t->scale,
                                         t->gradient[share]);
}

static void *work(void *arg)
{
    const worker *w = arg;
    for (int share = w->thread; share < SHARES; share += w->t->opt.n_threads)
        run_share(w->t, share, w->t->worker[w->thread]);
    return NULL;
}

/* The batch's gradient in gradient[0]; its sums in the jobs' results. */
static void run_batch(trainer *t)
{
    pthread_t threads[SHARES];
    worker workers[SHARES];
    weights_transpose(&t->shape, t->weights, t->transposed);
    for (int i = 0; i < t->opt.n_threads; i++) {
        workers[i].t = t;
        workers[i].thread = i;
        if (i > 0 && pthread_create(&threads[i], NULL, work, &workers[i]) != 0)
            die("cannot start a thread");
    }
    work(&workers[0]);
    for (int i = 1; i < t->opt.n_threads; i++) pthread_join(threads[i], NULL);
    for (int share = 1; share < SHARES; share++)
        for (size_t k = 0; k < t->n; k++) t->gradient[0][k] += t->gradient[share][k];
}

static double share_done(const trainer *t) /* of the tokens of both phases */
{
    const double before = t->at.phase > 0 ? t->opt.tokens[0] : 0.0;
    return fmin(1.0, (before + t->at.phase_tokens) / (t->opt.tokens[0] + t->opt.tokens[1]));
}

static float learning_rate(const trainer *t)
{
    double rate = t->opt.learning_rate;
    if (t->at.step < WARMUP_STEPS) rate *= ((double)t->at.step + 1.0) / WARMUP_STEPS;
    return (float)(rate * (0.02 + 0.98 * 0.5 * (1.0 + cos(3.14159265358979 * share_done(t)))));
}

/* AdamW; the gradient is clipped to norm 1. Decay is small enough to apply to every weight but
 * the norms, which it would pull from 1 to 0: those are told apart by starting at 1. */
static void update(trainer *t, const float *is_norm)
{
    const float beta1 = 0.9f, beta2 = 0.98f, decay = 0.05f, rate = learning_rate(t);
    float *g = t->gradient[0];
    double square = 0.0;
    for (size_t i = 0; i < t->n; i++) square += (double)g[i] * g[i];
    const float clip = square > 1.0 ? (float)(1.0 / sqrt(square)) : 1.0f;
    t->at.step++;
    t->at.phase_step++;
    const float fix1 = 1.0f / (1.0f - (float)pow(beta1, (double)t->at.step));
    const float fix2 = 1.0f / (1.0f - (float)pow(beta2, (double)t->at.step));
    for (size_t i = 0; i < t->n; i++) {
        float x = g[i] * clip;
        t->moment1[i] = beta1 * t->moment1[i] + (1.0f - beta1) * x;
        t->moment2[i] = beta2 * t->moment2[i] + (1.0f - beta2) * x * x;
        float move = t->moment1[i] * fix1 / (sqrtf(t->moment2[i] * fix2) + 1e-8f);
        t->weights[i] -= rate * (move + decay * (1.0f - is_norm[i]) * t->weights[i]);
    }
}

static void note_results(trainer *t, int n_tokens)
{
    double loss = 0.0;
    int predicted = 0, right = 0, full = 0, solved = 0;
    for (int i = 0; i < t->n_jobs; i++) {
        const sequence_result *r = &t->jobs[i].result;
        loss += r->loss;
        predicted += r->n_predicted;
        right += r->n_right;
        full += t->jobs[i].full;
        solved += t->jobs[i].full && r->n_right == r->n_predicted;
    }
    progress *at = &t->at;
    const double blend = fmax(0.05, 1.0 / (double)at->phase_step);
    at->phase_tokens += n_tokens;
    at->loss += blend * (loss / predicted - at->loss);
    at->right += blend * ((double)right / predicted - at->right);
    if (full > 0) at->solved += blend * ((double)solved / full - at->solved);
    const int late = at->phase_tokens > levels[at->level].until * t->opt.tokens[0];
    if (at->phase == 0 && at->level + 1 < N_LEVELS && (at->solved > 0.9 || late)) {
        at->level++;
        at->solved = 0.0;
    }
}

/* ---- checkpoints --------------------------------------------------------------------------- */

static const char magic[8] = "rkvtrn1";

static int transfer(FILE *f, int writing, void *data, size_t bytes)
{
    return (writing ? fwrite(data, 1, bytes, f) : fread(data, 1, bytes, f)) == bytes;
}

static int transfer_all(trainer *t, FILE *f, int writing)
{
    const size_t bytes = t->n * sizeof(float);
    return transfer(f, writing, t->weights, bytes) && transfer(f, writing, t->moment1, bytes) &&
           transfer(f, writing, t->moment2, bytes);
}

static void save_checkpoint(trainer *t)
{
    char name[1024];
    snprintf(name, sizeof name, "%s.new", t->opt.checkpoint);
    FILE *f = fopen(name, "wb");
    if (!f) die("cannot write %s", name);
    int ok = transfer(f, 1, &t->at, sizeof t->at) && transfer_all(t, f, 1);
    if (fclose(f) != 0 || !ok || rename(name, t->opt.checkpoint) != 0)
        die("cannot write %s", t->opt.checkpoint);
}

static int load_checkpoint(trainer *t)
{
    FILE *f = fopen(t->opt.checkpoint, "rb");
    if (!f) return 0;
    progress at;
    int ok = transfer(f, 0, &at, sizeof at) && memcmp(at.magic, magic, sizeof magic) == 0 &&
             at.n_weights == t->n && transfer_all(t, f, 0);
    fclose(f);
    if (!ok) die("%s: damaged, or of another model; delete it to start again", t->opt.checkpoint);
    t->at = at;
    return 1;
}

/* ---- start, loop, end ---------------------------------------------------------------------- */

static float normal(prng *r)
{
    float sum = 0.0f; /* of 12 uniform numbers: variance 1, near enough to a normal */
    for (int i = 0; i < 12; i++) sum += prng_uniform(r);
    return sum - 6.0f;
}

static void fill_normal(float *x, size_t n, float deviation, prng *r)
{
    for (size_t i = 0; i < n; i++) x[i] = deviation * normal(r);
}

static void fill_ones(float *x, int n)
{
    for (int i = 0; i < n; i++) x[i] = 1.0f;
}

/* The query heads of the first layer start out looking 1, 2, 3, .. tokens back. Which word came
 * just before is what copying and looking up are built from; to find that out from nothing takes
 * longer than all the rest. Dimension 0 of every embedding is a constant for this; from it a key
 * is the same in each of its first rotary pairs, and a query that key turned by the distance. */
static void look_back(trainer *t, weights *w)
{
    enum { PAIRS = 5 };
    const model_shape *s = &t->shape;
    const float constant = 0.35f, gain = 1.5f;
    for (int i = 0; i < s->vocabulary; i++) w->embedding[(ptrdiff_t)i * s->dim] = constant;
    float *row = w->layer[0].qkv;
    for (int head = 0; head < s->n_heads + s->n_kv_heads; head++)
        for (int i = 0; i < s->head_dim / 2; i++, row += 2 * s->dim) {
            const double speed = pow((double)s->rope_base, -2.0 * i / s->head_dim);
            const double turn = head < s->n_heads ? -speed * (head + 1) : 0.0;
            if (i >= PAIRS) continue;
            row[0] = gain * (float)cos(turn);
            row[s->dim] = gain * (float)sin(turn);
        }
}

/* Matrices N(0, 1/in), but zeros in those that end a residual branch: at first the embedding goes
 * through untouched, and tokens can be told apart in every layer. */
static void initialise(trainer *t)
{
    const model_shape *s = &t->shape;
    prng *r = &t->at.random;
    weights w = weights_view(s, t->weights);
    const float wide = 1.0f / sqrtf((float)s->dim);
    const size_t dim = (size_t)s->dim, qkv = (size_t)(shape_q_dim(s) + 2 * shape_kv_dim(s));
    fill_normal(w.embedding, (size_t)s->vocabulary * dim, wide, r);
    for (int l = 0; l < s->n_layers; l++) {
        fill_ones(w.layer[l].attn_norm, s->dim);
        fill_normal(w.layer[l].qkv, qkv * dim, wide, r);
        fill_ones(w.layer[l].ffn_norm, s->dim);
        fill_normal(w.layer[l].gate_up, 2 * (size_t)s->ffn_dim * dim, wide, r);
    }
    fill_ones(w.final_norm, s->dim);
    look_back(t, &w);
}

static void mark_norms(const trainer *t, float *is_norm)
{
    weights w = weights_view(&t->shape, is_norm);
    for (int l = 0; l < t->shape.n_layers; l++) {
        fill_ones(w.layer[l].attn_norm, t->shape.dim);
        fill_ones(w.layer[l].ffn_norm, t->shape.dim);
    }
    fill_ones(w.final_norm, t->shape.dim);
}

static void show_progress(const trainer *t, double elapsed, double tokens_done, int last)
{
    const double all = t->opt.tokens[0] + t->opt.tokens[1];
    const double done = share_done(t);
    const double speed = tokens_done / fmax(elapsed, 1e-9);
    const int left = (int)((1.0 - done) * all / fmax(speed, 1.0)), width = 24;
    struct level size = current_level(t);
    char bar[32];
    for (int i = 0; i < width; i++) bar[i] = i < (int)(done * width + 0.5) ? '#' : '.';
    bar[width] = 0;
    fprintf(stderr,
            "%s[%s] %3.0f %%  %s %d+%d  loss %.4f  tokens %.2f %%  problems %.1f %%"
            "  %.1fk tokens/s  left %d:%02d%s",
            isatty(2) ? "\r" : "", bar, 100.0 * done, t->at.phase ? "key drop" : "learn",
            size.n_variables, size.n_checks, t->at.loss, 100.0 * t->at.right, 100.0 * t->at.solved,
            speed * 1e-3, left / 60, left % 60, isatty(2) && !last ? "  " : "\n");
}

static void train(trainer *t)
{
    float *is_norm = allocate(t->n, sizeof *is_norm);
    mark_norms(t, is_norm);
    const double start = seconds();
    double shown = start, saved = start, tokens_done = 0.0;
    while (t->at.phase < 2) {
        if (t->at.phase_tokens >= t->opt.tokens[t->at.phase]) {
            t->at.phase++;
            t->at.level = N_LEVELS - 1;
            t->at.phase_step = 0;
            t->at.phase_tokens = 0.0;
            save_checkpoint(t);
            continue;
        }
        int n_tokens = draw_batch(t);
        run_batch(t);
        update(t, is_norm);
        note_results(t, n_tokens);
        tokens_done += n_tokens;
        const double now = seconds();
        if (now - shown > (isatty(2) ? 0.3 : 20.0)) {
            show_progress(t, now - start, tokens_done, 0);
            shown = now;
        }
        if (now - saved > CHECKPOINT_SECONDS) {
            save_checkpoint(t);
            saved = now;
        }
    }
    if (tokens_done > 0.0) show_progress(t, seconds() - start, tokens_done, 1);
    free(is_norm);
}

/* Teacher-forced accuracy on problems that training has not seen. */
static void validate(trainer *t, int n_problems)
{
    prng r = { t->opt.seed };
    int solved = 0;
    weights_transpose(&t->shape, t->weights, t->transposed);
    for (int i = 0; i < n_problems; i++) {
        job *j = &t->jobs[0];
        task_generate_full(t->opt.task, SPLIT_VALIDATION, &r, &j->p);
        sequence seq = { j->p.tokens, j->p.n_tokens, j->p.n_prompt - 1, NULL, 0 };
        sequence_result got =
            backprop_run(t->worker[0], t->weights, t->transposed, &seq, 0.0f, NULL);
        solved += got.n_right == got.n_predicted;
    }
    printf("validation, every token right: %d of %d problems\n", solved, n_problems);
}

/* Compares the gradient with central differences, with key drop and without. */
static int check_gradient(trainer *t)
{
    int failed = 0;
    fill_normal(t->weights, t->n, 0.1f, &t->at.random); /* no zeros, which would hide gradients */
    for (int phase = 0; phase < 2; phase++) {
        job *j = &t->jobs[0];
        t->at.phase = phase;
        t->at.level = 1;
        do draw_batch(t);
        while (phase == 1 && !j->seq.dropped);
        t->n_jobs = 1;
        t->opt.n_threads = 1;
        run_batch(t);
        for (int i = 0; i < 40; i++) {
            size_t k = (size_t)(prng_next(&t->at.random) % t->n);
            const float keep = t->weights[k], step = 1e-2f;
            double loss[2];
            for (int side = 0; side < 2; side++) {
                t->weights[k] = keep + (side ? step : -step);
                weights_transpose(&t->shape, t->weights, t->transposed);
                loss[side] =
                    t->scale *
                    backprop_run(t->worker[0], t->weights, t->transposed, &j->seq, 0.0f, NULL).loss;
            }
            t->weights[k] = keep;
            double want = (loss[1] - loss[0]) / (2.0 * (double)step), got = t->gradient[0][k];
            int ok = fabs(want - got) <= 1e-6 + 0.05 * fabs(want);
            failed += !ok;
            if (!ok) printf("weight %zu: gradient %.6g, difference %.6g\n", k, got, want);
        }
    }
    printf("gradient check: %d of 80 weights off\n", failed);
    return failed != 0;
}

/* ---- the model as a GGUF file --------------------------------------------------------------- */

static void put_metadata(const trainer *t, gguf_writer *w)
{
    const model_shape *s = &t->shape;
    const char *words[256];
    for (int i = 0; i < s->vocabulary; i++) words[i] = task_word(i);
    gguf_put_string(w, "general.architecture", "llama");
    gguf_put_string(w, "general.name", t->opt.task->name);
    model_put_shape(w, s);
    gguf_put_u32(w, "tokenizer.ggml.bos_token_id", (uint32_t)task_token("<s>"));
    gguf_put_u32(w, "tokenizer.ggml.eos_token_id", (uint32_t)task_token("</s>"));
    gguf_put_f32(w, "llama.attention.layer_norm_rms_epsilon", s->norm_eps);
    gguf_put_f32(w, "llama.rope.freq_base", s->rope_base);
    gguf_put_string(w, "tokenizer.ggml.model", "none"); /* whole words, divided by spaces */
    gguf_put_strings(w, "tokenizer.ggml.tokens", words, (size_t)s->vocabulary);
}

static void write_model(trainer *t)
{
    const model_shape *s = &t->shape;
    const weights all = weights_view(s, t->weights);
    gguf_error error;
    gguf_writer *w = gguf_writer_create();
    if (!w) die("out of memory");
    put_metadata(t, w);
    model_put_weights(w, s, &all);
    if (!gguf_write(w, t->opt.out, &error)) die("%s: %s", t->opt.out, error.text);
    gguf_writer_destroy(w);
    printf("wrote %s\n", t->opt.out);
}

/* ---- main ---------------------------------------------------------------------------------- */

static void create(trainer *t)
{
    const model_shape shape = { 3,     128,          4, 2, 32, 320, 0, TASK_MAX_TOKENS, 500000.0f,
                                1e-5f, ROPE_ADJACENT };
    t->shape = shape;
    t->shape.vocabulary = task_vocabulary();
    t->n = weights_count(&t->shape);
    t->weights = allocate(t->n, sizeof(float));
    t->transposed = allocate(t->n, sizeof(float));
    t->moment1 = allocate(t->n, sizeof(float));
    t->moment2 = allocate(t->n, sizeof(float));
    for (int i = 0; i < SHARES; i++) t->gradient[i] = allocate(t->n, sizeof(float));
    for (int i = 0; i < t->opt.n_threads; i++) {
        t->worker[i] = backprop_create(&t->shape, TASK_MAX_TOKENS);
        if (!t->worker[i]) die("out of memory");
    }
    for (int i = 0; i < MAX_BATCH; i++)
        t->jobs[i].dropped =
            allocate((size_t)(t->shape.n_layers * t->shape.n_kv_heads), TASK_MAX_TOKENS);
    memcpy(t->at.magic, magic, sizeof magic);
    t->at.n_weights = t->n;
    t->at.random.state = t->opt.seed;
    initialise(t);
}

static const char usage[] =
    "usage: train [--task ponder|brief] [--seed N] [--out FILE.gguf] [--checkpoint FILE]\n"
    "             [--tokens N] [--finetune N] [--rate X] [--threads N] [--validate PROBLEMS]\n"
    "       train --write-only ..   writes the last checkpoint as it is\n"
    "       train --check           compares gradients with finite differences";

static options parse(int argc, char **argv)
{
    options o = { task_find("ponder"), NULL, NULL, 1, 2, 200, 0, 0, { 3.5e6, 20e6 }, 3e-3 };
    for (int i = 1; i < argc; i++) {
        const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (strcmp(name, "--help") == 0) {
            puts(usage);
            exit(0);
        }
        if (strcmp(name, "--check") == 0) {
            o.check = 1;
            continue;
        }
        if (strcmp(name, "--write-only") == 0) {
            o.write_only = 1;
            continue;
        }
        if (!value) die("%s needs a value, or is unknown; --help lists the options", name);
        i++;
        if (strcmp(name, "--task") == 0)
            o.task = task_find(value);
        else if (strcmp(name, "--out") == 0)
            o.out = value;
        else if (strcmp(name, "--checkpoint") == 0)
            o.checkpoint = value;
        else if (strcmp(name, "--seed") == 0)
            o.seed = (uint64_t)option_whole(name, value, 0, INT64_MAX);
        else if (strcmp(name, "--tokens") == 0)
            o.tokens[0] = option_number(name, value, 1, 1e12);
        else if (strcmp(name, "--finetune") == 0)
            o.tokens[1] = option_number(name, value, 0, 1e12);
        else if (strcmp(name, "--rate") == 0)
            o.learning_rate = option_number(name, value, 0, 1);
        else if (strcmp(name, "--threads") == 0)
            o.n_threads = (int)option_whole(name, value, 1, SHARES);
        else if (strcmp(name, "--validate") == 0)
            o.n_validate = (int)option_whole(name, value, 0, 1000000);
        else
            die("unknown option %s; --help lists the options", name);
    }
    if (!o.task) die("no such task; there are ponder and brief");
    return o;
}

int main(int argc, char **argv)
{
    static trainer t;
    char checkpoint[256];
    t.opt = parse(argc, argv);
    if (!t.opt.checkpoint) {
        snprintf(checkpoint, sizeof checkpoint, "build/train-%s-%llu.ckpt", t.opt.task->name,
                 (unsigned long long)t.opt.seed);
        t.opt.checkpoint = checkpoint;
    }
    if (t.opt.out) check_writable(t.opt.out);
    if (!t.opt.check && !t.opt.write_only) check_writable(t.opt.checkpoint);
    create(&t);
    if (t.opt.check) return check_gradient(&t);
    if (load_checkpoint(&t))
        printf("resuming from %s\n", t.opt.checkpoint);
    else if (t.opt.write_only)
        die("there is no checkpoint %s to write a model from", t.opt.checkpoint);
    if (!t.opt.write_only) {
        train(&t);
        validate(&t, t.opt.n_validate);
    }
    if (t.opt.out) write_model(&t);
    return 0;
}
