/* policies.c - the policies beside R-KV in examples/llama/rkv_llama.h: kept sets over several
 * rounds against a computation in double on keys read back from llama.cpp; what is carried from
 * round to round when drafts are taken back, a sequence is copied or saved; rotary embeddings.
 * make test-llama        (needs llama.cpp: make llama-cpp) */
#include "bed.h"

#include "key_place.h"
#include "snapshot.h"
#include "witness.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DIM = TINY_DIM, PAIRS = TINY_DIM / 2, GROUP = TINY_HEADS / TINY_KV_HEADS, OFFSETS = 10 };

/* ---- rotary embedding, as the models are written --------------------------------------------- */

/* Of the layers that are scored; in float, as everywhere. */
static double frequency(tiny_kind kind, int f)
{
    const double base = kind == TINY_GEMMA3 ? (double)TINY_GEMMA3_BASE : 10000.0;
    const double divisor = kind == TINY_LLAMA3   ? (double)tiny_rope_factor(f)
                           : kind == TINY_GEMMA3 ? (double)TINY_GEMMA3_FACTOR
                                                 : 1.0;
    return (double)(float)(pow(base, -(double)f / PAIRS) / divisor);
}

/* Where the numbers of pair f stand: adjacent in llama's architecture, else in halves. */
static void pair_at(tiny_kind kind, int f, int *a, int *b)
{
    const int adjacent = kind == TINY_LLAMA || kind == TINY_LLAMA3;
    *a = adjacent ? 2 * f : f;
    *b = adjacent ? 2 * f + 1 : f + PAIRS;
}

static void turn(tiny_kind kind, double position, const double *x, double *out)
{
    int f, a, b;
    for (f = 0; f < PAIRS; f++) {
        const double angle = position * frequency(kind, f);
        pair_at(kind, f, &a, &b);
        out[a] = x[a] * cos(angle) - x[b] * sin(angle);
        out[b] = x[a] * sin(angle) + x[b] * cos(angle);
    }
}

static double pair_length(tiny_kind kind, int f, const double *x)
{
    int a, b;
    pair_at(kind, f, &a, &b);
    return sqrt(x[a] * x[a] + x[b] * x[b]);
}

static double dot(const double *x, const double *y)
{
    double sum = 0;
    int i;
    for (i = 0; i < DIM; i++) sum += x[i] * y[i];
    return sum;
}

/* ---- every query of llama.cpp, and what a policy remembers by position ---- */

typedef struct memory {
    double importance[WITNESS_TOKENS], similarity[WITNESS_TOKENS];
} memory;

static struct trial {
    tiny_kind kind;
    rkv_config config;
    witness seen;
    memory memory[WITNESS_LAYERS][TINY_KV_HEADS];
    int newest; /* the newest position that a round has seen, -1 at first */
    struct llama_context **ctx;
    int n_rounds, n_equal;
} trial;

/* One KV head in one round. */
typedef struct head {
    int layer, index, n, n_candidates, n_new, first_vote; /* rows from first_vote on vote */
    const int32_t *positions;
    double (*keys)[DIM];
    double *score; /* [n_candidates] */
} head;

static void query_of(const head *h, int group, int position, double *out)
{
    const float *q = &trial.seen.queries[h->layer][position][(h->index * GROUP + group) * DIM];
    int i;
    for (i = 0; i < DIM; i++) out[i] = (double)q[i];
}

/* ---- the policies in double ------------------------------------------------------------------ */

/* Each row's part in the attention of row t's query, over rows 0 to t. */
static void attend(const head *h, int group, int t, double *p)
{
    double q[DIM], largest = -INFINITY, sum = 0;
    int i;
    query_of(h, group, h->positions[t], q);
    for (i = 0; i <= t; i++) {
        p[i] = trial.seen.scale * dot(q, h->keys[i]);
        if (p[i] > largest) largest = p[i];
    }
    for (i = 0; i <= t; i++) sum += p[i] = exp(p[i] - largest);
    for (i = 0; i <= t; i++) p[i] /= sum;
}

