// Loops over several strided operands of one shape: axes put in order and merged, cut into blocks for the threads.
#pragma once

#include "op.h"
#include "vec.h"

namespace pk {
namespace PK_ISA {

// How many pieces `units` of work are cut into: about 16 k elements each, at most four a thread.
PK_INLINE int64_t pieces(int64_t units, int64_t elements, int64_t threads) {
  if (threads <= 1 || units <= 1) return 1;
  int64_t n = elements / 16384 + 1;
  if (n > 4 * threads) n = 4 * threads;
  return n < units ? n : units;
}

// The units of pieces [first, last) of `tasks`.
struct Range {
  int64_t begin, end;
  Range(int64_t units, int64_t tasks, int64_t first, int64_t last)
      : begin(units * first / tasks), end(units * last / tasks) {}
};

// The axes of K operands of one shape, innermost first: those of size 1 left out, in the order of operand 0's strides,
// and merged wherever every operand allows.
template <int K>
struct Axes {
  int count = 0;
  int64_t size[5], stride[5][K];

  PK_INLINE void add(int64_t n, const int64_t* strides) {
    if (n == 1) return;
    int at = count++;
    for (; at > 0 && before(strides, stride[at - 1]); --at) copy(*this, at - 1, at);
    size[at] = n;
    for (int k = 0; k < K; ++k) stride[at][k] = strides[k];
  }

  PK_INLINE void merge() {
    int kept = 0;
    for (int i = 1; i < count; ++i) {
      bool joins = true;
      for (int k = 0; k < K; ++k) joins = joins && stride[i][k] == stride[kept][k] * size[kept];
      if (joins) size[kept] *= size[i];
      else copy(*this, i, ++kept);
    }
    if (count > 0) count = kept + 1;
  }

  PK_INLINE int64_t total() const {
    int64_t n = 1;
    for (int i = 0; i < count; ++i) n *= size[i];
    return n;
  }

  PK_INLINE void swap(int a, int b) {
    Axes held;
    held.copy(*this, a, 0);
    copy(*this, b, a);
    copy(held, 0, b);
  }

  // Offsets of every operand at the flat index i over axes [from, count).
  PK_INLINE void seek(int64_t i, int from, int64_t* offset) const {
    for (int k = 0; k < K; ++k) offset[k] = 0;
    for (int a = from; a < count; ++a) {
      const int64_t index = i % size[a];
      i /= size[a];
      for (int k = 0; k < K; ++k) offset[k] += index * stride[a][k];
    }
  }

 private:
  PK_INLINE static bool before(const int64_t* a, const int64_t* b) {  // the smaller step of the first that differ
    for (int k = 0; k < K; ++k) if (a[k] != b[k]) return a[k] < b[k];
    return false;
  }
  PK_INLINE void copy(const Axes& other, int from, int to) {
    size[to] = other.size[from];
    for (int k = 0; k < K; ++k) stride[to][k] = other.stride[from][k];
  }
};

// The same cut into blocks of about 4096 elements: `rows` of n elements along the two innermost axes.
template <int K>
struct Blocks {
  static constexpr int64_t kBlock = 4096;
  Axes<K> axes;
  int64_t n = 1, rows = 1, step[K] = {}, row_step[K] = {};   // of the two innermost axes
  int64_t block_n = 1, block_rows = 1, across = 1, down = 1, units = 1, elements = 1;

  // longest: elements of the innermost axis in one block.
  PK_INLINE void cut(int64_t longest = kBlock) {
    axes.merge();
    elements = axes.total();
    if (axes.count > 0) n = axes.size[0];
    if (axes.count > 1) rows = axes.size[1];
    for (int k = 0; k < K; ++k) {
      step[k] = axes.count > 0 ? axes.stride[0][k] : 0;
      row_step[k] = axes.count > 1 ? axes.stride[1][k] : 0;
    }
    block_n = n < longest ? n : longest;
    block_rows = block_n > 0 && kBlock / block_n < rows ? kBlock / block_n : rows;
    across = elements == 0 ? 0 : (n + block_n - 1) / block_n;
    down = elements == 0 ? 0 : (rows + block_rows - 1) / block_rows;
    units = elements == 0 ? 0 : elements / (n * rows) * across * down;
  }

  // f(offsets, rows, n) for blocks [begin, end).
  template <typename F>
  PK_INLINE void each(const Range& range, F f) const {
    for (int64_t u = range.begin; u < range.end; ++u) {
      const int64_t i = u % across * block_n, rest = u / across, j = rest % down * block_rows;
      int64_t offset[K];
      axes.seek(rest / down, 2, offset);
      for (int k = 0; k < K; ++k) offset[k] += i * step[k] + j * row_step[k];
      f(offset, rows - j < block_rows ? rows - j : block_rows, n - i < block_n ? n - i : block_n);
    }
  }
};

// The axes of views of one shape (sizes are those of the first).
template <int K>
PK_INLINE void add_views(Axes<K>* axes, const View* const (&views)[K]) {
  for (int a = 0; a < 5; ++a) {
    int64_t strides[K];
    for (int k = 0; k < K; ++k) strides[k] = views[k]->stride[a];
    axes->add(views[0]->size[a], strides);
  }
}

}  // namespace PK_ISA
}  // namespace pk
