// Matrix products c (+)= a b with fp32 sums, for processors with AVX-512. A block of b is packed where all
// threads find it, 12 rows of a where the core itself does, and 12 x 32 sums stay in registers.
// Each factor may be fp32 or bf16 and lie along either of its sides.

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(_OPENMP)
#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <memory>

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

namespace {

// The depth of a panel is its number of rows: elements along k, or pairs of them.
constexpr int W = 16, MR = 12, NR = 2 * W;
constexpr int64_t DEPTH = 512, WIDTH = 1024;  // of a block of b
constexpr int64_t SUMMED = 128;               // summed at a time, which is as exact as MKL
constexpr int64_t WORTH_A_THREAD = 1 << 20;   // multiply-adds

int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }
int64_t parts(int64_t x, int64_t size) { return (x + size - 1) / size; }

// The first n lanes of 16.
__mmask16 first(int64_t n) { return n >= W ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

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

// A panel [depth][R] of the K elements along k from ``k`` on and of what begins ``start`` across, where ``left``
// are left; 0 past the ends. With PAIRS each of its elements is two of bf16 that are neighbours along k.
template <int R, bool PAIRS>
void pack(const Factor& f, int64_t start, int64_t left, int64_t k, int64_t K, float* panel) {
    constexpr int STEP = PAIRS ? 2 : 1;
    for (int r = 0; r < R; r += W, panel += W) {
        const int64_t at = (start + r) * f.across + k * f.along;
        const __mmask16 there = first(left - r), lanes = first(R - r);
        if (f.across == 1) {
            for (int64_t q = 0; q < K; q += STEP) {
                const int64_t offset = at + q * f.along;
                __m512 row;
                if constexpr (PAIRS) {
                    const __m512i second = halves(f, offset + f.along, q + 1 < K ? there : 0);
                    row = (__m512)_mm512_or_epi32(halves(f, offset, there), _mm512_slli_epi32(second, 16));
                } else {
                    row = load(f, offset, there);
                }
                _mm512_mask_storeu_ps(panel + q / STEP * R, lanes, row);
            }
            continue;
        }
        for (int64_t q = 0; q < K; q += STEP * W) {
            __m512 across[W];
            for (int i = 0; i < W; ++i) {
                const int64_t offset = at + i * f.across + q;
                if (!(there >> i & 1)) {
                    across[i] = _mm512_setzero_ps();
                } else if constexpr (PAIRS) {
                    const __mmask32 some = K - q >= 2 * W ? ~0u : (1u << (K - q)) - 1;
                    across[i] = (__m512)_mm512_maskz_loadu_epi16(some, (const uint16_t*)f.data + offset);
                } else {
                    across[i] = load(f, offset, first(K - q));
                }
            }
            transpose(across);
            for (int64_t i = 0; i < W && q + i * STEP < K; ++i)
                _mm512_mask_storeu_ps(panel + (q / STEP + i) * R, lanes, across[i]);
        }
    }
}

template <bool PAIRS>
inline __m512 multiply_add(__m512 a, __m512 b, __m512 sum) {
#ifdef __AVX512BF16__
    if constexpr (PAIRS) return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#endif
    return _mm512_fmadd_ps(a, b, sum);
}

// c [12, 32] (+)= of two panels. The loops over the sums are unrolled, or they would not stay in registers.
template <bool PAIRS>
void multiply_panels(int64_t depth, const float* a, const float* b, float* c, int64_t stride, bool is_sum) {
    __m512 sums[MR][2];
#pragma GCC unroll 12
    for (int i = 0; i < MR; ++i) {
        sums[i][0] = sums[i][1] = _mm512_setzero_ps();
        _mm_prefetch((const char*)(c + i * stride), _MM_HINT_T0);
        _mm_prefetch((const char*)(c + i * stride + W), _MM_HINT_T0);
    }
    for (; depth > 0; --depth, a += MR, b += NR) {
        const __m512 b0 = _mm512_load_ps(b), b1 = _mm512_load_ps(b + W);
#pragma GCC unroll 12
        for (int i = 0; i < MR; ++i) {
            const __m512 x = _mm512_set1_ps(a[i]);
            sums[i][0] = multiply_add<PAIRS>(x, b0, sums[i][0]);
            sums[i][1] = multiply_add<PAIRS>(x, b1, sums[i][1]);
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
void full_tile(int64_t depth, const float* a, const float* b, float* c, int64_t stride, bool is_sum) {
    for (int64_t k = 0; k < depth; k += SUMMED, is_sum = true)
        multiply_panels<PAIRS>(least(SUMMED, depth - k), a + k * MR, b + k * NR, c, stride, is_sum);
}

// A tile with m rows and n columns left.
template <bool PAIRS>
void tile(int64_t m, int64_t n, int64_t depth, const float* a, const float* b, float* c, int64_t stride, bool is_sum) {
    if (m >= MR && n >= NR) return full_tile<PAIRS>(depth, a, b, c, stride, is_sum);
    float whole[MR * NR];
    full_tile<PAIRS>(depth, a, b, whole, NR, false);
    for (int64_t i = 0; i < least(m, MR); ++i)
        for (int64_t j = 0; j < least(n, NR); ++j)
            c[i * stride + j] = whole[i * NR + j] + (is_sum ? c[i * stride + j] : 0.0f);
}

template <bool PAIRS>
bool product(const Product& p) {
    constexpr int64_t STEP = PAIRS ? 2 : 1;
    const int64_t panels = parts(p.M, MR);
    const int64_t depth = least(DEPTH, parts(p.K, STEP)), width = least(WIDTH, parts(p.N, NR) * NR);
    const int64_t threads = least(p.num_threads, 1 + p.M * p.N * p.K / WORTH_A_THREAD);
    // A task is a panel of a with a strip of the block; as many that the threads end together.
    const int64_t strip = parts(parts(width, NR), parts(3 * threads, panels)) * NR;
    // Two blocks of b: while some threads still multiply with one, others pack the next.
    const std::unique_ptr<float, decltype(&std::free)> blocks(
        (float*)std::aligned_alloc(64, 2 * depth * width * sizeof(float)), &std::free);
    if (!blocks) return false;
#pragma omp parallel num_threads((int)threads)
    {
        float a[DEPTH * MR];
        bool turn = false;
        for (int64_t j = 0; j < p.N; j += width)
            for (int64_t k = 0; k < p.K; k += STEP * depth, turn = !turn) {
                const int64_t n = least(width, p.N - j), K = least(STEP * depth, p.K - k);
                const int64_t depth_here = parts(K, STEP);
                float* b = blocks.get() + turn * depth * width;
#pragma omp for schedule(static)
                for (int64_t q = 0; q < n; q += NR) pack<NR, PAIRS>(p.b, j + q, n - q, k, K, b + q * depth_here);
#pragma omp for collapse(2) schedule(dynamic) nowait
                for (int64_t i = 0; i < panels; ++i)
                    for (int64_t s = 0; s < n; s += strip) {
                        pack<MR, PAIRS>(p.a, i * MR, p.M - i * MR, k, K, a);
                        float* c = p.c + i * MR * p.c_stride + j;
                        for (int64_t q = s; q < least(n, s + strip); q += NR)
                            tile<PAIRS>(p.M - i * MR, n - q, depth_here, a, b + q * depth_here, c + q,
                                        p.c_stride, p.is_sum || k > 0);
                    }
            }
    }
    return true;
}

}  // namespace

extern "C" {
// Whether these products are faster than others: of bf16 pairs wherever they can be; of fp32 where MKL does
// not use AVX-512.
int64_t lossmith_is_for(int64_t both_are_bf16) {
#ifdef __AVX512BF16__
    if (both_are_bf16) return 1;
#endif
    return !__builtin_cpu_is("intel");
}

// 0 where there is no memory for it.
int64_t lossmith_product(const Product* p) {
#ifdef __AVX512BF16__
    if (p->a.is_bf16 && p->b.is_bf16) return product<true>(*p);
#endif
    return product<false>(*p);
}
}
#endif
