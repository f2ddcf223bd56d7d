// Sizes of the blocks, memory for them, and the loops over them.
#pragma once

#include "isa.h"
#include "microkernel.h"
#include "storage.h"

namespace efft_kernels::cpu::EFFT_ISA {

// Rows of w in a packed step: a panel of 384 × 48 floats is read from the second-level cache while
// its rows of `a` are in the first. A step is one chain of sums; without fused multiply-adds, which
// the baseline does not have, so long a chain would err more than the budget allows.
constexpr int64_t kDepth = kChain;
template <class T>
constexpr int64_t kPanel = kVectors * kLanes<T>;
// Panels of a tile of `out`, at most: a packed step of them, 384 × 192 floats (AVX-512), 384 × 96
// (AVX2) or 128 × 128 (the baseline, whose panels are narrow), stays in a second-level cache. They
// read the same rows of `a`, which are in the first.
constexpr int64_t kTilePanels = EFFT_VECTOR_BYTES == 16 ? 16 : 4;
// Rows of a tile, at most: with more, its part of `out` pushes the packed step out.
constexpr int64_t kTileRows = 400;
// Rows of a range, at most, and more where there are more threads: they are read from the
// last-level cache for most of the tiles. Numbers of a range that is copied.
constexpr int64_t kRangeRows = 2048, kRangeRowsPerThread = 256, kRangeNumbers = int64_t{1} << 24;
// Rows of a block of the thin products, which read it more than once.
constexpr int64_t kBlockRows = 200;
// Numbers of such a block, in bfloat16, where its rows are made and paired as a whole.
constexpr int64_t kPairedNumbers = 192 * 1024;

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Hands out parts of one allocation; with a null base it only measures.
template <class T>
class Arena {
 public:
  explicit Arena(T* base) : base_(base) {}
  T* take(int64_t count) {
    T* part = base_ == nullptr ? nullptr : base_ + used_;
    used_ += round_up(count, 64 / sizeof(T));
    return part;
  }
  int64_t used() const { return used_; }

 private:
  T* base_;
  int64_t used_ = 0;
};

template <class F>
void parallel_each(int64_t count, const F& body) {
  parallel(
      count,
      [](void* context, int64_t begin, int64_t end) {
        const F& f = *static_cast<const F*>(context);
        for (int64_t i = begin; i < end; ++i) f(i);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// The rows begin .. end of slot `slot` of `slots`, in blocks of at most `most` rows, a multiple of
// kRows; all blocks but the last are one, too.
template <class F>
void each_block(int64_t begin, int64_t end, int64_t slot, int64_t slots, int64_t most,
                const F& body) {
  const int64_t per_slot = round_up((end - begin + slots - 1) / slots, kRows);
  const int64_t first = std::min(end, begin + slot * per_slot);
  const int64_t last = std::min(end, first + per_slot);
  if (first == last) return;
  const int64_t blocks = (last - first + most - 1) / most;
  const int64_t step = round_up((last - first + blocks - 1) / blocks, kRows);
  for (int64_t i = first; i < last; i += step) body(i, std::min(step, last - i));
}

}  // namespace efft_kernels::cpu::EFFT_ISA
