// planar_conv: y = epilogue(conv(x, weight)) with pixels in the lanes (planar.h), and optionally a pooling of that.
//
// Fields: views x, y (and residual, of y's arrangement); kernel, stride, dilation, pad [2]; groups; blocks: output
// channels of each block, in order, none across a border of groups; weight: for each block [C / groups, kh, kw, block];
// the epilogue's (the bias needs no padding). x: stride w = 1, rows at least as far apart as the output is wide, zeros
// around it as far as the padding reaches; or stride n = 1 (then of y too). Up to 64 bytes beyond what the convolution
// needs are read (not used). rows: output rows of a task (0: the kernel chooses).
// With pool_kind (1 max, 2 average): y is the pooled result, size [2] that of the convolution; pool_kernel,
// pool_stride, pool_pad, pool_dilation [2], pool_count_include_pad, pool_divisor.
#include "planar.h"

#include "../math.h"
#include "planar_pool.h"

namespace pk {
namespace PK_ISA {
namespace planar {

void Band::cut_rows(int64_t width, Pitch in, Pitch out, Pitch other) {
  const int64_t end = (rows - 1) * in.h + width, most_vectors = rows * ceil_div(width, kLanes);
  x.make(most_vectors);
  piece.make(most_vectors + 1);
  pieces.make(most_vectors * kLanes);
  int64_t next = 0, count = 0;  // the first pixel that is not in a vector yet
  for (vectors = 0; next < end; ++vectors) {
    const int64_t from = most(0, least(next, end - kLanes));  // the last one reads again, rather than beyond
    x[vectors] = int32_t(from);
    piece[vectors] = int32_t(count);
    int64_t last_row = -1;
    for (int64_t i = next - from; i < kLanes && from + i < end; ++i) {
      const int64_t r = (from + i) / in.h, c = (from + i) % in.h;
      if (c >= width) continue;
      const int32_t to = int32_t(r * out.h + c - i), beside = int32_t(r * other.h + c - i);
      if (last_row < 0 || pieces[count - 1].y != to || pieces[count - 1].residual != beside)
        pieces[count++] = Piece{to, beside, 0};
      pieces[count - 1].lanes |= 1u << i;
      last_row = r;
    }
    next = from + kLanes;
    if (next % in.h >= width) next += in.h - next % in.h;
  }
  piece[vectors] = int32_t(count);
}

void Band::cut_images(int64_t width, int64_t images, Pitch in, Pitch out, Pitch other) {
  const int64_t blocks = ceil_div(images, kLanes);
  vectors = rows * width * blocks;
  x.make(vectors);
  piece.make(vectors + 1);
  pieces.make(vectors);
  for (int64_t i = 0; i < vectors; ++i) {
    const int64_t b = i % blocks, c = i / blocks % width, r = i / blocks / width, n = least(kLanes, images - b * kLanes);
    x[i] = int32_t(r * in.h + c * in.w + b * kLanes);
    piece[i] = int32_t(i);
    pieces[i] = Piece{int32_t(r * out.h + c * out.w + b * kLanes), int32_t(r * other.h + c * other.w + b * kLanes),
                      uint32_t((1ull << n) - 1)};
  }
  piece[vectors] = int32_t(vectors);
}

void finish(const Block& b, int64_t first, int64_t channels, int64_t vectors, float* sums) {
  const Band& band = *b.band;
  const Epilogue& e = *b.epilogue;
  const vec low = set(e.low), high = set(e.high);
  const auto residual = [&](int64_t c, int64_t v) {
    vec sum = zero();
    for (int64_t p = band.piece[v]; p < band.piece[v + 1]; ++p)
      sum = add(sum, load(b.residual + c * b.residual_channel + band.pieces[p].residual,
                          from_bits(band.pieces[p].lanes)));
    return sum;
  };
  if (e.late) {
    for (int64_t i = 0; i < channels * vectors && b.residual && !e.residual_last; ++i)
      store(sums + i * kLanes, add(load(sums + i * kLanes), residual(i / vectors, first + i % vectors)));
    activate_row(e.act, sums, channels * vectors * kLanes, e.constants);
  }
  for (int64_t i = 0; i < channels * vectors; ++i) {
    const int64_t c = i / vectors, v = first + i % vectors;
    vec sum = load(sums + i * kLanes);
    if (!e.late && b.residual && !e.residual_last) sum = add(sum, residual(c, v));
    sum = clamp(sum, low, high);  // a late activation leaves these infinite
    if (b.residual && e.residual_last) sum = add(sum, residual(c, v));
    for (int64_t p = band.piece[v]; p < band.piece[v + 1]; ++p)
      store(b.y + c * b.y_channel + band.pieces[p].y, sum, from_bits(band.pieces[p].lanes));
  }
}

namespace {

using Tile = void (*)(const Block&, int64_t first);

// [channels - 1][vectors - 1]; beyond what a tile may have, its longest.
#define PK_TILE(C, V) tile<C, (V < longest(C) ? V : longest(C))>
#define PK_TILES(C)                                                                                 \
  {PK_TILE(C, 1), PK_TILE(C, 2), PK_TILE(C, 3), PK_TILE(C, 4), PK_TILE(C, 5), PK_TILE(C, 6), PK_TILE(C, 7), PK_TILE(C, 8)}
const Tile kTiles[kWidest][kLongest] = {
    PK_TILES(1), PK_TILES(2), PK_TILES(3), PK_TILES(4), PK_TILES(5), PK_TILES(6),
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
    PK_TILES(7), PK_TILES(8), PK_TILES(9),
#endif
};

// The taps of one axis of the kernel, sorted by what is left of their place modulo the stride: those of one phase read
// every stride-th row (column), which is a run of rows (columns) once the others are taken out.
struct Phases {
  int64_t count = 0;
  Array<int64_t> of, step;          // [taps] its phase; how many strides from there
  Array<int64_t> residue, reach;    // [count] place modulo the stride; the largest step

