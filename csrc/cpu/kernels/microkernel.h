// The innermost loop of everything that is a matrix product: MR rows times NV vectors of columns in registers.
//
// Rows of A are found through pointers and are sums over *segments*: stretches of contiguous floats at the same
// offsets from every row's start. A segment of a convolution is a row of its window (kernel width x channels, next to
// each other in a channels-last image), so im2col is only a table of offsets. B is packed in panels of NV vectors:
// [k][NV * kLanes]. Register blocks follow K. Goto, R. van de Geijn, "Anatomy of High-Performance Matrix
// Multiplication", ACM TOMS 34(3), 2008: A is broadcast, B loaded, everything else stays in registers. B is one stream,
// which the hardware fetches ahead by itself: asking for it by instructions took a quarter of the bandwidth (Zen 4).
#pragma once

#include "../epilogue.h"
#include "../math.h"
#include "../op.h"
#include "../vec.h"

namespace pk {
namespace PK_ISA {

struct Segment {
  int64_t offset, length;    // floats
};

constexpr int kMaxVectors = kRegisters == 32 ? 4 : 2;
constexpr int kMaxRows = 14;
// Rows that fit beside NV vectors of B and one broadcast of A.
constexpr int rows_for(int vectors) {
  return kRegisters == 32 ? (vectors == 1 ? 14 : vectors == 2 ? 14 : vectors == 3 ? 9 : 6) : (vectors == 1 ? 12 : 6);
}

// One tile. a: the rows' starts; y: where they go; residual: rows of the residual (unused without one).
// columns: how many of the panel's columns exist from here. partial: [row][NV * kLanes] sums of the
// segments before these (not read if `first`) and with these (written unless `last`).
struct Block {
  const float* a[kMaxRows];
  float* y[kMaxRows];
  const float* residual[kMaxRows];
  const Segment* segments;
  int64_t segment_count;
  const void* b;
  const float* bias;
  const Epilogue* epilogue;
  int64_t columns;
  float* partial;
  bool first, last;
};

PK_INLINE vec load_weight(const float* p) { return load(p); }
PK_INLINE vec load_weight(const uint16_t* p) { return load_half(p); }
// What is done with a weight depends on how it is stored: bf16.h has another one.
template <class W>
PK_INLINE vec multiply_add(vec a, vec b, vec acc, const W*) { return fma(a, b, acc); }

template <int MR, int NV, class W>
PK_INLINE void accumulate(vec (&acc)[MR][NV], const Block& block) {
  const W* b = static_cast<const W*>(block.b);
  const float* a[MR];
  for (int64_t s = 0; s < block.segment_count; ++s) {
    const int64_t offset = block.segments[s].offset, length = block.segments[s].length;
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) a[r] = block.a[r] + offset;
    for (int64_t k = 0; k < length; ++k) {
      vec bv[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) bv[v] = load_weight(b + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
        const vec av = set(a[r][k]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[r][v] = multiply_add(av, bv[v], acc[r][v], b);
      }
      b += NV * kLanes;
    }
  }
}

PK_INLINE void store_first(float* p, vec x, int64_t count) {
  if (count >= kLanes) store(p, x);
  else store(p, x, first(count));
}

PK_INLINE vec load_first(const float* p, int64_t count) {
  return count >= kLanes ? load(p) : load(p, first(count));
}

// Where all columns exist, straight from the registers: layers of little depth spend much of their time here.
template <int MR, int NV, bool kResidual>
PK_INLINE void finish_full(const vec (&acc)[MR][NV], const Block& block) {
  const vec low = set(block.epilogue->low), high = set(block.epilogue->high);
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) {
    float* const y = block.y[r];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      vec x = acc[r][v];
      if (kResidual) x = add(x, load(block.residual[r] + v * kLanes));
      store(y + v * kLanes, clamp(x, low, high));
    }
  }
}

