#!/bin/sh
# Puts faults into a copy of rkv.h, one at a time, and shows that the tests notice each of them:
#     sh tests/test_mutants.sh [NAME...]     (from the top; CC, RUNNER; a few minutes)
# A fault is a name, the machine it shows on ("any", or a code path), and sed expressions. One that
# changes nothing is a failure too: the header has moved on and the fault must follow.
set -u
cc=${CC:-cc}
runner=${RUNNER:-}
flags='-std=c99 -O2 -I. -Itests -DRKV_PTHREADS'
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' HUP INT TERM
passed=0 failed=0 skipped=0 known=
programs='test_random test_types test_properties test_errors test_golden test_api test_cache
    test_policies'
export RKV_TEST_CASES="${RKV_TEST_CASES:-400}"

# Builds the test programs around the header in $1; returns whether that worked.
link_tests() {
    # shellcheck disable=SC2086 # flags are words
    $cc -I"$1" $flags -c tests/rkv_impl.c -o "$dir/impl.o" || return 1
    for program in $programs; do
        # shellcheck disable=SC2086
        $cc $flags "$dir/$program.o" "$dir/harness.o" "$dir/oracle.o" \
            "$dir/oracle_policies.o" "$dir/golden_file.o" "$dir/golden_policy.o" "$dir/impl.o" \
            -o "$dir/$program" -lm -pthread || return 1
    done
}

# Runs them until one fails; prints its name. A hanging or crashing one has noticed as well.
first_failure() {
    for program in $programs; do
        # shellcheck disable=SC2086 # RUNNER is words: an emulator and its options
        timeout 300 $runner "$dir/$program" >"$dir/out" 2>&1 || { echo "$program"; return; }
    done
}

fault() { # name, code path, sed expression...
    name=$1 path=$2
    shift 2
    known="$known $name"
    case " $wanted " in "  " | *" $name "*) ;; *) return ;; esac
    if [ "$path" != any ] && ! grep -q "^$path$" "$dir/usable"; then
        echo "skip  $name: $path is not usable here"
        skipped=$((skipped + 1))
        return
    fi
    cp "$dir/original/rkv.h" "$dir/mutant/rkv.h"
    for expression in "$@"; do
        cp "$dir/mutant/rkv.h" "$dir/before"
        sed "$expression" "$dir/before" >"$dir/mutant/rkv.h"
        if cmp -s "$dir/before" "$dir/mutant/rkv.h"; then
            echo "FAIL  $name: nothing matches $expression"
            failed=$((failed + 1))
            return
        fi
    done
    if ! link_tests "$dir/mutant" 2>"$dir/errors"; then
        echo "FAIL  $name: does not compile"
        sed -n 1,5p "$dir/errors"
        failed=$((failed + 1))
        return
    fi
    noticed=$(first_failure)
    if [ -n "$noticed" ]; then
        echo "ok    $name: $noticed"
        passed=$((passed + 1))
    else
        echo "FAIL  $name: no test notices"
        failed=$((failed + 1))
    fi
}

wanted=$*
mkdir "$dir/mutant" "$dir/original"
cp rkv.h "$dir/original/rkv.h"
for source in harness oracle oracle_policies golden_file golden_policy $programs; do
    # shellcheck disable=SC2086
    $cc $flags -c "tests/$source.c" -o "$dir/$source.o" || exit 1
done
link_tests "$dir/original" || exit 1
# shellcheck disable=SC2086
$runner "$dir/test_api" | sed -n 's/^skip  \([a-z0-9]*\): not usable.*/\1/p' >"$dir/unusable"
printf 'avx512\navx2\nneon\nscalar\n' | grep -vxF -f "$dir/unusable" >"$dir/usable"
noticed=$(first_failure)
if [ -n "$noticed" ]; then
    echo "FAIL  the header as it is: $noticed"
    grep FAIL "$dir/out" | sed -n 1,5p
    echo "0 passed, 1 failed, 0 skipped"
    exit 1
fi

# ---- kernels: first those that give other bits, then those that give other numbers ---------------
fault scalar-lanes any '/^static float rkvi_dot_scalar/,/^}/s/lanes\[l\]/lanes[l % 8]/g'
# Not "any": AArch64 has the instruction and does not compile this.
fault scalar-fma avx2 '/^RKVI_INLINE float rkvi_fma/,/^}/s/inexact = lost .*/inexact = 0;/'
fault scalar-at-threshold any \
    '/^static void rkvi_cosines_scalar/,/^}/s/x\[v\] > c->threshold/x[v] >= c->threshold/'
