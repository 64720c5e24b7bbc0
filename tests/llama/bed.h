/* bed.h - contexts of llama.cpp with and without an adapter, for the tests of
 * examples/llama/rkv_llama.h. Linked in by `make test-llama`. */
#ifndef BED_H
#define BED_H

#include "harness.h" /* first: it asks for RKV_PTHREADS */

#include "rkv_llama.h"
#include "tiny.h"

typedef struct setup {
    tiny_kind kind;
    const char *path; /* of a model that is there already, NULL: a tiny one */
    enum ggml_type keys;
    int flash, n_ctx, n_batch, n_sequences, n_threads;
    int is_plain; /* without an adapter */
    rkv_llama_options options;
    ggml_backend_sched_eval_callback other;
    void *other_user;
} setup;

typedef struct bed {
    struct llama_model *model;
    struct llama_context *ctx;
    rkv_llama *r;
    int attached, n_vocab;
} bed;

/* The first and the last call of a program; the last returns its exit status. llama.cpp's log is
 * silent in between, since refused and aborted calls are wanted; RKV_TEST_LOG shows it. */
void beds_begin(void);
int beds_end(void);

setup setup_of(tiny_kind kind, int budget, int buffer);
void bed_open(bed *b, const setup *s); /* ends the program where the model cannot be loaded */
void bed_close(bed *b);

llama_token token_at(int i); /* of a text of random tokens */
/* Decodes tokens of one sequence from position `begin` on, all outputs wanted: `tokens`, or where
 * that is NULL those of token_at. */
int decode(bed *b, llama_seq_id seq, int begin, int n);
int decode_tokens(bed *b, llama_seq_id seq, int begin, const llama_token *tokens, int n);
int expect_decode(bed *b, llama_seq_id seq, int begin, int n);
void expect_same_logits(const char *at, bed *a, bed *b); /* of the last token, to the bit */
void expect_refusal(const char *at, bed *b, int status, const char *words);
/* A row of a tensor in host memory as floats. A layer's cached keys say their own type: llama.cpp
 * may keep those of sliding windows in f16 whatever the context was asked for. */
void read_row(const struct ggml_tensor *rows, int row, float *out);

#endif
