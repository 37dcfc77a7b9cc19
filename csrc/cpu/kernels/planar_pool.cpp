// planar_pool: y is x pooled 2 x 2 with stride 2; both with stride w = 1. kind: 1 maximum, 2 average. Reads up to 128
// bytes beyond x, not used.
#include "planar_lanes.h"

namespace pk {
namespace PK_ISA {
namespace planar {
namespace {

class PlanarPool final : public Op {
 public:
  explicit PlanarPool(const Fields& f) : x_(f.view("x")), y_(f.view("y")), average_(f.integer("kind") == 2) {
    if (2 * y_.size[kH] > x_.size[kH] || 2 * y_.size[kW] > x_.size[kW]) fail("planar_pool: a window sticks out");
    if ((x_.stride[kW] != 1 && x_.size[kW] > 1) || (y_.stride[kW] != 1 && y_.size[kW] > 1))
      fail("planar_pool: pixels of a row must be next to each other");
    planes_ = x_.size[kN] * x_.size[kC];
    const int64_t work = planes_ * y_.size[kH] * y_.size[kW];
    tasks = f.threads() == 1 ? 1 : most(1, least(least(planes_, 4 * f.threads()), work / 10000));
  }
  void run(const Run& run, int64_t begin, int64_t end) const override {
    const int64_t channels = x_.size[kC];
    for (int64_t p = planes_ * begin / tasks; p < planes_ * end / tasks; ++p) {
      const float* x = x_.at(run) + p / channels * x_.stride[kN] + p % channels * x_.stride[kC];
      float* y = y_.at(run) + p / channels * y_.stride[kN] + p % channels * y_.stride[kC];
      if (average_) plane<true>(x, y);
      else plane<false>(x, y);
    }
  }

 private:
  template <bool average>
  void plane(const float* x, float* y) const {
    const int64_t pitch = x_.stride[kH], width = y_.size[kW];
    for (int64_t r = 0; r < y_.size[kH]; ++r, x += 2 * pitch, y += y_.stride[kH]) {
      for (int64_t j = 0; j < width; j += kLanes) {
        const float *top = x + 2 * j, *low = top + pitch;
        const vec a = pooled(average, load(top), load(low));
        const vec b = width - j <= kLanes / 2 ? a : pooled(average, load(top + kLanes), load(low + kLanes));
        const vec all = pooled(average, evens(a, b), odds(a, b));
        store(y + j, average ? mul(all, set(0.25f)) : all, first(width - j));
      }
    }
  }

  View x_, y_;
  bool average_;
  int64_t planes_;
};

}  // namespace
}  // namespace planar

Op* make_planar_pool(const Fields& f) { return new planar::PlanarPool(f); }

}  // namespace PK_ISA
}  // namespace pk