fault avx2-reduction avx2 \
    '/rkvi_reduce8_avx2(__m256 sums_x8)/,/^}/s/_mm_movehl_ps(x4, x4)/_mm_shuffle_ps(x4, x4, 0xb1)/' \
    '/rkvi_reduce8_avx2(__m256 sums_x8)/,/^}/s/_mm_shuffle_ps(x2, x2, 1)/_mm_movehl_ps(x2, x2)/'
fault avx2-unfused avx2 \
    '/^RKVI_TARGET_AVX2 RKVI_INLINE void rkvi_lanes_avx2/,/^}/s/_mm256_fmadd_ps(\(.*\), row_x8, half_x8\[v\]\[h\])/_mm256_add_ps(_mm256_mul_ps(\1, row_x8), half_x8[v][h])/'
fault avx2-exp avx2 '/rkvi_exp_avx2(__m256 x_x8)/,/^}/s/RKVI_EXP_C4/RKVI_EXP_C5/'
fault avx2-rows avx2 '/^RKVI_INLINE rkvi_dot_tile rkvi_tile_rows_from/,/^}/s/rest.rows += .*//'
fault avx512-reduction avx512 '/rkvi_reduce_four_avx512/,/^}/s/sum, sum, 0xb1/sum, sum, 0x4e/'
fault avx512-columns avx512 \
    '/^RKVI_TARGET_AVX512 static void rkvi_add_rows_avx512/,/^}/s/i < n; i += 16/i + 16 < n; i += 16/'
fault neon-reduction neon '/rkvi_reduce.*_neon/,/^}/s/vaddq_f32/vmaxq_f32/'
fault f16-subnormal any 's/(float)magnitude \* (1.0f \/ 16777216.0f)/0.0f/'
fault bf16-shift any '/^static void rkvi_load_bf16_scalar/,/^}/s/half << 16/(half \& 0xfffeu) << 16/'
fault e4m3-nan any \
    '/^static float rkvi_float_from_f8_e4m3/,/^}/s/if (magnitude == 0x7fu)/if (magnitude == 0x80u)/'
fault e4m3-subnormal any \
    '/^static float rkvi_float_from_f8_e4m3/,/^}/s/return rkvi_float_from_f16((uint16_t)(sign | magnitude << 7))/return rkvi_float_from_f16((uint16_t)(sign | (magnitude < 8 ? 0 : magnitude) << 7))/'
fault q8-sign any '/^static void rkvi_load_q8_0_scalar/,/^}/s/int8_t number/uint8_t number/'
fault q8-stride any '/^static rkvi_view rkvi_view_in_elements/,/^}/s/token_stride \/ dims/token_stride/'
fault avx2-e4m3-nan avx2 '/rkvi_load_f8_e4m3_avx2/,/^}/s/if (nans) i = 0;//'
fault avx2-e4m3-sign avx2 '/rkvi_load_f8_e4m3_avx2/,/^}/s/_mm256_cvtepi8_epi16/_mm256_cvtepu8_epi16/'
fault avx2-e5m2-halves avx2 \
    '/rkvi_load_f8_e5m2_avx2/,/^}/s/extracti128_si256(half_x16, 1)/extracti128_si256(half_x16, 0)/'
