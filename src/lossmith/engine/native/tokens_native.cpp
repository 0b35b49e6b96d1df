// What is computed of a token's raw statistics, a token at a time and in doubles: the named statistics of
// stats.py and their gradients, and the weighed sum of the terms that were made of them.

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

constexpr double INF = std::numeric_limits<double>::infinity();
constexpr double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();
constexpr double LOG_2 = 0.693147180559945309417232121458;
constexpr double WIDE = 1e4;  // as in stats.py
// Fewer tokens than this are faster on one thread.
constexpr int64_t MANY = 4096;

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

struct Terms {
    int64_t is_double, num_terms, num_rows;
    const void* const* values;  // a pointer a term
    const void *scale, *weight;
    void *shares, *sums, *total;
    const void *g_sums, *g_total;
    void* gradient;
};
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

// log(1 - p_c) of one candidate, and what it takes for its gradient.
struct Candidate {
    bool is_target, is_large;
    double log_p, rest, value;

    template <class T>
    Candidate(const Token<T>& token, int64_t k) {
        const int64_t at = token.row * token.all.num_candidates + k;
        is_target = token.all.candidates[at] == token.all.targets[token.row];
        log_p = ((const T*)token.all.raw[CANDIDATE_LOGITS])[at] - token.reference - token.centered;
        // Above 1/2 it is the rest, summed without the class, less the sum of all; see stats.py.
        is_large = log_p > -LOG_2 && !is_target;
        rest = token.raw(REST_LOG_SUM);
        const double most = rest > token.gap ? rest : token.gap;
        if (is_target) value = token.log1m();
        else if (!is_large) value = std::log1p(-std::exp(log_p));
        else value = (most == -INF ? most : most + std::log1p(std::exp(-std::fabs(rest - token.gap)))) - token.centered;
    }
};

template <class T>
void derive(const Tokens& t, int64_t row) {
    const Token<T> token(t, row);
    for (int name = 0; name < CANDIDATE_LOG1M_PROB; ++name)
        if (t.derived[name]) ((T*)t.derived[name])[row] = (T)token.value((Derived)name);
    if (t.derived[CANDIDATE_LOG1M_PROB])
        for (int64_t k = 0; k < t.num_candidates; ++k)
            ((T*)t.derived[CANDIDATE_LOG1M_PROB])[row * t.num_candidates + k] = (T)Candidate(token, k).value;
}

// The gradients of a token's raw statistics from those of its named ones.
template <class T>
void derive_back(const Tokens& t, int64_t row) {
    const Token<T> token(t, row);
    const double p = token.p, q = token.q;
    double g[NUM_RAW] = {}, of_against = 0, of_centered = 0, of_gap = 0, of_log1m = 0;
    const auto up = [&](Derived name) { return t.upstream[name] ? (double)((const T*)t.upstream[name])[row] : 0.0; };

    of_log1m = up(TARGET_LOG1M_PROB);
    of_against += up(NLL) * q - up(TARGET_PROB) * p * q;
    if (t.upstream[LOGSUMEXP]) {
        if (token.against > 0) g[WRONG_LOG_SUM] += up(LOGSUMEXP), of_against -= up(LOGSUMEXP) * p;
        else g[TARGET_LOGIT] += up(LOGSUMEXP), of_against += up(LOGSUMEXP) * q;
    }
    if (!token.is_ignored) g[WRONG_LOG_SUM] += up(WRONG_LOGSUMEXP);
    if (t.upstream[ENTROPY]) {
        const double apart = std::fmin(token.wrong_nll, WIDE) - std::fmin(token.nll, WIDE) + token.raw(WRONG_ENTROPY);
        of_against += up(ENTROPY) * p * q * (apart + (token.nll <= WIDE) - (token.wrong_nll <= WIDE));
        g[WRONG_ENTROPY] += up(ENTROPY) * q;
    }
    if (t.upstream[NORMALIZED_WRONG_ENTROPY] && token.raw(NUM_WRONG) > 1) {
        const double most = std::log(token.raw(NUM_WRONG)), part = token.raw(WRONG_ENTROPY) / most;
        if (!(part < 0 || part > 1)) g[WRONG_ENTROPY] += up(NORMALIZED_WRONG_ENTROPY) / most;
    }
    if (t.upstream[MEAN_LOGIT]) {
        const bool has_target = token.raw(TARGET_WEIGHT) != 0;
        const double of_wrong = has_target ? token.raw(SUM_WEIGHT) / token.total_weight() : 1.0;
        g[CENTERED_SUM] += up(MEAN_LOGIT) * of_wrong / token.wrong_weight();
        if (has_target) g[TARGET_LOGIT] += up(MEAN_LOGIT) * token.raw(TARGET_WEIGHT) / token.total_weight();
    }
    if (t.upstream[TOTAL_NLL]) {
        of_centered += up(TOTAL_NLL) * token.raw(SUM_WEIGHT);
        g[CENTERED_SUM] -= up(TOTAL_NLL);
        if (token.raw(TARGET_WEIGHT) != 0) of_against += up(TOTAL_NLL) * token.raw(TARGET_WEIGHT) * q;
    }
    if (t.upstream[TOP_PROB]) {
        if (token.target_wins()) {
            of_against -= up(TOP_PROB) * p * q;
        } else {
            const double of_top = up(TOP_PROB) * token.top_wrong_prob();
            g[TOP_WRONG_LOGIT] += of_top, of_centered -= of_top;
        }
    }
    for (int64_t k = 0; t.upstream[CANDIDATE_LOG1M_PROB] && k < t.num_candidates; ++k) {
        const int64_t at = row * t.num_candidates + k;
        const double given = ((const T*)t.upstream[CANDIDATE_LOG1M_PROB])[at];
        const Candidate c(token, k);
        double own = 0;
        if (c.is_target) {
            of_log1m += given;
        } else if (c.is_large) {
            if (c.rest > -INF || token.gap > -INF) {
                const double of_rest = 1 / (1 + std::exp(token.gap - c.rest));
                g[REST_LOG_SUM] += given * of_rest, of_gap += given * (1 - of_rest);
            }
            of_centered -= given;
        } else {
            const double e = std::exp(c.log_p);
            own = -given * e / (1 - e);
            of_centered -= own;
        }
        if (t.gradient[CANDIDATE_LOGITS]) ((T*)t.gradient[CANDIDATE_LOGITS])[at] = (T)own;
    }
    if (!token.is_ignored) of_against += of_log1m * p;
    if (token.against > 0) g[WRONG_LOG_SUM] += of_centered, of_against -= of_centered * p;
    else of_gap += of_centered, of_against += of_centered * q;
    g[WRONG_LOG_SUM] += of_against;
    g[TARGET_LOGIT] += of_gap - of_against;
    for (int name = 0; name < NUM_RAW; ++name)
        if (t.gradient[name] && name != CANDIDATE_LOGITS) ((T*)t.gradient[name])[row] = (T)g[name];
}

