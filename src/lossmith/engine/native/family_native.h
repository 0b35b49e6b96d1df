// The terms of the cross-entropy family of a token, and their gradients: the formulas of lossmith/terms/.

#pragma once

#include "tokens_native.h"

extern "C" {

struct Family {
    int64_t excludes_target;
    double label_smoothing, focal_gamma, z_loss, confidence_penalty;
};
}

namespace {

constexpr int MOST_TERMS = 3;

inline int num_terms(const Family& f) { return 1 + (f.z_loss != 0) + (f.confidence_penalty != 0); }

// Of a token, from its statistics at the loss's temperature and at 1, which are one where there is no other.
template <class T>
struct FamilyOfToken {
    const Family& f;
    const int64_t num_views;
    const Token<T> token, unscaled;
    double weight, own, loss, spread = 0, classes = 1, factor = 1;
    bool has_own = true;

    FamilyOfToken(const Family& family, const T* target_weight, const Tokens* views, int64_t num, int64_t row)
        : f(family), num_views(num), token(views[0], row), unscaled(views[num - 1], row) {
        weight = target_weight ? target_weight[row] : 1.0;
        own = times_weight(token.nll);
        loss = own;
        if (f.label_smoothing != 0) {
            spread = token.value(TOTAL_NLL), classes = token.raw(NUM_FINITE);
            if (f.excludes_target) {
                has_own = !std::isinf(own);
                spread -= has_own ? own : 0.0, classes -= 1;
            }
            classes = classes < 1 ? 1.0 : classes;
            loss = (1 - f.label_smoothing) * own + f.label_smoothing * spread / classes;
        }
        if (f.focal_gamma != 0) factor = std::exp(f.focal_gamma * token.log1m());
    }
    double times_weight(double value) const { return weight == 0 ? 0.0 : value * weight; }

    void values(double* found) const {
        *found++ = factor * loss;
        if (f.z_loss != 0) {
            const double logsumexp = unscaled.value(LOGSUMEXP);
            *found++ = f.z_loss * times_weight(logsumexp * logsumexp);
        }
        if (f.confidence_penalty != 0) *found++ = f.confidence_penalty * times_weight(-token.value(ENTROPY));
    }

    // Of both views, from those of the terms.
    void back(const double* given, Back* found) const {
        double up[2][NUM_DERIVED] = {};
        unsigned asked[2] = {};
        const double of_loss = given[0] * factor;
        double of_own = f.label_smoothing != 0 ? (1 - f.label_smoothing) * of_loss : of_loss;
        if (f.label_smoothing != 0) {
            const double of_spread = f.label_smoothing * of_loss / classes;
            up[0][TOTAL_NLL] = of_spread, asked[0] |= 1u << TOTAL_NLL;
            if (f.excludes_target && has_own) of_own -= of_spread;
        }
        up[0][NLL] = times_weight(of_own);
        if (f.focal_gamma != 0) up[0][TARGET_LOG1M_PROB] = given[0] * f.focal_gamma * (factor * loss);
        int n = 1;
        if (f.z_loss != 0) {
            const int64_t last = num_views - 1;
            up[last][LOGSUMEXP] = times_weight(given[n++] * f.z_loss) * 2 * unscaled.value(LOGSUMEXP);
            asked[last] |= 1u << LOGSUMEXP;
        }
        if (f.confidence_penalty != 0) {
            up[0][ENTROPY] = -times_weight(given[n++] * f.confidence_penalty);
            asked[0] |= 1u << ENTROPY;
        }
        add_named(token, up[0], asked[0], found[0]), finish(token, found[0]);
        if (num_views > 1) add_named(unscaled, up[1], asked[1], found[1]), finish(unscaled, found[1]);
    }
};

// Where nobody has a gradient for a token's terms, its statistics have none, whatever they are.
inline bool is_any(const double* given, int num) {
    for (int k = 0; k < num; ++k)
        if (given[k] != 0) return true;
    return false;
}

}  // namespace
