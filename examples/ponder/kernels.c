/* kernels.c - see kernels.h. Build: part of `make demo`, `make train` and `make eval`.
 * Every hot loop works on fixed-size local arrays, which compilers keep in vector registers.
 */
#include "kernels.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

/* A tile of c is ROWS x COLS; 8 x 32 floats are 16 registers of 512 bits, or 32 of 256. DEPTH
 * products of a panel of b are taken at a time, from a copy where m is PACK_ROWS or more. */
enum { ROWS = 8, COLS = 32, LANES = 16, DEPTH = 128, PACK_ROWS = 32 };

/* `rows` is a constant wherever this is called, so that the loops unroll. */
static inline void tile_rows(const int rows, int k, matrix a, const float *b, ptrdiff_t b_stride,
                             float *c, ptrdiff_t c_stride, int accumulate)
{
    float sum[ROWS][COLS];
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < COLS; j++) sum[r][j] = accumulate ? c[r * c_stride + j] : 0.0f;
    for (int i = 0; i < k; i++) {
        const float *b_row = b + i * b_stride;
        const float *a_col = a.data + i * a.col_stride;
        for (int r = 0; r < rows; r++) {
            float x = a_col[r * a.row_stride];
            for (int j = 0; j < COLS; j++) sum[r][j] += x * b_row[j];
        }
    }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < COLS; j++) c[r * c_stride + j] = sum[r][j];
}

/* The columns at the right edge, n < COLS of them. */
static void tile_edge(int m, int n, int k, matrix a, const float *b, ptrdiff_t b_stride, float *c,
                      ptrdiff_t c_stride, int accumulate)
{
    for (int r = 0; r < m; r++) {
        float sum[COLS];
        for (int j = 0; j < n; j++) sum[j] = accumulate ? c[r * c_stride + j] : 0.0f;
        for (int i = 0; i < k; i++) {
            float x = a.data[r * a.row_stride + i * a.col_stride];
            const float *b_row = b + i * b_stride;
            for (int j = 0; j < n; j++) sum[j] += x * b_row[j];
        }
        for (int j = 0; j < n; j++) c[r * c_stride + j] = sum[j];
    }
}

/* One panel of COLS columns. Returns how many of the m rows it did: 8, 4, 2 or 1. */
static int panel_rows(int m, int k, matrix a, const float *b, ptrdiff_t b_stride, float *c,
                      ptrdiff_t c_stride, int accumulate)
{
    if (m >= 8)
        tile_rows(8, k, a, b, b_stride, c, c_stride, accumulate);
    else if (m >= 4)
        tile_rows(4, k, a, b, b_stride, c, c_stride, accumulate);
    else if (m >= 2)
        tile_rows(2, k, a, b, b_stride, c, c_stride, accumulate);
    else
        tile_rows(1, k, a, b, b_stride, c, c_stride, accumulate);
    return m >= 8 ? 8 : m >= 4 ? 4 : m >= 2 ? 2 : 1;
}

/* COLS columns of b in one piece: rows that are 512 bytes apart share few places of a cache. */
static void pack(const float *b, ptrdiff_t b_stride, int depth, float *packed)
{
    for (int i = 0; i < depth; i++) memcpy(packed + i * COLS, b + i * b_stride, COLS * sizeof *b);
}

void matmul(int m, int n, int k, matrix a, const float *b, ptrdiff_t b_stride, float *c,
            ptrdiff_t c_stride, int accumulate)
{
    float packed[DEPTH * COLS];
    int col = 0;
    for (; col + COLS <= n; col += COLS)
        for (int first = 0; first < k; first += DEPTH) {
            const int depth = k - first < DEPTH ? k - first : DEPTH;
            const float *part = b + first * b_stride + col;
            ptrdiff_t stride = b_stride;
            if (m >= PACK_ROWS) {
                pack(part, b_stride, depth, packed);
                part = packed;
                stride = COLS;
            }
            for (int row = 0; row < m;) {
                const matrix at = { a.data + row * a.row_stride + first * a.col_stride,
                                    a.row_stride, a.col_stride };
                row += panel_rows(m - row, depth, at, part, stride, c + row * c_stride + col,
                                  c_stride, accumulate || first > 0);
            }
        }
    if (col < n) tile_edge(m, n - col, k, a, b + col, b_stride, c + col, c_stride, accumulate);
}

void transpose(const float *src, int rows, int cols, ptrdiff_t src_stride, float *dst)
{
    for (int row = 0; row < rows; row++)
        for (int col = 0; col < cols; col++)
            dst[(ptrdiff_t)col * rows + row] = src[row * src_stride + col];
}

