// binary, scale, prelu, activation: y = activation(f(a, p, q)) of operands that are broadcast by strides of 0.
#include "../epilogue.h"
#include "../math.h"
#include "../strided.h"

namespace pk {
namespace PK_ISA {
namespace {

struct AddF { static PK_INLINE vec of(vec a, vec p, vec) { return add(a, p); } };
struct SubF { static PK_INLINE vec of(vec a, vec p, vec) { return sub(a, p); } };
struct MulF { static PK_INLINE vec of(vec a, vec p, vec) { return mul(a, p); } };
struct DivF { static PK_INLINE vec of(vec a, vec p, vec) { return div(a, p); } };
struct MaxF { static PK_INLINE vec of(vec a, vec p, vec) { return max_nan(a, p); } };
struct MinF { static PK_INLINE vec of(vec a, vec p, vec) { return select(is_nan(a), a, min(a, p)); } };
struct ScaleF { static PK_INLINE vec of(vec a, vec p, vec q) { return fma(a, p, q); } };
struct PreluF { static PK_INLINE vec of(vec a, vec p, vec) { return select(greater(a, zero()), a, mul(a, p)); } };
struct SameF { static PK_INLINE vec of(vec a, vec, vec) { return a; } };

enum { kY, kA, kP, kQ, kOperands };

struct Block {
  float* y;
  const float *a, *p, *q;
  int64_t rows, n;
};

class Map : public Op {
 public:
  using Function = void (*)(const Map&, const Block&);

  Map(const Fields& f, const View& a, const View& p, const float* fixed_p, const View& q, const float* fixed_q)
      : y_(f.view("y")), a_(a), p_(p), q_(q), fixed_p_(fixed_p), fixed_q_(fixed_q), end_(Epilogue::of(f)) {
    add_views(&blocks.axes, {&y_, &a_, &p_, &q_});
    blocks.cut();
    tasks = pieces(blocks.units, blocks.elements, f.threads());
  }

  template <typename F>
  Map* with() {
    const int64_t* s = blocks.step;
    const bool plain = s[kY] == 1 && (s[kQ] == s[kP] || fixed_q_ == nullptr);
    if (plain && s[kA] == 1 && s[kP] == 1) function_ = rows_of<F, 1, 1>;
    else if (plain && s[kA] == 1 && s[kP] == 0) function_ = rows_of<F, 1, 0>;
    else if (plain && s[kA] == 0 && s[kP] == 1) function_ = rows_of<F, 0, 1>;
    else function_ = any_strides<F>;
    return this;
  }

  void run(const Run& run, int64_t begin, int64_t end) const override {
    float* y = y_.at(run);
    const float* a = a_.at(run);
    const float* p = fixed_p_ ? fixed_p_ : p_.at(run);
    const float* q = fixed_q_ ? fixed_q_ : p;
    blocks.each(Range(blocks.units, tasks, begin, end), [&](const int64_t* at, int64_t rows, int64_t n) {
      function_(*this, Block{y + at[kY], a + at[kA], p + at[kP], q + at[kQ], rows, n});
    });
  }

 private:
  template <int contiguous>
  static PK_INLINE vec take(const float* p, int64_t i) { return contiguous ? load(p + i) : set(*p); }
  template <int contiguous>
  static PK_INLINE vec take(const float* p, int64_t i, lanemask m) { return contiguous ? load(p + i, m) : set(*p); }

  // y contiguous, a and p (and q like p) contiguous or the same along a row.
  template <typename F, int A, int P>
  static void rows_of(const Map& map, const Block& b) {
    const vec low = set(map.end_.low), high = set(map.end_.high);
    const int64_t* step = map.blocks.row_step;
    for (int64_t r = 0; r < b.rows; ++r) {
      float* y = b.y + r * step[kY];
      const float *a = b.a + r * step[kA], *p = b.p + r * step[kP], *q = b.q + r * step[kQ];
      int64_t i = 0;
      for (; i + kLanes <= b.n; i += kLanes)
        store(y + i, clamp(F::of(take<A>(a, i), take<P>(p, i), take<P>(q, i)), low, high));
      if (i < b.n) {
        const lanemask m = first(b.n - i);
        store(y + i, clamp(F::of(take<A>(a, i, m), take<P>(p, i, m), take<P>(q, i, m)), low, high), m);
      }
      if (map.end_.late) activate_row(map.end_.act, y, b.n, map.end_.constants);
    }
  }

  template <typename F>
  static void any_strides(const Map& map, const Block& b) {
    const int64_t *step = map.blocks.row_step, *s = map.blocks.step;
    for (int64_t r = 0; r < b.rows; ++r) {
      for (int64_t i = 0; i < b.n; i += kLanes) {
        const int64_t lanes = b.n - i < kLanes ? b.n - i : kLanes;
        float a[kLanes] = {}, p[kLanes] = {}, q[kLanes] = {};
        for (int64_t l = 0; l < lanes; ++l) {
          a[l] = b.a[r * step[kA] + (i + l) * s[kA]];
          p[l] = b.p[r * step[kP] + (i + l) * s[kP]];
          q[l] = b.q[r * step[kQ] + (i + l) * s[kQ]];
        }
        store(a, clamp(F::of(load(a), load(p), load(q)), set(map.end_.low), set(map.end_.high)));
        if (map.end_.late) activate_row(map.end_.act, a, lanes, map.end_.constants);
        for (int64_t l = 0; l < lanes; ++l) b.y[r * step[kY] + (i + l) * s[kY]] = a[l];
      }
    }
  }

  Blocks<kOperands> blocks;
  View y_, a_, p_, q_;
  const float *fixed_p_, *fixed_q_;
  Epilogue end_;
  Function function_ = nullptr;
};

// A view of one number per element of an axis, or of one number for all.
View along(const Fields& f) {
  View v;
  const int64_t axis = f.integer("axis");
  if (axis < 0 || axis >= 5) fail("axis is not one of a view's");
  v.stride[axis] = f.integer("count") > 1 ? 1 : 0;
  return v;
}

}  // namespace

// y = a (kind) b. Fields: y, a, b (of y's sizes, stride 0 where broadcast), kind, act.
Op* make_binary(const Fields& f) {
  const View a = f.view("a"), b = f.view("b");
  Map* map = new Map(f, a, b, nullptr, b, nullptr);
  switch (f.integer("kind")) {  // as numbered by backends/cpu/simple.py
    case 0: return map->with<AddF>();
    case 1: return map->with<SubF>();
    case 2: return map->with<MulF>();
    case 3: return map->with<DivF>();
    case 4: return map->with<MaxF>();
    case 5: return map->with<MinF>();
  }
  delete map;
  fail("no such kind of binary");
}

// y = x * scale + shift along an axis. Fields: y, x, axis, count (numbers along it, or 1), scale, shift, act.
Op* make_scale(const Fields& f) {
  const View by = along(f);
  return (new Map(f, f.view("x"), by, f.address<float>("scale"), by, f.address<float>("shift")))->with<ScaleF>();
}

// y = x where x > 0, else x * slope. Fields: y, x, axis, count, slope, act.
Op* make_prelu(const Fields& f) {
  const View by = along(f);
  return (new Map(f, f.view("x"), by, f.address<float>("slope"), by, nullptr))->with<PreluF>();
}

// y = activation(x). Fields: y, x, act.
Op* make_activation(const Fields& f) {
  const View x = f.view("x");
  return (new Map(f, x, x, nullptr, x, nullptr))->with<SameF>();
}

}  // namespace PK_ISA
}  // namespace pk
