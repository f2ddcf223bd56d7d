// `low_rank_linear` from Python to the backend in one call: checks, autocast, the choice of backend
// and strategy, and the autograd node, without torch.library or a torch.autograd.Function in
// Python. The native operators run without the GIL; a backend in Python is called by its `forward`
// and `backward`.
//
// `try_run` returns None for a call that it does not take: operands that do not fit, a torch.func
// transform, a trace, a dispatch mode, a tensor subclass. ops/functional.py then takes the call,
// and raises the error if there is one.
//
// This library is built against one torch version's C++ interface. Without it every call goes
// through ops/functional.py.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TracerMode.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <array>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "node.h"

namespace efft_kernels {
namespace {

bool is_half(at::ScalarType dtype) { return dtype == at::kHalf || dtype == at::kBFloat16; }

bool is_floating(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || is_half(dtype);
}

// Whether the operands' kinds, dtypes, devices and shapes fit, as ops/checks.py demands; that file
// raises the error that says which does not. This copy only answers yes or no, in less than a
// microsecond.
bool fits(const Operands& t, bool autocast) {
  const auto dtype = t.x.scalar_type();
  const bool mixed = autocast && is_half(dtype);
  const auto tensor_fits = [&](const Tensor& tensor, bool factor) {
    const auto own = tensor.scalar_type();
    return is_plain(tensor) && is_floating(own) && tensor.device() == t.x.device() &&
           (own == dtype || mixed || (factor && own == at::kFloat && is_half(dtype)));
  };
  if (!tensor_fits(t.x, false) || !tensor_fits(t.weight, false)) return false;
  if (t.bias && !tensor_fits(*t.bias, false)) return false;
  if (!tensor_fits(t.down, true) || !tensor_fits(t.up, true)) return false;
  if (t.core && !tensor_fits(*t.core, true)) return false;
  const auto factor_dtype = t.down.scalar_type();
  if (t.up.scalar_type() != factor_dtype) return false;
  if (t.core && t.core->scalar_type() != factor_dtype) return false;

  if (t.weight.dim() != 2 || t.weight.size(0) < 1 || t.weight.size(1) < 1) return false;
  const int64_t N = t.weight.size(0), K = t.weight.size(1);
  if (t.x.dim() == 0 || t.x.size(-1) != K) return false;
  if (t.bias && (t.bias->dim() != 1 || t.bias->size(0) != N)) return false;
  if (t.down.dim() != 2 || t.down.size(0) != K || t.down.size(1) < 1) return false;
  if (t.up.dim() != 3 || (t.core && t.core->dim() != 3)) return false;
  const int64_t Ra = t.down.size(1), Rb = t.core ? t.core->size(2) : Ra;
  if (t.core && (t.core->size(0) < 1 || t.core->size(1) != Ra || Rb < 1)) return false;
  const int64_t G = t.core ? t.core->size(0) : t.up.size(0);
  if (G < 1 || N % G != 0) return false;
  if (t.up.size(0) != G && !(t.core && t.up.size(0) == 1)) return false;
  return t.up.size(1) == N / G && t.up.size(2) == Rb;
}

// What the CUDA kernels demand beyond that: numbers of 16 and 32 bits, and the weight's rows as
// they are.
bool native_reads(const Operands& t) {
  if (!t.x.is_cuda()) return true;
  const auto is_double = [](const Tensor& tensor) { return tensor.scalar_type() == at::kDouble; };
  return t.weight.stride(1) == 1 && !is_double(t.x) && !is_double(t.weight) &&
         !(t.bias && is_double(*t.bias)) && !is_double(t.down) && !(t.core && is_double(*t.core)) &&
         !is_double(t.up);
}

// All that a choice depends on: M, N, K, G, Ra, Rb, and a word of dtypes and flags.
struct Key {
  std::array<int64_t, 7> words;
  bool operator==(const Key& other) const { return words == other.words; }
};

struct KeyHash {
  size_t operator()(const Key& key) const {
    size_t hash = 0;
    for (const int64_t word : key.words) {
      hash ^= std::hash<int64_t>{}(word) + 0x9e3779b97f4a7c15ull + (hash << 6) + (hash >> 2);
    }
    return hash;
  }
};

Key key_of(const Operands& t, int64_t rows, bool training, int64_t requested) {
  const int64_t flags = static_cast<int64_t>(t.x.scalar_type()) |
                        (static_cast<int64_t>(t.weight.scalar_type()) << 8) |
                        (static_cast<int64_t>(training) << 15) |
                        (static_cast<int64_t>(t.x.device().type()) << 16) |
                        (static_cast<int64_t>(t.x.device().index() + 1) << 24) | (requested << 32) |
                        (static_cast<int64_t>(t.down.scalar_type()) << 40);
  const int64_t G = t.core ? t.core->size(0) : t.up.size(0);
  return {{rows, t.weight.size(0), t.weight.size(1), G, t.down.size(1), t.up.size(2), flags}};
}

std::unordered_map<Key, Choice, KeyHash>& remembered_choices() {
  static auto* table = new std::unordered_map<Key, Choice, KeyHash>();
  return *table;
}

constexpr size_t kMostChoices = 4096;

Choice choose(const Operands& t, int64_t rows, bool training, int64_t requested,
              const py::function& decide) {
  const Key key = key_of(t, rows, training, requested);
  auto& table = remembered_choices();
  if (const auto found = table.find(key); found != table.end()) return found->second;
  const py::object answer = decide(t.x, t.weight, t.down, t.core, t.up, rows, training, requested);
  Choice choice;
  if (!answer.is_none()) {
    const auto [forward, backward, cast_weight] =
        answer.cast<std::tuple<py::object, py::object, bool>>();
    if (PyCallable_Check(forward.ptr()) != 0) {
      choice.python = python_backend(forward, backward);
    } else {
      choice = {true, forward.cast<int64_t>(), backward.cast<int64_t>()};
    }
    choice.cast_weight = cast_weight;
  }
  if (table.size() >= kMostChoices) table.clear();
  table.emplace(key, choice);
  return choice;
}

// x in the ambient autocast dtype; float64 stays, as in torch's own operators.
Tensor to_autocast_dtype(const Tensor& x, bool autocast) {
  if (!autocast || !(x.scalar_type() == at::kFloat || is_half(x.scalar_type()))) return x;
  return x.to(at::autocast::get_autocast_dtype(x.device().type()));
}

int64_t needs_of(const Operands& t) {
  if (!at::GradMode::is_enabled()) return 0;
  const auto bit = [](const Tensor& tensor, Need need) {
    return tensor.requires_grad() ? static_cast<int64_t>(need) : 0;
  };
  return bit(t.x, kNeedX) | bit(t.weight, kNeedWeight) | (t.bias ? bit(*t.bias, kNeedBias) : 0) |
         bit(t.down, kNeedDown) | (t.core ? bit(*t.core, kNeedCore) : 0) | bit(t.up, kNeedUp);
}

OptionalTensor unpack_optional(py::handle argument) {
  return argument.is_none() ? OptionalTensor() : OptionalTensor(THPVariable_Unpack(argument.ptr()));
}

// A recipe, which nodes hold as an integer, and which may be dropped on a thread without the GIL.
PyObject* kept_forever(PyObject* recipe) {
  static auto* known = new std::unordered_set<PyObject*>();
  if (known->insert(recipe).second) Py_INCREF(recipe);
  return recipe;
}

// A Source of ops/recompute.py, or None.
Source unpack_source(py::handle argument) {
  Source source;
  if (argument.is_none()) return source;
  const auto parts = py::reinterpret_borrow<py::tuple>(argument);
  source.recipe = kept_forever(parts[0].ptr());
  source.made_by = parts[0].attr("code").cast<int64_t>();
  source.moved = parts[0].attr("moved").cast<bool>();
  for (const py::handle kept : py::tuple(parts[1])) {
    source.kept.push_back(kept.is_none() ? Tensor() : THPVariable_Unpack(kept.ptr()));
  }
  source.attached = parts[2].cast<bool>();
  return source;
}

// requested: a code for the backend and strategy in the call, for `decide` to read.
// source: what x can be made from in the backward, a Source of ops/recompute.py, or None.
// decide: returns (forward, backward, cast_weight), the first two being the native operators'
// strategies or the functions of a backend in Python, or None where ops/functional.py should take
// the call.
OptionalTensor try_run(py::handle x_argument, py::handle weight, py::handle bias, py::handle down,
                       py::handle core, py::handle up, int64_t requested,
                       const py::function& decide, py::handle source_argument) {
  // A subclass may have a __torch_function__ of its own; a Parameter has none.
  if (at::impl::torch_function_mode_enabled()) return std::nullopt;
  for (const py::handle argument : {x_argument, weight, down, up}) {
    if (!THPVariable_CheckExact(argument.ptr())) return std::nullopt;
  }
  for (const py::handle argument : {bias, core}) {
    if (!argument.is_none() && !THPVariable_CheckExact(argument.ptr())) return std::nullopt;
  }
  // A mode or a trace has to see the operator, not what a backend does in its place.
  if (c10::impl::TorchDispatchModeTLS::any_modes_set()) return std::nullopt;
  if (at::tracer::impl::is_dispatch_enabled()) return std::nullopt;
  const Tensor& x = THPVariable_Unpack(x_argument.ptr());
  if (!is_plain(x) || !(x.is_cpu() || x.is_cuda())) return std::nullopt;

  const bool autocast = at::autocast::is_autocast_enabled(x.device().type());
  Operands t{to_autocast_dtype(x, autocast), THPVariable_Unpack(weight.ptr()),
             unpack_optional(bias),          THPVariable_Unpack(down.ptr()),
             unpack_optional(core),          THPVariable_Unpack(up.ptr())};
  if (!fits(t, autocast)) return std::nullopt;

  const int64_t needs = needs_of(t);
  const Source source = unpack_source(source_argument);
  const int64_t N = t.weight.size(0), K = t.weight.size(1), rows = t.x.numel() / K;
  const Choice choice = choose(t, rows, needs & (kNeedCore | kNeedUp), requested, decide);
  if (choice.native ? !native_reads(t) : choice.python == nullptr) return std::nullopt;

  if (x.dim() != 2) t.x = t.x.reshape({rows, K});
  if (choice.native) t.x = with_contiguous_rows(t.x);
  const bool frozen_in_training = needs != 0 && !(needs & kNeedWeight);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  std::optional<py::gil_scoped_release> no_gil;
  if (choice.native) no_gil.emplace();
  if (choice.cast_weight && frozen_in_training) t.weight = t.weight.to(t.x.scalar_type());
  Tensor y = needs == 0 ? std::get<0>(run_forward(choice, t, false))
                        : run_with_node(choice, t, needs, source);
  if (x.dim() != 2) {
    std::vector<int64_t> shape = x.sizes().vec();
    shape.back() = N;
    y = y.reshape(shape);
  }
  return y;
}

}  // namespace
}  // namespace efft_kernels

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "low_rank_linear from Python to a backend in one call";
  m.def("try_run", torch::wrap_pybind_function(&efft_kernels::try_run),
        "y, or None where ops/functional.py has to take the call");
  m.def(
      "forget_choices", [] { efft_kernels::remembered_choices().clear(); },
      "Drop the remembered choices, after new measurements or where other backends run");
}
