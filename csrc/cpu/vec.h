// One register of floats on the instruction set that a kernel unit is compiled for.
//
// Units in kernels/ are compiled once per instruction set (setup.py), each time with PK_ISA defined as the name of
// the namespace that everything ends up in: avx512, avx2 or portable. Nothing here may be used outside of such a
// unit. Write kernels with these functions only, and every instruction set comes for free.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef PK_ISA
#define PK_ISA portable
#endif

#define PK_INLINE inline __attribute__((always_inline))

namespace pk {
namespace PK_ISA {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

using vec = __m512;
using lanemask = __mmask16;
constexpr int kLanes = 16;
constexpr int kRegisters = 32;

PK_INLINE vec set(float x) { return _mm512_set1_ps(x); }
PK_INLINE vec load(const float* p) { return _mm512_loadu_ps(p); }
PK_INLINE vec load(const float* p, lanemask m) { return _mm512_maskz_loadu_ps(m, p); }
PK_INLINE void store(float* p, vec x) { _mm512_storeu_ps(p, x); }
PK_INLINE void store(float* p, vec x, lanemask m) { _mm512_mask_storeu_ps(p, m, x); }
// The first n lanes (all of them from kLanes on).
PK_INLINE lanemask first(int64_t n) { return n >= kLanes ? 0xffff : n <= 0 ? 0 : lanemask((1u << n) - 1); }
PK_INLINE lanemask from_bits(uint32_t bits) { return lanemask(bits); }
PK_INLINE vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
PK_INLINE vec add(vec a, vec b) { return _mm512_add_ps(a, b); }
PK_INLINE vec sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
PK_INLINE vec mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
PK_INLINE vec div(vec a, vec b) { return _mm512_div_ps(a, b); }
// As x86 has it: the second operand where either is NaN.
PK_INLINE vec max(vec a, vec b) { return _mm512_max_ps(a, b); }
PK_INLINE vec min(vec a, vec b) { return _mm512_min_ps(a, b); }
PK_INLINE vec sqrt(vec a) { return _mm512_sqrt_ps(a); }
// To the nearest integer, halves to even.
PK_INLINE vec round(vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
PK_INLINE vec floor(vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
PK_INLINE lanemask greater(vec a, vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
PK_INLINE lanemask is_nan(vec a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
// a where the mask is set, else b.
PK_INLINE vec select(lanemask m, vec a, vec b) { return _mm512_mask_blend_ps(m, b, a); }
PK_INLINE vec abs(vec a) { return _mm512_abs_ps(a); }
// x * 2^n for whole n in [-126, 127].
PK_INLINE vec scale2(vec x, vec n) { return _mm512_scalef_ps(x, n); }
PK_INLINE float sum(vec a) { return _mm512_reduce_add_ps(a); }
PK_INLINE float largest(vec a) { return _mm512_reduce_max_ps(a); }
// kLanes IEEE half-precision numbers, widened.
PK_INLINE vec load_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

#elif defined(__AVX2__) && defined(__FMA__)

using vec = __m256;
using lanemask = __m256i;
constexpr int kLanes = 8;
constexpr int kRegisters = 16;

PK_INLINE vec set(float x) { return _mm256_set1_ps(x); }
PK_INLINE vec load(const float* p) { return _mm256_loadu_ps(p); }
PK_INLINE vec load(const float* p, lanemask m) { return _mm256_maskload_ps(p, m); }
PK_INLINE void store(float* p, vec x) { _mm256_storeu_ps(p, x); }
PK_INLINE void store(float* p, vec x, lanemask m) { _mm256_maskstore_ps(p, m, x); }
PK_INLINE lanemask first(int64_t n) {
  const int k = n > 8 ? 8 : n < 0 ? 0 : int(n);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(k), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
PK_INLINE lanemask from_bits(uint32_t bits) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), bit), bit);
}
PK_INLINE vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
PK_INLINE vec add(vec a, vec b) { return _mm256_add_ps(a, b); }
PK_INLINE vec sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
PK_INLINE vec mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
PK_INLINE vec div(vec a, vec b) { return _mm256_div_ps(a, b); }
PK_INLINE vec max(vec a, vec b) { return _mm256_max_ps(a, b); }
PK_INLINE vec min(vec a, vec b) { return _mm256_min_ps(a, b); }
PK_INLINE vec sqrt(vec a) { return _mm256_sqrt_ps(a); }
PK_INLINE vec round(vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
PK_INLINE vec floor(vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
PK_INLINE lanemask greater(vec a, vec b) { return _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
PK_INLINE lanemask is_nan(vec a) { return _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }
PK_INLINE vec select(lanemask m, vec a, vec b) { return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(m)); }
PK_INLINE vec abs(vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), a); }
PK_INLINE vec scale2(vec x, vec n) {
  const __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(x, _mm256_castsi256_ps(e));
}
PK_INLINE float sum(vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
PK_INLINE float largest(vec a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
PK_INLINE vec load_half(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

#else  // four lanes in the compiler's own vectors: SSE2 and NEON alike

typedef float vec __attribute__((vector_size(16)));
typedef int32_t lanemask __attribute__((vector_size(16)));
constexpr int kLanes = 4;
constexpr int kRegisters = 16;

PK_INLINE vec set(float x) { return vec{x, x, x, x}; }
PK_INLINE vec load(const float* p) { vec x; std::memcpy(&x, p, sizeof x); return x; }
PK_INLINE vec load(const float* p, lanemask m) {
  vec x{};
  for (int i = 0; i < kLanes; ++i) if (m[i]) x[i] = p[i];
  return x;
}
PK_INLINE void store(float* p, vec x) { std::memcpy(p, &x, sizeof x); }
PK_INLINE void store(float* p, vec x, lanemask m) {
  for (int i = 0; i < kLanes; ++i) if (m[i]) p[i] = x[i];
}
PK_INLINE lanemask first(int64_t n) {
  const int32_t k = n > kLanes ? kLanes : int32_t(n);
  return lanemask{k, k, k, k} > lanemask{0, 1, 2, 3};
}
PK_INLINE lanemask from_bits(uint32_t bits) {
  const int32_t b = int32_t(bits);
  return (lanemask{b, b, b, b} & lanemask{1, 2, 4, 8}) != 0;
}
PK_INLINE vec fma(vec a, vec b, vec c) { return a * b + c; }
PK_INLINE vec add(vec a, vec b) { return a + b; }
PK_INLINE vec sub(vec a, vec b) { return a - b; }
PK_INLINE vec mul(vec a, vec b) { return a * b; }
PK_INLINE vec div(vec a, vec b) { return a / b; }
PK_INLINE vec max(vec a, vec b) { return a > b ? a : b; }
PK_INLINE vec min(vec a, vec b) { return a < b ? a : b; }
PK_INLINE vec sqrt(vec a) { for (int i = 0; i < kLanes; ++i) a[i] = std::sqrt(a[i]); return a; }
PK_INLINE vec round(vec a) { for (int i = 0; i < kLanes; ++i) a[i] = std::nearbyint(a[i]); return a; }
PK_INLINE vec floor(vec a) { for (int i = 0; i < kLanes; ++i) a[i] = std::floor(a[i]); return a; }
PK_INLINE lanemask greater(vec a, vec b) { return a > b; }
PK_INLINE lanemask is_nan(vec a) { return a != a; }
PK_INLINE vec select(lanemask m, vec a, vec b) { return m ? a : b; }
PK_INLINE vec abs(vec a) { return select(a < 0.f, -a, a + 0.f); }
PK_INLINE vec scale2(vec x, vec n) {
  const lanemask e = (__builtin_convertvector(n, lanemask) + 127) << 23;
  vec s;
  std::memcpy(&s, &e, sizeof s);
  return x * s;
}
PK_INLINE float sum(vec a) { return (a[0] + a[1]) + (a[2] + a[3]); }
PK_INLINE float largest(vec a) {
  float m = a[0];
  for (int i = 1; i < kLanes; ++i) if (a[i] > m) m = a[i];
  return m;
}
PK_INLINE vec load_half(const uint16_t* p) {
  vec x;
  for (int i = 0; i < kLanes; ++i) {  // by integers: not every compiler has a half type
    const uint32_t sign = uint32_t(p[i] & 0x8000) << 16, rest = p[i] & 0x7fff;
    uint32_t bits;
    float f;
    if (rest >= 0x7c00) {
      bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
      std::memcpy(&f, &bits, 4);
    } else if (rest >= 0x400) {
      bits = sign | ((rest << 13) + 0x38000000);
      std::memcpy(&f, &bits, 4);
    } else {
      f = float(rest) * 5.9604644775390625e-8f;  // 2^-24: a subnormal
      if (sign) f = -f;
    }
    x[i] = f;
  }
  return x;
}

#endif

PK_INLINE vec zero() { return set(0.f); }
// NaN stays NaN, as in torch.
PK_INLINE vec clamp(vec x, vec low, vec high) { return min(high, max(low, x)); }
// acc or x, NaN where either is.
PK_INLINE vec max_nan(vec acc, vec x) { return select(is_nan(acc), acc, max(acc, x)); }

}  // namespace PK_ISA
}  // namespace pk
