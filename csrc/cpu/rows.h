// Ops that work on rows: all indices of some axes at fixed indices of the others.
#pragma once

#include "strided.h"

namespace pk {
namespace PK_ISA {

struct Rows {
  View x, y;
  int64_t n = 1, units;         // elements of a row, in the logical order of its axes; how many rows there are
  bool dense_x = true, dense_y = true;
  Axes<2> kept;
  int64_t size[5], x_step[5], y_step[5];  // of the axes of a row, innermost first
  int count = 0;

  // Fields: x, y, axes (of the view, ascending).
  explicit Rows(const Fields& f) : x(f.view("x")), y(f.view("y")) {
    int64_t listed;
    const int64_t* axes = f.list("axes", &listed);
    for (int a = 4; a >= 0; --a) {
      bool along = false;
      for (int64_t i = 0; i < listed; ++i) along = along || axes[i] == a;
      const int64_t strides[2] = {y.stride[a], x.stride[a]};
      if (!along) {
        kept.add(x.size[a], strides);
      } else if (x.size[a] != 1) {
        dense_x = dense_x && x.stride[a] == n;
        dense_y = dense_y && y.stride[a] == n;
        size[count] = x.size[a];
        x_step[count] = x.stride[a];
        y_step[count++] = y.stride[a];
        n *= x.size[a];
      }
    }
    kept.merge();
    units = n == 0 ? 0 : kept.total();
  }

  bool dense() const { return dense_x && dense_y; }
  int64_t scratch() const { return dense() ? 0 : n * int64_t(sizeof(float)); }

  // f(row of x, row of y) for rows of the range; rows that are not dense pass through `scratch`.
  template <typename F>
  PK_INLINE void each(const Run& run, const Range& range, F f) const {
    float* buffer = reinterpret_cast<float*>(run.scratch);
    for (int64_t u = range.begin; u < range.end; ++u) {
      int64_t at[2];
      kept.seek(u, 0, at);
      float* to = y.at(run) + at[0];
      const float* from = x.at(run) + at[1];
      if (!dense_x) {
        for (int64_t i = 0; i < n; ++i) buffer[i] = from[offset(i, x_step)];
        from = buffer;
      }
      f(from, dense_y ? to : buffer);
      if (!dense_y)
        for (int64_t i = 0; i < n; ++i) to[offset(i, y_step)] = buffer[i];
    }
  }

 private:
  PK_INLINE int64_t offset(int64_t i, const int64_t* step) const {
    int64_t at = 0;
    for (int a = 0; a < count; ++a) {
      at += i % size[a] * step[a];
      i /= size[a];
    }
    return at;
  }
};

}  // namespace PK_ISA
}  // namespace pk
