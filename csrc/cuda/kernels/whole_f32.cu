// Whole networks in fp32, and who is asked for one.
#include "../whole.h"

int pk_cuda_whole_f16(const pk::cuda::Op*, int, const pk::cuda::Bases&, uint32_t*, int, int, void*);
int pk_cuda_whole_bf16(const pk::cuda::Op*, int, const pk::cuda::Bases&, uint32_t*, int, int, void*);
int pk_cuda_whole_blocks_f16(int, int*);
int pk_cuda_whole_blocks_bf16(int, int*);

int pk_cuda_whole(int math, const pk::cuda::Op* ops, int count, const pk::cuda::Bases* bases, uint32_t* barrier, int blocks,
                  int shared, void* stream) {
  using namespace pk::cuda;
  switch (Math(math)) {
    case Math::f16: return pk_cuda_whole_f16(ops, count, *bases, barrier, blocks, shared, stream);
    case Math::bf16: return pk_cuda_whole_bf16(ops, count, *bases, barrier, blocks, shared, stream);
    default: return start_whole<Math::f32>(ops, count, *bases, barrier, blocks, shared, stream);
  }
}

int pk_cuda_whole_blocks(int math, int shared, int* blocks) {
  using namespace pk::cuda;
  switch (Math(math)) {
    case Math::f16: return pk_cuda_whole_blocks_f16(shared, blocks);
    case Math::bf16: return pk_cuda_whole_blocks_bf16(shared, blocks);
    default: return whole_blocks<Math::f32>(shared, blocks);
  }
}
