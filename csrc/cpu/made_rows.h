// Rows of x made from what its producer kept: a LayerNorm's or GELU's input. Loops that the
// compiler turns into vectors.
#pragma once

#include "blocking.h"

namespace efft_kernels::cpu::EFFT_ISA {

EFFT_INLINE float horner(float, float sum) { return sum; }

// A polynomial of t, the highest coefficient first.
template <class... Rest>
EFFT_INLINE float horner(float t, float sum, float next, Rest... rest) {
  return horner(t, sum * t + next, rest...);
}

// x·P(x²)/Q(x²), fits of least maximum relative error: 1.4e-8 for erf over |x| <= 3.85 and 7e-10
// for tanh over |x| <= 8.5. Beyond, both are ±1 in float.
EFFT_INLINE float erf_within(float x) {
  const float t = x * x;
  return x *
         horner(t, 2.10825497e-06f, 0.00028567506f, 0.00367399199f, 0.0524799002f, 0.187899289f,
                1.12837915f) /
         horner(t, 3.87316696e-05f, 0.00114551356f, 0.0147850196f, 0.113129602f, 0.499854284f,
                1.0f);
}

EFFT_INLINE float tanh_within(float x) {
  const float t = x * x;
  return x *
         horner(t, -1.33562518e-11f, 3.20940662e-08f, 2.86227755e-05f, 0.0038985245f, 0.13703944f,
                0.999999999f) /
         horner(t, 1.33072629e-06f, 0.000399207507f, 0.0273561247f, 0.470372766f, 1.0f);
}

// A value and not a branch each, so that the compiler makes vectors of them; a NaN passes.
EFFT_INLINE float clamped(float x, float limit) {
  x = x < limit ? x : limit;
  return x > -limit ? x : -limit;
}

EFFT_INLINE float or_one(float value, float x, float limit) {
  return x > limit ? 1.0f : (x < -limit ? -1.0f : value);
}

EFFT_INLINE float gelu_of(float h) {
  const float x = h * 0.707106781f;
  return 0.5f * h * (1.0f + or_one(erf_within(clamped(x, 3.85f)), x, 3.85f));
}

EFFT_INLINE double gelu_of(double h) {
  return 0.5 * h * (1.0 + std::erf(h * 0.70710678118654752440));
}

EFFT_INLINE float gelu_tanh_of(float h) {
  const float x = 0.797884561f * (h + 0.044715f * h * h * h);
  return 0.5f * h * (1.0f + or_one(tanh_within(clamped(x, 8.5f)), x, 8.5f));
}

EFFT_INLINE double gelu_tanh_of(double h) {
  return 0.5 * h * (1.0 + std::tanh(0.79788456080286535588 * (h + 0.044715 * h * h * h)));
}

template <class T>
struct MadeRows {
  Matrix kept;  // [M, K]
  MadeBy made_by = kPlain;
  const int64_t* index = nullptr;  // [M], rows of `kept`
  Norm norm;
  T* weight = nullptr;  // [K], where the norm has one
  T* bias = nullptr;    // [K]

  MadeRows(Arena<T>& arena, const Backward& args)
      : kept(args.x), made_by(args.made_by), index(args.rows), norm(args.norm) {
    if (norm.weight) weight = arena.take(args.K);
    if (norm.bias) bias = arena.take(args.K);
  }

  void read_norm(int64_t K) {
    if (weight != nullptr) read_row(norm.weight, 0, 0, weight, K);
    if (bias != nullptr) read_row(norm.bias, 0, 0, bias, K);
  }

  // Rows of x in `scratch`, or the matrix itself where x is kept as it is.
  Rows<T> rows(int64_t first, int64_t count, int64_t K, T* scratch) const {
    if (made_by == kPlain) return rows_of(kept, first, count, K, scratch);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t from = index == nullptr ? first + i : index[first + i];
      T* const row = scratch + i * K;
      if (from < 0) {
        std::fill_n(row, K, T(0));
      } else {
        make(rows_of(kept, from, 1, K, row).data, from, row, K);
      }
    }
    return {scratch, K};
  }

  // Whether pairs of its rows can be taken from where they lie, a panel at a time.
  bool in_panels() const {
    return made_by == kPlain && kept.dtype == DType::kBFloat16 && kept.column_stride == 1;
  }

  // The same rows in pairs of rows, in panels [count / 2 rounded up, panel columns] one after
  // another; `scratch` takes two rows in T.
  template <class E>
  void pair_rows(int64_t first, int64_t count, int64_t K, T* scratch, E* out) const {
    const int64_t padded = round_up(K, kLanes<T>), steps = (count + 1) / 2;
    for (int64_t i = 0; i < count; i += 2) {
      const int64_t two = std::min<int64_t>(2, count - i);
      const Rows<T> made = rows(first + i, two, K, scratch);
      const Matrix pair{const_cast<T*>(made.data), kStored<T>, made.stride, 1};
      for (int64_t j = 0; j < padded; j += kPanel<T>) {
        const int64_t across = std::min(kPanel<T>, padded - j);
        pack_pairs_rows<float>(pair, j, std::min(across, K - j), across, 0, two,
                               out + j * steps + i / 2 * across);
      }
    }
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
