// dX = dY·W + S·down^T, S = dY·B;  d_down = x^T·S;  d_B = dY^T·P, and from it d_core and d_up.
#pragma once

#include "factors.h"
#include "made_rows.h"
#include "product.h"

namespace efft_kernels::cpu::EFFT_ISA {

template <class T>
struct BackwardWorkspace {
  PaddedFactors<T> factors;
  Product<T> product;
  MadeRows<T> made;
  T* thin_in = nullptr;
  T* tail = nullptr;
  T* x = nullptr;  // [slots, kBlockRows or 2, K], where x is made or not stored in T
  T* p = nullptr;  // [slots, kBlockRows, width]
  int64_t block_rows = kBlockRows;
  int64_t paired_size = 0;
  T* paired = nullptr;    // [slots, paired_size], where the product is in pairs: pairs of rows
  T* d_b_t = nullptr;     // [slots, Ra, N padded]
  T* d_down_t = nullptr;  // [slots, Ra, K padded]
  T* d_b = nullptr;       // [N, width]
  T* d_down = nullptr;    // [K, width]
  T* d_core = nullptr;    // [G·Ra, rb]
  T* d_up = nullptr;      // [up_rows, rb]

  BackwardWorkspace(Arena<T>& arena, const Backward& args)
      : factors(arena, args.factors, args.N, args.K),
        product(arena, args.dy, args.dx, args.weight, false, args.M, args.N, args.K, factors.width,
                args.threads, args.strategy == kMerged),
        made(arena, args) {
    const int64_t rows = args.slots * kBlockRows;
    if (args.dx) tail = arena.take(tail_size<T>(args.factors.Ra, args.K));
    if (product.in_pairs) {
      thin_in = arena.take(args.N / 2 * factors.width);
      // Rows of P or S, and beside them a panel of dY or x, or rows of an x that is made.
      int64_t columns = kPanel<T>;
      if (args.d_down && !made.in_panels()) {
        columns = std::max(columns, round_up(args.K, kLanes<T>));
        block_rows =
            std::clamp<int64_t>(kPairedNumbers / args.K / kRows * kRows, kRows, kBlockRows);
      }
      paired_size = block_rows / 2 * (factors.width + columns);
      paired = arena.take(args.slots * paired_size);
    }
    if (args.d_core || args.d_up) {
      p = arena.take(rows * factors.width);
      d_b_t = arena.take(args.slots * args.factors.Ra * round_up(args.N, kLanes<T>));
      d_b = arena.take(args.N * factors.width);
    }
    if (args.d_down) {
      if (args.made_by != kPlain || !is_direct<T>(args.x)) {
        x = arena.take((product.in_pairs ? args.slots * 2 : rows) * args.K);
      }
      d_down_t = arena.take(args.slots * args.factors.Ra * round_up(args.K, kLanes<T>));
      d_down = arena.take(args.K * factors.width);
    }
    // Without a core, d_up is d_B itself.
    if (args.d_core) d_core = arena.take(args.factors.G * args.factors.Ra * factors.rb);
    if (args.d_up && args.factors.core) d_up = arena.take(factors.up_rows * factors.rb);
  }
};

// Partial sums [slots, Ra, columns padded] to add up, in the order of the slots, and the transpose
// of their sum [columns, width], zero beyond Ra.
template <class T>
struct Partial {
  const T* sums;
  T* transposed;
  int64_t columns;
};

template <class T>
void reduce_slots(const Partial<T>& partial, int64_t slots, int64_t Ra, int64_t width, int64_t j) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t padded = round_up(partial.columns, lanes);
  for (int64_t r = 0; r < width; r += lanes) {
    Vec<T> sums[lanes] = {};
    for (int64_t i = 0; i < std::min(lanes, Ra - r); ++i) {
      for (int64_t slot = 0; slot < slots; ++slot) {
        sums[i] += load(partial.sums + (slot * Ra + r + i) * padded + j);
      }
    }
    transpose<T>(sums);
    for (int64_t i = 0; i < std::min(lanes, partial.columns - j); ++i) {
      store(partial.transposed + (j + i) * width + r, sums[i]);
    }
  }
}

