#include "node.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

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

OptionalTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : OptionalTensor();
}

using NativeGrads = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// With x made by the kernel, from `source`; `rows`: its row_index, where rows were moved.
NativeGrads native_backward_made(const BackwardOperands& t, const Source& source,
                                 const Tensor& rows, int64_t strategy) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("efft_kernels::native_bwd_made", "")
          .typed<NativeGrads(const Tensor&, int64_t, const Tensor&, const OptionalTensor&,
                             const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                             const OptionalTensor&, const Tensor&, const OptionalTensor&,
                             const Tensor&, const OptionalTensor&, const Tensor&, int64_t,
                             int64_t)>();
  const int64_t K = t.weight.size(1);
  OptionalTensor norm[4];  // mean, rstd, weight, bias
  for (size_t i = 0; source.made_by == kLayerNorm && i < 4; ++i) {
    norm[i] = optional(source.kept[i + 1]);
    if (i < 2) norm[i] = norm[i]->reshape({-1, 1});
  }
  return op.call(t.dy, source.made_by, source.kept[0].reshape({-1, K}), optional(rows), norm[0],
                 norm[1], norm[2], norm[3], t.weight, optional(t.p), t.down, optional(t.core), t.up,
                 t.needs, strategy);
}

NativeGrads native_backward_kept(const BackwardOperands& t, int64_t strategy) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("efft_kernels::native_bwd", "")
          .typed<NativeGrads(const Tensor&, const OptionalTensor&, const Tensor&,
                             const OptionalTensor&, const Tensor&, const OptionalTensor&,
                             const Tensor&, int64_t, int64_t)>();
  return op.call(t.dy, optional(t.x), t.weight, optional(t.p), t.down, optional(t.core), t.up,
                 t.needs, strategy);
}

variable_list native_backward(const BackwardOperands& t, const Source& source, const Tensor& rows,
                              int64_t strategy) {
  variable_list grads(6);
  if (t.needs & (kNeedX | kNeedDown | kNeedCore | kNeedUp)) {
    auto [dx, d_down, d_core, d_up] = source.recipe != nullptr && !t.x.defined()
                                          ? native_backward_made(t, source, rows, strategy)
                                          : native_backward_kept(t, strategy);
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

// Whether dY may carry a forward-mode derivative (forward over reverse), which a kernel would drop.
bool has_tangent(const Tensor& dy) {
  return dy._fw_grad(0).defined() || dy.key_set().has(c10::DispatchKey::FuncTorchGradWrapper);
}

// Whether a backend in Python may be given dY. A vmap over the backward, or a dispatch mode, has to
// see the operators that make the gradients.
bool is_for_kernels(const Tensor& dy) {
  constexpr c10::DispatchKeySet batched(
      {c10::DispatchKey::Batched, c10::DispatchKey::FuncTorchBatched});
  return is_plain(dy) && !dy.key_set().has_any(batched) &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set();
}

// Whether the kernel makes x by itself.
bool is_made_by_kernel(const Source& source, const Tensor& dy, int64_t needs) {
  const auto readable = [](const Tensor& t) {
    return !t.defined() || t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble ||
           t.scalar_type() == at::kBFloat16;
  };
  return source.made_by != kPlain && dy.is_cpu() && !(needs & kNeedWeight) &&
         std::all_of(source.kept.begin(), source.kept.end(), readable);
}

void check_in_memory(const Source& source) {
  for (const Tensor& t : source.kept) {
    TORCH_CHECK(!t.defined() || t.numel() == 0 || t.storage().nbytes() > 0,
                "low_rank_linear: what x is made from is not in memory any more; where FSDP2 "
                "shards a norm by itself, shard it with the linears that it feeds, or attach the "
                "adapter with fuse='off'");
  }
}

constexpr size_t kSaved = 6;  // tensors, before those that x is made from

// Saves x only where a gradient needs it and it cannot be made, and P = x·down; the rest are the
// caller's tensors.
class LowRankLinear : public torch::autograd::Function<LowRankLinear> {
 public:
  // autograd finds the operands among the arguments, so they are not one struct here.
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight,
                        const OptionalTensor& bias, const Tensor& down, const OptionalTensor& core,
                        const Tensor& up, int64_t needs, const Choice& choice,
                        const Source& source) {
    const bool save_p = needs & (kNeedCore | kNeedUp);
    const bool need_x = needs & (kNeedDown | kNeedWeight);
    const bool made = need_x && source.recipe != nullptr;
    auto [y, p] = run_forward(choice, {x, weight, bias, down, core, up}, save_p);
    variable_list saved{need_x && !made ? x : Tensor(), weight, save_p ? p : Tensor(), down,
                        core.value_or(Tensor()),        up};
    if (made) saved.insert(saved.end(), source.kept.begin(), source.kept.end());
    context->save_for_backward(std::move(saved));
    context->saved_data["needs"] = needs;
    // As integers: compiled autograd carries no objects of other types.
    context->saved_data["recipe"] = made ? reinterpret_cast<int64_t>(source.recipe) : 0;
    context->saved_data["made_by"] = source.made_by;
    context->saved_data["moved"] = source.moved;
    context->saved_data["attached"] = source.attached;
    context->saved_data["strategy"] = choice.backward_strategy;
    context->saved_data["python"] = reinterpret_cast<int64_t>(choice.python);
    if (bias) context->saved_data["bias_dtype"] = bias->scalar_type();
    return y;
  }

  static variable_list backward(AutogradContext* context, variable_list outputs) {
    const auto& data = context->saved_data;
    const auto* python = reinterpret_cast<const PythonBackend*>(data.at("python").toInt());
    const auto saved = context->get_saved_variables();
    const Source source{reinterpret_cast<PyObject*>(data.at("recipe").toInt()),
                        data.at("made_by").toInt(),
                        data.at("moved").toBool(),
                        data.at("attached").toBool(),
                        {saved.begin() + kSaved, saved.end()}};
    BackwardOperands t{python ? outputs[0] : with_contiguous_rows(outputs[0]),
                       saved[0],
                       saved[1],
                       saved[2],
                       saved[3],
                       saved[4],
                       saved[5],
                       data.at("needs").toInt()};
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const bool plain =
        at::GradMode::is_enabled() || has_tangent(t.dy) || (python && !is_for_kernels(t.dy));
    check_in_memory(source);
    bool in_python =
        source.recipe != nullptr && (plain || python || !is_made_by_kernel(source, t.dy, t.needs));
    Tensor rows;
    if (source.moved && !in_python) {
      rows = row_index(source.recipe, source.kept[0]);
      in_python = !rows.defined();
    }
    if (in_python) {
      TORCH_CHECK(source.attached || !at::GradMode::is_enabled(),
                  "low_rank_linear: no second derivative under saved-tensor hooks where x is made "
                  "from what its producer kept; attach the adapter with fuse='off'");
      t.x = make_x(source.recipe, source.kept, t.weight.size(1), t.dy.scalar_type());
    }
    variable_list grads;
    if (plain) {
      grads = plain_backward(t);
    } else if (python) {
      grads = python_backward(*python, t);
    } else {
      grads = native_backward(t, source, rows, data.at("strategy").toInt());
    }
    if (grads[2].defined()) grads[2] = grads[2].to(data.at("bias_dtype").toScalarType());
    grads.resize(9);  // the last three arguments of `forward` have none
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

Tensor run_with_node(const Choice& choice, const Operands& t, int64_t needs, const Source& source) {
  return LowRankLinear::apply(t.x, t.weight, t.bias, t.down, t.core, t.up, needs, choice, source);
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
