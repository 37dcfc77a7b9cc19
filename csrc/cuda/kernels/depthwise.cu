// Depthwise convolution.
#include "../windows.h"
#include "by_dtype.h"

PK_LAUNCHER(depthwise) { return pk::cuda::by_dtype<pk::cuda::Depthwise>(*op, *bases, stream); }
