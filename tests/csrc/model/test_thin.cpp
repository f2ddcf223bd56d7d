// The passes over a tall matrix and their reductions on the model.

#include <limits>

#include "matrices.h"
#include "passes/reduce.cu"
#include "passes/tall_grad.cu"
#include "passes/thin.cu"
#include "passes/thin_grad.cu"

using namespace efft_kernels::cuda;

template <class T>
constexpr Dtype kDtype = std::is_same_v<T, __half>          ? Dtype::kHalf
                         : std::is_same_v<T, __nv_bfloat16> ? Dtype::kBfloat16
                                                            : Dtype::kFloat;

// `programs`: of the pass that makes both sums; none: S alone.
template <class T>
static void passes(int64_t m, int64_t c, int rank, bool aligned, int64_t programs, bool eager) {
  model::settings() = {eager};
  const bool grad = programs > 0;
  const int rank_padded = padded_rank(rank);
  auto tall = Stored<T>::random(m, c, 1, aligned ? aligned_row(c) + 8 : c, aligned ? 0 : 3);
  auto thin_in = Stored<T>::random(c, rank_padded, 2);
  for (int64_t r = 0; r < c; ++r)
    for (int k = rank; k < rank_padded; ++k) thin_in.at(r, k) = from_float<T>(0.0f);
  auto p = Stored<T>::random(m, rank, 3);
  Stored<T> s(m, rank_padded), s_copy(m, rank);
  const auto s_value = [&](int64_t r, int64_t k) {
    double sum = 0;
    for (int64_t l = 0; l < c && k < rank; ++l) sum += tall.value(r, l) * thin_in.value(l, k);
    return rounded<T>(sum);
  };
  const auto grad_value = [&](const Stored<T>& thin) {
    return [&](int64_t r, int64_t k) {
      double sum = 0;
      for (int64_t l = 0; l < m; ++l) sum += tall.value(l, r) * thin.value(l, k);
      return sum;
    };
  };
  std::vector<float> partial(programs * c * rank_padded, std::nanf(""));
  if (grad) {
    EXPECT(launch_thin_grad({kDtype<T>, tall.matrix(), thin_in.matrix(), p.matrix(), s.matrix(),
                             rank, partial.data(), programs},
                            nullptr) == cudaSuccess,
           "launch");
    expect_equal("S", s, s_value);
    s = Stored<T>(m, rank_padded);
  }
  EXPECT(
      launch_thin({kDtype<T>, tall.matrix(), thin_in.matrix(), s.matrix(), s_copy.matrix(), rank},
                  rank_padded, nullptr) == cudaSuccess,
      "launch");
  expect_equal("S", s, s_value);
  expect_equal("S, copied", s_copy, s_value);

  // The same by a pass of its own, over three splits, with S for P; both sums in one reduction.
  const int64_t rows_per_split = round_up(ceil_div(m, 3), kPassRows);
  const int64_t splits = ceil_div(m, rows_per_split);
  std::vector<float> other(splits * c * rank_padded, std::nanf(""));
  TallGradArguments a{kDtype<T>, tall.matrix(), s.matrix(), other.data(), rows_per_split, splits};
  a.thin.cols = rank;
  EXPECT(launch_tall_grad(a, rank_padded, nullptr) == cudaSuccess, "launch");
  Stored<float> d_b(c, rank);
  Stored<T> d_down(c, rank);
  ReduceArguments first{}, second{};
  if (grad)
    first = {partial.data(), programs, c, rank_padded, d_b.matrix().data, rank, Dtype::kFloat};
  second = {other.data(), splits, c, rank_padded, d_down.matrix().data, rank, kDtype<T>};
  EXPECT(launch_reduce(first, second, nullptr) == cudaSuccess, "launch");
  if (grad) expect_equal("tall^T·P", d_b, grad_value(p));
  const auto by_s = grad_value(s);
  expect_equal("tall^T·S", d_down, [&](int64_t r, int64_t k) { return rounded<T>(by_s(r, k)); });
  d_b.expect_margins_untouched("d_b");
}

// More parts than a thread has loads in flight.
static void many_parts(int64_t parts, int64_t c, int rank) {
  const int rank_padded = padded_rank(rank);
  auto partial = Stored<float>::random(parts, c * rank_padded, 4);
  Stored<float> out(c, rank);
  const ReduceArguments r{static_cast<float*>(partial.matrix().data),
                          parts,
                          c,
                          rank_padded,
                          out.matrix().data,
                          rank,
                          Dtype::kFloat};
  EXPECT(launch_reduce({}, r, nullptr) == cudaSuccess, "launch");
  expect_equal("sum", out, [&](int64_t row, int64_t column) {
    double sum = 0;
    for (int64_t i = 0; i < parts; ++i) sum += partial.value(i, row * rank_padded + column);
    return sum;
  });
}

// What a GEMM reads as the rank's padding: an infinity in the tall matrix times it is no NaN.
static void padding_of_an_infinite_row(int64_t programs) {
  const int64_t m = 67, c = 40;
  const int rank = 5, rank_padded = padded_rank(rank);
  auto tall = Stored<__half>::random(m, c, 1), thin_in = Stored<__half>::random(c, rank_padded, 2);
  auto p = Stored<__half>::random(m, rank, 3);
  tall.at(3, 7) = from_float<__half>(std::numeric_limits<float>::infinity());
  Stored<__half> s(m, rank_padded);
  std::vector<float> partial(programs * c * rank_padded);
  const auto launched =
      programs > 0
          ? launch_thin_grad({Dtype::kHalf, tall.matrix(), thin_in.matrix(), p.matrix(), s.matrix(),
                              rank, partial.data(), programs},
                             nullptr)
          : launch_thin({Dtype::kHalf, tall.matrix(), thin_in.matrix(), s.matrix(), {}, rank},
                        rank_padded, nullptr);
  EXPECT(launched == cudaSuccess, "launch");
  for (int64_t r = 0; r < m; ++r)
    for (int k = rank; k < rank_padded; ++k) EXPECT(s.value(r, k) == 0, "S[%d, %d]", int(r), k);
}

int main() {
  for (const int64_t programs : {0, 1}) padding_of_an_infinite_row(programs);
  many_parts(261, 5, 13);
  for (const bool eager : {true, false}) {
    for (const bool aligned : {true, false}) {
      passes<__nv_bfloat16>(67, 71, 7, aligned, 1, eager);
      passes<__half>(331, 250, 16, aligned, 2, eager);  // row blocks in turn
      passes<__half>(150, 133, 29, aligned, 0, eager);
      passes<__nv_bfloat16>(129, 97, 33, aligned, 0, eager);
      passes<__half>(65, 300, 128, aligned, 0, eager);
    }
    // Whole 16 bytes everywhere, with ragged tiles.
    passes<__nv_bfloat16>(331, 200, 8, true, 3, eager);
    passes<__half>(200, 264, 16, true, 1, eager);
    passes<__nv_bfloat16>(131, 328, 32, true, 0, eager);
    passes<__half>(67, 136, 64, true, 0, eager);
    passes<__nv_bfloat16>(193, 72, 128, true, 0, eager);
    passes<__half>(1, 1, 1, false, 1, eager);
  }
  return failures() != 0;
}
