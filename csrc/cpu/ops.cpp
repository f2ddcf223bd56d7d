// The CPU implementation of the native operators: tensors in, plain pointers on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "isa.h"

namespace efft_kernels::cpu {

// Tasks are taken one after another, so that a thread which is held up, by another process say,
// does not hold up the others' share.
void parallel(int64_t count, void (*f)(void* context, int64_t begin, int64_t end), void* context) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  if (threads <= 1) return f(context, 0, count);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) f(context, i, i + 1);
  });
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

bool is_readable(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16;
}

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      return DType::kBFloat16;
  }
}

void require(bool holds, const char* argument, const char* expected) {
  if (holds) return;
  throw std::runtime_error(std::string("efft_kernels: ") + argument + " must be " + expected);
}

// The tensor itself, or in float32 where it is float16, which the kernels do not read.
Tensor readable(const Tensor& tensor, const char* argument) {
  if (is_readable(tensor.scalar_type())) return tensor;
  require(tensor.scalar_type() == ScalarType::Half, argument,
          "float64, float32, float16 or bfloat16");
  return torch::stable::to(tensor, ScalarType::Float);
}

// The last two dims of `tensor` as one matrix; leading dims must follow each other in memory.
Matrix matrix_of(const Tensor& tensor) {
  const int64_t dims = tensor.dim();
  Matrix matrix;
  matrix.data = const_cast<void*>(tensor.const_data_ptr());
  require(matrix.data != nullptr || tensor.numel() == 0, "every tensor", "in memory");
  matrix.dtype = dtype_of(tensor);
  matrix.row_stride = dims >= 2 ? tensor.stride(dims - 2) : 0;
  matrix.column_stride = tensor.stride(dims - 1);
  return matrix;
}

struct FactorTensors {
  Tensor down;
  std::optional<Tensor> core;
  Tensor up;

  FactorTensors(const Tensor& down_in, const std::optional<Tensor>& core_in, const Tensor& up_in)
      : down(readable(down_in, "down")), up(torch::stable::contiguous(readable(up_in, "up"))) {
    if (core_in) core = torch::stable::contiguous(readable(*core_in, "core"));
  }

  // N and K are the weight's.
  Factors checked(int64_t N, int64_t K) const {
    require(down.dim() == 2 && down.size(0) == K, "down", "[K, Ra]");
    require(up.dim() == 3, "up", "[1 or G, N/G, Rb]");
    require(!core || core->dim() == 3, "core", "[G, Ra, Rb]");
    Factors factors;
    factors.G = core ? core->size(0) : up.size(0);
    factors.Ra = down.size(1);
    factors.Rb = up.size(2);
    require(factors.G > 0 && factors.Ra > 0 && factors.Rb > 0 && N % factors.G == 0 &&
                up.size(1) == N / factors.G && (up.size(0) == 1 || up.size(0) == factors.G),
            "up", "[1 or G, N/G, Rb] with G dividing N");
    if (core) {
      require(core->dim() == 3 && core->size(1) == factors.Ra && core->size(2) == factors.Rb,
              "core", "[G, Ra, Rb]");
      factors.core = matrix_of(*core);
    } else {
      require(factors.Ra == factors.Rb, "up", "[G, N/G, Ra] where core is None");
    }
    factors.up_shared = up.size(0) == 1 && factors.G > 1;
    factors.down = matrix_of(down);
    factors.up = matrix_of(up);
    return factors;
  }
};

int64_t threads() { return std::max<int64_t>(torch::stable::get_num_threads(), 1); }

// For the tiles of a product: waking a thread takes as long as 2^16 multiplications.
int64_t threads_for(int64_t M, int64_t inner, int64_t columns) {
  return std::clamp<int64_t>(M * inner * columns >> 16, 1, threads());
}

// Parts of the rows, each with partial sums of its own, which take time to add up: where the rows
// suffice for parts of 48, a multiple of the threads, at least four; else parts of 16, at most one
// a thread.
int64_t slots_for(int64_t rows) {
  const int64_t at_once = threads();
  const int64_t most = (std::max<int64_t>(at_once, 4) + at_once - 1) / at_once * at_once;
  const int64_t fitting = std::clamp<int64_t>(rows / 48, 1, most);
  return fitting < at_once ? std::clamp<int64_t>(rows / 16, 1, at_once)
                           : fitting / at_once * at_once;
}

Strategy strategy_of(int64_t code) {
  require(code == kSplit || code == kMerged, "strategy", "1 (split) or 2 (merged)");
  return static_cast<Strategy>(code);
}

