// GELU with P of the linear after it, and its gradient with the thin products of both linears
// beside it, on the model.

#include "chain/gelu.cu"
#include "chain/gelu_grad.cu"
#include "normal.h"

using namespace efft_kernels::cuda;

static double gelu_slope(double h) {
  const double cdf = 0.5 * std::erfc(-h / std::sqrt(2.0));
  return cdf + h * std::exp(-h * h / 2) / std::sqrt(2 * std::acos(-1.0));
}

static double gelu_value(double h) { return h * 0.5 * std::erfc(-h / std::sqrt(2.0)); }

template <class T>
static void gelu(int64_t m, int64_t c, int rank, int64_t programs, bool eager) {
  model::settings() = {eager};
  auto h = normal<T>(m, c, 1, 2), down = normal<T>(c, rank, 2);
  Stored<T> value(m, c), p(m, rank);
  GeluArguments a{};
  a.dtype = kDtype<T>;
  a.h = data(h);
  a.down = data(down);
  a.a = out(value);
  a.p = out(p);
  a.rows = m, a.width = c, a.programs = programs, a.rank = rank;
  EXPECT(launch_gelu(a, nullptr) == cudaSuccess, "launch");
  expect_near("a", value, kRounding<T>,
              [&](int64_t r, int64_t i) { return gelu_value(h.value(r, i)); });
  expect_near("P", p, kRounding<T>, [&](int64_t r, int64_t i) {
    double sum = 0;
    for (int64_t j = 0; j < c; ++j) sum += value.value(r, j) * down.value(j, i);
    return sum;
  });
  value.expect_margins_untouched("beside a");
  p.expect_margins_untouched("beside P");
}

template <class T>
static void gelu_grad(int64_t m, int64_t c, int rank_before, int rank_after, int64_t programs,
                      bool eager) {
  model::settings() = {eager};
  auto h = normal<T>(m, c, 1, 2), da = normal<T>(m, c, 2);
  auto b = normal<T>(c, rank_before, 3), p = normal<T>(m, rank_before, 4);
  auto s = normal<T>(m, rank_after, 5);
  Stored<T> dh = da;
  const int64_t parts = gelu_parts(c);
  std::vector<float> sum_s(parts * m * kChainRank, std::nanf(""));
  std::vector<float> sum_b(programs * c * kChainRank, std::nanf("")), sum_down = sum_b;
  GeluGradArguments a{};
  a.dtype = kDtype<T>;
  a.da = out(dh);
  a.h = data(h);
  a.s = data(s);
  a.b = data(b);
  a.p = data(p);
  a.sum_s = sum_s.data();
  a.sum_b = sum_b.data();
  a.sum_down = sum_down.data();
  a.rows = m, a.width = c, a.programs = programs;
  a.rank_before = rank_before, a.rank_after = rank_after;
  EXPECT(launch_gelu_grad(a, nullptr) == cudaSuccess, "launch");

  expect_near("dh", dh, kRounding<T>,
              [&](int64_t r, int64_t i) { return da.value(r, i) * gelu_slope(h.value(r, i)); });
  dh.expect_margins_untouched("beside dh");
  const auto added = [&](const std::vector<float>& sums, int64_t rows, int64_t row, int r) {
    double sum = 0;
    for (int64_t i = row; i < int64_t(sums.size()) / kChainRank; i += rows)
      sum += sums[i * kChainRank + r];
    return sum;
  };
  const auto expect_sum = [&](const char* what, double got, double sum, double all, double slack) {
    EXPECT(std::abs(got - sum) <= slack * all + 1e-6, "%s: %g, not %g", what, got, sum);
  };
  for (int64_t row = 0; row < m; ++row)
    for (int r = 0; r < kChainRank; ++r) {
      double sum = 0, all = 0;
      for (int64_t i = 0; i < c && r < rank_before; ++i) {
        sum += dh.value(row, i) * b.value(i, r);
        all += std::abs(dh.value(row, i) * b.value(i, r));
      }
      expect_sum("S", added(sum_s, m, row, r), sum, all, 1e-6);
    }
  for (int64_t i = 0; i < c; ++i)
    for (int r = 0; r < kChainRank; ++r) {
      double sum = 0, all = 0, after = 0, all_after = 0, largest = 0;
      for (int64_t row = 0; row < m; ++row) {
        if (r < rank_before) {
          sum += dh.value(row, i) * p.value(row, r);
          all += std::abs(dh.value(row, i) * p.value(row, r));
        }
        if (r < rank_after) {
          const double value = rounded<T>(gelu_value(h.value(row, i))) * s.value(row, r);
          after += value;
          all_after += std::abs(value);
          largest = std::max(largest, std::abs(value));
        }
      }
      expect_sum("d_B", added(sum_b, c, i, r), sum, all, 1e-6);
      // A value of gelu(h) may round the other way.
      const double got = added(sum_down, c, i, r);
      EXPECT(std::abs(got - after) <= 2 * kRounding<T> * largest + 1e-6 * all_after + 1e-6,
             "d_down (%ld, %d): %g, not %g", long(i), r, got, after);
    }
}

int main() {
  EXPECT(gelu_parts(3072) == 4 && gelu_warps(3072) == 12, "ViT-B");
  EXPECT(gelu_parts(4096) == 6 && gelu_warps(4096) == 11, "ViT-L");
  EXPECT(gelu_parts(64) == 1 && gelu_warps(64) == 1, "one warp");
  EXPECT(gelu_programs(12608, 3072, 132) == 33, "programs");
  EXPECT(gelu_programs(33, 3072, 132) == 3, "programs");
  EXPECT(gelu_programs(12608, 3072, 2) == 1, "programs");
  EXPECT(gelu_value_warps(3072) == 12 && gelu_value_warps(192) == 3, "warps");
  EXPECT(gelu_value_programs(12608, 132) == 132 && gelu_value_programs(33, 132) == 3, "programs");
  for (const bool eager : {true, false}) {
    gelu<__nv_bfloat16>(150, 192, 16, 2, eager);  // five tiles a block: every stage in turn
    gelu<__half>(37, 64, 5, 1, eager);
    gelu<__nv_bfloat16>(1, 128, 1, 1, eager);
    gelu<__half>(53, 1600, 13, 3, eager);         // three rounds of twelve warps, the last of one
    gelu<__nv_bfloat16>(20, 4096, 12, 1, eager);  // two stages
    gelu_grad<__nv_bfloat16>(150, 192, 16, 16, 2,
                             eager);  // five tiles a block: every stage in turn
    gelu_grad<__half>(37, 64, 5, 12, 1, eager);
    gelu_grad<__nv_bfloat16>(1, 128, 16, 1, 1, eager);
    gelu_grad<__half>(53, 448, 8, 13, 3, eager);
  }
  gelu<__half>(1000, 512, 16, 1, true);           // many tiles, for a warp that falls behind
  gelu_grad<__half>(1000, 512, 16, 16, 1, true);  // many tiles, for a warp that falls behind
  gelu_grad<__half>(37, 832, 16, 16, 1, false);   // the second block has a warp fewer
  gelu_grad<__nv_bfloat16>(19, 1536, 16, 16, 2, true);
  return failures() != 0;
}
