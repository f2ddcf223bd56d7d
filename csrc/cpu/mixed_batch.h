// y = x·W^T + bias + x·down[t]·b[t]^T for every item, t its task.
#pragma once

#include "product.h"

namespace efft_kernels::cpu::EFFT_ISA {

template <class T>
struct MixedBatchWorkspace {
  Product<T> product;
  T* down;     // [tasks, K, width]
  T* b;        // [tasks, N, width]
  T* thin_in;  // [tasks, K / 2, width], in Pairs, where the product is in pairs
  T* tail;     // [tasks, Ra, padded N]

  MixedBatchWorkspace(Arena<T>& arena, const MixedBatch& args)
      : product(arena, args.x, args.y, args.weight, true, args.items * args.rows, args.K, args.N,
                round_up(args.Ra, kLanes<T>), args.threads, false),
        down(arena.take(args.tasks * args.K * product.width)),
        b(arena.take(args.tasks * args.N * product.width)),
        thin_in(arena.take(product.in_pairs ? args.tasks * args.K / 2 * product.width : 0)),
        tail(arena.take(args.tasks * tail_size<T>(args.Ra, args.N))) {}
};

template <class T>
void mixed_batch_forward(const MixedBatch& args) {
  MixedBatchWorkspace<T> memory = allocate<MixedBatchWorkspace, T>(args);
  Product<T>& product = memory.product;
  const int64_t width = product.width;
  const int64_t tail_numbers = tail_size<T>(args.Ra, args.N);
  const T* down = padded(args.down, args.tasks * args.K, args.Ra, width, memory.down);
  const T* b = padded(args.b, args.tasks * args.N, args.Ra, width, memory.b);
  const int64_t thin_in_numbers = (product.in_pairs ? args.K / 2 : args.K) * width;
  parallel_each(args.tasks, [&](int64_t task) {
    pack_tail(b + task * args.N * width, width, args.Ra, args.N, product.in_pairs,
              memory.tail + task * tail_numbers);
    if (!product.in_pairs) return;
    product.pack_thin_in(down + task * args.K * width, memory.thin_in + task * thin_in_numbers);
  });
  const T* thin_in = product.in_pairs ? memory.thin_in : down;
  const int64_t tail_steps = product.in_pairs ? (args.Ra + 1) / 2 : args.Ra;
  product.read_bias(args.bias);

  product.each_range([&](int64_t begin, int64_t end) {
    parallel_each(args.slots, [&](int64_t slot) {
      each_block(begin, end, slot, args.slots, kBlockRows, [&](int64_t first, int64_t rows) {
        product.load(begin, first, rows);
        for (int64_t row = first; row < first + rows;) {
          const int64_t item = row / args.rows;
          const int64_t count = std::min((item + 1) * args.rows, first + rows) - row;
          product.make_thin(begin, row, count, thin_in + args.task_of_item[item] * thin_in_numbers,
                            args.Ra);
          row += count;
        }
      });
    });
    product.run(begin, end, [&](int64_t row) {
      const int64_t item = (begin + row) / args.rows;
      return TailOfRows<T>{{tail_steps, memory.tail + args.task_of_item[item] * tail_numbers},
                           (item + 1) * args.rows - begin};
    });
  });
}

}  // namespace efft_kernels::cpu::EFFT_ISA
