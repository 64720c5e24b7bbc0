// The same in C++: which rkv, and which code path.
// cmake -S examples/cmake -B build/consumer && cmake --build build/consumer
#define RKV_IMPLEMENTATION // in exactly one file of a program
#include <rkv.h>
#include <cstdio>

int main()
{
    const rkv_backend *backend = rkv_backend_find(nullptr);
    std::printf("rkv %d.%d.%d from C++: %s\n", RKV_VERSION_MAJOR, RKV_VERSION_MINOR,
                RKV_VERSION_PATCH, backend ? backend->name : "no code path");
    return backend ? 0 : 1;
}
