// The arithmetic of torch_rows.py for a CPU, a row at a time: the logits are read from memory
// once, everything else happens in a row that stays in the core's own cache, and threads meet
// only at the end. The formulas, and the names, are those of torch_rows.py.

#include "lanes_native.h"
#include "rows_native.h"

#include <atomic>
#include <cmath>
#include <exception>
#include <limits>
#include <memory>
#include <new>
#include <thread>
#include <vector>

namespace {

constexpr float MASKED = -1e30f;
constexpr float UNDERFLOW_ = -1e4f;
constexpr double WRONG_EPS = 1e-8;
constexpr double NEG_INF = -std::numeric_limits<double>::infinity();
constexpr int ENTROPY = 1, SUM = 2, TOP = 4, COUNT = 8, CANDIDATES = 16;
constexpr int64_t BAD_TARGET = 1, BAD_CANDIDATE = 2, BAD_TOP = 3;

inline double log_add(double a, double b) {
    const double m = a > b ? a : b;
    return m == NEG_INF ? NEG_INF : m + std::log1p(std::exp(-std::fabs(a - b)));
}

// The first that went wrong on any thread.
struct Problem {
    std::atomic<int64_t> kind{0};
    int64_t id = 0;
    bool report(int64_t what, int64_t found) {
        int64_t none = 0;
        if (kind.compare_exchange_strong(none, what)) id = found;
        return false;
    }
};

// An id is read once, and checked before anything is indexed with it: memory that is shared with others may
// change at any time.
inline int64_t id_at(const int64_t* p) { return *(const volatile int64_t*)p; }

struct Sums { double e = 0, ed = 0, u = 0, ud = 0, finite = 0; };

// Sums over a row of differences d = x - reference - shift, MASKED where a class does not count.
// fp32 lanes are emptied into doubles every 1024 elements.
template <bool WITH_ENTROPY, bool WITH_SUM>
Sums sums(const float* x, int64_t padded, float reference, float shift, const float* weight) {
    Sums s;
    for (int64_t start = 0; start < padded; start += 64 * W) {
        const int64_t end = start + 64 * W < padded ? start + 64 * W : padded;
        vf e_sum{}, ed_sum{}, u_sum{}, ud_sum{}, f_sum{};
        for (int64_t i = start; i < end; i += W) {
            const vf value = load(x + i);
            const vf centered = value - reference;
            const vf d = centered - shift;
            const vf e = vexp(d);
            e_sum += e;
            if (WITH_ENTROPY) ed_sum += e * d;
            if (WITH_SUM) {
                const vi finite = value > MASKED / 2;
                const vf one = select(finite, splat(1.0f), vf{});
                f_sum += one;
                const vf u = weight ? select(finite, load(weight + i), vf{}) : one;
                u_sum += u;
                ud_sum += u * select(finite, centered, vf{});
            }
        }
        s.e += total(e_sum);
        if (WITH_ENTROPY) s.ed += total(ed_sum);
        if (WITH_SUM) { s.finite += total(f_sum); s.u += total(u_sum); s.ud += total(ud_sum); }
    }
    return s;
}

float largest(const float* x, int64_t padded) {
    vf m = splat(MASKED);
    for (int64_t i = 0; i < padded; i += W) { const vf v = load(x + i); m = select(v > m, v, m); }
    return widest(m);
}

int64_t find(const float* x, int64_t padded, float value) {
    for (int64_t i = 0; i < padded; i += W) {
        if (const unsigned same = bits(load(x + i) == value)) return i + __builtin_ctz(same);
    }
    return -1;
}

int64_t count_above(const float* x, int64_t padded, float reference, float cut) {
    vi n{};
    for (int64_t i = 0; i < padded; i += W) n -= load(x + i) - reference > cut;
    int64_t all = 0;
    for (int k = 0; k < W; ++k) all += n[k];
    return all;
}

template <class T>
bool stats_of_row(const Batch& b, const View& v, int64_t row, int64_t y, const T* z, float* x, const float* weight,
                  Problem& problem) {
    const int64_t V = b.num_classes, padded = (V + W - 1) / W * W;
    const float inverse_t = v.temperature ? 1.0f / *v.temperature : 1.0f;
    const bool with_sum = v.needs & SUM, with_rest = v.needs & CANDIDATES;
    auto scaled_at = [&](int64_t i) {
        const float one = load_part(z + i, 1, 0.0f)[0];
        return v.temperature ? one * inverse_t : one;
    };
    vf highest = splat(MASKED);
    for (int64_t i = 0; i < padded; i += W) {
        vf value = load_upto(z + i, V - i, MASKED);
        // masked classes stay where they are, whatever the temperature; NaN stays NaN
        const vi is_masked = value <= MASKED;
        value = select(is_masked, splat(MASKED), v.temperature ? value * inverse_t : value);
        if (i <= y && y < i + W) value[y - i] = MASKED;  // the row of the wrong answers
        highest = select(value > highest, value, highest);
        store(x + i, value);
    }
    const float target = scaled_at(y), top = widest(highest);
    const bool any_wrong = top > MASKED;
    const float reference = any_wrong ? top : 0.0f;
    v.reference[row] = reference;
    v.target_logit[row] = target;

    int64_t w = -1;
    if ((v.needs & TOP) || with_rest) {
        w = any_wrong ? find(x, padded, top) : -1;
        v.top_wrong_id[row] = w;
        v.top_wrong_logit[row] = any_wrong ? top : (float)NEG_INF;
    }
    float shift = 0.0f;
    if (with_rest && w >= 0) {
        x[w] = MASKED;
        const float second = largest(x, padded);
        shift = second > MASKED ? second - reference : 0.0f;
    }
    Sums s;
    if (v.needs & ENTROPY)
        s = with_sum ? sums<true, true>(x, padded, reference, shift, weight)
                     : sums<true, false>(x, padded, reference, shift, weight);
    else
        s = with_sum ? sums<false, true>(x, padded, reference, shift, weight)
                     : sums<false, false>(x, padded, reference, shift, weight);
    const double rest = std::log(s.e) + shift;
    const double log_sum = with_rest ? log_add(rest, w >= 0 ? 0.0 : NEG_INF) : rest;
    v.wrong_log_sum[row] = (float)log_sum;
    if (v.needs & ENTROPY) {
        double mean_d = s.ed / s.e;
        if (with_rest) mean_d = s.e > 0 ? (mean_d + shift) * std::exp(rest - log_sum) : 0.0;
        v.wrong_entropy[row] = log_sum == NEG_INF ? 0.0f : (float)(log_sum - mean_d);
    }
    if (with_sum) {  // the target apart: what it adds would drown the others where it is far above them
        const bool adds_top = with_rest && w >= 0, target_is_finite = target > MASKED;
        v.num_finite[row] = (float)(s.finite + adds_top + target_is_finite);
        v.sum_weight[row] = (float)(s.u + (adds_top ? weight ? weight[w] : 1.0f : 0.0f));
        v.target_weight[row] = target_is_finite ? weight ? weight[y] : 1.0f : 0.0f;
        v.centered_sum[row] = (float)s.ud;
    }
    if (v.needs & COUNT) {
        const double cut = log_sum + std::log(WRONG_EPS);
        const int64_t n = any_wrong ? count_above(x, padded, reference, (float)cut) : 0;
        v.num_wrong[row] = (float)(n + (with_rest && w >= 0));
    }
    if (with_rest) {
        v.rest_log_sum[row] = (float)rest;
        for (int64_t k = 0; k < b.num_candidates; ++k) {
            const int64_t at = row * b.num_candidates + k, c = id_at(b.candidates + at);
            if (c < -1 || c >= V) return problem.report(BAD_CANDIDATE, c);
            v.candidate_logits[at] = c < 0 ? (float)NEG_INF : scaled_at(c);
        }
    }
    return true;
}

struct Formula { float scale, reference, origin, constant, slope, uniform; };

// out = exp(d - origin) (constant + slope d) + uniform u [finite],  d = x - reference; the target's is set later
template <class T, bool WITH_SLOPE, bool WITH_SUM>
void apply(const T* z, float* out, int64_t V, Formula f, const float* weight, bool add) {
    for (int64_t i = 0; i < V; i += W) {
        const int64_t left = V - i;
        const vf raw = load_upto(z + i, left, MASKED);
        vf d = raw * f.scale - f.reference;
        if (WITH_SLOPE) d = select(d < UNDERFLOW_, splat(UNDERFLOW_), d);
        vf g = vexp(d - f.origin) * (WITH_SLOPE ? d * f.slope + f.constant : splat(f.constant));
        if (WITH_SUM) {
            vf u = splat(f.uniform);
            if (weight) u = u * load(weight + i);
            g += select(raw > MASKED, u, vf{});
        }
        if (add) g += load_upto(out + i, left, 0.0f);
        if (left >= W) store(out + i, g); else store_part(out + i, left, g);
    }
}

template <class T>
bool grad_of_row(const Batch& b, const View& v, int64_t row, int64_t y, const T* z, float* out, const float* weight,
                 bool add, Problem& problem) {
    auto at = [&](const float* p) { return p ? (double)p[row] : 0.0; };
    const double inverse_t = v.temperature ? 1.0 / *v.temperature : 1.0;
    const double log_sum = v.wrong_log_sum[row];
    const double inverse = log_sum == NEG_INF ? 0.0 : std::exp(-log_sum);
    double alpha = at(v.g_wrong_log_sum) * inverse_t, beta = 0.0;
    if (v.g_wrong_entropy) {
        beta = -at(v.g_wrong_entropy) * inverse_t;
        alpha -= beta * (inverse > 0 ? log_sum - v.wrong_entropy[row] : 0.0);
    }
    double origin = 0.0, scale = inverse, offset = 0.0;
    if (v.g_rest_log_sum) {
        const double rest = v.rest_log_sum[row];
        const bool any = rest != NEG_INF;
        origin = any ? rest : 0.0;
        scale = any ? std::exp(rest - log_sum) : 0.0;
        offset = any ? at(v.g_rest_log_sum) * inverse_t : 0.0;
    }
    const double uniform = at(v.g_centered_sum) * inverse_t;
    const int64_t V = b.num_classes, w = v.top_wrong_id ? id_at(v.top_wrong_id + row) : -1;
    if (w < -1 || w >= V) return problem.report(BAD_TOP, w);
    const Formula f{(float)inverse_t, v.reference[row], (float)origin, (float)(alpha * scale + offset),
                    (float)(beta * scale), (float)uniform};
    // All that is read of single logits is read here: ``out`` may be where they are.
    const float at_y_before = add ? out[y] : 0.0f, at_w_before = add && w >= 0 ? out[w] : 0.0f;
    auto uniform_at = [&](int64_t i) {
        return load_part(z + i, 1, 0.0f)[0] > MASKED ? uniform * (weight ? weight[i] : 1.0) : 0.0;
    };
    const double uniform_at_w = w >= 0 ? uniform_at(w) : 0.0;
    if (v.g_wrong_entropy)
        v.g_centered_sum ? apply<T, true, true>(z, out, V, f, weight, add)
                         : apply<T, true, false>(z, out, V, f, weight, add);
    else
        v.g_centered_sum ? apply<T, false, true>(z, out, V, f, weight, add)
                         : apply<T, false, false>(z, out, V, f, weight, add);
    if (v.g_rest_log_sum && w >= 0) out[w] = at_w_before + (float)(alpha * inverse + uniform_at_w);
    out[y] = at_y_before + (float)(at(v.g_target_logit) * inverse_t);
    if (v.g_top_wrong_logit && w >= 0) out[w] += (float)(at(v.g_top_wrong_logit) * inverse_t);
    if (v.g_candidate_logits)
        for (int64_t k = 0; k < b.num_candidates; ++k) {
            const int64_t i = row * b.num_candidates + k, c = id_at(b.candidates + i);
            if (c < -1 || c >= V) return problem.report(BAD_CANDIDATE, c);
            if (c >= 0) out[c] += (float)(v.g_candidate_logits[i] * inverse_t);
        }
    return true;
}

// A token that the model gets right with certainty.
void fill_ignored(const Batch& b, const View& v, int64_t row) {
    float* const zeros[] = {v.reference, v.target_logit, v.wrong_entropy, v.centered_sum, v.sum_weight,
                            v.target_weight, v.num_finite, v.top_wrong_logit, v.num_wrong};
    for (float* p : zeros)
        if (p) p[row] = 0.0f;
    v.wrong_log_sum[row] = NEG_INF;
    if (v.rest_log_sum) v.rest_log_sum[row] = NEG_INF;
    if (v.top_wrong_id) v.top_wrong_id[row] = -1;
    for (int64_t k = 0; v.candidate_logits && k < b.num_candidates; ++k)
        v.candidate_logits[row * b.num_candidates + k] = NEG_INF;
}

// Whether anybody has a gradient for a row; NaN is one.
bool is_wanted(const Batch& b, int64_t row) {
    for (int64_t k = 0; k < b.num_views; ++k) {
        const View& v = b.views[k];
        const float* of_rows[] = {v.g_target_logit, v.g_wrong_log_sum, v.g_wrong_entropy, v.g_centered_sum,
                                  v.g_top_wrong_logit, v.g_rest_log_sum};
        for (const float* g : of_rows)
            if (g && g[row] != 0) return true;
        for (int64_t i = 0; v.g_candidate_logits && i < b.num_candidates; ++i)
            if (v.g_candidate_logits[row * b.num_candidates + i] != 0) return true;
    }
    return false;
}

template <class T> bool one_row(const Batch& b, int64_t row, float* x, const float* weight, Problem& problem) {
    const int64_t V = b.num_classes, begin = b.row_offsets ? b.row_offsets[row] : row * V;
    const T* z = (const T*)b.logits + begin;
    const int64_t y = id_at(b.targets + row);
    const bool ignored = y == b.ignore_index;
    if (!ignored && (y < 0 || y >= V)) return problem.report(BAD_TARGET, y);
    if (!b.gradient) {
        for (int64_t k = 0; k < b.num_views; ++k) {
            if (ignored) fill_ignored(b, b.views[k], row);
            else if (!stats_of_row<T>(b, b.views[k], row, y, z, x, weight, problem)) return false;
        }
        return true;
    }
    T* gradient = (T*)b.gradient + row * V;
    if (ignored || !is_wanted(b, row)) { std::memset((void*)gradient, 0, V * sizeof(T)); return true; }
    // In place a second view would find the first one's gradient where it looks for logits.
    const bool direct = sizeof(T) == sizeof(float) && ((const void*)gradient != (const void*)z || b.num_views == 1);
    float* out = direct ? (float*)gradient : x;
    for (int64_t k = 0; k < b.num_views; ++k)
        if (!grad_of_row<T>(b, b.views[k], row, y, z, out, weight, k > 0, problem)) return false;
    if (direct) return true;
    for (int64_t i = 0; i < V; i += W) {
        if (V - i >= W) store(gradient + i, load(x + i)); else store_part(gradient + i, V - i, load(x + i));
    }
    return true;
}

// Ends early on all threads where something is wrong: the caller throws the result away.
void run(const Batch& b, std::atomic<int64_t>& next, int64_t step, Problem& problem) {
    const int64_t padded = (b.num_classes + W - 1) / W * W;
    const std::unique_ptr<float[]> x(new (std::nothrow) float[padded]());
    const std::unique_ptr<float[]> weight(b.class_weight ? new (std::nothrow) float[padded]() : nullptr);
    if (!x || (b.class_weight && !weight)) { problem.report(NO_MEMORY, 0); return; }
    if (b.class_weight) std::memcpy(weight.get(), b.class_weight, 4 * b.num_classes);
    for (int64_t start; (start = next.fetch_add(step)) < b.num_rows;)
        for (int64_t row = start; row < b.num_rows && row < start + step; ++row) {
            const bool went_well = b.is_bf16 ? one_row<uint16_t>(b, row, x.get(), weight.get(), problem)
                                             : one_row<float>(b, row, x.get(), weight.get(), problem);
            if (!went_well) { next = b.num_rows; return; }
        }
}

}  // namespace

extern "C" int64_t lossmith_sweep(Batch* batch) {
    if (batch->num_rows < 1 || batch->num_classes < 1) return 0;
    const int64_t worth = 1 + (batch->num_rows * batch->num_classes >> 16);
    const int num_threads = (int)(batch->num_threads < worth ? batch->num_threads : worth);
    const int64_t step = 1 + (1 << 16) / batch->num_classes;
    std::atomic<int64_t> next{0};
    Problem problem;
#ifdef _OPENMP  // PyTorch's own threads: others would wait for a core while those spin
#pragma omp parallel num_threads(num_threads)
    run(*batch, next, step, problem);
#else
    std::vector<std::thread> threads;
    try {
        for (int k = 1; k < num_threads; ++k) threads.emplace_back([&] { run(*batch, next, step, problem); });
    } catch (const std::exception&) {  // as many as there are
    }
    run(*batch, next, step, problem);
    for (auto& t : threads) t.join();
#endif
    batch->bad_id = problem.id;
    return problem.kind;
}
