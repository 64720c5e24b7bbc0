/* shape.h - the numbers that describe a llama-architecture decoder. */
#ifndef SHAPE_H
#define SHAPE_H

typedef enum rope_pairing {
    ROPE_ADJACENT, /* dimensions (0,1), (2,3), ... turn together, as in llama                    */
    ROPE_HALVES    /* dimensions (0,d/2), (1,d/2+1), ..., as in GPT-NeoX                         */
} rope_pairing;

typedef struct model_shape {
    int n_layers, dim, n_heads, n_kv_heads, head_dim, ffn_dim, vocabulary, context;
    float rope_base, norm_eps;
    rope_pairing pairing;
} model_shape;

static inline int shape_q_dim(const model_shape *s)
{
    return s->n_heads * s->head_dim;
}

static inline int shape_kv_dim(const model_shape *s)
{
    return s->n_kv_heads * s->head_dim;
}

#endif
