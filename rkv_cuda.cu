/* rkv_cuda.cu - rkv.h on NVIDIA GPUs: the backend "cuda".
 * SPDX-License-Identifier: MIT OR Unlicense                  (both texts are at the end of rkv.h)
 *
 *  1 Title, map                                          14 Scoring         keys to scores
 *  2 Usage           what an integrator needs to know    15 Similar keys    the search for them
 *  3 Config macros                                       16 Other policies  memory, H2O, ...
 *  ---- callers need read no further ----                17 Selection       scores to kept set
 *  7 Portability     CUDA versions and architectures     18 Compaction      moves kept rows
 *  8 Helpers         element types, views                20 Checks          of data on the device
 *  9 Tiles           64 rows in shared memory            22 Memory          for rkv_cache
 * 13 Plans           describes layers to the device      19 Host side       launches, the table
 * (The numbers are those of rkv.h. Room 19 comes last because it uses all others.)
 *
 * ==== 2. Usage ==============================================================================
 * Compile this file with nvcc: C++14 or later, sm_70 or later, without --use_fast_math, which
 * rounds differently from the CPU. Link the object and the CUDA runtime. Instead you may include
 * this file behind rkv.h in the file that defines RKV_IMPLEMENTATION; with RKV_STATIC you must.
 * In C or C++:
 *
 *     #define RKV_CUDA                                     declares the two functions
 *     #include "rkv.h"
 *
 *     status = rkv_cuda_register(stream, &error);          once, at start-up
 *     cuda = rkv_backend_find("cuda");                     NULL if that failed: check
 *     config.error = &error;                               host memory: what a call refuses
 *     config.device_error = record;                        device memory: what the data breaks
 *     status = rkv_compress(cuda, &config, layers, n_layers, workspace, bytes);
 *
 * Memory     Keys, values, queries, block tables, positions, pins, kept lists, scores, biases, the
 *            state, query means, rope.frequencies, the workspace and *config.device_error are
 *            device memory. config, *config.error and the layers array are host memory, read
 *            during the call only.
 * Streams    `stream` is a cudaStream_t; every call works on it, on the current device. For more
 *            streams make more tables: rkv_cuda_backend fills one in, you own it, and its
 *            `context` is the stream.
 * Graphs     rkv_compress and its stages allocate nothing, synchronise nothing and read nothing
 *            back, so a CUDA graph can capture them. A replay works on what the buffers hold
 *            then, with the sizes and pointers of the capture. All kernels are loaded when the
 *            table is made; no warm-up call is needed. n_new and first_query are sizes too: a
 *            graph replays one state of the ring of queries.
 * Launches   R-KV: at most 8 for 28 layers of one shape (250 layers with CUDA 12.1 and later), one
 *            more for every further 28 (250) and for every change of shape, one if there are block
 *            tables, pins or biases, three for each further type of keys (all that are converted:
 *            one). With biases, a first_query that is not 0, or more votes than the window: one
 *            more for every 32 layers of one shape. Other policies: at most 10 for 28 such layers.
 * Workspace  24 + 4 * votes bytes per token and KV head; MEMORY and H2O: 28 + votes * G / 8, where
 *            G are the query heads per KV head; TRIATTENTION: 24 + 4 * G; others: 24.
 * Counts     n_tokens, n_kept and n_new are set when the call returns, before the device has seen
 *            the data. After a fault in the data set n_tokens and n_new back: no row has moved, and
 *            the state is as it was.
 * Errors     What the host can see is refused at once, and *config.error says why. A fault in the
 *            data (a NaN, an invalid block table or kept list, too many pins) leaves every row,
 *            position, pin, bias, state, score and list as it was; the record appears in
 *            *config.device_error when the stream has reached that point. Copy it to the host and
 *            pass it to rkv_explain: its `rule` is a pointer to text in host memory. Of several
 *            faults it is the one that the CPU reports.
 *            The record is sticky: while it holds a fault, rkv_select and rkv_compact do nothing,
 *            so all three stages can be queued without a look in between. rkv_score and
 *            rkv_compress reset it. A caller that calls neither sets it to zeros itself, at first
 *            and after every fault. rkv_query_means_update writes a fault of its own there if
 *            there is none yet, and leaves the means as they were.
 * Precision  The same bits in every run: sums whose order is open are integer sums. Similar keys
 *            are decided in the CPU's order of additions, so both find the same ones; scores
 *            agree within 1e-5 of the largest (f16 and bf16 with logits in the hundreds: 2e-5,
 *            since tensor cores truncate when they add). What MEMORY and H2O carry agrees within
 *            1e-5 too; a rank is exact for what is carried, so where two rows are carried as
 *            nearly equal, the ranks of MEMORY may be the other way round than on the CPU.
 * Cache      rkv_cache works on this backend. A block table with a negative entry, in views given
 *            to rkv_cache_append, is not reported: those rows are not copied.
 *
 * Types      Keys and queries of one type, f32, f16 or bf16, are the fast case. fp8 and q8_0, and
 *            queries of another type than the keys, are converted to f32 on the way into shared
 *            memory, and multiplied without tensor cores.
 *
 * What it does not support (RKV_ERROR_UNSUPPORTED): row loaders, that is, keys or queries to read
 * that are RKV_OPAQUE; keys or queries to score of one type, f32, f16 or bf16, that are not aligned
 * to their element size; rows of 2 GB and more; 2^30 queries per KV head; 2^26 KV heads in a call.
 * Values may lie anywhere.
 *
 * ==== 3. Config macros ======================================================================
 * RKV_CUDA_PARAMETER_BYTES  the size of kernel parameters: 32764 from CUDA 12.1 on, which needs a
 *                           driver of that age, else 4096. Define it as 4096 for older drivers.
 */
#ifndef RKV_CUDA
#define RKV_CUDA
#endif
#include "rkv.h"

#if defined(RKV_STATIC) && !defined(RKV_IMPLEMENTED)
#error "RKV_STATIC: include rkv_cuda.cu behind rkv.h, in the file that defines RKV_IMPLEMENTATION"
#endif

#include <float.h>
#include <limits.h>
#include <math.h>
#include <string.h>

/* ---- callers need read no further ---------------------------------------------------------- */

/* ==== 7. Portability ========================================================================
 * The kernels use little of CUDA, so that tests/cuda/shim.h can run them on the host. It defines
 * RKV_CUDA_SHIM, the built-ins used here, shim_launch, shim_shared, shim_load_matrices, shim_mma,
 * shim_start_copy and shim_copies_done. */
#ifndef RKV_CUDA_SHIM
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define RKVI_TENSOR_CORES 1
#define RKVI_ASYNC_COPIES 1
#else
#define RKVI_TENSOR_CORES 0
#define RKVI_ASYNC_COPIES 0
#endif
/* Threads that every SM of these architectures can hold; __launch_bounds__ must not ask for
 * more. */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 750
#define RKVI_SM_THREADS 1024
#else
#define RKVI_SM_THREADS 1536
#endif
/* Blocks with tiles (38 KB of shared memory each) that an SM holds: 5 in the 228 KB of Hopper and
 * of Blackwell for data centers, 4 in Ampere's 164 KB, 2 in the 100 KB of most others. The compiler
 * limits the registers of a thread accordingly. */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200
#define RKVI_TILE_BLOCKS 5
#elif defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 870)
#define RKVI_TILE_BLOCKS 4
#else
#define RKVI_TILE_BLOCKS 2
#endif
#ifndef RKV_CUDA_PARAMETER_BYTES
#if CUDART_VERSION >= 12010
#define RKV_CUDA_PARAMETER_BYTES 32764
#else
#define RKV_CUDA_PARAMETER_BYTES 4096
#endif
#endif

/* Such parameters are read in place; otherwise each thread would make a copy. */
#if CUDART_VERSION >= 11070
#define RKVI_GRID_CONSTANT __grid_constant__
#else
#define RKVI_GRID_CONSTANT
#endif

#else
#define RKVI_TENSOR_CORES 1
#define RKVI_ASYNC_COPIES 1
#define RKVI_TILE_BLOCKS  1
#define RKVI_GRID_CONSTANT
#define RKV_CUDA_PARAMETER_BYTES 5120 /* few, so that the tests fill them */
#endif

/* A namespace, so that one file can hold this and the implementation of rkv.h. */
namespace rkvi_cuda
{

static __device__ __forceinline__ char *rkvi_shared_memory()
{
#ifndef RKV_CUDA_SHIM
    extern __shared__ __align__(16) char rkvi_shared_bytes[];
    return rkvi_shared_bytes;
#else
    return static_cast<char *>(shim_shared());
#endif
}

/* Clears CUDA's record of an error, since the status reports it: the caller's next look at
 * cudaGetLastError must not find it again. */
static cudaError_t rkvi_clear(cudaError_t error)
{
    if (error != cudaSuccess) (void)cudaGetLastError();
    return error;
}
static rkv_status rkvi_status_of(cudaError_t error)
{
    return rkvi_clear(error) == cudaSuccess ? RKV_OK : RKV_ERROR_DEVICE;
}

template <typename P>
static cudaError_t rkvi_launch(void (*kernel)(P), int64_t n_items, int threads, size_t shared_bytes,
                               cudaStream_t stream, const P &parameters)
{
    const int64_t max_blocks = INT32_MAX; /* kernels loop over their items */
    if (n_items == 0) return cudaSuccess;
    const int blocks = static_cast<int>(n_items < max_blocks ? n_items : max_blocks);
#ifndef RKV_CUDA_SHIM
    void *arguments[] = { const_cast<P *>(&parameters) };
    const cudaError_t error = cudaLaunchKernel(
        reinterpret_cast<const void *>(kernel), dim3(static_cast<unsigned>(blocks)),
        dim3(static_cast<unsigned>(threads)), arguments, shared_bytes, stream);
#else
    const cudaError_t error =
        shim_launch(kernel, blocks, threads, shared_bytes, stream, parameters);
#endif
    return rkvi_clear(error);
}

/* ==== 8. Helpers ============================================================================
 * Element types, fixed-point sums, views. */

struct rkvi_f16 {
    uint16_t bits;
};
struct rkvi_bf16 {
    uint16_t bits;
};

static __device__ __forceinline__ float rkvi_to_float(float x)
{
    return x;
}
static __device__ __forceinline__ float rkvi_to_float(rkvi_f16 x)
{
    return __half2float(__ushort_as_half(x.bits));
}
static __device__ __forceinline__ float rkvi_to_float(rkvi_bf16 x)
{
    return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}

/* Keys of a quantised type, or of another than the queries: rows in memory are of the type that
 * the loader is told, numbers in a tile are float. */
struct rkvi_any {
    float value;
};
static __device__ __forceinline__ float rkvi_to_float(rkvi_any x)
{
    return x.value;
}

/* e4m3fn as f16 with a smaller exponent bias: 7 instead of 15. */
static __device__ __forceinline__ float rkvi_from_f8_e4m3(unsigned code)
{
    const unsigned sign = (code & 0x80u) << 8, magnitude = code & 0x7fu;
    const unsigned half = sign | (magnitude == 0x7fu ? 0x7e00u : magnitude << 7);
    return 256.0f * rkvi_to_float(rkvi_f16{ static_cast<uint16_t>(half) });
}
/* Two bytes at any address; the machine is little-endian. */
static __device__ __forceinline__ uint16_t rkvi_load_half(const char *p)
{
    const unsigned low = *reinterpret_cast<const uint8_t *>(p);
    return static_cast<uint16_t>(low | *reinterpret_cast<const uint8_t *>(p + 1) * 256u);
}
/* Number i of a row of type `dtype` at any address. Blocks of q8_0 are 34 bytes: an f16 scale and
 * 32 int8. */
static __device__ float rkvi_load_any(const char *row, int i, int dtype)
{
    const uint8_t *const bytes = reinterpret_cast<const uint8_t *>(row);
    switch (dtype) {
    case RKV_F32: {
        const char *const p = row + 4 * static_cast<int64_t>(i);
        return __uint_as_float(rkvi_load_half(p) | static_cast<uint32_t>(rkvi_load_half(p + 2))
                                                       << 16);
    }
    case RKV_F16:
        return rkvi_to_float(rkvi_f16{ rkvi_load_half(row + 2 * static_cast<int64_t>(i)) });
    case RKV_BF16:
        return rkvi_to_float(rkvi_bf16{ rkvi_load_half(row + 2 * static_cast<int64_t>(i)) });
    case RKV_F8_E4M3: return rkvi_from_f8_e4m3(bytes[i]);
    case RKV_F8_E5M2: return rkvi_to_float(rkvi_f16{ static_cast<uint16_t>(bytes[i] * 256u) });
    default: {
        const char *const block = row + static_cast<int64_t>(i / 32) * 34;
        const int number = static_cast<int8_t>(block[2 + i % 32]);
        return static_cast<float>(number) * rkvi_to_float(rkvi_f16{ rkvi_load_half(block) });
    }
    }
}

template <typename T> struct rkvi_dtype_of;
template <> struct rkvi_dtype_of<rkvi_any> {
    enum { value = RKV_OPAQUE };
};
template <> struct rkvi_dtype_of<float> {
    enum { value = RKV_F32 };
};
template <> struct rkvi_dtype_of<rkvi_f16> {
    enum { value = RKV_F16 };
};
template <> struct rkvi_dtype_of<rkvi_bf16> {
    enum { value = RKV_BF16 };
};

/* clang-format off */
enum {
    RKVI_TILE = 64,          /* rows of a tile: keys, or queries, or columns of the scan        */
    RKVI_TILE_THREADS = 128, /* 4 warps of 16 rows                                              */
    RKVI_CHUNK_BYTES = 256,  /* bytes of a row that are in shared memory at a time              */
    RKVI_PITCH = RKVI_CHUNK_BYTES + 16, /* bytes from row to row of a tile: 4 banks apart       */
    RKVI_DOTS_PITCH = RKVI_PITCH / 4,   /* floats from row to row of 64 x 64 dots in a tile: the
                                           accumulators of a warp are stored to 32 banks        */
    RKVI_FAR_BLOCKS = RKVI_TILE_BLOCKS < 4 ? RKVI_TILE_BLOCKS : 4, /* the far scan needs more
                                           registers                                            */
    RKVI_FIRST_COLUMNS = 16, /* columns of the scan's first step; most rows need no more        */
    RKVI_NEAR_COLUMNS = RKVI_FIRST_COLUMNS + 3 * RKVI_TILE, /* columns of the near scan         */
    RKVI_FEW_ROWS = 12,      /* up to so many rows of a head are scanned far one by one         */
    RKVI_TRUSTED_DIMS = 256, /* up to here dots from tensor cores can stand for exact ones      */
    RKVI_HEAD_THREADS = 512, /* kernels with one block per head                                 */
    RKVI_HEAD_WARPS = RKVI_HEAD_THREADS / 32,
    RKVI_DIGIT_BITS = 11,    /* selection compares ranks by digits of so many bits              */
    RKVI_BINS = 1 << RKVI_DIGIT_BITS,
    RKVI_MOVE_THREADS = 256,
    RKVI_MOVE_UNROLL = 8,    /* loads in flight per thread: an SM's two blocks then have more in
                                flight than three blocks with 4 each                            */
    RKVI_SLICE_UNITS = 8     /* units of a row that one block moves: 128 bytes with full access */
};
/* clang-format on */

/* Rows of one head: byte strides, the head's offset applied. */
struct rkvi_view {
    char *data;
    int64_t token_stride, block_stride;
    const int32_t *table;
    int block_tokens;
};
static __device__ __forceinline__ char *rkvi_row(const rkvi_view &view, int token)
{
    if (!view.table) return view.data + token * view.token_stride;
    const int block = token / view.block_tokens;
    return view.data + view.table[block] * view.block_stride +
           (token - block * view.block_tokens) * view.token_stride;
}

/* Fixed point with 32 fractional bits, truncated: an integer sum does not depend on its order. */
static __device__ __forceinline__ long long rkvi_to_fixed(float value)
{
    return static_cast<long long>(value * 4294967296.0f);
}
static __device__ __forceinline__ void rkvi_add_fixed(long long *sum, long long fixed)
{
#ifndef RKV_CUDA_SHIM
    /* As atomicAdd, but that would first test whether the address, which comes from a descriptor,
     * lies in shared memory, and would return the old value. */
    asm volatile("red.global.add.u64 [%0], %1;" ::"l"(__cvta_generic_to_global(sum)), "l"(fixed));
#else
    atomicAdd(sum, fixed);
#endif
}
static __device__ __forceinline__ double rkvi_from_fixed(long long sum)
{
    return static_cast<double>(sum) * (1.0 / 4294967296.0);
}

static __device__ __forceinline__ float rkvi_cosine(float dot, float inv_a, float inv_b)
{
    return __fmul_rn(dot, __fmul_rn(inv_a, inv_b));
}

/* ==== 9. Tiles ==============================================================================
 * 64 rows, a chunk of 256 bytes each, in shared memory; dot products of two tiles; exact dots.
 * Loops over the rows of a tile run once at most, so they are not unrolled. */

struct rkvi_tiles {
    const char *a_rows[RKVI_TILE], *b_rows[RKVI_TILE]; /* beyond the last row: any other row    */
    unsigned long long candidates[RKVI_TILE];          /* scan: a bit per column                */
    float first[RKVI_TILE]; /* scan: cosine of the first candidate; -INFINITY: not known         */
    float a_inv[RKVI_TILE], b_inv[RKVI_TILE];
    int a_token[RKVI_TILE], need[RKVI_TILE];
    alignas(16) float sum[RKVI_CHUNK_BYTES / 2]; /* scan: a chunk of the sum of the unit keys */
    char a[RKVI_TILE * RKVI_PITCH], b[RKVI_TILE * RKVI_PITCH];
};

template <typename T> static __device__ constexpr int rkvi_chunk_dims()
{
    return RKVI_CHUNK_BYTES / static_cast<int>(sizeof(T));
}
template <typename T> static __device__ __forceinline__ int rkvi_chunks(int head_dim)
{
    return (head_dim + rkvi_chunk_dims<T>() - 1) / rkvi_chunk_dims<T>();
}
/* Dims of a chunk; below, padded to a multiple of 16. */
template <typename T> static __device__ __forceinline__ int rkvi_dims(int head_dim, int chunk)
{
    const int left = head_dim - chunk * rkvi_chunk_dims<T>();
    return left < rkvi_chunk_dims<T>() ? left : rkvi_chunk_dims<T>();
}
static __device__ __forceinline__ int rkvi_padded(int dims)
{
    return (dims + 15) & ~15;
}

enum { RKVI_LOAD_UNROLL = 4 };

/* Copies pieces of sizeof(V) bytes into a tile: zeros where from[u] is NULL, nothing where to[u] is
 * negative. */
template <typename V>
static __device__ __forceinline__ void rkvi_copy_now(char *tile, const int *to,
                                                     const char *const *from)
{
    V value[RKVI_LOAD_UNROLL]; /* loads in flight */
#pragma unroll
    for (int u = 0; u < RKVI_LOAD_UNROLL; u++) {
        memset(&value[u], 0, sizeof(V));
        if (from[u]) value[u] = __ldg(reinterpret_cast<const V *>(from[u]));
    }
#pragma unroll
    for (int u = 0; u < RKVI_LOAD_UNROLL; u++)
        if (to[u] >= 0) *reinterpret_cast<V *>(tile + to[u]) = value[u];
}
#if RKVI_ASYNC_COPIES
/* Starts a copy to shared memory, complete after rkvi_copies_done. If not `is_there`, it writes
 * zeros and does not read `from`. */
template <typename V>
static __device__ __forceinline__ void rkvi_start_copy(char *to, const char *from, bool is_there)
{
#ifndef RKV_CUDA_SHIM
    const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
    const size_t source = __cvta_generic_to_global(from);
    const int bytes = is_there ? static_cast<int>(sizeof(V)) : 0; /* the rest becomes zero */
    if (sizeof(V) == 16) /* only this size can bypass the L1 */
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(source),
                     "r"(bytes));
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(at), "l"(source),
                     "n"(static_cast<int>(sizeof(V))), "r"(bytes));
#else
    shim_start_copy<V>(to, from, is_there);
#endif
}
static __device__ __forceinline__ void rkvi_copies_done()
{
#ifndef RKV_CUDA_SHIM
    asm volatile("cp.async.wait_all;" ::: "memory");
#else
    shim_copies_done();
#endif
}
/* These copies need no register, so a thread can have any number in flight. */
template <typename V>
static __device__ __forceinline__ void rkvi_copy_pieces(char *tile, const int *to,
                                                        const char *const *from, V)
{
#pragma unroll
    for (int u = 0; u < RKVI_LOAD_UNROLL; u++)
        if (to[u] >= 0) rkvi_start_copy<V>(tile + to[u], from[u], from[u] != NULL);
}
static __device__ __forceinline__ void rkvi_copy_pieces(char *tile, const int *to,
                                                        const char *const *from, uint16_t)
{
    rkvi_copy_now<uint16_t>(tile, to, from); /* 4 bytes are the least for an asynchronous copy */
}
/* For rows of BYTES that are aligned to 16, which most are: a quarter of the instructions. A thread
 * copies the same piece of every `step`-th row. */
template <int BYTES>
static __device__ __forceinline__ void rkvi_load_rows(char *tile, const char *const *rows,
                                                      int n_rows, int offset)
{
    const int width = 16, per_row = BYTES / width, step = RKVI_TILE_THREADS / per_row;
    const int row = static_cast<int>(threadIdx.x / per_row);
    const int piece = static_cast<int>(threadIdx.x % per_row) * width;
    char *to = tile + (row * RKVI_PITCH + piece);
    const char *from[RKVI_TILE / step]; /* load all before: no load is moved before a copy */
#pragma unroll
    for (int u = 0; u < RKVI_TILE / step; u++) from[u] = rows[row + u * step];
#pragma unroll
    for (int u = 0; u < RKVI_TILE / step && u * step < n_rows; u++)
        rkvi_start_copy<uint4>(to + u * step * RKVI_PITCH, from[u] + (offset + piece), true);
}
static __device__ __forceinline__ bool rkvi_load_common(char *tile, const char *const *rows,
                                                        int n_rows, int offset, int bytes, int load)
{
    if (load != 16 || (bytes != RKVI_CHUNK_BYTES && bytes != RKVI_CHUNK_BYTES / 2)) return false;
    if (bytes == RKVI_CHUNK_BYTES)
        rkvi_load_rows<RKVI_CHUNK_BYTES>(tile, rows, n_rows, offset);
    else
        rkvi_load_rows<RKVI_CHUNK_BYTES / 2>(tile, rows, n_rows, offset);
    return true;
}
#else
static __device__ __forceinline__ bool rkvi_load_common(char *, const char *const *, int, int, int,
                                                        int)
{
    return false;
}
static __device__ __forceinline__ void rkvi_copies_done()
{
}
template <typename V>
static __device__ __forceinline__ void rkvi_copy_pieces(char *tile, const int *to,
                                                        const char *const *from, V)
{
    rkvi_copy_now<V>(tile, to, from);
}
#endif

/* V: the widest load that the alignment of the rows allows. Rows are padded to 16 dims. */
template <typename V>
static __device__ void rkvi_load_tile(char *tile, const char *const *rows, int n_rows, int offset,
                                      int bytes, int padded_bytes)
{
    const int width = static_cast<int>(sizeof(V));
    const int per_row = padded_bytes / width, step_rows = RKVI_TILE_THREADS / per_row;
    const int step_rest = RKVI_TILE_THREADS - step_rows * per_row;
    int row = static_cast<int>(threadIdx.x / static_cast<unsigned>(per_row));
    int piece = static_cast<int>(threadIdx.x) - row * per_row;
    while (row < n_rows) {
        const char *from[RKVI_LOAD_UNROLL];
        int to[RKVI_LOAD_UNROLL];
#pragma unroll
        for (int u = 0; u < RKVI_LOAD_UNROLL; u++) {
            const bool is_there = row < n_rows && piece * width < bytes;
            to[u] = row < n_rows ? row * RKVI_PITCH + piece * width : -1;
            from[u] = is_there ? rows[row] + offset + piece * width : NULL;
            row += step_rows;
            piece += step_rest;
            if (piece >= per_row) {
                piece -= per_row;
                row++;
            }
        }
        rkvi_copy_pieces(tile, to, from, V{});
    }
}

/* Loads a chunk of n_rows rows, a multiple of 16 up to 64, in two steps, so that other work can be
 * done meanwhile. The barrier in the first step waits for earlier readers of the tile and for the
 * writers of the row pointers; callers need none of their own. */
template <typename T>
static __device__ void rkvi_stage_begin(char *tile, const char *const *rows, int n_rows,
                                        int head_dim, int chunk, int load)
{
    const int size = static_cast<int>(sizeof(T)), dims = rkvi_dims<T>(head_dim, chunk);
    const int offset = chunk * RKVI_CHUNK_BYTES, bytes = dims * size;
    const int padded_bytes = rkvi_padded(dims) * size;
    __syncthreads();
    if (rkvi_load_common(tile, rows, n_rows, offset, bytes, load)) return;
    if (load == 16)
        rkvi_load_tile<uint4>(tile, rows, n_rows, offset, bytes, padded_bytes);
    else if (load == 8)
        rkvi_load_tile<uint2>(tile, rows, n_rows, offset, bytes, padded_bytes);
    else if (load == 4)
        rkvi_load_tile<uint32_t>(tile, rows, n_rows, offset, bytes, padded_bytes);
    else
        rkvi_load_tile<uint16_t>(tile, rows, n_rows, offset, bytes, padded_bytes);
}
/* `load` is the dtype. */
template <>
__device__ void rkvi_stage_begin<rkvi_any>(char *tile, const char *const *rows, int n_rows,
                                           int head_dim, int chunk, int load)
{
    const int first = chunk * rkvi_chunk_dims<rkvi_any>(),
              dims = rkvi_dims<rkvi_any>(head_dim, chunk);
    const unsigned padded = static_cast<unsigned>(rkvi_padded(dims));
    __syncthreads();
    for (unsigned at = threadIdx.x; at < static_cast<unsigned>(n_rows) * padded;
         at += RKVI_TILE_THREADS) {
        const int row = static_cast<int>(at / padded), i = static_cast<int>(at % padded);
        const float number = i < dims ? rkvi_load_any(rows[row], first + i, load) : 0.0f;
        *reinterpret_cast<float *>(tile + row * RKVI_PITCH + 4 * i) = number;
    }
}
static __device__ __forceinline__ void rkvi_stage_end()
{
    rkvi_copies_done();
    __syncthreads();
}
template <typename T>
static __device__ void rkvi_stage(char *tile, const char *const *rows, int n_rows, int head_dim,
                                  int chunk, int load)
{
    rkvi_stage_begin<T>(tile, rows, n_rows, head_dim, chunk, load);
    rkvi_stage_end();
}

static __device__ __forceinline__ void rkvi_load4(float *out, const float *p)
{
    const float4 v = *reinterpret_cast<const float4 *>(p);
    out[0] = v.x;
    out[1] = v.y;
    out[2] = v.z;
    out[3] = v.w;
}
static __device__ __forceinline__ void rkvi_load4(float *out, const rkvi_any *p)
{
    rkvi_load4(out, &p->value);
}
template <typename T> static __device__ __forceinline__ void rkvi_load4(float *out, const T *p)
{
    const uint2 v = *reinterpret_cast<const uint2 *>(p);
    out[0] = rkvi_to_float(T{ static_cast<uint16_t>(v.x & 0xffffu) });
    out[1] = rkvi_to_float(T{ static_cast<uint16_t>(v.x >> 16) });
    out[2] = rkvi_to_float(T{ static_cast<uint16_t>(v.y & 0xffffu) });
    out[3] = rkvi_to_float(T{ static_cast<uint16_t>(v.y >> 16) });
}

/* 16 bytes, aligned, as floats. */
static __device__ __forceinline__ void rkvi_load_piece(float *out, const float *p)
{
    rkvi_load4(out, p);
}
static __device__ __forceinline__ void rkvi_load_piece(float *out, const rkvi_any *p)
{
    rkvi_load4(out, p);
}
template <typename T> static __device__ __forceinline__ void rkvi_load_piece(float *out, const T *p)
{
    const uint4 v = *reinterpret_cast<const uint4 *>(p);
    const uint32_t pairs[4] = { v.x, v.y, v.z, v.w };
#pragma unroll
    for (int k = 0; k < 4; k++) {
        out[2 * k] = rkvi_to_float(T{ static_cast<uint16_t>(pairs[k] & 0xffffu) });
        out[2 * k + 1] = rkvi_to_float(T{ static_cast<uint16_t>(pairs[k] >> 16) });
    }
}

/* The layout of accumulators, which the tensor cores prescribe: acc[block][k] of a lane is the dot
 * of row 16 * warp + lane / 4 + (k / 2) * 8 with column 8 * block + 2 * (lane % 4) + k % 2. */
static __device__ __forceinline__ int rkvi_acc_row(int lane, int k)
{
    return lane / 4 + (k / 2) * 8;
}
static __device__ __forceinline__ int rkvi_acc_column(int lane, int block, int k)
{
    return 8 * block + 2 * (lane % 4) + k % 2;
}

/* acc += dots of this warp's 16 rows of a with the first 8 * n_blocks rows of b, on FMA units. The
 * rest of acc is undefined. */
