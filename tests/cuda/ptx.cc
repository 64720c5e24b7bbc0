/* Runs the PTX that nvcc makes of rkv_cuda.cu, on the host: make test-cuda-ptx (every architecture;
 * PTX_ARCHS=90: one).  tests/cuda/shim.h tests the source as C++; this tests the compiler's output,
 * with inline assembly, fragments and vector accesses. If RKV_CUDA_PTX is defined the shim passes
 * every launch to it. Warps run one after the other from barrier to barrier, the 32 lanes of a warp
 * together; lanes that diverged reconverge at the lowest instruction. The program ends with a
 * message where a GPU would fault or behave undefined: an access outside of an allocation or not
 * aligned to its size; a warp-wide instruction or a barrier that not all lanes reach; a copy to
 * shared memory that its thread does not wait for. An unknown instruction ends it too. It does not
 * show what the assembler and the GPU make of the PTX, nor threads that run at the same time
 * (tests/cuda/race.cc).  The semantics are those of chapter 9.7 of NVIDIA's PTX ISA. Environment:
 * RKV_PTX names another file, compiled with the shim's RKV_CUDA_PARAMETER_BYTES; RKV_PTX_COUNTS=1
 * prints at the end what each kernel executed. */
#include <ctype.h>
#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <fstream>
#include <limits>
#include <sstream>
#include <string>

