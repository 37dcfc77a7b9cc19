// Transposes of blocks of a matrix, in registers.
#pragma once

#include "../vec.h"

namespace pk {
namespace PK_ISA {

// A square of kLanes x kLanes in registers, in place.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
PK_INLINE void transpose(vec (&r)[16]) {
  vec t[16];
  for (int i = 0; i < 16; i += 4) {  // squares of 4 within every quarter of a register
    const vec a = _mm512_unpacklo_ps(r[i], r[i + 1]), b = _mm512_unpackhi_ps(r[i], r[i + 1]);
    const vec c = _mm512_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm512_unpackhi_ps(r[i + 2], r[i + 3]);
    t[i] = _mm512_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
  }
  for (int i = 0; i < 4; ++i) {      // and the quarters themselves
    const vec a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88), b = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd);
    const vec c = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88), d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xdd);
    r[i] = _mm512_shuffle_f32x4(a, c, 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
    r[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
    r[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}
#elif defined(__AVX2__) && defined(__FMA__)
PK_INLINE void transpose(vec (&r)[8]) {
  vec t[8];
  for (int i = 0; i < 8; i += 4) {
    const vec a = _mm256_unpacklo_ps(r[i], r[i + 1]), b = _mm256_unpackhi_ps(r[i], r[i + 1]);
    const vec c = _mm256_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm256_unpackhi_ps(r[i + 2], r[i + 3]);
    t[i] = _mm256_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
  }
}
#else
PK_INLINE void transpose(vec (&r)[4]) {
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < i; ++j) {
      const float t = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = t;
    }
}
#endif

// y[j * to + i] = x[i * from + j] for i < rows, j < columns.
PK_INLINE void transpose_block(const float* x, int64_t from, float* y, int64_t to, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i += kLanes)
    for (int64_t j = 0; j < columns; j += kLanes) {
      const int64_t high = rows - i < kLanes ? rows - i : kLanes, wide = columns - j < kLanes ? columns - j : kLanes;
      vec r[kLanes];
      if (high == kLanes && wide == kLanes) {
        for (int k = 0; k < kLanes; ++k) r[k] = load(x + (i + k) * from + j);
        transpose(r);
        for (int k = 0; k < kLanes; ++k) store(y + (j + k) * to + i, r[k]);
      } else {
        const lanemask in = first(wide), out = first(high);
        for (int k = 0; k < kLanes; ++k) r[k] = k < high ? load(x + (i + k) * from + j, in) : zero();
        transpose(r);
        for (int k = 0; k < kLanes; ++k) if (k < wide) store(y + (j + k) * to + i, r[k], out);
      }
    }
}

}  // namespace PK_ISA
}  // namespace pk
