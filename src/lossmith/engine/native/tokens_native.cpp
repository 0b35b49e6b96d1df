// What is computed of tokens, one at a time and in doubles: the named statistics and their gradients, and the
// weighed sum of the terms that were made of them.

#include "family_native.h"

#include <vector>

namespace {

constexpr double LOG_2 = 0.693147180559945309417232121458;
constexpr int64_t SEQUENCE_MEAN = 1, SUM = 2;  // as in native_tokens.py
// Fewer tokens than this are faster on one thread.
constexpr int64_t MANY = 4096;

}  // namespace

extern "C" {

// Ids of classes, or the exempt one.
struct Ids {
    const int64_t* ids;
    int64_t num, num_classes, exempt;
};

struct FamilyTerms {
    const Tokens* views;  // at the loss's temperature, and at 1 if that is another and read
    int64_t num_views;
    const void* target_weight;  // [N], or null
    void* values;               // [K, N], written on the way there
    const void* upstream;       // [K, N], read on the way back
    Family family;
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
    double up[NUM_DERIVED] = {};
    unsigned asked = 0;
    for (int name = 0; name < CANDIDATE_LOG1M_PROB; ++name)
        if (t.upstream[name]) up[name] = ((const T*)t.upstream[name])[row], asked |= 1u << name;
    Back back;
    add_named(token, up, asked, back);
    for (int64_t k = 0; t.upstream[CANDIDATE_LOG1M_PROB] && k < t.num_candidates; ++k) {
        const int64_t at = row * t.num_candidates + k;
        const double given = ((const T*)t.upstream[CANDIDATE_LOG1M_PROB])[at];
        const Candidate c(token, k);
        double own = 0;
        if (c.is_target) {
            back.of_log1m += given;
        } else if (c.is_large) {
            if (c.rest > -INF || token.gap > -INF) {
                const double of_rest = 1 / (1 + std::exp(token.gap - c.rest));
                back.raw[REST_LOG_SUM] += given * of_rest, back.of_gap += given * (1 - of_rest);
            }
            back.of_centered -= given;
        } else {
            const double e = std::exp(c.log_p);
            own = -given * e / (1 - e);
            back.of_centered -= own;
        }
        if (t.gradient[CANDIDATE_LOGITS]) ((T*)t.gradient[CANDIDATE_LOGITS])[at] = (T)own;
    }
    finish(token, back);
    for (int name = 0; name < NUM_RAW; ++name)
        if (t.gradient[name] && name != CANDIDATE_LOGITS) ((T*)t.gradient[name])[row] = (T)back.raw[name];
}

// Which tokens are supervised, and their shares; the divisions are rounded as PyTorch's are.
template <class T>
void settle(const Targets& t) {
    const int64_t length = t.num_positions > 0 ? t.num_positions : 1;
    const bool by_row = t.reduction == SEQUENCE_MEAN;
    const auto is_valid = [&](int64_t n) { return t.targets[n] != t.ignore_index; };
    T* scale = (T*)t.scale;
    int64_t own = 0;
    for (int64_t row = 0; row < t.num_rows; row += length) {
        int64_t here = 0;
        for (int64_t n = row; n < row + length; ++n) here += is_valid(n);
        const T factor = by_row && here ? T(1) / (T)here : T(1);
        for (int64_t n = row; n < row + length; ++n) scale[n] = is_valid(n) ? factor : T(0);
        own += by_row ? here > 0 : here;
    }
    const T divisor = t.reduction == SUM ? T(1) : own > 0 ? (T)own : t.is_nan_if_empty ? (T)NOT_A_NUMBER : T(1);
    for (int64_t n = 0; n < t.num_rows; ++n) scale[n] /= divisor;
    for (int64_t n = 0; t.valid && n < t.num_rows; ++n) t.valid[n] = is_valid(n);
    if (t.count) *(T*)t.count = (T)own;
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
void family(const FamilyTerms& t) {
    const int64_t n = t.views->num_rows;
#pragma omp parallel for if (n >= MANY && t.views->num_threads > 1) num_threads((int)t.views->num_threads)
    for (int64_t row = 0; row < n; ++row) {
        double found[MOST_TERMS];
        FamilyOfToken<T>(t.family, (const T*)t.target_weight, t.views, t.num_views, row).values(found);
        for (int k = 0; k < num_terms(t.family); ++k) ((T*)t.values)[k * n + row] = (T)found[k];
    }
}

template <class T>
void family_back(const FamilyTerms& t) {
    const int64_t n = t.views->num_rows;
#pragma omp parallel for if (n >= MANY && t.views->num_threads > 1) num_threads((int)t.views->num_threads)
    for (int64_t row = 0; row < n; ++row) {
        Back found[2];
        double given[MOST_TERMS];
        for (int k = 0; k < num_terms(t.family); ++k) given[k] = ((const T*)t.upstream)[k * n + row];
        if (is_any(given, num_terms(t.family)))
            FamilyOfToken<T>(t.family, (const T*)t.target_weight, t.views, t.num_views, row).back(given, found);
        for (int64_t v = 0; v < t.num_views; ++v)
            for (int name = 0; name < NUM_RAW; ++name)
                if (void* const place = t.views[v].gradient[name]) ((T*)place)[row] = (T)found[v].raw[name];
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
void lossmith_family(const FamilyTerms* t) { t->views->is_double ? family<double>(*t) : family<float>(*t); }
void lossmith_family_back(const FamilyTerms* t) {
    t->views->is_double ? family_back<double>(*t) : family_back<float>(*t);
}
// Whether there is an id that is no class and not the exempt one.
int64_t lossmith_is_outside(const Ids* given) {
    int64_t found = 0;
    for (int64_t n = 0; n < given->num; ++n)
        found |= (uint64_t)given->ids[n] >= (uint64_t)given->num_classes && given->ids[n] != given->exempt;
    return found;
}
int64_t lossmith_settle(const Targets* t) {
    t->is_double ? settle<double>(*t) : settle<float>(*t);
    const Ids ids{t->targets, t->num_rows, t->num_classes, t->ignore_index};
    return lossmith_is_outside(&ids);
}
void lossmith_weigh(const Terms* t) { t->is_double ? weigh<double>(*t) : weigh<float>(*t); }
void lossmith_weigh_back(const Terms* t) { t->is_double ? weigh_back<double>(*t) : weigh_back<float>(*t); }
}