Tensor empty(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

std::tuple<Tensor, Tensor> native_fwd(Tensor x, Tensor weight, std::optional<Tensor> bias,
                                      Tensor down, std::optional<Tensor> core, Tensor up,
                                      bool save_p, int64_t strategy) {
  require(x.dim() == 2 && is_readable(x.scalar_type()), "x",
          "[M, K] of float32, float64 or bfloat16");
  require(weight.dim() == 2 && weight.size(1) == x.size(1) && weight.numel() > 0, "weight",
          "[N >= 1, K >= 1]");
  const Tensor w = readable(weight, "weight");
  std::optional<Tensor> b;
  if (bias) b = readable(*bias, "bias");
  const FactorTensors factors(down, core, up);

  Forward args;
  args.M = x.size(0);
  args.K = x.size(1);
  args.N = w.size(0);
  args.factors = factors.checked(args.N, args.K);
  require(!b || (b->dim() == 1 && b->size(0) == args.N), "bias", "[N]");

  Tensor y = torch::stable::new_empty(x, {args.M, args.N});
  Tensor p = save_p ? torch::stable::new_empty(x, {args.M, args.factors.Ra}) : empty(x);
  if (args.M == 0) return {y, p};
  args.x = matrix_of(x);
  args.weight = matrix_of(w);
  if (b) args.bias = matrix_of(*b);
  args.y = matrix_of(y);
  if (save_p) args.p = matrix_of(p);
  args.strategy = strategy_of(strategy);
  args.slots = slots_for(args.M);
  args.threads = threads_for(args.M, args.K, args.N);
  kernels().forward(args, x.scalar_type() == ScalarType::Double);
  return {y, p};
}

// What x is made from.
struct Producer {
  MadeBy made_by = kPlain;
  std::optional<Tensor> rows, mean, rstd, weight, bias;

  // Null where x's rows are made in their order.
  const int64_t* checked_rows(int64_t M, int64_t kept) const {
    if (!rows) return nullptr;
    require(rows->scalar_type() == ScalarType::Long && rows->dim() == 1 && rows->size(0) == M &&
                rows->is_contiguous(),
            "rows", "[M] of int64");
    const int64_t* const index = rows->const_data_ptr<int64_t>();
    require(std::all_of(index, index + M, [&](int64_t row) { return row >= -1 && row < kept; }),
            "rows", "rows of `kept`, or -1");
    return index;
  }

  Norm checked(int64_t M, int64_t K) const {
    Norm norm;
    if (made_by != kLayerNorm) return norm;
    const auto read = [](const std::optional<Tensor>& given, const char* argument, int64_t size,
                         bool column) {
      Matrix matrix;
      if (!given) return matrix;
      require(given->numel() == size && given->dim() == (column ? 2 : 1) &&
                  is_readable(given->scalar_type()),
              argument, column ? "[M, 1]" : "[K]");
      return matrix_of(*given);
    };
    require(mean && rstd, "mean and rstd", "given for a LayerNorm");
    norm.mean = read(mean, "mean", M, true);
    norm.rstd = read(rstd, "rstd", M, true);
    norm.weight = read(weight, "norm_weight", K, false);
    norm.bias = read(bias, "norm_bias", K, false);
    return norm;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> run_backward(
    const Tensor& dy, const std::optional<Tensor>& x, const Producer& producer,
    const Tensor& weight, const std::optional<Tensor>& p, const Tensor& down,
    const std::optional<Tensor>& core, const Tensor& up, int64_t needs, int64_t strategy) {
  require(dy.dim() == 2 && is_readable(dy.scalar_type()), "dy",
          "[M, N] of float32, float64 or bfloat16");
  require(weight.dim() == 2 && weight.size(0) == dy.size(1) && weight.numel() > 0, "weight",
          "[N >= 1, K >= 1]");
  const Tensor w = readable(weight, "weight");
  const FactorTensors factors(down, core, up);

  Backward args;
  args.M = dy.size(0);
  args.N = dy.size(1);
  args.K = w.size(1);
  args.factors = factors.checked(args.N, args.K);
  const bool need_x = needs & kNeedX, need_down = needs & kNeedDown, need_up = needs & kNeedUp;
  const bool need_core = (needs & kNeedCore) && core;
  require(!need_down || (x && x->dim() == 2 && (producer.rows || x->size(0) == args.M) &&
                         x->size(1) == args.K && is_readable(x->scalar_type())),
          "x", "[M, K] of float32, float64 or bfloat16 for the gradient of down");
  require(
      !(need_core || need_up) || (p && p->dim() == 2 && p->size(0) == args.M &&
                                  p->size(1) == args.factors.Ra && is_readable(p->scalar_type())),
      "p", "[M, Ra] of float32, float64 or bfloat16 for the gradients of core and up");

  // Gradients are made in a dtype that can be written and handed over in the tensor's own.
  const auto gradient_of = [](bool needed, const Tensor& like, const Tensor& readable_like) {
    return needed ? torch::stable::new_empty(readable_like, like.sizes()) : empty(like);
  };
  Tensor dx = need_x ? torch::stable::new_empty(dy, {args.M, args.K}) : empty(dy);
  Tensor d_down = gradient_of(need_down, down, factors.down);
  Tensor d_core = need_core ? gradient_of(true, *core, *factors.core) : empty(up);
  Tensor d_up = gradient_of(need_up, up, factors.up);
  if (need_x || need_down || need_core || need_up) {
    args.dy = matrix_of(dy);
    args.weight = matrix_of(w);
    if (need_x) args.dx = matrix_of(dx);
    if (need_down) {
      args.x = matrix_of(*x);
      args.made_by = producer.made_by;
      args.rows = producer.checked_rows(args.M, x->size(0));
      args.norm = producer.checked(x->size(0), args.K);
      args.d_down = matrix_of(d_down);
    }
    if (need_core || need_up) args.p = matrix_of(*p);
    if (need_core) args.d_core = matrix_of(d_core);
    if (need_up) args.d_up = matrix_of(d_up);
    args.strategy = strategy_of(strategy);
    args.slots = slots_for(args.M);
    args.threads = threads_for(args.M, args.N, args.K);
    kernels().backward(args, dy.scalar_type() == ScalarType::Double);
  }
  const auto handed_over = [](const Tensor& gradient, const Tensor& like) {
    return gradient.scalar_type() == like.scalar_type()
               ? gradient
               : torch::stable::to(gradient, like.scalar_type());
  };
  return {dx, handed_over(d_down, down), core ? handed_over(d_core, *core) : d_core,
          handed_over(d_up, up)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> native_bwd(Tensor dy, std::optional<Tensor> x,
                                                      Tensor weight, std::optional<Tensor> p,
                                                      Tensor down, std::optional<Tensor> core,
                                                      Tensor up, int64_t needs, int64_t strategy) {
  return run_backward(dy, x, {}, weight, p, down, core, up, needs, strategy);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> native_bwd_made(
    Tensor dy, int64_t made_by, Tensor kept, std::optional<Tensor> rows, std::optional<Tensor> mean,
    std::optional<Tensor> rstd, std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias,
    Tensor weight, std::optional<Tensor> p, Tensor down, std::optional<Tensor> core, Tensor up,
    int64_t needs, int64_t strategy) {
  require(made_by >= kLayerNorm && made_by <= kGeluTanh, "made_by", "a code of MadeBy, not kPlain");
  const Producer producer{static_cast<MadeBy>(made_by), rows, mean, rstd, norm_weight, norm_bias};
  return run_backward(dy, kept, producer, weight, p, down, core, up, needs, strategy);
}

Tensor native_tasks_fwd(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor down, Tensor b,
                        Tensor task_of_item) {
  require(x.dim() == 3 && is_readable(x.scalar_type()), "x",
          "[items, rows, K] of float32, float64 or bfloat16");
  require(weight.dim() == 2 && weight.size(1) == x.size(2) && weight.numel() > 0, "weight",
          "[N >= 1, K >= 1]");
  MixedBatch args;
  args.items = x.size(0);
  args.rows = x.size(1);
  args.K = x.size(2);
  args.N = weight.size(0);
  require(down.dim() == 3 && down.size(1) == args.K && down.size(0) > 0 && down.size(2) > 0, "down",
          "[tasks, K, Ra]");
  args.tasks = down.size(0);
  args.Ra = down.size(2);
  require(b.dim() == 3 && b.size(0) == args.tasks && b.size(1) == args.N && b.size(2) == args.Ra,
          "b", "[tasks, N, Ra]");
  require(task_of_item.dim() == 1 && task_of_item.size(0) == args.items &&
              task_of_item.scalar_type() == ScalarType::Long,
          "task_of_item", "[items] of int64");
  require(!bias || (bias->dim() == 1 && bias->size(0) == args.N), "bias", "[N]");

  const Tensor index = torch::stable::contiguous(task_of_item);
  args.task_of_item = index.const_data_ptr<int64_t>();
  for (int64_t item = 0; item < args.items; ++item) {
    require(args.task_of_item[item] >= 0 && args.task_of_item[item] < args.tasks, "task_of_item",
            "in [0, tasks)");
  }
  const Tensor rows = torch::stable::contiguous(x);
  const Tensor w = readable(weight, "weight"),
               d = torch::stable::contiguous(readable(down, "down")),
               folded = torch::stable::contiguous(readable(b, "b"));
  std::optional<Tensor> given_bias;
  if (bias) given_bias = readable(*bias, "bias");
  Tensor y = torch::stable::new_empty(x, {args.items, args.rows, args.N});
  if (args.items * args.rows == 0) return y;
  args.x = matrix_of(rows);
  args.weight = matrix_of(w);
  if (given_bias) args.bias = matrix_of(*given_bias);
  args.down = matrix_of(d);
  args.b = matrix_of(folded);
  args.y = matrix_of(y);
  args.slots = slots_for(args.items * args.rows);
  args.threads = threads_for(args.items * args.rows, args.K, args.N);
  kernels().mixed_batch_forward(args, x.scalar_type() == ScalarType::Double);
  return y;
}

}  // namespace
}  // namespace efft_kernels::cpu

STABLE_TORCH_LIBRARY_IMPL(efft_kernels, CPU, m) {
  m.impl("native_fwd", TORCH_BOX(&efft_kernels::cpu::native_fwd));
  m.impl("native_tasks_fwd", TORCH_BOX(&efft_kernels::cpu::native_tasks_fwd));
  m.impl("native_bwd", TORCH_BOX(&efft_kernels::cpu::native_bwd));
  m.impl("native_bwd_made", TORCH_BOX(&efft_kernels::cpu::native_bwd_made));
}
