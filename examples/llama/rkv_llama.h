/* rkv_llama.h - R-KV key/value cache eviction inside an unpatched llama.cpp, in one C header.
 * SPDX-License-Identifier: MIT OR Unlicense      (both texts are at the end of rkv.h)
 *
 * A context with n_ctx cells then generates without end: whenever a sequence holds budget + buffer
 * tokens, one round keeps the best `budget` of them and frees the cells of the others. Everything
 * goes through llama.cpp's public API: an evaluation callback shows keys and queries, and
 * llama_memory_seq_rm frees cells. Positions run on: rotary embedding sees the true ones.
 *
 * In exactly one C file define RKV_IMPLEMENTATION and RKV_LLAMA_IMPLEMENTATION before the include.
 *
 *     rkv_llama_options options = {0};
 *     options.budget = 1024;                                  cells that a sequence keeps
 *     if ((wrong = rkv_llama_create(&r, &options)) != NULL) puts(wrong);
 *     params.n_ctx = 1024 + 128;                              budget + buffer, for each sequence
 *     rkv_llama_hook(r, &params);                             1: before the context is made
 *     ctx = llama_init_from_model(model, params);
 *     if (rkv_llama_attach(r, ctx) != 0) puts(rkv_llama_error(r));                 2: after
 *     if (rkv_llama_decode(r, batch) != 0) puts(rkv_llama_error(r));  3: not llama_decode
 *     token = llama_sampler_sample(sampler, ctx, -1);
 *     ...
 *     llama_free(ctx);
 *     rkv_llama_destroy(r);                                   after the context
 *
 * From attach on, change the context's memory through the calls below only: llama_decode,
 * llama_memory_*, llama_state_*set* behind the adapter's back make its list of cells wrong. It
 * compares positions at every decode and refuses when they differ.
 *
 * The prompt is pinned: the tokens of a sequence's first decode are never evicted, up to half of
 * the budget (pin_limit). Without that, R-KV evicts facts of the prompt; see rkv_llama_pin.
 *
 * Kept set   One per sequence, for all layers and heads: a cell of llama.cpp is shared by all of
 *            them. Scores are those of rkv.h with RKV_PER_SEQUENCE.
 * Keys       Read in place where they are f32, f16 or bf16 in host memory; otherwise copied to
 *            f32, layer by layer. All types that ggml can convert to f32, flash attention on or
 *            off. Values are not read.
 * Windows    Sliding-window models (Gemma 3): the layers that see everything are scored. Tokens
 *            inside the window are never evicted, so the budget must be larger than the window.
 * Refused    with a sentence: recurrent and hybrid models, encoders, M-RoPE, ALiBi, attention
 *            sinks, models whose layers share keys, contexts whose sequences have streams of their
 *            own (set kv_unified), and a llama.cpp in whose graph keys and queries are not found
 *            where they are looked for: the first decode makes sure.
 * Threads    One rkv_llama belongs to one context, and to the thread that uses it.
 * Memory     The adapter allocates: lists of cells, the newest queries of every sequence
 *            ([layers][query heads][2 * window][head_dim] floats), the workspace of rkv.h.
 */
#ifndef RKV_LLAMA_H
#define RKV_LLAMA_H

#include <stddef.h>
#include <stdint.h>

#include "ggml-backend.h"
#include "ggml.h"
#include "llama.h"

#include "rkv.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ==== 1. Types ============================================================================== */

typedef struct rkv_llama rkv_llama;

/* clang-format off */
/* What the calls below return besides what llama_decode returns (0 done, 1 no free cells, 2
 * aborted, other negative numbers: llama.cpp's own errors). */
enum {
    RKV_LLAMA_OK = 0,
    RKV_LLAMA_NO_CELLS = 1,  /* the sequences together need more cells than the context has      */
    RKV_LLAMA_REFUSED = -100 /* rkv_llama_error says why. Nothing was evicted blindly            */
};

/* One round, as shown to rkv_llama_options.observe: after the choice, before cells are freed. The
 * arrays last until the callback returns. It must not call the adapter. */
typedef struct rkv_llama_round {
    llama_seq_id seq;
    int n_tokens, n_kept;
    const int32_t *positions; /* [n_tokens] ascending: the tokens that the sequence holds        */
    const int32_t *cells;     /* [n_tokens] their cells                                          */
    const uint8_t *pins;      /* [n_tokens] not 0: pinned, or shared with another sequence       */
    const int32_t *kept;      /* [n_kept] ascending indices of those that stay                   */
    int n_scores;             /* n_tokens - window; 0 where nothing had to be scored             */
    const float *scores;      /* [n_scores] higher stays                                         */
} rkv_llama_round;

