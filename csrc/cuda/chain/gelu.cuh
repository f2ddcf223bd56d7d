#pragma once

#include <cmath>

#include "common/ptx_sm80.cuh"

namespace efft_kernels::cuda {

// gelu(h) and its derivative, both within 5e-7, erf being Abramowitz and Stegun's 7.1.26: its
// exponential is the derivative's.
struct Gelu {
  float value, slope;

  explicit __device__ __forceinline__ Gelu(float h) {
    const float bell = exp2_approx(-0.7213475204444817f * (h * h));  // e^(-h²/2)
    const float t = reciprocal_approx(fmaf(0.23164189f, fabsf(h), 1.0f));
    float series = fmaf(t, 0.5307027145f, -0.7265760135f);
    series = fmaf(t, series, 0.7107068705f);
    series = fmaf(t, series, -0.142248368f);
    series = fmaf(t, series, 0.127414796f);
    const float tail = t * series * bell;
    const float cdf = h < 0.0f ? tail : 1.0f - tail;
    value = h * cdf;
    slope = fmaf(h, 0.3989422804014327f * bell, cdf);
  }
};

}  // namespace efft_kernels::cuda
