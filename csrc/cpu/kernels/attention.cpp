// attention: softmax(scale q k^T + mask) v, Vaswani et al. 2017, equation 1. The scores of a few rows of q at a time
// stay in the second cache; k and v of a head are packed once.
#include "../rows.h"
#include "product.h"
#include "softmax.h"

namespace pk {
namespace PK_ISA {
namespace {

constexpr int64_t kScores = 128 << 10;  // bytes of scores at a time

struct Attention : Op {
  explicit Attention(const Fields& f)
      : q(f.view("q")), k(f.view("k")), v(f.view("v")), y(f.view("y")), mask(f.view("mask")) {
    causal = f.integer("causal", 0) != 0;
    factor = float(f.number("scale", 1));
    queries = y.size[kH];
    keys = k.size[kH];
    width = q.size[kW];
    out = v.size[kW];
    if ((q.stride[kW] != 1 && width > 1) || (y.stride[kW] != 1 && out > 1)) fail("rows of q and y must be dense");
    pitch = Panels(keys).vectors * kLanes;
    block = kScores / (4 * pitch + 1) / 12 * 12;
    if (block < 12) block = 12;
    if (block > queries) block = queries;
    heads = y.size[kN] * y.size[kC] * y.size[kD];
    const int64_t threads = f.threads(), all = block > 0 ? (queries + block - 1) / block : 0;
    bands = threads > 1 && heads < 2 * threads ? (all < 2 * threads ? all : 2 * threads) : 1;
    if (bands < 1) bands = 1;
    units = queries * out == 0 ? 0 : heads * bands;
    tasks = pieces(units, heads * queries * keys * (width + out) / 2, threads);
    const int64_t deep = width > keys ? width : keys;
    scratch = 4 * (packed_floats(width, keys) + packed_floats(keys, out) + block * pitch + partial_floats(block, deep));
  }

  void run(const Run& run, int64_t begin, int64_t end) const override {
    const Range range(units, tasks, begin, end);
    float* packed_k = reinterpret_cast<float*>(run.scratch);
    float* packed_v = packed_k + packed_floats(width, keys);
    float* scores = packed_v + packed_floats(keys, out);
    float* partial = scores + block * pitch;
    int64_t have = -1;
    for (int64_t u = range.begin; u < range.end; ++u) {
      const int64_t head = u / bands, band = u % bands;
      if (have != head) {
        pack(k.at(run) + at(k, head), k.stride[kW], k.stride[kH], width, keys, packed_k);
        pack(v.at(run) + at(v, head), v.stride[kH], v.stride[kW], keys, out, packed_v);
        have = head;
      }
      const float* q0 = q.at(run) + at(q, head);
      const float* mask0 = mask.there ? mask.at(run) + at(mask, head) : nullptr;
      float* y0 = y.at(run) + at(y, head);
      const int64_t last = (band + 1) * queries / bands;
      for (int64_t row = band * queries / bands; row < last; row += block) {
        const int64_t count = last - row < block ? last - row : block;
        multiply(q0 + row * q.stride[kH], q.stride[kH], count, packed_k, width, keys, scores, pitch, plain, partial);
        for (int64_t i = 0; i < count; ++i)
          weights(scores + i * pitch, row + i, mask0 ? mask0 + (row + i) * mask.stride[kH] : nullptr);
        multiply(scores, pitch, count, packed_v, keys, out, y0 + row * y.stride[kH], y.stride[kH], plain, partial);
      }
    }
  }

  // Scores of one query to weights. Keys that it must not see get none; if it sees no key at all, all weights are 0.
  void weights(float* s, int64_t row, const float* added) const {
    int64_t seen = causal && row + 1 < keys ? row + 1 : keys;
    for (int64_t j = 0; j < seen; j += kLanes) {
      const lanemask m = first(seen - j);
      vec x = mul(load(s + j, m), set(factor));
      if (added && mask.stride[kW] == 1) x = add(x, load(added + j, m));
      else if (added) x = add(x, spread(added + j * mask.stride[kW], mask.stride[kW], seen - j));
      store(s + j, x, m);
    }
    for (int64_t j = seen; j < keys; ++j) s[j] = 0;
    const float top = largest_of(s, seen);
    if (top == -__builtin_inff()) {
      for (int64_t j = 0; j < seen; ++j) seen = s[j] == top ? seen : -1;  // a NaN among them: NaN it is
      for (int64_t j = 0; j < keys; ++j) s[j] = seen < 0 ? __builtin_nanf("") : 0;
      return;
    }
    scale_row(s, seen, 1 / exp_row(s, s, seen, top));
  }

  static PK_INLINE vec spread(const float* p, int64_t stride, int64_t n) {
    float lane[kLanes] = {};
    for (int64_t l = 0; l < kLanes && l < n; ++l) lane[l] = p[l * stride];
    return load(lane);
  }

  // Where a head begins. Fewer heads (of k, v, mask) than y has are shared by as many in a row.
  int64_t at(const View& view, int64_t head) const {
    int64_t offset = 0;
    for (int axis = kD; axis >= kN; --axis) {
      offset += head % y.size[axis] * view.size[axis] / y.size[axis] * view.stride[axis];
      head /= y.size[axis];
    }
    return offset;
  }

  View q, k, v, y, mask;
  Epilogue plain;
  bool causal;
  float factor;
  int64_t queries, keys, width, out, pitch, block, heads, bands, units;
};

}  // namespace

// Fields: q, k, v, y and mask (optional; added to the scores; of the scores' sizes, or stride 0): views whose last axes
// are h (queries or keys) and w; causal; scale.
Op* make_attention(const Fields& f) { return new Attention(f); }

}  // namespace PK_ISA
}  // namespace pk