  void make(int64_t taps, int64_t dilation, int64_t stride) {
    of.make(taps);
    step.make(taps);
    residue.make(taps);
    reach.make(taps);
    for (int64_t k = 0; k < taps; ++k) {
      int64_t p = 0;
      while (p < count && residue[p] != k * dilation % stride) ++p;
      if (p == count) residue[count++] = k * dilation % stride;
      of[k] = p;
      step[k] = k * dilation / stride;
      reach[p] = most(reach[p], step[k]);
    }
  }
  int64_t furthest() const {
    int64_t far = 0;
    for (int64_t p = 0; p < count; ++p) far = most(far, reach[p]);
    return far;
  }
};

// Elements 0, stride, 2 stride, ... of x.
void take(const float* x, int64_t pitch, int64_t stride, int64_t count, float* y) {
  int64_t j = 0;
  if (pitch == 1 && stride == 1) {
    for (; j + kLanes <= count; j += kLanes) store(y + j, load(x + j));
    if (j < count) store(y + j, load(x + j, first(count - j)), first(count - j));
    return;
  }
  if (pitch == 1 && stride == 2)
    for (; j + kLanes < count; j += kLanes) store(y + j, evens(load(x + 2 * j), load(x + 2 * j + kLanes)));
  for (; j < count; ++j) y[j] = x[j * stride * pitch];
}

class PlanarConv final : public Op {
 public:
  explicit PlanarConv(const Fields& f);
  ~PlanarConv() override { delete[] bands_; }
  void run(const Run& run, int64_t begin, int64_t end) const override;

 private:
  void cut(int64_t threads, int64_t wanted);
  void address();
  void split(const float* x, const Band& band, float* to) const;
  void pool(const Run& run, int64_t n, int64_t band, int64_t channel, int64_t channels, const float* plane) const;

