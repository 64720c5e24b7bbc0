/* model.h - a llama-architecture decoder read from a GGUF file: RMSNorm, rotary embedding,
 * grouped-query attention, SwiGLU, tied or untied output. It owns no cache: at each layer it hands
 * queries, keys and values to the caller, who stores them as he likes and attends.
 */
#ifndef MODEL_H
#define MODEL_H

#include "gguf.h"
#include "prng.h"
#include "shape.h"

typedef struct model model;

/* 1 = done, 0 = the error's text says what is wrong with the file. Read-only afterwards: any
 * number of threads may share it. */
int model_load(model **out, const char *path, gguf_error *error);
int model_from_gguf(model **out, const gguf *g, gguf_error *error);
void model_free(model *m); /* takes NULL */
const model_shape *model_get_shape(const model *m);
const char *model_word(const model *m, int token); /* "" when the file names none */

/* Attention of one layer for n tokens: q [n][heads * head_dim] and k [n][kv heads * head_dim] with
 * rotary embedding applied, v likewise without; writes out [n][heads * head_dim]. */
typedef void (*model_attend)(void *user, int layer, int n, const float *q, const float *k,
                             const float *v, float *out);

/* Scratch for up to max_tokens tokens at a time; one per thread. NULL when out of memory. */
typedef struct model_scratch model_scratch;
model_scratch *model_scratch_create(const model *m, int max_tokens);
void model_scratch_destroy(model_scratch *s);

/* Runs n tokens, of one sequence or of several, each at its true position (below the model's
 * context). Returns the logits [n][vocabulary], which last until the next call. */
float *model_forward(const model *m, model_scratch *s, int n, const int *tokens,
                     const int *positions, model_attend attend, void *user);

/* Attention of one token over rows 0 .. n_rows-1 of a cache: row r of kv head h begins at
 * keys + h * head_stride + r * row_stride, values alike. weights: [n_rows] scratch. */
typedef struct kv_rows {
    const float *keys, *values;
    ptrdiff_t head_stride, row_stride;
    int n_rows;
} kv_rows;
void model_attend_rows(const model_shape *s, const float *q, const kv_rows *rows, float *weights,
                       float *out);

/* The most likely token; with a temperature > 0 one drawn from softmax(logits / temperature),
 * which the call computes in place. */
int model_choose(float *logits, int n, float temperature, prng *r);

#endif
