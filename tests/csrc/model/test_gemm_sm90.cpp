// The sm_90a GEMM on the model: both layouts and widths, P read and computed, every kind of bias,
// ragged tiles, blocks alone and in pairs, more tiles than blocks, products shorter than the store
// of the tile before. Only multiples of 8 columns, as TMA takes no others.

#include "gemm/sm90.cuh"
#include "matrices.h"

using namespace efft_kernels::cuda;

enum class WithBias { kNone, kFloat, kSame };

static CUtensorMap encoded(const TensorMapParams& params) {
  CUtensorMap map{};
  static_assert(sizeof params <= sizeof map);
  std::memcpy(&map, &params, sizeof params);
  return map;
}

template <class T>
static void gemm(WLayout layout, int block_c, bool compute_p, int64_t m, int64_t c, int64_t i,
                 int rank, int blocks, bool eager, WithBias with_bias = WithBias::kSame) {
  model::settings() = {eager};
  const bool rows_of_i = layout == WLayout::kRowsOfI;
  const int rank_padded = rank <= 16 ? 16 : rank <= 32 ? 32 : rank <= 64 ? 64 : 128;
  const auto thin = [&](int64_t rows, int64_t cols, bool rank_is_cols, unsigned seed) {
    auto t = Stored<T>::random(rows, cols, seed, (cols + 7) / 8 * 8);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < cols; ++k)
        if ((rank_is_cols ? k : r) >= rank) t.at(r, k) = from_float<T>(0.0f);
    return t;
  };
  auto a = Stored<T>::random(m, i, 1, i + 8);
  auto w = rows_of_i ? Stored<T>::random(c, i, 2) : Stored<T>::random(i, c, 2, c + 16);
  auto thin_in = rows_of_i ? thin(rank_padded, i, false, 3) : thin(i, rank_padded, true, 3);
  auto thin_out = rows_of_i ? thin(c, rank_padded, true, 4) : thin(rank_padded, c, false, 4);
  auto p = compute_p ? Stored<T>(m, rank) : Stored<T>::random(m, rank, 5, rank_padded);
  auto bias = Stored<T>::random(1, c, 6);
  auto bias_float = Stored<float>::random(1, c, 6);
  Stored<T> out(m, c);
  GemmArguments g{};
  g.dtype = std::is_same_v<T, __half> ? Dtype::kHalf : Dtype::kBfloat16;
  g.layout = layout;
  g.a = a.matrix();
  g.w = w.matrix();
  g.thin_in = thin_in.matrix();
  g.thin_out = thin_out.matrix();
  g.p = p.matrix();
  g.out = out.matrix();
  g.bias = with_bias == WithBias::kNone    ? nullptr
           : with_bias == WithBias::kFloat ? bias_float.matrix().data
                                           : bias.matrix().data;
  g.bias_dtype = with_bias == WithBias::kFloat ? Dtype::kFloat : g.dtype;
  g.rank_padded = rank_padded;
  g.compute_p = compute_p;
  const GemmMapParams params = gemm_map_params(g, block_c);
  GemmMaps maps{};
  maps.a = encoded(params.a);
  maps.w = encoded(params.w);
  maps.thin_in = encoded(params.thin_in);
  maps.p = encoded(params.p);
  maps.thin_out = encoded(params.thin_out);
  EXPECT(launch_sm90<T>(g, maps, block_c, Device{blocks, 90}, nullptr) == cudaSuccess, "launch");

  const auto p_value = [&](int64_t r, int64_t k) {
    if (!compute_p) return p.value(r, k);
    double sum = 0;
    for (int64_t l = 0; l < i; ++l)
      sum += a.value(r, l) * (rows_of_i ? thin_in.value(k, l) : thin_in.value(l, k));
    return rounded<T>(sum);
  };
  if (compute_p) expect_equal("P", p, p_value);
  std::vector<double> p_all(m * rank);
  for (int64_t r = 0; r < m; ++r)
    for (int64_t k = 0; k < rank; ++k) p_all[r * rank + k] = p_value(r, k);
  expect_equal("out", out, [&](int64_t r, int64_t col) {
    double sum = with_bias == WithBias::kNone ? 0 : bias.value(0, col);
    for (int64_t l = 0; l < i; ++l)
      sum += a.value(r, l) * (rows_of_i ? w.value(col, l) : w.value(l, col));
    for (int k = 0; k < rank; ++k)
      sum += p_all[r * rank + k] * (rows_of_i ? thin_out.value(col, k) : thin_out.value(k, col));
    return rounded<T>(sum);
  });
  out.expect_margins_untouched("out");
}

int main() {
  for (const WLayout layout : {WLayout::kRowsOfI, WLayout::kRowsOfC}) {
    for (const int block_c : {128, 192}) {
      gemm<__nv_bfloat16>(layout, block_c, true, 133, 200, 136, 13, 2, false);
      gemm<__half>(layout, block_c, false, 133, 200, 136, 16, 3, false);
    }
    gemm<__nv_bfloat16>(layout, 128, true, 70, 136, 136, 16, 2, true);
    gemm<__half>(layout, 128, false, 129, 136, 72, 29, 1, true);
    gemm<__half>(layout, 128, true, 70, 136, 456, 16, 1, false);  // more tiles than stages
    gemm<__nv_bfloat16>(layout, 128, false, 65, 200, 64, 48, 1, false);
    gemm<__half>(layout, 128, false, 40, 136, 72, 100, 1, false);
    gemm<__half>(layout, 192, true, 1, 8, 8, 1, 5, false);
    // Several tiles a block, of one, two and five steps; pairs of blocks with more than one pair of
    // tiles each.
    gemm<__nv_bfloat16>(layout, 192, true, 200, 392, 64, 16, 1, false, WithBias::kFloat);
    gemm<__half>(layout, 128, false, 300, 72, 104, 8, 1, false, WithBias::kNone);
    gemm<__half>(layout, 192, true, 257, 208, 304, 15, 2, false, WithBias::kFloat);
    gemm<__nv_bfloat16>(layout, 192, false, 257, 208, 304, 29, 2, true, WithBias::kNone);
    gemm<__nv_bfloat16>(layout, 128, true, 257, 456, 456, 16, 5, false, WithBias::kNone);
  }
  return failures() != 0;
}
