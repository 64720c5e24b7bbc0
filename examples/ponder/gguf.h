/* gguf.h - reads and writes GGUF v3 files (metadata and tensors), the format of llama.cpp.
 * A file is input from outside: everything in it is checked before it is used, and any fault
 * gives one line of text. Tensor types live in one table (gguf.c): a new one is one entry.
 */
#ifndef GGUF_H
#define GGUF_H

#include <stddef.h>
#include <stdint.h>

typedef enum gguf_type { /* the file's own numbers */
                         GGUF_F32 = 0,
                         GGUF_F16 = 1,
                         GGUF_Q8_0 = 8,
                         GGUF_BF16 = 30
} gguf_type;

enum { GGUF_MAX_DIMS = 4 };

typedef struct gguf_error {
    char text[256];
} gguf_error;

typedef struct gguf_tensor {
    const char *name;
    gguf_type type;
    int n_dims;
    uint64_t dim[GGUF_MAX_DIMS]; /* dim[0] is the contiguous one; 1 beyond n_dims */
    uint64_t n_elements;
    const unsigned char *data;
} gguf_tensor;

/* ---- reading: 1 = done, 0 = the error's text says why ----------------------------------------
 * Reading takes O(n log n) in the number of names, finding O(log n), an item of an array one step.
 * Refused, besides what is damaged: a name that is there twice or contains a NUL byte, and a
 * general.alignment that is not a u32, a power of two, up to 65536. */

typedef struct gguf gguf;

int gguf_open(gguf **out, const char *path, gguf_error *error);
/* The same from memory, which must outlive the gguf. */
int gguf_parse(gguf **out, const void *data, size_t bytes, gguf_error *error);
void gguf_close(gguf *g); /* takes NULL */

const gguf_tensor *gguf_find(const gguf *g, const char *name);  /* NULL: none of that name */
void gguf_tensor_to_f32(const gguf_tensor *tensor, float *out); /* n_elements floats        */

/* Metadata: 0 = absent, or of another kind; the output is then untouched. A text is as long as its
 * length says: no NUL ends it, and it may contain one. */
int gguf_has(const gguf *g, const char *key); /* 1: of whatever kind, 0: absent */
int gguf_get_integer(const gguf *g, const char *key, int64_t *value);
int gguf_get_number(const gguf *g, const char *key, double *value);
int gguf_get_string(const gguf *g, const char *key, const char **text, size_t *length);
int gguf_get_strings_count(const gguf *g, const char *key, size_t *n);
int gguf_get_strings_item(const gguf *g, const char *key, size_t i, const char **text,
                          size_t *length);

/* ---- writing: gather, then write in one go. Running out of memory shows in gguf_write -------- */

typedef struct gguf_writer gguf_writer;

gguf_writer *gguf_writer_create(void);
void gguf_writer_destroy(gguf_writer *w); /* takes NULL */
void gguf_put_string(gguf_writer *w, const char *key, const char *text);
void gguf_put_u32(gguf_writer *w, const char *key, uint32_t value);
void gguf_put_f32(gguf_writer *w, const char *key, float value);
void gguf_put_strings(gguf_writer *w, const char *key, const char *const *text, size_t n);
/* rows x cols, row-major, converted to `type`; rows = 0 makes a vector of cols elements. cols must
 * be whole blocks of the type (32 for Q8_0). */
void gguf_put_tensor(gguf_writer *w, const char *name, gguf_type type, uint64_t rows, uint64_t cols,
                     const float *values);
/* Writes to path through path.new, so that an interrupted run leaves no half file. */
int gguf_write(gguf_writer *w, const char *path, gguf_error *error);
/* The bytes that gguf_write would write, owned by w; NULL when out of memory. */
const unsigned char *gguf_bytes(gguf_writer *w, size_t *bytes);

#endif
