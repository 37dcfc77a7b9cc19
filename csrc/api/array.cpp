#include "array.h"

#include <algorithm>
#include <numeric>

namespace pk::api {

int64_t product(const Shape& shape, size_t from) {
  int64_t count = 1;
  for (size_t i = from; i < shape.size(); ++i) count *= shape[i];
  return count;
}

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

Shape dense_strides(const Shape& shape) {
  Shape stride(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) stride[i - 1] = stride[i] * std::max<int64_t>(shape[i], 1);
  return stride;
}

int64_t Array::count() const { return product(shape); }

bool Array::dense() const {
  int64_t expected = 1;
  for (size_t i = rank(); i-- > 0;) {
    if (shape[i] != 1 && stride[i] != expected) return false;
    expected *= shape[i];
  }
  return true;
}

bool Array::channels_last() const {
  if (rank() < 3 || (stride[1] != 1 && shape[1] != 1)) return false;
  if (shape[1] > 1) return true;
  for (size_t i = 2; i < rank(); ++i)
    if (shape[i] > 1 && stride[i] == 1) return room > 0;
  return true;
}

Array Array::plain() const {
  Array view = *this;
  view.room = 0;
  view.halo.clear();
  return view;
}

Array Array::permute(const std::vector<int64_t>& axes) const {
  Array view = plain();
  for (size_t i = 0; i < axes.size(); ++i) {
    const auto from = size_t(axes[i] < 0 ? axes[i] + int64_t(rank()) : axes[i]);
    view.shape[i] = shape.at(from);
    view.stride[i] = stride.at(from);
  }
  return view;
}

Array Array::transpose(size_t a, size_t b) const {
  Array view = plain();
  std::swap(view.shape[a], view.shape[b]);
  std::swap(view.stride[a], view.stride[b]);
  return view;
}

Array Array::narrow(size_t axis, int64_t start, int64_t size, int64_t step) const {
  Array view = plain();
  view.offset += start * stride.at(axis);
  view.shape[axis] = size;
  view.stride[axis] *= step;
  return view;
}

Array Array::expand(const Shape& to) const {
  Array view = plain();
  const size_t more = to.size() - rank();
  view.shape = to;
  view.stride.assign(to.size(), 0);
  for (size_t i = 0; i < rank(); ++i)
    if (shape[i] == to[more + i]) view.stride[more + i] = stride[i];
  if (more == 0 && shape == to) return *this;
  return view;
}

Array Array::unsqueeze(size_t axis) const {
  Array view = plain();
  view.shape.insert(view.shape.begin() + int64_t(axis), 1);
  view.stride.insert(view.stride.begin() + int64_t(axis), 0);
  return view;
}

// Axes fall into runs that lie in memory as one; each run must be cut up by itself. (As torch's computeStride does.)
std::optional<Array> Array::reshape(const Shape& to) const {
  Array view = plain();
  view.shape = to;
  view.stride.assign(to.size(), 1);
  if (count() == 0) {
    view.stride = dense_strides(to);
    return view;
  }
  size_t next = to.size();
  int64_t run_stride = rank() ? stride.back() : 1, run = 1, cut = 1;
  for (size_t i = rank(); i-- > 0;) {
    run *= shape[i];
    const bool ends = i == 0 || (shape[i - 1] != 1 && stride[i - 1] != run * run_stride);
    if (!ends) continue;
    while (next > 0 && (cut < run || to[next - 1] == 1)) {
      view.stride[next - 1] = cut * run_stride;
      cut *= to[next - 1];
      --next;
    }
    if (cut != run) return std::nullopt;
    if (i > 0) {
      run_stride = stride[i - 1];
      run = cut = 1;
    }
  }
  while (next > 0) view.stride[--next] = 1;      // what is left has size 1
  return view;
}

std::vector<Array> collapse(std::vector<Array> arrays, int64_t* keep) {
  const size_t rank = arrays[0].rank();
  std::vector<size_t> order;
  for (size_t axis = 0; axis < rank; ++axis)
    if (arrays[0].shape[axis] != 1 || (keep && int64_t(axis) == *keep)) order.push_back(axis);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    const auto reach = [&](size_t axis) { return arrays[0].shape[axis] == 1 ? INT64_MAX : arrays[0].stride[axis]; };
    return reach(a) > reach(b);
  });
  std::vector<Array> found = arrays;
  for (Array& each : found) {
    each.shape.clear();
    each.stride.clear();
  }
  int64_t kept = -1, last = -1;
  for (size_t axis : order) {
    const bool alone = keep && (int64_t(axis) == *keep || (kept >= 0 && kept == last));
    bool merge = last >= 0 && !alone;
    for (size_t i = 0; merge && i < arrays.size(); ++i)
      merge = found[i].stride.back() == arrays[i].stride[axis] * arrays[i].shape[axis];
    for (size_t i = 0; i < arrays.size(); ++i) {
      if (merge) {
        found[i].shape.back() *= arrays[i].shape[axis];
        found[i].stride.back() = arrays[i].stride[axis];
      } else {
        found[i].shape.push_back(arrays[i].shape[axis]);
        found[i].stride.push_back(arrays[i].stride[axis]);
      }
    }
    if (!merge) ++last;
    if (keep && int64_t(axis) == *keep) kept = last;
  }
  if (keep) *keep = kept;
  return found;
}

int64_t pack(const std::vector<std::shared_ptr<Buffer>>& buffers) {
  constexpr int64_t kAlignment = 256;
  std::vector<Buffer*> order, placed;
  for (const auto& buffer : buffers)
    if (buffer->base == 0 && buffer->first >= 0) order.push_back(buffer.get());
  std::stable_sort(order.begin(), order.end(), [](const Buffer* a, const Buffer* b) { return a->bytes > b->bytes; });
  int64_t total = 0;
  for (Buffer* buffer : order) {
    std::vector<Buffer*> rivals;
    for (Buffer* other : placed)
      if (other->first <= buffer->last && buffer->first <= other->last) rivals.push_back(other);
    std::sort(rivals.begin(), rivals.end(), [](const Buffer* a, const Buffer* b) { return a->offset < b->offset; });
    int64_t offset = 0;
    for (const Buffer* rival : rivals) {
      if (offset + buffer->bytes <= rival->offset) break;
      offset = std::max(offset, round_up(rival->offset + rival->bytes, kAlignment));
    }
    buffer->offset = offset;
    placed.push_back(buffer);
    total = std::max(total, offset + buffer->bytes);
  }
  return round_up(total, kAlignment);
}

}  // namespace pk::api
