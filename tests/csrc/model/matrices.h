#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "../expect.h"
#include "common/arguments.h"
#include "common/convert.cuh"

// Matrices of small integers, whose products are exact, in exactly as much memory as they need and
// with rows of any length; what lies between rows must stay as it is.
namespace efft_kernels::cuda {

template <class T>
struct Stored {
  int64_t rows, cols, stride, shift;
  std::vector<T> memory;

  // `shift`: elements from a 16-byte boundary to the first one.
  Stored(int64_t rows_, int64_t cols_, int64_t stride_ = 0, int64_t shift_ = 0)
      : rows(rows_), cols(cols_), stride(stride_ ? stride_ : cols_), shift(shift_) {
    memory.assign(static_cast<size_t>(shift + (rows ? (rows - 1) * stride + cols : 0)) + 1,
                  from_float<T>(std::nanf("")));
  }

  static Stored random(int64_t rows, int64_t cols, unsigned seed, int64_t stride = 0,
                       int64_t shift = 0, int limit = 1) {
    Stored m(rows, cols, stride, shift);
    std::mt19937 generator(seed);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) {
        const int value = static_cast<int>(generator() % (2 * limit + 1)) - limit;
        m.at(r, c) = from_float<T>(static_cast<float>(value));
      }
    return m;
  }

  T& at(int64_t r, int64_t c) { return memory.at(shift + r * stride + c); }
  double value(int64_t r, int64_t c) const { return to_float(memory.at(shift + r * stride + c)); }
  Matrix matrix() { return {memory.data() + shift, rows, cols, stride}; }

  // What a store beyond the rows' columns would have changed.
  void expect_margins_untouched(const char* what) const {
    for (int64_t i = 0; i < static_cast<int64_t>(memory.size()); ++i) {
      const int64_t at = i - shift;
      const bool inside = at >= 0 && at / stride < rows && at % stride < cols;
      if (!inside) EXPECT(std::isnan(to_float(memory[i])), "%s: element %ld", what, long(at));
    }
  }
};

template <class T>
double rounded(double value) {
  return to_float(from_float<T>(static_cast<float>(value)));
}

template <class T, class Expected>
void expect_equal(const char* what, const Stored<T>& got, Expected expected) {
  for (int64_t r = 0; r < got.rows; ++r)
    for (int64_t c = 0; c < got.cols; ++c)
      EXPECT(got.value(r, c) == expected(r, c), "%s (%ld, %ld): %g, not %g", what, long(r), long(c),
             got.value(r, c), expected(r, c));
}

inline bool bit(unsigned set, int i) { return set >> i & 1; }

}  // namespace efft_kernels::cuda
