// `low_rank_linear` from Python to the backend in one step: the checks, autocast, the choice of
// backend and strategy, and the autograd node. The native operators are called from here without
// the GIL; a backend in Python (triton, torch) by its `forward` and `backward`, with nothing of
// torch.library or of an autograd.Function in Python around them.
//
// Whatever does not fit in some way (a wrong shape or dtype, a torch.func transform, a trace, a
// dispatch mode, a tensor subclass) is not judged here: the entry point returns None, and
// ops/functional.py, which has the words for every error, takes the call.
//
// This library is built against one torch version's C++ interface; without it the same backends
// are called through the autograd.Function of ops/functional.py.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TracerMode.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/extension.h>

#include <array>
#include <mutex>
#include <optional>
#include <tuple>
#include <unordered_map>
#include <vector>

namespace efft_kernels {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

enum Need : int64_t { kX = 1, kWeight = 2, kBias = 4, kDown = 8, kCore = 16, kUp = 32 };

// The operators of csrc/schemas.cpp. Looked up at the first call, when their library is loaded.
std::tuple<Tensor, Tensor> native_fwd(const Tensor& x, const Tensor& weight,
                                      const OptionalTensor& bias, const Tensor& down,
                                      const OptionalTensor& core, const Tensor& up, bool save_p,
                                      int64_t strategy) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("efft_kernels::native_fwd", "")
                             .typed<std::tuple<Tensor, Tensor>(
                                 const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&,
                                 const OptionalTensor&, const Tensor&, bool, int64_t)>();
  return op.call(x, weight, bias, down, core, up, save_p, strategy);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> native_bwd(const Tensor& dy, const OptionalTensor& x,
                                                      const Tensor& weight, const OptionalTensor& p,
                                                      const Tensor& down,
                                                      const OptionalTensor& core, const Tensor& up,
                                                      int64_t needs, int64_t strategy) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("efft_kernels::native_bwd", "")
          .typed<std::tuple<Tensor, Tensor, Tensor, Tensor>(
              const Tensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&,
              const Tensor&, const OptionalTensor&, const Tensor&, int64_t, int64_t)>();
  return op.call(dy, x, weight, p, down, core, up, needs, strategy);
}

// A backend that runs in Python, as ops/eager_entry.py::_decide hands it over. Never freed: there
// are as few as pairs of strategies, and a node may outlive every remembered choice and die on a
// thread without the GIL.
struct PythonBackend {
  PyObject* forward;   // (x, weight, bias, down, core, up, save_p) -> (y, p or None)
  PyObject* backward;  // (dy, x, weight, p, down, core, up, needs) -> six gradients or None
};

// Needs the GIL, as everything below that takes or gives a py::object.
const PythonBackend* python_backend(const py::object& forward, const py::object& backward) {
  static auto* known = new std::vector<const PythonBackend*>();
  for (const PythonBackend* backend : *known) {
    if (backend->forward == forward.ptr() && backend->backward == backward.ptr()) return backend;
  }
  known->push_back(new PythonBackend{forward.inc_ref().ptr(), backward.inc_ref().ptr()});
  return known->back();
}

// The exception that Python has set, fit to be carried to another thread.
[[noreturn]] void throw_python_error() {
  python_error error;
  error.persist();
  throw error;
}

// None for a tensor that is not there.
py::object wrap(const Tensor& tensor) {
  auto wrapped = py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor));
  if (!wrapped) throw_python_error();
  return wrapped;
}

template <typename... Arguments>
py::tuple call(PyObject* function, size_t results, const Arguments&... arguments) {
  PyObject* const given[] = {arguments.ptr()...};
  const auto answer = py::reinterpret_steal<py::object>(
      PyObject_Vectorcall(function, given, sizeof...(arguments), nullptr));
  if (!answer) throw_python_error();
  TORCH_CHECK_TYPE(PyTuple_Check(answer.ptr()) && py::len(answer) == results,
                   "a backend must return a tuple of ", results, ", got ",
                   std::string(py::repr(answer)));
  return answer;
}

Tensor unwrap(const py::tuple& answer, size_t position) {
  PyObject* const item = PyTuple_GET_ITEM(answer.ptr(), position);
  TORCH_CHECK_TYPE(THPVariable_Check(item), "a backend must return a Tensor at position ", position,
                   ", got ", Py_TYPE(item)->tp_name);
  return THPVariable_Unpack(item);
}