/* Scores tokens by another method: writes scores[i], finite, for the first n_scores of a
 * sequence's tokens; higher stays. positions: [n_scores], ascending. */
typedef void (*rkv_llama_score)(void *user, llama_seq_id seq, int n_scores,
                                const int32_t *positions, float *scores);

/* What to do. Most callers zero it and set budget. */
typedef struct rkv_llama_options {
    int budget;    /* cells that a sequence keeps in a round, pinned tokens and window included;
                      required. -1: nothing is ever evicted (the full cache, counted alike)      */
    int buffer;    /* tokens between two rounds; 0 means 128. A sequence holds at most budget +
                      buffer cells                                                               */
    int pin_limit; /* the most tokens of a prompt that are pinned by themselves, from its start;
                      0 means half of the budget; -1 pins none                                   */
    int n_threads; /* of a round; 0 means 1. More need RKV_PTHREADS, or config->parallel_for     */
    const rkv_config *config; /* method: lambda, window, pool, ...; copied. NULL means
                      rkv_config_default. Its budget, scope and error are the adapter's. pinned
                      counts as pins on a sequence's first tokens, besides the prompt. A protect
                      that does not fit beside the pinned tokens shrinks, so that
                      rkv_config_streaming goes with a pinned prompt                             */

    /* Advanced */
    rkv_llama_score score; /* NULL: R-KV, as config says. rkv_llama_score_random, or your own    */
    void *score_user;
    void (*observe)(void *user, const rkv_llama_round *round); /* may be NULL                    */
    void *observe_user;
    int copy_keys; /* not 0: copies keys to f32 even where they could be read in place           */
} rkv_llama_options;

/* Since attach, over all sequences. Bytes are those of keys and values in the layers that are
 * scored: all layers, or those without a sliding window. */
typedef struct rkv_llama_counters {
    int64_t n_tokens;  /* decoded, ever                                                          */
    int64_t n_rounds;
    int64_t n_evicted; /* tokens                                                                 */
    int64_t n_removes; /* calls of llama_memory_seq_rm that rounds made                          */
    int64_t n_decodes; /* calls of llama_decode: more than yours where batches were split        */
    int n_live;        /* cells in use now                                                       */
    int highest_cell;  /* highest index of a cell ever used; -1: none yet                        */
    int peak_live;     /* most cells in use at a time                                            */
    size_t bytes_per_cell;
    size_t bytes_live;  /* of the cells in use now                                               */
    size_t bytes_saved; /* of those that rounds have freed: a full cache would hold them too     */
    double seconds_rkv, seconds_copies, seconds_removes; /* scoring and choosing; copies of keys
                                                            and queries; llama_memory_seq_rm     */
} rkv_llama_counters;
/* clang-format on */

/* ==== 2. Functions ==========================================================================
 * rkv_llama_error: one sentence about the last call on r that did not return 0 (or true), "" if
 * there was none. Owned by r, until its next call. */

/* rkv_llama_create: makes an adapter for one context. Returns NULL when done, else one sentence
 * (static text) about what is wrong with the options, and *out is NULL.
 * rkv_llama_destroy: after llama_free of its context. Takes NULL. */
const char *rkv_llama_create(rkv_llama **out, const rkv_llama_options *options);
void rkv_llama_destroy(rkv_llama *r);
const char *rkv_llama_error(const rkv_llama *r);

/* rkv_llama_hook: sets params->cb_eval. Call it last before llama_init_from_model. A callback that
 * stands there already is called too.
 * rkv_llama_attach: takes the new, empty context. 0, or RKV_LLAMA_REFUSED: a kind of model or
 * context that is named above, or fewer cells than budget + buffer. */
void rkv_llama_hook(rkv_llama *r, struct llama_context_params *params);
int rkv_llama_attach(rkv_llama *r, struct llama_context *ctx);

/* rkv_llama_decode: llama_decode, with rounds where they are due. Any number of tokens, of any
 * number of sequences; pos, n_seq_id, seq_id and logits may be NULL as in llama_batch_get_one.
 *
 * Rounds are made before tokens are decoded, never behind the last one: what you take back by
 * rkv_llama_seq_rm right after decode (rejected draft tokens) has evicted nothing, as long as the
 * batch fits into the buffer. A larger batch is decoded in parts with rounds in between. Only the
 * outputs of the last part are then where llama_get_logits_ith looks for them; rkv_llama_logits
 * has them all. The last token's are always at llama_get_logits_ith(ctx, -1).
 *
 * Returns what llama_decode returns, or RKV_LLAMA_REFUSED. When it is not 0, no token of the batch
 * is in the cache; tokens that rounds between its parts evicted are gone all the same. */
