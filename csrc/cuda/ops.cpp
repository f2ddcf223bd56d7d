#include "ops.h"

#include <torch/csrc/stable/ops.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "checks.h"
#include "common/device_guard.h"
#include "common/launchers.h"
#include "passes/sizes.h"

// The operators' CUDA implementation: which launches, in which order.
//
//   forward
//     fused   fold, gemm (P rides)
//     split   fold, thin (P), gemm
//     merged  fold, merge, the library's GEMM; fold and thin where P is saved
//   backward
//     fused   fold, gemm (dX; S rides), tall_grad (x, S), tall_grad (dY, P), reduce, unfold
//     split   fold, thin (S, and d_B's partial sums), gemm (dX), tall_grad (x, S), reduce, unfold
//     merged  as split, with fold, merge and the library's GEMM for dX
//
// A rank or a device that P cannot ride on runs as `split`. A weight wider than x is cast first.
namespace efft_kernels::cuda {
namespace {

using torch::headeronly::ScalarType;

enum Strategy : int64_t { kFused = 0, kSplit = 1, kMerged = 2 };
// The bits of weight and bias are the caller's business.
enum Need : int64_t { kNeedX = 1, kNeedDown = 8, kNeedCore = 16, kNeedUp = 32 };

const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    default:
      return "another dtype";
  }
}

// For a dtype that the checks have passed.
Dtype dtype_of(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  return type == ScalarType::Half       ? Dtype::kHalf
         : type == ScalarType::BFloat16 ? Dtype::kBfloat16
                                        : Dtype::kFloat;
}

TensorInfo info(const char* name, const Tensor& t) {
  TensorInfo result{name, true, name_of(t.scalar_type())};
  result.device = t.is_cuda()  ? "cuda:" + std::to_string(t.get_device_index())
                  : t.is_cpu() ? "cpu"
                               : "another device";
  for (int64_t i = 0; i < t.dim(); ++i) {
    result.shape.push_back(t.size(i));
    result.stride.push_back(t.stride(i));
  }
  return result;
}

TensorInfo info(const char* name, const std::optional<Tensor>& t) {
  return t.has_value() ? info(name, *t) : TensorInfo{name};
}

void require(const std::string& error) {
  if (!error.empty()) throw std::runtime_error("efft_kernels: " + error);
}

// [rows, cols] with unit stride along the columns.
Matrix matrix(const Tensor& t) {
  return {t.data_ptr(), t.size(0), t.size(1), t.size(0) > 1 ? t.stride(0) : aligned_row(t.size(1))};
}

Strided strided(const Tensor& t) {
  Strided result{t.data_ptr(), dtype_of(t), {0, 0, 0}};
  for (int64_t i = 0; i < t.dim(); ++i) result.stride[i] = t.stride(i);
  return result;
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
  const std::vector<int64_t> sizes(shape);
  return torch::stable::new_empty(
      like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), type);
}

Tensor nothing(const Tensor& like) { return empty(like, {0}, like.scalar_type()); }

// aten::linear, the library's GEMM.
Tensor library_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x),
                                    torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// One call's operands and what is derived from their shapes.
struct Call {
  OnDeviceOf here;
  Device device;
  cudaStream_t stream;
  Tensor rows;    // x, or dy in the backward: what fresh tensors are like
  Tensor weight;  // [N, K]
  Tensor down;    // [K, Ra]
  std::optional<Tensor> core;
  Tensor up;
  int64_t m, n, k, slices;
  int ra, rb, rank_padded;
  ScalarType type;
  Dtype dtype;

  Call(const Tensor& rows_, const Tensor& weight_, const Tensor& down_,
       const std::optional<Tensor>& core_, const Tensor& up_)
      : here(rows_), rows(rows_), weight(weight_), down(down_), core(core_), up(up_) {
    check_cuda(current_device(&device));
    stream = here.stream();
    m = rows.size(0);
    n = weight.size(0);
    k = weight.size(1);
    slices = core ? core->size(0) : up.size(0);
    ra = static_cast<int>(down.size(1));
    rb = static_cast<int>(up.size(2));
    rank_padded = padded_rank(ra);
    type = rows.scalar_type();
    dtype = dtype_of(rows);
  }

  bool up_is_shared() const { return up.size(0) != slices; }

