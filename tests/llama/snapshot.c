/* snapshot.c - see snapshot.h. Build: part of `make test-llama`. */
#include "snapshot.h"
#include "harness.h"

#include <stdlib.h>
#include <string.h>

static uint32_t u32_at(const unsigned char *p)
{
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static int parse(snapshot *s, size_t at, size_t bytes, int n)
{
    int i;
    if (at + 8 > bytes || u32_at(s->bytes + at) != 1 || u32_at(s->bytes + at + 4) != (uint32_t)n)
        return 0;
    at += 8;
    for (i = 0; i < n; i++) {
        if (at + 8 > bytes || u32_at(s->bytes + at + 4) != 1) return 0;
        s->positions[i] = (int32_t)u32_at(s->bytes + at);
        at += 12;
    }
    if (at + 8 > bytes) return 0;
    s->n_layers = (int)u32_at(s->bytes + at + 4);
    at += 8;
    if (s->n_layers < 1 || s->n_layers > 8) return 0;
    for (i = 0; i < s->n_layers; i++) {
        uint64_t row;
        if (at + 12 > bytes) return 0;
        s->types[i] = (int)u32_at(s->bytes + at);
        memcpy(&row, s->bytes + at + 4, sizeof row);
        s->row_bytes[i] = (size_t)row;
        s->rows[i] = s->bytes + at + 12;
        at += 12 + (size_t)row * (size_t)n;
        if (row > 65536 || at > bytes) return 0;
    }
    return 1;
}

void snapshot_take(snapshot *s, struct llama_context *ctx, llama_seq_id seq, int n)
{
    const size_t bytes = llama_state_seq_get_size(ctx, seq);
    size_t at;
    memset(s, 0, sizeof *s);
    s->bytes = alloc_checked(bytes);
    s->positions = alloc_checked((size_t)(n + 1) * sizeof *s->positions);
    llama_state_seq_get_data(ctx, s->bytes, bytes, seq);
    for (at = 0; at < 64; at += 4)
        if (parse(s, at, bytes, n)) break;
    s->n = at < 64 ? n : -1;
    if (s->n < 0) case_fail("the state's %d cells are not where they are looked for", n);
}

void snapshot_free(snapshot *s)
{
    free(s->bytes);
    free(s->positions);
}

void snapshot_row(const snapshot *s, int layer, int row, float *out, int n)
{
    const unsigned char *p = s->rows[layer] + (size_t)row * s->row_bytes[layer];
    int i;
    for (i = 0; i < n; i++) {
        uint16_t half;
        switch (s->types[layer]) {
        case GGML_TYPE_F32: memcpy(&out[i], p + 4 * i, 4); break;
        case GGML_TYPE_F16:
            memcpy(&half, p + 2 * i, 2);
            out[i] = f16_to_float(half);
            break;
        case GGML_TYPE_BF16:
            memcpy(&half, p + 2 * i, 2);
            out[i] = bf16_to_float(half);
            break;
        case GGML_TYPE_Q8_0: /* blocks of 32: an f16 scale, 32 int8 */
            memcpy(&half, p + 34 * (i / 32), 2);
            out[i] = f16_to_float(half) * (float)(int8_t)p[34 * (i / 32) + 2 + i % 32];
            break;
        case GGML_TYPE_Q4_0: { /* blocks of 32: an f16 scale, 16 low halves, 16 high ones */
            const unsigned char *packed = p + 18 * (i / 32), byte = packed[2 + i % 16];
            memcpy(&half, packed, 2);
            out[i] = f16_to_float(half) * (float)((i % 32 < 16 ? byte & 15 : byte >> 4) - 8);
            break;
        }
        default: case_fail("type %d", s->types[layer]); return;
        }
    }
}
