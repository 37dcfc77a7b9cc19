// Matrix products in bf16.
#include "gemm_family.h"

PK_LAUNCHER(gemm_bf16) { return pk::cuda::gemm<pk::cuda::Math::bf16>(*op, *bases, stream); }
