/* backprop.c - see backprop.h. Build: part of `make train`; `build/train --check` compares the
 * gradients with finite differences.
 * Activations are [rows][..], rows = the tokens rounded up to whole blocks of queries.
 */
#include "backprop.h"
#include "kernels.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCK = 32 }; /* queries whose attention is computed at a time */

/* ---- weights ------------------------------------------------------------------------------ */

/* The next rows x cols floats of one allocation; with base NULL only counts. */
typedef struct carver {
    float *base;
    size_t n;
} carver;

static float *take(carver *c, int rows, int cols)
{
    float *at = c->base ? c->base + c->n : NULL;
    c->n += (size_t)rows * (size_t)cols;
    return at;
}

static weights carve_weights(const model_shape *s, carver *c)
{
    weights w;
    w.embedding = take(c, s->vocabulary, s->dim);
    for (int l = 0; l < s->n_layers; l++) {
        w.layer[l].attn_norm = take(c, 1, s->dim);
        w.layer[l].qkv = take(c, shape_q_dim(s) + 2 * shape_kv_dim(s), s->dim);
        w.layer[l].attn_out = take(c, s->dim, shape_q_dim(s));
        w.layer[l].ffn_norm = take(c, 1, s->dim);
        w.layer[l].gate_up = take(c, 2 * s->ffn_dim, s->dim);
        w.layer[l].down = take(c, s->dim, s->ffn_dim);
    }
    w.final_norm = take(c, 1, s->dim);
    return w;
}

weights weights_view(const model_shape *s, float *all)
{
    carver c = { all, 0 };
    return carve_weights(s, &c);
}

size_t weights_count(const model_shape *s)
{
    carver c = { NULL, 0 };
    carve_weights(s, &c);
    return c.n;
}

void weights_transpose(const model_shape *s, float *all, float *transposed)
{
    const int qkv = shape_q_dim(s) + 2 * shape_kv_dim(s);
    memcpy(transposed, all, weights_count(s) * sizeof *all);
    weights from = weights_view(s, all), to = weights_view(s, transposed);
    transpose(from.embedding, s->vocabulary, s->dim, s->dim, to.embedding);
    for (int l = 0; l < s->n_layers; l++) {
        transpose(from.layer[l].qkv, qkv, s->dim, s->dim, to.layer[l].qkv);
        transpose(from.layer[l].attn_out, s->dim, shape_q_dim(s), shape_q_dim(s),
                  to.layer[l].attn_out);
        transpose(from.layer[l].gate_up, 2 * s->ffn_dim, s->dim, s->dim, to.layer[l].gate_up);
        transpose(from.layer[l].down, s->dim, s->ffn_dim, s->ffn_dim, to.layer[l].down);
    }
}

/* ---- activations --------------------------------------------------------------------------- */

typedef struct layer_state {
    float *x, *norm1, *qkv, *attention, *middle, *norm2, *gate_up, *hidden; /* [rows][..] */
    float *scale1, *scale2;                                                 /* [rows]     */
    float *prob; /* [heads][rows][rows] */
} layer_state;

struct backprop {
    model_shape shape;
    int max_rows;
    float *memory;
    layer_state layer[BACKPROP_MAX_LAYERS];
    float *x_last, *norm_last, *scale_last, *logits; /* [rows][..]                      */
    float *dx, *dnorm, *dqkv, *dattention, *dgate_up, *dhidden;
    float *keys_t, *values_t; /* [head_dim][rows]                */
    float *dprob;             /* [BLOCK][rows]                   */
    float *cosine, *sine;     /* [rows][head_dim / 2]            */
    float *sigmoid;           /* [ffn_dim]                       */
};

