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
constexpr int kQuadWidest = kRegisters == 32 ? 6 : 2;  // of one whose tile is a quad
constexpr int kLongest = 8;                          // vectors of a tile, at most

// How many vectors go with a block of `channels`: accumulators, vectors read and one weight fill the registers.
constexpr int longest(int channels) {
  if (kRegisters == 16) return channels == 1 ? 6 : channels == 2 ? 4 : channels <= (kLanes == 8 ? 4 : 3) ? 3 : 2;
  return channels <= 2 ? 8 : channels <= 4 ? 6 : channels == 5 ? 5 : channels == 6 ? 4 : 3;
}

// Lanes of a vector that lie in one row: offsets (elements) of lane 0 if it lay there too.
struct Piece {
  int32_t y, residual;
  uint32_t lanes;
};

// `rows` rows of the convolution, cut into vectors; they become rows of y from `row` on.
struct Band {
  int64_t row = 0, rows = 0;
  int64_t vectors = 0;
  Array<int32_t> x;       // [vectors] where lane 0 reads
  Array<int32_t> piece;   // [vectors + 1] its pieces
  Array<Piece> pieces;

  // Lanes are pixels of a row of `width`. x.h is at least width: what lies between rows is read, and not used.
  void cut_rows(int64_t width, Pitch x, Pitch y, Pitch residual);
  // Lanes are images of the batch.
  void cut_images(int64_t width, int64_t images, Pitch x, Pitch y, Pitch residual);
  // For pooling 2 x 2 in registers to rows of `width`: quads of vectors, two of an upper row and the two below them.
  // images = 0: lanes are pixels; the first two and the others' two give half of the results' lanes each. Else lanes
  // are images. `piece` counts quads.
  void cut_quads(int64_t width, int64_t images, Pitch x, Pitch y);
};

// A block of output channels over a band.
struct Block {
  const float* x;            // where tap (0, 0) of output pixel (0, 0) of the band lies, first input channel
  const int32_t* taps;       // [depth] elements from there: input channels, kernel rows, kernel columns
  int64_t depth;
  const float* weight;       // [depth, channels]
  const float* bias;         // [channels]
  float* y;
  int64_t y_channel;         // elements from a channel to the next
  const float* residual;     // or null
  int64_t residual_channel;
  const Band* band;
  const Epilogue* epilogue;
  bool quick;                // nothing but a residual and then a maximum with epilogue->low is left to do
};

// Stores sums[channels][vectors][kLanes] that have their bias: residual, activation, pieces.
void finish(const Block& b, int64_t first, int64_t channels, int64_t vectors, float* sums);

template <int C, int V>
PK_INLINE void multiply(const Block& b, const float* const* x, vec (&sum)[C][V]) {
  const int32_t* taps = b.taps;
  const float* w = b.weight;
  for (int64_t k = 0; k < b.depth; ++k, w += C) {
    const int64_t tap = taps[k];
    vec in[V];  // all of them first: interleaved with the products, loads that cross cache lines stall those
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

// Vectors [first, first + V) of the band for C output channels.
template <int C, int V>
void tile(const Block& b, int64_t first) {
  const Band& band = *b.band;
  const float* x[V];
  vec sum[C][V];
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) x[v] = b.x + band.x[first + v];
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) sum[c][v] = set(b.bias[c]);
  }
  multiply(b, x, sum);
  if (!b.quick) {
    alignas(64) float sums[C * V * kLanes];
#pragma GCC unroll 32
    for (int i = 0; i < C * V; ++i) store(sums + i * kLanes, sum[i / V][i % V]);
    return finish(b, first, C, V, sums);
  }
  const int32_t* piece = &band.piece[first];
  if (b.residual) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      for (int32_t p = piece[v]; p < piece[v + 1]; ++p) {
        const lanemask lanes = from_bits(band.pieces[p].lanes);
        const float* residual = b.residual + band.pieces[p].residual;
#pragma GCC unroll 16
        for (int c = 0; c < C; ++c, residual += b.residual_channel) sum[c][v] = add(sum[c][v], load(residual, lanes));
      }
    }
  }
  const vec low = set(b.epilogue->low);
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) sum[c][v] = max(low, sum[c][v]);
  }
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) {
    for (int32_t p = piece[v]; p < piece[v + 1]; ++p) {
      const lanemask lanes = from_bits(band.pieces[p].lanes);
      float* y = b.y + band.pieces[p].y;
      if (kRegisters == 16 && band.pieces[p].lanes == (1u << kLanes) - 1) {  // masked stores cost more there
#pragma GCC unroll 16
        for (int c = 0; c < C; ++c, y += b.y_channel) store(y, sum[c][v]);
        continue;
      }
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c, y += b.y_channel) store(y, sum[c][v], lanes);
    }
  }
}

// Vectors [first, first + 4) of the band, a quad, pooled 2 x 2 (average: their mean, else their maximum).
template <int C, bool average, bool images>
void quad(const Block& b, int64_t first) {
  const Band& band = *b.band;
  const float* x[4];
  vec sum[C][4];
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) x[v] = b.x + band.x[first + v];
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sum[c][v] = set(b.bias[c]);
  }
  multiply(b, x, sum);
  const vec low = set(b.epilogue->low), high = set(b.epilogue->high), quarter = set(0.25f);
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c) {
    if (average) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) sum[c][v] = clamp(sum[c][v], low, high);
    }
    const vec left = pooled(average, sum[c][0], sum[c][2]), right = pooled(average, sum[c][1], sum[c][3]);
    const vec all = images ? pooled(average, left, right) : pooled(average, evens(left, right), odds(left, right));
    sum[c][0] = average ? mul(all, quarter) : clamp(all, low, high);
  }
  for (int32_t p = band.piece[first / 4]; p < band.piece[first / 4 + 1]; ++p) {
    const lanemask lanes = from_bits(band.pieces[p].lanes);
    float* y = b.y + band.pieces[p].y;
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c, y += b.y_channel) store(y, sum[c][0], lanes);
  }
}

}  // namespace planar
}  // namespace PK_ISA
}  // namespace pk
