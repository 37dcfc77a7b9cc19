// Explicit im2col, depthwise convolution, pooling, resizing: what slides over images.
#pragma once

#include "activate.h"

namespace pk::cuda {

// Numbers what a block of threads does: element `thread` of task `task`.
__device__ __forceinline__ int item_of(int task) { return task * kThreads + int(threadIdx.x); }

// Windows copied into rows, 16 bytes at a time.
template <typename T>
struct Im2col {
  using Args = Im2colArgs;

  static __device__ __forceinline__ void task(const Im2colArgs& g, const Bases& bases, int task, char*) {
    constexpr int kVector = Pack<T>::kCount;
    const int vectors = g.row_stride / kVector, item = item_of(task);
    if (item >= g.rows * vectors) return;
    int m = item / vectors;
    const int k0 = item % vectors * kVector;
    const int w0 = m % g.out[2];
    m /= g.out[2];
    const int h0 = m % g.out[1];
    m /= g.out[1];
    const int d0 = m % g.out[0], n = m / g.out[0], channels = g.x.size[1];
    const T* const x = at<T>(g.x.place, bases) + n * g.x.stride[0];
    const auto source = [&](int k) -> const T* {
      if (k >= g.depth) return nullptr;
      int tap = k / channels;
      const int c = k % channels;
      const int w = w0 * g.stride[2] - g.pad[2] + tap % g.kernel[2] * g.dilation[2];
      tap /= g.kernel[2];
      const int h = h0 * g.stride[1] - g.pad[1] + tap % g.kernel[1] * g.dilation[1];
      const int d = d0 * g.stride[0] - g.pad[0] + tap / g.kernel[1] * g.dilation[0];
      const bool inside = d >= 0 && d < g.x.size[2] && h >= 0 && h < g.x.size[3] && w >= 0 && w < g.x.size[4];
      return inside ? x + c * g.x.stride[1] + d * g.x.stride[2] + h * g.x.stride[3] + w * g.x.stride[4] : nullptr;
    };
    Pack<T> row;
    if (g.wide) {
      const T* const from = source(k0);
#pragma unroll
      for (int i = 0; i < kVector; ++i) row.at[i] = from_float<T>(0.f);
      if (from) row = *reinterpret_cast<const Pack<T>*>(from);
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const T* const from = source(k0 + i);
        row.at[i] = from ? *from : from_float<T>(0.f);
      }
    }
    *reinterpret_cast<Pack<T>*>(at<T>(g.y, bases) + int64_t(item / vectors) * g.row_stride + k0) = row;
  }
};

// Every input channel by itself; `multiplier` outputs for each. A thread makes one output position of one channel, or
// of 16 bytes of channels.
template <typename T>
struct Depthwise {
  using Args = DepthwiseArgs;

  template <int kCount>
  static __device__ __forceinline__ void point(const DepthwiseArgs& g, const Bases& bases, int item) {
    const int groups = (g.y.size[1] + kCount - 1) / kCount;
    const int c = item % groups * kCount;
    int rest = item / groups;
    const int w0 = rest % g.y.size[4];
    rest /= g.y.size[4];
    const int h0 = rest % g.y.size[3];
    rest /= g.y.size[3];
    const int d0 = rest % g.y.size[2], n = rest / g.y.size[2];
    if (n >= g.y.size[0]) return;
    struct alignas(sizeof(T) * kCount) Some {
      T at[kCount];
    };
    const T* const x = at<T>(g.x.place, bases) + n * g.x.stride[0] + c / g.multiplier * g.x.stride[1];
    const T* weight = at<T>(g.weight, bases) + c;
    float sum[kCount] = {};
    for (int i = 0; i < g.kernel[0]; ++i)
      for (int j = 0; j < g.kernel[1]; ++j)
        for (int k = 0; k < g.kernel[2]; ++k, weight += g.padded) {
          const int d = d0 * g.stride[0] - g.pad[0] + i * g.dilation[0];
          const int h = h0 * g.stride[1] - g.pad[1] + j * g.dilation[1];
          const int w = w0 * g.stride[2] - g.pad[2] + k * g.dilation[2];
          if (d < 0 || d >= g.x.size[2] || h < 0 || h >= g.x.size[3] || w < 0 || w >= g.x.size[4]) continue;
          const Some left = *reinterpret_cast<const Some*>(x + d * g.x.stride[2] + h * g.x.stride[3] + w * g.x.stride[4]);
          const Some right = *reinterpret_cast<const Some*>(weight);
#pragma unroll
          for (int e = 0; e < kCount; ++e) sum[e] += to_float(left.at[e]) * to_float(right.at[e]);
        }
    const auto offset = [&](const View& v) {
      return n * v.stride[0] + c * v.stride[1] + d0 * v.stride[2] + h0 * v.stride[3] + w0 * v.stride[4];
    };
    T* const y = at<T>(g.y.place, bases) + offset(g.y);
    const T* const residual = g.residual.place.there ? at<T>(g.residual.place, bases) + offset(g.residual) : nullptr;
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      if (c + e >= g.y.size[1]) break;
      const float other = residual ? to_float(residual[e * g.residual.stride[1]]) : 0.f;
      float value = sum[e] + (g.bias ? g.bias[c + e] : 0.f);
      if (residual && !g.residual_last) value += other;
      value = activate(value, g.activate);
      if (residual && g.residual_last) value += other;
      y[e * g.y.stride[1]] = from_float<T>(value);
    }
  }

  static __device__ __forceinline__ void task(const DepthwiseArgs& g, const Bases& bases, int task, char*) {
    if (g.wide)
      point<Pack<T>::kCount>(g, bases, item_of(task));
    else
      point<1>(g, bases, item_of(task));
  }
};

