#pragma once

#include "common/smem_limits.h"

// Shapes and shared memory of the GEMM that runs on every GPU from sm_80 on.
namespace efft_kernels::cuda {

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

}  // namespace efft_kernels::cuda
