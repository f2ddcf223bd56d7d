#pragma once

#include "common/arguments.h"
#include "common/ptx_sm80.cuh"
#include "common/swizzle.h"

// Tiles of row-major matrices in shared memory: loading them, and the fragments of mma read back.
namespace efft_kernels::cuda {

// A matrix as a kernel sees it. `aligned`: every row starts at a multiple of 16 bytes.
struct Operand {
  const void* data;
  int64_t rows;
  int64_t cols;
  int64_t stride;
  bool aligned;
};

inline Operand operand(const Matrix& m) {
  const auto address = reinterpret_cast<uintptr_t>(m.data);
  return {m.data, m.rows, m.cols, m.stride, address % 16 == 0 && m.stride % 8 == 0};
}

// The tile of kRows × kCols elements at (row, col), swizzled; zeros beyond the matrix. Aligned rows
// are copied asynchronously (to be committed and awaited), others element by element.
template <class T, int kRows, int kCols, int kThreads>
__device__ __forceinline__ void load_tile(uint32_t to, const Operand& m, int64_t row, int64_t col) {
  constexpr int kChunks = kCols / 8;  // per row
  static_assert(kRows * kChunks % kThreads == 0 || kRows * kChunks < kThreads, "even shares");
  constexpr int kShare = kRows * kChunks < kThreads ? 1 : kRows * kChunks / kThreads;
  const T* const data = static_cast<const T*>(m.data);
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    const int index = i * kThreads + threadIdx.x;
    if (kRows * kChunks < kThreads && index >= kRows * kChunks) break;
    const int r = index / kChunks;
    const int chunk = index % kChunks;
    const int64_t left = m.cols - (col + chunk * 8);
    int count = left < 0 ? 0 : left < 8 ? static_cast<int>(left) : 8;
    if (row + r >= m.rows) count = 0;
    const T* const from = count > 0 ? data + (row + r) * m.stride + col + chunk * 8 : data;
    const uint32_t at = to + 2 * swizzled<kCols>(r, chunk);
    if (m.aligned) {
      copy_async(at, from, 2 * count);
    } else {
      uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (e < count)
          words[e / 2] |= static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(from)[e])
                          << (e % 2 * 16);
      }
      store_shared(at, make_uint4(words[0], words[1], words[2], words[3]));
    }
  }
}

// A [16, 16] of mma: rows along m at (row m, column k), or rows along k at (row k, column m).
template <int kCols>
__device__ __forceinline__ void load_a_from_rows(uint32_t (&a)[4], uint32_t tile, int m, int k) {
  const LaneAddress at = a_from_rows(threadIdx.x % 32);
  load_matrices(a, tile + 2 * swizzled<kCols>(m + at.row, k / 8 + at.chunk));
}

template <int kCols>
__device__ __forceinline__ void load_a_from_cols(uint32_t (&a)[4], uint32_t tile, int m, int k) {
  const LaneAddress at = a_from_cols(threadIdx.x % 32);
  load_matrices_transposed(a, tile + 2 * swizzled<kCols>(k + at.row, m / 8 + at.chunk));
}

// B [16, 16], two mma wide: rows along n, or rows along k.
template <int kCols>
__device__ __forceinline__ void load_b_from_rows(uint32_t (&b)[4], uint32_t tile, int n, int k) {
  const LaneAddress at = b_from_rows(threadIdx.x % 32);
  load_matrices(b, tile + 2 * swizzled<kCols>(n + at.row, k / 8 + at.chunk));
}

template <int kCols>
__device__ __forceinline__ void load_b_from_cols(uint32_t (&b)[4], uint32_t tile, int n, int k) {
  const LaneAddress at = b_from_cols(threadIdx.x % 32);
  load_matrices_transposed(b, tile + 2 * swizzled<kCols>(k + at.row, n / 8 + at.chunk));
}

}  // namespace efft_kernels::cuda
