#!/bin/sh
# The programs of examples/ponder/: what they do with good input, and one clear line for bad input.
#     make test        or: sh tests/test_programs.sh build
# Takes the directory with demo, eval and train in it, and the emulator that they run in, if any:
# there a chain of thought takes minutes, and nothing is run.
set -u
build=$1
if [ $# -gt 1 ]; then
    echo "skip  programs: too slow in $2"
    echo '0 passed, 0 failed, 1 skipped'
    exit 0
fi
model=examples/ponder/models/ponder.gguf
passed=0 failed=0 skipped=0
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' HUP INT TERM

check() { # what, whether ("0": it holds)
    if [ "$2" -eq 0 ]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        printf 'FAIL  programs: %s\n' "$1"
        sed 's/^/      | /' "$dir/out" "$dir/err"
    fi
}

run() { # program, arguments...: its status, and output in $dir/out and $dir/err
    program=$1
    shift
    "$build/$program" "$@" >"$dir/out" 2>"$dir/err"
}

works() { # what, program, arguments...
    what=$1
    shift
    run "$@"
    check "$what" $?
}

# Refused: status 1 (not a signal, not a sanitizer's), one line that contains some text.
refuses() { # text, program, arguments...
    text=$1
    shift
    run "$@"
    status=$?
    [ $status -eq 1 ] && [ "$(wc -l <"$dir/err")" -eq 1 ] && grep -q -e "$text" "$dir/err"
    check "$*: refused with '$text', got status $status" $?
}

prints() { # text that the last output contains
    grep -q -e "$1" "$dir/out"
    check "the output has '$1'" $?
}

# ---- the demo ----
works 'demo --help' demo --help
works 'demo, one problem' demo --model $model --html "$dir/page.html" --problems 0
prints 'R-KV     answers ., right'
grep -q '</html>' "$dir/page.html"
check 'the page is whole' $?
works 'demo, a prompt of our own' demo --model $model --html "$dir/page.html" --problems 0 \
    --prompt 'A c 4 ; start a 5 ; C d #a ; D e 2 ; F b #d ? E f #c ; think'
prints 'R-KV     answers 9'
if [ -z "${RKV_TEST_CASES:-}" ]; then
    works 'demo, a problem under every policy' demo --model $model --html "$dir/page.html" \
        --problems 1 --seconds 600
    prints 'streaming .* 34 %'
    works 'train --check' train --check
else
    echo 'skip  programs: every policy, training: where RKV_TEST_CASES asks for few cases'
    skipped=1
fi
refuses 'unknown option' demo --nonsense 1
refuses 'out of range' demo --budget 200
refuses 'no such task' demo --task chess
refuses 'prompt is empty' demo --model $model --prompt ' '
refuses 'does not know the word' demo --model $model --prompt 'how are you'
refuses 'too long' demo --model $model --prompt "$(yes 'A c 4 ;' | head -n 300 | tr '\n' ' ')"
refuses 'cannot write' demo --model $model --problems 0 --html "$dir/nowhere/page.html"

# ---- files that are no models ----
size=$(wc -c <$model)
refuses missing.gguf demo --model "$dir/missing.gguf"
: >"$dir/empty.gguf"
refuses empty.gguf demo --model "$dir/empty.gguf"
refuses README.md demo --model README.md
for part in 3 100 2000 $((size / 2)) $((size - 1)); do
    head -c "$part" $model >"$dir/short.gguf"
    refuses short.gguf demo --model "$dir/short.gguf"
done
{ head -c 8 $model && printf '\377\377\377\377\377\377\377\177' && tail -c +17 $model; } >"$dir/many.gguf"
refuses many.gguf demo --model "$dir/many.gguf"
sed 's/llama/other/g' $model >"$dir/other.gguf"
refuses other.gguf demo --model "$dir/other.gguf"

# ---- the study: resumable, whatever it was interrupted in ----
methods='--method rkv --method h2o+prompt'
[ -n "${RKV_TEST_CASES:-}" ] && methods='--method h2o+prompt'
study() {
    # shellcheck disable=SC2086 # several words
    run eval --model $model --csv "$dir/study.csv" --svg "$dir/study.svg" --problems 1 --quick \
        $methods
}
study
check 'eval' $?
grep -q '</svg>' "$dir/study.svg"
check 'the picture is whole' $?
cp "$dir/study.csv" "$dir/whole.csv"
study
cut -d, -f1-20 "$dir/whole.csv" >"$dir/a" && cut -d, -f1-20 "$dir/study.csv" | cmp -s - "$dir/a"
check 'eval: nothing is run again' $?
head -c -20 "$dir/whole.csv" >"$dir/study.csv"
study
tail -n 1 "$dir/study.csv" | cut -d, -f1-20 >"$dir/a"
tail -n 1 "$dir/whole.csv" | cut -d, -f1-20 | cmp -s - "$dir/a"
check 'eval: a run that was cut off is run again' $?
refuses 'are needed' eval
refuses 'out of range' eval --problems 0
refuses 'no policy' eval --method lru
refuses 'not a table' eval --model $model --csv README.md --svg "$dir/a.svg"
refuses 'cannot write' eval --model $model --csv "$dir/a.csv" --svg "$dir/nowhere/a.svg"
refuses missing.gguf eval --model "$dir/missing.gguf" --csv "$dir/a.csv" --svg "$dir/a.svg"

# ---- the trainer ----
train() {
    run train --tokens 1 --finetune 1 --validate 1 --out "$dir/new.gguf" "$@"
}
if [ -z "${RKV_TEST_CASES:-}" ]; then
    train --checkpoint "$dir/1.ckpt" --threads 2
    check 'train' $?
    mv "$dir/new.gguf" "$dir/two.gguf"
    train --checkpoint "$dir/2.ckpt" --threads 1
    cmp -s "$dir/two.gguf" "$dir/new.gguf"
    check 'train: any number of threads gives the same weights' $?
    works 'the demo runs what the trainer wrote' demo --model "$dir/new.gguf" --problems 0 \
        --html "$dir/page.html"
    head -c 5000 "$dir/1.ckpt" >"$dir/2.ckpt"
    refuses damaged train --checkpoint "$dir/2.ckpt"
    refuses 'cannot write' train --checkpoint "$dir/1.ckpt" --validate 1 \
        --out "$dir/nowhere/new.gguf"
fi
refuses 'unknown option' train --nonsense 1
refuses 'no checkpoint' train --checkpoint "$dir/none.ckpt" --write-only
refuses 'cannot write' train --checkpoint "$dir/nowhere/1.ckpt"

echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
