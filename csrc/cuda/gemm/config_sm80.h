#pragma once

#include "gemm/config_sm90.h"

// Shapes and shared memory of the kernels that run on every GPU from sm_80 on.
namespace efft_kernels::cuda {

constexpr int kSm80SmemLimit = 163 * 1024;
constexpr int kSm86SmemLimit = 99 * 1024;  // also sm_89 and sm_120

template <int kBlock_>
struct Sm80Config {
  static constexpr int kBlockM = kBlock_;
  static constexpr int kBlockC = kBlock_;
  static constexpr int kBlockI = 32;
  static constexpr int kWarpsM = 2;
  static constexpr int kWarpsC = kBlock_ / 32;
  static constexpr int kWarpM = kBlockM / kWarpsM;
  static constexpr int kWarpC = kBlockC / kWarpsC;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsC;
  static constexpr int kStages = 4;
  static constexpr int kStageElements = (kBlockM + kBlockC) * kBlockI;
  static constexpr int kSmemBytes = kStages * kStageElements * 2;

  static_assert(kBlockM * kBlockC * 2 <= kSmemBytes, "the output tile is staged there");
  static_assert(kSmemBytes <= kSm86SmemLimit, "the smallest of the family");
};

// The passes over a tall matrix: a stage holds a tile of it and the thin matrix's rows beside it.
template <int kRank_>
struct PassConfig {
  static constexpr int kRank = kRank_;
  static constexpr int kRows = 64;
  static constexpr int kCols = 64;
  static constexpr int kThreads = 128;
  static constexpr int kStages = kRank <= 32 ? 4 : 3;
  static constexpr int kTallElements = kRows * kCols;
  static constexpr int kThinElements = 64 * kRank;
  static constexpr int kStageElements = kTallElements + kThinElements;
  // thin_grad keeps the row block's P beside the stages.
  static constexpr int kSmemBytes = kStages * kStageElements * 2;
  static constexpr int kGradSmemBytes = kSmemBytes + kThinElements * 2;

  static_assert(kGradSmemBytes <= kSm86SmemLimit, "the smallest of the family");
};

}  // namespace efft_kernels::cuda
