/* gguf.c - see gguf.h. Build: part of `make demo`; tests/test_gguf.c feeds it damaged files. */
#include "gguf.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { VERSION = 3, DEFAULT_ALIGNMENT = 32, MAX_ALIGNMENT = 1 << 16, MAX_NESTING = 4 };

/* The kinds of metadata values, in the file's numbering. */
enum {
    KIND_U8,
    KIND_I8,
    KIND_U16,
    KIND_I16,
    KIND_U32,
    KIND_I32,
    KIND_F32,
    KIND_BOOL,
    KIND_STRING,
    KIND_ARRAY,
    KIND_U64,
    KIND_I64,
    KIND_F64,
    N_KINDS
};
static const unsigned char kind_bytes[N_KINDS] = { 1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8 };

static int fail(gguf_error *error, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(error->text, sizeof error->text, format, args);
    va_end(args);
    return 0;
}

/* ---- tensor types: the file is little-endian, this machine need not be --------------------- */

static uint64_t load_le(const unsigned char *p, int n_bytes)
{
    uint64_t v = 0;
    for (int i = 0; i < n_bytes; i++) v |= (uint64_t)p[i] << (8 * i);
    return v;
}

static void store_le(unsigned char *p, int n_bytes, uint64_t v)
{
    for (int i = 0; i < n_bytes; i++) p[i] = (unsigned char)(v >> (8 * i));
}

