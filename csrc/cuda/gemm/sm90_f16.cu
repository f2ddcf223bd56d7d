#include "gemm/sm90.cuh"

namespace efft_kernels::cuda {

cudaError_t launch_gemm_sm90_f16(const GemmArguments& g, const GemmMaps& maps, int block_c,
                                 const Device& device, cudaStream_t stream) {
  return launch_sm90<__half>(g, maps, block_c, device, stream);
}

}  // namespace efft_kernels::cuda
