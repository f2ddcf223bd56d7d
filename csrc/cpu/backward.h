// dX = dY·W + S·down^T, S = dY·B;  d_down = x^T·S;  d_B = dY^T·P, and from it d_core and d_up.
#pragma once

#include "factors.h"
#include "made_rows.h"
#include "row_blocks.h"

namespace efft_kernels::cpu::EFFT_ISA {

template <class T>
struct BackwardWorkspace {
  PaddedFactors<T> factors;
  RowBlocks<T> blocks;
  MadeRows<T> made;
  T* tail = nullptr;
  T* x = nullptr;       // [slots, kBlockRows, K], where x is made or not stored in T
  T* p = nullptr;       // [slots, kBlockRows, width]
  T* d_b = nullptr;     // [slots, N, width]
  T* d_down = nullptr;  // [slots, K, width]
  T* d_core = nullptr;  // [G·Ra, rb]
  T* d_up = nullptr;    // [up_rows, rb]

  BackwardWorkspace(Arena<T>& arena, const Backward& args)
      : factors(arena, args.factors, args.N, args.K),
        blocks(arena, args.dy, args.dx, args.M, args.N, args.K, factors.width, args.slots),
        made(arena, args) {
    const int64_t rows = args.slots * kBlockRows;
    if (args.dx) tail = arena.take(args.factors.Ra * blocks.packed.padded);
    if (args.d_core || args.d_up) {
      p = arena.take(rows * factors.width);
      d_b = arena.take(args.slots * args.N * factors.width);
    }
    if (args.d_down) {
      if (args.made_by != kPlain || !is_direct<T>(args.x)) x = arena.take(rows * args.K);
      d_down = arena.take(args.slots * args.K * factors.width);
    }
    // Without a core, d_up is d_B itself.
    if (args.d_core) d_core = arena.take(args.factors.G * args.factors.Ra * factors.rb);
    if (args.d_up && args.factors.core) d_up = arena.take(factors.up_rows * factors.rb);
  }
};

// Partial sums [slots, count]; the first slot's += the others', in the order of the slots.
template <class T>
struct Partial {
  T* sums;
  int64_t count;
};

template <class T>
void reduce_slots(const Partial<T> (&partials)[2], int64_t slots) {
  constexpr int64_t kPart = 4096;
  const int64_t parts[2] = {(partials[0].count + kPart - 1) / kPart,
                            (partials[1].count + kPart - 1) / kPart};
  parallel_each(parts[0] + parts[1], [&](int64_t task) {
    const Partial<T>& partial = partials[task < parts[0] ? 0 : 1];
    const int64_t begin = (task < parts[0] ? task : task - parts[0]) * kPart;
    const int64_t end = std::min(partial.count, begin + kPart);
    for (int64_t slot = 1; slot < slots; ++slot) {
      const T* other = partial.sums + slot * partial.count;
      for (int64_t i = begin; i < end; ++i) partial.sums[i] += other[i];
    }
  });
}

template <class T>
void backward(const Backward& args) {
  BackwardWorkspace<T> memory = allocate<BackwardWorkspace, T>(args);
  PaddedFactors<T>& factors = memory.factors;
  const RowBlocks<T>& blocks = memory.blocks;
  const bool merge = args.strategy == kMerged;
  const int64_t Ra = args.factors.Ra, width = factors.width;

  fold(args.factors, args.N, args.K, factors);
  memory.made.read_norm(args.K);
  FusedThinProducts<T> shared;
  shared.width = width;
  if (args.dx) {
    const Tail<T> tail = pack_tail(factors.down, width, Ra, args.K, memory.tail);
    pack(args.weight, false, merge ? factors.b : nullptr, width, tail, blocks.packed);
    if (!merge) shared.tail = tail;
  }
  if (args.d_down || (args.dx && !merge)) shared.thin_in = factors.b;

  parallel_each(args.slots, [&](int64_t slot) {
    const int64_t row = slot * kBlockRows;
    T* x_scratch = memory.x == nullptr ? nullptr : memory.x + row * args.K;
    T* p = memory.p == nullptr ? nullptr : memory.p + row * width;
    FusedThinProducts<T> fused = shared;
    fused.thin = blocks.thin(slot);
    fused.p = p;
    if (memory.d_b != nullptr) {
      fused.d_b = memory.d_b + slot * args.N * width;
      std::memset(fused.d_b, 0, args.N * width * sizeof(T));
    }
    if (memory.d_down != nullptr) {
      fused.d_down = memory.d_down + slot * args.K * width;
      std::memset(fused.d_down, 0, args.K * width * sizeof(T));
    }
    each_block(args.M, slot, args.slots, [&](int64_t first, int64_t rows) {
      const Rows<T> dy = blocks.load(slot, first, rows);
      if (fused.d_b != nullptr) read_padded(args.p, first, rows, Ra, p, width);
      if (fused.d_down != nullptr) fused.x = memory.made.rows(first, rows, args.K, x_scratch);
      if (args.dx) {
        blocks.run_block(slot, first, rows, dy, fused);
        return;
      }
      // No main product to fuse the thin ones into.
      if (fused.thin_in != nullptr) {
        thin_product(dy, rows, args.N, fused.thin_in, width, fused.thin);
      }
      if (fused.d_b != nullptr) {
        add_transposed_product<T>(dy, {p, width}, rows, fused.d_b, width, args.N, width);
      }
      if (fused.d_down != nullptr) {
        add_transposed_product<T>(fused.x, {fused.thin, width}, rows, fused.d_down, width, args.K,
                                  width);
      }
    });
  });

  reduce_slots<T>({{memory.d_down, memory.d_down == nullptr ? 0 : args.K * width},
                   {memory.d_b, memory.d_b == nullptr ? 0 : args.N * width}},
                  args.slots);
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
