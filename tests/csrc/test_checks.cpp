// The argument checks: what is right passes; what is wrong is named, with what was expected.

#include <vector>

#include "csrc/cuda/checks.h"
#include "expect.h"

using namespace efft_kernels::cuda;

static TensorInfo tensor(const char* name, std::vector<int64_t> shape,
                         const char* dtype = "bfloat16") {
  std::vector<int64_t> stride(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) stride[i - 1] = stride[i] * shape[i];
  return {
      name, true, dtype, "cuda:0", {shape.data(), shape.size()}, {stride.data(), stride.size()}};
}

static Problem forward() {
  Problem q;
  q.rows = tensor("x", {67, 768});
  q.x = {"x"};
  q.p = {"p"};
  q.weight = tensor("weight", {2304, 768});
  q.bias = tensor("bias", {2304});
  q.down = tensor("down", {768, 16});
  q.core = tensor("core", {3, 16, 8});
  q.up = tensor("up", {1, 768, 8});
  return q;
}

static Problem backward() {
  Problem q = forward();
  q.rows = tensor("dy", {67, 2304});
  q.x = tensor("x", {67, 768});
  q.p = tensor("p", {67, 16});
  return q;
}

template <class Change>
static void says(const char* expected, Problem q, bool in_backward, Change change) {
  change(q);
  const std::string error = check(q, in_backward);
  EXPECT(error == expected, "got: %s", error.c_str());
}

int main() {
  EXPECT(check(forward(), false).empty(), "%s", check(forward(), false).c_str());
  EXPECT(check(backward(), true).empty(), "%s", check(backward(), true).c_str());
  says("down must be [K=768, 1 <= Ra <= 128], got (512, 16)", forward(), false,
       [](Problem& q) { q.down = tensor("down", {512, 16}); });
  says("down must be [K=768, 1 <= Ra <= 128], got (768, 131)", forward(), false,
       [](Problem& q) { q.down = tensor("down", {768, 131}); });
  says("down must be [K=768, 1 <= Ra <= 128], got (768, 129)", forward(), false,
       [](Problem& q) { q.down = tensor("down", {768, 129}); });
  says("x must be [M, K=768], got (67, 767)", forward(), false,
       [](Problem& q) { q.rows = tensor("x", {67, 767}); });
  says("dy must be [M, N=2304], got (67, 768)", backward(), true,
       [](Problem& q) { q.rows = tensor("dy", {67, 768}); });
  says("x must be float16 or bfloat16, got float32", forward(), false,
       [](Problem& q) { q.rows.dtype = "float32"; });
  says("weight must be float32, float16 or bfloat16, got float64", forward(), false,
       [](Problem& q) { q.weight.dtype = "float64"; });
  says("up must be down's dtype bfloat16, got float32", forward(), false,
       [](Problem& q) { q.up.dtype = "float32"; });
  says("weight must be on x's device cuda:0, got cuda:1", forward(), false,
       [](Problem& q) { q.weight.device = "cuda:1"; });
  says("bias must be [N=2304], got (768,)", forward(), false,
       [](Problem& q) { q.bias = tensor("bias", {768}); });
  says("core must be [G, Ra=16, Rb], got (3, 8, 16)", forward(), false,
       [](Problem& q) { q.core = tensor("core", {3, 8, 16}); });
  says("core must be of G slices with G dividing N=2304, got (5, 16, 8)", forward(), false,
       [](Problem& q) { q.core = tensor("core", {5, 16, 8}); });
  says("up must be [1 or G=3, N/G=768, Rb=8], got (2, 768, 8)", forward(), false,
       [](Problem& q) { q.up = tensor("up", {2, 768, 8}); });
  says("up must be [G=1, N/G=2304, Rb=16], got (1, 2304, 8)", forward(), false, [](Problem& q) {
    q.core = {"core"};
    q.up = tensor("up", {1, 2304, 8});
  });
  says("p must be [M=67, Ra=16], got (67, 8)", backward(), true,
       [](Problem& q) { q.p = tensor("p", {67, 8}); });
  says("x must be [M=67, K=768], got (66, 768)", backward(), true,
       [](Problem& q) { q.x = tensor("x", {66, 768}); });
  says("p must be contiguous along its last dim, got strides (1, 67)", backward(), true,
       [](Problem& q) { q.p.stride = {1, 67}; });
  says("x must be contiguous along its last dim, got strides (1, 67)", forward(), false,
       [](Problem& q) { q.rows.stride = {1, 67}; });
  says("x must be contiguous along its last dim, got strides (1, 67)", backward(), true,
       [](Problem& q) { q.x.stride = {1, 67}; });
  says("weight must be contiguous along its last dim, got strides (1, 2304)", backward(), true,
       [](Problem& q) { q.weight.stride = {1, 2304}; });
  says("up must be [1 or G=3, N/G=768, Rb=8], got (3, 512, 8)", forward(), false,
       [](Problem& q) { q.up = tensor("up", {3, 512, 8}); });
  // float32 tensors beside half-precision rows, as under autocast; per-slice up; no core.
  Problem mixed = forward();
  for (TensorInfo* t : {&mixed.weight, &mixed.bias, &mixed.down, &mixed.core, &mixed.up})
    t->dtype = "float32";
  EXPECT(check(mixed, false).empty(), "%s", check(mixed, false).c_str());
  Problem widest = forward();
  widest.down = tensor("down", {768, 128});
  widest.core = tensor("core", {3, 128, 8});
  EXPECT(check(widest, false).empty(), "%s", check(widest, false).c_str());
  Problem no_core = forward();
  no_core.core = {"core"};
  no_core.bias = {"bias"};
  no_core.up = tensor("up", {3, 768, 16});
  EXPECT(check(no_core, false).empty(), "%s", check(no_core, false).c_str());
  return failures() != 0;
}
