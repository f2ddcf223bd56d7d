#pragma once

#include <cstdint>
#include <string>

// The parameters of a two-dimensional tensor map of 16-bit elements, as plain numbers: what
// TMA needs to know of a row-major matrix, and its limits.
namespace efft_kernels::cuda {

struct TensorMapParams {
  uint64_t address = 0;
  uint64_t cols = 0;  // elements per row
  uint64_t rows = 0;
  uint64_t row_bytes = 0;  // from one row to the next
  uint32_t box_cols = 0;
  uint32_t box_rows = 0;
  uint32_t swizzle_bytes = 128;  // of SWIZZLE_128B, or 32
};

constexpr uint64_t kElementBytes = 2;

// A box arrives whole: what lies beyond the tensor is written as zeros and counted as well.
constexpr uint32_t box_bytes(const TensorMapParams& p) {
  return static_cast<uint32_t>(p.box_cols * p.box_rows * kElementBytes);
}

// Why TMA cannot take the map; empty if it can. Limits of cuTensorMapEncodeTiled. Rows that overlap
// or repeat (expanded tensors) are legal there, but refused here.
inline std::string tensor_map_error(const TensorMapParams& p) {
  const auto got = [](const char* what, uint64_t value) {
    return std::string(what) + ", got " + std::to_string(value);
  };
  if (p.address == 0 || p.address % 16) return got("address must be 16-byte aligned", p.address);
  if (p.cols == 0 || p.cols > (uint64_t{1} << 32)) return got("cols must be in [1, 2^32]", p.cols);
  if (p.rows == 0 || p.rows > (uint64_t{1} << 32)) return got("rows must be in [1, 2^32]", p.rows);
  if (p.row_bytes % 16) return got("row_bytes must be a multiple of 16", p.row_bytes);
  if (p.row_bytes >= (uint64_t{1} << 40)) return got("row_bytes must be below 2^40", p.row_bytes);
  if (p.row_bytes < p.cols * kElementBytes)
    return got("row_bytes must hold a row's elements", p.row_bytes);
  if (p.box_rows == 0 || p.box_rows > 256) return got("box_rows must be in [1, 256]", p.box_rows);
  if (p.box_cols == 0 || p.box_cols > 256) return got("box_cols must be in [1, 256]", p.box_cols);
  if (p.box_cols * kElementBytes % 16)
    return got("a box row must be a multiple of 16 bytes, in elements of 2", p.box_cols);
  if (p.swizzle_bytes != 128 && p.swizzle_bytes != 32)
    return got("swizzle_bytes must be 128 or 32", p.swizzle_bytes);
  if (p.box_cols * kElementBytes > p.swizzle_bytes)
    return got("a box row must hold at most swizzle_bytes, in elements of 2", p.box_cols);
  return {};
}

}  // namespace efft_kernels::cuda
