// The arithmetic of rows_torch.py for a CPU, a row at a time: the logits are read from memory
// once, everything else happens in a row that stays in the core's own cache, and threads meet
// only at the end. The formulas, and the names, are those of rows_torch.py.

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

namespace {

constexpr int W = 16;  // lanes
typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

constexpr float MASKED = -1e30f;
constexpr float UNDERFLOW_ = -1e4f;
constexpr double WRONG_EPS = 1e-8;
constexpr double NEG_INF = -std::numeric_limits<double>::infinity();
constexpr int ENTROPY = 1, SUM = 2, TOP = 4, COUNT = 8, CANDIDATES = 16;

vf splat(float x) { return x - vf{}; }
vf select(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

// exp to about 1 ulp; 0 below the smallest normal number; NaN stays NaN.
#ifdef __AVX512F__  // fused and scaled by one instruction each, it takes half as long
inline vf fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline vf vexp(vf x) {
    const __mmask16 underflows = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.3f), _CMP_LT_OQ);
    x = (vf)_mm512_min_ps(_mm512_set1_ps(88.0f), (__m512)x);  // NaN is the second operand, and stays
    const vf n = (vf)_mm512_roundscale_ps((__m512)(x * 1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const vf r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
    vf p = fma(r, splat(1.9875691500e-4f), splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r + 1.0f);
    return (vf)_mm512_mask_scalef_ps(_mm512_setzero_ps(), (__mmask16)~underflows, (__m512)p, (__m512)n);
}
#else
inline vf vexp(vf x) {
    const vi underflows = x < -87.3f;
    x = select(x > 88.0f, splat(88.0f), x);
    const vf magic = splat(12582912.0f);  // adding 1.5 * 2^23 rounds to an integer
    const vf n = (x * 1.44269504f + magic) - magic;
    const vf r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const vi power = (__builtin_convertvector(n, vi) + 127) << 23;
    return select(underflows, vf{}, p * (vf)power);
}
#endif

inline vf load(const float* p) { vf v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
inline vf load(const uint16_t* p) {  // bf16
    vh h; std::memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
}
inline void store(uint16_t* p, vf v) {  // to the nearest even
    const vu bits = (vu)v;
    vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const vi is_nan = v != v;
    rounded = (vu)(((vi)rounded & ~is_nan) | (is_nan & 0x7fc0));
    const vh h = __builtin_convertvector(rounded, vh);
    std::memcpy(p, &h, sizeof h);
}
// Vectors that reach past the end of a row go through a padded copy.
template <class T> inline vf load_part(const T* p, int64_t left, float fill) {
    T part[W]; vf v = splat(fill); std::memcpy(part, p, left * sizeof(T));
    const vf all = load(part);
    for (int64_t k = 0; k < left; ++k) v[k] = all[k];
    return v;
}
template <class T> inline void store_part(T* p, int64_t left, vf v) {
    T part[W]; store(part, v); std::memcpy(p, part, left * sizeof(T));
}
template <class T> inline vf load_upto(const T* p, int64_t left, float fill) {
    return left >= W ? load(p) : load_part(p, left, fill);
}
inline double total(vf v) { double s = 0; for (int k = 0; k < W; ++k) s += v[k]; return s; }
inline float widest(vf v) { float m = v[0]; for (int k = 1; k < W; ++k) m = v[k] > m ? v[k] : m; return m; }
inline double log_add(double a, double b) {
    const double m = a > b ? a : b;
    return m == NEG_INF ? NEG_INF : m + std::log1p(std::exp(-std::fabs(a - b)));
}

}  // namespace

extern "C" {

// One view of the logits: what is asked of them over one temperature. Pointers may be null.
struct View {
    const float* temperature;
    int64_t needs;
    float *reference, *target_logit, *wrong_log_sum, *wrong_entropy, *centered_sum, *sum_weight, *num_finite,
        *top_wrong_logit;
    int64_t* top_wrong_id;
    float *num_wrong, *candidate_logits, *rest_log_sum;
    const float *g_target_logit, *g_wrong_log_sum, *g_wrong_entropy, *g_centered_sum, *g_top_wrong_logit,
        *g_candidate_logits, *g_rest_log_sum;
};

struct Batch {
    const void* logits;
    const int64_t* row_offsets;  // in elements
    int64_t is_bf16, num_rows, num_classes;
    const int64_t* targets;
    int64_t ignore_index;
    const int64_t* candidates;
    int64_t num_candidates;
    const float* class_weight;
    View* views;
    int64_t num_views, num_threads;
    void* gradient;
};
}

namespace {

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
        const vi same = load(x + i) == value;
        for (int k = 0; k < W; ++k) if (same[k]) return i + k;
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
void stats_of_row(const Batch& b, const View& v, int64_t row, const T* z, float* x, const float* weight) {
    const int64_t V = b.num_classes, padded = (V + W - 1) / W * W, y = b.targets[row];
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
    if (with_sum) {
        double finite = s.finite, u = s.u, ud = s.ud;
        if (with_rest && w >= 0) { finite += 1; u += weight ? weight[w] : 1.0f; }
        if (target > MASKED) {
            const double own = weight ? weight[y] : 1.0;
            finite += 1; u += own; ud += own * ((double)target - reference);
        }
        v.num_finite[row] = (float)finite;
        v.sum_weight[row] = (float)u;
        v.centered_sum[row] = (float)ud;
    }
    if (v.needs & COUNT) {
        const double cut = log_sum + std::log(WRONG_EPS);
        const int64_t n = any_wrong ? count_above(x, padded, reference, (float)cut) : 0;
        v.num_wrong[row] = (float)(n + (with_rest && w >= 0));
    }
    if (with_rest) {
        v.rest_log_sum[row] = (float)rest;
        for (int64_t k = 0; k < b.num_candidates; ++k) {
            const int64_t at = row * b.num_candidates + k, c = b.candidates[at];
            v.candidate_logits[at] = c < 0 ? (float)NEG_INF : scaled_at(c);
        }
    }
}

struct Formula { float scale, reference, origin, constant, slope, uniform; };

// out = exp(d - origin) (constant + slope d) + uniform u [finite],  d = x - reference
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
void grad_of_row(const Batch& b, const View& v, int64_t row, const T* z, float* out, const float* weight, bool add) {
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
    const int64_t y = b.targets[row], w = v.top_wrong_id ? v.top_wrong_id[row] : -1;
    const Formula f{(float)inverse_t, v.reference[row], (float)origin, (float)(alpha * scale + offset),
                    (float)(beta * scale), (float)uniform};
    // All that is read of single logits is read here: ``out`` may be where they are.
    const float at_y_before = add ? out[y] : 0.0f, at_w_before = add && w >= 0 ? out[w] : 0.0f;
    auto uniform_at = [&](int64_t i) {
        return load_part(z + i, 1, 0.0f)[0] > MASKED ? uniform * (weight ? weight[i] : 1.0) : 0.0;
    };
    const double uniform_at_y = uniform_at(y), uniform_at_w = w >= 0 ? uniform_at(w) : 0.0;
    if (v.g_wrong_entropy)
        v.g_centered_sum ? apply<T, true, true>(z, out, b.num_classes, f, weight, add)
                         : apply<T, true, false>(z, out, b.num_classes, f, weight, add);
    else
        v.g_centered_sum ? apply<T, false, true>(z, out, b.num_classes, f, weight, add)
                         : apply<T, false, false>(z, out, b.num_classes, f, weight, add);
    if (v.g_rest_log_sum && w >= 0) out[w] = at_w_before + (float)(alpha * inverse + uniform_at_w);
    out[y] = at_y_before + (float)(at(v.g_target_logit) * inverse_t + uniform_at_y);
    if (v.g_top_wrong_logit && w >= 0) out[w] += (float)(at(v.g_top_wrong_logit) * inverse_t);
    if (v.g_candidate_logits)
        for (int64_t k = 0; k < b.num_candidates; ++k) {
            const int64_t i = row * b.num_candidates + k;
            if (b.candidates[i] >= 0) out[b.candidates[i]] += (float)(v.g_candidate_logits[i] * inverse_t);
        }
}

template <class T> void one_row(const Batch& b, int64_t row, float* x, const float* weight) {
    const T* z = (const T*)b.logits + b.row_offsets[row];
    const int64_t V = b.num_classes;
    const bool ignored = b.targets[row] == b.ignore_index;
    if (!b.gradient) {
        if (!ignored) for (int64_t k = 0; k < b.num_views; ++k) stats_of_row<T>(b, b.views[k], row, z, x, weight);
        return;
    }
    T* gradient = (T*)b.gradient + row * V;
    if (ignored) { std::memset((void*)gradient, 0, V * sizeof(T)); return; }
    // In place a second view would find the first one's gradient where it looks for logits.
    const bool direct = sizeof(T) == sizeof(float) && ((const void*)gradient != (const void*)z || b.num_views == 1);
    float* out = direct ? (float*)gradient : x;
    for (int64_t k = 0; k < b.num_views; ++k) grad_of_row<T>(b, b.views[k], row, z, out, weight, k > 0);
    if (direct) return;
    for (int64_t i = 0; i < V; i += W) {
        if (V - i >= W) store(gradient + i, load(x + i)); else store_part(gradient + i, V - i, load(x + i));
    }
}

void run(const Batch& b, std::atomic<int64_t>& next, int64_t step) {
    const int64_t padded = (b.num_classes + W - 1) / W * W;
    std::vector<float> x(padded), weight;
    if (b.class_weight) { weight.assign(padded, 0.0f); std::memcpy(weight.data(), b.class_weight, 4 * b.num_classes); }
    const float* u = b.class_weight ? weight.data() : nullptr;
    for (int64_t start; (start = next.fetch_add(step)) < b.num_rows;)
        for (int64_t row = start; row < b.num_rows && row < start + step; ++row)
            b.is_bf16 ? one_row<uint16_t>(b, row, x.data(), u) : one_row<float>(b, row, x.data(), u);
}

}  // namespace

extern "C" void lossmith_sweep(const Batch* batch) {
    const int64_t worth = 1 + (batch->num_rows * batch->num_classes >> 16);
    const int num_threads = (int)(batch->num_threads < worth ? batch->num_threads : worth);
    const int64_t step = 1 + (1 << 16) / batch->num_classes;
    std::atomic<int64_t> next{0};
#ifdef _OPENMP  // PyTorch's own threads: others would wait for a core while those spin
#pragma omp parallel num_threads(num_threads)
    run(*batch, next, step);
#else
    std::vector<std::thread> threads;
    for (int k = 1; k < num_threads; ++k) threads.emplace_back([&] { run(*batch, next, step); });
    run(*batch, next, step);
    for (auto& t : threads) t.join();
#endif
}
