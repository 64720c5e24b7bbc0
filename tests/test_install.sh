#!/bin/sh
# rkv as others build it: installed, with CMake in three ways, with pkg-config, and in OSS-Fuzz.
# make test-install      (a tool that is missing is named and skipped; CC, CXX)
set -u
cc=${CC:-cc}
cxx=${CXX:-c++}
make=${MAKE:-make}
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' HUP INT TERM
passed=0 failed=0 skipped=0
destdir=$dir/destdir prefix=/opt/rkv
root=$destdir$prefix
version=$(awk '/define RKV_VERSION_M|define RKV_VERSION_P/ { v = v s $3; s = "." }
    END { print v }' rkv.h)

have() {
    command -v "$1" >/dev/null 2>&1
}

check() { # what, command...
    what=$1
    shift
    if "$@" >"$dir/out" 2>&1; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAIL  install: $what"
        tail -n 30 "$dir/out" | sed 's/^/      | /'
    fi
}

refused() { # command...: fails
    ! "$@"
}

skip() { # what, why
    skipped=$((skipped + 1))
    echo "skip  $1: $2"
}

same() { # two files
    diff "$1" "$2"
}

has_line() { # text, command...: a line of what it prints is the text
    text=$1
    shift
    "$@" | tee "$dir/line"
    grep -qxF "$text" "$dir/line"
}

says() { # language, program: it runs, and is of this version
    "$2" >"$dir/line" && cat "$dir/line" && grep -qF "rkv $version from $1: " "$dir/line"
}

# ---- Install ------------------------------------------------------------------------------------

files='include/rkv.h include/rkv_cuda.cu share/cmake/rkv/rkvConfig.cmake
    share/cmake/rkv/rkvConfigVersion.cmake share/doc/rkv/CHANGELOG.md share/doc/rkv/LICENSE
    share/doc/rkv/README.md share/pkgconfig/rkv.pc'
for file in $files; do echo "$root/$file"; done >"$dir/wanted"
check 'make install' "$make" -s install DESTDIR="$destdir" PREFIX="$prefix"
find "$destdir" -type f | LC_ALL=C sort >"$dir/found"
check 'these files and no others' same "$dir/wanted" "$dir/found"

# ---- CMake --------------------------------------------------------------------------------------

consumer() { # build folder, options of CMake...
    build=$dir/$1
    shift
    # A folder without the rest of the repository, as a stranger has it.
    CC=$cc CXX=$cxx cmake -S "$dir/consumer" -B "$build" "$@" && cmake --build "$build"
}

builds() { # RKV_FROM, options of CMake...
    from=$1
    shift
    check "cmake, $from: configure and build" consumer "$from" -DRKV_FROM="$from" "$@"
    check "cmake, $from: the C program" says C "$dir/$from/consumer_c"
    check "cmake, $from: the C++ program" says C++ "$dir/$from/consumer_cc"
}

finds() { # version
    mkdir -p "$dir/find"
    printf '%s\n' 'cmake_minimum_required(VERSION 3.19)' 'project(find NONE)' \
        "find_package(rkv $1 REQUIRED)" >"$dir/find/CMakeLists.txt"
    cmake -S "$dir/find" -B "$dir/find/build" -DCMAKE_PREFIX_PATH="$root"
}

cuda_program() { # without a GPU it says RKV_ERROR_DEVICE, no more
    mkdir -p "$dir/cuda"
    cat >"$dir/cuda/CMakeLists.txt" <<'END'
cmake_minimum_required(VERSION 3.18)
project(cuda C CXX CUDA)
find_package(rkv 0.2 REQUIRED)
if(NOT EXISTS "${rkv_CUDA_SOURCE}")
    message(FATAL_ERROR "rkv_CUDA_SOURCE: ${rkv_CUDA_SOURCE}")
endif()
add_executable(cuda main.c)
target_link_libraries(cuda PRIVATE rkv::cuda)
END
    cat >"$dir/cuda/main.c" <<'END'
#define RKV_IMPLEMENTATION
#define RKV_CUDA
#include <rkv.h>
int main(void)
{
    const rkv_status status = rkv_cuda_register(NULL, NULL);
    return status != RKV_OK && status != RKV_ERROR_DEVICE;
}
END
    CC=$cc CXX=$cxx cmake -S "$dir/cuda" -B "$dir/cuda/build" -DCMAKE_PREFIX_PATH="$root" \
        -DCMAKE_CUDA_ARCHITECTURES=90 &&
        cmake --build "$dir/cuda/build" && "$dir/cuda/build/cuda"
}

if ! have cmake; then
    skip 'CMake package' 'no cmake'
elif ! have "$cxx"; then
    skip 'CMake package' 'no C++ compiler'
else
    cp -r examples/cmake "$dir/consumer"
    builds package -DCMAKE_PREFIX_PATH="$root"
    builds folder -DRKV_FOLDER="$PWD"
    builds fetch -DRKV_FOLDER="$PWD"
    for wanted in 0.2 "$version EXACT" 0.1...0.9; do
        check "cmake: finds $wanted" finds "$wanted"
    done
    for wanted in 0.0 0.1 0.3 0.2.99 1.0 "0.0...<$version" 0.3...0.9; do
        check "cmake: does not take $version for $wanted" refused finds "$wanted"
    done
    mv "$root" "$dir/moved"
    check 'cmake: the installed tree may be moved' \
        consumer moved-build -DRKV_FROM=package -DCMAKE_PREFIX_PATH="$dir/moved"
    mv "$dir/moved" "$root"
    if have nvcc; then
        check 'cmake: rkv::cuda' cuda_program
    else
        skip 'CMake target rkv::cuda' 'no nvcc'
    fi
fi

# ---- pkg-config ---------------------------------------------------------------------------------

compiled() { # compiler, source, program
    # shellcheck disable=SC2046 # flags are words
    "$1" $(pkg-config --cflags rkv) "$2" -o "$3" $(pkg-config --libs rkv)
}

if ! have pkg-config; then
    skip 'pkg-config file' 'no pkg-config'
else
    export PKG_CONFIG_PATH="$root/share/pkgconfig" PKG_CONFIG_SYSROOT_DIR="$destdir"
    check 'pkg-config: the version' has_line "$version" pkg-config --modversion rkv
    check 'pkg-config: the prefix' has_line "$prefix" env -u PKG_CONFIG_SYSROOT_DIR \
        pkg-config --variable=prefix rkv
    check 'pkg-config: a C program' compiled "$cc" examples/cmake/main.c "$dir/c"
    check 'pkg-config: it runs' says C "$dir/c"
    if have "$cxx"; then
        check 'pkg-config: a C++ program' compiled "$cxx" examples/cmake/main.cc "$dir/cc"
        check 'pkg-config: it runs' says C++ "$dir/cc"
    else
        skip 'pkg-config, C++' 'no C++ compiler'
    fi
fi

# ---- Uninstall ----------------------------------------------------------------------------------

check 'make uninstall' "$make" -s uninstall DESTDIR="$destdir" PREFIX="$prefix"
find "$destdir" -type f -o -path "*$prefix/*" -name '*rkv*' >"$dir/found"
check 'nothing is left' same /dev/null "$dir/found"

# ---- OSS-Fuzz -----------------------------------------------------------------------------------

# What its base image sets, with the sanitizer and the engine that clang brings.
oss_fuzz() {
    mkdir -p "$dir/fuzz/src" "$dir/fuzz/out" "$dir/fuzz/work" && ln -s "$PWD" "$dir/fuzz/src/rkv" &&
        SRC=$dir/fuzz/src OUT=$dir/fuzz/out WORK=$dir/fuzz/work CC=clang CXX=clang++ \
            CFLAGS='-O1 -gline-tables-only -fsanitize=address,fuzzer-no-link' \
            CXXFLAGS='-O1 -gline-tables-only -fsanitize=address,fuzzer-no-link' \
            LIB_FUZZING_ENGINE=-fsanitize=fuzzer bash -eu tests/oss-fuzz/build.sh
}

have_fuzzer() {
    echo 'int LLVMFuzzerTestOneInput(void); int LLVMFuzzerTestOneInput(void) { return 0; }' \
        >"$dir/probe.c"
    have clang && have clang++ && have bash &&
        clang -fsanitize=fuzzer,address "$dir/probe.c" -o "$dir/probe" 2>/dev/null
}

if have_fuzzer; then
    check 'OSS-Fuzz: build.sh' oss_fuzz
    for source in tests/fuzz_*.c; do
        name=$(basename "$source" .c)
        check "OSS-Fuzz: $name runs" "$dir/fuzz/out/$name" -runs=100 -max_len=512 -seed=1
    done
else
    skip 'OSS-Fuzz' 'no clang with libFuzzer'
fi

echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
