// layer_norm, rms_norm and group_norm: mean first, then the mean square of what is left (two passes: no cancellation).
#include <cmath>

#include "../rows.h"

namespace pk {
namespace PK_ISA {
namespace {

struct None {
  static PK_INLINE vec of(vec x, vec) { return x; }
};
struct Square {  // of the distance from the mean
  static PK_INLINE vec of(vec x, vec mean) { return mul(sub(x, mean), sub(x, mean)); }
};

// The sum of F(x - mean) over a row.
template <typename F>
PK_INLINE double sum_row(const float* x, int64_t n, float mean) {
  constexpr int64_t kStretch = 64 * kLanes;  // what is added up in single precision
  const vec m = set(mean);
  double total = 0;
  for (int64_t i = 0; i < n; i += kStretch) {
    const int64_t end = n - i < kStretch ? n : i + kStretch;
    vec acc[4] = {zero(), zero(), zero(), zero()};
    int64_t j = i;
    for (; j + 4 * kLanes <= end; j += 4 * kLanes)
      for (int k = 0; k < 4; ++k) acc[k] = add(acc[k], F::of(load(x + j + k * kLanes), m));
    for (; j < end; j += kLanes) {
      const lanemask part = first(end - j);
      acc[0] = add(acc[0], select(part, F::of(load(x + j, part), m), zero()));
    }
    total += double(sum(add(add(acc[0], acc[1]), add(acc[2], acc[3]))));
  }
  return total;
}

// Over rows of the axes named; mean 0 where there is none (rms).
struct RowNorm : Op {
  RowNorm(const Fields& f, bool centred) : rows(f), centred(centred) {
    weight = f.address<float>("weight");
    bias = f.address<float>("bias");
    eps = f.number("eps", 0);
    const int64_t of = f.integer("of", 0);
    count = double(of ? of : rows.n);
    gone = count - double(rows.n);
    scratch = rows.scratch();
    tasks = pieces(rows.units, rows.units * rows.n, f.threads());
  }

  void run(const Run& run, int64_t begin, int64_t end) const override {
    rows.each(run, Range(rows.units, tasks, begin, end), [&](const float* x, float* y) { row(x, y); });
  }

  void row(const float* x, float* y) const {
    const int64_t n = rows.n;
    const float mean = centred ? float(sum_row<None>(x, n, 0) / count) : 0;
    const double squares = sum_row<Square>(x, n, mean) + gone * double(mean) * double(mean);
    const vec m = set(mean), by = set(float(1 / std::sqrt(squares / count + eps)));
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      vec v = mul(sub(load(x + i), m), by);
      if (weight) v = mul(v, load(weight + i));
      if (bias) v = add(v, load(bias + i));
      store(y + i, v);
    }
    const lanemask part = first(n - i);
    if (i < n) {
      vec v = mul(sub(load(x + i, part), m), by);
      if (weight) v = mul(v, load(weight + i, part));
      if (bias) v = add(v, load(bias + i, part));
      store(y + i, v, part);
    }
  }

  Rows rows;
  bool centred;
  const float *weight, *bias;
  double eps, count, gone;  // how many values there would be, and of these zeros that are not there
};

// Statistics of a group of channels of an image. What channels need is kept in scratch: sums, means, factors.
struct GroupNorm : Op {
  explicit GroupNorm(const Fields& f) : x(f.view("x")), y(f.view("y")) {
    weight = f.address<float>("weight");
    bias = f.address<float>("bias");
    eps = f.number("eps", 0);
    const int64_t groups = f.integer("groups");
    each = x.size[kC] / groups;
    const int64_t of = f.integer("of", 0);
    together = each > 0 && each < 4 * kLanes ? 4 * kLanes / each : 1;  // groups: so that registers are filled
    if (together > groups) together = groups;
    across = (groups + together - 1) / together;
    pixels = x.size[kD] * x.size[kH] * x.size[kW];
    values = double((of ? of / groups : each) * pixels);
    gone = values - double(each * pixels);
    for (int a = kH; a >= kD; --a) join(a);
    last = x.stride[kC] == 1 && y.stride[kC] == 1;
    units = pixels * each == 0 ? 0 : x.size[kN] * across;
    scratch = 3 * int64_t(sizeof(float)) * (together * each + kLanes);
    tasks = pieces(units, units * together * each * pixels, f.threads());
  }

  // Lines that follow each other without a gap are one.
  void join(int axis) {
    const int64_t wide = x.size[kW];
    const bool one = x.size[axis] == 1;
    if (!one && (x.stride[axis] != wide * x.stride[kW] || y.stride[axis] != wide * y.stride[kW])) return;
    x.size[kW] *= x.size[axis];
    x.size[axis] = 1;
  }

  void run(const Run& run, int64_t begin, int64_t end) const override {
    const Range range(units, tasks, begin, end);
    for (int64_t u = range.begin; u < range.end; ++u) {
      const int64_t c = u % across * together * each, n = u / across;
      const int64_t left = x.size[kC] - c;
      image(run, n, c, left < together * each ? left : together * each);
    }
  }

