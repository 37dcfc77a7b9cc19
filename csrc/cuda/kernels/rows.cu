// Reductions, softmax and norms.
#include "../pointwise.h"
#include "by_dtype.h"

PK_LAUNCHER(reduce) { return pk::cuda::by_dtype<pk::cuda::Reduction>(*op, *bases, stream); }
PK_LAUNCHER(softmax) { return pk::cuda::by_dtype<pk::cuda::Softmax>(*op, *bases, stream); }
PK_LAUNCHER(norm) { return pk::cuda::by_dtype<pk::cuda::RowNorm>(*op, *bases, stream); }
PK_LAUNCHER(group_norm) { return pk::cuda::by_dtype<pk::cuda::GroupNorm>(*op, *bases, stream); }
