// Matrix products in f32.
#include "gemm_family.h"

PK_LAUNCHER(gemm_f32) { return pk::cuda::gemm<pk::cuda::Math::f32>(*op, *bases, stream); }
