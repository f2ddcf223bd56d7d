#include "node.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>

namespace efft_kernels {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The operators of csrc/schemas.cpp, looked up at the first call, when their library is loaded.
std::tuple<Tensor, Tensor> native_forward(const Operands& t, bool save_p, int64_t strategy) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("efft_kernels::native_fwd", "")
                             .typed<std::tuple<Tensor, Tensor>(
                                 const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&,
                                 const OptionalTensor&, const Tensor&, bool, int64_t)>();
  return op.call(t.x, t.weight, t.bias, t.down, t.core, t.up, save_p, strategy);
}

variable_list native_backward(const BackwardOperands& t, int64_t strategy) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("efft_kernels::native_bwd", "")
          .typed<std::tuple<Tensor, Tensor, Tensor, Tensor>(
              const Tensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&,
              const Tensor&, const OptionalTensor&, const Tensor&, int64_t, int64_t)>();
  const auto optional = [](const Tensor& t) {
    return t.defined() ? OptionalTensor(t) : OptionalTensor();
  };
  variable_list grads(6);
  if (t.needs & (kNeedX | kNeedDown | kNeedCore | kNeedUp)) {
    auto [dx, d_down, d_core, d_up] = op.call(t.dy, optional(t.x), t.weight, optional(t.p), t.down,
                                              optional(t.core), t.up, t.needs, strategy);
    if (t.needs & kNeedX) grads[0] = dx;
    if (t.needs & kNeedDown) grads[3] = d_down;
    if (t.needs & kNeedCore) grads[4] = d_core;
    if (t.needs & kNeedUp) grads[5] = d_up;
  }
  if (t.needs & kNeedWeight) grads[1] = at::mm(t.dy.t(), t.x).to(t.weight.scalar_type());
  if (t.needs & kNeedBias) {
    grads[2] = t.dy.sum(0, false, at::promote_types(t.weight.scalar_type(), at::kFloat));
  }
  return grads;
}

// Whether a backend in Python may be given dY. A vmap over the backward, or a dispatch mode, has to
// see the operators that make the gradients.
bool is_for_kernels(const Tensor& dy) {
  constexpr c10::DispatchKeySet batched(
      {c10::DispatchKey::Batched, c10::DispatchKey::FuncTorchBatched});
  return is_plain(dy) && !dy.key_set().has_any(batched) &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set();
}

// Saves x only where a gradient needs it, and P = x·down; the rest are the caller's tensors.
class LowRankLinear : public torch::autograd::Function<LowRankLinear> {
 public:
  // autograd finds the operands among the arguments, so they are not one struct here.
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight,
                        const OptionalTensor& bias, const Tensor& down, const OptionalTensor& core,
                        const Tensor& up, int64_t needs, const Choice& choice) {
    const bool save_p = needs & (kNeedCore | kNeedUp);
    const bool save_x = needs & (kNeedDown | kNeedWeight);
    auto [y, p] = run_forward(choice, {x, weight, bias, down, core, up}, save_p);
    context->save_for_backward(
        {save_x ? x : Tensor(), weight, save_p ? p : Tensor(), down, core.value_or(Tensor()), up});
    context->saved_data["needs"] = needs;
    // As integers: compiled autograd carries no objects of other types.
    context->saved_data["strategy"] = choice.backward_strategy;
    context->saved_data["python"] = reinterpret_cast<int64_t>(choice.python);
    if (bias) context->saved_data["bias_dtype"] = bias->scalar_type();
    return y;
  }

  static variable_list backward(AutogradContext* context, variable_list outputs) {
    const auto& data = context->saved_data;
    const auto* python = reinterpret_cast<const PythonBackend*>(data.at("python").toInt());
    const auto saved = context->get_saved_variables();
    const BackwardOperands t{python ? outputs[0] : with_contiguous_rows(outputs[0]),
                             saved[0],
                             saved[1],
                             saved[2],
                             saved[3],
                             saved[4],
                             saved[5],
                             data.at("needs").toInt()};
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    variable_list grads;
    if (at::GradMode::is_enabled() || (python && !is_for_kernels(t.dy))) {
      grads = plain_backward(t);
    } else if (python) {
      grads = python_backward(*python, t);
    } else {
      grads = native_backward(t, data.at("strategy").toInt());
    }
    if (grads[2].defined()) grads[2] = grads[2].to(data.at("bias_dtype").toScalarType());
    grads.resize(8);  // the last two arguments of `forward` have none
    return grads;
  }
};

}  // namespace

std::tuple<Tensor, Tensor> run_forward(const Choice& choice, const Operands& operands,
                                       bool save_p) {
  if (choice.python != nullptr) return python_forward(*choice.python, operands, save_p);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return native_forward(operands, save_p, choice.forward_strategy);
}

Tensor run_with_node(const Choice& choice, const Operands& t, int64_t needs) {
  return LowRankLinear::apply(t.x, t.weight, t.bias, t.down, t.core, t.up, needs, choice);
}

bool is_plain(const Tensor& tensor) {
  return tensor.defined() && tensor.layout() == at::kStrided &&
         !tensor.key_set().has(c10::DispatchKey::Python) && !tensor.is_nested() &&
         !tensor._is_zerotensor() && !tensor.is_neg() && !tensor._fw_grad(0).defined();
}

Tensor with_contiguous_rows(const Tensor& matrix) {
  return matrix.is_cpu() || matrix.stride(1) == 1 || matrix.size(1) == 1 ? matrix
                                                                         : matrix.contiguous();
}

}  // namespace efft_kernels
