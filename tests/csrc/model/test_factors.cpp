// The fold, the merge and the unfold on the model: shared and per-slice up, with and without core,
// factors whose columns follow each other and not.

#include "factors/fold.cu"
#include "factors/merge.cu"
#include "factors/unfold.cu"
#include "matrices.h"

using namespace efft_kernels::cuda;

static Strided strided(Stored<float>& m, std::initializer_list<int64_t> stride) {
  Strided s{m.matrix().data, Dtype::kFloat, {0, 0, 0}};
  int i = 0;
  for (const int64_t one : stride) s.stride[i++] = one;
  return s;
}

// step: from one column of a factor to the next.
static void factors(int64_t k, int64_t slices, int64_t slice_n, int ra, int rb, bool has_core,
                    bool shared, int step = 1) {
  model::settings() = {true};
  const int rank_padded = ra <= 16 ? 16 : 32;
  const int64_t n = slices * slice_n;
  auto down = Stored<float>::random(k, ra * step, 1, 0, 0, 3);
  auto core = Stored<float>::random(slices * ra, rb * step, 2, 0, 0, 3);
  auto up = Stored<float>::random(shared ? slice_n : n, rb * step, 3, 0, 0, 3);
  const auto down_value = [&](int64_t row, int64_t a) { return down.value(row, a * step); };
  const auto core_value = [&](int64_t row, int64_t b) { return core.value(row, b * step); };
  const auto up_value = [&](int64_t row, int64_t b) {
    return up.value(shared ? row % slice_n : row, b * step);
  };
  const auto b_value = [&](int64_t row, int64_t a) {
    if (a >= ra) return 0.0;
    if (!has_core) return up_value(row, a);
    double sum = 0;
    for (int b = 0; b < rb; ++b) sum += up_value(row, b) * core_value(row / slice_n * ra + a, b);
    return sum;
  };
  Stored<__half> b(n, rank_padded), down_rows(k, rank_padded);
  Stored<float> b_wide(n, rank_padded), down_columns(rank_padded, k, k + 5);
  FoldArguments f{};
  f.down = strided(down, {ra * step, step});
  if (has_core) f.core = strided(core, {int64_t{ra} * rb * step, rb * step, step});
  f.up = strided(up, {shared ? 0 : slice_n * rb * step, rb * step, step});
  f.k = k;
  f.slices = slices;
  f.slice_n = slice_n;
  f.ra = ra;
  f.rb = rb;
  f.rank_padded = rank_padded;
  f.out_dtype = Dtype::kHalf;
  f.b = b.matrix().data;
  f.down_out = down_rows.matrix().data;
  f.down_stride = rank_padded;
  EXPECT(launch_fold(f, nullptr) == cudaSuccess, "launch");
  expect_equal("B", b, [&](int64_t r, int64_t a) { return rounded<__half>(b_value(r, a)); });
  expect_equal("down", down_rows,
               [&](int64_t r, int64_t a) { return a < ra ? down_value(r, a) : 0.0; });
  f.out_dtype = Dtype::kFloat;
  f.b = b_wide.matrix().data;
  f.down_out = down_columns.matrix().data;
  f.down_stride = k + 5;
  f.transpose_down = true;
  EXPECT(launch_fold(f, nullptr) == cudaSuccess, "launch");
  expect_equal("B in float32", b_wide, b_value);
  expect_equal("down^T", down_columns,
               [&](int64_t a, int64_t c) { return a < ra ? down_value(c, a) : 0.0; });
  down_columns.expect_margins_untouched("down^T");

  auto weight = Stored<float>::random(n, k, 4, k + 3, 0, 9);
  Stored<__nv_bfloat16> merged(n, k);
  MergeArguments m{};
  m.weight = strided(weight, {k + 3, 1});
  m.b = static_cast<float*>(b_wide.matrix().data);
  m.down = static_cast<float*>(down_columns.matrix().data);
  m.down_stride = k + 5;
  m.rank_padded = rank_padded;
  m.n = n;
  m.k = k;
  m.out = merged.matrix().data;
  m.out_dtype = Dtype::kBfloat16;
  EXPECT(launch_merge(m, nullptr) == cudaSuccess, "launch");
  expect_equal("W + B·down^T", merged, [&](int64_t r, int64_t c) {
    double sum = weight.value(r, c);
    for (int a = 0; a < ra; ++a) sum += b_value(r, a) * down_value(c, a);
    return rounded<__nv_bfloat16>(sum);
  });
  m.b = nullptr;
  EXPECT(launch_merge(m, nullptr) == cudaSuccess, "launch");
  expect_equal("W", merged, [&](int64_t r, int64_t c) { return weight.value(r, c); });

  if (!has_core) return;  // d_up is d_B
  auto d_b = Stored<float>::random(n, ra, 5, 0, 0, 3);
  Stored<float> d_core(slices * ra, rb), d_up(shared ? slice_n : n, rb);
  UnfoldArguments u{};
  u.d_b = static_cast<float*>(d_b.matrix().data);
  u.core = f.core;
  u.up = f.up;
  u.slices = slices;
  u.slice_n = slice_n;
  u.ra = ra;
  u.rb = rb;
  u.shared = shared;
  u.dtype = Dtype::kFloat;
  u.d_core = d_core.matrix().data;
  u.d_up = d_up.matrix().data;
  EXPECT(launch_unfold(u, nullptr) == cudaSuccess, "launch");
  expect_equal("d_core", d_core, [&](int64_t r, int64_t column) {
    double sum = 0;
    for (int64_t i = 0; i < slice_n; ++i) {
      const int64_t row = r / ra * slice_n + i;
      sum += d_b.value(row, r % ra) * up_value(row, column);
    }
    return sum;
  });
  expect_equal("d_up", d_up, [&](int64_t r, int64_t column) {
    double sum = 0;
    for (int64_t g = 0; g < slices; ++g) {
      if (!shared && g != r / slice_n) continue;
      const int64_t row = shared ? g * slice_n + r : r;
      for (int a = 0; a < ra; ++a) sum += d_b.value(row, a) * core_value(g * ra + a, column);
    }
    return sum;
  });
}

int main() {
  factors(71, 3, 29, 7, 5, true, true);
  factors(83, 3, 37, 5, 11, true, false);
  factors(97, 2, 23, 3, 3, false, false);
  factors(37, 1, 131, 17, 33, true, true);
  // Rows by fours; 1031 and 600 rows are two batches of a thread, of eight and of four.
  factors(17, 2, 150, 20, 12, true, true);
  factors(17, 2, 150, 20, 12, true, true, 2);
  factors(17, 1, 1031, 8, 4, true, false);
  factors(17, 1, 600, 3, 4, true, false);
  return failures() != 0;
}
