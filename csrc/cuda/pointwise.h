// Elementwise steps, copies between layouts, reductions, softmax and norms.
#pragma once

#include "windows.h"

namespace pk::cuda {

// Which element of a view an item is; axes in their order, the last one fastest and `each` elements at a time.
struct Element {
  int index[5];
  bool there;

  __device__ __forceinline__ Element(const View& y, int item, int each = 1) {
    int rest = item;
    for (int axis = 4; axis > 0; --axis) {
      const int size = axis == 4 ? y.size[4] / each : y.size[axis];
      index[axis] = rest % size * (axis == 4 ? each : 1);
      rest /= size;
    }
    index[0] = rest;
    there = rest < y.size[0];
  }
  __device__ __forceinline__ int at(const View& v) const {
    int offset = 0;
    for (int axis = 0; axis < 5; ++axis) offset += index[axis] * v.stride[axis];
    return offset;
  }
};

template <typename T>
struct Pointwise_ {
  using Args = PointwiseArgs;

  static __device__ __forceinline__ float value(const PointwiseArgs& g, float a, float b, int at_axis) {
    const int entry = g.count == 1 ? 0 : at_axis;
    float y = a;
    switch (Pointwise(g.kind)) {
      case Pointwise::add: y = a + b; break;
      case Pointwise::sub: y = a - b; break;
      case Pointwise::mul: y = a * b; break;
      case Pointwise::div: y = a / b; break;
      case Pointwise::maximum: y = b != b ? b : larger(a, b); break;
      case Pointwise::minimum: y = b != b ? b : smaller(a, b); break;
      case Pointwise::activation: break;
      case Pointwise::scale: y = a * g.vector[entry] + g.shift[entry]; break;
      case Pointwise::prelu: y = a > 0 ? a : a * g.vector[entry]; break;
    }
    return activate(y, g.activate);
  }

  static __device__ __forceinline__ void task(const PointwiseArgs& g, const Bases& bases, int task, char*) {
    constexpr int kVector = Pack<T>::kCount;
    const Element e(g.y, item_of(task), g.wide ? kVector : 1);
    if (!e.there) return;
    const int entry = e.index[g.axis];
    const T* const a = at<T>(g.a.place, bases) + e.at(g.a);
    T* const y = at<T>(g.y.place, bases) + e.at(g.y);
    const T* const b = g.b.place.there ? at<T>(g.b.place, bases) + e.at(g.b) : a;
    if (!g.wide) {
      *y = from_float<T>(value(g, to_float(*a), to_float(*b), entry));
      return;
    }
    const Pack<T> left = *reinterpret_cast<const Pack<T>*>(a);
    Pack<T> right = left, result;
    if (g.b.place.there) {
      if (g.b.stride[4])
        right = *reinterpret_cast<const Pack<T>*>(b);
      else
#pragma unroll
        for (int i = 0; i < kVector; ++i) right.at[i] = *b;
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      result.at[i] = from_float<T>(value(g, to_float(left.at[i]), to_float(right.at[i]), entry + (g.axis == 4 ? i : 0)));
    *reinterpret_cast<Pack<T>*>(y) = result;
  }
};

// Elements of 1, 2, 4 or 8 bytes, from one layout to another, or all the same value.
template <typename T>
struct Copying {
  using Args = CopyArgs;

  static __device__ __forceinline__ void task(const CopyArgs& g, const Bases& bases, int task, char*) {
    constexpr int kVector = Pack<T>::kCount;
    const Element e(g.y, item_of(task), g.wide ? kVector : 1);
    if (!e.there) return;
    T* const y = at<T>(g.y.place, bases) + e.at(g.y);
    if (g.fill) {
      *y = *reinterpret_cast<const T*>(g.value);
      return;
    }
    const T* const x = at<T>(g.x.place, bases) + e.at(g.x);
    if (g.wide)
      *reinterpret_cast<Pack<T>*>(y) = *reinterpret_cast<const Pack<T>*>(x);
    else
      *y = *x;
  }
};

// A row: where it starts in x and y, and where its elements are.
struct RowWalk {
  int x0 = 0, y0 = 0, last = 0;      // last: index along the last but one axis (causal softmax)

