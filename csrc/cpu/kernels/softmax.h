// Softmax of one row, for softmax.cpp and attention.cpp.
#pragma once

#include "../math.h"

namespace pk {
namespace PK_ISA {

// The largest number; a NaN is passed over.
PK_INLINE float largest_of(const float* x, int64_t n) {
  vec a = set(-__builtin_inff()), b = a;
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    a = max(load(x + i), a);
    b = max(load(x + i + kLanes), b);
  }
  for (; i < n; i += kLanes) {
    const lanemask m = first(n - i);
    a = max(select(m, load(x + i, m), a), a);
  }
  return largest(max(a, b));
}

// y = e^(x - top); gives the sum.
PK_INLINE float exp_row(const float* x, float* y, int64_t n, float top) {
  const vec t = set(top);
  vec a = zero(), b = zero();
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const vec p = exp(sub(load(x + i), t)), q = exp(sub(load(x + i + kLanes), t));
    store(y + i, p);
    store(y + i + kLanes, q);
    a = add(a, p);
    b = add(b, q);
  }
  for (; i < n; i += kLanes) {
    const lanemask m = first(n - i);
    const vec p = exp(sub(load(x + i, m), t));
    store(y + i, p, m);
    a = add(a, select(m, p, zero()));
  }
  return sum(add(a, b));
}

PK_INLINE void scale_row(float* y, int64_t n, float by) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, mul(load(y + i), set(by)));
  if (i < n) store(y + i, mul(load(y + i, first(n - i)), set(by)), first(n - i));
}

PK_INLINE void softmax_row(const float* x, float* y, int64_t n) {
  const float total = exp_row(x, y, n, largest_of(x, n));
  scale_row(y, n, 1 / total);
}

PK_INLINE void log_softmax_row(const float* x, float* y, int64_t n) {
  const float top = largest_of(x, n);
  vec a = zero();
  for (int64_t i = 0; i < n; i += kLanes) {
    const lanemask m = first(n - i);
    a = add(a, select(m, exp(sub(load(x + i, m), set(top))), zero()));
  }
  const vec last = log(set(sum(a)));
  for (int64_t i = 0; i < n; i += kLanes) {  // x - top first: exact where they are near
    const lanemask m = first(n - i);
    store(y + i, sub(sub(load(x + i, m), set(top)), last), m);
  }
}

}  // namespace PK_ISA
}  // namespace pk