namespace
{
typedef std::vector<std::string> words;
enum { LANES = 32, MAX_OPERANDS = 10 };
const uint32_t everyone = 0xffffffffu;

/* ---- A kernel ------------------------------------------------------------------------------- */
/* A register of a warp: 32 values of 2, 4 or 8 bytes, one after the other. A predicate is 32 bits
 * in the first word. */
struct alignas(64) reg {
    unsigned char bytes[LANES * 8];
};
struct instruction;
struct warp;
typedef void (*action)(warp &w, const instruction &i, uint32_t active);

enum flow { FLOW_NEXT, FLOW_BRANCH, FLOW_EXIT, FLOW_WARP, FLOW_BLOCK };
enum space { SPACE_GENERIC, SPACE_GLOBAL, SPACE_SHARED, SPACE_PARAM };
struct instruction {
    action run;
    flow kind;
    int guard, unless; /* register or -1; lanes take part where it is set, or where it is not */
    int to[4], from[MAX_OPERANDS]; /* registers */
    int bytes[4];                  /* of the registers in `to`, or of those stored */
    int address_bytes;             /* of the register with an address, 4 or 8 */
    int64_t offset;                /* from there */
    space where;
    int size, n; /* of an element in memory, how many */
    bool is_signed;
    size_t target;
    std::string text, label;
};

struct constant {
    int slot, bytes;
    uint64_t value;
};
struct counts {
    long launches, blocks, instructions, lanes, longest, products;
    long sectors[2], asked[2]; /* of global memory, read and written */
    long turns, shared_bytes;  /* of shared memory */
};
struct pending_copy {
    uint64_t to, from;
    int bytes, there;
};
struct warp {
    std::vector<reg> registers;
    size_t at[LANES]; /* the next instruction */
    uint32_t alive, waiting;
    size_t barrier; /* where it waits for the block */
    bool is_done;
    long instructions;
    std::vector<pending_copy> copies[LANES];
};
struct kernel {
    std::string name;
    std::vector<instruction> code;
    std::vector<constant> constants;
    int n_registers, parameters, thread, block, grid; /* slots, or -1 where not used */
    std::vector<warp> warps;                          /* of one block */
    counts n;
};

struct machine {
    std::map<std::string, kernel> kernels;
    kernel *running;
    const unsigned char *parameters;
    size_t parameter_bytes, shared_bytes;
    uint64_t region_begin, region_end; /* where the last access was */
    const instruction *now;
    int warp_now;
    bool counts;
};
machine the;

/* "rkvi_attend<rkvi_bf16>" from its mangled name. */
std::string plain_name(const std::string &mangled)
{
    int status = 0;
    char *plain = abi::__cxa_demangle(mangled.c_str(), NULL, NULL, &status);
    std::string out = plain ? plain : mangled;
    free(plain);
    const std::string scope = "rkvi_cuda::";
    if (out.compare(0, 5, "void ") == 0) out.erase(0, 5);
    for (size_t at; (at = out.find(scope)) != std::string::npos;) out.erase(at, scope.size());
    return out.substr(0, out.find('('));
}
void die(const std::string &why, int lane)
{
    shim().current = LANES * the.warp_now + lane;
    const std::string at = the.now ? " at `" + the.now->text + "`" : "";
    const std::string name = the.running ? plain_name(the.running->name) + ": " : "";
    shim_die((name + why + at).c_str());
}

template <typename T> T *values(warp &w, int slot)
{
    return reinterpret_cast<T *>(w.registers[static_cast<size_t>(slot)].bytes);
}
uint32_t &predicate(warp &w, int slot)
{
    return *values<uint32_t>(w, slot);
}
void set_predicate(warp &w, int slot, uint32_t active, uint32_t value)
{
    uint32_t &p = predicate(w, slot);
    p = (p & ~active) | (value & active);
}
template <typename F> void each(uint32_t active, F f)
{
    if (active == everyone)
        for (int l = 0; l < LANES; l++) f(l);
    else
        for (int l = 0; l < LANES; l++)
            if (active >> l & 1) f(l);
}

/* ---- Arithmetic ----------------------------------------------------------------------------- */
template <typename D, typename S, typename F>
void one(warp &w, const instruction &i, uint32_t active)
{
    D *d = values<D>(w, i.to[0]);
    const S *a = values<S>(w, i.from[0]);
    each(active, [=](int l) { d[l] = F::template of<D, S>(a[l]); });
}
template <typename T, typename F> void two(warp &w, const instruction &i, uint32_t active)
{
    T *d = values<T>(w, i.to[0]);
    const T *a = values<T>(w, i.from[0]), *b = values<T>(w, i.from[1]);
    each(active, [=](int l) { d[l] = F::of(a[l], b[l]); });
}
template <typename T, typename F> void three(warp &w, const instruction &i, uint32_t active)
{
    T *d = values<T>(w, i.to[0]);
    const T *a = values<T>(w, i.from[0]), *b = values<T>(w, i.from[1]);
    const T *c = values<T>(w, i.from[2]);
    each(active, [=](int l) { d[l] = F::of(a[l], b[l], c[l]); });
}
template <typename T, typename F> void shift(warp &w, const instruction &i, uint32_t active)
{
    T *d = values<T>(w, i.to[0]);
    const T *a = values<T>(w, i.from[0]);
    const uint32_t *by = values<uint32_t>(w, i.from[1]);
    each(active, [=](int l) { d[l] = F::of(a[l], by[l]); });
}
template <typename D, typename S> void wide(warp &w, const instruction &i, uint32_t active)
{
    D *d = values<D>(w, i.to[0]);
    const S *a = values<S>(w, i.from[0]), *b = values<S>(w, i.from[1]);
    each(active, [=](int l) { d[l] = static_cast<D>(a[l]) * static_cast<D>(b[l]); });
}
template <typename T, typename F> void compare(warp &w, const instruction &i, uint32_t active)
{
    const T *a = values<T>(w, i.from[0]), *b = values<T>(w, i.from[1]);
    uint32_t is = 0;
    for (int l = 0; l < LANES; l++) is |= static_cast<uint32_t>(F::of(a[l], b[l])) << l;
    set_predicate(w, i.to[0], active, is);
}
template <typename T> void choose(warp &w, const instruction &i, uint32_t active)
{
    T *d = values<T>(w, i.to[0]);
    const T *a = values<T>(w, i.from[0]), *b = values<T>(w, i.from[1]);
    const uint32_t p = predicate(w, i.from[2]);
    each(active, [=](int l) { d[l] = p >> l & 1 ? a[l] : b[l]; });
}
template <typename F> void logic(warp &w, const instruction &i, uint32_t active)
{
    set_predicate(w, i.to[0], active, F::of(predicate(w, i.from[0]), predicate(w, i.from[1])));
}

/* Each operation rounds on its own: -ffp-contract=off. */
#define BINARY(name, expression)                    \
    struct name {                                   \
        template <typename T> static T of(T a, T b) \
        {                                           \
            return static_cast<T>(expression);      \
        }                                           \
    };
BINARY(op_add, a + b)
BINARY(op_sub, a - b)
BINARY(op_mul, a *b)
BINARY(op_and, a &b)
BINARY(op_or, a | b)
BINARY(op_xor, a ^ b)
BINARY(op_min, b < a ? b : a)
BINARY(op_max, a < b ? b : a)
BINARY(op_div, b ? a / b : ~T(0))
BINARY(op_rem, b ? a % b : a)
BINARY(op_fdiv, a / b)
BINARY(op_fmax, a != a ? b : b != b ? a : fmax(a, b)) /* never NaN beside a number */
BINARY(op_copysign, copysign(b, a))                   /* the sign of the first */
#undef BINARY
#define COMPARISON(name, expression)                   \
    struct name {                                      \
        template <typename T> static bool of(T a, T b) \
        {                                              \
            return expression;                         \
        }                                              \
    };
COMPARISON(is_eq, a == b)
COMPARISON(is_ne, a<b || a> b)
COMPARISON(is_lt, a < b)
COMPARISON(is_le, a <= b)
COMPARISON(is_gt, a > b)
COMPARISON(is_ge, a >= b)
COMPARISON(is_equ, !(a < b || a > b))
COMPARISON(is_neu, !(a == b))
COMPARISON(is_ltu, !(a >= b))
COMPARISON(is_leu, !(a > b))
COMPARISON(is_gtu, !(a <= b))
COMPARISON(is_geu, !(a < b))
COMPARISON(is_num, a == a && b == b)
COMPARISON(is_nan, a != a || b != b)
#undef COMPARISON
#define UNARY(name, expression)                            \
    struct name {                                          \
        template <typename D, typename S> static D of(S a) \
        {                                                  \
            return static_cast<D>(expression);             \
        }                                                  \
    };
UNARY(op_copy, a)
UNARY(op_not, ~a)
UNARY(op_neg, -a)
UNARY(op_fabs, fabs(a))
UNARY(op_sqrt, sqrt(a))
UNARY(op_rcp, 1 / a)
UNARY(op_ex2, exp2f(a))
UNARY(op_popc, __builtin_popcountll(a))
UNARY(op_clz, a ? __builtin_clzll(a) - (64 - 8 * static_cast<int>(sizeof(S))) : 8 * sizeof(S))
UNARY(op_bfind_shift, a ? __builtin_clzll(a) - (64 - 8 * static_cast<int>(sizeof(S))) : -1)
#undef UNARY
struct op_reverse {
    template <typename D, typename S> static D of(S a)
    {
        D out = 0;
        for (unsigned bit = 0; bit < 8 * sizeof(S); bit++)
            out = static_cast<D>(out << 1 | (a >> bit & 1));
        return out;
    }
};
/* To an integer, rounded toward zero, saturated. */
struct op_truncate {
    template <typename D, typename S> static D of(S a)
    {
        const double x = trunc(static_cast<double>(a));
        const D low = std::numeric_limits<D>::min(), high = std::numeric_limits<D>::max();
        if (x != x) return sizeof(D) == 8 ? D(1) << 63 : 0;
        return x <= static_cast<double>(low)    ? low
               : x >= static_cast<double>(high) ? high
                                                : static_cast<D>(x);
    }
};
struct op_half {
    template <typename D, typename S> static D of(S a)
    {
        return __half2float(__ushort_as_half(a));
    }
};
struct op_shl {
    template <typename T> static T of(T a, uint32_t by)
    {
        return by >= 8 * sizeof(T) ? 0 : static_cast<T>(a << by);
    }
};
struct op_shr {
    template <typename T> static T of(T a, uint32_t by)
    {
        const uint32_t most = 8 * sizeof(T) - 1;
        return static_cast<T>(by > most ? a >> most >> 1 : a >> by);
    }
};
struct op_permute { /* each digit of c names a byte of b:a; with its highest bit, the byte's sign */
    static uint32_t of(uint32_t a, uint32_t b, uint32_t c)
    {
        const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
        uint32_t out = 0;
        for (int k = 0; k < 4; k++) {
            const uint32_t digit = c >> (4 * k) & 15;
            uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (digit & 7)) & 255);
            if (digit & 8) byte = byte & 128 ? 255 : 0;
            out |= byte << (8 * k);
        }
        return out;
    }
};
struct op_fma {
    static float of(float a, float b, float c)
    {
        return fmaf(a, b, c);
    }
    static double of(double a, double b, double c)
    {
        return fma(a, b, c);
    }
};
struct op_mad {
    template <typename T> static T of(T a, T b, T c)
    {
        return static_cast<T>(a * b + c);
    }
};
struct op_funnel_left {
    static uint32_t of(uint32_t a, uint32_t b, uint32_t by)
    {
        return by % 32 ? b << by % 32 | a >> (32 - by % 32) : b;
    }
};
/* bfi: the lowest `length` bits of the first into the second, from bit `begin` on. */
template <typename T> void insert_bits(warp &w, const instruction &i, uint32_t active)
{
    T *d = values<T>(w, i.to[0]);
    const T *a = values<T>(w, i.from[0]), *b = values<T>(w, i.from[1]);
    const uint32_t *begin = values<uint32_t>(w, i.from[2]);
    const uint32_t *length = values<uint32_t>(w, i.from[3]);
    each(active, [=](int l) {
        const T mask = static_cast<T>(op_shl::of<T>(op_shl::of<T>(1, length[l]) - 1, begin[l]));
        d[l] = static_cast<T>((b[l] & ~mask) | (op_shl::of<T>(a[l], begin[l]) & mask));
    });
}
void move_predicate(warp &w, const instruction &i, uint32_t active)
{
    set_predicate(w, i.to[0], active, predicate(w, i.from[0]));
}
void not_predicate(warp &w, const instruction &i, uint32_t active)
{
    set_predicate(w, i.to[0], active, ~predicate(w, i.from[0]));
}
/* mov between a register and the parts of it, in either direction: little-endian. */
void split(warp &w, const instruction &i, uint32_t active)
{
    for (int l = 0; l < LANES; l++)
        for (int k = 0; k < i.n && active >> l & 1; k++)
            memcpy(values<unsigned char>(w, i.to[k]) + l * i.size,
                   values<unsigned char>(w, i.from[0]) + (l * i.n + k) * i.size,
                   static_cast<size_t>(i.size));
}
void join(warp &w, const instruction &i, uint32_t active)
{
    for (int l = 0; l < LANES; l++)
        for (int k = 0; k < i.n && active >> l & 1; k++)
            memcpy(values<unsigned char>(w, i.to[0]) + (l * i.n + k) * i.size,
                   values<unsigned char>(w, i.from[k]) + l * i.size, static_cast<size_t>(i.size));
}

