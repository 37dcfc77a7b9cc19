// Explicit im2col, pooling, resizing, rows of tables.
#include "../windows.h"
#include "by_dtype.h"

PK_LAUNCHER(im2col) { return pk::cuda::by_dtype<pk::cuda::Im2col>(*op, *bases, stream); }
PK_LAUNCHER(pool) { return pk::cuda::by_dtype<pk::cuda::Pooling>(*op, *bases, stream); }
PK_LAUNCHER(resize) { return pk::cuda::by_dtype<pk::cuda::Resizing>(*op, *bases, stream); }
PK_LAUNCHER(gather) { return pk::cuda::by_dtype<pk::cuda::Gather>(*op, *bases, stream); }