static void carve(backprop *b, carver *c)
{
    const model_shape *s = &b->shape;
    const int rows = b->max_rows, qkv = shape_q_dim(s) + 2 * shape_kv_dim(s);
    for (int l = 0; l < s->n_layers; l++) {
        layer_state *a = &b->layer[l];
        a->x = take(c, rows, s->dim);
        a->norm1 = take(c, rows, s->dim);
        a->qkv = take(c, rows, qkv);
        a->attention = take(c, rows, shape_q_dim(s));
        a->middle = take(c, rows, s->dim);
        a->norm2 = take(c, rows, s->dim);
        a->gate_up = take(c, rows, 2 * s->ffn_dim);
        a->hidden = take(c, rows, s->ffn_dim);
        a->scale1 = take(c, rows, 1);
        a->scale2 = take(c, rows, 1);
        a->prob = take(c, s->n_heads * rows, rows);
    }
    b->x_last = take(c, rows, s->dim);
    b->norm_last = take(c, rows, s->dim);
    b->scale_last = take(c, rows, 1);
    b->logits = take(c, rows, s->vocabulary);
    b->dx = take(c, rows, s->dim);
    b->dnorm = take(c, rows, s->dim);
    b->dqkv = take(c, rows, qkv);
    b->dattention = take(c, rows, shape_q_dim(s));
    b->dgate_up = take(c, rows, 2 * s->ffn_dim);
    b->dhidden = take(c, rows, s->ffn_dim);
    b->keys_t = take(c, rows, s->head_dim);
    b->values_t = take(c, rows, s->head_dim);
    b->dprob = take(c, BLOCK, rows);
    b->cosine = take(c, rows, s->head_dim / 2);
    b->sine = take(c, rows, s->head_dim / 2);
    b->sigmoid = take(c, 1, s->ffn_dim);
}

backprop *backprop_create(const model_shape *s, int max_tokens)
{
    backprop *b = calloc(1, sizeof *b);
    if (!b) return NULL;
    b->shape = *s;
    b->max_rows = (max_tokens + BLOCK - 1) / BLOCK * BLOCK;
    carver all = { NULL, 0 };
    carve(b, &all); /* measures */
    b->memory = all.base = calloc(all.n, sizeof *b->memory);
    all.n = 0;
    if (!b->memory) {
        free(b);
        return NULL;
    }
    carve(b, &all);
    const int half = s->head_dim / 2;
    for (int row = 0; row < b->max_rows; row++)
        for (int i = 0; i < half; i++) {
            double angle = row * pow((double)s->rope_base, -(double)i / half);
            b->cosine[row * half + i] = (float)cos(angle);
            b->sine[row * half + i] = (float)sin(angle);
        }
    return b;
}

void backprop_destroy(backprop *b)
{
    if (b) free(b->memory);
    free(b);
}

/* ---- the pieces of a layer ----------------------------------------------------------------- */

static matrix by_rows(const float *data, ptrdiff_t stride)
{
    matrix m = { data, stride, 1 };
    return m;
}

static matrix by_columns(const float *data, ptrdiff_t stride) /* the transpose of by_rows */
{
    matrix m = { data, 1, stride };
    return m;
}

/* Turns every query and key by its position; direction -1 turns gradients back. */
static void rotate(const backprop *b, float *qkv, int rows, float direction)
{
    const model_shape *s = &b->shape;
    const int half = s->head_dim / 2, width = shape_q_dim(s) + 2 * shape_kv_dim(s);
    for (int row = 0; row < rows; row++)
        for (int head = 0; head < s->n_heads + s->n_kv_heads; head++) {
            float *x = qkv + (size_t)row * (size_t)width + head * s->head_dim;
            for (int i = 0; i < half; i++) {
                float c = b->cosine[row * half + i], d = direction * b->sine[row * half + i];
                float even = x[2 * i], odd = x[2 * i + 1];
                x[2 * i] = even * c - odd * d;
                x[2 * i + 1] = even * d + odd * c;
            }
        }
}

typedef struct head_view { /* one query head and its kv head in the qkv rows */
    const float *q, *k, *v;
    float *prob;
    const uint8_t *dropped;
    ptrdiff_t stride;
} head_view;

static head_view view_head(const backprop *b, int l, int head, int rows, const sequence *seq)
{
    const model_shape *s = &b->shape;
    const int kv_head = head / (s->n_heads / s->n_kv_heads);
    const float *qkv = b->layer[l].qkv;
    head_view h;
    h.q = qkv + head * s->head_dim;
    h.k = qkv + shape_q_dim(s) + kv_head * s->head_dim;
    h.v = h.k + shape_kv_dim(s);
    h.prob = b->layer[l].prob + (size_t)head * (size_t)rows * (size_t)rows;
    h.dropped = seq->dropped ? seq->dropped + (l * s->n_kv_heads + kv_head) * seq->n_tokens : NULL;
    h.stride = shape_q_dim(s) + 2 * shape_kv_dim(s);
    return h;
}

/* Logits of one query -> attention weights over keys 0 .. row, zeros up to n_keys. */
static void attend_row(float *prob, int row, int n_keys, float scale, const head_view *h, int age)
{
    for (int j = 0; j <= row; j++) prob[j] *= scale;
    if (h->dropped)
        for (int j = 0; j <= row - age; j++)
            if (h->dropped[j]) prob[j] = -1e9f;
    softmax(prob, row + 1);
    for (int j = row + 1; j < n_keys; j++) prob[j] = 0.0f;
}

