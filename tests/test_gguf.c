/* The GGUF reader of the examples: what the writer writes comes back, damaged files are refused.
 *     make test        or: build/tests/test_gguf */
#include "harness.h"

#include <string.h>

/* Counts the comparisons of names, which is how the reader spends its time on many of them. */
static int64_t n_compared;
static int counted_strcmp(const char *a, const char *b)
{
    n_compared++;
    return strcmp(a, b);
}
#define strcmp counted_strcmp
#include "../examples/ponder/gguf.c"
#undef strcmp

enum { ROWS = 5, COLS = 64 };
static const gguf_type all_types[] = { GGUF_F32, GGUF_F16, GGUF_BF16, GGUF_Q8_0 };
enum { N_TYPES = sizeof all_types / sizeof *all_types };
static const char *const words[] = { "<s>", "", "three" };

static float sample(int i)
{
    return (float)((i * 37) % 101 - 50) * 0.03125f;
}

/* A file with one of everything; the caller frees it. */
static unsigned char *make_file(size_t *bytes)
{
    float values[ROWS * COLS];
    char name[32];
    gguf_writer *w = gguf_writer_create();
    for (int i = 0; i < ROWS * COLS; i++) values[i] = sample(i);
    gguf_put_string(w, "general.architecture", "llama");
    gguf_put_u32(w, "answer", 42);
    gguf_put_f32(w, "base", 0.5f);
    gguf_put_strings(w, "words", words, 3);
    for (int i = 0; i < N_TYPES; i++) {
        snprintf(name, sizeof name, "tensor%d", i);
        gguf_put_tensor(w, name, all_types[i], ROWS, COLS, values);
    }
    gguf_put_tensor(w, "vector", GGUF_F32, 0, COLS, values);
    const unsigned char *data = gguf_bytes(w, bytes);
    unsigned char *copy = alloc_checked(*bytes);
    memcpy(copy, data, *bytes);
    gguf_writer_destroy(w);
    return copy;
}

static void test_metadata(const gguf *g)
{
    int64_t integer = 0;
    double number = 0.0;
    const char *text = "";
    size_t length = 0;
    case_begin("metadata comes back");
    expect_true("answer", gguf_get_integer(g, "answer", &integer));
    expect_int("answer", 0, integer, 42);
    expect_true("base", gguf_get_number(g, "base", &number));
    expect_near("base", 0, number, 0.5, 0.0);
    expect_true("integer as number", gguf_get_number(g, "answer", &number));
    expect_near("integer as number", 0, number, 42.0, 0.0);
    expect_true("text", gguf_get_string(g, "general.architecture", &text, &length));
    expect_int("text length", 0, (int64_t)length, 5);
    expect_true("text bytes", length == 5 && memcmp(text, "llama", 5) == 0);
    expect_true("count", gguf_get_strings_count(g, "words", &length));
    expect_int("count", 0, (int64_t)length, 3);
    for (int i = 0; i < 3; i++) {
        expect_true("word", gguf_get_strings_item(g, "words", (size_t)i, &text, &length));
        expect_true("word bytes", length == strlen(words[i]) && !memcmp(text, words[i], length));
    }
    case_end();
    case_begin("what is absent or of another kind is not given");
    expect_true("absent", !gguf_get_integer(g, "nothing", &integer));
    expect_true("text as integer", !gguf_get_integer(g, "general.architecture", &integer));
    expect_true("integer as text", !gguf_get_string(g, "answer", &text, &length));
    expect_true("item behind the last", !gguf_get_strings_item(g, "words", 3, &text, &length));
    expect_true("tensor", gguf_find(g, "tensor9") == NULL);
    expect_true("there, of another kind", gguf_has(g, "words") && !gguf_has(g, "nothing"));
    case_end();
}

