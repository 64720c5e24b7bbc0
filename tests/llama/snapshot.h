/* snapshot.h - llama.cpp's own view of a sequence's memory, for the tests of
 * examples/llama/rkv_llama.h. Linked in by `make test-llama`. */
#ifndef SNAPSHOT_H
#define SNAPSHOT_H

#include "llama.h"

#include <stddef.h>
#include <stdint.h>

/* The first cache in the bytes of llama_state_seq_get_data: number of streams, number of cells, per
 * cell position and sequences, then per layer type, row size and rows. */
typedef struct snapshot {
    unsigned char *bytes;
    int n, n_layers;
    int32_t *positions; /* [n], in the order of the cells */
    const unsigned char *rows[8];
    int types[8];
    size_t row_bytes[8];
} snapshot;

/* n: cells of the sequence. out->n is -1, and the case has failed, where they are not found. */
void snapshot_take(snapshot *out, struct llama_context *ctx, llama_seq_id seq, int n);
void snapshot_free(snapshot *s);

/* n numbers of a row of keys, from the formats' own definitions. */
void snapshot_row(const snapshot *s, int layer, int row, float *out, int n);

#endif
