/* The one file of the tests in which rkv.h becomes code. Linked into every test by
 *     make test */
#ifndef RKV_PTHREADS
#define RKV_PTHREADS
#endif
#define RKV_IMPLEMENTATION
#include "rkv.h"