int rkv_llama_decode(rkv_llama *r, struct llama_batch batch);

/* rkv_llama_logits: the logits of token i of the last decoded batch, [n_vocab], as
 * llama_get_logits_ith; -1 is the last output. NULL if its logits were not asked for. They last
 * until the next decode.
 * rkv_llama_index: token i as an index into the context's own outputs, for llama_sampler_sample;
 * -1 where it was in an earlier part. */
float *rkv_llama_logits(rkv_llama *r, int i);
int rkv_llama_index(const rkv_llama *r, int i);

/* rkv_llama_compress: a round now, if the sequence holds more than its budget: after a prompt, say,
 * or to make room for another sequence. 0, or RKV_LLAMA_REFUSED. */
int rkv_llama_compress(rkv_llama *r, llama_seq_id seq);

/* rkv_llama_pin: tokens at positions [p0, p1) of a sequence are never evicted, those that are still
 * to be decoded included; p1 < 0: to the end of time. Pinned tokens count towards the budget and
 * must leave room in it for the window: the round that finds them too many is refused.
 *     rkv_llama_pin(r, 0, 0, n_prompt);      before a prompt that comes in several batches
 * The first decode of a sequence does this by itself for its tokens, up to pin_limit, unless
 * rkv_llama_pin or rkv_llama_unpin was called for the sequence before. 0, or RKV_LLAMA_REFUSED.
 * rkv_llama_unpin: takes that back. */
int rkv_llama_pin(rkv_llama *r, llama_seq_id seq, llama_pos p0, llama_pos p1);
int rkv_llama_unpin(rkv_llama *r, llama_seq_id seq, llama_pos p0, llama_pos p1);

/* In place of llama_memory_seq_rm, _cp, _keep and llama_memory_clear; p0 < 0 means from the start,
 * p1 < 0 to the end. There is no _add and no _div: a shift would rotate keys and is not needed.
 *   rm     takes back tokens. The end of a sequence can be taken back up to the tokens that the
 *          last round could not evict (window, protect), or all of it; further back the tokens
 *          before p0 are no longer all there, and the call is refused: clear and decode again.
 *          Until `window` new tokens have come, fewer queries vote in a round than usual.
 *   cp     both sequences then share cells; a shared cell counts in the budget of each and is
 *          never evicted while two hold it. dst must be empty.
 *   keep   forgets all sequences but one.        clear: forgets everything.
 * 0, or RKV_LLAMA_REFUSED and nothing changed. */
int rkv_llama_seq_rm(rkv_llama *r, llama_seq_id seq, llama_pos p0, llama_pos p1);
int rkv_llama_seq_cp(rkv_llama *r, llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1);
int rkv_llama_seq_keep(rkv_llama *r, llama_seq_id seq);
int rkv_llama_clear(rkv_llama *r);

/* A sequence as bytes: llama_state_seq_get_data's, and behind them what the adapter knows
 * (positions, pins, queries): later rounds go on as if nothing had happened.
 *   save_size   bytes that save writes
 *   save        0, or RKV_LLAMA_REFUSED when bytes are fewer
 *   load        into a context in which no other sequence holds tokens; what `seq` held is
 *               forgotten. The model, the types of the cache, and window must be the same; budget
 *               and buffer may differ as long as the tokens fit. RKV_LLAMA_REFUSED: damaged bytes,
 *               another model, other sequences there; the sequence is then empty. */
size_t rkv_llama_save_size(rkv_llama *r, llama_seq_id seq);
int rkv_llama_save(rkv_llama *r, llama_seq_id seq, void *memory, size_t bytes);
int rkv_llama_load(rkv_llama *r, llama_seq_id seq, const void *memory, size_t bytes);

/* rkv_llama_live: cells that a sequence holds. rkv_llama_position: of its next token.
 * rkv_llama_positions: of the tokens it holds, [rkv_llama_live] ascending, until the next call. */
int rkv_llama_live(const rkv_llama *r, llama_seq_id seq);
llama_pos rkv_llama_position(const rkv_llama *r, llama_seq_id seq);
const int32_t *rkv_llama_positions(const rkv_llama *r, llama_seq_id seq);
rkv_llama_counters rkv_llama_get_counters(const rkv_llama *r);

/* Random eviction, the baseline for every other: options.score. user: the generator's state, a
 * uint64_t of yours that holds the seed. */
void rkv_llama_score_random(void *user, llama_seq_id seq, int n_scores, const int32_t *positions,
                            float *scores);

#ifdef __cplusplus
}
#endif

/* ---- callers need read no further ---------------------------------------------------------- */

#endif
