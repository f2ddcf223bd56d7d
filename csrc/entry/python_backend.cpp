#include "python_backend.h"

#include <ATen/record_function.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/Exceptions.h>

#include <string>
#include <vector>

namespace efft_kernels {
namespace {

// Raises the exception that Python has set, in a form that may cross threads.
[[noreturn]] void throw_python_error() {
  python_error error;
  error.persist();
  throw error;
}

// None for an undefined tensor.
py::object wrap(const Tensor& tensor) {
  auto wrapped = py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor));
  if (!wrapped) throw_python_error();
  return wrapped;
}

Tensor unwrap(const py::tuple& answer, size_t position) {
  PyObject* const item = PyTuple_GET_ITEM(answer.ptr(), position);
  TORCH_CHECK_TYPE(THPVariable_Check(item), "a backend must return a Tensor at position ", position,
                   ", got ", Py_TYPE(item)->tp_name);
  return THPVariable_Unpack(item);
}

template <typename... Arguments>
py::tuple call(PyObject* function, size_t results, const Arguments&... arguments) {
  PyObject* const positional[] = {arguments.ptr()...};
  const auto answer = py::reinterpret_steal<py::object>(
      PyObject_Vectorcall(function, positional, sizeof...(arguments), nullptr));
  if (!answer) throw_python_error();
  TORCH_CHECK_TYPE(PyTuple_Check(answer.ptr()) && py::len(answer) == results,
                   "a backend must return a tuple of ", results, ", got ",
                   std::string(py::repr(answer)));
  return answer;
}

torch::autograd::variable_list call_backward(PyObject* function, const BackwardOperands& t) {
  const auto wanted = [&](Need need) { return (t.needs & need) != 0; };
  const py::tuple needs = py::make_tuple(wanted(kNeedX), wanted(kNeedWeight), wanted(kNeedBias),
                                         wanted(kNeedDown), wanted(kNeedCore), wanted(kNeedUp));
  const py::tuple answer = call(function, 6, wrap(t.dy), wrap(t.x), wrap(t.weight), wrap(t.p),
                                wrap(t.down), wrap(t.core), wrap(t.up), needs);
  torch::autograd::variable_list grads(6);
  for (size_t i = 0; i < 6; ++i) {
    if (t.needs >> i & 1) grads[i] = unwrap(answer, i);
  }
  return grads;
}

// A backend runs with x's device current, since Triton launches on the current one, and below
// autograd, which has nothing to record. The caller has switched autocast off. ops/dispatch.py does
// the same.
struct BackendContext {
  explicit BackendContext(const Tensor& x)
      : device(x.is_cuda() ? std::optional(x.device()) : std::nullopt) {}
  const c10::OptionalDeviceGuard device;
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
};

}  // namespace

const PythonBackend* python_backend(const py::object& forward, const py::object& backward) {
  static auto* known = new std::vector<const PythonBackend*>();
  for (const PythonBackend* backend : *known) {
    if (backend->forward == forward.ptr() && backend->backward == backward.ptr()) return backend;
  }
  known->push_back(new PythonBackend{forward.inc_ref().ptr(), backward.inc_ref().ptr()});
  return known->back();
}

// In a profile both have the names of the operators that they stand in for.
std::tuple<Tensor, Tensor> python_forward(const PythonBackend& backend, const Operands& t,
                                          bool save_p) {
  RECORD_FUNCTION("efft_kernels::low_rank_linear_fwd", c10::ArrayRef<const c10::IValue>{});
  const BackendContext context(t.x);
  const py::tuple answer =
      call(backend.forward, 2, wrap(t.x), wrap(t.weight), wrap(t.bias.value_or(Tensor())),
           wrap(t.down), wrap(t.core.value_or(Tensor())), wrap(t.up), py::bool_(save_p));
  return {unwrap(answer, 0), save_p ? unwrap(answer, 1) : Tensor()};
}

torch::autograd::variable_list python_backward(const PythonBackend& backend,
                                               const BackwardOperands& t) {
  RECORD_FUNCTION("efft_kernels::low_rank_linear_bwd", c10::ArrayRef<const c10::IValue>{});
  const BackendContext context(t.dy);
  const py::gil_scoped_acquire gil;
  return call_backward(backend.backward, t);
}

Tensor make_x(PyObject* recipe, const std::vector<Tensor>& kept, int64_t K, at::ScalarType dtype) {
  const c10::OptionalDeviceGuard device(kept[0].is_cuda() ? std::optional(kept[0].device())
                                                          : std::nullopt);
  const py::gil_scoped_acquire gil;
  py::list tensors;
  for (const Tensor& tensor : kept) tensors.append(wrap(tensor));
  const auto x = py::reinterpret_steal<py::object>(PyObject_CallOneArg(recipe, tensors.ptr()));
  if (!x) throw_python_error();
  return THPVariable_Unpack(x.ptr()).reshape({-1, K}).to(dtype);
}

Tensor row_index(PyObject* recipe, const Tensor& kept) {
  const py::gil_scoped_acquire gil;
  py::tuple shape(kept.dim());
  for (int64_t i = 0; i < kept.dim(); ++i) shape[i] = kept.size(i);
  const py::object found = py::reinterpret_borrow<py::object>(recipe).attr("row_index")(shape);
  return found.is_none() ? Tensor() : THPVariable_Unpack(found.ptr());
}

torch::autograd::variable_list plain_backward(const BackwardOperands& t) {
  const py::gil_scoped_acquire gil;
  const py::object plain =
      py::module_::import("efft_kernels.ops.functional").attr("plain_backward");
  return call_backward(plain.ptr(), t);
}

}  // namespace efft_kernels
