// How the arithmetic on rows is called.

#pragma once

#include <cstdint>

extern "C" {

// One view of the logits: their statistics over one temperature. Pointers may be null.
struct View {
    const float* temperature;
    int64_t needs;
    float *reference, *target_logit, *wrong_log_sum, *wrong_entropy, *centered_sum, *sum_weight, *target_weight,
        *num_finite, *top_wrong_logit;
    int64_t* top_wrong_id;
    float *num_wrong, *candidate_logits, *rest_log_sum;
    const float *g_target_logit, *g_wrong_log_sum, *g_wrong_entropy, *g_centered_sum, *g_top_wrong_logit,
        *g_candidate_logits, *g_rest_log_sum;
};

struct Batch {
    const void* logits;
    const int64_t* row_offsets;  // in elements; none where each row follows the one before
    int64_t is_bf16, num_rows, num_classes;
    const int64_t* targets;
    int64_t ignore_index;
    const int64_t* candidates;
    int64_t num_candidates;
    const float* class_weight;
    View* views;
    int64_t num_views, num_threads;
    void* gradient;
    int64_t bad_id;  // filled in: what stood where an id should
};

constexpr int64_t NO_MEMORY = 4;

// 0, or which ids hold one out of range, or that there is no memory.
int64_t lossmith_sweep(Batch* batch);
}
