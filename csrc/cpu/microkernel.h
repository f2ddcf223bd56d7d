// The register block: ROWS × VECTORS accumulators over a common inner dimension.
#pragma once

#include "pairs.h"
#include "prefetch.h"

namespace efft_kernels::cpu::EFFT_ISA {

// What a step of the inner dimension takes of a row of b: a number, or a Pair. `Sum` is the type of
// the sums, `Scalar` that of the numbers in `a`, kNumbers of which a step takes.
template <class E>
struct Element {
  using Sum = E;
  using Scalar = E;
  static constexpr int64_t kNumbers = 1;
};
template <>
struct Element<Pair> {
  using Sum = float;
  using Scalar = uint16_t;
  static constexpr int64_t kNumbers = 2;
};
template <class E>
using Sum = typename Element<E>::Sum;
template <class E>
using Scalar = typename Element<E>::Scalar;

// acc[i][j] += a[i·row]·b[j·lanes ...]
template <class E, int ROWS, int VECTORS>
EFFT_INLINE void step(Vec<Sum<E>> (&acc)[ROWS][VECTORS], const Scalar<E>* a, int64_t row,
                      const E* b) {
  if constexpr (std::is_same_v<E, Pair>) {
    step_of_pairs<ROWS, VECTORS>(acc, a, row, b);
  } else {
    Vec<E> bv[VECTORS];
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) bv[j] = load(b + j * kLanes<E>);
#pragma GCC unroll 32
    for (int i = 0; i < ROWS; ++i) {
      const Vec<E> av = broadcast(a[i * row]);
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; ++j) acc[i][j] += av * bv[j];
    }
  }
}

// acc += a·b for a [ROWS, depth], its rows `row` apart, and b [depth, VECTORS·lanes], its rows ldb
// apart. The steps are summed one after another whatever the block's size, so that a row's result
// does not depend on the rows beside it.
template <class E, int ROWS, int VECTORS>
EFFT_INLINE void accumulate(Vec<Sum<E>> (&acc)[ROWS][VECTORS], const Scalar<E>* a, int64_t row,
                            const E* b, int64_t ldb, int64_t depth) {
  for (; depth > 0; --depth) {
    step<E, ROWS, VECTORS>(acc, a, row, b);
    a += Element<E>::kNumbers;
    b += ldb;
  }
}

// One product of a block: c += a·b, in `depth` steps.
template <class E>
struct Term {
  const Scalar<E>* a;
  int64_t row;
  const E* b;
  int64_t ldb;
  int64_t depth;
};

// Terms that are summed one after another before the sum joins the others': rounding errors grow
// with the length of a chain.
constexpr int64_t kChain = EFFT_VECTOR_BYTES == 16 ? 128 : 384;

// The steps between two prefetches, with a panel b, whose lines come into the first-level cache
// kAhead steps before they are read: the processor's own prefetcher is late for them. One step a
// loop: where the compiler sees several, it moves accumulators about.
template <class E, int ROWS, int VECTORS>
EFFT_INLINE void interval(Vec<Sum<E>> (&acc)[ROWS][VECTORS], const Scalar<E>*& a, int64_t row,
                          const E*& b) {
  constexpr int64_t kAhead = 6;
  constexpr int64_t kPanelRow = VECTORS * kLanes<Sum<E>>;
#pragma GCC unroll 1
  for (int64_t k = 0; k < kPrefetchInterval; ++k) {
#pragma GCC unroll 4
    for (int64_t byte = 0; byte < VECTORS * EFFT_VECTOR_BYTES; byte += kCacheLine) {
      __builtin_prefetch(reinterpret_cast<const char*>(b + kAhead * kPanelRow) + byte, 0, 3);
    }
    step<E, ROWS, VECTORS>(acc, a, row, b);
    a += Element<E>::kNumbers;
    b += kPanelRow;
  }
}

