// Max and average pooling, adaptive too: every output has a window of inputs along each axis, listed in tables.
//
// Windows are clipped to the input, so a halo is neither needed nor read. A NaN in a window is its result.
#include "../strided.h"

namespace pk {
namespace PK_ISA {
namespace {

struct MaxF {
  static PK_INLINE float start() { return -__builtin_inff(); }
  static PK_INLINE vec of(vec acc, vec x) { return max_nan(acc, x); }
  static PK_INLINE float of(float acc, float x) { return x > acc || x != x ? x : acc; }
};
struct SumF {
  static PK_INLINE float start() { return 0; }
  static PK_INLINE vec of(vec acc, vec x) { return add(acc, x); }
  static PK_INLINE float of(float acc, float x) { return acc + x; }
};

// kLanes numbers, every `step`-th (1 or 2); only the first n are needed, and no more than those are read. full: n is
// kLanes or more.
template <int step, bool full>
PK_INLINE vec spread(const float* p, int64_t n) {
  if (step == 1) return full ? load(p) : load(p, first(n));
#if defined(__AVX512F__) || defined(__AVX2__)
  const vec a = full ? load(p) : load(p, first(2 * n - 1));
  const vec b = load(p + kLanes, first(full ? kLanes - 1 : 2 * n - 1 - kLanes));
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__)
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return _mm512_permutex2var_ps(a, even, b);
#elif defined(__AVX2__)
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_shuffle_ps(a, b, 0x88)), 0xd8));
#else
  vec x = zero();
  for (int64_t i = 0; i < kLanes; ++i) if (full || i < n) x[i] = p[2 * i];
  return x;
#endif
}

struct Pool : Op {
  using LineFn = void (*)(const Pool&, const float* x, float* y, int64_t d, int64_t h);

  explicit Pool(const Fields& f) : x(f.view("x")), y(f.view("y")) {
    if (x.stride[kC] != 1 && x.stride[kN] == 1 && y.stride[kN] == 1) {  // images next to each other serve as channels
      exchange(&x);
      exchange(&y);
    }
    int64_t count;
    for (int a = 0; a < 3; ++a) {
      const char* const names[3][3] = {{"start_d", "count_d", "divide_d"}, {"start_h", "count_h", "divide_h"},
                                       {"start_w", "count_w", "divide_w"}};
      start[a] = f.list(names[a][0], &count);
      if (count != y.size[kD + a]) fail("one window for every output");
      counts[a] = f.list(names[a][1], &count);
      divide[a] = f.list(names[a][2], &count);
    }
    f.copy("dilation", 3, dilation);
    f.copy("stride", 3, stride);
    divisor = float(f.number("divisor", 0));
    while (inner_begin < y.size[kW] && !whole(inner_begin)) ++inner_begin;
    inner_end = inner_begin;
    while (inner_end < y.size[kW] && whole(inner_end)) ++inner_end;
    if (f.integer("kind") == 0) choose<MaxF>();
    else choose<SumF>();
    lines = y.size[kN] * y.size[kD] * y.size[kH];
    int64_t work = y.size[kC] * y.size[kW];
    for (int a = 0; a < 3; ++a) work *= y.size[kD + a] > 0 ? counts[a][y.size[kD + a] / 2] : 1;
    if (y.size[kC] == 0 || y.size[kW] == 0) lines = 0;
    tasks = pieces(lines, lines * work, f.threads());
  }

  static void exchange(View* v) {
    const int64_t size = v->size[kN], step = v->stride[kN];
    v->size[kN] = v->size[kC], v->stride[kN] = v->stride[kC];
    v->size[kC] = size, v->stride[kC] = step;
  }

  // Whether the window of output w is one of a regular row: as wide as the first whole one, a stride further.
  bool whole(int64_t w) const {
    const int64_t middle = y.size[kW] / 2;
    return counts[2][w] == counts[2][middle] && divide[2][w] == divide[2][middle] && stride[2] > 0 &&
           start[2][w] == start[2][middle] + (w - middle) * stride[2];
  }

  template <typename F>
  void choose();

  void run(const Run& run, int64_t begin, int64_t end) const override {
    const Range range(lines, tasks, begin, end);
    for (int64_t line = range.begin; line < range.end; ++line) {
      const int64_t h = line % y.size[kH], d = line / y.size[kH] % y.size[kD], n = line / y.size[kH] / y.size[kD];
      const float* from = x.at(run) + n * x.stride[kN] + start[0][d] * x.stride[kD] + start[1][h] * x.stride[kH];
      line_of(*this, from, y.at(run) + n * y.stride[kN] + d * y.stride[kD] + h * y.stride[kH], d, h);
    }
  }

  // What a sum is multiplied with.
  PK_INLINE float factor(int64_t d, int64_t h, int64_t w) const {
    return 1 / (divisor != 0 ? divisor : float(divide[0][d] * divide[1][h] * divide[2][w]));
  }

  View x, y;
  const int64_t *start[3], *counts[3], *divide[3];
  int64_t dilation[3], stride[3], lines, inner_begin = 0, inner_end = 0;
  float divisor;
  LineFn line_of;
};

