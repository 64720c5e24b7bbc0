/* backprop.h - loss and gradients of a llama-architecture decoder with tied embeddings, one
 * sequence at a time. Knows nothing of the optimiser, of the data, or of files.
 */
#ifndef BACKPROP_H
#define BACKPROP_H

#include "shape.h"

#include <stddef.h>
#include <stdint.h>

enum { BACKPROP_MAX_LAYERS = 16 };

/* All weights lie in one array of floats; a matrix is [out][in], as in a GGUF file. The
 * matrices that read the same input lie behind one another and are multiplied as one. */
typedef struct weights {
    float *embedding; /* [vocabulary][dim], the output matrix too */
    struct {
        float *attn_norm, *qkv, *attn_out, *ffn_norm, *gate_up, *down;
    } layer[BACKPROP_MAX_LAYERS];
    float *final_norm;
} weights;

size_t weights_count(const model_shape *s);
weights weights_view(const model_shape *s, float *all);
/* Every matrix transposed to [in][out], the other weights copied; same layout. */
void weights_transpose(const model_shape *s, float *all, float *transposed);

/* What one worker needs to run sequences of up to max_tokens. */
typedef struct backprop backprop;
backprop *backprop_create(const model_shape *s, int max_tokens);
void backprop_destroy(backprop *b);

/* One training sequence. Token i + 1 is to be predicted from tokens 0 .. i, for i >= first.
 * dropped (may be NULL): [layers][kv heads][n_tokens] nonzero = later queries that are `age` or
 * more tokens away cannot see this key: what eviction does to a cache. */
typedef struct sequence {
    const int *tokens;
    int n_tokens, first;
    const uint8_t *dropped;
    int age;
} sequence;

typedef struct sequence_result {
    double loss; /* sum over the predicted tokens of -log p */
    int n_predicted, n_right;
} sequence_result;

/* Adds the gradient of loss * scale to gradient, unless that is NULL. */
sequence_result backprop_run(backprop *b, float *all, float *transposed, const sequence *seq,
                             float scale, float *gradient);

#endif
