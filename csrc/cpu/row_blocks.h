// out = a·w + bias + (a·thin_in)·thin_out^T over blocks of rows that stay in cache: what the
// forward, the backward and the mixed batch share. Forward and dX are the same function:
//
//   forward   y  = x·W^T + bias + P·B^T,   P = x·down    a=x,  w=W^T, thin_in=down, thin_out=B
//   backward  dX = dY·W + S·down^T,        S = dY·B      a=dY, w=W,   thin_in=B,    thin_out=down
//
// w is packed once per call into panels of kPanel columns, in steps of kDepth rows. While a block
// of rows of `a` is in cache, the thin products that read it are made too, so x and dY are read
// from memory once each.
#pragma once

#include "product.h"

namespace efft_kernels::cpu::EFFT_ISA {

template <class T>
struct RowBlocks {
  Matrix a;    // [M, inner]
  Matrix out;  // [M, columns], contiguous; null where it is not wanted
  int64_t M, inner, width;
  Packed<T> packed;
  const T* bias = nullptr;    // in bias_memory, once it has been read
  T* bias_memory = nullptr;   // [padded columns]
  T* a_scratch = nullptr;     // [slots, kBlockRows, inner], where `a` is not stored in T
  T* out_scratch = nullptr;   // [slots, kBlockRows, padded columns], where `out` is not stored in T
  T* thin_scratch = nullptr;  // [slots, kBlockRows, width]

  RowBlocks(Arena<T>& arena, const Matrix& a, const Matrix& out, int64_t M, int64_t inner,
            int64_t columns, int64_t width, int64_t slots)
      : a(a), out(out), M(M), inner(inner), width(width) {
    const int64_t rows = slots * kBlockRows;
    if (!is_direct<T>(a)) a_scratch = arena.take(rows * inner);
    thin_scratch = arena.take(rows * width);
    if (!out) return;
    packed = Packed<T>(arena, inner, columns);
    bias_memory = arena.take(packed.padded);
    if (!is_direct<T>(out)) out_scratch = arena.take(rows * packed.padded);
  }

  void read_bias(const Matrix& from) {
    if (!from) return;
    read_padded(from, 0, 1, packed.columns, bias_memory, packed.padded);
    bias = bias_memory;
  }

  // A slot's scratch for a·thin_in.
  T* thin(int64_t slot) const { return thin_scratch + slot * kBlockRows * width; }

  // Rows of `a` for a slot to read.
  Rows<T> load(int64_t slot, int64_t first, int64_t rows) const {
    T* scratch = a_scratch == nullptr ? nullptr : a_scratch + slot * kBlockRows * inner;
    return rows_of(a, first, rows, inner, scratch);
  }

  // Rows of `out`, and the fused products, from what `load` gave for them.
  void run_block(int64_t slot, int64_t first, int64_t rows, Rows<T> loaded,
                 const FusedThinProducts<T>& fused) const {
    const int64_t next_rows = a_scratch == nullptr ? std::min(rows, M - first - rows) : 0;
    const int64_t columns = packed.columns;
    if (out_scratch == nullptr) {
      T* data = static_cast<T*>(out.data) + first * columns;
      product<T>(loaded, rows, next_rows, packed, bias, fused, {data, columns, false});
    } else {
      T* data = out_scratch + slot * kBlockRows * packed.padded;
      product<T>(loaded, rows, next_rows, packed, bias, fused, {data, packed.padded, true});
      write_padded(out, first, rows, columns, data, packed.padded);
    }
  }
};

// The arrays of Workspace<T> in the calling thread's memory, which grows to what they take.
template <template <class> class Workspace, class T, class Arguments>
Workspace<T> allocate(const Arguments& args) {
  Arena<T> measure(nullptr);
  Workspace<T>{measure, args};
  Arena<T> arena(static_cast<T*>(workspace(measure.used() * sizeof(T))));
  return {arena, args};
}

}  // namespace efft_kernels::cpu::EFFT_ISA