  Strided up_by_slice() const {
    Strided result = strided(up);
    if (up_is_shared()) result.stride[0] = 0;
    return result;
  }

  Strided core_or_null() const { return core ? strided(*core) : Strided{}; }

  // The thin factors in `as`: B [N, R] if wanted, and down as [K, R] or, transposed, [R, K].
  struct Folded {
    std::optional<Tensor> b;
    Tensor down;
    Matrix down_matrix;
  };

  Folded fold(ScalarType as, bool want_b, bool transpose_down) const {
    Folded out{std::nullopt, rows, {}};
    const int64_t row = transpose_down ? aligned_row(k) : rank_padded;
    out.down = empty(rows, {transpose_down ? rank_padded : k, row}, as);
    out.down_matrix = {out.down.data_ptr(), out.down.size(0), transpose_down ? k : row, row};
    if (want_b) out.b = empty(rows, {n, rank_padded}, as);
    FoldArguments f{};
    f.down = strided(down);
    f.core = core_or_null();
    f.up = up_by_slice();
    f.k = k;
    f.slices = slices;
    f.slice_n = n / slices;
    f.ra = ra;
    f.rb = rb;
    f.rank_padded = rank_padded;
    f.out_dtype = dtype_of(out.down);
    f.b = want_b ? out.b->data_ptr() : nullptr;
    f.down_out = out.down.data_ptr();
    f.down_stride = row;
    f.transpose_down = transpose_down;
    check_cuda(launch_fold(f, stream));
    return out;
  }

  // W in the compute dtype; `low_rank` adds B·down^T before the only rounding.
  Tensor effective_weight(bool low_rank) const {
    if (!low_rank && weight.scalar_type() == type) return weight;
    std::optional<Folded> folded;
    if (low_rank) folded = fold(ScalarType::Float, true, true);
    const Tensor out = empty(rows, {n, k}, type);
    MergeArguments merge{};
    merge.weight = strided(weight);
    merge.b = low_rank ? static_cast<const float*>(folded->b->data_ptr()) : nullptr;
    merge.down = low_rank ? static_cast<const float*>(folded->down.data_ptr()) : nullptr;
    merge.down_stride = low_rank ? folded->down_matrix.stride : 0;
    merge.rank_padded = rank_padded;
    merge.n = n;
    merge.k = k;
    merge.out = out.data_ptr();
    merge.out_dtype = dtype;
    check_cuda(launch_merge(merge, stream));
    return out;
  }

  // S = tall·thin_in into `s`; with `p` also d_B's partial sums, [parts, C, R], which it returns.
  std::optional<Tensor> thin(const Tensor& tall, const Matrix& thin_in, const Tensor& s,
                             const std::optional<Tensor>& s_copy,
                             const std::optional<Tensor>& p) const {
    ThinArguments t{};
    t.dtype = dtype;
    t.tall = matrix(tall);
    t.thin_in = thin_in;
    t.s = matrix(s);
    if (s_copy) t.s_copy = matrix(*s_copy);
    t.rank = ra;
    t.programs = ceil_div(m, kPassRows);
    std::optional<Tensor> partial;
    if (p) {
      t.p = matrix(*p);
      t.programs = thin_programs(m, device.multiprocessors);
      partial = empty(rows, {t.programs, tall.size(1), rank_padded}, ScalarType::Float);
      t.partial = static_cast<float*>(partial->data_ptr());
    }
    check_cuda(launch_thin(t, rank_padded, stream));
    return partial;
  }

  // The partial sums [splits, C, R] of tall^T·thin.
  Tensor tall_grad(const Tensor& tall, const Tensor& thin) const {
    const Splits splits = tall_splits(m, tall.size(1), device.multiprocessors);
    const Tensor partial =
        empty(rows, {splits.count, tall.size(1), rank_padded}, ScalarType::Float);
    TallGradArguments t{};
    t.dtype = dtype;
    t.tall = matrix(tall);
    t.thin = matrix(thin);
    t.thin.cols = ra;
    t.partial = static_cast<float*>(partial.data_ptr());
    t.rows_per_split = splits.rows;
    t.splits = splits.count;
    check_cuda(launch_tall_grad(t, rank_padded, stream));
    return partial;
  }