fault avx2-q8-sign avx2 '/rkvi_load_q8_0_avx2/,/^}/s/_mm256_cvtepi8_epi32/_mm256_cvtepu8_epi32/'
fault avx512-e4m3-nan avx512 '/rkvi_load_f8_e4m3_avx512/,/^}/s/if (nans) i = 0;//'
fault avx512-e5m2-shift avx512 '/rkvi_load_f8_e5m2_avx512/,/^}/s/cvtepu8_epi16(code_x16), 8/cvtepu8_epi16(code_x16), 7/'
fault avx512-q8-sign avx512 '/rkvi_load_q8_0_avx512/,/^}/s/_mm512_cvtepi8_epi32/_mm512_cvtepu8_epi32/'
fault neon-e4m3-nan neon '/rkvi_load_f8_e4m3_neon/,/^}/s/if (vmaxv_u8(most_x8) == 0x7f) i = 0;//'
fault neon-q8-halves neon '/rkvi_load_q8_0_neon/,/^}/s/vget_high_s16/vget_low_s16/'
fault loader-padding any '/^static void rkvi_load_opaque/,/^}/s/for (r = given - 1; r >= 0/for (r = 0; r > 0/'
fault loader-again any 's/if (s->missing >= 0) \/\* given/if (0) \/* given/'
fault loader-spacing any '/^static int rkvi_even_rows/,/^}/s/rkvi_row(view, head, token + run) == row/row == row/'
fault exp-ln2 any 's/^#define RKVI_LN2_LOW .*/#define RKVI_LN2_LOW 0.0f/'
fault dot-tail any '/^static void rkvi_load_key/,/^}/s/size_t dim = token < 0 ? 0 : (size_t)h->keys->dim/size_t dim = token < 0 ? 0 : (size_t)(h->keys->dim \& ~1)/'

# ---- importance ------------------------------------------------------------------------------------
fault pool-left any '/^static int rkvi_pool_before/,/^}/s/config->pool \/ 2/(config->pool - 1) \/ 2/'
fault pool-right any '/^static int rkvi_pool_after/,/^}/s/(config->pool - 1) \/ 2/config->pool \/ 2/'
fault pool-order any 's/pool_first = h->config->variant == RKV_PAPER/pool_first = 0/'
fault group-folded any \
    '/^static void rkvi_chunk_logits/,/^}/s/fold_group(s->tile, tile_stride, group,/fold_group(s->tile, tile_stride, 1,/'
fault softcap-ratio any 's/h->scale \/ h->softcap, h->softcap/h->scale, h->softcap/'
fault softmax-maximum any 's/exp_sum(x, padded, max) :/exp_sum(x, padded, 0.0f) :/'

# ---- redundancy ------------------------------------------------------------------------------------
fault span any 's/h.n_span = config->variant == RKV_PUBLISHED/h.n_span = config->variant == RKV_PAPER/'
fault norm-epsilon any 's/^#define RKVI_NORM_EPSILON .*/#define RKVI_NORM_EPSILON 1e-30f/'
fault column0-dropped any '/^static void rkvi_redundancy/,/^}/s/if (h->config->variant == RKV_PUBLISHED)/if (0)/'
fault column0-in-the-paper any '/^static void rkvi_redundancy/,/^}/s/if (h->config->variant == RKV_PUBLISHED)/if (1)/'
fault column0-some-found any 's/s->wanted\[i\] == recent) \/\* found none/s->wanted[i] > 0) \/* found none/'
fault diagonal any 's/(double)s->column\[i\] - (double)s->self\[i\] - exempt/(double)s->column[i] - exempt/'
fault diagonal-exempt any '/^RKVI_INLINE void rkvi_record_match/,/^}/s/if (i != j) //' \
    '/^RKVI_INLINE void rkvi_record_match/,/^}/s/ || (i == j && h->config->threshold >= 0)//'
fault diagonal-of-the-newest any \
    '/^static uint64_t rkvi_search_column/,/^}/s/if (threshold >= 0 \&\& j - first/if (0 \&\& j - first/'
fault recent-ignored any '/^RKVI_INLINE void rkvi_record_match/,/^}/s/s->wanted\[i\]--;/s->wanted[i] = 0;/'
fault recent-uncounted any '/^RKVI_INLINE void rkvi_record_match/,/^}/s/s->wanted\[i\] <= 0 || //' \
    '/^static void rkvi_search_dots/,/^}/s/left \&\& s->wanted\[token\] > 0;/left;/'
fault own-means any 's/== RKV_PAPER ? i : j/== RKV_PAPER ? j : j/'
fault oldest-first any \
    '/^static void rkvi_search_dots/,/^}/s/v = rkvi_top_bit(left);/v = rkvi_top_bit(left \& (~left + 1));/'
fault pairs-one-sided any \
    '/^static void rkvi_search_older/,/^}/s/RKVI_ROWS_SEARCH | RKVI_PACKED_SEARCH/RKVI_ROWS_SEARCH/'
