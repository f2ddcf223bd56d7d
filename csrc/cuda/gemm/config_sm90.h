#pragma once

#include "common/arguments.h"
#include "common/smem_limits.h"
#include "gemm/tma.h"

// Shapes, shared memory and TMA boxes of the sm_90a GEMM.
namespace efft_kernels::cuda {

// The build defines EFFT_KERNELS_SM90 where it compiles the sm90_*.cu files.
#ifdef EFFT_KERNELS_SM90
constexpr bool kSm90IsBuilt = true;
#else
constexpr bool kSm90IsBuilt = false;
#endif

constexpr int kSm90BlockM = 128;
constexpr int kSm90WideBlockC = 192;
constexpr int kSm90NarrowBlockC = 128;
constexpr int kSm90BlockI = 64;
constexpr int kComputePRank = 16;  // the padded rank at which the loop can compute P

constexpr int kLineBytes = 128;  // one row of a box: 64 elements
constexpr int kSlabBytes = 8 * kLineBytes;

// kPCols_: columns of thin_in beside each tile of w, whose product is P (0: P is read from memory
// instead, in further steps of the loop).
template <int kBlockC_, int kPCols_, WLayout kLayout_>
struct Sm90Config {
  static constexpr int kBlockM = kSm90BlockM;
  static constexpr int kBlockC = kBlockC_;
  static constexpr int kBlockI = kSm90BlockI;
  static constexpr int kPCols = kPCols_;
  static constexpr bool kComputeP = kPCols > 0;
  static constexpr WLayout kLayout = kLayout_;

  static constexpr int kConsumers = 2;  // warpgroups, 64 rows each
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;

  // MN-major, thin_in's columns have a wgmma of their own: one of 192 columns and a part of a chunk
  // of 64 took half as long again.
  static constexpr bool kPApart = kComputeP && kLayout == WLayout::kRowsOfC;
  static constexpr int kMmaC = kPApart ? kBlockC : kBlockC + kPCols;  // columns of one wgmma
  static constexpr int kAccumulators = (kBlockC + kPCols) / 2;
  static constexpr int kABytes = kBlockM * kLineBytes;
  static constexpr int kHalfABytes = kABytes / 2;  // a consumer's rows, and a box
  static constexpr int kWBytes = kBlockC * kLineBytes;
  // Rows of I: kPCols lines more. Rows of C: kBlockI lines of kPCols columns.
  static constexpr int kThinInBytes = kPCols * kBlockI * 2;
  static constexpr int kStageBytes = kABytes + kWBytes + kThinInBytes;
  static constexpr int kChunkBytes = kBlockI * kLineBytes;  // 64 columns of w in rows of C

  // The epilogue's pieces of 64 columns; every warp of a consumer has room for its 16 rows of one.
  static constexpr int kPieces = kBlockC / 64;
  static constexpr int kPieceBytes = 16 * kLineBytes;
  static constexpr int kStagingBytes = kConsumers * 4 * kPieceBytes;

  static constexpr int kBarrierBytes = 256;
  static constexpr int kAlignment = 1024;  // of shared memory as the kernel declares it
  static constexpr int kStagesThatFit =
      (kSm90SmemLimit - kBarrierBytes - kStagingBytes) / kStageBytes;
  static constexpr int kStages = kStagesThatFit < 6 ? kStagesThatFit : 6;
  static constexpr int kSmemBytes = kStages * kStageBytes + kStagingBytes + kBarrierBytes;

  static_assert(kBlockC % 64 == 0 && kMmaC <= 256 && kPCols % 16 == 0, "a shape of wgmma");
  static_assert(kStageBytes % kSlabBytes == 0, "every operand starts at a swizzle period");
  static_assert(2 * kStages * 8 <= kBarrierBytes, "two barriers per stage");
  static_assert(kStages >= 3, "loads need to run ahead");
  static_assert(128 * kProducerRegisters + 128 * kConsumers * kConsumerRegisters <= 64 * 1024,
                "the register file");
};

// The GEMM's tensor maps, see sm90.cuh for who reads what; `out` only for its limits, as its stores
// are of 16 bytes.
struct GemmMapParams {
  TensorMapParams a, w, thin_in, p, thin_out, out;
};

inline TensorMapParams map_params(const Matrix& m, int box_cols, int box_rows) {
  TensorMapParams p;
  p.address = reinterpret_cast<uintptr_t>(m.data);
  p.cols = static_cast<uint64_t>(m.cols);
  p.rows = static_cast<uint64_t>(m.rows);
  p.row_bytes = static_cast<uint64_t>(m.stride) * kElementBytes;
  p.box_cols = static_cast<uint32_t>(box_cols);
  p.box_rows = static_cast<uint32_t>(box_rows);
  return p;
}

inline GemmMapParams gemm_map_params(const GemmArguments& g, int block_c) {
  const bool rows_of_i = g.layout == WLayout::kRowsOfI;
  const int w_rows = rows_of_i ? block_c : kSm90BlockI;
  GemmMapParams maps;
  maps.a = map_params(g.a, 64, kSm90BlockM / 2);
  maps.w = map_params(g.w, 64, w_rows);
  maps.thin_in = rows_of_i ? map_params(g.thin_in, 64, kComputePRank)
                           : map_params(g.thin_in, kComputePRank, kSm90BlockI);
  if (!rows_of_i) maps.thin_in.swizzle_bytes = 2 * kComputePRank;
  maps.p = map_params(g.p, 64, kSm90BlockM / 2);
  maps.thin_out = map_params(g.thin_out, 64, w_rows);
  maps.out = map_params(g.out, 64, 16);
  return maps;
}

}  // namespace efft_kernels::cuda