/* ---- Memory --------------------------------------------------------------------------------- */
uint64_t shared_base()
{
    return reinterpret_cast<uintptr_t>(shim().shared);
}
bool is_in_region(uint64_t address, uint64_t size)
{
    return address >= the.region_begin && address + size <= the.region_end;
}
/* Where an address lies on the host; ends the program where a GPU would fault. */
char *memory(space where, uint64_t address, int bytes, int lane)
{
    const uint64_t size = static_cast<uint64_t>(bytes);
    if (address % size) die("an address that is not aligned", lane);
    if (where == SPACE_SHARED) address += shared_base();
    if (where != SPACE_GLOBAL) {
        const uint64_t begin = reinterpret_cast<uintptr_t>(the.parameters);
        const bool in_shared =
            address >= shared_base() && address + size <= shared_base() + the.shared_bytes;
        const bool in_parameters =
            address >= begin && address + size <= begin + the.parameter_bytes;
        if (where != SPACE_PARAM && in_shared) return reinterpret_cast<char *>(address);
        if (where != SPACE_SHARED && in_parameters) return reinterpret_cast<char *>(address);
        if (where != SPACE_GENERIC) die("an address outside of shared memory or parameters", lane);
    }
    if (!is_in_region(address, size)) {
        std::map<void *, size_t> &all = shim_memory();
        std::map<void *, size_t>::iterator it = all.upper_bound(reinterpret_cast<void *>(address));
        if (it != all.begin()) {
            --it;
            the.region_begin = reinterpret_cast<uintptr_t>(it->first);
            the.region_end = the.region_begin + it->second;
        }
        if (!is_in_region(address, size)) die("an address outside of device memory", lane);
    }
    return reinterpret_cast<char *>(address);
}
/* A shared address may be one of 32 bits, and wraps as such. */
uint64_t address_of(warp &w, const instruction &i, int lane)
{
    if (i.address_bytes == 4)
        return values<uint32_t>(w, i.from[0])[lane] + static_cast<uint32_t>(i.offset);
    return values<uint64_t>(w, i.from[0])[lane] + static_cast<uint64_t>(i.offset);
}

/* The cost of a warp's access: sectors of 32 bytes of global memory; turns of the 32 banks of
 * shared memory, in halves and quarters of a warp for 8 and 16 bytes a lane. */
void count_global(const uint64_t *addresses, uint32_t active, int bytes, int kind)
{
    uint64_t sectors[2 * LANES];
    int n = 0;
    for (int l = 0; l < LANES; l++)
        if (active >> l & 1) sectors[n++] = addresses[l] / 32; /* aligned: no access lies in two */
    std::sort(sectors, sectors + n);
    the.running->n.sectors[kind] += std::unique(sectors, sectors + n) - sectors;
    the.running->n.asked[kind] += static_cast<long>(bytes) * __builtin_popcount(active);
}
void count_shared(const uint64_t *addresses, uint32_t active, int bytes)
{
    const int lanes = bytes == 16 ? 8 : bytes == 8 ? 16 : 32;
    the.running->n.shared_bytes += static_cast<long>(bytes) * __builtin_popcount(active);
    for (int first = 0; first < LANES; first += lanes) {
        std::set<uint64_t> wanted[32];
        size_t turns = 0;
        for (int l = first; l < first + lanes; l++)
            for (int b = 0; b < bytes && active >> l & 1; b += 4) {
                const uint64_t word = addresses[l] / 4 + static_cast<uint64_t>(b / 4);
                wanted[word % 32].insert(word);
                turns = std::max(turns, wanted[word % 32].size());
            }
        the.running->n.turns += static_cast<long>(turns);
    }
}
void count_access(warp &w, const instruction &i, uint32_t active, int kind)
{
    uint64_t addresses[LANES];
    bool is_shared = i.where == SPACE_SHARED;
    for (int l = 0; l < LANES; l++) addresses[l] = active >> l & 1 ? address_of(w, i, l) : 0;
    if (i.where == SPACE_GENERIC)
        for (int l = 0; l < LANES; l++)
            is_shared |= addresses[l] - shared_base() < the.shared_bytes;
    if (is_shared)
        count_shared(addresses, active, i.size * i.n);
    else if (i.where != SPACE_PARAM)
        count_global(addresses, active, i.size * i.n, kind);
}
void load(warp &w, const instruction &i, uint32_t active)
{
    if (the.counts) count_access(w, i, active, 0);
    for (int l = 0; l < LANES; l++) {
        if (!(active >> l & 1)) continue;
        const char *from = memory(i.where, address_of(w, i, l), i.size * i.n, l);
        for (int k = 0; k < i.n; k++) {
            uint64_t value = 0;
            memcpy(&value, from + k * i.size, static_cast<size_t>(i.size));
            const int unused = 64 - 8 * i.size; /* bits */
            if (i.is_signed && unused)
                value = static_cast<uint64_t>(static_cast<int64_t>(value << unused) >> unused);
            memcpy(values<unsigned char>(w, i.to[k]) + l * i.bytes[k], &value,
                   static_cast<size_t>(i.bytes[k]));
        }
    }
}
void store(warp &w, const instruction &i, uint32_t active)
{
    if (the.counts) count_access(w, i, active, 1);
    for (int l = 0; l < LANES; l++) {
        if (!(active >> l & 1)) continue;
        char *to = memory(i.where, address_of(w, i, l), i.size * i.n, l);
        if (i.where == SPACE_PARAM) die("a parameter is written", l);
        for (int k = 0; k < i.n; k++)
            memcpy(to + k * i.size, values<unsigned char>(w, i.from[1 + k]) + l * i.bytes[0],
                   static_cast<size_t>(i.size));
    }
}
/* Atomics, lane after lane. `to` is -1 for red. */
template <typename T, typename F> void atomic(warp &w, const instruction &i, uint32_t active)
{
    if (the.counts) count_access(w, i, active, 1);
    for (int l = 0; l < LANES; l++) {
        if (!(active >> l & 1)) continue;
        T *at = reinterpret_cast<T *>(memory(i.where, address_of(w, i, l), sizeof(T), l));
        const T old = *at;
        *at = F::of(old, values<T>(w, i.from[1])[l]);
        if (i.to[0] >= 0) values<T>(w, i.to[0])[l] = old;
    }
}
template <typename T> void atomic_cas(warp &w, const instruction &i, uint32_t active)
{
    for (int l = 0; l < LANES; l++) {
        if (!(active >> l & 1)) continue;
        T *at = reinterpret_cast<T *>(memory(i.where, address_of(w, i, l), sizeof(T), l));
        const T old = *at;
        if (old == values<T>(w, i.from[1])[l]) *at = values<T>(w, i.from[2])[l];
        values<T>(w, i.to[0])[l] = old;
    }
}
/* cp.async: from = { to, from, bytes that exist }. Reading before the wait gives NaNs. */
void start_copy(warp &w, const instruction &i, uint32_t active)
{
    uint64_t to[LANES] = { 0 }, from[LANES] = { 0 };
    for (int l = 0; l < LANES; l++) {
        if (!(active >> l & 1)) continue;
        const int there = static_cast<int>(values<uint32_t>(w, i.from[2])[l]);
        const pending_copy copy = { address_of(w, i, l), values<uint64_t>(w, i.from[1])[l], i.size,
                                    there };
        if (there < 0 || there > i.size) die("more bytes than the copy has", l);
        memset(memory(SPACE_SHARED, copy.to, i.size, l), 0xff, static_cast<size_t>(i.size));
        w.copies[l].push_back(copy);
        to[l] = copy.to;
        from[l] = copy.from;
    }
    if (the.counts) {
        count_shared(to, active, i.size);
        count_global(from, active, i.size, 0);
    }
}
void await_copies(warp &w, const instruction &, uint32_t active)
{
    for (int l = 0; l < LANES; l++) {
        if (!(active >> l & 1)) continue;
        for (size_t c = 0; c < w.copies[l].size(); c++) {
            const pending_copy &copy = w.copies[l][c];
            char *to = memory(SPACE_SHARED, copy.to, copy.bytes, l);
            memset(to, 0, static_cast<size_t>(copy.bytes));
            if (copy.there > 0)
                memcpy(to, memory(SPACE_GLOBAL, copy.from, copy.bytes, l),
                       static_cast<size_t>(copy.there));
        }
        w.copies[l].clear();
    }
}

