/* adapter.c - examples/llama/rkv_llama.h inside llama.cpp, on tiny models with random weights.
 * make test-llama        (needs llama.cpp: make llama-cpp) */
#include "bed.h"

static int no_graphs; /* whether graphs of the adapter's own fail */
#define ggml_backend_graph_compute(b, g) \
    (no_graphs ? GGML_STATUS_ALLOC_FAILED : (ggml_backend_graph_compute)(b, g))

#include "key_place.h"
#include "oracle.h"
#include "snapshot.h"
#include "witness.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- help ------------------------------------------------------------------------------------ */

/* The adapter's list and llama.cpp's memory hold the same positions. */
static void expect_same_tokens(bed *b, llama_seq_id seq)
{
    const int n = rkv_llama_live(b->r, seq);
    snapshot s;
    int i, k, n_found = 0;
    if (n == 0) {
        expect_int("empty", seq, llama_memory_seq_pos_max(llama_get_memory(b->ctx), seq), -1);
        return;
    }
    snapshot_take(&s, b->ctx, seq, n);
    for (i = 0; i < s.n; i++)
        for (k = 0; k < n; k++) n_found += s.positions[i] == rkv_llama_positions(b->r, seq)[k];
    expect_int("tokens found", seq, n_found, n);
    for (i = 1; i < n; i++)
        if (rkv_llama_positions(b->r, seq)[i] <= rkv_llama_positions(b->r, seq)[i - 1])
            case_fail("positions are not ascending");
    snapshot_free(&s);
}

static int holds(const bed *b, llama_seq_id seq, int position)
{
    int i;
    for (i = 0; i < rkv_llama_live(b->r, seq); i++)
        if (rkv_llama_positions(b->r, seq)[i] == position) return 1;
    return 0;
}

/* ---- nothing evicted: nothing changed -------------------------------------------------------- */

static const enum ggml_type key_types[] = { GGML_TYPE_F32,  GGML_TYPE_F16,  GGML_TYPE_BF16,
                                            GGML_TYPE_Q8_0, GGML_TYPE_Q5_1, GGML_TYPE_Q5_0,
                                            GGML_TYPE_Q4_1, GGML_TYPE_Q4_0, GGML_TYPE_IQ4_NL };
enum { N_KEY_TYPES = sizeof key_types / sizeof *key_types };

static void test_same_logits(void)
{
    int kind, t, flash, i;
    for (kind = TINY_LLAMA; kind <= TINY_GEMMA3; kind++)
        for (t = 0; t < N_KEY_TYPES; t++)
            for (flash = 0; flash < 2; flash++) {
                setup s = setup_of((tiny_kind)kind, 60, 40);
                bed with, without;
                s.keys = key_types[t];
                s.flash = flash;
                case_begin("equal logits, %s, keys %s, flash attention %d",
                           tiny_name((tiny_kind)kind), ggml_type_name(s.keys), flash);
                bed_open(&with, &s);
                s.is_plain = 1;
                bed_open(&without, &s);
                expect_int("attach", 0, with.attached, 0);
                for (i = 0; i < 100; i += i < 40 ? 40 : 1) { /* queries are seen from 84 on */
                    if (!expect_decode(&with, 0, i, i < 40 ? 40 : 1)) break;
                    expect_decode(&without, 0, i, i < 40 ? 40 : 1);
                    expect_same_logits("logits", &with, &without);
                }
                expect_int("rounds", 0, rkv_llama_get_counters(with.r).n_rounds, 0);
                expect_int("live", 0, rkv_llama_live(with.r, 0), 100);
                bed_close(&with);
                bed_close(&without);
                case_end();
            }
}

/* ---- kept sets against the oracle --------------------------------------------------------------
 * Keys from llama.cpp's own state, queries from a callback of the test's own. */

typedef struct trial {
    witness seen;
    struct llama_context **ctx;
    rkv_config config;
    int n_rounds, n_equal, n_last_kept;
    double worst;
} trial;

/* One layer's scores in double, added to the sum. */
static void oracle_layer(trial *t, const snapshot *s, const rkv_llama_round *round, int layer,
                         int row_layer, double *sum, double *tolerance)
{
    const int n = round->n_tokens, window = 8, group = TINY_HEADS / TINY_KV_HEADS;
    float *row = alloc_checked(TINY_KV_HEADS * TINY_DIM * sizeof *row);
    float *keys = alloc_checked((size_t)n * TINY_DIM * sizeof *keys);
    float *votes = alloc_checked((size_t)(group * window * TINY_DIM) * sizeof *votes);
    oracle_head heads[TINY_KV_HEADS];
    int h, i, k, g;
    for (h = 0; h < TINY_KV_HEADS; h++) {
        for (i = 0; i < n; i++)
            for (k = 0; k < s->n; k++)
                if (s->positions[k] == round->positions[i]) {
                    snapshot_row(s, row_layer, k, row, TINY_KV_HEADS * TINY_DIM);
                    memcpy(keys + i * TINY_DIM, row + h * TINY_DIM, TINY_DIM * sizeof *keys);
                }
        for (g = 0; g < group; g++)
            for (i = 0; i < window; i++)
                memcpy(votes + (g * window + i) * TINY_DIM,
                       &t->seen.queries[layer][round->positions[n - window + i]]
                                       [(h * group + g) * TINY_DIM],
                       TINY_DIM * sizeof *votes);
        oracle_score(&heads[h], &t->config, keys, votes, n, TINY_DIM, group, (float)t->seen.scale,
                     0);
        *tolerance += oracle_tolerance(&heads[h], &t->config) / TINY_KV_HEADS;
    }
    oracle_add_layer(sum, heads, TINY_KV_HEADS);
    for (h = 0; h < TINY_KV_HEADS; h++) oracle_free(&heads[h]);
    free(row);
    free(keys);
    free(votes);
}