// What a backend in Python runs in, as in dispatch.py: on x's own device, as Triton launches on the
// current one; and below autograd, which has nothing to record. Autocast is off already.
struct Surroundings {
  explicit Surroundings(const Tensor& x)
      : device(x.is_cuda() ? std::optional(x.device()) : std::nullopt) {}
  const c10::OptionalDeviceGuard device;
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
};

// Both show in a profile under the names of the operators that they stand in for.
std::tuple<Tensor, Tensor> python_fwd(const PythonBackend& backend, const Tensor& x,
                                      const Tensor& weight, const OptionalTensor& bias,
                                      const Tensor& down, const OptionalTensor& core,
                                      const Tensor& up, bool save_p) {
  RECORD_FUNCTION("efft_kernels::low_rank_linear_fwd", c10::ArrayRef<const c10::IValue>{});
  const Surroundings surroundings(x);
  const py::tuple answer =
      call(backend.forward, 2, wrap(x), wrap(weight), wrap(bias.value_or(Tensor())), wrap(down),
           wrap(core.value_or(Tensor())), wrap(up), py::bool_(save_p));
  return {unwrap(answer, 0), save_p ? unwrap(answer, 1) : Tensor()};
}

// Takes the GIL; x, p and core may be undefined.
variable_list python_bwd(const PythonBackend& backend, const Tensor& dy, const Tensor& x,
                         const Tensor& weight, const Tensor& p, const Tensor& down,
                         const Tensor& core, const Tensor& up, int64_t needs) {
  RECORD_FUNCTION("efft_kernels::low_rank_linear_bwd", c10::ArrayRef<const c10::IValue>{});
  const Surroundings surroundings(dy);
  const py::gil_scoped_acquire gil;
  const auto wanted = [&](Need need) { return (needs & need) != 0; };
  const py::tuple flags = py::make_tuple(wanted(kX), wanted(kWeight), wanted(kBias), wanted(kDown),
                                         wanted(kCore), wanted(kUp));
  const py::tuple answer = call(backend.backward, 6, wrap(dy), wrap(x), wrap(weight), wrap(p),
                                wrap(down), wrap(core), wrap(up), flags);
  variable_list grads(6);
  for (size_t i = 0; i < 6; ++i) {
    if (needs >> i & 1) grads[i] = unwrap(answer, i);
  }
  return grads;
}

// A row-contiguous matrix: what the CUDA kernels read; those of the CPU read any strides.
Tensor rows_of(const Tensor& tensor) {
  return tensor.is_cpu() || tensor.stride(1) == 1 || tensor.size(1) == 1 ? tensor
                                                                         : tensor.contiguous();
}

// The gradients in torch's own operators, by the formulas of ops/backends/torch_backend.py. As a
// graph, for create_graph=True, P is made again so that it depends on x and down.
variable_list plain_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                             const Tensor& saved_p, const Tensor& down, const Tensor& core,
                             const Tensor& up, int64_t needs) {
  const auto dtype = dy.scalar_type();
  const bool identity = !core.defined();
  const int64_t slices = identity ? up.size(0) : core.size(0);
  const Tensor b = (identity ? up : at::matmul(up, core.mT())).flatten(0, 1);
  const Tensor s = at::mm(dy, b.to(dtype));
  variable_list grads(6);
  if (needs & kX) grads[0] = at::mm(dy, weight.to(dtype)) + at::mm(s, down.to(dtype).t());
  if (needs & kWeight) grads[1] = at::mm(dy.t(), x).to(weight.scalar_type());
  if (needs & kBias) grads[2] = dy.sum(0);
  if (needs & kDown) grads[3] = at::mm(x.t(), s).to(down.scalar_type());
  if (needs & (kCore | kUp)) {
    const bool as_graph = at::GradMode::is_enabled();
    TORCH_CHECK(!as_graph || x.defined(),
                "low_rank_linear: a second derivative needs x, which is saved only when down or "
                "weight requires grad; set down.requires_grad_() or call "
                "reference.low_rank_linear");
    const Tensor p = as_graph ? at::mm(x, down.to(dtype)) : saved_p;
    const Tensor d_b =
        at::mm(dy.t(), p).to(up.scalar_type()).reshape({slices, dy.size(1) / slices, down.size(1)});
    if ((needs & kCore) && !identity) grads[4] = at::matmul(d_b.mT(), up);
    if (needs & kUp) {
      grads[5] = identity ? d_b : at::matmul(d_b, core);
      if (up.size(0) != slices) grads[5] = grads[5].sum(0, true);
    }
  }
  return grads;
}

