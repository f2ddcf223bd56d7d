#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "checks.h"
#include "common/arguments.h"

// Torch's tensors as the checks and the launchers see them.
namespace efft_kernels::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// For a dtype that the checks have passed.
Dtype dtype_of(const Tensor& t);

TensorInfo info(const char* name, const Tensor& t);
TensorInfo info(const char* name, const std::optional<Tensor>& t);

// Raises the error of a check, if there is one.
void require(const std::string& error);

// [rows, cols] with unit stride along the columns.
Matrix matrix(const Tensor& t);

Strided strided(const Tensor& t);

// Uninitialised, on the device of `like`.
Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type);

// `t`, or where there is none an empty tensor like `like`: an operator returns no None.
Tensor or_empty(const std::optional<Tensor>& t, const Tensor& like);

// aten::linear, torch's own GEMM.
Tensor torch_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias);

}  // namespace efft_kernels::cuda