static void judge(void *user, const rkv_llama_round *round)
{
    trial *t = user;
    const int n = round->n_tokens;
    double *sum = alloc_checked((size_t)n * sizeof *sum), tolerance = 0, gap, scale = 0;
    int32_t *kept = alloc_checked((size_t)n * sizeof *kept);
    snapshot s;
    int i, n_kept;
    snapshot_take(&s, *t->ctx, round->seq, n);
    memset(sum, 0, (size_t)n * sizeof *sum);
    for (i = 0; i < witness_scored(&t->seen) && s.n > 0; i++)
        oracle_layer(t, &s, round, witness_layer(&t->seen, i), i, sum, &tolerance);
    expect_int("scores", 0, round->n_scores, n - 8);
    for (i = 0; i < round->n_scores; i++) {
        const double error = fabs(round->scores[i] - sum[i]);
        if (fabs(sum[i]) > scale) scale = fabs(sum[i]);
        if (error > t->worst) t->worst = error;
        expect_near("score", i, round->scores[i], sum[i], tolerance);
    }
    n_kept = oracle_select(&t->config, sum, round->pins, n, kept, &gap);
    t->n_rounds++;
    t->n_last_kept = round->n_kept;
    if (n_kept == round->n_kept && memcmp(kept, round->kept, (size_t)n_kept * sizeof *kept) == 0)
        t->n_equal++;
    else if (gap > 2 * tolerance)
        case_fail("another set was kept, gap %g", gap);
    snapshot_free(&s);
    free(sum);
    free(kept);
}

static void run_judged(tiny_kind kind, enum ggml_type keys, int flash, key_place place,
                       int n_threads, int n_ctx)
{
    static trial t;
    setup s = setup_of(kind, 128, 64);
    bed b;
    int i;
    memset(&t, 0, sizeof t);
    witness_begin(&t.seen, kind);
    s.keys = keys;
    s.flash = flash;
    s.other = witness_watch;
    s.other_user = &t.seen;
    s.options.copy_keys = place == COPIED;
    s.options.n_threads = n_threads;
    s.options.pin_limit = 20;
    s.options.observe = judge;
    s.options.observe_user = &t;
    s.n_ctx = n_ctx;
    t.ctx = &b.ctx;
    t.config = rkv_config_default(128);
    if (kind == TINY_GEMMA3) t.config.protect = TINY_WINDOW;
    case_begin("kept sets, %s, keys %s, flash attention %d%s, %d threads, n_ctx %d",
               tiny_name(kind), ggml_type_name(keys), flash, place_names[place], n_threads, n_ctx);
    is_on_device = place == ON_DEVICE;
    bed_open(&b, &s);
    expect_int("attach", 0, b.attached, 0);
    expect_decode(&b, 0, 0, 150);
    for (i = 150; i < 600; i++)
        if (!expect_decode(&b, 0, i, 1)) break;
    expect_true("rounds", t.n_rounds >= 6);
    expect_int("equal sets", 0, t.n_equal, t.n_rounds);
    expect_int("tokens kept", 0, t.n_last_kept, 128);
    for (i = 0; i < 20; i++) expect_true("the prompt stays", holds(&b, 0, i));
    expect_same_tokens(&b, 0);
    is_on_device = 0;
    bed_close(&b);
    case_end();
}

static void test_kept_sets(void)
{
    static const enum ggml_type types[] = { GGML_TYPE_F16, GGML_TYPE_F32, GGML_TYPE_BF16,
                                            GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 };
    int t, flash;
    for (t = 0; t < 5; t++)
        for (flash = 0; flash < 2; flash++) {
            run_judged(TINY_LLAMA, types[t], flash, IN_PLACE, 1, 512);
            run_judged(TINY_LLAMA, types[t], flash, ON_DEVICE, 1, 512);
        }
    run_judged(TINY_LLAMA, GGML_TYPE_F16, 1, COPIED, 1, 512);
    run_judged(TINY_LLAMA, GGML_TYPE_F16, 1, IN_PLACE, 2, 512);
    run_judged(TINY_QWEN2, GGML_TYPE_F16, 1, IN_PLACE, 1, 512);
    run_judged(TINY_QWEN3, GGML_TYPE_F16, 0, IN_PLACE, 1, 512);
    run_judged(TINY_GEMMA3, GGML_TYPE_F16, 1, IN_PLACE, 1, 512);
    run_judged(TINY_GEMMA3, GGML_TYPE_F32, 0, IN_PLACE, 1, 512);
    run_judged(TINY_GEMMA3, GGML_TYPE_F16, 1, ON_DEVICE, 1, 512);
    /* Both caches have 256 cells: the masks tell which is which. */
    run_judged(TINY_GEMMA3, GGML_TYPE_F16, 1, IN_PLACE, 1, 256);
    run_judged(TINY_GEMMA3, GGML_TYPE_F16, 0, IN_PLACE, 1, 256);
}

