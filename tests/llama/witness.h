/* witness.h - every query that llama.cpp computes for a tiny model, for tests that score tokens
 * again. Linked in by `make test-llama`. */
#ifndef WITNESS_H
#define WITNESS_H

#include "tiny.h"

#include "llama.h"

enum { WITNESS_TOKENS = 1024, WITNESS_LAYERS = 6 };

typedef struct witness {
    float queries[WITNESS_LAYERS][WITNESS_TOKENS][TINY_HEADS * TINY_DIM]; /* [layer][position] */
    double scale;                                                         /* of the logits */
    int full_layer;   /* the only layer that is scored; -1: all */
    int n_layers;     /* of the model */
    int layer, begin; /* of the graph under way: its next layer, its first token */
} witness;

void witness_begin(witness *w, tiny_kind kind); /* of a model with attention */
/* The callback that fills it, with the witness as its user, in a context of one sequence. */
bool witness_watch(struct ggml_tensor *t, bool ask, void *user);

/* How many layers are scored, and the layer of the nth. */
int witness_scored(const witness *w);
int witness_layer(const witness *w, int nth);

#endif
