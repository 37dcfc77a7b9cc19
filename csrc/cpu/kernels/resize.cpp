// resize: every output is a weighted mean of one or two inputs along each of d, h, w (nearest, linear, bilinear,
// trilinear), by tables.
#include "../strided.h"

namespace pk {
namespace PK_ISA {
namespace {

struct Resize : Op {
  explicit Resize(const Fields& f) : x(f.view("x")), y(f.view("y")) {
    const char* const names[3][2] = {{"index_d", "part_d"}, {"index_h", "part_h"}, {"index_w", "part_w"}};
    for (int a = 0; a < 3; ++a) {
      int64_t count;
      index[a] = f.list(names[a][0], &count);
      const int64_t outputs = y.size[kD + a];
      if (outputs == 0 || count % outputs != 0) fail("every output has as many inputs");
      taps[a] = count / outputs;
      part[a] = f.address<float>(names[a][1]);
      if (taps[a] < 1 || taps[a] > 2 || (taps[a] == 2 && part[a] == nullptr)) fail("one input, or two with weights");
    }
    last = x.stride[kC] == 1 && y.stride[kC] == 1;
    lines = y.size[kC] == 0 ? 0 : y.size[kN] * y.size[kD] * y.size[kH];
    tasks = pieces(lines, lines * y.size[kW] * y.size[kC] * taps[0] * taps[1] * taps[2], f.threads());
  }

  void run(const Run& run, int64_t begin, int64_t end) const override {
    const Range range(lines, tasks, begin, end);
    for (int64_t line = range.begin; line < range.end; ++line) {
      const int64_t h = line % y.size[kH], d = line / y.size[kH] % y.size[kD], n = line / y.size[kH] / y.size[kD];
      const float* rows[4];       // of inputs that a line is made of, and their weights
      float weights[4];
      int count = 0;
      for (int64_t i = 0; i < taps[0]; ++i)
        for (int64_t j = 0; j < taps[1]; ++j) {
          rows[count] = x.at(run) + n * x.stride[kN] + index[0][d * taps[0] + i] * x.stride[kD] +
                        index[1][h * taps[1] + j] * x.stride[kH];
          weights[count++] = weight(0, d, i) * weight(1, h, j);
        }
      float* to = y.at(run) + n * y.stride[kN] + d * y.stride[kD] + h * y.stride[kH];
      if (last) pixels(rows, weights, count, to);
      else channels(rows, weights, count, to);
    }
  }

  PK_INLINE float weight(int axis, int64_t output, int64_t tap) const {
    return part[axis] ? part[axis][output * taps[axis] + tap] : 1;
  }

  // Channels next to each other.
  void pixels(const float* const* rows, const float* weights, int count, float* to) const {
    for (int64_t w = 0; w < y.size[kW]; ++w, to += y.stride[kW]) {
      const float* from[8];
      float by[8];
      int all = 0;
      for (int i = 0; i < count; ++i)
        for (int64_t k = 0; k < taps[2]; ++k) {
          from[all] = rows[i] + index[2][w * taps[2] + k] * x.stride[kW];
          by[all++] = weights[i] * weight(2, w, k);
        }
      int64_t c = 0;
      for (; c + kLanes <= y.size[kC]; c += kLanes) {
        vec acc = all == 1 ? load(from[0] + c) : mul(load(from[0] + c), set(by[0]));
        for (int i = 1; i < all; ++i) acc = fma(load(from[i] + c), set(by[i]), acc);
        store(to + c, acc);
      }
      const lanemask m = first(y.size[kC] - c);
      if (c < y.size[kC]) {
        vec acc = all == 1 ? load(from[0] + c, m) : mul(load(from[0] + c, m), set(by[0]));
        for (int i = 1; i < all; ++i) acc = fma(load(from[i] + c, m), set(by[i]), acc);
        store(to + c, acc, m);
      }
    }
  }

  void channels(const float* const* rows, const float* weights, int count, float* to) const {
    for (int64_t c = 0; c < y.size[kC]; ++c)
      for (int64_t w = 0; w < y.size[kW]; ++w) {
        float acc = 0;
        for (int i = 0; i < count; ++i)
          for (int64_t k = 0; k < taps[2]; ++k) {
            const float value = rows[i][c * x.stride[kC] + index[2][w * taps[2] + k] * x.stride[kW]];
            acc = i + k == 0 ? value * weights[i] * weight(2, w, k) : acc + value * weights[i] * weight(2, w, k);
          }
        to[c * y.stride[kC] + w * y.stride[kW]] = acc;
      }
  }

  View x, y;
  const int64_t* index[3];
  const float* part[3];
  int64_t taps[3], lines;
  bool last;
};

}  // namespace

// Fields: x, y; per axis d, h, w: index_* [outputs, 1 or 2] (which inputs), part_* (float, the same shape: their
// weights; may be missing where there is one).
Op* make_resize(const Fields& f) { return new Resize(f); }

}  // namespace PK_ISA
}  // namespace pk
