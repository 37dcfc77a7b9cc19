// reduce: mean, sum, largest, smallest over some axes, of any strides.
//
// Sums are made in short stretches that are added with TwoSum (Knuth, TAOCP 4.2.2; Ogita, Rump, Oishi, "Accurate Sum
// and Dot Product", 2005): the error does not grow with the number of stretches.
#include "../strided.h"

namespace pk {
namespace PK_ISA {
namespace {

constexpr int64_t kStretch = 16;  // terms that are added plainly

PK_INLINE bool any_nan(vec x) {
  const float bad = sum(select(is_nan(x), set(1.f), zero()));
  return bad > 0;
}

struct SumF {
  static constexpr bool exact = true;
  static PK_INLINE float start() { return 0; }
  static PK_INLINE vec of(vec acc, vec x) { return add(acc, x); }
  static PK_INLINE float across(vec x) { return sum(x); }
};
struct MaxF {
  static constexpr bool exact = false;
  static PK_INLINE float start() { return -__builtin_inff(); }
  static PK_INLINE vec of(vec acc, vec x) { return max_nan(acc, x); }
  static PK_INLINE float across(vec x) { return any_nan(x) ? __builtin_nanf("") : largest(x); }
};
struct MinF {
  static constexpr bool exact = false;
  static PK_INLINE float start() { return __builtin_inff(); }
  static PK_INLINE vec of(vec acc, vec x) { return select(is_nan(acc), acc, min(acc, x)); }
  static PK_INLINE float across(vec x) { return any_nan(x) ? __builtin_nanf("") : -largest(sub(zero(), x)); }
};

// A result that stretches are added to.
template <typename F>
struct Total {
  vec value = set(F::start()), lost = zero();

  PK_INLINE void take(vec x) {
    if (F::exact) {
      const vec sum = add(value, x), z = sub(sum, value);
      lost = add(lost, add(sub(value, sub(sum, z)), sub(x, z)));
      value = sum;
    } else {
      value = F::of(value, x);
    }
  }
  // Where infinities met, what was lost is NaN, and the plain sum says what torch says.
  PK_INLINE vec result() const { return F::exact ? add(value, select(is_nan(lost), zero(), lost)) : value; }
};

struct Reduce : Op {
  using RowFn = void (*)(const Reduce&, const float* x, float* y, int64_t n);

  explicit Reduce(const Fields& f) : x(f.view("x")), y(f.view("y")) {
    int64_t count;
    const int64_t* axes = f.list("axes", &count);
    bool gone[5] = {};
    for (int64_t i = 0; i < count; ++i) gone[axes[i]] = true;
    for (int a = 0; a < 5; ++a) {
      const int64_t strides[2] = {x.stride[a], gone[a] ? 0 : y.stride[a]};
      if (gone[a]) over.add(x.size[a], strides);
      else kept.axes.add(x.size[a], strides);
    }
    over.merge();
    kept.cut();
    terms = over.total();
    if (terms == 0) fail("there is nothing to reduce");
    divisor = f.integer("kind") == 0 ? float(terms) : 1;
    if (f.integer("kind") <= 1) choose<SumF>();
    else if (f.integer("kind") == 2) choose<MaxF>();
    else choose<MinF>();
    // Units are single results here, so that few results of many terms are shared out too.
    group = columns ? 4 * kLanes : 1;
    across = (kept.n + group - 1) / group;
    units = kept.elements == 0 ? 0 : kept.elements / kept.n * across;
    tasks = pieces(units, kept.elements * terms, f.threads());
  }

  template <typename F>
  void choose();

  void run(const Run& run, int64_t begin, int64_t end) const override {
    const Range range(units, tasks, begin, end);
    for (int64_t u = range.begin; u < range.end; ++u) {
      const int64_t i = u % across * group;
      int64_t at[2];
      kept.axes.seek(u / across, 1, at);
      row(*this, x.at(run) + at[0] + i * kept.step[0], y.at(run) + at[1] + i * kept.step[1],
          kept.n - i < group ? kept.n - i : group);
    }
  }

