#!/bin/sh
# rkv.h compiles without a warning in every language, compiler and configuration it promises.
# make test-std      (a compiler that is not installed is named and skipped)
set -u
out=${BUILD:-build}/std
mkdir -p "$out"
warnings='-Wall -Wextra -Wconversion -Wshadow -Werror'
variants='- -DRKV_STATIC -DRKV_NO_CACHE -DRKV_NO_AVX512 -DRKV_NO_AVX2 -DRKV_NO_AVX2,-DRKV_NO_AVX512,-DRKV_NO_NEON
          -DRKV_PTHREADS -DRKV_STATIC,-DRKV_NO_CACHE,-DRKV_PTHREADS'
passed=0 failed=0 skipped=0

printf '#define RKV_IMPLEMENTATION\n#include "rkv.h"\n' >"$out/whole.c"
printf '#include "rkv.h"\nint rkv_user;\n' >"$out/public.c"

# One command a line, to be run at the end, as many at a time as there are cores.
: >"$out/jobs"
compile() { # compiler, language, standard, source, flags
    echo "$1 -x $2 -std=$3 -pedantic $warnings -I. $5 $out/$4.c" >>"$out/jobs"
}

language() { # compiler, language, standard
    if ! command -v "$1" >/dev/null 2>&1; then
        skipped=$((skipped + 1))
        echo "skip  $1 -std=$3: not installed"
        return
    fi
    compile "$1" "$2" "$3" public -c
    compile "$1" "$2" "$3" whole '-O2 -c'
    for variant in $variants; do
        [ "$variant" = - ] && variant=
        compile "$1" "$2" "$3" whole "-O0 $(echo "$variant" | tr ',' ' ') -c"
    done
}

for standard in c99 c11; do
    for compiler in gcc clang musl-gcc aarch64-linux-gnu-gcc s390x-linux-gnu-gcc x86_64-w64-mingw32-gcc; do
        language "$compiler" c "$standard"
    done
done
for standard in c++11 c++17; do
    for compiler in g++ clang++ aarch64-linux-gnu-g++; do
        language "$compiler" c++ "$standard"
    done
done

# 32 bits, and a compiler without intrinsics.
if echo 'int main(void) { return 0; }' | gcc -m32 -x c - -o "$out/m32" 2>/dev/null; then
    compile 'gcc -m32' c c99 whole '-O2 -c'
    compile 'gcc -m32' c c99 whole '-O2 -msse2 -mfpmath=sse -c'
else
    skipped=$((skipped + 1))
    echo 'skip  gcc -m32: no C library of 32 bits'
fi
if command -v tcc >/dev/null 2>&1; then
    echo "tcc -Wall -Werror -I. -c $out/whole.c" >>"$out/jobs"
else
    skipped=$((skipped + 1))
    echo 'skip  tcc: not installed'
fi

# Flags that give up IEEE arithmetic are refused.
for compiler in gcc clang; do
    command -v "$compiler" >/dev/null 2>&1 || continue
    for flag in -ffast-math -ffinite-math-only; do
        if "$compiler" -std=c99 -I. "$flag" -c "$out/whole.c" -o "$out/whole.o" 2>/dev/null; then
            failed=$((failed + 1))
            echo "FAIL  $compiler $flag compiles"
        else
            passed=$((passed + 1))
        fi
    done
done

# What clang sees when it stands in for MSVC, over as much of a C library as the header calls. Only
# the syntax: nothing is linked.
windows="$out/windows"
mkdir -p "$windows"
for name in fenv math stdlib string; do
    { echo '#include <stddef.h>'; echo '#ifdef __cplusplus'; echo 'extern "C" {'; echo '#endif'
      case $name in
      fenv) echo 'typedef struct fenv { int control, status; } fenv_t;'
          echo 'extern const fenv_t rkv_default_env;'
          echo '#define FE_DFL_ENV (&rkv_default_env)'
          echo 'int fegetenv(fenv_t *), fesetenv(const fenv_t *);' ;;
      math) echo 'float sqrtf(float), fabsf(float), fmaf(float, float, float);'
          echo 'double pow(double, double);' ;;
      stdlib) echo 'void *malloc(size_t), free(void *);' ;;
      string) echo 'void *memcpy(void *, const void *, size_t), *memset(void *, int, size_t),'
              echo '    *memmove(void *, const void *, size_t);'
              echo 'int memcmp(const void *, const void *, size_t);'
              echo 'int strcmp(const char *, const char *);' ;;
      esac
      echo '#ifdef __cplusplus'; echo '}'; echo '#endif'; } >"$windows/$name.h"
done
echo 'typedef int jmp_buf[64];' >"$windows/setjmp.h"
if command -v clang >/dev/null 2>&1; then
    for target in x86_64 aarch64; do
        for variant in - -DRKV_NO_AVX2 -DRKV_NO_AVX512 -DRKV_NO_AVX2,-DRKV_NO_AVX512; do
            [ "$variant" = - ] && variant=
            for language in c,c99 c++,c++17; do
                compile clang "${language%,*}" "${language#*,}" whole "-fsyntax-only \
                    --target=$target-pc-windows-msvc -fms-compatibility -fms-extensions \
                    -D__MM_MALLOC_H -isystem $windows $(echo "$variant" | tr ',' ' ')"
            done
        done
    done
else
    skipped=$((skipped + 1))
    echo 'skip  clang in the place of MSVC: not installed'
fi

# shellcheck disable=SC2016 # for the inner shell
xargs -P "$(nproc 2>/dev/null || echo 1)" -I '{}' sh -c '
    object=$(mktemp) || exit 1
    {} -o "$object" || echo "FAIL  {}"
    rm -f "$object"' <"$out/jobs" >"$out/log" 2>&1
cat "$out/log"
wrong=$(grep -c '^FAIL' "$out/log")
failed=$((failed + wrong)) passed=$((passed + $(wc -l <"$out/jobs") - wrong))
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