static void attention_forward(backprop *b, int l, int rows, const sequence *seq)
{
    const model_shape *s = &b->shape;
    const int d = s->head_dim, q_dim = shape_q_dim(s);
    const float scale = 1.0f / sqrtf((float)d);
    for (int head = 0; head < s->n_heads; head++) {
        head_view h = view_head(b, l, head, rows, seq);
        transpose(h.k, rows, d, h.stride, b->keys_t);
        for (int row = 0; row < rows; row += BLOCK) {
            const int n_keys = row + BLOCK;
            float *prob = h.prob + (size_t)row * (size_t)rows;
            matmul(BLOCK, n_keys, d, by_rows(h.q + row * h.stride, h.stride), b->keys_t, rows, prob,
                   rows, 0);
            for (int i = 0; i < BLOCK; i++)
                attend_row(prob + (size_t)i * (size_t)rows, row + i, n_keys, scale, &h, seq->age);
            matmul(BLOCK, d, n_keys, by_rows(prob, rows), h.v, h.stride,
                   b->layer[l].attention + (size_t)row * (size_t)q_dim + head * d, q_dim, 0);
        }
    }
}

/* dprob [BLOCK][n_keys]: gradient of the weights in, of the logits out. */
static void softmax_backward(float *dprob, const float *prob, int rows, int n_keys, float scale)
{
    for (int i = 0; i < BLOCK; i++) {
        float *dp = dprob + (size_t)i * (size_t)rows;
        const float *p = prob + (size_t)i * (size_t)rows;
        float mean = dot(dp, p, n_keys);
        for (int j = 0; j < n_keys; j++) dp[j] = p[j] * (dp[j] - mean) * scale;
    }
}

static void attention_backward(backprop *b, int l, int rows, const sequence *seq)
{
    const model_shape *s = &b->shape;
    const int d = s->head_dim, q_dim = shape_q_dim(s);
    const float scale = 1.0f / sqrtf((float)d);
    for (int head = 0; head < s->n_heads; head++) {
        head_view h = view_head(b, l, head, rows, seq);
        float *dq = b->dqkv + (h.q - b->layer[l].qkv), *dk = b->dqkv + (h.k - b->layer[l].qkv);
        float *dv = dk + shape_kv_dim(s);
        transpose(h.v, rows, d, h.stride, b->values_t);
        for (int row = 0; row < rows; row += BLOCK) {
            const int n_keys = row + BLOCK;
            const float *prob = h.prob + (size_t)row * (size_t)rows;
            const float *dout = b->dattention + (size_t)row * (size_t)q_dim + head * d;
            matmul(BLOCK, n_keys, d, by_rows(dout, q_dim), b->values_t, rows, b->dprob, rows, 0);
            softmax_backward(b->dprob, prob, rows, n_keys, scale);
            matmul(BLOCK, d, n_keys, by_rows(b->dprob, rows), h.k, h.stride, dq + row * h.stride,
                   h.stride, 0);
            matmul(n_keys, d, BLOCK, by_columns(b->dprob, rows), h.q + row * h.stride, h.stride, dk,
                   h.stride, 1);
            matmul(n_keys, d, BLOCK, by_columns(prob, rows), dout, q_dim, dv, h.stride, 1);
        }
    }
}

static void norm_rows(float *y, float *scale, const float *x, const float *weight, int rows,
                      const model_shape *s)
{
    for (int row = 0; row < rows; row++)
        scale[row] = rmsnorm(y + (size_t)row * (size_t)s->dim, x + (size_t)row * (size_t)s->dim,
                             weight, s->dim, s->norm_eps);
}

/* dx += the gradient through y = x * scale * weight; dweight likewise. */
static void norm_backward(float *dx, float *dweight, const float *dy, const float *x,
                          const float *scale, const float *weight, int rows, int dim)
{
    for (int row = 0; row < rows; row++, dx += dim, dy += dim, x += dim) {
        float r = scale[row], along = 0.0f;
        for (int i = 0; i < dim; i++) {
            along += dy[i] * weight[i] * x[i];
            dweight[i] += dy[i] * x[i] * r;
        }
        along *= r * r * r / (float)dim;
        for (int i = 0; i < dim; i++) dx[i] += dy[i] * weight[i] * r - along * x[i];
    }
}

