// How a kernel is started: under nvcc, or in csrc/host's machine.
#pragma once

#include "launchers.h"
#include "types.h"

#ifdef PK_HOST
#include "../host/streams.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace pk::cuda {

template <typename F>
__global__ void __launch_bounds__(kThreads, 1)
    kernel(const __grid_constant__ typename F::Args args, const __grid_constant__ Bases bases) {
  PK_SHARED(shared);
  F::task(args, bases, int(blockIdx.x), shared);
}

// 0, or the runtime's error code.
template <typename F>
int launch(const Op& op, const Bases& bases, void* stream) {
  static_assert(sizeof(typename F::Args) <= kArgBytes);
  const auto& args = *reinterpret_cast<const typename F::Args*>(op.args);
#ifdef PK_HOST
  host::enqueue(stream, [args, bases, grid = unsigned(op.tasks), shared = size_t(op.shared)] {
    host::launch(grid, kThreads, shared, false, [&] { kernel<F>(args, bases); });
  });
  return 0;
#else
  if (op.shared > 48 << 10)
    if (const int error = cudaFuncSetAttribute(kernel<F>, cudaFuncAttributeMaxDynamicSharedMemorySize, op.shared))
      return error;
  kernel<F><<<unsigned(op.tasks), kThreads, size_t(op.shared), static_cast<cudaStream_t>(stream)>>>(args, bases);
  return cudaGetLastError();
#endif
}

}  // namespace pk::cuda
