// Matrix products in tf32.
#include "gemm_family.h"

PK_LAUNCHER(gemm_tf32) { return pk::cuda::gemm<pk::cuda::Math::tf32>(*op, *bases, stream); }
