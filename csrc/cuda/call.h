#pragma once

#include <optional>
#include <tuple>

#include "common/device_guard.h"
#include "tensors.h"

namespace efft_kernels::cuda {

// One call's operands, what is derived from their shapes, and its launches: each allocates what the
// kernel writes, and launches it on torch's current stream of the operands' device.
struct Call {
  // The thin factors as the other kernels take them.
  struct Folded {
    std::optional<Tensor> b;  // [N, R], if wanted
    Tensor down;              // [K, R], or transposed [R, K] in aligned rows
    Matrix down_matrix;       // without what aligns the rows
  };
  struct FoldOptions {
    bool b;
    bool transpose_down;
  };

  // A GEMM over rows of `a`: the kernel it gets, and its arguments but for the low-rank part.
  struct Gemm {
    GemmChoice choice;
    GemmArguments arguments;
    Tensor weight;               // kept alive
    std::optional<Tensor> bias;  // kept alive
    Tensor out;                  // [M, N] in the forward, [M, K] in the backward
  };

  OnDeviceOf here;
  Device device;
  cudaStream_t stream;
  Tensor rows;    // x [M, K], or dy [M, N] in the backward: what fresh tensors are like
  Tensor weight;  // [N, K]
  Tensor down;    // [K, Ra]
  std::optional<Tensor> core;  // [G, Ra, Rb]
  Tensor up;                   // [1 or G, N/G, Rb]
  int64_t m, n, k, slices;     // slices: G
  int ra, rb, rank_padded;     // rank_padded: R, the width that the kernels are compiled for
  ScalarType type;             // of rows
  Dtype dtype;                 // the same

  Call(const Tensor& rows, const Tensor& weight, const Tensor& down,
       const std::optional<Tensor>& core, const Tensor& up);

  bool up_is_shared() const { return up.size(0) != slices; }

  // B, if wanted, and down in the dtype `as`, padded to R columns.
  Folded fold(ScalarType as, FoldOptions options) const;

  // W in x's dtype: itself, or cast by the merge kernel.
  Tensor cast_weight() const;

  // W + B·down^T in x's dtype, rounded once.
  Tensor merged_weight() const;

  // tall·thin_in into `s`, and into `s_copy` where there is one.
  void thin(const Tensor& tall, const Matrix& thin_in, const Tensor& s,
            const std::optional<Tensor>& s_copy = std::nullopt) const;

  // tall·thin_in into `s`, and the partial sums of tall^T·P, [programs, C, R].
  Tensor thin_grad(const Tensor& tall, const Matrix& thin_in, const Tensor& p,
                   const Tensor& s) const;

  // The partial sums of tall^T·thin, [splits, C, R].
  Tensor tall_grad(const Tensor& tall, const Tensor& thin) const;

  // d_B and d_down from their partial sums, in one launch; either may be absent.
  void reduce(const std::optional<Tensor>& d_b_partial, const std::optional<Tensor>& d_b,
              const std::optional<Tensor>& d_down_partial,
              const std::optional<Tensor>& d_down) const;

  // d_core [G, Ra, Rb] and d_up [1 or G, N/G, Rb] from d_B [N, Ra] in float32; either may be
  // absent.
  void unfold(const Tensor& d_b, const std::optional<Tensor>& d_core,
              const std::optional<Tensor>& d_up) const;

  Gemm choose(const Tensor& a, WLayout layout,
              const std::optional<Tensor>& bias = std::nullopt) const;

  // Launches it with its low-rank part. `p`: read, or written where the loop computes it.
  void launch(const Gemm& gemm, const Folded& folded, const std::optional<Tensor>& p,
              bool compute_p) const;

 private:
  Strided up_by_slice() const;
  Strided core_or_null() const { return core ? strided(*core) : Strided{}; }
  Tensor weight_plus(const std::optional<Folded>& low_rank) const;
  ReduceArguments sum_of(const std::optional<Tensor>& partial,
                         const std::optional<Tensor>& out) const;
};

}  // namespace efft_kernels::cuda
