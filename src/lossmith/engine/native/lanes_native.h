// fp32 lanes, as many as a vector of the processor has (wider ones, taken apart by the compiler, are six times
// slower): exp, and fp32 or bf16 memory in and out.

#pragma once

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

namespace {

// lanes
#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

vf splat(float x) { return x - vf{}; }
vf select(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

// exp to about 1 ulp; 0 below the smallest normal number; NaN stays NaN.
// Fused, and with AVX-512 scaled by one instruction, it takes half as long.
#if defined(__AVX512F__)
inline vf fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif defined(__AVX2__) && defined(__FMA__)
inline vf fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#else
inline vf fma(vf a, vf b, vf c) { return a * b + c; }
#endif
// exp of what is left of a number without its multiples of log 2
inline vf exp_of_rest(vf r) {
    vf p = fma(r, splat(1.9875691500e-4f), splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    return fma(p, r * r, r + 1.0f);
}
#if defined(__AVX512F__)
inline vf vexp(vf x) {
    const __mmask16 underflows = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.3f), _CMP_LT_OQ);
    x = (vf)_mm512_min_ps(_mm512_set1_ps(88.0f), (__m512)x);  // NaN is the second operand, and stays
    const vf n = (vf)_mm512_roundscale_ps((__m512)(x * 1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const vf r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
    const vf p = exp_of_rest(r);
    return (vf)_mm512_mask_scalef_ps(_mm512_setzero_ps(), (__mmask16)~underflows, (__m512)p, (__m512)n);
}
#elif defined(__AVX2__) && defined(__FMA__)
inline vf vexp(vf x) {
    const vi underflows = x < -87.3f;
    x = (vf)_mm256_min_ps(_mm256_set1_ps(88.0f), (__m256)x);  // NaN is the second operand, and stays
    const vf n = (vf)_mm256_round_ps((__m256)(x * 1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const vf p = exp_of_rest(fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x)));
    const vi power = ((vi)_mm256_cvtps_epi32((__m256)n) + 127) << 23;
    return (vf)(~underflows & (vi)(p * (vf)power));
}
#else
inline vf vexp(vf x) {
    const vi underflows = x < -87.3f;
    x = select(x > 88.0f, splat(88.0f), x);
    const vf magic = splat(12582912.0f);  // adding 1.5 * 2^23 rounds to an integer
    const vf n = (x * 1.44269504f + magic) - magic;
    const vf r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    const vf p = exp_of_rest(r);
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
// A bit for each lane that is true.
inline unsigned bits(vi mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#elif defined(__AVX__)
    return _mm256_movemask_ps((__m256)mask);
#else
    unsigned found = 0;
    for (int k = 0; k < W; ++k) found |= (unsigned)(mask[k] & 1) << k;
    return found;
#endif
}
inline double total(vf v) { double s = 0; for (int k = 0; k < W; ++k) s += v[k]; return s; }
inline float widest(vf v) { float m = v[0]; for (int k = 1; k < W; ++k) m = v[k] > m ? v[k] : m; return m; }

}  // namespace
