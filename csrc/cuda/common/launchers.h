#pragma once

#include <cuda_runtime_api.h>

#include "common/arguments.h"

// The kernels' launchers, each in its kernel's file. They launch on `stream` of the current device
// and return its error; none allocates or waits.
namespace efft_kernels::cuda {

cudaError_t launch_gemm(const GemmArguments& g, const GemmChoice& choice, const Device& device,
                        cudaStream_t stream);
cudaError_t launch_gemm_sm80(const GemmArguments& g, int block, cudaStream_t stream);

cudaError_t launch_thin(const ThinArguments& t, int rank_padded, cudaStream_t stream);

cudaError_t launch_thin_grad(const ThinGradArguments& t, cudaStream_t stream);

cudaError_t launch_tall_grad(const TallGradArguments& t, int rank_padded, cudaStream_t stream);

// Widths and ranks within those of chain/sizes.h.
cudaError_t launch_norm(const NormArguments& a, cudaStream_t stream);
cudaError_t launch_norm_grad(const NormGradArguments& a, cudaStream_t stream);
cudaError_t launch_gelu(const GeluArguments& a, cudaStream_t stream);
cudaError_t launch_gelu_grad(const GeluGradArguments& a, cudaStream_t stream);
cudaError_t launch_pair_grad(const PairGradArguments& a, cudaStream_t stream);

// One or two sums in one launch; `second` may have no parts.
cudaError_t launch_reduce(const ReduceArguments& first, const ReduceArguments& second,
                          cudaStream_t stream);

cudaError_t launch_fold(const FoldArguments& f, cudaStream_t stream);

cudaError_t launch_merge(const MergeArguments& m, cudaStream_t stream);

cudaError_t launch_unfold(const UnfoldArguments& u, cudaStream_t stream);

}  // namespace efft_kernels::cuda
