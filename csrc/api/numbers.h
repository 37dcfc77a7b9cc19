// Halves and bfloat16 on the host, rounded to nearest even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace pk::api {

inline float from_bits(uint32_t bits) {
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float from_bf16(uint16_t x) { return from_bits(uint32_t(x) << 16); }
inline uint16_t to_bf16(float x) {
  const uint32_t bits = to_bits(x);
  return x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float from_half(uint16_t x) {
  const uint32_t sign = uint32_t(x & 0x8000) << 16, exponent = x >> 10 & 31, fraction = x & 1023;
  if (exponent == 0) return (sign ? -1.f : 1.f) * std::ldexp(float(fraction), -24);
  return from_bits(sign | (exponent == 31 ? 255u << 23 : (exponent + 112) << 23) | fraction << 13);
}
inline uint16_t to_half(float x) {
  uint32_t bits = to_bits(x);
  const auto sign = uint16_t(bits >> 16 & 0x8000);
  const float size = std::fabs(x);
  if (x != x) return uint16_t(sign | 0x7e00);
  if (size >= 65520.f) return uint16_t(sign | 0x7c00);
  if (size < 6.103515625e-5f) return uint16_t(sign | uint16_t(std::nearbyint(std::ldexp(size, 24))));
  bits &= 0x7fffffff;
  bits += 0xfff + (bits >> 13 & 1);
  return uint16_t(sign | ((bits >> 13) - (112 << 10)));
}

}  // namespace pk::api
