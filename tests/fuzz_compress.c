/* Any configuration, shape, stride and kept list, drawn from bytes, gets a status: never a crash,
 * a wild access or, on an error, a changed cache.   make fuzz   (build/fuzz/fuzz_compress 60) */
#ifndef RKV_PTHREADS
#define RKV_PTHREADS
#endif
#include "fuzz.h"
#include <string.h>

#define MAX_LAYERS 3
#define MAX_BYTES  ((size_t)1 << 16) /* of one buffer; a larger view is checked but not run */

/* ==== Bytes to fields ======================================================================= */

static float real(input *in, float usual)
{
    static const float wild[] = { 0.0f, -1.0f, 1.0f, 2.0f, 1e30f, -1e-30f, 0.5f, 1e-3f };
    float any;
    if (wrong(in, 16)) {
        const uint32_t bits = (uint32_t)take(in) << 24 | (uint32_t)take(in) << 16 | take(in);
        memcpy(&any, &bits, sizeof any); /* NaN and infinity among them */
        return any;
    }
    return wrong(in, 4) ? wild[take(in) % 8] : usual;
}

static int64_t stride(input *in, int64_t usual)
{
    static const int64_t wild[] = { -1, INT64_MIN, INT64_MAX, INT64_MAX / 2, 1, 0, 7, 1 << 30 };
    if (wrong(in, 48)) return wild[take(in) % 8];
    return usual;
}

/* ==== Memory ================================================================================ */

/* Exactly as large as it has to be, so that a sanitizer sees a step too far; NULL: too large. */
static void *exact(double elements, size_t size)
{
    if (!(elements >= 0 && elements * (double)size <= (double)MAX_BYTES)) return NULL;
    return malloc((size_t)elements * size + (elements < 1));
}

static void fill(input *in, void *memory, size_t bytes)
{
    uint32_t state = (uint32_t)take(in) * 2654435761u + 1;
    const int raw = chance(in, 8); /* every bit pattern, NaN and infinity too */
    uint8_t *to = (uint8_t *)memory;
    for (size_t i = 0; i < bytes; i++) {
        state = state * 1664525u + 1013904223u;
        to[i] = (uint8_t)(state >> 24);
        /* 0x3f or 0xbf as the top byte of any of the formats: finite and of a usual size */
        if (!raw && i % 2) to[i] = (uint8_t)(0x3f | (to[i] & 0x80));
    }
}

typedef struct view {
    rkv_tensor tensor;
    int32_t *table;
    size_t bytes;
    void *before; /* what the memory held when the call began */
} view;

/* Blocks in descending order; now and then one is wrong: negative, or listed twice. */
static void make_table(input *in, view *v)
{
    rkv_tensor *t = &v->tensor;
    t->block_tokens = number(in, 1, 8);
    if (t->tokens < 1 || t->block_tokens < 1 || t->tokens > 65536) return;
    const int blocks = (t->tokens - 1) / t->block_tokens + 1;
    v->table = (int32_t *)malloc((size_t)blocks * sizeof *v->table);
    if (!v->table) return;
    for (int b = 0; b < blocks; b++) v->table[b] = blocks - 1 - b;
    if (wrong(in, 8)) v->table[take(in) % (unsigned)blocks] = chance(in, 2) ? -1 : 0;
    t->block_table = v->table;
}

/* Reads every byte of a row; gives it unless the first is 0xee. */
static int read_rows(void *row_bytes, const rkv_rows *rows, float *dst)
{
    const size_t bytes = (size_t)(uintptr_t)row_bytes;
    int r;
    for (r = 0; r < rows->n_rows; r++, dst += rows->dim) {
        const unsigned char *row = (const unsigned char *)rows->data + (size_t)r * rows->stride;
        unsigned sum = 0;
        for (size_t i = 0; i < bytes; i++) sum = sum * 31 + row[i];
        if (*row == 0xee) break;
        for (int i = 0; i < rows->dim; i++) dst[i] = (float)((sum >> i % 16) % 256) - 128.0f;
    }
    return r;
}

