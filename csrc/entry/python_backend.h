// Calls from C++ into Python: the backends that are written in it, and the backward in torch's own
// operators.
#pragma once

#include <torch/extension.h>

#include <tuple>

#include "operands.h"

namespace efft_kernels {

// A backend's functions, as `_callables` of ops/eager_entry.py makes them.
struct PythonBackend {
  PyObject* forward;   // (x, weight, bias, down, core, up, save_p) -> (y, p or None)
  PyObject* backward;  // (dy, x, weight, p, down, core, up, needs) -> six gradients or None
};

// The one PythonBackend for this pair of functions. It is never freed: there are as few as pairs of
// strategies, and an autograd node that holds one may be destroyed on a thread without the GIL.
// Needs the GIL.
const PythonBackend* python_backend(const py::object& forward, const py::object& backward);

// (y, P or undefined). Needs the GIL.
std::tuple<Tensor, Tensor> python_forward(const PythonBackend& backend, const Operands& operands,
                                          bool save_p);

// x [M, K] in `dtype` from what is kept. Takes the GIL.
Tensor make_x(PyObject* recipe, const std::vector<Tensor>& kept, int64_t K, at::ScalarType dtype);

// The recipe's row_index for what is kept; undefined where it has none.
Tensor row_index(PyObject* recipe, const Tensor& kept);

// Six gradients, undefined where they are not wanted. Takes the GIL.
torch::autograd::variable_list python_backward(const PythonBackend& backend,
                                               const BackwardOperands& operands);

// The same by `plain_backward` of ops/functional.py, whose operators autograd and vmap know. Takes
// the GIL.
torch::autograd::variable_list plain_backward(const BackwardOperands& operands);

}  // namespace efft_kernels
