// A chain's norm and its gradient on the model.

#include "chain/norm.cu"
#include "chain/norm_grad.cu"
#include "normal.h"

using namespace efft_kernels::cuda;

// `far`: the rows' mean is that many times their spread. `rank_before`: of the linear before the
// norm's gradient; 0 where there is none.
template <class T>
static void norms(int64_t m, int64_t k, int rank, bool branch, int64_t programs, double far,
                  bool eager, int rank_before = 0) {
  model::settings() = {eager};
  auto z = normal<float>(m, k, 1, 1, far);
  auto y = normal<T>(m, k, 2, 0.5);
  auto weight = normal<float>(1, k, 3, 0.2, 1), bias = normal<float>(1, k, 4, 0.2);
  auto down = normal<T>(k, rank, 5);
  Stored<float> z_out(m, k), mean(m, 1), rstd(m, 1);
  Stored<T> x(m, k), p(m, rank);
  NormArguments a{};
  a.dtype = kDtype<T>;
  a.z = data(z);
  a.y = branch ? data(y) : nullptr;
  a.weight = data(weight);
  a.bias = data(bias);
  a.down = data(down);
  a.z_out = out(z_out);
  a.out = out(x);
  a.p = out(p);
  a.mean = out(mean);
  a.rstd = out(rstd);
  a.rows = m, a.width = k, a.programs = programs, a.rank = rank, a.eps = 1e-6f;
  EXPECT(launch_norm(a, nullptr) == cudaSuccess, "launch");

  Stored<float>& of = branch ? z_out : z;
  if (branch)
    expect_equal("z + y", z_out, [&](int64_t r, int64_t c) {
      return rounded<float>(z.value(r, c) + y.value(r, c));
    });
  std::vector<double> means(m), rstds(m);
  for (int64_t r = 0; r < m; ++r) {
    double sum = 0, squares = 0;
    for (int64_t c = 0; c < k; ++c) sum += of.value(r, c);
    means[r] = sum / k;
    for (int64_t c = 0; c < k; ++c) squares += std::pow(of.value(r, c) - means[r], 2);
    rstds[r] = 1 / std::sqrt(squares / k + 1e-6);
  }
  expect_near("mean", mean, 1e-6, [&](int64_t r, int64_t) { return means[r]; });
  expect_near("rstd", rstd, 1e-5, [&](int64_t r, int64_t) { return rstds[r]; });
  const auto normed = [&](int64_t r, int64_t c) {
    return (of.value(r, c) - mean.value(r, 0)) * rstd.value(r, 0) * weight.value(0, c) +
           bias.value(0, c);
  };
  expect_near("x", x, kRounding<T>, normed);
  expect_near("P", p, kRounding<T>, [&](int64_t r, int64_t i) {
    double sum = 0;
    for (int64_t c = 0; c < k; ++c) sum += x.value(r, c) * down.value(c, i);
    return sum;
  });
  for (auto* t : {&mean, &rstd, &z_out}) t->expect_margins_untouched("beside the rows");
  x.expect_margins_untouched("beside x");
  p.expect_margins_untouched("beside P");

  auto dout = normal<T>(m, k, 6), s = normal<T>(m, rank, 7);
  auto residual = normal<float>(m, k, 8);
  Stored<float> dz(m, k);
  Stored<T> dy(m, k);
  std::vector<float> partial(programs * k * kChainRank, std::nanf(""));
  NormGradArguments b{};
  b.dtype = kDtype<T>;
  b.dout = data(dout);
  b.z = data(of);
  b.mean = data(mean);
  b.rstd = data(rstd);
  b.weight = data(weight);
  b.bias = data(bias);
  b.residual = data(residual);
  b.s = data(s);
  b.dz = out(dz);
  b.dy = out(dy);
  b.partial = partial.data();
  b.rows = m, b.width = k, b.programs = programs, b.rank = rank;
  auto factor = normal<T>(k, std::max(rank_before, 1), 9);
  auto p_before = normal<T>(m, std::max(rank_before, 1), 10);
  Stored<T> s_before(m, std::max(rank_before, 1));
  std::vector<float> sum_b = partial;
  if (rank_before > 0) {
    b.b = data(factor);
    b.p = data(p_before);
    b.s_before = out(s_before);
    b.sum_b = sum_b.data();
    b.rank_before = rank_before;
  }
  EXPECT(launch_norm_grad(b, nullptr) == cudaSuccess, "launch");
  std::vector<double> sum_g(m), sum_gn(m);
  const auto n_at = [&](int64_t r, int64_t c) {
    return (of.value(r, c) - mean.value(r, 0)) * rstd.value(r, 0);
  };
  for (int64_t r = 0; r < m; ++r)
    for (int64_t c = 0; c < k; ++c) {
      const double g = dout.value(r, c) * weight.value(0, c);
      sum_g[r] += g / k;
      sum_gn[r] += g * n_at(r, c) / k;
    }
  const auto gradient = [&](int64_t r, int64_t c) {
    const double g = dout.value(r, c) * weight.value(0, c);
    return rstd.value(r, 0) * (g - sum_g[r] - n_at(r, c) * sum_gn[r]) + residual.value(r, c);
  };
  expect_near("dz", dz, 1e-6, gradient);
  expect_near("dy", dy, kRounding<T>, gradient);
  dz.expect_margins_untouched("beside dz");
  dy.expect_margins_untouched("beside dy");
  const auto added = [&](const std::vector<float>& parts, int64_t c, int r) {
    float sum = 0;
    for (int64_t i = 0; i < programs; ++i) sum += parts[(i * k + c) * kChainRank + r];
    return sum;
  };
  // x̂ is made again from the statistics: a value of it may round the other way.
  double largest = 0;
  for (int64_t c = 0; c < k; ++c)
    for (int r = 0; r < kChainRank; ++r) {
      double sum = 0, most = 0;
      for (int64_t i = 0; i < m && r < rank; ++i) {
        sum += rounded<T>(normed(i, c)) * s.value(i, r);
        most = std::max(most, std::abs(normed(i, c) * s.value(i, r)));
      }
      largest = std::max(largest, std::abs(sum));
      const double got = added(partial, c, r);
      EXPECT(std::abs(got - sum) <= 2 * kRounding<T> * most + 1e-5, "d_down (%ld, %d): %g, not %g",
             long(c), r, got, sum);
    }
  EXPECT(largest > 0, "a gradient");
  if (rank_before == 0) return;
  expect_near("S before", s_before, kRounding<T>, [&](int64_t r, int64_t i) {
    double sum = 0;
    for (int64_t c = 0; c < k; ++c) sum += dy.value(r, c) * factor.value(c, i);
    return sum;
  });
  s_before.expect_margins_untouched("beside S before");
  for (int64_t c = 0; c < k; ++c)
    for (int r = 0; r < kChainRank; ++r) {
      double sum = 0, all = 0;
      for (int64_t i = 0; i < m && r < rank_before; ++i) {
        sum += dy.value(i, c) * p_before.value(i, r);
        all += std::abs(dy.value(i, c) * p_before.value(i, r));
      }
      const double got = added(sum_b, c, r);
      EXPECT(std::abs(got - sum) <= 1e-6 * all, "d_B before (%ld, %d): %g, not %g", long(c), r, got,
             sum);
    }
}

int main() {
  for (const bool eager : {true, false}) {
    norms<__nv_bfloat16>(37, 192, 16, true, 2, 0, eager);
    norms<__half>(8, 64, 5, false, 1, 3, eager, 16);
    norms<__half>(21, 448, 13, true, 3, 0.5, eager);
    norms<__nv_bfloat16>(131, 192, 16, true, 2, 0, eager, 9);  // nine tiles a block
    norms<__nv_bfloat16>(1, 128, 1, true, 1, 100, eager);
    norms<__nv_bfloat16>(67, 64, 7, false, 2, 0, eager, 1);
  }
  norms<__nv_bfloat16>(19, 1024, 16, true, 1, 0, false);
  norms<__half>(9, 832, 16, true, 2, 0, true);
  norms<__nv_bfloat16>(21, 1280, 16, true, 2, 0, true);
  norms<__half>(27, 1216, 11, false, 1, 0.5, false);
  norms<__half>(21, 768, 16, true, 2, 0, false, 16);
  return failures() != 0;
}
