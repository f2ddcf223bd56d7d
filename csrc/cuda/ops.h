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

// (z + y, x̂, P, mean [M], rstd [M]); without y the first is empty. x̂ and P are in down's dtype.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> native_norm(Tensor z,                 // [M, K]
                                                               std::optional<Tensor> y,  // [M, K]
                                                               Tensor weight,            // [K]
                                                               Tensor bias,              // [K]
                                                               Tensor down,  // [K, rank]
                                                               double eps);

// (dz [M, K], the same in dout's dtype as dy, the partial sums [programs, K, R] of d_down; where
// b and p are given S = dy·b [M, rank'] and the partial sums [programs, K, R] of dy^T·p, else both
// empty).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> native_norm_grad(
    Tensor dout,              // [M, K]
    Tensor z,                 // [M, K]
    Tensor mean,              // [M]
    Tensor rstd,              // [M]
    Tensor weight,            // [K]
    Tensor bias,              // [K]
    Tensor residual,          // [M, K]
    Tensor s,                 // [M, rank]
    std::optional<Tensor> b,  // [K, rank']
    std::optional<Tensor> p   // [M, rank']
);

// (gelu(h), P = gelu(h)·down).
std::tuple<Tensor, Tensor> native_gelu(Tensor h,      // [M, C]
                                       Tensor down);  // [C, rank]

// dh = da·gelu'(h), in da's place; the partial sums [parts, M, R] of S = dh·b and [programs, C, R]
// of dh^T·p and of gelu(h)^T·s.
std::tuple<Tensor, Tensor, Tensor> native_gelu_grad(Tensor da,  // [M, C]
                                                    Tensor h,   // [M, C]
                                                    Tensor s,   // [M, rank]
                                                    Tensor b,   // [C, rank']
                                                    Tensor p);  // [M, rank']

// The partial sums [programs, K, R] of d_down = x^T·S and of d_B = dY^T·P.
std::tuple<Tensor, Tensor> native_pair_grad(Tensor x,     // [M, K]
                                            Tensor dy,    // [M, K]
                                            Tensor down,  // [K, rank]
                                            Tensor b);    // [K, rank]

}  // namespace efft_kernels::cuda
