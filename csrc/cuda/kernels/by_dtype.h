#pragma once

#include "../launch.h"

namespace pk::cuda {

// A family of kernels that has one for each dtype.
template <template <typename> class F>
int by_dtype(const Op& op, const Bases& bases, void* stream) {
  switch (Dtype(op.dtype)) {
    case Dtype::f16: return launch<F<half>>(op, bases, stream);
    case Dtype::bf16: return launch<F<bf16>>(op, bases, stream);
    default: return launch<F<float>>(op, bases, stream);
  }
}

}  // namespace pk::cuda