static float sum_lanes(const float *lane)
{
    const float *a = lane, *b = lane + LANES / 2;
    return (((a[0] + b[0]) + (a[1] + b[1])) + ((a[2] + b[2]) + (a[3] + b[3]))) +
           (((a[4] + b[4]) + (a[5] + b[5])) + ((a[6] + b[6]) + (a[7] + b[7])));
}

/* Eight lanes: for the short rows of attention a wider sum takes longer to add up. */
float dot(const float *a, const float *b, int n)
{
    enum { WIDTH = 8 };
    float lane[WIDTH] = { 0 }, rest = 0.0f;
    int i = 0;
    for (; i + WIDTH <= n; i += WIDTH)
        for (int j = 0; j < WIDTH; j++) lane[j] += a[i + j] * b[i + j];
    for (; i < n; i++) rest += a[i] * b[i];
    return ((lane[0] + lane[1]) + (lane[2] + lane[3])) +
           ((lane[4] + lane[5]) + (lane[6] + lane[7])) + rest;
}

void sum_rows(const float *weights, int n_rows, const float *rows, ptrdiff_t row_stride, int n,
              float *out)
{
    int at = 0;
    for (; at + COLS <= n; at += COLS) {
        float sum[COLS] = { 0 };
        for (int r = 0; r < n_rows; r++)
            for (int j = 0; j < COLS; j++) sum[j] += weights[r] * rows[r * row_stride + at + j];
        memcpy(out + at, sum, sizeof sum);
    }
    for (; at < n; at++) {
        out[at] = 0.0f;
        for (int r = 0; r < n_rows; r++) out[at] += weights[r] * rows[r * row_stride + at];
    }
}

void add_scaled(float *y, float scale, const float *x, int n)
{
    for (int i = 0; i < n; i++) y[i] += scale * x[i];
}

/* e^x = 2^whole * e^rest with rest in [-ln2/2, ln2/2], by a polynomial (Cephes' expf). */
static void exp_lanes(float *x)
{
    const float round = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    int32_t bits[LANES];
    float power[LANES], scale[LANES];
    for (int j = 0; j < LANES; j++) {
        float v = x[j] < -87.0f ? -87.0f : x[j];
        float shifted = v * 1.44269504f + round; /* a float, whatever the machine computes in */
        float whole = shifted - round;
        float r = (v - whole * 0.693359375f) + whole * 2.12194440e-4f;
        float p = 1.9875691500e-4f;
        p = p * r + 1.3981999507e-3f;
        p = p * r + 8.3334519073e-3f;
        p = p * r + 4.1665795894e-2f;
        p = p * r + 1.6666665459e-1f;
        p = p * r + 5.0000001201e-1f;
        power[j] = p * r * r + r + 1.0f;
        bits[j] = ((int32_t)whole + 127) << 23;
    }
    memcpy(scale, bits, sizeof scale);
    for (int j = 0; j < LANES; j++) x[j] = x[j] < -87.0f ? 0.0f : power[j] * scale[j];
}

void exp_inplace(float *x, int n)
{
    int i = 0;
    for (; i + LANES <= n; i += LANES) exp_lanes(x + i);
    if (i < n) {
        float tail[LANES] = { 0 };
        memcpy(tail, x + i, (size_t)(n - i) * sizeof *x);
        exp_lanes(tail);
        memcpy(x + i, tail, (size_t)(n - i) * sizeof *x);
    }
}

static float max_of(const float *x, int n)
{
    float lane[LANES], best = x[0];
    int i = 0;
    for (int j = 0; j < LANES; j++) lane[j] = x[0];
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) lane[j] = x[i + j] > lane[j] ? x[i + j] : lane[j];
    for (int j = 0; j < LANES; j++) best = lane[j] > best ? lane[j] : best;
    for (; i < n; i++) best = x[i] > best ? x[i] : best;
    return best;
}

static float sum_of(const float *x, int n)
{
    float lane[LANES] = { 0 };
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) lane[j] += x[i + j];
    for (int j = 0; i < n; i++, j++) lane[j] += x[i];
    return sum_lanes(lane);
}

void softmax(float *x, int n)
{
    float top = max_of(x, n);
    for (int i = 0; i < n; i++) x[i] -= top;
    exp_inplace(x, n);
    float scale = 1.0f / sum_of(x, n);
    for (int i = 0; i < n; i++) x[i] *= scale;
}

float rmsnorm(float *y, const float *x, const float *weight, int n, float eps)
{
    float scale = 1.0f / sqrtf(dot(x, x, n) / (float)n + eps);
    for (int i = 0; i < n; i++) y[i] = x[i] * scale * weight[i];
    return scale;
}
