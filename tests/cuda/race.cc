/* A race detector for rkv_cuda.cu over tests/cuda/shim.h: make test-cuda-race  The kernels are
 * compiled with -fsanitize=thread and linked with this file instead of libtsan, so the compiler
 * calls it before every memory access. For each byte of device and shared memory it records the
 * last accesses, their kind, and the barriers before them. It reports  - two accesses, not both
 * reads and not both atomic, that no barrier orders. Blocks of one launch are never ordered;
 * __syncthreads orders warps; __syncwarp orders the lanes of a warp (shuffles and votes exchange
 * registers and order no memory); - reads of bytes that were never written, and accesses outside of
 * the caller's buffers, the shared memory that the launch asked for, parameters, and the thread's
 * own stack; - __ldg of memory that the same launch writes: its cache is not coherent.  It checks
 * what the kernels do with these inputs, for any order of the fibers. Launches run one after the
 * other; concurrent streams are not checked. One race is intended, and the cases of `test_cuda
 * kernels` avoid it: after a NaN, rkvi_is_unusable reads the fault while other blocks may lower it,
 * and every value that it can read gives the same answer. */
#include "shim.h"
extern "C" {
#include "harness.h"
}
#include <map>
#include <set>
#include <string>
#include <unistd.h>
#include <utility>

/* ---- What is remembered --------------------------------------------------------------------- */
/* The stretches between barriers of a block are numbered throughout, over all blocks and launches,
 * so that a number alone says which block and launch an access belongs to. */
static uint32_t stretch, block_began, launch_began;
static uint32_t warp_stretch[SHIM_MAX_THREADS]; /* of each thread: __syncwarp so far */

enum { MANY = -1 };
struct mark {
    uint32_t stretch, warp_stretch; /* 0: never */
    uint32_t from;                  /* the address of the code; it is linked below 4 GB */
    int16_t thread;                 /* or MANY of the warp */
    int8_t warp;                    /* or MANY */
    bool other_blocks;              /* have done the same in this launch */
};
struct cell {
    mark marks[RACE_KINDS];
};
struct region {
    char *base;
    size_t bytes;
    cell *cells;
    char *written;
    bool shared;
};

static std::map<const char *, region> device_memory;
static region shared_memory, *latest = &shared_memory;
static const char *parameters;
static size_t parameter_bytes;
static race_kind kind_now = RACE_READ; /* or RACE_WRITE, as it comes */
static bool watching;

static bool lies_in(const void *at, const void *base, size_t bytes)
{
    return reinterpret_cast<uintptr_t>(at) - reinterpret_cast<uintptr_t>(base) < bytes;
}

static region make_region(void *base, size_t bytes, bool shared)
{
    region r = { static_cast<char *>(base), bytes, NULL, NULL, shared };
    r.cells = static_cast<cell *>(calloc(bytes + 1, sizeof(cell)));
    r.written = static_cast<char *>(calloc(bytes + 1, 1));
    if (!r.cells || !r.written) shim_die("no memory for the race detector");
    return r;
}

static region *region_at(const char *at)
{
    if (lies_in(at, latest->base, latest->bytes)) return latest;
    if (lies_in(at, shared_memory.base, shared_memory.bytes)) return latest = &shared_memory;
    std::map<const char *, region>::iterator next = device_memory.upper_bound(at);
    if (next == device_memory.begin()) return NULL;
    region *r = &(--next)->second;
    return lies_in(at, r->base, r->bytes) ? latest = r : NULL;
}

/* Memory that no other thread writes while this one runs: its stack, parameters, constants. All of
 * the program's own data counts as such, the shim's too, since device code can name none of it. */
extern "C" char __executable_start, end; /* from the linker */
static bool is_private(const char *at)
{
    const shim_machine &m = shim();
    if (lies_in(at, m.shared, sizeof m.shared)) return false;
    return lies_in(at, m.fibers[m.current].stack, SHIM_STACK_BYTES) ||
           lies_in(at, parameters, parameter_bytes) ||
           lies_in(at, &__executable_start, static_cast<size_t>(&end - &__executable_start));
}

/* ---- Reports -------------------------------------------------------------------------------- */
static const char *const kind_names[] = { "a read", "a write", "an atomic", "an __ldg" };

/* FILE:LINE, then those that it was inlined into. */
static std::string place(uint32_t from)
{
    char program[512] = "", command[700], line[256];
    std::string out;
    const ssize_t length = readlink("/proc/self/exe", program, sizeof program - 1);
    snprintf(command, sizeof command, "addr2line -s -i -e '%.*s' %x 2>/dev/null",
             length > 0 ? static_cast<int>(length) : 0, program, from - 1);
    FILE *lines = popen(command, "r");
    while (lines && fgets(line, sizeof line, lines)) {
        line[strcspn(line, " \n")] = 0;
        out += (out.empty() ? "" : " < ") + std::string(line);
    }
    if (lines) pclose(lines);
    snprintf(line, sizeof line, "%x", from);
    return out.empty() ? line : out;
}

