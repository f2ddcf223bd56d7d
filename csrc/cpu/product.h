// out = a·w + bias + thin·thin_out^T, what the forward, the backward and the mixed batch share.
// Forward and dX are the same function:
//
//   forward   y  = x·W^T + bias + P·B^T,   P = x·down    a=x,  w=W^T, thin_in=down, thin_out=B
//   backward  dX = dY·W + S·down^T,        S = dY·B      a=dY, w=W,   thin_in=B,    thin_out=down
//
// The rows are taken in ranges. In each, the caller first makes thin = a·thin_in, and what else
// reads `a`, in blocks of rows; then follow the tiles of `out`. A thread packs the part of w that
// a tile reads, a step of kDepth rows at a time, into memory that stays in its cache, and
// prefetches the next part meanwhile: so w is read once for the rows of a tile, and not written.
//
// Numbers are summed in the same order in every block, so a row of `out` has the same bits whatever
// rows are beside it and however many threads there are.
#pragma once

#include "pack.h"
#include "thin.h"
#include "tiling.h"

namespace efft_kernels::cpu::EFFT_ISA {

// Rows of a range up to its row `end` have the same thin_out, in panels.
template <class T>
struct TailOfRows {
  Tail<T> tail;
  int64_t end;
};

// Rows that a tile is stored in. They have room for the tile's whole vectors where `padded`.
template <class Out>
struct OutputBlock {
  Out* data;
  int64_t stride;
  bool padded;
};

template <class T>
struct Product {
  Matrix a;    // [M, inner]
  Matrix out;  // [M, columns], contiguous; null where it is not wanted
  Weight<T> w;
  int64_t M, width, threads;
  // Whether `a` is read as it is stored, in bfloat16, and w, thin_in, thin and thin_out rounded to
  // it. Where w is merged that would round the low-rank term away.
  bool in_pairs;
  int64_t range_rows;        // of a range, at most
  const T* bias = nullptr;   // in bias_memory, once it has been read
  T* bias_memory = nullptr;  // [padded columns]
  T* a_scratch = nullptr;    // [range_rows, inner], where `a` is not stored in T, nor read in pairs
  T* thin = nullptr;         // [range_rows, width]
  uint16_t* thin_halves = nullptr;  // [range_rows, width]: thin in bfloat16, where `in_pairs`
  int64_t packed_size = 0, out_size = 0;
  T* packed = nullptr;       // [threads, packed_size]: a step of a tile, of Pairs where `in_pairs`
  T* out_scratch = nullptr;  // [threads, out_size]: a tile of `out`, else written at once

  static constexpr int64_t kTileColumns = kTilePanels * kPanel<T>;

  Product(Arena<T>& arena, const Matrix& a, const Matrix& out, const Matrix& weight,
          bool transposed, int64_t M, int64_t inner, int64_t columns, int64_t width,
          int64_t threads, bool merged)
      : a(a),
        out(out),
        w{weight, transposed, inner, columns},
        M(M),
        width(width),
        threads(threads),
        in_pairs(kCanPair<T> && a.dtype == DType::kBFloat16 && a.column_stride == 1 &&
                 w.in_pairs() && !merged) {
    int64_t limit = std::max(kRangeRows, kRangeRowsPerThread * threads);
    if (!is_direct<T>(a) && !in_pairs) {
      limit = std::min(limit, std::max(kRangeRows / 2, kRangeNumbers / inner));
    }
    const int64_t ranges = std::max<int64_t>((M + limit - 1) / limit, 1);
    range_rows = round_up((M + ranges - 1) / ranges, kRows);
    thin = arena.take(range_rows * width);
    if (in_pairs) {
      thin_halves = reinterpret_cast<uint16_t*>(arena.take(range_rows * width / 2));
    } else if (!is_direct<T>(a)) {
      a_scratch = arena.take(range_rows * inner);
    }
    if (!out) return;
    const int64_t padded = round_up(columns, kLanes<T>);
    const int64_t tile_columns = std::min(kTileColumns, padded);
    bias_memory = arena.take(padded);
    packed_size = std::min(kDepth, inner) * tile_columns;
    packed = arena.take(threads * packed_size);
    out_size = std::min(kTileRows, range_rows) * tile_columns;
    if (!is_direct<T>(out) && !writes_halves()) out_scratch = arena.take(threads * out_size);
  }

  // Whether the tiles write `out` in bfloat16 as they make it, which takes a single step.
  bool writes_halves() const {
    return in_pairs && out.dtype == DType::kBFloat16 && w.inner <= kDepth * Element<Pair>::kNumbers;
  }

  void read_bias(const Matrix& from) {
    if (!from) return;
    read_padded(from, 0, 1, w.columns, bias_memory, round_up(w.columns, kLanes<T>));
    bias = bias_memory;
  }

  // body(begin, end) for every range of rows.
  template <class F>
  void each_range(const F& body) const {
    for (int64_t begin = 0; begin < M; begin += range_rows) {
      body(begin, std::min(M, begin + range_rows));
    }
  }

