// Elementwise steps and copies between layouts.
#include "../pointwise.h"
#include "by_dtype.h"

PK_LAUNCHER(pointwise) { return pk::cuda::by_dtype<pk::cuda::Pointwise_>(*op, *bases, stream); }

PK_LAUNCHER(copy) {
  using namespace pk::cuda;
  switch (op->dtype) {      // bytes of an element
    case 1: return launch<Copying<uint8_t>>(*op, *bases, stream);
    case 2: return launch<Copying<uint16_t>>(*op, *bases, stream);
    case 4: return launch<Copying<uint32_t>>(*op, *bases, stream);
    default: return launch<Copying<uint64_t>>(*op, *bases, stream);
  }
}
