// The index maps of the kernels, walked on the host: tiles are written to a model of shared memory
// as the kernels write them and read back as ldmatrix, mma, TMA and wgmma read them, by
// their documented layouts. The products must come out right, and without bank conflicts.

#include <array>
#include <cstdint>
#include <random>
#include <set>
#include <vector>

#include "csrc/cuda/common/swizzle.h"
#include "csrc/cuda/gemm/config_sm90.h"
#include "expect.h"

using namespace efft_kernels::cuda;

using Rows = std::vector<std::vector<int>>;  // a matrix of small integers, by rows

static Rows random_matrix(int rows, int cols) {
  static std::mt19937 generator(7);
  Rows m(rows, std::vector<int>(cols));
  for (auto& row : m)
    for (int& value : row) value = static_cast<int>(generator() % 15) - 7;
  return m;
}

// As load_tile does: element (r, c) of the tile lies at swizzled(r, c / 8) + c % 8.
template <int kCols>
static std::vector<int> swizzled_tile(const Rows& m) {
  std::vector<int> tile(m.size() * kCols, 99);
  for (int r = 0; r < static_cast<int>(m.size()); ++r)
    for (int c = 0; c < kCols; ++c) tile.at(swizzled<kCols>(r, c / 8) + c % 8) = m[r][c];
  return tile;
}

// ldmatrix.x4: lane 8i + j names row j of matrix i; lane l gets elements (l / 4, l % 4 · 2 and + 1)
// of each, or with .trans of its transpose. Returned as [lane][matrix][element].
using Fragment = std::array<std::array<std::array<int, 2>, 4>, 32>;

static Fragment ldmatrix(const std::vector<int>& tile, const std::array<int, 32>& offset,
                         bool transposed) {
  for (int phase = 0; phase < 4; ++phase) {
    std::set<int> banks;
    for (int j = 0; j < 8; ++j) banks.insert(offset[phase * 8 + j] * 2 / 16 % 8);
    EXPECT(banks.size() == 8, "phase %d touches %zu of 8 bank groups", phase, banks.size());
  }
  Fragment f;
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      for (int e = 0; e < 2; ++e) {
        const int row = lane / 4, col = lane % 4 * 2 + e;
        const int named = matrix * 8 + (transposed ? col : row);
        f[lane][matrix][e] = tile.at(offset[named] + (transposed ? row : col));
      }
    }
  }
  return f;
}

template <int kCols>
static std::array<int, 32> offsets(LaneAddress (*at)(int), int row, int col) {
  std::array<int, 32> offset;
  for (int lane = 0; lane < 32; ++lane)
    offset[lane] = swizzled<kCols>(row + at(lane).row, col / 8 + at(lane).chunk);
  return offset;
}

// mma.m16n8k16: a's register i holds rows lane/4 + 8(i%2), columns lane%4·2 + 8(i/2) and + 1; b's
// register i rows (k) lane%4·2 + 8i and + 1, column lane/4; d's element e as accumulator_row/col.
static void mma(const Fragment& a, const Fragment& b, int first_b, Rows& d, int row, int col) {
  Rows a_full(16, std::vector<int>(16)), b_full(16, std::vector<int>(8));
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i)
      for (int e = 0; e < 2; ++e)
        a_full[lane / 4 + i % 2 * 8][lane % 4 * 2 + i / 2 * 8 + e] = a[lane][i][e];
    for (int i = 0; i < 2; ++i)
      for (int e = 0; e < 2; ++e)
        b_full[lane % 4 * 2 + i * 8 + e][lane / 4] = b[lane][first_b + i][e];
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int e = 0; e < 4; ++e) {
      const int r = accumulator_row(lane, e), c = accumulator_col(lane, e);
      for (int k = 0; k < 16; ++k) d[row + r][col + c] += a_full[r][k] * b_full[k][c];
    }
  }
}

static void expect_product(const char* what, const Rows& d, int m, int n, int k, auto a, auto b) {
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      int exact = 0;
      for (int l = 0; l < k; ++l) exact += a(i, l) * b(l, j);
      EXPECT(d[i][j] == exact, "%s at (%d, %d): %d, not %d", what, i, j, d[i][j], exact);
    }
  }
}