fault rows-order any \
    '/^static void rkvi_search_dots/,/^}/s/for (r = rows->n - 1; r >= 0; r--)/for (r = 0; r < rows->n; r++)/'
fault packed-unused any '/^static void rkvi_search_dots/,/^}/s/above\[r\] \&= in_use;//'
fault waiting-packed any \
    '/^static void rkvi_pack_waiting/,/^}/s/if (n_same == n \&\&/if (packed->n >= n \&\&/'
fault waiting-again any \
    '/^static void rkvi_search_older/,/^}/s/inside, n_inside, end)/inside, n_inside, columns->token[0])/'
fault waiting-lost any \
    '/^static void rkvi_search_all/,/^}/s/if (end > 0) rkvi_wait(.*//'
fault second-newest any \
    '/^static void rkvi_meet_newest/,/^}/s/if (v < newest->n - 1)/if (0)/'
fault newest-in-the-queries-places any \
    '/^static void rkvi_meet_spare/,/^}/s/s->tile + h->n_queries/s->tile/'
fault first-unsearched any '/^static void rkvi_search_first/,/^}/s/j = end - 1; j >= 0/j = -1; j >= 0/'
fault open-anyway any '/^static uint64_t rkvi_search_column/,/^}/s/left = open \& /left = /'
fault narrow-lost any '/^static void rkvi_find_similar_keys/,/^}/s/end = first;/end = first - 1;/'
fault interleaved any '/^static void rkvi_pack(/,/^}/s/if (v + RKVI_INTERLEAVED <= end)/if (v + RKVI_INTERLEAVED < end + 8)/'
fault decided-anyway any '/^static float rkvi_rounding_band/,/^}/s/return 2.0f/return 0.0f/'

# ---- selection, compaction, sharing --------------------------------------------------------------------
fault tie-to-the-older any \
    '/^static void rkvi_choose/,/^}/s/for (i = end - 1; at > first; i--)/for (i = at = first; at < first + n_keep; i++)/' \
    '/^static void rkvi_choose/,/^}/s/kept\[at - 1\] = i;/kept[at] = i;/' \
    '/^static void rkvi_choose/,/^}/s/at -= s->ranks/at += s->ranks/'
fault protect-ignored any '/^static int rkvi_tail_of/,/^}/s/return c->protect > window ? c->protect : window/return window/'
fault protect-unscored any 's/h.n_candidates = plan->n_tokens - config->window/h.n_candidates = plan->n_tokens - config->protect/'
fault pins-ignored any '/^static void rkvi_choose/,/^}/s/pins \&\& pins\[i\] ? RKVI_PINNED_RANK : //'
fault pins-as-zero any 's/^#define RKVI_PINNED_RANK .*/#define RKVI_PINNED_RANK 0x80000000u/'
fault pins-unmoved any '/^static void rkvi_compact_item/,/^}/s/if (layer->pins)/if (0)/'
fault pins-of-one-set any '/^static const uint8_t \*rkvi_pins_of/,/^}/s/(size_t)set \*/0 */'
fault pinned-unpinned any '/^static void rkvi_choose/,/^}/s/first = config->pinned, end/first = 0 * config->pinned, end/'
fault run-length any '/^static int rkvi_run_length/,/^}/s/kept\[from + n\] == kept\[from\] + n/kept[from + n] <= kept[from] + n + 1/'
fault compact-adjacent any '/^static void rkvi_move_rows/,/^}/s/(size_t)n \* pieces.bytes/pieces.bytes/'
fault compact-apart any '/^static void rkvi_move_rows/,/^}/s/kept\[dst + i\]/kept[dst]/'
fault compact-pinned any '/^static void rkvi_move_rows/,/^}/s/dst = pinned; dst/dst = pinned + 1; dst/'
fault transposed any '/^static void rkvi_move_rows/,/^}/s/piece < pieces.n/piece < 1/'
fault positions-of-one-head any 's/index >= plan->sets) return;/index >= 1) return;/'
fault shared-mean any 's/const float share = 1.0f \/ (float)from->kv_heads/const float share = 1.0f/'
fault shared-one-layer any 's/job->plans\[member\].owner == l; member++/member == l; member++/'

