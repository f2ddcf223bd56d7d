#pragma once

#include "common/swizzle.h"
#include "gemm/tma.h"
#include "gpu.h"

// sm_90's clusters, barriers and TMA on the model. A CUtensorMap holds its TensorMapParams.
namespace efft_kernels::cuda {

inline bool elect_one() { return model::lane() == 0; }

inline int cluster_rank() { return static_cast<int>(&model::block() - model::cluster().data()); }

inline void cluster_sync() { model::sync_cluster(); }

inline model::Barrier& barrier_at(uint32_t address) {
  model::check(address % 8 == 0, "a barrier at an unaligned address");
  return model::block().barriers[address];
}

inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  model::smem_at(barrier, 8);
  barrier_at(barrier).arrivals = barrier_at(barrier).pending = static_cast<int>(arrivals);
}

inline void barrier_init_fence() {}

inline void barrier_arrive(uint32_t barrier) {
  --barrier_at(barrier).pending;
  barrier_at(barrier).complete();
}

inline void barrier_arrive_at(uint32_t barrier, int rank) {
  model::in_block(model::cluster().at(rank), [=] {
    model::check(barrier_at(barrier).arrivals > 0, "an arrival at a barrier not initialised");
    model::check(model::block().running(), "an arrival in a block that has ended");
    barrier_arrive(barrier);
  });
}

inline void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  barrier_at(barrier).bytes += bytes;
  barrier_arrive(barrier);
}

inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  model::check(barrier_at(barrier).arrivals > 0, "a wait on a barrier never initialised");
  model::wait_until([=] { return (barrier_at(barrier).phase & 1) != parity; });
}

inline void prefetch_map(const CUtensorMap*) {}

inline TensorMapParams params_of(const CUtensorMap* map) {
  TensorMapParams params;
  std::memcpy(static_cast<void*>(&params), map, sizeof params);
  model::check(tensor_map_error(params).empty(), "an invalid tensor map");
  return params;
}

inline void load_box(uint32_t to, const CUtensorMap* map, int32_t row, int32_t col,
                     uint32_t barrier) {
  const TensorMapParams p = params_of(map);
  const uint32_t line = p.swizzle_bytes;
  model::check(to % (8 * line) == 0, "a box must start at a swizzle period");
  model::check(p.box_cols * 2 == line, "rows of the swizzle's width");
  const auto load = [=] {
    for (uint32_t r = 0; r < p.box_rows; ++r) {
      for (uint32_t c = 0; c < p.box_cols; ++c) {
        const int64_t at_row = int64_t{row} + r, at_col = int64_t{col} + c;
        uint16_t value = 0;
        if (at_row >= 0 && at_row < static_cast<int64_t>(p.rows) && at_col >= 0 &&
            at_col < static_cast<int64_t>(p.cols))
          std::memcpy(&value,
                      reinterpret_cast<const uint8_t*>(p.address) +
                          static_cast<uint64_t>(at_row) * p.row_bytes + at_col * 2,
                      2);
        const uint32_t at = to + r * line + c * 2;
        std::memcpy(model::smem_at(line == 32 ? swizzle_32b(at) : swizzle_128b(at), 2), &value, 2);
      }
    }
    barrier_at(barrier).bytes -= box_bytes(p);
    barrier_at(barrier).complete();
  };
  if (model::block().eager) {
    load();
  } else {
    model::block().loads.push_back(load);
  }
}

inline void load_box_multicast(uint32_t to, const CUtensorMap* map, int32_t row, int32_t col,
                               uint32_t barrier, uint16_t blocks) {
  for (size_t rank = 0; rank < model::cluster().size(); ++rank)
    if (blocks >> rank & 1)
      model::in_block(model::cluster()[rank], [&] { load_box(to, map, row, col, barrier); });
  model::check(blocks >> model::cluster().size() == 0, "a block beyond the cluster");
}

inline void store_matrices(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  model::check(address % 16 == 0, "stmatrix at an unaligned address");
  auto& warp = model::current_warp();
  const uint32_t values[4] = {r0, r1, r2, r3};
  warp.address[model::lane()] = address;
  model::sync_warp();
  for (int matrix = 0; matrix < 4; ++matrix) {
    const uint32_t to = warp.address[matrix * 8 + model::lane() / 4] + model::lane() % 4 * 4;
    std::memcpy(model::smem_at(to, 4), &values[matrix], 4);
  }
  model::sync_warp();
}

inline uint4 load_shared(uint32_t address) {
  uint4 value;
  std::memcpy(&value, model::smem_at(address, 16), 16);
  return value;
}

template <int kRegisters>
void give_registers_back() {}

template <int kRegisters>
void take_registers() {}

}  // namespace efft_kernels::cuda
