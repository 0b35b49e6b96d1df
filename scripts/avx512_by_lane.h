// The instructions of AVX-512 that the sources use, lane by lane, for scripts/native_asan: they run on any
// processor, and a sanitizer sees which lanes are read and written, which it does not of the real ones.

#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

typedef int32_t lanes_i __attribute__((vector_size(64)));
typedef uint16_t lanes_h __attribute__((vector_size(64)));
typedef double lanes_d __attribute__((vector_size(64)));
typedef uint16_t half_lanes_h __attribute__((vector_size(32)));

#define EACH(n) for (int i = 0; i < (n); ++i)

inline __m512 lane_set1(float x) { __m512 r{}; EACH(16) r[i] = x; return r; }
inline __m512 lane_setzero() { return __m512{}; }
inline __m512 lane_add(__m512 a, __m512 b) { return a + b; }
inline __m512 lane_fmadd(__m512 a, __m512 b, __m512 c) { EACH(16) a[i] = std::fma(a[i], b[i], c[i]); return a; }
inline __m512 lane_min(__m512 a, __m512 b) { EACH(16) a[i] = a[i] < b[i] ? a[i] : b[i]; return a; }
inline __m512 lane_round(__m512 a) { EACH(16) a[i] = std::nearbyint(a[i]); return a; }
inline __mmask16 lane_test(__m512i a, __m512i b) { uint32_t m = 0; EACH(16) m |= (uint32_t)((((lanes_i)a)[i] & ((lanes_i)b)[i]) != 0) << i; return m; }
inline __mmask16 lane_less(__m512 a, __m512 b) { uint32_t m = 0; EACH(16) m |= (uint32_t)(a[i] < b[i]) << i; return m; }
inline __m512 lane_mask_scalef(__m512 src, __mmask16 m, __m512 a, __m512 b) {
    EACH(16) if (m >> i & 1) src[i] = std::isfinite(b[i]) ? std::ldexp(a[i], (int)std::floor(b[i])) : a[i] * b[i];
    return src;
}

inline __m512 lane_loadu(const float* p) { __m512 r{}; EACH(16) r[i] = p[i]; return r; }
inline __m512 lane_load(const float* p) { if ((uintptr_t)p & 63) std::abort(); return lane_loadu(p); }
inline void lane_storeu(float* p, __m512 a) { EACH(16) p[i] = a[i]; }
inline __m512 lane_maskz_loadu(__mmask16 m, const float* p) { __m512 r{}; EACH(16) if (m >> i & 1) r[i] = p[i]; return r; }
inline void lane_mask_storeu(float* p, __mmask16 m, __m512 a) { EACH(16) if (m >> i & 1) p[i] = a[i]; }
inline __m256i lane_maskz_loadu_half(__mmask16 m, const uint16_t* p) {
    half_lanes_h r{}; EACH(16) if (m >> i & 1) r[i] = p[i];
    return (__m256i)r;
}
inline __m512i lane_maskz_loadu_halves(__mmask32 m, const uint16_t* p) {
    lanes_h r{}; EACH(32) if (m >> i & 1) r[i] = p[i];
    return (__m512i)r;
}

inline __m512i lane_widen(__m256i a) { lanes_i r{}; EACH(16) r[i] = ((half_lanes_h)a)[i]; return (__m512i)r; }
inline __m512i lane_slli(__m512i a, int n) { lanes_i r = (lanes_i)a; EACH(16) r[i] = (int32_t)((uint32_t)r[i] << n); return (__m512i)r; }
inline __m512i lane_or(__m512i a, __m512i b) { return a | b; }
template <int FIRST> inline __m512 lane_unpack(__m512 a, __m512 b) {
    __m512 r{};
    for (int q = 0; q < 16; q += 4)
        for (int k = 0; k < 2; ++k) { r[q + 2 * k] = a[q + FIRST + k]; r[q + 2 * k + 1] = b[q + FIRST + k]; }
    return r;
}
template <int FIRST> inline __m512d lane_unpack_d(__m512d a, __m512d b) {
    __m512d r{};
    for (int q = 0; q < 8; q += 2) { r[q] = a[q + FIRST]; r[q + 1] = b[q + FIRST]; }
    return r;
}
inline __m512 lane_shuffle(__m512 a, __m512 b, int which) {
    __m512 r{};
    for (int q = 0; q < 4; ++q) {
        const float* from = (const float*)(q < 2 ? &a : &b) + 4 * ((which >> (2 * q)) & 3);
        for (int k = 0; k < 4; ++k) r[4 * q + k] = from[k];
    }
    return r;
}
inline __m512 lane_dpbf16(__m512 sum, __m512 a, __m512 b) {
    auto at = [](__m512 x, int i) {
        const uint32_t bits = (uint32_t)((lanes_h)x)[i] << 16;
        float f; std::memcpy(&f, &bits, 4); return f;
    };
    EACH(16) sum[i] += at(a, 2 * i + 1) * at(b, 2 * i + 1) + at(a, 2 * i) * at(b, 2 * i);
    return sum;
}

// The macros come after <immintrin.h>, which would otherwise take the instructions for allowed.
#undef __AVX512F__
#undef __AVX512BW__
#undef __AVX512VL__
#undef __AVX512BF16__
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#ifdef WITH_BF16
#define __AVX512BF16__ 1
#endif

#undef _mm512_cmp_ps_mask
#undef _mm512_roundscale_ps
#undef _mm512_shuffle_f32x4
#undef _mm512_slli_epi32
#define _mm512_set1_ps lane_set1
#define _mm512_setzero_ps lane_setzero
#define _mm512_add_ps lane_add
#define _mm512_fmadd_ps lane_fmadd
#define _mm512_min_ps lane_min
#define _mm512_roundscale_ps(a, mode) lane_round(a)
#define _mm512_test_epi32_mask lane_test
#define _mm512_cmp_ps_mask(a, b, mode) lane_less(a, b)
#define _mm512_mask_scalef_ps lane_mask_scalef
#define _mm512_loadu_ps lane_loadu
#define _mm512_load_ps lane_load
#define _mm512_storeu_ps lane_storeu
#define _mm512_maskz_loadu_ps lane_maskz_loadu
#define _mm512_mask_storeu_ps lane_mask_storeu
#define _mm256_maskz_loadu_epi16 lane_maskz_loadu_half
#define _mm512_maskz_loadu_epi16 lane_maskz_loadu_halves
#define _mm512_cvtepu16_epi32 lane_widen
#define _mm512_slli_epi32 lane_slli
#define _mm512_or_epi32 lane_or
#define _mm512_unpacklo_ps lane_unpack<0>
#define _mm512_unpackhi_ps lane_unpack<2>
#define _mm512_unpacklo_pd lane_unpack_d<0>
#define _mm512_unpackhi_pd lane_unpack_d<1>
#define _mm512_shuffle_f32x4 lane_shuffle
#define __m512bh __m512
#define _mm512_dpbf16_ps lane_dpbf16
