/* tiny_model.c - writes a random llama model of two layers whose tokens are bytes: for
 * tests/llama/test_program.sh.     tiny_model FILE.gguf
 */
#include "examples/ponder/gguf.h"
#include "examples/ponder/options.h"
#include "examples/ponder/prng.h"

#include <stdio.h>
#include <stdlib.h>

enum { LAYERS = 2, DIM = 64, HEADS = 4, KV_HEADS = 2, HEAD_DIM = 16, FFN = 96 };
enum { BOS = 256, EOS = 257, VOCABULARY = 258 };

const char program_name[] = "tiny_model";

/* Every byte has a letter, as in GPT-2: its own where that is visible, else one from U+0100 on. */
static void put_tokens(gguf_writer *w)
{
    static char text[VOCABULARY][8];
    const char *tokens[VOCABULARY];
    unsigned next = 0x100;
    for (int b = 0; b < VOCABULARY; b++) {
        const int is_visible = (b >= 33 && b <= 126) || (b >= 161 && b <= 255 && b != 173);
        const unsigned c = is_visible ? (unsigned)b : next++;
        tokens[b] = text[b];
        if (b >= BOS)
            snprintf(text[b], sizeof text[b], "<%c>", b == BOS ? 's' : 'e');
        else if (c < 0x80)
            snprintf(text[b], sizeof text[b], "%c", (char)c);
        else
            snprintf(text[b], sizeof text[b], "%c%c", (char)(0xc0 | c >> 6),
                     (char)(0x80 | (c & 0x3f)));
    }
    gguf_put_string(w, "tokenizer.ggml.model", "gpt2");
    gguf_put_string(w, "tokenizer.ggml.pre", "gpt-2");
    gguf_put_strings(w, "tokenizer.ggml.tokens", tokens, VOCABULARY);
    gguf_put_strings(w, "tokenizer.ggml.merges", NULL, 0);
    gguf_put_u32(w, "tokenizer.ggml.bos_token_id", BOS);
    gguf_put_u32(w, "tokenizer.ggml.eos_token_id", EOS);
}

static void put_shape(gguf_writer *w)
{
    gguf_put_string(w, "general.architecture", "llama");
    gguf_put_u32(w, "llama.vocab_size", VOCABULARY);
    gguf_put_u32(w, "llama.context_length", 65536);
    gguf_put_u32(w, "llama.embedding_length", DIM);
    gguf_put_u32(w, "llama.block_count", LAYERS);
    gguf_put_u32(w, "llama.feed_forward_length", FFN);
    gguf_put_u32(w, "llama.attention.head_count", HEADS);
    gguf_put_u32(w, "llama.attention.head_count_kv", KV_HEADS);
    gguf_put_u32(w, "llama.rope.dimension_count", HEAD_DIM);
    gguf_put_f32(w, "llama.attention.layer_norm_rms_epsilon", 1e-5f);
}

static void put(gguf_writer *w, prng *random, const char *name, int rows, int cols)
{
    const size_t n = (size_t)(rows > 0 ? rows : 1) * (size_t)cols;
    float *values = allocate(n, sizeof *values);
    for (size_t i = 0; i < n; i++) values[i] = rows > 0 ? prng_uniform(random) - 0.5f : 1.0f;
    gguf_put_tensor(w, name, GGUF_F32, (uint64_t)rows, (uint64_t)cols, values);
    free(values);
}

static void put_layer(gguf_writer *w, prng *random, int layer)
{
    static const struct {
        const char *name;
        int rows, cols;
    } tensors[] = { { "attn_norm", 0, DIM },
                    { "attn_q", HEADS * HEAD_DIM, DIM },
                    { "attn_k", KV_HEADS * HEAD_DIM, DIM },
                    { "attn_v", KV_HEADS * HEAD_DIM, DIM },
                    { "attn_output", DIM, HEADS * HEAD_DIM },
                    { "ffn_norm", 0, DIM },
                    { "ffn_gate", FFN, DIM },
                    { "ffn_up", FFN, DIM },
                    { "ffn_down", DIM, FFN } };
    char name[64];
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++) {
        snprintf(name, sizeof name, "blk.%d.%s.weight", layer, tensors[i].name);
        put(w, random, name, tensors[i].rows, tensors[i].cols);
    }
}

int main(int argc, char **argv)
{
    gguf_error error;
    gguf_writer *w = gguf_writer_create();
    prng random = { 1 };
    if (argc != 2) die("one argument: the file to write");
    if (!w) die("out of memory");
    put_shape(w);
    put_tokens(w);
    put(w, &random, "token_embd.weight", VOCABULARY, DIM);
    put(w, &random, "output_norm.weight", 0, DIM);
    for (int l = 0; l < LAYERS; l++) put_layer(w, &random, l);
    if (!gguf_write(w, argv[1], &error)) die("%s: %s", argv[1], error.text);
    gguf_writer_destroy(w);
    return 0;
}
