// The factors as the passes read them, and the chain rule through their fold.
#pragma once

#include "thin.h"

namespace efft_kernels::cpu::EFFT_ISA {

// The factors in T, their columns padded to whole vectors with zeros, and the fold of `core` and
// `up`.
template <class T>
struct PaddedFactors {
  int64_t width = 0;    // Ra padded
  int64_t rb = 0;       // Rb padded
  int64_t up_rows = 0;  // N, or N/G where `up` is shared
  T* down = nullptr;    // [K, width]
  T* core = nullptr;    // [G·Ra, rb], null for the identity
  T* core_t = nullptr;  // [G·Rb, width]: core[g]^T
  T* up = nullptr;      // [up_rows, rb]
  T* b = nullptr;       // [N, width]; the same as `up` for the identity

  PaddedFactors(Arena<T>& arena, const Factors& factors, int64_t N, int64_t K)
      : width(round_up(factors.Ra, kLanes<T>)),
        rb(round_up(factors.Rb, kLanes<T>)),
        up_rows(factors.up_shared ? N / factors.G : N) {
    down = arena.take(K * width);
    up = arena.take(up_rows * rb);
    b = up;
    if (!factors.core) return;
    core = arena.take(factors.G * factors.Ra * rb);
    core_t = arena.take(factors.G * factors.Rb * width);
    b = arena.take(N * width);
  }

  // Row n of slice `slice` of `up`.
  const T* up_row(const Factors& factors, int64_t slice, int64_t n, int64_t per_slice) const {
    return up + ((factors.up_shared ? 0 : slice * per_slice) + n) * rb;
  }
};

// Rows of a slice that one task takes.
constexpr int64_t kChunk = 512;

// B[g] = up[g]·core[g]^T, and the rest of `thin` from the factors.
template <class T>
void fold(const Factors& factors, int64_t N, int64_t K, PaddedFactors<T>& thin) {
  const int64_t G = factors.G, Ra = factors.Ra, Rb = factors.Rb;
  thin.down = padded(factors.down, K, Ra, thin.width, thin.down);
  thin.up = padded(factors.up, thin.up_rows, Rb, thin.rb, thin.up);
  if (!factors.core) {
    thin.b = thin.up;
    return;
  }
  thin.core = padded(factors.core, G * Ra, Rb, thin.rb, thin.core);
  for (int64_t g = 0; g < G; ++g) {
    for (int64_t r = 0; r < Rb; ++r) {
      T* row = thin.core_t + (g * Rb + r) * thin.width;
      for (int64_t a = 0; a < Ra; ++a) row[a] = thin.core[(g * Ra + a) * thin.rb + r];
      for (int64_t a = Ra; a < thin.width; ++a) row[a] = T(0);
    }
  }
  const int64_t per_slice = N / G;
  const int64_t chunks = (per_slice + kChunk - 1) / kChunk;
  parallel_each(G * chunks, [&](int64_t task) {
    const int64_t g = task / chunks;
    const int64_t first = task % chunks * kChunk;
    thin_product<T>({thin.up_row(factors, g, first, per_slice), thin.rb},
                    std::min(kChunk, per_slice - first), Rb, thin.core_t + g * Rb * thin.width,
                    thin.width, thin.b + (g * per_slice + first) * thin.width);
  });
}

// d_up[g] = d_B[g]·core[g] (summed over g where `up` is shared), d_core[g] = d_B[g]^T·up[g].
// d_up [up_rows, rb] and d_core [G·Ra, rb] may be null.
template <class T>
void unfold(const Factors& factors, int64_t N, const PaddedFactors<T>& thin, const T* d_b, T* d_up,
            T* d_core) {
  const int64_t G = factors.G, Ra = factors.Ra;
  const int64_t per_slice = N / G;
  if (d_up != nullptr) {
    const int64_t chunks = (per_slice + kChunk - 1) / kChunk;
    const int64_t sets = factors.up_shared ? 1 : G;  // slices of `up`
    parallel_each(sets * chunks, [&](int64_t task) {
      const int64_t set = task / chunks;
      const int64_t first = task % chunks * kChunk;
      const int64_t rows = std::min(kChunk, per_slice - first);
      T* to = d_up + (set * per_slice + first) * thin.rb;
      for (int64_t g = set; g < (factors.up_shared ? G : set + 1); ++g) {
        thin_product<T>({d_b + (g * per_slice + first) * thin.width, thin.width}, rows, Ra,
                        thin.core + g * Ra * thin.rb, thin.rb, to, g != set);
      }
    });
  }
  if (d_core != nullptr) {
    std::memset(d_core, 0, G * Ra * thin.rb * sizeof(T));
    parallel_each(G, [&](int64_t g) {
      add_transposed_product<T>({d_b + g * per_slice * thin.width, thin.width}, Ra,
                                {thin.up_row(factors, g, 0, per_slice), thin.rb}, thin.rb,
                                per_slice, d_core + g * Ra * thin.rb, thin.rb);
    });
  }
}

}  // namespace efft_kernels::cpu::EFFT_ISA
