#pragma once

#include <string>

#include "common/arguments.h"
#include "gemm/tma.h"

// Which kernel a GEMM gets, and what the copy engine has to know of its operands.
namespace efft_kernels::cuda {

// sm_90a with `block` columns per tile, or the general kernel with tiles of `block` × `block`.
struct GemmPlan {
  bool sm90;
  int block;
};

// The sm_90a GEMM's tensor maps; see gemm_sm90.cuh for who reads what.
struct GemmMapParams {
  TensorMapParams a, w, thin_in, p, thin_out, out;
};

constexpr int kRidingRank = 16;

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
  const int w_rows = rows_of_i ? block_c : 64;
  GemmMapParams maps;
  maps.a = map_params(g.a, 64, kSm90BlockM);
  maps.w = map_params(g.w, 64, w_rows);
  maps.thin_in = map_params(g.thin_in, 64, rows_of_i ? kRidingRank : 64);
  maps.p = map_params(g.p, 64, kSm90BlockM);
  maps.thin_out = map_params(g.thin_out, 64, w_rows);
  maps.out = map_params(g.out, 64, 64);
  return maps;
}

// The plan for a, w and out; the thin operands are this library's own and always fit. Where the
// copy engine cannot take a tensor (rows not 16-byte aligned, expanded rows), the general kernel
// does.
inline GemmPlan plan_gemm(const GemmArguments& g, const Device& device) {
  const int64_t m = g.a.rows;
  const int64_t c = g.out.cols;
  const int block_c = sm90_block_c(m, c, device.multiprocessors);
  const GemmMapParams maps = gemm_map_params(g, block_c);
  const bool fits = tensor_map_error(maps.a).empty() && tensor_map_error(maps.w).empty() &&
                    tensor_map_error(maps.out).empty() && m <= INT32_MAX && c <= INT32_MAX &&
                    g.a.cols <= INT32_MAX;
  if (device.sm90 && fits && enough_tiles_for_sm90(m, c, device.multiprocessors))
    return {true, block_c};
  return {false, sm80_block(m, c, device.multiprocessors)};
}

// Whether P can be computed inside the GEMM: on sm_90a, for the one rank whose instructions (144
// and 208 columns) are built. On sm_80 four warps side by side would each compute all of P, half as
// many matrix instructions again.
constexpr bool can_ride(const GemmPlan& plan, int rank_padded) {
  return plan.sm90 && rank_padded == kRidingRank;
}

}  // namespace efft_kernels::cuda
