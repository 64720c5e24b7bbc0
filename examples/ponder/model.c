/* model.c - see model.h. Build: part of `make demo` and `make eval`. */
#include "model.h"
#include "kernels.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_SIZE = 1 << 20, MAX_LAYERS = 1024 }; /* no dimension of a model is larger */

/* Matrices lie transposed, those with the same input side by side, and in panels of PANEL outputs:
 * [out / PANEL][in][PANEL]. matmul goes through one panel after another, which then is one stretch
 * of memory; rows of a whole wide matrix would be on a page each. */
enum { PANEL = 32 };

typedef struct layer_weights {
    float *attn_norm, *qkv, *attn_out, *ffn_norm, *gate_up, *down;
} layer_weights;

struct model {
    model_shape shape;
    layer_weights *layers;
    float *embedding; /* [vocabulary][dim] */
    float *output;    /* in panels, as in layer_weights */
    float *final_norm;
    float *cosine, *sine; /* [context][head_dim / 2] */
    char **words;         /* [vocabulary], or NULL */
};

/* ---- loading ------------------------------------------------------------------------------- */

typedef struct loader {
    const gguf *file;
    gguf_error *error;
    const char *architecture;
    int failed;
} loader;

static void fail(loader *l, const char *format, const char *name)
{
    if (!l->failed) snprintf(l->error->text, sizeof l->error->text, format, name);
    l->failed = 1;
}

static float *allocate(loader *l, size_t rows, size_t cols)
{
    float *memory =
        cols <= SIZE_MAX / sizeof(float) / rows ? calloc(rows * cols, sizeof(float)) : NULL;
    if (!memory) fail(l, "out of memory%s", "");
    return memory;
}

static double number(loader *l, const char *key, double fallback, double low, double high)
{
    char name[96];
    double v = fallback;
    snprintf(name, sizeof name, "%s.%s", l->architecture, key);
    const int given = gguf_get_number(l->file, name, &v);
    if (!given && gguf_has(l->file, name))
        fail(l, "metadata %s is not a number", name);
    else if (!given && fallback < low)
        fail(l, "no metadata %s", name);
    else if (!(v >= low && v <= high))
        fail(l, "metadata %s is out of range", name);
    return l->failed ? low : v;
}

static int size(loader *l, const char *key, int fallback, int high)
{
    return (int)number(l, key, fallback, 1, high);
}

static const struct {
    const char *name;
    rope_pairing pairing;
} architectures[] = { { "llama", ROPE_ADJACENT }, { "exaone", ROPE_HALVES } };

static void read_architecture(loader *l, model_shape *s)
{
    const char *text;
    size_t length;
    if (!gguf_get_string(l->file, "general.architecture", &text, &length)) {
        fail(l,
             gguf_has(l->file, "general.architecture") ? "metadata %s is not a text"
                                                       : "no metadata %s",
             "general.architecture");
        return;
    }
    for (size_t i = 0; i < sizeof architectures / sizeof *architectures; i++)
        if (strlen(architectures[i].name) == length &&
            memcmp(architectures[i].name, text, length) == 0) {
            l->architecture = architectures[i].name;
            s->pairing = architectures[i].pairing;
            return;
        }
    fail(l, "the architecture is not %s or a like one", "llama");
}

