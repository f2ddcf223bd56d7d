// y = x·W^T + bias + x·down[t]·b[t]^T for every item, t its task.
#pragma once

#include "product.h"

namespace efft_kernels::cpu::EFFT_ISA {

template <class T>
struct MixedBatchWorkspace {
  Product<T> product;
  T* down;  // [tasks, K, width]
  T* b;     // [tasks, N, width]
  T* tail;  // [tasks, Ra, padded N]

  MixedBatchWorkspace(Arena<T>& arena, const MixedBatch& args)
      : product(arena, args.x, args.y, args.weight, true, args.items * args.rows, args.K, args.N,
                round_up(args.Ra, kLanes<T>), args.slots, args.threads, false),
        down(arena.take(args.tasks * args.K * product.width)),
        b(arena.take(args.tasks * args.N * product.width)),
        tail(arena.take(args.tasks * args.Ra * round_up(args.N, kLanes<T>))) {}
};

template <class T>
void mixed_batch_forward(const MixedBatch& args) {
  MixedBatchWorkspace<T> memory = allocate<MixedBatchWorkspace, T>(args);
  Product<T>& product = memory.product;
  const int64_t width = product.width;
  const int64_t tail_size = args.Ra * round_up(args.N, kLanes<T>);
  const T* down = padded(args.down, args.tasks * args.K, args.Ra, width, memory.down);
  const T* b = padded(args.b, args.tasks * args.N, args.Ra, width, memory.b);
  parallel_each(args.tasks, [&](int64_t task) {
    pack_tail(b + task * args.N * width, width, args.Ra, args.N, memory.tail + task * tail_size);
  });
  product.read_bias(args.bias);

  product.each_range([&](int64_t begin, int64_t end) {
    parallel_each(args.slots, [&](int64_t slot) {
      each_block(begin, end, slot, args.slots, product.block_rows,
                 [&](int64_t first, int64_t rows) {
                   const Rows<T> x = product.load(slot, begin, first, rows);
                   for (int64_t row = first; row < first + rows;) {
                     const int64_t item = row / args.rows;
                     const int64_t count = std::min((item + 1) * args.rows, first + rows) - row;
                     thin_product<T>({x.data + (row - first) * x.stride, x.stride}, count, args.K,
                                     down + args.task_of_item[item] * args.K * width, width,
                                     product.thin_of(begin, row));
                     row += count;
                   }
                 });
    });
    product.run(begin, end, [&](int64_t row) {
      const int64_t item = (begin + row) / args.rows;
      return TailOfRows<T>{{args.Ra, memory.tail + args.task_of_item[item] * tail_size},
                           (item + 1) * args.rows - begin};
    });
  });
}

}  // namespace efft_kernels::cpu::EFFT_ISA