// The general case, from memory, so that rows are a loop and not MR copies of it.
template <int MR, int NV>
PK_INLINE void finish_any(const vec (&acc)[MR][NV], const Block& block) {
  const Epilogue& e = *block.epilogue;
  const vec low = set(e.low), high = set(e.high);
  // Only the last vector of a panel can be cut short.
  const int64_t tail = block.columns - (NV - 1) * kLanes;
  const bool before = e.residual.there && !e.residual_last, after = e.residual.there && e.residual_last && !e.late;
  alignas(64) float sums[MR][NV * kLanes];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(sums[r] + v * kLanes, acc[r][v]);
#pragma GCC unroll 1
  for (int r = 0; r < MR; ++r) {
    float* const y = block.y[r];
    const float* const residual = before || after ? block.residual[r] : nullptr;
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const int64_t at = v * kLanes, count = v + 1 < NV ? kLanes : tail;
      vec x = load(sums[r] + at);
      if (before) x = add(x, load_first(residual + at, count));
      x = clamp(x, low, high);
      if (after) x = add(x, load_first(residual + at, count));
      store_first(y + at, x, count);
    }
  }
}

template <int MR, int NV>
PK_INLINE void finish(const vec (&acc)[MR][NV], const Block& block) {
  const Epilogue& e = *block.epilogue;
  if (block.columns < NV * kLanes || (e.residual.there && e.residual_last)) finish_any<MR, NV>(acc, block);
  else if (e.residual.there) finish_full<MR, NV, true>(acc, block);
  else finish_full<MR, NV, false>(acc, block);
}

// Activations that take more than a clamp, over rows that are still in cache.
inline void finish_late(const Block& block, int rows, int64_t width) {
  const Epilogue& e = *block.epilogue;
  const int64_t count = block.columns < width ? block.columns : width;
  for (int r = 0; r < rows; ++r) {
    activate_row(e.act, block.y[r], count, e.constants);
    if (!e.residual.there || !e.residual_last) continue;
    for (int64_t c = 0; c < count; c += kLanes) {
      const int64_t left = count - c;
      store_first(block.y[r] + c, add(load_first(block.y[r] + c, left), load_first(block.residual[r] + c, left)), left);
    }
  }
}

template <int MR, int NV, class W>
void tile(const Block& block) {
  vec acc[MR][NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    const vec start = block.first && block.bias ? load(block.bias + v * kLanes) : zero();
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) acc[r][v] = start;
  }
  accumulate<MR, NV, W>(acc, block);
  // Sums of stretches are added up, not carried on: rounding errors grow with the stretch, not with the whole depth.
  if (!block.first) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] = add(acc[r][v], load(block.partial + (r * NV + v) * kLanes));
  }
  if (!block.last) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) store(block.partial + (r * NV + v) * kLanes, acc[r][v]);
    return;
  }
  finish<MR, NV>(acc, block);
  if (block.epilogue->late) finish_late(block, MR, NV * kLanes);
}

using TileFn = void (*)(const Block&);

template <int NV, class W>
TileFn tile_of(int rows) {
  switch (rows) {
    case 1: return tile<1, NV, W>;
    case 2: return tile<2, NV, W>;
    case 3: return tile<3, NV, W>;
    case 4: return tile<4, NV, W>;
    case 5: return tile<5, NV, W>;
    case 6: return tile<6, NV, W>;
    default: break;
  }
  if constexpr (rows_for(NV) >= 7) {
    switch (rows) {
      case 7: return tile<7, NV, W>;
      case 8: return tile<8, NV, W>;
      case 9: return tile<9, NV, W>;
      default: break;
    }
  }
  if constexpr (rows_for(NV) >= 12) {
    switch (rows) {
      case 10: return tile<10, NV, W>;
      case 11: return tile<11, NV, W>;
      case 12: return tile<12, NV, W>;
      default: break;
    }
  }
  if constexpr (rows_for(NV) >= 14) {
    switch (rows) {
      case 13: return tile<13, NV, W>;
      case 14: return tile<14, NV, W>;
      default: break;
    }
  }
  return nullptr;
}

template <class W>
TileFn tile_of(int rows, int vectors) {
  switch (vectors) {
    case 1: return tile_of<1, W>(rows);
    case 2: return tile_of<2, W>(rows);
    default: break;
  }
  if constexpr (kMaxVectors >= 4) {
    switch (vectors) {
      case 3: return tile_of<3, W>(rows);
      case 4: return tile_of<4, W>(rows);
      default: break;
    }
  }
  return nullptr;
}

}  // namespace PK_ISA
}  // namespace pk
