/* A snapshot with changed bytes and a checksum that is right again, of a cache of any type and
 * policy: rkv_cache_load gives a status, never a wild access, and the cache goes on working: no
 * state without a way out.
 * make fuzz   (build/fuzz/fuzz_load 60) */
#ifndef RKV_PTHREADS
#define RKV_PTHREADS
#endif
#include "fuzz.h"
#include <string.h>

enum { KV_HEADS = 2, QUERY_HEADS = 4, LAYERS = 2, MAX_ROW_BYTES = 32 * 4 };

static rkv_cache *new_cache(const rkv_cache_config *config)
{
    rkv_cache *cache = NULL;
    require(rkv_cache_create(&cache, config) == RKV_OK, "rkv_cache_create failed");
    return cache;
}

/* A round; if it finds a NaN, that token goes. */
static void step(rkv_cache *cache)
{
    const rkv_status status = rkv_cache_step(cache, NULL);
    if (status == RKV_OK) return;
    require(status == RKV_ERROR_NONFINITE, "a round failed for no reason");
    const int position = rkv_cache_error_position(cache);
    require(position >= 0, "a NaN of no token");
    require(rkv_cache_truncate(cache, position) == RKV_OK, "a NaN that cannot be forgotten");
}

/* Numbers between -2 and -1 or 1 and 2, and small multiples of a scale. */
static void fill_row(rkv_dtype dtype, int dim, unsigned seed, uint8_t *row)
{
    for (int i = 0; i < dim; i++) {
        const unsigned bits = (seed + (unsigned)i * 7u) * 2654435761u >> 16;
        const uint16_t half =
            (uint16_t)(dtype == RKV_BF16 ? 0x3f80u | (bits & 0x807fu) : 0x3c00u | (bits & 0x83ffu));
        const float number = (float)(bits % 11u) - 5;
        switch (dtype) {
        case RKV_F32: memcpy(row + 4 * i, &number, 4); break;
        case RKV_F16:
        case RKV_BF16: memcpy(row + 2 * i, &half, 2); break;
        case RKV_F8_E4M3: row[i] = (uint8_t)(0x38u | (bits & 0x87u)); break;
        case RKV_F8_E5M2: row[i] = (uint8_t)(0x3cu | (bits & 0x83u)); break;
        default: /* q8_0: one block */
            row[2 + i] = (uint8_t)(bits % 23u);
            if (i == 0) memcpy(row, &half, 2);
        }
    }
}

/* One token's rows of all heads. */
static rkv_tensor rows_of(rkv_dtype dtype, int heads, int dim, unsigned seed, uint8_t *data)
{
    rkv_tensor rows = rkv_tensor_make(data, dtype, heads, 1, dim);
    const size_t bytes = element_size(&rows) * (size_t)(dim / element_dims(&rows));
    for (int h = 0; h < heads; h++)
        fill_row(dtype, dim, seed + 31u * (unsigned)h, data + bytes * (size_t)h);
    return rows;
}

static void decode(rkv_cache *cache, const rkv_cache_config *config, input *in, int n)
{
    const rkv_dtype query_dtype = config->dtype > RKV_BF16 ? RKV_F32 : config->dtype;
    uint8_t data[3][QUERY_HEADS * MAX_ROW_BYTES];
    for (int i = 0; i < n; i++) {
        for (int l = 0; l < LAYERS; l++) {
            const unsigned seed = (unsigned)(l + i * 3) + take(in);
            rkv_tensor k = rows_of(config->dtype, KV_HEADS, config->head_dim, seed, data[0]);
            rkv_tensor v = rows_of(config->dtype, KV_HEADS, config->head_dim, seed + 1, data[1]);
            rkv_tensor q = rows_of(query_dtype, QUERY_HEADS, config->head_dim, seed + 2, data[2]);
            require(rkv_cache_append(cache, l, 1, &k, &v, &q) == RKV_OK, "a cache that is stuck");
        }
        step(cache);
    }
}

/* The checksum of a snapshot, as room 22 of rkv.h describes it. */
static uint64_t mix(uint64_t sum, uint64_t word)
{
    sum ^= word;
    return (sum << 29 | sum >> 35) * UINT64_C(0x9e3779b97f4a7c15);
}

static void reseal(uint8_t *image, size_t size)
{
    uint64_t sum[4] = { 1, 2, 3, 4 }, total;
    size_t at = 0;
    if (size < 8) return;
    total = size -= 8;
    for (; size - at >= 32; at += 8) {
        for (int word = 0; word < 4; word++, at += 8) {
            uint64_t value = 0;
            for (int i = 0; i < 8; i++) value |= (uint64_t)image[at + (size_t)i] << (8 * i);
            sum[word] = mix(sum[word], value);
        }
        at -= 8;
    }
    for (int i = 0; i < 4; i++) total = mix(total, sum[i]);
    for (; at < size; at++) total = mix(total, image[at]);
    for (int i = 0; i < 8; i++) image[size + (size_t)i] = (uint8_t)(total >> (8 * i));
}

static void change(input *in, uint8_t *image, size_t size)
{
    for (unsigned i = take(in) % 8; i > 0; i--) {
        const size_t at = chance(in, 2) ? take(in) : take(in) * 256u + take(in);
        uint8_t *byte = &image[at % size];
        *byte = (uint8_t)(chance(in, 2) ? take(in) : *byte + take(in) % 5 - 2);
    }
    if (!chance(in, 16)) reseal(image, size);
}

