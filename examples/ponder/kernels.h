/* kernels.h - the arithmetic that the model and its trainer share: f32, row-major, one thread.
 * Plain loops of a fixed shape, so that any compiler vectorises them without further flags.
 */
#ifndef KERNELS_H
#define KERNELS_H

#include <stddef.h>

/* A matrix operand: element [row][col] lies at data[row * row_stride + col * col_stride]. A
 * transposed view is the same data with the strides exchanged. */
typedef struct matrix {
    const float *data;
    ptrdiff_t row_stride, col_stride;
} matrix;

/* c[m][n] = a[m][k] * b[k][n], or += with accumulate. b's rows are contiguous, c's are too, and
 * they lie b_stride and c_stride floats apart. Summed over k in order. */
void matmul(int m, int n, int k, matrix a, const float *b, ptrdiff_t b_stride, float *c,
            ptrdiff_t c_stride, int accumulate);

/* dst[cols][rows] = the transpose of src[rows][cols], whose rows lie src_stride floats apart. */
void transpose(const float *src, int rows, int cols, ptrdiff_t src_stride, float *dst);

float dot(const float *a, const float *b, int n);
/* out[n] = the weighted sum of n_rows rows, row_stride floats apart. */
void sum_rows(const float *weights, int n_rows, const float *rows, ptrdiff_t row_stride, int n,
              float *out);
void add_scaled(float *y, float scale, const float *x, int n); /* y += scale * x */

/* In place: x = exp(x - max(x)) / sum. Relative error of the exponential below 3e-7. */
void softmax(float *x, int n);

/* In place: x = exp(x), for x <= 88; below -87 the result is 0. */
void exp_inplace(float *x, int n);

/* y = x * weight / sqrt(mean(x^2) + eps); returns the factor 1 / sqrt(..). y may be x. */
float rmsnorm(float *y, const float *x, const float *weight, int n, float eps);

#endif