static void read_shape(loader *l, model_shape *s)
{
    read_architecture(l, s);
    if (l->failed) return;
    const gguf_tensor *embedding = gguf_find(l->file, "token_embd.weight");
    if (!embedding || embedding->dim[1] > MAX_SIZE) {
        fail(l, "tensor %s is missing or too large", "token_embd.weight");
        return;
    }
    s->vocabulary = (int)embedding->dim[1];
    s->n_layers = size(l, "block_count", 0, MAX_LAYERS);
    s->dim = size(l, "embedding_length", 0, MAX_SIZE);
    s->ffn_dim = size(l, "feed_forward_length", 0, MAX_SIZE);
    s->context = size(l, "context_length", 0, MAX_SIZE);
    s->n_heads = size(l, "attention.head_count", 0, 4096);
    s->n_kv_heads = size(l, "attention.head_count_kv", s->n_heads, 4096);
    s->head_dim = size(l, "attention.key_length", s->dim / s->n_heads, 4096);
    s->norm_eps = (float)number(l, "attention.layer_norm_rms_epsilon", 1e-5, 0.0, 1.0);
    s->rope_base = (float)number(l, "rope.freq_base", 10000.0, 1.0, 1e12);
    const int rotated = size(l, "rope.dimension_count", s->head_dim, 4096);
    if (l->failed) return;
    if (s->n_heads % s->n_kv_heads != 0) fail(l, "heads are no multiple of kv heads%s", "");
    if (s->head_dim % 2 != 0 || rotated != s->head_dim)
        fail(l, "rotary embedding of a part of the head is not supported%s", "");
}

/* A tensor [rows][cols] as f32, or NULL; rows = 1 for a vector. The caller frees it. */
static float *read_tensor(loader *l, const char *name, int rows, int cols)
{
    const gguf_tensor *t = gguf_find(l->file, name);
    if (l->failed) return NULL;
    if (!t) {
        fail(l, "tensor %s is missing", name);
        return NULL;
    }
    if (t->dim[0] != (uint64_t)cols || t->dim[1] != (uint64_t)rows || t->dim[2] * t->dim[3] != 1) {
        fail(l, "tensor %s has another shape than the metadata says", name);
        return NULL;
    }
    float *data = allocate(l, (size_t)rows, (size_t)cols);
    if (data) gguf_tensor_to_f32(t, data);
    return data;
}

static float *read_layer_tensor(loader *l, int layer, const char *name, int rows, int cols)
{
    char full[96];
    snprintf(full, sizeof full, "blk.%d.%s.weight", layer, name);
    return read_tensor(l, full, rows, cols);
}

typedef struct part {
    const char *name;
    int rows;
} part;

static int panel_width(int rows, int at) /* of the panel that begins there */
{
    return rows - at < PANEL ? rows - at : PANEL;
}

static void to_panels(const float *src, int rows, int cols, float *dst)
{
    for (int at = 0; at < rows; at += PANEL) {
        const size_t offset = (size_t)at * (size_t)cols;
        transpose(src + offset, panel_width(rows, at), cols, cols, dst + offset);
    }
}

/* Several matrices with the same input, as one in panels. */
static float *read_joined(loader *l, int layer, const part *parts, int n, int cols)
{
    int rows = 0, at = 0;
    for (int i = 0; i < n; i++) rows += parts[i].rows;
    float *joined = allocate(l, (size_t)rows, (size_t)cols);
    float *turned = allocate(l, (size_t)rows, (size_t)cols);
    for (int i = 0; i < n; i++) {
        float *one = read_layer_tensor(l, layer, parts[i].name, parts[i].rows, cols);
        if (!l->failed)
            memcpy(joined + (size_t)at * (size_t)cols, one,
                   (size_t)parts[i].rows * (size_t)cols * sizeof(float));
        at += parts[i].rows;
        free(one);
    }
    if (!l->failed) to_panels(joined, rows, cols, turned);
    free(joined);
    return turned;
}

static void read_layer(loader *l, const model_shape *s, int layer, layer_weights *w)
{
    const part qkv[] = { { "attn_q", shape_q_dim(s) },
                         { "attn_k", shape_kv_dim(s) },
                         { "attn_v", shape_kv_dim(s) } };
    const part gate_up[] = { { "ffn_gate", s->ffn_dim }, { "ffn_up", s->ffn_dim } };
    const part attn_out = { "attn_output", s->dim }, down = { "ffn_down", s->dim };
    w->attn_norm = read_layer_tensor(l, layer, "attn_norm", 1, s->dim);
    w->qkv = read_joined(l, layer, qkv, 3, s->dim);
    w->attn_out = read_joined(l, layer, &attn_out, 1, shape_q_dim(s));
    w->ffn_norm = read_layer_tensor(l, layer, "ffn_norm", 1, s->dim);
    w->gate_up = read_joined(l, layer, gate_up, 2, s->dim);
    w->down = read_joined(l, layer, &down, 1, s->ffn_dim);
}

