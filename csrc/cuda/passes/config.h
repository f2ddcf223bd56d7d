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
  static constexpr int kStageElements = kTallElements + 64 * kRank;
  static constexpr int kSmemBytes = kStages * kStageElements * 2;

  static_assert(kRows == 64 && kCols == 64, "four warps of 16 rows, of a tile and its transpose");
  static_assert(kSmemBytes <= kSm86SmemLimit, "the smallest of the family");
};

// The same for both products with dY in one pass. P of the row block lies behind the stages.
struct ThinGradConfig {
  static constexpr int kRank = kOnePassRank;
  static constexpr int kRows = kOnePassRows;
  static constexpr int kCols = kPassCols;
  static constexpr int kThreads = 256;
  static constexpr int kStages = 4;
  static constexpr int kTallElements = kRows * kCols;
  static constexpr int kStageElements = kTallElements + kCols * kRank;
  static constexpr int kStagesBytes = kStages * kStageElements * 2;
  static constexpr int kSmemBytes = kStagesBytes + kRows * kRank * 2;

  static_assert(kRank == 16, "the rows of an mma");
  static_assert(kRows == kThreads / 32 * 16 && kCols == kThreads / 32 * 8,
                "a warp has 16 rows of S and 8 rows of d_B");
  static_assert(kSmemBytes <= kSm86SmemLimit, "the smallest of the family");
};

}  // namespace efft_kernels::cuda
