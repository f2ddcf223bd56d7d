// Both thin gradients of a linear with a merged weight, in one pass, on the model.

#include "chain/pair_grad.cu"
#include "normal.h"

using namespace efft_kernels::cuda;

// `huge`: an infinity in x, which must stay in its own row of d_down and in its own rank of d_B.
template <class T>
static void pair(int64_t m, int64_t k, int rank, int64_t programs, bool eager, bool huge = false) {
  model::settings() = {eager};
  auto x = Stored<T>::random(m, k, 1), dy = Stored<T>::random(m, k, 2);
  auto down = Stored<T>::random(k, rank, 3), b = Stored<T>::random(k, rank, 4);
  if (huge) {
    x.at(m - 1, 3) = from_float<T>(INFINITY);
    for (int r = 0; r < rank; ++r) down.at(3, r) = from_float<T>(1.0f);
    for (int64_t c = 0; c < k; ++c) dy.at(m - 1, c) = from_float<T>(1.0f);
    for (int r = 0; r < rank; ++r)
      for (int64_t c = 0; c < k; ++c) b.at(c, r) = from_float<T>(r == 0 ? 1.0f : 0.0f);
  }
  std::vector<float> d_down(programs * k * kChainRank, std::nanf(""));
  std::vector<float> d_b = d_down;
  PairGradArguments a{};
  a.dtype = kDtype<T>;
  a.x = data(x);
  a.dy = data(dy);
  a.down = data(down);
  a.b = data(b);
  a.d_down = d_down.data();
  a.d_b = d_b.data();
  a.rows = m, a.width = k, a.programs = programs, a.rank = rank;
  EXPECT(launch_pair_grad(a, nullptr) == cudaSuccess, "launch");

  const auto product = [&](const Stored<T>& tall, const Stored<T>& thin, int64_t row, int r) {
    double sum = 0;
    for (int64_t c = 0; c < k; ++c) sum += tall.value(row, c) * thin.value(c, r);
    return rounded<T>(sum);
  };
  const auto expect = [&](const char* what, const std::vector<float>& partial,
                          const Stored<T>& tall, const Stored<T>& other, const Stored<T>& thin) {
    std::vector<std::vector<double>> projected(m, std::vector<double>(rank));
    for (int64_t i = 0; i < m; ++i)
      for (int r = 0; r < rank; ++r) projected[i][r] = product(other, thin, i, r);
    for (int64_t c = 0; c < k; ++c)
      for (int r = 0; r < (huge ? rank : kChainRank); ++r) {
        double got = 0, expected = 0;
        for (int64_t i = 0; i < programs; ++i) got += partial[(i * k + c) * kChainRank + r];
        for (int64_t i = 0; i < m && r < rank; ++i) expected += tall.value(i, c) * projected[i][r];
        const bool same = std::isnan(expected) ? std::isnan(got) : got == expected;
        EXPECT(same, "%s (%ld, %d): %g, not %g", what, long(c), r, got, expected);
      }
  };
  expect("d_down", d_down, x, dy, b);
  expect("d_B", d_b, dy, x, down);
}

int main() {
  EXPECT(chain_programs(12608, kPairRows, 768, 132) == 132, "programs");
  EXPECT(chain_programs(12608, kPairRows, 384, 132) == 264, "programs");
  EXPECT(chain_programs(33, kPairRows, 768, 132) == 3, "programs");
  for (const bool eager : {true, false}) {
    pair<__nv_bfloat16>(130, 192, 16, 2, eager);  // five tiles a block: every stage in turn
    pair<__half>(16, 64, 5, 1, eager);
    pair<__half>(53, 448, 13, 3, eager);
    pair<__nv_bfloat16>(1, 128, 1, 1, eager);
    pair<__nv_bfloat16>(67, 64, 7, 2, eager, true);
  }
  pair<__nv_bfloat16>(37, 768, 16, 1, false);
  pair<__half>(35, 832, 16, 2, true);
  pair<__nv_bfloat16>(19, 1024, 16, 1, false);
  return failures() != 0;
}