  __device__ __forceinline__ RowWalk(const RowsArgs& g, int row) {
    for (int axis = 4; axis >= 0; --axis) {
      if (g.axes[axis]) continue;
      const int i = row % g.x.size[axis];
      row /= g.x.size[axis];
      x0 += i * g.x.stride[axis];
      y0 += i * g.y.stride[axis];
      if (axis == 3) last = i;
    }
  }
  static __device__ __forceinline__ int element(const RowsArgs& g, const View& v, int k) {
    int offset = 0;
    for (int axis = 4; axis >= 0; --axis) {
      if (!g.axes[axis]) continue;
      offset += k % g.x.size[axis] * v.stride[axis];
      k /= g.x.size[axis];
    }
    return offset;
  }
};

template <typename T>
struct Reduction {
  using Args = RowsArgs;

  static __device__ __forceinline__ float join(int kind, float a, float b) {
    switch (Reduce(kind)) {
      case Reduce::amax: return larger(b, a);
      case Reduce::amin: return smaller(b, a);
      default: return a + b;
    }
  }

  static __device__ __forceinline__ void task(const RowsArgs& g, const Bases& bases, int task, char*) {
    const bool alone = g.along != 0;
    const int row = alone ? item_of(task) : item_of(task) / 32, lane = alone ? 0 : int(threadIdx.x) % 32;
    if (row >= g.rows) return;
    const RowWalk walk(g, row);
    const T* const x = at<T>(g.x.place, bases) + walk.x0;
    const Reduce kind = Reduce(g.kind);
    const float start = kind == Reduce::amax ? -infinity() : kind == Reduce::amin ? infinity() : 0.f;
    float sum[4] = {start, start, start, start};      // four at a time: latency, and smaller rounding errors
    const int step = alone ? 1 : 32;
    int k = lane;
    for (; k + 3 * step < g.length; k += 4 * step)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] = join(g.kind, sum[i], to_float(x[RowWalk::element(g, g.x, k + i * step)]));
    for (; k < g.length; k += step) sum[0] = join(g.kind, sum[0], to_float(x[RowWalk::element(g, g.x, k)]));
    float total = join(g.kind, join(g.kind, sum[0], sum[1]), join(g.kind, sum[2], sum[3]));
    if (!alone) total = kind == Reduce::amax ? warp_max(total) : kind == Reduce::amin ? warp_min(total) : warp_sum(total);
    if (kind == Reduce::mean) total /= float(g.length);
    if (lane == 0) at<T>(g.y.place, bases)[walk.y0] = from_float<T>(total);
  }
};

// A warp for each row. Causal: row i sees columns 0...i. A row that sees nothing gives zeros (torch's safe softmax).
template <typename T>
struct Softmax {
  using Args = RowsArgs;

  static __device__ __forceinline__ void task(const RowsArgs& g, const Bases& bases, int task, char*) {
    const int row = item_of(task) / 32, lane = int(threadIdx.x) % 32;
    if (row >= g.rows) return;
    const RowWalk walk(g, row);
    const T* const x = at<T>(g.x.place, bases) + walk.x0;
    T* const y = at<T>(g.y.place, bases) + walk.y0;
    const int seen = g.causal && walk.last + 1 < g.length ? walk.last + 1 : g.length;
    float largest = -infinity();
    for (int k = lane; k < seen; k += 32) largest = larger(to_float(x[RowWalk::element(g, g.x, k)]), largest);
    largest = warp_max(largest);
    float sum = 0;
    for (int k = lane; k < seen; k += 32) sum += expf(to_float(x[RowWalk::element(g, g.x, k)]) - largest);
    sum = warp_sum(sum);
    const bool nothing = g.kind && largest == -infinity();
    for (int k = lane; k < g.length; k += 32) {
      const float each = to_float(x[RowWalk::element(g, g.x, k)]) - largest;
      const float value = k >= seen || nothing ? 0.f : g.log ? each - logf(sum) : expf(each) / sum;
      y[RowWalk::element(g, g.y, k)] = from_float<T>(value);
    }
  }
};

// Layer norm (kind 0) and RMS norm (kind 1) over the last axes: a warp for each row; the mean first, then the variance.
template <typename T>
struct RowNorm {
  using Args = RowsArgs;

