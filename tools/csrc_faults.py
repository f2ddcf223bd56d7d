"""The faults that tools/mutate_csrc.py tries, by the test that is to notice each."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """`right`, found once in a file of csrc, becomes `wrong`; in csrc/cpu, in the kernels for one
    instruction set. The baseline's are compiled in 3 seconds, and run everywhere."""

    file: str
    right: str
    wrong: str
    isa: str = "baseline"


PAIRS = "avx512_bf16"  # which alone multiplies bfloat16 two at a time


# Program of tests/csrc, by what follows `test_` in its name, or file of tests → faults for it.
FAULTS: dict[str, tuple[Fault, ...]] = {
    "checks": (
        Fault(
            "cuda/checks.h",
            "t.shape[1] > 1 && t.stride[1] != 1",
            "t.shape[1] > 1 && t.stride[0] < 1",
        ),
        Fault("cuda/checks.h", "q.down.shape[1] > kMaxRank", "q.down.shape[1] > kMaxRank + 1"),
        Fault("cuda/checks.h", "q.down.shape[1] > kMaxRank", "q.down.shape[1] >= kMaxRank"),
        Fault("cuda/checks.h", "{&q.rows, &q.weight, &q.x, &q.p}", "{&q.rows, &q.weight, &q.x}"),
        Fault("cuda/checks.h", "{&q.rows, &q.weight, &q.x, &q.p}", "{&q.rows, &q.weight, &q.p}"),
        Fault("cuda/checks.h", "t->present && t->dtype != q.down.dtype", "false"),
        Fault("cuda/checks.h", "slices < 1 || n % slices", "slices < 1"),
        Fault("cuda/checks.h", "q.up.shape[1] != n / slices ||", ""),
        Fault("cuda/checks.h", "t->present && t->device != q.rows.device", "false"),
    ),
    "ring": (Fault("cuda/common/ring.h", "parity ^= 1;", ""),),
    "schedule": (
        Fault("cuda/gemm/schedule.h", "rows - first < kGroup ? rows - first : kGroup", "kGroup"),
        Fault("cuda/gemm/schedule.h", "ceil_div(c, block_c) % 2 == 0", "ceil_div(c, block_c) > 0"),
        Fault("cuda/gemm/select.h", "wide <= narrow", "wide < narrow"),
        Fault("cuda/gemm/select.h", "* (kSm90WideBlockC + 32)", "* kSm90WideBlockC"),
        Fault("cuda/gemm/select.h", "return 4 * ceil_div", "return 2 * ceil_div"),
    ),
    "swizzle": (
        Fault("cuda/common/swizzle.h", "kCols == 16 ? 2 : kCols == 32 ? 1 : 0", "0"),
        Fault("cuda/common/swizzle.h", "lane / 4 + e / 2 * 8", "lane / 4 + e % 2 * 8"),
        Fault("cuda/common/swizzle.h", "(address >> 7 & 1) << 4", "(address >> 8 & 1) << 4"),
    ),
    "tensor_map": (
        Fault("cuda/gemm/tma.h", "p.row_bytes % 16", "p.row_bytes % 8"),
        Fault("cuda/gemm/tma.h", "p.box_rows > 256", "p.box_rows > 255"),
        Fault("cuda/gemm/tma.h", "p.row_bytes < p.cols * kElementBytes", "false"),
        Fault("cuda/gemm/tma.h", "p.address % 16", "p.address % 8"),
    ),
    "workspace": (
        Fault("cuda/passes/sizes.h", "if (wanted < 1) wanted = 1;", ""),
        Fault("cuda/passes/sizes.h", "ceil_div(m, 256)", "ceil_div(m, 128)"),
        Fault("cuda/passes/sizes.h", "int64_t wanted = 4 *", "int64_t wanted = 5 *"),
        Fault("cuda/passes/sizes.h", "while (padded < rank)", "while (padded <= rank)"),
    ),
    "thin": (
        Fault(
            "cuda/passes/reduce.cu",
            "other = 1; other < kReduceLanes",
            "other = 2; other < kReduceLanes",
        ),
        Fault("cuda/passes/reduce.cu", "other = 1; other < kReduceLanes;", "other = 1; other < 8;"),
        Fault("cuda/passes/reduce.cu", "from += kReduceInFlight * step;", "from += step;"),
        Fault(
            "cuda/passes/pass.cuh", "r < t.rank ? s[j][half * 2 + e] : 0.0f", "s[j][half * 2 + e]"
        ),
        Fault("cuda/passes/pass.cuh", "if (row >= t.rows) continue;", ""),
        Fault(
            "cuda/passes/thin_grad.cu",
            "first ? part[i + 2] : column[8] + part[i + 2]",
            "part[i + 2]",
        ),
        Fault(
            "cuda/passes/thin_grad.cu",
            "if (c + i >= t.tall.cols) continue;",
            "if (c >= t.tall.cols) continue;",
        ),
        Fault(
            "cuda/passes/tall_grad.cu", "left < t.rows_per_split ? left : t.rows_per_split", "left"
        ),
    ),
    "factors": (
        Fault("cuda/factors/fold.cu", "a < f.ra ? to_float(*", "a <= f.ra ? to_float(*"),
        Fault("cuda/factors/fold.cu", "to_float(core[b * f.core.stride[2]])", "to_float(core[b])"),
        Fault("cuda/factors/unfold.cu", "u.shared ? u.slices : first + 1", "first + 1"),
        Fault(
            "cuda/factors/unfold.cu", "n + row * kRowShares < u.slice_n ? row * kRowShares : 0", "0"
        ),
        Fault(
            "cuda/factors/unfold.cu",
            "for (int i = 1; i < kGroups; ++i) total",
            "for (int i = 2; i < kGroups; ++i) total",
        ),
        Fault("cuda/factors/unfold.cu", "u.up.stride[2] == 1 &&", ""),
    ),
    "norm": (
        Fault("cuda/chain/norm.cu", "kChainCols * apart * apart", "apart * apart"),
        Fault("cuda/chain/rows.cuh", "row >= rows || r >= rank", "row >= rows"),
        Fault("cuda/chain/norm.cu", "z[chunk][j] += y[j]", "z[chunk][j] += y[0]"),
        Fault("cuda/chain/norm.cu", "turn ^= 1;", ""),
        Fault("cuda/chain/norm_grad.cu", "row + i < p.rows;", "row < p.rows;"),
        Fault(
            "cuda/chain/norm_grad.cu",
            "{total.y * of_width, total.w",
            "{total.y * of_width, total.y",
        ),
        Fault("cuda/chain/norm_grad.cu", "- n[kept][i][j] * mean_gn[i]", ""),
        Fault(
            "cuda/chain/norm_grad.cu",
            "next = load_rows<T, kBefore>(p, int64_t{tile",
            "load_rows<T, kBefore>(p, int64_t{tile",
        ),
        Fault("cuda/chain/norm_grad.cu", "w >= warps", "w > 8"),
        Fault("cuda/chain/norm_grad.cu", "if (pair * 2 + i < left)", "if (pair * 2 < left)"),
        Fault(
            "cuda/chain/rows.cuh", "thin_at<T>(thin, c + 4, cols", "thin_at<T>(thin, c + 1, cols"
        ),
        Fault("cuda/chain/norm_grad.cu", "thin_at<T>(p.p, row + 1, p", "thin_at<T>(p.p, row, p"),
        Fault(
            "cuda/chain/norm_grad.cu",
            "b[block][1], transposed(dy[2])",
            "b[block][0], transposed(dy[2])",
        ),
        Fault("cuda/chain/norm_grad.cu", "transposed(dy[2]), transposed(dy[3])", "dy[2], dy[3]"),
        Fault(
            "cuda/chain/norm_grad.cu",
            "put_thin(parts + turn * one_turn +",
            "put_thin(parts +",
        ),
        Fault(
            "cuda/chain/norm_grad.cu",
            "    __syncthreads();\n    if (tile >= blocks)",
            "    if (tile >= blocks)",
        ),
        Fault(
            "cuda/chain/norm_grad.cu",
            "tile >= blocks)\n        store",
            "tile > blocks)\n        store",
        ),
    ),
    "gelu": (
        Fault("cuda/chain/gelu_grad.cu", "k + i / 2 * 8 < left && r", "r"),
        Fault("cuda/chain/gelu_grad.cu", "rank % 2 == 0", "true"),
        Fault("cuda/chain/gelu_grad.cu", "s[i] = transposed(next_s[i])", "s[i] = next_s[i]"),
        Fault("cuda/chain/gelu_grad.cu", "row >= p.rows", "false"),
        Fault("cuda/chain/gelu_grad.cu", "pair * 2 + r < left", "true"),
        Fault("cuda/chain/gelu_grad.cu", "thin, y[0][j], y[1][j]", "thin, y[1][j], y[0][j]"),
        Fault("cuda/chain/gelu_grad.cu", "b[block][i], transposed", "b[block][0], transposed"),
        Fault("cuda/chain/gelu_grad.cu", "8 * kThinRow, product[1]", "8 * kThinRow, product[0]"),
        Fault("cuda/chain/gelu_grad.cu", "    __syncthreads();\n", ""),
        Fault("cuda/chain/gelu_grad.cu", "turn ^= 1;", ""),
        Fault("cuda/chain/gelu_grad.cu", "of_warps, i, active", "of_warps, i, warps"),
        Fault("cuda/chain/gelu.cu", "next_chunk = warp, next_tile", "next_tile"),
        Fault("cuda/chain/gelu.cu", "lane / 8 * 4 + lane / 4 % 2 + i", "lane / 4 + i"),
        Fault("cuda/chain/gelu.cu", "lane % 4 * 4 + i / 2 * 2, r", "lane % 4 * 2 + i / 2 * 8, r"),
        Fault("cuda/chain/gelu.cu", "  __syncthreads();\n\n", "\n"),
        Fault("cuda/chain/gelu.cu", "    __syncthreads();\n    store", "    store"),
        Fault("cuda/chain/gelu.cu", "turn ^= 1;", ""),
        Fault("cuda/chain/gelu.cu", "r < left", "true"),
        Fault("cuda/chain/gelu.cu", "(next_chunk - warp)", "next_chunk"),
        Fault("cuda/chain/gelu.cu", "stage == 0 ? kStages - 1 : stage - 1", "stage"),
        Fault("cuda/chain/gelu.cuh", "h < 0.0f ? tail : 1.0f - tail", "1.0f - tail"),
        Fault("cuda/chain/gelu.cuh", "fabsf(h)", "h"),
        Fault(
            "cuda/chain/sizes.h",
            "tiles < most ? tiles : most < 1 ? 1 : most",
            "most < 1 ? 1 : most",
        ),
    ),
    "pair_grad": (
        Fault("cuda/chain/pair_grad.cu", "lane / 4 + i % 2 * 8", "lane / 4 + i / 2 * 8"),
        Fault("cuda/chain/pair_grad.cu", "inside ? 16 : 0", "16"),
        Fault("cuda/chain/pair_grad.cu", "operands[32 + lane], x", "operands[lane], x"),
        Fault("cuda/chain/pair_grad.cu", "d_b, operands[lane], dy", "d_b, operands[lane], x"),
        Fault("cuda/chain/pair_grad.cu", "part[i / 4][i / 2 % 2]", "part[i / 4][0]"),
        Fault("cuda/chain/pair_grad.cu", "for (int w = 1; w < warps", "for (int w = 2; w < warps"),
        Fault("cuda/chain/pair_grad.cu", "__syncthreads();\n    for", "for"),
        Fault("cuda/chain/pair_grad.cu", "__syncthreads();\n    const uint4", "const uint4"),
        Fault("cuda/chain/pair_grad.cu", "kPairStages - 1 ? 0 : stage + 1", "1 ? 0 : stage + 1"),
        Fault("cuda/chain/sizes.h", "ceil_div(rows, tile_rows)", "rows / tile_rows"),
    ),
    "ops/backends/cpp/test_values.py": (
        # microkernel.h, thin.h: the products
        Fault("cpu/microkernel.h", "std::min(kChain, first.depth - k)", "kChain"),
        Fault("cpu/microkernel.h", "add = true;", ""),
        Fault("cpu/thin.h", "b.data + k * b.stride + whole,", "b.data + whole,"),
        Fault("cpu/thin.h", "add({edge, lanes}, 1, c + whole);", "add({edge, lanes}, 1, c);"),
        Fault("cpu/thin.h", "b.data += kTransposedChain * b.stride;", ""),
        # pack.h: the weight beyond one step of the inner dimension
        Fault("cpu/pack.h", "read_row(w, n0 + n + i, k0 + k,", "read_row(w, n0 + n + i, k,"),
        Fault("cpu/pack.h", "thin_in + (k + i) * width", "thin_in + i * width"),
        # product.h, tiling.h: the main product's ranges, tiles and steps
        Fault("cpu/product.h", "k > 0 && r < count", "k == 0 && r < count"),
        Fault("cpu/product.h", "k + depth == w.inner && tail.data", "tail.data"),
        Fault("cpu/microkernel.h", "bias != nullptr ? load", "false ? load"),
        Fault("cpu/product.h", "(begin + tile.first) * w.columns", "tile.first * w.columns"),
        Fault("cpu/product.h", "out, begin + tile.first + row,", "out, tile.first + row,"),
        Fault("cpu/product.h", "std::min(M, begin + range_rows)", "begin + range_rows"),
        Fault("cpu/tiling.h", "std::min(height_, rows_ - first)", "height_"),
        Fault("cpu/tiling.h", "std::min(across_, padded_ - column)", "across_"),
        Fault("cpu/tiling.h", "i / high_ * across_", "i / high_ * kPanel<T>"),
        # pairs.h: bfloat16 two at a time
        Fault("cpu/pairs.h", "load_halves(below) << 16", "load_halves(row) << 16", PAIRS),
        Fault("cpu/pairs.h", "if (2 * i < across)", "if (2 * i + 2 < across)", PAIRS),
        Fault("cpu/pairs.h", "row += 2 * w.row_stride;", "row += w.row_stride;", PAIRS),
        Fault("cpu/pack.h", "DType::kFloat64 && inner % 2 == 0", "DType::kFloat64", PAIRS),
        Fault("cpu/pairs.h", "k + 1 < depth ? row + w", "true ? row + w", PAIRS),
        Fault("cpu/pack.h", "(rank + 1) / 2 : rank", "rank / 2 : rank", PAIRS),
        Fault("cpu/product.h", "w.inner <= kDepth * Element", "true || w.inner <= Element", PAIRS),
        Fault(
            "cpu/product.h",
            "first * a.row_stride, a.row_stride};\n  }\n\n  // thin_in",
            "0, a.row_stride};\n  }\n\n  // thin_in",
            PAIRS,
        ),
        Fault("cpu/backward.h", "many + j * steps;", "many;", PAIRS),
        Fault("cpu/made_rows.h", "out + j * steps + i / 2 * across", "out + i / 2 * across", PAIRS),
        Fault(
            "cpu/backward.h",
            "across, args.N - j), across, first,",
            "across, args.N - j), across, 0,",
            PAIRS,
        ),
        Fault(
            "cpu/backward.h",
            "across, args.K - j), across, first,",
            "across, args.K - j), across, 0,",
            PAIRS,
        ),
        # factors.h: the fold and the chain rule through it
        Fault("cpu/factors.h", "to, g != set)", "to, false)"),
        Fault("cpu/factors.h", "G * Ra * thin.rb * sizeof(T)", "Ra * thin.rb * sizeof(T)"),
        # forward.h, backward.h: blocks, slots and what is wanted
        Fault("cpu/forward.h", "make_p = args.p || !merge", "make_p = !merge"),
        Fault("cpu/forward.h", "make_p = args.p || !merge", "make_p = args.p ? true : false"),
        Fault("cpu/forward.h", "make_p || product.a_scratch != nullptr", "make_p"),
        Fault("cpu/backward.h", "args.d_down || (args.dx && !merge)", "bool(args.d_down)"),
        Fault("cpu/backward.h", "width, s, n > 0);", "width, s, true);"),
        Fault("cpu/backward.h", "clear(memory.d_b_t, slot, args.N);", ""),
        Fault("cpu/backward.h", "for (int64_t slot = 0; slot", "for (int64_t slot = 1; slot"),
        Fault("cpu/backward.h", "(slot * Ra + r + i) * padded", "(slot * Ra + r) * padded"),
        # storage.h, ops.cpp: what the operands are
        Fault(
            "cpu/storage.h", "columns == width && matrix.row_stride == width", "columns == width"
        ),
        Fault(
            "cpu/ops.cpp",
            "need_down = needs & kNeedDown, need_up = needs & kNeedUp",
            "need_down = needs & kNeedUp, need_up = needs & kNeedDown",
        ),
        Fault("cpu/ops.cpp", "i < count; i = next", "i + 1 < count; i = next"),
    ),
    "ops/backends/cpp/test_numerics.py": (
        Fault(
            "cpu/storage.h",
            "bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;\n  return",
            "bits + 0x8000u) >> 16;\n  return",
        ),
        Fault(
            "cpu/storage.h",
            "bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;\n  const",
            "bits + 0x8000u) >> 16;\n  const",
        ),
        Fault("cpu/storage.h", "(rounded & kept) | (0x7fc0u & ~kept)", "rounded"),
        Fault("cpu/product.h", "w.in_pairs() && !merged", "w.in_pairs()", PAIRS),
        Fault("cpu/product.h", "if (rank % 2 == 1) to[rank] = 0;", "", PAIRS),
        Fault("cpu/storage.h", "value != value ? 0x7fc0u : rounded", "rounded"),
        Fault(
            "cpu/ops.cpp",
            "return torch::stable::to(tensor, ScalarType::Float);",
            "return torch::stable::to(tensor, ScalarType::BFloat16);",
        ),
    ),
    "ops/backends/cpp/test_refusals.py": (
        Fault("cpu/ops.cpp", "N % factors.G == 0 &&", ""),
        Fault("cpu/ops.cpp", "core->size(1) == factors.Ra && core", "core"),
        Fault(
            "cpu/ops.cpp",
            'args.K && is_readable(x->scalar_type())),\n          "x"',
            'args.K),\n          "x"',
        ),
        Fault("cpu/ops.cpp", "row >= -1 && row < kept", "row < kept"),
        Fault("cpu/ops.cpp", "row >= -1 && row < kept", "row >= -1"),
        Fault("cpu/ops.cpp", "given->numel() == size && ", ""),
        Fault("cpu/ops.cpp", "require(mean && rstd,", "require(mean || rstd,"),
    ),
    "ops/test_mixed_batch.py": (
        Fault("cpu/mixed_batch.h", "(item + 1) * args.rows - begin}", "(item + 1) * args.rows}"),
        Fault("cpu/mixed_batch.h", "(begin + row) / args.rows;", "row / args.rows;"),
        Fault("cpu/mixed_batch.h", "first + rows) - row;", "begin + rows) - row;"),
        Fault(
            "cpu/mixed_batch.h",
            "task_of_item[item] * tail_numbers",
            "task_of_item[0] * tail_numbers",
        ),
        Fault(
            "cpu/mixed_batch.h",
            "task_of_item[item] * thin_in_numbers",
            "task_of_item[0] * thin_in_numbers",
        ),
        Fault(
            "cpu/mixed_batch.h", "memory.thin_in + task * thin_in_numbers", "memory.thin_in", PAIRS
        ),
        Fault("cpu/ops.cpp", "args.task_of_item[item] >= 0 && ", ""),
        Fault("cpu/ops.cpp", "rows = torch::stable::contiguous(x);", "rows = x;"),
    ),
    "ops/test_recompute.py": (
        Fault("cpu/made_rows.h", ": index[first + i];", ": index[i];"),
        Fault("cpu/made_rows.h", "std::fill_n(row, K, T(0));", ""),
        Fault(
            "cpu/made_rows.h",
            "make(rows_of(kept, from, 1, K, row).data, from,",
            "make(rows_of(kept, from, 1, K, row).data, first + i,",
        ),
        Fault("entry/node.cpp", "in_python = !rows.defined();", ""),
        Fault("cpu/made_rows.h", "row[k] += bias[k];", "(void)bias[k];"),
        Fault("cpu/made_rows.h", "out + j * steps + i / 2 * across", "out + j * steps", PAIRS),
        Fault("cpu/made_rows.h", "0.797884561f", "0.79788f"),
        Fault("entry/node.cpp", "!(needs & kNeedWeight) &&", ""),
        Fault("entry/node.cpp", "    check_in_memory(source);", ""),
        Fault("entry/node.cpp", "source.attached || !at::GradMode::is_enabled()", "true"),
        Fault("entry/python_backend.cpp", ".reshape({-1, K}).to(dtype)", ".reshape({-1, K})"),
    ),
    "ops/entry/test_refusals.py": (
        Fault(
            "entry/entry.cpp", "(t.bias->dim() != 1 || t.bias->size(0) != N)", "t.bias->dim() != 1"
        ),
        Fault("entry/entry.cpp", "(factor && own == at::kFloat", "(own == at::kFloat"),
    ),
    "ops/entry/test_autocast.py": (
        Fault(
            "entry/entry.cpp",
            "!autocast || !(x.scalar_type() == at::kFloat || is_half(x.scalar_type()))",
            "!autocast",
        ),
        Fault(
            "entry/node.cpp",
            "const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);",
            "",
        ),
        Fault(
            "entry/node.cpp",
            "at::promote_types(t.weight.scalar_type(), at::kFloat)",
            "t.weight.scalar_type()",
        ),
    ),
    "ops/entry/test_results.py": (
        Fault(
            "entry/entry.cpp",
            "bit(*t.core, kNeedCore) : 0) | bit(t.up, kNeedUp)",
            "bit(*t.core, kNeedUp) : 0) | bit(t.up, kNeedCore)",
        ),
        Fault(
            "entry/node.cpp", "save_p = needs & (kNeedCore | kNeedUp)", "save_p = needs & kNeedUp"
        ),
    ),
    "ops/entry/test_autograd.py": (
        Fault("entry/node.cpp", "!made ? x : Tensor()", "!made ? x.variable_data() : Tensor()"),
        Fault("entry/node.cpp", ": Tensor(), down,", ": Tensor(), down.variable_data(),"),
    ),
    "ops/entry/test_choices.py": (
        Fault("entry/entry.cpp", "(static_cast<int64_t>(t.down.scalar_type()) << 40)", "0"),
        Fault(
            "entry/entry.cpp",
            "t.weight.size(1), G, t.down.size(1)",
            "t.weight.size(1), 0, t.down.size(1)",
        ),
    ),
    "ops/entry/test_routes.py": (
        Fault(
            "entry/entry.cpp",
            "if (at::tracer::impl::is_dispatch_enabled()) return std::nullopt;",
            "",
        ),
    ),
    "ops/test_forward_over_reverse.py": (
        Fault(
            "entry/node.cpp",
            "at::GradMode::is_enabled() || has_tangent(t.dy)",
            "at::GradMode::is_enabled()",
        ),
    ),
}