static void remember_attention(const head *h)
{
    memory *m = &trial.memory[h->layer][h->index];
    double *p = alloc_checked((size_t)h->n * sizeof *p);
    const int adds = trial.config.policy == RKV_POLICY_H2O;
    int i, t, g;
    for (i = 0; i < h->n && !adds; i++)
        m->importance[h->positions[i]] *= pow((double)trial.config.decay, h->n_new);
    for (g = 0; g < GROUP; g++)
        for (t = h->first_vote; t < h->n; t++) {
            attend(h, g, t, p);
            for (i = 0; i <= t; i++) {
                double *to = &m->importance[h->positions[i]];
                if (adds)
                    *to += p[i];
                else if (i < t && p[i] > *to)
                    *to = p[i];
            }
        }
    free(p);
}

static void remember_similarity(const head *h)
{
    memory *m = &trial.memory[h->layer][h->index];
    double(*plain)[DIM] = alloc_checked((size_t)h->n * sizeof *plain);
    int i, j, k;
    for (i = 0; i < h->n; i++) {
        double length;
        turn(trial.kind, -(double)h->positions[i], h->keys[i], plain[i]);
        length = sqrt(dot(plain[i], plain[i])) + 1e-8;
        for (k = 0; k < DIM; k++) plain[i][k] /= length;
    }
    for (i = 0; i < h->n; i++)
        for (j = h->n - h->n_new; j < h->n; j++) {
            const double cosine = j > i ? dot(plain[i], plain[j]) : 0;
            if (cosine > m->similarity[h->positions[i]]) m->similarity[h->positions[i]] = cosine;
        }
    free(plain);
}

/* Candidates with a smaller number; of two equal ones the more recent ranks higher. */
static double rank_of(const head *h, const double *by_position, int i)
{
    const double x = by_position[h->positions[i]];
    int k, n = 0;
    for (k = 0; k < h->n_candidates; k++) {
        const double other = by_position[h->positions[k]];
        n += other < x || (other == x && k < i);
    }
    return n;
}

static void score_memory(const head *h)
{
    const memory *m = &trial.memory[h->layer][h->index];
    const double lambda = (double)trial.config.lambda, share = 1.0 / h->n_candidates;
    int i;
    remember_attention(h);
    remember_similarity(h);
    for (i = 0; i < h->n_candidates; i++) {
        const double similar = trial.config.policy == RKV_POLICY_MEMORY_TRACES
                                   ? share * rank_of(h, m->similarity, i)
                                   : m->similarity[h->positions[i]];
        h->score[i] = lambda * share * rank_of(h, m->importance, i) - (1 - lambda) * similar;
    }
}

/* Means of the queries before rotary embedding, over all tokens but the first four. */
static void expect_query(const head *h, int group, double *mean, double *lengths)
{
    double q[DIM], plain[DIM];
    const int last = h->positions[h->n - 1];
    int t, i, f;
    memset(mean, 0, DIM * sizeof *mean);
    memset(lengths, 0, PAIRS * sizeof *lengths);
    for (t = 4; t <= last; t++) {
        query_of(h, group, t, q);
        turn(trial.kind, -(double)t, q, plain);
        for (i = 0; i < DIM; i++) mean[i] += plain[i] / (last - 3);
        for (f = 0; f < PAIRS; f++) lengths[f] += pair_length(trial.kind, f, plain) / (last - 3);
    }
}