  // Rows of `a` of the range that starts at `begin`, read for `rows_at` where they are not in T.
  void load(int64_t begin, int64_t first, int64_t rows) const {
    if (a_scratch == nullptr) return;
    rows_of(a, first, rows, w.inner, a_scratch + (first - begin) * w.inner);
  }

  // Rows of `a` from `first` on, in T.
  Rows<T> rows_at(int64_t begin, int64_t first) const {
    if (a_scratch != nullptr) return {a_scratch + (first - begin) * w.inner, w.inner};
    return {static_cast<const T*>(a.data) + first * a.row_stride, a.row_stride};
  }

  // The same where they are read in pairs.
  Rows<uint16_t> halves_of(int64_t first) const {
    return {static_cast<const uint16_t*>(a.data) + first * a.row_stride, a.row_stride};
  }

  // thin_in [inner, width] as the thin product reads it: itself, or pairs of its rows in `memory`.
  const T* pack_thin_in(const T* thin_in, T* memory) const {
    if constexpr (kCanPair<T>) {
      if (in_pairs) {
        const Matrix rows{const_cast<float*>(thin_in), DType::kFloat32, width, 1};
        pack_pairs_rows<float>(rows, 0, width, width, 0, w.inner, reinterpret_cast<Pair*>(memory));
        return memory;
      }
    }
    return thin_in;
  }

  // `thin` of row `first` of the range that starts at `begin`.
  T* thin_of(int64_t begin, int64_t first) const { return thin + (first - begin) * width; }

  // `thin` of these rows as the tiles read it, where they read it in pairs. A last column without a
  // partner is paired with zeros: what lies there may be no number.
  void round_thin(int64_t begin, int64_t first, int64_t rows, int64_t rank) const {
    if constexpr (kCanPair<T>) {
      const T* from = thin_of(begin, first);
      uint16_t* to = thin_halves + (first - begin) * width;
      for (int64_t i = 0; i < rows; ++i, from += width, to += width) {
        write_row({to, DType::kBFloat16}, 0, 0, from, width);
        if (rank % 2 == 1) to[rank] = 0;
      }
    }
  }

  // thin = a·thin_in, as pack_thin_in gave it, of rows that were loaded.
  void make_thin(int64_t begin, int64_t first, int64_t rows, const T* thin_in, int64_t rank) const {
    T* to = thin_of(begin, first);
    if constexpr (kCanPair<T>) {
      if (in_pairs) {
        thin_product<Pair>(halves_of(first), rows, w.inner / 2,
                           reinterpret_cast<const Pair*>(thin_in), width, to);
        round_thin(begin, first, rows, rank);
        return;
      }
    }
    thin_product<T>(rows_at(begin, first), rows, w.inner, thin_in, width, to);
  }

  // Rows begin .. end of `out`, the range that was loaded. Tiles and tail_of count rows from its
  // first: tail_of(row) is that row's TailOfRows; a tail without data adds nothing.
  template <class TailOf>
  void run(int64_t begin, int64_t end, const TailOf& tail_of) const {
    if constexpr (kCanPair<T>) {
      if (in_pairs) {
        return run_tiles<Pair>(begin, end, halves_of(begin), tail_of);
      }
    }
    run_tiles<T>(begin, end, rows_at(begin, begin), tail_of);
  }

 private:
  template <class E, class TailOf>
  void run_tiles(int64_t begin, int64_t end, Rows<Scalar<E>> rows, const TailOf& tail_of) const {
    const Tiling<T> tiles(end - begin, w.columns, threads);
    std::atomic<int64_t> next{0};
    parallel_each(std::min(threads, tiles.count()), [&](int64_t worker) {
      E* const memory = reinterpret_cast<E*>(packed + worker * packed_size);
      int64_t i = next.fetch_add(1);
      while (i < tiles.count()) {
        const Tile tile = tiles[i];
        // Known a step before the tile ends, so that its part of w can be prefetched.
        const auto following = [&] {
          i = next.fetch_add(1);
          return i < tiles.count() ? tiles[i] : Tile{};
        };
        const int64_t at = (begin + tile.first) * w.columns + tile.column;
        if constexpr (std::is_same_v<E, Pair>) {
          if (writes_halves()) {
            const OutputBlock<uint16_t> to{static_cast<uint16_t*>(out.data) + at, w.columns, false};
            run_tile<E>(tile, rows, tail_of, to, memory, following);
            continue;
          }
        }
        if (out_scratch == nullptr) {
          const OutputBlock<T> to{static_cast<T*>(out.data) + at, w.columns, false};
          run_tile<E>(tile, rows, tail_of, to, memory, following);
        } else {
          T* data = out_scratch + worker * out_size;
          const OutputBlock<T> to{data, tile.across, true};
          run_tile<E>(tile, rows, tail_of, to, memory, following);
          for (int64_t row = 0; row < tile.rows; ++row) {
            write_row(out, begin + tile.first + row, tile.column, data + row * tile.across,
                      std::min(tile.across, w.columns - tile.column));
          }
        }
      }
    });
  }

