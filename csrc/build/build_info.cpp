// _build_info: what the native libraries were built with. native_build.py writes build_facts.h.

#include <pybind11/pybind11.h>

#include "build_facts.h"

namespace py = pybind11;

// Attributes: compiler, cxx_flags, torch_version (built against), target_version (the oldest torch
// that the stable-ABI libraries load in); cuda_version (nvcc's), cuda_archs, cutlass_version and
// nvcc_flags, which are None or empty where the CUDA library was left out.
PYBIND11_MODULE(_build_info, module) {
  module.doc() = "What the native libraries were built with.";
  const py::dict facts = py::module_::import("json").attr("loads")(kBuildFacts);
  for (const auto& [name, value] : facts) {
    module.attr(name) = value;
  }
  module.attr("FACTS") = facts;
}
