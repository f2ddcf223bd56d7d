// The two passes: out = a·w + bias + (a·thin_in)·thin_out^T over blocks of rows that stay in cache.
//
// Forward and dX are the same function (B is the fold, stack_g up[g]·core[g]^T, [N, Ra]):
//
//   forward   y  = x·W^T + bias + P·B^T,   P = x·down    a=x,  w=W^T, thin_in=down, thin_out=B
//   backward  dX = dY·W + S·down^T,        S = dY·B      a=dY, w=W,   thin_in=B,    thin_out=down
//
// w is packed once per call into panels of kPanel columns, in steps of kDepth rows. While a row
// block of `a` is in cache, the thin products that need it are made too, so x and dY are read from
// memory once each.
#pragma once

#include "isa.h"
#include "microkernel.h"
#include "storage.h"

namespace efft_kernels::cpu::EFFT_ISA {

// Rows of w in a packed step: a panel of 384 × 48 floats is read from the second-level cache while
// its row block is in the first.
constexpr int64_t kDepth = 384;
// A block of rows of `a` leaves half of a second-level cache of 2 MiB to the panels, to `out` and
// to what is asked for ahead, and has no more rows than it takes to hide the reading of a panel.
constexpr int64_t kBlockBytes = 1 << 20;
constexpr int64_t kBlockRows = 200;

template <class T>
constexpr int64_t kPanel = kVectors * kLanes<T>;

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

template <class T>
int64_t block_rows(int64_t inner) {
  const int64_t fitting = kBlockBytes / (std::max<int64_t>(inner, 1) * sizeof(T));
  return std::clamp<int64_t>(fitting / kRows, 6, kBlockRows / kRows) * kRows;
}

// Hands out parts of one allocation; with a null base it only measures.
template <class T>
class Arena {
 public:
  explicit Arena(T* base) : base_(base) {}
  T* take(int64_t count) {
    T* part = base_ == nullptr ? nullptr : base_ + used_;
    used_ += round_up(count, 64 / sizeof(T));
    return part;
  }
  int64_t used() const { return used_; }

