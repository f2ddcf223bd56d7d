// Everything of the standard library that the kernels use, included before an instruction set is
// chosen: its inline functions must stay code that every processor runs.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