  View x_, y_;
  Epilogue epilogue_;
  Window window_;
  const float *weight_, *bias_;
  Array<float> no_bias_;
  const int64_t* blocks_;
  int64_t block_count_ = 0, groups_, kernel_[2], stride_[2], dilation_[2], pad_[2], out_[2];
  bool images_, strided_, pooled_;         // lanes are images; phases are taken apart first; pooled after
  int64_t channels_, depth_;               // of a group, input; taps of an output
  Pitch in_;                               // of what tiles read
  int64_t plane_ = 0, group_ = 0;          // strided: elements of a phase; a group's input channels
  int64_t sums_at_ = 0, line_at_ = 0, sums_plane_ = 0;  // pooled: bytes into scratch; elements of a channel
  Phases rows_, columns_;
  Array<int32_t> taps_;
  int64_t band_count_ = 0;
  Band* bands_ = nullptr;
  Array<int64_t> pool_row_;                // [band_count_ + 1]
};

PlanarConv::PlanarConv(const Fields& f)
    : x_(f.view("x")), y_(f.view("y")), epilogue_(Epilogue::of(f)), weight_(f.address<float>("weight")) {
  f.copy("kernel", 2, kernel_);
  f.copy("stride", 2, stride_);
  f.copy("dilation", 2, dilation_);
  f.copy("pad", 2, pad_);
  groups_ = f.integer("groups", 1);
  blocks_ = f.list("blocks", &block_count_);
  pooled_ = f.integer("pool_kind", 0) != 0;
  if (pooled_) f.copy("size", 2, out_);
  else out_[0] = y_.size[kH], out_[1] = y_.size[kW];
  channels_ = x_.size[kC] / groups_;
  depth_ = channels_ * kernel_[0] * kernel_[1];
  images_ = x_.stride[kW] != 1 && x_.stride[kN] == 1;
  strided_ = !images_ && (stride_[0] > 1 || stride_[1] > 1 || x_.stride[kW] != 1);
  int64_t sum = 0;
  for (int64_t i = 0; i < block_count_; ++i) {
    if (blocks_[i] < 1 || blocks_[i] > kWidest) fail("planar_conv: a block is too wide");
    sum += blocks_[i];
  }
  if (sum != y_.size[kC]) fail("planar_conv: blocks do not add up to the output channels");
  if (!images_ && y_.stride[kW] != 1) fail("planar_conv: x and y must be arranged alike");
  if (images_ && (y_.stride[kN] != 1 || pooled_)) fail("planar_conv: y must have images in its lanes, and no pooling");
  if (pooled_) {
    if (epilogue_.residual.there) fail("planar_conv: a residual cannot be pooled");
    window_ = Window::of(f, true);
    for (int a = 0; a < 2; ++a) window_.in[a] = out_[a], window_.out[a] = y_.size[kH + a];
  }
  if (strided_) {
    rows_.make(kernel_[0], dilation_[0], stride_[0]);
    columns_.make(kernel_[1], dilation_[1], stride_[1]);
    in_ = Pitch{out_[1] + columns_.furthest(), 1};
  } else {
    in_ = Pitch{x_.stride[kH] * stride_[0], x_.stride[kW] * stride_[1]};
    if (out_[0] == 1) in_.h = most(in_.h, out_[1]);
    if (!images_ && in_.h < out_[1]) fail("planar_conv: x's rows are nearer than the output is wide");
  }
  no_bias_.make(y_.size[kC]);
  bias_ = epilogue_.bias ? epilogue_.bias : no_bias_.data;
  cut(f.threads(), f.integer("rows", 0));
  address();
}

// Bands: few large ones for one thread, several tasks for each of more.
void PlanarConv::cut(int64_t threads, int64_t wanted) {
  const int64_t images = images_ ? 1 : x_.size[kN], rows = pooled_ ? window_.out[0] : out_[0];
  const int64_t all = images * y_.size[kC] * depth_ * out_[0] * out_[1] * (images_ ? x_.size[kN] : 1);
  const int64_t pieces = threads == 1 ? 1 : most(1, least(4 * threads, all / 20000));
  int64_t each = wanted ? wanted : ceil_div(rows, ceil_div(pieces, images));
  band_count_ = ceil_div(rows, each);
  bands_ = new Band[size_t(band_count_)];
  pool_row_.make(band_count_ + 1);
  for (int64_t i = 0; i < band_count_; ++i) {
    Band& band = bands_[i];
    const int64_t first = i * each, end = least(rows, first + each);
    pool_row_[i] = first;
    pool_row_[i + 1] = end;
    band.row = pooled_ ? most(0, first * window_.stride[0] - window_.pad[0]) : first;
    const int64_t last = pooled_ ? (end - 1) * window_.stride[0] - window_.pad[0] +
                                       (window_.kernel[0] - 1) * window_.dilation[0] + 1
                                 : end;
    band.rows = least(last, out_[0]) - band.row;
    const Pitch y = pooled_ ? in_ : Pitch{y_.stride[kH], y_.stride[kW]};
    const Pitch residual = epilogue_.residual.there
                               ? Pitch{epilogue_.residual.stride[kH], epilogue_.residual.stride[kW]} : y;
    if (images_) band.cut_images(out_[1], x_.size[kN], in_, y, residual);
    else band.cut_rows(out_[1], in_, y, residual);
    plane_ = most(plane_, (band.rows + (strided_ ? rows_.furthest() : 0)) * in_.h);
  }
  tasks = images * band_count_;
}

// Where each tap lies, and what scratch holds: phases, a block's sums, a pooling's line.
void PlanarConv::address() {
  taps_.make(depth_);
  int64_t k = 0;
  for (int64_t c = 0; c < channels_; ++c)
    for (int64_t i = 0; i < kernel_[0]; ++i)
      for (int64_t j = 0; j < kernel_[1]; ++j) {
        int64_t at = c * x_.stride[kC] + i * dilation_[0] * x_.stride[kH] + j * dilation_[1] * x_.stride[kW];
        if (strided_) at = ((c * rows_.count + rows_.of[i]) * columns_.count + columns_.of[j]) * plane_ +
                           rows_.step[i] * in_.h + columns_.step[j];
        if (at > INT32_MAX || at < INT32_MIN) fail("planar_conv: too large");
        taps_[k++] = int32_t(at);
      }
  group_ = strided_ ? channels_ * rows_.count * columns_.count * plane_ : channels_ * x_.stride[kC];
  const auto line_up = [](int64_t bytes) { return (bytes + 127) / 64 * 64; };
  if (strided_) scratch = line_up(groups_ * group_ * 4);
  if (!pooled_) return;
  sums_at_ = scratch;
  sums_plane_ = plane_;
  scratch += line_up(kWidest * sums_plane_ * 4);
  line_at_ = scratch;
  scratch += line_up(window_.scratch() * 4);
}

// The phases of the input rows that a band needs, from tap (0, 0) of its first pixel on.
void PlanarConv::split(const float* x, const Band& band, float* to) const {
  for (int64_t c = 0; c < x_.size[kC]; ++c)
    for (int64_t i = 0; i < rows_.count; ++i)
      for (int64_t j = 0; j < columns_.count; ++j, to += plane_)
        for (int64_t r = 0; r < band.rows + rows_.reach[i]; ++r)
          take(x + c * x_.stride[kC] + (r * stride_[0] + rows_.residue[i]) * x_.stride[kH] +
                   columns_.residue[j] * x_.stride[kW],
               x_.stride[kW], stride_[1], out_[1] + columns_.reach[j], to + r * in_.h);
}

void PlanarConv::pool(const Run& run, int64_t n, int64_t band, int64_t channel, int64_t channels,
                      const float* plane) const {
  float* line = reinterpret_cast<float*>(run.scratch + line_at_);
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t r = pool_row_[band]; r < pool_row_[band + 1]; ++r)
      pool_row(window_, plane + c * sums_plane_, bands_[band].row, in_.h, r,
               y_.at(run) + n * y_.stride[kN] + (channel + c) * y_.stride[kC] + r * y_.stride[kH], line);
}

void PlanarConv::run(const Run& run, int64_t begin, int64_t end) const {
  const View& other = epilogue_.residual;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / band_count_, which = task % band_count_;
    const Band& band = bands_[which];
    const float* x = x_.at(run) + n * x_.stride[kN] + (band.row * stride_[0] - pad_[0]) * x_.stride[kH] -
                     pad_[1] * x_.stride[kW];
    if (strided_) {
      split(x, band, reinterpret_cast<float*>(run.scratch));
      x = reinterpret_cast<float*>(run.scratch);
    }
    float* const sums = reinterpret_cast<float*>(run.scratch + sums_at_);
    Block b;
    b.taps = taps_.data;
    b.depth = depth_;
    b.weight = weight_;
    b.y_channel = pooled_ ? sums_plane_ : y_.stride[kC];
    b.residual_channel = other.stride[kC];
    b.band = &band;
    b.epilogue = &epilogue_;
    b.quick = !epilogue_.late && !(other.there && epilogue_.residual_last) && epilogue_.high == __builtin_inff();
    const int64_t group_channels = y_.size[kC] / groups_;
    int64_t channel = 0;
    for (int64_t i = 0; i < block_count_; channel += blocks_[i++]) {
      b.x = x + channel / group_channels * group_;
      b.bias = bias_ + channel;
      b.y = pooled_ ? sums
                    : y_.at(run) + n * y_.stride[kN] + channel * y_.stride[kC] + band.row * y_.stride[kH];
      b.residual = other.there ? other.at(run) + n * other.stride[kN] + channel * other.stride[kC] +
                                     band.row * other.stride[kH]
                               : nullptr;
      const int64_t channels = blocks_[i], tiles = ceil_div(band.vectors, longest(int(channels)));
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t first = band.vectors * t / tiles, count = band.vectors * (t + 1) / tiles - first;
        kTiles[channels - 1][count - 1](b, first);
      }
      b.weight += depth_ * channels;
      if (pooled_) pool(run, n, which, channel, channels, sums);
    }
  }
}

class PlanarPool final : public Op {
 public:
  explicit PlanarPool(const Fields& f) : x_(f.view("x")), y_(f.view("y")), window_(Window::of(f, false)) {
    for (int a = 0; a < 2; ++a) window_.in[a] = x_.size[kH + a], window_.out[a] = y_.size[kH + a];
    if (x_.stride[kW] != 1 || y_.stride[kW] != 1) fail("planar_pool: x and y must have stride 1 along w");
    planes_ = x_.size[kN] * x_.size[kC];
    const int64_t work = planes_ * window_.out[0] * window_.out[1] * window_.kernel[0] * window_.kernel[1];
    tasks = f.threads() == 1 ? 1 : most(1, least(least(planes_, 4 * f.threads()), work / 40000));
    scratch = window_.scratch() * 4;
  }
  void run(const Run& run, int64_t begin, int64_t end) const override {
    const int64_t channels = x_.size[kC];
    for (int64_t p = planes_ * begin / tasks; p < planes_ * end / tasks; ++p) {
      const float* x = x_.at(run) + p / channels * x_.stride[kN] + p % channels * x_.stride[kC];
      float* y = y_.at(run) + p / channels * y_.stride[kN] + p % channels * y_.stride[kC];
      for (int64_t r = 0; r < window_.out[0]; ++r)
        pool_row(window_, x, 0, x_.stride[kH], r, y + r * y_.stride[kH], reinterpret_cast<float*>(run.scratch));
    }
  }

 private:
  View x_, y_;
  Window window_;
  int64_t planes_;
};

}  // namespace
}  // namespace planar

Op* make_planar_conv(const Fields& f) { return new planar::PlanarConv(f); }
Op* make_planar_pool(const Fields& f) { return new planar::PlanarPool(f); }

}  // namespace PK_ISA
}  // namespace pk
