// Sixteen f32 lanes in the compiler's own vector type, which it cuts to the registers of the CPU: grouped.cc, flash.cc.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t kLanes = 16;
using Floats = float __attribute__((vector_size(4 * kLanes)));
using Ints = int32_t __attribute__((vector_size(4 * kLanes)));

inline Floats load(const float* at, int64_t n = kLanes) {
  Floats x = {};
  std::memcpy(&x, at, n * sizeof(float));
  return x;
}

inline void store(float* to, Floats x, int64_t n = kLanes) { std::memcpy(to, &x, n * sizeof(float)); }

inline float sum(Floats x) {
  float total = 0;
  for (int64_t lane = 0; lane < kLanes; lane++) total += x[lane];
  return total;
}

// By Cephes' polynomial, to 2 units in the last place; arguments past 87 either way count as 87. NaN stays NaN.
inline Floats exponential(Floats x) {
  const Floats most = Floats{} + 87;
  x = x > most ? most : (x < -most ? -most : x);
  const float shift = 12582912;  // 1.5 * 2^23: adding it rounds to a whole number
  const Floats n = (x * 1.44269504f + shift) - shift, r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Floats two_n = (Floats)((__builtin_convertvector(n, Ints) + 127) << 23);
  return ((p * r) * r + r + 1) * two_n;
}

}  // namespace
