#if defined(__x86_64__)
#include "vec_avx2.h"

#include "row_kernels.h"

namespace megatron_deft::cpu::avx2 {
#include "row_kernels.inc"
}
#endif
