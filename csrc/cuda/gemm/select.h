#pragma once

#include <cstdint>

#include "common/arguments.h"
#include "common/math.h"
#include "gemm/config_sm90.h"

// Which kernel and which tile shape a GEMM gets.
namespace efft_kernels::cuda {

constexpr int64_t waves(int64_t tiles, int multiprocessors) {
  return ceil_div(tiles, multiprocessors);
}

// The column block of the sm_90a GEMM. ViT-B with 64 images and 132 multiprocessors: 192 columns
// give the layers with 768, 2304 and 3072 outputs 3.0, 9.0 and 12.0 waves; 128 columns fit the
// widths 256, 512 and 1024. A tile costs its columns, and 32 more for what does not depend on them
// (its epilogue; an estimate).
constexpr int sm90_block_c(int64_t m, int64_t c, int multiprocessors) {
  const int64_t row_tiles = ceil_div(m, kSm90BlockM);
  const int64_t wide =
      waves(row_tiles * ceil_div(c, kSm90WideBlockC), multiprocessors) * (kSm90WideBlockC + 32);
  const int64_t narrow =
      waves(row_tiles * ceil_div(c, kSm90NarrowBlockC), multiprocessors) * (kSm90NarrowBlockC + 32);
  return wide <= narrow ? kSm90WideBlockC : kSm90NarrowBlockC;
}

// Below a quarter of the GPU's multiprocessors, more and smaller tiles of the general kernel are
// the better use of it (an estimate).
constexpr bool enough_tiles_for_sm90(int64_t m, int64_t c, int multiprocessors) {
  return 4 * ceil_div(m, kSm90BlockM) * ceil_div(c, kSm90NarrowBlockC) >= multiprocessors;
}

// The edge of the general kernel's square tiles: 128 where they fill the GPU, else 64.
constexpr int sm80_block(int64_t m, int64_t c, int multiprocessors) {
  return ceil_div(m, 128) * ceil_div(c, 128) >= multiprocessors ? 128 : 64;
}

// The kernel for a, w and out; the thin operands are this library's own and always fit. Where TMA
// cannot load a tensor (rows not 16-byte aligned, expanded rows), the general kernel does.
inline GemmChoice choose_gemm(const GemmArguments& g, const Device& device) {
  const int64_t m = g.a.rows;
  const int64_t c = g.out.cols;
  const int block_c = sm90_block_c(m, c, device.multiprocessors);
  const GemmMapParams maps = gemm_map_params(g, block_c);
  const bool fits = tensor_map_error(maps.a).empty() && tensor_map_error(maps.w).empty() &&
                    tensor_map_error(maps.out).empty() && fits_int32(m) && fits_int32(c) &&
                    fits_int32(g.a.cols);
  if (kSm90IsBuilt && device.capability == 90 && fits &&
      enough_tiles_for_sm90(m, c, device.multiprocessors))
    return {true, block_c};
  return {false, sm80_block(m, c, device.multiprocessors)};
}

// Whether the GEMM's loop can compute P as well: on sm_90a, for the one rank whose instructions are
// built. On sm_80 four warps side by side would each compute all of P, half as many matrix
// instructions again.
constexpr bool can_compute_p(const GemmChoice& choice, int rank_padded) {
  return choice.sm90 && rank_padded == kComputePRank;
}

}  // namespace efft_kernels::cuda