static void score_triattention(const head *h)
{
    double mean[DIM], lengths[PAIRS], u[DIM], turned[DIM];
    double *s = alloc_checked((size_t)h->n_candidates * sizeof *s);
    int g, i, k, f;
    for (i = 0; i < h->n_candidates; i++) h->score[i] = -INFINITY;
    for (g = 0; g < GROUP; g++) {
        double average = 0, variance = 0;
        expect_query(h, g, mean, lengths);
        memset(u, 0, sizeof u);
        for (k = 0; k < OFFSETS; k++) {
            turn(trial.kind, h->positions[h->n - 1] + (double)(1 << k), mean, turned);
            for (i = 0; i < DIM; i++) u[i] += turned[i] / OFFSETS;
        }
        for (i = 0; i < h->n_candidates; i++) {
            s[i] = dot(u, h->keys[i]);
            for (f = 0; f < PAIRS; f++)
                s[i] += (lengths[f] - pair_length(trial.kind, f, mean)) *
                        pair_length(trial.kind, f, h->keys[i]);
            average += s[i] / h->n_candidates;
        }
        for (i = 0; i < h->n_candidates; i++)
            variance += (s[i] - average) * (s[i] - average) / h->n_candidates;
        for (i = 0; i < h->n_candidates; i++)
            h->score[i] = fmax(h->score[i], (s[i] - average) / sqrt(variance));
    }
    free(s);
}

static void score_random(const head *h, int nth_layer)
{
    int i;
    for (i = 0; i < h->n_candidates; i++) {
        uint64_t z = (uint64_t)trial.config.seed * 0x9e3779b97f4a7c15u;
        z += (uint64_t)nth_layer << 40 ^ (uint64_t)h->index << 32;
        z ^= (uint64_t)h->positions[i];
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        z ^= z >> 31;
        h->score[i] = (double)(z >> 40) / 16777216.0;
    }
}

static void score(const head *h, int nth_layer)
{
    const memory *m = &trial.memory[h->layer][h->index];
    int i;
    switch ((int)trial.config.policy) {
    case RKV_POLICY_H2O:
        remember_attention(h);
        for (i = 0; i < h->n_candidates; i++) h->score[i] = m->importance[h->positions[i]];
        break;
    case RKV_POLICY_TRIATTENTION: score_triattention(h); break;
    case RKV_POLICY_RANDOM: score_random(h, nth_layer); break;
    default: score_memory(h);
    }
}

/* ---- one round ------------------------------------------------------------------------------- */

/* Adds the mean over a layer's heads to the sum. */
static void judge_layer(const snapshot *s, const rkv_llama_round *round, int layer, int nth_layer,
                        double *sum)
{
    const int n = round->n_tokens;
    float *row = alloc_checked(TINY_KV_HEADS * DIM * sizeof *row);
    head h;
    int i, k, d;
    memset(&h, 0, sizeof h);
    h.layer = layer;
    h.n = n;
    h.n_candidates = round->n_scores;
    h.positions = round->positions;
    for (i = 0; i < n; i++) h.n_new += round->positions[i] > trial.newest;
    h.first_vote = n - (trial.config.votes < h.n_new ? trial.config.votes : h.n_new);
    h.keys = alloc_checked((size_t)n * sizeof *h.keys);
    h.score = alloc_checked((size_t)n * sizeof *h.score);
    for (h.index = 0; h.index < TINY_KV_HEADS; h.index++) {
        for (i = 0; i < n; i++)
            for (k = 0; k < s->n; k++) {
                if (s->positions[k] != round->positions[i]) continue;
                snapshot_row(s, nth_layer, k, row, TINY_KV_HEADS * DIM);
                for (d = 0; d < DIM; d++) h.keys[i][d] = (double)row[h.index * DIM + d];
            }
        score(&h, nth_layer);
        for (i = 0; i < h.n_candidates; i++) sum[i] += h.score[i] / TINY_KV_HEADS;
    }
    free(h.keys);
    free(h.score);
    free(row);
}

/* The pinned rows, the newest `tail`, and the best of the others: of equals the more recent.
 * Returns the lowest score that was chosen. */
