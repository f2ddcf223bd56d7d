#pragma once

#include "common/smem_limits.h"
#include "passes/sizes.h"

namespace efft_kernels::cuda {

// Shapes and shared memory of a pass over a tall matrix: a stage holds a tile of it and the thin
// matrix's rows that go with it.
template <int kRank_>
struct PassConfig {
  static constexpr int kRank = kRank_;
  static constexpr int kRows = kPassRows;
  static constexpr int kCols = kPassCols;
  static constexpr int kThreads = 128;
  static constexpr int kStages = kRank <= 32 ? 4 : 3;
  static constexpr int kTallElements = kRows * kCols;
  static constexpr int kThinElements = 64 * kRank;
  static constexpr int kStageElements = kTallElements + kThinElements;
  // The gradient's variant of `thin` keeps the row block's P next to the stages.
  static constexpr int kSmemBytes = kStages * kStageElements * 2;
  static constexpr int kGradSmemBytes = kSmemBytes + kThinElements * 2;

  static_assert(kRows == 64 && kCols == 64, "four warps of 16 rows, of a tile and its transpose");
  static_assert(kGradSmemBytes <= kSm86SmemLimit, "the smallest of the family");
};

}  // namespace efft_kernels::cuda
