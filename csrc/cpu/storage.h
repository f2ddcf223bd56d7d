// Reading and writing rows of any storage dtype as rows of the compute type T.
#pragma once

#include "isa.h"
#include "vec.h"

namespace efft_kernels::cpu::EFFT_ISA {

EFFT_INLINE float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

// To nearest even; a NaN stays a NaN.
EFFT_INLINE uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

EFFT_INLINE int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : (dtype == DType::kFloat32 ? 4 : 2);
}

// As many numbers of 16 bits as a vector has of 32.
typedef uint16_t Halves __attribute__((vector_size(EFFT_VECTOR_BYTES / 2)));
typedef uint16_t UnalignedHalves
    __attribute__((vector_size(EFFT_VECTOR_BYTES / 2), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(EFFT_VECTOR_BYTES)));

EFFT_INLINE Words load_halves(const uint16_t* from) {
  return __builtin_convertvector(*reinterpret_cast<const UnalignedHalves*>(from), Words);
}

// to_bf16 of a vector.
EFFT_INLINE void store_bf16(uint16_t* to, Vec<float> value) {
  const Words bits = (Words)value;
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words kept = (Words)(value == value);
  const Words result = (rounded & kept) | (0x7fc0u & ~kept);
  *reinterpret_cast<UnalignedHalves*>(to) = __builtin_convertvector(result, Halves);
}

template <class T, class S>
EFFT_INLINE T widen(S value) {
  if constexpr (std::is_same_v<S, uint16_t>) {
    return static_cast<T>(from_bf16(value));
  } else {
    return static_cast<T>(value);
  }
}

template <class T, class S>
void read_typed(const S* source, int64_t stride, T* row, int64_t count) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) row[i] = widen<T>(source[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) row[i] = widen<T>(source[i * stride]);
  }
}

template <class T>
constexpr DType kStored = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;

// row[0 .. count) = matrix[i, j .. j + count)
template <class T>
void read_row(const Matrix& matrix, int64_t i, int64_t j, T* row, int64_t count) {
  const int64_t offset = i * matrix.row_stride + j * matrix.column_stride;
  const int64_t stride = matrix.column_stride;
  switch (matrix.dtype) {
    case DType::kFloat32:
      return read_typed(static_cast<const float*>(matrix.data) + offset, stride, row, count);
    case DType::kFloat64:
      return read_typed(static_cast<const double*>(matrix.data) + offset, stride, row, count);
    case DType::kBFloat16:
      return read_typed(static_cast<const uint16_t*>(matrix.data) + offset, stride, row, count);
  }
}

// matrix[i, j .. j + count) = row[0 .. count), unit column stride
template <class T>
void write_row(const Matrix& matrix, int64_t i, int64_t j, const T* row, int64_t count) {
  const int64_t offset = i * matrix.row_stride + j;
  switch (matrix.dtype) {
    case DType::kFloat32: {
      float* out = static_cast<float*>(matrix.data) + offset;
      for (int64_t k = 0; k < count; ++k) out[k] = static_cast<float>(row[k]);
      return;
    }
    case DType::kFloat64: {
      double* out = static_cast<double*>(matrix.data) + offset;
      for (int64_t k = 0; k < count; ++k) out[k] = static_cast<double>(row[k]);
      return;
    }
    case DType::kBFloat16: {
      uint16_t* out = static_cast<uint16_t*>(matrix.data) + offset;
      int64_t k = 0;
      if constexpr (std::is_same_v<T, float>) {
        for (; k + kLanes<T> <= count; k += kLanes<T>) store_bf16(out + k, load(row + k));
      }
      for (; k < count; ++k) out[k] = to_bf16(static_cast<float>(row[k]));
      return;
    }
  }
}

// A block of rows in T: the matrix itself where it is stored so, else a copy in `scratch`.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
};

template <class T>
bool is_direct(const Matrix& matrix) {
  return matrix.dtype == kStored<T> && matrix.column_stride == 1;
}

template <class T>
Rows<T> rows_of(const Matrix& matrix, int64_t first, int64_t rows, int64_t columns, T* scratch) {
  if (is_direct<T>(matrix)) {
    return {static_cast<const T*>(matrix.data) + first * matrix.row_stride, matrix.row_stride};
  }
  for (int64_t i = 0; i < rows; ++i) {
    read_row(matrix, first + i, 0, scratch + i * columns, columns);
  }
  return {scratch, columns};
}

// The same into rows of `width` >= columns, zero beyond `columns`.
template <class T>
void read_padded(const Matrix& matrix, int64_t first, int64_t rows, int64_t columns, T* out,
                 int64_t width) {
  for (int64_t i = 0; i < rows; ++i) {
    read_row(matrix, first + i, 0, out + i * width, columns);
    for (int64_t j = columns; j < width; ++j) out[i * width + j] = T(0);
  }
}

// The matrix in T with rows of `width` >= columns: itself where it is stored so, else in `scratch`.
template <class T>
T* padded(const Matrix& matrix, int64_t rows, int64_t columns, int64_t width, T* scratch) {
  if (is_direct<T>(matrix) && columns == width && matrix.row_stride == width) {
    return static_cast<T*>(matrix.data);
  }
  read_padded(matrix, 0, rows, columns, scratch, width);
  return scratch;
}

// Rows first .. first + rows of the matrix from rows of `width` >= columns.
template <class T>
void write_padded(const Matrix& matrix, int64_t first, int64_t rows, int64_t columns, const T* from,
                  int64_t width) {
  for (int64_t i = 0; i < rows; ++i) write_row(matrix, first + i, 0, from + i * width, columns);
}

}  // namespace efft_kernels::cpu::EFFT_ISA
