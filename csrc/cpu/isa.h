// The CPU kernels' interface: plain pointers in, one implementation per instruction set behind it.
#pragma once

#include <cstdint>

#include "codes.h"

namespace efft_kernels::cpu {

enum class DType : int32_t { kFloat32, kFloat64, kBFloat16 };

// A strided matrix in memory; strides count elements.
struct Matrix {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t row_stride = 0;
  int64_t column_stride = 0;

  explicit operator bool() const { return data != nullptr; }
};

// Factors: the fold needs them as they are.
struct Factors {
  Matrix down;  // [K, Ra]
  Matrix core;  // [G·Ra, Rb]; null is the identity
  Matrix up;    // [(1 or G)·N/G, Rb]
  int64_t G = 1, Ra = 1, Rb = 1;
  bool up_shared = false;  // one slice of `up` serves all G
};

// y = x·W^T + bias + P·B^T, P = x·down, B = stack_g up[g]·core[g]^T.
//
//   kSplit   [x|P]·[W|B]^T: r more steps of the inner loop for every row of x
//   kMerged  W + B·down^T, formed while W is packed: r steps for every row of W, for each tile's
//   rows
struct Forward {
  int64_t M = 0, N = 0, K = 0;
  Matrix x;       // [M, K]
  Matrix weight;  // [N, K]
  Matrix bias;    // [N], null where there is none
  Factors factors;
  Matrix y;  // [M, N], contiguous
  Matrix p;  // [M, Ra], contiguous; null: P is not wanted
  Strategy strategy = kMerged;
  int64_t slots = 1;    // parts of the rows for the thin products, each with sums of its own
  int64_t threads = 1;  // that take the tiles of the main product
};

// A LayerNorm's statistics and affine map; weight and bias are null where it has none.
struct Norm {
  Matrix mean;    // [M, 1]
  Matrix rstd;    // [M, 1]
  Matrix weight;  // [1, K]
  Matrix bias;    // [1, K]
};

// dX = dY·W + S·down^T, S = dY·B;  d_down = x^T·S;  d_B = dY^T·P and from it d_core, d_up.
// An output that is null is not wanted.
struct Backward {
  int64_t M = 0, N = 0, K = 0;
  Matrix dy;  // [M, N]
  Matrix x;   // [M, K], read for d_down; its producer's input unless made_by is kPlain
  MadeBy made_by = kPlain;
  const int64_t* rows = nullptr;  // [M], those of x's source that x's are made from, -1 for zeros
  Norm norm;                      // where made_by is kLayerNorm
  Matrix weight;                  // [N, K], read for dx
  Matrix p;                       // [M, Ra], read for d_core and d_up
  Factors factors;
  Matrix dx;      // [M, K], contiguous
  Matrix d_down;  // [K, Ra], contiguous
  Matrix d_core;  // [G·Ra, Rb], contiguous
  Matrix d_up;    // like up, contiguous
  Strategy strategy = kMerged;
  int64_t slots = 1;
  int64_t threads = 1;
};

// y = x·W^T + bias + x·down[t]·b[t]^T for every item of `rows` rows, t = task_of_item[item].
struct MixedBatch {
  int64_t items = 0, rows = 0, N = 0, K = 0, tasks = 0, Ra = 0;
  Matrix x;                     // [items·rows, K]
  Matrix weight;                // [N, K]
  Matrix bias;                  // [N], null where there is none
  Matrix down;                  // [tasks·K, Ra]
  Matrix b;                     // [tasks·N, Ra], folded
  const int64_t* task_of_item;  // [items], each in [0, tasks)
  Matrix y;                     // [items·rows, N], contiguous
  int64_t slots = 1;
  int64_t threads = 1;
};

struct Kernels {
  const char* name;
  bool (*supported)();
  // `wide` accumulates in float64 (for float64 operands), else in float32.
  void (*forward)(const Forward&, bool wide);
  void (*backward)(const Backward&, bool wide);
  void (*mixed_batch_forward)(const MixedBatch&, bool wide);
};

extern const Kernels kAvx512Bf16;
extern const Kernels kAvx512;
extern const Kernels kAvx2;
extern const Kernels kBaseline;

// The best of the four that this processor runs; EFFT_KERNELS_CPU_ISA=
// avx512_bf16|avx512|avx2|baseline picks another (for tests). Throws std::runtime_error for a name
// that is unknown or does not run here.
const Kernels& kernels();

// Runs f(context, begin, end) over [0, count) in torch's thread pool.
void parallel(int64_t count, void (*f)(void* context, int64_t begin, int64_t end), void* context);

// Memory that the calling thread keeps from call to call, at least `bytes` long, 64-byte aligned.
void* workspace(int64_t bytes);

}  // namespace efft_kernels::cpu