 private:
  T* base_;
  int64_t used_ = 0;
};

template <class F>
void parallel_each(int64_t count, const F& body) {
  parallel(
      count,
      [](void* context, int64_t begin, int64_t end) {
        const F& f = *static_cast<const F*>(context);
        for (int64_t i = begin; i < end; ++i) f(i);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// a·b into c [rows, width] (added to it if `add`), for a [rows, inner] and b [inner, width].
template <class T>
void thin_product(Rows<T> a, int64_t rows, int64_t inner, const T* b, int64_t width, T* c,
                  bool add = false) {
  for (int64_t i = 0; i < rows; i += kRows) {
    const int64_t count = std::min<int64_t>(kRows, rows - i);
    for (int64_t j = 0; j < width; j += kPanel<T>) {
      const int64_t across = std::min(kPanel<T>, width - j);
      const Term<T> term{a.data + i * a.stride, a.stride, b + j, width, inner};
      block_fn<T>(count, across / kLanes<T>)(term, Term<T>{}, c + i * width + j, width, nullptr,
                                             add, Ahead{});
    }
  }
}

// The factors in T, their columns padded to whole vectors with zeros, and the fold of `core` and
// `up`.
template <class T>
struct Thin {
  int64_t width = 0;    // Ra padded
  int64_t rb = 0;       // Rb padded
  int64_t up_rows = 0;  // N, or N/G where `up` is shared
  T* down = nullptr;    // [K, width]
  T* core = nullptr;    // [G·Ra, rb], null for the identity
  T* core_t = nullptr;  // [G·Rb, width]: core[g]^T
  T* up = nullptr;      // [up_rows, rb]
  T* b = nullptr;       // [N, width]; the same as `up` for the identity

  Thin(Arena<T>& arena, const Factors& factors, int64_t N, int64_t K)
      : width(round_up(factors.Ra, kLanes<T>)),
        rb(round_up(factors.Rb, kLanes<T>)),
        up_rows(factors.up_shared ? N / factors.G : N) {
    down = arena.take(K * width);
    up = arena.take(up_rows * rb);
    b = up;
    if (!factors.core) return;
    core = arena.take(factors.G * factors.Ra * rb);
    core_t = arena.take(factors.G * factors.Rb * width);
    b = arena.take(N * width);
  }

  // Row n of slice `slice` of `up`.
  const T* up_row(const Factors& factors, int64_t slice, int64_t n, int64_t per_slice) const {
    return up + ((factors.up_shared ? 0 : slice * per_slice) + n) * rb;
  }
};

// Rows of a slice that one task takes.
constexpr int64_t kChunk = 512;

// B[g] = up[g]·core[g]^T, and the rest of `thin` from the factors.
template <class T>
void fold(const Factors& factors, int64_t N, int64_t K, const Thin<T>& thin) {
  const int64_t G = factors.G, Ra = factors.Ra, Rb = factors.Rb;
  read_padded(factors.down, 0, K, Ra, thin.down, thin.width);
  read_padded(factors.up, 0, thin.up_rows, Rb, thin.up, thin.rb);
  if (!factors.core) return;
  read_padded(factors.core, 0, G * Ra, Rb, thin.core, thin.rb);
  for (int64_t g = 0; g < G; ++g) {
    for (int64_t r = 0; r < Rb; ++r) {
      T* row = thin.core_t + (g * Rb + r) * thin.width;
      for (int64_t a = 0; a < Ra; ++a) row[a] = thin.core[(g * Ra + a) * thin.rb + r];
      for (int64_t a = Ra; a < thin.width; ++a) row[a] = T(0);
    }
  }
  const int64_t per_slice = N / G;
  const int64_t chunks = (per_slice + kChunk - 1) / kChunk;
  parallel_each(G * chunks, [&](int64_t task) {
    const int64_t g = task / chunks;
    const int64_t first = task % chunks * kChunk;
    thin_product<T>({thin.up_row(factors, g, first, per_slice), thin.rb},
                    std::min(kChunk, per_slice - first), Rb, thin.core_t + g * Rb * thin.width,
                    thin.width, thin.b + (g * per_slice + first) * thin.width);
  });
}

// d_up[g] = d_B[g]·core[g] (summed over g where `up` is shared), d_core[g] = d_B[g]^T·up[g].
// d_up [up_rows, rb] and d_core [G·Ra, rb] may be null.
template <class T>
void unfold(const Factors& factors, int64_t N, const Thin<T>& thin, const T* d_b, T* d_up,
            T* d_core) {
  const int64_t G = factors.G, Ra = factors.Ra;
  const int64_t per_slice = N / G;
  if (d_up != nullptr) {
    const int64_t chunks = (per_slice + kChunk - 1) / kChunk;
    const int64_t sets = factors.up_shared ? 1 : G;  // slices of `up`
    parallel_each(sets * chunks, [&](int64_t task) {
      const int64_t set = task / chunks;
      const int64_t first = task % chunks * kChunk;
      const int64_t rows = std::min(kChunk, per_slice - first);
      T* to = d_up + (set * per_slice + first) * thin.rb;
      for (int64_t g = set; g < (factors.up_shared ? G : set + 1); ++g) {
        thin_product<T>({d_b + (g * per_slice + first) * thin.width, thin.width}, rows, Ra,
                        thin.core + g * Ra * thin.rb, thin.rb, to, g != set);
      }
    });
  }
  if (d_core != nullptr) {
    std::memset(d_core, 0, G * Ra * thin.rb * sizeof(T));
    parallel_each(G, [&](int64_t g) {
      tall_product(d_b + g * per_slice * thin.width, thin.width,
                   thin.up_row(factors, g, 0, per_slice), thin.rb, per_slice,
                   d_core + g * Ra * thin.rb, thin.rb, Ra, thin.rb);
    });
  }
}

template <class T>
void write_padded(const Matrix& out, int64_t first, int64_t rows, int64_t columns, const T* from,
                  int64_t width) {
  for (int64_t i = 0; i < rows; ++i) write_row(out, first + i, 0, from + i * width, columns);
}

// w [inner, columns] in panels: for every step of kDepth rows, for every panel of kPanel columns,
// the panel's rows one after another. `tail` holds thin_out^T [rank, panel columns] per panel.
template <class T>
struct Packed {
  int64_t inner = 0;
  int64_t columns = 0;
  int64_t padded = 0;  // columns in whole vectors
  int64_t rank = 0;    // rows of a tail: Ra
  T* body = nullptr;
  T* tail = nullptr;

  Packed() = default;
  Packed(Arena<T>& arena, int64_t inner, int64_t columns, int64_t rank)
      : inner(inner), columns(columns), padded(round_up(columns, kLanes<T>)), rank(rank) {
    body = arena.take(inner * padded);
    tail = arena.take(rank * padded);
  }
  // Register blocks of a product with `rows` rows, for each of the packed steps.
  int64_t blocks(int64_t rows) const {
    return (rows + kRows - 1) / kRows * ((padded + kPanel<T> - 1) / kPanel<T>);
  }
  int64_t panel_columns(int64_t j) const { return std::min(kPanel<T>, padded - j); }
  T* panel(int64_t step, int64_t depth, int64_t j) const {
    return body + step * padded + j * depth;
  }
  T* tail_of(int64_t j) const { return tail + j * rank; }
};

// out [depth, width] = the transpose of w[n0 .. n0 + columns, k0 .. k0 + depth], zero beyond
// `columns`.
template <class T>
void pack_transposed(const Matrix& w, int64_t n0, int64_t columns, int64_t width, int64_t k0,
                     int64_t depth, T* out) {
  constexpr int64_t lanes = kLanes<T>;
  T square[lanes * lanes];
  for (int64_t n = 0; n < width; n += lanes) {
    const int64_t valid = std::clamp<int64_t>(columns - n, 0, lanes);
    for (int64_t k = 0; k < depth; k += lanes) {
      const int64_t across = std::min(lanes, depth - k);
      Vec<T> v[lanes];
      if (is_direct<T>(w) && valid == lanes && across == lanes) {
        const T* from = static_cast<const T*>(w.data) + (n0 + n) * w.row_stride + k0 + k;
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) v[i] = load(from + i * w.row_stride);
      } else {
        for (int64_t i = 0; i < lanes; ++i) {
          if (i < valid) read_row(w, n0 + n + i, k0 + k, square + i * lanes, across);
          for (int64_t l = i < valid ? across : 0; l < lanes; ++l) square[i * lanes + l] = T(0);
        }
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) v[i] = load(square + i * lanes);
      }
      transpose<T>(v);
      T* to = out + k * width + n;
      if (across == lanes) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) store(to + i * width, v[i]);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
          if (i < across) store(to + i * width, v[i]);
        }
      }
    }
  }
}

