#include "chain/sizes.h"
#include "common/device_guard.h"
#include "common/launchers.h"
#include "ops.h"
#include "tensors.h"

// What a chain does between its GEMMs: the operands' checks, and one launch each.
namespace efft_kernels::cuda {
namespace {

std::string sized(std::initializer_list<int64_t> shape) { return shown(Extents(shape)); }

// What is wrong with an operand that the kernels read as it lies in memory.
std::string check_operand(const char* name, const Tensor& t, const Tensor& like,
                          std::string_view dtype, std::initializer_list<int64_t> shape) {
  const TensorInfo got = info(name, t);
  if (got.dtype != dtype) return must_be(got, std::string(dtype), got.dtype);
  if (got.device != info("", like).device)
    return must_be(got, "on " + info("", like).device, got.device);
  if (!(got.shape == Extents(shape))) return must_be(got, sized(shape), shown(got.shape));
  if (!t.is_contiguous()) return must_be(got, "contiguous", "strides " + shown(got.stride));
  if (const auto beyond = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16; beyond != 0)
    return must_be(got, "at a multiple of 16 bytes", std::to_string(beyond) + " bytes beyond one");
  return {};
}

std::string check_thin(const char* name, const Tensor& t) {
  const TensorInfo got = info(name, t);
  if (!is_half(got)) return must_be(got, "float16 or bfloat16", got.dtype);
  if (got.shape.size() != 2 || got.shape[1] < 1 || got.shape[1] > kChainRank)
    return must_be(got, "a matrix of 1 to " + std::to_string(kChainRank) + " columns",
                   shown(got.shape));
  return {};
}

// `most`: columns.
std::string check_stream(const char* name, const Tensor& z, int64_t most) {
  const TensorInfo got = info(name, z);
  if (got.shape.size() != 2 || !chain_takes(got.shape[1], most))
    return must_be(got, "[M, K] with K a multiple of 64 up to " + std::to_string(most),
                   shown(got.shape));
  return {};
}

template <class... Texts>
void require_all(const Texts&... texts) {
  (require(texts), ...);
}

float* floats(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

int64_t programs_for(int64_t m, int tile_rows, int64_t k) {
  Device device;
  check_cuda(current_device(&device));
  return chain_programs(m, tile_rows, k, device.multiprocessors);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> native_norm(Tensor z, std::optional<Tensor> y,
                                                               Tensor weight, Tensor bias,
                                                               Tensor down, double eps) {
  require_all(check_stream("z", z, kNormMostWidth), check_thin("down", down));
  const int64_t m = z.size(0), k = z.size(1), rank = down.size(1);
  const std::string_view half = info("down", down).dtype;
  require_all(check_operand("z", z, z, "float32", {m, k}),
              check_operand("weight", weight, z, "float32", {k}),
              check_operand("bias", bias, z, "float32", {k}),
              check_operand("down", down, z, half, {k, rank}));
  if (y) require(check_operand("y", *y, z, half, {m, k}));
  const OnDeviceOf here(z);
  const ScalarType type = down.scalar_type();
  const Tensor z_out = empty(z, {y ? m : 0, k}, ScalarType::Float);
  const Tensor out = empty(z, {m, k}, type), p = empty(z, {m, rank}, type);
  const Tensor mean = empty(z, {m}, ScalarType::Float), rstd = empty(z, {m}, ScalarType::Float);
  if (m > 0) {
    NormArguments a{};
    a.dtype = dtype_of(down);
    a.z = floats(z);
    a.y = y ? y->data_ptr() : nullptr;
    a.weight = floats(weight);
    a.bias = floats(bias);
    a.down = down.data_ptr();
    a.z_out = floats(z_out);
    a.out = out.data_ptr();
    a.p = p.data_ptr();
    a.mean = floats(mean);
    a.rstd = floats(rstd);
    a.rows = m;
    a.width = k;
    a.programs = programs_for(m, kNormRows, k);
    a.rank = static_cast<int>(rank);
    a.eps = static_cast<float>(eps);
    check_cuda(launch_norm(a, here.stream()));
  }
  return {z_out, out, p, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> native_norm_grad(
    Tensor dout, Tensor z, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, Tensor residual,
    Tensor s, std::optional<Tensor> b, std::optional<Tensor> p) {
  require_all(check_stream("z", z, b ? kBeforeMostWidth : kNormMostWidth), check_thin("s", s));
  const int64_t m = z.size(0), k = z.size(1), rank = s.size(1);
  const std::string_view half = info("s", s).dtype;
  require_all(check_operand("z", z, z, "float32", {m, k}),
              check_operand("dout", dout, z, half, {m, k}),
              check_operand("mean", mean, z, "float32", {m}),
              check_operand("rstd", rstd, z, "float32", {m}),
              check_operand("weight", weight, z, "float32", {k}),
              check_operand("bias", bias, z, "float32", {k}),
              check_operand("residual", residual, z, "float32", {m, k}),
              check_operand("s", s, z, half, {m, rank}));
  require(b || !p ? "" : "b must be given where p is, got none");
  if (b) {
    require(p ? "" : "p must be given where b is, got none");
    require(check_thin("b", *b));
    require_all(check_operand("b", *b, z, half, {k, b->size(1)}),
                check_operand("p", *p, z, half, {m, b->size(1)}));
  }
  const int64_t rank_before = b ? b->size(1) : 0;
  const OnDeviceOf here(z);
  const int64_t programs = m > 0 ? programs_for(m, kNormRows, k) : 0;
  const Tensor dz = empty(z, {m, k}, ScalarType::Float);
  const Tensor dy = empty(z, {m, k}, dout.scalar_type());
  const Tensor partial = empty(z, {programs, k, kChainRank}, ScalarType::Float);
  const Tensor s_before = empty(z, {m, rank_before}, s.scalar_type());
  const Tensor sum_b = empty(z, {b ? programs : 0, k, kChainRank}, ScalarType::Float);
  if (m > 0) {
    NormGradArguments a{};
    a.dtype = dtype_of(dout);
    a.dout = dout.data_ptr();
    a.z = floats(z);
    a.mean = floats(mean);
    a.rstd = floats(rstd);
    a.weight = floats(weight);
    a.bias = floats(bias);
    a.residual = floats(residual);
    a.s = s.data_ptr();
    a.dz = floats(dz);
    a.dy = dy.data_ptr();
    a.partial = floats(partial);
    a.rows = m;
    a.width = k;
    a.programs = programs;
    a.rank = static_cast<int>(rank);
    if (b) {
      a.b = b->data_ptr();
      a.p = p->data_ptr();
      a.s_before = s_before.data_ptr();
      a.sum_b = floats(sum_b);
      a.rank_before = static_cast<int>(rank_before);
    }
    check_cuda(launch_norm_grad(a, here.stream()));
  }
  return {dz, dy, partial, s_before, sum_b};
}

std::tuple<Tensor, Tensor> native_gelu(Tensor h, Tensor down) {
  require_all(check_stream("h", h, kGeluValueMostWidth), check_thin("down", down));
  const int64_t m = h.size(0), c = h.size(1), rank = down.size(1);
  const std::string_view half = info("down", down).dtype;
  require_all(check_operand("h", h, h, half, {m, c}),
              check_operand("down", down, h, half, {c, rank}));
  const OnDeviceOf here(h);
  const Tensor value = empty(h, {m, c}, h.scalar_type());
  const Tensor p = empty(h, {m, rank}, h.scalar_type());
  if (m > 0) {
    Device device;
    check_cuda(current_device(&device));
    GeluArguments a{};
    a.dtype = dtype_of(h);
    a.h = h.data_ptr();
    a.down = down.data_ptr();
    a.a = value.data_ptr();
    a.p = p.data_ptr();
    a.rows = m;
    a.width = c;
    a.programs = gelu_value_programs(m, device.multiprocessors);
    a.rank = static_cast<int>(rank);
    check_cuda(launch_gelu(a, here.stream()));
  }
  return {value, p};
}

std::tuple<Tensor, Tensor, Tensor> native_gelu_grad(Tensor da, Tensor h, Tensor s, Tensor b,
                                                    Tensor p) {
  require_all(check_stream("h", h, kGeluMostWidth), check_thin("s", s), check_thin("b", b));
  const int64_t m = h.size(0), c = h.size(1), before = b.size(1), after = s.size(1);
  const std::string_view half = info("s", s).dtype;
  require_all(check_operand("h", h, h, half, {m, c}), check_operand("da", da, h, half, {m, c}),
              check_operand("s", s, h, half, {m, after}),
              check_operand("b", b, h, half, {c, before}),
              check_operand("p", p, h, half, {m, before}));
  const OnDeviceOf here(h);
  int64_t programs = 0;
  if (m > 0) {
    Device device;
    check_cuda(current_device(&device));
    programs = gelu_programs(m, c, device.multiprocessors);
  }
  const Tensor sum_s = empty(h, {gelu_parts(c), m, kChainRank}, ScalarType::Float);
  const Tensor sum_b = empty(h, {programs, c, kChainRank}, ScalarType::Float);
  const Tensor sum_down = empty(h, {programs, c, kChainRank}, ScalarType::Float);
  if (m > 0) {
    GeluGradArguments a{};
    a.dtype = dtype_of(h);
    a.da = da.data_ptr();
    a.h = h.data_ptr();
    a.s = s.data_ptr();
    a.b = b.data_ptr();
    a.p = p.data_ptr();
    a.sum_s = floats(sum_s);
    a.sum_b = floats(sum_b);
    a.sum_down = floats(sum_down);
    a.rows = m;
    a.width = c;
    a.programs = programs;
    a.rank_before = static_cast<int>(before);
    a.rank_after = static_cast<int>(after);
    check_cuda(launch_gelu_grad(a, here.stream()));
  }
  return {sum_s, sum_b, sum_down};
}

std::tuple<Tensor, Tensor> native_pair_grad(Tensor x, Tensor dy, Tensor down, Tensor b) {
  require_all(check_stream("x", x, kPairMostWidth), check_thin("down", down));
  const int64_t m = x.size(0), k = x.size(1), rank = down.size(1);
  const std::string_view half = info("down", down).dtype;
  require_all(check_operand("x", x, x, half, {m, k}), check_operand("dy", dy, x, half, {m, k}),
              check_operand("down", down, x, half, {k, rank}),
              check_operand("b", b, x, half, {k, rank}));
  const OnDeviceOf here(x);
  const int64_t programs = m > 0 ? programs_for(m, kPairRows, k) : 0;
  const Tensor d_down = empty(x, {programs, k, kChainRank}, ScalarType::Float);
  const Tensor d_b = empty(x, {programs, k, kChainRank}, ScalarType::Float);
  if (m > 0) {
    PairGradArguments a{};
    a.dtype = dtype_of(x);
    a.x = x.data_ptr();
    a.dy = dy.data_ptr();
    a.down = down.data_ptr();
    a.b = b.data_ptr();
    a.d_down = floats(d_down);
    a.d_b = floats(d_b);
    a.rows = m;
    a.width = k;
    a.programs = programs;
    a.rank = static_cast<int>(rank);
    check_cuda(launch_pair_grad(a, here.stream()));
  }
  return {d_down, d_b};
}

}  // namespace efft_kernels::cuda
