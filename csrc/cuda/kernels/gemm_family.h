#pragma once

#include "../gemm.h"
#include "../launch.h"

namespace pk::cuda {

template <Math M>
int gemm(const Op& op, const Bases& bases, void* stream) {
  switch (Tile(op.tile)) {
    case Tile::t32: return launch<Gemm<M, Tile::t32>>(op, bases, stream);
    case Tile::t64: return launch<Gemm<M, Tile::t64>>(op, bases, stream);
    default: return launch<Gemm<M, Tile::t128>>(op, bases, stream);
  }
}

}  // namespace pk::cuda
