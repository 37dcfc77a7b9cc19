// Few rows times a matrix.
#include "../gemm.h"
#include "by_dtype.h"

PK_LAUNCHER(gemv) { return pk::cuda::by_dtype<pk::cuda::Gemv>(*op, *bases, stream); }
