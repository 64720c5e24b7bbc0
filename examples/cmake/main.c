/* Which rkv a program was built with, and which code path it takes on this CPU.
 * cmake -S examples/cmake -B build/consumer && cmake --build build/consumer */
#define RKV_IMPLEMENTATION /* in exactly one file of a program */
#include <rkv.h>
#include <stdio.h>

int main(void)
{
    const rkv_backend *backend = rkv_backend_find(NULL);
    printf("rkv %d.%d.%d from C: %s\n", RKV_VERSION_MAJOR, RKV_VERSION_MINOR, RKV_VERSION_PATCH,
           backend ? backend->name : "no code path");
    return backend ? 0 : 1;
}