static void sigmoid_of(float *out, const float *x, int n)
{
    for (int i = 0; i < n; i++) out[i] = x[i] < -80.0f ? 80.0f : -x[i];
    exp_inplace(out, n);
    for (int i = 0; i < n; i++) out[i] = 1.0f / (1.0f + out[i]);
}

static void swiglu_forward(backprop *b, layer_state *a, int rows)
{
    const int n = b->shape.ffn_dim;
    for (int row = 0; row < rows; row++) {
        const float *gate = a->gate_up + (size_t)row * 2 * (size_t)n, *up = gate + n;
        float *hidden = a->hidden + (size_t)row * (size_t)n;
        sigmoid_of(b->sigmoid, gate, n);
        for (int i = 0; i < n; i++) hidden[i] = gate[i] * b->sigmoid[i] * up[i];
    }
}

static void swiglu_backward(backprop *b, const layer_state *a, int rows)
{
    const int n = b->shape.ffn_dim;
    for (int row = 0; row < rows; row++) {
        const float *gate = a->gate_up + (size_t)row * 2 * (size_t)n, *up = gate + n;
        const float *dhidden = b->dhidden + (size_t)row * (size_t)n;
        float *dgate = b->dgate_up + (size_t)row * 2 * (size_t)n, *dup = dgate + n;
        sigmoid_of(b->sigmoid, gate, n);
        for (int i = 0; i < n; i++) {
            float sig = b->sigmoid[i];
            dup[i] = dhidden[i] * gate[i] * sig;
            dgate[i] = dhidden[i] * up[i] * sig * (1.0f + gate[i] * (1.0f - sig));
        }
    }
}

/* ---- a whole sequence ---------------------------------------------------------------------- */

static void forward_layer(backprop *b, int l, const weights *w, const weights *wt, float *x_out,
                          int rows, const sequence *seq)
{
    const model_shape *s = &b->shape;
    layer_state *a = &b->layer[l];
    const int qkv = shape_q_dim(s) + 2 * shape_kv_dim(s);
    const size_t bytes = (size_t)rows * (size_t)s->dim * sizeof(float);
    norm_rows(a->norm1, a->scale1, a->x, w->layer[l].attn_norm, rows, s);
    matmul(rows, qkv, s->dim, by_rows(a->norm1, s->dim), wt->layer[l].qkv, qkv, a->qkv, qkv, 0);
    rotate(b, a->qkv, rows, 1.0f);
    attention_forward(b, l, rows, seq);
    memcpy(a->middle, a->x, bytes);
    matmul(rows, s->dim, shape_q_dim(s), by_rows(a->attention, shape_q_dim(s)),
           wt->layer[l].attn_out, s->dim, a->middle, s->dim, 1);
    norm_rows(a->norm2, a->scale2, a->middle, w->layer[l].ffn_norm, rows, s);
    matmul(rows, 2 * s->ffn_dim, s->dim, by_rows(a->norm2, s->dim), wt->layer[l].gate_up,
           2 * s->ffn_dim, a->gate_up, 2 * s->ffn_dim, 0);
    swiglu_forward(b, a, rows);
    memcpy(x_out, a->middle, bytes);
    matmul(rows, s->dim, s->ffn_dim, by_rows(a->hidden, s->ffn_dim), wt->layer[l].down, s->dim,
           x_out, s->dim, 1);
}

/* dx: gradient of the layer's output in, of its input out. */
static void backward_layer(backprop *b, int l, const weights *w, weights *g, int rows,
                           const sequence *seq)
{
    const model_shape *s = &b->shape;
    layer_state *a = &b->layer[l];
    const int dim = s->dim, ffn = s->ffn_dim, q_dim = shape_q_dim(s);
    const int qkv = q_dim + 2 * shape_kv_dim(s);
    matmul(dim, ffn, rows, by_columns(b->dx, dim), a->hidden, ffn, g->layer[l].down, ffn, 1);
    matmul(rows, ffn, dim, by_rows(b->dx, dim), w->layer[l].down, ffn, b->dhidden, ffn, 0);
    swiglu_backward(b, a, rows);
    matmul(2 * ffn, dim, rows, by_columns(b->dgate_up, 2 * ffn), a->norm2, dim, g->layer[l].gate_up,
           dim, 1);
    matmul(rows, dim, 2 * ffn, by_rows(b->dgate_up, 2 * ffn), w->layer[l].gate_up, dim, b->dnorm,
           dim, 0);
    norm_backward(b->dx, g->layer[l].ffn_norm, b->dnorm, a->middle, a->scale2, w->layer[l].ffn_norm,
                  rows, dim);
    matmul(dim, q_dim, rows, by_columns(b->dx, dim), a->attention, q_dim, g->layer[l].attn_out,
           q_dim, 1);
    matmul(rows, q_dim, dim, by_rows(b->dx, dim), w->layer[l].attn_out, q_dim, b->dattention, q_dim,
           0);
    memset(b->dqkv, 0, (size_t)rows * (size_t)qkv * sizeof *b->dqkv);
    attention_backward(b, l, rows, seq);
    rotate(b, b->dqkv, rows, -1.0f);
    matmul(qkv, dim, rows, by_columns(b->dqkv, qkv), a->norm1, dim, g->layer[l].qkv, dim, 1);
    matmul(rows, dim, qkv, by_rows(b->dqkv, qkv), w->layer[l].qkv, dim, b->dnorm, dim, 0);
    norm_backward(b->dx, g->layer[l].attn_norm, b->dnorm, a->x, a->scale1, w->layer[l].attn_norm,
                  rows, dim);
}