template <typename T>
static __device__ void rkvi_dots_fma(float (*acc)[4], const char *a, const char *b, int padded,
                                     int n_blocks)
{
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    const char *a_row = a + (16 * warp + lane / 4) * RKVI_PITCH;
    const char *b_row = b + 2 * (lane % 4) * RKVI_PITCH;
    for (int i = 0; i < padded; i += 4) {
        float top[4], bottom[4], column[4];
        rkvi_load4(top, reinterpret_cast<const T *>(a_row) + i);
        rkvi_load4(bottom, reinterpret_cast<const T *>(a_row + 8 * RKVI_PITCH) + i);
#pragma unroll
        for (int block = 0; block < 8; block++) {
            if (block >= n_blocks) continue;
#pragma unroll
            for (int k = 0; k < 2; k++) {
                rkvi_load4(column,
                           reinterpret_cast<const T *>(b_row + (8 * block + k) * RKVI_PITCH) + i);
#pragma unroll
                for (int x = 0; x < 4; x++) {
                    acc[block][k] = fmaf(top[x], column[x], acc[block][k]);
                    acc[block][2 + k] = fmaf(bottom[x], column[x], acc[block][2 + k]);
                }
            }
        }
    }
}

#if RKVI_TENSOR_CORES
/* acc += a * b, 16 x 8 x 16, exact products, f32 sums. */
static __device__ __forceinline__ void rkvi_mma(float *acc, const uint32_t *a, const uint32_t *b,
                                                rkvi_f16)
{
#ifndef RKV_CUDA_SHIM
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    shim_mma<rkvi_f16>(acc, a, b, rkvi_to_float);
#endif
}
static __device__ __forceinline__ void rkvi_mma(float *acc, const uint32_t *a, const uint32_t *b,
                                                rkvi_bf16)
{
#ifndef RKV_CUDA_SHIM
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    shim_mma<rkvi_bf16>(acc, a, b, rkvi_to_float);
#endif
}

/* Four matrices of 8 x 8 halves from shared memory, as rkvi_mma wants them: lane i gives the
 * address of row i % 8 of matrix i / 8, aligned to 16 bytes, and gets two halves of row i / 4 of
 * each matrix, from column 2 * (i % 4) on. */
static __device__ __forceinline__ void rkvi_load_matrices(uint32_t *out, const char *row)
{
#ifndef RKV_CUDA_SHIM
    const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at));
#else
    shim_load_matrices(out, row);
#endif
}

/* The same on tensor cores, for 16 * N_PAIRS rows of b. */
template <typename T, int N_PAIRS>
static __device__ __forceinline__ void rkvi_dots_mma(float (*acc)[4], const char *a, const char *b,
                                                     int padded)
{
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    const int row = lane % 8, matrix = lane / 8;
    const char *a_row = a + (16 * warp + row + matrix % 2 * 8) * RKVI_PITCH + matrix / 2 * 16;
    const char *b_row = b + (row + matrix / 2 * 8) * RKVI_PITCH + matrix % 2 * 16;
    for (int i = 0; i < 2 * padded; i += 32) {
        uint32_t a_part[4], b_parts[4]; /* of two blocks */
        rkvi_load_matrices(a_part, a_row + i);
#pragma unroll
        for (int pair = 0; pair < N_PAIRS; pair++) {
            rkvi_load_matrices(b_parts, b_row + 16 * pair * RKVI_PITCH + i);
            rkvi_mma(acc[2 * pair], a_part, b_parts, T{});
            rkvi_mma(acc[2 * pair + 1], a_part, b_parts + 2, T{});
        }
    }
}
template <typename T>
static __device__ __forceinline__ void rkvi_dots(float (*acc)[4], const char *a, const char *b,
                                                 int padded, int n_blocks, T)
{
    switch ((n_blocks + 1) / 2) {
    case 1: rkvi_dots_mma<T, 1>(acc, a, b, padded); break;
    case 2: rkvi_dots_mma<T, 2>(acc, a, b, padded); break;
    case 3: rkvi_dots_mma<T, 3>(acc, a, b, padded); break;
    default: rkvi_dots_mma<T, 4>(acc, a, b, padded); break;
    }
}
static __device__ __forceinline__ void rkvi_dots(float (*acc)[4], const char *a, const char *b,
                                                 int padded, int n_blocks, float)
{
    rkvi_dots_fma<float>(acc, a, b, padded, n_blocks);
}
static __device__ __forceinline__ void rkvi_dots(float (*acc)[4], const char *a, const char *b,
                                                 int padded, int n_blocks, rkvi_any)
{
    rkvi_dots_fma<float>(acc, a, b, padded, n_blocks);
}
#else
template <typename T>
static __device__ __forceinline__ void rkvi_dots(float (*acc)[4], const char *a, const char *b,
                                                 int padded, int n_blocks, T)
{
    rkvi_dots_fma<T>(acc, a, b, padded, n_blocks);
}
#endif

/* A bound on the error of a cosine from rkvi_dots. Within it of the threshold the cosine is
 * computed again, exactly. Tensor cores truncate when they add; FMA units add as the CPU does, in
 * the order of the dims. */
template <typename T> static __device__ __forceinline__ float rkvi_cosine_error(int head_dim)
{
    const bool truncates = RKVI_TENSOR_CORES && sizeof(T) == 2;
    return truncates ? 4e-6f * static_cast<float>(4 + head_dim / 16) : 0.0f;
}

/* rkv.h sums squares in 16 lanes, element i in lane i % 16, with FMA. Here a quad (four threads)
 * holds four lanes each. Adding and then summing, as below, gives the CPU's bits. */
template <typename T>
static __device__ __forceinline__ void rkvi_lanes_add(float *lanes, const T *a, const T *b,
                                                      int padded, int part)
{
    for (int i = 4 * part; i < padded; i += 16) {
        float x[4], y[4];
        rkvi_load4(x, a + i);
        rkvi_load4(y, b + i);
#pragma unroll
        for (int k = 0; k < 4; k++) lanes[k] = fmaf(x[k], y[k], lanes[k]);
    }
}
static __device__ __forceinline__ float rkvi_lanes_sum(float *lanes)
{
#pragma unroll
    for (int k = 0; k < 4; k++) lanes[k] += __shfl_xor_sync(0xffffffffu, lanes[k], 2);
#pragma unroll
    for (int k = 0; k < 4; k++) lanes[k] += __shfl_xor_sync(0xffffffffu, lanes[k], 1);
    return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
}

/* The exact dot product, which decides whether two keys are similar: one chain of FMAs over the
 * dims, as in rkv.h. If aligned to 16 bytes, it loads so many at a time, the rest one by one. */
template <typename T>
static __device__ __forceinline__ float rkvi_chain_dot(const T *a, const T *b, int dims,
                                                       bool aligned)
{
    float sum = 0.0f;
    const int step = 16 / static_cast<int>(sizeof(T)), whole = aligned ? dims / step * step : 0;
    for (int i = 0; i < whole; i += step) {
        float x[step], y[step];
        rkvi_load_piece(x, a + i);
        rkvi_load_piece(y, b + i);
#pragma unroll
        for (int k = 0; k < step; k++) sum = fmaf(x[k], y[k], sum);
    }
    for (int i = whole; i < dims; i++) sum = fmaf(rkvi_to_float(a[i]), rkvi_to_float(b[i]), sum);
    return sum;
}
/* The same for two rows in global memory, aligned to `load` bytes. */
template <typename T>
static __device__ float rkvi_chain_dot_global(const char *a, const char *b, int head_dim, int load)
{
    return rkvi_chain_dot(reinterpret_cast<const T *>(a), reinterpret_cast<const T *>(b), head_dim,
                          load == 16);
}
template <>
__device__ float rkvi_chain_dot_global<rkvi_any>(const char *a, const char *b, int head_dim,
                                                 int load)
{
    float sum = 0.0f;
    for (int i = 0; i < head_dim; i++)
        sum = fmaf(rkvi_load_any(a, i, load), rkvi_load_any(b, i, load), sum);
    return sum;
}

/* ==== 13. Plans =============================================================================
 * Descriptors: what the kernels know of a call, where everything lies in the workspace, what they
 * have found wrong. The host describes the layers in kernel parameters, which a graph records with
 * the launch: no copy from host memory that could change or vanish before a replay. */

/* A tensor to compact. A row has n_units units of `unit` bytes; each `run` of them are adjacent. */
struct rkvi_moved {
    rkvi_view rows;
    int64_t run_stride; /* bytes from one run to the next */
    int unit, run, n_units;
    int tokens_adjacent; /* transposed: adjacent threads take adjacent tokens */
};

enum { RKVI_KEYS, RKVI_VALUES, RKVI_POSITIONS, RKVI_PINS, RKVI_BIAS, RKVI_STATE, RKVI_N_MOVED };

/* Votes and rotary embedding of one KV head, for other policies than R-KV, and for its own where
 * more queries vote than the window has. */
struct rkvi_more {
    const float *bias;        /* [n_tokens], or NULL                                           */
    float *state;             /* [planes][row_stride]                                          */
    const int32_t *positions; /* [n_tokens], or NULL                                           */
    const float *means;       /* of all query heads                                            */
    float *sums;              /* [tiles + 1][voters * group][2]: largest logit and sum of a tile's
                                 exponentials; behind these the largest of all and 1 / sum     */
    float *vectors;           /* [group][3][pairs]: what TRIATTENTION multiplies a pair by     */
    int row_stride, query_heads;
    int n_new, n_voters;     /* newest rows; tokens that vote                                 */
    int first_voter;         /* slot of the oldest query that votes                           */
    int n_rotated, adjacent; /* pairs that are turned, and whether they are of adjacent numbers */
    float fade;              /* of what was important in earlier rounds                       */
};

/* All that a kernel must know of one KV head. */
struct rkvi_job {
    rkvi_moved moved[RKVI_N_MOVED]; /* data NULL: this layer or head has none */
    rkvi_view queries;
    int64_t query_head_stride;
    rkvi_more more;
    float *logits;       /* [votes][n_tokens]: logits, then probabilities. Other policies: a row
                            of importance, or of scores for each query head                    */
    float *inv_norm;     /* [n_tokens] 1 / (norm + 1e-8)                                       */
    float *redundancy;   /* [n_tokens] dot with the sum of all unit keys, then mean cosine     */
    long long *exempt;   /* [n_tokens] exempted entries, fixed point; or rows in order         */
    long long *unit_sum; /* [head_dim] sum of the unit keys, fixed point; or turns of the pairs */
    int32_t *open_rows;  /* [n_tokens] rows still searching after the near scan                */
    int32_t *open_need;  /* [n_tokens] similar keys that they still need                       */
    float *scores;       /* [n_tokens - window]                                                */
    float *set_scores;   /* what selection reads: scores, or the set's shared scores           */
    int32_t *kept;       /* [n_keep] of the job's set                                          */
    float scale, softcap;
    int dtype, key_load, query_load; /* bytes per load, as the alignment allows; of rkvi_any: the
                                        dtype in memory                                         */
    int layer, head, heads, group, head_dim;
    int n_tokens, n_keep;
    int scored;              /* some tokens are chosen by score */
    int set_first, set_jobs; /* jobs that share a kept set are adjacent */
};

/* Faults in the data. */
enum rkvi_fault {
    RKVI_BAD_PINS,
    RKVI_BAD_KEY_BLOCKS,
    RKVI_BAD_VALUE_BLOCKS,
    RKVI_BAD_QUERY_BLOCKS,
    RKVI_BAD_QUERY,
    RKVI_BAD_KEY,
    RKVI_BAD_LOGITS,
    RKVI_BAD_SCORE,
    RKVI_BAD_KEPT_RANGE,
    RKVI_BAD_KEPT_ORDER,
    RKVI_BAD_KEPT_PINNED,
    RKVI_BAD_KEPT_PINS,
    RKVI_BAD_FREQUENCY, /* from here on: of what rkvi_upload_more describes */
    RKVI_BAD_BIAS,
    RKVI_BAD_STATE,
    RKVI_BAD_MEANS,
    RKVI_N_RULES,
    RKVI_N_USUAL_RULES = RKVI_BAD_FREQUENCY
};
enum { RKVI_NO_ROW = (1 << 30) - 1, RKVI_MAX_JOBS = 1 << 26 };
#define RKVI_NO_FAULT 0xffffffffffffffffull
#define RKVI_EARLIER  0ull /* a stage before this one has failed */

/* rules are texts in host memory. Here they are numbers: in a kernel that stores a pointer the
 * compiler no longer sees that rows lie in global memory, and moves them by generic loads. */
struct rkvi_control {
    unsigned long long fault; /* the least number of all faults found, or RKVI_NO_FAULT */
    uintptr_t rules[RKVI_N_RULES];
    int policy;
};

/* A fault as a number: phase (2 bits), job (26), step within the job (2), row (30), fault (4). The
 * CPU checks in this order, so the least number is the fault that it reports. */
enum { RKVI_PHASE_CALL, RKVI_PHASE_PINS, RKVI_PHASE_TABLES, RKVI_PHASE_DATA };
static __device__ int rkvi_step_of(rkvi_fault fault, int policy)
{
    const bool with_state = policy >= RKV_POLICY_MEMORY_TRACES && policy <= RKV_POLICY_H2O;
    switch (fault) {
    case RKVI_BAD_VALUE_BLOCKS:
    case RKVI_BAD_KEPT_PINS: return 1;
    case RKVI_BAD_QUERY_BLOCKS:
    case RKVI_BAD_LOGITS: return 2;
    case RKVI_BAD_BIAS: return 3;
    case RKVI_BAD_KEY: return policy == RKV_POLICY_H2O ? 2 : 1;
    case RKVI_BAD_QUERY: return policy == RKV_POLICY_H2O ? 1 : with_state ? 2 : 0;
    default: return 0;
    }
}
static __device__ void rkvi_fault_at(rkvi_control *control, rkvi_fault fault, int job, int row)
{
    const bool is_table = fault >= RKVI_BAD_KEY_BLOCKS && fault <= RKVI_BAD_QUERY_BLOCKS;
    const unsigned long long phase = fault == RKVI_BAD_FREQUENCY ? RKVI_PHASE_CALL
                                     : fault == RKVI_BAD_PINS    ? RKVI_PHASE_PINS
                                     : is_table                  ? RKVI_PHASE_TABLES
                                                                 : RKVI_PHASE_DATA;
    const unsigned long long step =
        static_cast<unsigned long long>(rkvi_step_of(fault, control->policy));
    atomicMin(&control->fault, phase << 62 | static_cast<unsigned long long>(job) << 36 |
                                   step << 34 | static_cast<unsigned long long>(row) << 4 |
                                   static_cast<unsigned>(fault));
}

/* Floats that a policy carries of a row. */
static __host__ __device__ int rkvi_planes_of(const rkv_config &config)
{
    if (config.policy == RKV_POLICY_H2O) return 1;
    return config.policy == RKV_POLICY_MEMORY_TRACES || config.policy == RKV_POLICY_MEMORY_PROSE
               ? 2
               : 0;
}

struct rkvi_args {
    rkv_config config;
    rkvi_job *jobs;
    rkvi_control *control;
    int *open_count; /* [n_jobs] */
    int n_jobs;
    int items;       /* per job; each kernel says what an item is   */
    int checks;      /* of rkvi_check; 0: it is not launched        */
    int votes;       /* queries of a query head                     */
    int logit_rows;  /* of rkvi_job.logits                          */
    bool scoring;    /* this call scores: it resets the record      */
    bool importance; /* queries are read: by R-KV with lambda > 0   */
    bool redundancy; /* lambda < 1                                  */
    bool select_too; /* the score kernel also selects               */
    bool folds;      /* rkvi_vote: the second pass                  */
};

static __device__ __forceinline__ bool rkvi_has_fault(const rkvi_args &args)
{
    return args.control->fault != RKVI_NO_FAULT;
}
/* A fault that no kernel can work with. Keys and queries that are not finite do not count: the pass
 * over them must go on until it has found all of them. */
static __device__ __forceinline__ bool rkvi_is_unusable(const rkvi_args &args)
{
    const unsigned long long fault = args.control->fault; /* read once: other blocks may write */
    return fault != RKVI_NO_FAULT && fault >> 62 != RKVI_PHASE_DATA;
}
/* Item number `item` of a launch: its job, and which of the job's args.items it is. 64-bit division
 * is slow, so it is done in 32 bits where possible. */
struct rkvi_item {
    int job, part;
};
static __device__ __forceinline__ rkvi_item rkvi_item_at(const rkvi_args &args, int64_t item)
{
    rkvi_item out;
    if (item <= INT32_MAX) {
        out.job = static_cast<int>(static_cast<unsigned>(item) / static_cast<unsigned>(args.items));
        out.part = static_cast<int>(item) - out.job * args.items;
    } else {
        out.job = static_cast<int>(item / args.items);
        out.part = static_cast<int>(item % args.items);
    }
    return out;
}

/* Tokens that redundancy sees. */
static __device__ __forceinline__ int rkvi_span(const rkvi_args &args, const rkvi_job &job)
{
    return job.n_tokens - (args.config.variant == RKV_PUBLISHED ? 0 : args.config.window);
}

/* The slot of voter number `voter`, counted from the oldest, in the ring of queries. */
static __device__ __forceinline__ int rkvi_slot(const rkvi_args &args, const rkvi_job &job,
                                                int voter)
{
    const int slot = job.more.first_voter + voter;
    return slot < args.votes ? slot : slot - args.votes;
}

/* Writes the fault, if there is one, to *config.device_error. */
static __device__ void rkvi_report(const rkvi_args &args)
{
    const unsigned long long least = args.control->fault;
    rkv_error *const record = args.config.device_error;
    if (blockIdx.x != 0 || threadIdx.x != 0 || !record || least == RKVI_NO_FAULT) return;
    const int fault = static_cast<int>(least & 15),
              row = static_cast<int>(least >> 4 & RKVI_NO_ROW);
    if (least == RKVI_EARLIER) return;
    const rkvi_job &job = args.jobs[least >> 36 & (RKVI_MAX_JOBS - 1)];
    const bool is_nonfinite =
        (fault >= RKVI_BAD_QUERY && fault <= RKVI_BAD_SCORE) || fault >= RKVI_BAD_BIAS;
    const bool of_layer = (fault >= RKVI_BAD_KEY_BLOCKS && fault <= RKVI_BAD_QUERY_BLOCKS) ||
                          fault == RKVI_BAD_FREQUENCY;
    const bool is_query = fault == RKVI_BAD_QUERY, is_means = fault == RKVI_BAD_MEANS;
    const int first_head = job.head * job.group;
    memcpy(&record->rule, &args.control->rules[fault], sizeof record->rule);
    record->status = is_nonfinite ? RKV_ERROR_NONFINITE : RKV_ERROR_ARGUMENT;
    record->layer = job.layer;
    record->head = of_layer   ? -1
                   : is_query ? first_head + row / args.votes
                   : is_means ? first_head + row
                              : job.head;
    record->token = row == RKVI_NO_ROW || is_means ? -1
                    : is_query                     ? rkvi_slot(args, job, row % args.votes)
                                                   : row;
}

/* ---- What the host describes ---------------------------------------------------------------- */

struct rkvi_strides {
    int64_t head, token, dim, block; /* bytes */
    int block_tokens;
    int element, n_elements; /* bytes of an element, elements of a row */
};
/* What the layers of a model have in common. Adjacent layers of equal shape share an upload. */
struct rkvi_shape {
    rkvi_strides keys, values, queries;
    int key_load, query_load, key_unit, value_unit;
    int heads, group, head_dim, dtype, row_stride;
    float scale, softcap;
};
struct rkvi_entry {
    char *keys, *values, *queries;
    const int32_t *key_table, *value_table, *query_table;
    int32_t *kept, *positions;
    uint8_t *pins;
    float *scores, *shared;
    int64_t first_token; /* of the layer, in the arrays of the workspace                       */
    int64_t set_token;   /* of the layer that leads the set                                    */
    int layer, first_job, set_job, set_jobs, n_tokens, n_keep;
};
/* The arrays of the workspace; each holds the heads of all layers, one after the other. */
struct rkvi_arrays {
    long long *exempt, *unit_sum;
    float *logits, *inv_norm, *redundancy;
    int32_t *open_rows, *open_need;
};
struct rkvi_upload_head {
    rkvi_args args;
    rkvi_arrays arrays;
    rkvi_shape shape;
    uintptr_t rules[RKVI_N_USUAL_RULES];
    int64_t first_dim; /* of the first entry, in unit_sum */
    int n_entries, is_first;
};
static constexpr int rkvi_entries_in(int parameter_bytes)
{
    return (parameter_bytes - static_cast<int>(sizeof(rkvi_upload_head))) /
           static_cast<int>(sizeof(rkvi_entry));
}
enum {
    RKVI_UPLOAD_ENTRIES = rkvi_entries_in(RKV_CUDA_PARAMETER_BYTES),
    RKVI_FEW_ENTRIES = rkvi_entries_in(4096), /* enough for most models: the driver copies all */
    RKVI_UPLOAD_THREADS = 128
};
static_assert(RKVI_FEW_ENTRIES >= 28, "a model of 28 layers takes one small upload");
template <int N> struct rkvi_upload_args {
    rkvi_upload_head head;
    rkvi_entry entries[N];
};
static_assert(sizeof(rkvi_upload_args<RKVI_UPLOAD_ENTRIES>) <= RKV_CUDA_PARAMETER_BYTES,
              "too many kernel parameters");

static __host__ __device__ rkvi_view rkvi_view_of(char *data, const int32_t *table,
                                                  const rkvi_strides &strides, int head)
{
    rkvi_view view;
    view.data = data ? data + head * strides.head : NULL;
    view.token_stride = strides.token;
    view.block_stride = strides.block;
    view.table = table;
    view.block_tokens = strides.block_tokens;
    return view;
}

static __device__ rkvi_moved rkvi_moved_of(const rkvi_view &rows, const rkvi_strides &strides,
                                           int unit)
{
    const bool whole = strides.dim == strides.element;
    rkvi_moved moved;
    moved.rows = rows;
    moved.run_stride = strides.dim;
    moved.unit = unit;
    moved.run =
        whole ? static_cast<int>(static_cast<int64_t>(strides.n_elements) * strides.element / unit)
              : strides.element / unit;
    moved.n_units = whole ? moved.run : strides.n_elements * moved.run;
    moved.tokens_adjacent = !whole && strides.token == strides.element;
    return moved;
}

static __device__ void rkvi_describe_buffers(const rkvi_upload_head &head, const rkvi_entry &entry,
                                             int first_job, int h, rkvi_job *job)
{
    const rkvi_arrays &arrays = head.arrays;
    const rkv_config &config = head.args.config;
    const bool per_head = config.scope == RKV_PER_HEAD;
    const int64_t n = entry.n_tokens, at = entry.first_token + h * n;
    const int64_t set_at = per_head ? at : entry.set_token;
    job->exempt = arrays.exempt + at;
    job->unit_sum = arrays.unit_sum + head.first_dim +
                    static_cast<int64_t>(entry.first_job - first_job + h) * head.shape.head_dim;
    job->logits = arrays.logits + at * head.args.logit_rows;
    job->inv_norm = arrays.inv_norm + at;
    job->redundancy = arrays.redundancy + at;
    job->open_rows = arrays.open_rows + at;
    job->open_need = arrays.open_need + at;
    job->scores = entry.scores ? entry.scores + h * (n - config.window) : job->redundancy;
    job->set_scores = per_head       ? job->scores
                      : entry.shared ? entry.shared
                                     : arrays.inv_norm + set_at;
    job->kept = !entry.kept ? arrays.open_need + set_at
                            : entry.kept + (per_head ? static_cast<int64_t>(h) * config.budget : 0);
}

static __device__ void rkvi_describe(const rkvi_upload_head &head, const rkvi_entry &entry,
                                     int first_job, int h, rkvi_job *job)
{
    const rkvi_shape &shape = head.shape;
    const bool per_head = head.args.config.scope == RKV_PER_HEAD;
    const bool has_set = per_head || h == 0;
    const rkvi_strides words = { static_cast<int64_t>(shape.row_stride) * 4, 4, 4, 0, 0, 4, 1 };
    const rkvi_strides bytes = { shape.row_stride, 1, 1, 0, 0, 1, 1 };
    char *positions = reinterpret_cast<char *>(has_set ? entry.positions : NULL);
    char *pins = reinterpret_cast<char *>(has_set ? entry.pins : NULL);
    job->moved[RKVI_KEYS] = rkvi_moved_of(rkvi_view_of(entry.keys, entry.key_table, shape.keys, h),
                                          shape.keys, shape.key_unit);
    job->moved[RKVI_VALUES] =
        rkvi_moved_of(rkvi_view_of(entry.values, entry.value_table, shape.values, h), shape.values,
                      shape.value_unit);
    job->moved[RKVI_POSITIONS] = rkvi_moved_of(rkvi_view_of(positions, NULL, words, h), words, 4);
    job->moved[RKVI_PINS] = rkvi_moved_of(rkvi_view_of(pins, NULL, bytes, h), bytes, 1);
    job->queries = rkvi_view_of(entry.queries, entry.query_table, shape.queries, h * shape.group);
    job->query_head_stride = shape.queries.head;
    rkvi_describe_buffers(head, entry, first_job, h, job);
    job->scale = shape.scale;
    job->softcap = shape.softcap;
    job->dtype = shape.dtype;
    job->key_load = shape.key_load;
    job->query_load = shape.query_load;
    job->layer = entry.layer;
    job->head = h;
    job->heads = shape.heads;
    job->group = shape.group;
    job->head_dim = shape.head_dim;
    job->n_tokens = entry.n_tokens;
    job->n_keep = entry.n_keep;
    job->scored = entry.n_tokens > head.args.config.budget &&
                  head.args.config.budget > head.args.config.protect + head.args.config.pinned;
    job->set_first = per_head ? entry.first_job + h : entry.set_job;
    job->set_jobs = per_head ? 1 : entry.set_jobs;
    job->moved[RKVI_BIAS].rows.data = job->moved[RKVI_STATE].rows.data = NULL;
    job->more.bias = NULL;
    job->more.first_voter = 0;
}

/* One block per layer: writes its jobs and clears their sums. */
template <int N>
static __global__ void __launch_bounds__(RKVI_UPLOAD_THREADS)
    rkvi_upload(const RKVI_GRID_CONSTANT rkvi_upload_args<N> up)
{
    const rkvi_upload_head &head = up.head;
    const int thread = static_cast<int>(threadIdx.x);
    rkv_error *record = head.args.config.device_error;
    if (head.is_first && blockIdx.x == 0 && thread == 0) {
        const rkv_error none = { NULL, RKV_OK, -1, -1, -1 };
        const bool earlier = record && !head.args.scoring && record->status != RKV_OK;
        head.args.control->fault = RKVI_NO_FAULT;
        if (earlier) head.args.control->fault = RKVI_EARLIER;
        head.args.control->policy = head.args.config.policy;
        if (record && head.args.scoring) *record = none;
    }
    if (head.is_first && blockIdx.x == 0 && thread < RKVI_N_USUAL_RULES)
        head.args.control->rules[thread] = head.rules[thread];
    const int64_t n = static_cast<int64_t>(head.shape.heads) * head.shape.head_dim;
    for (int e = static_cast<int>(blockIdx.x); e < head.n_entries;
         e += static_cast<int>(gridDim.x)) {
        const rkvi_entry &entry = up.entries[e];
        const int first_job = up.entries[0].first_job;
        long long *unit_sum =
            head.arrays.unit_sum + head.first_dim +
            static_cast<int64_t>(entry.first_job - first_job) * head.shape.head_dim;
        for (int h = thread; h < head.shape.heads; h += RKVI_UPLOAD_THREADS) {
            rkvi_describe(head, entry, first_job, h, &head.args.jobs[entry.first_job + h]);
            head.args.open_count[entry.first_job + h] = 0;
        }
        for (int64_t i = thread; i < n; i += RKVI_UPLOAD_THREADS) unit_sum[i] = 0;
    }
}

/* ---- What else the host describes, where other policies or a bias want it -------------------- */

enum { RKVI_MAX_POWERS = 30 };
struct rkvi_rope {
    /* powers[k] = base^(-2^(k + 1) / dims): the frequency of pair f is the product of those whose
     * bits are set in f. */
    double powers[RKVI_MAX_POWERS];
    const float *frequencies; /* instead */
    int n_rotated, adjacent;
};
struct rkvi_more_entry {
    float *bias, *state;
    int32_t *positions;
    const float *means;
    int64_t first_sum;    /* in sums, of pairs of numbers */
    int64_t first_vector; /* in vectors                   */
    int first_job, n_new, first_query;
    float fade;
};
enum { RKVI_MORE_ENTRIES = 32 };
struct rkvi_more_args {
    rkvi_args args;
    rkvi_rope rope;
    uintptr_t rules[RKVI_N_RULES - RKVI_N_USUAL_RULES];
    float *sums, *vectors; /* of all heads */
    int max_group;         /* sums and vectors have room for so many query heads per KV head */
    int n_entries, planes, head_dim, heads, row_stride, n_queries;
    rkvi_more_entry entries[RKVI_MORE_ENTRIES];
};
static_assert(sizeof(rkvi_more_args) <= 4096, "too many kernel parameters");

static __host__ __device__ int rkvi_n_pairs(int head_dim)
{
    return (head_dim + 1) / 2;
}

