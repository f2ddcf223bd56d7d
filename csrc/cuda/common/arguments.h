#pragma once

#include <cstdint>

// What the launchers take: raw pointers, shapes and strides.
namespace efft_kernels::cuda {

enum class Dtype { kHalf, kBfloat16, kFloat };

// A row-major matrix: unit stride along its columns.
struct Matrix {
  void* data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;  // elements from one row to the next
};

struct Device {
  int multiprocessors = 0;
  int capability = 0;  // 10 · major + minor of the compute capability
};

// How the operand w [I, C] lies in memory: rows of I elements (the forward, W itself) or rows of C
// elements (dX). wgmma calls them K-major and MN-major.
enum class WLayout { kRowsOfI, kRowsOfC };

// out = a·w + bias + P·thin_out^T, with P = a·thin_in computed in the same loop if `compute_p`. In
// the forward I is K and C is N, in dX the other way round.
struct GemmArguments {
  Dtype dtype;       // of all matrices
  WLayout layout;    // of w, thin_in and thin_out
  Matrix a;          // [M, I]
  Matrix w;          // [C, I] in rows of I, or [I, C] in rows of C
  Matrix thin_in;    // [R, I] or [I, R]; for `compute_p` only
  Matrix thin_out;   // [C, R] or [R, C]; zero beyond the rank
  Matrix p;          // [M, rank]: read, or written if `compute_p` (null: not kept)
  Matrix out;        // [M, C]
  const void* bias;  // [C] or null
  Dtype bias_dtype;
  int rank_padded;  // R
  bool compute_p;
};

// The kernel of a GEMM: sm_90a with `block` columns per tile, or the general one with tiles of
// `block` × `block`.
struct GemmChoice {
  bool sm90;
  int block;
};

// S = tall·thin_in.
struct ThinArguments {
  Dtype dtype;
  Matrix tall;     // [M, C]
  Matrix thin_in;  // [C, R], zero beyond the rank
  Matrix s;        // [M, R or rank]: out
  Matrix s_copy;   // [M, rank]: out as well, or null
  int rank;        // columns of s beyond it are stored as zeros
};

// The same, and in the same pass the partial sums of tall^T·P. R is kOnePassRank.
struct ThinGradArguments {
  Dtype dtype;
  Matrix tall;     // [M, C]
  Matrix thin_in;  // [C, R], zero beyond the rank
  Matrix p;        // [M, rank]
  Matrix s;        // [M, R]: out
  int rank;        // columns of s beyond it are stored as zeros
  float* partial;  // [programs, C, R]: out
  int64_t programs;
};

// Partial sums [splits, C, R] of tall^T·thin.
struct TallGradArguments {
  Dtype dtype;
  Matrix tall;     // [M, C]
  Matrix thin;     // [M, rank]
  float* partial;  // [splits, C, R]: out
  int64_t rows_per_split;
  int64_t splits;
};

// z' = z + y, x̂ = (z' - mean)·rstd·weight + bias and P = x̂·down. Everything is contiguous and
// starts at a multiple of 16 bytes; `dtype` is that of y, down, out and p.
struct NormArguments {
  Dtype dtype;
  const float* z;       // [M, K]
  const void* y;        // [M, K], or null: z' is z
  const float* weight;  // [K]
  const float* bias;    // [K]
  const void* down;     // [K, rank]
  float* z_out;         // [M, K], if there is y
  void* out;            // [M, K]
  void* p;              // [M, rank]
  float* mean;          // [M]
  float* rstd;          // [M]
  int64_t rows, width, programs;
  int rank;
  float eps;
};

// The gradient dz of the norm's z, with `residual` added, once more in `dtype` as dy, and the
// partial sums of x̂^T·S; for the linear whose output's gradient dy is, S = dy·B and the partial
// sums of dy^T·P. Everything is contiguous and starts at a multiple of 16 bytes.
struct NormGradArguments {
  Dtype dtype;            // of dout, s, dy, b, p and s_before
  const void* dout;       // [M, K]
  const float* z;         // [M, K]
  const float* mean;      // [M]
  const float* rstd;      // [M]
  const float* weight;    // [K]
  const float* bias;      // [K]
  const float* residual;  // [M, K]
  const void* s;          // [M, rank]
  float* dz;              // [M, K]
  void* dy;               // [M, K]
  float* partial;         // [programs, K, R]
  int64_t rows, width, programs;
  int rank;
  const void* b;   // [K, rank_before], or null: no such linear
  const void* p;   // [M, rank_before]
  void* s_before;  // [M, rank_before]
  float* sum_b;    // [programs, K, R]
  int rank_before;
};

// a = gelu(h) and P = a·down. Everything is contiguous and starts at a multiple of 16 bytes.
struct GeluArguments {
  Dtype dtype;       // of everything
  const void* h;     // [M, C]
  const void* down;  // [C, rank]
  void* a;           // [M, C]
  void* p;           // [M, rank]
  int64_t rows, width, programs;
  int rank;
};

// dh = da·gelu'(h), in da's place, and partial sums of S = dh·B, dh^T·P and gelu(h)^T·s. Everything
// is contiguous and starts at a multiple of 16 bytes.
struct GeluGradArguments {
  Dtype dtype;      // of all but the sums
  void* da;         // [M, C]: in, and out as dh
  const void* h;    // [M, C]
  const void* s;    // [M, rank_after]
  const void* b;    // [C, rank_before]
  const void* p;    // [M, rank_before]
  float* sum_s;     // [gelu_parts(C), M, R]
  float* sum_b;     // [programs, C, R]
  float* sum_down;  // [programs, C, R]
  int64_t rows, width, programs;
  int rank_before, rank_after;
};

// Partial sums of x^T·S and dY^T·P, with S = dY·B and P = x·down. Everything is contiguous and
// starts at a multiple of 16 bytes; x and dY are of one width.
struct PairGradArguments {
  Dtype dtype;       // of all but the sums
  const void* x;     // [M, K]
  const void* dy;    // [M, K]
  const void* down;  // [K, rank]
  const void* b;     // [K, rank]
  float* d_down;     // [programs, K, R]
  float* d_b;        // [programs, K, R]
  int64_t rows, width, programs;
  int rank;
};

// The second stage: out[c, r] = sum of partial[part, c, r], in order, rounded once.
struct ReduceArguments {
  const float* partial;  // [parts, C, R]
  int64_t parts;
  int64_t c;
  int rank_padded;
  void* out;  // [C, rank]
  int rank;
  Dtype out_dtype;
};

// A tensor of up to three dims with any strides.
struct Strided {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat;
  int64_t stride[3] = {0, 0, 0};
};

// B[n, a] = sum_b up[g, n, b]·core[g, a, b], and `down`, cast and padded to R columns. Either
// output may be null.
struct FoldArguments {
  Strided down;  // [K, Ra]
  Strided core;  // [G, Ra, Rb] or null
  Strided up;    // [G, N/G, Rb], stride 0 along a shared first dim
  int64_t k, slices, slice_n;
  int ra, rb, rank_padded;
  Dtype out_dtype;
  void* b;              // [N, R]: out
  void* down_out;       // [K, R], or [R, K] if `transpose_down`: out
  int64_t down_stride;  // elements from one row of down_out to the next
  bool transpose_down;
};

// W + B·down^T, or W alone where b is null, rounded once.
struct MergeArguments {
  Strided weight;     // [N, K], unit stride along K
  const float* b;     // [N, R] or null
  const float* down;  // [R, K]
  int64_t down_stride;
  int rank_padded;
  int64_t n, k;
  void* out;  // [N, K]
  Dtype out_dtype;
};

// d_core[g, a, b] = sum_n d_B[n, a]·up[g, n, b] and d_up[g, n, b] = sum_a d_B[n, a]·core[g, a, b],
// the latter summed over g where `up` is shared. Either output may be null.
struct UnfoldArguments {
  const float* d_b;  // [N, Ra]
  Strided core;      // [G, Ra, Rb]
  Strided up;        // [G, N/G, Rb], stride 0 along a shared first dim
  int64_t slices, slice_n;
  int ra, rb;
  bool shared;
  Dtype dtype;   // of core and up, and of their gradients
  void* d_core;  // [G, Ra, Rb]: out
  void* d_up;    // [1 or G, N/G, Rb]: out
};

}  // namespace efft_kernels::cuda
