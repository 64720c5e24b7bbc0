/* The implementation of rkv.h, rkv_cuda.cu and a program that uses them in one translation unit,
 * with and without RKV_STATIC: make test */
#define RKV_CUDA
#define RKV_IMPLEMENTATION
#include "rkv.h"

#include "rkv_cuda.cu"

#include "consumer.c"
