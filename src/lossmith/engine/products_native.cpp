// Matrix products c (+)= a b in fp32, for processors with AVX-512: a block of b is packed for the
// second-level cache, 12 rows of a for the first, and 12 x 32 sums stay in registers.
// Each factor may be fp32 or bf16 and lie along either of its sides.

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(_OPENMP)
#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <memory>

extern "C" {
// A factor, as k and the other index ("across") find its elements; one of the two strides is 1.
struct Factor {
    const void* data;
    int64_t across, along, is_bf16;
};

struct Product {
    Factor a, b;  // [M, K], [K, N]
    float* c;     // [M, N], rows of this stride:
    int64_t c_stride, M, N, K, is_sum, num_threads;
};
}

namespace {

constexpr int W = 16, MR = 12, NR = 2 * W;
constexpr int64_t KC = 512, NC = 1024;

__mmask16 first(int64_t n) { return n >= W ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }
int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }

inline __m512 load(const Factor& f, int64_t offset, __mmask16 lanes) {
    if (!f.is_bf16) return _mm512_maskz_loadu_ps(lanes, (const float*)f.data + offset);
    const __m256i half = _mm256_maskz_loadu_epi16(lanes, (const uint16_t*)f.data + offset);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline void transpose(__m512 (&r)[W]) {
    __m512 t[W];
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int k = 0; k < 2; ++k) {
            const __m512d x = (__m512d)t[i + k], y = (__m512d)t[i + k + 2];
            r[i + 2 * k] = (__m512)_mm512_unpacklo_pd(x, y);
            r[i + 2 * k + 1] = (__m512)_mm512_unpackhi_pd(x, y);
        }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 8] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
        t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 2; ++k) {
            r[i + 4 * k] = _mm512_shuffle_f32x4(t[i + 8 * k], t[i + 8 * k + 4], 0x88);
            r[i + 4 * k + 8] = _mm512_shuffle_f32x4(t[i + 8 * k], t[i + 8 * k + 4], 0xdd);
        }
}

// A panel [K][R] of a factor that begins at (start, k); 0 past its end, ``left`` away.
template <int R>
void pack(const Factor& f, int64_t start, int64_t left, int64_t k, int64_t K, float* panel) {
    for (int r = 0; r < R; r += W, panel += W) {
        const int64_t at = (start + r) * f.across + k * f.along;
        const __mmask16 there = first(left - r), lanes = first(R - r);
        if (f.across == 1) {
            for (int64_t q = 0; q < K; ++q)
                _mm512_mask_storeu_ps(panel + q * R, lanes, load(f, at + q * f.along, there));
            continue;
        }
        for (int64_t q = 0; q < K; q += W) {
            __m512 rows[W];
            for (int i = 0; i < W; ++i)
                rows[i] = there >> i & 1 ? load(f, at + i * f.across + q, first(K - q)) : _mm512_setzero_ps();
            transpose(rows);
            for (int64_t i = 0; i < least(W, K - q); ++i)
                _mm512_mask_storeu_ps(panel + (q + i) * R, lanes, rows[i]);
        }
    }
}

#ifdef __AVX512BF16__
inline __m512 add_pairs(__m512 sum, __m512 a, __m512 b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
#else
inline __m512 add_pairs(__m512 sum, __m512, __m512) { return sum; }
#endif

// c [12, 32] (+)= of two panels; with PAIRS each of their elements is two of bf16, side by side along k.
template <bool PAIRS>
void full_tile(int64_t K, const float* a, const float* b, float* c, int64_t stride, bool is_sum) {
    __m512 sums[MR][2];
#pragma GCC unroll 12
    for (int i = 0; i < MR; ++i) {
        sums[i][0] = sums[i][1] = _mm512_setzero_ps();
        _mm_prefetch((const char*)(c + i * stride), _MM_HINT_T0);
        _mm_prefetch((const char*)(c + i * stride + W), _MM_HINT_T0);
    }
    for (; K > 0; --K, a += MR, b += NR) {
        const __m512 b0 = _mm512_load_ps(b), b1 = _mm512_load_ps(b + W);
#pragma GCC unroll 12
        for (int i = 0; i < MR; ++i) {
            const __m512 x = _mm512_set1_ps(a[i]);
            sums[i][0] = PAIRS ? add_pairs(sums[i][0], x, b0) : _mm512_fmadd_ps(x, b0, sums[i][0]);
            sums[i][1] = PAIRS ? add_pairs(sums[i][1], x, b1) : _mm512_fmadd_ps(x, b1, sums[i][1]);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < MR; ++i)
        for (int k = 0; k < 2; ++k) {
            float* at = c + i * stride + k * W;
            _mm512_storeu_ps(at, is_sum ? _mm512_add_ps(_mm512_loadu_ps(at), sums[i][k]) : sums[i][k]);
        }
}

template <bool PAIRS>
void tile(int64_t m, int64_t n, int64_t K, const float* a, const float* b, float* c, int64_t stride, bool is_sum) {
    if (m >= MR && n >= NR) return full_tile<PAIRS>(K, a, b, c, stride, is_sum);
    float whole[MR * NR];
    full_tile<PAIRS>(K, a, b, whole, NR, false);
    for (int64_t i = 0; i < least(m, MR); ++i)
        for (int64_t j = 0; j < least(n, NR); ++j)
            c[i * stride + j] = whole[i * NR + j] + (is_sum ? c[i * stride + j] : 0.0f);
}

template <bool PAIRS>
void product(const Product& p) {
    const int64_t panels = (p.M + MR - 1) / MR, depth = least(KC, p.K), width = least(NC, (p.N + NR - 1) / NR * NR);
    // Two blocks of b: while some threads still multiply with one, others pack the next.
    const std::unique_ptr<float, decltype(&std::free)> blocks(
        (float*)std::aligned_alloc(64, 2 * depth * width * sizeof(float)), &std::free);
#pragma omp parallel num_threads((int)p.num_threads)
    {
        float a[KC * MR];
        bool turn = false;
        for (int64_t j = 0; j < p.N; j += width)
            for (int64_t k = 0; k < p.K; k += depth, turn = !turn) {
                const int64_t n = least(width, p.N - j), K = least(depth, p.K - k);
                float* b = blocks.get() + turn * depth * width;
#pragma omp for schedule(static)
                for (int64_t q = 0; q < n; q += NR) pack<NR>(p.b, j + q, n - q, k, K, b + q * K);
#pragma omp for schedule(dynamic) nowait
                for (int64_t i = 0; i < panels; ++i) {
                    pack<MR>(p.a, i * MR, p.M - i * MR, k, K, a);
                    float* c = p.c + i * MR * p.c_stride + j;
                    for (int64_t q = 0; q < n; q += NR)
                        tile<PAIRS>(p.M - i * MR, n - q, K, a, b + q * K, c + q, p.c_stride, p.is_sum || k > 0);
                }
            }
    }
}

// Rows of bf16 that both lie along k, as rows of half as many pairs.
bool has_pairs(const Factor& f, int64_t K) {
#ifdef __AVX512BF16__
    return f.is_bf16 && f.along == 1 && f.across % 2 == 0 && K % 2 == 0;
#else
    return false;
#endif
}

}  // namespace

extern "C" void lossmith_product(const Product* given) {
    Product p = *given;
    if (!has_pairs(p.a, p.K) || !has_pairs(p.b, p.K)) return product<false>(p);
    p.K /= 2;
    for (Factor* f : {&p.a, &p.b}) f->across /= 2, f->is_bf16 = 0;
    product<true>(p);
}
#endif
