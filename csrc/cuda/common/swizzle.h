#pragma once

#include <cstdint>

#include "common/host_device.h"

// Where elements lie in shared memory, and which of them each lane of a warp holds. Everything that
// the kernels index by is here, so that the unit tests can walk it without a GPU.
namespace efft_kernels::cuda {

// A tile of 16-bit elements in rows of `kCols` (16, 32 or a multiple of 64), in chunks of 8
// elements (16 bytes) whose position in the row is XORed with bits of the row number: the 8 chunks
// that one ldmatrix phase reads, one column of 8 successive rows, lie in all 32 banks.
template <int kCols>
EFFT_HOST_DEVICE constexpr int swizzled(int row, int chunk) {
  static_assert(kCols == 16 || kCols == 32 || kCols % 64 == 0, "rows of 32, 64 or n·128 bytes");
  constexpr int kShift = kCols == 16 ? 2 : kCols == 32 ? 1 : 0;
  constexpr int kMask = kCols == 16 ? 1 : kCols == 32 ? 3 : 7;
  return row * kCols + ((chunk ^ ((row >> kShift) & kMask)) << 3);
}

// Which row and which chunk (from the fragment's own origin) a lane names to ldmatrix.x4.
struct LaneAddress {
  int row;
  int chunk;
};

// A of m16n8k16 from rows along m: four 8×8 matrices (m, k) = (0,0) (8,0) (0,8) (8,8).
EFFT_HOST_DEVICE constexpr LaneAddress a_from_rows(int lane) { return {lane % 16, lane / 16}; }

// A from rows along k (read with .trans).
EFFT_HOST_DEVICE constexpr LaneAddress a_from_cols(int lane) {
  return {lane / 16 * 8 + lane % 8, lane / 8 % 2};
}

// B of two m16n8k16 side by side from rows along n: (n, k) = (0,0) (0,8) (8,0) (8,8).
EFFT_HOST_DEVICE constexpr LaneAddress b_from_rows(int lane) {
  return {lane / 16 * 8 + lane % 8, lane / 8 % 2};
}

// B from rows along k (read with .trans).
EFFT_HOST_DEVICE constexpr LaneAddress b_from_cols(int lane) { return {lane % 16, lane / 16}; }

// Where the four accumulators of an m16n8 block lie: element e of `lane`. wgmma's m64nN
// accumulators are the same within a warp's 16 rows, four per 8 columns.
EFFT_HOST_DEVICE constexpr int accumulator_row(int lane, int e) { return lane / 4 + e / 2 * 8; }
EFFT_HOST_DEVICE constexpr int accumulator_col(int lane, int e) { return lane % 4 * 2 + e % 2; }

// stmatrix.x4 of two neighbouring accumulator blocks (16 rows, 16 columns): the row and the chunk
// that a lane names.
EFFT_HOST_DEVICE constexpr LaneAddress stored_blocks(int lane) { return {lane % 16, lane / 16}; }

// SWIZZLE_128B of TMA and of wgmma: address bits 4 to 6 XORed with bits 7 to 9. In a
// tile that starts at a multiple of 1024 bytes with rows of 128 bytes it is swizzled<64>.
EFFT_HOST_DEVICE constexpr uint32_t swizzle_128b(uint32_t address) {
  return address ^ ((address >> 7 & 7) << 4);
}

// SWIZZLE_32B: bit 4 XORed with bit 7, for rows of 32 bytes from a multiple of 256 on.
EFFT_HOST_DEVICE constexpr uint32_t swizzle_32b(uint32_t address) {
  return address ^ ((address >> 7 & 1) << 4);
}

// wgmma's descriptor of a SWIZZLE_128B operand in shared memory. With a row of 128 bytes called a
// line and 8 lines a slab, `slab_bytes` lead from slab to slab: along m or n where lines run along
// k (K-major), along k where they run along n (MN-major). `chunk_bytes` lead from 64 columns to the
// next 64 (MN-major only).
EFFT_HOST_DEVICE constexpr uint64_t wgmma_descriptor(uint32_t address, uint32_t chunk_bytes,
                                                     uint32_t slab_bytes) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) |
         static_cast<uint64_t>(chunk_bytes >> 4) << 16 |
         static_cast<uint64_t>(slab_bytes >> 4) << 32 | static_cast<uint64_t>(1) << 62;
}

// The same for 16 columns of a SWIZZLE_32B operand whose lines of 32 bytes run along n (MN-major).
EFFT_HOST_DEVICE constexpr uint64_t wgmma_descriptor_32b(uint32_t address) {
  constexpr uint32_t kSlabBytes = 8 * 32;
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(1) << 16 |
         static_cast<uint64_t>(kSlabBytes >> 4) << 32 | static_cast<uint64_t>(3) << 62;
}

// What is added to a descriptor to move its address.
EFFT_HOST_DEVICE constexpr uint64_t descriptor_step(uint32_t bytes) { return bytes >> 4; }

}  // namespace efft_kernels::cuda
