#pragma once

#include <array>

#include "common/convert.cuh"
#include "common/swizzle.h"
#include "gpu.h"

// The part of CuTe's interface to wgmma that the kernels use, on the model: each thread forms its
// own accumulators from the operands in shared memory, when the group is waited for.
namespace cute {

inline void warpgroup_fence_operand(float&) {}
inline void warpgroup_fence_operand(uint32_t&) {}
inline void warpgroup_arrive() {}

inline void warpgroup_commit_batch() {
  auto& thread = model::current_thread();
  thread.products.push_back(std::move(thread.open_products));
  thread.open_products.clear();
}

template <int kPending>
void warpgroup_wait() {
  model::complete(model::current_thread().products, kPending);
  model::sync_warp();  // .sync.aligned: no thread of a warp goes on before all have waited
}

namespace SM90::GMMA {

enum class Major { K = 0, MN = 1 };
enum class ScaleOut { Zero = 0, One = 1 };

// One element of an operand behind a descriptor: SWIZZLE_128B, or MN-major SWIZZLE_32B.
inline uint16_t operand_element(uint64_t d, int mn, int k, Major major) {
  const auto address = static_cast<uint32_t>(d & 0x3fff) << 4;
  const auto chunk = static_cast<uint32_t>(d >> 16 & 0x3fff) << 4;
  const auto slab = static_cast<uint32_t>(d >> 32 & 0x3fff) << 4;
  if (d >> 62 == 3) {
    model::check(major == Major::MN, "SWIZZLE_32B, MN-major");
    return model::element_at(efft_kernels::cuda::swizzle_32b(
        address + mn / 16 * chunk + mn % 16 * 2 + k / 8 * slab + k % 8 * 32));
  }
  model::check(d >> 62 == 1, "SWIZZLE_128B or SWIZZLE_32B");
  const uint32_t at = major == Major::K
                          ? address + mn / 8 * slab + mn % 8 * 128 + k * 2
                          : address + mn / 64 * chunk + mn % 64 * 2 + k / 8 * slab + k % 8 * 128;
  return model::element_at(efft_kernels::cuda::swizzle_128b(at));
}

template <class T>
float as_float(uint16_t bits) {
  T value;
  std::memcpy(static_cast<void*>(&value), &bits, 2);
  return efft_kernels::cuda::to_float(value);
}

inline void start(std::function<void()> product) {
  if (model::block().eager) {
    product();
  } else {
    model::current_thread().open_products.push_back(std::move(product));
  }
}

template <class T, int kN, Major kMajor>
struct Shared {
  template <class... Rest>
  static void fma(uint64_t a, uint64_t b, Rest&&... rest) {
    std::array<float*, kN / 2> d;
    ScaleOut scale = ScaleOut::One;
    collect(d, scale, 0, rest...);
    const int thread = model::current_thread().index % 128;
    start([=] {
      const int lane = thread % 32;
      for (int i = 0; i < kN / 2; ++i) {
        const int row = thread / 32 * 16 + efft_kernels::cuda::accumulator_row(lane, i % 4);
        const int col = i / 4 * 8 + efft_kernels::cuda::accumulator_col(lane, i % 4);
        float sum = scale == ScaleOut::Zero ? 0.0f : *d[i];
        for (int k = 0; k < 16; ++k)
          sum += as_float<T>(operand_element(a, row, k, Major::K)) *
                 as_float<T>(operand_element(b, col, k, kMajor));
        *d[i] = sum;
      }
    });
  }

  static void collect(std::array<float*, kN / 2>&, ScaleOut& scale, int, ScaleOut last) {
    scale = last;
  }
  template <class... Rest>
  static void collect(std::array<float*, kN / 2>& d, ScaleOut& scale, int at, float& first,
                      Rest&... rest) {
    d.at(at) = &first;
    collect(d, scale, at + 1, rest...);
  }
};

template <class T, int kN, Major kMajor>
struct Registers {
  template <class... Rest>
  static void fma(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b, Rest&&... rest) {
    std::array<float*, kN / 2> d;
    ScaleOut scale = ScaleOut::One;
    Shared<T, kN, kMajor>::collect(d, scale, 0, rest...);
    // The warp's rows of a, each lane's registers: rows lane/4 + 8(i%2), columns 8(i/2) + lane%4·2.
    auto& warp = model::current_warp();
    const int lane = model::lane();
    warp.data[lane] = {a0, a1, a2, a3};
    model::sync_warp();
    std::array<std::array<float, 16>, 2> a_row;
    for (int half = 0; half < 2; ++half)
      for (int k = 0; k < 16; ++k)
        a_row[half][k] = as_float<T>(static_cast<uint16_t>(
            warp.data[lane / 4 * 4 + k % 8 / 2][k / 8 * 2 + half] >> (k % 2 * 16)));
    model::sync_warp();
    start([=] {
      for (int i = 0; i < kN / 2; ++i) {
        const int col = i / 4 * 8 + efft_kernels::cuda::accumulator_col(lane, i % 4);
        float sum = scale == ScaleOut::Zero ? 0.0f : *d[i];
        for (int k = 0; k < 16; ++k)
          sum += a_row[i % 4 / 2][k] * as_float<T>(operand_element(b, col, k, kMajor));
        *d[i] = sum;
      }
    });
  }
};

#define MODEL_WGMMA(T, NAME, N)                                  \
  template <Major kA, Major kB>                                  \
  using MMA_64x##N##x16_F32##NAME##NAME##_SS = Shared<T, N, kB>; \
  template <Major kA, Major kB>                                  \
  using MMA_64x##N##x16_F32##NAME##NAME##_RS = Registers<T, N, kB>;

MODEL_WGMMA(__nv_bfloat16, BF16, 16)
MODEL_WGMMA(__nv_bfloat16, BF16, 128)
MODEL_WGMMA(__nv_bfloat16, BF16, 144)
MODEL_WGMMA(__nv_bfloat16, BF16, 192)
MODEL_WGMMA(__nv_bfloat16, BF16, 208)
MODEL_WGMMA(__half, F16, 16)
MODEL_WGMMA(__half, F16, 128)
MODEL_WGMMA(__half, F16, 144)
MODEL_WGMMA(__half, F16, 192)
MODEL_WGMMA(__half, F16, 208)

}  // namespace SM90::GMMA
}  // namespace cute
