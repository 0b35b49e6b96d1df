// A token's raw statistics, and the named ones and their gradients as made of them, in doubles: the formulas, and
// the names, of stats.py.

#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace {

constexpr double INF = std::numeric_limits<double>::infinity();
constexpr double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();
constexpr double WIDE = 1e4;  // as in stats.py

// In the order of GROUP_OF in statistics/raw.py.
enum Raw {
    REFERENCE, TARGET_LOGIT, WRONG_LOG_SUM, WRONG_ENTROPY, CENTERED_SUM, SUM_WEIGHT, TARGET_WEIGHT, NUM_FINITE,
    TOP_WRONG_LOGIT, TOP_WRONG_ID, NUM_WRONG, CANDIDATE_LOGITS, REST_LOG_SUM, NUM_RAW
};
// In the order of DERIVED in tokens/derivation.py.
enum Derived {
    LOGSUMEXP, WRONG_LOGSUMEXP, NLL, TARGET_PROB, TARGET_LOG1M_PROB, ENTROPY, NORMALIZED_WRONG_ENTROPY, MEAN_LOGIT,
    TOTAL_NLL, TOP_PROB, CANDIDATE_LOG1M_PROB, NUM_DERIVED
};

inline double softplus(double x) { return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }

}  // namespace

extern "C" {

// Pointers may be null: a raw statistic that is not there, a named one or a gradient that nobody wants.
struct Tokens {
    int64_t is_double, num_rows, num_candidates, num_threads;
    const int64_t* targets;
    int64_t ignore_index;
    const int64_t* candidates;
    const void* raw[NUM_RAW];
    void* derived[NUM_DERIVED];        // written on the way there
    const void* upstream[NUM_DERIVED]; // read on the way back,
    void* gradient[NUM_RAW];           // on which these are written
};

// Targets [N], rows of num_positions, and what is made of them.
struct Targets {
    int64_t is_double, num_rows, num_positions, num_classes, ignore_index, reduction, is_nan_if_empty;
    const int64_t* targets;
    bool* valid;  // [N], or null
    void* scale;  // [N]
    void* count;  // [], or null
};

// Fills them in; whether one of the targets is no class and not the ignored one.
int64_t lossmith_settle(const Targets* t);
}

namespace {

// A token's raw statistics, 0 where they are not there, and what the named ones have in common.
template <class T>
struct Token {
    const Tokens& all;
    int64_t row;
    bool is_ignored;
    double reference, target, wrong, gap, against, nll, wrong_nll, centered, p, q;

    Token(const Tokens& tokens, int64_t r) : all(tokens), row(r) {
        is_ignored = tokens.targets[row] == tokens.ignore_index;
        reference = raw(REFERENCE), target = raw(TARGET_LOGIT), wrong = raw(WRONG_LOG_SUM);
        gap = target - reference;
        if (gap == INF) gap = NOT_A_NUMBER;  // a broken logit is no certainty
        against = wrong - gap;
        nll = softplus(against), wrong_nll = softplus(-against);
        centered = against > 0 ? wrong + wrong_nll : gap + nll;
        p = std::exp(-nll), q = std::exp(-wrong_nll);
    }
    double raw(Raw name) const { return all.raw[name] ? ((const T*)all.raw[name])[row] : 0.0; }
    double log1m() const { return is_ignored ? 0.0 : -wrong_nll; }
    bool target_wins() const { return (gap >= 0 && !std::isnan(wrong)) || wrong == -INF; }
    double wrong_weight() const { return raw(SUM_WEIGHT) == 0 ? 1.0 : raw(SUM_WEIGHT); }  // of a sum of nothing
    double total_weight() const { return raw(SUM_WEIGHT) + raw(TARGET_WEIGHT); }  // with a target that has one

