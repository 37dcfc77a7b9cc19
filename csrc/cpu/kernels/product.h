// Products of two matrices of which neither is a weight: the right one is packed into scratch first.
#pragma once

#include "microkernel.h"
#include "transpose.h"

namespace pk {
namespace PK_ISA {

constexpr int64_t kDepth = 512;  // terms that are summed up at once, as in gemm.cpp

// Columns in panels of up to kMaxVectors registers, as even as can be.
struct Panels {
  int64_t vectors, count;
  explicit Panels(int64_t columns)
      : vectors((columns + kLanes - 1) / kLanes), count((vectors + kMaxVectors - 1) / kMaxVectors) {}
  int64_t start(int64_t panel) const { return panel * vectors / count; }  // in registers
};

inline int64_t packed_floats(int64_t depth, int64_t columns) { return Panels(columns).vectors * kLanes * depth; }

// One panel: to[k][width] = b[k * row + j * column], zeros beyond `columns`.
inline void pack_panel(const float* b, int64_t row, int64_t column, int64_t depth, int64_t columns, int64_t width,
                       float* to) {
  if (column == 1) {
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t j = 0; j < width; j += kLanes)
        store(to + k * width + j, load_first(b + k * row + j, columns - j < 0 ? 0 : columns - j));
    return;
  }
  for (int64_t k = 0; k < depth && columns < width; ++k)
    for (int64_t j = columns; j < width; ++j) to[k * width + j] = 0;
  if (row == 1) return transpose_block(b, column, to, width, columns, depth);
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t j = 0; j < columns; ++j) to[k * width + j] = b[k * row + j * column];
}

// All of a matrix of depth x columns, panel after panel.
inline void pack(const float* b, int64_t row, int64_t column, int64_t depth, int64_t columns, float* to) {
  const Panels panels(columns);
  for (int64_t p = 0; p < panels.count; ++p) {
    const int64_t start = panels.start(p) * kLanes, end = panels.start(p + 1) * kLanes;
    pack_panel(b + start * column, row, column, depth, (end < columns ? end : columns) - start, end - start,
               to + start * depth);
  }
}

// Floats that `multiply` needs for sums of stretches.
inline int64_t partial_floats(int64_t rows, int64_t depth) {
  return depth > kDepth ? rows * kMaxVectors * kLanes : 0;
}

// y[i * y_row + j] = epilogue(sum_k a[i * a_row + k] b[k, j]) with b packed. The epilogue has no bias or residual.
inline void multiply(const float* a, int64_t a_row, int64_t rows, const float* packed, int64_t depth, int64_t columns,
                     float* y, int64_t y_row, const Epilogue& epilogue, float* partial) {
  const Panels panels(columns);
  Segment segment;
  Block block;
  block.epilogue = &epilogue;
  block.bias = nullptr;
  block.segments = &segment;
  block.segment_count = 1;
  for (int64_t p = 0; p < panels.count; ++p) {
    const int64_t start = panels.start(p) * kLanes, width = panels.start(p + 1) * kLanes - start;
    const int vectors = int(width / kLanes);
    const int64_t most = rows_for(vectors), count = (rows + most - 1) / most;
    block.columns = columns - start;
    for (int64_t done = 0; done < depth || done == 0; done += kDepth) {
      segment = Segment{done, depth - done < kDepth ? depth - done : kDepth};
      block.b = packed + start * depth + done * width;
      block.first = done == 0;
      block.last = done + kDepth >= depth;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t from = i * rows / count, to = (i + 1) * rows / count;
        for (int64_t r = from; r < to; ++r) {
          block.a[r - from] = a + r * a_row;
          block.y[r - from] = y + r * y_row + start;
        }
        block.partial = partial + from * width;
        tile_of<float>(int(to - from), vectors)(block);
      }
    }
  }
}

}  // namespace PK_ISA
}  // namespace pk
