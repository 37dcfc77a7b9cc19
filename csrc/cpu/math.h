// Elementary functions of a register of floats, and the activations of core/activations.py made of them.
//
// exp and log: Cody-Waite reduction by ln 2 (as in Cephes, S. L. Moshier), then a polynomial fitted at Chebyshev's
// nodes over the reduced range. tanh: the polynomial of Cephes (tanhf.c) near 0, exp elsewhere. erf: N. Juffa's two
// polynomials ("An accurate single-precision erff()", 2016). All are within 2 ulp of the exact value; NaN, infinities
// and signed zeros come out as in torch.
#pragma once

#include "op.h"
#include "vec.h"

namespace pk {
namespace PK_ISA {

// ---- what vec.h does not have ----

// The magnitude of one number with the sign of another; a number as m * 2^e with 0.75 <= m < 1.5.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
PK_INLINE vec copysign(vec size, vec sign) {
  const vec bit = _mm512_set1_ps(-0.f);
  return _mm512_or_ps(_mm512_andnot_ps(bit, size), _mm512_and_ps(bit, sign));
}
PK_INLINE void take_apart(vec x, vec* m, vec* e) {
  *m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
  const vec down = _mm512_getexp_ps(x);  // of m in [1, 2)
  *e = select(greater(set(1.f), *m), add(down, set(1.f)), down);
}
// x * 2^n for whole n in [-250, 254].
PK_INLINE vec scale_far(vec x, vec n) { return scale2(x, n); }
#elif defined(__AVX2__) && defined(__FMA__)
PK_INLINE vec copysign(vec size, vec sign) {
  const vec bit = _mm256_set1_ps(-0.f);
  return _mm256_or_ps(_mm256_andnot_ps(bit, size), _mm256_and_ps(bit, sign));
}
PK_INLINE void take_apart(vec x, vec* m, vec* e) {
  const lanemask tiny = greater(set(1.1754943508e-38f), x);
  const __m256i bits = _mm256_castps_si256(select(tiny, mul(x, set(8388608.f)), x));
  *e = sub(_mm256_cvtepi32_ps(_mm256_srli_epi32(bits, 23)), select(tiny, set(150.f), set(127.f)));
  const __m256i fraction = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffff));
  *m = _mm256_castsi256_ps(_mm256_or_si256(fraction, _mm256_set1_epi32(0x3f800000)));
  const lanemask high = greater(*m, set(1.49999988f));
  *e = select(high, add(*e, set(1.f)), *e);
  *m = select(high, mul(*m, set(.5f)), *m);
}
#else
PK_INLINE vec copysign(vec size, vec sign) {
  lanemask a, b;
  std::memcpy(&a, &size, sizeof a);
  std::memcpy(&b, &sign, sizeof b);
  a = (a & 0x7fffffff) | (b & int32_t(0x80000000));
  std::memcpy(&size, &a, sizeof a);
  return size;
}
PK_INLINE void take_apart(vec x, vec* m, vec* e) {
  const lanemask tiny = x < 1.1754943508e-38f;
  x = select(tiny, x * 8388608.f, x);
  lanemask bits;
  std::memcpy(&bits, &x, sizeof x);
  *e = __builtin_convertvector((bits >> 23) & 0xff, vec) - select(tiny, set(150.f), set(127.f));
  bits = (bits & 0x7fffff) | 0x3f800000;
  std::memcpy(m, &bits, sizeof x);
  const lanemask high = *m >= 1.5f;
  *e = select(high, *e + 1.f, *e);
  *m = select(high, *m * .5f, *m);
}
#endif

#if !defined(__AVX512F__)
// In two steps, so that neither factor overflows.
PK_INLINE vec scale_far(vec x, vec n) {
  const vec half = round(mul(n, set(.5f)));
  return scale2(scale2(x, half), sub(n, half));
}
#endif


// One function of the C library, lane by lane.
template <typename F>
PK_INLINE vec each(vec x, F f) {
  float lane[kLanes];
  store(lane, x);
  for (int i = 0; i < kLanes; ++i) lane[i] = f(lane[i]);
  return load(lane);
}

// ---- elementary functions ----

// x = n ln 2 + r with |r| <= ln 2 / 2; gives n and e^r - 1.
PK_INLINE vec reduced_expm1(vec x, vec* n) {
  *n = round(mul(x, set(1.44269504f)));
  vec r = fma(*n, set(-0.693359375f), x);
  r = fma(*n, set(2.12194440e-4f), r);
  vec p = set(1.3926176e-3f);
  p = fma(p, r, set(8.363173e-3f));
  p = fma(p, r, set(4.1666556e-2f));
  p = fma(p, r, set(1.6666578e-1f));
  p = fma(p, r, set(.5f));
  return fma(mul(r, r), p, r);
}

PK_INLINE vec exp(vec x) {
  vec n;
  const vec p = reduced_expm1(clamp(x, set(-104.f), set(89.f)), &n);
  return scale_far(add(p, set(1.f)), n);
}

