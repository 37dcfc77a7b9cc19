// The pieces of Winograd's convolution: the transforms of one tile, and the product of many.
//
// F(m x m, 3 x 3) turns 9 m^2 multiplications per output tile and channel pair into (m + 2)^2:
//   Y = A^T [ (G w G^T) . (B^T d B) ] A
// A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016. G w G^T is done in Python
// (backends/cpu/winograd.py), which has the points and says why they are those.
#pragma once

#include "microkernel.h"

namespace pk {
namespace PK_ISA {

// One dimension of the transforms. The input's is done in PARTS, of ROWS results each, so that a part of a whole tile
// stays in registers: storing is the narrowest path of the machine, and spilling would double it.
template <int M>
struct Transform;

// Points 0, 1, -1, infinity.
template <>
struct Transform<2> {
  static constexpr int PARTS = 1, ROWS = 4;

  template <int PART>
  static PK_INLINE void input(const vec (&d)[4], vec* t) {
    t[0] = sub(d[0], d[2]);
    t[1] = add(d[2], d[1]);
    t[2] = sub(d[2], d[1]);
    t[3] = sub(d[3], d[1]);
  }

  static PK_INLINE void output(const vec (&m)[4], vec (&y)[2]) {
    y[0] = add(m[0], add(m[1], m[2]));
    y[1] = add(m[3], sub(m[1], m[2]));
  }
};

// Points 0, a, -a, b, -b, infinity with a = sqrt(1/2), b = sqrt(2). Pairs +-p share their even and odd halves.
template <>
struct Transform<4> {
  static constexpr int PARTS = 2, ROWS = 3;
  static constexpr float a = 0.70710678118654752f, b = 1.41421356237309505f;

  template <int PART>
  static PK_INLINE void input(const vec (&d)[6], vec* t) {
    if constexpr (PART == 0) {
      const vec even = fma(set(-2.f), d[2], d[4]), odd = fma(set(-b), d[1], mul(set(a), d[3]));
      t[0] = fma(set(-2.5f), d[2], add(d[0], d[4]));
      t[1] = add(even, odd);
      t[2] = sub(even, odd);
    } else {
      const vec even = fma(set(-.5f), d[2], d[4]), odd = fma(set(-a), d[1], mul(set(b), d[3]));
      t[0] = add(even, odd);
      t[1] = sub(even, odd);
      t[2] = fma(set(-2.5f), d[3], add(d[1], d[5]));
    }
  }

