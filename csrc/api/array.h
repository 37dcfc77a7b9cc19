// Values as views of buffers, and the algebra of their strides.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "program.h"

namespace pk::api {

// A stretch of memory. base: 0 is the arena, then inputs and outputs of a call; kConstant has an address.
struct Buffer {
  static constexpr int kConstant = -1;
  int64_t bytes = 0;
  int base = 0;
  const void* address = nullptr;
  int64_t offset = 0;                    // in the arena
  int64_t first = -1, last = -1;         // ops that touch it
};

using Halo = std::vector<std::pair<int64_t, int64_t>>;      // zeros before and after, per spatial axis

struct Array {
  std::shared_ptr<Buffer> buffer;
  Type type = Type::f32;
  Shape shape, stride;                   // in elements
  int64_t offset = 0;
  int64_t room = 0;                      // channels that there is memory for at a pixel; 0: it is not padded
  Halo halo;

  size_t rank() const { return shape.size(); }
  int64_t count() const;
  bool dense() const;
  bool channels_last() const;            // three axes or more, channels next to each other
  Array permute(const std::vector<int64_t>& axes) const;
  Array transpose(size_t a, size_t b) const;
  Array narrow(size_t axis, int64_t start, int64_t size, int64_t step = 1) const;
  Array expand(const Shape& to) const;
  Array unsqueeze(size_t axis) const;
  std::optional<Array> reshape(const Shape& to) const;      // where strides can say it

 private:
  Array plain() const;
};

int64_t product(const Shape& shape, size_t from = 0);
Shape dense_strides(const Shape& shape);
int64_t round_up(int64_t value, int64_t to);

// The same arrays with fewer axes: sorted by the first one's strides, neighbours merged. Axis `keep` stays by itself; it
// is told where it went. All have one shape.
std::vector<Array> collapse(std::vector<Array> arrays, int64_t* keep = nullptr);

// Offsets in the arena, so that what is in use at one moment shares no byte; gives its size. (Greedy by size: Pisarchyk
// and Lee, arXiv:2001.03288, section 4, as in prunekern/lower/arena.py.)
int64_t pack(const std::vector<std::shared_ptr<Buffer>>& buffers);

}  // namespace pk::api