PK_INLINE vec expm1(vec x) {
  vec n;
  const vec p = reduced_expm1(clamp(x, set(-25.f), set(89.f)), &n);
  const vec s = scale2(set(1.f), sub(n, set(1.f)));  // half of 2^n, which may overflow where the result does not
  const vec y = mul(fma(s, p, sub(s, set(.5f))), set(2.f));
  return select(greater(set(1e-4f), abs(x)), fma(mul(x, x), set(.5f), x), y);  // keeps -0 and the smallest numbers
}

PK_INLINE vec log(vec x) {
  vec m, e;
  take_apart(x, &m, &e);
  const vec f = sub(m, set(1.f)), z = mul(f, f);
  vec p = set(0.042871978f);
  p = fma(p, f, set(-0.0956134001f));
  p = fma(p, f, set(0.116806818f));
  p = fma(p, f, set(-0.126393111f));
  p = fma(p, f, set(0.14268306f));
  p = fma(p, f, set(-0.166608175f));
  p = fma(p, f, set(0.200001409f));
  p = fma(p, f, set(-0.250000567f));
  p = fma(p, f, set(0.333333331f));
  vec y = fma(e, set(-2.12194440e-4f), mul(mul(f, z), p));
  y = fma(z, set(-.5f), y);
  y = fma(e, set(0.693359375f), add(f, y));
  const vec inf = set(__builtin_inff());
  y = select(greater(x, set(3.4028234664e38f)), inf, y);
  y = select(greater(x, zero()), y, select(greater(zero(), x), set(__builtin_nanf("")), set(-__builtin_inff())));
  return select(is_nan(x), x, y);
}

// log(u) of the rounded u = 1 + x, put right by what the rounding lost.
PK_INLINE vec log1p(vec x) {
  const vec u = add(x, set(1.f)), lost = div(sub(x, sub(u, set(1.f))), u);
  const lanemask plain = greater(set(3.4028234664e38f), abs(lost));
  const vec y = add(log(u), select(plain, lost, zero()));
  return select(greater(set(1e-4f), abs(x)), fma(mul(x, x), set(-.5f), x), y);
}

PK_INLINE vec sigmoid(vec x) { return div(set(1.f), add(set(1.f), exp(sub(zero(), x)))); }

PK_INLINE vec tanh(vec x) {
  const vec a = abs(x), z = mul(x, x);
  vec p = set(-5.70498872745e-3f);
  p = fma(p, z, set(2.06390887954e-2f));
  p = fma(p, z, set(-5.37397155531e-2f));
  p = fma(p, z, set(1.33314422036e-1f));
  p = fma(p, z, set(-3.33332819422e-1f));
  const vec near = fma(mul(p, z), x, x);
  const vec far = sub(set(1.f), div(set(2.f), add(exp(add(a, a)), set(1.f))));
  return copysign(select(greater(set(.625f), a), near, far), x);
}

PK_INLINE vec erf(vec x) {
  const vec t = abs(x), s = mul(x, x);
  vec far = fma(set(-1.72853470e-5f), t, set(3.83197126e-4f));
  far = fma(far, s, fma(set(-3.88396438e-3f), t, set(2.42546219e-2f)));
  far = fma(far, t, set(-1.06777877e-1f));
  far = fma(far, t, set(-6.34846687e-1f));
  far = fma(far, t, set(-1.28717512e-1f));
  far = fma(far, t, sub(zero(), t));
  far = copysign(sub(set(1.f), exp(select(greater(t, set(4.f)), set(-104.f), far))), x);
  vec near = set(-5.96761703e-4f);
  near = fma(near, s, set(4.99119423e-3f));
  near = fma(near, s, set(-2.67681349e-2f));
  near = fma(near, s, set(1.12819925e-1f));
  near = fma(near, s, set(-3.76125336e-1f));
  near = fma(near, s, set(1.28379166e-1f));
  near = fma(near, x, x);
  return select(greater(t, set(0.927734375f)), far, near);
}

// x^p as torch has it: the exponents it singles out, else powf.
PK_INLINE vec pow(vec x, float p) {
  if (p == 2) return mul(x, x);
  if (p == 3) return mul(mul(x, x), x);
  if (p == .5f) return sqrt(x);
  if (p == 1) return x;
  if (p == -.5f) return div(set(1.f), sqrt(x));
  if (p == -1) return div(set(1.f), x);
  if (p == -2) return div(set(1.f), mul(x, x));
  return each(x, [p](float a) { return ::powf(a, p); });
}

// ---- activations ----

PK_INLINE vec softplus(vec x, float beta, float threshold) {
  const vec b = mul(x, set(beta));
  return select(greater(b, set(threshold)), x, div(log1p(exp(b)), set(beta)));
}

// x tanh(log(1 + e^x)) = x n / (n + 2) with n = e^x (e^x + 2); from 20 on that is x.
PK_INLINE vec mish(vec x) {
  const vec e = exp(min(set(20.f), x)), n = mul(e, add(e, set(2.f)));
  return select(greater(x, set(20.f)), x, mul(x, div(n, add(n, set(2.f)))));
}

