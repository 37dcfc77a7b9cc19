// Products of pairs of bf16 numbers, where the instruction set has them. As assembly: so units need no flag of their
// own, and nothing else in them can come to use what not every AVX-512 machine runs (`runs_bf16` in isa.cpp asks).
#pragma once

#include "../vec.h"

namespace pk {
namespace PK_ISA {

// Two bf16 numbers of neighbouring channels, the first one in the lower half: all of the GEMM's bookkeeping is that of
// floats with half the channels.
struct Pair {
  float bits;
};

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
constexpr bool kHasBf16 = true;

// acc + a.low * b.low + a.high * b.high, lane by lane, in fp32; subnormal numbers count as zeros.
PK_INLINE vec dot_pairs(vec a, vec b, vec acc) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(b), "v"(a));
  return acc;
}

// Rounded to nearest, halves to even; NaN stays NaN.
PK_INLINE __m256i to_bf16(vec x) {
  __m256i y;
  asm("vcvtneps2bf16 %1, %0" : "=v"(y) : "v"(x));
  return y;
}

// The first n of kLanes floats, as pairs: an odd one gets a zero.
PK_INLINE void store_bf16(uint16_t* p, vec x, int64_t n) {
  const uint32_t lanes = n >= kLanes ? 0xffff : (1u << ((n + 1) & ~int64_t(1))) - 1;
  _mm256_mask_storeu_epi16(p, __mmask16(lanes), to_bf16(x));
}

#else
constexpr bool kHasBf16 = false;

// Never run: Gemm and ToBf16 refuse to be made.
PK_INLINE vec dot_pairs(vec, vec, vec acc) { return acc; }
PK_INLINE void store_bf16(uint16_t*, vec, int64_t) {}
#endif

PK_INLINE vec load_weight(const Pair* p) { return load(&p->bits); }
PK_INLINE vec multiply_add(vec a, vec b, vec acc, const Pair*) { return dot_pairs(a, b, acc); }

}  // namespace PK_ISA
}  // namespace pk