template <class T>
void pack_rows(const Matrix& w, int64_t j0, int64_t columns, int64_t width, int64_t k0,
               int64_t depth, T* out) {
  for (int64_t k = 0; k < depth; ++k) {
    T* row = out + k * width;
    read_row(w, k0 + k, j0, row, columns);
    for (int64_t j = columns; j < width; ++j) row[j] = T(0);
  }
}

// Packs w, [columns, inner] if `transposed` else [inner, columns], adding thin_in·thin_out^T if
// `merge`.
template <class T>
void pack(const Matrix& w, bool transposed, const T* thin_in, const T* thin_out, int64_t width,
          bool merge, const Packed<T>& packed) {
  const int64_t panels = (packed.padded + kPanel<T> - 1) / kPanel<T>;
  const int64_t steps = (packed.inner + kDepth - 1) / kDepth;
  parallel_each(panels, [&](int64_t panel) {
    const int64_t j = panel * kPanel<T>;
    const int64_t across = packed.panel_columns(j);
    const int64_t valid = std::min(across, packed.columns - j);
    T* tail = packed.tail_of(j);
    for (int64_t r = 0; r < packed.rank; ++r) {
      for (int64_t c = 0; c < across; ++c) {
        tail[r * across + c] = c < valid ? thin_out[(j + c) * width + r] : T(0);
      }
    }
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t k = s * kDepth;
      const int64_t depth = std::min(kDepth, packed.inner - k);
      T* out = packed.panel(k, depth, j);
      if (transposed) {
        pack_transposed(w, j, valid, across, k, depth, out);
      } else {
        pack_rows(w, j, valid, across, k, depth, out);
      }
      if (!merge) continue;
      for (int64_t i = 0; i < depth; i += kRows) {
        const int64_t rows = std::min<int64_t>(kRows, depth - i);
        const Term<T> low_rank{thin_in + (k + i) * width, width, tail, across, packed.rank};
        block_fn<T>(rows, across / kLanes<T>)(low_rank, Term<T>{}, out + i * across, across,
                                              nullptr, true, Ahead{});
      }
    }
  });
}

