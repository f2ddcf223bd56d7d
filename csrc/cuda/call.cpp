#include "call.h"

#include <torch/csrc/stable/ops.h>

#include "common/launchers.h"
#include "gemm/select.h"
#include "passes/sizes.h"

namespace efft_kernels::cuda {

Call::Call(const Tensor& rows_, const Tensor& weight_, const Tensor& down_,
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

Strided Call::up_by_slice() const {
  Strided result = strided(up);
  if (up_is_shared()) result.stride[0] = 0;
  return result;
}

Call::Folded Call::fold(ScalarType as, FoldOptions options) const {
  const bool transpose = options.transpose_down;
  const int64_t row = transpose ? aligned_row(k) : rank_padded;
  const Tensor down_out = empty(rows, {transpose ? rank_padded : k, row}, as);
  std::optional<Tensor> b;
  if (options.b) b = empty(rows, {n, rank_padded}, as);
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
  f.out_dtype = dtype_of(down_out);
  f.b = b ? b->data_ptr() : nullptr;
  f.down_out = down_out.data_ptr();
  f.down_stride = row;
  f.transpose_down = transpose;
  check_cuda(launch_fold(f, stream));
  const Matrix down_matrix{down_out.data_ptr(), down_out.size(0), transpose ? k : row, row};
  return {b, down_out, down_matrix};
}

Tensor Call::cast_weight() const {
  return weight.scalar_type() == type ? weight : weight_plus(std::nullopt);
}

Tensor Call::merged_weight() const {
  return weight_plus(fold(ScalarType::Float, {.b = true, .transpose_down = true}));
}

Tensor Call::weight_plus(const std::optional<Folded>& low_rank) const {
  const Tensor out = empty(rows, {n, k}, type);
  MergeArguments merge{};
  merge.weight = strided(weight);
  if (low_rank) {
    merge.b = static_cast<const float*>(low_rank->b->data_ptr());
    merge.down = static_cast<const float*>(low_rank->down.data_ptr());
    merge.down_stride = low_rank->down_matrix.stride;
  }
  merge.rank_padded = rank_padded;
  merge.n = n;
  merge.k = k;
  merge.out = out.data_ptr();
  merge.out_dtype = dtype;
  check_cuda(launch_merge(merge, stream));
  return out;
}

void Call::thin(const Tensor& tall, const Matrix& thin_in, const Tensor& s,
                const std::optional<Tensor>& s_copy) const {
  const ThinArguments t{
      dtype, matrix(tall), thin_in, matrix(s), s_copy ? matrix(*s_copy) : Matrix{}, ra};
  check_cuda(launch_thin(t, rank_padded, stream));
}

Tensor Call::thin_grad(const Tensor& tall, const Matrix& thin_in, const Tensor& p,
                       const Tensor& s) const {
  const int64_t programs = thin_grad_programs(m, device.multiprocessors);
  const Tensor partial = empty(rows, {programs, tall.size(1), rank_padded}, ScalarType::Float);
  check_cuda(launch_thin_grad({dtype, matrix(tall), thin_in, matrix(p), matrix(s), ra,
                               static_cast<float*>(partial.data_ptr()), programs},
                              stream));
  return partial;
}

Tensor Call::tall_grad(const Tensor& tall, const Tensor& thin) const {
  const Splits splits = tall_splits(m, tall.size(1), device.multiprocessors);
  const Tensor partial = empty(rows, {splits.count, tall.size(1), rank_padded}, ScalarType::Float);
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

ReduceArguments Call::sum_of(const std::optional<Tensor>& partial,
                             const std::optional<Tensor>& out) const {
  ReduceArguments r{};
  if (!partial) return r;
  r.partial = static_cast<const float*>(partial->data_ptr());
  r.parts = partial->size(0);
  r.c = partial->size(1);
  r.rank_padded = rank_padded;
  r.out = out->data_ptr();
  r.rank = ra;
  r.out_dtype = dtype_of(*out);
  return r;
}

void Call::reduce(const std::optional<Tensor>& d_b_partial, const std::optional<Tensor>& d_b,
                  const std::optional<Tensor>& d_down_partial,
                  const std::optional<Tensor>& d_down) const {
  check_cuda(launch_reduce(sum_of(d_b_partial, d_b), sum_of(d_down_partial, d_down), stream));
}

void Call::unfold(const Tensor& d_b, const std::optional<Tensor>& d_core,
                  const std::optional<Tensor>& d_up) const {
  UnfoldArguments u{};
  u.d_b = static_cast<const float*>(d_b.data_ptr());
  u.core = strided(*core);
  u.up = up_by_slice();
  u.slices = slices;
  u.slice_n = n / slices;
  u.ra = ra;
  u.rb = rb;
  u.shared = up_is_shared();
  u.dtype = dtype_of(up);
  u.d_core = d_core ? d_core->data_ptr() : nullptr;
  u.d_up = d_up ? d_up->data_ptr() : nullptr;
  check_cuda(launch_unfold(u, stream));
}

Call::Gemm Call::choose(const Tensor& a, WLayout layout, const std::optional<Tensor>& bias) const {
  Gemm gemm{
      {}, {}, cast_weight(), bias, empty(rows, {m, layout == WLayout::kRowsOfI ? n : k}, type)};
  GemmArguments& g = gemm.arguments;
  g.dtype = dtype;
  g.layout = layout;
  g.a = matrix(a);
  g.w = matrix(gemm.weight);
  g.out = matrix(gemm.out);
  g.rank_padded = rank_padded;
  if (bias) {
    if (!bias->is_contiguous()) gemm.bias = torch::stable::contiguous(*bias);
    if (gemm.bias->scalar_type() != ScalarType::Float)
      gemm.bias = torch::stable::to(*gemm.bias, type);
    g.bias = gemm.bias->data_ptr();
    g.bias_dtype = dtype_of(*gemm.bias);
  }
  gemm.choice = choose_gemm(g, device);
  return gemm;
}

// W, B and down are one bordered matrix, [[W, B], [down^T, 0]], of which the forward takes rows and
// dX columns.
void Call::launch(const Gemm& gemm, const Folded& folded, const std::optional<Tensor>& p,
                  bool compute_p) const {
  GemmArguments g = gemm.arguments;
  const bool forward = g.layout == WLayout::kRowsOfI;
  const Matrix b = matrix(*folded.b);
  g.thin_in = forward ? folded.down_matrix : b;
  g.thin_out = forward ? b : folded.down_matrix;
  if (p) g.p = matrix(*p);
  g.p.cols = ra;
  g.compute_p = compute_p;
  check_cuda(launch_gemm(g, gemm.choice, device, stream));
}

}  // namespace efft_kernels::cuda
