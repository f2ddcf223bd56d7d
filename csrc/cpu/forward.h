// y = x·W^T + bias + P·B^T, and P = x·down.
#pragma once

#include "factors.h"
#include "row_blocks.h"

namespace efft_kernels::cpu::EFFT_ISA {

template <class T>
struct ForwardWorkspace {
  PaddedFactors<T> factors;
  RowBlocks<T> blocks;
  T* tail;

  ForwardWorkspace(Arena<T>& arena, const Forward& args)
      : factors(arena, args.factors, args.N, args.K),
        blocks(arena, args.x, args.y, args.M, args.K, args.N, factors.width, args.slots),
        tail(arena.take(args.factors.Ra * blocks.packed.padded)) {}
};

template <class T>
void forward(const Forward& args) {
  ForwardWorkspace<T> memory = allocate<ForwardWorkspace, T>(args);
  PaddedFactors<T>& factors = memory.factors;
  RowBlocks<T>& blocks = memory.blocks;
  const bool merge = args.strategy == kMerged;
  const int64_t Ra = args.factors.Ra, width = factors.width;

  fold(args.factors, args.N, args.K, factors);
  const Tail<T> tail = pack_tail(factors.b, width, Ra, args.N, memory.tail);
  pack(args.weight, true, merge ? factors.down : nullptr, width, tail, blocks.packed);
  blocks.read_bias(args.bias);

  FusedThinProducts<T> shared;
  shared.width = width;
  if (args.p || !merge) shared.thin_in = factors.down;
  if (!merge) shared.tail = tail;
  parallel_each(args.slots, [&](int64_t slot) {
    FusedThinProducts<T> fused = shared;
    fused.thin = blocks.thin(slot);
    each_block(args.M, slot, args.slots, [&](int64_t first, int64_t rows) {
      blocks.run_block(slot, first, rows, blocks.load(slot, first, rows), fused);
      if (args.p) write_padded(args.p, first, rows, Ra, fused.thin, width);
    });
  });
}

}  // namespace efft_kernels::cpu::EFFT_ISA