/* ---- bounded memory -------------------------------------------------------------------------- */

static void test_bounded(void)
{
    setup s = setup_of(TINY_LLAMA, 384, 128);
    rkv_llama_counters c;
    bed b;
    int i;
    case_begin("2,200 tokens in 512 cells");
    bed_open(&b, &s);
    expect_decode(&b, 0, 0, 30);
    for (i = 30; i < 2200; i++)
        if (!expect_decode(&b, 0, i, 1)) break;
    c = rkv_llama_get_counters(b.r);
    expect_int("tokens", 0, c.n_tokens, 2200);
    expect_int("rounds", 0, c.n_rounds, (2200 - 384 - 1) / 128);
    expect_int("evicted", 0, c.n_evicted, 128 * c.n_rounds);
    expect_int("live", 0, c.n_live, 2200 - c.n_evicted);
    expect_int("peak", 0, c.peak_live, 512);
    expect_int("highest cell", 0, c.highest_cell, 511);
    expect_int("position", 0, rkv_llama_position(b.r, 0), 2200); /* past n_ctx */
    expect_int("bytes per cell", 0, (int64_t)c.bytes_per_cell,
               3 * 2 * TINY_KV_HEADS * TINY_DIM * 2);
    expect_int("bytes saved", 0, (int64_t)c.bytes_saved, c.n_evicted * (int64_t)c.bytes_per_cell);
    for (i = 0; i < 30; i++) expect_true("the prompt stays", holds(&b, 0, i));
    for (i = 2192; i < 2200; i++) expect_true("the window stays", holds(&b, 0, i));
    expect_same_tokens(&b, 0);
    bed_close(&b);
    case_end();
}

static void test_long_prompt(void)
{
    setup s = setup_of(TINY_LLAMA, 256, 128);
    rkv_llama_counters c;
    bed b, plain;
    int i;
    case_begin("a prompt of 3,000 tokens in one batch, 384 cells used, n_batch 256");
    s.n_batch = 256;
    bed_open(&b, &s);
    s.is_plain = 1;
    bed_open(&plain, &s);
    expect_decode(&b, 0, 0, 3000);
    expect_decode(&plain, 0, 0, 256);
    c = rkv_llama_get_counters(b.r);
    expect_int("peak", 0, c.peak_live, 384);
    expect_true("several parts", c.n_decodes > 20);
    for (i = 0; i < 3000; i++)
        if (!rkv_llama_logits(b.r, i)) case_fail("token %d has no logits", i);
    for (i = 0; i < 256; i++)
        expect_bytes("logits of an early part", rkv_llama_logits(b.r, i),
                     llama_get_logits_ith(plain.ctx, i), TINY_VOCABULARY * sizeof(float));
    expect_true("last logits", rkv_llama_logits(b.r, -1) == llama_get_logits_ith(b.ctx, -1));
    expect_true("last logits", rkv_llama_logits(b.r, 2999) == llama_get_logits_ith(b.ctx, -1));
    expect_int("an earlier token's index", 0, rkv_llama_index(b.r, 0), -1);
    expect_true("no such token", rkv_llama_logits(b.r, 3000) == NULL);
    for (i = 0; i < 124; i++) expect_true("half of the budget is pinned", holds(&b, 0, i));
    expect_same_tokens(&b, 0);
    expect_decode(&b, 0, 3000, 1);
    expect_int("compress", 0, rkv_llama_compress(b.r, 0), 0);
    expect_int("compressed", 0, rkv_llama_live(b.r, 0), 256);
    bed_close(&b);
    bed_close(&plain);
    case_end();
}

/* A batch with next to nothing filled in. */
static void test_plain_batch(void)
{
    setup s = setup_of(TINY_LLAMA, 64, 32);
    llama_token tokens[200];
    bed b;
    int i;
    case_begin("llama_batch_get_one, 200 tokens, then one at a time");
    for (i = 0; i < 200; i++) tokens[i] = token_at(i);
    bed_open(&b, &s);
    expect_int("decode", 0, rkv_llama_decode(b.r, llama_batch_get_one(tokens, 200)), 0);
    expect_true("logits", rkv_llama_logits(b.r, -1) != NULL);
    expect_true("not asked for", rkv_llama_logits(b.r, 0) == NULL);
    for (i = 0; i < 200; i++)
        expect_int("decode", i, rkv_llama_decode(b.r, llama_batch_get_one(&tokens[i], 1)), 0);
    expect_int("position", 0, rkv_llama_position(b.r, 0), 400);
    expect_int("peak", 0, rkv_llama_get_counters(b.r).peak_live, 96);
    expect_same_tokens(&b, 0);
    bed_close(&b);
    case_end();
}