// Rows that later steps read, handed out a stretch per register block.
class Upcoming {
 public:
  // `blocks` and `depth` are the register blocks of the product meanwhile and its inner dimension.
  Upcoming(int64_t blocks, int64_t depth) : iterations_(std::max<int64_t>(blocks * depth, 1)) {}

  template <class T>
  void add(const Matrix& matrix, int64_t first, int64_t rows, int64_t columns) {
    if (!is_direct<T>(matrix) || matrix.row_stride != columns || rows <= 0) return;
    const T* begin = static_cast<const T*>(matrix.data) + first * columns;
    regions_[count_++] = {reinterpret_cast<const char*>(begin),
                          reinterpret_cast<const char*>(begin + rows * columns)};
    bytes_ += rows * columns * sizeof(T);
    step_ = (bytes_ + iterations_ - 1) / iterations_;
  }

  // Sets `ahead` to the stretch that `depth` iterations cover.
  void next(int64_t depth, Ahead& ahead) {
    while (at_ < count_ && regions_[at_].begin >= regions_[at_].end) ++at_;
    if (at_ == count_) {
      ahead.rows = ahead.panel;
      ahead.rows_step = 0;
      return;
    }
    ahead.rows = regions_[at_].begin;
    ahead.rows_step = step_;
    regions_[at_].begin += step_ * depth;
  }

 private:
  struct Region {
    const char* begin;
    const char* end;
  };
  Region regions_[2] = {};
  int count_ = 0, at_ = 0;
  int64_t iterations_, bytes_ = 0, step_ = 0;
};

