#pragma once

#include <cstdint>

#include "common/ptx_sm80.cuh"

// A loop over tiles in a ring of stages at `smem`: while one tile is used, the next kStages - 1 are
// prefetched by asynchronous copies. `load(t, stage)` starts the copies of tile t to the address
// `stage`.
//
//   prefetch<Config>(smem, tiles, load);
//   for (int t = 0; t < tiles; ++t) {
//     const uint32_t stage = next_stage<Config>(smem, t, tiles, load);
namespace efft_kernels::cuda {

template <class Config>
__device__ __forceinline__ uint32_t stage_of(uint32_t smem, int t) {
  return smem + t % Config::kStages * Config::kStageElements * 2;
}

template <class Config, class Load>
__device__ __forceinline__ void prefetch(uint32_t smem, int tiles, const Load& load) {
#pragma unroll
  for (int t = 0; t < Config::kStages - 1; ++t) {
    if (t < tiles) load(t, stage_of<Config>(smem, t));
    commit_copies();
  }
}

// Where tile t has arrived. The prefetch goes on into the stage that the previous step read, whose
// readers have passed the barrier.
template <class Config, class Load>
__device__ __forceinline__ uint32_t next_stage(uint32_t smem, int t, int tiles, const Load& load) {
  wait_copies<Config::kStages - 2>();
  __syncthreads();
  const int next = t + Config::kStages - 1;
  if (next < tiles) load(next, stage_of<Config>(smem, next));
  commit_copies();
  return stage_of<Config>(smem, t);
}

}  // namespace efft_kernels::cuda