/* ---- eviction is masking -----------------------------------------------------------------------
 * With the cells in the same order: a token that a round has evicted, its cell taken by a token of
 * another sequence; the token masked, by a sequence that does not hold it; minus infinity written
 * into the mask. Equal to the bit. */

enum { VICTIM = 20, BEFORE = 48, AFTER = 24 };

static void condemn(void *user, llama_seq_id seq, int n, const int32_t *positions, float *scores)
{
    int i;
    (void)user;
    (void)seq;
    for (i = 0; i < n; i++) scores[i] = positions[i] == VICTIM ? -1.0f : 1.0f;
}

static bool blind(struct ggml_tensor *t, bool ask, void *user)
{
    const int *cell = user;
    if (ask && *cell >= 0 && t->op == GGML_OP_SOFT_MAX && t->src[1]) {
        struct ggml_tensor *mask = t->src[1];
        int64_t i;
        while (mask->op != GGML_OP_NONE || mask->view_src)
            mask = mask->view_src ? mask->view_src : mask->src[0];
        for (i = 0; i < mask->ne[1]; i++) {
            char *at = (char *)mask->data + (size_t)i * mask->nb[1];
            const float minus_infinity = -INFINITY;
            const uint16_t half = 0xfc00;
            if (mask->type == GGML_TYPE_F32)
                memcpy(at + 4 * *cell, &minus_infinity, 4);
            else
                memcpy(at + 2 * *cell, &half, 2);
        }
    }
    return !ask;
}

static void test_masking(int flash)
{
    setup s = setup_of(TINY_LLAMA, BEFORE - 1, 1);
    bed evicted, masked, blinded;
    int cell = -1, i;
    case_begin("eviction is masking, flash attention %d", flash);
    s.flash = flash;
    s.n_sequences = 2;
    s.options.pin_limit = -1;
    s.options.score = condemn;
    bed_open(&evicted, &s);
    s.is_plain = 1;
    bed_open(&masked, &s);
    s.other = blind;
    s.other_user = &cell;
    bed_open(&blinded, &s);
    expect_decode(&evicted, 0, 0, BEFORE);
    expect_decode(&masked, 0, 0, BEFORE);
    expect_decode(&blinded, 0, 0, BEFORE);
    expect_int("compress", 0, rkv_llama_compress(evicted.r, 0), 0);
    expect_true("evicted", !holds(&evicted, 0, VICTIM));
    expect_decode(&evicted, 1, 0, 1); /* takes the cell */
    expect_int("its cell", 0, evicted.r->sequences[1].cells[0][0], VICTIM);
    evicted.r->budget = evicted.r->config.budget = BEFORE + AFTER; /* no further rounds */
    llama_memory_seq_cp(llama_get_memory(masked.ctx), 0, 1, -1, -1);
    llama_memory_seq_rm(llama_get_memory(masked.ctx), 1, VICTIM, VICTIM + 1);
    cell = VICTIM;
    for (i = BEFORE; i < BEFORE + AFTER; i++) {
        if (!expect_decode(&evicted, 0, i, 1)) break;
        expect_decode(&masked, 1, i, 1);
        expect_same_logits("evicted and masked", &evicted, &masked);
        if (flash) continue;
        expect_decode(&blinded, 0, i, 1);
        expect_same_logits("evicted and minus infinity", &evicted, &blinded);
    }
    bed_close(&evicted);
    bed_close(&masked);
    bed_close(&blinded);
    case_end();
}

/* ---- several sequences ----------------------------------------------------------------------- */