// out [rows, columns] = a·w + bias (+ thin·tail if `extend`); out's rows have room for
// packed.padded columns where `padded`, else for packed.columns.
template <class T>
void product(Rows<T> a, int64_t rows, const Packed<T>& packed, const T* bias, const T* thin,
             int64_t width, bool extend, T* out, int64_t ldo, bool padded, Upcoming upcoming) {
  T edge[kRows * kPanel<T>];
  const int64_t blocks = (rows + kRows - 1) / kRows;
  const int64_t panel_step = (kPanel<T> * sizeof(T) + blocks - 1) / blocks;
  for (int64_t k = 0; k < packed.inner; k += kDepth) {
    const int64_t depth = std::min(kDepth, packed.inner - k);
    const bool first = k == 0;
    const bool last = k + kDepth >= packed.inner;
    for (int64_t j = 0; j < packed.padded; j += kPanel<T>) {
      const int64_t across = packed.panel_columns(j);
      const int64_t valid = std::min(across, packed.columns - j);
      const bool direct = padded || valid == across;
      const T* panel = packed.panel(k, depth, j);
      const T* start = first && bias != nullptr ? bias + j : nullptr;
      const char* next_panel = reinterpret_cast<const char*>(panel + across * depth);
      for (int64_t i = 0; i < rows; i += kRows) {
        const int64_t count = std::min<int64_t>(kRows, rows - i);
        const Term<T> main{a.data + i * a.stride + k, a.stride, panel, across, depth};
        const Term<T> low_rank = last && extend ? Term<T>{thin + i * width, width,
                                                          packed.tail_of(j), across, packed.rank}
                                                : Term<T>{};
        T* to = out + i * ldo + j;
        if (count == kRows && across == kPanel<T> && direct) {
          Ahead ahead;
          ahead.panel = next_panel + i / kRows * panel_step * depth;
          ahead.panel_step = panel_step;
          upcoming.next(depth, ahead);
          ahead.out = i + kRows < rows ? to + kRows * ldo : out + j + across;
          block_entry<T, kRows, kVectors, true>(main, low_rank, to, ldo, start, !first, ahead);
          continue;
        }
        const BlockFn<T> run = block_fn<T>(count, across / kLanes<T>);
        if (direct) {
          run(main, low_rank, to, ldo, start, !first, Ahead{});
          continue;
        }
        for (int64_t r = 0; !first && r < count; ++r) {
          std::memcpy(edge + r * across, to + r * ldo, valid * sizeof(T));
        }
        run(main, low_rank, edge, across, start, !first, Ahead{});
        for (int64_t r = 0; r < count; ++r) {
          std::memcpy(to + r * ldo, edge + r * across, valid * sizeof(T));
        }
      }
    }
  }
}

// The rows of slot `slot` of `slots`, in blocks of at most `most`; all but the last are a multiple
// of kRows.
template <class F>
void each_block(int64_t M, int64_t slot, int64_t slots, int64_t most, const F& body) {
  const int64_t per_slot = round_up((M + slots - 1) / slots, kRows);
  const int64_t begin = std::min(M, slot * per_slot);
  const int64_t end = std::min(M, begin + per_slot);
  if (begin == end) return;
  const int64_t blocks = (end - begin + most - 1) / most;
  const int64_t step = round_up((end - begin + blocks - 1) / blocks, kRows);
  for (int64_t i = begin; i < end; i += step) body(i, std::min(step, end - i));
}

template <class T>
struct ForwardPlan {
  int64_t block = 0;  // rows
  Thin<T> thin;
  Packed<T> packed;
  T* bias = nullptr;
  T* a = nullptr;    // [slots, block, K], where x is not stored in T
  T* p = nullptr;    // [slots, block, width]
  T* out = nullptr;  // [slots, block, padded N], where y is not stored in T

  ForwardPlan(Arena<T>& arena, const Forward& args)
      : block(block_rows<T>(args.K)),
        thin(arena, args.factors, args.N, args.K),
        packed(arena, args.K, args.N, args.factors.Ra) {
    const int64_t rows = args.slots * block;
    bias = arena.take(packed.padded);
    p = arena.take(rows * thin.width);
    if (!is_direct<T>(args.x)) a = arena.take(rows * args.K);
    if (!is_direct<T>(args.y)) out = arena.take(rows * packed.padded);
  }
};

