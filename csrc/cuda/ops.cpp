#include "ops.h"

#include <torch/csrc/stable/ops.h>

#include "call.h"
#include "codes.h"
#include "gemm/select.h"
#include "passes/sizes.h"

// The operators' CUDA implementation: which launches, in which order.
//
//   forward
//     fused   fold, gemm (P in its loop)
//     split   fold, thin (P), gemm
//     merged  fold, merge, torch's GEMM; fold and thin where P is saved
//   backward
//     fused   fold, gemm (dX; S in its loop), tall_grad (x, S), tall_grad (dY, P), reduce, unfold
//     split   fold, thin_grad (S, and d_B's partial sums), tall_grad (x, S), reduce, unfold, gemm
//             (dX); above R = 16 thin (S) and tall_grad (dY, P) for thin_grad
//     merged  as split, with fold, merge and torch's GEMM for dX
//
// dX comes last where it can: the partial sums are still in L2 when they are added, and so is dX
// when the layer before reads it.
// `fused` runs as `split` where the GEMM's loop cannot compute P. A weight wider than x is cast
// first. Without a core reduce makes d_up, and there is no unfold.
namespace efft_kernels::cuda {

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
  if (call.m == 0) return {empty(x, {0, call.n}, call.type), or_empty(p, x)};

  if (strategy == kMerged) {
    if (p) {
      const Call::Folded folded = call.fold(call.type, {.b = false, .transpose_down = false});
      call.thin(x, folded.down_matrix, *p);
    }
    if (bias) bias = torch::stable::to(*bias, call.type);
    return {torch_linear(x, call.merged_weight(), bias), or_empty(p, x)};
  }

  const Call::Gemm gemm = call.choose(x, WLayout::kRowsOfI, bias);
  const bool compute_p = strategy == kFused && can_compute_p(gemm.choice, call.rank_padded);
  const Call::Folded folded = call.fold(call.type, {.b = true, .transpose_down = compute_p});
  std::optional<Tensor> gemm_p = p;
  if (!compute_p) {
    // TMA needs P in rows of a multiple of 16 bytes; the caller gets it contiguous.
    const bool padded = !p || call.ra % 8 != 0;
    if (padded) gemm_p = empty(x, {call.m, call.rank_padded}, call.type);
    call.thin(x, folded.down_matrix, *gemm_p, padded ? p : std::nullopt);
  }
  call.launch(gemm, folded, gemm_p, compute_p);
  return {gemm.out, or_empty(p, x)};
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
  std::optional<Tensor> dx, d_down, d_core, d_up;
  if (need_down) d_down = empty(down, {call.k, call.ra}, down.scalar_type());
  if (need_core) d_core = empty(up, {call.slices, call.ra, call.rb}, up.scalar_type());
  if (need_up) d_up = empty(up, {up.size(0), up.size(1), call.rb}, up.scalar_type());

  if (call.m == 0) {
    if (need_x) dx = empty(dy, {0, call.k}, call.type);
    for (auto* gradient : {&d_down, &d_core, &d_up})
      if (*gradient) torch::stable::zero_(**gradient);
  } else {
    std::optional<Tensor> s;  // S = dY·B, [M, R]
    std::optional<Tensor> d_b_partial, d_down_partial;
    std::optional<Call::Folded> folded;
    std::optional<Call::Gemm> gemm;
    if (need_x && strategy != kMerged) gemm = call.choose(dy, WLayout::kRowsOfC);
    const bool compute_s =
        gemm && strategy == kFused && can_compute_p(gemm->choice, call.rank_padded);
    if (need_down || gemm) {
      folded = call.fold(call.type, {.b = true, .transpose_down = true});
      if (need_down || !compute_s) s = empty(dy, {call.m, call.rank_padded}, call.type);
      const Matrix b = matrix(*folded->b);
      if (compute_s) {
        call.launch(*gemm, *folded, s, true);
      } else if (need_factors && one_pass_gradient(call.rank_padded)) {
        d_b_partial = call.thin_grad(dy, b, *p, *s);
      } else {
        call.thin(dy, b, *s);
      }
    }
    if (need_down) d_down_partial = call.tall_grad(*x, *s);
    if (need_factors && !d_b_partial) d_b_partial = call.tall_grad(dy, *p);
    // d_B, [N, Ra]; without a core it is d_up.
    std::optional<Tensor> d_b = d_up;
    if (need_factors && core) d_b = empty(dy, {call.n, call.ra}, ScalarType::Float);
    call.reduce(d_b_partial, d_b, d_down_partial, d_down);
    if (need_factors && core) call.unfold(*d_b, d_core, d_up);
    if (gemm && !compute_s) call.launch(*gemm, *folded, s, false);
    if (gemm) dx = gemm->out;
    if (need_x && strategy == kMerged) dx = torch::stable::matmul(dy, call.merged_weight());
  }
  return {or_empty(dx, dy), or_empty(d_down, down), or_empty(d_core, up), or_empty(d_up, up)};
}

}  // namespace efft_kernels::cuda
