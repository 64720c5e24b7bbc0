#!/bin/sh
# Removes the barriers from a copy of rkv_cuda.cu, one at a time, and shows that the race detector
# notices each: make test-cuda-race MUTANTS=all      (some 4 minutes)
#     sh tests/cuda/race_mutants.sh [NAME...]        (from the top; CXX; without a name: all)
# FUNCTION.N is the Nth __syncthreads or __syncwarp of a function. A few other faults show that the
# detector's other checks work.
set -u
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' HUP INT TERM
passed=0 failed=0 known=
export RKV_RACE_STOP=1 # at the first report

build() {
    make --no-print-directory -s RACE_SOURCE="$dir/rkv_cuda.cu" RACE_DIR="$dir" \
        ${CXX:+CXX="$CXX"} "$dir/test_cuda" >"$dir/out" 2>&1
}
run() {
    timeout 300 "$dir/test_cuda" kernels >"$dir/out" 2>&1
}

# LINE FUNCTION.N of every barrier that is a statement.
barriers() {
    awk '/^[a-z].*rkvi_[a-z0-9_]+\(|^ +rkvi_[a-z0-9_]+\(const rkvi_args args\)$/ {
             match($0, /rkvi_[a-z0-9_]+\(/)
             name = substr($0, RSTART, RLENGTH - 1); n = 0 }
         /^ *(if \(.*\) )?__sync(threads|warp)\(\);/ { print FNR, name "." ++n }' rkv_cuda.cu
}

fault() { # name, sed expression
    known="$known $1"
    case " $wanted " in "  " | *" $1 "*) ;; *) return ;; esac
    sed "$2" rkv_cuda.cu >"$dir/rkv_cuda.cu"
    if cmp -s rkv_cuda.cu "$dir/rkv_cuda.cu"; then
        echo "FAIL  $1: nothing matches $2"
    elif ! build; then
        echo "FAIL  $1: does not compile"
        sed -n 1,5p "$dir/out"
    elif run; then
        echo "FAIL  $1: nothing notices"
    elif ! grep -q '^FAIL' "$dir/out"; then
        echo "FAIL  $1: no report, perhaps for want of time"
    else
        echo "ok    $1: $(sed -n '/^FAIL/ { s/^FAIL *//; p; q; }' "$dir/out")"
        passed=$((passed + 1))
        return
    fi
    failed=$((failed + 1))
}

wanted=$*
[ "$wanted" = all ] && wanted=
cp rkv_cuda.cu "$dir/rkv_cuda.cu"
if ! build || ! run; then
    echo "FAIL  rkv_cuda.cu as it is:"
    sed -n 1,5p "$dir/out"
    echo "0 passed, 1 failed, 0 skipped"
    exit 1
fi
barriers >"$dir/barriers"
while read -r line name; do
    fault "$name" "${line}s/__sync[a-z]*();/(void)0;/"
done <"$dir/barriers"

fault never-written 's/head.args.open_count\[entry.first_job + h\] = 0;//'
fault past-the-row '/^static __device__ void rkvi_load_tile/,/^}/s/width < bytes;/width <= bytes;/'
fault cached-and-written '/^static __device__ void rkvi_move_slice/,/^}/s/value\[u\] = \*\(reinterpret.*\);$/value[u] = __ldg(\1);/'
fault copy-not-waited-for '/^static __device__ __forceinline__ void rkvi_stage_end/,/^}/s/rkvi_copies_done();//'
fault shared-not-asked-for 's/RKVI_TILE_THREADS, sizeof(rkvi_tiles));/RKVI_TILE_THREADS, 64);/'

for name in $wanted; do
    case "$known " in *" $name "*) continue ;; esac
    echo "FAIL  $name: there is no such fault"
    failed=$((failed + 1))
done
echo "$passed passed, $failed failed, 0 skipped"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
