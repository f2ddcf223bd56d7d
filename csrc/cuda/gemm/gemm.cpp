#include "common/launchers.h"
#include "gemm/config_sm90.h"
#include "gemm/encode_tensor_map.h"
#include "gemm/schedule.h"
#include "gemm/sm90.h"

namespace efft_kernels::cuda {
namespace {

cudaError_t launch_gemm_sm90(const GemmArguments& g, int block_c, const Device& device,
                             cudaStream_t stream) {
  const GemmMapParams params = gemm_map_params(g, block_c);
  GemmMaps maps{};
  const auto encode = [&](const TensorMapParams& from, CUtensorMap* to) {
    return encode_tensor_map(from, g.dtype, to);
  };
  cudaError_t error = encode(params.a, &maps.a);
  if (error == cudaSuccess) error = encode(params.w, &maps.w);
  if (error == cudaSuccess && g.compute_p) error = encode(params.thin_in, &maps.thin_in);
  if (error == cudaSuccess && !g.compute_p) error = encode(params.p, &maps.p);
  if (error == cudaSuccess) error = encode(params.thin_out, &maps.thin_out);
  if (error != cudaSuccess) return error;
  // Nothing may refer to a kernel that is not built.
  if constexpr (kSm90IsBuilt) {
    return g.dtype == Dtype::kHalf ? launch_gemm_sm90_f16(g, maps, block_c, device, stream)
                                   : launch_gemm_sm90_bf16(g, maps, block_c, device, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_gemm(const GemmArguments& g, const GemmChoice& choice, const Device& device,
                        cudaStream_t stream) {
  const int block_m = choice.sm90 ? kSm90BlockM : choice.block;
  if (!tiles_fit(g.a.rows, g.out.cols, block_m, choice.block)) return cudaErrorInvalidValue;
  if (choice.sm90) return launch_gemm_sm90(g, choice.block, device, stream);
  if (g.compute_p) return cudaErrorInvalidValue;
  return launch_gemm_sm80(g, choice.block, stream);
}

}  // namespace efft_kernels::cuda