static double choose(const rkv_llama_round *round, const double *sum, int tail, uint8_t *stays)
{
    int i, n_kept = 0, best = 0;
    for (i = 0; i < round->n_tokens; i++) {
        stays[i] = round->pins[i] || i >= round->n_tokens - tail;
        n_kept += stays[i];
    }
    for (; n_kept < trial.config.budget; n_kept++) {
        for (best = -1, i = 0; i < round->n_scores; i++)
            if (!stays[i] && (best < 0 || sum[i] >= sum[best])) best = i;
        stays[best] = 1;
    }
    return sum[best];
}

/* How far a float score may be from that in double. Ranks jump where two numbers are equal but for
 * rounding: by one or two places in each head. */
static double tolerance(const rkv_llama_round *round, double score_size)
{
    const int n_layers = witness_scored(&trial.seen);
    const int is_ranked = trial.config.policy == RKV_POLICY_MEMORY_TRACES ||
                          trial.config.policy == RKV_POLICY_MEMORY_PROSE;
    return 2e-4 * (1 + score_size) + (is_ranked ? 1.0 * n_layers / round->n_scores : 0);
}

static void judge(void *user, const rkv_llama_round *round)
{
    const int n = round->n_tokens;
    const int tail =
        trial.config.protect > trial.config.window ? trial.config.protect : trial.config.window;
    double *sum = alloc_checked((size_t)n * sizeof *sum);
    uint8_t *stays = alloc_checked((size_t)n);
    snapshot s;
    double lowest;
    int i, n_equal = 0;
    (void)user;
    memset(sum, 0, (size_t)n * sizeof *sum);
    snapshot_take(&s, *trial.ctx, round->seq, n);
    expect_int("scores", 0, round->n_scores, n - trial.config.window);
    for (i = 0; i < witness_scored(&trial.seen) && s.n > 0; i++)
        judge_layer(&s, round, witness_layer(&trial.seen, i), i, sum);
    lowest = choose(round, sum, tail, stays);
    for (i = 0; i < round->n_scores; i++)
        expect_near("score", i, (double)round->scores[i], sum[i], tolerance(round, fabs(sum[i])));
    for (i = 0; i < round->n_kept; i++) {
        const int k = round->kept[i];
        n_equal += stays[k];
        if (!stays[k]) expect_near("kept", k, sum[k], lowest, 2 * tolerance(round, fabs(lowest)));
    }
    trial.n_rounds++;
    trial.n_equal += n_equal;
    expect_int("kept", 0, round->n_kept, trial.config.budget);
    trial.newest = round->positions[n - 1];
    snapshot_free(&s);
    free(sum);
    free(stays);
}

static rkv_config random_7(int budget)
{
    return rkv_config_random(budget, 7);
}

static const struct {
    const char *name;
    rkv_config (*make)(int budget);
} presets[] = { { "memory_traces", rkv_config_memory_traces },
                { "memory_prose", rkv_config_memory_prose },
                { "h2o", rkv_config_h2o },
                { "triattention", rkv_config_triattention },
                { "random", random_7 } };
enum { N_PRESETS = sizeof presets / sizeof *presets, TRACES = 0, H2O = 2, TRIATTENTION, RANDOM };

/* Decodes random vectors in place of tokens: the vocabulary is so small that the keys of a first
 * layer would be equal many times over, but for rounding, and so would be their similarities. */
static int decode_vectors(bed *b, int begin, int n)
{
    const int size = llama_model_n_embd(b->model);
    struct llama_batch batch = llama_batch_init(n, size, 1);
    int i, k, status;
    batch.n_tokens = n;
    for (i = 0; i < n; i++) {
        rng random = rng_seed(5000 + (uint64_t)(begin + i));
        for (k = 0; k < size; k++) batch.embd[i * size + k] = (float)(0.3 * rng_normal(&random));
        batch.pos[i] = begin + i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = 1;
    }
    status = rkv_llama_decode(b->r, batch);
    if (status) case_fail("decode at %d: %d: %s", begin, status, rkv_llama_error(b->r));
    llama_batch_free(batch);
    return status == 0;
}

