// y = x·W^T + bias + x·down[t]·b[t]^T for every item, t its task.
#pragma once

#include "row_blocks.h"

namespace efft_kernels::cpu::EFFT_ISA {

template <class T>
struct MixedBatchWorkspace {
  RowBlocks<T> blocks;
  T* down;  // [tasks, K, width]
  T* b;     // [tasks, N, width]
  T* tail;  // [tasks, Ra, padded N]

  MixedBatchWorkspace(Arena<T>& arena, const MixedBatch& args)
      : blocks(arena, args.x, args.y, args.items * args.rows, args.K, args.N,
               round_up(args.Ra, kLanes<T>), args.slots),
        down(arena.take(args.tasks * args.K * blocks.width)),
        b(arena.take(args.tasks * args.N * blocks.width)),
        tail(arena.take(args.tasks * args.Ra * blocks.packed.padded)) {}
};

template <class T>
void mixed_batch_forward(const MixedBatch& args) {
  MixedBatchWorkspace<T> memory = allocate<MixedBatchWorkspace, T>(args);
  RowBlocks<T>& blocks = memory.blocks;
  const int64_t width = blocks.width;
  const int64_t tail_size = args.Ra * blocks.packed.padded;
  const T* down = padded(args.down, args.tasks * args.K, args.Ra, width, memory.down);
  const T* b = padded(args.b, args.tasks * args.N, args.Ra, width, memory.b);
  parallel_each(args.tasks, [&](int64_t task) {
    pack_tail(b + task * args.N * width, width, args.Ra, args.N, memory.tail + task * tail_size);
  });
  pack<T>(args.weight, true, nullptr, width, {}, blocks.packed);
  blocks.read_bias(args.bias);

  // The rows of a block belong to one item, and so to one task's factors.
  const int64_t per_item = (args.rows + kBlockRows - 1) / kBlockRows;
  const int64_t step = round_up((args.rows + per_item - 1) / per_item, kRows);
  const int64_t units = args.items * per_item;
  parallel_each(args.slots, [&](int64_t slot) {
    FusedThinProducts<T> fused;
    fused.width = width;
    fused.thin = blocks.thin(slot);
    const int64_t last = units * (slot + 1) / args.slots;
    for (int64_t unit = units * slot / args.slots; unit < last; ++unit) {
      const int64_t item = unit / per_item;
      const int64_t begin = std::min(args.rows, unit % per_item * step);
      const int64_t rows = std::min(step, args.rows - begin);
      if (rows == 0) continue;
      const int64_t first = item * args.rows + begin;
      const int64_t task = args.task_of_item[item];
      fused.thin_in = down + task * args.K * width;
      fused.tail = {args.Ra, memory.tail + task * tail_size};
      blocks.run_block(slot, first, rows, blocks.load(slot, first, rows), fused);
    }
  });
}

}  // namespace efft_kernels::cpu::EFFT_ISA
