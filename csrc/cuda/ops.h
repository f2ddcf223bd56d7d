#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

// The operators of csrc/schemas.cpp on CUDA tensors.
namespace efft_kernels::cuda {

using torch::stable::Tensor;

// (y [M, N], P [M, Ra] if `save_p`, else empty), in x's dtype.
std::tuple<Tensor, Tensor> native_fwd(Tensor x,                    // [M, K]
                                      Tensor weight,               // [N, K]
                                      std::optional<Tensor> bias,  // [N]
                                      Tensor down,                 // [K, Ra]
                                      std::optional<Tensor> core,  // [G, Ra, Rb]
                                      Tensor up,                   // [1 or G, N/G, Rb]
                                      bool save_p, int64_t strategy);

// (dx, d_down, d_core, d_up), each empty unless its bit of `needs` is set.
std::tuple<Tensor, Tensor, Tensor, Tensor> native_bwd(Tensor dy,                   // [M, N]
                                                      std::optional<Tensor> x,     // [M, K]
                                                      Tensor weight,               // [N, K]
                                                      std::optional<Tensor> p,     // [M, Ra]
                                                      Tensor down,                 // [K, Ra]
                                                      std::optional<Tensor> core,  // [G, Ra, Rb]
                                                      Tensor up,  // [1 or G, N/G, Rb]
                                                      int64_t needs, int64_t strategy);

}  // namespace efft_kernels::cuda