  View x, y;
  Axes<2> over;      // the axes that go
  Blocks<2> kept;    // ordered by x's strides
  int64_t terms, group, across, units;
  float divisor;
  bool columns = false;   // the innermost axis of x stays
  RowFn row;
};

// V registers of results that lie next to each other in x.
template <typename F, int V>
PK_INLINE void column(const Reduce& o, const float* x, float* y, int64_t count) {
  const lanemask m = first(count);
  const int64_t n = o.over.count > 0 ? o.over.size[0] : 1, step = o.over.count > 0 ? o.over.stride[0][0] : 0;
  Total<F> total[V];
  for (int64_t r = 0; r < o.terms / n; ++r) {
    int64_t at[2];
    o.over.seek(r, 1, at);
    for (int64_t i = 0; i < n; i += kStretch) {
      const float* p = x + at[0] + i * step;
      vec part[V];
      for (int v = 0; v < V; ++v) part[v] = V == 1 ? load(p, m) : load(p + v * kLanes);
      for (int64_t j = 1; j < kStretch && i + j < n; ++j) {
        p += step;
        for (int v = 0; v < V; ++v) part[v] = F::of(part[v], V == 1 ? load(p, m) : load(p + v * kLanes));
      }
      for (int v = 0; v < V; ++v) total[v].take(part[v]);
    }
  }
  for (int v = 0; v < V; ++v) {
    const vec out = div(total[v].result(), set(o.divisor));
    if (o.kept.step[1] == 1) {
      if (V == 1) store(y, out, m);
      else store(y + v * kLanes, out);
    } else {
      float lane[kLanes];
      store(lane, out);
      for (int64_t l = 0; l < kLanes && v * kLanes + l < count; ++l) y[(v * kLanes + l) * o.kept.step[1]] = lane[l];
    }
  }
}

template <typename F>
void column_of(const Reduce& o, const float* x, float* y, int64_t n) {
  if (n == 4 * kLanes) return column<F, 4>(o, x, y, n);
  for (int64_t i = 0; i < n; i += kLanes) column<F, 1>(o, x + i, y + i * o.kept.step[1], n - i);
}

// One result.
template <typename F>
void single(const Reduce& o, const float* x, float* y, int64_t) {
  const int64_t n = o.over.count > 0 ? o.over.size[0] : 1, step = o.over.count > 0 ? o.over.stride[0][0] : 1;
  Total<F> total;
  for (int64_t r = 0; r < o.terms / n; ++r) {
    int64_t at[2];
    o.over.seek(r, 1, at);
    const float* p = x + at[0];
    for (int64_t i = 0; i < n; i += kStretch * kLanes) {
      const int64_t left = n - i < kStretch * kLanes ? n - i : kStretch * kLanes;
      vec part[2] = {set(F::start()), set(F::start())};
      if (step == 1) {
        int64_t j = 0;
        for (; j + 2 * kLanes <= left; j += 2 * kLanes) {
          part[0] = F::of(part[0], load(p + i + j));
          part[1] = F::of(part[1], load(p + i + j + kLanes));
        }
        for (; j < left; j += kLanes) {
          const lanemask m = first(left - j);
          part[0] = F::of(part[0], select(m, load(p + i + j, m), set(F::start())));
        }
      } else {
        for (int64_t j = 0; j < left; j += kLanes) {
          float lane[kLanes];
          for (int64_t l = 0; l < kLanes; ++l) lane[l] = j + l < left ? p[(i + j + l) * step] : F::start();
          part[0] = F::of(part[0], load(lane));
        }
      }
      total.take(F::of(part[0], part[1]));
    }
  }
  *y = F::across(total.result()) / o.divisor;
}

template <typename F>
void Reduce::choose() {
  const bool first_goes = over.count > 0 && over.stride[0][0] == 1;
  columns = !first_goes && kept.axes.count > 0 && kept.step[0] == 1;
  row = columns ? column_of<F> : single<F>;
}

}  // namespace

// Fields: x, y (sizes of axes that go are not read), kind (0 mean, 1 sum, 2 largest, 3 smallest), axes of the view.
Op* make_reduce(const Fields& f) { return new Reduce(f); }

}  // namespace PK_ISA
}  // namespace pk