/* The planes of the state of a head are what a row of another tensor has as elements. */
static __device__ void rkvi_describe_more(const rkvi_more_args &up, const rkvi_more_entry &entry,
                                          int h, rkvi_job *job)
{
    const int64_t at = static_cast<int64_t>(h) * up.row_stride;
    const int64_t n_tiles = (job->n_tokens - 1) / RKVI_TILE + 1, votes = up.args.votes;
    const rkvi_strides of_bias = { static_cast<int64_t>(up.row_stride) * 4, 4, 4, 0, 0, 4, 1 };
    const rkvi_strides of_state = { of_bias.head * up.planes, 4, of_bias.head, 0, 0, 4, up.planes };
    rkvi_more *more = &job->more;
    char *bias = reinterpret_cast<char *>(entry.bias),
         *state = reinterpret_cast<char *>(entry.state);
    job->moved[RKVI_BIAS] = rkvi_moved_of(rkvi_view_of(bias, NULL, of_bias, h), of_bias, 4);
    job->moved[RKVI_STATE] = rkvi_moved_of(rkvi_view_of(state, NULL, of_state, h), of_state, 4);
    more->bias = entry.bias ? entry.bias + at : NULL;
    more->state = entry.state ? entry.state + at * up.planes : NULL;
    more->positions = entry.positions;
    if (entry.positions && up.args.config.scope == RKV_PER_HEAD) more->positions += at;
    more->means = entry.means;
    more->sums = up.sums + 2 * (entry.first_sum + h * (n_tiles + 1) * votes * up.max_group);
    more->vectors = up.vectors + entry.first_vector +
                    static_cast<int64_t>(h) * 3 * rkvi_n_pairs(up.head_dim) * up.max_group;
    more->row_stride = up.row_stride;
    more->query_heads = up.n_queries;
    more->n_new = entry.n_new;
    more->n_voters = static_cast<int>(votes);
    if (up.planes > 0 && entry.n_new < votes) more->n_voters = entry.n_new;
    more->first_voter = static_cast<int>((entry.first_query + votes - more->n_voters) % votes);
    more->n_rotated = up.rope.n_rotated;
    more->adjacent = up.rope.adjacent;
    more->fade = entry.fade;
}

/* 2^64 for a revolution per token; false where the frequency is out of range. */
static __device__ bool rkvi_turns_of(const rkvi_rope &rope, int pair, unsigned long long *turns)
{
    const double per_radian = 18446744073709551616.0 / 6.283185307179586476925;
    double product = 1;
    for (int k = 0; pair >> k; k++)
        if (pair >> k & 1) product *= rope.powers[k];
    const float frequency = rope.frequencies ? rope.frequencies[pair] : static_cast<float>(product);
    *turns = 0;
    if (!(frequency >= 0 && frequency <= 4)) return false;
    *turns = static_cast<unsigned long long>(static_cast<double>(frequency) * per_radian);
    return true;
}

/* One block per layer. Turns of pairs that are not turned are 0. */
static __global__ void __launch_bounds__(RKVI_UPLOAD_THREADS)
    rkvi_upload_more(const RKVI_GRID_CONSTANT rkvi_more_args up)
{
    const int n_pairs = rkvi_n_pairs(up.head_dim), thread = static_cast<int>(threadIdx.x);
    if (blockIdx.x == 0 && thread < RKVI_N_RULES - RKVI_N_USUAL_RULES)
        up.args.control->rules[RKVI_N_USUAL_RULES + thread] = up.rules[thread];
    for (int e = static_cast<int>(blockIdx.x); e < up.n_entries; e += static_cast<int>(gridDim.x)) {
        rkvi_job *jobs = up.args.jobs + up.entries[e].first_job;
        for (int h = thread; h < up.heads; h += RKVI_UPLOAD_THREADS)
            rkvi_describe_more(up, up.entries[e], h, &jobs[h]);
        for (int p = thread; p < n_pairs; p += RKVI_UPLOAD_THREADS) {
            unsigned long long turns = 0;
            if (p < up.rope.n_rotated && !rkvi_turns_of(up.rope, p, &turns) && jobs[0].scored)
                rkvi_fault_at(up.args.control, RKVI_BAD_FREQUENCY, up.entries[e].first_job, p);
            for (int h = 0; h < up.heads; h++) jobs[h].unit_sum[p] = static_cast<long long>(turns);
        }
    }
}

static cudaStream_t rkvi_stream(const rkv_backend *self)
{
    return static_cast<cudaStream_t>(const_cast<void *>(self->context));
}

/* As in rkv.h: an element is a number, a block of q8_0, or a byte of an opaque row. */
static int rkvi_element_bytes(const rkv_tensor &tensor)
{
    if (tensor.dtype == RKV_OPAQUE) return 1;
    if (tensor.element_bytes) return tensor.element_bytes;
    switch (tensor.dtype) {
    case RKV_F32: return 4;
    case RKV_Q8_0: return 34;
    case RKV_F16:
    case RKV_BF16: return 2;
    default: return 1; /* fp8 */
    }
}
static int rkvi_row_elements(const rkv_tensor &tensor)
{
    if (tensor.dtype == RKV_OPAQUE) return tensor.element_bytes;
    return tensor.dtype == RKV_Q8_0 ? tensor.dim / 32 : tensor.dim;
}

static rkvi_strides rkvi_strides_of(const rkv_tensor &tensor)
{
    const int64_t rows = tensor.block_table ? tensor.block_tokens : tensor.tokens;
    rkvi_strides strides;
    memset(&strides, 0, sizeof strides);
    strides.element = rkvi_element_bytes(tensor);
    strides.n_elements = rkvi_row_elements(tensor);
    const int64_t row = strides.n_elements, element = strides.element;
    const int64_t dims = tensor.dtype == RKV_Q8_0 ? 32 : 1; /* numbers of an element */
    strides.dim = (tensor.dim_stride ? tensor.dim_stride : 1) * element;
    strides.token = (tensor.token_stride ? tensor.token_stride / dims : row) * element;
    strides.head = (tensor.head_stride ? tensor.head_stride / dims : rows * row) * element;
    strides.block =
        (tensor.block_stride ? tensor.block_stride / dims : tensor.heads * rows * row) * element;
    strides.block_tokens = tensor.block_table ? tensor.block_tokens : 0;
    return strides;
}

/* The widest access, up to 16 bytes, that the size and the alignment of all rows allow. */
static int rkvi_unit_of(const rkv_tensor &tensor, const rkvi_strides &strides)
{
    uint64_t all = 16 | reinterpret_cast<uintptr_t>(tensor.data);
    if (strides.dim == strides.element)
        all |= static_cast<uint64_t>(strides.n_elements) * static_cast<uint64_t>(strides.element);
    else
        all |= static_cast<uint64_t>(strides.element) | static_cast<uint64_t>(strides.dim);
    all |= static_cast<uint64_t>(strides.token) | static_cast<uint64_t>(strides.head);
    if (tensor.block_table) all |= static_cast<uint64_t>(strides.block);
    return static_cast<int>(all & (~all + 1));
}

/* ==== 14. Scoring ============================================================================
 * In: keys and window queries of a head.  Out: a score for each candidate.
 * First the attention pass, which reads the keys once. Out: inv_norm, unit_sum, logits, faults. An
 * item is every args.items-th tile of 64 keys of one head. */

/* The row of a tile that this thread's quad sums up; the quad also takes the row 32 further on.
 * Adjacent quads have rows two apart, which is 8 banks, as many as a quad reads at a time. */
static __device__ __forceinline__ int rkvi_quad_row()
{
    const unsigned quad = threadIdx.x / 4;
    return static_cast<int>(quad / 8 * 8 + quad % 4 * 2 + quad / 4 % 2);
}

/* squares[2]: squared norms of this quad's two rows of a tile, the same in each of its threads.
 * Loads all chunks of the rows one by one; the last stays in the tile. With b_rows > 0 it also
 * loads so many rows into s.b, rows of one chunk. */
template <typename T>
static __device__ void rkvi_square_norms(rkvi_tiles &s, int head_dim, int load, int b_rows,
                                         int b_load, float *squares)
{
    const int part = static_cast<int>(threadIdx.x % 4), row = rkvi_quad_row();
    float lanes[2][4] = { { 0, 0, 0, 0 }, { 0, 0, 0, 0 } };
    for (int chunk = 0; chunk < rkvi_chunks<T>(head_dim); chunk++) {
        const int padded = rkvi_padded(rkvi_dims<T>(head_dim, chunk));
        rkvi_stage_begin<T>(s.a, s.a_rows, RKVI_TILE, head_dim, chunk, load);
        if (b_rows > 0) rkvi_stage_begin<T>(s.b, s.b_rows, b_rows, head_dim, chunk, b_load);
        rkvi_stage_end();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const T *key = reinterpret_cast<const T *>(s.a + (row + 32 * half) * RKVI_PITCH);
            rkvi_lanes_add(lanes[half], key, key, padded, part);
        }
    }
    squares[0] = rkvi_lanes_sum(lanes[0]);
    squares[1] = rkvi_lanes_sum(lanes[1]);
}

static __device__ __forceinline__ bool rkvi_square_is_bad(float square)
{
    return !(square <= 1e36f); /* a NaN is bad too */
}

/* inv_norm of a tile's keys, also to s.a_inv: there 0 for tokens that redundancy does not see, so
 * that sums leave them out. Also loads n_queries queries. */
template <typename T>
static __device__ void rkvi_key_norms(const rkvi_args &args, const rkvi_job &job, int job_index,
                                      int tile, int n_queries, rkvi_tiles &s)
{
    float squares[2];
    rkvi_square_norms<T>(s, job.head_dim, job.key_load, rkvi_padded(n_queries), job.query_load,
                         squares);
    if (threadIdx.x % 4 == 0)
        for (int half = 0; half < 2; half++) {
            const int row = rkvi_quad_row() + 32 * half;
            const int token = tile * RKVI_TILE + row;
            const float inv = 1.0f / (sqrtf(squares[half]) + 1e-8f);
            s.a_inv[row] = token < rkvi_span(args, job) ? inv : 0.0f;
            if (token >= job.n_tokens) continue;
            job.inv_norm[token] = inv;
            job.exempt[token] = 0;
            if (rkvi_square_is_bad(squares[half]))
                rkvi_fault_at(args.control, RKVI_BAD_KEY, job_index, token);
        }
    __syncthreads();
}

/* Row pointers of the queries [first, first + 64) of a head, in the order [voter][group]. */
static __device__ void rkvi_query_rows(const rkvi_args &args, const rkvi_job &job, int n_queries,
                                       int first, const char **rows)
{
#pragma unroll 1
    for (int r = static_cast<int>(threadIdx.x); r < RKVI_TILE; r += RKVI_TILE_THREADS) {
        const int query = first + r < n_queries ? first + r : n_queries - 1;
        const int voter = query / job.group;
        rows[r] = rkvi_row(job.queries, rkvi_slot(args, job, voter)) +
                  (query - voter * job.group) * job.query_head_stride;
    }
}

template <typename T>
static __device__ void rkvi_check_queries(const rkvi_args &args, const rkvi_job &job, int job_index,
                                          int n_queries, rkvi_tiles &s)
{
    for (int first = 0; first < n_queries; first += RKVI_TILE) {
        float squares[2];
        rkvi_query_rows(args, job, n_queries, first, s.a_rows);
        rkvi_square_norms<T>(s, job.head_dim, job.query_load, 0, 0, squares);
        for (int half = 0; half < 2; half++) {
            const int query = first + rkvi_quad_row() + 32 * half;
            const int in_group = query % job.group, voter = query / job.group;
            if (query < n_queries && rkvi_square_is_bad(squares[half]))
                rkvi_fault_at(args.control, RKVI_BAD_QUERY, job_index,
                              in_group * args.votes + voter);
        }
    }
}

/* Adds the unit keys of a tile to the head's sum. A quad takes four columns and each of its threads
 * a quarter of the rows, in pairs 8 apart, so that the quad reads from different banks; at the end
 * each thread adds one column. */
template <typename T> static __device__ void rkvi_sum_unit_keys(const rkvi_job &job, rkvi_tiles &s)
{
    const int n_chunks = rkvi_chunks<T>(job.head_dim), part = static_cast<int>(threadIdx.x % 4);
    for (int chunk = 0; chunk < n_chunks; chunk++) {
        const int dims = rkvi_dims<T>(job.head_dim, chunk);
        if (n_chunks > 1)
            rkvi_stage<T>(s.a, s.a_rows, RKVI_TILE, job.head_dim, chunk, job.key_load);
        for (int base = 0; base < dims; base += RKVI_TILE_THREADS) {
            const int column = base + static_cast<int>(threadIdx.x / 4) * 4;
            const char *key = s.a + 2 * part * RKVI_PITCH + column * static_cast<int>(sizeof(T));
            const float *inv = s.a_inv + 2 * part;
            float sum[4] = { 0, 0, 0, 0 }, x[4];
            if (column < dims) {
#pragma unroll 4
                for (int i = 0; i < RKVI_TILE; i += 8)
#pragma unroll
                    for (int next = 0; next < 2; next++) {
                        rkvi_load4(x, reinterpret_cast<const T *>(key + (i + next) * RKVI_PITCH));
#pragma unroll
                        for (int k = 0; k < 4; k++) sum[k] = fmaf(x[k], inv[i + next], sum[k]);
                    }
            }
#pragma unroll
            for (int k = 0; k < 4; k++) {
                sum[k] += __shfl_xor_sync(0xffffffffu, sum[k], 1);
                sum[k] += __shfl_xor_sync(0xffffffffu, sum[k], 2);
            }
            const float mine = part == 0   ? sum[0]
                               : part == 1 ? sum[1]
                               : part == 2 ? sum[2]
                                           : sum[3];
            if (column + part < dims)
                rkvi_add_fixed(&job.unit_sum[chunk * rkvi_chunk_dims<T>() + column + part],
                               rkvi_to_fixed(mine));
        }
    }
}

/* Turns the dots of one key and n queries into logits with a soft cap. */
static __device__ void rkvi_softcap(float *dots, int n, float scale, float softcap)
{
#pragma unroll 1
    for (; n > 0; n--, dots += RKVI_DOTS_PITCH) *dots = softcap * tanhf(*dots * scale / softcap);
}
/* The largest of `fold` and the logits of one key and n queries. */
static __device__ __forceinline__ float rkvi_fold(const float *dots, int n, float scale, float fold)
{
    enum { AT_ONCE = 4 };
#pragma unroll 1
    for (; n >= AT_ONCE; n -= AT_ONCE, dots += AT_ONCE * RKVI_DOTS_PITCH)
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) fold = fmaxf(fold, dots[i * RKVI_DOTS_PITCH] * scale);
#pragma unroll 1
    for (; n > 0; n--, dots += RKVI_DOTS_PITCH) fold = fmaxf(fold, *dots * scale);
    return fold;
}

/* Candidates that a voter's query looks at: those up to its own token. */
static __device__ __forceinline__ int rkvi_seen(const rkvi_args &args, const rkvi_job &job,
                                                int voter)
{
    const int n = job.n_tokens - args.config.window;
    if (args.votes <= args.config.window) return n;
    const int seen = job.n_tokens - args.votes + voter + 1;
    return seen < n ? seen : n;
}

/* Takes the maximum over the group of 64 queries' dots, dots[query][key], into the logits of the
 * window's tokens. A thread has one key and every other token. It copies what it needs of the job
 * before the loop, since the compiler must assume that storing a logit changes the job. */
static __device__ void rkvi_fold_group(const rkvi_args &args, const rkvi_job &job, int job_index,
                                       int n_queries, int first, int tile, float *dots)
{
    const int n_tokens = job.n_tokens, group = job.group;
    const float softcap = job.softcap, scale = job.scale;
    const int key = static_cast<int>(threadIdx.x % RKVI_TILE), j = tile * RKVI_TILE + key;
    const int end = first + RKVI_TILE < n_queries ? first + RKVI_TILE : n_queries;
    const int token = first / group + static_cast<int>(threadIdx.x / RKVI_TILE);
    int group_begin = token * group;
    float *logit = job.logits + static_cast<int64_t>(token) * n_tokens + j;
    const int step = RKVI_TILE_THREADS / RKVI_TILE; /* tokens */
    if (j >= n_tokens - args.config.window) return;
    for (; group_begin < end; group_begin += step * group) {
        const int begin = first > group_begin ? first : group_begin;
        const int n = (end < group_begin + group ? end : group_begin + group) - begin;
        float *own = dots + (begin - first) * RKVI_DOTS_PITCH + key;
        float fold = begin > group_begin ? *logit : -INFINITY;
        if (softcap > 0) rkvi_softcap(own, n, scale, softcap);
        const float factor = softcap > 0 ? 1.0f : scale;
        fold = rkvi_fold(own, n, factor, fold);
        if (!(fabsf(fold) <= FLT_MAX) && j < rkvi_seen(args, job, group_begin / group))
            rkvi_fault_at(args.control, RKVI_BAD_LOGITS, job_index, RKVI_NO_ROW);
        *logit = fold;
        logit += static_cast<int64_t>(step) * n_tokens;
    }
}

/* The dots of a tile's keys and up to 64 queries, dots[query][key], in place of the keys. */
static __device__ __forceinline__ float *rkvi_store_dots(const float (*acc)[4], int n_blocks,
                                                         rkvi_tiles &s)
{
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    float *dots = reinterpret_cast<float *>(s.a);
    __syncthreads();
#pragma unroll
    for (int block = 0; block < 8; block++)
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (block < n_blocks)
                dots[rkvi_acc_column(lane, block, k) * RKVI_DOTS_PITCH + 16 * warp +
                     rkvi_acc_row(lane, k)] = acc[block][k];
    __syncthreads();
    return dots;
}

/* Logits of one tile of keys. *staged says which queries are in s.b, from tile to tile. */
template <typename T>
static __device__ void rkvi_logits(const rkvi_args &args, const rkvi_job &job, int job_index,
                                   int n_queries, int tile, int *staged, rkvi_tiles &s)
{
    const int n_chunks = rkvi_chunks<T>(job.head_dim);
    for (int first = 0; first < n_queries; first += RKVI_TILE) {
        const int left = n_queries - first, n_blocks = left < RKVI_TILE ? (left + 7) / 8 : 8;
        float acc[8][4] = { { 0 } };
        for (int chunk = 0; chunk < n_chunks; chunk++) {
            const int wanted = first / RKVI_TILE * n_chunks + chunk;
            if (n_chunks > 1 || first > 0)
                rkvi_stage<T>(s.a, s.a_rows, RKVI_TILE, job.head_dim, chunk, job.key_load);
            if (*staged != wanted) {
                rkvi_query_rows(args, job, n_queries, first, s.b_rows);
                rkvi_stage<T>(s.b, s.b_rows, (n_blocks + 1) / 2 * 16, job.head_dim, chunk,
                              job.query_load);
                *staged = wanted;
            }
            rkvi_dots(acc, s.a, s.b, rkvi_padded(rkvi_dims<T>(job.head_dim, chunk)), n_blocks, T{});
        }
        rkvi_fold_group(args, job, job_index, n_queries, first, tile,
                        rkvi_store_dots(acc, n_blocks, s));
    }
}

/* Row pointers of a tile of keys. */
static __device__ __forceinline__ void rkvi_key_rows(const rkvi_job &job, int tile,
                                                     const char **rows)
{
#pragma unroll 1
    for (int r = static_cast<int>(threadIdx.x); r < RKVI_TILE; r += RKVI_TILE_THREADS) {
        const int token = tile * RKVI_TILE + r;
        rows[r] =
            rkvi_row(job.moved[RKVI_KEYS].rows, token < job.n_tokens ? token : job.n_tokens - 1);
    }
}

template <typename T>
static __global__ void __launch_bounds__(RKVI_TILE_THREADS, RKVI_TILE_BLOCKS)
    rkvi_attend(const rkvi_args args)
{
    rkvi_tiles &s = *reinterpret_cast<rkvi_tiles *>(rkvi_shared_memory());
    const int64_t n_items = static_cast<int64_t>(args.n_jobs) * args.items;
    if (rkvi_is_unusable(args)) return;
    for (int64_t item = blockIdx.x; item < n_items; item += gridDim.x) {
        const rkvi_item at = rkvi_item_at(args, item);
        const int job_index = at.job;
        const rkvi_job &job = args.jobs[job_index];
        const int n_queries = args.importance ? args.votes * job.group : 0;
        const bool one_chunk = rkvi_chunks<T>(job.head_dim) == 1;
        int staged = -1;
        if (job.dtype != rkvi_dtype_of<T>::value || !job.scored) continue;
        if (at.part == 0) rkvi_check_queries<T>(args, job, job_index, n_queries, s);
        const int n_tiles = (job.n_tokens - 1) / RKVI_TILE + 1;
        for (int tile = at.part; tile < n_tiles; tile += args.items) {
            rkvi_key_rows(job, tile, s.a_rows);
            const int first_queries = n_queries < RKVI_TILE ? n_queries : RKVI_TILE;
            const bool with_queries = staged < 0 && n_queries > 0 && one_chunk;
            if (with_queries) {
                rkvi_query_rows(args, job, n_queries, 0, s.b_rows);
                staged = 0;
            }
            rkvi_key_norms<T>(args, job, job_index, tile, with_queries ? first_queries : 0, s);
            if (args.redundancy) rkvi_sum_unit_keys<T>(job, s);
            rkvi_logits<T>(args, job, job_index, n_queries, tile, &staged, s);
        }
    }
}

/* ---- Scores, from logits and redundancy: one block per head --------------------------------- */

/* The largest of some values, and the sum of exp(value - largest). No exponential is above 1. The
 * relative error of __expf grows as its result shrinks, so small terms have the large errors. */
struct rkvi_softmax {
    float largest, sum;
};
static __device__ __forceinline__ rkvi_softmax rkvi_softmax_of_none()
{
    const rkvi_softmax none = { -INFINITY, 0.0f };
    return none;
}

/* The largest value, or 0 if all are -INFINITY, so that -INFINITY is not subtracted from itself. */
static __device__ __forceinline__ float rkvi_origin(float largest)
{
    return largest > -INFINITY ? largest : 0.0f;
}
static __device__ __forceinline__ rkvi_softmax rkvi_merge(rkvi_softmax a, rkvi_softmax b)
{
    rkvi_softmax out;
    out.largest = fmaxf(a.largest, b.largest);
    const float origin = rkvi_origin(out.largest);
    out.sum = a.sum * __expf(a.largest - origin) + b.sum * __expf(b.largest - origin);
    return out;
}
/* Finds the largest first, so that each sum is rescaled once. */
static __device__ rkvi_softmax rkvi_merge_warp(rkvi_softmax s)
{
    rkvi_softmax out = s;
    for (int distance = 16; distance > 0; distance /= 2)
        out.largest = fmaxf(out.largest, __shfl_xor_sync(0xffffffffu, out.largest, distance));
    out.sum *= __expf(s.largest - rkvi_origin(out.largest));
    for (int distance = 16; distance > 0; distance /= 2)
        out.sum += __shfl_xor_sync(0xffffffffu, out.sum, distance);
    return out;
}
/* The softmax with N more values. */
template <int N>
static __device__ __forceinline__ rkvi_softmax rkvi_softmax_add(rkvi_softmax s, const float (&x)[N])
{
    rkvi_softmax out = s;
#pragma unroll
    for (int u = 0; u < N; u++) out.largest = fmaxf(out.largest, x[u]);
    const float origin = rkvi_origin(out.largest);
    out.sum *= __expf(s.largest - origin);
#pragma unroll
    for (int u = 0; u < N; u++) out.sum += __expf(x[u] - origin);
    return out;
}

/* There are few heads and their passes are short, so the latency of loads decides. A thread takes
 * several tokens at a time and loads for all of them before it stores: the compiler does not move a
 * load before a store. */
enum { RKVI_AT_ONCE = 3, RKVI_WEIGHTS_AT_ONCE = 8 };
template <int N>
static __device__ __forceinline__ void rkvi_load_each(float (&x)[N], const float *values, int first,
                                                      int end, int step, float otherwise)
{
#pragma unroll
    for (int u = 0; u < N; u++)
        x[u] = first + u * step < end ? values[first + u * step] : otherwise;
}
template <int N>
static __device__ __forceinline__ void rkvi_store_each(float *values, int first, int end, int step,
                                                       const float (&x)[N])
{
#pragma unroll
    for (int u = 0; u < N; u++)
        if (first + u * step < end) values[first + u * step] = x[u];
}

/* values[begin], [begin + step], ... */
static __device__ rkvi_softmax rkvi_softmax_of(const float *values, int begin, int end, int step)
{
    rkvi_softmax s = rkvi_softmax_of_none();
    float x[RKVI_WEIGHTS_AT_ONCE];
    for (int first = begin; first < end; first += RKVI_WEIGHTS_AT_ONCE * step) {
        rkvi_load_each(x, values, first, end, step, -INFINITY);
        s = rkvi_softmax_add(s, x);
    }
    return s;
}

/* values[begin], [begin + step], ...: logits to probabilities. */
static __device__ void rkvi_to_probabilities(float *values, int begin, int end, int step,
                                             rkvi_softmax whole)
{
    const float share = 1.0f / whole.sum;
    float x[RKVI_WEIGHTS_AT_ONCE];
    for (int first = begin; first < end; first += RKVI_WEIGHTS_AT_ONCE * step) {
        rkvi_load_each(x, values, first, end, step, 0.0f);
#pragma unroll
        for (int u = 0; u < RKVI_WEIGHTS_AT_ONCE; u++) x[u] = __expf(x[u] - whole.largest) * share;
        rkvi_store_each(values, first, end, step, x);
    }
}

struct rkvi_head_memory {
    rkvi_softmax warp[RKVI_HEAD_WARPS];
    unsigned bins[RKVI_BINS]; /* selection, from here on */
    unsigned warp_total[RKVI_HEAD_WARPS];
    unsigned digit, wanted, ties;
};

/* Logits to probabilities, in place; 0 for what a query does not see. A warp takes a part of the
 * row of one query. */
template <bool PLAIN>
static __device__ void rkvi_attention_weights(const rkvi_args &args, const rkvi_job &job,
                                              rkvi_head_memory &s)
{
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    const int n_rows = args.votes, n = job.n_tokens - args.config.window;
    const int at_once = n_rows < RKVI_HEAD_WARPS ? n_rows : RKVI_HEAD_WARPS;
    const int parts = RKVI_HEAD_WARPS / at_once, part = warp / at_once;
    const int begin = static_cast<int>(static_cast<int64_t>(n) * part / parts);
    const int end = static_cast<int>(static_cast<int64_t>(n) * (part + 1) / parts);
    for (int first = 0; first < n_rows; first += at_once) {
        const int row = first + warp % at_once;
        const bool busy = part < parts && row < n_rows;
        float *values = job.logits + static_cast<int64_t>(busy ? row : 0) * job.n_tokens;
        const int n_seen = PLAIN ? n : rkvi_seen(args, job, busy ? row : 0);
        const int last = PLAIN || end < n_seen ? end : n_seen;
        rkvi_softmax whole = rkvi_softmax_of_none();
        if (busy) whole = rkvi_softmax_of(values, begin + lane, last, 32);
        whole = rkvi_merge_warp(whole);
        if (lane == 0) s.warp[warp] = whole;
        __syncthreads();
        whole = s.warp[warp % at_once];
        for (int p = 1; p < parts; p++)
            whole = rkvi_merge(whole, s.warp[p * at_once + warp % at_once]);
        if (busy) rkvi_to_probabilities(values, begin + lane, last, 32, whole);
        for (int j = (begin > n_seen ? begin : n_seen) + lane; !PLAIN && busy && j < end; j += 32)
            values[j] = 0.0f;
        __syncthreads();
    }
}

/* Mean over the queries' rows, into the first of them. RKV_PUBLISHED: before max pooling. */
static __device__ void rkvi_mean_weights(const rkvi_args &args, const rkvi_job &job)
{
    const int n_tokens = job.n_tokens, n = n_tokens - args.config.window;
    float *logits = job.logits;
    for (int first = static_cast<int>(threadIdx.x); first < n;
         first += RKVI_AT_ONCE * RKVI_HEAD_THREADS) {
        float sum[RKVI_AT_ONCE] = { 0 }, x[RKVI_AT_ONCE];
#pragma unroll 2
        for (int row = 0; row < args.votes; row++) {
            const float *values = logits + static_cast<int64_t>(row) * n_tokens;
            rkvi_load_each(x, values, first, n, RKVI_HEAD_THREADS, 0.0f);
#pragma unroll
            for (int u = 0; u < RKVI_AT_ONCE; u++) sum[u] += x[u];
        }
#pragma unroll
        for (int u = 0; u < RKVI_AT_ONCE; u++) sum[u] /= static_cast<float>(args.votes);
        rkvi_store_each(logits, first, n, RKVI_HEAD_THREADS, sum);
    }
    __syncthreads();
}

/* sum[u] += the mean of row over the pooling range of token first + u * RKVI_HEAD_THREADS; what
 * lies outside counts as 0. */
static __device__ void rkvi_add_mean_pooled(const rkvi_args &args, const float *row, int first,
                                            int n, float *sum)
{
    const int below = args.config.pool / 2, above = (args.config.pool - 1) / 2;
    for (int u = 0; u < RKVI_AT_ONCE; u++) {
        const int j = first + u * RKVI_HEAD_THREADS;
        const int begin = j - below < 0 ? 0 : j - below,
                  end = above < n - 1 - j ? j + above : n - 1;
        float all = 0;
        for (int at = begin; at <= end; at++) all += row[at];
        sum[u] += all / static_cast<float>(args.config.pool);
    }
}

/* sum[u] += the maximum of row over the pooling range of token first + u * RKVI_HEAD_THREADS.
 * Beyond the n tokens it takes the outermost token, which is in every such range. */