// V registers of channels of one output.
template <typename F, int V>
PK_INLINE void window(const Pool& o, const float* x, float* y, int64_t d, int64_t h, int64_t w, lanemask m) {
  const int64_t deep = o.counts[0][d], high = o.counts[1][h], wide = o.counts[2][w];
  vec acc[V];
  for (int v = 0; v < V; ++v) acc[v] = set(F::start());
  const int64_t step = o.dilation[2] * o.x.stride[kW];
  for (int64_t i = 0; i < deep && wide > 0; ++i)
    for (int64_t j = 0; j < high; ++j) {  // a sum of sums of rows: more accurate than one long sum
      const float* p = x + i * o.dilation[0] * o.x.stride[kD] + j * o.dilation[1] * o.x.stride[kH];
      vec part[V];
      for (int v = 0; v < V; ++v) part[v] = V == 1 ? load(p, m) : load(p + v * kLanes);
      for (int64_t k = 1; k < wide; ++k) {
        p += step;
        for (int v = 0; v < V; ++v) part[v] = F::of(part[v], V == 1 ? load(p, m) : load(p + v * kLanes));
      }
      for (int v = 0; v < V; ++v) acc[v] = F::of(acc[v], part[v]);
    }
  if (F::start() == 0) {
    const vec factor = set(o.factor(d, h, w));
    for (int v = 0; v < V; ++v) acc[v] = mul(acc[v], factor);
  }
  for (int v = 0; v < V; ++v)
    if (V == 1) store(y, acc[v], m);
    else store(y + v * kLanes, acc[v]);
}

// Channels next to each other.
template <typename F>
void line_last(const Pool& o, const float* x, float* y, int64_t d, int64_t h) {
  for (int64_t w = 0; w < o.y.size[kW]; ++w) {
    const float* from = x + o.start[2][w] * o.x.stride[kW];
    float* to = y + w * o.y.stride[kW];
    int64_t c = 0;
    for (; c + 4 * kLanes <= o.y.size[kC]; c += 4 * kLanes) window<F, 4>(o, from + c, to + c, d, h, w, first(kLanes));
    for (; c < o.y.size[kC]; c += kLanes) window<F, 1>(o, from + c, to + c, d, h, w, first(o.y.size[kC] - c));
  }
}

template <typename F>
float element(const Pool& o, const float* x, int64_t d, int64_t h, int64_t w) {
  float acc = F::start();
  for (int64_t i = 0; i < o.counts[0][d]; ++i)
    for (int64_t j = 0; j < o.counts[1][h]; ++j) {
      float part = F::start();
      const float* row = x + i * o.dilation[0] * o.x.stride[kD] + j * o.dilation[1] * o.x.stride[kH] +
                         o.start[2][w] * o.x.stride[kW];
      for (int64_t k = 0; k < o.counts[2][w]; ++k) part = F::of(part, row[k * o.dilation[2] * o.x.stride[kW]]);
      acc = F::of(acc, part);
    }
  return F::start() == 0 ? acc * o.factor(d, h, w) : acc;
}

template <typename F>
void line_any(const Pool& o, const float* x, float* y, int64_t d, int64_t h) {
  for (int64_t c = 0; c < o.y.size[kC]; ++c)
    for (int64_t w = 0; w < o.y.size[kW]; ++w)
      y[c * o.y.stride[kC] + w * o.y.stride[kW]] = element<F>(o, x + c * o.x.stride[kC], d, h, w);
}

// kLanes outputs (or the first n) of a row of pixels, from the window of the first one on.
template <typename F, int step, bool full>
PK_INLINE vec windows(const Pool& o, const float* x, int64_t d, int64_t h, int64_t w, int64_t n) {
  const int64_t deep = o.counts[0][d], high = o.counts[1][h], wide = o.counts[2][w];
  vec acc = set(F::start());
  for (int64_t i = 0; i < deep && wide > 0; ++i)
    for (int64_t j = 0; j < high; ++j) {
      const float* row = x + i * o.dilation[0] * o.x.stride[kD] + j * o.dilation[1] * o.x.stride[kH];
      vec part = spread<step, full>(row, n);
      for (int64_t k = 1; k < wide; ++k) part = F::of(part, spread<step, full>(row + k * o.dilation[2], n));
      acc = F::of(acc, part);
    }
  return F::start() == 0 ? mul(acc, set(o.factor(d, h, w))) : acc;
}

// Pixels next to each other: a register of outputs at a time where their windows are whole and 1 or 2 apart.
template <typename F, int step>
void line_planar(const Pool& o, const float* x, float* y, int64_t d, int64_t h) {
  for (int64_t c = 0; c < o.y.size[kC]; ++c, x += o.x.stride[kC], y += o.y.stride[kC]) {
    for (int64_t w = 0; w < o.inner_begin; ++w) y[w] = element<F>(o, x, d, h, w);
    int64_t w = o.inner_begin;
    for (; w + kLanes <= o.inner_end; w += kLanes)
      store(y + w, windows<F, step, true>(o, x + o.start[2][w], d, h, w, kLanes));
    const int64_t n = o.inner_end - w;
    if (n > 0) store(y + w, windows<F, step, false>(o, x + o.start[2][w], d, h, w, n), first(n));
    for (w = o.inner_end; w < o.y.size[kW]; ++w) y[w] = element<F>(o, x, d, h, w);
  }
}

template <typename F>
void Pool::choose() {
  const bool planar = x.stride[kW] == 1 && y.stride[kW] == 1;
  const bool narrow = planar && stride[2] <= 2 && y.size[kC] < kLanes && y.size[kC] < y.size[kW];  // few channels
  if (x.stride[kC] == 1 && y.stride[kC] == 1 && !narrow) line_of = line_last<F>;
  else if (planar && stride[2] == 1) line_of = line_planar<F, 1>;
  else if (planar && stride[2] == 2) line_of = line_planar<F, 2>;
  else line_of = line_any<F>;
}

}  // namespace

// Fields: x, y; kind (0 max, 1 average); per axis d, h, w the lists start_*, count_* (the window of every output) and
// divide_* (their product divides an average, where divisor is 0); dilation; stride (0 where windows are irregular).
Op* make_pool(const Fields& f) { return new Pool(f); }

}  // namespace PK_ISA
}  // namespace pk