static std::string who(race_kind kind, const mark &m)
{
    std::string out = kind_names[kind];
    if (m.thread != MANY) out += " by thread " + std::to_string(m.thread);
    return out + " at " + place(m.from);
}

/* Each pair of places once: a missing barrier shows in many bytes. */
static bool is_news(const mark &me, uint32_t other)
{
    static std::set<std::pair<uint32_t, uint32_t>> known;
    return known.insert(std::make_pair(me.from, other)).second;
}

/* Mutants have been noticed with the first report. */
static void report(const std::string &what)
{
    const std::string text = "race: " + what + ", block " + std::to_string(shim().block.x);
    if (getenv("RKV_RACE_STOP")) shim_die(text.c_str());
    case_fail("%s", text.c_str());
}

/* last: the last byte of the access; near: what is called behind a buffer. */
static void report_outside(race_kind kind, const mark &me, const char *last)
{
    const size_t near = 4096;
    std::string where = "memory that is not the kernel's";
    if (!is_news(me, RACE_KINDS)) return;
    std::map<const char *, region>::iterator next = device_memory.upper_bound(last);
    if (next != device_memory.begin()) {
        const region &r = (--next)->second;
        if (lies_in(last, r.base + r.bytes, near))
            where = "byte " + std::to_string(last - r.base) + " of a buffer of " +
                    std::to_string(r.bytes);
    }
    if (lies_in(last, shim().shared, sizeof shim().shared)) where = "shared memory not asked for";
    report(who(kind, me) + " of " + where);
}

static std::string position(const region &r, size_t i)
{
    return (r.shared ? "shared memory + " : "device memory + ") + std::to_string(i);
}

/* ---- Judging an access ---------------------------------------------------------------------- */
static const bool may_clash[RACE_KINDS][RACE_KINDS] = {
    /*             READ   WRITE  ATOMIC LDG   */
    /* READ   */ { false, true, true, false },
    /* WRITE  */ { true, true, true, true },
    /* ATOMIC */ { true, true, false, true },
    /* LDG    */ { false, true, true, false },
};

static bool is_ordered(const mark &before, const mark &me)
{
    if (before.other_blocks || before.stretch < block_began) return false;
    if (before.stretch < me.stretch || before.thread == me.thread) return true;
    return before.warp == me.warp && before.warp_stretch < me.warp_stretch;
}

/* Adds an access to those of its kind. Of what lies before a barrier the later ones can stand for
 * the earlier: who is in order with them is in order with all. */
static void add(mark *m, const mark &me, uint32_t began)
{
    const bool now = m->stretch == me.stretch;
    const bool others = m->stretch >= began && (m->other_blocks || m->stretch < block_began);
    const mark before = *m;
    *m = me;
    m->other_blocks = others;
    if (now && before.warp != me.warp)
        m->thread = m->warp = MANY;
    else if (now && before.warp_stretch == me.warp_stretch && before.thread != me.thread)
        m->thread = MANY;
}

static void judge_byte(region *r, size_t i, race_kind kind, const mark &me)
{
    cell *c = &r->cells[i];
    const mark &same = c->marks[kind];
    const uint32_t began = r->shared ? block_began : launch_began; /* before it nothing counts */
    if (same.stretch == me.stretch && same.warp_stretch == me.warp_stretch &&
        same.thread == me.thread)
        return; /* if another came between, it was judged against this thread then */
    if (kind != RACE_WRITE && !r->written[i] && is_news(me, 0))
        report(who(kind, me) + " of bytes that nobody has written, " + position(*r, i));
    for (int k = 0; k < RACE_KINDS; k++) {
        const mark &before = c->marks[k];
        const bool is_ldg = kind == RACE_LDG || k == RACE_LDG;
        if (!may_clash[kind][k] || before.stretch < began) continue;
        if ((is_ldg || !is_ordered(before, me)) && is_news(me, before.from))
            report(who(kind, me) + " and " + who(static_cast<race_kind>(k), before) +
                   (is_ldg ? " in one launch, " : " with no barrier between, ") + position(*r, i));
    }
    add(&c->marks[kind], me, began);
    if (kind == RACE_WRITE || kind == RACE_ATOMIC) r->written[i] = 1;
}

