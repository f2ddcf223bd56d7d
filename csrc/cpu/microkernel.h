// The register block: ROWS × VECTORS accumulators over a common inner dimension.
#pragma once

#include "prefetch.h"

namespace efft_kernels::cpu::EFFT_ISA {

// acc[i][j] += Σ_k a[i·row + k·column] · b[k·ldb + j·lanes ...] for one k.
template <class T, int ROWS, int VECTORS>
EFFT_INLINE void step(Vec<T> (&acc)[ROWS][VECTORS], const T* a, int64_t row, const T* b) {
  Vec<T> bv[VECTORS];
#pragma GCC unroll 8
  for (int j = 0; j < VECTORS; ++j) bv[j] = load(b + j * kLanes<T>);
#pragma GCC unroll 32
  for (int i = 0; i < ROWS; ++i) {
    const Vec<T> av = broadcast(a[i * row]);
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) acc[i][j] += av * bv[j];
  }
}

// The same over `depth` of them. A block of few accumulators runs two sums at once, since one sum's
// additions would wait for each other.
template <class T, int ROWS, int VECTORS>
EFFT_INLINE void accumulate(Vec<T> (&acc)[ROWS][VECTORS],
                            const T* a,  // [ROWS, depth] through its strides
                            int64_t row, int64_t column,
                            const T* b,  // [depth, VECTORS·lanes], rows ldb apart
                            int64_t ldb, int64_t depth) {
  if constexpr (2 * ROWS * VECTORS <= kAccumulators) {
    Vec<T> odd[ROWS][VECTORS] = {};
    for (; depth >= 2; depth -= 2) {
      step<T, ROWS, VECTORS>(acc, a, row, b);
      step<T, ROWS, VECTORS>(odd, a + column, row, b + ldb);
      a += 2 * column;
      b += 2 * ldb;
    }
#pragma GCC unroll 32
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; ++j) acc[i][j] += odd[i][j];
    }
  }
  for (; depth > 0; --depth) {
    step<T, ROWS, VECTORS>(acc, a, row, b);
    a += column;
    b += ldb;
  }
}

// One operand pair of a block: c += a·b.
template <class T>
struct Term {
  const T* a;
  int64_t row;
  const T* b;
  int64_t ldb;
  int64_t depth;
};

// Terms that are summed one after another before the sum joins the others': rounding errors grow
// with the length of a chain.
constexpr int64_t kChain = 128;
static_assert(kChain % (2 * kPrefetchInterval) == 0);

// total += term.a·term.b, a read along its rows.
template <class T, int ROWS, int VECTORS>
EFFT_INLINE void add_term(Vec<T> (&total)[ROWS][VECTORS], const Term<T>& term) {
  for (int64_t k = 0; k < term.depth; k += kChain) {
    Vec<T> acc[ROWS][VECTORS] = {};
    accumulate<T, ROWS, VECTORS>(acc, term.a + k, term.row, 1, term.b + k * term.ldb, term.ldb,
                                 std::min(kChain, term.depth - k));
#pragma GCC unroll 32
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; ++j) total[i][j] += acc[i][j];
    }
  }
}

// The same with prefetches between the steps; out's rows are ldc apart.
template <class T, int ROWS, int VECTORS>
EFFT_INLINE void add_term_with_prefetch(Vec<T> (&total)[ROWS][VECTORS], const Term<T>& term,
                                        Prefetch prefetch, int64_t ldc) {
  const T* a = term.a;
  const T* b = term.b;
  const int64_t row = term.row, ldb = term.ldb, depth = term.depth;
  const T* out = static_cast<const T*>(prefetch.out);
  const T* x = static_cast<const T*>(prefetch.x);
  int vector = 0;
  for (int64_t k = 0; k < depth;) {
    Vec<T> acc[ROWS][VECTORS] = {};
    const int64_t chain_end = std::min(depth, k + kChain);
    while (k < chain_end) {
      for (int64_t line = 0; line < prefetch.panel_lines; ++line) {
        __builtin_prefetch(prefetch.panel, 0, 2);
        prefetch.panel += kCacheLine;
      }
      if (k % (2 * kPrefetchInterval) == 0) {
        __builtin_prefetch(prefetch.row, 0, 2);
        prefetch.row += kCacheLine;
      } else {
        __builtin_prefetch(out, 1, 3);
        __builtin_prefetch(x, 0, 2);
        out += kLanes<T>;
        x += kLanes<T>;
        if (++vector == VECTORS) {
          vector = 0;
          out += ldc - VECTORS * kLanes<T>;
          x += prefetch.x_stride - VECTORS * kLanes<T>;
        }
      }
      for (const int64_t end = std::min(chain_end, k + kPrefetchInterval); k < end; ++k) {
        step<T, ROWS, VECTORS>(acc, a, row, b);
        a += 1;
        b += ldb;
      }
    }
#pragma GCC unroll 32
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; ++j) total[i][j] += acc[i][j];
    }
  }
}

// c [ROWS, VECTORS·lanes] = first.a·first.b + second.a·second.b + bias (+ c if `add`).
template <class T, int ROWS, int VECTORS, bool PREFETCH = false>
EFFT_INLINE void block(const Term<T>& first, const Term<T>& second, T* c, int64_t ldc,
                       const T* bias, bool add, const Prefetch& prefetch) {
  Vec<T> total[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int j = 0; j < VECTORS; ++j) {
    const Vec<T> start = bias != nullptr ? load(bias + j * kLanes<T>) : Vec<T>{};
#pragma GCC unroll 32
    for (int i = 0; i < ROWS; ++i) total[i][j] = add ? load(c + i * ldc + j * kLanes<T>) : start;
  }
  if constexpr (PREFETCH) {
    add_term_with_prefetch<T, ROWS, VECTORS>(total, first, prefetch, ldc);
  } else {
    add_term<T, ROWS, VECTORS>(total, first);
  }
  add_term<T, ROWS, VECTORS>(total, second);
#pragma GCC unroll 32
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) store(c + i * ldc + j * kLanes<T>, total[i][j]);
  }
}

template <class T>
using BlockFn = void (*)(const Term<T>&, const Term<T>&, T*, int64_t, const T*, bool,
                         const Prefetch&);

template <class T, int ROWS, int VECTORS, bool PREFETCH = false>
__attribute__((noinline)) void block_entry(const Term<T>& first, const Term<T>& second, T* c,
                                           int64_t ldc, const T* bias, bool add,
                                           const Prefetch& prefetch) {
  block<T, ROWS, VECTORS, PREFETCH>(first, second, c, ldc, bias, add, prefetch);
}

template <class T, int VECTORS, int... I>
BlockFn<T> block_of_rows(int64_t rows, std::integer_sequence<int, I...>) {
  static constexpr BlockFn<T> table[] = {block_entry<T, I + 1, VECTORS>...};
  return table[rows - 1];
}

// The block for 1 to kRows rows and 1 to kVectors vectors, without prefetches.
template <class T>
BlockFn<T> block_fn(int64_t rows, int64_t vectors) {
  constexpr auto all = std::make_integer_sequence<int, kRows>{};
  switch (vectors) {
    case 1:
      return block_of_rows<T, 1>(rows, all);
    case 2:
      return block_of_rows<T, 2>(rows, all);
    default:
      static_assert(kVectors <= 3);
      return block_of_rows<T, kVectors>(rows, all);
  }
}

}  // namespace efft_kernels::cpu::EFFT_ISA