template <class T>
void forward(const Forward& args) {
  Arena<T> measure(nullptr);
  ForwardPlan<T>{measure, args};
  Arena<T> arena(static_cast<T*>(workspace(measure.used() * sizeof(T))));
  ForwardPlan<T> plan(arena, args);

  fold(args.factors, args.N, args.K, plan.thin);
  const bool merge = args.join == Join::kMerge;
  pack(args.weight, true, plan.thin.down, plan.thin.b, plan.thin.width, merge, plan.packed);
  if (args.bias) {
    read_padded(args.bias, 0, 1, args.N, plan.bias, plan.packed.padded);
  }
  const T* bias = args.bias ? plan.bias : nullptr;
  const int64_t width = plan.thin.width;

  parallel_each(args.slots, [&](int64_t slot) {
    T* a_scratch = plan.a == nullptr ? nullptr : plan.a + slot * plan.block * args.K;
    T* p = plan.p + slot * plan.block * width;
    T* out_scratch =
        plan.out == nullptr ? nullptr : plan.out + slot * plan.block * plan.packed.padded;
    each_block(args.M, slot, args.slots, plan.block, [&](int64_t first, int64_t rows) {
      const Rows<T> a = rows_of(args.x, first, rows, args.K, a_scratch);
      if (args.p || !merge) thin_product(a, rows, args.K, plan.thin.down, width, p);
      if (args.p) write_padded(args.p, first, rows, args.factors.Ra, p, width);
      Upcoming upcoming(plan.packed.blocks(rows), args.K);
      upcoming.add<T>(args.x, first + rows, std::min(rows, args.M - first - rows), args.K);
      if (out_scratch == nullptr) {
        T* y = static_cast<T*>(args.y.data) + first * args.N;
        product(a, rows, plan.packed, bias, p, width, !merge, y, args.N, false, upcoming);
        return;
      }
      product(a, rows, plan.packed, bias, p, width, !merge, out_scratch, plan.packed.padded, true,
              upcoming);
      write_padded(args.y, first, rows, args.N, out_scratch, plan.packed.padded);
    });
  });
}

template <class T>
struct BackwardPlan {
  int64_t block = 0;  // rows
  Thin<T> thin;
  Packed<T> packed;
  T* dy = nullptr;      // [slots, block, N], where dY is not stored in T
  T* x = nullptr;       // [slots, block, K], where x is not stored in T
  T* s = nullptr;       // [slots, block, width]
  T* p = nullptr;       // [slots, block, width]
  T* out = nullptr;     // [slots, block, padded K], where dX is not stored in T
  T* d_b = nullptr;     // [slots, N, width]
  T* d_down = nullptr;  // [slots, K, width]
  T* d_core = nullptr;  // [G·Ra, rb]
  T* d_up = nullptr;    // [up_rows, rb]

  BackwardPlan(Arena<T>& arena, const Backward& args)
      : block(block_rows<T>(args.N)), thin(arena, args.factors, args.N, args.K) {
    const int64_t rows = args.slots * block;
    if (args.dx) packed = Packed<T>(arena, args.N, args.K, args.factors.Ra);
    if (!is_direct<T>(args.dy)) dy = arena.take(rows * args.N);
    s = arena.take(rows * thin.width);
    if (args.dx && !is_direct<T>(args.dx)) out = arena.take(rows * packed.padded);
    if (args.d_core || args.d_up) {
      p = arena.take(rows * thin.width);
      d_b = arena.take(args.slots * args.N * thin.width);
    }
    if (args.d_down) {
      if (!is_direct<T>(args.x)) x = arena.take(rows * args.K);
      d_down = arena.take(args.slots * args.K * thin.width);
    }
    // Without a core, d_up is d_B itself.
    if (args.d_core) d_core = arena.take(args.factors.G * args.factors.Ra * thin.rb);
    if (args.d_up && args.factors.core) d_up = arena.take(thin.up_rows * thin.rb);
  }
};

// The first slot's partial sums += the others', in the order of the slots.
template <class T>
void reduce_slots(T* partial, int64_t slots, int64_t count) {
  for (int64_t slot = 1; slot < slots; ++slot) {
    const T* other = partial + slot * count;
    for (int64_t i = 0; i < count; ++i) partial[i] += other[i];
  }
}