PK_INLINE vec gelu_tanh(vec x) {
  const vec inner = mul(set(0.7978845608f), fma(mul(mul(x, x), x), set(0.044715f), x));
  return mul(mul(set(.5f), x), add(set(1.f), tanh(inner)));
}

// The function `act` of x; what the constants mean is in core/activations.py.
PK_INLINE vec activate(Act act, vec x, const float* c) {
  const vec one = set(1.f), none = zero();
  switch (act) {
    case Act::none: return x;
    case Act::relu: return max(none, x);
    case Act::leaky_relu: return select(greater(x, none), x, mul(x, set(c[0])));
    case Act::elu:
      return select(greater(none, x), mul(expm1(mul(x, set(c[2]))), set(c[0] * c[1])), mul(x, set(c[1])));
    case Act::gelu: return mul(mul(x, set(.5f)), add(one, erf(mul(x, set(0.70710678f)))));
    case Act::gelu_tanh: return gelu_tanh(x);
    case Act::silu: return div(x, add(one, exp(sub(none, x))));
    case Act::mish: return mish(x);
    case Act::hardswish: return div(mul(x, clamp(add(x, set(3.f)), none, set(6.f))), set(6.f));
    case Act::hardsigmoid: return div(clamp(add(x, set(3.f)), none, set(6.f)), set(6.f));
    case Act::sigmoid: return sigmoid(x);
    case Act::tanh: return tanh(x);
    case Act::softplus: return softplus(x, c[0], c[1]);
    case Act::softsign: return div(x, add(one, abs(x)));
    case Act::log_sigmoid: return sub(min(none, x), log1p(exp(sub(none, abs(x)))));
    case Act::clamp: return clamp(x, set(c[0]), set(c[1]));
    case Act::clamp_min: return max(set(c[0]), x);
    case Act::clamp_max: return min(set(c[0]), x);
    case Act::threshold: return select(greater(x, set(c[0])), x, select(is_nan(x), x, set(c[1])));
    case Act::hardshrink: return select(greater(abs(x), set(c[0])), x, select(is_nan(x), x, none));
    case Act::softshrink: return sub(x, clamp(x, set(-c[0]), set(c[0])));
    case Act::exp: return exp(x);
    case Act::log: return log(x);
    case Act::log1p: return log1p(x);
    case Act::sqrt: return sqrt(x);
    case Act::rsqrt: return div(one, sqrt(x));
    case Act::square: return mul(x, x);
    case Act::abs: return abs(x);
    case Act::neg: return sub(set(-0.f), x);
    case Act::sin: return each(x, [](float a) { return ::sinf(a); });
    case Act::cos: return each(x, [](float a) { return ::cosf(a); });
    case Act::erf: return erf(x);
    case Act::sign: return select(greater(x, none), one, select(greater(none, x), set(-1.f), none));
    case Act::round: return round(x);
    case Act::floor: return floor(x);
    case Act::ceil: return sub(set(-0.f), floor(sub(set(-0.f), x)));
    case Act::reciprocal: return div(one, x);
    case Act::pow: return pow(x, c[0]);
  }
  return x;
}

template <Act act>
PK_INLINE void activate_row(const float* x, float* y, int64_t n, const float* c) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, activate(act, load(x + i), c));
  if (i < n) store(y + i, activate(act, load(x + i, first(n - i)), c), first(n - i));
}

// The function of x[0..n) to y[0..n), which may be x. Kernels call it over what they have just stored: out of line,
// so that the switch over all the functions is compiled once in a unit, not into every kernel.
__attribute__((noinline)) inline void activate_row(Act act, const float* x, float* y, int64_t n, const float* c) {
  switch (act) {
#define PK_ACT(name) case Act::name: return activate_row<Act::name>(x, y, n, c);
    PK_ACT(none) PK_ACT(relu) PK_ACT(leaky_relu) PK_ACT(elu) PK_ACT(gelu) PK_ACT(gelu_tanh) PK_ACT(silu) PK_ACT(mish)
    PK_ACT(hardswish) PK_ACT(hardsigmoid) PK_ACT(sigmoid) PK_ACT(tanh) PK_ACT(softplus) PK_ACT(softsign)
    PK_ACT(log_sigmoid) PK_ACT(clamp) PK_ACT(clamp_min) PK_ACT(clamp_max) PK_ACT(threshold) PK_ACT(hardshrink)
    PK_ACT(softshrink) PK_ACT(exp) PK_ACT(log) PK_ACT(log1p) PK_ACT(sqrt) PK_ACT(rsqrt) PK_ACT(square) PK_ACT(abs)
    PK_ACT(neg) PK_ACT(sin) PK_ACT(cos) PK_ACT(erf) PK_ACT(sign) PK_ACT(round) PK_ACT(floor) PK_ACT(ceil)
    PK_ACT(reciprocal) PK_ACT(pow)
#undef PK_ACT
  }
}

PK_INLINE void activate_row(Act act, float* y, int64_t n, const float* constants) {
  activate_row(act, y, y, n, constants);
}

}  // namespace PK_ISA
}  // namespace pk