// A 64×64 product over k = kInner with operands in any of the two orders each.
template <int kACols, int kBCols, bool kAFromRows, bool kBFromRows>
static void tensor_core_product(const char* what) {
  constexpr int kM = 64, kK = 64;
  const Rows a = kAFromRows ? random_matrix(kM, kACols) : random_matrix(kK, kACols);
  constexpr int kInner = kAFromRows ? kACols : kK;
  constexpr int kN = kBFromRows ? 64 : kBCols;
  const Rows b = kBFromRows ? random_matrix(kN, kBCols) : random_matrix(kInner, kBCols);
  const auto a_tile = swizzled_tile<kACols>(a);
  const auto b_tile = swizzled_tile<kBCols>(b);
  Rows d(kM, std::vector<int>(kN, 0));
  for (int m = 0; m < kM; m += 16) {
    for (int n = 0; n < kN; n += 16) {
      for (int k = 0; k < kInner; k += 16) {
        const Fragment fa = kAFromRows ? ldmatrix(a_tile, offsets<kACols>(a_from_rows, m, k), false)
                                       : ldmatrix(a_tile, offsets<kACols>(a_from_cols, k, m), true);
        const Fragment fb = kBFromRows ? ldmatrix(b_tile, offsets<kBCols>(b_from_rows, n, k), false)
                                       : ldmatrix(b_tile, offsets<kBCols>(b_from_cols, k, n), true);
        mma(fa, fb, 0, d, m, n);
        mma(fa, fb, 2, d, m, n + 8);
      }
    }
  }
  expect_product(
      what, d, kM, kN, kInner, [&](int i, int l) { return kAFromRows ? a[i][l] : a[l][i]; },
      [&](int l, int j) { return kBFromRows ? b[j][l] : b[l][j]; });
}

static uint32_t swizzled_address(uint32_t address, uint32_t line_bytes) {
  return line_bytes == 32 ? swizzle_32b(address) : swizzle_128b(address);
}

// Which chunk of 16 bytes of a line lies where, by CUDA's documentation of the two modes: the tests
// below write and read by the same function, and would agree on any other.
static void swizzled_lines() {
  for (uint32_t line = 0; line < 16; ++line) {
    for (uint32_t chunk = 0; chunk < 8; ++chunk)
      EXPECT(swizzle_128b(line * 128 + chunk * 16) == line * 128 + (chunk ^ line % 8) * 16,
             "128 bytes: line %u, chunk %u", line, chunk);
    for (uint32_t chunk = 0; chunk < 2; ++chunk)
      EXPECT(swizzle_32b(line * 32 + chunk * 16) == line * 32 + (chunk ^ line / 4 % 2) * 16,
             "32 bytes: line %u, chunk %u", line, chunk);
  }
}

// One box of TMA with SWIZZLE_128B or SWIZZLE_32B: lines of as many bytes one after another from
// `to`, each 16-byte chunk at its address XORed; zeros beyond the tensor.
static void load_box(std::vector<int>& smem, uint32_t to, const Rows& tensor, int row, int col,
                     int box_rows, int line_bytes = 128) {
  for (int r = 0; r < box_rows; ++r) {
    for (int c = 0; c < line_bytes / 2; ++c) {
      const bool inside =
          row + r < static_cast<int>(tensor.size()) && col + c < static_cast<int>(tensor[0].size());
      smem.at(swizzled_address(to + r * line_bytes + c * 2, line_bytes) / 2) =
          inside ? tensor[row + r][col + c] : 0;
    }
  }
}

// Reads a wgmma operand as its descriptor says. K-major: line mn of the slabs, 16 elements from the
// address. MN-major: line k, 64 columns per chunk, or 16 with SWIZZLE_32B (type 3).
struct Descriptor {
  uint32_t address, chunk_bytes, slab_bytes, swizzle;
  explicit Descriptor(uint64_t d)
      : address((d & 0x3fff) << 4),
        chunk_bytes((d >> 16 & 0x3fff) << 4),
        slab_bytes((d >> 32 & 0x3fff) << 4),
        swizzle(static_cast<uint32_t>(d >> 62)) {}

  uint32_t element(int mn, int k, bool k_major) const {
    const int line = swizzle == 3 ? 32 : 128;
    const uint32_t at = k_major ? address + mn / 8 * slab_bytes + mn % 8 * line + k * 2
                                : address + mn / (line / 2) * chunk_bytes + mn % (line / 2) * 2 +
                                      k / 8 * slab_bytes + k % 8 * line;
    return swizzled_address(at, line) / 2;
  }
};