static void test_two_sequences(void)
{
    setup s = setup_of(TINY_LLAMA, 96, 32);
    struct llama_batch batch = llama_batch_init(8, 0, 2);
    bed b;
    int i, k;
    case_begin("two sequences, each with a budget of its own");
    s.n_sequences = 3;
    s.n_ctx = 256;
    bed_open(&b, &s);
    expect_decode(&b, 0, 0, 50);
    expect_decode(&b, 1, 0, 20);
    for (i = 0; i < 400; i++) { /* a batch of both, the second two tokens at a time */
        batch.n_tokens = 3;
        for (k = 0; k < 3; k++) {
            batch.token[k] = token_at(7 * i + k);
            batch.pos[k] = k == 0 ? 50 + i : 20 + 2 * i + k - 1;
            batch.n_seq_id[k] = 1;
            batch.seq_id[k][0] = k > 0;
            batch.logits[k] = k != 1;
        }
        if (rkv_llama_decode(b.r, batch)) {
            case_fail("step %d: %s", i, rkv_llama_error(b.r));
            break;
        }
        expect_true("logits", rkv_llama_logits(b.r, 0) && rkv_llama_logits(b.r, 2));
        if (rkv_llama_live(b.r, 0) > 128 || rkv_llama_live(b.r, 1) > 128)
            case_fail("step %d: more than budget and buffer", i);
    }
    expect_int("position", 0, rkv_llama_position(b.r, 0), 450);
    expect_int("position", 1, rkv_llama_position(b.r, 1), 820);
    for (i = 0; i < 44; i++) expect_true("prompt of 0", holds(&b, 0, i));
    for (i = 0; i < 20; i++) expect_true("prompt of 1", holds(&b, 1, i));
    expect_same_tokens(&b, 0);
    expect_same_tokens(&b, 1);
    expect_int("clear", 0, rkv_llama_seq_rm(b.r, 0, -1, -1), 0);
    expect_int("cleared", 0, rkv_llama_live(b.r, 0), 0);
    expect_same_tokens(&b, 0);
    expect_same_tokens(&b, 1);
    expect_decode(&b, 0, 0, 100);
    expect_int("keep", 0, rkv_llama_seq_keep(b.r, 0), 0);
    expect_same_tokens(&b, 0);
    expect_same_tokens(&b, 1);
    expect_int("cells in use", 0, rkv_llama_get_counters(b.r).n_live, rkv_llama_live(b.r, 0));
    llama_batch_free(batch);
    bed_close(&b);
    case_end();
}

static void test_shared_prefix(void)
{
    setup s = setup_of(TINY_LLAMA, 96, 32);
    bed b;
    int i;
    case_begin("a shared prefix is never evicted, and is when it is no longer shared");
    s.n_sequences = 2;
    s.n_ctx = 256;
    s.options.pin_limit = -1;
    bed_open(&b, &s);
    expect_decode(&b, 0, 0, 40);
    expect_int("copy", 0, rkv_llama_seq_cp(b.r, 0, 1, -1, -1), 0);
    for (i = 40; i < 300; i++) {
        if (!expect_decode(&b, 0, i, 1)) break;
        if (!expect_decode(&b, 1, i, 1)) break;
    }
    for (i = 0; i < 40; i++) expect_true("shared", holds(&b, 0, i) && holds(&b, 1, i));
    expect_int("cells in use", 0, rkv_llama_get_counters(b.r).n_live,
               rkv_llama_live(b.r, 0) + rkv_llama_live(b.r, 1) - 40);
    expect_refusal("not empty", &b, rkv_llama_seq_cp(b.r, 0, 1, -1, -1), "not empty");
    expect_int("clear", 0, rkv_llama_seq_rm(b.r, 1, -1, -1), 0);
    for (i = 300; i < 600; i++)
        if (!expect_decode(&b, 0, i, 1)) break;
    for (i = 0; i < 40 && holds(&b, 0, i); i++) {}
    expect_true("no longer shared", i < 40);
    expect_same_tokens(&b, 0);
    bed_close(&b);
    case_end();
}

/* Cells run out before a sequence is full: rounds of others make room, then there is none. */
static void test_shortage(void)
{
    setup s = setup_of(TINY_LLAMA, 64, 128);
    bed b;
    int i;
    case_begin("cells are short: rounds come early, then llama_decode's 1");
    s.n_sequences = 4;
    s.n_ctx = 256;
    bed_open(&b, &s);
    for (i = 0; i < 4; i++)
        if (!expect_decode(&b, i, 0, 60)) break;
    expect_decode(&b, 0, 60, 16); /* the last cells */
    expect_decode(&b, 0, 76, 8);  /* a round frees 12 */
    expect_int("rounds", 0, rkv_llama_get_counters(b.r).n_rounds, 1);
    expect_decode(&b, 0, 84, 4);
    expect_decode(&b, 1, 60, 4); /* another one */
    expect_decode(&b, 2, 60, 4);
    expect_decode(&b, 3, 60, 4); /* now every sequence has its budget */
    expect_int("no cells", 0, decode(&b, 1, 64, 9), RKV_LLAMA_NO_CELLS);
    expect_true("says so", strstr(rkv_llama_error(b.r), "cells are in use") != NULL);
    expect_int("taken back", 0, rkv_llama_position(b.r, 1), 64);
    for (i = 0; i < 4; i++) expect_same_tokens(&b, i);
    bed_close(&b);
    case_end();
}

static void count_task(void *arg, int index)
{
    ((int *)arg)[index]++; /* no other thread has this index */
}

/* Every task is done once: on fewer threads than tasks or more, and where the graph fails. */
static void expect_tasks(const bed *b)
{
    int n, i;
    for (n = 1; n < 9; n++) {
        int counts[9] = { 0 };
        no_graphs = n == 8;
        b->r->config.parallel_for(b->r->config.pool_handle, n, count_task, counts);
        for (i = 0; i < 9; i++) expect_int("tasks", n, counts[i], i < n);
    }
    no_graphs = 0;
}