static void touch(const void *address, size_t bytes, race_kind kind, void *caller)
{
    const char *at = static_cast<const char *>(address);
    if (!watching || is_private(at)) return;
    const int thread = shim().current;
    const mark me = { stretch,
                      warp_stretch[thread],
                      static_cast<uint32_t>(reinterpret_cast<uintptr_t>(caller)),
                      static_cast<int16_t>(thread),
                      static_cast<int8_t>(thread / 32),
                      false };
    watching = false; /* not what is called from here */
    if (kind_now != RACE_READ) kind = kind_now;
    region *r = region_at(at);
    const size_t first = r ? static_cast<size_t>(at - r->base) : 0;
    if (!r || bytes > r->bytes - first)
        report_outside(kind, me, at + bytes - 1);
    else
        for (size_t i = 0; i < bytes; i++) judge_byte(r, first + i, kind, me);
    watching = true;
}

/* ---- Told by the shim ----------------------------------------------------------------------- */
void race_memory(void *base, size_t bytes)
{
    device_memory[static_cast<char *>(base)] = make_region(base, bytes, false);
}
void race_forget(void *base)
{
    std::map<const char *, region>::iterator found = device_memory.find(static_cast<char *>(base));
    if (found == device_memory.end()) return;
    free(found->second.cells);
    free(found->second.written);
    device_memory.erase(found);
    latest = &shared_memory;
}

static char *copied(const void *at, size_t bytes)
{
    const char *first = static_cast<const char *>(at);
    region *r = region_at(first);
    if (r && lies_in(first + bytes - 1, r->base, r->bytes)) return r->written + (first - r->base);
    case_fail("race: a copy of %zu bytes that do not lie in device memory", bytes);
    return NULL;
}
void race_copy_in(const void *dst, size_t bytes)
{
    char *written = bytes ? copied(dst, bytes) : NULL;
    if (written) memset(written, 1, bytes);
}
void race_copy_out(const void *src, size_t bytes)
{
    const char *written = bytes ? copied(src, bytes) : NULL;
    if (written && memchr(written, 0, bytes))
        case_fail("race: a copy to the host of bytes that nobody has written");
}

void race_launch(size_t shared_bytes, const void *values, size_t value_bytes)
{
    if (!shared_memory.base) shared_memory = make_region(shim().shared, SHIM_SHARED_BYTES, true);
    shared_memory.bytes = shared_bytes;
    parameters = static_cast<const char *>(values);
    parameter_bytes = value_bytes;
    launch_began = ++stretch;
}
void race_block()
{
    block_began = ++stretch;
    memset(shared_memory.written, 0, SHIM_SHARED_BYTES);
    watching = true;
}
void race_block_end()
{
    watching = false;
}
void race_block_barrier()
{
    stretch++;
}
void race_warp_barrier()
{
    warp_stretch[shim().current]++;
}
race_as::race_as(race_kind kind)
{
    kind_now = kind;
}
race_as::~race_as()
{
    kind_now = RACE_READ;
}

/* ---- Told by the compiler ------------------------------------------------------------------- */
#define CALLER __builtin_return_address(0)
#define ACCESSES(bytes)                          \
    void __tsan_read##bytes(void *at)            \
    {                                            \
        touch(at, bytes, RACE_READ, CALLER);     \
    }                                            \
    void __tsan_write##bytes(void *at)           \
    {                                            \
        touch(at, bytes, RACE_WRITE, CALLER);    \
    }                                            \
    void __tsan_unaligned_read##bytes(void *at)  \
    {                                            \
        touch(at, bytes, RACE_READ, CALLER);     \
    }                                            \
    void __tsan_unaligned_write##bytes(void *at) \
    {                                            \
        touch(at, bytes, RACE_WRITE, CALLER);    \
    }
extern "C" {
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void *at, size_t bytes)
{
    touch(at, bytes, RACE_READ, CALLER);
}
void __tsan_write_range(void *at, size_t bytes)
{
    touch(at, bytes, RACE_WRITE, CALLER);
}
void __tsan_init()
{
}
void __tsan_func_entry(void *)
{
}
void __tsan_func_exit()
{
}
void __tsan_vptr_update(void *, void *)
{
}
void __tsan_vptr_read(void *)
{
}

/* Copies that the compiler leaves to the library: --wrap at the link leads them here. */
void *__real_memcpy(void *dst, const void *src, size_t bytes);
void *__real_memset(void *dst, int byte, size_t bytes);
void *__wrap_memcpy(void *dst, const void *src, size_t bytes);
void *__wrap_memset(void *dst, int byte, size_t bytes);
void *__wrap_memcpy(void *dst, const void *src, size_t bytes)
{
    if (bytes) touch(src, bytes, RACE_READ, CALLER);
    if (bytes) touch(dst, bytes, RACE_WRITE, CALLER);
    return __real_memcpy(dst, src, bytes);
}
void *__wrap_memset(void *dst, int byte, size_t bytes)
{
    if (bytes) touch(dst, bytes, RACE_WRITE, CALLER);
    return __real_memset(dst, byte, bytes);
}
}
