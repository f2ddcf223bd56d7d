// The general GEMM on the model: both layouts, tile sizes and dtypes, ragged and misaligned.

#include "gemm/sm80.cu"
#include "matrices.h"

using namespace efft_kernels::cuda;

template <class T>
static void gemm(WLayout layout, int block, int64_t m, int64_t c, int64_t i, int rank, bool aligned,
                 bool with_bias, bool eager) {
  model::settings() = {eager};
  const int rank_padded = rank <= 16 ? 16 : rank <= 32 ? 32 : 64;
  const int64_t pad = aligned ? 8 : 3;
  const auto stride = [&](int64_t cols) { return aligned ? (cols + 7) / 8 * 8 + pad : cols; };
  auto a = Stored<T>::random(m, i, 1, stride(i), aligned ? 0 : 1);
  auto w = layout == WLayout::kRowsOfI ? Stored<T>::random(c, i, 2, stride(i))
                                       : Stored<T>::random(i, c, 2, stride(c));
  auto p = Stored<T>::random(m, rank, 3, aligned ? rank_padded : rank);
  auto thin_out = layout == WLayout::kRowsOfI ? Stored<T>::random(c, rank_padded, 4)
                                              : Stored<T>::random(rank_padded, c, 4, stride(c));
  auto bias = Stored<T>::random(1, c, 5);
  Stored<float> wide_bias = Stored<float>::random(1, c, 5);
  Stored<T> out(m, c, stride(c));
  GemmArguments g{};
  g.dtype = std::is_same_v<T, __half> ? Dtype::kHalf : Dtype::kBfloat16;
  g.layout = layout;
  g.a = a.matrix();
  g.w = w.matrix();
  g.p = p.matrix();
  g.thin_out = thin_out.matrix();
  g.out = out.matrix();
  if (with_bias) {
    g.bias = aligned ? bias.matrix().data : wide_bias.matrix().data;
    g.bias_dtype = aligned ? g.dtype : Dtype::kFloat;
  }
  g.rank_padded = rank_padded;
  EXPECT(launch_gemm_sm80(g, block, nullptr) == cudaSuccess, "launch");
  const bool rows_of_i = layout == WLayout::kRowsOfI;
  expect_equal("out", out, [&](int64_t r, int64_t col) {
    double sum = with_bias ? bias.value(0, col) : 0;
    for (int64_t l = 0; l < i; ++l)
      sum += a.value(r, l) * (rows_of_i ? w.value(col, l) : w.value(l, col));
    for (int l = 0; l < rank; ++l)
      sum += p.value(r, l) * (rows_of_i ? thin_out.value(col, l) : thin_out.value(l, col));
    return rounded<T>(sum);
  });
  out.expect_margins_untouched("out");
}

int main() {
  for (const WLayout layout : {WLayout::kRowsOfI, WLayout::kRowsOfC}) {
    for (const bool aligned : {true, false}) {
      for (const bool eager : {true, false}) {
        gemm<__nv_bfloat16>(layout, 64, 67, 77, 71, 7, aligned, true, eager);
        gemm<__half>(layout, 64, 129, 72, 200, 37, aligned, false, eager);
        gemm<__half>(layout, 128, 131, 136, 69, 16, aligned, true, eager);
      }
    }
    gemm<__nv_bfloat16>(layout, 128, 257, 129, 32, 33, true, true, false);
    gemm<__half>(layout, 64, 1, 1, 1, 1, false, true, false);
  }
  return failures() != 0;
}
