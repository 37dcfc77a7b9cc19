// copy: any strided view to any other of the same sizes (imports, exports, layout changes, slices, permutes).
// fill: one value everywhere. halo: zeros around the interior of a padded buffer.
#include "../strided.h"
#include "transpose.h"

namespace pk {
namespace PK_ISA {
namespace {

enum { kY, kX };

PK_INLINE void copy_row(const float* x, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, load(x + i));
  if (i < n) store(y + i, load(x + i, first(n - i)), first(n - i));
}

// transpose_block for a few rows that end up next to each other (RGB to channels-last): the compiler interleaves them.
template <int rows>
void interleave(const float* x, int64_t from, float* y, int64_t columns) {
  for (int64_t j = 0; j < columns; ++j)
    for (int i = 0; i < rows; ++i) y[j * rows + i] = x[i * from + j];
}

// ... and for a few columns that lie next to each other (channels-last to planar).
template <int columns>
void take_apart(const float* x, float* y, int64_t to, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j) y[j * to + i] = x[i * columns + j];
}

struct Copy : Op {
  explicit Copy(const Fields& f) : x(f.view("x")), y(f.view("y")) {
    add_views(&blocks.axes, {&y, &x});
    blocks.axes.merge();
    bring_in_transpose();
    const Axes<2>& a = blocks.axes;
    rows = a.count > 0 && a.stride[0][kY] == 1 && a.stride[0][kX] == 1;
    transposed = !rows && a.count > 1 && a.stride[0][kY] == 1 && a.stride[1][kX] == 1;
    blocks.cut(transposed ? 256 : Blocks<2>::kBlock);
    tasks = pieces(blocks.units, blocks.elements, f.threads());
  }

  // Where x is contiguous along another axis than y is, that axis becomes the second, so that blocks are transposes.
  void bring_in_transpose() {
    Axes<2>& a = blocks.axes;
    if (a.count < 3 || a.stride[0][kY] != 1 || a.stride[0][kX] == 1) return;
    for (int i = 2; i < a.count; ++i)
      if (a.stride[i][kX] == 1) a.swap(1, i);
  }

  void run(const Run& run, int64_t begin, int64_t end) const override {
    const float* from = x.at(run);
    float* to = y.at(run);
    blocks.each(Range(blocks.units, tasks, begin, end), [&](const int64_t* at, int64_t m, int64_t n) {
      block(from + at[kX], to + at[kY], m, n);
    });
  }

  void block(const float* from, float* to, int64_t m, int64_t n) const {
    const int64_t *s = blocks.step, *r = blocks.row_step;
    if (rows) {
      for (int64_t j = 0; j < m; ++j) copy_row(from + j * r[kX], to + j * r[kY], n);
    } else if (transposed) {
      if (n == 2 && r[kY] == 2) interleave<2>(from, s[kX], to, m);
      else if (n == 3 && r[kY] == 3) interleave<3>(from, s[kX], to, m);
      else if (n == 4 && r[kY] == 4) interleave<4>(from, s[kX], to, m);
      else if (m == 2 && s[kX] == 2) take_apart<2>(from, to, r[kY], n);
      else if (m == 3 && s[kX] == 3) take_apart<3>(from, to, r[kY], n);
      else if (m == 4 && s[kX] == 4) take_apart<4>(from, to, r[kY], n);
      else transpose_block(from, s[kX], to, r[kY], n, m);
    } else {
      for (int64_t j = 0; j < m; ++j)
        for (int64_t i = 0; i < n; ++i) to[j * r[kY] + i * s[kY]] = from[j * r[kX] + i * s[kX]];
    }
  }

  View x, y;
  Blocks<2> blocks;
  bool rows, transposed;
};

// A stretch of one value.
PK_INLINE void fill_row(float* to, int64_t step, int64_t n, float value) {
  int64_t i = 0;
  if (step == 1) for (; i + kLanes <= n; i += kLanes) store(to + i, set(value));
  for (; i < n; ++i) to[i * step] = value;
}

struct Fill : Op {
  explicit Fill(const Fields& f) : y(f.view("y")), value(float(f.number("value", 0))) {
    add_views(&blocks.axes, {&y});
    blocks.cut();
    tasks = pieces(blocks.units, blocks.elements, f.threads());
  }

  void run(const Run& run, int64_t begin, int64_t end) const override {
    blocks.each(Range(blocks.units, tasks, begin, end), [&](const int64_t* at, int64_t m, int64_t n) {
      for (int64_t j = 0; j < m; ++j)
        fill_row(y.at(run) + *at + j * blocks.row_step[0], blocks.step[0], n, value);
    });
  }

  View y;
  float value;
  Blocks<1> blocks;
};

struct Halo : Op {
  explicit Halo(const Fields& f) : y(f.view("y")) {
    int64_t low[3], high[3], from[3], to[3];
    f.copy("low", 3, low);
    f.copy("high", 3, high);
    for (int a = 0; a < 3; ++a) {
      from[a] = -low[a];
      to[a] = y.size[kD + a] + high[a];
    }
    for (int a = 0; a < 3; ++a) {  // both ends of an axis, over all of the later ones and the interior of earlier ones
      const int64_t begin = from[a], end = to[a];
      from[a] = begin, to[a] = 0;
      box(from, to);
      from[a] = y.size[kD + a], to[a] = end;
      box(from, to);
      from[a] = 0, to[a] = y.size[kD + a];
    }
  }

  void box(const int64_t* from, const int64_t* to) {
    Blocks<1>& b = boxes[count];
    int64_t start = 0;
    for (int a = 0; a < 3; ++a) {
      start += from[a] * y.stride[kD + a];
      b.axes.add(to[a] - from[a], &y.stride[kD + a]);
    }
    b.axes.add(y.size[kN], &y.stride[kN]);
    b.axes.add(y.size[kC], &y.stride[kC]);
    b.cut();
    if (b.elements > 0) starts[count++] = start;
    else b = Blocks<1>();
  }

  void run(const Run& run, int64_t, int64_t) const override {
    for (int i = 0; i < count; ++i) {
      const Blocks<1>& b = boxes[i];
      float* to = y.at(run) + starts[i];
      b.each(Range(b.units, 1, 0, 1), [&](const int64_t* at, int64_t m, int64_t n) {
        for (int64_t j = 0; j < m; ++j) fill_row(to + *at + j * b.row_step[0], b.step[0], n, 0);
      });
    }
  }

  View y;
  Blocks<1> boxes[6];
  int64_t starts[6];
  int count = 0;
};

}  // namespace

// Fields: x, y.
Op* make_copy(const Fields& f) { return new Copy(f); }

// Fields: y, value.
Op* make_fill(const Fields& f) { return new Fill(f); }

// Zeros around the interior y. Fields: y, low, high: how far it reaches along d, h, w.
Op* make_halo(const Fields& f) { return new Halo(f); }

}  // namespace PK_ISA
}  // namespace pk