// One output of one channel for each thread; channels are neighbours.
template <typename T>
struct Pooling {
  using Args = PoolArgs;

  // The window of an output along one axis: first input, how many, from one to the next, what an average divides by.
  struct Span {
    int first, count, step, divide;

    __device__ __forceinline__ Span(const PoolArgs& g, int axis, int o) {
      const int size = g.x.size[2 + axis], out = g.y.size[2 + axis];
      if (g.adaptive) {
        first = int(int64_t(o) * size / out);
        count = int((int64_t(o + 1) * size + out - 1) / out) - first;
        step = 1;
        divide = count;
        return;
      }
      step = g.dilation[axis];
      first = o * g.stride[axis] - g.low[axis];
      const int stop = first + g.kernel[axis], end = size + g.high[axis];
      divide = (stop < end ? stop : end) - first;
      count = g.kernel[axis];
      if (first < 0) {
        const int skipped = (-first + step - 1) / step;
        first += skipped * step;
        count -= skipped;
      }
      const int room = first < size ? (size - 1 - first) / step + 1 : 0;
      count = count < room ? count : room;
      if (count < 0) count = 0;
      if (!g.include) divide = count;
    }
  };

  static __device__ __forceinline__ void task(const PoolArgs& g, const Bases& bases, int task, char*) {
    int rest = item_of(task);
    const int c = rest % g.y.size[1];
    rest /= g.y.size[1];
    const int w0 = rest % g.y.size[4];
    rest /= g.y.size[4];
    const int h0 = rest % g.y.size[3];
    rest /= g.y.size[3];
    const int d0 = rest % g.y.size[2], n = rest / g.y.size[2];
    if (n >= g.y.size[0]) return;
    const Span d(g, 0, d0), h(g, 1, h0), w(g, 2, w0);
    const T* const x = at<T>(g.x.place, bases) + n * g.x.stride[0] + c * g.x.stride[1];
    const bool average = g.kind == int(Pool::avg);
    float value = average ? 0.f : -infinity();
    for (int i = 0; i < d.count; ++i)
      for (int j = 0; j < h.count; ++j)
        for (int k = 0; k < w.count; ++k) {
          const float each = to_float(x[(d.first + i * d.step) * g.x.stride[2] + (h.first + j * h.step) * g.x.stride[3] +
                                        (w.first + k * w.step) * g.x.stride[4]]);
          value = average ? value + each : larger(each, value);
        }
    if (average) value /= g.divisor != 0.f ? g.divisor : float(d.divide) * float(h.divide) * float(w.divide);
    at<T>(g.y.place, bases)[n * g.y.stride[0] + c * g.y.stride[1] + d0 * g.y.stride[2] + h0 * g.y.stride[3] +
                            w0 * g.y.stride[4]] = from_float<T>(value);
  }
};

// Which inputs an output is made of, and how much of each, is in tables, per axis.
template <typename T>
struct Resizing {
  using Args = ResizeArgs;

  static __device__ __forceinline__ void task(const ResizeArgs& g, const Bases& bases, int task, char*) {
    int rest = item_of(task), o[3];
    const int c = rest % g.y.size[1];
    rest /= g.y.size[1];
    for (int axis = 2; axis >= 0; --axis) {
      o[axis] = rest % g.y.size[2 + axis];
      rest /= g.y.size[2 + axis];
    }
    if (rest >= g.y.size[0]) return;
    const T* const x = at<T>(g.x.place, bases) + rest * g.x.stride[0] + c * g.x.stride[1];
    float value = 0;
    const int taps = g.linear ? 8 : 1;
    for (int tap = 0; tap < taps; ++tap) {
      float part = 1;
      int offset = 0;
      for (int axis = 0; axis < 3; ++axis) {
        const int at = 2 * o[axis] + (tap >> axis & 1);
        offset += g.index[axis][at] * g.x.stride[2 + axis];
        if (g.linear) part *= g.part[axis][at];
      }
      if (part != 0.f) value += part * to_float(x[offset]);
    }
    int offset = rest * g.y.stride[0] + c * g.y.stride[1];
    for (int axis = 0; axis < 3; ++axis) offset += o[axis] * g.y.stride[2 + axis];
    at<T>(g.y.place, bases)[offset] = from_float<T>(value);
  }
};

// Rows of a table by number; what is out of range gives zeros (the caller's error, not a crash).
template <typename T>
struct Gather {
  using Args = GatherArgs;

  static __device__ __forceinline__ void task(const GatherArgs& g, const Bases& bases, int task, char*) {
    int rest = item_of(task), from = 0, to = 0;
    const int column = rest % g.width;
    rest /= g.width;
    for (int axis = 4; axis > 0; --axis) {
      const int i = rest % g.index.size[axis];
      rest /= g.index.size[axis];
      from += i * g.index.stride[axis];
      to += i * g.y.stride[axis - 1];
    }
    if (rest) return;
    const int64_t row = at<int64_t>(g.index.place, bases)[from];
    at<T>(g.y.place, bases)[to + column * g.y.stride[4]] =
        row < 0 || row >= g.count ? from_float<T>(0.f) : at<T>(g.table, bases)[row * g.width + column];
  }
};

}  // namespace pk::cuda
