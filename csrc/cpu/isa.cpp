#include "isa.h"

#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace efft_kernels::cpu {
namespace {

constexpr int64_t kHugePage = 1 << 21;

const Kernels& choose() {
  const Kernels* all[] = {&kAvx512Bf16, &kAvx512, &kAvx2, &kBaseline};
  const char* asked = std::getenv("EFFT_KERNELS_CPU_ISA");
  for (const Kernels* candidate : all) {
    if (asked != nullptr && std::string(asked) != candidate->name) continue;
    if (candidate->supported()) return *candidate;
  }
  throw std::runtime_error(
      std::string("EFFT_KERNELS_CPU_ISA must be avx512_bf16, avx512, avx2 or baseline and "
                  "run on this processor, got ") +
      asked);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

void* workspace(int64_t bytes) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local int64_t held = 0;
  if (bytes > held) {
    const int64_t rounded = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    memory.reset();
    held = 0;
    memory.reset(std::aligned_alloc(kHugePage, rounded));
    if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    // A request that may be refused: these parts are read over and over from hundreds of small
    // pages.
    madvise(memory.get(), rounded, MADV_HUGEPAGE);
#endif
    held = rounded;
  }
  return memory.get();
}

}  // namespace efft_kernels::cpu
