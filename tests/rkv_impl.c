/* The one file of the tests in which rkv.h becomes code. Linked into every test by
 *     make test */
#ifndef RKV_PTHREADS
#define RKV_PTHREADS
#endif
#ifdef _WIN32
#include <windows.h> /* its macros min and max must not get in the way */
#endif
#define RKV_IMPLEMENTATION
#include "rkv.h"
