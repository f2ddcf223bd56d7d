#include "tensors.h"

#include <torch/csrc/stable/ops.h>

#include <array>
#include <stdexcept>

namespace efft_kernels::cuda {
namespace {

const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    default:
      return "another dtype";
  }
}

}  // namespace

Dtype dtype_of(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  return type == ScalarType::Half       ? Dtype::kHalf
         : type == ScalarType::BFloat16 ? Dtype::kBfloat16
                                        : Dtype::kFloat;
}

TensorInfo info(const char* name, const Tensor& t) {
  TensorInfo result{name, true, name_of(t.scalar_type())};
  result.device = t.is_cuda()  ? "cuda:" + std::to_string(t.get_device_index())
                  : t.is_cpu() ? "cpu"
                               : "another device";
  const auto shape = t.sizes();
  const auto stride = t.strides();
  result.shape = {shape.data(), shape.size()};
  result.stride = {stride.data(), stride.size()};
  return result;
}

TensorInfo info(const char* name, const std::optional<Tensor>& t) {
  return t ? info(name, *t) : TensorInfo{name};
}

void require(const std::string& error) {
  if (!error.empty()) throw std::runtime_error("efft_kernels: " + error);
}

Matrix matrix(const Tensor& t) {
  return {t.data_ptr(), t.size(0), t.size(1), t.size(0) > 1 ? t.stride(0) : aligned_row(t.size(1))};
}

Strided strided(const Tensor& t) {
  Strided result{t.data_ptr(), dtype_of(t), {0, 0, 0}};
  for (int64_t i = 0; i < t.dim(); ++i) result.stride[i] = t.stride(i);
  return result;
}

// Not torch::stable::new_empty, which looks its operator up by name and boxes the arguments: a
// backward makes ten tensors.
Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
  int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  int32_t layout = 0;
  int32_t device_type = 0;
  int32_t device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(like.get(), &layout));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle result = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_aten_new_empty(like.get(), shape.begin(), static_cast<int64_t>(shape.size()),
                                &dtype, &layout, &device_type, device_index, nullptr, &result));
  return Tensor(result);
}

Tensor or_empty(const std::optional<Tensor>& t, const Tensor& like) {
  return t ? *t : empty(like, {0}, like.scalar_type());
}

Tensor torch_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x),
                                    torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace efft_kernels::cuda