static void make_type(input *in, rkv_tensor *t, int is_values)
{
    t->dtype = (rkv_dtype)pick(in, 7);
    if (is_values && chance(in, 4)) t->element_bytes = number(in, 1, 8);
    if (t->dtype != RKV_OPAQUE) return;
    t->element_bytes = number(in, 1, 40);
    if (wrong(in, 8)) return;
    t->load = read_rows;
    t->load_user = (void *)(uintptr_t)(t->element_bytes > 0 ? t->element_bytes : 0);
}

static void make_view(input *in, view *v, int heads, int tokens, int dim, int is_values)
{
    rkv_tensor *t = &v->tensor;
    t->dim = dim;
    make_type(in, t, is_values);
    dim = row_dims(t);
    t->heads = wrong(in, 32) ? number(in, 0, 8) : heads;
    t->tokens = tokens;
    switch (take(in) % (in->tame ? 4 : 5)) {
    case 1: /* [token][head][dim] */
        t->token_stride =
            stride(in, (int64_t)t->heads * dim + (int64_t)take(in) % 3 * element_dims(t));
        t->head_stride = stride(in, dim);
        break;
    case 2: /* transposed; for keys an error */
        if (in->tame && !is_values) break;
        t->token_stride = stride(in, 1);
        t->dim_stride = stride(in, tokens);
        break;
    case 3: make_table(in, v); break;
    case 4: /* anything */
        t->head_stride = stride(in, (int64_t)take(in));
        t->token_stride = stride(in, (int64_t)take(in));
        t->dim_stride = stride(in, (int64_t)take(in) % 3);
        break;
    default: break;
    }
    const size_t element = element_size(t);
    const double elements = extent_elements(t);
    t->data = exact(elements, element);
    if (!t->data) return;
    v->bytes = (size_t)elements * element;
    fill(in, t->data, v->bytes);
    v->before = malloc(v->bytes + 1);
    require(v->before != NULL, "out of memory");
    memcpy(v->before, t->data, v->bytes);
}

static void free_view(view *v)
{
    free(v->tensor.data);
    free(v->table);
    free(v->before);
}

static int unchanged(const view *v)
{
    return !v->before || !memcmp(v->tensor.data, v->before, v->bytes);
}

/* ==== One call ============================================================================== */

typedef struct round {
    rkv_config config;
    rkv_error error;
    rkv_layer layers[MAX_LAYERS], given[MAX_LAYERS];
    view keys[MAX_LAYERS], values[MAX_LAYERS], queries[MAX_LAYERS];
    int n_layers;
    int runnable; /* every buffer that the description names is there, in full */
} round;

static void make_config(input *in, rkv_config *config, rkv_error *error)
{
    static rkv_config (*const presets[])(int) = { rkv_config_default, rkv_config_paper,
                                                  rkv_config_snapkv, rkv_config_streaming };
    *config = presets[take(in) % 4](number(in, in->tame ? 21 : 1, 40));
    if (chance(in, 2)) config->window = number(in, 0, 12);
    if (chance(in, 2)) config->pool = number(in, 0, 9);
    if (chance(in, 2)) config->recent = number(in, 0, 4);
    if (chance(in, 4)) config->pinned = number(in, 0, 8);
    config->lambda = real(in, config->lambda);
    config->threshold = real(in, config->threshold);
    if (chance(in, 2)) config->scope = (rkv_scope)pick(in, 3);
    if (chance(in, 2)) config->variant = (rkv_variant)pick(in, 2);
    if (chance(in, 4)) config->protect = number(in, 0, 16);
    if (chance(in, 8)) config->n_threads = number(in, 0, 4);
    config->error = error;
}