static void test_tensors(const gguf *g)
{
    static const double tolerance[N_TYPES] = { 0.0, 0.0, 1.0 / 128, 1.6 / 250 };
    float values[ROWS * COLS];
    char name[32];
    for (int i = 0; i < N_TYPES; i++) {
        case_begin("tensor of type %d comes back", (int)all_types[i]);
        snprintf(name, sizeof name, "tensor%d", i);
        const gguf_tensor *t = gguf_find(g, name);
        if (expect_true("found", t != NULL)) {
            expect_int("columns", 0, (int64_t)t->dim[0], COLS);
            expect_int("rows", 0, (int64_t)t->dim[1], ROWS);
            gguf_tensor_to_f32(t, values);
            for (int k = 0; k < ROWS * COLS; k++)
                expect_near("value", k, (double)values[k], (double)sample(k), tolerance[i]);
        }
        case_end();
    }
}

/* Every f16 there is, against the test harness's own conversion, and back. */
static void test_half(void)
{
    case_begin("all 65536 halves");
    for (uint32_t h = 0; h < 65536; h++) {
        const float want = f16_to_float((uint16_t)h), got = float_of_half(h);
        if (want != want) {
            expect_true("NaN", got != got && (half_of_float(got) & 0x7c00u) == 0x7c00u);
            continue;
        }
        expect_true("load", got == want);
        expect_int("store", (int)h, half_of_float(want), h);
    }
    case_end();
    case_begin("rounding to half and bf16");
    rng r = rng_seed(3);
    for (int i = 0; i < 100000; i++) {
        const uint32_t bits = (uint32_t)rng_next(&r);
        const float v = float_of_bits(bits);
        if (v != v) continue;
        expect_int("half", i, half_of_float(v), f16_from_float(v));
        expect_int("bf16", i, bf16_of_float(v), bf16_from_float(v));
    }
    case_end();
}

/* Reads a file from a block of exactly its size, so that a sanitizer sees any read beyond. When
 * it is accepted, everything in it is looked at. */
static int try_file(const unsigned char *data, size_t bytes)
{
    gguf *g;
    gguf_error error = { "" };
    unsigned char *exact = alloc_checked(bytes > 0 ? bytes : 1);
    memcpy(exact, data, bytes);
    const int ok = gguf_parse(&g, exact, bytes, &error);
    expect_true("a text for every refusal", ok || error.text[0] != 0);
    for (uint64_t i = 0; ok && i < g->n_tensors; i++) {
        float *values = alloc_checked((size_t)g->tensors[i].n_elements * sizeof(float));
        gguf_tensor_to_f32(&g->tensors[i], values);
        free(values);
    }
    const char *text;
    size_t n = 0, length;
    if (ok && gguf_get_strings_count(g, "words", &n))
        for (size_t i = 0; i < n; i++) gguf_get_strings_item(g, "words", i, &text, &length);
    if (ok) gguf_close(g);
    free(exact);
    return ok;
}

static void test_damage(const unsigned char *file, size_t bytes)
{
    unsigned char *copy = alloc_checked(bytes);
    case_begin("every truncation is refused");
    for (size_t n = 0; n < bytes; n++) expect_true("refused", !try_file(file, n));
    case_end();
    case_begin("every byte of the header, set to 0, 1, 127, 128 and 255");
    static const unsigned char damage[] = { 0, 1, 127, 128, 255 };
    const size_t header = bytes < 1024 ? bytes : 1024;
    for (size_t at = 0; at < header; at++)
        for (size_t k = 0; k < sizeof damage; k++) {
            memcpy(copy, file, bytes);
            copy[at] = damage[k];
            try_file(copy, bytes);
        }
    case_end();
    case_begin("20000 files with up to eight random bytes, seed 1");
    rng r = rng_seed(1);
    for (int i = 0; i < 20000; i++) {
        memcpy(copy, file, bytes);
        for (int n = 1 + rng_below(&r, 8); n > 0; n--)
            copy[rng_below(&r, (int)header)] = (unsigned char)rng_next(&r);
        try_file(copy, bytes);
    }
    case_end();
    free(copy);
}

