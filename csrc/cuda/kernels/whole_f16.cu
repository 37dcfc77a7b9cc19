// Whole networks in f16.
#include "../whole.h"

int pk_cuda_whole_f16(const pk::cuda::Op* ops, int count, const pk::cuda::Bases& bases, uint32_t* barrier, int blocks,
                     int shared, void* stream) {
  return pk::cuda::start_whole<pk::cuda::Math::f16>(ops, count, bases, barrier, blocks, shared, stream);
}

int pk_cuda_whole_blocks_f16(int shared, int* blocks) {
  return pk::cuda::whole_blocks<pk::cuda::Math::f16>(shared, blocks);
}