/* Outputs as large as rkv_layer asks for, and now and then none. */
static void make_outputs(input *in, round *r, rkv_layer *layer, int first_of_sequence)
{
    const rkv_config *config = &r->config;
    const int window = config->window ? config->window : 8;
    const double heads = layer->keys.heads;
    const double sets = config->scope == RKV_PER_HEAD ? heads : 1;
    const double scored = layer->n_tokens > window ? (double)layer->n_tokens - window : 0;
    const int shared = config->scope != RKV_PER_HEAD;
    const int owner = config->scope != RKV_PER_SEQUENCE || first_of_sequence;
    if (!chance(in, 4)) {
        layer->scores = (float *)exact(heads * scored, sizeof *layer->scores);
        r->runnable &= layer->scores != NULL;
    }
    if (!owner && !wrong(in, 16)) return;
    if (!chance(in, 4)) {
        const double length = sets * config->budget;
        layer->kept = (int32_t *)exact(length, sizeof *layer->kept);
        r->runnable &= layer->kept != NULL;
        for (int i = 0; layer->kept && i < (int)length; i++)
            layer->kept[i] = wrong(in, 16) ? number(in, 0, 40) : i % config->budget;
    }
    if (shared && !chance(in, 4)) {
        layer->shared_scores = (float *)exact(scored, sizeof *layer->shared_scores);
        r->runnable &= layer->shared_scores != NULL;
        if (layer->shared_scores) fill(in, layer->shared_scores, (size_t)scored * sizeof(float));
    }
    layer->row_stride = chance(in, 2) ? 0 : number(in, in->tame ? 64 : 1, 80);
    const double width = layer->row_stride ? layer->row_stride : layer->keys.tokens;
    if (chance(in, 4)) {
        layer->pins = (uint8_t *)exact(sets * width, 1);
        r->runnable &= layer->pins != NULL;
        for (int i = 0; layer->pins && i < (int)(sets * width); i++)
            layer->pins[i] = (uint8_t)(take(in) < 8);
    }
    if (chance(in, 2)) {
        layer->positions = (int32_t *)exact(sets * width, sizeof *layer->positions);
        r->runnable &= layer->positions != NULL;
        if (layer->positions) fill(in, layer->positions, (size_t)(sets * width) * sizeof(int32_t));
    }
}

static void make_layer(input *in, round *r, int l)
{
    rkv_layer *layer = r->layers + l;
    const int kv_heads = number(in, 1, 3), group = number(in, 1, 4);
    const int dim = chance(in, 2) ? 32 + 32 * (int)(take(in) % 3) : number(in, 1, 40);
    const int n = number(in, 1, 64), spare = n < 65536 ? (int)take(in) % 5 : 0;
    const int capacity = wrong(in, 16) ? number(in, 1, 80) : n + spare;
    const int window = wrong(in, 16) ? number(in, 0, 12) : r->config.window ? r->config.window : 8;
    const double query_heads = (double)kv_heads * group;
    make_view(in, r->keys + l, kv_heads, capacity, dim, 0);
    make_view(in, r->queries + l, query_heads < 4096 && query_heads > -1 ? (int)query_heads : 1,
              window, dim, 0);
    if (!chance(in, 8)) {
        make_view(in, r->values + l, kv_heads, capacity, chance(in, 4) ? number(in, 1, 40) : dim,
                  1);
        r->runnable &= r->values[l].tensor.data != NULL;
    }
    r->runnable &= r->keys[l].tensor.data != NULL && r->queries[l].tensor.data != NULL;
    layer->keys = r->keys[l].tensor;
    layer->values = r->values[l].tensor;
    layer->queries = r->queries[l].tensor;
    layer->n_tokens = n;
    layer->n_kept = wrong(in, 8) ? number(in, 0, 48) : r->config.budget; /* for rkv_compact */
    layer->sequence = (int)take(in) % 2;
    if (chance(in, 4)) layer->scale = real(in, 0.1f);
    if (chance(in, 4)) layer->softcap = real(in, 30.0f);
    make_outputs(in, r, layer, l == 0 || layer->sequence != layer[-1].sequence);
}

static void require_kept(const rkv_config *config, const rkv_layer *layer, int n_before)
{
    const int sets = config->scope == RKV_PER_HEAD ? layer->keys.heads : 1;
    if (!layer->kept) return;
    for (int s = 0; s < sets; s++)
        for (int i = 0; i < layer->n_kept; i++) {
            const int32_t *kept = layer->kept + (size_t)s * (size_t)config->budget + i;
            require(kept[0] >= 0 && kept[0] < n_before, "a kept row is out of range");
            require(i == 0 || kept[0] > kept[-1], "kept rows are not ascending");
        }
}

