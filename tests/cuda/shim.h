/* Runs the kernels of rkv_cuda.cu on the host, so that their logic can be tested without a GPU:
 *     g++ -include tests/cuda/shim.h -x c++ -c rkv_cuda.cu         (make test does it)
 *
 * Blocks run one after the other. The threads of a block are fibers: each runs until it reaches a
 * barrier, and every warp intrinsic counts as one. So shared memory, shuffles, votes and atomics
 * behave as on a GPU. Three orders of blocks, warps and lanes (shim().order) expose the lack of a
 * barrier; shared memory starts as NaN in every block; a barrier that not all threads reach ends
 * the program. tests/cuda/race.cc finds races that no order exposes, if RKV_CUDA_RACE is defined.
 * Neither shows threads that really run at the same time, speed, or limits of registers. */
#ifndef RKV_TESTS_CUDA_SHIM_H
#define RKV_TESTS_CUDA_SHIM_H
#define RKV_CUDA_SHIM 1

#undef _FORTIFY_SOURCE /* its longjmp refuses to change stacks */
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <functional>
#include <map>
#include <set>
#include <vector>

#include "race.h"

#pragma GCC diagnostic ignored "-Wunknown-pragmas" /* #pragma unroll */

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

/* ---- Types and memory ----------------------------------------------------------------------- */
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

typedef struct shim_stream *cudaStream_t;
enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100,
    cudaErrorNoKernelImageForDevice = 209
};
inline const char *cudaGetErrorString(cudaError_t error)
{
    return error == cudaSuccess ? "no error" : "invalid argument";
}
struct cudaFuncAttributes {
    int binaryVersion;
};
enum cudaFuncAttribute { cudaFuncAttributePreferredSharedMemoryCarveout = 9 };
enum cudaMemcpyKind {
    cudaMemcpyHostToDevice = 1,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault
};

/* Every call that fails stores its error until somebody asks for it. fail_next: the next call that
 * checks this fails. */
struct shim_errors {
    cudaError_t last;
    bool fail_next;
};
inline shim_errors &shim_error()
{
    static shim_errors errors;
    return errors;
}
inline cudaError_t shim_result(cudaError_t error)
{
    if (shim_error().fail_next) error = cudaErrorInvalidValue;
    shim_error().fail_next = false;
    if (error != cudaSuccess) shim_error().last = error;
    return error;
}
inline cudaError_t cudaGetLastError()
{
    const cudaError_t last = shim_error().last;
    shim_error().last = cudaSuccess;
    return last;
}

/* A graph holds launches and copies of their parameters. Any other call during a capture is an
 * error. */
struct shim_graph {
    std::vector<std::function<void()>> launches;
};
typedef shim_graph *cudaGraph_t;
typedef shim_graph *cudaGraphExec_t;
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal };
inline shim_graph *&shim_capture()
{
    static shim_graph *graph;
    return graph;
}
inline void shim_die(const char *why);
inline void shim_not_in_capture(const char *what)
{
    if (shim_capture()) shim_die(what);
}
inline cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode)
{
    shim_capture() = new shim_graph;
    return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *graph)
{
    *graph = shim_capture();
    shim_capture() = NULL;
    return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph,
                                        unsigned long long)
{
    *exec = new shim_graph(*graph);
    return cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t)
{
    for (size_t i = 0; i < exec->launches.size(); i++) exec->launches[i]();
    return cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    delete graph;
    return cudaSuccess;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec)
{
    delete exec;
    return cudaSuccess;
}
inline cudaError_t cudaStreamCreate(cudaStream_t *stream)
{
    *stream = NULL;
    return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t)
{
    return cudaSuccess;
}

/* Device memory is host memory that only kernels and copies can access; the host gets a fault. Like
 * the device's it is aligned to 256 bytes and holds arbitrary bytes at first. */
