// Products of bfloat16 numbers two at a time, summed in float: where the instruction set has them.
// The instructions take subnormal numbers for zeros.
#pragma once

#include "prefetch.h"

namespace efft_kernels::cpu::EFFT_ISA {

// Two numbers in bfloat16 that follow each other along the inner dimension.
struct Pair {
  uint16_t first, second;
};

#if defined(EFFT_PAIRS)

constexpr bool kPairs = true;

// acc[i][j] += the dot products of a[i·row .. i·row + 2) with b[j·lanes ...]
template <int ROWS, int VECTORS>
EFFT_INLINE void step_of_pairs(Vec<float> (&acc)[ROWS][VECTORS], const uint16_t* a, int64_t row,
                               const Pair* b) {
  __m512bh bv[VECTORS];
#pragma GCC unroll 8
  for (int j = 0; j < VECTORS; ++j) bv[j] = (__m512bh)_mm512_loadu_si512(b + j * kLanes<float>);
#pragma GCC unroll 32
  for (int i = 0; i < ROWS; ++i) {
    int32_t pair;
    std::memcpy(&pair, a + i * row, sizeof(pair));
    const __m512bh av = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) {
      acc[i][j] = (Vec<float>)_mm512_dpbf16_ps((__m512)acc[i][j], av, bv[j]);
    }
  }
}

// 32 numbers that follow each other, in bfloat16: a vector of pairs.
EFFT_INLINE Vec<float> load_pairs(const float* from) {
  return (Vec<float>)_mm512_cvtne2ps_pbh((__m512)load(from + kLanes<float>), (__m512)load(from));
}
EFFT_INLINE Vec<float> load_pairs(const uint16_t* from) {
  Vec<float> pairs;  // which a row of an odd offset has at any even address
  std::memcpy(&pairs, from, sizeof(pairs));
  return pairs;
}

// A vector of pairs, of numbers of a row and of the row below it.
EFFT_INLINE Words pair_up(const float* row, const float* below) {
  const Halves first = (Halves)_mm512_cvtneps_pbh((__m512)load(row));
  const Halves second = (Halves)_mm512_cvtneps_pbh((__m512)load(below));
  return __builtin_convertvector(first, Words) | __builtin_convertvector(second, Words) << 16;
}
EFFT_INLINE Words pair_up(const uint16_t* row, const uint16_t* below) {
  return load_halves(row) | load_halves(below) << 16;
}

// As pack_transposed and pack_rows of pack.h, for a w of S, float or bfloat16, with unit column
// stride. Transposed, `depth` is even; else a row that has none below it is paired with zeros.
template <class S>
void pack_pairs_transposed(const Matrix& w, int64_t n0, int64_t columns, int64_t width, int64_t k0,
                           int64_t depth, Pair* out) {
  constexpr int64_t lanes = kLanes<float>;
  const S* const from = static_cast<const S*>(w.data) + n0 * w.row_stride + k0;
  for (int64_t n = 0; n < width; n += lanes) {
    for (int64_t k = 0; k < depth; k += 2 * lanes) {
      const int64_t across = std::min(2 * lanes, depth - k);
      Vec<float> v[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        const S* row = from + (n + i) * w.row_stride + k;
        S edge[2 * lanes] = {};
        if (n + i >= columns || across < 2 * lanes) {
          if (n + i < columns) std::memcpy(edge, row, across * sizeof(S));
          row = edge;
        }
        v[i] = load_pairs(row);
      }
      transpose<float>(v);
      Pair* to = out + k / 2 * width + n;
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        if (2 * i < across) std::memcpy(to + i * width, &v[i], sizeof(v[i]));
      }
    }
  }
}

template <class S>
void pack_pairs_rows(const Matrix& w, int64_t j0, int64_t columns, int64_t width, int64_t k0,
                     int64_t depth, Pair* out) {
  constexpr int64_t lanes = kLanes<float>;
  const S* row = static_cast<const S*>(w.data) + k0 * w.row_stride + j0;
  for (int64_t k = 0; k < depth; k += 2) {
    const S* below = k + 1 < depth ? row + w.row_stride : nullptr;
    for (int64_t j = 0; j < width; j += kCacheLine / sizeof(S)) {
      __builtin_prefetch(row + kPrefetchRows * w.row_stride + j, 0, 3);
      __builtin_prefetch(row + (kPrefetchRows + 1) * w.row_stride + j, 0, 3);
    }
    for (int64_t j = 0; j < width; j += lanes) {
      S edge[2][lanes] = {};
      const int64_t valid = std::min(lanes, columns - j);
      const bool whole = valid == lanes && below != nullptr;
      if (!whole) {
        std::memcpy(edge[0], row + j, valid * sizeof(S));
        if (below != nullptr) std::memcpy(edge[1], below + j, valid * sizeof(S));
      }
      const Words pairs = whole ? pair_up(row + j, below + j) : pair_up(edge[0], edge[1]);
      std::memcpy(out + j, &pairs, sizeof(pairs));
    }
    row += 2 * w.row_stride;
    out += width;
  }
}

#else

constexpr bool kPairs = false;

template <int ROWS, int VECTORS>
void step_of_pairs(Vec<float> (&acc)[ROWS][VECTORS], const uint16_t* a, int64_t row, const Pair* b);

template <class S>
void pack_pairs_transposed(const Matrix& w, int64_t n0, int64_t columns, int64_t width, int64_t k0,
                           int64_t depth, Pair* out);

template <class S>
void pack_pairs_rows(const Matrix& w, int64_t j0, int64_t columns, int64_t width, int64_t k0,
                     int64_t depth, Pair* out);

#endif

template <class T>
constexpr bool kCanPair = kPairs && std::is_same_v<T, float>;

}  // namespace efft_kernels::cpu::EFFT_ISA
