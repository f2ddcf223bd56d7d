#pragma once

#include "common/arguments.h"
#include "common/convert.cuh"

namespace efft_kernels::cuda {

struct Bias {
  const void* data;  // [C] of T or float, or null
  bool is_float;
  bool pairs;  // the address is aligned to two elements
};

inline Bias bias_of(const GemmArguments& g) {
  const bool is_float = g.bias_dtype == Dtype::kFloat;
  return {g.bias, is_float, reinterpret_cast<uintptr_t>(g.bias) % (is_float ? 8 : 4) == 0};
}

// The bias of columns `col` and `col` + 1 of `c`; zero beyond them and where there is none.
template <class T, class Index>
__device__ __forceinline__ void load_bias(float (&pair)[2], const Bias& bias, Index col, Index c) {
  pair[0] = pair[1] = 0.0f;
  if (bias.data == nullptr) return;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    if (col + e < c)
      pair[e] = bias.is_float ? static_cast<const float*>(bias.data)[col + e]
                              : to_float(static_cast<const T*>(bias.data)[col + e]);
  }
}

// The bias of columns `col` + 8·i and their right neighbours, for even `col` and `c`, as it lies in
// memory: nothing waits for the loads before `value` is called.
template <class T, int kCount>
struct BiasPairs {
  uint32_t bits[kCount][2];  // two floats, or two of T in the first
  bool is_float;

  __device__ __forceinline__ void load(const Bias& bias, int col, int c) {
    is_float = bias.is_float;
#pragma unroll
    for (int i = 0; i < kCount; ++i) bits[i][0] = bits[i][1] = 0;
    if (bias.data == nullptr) return;
    if (!bias.pairs) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        float pair[2];
        load_bias<T>(pair, bias, col + 8 * i, c);
        bits[i][0] =
            is_float ? reinterpret_cast<const uint32_t&>(pair[0]) : pack<T>(pair[0], pair[1]);
        bits[i][1] = reinterpret_cast<const uint32_t&>(pair[1]);
      }
    } else if (is_float) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (col + 8 * i >= c) continue;
        const uint2 pair =
            *reinterpret_cast<const uint2*>(static_cast<const float*>(bias.data) + col + 8 * i);
        bits[i][0] = pair.x;
        bits[i][1] = pair.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (col + 8 * i >= c) continue;
        bits[i][0] =
            *reinterpret_cast<const uint32_t*>(static_cast<const T*>(bias.data) + col + 8 * i);
      }
    }
  }

  __device__ __forceinline__ void value(float (&pair)[2], int i) const {
    unpack<T>(pair, bits[i][0]);
    if (is_float) {
      pair[0] = reinterpret_cast<const float&>(bits[i][0]);
      pair[1] = reinterpret_cast<const float&>(bits[i][1]);
    }
  }
};

}  // namespace efft_kernels::cuda