bool is_plain(const Tensor& tensor) {
  return tensor.defined() && tensor.layout() == at::kStrided &&
         !tensor.key_set().has(c10::DispatchKey::Python) && !tensor.is_nested() &&
         !tensor._is_zerotensor() && !tensor.is_neg() && tensor._fw_grad(0).defined() == false;
}

// Whether a backend in Python may be given dY: not where a vmap over the backward or a dispatch
// mode is to see what happens to it.
bool is_for_kernels(const Tensor& dy) {
  constexpr c10::DispatchKeySet batched(
      {c10::DispatchKey::Batched, c10::DispatchKey::FuncTorchBatched});
  return is_plain(dy) && !dy.key_set().has_any(batched) &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set();
}

// Who runs a kind of call: the native operators by these strategies, or a backend in Python; if
// neither, ops/functional.py.
struct Choice {
  bool native = false;
  int64_t forward = -1, backward = -1;
  const PythonBackend* python = nullptr;
};

std::tuple<Tensor, Tensor> run_forward(const Choice& choice, const Tensor& x, const Tensor& weight,
                                       const OptionalTensor& bias, const Tensor& down,
                                       const OptionalTensor& core, const Tensor& up, bool save_p) {
  if (choice.python != nullptr) {
    return python_fwd(*choice.python, x, weight, bias, down, core, up, save_p);
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return native_fwd(x, weight, bias, down, core, up, save_p, choice.forward);
}

// Saves x only where a gradient needs it, and P = x·down; the rest are the caller's tensors.
class LowRankLinear : public torch::autograd::Function<LowRankLinear> {
 public:
  static Tensor forward(AutogradContext* context,
                        const Tensor& x,             // [M, K]
                        const Tensor& weight,        // [N, K]
                        const OptionalTensor& bias,  // [N]
                        const Tensor& down,          // [K, Ra]
                        const OptionalTensor& core,  // [G, Ra, Rb]
                        const Tensor& up,            // [1 or G, N/G, Rb]
                        int64_t needs, const Choice& choice) {
    const bool save_p = needs & (kCore | kUp);
    const bool save_x = needs & (kDown | kWeight);
    auto [y, p] = run_forward(choice, x, weight, bias, down, core, up, save_p);
    context->save_for_backward(
        {save_x ? x : Tensor(), weight, save_p ? p : Tensor(), down, core.value_or(Tensor()), up});
    context->saved_data["needs"] = needs;
    // Numbers, which compiled autograd can carry: it has no place for an object of our own.
    context->saved_data["strategy"] = choice.backward;
    context->saved_data["python"] = reinterpret_cast<int64_t>(choice.python);
    if (bias) context->saved_data["bias_dtype"] = bias->scalar_type();
    return y;
  }

  static variable_list backward(AutogradContext* context, variable_list outputs) {
    const auto& data = context->saved_data;
    const auto* python = reinterpret_cast<const PythonBackend*>(data.at("python").toInt());
    const Tensor dy = python == nullptr ? rows_of(outputs[0]) : outputs[0];
    const auto saved = context->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &p = saved[2], &down = saved[3],
                 &core = saved[4], &up = saved[5];
    const int64_t needs = data.at("needs").toInt();
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    variable_list grads;
    if (at::GradMode::is_enabled() || (python != nullptr && !is_for_kernels(dy))) {
      grads = plain_backward(dy, x, weight, p, down, core, up, needs);
    } else if (python != nullptr) {
      grads = python_bwd(*python, dy, x, weight, p, down, core, up, needs);
    } else {
      grads.resize(6);
      if (needs & (kX | kDown | kCore | kUp)) {
        const auto given = [](const Tensor& t) {
          return t.defined() ? OptionalTensor(t) : OptionalTensor();
        };
        auto [dx, d_down, d_core, d_up] =
            native_bwd(dy, given(x), weight, given(p), down, given(core), up, needs,
                       data.at("strategy").toInt());
        if (needs & kX) grads[0] = dx;
        if (needs & kDown) grads[3] = d_down;
        if (needs & kCore) grads[4] = d_core;
        if (needs & kUp) grads[5] = d_up;
      }
      if (needs & kWeight) grads[1] = at::mm(dy.t(), x).to(weight.scalar_type());
      if (needs & kBias) {
        const auto wide = at::promote_types(weight.scalar_type(), at::kFloat);
        grads[2] = dy.sum(0, false, wide);
      }
    }
    if (grads[2].defined()) {
      grads[2] = grads[2].to(data.at("bias_dtype").toScalarType());
    }
    grads.resize(8);
    return grads;
  }
};

bool is_floating(const Tensor& tensor) {
  const auto dtype = tensor.scalar_type();
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf ||
         dtype == at::kBFloat16;
}

bool is_half(at::ScalarType dtype) { return dtype == at::kHalf || dtype == at::kBFloat16; }

// What `_check` and `_check_shapes` of ops/functional.py demand, as one answer.
bool fits(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& down,
          const OptionalTensor& core, const Tensor& up, bool autocast) {
  const auto dtype = x.scalar_type();
  const bool mixed = autocast && is_half(dtype);
  const auto tensor_fits = [&](const Tensor& tensor, bool factor) {
    if (!is_plain(tensor) || !is_floating(tensor) || tensor.device() != x.device()) return false;
    const auto own = tensor.scalar_type();
    return own == dtype || mixed || (factor && own == at::kFloat && is_half(dtype));
  };
  if (!is_plain(x) || !is_floating(x)) return false;
  if (!tensor_fits(weight, false) || (bias && !tensor_fits(*bias, false))) return false;
  if (!tensor_fits(down, true) || !tensor_fits(up, true)) return false;
  if (core && !tensor_fits(*core, true)) return false;
  if (up.scalar_type() != down.scalar_type()) return false;
  if (core && core->scalar_type() != down.scalar_type()) return false;

  if (weight.dim() != 2 || weight.size(0) < 1 || weight.size(1) < 1) return false;
  const int64_t n = weight.size(0), k = weight.size(1);
  if (x.dim() == 0 || x.size(-1) != k) return false;
  if (bias && (bias->dim() != 1 || bias->size(0) != n)) return false;
  if (down.dim() != 2 || down.size(0) != k || down.size(1) < 1 || up.dim() != 3) return false;
  const int64_t ra = down.size(1), rb = core ? core->size(-1) : ra;
  if (core && (core->dim() != 3 || core->size(0) < 1 || core->size(1) != ra || rb < 1)) {
    return false;
  }
  const int64_t slices = core ? core->size(0) : up.size(0);
  if (slices < 1 || n % slices != 0) return false;
  if (up.size(0) != slices && !(core && up.size(0) == 1)) return false;
  return up.size(1) == n / slices && up.size(2) == rb;
}

// What the CUDA kernels demand beyond that: numbers of 16 and 32 bits, and the weight's rows as
// they are.
bool native_reads(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                  const Tensor& down, const OptionalTensor& core, const Tensor& up) {
  if (!x.is_cuda()) return true;
  const auto is_double = [](const Tensor& tensor) { return tensor.scalar_type() == at::kDouble; };
  return weight.stride(1) == 1 && !is_double(x) && !is_double(weight) &&
         !(bias && is_double(*bias)) && !is_double(down) && !(core && is_double(*core)) &&
         !is_double(up);
}

// A choice depends on nothing but this. The last word packs the dtypes and flags.
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

// Choices made so far, by what ops/eager_entry.py::_decide said.
std::unordered_map<Key, Choice, KeyHash>& choices() {
  static auto* table = new std::unordered_map<Key, Choice, KeyHash>();
  return *table;
}

constexpr size_t kMostChoices = 4096;

Choice choose(const Tensor& x, int64_t rows, const Tensor& weight, const Tensor& down,
              const OptionalTensor& core, const Tensor& up, bool training, int64_t asked,
              const py::function& decide) {
  const int64_t slices = core ? core->size(0) : up.size(0);
  const int64_t kind = static_cast<int64_t>(x.scalar_type()) * 64 +
                       static_cast<int64_t>(weight.scalar_type()) + (training ? 1 << 14 : 0) +
                       (static_cast<int64_t>(x.device().type()) << 16) +
                       (static_cast<int64_t>(x.device().index() + 1) << 24) + (asked << 32) +
                       (static_cast<int64_t>(down.scalar_type()) << 40);
  const Key key{{rows, weight.size(0), weight.size(1), slices, down.size(1), up.size(2), kind}};
  auto& table = choices();
  if (const auto found = table.find(key); found != table.end()) return found->second;
  const py::object answer = decide(x, weight, down, core, up, rows, training, asked);
  Choice choice;
  if (!answer.is_none()) {
    const auto [forward, backward] = answer.cast<std::pair<py::object, py::object>>();
    if (PyCallable_Check(forward.ptr()) != 0) {
      choice.python = python_backend(forward, backward);
    } else {
      choice = {true, forward.cast<int64_t>(), backward.cast<int64_t>()};
    }
  }
  if (table.size() >= kMostChoices) table.clear();
  table.emplace(key, choice);
  return choice;
}

OptionalTensor unpack_optional(py::handle given) {
  return given.is_none() ? OptionalTensor() : OptionalTensor(THPVariable_Unpack(given.ptr()));
}

// `asked` encodes the backend and strategy asked for; `decide` answers the native operators'
// (forward, backward) strategies, or the (forward, backward) callables of a backend in Python, or
// None where ops/functional.py should take the call.
OptionalTensor low_rank_linear(py::handle x_given, py::handle weight_given, py::handle bias_given,
                               py::handle down_given, py::handle core_given, py::handle up_given,
                               int64_t asked, const py::function& decide) {
  // A subclass may have a __torch_function__ of its own; a Parameter has none.
  if (at::impl::torch_function_mode_enabled()) return std::nullopt;
  for (const py::handle given : {x_given, weight_given, down_given, up_given}) {
    if (!THPVariable_CheckExact(given.ptr())) return std::nullopt;
  }
  for (const py::handle given : {bias_given, core_given}) {
    if (!given.is_none() && !THPVariable_CheckExact(given.ptr())) return std::nullopt;
  }
  const Tensor& given = THPVariable_Unpack(x_given.ptr());
  const Tensor& weight = THPVariable_Unpack(weight_given.ptr());
  const Tensor& down = THPVariable_Unpack(down_given.ptr());
  const Tensor& up = THPVariable_Unpack(up_given.ptr());
  const OptionalTensor bias = unpack_optional(bias_given), core = unpack_optional(core_given);
  // A mode or a trace is to see the operator, not what a backend does in its place.
  if (c10::impl::TorchDispatchModeTLS::any_modes_set()) return std::nullopt;
  if (at::tracer::impl::is_dispatch_enabled() || !is_plain(given)) return std::nullopt;
  const auto device_type = given.device().type();
  if (device_type != at::kCPU && device_type != at::kCUDA) return std::nullopt;
  const bool autocast = at::autocast::is_autocast_enabled(device_type);
  const auto own = given.scalar_type();
  const auto ambient = autocast && (own == at::kFloat || is_half(own))
                           ? at::autocast::get_autocast_dtype(device_type)
                           : own;
  const Tensor x = ambient == own ? given : given.to(ambient);
  if (!fits(x, weight, bias, down, core, up, autocast)) return std::nullopt;

  int64_t needs = 0;
  if (at::GradMode::is_enabled()) {
    needs = (x.requires_grad() ? kX : 0) | (weight.requires_grad() ? kWeight : 0) |
            (bias && bias->requires_grad() ? kBias : 0) | (down.requires_grad() ? kDown : 0) |
            (core && core->requires_grad() ? kCore : 0) | (up.requires_grad() ? kUp : 0);
  }
  const int64_t k = weight.size(1), rows = x.numel() / k;
  const Choice choice =
      choose(x, rows, weight, down, core, up, needs & (kCore | kUp), asked, decide);
  if (choice.native) {
    if (!native_reads(x, weight, bias, down, core, up)) return std::nullopt;
  } else if (choice.python == nullptr) {
    return std::nullopt;
  }

  const Tensor matrix = x.dim() == 2 ? x : x.reshape({rows, k});
  const Tensor flat = choice.native ? rows_of(matrix) : matrix;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  Tensor y;
  {
    std::optional<py::gil_scoped_release> no_gil;
    if (choice.native) no_gil.emplace();
    y = needs == 0 ? std::get<0>(run_forward(choice, flat, weight, bias, down, core, up, false))
                   : LowRankLinear::apply(flat, weight, bias, down, core, up, needs, choice);
    if (x.dim() != 2) {
      std::vector<int64_t> shape = x.sizes().vec();
      shape.back() = weight.size(0);
      y = y.reshape(shape);
    }
  }
  return y;
}

}  // namespace
}  // namespace efft_kernels

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "low_rank_linear's way from Python to the kernels";
  m.def("low_rank_linear", torch::wrap_pybind_function(&efft_kernels::low_rank_linear),
        "The result, or None where ops/functional.py has to take the call");
  m.def(
      "forget_choices", [] { efft_kernels::choices().clear(); },
      "Drop the remembered choices, after new measurements or where other backends run");
}
