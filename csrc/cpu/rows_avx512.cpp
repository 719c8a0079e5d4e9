#if defined(__x86_64__)
#include "vec_avx512.h"

#include "row_kernels.h"

namespace megatron_deft::cpu::avx512 {
#include "row_kernels.inc"
}
#endif
