// `low_rank_linear` from Python to kernel without another step through Python: the checks,
// autocast, the choice of backend and strategy, and the autograd node, for what the native backends
// take.
//
// Whatever does not fit in some way (a wrong shape or dtype, a torch.func transform, a dispatch
// mode, a tensor subclass, another backend's turn) is not judged here: the entry point returns
// None, and ops/functional.py, which has the words for every error, takes the call.
//
// This library is built against one torch version's C++ interface; without it the same operators
// are called through the autograd.Function of ops/functional.py.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/extension.h>

#include <array>
#include <mutex>
#include <optional>
#include <tuple>
#include <unordered_map>

namespace efft_kernels {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

enum Need : int64_t { kX = 1, kWeight = 2, kBias = 4, kDown = 8, kCore = 16, kUp = 32 };

// The operators of csrc/ops.cpp. Looked up at the first call, when their library is loaded.
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

// A row-contiguous matrix: what the CUDA kernels read; those of the CPU read any strides.
Tensor rows_of(const Tensor& tensor) {
  return tensor.is_cpu() || tensor.stride(1) == 1 || tensor.size(1) == 1 ? tensor
                                                                         : tensor.contiguous();
}

// The gradients as a graph, for create_graph=True: the formulas of ops/torch_backend.py, with P
// made again so that it depends on x and down.
variable_list differentiable_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                      const Tensor& down, const Tensor& core, const Tensor& up,
                                      int64_t needs) {
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
    TORCH_CHECK(x.defined(),
                "low_rank_linear: a second derivative needs x, which is saved only when down or "
                "weight requires grad; set down.requires_grad_() or call "
                "reference.low_rank_linear");
    const Tensor p = at::mm(x, down.to(dtype));
    const Tensor d_b =
        at::mm(dy.t(), p).to(up.scalar_type()).unflatten(0, {slices, dy.size(1) / slices});
    if ((needs & kCore) && !identity) grads[4] = at::matmul(d_b.mT(), up);
    if (needs & kUp) {
      grads[5] = identity ? d_b : at::matmul(d_b, core);
      if (up.size(0) != slices) grads[5] = grads[5].sum(0, true);
    }
  }
  return grads;
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
                        int64_t needs, int64_t strategy, int64_t backward_strategy) {
    const bool save_p = needs & (kCore | kUp);
    const bool save_x = needs & (kDown | kWeight);
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [y, p] = native_fwd(x, weight, bias, down, core, up, save_p, strategy);
    context->save_for_backward(
        {save_x ? x : Tensor(), weight, save_p ? p : Tensor(), down, core.value_or(Tensor()), up});
    context->saved_data["needs"] = needs;
    context->saved_data["strategy"] = backward_strategy;
    if (bias) context->saved_data["bias_dtype"] = bias->scalar_type();
    return y;
  }

  static variable_list backward(AutogradContext* context, variable_list outputs) {
    const Tensor dy = rows_of(outputs[0]);
    const auto saved = context->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &p = saved[2], &down = saved[3],
                 &core = saved[4], &up = saved[5];
    const int64_t needs = context->saved_data["needs"].toInt();
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    variable_list grads;
    if (at::GradMode::is_enabled()) {
      grads = differentiable_backward(dy, x, weight, down, core, up, needs);
    } else {
      grads.resize(6);
      if (needs & (kX | kDown | kCore | kUp)) {
        const auto given = [](const Tensor& t) {
          return t.defined() ? OptionalTensor(t) : OptionalTensor();
        };
        auto [dx, d_down, d_core, d_up] =
            native_bwd(dy, given(x), weight, given(p), down, given(core), up, needs,
                       context->saved_data["strategy"].toInt());
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
      grads[2] = grads[2].to(context->saved_data["bias_dtype"].toScalarType());
    }
    grads.resize(9);
    return grads;
  }
};

bool is_plain(const Tensor& tensor) {
  return tensor.defined() && tensor.layout() == at::kStrided &&
         !tensor.key_set().has(c10::DispatchKey::Python) && !tensor.is_nested() &&
         !tensor._is_zerotensor() && !tensor.is_neg() && tensor._fw_grad(0).defined() == false;
}

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
    // The CUDA kernels read rows, of 16 and 32 bits.
    if (x.is_cuda() && own == at::kDouble) return false;
    return own == dtype || mixed || (factor && own == at::kFloat && is_half(dtype));
  };
  if (!is_plain(x) || !is_floating(x)) return false;
  if (!tensor_fits(weight, false) || (bias && !tensor_fits(*bias, false))) return false;
  if (!tensor_fits(down, true) || !tensor_fits(up, true)) return false;
  if (core && !tensor_fits(*core, true)) return false;
  if (up.scalar_type() != down.scalar_type()) return false;
  if (core && core->scalar_type() != down.scalar_type()) return false;

  if (weight.dim() != 2 || weight.size(0) < 1 || weight.size(1) < 1) return false;
  if (x.is_cuda() && weight.stride(1) != 1) return false;
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

struct Choice {
  bool native = false;
  int64_t forward = -1, backward = -1;
};

// Choices made so far, by what Python's cost model said.
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
                       (static_cast<int64_t>(x.device().index() + 1) << 24) + (asked << 32);
  const Key key{{rows, weight.size(0), weight.size(1), slices, down.size(1), up.size(2), kind}};
  auto& table = choices();
  if (const auto found = table.find(key); found != table.end()) return found->second;
  const py::object answer = decide(x, weight, down, core, up, rows, training, asked);
  Choice choice;
  if (!answer.is_none()) {
    const auto [forward, backward] = answer.cast<std::pair<int64_t, int64_t>>();
    choice = {true, forward, backward};
  }
  if (table.size() >= kMostChoices) table.clear();
  table.emplace(key, choice);
  return choice;
}

OptionalTensor unpack_optional(py::handle given) {
  return given.is_none() ? OptionalTensor() : OptionalTensor(THPVariable_Unpack(given.ptr()));
}

// `asked` encodes the backend and strategy asked for; `decide` answers (forward, backward)
// strategies, or None where another backend should run.
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
  if (c10::impl::TorchDispatchModeTLS::any_modes_set() || !is_plain(given)) return std::nullopt;
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
  if (!choice.native) return std::nullopt;

  const Tensor flat = rows_of(x.dim() == 2 ? x : x.reshape({rows, k}));
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  Tensor y;
  {
    const py::gil_scoped_release no_gil;
    y = needs == 0
            ? std::get<0>(native_fwd(flat, weight, bias, down, core, up, false, choice.forward))
            : LowRankLinear::apply(flat, weight, bias, down, core, up, needs, choice.forward,
                                   choice.backward);
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
  m.doc() = "low_rank_linear's way from Python to the native kernels";
  m.def("low_rank_linear", &efft_kernels::low_rank_linear,
        "The result, or None where the native backends do not take the call");
  m.def(
      "forget_choices", [] { efft_kernels::choices().clear(); },
      "Drop the remembered choices of strategy, after new measurements");
}