/* ---- Warp-wide instructions ----------------------------------------------------------------- */
void must_be_everyone(warp &w, int slot)
{
    for (int l = 0; l < LANES; l++)
        if (values<uint32_t>(w, slot)[l] != everyone) die("not for the whole warp", l);
}
struct lane_xor {
    enum : uint32_t { bounds = 31 };
    static int of(int lane, int by)
    {
        return lane ^ by;
    }
};
struct lane_up {
    enum : uint32_t { bounds = 0 };
    static int of(int lane, int by)
    {
        return lane - by;
    }
};
struct lane_is {
    enum : uint32_t { bounds = 31 };
    static int of(int, int by)
    {
        return by & 31;
    }
};
/* from = { value, lane or distance, bounds, members }; to = { value, whether there is one } */
template <typename F> void shuffle(warp &w, const instruction &i, uint32_t)
{
    uint32_t got[LANES], inside = 0;
    must_be_everyone(w, i.from[3]);
    for (int l = 0; l < LANES; l++) {
        const uint32_t bounds = values<uint32_t>(w, i.from[2])[l];
        const int from = F::of(l, static_cast<int>(values<uint32_t>(w, i.from[1])[l]));
        if (bounds != F::bounds) die("a shuffle in parts of a warp", l);
        const bool is = from >= 0 && from < LANES;
        got[l] = values<uint32_t>(w, i.from[0])[is ? from : l];
        inside |= static_cast<uint32_t>(is) << l;
    }
    memcpy(values<uint32_t>(w, i.to[0]), got, sizeof got);
    if (i.to[1] >= 0) predicate(w, i.to[1]) = inside;
}
void ballot(warp &w, const instruction &i, uint32_t)
{
    const uint32_t votes = predicate(w, i.from[0]);
    must_be_everyone(w, i.from[1]);
    for (int l = 0; l < LANES; l++) values<uint32_t>(w, i.to[0])[l] = votes;
}
void vote_any(warp &w, const instruction &i, uint32_t)
{
    must_be_everyone(w, i.from[1]);
    predicate(w, i.to[0]) = predicate(w, i.from[0]) ? everyone : 0;
}
void nothing(warp &, const instruction &, uint32_t)
{
}
/* ldmatrix.x4: row r of matrix m lies where lane 8 m + r says; lane l gets the word l % 4 of row
 * l / 4 of each. */
void load_matrices(warp &w, const instruction &i, uint32_t)
{
    uint64_t addresses[LANES];
    uint32_t got[4][LANES];
    for (int l = 0; l < LANES; l++) addresses[l] = address_of(w, i, l);
    if (the.counts) count_shared(addresses, everyone, 16);
    for (int m = 0; m < 4; m++)
        for (int l = 0; l < LANES; l++) {
            const int source = 8 * m + l / 4;
            memcpy(&got[m][l], memory(SPACE_SHARED, addresses[source], 16, source) + l % 4 * 4, 4);
        }
    for (int m = 0; m < 4; m++) memcpy(values<uint32_t>(w, i.to[m]), got[m], sizeof got[m]);
}
float half_of(uint32_t word, int k)
{
    return __half2float(__ushort_as_half(static_cast<uint16_t>(word >> 16 * k)));
}
float bf16_of(uint32_t word, int k)
{
    return __uint_as_float((word >> 16 * k & 0xffff) << 16);
}
/* mma.m16n8k16, row by column: from = { a: 4, b: 2, c: 4 }. With group g = lane / 4, t = lane % 4,
 * a's word i holds row g + 8 (i % 2), columns 2 t + 8 (i / 2) and the next; b's word i holds rows
 * 2 t + 8 i and the next of column g; c's value i is row g + 8 (i / 2), column 2 t + i % 2. */
template <float (*TO_FLOAT)(uint32_t, int)>
void matrix_product(warp &w, const instruction &i, uint32_t)
{
    double a[16][16], b[16][8];
    float out[4][LANES];
    the.running->n.products++;
    for (int l = 0; l < LANES; l++)
        for (int k = 0; k < 2; k++) {
            const int group = l / 4, column = 2 * (l % 4) + k;
            for (int word = 0; word < 4; word++)
                a[group + word % 2 * 8][column + word / 2 * 8] =
                    static_cast<double>(TO_FLOAT(values<uint32_t>(w, i.from[word])[l], k));
            for (int word = 0; word < 2; word++)
                b[column + word * 8][group] =
                    static_cast<double>(TO_FLOAT(values<uint32_t>(w, i.from[4 + word])[l], k));
        }
    for (int v = 0; v < 4; v++)
        for (int l = 0; l < LANES; l++) {
            const int row = l / 4 + v / 2 * 8, column = 2 * (l % 4) + v % 2;
            double products[16];
            for (int k = 0; k < 16; k++) products[k] = a[row][k] * b[k][column];
            float sum = values<float>(w, i.from[6 + v])[l];
            for (int k = 0; k < 16; k += SHIM_MMA_TERMS) sum = shim_mma_sum(sum, products + k);
            out[v][l] = sum;
        }
    for (int v = 0; v < 4; v++) memcpy(values<float>(w, i.to[v]), out[v], sizeof out[v]);
}

/* ---- From text to instructions -------------------------------------------------------------- */
words split_at(const std::string &text, char separator)
{
    words out(1);
    int depth = 0;
    for (size_t k = 0; k < text.size(); k++) {
        const char c = text[k];
        depth += (c == '{' || c == '[') - (c == '}' || c == ']');
        if (c == separator && depth == 0)
            out.push_back("");
        else if (!isspace(static_cast<unsigned char>(c)))
            out.back() += c;
    }
    return out;
}
bool has(const words &list, const char *word)
{
    return std::find(list.begin(), list.end(), word) != list.end();
}
/* s32, f64, b8: in bytes; 0 for a predicate. */
int bytes_of(const std::string &type)
{
    return type == "pred" ? 0 : atoi(type.c_str() + 1) / 8;
}

template <typename G> action for_integer(const std::string &type, G make)
{
    return type == "s16"                    ? make(int16_t())
           : type == "u16" || type == "b16" ? make(uint16_t())
           : type == "s32"                  ? make(int32_t())
           : type == "u32" || type == "b32" ? make(uint32_t())
           : type == "s64"                  ? make(int64_t())
           : type == "u64" || type == "b64" ? make(uint64_t())
                                            : NULL;
}
template <typename G> action for_float(const std::string &type, G make)
{
    return type == "f32" ? make(float()) : type == "f64" ? make(double()) : NULL;
}
#define TWO(op)     [](auto t) -> action { return two<decltype(t), op>; }
#define THREE(op)   [](auto t) -> action { return three<decltype(t), op>; }
#define SHIFT(op)   [](auto t) -> action { return shift<decltype(t), op>; }
#define COMPARE(op) [](auto t) -> action { return compare<decltype(t), op>; }
#define ONE(op)     [](auto t) -> action { return one<decltype(t), decltype(t), op>; }
#define COUNT(op)   [](auto t) -> action { return one<uint32_t, decltype(t), op>; }