    double value(Derived name) const {
        switch (name) {
            case LOGSUMEXP: return against > 0 ? reference + (wrong + wrong_nll) : target + nll;
            case WRONG_LOGSUMEXP: return is_ignored ? 0.0 : reference + wrong;
            case NLL: return nll;
            case TARGET_PROB: return p;
            case TARGET_LOG1M_PROB: return log1m();
            case ENTROPY:
                return p * std::fmin(nll, WIDE) + q * (std::fmin(wrong_nll, WIDE) + raw(WRONG_ENTROPY));
            case NORMALIZED_WRONG_ENTROPY: {
                if (raw(NUM_WRONG) <= 1) return 0.0;
                const double part = raw(WRONG_ENTROPY) / std::log(raw(NUM_WRONG));
                return part < 0 ? 0.0 : part > 1 ? 1.0 : part;
            }
            case MEAN_LOGIT: {
                const double of_wrong = reference + raw(CENTERED_SUM) / wrong_weight();
                if (raw(TARGET_WEIGHT) == 0) return of_wrong;
                return (raw(SUM_WEIGHT) * of_wrong + raw(TARGET_WEIGHT) * target) / total_weight();
            }
            case TOTAL_NLL: {
                const double own = raw(TARGET_WEIGHT) == 0 ? 0.0 : raw(TARGET_WEIGHT) * nll;
                return raw(SUM_WEIGHT) * centered - raw(CENTERED_SUM) + own;
            }
            case TOP_PROB: return target_wins() ? p : top_wrong_prob();
            default: return 0.0;
        }
    }
    double top_wrong_prob() const { return std::exp(raw(TOP_WRONG_LOGIT) - reference - centered); }
};

// The gradients of a token's raw statistics, as they are summed up.
struct Back { double raw[NUM_RAW] = {}, of_against = 0, of_centered = 0, of_gap = 0, of_log1m = 0; };

// What the gradients of a token's named statistics, of those that are asked for (a bit each), add to them; but for
// the candidates'.
template <class T>
void add_named(const Token<T>& token, const double* up, unsigned asked, Back& back) {
    const double p = token.p, q = token.q;
    const auto is_asked = [&](Derived name) { return asked >> name & 1; };
    double* const g = back.raw;

    back.of_log1m += up[TARGET_LOG1M_PROB];
    back.of_against += up[NLL] * q - up[TARGET_PROB] * p * q;
    if (is_asked(LOGSUMEXP)) {
        if (token.against > 0) g[WRONG_LOG_SUM] += up[LOGSUMEXP], back.of_against -= up[LOGSUMEXP] * p;
        else g[TARGET_LOGIT] += up[LOGSUMEXP], back.of_against += up[LOGSUMEXP] * q;
    }
    if (!token.is_ignored) g[WRONG_LOG_SUM] += up[WRONG_LOGSUMEXP];
    if (is_asked(ENTROPY)) {
        const double apart = std::fmin(token.wrong_nll, WIDE) - std::fmin(token.nll, WIDE) + token.raw(WRONG_ENTROPY);
        back.of_against += up[ENTROPY] * p * q * (apart + (token.nll <= WIDE) - (token.wrong_nll <= WIDE));
        g[WRONG_ENTROPY] += up[ENTROPY] * q;
    }
    if (is_asked(NORMALIZED_WRONG_ENTROPY) && token.raw(NUM_WRONG) > 1) {
        const double most = std::log(token.raw(NUM_WRONG)), part = token.raw(WRONG_ENTROPY) / most;
        if (!(part < 0 || part > 1)) g[WRONG_ENTROPY] += up[NORMALIZED_WRONG_ENTROPY] / most;
    }
    if (is_asked(MEAN_LOGIT)) {
        const bool has_target = token.raw(TARGET_WEIGHT) != 0;
        const double of_wrong = has_target ? token.raw(SUM_WEIGHT) / token.total_weight() : 1.0;
        g[CENTERED_SUM] += up[MEAN_LOGIT] * of_wrong / token.wrong_weight();
        if (has_target) g[TARGET_LOGIT] += up[MEAN_LOGIT] * token.raw(TARGET_WEIGHT) / token.total_weight();
    }
    if (is_asked(TOTAL_NLL)) {
        back.of_centered += up[TOTAL_NLL] * token.raw(SUM_WEIGHT);
        g[CENTERED_SUM] -= up[TOTAL_NLL];
        if (token.raw(TARGET_WEIGHT) != 0) back.of_against += up[TOTAL_NLL] * token.raw(TARGET_WEIGHT) * q;
    }
    if (is_asked(TOP_PROB)) {
        if (token.target_wins()) {
            back.of_against -= up[TOP_PROB] * p * q;
        } else {
            const double of_top = up[TOP_PROB] * token.top_wrong_prob();
            g[TOP_WRONG_LOGIT] += of_top, back.of_centered -= of_top;
        }
    }
}

// Once all is added: back.raw are the gradients.
template <class T>
void finish(const Token<T>& token, Back& back) {
    if (!token.is_ignored) back.of_against += back.of_log1m * token.p;
    if (token.against > 0) back.raw[WRONG_LOG_SUM] += back.of_centered, back.of_against -= back.of_centered * token.p;
    else back.of_gap += back.of_centered, back.of_against += back.of_centered * token.q;
    back.raw[WRONG_LOG_SUM] += back.of_against;
    back.raw[TARGET_LOGIT] += back.of_gap - back.of_against;
}

}  // namespace