template <class T>
void weigh(const Terms& t) {
    const T *scale = (const T*)t.scale, *weight = (const T*)t.weight;
    double all = 0;
    for (int64_t k = 0; k < t.num_terms; ++k) {
        const T* values = (const T*)t.values[k];
        T* shares = (T*)t.shares + k * t.num_rows;
        double sum = 0;
        for (int64_t n = 0; n < t.num_rows; ++n) {
            shares[n] = scale[n] == 0 ? T(0) : values[n] * scale[n];
            sum += !weight ? shares[n] : weight[n] == 0 ? T(0) : shares[n] * weight[n];
        }
        ((T*)t.sums)[k] = (T)sum;
        all += sum;
    }
    *(T*)t.total = (T)all;
}

template <class T>
void weigh_back(const Terms& t) {
    const T *scale = (const T*)t.scale, *weight = (const T*)t.weight;
    for (int64_t k = 0; k < t.num_terms; ++k) {
        const T up = (t.g_total ? *(const T*)t.g_total : T(0)) + (t.g_sums ? ((const T*)t.g_sums)[k] : T(0));
        T* gradient = (T*)t.gradient + k * t.num_rows;
        for (int64_t n = 0; n < t.num_rows; ++n) {
            const T given = !weight ? up : weight[n] == 0 ? T(0) : up * weight[n];
            gradient[n] = scale[n] == 0 ? T(0) : given * scale[n];
        }
    }
}

template <class T>
void each_token(const Tokens& t, void (*of_token)(const Tokens&, int64_t)) {
#pragma omp parallel for if (t.num_rows >= MANY && t.num_threads > 1) num_threads((int)t.num_threads)
    for (int64_t row = 0; row < t.num_rows; ++row) of_token(t, row);
}

}  // namespace

extern "C" {

void lossmith_derive(const Tokens* t) {
    t->is_double ? each_token<double>(*t, derive<double>) : each_token<float>(*t, derive<float>);
}
void lossmith_derive_back(const Tokens* t) {
    t->is_double ? each_token<double>(*t, derive_back<double>) : each_token<float>(*t, derive_back<float>);
}
void lossmith_weigh(const Terms* t) { t->is_double ? weigh<double>(*t) : weigh<float>(*t); }
void lossmith_weigh_back(const Terms* t) { t->is_double ? weigh_back<double>(*t) : weigh_back<float>(*t); }
}