static __device__ void rkvi_add_pooled(const rkvi_args &args, const float *row, int first, int n,
                                       float *sum)
{
    const int last = n - 1, below = args.config.pool / 2, above = (args.config.pool - 1) / 2;
    float largest[RKVI_AT_ONCE];
#pragma unroll
    for (int u = 0; u < RKVI_AT_ONCE; u++) largest[u] = -INFINITY;
#pragma unroll 2
    for (int offset = below < last ? -below : -last; offset <= above && offset <= last; offset++) {
#pragma unroll
        for (int u = 0; u < RKVI_AT_ONCE; u++) {
            const int j = first + u * RKVI_HEAD_THREADS;
            const int at = offset > last - j ? last : offset < -j ? 0 : j + offset;
            largest[u] = fmaxf(largest[u], row[at]);
        }
    }
#pragma unroll
    for (int u = 0; u < RKVI_AT_ONCE; u++) sum[u] += largest[u];
}
template <bool PLAIN>
static __device__ void rkvi_importance(const rkvi_args &args, const float *logits, int n_tokens,
                                       int first, float *importance)
{
    const int n = n_tokens - args.config.window;
    const bool mean_first = args.config.variant == RKV_PUBLISHED;
    const int n_rows = mean_first ? 1 : args.votes;
#pragma unroll
    for (int u = 0; u < RKVI_AT_ONCE; u++) importance[u] = 0;
    for (int row = 0; row < n_rows; row++) {
        const float *values = logits + static_cast<int64_t>(row) * n_tokens;
        if (!PLAIN && args.config.mean_pool)
            rkvi_add_mean_pooled(args, values, first, n, importance);
        else
            rkvi_add_pooled(args, values, first, n, importance);
    }
#pragma unroll
    for (int u = 0; u < RKVI_AT_ONCE; u++) importance[u] /= static_cast<float>(n_rows);
}

/* From dots with the sum of the unit keys to mean cosines; returns their softmax. */
static __device__ rkvi_softmax rkvi_mean_cosines(const rkvi_args &args, const rkvi_job &job,
                                                 rkvi_head_memory &s)
{
    const int n = rkvi_span(args, job);
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    const double share = 1.0 / n;
    const float *inv_norm = job.inv_norm;
    const long long *exempt = job.exempt;
    float *redundancy = job.redundancy;
    rkvi_softmax mine = rkvi_softmax_of_none();
    for (int first = static_cast<int>(threadIdx.x); first < n;
         first += RKVI_AT_ONCE * RKVI_HEAD_THREADS) {
        float inv[RKVI_AT_ONCE], dot[RKVI_AT_ONCE], mean[RKVI_AT_ONCE];
        long long fixed[RKVI_AT_ONCE];
        rkvi_load_each(inv, inv_norm, first, n, RKVI_HEAD_THREADS, 0.0f);
        rkvi_load_each(dot, redundancy, first, n, RKVI_HEAD_THREADS, 0.0f);
#pragma unroll
        for (int u = 0; u < RKVI_AT_ONCE; u++) {
            const int j = first + u * RKVI_HEAD_THREADS;
            fixed[u] = j < n ? exempt[j] : 0;
        }
#pragma unroll
        for (int u = 0; u < RKVI_AT_ONCE; u++) {
            /* The norm of the unit key: norm / (norm + 1e-8), 0 for a key of zeros. */
            const float length = 1.0f - 1e-8f * inv[u];
            const double others = static_cast<double>(dot[u]) - length * length;
            const bool is_there = first + u * RKVI_HEAD_THREADS < n;
            mean[u] = is_there ? static_cast<float>((others - rkvi_from_fixed(fixed[u])) * share)
                               : -INFINITY;
        }
        rkvi_store_each(redundancy, first, n, RKVI_HEAD_THREADS, mean);
        mine = rkvi_softmax_add(mine, mean);
    }
    const rkvi_softmax whole = rkvi_merge_warp(mine), none = rkvi_softmax_of_none();
    if (lane == 0) s.warp[warp] = whole;
    __syncthreads();
    return rkvi_merge_warp(lane < RKVI_HEAD_WARPS ? s.warp[lane] : none);
}

template <bool PLAIN>
static __device__ void rkvi_score_head(const rkvi_args &args, const rkvi_job &job,
                                       rkvi_head_memory &s)
{
    const float lambda = args.config.lambda;
    const int n_tokens = job.n_tokens, n = n_tokens - args.config.window;
    rkvi_softmax whole = { 0.0f, 1.0f };
    if (args.importance) {
        rkvi_attention_weights<PLAIN>(args, job, s);
        if (args.config.variant == RKV_PUBLISHED) rkvi_mean_weights(args, job);
    }
    if (args.redundancy) whole = rkvi_mean_cosines(args, job, s);
    const float share = (1.0f - lambda) / whole.sum;
    const float *logits = job.logits, *redundancy = job.redundancy, *bias = job.more.bias;
    float *scores = job.scores;
    for (int first = static_cast<int>(threadIdx.x); first < n;
         first += RKVI_AT_ONCE * RKVI_HEAD_THREADS) {
        float score[RKVI_AT_ONCE] = { 0 }, mean[RKVI_AT_ONCE];
        if (args.importance) rkvi_importance<PLAIN>(args, logits, n_tokens, first, score);
        if (args.redundancy) rkvi_load_each(mean, redundancy, first, n, RKVI_HEAD_THREADS, 0.0f);
#pragma unroll
        for (int u = 0; u < RKVI_AT_ONCE; u++) {
            if (args.importance) score[u] *= lambda;
            if (args.redundancy) score[u] -= share * __expf(mean[u] - whole.largest);
        }
        if (!PLAIN && bias) {
            rkvi_load_each(mean, bias, first, n, RKVI_HEAD_THREADS, 0.0f);
#pragma unroll
            for (int u = 0; u < RKVI_AT_ONCE; u++) score[u] += mean[u];
        }
        rkvi_store_each(scores, first, n, RKVI_HEAD_THREADS, score);
    }
    __syncthreads();
}

static __device__ void rkvi_select_set(const rkvi_args &args, const rkvi_job &job,
                                       rkvi_head_memory &s); /* room 17 */

/* PLAIN: no more votes than the window, max pooling, no biases. */
template <bool PLAIN>
static __global__ void __launch_bounds__(RKVI_HEAD_THREADS, RKVI_SM_THREADS / RKVI_HEAD_THREADS)
    rkvi_score(const rkvi_args args)
{
    rkvi_head_memory &s = *reinterpret_cast<rkvi_head_memory *>(rkvi_shared_memory());
    rkvi_report(args);
    if (rkvi_has_fault(args)) return;
    for (int64_t i = blockIdx.x; i < args.n_jobs; i += gridDim.x) {
        const rkvi_job &job = args.jobs[i];
        if (job.scored) rkvi_score_head<PLAIN>(args, job, s);
        if (args.select_too) rkvi_select_set(args, job, s);
    }
}

/* Shared scopes: the sum over a set's layers of the mean over each layer's heads. An item is
 * RKVI_HEAD_THREADS tokens of one set. */
static __global__ void __launch_bounds__(RKVI_HEAD_THREADS) rkvi_share(const rkvi_args args)
{
    const int64_t n_items = static_cast<int64_t>(args.n_jobs) * args.items;
    if (rkvi_has_fault(args)) return;
    for (int64_t item = blockIdx.x; item < n_items; item += gridDim.x) {
        const rkvi_item at = rkvi_item_at(args, item);
        const int first = at.job;
        const rkvi_job &set = args.jobs[first];
        const int64_t j = static_cast<int64_t>(at.part) * RKVI_HEAD_THREADS + threadIdx.x;
        float sum = 0;
        if (set.set_first != first || !set.scored) continue;
        if (j >= set.n_tokens - args.config.window) continue;
        for (int i = first; i < first + set.set_jobs; i += args.jobs[i].heads) {
            float of_layer = 0;
            for (int h = 0; h < args.jobs[i].heads; h++) of_layer += args.jobs[i + h].scores[j];
            sum += of_layer / static_cast<float>(args.jobs[i].heads);
        }
        set.set_scores[j] = sum;
    }
}

/* ==== 15. Similar keys ======================================================================
 * In: keys, inv_norm, unit_sum.  Out: redundancy (dot of each key with the sum), exempt.
 * Row i searches from the newest key back for its `recent` newest similar keys, first among 16
 * keys, then 64 at a time, and stops when it has them. Most rows stop in the first step. Rows that
 * still search after RKVI_NEAR_COLUMNS columns are left to a second, far scan, packed together or,
 * if a head has few of them, one by one.
 * An item is every args.items-th 64 rows of one head. */

/* The rows of a tile: tokens, pointers, norms. Tiles are counted from the newest key back. */
static __device__ void rkvi_scan_rows(const rkvi_args &args, const rkvi_job &job, int job_index,
                                      int tile, bool far_rows, rkvi_tiles &s)
{
    const int n_open = far_rows ? args.open_count[job_index] : 0;
#pragma unroll 1
    for (int r = static_cast<int>(threadIdx.x); r < RKVI_TILE; r += RKVI_TILE_THREADS) {
        const int64_t slot = static_cast<int64_t>(tile) * RKVI_TILE + r;
        int token = -1, need = 0;
        if (far_rows && slot < n_open) {
            token = job.open_rows[slot];
            need = job.open_need[slot];
        } else if (!far_rows && slot < rkvi_span(args, job)) {
            token = static_cast<int>(rkvi_span(args, job) - 1 - slot);
            need = args.config.recent;
        }
        s.a_token[r] = token;
        s.need[r] = need;
        s.a_rows[r] = rkvi_row(job.moved[RKVI_KEYS].rows, token < 0 ? 0 : token);
        s.a_inv[r] = token < 0 ? 0.0f : job.inv_norm[token];
    }
}

/* A step of the scan: the columns `newest`, newest - 1, ..., n of them (16 or 64). */
struct rkvi_columns {
    int newest, n;
};
static __device__ __forceinline__ rkvi_columns rkvi_columns_from(int n_span, int begin)
{
    const rkvi_columns out = { n_span - 1 - begin, begin == 0 ? RKVI_FIRST_COLUMNS : RKVI_TILE };
    return out;
}
/* Their pointers and norms. */
static __device__ void rkvi_scan_columns(const rkvi_job &job, rkvi_columns columns, rkvi_tiles &s)
{
#pragma unroll 1
    for (int r = static_cast<int>(threadIdx.x); r < RKVI_TILE; r += RKVI_TILE_THREADS) {
        const int token = r < columns.n && r <= columns.newest ? columns.newest - r : -1;
        s.b_rows[r] = rkvi_row(job.moved[RKVI_KEYS].rows, token < 0 ? 0 : token);
        s.b_inv[r] = token < 0 ? 0.0f : job.inv_norm[token];
    }
}

/* redundancy[i] = dot(sum of unit keys, unit key i). Leaves the last chunk of the rows in s.a and
 * the first chunk of n_columns columns in s.b. */
template <typename T>
static __device__ void rkvi_project(const rkvi_job &job, int n_columns, rkvi_tiles &s)
{
    const int part = static_cast<int>(threadIdx.x % 4), row = rkvi_quad_row();
    float lanes[2][4] = { { 0, 0, 0, 0 }, { 0, 0, 0, 0 } };
    for (int chunk = 0; chunk < rkvi_chunks<T>(job.head_dim); chunk++) {
        const int dims = rkvi_dims<T>(job.head_dim, chunk), padded = rkvi_padded(dims);
        rkvi_stage_begin<T>(s.a, s.a_rows, RKVI_TILE, job.head_dim, chunk, job.key_load);
        if (n_columns > 0)
            rkvi_stage_begin<T>(s.b, s.b_rows, n_columns, job.head_dim, 0, job.key_load);
        for (int i = static_cast<int>(threadIdx.x); i < padded; i += RKVI_TILE_THREADS)
            s.sum[i] = i < dims ? static_cast<float>(rkvi_from_fixed(
                                      job.unit_sum[chunk * rkvi_chunk_dims<T>() + i]))
                                : 0.0f;
        rkvi_stage_end();
        for (int i = 4 * part; i < padded; i += 16) {
            float x[4], y[4];
            rkvi_load4(y, s.sum + i);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                rkvi_load4(x,
                           reinterpret_cast<const T *>(s.a + (row + 32 * half) * RKVI_PITCH) + i);
#pragma unroll
                for (int k = 0; k < 4; k++) lanes[half][k] = fmaf(x[k], y[k], lanes[half][k]);
            }
        }
    }
    for (int half = 0; half < 2; half++) {
        const float dot = rkvi_lanes_sum(lanes[half]);
        const int token = s.a_token[row + 32 * half];
        if (part == 0 && token >= 0) job.redundancy[token] = dot * s.a_inv[row + 32 * half];
    }
}

/* Is one of this warp's rows still searching? Each row is read by the lane that writes it, since
 * __any_sync does not order memory. */
static __device__ __forceinline__ bool rkvi_is_searching(const rkvi_tiles &s)
{
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    return __any_sync(0xffffffffu, lane < 16 && s.need[16 * warp + lane] > 0);
}
/* False if none of a warp's dots with 64 columns can belong to a similar pair: skips such tiles at
 * less than half of the instructions. It scales by row and column one after the other, which may
 * round differently from rkvi_cosine. */
static __device__ __forceinline__ bool rkvi_may_be_similar(const float (*acc)[4],
                                                           const float *a_inv, const float *b_inv,
                                                           float limit)
{
    const float rounding = 1e-6f;
    bool may = false;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float largest = -INFINITY;
#pragma unroll
        for (int block = 0; block < RKVI_TILE / 8; block++)
#pragma unroll
            for (int k = 0; k < 2; k++)
                largest =
                    fmaxf(largest, acc[block][2 * half + k] * b_inv[rkvi_acc_column(0, block, k)]);
        may = may || largest * a_inv[half] > limit - rounding;
    }
    return __any_sync(0xffffffffu, may);
}

/* From dots with 8 * N_BLOCKS columns: for this lane's rows a bit for every column that may be
 * similar, and the cosine of the first of these. False if no lane of the warp has any. */
template <int N_BLOCKS>
static __device__ __forceinline__ bool rkvi_mark_candidates(const float (*acc)[4],
                                                            const rkvi_tiles &s, int first_row,
                                                            float limit, unsigned long long *bits,
                                                            float *first)
{
    const int lane = static_cast<int>(threadIdx.x % 32);
    const float *b_inv = s.b_inv + rkvi_acc_column(lane, 0, 0);
    unsigned marks[2][2] = { { 0, 0 }, { 0, 0 } }; /* of columns below 32 and the others */
    float a_inv[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = first_row + rkvi_acc_row(lane, 2 * half);
        const bool open = 8 * N_BLOCKS < RKVI_TILE || s.need[row] > 0; /* first step: all are */
        a_inv[half] = open ? s.a_inv[row] : 0.0f;                      /* 0: no candidates */
        first[half] = 0;
        bits[half] = 0;
    }
    if (8 * N_BLOCKS == RKVI_TILE && !rkvi_may_be_similar(acc, a_inv, b_inv, limit)) return false;
#pragma unroll
    for (int block = N_BLOCKS - 1; block >= 0; block--) /* backwards: the first is set last */
#pragma unroll
        for (int k = 1; k >= 0; k--)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int column = rkvi_acc_column(0, block, k);
                const float cosine =
                    rkvi_cosine(acc[block][2 * half + k], a_inv[half], b_inv[column]);
                if (!(cosine > limit)) continue;
                marks[half][column / 32] |= 1u << column % 32;
                first[half] = cosine;
            }
#pragma unroll
    for (int half = 0; half < 2; half++)
        bits[half] = static_cast<unsigned long long>(marks[half][1]) << 32 | marks[half][0];
    bits[0] <<= rkvi_acc_column(lane, 0, 0); /* to their columns: no bit leaves its byte */
    bits[1] <<= rkvi_acc_column(lane, 0, 0);
    return true;
}

/* The columns that a row is compared with: all that exist, without its own. */
static __device__ __forceinline__ unsigned long long rkvi_wanted_columns(const rkvi_args &args,
                                                                         const rkvi_tiles &s,
                                                                         int row,
                                                                         rkvi_columns columns)
{
    const int newest = columns.newest, last = newest < columns.n - 1 ? newest : columns.n - 1;
    const unsigned long long all = ~0ull >> (RKVI_TILE - 1 - last);
    const int own = newest - s.a_token[row];         /* in this step or not */
    const bool diagonal = args.config.threshold < 0; /* its cosine counts as 0: similar */
    return diagonal || own < 0 || own >= RKVI_TILE ? all : all & ~(1ull << own);
}

/* Dots of the rows with the columns; the columns that may be similar become candidates. */
template <typename T>
static __device__ void rkvi_find_candidates(const rkvi_args &args, const rkvi_job &job,
                                            rkvi_columns columns, bool rows_staged,
                                            bool columns_staged, rkvi_tiles &s)
{
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    const int n_chunks = rkvi_chunks<T>(job.head_dim);
    const float limit = args.config.threshold - rkvi_cosine_error<T>(job.head_dim);
    float acc[8][4] = { { 0 } }, first[2];
    unsigned long long bits[2];
    bool open = true, any;
    if (!columns_staged) rkvi_scan_columns(job, columns, s);
    for (int chunk = 0; chunk < n_chunks; chunk++) {
        if (!rows_staged)
            rkvi_stage_begin<T>(s.a, s.a_rows, RKVI_TILE, job.head_dim, chunk, job.key_load);
        if (!columns_staged) {
            rkvi_stage_begin<T>(s.b, s.b_rows, columns.n, job.head_dim, chunk, job.key_load);
            rkvi_stage_end();
        }
        open = columns.n < RKVI_TILE || rkvi_is_searching(s);
        if (open)
            rkvi_dots(acc, s.a, s.b, rkvi_padded(rkvi_dims<T>(job.head_dim, chunk)), columns.n / 8,
                      T{});
    }
    if (!open) return;
    if (columns.n == RKVI_TILE)
        any = rkvi_mark_candidates<RKVI_TILE / 8>(acc, s, 16 * warp, limit, bits, first);
    else
        any = rkvi_mark_candidates<RKVI_FIRST_COLUMNS / 8>(acc, s, 16 * warp, limit, bits, first);
    if (!any && lane < 16) s.candidates[16 * warp + lane] = 0;
#pragma unroll
    for (int half = 0; half < 2 && any; half++) {
        const int row = 16 * warp + rkvi_acc_row(lane, 2 * half);
        const unsigned long long wanted = rkvi_wanted_columns(args, s, row, columns);
        const unsigned long long mine = bits[half], mine_first = mine & (0 - mine);
        unsigned long long all = mine;
        all |= __shfl_xor_sync(0xffffffffu, all, 1);
        all |= __shfl_xor_sync(0xffffffffu, all, 2);
        all &= wanted;
        const int owner = (__ffsll(static_cast<long long>(all)) + 7) % 8 / 2; /* in the quad */
        const float cosine = __shfl_sync(0xffffffffu, mine_first & wanted ? first[half] : -INFINITY,
                                         lane / 4 * 4 + owner);
        if (lane % 4 == 0) {
            s.candidates[row] = all;
            s.first[row] = cosine;
        }
    }
    __syncwarp();
}

/* Cosine of row r of a with row c of b, rounded as on the CPU. */
template <typename T>
static __device__ float rkvi_exact_cosine(const rkvi_job &job, const rkvi_tiles &s, int r, int c)
{
    float dot;
    if (rkvi_chunks<T>(job.head_dim) == 1)
        dot = rkvi_chain_dot(reinterpret_cast<const T *>(s.a + r * RKVI_PITCH),
                             reinterpret_cast<const T *>(s.b + c * RKVI_PITCH),
                             rkvi_padded(job.head_dim), true);
    else
        dot = rkvi_chain_dot_global<T>(s.a_rows[r], s.b_rows[c], job.head_dim, job.key_load);
    return rkvi_cosine(dot, s.a_inv[r], s.b_inv[c]);
}

/* Adds a cosine to exempt[token] if a thread `adds`; called by whole warps. Most rows of a head
 * have the same newest similar key, and additions to one address wait for each other in the L2. So
 * all that agree with the warp's first are added as one. */
static __device__ void rkvi_exempt(const rkvi_job &job, bool adds, int token, float cosine)
{
    const unsigned all = __ballot_sync(0xffffffffu, adds);
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int leader = all ? __ffs(static_cast<int>(all)) - 1 : 0;
    const int common = __shfl_sync(0xffffffffu, token, leader);
    const long long mine = adds ? rkvi_to_fixed(cosine) : 0;
    long long sum = token == common ? mine : 0;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (adds && lane == leader)
        rkvi_add_fixed(&job.exempt[common], sum);
    else if (adds && token != common)
        rkvi_add_fixed(&job.exempt[token], mine);
}

/* Above this, a cosine from rkvi_dots is certainly of a similar key and close enough to the CPU's.
 * Truncation errors add up with the dims, and all rows may exempt the same token. */
template <typename T>
static __device__ __forceinline__ float rkvi_trusted_above(const rkvi_args &args, int head_dim)
{
    const float band = rkvi_cosine_error<T>(head_dim);
    return band > 0 && head_dim > RKVI_TRUSTED_DIMS ? INFINITY : args.config.threshold + band;
}

/* Decides the candidates of this warp's 16 rows, newest first; each of its first 16 threads takes a
 * row. True if the thread's row still needs similar keys. */
template <typename T>
static __device__ bool rkvi_decide_candidates(const rkvi_args &args, const rkvi_job &job,
                                              int newest, rkvi_tiles &s)
{
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    const int row = 16 * warp + lane % 16;
    int need = lane < 16 ? s.need[row] : 0;
    unsigned long long bits = need > 0 ? s.candidates[row] : 0;
    float known = bits ? s.first[row] : 0; /* from rkvi_dots */
    const float trusted = rkvi_trusted_above<T>(args, job.head_dim);
    while (__any_sync(0xffffffffu, bits != 0)) {
        const int column = bits ? __ffsll(static_cast<long long>(bits)) - 1 : 0;
        const int token = newest - column;
        float cosine = 0; /* the diagonal's */
        if (bits && token != s.a_token[row])
            cosine = known > trusted ? known : rkvi_exact_cosine<T>(job, s, row, column);
        known = -INFINITY;
        const bool hit = bits && cosine > args.config.threshold;
        const bool of_column = args.config.variant == RKV_PUBLISHED;
        rkvi_exempt(job, hit, of_column ? token : s.a_token[row], cosine);
        bits &= bits - 1;
        if (hit && --need == 0) bits = 0;
    }
    if (lane < 16) s.need[row] = need;
    return need > 0;
}

/* Puts the rows that are still searching on the list of the far scan. */
static __device__ void rkvi_defer_rows(const rkvi_args &args, const rkvi_job &job, int job_index,
                                       const rkvi_tiles &s)
{
#pragma unroll 1
    for (int r = static_cast<int>(threadIdx.x); r < RKVI_TILE; r += RKVI_TILE_THREADS) {
        if (s.need[r] == 0) continue;
        const int slot = atomicAdd(&args.open_count[job_index], 1);
        job.open_rows[slot] = s.a_token[r];
        job.open_need[slot] = s.need[r];
    }
}

/* RKV_PUBLISHED: a row that has no similar key exempts the first token. Each thread of the first
 * two warps takes a row. */
template <typename T>
static __device__ void rkvi_exempt_first_token(const rkvi_args &args, const rkvi_job &job,
                                               rkvi_tiles &s)
{
    const int row = static_cast<int>(threadIdx.x);
    if (row >= RKVI_TILE) return; /* whole warps */
    const int token = s.a_token[row];
    const bool found_none = s.need[row] == args.config.recent && token > 0;
    float cosine = 0;
    if (found_none)
        cosine = rkvi_cosine(rkvi_chain_dot_global<T>(s.a_rows[row],
                                                      rkvi_row(job.moved[RKVI_KEYS].rows, 0),
                                                      job.head_dim, job.key_load),
                             s.a_inv[row], job.inv_norm[0]);
    rkvi_exempt(job, found_none, 0, cosine);
}

template <typename T>
static __device__ void rkvi_scan_tile(const rkvi_args &args, const rkvi_job &job, int job_index,
                                      int tile, bool far_rows, rkvi_tiles &s)
{
    const int n_span = rkvi_span(args, job), begin = far_rows ? RKVI_NEAR_COLUMNS : 0;
    const int end = far_rows || n_span < RKVI_NEAR_COLUMNS ? n_span : RKVI_NEAR_COLUMNS;
    const bool one_chunk = rkvi_chunks<T>(job.head_dim) == 1;
    int open = 1;
    rkvi_scan_rows(args, job, job_index, tile, far_rows, s);
    if (!far_rows) {
        if (one_chunk) rkvi_scan_columns(job, rkvi_columns_from(n_span, 0), s);
        rkvi_project<T>(job, one_chunk ? RKVI_FIRST_COLUMNS : 0, s);
    }
    for (int column = begin; column < end && open;) {
        const rkvi_columns columns = rkvi_columns_from(n_span, column);
        const bool first = column == begin;
        rkvi_find_candidates<T>(args, job, columns, one_chunk && !(first && far_rows),
                                one_chunk && first && !far_rows, s);
        open = __syncthreads_or(rkvi_decide_candidates<T>(args, job, columns.newest, s));
        column += columns.n;
    }
    if (!open) return;
    if (end < n_span)
        rkvi_defer_rows(args, job, job_index, s);
    else if (args.config.variant == RKV_PUBLISHED)
        rkvi_exempt_first_token<T>(args, job, s);
}

/* The exact dot of a key in global memory, aligned to `load` bytes, with shared floats. */
template <typename T>
static __device__ float rkvi_chain_dot_floats(const char *key, const float *row, int head_dim,
                                              int load)
{
    const T *x = reinterpret_cast<const T *>(key);
    const int step = 16 / static_cast<int>(sizeof(T));
    const int whole = load == 16 ? head_dim / step * step : 0;
    float sum = 0.0f;
#pragma unroll 4 /* loads in flight */
    for (int i = 0; i < whole; i += step) {
        float piece[step], y[4];
        rkvi_load_piece(piece, x + i);
#pragma unroll
        for (int k = 0; k < step; k++) {
            if (k % 4 == 0) rkvi_load4(y, row + i + k);
            sum = fmaf(piece[k], y[k % 4], sum);
        }
    }
    for (int i = whole; i < head_dim; i++) sum = fmaf(rkvi_to_float(x[i]), row[i], sum);
    return sum;
}

template <>
__device__ float rkvi_chain_dot_floats<rkvi_any>(const char *key, const float *row, int head_dim,
                                                 int load)
{
    float sum = 0.0f;
    for (int i = 0; i < head_dim; i++) sum = fmaf(rkvi_load_any(key, i, load), row[i], sum);
    return sum;
}

/* Number i of a key. */
template <typename T> static __device__ float rkvi_number(const char *key, int i, int)
{
    return rkvi_to_float(reinterpret_cast<const T *>(key)[i]);
}
template <> __device__ float rkvi_number<rkvi_any>(const char *key, int i, int load)
{
    return rkvi_load_any(key, i, load);
}

/* How many threads of the block before this one have a similar key; *all: how many of all. */
static __device__ int rkvi_rank(bool is_similar, rkvi_tiles &s, int *all)
{
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    const unsigned votes = __ballot_sync(0xffffffffu, is_similar);
    int rank = __popc(votes & ((1u << lane) - 1));
    if (lane == 0) s.need[warp] = __popc(votes);
    __syncthreads();
    *all = 0;
#pragma unroll
    for (int w = 0; w < RKVI_TILE_THREADS / 32; w++) {
        if (w < warp) rank += s.need[w];
        *all += s.need[w];
    }
    return rank;
}

/* One row of the far scan on a whole block: each thread compares it with a column, in every step
 * the next older ones. In most heads of real models one row searches to the end, the first
 * token's; a tile of 64 rows for its sake would execute a chain three times as long. Rows need no
 * barrier between them: the last step's first barrier comes after all uses of the floats. */
template <typename T>
static __device__ void rkvi_scan_row(const rkvi_args &args, const rkvi_job &job, int slot,
                                     rkvi_tiles &s)
{
    const rkvi_view &keys = job.moved[RKVI_KEYS].rows;
    const bool published = args.config.variant == RKV_PUBLISHED;
    const int row = job.open_rows[slot];
    const char *key = rkvi_row(keys, row);
    float *floats = reinterpret_cast<float *>(s.a), cosine = 0;
    int need = job.open_need[slot], n_found, column = -1;
    for (int i = static_cast<int>(threadIdx.x); i < job.head_dim; i += RKVI_TILE_THREADS)
        floats[i] = rkvi_number<T>(key, i, job.key_load);
    __syncthreads();
    for (int newest = rkvi_span(args, job) - 1 - RKVI_NEAR_COLUMNS; newest >= 0 && need > 0;
         newest -= RKVI_TILE_THREADS) {
        column = newest - static_cast<int>(threadIdx.x);
        cosine = 0; /* the diagonal's */
        if (column >= 0 && column != row)
            cosine = rkvi_cosine(rkvi_chain_dot_floats<T>(rkvi_row(keys, column), floats,
                                                          job.head_dim, job.key_load),
                                 job.inv_norm[row], job.inv_norm[column]);
        const bool is_similar = column >= 0 && cosine > args.config.threshold;
        if (!__syncthreads_or(is_similar)) continue;
        const int rank = rkvi_rank(is_similar, s, &n_found);
        rkvi_exempt(job, is_similar && rank < need, published ? column : row, cosine);
        need -= n_found;
    }
    if (published && need == args.config.recent && column == 0 && row > 0) /* found none */
        rkvi_add_fixed(&job.exempt[0], rkvi_to_fixed(cosine));
}