// A whole stage of the sm_90a GEMM: loads as its producer, 4 wgmma steps as a consumer.
template <int kBlockC, int kPCols, WLayout kLayout>
static void wgmma_stage(const char* what) {
  using Config = Sm90Config<kBlockC, kPCols, kLayout>;
  constexpr bool kRowsOfI = kLayout == WLayout::kRowsOfI;
  const int m = 101, i_count = 61, c_count = kBlockC - 5;  // ragged in every direction
  const Rows a = random_matrix(m, i_count);
  const Rows w = kRowsOfI ? random_matrix(c_count, i_count) : random_matrix(i_count, c_count);
  const Rows thin = kRowsOfI ? random_matrix(16, i_count) : random_matrix(i_count, 16);
  const uint32_t smem = 3 * 1024, stage = 2, base = smem + stage * Config::kStageBytes;
  std::vector<int> memory((base + Config::kStageBytes) / 2, 99);
  load_box(memory, base, a, 0, 0, Config::kBlockM);
  if (kRowsOfI) {
    load_box(memory, base + Config::kABytes, w, 0, 0, kBlockC);
  } else {
    for (int chunk = 0; chunk < kBlockC / 64; ++chunk)
      load_box(memory, base + Config::kABytes + chunk * Config::kChunkBytes, w, 0, chunk * 64, 64);
  }
  if (kPCols)
    load_box(memory, base + Config::kABytes + Config::kWBytes, thin, 0, 0, kRowsOfI ? kPCols : 64,
             kRowsOfI ? 128 : 32);

  const auto w_at = [&](int i, int c) {
    if (i >= i_count) return 0;
    if (c >= kBlockC) return kRowsOfI ? thin[c - kBlockC][i] : thin[i][c - kBlockC];
    if (c >= c_count) return 0;
    return kRowsOfI ? w[c][i] : w[i][c];
  };
  for (int consumer = 0; consumer < 2; ++consumer) {
    const uint64_t a_first = wgmma_descriptor(smem + consumer * 64 * kLineBytes, 16, kSlabBytes);
    const uint64_t w_first =
        wgmma_descriptor(smem + Config::kABytes, kRowsOfI ? 16 : Config::kChunkBytes, kSlabBytes);
    const uint64_t at = descriptor_step(stage * Config::kStageBytes);
    const uint64_t thin_in = wgmma_descriptor_32b(smem + Config::kABytes + Config::kWBytes);
    constexpr int kColumns = kBlockC + kPCols;
    Rows d(64, std::vector<int>(kColumns, 0));
    for (int k = 0; k < 4; ++k) {
      const Descriptor da(a_first + at + k * descriptor_step(32));
      const Descriptor dw(w_first + at + k * descriptor_step(kRowsOfI ? 32 : 2 * kSlabBytes));
      const Descriptor dt(thin_in + at + k * descriptor_step(16 * 32));
      EXPECT(da.swizzle == 1 && dw.swizzle == 1 && dt.swizzle == 3, "SWIZZLE_128B and 32B");
      for (int r = 0; r < 64; ++r)
        for (int c = 0; c < kColumns; ++c)
          for (int l = 0; l < 16; ++l)
            d[r][c] += memory.at(da.element(r, l, true)) *
                       memory.at(c < Config::kMmaC ? dw.element(c, l, kRowsOfI)
                                                   : dt.element(c - Config::kMmaC, l, false));
    }
    expect_product(
        what, d, 64, kColumns, i_count,
        [&](int r, int i) { return consumer * 64 + r < m ? a[consumer * 64 + r][i] : 0; }, w_at);
  }
}

// The accumulators of 16 columns are the left operand's registers of the next product: a's register
// i of a lane holds the two elements that accumulator elements 2(i%2) and + 1 of block i/2 hold.
static void accumulators_are_operands() {
  for (int lane = 0; lane < 32; ++lane) {
    for (int block = 0; block < 2; ++block) {
      for (int half = 0; half < 2; ++half) {
        const int i = block % 2 * 2 + half;
        for (int e = 0; e < 2; ++e) {
          EXPECT(accumulator_row(lane, half * 2 + e) == lane / 4 + i % 2 * 8, "row");
          EXPECT(block * 8 + accumulator_col(lane, half * 2 + e) == lane % 4 * 2 + i / 2 * 8 + e,
                 "column");
        }
      }
    }
  }
}

