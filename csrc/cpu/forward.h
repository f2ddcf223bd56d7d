// y = x·W^T + bias + P·B^T, and P = x·down.
#pragma once

#include "factors.h"
#include "product.h"

namespace efft_kernels::cpu::EFFT_ISA {

template <class T>
struct ForwardWorkspace {
  PaddedFactors<T> factors;
  Product<T> product;
  T* tail;

  ForwardWorkspace(Arena<T>& arena, const Forward& args)
      : factors(arena, args.factors, args.N, args.K),
        product(arena, args.x, args.y, args.weight, true, args.M, args.K, args.N, factors.width,
                args.slots, args.threads, args.strategy == kMerged),
        tail(arena.take(args.factors.Ra * round_up(args.N, kLanes<T>))) {}
};

template <class T>
void forward(const Forward& args) {
  ForwardWorkspace<T> memory = allocate<ForwardWorkspace, T>(args);
  PaddedFactors<T>& factors = memory.factors;
  Product<T>& product = memory.product;
  const bool merge = args.strategy == kMerged;
  const int64_t Ra = args.factors.Ra, width = factors.width;

  fold(args.factors, args.N, args.K, factors);
  const Tail<T> tail = pack_tail(factors.b, width, Ra, args.N, memory.tail);
  if (merge) product.w.merge(factors.down, width, tail);
  product.read_bias(args.bias);

  const bool make_p = args.p || !merge;
  product.each_range([&](int64_t begin, int64_t end) {
    const bool before = make_p || product.a_scratch != nullptr;
    parallel_each(before ? args.slots : 0, [&](int64_t slot) {
      each_block(begin, end, slot, args.slots, product.block_rows,
                 [&](int64_t first, int64_t rows) {
                   const Rows<T> x = product.load(slot, begin, first, rows);
                   if (!make_p) return;
                   T* p = product.thin_of(begin, first);
                   thin_product(x, rows, args.K, factors.down, width, p);
                   if (args.p) write_padded(args.p, first, rows, Ra, p, width);
                 });
    });
    product.run(begin, end,
                [&](int64_t) { return TailOfRows<T>{merge ? Tail<T>{} : tail, end - begin}; });
  });
}

}  // namespace efft_kernels::cpu::EFFT_ISA
