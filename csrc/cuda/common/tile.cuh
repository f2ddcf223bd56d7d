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

  // Aligned rows of whole 16 bytes.
  bool whole() const { return aligned && cols % 8 == 0; }
};

inline Operand operand(const Matrix& m) {
  const auto address = reinterpret_cast<uintptr_t>(m.data);
  return {m.data, m.rows, m.cols, m.stride, address % 16 == 0 && m.stride % 8 == 0};
}

// `count` elements, at most 8, into 16 bytes of shared memory; zeros for the others.
template <class T>
__device__ __forceinline__ void copy_elements(uint32_t to, const T* from, int count) {
  uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    if (e < count)
      words[e / 2] |= static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(from)[e])
                      << (e % 2 * 16);
  }
  store_shared(to, make_uint4(words[0], words[1], words[2], words[3]));
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
      copy_elements(at, from, count);
    }
  }
}

// The compiler keeps the value, instead of working it out again where it is used.
__device__ __forceinline__ uint32_t kept(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

enum class Walk { kRight, kDown };

// Neighbouring tiles of a matrix, loaded one after the other as load_tile does. A thread copies the
// same place of each, so that a step is an addition: with its indices worked out for every copy, a
// pass over a tall matrix takes longer than its memory. `kWhole`: all rows are aligned, and of a
// multiple of 8 elements.
template <class T, int kRows, int kCols, int kThreads, Walk kWalk, bool kWhole>
class TileWalk {
 public:
  __device__ __forceinline__ TileWalk(const Operand& m, int64_t row, int64_t col)
      : stride_(m.stride), aligned_(m.aligned) {
    const int r = threadIdx.x / kChunks;
    const int chunk = threadIdx.x % kChunks;
    from_ = static_cast<const T*>(m.data) + (row + r) * stride_ + col + chunk * 8;
    rows_left_ = up_to_int32(m.rows - row - r);
    cols_left_ = up_to_int32(m.cols - col - chunk * 8);
    at_ = kept(2 * swizzled<kCols>(r, chunk));
  }

  __device__ __forceinline__ void load_next(uint32_t to) {
    if (kRowsApart > kRows && threadIdx.x >= kRows * kChunks) return;
    const int count = cols_left_ < 0 ? 0 : cols_left_ < 8 ? cols_left_ : 8;
    if constexpr (kWhole) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i)
        copy_async_or_zero(place(to, i), row(i), count_in(i, count) == 0);
    } else if (aligned_) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) copy_async(place(to, i), row(i), 2 * count_in(i, count));
    } else {
#pragma unroll 1
      for (int i = 0; i < kCopies; ++i) copy_elements(place(to, i), row(i), count_in(i, count));
    }
    if constexpr (kWalk == Walk::kDown) {
      from_ += kRows * stride_;
      rows_left_ -= kRows;
    } else {
      from_ += kCols;
      cols_left_ -= kCols;
    }
  }

 private:
  static constexpr int kChunks = kCols / 8;  // per row
  static constexpr int kRowsApart =
      kThreads / kChunks;  // from one of a thread's copies to the next
  static constexpr int kCopies = kRowsApart > kRows ? 1 : kRows / kRowsApart;
  static_assert(kThreads % kChunks == 0 && (kRowsApart > kRows || kRows % kRowsApart == 0),
                "even shares");
  static_assert(kRowsApart % 8 == 0, "the same swizzle for all copies of a thread");

  static __device__ __forceinline__ int32_t up_to_int32(int64_t left) {
    return static_cast<int32_t>(left < INT32_MAX ? left : INT32_MAX);
  }
  __device__ __forceinline__ uint32_t place(uint32_t to, int i) const {
    return to + at_ + i * kRowsApart * kCols * 2;
  }
  // Not read beyond the matrix.
  __device__ __forceinline__ const T* row(int i) const { return from_ + i * kRowsApart * stride_; }
  __device__ __forceinline__ int count_in(int i, int count) const {
    return i * kRowsApart < rows_left_ ? count : 0;
  }

  const T* from_;  // this thread's first elements of the next tile
  int64_t stride_;
  int32_t rows_left_, cols_left_;  // from there to the matrix's end
  uint32_t at_;                    // where they go, in bytes from the tile's start
  bool aligned_;
};

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
