// Lane shuffles and other small parts of the planar kernels, and memory without standard templates (op.h says why).
#pragma once

#include <cstdlib>

#include "../op.h"
#include "../vec.h"

namespace pk {
namespace PK_ISA {
namespace planar {

// Elements 0, 2, 4, ... (evens) or 1, 3, 5, ... (odds) of the two registers' 2 * kLanes numbers in a row.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
PK_INLINE vec evens(vec a, vec b) {
  return _mm512_permutex2var_ps(a, _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30), b);
}
PK_INLINE vec odds(vec a, vec b) {
  return _mm512_permutex2var_ps(a, _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31), b);
}
#elif defined(__AVX2__) && defined(__FMA__)
PK_INLINE vec in_order(vec x) {  // undoes the interleaving of 128-bit halves that shuffle_ps leaves
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), 0xd8));
}
PK_INLINE vec evens(vec a, vec b) { return in_order(_mm256_shuffle_ps(a, b, 0x88)); }
PK_INLINE vec odds(vec a, vec b) { return in_order(_mm256_shuffle_ps(a, b, 0xdd)); }
#else
PK_INLINE vec evens(vec a, vec b) { return vec{a[0], a[2], b[0], b[2]}; }
PK_INLINE vec odds(vec a, vec b) { return vec{a[1], a[3], b[1], b[3]}; }
#endif

// Of a window, so far.
PK_INLINE vec pooled(bool average, vec a, vec b) { return average ? add(a, b) : max_nan(a, b); }

// Where a plane lies: elements from a row to the next, from a pixel to the next.
struct Pitch {
  int64_t h, w;
};

PK_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
PK_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
PK_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// An array of a trivial type that frees itself; zeroed.
template <typename T>
struct Array {
  T* data = nullptr;

  Array() = default;
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { std::free(data); }

  void make(int64_t count) {
    std::free(data);
    data = static_cast<T*>(std::calloc(size_t(most(count, 1)), sizeof(T)));
    if (!data) fail("out of memory");
  }
  T& operator[](int64_t i) { return data[i]; }
  const T& operator[](int64_t i) const { return data[i]; }
};

}  // namespace planar
}  // namespace PK_ISA
}  // namespace pk