static void read_output(loader *l, model *m)
{
    const model_shape *s = &m->shape;
    m->embedding = read_tensor(l, "token_embd.weight", s->vocabulary, s->dim);
    m->final_norm = read_tensor(l, "output_norm.weight", 1, s->dim);
    float *untied = gguf_find(l->file, "output.weight")
                        ? read_tensor(l, "output.weight", s->vocabulary, s->dim)
                        : NULL;
    m->output = allocate(l, (size_t)s->vocabulary, (size_t)s->dim);
    if (!l->failed) to_panels(untied ? untied : m->embedding, s->vocabulary, s->dim, m->output);
    free(untied);
}

static void read_words(loader *l, model *m)
{
    const char *key = "tokenizer.ggml.tokens", *text;
    size_t n, length;
    if (l->failed || !gguf_has(l->file, key)) return;
    if (!gguf_get_strings_count(l->file, key, &n)) {
        fail(l, "metadata %s is not an array of texts", key);
        return;
    }
    if (n != (size_t)m->shape.vocabulary) return;
    m->words = calloc(n, sizeof *m->words);
    for (size_t i = 0; m->words && i < n; i++) {
        gguf_get_strings_item(l->file, key, i, &text, &length);
        if (memchr(text, 0, length)) fail(l, "a word of metadata %s contains a NUL byte", key);
        m->words[i] = malloc(length + 1);
        if (!m->words[i]) break;
        memcpy(m->words[i], text, length);
        m->words[i][length] = 0;
    }
    if (!m->words || !m->words[n - 1]) fail(l, "out of memory%s", "");
}

static void tabulate_rotation(loader *l, model *m)
{
    const int half = m->shape.head_dim / 2;
    m->cosine = allocate(l, (size_t)m->shape.context, (size_t)half);
    m->sine = allocate(l, (size_t)m->shape.context, (size_t)half);
    for (int position = 0; !l->failed && position < m->shape.context; position++)
        for (int i = 0; i < half; i++) {
            const double angle = position * pow((double)m->shape.rope_base, -(double)i / half);
            m->cosine[(size_t)position * (size_t)half + (size_t)i] = (float)cos(angle);
            m->sine[(size_t)position * (size_t)half + (size_t)i] = (float)sin(angle);
        }
}

int model_from_gguf(model **out, const gguf *g, gguf_error *error)
{
    loader l = { g, error, "", 0 };
    model *m = calloc(1, sizeof *m);
    *out = NULL;
    if (!m) {
        fail(&l, "out of memory%s", "");
        return 0;
    }
    read_shape(&l, &m->shape);
    if (!l.failed) {
        m->layers = calloc((size_t)m->shape.n_layers, sizeof *m->layers);
        if (!m->layers) fail(&l, "out of memory%s", "");
        for (int i = 0; !l.failed && i < m->shape.n_layers; i++)
            read_layer(&l, &m->shape, i, &m->layers[i]);
        read_output(&l, m);
        read_words(&l, m);
        tabulate_rotation(&l, m);
    }
    if (l.failed) {
        model_free(m);
        return 0;
    }
    *out = m;
    return 1;
}

int model_load(model **out, const char *path, gguf_error *error)
{
    gguf *g;
    *out = NULL;
    if (!gguf_open(&g, path, error)) return 0;
    const int ok = model_from_gguf(out, g, error);
    gguf_close(g);
    return ok;
}