static void test_threads(void)
{
    static const struct {
        int context, options, config, want;
    } cases[] = { { 2, 0, 0, 2 }, { 2, 1, 0, 1 }, { 1, 3, 0, 3 }, { 1, 0, 4, 4 }, { 1, 2, 4, 2 } };
    size_t i;
    case_begin("threads of rounds: the options', else the config's, else the context's");
    for (i = 0; i < sizeof cases / sizeof *cases; i++) {
        rkv_config config = rkv_config_default(64);
        setup s = setup_of(TINY_LLAMA, 64, 32);
        bed b;
        s.n_threads = cases[i].context;
        s.options.n_threads = cases[i].options;
        if (cases[i].config) {
            config.n_threads = cases[i].config;
            config.parallel_for = reversed_for;
            s.options.config = &config;
        }
        bed_open(&b, &s);
        expect_int("threads", (int)i, b.r->config.n_threads, cases[i].want);
        expect_true("a pool", (b.r->config.parallel_for != NULL) == (cases[i].want > 1));
        if (b.r->config.parallel_for) expect_tasks(&b);
        expect_decode(&b, 0, 0, 150);
        expect_true("rounds", rkv_llama_get_counters(b.r).n_rounds > 1);
        bed_close(&b);
    }
    case_end();
}

/* ---- policies, pins -------------------------------------------------------------------------- */

static void test_policies(void)
{
    const rkv_config streaming = rkv_config_streaming(100), snapkv = rkv_config_snapkv(64);
    setup s = setup_of(TINY_LLAMA, 64, 32);
    uint64_t seed = 1;
    bed b;
    int i, k;
    case_begin("StreamingLLM: the prompt and the newest");
    s.options.config = &streaming;
    bed_open(&b, &s);
    expect_decode(&b, 0, 0, 20);
    for (i = 20; i < 200; i++)
        if (!expect_decode(&b, 0, i, 1)) break;
    expect_int("compress", 0, rkv_llama_compress(b.r, 0), 0);
    for (i = 0; i < 20; i++) expect_true("prompt", holds(&b, 0, i));
    for (i = 200 - 44; i < 200; i++) expect_true("newest", holds(&b, 0, i));
    bed_close(&b);
    s.options.pin_limit = -1;
    bed_open(&b, &s);
    for (i = 0; i < 200; i++)
        if (!expect_decode(&b, 0, i, 1)) break;
    expect_int("compress", 0, rkv_llama_compress(b.r, 0), 0);
    for (i = 0; i < 4; i++) expect_true("sinks", holds(&b, 0, i));
    for (i = 200 - 60; i < 200; i++) expect_true("newest", holds(&b, 0, i));
    bed_close(&b);
    case_end();
    for (k = 0; k < 2; k++) {
        case_begin("%s", k ? "SnapKV" : "random");
        s.options.pin_limit = 0;
        s.options.config = k ? &snapkv : NULL;
        s.options.score = k ? NULL : rkv_llama_score_random;
        s.options.score_user = &seed;
        bed_open(&b, &s);
        expect_decode(&b, 0, 0, 20);
        for (i = 20; i < 200; i++)
            if (!expect_decode(&b, 0, i, 1)) break;
        expect_int("compress", 0, rkv_llama_compress(b.r, 0), 0);
        for (i = 0; i < 20; i++) expect_true("prompt", holds(&b, 0, i));
        for (i = 192; i < 200; i++) expect_true("window", holds(&b, 0, i));
        expect_int("kept", 0, rkv_llama_live(b.r, 0), 64);
        expect_same_tokens(&b, 0);
        bed_close(&b);
        case_end();
    }
}

static void test_pins(void)
{
    setup s = setup_of(TINY_LLAMA, 64, 32);
    bed b;
    int i, n;
    case_begin("pins by hand");
    bed_open(&b, &s);
    expect_int("pin", 0, rkv_llama_pin(b.r, 0, 10, 20), 0); /* to come */
    expect_decode(&b, 0, 0, 30);
    for (i = 30; i < 300; i++)
        if (!expect_decode(&b, 0, i, 1)) break;
    for (i = 10; i < 20; i++) expect_true("pinned", holds(&b, 0, i));
    for (i = 0, n = 0; i < 10; i++) n += holds(&b, 0, i);
    expect_true("the rest of the prompt is not", n < 10);
    expect_int("unpin", 0, rkv_llama_unpin(b.r, 0, 0, -1), 0);
    for (i = 300; i < 700; i++)
        if (!expect_decode(&b, 0, i, 1)) break;
    for (i = 10, n = 0; i < 20; i++) n += holds(&b, 0, i);
    expect_true("unpinned", n < 10);
    expect_int("pin too much", 0, rkv_llama_pin(b.r, 0, 0, -1), 0);
    n = rkv_llama_position(b.r, 0);
    for (i = 0; i < 40; i++)
        if (decode(&b, 0, n + i, 1)) break;
    expect_true("refused in the end", i < 40);
    expect_refusal("too many pins", &b, decode(&b, 0, n + i, 1),
                   "leave none to choose in a budget of 64");
    expect_int("unpin", 0, rkv_llama_unpin(b.r, 0, 0, -1), 0);
    expect_decode(&b, 0, n + i, 1);
    bed_close(&b);
    case_end();
}

