// Matrix products c (+)= a b in fp32, for processors with AVX-512: a block of b is packed for the
// second-level cache, 12 rows of a for the first, and 12 x 32 sums stay in registers.
// Each factor may be fp32 or bf16 and lie along either of its sides.

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(_OPENMP)
#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
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
constexpr int64_t KC = 512, NC = 1024, SUMMED = 128;

__mmask16 first(int64_t n) { return n >= W ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }
int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }

inline __m512i halves(const Factor& f, int64_t offset, __mmask16 lanes) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, (const uint16_t*)f.data + offset));
}
inline __m512 load(const Factor& f, int64_t offset, __mmask16 lanes) {
    if (!f.is_bf16) return _mm512_maskz_loadu_ps(lanes, (const float*)f.data + offset);
    return (__m512)_mm512_slli_epi32(halves(f, offset, lanes), 16);
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

// A panel [K][R] of a factor that begins ``start`` across, where ``left`` are left, and at ``k``; 0 past the ends.
// With PAIRS it is [K / 2][R], each of its elements two of bf16 that are neighbours along k.
template <int R, bool PAIRS>
void pack(const Factor& f, int64_t start, int64_t left, int64_t k, int64_t K, float* panel) {
    constexpr int STEP = PAIRS ? 2 : 1;
    for (int r = 0; r < R; r += W, panel += W) {
        const int64_t at = (start + r) * f.across + k * f.along;
        const __mmask16 there = first(left - r), lanes = first(R - r);
        if (f.across == 1) {
            for (int64_t q = 0; q < K; q += STEP) {
                const int64_t offset = at + q * f.along;
                __m512 row = load(f, offset, there);
                if (PAIRS) {
                    const __m512i second = halves(f, offset + f.along, q + 1 < K ? there : 0);
                    row = (__m512)_mm512_or_epi32(halves(f, offset, there), _mm512_slli_epi32(second, 16));
                }
                _mm512_mask_storeu_ps(panel + q / STEP * R, lanes, row);
            }
            continue;
        }
        for (int64_t q = 0; q < K; q += STEP * W) {
            __m512 rows[W];
            for (int i = 0; i < W; ++i) {
                const int64_t offset = at + i * f.across + q;
                const uint32_t some = K - q >= 2 * W ? ~0u : (1u << (K - q)) - 1;
                if (!(there >> i & 1)) rows[i] = _mm512_setzero_ps();
                else if (PAIRS) rows[i] = (__m512)_mm512_maskz_loadu_epi16(some, (const uint16_t*)f.data + offset);
                else rows[i] = load(f, offset, first(K - q));
            }
            transpose(rows);
            for (int64_t i = 0; i < W && q + i * STEP < K; ++i)
                _mm512_mask_storeu_ps(panel + (q / STEP + i) * R, lanes, rows[i]);
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

// c [12, 32] (+)= of two panels [K][12] and [K][32].
template <bool PAIRS>
void sums_of(int64_t K, const float* a, const float* b, float* c, int64_t stride, bool is_sum) {
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

// The same, in sums short enough that they are as exact as MKL's.
template <bool PAIRS>
void full_tile(int64_t K, const float* a, const float* b, float* c, int64_t stride, bool is_sum) {
    for (int64_t k = 0; k < K; k += SUMMED, is_sum = true)
        sums_of<PAIRS>(least(SUMMED, K - k), a + k * MR, b + k * NR, c, stride, is_sum);
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
    constexpr int64_t STEP = PAIRS ? 2 : 1;
    const int64_t panels = (p.M + MR - 1) / MR;
    const int64_t depth = least(KC, (p.K + STEP - 1) / STEP), width = least(NC, (p.N + NR - 1) / NR * NR);
    // Two blocks of b: while some threads still multiply with one, others pack the next.
    const std::unique_ptr<float, decltype(&std::free)> blocks(
        (float*)std::aligned_alloc(64, 2 * depth * width * sizeof(float)), &std::free);
#pragma omp parallel num_threads((int)p.num_threads)
    {
        float a[KC * MR];
        bool turn = false;
        for (int64_t j = 0; j < p.N; j += width)
            for (int64_t k = 0; k < p.K; k += STEP * depth, turn = !turn) {
                const int64_t n = least(width, p.N - j), K = least(STEP * depth, p.K - k);
                const int64_t rows = (K + STEP - 1) / STEP;
                float* b = blocks.get() + turn * depth * width;
#pragma omp for schedule(static)
                for (int64_t q = 0; q < n; q += NR) pack<NR, PAIRS>(p.b, j + q, n - q, k, K, b + q * rows);
#pragma omp for schedule(dynamic) nowait
                for (int64_t i = 0; i < panels; ++i) {
                    pack<MR, PAIRS>(p.a, i * MR, p.M - i * MR, k, K, a);
                    float* c = p.c + i * MR * p.c_stride + j;
                    for (int64_t q = 0; q < n; q += NR)
                        tile<PAIRS>(p.M - i * MR, n - q, rows, a, b + q * rows, c + q, p.c_stride, p.is_sum || k > 0);
                }
            }
    }
}

}  // namespace

extern "C" {
#ifdef __AVX512BF16__
int64_t lossmith_multiplies_pairs() { return 1; }
#else
int64_t lossmith_multiplies_pairs() { return 0; }
#endif

void lossmith_product(const Product* p) {
    lossmith_multiplies_pairs() && p->a.is_bf16 && p->b.is_bf16 ? product<true>(*p) : product<false>(*p);
}
}
#endif