/* Logits -> their gradient, in place, and the sums. Rows that predict nothing get zeros. */
static sequence_result take_loss(backprop *b, const sequence *seq, int rows, float scale)
{
    const int vocabulary = b->shape.vocabulary;
    sequence_result result = { 0 };
    for (int row = 0; row < rows; row++) {
        float *logits = b->logits + (size_t)row * (size_t)vocabulary;
        if (row < seq->first || row + 1 >= seq->n_tokens) {
            memset(logits, 0, (size_t)vocabulary * sizeof *logits);
            continue;
        }
        const int target = seq->tokens[row + 1];
        int best = 0;
        for (int i = 1; i < vocabulary; i++)
            if (logits[i] > logits[best]) best = i;
        result.n_right += best == target;
        result.n_predicted++;
        softmax(logits, vocabulary);
        result.loss -= log((double)logits[target] + 1e-30);
        logits[target] -= 1.0f;
        for (int i = 0; i < vocabulary; i++) logits[i] *= scale;
    }
    return result;
}

static void backward(backprop *b, weights *w, weights *g, const sequence *seq, int rows)
{
    const model_shape *s = &b->shape;
    const int dim = s->dim, vocabulary = s->vocabulary;
    matmul(vocabulary, dim, rows, by_columns(b->logits, vocabulary), b->norm_last, dim,
           g->embedding, dim, 1);
    matmul(rows, dim, vocabulary, by_rows(b->logits, vocabulary), w->embedding, dim, b->dnorm, dim,
           0);
    memset(b->dx, 0, (size_t)rows * (size_t)dim * sizeof *b->dx);
    norm_backward(b->dx, g->final_norm, b->dnorm, b->x_last, b->scale_last, w->final_norm, rows,
                  dim);
    for (int l = s->n_layers - 1; l >= 0; l--) backward_layer(b, l, w, g, rows, seq);
    for (int row = 0; row < seq->n_tokens; row++)
        add_scaled(g->embedding + (size_t)seq->tokens[row] * (size_t)dim, 1.0f,
                   b->dx + (size_t)row * (size_t)dim, dim);
}

sequence_result backprop_run(backprop *b, float *all, float *transposed, const sequence *seq,
                             float scale, float *gradient)
{
    const model_shape *s = &b->shape;
    const int rows = (seq->n_tokens + BLOCK - 1) / BLOCK * BLOCK;
    const size_t dim = (size_t)s->dim;
    weights w = weights_view(s, all), wt = weights_view(s, transposed);
    memset(b->layer[0].x, 0, (size_t)rows * dim * sizeof(float));
    for (int row = 0; row < seq->n_tokens; row++)
        memcpy(b->layer[0].x + (size_t)row * dim, w.embedding + (size_t)seq->tokens[row] * dim,
               dim * sizeof(float));
    for (int l = 0; l < s->n_layers; l++)
        forward_layer(b, l, &w, &wt, l + 1 < s->n_layers ? b->layer[l + 1].x : b->x_last, rows,
                      seq);
    norm_rows(b->norm_last, b->scale_last, b->x_last, w.final_norm, rows, s);
    matmul(rows, s->vocabulary, s->dim, by_rows(b->norm_last, s->dim), wt.embedding, s->vocabulary,
           b->logits, s->vocabulary, 0);
    sequence_result result = take_loss(b, seq, rows, scale);
    if (gradient) {
        weights g = weights_view(s, gradient);
        backward(b, &w, &g, seq, rows);
    }
    return result;
}
