// softmax and log-softmax over an axis. The largest element is taken off first; a NaN makes its whole row NaN.
#include "softmax.h"

#include "../rows.h"

namespace pk {
namespace PK_ISA {
namespace {

struct Softmax : Op {
  explicit Softmax(const Fields& f) : rows(f), log_of(f.integer("log", 0) != 0) {
    const Axes<2>& kept = rows.kept;
    columns = !rows.dense() && rows.count == 1 && kept.count > 0 && kept.stride[0][0] == 1 && kept.stride[0][1] == 1;
    if (columns) {
      across = (kept.size[0] + kLanes - 1) / kLanes;
      units = rows.units == 0 ? 0 : rows.units / kept.size[0] * across;
    } else {
      units = rows.units;
      scratch = rows.scratch();
    }
    tasks = pieces(units, rows.units * rows.n * 4, f.threads());
  }

  void run(const Run& run, int64_t begin, int64_t end) const override {
    const Range range(units, tasks, begin, end);
    if (columns) {
      for (int64_t u = range.begin; u < range.end; ++u) {
        const int64_t i = u % across * kLanes;
        int64_t at[2];
        rows.kept.seek(u / across, 1, at);
        column(rows.x.at(run) + at[1] + i, rows.y.at(run) + at[0] + i, first(rows.kept.size[0] - i));
      }
    } else if (log_of) {
      rows.each(run, range, [&](const float* x, float* y) { log_softmax_row(x, y, rows.n); });
    } else {
      rows.each(run, range, [&](const float* x, float* y) { softmax_row(x, y, rows.n); });
    }
  }

  // kLanes rows side by side.
  void column(const float* x, float* y, lanemask m) const {
    const int64_t dx = rows.x_step[0], dy = rows.y_step[0], n = rows.n;
    vec top = set(-__builtin_inff()), total = zero();
    for (int64_t i = 0; i < n; ++i) top = max(load(x + i * dx, m), top);
    for (int64_t i = 0; i < n; ++i) {
      const vec d = sub(load(x + i * dx, m), top), e = exp(d);
      total = add(total, e);
      store(y + i * dy, log_of ? d : e, m);
    }
    const vec last = log_of ? log(total) : div(set(1.f), total);
    for (int64_t i = 0; i < n; ++i) {
      const vec v = load(y + i * dy, m);
      store(y + i * dy, log_of ? sub(v, last) : mul(v, last), m);
    }
  }

  Rows rows;
  bool log_of, columns;
  int64_t units, across = 1;
};

}  // namespace

// Fields: x, y, axes (one of the view's), log.
Op* make_softmax(const Fields& f) { return new Softmax(f); }

}  // namespace PK_ISA
}  // namespace pk