static void require_outcome(const round *r, rkv_status status, int writes_rows, int selects)
{
    require(status >= RKV_OK && status <= RKV_ERROR_DEVICE, "no status at all");
    require(rkv_status_string(status) != NULL, "a status without a text");
    require(r->error.status == (int32_t)status, "a record of another status");
    require((r->error.rule != NULL) == (status != RKV_OK), "a sentence, or none, without a reason");
    for (int l = 0; l < r->n_layers; l++) {
        const rkv_layer *now = r->layers + l, *given = r->given + l;
        require(unchanged(r->queries + l), "queries were written");
        if (status != RKV_OK || !writes_rows)
            require(unchanged(r->keys + l) && unchanged(r->values + l), "rows were written");
        if (status != RKV_OK)
            require(!memcmp(now, given, sizeof *now), "a failed call changed a layer");
        if (status == RKV_OK && selects) {
            const int n = given->n_tokens, budget = r->config.budget;
            require(now->n_kept == (n < budget ? n : budget), "n_kept");
            require_kept(&r->config, now, n);
        }
        if (status == RKV_OK && writes_rows)
            require(now->n_tokens == now->n_kept, "n_tokens after compaction");
    }
}

typedef rkv_status (*call)(const rkv_backend *, const rkv_config *, rkv_layer *, int, void *,
                           size_t);

static rkv_status run(round *r, const rkv_backend *backend, call function, void *workspace,
                      size_t bytes)
{
    const int rows = function == rkv_compress || function == rkv_compact;
    memcpy(r->given, r->layers, sizeof r->given);
    const rkv_status status =
        function(backend, &r->config, r->layers, r->n_layers, workspace, bytes);
    require_outcome(r, status, rows, function == rkv_compress || function == rkv_select);
    return status;
}

static void run_all(input *in, round *r, const rkv_backend *backend)
{
    size_t bytes = 0;
    const rkv_status sized =
        rkv_workspace_size(backend, &r->config, r->layers, r->n_layers, &bytes);
    if (!r->runnable || sized != RKV_OK || bytes > 16 * MAX_BYTES) return;
    char *workspace = (char *)malloc(bytes + 1);
    require(workspace != NULL, "out of memory");
    if (bytes)
        require(run(r, backend, rkv_compress, workspace, bytes - 1) != RKV_OK,
                "a workspace that is too small was accepted");
    switch (take(in) % 3) {
    case 0: run(r, backend, rkv_compress, workspace + 1, bytes); break;
    case 1: run(r, backend, rkv_compact, workspace + 1, bytes); break; /* with any kept list */
    default:
        if (run(r, backend, rkv_score, workspace + 1, bytes) == RKV_OK &&
            run(r, backend, rkv_select, workspace + 1, bytes) == RKV_OK)
            run(r, backend, rkv_compact, workspace + 1, bytes);
    }
    free(workspace);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input in = { data, size, 0 };
    round r;
    static const char *const paths[] = { "scalar", "avx2", "avx512", "neon" };
    const rkv_backend *backend = rkv_backend_find(paths[take(&in) % 4]);
    in.tame = take(&in) % 2;
    memset(&r, 0, sizeof r);
    r.runnable = 1;
    r.n_layers = 1 + (int)(take(&in) % MAX_LAYERS);
    make_config(&in, &r.config, &r.error);
    for (int l = 0; l < r.n_layers; l++) make_layer(&in, &r, l);
    run_all(&in, &r, backend);
    for (int l = 0; l < r.n_layers; l++) {
        free_view(r.keys + l);
        free_view(r.values + l);
        free_view(r.queries + l);
        free(r.layers[l].kept);
        free(r.layers[l].positions);
        free(r.layers[l].pins);
        free(r.layers[l].scores);
        free(r.layers[l].shared_scores);
    }
    return 0;
}
