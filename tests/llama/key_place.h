/* key_place.h - the implementation of examples/llama/rkv_llama.h, for a test that says where it
 * finds keys: in host memory, or, as far as it can tell, in a GPU's. Include it in one file of a
 * program, behind bed.h. */
#ifndef KEY_PLACE_H
#define KEY_PLACE_H

#include "llama.h"

typedef enum key_place { IN_PLACE, COPIED, ON_DEVICE } key_place;
static const char *const place_names[] = { "", ", copied", ", as in GPU memory" };

/* Whether buffers are taken for those of a GPU: keys and queries then come by copies. */
static int is_on_device;

static bool is_host(ggml_backend_buffer_t buffer)
{
    return !is_on_device && ggml_backend_buffer_is_host(buffer);
}
#define ggml_backend_buffer_is_host is_host

#define RKV_LLAMA_IMPLEMENTATION
#include "rkv_llama.h"

#endif