static unsigned sum_of_row(const rkv_tensor *rows, int head, int token)
{
    const size_t element = element_size(rows), dims = (size_t)element_dims(rows);
    const size_t at = (size_t)(head * rows->head_stride + token * rows->token_stride);
    const uint8_t *row = (const uint8_t *)rows->data + at / dims * element;
    unsigned sum = 0;
    for (size_t i = 0; i < (size_t)rows->dim / dims * element; i++) sum += row[i];
    return sum;
}

/* Reads every row in use, saves, takes back, decodes on. */
static void use(rkv_cache *cache, const rkv_cache_config *config, input *in)
{
    unsigned sum = 0;
    for (int l = 0; l < LAYERS; l++) {
        const rkv_tensor k = rkv_cache_keys(cache, l), v = rkv_cache_values(cache, l);
        require(k.tokens == rkv_cache_rows(cache, l) && rkv_cache_room(cache, l) >= 0, "rows");
        for (int h = 0; h < KV_HEADS; h++)
            for (int t = 0; t < k.tokens; t++) sum += sum_of_row(&k, h, t) + sum_of_row(&v, h, t);
    }
    require(sum < UINT_MAX, "so few bytes do not add up to this");
    const size_t size = rkv_cache_save_size(cache);
    uint8_t *image = (uint8_t *)malloc(size);
    require(image && rkv_cache_save(cache, image, size) == RKV_OK, "rkv_cache_save failed");
    free(image);
    /* A forged snapshot may hold layers of different lengths: the shortest decides. */
    int position = rkv_cache_position(cache, 0);
    for (int l = 1; l < LAYERS; l++)
        if (rkv_cache_position(cache, l) < position) position = rkv_cache_position(cache, l);
    if (chance(in, 2)) position -= number(in, 0, 4);
    if (rkv_cache_truncate(cache, position) != RKV_OK)
        require(rkv_cache_truncate(cache, 0) == RKV_OK, "a cache that cannot be emptied");
    for (int l = 1; l < LAYERS; l++)
        if (rkv_cache_position(cache, l) != rkv_cache_position(cache, 0))
            (void)rkv_cache_truncate(cache, 0);
    (void)rkv_cache_error_position(cache);
    step(cache);
    decode(cache, config, in, number(in, 0, 12));
}

/* A policy with some of its options, its votes also beyond the window and what is new. */
static rkv_config policy_of(input *in, int budget)
{
    static rkv_config (*const presets[])(
        int budget) = { rkv_config_default,     rkv_config_memory_traces, rkv_config_memory_prose,
                        rkv_config_h2o,         rkv_config_triattention,  rkv_config_wide,
                        rkv_config_memory_wide, rkv_config_triattention };
    const unsigned which = pick(in, 10);
    rkv_config config = which < 8 ? presets[which](budget) : rkv_config_random(budget, which);
    if (which == 9) config.policy = RKV_POLICY_OWN_SCORE;
    config.window = number(in, 1, 3);
    config.protect = number(in, 0, 4);
    config.pinned = chance(in, 2);
    config.votes = number(in, 0, config.policy == RKV_POLICY_RKV ? 5 : 9);
    config.scope = (rkv_scope)pick(in, 3);
    if (chance(in, 4)) config.lambda = 0;
    return config;
}

/* The tokens of all queries that vote must have a row in every round. */
static int least_buffer(const rkv_config *config)
{
    const int tail = config->protect > config->window ? config->protect : config->window;
    return config->policy == RKV_POLICY_RKV && config->votes > tail ? config->votes - tail : 1;
}

static rkv_rope rope_of(input *in)
{
    static const float frequencies[] = { 0.5f };
    rkv_rope rope = RKV_INIT;
    rope.pairing = (rkv_pairing)(RKV_ROPE_NONE + take(in) % 3);
    rope.dims = 2;
    if (chance(in, 2)) rope.frequencies = frequencies;
    return rope;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input in = { data, size, 1 };
    rkv_cache_config config = RKV_INIT;
    config.compress = policy_of(&in, number(&in, 5, 9));
    config.rope = rope_of(&in);
    config.dtype = (rkv_dtype)pick(&in, 7);
    if (config.dtype == RKV_OPAQUE) config.dtype = RKV_F32;
    config.n_layers = LAYERS;
    config.kv_heads = KV_HEADS;
    config.query_heads = QUERY_HEADS;
    config.head_dim = config.dtype == RKV_Q8_0 ? 32 : 3;
    config.buffer = number(&in, least_buffer(&config.compress), 4);
    config.capacity = config.compress.budget + config.buffer + number(&in, 0, 6);
    rkv_cache *from = new_cache(&config);
    config.capacity = config.compress.budget + config.buffer + number(&in, 0, 6);
    rkv_cache *to = new_cache(&config);
    decode(from, &config, &in, number(&in, 0, 20));
    size_t bytes = rkv_cache_save_size(from);
    uint8_t *image = (uint8_t *)calloc(1, bytes + 64);
    require(image && rkv_cache_save(from, image, bytes) == RKV_OK, "rkv_cache_save failed");
    if (chance(&in, 4))
        bytes += take(&in) % 64;
    else if (chance(&in, 4))
        bytes -= take(&in) % 64;
    change(&in, image, bytes);
    uint8_t *exact = (uint8_t *)malloc(bytes);
    require(exact != NULL, "out of memory");
    memcpy(exact, image, bytes);
    decode(to, &config, &in, number(&in, 0, 3));
    const rkv_status status = rkv_cache_load(to, exact, bytes);
    require(status == RKV_OK || status == RKV_ERROR_ARGUMENT, "rkv_cache_load: another status");
    use(to, &config, &in);
    free(exact);
    free(image);
    rkv_cache_destroy(from);
    rkv_cache_destroy(to);
    return 0;
}