  static PK_INLINE void output(const vec (&m)[6], vec (&y)[4]) {
    const vec even_a = add(m[1], m[2]), odd_a = sub(m[1], m[2]);
    const vec even_b = add(m[3], m[4]), odd_b = sub(m[3], m[4]);
    y[0] = add(m[0], add(even_a, even_b));
    y[1] = fma(set(a), odd_a, mul(set(b), odd_b));
    y[2] = fma(set(.5f), even_a, add(even_b, even_b));
    y[3] = fma(set(a * .5f), odd_a, fma(set(b * 2.f), odd_b, m[5]));
  }
};

// Keeps the compiler from working out beforehand where every element of a tile lies: dozens of addresses that it then
// has no registers for.
template <class T>
PK_INLINE T* opaque(T* p) {
  asm("" : "+r"(p));
  return p;
}

// Where a tile's input lies. rows, columns: how many of its M + 2 are there; the others count as zeros.
struct Patch {
  const float* x;
  int64_t row_stride, column_stride;
  int64_t rows, columns;
};

// B^T d B of kLanes channels (those of the mask): element (i, j) goes to v + (i * (M + 2) + j) * plane.
template <int M, int PART, bool EDGE>
PK_INLINE void transform_part(const Patch& p, const float* x, lanemask mask, bool whole, float* v, int64_t plane) {
  using T = Transform<M>;
  vec t[M + 2][T::ROWS];
#pragma GCC unroll 6
  for (int j = 0; j < M + 2; ++j) {
    vec d[M + 2];
    const float* from = opaque(x + j * p.column_stride);
#pragma GCC unroll 6
    for (int i = 0; i < M + 2; ++i) {
      if (EDGE && (i >= p.rows || j >= p.columns)) d[i] = zero();
      else d[i] = whole ? load(from + i * p.row_stride) : load(from + i * p.row_stride, mask);
    }
    T::template input<PART>(d, t[j]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < T::ROWS; ++i) {
    vec d[M + 2], r[M + 2];
#pragma GCC unroll 6
    for (int j = 0; j < M + 2; ++j) d[j] = t[j][i];
    T::template input<0>(d, r);
    if constexpr (T::PARTS == 2) T::template input<1>(d, r + T::ROWS);
    float* to = opaque(v + (PART * T::ROWS + i) * (M + 2) * plane);
#pragma GCC unroll 6
    for (int j = 0; j < M + 2; ++j) store(to + j * plane, r[j]);
  }
}

template <int M, bool EDGE>
PK_INLINE void transform_vector(const Patch& p, const float* x, lanemask mask, bool whole, float* v, int64_t plane) {
  transform_part<M, 0, EDGE>(p, x, mask, whole, v, plane);
  if constexpr (Transform<M>::PARTS == 2) transform_part<M, 1, EDGE>(p, x, mask, whole, v, plane);
}

// All channels of a tile; those of one vector are `step` floats from those of the next.
template <int M>
void transform_input(const Patch& p, int64_t channels, float* v, int64_t plane, int64_t step) {
  const bool edge = p.rows < M + 2 || p.columns < M + 2;
  const float* x = p.x;
  for (int64_t c = 0; c < channels; c += kLanes, x += kLanes, v += step) {
    const lanemask mask = first(channels - c);
    if (edge) transform_vector<M, true>(p, x, mask, false, v, plane);
    else if (channels - c >= kLanes) transform_vector<M, false>(p, x, mask, true, v, plane);
    else transform_vector<M, false>(p, x, mask, false, v, plane);
  }
}

// A^T m of kLanes channels, column by column: m + (i * (M + 2) + j) * plane holds element (i, j).
template <int M>
PK_INLINE void transform_columns(const float* m, int64_t plane, vec (&t)[M + 2][M]) {
#pragma GCC unroll 6
  for (int j = 0; j < M + 2; ++j) {
    vec d[M + 2];
    const float* from = opaque(m + j * plane);
#pragma GCC unroll 6
    for (int i = 0; i < M + 2; ++i) d[i] = load(from + i * (M + 2) * plane);
    Transform<M>::output(d, t[j]);
  }
}

// Row i of A^T m A.
template <int M>
PK_INLINE void transform_row(const vec (&t)[M + 2][M], int i, vec (&y)[M]) {
  vec d[M + 2];
#pragma GCC unroll 6
  for (int j = 0; j < M + 2; ++j) d[j] = t[j][i];
  Transform<M>::output(d, y);
}

// c[row][NV * kLanes] = a b. a: [vector of channels][row][kLanes], so that every address below is one pointer and a
// constant; b: [channel][NV * kLanes].
template <int MR, int NV>
void product(const float* a, const float* b, float* c, int64_t depth) {
  vec acc[MR][NV];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[r][v] = zero();
  for (; depth > 0; depth -= kLanes, a += (MR - 1) * kLanes) {
    const int64_t left = depth < kLanes ? depth : kLanes;
#pragma GCC unroll 4
    for (int64_t k = 0; k < left; ++k, ++a, b += NV * kLanes) {
      vec bv[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) bv[v] = load(b + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
        const vec av = set(a[r * kLanes]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[r][v] = fma(av, bv[v], acc[r][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(c + (r * NV + v) * kLanes, acc[r][v]);
}

using ProductFn = void (*)(const float*, const float*, float*, int64_t);

template <int NV, int MR = rows_for(NV)>
PK_INLINE ProductFn product_of(int64_t rows) {
  if constexpr (MR == 1) return product<1, NV>;
  else return rows == MR ? product<MR, NV> : product_of<NV, MR - 1>(rows);
}

// rows in 1...rows_for(vectors)
inline ProductFn product_of(int64_t rows, int64_t vectors) {
  if constexpr (kMaxVectors == 4) {
    if (vectors == 4) return product_of<4>(rows);
    if (vectors == 3) return product_of<3>(rows);
  }
  return vectors == 2 ? product_of<2>(rows) : product_of<1>(rows);
}

}  // namespace PK_ISA
}  // namespace pk