/* Each a small change to a good file, and a word that the refusal must name. */
static void test_messages(const unsigned char *file, size_t bytes)
{
    static const struct {
        const char *name, *expected;
        size_t at;
        unsigned char value;
    } cases[] = { { "foreign file", "not a GGUF", 0, 'X' },
                  { "older version", "version 2", 4, 2 },
                  { "a billion tensors", "tensors", 15, 1 },
                  { "a billion entries", "metadata", 23, 1 } };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        gguf *g;
        gguf_error error = { "" };
        unsigned char *copy = alloc_checked(bytes);
        memcpy(copy, file, bytes);
        copy[cases[i].at] = cases[i].value;
        case_begin("%s", cases[i].name);
        expect_true("refused", !gguf_parse(&g, copy, bytes, &error));
        expect_true(error.text, strstr(error.text, cases[i].expected) != NULL);
        case_end();
        free(copy);
    }
    gguf *g;
    gguf_error error = { "" };
    case_begin("a file that is not there");
    expect_true("refused", !gguf_open(&g, "no/such/file.gguf", &error));
    expect_true(error.text, strstr(error.text, "cannot open") != NULL);
    case_end();
}

static void put_kind(gguf_writer *w, const char *key, int kind, uint64_t v)
{
    put_key(w, key, kind);
    put_integer(&w->values, kind_bytes[kind], v);
}

static void put_vector(gguf_writer *w, const char *name)
{
    const float v = 0.5f;
    gguf_put_tensor(w, name, GGUF_F32, 0, 1, &v);
}

static void put_nul(byte_buffer *b, char mark) /* a NUL for the one mark */
{
    unsigned char *at = memchr(b->data, mark, b->n);
    if (at) *at = 0;
}

/* Reads what the writer has gathered. The writer ends here; the caller frees the file. */
static int try_written(gguf_writer *w, gguf **g, gguf_error *error, unsigned char **file)
{
    size_t bytes;
    const unsigned char *data = gguf_bytes(w, &bytes);
    *file = alloc_checked(bytes);
    memcpy(*file, data, bytes);
    gguf_writer_destroy(w);
    error->text[0] = 0;
    return gguf_parse(g, *file, bytes, error);
}

static void expect_refusal(const char *name, gguf_writer *w, const char *expected)
{
    gguf *g;
    gguf_error error;
    unsigned char *file;
    case_begin("refused in words: %s", name);
    const int ok = try_written(w, &g, &error, &file);
    expect_true("refused", !ok);
    if (strcmp(error.text, expected) != 0) case_fail("instead: %s", error.text);
    if (ok) gguf_close(g);
    free(file);
    case_end();
}

#define NOT_U32     "corrupt: metadata general.alignment is not a u32"
#define NO_POWER(v) "corrupt: metadata general.alignment is " v ", not a power of two up to 65536"

static void test_alignment(void)
{
    static const struct {
        const char *name;
        int kind;
        uint64_t value;
        const char *expected;
    } bad[] = { { "alignment 0", KIND_U32, 0, NO_POWER("0") },
                { "alignment 24", KIND_U32, 24, NO_POWER("24") },
                { "alignment 2^17", KIND_U32, 131072, NO_POWER("131072") },
                { "alignment 2^32 - 1", KIND_U32, 0xffffffffu, NO_POWER("4294967295") },
                { "alignment as u64", KIND_U64, 32, NOT_U32 },
                { "alignment as u64 beyond i64", KIND_U64, (uint64_t)1 << 63, NOT_U32 },
                { "alignment as i32", KIND_I32, 32, NOT_U32 },
                { "alignment as f32", KIND_F32, 0x42000000u, NOT_U32 },
                { "alignment as bool", KIND_BOOL, 1, NOT_U32 } };
    const char *key = "general.alignment";
    gguf *g;
    gguf_error error;
    unsigned char *file;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        gguf_writer *w = gguf_writer_create();
        put_kind(w, key, bad[i].kind, bad[i].value);
        put_vector(w, "vector");
        expect_refusal(bad[i].name, w, bad[i].expected);
    }
    gguf_writer *w = gguf_writer_create();
    gguf_put_string(w, key, "32");
    expect_refusal("alignment as text", w, NOT_U32);
    w = gguf_writer_create();
    gguf_put_strings(w, key, words, 3);
    expect_refusal("alignment as array", w, NOT_U32);
    w = gguf_writer_create();
    put_kind(w, key, KIND_U32, 64);
    put_vector(w, "first");
    put_vector(w, "second"); /* 32 bytes behind the first */
    expect_refusal("a tensor off its alignment", w,
                   "corrupt: tensor second is not aligned to 64 bytes");
    w = gguf_writer_create();
    put_kind(w, key, KIND_U32, 32);
    put_vector(w, "first");
    put_vector(w, "second");
    case_begin("an alignment of 32 is taken");
    if (expect_true("read", try_written(w, &g, &error, &file))) gguf_close(g);
    free(file);
    case_end();
}