template <class T>
void backward(const Backward& args) {
  Arena<T> measure(nullptr);
  BackwardPlan<T>{measure, args};
  Arena<T> arena(static_cast<T*>(workspace(measure.used() * sizeof(T))));
  BackwardPlan<T> plan(arena, args);

  fold(args.factors, args.N, args.K, plan.thin);
  const bool merge = args.join == Join::kMerge;
  const int64_t width = plan.thin.width;
  if (args.dx) {
    pack(args.weight, false, plan.thin.b, plan.thin.down, width, merge, plan.packed);
  }
  const bool need_s = args.d_down || (args.dx && !merge);

  parallel_each(args.slots, [&](int64_t slot) {
    const int64_t row = slot * plan.block;
    T* dy_scratch = plan.dy == nullptr ? nullptr : plan.dy + row * args.N;
    T* x_scratch = plan.x == nullptr ? nullptr : plan.x + row * args.K;
    T* out_scratch = plan.out == nullptr ? nullptr : plan.out + row * plan.packed.padded;
    T* s = plan.s + row * width;
    T* p = plan.p == nullptr ? nullptr : plan.p + row * width;
    T* d_b = plan.d_b == nullptr ? nullptr : plan.d_b + slot * args.N * width;
    T* d_down = plan.d_down == nullptr ? nullptr : plan.d_down + slot * args.K * width;
    if (d_b != nullptr) std::memset(d_b, 0, args.N * width * sizeof(T));
    if (d_down != nullptr) std::memset(d_down, 0, args.K * width * sizeof(T));
    each_block(args.M, slot, args.slots, plan.block, [&](int64_t first, int64_t rows) {
      const Rows<T> dy = rows_of(args.dy, first, rows, args.N, dy_scratch);
      if (need_s) thin_product(dy, rows, args.N, plan.thin.b, width, s);
      if (d_b != nullptr) {
        read_padded(args.p, first, rows, args.factors.Ra, p, width);
        tall_product(dy.data, dy.stride, p, width, rows, d_b, width, args.N, width);
      }
      Upcoming upcoming(plan.packed.blocks(rows), args.N);
      if (d_down != nullptr) upcoming.add<T>(args.x, first, rows, args.K);
      upcoming.add<T>(args.dy, first + rows, std::min(rows, args.M - first - rows), args.N);
      if (args.dx && out_scratch == nullptr) {
        T* dx = static_cast<T*>(args.dx.data) + first * args.K;
        product<T>(dy, rows, plan.packed, nullptr, s, width, !merge, dx, args.K, false, upcoming);
      } else if (args.dx) {
        product<T>(dy, rows, plan.packed, nullptr, s, width, !merge, out_scratch,
                   plan.packed.padded, true, upcoming);
        write_padded(args.dx, first, rows, args.K, out_scratch, plan.packed.padded);
      }
      if (d_down != nullptr) {
        const Rows<T> x = rows_of(args.x, first, rows, args.K, x_scratch);
        tall_product(x.data, x.stride, s, width, rows, d_down, width, args.K, width);
      }
    });
  });

  if (plan.d_down != nullptr) {
    reduce_slots(plan.d_down, args.slots, args.K * width);
    write_padded(args.d_down, 0, args.K, args.factors.Ra, plan.d_down, width);
  }
  if (plan.d_b != nullptr) {
    reduce_slots(plan.d_b, args.slots, args.N * width);
    unfold(args.factors, args.N, plan.thin, plan.d_b, plan.d_up, plan.d_core);
    if (args.d_up) {
      const T* d_up = plan.d_up != nullptr ? plan.d_up : plan.d_b;
      write_padded(args.d_up, 0, plan.thin.up_rows, args.factors.Rb, d_up, plan.thin.rb);
    }
    if (args.d_core) {
      write_padded(args.d_core, 0, args.factors.G * args.factors.Ra, args.factors.Rb, plan.d_core,
                   plan.thin.rb);
    }
  }
}

}  // namespace efft_kernels::cpu::EFFT_ISA