static float float_of_bits(uint32_t bits)
{
    float v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

static uint32_t bits_of_float(float v)
{
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    return bits;
}

static float float_of_half(uint32_t h)
{
    const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31, fraction = h & 0x3ffu;
    if (exponent == 31) return float_of_bits(sign | 0x7f800000u | fraction << 13);
    if (exponent > 0) return float_of_bits(sign | (exponent + 112) << 23 | fraction << 13);
    float tiny = (float)fraction * (1.0f / 16777216.0f); /* subnormal: fraction * 2^-24 */
    return sign ? -tiny : tiny;
}

static uint32_t half_of_float(float v)
{
    const uint32_t bits = bits_of_float(v), sign = (bits >> 16) & 0x8000u,
                   rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return sign | 0x7e00u;  /* NaN */
    if (rest >= 0x477ff000u) return sign | 0x7c00u; /* 65520 and more round to infinity */
    if (rest < 0x38800000u)                         /* below 2^-14: subnormal, rounds to even */
        return sign | (uint32_t)lrintf(fabsf(v) * 16777216.0f);
    return sign | ((rest + 0xfffu + ((rest >> 13) & 1u) - 0x38000000u) >> 13);
}

static uint32_t bf16_of_float(float v)
{
    const uint32_t bits = bits_of_float(v);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (bits >> 16) | 0x40u; /* NaN stays one */
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

static void f32_load(const unsigned char *p, float *out)
{
    *out = float_of_bits((uint32_t)load_le(p, 4));
}

static void f32_store(const float *v, unsigned char *p)
{
    store_le(p, 4, bits_of_float(*v));
}

static void f16_load(const unsigned char *p, float *out)
{
    *out = float_of_half((uint32_t)load_le(p, 2));
}

static void f16_store(const float *v, unsigned char *p)
{
    store_le(p, 2, half_of_float(*v));
}

static void bf16_load(const unsigned char *p, float *out)
{
    *out = float_of_bits((uint32_t)load_le(p, 2) << 16);
}

static void bf16_store(const float *v, unsigned char *p)
{
    store_le(p, 2, bf16_of_float(*v));
}

enum { Q8_0_BLOCK = 32 }; /* an f16 scale, then 32 signed bytes */

static void q8_0_load(const unsigned char *p, float *out)
{
    const float scale = float_of_half((uint32_t)load_le(p, 2));
    for (int i = 0; i < Q8_0_BLOCK; i++) {
        const int v = p[2 + i];
        out[i] = scale * (float)(v < 128 ? v : v - 256);
    }
}

static void q8_0_store(const float *v, unsigned char *p)
{
    float top = 0.0f;
    for (int i = 0; i < Q8_0_BLOCK; i++) top = fmaxf(top, fabsf(v[i]));
    const float scale = top / 127.0f;
    store_le(p, 2, half_of_float(scale));
    for (int i = 0; i < Q8_0_BLOCK; i++)
        p[2 + i] = (unsigned char)(scale > 0.0f ? lrintf(v[i] / scale) : 0);
}

typedef struct type_info {
    gguf_type type;
    int block_elements, block_bytes;
    void (*load)(const unsigned char *block, float *out);
    void (*store)(const float *values, unsigned char *block);
} type_info;

static const type_info types[] = {
    { GGUF_F32, 1, 4, f32_load, f32_store },
    { GGUF_F16, 1, 2, f16_load, f16_store },
    { GGUF_BF16, 1, 2, bf16_load, bf16_store },
    { GGUF_Q8_0, Q8_0_BLOCK, 2 + Q8_0_BLOCK, q8_0_load, q8_0_store },
};

static const type_info *find_type(uint64_t type)
{
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if ((uint64_t)types[i].type == type) return &types[i];
    return NULL;
}

/* ---- reading ------------------------------------------------------------------------------- */

typedef struct value { /* metadata; what it points to has been checked to lie in the file */
    const char *key;
    uint32_t kind, item_kind;      /* item_kind of an array */
    uint64_t n_items;              /* bytes of a string, items of an array */
    const unsigned char *data;     /* behind the length of a string or the head of an array */
    const unsigned char **strings; /* owned: each text of an array of strings, or NULL */
} value;

struct gguf {
    unsigned char *file;  /* owned, NULL with gguf_parse */
    value *values;        /* in the order of their keys */
    gguf_tensor *tensors; /* in the order of their names */
    char *names;          /* keys and tensor names, each NUL-terminated */
    uint64_t n_values, n_tensors;
};

typedef struct cursor {
    const unsigned char *begin, *at;
    size_t left;
    gguf_error *error;
    char *names;            /* where the next name is copied to */
    const char *part;       /* what is being read, for messages: "tensor", "metadata"; NULL: head */
    uint64_t number, total; /* number (from 1) of the tensors or metadata entries */
    const char *name;       /* NULL until it has been read; not NUL-terminated */
    size_t name_length;
    char text[96]; /* of item() */
} cursor;

static void begin_item(cursor *c, const char *part, uint64_t i, uint64_t total)
{
    c->part = part;
    c->number = i + 1;
    c->total = total;
    c->name = NULL;
}

static void name_item(cursor *c, const char *name, size_t length)
{
    c->name = name;
    c->name_length = length;
}

/* The item under way in words: "tensor output.weight", or "tensor 3 of 80" before its name is
 * known. Control characters of a name become '?', so that a terminal never obeys a file. */
static const char *item(cursor *c)
{
    enum { SHOWN = 64 };
    char shown[SHOWN + 1];
    const size_t n = c->name_length < SHOWN ? c->name_length : SHOWN;
    if (!c->part) return "the header";
    if (!c->name) {
        snprintf(c->text, sizeof c->text, "%s %llu of %llu", c->part, (unsigned long long)c->number,
                 (unsigned long long)c->total);
        return c->text;
    }
    for (size_t i = 0; i < n; i++) {
        const unsigned char byte = (unsigned char)c->name[i];
        shown[i] = byte < ' ' || byte == 127 ? '?' : c->name[i];
    }
    shown[n] = 0;
    snprintf(c->text, sizeof c->text, "%s %s", c->part, shown);
    return c->text;
}

static int read_integer(cursor *c, int n_bytes, uint64_t *out)
{
    *out = 0;
    if (c->left < (size_t)n_bytes)
        return fail(c->error, "truncated: the file ends inside %s, at byte %llu", item(c),
                    (unsigned long long)(c->at - c->begin) + c->left);
    *out = load_le(c->at, n_bytes);
    c->at += n_bytes;
    c->left -= (size_t)n_bytes;
    return 1;
}

static int skip_bytes(cursor *c, uint64_t n)
{
    if (n > c->left)
        return fail(c->error, "corrupt: %s needs %llu bytes at byte %llu; the file has %llu left",
                    item(c), (unsigned long long)n, (unsigned long long)(c->at - c->begin),
                    (unsigned long long)c->left);
    c->at += n;
    c->left -= (size_t)n;
    return 1;
}

static int read_string(cursor *c, const unsigned char **text, size_t *length)
{
    uint64_t n;
    if (!read_integer(c, 8, &n)) return 0;
    *text = c->at;
    *length = (size_t)n;
    return skip_bytes(c, n);
}

/* A key or the name of a tensor. The copy is a C string, so a NUL would end it early. */
static int read_name(cursor *c, const char **name)
{
    const unsigned char *text;
    size_t length;
    if (!read_string(c, &text, &length)) return 0;
    name_item(c, (const char *)text, length);
    if (memchr(text, 0, length))
        return fail(c->error, "corrupt: the name of %s contains a NUL byte, shown as ?", item(c));
    memcpy(c->names, text, length);
    c->names[length] = 0;
    *name = c->names;
    c->names += length + 1;
    return 1;
}

static int skip_items(cursor *c, uint64_t kind, uint64_t n, int depth);

static int skip_array(cursor *c, int depth)
{
    uint64_t kind, n;
    if (depth > MAX_NESTING)
        return fail(c->error, "corrupt: %s nests its arrays too deeply", item(c));
    return read_integer(c, 4, &kind) && read_integer(c, 8, &n) && skip_items(c, kind, n, depth);
}

static int skip_items(cursor *c, uint64_t kind, uint64_t n, int depth)
{
    if (kind >= N_KINDS)
        return fail(c->error, "corrupt: %s is of the unknown kind %llu", item(c),
                    (unsigned long long)kind);
    if (kind_bytes[kind] > 0)
        return skip_bytes(c, n > UINT64_MAX / 8 ? UINT64_MAX : n * kind_bytes[kind]);
    for (uint64_t i = 0; i < n; i++) { /* every item takes bytes, so this ends with the file */
        const unsigned char *text;
        size_t length;
        if (kind == KIND_STRING ? !read_string(c, &text, &length) : !skip_array(c, depth + 1))
            return 0;
    }
    return 1;
}

/* The items of an array of strings; where each begins is kept, so that any is found in one step. */
static int read_strings(cursor *c, value *v)
{
    size_t length;
    if (v->n_items > c->left / 8) /* each takes 8 bytes or more, which bounds the allocation */
        return fail(c->error, "corrupt: %s has %llu strings in %llu bytes", item(c),
                    (unsigned long long)v->n_items, (unsigned long long)c->left);
    v->strings = malloc(((size_t)v->n_items + 1) * sizeof *v->strings);
    if (!v->strings) return fail(c->error, "out of memory");
    for (uint64_t i = 0; i < v->n_items; i++)
        if (!read_string(c, &v->strings[i], &length)) return 0;
    return 1;
}

static int read_value(cursor *c, value *v)
{
    uint64_t kind;
    if (!read_name(c, &v->key) || !read_integer(c, 4, &kind)) return 0;
    v->kind = (uint32_t)kind;
    v->n_items = 1;
    if (kind == KIND_STRING) {
        size_t length;
        if (!read_string(c, &v->data, &length)) return 0;
        v->n_items = length;
        return 1;
    }
    if (kind == KIND_ARRAY) {
        uint64_t item_kind;
        if (!read_integer(c, 4, &item_kind) || !read_integer(c, 8, &v->n_items)) return 0;
        v->item_kind = (uint32_t)item_kind;
        v->data = c->at;
        return item_kind == KIND_STRING ? read_strings(c, v)
                                        : skip_items(c, item_kind, v->n_items, 1);
    }
    v->data = c->at;
    return skip_items(c, kind, 1, 0);
}

/* Keys and tensor names are sorted, not hashed: a file could bring names that collide. */
static int compare_values(const void *a, const void *b)
{
    return strcmp(((const value *)a)->key, ((const value *)b)->key);
}

static int compare_tensors(const void *a, const void *b)
{
    return strcmp(((const gguf_tensor *)a)->name, ((const gguf_tensor *)b)->name);
}

static int read_values(gguf *g, cursor *c)
{
    for (uint64_t i = 0; i < g->n_values; i++) {
        begin_item(c, "metadata", i, g->n_values);
        if (!read_value(c, &g->values[i])) return 0;
    }
    qsort(g->values, (size_t)g->n_values, sizeof *g->values, compare_values);
    for (uint64_t i = 1; i < g->n_values; i++)
        if (compare_values(&g->values[i - 1], &g->values[i]) == 0) {
            name_item(c, g->values[i].key, strlen(g->values[i].key));
            return fail(c->error, "corrupt: %s is there twice", item(c));
        }
    return 1;
}

/* One tensor's entry; its data pointer is set once the header's end is known. */
static int read_tensor(cursor *c, gguf_tensor *t, uint64_t *offset)
{
    uint64_t n_dims, type;
    if (!read_name(c, &t->name) || !read_integer(c, 4, &n_dims)) return 0;
    if (n_dims < 1 || n_dims > GGUF_MAX_DIMS)
        return fail(c->error, "corrupt: %s has %llu dimensions", item(c),
                    (unsigned long long)n_dims);
    t->n_dims = (int)n_dims;
    t->n_elements = 1;
    for (int i = 0; i < GGUF_MAX_DIMS; i++) {
        t->dim[i] = 1;
        if (i < t->n_dims && !read_integer(c, 8, &t->dim[i])) return 0;
        if (t->dim[i] == 0 || t->dim[i] > INT64_MAX / t->n_elements)
            return fail(c->error, "corrupt: %s has an impossible size", item(c));
        t->n_elements *= t->dim[i];
    }
    if (!read_integer(c, 4, &type) || !read_integer(c, 8, offset)) return 0;
    const type_info *info = find_type(type);
    if (!info)
        return fail(c->error,
                    "unsupported: %s is of type %llu; this reader knows F32, F16, BF16 and Q8_0",
                    item(c), (unsigned long long)type);
    if (t->dim[0] % (uint64_t)info->block_elements != 0)
        return fail(c->error, "corrupt: %s has a row of a partial block", item(c));
    t->type = info->type;
    return 1;
}

static int place_tensor(cursor *c, gguf_tensor *t, uint64_t offset, uint64_t alignment)
{
    const type_info *info = find_type((uint64_t)t->type);
    const uint64_t blocks = t->n_elements / (uint64_t)info->block_elements;
    name_item(c, t->name, strlen(t->name));
    if (offset % alignment != 0)
        return fail(c->error, "corrupt: %s is not aligned to %llu bytes", item(c),
                    (unsigned long long)alignment);
    if (offset > c->left || blocks > (c->left - offset) / (uint64_t)info->block_bytes)
        return fail(c->error, "truncated: %s lies beyond the end of the file", item(c));
    t->data = c->at + offset;
    return 1;
}

static const value *find_value(const gguf *g, const char *key)
{
    const value wanted = { .key = key };
    return bsearch(&wanted, g->values, (size_t)g->n_values, sizeof wanted, compare_values);
}

/* Only a u32 is taken, as the format says: another kind would be read differently elsewhere. */
static int read_alignment(const gguf *g, cursor *c, uint64_t *alignment)
{
    const value *v = find_value(g, "general.alignment");
    *alignment = DEFAULT_ALIGNMENT;
    if (!v) return 1;
    if (v->kind != KIND_U32)
        return fail(c->error, "corrupt: metadata general.alignment is not a u32");
    *alignment = load_le(v->data, 4);
    if (*alignment < 1 || *alignment > MAX_ALIGNMENT || (*alignment & (*alignment - 1)) != 0)
        return fail(c->error,
                    "corrupt: metadata general.alignment is %llu, not a power of two up to %d",
                    (unsigned long long)*alignment, MAX_ALIGNMENT);
    return 1;
}

static int place_tensors(gguf *g, cursor *c, const uint64_t *offsets)
{
    uint64_t alignment;
    if (!read_alignment(g, c, &alignment)) return 0;
    const uint64_t past = (uint64_t)(c->at - c->begin) % alignment;
    if (g->n_tensors > 0 && past > 0) {
        if (alignment - past > c->left)
            return fail(c->error, "truncated: the file ends before the data of its tensors");
        skip_bytes(c, alignment - past);
    }
    for (uint64_t i = 0; i < g->n_tensors; i++)
        if (!place_tensor(c, &g->tensors[i], offsets[i], alignment)) return 0;
    return 1;
}

static int read_tensors(gguf *g, cursor *c)
{
    uint64_t *offsets = malloc(((size_t)g->n_tensors + 1) * sizeof *offsets);
    int ok = offsets != NULL || fail(c->error, "out of memory");
    for (uint64_t i = 0; ok && i < g->n_tensors; i++) {
        begin_item(c, "tensor", i, g->n_tensors);
        ok = read_tensor(c, &g->tensors[i], &offsets[i]);
    }
    ok = ok && place_tensors(g, c, offsets);
    free(offsets);
    if (!ok) return 0;
    qsort(g->tensors, (size_t)g->n_tensors, sizeof *g->tensors, compare_tensors);
    for (uint64_t i = 1; i < g->n_tensors; i++)
        if (compare_tensors(&g->tensors[i - 1], &g->tensors[i]) == 0) {
            name_item(c, g->tensors[i].name, strlen(g->tensors[i].name));
            return fail(c->error, "corrupt: %s is there twice", item(c));
        }
    return 1;
}

static int read_header(gguf *g, cursor *c)
{
    uint64_t version;
    if (c->left < 4 || memcmp(c->at, "GGUF", 4) != 0) return fail(c->error, "not a GGUF file");
    skip_bytes(c, 4);
    if (!read_integer(c, 4, &version)) return 0;
    if (version != VERSION)
        return fail(c->error, "unsupported: GGUF version %llu, this reader knows 3",
                    (unsigned long long)version);
    if (!read_integer(c, 8, &g->n_tensors) || !read_integer(c, 8, &g->n_values)) return 0;
    /* The smallest entries take 24 and 13 bytes, which bounds the counts before any allocation. */
    if (g->n_tensors > c->left / 24 || g->n_values > c->left / 13)
        return fail(c->error, "corrupt: %llu tensors and %llu metadata entries in %llu bytes",
                    (unsigned long long)g->n_tensors, (unsigned long long)g->n_values,
                    (unsigned long long)c->left);
    return 1;
}

static int parse(gguf *g, cursor *c)
{
    if (!read_header(g, c)) return 0;
    g->values = calloc((size_t)g->n_values + 1, sizeof *g->values);
    g->tensors = calloc((size_t)g->n_tensors + 1, sizeof *g->tensors);
    /* A name takes its bytes and a NUL here, its bytes and 8 for the length in the file. */
    c->names = g->names = malloc(c->left + 1);
    if (!g->values || !g->tensors || !g->names) return fail(c->error, "out of memory");
    return read_values(g, c) && read_tensors(g, c);
}

static int parse_into(gguf **out, unsigned char *file, const void *data, size_t bytes,
                      gguf_error *error)
{
    cursor c = { .begin = data, .at = data, .left = bytes, .error = error };
    gguf *g = calloc(1, sizeof *g);
    *out = NULL;
    if (!g) {
        free(file);
        return fail(error, "out of memory");
    }
    g->file = file;
    if (!parse(g, &c)) {
        gguf_close(g);
        return 0;
    }
    *out = g;
    return 1;
}

int gguf_parse(gguf **out, const void *data, size_t bytes, gguf_error *error)
{
    return parse_into(out, NULL, data, bytes, error);
}

/* The whole file in memory; NULL with the error's text. Grows as it reads: a pipe has no size. */
static unsigned char *read_file(const char *path, size_t *bytes, gguf_error *error)
{
    FILE *f = fopen(path, "rb");
    unsigned char *data = NULL;
    size_t capacity = 0, n = 0;
    if (!f) {
        fail(error, "cannot open the file");
        return NULL;
    }
    do {
        unsigned char *more = realloc(data, capacity = capacity ? 2 * capacity : 1 << 20);
        if (!more) {
            fail(error, "out of memory");
            break;
        }
        data = more;
        n += fread(data + n, 1, capacity - n, f);
    } while (n == capacity);
    if (ferror(f)) fail(error, "cannot read the file");
    if (ferror(f) || n == capacity) {
        free(data);
        data = NULL;
    }
    fclose(f);
    *bytes = n;
    return data;
}

int gguf_open(gguf **out, const char *path, gguf_error *error)
{
    size_t bytes;
    unsigned char *file = read_file(path, &bytes, error);
    *out = NULL;
    return file ? parse_into(out, file, file, bytes, error) : 0;
}

void gguf_close(gguf *g)
{
    if (!g) return;
    for (uint64_t i = 0; g->values && i < g->n_values; i++) free(g->values[i].strings);
    free(g->file);
    free(g->values);
    free(g->tensors);
    free(g->names);
    free(g);
}

const gguf_tensor *gguf_find(const gguf *g, const char *name)
{
    const gguf_tensor wanted = { .name = name };
    return bsearch(&wanted, g->tensors, (size_t)g->n_tensors, sizeof wanted, compare_tensors);
}

void gguf_tensor_to_f32(const gguf_tensor *tensor, float *out)
{
    const type_info *info = find_type((uint64_t)tensor->type);
    const uint64_t blocks = tensor->n_elements / (uint64_t)info->block_elements;
    for (uint64_t i = 0; i < blocks; i++)
        info->load(tensor->data + i * (uint64_t)info->block_bytes,
                   out + i * (uint64_t)info->block_elements);
}

int gguf_has(const gguf *g, const char *key)
{
    return find_value(g, key) != NULL;
}

int gguf_get_integer(const gguf *g, const char *key, int64_t *out)
{
    const value *v = find_value(g, key);
    if (!v) return 0;
    const uint64_t raw = v->kind < N_KINDS ? load_le(v->data, kind_bytes[v->kind]) : 0;
    switch (v->kind) {
    case KIND_U8:
    case KIND_U16:
    case KIND_U32:
    case KIND_BOOL: *out = (int64_t)raw; return 1;
    case KIND_I8: *out = (int8_t)raw; return 1;
    case KIND_I16: *out = (int16_t)raw; return 1;
    case KIND_I32: *out = (int32_t)raw; return 1;
    case KIND_I64: *out = (int64_t)raw; return 1;
    case KIND_U64:
        if (raw > INT64_MAX) return 0;
        *out = (int64_t)raw;
        return 1;
    default: return 0;
    }
}

int gguf_get_number(const gguf *g, const char *key, double *out)
{
    const value *v = find_value(g, key);
    int64_t integer;
    if (v && v->kind == KIND_F32) {
        *out = (double)float_of_bits((uint32_t)load_le(v->data, 4));
        return 1;
    }
    if (v && v->kind == KIND_F64) {
        const uint64_t bits = load_le(v->data, 8);
        memcpy(out, &bits, sizeof *out);
        return 1;
    }
    if (!gguf_get_integer(g, key, &integer)) return 0;
    *out = (double)integer;
    return 1;
}

int gguf_get_string(const gguf *g, const char *key, const char **text, size_t *length)
{
    const value *v = find_value(g, key);
    if (!v || v->kind != KIND_STRING) return 0;
    *text = (const char *)v->data;
    *length = (size_t)v->n_items;
    return 1;
}

int gguf_get_strings_count(const gguf *g, const char *key, size_t *n)
{
    const value *v = find_value(g, key);
    if (!v || !v->strings) return 0;
    *n = (size_t)v->n_items;
    return 1;
}

int gguf_get_strings_item(const gguf *g, const char *key, size_t i, const char **text,
                          size_t *length)
{
    const value *v = find_value(g, key);
    if (!v || !v->strings || i >= v->n_items) return 0;
    *text = (const char *)v->strings[i];
    *length = (size_t)load_le(v->strings[i] - 8, 8);
    return 1;
}

/* ---- writing ------------------------------------------------------------------------------- */

typedef struct byte_buffer {
    unsigned char *data;
    size_t n, capacity;
    int failed;
} byte_buffer;

struct gguf_writer {
    byte_buffer values, tensors, data, file;
    uint64_t n_values, n_tensors;
};

static unsigned char *reserve(byte_buffer *b, size_t n) /* NULL when out of memory */
{
    if (b->failed) return NULL;
    if (n > b->capacity - b->n) {
        size_t capacity = 2 * b->capacity + n + 256;
        unsigned char *more = realloc(b->data, capacity);
        if (!more) {
            b->failed = 1;
            return NULL;
        }
        b->data = more;
        b->capacity = capacity;
    }
    b->n += n;
    return b->data + b->n - n;
}

static void put_bytes(byte_buffer *b, const void *data, size_t n)
{
    unsigned char *at = reserve(b, n);
    if (at && n > 0) memcpy(at, data, n);
}

static void put_integer(byte_buffer *b, int n_bytes, uint64_t v)
{
    unsigned char *at = reserve(b, (size_t)n_bytes);
    if (at) store_le(at, n_bytes, v);
}

static void put_text(byte_buffer *b, const char *text)
{
    put_integer(b, 8, strlen(text));
    put_bytes(b, text, strlen(text));
}

static void pad(byte_buffer *b)
{
    while (!b->failed && b->n % DEFAULT_ALIGNMENT != 0) put_integer(b, 1, 0);
}

gguf_writer *gguf_writer_create(void)
{
    return calloc(1, sizeof(gguf_writer));
}

void gguf_writer_destroy(gguf_writer *w)
{
    if (!w) return;
    free(w->values.data);
    free(w->tensors.data);
    free(w->data.data);
    free(w->file.data);
    free(w);
}

static void put_key(gguf_writer *w, const char *key, int kind)
{
    put_text(&w->values, key);
    put_integer(&w->values, 4, (uint64_t)kind);
    w->n_values++;
}

void gguf_put_string(gguf_writer *w, const char *key, const char *text)
{
    put_key(w, key, KIND_STRING);
    put_text(&w->values, text);
}

void gguf_put_u32(gguf_writer *w, const char *key, uint32_t v)
{
    put_key(w, key, KIND_U32);
    put_integer(&w->values, 4, v);
}

void gguf_put_f32(gguf_writer *w, const char *key, float v)
{
    put_key(w, key, KIND_F32);
    put_integer(&w->values, 4, bits_of_float(v));
}

void gguf_put_strings(gguf_writer *w, const char *key, const char *const *text, size_t n)
{
    put_key(w, key, KIND_ARRAY);
    put_integer(&w->values, 4, KIND_STRING);
    put_integer(&w->values, 8, n);
    for (size_t i = 0; i < n; i++) put_text(&w->values, text[i]);
}

void gguf_put_tensor(gguf_writer *w, const char *name, gguf_type type, uint64_t rows, uint64_t cols,
                     const float *values)
{
    const type_info *info = find_type((uint64_t)type);
    const uint64_t n = (rows > 0 ? rows : 1) * cols;
    put_text(&w->tensors, name);
    put_integer(&w->tensors, 4, rows > 0 ? 2 : 1);
    put_integer(&w->tensors, 8, cols);
    if (rows > 0) put_integer(&w->tensors, 8, rows);
    put_integer(&w->tensors, 4, (uint64_t)type);
    pad(&w->data);
    put_integer(&w->tensors, 8, w->data.n);
    for (uint64_t i = 0; i < n; i += (uint64_t)info->block_elements) {
        unsigned char *at = reserve(&w->data, (size_t)info->block_bytes);
        if (at) info->store(values + i, at);
    }
    w->n_tensors++;
}

const unsigned char *gguf_bytes(gguf_writer *w, size_t *n)
{
    byte_buffer *f = &w->file;
    f->n = 0;
    put_bytes(f, "GGUF", 4);
    put_integer(f, 4, VERSION);
    put_integer(f, 8, w->n_tensors);
    put_integer(f, 8, w->n_values);
    put_bytes(f, w->values.data, w->values.n);
    put_bytes(f, w->tensors.data, w->tensors.n);
    pad(f);
    put_bytes(f, w->data.data, w->data.n);
    *n = f->n;
    return f->failed || w->values.failed || w->tensors.failed || w->data.failed ? NULL : f->data;
}

int gguf_write(gguf_writer *w, const char *path, gguf_error *error)
{
    size_t n;
    char fresh[1024];
    const unsigned char *data = gguf_bytes(w, &n);
    if (!data) return fail(error, "out of memory");
    if (snprintf(fresh, sizeof fresh, "%s.new", path) >= (int)sizeof fresh)
        return fail(error, "the path is too long");
    FILE *f = fopen(fresh, "wb");
    if (!f) return fail(error, "cannot create the file");
    int ok = fwrite(data, 1, n, f) == n;
    if (fclose(f) != 0 || !ok || rename(fresh, path) != 0) {
        remove(fresh);
        return fail(error, "cannot write the file");
    }
    return 1;
}