template <class T>
void reduce_slots(const Partial<T> (&partials)[2], int64_t slots, int64_t Ra, int64_t width) {
  constexpr int64_t kPart = 16 * kLanes<T>;
  const int64_t parts[2] = {(partials[0].columns + kPart - 1) / kPart,
                            (partials[1].columns + kPart - 1) / kPart};
  parallel_each(parts[0] + parts[1], [&](int64_t task) {
    const Partial<T>& partial = partials[task < parts[0] ? 0 : 1];
    const int64_t begin = (task < parts[0] ? task : task - parts[0]) * kPart;
    const int64_t end = std::min(partial.columns, begin + kPart);
    for (int64_t j = begin; j < end; j += kLanes<T>) reduce_slots(partial, slots, Ra, width, j);
  });
}

// P of a block of rows, zero beyond the rank; null where d_B is not wanted.
template <class T>
const T* read_p(const Backward& args, const BackwardWorkspace<T>& memory, int64_t slot,
                int64_t first, int64_t rows) {
  if (memory.d_b_t == nullptr) return nullptr;
  T* p = memory.p + slot * kBlockRows * memory.factors.width;
  read_padded(args.p, first, rows, args.factors.Ra, p, memory.factors.width);
  return p;
}

// S = dY·B of a block of rows, where `s` is not null, and the slot's sums d_B += dY^T·P and
// d_down += x^T·S, where they are wanted. dY is read in steps that stay in cache for both.
template <class T>
void thin_products(const Backward& args, const BackwardWorkspace<T>& memory, int64_t slot,
                   int64_t first, int64_t rows, Rows<T> dy, T* s) {
  const int64_t Ra = args.factors.Ra, width = memory.factors.width;
  const T* p = read_p(args, memory, slot, first, rows);
  const int64_t N = round_up(args.N, kLanes<T>);
  for (int64_t n = 0; n < args.N; n += kDepth) {
    const int64_t depth = std::min(kDepth, args.N - n);
    const Rows<T> slice{dy.data + n, dy.stride};
    if (s != nullptr) {
      thin_product<T>(slice, rows, depth, memory.factors.b + n * width, width, s, n > 0);
    }
    if (p != nullptr) {
      add_transposed_product<T>({p, width}, Ra, slice, depth, rows,
                                memory.d_b_t + slot * Ra * N + n, N);
    }
  }
  if (memory.d_down_t == nullptr) return;
  const int64_t K = round_up(args.K, kLanes<T>);
  T* scratch = memory.x == nullptr ? nullptr : memory.x + slot * kBlockRows * args.K;
  add_transposed_product<T>({s, width}, Ra, memory.made.rows(first, rows, args.K, scratch), args.K,
                            rows, memory.d_down_t + slot * Ra * K, K);
}

// The same in pairs: of numbers of a row for S, and of two rows for the sums over rows, a panel of
// columns at a time.
template <class T>
void thin_products_in_pairs(const Backward& args, const BackwardWorkspace<T>& memory, int64_t slot,
                            int64_t first, int64_t rows, T* s) {
  constexpr int64_t panel = kPanel<T>;
  const int64_t Ra = args.factors.Ra, width = memory.factors.width, steps = (rows + 1) / 2;
  Pair* const thin = reinterpret_cast<Pair*>(memory.paired + slot * memory.paired_size);
  Pair* const many = thin + steps * width;
  // c [Ra, padded] += thin^T·(the rows of a panel), which pack(j, across) leaves where it says.
  const auto add_panels = [&](const T* from, int64_t columns, T* c, const auto& pack) {
    pack_pairs_rows<float>({const_cast<T*>(from), kStored<T>, width, 1}, 0, width, width, 0, rows,
                           thin);
    const int64_t padded = round_up(columns, kLanes<T>);
    for (int64_t j = 0; j < padded; j += panel) {
      const int64_t across = std::min(panel, padded - j);
      add_transposed_product<Pair>({reinterpret_cast<const uint16_t*>(thin), 2 * width}, Ra,
                                   {pack(j, across), across}, across, steps, c + j, padded);
    }
  };
  if (s != nullptr) {
    const Rows<uint16_t> dy = memory.product.halves_of(first);
    const Pair* b = reinterpret_cast<const Pair*>(memory.thin_in);
    thin_product<Pair>(dy, rows, args.N / 2, b, width, s);
  }
  if (const T* p = read_p(args, memory, slot, first, rows); p != nullptr) {
    T* d_b = memory.d_b_t + slot * Ra * round_up(args.N, kLanes<T>);
    add_panels(p, args.N, d_b, [&](int64_t j, int64_t across) {
      pack_pairs_rows<uint16_t>(args.dy, j, std::min(across, args.N - j), across, first, rows,
                                many);
      return many;
    });
  }
  if (memory.d_down_t == nullptr) return;
  const bool whole = !memory.made.in_panels();
  if (whole) {
    T* scratch = memory.x == nullptr ? nullptr : memory.x + slot * 2 * args.K;
    memory.made.pair_rows(first, rows, args.K, scratch, many);
  }
  T* d_down = memory.d_down_t + slot * Ra * round_up(args.K, kLanes<T>);
  add_panels(s, args.K, d_down, [&](int64_t j, int64_t across) {
    if (whole) return many + j * steps;
    pack_pairs_rows<uint16_t>(args.x, j, std::min(across, args.K - j), across, first, rows, many);
    return many;
  });
}