static void test_names(void)
{
    gguf_writer *w = gguf_writer_create();
    put_vector(w, "twin");
    put_vector(w, "other");
    put_vector(w, "twin");
    expect_refusal("two tensors of one name", w, "corrupt: tensor twin is there twice");
    w = gguf_writer_create();
    gguf_put_u32(w, "answer", 42);
    gguf_put_u32(w, "other", 1);
    gguf_put_string(w, "answer", "no");
    expect_refusal("two entries of one key", w, "corrupt: metadata answer is there twice");
    w = gguf_writer_create();
    put_vector(w, "tensor0");
    put_vector(w, "tensor#1");
    put_nul(&w->tensors, '#');
    expect_refusal("NUL inside the name of a tensor", w,
                   "corrupt: the name of tensor tensor?1 contains a NUL byte, shown as ?");
    w = gguf_writer_create();
    put_vector(w, "tensor0#");
    put_nul(&w->tensors, '#');
    expect_refusal("NUL at the end of the name of a tensor", w,
                   "corrupt: the name of tensor tensor0? contains a NUL byte, shown as ?");
    w = gguf_writer_create();
    gguf_put_u32(w, "ans#wer", 42);
    put_nul(&w->values, '#');
    expect_refusal("NUL inside a key", w,
                   "corrupt: the name of metadata ans?wer contains a NUL byte, shown as ?");
    w = gguf_writer_create();
    put_vector(w, "\033[2Jname");
    put_vector(w, "\033[2Jname");
    expect_refusal("control characters", w, "corrupt: tensor ?[2Jname is there twice");
    gguf *g;
    gguf_error error;
    unsigned char *file;
    const char *text = "";
    size_t length = 0;
    w = gguf_writer_create();
    gguf_put_string(w, "text", "a#b");
    put_nul(&w->values, '#');
    case_begin("a text with a NUL comes back whole");
    if (expect_true("read", try_written(w, &g, &error, &file))) {
        expect_true("given", gguf_get_string(g, "text", &text, &length));
        expect_true("whole", length == 3 && memcmp(text, "a\0b", 3) == 0);
        gguf_close(g);
    }
    free(file);
    case_end();
}

/* Damage inside an entry: the text names it, by its number while its name is unread. */
static void test_named_damage(void)
{
    gguf_writer *w = gguf_writer_create();
    gguf_put_u32(w, "first", 1);
    put_key(w, "second", N_KINDS);
    put_integer(&w->values, 8, 0);
    expect_refusal("unknown kind", w, "corrupt: metadata second is of the unknown kind 13");
    w = gguf_writer_create();
    gguf_put_u32(w, "first", 1);
    put_integer(&w->values, 8, 1000);
    put_integer(&w->values, 8, 0);
    w->n_values++;
    expect_refusal("a key of 1000 bytes", w,
                   "corrupt: metadata 2 of 2 needs 1000 bytes at byte 53; the file has 11 left");
    w = gguf_writer_create();
    put_key(w, "words", KIND_ARRAY);
    put_integer(&w->values, 4, KIND_STRING);
    put_integer(&w->values, 8, UINT64_MAX);
    expect_refusal("2^64 - 1 strings", w,
                   "corrupt: metadata words has 18446744073709551615 strings in 11 bytes");
    w = gguf_writer_create();
    put_key(w, "deep", KIND_ARRAY);
    for (int i = 0; i <= MAX_NESTING; i++) {
        put_integer(&w->values, 4, KIND_ARRAY);
        put_integer(&w->values, 8, 1);
    }
    expect_refusal("deep arrays", w, "corrupt: metadata deep nests its arrays too deeply");
}

