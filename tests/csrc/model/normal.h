#pragma once

#include "common/arguments.h"
#include "matrices.h"

// Normal operands of a chain's kernels, and results that rounding may part from the expected ones.
namespace efft_kernels::cuda {

template <class T>
constexpr Dtype kDtype = std::is_same_v<T, __half> ? Dtype::kHalf : Dtype::kBfloat16;
template <class T>
constexpr double kRounding = std::is_same_v<T, __half> ? 1.0 / 2048 : 1.0 / 256;

template <class T>
static Stored<T> normal(int64_t rows, int64_t cols, unsigned seed, double scale = 1,
                        double shift = 0) {
  Stored<T> m(rows, cols);
  std::mt19937 generator(seed);
  std::normal_distribution<double> draw(shift, scale);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c)
      m.at(r, c) = from_float<T>(static_cast<float>(draw(generator)));
  return m;
}

template <class T>
static const T* data(Stored<T>& m) {
  return static_cast<const T*>(m.matrix().data);
}
template <class T>
static T* out(Stored<T>& m) {
  return static_cast<T*>(m.matrix().data);
}

// Within `rounding` of the largest value beside it, and some more for float32's sums.
template <class T, class Expected>
static void expect_near(const char* what, const Stored<T>& got, double rounding,
                        Expected expected) {
  double largest = 0;
  for (int64_t r = 0; r < got.rows; ++r)
    for (int64_t c = 0; c < got.cols; ++c) largest = std::max(largest, std::abs(expected(r, c)));
  for (int64_t r = 0; r < got.rows; ++r)
    for (int64_t c = 0; c < got.cols; ++c) {
      const double e = expected(r, c);
      const double most = rounding * std::abs(e) + 2e-6 * largest;
      EXPECT(std::abs(got.value(r, c) - e) <= most, "%s (%ld, %ld): %.9g, not %.9g", what, long(r),
             long(c), got.value(r, c), e);
    }
}

}  // namespace efft_kernels::cuda
