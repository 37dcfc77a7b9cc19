// to_bf16: activations as pairs of bf16 numbers, for GEMMs that multiply those (bf16.h).
#include "bf16.h"

#include "../strided.h"

namespace pk {
namespace PK_ISA {
namespace {

enum { kTo, kFrom };

struct ToBf16 final : Op {
  explicit ToBf16(const Fields& f) : x(f.view("x")), y(f.view("y")), lonely(x.size[kC] == 1) {
    if (!kHasBf16) fail("this instruction set has no bf16");
    if (x.stride[kC] != 1 && !lonely) fail("channels must be next to each other");
    for (int a = 0; a < 5; ++a) {
      const int64_t strides[2] = {a == kC ? 1 : 2 * y.stride[a], x.stride[a]};
      blocks.axes.add(x.size[a], strides);
    }
    blocks.cut();
    tasks = pieces(blocks.units, blocks.elements, f.threads());
  }

  void run(const Run& run, int64_t begin, int64_t end) const override {
    const float* const from = x.at(run);
    uint16_t* const to = reinterpret_cast<uint16_t*>(y.at(run));
    blocks.each(Range(blocks.units, tasks, begin, end), [&](const int64_t* at, int64_t m, int64_t n) {
      for (int64_t j = 0; j < m; ++j)
        row(from + at[kFrom] + j * blocks.row_step[kFrom], to + at[kTo] + j * blocks.row_step[kTo], n);
    });
  }

  // Channels of a pixel, or of several that follow each other without a gap; of images with one channel, pixels.
  void row(const float* from, uint16_t* to, int64_t n) const {
    if (lonely) {
      for (int64_t i = 0; i < n; ++i)
        store_bf16(to + i * blocks.step[kTo], load(from + i * blocks.step[kFrom], first(1)), 1);
      return;
    }
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store_bf16(to + i, load(from + i), kLanes);
    if (i < n) store_bf16(to + i, load(from + i, first(n - i)), n - i);
  }

  View x, y;
  bool lonely;      // one channel: every number is paired with a zero
  Blocks<2> blocks;
};

}  // namespace

// Fields: x, floats with channels next to each other; y: its pairs, half as many channels (rounded up).
Op* make_to_bf16(const Fields& f) { return new ToBf16(f); }

}  // namespace PK_ISA
}  // namespace pk