# ---- checks ----------------------------------------------------------------------------------------
fault nonfinite-keys any '/^static rkv_status rkvi_chunk_norms/,/^}/s/if (!(square\[r\] <= RKVI_MAX_SQUARE))/if (0)/'
fault nonfinite-queries any '/^static rkv_status rkvi_pack_queries/,/^}/s/if (!(square\[r\] <= RKVI_MAX_SQUARE))/if (0)/'
fault list-twice any '/^static const char \*rkvi_list_rule/,/^}/s/kept\[i\] <= kept\[i - 1\]/kept[i] < kept[i - 1]/'
fault list-without-pins any '/^static const char \*rkvi_list_rule/,/^}/s/else if (pins\[row\])/else if (0)/'
fault pins-unchecked any '/^static rkv_status rkvi_check_pins/,/^}/s/if (n_pins > most)/if (0)/'
fault pins-miscounted any '/^static rkv_status rkvi_check_pins/,/^}/s/most = n_keep > 0 ? n_keep - 1 : 0/most = n_keep/'
fault pins-refused any '/^static rkv_status rkvi_check_pins/,/^}/s/if (n_pins > most)/if (n_pins >= most)/'
fault record-uncleared any '/^static void rkvi_clear_error/,/^}/s/if (config->error)/if (0)/'
fault record-token any '/^static rkv_status rkvi_chunk_norms/,/^}/s/h->index, first + r)/h->index, r)/'
fault record-of-a-later-layer any '/^static rkv_status rkvi_first_error/,/^}/s/error.layer < first->error.layer/error.layer > first->error.layer/'
fault stuck-image any '/^static const char \*rkvi_image_layer_rule/,/^}/s/if (rkvi_cache_missing/if (0 \&\& rkvi_cache_missing/'
fault votes-of-the-evicted any '/^static int rkvi_cache_missing/,/^}/s/rkvi_min(n_queries, n_whole)/n_queries + 0 * n_whole/'
fault block-twice any '/^static int rkvi_bad_block/,/^}/s/if (set\[slot\] == block) return row;//'
fault hull-one-way any '/^static void rkvi_widen/,/^}/s/ || by->begin < begin//'
fault grids-one-sided any 's/if (rkvi_grids_overlap(a, b)) return 1;/(void)0;/'
fault neighbours any 's/^#define RKVI_NEIGHBOURS 64/#define RKVI_NEIGHBOURS 63/'
fault workspace-short any 's/\*bytes = arena.used + RKVI_ALIGN;/*bytes = arena.used - 2 * RKVI_ALIGN;/' \
    's/if (call->bytes < needed)/if (0)/'
fault workspace-unchecked any 's/if (call->bytes < needed)/if (0)/'

# ---- policies: one program looks at them all -------------------------------------------------------
programs=test_policies
fault memory-decay any '/^static rkv_status rkvi_score_memory/,/^}/s/rkvi_power(h->config->decay, h->layer->n_new)/h->config->decay/'
fault memory-own-vote any '/^static rkv_status rkvi_remember/,/^}/s/row\[seen - 1\] = 0;//'
fault memory-future any '/^static int rkvi_seen/,/^}/s/h->n_tokens - h->votes + v + 1/h->n_tokens/'
fault memory-own-copy any '/^static void rkvi_block_best/,/^}/s/column + v <= first + r/column + v < first + r/'
fault memory-earlier-copy any '/^static void rkvi_block_best/,/^}/s/width \&\& column + v <= first + r/width \&\& column + v == first + r/'
fault memory-old-pairs any '/^static rkv_status rkvi_pack_new_keys/,/^}/s/first + r < rkvi_first_new(h) ? 0 :/0 ? 0 :/'
fault memory-stale-state any '/^static rkv_status rkvi_carry/,/^}/s/i, n = rkvi_first_new(h)/i, n = h->n_tokens/'
fault memory-turned any '/^static rkvi_rows rkvi_unrotated/,/^}/s/r < n \&\& h->plan->turns.n_pairs/0/'
fault memory-rank-ties any '/^static void rkvi_rank_candidates/,/^}/s/signal\[order\[rank\]\] = (float)rank;/signal[order[rank]] = (float)(rank \&\& x[order[rank]] == x[order[rank - 1]] ? (int)signal[order[rank - 1]] : rank);/'
fault memory-mix-ties any '/^static rkv_status rkvi_score_memory/,/^}/s/ranked ? lambda : lambda \* share/lambda * share/' \
    '/^static rkv_status rkvi_score_memory/,/^}/s/-(1.0f - lambda);/-(1.0f - lambda) * (ranked ? share : 1.0f);/' \
    '/^static rkv_status rkvi_score_memory/,/^}/s/h->scores\[i\] \*= share;/(void)0;/'
