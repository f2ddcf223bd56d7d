#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>

#include "passes/sizes.h"

// The operators' argument checks. Each returns what is wrong, naming the argument, what it must be
// (in symbols and numbers) and what came; empty if nothing is.
namespace efft_kernels::cuda {

// A shape or strides. Without memory of its own: a call makes a dozen. Of a tensor with more dims
// the others are left out; no operand has that many.
class Extents {
 public:
  Extents() = default;
  Extents(std::initializer_list<int64_t> values) : Extents(values.begin(), values.size()) {}
  Extents(const int64_t* values, size_t size) : size_(std::min(size, kMost)) {
    std::copy_n(values, size_, values_);
  }

  size_t size() const { return size_; }
  int64_t operator[](size_t i) const { return values_[i]; }
  bool operator==(const Extents& other) const {
    return std::equal(values_, values_ + size_, other.values_, other.values_ + other.size_);
  }

 private:
  static constexpr size_t kMost = 6;
  int64_t values_[kMost] = {};
  size_t size_ = 0;
};

struct TensorInfo {
  const char* name = "";
  bool present = false;
  std::string_view dtype = {};  // "float16", "bfloat16", "float32", ...
  std::string device = {};
  Extents shape = {};
  Extents stride = {};
};

inline std::string shown(const Extents& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

inline std::string must_be(const TensorInfo& t, const std::string& expected, std::string_view got) {
  return std::string(t.name) + " must be " + expected + ", got " + std::string(got);
}

inline bool is_half(const TensorInfo& t) { return t.dtype == "float16" || t.dtype == "bfloat16"; }

// A tensor the kernels read row by row.
inline std::string check_rows(const TensorInfo& t) {
  if (t.shape.size() == 2 && t.shape[1] > 1 && t.stride[1] != 1)
    return must_be(t, "contiguous along its last dim", "strides " + shown(t.stride));
  return {};
}

struct Problem {
  TensorInfo rows;  // x in the forward, dy in the backward
  TensorInfo x;     // the backward's, may be absent
  TensorInfo p;     // the backward's, may be absent
  TensorInfo weight, bias, down, core, up;
};

inline std::string check_dtypes(const Problem& q) {
  if (!is_half(q.rows)) return must_be(q.rows, "float16 or bfloat16", q.rows.dtype);
  for (const TensorInfo* t : {&q.x, &q.p}) {
    if (t->present && t->dtype != q.rows.dtype)
      return must_be(*t, std::string(q.rows.name) + "'s dtype " + std::string(q.rows.dtype),
                     t->dtype);
  }
  for (const TensorInfo* t : {&q.weight, &q.bias, &q.down, &q.core, &q.up}) {
    if (t->present && t->dtype != "float32" && !is_half(*t))
      return must_be(*t, "float32, float16 or bfloat16", t->dtype);
  }
  for (const TensorInfo* t : {&q.core, &q.up}) {
    if (t->present && t->dtype != q.down.dtype)
      return must_be(*t, "down's dtype " + std::string(q.down.dtype), t->dtype);
  }
  return {};
}

inline std::string check_devices(const Problem& q) {
  for (const TensorInfo* t : {&q.x, &q.p, &q.weight, &q.bias, &q.down, &q.core, &q.up}) {
    if (t->present && t->device != q.rows.device)
      return must_be(*t, std::string("on ") + q.rows.name + "'s device " + q.rows.device,
                     t->device);
  }
  return {};
}

inline std::string check_shapes(const Problem& q, bool backward) {
  if (q.weight.shape.size() != 2 || q.weight.shape[0] < 1 || q.weight.shape[1] < 1)
    return must_be(q.weight, "[N >= 1, K >= 1]", shown(q.weight.shape));
  const int64_t n = q.weight.shape[0];
  const int64_t k = q.weight.shape[1];
  const auto sized = [](const char* symbol, int64_t value) {
    return std::string(symbol) + "=" + std::to_string(value);
  };
  const int64_t columns = backward ? n : k;
  if (q.rows.shape.size() != 2 || q.rows.shape[1] != columns)
    return must_be(q.rows, "[M, " + sized(backward ? "N" : "K", columns) + "]",
                   shown(q.rows.shape));
  const int64_t m = q.rows.shape[0];
  if (q.bias.present && q.bias.shape != Extents{n})
    return must_be(q.bias, "[" + sized("N", n) + "]", shown(q.bias.shape));
  if (q.down.shape.size() != 2 || q.down.shape[0] != k || q.down.shape[1] < 1 ||
      q.down.shape[1] > kMaxRank)
    return must_be(q.down, "[" + sized("K", k) + ", 1 <= Ra <= " + std::to_string(kMaxRank) + "]",
                   shown(q.down.shape));
  const int64_t ra = q.down.shape[1];
  if (q.up.shape.size() != 3) return must_be(q.up, "[1 or G, N/G, Rb]", shown(q.up.shape));
  int64_t slices = q.up.shape[0];
  int64_t rb = ra;
  if (q.core.present) {
    if (q.core.shape.size() != 3 || q.core.shape[1] != ra)
      return must_be(q.core, "[G, " + sized("Ra", ra) + ", Rb]", shown(q.core.shape));
    slices = q.core.shape[0];
    rb = q.core.shape[2];
  }
  if (slices < 1 || n % slices)
    return must_be(q.core.present ? q.core : q.up, "of G slices with G dividing " + sized("N", n),
                   shown(q.core.present ? q.core.shape : q.up.shape));
  const bool shared = q.core.present && q.up.shape[0] == 1;
  if ((q.up.shape[0] != slices && !shared) || q.up.shape[1] != n / slices || q.up.shape[2] != rb)
    return must_be(q.up,
                   "[" + std::string(q.core.present ? "1 or " : "") + sized("G", slices) + ", " +
                       sized("N/G", n / slices) + ", " + sized("Rb", rb) + "]",
                   shown(q.up.shape));
  if (q.x.present && q.x.shape != Extents{m, k})
    return must_be(q.x, "[" + sized("M", m) + ", " + sized("K", k) + "]", shown(q.x.shape));
  if (q.p.present && q.p.shape != Extents{m, ra})
    return must_be(q.p, "[" + sized("M", m) + ", " + sized("Ra", ra) + "]", shown(q.p.shape));
  return {};
}

inline std::string check(const Problem& q, bool backward) {
  std::string error = check_dtypes(q);
  if (error.empty()) error = check_devices(q);
  if (error.empty()) error = check_shapes(q, backward);
  for (const TensorInfo* t : {&q.rows, &q.weight, &q.x, &q.p})
    if (error.empty() && t->present) error = check_rows(*t);
  return error;
}

}  // namespace efft_kernels::cuda
