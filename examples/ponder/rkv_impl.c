/* rkv_impl.c - the one file of these programs that holds the library's code.
 * Build: part of `make demo` and `make eval`. */
#define RKV_IMPLEMENTATION
#include "rkv.h"
