// Convolution whose lanes are pixels: how output pixels are cut into vectors, and the register tile.
//
// A vector of kLanes output pixels is described by where its lane 0 reads in the input, so that one tap of the kernel
// is one unaligned load at a fixed distance from there. With stride w = 1 the pixels of a plane are one flat run that
// includes the halo between rows: vectors run over row ends, and lanes on the halo are computed and not stored. With
// stride n = 1 (lanes are images of the batch) every lane counts. Output channels are cut into blocks of up to kWidest
// that share each load; a block costs what its channels cost, whatever their number.
#pragma once

#include "../epilogue.h"
#include "planar_lanes.h"

namespace pk {
namespace PK_ISA {
namespace planar {

constexpr int kWidest = kRegisters == 32 ? 9 : 6;    // output channels of a block
constexpr int kLongest = kRegisters == 32 ? 12 : 6;  // vectors of a tile

// How many vectors go with a block of `channels`: the accumulators fill the registers, beside either the vectors read
// and one weight, or the weights and one vector read.
constexpr int longest(int channels) {
  if (kRegisters == 16) return channels == 1 ? 6 : channels == 2 ? 5 : channels == 3 ? 3 : 2;
  switch (channels) {
    case 1: return 12;
    case 2: return 11;
    case 3: return 8;
    case 4: return 6;
    case 5: return 5;
    case 6: return 4;
    default: return 3;
  }
}

// Lanes of a vector that lie in one row: offsets (elements) of lane 0 if it lay there too.
struct Piece {
  int32_t y, residual;
  uint32_t lanes;
};

// Where one lane axis lies: elements from an output row to the next, and from an output pixel to the next.
struct Pitch {
  int64_t h, w;
};

// Output rows [row, row + rows) of an image, cut into vectors.
struct Band {
  int64_t row = 0, rows = 0;
  int64_t vectors = 0;
  bool whole = true;      // every vector is one piece
  Array<int32_t> x;       // [vectors] where lane 0 reads
  Array<int32_t> piece;   // [vectors + 1] its pieces
  Array<Piece> pieces;

  // Lanes are pixels of a row of `width`. x.h is at least width: what lies between rows is read, and not used.
  void cut_rows(int64_t width, Pitch x, Pitch y, Pitch residual);
  // Lanes are images of the batch.
  void cut_images(int64_t width, int64_t images, Pitch x, Pitch y, Pitch residual);
};

// A block of output channels over a band.
struct Block {
  const float* x;            // where tap (0, 0) of output pixel (0, 0) of the band lies, first input channel
  const int32_t* taps;       // [depth] elements from there: input channels, kernel rows, kernel columns
  int64_t depth;
  const float* weight;       // [depth, channels]
  const float* bias;         // [channels] or null
  float* y;
  int64_t y_channel;         // elements from a channel to the next
  const float* residual;     // or null
  int64_t residual_channel;
  const Band* band;
  const Epilogue* epilogue;
  bool quick;                // single pieces, clamp, no residual after the activation
};

// Stores sums[channels][vectors][kLanes] that have their bias: residual, activation, pieces.
void finish(const Block& b, int64_t first, int64_t channels, int64_t vectors, float* sums);

template <int C, int V>
PK_INLINE void multiply(const Block& b, const float* const* x, vec (&sum)[C][V]) {
  const int32_t* taps = b.taps;
  const float* w = b.weight;
  for (int64_t k = 0; k < b.depth; ++k, w += C) {
    const int64_t tap = taps[k];
    if (C <= 3) {  // long tiles: weights stay, vectors pass
      vec weight[C];
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) weight[c] = set(w[c]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        const vec in = load(x[v] + tap);
#pragma GCC unroll 16
        for (int c = 0; c < C; ++c) sum[c][v] = fma(weight[c], in, sum[c][v]);
      }
    } else {
      vec in[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) in[v] = load(x[v] + tap);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) {
        const vec weight = set(w[c]);
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) sum[c][v] = fma(weight, in[v], sum[c][v]);
      }
    }
  }
}

// Vectors [first, first + V) of the band for C output channels.
template <int C, int V>
void tile(const Block& b, int64_t first) {
  const Band& band = *b.band;
  const float* x[V];
  lanemask lanes[V];
  vec sum[C][V];
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) x[v] = b.x + band.x[first + v];
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) sum[c][v] = b.bias ? set(b.bias[c]) : zero();
  }
  if (!b.quick) {
    multiply(b, x, sum);
    alignas(64) float sums[C * V * kLanes];
    for (int i = 0; i < C * V; ++i) store(sums + i * kLanes, sum[i / V][i % V]);
    finish(b, first, C, V, sums);
    return;
  }
  const Piece* pieces = &band.pieces[band.piece[first]];
  if (b.residual) {
    for (int v = 0; v < V; ++v) lanes[v] = from_bits(pieces[v].lanes);
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v)
        sum[c][v] = add(sum[c][v], load(b.residual + c * b.residual_channel + pieces[v].residual, lanes[v]));
    }
  }
  multiply(b, x, sum);
  const vec low = set(b.epilogue->low), high = set(b.epilogue->high);
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) {
    const lanemask mask = from_bits(pieces[v].lanes);
    float* y = b.y + pieces[v].y;
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) store(y + c * b.y_channel, clamp(sum[c][v], low, high), mask);
  }
}

}  // namespace planar
}  // namespace PK_ISA
}  // namespace pk
