#include "common/device.h"

#include <array>
#include <mutex>

namespace efft_kernels::cuda {

cudaError_t current_device(Device* device) {
  constexpr int kMost = 64;
  static std::array<Device, kMost> known;
  static std::array<std::once_flag, kMost> once;
  int index = 0;
  if (const cudaError_t error = cudaGetDevice(&index); error != cudaSuccess) return error;
  const auto read = [index](Device* into) {
    int major = 0;
    int minor = 0;
    cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&into->multiprocessors, cudaDevAttrMultiProcessorCount, index);
    into->capability = 10 * major + minor;
    return error;
  };
  if (index >= kMost) return read(device);
  cudaError_t error = cudaSuccess;
  std::call_once(once[index], [&] { error = read(&known[index]); });
  *device = known[index];
  return device->multiprocessors == 0 && error == cudaSuccess ? cudaErrorUnknown : error;
}

}  // namespace efft_kernels::cuda
