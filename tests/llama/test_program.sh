#!/bin/sh
# rkv-llama: what it does with good input, and one clear line for bad input, on a tiny random model.
#     make test-llama      or: sh tests/llama/test_program.sh build/rkv-llama build/tests/bytes.gguf
# Takes the program and the model that tiny_model writes.
set -u
program=$1
model=$2
passed=0 failed=0
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' HUP INT TERM

check() { # what, whether ("0": it holds)
    if [ "$2" -eq 0 ]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        printf 'FAIL  rkv-llama: %s\n' "$1"
        sed 's/^/      | /' "$dir/out" "$dir/err" | head -n 40
    fi
}

works() { # what, arguments...
    what=$1
    shift
    "$program" "$@" >"$dir/out" 2>"$dir/err"
    check "$what" $?
}

# Refused: status 1 (not a signal, not a sanitizer's), one line that contains some text.
refuses() { # text, arguments...
    text=$1
    shift
    "$program" "$@" >"$dir/out" 2>"$dir/err"
    status=$?
    [ $status -eq 1 ] && [ "$(wc -l <"$dir/err")" -eq 1 ] && grep -q -e "$text" "$dir/err"
    check "$*: refused with '$text', got status $status" $?
}

says() { # file, text
    grep -q -e "$2" "$1"
    check "$(basename "$1") has '$2'" $?
}

# ---- bad input ----
refuses 'a command is needed'
refuses 'no command walk' walk
refuses '-m MODEL.gguf is needed' run -p x
refuses '-p TEXT is needed' run -m "$model"
refuses '--text FILE is needed' eval -m "$model"
refuses 'no option --frob' run -m "$model" --frob 1
refuses 'run has no option --text' run -m "$model" --text x
refuses '--budget needs a value' run -m "$model" -p x --budget
refuses 'not a whole number' run -m "$model" -p x --budget ten
refuses 'out of range' run -m "$model" -p x --budget 0
refuses 'at most 1 number' run -m "$model" -p x --budget 64,128
refuses 'not a number' run -m "$model" -p x --temp warm
refuses 'no policy best' run -m "$model" -p x --policy best
refuses 'no policy best' eval -m "$model" --text README.md --policy h2o,best
refuses 'on, off or both' eval -m "$model" --text README.md --pins maybe
refuses 'no type f17' run -m "$model" -p x --kv f17
refuses 'on or off' run -m "$model" -p x --flash maybe
refuses 'cannot read' run -m "$dir/none.gguf" -p x
refuses 'the prompt is empty' run -m "$model" -p '' --raw
refuses 'budget: must hold' run -m "$model" -p x --budget 4
refuses 'the start alone' compare -m "$model" --tokens 32
refuses 'go together' compare -m "$model" --from 32
refuses 'cannot write' compare -m "$model" --csv "$dir/none/x.csv"
refuses 'are not more than' eval -m "$model" --text "$program" --tokens 256
refuses 'not a text' eval -m "$model" --text "$program" --facts 1
refuses 'no tokeniser' run -m examples/ponder/models/ponder.gguf -p x
head -c 3000 "$model" >"$dir/cut.gguf"
refuses 'cannot load' run -m "$dir/cut.gguf" -p x
echo 'not a model' >"$dir/text.gguf"
refuses 'cannot load' run -m "$dir/text.gguf" -p x
echo 'too short' >"$dir/short.txt"
refuses 'too short' eval -m "$model" --text "$dir/short.txt" --facts 1

# ---- run: far beyond the cells, in bounded memory ----
works '--help' --help
works 'run' run -m "$model" -p hello -n 500 --ignore-end --budget 64 --buffer 32
says "$dir/err" 'rounds; KV'
cells=$(sed -n 's/.*; \([0-9]*\) kept in.*/\1/p' "$dir/err" | tail -n 1)
[ "${cells:-1000}" -le 96 ]
check "run holds at most 96 tokens, got ${cells:-none}" $?
cp "$dir/out" "$dir/first"
works 'run, again' run -m "$model" -p hello -n 500 --ignore-end --budget 64 --buffer 32
cmp -s "$dir/out" "$dir/first"
check 'run: the same seed, the same text' $?
for policy in rkv-pool1 paper wide snapkv memory_traces memory_prose memory_wide h2o \
    triattention streaming random full; do
    works "run, $policy" run -m "$model" -p hello -n 200 --ignore-end --temp 0 --budget 64 \
        --buffer 32 --policy $policy --no-pin
done
works 'run, bf16 keys' run -m "$model" -p hello -n 200 --ignore-end --budget 64 --buffer 32 \
    --kv bf16
works 'run, without flash attention' run -m "$model" -p hello -n 200 --ignore-end --budget 64 \
    --buffer 32 --flash off

# ---- compare ----
works 'compare' compare -m "$model" --tokens 400 --every 100 --budget 64 --buffer 32 \
    --csv "$dir/c.csv" --svg "$dir/c"
says "$dir/out" '^| 3[0-9][0-9] |'
says "$dir/c.csv" '^position,full_seconds'
says "$dir/c-speed.svg" '</svg>'
says "$dir/c-memory.svg" '</svg>'

works 'compare, behind a text' compare -m "$model" --text README.md --from 300 --tokens 400 \
    --every 50 --budget 64 --buffer 32
says "$dir/out" '^| 3[0-9][0-9] |'

works 'compare, the callback alone' compare -m "$model" --tokens 200 --every 100 --policy full
says "$dir/out" 'nothing evicted'
same=$(sed -n 's/.*| \([0-9]*\) |$/\1/p' "$dir/out" | sort -u)
[ "$same" = 100 ]
check "the callback changes no token, got '$same'" $?

# ---- eval ----
cat README.md README.md README.md >"$dir/text.txt"
works 'eval' eval -m "$model" --text "$dir/text.txt" --documents 2 --tokens 300 --facts 1 \
    --budget 96,64 --buffer 32 -j 2 --csv "$dir/e.csv" --svg "$dir/e"
says "$dir/out" '^| StreamingLLM | pinned |'
says "$dir/out" 'Budget 96'
[ "$(wc -l <"$dir/e.csv")" -eq 337 ]
check 'eval: 2 budgets, 24 runs, 7 measures' $?
works 'eval, one policy' eval -m "$model" --text "$dir/text.txt" --documents 2 --tokens 300 \
    --facts 1 --budget 64 --buffer 32 --policy h2o,random --pins on --csv "$dir/e1.csv"
[ "$(wc -l <"$dir/e1.csv")" -eq 22 ]
check 'eval: 3 runs, 7 measures' $?
says "$dir/e-loss.svg" '</svg>'
says "$dir/e-recall.svg" '</svg>'

echo "$passed passed, $failed failed, 0 skipped"
[ "$failed" -eq 0 ]