static void run_judged(int preset, tiny_kind kind, enum ggml_type keys, int flash, key_place place)
{
    setup s = setup_of(kind, 128, 64);
    rkv_config config = presets[preset].make(128);
    bed b;
    int i;
    case_begin("%s, %s, keys %s, flash attention %d%s", presets[preset].name, tiny_name(kind),
               ggml_type_name(keys), flash, place_names[place]);
    memset(&trial, 0, sizeof trial);
    witness_begin(&trial.seen, kind);
    s.keys = keys;
    s.flash = flash;
    s.other = witness_watch;
    s.other_user = &trial.seen;
    s.options.config = &config;
    s.options.copy_keys = place == COPIED;
    s.options.pin_limit = 20;
    s.options.observe = judge;
    trial.ctx = &b.ctx;
    trial.kind = kind;
    trial.config = config;
    if (kind == TINY_GEMMA3) trial.config.protect = TINY_WINDOW;
    trial.newest = -1;
    is_on_device = place == ON_DEVICE;
    bed_open(&b, &s);
    expect_int("attach", 0, b.attached, 0);
    decode_vectors(&b, 0, 150);
    for (i = 150; i < 600; i++)
        if (!decode_vectors(&b, i, 1)) break;
    expect_true("rounds", trial.n_rounds >= 6);
    expect_true("equal sets, but for a few ranks", trial.n_equal >= trial.n_rounds * 126);
    is_on_device = 0;
    bed_close(&b);
    case_end();
}

static void test_kept_sets(void)
{
    int p;
    for (p = 0; p < N_PRESETS; p++) {
        run_judged(p, TINY_LLAMA, GGML_TYPE_F16, 1, IN_PLACE);
        run_judged(p, TINY_LLAMA3, GGML_TYPE_F32, 0, ON_DEVICE);
        run_judged(p, TINY_QWEN3, GGML_TYPE_F16, 0, COPIED);
        run_judged(p, TINY_GEMMA3, GGML_TYPE_F16, 1, IN_PLACE);
    }
    /* Quantised keys are stored in another basis: that is nothing to those who do not turn them. */
    run_judged(H2O, TINY_LLAMA, GGML_TYPE_Q8_0, 1, IN_PLACE);
    run_judged(RANDOM, TINY_LLAMA, GGML_TYPE_Q4_0, 1, IN_PLACE);
}

/* ---- what is carried ------------------------------------------------------------------------- */

/* Two sequences carry the same, to the bit; of state, rows that a round has seen. */
static void expect_same_carried(const char *at, const rkv_llama *a, llama_seq_id of_a,
                                const rkv_llama *b, llama_seq_id of_b)
{
    const rkvli_sequence *s = &a->sequences[of_a], *t = &b->sequences[of_b];
    int l, plane;
    expect_int(at, 0, s->n_new, t->n_new);
    expect_int(at, 0, s->n, t->n);
    for (l = 0; l < a->n_layers; l++) {
        const rkvli_layer *x = &a->layers[l], *y = &b->layers[l];
        for (plane = 0; plane < x->kv_heads * a->n_floats && x->state; plane++)
            expect_bytes(at, rkvli_state(a, x, of_a) + plane * a->stride,
                         rkvli_state(b, y, of_b) + plane * b->stride,
                         (size_t)(s->n - s->n_new) * sizeof(float));
        if (x->means) /* behind the count is room to work */
            expect_bytes(at, rkvli_means(a, x, of_a), rkvli_means(b, y, of_b),
                         (size_t)(TINY_HEADS * (DIM + PAIRS) + 1) * sizeof(float));
    }
}

static void settle(bed *b, llama_seq_id seq)
{
    if (b->r->has_means) rkvli_average_ring(b->r, seq);
}

