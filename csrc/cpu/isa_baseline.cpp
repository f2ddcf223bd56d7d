#include "isa.h"
#include "std.h"

#define EFFT_ISA baseline
#define EFFT_VECTOR_BYTES 16
#define EFFT_ROWS 4
#define EFFT_VECTORS 2
#include "low_rank.h"

namespace efft_kernels::cpu {

const Kernels kBaseline{
    "baseline",
    [] { return true; },
    [](const Forward& args, bool wide) {
      wide ? baseline::forward<double>(args) : baseline::forward<float>(args);
    },
    [](const Backward& args, bool wide) {
      wide ? baseline::backward<double>(args) : baseline::backward<float>(args);
    },
    [](const TasksForward& args, bool wide) {
      wide ? baseline::tasks_forward<double>(args) : baseline::tasks_forward<float>(args);
    },
};

}  // namespace efft_kernels::cpu