void model_free(model *m)
{
    if (!m) return;
    for (int i = 0; m->layers && i < m->shape.n_layers; i++) {
        layer_weights *w = &m->layers[i];
        float *all[] = { w->attn_norm, w->qkv, w->attn_out, w->ffn_norm, w->gate_up, w->down };
        for (size_t k = 0; k < sizeof all / sizeof *all; k++) free(all[k]);
    }
    for (int i = 0; m->words && i < m->shape.vocabulary; i++) free(m->words[i]);
    free(m->words);
    free(m->layers);
    free(m->embedding);
    free(m->output);
    free(m->final_norm);
    free(m->cosine);
    free(m->sine);
    free(m);
}

const model_shape *model_get_shape(const model *m)
{
    return &m->shape;
}

const char *model_word(const model *m, int token)
{
    return m->words ? m->words[token] : "";
}

/* ---- running ------------------------------------------------------------------------------- */

struct model_scratch {
    float *memory;
    float *x, *norm, *qkv, *q, *k, *v, *attention, *gate_up, *hidden, *logits; /* [tokens][..] */
};

model_scratch *model_scratch_create(const model *m, int max_tokens)
{
    const model_shape *s = &m->shape;
    const int q = shape_q_dim(s), kv = shape_kv_dim(s);
    model_scratch *a = calloc(1, sizeof *a);
    if (!a) return NULL;
    const struct {
        float **buffer;
        int width;
    } parts[] = { { &a->x, s->dim },
                  { &a->norm, s->dim },
                  { &a->qkv, q + 2 * kv },
                  { &a->q, q },
                  { &a->k, kv },
                  { &a->v, kv },
                  { &a->attention, q },
                  { &a->gate_up, 2 * s->ffn_dim },
                  { &a->hidden, s->ffn_dim },
                  { &a->logits, s->vocabulary } };
    enum { N_PARTS = sizeof parts / sizeof *parts };
    size_t width = 0, at = 0;
    for (int i = 0; i < N_PARTS; i++) width += (size_t)parts[i].width;
    a->memory = calloc((size_t)max_tokens * width, sizeof *a->memory);
    if (!a->memory) {
        free(a);
        return NULL;
    }
    for (int i = 0; i < N_PARTS; i++) {
        *parts[i].buffer = a->memory + at;
        at += (size_t)max_tokens * (size_t)parts[i].width;
    }
    return a;
}

void model_scratch_destroy(model_scratch *s)
{
    if (s) free(s->memory);
    free(s);
}

static void rotate(const model *m, float *x, int n_heads, int position)
{
    const int d = m->shape.head_dim, half = d / 2;
    const float *cosine = m->cosine + (size_t)position * (size_t)half;
    const float *sine = m->sine + (size_t)position * (size_t)half;
    const int halves = m->shape.pairing == ROPE_HALVES;
    for (int head = 0; head < n_heads; head++, x += d)
        for (int i = 0; i < half; i++) {
            float *a = halves ? x + i : x + 2 * i, *b = halves ? x + i + half : x + 2 * i + 1;
            const float first = *a, second = *b;
            *a = first * cosine[i] - second * sine[i];
            *b = first * sine[i] + second * cosine[i];
        }
}

/* y[n][out] = x[n][in] * w, or += */
static void multiply(int n, int in, int out, const float *x, const float *w, float *y, int add)
{
    const matrix rows = { x, in, 1 };
    for (int at = 0; at < out; at += PANEL) {
        const int width = panel_width(out, at);
        matmul(n, width, in, rows, w + (size_t)at * (size_t)in, width, y + at, out, add);
    }
}

static void split_qkv(const model *m, model_scratch *a, int n, const int *positions)
{
    const model_shape *s = &m->shape;
    const size_t q = (size_t)shape_q_dim(s), kv = (size_t)shape_kv_dim(s);
    for (int i = 0; i < n; i++) {
        const float *from = a->qkv + (size_t)i * (q + 2 * kv);
        memcpy(a->q + (size_t)i * q, from, q * sizeof(float));
        memcpy(a->k + (size_t)i * kv, from + q, kv * sizeof(float));
        memcpy(a->v + (size_t)i * kv, from + q + kv, kv * sizeof(float));
        rotate(m, a->q + (size_t)i * q, s->n_heads, positions[i]);
        rotate(m, a->k + (size_t)i * kv, s->n_kv_heads, positions[i]);
    }
}

