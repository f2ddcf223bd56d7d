#include "gemm/sm90.cuh"

namespace efft_kernels::cuda {

cudaError_t launch_gemm_sm90_bf16(const GemmArguments& g, const GemmMaps& maps, int block_c,
                                  const Device& device, cudaStream_t stream) {
  return launch_sm90<__nv_bfloat16>(g, maps, block_c, device, stream);
}

}  // namespace efft_kernels::cuda