template <class T>
void backward(const Backward& args) {
  BackwardWorkspace<T> memory = allocate<BackwardWorkspace, T>(args);
  PaddedFactors<T>& factors = memory.factors;
  Product<T>& product = memory.product;
  const bool merge = args.strategy == kMerged;
  const int64_t Ra = args.factors.Ra, width = factors.width;

  fold(args.factors, args.N, args.K, factors);
  memory.made.read_norm(args.K);
  Tail<T> tail;
  if (args.dx) {
    tail = pack_tail(factors.down, width, Ra, args.K, product.in_pairs, memory.tail);
    if (merge) product.w.merge(factors.b, width, std::exchange(tail, {}));
  }
  product.pack_thin_in(factors.b, memory.thin_in);
  const bool make_s = args.d_down || (args.dx && !merge);
  const auto clear = [&](T* sums, int64_t slot, int64_t columns) {
    const int64_t count = Ra * round_up(columns, kLanes<T>);
    if (sums != nullptr) std::memset(sums + slot * count, 0, count * sizeof(T));
  };
  parallel_each(args.slots, [&](int64_t slot) {
    clear(memory.d_b_t, slot, args.N);
    clear(memory.d_down_t, slot, args.K);
  });

  product.each_range([&](int64_t begin, int64_t end) {
    const bool before = make_s || memory.d_b_t != nullptr || product.a_scratch != nullptr;
    parallel_each(before ? args.slots : 0, [&](int64_t slot) {
      each_block(begin, end, slot, args.slots, memory.block_rows, [&](int64_t first, int64_t rows) {
        T* s = make_s ? product.thin_of(begin, first) : nullptr;
        if constexpr (kCanPair<T>) {
          if (product.in_pairs) {
            thin_products_in_pairs(args, memory, slot, first, rows, s);
            if (make_s) product.round_thin(begin, first, rows, Ra);
            return;
          }
        }
        product.load(begin, first, rows);
        const Rows<T> dy = product.rows_at(begin, first);
        thin_products(args, memory, slot, first, rows, dy, s);
      });
    });
    if (args.dx) product.run(begin, end, [&](int64_t) { return TailOfRows<T>{tail, end - begin}; });
  });

  reduce_slots<T>({{memory.d_down_t, memory.d_down, memory.d_down == nullptr ? 0 : args.K},
                   {memory.d_b_t, memory.d_b, memory.d_b == nullptr ? 0 : args.N}},
                  args.slots, Ra, width);
  if (memory.d_down != nullptr) write_padded(args.d_down, 0, args.K, Ra, memory.d_down, width);
  if (memory.d_b == nullptr) return;
  unfold(args.factors, args.N, factors, memory.d_b, memory.d_up, memory.d_core);
  if (args.d_up) {
    const T* d_up = memory.d_up != nullptr ? memory.d_up : memory.d_b;
    write_padded(args.d_up, 0, factors.up_rows, args.factors.Rb, d_up, factors.rb);
  }
  if (args.d_core) {
    write_padded(args.d_core, 0, args.factors.G * Ra, args.factors.Rb, memory.d_core, factors.rb);
  }
}

}  // namespace efft_kernels::cpu::EFFT_ISA