static void norm_rows(const model_shape *s, float *y, const float *x, const float *weight, int n)
{
    for (int i = 0; i < n; i++)
        rmsnorm(y + (size_t)i * (size_t)s->dim, x + (size_t)i * (size_t)s->dim, weight, s->dim,
                s->norm_eps);
}

/* hidden = gate / (1 + exp(-gate)) * up */
static void swiglu(float *hidden, const float *gate, const float *up, int n)
{
    for (int i = 0; i < n; i++) hidden[i] = gate[i] < -80.0f ? 80.0f : -gate[i];
    exp_inplace(hidden, n);
    for (int i = 0; i < n; i++) hidden[i] = gate[i] / (1.0f + hidden[i]) * up[i];
}

float *model_forward(const model *m, model_scratch *a, int n, const int *tokens,
                     const int *positions, model_attend attend, void *user)
{
    const model_shape *s = &m->shape;
    const int q_dim = shape_q_dim(s), ffn = s->ffn_dim;
    for (int i = 0; i < n; i++)
        memcpy(a->x + (size_t)i * (size_t)s->dim, m->embedding + (size_t)tokens[i] * (size_t)s->dim,
               (size_t)s->dim * sizeof(float));
    for (int layer = 0; layer < s->n_layers; layer++) {
        const layer_weights *w = &m->layers[layer];
        norm_rows(s, a->norm, a->x, w->attn_norm, n);
        multiply(n, s->dim, q_dim + 2 * shape_kv_dim(s), a->norm, w->qkv, a->qkv, 0);
        split_qkv(m, a, n, positions);
        attend(user, layer, n, a->q, a->k, a->v, a->attention);
        multiply(n, q_dim, s->dim, a->attention, w->attn_out, a->x, 1);
        norm_rows(s, a->norm, a->x, w->ffn_norm, n);
        multiply(n, s->dim, 2 * ffn, a->norm, w->gate_up, a->gate_up, 0);
        for (int i = 0; i < n; i++) {
            const float *gate = a->gate_up + (size_t)i * 2 * (size_t)ffn;
            swiglu(a->hidden + (size_t)i * (size_t)ffn, gate, gate + ffn, ffn);
        }
        multiply(n, ffn, s->dim, a->hidden, w->down, a->x, 1);
    }
    norm_rows(s, a->norm, a->x, m->final_norm, n);
    multiply(n, s->dim, s->vocabulary, a->norm, m->output, a->logits, 0);
    return a->logits;
}

void model_attend_rows(const model_shape *s, const float *q, const kv_rows *rows, float *weights,
                       float *out)
{
    const int d = s->head_dim, group = s->n_heads / s->n_kv_heads;
    const float scale = 1.0f / sqrtf((float)d);
    for (int head = 0; head < s->n_heads; head++, q += d, out += d) {
        const float *key = rows->keys + (head / group) * rows->head_stride;
        const float *value = rows->values + (head / group) * rows->head_stride;
        for (int r = 0; r < rows->n_rows; r++)
            weights[r] = scale * dot(q, key + r * rows->row_stride, d);
        softmax(weights, rows->n_rows);
        sum_rows(weights, rows->n_rows, value, rows->row_stride, d, out);
    }
}

int model_choose(float *logits, int n, float temperature, prng *r)
{
    int best = 0;
    for (int i = 1; i < n; i++)
        if (logits[i] > logits[best]) best = i;
    if (!(temperature > 0.0f)) return best;
    for (int i = 0; i < n; i++) logits[i] /= temperature;
    softmax(logits, n);
    float left = prng_uniform(r);
    for (int i = 0; i < n; i++)
        if ((left -= logits[i]) < 0.0f) return i;
    return best;
}
