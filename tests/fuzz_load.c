/* A snapshot with changed bytes and a checksum that is right again: rkv_cache_load gives a status,
 * never a wild access, and the cache goes on working: no state without a way out.
 * make fuzz   (build/fuzz/fuzz_load 60) */
#ifndef RKV_PTHREADS
#define RKV_PTHREADS
#endif
#include "fuzz.h"
#include <string.h>

enum { KV_HEADS = 2, QUERY_HEADS = 4, DIM = 3, LAYERS = 2 };

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

static void decode(rkv_cache *cache, input *in, int n)
{
    float data[QUERY_HEADS * DIM];
    for (int i = 0; i < n; i++) {
        for (int l = 0; l < LAYERS; l++) {
            for (int e = 0; e < QUERY_HEADS * DIM; e++)
                data[e] = (float)((e * 7 + l + i * 3 + (int)take(in)) % 11) - 5;
            rkv_tensor k = rkv_tensor_make(data, RKV_F32, KV_HEADS, 1, DIM);
            rkv_tensor q = rkv_tensor_make(data, RKV_F32, QUERY_HEADS, 1, DIM);
            require(rkv_cache_append(cache, l, 1, &k, &k, &q) == RKV_OK, "a cache that is stuck");
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
        const size_t at = chance(in, 2) ? take(in) % 140 : take(in) * 256u + take(in);
        uint8_t *byte = &image[at % size];
        *byte = (uint8_t)(chance(in, 2) ? take(in) : *byte + take(in) % 5 - 2);
    }
    if (!chance(in, 16)) reseal(image, size);
}

/* Reads every row in use, saves, takes back, decodes on. */
static void use(rkv_cache *cache, input *in)
{
    double sum = 0;
    for (int l = 0; l < LAYERS; l++) {
        const rkv_tensor k = rkv_cache_keys(cache, l), v = rkv_cache_values(cache, l);
        require(k.tokens == rkv_cache_rows(cache, l) && rkv_cache_room(cache, l) >= 0, "rows");
        for (int h = 0; h < KV_HEADS; h++)
            for (int t = 0; t < k.tokens; t++)
                sum += (double)((float *)k.data)[h * k.head_stride + t * k.token_stride] +
                       (double)((float *)v.data)[h * v.head_stride + t * v.token_stride];
    }
    require(!(sum > 1e300), "floats do not add up to this");
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
    decode(cache, in, number(in, 0, 12));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input in = { data, size, 1 };
    rkv_cache_config config = RKV_INIT;
    config.compress = rkv_config_default(number(&in, 5, 9));
    config.compress.window = number(&in, 1, 3);
    config.compress.protect = number(&in, 0, 4);
    config.compress.pinned = chance(&in, 2);
    config.compress.scope = (rkv_scope)pick(&in, 3);
    if (chance(&in, 4)) config.compress.lambda = 0;
    config.n_layers = LAYERS;
    config.kv_heads = KV_HEADS;
    config.query_heads = QUERY_HEADS;
    config.head_dim = DIM;
    config.buffer = number(&in, 1, 4);
    config.capacity = config.compress.budget + config.buffer + number(&in, 0, 6);
    rkv_cache *from = new_cache(&config);
    config.capacity = config.compress.budget + config.buffer + number(&in, 0, 6);
    rkv_cache *to = new_cache(&config);
    decode(from, &in, number(&in, 0, 20));
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
    decode(to, &in, number(&in, 0, 3));
    const rkv_status status = rkv_cache_load(to, exact, bytes);
    require(status == RKV_OK || status == RKV_ERROR_ARGUMENT, "rkv_cache_load: another status");
    use(to, &in);
    free(exact);
    free(image);
    rkv_cache_destroy(from);
    rkv_cache_destroy(to);
    return 0;
}
