/* model_put.h - a model's shape and weights as entries of a GGUF file, llama architecture. */
#ifndef MODEL_PUT_H
#define MODEL_PUT_H

#include "backprop.h"
#include "gguf.h"

/* The whole numbers of the shape. general.architecture is the caller's to put, and so are norm_eps
 * and rope_base, unless they are what model.h takes when a file names none: 1e-5 and 10000. */
void model_put_shape(gguf_writer *w, const model_shape *s);

/* Matrices in F16, norms in F32; the output is tied to the embedding. */
void model_put_weights(gguf_writer *w, const model_shape *s, const weights *all);

#endif