/* The last jobs first: their keys are still in the L2 from the attention pass. */
template <typename T> static __device__ void rkvi_scan(const rkvi_args &args, bool far_rows)
{
    rkvi_tiles &s = *reinterpret_cast<rkvi_tiles *>(rkvi_shared_memory());
    const int64_t n_items = static_cast<int64_t>(args.n_jobs) * args.items;
    if (rkvi_has_fault(args)) return;
    for (int64_t i = blockIdx.x; i < n_items; i += gridDim.x) {
        const rkvi_item at = rkvi_item_at(args, n_items - 1 - i);
        const rkvi_job &job = args.jobs[at.job];
        if (far_rows && args.open_count[at.job] == 0) continue; /* the usual case */
        if (job.dtype != rkvi_dtype_of<T>::value || !job.scored) continue;
        const int n_rows = far_rows ? args.open_count[at.job] : rkvi_span(args, job);
        if (far_rows && n_rows <= RKVI_FEW_ROWS) {
            for (int slot = at.part; slot < n_rows; slot += args.items)
                rkvi_scan_row<T>(args, job, slot, s);
            continue;
        }
        /* No barrier between tiles: after the last barrier of a tile a thread reads only its own
         * row of s, which it overwrites itself. */
        for (int64_t tile = at.part; tile * RKVI_TILE < n_rows; tile += args.items)
            rkvi_scan_tile<T>(args, job, at.job, static_cast<int>(tile), far_rows, s);
    }
}
template <typename T>
static __global__ void __launch_bounds__(RKVI_TILE_THREADS, RKVI_TILE_BLOCKS)
    rkvi_scan_near(const rkvi_args args)
{
    rkvi_scan<T>(args, false);
}
template <typename T>
static __global__ void __launch_bounds__(RKVI_TILE_THREADS, RKVI_FAR_BLOCKS)
    rkvi_scan_far(const rkvi_args args)
{
    rkvi_scan<T>(args, true);
}

/* ==== 16. Other policies ====================================================================
 * In: a head's keys, queries, carried state or query means.  Out: a score for each candidate, and
 * the state after this round. Formulas: rkv_policy.
 * rkvi_vote     keys and queries to importance, in two passes: what a query gives all keys must be
 *               known before what it gives one. The dots are computed twice, not stored.
 * rkvi_prepare  between the passes, and before rkvi_expect
 * rkvi_compare  keys before rotary embedding with the new ones: the similarity to later keys
 * rkvi_expect   keys with expected queries
 * rkvi_rate     all of that to scores; the only one that writes the caller's state */

/* ---- Votes: an item is every args.items-th tile of 64 keys of one head ----------------------- */

/* inv_norm of a tile's keys, and faults. */
template <typename T>
static __device__ void rkvi_vote_norms(const rkvi_args &args, const rkvi_job &job, int job_index,
                                       int tile, rkvi_tiles &s)
{
    float squares[2];
    rkvi_square_norms<T>(s, job.head_dim, job.key_load, 0, 0, squares);
    if (threadIdx.x % 4 != 0) return;
    for (int half = 0; half < 2; half++) {
        const int token = tile * RKVI_TILE + rkvi_quad_row() + 32 * half;
        if (token >= job.n_tokens) continue;
        job.inv_norm[token] = 1.0f / (sqrtf(squares[half]) + 1e-8f);
        if (rkvi_square_is_bad(squares[half]))
            rkvi_fault_at(args.control, RKVI_BAD_KEY, job_index, token);
    }
}

/* Dots of the tile's keys with the queries [first, first + 64), dots[query][key]. */
template <typename T>
static __device__ float *rkvi_query_dots(const rkvi_args &args, const rkvi_job &job, int n_queries,
                                         int first, rkvi_tiles &s)
{
    const int left = n_queries - first, n_blocks = left < RKVI_TILE ? (left + 7) / 8 : 8;
    float acc[8][4] = { { 0 } };
    rkvi_query_rows(args, job, n_queries, first, s.b_rows);
    for (int chunk = 0; chunk < rkvi_chunks<T>(job.head_dim); chunk++) {
        rkvi_stage_begin<T>(s.a, s.a_rows, RKVI_TILE, job.head_dim, chunk, job.key_load);
        rkvi_stage_begin<T>(s.b, s.b_rows, (n_blocks + 1) / 2 * 16, job.head_dim, chunk,
                            job.query_load);
        rkvi_stage_end();
        rkvi_dots(acc, s.a, s.b, rkvi_padded(rkvi_dims<T>(job.head_dim, chunk)), n_blocks, T{});
    }
    return rkvi_store_dots(acc, n_blocks, s);
}

static __device__ __forceinline__ float rkvi_logit(const rkvi_job &job, float dot)
{
    const float logit = dot * job.scale;
    return job.softcap > 0 ? job.softcap * tanhf(logit / job.softcap) : logit;
}
/* The row of a query's own token. */
static __device__ __forceinline__ int rkvi_query_token(const rkvi_job &job, int query)
{
    return job.n_tokens - job.more.n_voters + query / job.group;
}

/* First pass: for each query the largest logit of the tile, and the sum of the exponentials. Two
 * threads take a query; each starts at another key, so that they read from different banks. */
static __device__ void rkvi_sum_votes(const rkvi_args &args, const rkvi_job &job, int job_index,
                                      int n_queries, int first, int tile, float *dots)
{
    const int thread = static_cast<int>(threadIdx.x), half = thread % 2, turn = thread / 2;
    const int query = first + turn, key = tile * RKVI_TILE + 32 * half;
    const bool is_there = query < n_queries;
    const int seen = is_there ? rkvi_query_token(job, query) - key + 1 : 0; /* of 32 keys */
    float *own = dots + turn * RKVI_DOTS_PITCH + 32 * half;
    rkvi_softmax mine = rkvi_softmax_of_none(), other;
    bool bad = false;
    for (int k = 0; k < 32; k++) {
        const int at = (k + turn) % 32;
        if (at >= seen) continue;
        const float logit = rkvi_logit(job, own[at]);
        bad = bad || !(fabsf(logit) <= FLT_MAX);
        mine.largest = fmaxf(mine.largest, logit);
        own[at] = logit;
    }
    for (int k = 0; k < 32; k++) {
        const int at = (k + turn) % 32;
        if (at < seen) mine.sum += __expf(own[at] - rkvi_origin(mine.largest));
    }
    if (bad) rkvi_fault_at(args.control, RKVI_BAD_LOGITS, job_index, RKVI_NO_ROW);
    other.largest = __shfl_xor_sync(0xffffffffu, mine.largest, 1);
    other.sum = __shfl_xor_sync(0xffffffffu, mine.sum, 1);
    mine = half ? rkvi_merge(other, mine) : rkvi_merge(mine, other);
    if (half || !is_there) return;
    float *out = job.more.sums + 2 * (static_cast<int64_t>(tile) * n_queries + query);
    out[0] = mine.largest;
    out[1] = mine.sum;
}

/* Second pass: adds the votes of 64 queries to what a key has of earlier ones: the largest, or the
 * sum. A thread has one key and every other query. */
static __device__ float rkvi_fold_votes(const rkvi_args &args, const rkvi_job &job, int n_queries,
                                        int first, int tile, const float *dots, float folded)
{
    const bool sums = args.config.policy == RKV_POLICY_H2O; /* else: its own row has no vote */
    const int key = static_cast<int>(threadIdx.x % RKVI_TILE), j = tile * RKVI_TILE + key;
    const int n_tiles = (job.n_tokens - 1) / RKVI_TILE + 1;
    const int end = first + RKVI_TILE < n_queries ? first + RKVI_TILE : n_queries;
    const float *whole = job.more.sums + 2 * static_cast<int64_t>(n_tiles) * n_queries;
    for (int query = first + static_cast<int>(threadIdx.x / RKVI_TILE); query < end;
         query += RKVI_TILE_THREADS / RKVI_TILE) {
        if (j >= rkvi_query_token(job, query) + sums) continue;
        const float logit = rkvi_logit(job, dots[(query - first) * RKVI_DOTS_PITCH + key]);
        const float vote = __expf(logit - whole[2 * query]) * whole[2 * query + 1];
        folded = sums ? folded + vote : fmaxf(folded, vote);
    }
    return folded;
}

template <typename T>
static __device__ void rkvi_vote_tile(const rkvi_args &args, const rkvi_job &job, int job_index,
                                      int tile, rkvi_tiles &s)
{
    const int n_queries = job.more.n_voters * job.group, thread = static_cast<int>(threadIdx.x);
    const int j = tile * RKVI_TILE + thread;
    float folded = 0;
    for (int first = 0; first < n_queries; first += RKVI_TILE) {
        float *dots = rkvi_query_dots<T>(args, job, n_queries, first, s);
        if (args.folds)
            folded = rkvi_fold_votes(args, job, n_queries, first, tile, dots, folded);
        else
            rkvi_sum_votes(args, job, job_index, n_queries, first, tile, dots);
    }
    if (!args.folds) return;
    s.sum[thread] = folded;
    __syncthreads();
    if (thread >= RKVI_TILE || j >= job.n_tokens) return;
    const float other = s.sum[thread + RKVI_TILE];
    job.logits[j] = args.config.policy == RKV_POLICY_H2O ? folded + other : fmaxf(folded, other);
}

template <typename T>
static __global__ void __launch_bounds__(RKVI_TILE_THREADS, RKVI_TILE_BLOCKS)
    rkvi_vote(const rkvi_args args)
{
    rkvi_tiles &s = *reinterpret_cast<rkvi_tiles *>(rkvi_shared_memory());
    const int64_t n_items = static_cast<int64_t>(args.n_jobs) * args.items;
    if (args.folds ? rkvi_has_fault(args) : rkvi_is_unusable(args)) return;
    for (int64_t item = blockIdx.x; item < n_items; item += gridDim.x) {
        const rkvi_item at = rkvi_item_at(args, item);
        const rkvi_job &job = args.jobs[at.job];
        const int n_queries = job.scored ? job.more.n_voters * job.group : 0;
        if (job.dtype != rkvi_dtype_of<T>::value || !job.scored) continue;
        if (at.part == 0 && !args.folds) rkvi_check_queries<T>(args, job, at.job, n_queries, s);
        const int n_tiles = (job.n_tokens - 1) / RKVI_TILE + 1;
        for (int tile = at.part; tile < n_tiles; tile += args.items) {
            rkvi_key_rows(job, tile, s.a_rows);
            if (!args.folds) rkvi_vote_norms<T>(args, job, at.job, tile, s);
            rkvi_vote_tile<T>(args, job, at.job, tile, s);
        }
    }
}

/* ---- Rotary embedding ------------------------------------------------------------------------ */

/* sin and cos of an angle in units of 2^-32 revolutions, as in rkv.h. */
static __device__ __forceinline__ void rkvi_sincos(uint32_t phase, float *sine, float *cosine)
{
    const uint32_t eighth = 0x20000000u, shifted = phase + eighth;
    const float x = static_cast<float>(static_cast<int32_t>((shifted & 0x3fffffffu) - eighth)) *
                    1.46291807926715968e-9f; /* 2 pi / 2^32 */
    const float square = x * x;
    float s = fmaf(fmaf(-1.9515295891e-4f, square, 8.3321608736e-3f), square, -1.6666654611e-1f);
    float c = fmaf(fmaf(2.443315711809948e-5f, square, -1.388731625493765e-3f), square,
                   4.166664568298827e-2f);
    s = fmaf(s * square, x, x);
    c = fmaf(c, square * square, fmaf(square, -0.5f, 1.0f));
    *sine = shifted & 0x40000000u ? c : s;
    *cosine = shifted & 0x40000000u ? s : c;
    if (shifted & 0x80000000u) *sine = -*sine;
    if ((shifted + 0x40000000u) & 0x80000000u) *cosine = -*cosine;
}
static __device__ __forceinline__ uint32_t rkvi_phase(long long turns, uint32_t position)
{
    return static_cast<uint32_t>(static_cast<unsigned long long>(turns) * position >> 32);
}

/* Where the numbers of a pair lie in a row. Behind those that are turned, any two adjacent numbers
 * are a pair; of an odd number of dims the last has one. */
static __device__ __forceinline__ int rkvi_first_of(int pair, int n_rotated, int adjacent)
{
    return pair < n_rotated && !adjacent ? pair : 2 * pair;
}
static __device__ __forceinline__ int rkvi_second_of(int pair, int n_rotated, int adjacent)
{
    return pair < n_rotated && !adjacent ? pair + n_rotated : 2 * pair + 1;
}
struct rkvi_pair {
    float x, y;
};
/* The same for a job, to be found before a loop over rows; second is -1 where there is none. */
struct rkvi_pair_place {
    int first, second;
};
static __device__ __forceinline__ rkvi_pair_place rkvi_place_of(const rkvi_job &job, int pair)
{
    rkvi_pair_place at;
    at.first = rkvi_first_of(pair, job.more.n_rotated, job.more.adjacent);
    at.second = rkvi_second_of(pair, job.more.n_rotated, job.more.adjacent);
    if (at.second >= job.head_dim) at.second = -1;
    return at;
}
template <typename T>
static __device__ __forceinline__ rkvi_pair rkvi_load_pair(const char *row, rkvi_pair_place at,
                                                           int load)
{
    rkvi_pair out;
    out.x = rkvi_number<T>(row, at.first, load);
    out.y = at.second >= 0 ? rkvi_number<T>(row, at.second, load) : 0.0f;
    return out;
}

/* ---- Later keys: an item is every args.items-th tile of 64 rows of one head ------------------ */

enum {
    RKVI_CHUNK_PAIRS = RKVI_CHUNK_BYTES / 8, /* as floats                                      */
    RKVI_COMPARE_TILES = 2                   /* of new keys that meet a chunk of rows at a time */
};

/* A chunk of the rows [first, first + 64) before rotary embedding, to a tile: the first numbers of
 * its pairs, then the second ones, padded to an even number of pairs. A warp takes a row at a time.
 * Beyond the last row: any other row. */
template <typename T>
static __device__ void rkvi_stage_unrotated(char *tile, const rkvi_job &job, int first, int chunk)
{
    const int lane = static_cast<int>(threadIdx.x % 32), pair = chunk * RKVI_CHUNK_PAIRS + lane;
    const int left = rkvi_n_pairs(job.head_dim) - chunk * RKVI_CHUNK_PAIRS;
    const int padded = left < RKVI_CHUNK_PAIRS ? (left + 1) & ~1 : +RKVI_CHUNK_PAIRS;
    const long long turns = lane < left ? job.unit_sum[pair] : 0;
    const rkvi_pair_place at = rkvi_place_of(job, pair);
    const rkvi_view keys = job.moved[RKVI_KEYS].rows; /* copies: a store may change the job */
    const int32_t *positions = job.more.n_rotated ? job.more.positions : NULL;
    const int last = job.n_tokens - 1, load = job.key_load;
    float *to = reinterpret_cast<float *>(tile) + lane;
    if (lane >= padded) return;
#pragma unroll 2
    for (int r = static_cast<int>(threadIdx.x / 32); r < RKVI_TILE; r += RKVI_TILE_THREADS / 32) {
        const int token = first + r < last ? first + r : last;
        const uint32_t position = positions ? static_cast<uint32_t>(positions[token]) : 0;
        rkvi_pair p = { 0, 0 };
        float sine, cosine;
        if (lane < left) p = rkvi_load_pair<T>(rkvi_row(keys, token), at, load);
        rkvi_sincos(rkvi_phase(turns, position), &sine, &cosine);
        to[r * (RKVI_PITCH / 4)] = fmaf(p.x, cosine, p.y * sine);
        to[r * (RKVI_PITCH / 4) + padded] = fmaf(p.y, cosine, -(p.x * sine));
    }
}

/* best[2]: of this lane's two rows the largest cosine with a later row among 64, from dots. */
static __device__ void rkvi_fold_later(const rkvi_job &job, const float (*acc)[4], int first_row,
                                       int first_column, float *best)
{
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = first_row + 16 * warp + rkvi_acc_row(lane, 2 * half);
        const float inv = row < job.n_tokens ? job.inv_norm[row] : 0.0f;
#pragma unroll
        for (int block = 0; block < 8; block++)
#pragma unroll
            for (int k = 0; k < 2; k++) {
                const int column = first_column + rkvi_acc_column(lane, block, k);
                if (column > row && column < job.n_tokens)
                    best[half] = fmaxf(best[half], rkvi_cosine(acc[block][2 * half + k], inv,
                                                               job.inv_norm[column]));
            }
    }
}

template <typename T>
static __device__ void rkvi_compare_tile(const rkvi_job &job, int tile, rkvi_tiles &s)
{
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    const int n = job.n_tokens, first_row = tile * RKVI_TILE, first_new = n - job.more.n_new;
    const int n_pairs = rkvi_n_pairs(job.head_dim), step = RKVI_COMPARE_TILES * RKVI_TILE;
    float best[2] = { 0, 0 }; /* no similarity is below 0 */
    for (int begin = first_row > first_new ? first_row : first_new; begin < n; begin += step) {
        float acc[RKVI_COMPARE_TILES][8][4] = { { { 0 } } };
        for (int chunk = 0; chunk * RKVI_CHUNK_PAIRS < n_pairs; chunk++) {
            const int left = n_pairs - chunk * RKVI_CHUNK_PAIRS;
            const int dims = 2 * (left < RKVI_CHUNK_PAIRS ? (left + 1) & ~1 : +RKVI_CHUNK_PAIRS);
            __syncthreads();
            rkvi_stage_unrotated<T>(s.a, job, first_row, chunk);
#pragma unroll
            for (int u = 0; u < RKVI_COMPARE_TILES; u++) {
                if (begin + u * RKVI_TILE >= n) continue;
                if (u > 0) __syncthreads();
                rkvi_stage_unrotated<T>(s.b, job, begin + u * RKVI_TILE, chunk);
                __syncthreads();
                rkvi_dots_fma<float>(acc[u], s.a, s.b, dims, 8);
            }
        }
#pragma unroll
        for (int u = 0; u < RKVI_COMPARE_TILES; u++)
            rkvi_fold_later(job, acc[u], first_row, begin + u * RKVI_TILE, best);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = first_row + 16 * warp + rkvi_acc_row(lane, 2 * half);
        best[half] = fmaxf(best[half], __shfl_xor_sync(0xffffffffu, best[half], 1));
        best[half] = fmaxf(best[half], __shfl_xor_sync(0xffffffffu, best[half], 2));
        if (lane % 4 == 0 && row < n) job.redundancy[row] = best[half];
    }
}

template <typename T>
static __global__ void __launch_bounds__(RKVI_TILE_THREADS, RKVI_FAR_BLOCKS)
    rkvi_compare(const rkvi_args args)
{
    rkvi_tiles &s = *reinterpret_cast<rkvi_tiles *>(rkvi_shared_memory());
    const int64_t n_items = static_cast<int64_t>(args.n_jobs) * args.items;
    if (rkvi_has_fault(args)) return;
    for (int64_t item = blockIdx.x; item < n_items; item += gridDim.x) {
        const rkvi_item at = rkvi_item_at(args, item);
        const rkvi_job &job = args.jobs[at.job];
        if (job.dtype != rkvi_dtype_of<T>::value || !job.scored) continue;
        for (int tile = at.part; tile * RKVI_TILE < job.n_tokens; tile += args.items)
            rkvi_compare_tile<T>(job, tile, s);
    }
}

/* ---- Between the passes: one block per head -------------------------------------------------- */

/* The softmax of each query over all tiles. */
static __device__ void rkvi_merge_votes(const rkvi_job &job)
{
    const int n_queries = job.more.n_voters * job.group;
    const int n_tiles = (job.n_tokens - 1) / RKVI_TILE + 1;
    for (int query = static_cast<int>(threadIdx.x); query < n_queries; query += RKVI_HEAD_THREADS) {
        float *sums = job.more.sums + 2 * static_cast<int64_t>(query);
        rkvi_softmax whole = rkvi_softmax_of_none();
        for (int tile = 0; tile < n_tiles; tile++, sums += 2 * static_cast<int64_t>(n_queries)) {
            const rkvi_softmax next = { sums[0], sums[1] };
            whole = rkvi_merge(whole, next);
        }
        sums[0] = whole.largest;
        sums[1] = 1.0f / whole.sum;
    }
}

enum { RKVI_N_OFFSETS = 10 }; /* of future queries: 2^0 to 2^9 tokens */

/* TRIATTENTION: the vectors of a query head: the expected query's numbers of each pair, turned by
 * the mean over the offsets, and the weight of the pair's length. */
static __device__ void rkvi_expected_query(const rkvi_args &args, const rkvi_job &job,
                                           int job_index, int g, rkvi_head_memory &s)
{
    const int n_pairs = rkvi_n_pairs(job.head_dim), head = job.head * job.group + g;
    const rkvi_more &more = job.more;
    const float *mean = more.means + static_cast<int64_t>(head) * job.head_dim;
    const float *lengths = more.means + static_cast<int64_t>(more.query_heads) * job.head_dim +
                           static_cast<int64_t>(head) * (job.head_dim / 2);
    float *out = more.vectors + static_cast<int64_t>(g) * 3 * n_pairs, square = 0;
    const uint32_t newest =
        more.n_rotated ? static_cast<uint32_t>(more.positions[job.n_tokens - 1]) : 0;
    for (int p = static_cast<int>(threadIdx.x); p < n_pairs; p += RKVI_HEAD_THREADS) {
        const int second = rkvi_second_of(p, more.n_rotated, more.adjacent);
        const float x = mean[rkvi_first_of(p, more.n_rotated, more.adjacent)];
        const float y = second < job.head_dim ? mean[second] : 0.0f;
        float sine = 0, cosine = 0, weight = 0, s_k, c_k;
        for (int k = 0; k < RKVI_N_OFFSETS; k++) {
            rkvi_sincos(rkvi_phase(job.unit_sum[p], newest + (1u << k)), &s_k, &c_k);
            sine += s_k;
            cosine += c_k;
        }
        sine /= RKVI_N_OFFSETS;
        cosine /= RKVI_N_OFFSETS;
        if (p < more.n_rotated) weight = lengths[p] - sqrtf(fmaf(x, x, y * y));
        const float u = fmaf(x, cosine, -(y * sine)), v = fmaf(x, sine, y * cosine);
        out[p] = u;
        out[n_pairs + p] = v;
        out[2 * n_pairs + p] = weight;
        square += u * u + v * v + weight * weight;
    }
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    for (int distance = 16; distance > 0; distance /= 2)
        square += __shfl_xor_sync(0xffffffffu, square, distance);
    __syncthreads();
    if (lane == 0) s.warp[warp].sum = square;
    __syncthreads();
    square = 0;
    for (int w = 0; w < RKVI_HEAD_WARPS; w++) square += s.warp[w].sum;
    if (threadIdx.x == 0 && rkvi_square_is_bad(square))
        rkvi_fault_at(args.control, RKVI_BAD_MEANS, job_index, g);
}

static __global__ void __launch_bounds__(RKVI_HEAD_THREADS) rkvi_prepare(const rkvi_args args)
{
    rkvi_head_memory &s = *reinterpret_cast<rkvi_head_memory *>(rkvi_shared_memory());
    const bool expects = args.config.policy == RKV_POLICY_TRIATTENTION;
    if (expects ? rkvi_is_unusable(args) : rkvi_has_fault(args)) return;
    for (int64_t i = blockIdx.x; i < args.n_jobs; i += gridDim.x) {
        const rkvi_job &job = args.jobs[i];
        if (!job.scored) continue;
        if (!expects) rkvi_merge_votes(job);
        for (int g = 0; expects && g < job.group; g++)
            rkvi_expected_query(args, job, static_cast<int>(i), g, s);
    }
}

/* ---- Expected queries: an item is every args.items-th tile of 64 keys of one head ------------ */

enum {
    RKVI_EXPECT_HEADS = 4, /* query heads that a warp takes at a time            */
    RKVI_EXPECT_PAIRS = 2  /* pairs per lane whose vectors are held in registers */
};
/* What a lane multiplies its pair by, for each of the query heads. */
struct rkvi_expected {
    float x[RKVI_EXPECT_HEADS], y[RKVI_EXPECT_HEADS], length[RKVI_EXPECT_HEADS];
};
static __device__ __forceinline__ void rkvi_load_expected(rkvi_expected *out, const rkvi_job &job,
                                                          int g, int pair)
{
    const int n_pairs = rkvi_n_pairs(job.head_dim);
#pragma unroll
    for (int h = 0; h < RKVI_EXPECT_HEADS; h++) {
        const float *of_head = job.more.vectors + static_cast<int64_t>(g + h) * 3 * n_pairs + pair;
        const bool is_there = g + h < job.group && pair < n_pairs;
        out->x[h] = is_there ? of_head[0] : 0.0f;
        out->y[h] = is_there ? of_head[n_pairs] : 0.0f;
        out->length[h] = is_there ? of_head[2 * n_pairs] : 0.0f;
    }
}
/* sum[HEADS] += products of one pair; square += its squared length. */
static __device__ __forceinline__ void rkvi_add_expected(float *sum, float *square, rkvi_pair pair,
                                                         const rkvi_expected &expected)
{
    const float of_pair = fmaf(pair.x, pair.x, pair.y * pair.y), length = sqrtf(of_pair);
    *square += of_pair;
#pragma unroll
    for (int h = 0; h < RKVI_EXPECT_HEADS; h++) {
        sum[h] = fmaf(expected.x[h], pair.x, sum[h]);
        sum[h] = fmaf(expected.y[h], pair.y, sum[h]);
        sum[h] = fmaf(expected.length[h], length, sum[h]);
    }
}

/* Sums of four values over the warp, in 6 shuffles instead of 20: at each of the first two steps a
 * lane keeps half of what it has. The result belongs to value lane / 8. */
static __device__ __forceinline__ float rkvi_sum_four(const float *sum)
{
    const int lane = static_cast<int>(threadIdx.x % 32);
    const bool upper = (lane & 16) != 0, odd = (lane & 8) != 0;
    float a = upper ? sum[2] : sum[0], b = upper ? sum[3] : sum[1];
    a += __shfl_xor_sync(0xffffffffu, upper ? sum[0] : sum[2], 16);
    b += __shfl_xor_sync(0xffffffffu, upper ? sum[1] : sum[3], 16);
    float mine = odd ? b : a;
    mine += __shfl_xor_sync(0xffffffffu, odd ? a : b, 8);
#pragma unroll
    for (int distance = 4; distance > 0; distance /= 2)
        mine += __shfl_xor_sync(0xffffffffu, mine, distance);
    return mine;
}

/* Raw scores of a warp's keys of a tile for the query heads g to g + 3; also checks the keys. Most
 * rows have no more pairs than fit into registers. */
template <typename T>
static __device__ void rkvi_expect_tile(const rkvi_args &args, const rkvi_job &job, int job_index,
                                        int tile, int g)
{
    const int lane = static_cast<int>(threadIdx.x % 32), n_pairs = rkvi_n_pairs(job.head_dim);
    const rkvi_view keys = job.moved[RKVI_KEYS].rows; /* copies: a store may change the job */
    const int load = job.key_load, n_tokens = job.n_tokens, head = g + lane / 8;
    const int end = (tile + 1) * RKVI_TILE < n_tokens ? (tile + 1) * RKVI_TILE : n_tokens;
    const bool writes = lane % 8 == 0 && head < job.group;
    const float scale = job.scale;
    float *logits = job.logits + (writes ? static_cast<int64_t>(head) * n_tokens : 0);
    rkvi_expected held[RKVI_EXPECT_PAIRS], next;
    rkvi_pair_place at[RKVI_EXPECT_PAIRS];
#pragma unroll
    for (int u = 0; u < RKVI_EXPECT_PAIRS; u++) {
        rkvi_load_expected(&held[u], job, g, lane + 32 * u);
        at[u] = rkvi_place_of(job, lane + 32 * u);
    }
    for (int token = tile * RKVI_TILE + static_cast<int>(threadIdx.x / 32); token < end;
         token += RKVI_TILE_THREADS / 32) {
        const char *row = rkvi_row(keys, token);
        float sum[RKVI_EXPECT_HEADS] = { 0 }, square = 0;
#pragma unroll
        for (int u = 0; u < RKVI_EXPECT_PAIRS; u++)
            if (lane + 32 * u < n_pairs)
                rkvi_add_expected(sum, &square, rkvi_load_pair<T>(row, at[u], load), held[u]);
        for (int p = lane + 32 * RKVI_EXPECT_PAIRS; p < n_pairs; p += 32) {
            rkvi_load_expected(&next, job, g, p);
            rkvi_add_expected(sum, &square, rkvi_load_pair<T>(row, rkvi_place_of(job, p), load),
                              next);
        }
        const float mine = rkvi_sum_four(sum);
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2)
            square += __shfl_xor_sync(0xffffffffu, square, distance);
        if (lane == 0 && rkvi_square_is_bad(square))
            rkvi_fault_at(args.control, RKVI_BAD_KEY, job_index, token);
        if (writes) logits[token] = mine * scale;
    }
}

template <typename T>
static __global__ void __launch_bounds__(RKVI_TILE_THREADS) rkvi_expect(const rkvi_args args)
{
    const int64_t n_items = static_cast<int64_t>(args.n_jobs) * args.items;
    if (rkvi_is_unusable(args)) return;
    for (int64_t item = blockIdx.x; item < n_items; item += gridDim.x) {
        const rkvi_item at = rkvi_item_at(args, item);
        const rkvi_job &job = args.jobs[at.job];
        if (job.dtype != rkvi_dtype_of<T>::value || !job.scored) continue;
        for (int tile = at.part; tile * RKVI_TILE < job.n_tokens; tile += args.items)
            for (int g = 0; g < job.group; g += RKVI_EXPECT_HEADS)
                rkvi_expect_tile<T>(args, job, at.job, tile, g);
    }
}

/* ---- Scores: one block per head -------------------------------------------------------------- */

enum { RKVI_RUN = 2048 }; /* rows that are sorted at a time */
static_assert(RKVI_RUN % RKVI_HEAD_THREADS == 0, "rkvi_sort_places: a row's thread is the same");
struct rkvi_rate_memory {
    rkvi_head_memory head; /* first: selection uses it */
    double sums[RKVI_HEAD_WARPS];
    unsigned long long run[RKVI_RUN];
};

static __device__ __forceinline__ unsigned rkvi_rank(float score); /* room 17 */

/* A number for each row, all different, in the order of x; of equal ones the more recent is
 * above. */
static __device__ __forceinline__ unsigned long long rkvi_place(float x, int row)
{
    return static_cast<unsigned long long>(rkvi_rank(x)) << 32 | static_cast<unsigned>(row);
}

