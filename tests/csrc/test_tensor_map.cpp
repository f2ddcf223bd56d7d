// The tensor maps' limits; the boxes of the sm_90a GEMM fill its stages to the byte.

#include "csrc/cuda/gemm/select.h"
#include "csrc/cuda/gemm/tma.h"
#include "expect.h"

using namespace efft_kernels::cuda;

static TensorMapParams valid() { return {0x1000, 768, 12608, 1536, 64, 128}; }

template <class Change>
static void refused(const char* what, Change change) {
  TensorMapParams p = valid();
  change(p);
  EXPECT(!tensor_map_error(p).empty(), "%s", what);
}

static void limits() {
  EXPECT(tensor_map_error(valid()).empty(), "%s", tensor_map_error(valid()).c_str());
  refused("a null address", [](auto& p) { p.address = 0; });
  refused("an address of 8 bytes", [](auto& p) { p.address = 0x1008; });
  refused("no columns", [](auto& p) { p.cols = 0; });
  refused("no rows", [](auto& p) { p.rows = 0; });
  refused("rows of 1538 bytes", [](auto& p) { p.row_bytes = 1538; });
  refused("rows of 1544 bytes", [](auto& p) { p.row_bytes = 1544; });
  refused("rows of 2^40 bytes", [](auto& p) { p.row_bytes = uint64_t{1} << 40; });
  refused("rows that overlap", [](auto& p) { p.row_bytes = 1520; });
  refused("rows that repeat", [](auto& p) { p.row_bytes = 0; });
  refused("257 rows in a box", [](auto& p) { p.box_rows = 257; });
  refused("boxes without rows", [](auto& p) { p.box_rows = 0; });
  refused("a box row beyond the swizzle", [](auto& p) { p.box_cols = 72; });
  refused("a box row of 8 bytes", [](auto& p) { p.box_cols = 4; });
  refused("a swizzle of 64 bytes", [](auto& p) { p.swizzle_bytes = 64; });
  refused("a box row beyond a narrow swizzle", [](auto& p) { p.swizzle_bytes = 32; });
  refused("2^32 columns and one", [](auto& p) {
    p.cols = (uint64_t{1} << 32) + 1;
    p.row_bytes = uint64_t{1} << 34;
  });
  refused("2^32 rows and one", [](auto& p) { p.rows = (uint64_t{1} << 32) + 1; });
  TensorMapParams largest = valid();
  largest.cols = largest.rows = uint64_t{1} << 32;
  largest.row_bytes = (uint64_t{1} << 40) - 16;
  largest.box_rows = 256;
  EXPECT(tensor_map_error(largest).empty(), "%s", tensor_map_error(largest).c_str());
  TensorMapParams small = valid();
  small.cols = 16;
  small.row_bytes = 32;
  small.rows = 3;
  EXPECT(tensor_map_error(small).empty(), "a tensor smaller than its box");
}

template <int kBlockC, int kPCols, WLayout kLayout>
static void boxes_fill_stages() {
  using Config = Sm90Config<kBlockC, kPCols, kLayout>;
  constexpr bool kRowsOfI = kLayout == WLayout::kRowsOfI;
  GemmArguments g{};
  g.layout = kLayout;
  const int64_t m = 1031, c = 776, i = 264, r = 16;
  char memory[16];
  const auto at = [&memory](int64_t rows, int64_t cols) {
    return Matrix{memory, rows, cols, cols};
  };
  g.a = at(m, i);
  g.w = kRowsOfI ? at(c, i) : at(i, c);
  g.thin_in = kRowsOfI ? at(r, i) : at(i, r);
  g.thin_out = kRowsOfI ? at(c, r) : at(r, c);
  g.p = at(m, r);
  g.out = at(m, c);
  const GemmMapParams maps = gemm_map_params(g, kBlockC);
  const int w_boxes = kRowsOfI ? 1 : kBlockC / 64;
  EXPECT(static_cast<int>(box_bytes(maps.a)) == Config::kHalfABytes, "half of a");
  EXPECT(static_cast<int>(box_bytes(maps.p)) == Config::kHalfABytes, "P takes a's place");
  EXPECT(static_cast<int>(box_bytes(maps.w)) * w_boxes == Config::kWBytes, "w");
  EXPECT(static_cast<int>(box_bytes(maps.thin_out)) * w_boxes == Config::kWBytes, "thin_out");
  if (kPCols) EXPECT(static_cast<int>(box_bytes(maps.thin_in)) == Config::kThinInBytes, "thin_in");
  if (!kRowsOfI)
    EXPECT(static_cast<int>(box_bytes(maps.w)) == Config::kChunkBytes, "a chunk of columns");
  EXPECT(static_cast<int>(box_bytes(maps.out)) == Config::kPieceBytes, "a piece of out");
  EXPECT(Config::kABytes + Config::kWBytes + Config::kThinInBytes == Config::kStageBytes, "stage");
  EXPECT(Config::kSmemBytes <= kSm90SmemLimit, "%d bytes", Config::kSmemBytes);
  for (const TensorMapParams& map :
       {maps.a, maps.w, maps.thin_in, maps.p, maps.thin_out, maps.out}) {
    TensorMapParams aligned = map;
    aligned.address = 0x1000;
    EXPECT(tensor_map_error(aligned).empty(), "%s", tensor_map_error(aligned).c_str());
  }
  std::printf("block_c %d, %d columns of P, %s: %d stages of %d bytes, %d bytes in all\n", kBlockC,
              kPCols, kRowsOfI ? "rows of I" : "rows of C", Config::kStages, Config::kStageBytes,
              Config::kSmemBytes);
}

static void choices() {
  const Device h200{132, 90};
  const Device a100{108, 80};
  GemmArguments g{};
  const auto at = [](uintptr_t address, int64_t rows, int64_t cols) {
    return Matrix{reinterpret_cast<void*>(address), rows, cols, cols};
  };
  g.a = at(0x1000, 12608, 768);
  g.w = at(0x2000, 2304, 768);
  g.out = at(0x3000, 12608, 2304);
  const GemmChoice choice = choose_gemm(g, h200);
  EXPECT(choice.sm90 && choice.block == 192, "a layer of ViT-B");
  EXPECT(can_compute_p(choice, 16) && !can_compute_p(choice, 32), "the rank of P");
  EXPECT(!choose_gemm(g, a100).sm90 && !can_compute_p(choose_gemm(g, a100), 16), "another GPU");
  GemmArguments shifted = g;
  shifted.a = at(0x1002, 12608, 768);
  EXPECT(!choose_gemm(shifted, h200).sm90, "a misaligned view");
  GemmArguments odd = g;
  odd.out = at(0x3000, 12608, 2303);
  EXPECT(!choose_gemm(odd, h200).sm90, "rows of 4606 bytes");
  GemmArguments repeated = g;
  repeated.a.stride = 0;
  EXPECT(!choose_gemm(repeated, h200).sm90, "an expanded x");
}

int main() {
  limits();
  boxes_fill_stages<128, 0, WLayout::kRowsOfI>();
  boxes_fill_stages<128, 0, WLayout::kRowsOfC>();
  boxes_fill_stages<192, 0, WLayout::kRowsOfI>();
  boxes_fill_stages<192, 0, WLayout::kRowsOfC>();
  boxes_fill_stages<128, 16, WLayout::kRowsOfI>();
  boxes_fill_stages<128, 16, WLayout::kRowsOfC>();
  boxes_fill_stages<192, 16, WLayout::kRowsOfI>();
  boxes_fill_stages<192, 16, WLayout::kRowsOfC>();
  choices();
  return failures() != 0;
}
