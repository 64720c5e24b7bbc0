/* tiny.h - writes tiny models with random weights, of several architectures, for the tests of
 * examples/llama/rkv_llama.h. Linked in by `make test-llama`. */
#ifndef TINY_H
#define TINY_H

typedef enum tiny_kind {
    TINY_LLAMA,
    TINY_QWEN2,   /* biases on queries, keys and values                             */
    TINY_QWEN3,   /* norms on queries and keys                                      */
    TINY_GEMMA3,  /* five of its six layers have a sliding window of 32 tokens, the
                     sixth another rotary embedding                                  */
    TINY_MPT,     /* ALiBi                                                          */
    TINY_MAMBA,   /* recurrent                                                      */
    TINY_FALCON,  /* hybrid: each layer has attention and a recurrent state         */
    TINY_QWEN2VL, /* M-RoPE                                                        */
    TINY_LLADA,   /* diffusion: no cache                                            */
    TINY_BERT,    /* no cache                                                       */
    TINY_T5,      /* an encoder                                                     */
    TINY_SINKS,   /* attention sinks; every other layer has a sliding window        */
    TINY_LLAMA3,  /* llama, the frequencies of its rotary embedding divided by factors */
    N_TINY
} tiny_kind;

enum { TINY_VOCABULARY = 96, TINY_WINDOW = 32, TINY_HEADS = 4, TINY_KV_HEADS = 2, TINY_DIM = 32 };

/* The rotary embedding of TINY_LLAMA3: 10000^(-2 f / dim) / factor. That of TINY_GEMMA3's last
 * layer: base^(-2 f / dim) / TINY_GEMMA3_FACTOR. */
#define TINY_GEMMA3_BASE   500000.0f
#define TINY_GEMMA3_FACTOR 4.0f
float tiny_rope_factor(int pair);

const char *tiny_name(tiny_kind kind);
/* Writes the model and returns its path, static text; ends the program when it cannot. */
const char *tiny_write(tiny_kind kind);

#endif