static void test_drafts(int preset)
{
    rkv_config config = presets[preset].make(96);
    setup s = setup_of(TINY_LLAMA, 96, 32);
    bed with, without;
    int i;
    case_begin("%s: drafts that are rejected leave no trace", presets[preset].name);
    s.options.config = &config;
    bed_open(&with, &s);
    bed_open(&without, &s);
    expect_decode(&with, 0, 0, 40);
    expect_decode(&without, 0, 0, 40);
    for (i = 40; i < 400; i++) {
        if (rkv_llama_live(with.r, 0) + 6 <= 128) { /* no round on account of the drafts */
            if (!expect_decode(&with, 0, i, 6)) break;
            expect_int("take back", i, rkv_llama_seq_rm(with.r, 0, i, -1), 0);
        }
        if (!expect_decode(&with, 0, i, 1)) break;
        expect_decode(&without, 0, i, 1);
        expect_same_logits("logits", &with, &without);
    }
    settle(&with, 0);
    settle(&without, 0);
    expect_true("rounds", rkv_llama_get_counters(with.r).n_rounds > 6);
    expect_bytes("positions", rkv_llama_positions(with.r, 0), rkv_llama_positions(without.r, 0),
                 (size_t)rkv_llama_live(without.r, 0) * sizeof(int32_t));
    /* Means are sums of the same in parts of other sizes: equal but for rounding. */
    if (!with.r->has_means) expect_same_carried("drafts", with.r, 0, without.r, 0);
    expect_int("take back", 0, rkv_llama_seq_rm(with.r, 0, with.r->sequences[0].reach, -1), 0);
    expect_true("new tokens", with.r->sequences[0].n_new >= 0);
    expect_int("a hole", 0, rkv_llama_seq_rm(with.r, 0, 10, 60), 0);
    for (i = rkv_llama_position(with.r, 0); i < 700; i++)
        if (!expect_decode(&with, 0, i, 1)) break;
    expect_int("empty", 0, rkv_llama_seq_rm(with.r, 0, 0, -1), 0);
    expect_int("clear", 0, rkv_llama_clear(without.r), 0);
    expect_same_carried("nothing", with.r, 0, without.r, 0);
    bed_close(&with);
    bed_close(&without);
    case_end();
}

/* A copy, and what is loaded, carry what the source does. */
static void test_copies(int preset)
{
    rkv_config config = presets[preset].make(96);
    setup s = setup_of(TINY_LLAMA, 96, 32);
    unsigned char *bytes;
    bed a, b;
    size_t n;
    int i;
    case_begin("%s: a copy carries the same, and so does what is loaded", presets[preset].name);
    s.n_sequences = 2;
    s.options.config = &config;
    s.options.pin_limit = -1;
    bed_open(&a, &s);
    bed_open(&b, &s);
    expect_decode(&a, 0, 0, 30);
    for (i = 30; i < 300; i++)
        if (!expect_decode(&a, 0, i, 1)) break;
    n = rkv_llama_save_size(a.r, 0);
    bytes = alloc_checked(n);
    expect_int("save", 0, rkv_llama_save(a.r, 0, bytes, n), 0);
    expect_decode(&b, 1, 0, 10);
    expect_int("clear", 0, rkv_llama_clear(b.r), 0);
    if (rkv_llama_load(b.r, 1, bytes, n)) case_fail("load: %s", rkv_llama_error(b.r));
    expect_same_carried("loaded", a.r, 0, b.r, 1);
    expect_int("averaged", 0, b.r->sequences[1].averaged, a.r->sequences[0].averaged);
    expect_int("copy", 0, rkv_llama_seq_cp(a.r, 0, 1, -1, -1), 0);
    expect_same_carried("copied", a.r, 0, a.r, 1);
    expect_int("forget", 0, rkv_llama_seq_rm(a.r, 0, -1, -1), 0);
    for (i = 300; i < 400; i++)
        if (!expect_decode(&a, 1, i, 1) || !expect_decode(&b, 1, i, 1)) break;
    expect_true("rounds", rkv_llama_get_counters(b.r).n_rounds > 2);
    expect_int("part of it", 0, rkv_llama_seq_cp(a.r, 1, 0, 100, -1), 0);
    expect_true("new tokens", a.r->sequences[0].n_new <= a.r->sequences[0].n);
    bed_close(&a);
    bed_close(&b);
    free(bytes);
    case_end();
}

