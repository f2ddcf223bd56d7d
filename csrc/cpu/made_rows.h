// Rows of x made from what its producer kept: a LayerNorm's or GELU's input. Loops that the compiler
// turns into vectors.
#pragma once

#include "storage.h"

namespace efft_kernels::cpu::EFFT_ISA {

// e^x for x <= 0, to 2e-7 of itself; 0 where that is below float's normal range. 2^n·e^r with
// |r| <= ln(2) / 2 and a Taylor sum.
EFFT_INLINE float exp_of(float x) {
  const float kept = x > -87.0f ? x : -87.0f;
  const float n = (kept * 1.44269504f + 12582912.0f) - 12582912.0f;  // to the nearest integer
  const float r = kept - n * 0.693359375f + n * 2.12194440e-4f;  // ln(2) in two parts
  float sum = 1.0f / 5040;
  sum = sum * r + 1.0f / 720;
  sum = sum * r + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return x > -87.0f ? sum * power : (x != x ? x : 0.0f);
}

// h·Φ(h), with Φ(-|h|) = e^(-h²/2)·R(|h|/√2)/2 and R(a) = e^(a²)·erfc(a) as a quotient of
// polynomials: a fit of least maximum relative error, 5e-9 over [0, 9.5]. So the tail keeps its
// relative accuracy, which 1 + erf(h/√2) loses.
EFFT_INLINE float gelu_of(float h) {
  const float a = (h < 0 ? -h : h) * 0.707106781f;
  float p = 0.0322525634f, q = 0.0571653868f;
  p = p * a + 0.226620968f;
  p = p * a + 0.726145784f;
  p = p * a + 1.23318842f;
  p = p * a + 1.00000001f;
  q = q * a + 0.401704266f;
  q = q * a + 1.31518049f;
  q = q * a + 2.39088161f;
  q = q * a + 2.3615681f;
  q = q * a + 1.0f;
  // An a beyond the range of the fit is let be 9.5: e^(-a²) is 0 there.
  const float fitted = 0.5f * exp_of(-0.5f * h * h) * (p / q);
  const float tail = a < 9.5f ? fitted : (a != a ? a : 0.0f);
  const float below = a < 9.5f ? h * tail : tail;  // never -inf·0
  const float above = h - h * tail;
  return h < 0 ? below : (a < 9.5f ? above : h);
}

EFFT_INLINE double gelu_of(double h) {
  return 0.5 * h * (1.0 + std::erf(h * 0.70710678118654752440));
}

// h/2·(1 + tanh(u)) = h / (1 + e^(-2u)), u = sqrt(2/π)·(h + 0.044715·h³)
EFFT_INLINE float gelu_tanh_of(float h) {
  const float two_u = 1.59576912f * h * (1.0f + 0.044715f * h * h);
  const float e = exp_of(two_u < 0 ? two_u : -two_u);
  const float below = e > 0 ? h * e : e;  // never -inf·0
  return (two_u < 0 ? below : h) / (1.0f + e);
}

EFFT_INLINE double gelu_tanh_of(double h) {
  return 0.5 * h * (1.0 + std::tanh(0.79788456080286535588 * (h + 0.044715 * h * h * h)));
}

template <class T>
struct MadeRows {
  Matrix kept;  // [M, K]
  MadeBy made_by = kPlain;
  Norm norm;
  T* weight = nullptr;  // [K], where the norm has one
  T* bias = nullptr;    // [K]

  MadeRows(Arena<T>& arena, const Backward& args)
      : kept(args.x), made_by(args.made_by), norm(args.norm) {
    if (norm.weight) weight = arena.take(args.K);
    if (norm.bias) bias = arena.take(args.K);
  }

  void read_norm(int64_t K) {
    if (weight != nullptr) read_row(norm.weight, 0, 0, weight, K);
    if (bias != nullptr) read_row(norm.bias, 0, 0, bias, K);
  }

  // Rows of x in `scratch`, or the matrix itself where x is kept as it is.
  Rows<T> rows(int64_t first, int64_t count, int64_t K, T* scratch) const {
    const Rows<T> given = rows_of(kept, first, count, K, scratch);
    if (made_by == kPlain) return given;
    for (int64_t i = 0; i < count; ++i) {
      make(given.data + i * given.stride, first + i, scratch + i * K, K);
    }
    return {scratch, K};
  }

 private:
  void make(const T* from, int64_t i, T* row, int64_t K) const {
    if (made_by == kGelu) {
      for (int64_t k = 0; k < K; ++k) row[k] = gelu_of(from[k]);
      return;
    }
    if (made_by == kGeluTanh) {
      for (int64_t k = 0; k < K; ++k) row[k] = gelu_tanh_of(from[k]);
      return;
    }
    T mean, rstd;
    read_row(norm.mean, i, 0, &mean, 1);
    read_row(norm.rstd, i, 0, &rstd, 1);
    for (int64_t k = 0; k < K; ++k) row[k] = (from[k] - mean) * rstd;
    if (weight != nullptr) {
      for (int64_t k = 0; k < K; ++k) row[k] *= weight[k];
    }
    if (bias != nullptr) {
      for (int64_t k = 0; k < K; ++k) row[k] += bias[k];
    }
  }
};

}  // namespace efft_kernels::cpu::EFFT_ISA
