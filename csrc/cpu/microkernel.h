// The register block: ROWS × VECTORS accumulators over a common inner dimension.
#pragma once

#include "vec.h"

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

// Memory that comes next, asked for a line at a time while the multipliers are busy; asked for in
// one go it would hold up the loads of the product itself. Where the product reads and writes
// memory that is not in the second-level cache, this is worth a tenth of its time.
struct Ahead {
  const char* panel = nullptr;   // the next panel
  int64_t panel_lines = 0;       // of it at a time
  const char* rows = nullptr;    // a stretch of a row that a later step reads
  const void* out = nullptr;     // the block of `out` that is stored next
  const void* beside = nullptr;  // a block of the same size that is read next
  int64_t beside_stride = 0;
};

constexpr int64_t kLine = 64;
// The k between two times of asking.
constexpr int64_t kStride = 8;

// Terms that are summed one after another before the sum joins the others': rounding errors grow
// with the length of a chain.
constexpr int64_t kChain = 128;
static_assert(kChain % (2 * kStride) == 0);

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

template <class T, int ROWS, int VECTORS>
EFFT_INLINE void add_term_asking_ahead(Vec<T> (&total)[ROWS][VECTORS], const Term<T>& term,
                                       Ahead ahead, int64_t ldc) {
  const T* a = term.a;
  const T* b = term.b;
  const int64_t row = term.row, ldb = term.ldb, depth = term.depth;
  const T* out = static_cast<const T*>(ahead.out);
  const T* beside = static_cast<const T*>(ahead.beside);
  int vector = 0;
  for (int64_t k = 0; k < depth;) {
    Vec<T> acc[ROWS][VECTORS] = {};
    const int64_t chain_end = std::min(depth, k + kChain);
    while (k < chain_end) {
      for (int64_t line = 0; line < ahead.panel_lines; ++line) {
        __builtin_prefetch(ahead.panel, 0, 2);
        ahead.panel += kLine;
      }
      if (k % (2 * kStride) == 0) {
        __builtin_prefetch(ahead.rows, 0, 2);
        ahead.rows += kLine;
      } else {
        __builtin_prefetch(out, 1, 3);
        __builtin_prefetch(beside, 0, 2);
        out += kLanes<T>;
        beside += kLanes<T>;
        if (++vector == VECTORS) {
          vector = 0;
          out += ldc - VECTORS * kLanes<T>;
          beside += ahead.beside_stride - VECTORS * kLanes<T>;
        }
      }
      for (const int64_t end = std::min(chain_end, k + kStride); k < end; ++k) {
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
template <class T, int ROWS, int VECTORS, bool ASK = false>
EFFT_INLINE void block(const Term<T>& first, const Term<T>& second, T* c, int64_t ldc,
                       const T* bias, bool add, const Ahead& ahead) {
  Vec<T> total[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int j = 0; j < VECTORS; ++j) {
    const Vec<T> start = bias != nullptr ? load(bias + j * kLanes<T>) : Vec<T>{};
#pragma GCC unroll 32
    for (int i = 0; i < ROWS; ++i) total[i][j] = add ? load(c + i * ldc + j * kLanes<T>) : start;
  }
  if constexpr (ASK) {
    add_term_asking_ahead<T, ROWS, VECTORS>(total, first, ahead, ldc);
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
using BlockFn = void (*)(const Term<T>&, const Term<T>&, T*, int64_t, const T*, bool, const Ahead&);

template <class T, int ROWS, int VECTORS, bool ASK = false>
__attribute__((noinline)) void block_entry(const Term<T>& first, const Term<T>& second, T* c,
                                           int64_t ldc, const T* bias, bool add,
                                           const Ahead& ahead) {
  block<T, ROWS, VECTORS, ASK>(first, second, c, ldc, bias, add, ahead);
}

template <class T, int VECTORS, int... I>
BlockFn<T> block_of_rows(int64_t rows, std::integer_sequence<int, I...>) {
  static constexpr BlockFn<T> table[] = {block_entry<T, I + 1, VECTORS>...};
  return table[rows - 1];
}

// The block for 1 to kRows rows and 1 to kVectors vectors, which asks for nothing ahead.
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

// c [COLUMNS, VECTORS·lanes] += a^T·b over `depth` rows of a [depth, COLUMNS] and b. The rows of
// `a` are far apart, which the processor's own prefetcher does not follow.
constexpr int64_t kAhead = 8;

template <class T, int COLUMNS, int VECTORS>
EFFT_INLINE void tall_block(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t depth, T* c,
                            int64_t ldc) {
  Vec<T> acc[COLUMNS][VECTORS] = {};
  for (int64_t k = 0; k < depth; ++k) {
    __builtin_prefetch(a + kAhead * lda);
    __builtin_prefetch(a + kAhead * lda + COLUMNS - 1);
    step<T, COLUMNS, VECTORS>(acc, a, 1, b);
    a += lda;
    b += ldb;
  }
#pragma GCC unroll 32
  for (int i = 0; i < COLUMNS; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) {
      T* to = c + i * ldc + j * kLanes<T>;
      store(to, load(to) + acc[i][j]);
    }
  }
}

template <class T, int VECTORS>
void tall_columns(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t depth, T* c,
                  int64_t ldc, int64_t columns) {
  constexpr int kWide = kAccumulators / VECTORS;
  int64_t i = 0;
  for (; i + kWide <= columns; i += kWide) {
    tall_block<T, kWide, VECTORS>(a + i, lda, b, ldb, depth, c + i * ldc, ldc);
  }
  for (; i + 4 <= columns; i += 4) {
    tall_block<T, 4, VECTORS>(a + i, lda, b, ldb, depth, c + i * ldc, ldc);
  }
  for (; i < columns; ++i) {
    tall_block<T, 1, VECTORS>(a + i, lda, b, ldb, depth, c + i * ldc, ldc);
  }
}

// Rows that a tall product sums in one chain; a block of rows is one.
constexpr int64_t kTallChain = 256;

// c [columns, width] += a^T·b for a [depth, columns] and b [depth, width], width a multiple of the
// lanes.
template <class T>
void tall_product(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t depth, T* c,
                  int64_t ldc, int64_t columns, int64_t width) {
  for (; depth > kTallChain; depth -= kTallChain) {
    tall_product(a, lda, b, ldb, kTallChain, c, ldc, columns, width);
    a += kTallChain * lda;
    b += kTallChain * ldb;
  }
  for (int64_t j = 0; j < width; j += kVectors * kLanes<T>) {
    switch ((width - j) / kLanes<T>) {
      case 1:
        tall_columns<T, 1>(a, lda, b + j, ldb, depth, c + j, ldc, columns);
        break;
      case 2:
        tall_columns<T, 2>(a, lda, b + j, ldb, depth, c + j, ldc, columns);
        break;
      default:
        tall_columns<T, kVectors>(a, lda, b + j, ldb, depth, c + j, ldc, columns);
    }
  }
}

}  // namespace efft_kernels::cpu::EFFT_ISA
