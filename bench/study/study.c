/* study.c - rkv.h as a shared library for Python, and where the fields of its structs lie, so that
 * the mirrors in library.py are compared with the compiler's own layout. Build: make study */
#define RKV_IMPLEMENTATION
#include "rkv.h"

typedef struct study_field {
    const char *name; /* "struct.field"; "struct" alone: the whole */
    int32_t offset, size;
} study_field;

/* clang-format off */
#define WHOLE(type) { #type, 0, (int32_t)sizeof(type) }
#define FIELD(type, field) \
    { #type "." #field, (int32_t)offsetof(type, field), (int32_t)sizeof(((type *)0)->field) }

static const study_field fields[] = {
    WHOLE(rkv_error), FIELD(rkv_error, rule), FIELD(rkv_error, status), FIELD(rkv_error, layer),
    FIELD(rkv_error, head), FIELD(rkv_error, token),
    WHOLE(rkv_rope), FIELD(rkv_rope, pairing), FIELD(rkv_rope, dims), FIELD(rkv_rope, base),
    FIELD(rkv_rope, frequencies),
    WHOLE(rkv_config), FIELD(rkv_config, budget), FIELD(rkv_config, pinned),
    FIELD(rkv_config, error), FIELD(rkv_config, scope), FIELD(rkv_config, n_threads),
    FIELD(rkv_config, parallel_for), FIELD(rkv_config, pool_handle), FIELD(rkv_config, window),
    FIELD(rkv_config, protect), FIELD(rkv_config, pool), FIELD(rkv_config, mean_pool),
    FIELD(rkv_config, recent), FIELD(rkv_config, lambda), FIELD(rkv_config, threshold),
    FIELD(rkv_config, variant), FIELD(rkv_config, policy), FIELD(rkv_config, votes),
    FIELD(rkv_config, decay), FIELD(rkv_config, seed), FIELD(rkv_config, device_error),
    WHOLE(rkv_tensor), FIELD(rkv_tensor, data), FIELD(rkv_tensor, dtype),
    FIELD(rkv_tensor, heads), FIELD(rkv_tensor, tokens), FIELD(rkv_tensor, dim),
    FIELD(rkv_tensor, head_stride), FIELD(rkv_tensor, token_stride),
    FIELD(rkv_tensor, dim_stride), FIELD(rkv_tensor, element_bytes),
    FIELD(rkv_tensor, block_table), FIELD(rkv_tensor, block_tokens),
    FIELD(rkv_tensor, block_stride), FIELD(rkv_tensor, load), FIELD(rkv_tensor, load_user),
    WHOLE(rkv_layer), FIELD(rkv_layer, keys), FIELD(rkv_layer, values),
    FIELD(rkv_layer, queries), FIELD(rkv_layer, n_tokens), FIELD(rkv_layer, n_kept),
    FIELD(rkv_layer, positions), FIELD(rkv_layer, pins), FIELD(rkv_layer, row_stride),
    FIELD(rkv_layer, scale), FIELD(rkv_layer, softcap), FIELD(rkv_layer, sequence),
    FIELD(rkv_layer, kept), FIELD(rkv_layer, scores), FIELD(rkv_layer, shared_scores),
    FIELD(rkv_layer, bias), FIELD(rkv_layer, state), FIELD(rkv_layer, n_new),
    FIELD(rkv_layer, first_query), FIELD(rkv_layer, rope), FIELD(rkv_layer, query_means)
};
/* clang-format on */

extern const study_field *study_layout(int32_t *n_fields);
const study_field *study_layout(int32_t *n_fields)
{
    *n_fields = (int32_t)(sizeof fields / sizeof fields[0]);
    return fields;
}
