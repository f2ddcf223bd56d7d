#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(efft_kernels, CUDA, m) {
  m.impl("native_fwd", TORCH_BOX(&efft_kernels::cuda::native_fwd));
  m.impl("native_bwd", TORCH_BOX(&efft_kernels::cuda::native_bwd));
  m.impl("native_norm", TORCH_BOX(&efft_kernels::cuda::native_norm));
  m.impl("native_norm_grad", TORCH_BOX(&efft_kernels::cuda::native_norm_grad));
  m.impl("native_gelu", TORCH_BOX(&efft_kernels::cuda::native_gelu));
  m.impl("native_gelu_grad", TORCH_BOX(&efft_kernels::cuda::native_gelu_grad));
  m.impl("native_pair_grad", TORCH_BOX(&efft_kernels::cuda::native_pair_grad));
}