/* Bitonic sort; size: a power of two. */
static __device__ void rkvi_sort_run(unsigned long long *run, int size)
{
    for (int length = 2; length <= size; length *= 2)
        for (int step = length / 2; step > 0; step /= 2) {
            __syncthreads();
            for (int i = static_cast<int>(threadIdx.x); i < size / 2; i += RKVI_HEAD_THREADS) {
                const int low = (i & ~(step - 1)) * 2 | (i & (step - 1)), high = low + step;
                const unsigned long long a = run[low], b = run[high];
                if ((a > b) != ((low & length) != 0)) {
                    run[low] = b;
                    run[high] = a;
                }
            }
        }
    __syncthreads();
}

/* The places of x[n], sorted in runs of RKVI_RUN. A thread takes the rows, and the places in the
 * run, whose number is its own modulo RKVI_HEAD_THREADS: what it has written needs no barrier. */
static __device__ void rkvi_sort_places(const float *x, int n, long long *places,
                                        rkvi_rate_memory &s)
{
    const int thread = static_cast<int>(threadIdx.x);
    for (int begin = 0; begin < n; begin += RKVI_RUN) {
        const int count = n - begin < RKVI_RUN ? n - begin : +RKVI_RUN;
        int size = 1;
        while (size < count) size *= 2;
        for (int i = thread; i < size; i += RKVI_HEAD_THREADS)
            s.run[i] = i < count ? rkvi_place(x[begin + i], begin + i) : ~0ull;
        rkvi_sort_run(s.run, size);
        for (int i = thread; i < count; i += RKVI_HEAD_THREADS)
            places[begin + i] = static_cast<long long>(s.run[i]);
    }
    __syncthreads();
}

/* How many of n rows are below `place`, from sorted runs. */
static __device__ int rkvi_count_below(const long long *places, int n, unsigned long long place)
{
    int below = 0;
    for (int begin = 0; begin < n; begin += RKVI_RUN) {
        int low = 0, high = n - begin < RKVI_RUN ? n - begin : +RKVI_RUN;
        while (low < high) {
            const int middle = (low + high) / 2;
            if (static_cast<unsigned long long>(places[begin + middle]) < place)
                low = middle + 1;
            else
                high = middle;
        }
        below += low;
    }
    return below;
}

/* What the round adds to the carried state, and the sum of both: to the caller and, for scores, to
 * the workspace. No barrier: the thread that writes a row's sum is the one that reads it. */
static __device__ void rkvi_carry_on(const rkvi_args &args, const rkvi_job &job)
{
    const bool remembers = args.config.policy != RKV_POLICY_H2O;
    const int n = job.n_tokens, n_old = n - job.more.n_new;
    float *importance = job.logits, *similarity = job.redundancy, *state = job.more.state;
    const float fade = job.more.fade;
    for (int j = static_cast<int>(threadIdx.x); j < n; j += RKVI_HEAD_THREADS) {
        float *later = state + job.more.row_stride + j;
        const float carried = j < n_old ? state[j] * fade : 0.0f, fresh = importance[j];
        const float sum = remembers ? fmaxf(carried, fresh) : carried + fresh;
        state[j] = importance[j] = sum;
        if (!remembers) continue;
        const float before = j < n_old ? *later : 0.0f;
        *later = similarity[j] = fmaxf(before, similarity[j]);
    }
}

/* MEMORY: ranks are mixed first and divided then, as on the CPU, so that equal sums stay equal. */
static __device__ void rkvi_rate_memory_of(const rkvi_args &args, const rkvi_job &job,
                                           rkvi_rate_memory &s)
{
    const bool ranked = args.config.policy == RKV_POLICY_MEMORY_TRACES;
    const int n = job.n_tokens - args.config.window, thread = static_cast<int>(threadIdx.x);
    const float *importance = job.logits, *similarity = job.redundancy, *bias = job.more.bias;
    const float lambda = args.config.lambda, share = 1.0f / static_cast<float>(n);
    float *scores = job.scores;
    int32_t *ranks = job.open_rows;
    rkvi_sort_places(importance, n, job.exempt, s);
    for (int j = thread; j < n; j += RKVI_HEAD_THREADS)
        ranks[j] = rkvi_count_below(job.exempt, n, rkvi_place(importance[j], j));
    if (ranked) rkvi_sort_places(similarity, n, job.exempt, s);
    for (int j = thread; j < n; j += RKVI_HEAD_THREADS) {
        const float rank = static_cast<float>(ranks[j]);
        float other = similarity[j]; /* scores may lie there */
        if (ranked)
            other = static_cast<float>(rkvi_count_below(job.exempt, n, rkvi_place(other, j)));
        float score = fmaf(-(1.0f - lambda), other, (ranked ? lambda : lambda * share) * rank);
        if (ranked) score *= share;
        scores[j] = bias ? score + bias[j] : score;
    }
}

/* The sum over the block's threads, the same in each. */
static __device__ double rkvi_sum_block(double value, rkvi_rate_memory &s)
{
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    double sum = 0;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
        value += __shfl_xor_sync(0xffffffffu, value, distance);
    __syncthreads();
    if (lane == 0) s.sums[warp] = value;
    __syncthreads();
    for (int w = 0; w < RKVI_HEAD_WARPS; w++) sum += s.sums[w];
    return sum;
}

/* TRIATTENTION: the largest z-score of the group. */
static __device__ void rkvi_rate_expected(const rkvi_args &args, const rkvi_job &job,
                                          rkvi_rate_memory &s)
{
    const int n = job.n_tokens - args.config.window, thread = static_cast<int>(threadIdx.x);
    const float *bias = job.more.bias;
    float *scores = job.scores;
    for (int g = 0; g < job.group; g++) {
        const float *x = job.logits + static_cast<int64_t>(g) * job.n_tokens;
        double sum = 0, squares = 0;
        for (int j = thread; j < n; j += RKVI_HEAD_THREADS) sum += static_cast<double>(x[j]);
        const float mean = static_cast<float>(rkvi_sum_block(sum, s) / n);
        for (int j = thread; j < n; j += RKVI_HEAD_THREADS) {
            const float off = x[j] - mean;
            squares += static_cast<double>(off) * static_cast<double>(off);
        }
        const double variance = rkvi_sum_block(squares, s) / n;
        const float share = variance > 0 ? 1.0f / sqrtf(static_cast<float>(variance)) : 0.0f;
        for (int j = thread; j < n; j += RKVI_HEAD_THREADS) {
            const float z = (x[j] - mean) * share, before = g == 0 ? z : scores[j];
            scores[j] = fmaxf(before, z);
        }
    }
    for (int j = thread; bias && j < n; j += RKVI_HEAD_THREADS) scores[j] += bias[j];
}

/* RANDOM: the finaliser of splitmix64. */
static __device__ float rkvi_hash(uint32_t seed, int layer, int head, int32_t position)
{
    unsigned long long x = static_cast<unsigned long long>(seed) * 0x9e3779b97f4a7c15ull;
    x += static_cast<unsigned long long>(layer) << 40 ^ static_cast<unsigned long long>(head) << 32;
    x ^= static_cast<uint32_t>(position);
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    x ^= x >> 31;
    return static_cast<float>(static_cast<unsigned>(x >> 40)) * (1.0f / 16777216.0f);
}

/* RANDOM, H2O and OWN_SCORE: each row for itself. */
static __device__ void rkvi_rate_rows(const rkvi_args &args, const rkvi_job &job)
{
    const int n = job.n_tokens - args.config.window;
    const float *bias = job.more.bias, *importance = job.logits;
    const bool is_random = args.config.policy == RKV_POLICY_RANDOM;
    const bool is_h2o = args.config.policy == RKV_POLICY_H2O;
    float *scores = job.scores;
    for (int j = static_cast<int>(threadIdx.x); j < n; j += RKVI_HEAD_THREADS) {
        float score = 0;
        if (is_random)
            score = rkvi_hash(args.config.seed, job.layer, job.head, job.more.positions[j]);
        if (is_h2o) score = importance[j];
        scores[j] = bias ? score + bias[j] : score;
    }
}

static __global__ void __launch_bounds__(RKVI_HEAD_THREADS, RKVI_SM_THREADS / RKVI_HEAD_THREADS)
    rkvi_rate(const rkvi_args args)
{
    rkvi_rate_memory &s = *reinterpret_cast<rkvi_rate_memory *>(rkvi_shared_memory());
    const int policy = args.config.policy;
    const bool is_memory = policy == RKV_POLICY_MEMORY_TRACES || policy == RKV_POLICY_MEMORY_PROSE;
    rkvi_report(args);
    if (rkvi_has_fault(args)) return;
    for (int64_t i = blockIdx.x; i < args.n_jobs; i += gridDim.x) {
        const rkvi_job &job = args.jobs[i];
        if (job.scored) {
            if (is_memory || policy == RKV_POLICY_H2O) rkvi_carry_on(args, job);
            if (is_memory)
                rkvi_rate_memory_of(args, job, s);
            else if (policy == RKV_POLICY_TRIATTENTION)
                rkvi_rate_expected(args, job, s);
            else
                rkvi_rate_rows(args, job);
        }
        if (args.select_too) rkvi_select_set(args, job, s.head);
    }
}

/* Rows that are compacted without having been scored, since nothing was to be chosen, start at 0.
 * One block per head. */
static __global__ void __launch_bounds__(RKVI_HEAD_THREADS) rkvi_start_state(const rkvi_args args)
{
    if (rkvi_has_fault(args)) return;
    for (int64_t i = blockIdx.x; i < args.n_jobs; i += gridDim.x) {
        const rkvi_job &job = args.jobs[i];
        const int planes = rkvi_planes_of(args.config);
        if (job.n_keep == job.n_tokens || (args.scoring && job.scored)) continue;
        for (int plane = 0; plane < planes; plane++)
            for (int j = job.n_tokens - job.more.n_new + static_cast<int>(threadIdx.x);
                 j < job.n_tokens; j += RKVI_HEAD_THREADS)
                job.more.state[static_cast<int64_t>(plane) * job.more.row_stride + j] = 0.0f;
    }
}

/* ---- Means of queries: one block per query head ---------------------------------------------- */

struct rkvi_means_args {
    rkvi_view queries; /* of head 0 */
    int64_t head_stride;
    rkvi_rope rope;
    float *means;
    rkv_error *record;
    uintptr_t query_rule, frequency_rule;
    int heads, dim, dtype, slot, n, position;
    int counts; /* the second launch: only the number of tokens grows; the first still reads it */
};
struct rkvi_means_memory {
    int bad[RKVI_HEAD_WARPS];
};
enum { RKVI_NOTHING_BAD = INT32_MAX };

/* The least of the block's numbers, the same in each thread. */
static __device__ int rkvi_least(int mine, rkvi_means_memory &s)
{
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    for (int distance = 16; distance > 0; distance /= 2) {
        const int other = __shfl_xor_sync(0xffffffffu, mine, distance);
        mine = other < mine ? other : mine;
    }
    __syncthreads();
    if (lane == 0) s.bad[warp] = mine;
    __syncthreads();
    for (int w = 0; w < RKVI_HEAD_WARPS; w++) mine = s.bad[w] < mine ? s.bad[w] : mine;
    return mine;
}

static __device__ const char *rkvi_means_row(const rkvi_means_args &args, int token, int head)
{
    return rkvi_row(args.queries, args.slot + token) + head * args.head_stride;
}

/* The first pair whose frequency is out of range; the first query that is not finite, counted over
 * the heads of a token and then over tokens. Every block looks at all, so all agree. */
static __device__ int rkvi_bad_pair(const rkvi_means_args &args, rkvi_means_memory &s)
{
    int bad = RKVI_NOTHING_BAD;
    unsigned long long turns;
    for (int p = static_cast<int>(threadIdx.x); p < args.rope.n_rotated; p += RKVI_HEAD_THREADS)
        if (!rkvi_turns_of(args.rope, p, &turns) && p < bad) bad = p;
    return rkvi_least(bad, s);
}
static __device__ int rkvi_bad_query(const rkvi_means_args &args, rkvi_means_memory &s)
{
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    int bad = RKVI_NOTHING_BAD;
    for (int64_t q = warp; q < static_cast<int64_t>(args.n) * args.heads; q += RKVI_HEAD_WARPS) {
        const int token = static_cast<int>(q / args.heads), head = static_cast<int>(q % args.heads);
        const char *row = rkvi_means_row(args, token, head);
        float square = 0;
        for (int i = lane; i < args.dim; i += 32) {
            const float x = rkvi_load_any(row, i, args.dtype);
            square = fmaf(x, x, square);
        }
        for (int distance = 16; distance > 0; distance /= 2)
            square += __shfl_xor_sync(0xffffffffu, square, distance);
        if (rkvi_square_is_bad(square) && q < bad) bad = static_cast<int>(q);
    }
    return rkvi_least(bad, s);
}

/* The earlier fault of a queue of calls stays. */
static __device__ void rkvi_report_means(const rkvi_means_args &args, int pair, int query)
{
    rkv_error *const record = args.record;
    const bool is_query = pair == RKVI_NOTHING_BAD;
    if (blockIdx.x != 0 || threadIdx.x != 0 || !record || record->status != RKV_OK) return;
    memcpy(&record->rule, is_query ? &args.query_rule : &args.frequency_rule, sizeof record->rule);
    record->status = is_query ? RKV_ERROR_NONFINITE : RKV_ERROR_ARGUMENT;
    record->layer = -1;
    record->head = is_query ? query % args.heads : -1;
    record->token = is_query ? args.slot + query / args.heads : pair;
}

/* A thread takes a pair, and the tokens one after the other, as on the CPU. */
static __device__ void rkvi_update_head(const rkvi_means_args &args, int head)
{
    const int64_t heads = args.heads, dim = args.dim, half = dim / 2;
    const int n_rotated = args.rope.n_rotated, adjacent = args.rope.adjacent;
    float *mean = args.means + head * dim, *lengths = args.means + heads * dim + head * half;
    const float count = args.means[heads * dim + heads * half];
    for (int p = static_cast<int>(threadIdx.x); p < rkvi_n_pairs(args.dim);
         p += RKVI_HEAD_THREADS) {
        const int first = rkvi_first_of(p, n_rotated, adjacent);
        const int second = rkvi_second_of(p, n_rotated, adjacent);
        const bool is_pair = second < args.dim, is_turned = p < n_rotated;
        float mean_x = mean[first], mean_y = is_pair ? mean[second] : 0;
        float length = is_turned ? lengths[p] : 0;
        unsigned long long turns = 0;
        if (is_turned) (void)rkvi_turns_of(args.rope, p, &turns);
        for (int i = 0; i < args.n; i++) {
            const char *row = rkvi_means_row(args, i, head);
            const float x = rkvi_load_any(row, first, args.dtype);
            const float y = is_pair ? rkvi_load_any(row, second, args.dtype) : 0.0f;
            const float share = 1.0f / (count + static_cast<float>(i + 1));
            float sine, cosine;
            rkvi_sincos(
                rkvi_phase(static_cast<long long>(turns), static_cast<uint32_t>(args.position + i)),
                &sine, &cosine);
            mean_x = fmaf(share, fmaf(x, cosine, y * sine) - mean_x, mean_x);
            mean_y = fmaf(share, fmaf(y, cosine, -(x * sine)) - mean_y, mean_y);
            length = fmaf(share, sqrtf(fmaf(x, x, y * y)) - length, length);
        }
        mean[first] = mean_x;
        if (is_pair) mean[second] = mean_y;
        if (is_turned) lengths[p] = length;
    }
}

static __global__ void __launch_bounds__(RKVI_HEAD_THREADS)
    rkvi_update_means(const RKVI_GRID_CONSTANT rkvi_means_args args)
{
    rkvi_means_memory &s = *reinterpret_cast<rkvi_means_memory *>(rkvi_shared_memory());
    const int64_t heads = args.heads, dim = args.dim;
    const int pair = rkvi_bad_pair(args, s), query = rkvi_bad_query(args, s);
    if (pair != RKVI_NOTHING_BAD || query != RKVI_NOTHING_BAD) {
        rkvi_report_means(args, pair, query);
        return;
    }
    if (args.counts && blockIdx.x == 0 && threadIdx.x == 0)
        args.means[heads * dim + heads * (dim / 2)] += static_cast<float>(args.n);
    for (int head = static_cast<int>(blockIdx.x); head < args.heads && !args.counts;
         head += static_cast<int>(gridDim.x))
        rkvi_update_head(args, head);
}

/* ==== 17. Selection =========================================================================
 * In: the scores of one set's candidates, pins.  Out: the kept list. One block per set.
 * Knows nothing of keys or attention. Equal scores: the more recent token stays. */

/* Unsigned integers that compare as the scores do; -0 and +0 are equal. */
static __device__ __forceinline__ unsigned rkvi_rank(float score)
{
    const unsigned bits = __float_as_uint(score + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* What selection goes by: the scores, or the scores and a byte per row that, if it is not 0, ranks
 * the row above every score. */
struct rkvi_by_score {
    const float *scores;
    __device__ __forceinline__ unsigned rank(float score, int) const
    {
        return rkvi_rank(score);
    }
};
struct rkvi_by_pins {
    const float *scores;
    const uint8_t *pins;
    __device__ __forceinline__ unsigned rank(float score, int row) const
    {
        return pins[row] ? 0xffffffffu : rkvi_rank(score);
    }
};

/* bins[digit] += 1 for each thread that `counts`. The scores of a head are close together, so their
 * leading digits are often equal: threads that agree with their warp's first are added as one. */
static __device__ void rkvi_count_digit(unsigned *bins, bool counts, unsigned digit)
{
    const unsigned all = __ballot_sync(0xffffffffu, counts);
    const int lane = static_cast<int>(threadIdx.x % 32),
              leader = all ? __ffs(static_cast<int>(all)) - 1 : 0;
    const unsigned common = __shfl_sync(0xffffffffu, digit, leader);
    const unsigned same = __ballot_sync(0xffffffffu, counts && digit == common);
    if (lane == leader && all)
        atomicAdd(&bins[common], static_cast<unsigned>(__popc(same)));
    else if (counts && digit != common)
        atomicAdd(&bins[digit], 1u);
}

/* Sum of `value` over the lanes up to this one. */
static __device__ __forceinline__ unsigned rkvi_prefix_warp(unsigned value)
{
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const unsigned other = __shfl_up_sync(0xffffffffu, value, static_cast<unsigned>(distance));
        if (lane >= distance) value += other;
    }
    return value;
}
/* Sum of `value` over the threads before this one. */
static __device__ unsigned rkvi_prefix(unsigned value, rkvi_head_memory &s, unsigned *total)
{
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    const unsigned sum = rkvi_prefix_warp(value);
    __syncthreads();
    if (lane == 31) s.warp_total[warp] = sum;
    __syncthreads();
    const unsigned warps = rkvi_prefix_warp(lane < RKVI_HEAD_WARPS ? s.warp_total[lane] : 0);
    *total = __shfl_sync(0xffffffffu, warps, 31);
    return sum - value + (__shfl_sync(0xffffffffu, warps, warp) - s.warp_total[warp]);
}

/* Finds the bin of the wanted-th largest rank: s.digit is the bin, s.wanted the place within it,
 * s.ties the bin's count. Each thread takes 4 bins, the highest first. */
static __device__ void rkvi_find_bin(unsigned wanted, rkvi_head_memory &s)
{
    const int per_thread = RKVI_BINS / RKVI_HEAD_THREADS;
    const int top = RKVI_BINS - 1 - static_cast<int>(threadIdx.x) * per_thread;
    unsigned count = 0, total;
    for (int i = 0; i < per_thread; i++) count += s.bins[top - i];
    unsigned before = rkvi_prefix(count, s, &total);
    for (int i = 0; i < per_thread; i++) {
        const unsigned here = s.bins[top - i];
        if (before < wanted && wanted <= before + here) {
            s.digit = static_cast<unsigned>(top - i);
            s.wanted = wanted - before;
            s.ties = here;
        }
        before += here;
    }
    __syncthreads();
}

/* The rank of the wanted-th best of the candidates [begin, end); of those of equal rank, the first
 * *skip are not kept. */
template <typename BY>
static __device__ unsigned rkvi_cut(const BY &by, int begin, int end, int wanted,
                                    rkvi_head_memory &s, unsigned *skip)
{
    unsigned prefix = 0, left = static_cast<unsigned>(wanted);
    int shift = 32;
    while (shift > 0) {
        const int bits = shift < RKVI_DIGIT_BITS ? shift : RKVI_DIGIT_BITS, above = shift;
        shift -= bits;
        for (int i = static_cast<int>(threadIdx.x); i < RKVI_BINS; i += RKVI_HEAD_THREADS)
            s.bins[i] = 0;
        __syncthreads(); /* for scores of the same kernel, too */
        for (int base = begin; base < end; base += RKVI_AT_ONCE * RKVI_HEAD_THREADS) {
            const int first = base + static_cast<int>(threadIdx.x);
            float score[RKVI_AT_ONCE];
            rkvi_load_each(score, by.scores, first, end, RKVI_HEAD_THREADS, 0.0f);
#pragma unroll
            for (int u = 0; u < RKVI_AT_ONCE; u++) {
                if (base + u * RKVI_HEAD_THREADS >= end) continue; /* for all threads */
                const int j = first + u * RKVI_HEAD_THREADS;
                const unsigned rank = by.rank(score[u], j < end ? j : end - 1);
                const bool counts = j < end && (above == 32 || rank >> above == prefix);
                rkvi_count_digit(s.bins, counts, rank >> shift & ((1u << bits) - 1));
            }
        }
        __syncthreads();
        rkvi_find_bin(left, s);
        left = s.wanted;
        prefix = prefix << bits | s.digit;
    }
    *skip = s.ties - left;
    return prefix;
}

/* Writes the candidates [begin, end) at or above the cut, ascending. */
template <typename BY>
static __device__ void rkvi_write_kept(const BY &by, int begin, int end, unsigned cut,
                                       unsigned skip, int32_t *kept, rkvi_head_memory &s)
{
    unsigned n_better = 0, n_equal = 0; /* before base */
    float next[1];
    rkvi_load_each(next, by.scores, begin + static_cast<int>(threadIdx.x), end, 0, 0.0f);
    for (int base = begin; base < end; base += RKVI_HEAD_THREADS) {
        const int j = base + static_cast<int>(threadIdx.x);
        const unsigned rank = by.rank(next[0], j < end ? j : end - 1);
        const bool better = j < end && rank > cut, equal = j < end && rank == cut;
        /* In flight during the prefix sum. */
        rkvi_load_each(next, by.scores, j + RKVI_HEAD_THREADS, end, 0, 0.0f);
        unsigned total;
        const unsigned before =
            rkvi_prefix((better ? 1u << 16 : 0u) | (equal ? 1u : 0u), s, &total);
        const unsigned equal_before = n_equal + (before & 0xffffu);
        const unsigned taken = equal_before > skip ? equal_before - skip : 0;
        if (better || (equal && equal_before >= skip)) kept[n_better + (before >> 16) + taken] = j;
        n_better += total >> 16;
        n_equal += total & 0xffffu;
    }
}

template <typename BY>
static __device__ void rkvi_select_best(const BY &by, int begin, int end, int wanted, int32_t *kept,
                                        rkvi_head_memory &s)
{
    unsigned skip;
    const unsigned cut = rkvi_cut(by, begin, end, wanted, s, &skip);
    rkvi_write_kept(by, begin, end, cut, skip, kept, s);
}

/* The pinned tokens, the best candidates, the protected tokens. */
static __device__ void rkvi_select_set(const rkvi_args &args, const rkvi_job &job,
                                       rkvi_head_memory &s)
{
    const int begin = args.config.pinned, protect = args.config.protect;
    const int n = job.n_tokens, n_keep = job.n_keep, wanted = n_keep - protect - begin;
    const int thread = static_cast<int>(threadIdx.x);
    const rkvi_by_pins by = { job.set_scores, /* read before the first store */
                              reinterpret_cast<const uint8_t *>(job.moved[RKVI_PINS].rows.data) };
    const rkvi_by_score by_score = { by.scores };
    int32_t *kept = job.kept;
    const int n_first = n_keep == n ? n : begin;
    for (int i = thread; i < n_first; i += RKVI_HEAD_THREADS) kept[i] = i;
    if (n_keep == n) return;
    for (int i = thread; i < protect; i += RKVI_HEAD_THREADS)
        kept[n_keep - protect + i] = n - protect + i;
    if (wanted == 0) return;
    if (by.pins)
        rkvi_select_best(by, begin, n - protect, wanted, kept + begin, s);
    else
        rkvi_select_best(by_score, begin, n - protect, wanted, kept + begin, s);
}

static __global__ void __launch_bounds__(RKVI_HEAD_THREADS) rkvi_select(const rkvi_args args)
{
    rkvi_head_memory &s = *reinterpret_cast<rkvi_head_memory *>(rkvi_shared_memory());
    rkvi_report(args);
    if (rkvi_has_fault(args)) return;
    for (int64_t i = blockIdx.x; i < args.n_jobs; i += gridDim.x) {
        const rkvi_job &job = args.jobs[i];
        if (job.set_first == i) rkvi_select_set(args, job, s);
    }
}

/* ==== 18. Compaction ========================================================================
 * In: kept lists.  Out: the kept rows at the front, in cache order. In place. A block moves a slice
 * of all rows of one tensor of one head, so no two blocks touch the same bytes. It reads a batch of
 * rows, waits for all its threads, and writes the batch. The list ascends, so a row moves down or
 * stays, and no batch overwrites a row that a later batch reads. */

/* Bytes from the start of a row to one of its units. */
static __device__ __forceinline__ int64_t rkvi_unit_offset(const rkvi_moved &moved, int unit)
{
    const int run = unit / moved.run;
    return run * moved.run_stride + (unit - run * moved.run) * moved.unit;
}
/* The row that moves to row `to`; -1 if it is there already, or if there is no such row. */
static __device__ __forceinline__ int rkvi_source(const int32_t *kept, int n_keep, int to)
{
    const int from = to < n_keep ? kept[to] : to;
    return from == to ? -1 : from;
}

/* A thread moves the same unit of each of its rows, which keeps address arithmetic cheap. */
template <typename V>
static __device__ void rkvi_move_slice(const rkvi_moved &moved, const int32_t *kept, int n_keep,
                                       int first_unit)
{
    const int left = moved.n_units - first_unit;
    const int n_units = left < RKVI_SLICE_UNITS ? left : RKVI_SLICE_UNITS;
    const int thread = static_cast<int>(threadIdx.x), at_once = RKVI_MOVE_THREADS / n_units;
    const int row = moved.tokens_adjacent ? thread % at_once : thread / n_units;
    const int unit = moved.tokens_adjacent ? thread / at_once : thread % n_units;
    const bool idle = row >= at_once || unit >= n_units; /* 256 is no multiple of 3, 5, 6, 7 */
    rkvi_view rows = moved.rows; /* from here on: this thread's unit of each */
    if (!idle) rows.data += rkvi_unit_offset(moved, first_unit + unit);
    const int n_mine = idle ? 0 : n_keep, batch = at_once * RKVI_MOVE_UNROLL; /* rows */
    int next[RKVI_MOVE_UNROLL];
#pragma unroll
    for (int u = 0; u < RKVI_MOVE_UNROLL; u++)
        next[u] = rkvi_source(kept, n_mine, row + u * at_once);
    for (int first = 0; first < n_keep; first += batch) {
        V value[RKVI_MOVE_UNROLL];
        int from[RKVI_MOVE_UNROLL];
#pragma unroll
        for (int u = 0; u < RKVI_MOVE_UNROLL; u++) {
            from[u] = next[u];
            if (from[u] < 0) continue;
            value[u] = *reinterpret_cast<const V *>(rkvi_row(rows, from[u]));
        }
#pragma unroll
        for (int u = 0; u < RKVI_MOVE_UNROLL; u++) /* in flight together with the rows */
            next[u] = rkvi_source(kept, n_mine, first + batch + row + u * at_once);
        __syncthreads();
#pragma unroll
        for (int u = 0; u < RKVI_MOVE_UNROLL; u++) {
            const int to = first + row + u * at_once;
            if (from[u] >= 0) *reinterpret_cast<V *>(rkvi_row(rows, to)) = value[u];
        }
    }
}

/* An item is a slice of one head: of its keys first, then of its values, positions and pins. */
static __global__ void __launch_bounds__(RKVI_MOVE_THREADS, 2) rkvi_compact(const rkvi_args args)
{
    const int64_t n_items = static_cast<int64_t>(args.n_jobs) * args.items;
    rkvi_report(args);
    if (rkvi_has_fault(args)) return;
    for (int64_t item = blockIdx.x; item < n_items; item += gridDim.x) {
        const rkvi_item at = rkvi_item_at(args, item);
        const rkvi_job &job = args.jobs[at.job];
        int slice = at.part, tensor = 0;
        if (job.n_keep == job.n_tokens) continue;
        for (; tensor < RKVI_N_MOVED; tensor++) {
            const int n_units = job.moved[tensor].rows.data ? job.moved[tensor].n_units : 0;
            const int n_slices = (n_units + RKVI_SLICE_UNITS - 1) / RKVI_SLICE_UNITS;
            if (slice < n_slices) break;
            slice -= n_slices;
        }
        if (tensor == RKVI_N_MOVED) continue;
        const rkvi_moved moved = job.moved[tensor]; /* a copy: stores cannot change it */
        const int first_unit = slice * RKVI_SLICE_UNITS;
        switch (moved.unit) {
        case 16: rkvi_move_slice<uint4>(moved, job.kept, job.n_keep, first_unit); break;
        case 8: rkvi_move_slice<uint2>(moved, job.kept, job.n_keep, first_unit); break;
        case 4: rkvi_move_slice<uint32_t>(moved, job.kept, job.n_keep, first_unit); break;
        case 2: rkvi_move_slice<uint16_t>(moved, job.kept, job.n_keep, first_unit); break;
        default: rkvi_move_slice<uint8_t>(moved, job.kept, job.n_keep, first_unit); break;
        }
    }
}

/* ==== 20. Checks ============================================================================
 * Block tables, pins, kept lists and a caller's scores lie in device memory, so the device checks
 * them, before anything is written. One block per head; it works for the layer or the set that the
 * head leads. */

enum {
    RKVI_CHECK_PINS = 1,
    RKVI_CHECK_TABLES = 2,
    RKVI_CHECK_SCORES = 4,
    RKVI_CHECK_LISTS = 8,
    RKVI_CHECK_BIAS = 16,
    RKVI_CHECK_STATE = 32
};

/* Every entry of a block table must be at least 0 and occur once. A hash table, twice as large,
 * holds the first index of each entry. Of two equal entries the later index is reported. Which
 * indices are reported of three or more depends on the order of the threads, but the second is
 * always among them, and none before it is: it is the least. */
static __device__ void rkvi_check_table(const rkvi_args &args, const rkvi_job &job, int job_index,
                                        rkvi_fault fault, const rkvi_view &view, int n_rows)
{
    const int32_t *entries = view.table;
    const int row_step = view.block_tokens;
    const uint32_t half = static_cast<uint32_t>(job.n_tokens);
    const int32_t nobody = INT32_MAX;
    if (!view.data || !entries || n_rows < 1) return;
    const int n = (n_rows - 1) / row_step + 1;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < half; i += RKVI_HEAD_THREADS)
        job.open_rows[i] = job.open_need[i] = nobody;
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < n; i += RKVI_HEAD_THREADS) {
        const int32_t entry = entries[i];
        uint32_t slot = static_cast<uint32_t>(entry) * 2654435769u % (2 * half);
        if (entry < 0) {
            rkvi_fault_at(args.control, fault, job_index, i * row_step);
            continue;
        }
        for (;;) {
            int32_t *place = slot < half ? &job.open_rows[slot] : &job.open_need[slot - half];
            const int32_t found = atomicCAS(place, nobody, i);
            if (found == nobody) break;
            if (entries[found] == entry) { /* also if another index replaces `found` */
                const int32_t first = atomicMin(place, i);
                rkvi_fault_at(args.control, fault, job_index, (first > i ? first : i) * row_step);
                break;
            }
            slot = slot + 1 < 2 * half ? slot + 1 : 0;
        }
    }
}