  ReduceArguments sum_of(const std::optional<Tensor>& partial, const Tensor& out) const {
    ReduceArguments r{};
    if (!partial) return r;
    r.partial = static_cast<const float*>(partial->data_ptr());
    r.parts = partial->size(0);
    r.c = partial->size(1);
    r.rank_padded = rank_padded;
    r.out = out.data_ptr();
    r.rank = ra;
    r.out_dtype = dtype_of(out);
    return r;
  }

  // d_core and d_up from d_B [N, Ra] float32; an empty tensor where one is not needed.
  std::tuple<Tensor, Tensor> unfold(const Tensor& d_b, bool need_core, bool need_up) const {
    Tensor d_core = nothing(up);
    Tensor d_up = nothing(up);
    if (need_core) d_core = empty(up, {slices, ra, rb}, up.scalar_type());
    if (need_up) d_up = empty(up, {up.size(0), n / slices, rb}, up.scalar_type());
    UnfoldArguments u{};
    u.d_b = static_cast<const float*>(d_b.data_ptr());
    u.core = core_or_null();
    u.up = up_by_slice();
    u.slices = slices;
    u.slice_n = n / slices;
    u.ra = ra;
    u.rb = rb;
    u.shared = up_is_shared();
    u.out_dtype = dtype_of(up);
    u.d_core = need_core ? d_core.data_ptr() : nullptr;
    u.d_up = need_up ? d_up.data_ptr() : nullptr;
    check_cuda(launch_unfold(u, stream));
    return {d_core, d_up};
  }

  // A GEMM over rows of `a`: its arguments but for the thin operands, and the kernel it gets.
  struct Gemm {
    Tensor weight;  // kept alive
    Tensor out;
    GemmArguments arguments{};
    GemmPlan plan{};
  };

  Gemm plan_product(const Tensor& a, WLayout layout) const {
    const int64_t columns = layout == WLayout::kRowsOfI ? n : k;
    Gemm gemm{effective_weight(false), empty(rows, {m, columns}, type)};
    GemmArguments& g = gemm.arguments;
    g.dtype = dtype;
    g.layout = layout;
    g.a = matrix(a);
    g.w = matrix(gemm.weight);
    g.out = matrix(gemm.out);
    g.rank_padded = rank_padded;
    gemm.plan = plan_gemm(g, device);
    return gemm;
  }

  // Its low-rank part. W, B and down are one bordered matrix, [[W, B], [down^T, 0]], of which the
  // forward takes rows and dX columns; `folded.down` is transposed.
  void run(Gemm& gemm, const Folded& folded, const std::optional<Tensor>& p, bool ride) const {
    GemmArguments& g = gemm.arguments;
    const bool forward = g.layout == WLayout::kRowsOfI;
    const Matrix b = matrix(*folded.b);
    g.thin_in = forward ? folded.down_matrix : b;
    g.thin_out = forward ? b : folded.down_matrix;
    if (p) g.p = matrix(*p);
    g.p.cols = ra;
    g.ride = ride;
    check_cuda(launch_gemm(g, gemm.plan, device, stream));
  }
};

}  // namespace

