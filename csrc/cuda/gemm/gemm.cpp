#include "common/device.h"
#include "common/launchers.h"

namespace efft_kernels::cuda {
namespace {

// EFFT_KERNELS_SM90: the build has code for sm_90a, and with it the *_sm90.cu files.
#ifdef EFFT_KERNELS_SM90
cudaError_t launch_gemm_sm90(const GemmArguments& g, int block_c, const Device& device,
                             cudaStream_t stream) {
  const GemmMapParams params = gemm_map_params(g, block_c);
  GemmMaps maps{};
  const auto encode = [&](const TensorMapParams& from, CUtensorMap* to) {
    return encode_tensor_map(from, g.dtype, to);
  };
  cudaError_t error = encode(params.a, &maps.a);
  if (error == cudaSuccess) error = encode(params.w, &maps.w);
  if (error == cudaSuccess && g.ride) error = encode(params.thin_in, &maps.thin_in);
  if (error == cudaSuccess && !g.ride) error = encode(params.p, &maps.p);
  if (error == cudaSuccess) error = encode(params.thin_out, &maps.thin_out);
  if (error == cudaSuccess) error = encode(params.out, &maps.out);
  if (error != cudaSuccess) return error;
  return g.dtype == Dtype::kHalf ? launch_gemm_sm90_half(g, maps, block_c, device, stream)
                                 : launch_gemm_sm90_bfloat16(g, maps, block_c, device, stream);
}
#endif

}  // namespace

cudaError_t launch_gemm(const GemmArguments& g, const GemmPlan& plan,
                        [[maybe_unused]] const Device& device, cudaStream_t stream) {
  const int block_m = plan.sm90 ? kSm90BlockM : plan.block;
  if (!tiles_fit(g.a.rows, g.out.cols, block_m, plan.block)) return cudaErrorInvalidValue;
#ifdef EFFT_KERNELS_SM90
  if (plan.sm90) return launch_gemm_sm90(g, plan.block, device, stream);
#endif
  if (plan.sm90 || g.ride) return cudaErrorInvalidValue;
  return launch_gemm_sm80(g, plan.block, stream);
}

}  // namespace efft_kernels::cuda