static __device__ void rkvi_check_tables(const rkvi_args &args, const rkvi_job &job, int job_index)
{
    rkvi_check_table(args, job, job_index, RKVI_BAD_KEY_BLOCKS, job.moved[RKVI_KEYS].rows,
                     job.n_tokens);
    rkvi_check_table(args, job, job_index, RKVI_BAD_VALUE_BLOCKS, job.moved[RKVI_VALUES].rows,
                     job.n_tokens);
    if (job.scored && args.importance)
        rkvi_check_table(args, job, job_index, RKVI_BAD_QUERY_BLOCKS, job.queries, args.votes);
}

/* The pins of every set leave a candidate to choose, if the config does. */
static __device__ void rkvi_check_pins(const rkvi_args &args, const rkvi_job &job, int job_index,
                                       rkvi_head_memory &s)
{
    const char *pins = job.moved[RKVI_PINS].rows.data;
    const int begin = args.config.pinned, protect = args.config.protect;
    const int thread = static_cast<int>(threadIdx.x), n_keep = args.config.budget - protect - begin;
    unsigned mine = 0, total;
    if (!pins) return;
    for (int j = begin + thread; j < job.n_tokens - protect; j += RKVI_HEAD_THREADS)
        mine += pins[j] != 0;
    (void)rkvi_prefix(mine, s, &total);
    if (thread == 0 && total > static_cast<unsigned>(n_keep > 0 ? n_keep - 1 : 0))
        rkvi_fault_at(args.control, RKVI_BAD_PINS, job_index, RKVI_NO_ROW);
}

/* A NaN among a caller's scores has no rank. */
static __device__ void rkvi_check_scores(const rkvi_args &args, const rkvi_job &job, int job_index)
{
    for (int j = static_cast<int>(threadIdx.x); j < job.n_tokens - args.config.window;
         j += RKVI_HEAD_THREADS)
        if (job.set_scores[j] != job.set_scores[j])
            rkvi_fault_at(args.control, RKVI_BAD_SCORE, job_index, j);
}

/* A NaN among a caller's biases; a number in the state that no round can have left there. */
static __device__ void rkvi_check_bias(const rkvi_args &args, const rkvi_job &job, int job_index)
{
    const float *bias = job.more.bias;
    if (!bias) return;
    for (int j = static_cast<int>(threadIdx.x); j < job.n_tokens - args.config.window;
         j += RKVI_HEAD_THREADS)
        if (bias[j] != bias[j]) rkvi_fault_at(args.control, RKVI_BAD_BIAS, job_index, j);
}
static __device__ void rkvi_check_state(const rkvi_args &args, const rkvi_job &job, int job_index)
{
    const int planes = rkvi_planes_of(args.config), n = job.n_tokens - job.more.n_new;
    for (int plane = 0; plane < planes; plane++)
        for (int j = static_cast<int>(threadIdx.x); j < n; j += RKVI_HEAD_THREADS) {
            const float x = job.more.state[static_cast<int64_t>(plane) * job.more.row_stride + j];
            if (!(x >= 0 && x <= FLT_MAX))
                rkvi_fault_at(args.control, RKVI_BAD_STATE, job_index, j);
        }
}

/* Is `row` in an ascending list? On any other list the answer is of no use, but still safe. */
static __device__ bool rkvi_is_listed(const int32_t *kept, int n_keep, int row)
{
    int begin = 0, end = n_keep;
    while (begin < end) {
        const int middle = begin + (end - begin) / 2;
        if (kept[middle] < row)
            begin = middle + 1;
        else
            end = middle;
    }
    return begin < n_keep && kept[begin] == row;
}

/* A caller's kept list: in range, ascending, pinned tokens in place, every row with a pin. */
static __device__ void rkvi_check_list(const rkvi_args &args, const rkvi_job &job, int job_index)
{
    const char *pins = job.moved[RKVI_PINS].rows.data;
    const int32_t *kept = job.kept;
    for (int i = static_cast<int>(threadIdx.x); i < job.n_keep; i += RKVI_HEAD_THREADS) {
        const int32_t row = kept[i];
        if (row < 0 || row >= job.n_tokens)
            rkvi_fault_at(args.control, RKVI_BAD_KEPT_RANGE, job_index, i);
        else if (i > 0 && row <= kept[i - 1])
            rkvi_fault_at(args.control, RKVI_BAD_KEPT_ORDER, job_index, i);
        else if (i < args.config.pinned && row != i)
            rkvi_fault_at(args.control, RKVI_BAD_KEPT_PINNED, job_index, i);
    }
    if (!pins) return;
    for (int j = static_cast<int>(threadIdx.x); j < job.n_tokens; j += RKVI_HEAD_THREADS)
        if (pins[j] && !rkvi_is_listed(kept, job.n_keep, j))
            rkvi_fault_at(args.control, RKVI_BAD_KEPT_PINS, job_index, j);
}

static __global__ void __launch_bounds__(RKVI_HEAD_THREADS) rkvi_check(const rkvi_args args)
{
    rkvi_head_memory &s = *reinterpret_cast<rkvi_head_memory *>(rkvi_shared_memory());
    for (int64_t i = blockIdx.x; i < args.n_jobs; i += gridDim.x) {
        const rkvi_job &job = args.jobs[i];
        const int index = static_cast<int>(i);
        if (job.n_keep == job.n_tokens) continue;
        if ((args.checks & RKVI_CHECK_TABLES) && job.head == 0) rkvi_check_tables(args, job, index);
        if ((args.checks & RKVI_CHECK_BIAS) && job.scored) rkvi_check_bias(args, job, index);
        if ((args.checks & RKVI_CHECK_STATE) && job.scored) rkvi_check_state(args, job, index);
        if (job.set_first != i) continue;
        if (args.checks & RKVI_CHECK_PINS) rkvi_check_pins(args, job, index, s);
        if ((args.checks & RKVI_CHECK_SCORES) && job.scored) rkvi_check_scores(args, job, index);
        if (args.checks & RKVI_CHECK_LISTS) rkvi_check_list(args, job, index);
    }
}

/* ==== 22. Memory ============================================================================
 * For rkv_cache. rkvi_cuda_copy waits for the stream; the others only queue work. */

static void *rkvi_cuda_alloc(const rkv_backend *self, size_t bytes)
{
    void *memory = NULL;
    (void)self;
    return rkvi_status_of(cudaMalloc(&memory, bytes ? bytes : 1)) == RKV_OK ? memory : NULL;
}
static void rkvi_cuda_free(const rkv_backend *self, void *memory)
{
    (void)self;
    (void)rkvi_status_of(cudaFree(memory));
}
static rkv_status rkvi_cuda_synchronize(const rkv_backend *self)
{
    return rkvi_status_of(cudaStreamSynchronize(rkvi_stream(self)));
}
/* From and to host memory or the device's: the driver knows which is which. */
static rkv_status rkvi_cuda_copy(const rkv_backend *self, void *dst, const void *src, size_t bytes)
{
    rkv_status status = RKV_OK;
    if (bytes)
        status =
            rkvi_status_of(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDefault, rkvi_stream(self)));
    return status == RKV_OK ? rkvi_cuda_synchronize(self) : status;
}

struct rkvi_copy_args {
    rkvi_view dst, src; /* of head 0 */
    int64_t dst_head, src_head, dst_dim, src_dim;
    int64_t n_units; /* in all: heads * n_tokens * per_row */
    int dst_token, src_token, n_tokens, element_units, per_row, unit;
};
/* Rows whose block is negative do not exist. They are not copied: nobody has checked the table. */
static __device__ __forceinline__ bool rkvi_has_row(const rkvi_view &view, int token)
{
    return !view.table || view.table[token / view.block_tokens] >= 0;
}
template <typename V> static __device__ void rkvi_copy_unit(const rkvi_copy_args &args, int64_t i)
{
    const int in_row = static_cast<int>(i % args.per_row);
    const int token = static_cast<int>(i / args.per_row % args.n_tokens);
    const int64_t head = i / args.per_row / args.n_tokens;
    const int element = in_row / args.element_units, rest = in_row % args.element_units * args.unit;
    if (!rkvi_has_row(args.dst, args.dst_token + token)) return;
    if (!rkvi_has_row(args.src, args.src_token + token)) return;
    char *to = rkvi_row(args.dst, args.dst_token + token) + head * args.dst_head;
    const char *from = rkvi_row(args.src, args.src_token + token) + head * args.src_head;
    *reinterpret_cast<V *>(to + element * args.dst_dim + rest) =
        *reinterpret_cast<const V *>(from + element * args.src_dim + rest);
}
static __global__ void __launch_bounds__(RKVI_MOVE_THREADS)
    rkvi_copy_rows(const rkvi_copy_args args)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * RKVI_MOVE_THREADS;
    int64_t i = static_cast<int64_t>(blockIdx.x) * RKVI_MOVE_THREADS + threadIdx.x;
    for (; i < args.n_units; i += step) switch (args.unit) {
        case 16: rkvi_copy_unit<uint4>(args, i); break;
        case 8: rkvi_copy_unit<uint2>(args, i); break;
        case 4: rkvi_copy_unit<uint32_t>(args, i); break;
        case 2: rkvi_copy_unit<uint16_t>(args, i); break;
        default: rkvi_copy_unit<uint8_t>(args, i); break;
        }
}

static rkv_status rkvi_cuda_copy_rows(const rkv_backend *self, const rkv_tensor *dst, int dst_token,
                                      const rkv_tensor *src, int src_token, int n_tokens)
{
    const rkvi_strides to = rkvi_strides_of(*dst), from = rkvi_strides_of(*src);
    const bool whole = to.dim == to.element && from.dim == from.element;
    const int a = rkvi_unit_of(*dst, to), b = rkvi_unit_of(*src, from);
    rkvi_copy_args args;
    memset(&args, 0, sizeof args);
    args.unit = a < b ? a : b;
    while (!whole && args.unit > to.element)
        args.unit /= 2; /* one side is transposed: no more than an element at a time */
    args.element_units =
        whole ? static_cast<int>(static_cast<int64_t>(to.n_elements) * to.element / args.unit)
              : to.element / args.unit;
    args.per_row = whole ? args.element_units : to.n_elements * args.element_units;
    args.dst = rkvi_view_of(static_cast<char *>(dst->data), dst->block_table, to, 0);
    args.src = rkvi_view_of(static_cast<char *>(src->data), src->block_table, from, 0);
    args.dst_head = to.head;
    args.src_head = from.head;
    args.dst_dim = to.dim;
    args.src_dim = from.dim;
    args.dst_token = dst_token;
    args.src_token = src_token;
    args.n_tokens = n_tokens;
    args.n_units = static_cast<int64_t>(dst->heads) * n_tokens * args.per_row;
    return rkvi_status_of(rkvi_launch(rkvi_copy_rows,
                                      (args.n_units + RKVI_MOVE_THREADS - 1) / RKVI_MOVE_THREADS,
                                      RKVI_MOVE_THREADS, 0, rkvi_stream(self), args));
}

struct rkvi_fill_args {
    int32_t *positions;
    int64_t n; /* in all: n_sets * per_set */
    int per_set, stride, row, first;
};
static __global__ void __launch_bounds__(RKVI_MOVE_THREADS)
    rkvi_fill_positions(const rkvi_fill_args args)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * RKVI_MOVE_THREADS;
    int64_t i = static_cast<int64_t>(blockIdx.x) * RKVI_MOVE_THREADS + threadIdx.x;
    for (; i < args.n; i += step) {
        const int at = static_cast<int>(i % args.per_set);
        args.positions[i / args.per_set * args.stride + args.row + at] = args.first + at;
    }
}
static rkv_status rkvi_cuda_fill_positions(const rkv_backend *self, int32_t *positions, int n_sets,
                                           int stride, int row, int first, int n)
{
    const rkvi_fill_args args = {
        positions, static_cast<int64_t>(n_sets) * n, n, stride, row, first
    };
    return rkvi_status_of(rkvi_launch(rkvi_fill_positions,
                                      (args.n + RKVI_MOVE_THREADS - 1) / RKVI_MOVE_THREADS,
                                      RKVI_MOVE_THREADS, 0, rkvi_stream(self), args));
}

/* ==== 19. Host side =========================================================================
 * In: arguments that rkv.h has checked, and a config whose zeros are filled in.  Out: launches. */

static bool rkvi_reads_keys(const rkv_config &config)
{
    return config.policy != RKV_POLICY_RANDOM && config.policy != RKV_POLICY_OWN_SCORE;
}
static bool rkvi_reads_queries(const rkv_config &config)
{
    return config.policy == RKV_POLICY_RKV ? config.lambda > 0 : rkvi_planes_of(config) > 0;
}
static bool rkvi_needs_rope(const rkv_config &config)
{
    return rkvi_planes_of(config) == 2 || config.policy == RKV_POLICY_TRIATTENTION;
}
static int rkvi_group_of(const rkv_layer &layer)
{
    return layer.queries.heads >= layer.keys.heads ? layer.queries.heads / layer.keys.heads : 1;
}

/* Are the keys quantised, or the queries of another type? */
static bool rkvi_needs_any(const rkv_layer &layer, bool with_queries)
{
    return layer.keys.dtype > RKV_BF16 || (with_queries && layer.queries.dtype != layer.keys.dtype);
}

static rkvi_shape rkvi_shape_of(const rkv_layer &layer, bool with_queries)
{
    rkvi_shape shape;
    memset(&shape, 0, sizeof shape); /* compared as bytes */
    shape.keys = rkvi_strides_of(layer.keys);
    shape.key_load = shape.key_unit = rkvi_unit_of(layer.keys, shape.keys);
    shape.value_unit = 1;
    if (layer.values.data) {
        shape.values = rkvi_strides_of(layer.values);
        shape.value_unit = rkvi_unit_of(layer.values, shape.values);
    }
    shape.group = rkvi_group_of(layer);
    if (layer.queries.data && layer.queries.heads >= layer.keys.heads) {
        shape.queries = rkvi_strides_of(layer.queries);
        shape.query_load = rkvi_unit_of(layer.queries, shape.queries);
    }
    shape.heads = layer.keys.heads;
    shape.head_dim = layer.keys.dim;
    shape.dtype = layer.keys.dtype;
    if (rkvi_needs_any(layer, with_queries)) {
        shape.dtype = rkvi_dtype_of<rkvi_any>::value;
        shape.key_load = layer.keys.dtype;
        shape.query_load = layer.queries.dtype;
    }
    shape.row_stride = layer.row_stride ? layer.row_stride : layer.keys.tokens;
    shape.scale = layer.scale > 0 ? layer.scale : 1.0f / sqrtf(static_cast<float>(layer.keys.dim));
    shape.softcap = layer.softcap;
    return shape;
}

static bool rkvi_is_scored(const rkv_config *config, const rkv_layer &layer)
{
    return layer.n_tokens > config->budget && config->budget > config->protect + config->pinned;
}

static int64_t rkvi_tiles_of(int n_tokens)
{
    return (static_cast<int64_t>(n_tokens) - 1) / RKVI_TILE + 1;
}

/* A call as the host sees it. */
struct rkvi_plan {
    const rkv_call *call;
    cudaStream_t stream;
    rkvi_upload_head head;
    size_t bytes; /* of the workspace */
    int64_t n_jobs, scored_tiles;
    int most_tokens, most_scored, most_slices;
    bool dtypes[4], has_tables, has_pins; /* by rkvi_shape.dtype */
    bool has_bias, has_more, has_unscored_state;
    float *sums, *vectors; /* see rkvi_more */
    int max_group;
};

/* Writes a record, unless error is NULL, and returns the status. */
static rkv_status rkvi_record(rkv_error *error, rkv_status status, const char *rule, int layer)
{
    const rkv_error out = { rule, status, layer, -1, -1 };
    if (error) *error = out;
    return status;
}

static rkv_status rkvi_refuse_device(rkv_error *error, cudaError_t code)
{
    const char *rule = cudaGetErrorString(code); /* static text */
    if (code == cudaErrorNoDevice) rule = "device: there is no CUDA device";
    if (code == cudaErrorInsufficientDriver)
        rule = "device: its driver is older than the CUDA runtime of this program";
    if (code == cudaErrorNoKernelImageForDevice)
        rule = "device: rkv_cuda.cu was not compiled for it (nvcc -arch)";
    return rkvi_record(error, RKV_ERROR_DEVICE, rule, -1);
}

/* Hands out pieces of the workspace. The same code measures it, with base NULL. */
struct rkvi_arena {
    char *base;
    size_t used;
    bool overflow;
};
template <typename T>
static void rkvi_take(rkvi_arena *arena, T **out, size_t count, size_t per_count)
{
    const size_t align = 64, most = PTRDIFF_MAX;
    *out = reinterpret_cast<T *>(arena->base + arena->used);
    if (per_count && count > (most - align - arena->used) / sizeof(T) / per_count)
        arena->overflow = true;
    else
        arena->used += (count * per_count * sizeof(T) + align - 1) / align * align;
}

/* Rows of logits per KV head: see rkvi_job. */
static int rkvi_logit_rows(const rkv_config *config, int max_group)
{
    if (config->policy == RKV_POLICY_TRIATTENTION) return max_group;
    if (config->policy == RKV_POLICY_RKV) return rkvi_reads_queries(*config) ? config->votes : 0;
    return rkvi_planes_of(*config) > 0;
}

/* Lays the workspace out: 24 bytes per token and KV head, 4 more for every row of logits, and for
 * policies with state 1 / 8 more for every query. */
static rkv_status rkvi_carve(rkvi_plan *plan, void *workspace)
{
    const rkv_config *config = plan->call->config;
    const size_t align = 64, skew = reinterpret_cast<uintptr_t>(workspace) % align;
    char *aligned = static_cast<char *>(workspace) + (skew ? align - skew : 0);
    rkvi_arena arena = { workspace ? aligned : NULL, 0, false };
    rkvi_arrays &arrays = plan->head.arrays;
    size_t tokens = 0, dims = 0, jobs = 0, tiles = 0;
    plan->max_group = 1;
    for (int l = 0; l < plan->call->n_layers && !arena.overflow; l++) {
        const rkv_layer &layer = plan->call->layers[l];
        const size_t heads = static_cast<size_t>(layer.keys.heads);
        jobs += heads;
        tiles += heads * static_cast<size_t>(rkvi_tiles_of(layer.n_tokens) + 1);
        if (rkvi_group_of(layer) > plan->max_group) plan->max_group = rkvi_group_of(layer);
        tokens += heads * static_cast<size_t>(layer.n_tokens); /* both below 2^31 */
        dims += heads * static_cast<size_t>(layer.keys.dim);
        arena.overflow = tokens > PTRDIFF_MAX / 2 || dims > PTRDIFF_MAX / 2;
        if (jobs >= RKVI_MAX_JOBS)
            return rkvi_record(config->error, RKV_ERROR_UNSUPPORTED,
                               "layers: \"cuda\" takes fewer than 2^26 KV heads in a call", l);
    }
    const size_t group = static_cast<size_t>(plan->max_group);
    const size_t votes = static_cast<size_t>(config->votes);
    const int logit_rows = rkvi_logit_rows(config, plan->max_group);
    rkvi_take(&arena, &plan->head.args.control, 1, 1);
    rkvi_take(&arena, &plan->head.args.jobs, jobs, 1);
    rkvi_take(&arena, &plan->head.args.open_count, jobs, 1);
    rkvi_take(&arena, &arrays.exempt, tokens, 1);
    rkvi_take(&arena, &arrays.unit_sum, dims, 1);
    rkvi_take(&arena, &arrays.logits, tokens, static_cast<size_t>(logit_rows));
    rkvi_take(&arena, &arrays.inv_norm, tokens, 1);
    rkvi_take(&arena, &arrays.redundancy, tokens, 1);
    rkvi_take(&arena, &arrays.open_rows, tokens, 1);
    rkvi_take(&arena, &arrays.open_need, tokens, 1);
    if (rkvi_planes_of(*config) > 0) rkvi_take(&arena, &plan->sums, tiles, 2 * votes * group);
    if (config->policy == RKV_POLICY_TRIATTENTION)
        rkvi_take(&arena, &plan->vectors, dims + jobs, 3 * group); /* a pair has 2 dims, or 1 */
    plan->head.args.logit_rows = logit_rows;
    plan->n_jobs = static_cast<int64_t>(jobs);
    plan->bytes = arena.used + align;
    if (arena.overflow)
        return rkvi_record(config->error, RKV_ERROR_ARGUMENT, RKVI_RULE_TOO_LARGE, -1);
    return RKV_OK;
}

static rkv_status rkvi_cuda_workspace_size(const rkv_backend *self, const rkv_config *config,
                                           const rkv_layer *layers, int n_layers, size_t *bytes)
{
    rkvi_plan plan;
    rkv_call call;
    (void)self;
    memset(&plan, 0, sizeof plan);
    memset(&call, 0, sizeof call);
    call.config = config;
    call.layers = const_cast<rkv_layer *>(layers);
    call.n_layers = n_layers;
    plan.call = &call;
    const rkv_status status = rkvi_carve(&plan, NULL);
    if (status == RKV_OK) *bytes = plan.bytes;
    return status;
}

/* Kernels count the units of a row in int. */
static bool rkvi_row_is_too_long(const rkv_tensor &tensor)
{
    const int64_t most = INT32_MAX - 4096;
    return static_cast<int64_t>(rkvi_row_elements(tensor)) > most / rkvi_element_bytes(tensor);
}

/* NULL, or what this backend does not support in a layer. */
static const char *rkvi_unsupported_rule(const rkv_call &call, const rkv_layer &layer,
                                         const rkvi_shape &shape)
{
    const rkv_config *config = call.config;
    const int element = layer.keys.dtype == RKV_F32 ? 4 : 2;
    const bool is_any = shape.dtype == rkvi_dtype_of<rkvi_any>::value; /* at any address */
    const bool scores = call.stage == RKV_SCORE || call.stage == RKV_COMPRESS;
    if (rkvi_row_is_too_long(layer.keys)) return "layer.keys.dim: \"cuda\" takes rows below 2 GB";
    if (layer.values.data && rkvi_row_is_too_long(layer.values))
        return "layer.values.dim: \"cuda\" takes rows below 2 GB";
    if (!scores || !rkvi_is_scored(config, layer) || !rkvi_reads_keys(*config)) return NULL;
    if (layer.keys.dtype == RKV_OPAQUE) return "layer.keys.load: \"cuda\" has no row loaders";
    if (!is_any && shape.key_load < element)
        return "layer.keys: \"cuda\" needs data and strides aligned to the element size";
    if (!rkvi_reads_queries(*config)) return NULL;
    if (layer.queries.dtype == RKV_OPAQUE) return "layer.queries.load: \"cuda\" has no row loaders";
    if (!is_any && shape.query_load < element)
        return "layer.queries: \"cuda\" needs data and strides aligned to the element size";
    if (static_cast<int64_t>(shape.group) * config->votes >= RKVI_NO_ROW)
        return "layer.queries: \"cuda\" takes fewer than 2^30 - 1 queries per KV head";
    return NULL;
}

static int rkvi_slices(int64_t row_bytes, int unit)
{
    return static_cast<int>((row_bytes / unit + RKVI_SLICE_UNITS - 1) / RKVI_SLICE_UNITS);
}

/* The largest sizes of the call: they decide how many blocks the launches get. */
static void rkvi_measure(rkvi_plan *plan, const rkv_layer &layer, const rkvi_shape &shape)
{
    const rkv_config *config = plan->call->config;
    int slices = rkvi_slices(static_cast<int64_t>(shape.keys.n_elements) * shape.keys.element,
                             shape.key_unit);
    if (layer.values.data)
        slices += rkvi_slices(static_cast<int64_t>(shape.values.n_elements) * shape.values.element,
                              shape.value_unit);
    slices += (layer.positions != NULL) + (layer.pins != NULL) + (layer.bias != NULL) +
              (rkvi_planes_of(*config) > 0);
    if (layer.bias || layer.first_query) plan->has_more = true;
    if (slices > plan->most_slices) plan->most_slices = slices;
    if (layer.n_tokens > plan->most_tokens) plan->most_tokens = layer.n_tokens;
    if (layer.n_tokens <= config->budget) return;
    if (layer.keys.block_table || layer.values.block_table || layer.queries.block_table)
        plan->has_tables = true;
    if (layer.pins) plan->has_pins = true;
    if (layer.n_new && (plan->call->stage == RKV_COMPACT || !rkvi_is_scored(config, layer)))
        plan->has_unscored_state = rkvi_planes_of(*config) > 0;
    if (!rkvi_is_scored(config, layer)) return;
    if (layer.bias) plan->has_bias = true;
    if (layer.n_tokens > plan->most_scored) plan->most_scored = layer.n_tokens;
    plan->scored_tiles += static_cast<int64_t>(shape.heads) * rkvi_tiles_of(layer.n_tokens);
    plan->dtypes[shape.dtype] = true;
}

/* Is layer l the first of the layers that share its kept set? */
static bool rkvi_leads(const rkv_config *config, const rkv_layer *layers, int l)
{
    return config->scope != RKV_PER_SEQUENCE || l == 0 ||
           layers[l].sequence != layers[l - 1].sequence;
}

/* The KV heads of the layers that share the kept set that layer l leads. */
static int rkvi_set_jobs(const rkv_call &call, int l)
{
    int n = call.layers[l].keys.heads;
    for (l++; l < call.n_layers && !rkvi_leads(call.config, call.layers, l); l++)
        n += call.layers[l].keys.heads;
    return n;
}

/* Rows that a layer keeps. listed: rows of the list that rkv_compact gets. */
static int rkvi_rows_kept(const rkv_call &call, int n_tokens, int listed)
{
    if (n_tokens <= call.config->budget) return n_tokens;
    return call.stage == RKV_COMPACT ? listed : call.config->budget;
}

/* The entry of layer l; `next` has the offsets, which run on from layer to layer. */
static rkvi_entry rkvi_entry_of(const rkv_call &call, int l, int leader, const rkvi_entry &next)
{
    const rkv_layer &layer = call.layers[l], &first = call.layers[leader];
    rkvi_entry entry = next;
    entry.keys = static_cast<char *>(layer.keys.data);
    entry.values = static_cast<char *>(layer.values.data);
    entry.queries = static_cast<char *>(layer.queries.data);
    entry.key_table = layer.keys.block_table;
    entry.value_table = layer.values.block_table;
    entry.query_table = layer.queries.block_table;
    entry.positions = layer.positions;
    entry.pins = layer.pins;
    entry.scores = layer.scores;
    entry.layer = l;
    entry.n_tokens = layer.n_tokens;
    entry.n_keep = rkvi_rows_kept(call, layer.n_tokens, first.n_kept);
    entry.kept = first.kept;
    entry.shared = first.shared_scores;
    return entry;
}

template <int N>
static cudaError_t rkvi_send_entries(const rkvi_plan &plan, const rkvi_upload_args<N> &up)
{
    const int n = up.head.n_entries;
    return rkvi_launch(rkvi_upload<N>, n > 0 ? n : 1, RKVI_UPLOAD_THREADS, 0, plan.stream, up);
}
static cudaError_t rkvi_send(const rkvi_plan &plan, rkvi_upload_args<RKVI_UPLOAD_ENTRIES> *up)
{
    rkvi_upload_args<RKVI_FEW_ENTRIES> few;
    cudaError_t error;
    if (up->head.n_entries <= RKVI_FEW_ENTRIES) {
        few.head = up->head;
        memcpy(few.entries, up->entries, sizeof few.entries);
        error = rkvi_send_entries(plan, few);
    } else
        error = rkvi_send_entries(plan, *up);
    up->head.n_entries = 0;
    up->head.is_first = 0;
    return error;
}