fault rotation-sign any '/^static void rkvi_unrotate_from/,/^}/s/rkvi_fma(x, cosine, y \* sine)/rkvi_fma(x, cosine, -(y * sine))/' \
    '/^static void rkvi_unrotate_from/,/^}/s/rkvi_fma(y, cosine, -(x \* sine))/rkvi_fma(y, cosine, x * sine)/'
fault rotation-pairs any '/^static size_t rkvi_pair_at/,/^}/s/turns->adjacent ? 2 : 1/1 ? 1 : 2/' \
    '/^static size_t rkvi_pair_at/,/^}/s/turns->adjacent ? 1 : /0 ? 1 : /'
fault rotation-table any '/^static int rkvi_fill_turns/,/^}/s/rope->frequencies ? rope->frequencies\[f\] : //'
fault rotation-low-bits any '/^static uint32_t rkvi_angle/,/^}/s/ + (uint32_t)((uint64_t)position \* turns->low\[f\] >> 32)//'
fault avx2-rotation avx2 '/^RKVI_TARGET_AVX2 static void rkvi_unrotate_avx2/,/^}/s/_mm256_fmsub_ps(b_x8/_mm256_fmadd_ps(b_x8/'
fault avx512-rotation avx512 '/^RKVI_TARGET_AVX512 static void rkvi_unrotate_avx512/,/^}/s/_mm512_set1_epi32(8)/_mm512_set1_epi32(7)/'
fault sine-series any 's/^#define RKVI_SIN_C0 .*/#define RKVI_SIN_C0 0.0f/'
fault ring-offset any '/^static int rkvi_query_slot/,/^}/s/(int64_t)h->layer->first_query + /(int64_t)0 + /'
fault ring-newest any 's/rkvi_has_state(config) ? rkvi_min(config->votes, h.layer->n_new) : config->votes/config->votes/'
fault h2o-largest any '/^static rkv_status rkvi_remember/,/^}/s/h->config->policy == RKV_POLICY_H2O/0/'
fault z-score any '/^static void rkvi_max_z_score/,/^}/s/x, n, 1) \/ n;/x, n, 1) \/ (n - 1);/'
fault offsets any 's/^#define RKVI_OFFSETS 10/#define RKVI_OFFSETS 9/'
fault expected-length any '/^static void rkvi_expected_query/,/^}/s/weights\[f\] = lengths\[f\] - weights\[f\]/weights[f] = lengths[f]/'
fault means-sinks any 's/^#define RKVI_SKIPPED 4/#define RKVI_SKIPPED 3/'
fault random-layer any '/^static float rkvi_hash/,/^}/s/layer << 40/layer << 32/'
fault mean-pool-clipped any '/^static void rkvi_mean_pool/,/^}/s/(float)h->config->pool/(float)width/'
fault bias-unmoved any '/^static void rkvi_compact_item/,/^}/s/if (layer->bias)/if (0)/'
fault state-plane any '/^static void rkvi_compact_item/,/^}/s/plane < plan->n_floats/plane < 1/'
fault state-early any '/^static rkv_status rkvi_run_score/,/^}/s/rkvi_run(job, rkvi_score_item, RKVI_HEADS);/rkvi_run(job, rkvi_score_item, RKVI_HEADS); rkvi_commit_state(job, 1);/'
fault state-unchecked any '/^static rkv_status rkvi_carry/,/^}/s/if (!(carried\[i\] >= 0 /if (0 \&\& !(carried[i] >= 0 /'
fault bias-unchecked any '/^static rkv_status rkvi_add_bias/,/^}/s/if (h->scores\[i\] != h->scores\[i\])/if (0)/'
fault means-unchecked any '/^static rkv_status rkvi_pack_expected/,/^}/s/if (!(square\[r\] <= RKVI_MAX_SQUARE))/if (0)/'

for name in $wanted; do
    case "$known " in *" $name "*) continue ;; esac
    echo "FAIL  $name: there is no such fault"
    failed=$((failed + 1))
done
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
