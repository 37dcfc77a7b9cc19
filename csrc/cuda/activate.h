// Elementwise functions, as core/activations.py has them; numbered as pk::Act.
#pragma once

#include "../cpu/op.h"
#include "types.h"

namespace pk::cuda {

__device__ __forceinline__ float softplus(float x, float beta, float threshold) {
  return x * beta > threshold ? x : log1pf(expf(x * beta)) / beta;
}

__device__ __forceinline__ float clamp(float x, float low, float high) {      // NaN stays
  x = x < low ? low : x;
  return x > high ? high : x;
}

__device__ __forceinline__ float power(float x, float p) {
  if (p == 2) return x * x;
  if (p == 3) return x * x * x;
  if (p == .5f) return sqrtf(x);
  if (p == -.5f) return 1.f / sqrtf(x);
  return powf(x, p);
}

// Those that are more than a comparison.
__device__ inline float activate_far(float x, int act, float c0, float c1, float c2) {
  switch (Act(act)) {
    case Act::elu: return x > 0 ? x * c1 : expm1f(x * c2) * c0 * c1;
    case Act::gelu: return .5f * x * (1.f + erff(x * 0.70710678118654752f));
    case Act::gelu_tanh: return .5f * x * (1.f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case Act::silu: return x / (1.f + expf(-x));
    case Act::mish: return x * tanhf(softplus(x, 1, 20));
    case Act::sigmoid: return 1.f / (1.f + expf(-x));
    case Act::tanh: return tanhf(x);
    case Act::softplus: return softplus(x, c0, c1);
    case Act::softsign: return x / (1.f + fabsf(x));
    case Act::log_sigmoid: return (x < 0 ? x : x != x ? x : 0.f) - log1pf(expf(-fabsf(x)));
    case Act::exp: return expf(x);
    case Act::log: return logf(x);
    case Act::log1p: return log1pf(x);
    case Act::sqrt: return sqrtf(x);
    case Act::rsqrt: return 1.f / sqrtf(x);
    case Act::sin: return sinf(x);
    case Act::cos: return cosf(x);
    case Act::erf: return erff(x);
    case Act::round: return rintf(x);
    case Act::floor: return floorf(x);
    case Act::ceil: return ceilf(x);
    case Act::reciprocal: return 1.f / x;
    case Act::pow: return power(x, c0);
    default: return x;
  }
}

__device__ __forceinline__ float activate(float x, const Activate& a) {
  const float c0 = a.constants[0], c1 = a.constants[1];
  switch (Act(a.act)) {
    case Act::none: return x;
    case Act::relu: return x < 0 ? 0.f : x;
    case Act::leaky_relu: return x > 0 ? x : x * c0;
    case Act::hardswish: return x * clamp(x + 3.f, 0, 6) / 6.f;
    case Act::hardsigmoid: return clamp(x + 3.f, 0, 6) / 6.f;
    case Act::clamp: return clamp(x, c0, c1);
    case Act::clamp_min: return x < c0 ? c0 : x;
    case Act::clamp_max: return x > c0 ? c0 : x;
    case Act::threshold: return x <= c0 ? c1 : x;
    case Act::hardshrink: return x >= -c0 && x <= c0 ? 0.f : x;
    case Act::softshrink: return x > c0 ? x - c0 : x < -c0 ? x + c0 : x * 0.f;
    case Act::square: return x * x;
    case Act::abs: return fabsf(x);
    case Act::neg: return -x;
    case Act::sign: return float(x > 0) - float(x < 0);
    default: return activate_far(x, a.act, c0, c1, a.constants[2]);
  }
}

}  // namespace pk::cuda