template <typename I, typename F> action arithmetic(const std::string &type)
{
    const action whole = for_integer(type, TWO(I));
    return whole ? whole : for_float(type, TWO(F));
}
template <typename F> action bitwise(const std::string &type)
{
    return type == "pred" ? logic<F> : for_integer("u" + type.substr(1), TWO(F));
}
action comparison(const std::string &how, const std::string &type)
{
#define EITHER(name)                                                \
    if (how == #name) {                                             \
        const action whole = for_integer(type, COMPARE(is_##name)); \
        return whole ? whole : for_float(type, COMPARE(is_##name)); \
    }
    EITHER(eq)
    EITHER(ne)
    EITHER(lt)
    EITHER(le)
    EITHER(gt)
    EITHER(ge)
#undef EITHER
#define FLOATS(name) \
    if (how == #name) return for_float(type, COMPARE(is_##name));
    FLOATS(equ)
    FLOATS(neu)
    FLOATS(ltu)
    FLOATS(leu)
    FLOATS(gtu)
    FLOATS(geu)
    FLOATS(num)
    FLOATS(nan)
#undef FLOATS
    return NULL;
}
/* The source of a conversion may be in a larger register. */
template <typename N> struct op_narrow {
    template <typename D, typename S> static D of(S a)
    {
        return static_cast<D>(static_cast<N>(a));
    }
};
template <typename D> action convert_to(const std::string &from, int register_bytes)
{
    if (from[0] == 'f')
        return for_float(from, [](auto t) -> action { return one<D, decltype(t), op_copy>; });
    return for_integer(from, [=](auto t) -> action {
        typedef op_narrow<decltype(t)> narrow;
        return register_bytes == 8   ? one<D, uint64_t, narrow>
               : register_bytes == 4 ? one<D, uint32_t, narrow>
                                     : one<D, uint16_t, narrow>;
    });
}
/* cvt with its modifiers; of the roundings only to nearest and toward zero. */
action conversion(const words &op, int register_bytes)
{
    const std::string to = op[op.size() - 2], from = op.back();
    const bool from_float = from[0] == 'f', truncates = has(op, "rzi");
    if (to == "f32" && from == "f16") return one<float, uint16_t, op_half>;
    if (to[0] == 'f' && to != "f32" && to != "f64") return NULL;
    if (to[0] == 'f' && (truncates || (!from_float && !has(op, "rn")))) return NULL;
    if (to[0] == 'f')
        return to == "f32" ? convert_to<float>(from, register_bytes)
                           : convert_to<double>(from, register_bytes);
    if (from_float != truncates) return NULL;
    if (from == "f32")
        return for_integer(to,
                           [](auto t) -> action { return one<decltype(t), float, op_truncate>; });
    return to == "u16" || to == "s16"   ? convert_to<uint16_t>(from, register_bytes)
           : to == "u32" || to == "s32" ? convert_to<uint32_t>(from, register_bytes)
           : to == "u64" || to == "s64" ? convert_to<uint64_t>(from, register_bytes)
                                        : NULL;
}

/* What may stand between an instruction's name and its type (the types of a cvt), all that occurs.
 * Whatever else a compiler may want, a rounding or saturation, say, was not thought of here. */
bool is_known(const words &op)
{
    static const std::set<std::string> known = {
        "abs",
        "add",
        "and",
        "atom.cas",
        "atom.global.add",
        "atom.global.min",
        "atom.min",
        "atom.relaxed.cas",
        "atom.shared.add",
        "bar",
        "bar.red.or",
        "bar.warp",
        "bfi",
        "bfind.shiftamt",
        "bra",
        "brev",
        "clz",
        "copysign",
        "cp.async",
        "cp.async.ca.shared",
        "cp.async.cg.shared",
        "cvt",
        "cvt.rn",
        "cvt.rzi",
        "cvta.to.global",
        "div",
        "div.rn",
        "ex2.approx",
        "ex2.approx.ftz",
        "fma.rn",
        "ld",
        "ld.global",
        "ld.global.nc",
        "ld.global.nc.v2",
        "ld.global.nc.v4",
        "ld.global.v2",
        "ld.global.v4",
        "ld.param",
        "ld.param.v2",
        "ld.param.v4",
        "ld.shared",
        "ld.shared.v2",
        "ld.shared.v4",
        "ld.v2",
        "ld.v4",
        "ldmatrix.sync.aligned.m8n8.x4.shared",
        "mad.lo",
        "max",
        "min",
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16",
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16",
        "mov",
        "mul",
        "mul.lo",
        "mul.rn",
        "mul.wide",
        "neg",
        "not",
        "or",
        "popc",
        "prmt",
        "rcp.approx.ftz",
        "rcp.rn",
        "red.global.add",
        "rem",
        "ret",
        "selp",
        "setp.eq",
        "setp.equ",
        "setp.ge",
        "setp.geu",
        "setp.gt",
        "setp.gtu",
        "setp.le",
        "setp.leu",
        "setp.lt",
        "setp.ltu",
        "setp.nan",
        "setp.ne",
        "setp.neu",
        "setp.num",
        "shf.l.wrap",
        "shfl.sync.bfly",
        "shfl.sync.idx",
        "shfl.sync.up",
        "shl",
        "shr",
        "sqrt.rn",
        "st",
        "st.global",
        "st.global.v2",
        "st.global.v4",
        "st.shared",
        "st.shared.v2",
        "st.shared.v4",
        "sub",
        "vote.sync.any",
        "vote.sync.ballot",
        "xor",
    };
    const size_t end = op[0] == "cvt" ? op.size() - 2 : op.size() - 1;
    std::string name = op[0];
    for (size_t k = 1; k < end; k++) name += "." + op[k];
    return known.count(name) > 0;
}

struct named {
    int slot, bytes;
};
struct parser {
    kernel k;
    std::vector<std::map<std::string, named>> scopes;
    std::map<std::string, size_t> labels;
    std::map<std::pair<uint64_t, int>, int> known_constants;

    [[noreturn]] void fail(const std::string &what)
    {
        printf("FAIL  %s: not understood: %s\n0 passed, 1 failed, 0 skipped\n", k.name.c_str(),
               what.c_str());
        fflush(stdout);
        _Exit(1);
    }
    int constant_slot(uint64_t value, int bytes)
    {
        int &slot =
            known_constants.insert(std::make_pair(std::make_pair(value, bytes), -1)).first->second;
        if (slot < 0) {
            const constant c = { k.n_registers++, bytes, value };
            k.constants.push_back(c);
            slot = c.slot;
        }
        return slot;
    }
    int special(int *slot)
    {
        if (*slot < 0) *slot = k.n_registers++;
        return *slot;
    }
    named find(const std::string &name)
    {
        for (size_t s = scopes.size(); s-- > 0;)
            if (scopes[s].count(name)) return scopes[s][name];
        fail(name);
    }
    void declare(const std::string &text) /* ".reg .b32 %r<12>" or "%a, %b" */
    {
        std::istringstream in(text);
        std::string directive, type, rest;
        in >> directive >> type;
        std::getline(in, rest);
        const words names = split_at(rest, ',');
        for (size_t k_name = 0; k_name < names.size(); k_name++) {
            const size_t bracket = names[k_name].find('<');
            const std::string stem = names[k_name].substr(0, bracket);
            const int n = bracket == std::string::npos ? 0 : atoi(&names[k_name][bracket + 1]);
            for (int index = 0; index < std::max(n, 1); index++) {
                const named it = { k.n_registers++, bytes_of(type.substr(1)) };
                scopes.back()[n ? stem + std::to_string(index) : stem] = it;
            }
        }
    }
    /* A register, a number, a symbol, for an operand of `bytes` (0: a predicate). */
    int operand(const std::string &text, int bytes)
    {
        if (text == "%tid.x") return special(&k.thread);
        if (text == "%ctaid.x") return special(&k.block);
        if (text == "%nctaid.x") return special(&k.grid);
        if (text.find("rkvi_shared_bytes") != std::string::npos) return constant_slot(0, bytes);
        if (text == k.name + "_param_0") return special(&k.parameters);
        if (text[0] == '%') {
            const named it = find(text);
            if (bytes && it.bytes != bytes) fail(text + ": of another size");
            return it.slot;
        }
        if (text.compare(0, 2, "0f") == 0 || text.compare(0, 2, "0d") == 0)
            return constant_slot(strtoull(text.c_str() + 2, NULL, 16), bytes);
        if (!isdigit(static_cast<unsigned char>(text[0])) && text[0] != '-') fail(text);
        const uint64_t value = text[0] == '-'
                                   ? static_cast<uint64_t>(strtoll(text.c_str(), NULL, 0))
                                   : strtoull(text.c_str(), NULL, 0);
        return constant_slot(bytes ? value : value ? everyone : 0, bytes ? bytes : 4);
    }
    int width_of(const std::string &text)
    {
        return text[0] == '%' && text.find('.') == std::string::npos ? find(text).bytes : 4;
    }
    words list(const std::string &text) /* "{a, b}" or "a" */
    {
        return text[0] == '{' ? split_at(text.substr(1, text.size() - 2), ',') : words(1, text);
    }
    /* "[base+offset]" */
    void address(instruction *i, const std::string &text, int index)
    {
        const std::string inside = text.substr(1, text.size() - 2);
        const size_t plus = inside.find('+');
        const std::string base = inside.substr(0, plus);
        if (text[0] != '[') fail(text);
        if (plus != std::string::npos) i->offset = strtoll(inside.c_str() + plus + 1, NULL, 0);
        i->address_bytes = base[0] == '%' ? width_of(base) : i->where == SPACE_SHARED ? 4 : 8;
        i->from[index] = operand(base, i->address_bytes);
    }

    void memory_instruction(instruction *i, const words &op, const words &a)
    {
        const bool loads = op[0] == "ld", reduces = op[0] == "red";
        const std::string type = op.back();
        i->where = has(op, "global")   ? SPACE_GLOBAL
                   : has(op, "shared") ? SPACE_SHARED
                   : has(op, "param")  ? SPACE_PARAM
                                       : SPACE_GENERIC;
        i->size = bytes_of(type);
        i->is_signed = type[0] == 's';
        if (has(op, "local") || has(op, "const")) return;
        if (loads || op[0] == "st") {
            const words values = list(a[loads ? 0 : 1]);
            i->n = static_cast<int>(values.size());
            if (i->n != (has(op, "v4") ? 4 : has(op, "v2") ? 2 : 1)) return;
            address(i, a[loads ? 1 : 0], 0);
            for (int v = 0; v < i->n; v++) {
                const std::string &value = values[static_cast<size_t>(v)];
                const int bytes = value[0] == '%' ? find(value).bytes : i->size;
                if (loads)
                    i->to[v] = operand(value, bytes), i->bytes[v] = bytes;
                else
                    i->from[1 + v] = operand(value, bytes), i->bytes[0] = bytes;
            }
            i->run = loads ? load : store;
            return;
        }
        const std::string how = op[op.size() - 2];
        i->n = 1;
        address(i, a[reduces ? 0 : 1], 0);
        if (!reduces) i->to[0] = operand(a[0], i->size);
        for (size_t v = reduces ? 1 : 2; v < a.size(); v++)
            i->from[v - (reduces ? 0 : 1)] = operand(a[v], i->size);
        i->run =
            how == "add"
                ? for_integer(type, [](auto t) -> action { return atomic<decltype(t), op_add>; })
            : how == "min"
                ? for_integer(type, [](auto t) -> action { return atomic<decltype(t), op_min>; })
            : how == "cas"
                ? for_integer(type, [](auto t) -> action { return atomic_cas<decltype(t)>; })
                : NULL;
    }
    void copy_instruction(instruction *i, const words &op, const words &a)
    {
        if (op[2] == "wait_all") {
            i->run = await_copies;
            return;
        }
        if (a.size() != 4 || !has(op, "shared") || !has(op, "global")) return;
        i->where = SPACE_GLOBAL;
        address(i, a[1], 1);
        if (i->offset != 0) return;
        i->where = SPACE_SHARED;
        address(i, a[0], 0);
        i->size = atoi(a[2].c_str());
        i->from[2] = operand(a[3], 4);
        i->run = start_copy;
    }
    void warp_instruction(instruction *i, const words &op, const words &a)
    {
        i->kind = FLOW_WARP;
        if (op[0] == "bar" && op[1] == "warp") {
            if (operand(a[0], 4) == constant_slot(static_cast<uint64_t>(-1), 4)) i->run = nothing;
        } else if (op[0] == "shfl") {
            const words to = split_at(a[0], '|');
            i->to[0] = operand(to[0], 4);
            i->to[1] = to.size() > 1 ? operand(to[1], 0) : -1;
            for (size_t v = 1; v < a.size(); v++) i->from[v - 1] = operand(a[v], 4);
            i->run = has(op, "bfly")  ? shuffle<lane_xor>
                     : has(op, "up")  ? shuffle<lane_up>
                     : has(op, "idx") ? shuffle<lane_is>
                                      : static_cast<action>(NULL);
        } else if (op[0] == "vote") {
            i->to[0] = operand(a[0], has(op, "ballot") ? 4 : 0);
            i->from[0] = operand(a[1], 0);
            i->from[1] = operand(a[2], 4);
            i->run = has(op, "ballot") ? ballot
                     : has(op, "any")  ? vote_any
                                       : static_cast<action>(NULL);
        } else if (op[0] == "ldmatrix") {
            const words to = list(a[0]);
            i->where = SPACE_SHARED;
            address(i, a[1], 0);
            for (size_t v = 0; v < to.size(); v++) i->to[v] = operand(to[v], 4);
            if (has(op, "m8n8") && has(op, "x4") && !has(op, "trans")) i->run = load_matrices;
        } else {
            const words d = list(a[0]), fragments[3] = { list(a[1]), list(a[2]), list(a[3]) };
            size_t n = 0;
            for (size_t v = 0; v < d.size(); v++) i->to[v] = operand(d[v], 4);
            for (int part = 0; part < 3; part++)
                for (size_t v = 0; v < fragments[part].size(); v++)
                    i->from[n++] = operand(fragments[part][v], 4);
            if (n == 10 && has(op, "m16n8k16") && op.back() == "f32")
                i->run = has(op, "bf16")  ? matrix_product<bf16_of>
                         : has(op, "f16") ? matrix_product<half_of>
                                          : static_cast<action>(NULL);
        }
    }
    action arithmetic_action(const words &op)
    {
        const std::string &name = op[0], &type = op.back();
        const bool is_float = type[0] == 'f';
        if (name == "add") return arithmetic<op_add, op_add>(type);
        if (name == "sub") return arithmetic<op_sub, op_sub>(type);
        if (name == "mul" && has(op, "wide"))
            return type == "s32"   ? wide<int64_t, int32_t>
                   : type == "u32" ? wide<uint64_t, uint32_t>
                   : type == "s16" ? wide<int32_t, int16_t>
                   : type == "u16" ? wide<uint32_t, uint16_t>
                                   : static_cast<action>(NULL);
        if (name == "mul" && (is_float || has(op, "lo"))) return arithmetic<op_mul, op_mul>(type);
        if (name == "mad" && has(op, "lo")) return for_integer(type, THREE(op_mad));
        if (name == "fma" && has(op, "rn")) return for_float(type, THREE(op_fma));
        if (name == "div" && (!is_float || has(op, "rn"))) return arithmetic<op_div, op_fdiv>(type);
        if (name == "rem") return for_integer(type, TWO(op_rem));
        if (name == "min") return for_integer(type, TWO(op_min));
        if (name == "max") return arithmetic<op_max, op_fmax>(type);
        if (name == "and") return bitwise<op_and>(type);
        if (name == "or") return bitwise<op_or>(type);
        if (name == "xor") return bitwise<op_xor>(type);
        if (name == "not" && type == "pred") return not_predicate;
        if (name == "not") return for_integer("u" + type.substr(1), ONE(op_not));
        if (name == "neg")
            return is_float ? for_float(type, ONE(op_neg)) : for_integer(type, ONE(op_neg));
        if (name == "abs") return for_float(type, ONE(op_fabs));
        if (name == "copysign") return for_float(type, TWO(op_copysign));
        if (name == "sqrt" && has(op, "rn")) return for_float(type, ONE(op_sqrt));
        if (name == "rcp") return for_float(type, ONE(op_rcp));
        if (name == "ex2" && type == "f32") return one<float, float, op_ex2>;
        if (name == "shl") return for_integer("u" + type.substr(1), SHIFT(op_shl));
        if (name == "shr") return for_integer(type, SHIFT(op_shr));
        if (name == "shf" && has(op, "wrap") && has(op, "l"))
            return three<uint32_t, op_funnel_left>;
        if (name == "prmt") return three<uint32_t, op_permute>;
        if (name == "popc") return for_integer(type, COUNT(op_popc));
        if (name == "clz") return for_integer(type, COUNT(op_clz));
        if (name == "bfind" && has(op, "shiftamt") && type[0] == 'u')
            return for_integer(type, COUNT(op_bfind_shift));
        if (name == "brev") return for_integer("u" + type.substr(1), ONE(op_reverse));
        if (name == "bfi") return type == "b32" ? insert_bits<uint32_t> : insert_bits<uint64_t>;
        return NULL;
    }
    /* The widths of the operands of an arithmetic instruction: mostly that of its type. */
    static int operand_bytes(const words &op, size_t index)
    {
        const int bytes = bytes_of(op.back());
        if ((op[0] == "shl" || op[0] == "shr" || op[0] == "shf") && index == 2) return 4;
        if (op[0] == "bfi" && index >= 3) return 4;
        if (op[0] == "mul" && has(op, "wide") && index == 0) return 2 * bytes;
        if ((op[0] == "popc" || op[0] == "clz" || op[0] == "bfind") && index == 0) return 4;
        return bytes;
    }
    void plain_instruction(instruction *i, const words &op, const words &a)
    {
        const std::string &type = op.back();
        if (op[0] == "setp") {
            i->to[0] = operand(a[0], 0);
            for (size_t v = 1; v < 3; v++) i->from[v - 1] = operand(a[v], bytes_of(type));
            if (op.size() == 3) i->run = comparison(op[1], type);
        } else if (op[0] == "selp") {
            i->to[0] = operand(a[0], bytes_of(type));
            for (size_t v = 1; v < 3; v++) i->from[v - 1] = operand(a[v], bytes_of(type));
            i->from[2] = operand(a[3], 0);
            i->run = bytes_of(type) == 8   ? choose<uint64_t>
                     : bytes_of(type) == 4 ? choose<uint32_t>
                                           : choose<uint16_t>;
        } else if (op[0] == "mov" && (a[0][0] == '{' || a[1][0] == '{')) {
            const bool splits = a[0][0] == '{';
            const words parts = list(a[splits ? 0 : 1]);
            i->n = static_cast<int>(parts.size());
            i->size = bytes_of(type) / i->n;
            for (size_t v = 0; v < parts.size(); v++)
                (splits ? i->to : i->from)[v] = operand(parts[v], i->size);
            (splits ? i->from : i->to)[0] = operand(a[splits ? 1 : 0], bytes_of(type));
            i->run = splits ? split : join;
        } else if (op[0] == "mov") {
            i->to[0] = operand(a[0], bytes_of(type));
            i->from[0] = operand(a[1], bytes_of(type));
            i->run =
                type == "pred" ? move_predicate : for_integer("u" + type.substr(1), ONE(op_copy));
        } else if (op[0] == "cvt") {
            i->to[0] = operand(a[0], bytes_of(op[op.size() - 2]));
            const int bytes = a[1][0] == '%' ? find(a[1]).bytes : bytes_of(type);
            if (bytes < bytes_of(type)) return;
            i->from[0] = operand(a[1], bytes);
            i->run = conversion(op, bytes);
        } else if (op[0] == "cvta") {
            i->to[0] = operand(a[0], 8);
            i->from[0] = operand(a[1], 8);
            i->run = one<uint64_t, uint64_t, op_copy>; /* generic addresses are the host's */
        } else {
            for (size_t v = 0; v < a.size(); v++)
                (v ? i->from[v - 1] : i->to[0]) = operand(a[v], operand_bytes(op, v));
            i->run = arithmetic_action(op);
        }
    }
    void statement(const std::string &text)
    {
        std::istringstream in(text);
        std::string word, rest;
        instruction i = instruction();
        i.text = text;
        i.guard = i.to[0] = i.to[1] = -1;
        in >> word;
        if (word[0] == '@') {
            i.unless = word[1] == '!';
            i.guard = operand(word.substr(i.unless ? 2 : 1), 0);
            in >> word;
        }
        std::getline(in, rest);
        const words op = split_at(word, '.'), a = split_at(rest, ',');
        if (!is_known(op)) fail(text);
        if (op[0] == "bra") {
            i.kind = FLOW_BRANCH;
            i.label = a[0];
            i.run = nothing;
        } else if (op[0] == "ret" || op[0] == "exit") {
            i.kind = FLOW_EXIT;
            i.run = nothing;
        } else if ((op[0] == "bar" || op[0] == "barrier") && has(op, "sync") && !has(op, "warp")) {
            i.kind = FLOW_BLOCK;
            i.run = a.size() == 1 && a[0] == "0" ? nothing : static_cast<action>(NULL);
        } else if (op[0] == "bar" && has(op, "red")) {
            i.kind = FLOW_BLOCK;
            i.to[0] = operand(a[0], 0);
            i.from[0] = operand(a[2], 0);
            i.run = has(op, "or") && a[1] == "0" ? nothing : static_cast<action>(NULL);
        } else if (op[0] == "bar" || op[0] == "shfl" || op[0] == "vote" || op[0] == "ldmatrix" ||
                   op[0] == "mma") {
            warp_instruction(&i, op, a);
        } else if (op[0] == "ld" || op[0] == "st" || op[0] == "atom" || op[0] == "red") {
            memory_instruction(&i, op, a);
        } else if (op[0] == "cp" && op[1] == "async") {
            copy_instruction(&i, op, a);
        } else {
            plain_instruction(&i, op, a);
        }
        if (!i.run) fail(text);
        k.code.push_back(i);
    }
    /* The text between the braces of a kernel. */
    kernel parse(const std::string &name, const std::string &body)
    {
        std::string text;
        k = kernel();
        k.name = name;
        k.parameters = k.thread = k.block = k.grid = -1;
        scopes.assign(1, std::map<std::string, named>());
        int depth = 0; /* of braces within a statement */
        for (size_t c = 0; c < body.size(); c++) {
            const bool begins = text.empty();
            if (begins && isspace(static_cast<unsigned char>(body[c]))) continue;
            if (begins && body[c] == '{') {
                scopes.push_back(std::map<std::string, named>());
            } else if (begins && body[c] == '}') {
                scopes.pop_back();
            } else if (body[c] == ':' && text[0] == '$') {
                labels[text] = k.code.size();
                text.clear();
            } else if (body[c] == ';' && depth == 0) {
                if (text.compare(0, 4, ".reg") == 0)
                    declare(text);
                else if (text[0] != '.')
                    statement(text);
                else if (text.compare(0, 7, ".pragma") != 0)
                    fail(text);
                text.clear();
            } else {
                depth += (body[c] == '{') - (body[c] == '}');
                text += body[c] == '\n' || body[c] == '\t' ? ' ' : body[c];
            }
        }
        for (size_t n = 0; n < k.code.size(); n++) {
            if (k.code[n].kind != FLOW_BRANCH) continue;
            if (!labels.count(k.code[n].label)) fail(k.code[n].text);
            k.code[n].target = labels[k.code[n].label];
        }
        return k;
    }
};

double ratio(long a, long b)
{
    return b ? static_cast<double>(a) / static_cast<double>(b) : 0.0;
}
/* Instructions are those of warps; `longest`: of one warp in one block. Sectors of global memory
 * and turns of shared memory stand beside what the bytes asked for would take at best. */
void print_counts()
{
    printf("# %-26s %6s %8s %11s %6s %8s %10s %5s %10s %5s %10s %5s %9s\n", "kernel", "calls",
           "blocks", "instr.", "lanes", "longest", "read", "x", "written", "x", "turns", "x",
           "mma");
    for (std::map<std::string, kernel>::iterator it = the.kernels.begin(); it != the.kernels.end();
         ++it) {
        const counts &n = it->second.n;
        if (n.launches == 0) continue;
        printf("# %-26s %6ld %8ld %11ld %6.1f %8ld %10ld %5.2f %10ld %5.2f %10ld %5.2f %9ld\n",
               plain_name(it->first).c_str(), n.launches, n.blocks, n.instructions,
               ratio(n.lanes, n.instructions), n.longest, n.sectors[0],
               ratio(32 * n.sectors[0], n.asked[0]), n.sectors[1],
               ratio(32 * n.sectors[1], n.asked[1]), n.turns, ratio(128 * n.turns, n.shared_bytes),
               n.products);
    }
}

void read_kernels()
{
    const char *wanted = getenv("RKV_PTX"), *path = wanted ? wanted : RKV_PTX_FILE;
    std::ifstream file(path);
    std::string all, line;
    while (std::getline(file, line)) all += line.substr(0, line.find("//")) + "\n";
    size_t at = 0;
    while ((at = all.find(".entry", at)) != std::string::npos) {
        const size_t open = all.find('(', at), begin = all.find("\n{", open);
        const size_t end = all.find("\n}", begin);
        const std::string name = split_at(all.substr(at + 6, open - at - 6), ',')[0];
        the.kernels[name] = parser().parse(name, all.substr(begin + 2, end - begin - 2));
        at = end;
    }
    if (the.kernels.empty()) {
        printf("FAIL  no kernels in RKV_PTX=%s\n0 passed, 1 failed, 0 skipped\n", path);
        _Exit(1);
    }
    the.counts = getenv("RKV_PTX_COUNTS") != NULL;
    if (the.counts) atexit(print_counts);
}

/* ---- Running -------------------------------------------------------------------------------- */
void fill(warp *w, int slot, int bytes, uint64_t value)
{
    for (int l = 0; l < LANES; l++)
        memcpy(values<unsigned char>(*w, slot) + l * bytes, &value, static_cast<size_t>(bytes));
}
/* The lanes of `active` are at instruction `at`. */
void stand(warp *w, uint32_t active, size_t at)
{
    for (int l = 0; l < LANES; l++)
        if (active >> l & 1) w->at[l] = at;
}
/* Runs a warp until it is done or waits for the block. */
void run_warp(warp &w)
{
    const std::vector<instruction> &code = the.running->code;
    while (w.alive) {
        const size_t nowhere = code.size();
        size_t at = nowhere, next = nowhere; /* the lowest, and the next of other lanes */
        uint32_t active = 0;
        for (int l = 0; l < LANES; l++)
            if (w.alive >> l & 1 && !(w.waiting >> l & 1)) at = std::min(at, w.at[l]);
        if (at == nowhere) die("a warp's lanes went separate ways", 0);
        for (int l = 0; l < LANES; l++)
            if (w.alive >> l & 1 && !(w.waiting >> l & 1)) {
                if (w.at[l] == at)
                    active |= 1u << l;
                else
                    next = std::min(next, w.at[l]);
            }
        for (;;) {
            const instruction &i = code[at];
            const uint32_t set = i.guard < 0 ? everyone : predicate(w, i.guard);
            const uint32_t mine = active & (i.unless ? ~set : set);
            the.now = &i;
            w.instructions++;
            if (the.counts) the.running->n.lanes += __builtin_popcount(mine);
            if (i.kind == FLOW_NEXT) {
                if (mine) i.run(w, i, mine);
                at++;
            } else if (i.kind == FLOW_BRANCH) {
                if (mine != 0 && mine != active) {
                    stand(&w, mine, i.target);
                    stand(&w, active & ~mine, at + 1);
                    break;
                }
                at = mine ? i.target : at + 1;
            } else if (i.kind == FLOW_EXIT) {
                w.alive &= ~mine;
                active &= ~mine;
                if (!active) break;
                at++;
            } else {
                if (mine != active) die("a warp-wide instruction for some lanes", 0);
                for (int l = 0; l < LANES; l++)
                    if (w.waiting >> l & 1 && w.at[l] == at) active |= 1u << l;
                w.waiting |= active;
                stand(&w, active, at);
                if (active != w.alive) break; /* wait for the other lanes */
                if (active != everyone)
                    die("a warp-wide instruction that a lane has left behind", 0);
                w.waiting = 0;
                if (i.kind == FLOW_BLOCK) {
                    w.barrier = at;
                    stand(&w, active, at + 1);
                    return;
                }
                i.run(w, i, active);
                at++;
            }
            if (at >= next) {
                stand(&w, active, at);
                break;
            }
        }
    }
    for (int l = 0; l < LANES; l++)
        if (!w.copies[l].empty()) die("a copy that its thread did not await", l);
    w.is_done = true;
}
} // namespace

void ptx_launch(const void *function, int threads, size_t shared_bytes, const void *parameters,
                size_t parameter_bytes)
{
    Dl_info info;
    if (the.kernels.empty()) read_kernels();
    the.now = NULL;
    the.running = NULL;
    if (!dladdr(function, &info) || !info.dli_sname) die("a kernel without a name", 0);
    std::string name = info.dli_sname;
    const std::string scope = "_ZN9rkvi_cudaL"; /* nvcc writes a static function without the L */
    if (name.compare(0, scope.size(), scope) == 0) name.erase(scope.size() - 1, 1);
    if (!the.kernels.count(name)) die(name + ": not in the file", 0);
    kernel &k = the.kernels[name];
    std::vector<warp> &warps = k.warps;
    the.running = &k;
    the.parameters = static_cast<const unsigned char *>(parameters);
    the.parameter_bytes = parameter_bytes;
    the.shared_bytes = shared_bytes;
    while (warps.size() < static_cast<size_t>(threads / LANES)) {
        warps.push_back(warp());
        warp *w = &warps.back();
        w->registers.resize(static_cast<size_t>(k.n_registers));
        for (size_t c = 0; c < k.constants.size(); c++)
            fill(w, k.constants[c].slot, k.constants[c].bytes, k.constants[c].value);
    }
    the.region_begin = the.region_end = 0;
    k.n.launches++;
    for (size_t n = 0; n < warps.size(); n++) {
        if (k.parameters >= 0)
            fill(&warps[n], k.parameters, 8, reinterpret_cast<uintptr_t>(parameters));
        if (k.grid >= 0) fill(&warps[n], k.grid, 4, shim().grid.x);
        for (int l = 0; l < LANES && k.thread >= 0; l++)
            values<uint32_t>(warps[n], k.thread)[l] =
                static_cast<uint32_t>(n) * LANES + static_cast<uint32_t>(l);
    }
}

void ptx_run_block()
{
    shim_machine &m = shim();
    kernel &k = *the.running;
    std::vector<warp> &warps = k.warps;
    const int n_warps = m.n_threads / LANES;
    memset(m.shared, 0xff, sizeof m.shared); /* NaNs, and negative integers */
    for (int n = 0; n < n_warps; n++) {
        warp &w = warps[static_cast<size_t>(n)];
        w.alive = everyone;
        w.waiting = 0;
        w.is_done = false;
        w.instructions = 0;
        stand(&w, everyone, 0);
        if (k.block >= 0) fill(&w, k.block, 4, m.block.x);
    }
    for (;;) {
        int done = 0;
        uint32_t any = 0;
        for (int n = 0; n < n_warps; n++) {
            the.warp_now = m.order == SHIM_ASCENDING ? n : n_warps - 1 - n;
            warp &w = warps[static_cast<size_t>(the.warp_now)];
            if (!w.is_done) run_warp(w);
            done += w.is_done;
        }
        if (done == n_warps) break;
        if (done > 0) die("a barrier that not all threads reach", 0);
        const instruction &i = k.code[warps[0].barrier];
        for (int n = 0; n < n_warps; n++) {
            warp &w = warps[static_cast<size_t>(n)];
            if (w.barrier != warps[0].barrier) die("warps at different barriers", 0);
            if (i.to[0] >= 0) any |= predicate(w, i.from[0]);
        }
        for (int n = 0; n < n_warps && i.to[0] >= 0; n++)
            predicate(warps[static_cast<size_t>(n)], i.to[0]) = any ? everyone : 0;
    }
    k.n.blocks++;
    for (int n = 0; n < n_warps; n++) {
        k.n.instructions += warps[static_cast<size_t>(n)].instructions;
        k.n.longest = std::max(k.n.longest, warps[static_cast<size_t>(n)].instructions);
    }
}
