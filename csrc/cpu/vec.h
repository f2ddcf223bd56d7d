// Vectors of the instruction set that the including file chose, as GCC and Clang vector types.
//
// The including file defines EFFT_ISA (a namespace), EFFT_VECTOR_BYTES and the register block
// EFFT_ROWS × EFFT_VECTORS, whose accumulators must leave registers for EFFT_VECTORS operands and
// one broadcast.
#pragma once

namespace efft_kernels::cpu::EFFT_ISA {

#define EFFT_INLINE inline __attribute__((always_inline))

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(EFFT_VECTOR_BYTES)));
  typedef T unaligned
      __attribute__((vector_size(EFFT_VECTOR_BYTES), aligned(alignof(T)), may_alias));
};
template <class T>
using Vec = typename VecOf<T>::type;

template <class T>
constexpr int64_t kLanes = EFFT_VECTOR_BYTES / sizeof(T);

// Rows and vectors of the register block of the main product.
constexpr int kRows = EFFT_ROWS;
constexpr int kVectors = EFFT_VECTORS;

template <class T>
EFFT_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecOf<T>::unaligned*>(p);
}

template <class T>
EFFT_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VecOf<T>::unaligned*>(p) = v;
}

template <class T>
EFFT_INLINE Vec<T> broadcast(T s) {
  return s - Vec<T>{};
}

template <class T>
using Index = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

// One exchange of a transposition: lanes of b with bit H clear trade places with lanes of a with
// bit H set.
template <class T, int H>
EFFT_INLINE void exchange(Vec<T>& a, Vec<T>& b) {
  constexpr int64_t lanes = kLanes<T>;
  Vec<Index<T>> low, high;
#pragma GCC unroll 16
  for (int64_t l = 0; l < lanes; ++l) {
    low[l] = (l & H) == 0 ? l : lanes + l - H;
    high[l] = (l & H) == 0 ? l + H : lanes + l;
  }
#if defined(__clang__)
  Vec<T> x, y;
#pragma GCC unroll 16
  for (int64_t l = 0; l < lanes; ++l) {
    x[l] = (l & H) == 0 ? a[l] : b[l - H];
    y[l] = (l & H) == 0 ? a[l + H] : b[l];
  }
#else
  const Vec<T> x = __builtin_shuffle(a, b, low);
  const Vec<T> y = __builtin_shuffle(a, b, high);
#endif
  a = x;
  b = y;
}

// Transposes a square of lanes × lanes in registers.
template <class T, int H = 1>
EFFT_INLINE void transpose(Vec<T> (&v)[kLanes<T>]) {
  if constexpr (H < kLanes<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) {
      if ((i & H) == 0) exchange<T, H>(v[i], v[i + H]);
    }
    transpose<T, 2 * H>(v);
  }
}

}  // namespace efft_kernels::cpu::EFFT_ISA