/* Pins leave one token to choose, by hand and by pin_limit; a pin more is refused. Where
 * config.pinned leaves none, the newest stay, and no other token may be pinned. */
static void test_pins_leave_one(void)
{
    rkv_config config = rkv_config_default(64);
    setup s = setup_of(TINY_LLAMA, 64, 200);
    bed b;
    int n_pins, i, n;
    for (n_pins = 55; n_pins <= 57; n_pins++) {
        case_begin("%d pins beside a window of 8 in a budget of 64", n_pins);
        bed_open(&b, &s);
        expect_int("pin", 0, rkv_llama_pin(b.r, 0, 0, n_pins), 0);
        expect_decode(&b, 0, 0, 100);
        if (n_pins > 55) {
            expect_refusal("one too many", &b, rkv_llama_compress(b.r, 0), "leave none to choose");
            expect_int("all stay", 0, rkv_llama_live(b.r, 0), 100);
        } else {
            expect_int("compress", 0, rkv_llama_compress(b.r, 0), 0);
            expect_int("kept", 0, rkv_llama_live(b.r, 0), 64);
            for (i = 0, n = 0; i < 55; i++) n += holds(&b, 0, i);
            for (i = 92; i < 100; i++) n += holds(&b, 0, i);
            expect_int("pinned and newest", 0, n, 63);
        }
        bed_close(&b);
        case_end();
    }
    case_begin("the largest pin_limit leaves one token to choose");
    s.options.pin_limit = 1000;
    bed_open(&b, &s);
    expect_decode(&b, 0, 0, 100);
    expect_int("compress", 0, rkv_llama_compress(b.r, 0), 0);
    for (i = 0; i < 55; i++) expect_true("pinned", holds(&b, 0, i));
    bed_close(&b);
    case_end();
    case_begin("config.pinned and the window fill the budget");
    config.pinned = 56;
    s.options.pin_limit = -1;
    s.options.config = &config;
    bed_open(&b, &s);
    expect_decode(&b, 0, 0, 100);
    expect_int("compress", 0, rkv_llama_compress(b.r, 0), 0);
    for (i = 0, n = 0; i < 56; i++) n += holds(&b, 0, i);
    for (i = 92; i < 100; i++) n += holds(&b, 0, i);
    expect_int("pinned and newest", 0, n, 64);
    expect_int("pin", 0, rkv_llama_pin(b.r, 0, 100, 101), 0);
    expect_decode(&b, 0, 100, 20);
    expect_refusal("one more", &b, rkv_llama_compress(b.r, 0), "leave none to choose");
    bed_close(&b);
    case_end();
}

/* ---- taking back ----------------------------------------------------------------------------- */

static void test_drafts(void)
{
    setup s = setup_of(TINY_LLAMA, 96, 32);
    bed with, without;
    int i;
    case_begin("drafts that are rejected leave no trace");
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
    expect_int("live", 0, rkv_llama_live(with.r, 0), rkv_llama_live(without.r, 0));
    expect_bytes("positions", rkv_llama_positions(with.r, 0), rkv_llama_positions(without.r, 0),
                 (size_t)rkv_llama_live(without.r, 0) * sizeof(int32_t));
    i = with.r->sequences[0].reach;
    expect_refusal("too far", &with, rkv_llama_seq_rm(with.r, 0, i - 1, -1),
                   "cannot be taken back");
    expect_int("as far as it goes", 0, rkv_llama_seq_rm(with.r, 0, i, -1), 0);
    expect_int("position", 0, rkv_llama_position(with.r, 0), i);
    expect_same_tokens(&with, 0);
    for (; i < 700; i++)
        if (!expect_decode(&with, 0, i, 1)) break;
    expect_int("a hole", 0, rkv_llama_seq_rm(with.r, 0, 600, 650), 0);
    expect_same_tokens(&with, 0);
    for (; i < 900; i++)
        if (!expect_decode(&with, 0, i, 1)) break;
    expect_same_tokens(&with, 0);
    bed_close(&with);
    bed_close(&without);
    case_end();
}

static bool stop_here(void *user)
{
    int *left = user;
    return *left > 0 && --*left == 0;
}

static void test_aborted(void)
{
    setup s = setup_of(TINY_LLAMA, 96, 32);
    int left = 0, i, stopped = 0;
    bed b;
    case_begin("an aborted decode is taken back");
    bed_open(&b, &s);
    llama_set_abort_callback(b.ctx, stop_here, &left);
    expect_decode(&b, 0, 0, 40);
    for (i = 1; i < 300; i += 7) {
        left = i;
        if (decode(&b, 0, 40, 300) == 0) break; /* parts, rounds */
        stopped++;
        expect_int("position", i, rkv_llama_position(b.r, 0), 40);
        expect_same_tokens(&b, 0);
    }
    left = 0;
    expect_true("stopped", stopped > 0);
    i = rkv_llama_position(b.r, 0);
    expect_decode(&b, 0, i, 10);
    expect_same_tokens(&b, 0);
    bed_close(&b);
    case_end();
}

