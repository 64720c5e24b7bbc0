/* The GGUF reader of the examples: what the writer writes comes back, damaged files are refused.
 *     make test        or: build/tests/test_gguf */
#include "harness.h"

#include "../examples/ponder/gguf.c"

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
    free(file);
    return close_tests();
}
