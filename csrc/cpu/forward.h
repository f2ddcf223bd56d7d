// y = x·W^T + bias + P·B^T, and P = x·down.
#pragma once

#include "factors.h"
#include "product.h"

namespace efft_kernels::cpu::EFFT_ISA {

template <class T>
struct ForwardWorkspace {
  PaddedFactors<T> factors;
  Product<T> product;
  T* thin_in;
  T* tail;

  ForwardWorkspace(Arena<T>& arena, const Forward& args)
      : factors(arena, args.factors, args.N, args.K),
        product(arena, args.x, args.y, args.weight, true, args.M, args.K, args.N, factors.width,
                args.threads, args.strategy == kMerged),
        thin_in(arena.take(product.in_pairs ? args.K / 2 * factors.width : 0)),
        tail(arena.take(tail_size<T>(args.factors.Ra, args.N))) {}
};

template <class T>
void forward(const Forward& args) {
  ForwardWorkspace<T> memory = allocate<ForwardWorkspace, T>(args);
  PaddedFactors<T>& factors = memory.factors;
  Product<T>& product = memory.product;
  const bool merge = args.strategy == kMerged;
  const int64_t Ra = args.factors.Ra, width = factors.width;

  fold(args.factors, args.N, args.K, factors);
  const Tail<T> tail = pack_tail(factors.b, width, Ra, args.N, product.in_pairs, memory.tail);
  const T* thin_in = product.pack_thin_in(factors.down, memory.thin_in);
  if (merge) product.w.merge(factors.down, width, tail);
  product.read_bias(args.bias);

  const bool make_p = args.p || !merge;
  product.each_range([&](int64_t begin, int64_t end) {
    const bool before = make_p || product.a_scratch != nullptr;
    parallel_each(before ? args.slots : 0, [&](int64_t slot) {
      each_block(begin, end, slot, args.slots, kBlockRows, [&](int64_t first, int64_t rows) {
        product.load(begin, first, rows);
        if (!make_p) return;
        product.make_thin(begin, first, rows, thin_in, Ra);
        if (args.p) {
          write_padded(args.p, first, rows, Ra, product.thin_of(begin, first), width);
        }
      });
    });
    product.run(begin, end,
                [&](int64_t) { return TailOfRows<T>{merge ? Tail<T>{} : tail, end - begin}; });
  });
}

}  // namespace efft_kernels::cpu::EFFT_ISA