static bool stop_here(void *user)
{
    int *left = user;
    return *left > 0 && --*left == 0;
}

/* A batch that fails is taken back; decoded then, it leaves what it would have left at once. */
static void test_aborted(void)
{
    rkv_config config = rkv_config_triattention(96);
    setup s = setup_of(TINY_LLAMA, 96, 128);
    bed a, b;
    int left = 0, i, n_stopped = 0;
    case_begin("triattention: an aborted decode leaves no trace in the means");
    s.options.config = &config;
    bed_open(&a, &s);
    bed_open(&b, &s);
    llama_set_abort_callback(a.ctx, stop_here, &left);
    expect_decode(&a, 0, 0, 60);
    expect_decode(&b, 0, 0, 60);
    for (i = 60; i < 65; i++) { /* these queries wait in the ring */
        expect_decode(&a, 0, i, 1);
        expect_decode(&b, 0, i, 1);
    }
    for (i = 1; i < 100; i += 9) {
        left = i;
        if (decode(&a, 0, 65, 100) == 0) break;
        n_stopped++;
        expect_int("position", i, rkv_llama_position(a.r, 0), 65);
    }
    left = 0;
    expect_true("stopped", n_stopped > 0);
    if (rkv_llama_position(a.r, 0) == 65) expect_decode(&a, 0, 65, 100);
    expect_decode(&b, 0, 65, 100);
    expect_same_carried("means", a.r, 0, b.r, 0);
    bed_close(&a);
    bed_close(&b);
    case_end();
}

/* A round without the queries of its newest tokens: nobody's likes all tokens alike. A round of a
 * sequence loaded into a smaller budget has no new tokens. */
static void test_no_votes(int preset)
{
    rkv_config config = presets[preset].make(96), smaller = presets[preset].make(64);
    setup s = setup_of(TINY_LLAMA, 96, 200);
    unsigned char *bytes;
    bed a, b;
    size_t n;
    int i;
    case_begin("%s: a round where nobody votes, a round without new tokens", presets[preset].name);
    s.options.config = &config;
    bed_open(&a, &s);
    for (i = 0; i < 110; i++) /* the next round is far: nobody looks at queries */
        if (!expect_decode(&a, 0, i, 1)) break;
    if (rkv_llama_compress(a.r, 0)) case_fail("compress: %s", rkv_llama_error(a.r));
    expect_int("kept", 0, rkv_llama_live(a.r, 0), 96);
    n = rkv_llama_save_size(a.r, 0);
    bytes = alloc_checked(n);
    expect_int("save", 0, rkv_llama_save(a.r, 0, bytes, n), 0);
    s.options.budget = 64;
    s.options.config = &smaller;
    bed_open(&b, &s);
    if (rkv_llama_load(b.r, 0, bytes, n)) case_fail("load: %s", rkv_llama_error(b.r));
    if (rkv_llama_compress(b.r, 0)) case_fail("compress: %s", rkv_llama_error(b.r));
    expect_int("kept", 0, rkv_llama_live(b.r, 0), 64);
    bed_close(&a);
    bed_close(&b);
    free(bytes);
    case_end();
}

