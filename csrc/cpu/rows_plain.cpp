#include "vec_plain.h"

#include "row_kernels.h"

namespace megatron_deft::cpu::plain {
#include "row_kernels.inc"
}
