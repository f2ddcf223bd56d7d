#pragma once

#include "gemm/schedule.h"

// Shapes and shared memory of the sm_90a GEMM.
namespace efft_kernels::cuda {

// How the operand w [I, C] lies in memory: rows of I elements (the forward, W itself) or rows of C
// elements (dX). wgmma calls them K-major and MN-major.
enum class WLayout { kRowsOfI, kRowsOfC };

constexpr int kSm90SmemLimit = 227 * 1024;
constexpr int kLineBytes = 128;  // one row of a box: 64 elements
constexpr int kSlabBytes = 8 * kLineBytes;

// kRide_: columns of thin_in that join each tile of w (0: P is given and ends the loop instead).
template <int kBlockC_, int kRide_, WLayout kLayout_>
struct Sm90Config {
  static constexpr int kBlockM = kSm90BlockM;
  static constexpr int kBlockC = kBlockC_;
  static constexpr int kBlockI = 64;
  static constexpr int kRide = kRide_;
  static constexpr WLayout kLayout = kLayout_;

  static constexpr int kConsumers = 2;  // warpgroups, 64 rows each
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;

  static constexpr int kMmaC = kBlockC + kRide;  // columns of one wgmma
  static constexpr int kABytes = kBlockM * kLineBytes;
  static constexpr int kWBytes = kBlockC * kLineBytes;
  // Rows of I: kRide lines more. Rows of C: one more chunk of 64 columns, zeros beyond the rank.
  static constexpr int kRideBytes =
      kRide == 0 ? 0 : (kLayout == WLayout::kRowsOfI ? kRide : kBlockI) * kLineBytes;
  static constexpr int kStageBytes = kABytes + kWBytes + kRideBytes;
  static constexpr int kChunkBytes = kBlockI * kLineBytes;  // 64 columns of w in rows of C

  // The epilogue's pieces of 64 rows and 64 columns, two per consumer.
  static constexpr int kPieceBytes = 64 * kLineBytes;
  static constexpr int kStagingBytes = kConsumers * 2 * kPieceBytes;

  static constexpr int kBarrierBytes = 256;
  static constexpr int kAlignment = 1024;
  static constexpr int kStagesThatFit =
      (kSm90SmemLimit - kAlignment - kBarrierBytes - kStagingBytes) / kStageBytes;
  static constexpr int kStages = kStagesThatFit < 6 ? kStagesThatFit : 6;
  static constexpr int kSmemBytes =
      kAlignment + kStages * kStageBytes + kStagingBytes + kBarrierBytes;

  static_assert(kBlockC % 64 == 0 && kMmaC <= 256 && kRide % 16 == 0, "a shape of wgmma");
  static_assert(kStageBytes % kSlabBytes == 0, "every operand starts at a swizzle period");
  static_assert(2 * kStages * 8 <= kBarrierBytes, "two barriers per stage");
  static_assert(kStages >= 3, "loads need to run ahead");
  static_assert(128 * kProducerRegisters + 128 * kConsumers * kConsumerRegisters <= 64 * 1024,
                "the register file");
};

}  // namespace efft_kernels::cuda