// The epilogue's piece: stmatrix.x4 per 16 columns, then TMA reads lines of 64.
static void stored_piece() {
  const uint32_t buffer = 5 * 1024;
  std::vector<int> memory((buffer + 64 * kLineBytes) / 2, -1);
  for (int warp = 0; warp < 4; ++warp) {
    for (int block = 0; block < 8; block += 2) {
      std::array<uint32_t, 32> address;
      for (int lane = 0; lane < 32; ++lane) {
        const LaneAddress at = stored_blocks(lane);
        address[lane] = buffer + 2 * swizzled<64>(warp * 16 + at.row, block + at.chunk);
      }
      for (int phase = 0; phase < 4; ++phase) {
        std::set<uint32_t> banks;
        for (int j = 0; j < 8; ++j) banks.insert(address[phase * 8 + j] / 16 % 8);
        EXPECT(banks.size() == 8, "stmatrix phase %d", phase);
      }
      // Register 2·half + h of a lane: rows h·8 + lane/4 of block + half.
      for (int lane = 0; lane < 32; ++lane)
        for (int half = 0; half < 2; ++half)
          for (int h = 0; h < 2; ++h)
            for (int e = 0; e < 2; ++e) {
              const int matrix = half * 2 + h;
              const int row = warp * 16 + accumulator_row(lane, h * 2 + e);
              const int col = (block + half) * 8 + accumulator_col(lane, e);
              memory.at(address[matrix * 8 + lane / 4] / 2 + lane % 4 * 2 + e) = row * 64 + col;
            }
    }
  }
  for (int r = 0; r < 64; ++r)
    for (int c = 0; c < 64; ++c)
      EXPECT(memory.at(swizzle_128b(buffer + r * 128 + c * 2) / 2) == r * 64 + c, "(%d, %d)", r, c);
}

// The general kernel stages its output with plain stores: a permutation of the tile.
template <int kCols>
static void swizzle_is_a_permutation() {
  std::set<int> seen;
  for (int r = 0; r < 64; ++r)
    for (int chunk = 0; chunk < kCols / 8; ++chunk) seen.insert(swizzled<kCols>(r, chunk));
  EXPECT(seen.size() == static_cast<size_t>(64 * kCols / 8), "%d columns", kCols);
  EXPECT(*seen.begin() == 0 && *seen.rbegin() == 64 * kCols - 8, "%d columns", kCols);
}

int main() {
  swizzled_lines();
  // gemm_sm80: a in rows of 32; w in rows of I (32) or rows of C (64, 128).
  tensor_core_product<32, 32, true, true>("forward");
  tensor_core_product<32, 64, true, false>("dX, 64 columns");
  tensor_core_product<32, 128, true, false>("dX, 128 columns");
  // thin: S from tall's rows, tall^T·P from its columns, for every rank.
  tensor_core_product<64, 16, true, false>("S, R 16");
  tensor_core_product<64, 32, true, false>("S, R 32");
  tensor_core_product<64, 64, true, false>("S, R 64");
  tensor_core_product<64, 128, true, false>("S, R 128");
  tensor_core_product<64, 16, false, false>("tall grad, R 16");
  tensor_core_product<64, 32, false, false>("tall grad, R 32");
  tensor_core_product<64, 64, false, false>("tall grad, R 64");
  tensor_core_product<64, 128, false, false>("tall grad, R 128");
  wgmma_stage<128, 0, WLayout::kRowsOfI>("wgmma 128, rows of I");
  wgmma_stage<128, 0, WLayout::kRowsOfC>("wgmma 128, rows of C");
  wgmma_stage<192, 0, WLayout::kRowsOfI>("wgmma 192, rows of I");
  wgmma_stage<192, 0, WLayout::kRowsOfC>("wgmma 192, rows of C");
  wgmma_stage<128, 16, WLayout::kRowsOfI>("wgmma 144, rows of I");
  wgmma_stage<128, 16, WLayout::kRowsOfC>("wgmma 128 and 16, rows of C");
  wgmma_stage<192, 16, WLayout::kRowsOfI>("wgmma 208, rows of I");
  wgmma_stage<192, 16, WLayout::kRowsOfC>("wgmma 192 and 16, rows of C");
  accumulators_are_operands();
  stored_piece();
  swizzle_is_a_permutation<16>();
  swizzle_is_a_permutation<32>();
  swizzle_is_a_permutation<64>();
  swizzle_is_a_permutation<128>();
  return failures() != 0;
}
