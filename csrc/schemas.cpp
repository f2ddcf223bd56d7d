// The native operators' schemas. csrc/cpu and csrc/cuda implement them, each for its dispatch key.
#include <torch/csrc/stable/library.h>

// As low_rank_linear_fwd and low_rank_linear_bwd of efft_kernels/ops/schemas.py, with
//   strategy  a Strategy of codes.h
//   needs     bits of Need; the caller computes the gradients of weight and bias itself, and a
//             gradient that is not wanted comes back empty
STABLE_TORCH_LIBRARY_FRAGMENT(efft_kernels, m) {
  m.def(
      "native_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor down, Tensor? core, Tensor up,"
      " bool save_p, int strategy) -> (Tensor y, Tensor p)");
  m.def(
      "native_bwd(Tensor dy, Tensor? x, Tensor weight, Tensor? p, Tensor down, Tensor? core,"
      " Tensor up, int needs, int strategy)"
      " -> (Tensor dx, Tensor d_down, Tensor d_core, Tensor d_up)");
  // native_bwd with x made, a block of rows at a time, from what its producer kept, on the CPU:
  //   made_by  a MadeBy of codes.h other than kPlain
  //   kept     [rows, K], the producer's input
  //   rows     [M] of int64, the row of `kept` that a row of x is made from, -1 for one of zeros;
  //            None: the same one
  //   mean, rstd [rows, 1], norm_weight, norm_bias [K]   of a LayerNorm
  m.def(
      "native_bwd_made(Tensor dy, int made_by, Tensor kept, Tensor? rows, Tensor? mean, Tensor? "
      "rstd,"
      " Tensor? norm_weight, Tensor? norm_bias, Tensor weight, Tensor? p, Tensor down,"
      " Tensor? core, Tensor up, int needs, int strategy)"
      " -> (Tensor dx, Tensor d_down, Tensor d_core, Tensor d_up)");
  // What lies between the GEMMs of a chain (ops/chains.py), on CUDA: z + y, its LayerNorm x̂ and
  // P = x̂·down with mean and rstd [M]; and dz + residual, the same in dout's dtype as dy and the
  // partial sums [programs, K, 16] of x̂^T·S, with b and p also S_before = dy·b and the partial sums
  // of dy^T·p. z, its gradient, weight, bias, mean and rstd are float32, all is contiguous, K a
  // multiple of 64 up to 1280, with b up to 768, the rank at most 16. Of
  // what is all in 16 bits, contiguous and of ranks up to 16: GELU makes a = gelu(h) and P =
  // a·down, the columns a multiple of 64 up to 4096. Its gradient writes dh = da·gelu'(h) in da's
  // place and returns partial sums of S = dh·b, dh^T·p and gelu(h)^T·s in float32, the columns a
  // multiple of 64; the pair those of x^T·S and dY^T·P, S = dY·B and P = x·down, K a multiple of 64
  // up to 1024.
  m.def(
      "native_norm(Tensor z, Tensor? y, Tensor weight, Tensor bias, Tensor down, float eps)"
      " -> (Tensor z_out, Tensor out, Tensor p, Tensor mean, Tensor rstd)");
  m.def(
      "native_norm_grad(Tensor dout, Tensor z, Tensor mean, Tensor rstd, Tensor weight,"
      " Tensor bias, Tensor residual, Tensor s, Tensor? b, Tensor? p)"
      " -> (Tensor dz, Tensor dy, Tensor d_down, Tensor s_before, Tensor d_b)");
  m.def("native_gelu(Tensor h, Tensor down) -> (Tensor a, Tensor p)");
  m.def(
      "native_gelu_grad(Tensor(a!) da, Tensor h, Tensor s, Tensor b, Tensor p)"
      " -> (Tensor s_before, Tensor d_b, Tensor d_down)");
  m.def(
      "native_pair_grad(Tensor x, Tensor dy, Tensor down, Tensor b)"
      " -> (Tensor d_down, Tensor d_b)");
  // Item i of x [items, rows, K] with the factors of task task_of_item[i]: down [tasks, K, Ra], and
  // b [tasks, N, Ra], folded. For inference, on the CPU.
  m.def(
      "native_tasks_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor down, Tensor b,"
      " Tensor task_of_item) -> Tensor");
}
