// The tensors of one call.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/python_headers.h>

#include <optional>
#include <vector>

#include "codes.h"

namespace efft_kernels {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct Operands {
  Tensor x;             // [..., K]; [M, K] for a backend
  Tensor weight;        // [N, K]
  OptionalTensor bias;  // [N]
  Tensor down;          // [K, Ra]
  OptionalTensor core;  // [G, Ra, Rb]
  Tensor up;            // [1 or G, N/G, Rb]
};

// What x is made from in the backward, as ops/recompute.py found it: then x is not kept.
struct Source {
  PyObject* recipe = nullptr;  // of ops/recompute.py, never freed; null: x is kept
  int64_t made_by = kPlain;    // a MadeBy
  bool moved = false;          // whether x's rows have other places than those that are kept
  bool attached = true;        // whether `kept` is part of its graph
  std::vector<Tensor> kept;    // undefined where there is none
};

struct BackwardOperands {
  Tensor dy;      // [M, N]
  Tensor x;       // [M, K]; undefined unless `needs` has down or weight
  Tensor weight;  // [N, K]
  Tensor p;       // [M, Ra]; undefined unless `needs` has core or up
  Tensor down;    // [K, Ra]
  Tensor core;    // [G, Ra, Rb], or undefined
  Tensor up;      // [1 or G, N/G, Rb]
  int64_t needs;  // bits of Need
};

}  // namespace efft_kernels