std::tuple<Tensor, Tensor> native_fwd(Tensor x, Tensor weight, std::optional<Tensor> bias,
                                      Tensor down, std::optional<Tensor> core, Tensor up,
                                      bool save_p, int64_t strategy) {
  require(check({info("x", x),
                 {"x"},
                 {"p"},
                 info("weight", weight),
                 info("bias", bias),
                 info("down", down),
                 info("core", core),
                 info("up", up)},
                false));
  const Call call(x, weight, down, core, up);
  std::optional<Tensor> p;
  if (save_p) p = empty(x, {call.m, call.ra}, call.type);
  const Tensor no_p = nothing(x);
  if (call.m == 0) return {empty(x, {0, call.n}, call.type), p.value_or(no_p)};

  if (strategy == kMerged) {
    if (p) {
      const Call::Folded folded = call.fold(call.type, false, false);
      call.thin(x, folded.down_matrix, *p, std::nullopt, std::nullopt);
    }
    if (bias) bias = torch::stable::to(*bias, call.type);
    return {library_linear(x, call.effective_weight(true), bias), p.value_or(no_p)};
  }

  Call::Gemm gemm = call.plan_product(x, WLayout::kRowsOfI);
  if (bias) {
    const Tensor contiguous = torch::stable::contiguous(*bias);
    bias = contiguous.scalar_type() == ScalarType::Float ? contiguous
                                                         : torch::stable::to(contiguous, call.type);
    gemm.arguments.bias = bias->data_ptr();
    gemm.arguments.bias_dtype = dtype_of(*bias);
  }
  const bool ride = strategy == kFused && can_ride(gemm.plan, call.rank_padded);
  const Call::Folded folded = call.fold(call.type, true, ride);
  std::optional<Tensor> given = p;
  if (!ride) {
    // The copy engine needs P in rows of a multiple of 16 bytes; the caller gets it contiguous.
    const bool padded = !p || call.ra % 8 != 0;
    if (padded) given = empty(x, {call.m, call.rank_padded}, call.type);
    call.thin(x, folded.down_matrix, *given, padded ? p : std::nullopt, std::nullopt);
  }
  call.run(gemm, folded, given, ride);
  return {gemm.out, p.value_or(no_p)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> native_bwd(Tensor dy, std::optional<Tensor> x,
                                                      Tensor weight, std::optional<Tensor> p,
                                                      Tensor down, std::optional<Tensor> core,
                                                      Tensor up, int64_t needs, int64_t strategy) {
  require(check({info("dy", dy),
                 info("x", x),
                 info("p", p),
                 info("weight", weight),
                 {"bias"},
                 info("down", down),
                 info("core", core),
                 info("up", up)},
                true));
  const bool need_x = needs & kNeedX;
  const bool need_down = needs & kNeedDown;
  const bool need_core = (needs & kNeedCore) && core;
  const bool need_up = needs & kNeedUp;
  const bool need_factors = need_core || need_up;
  if (need_down && !x) require("x must be given where down needs a gradient, got None");
  if (need_factors && !p) require("p must be given where core or up needs a gradient, got None");

  const Call call(dy, weight, down, core, up);
  Tensor dx = nothing(dy);
  Tensor d_down = nothing(down);
  Tensor d_core = nothing(up);
  Tensor d_up = nothing(up);
  if (need_down) d_down = empty(down, {call.k, call.ra}, down.scalar_type());
  if (call.m == 0) {
    if (need_x) dx = empty(dy, {0, call.k}, call.type);
    if (need_down) torch::stable::zero_(d_down);
    if (need_factors) {
      Tensor d_b = empty(dy, {call.n, call.ra}, ScalarType::Float);
      torch::stable::zero_(d_b);
      std::tie(d_core, d_up) = call.unfold(d_b, need_core, need_up);
    }
    return {dx, d_down, d_core, d_up};
  }

  std::optional<Tensor> s;        // S = dY·B, [M, R]
  std::optional<Tensor> partial;  // of d_B
  std::optional<Call::Gemm> gemm;
  if (need_x && strategy != kMerged) gemm = call.plan_product(dy, WLayout::kRowsOfC);
  const bool ride = gemm && strategy == kFused && can_ride(gemm->plan, call.rank_padded);
  if (need_down || gemm) {
    const Call::Folded folded = call.fold(call.type, true, true);
    if (need_down || !ride) s = empty(dy, {call.m, call.rank_padded}, call.type);
    if (!ride) {
      const bool one_pass = need_factors && one_pass_gradient(call.rank_padded);
      partial = call.thin(dy, matrix(*folded.b), *s, std::nullopt, one_pass ? p : std::nullopt);
    }
    if (gemm) {
      call.run(*gemm, folded, s, ride);
      dx = gemm->out;
    }
  }
  if (need_x && strategy == kMerged) dx = torch::stable::matmul(dy, call.effective_weight(true));

  std::optional<Tensor> x_partial;
  if (need_down) x_partial = call.tall_grad(*x, *s);
  Tensor d_b = dx;  // a placeholder where it is not needed
  if (need_factors) {
    if (!partial) partial = call.tall_grad(dy, *p);
    d_b = empty(dy, {call.n, call.ra}, ScalarType::Float);
  }
  check_cuda(launch_reduce(call.sum_of(partial, d_b), call.sum_of(x_partial, d_down), call.stream));
  if (need_factors) std::tie(d_core, d_up) = call.unfold(d_b, need_core, need_up);
  return {dx, d_down, d_core, d_up};
}

}  // namespace efft_kernels::cuda