  template <class E, class Out, class TailOf, class Following>
  void run_tile(const Tile& tile, Rows<Scalar<E>> rows, const TailOf& tail_of,
                const OutputBlock<Out>& to, E* memory, const Following& following) const {
    constexpr int64_t numbers = kDepth * Element<E>::kNumbers;
    for (int64_t k = 0; k < w.inner; k += numbers) {
      const int64_t depth = std::min(numbers, w.inner - k);
      const bool last = k + numbers >= w.inner;
      w.pack(k, depth, tile.column, tile.across, memory);
      const Tile upcoming = last ? following() : tile;
      const int64_t next_k = last ? 0 : k + numbers;
      Lines next_w =
          w.lines(next_k, std::min(numbers, w.inner - next_k), upcoming.column, upcoming.across);
      for (int64_t i = tile.first; i < tile.first + tile.rows;) {
        const TailOfRows<T> of_rows = tail_of(i);
        const int64_t end = std::min(tile.first + tile.rows, of_rows.end);
        run_step<E>(tile, rows, i, end, k, depth, of_rows.tail, to, memory, next_w);
        i = end;
      }
    }
  }

  // A packed step of a tile for rows first .. end of the range.
  template <class E, class Out>
  void run_step(const Tile& tile, Rows<Scalar<E>> rows, int64_t first, int64_t end, int64_t k,
                int64_t depth, const Tail<T>& tail, const OutputBlock<Out>& to, const E* memory,
                Lines& next_w) const {
    constexpr int64_t panel = kPanel<T>;
    Out edge[kRows * panel];
    const int64_t panels = (tile.across + panel - 1) / panel;
    const int64_t steps = depth / Element<E>::kNumbers;
    const int64_t prefetches = std::max<int64_t>(steps / (2 * kPrefetchInterval), 1);
    const int64_t blocks = (end - first + kRows - 1) / kRows * panels;
    const bool with_tail = k + depth == w.inner && tail.data != nullptr;
    const Scalar<E>* thin_rows;
    if constexpr (std::is_same_v<E, Pair>) {
      thin_rows = thin_halves;
    } else {
      thin_rows = thin;
    }
    Lines next_a;
    Prefetch prefetch;
    prefetch.a = &next_a;
    prefetch.w = &next_w;
    prefetch.w_lines = (next_w.left() + blocks * prefetches - 1) / (blocks * prefetches);
    for (int64_t i = first; i < end; i += kRows) {
      const int64_t count = std::min<int64_t>(kRows, end - i);
      const Scalar<E>* a_rows = rows.data + i * rows.stride + k;
      next_a = Lines(a_rows + kRows * rows.stride, rows.stride * sizeof(Scalar<E>),
                     std::min<int64_t>(kRows, end - i - count), depth * sizeof(Scalar<E>));
      prefetch.a_lines = (next_a.left() + panels * prefetches - 1) / (panels * prefetches);
      for (int64_t j = 0; j < tile.across; j += panel) {
        const int64_t across = std::min(panel, tile.across - j);
        const int64_t valid = std::min(across, w.columns - tile.column - j);
        const Term<E> main{a_rows, rows.stride, memory + j * steps, across, steps};
        const Term<E> low_rank =
            with_tail ? Term<E>{thin_rows + i * width, width,
                                tail.template panel<E>(tile.column + j), across, tail.steps}
                      : Term<E>{};
        const T* start = bias != nullptr ? bias + tile.column + j : nullptr;
        Out* block = to.data + (i - tile.first) * to.stride + j;
        const bool direct = to.padded || valid == across;
        if (count == kRows && across == panel && direct) {
          prefetch.out = j + across < tile.across ? block + panel : block + kRows * to.stride - j;
          block_entry<E, kRows, kVectors, true, Out>(main, low_rank, block, to.stride, start, k > 0,
                                                     prefetch);
          continue;
        }
        const BlockFn<E, Out> run = block_fn<E, Out>(count, across / kLanes<T>);
        if (direct) {
          run(main, low_rank, block, to.stride, start, k > 0, Prefetch{});
          continue;
        }
        for (int64_t r = 0; k > 0 && r < count; ++r) {
          std::memcpy(edge + r * across, block + r * to.stride, valid * sizeof(Out));
        }
        run(main, low_rank, edge, across, start, k > 0, Prefetch{});
        for (int64_t r = 0; r < count; ++r) {
          std::memcpy(block + r * to.stride, edge + r * across, valid * sizeof(Out));
        }
      }
    }
  }
};

// The arrays of Workspace<T> in the calling thread's memory, which grows to what they take.
template <template <class> class Workspace, class T, class Arguments>
Workspace<T> allocate(const Arguments& args) {
  Arena<T> measure(nullptr);
  Workspace<T>{measure, args};
  Arena<T> arena(static_cast<T*>(workspace(measure.used() * sizeof(T))));
  return {arena, args};
}

}  // namespace efft_kernels::cpu::EFFT_ISA