  // Channels [c, c + count) of image n.
  void image(const Run& run, int64_t n, int64_t c, int64_t count) const {
    const float* from = x.at(run) + n * x.stride[kN] + c * x.stride[kC];
    float* to = y.at(run) + n * y.stride[kN] + c * y.stride[kC];
    float* sums = reinterpret_cast<float*>(run.scratch);
    float *mean = sums + count + kLanes, *factor = mean + count + kLanes;
    for (int64_t i = 0; i < count; ++i) mean[i] = 0;
    sum_channels<None>(from, count, mean, sums);
    for (int64_t g = 0; g < count; g += each) {
      const float m = float(total(sums + g));
      for (int64_t i = 0; i < each; ++i) mean[g + i] = m;
    }
    sum_channels<Square>(from, count, mean, sums);
    for (int64_t g = 0; g < count; g += each) {
      const double m = double(mean[g]);
      const float by = float(1 / std::sqrt(total(sums + g) + gone / values * m * m + eps));
      for (int64_t i = 0; i < each; ++i) factor[g + i] = weight ? by * weight[c + g + i] : by;
    }
    finish(from, to, count, mean, factor, bias ? bias + c : nullptr);
  }

  double total(const float* sums) const {
    double t = 0;
    for (int64_t i = 0; i < each; ++i) t += double(sums[i]);
    return t / values;
  }

  // f(offset in x, offset in y) for every row of pixels.
  template <typename F>
  PK_INLINE void lines(F f) const {
    for (int64_t d = 0; d < x.size[kD]; ++d)
      for (int64_t h = 0; h < x.size[kH]; ++h)
        f(d * x.stride[kD] + h * x.stride[kH], d * y.stride[kD] + h * y.stride[kH]);
  }

  template <typename F>
  void sum_channels(const float* from, int64_t count, const float* mean, float* sums) const {
    const int64_t step = x.stride[kW], wide = x.size[kW];
    for (int64_t c = 0; c < count; c += last ? kLanes : 1) {
      if (last) {
        const lanemask m = first(count - c);
        const vec about = load(mean + c, m);
        vec acc = zero();
        lines([&](int64_t at, int64_t) {  // the sum of every line by itself
          vec a = zero(), b = zero();
          const float* p = from + at + c;
          int64_t w = 0;
          for (; w + 2 <= wide; w += 2, p += 2 * step) {
            a = add(a, F::of(load(p, m), about));
            b = add(b, F::of(load(p + step, m), about));
          }
          if (w < wide) a = add(a, F::of(load(p, m), about));
          acc = add(acc, add(a, b));
        });
        store(sums + c, acc, m);
      } else {
        double sum = 0;
        lines([&](int64_t at, int64_t) {
          const float* p = from + at + c * x.stride[kC];
          if (step == 1) {
            sum += sum_row<F>(p, wide, mean[c]);
          } else {
            for (int64_t w = 0; w < wide; ++w) {
              float lane[kLanes];
              store(lane, F::of(set(p[w * step]), set(mean[c])));
              sum += double(lane[0]);
            }
          }
        });
        sums[c] = float(sum);
      }
    }
  }

  void finish(const float* from, float* to, int64_t count, const float* mean, const float* factor,
              const float* shift) const {
    lines([&](int64_t in, int64_t out) {
      if (last) return pixels_of(from + in, to + out, count, mean, factor, shift);
      for (int64_t c = 0; c < count; ++c) {
        const float* p = from + in + c * x.stride[kC];
        channel(p, to + out + c * y.stride[kC], mean[c], factor[c], shift ? shift[c] : 0);
      }
    });
  }

  // A line, channels next to each other.
  void pixels_of(const float* from, float* to, int64_t count, const float* mean, const float* factor,
                 const float* shift) const {
    const int64_t wide = x.size[kW], dx = x.stride[kW], dy = y.stride[kW];
    for (int64_t c = 0; c < count; c += kLanes) {
      const lanemask m = first(count - c);
      const vec about = load(mean + c, m), by = load(factor + c, m), b = shift ? load(shift + c, m) : zero();
      if (count - c >= kLanes) {
        for (int64_t w = 0; w < wide; ++w) store(to + w * dy + c, fma(sub(load(from + w * dx + c), about), by, b));
      } else {
        for (int64_t w = 0; w < wide; ++w)
          store(to + w * dy + c, fma(sub(load(from + w * dx + c, m), about), by, b), m);
      }
    }
  }

  // A line of one channel.
  void channel(const float* from, float* to, float mean, float factor, float shift) const {
    const int64_t wide = x.size[kW], dx = x.stride[kW], dy = y.stride[kW];
    int64_t w = 0;
    if (dx == 1 && dy == 1)
      for (; w + kLanes <= wide; w += kLanes)
        store(to + w, fma(sub(load(from + w), set(mean)), set(factor), set(shift)));
    for (; w < wide; ++w) to[w * dy] = (from[w * dx] - mean) * factor + shift;
  }

  View x, y;
  const float *weight, *bias;
  double eps, values, gone;  // of a group: how many there would be, and of these zeros that are not there
  int64_t each, together, across, pixels, units;
  bool last;
};

}  // namespace

// Fields: x, y, axes (of the view, ascending), eps, of (values that are counted; 0: those that are there), weight and
// bias (optional, in the order of a row).
Op* make_layer_norm(const Fields& f) { return new RowNorm(f, true); }

// The same without a mean.
Op* make_rms_norm(const Fields& f) { return new RowNorm(f, false); }

// Fields: x, y, groups, eps, of (channels that are counted; 0: those that are there), weight and bias (optional, one
// per channel).
Op* make_group_norm(const Fields& f) { return new GroupNorm(f); }

}  // namespace PK_ISA
}  // namespace pk