/* A file of one tensor, cut: bytes 24 to 58 are its entry, 64 to 67 its data. */
static void test_named_cuts(void)
{
    static const struct {
        size_t bytes;
        const char *expected;
    } cuts[] = { { 58, "truncated: the file ends inside tensor one, at byte 58" },
                 { 60, "truncated: the file ends before the data of its tensors" },
                 { 67, "truncated: tensor one lies beyond the end of the file" } };
    size_t bytes;
    gguf_writer *w = gguf_writer_create();
    put_vector(w, "one");
    const unsigned char *file = gguf_bytes(w, &bytes);
    for (size_t i = 0; i < sizeof cuts / sizeof *cuts; i++) {
        gguf *g;
        gguf_error error = { "" };
        case_begin("refused in words: cut at byte %d", (int)cuts[i].bytes);
        expect_true("refused", !gguf_parse(&g, file, cuts[i].bytes, &error));
        if (strcmp(error.text, cuts[i].expected) != 0) case_fail("instead: %s", error.text);
        case_end();
    }
    gguf_writer_destroy(w);
}

/* Many names: log2(80000) is below 17, so 40 comparisons for each are enough; 80000 are not. */
static void test_many_names(void)
{
    enum { N = 80000, STEP = 27011 }; /* no common factor: every number, in no order */
    gguf *g;
    gguf_error error;
    unsigned char *file;
    int64_t integer = -1;
    char name[32];
    gguf_writer *w = gguf_writer_create();
    for (int i = 0; i < N; i++) {
        snprintf(name, sizeof name, "name%d", (int)((int64_t)i * STEP % N));
        put_vector(w, name);
        gguf_put_u32(w, name, (uint32_t)i);
    }
    case_begin("80000 tensors and 80000 keys, without comparing each with each");
    n_compared = 0;
    if (expect_true("read", try_written(w, &g, &error, &file))) {
        expect_true("comparisons to read", n_compared >= 2 * N && n_compared < (int64_t)80 * N);
        n_compared = 0;
        for (int i = 0; i < N; i += 100) {
            snprintf(name, sizeof name, "name%d", (int)((int64_t)i * STEP % N));
            const gguf_tensor *t = gguf_find(g, name);
            expect_true("tensor", t != NULL && strcmp(t->name, name) == 0);
            expect_true("key", gguf_get_integer(g, name, &integer));
            expect_int("value", i, integer, i);
        }
        expect_true("comparisons to find",
                    n_compared >= N / 50 && n_compared < (int64_t)80 * N / 100);
        gguf_close(g);
    }
    free(file);
    case_end();
}

/* Many strings: a walk from the first to each would take minutes. */
static void test_many_strings(void)
{
    enum { N = 400000, WORD_BYTES = 16 };
    gguf *g;
    gguf_error error;
    unsigned char *file;
    const char *text = "";
    size_t length = 0;
    char *all = alloc_checked(N * WORD_BYTES);
    const char **list = alloc_checked(N * sizeof *list);
    for (int i = 0; i < N; i++) {
        list[i] = all + i * WORD_BYTES;
        snprintf(all + i * WORD_BYTES, WORD_BYTES, "w%d", i);
    }
    gguf_writer *w = gguf_writer_create();
    gguf_put_strings(w, "words", list, N);
    case_begin("400000 strings, each found at once");
    if (expect_true("read", try_written(w, &g, &error, &file))) {
        for (int i = 0; i < N; i++) {
            expect_true("word", gguf_get_strings_item(g, "words", (size_t)i, &text, &length));
            if (length != strlen(list[i]) || memcmp(text, list[i], length) != 0)
                case_fail("word %d is another", i);
        }
        gguf_close(g);
    }
    free(file);
    free(list);
    free(all);
    case_end();
}

int main(void)
{
    size_t bytes;
    gguf *g;
    gguf_error error = { "" };
    unsigned char *file = make_file(&bytes);
    case_begin("a good file is read");
    const int ok = gguf_parse(&g, file, bytes, &error);
    expect_true(error.text, ok);
    case_end();
    if (ok) {
        test_metadata(g);
        test_tensors(g);
        gguf_close(g);
    }
    test_half();
    test_damage(file, bytes);
    test_messages(file, bytes);
    test_alignment();
    test_names();
    test_named_damage();
    test_named_cuts();
    test_many_names();
    test_many_strings();
    free(file);
    return close_tests();
}