inline std::map<void *, size_t> &shim_memory() /* address, bytes */
{
    static std::map<void *, size_t> memory;
    return memory;
}
inline size_t shim_pages(size_t bytes) /* room for a byte more than asked for */
{
    const size_t page = 4096;
    return (bytes / page + 1) * page;
}
struct shim_on_device {
    shim_on_device()
    {
        if (depth()++ == 0) protect(PROT_READ | PROT_WRITE);
    }
    ~shim_on_device()
    {
        if (--depth() == 0) protect(PROT_NONE);
    }
    static int &depth()
    {
        static int nested;
        return nested;
    }
    static void protect(int access)
    {
        std::map<void *, size_t>::iterator it = shim_memory().begin();
        for (; it != shim_memory().end(); ++it)
            if (mprotect(it->first, shim_pages(it->second), access) != 0) shim_die("mprotect");
    }
};
inline cudaError_t cudaMalloc(void **out, size_t bytes)
{
    shim_not_in_capture("cudaMalloc in a capture");
    const shim_on_device device;
    *out =
        mmap(NULL, shim_pages(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (*out == MAP_FAILED) return shim_result(cudaErrorMemoryAllocation);
    shim_memory()[*out] = bytes;
    memset(*out, 0xa5, bytes);
    race_memory(*out, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaFree(void *memory)
{
    shim_not_in_capture("cudaFree in a capture");
    race_forget(memory);
    if (memory) munmap(memory, shim_pages(shim_memory()[memory]));
    shim_memory().erase(memory);
    return cudaSuccess;
}
inline bool shim_is_device(const void *at)
{
    std::map<void *, size_t>::iterator next = shim_memory().upper_bound(const_cast<void *>(at));
    if (next == shim_memory().begin()) return false;
    --next;
    return static_cast<const char *>(at) < static_cast<char *>(next->first) + next->second;
}
inline cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t bytes, cudaMemcpyKind kind,
                                   cudaStream_t)
{
    shim_not_in_capture("a copy in a capture");
    const bool knows = kind == cudaMemcpyDefault;
    if (knows ? shim_is_device(src) : kind != cudaMemcpyHostToDevice) race_copy_out(src, bytes);
    if (knows ? shim_is_device(dst) : kind != cudaMemcpyDeviceToHost) race_copy_in(dst, bytes);
    const shim_on_device device;
    memcpy(dst, src, bytes);
    return shim_result(cudaSuccess);
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t)
{
    shim_not_in_capture("cudaStreamSynchronize in a capture");
    return shim_result(cudaSuccess);
}
inline cudaError_t cudaGetDeviceCount(int *count)
{
    *count = 1;
    return shim_result(cudaSuccess);
}

/* A kernel must be loaded, by asking for its attributes, before it is launched: a real runtime
 * would load it in the launch, which may be in a capture. is_missing: there is no code for this
 * device. */
struct shim_code {
    std::set<const void *> loaded;
    bool is_missing;
};
inline shim_code &shim_kernels()
{
    static shim_code code;
    return code;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, const void *kernel)
{
    if (shim_kernels().is_missing) return shim_result(cudaErrorNoKernelImageForDevice);
    attributes->binaryVersion = 0;
    shim_kernels().loaded.insert(kernel);
    return shim_result(cudaSuccess);
}
inline cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute, int)
{
    return shim_result(cudaSuccess);
}

/* ---- The machine ---------------------------------------------------------------------------- */
enum { SHIM_MAX_THREADS = 1024, SHIM_STACK_BYTES = 128 * 1024, SHIM_SHARED_BYTES = 48 * 1024 };
enum { SHIM_MAX_COPIES = 128 };
enum shim_state { SHIM_READY, SHIM_AT_WARP_BARRIER, SHIM_AT_BLOCK_BARRIER, SHIM_DONE };
enum shim_order { SHIM_ASCENDING, SHIM_DESCENDING, SHIM_MIXED, SHIM_ORDERS };

struct shim_index {
    unsigned x;
};
struct shim_fiber {
    ucontext_t first; /* for the first run; later runs use `again` */
    jmp_buf again;
    char *stack;
    int started, state;
    unsigned collectives; /* warp intrinsics so far: which half of the mailbox is in use */
};
/* cp.async: reads and writes nothing until the thread that started it waits. */
struct shim_copy {
    void (*run)(char *, const char *);
    char *to;
    const char *from;
};
struct shim_machine {
    shim_fiber fibers[SHIM_MAX_THREADS];
    shim_copy copies[SHIM_MAX_THREADS][SHIM_MAX_COPIES];
    int n_copies[SHIM_MAX_THREADS];
    uint64_t mailbox[SHIM_MAX_THREADS][2][6];
    jmp_buf scheduler;
    void (*kernel)(const void *); /* with its parameters bound */
    const void *bound;
    int current, n_threads, order;
    int max_blocks; /* limits the grid, so that kernels must loop over their items; 0: no limit */
    int or_now, or_result;
    shim_index thread, block, grid;
    long launches;
    int fail_launch; /* the launch that fails, counted from now; 0: none */
    alignas(16) char shared[SHIM_SHARED_BYTES + 64];
};
inline shim_machine &shim()
{
    static shim_machine machine;
    return machine;
}
#define threadIdx (shim().thread)
#define blockIdx  (shim().block)
#define gridDim   (shim().grid)
inline void *shim_shared()
{
    return shim().shared;
}

inline void shim_die(const char *why)
{
    printf("FAIL  shim, block %u, thread %d: %s\n0 passed, 1 failed, 0 skipped\n", shim().block.x,
           shim().current, why);
    fflush(stdout);
    _Exit(1);
}

/* Returns to the scheduler until this fiber is released. */
__attribute__((noinline)) inline void shim_wait(int state)
{
    shim_machine &m = shim();
    shim_fiber &self = m.fibers[m.current];
    self.state = state;
    if (_setjmp(self.again) == 0) _longjmp(m.scheduler, 1);
}

inline void shim_fiber_main()
{
    for (;;) { /* a fiber runs block after block */
        shim().kernel(shim().bound);
        if (shim().n_copies[shim().current] > 0) shim_die("a copy that its thread did not await");
        shim_wait(SHIM_DONE);
    }
}

__attribute__((noinline)) inline void shim_resume(int index)
{
    shim_machine &m = shim();
    shim_fiber &fiber = m.fibers[index];
    m.current = index;
    m.thread.x = static_cast<unsigned>(index);
    if (_setjmp(m.scheduler) != 0) return;
    if (fiber.started) _longjmp(fiber.again, 1);
    fiber.started = 1;
    setcontext(&fiber.first);
}

inline void shim_make_fiber(shim_fiber *fiber)
{
    ucontext_t *first = &fiber->first;
    if (fiber->stack) return;
    fiber->stack = static_cast<char *>(malloc(SHIM_STACK_BYTES));
    if (!fiber->stack) shim_die("no memory for a fiber");
    getcontext(first);
    first->uc_stack.ss_sp = fiber->stack;
    first->uc_stack.ss_size = SHIM_STACK_BYTES;
    first->uc_link = NULL;
    makecontext(first, shim_fiber_main, 0);
}

/* Releases the threads [begin, end) if all that are not done wait at this barrier. */
inline bool shim_release(int begin, int end, int barrier)
{
    shim_machine &m = shim();
    int waiting = 0, done = 0, i;
    for (i = begin; i < end; i++) {
        waiting += m.fibers[i].state == barrier;
        done += m.fibers[i].state == SHIM_DONE;
    }
    if (waiting == 0 || waiting + done < end - begin) return false;
    if (done > 0) shim_die("a barrier that a thread has left behind");
    if (barrier == SHIM_AT_BLOCK_BARRIER) race_block_barrier();
    for (i = begin; i < end; i++) m.fibers[i].state = SHIM_READY;
    return true;
}

/* Runs a warp until all its threads are done or at the barrier of the block. */
inline void shim_run_warp(int begin, int end)
{
    shim_machine &m = shim();
    do {
        for (int i = 0; i < end - begin; i++) {
            const int lane = begin + (m.order == SHIM_DESCENDING ? end - begin - 1 - i
                                      : m.order == SHIM_MIXED    ? i * 5 % (end - begin)
                                                                 : i);
            if (m.fibers[lane].state == SHIM_READY) shim_resume(lane);
        }
    } while (shim_release(begin, end, SHIM_AT_WARP_BARRIER));
    for (int i = begin; i < end; i++)
        if (m.fibers[i].state == SHIM_AT_WARP_BARRIER)
            shim_die("a warp's threads went separate ways");
}

inline void shim_run_block()
{
    shim_machine &m = shim();
    const int n_warps = m.n_threads / 32;
    memset(m.shared, 0xff, sizeof m.shared); /* NaNs, and negative integers */
    race_block();
    for (int i = 0; i < m.n_threads; i++) m.fibers[i].state = SHIM_READY;
    do {
        for (int i = 0; i < n_warps; i++) {
            const int w = m.order == SHIM_ASCENDING ? i : n_warps - 1 - i;
            shim_run_warp(32 * w, 32 * w + 32);
        }
        m.or_result = m.or_now;
        m.or_now = 0;
    } while (shim_release(0, m.n_threads, SHIM_AT_BLOCK_BARRIER));
    race_block_end();
    for (int i = 0; i < m.n_threads; i++)
        if (m.fibers[i].state != SHIM_DONE) shim_die("a barrier that not all threads reach");
    for (int i = 0; i < 64; i++)
        if (m.shared[SHIM_SHARED_BYTES + i] != '\xff') shim_die("wrote behind shared memory");
}

template <typename P> struct shim_bound {
    void (*kernel)(P);
    P parameters;
    static void run(const void *self)
    {
        const shim_bound *bound = static_cast<const shim_bound *>(self);
        bound->kernel(bound->parameters);
    }
};

#ifdef RKV_CUDA_PTX /* tests/cuda/ptx.cc runs the kernel's PTX instead */
void ptx_launch(const void *kernel, int threads, size_t shared_bytes, const void *parameters,
                size_t parameter_bytes);
void ptx_run_block();
#endif

template <typename P>
void shim_run(void (*kernel)(P), int blocks, int threads, size_t shared_bytes, const P &parameters)
{
    shim_machine &m = shim();
    const shim_bound<P> bound = { kernel, parameters };
    m.kernel = shim_bound<P>::run;
    m.bound = &bound;
    m.n_threads = threads;
    m.grid.x = static_cast<unsigned>(blocks);
#ifdef RKV_CUDA_PTX
    ptx_launch(reinterpret_cast<const void *>(kernel), threads, shared_bytes, &parameters,
               sizeof parameters);
#else
    for (int i = 0; i < threads; i++) shim_make_fiber(&m.fibers[i]);
    race_launch(shared_bytes, &bound, sizeof bound);
#endif
    const shim_on_device device;
    for (int i = 0; i < blocks; i++) {
        m.block.x = static_cast<unsigned>(m.order == SHIM_ASCENDING ? i : blocks - 1 - i);
#ifdef RKV_CUDA_PTX
        ptx_run_block();
#else
        shim_run_block();
#endif
    }
}

template <typename P>
cudaError_t shim_launch(void (*kernel)(P), int blocks, int threads, size_t shared_bytes,
                        cudaStream_t, const P &parameters)
{
    shim_machine &m = shim();
    if (threads > SHIM_MAX_THREADS || threads % 32 != 0 || shared_bytes > SHIM_SHARED_BYTES ||
        sizeof(P) > 32764)
        shim_die("a launch that a GPU would refuse");
    if (!shim_kernels().loaded.count(reinterpret_cast<const void *>(kernel)))
        shim_die("a kernel that was not loaded at registration");
    if (m.fail_launch > 0 && --m.fail_launch == 0) {
        shim_error().last = cudaErrorInvalidValue;
        return cudaErrorInvalidValue;
    }
    if (m.max_blocks > 0 && blocks > m.max_blocks) blocks = m.max_blocks;
    m.launches++;
    if (shim_capture())
        shim_capture()->launches.push_back(
            [=]() { shim_run<P>(kernel, blocks, threads, shared_bytes, parameters); });
    else
        shim_run<P>(kernel, blocks, threads, shared_bytes, parameters);
    return cudaSuccess;
}

/* ---- Barriers, votes, shuffles -------------------------------------------------------------- */
inline void __syncthreads()
{
    shim_wait(SHIM_AT_BLOCK_BARRIER);
}
inline int __syncthreads_or(int predicate)
{
    if (predicate) shim().or_now = 1;
    shim_wait(SHIM_AT_BLOCK_BARRIER);
    return shim().or_result;
}
inline void __syncwarp()
{
    shim_wait(SHIM_AT_WARP_BARRIER);
    race_warp_barrier();
}

/* Puts words into this thread's mailbox and waits for the warp. The two halves alternate, so that
 * no thread overwrites what another has still to read. Returns the half. */
inline unsigned shim_post(const uint64_t *words, int n)
{
    shim_machine &m = shim();
    const int me = m.current;
    const unsigned half = m.fibers[me].collectives++ % 2;
    memcpy(m.mailbox[me][half], words, static_cast<size_t>(n) * sizeof *words);
    shim_wait(SHIM_AT_WARP_BARRIER);
    return half;
}
inline const uint64_t *shim_mail(int lane, unsigned half)
{
    return shim().mailbox[shim().current / 32 * 32 + lane][half];
}
template <typename T> T shim_shuffle(unsigned mask, T value, int lane, bool inside)
{
    uint64_t word = 0;
    T out = value;
    if (mask != 0xffffffffu) shim_die("a partial warp");
    memcpy(&word, &value, sizeof value);
    const unsigned half = shim_post(&word, 1);
    if (inside) memcpy(&out, shim_mail(lane, half), sizeof out);
    return out;
}
inline int shim_lane()
{
    return shim().current % 32;
}
template <typename T> T __shfl_sync(unsigned mask, T value, int lane)
{
    return shim_shuffle(mask, value, lane % 32, true);
}
template <typename T> T __shfl_xor_sync(unsigned mask, T value, int bits)
{
    return shim_shuffle(mask, value, shim_lane() ^ bits, true);
}
template <typename T> T __shfl_up_sync(unsigned mask, T value, unsigned distance)
{
    const int lane = shim_lane() - static_cast<int>(distance);
    return shim_shuffle(mask, value, lane, lane >= 0);
}
inline unsigned __ballot_sync(unsigned mask, int predicate)
{
    const uint64_t word = predicate != 0;
    unsigned votes = 0;
    if (mask != 0xffffffffu) shim_die("a partial warp");
    const unsigned half = shim_post(&word, 1);
    for (int lane = 0; lane < 32; lane++)
        votes |= static_cast<unsigned>(shim_mail(lane, half)[0]) << lane;
    return votes;
}
inline int __any_sync(unsigned mask, int predicate)
{
    return __ballot_sync(mask, predicate) != 0;
}

/* acc + the products with the precision of tensor cores (cards with bf16), no better: all are
 * aligned to the largest and truncated one bit below its last; the sum is truncated at its own last
 * bit. */
enum { SHIM_MMA_TERMS = 8, SHIM_MMA_BITS = 24 };
inline float shim_mma_sum(float acc, const double *products)
{
    double largest = fabs(static_cast<double>(acc)), sum, unit;
    int exponent;
    for (int i = 0; i < SHIM_MMA_TERMS; i++) largest = fmax(largest, fabs(products[i]));
    if (largest == 0.0 || !(largest <= 3e38)) { /* NaN and infinity propagate */
        sum = static_cast<double>(acc);
        for (int i = 0; i < SHIM_MMA_TERMS; i++) sum += products[i];
        return static_cast<float>(sum);
    }
    frexp(largest, &exponent);
    unit = ldexp(1.0, exponent - 1 - SHIM_MMA_BITS);
    sum = trunc(static_cast<double>(acc) / unit);
    for (int i = 0; i < SHIM_MMA_TERMS; i++) sum += trunc(products[i] / unit);
    sum *= unit;
    const float out = static_cast<float>(sum);
    return fabs(static_cast<double>(out)) > fabs(sum) ? nextafterf(out, 0.0f) : out;
}
/* ldmatrix.x4: each lane gives the address of a row of 16 bytes and gets a word of four rows. */
inline void shim_load_matrices(uint32_t *out, const char *row)
{
    const uint64_t address = reinterpret_cast<uintptr_t>(row);
    if (address % 16) shim_die("ldmatrix of a row that is not aligned");
    const unsigned half = shim_post(&address, 1);
    for (int matrix = 0; matrix < 4; matrix++) {
        const uint64_t from = shim_mail(8 * matrix + shim_lane() / 4, half)[0];
        out[matrix] = reinterpret_cast<const uint32_t *>(from)[shim_lane() % 4];
    }
}
/* acc += a * b of a warp: 16 x 8 x 16, in the fragments of mma.sync.m16n8k16. */
template <typename T>
void shim_mma(float *acc, const uint32_t *a, const uint32_t *b, float (*to_float)(T))
{
    const uint64_t words[6] = { a[0], a[1], a[2], a[3], b[0], b[1] };
    const unsigned half = shim_post(words, 6);
    for (int k = 0; k < 4; k++) {
        const int row = shim_lane() / 4 + k / 2 * 8, column = 2 * (shim_lane() % 4) + k % 2;
        double products[16];
        for (int i = 0; i < 16; i++) {
            const uint64_t x = shim_mail(row % 8 * 4 + i % 8 / 2, half)[row / 8 + i / 8 * 2];
            const uint64_t y = shim_mail(column * 4 + i % 8 / 2, half)[4 + i / 8];
            const T p = { static_cast<uint16_t>(x >> i % 2 * 16) };
            const T q = { static_cast<uint16_t>(y >> i % 2 * 16) };
            products[i] = static_cast<double>(to_float(p)) * static_cast<double>(to_float(q));
        }
        for (int i = 0; i < 16; i += SHIM_MMA_TERMS) acc[k] = shim_mma_sum(acc[k], products + i);
    }
}

/* ---- Atomics (one thread runs at a time) and arithmetic ------------------------------------- */
template <typename T> T atomicAdd(T *at, T value)
{
    const race_as as(RACE_ATOMIC);
    const T old = *at;
    *at = static_cast<T>(old + value);
    return old;
}
template <typename T> T atomicMin(T *at, T value)
{
    const race_as as(RACE_ATOMIC);
    const T old = *at;
    if (value < old) *at = value;
    return old;
}
template <typename T> T atomicCAS(T *at, T expected, T value)
{
    const race_as as(RACE_ATOMIC);
    const T old = *at;
    if (old == expected) *at = value;
    return old;
}
template <typename T> T __ldg(const T *at)
{
    const race_as as(RACE_LDG);
    return *at;
}

template <typename V> void shim_run_copy(char *to, const char *from)
{
    const V value = from ? __ldg(reinterpret_cast<const V *>(from)) : V{};
    *reinterpret_cast<V *>(to) = value; /* a separate access, not an __ldg */
}
template <typename V> void shim_start_copy(char *to, const char *from, bool is_there)
{
    shim_machine &m = shim();
    const shim_copy copy = { shim_run_copy<V>, to, is_there ? from : NULL };
    if (reinterpret_cast<uintptr_t>(to) % sizeof(V) ||
        reinterpret_cast<uintptr_t>(from) % sizeof(V))
        shim_die("a copy that is not aligned");
    if (m.n_copies[m.current] == SHIM_MAX_COPIES) shim_die("too many copies at a time");
    m.copies[m.current][m.n_copies[m.current]++] = copy;
}
inline void shim_copies_done()
{
    shim_machine &m = shim();
    for (int i = 0; i < m.n_copies[m.current]; i++)
        m.copies[m.current][i].run(m.copies[m.current][i].to, m.copies[m.current][i].from);
    m.n_copies[m.current] = 0;
}

inline int __popc(unsigned x)
{
    return __builtin_popcount(x);
}
inline int __ffs(int x)
{
    return __builtin_ffs(x);
}
inline int __ffsll(long long x)
{
    return __builtin_ffsll(x);
}
inline float __expf(float x)
{
    return exp2f(x * 1.4426950408889634f);
}
inline float __fmul_rn(float a, float b)
{
    return a * b;
}
inline uint32_t __float_as_uint(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline float __uint_as_float(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
struct __half {
    uint16_t bits;
};
inline __half __ushort_as_half(uint16_t bits)
{
    const __half half = { bits };
    return half;
}
inline float __half2float(__half half)
{
    const int exponent = half.bits >> 10 & 31, fraction = half.bits & 1023;
    const float sign = half.bits & 0x8000 ? -1.0f : 1.0f;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * ldexpf(static_cast<float>(fraction), -24);
    return sign * ldexpf(static_cast<float>(fraction + 1024), exponent - 25);
}

#endif
