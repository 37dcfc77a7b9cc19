// Pooling of a planar plane, a row of output at a time: rows of the window are reduced first, columns after.
#pragma once

#include "planar_lanes.h"

namespace pk {
namespace PK_ISA {
namespace planar {

struct Window {
  bool average = false, count_pad = true;
  int64_t divisor = 0;    // 0: the number of elements of the window
  int64_t kernel[2] = {1, 1}, stride[2] = {1, 1}, pad[2] = {0, 0}, dilation[2] = {1, 1};
  int64_t in[2] = {1, 1}, out[2] = {1, 1};   // height and width

  // Sizes are set by the caller.
  static Window of(const Fields& f) {
    Window w;
    w.average = f.integer("kind") == 2;
    w.count_pad = f.integer("count_include_pad", 1) != 0;
    w.divisor = f.integer("divisor", 0);
    f.copy("kernel", 2, w.kernel);
    f.copy("stride", 2, w.stride);
    f.copy("pad", 2, w.pad);
    f.copy("dilation", 2, w.dilation);
    return w;
  }
  // Floats that `pool_row` needs: a reduced row with its padding, and what vectors read beyond.
  int64_t scratch() const {
    return most(in[1] + pad[1], (out[1] - 1) * stride[1] + (kernel[1] - 1) * dilation[1] + 1) + pad[1] + 3 * kLanes;
  }
  bool pairs() const {  // the most common one: 2 x 2, nothing shared, nothing padded
    return kernel[0] == 2 && kernel[1] == 2 && stride[0] == 2 && stride[1] == 2 && !pad[0] && !pad[1] &&
           dilation[0] == 1 && dilation[1] == 1 && out[0] * 2 <= in[0] && out[1] * 2 <= in[1] && !divisor;
  }
};

// Where a plane lies: elements from a row to the next, from a pixel to the next.
struct Pitch {
  int64_t h, w;
};

PK_INLINE vec pooled(bool average, vec a, vec b) { return average ? add(a, b) : max_nan(a, b); }

// Elements of a window along one axis: those inside, or (torch's rule) inside the padded input.
PK_INLINE int64_t counted(const Window& w, int axis, int64_t out) {
  const int64_t first = out * w.stride[axis] - w.pad[axis];
  if (w.count_pad) return least(first + w.kernel[axis], w.in[axis] + w.pad[axis]) - first;
  int64_t inside = 0;
  for (int64_t k = 0; k < w.kernel[axis]; ++k) {
    const int64_t at = first + k * w.dilation[axis];
    inside += at >= 0 && at < w.in[axis];
  }
  return inside;
}

// What vectors of a row read and write at its end: x is read only up to column `width`.
PK_INLINE vec load_row(const float* x, int64_t left) { return left >= kLanes ? load(x) : load(x, first(left)); }
PK_INLINE void store_row(float* y, vec v, int64_t left) {
  if (left >= kLanes) store(y, v);
  else store(y, v, first(left));
}

// Reads up to 2 * kLanes floats beyond a row; they meet nothing but each other.
template <bool average>
inline void pool_pairs(const Window& w, const float* x, int64_t pitch, float* y, int64_t y_pitch) {
  const vec quarter = set(0.25f);
  for (int64_t r = 0; r < w.out[0]; ++r, x += 2 * pitch, y += y_pitch) {
    for (int64_t j = 0; j < w.out[1]; j += kLanes) {
      const float *top = x + 2 * j, *low = top + pitch;
      const vec a = pooled(average, load(top), load(low));
      const vec b = w.out[1] - j <= kLanes / 2 ? a : pooled(average, load(top + kLanes), load(low + kLanes));
      const vec both = pooled(average, evens(a, b), odds(a, b));
      store_row(y + j, average ? mul(both, quarter) : both, w.out[1] - j);
    }
  }
}

// One output row: x is input row 0. scratch: w.scratch() floats.
inline void pool_row(const Window& w, const float* x, int64_t pitch, int64_t out, float* y, float* scratch) {
  const int64_t top = out * w.stride[0] - w.pad[0], size = w.scratch();
  const float nothing = w.average ? 0.f : -__builtin_inff();
  for (int64_t j = 0; j < w.pad[1]; ++j) scratch[j] = nothing;
  for (int64_t j = w.pad[1] + w.in[1]; j < size; ++j) scratch[j] = nothing;
  for (int64_t j = 0; j < w.in[1]; j += kLanes) {
    vec sum = set(nothing);
    for (int64_t k = 0; k < w.kernel[0]; ++k) {
      const int64_t at = top + k * w.dilation[0];
      if (at >= 0 && at < w.in[0]) sum = pooled(w.average, sum, load_row(x + at * pitch + j, w.in[1] - j));
    }
    store_row(scratch + w.pad[1] + j, sum, w.in[1] - j);
  }
  for (int64_t j = 0; j < w.out[1]; j += kLanes) {
    vec sum = set(nothing);
    for (int64_t k = 0; k < w.kernel[1]; ++k) {
      const float* from = scratch + j * w.stride[1] + k * w.dilation[1];
      vec in;
      if (w.stride[1] == 1) {
        in = load(from);
      } else if (w.stride[1] == 2 && w.out[1] - j >= kLanes) {
        in = evens(load(from), load(from + kLanes));
      } else {
        float lane[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) lane[i] = j + i < w.out[1] ? from[i * w.stride[1]] : 0.f;
        in = load(lane);
      }
      sum = pooled(w.average, sum, in);
    }
    if (w.average) {
      float divisor[kLanes];
      const int64_t rows = w.divisor ? 1 : counted(w, 0, out);
      for (int64_t i = 0; i < kLanes; ++i)
        divisor[i] = w.divisor ? float(w.divisor) : j + i < w.out[1] ? float(rows * counted(w, 1, j + i)) : 1.f;
      sum = div(sum, load(divisor));
    }
    store_row(y + j, sum, w.out[1] - j);
  }
}

// One plane.
inline void pool_plane(const Window& w, const float* x, int64_t pitch, float* y, int64_t y_pitch, float* scratch) {
  if (w.pairs() && w.average) return pool_pairs<true>(w, x, pitch, y, y_pitch);
  if (w.pairs()) return pool_pairs<false>(w, x, pitch, y, y_pitch);
  for (int64_t r = 0; r < w.out[0]; ++r) pool_row(w, x, pitch, r, y + r * y_pitch, scratch);
}

// One plane with images in the lanes. Reads whole vectors of images; a pixel's have room for them.
inline void pool_images(const Window& w, const float* x, Pitch in, float* y, Pitch out, int64_t images) {
  const vec nothing = set(w.average ? 0.f : -__builtin_inff());
  for (int64_t r = 0; r < w.out[0]; ++r) {
    const int64_t top = r * w.stride[0] - w.pad[0];
    for (int64_t c = 0; c < w.out[1]; ++c) {
      const int64_t left = c * w.stride[1] - w.pad[1];
      const vec divisor = w.average ? set(float(w.divisor ? w.divisor : counted(w, 0, r) * counted(w, 1, c))) : nothing;
      for (int64_t n = 0; n < images; n += kLanes) {
        vec sum = nothing;
        for (int64_t i = 0; i < w.kernel[0]; ++i) {
          const int64_t h = top + i * w.dilation[0];
          if (h < 0 || h >= w.in[0]) continue;
          for (int64_t j = 0; j < w.kernel[1]; ++j) {
            const int64_t at = left + j * w.dilation[1];
            if (at >= 0 && at < w.in[1]) sum = pooled(w.average, sum, load(x + h * in.h + at * in.w + n));
          }
        }
        store_row(y + r * out.h + c * out.w + n, w.average ? div(sum, divisor) : sum, images - n);
      }
    }
  }
}

}  // namespace planar
}  // namespace PK_ISA
}  // namespace pk