// acc += term.a·term.b for a panel b, whose rows follow each other, and an `a` read along its rows.
template <class E, int ROWS, int VECTORS, class Out>
EFFT_INLINE void accumulate_with_prefetch(Vec<Sum<E>> (&acc)[ROWS][VECTORS], const Term<E>& term,
                                          const Prefetch& prefetch, int64_t ldc) {
  constexpr int64_t kPanelRow = VECTORS * kLanes<Sum<E>>;
  const Scalar<E>* a = term.a;
  const E* b = term.b;
  const Out* out = static_cast<const Out*>(prefetch.out);
  int vector = 0;
  int64_t k = 0;
  for (; k + 2 * kPrefetchInterval <= term.depth; k += 2 * kPrefetchInterval) {
    prefetch.a->prefetch(prefetch.a_lines);
    prefetch.w->prefetch(prefetch.w_lines);
    interval<E, ROWS, VECTORS>(acc, a, term.row, b);
    __builtin_prefetch(out, 1, 3);
    out += kLanes<Sum<E>>;
    if (++vector == VECTORS) {
      vector = 0;
      out += ldc - kPanelRow;
    }
    interval<E, ROWS, VECTORS>(acc, a, term.row, b);
  }
  for (; k < term.depth; ++k) {
    step<E, ROWS, VECTORS>(acc, a, term.row, b);
    a += Element<E>::kNumbers;
    b += kPanelRow;
  }
}

// c [ROWS, VECTORS·lanes] = first.a·first.b + second.a·second.b + (c if `add`, else bias). With
// PREFETCH `first` is one chain, and its b a panel. A c in bfloat16 is written once: there `first`
// is one chain, too, and nothing is added.
template <class E, int ROWS, int VECTORS, bool PREFETCH, class Out>
EFFT_INLINE void block(const Term<E>& first, const Term<E>& second, Out* c, int64_t ldc,
                       const Sum<E>* bias, bool add, const Prefetch& prefetch) {
  for (int64_t k = 0;; k += kChain) {
    const bool last = PREFETCH || k + kChain >= first.depth;
    Vec<Sum<E>> acc[ROWS][VECTORS] = {};
    if constexpr (PREFETCH) {
      accumulate_with_prefetch<E, ROWS, VECTORS, Out>(acc, first, prefetch, ldc);
    } else {
      accumulate<E, ROWS, VECTORS>(acc, first.a + k * Element<E>::kNumbers, first.row,
                                   first.b + k * first.ldb, first.ldb,
                                   std::min(kChain, first.depth - k));
    }
    if (last) {
      accumulate<E, ROWS, VECTORS>(acc, second.a, second.row, second.b, second.ldb, second.depth);
    }
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) {
      const Vec<Sum<E>> start = bias != nullptr ? load(bias + j * kLanes<Sum<E>>) : Vec<Sum<E>>{};
#pragma GCC unroll 32
      for (int i = 0; i < ROWS; ++i) {
        Out* to = c + i * ldc + j * kLanes<Sum<E>>;
        if constexpr (std::is_same_v<Out, Sum<E>>) {
          store(to, (add ? load(to) : start) + acc[i][j]);
        } else {
          store_bf16(to, start + acc[i][j]);
        }
      }
    }
    if (last) return;
    add = true;
  }
}

template <class E, class Out = Sum<E>>
using BlockFn = void (*)(const Term<E>&, const Term<E>&, Out*, int64_t, const Sum<E>*, bool,
                         const Prefetch&);

template <class E, int ROWS, int VECTORS, bool PREFETCH, class Out>
__attribute__((noinline)) void block_entry(const Term<E>& first, const Term<E>& second, Out* c,
                                           int64_t ldc, const Sum<E>* bias, bool add,
                                           const Prefetch& prefetch) {
  block<E, ROWS, VECTORS, PREFETCH>(first, second, c, ldc, bias, add, prefetch);
}

template <class E, class Out, int VECTORS, int... I>
BlockFn<E, Out> block_of_rows(int64_t rows, std::integer_sequence<int, I...>) {
  static constexpr BlockFn<E, Out> table[] = {block_entry<E, I + 1, VECTORS, false, Out>...};
  return table[rows - 1];
}

// The block for 1 to kRows rows and 1 to kVectors vectors, without prefetches.
template <class E, class Out = Sum<E>>
BlockFn<E, Out> block_fn(int64_t rows, int64_t vectors) {
  constexpr auto all = std::make_integer_sequence<int, kRows>{};
  switch (vectors) {
    case 1:
      return block_of_rows<E, Out, 1>(rows, all);
    case 2:
      return block_of_rows<E, Out, 2>(rows, all);
    default:
      static_assert(kVectors <= 3);
      return block_of_rows<E, Out, kVectors>(rows, all);
  }
}

}  // namespace efft_kernels::cpu::EFFT_ISA
