#pragma once

#include <cmath>

#include "common/convert.cuh"
#include "gpu.h"

// sm_80's instructions on the model, by the PTX manual's fragment layouts.
namespace efft_kernels::cuda {

inline void copy_async(uint32_t to, const void* from, int bytes) {
  model::check(to % 16 == 0, "cp.async to an unaligned address");
  model::check(bytes == 0 || reinterpret_cast<uintptr_t>(from) % 16 == 0,
               "cp.async from an unaligned address");
  const auto copy = [to, from, bytes] {
    uint8_t* const at = model::smem_at(to, 16);
    std::memcpy(at, from, bytes);
    std::memset(at + bytes, 0, 16 - bytes);
  };
  if (model::block().eager) {
    copy();
  } else {
    model::current_thread().open_copies.push_back(copy);
  }
}

inline void copy_async_or_zero(uint32_t to, const void* from, bool zero) {
  copy_async(to, from, zero ? 0 : 16);
}

inline void commit_copies() {
  auto& thread = model::current_thread();
  thread.copies.push_back(std::move(thread.open_copies));
  thread.open_copies.clear();
}

template <int kPending>
void wait_copies() {
  model::complete(model::current_thread().copies, kPending);
}

inline void store_shared(uint32_t to, uint4 value) {
  std::memcpy(model::smem_at(to, 16), &value, 16);
}

inline void read_matrices(uint32_t (&r)[4], uint32_t address, bool transposed) {
  model::check(address % 16 == 0, "ldmatrix at an unaligned address");
  auto& warp = model::current_warp();
  warp.address[model::lane()] = address;
  model::sync_warp();
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint32_t both = 0;
    for (uint32_t e = 0; e < 2; ++e) {
      const uint32_t row = model::lane() / 4, col = model::lane() % 4 * 2 + e;
      const uint32_t from = warp.address[matrix * 8 + (transposed ? col : row)];
      both |= static_cast<uint32_t>(model::element_at(from + 2 * (transposed ? row : col)))
              << (16 * e);
    }
    r[matrix] = both;
  }
  model::sync_warp();
}

inline void load_matrices(uint32_t (&r)[4], uint32_t address) { read_matrices(r, address, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  read_matrices(r, address, true);
}

template <class T>
float half_of(uint32_t both, int e) {
  const auto bits = static_cast<uint16_t>(both >> (16 * e));
  T value;
  std::memcpy(static_cast<void*>(&value), &bits, 2);
  return to_float(value);
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  auto& warp = model::current_warp();
  const int lane = model::lane();
  // a's fragments, then b's, pass through the warp's shared record.
  float a_row[2][16];
  warp.data[lane] = {a[0], a[1], a[2], a[3]};
  model::sync_warp();
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < 16; ++k)
      a_row[half][k] = half_of<T>(warp.data[lane / 4 * 4 + k % 8 / 2][k / 8 * 2 + half], k % 2);
  model::sync_warp();
  warp.data[lane] = {b0, b1, 0, 0};
  model::sync_warp();
  for (int e = 0; e < 4; ++e) {
    const int n = lane % 4 * 2 + e % 2;
    for (int k = 0; k < 16; ++k)
      d[e] += a_row[e / 2][k] * half_of<T>(warp.data[n * 4 + k % 8 / 2][k / 8], k % 2);
  }
  model::sync_warp();
}

template <class T>
void mma_k8(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  auto& warp = model::current_warp();
  const int lane = model::lane();
  warp.data[lane] = {a[0], a[1], b, 0};
  model::sync_warp();
  for (int e = 0; e < 4; ++e) {
    const int n = lane % 4 * 2 + e % 2;
    for (int k = 0; k < 8; ++k)
      d[e] += half_of<T>(warp.data[lane / 4 * 4 + k / 2][e / 2], k % 2) *
              half_of<T>(warp.data[n * 4 + k / 2][2], k % 2);
  }
  model::sync_warp();
}

inline uint32_t transposed(uint32_t both) {
  auto& warp = model::current_warp();
  warp.data[model::lane()][0] = both;
  model::sync_warp();
  uint32_t result = 0;
  for (int e = 0; e < 2; ++e) {
    const int row = model::lane() % 4 * 2 + e, col = model::lane() / 4;
    const uint32_t from = warp.data[row * 4 + col / 2][0];
    result |= (from >> (16 * (col % 2)) & 0xffff) << (16 * e);
  }
  model::sync_warp();
  return result;
}

inline float exp2_approx(float x) { return std::exp2(x); }
inline float reciprocal_approx(float x) { return 1.0f / x; }

inline float shuffle_xor(float value, int mask) {
  auto& warp = model::current_warp();
  std::memcpy(&warp.data[model::lane()][0], &value, 4);
  model::sync_warp();
  float other;
  std::memcpy(&other, &warp.data[model::lane() ^ mask][0], 4);
  model::sync_warp();
  return other;
}

}  // namespace efft_kernels::cuda
