// Matrix products in f16.
#include "gemm_family.h"

PK_LAUNCHER(gemm_f16) { return pk::cuda::gemm<pk::cuda::Math::f16>(*op, *bases, stream); }