/* Describes all layers to the device; one launch takes as many of equal shape as its parameters
 * hold. */
static cudaError_t rkvi_upload_layers(const rkvi_plan &plan)
{
    const rkv_call &call = *plan.call;
    rkvi_upload_args<RKVI_UPLOAD_ENTRIES> up;
    rkvi_entry next;
    int64_t next_dim = 0;
    int leader = 0;
    cudaError_t error = cudaSuccess;
    memset(&up, 0, sizeof up);
    memset(&next, 0, sizeof next);
    up.head = plan.head;
    up.head.is_first = 1;
    for (int l = 0; l < call.n_layers && error == cudaSuccess; l++) {
        const rkvi_shape shape = rkvi_shape_of(call.layers[l], rkvi_reads_queries(*call.config));
        if (up.head.n_entries == RKVI_UPLOAD_ENTRIES ||
            (up.head.n_entries > 0 && memcmp(&shape, &up.head.shape, sizeof shape) != 0))
            error = rkvi_send(plan, &up);
        if (rkvi_leads(call.config, call.layers, l)) {
            leader = l;
            next.set_token = next.first_token;
            next.set_job = next.first_job;
            next.set_jobs = rkvi_set_jobs(call, l);
        }
        if (up.head.n_entries == 0) up.head.first_dim = next_dim;
        up.head.shape = shape;
        up.entries[up.head.n_entries++] = rkvi_entry_of(call, l, leader, next);
        next.first_job += shape.heads;
        next.first_token += static_cast<int64_t>(shape.heads) * call.layers[l].n_tokens;
        next_dim += static_cast<int64_t>(shape.heads) * shape.head_dim;
    }
    return error == cudaSuccess ? rkvi_send(plan, &up) : error;
}

/* x^n, with the same roundings as in rkv.h. */
static float rkvi_power(float x, int n)
{
    double power = 1, factor = static_cast<double>(x);
    for (; n > 0; n /= 2, factor *= factor)
        if (n % 2) power *= factor;
    return static_cast<float>(power);
}

static void rkvi_fill_rope(const rkv_rope &from, int dim, rkvi_rope *rope)
{
    const int dims = from.dims > 0 ? from.dims : dim;
    const double base = from.base > 0 ? static_cast<double>(from.base) : 10000.0;
    rope->n_rotated = from.pairing == RKV_ROPE_NONE ? 0 : dims / 2;
    rope->adjacent = from.pairing == RKV_ROPE_ADJACENT;
    rope->frequencies = from.frequencies;
    for (int k = 0; k < RKVI_MAX_POWERS && rope->n_rotated >> k; k++)
        rope->powers[k] = pow(base, -2.0 * (1 << k) / dims);
}

static void rkvi_fill_more_rules(uintptr_t *rules)
{
    enum { FIRST = RKVI_N_USUAL_RULES };
    rules[RKVI_BAD_FREQUENCY - FIRST] = reinterpret_cast<uintptr_t>(RKVI_RULE_FREQUENCY);
    rules[RKVI_BAD_BIAS - FIRST] = reinterpret_cast<uintptr_t>(RKVI_RULE_BIAS);
    rules[RKVI_BAD_STATE - FIRST] = reinterpret_cast<uintptr_t>(RKVI_RULE_STATE);
    rules[RKVI_BAD_MEANS - FIRST] = reinterpret_cast<uintptr_t>(RKVI_RULE_MEANS);
}

/* All that the entries of an upload must have in common, apart from the entries. */
static void rkvi_fill_more(const rkvi_plan &plan, const rkv_layer &layer, rkvi_more_args *up)
{
    const rkv_config *config = plan.call->config;
    memset(up, 0, sizeof *up); /* compared as bytes */
    up->args = plan.head.args;
    up->sums = plan.sums;
    up->vectors = plan.vectors;
    up->max_group = plan.max_group;
    rkvi_fill_more_rules(up->rules);
    if (rkvi_needs_rope(*config)) rkvi_fill_rope(layer.rope, layer.keys.dim, &up->rope);
    up->planes = rkvi_planes_of(*config);
    up->head_dim = layer.keys.dim;
    up->heads = layer.keys.heads;
    up->row_stride = layer.row_stride ? layer.row_stride : layer.keys.tokens;
    up->n_queries = layer.queries.heads;
}

static cudaError_t rkvi_send_more(const rkvi_plan &plan, rkvi_more_args *up)
{
    const int n = up->n_entries;
    const cudaError_t error =
        rkvi_launch(rkvi_upload_more, n, RKVI_UPLOAD_THREADS, 0, plan.stream, *up);
    up->n_entries = 0;
    return error;
}

static rkvi_more_entry rkvi_more_entry_of(const rkv_config *config, const rkv_layer &layer,
                                          const rkv_layer &leader)
{
    rkvi_more_entry entry;
    memset(&entry, 0, sizeof entry);
    entry.bias = layer.bias;
    entry.state = rkvi_planes_of(*config) > 0 ? layer.state : NULL;
    entry.positions = leader.positions;
    entry.means = layer.query_means;
    entry.n_new = layer.n_new;
    entry.first_query = layer.first_query;
    entry.fade = config->policy == RKV_POLICY_H2O ? 1.0f : rkvi_power(config->decay, layer.n_new);
    return entry;
}

/* Describes what other policies and biases need. */
static cudaError_t rkvi_upload_all_more(const rkvi_plan &plan)
{
    const rkv_call &call = *plan.call;
    const int64_t group = plan.max_group, votes = call.config->votes;
    rkvi_more_args up, wanted;
    int leader = 0, job = 0;
    int64_t first_sum = 0, first_vector = 0;
    cudaError_t error = cudaSuccess;
    memset(&up, 0, sizeof up);
    for (int l = 0; l < call.n_layers && error == cudaSuccess; l++) {
        const rkv_layer &layer = call.layers[l];
        const int64_t heads = layer.keys.heads;
        rkvi_fill_more(plan, layer, &wanted);
        wanted.n_entries = up.n_entries;
        if (up.n_entries == RKVI_MORE_ENTRIES ||
            (up.n_entries > 0 && memcmp(&wanted, &up, offsetof(rkvi_more_args, entries)) != 0))
            error = rkvi_send_more(plan, &up);
        wanted.n_entries = up.n_entries;
        memcpy(&up, &wanted, offsetof(rkvi_more_args, entries));
        if (rkvi_leads(call.config, call.layers, l)) leader = l;
        rkvi_more_entry *entry = &up.entries[up.n_entries++];
        *entry = rkvi_more_entry_of(call.config, layer, call.layers[leader]);
        entry->first_job = job;
        entry->first_sum = first_sum;
        entry->first_vector = first_vector;
        job += layer.keys.heads;
        first_sum += heads * (rkvi_tiles_of(layer.n_tokens) + 1) * votes * group;
        first_vector += heads * 3 * rkvi_n_pairs(layer.keys.dim) * group;
    }
    return error == cudaSuccess ? rkvi_send_more(plan, &up) : error;
}

/* What rkvi_check checks: what the CPU checks in this stage. */
static int rkvi_checks_of(const rkvi_plan &plan)
{
    const rkv_stage stage = plan.call->stage;
    int checks = 0;
    if (plan.has_tables && stage != RKV_SELECT) checks |= RKVI_CHECK_TABLES;
    if (plan.has_pins && (stage == RKV_SELECT || stage == RKV_COMPRESS)) checks |= RKVI_CHECK_PINS;
    if (plan.most_scored > 0 && stage == RKV_SELECT) checks |= RKVI_CHECK_SCORES;
    if (plan.most_tokens > plan.call->config->budget && stage == RKV_COMPACT)
        checks |= RKVI_CHECK_LISTS;
    if (stage != RKV_SCORE && stage != RKV_COMPRESS) return checks;
    if (plan.has_bias) checks |= RKVI_CHECK_BIAS;
    if (plan.most_scored > 0 && rkvi_planes_of(*plan.call->config) > 0) checks |= RKVI_CHECK_STATE;
    return checks;
}

static void rkvi_fill_rules(uintptr_t *rules)
{
    const char *texts[RKVI_N_USUAL_RULES];
    texts[RKVI_BAD_PINS] = RKVI_RULE_PINS;
    texts[RKVI_BAD_KEY_BLOCKS] = RKVI_RULE_KEY_BLOCKS;
    texts[RKVI_BAD_VALUE_BLOCKS] = RKVI_RULE_VALUE_BLOCKS;
    texts[RKVI_BAD_QUERY_BLOCKS] = RKVI_RULE_QUERY_BLOCKS;
    texts[RKVI_BAD_QUERY] = RKVI_RULE_QUERY;
    texts[RKVI_BAD_KEY] = RKVI_RULE_KEY;
    texts[RKVI_BAD_LOGITS] = RKVI_RULE_LOGITS;
    texts[RKVI_BAD_SCORE] = RKVI_RULE_SCORE;
    texts[RKVI_BAD_KEPT_RANGE] = RKVI_RULE_KEPT_RANGE;
    texts[RKVI_BAD_KEPT_ORDER] = RKVI_RULE_KEPT_ORDER;
    texts[RKVI_BAD_KEPT_PINNED] = RKVI_RULE_KEPT_PINNED;
    texts[RKVI_BAD_KEPT_PINS] = RKVI_RULE_KEPT_PINS;
    for (int i = 0; i < RKVI_N_USUAL_RULES; i++) rules[i] = reinterpret_cast<uintptr_t>(texts[i]);
}

/* Everything before the first launch: every refusal of the host. */
static rkv_status rkvi_make_plan(rkvi_plan *plan, const rkv_backend *self, const rkv_call *call)
{
    rkv_error *error = call->config->error;
    rkvi_args &args = plan->head.args;
    memset(plan, 0, sizeof *plan);
    plan->call = call;
    plan->stream = rkvi_stream(self);
    const rkv_status status = rkvi_carve(plan, call->workspace);
    if (status != RKV_OK) return status;
    if (!call->workspace)
        return rkvi_record(error, RKV_ERROR_WORKSPACE, RKVI_RULE_WORKSPACE_NULL, -1);
    if (call->bytes < plan->bytes)
        return rkvi_record(error, RKV_ERROR_WORKSPACE, RKVI_RULE_WORKSPACE_SIZE, -1);
    for (int l = 0; l < call->n_layers; l++) {
        const rkvi_shape shape = rkvi_shape_of(call->layers[l], rkvi_reads_queries(*call->config));
        const char *rule = rkvi_unsupported_rule(*call, call->layers[l], shape);
        if (rule) return rkvi_record(error, RKV_ERROR_UNSUPPORTED, rule, l);
        rkvi_measure(plan, call->layers[l], shape);
    }
    rkvi_fill_rules(plan->head.rules);
    args.config = *call->config;
    args.n_jobs = static_cast<int>(plan->n_jobs);
    args.checks = rkvi_checks_of(*plan);
    args.scoring = call->stage == RKV_SCORE || call->stage == RKV_COMPRESS;
    args.votes = call->config->votes;
    args.importance = rkvi_reads_queries(*call->config);
    args.redundancy = call->config->lambda < 1;
    if (call->config->policy != RKV_POLICY_RKV || call->config->votes > call->config->window)
        plan->has_more = true;
    return RKV_OK;
}

/* Launches a kernel for every job, `items` blocks each. */
static cudaError_t rkvi_launch_items(const rkvi_plan &plan, void (*kernel)(rkvi_args), int items,
                                     int threads, size_t shared_bytes)
{
    rkvi_args args = plan.head.args;
    args.items = items;
    return rkvi_launch(kernel, plan.n_jobs * items, threads, shared_bytes, plan.stream, args);
}

/* Blocks per job of the far scan, which usually has little or nothing to do: in all as many as a
 * GPU runs at a time, and up to four times as many for long rows, which may keep some blocks busy
 * much longer than others. */
static int rkvi_far_items(int tiles, int64_t n_jobs)
{
    const int64_t at_work = 512, long_tiles = 64, most = 4;
    const int64_t turns = tiles < long_tiles          ? 1
                          : tiles / long_tiles < most ? tiles / long_tiles
                                                      : most;
    const int64_t items = at_work * turns / n_jobs;
    return static_cast<int>(items < 1 ? 1 : items < tiles ? items : tiles);
}

/* Blocks per job of the near passes: one per tile of the longest job, but at most twice the average
 * number of tiles. With one long job beside many short ones a block takes several tiles. */
static int rkvi_near_items(const rkvi_plan &plan)
{
    const int64_t most = (plan.most_scored - 1) / RKVI_TILE + 1;
    const int64_t enough = 2 * ((plan.scored_tiles - 1) / plan.n_jobs + 1);
    return static_cast<int>(most < enough ? most : enough);
}

template <typename T> static cudaError_t rkvi_score_type(const rkvi_plan &plan)
{
    const int tiles = (plan.most_scored - 1) / RKVI_TILE + 1, items = rkvi_near_items(plan);
    const int64_t plenty = 4096; /* blocks fill any GPU; with more work tiles share their queries */
    const int64_t turns = items * plan.n_jobs / plenty;
    const int per_item = static_cast<int>(turns < 1 ? 1 : turns < 4 ? turns : 4);
    if (!plan.dtypes[rkvi_dtype_of<T>::value]) return cudaSuccess;
    cudaError_t error = rkvi_launch_items(plan, rkvi_attend<T>, (items - 1) / per_item + 1,
                                          RKVI_TILE_THREADS, sizeof(rkvi_tiles));
    if (!plan.head.args.redundancy) return error;
    if (error == cudaSuccess)
        error = rkvi_launch_items(plan, rkvi_scan_near<T>, items, RKVI_TILE_THREADS,
                                  sizeof(rkvi_tiles));
    if (error == cudaSuccess && plan.most_scored > RKVI_NEAR_COLUMNS)
        error = rkvi_launch_items(plan, rkvi_scan_far<T>, rkvi_far_items(tiles, plan.n_jobs),
                                  RKVI_TILE_THREADS, sizeof(rkvi_tiles));
    return error;
}

static cudaError_t rkvi_run_rkv(rkvi_plan *plan)
{
    cudaError_t error = rkvi_score_type<float>(*plan);
    if (error == cudaSuccess) error = rkvi_score_type<rkvi_f16>(*plan);
    if (error == cudaSuccess) error = rkvi_score_type<rkvi_bf16>(*plan);
    if (error == cudaSuccess) error = rkvi_score_type<rkvi_any>(*plan);
    if (error != cudaSuccess) return error;
    const rkv_config *config = plan->call->config;
    const bool plain = config->votes <= config->window && !config->mean_pool && !plan->has_bias;
    return rkvi_launch_items(*plan, plain ? rkvi_score<true> : rkvi_score<false>, 1,
                             RKVI_HEAD_THREADS, sizeof(rkvi_head_memory));
}

/* Launches one of four kernels for tiles of keys, for each type that occurs. */
static cudaError_t rkvi_launch_types(const rkvi_plan &plan, void (*const kernels[4])(rkvi_args),
                                     size_t shared_bytes)
{
    static const int types[] = { RKV_F32, RKV_F16, RKV_BF16, rkvi_dtype_of<rkvi_any>::value };
    cudaError_t error = cudaSuccess;
    for (int i = 0; i < 4 && error == cudaSuccess; i++)
        if (plan.dtypes[types[i]])
            error = rkvi_launch_items(plan, kernels[i], rkvi_near_items(plan), RKVI_TILE_THREADS,
                                      shared_bytes);
    return error;
}
static cudaError_t rkvi_run_votes(rkvi_plan *plan)
{
    void (*const votes[])(rkvi_args) = { rkvi_vote<float>, rkvi_vote<rkvi_f16>,
                                         rkvi_vote<rkvi_bf16>, rkvi_vote<rkvi_any> };
    void (*const compares[])(rkvi_args) = { rkvi_compare<float>, rkvi_compare<rkvi_f16>,
                                            rkvi_compare<rkvi_bf16>, rkvi_compare<rkvi_any> };
    cudaError_t error = rkvi_launch_types(*plan, votes, sizeof(rkvi_tiles));
    if (error == cudaSuccess)
        error =
            rkvi_launch_items(*plan, rkvi_prepare, 1, RKVI_HEAD_THREADS, sizeof(rkvi_head_memory));
    plan->head.args.folds = true;
    if (error == cudaSuccess) error = rkvi_launch_types(*plan, votes, sizeof(rkvi_tiles));
    if (error == cudaSuccess && rkvi_needs_rope(*plan->call->config))
        error = rkvi_launch_types(*plan, compares, sizeof(rkvi_tiles));
    return error;
}
static cudaError_t rkvi_run_expectations(const rkvi_plan &plan)
{
    void (*const expects[])(rkvi_args) = { rkvi_expect<float>, rkvi_expect<rkvi_f16>,
                                           rkvi_expect<rkvi_bf16>, rkvi_expect<rkvi_any> };
    const cudaError_t error =
        rkvi_launch_items(plan, rkvi_prepare, 1, RKVI_HEAD_THREADS, sizeof(rkvi_head_memory));
    return error == cudaSuccess ? rkvi_launch_types(plan, expects, 0) : error;
}
static cudaError_t rkvi_run_others(rkvi_plan *plan)
{
    cudaError_t error = cudaSuccess;
    if (plan->head.args.importance) error = rkvi_run_votes(plan);
    if (plan->call->config->policy == RKV_POLICY_TRIATTENTION) error = rkvi_run_expectations(*plan);
    if (error != cudaSuccess) return error;
    return rkvi_launch_items(*plan, rkvi_rate, 1, RKVI_HEAD_THREADS, sizeof(rkvi_rate_memory));
}

static cudaError_t rkvi_run_score(rkvi_plan *plan, bool select_too)
{
    plan->head.args.select_too = select_too;
    cudaError_t error =
        plan->call->config->policy == RKV_POLICY_RKV ? rkvi_run_rkv(plan) : rkvi_run_others(plan);
    if (error == cudaSuccess && plan->call->config->scope != RKV_PER_HEAD)
        error =
            rkvi_launch_items(*plan, rkvi_share, (plan->most_scored - 1) / RKVI_HEAD_THREADS + 1,
                              RKVI_HEAD_THREADS, 0);
    return error;
}

static cudaError_t rkvi_run_select(const rkvi_plan &plan)
{
    return rkvi_launch_items(plan, rkvi_select, 1, RKVI_HEAD_THREADS, sizeof(rkvi_head_memory));
}

static cudaError_t rkvi_run_compact(const rkvi_plan &plan)
{
    cudaError_t error = cudaSuccess;
    if (plan.has_unscored_state)
        error = rkvi_launch_items(plan, rkvi_start_state, 1, RKVI_HEAD_THREADS, 0);
    if (error != cudaSuccess) return error;
    return rkvi_launch_items(plan, rkvi_compact, plan.most_slices, RKVI_MOVE_THREADS, 0);
}

/* New rows that this stage has scored, or moved, are no longer new. */
static void rkvi_set_new_rows(const rkv_call &call)
{
    if (rkvi_planes_of(*call.config) == 0 || call.stage == RKV_SELECT) return;
    for (int l = 0; l < call.n_layers; l++) {
        rkv_layer *layer = &call.layers[l];
        if (call.stage == RKV_SCORE ? rkvi_is_scored(call.config, *layer)
                                    : layer->n_tokens > call.config->budget)
            layer->n_new = 0;
    }
}

/* Updates the caller's layers after a stage. */
static void rkvi_set_counts(const rkv_call &call)
{
    int listed = 0;
    for (int l = 0; l < call.n_layers; l++) {
        rkv_layer *layer = &call.layers[l];
        if (rkvi_leads(call.config, call.layers, l)) listed = layer->n_kept;
        layer->n_kept = rkvi_rows_kept(call, layer->n_tokens, listed);
        if (call.stage != RKV_SELECT) layer->n_tokens = layer->n_kept;
    }
}

static cudaError_t rkvi_run_compress(rkvi_plan *plan)
{
    const bool selects = plan->most_scored > 0 && plan->call->config->scope == RKV_PER_HEAD;
    cudaError_t error = cudaSuccess;
    if (plan->most_scored > 0) error = rkvi_run_score(plan, selects);
    if (error == cudaSuccess && !selects) error = rkvi_run_select(*plan);
    if (error == cudaSuccess && plan->most_tokens > plan->call->config->budget)
        error = rkvi_run_compact(*plan);
    return error;
}

static cudaError_t rkvi_run_stage(rkvi_plan *plan)
{
    switch (plan->call->stage) {
    case RKV_SCORE: /* also where nothing is scored, if there is a fault to report */
        if (plan->most_scored == 0 && !plan->head.args.checks) return cudaSuccess;
        return rkvi_run_score(plan, false);
    case RKV_SELECT: return rkvi_run_select(*plan);
    case RKV_COMPACT: return rkvi_run_compact(*plan);
    case RKV_COMPRESS: return rkvi_run_compress(plan);
    }
    return cudaErrorInvalidValue;
}

static rkv_status rkvi_cuda_run(const rkv_backend *self, const rkv_call *call)
{
    rkvi_plan plan;
    const rkv_status status = rkvi_make_plan(&plan, self, call);
    if (status != RKV_OK) return status;
    cudaError_t error = rkvi_upload_layers(plan);
    if (error == cudaSuccess && plan.has_more) error = rkvi_upload_all_more(plan);
    if (error == cudaSuccess && plan.head.args.checks)
        error = rkvi_launch_items(plan, rkvi_check, 1, RKVI_HEAD_THREADS, sizeof(rkvi_head_memory));
    if (error == cudaSuccess) error = rkvi_run_stage(&plan);
    if (error != cudaSuccess) return rkvi_refuse_device(call->config->error, error);
    rkvi_set_new_rows(*call);
    if (call->stage != RKV_SCORE) rkvi_set_counts(*call);
    return RKV_OK;
}

/* ---- Means of queries ------------------------------------------------------------------------ */

static rkv_status rkvi_cuda_update_means(const rkv_backend *self, const rkv_means_call *call)
{
    const rkv_tensor &queries = *call->queries;
    const rkvi_strides strides = rkvi_strides_of(queries);
    rkv_error *error = call->config ? call->config->error : NULL;
    rkvi_means_args args;
    memset(&args, 0, sizeof args);
    if (queries.dtype == RKV_OPAQUE)
        return rkvi_record(error, RKV_ERROR_UNSUPPORTED,
                           "queries.load: \"cuda\" has no row loaders", -1);
    if (static_cast<int64_t>(queries.heads) * call->n > INT32_MAX)
        return rkvi_record(error, RKV_ERROR_UNSUPPORTED,
                           "n: \"cuda\" takes fewer than 2^31 queries in a call", -1);
    args.queries = rkvi_view_of(static_cast<char *>(queries.data), queries.block_table, strides, 0);
    args.head_stride = strides.head;
    rkvi_fill_rope(call->rope, queries.dim, &args.rope);
    args.means = call->means;
    args.record = call->config ? call->config->device_error : NULL;
    args.query_rule = reinterpret_cast<uintptr_t>(RKVI_RULE_QUERY);
    args.frequency_rule = reinterpret_cast<uintptr_t>(RKVI_RULE_FREQUENCY);
    args.heads = queries.heads;
    args.dim = queries.dim;
    args.dtype = queries.dtype;
    args.slot = call->slot;
    args.n = call->n;
    args.position = call->position;
    cudaError_t code = rkvi_launch(rkvi_update_means, args.heads, RKVI_HEAD_THREADS,
                                   sizeof(rkvi_means_memory), rkvi_stream(self), args);
    args.counts = 1;
    if (code == cudaSuccess)
        code = rkvi_launch(rkvi_update_means, 1, RKVI_HEAD_THREADS, sizeof(rkvi_means_memory),
                           rkvi_stream(self), args);
    return code == cudaSuccess ? RKV_OK : rkvi_refuse_device(error, code);
}

/* ---- The table ------------------------------------------------------------------------------ */

/* The address of a kernel, for lists of kernels of different types. */
template <typename P> static const void *rkvi_kernel(void (*kernel)(P))
{
    return reinterpret_cast<const void *>(kernel);
}

/* Asking for a kernel's attributes loads it. Otherwise the runtime loads it at its first launch,
 * which may be in a capture, and only then reports that there is no code for this device. */
static cudaError_t rkvi_load_kernel(const void *kernel)
{
    cudaFuncAttributes attributes;
    return rkvi_clear(cudaFuncGetAttributes(&attributes, kernel));
}

static cudaError_t rkvi_load_kernels()
{
    const int all_shared = 100; /* percent of the L1: room for as many tiles as possible */
    const void *const with_tiles[] = {
        rkvi_kernel(rkvi_attend<float>),       rkvi_kernel(rkvi_attend<rkvi_f16>),
        rkvi_kernel(rkvi_attend<rkvi_bf16>),   rkvi_kernel(rkvi_scan_near<float>),
        rkvi_kernel(rkvi_scan_near<rkvi_f16>), rkvi_kernel(rkvi_scan_near<rkvi_bf16>),
        rkvi_kernel(rkvi_scan_far<float>),     rkvi_kernel(rkvi_scan_far<rkvi_f16>),
        rkvi_kernel(rkvi_scan_far<rkvi_bf16>), rkvi_kernel(rkvi_attend<rkvi_any>),
        rkvi_kernel(rkvi_scan_near<rkvi_any>), rkvi_kernel(rkvi_scan_far<rkvi_any>),
        rkvi_kernel(rkvi_vote<float>),         rkvi_kernel(rkvi_vote<rkvi_f16>),
        rkvi_kernel(rkvi_vote<rkvi_bf16>),     rkvi_kernel(rkvi_vote<rkvi_any>),
        rkvi_kernel(rkvi_compare<float>),      rkvi_kernel(rkvi_compare<rkvi_f16>),
        rkvi_kernel(rkvi_compare<rkvi_bf16>),  rkvi_kernel(rkvi_compare<rkvi_any>),
    };
    const void *const others[] = {
        rkvi_kernel(rkvi_upload<RKVI_FEW_ENTRIES>),
        rkvi_kernel(rkvi_upload<RKVI_UPLOAD_ENTRIES>),
        rkvi_kernel(rkvi_upload_more),
        rkvi_kernel(rkvi_check),
        rkvi_kernel(rkvi_prepare),
        rkvi_kernel(rkvi_expect<float>),
        rkvi_kernel(rkvi_expect<rkvi_f16>),
        rkvi_kernel(rkvi_expect<rkvi_bf16>),
        rkvi_kernel(rkvi_expect<rkvi_any>),
        rkvi_kernel(rkvi_rate),
        rkvi_kernel(rkvi_start_state),
        rkvi_kernel(rkvi_update_means),
        rkvi_kernel(rkvi_score<true>),
        rkvi_kernel(rkvi_score<false>),
        rkvi_kernel(rkvi_share),
        rkvi_kernel(rkvi_select),
        rkvi_kernel(rkvi_compact),
        rkvi_kernel(rkvi_copy_rows),
        rkvi_kernel(rkvi_fill_positions),
    };
    cudaError_t error = cudaSuccess;
    for (size_t i = 0; i < sizeof others / sizeof *others && error == cudaSuccess; i++)
        error = rkvi_load_kernel(others[i]);
    for (size_t i = 0; i < sizeof with_tiles / sizeof *with_tiles && error == cudaSuccess; i++) {
        error = rkvi_load_kernel(with_tiles[i]);
        if (error == cudaSuccess)
            error = rkvi_clear(cudaFuncSetAttribute(
                with_tiles[i], cudaFuncAttributePreferredSharedMemoryCarveout, all_shared));
    }
    return error;
}
static rkv_status rkvi_backend_of(rkv_backend *out, void *stream, rkv_error *error)
{
    const rkv_backend table = { "cuda",
                                stream,
                                rkvi_cuda_workspace_size,
                                rkvi_cuda_run,
                                rkvi_cuda_alloc,
                                rkvi_cuda_free,
                                rkvi_cuda_copy,
                                rkvi_cuda_copy_rows,
                                rkvi_cuda_fill_positions,
                                rkvi_cuda_synchronize,
                                rkvi_cuda_update_means };
    int n_devices = 0;
    cudaError_t code = rkvi_clear(cudaGetDeviceCount(&n_devices));
    if (code == cudaSuccess) code = n_devices < 1 ? cudaErrorNoDevice : rkvi_load_kernels();
    if (code != cudaSuccess) return rkvi_refuse_device(error, code);
    *out = table;
    return rkvi_record(error, RKV_OK, NULL, -1);
}

/* The registry keeps a pointer to this table. No name: not registered. */
static rkv_backend rkvi_registered_table;

} /* namespace rkvi_cuda */

extern "C" rkv_status rkv_cuda_backend(rkv_backend *out, void *stream, rkv_error *error)
{
    if (!out) return rkvi_cuda::rkvi_record(error, RKV_ERROR_NULL, "out: is NULL", -1);
    return rkvi_cuda::rkvi_backend_of(out, stream, error);
}

extern "C" rkv_status rkv_cuda_register(void *stream, rkv_error *error)
{
    rkv_backend *const mine = &rkvi_cuda::rkvi_registered_table;
    rkv_backend table;
    rkv_status status;
    if (mine->name && mine->context != stream)
        return rkvi_cuda::rkvi_record(error, RKV_ERROR_ARGUMENT,
                                      "stream: \"cuda\" is registered with another stream; "
                                      "rkv_cuda_backend makes a table for each",
                                      -1);
    status = rkvi_cuda::rkvi_backend_of(&table, stream, error);
    if (status != RKV_OK) return status;
    *mine = table;
    status = rkv_backend_register(mine, error);
    if (status != RKV_OK) mine->name = NULL;
    return status;
}
