// The register block: ROWS × VECTORS accumulators over a common inner dimension.
#pragma once

#include "prefetch.h"

namespace efft_kernels::cpu::EFFT_ISA {

// acc[i][j] += a[i·row]·b[j·lanes ...]
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

// acc += a·b for a [ROWS, depth], its rows `row` apart, and b [depth, VECTORS·lanes], its rows ldb
// apart. A block of few accumulators runs two sums at once, since one sum's additions would wait
// for each other.
template <class T, int ROWS, int VECTORS>
EFFT_INLINE void accumulate(Vec<T> (&acc)[ROWS][VECTORS], const T* a, int64_t row, const T* b,
                            int64_t ldb, int64_t depth) {
  if constexpr (2 * ROWS * VECTORS <= kAccumulators) {
    Vec<T> odd[ROWS][VECTORS] = {};
    for (; depth >= 2; depth -= 2) {
      step<T, ROWS, VECTORS>(acc, a, row, b);
      step<T, ROWS, VECTORS>(odd, a + 1, row, b + ldb);
      a += 2;
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
    a += 1;
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
constexpr int64_t kChain = EFFT_VECTOR_BYTES == 16 ? 128 : 384;

// The steps between two prefetches, with a panel b, whose lines come into the first-level cache
// kAhead steps before they are read: the processor's own prefetcher is late for them. One step a
// loop: where the compiler sees several, it moves accumulators about.
template <class T, int ROWS, int VECTORS>
EFFT_INLINE void interval(Vec<T> (&acc)[ROWS][VECTORS], const T*& a, int64_t row, const T*& b) {
  constexpr int64_t kAhead = 6;
  constexpr int64_t kPanelRow = VECTORS * kLanes<T>;
#pragma GCC unroll 1
  for (int64_t k = 0; k < kPrefetchInterval; ++k) {
#pragma GCC unroll 4
    for (int64_t byte = 0; byte < VECTORS * EFFT_VECTOR_BYTES; byte += kCacheLine) {
      __builtin_prefetch(reinterpret_cast<const char*>(b + kAhead * kPanelRow) + byte, 0, 3);
    }
    step<T, ROWS, VECTORS>(acc, a, row, b);
    a += 1;
    b += kPanelRow;
  }
}

// acc += term.a·term.b for a panel b, whose rows follow each other, and an `a` read along its rows.
template <class T, int ROWS, int VECTORS>
EFFT_INLINE void accumulate_with_prefetch(Vec<T> (&acc)[ROWS][VECTORS], const Term<T>& term,
                                          const Prefetch& prefetch, int64_t ldc) {
  constexpr int64_t kPanelRow = VECTORS * kLanes<T>;
  const T* a = term.a;
  const T* b = term.b;
  const T* out = static_cast<const T*>(prefetch.out);
  int vector = 0;
  int64_t k = 0;
  for (; k + 2 * kPrefetchInterval <= term.depth; k += 2 * kPrefetchInterval) {
    prefetch.a->prefetch(prefetch.a_lines);
    prefetch.w->prefetch(prefetch.w_lines);
    interval<T, ROWS, VECTORS>(acc, a, term.row, b);
    __builtin_prefetch(out, 1, 3);
    out += kLanes<T>;
    if (++vector == VECTORS) {
      vector = 0;
      out += ldc - kPanelRow;
    }
    interval<T, ROWS, VECTORS>(acc, a, term.row, b);
  }
  for (; k < term.depth; ++k) {
    step<T, ROWS, VECTORS>(acc, a, term.row, b);
    a += 1;
    b += kPanelRow;
  }
}

// c [ROWS, VECTORS·lanes] = first.a·first.b + second.a·second.b + bias (+ c if `add`). With
// PREFETCH `first` is one chain, and its b a panel.
template <class T, int ROWS, int VECTORS, bool PREFETCH = false>
EFFT_INLINE void block(const Term<T>& first, const Term<T>& second, T* c, int64_t ldc,
                       const T* bias, bool add, const Prefetch& prefetch) {
  for (int64_t k = 0;; k += kChain) {
    const bool last = PREFETCH || k + kChain >= first.depth;
    Vec<T> acc[ROWS][VECTORS] = {};
    if constexpr (PREFETCH) {
      accumulate_with_prefetch<T, ROWS, VECTORS>(acc, first, prefetch, ldc);
    } else {
      accumulate<T, ROWS, VECTORS>(acc, first.a + k, first.row, first.b + k * first.ldb, first.ldb,
                                   std::min(kChain, first.depth - k));
    }
    if (last) {
      accumulate<T, ROWS, VECTORS>(acc, second.a, second.row, second.b, second.ldb, second.depth);
    }
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) {
      const Vec<T> start = bias != nullptr ? load(bias + j * kLanes<T>) : Vec<T>{};
#pragma GCC unroll 32
      for (int i = 0; i < ROWS; ++i) {
        T* to = c + i * ldc + j * kLanes<T>;
        store(to, (add ? load(to) : start) + acc[i][j]);
      }
    }
    if (last) return;
    add = true;
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