/* H2O's share for the newest makes room for pins. */
static void test_pinned_h2o(void)
{
    rkv_config config = rkv_config_h2o(96);
    setup s = setup_of(TINY_LLAMA, 96, 32);
    bed b;
    int i, k;
    case_begin("h2o: its window makes room for pins");
    s.options.config = &config;
    bed_open(&b, &s);
    expect_int("pin", 0, rkv_llama_pin(b.r, 0, 0, 80), 0);
    for (i = 0; i < 400; i++)
        if (!expect_decode(&b, 0, i, 1)) break;
    expect_int("compress", 0, rkv_llama_compress(b.r, 0), 0);
    for (i = 0; i < 80; i++) expect_int("pinned", i, rkv_llama_positions(b.r, 0)[i], i);
    for (k = 0; k < 8; k++) expect_int("newest", k, rkv_llama_positions(b.r, 0)[95 - k], 399 - k);
    bed_close(&b);
    case_end();
}

/* ---- rotary embedding ------------------------------------------------------------------------ */

static void turn_back(const rkv_rope *rope, int dim, int position, const float *x, double *out)
{
    int f, i;
    for (i = 0; i < dim; i++) out[i] = (double)x[i];
    for (f = 0; f < rope->dims / 2; f++) {
        const int halves = rope->pairing == RKV_ROPE_HALVES;
        const int a = halves ? f : 2 * f, b = halves ? f + rope->dims / 2 : 2 * f + 1;
        const double angle = -position * (double)rope->frequencies[f];
        out[a] = (double)x[a] * cos(angle) - (double)x[b] * sin(angle);
        out[b] = (double)x[a] * sin(angle) + (double)x[b] * cos(angle);
    }
}

/* One token over and over: attention sees equal values, so that a layer's keys differ by their
 * positions alone. Turned back they are equal. */
static void test_rope(tiny_kind kind)
{
    enum { N = 400 };
    setup s = setup_of(kind, 480, 32);
    static llama_token tokens[N];
    bed b;
    int l, i, d;
    case_begin("%s: keys of one token, turned back, are equal", tiny_name(kind));
    s.keys = GGML_TYPE_F32;
    for (i = 0; i < N; i++) tokens[i] = 5;
    bed_open(&b, &s);
    expect_int("decode", 0, decode_tokens(&b, 0, 0, tokens, N), 0);
    for (l = 0; l < b.r->n_layers; l++) {
        const rkvli_layer *layer = &b.r->layers[l];
        const int32_t *cells = b.r->sequences[0].cells[layer->group];
        const int begin = layer->group == b.r->full ? 0 : N - TINY_WINDOW;
        float key[TINY_KV_HEADS * DIM] = { 0 };
        double first[DIM] = { 0 }, other[DIM] = { 0 }, worst = 0, moved = 0;
        expect_true("described", layer->rope.pairing > RKV_ROPE_NONE && !layer->rope_fault);
        expect_int("whole heads", l, layer->rope_row, DIM);
        for (i = begin; i < N; i++) {
            read_row(layer->keys, cells[i], key);
            turn_back(&layer->rope, DIM, i, key, i == begin ? first : other);
            for (d = 0; d < DIM && i > begin; d++) {
                worst = fmax(worst, fabs(other[d] - first[d]));
                moved = fmax(moved, fabs((double)key[d] - first[d]));
            }
        }
        expect_near("turned back", l, worst, 0, /* hidden states differ a little */
                    l                                    ? 0.1
                    : layer->keys->type == GGML_TYPE_F32 ? 2e-3
                                                         : 5e-3);
        expect_true("they were turned", moved > 1);
    }
    bed_close(&b);
    case_end();
}

int main(void)
{
    int p;
    beds_begin();
    test_rope(TINY_LLAMA);
    test_rope(TINY_LLAMA3);
    test_rope(TINY_QWEN2);
    test_rope(TINY_QWEN3);
    test_rope(TINY_GEMMA3);
    test_kept_sets();
    for (p = 0; p < N_PRESETS; p++) {
        test_drafts(p);
        test_copies(p);
        test_no_votes(p);
    }
    test_aborted();
    test_pinned_h2o();
    return beds_end();
}