/* ---- save and load --------------------------------------------------------------------------- */

static void test_saved(tiny_kind kind, enum ggml_type keys, key_place place)
{
    setup s = setup_of(kind, 96, 32);
    bed a, b, c, other;
    unsigned char *bytes;
    size_t n, k;
    int i;
    double worst = 0;
    case_begin("save and load, %s, keys %s%s", tiny_name(kind), ggml_type_name(keys),
               place_names[place]);
    is_on_device = place == ON_DEVICE;
    s.keys = keys;
    bed_open(&a, &s);
    bed_open(&b, &s);
    bed_open(&c, &s);
    expect_decode(&a, 0, 0, 30);
    for (i = 30; i < 300; i++)
        if (!expect_decode(&a, 0, i, 1)) break;
    n = rkv_llama_save_size(a.r, 0);
    bytes = alloc_checked(n);
    expect_int("save", 0, rkv_llama_save(a.r, 0, bytes, n), 0);
    expect_refusal("too few bytes", &a, rkv_llama_save(a.r, 0, bytes, n - 1), "too few bytes");
    expect_decode(&b, 0, 0, 77); /* forgotten by load */
    if (rkv_llama_load(b.r, 0, bytes, n)) case_fail("load: %s", rkv_llama_error(b.r));
    if (rkv_llama_load(c.r, 0, bytes, n)) case_fail("load: %s", rkv_llama_error(c.r));
    expect_int("live", 0, rkv_llama_live(b.r, 0), rkv_llama_live(a.r, 0));
    expect_bytes("positions", rkv_llama_positions(b.r, 0), rkv_llama_positions(a.r, 0),
                 (size_t)rkv_llama_live(a.r, 0) * sizeof(int32_t));
    expect_same_tokens(&b, 0);
    for (i = 300; i < 500; i++) {
        if (!expect_decode(&a, 0, i, 1) || !expect_decode(&b, 0, i, 1)) break;
        expect_decode(&c, 0, i, 1);
        expect_same_logits("two that were loaded", &b, &c);
        for (k = 0; k < TINY_VOCABULARY && i == 300; k++)
            worst = fmax(worst, fabs(llama_get_logits_ith(a.ctx, -1)[k] -
                                     llama_get_logits_ith(b.ctx, -1)[k]));
    }
    expect_near("logits after loading", 0, worst, 0, 0.1); /* another order of cells */
    for (i = 0; i < 30; i++) expect_true("prompt", holds(&b, 0, i));
    expect_same_tokens(&b, 0);
    expect_refusal("cut off", &b, rkv_llama_load(b.r, 0, bytes, n - 1), "cut off");
    expect_refusal("cut off", &b, rkv_llama_load(b.r, 0, bytes, 7), "cut off");
    for (k = 0; k < n; k += 1 + n / 300) {
        bytes[k] ^= 0x10;
        expect_int("damaged", (int)k, rkv_llama_load(b.r, 0, bytes, n), RKV_LLAMA_REFUSED);
        bytes[k] ^= 0x10;
    }
    expect_int("empty after that", 0, rkv_llama_live(b.r, 0), 0);
    expect_same_tokens(&b, 0);
    expect_decode(&b, 0, 0, 10);
    expect_int("load again", 0, rkv_llama_load(b.r, 0, bytes, n), 0);
    s = setup_of(kind == TINY_QWEN3 ? TINY_LLAMA : TINY_QWEN3, 96, 32);
    s.n_sequences = 2;
    bed_open(&other, &s);
    expect_refusal("another model", &other, rkv_llama_load(other.r, 0, bytes, n), "another model");
    expect_decode(&other, 1, 0, 10);
    expect_refusal("not alone", &other, rkv_llama_load(other.r, 0, bytes, n), "another sequence");
    bed_close(&other);
    bed_close(&a);
    bed_close(&b);
    bed_close(&c);
    is_on_device = 0;
    free(bytes);
    case_end();
}

int main(void)
{
    beds_begin();
    test_same_logits();
    test_kept_sets();
    test_bounded();
    test_long_prompt();
    test_plain_batch();
    test_masking(0);
    test_masking(1);
    test_two_sequences();
    test_shared_prefix();
    test_shortage();
    test_threads();
    test_policies();
    test_pins();
    test_pins_leave_one();
    test_drafts();
    test_aborted();
    test_saved(TINY_LLAMA, GGML_TYPE_F16, IN_PLACE);
    test_saved(TINY_LLAMA, GGML_TYPE_F16, ON_DEVICE);
    test_saved(TINY_QWEN3, GGML_TYPE_Q8_0, IN_PLACE);
    test_saved(TINY_GEMMA3, GGML_TYPE_F32, IN_PLACE);
    return beds_end();
}
