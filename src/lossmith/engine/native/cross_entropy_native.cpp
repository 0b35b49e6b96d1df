// The cross-entropy family of given logits, whole: a sweep of the rows, and of every token what the terms make of
// its statistics; and back. The formulas are those of lossmith/terms/.

#include "family_native.h"
#include "rows_native.h"

#include <memory>
#include <new>

namespace {

constexpr int ENTROPIES = 1, SUMS = 2;  // groups of statistics, as in statistics/raw.py
constexpr int MOST_GRADIENTS = 8;  // of two views
// Fewer tokens than this are faster on one thread.
constexpr int64_t MANY = 4096;

}  // namespace

extern "C" {

struct WholeLoss {
    int64_t needs, needs_unscaled;  // groups of statistics of the two views; -1 where there is one alone
    const float* temperature;
    float* raw;  // [R, N] the statistics of the two views, in the engine's order: written there, read back
    float* scale;                // [N] a token's share of the loss, which is written if there is a reduction
    const float* target_weight;  // [N] its class weight, or null
    float *shares, *total, *parts[MOST_TERMS];          // [K, N], [] and K times [], written there
    const float *g_total, *g_parts[MOST_TERMS];         // read back; any may be null
    int64_t reduction, num_positions, is_nan_if_empty;  // as in Targets; -1 where the shares are there already
    Family family;
};
}

namespace {

struct Views {
    View of_rows[2] = {};
    Tokens of_tokens[2] = {};
    int64_t num = 0;

    // g_raw: [R, N] for the gradients of the statistics, or null.
    Views(const Batch& b, const WholeLoss& f, float* g_raw) {
        float* raw = f.raw;
        add(b, f.needs & (ENTROPIES | SUMS), f.temperature, raw, g_raw);
        if (f.needs_unscaled >= 0) add(b, f.needs_unscaled & (ENTROPIES | SUMS), nullptr, raw, g_raw);
    }

    void add(const Batch& b, int64_t needs, const float* temperature, float*& raw, float*& g_raw) {
        View& v = of_rows[num];
        Tokens& t = of_tokens[num++];
        v.temperature = temperature, v.needs = needs;
        t.num_rows = b.num_rows, t.targets = b.targets, t.ignore_index = b.ignore_index;
        const auto next = [&](Raw name, float*& place) { t.raw[name] = place = raw, raw += b.num_rows; };
        // of the gradients those that are no constants
        const auto goes_back = [&](Raw name, const float*& place) {
            if (g_raw) t.gradient[name] = g_raw, place = g_raw, g_raw += b.num_rows;
        };
        next(REFERENCE, v.reference), next(TARGET_LOGIT, v.target_logit), next(WRONG_LOG_SUM, v.wrong_log_sum);
        goes_back(TARGET_LOGIT, v.g_target_logit), goes_back(WRONG_LOG_SUM, v.g_wrong_log_sum);
        if (needs & ENTROPIES) next(WRONG_ENTROPY, v.wrong_entropy), goes_back(WRONG_ENTROPY, v.g_wrong_entropy);
        if (needs & SUMS) {
            next(CENTERED_SUM, v.centered_sum), next(SUM_WEIGHT, v.sum_weight);
            next(TARGET_WEIGHT, v.target_weight), next(NUM_FINITE, v.num_finite);
            goes_back(CENTERED_SUM, v.g_centered_sum);
        }
    }
};

void settle(const Batch& b, const WholeLoss& f) {
    const Targets targets{0, b.num_rows, f.num_positions, b.num_classes, b.ignore_index, f.reduction,
                          f.is_nan_if_empty, b.targets, nullptr, f.scale, nullptr};
    lossmith_settle(&targets);
}

void forward(const Batch& b, const WholeLoss& f, const Views& views) {
    const int64_t n = b.num_rows;
#pragma omp parallel for if (n >= MANY && b.num_threads > 1) num_threads((int)b.num_threads)
    for (int64_t row = 0; row < n; ++row) {
        double found[MOST_TERMS] = {};
        const bool counts = f.scale[row] != 0;
        if (counts) FamilyOfToken<float>(f.family, f.target_weight, views.of_tokens, views.num, row).values(found);
        for (int k = 0; k < num_terms(f.family); ++k)
            f.shares[k * n + row] = counts ? (float)found[k] * f.scale[row] : 0.0f;
    }
    double all = 0;
    for (int k = 0; k < num_terms(f.family); ++k) {  // in one order, whatever the threads did
        double sum = 0;
        for (int64_t row = 0; row < n; ++row) sum += f.shares[k * n + row];
        if (f.parts[k]) *f.parts[k] = (float)sum;
        all += sum;
    }
    *f.total = (float)all;
}

void backward(const Batch& b, const WholeLoss& f, const Views& views) {
    const int64_t n = b.num_rows;
    double upstream[MOST_TERMS];
    for (int k = 0; k < num_terms(f.family); ++k)
        upstream[k] = (f.g_total ? *f.g_total : 0.0) + (f.g_parts[k] ? *f.g_parts[k] : 0.0);
#pragma omp parallel for if (n >= MANY && b.num_threads > 1) num_threads((int)b.num_threads)
    for (int64_t row = 0; row < n; ++row) {
        Back found[2];
        double given[MOST_TERMS] = {};
        for (int k = 0; k < num_terms(f.family); ++k) given[k] = f.scale[row] == 0 ? 0.0 : upstream[k] * f.scale[row];
        if (is_any(given, num_terms(f.family)))
            FamilyOfToken<float>(f.family, f.target_weight, views.of_tokens, views.num, row).back(given, found);
        for (int64_t v = 0; v < views.num; ++v)
            for (int name = 0; name < NUM_RAW; ++name)
                if (void* const place = views.of_tokens[v].gradient[name])
                    ((float*)place)[row] = (float)found[v].raw[name];
    }
}

}  // namespace

// The loss of logits, or with batch->gradient their gradient; the answer is lossmith_sweep's.
extern "C" int64_t lossmith_cross_entropy(Batch* batch, const WholeLoss* loss) {
    std::unique_ptr<float[]> g_raw;
    if (batch->gradient) {
        g_raw.reset(new (std::nothrow) float[MOST_GRADIENTS * batch->num_rows]);
        if (!g_raw) return NO_MEMORY;
    }
    if (loss->reduction >= 0 && !batch->gradient) settle(*batch, *loss);
    Views views(*batch, *loss, g_raw.get());
    batch->views = views.of_rows, batch->num_views = views.num;
    if (batch->gradient) backward(*batch, *loss, views);
    const int64_t problem = lossmith_sweep(batch);
    if (!problem && !batch->gradient) forward(*batch, *loss, views);
    return problem;
}
