/* The golden vectors in tests/golden, single-round files first; see tests/golden/README.md.
 * Part of test_golden and test_cuda: make test. */
#ifndef GOLDEN_NAMES_H
#define GOLDEN_NAMES_H

static const char *const golden_names[] = {
    "iso_mha_d64",
    "iso_gqa_d20",
    "iso_gqa7_d96_bf16",
    "aniso_weak",
    "aniso_half",
    "aniso_most_bf16",
    "aniso_all_f16",
    "aniso_mixed_heads_f16",
    "aniso_lambda0",
    "lambda1_pool1",
    "lambda1_pool7",
    "repeats_gqa_d64",
    "repeats_gqa7_d128_bf16",
    "repeats_lambda0_pool5",
    "repeats_mqa_d128_f16",
    "exactdup_gqa_d64_f16",
    "rope_gqa_d64",
    "rope_gqa7_d128_f16",
    "rope_mha_d80_w16_f16",
    "rope_mqa_d96_bf16",
    "tie_identical_keys",
    "zero_key",
    "budget_n_minus_1",
    "small_n40_w16",
    "outlier_channel_f16",
    "aniso_threshold07_f16",
    "offset_logits",
    "real_prose_layer00_f16",
    "real_prose_layer02_f16",
    "real_prose_layer15_f16",
    "real_trace_layer22_f16",
    "multi_aniso_gqa_f16",
    "multi_repeats_mha_f16",
    "multi_rope_gqa7_bf16",
    "multi_repeats_mqa_f32",
};

enum { N_GOLDEN = sizeof golden_names / sizeof *golden_names };

#endif
