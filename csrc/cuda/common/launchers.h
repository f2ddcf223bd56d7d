#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "common/arguments.h"
#include "gemm/select.h"

// The kernels' launchers, each in the file of its kernel. They take raw pointers, launch on
// `stream` of the current device and return its error; nothing here allocates or waits.
namespace efft_kernels::cuda {

cudaError_t launch_gemm(const GemmArguments& g, const GemmPlan& plan, const Device& device,
                        cudaStream_t stream);
cudaError_t launch_gemm_sm80(const GemmArguments& g, int block, cudaStream_t stream);

// The tensor maps of the sm_90a GEMM.
struct GemmMaps {
  CUtensorMap a;         // [M, I]
  CUtensorMap w;         // [C, I] or [I, C]
  CUtensorMap thin_in;   // [R, I] or [I, R]
  CUtensorMap p;         // [M, rank]
  CUtensorMap thin_out;  // [C, R] or [R, C]
  CUtensorMap out;       // [M, C]
};

cudaError_t launch_gemm_sm90_half(const GemmArguments& g, const GemmMaps& maps, int block_c,
                                  const Device& device, cudaStream_t stream);
cudaError_t launch_gemm_sm90_bfloat16(const GemmArguments& g, const GemmMaps& maps, int block_c,
                                      const Device& device, cudaStream_t stream);

cudaError_t launch_thin(const ThinArguments& t, int rank_padded, cudaStream_t stream);

cudaError_t launch_tall_grad(const TallGradArguments& t, int rank_padded, cudaStream_t stream);

// One or two sums in one launch; `second` may have no parts.
cudaError_t launch_reduce(const ReduceArguments& first, const ReduceArguments& second,
                          cudaStream_t stream);

cudaError_t launch_fold(const FoldArguments& f, cudaStream_t stream);

cudaError_t launch_merge(const MergeArguments& m, cudaStream_t stream);

cudaError_t launch_unfold(const UnfoldArguments& u, cudaStream_t stream);

}  // namespace efft_kernels::cuda
