/* rkv_impl.c - the code of rkv.h and rkv_llama.h for rkv-llama. Build: part of `make llama`. */
#define RKV_IMPLEMENTATION
#define RKV_LLAMA_IMPLEMENTATION
#include "rkv_llama.h"
