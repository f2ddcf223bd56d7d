// The operator's forward by the chosen backend, and its autograd node.
#pragma once

#include "python_backend.h"

namespace efft_kernels {

// What runs a call: the native operators of csrc/schemas.cpp with these strategies, or a backend in
// Python; where neither, ops/functional.py takes it.
struct Choice {
  bool native = false;
  int64_t forward_strategy = -1, backward_strategy = -1;
  const PythonBackend* python = nullptr;
  bool cast_weight = false;  // give both passes a frozen weight in x's dtype
};

// (y [M, N], P [M, Ra] if `save_p`, else undefined or empty), below autograd.
std::tuple<Tensor, Tensor> run_forward(const Choice& choice, const Operands& operands, bool save_p);

// y [M, N] with its node; `needs` are bits of Need.
Tensor run_with_node(const Choice& choice, const Operands& operands, int64_t needs,
                     const Source& source);

// A strided tensor without anything that a kernel would overlook: a Python subclass's dispatch, a
// pending negation, a tangent of forward-mode differentiation.
bool is_plain(const Tensor& tensor);

// A row-contiguous matrix, as the CUDA kernels read it; those of the CPU read any strides.
Tensor with_contiguous_rows(const Tensor& matrix);

}  // namespace efft_kernels
