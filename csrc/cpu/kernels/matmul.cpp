// matmul: batches of products of two activations, y = activation(a b).
#include "../strided.h"
#include "product.h"

namespace pk {
namespace PK_ISA {
namespace {

constexpr int64_t kStrip = kMaxVectors * kLanes;  // columns at a time

struct Matmul : Op {
  explicit Matmul(const Fields& f) : a(f.view("a")), b(f.view("b")), y(f.view("y")), end(Epilogue::of(f)) {
    rows = y.size[kH];
    columns = y.size[kW];
    depth = a.size[kW];
    if (y.stride[kW] != 1 && columns > 1) fail("columns of y must be next to each other");
    batch = y.size[kN] * y.size[kC] * y.size[kD];
    strips = (columns + kStrip - 1) / kStrip;
    const int64_t macs = batch * rows * columns * depth, threads = f.threads();
    bands = 1;      // of rows: where batch and columns give the threads too little to share
    if (threads > 1 && batch * strips < 4 * threads && rows >= 64 && macs > 200000) bands = 2 * threads;
    if (bands > rows / 32) bands = rows / 32 > 0 ? rows / 32 : 1;
    units = rows * columns == 0 ? 0 : batch * bands * strips;
    tasks = pieces(units, macs / 2, threads);
    height = (rows + bands - 1) / bands;
    gathered = a.stride[kW] != 1 && depth > 1;
    scratch = 4 * (packed_floats(depth, kStrip) + partial_floats(height, depth) + (gathered ? height * depth : 0));
  }

  void run(const Run& run, int64_t begin, int64_t last) const override {
    const Range range(units, tasks, begin, last);
    float* packed = reinterpret_cast<float*>(run.scratch);
    float* partial = packed + packed_floats(depth, kStrip);
    float* copy = partial + partial_floats(height, depth);
    int64_t have = -1;      // the band whose rows of a are in `copy`
    for (int64_t u = range.begin; u < range.end; ++u) {
      const int64_t strip = u % strips, band = u / strips;
      int64_t i = band / bands, from[3] = {0, 0, 0};
      for (int axis = kD; axis >= kN; --axis) {
        const int64_t index = i % y.size[axis];
        i /= y.size[axis];
        from[0] += index * a.stride[axis];
        from[1] += index * b.stride[axis];
        from[2] += index * y.stride[axis];
      }
      const int64_t first_row = band % bands * rows / bands, count = (band % bands + 1) * rows / bands - first_row;
      const int64_t column = strip * kStrip, wide = columns - column < kStrip ? columns - column : kStrip;
      const float* left = a.at(run) + from[0] + first_row * a.stride[kH];
      if (gathered) {
        if (have != band) gather(left, count, copy);
        have = band;
      }
      pack(b.at(run) + from[1] + column * b.stride[kW], b.stride[kH], b.stride[kW], depth, wide, packed);
      multiply(gathered ? copy : left, gathered ? depth : a.stride[kH], count, packed, depth, wide,
               y.at(run) + from[2] + first_row * y.stride[kH] + column, y.stride[kH], end, partial);
    }
  }

  void gather(const float* from, int64_t count, float* to) const {
    if (a.stride[kH] == 1) return transpose_block(from, a.stride[kW], to, depth, depth, count);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t k = 0; k < depth; ++k) to[r * depth + k] = from[r * a.stride[kH] + k * a.stride[kW]];
  }

  View a, b, y;
  Epilogue end;
  int64_t rows, columns, depth, batch, strips, bands, height, units;
  bool gathered;
};

}  // namespace

// Fields: a [.., rows, depth], b [.., depth, columns], y: views whose last axes are h and w, broadcast over n, c, d by
// strides of 0; act.
Op* make_matmul(const Fields& f) { return new Matmul(f); }

}  // namespace PK_ISA
}  // namespace pk