  static __device__ __forceinline__ void task(const RowsArgs& g, const Bases& bases, int task, char*) {
    const int row = item_of(task) / 32, lane = int(threadIdx.x) % 32;
    if (row >= g.rows) return;
    const RowWalk walk(g, row);
    const T* const x = at<T>(g.x.place, bases) + walk.x0;
    T* const y = at<T>(g.y.place, bases) + walk.y0;
    float mean = 0, square = 0;
    if (!g.kind) {
      for (int k = lane; k < g.length; k += 32) mean += to_float(x[RowWalk::element(g, g.x, k)]);
      mean = warp_sum(mean) / g.values;
    }
    for (int k = lane; k < g.length; k += 32) {
      const float each = to_float(x[RowWalk::element(g, g.x, k)]) - mean;
      square += each * each;
    }
    square = warp_sum(square) + (g.values - float(g.length)) * mean * mean;
    const float factor = 1.f / sqrtf(square / g.values + g.eps);
    for (int k = lane; k < g.length; k += 32) {
      float value = (to_float(x[RowWalk::element(g, g.x, k)]) - mean) * factor;
      if (g.weight) value *= g.weight[k];
      if (g.bias) value += g.bias[k];
      y[RowWalk::element(g, g.y, k)] = from_float<T>(value);
    }
  }
};

// A block for each group of channels of each image.
template <typename T>
struct GroupNorm {
  using Args = GroupNormArgs;

  static __device__ __forceinline__ float block_sum(float x, float* shared) {
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0;
    for (int warp = 0; warp < kThreads / 32; ++warp) sum += shared[warp];
    return sum;
  }

  static __device__ __forceinline__ void task(const GroupNormArgs& g, const Bases& bases, int task, char* shared) {
    const int n = task / g.groups, each = g.x.size[1] / g.groups, first = task % g.groups * each;
    const int pixels = g.x.size[2] * g.x.size[3] * g.x.size[4], count = pixels * each;
    const auto offset = [&](const View& v, int k) {
      const int c = first + k % each;
      int rest = k / each, sum = n * v.stride[0] + c * v.stride[1];
      for (int axis = 4; axis > 1; --axis) {
        sum += rest % v.size[axis] * v.stride[axis];
        rest /= v.size[axis];
      }
      return sum;
    };
    const T* const x = at<T>(g.x.place, bases);
    T* const y = at<T>(g.y.place, bases);
    float* const sums = reinterpret_cast<float*>(shared);
    float mean = 0, square = 0;
    for (int k = int(threadIdx.x); k < count; k += kThreads) mean += to_float(x[offset(g.x, k)]);
    mean = block_sum(mean, sums) / g.values;
    for (int k = int(threadIdx.x); k < count; k += kThreads) {
      const float value = to_float(x[offset(g.x, k)]) - mean;
      square += value * value;
    }
    square = block_sum(square, sums) + (g.values - float(count)) * mean * mean;
    const float factor = 1.f / sqrtf(square / g.values + g.eps);
    for (int k = int(threadIdx.x); k < count; k += kThreads) {
      const int c = first + k % each;
      float value = (to_float(x[offset(g.x, k)]) - mean) * factor;
      if (g.weight) value *= g.weight[c];
      if (g.bias) value += g.bias[c];
      y[offset(g.y, k)] = from_float<T>(value);
    }
    __syncthreads();
  }
};

}  // namespace pk::cuda
