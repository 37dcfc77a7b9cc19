// planar_conv: y = epilogue(conv(x, weight)) with pixels in the lanes (planar.h).
//
// Fields: views x, y (and residual, of y's arrangement); kernel, stride, dilation, pad [2]; groups; blocks: output
// channels of each block, in order, none across a border of groups; weight: for each block [C / groups, kh, kw, block];
// the epilogue's (the bias needs no padding); pitch [2]: elements of x from a row to the next and from a column to the
// next (Views lack those of axes of size 1). x has zeros around it as far as the padding reaches, and up to 64 bytes
// beyond what the convolution needs are read (not used). It and y have stride w = 1; any other x, and one with a
// stride, is copied into scratch first. images = 1: the lanes are images; x, y and the residual have stride n = 1.
// rows: rows of y of a task (0: the kernel chooses).
// pool: 1 maximum, 2 average: y is pooled 2 x 2 with stride 2, in registers; for a clamp as activation and no residual,
// with blocks of at most 6 channels (2 where there are 16 registers).
#include "planar.h"

#include "../math.h"

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

void Band::cut_quads(int64_t width, int64_t images, Pitch in, Pitch out) {
  constexpr int64_t kHalf = kLanes / 2;
  const bool split = images == 0;   // results have half of their lanes from a pair of vectors, half from another
  const int64_t across = split ? ceil_div(width, kHalf) : width * ceil_div(images, kLanes);
  const int64_t pairs = rows / 2 * across, quads = split ? ceil_div(pairs, 2) : pairs;
  vectors = 4 * quads;
  x.make(vectors);
  piece.make(quads + 1);
  pieces.make(2 * quads);
  int64_t count = 0;
  for (int64_t q = 0; q < quads; ++q) {
    piece[q] = int32_t(count);
    for (int64_t i = 0; i < 2; ++i) {
      const int64_t pair = split ? least(2 * q + i, pairs - 1) : q, r = pair / across, at = pair % across;
      const int64_t c = split ? at * kHalf : at % width, n = split ? 0 : at / width * kLanes;
      x[4 * q + i] = int32_t(2 * r * in.h + (split ? 2 * c : 2 * c + i) * in.w + n);
      x[4 * q + 2 + i] = int32_t(x[4 * q + i] + in.h);
      if (split ? 2 * q + i >= pairs : i > 0) continue;
      const int64_t lanes = split ? least(kHalf, width - c) : least(kLanes, images - n), from = split ? i * kHalf : 0;
      pieces[count++] = Piece{int32_t(r * out.h + c * out.w + n - from), 0, uint32_t(((1ull << lanes) - 1) << from)};
    }
  }
  piece[quads] = int32_t(count);
}

void Band::cut_images(int64_t width, int64_t images, Pitch in, Pitch out, Pitch other) {
  const int64_t blocks = ceil_div(images, kLanes);
  vectors = rows * width * blocks;
  x.make(vectors);
  piece.make(vectors + 1);
  pieces.make(vectors);
  for (int64_t i = 0; i < vectors; ++i) {
    const int64_t b = i % blocks, c = i / blocks % width, r = i / blocks / width;
    const int64_t n = least(kLanes, images - b * kLanes);
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
#define PK_TILES(C)                                                   \
  {PK_TILE(C, 1), PK_TILE(C, 2), PK_TILE(C, 3), PK_TILE(C, 4), \
   PK_TILE(C, 5), PK_TILE(C, 6), PK_TILE(C, 7), PK_TILE(C, 8)}
const Tile kTiles[kWidest][kLongest] = {
    PK_TILES(1), PK_TILES(2), PK_TILES(3), PK_TILES(4), PK_TILES(5), PK_TILES(6),
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
    PK_TILES(7), PK_TILES(8), PK_TILES(9),
#endif
};

#define PK_QUADS(C) {quad<C, false, false>, quad<C, false, true>, quad<C, true, false>, quad<C, true, true>}
const Tile kQuads[kQuadWidest][4] = {  // [channels - 1][2 average + images]
    PK_QUADS(1), PK_QUADS(2),
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
    PK_QUADS(3), PK_QUADS(4), PK_QUADS(5), PK_QUADS(6),
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
    for (; j + kLanes <= count; j += kLanes) store(y + j, evens(load(x + 2 * j), load(x + 2 * j + kLanes)));
  for (; j < count; ++j) y[j] = x[j * stride * pitch];
}

class PlanarConv final : public Op {
 public:
  explicit PlanarConv(const Fields& f);
  ~PlanarConv() override { delete[] bands_; }
  void run(const Run& run, int64_t begin, int64_t end) const override;

 private:
  void read(const Fields& f);
  void check() const;
  void cut(int64_t threads, int64_t wanted);
  void address();
  void split(const float* x, const Band& band, float* to) const;
  void run_block(Block& b, int64_t channels) const;

  View x_, y_;
  Epilogue epilogue_;
  const float *weight_, *bias_;
  Array<float> no_bias_;
  const int64_t* blocks_;
  int64_t block_count_ = 0, groups_, pool_, kernel_[2], stride_[2], dilation_[2], pad_[2];
  int64_t out_[2];                       // rows and columns, before pooling
  bool images_, strided_;                // lanes are images; phases are taken apart first
  int64_t channels_, depth_;             // of a group: input channels; taps of an output
  Pitch in_;                             // of what tiles read, from an output pixel to the next
  int64_t plane_ = 0, group_ = 0;        // strided: elements of a phase; elements of a group's input channels
  Phases rows_, columns_;
  Array<int32_t> taps_;
  int64_t band_count_ = 0;
  Band* bands_ = nullptr;
};

PlanarConv::PlanarConv(const Fields& f) : x_(f.view("x")), y_(f.view("y")), epilogue_(Epilogue::of(f)) {
  read(f);
  check();
  if (strided_) {
    rows_.make(kernel_[0], dilation_[0], stride_[0]);
    columns_.make(kernel_[1], dilation_[1], stride_[1]);
    in_ = Pitch{out_[1] + columns_.furthest(), 1};
  } else {
    in_ = Pitch{x_.stride[kH] * stride_[0], x_.stride[kW] * stride_[1]};
    if (out_[0] == 1) in_.h = most(in_.h, out_[1]);
  }
  cut(f.threads(), f.integer("rows", 0));
  address();
}

void PlanarConv::read(const Fields& f) {
  f.copy("kernel", 2, kernel_);
  f.copy("stride", 2, stride_);
  f.copy("dilation", 2, dilation_);
  f.copy("pad", 2, pad_);
  int64_t pitch[2];
  f.copy("pitch", 2, pitch);
  x_.stride[kH] = pitch[0];
  x_.stride[kW] = pitch[1];
  weight_ = f.address<float>("weight");
  groups_ = f.integer("groups", 1);
  blocks_ = f.list("blocks", &block_count_);
  images_ = f.integer("images", 0) != 0;
  pool_ = f.integer("pool", 0);
  for (int a = 0; a < 2; ++a) out_[a] = y_.size[kH + a] * (pool_ ? 2 : 1);
  channels_ = x_.size[kC] / groups_;
  depth_ = channels_ * kernel_[0] * kernel_[1];
  strided_ = !images_ && (stride_[0] > 1 || stride_[1] > 1 || pitch[1] != 1 || (out_[0] > 1 && pitch[0] < out_[1]));
  no_bias_.make(y_.size[kC]);
  bias_ = epilogue_.bias ? epilogue_.bias : no_bias_.data;
}

void PlanarConv::check() const {
  int64_t sum = 0;
  for (int64_t i = 0; i < block_count_; ++i) {
    if (blocks_[i] < 1 || blocks_[i] > (pool_ ? kQuadWidest : kWidest)) fail("planar_conv: no tile is that wide");
    sum += blocks_[i];
  }
  if (sum != y_.size[kC]) fail("planar_conv: blocks do not add up to the output channels");
  const int lanes = images_ ? kN : kW;
  if (y_.stride[lanes] != 1 && y_.size[lanes] > 1) fail("planar_conv: y's lanes must be next to each other");
  if (images_ && x_.stride[kN] != 1 && x_.size[kN] > 1) fail("planar_conv: x's images must be next to each other");
  if (pool_ && (epilogue_.late || epilogue_.residual.there)) fail("planar_conv: this cannot be pooled in registers");
}

// Bands: few large ones for one thread, several tasks for each of more.
void PlanarConv::cut(int64_t threads, int64_t wanted) {
  const int64_t images = images_ ? 1 : x_.size[kN], rows = y_.size[kH], scale = pool_ ? 2 : 1;
  const int64_t macs = x_.size[kN] * y_.size[kC] * depth_ * out_[0] * out_[1];
  const int64_t pieces = threads == 1 ? 1 : most(1, least(4 * threads, macs / 20000));
  const int64_t each = wanted ? wanted : ceil_div(rows, ceil_div(pieces, most(1, images)));
  band_count_ = ceil_div(rows, each);
  bands_ = new Band[size_t(band_count_)];
  const Pitch y{y_.stride[kH], images_ ? y_.stride[kW] : 1};
  const View& other = epilogue_.residual;
  const Pitch residual = other.there ? Pitch{other.stride[kH], other.stride[kW]} : y;
  for (int64_t i = 0; i < band_count_; ++i) {
    Band& band = bands_[i];
    band.row = i * each;
    band.rows = scale * least(each, rows - band.row);
    if (pool_) band.cut_quads(y_.size[kW], images_ ? x_.size[kN] : 0, in_, y);
    else if (images_) band.cut_images(out_[1], x_.size[kN], in_, y, residual);
    else band.cut_rows(out_[1], in_, y, residual);
    if (strided_) plane_ = most(plane_, (band.rows + rows_.furthest()) * in_.h);
  }
  tasks = images * band_count_;
}

// Where each tap lies, from the first one of the band's first pixel.
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
  if (strided_) scratch = 4 * groups_ * group_ + 2 * 64;
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

void PlanarConv::run_block(Block& b, int64_t channels) const {
  const int64_t vectors = b.band->vectors;
  if (pool_) {
    const Tile tile = kQuads[channels - 1][2 * (pool_ == 2) + images_];
    for (int64_t first = 0; first < vectors; first += 4) tile(b, first);
    return;
  }
  const int64_t tiles = ceil_div(vectors, longest(int(channels)));
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = vectors * t / tiles, count = vectors * (t + 1) / tiles - first;
    kTiles[channels - 1][count - 1](b, first);
  }
}

void PlanarConv::run(const Run& run, int64_t begin, int64_t end) const {
  const View& other = epilogue_.residual;
  const int64_t group_channels = y_.size[kC] / groups_;
  Block b;
  b.taps = taps_.data;
  b.depth = depth_;
  b.y_channel = y_.stride[kC];
  b.residual_channel = other.stride[kC];
  b.epilogue = &epilogue_;
  b.quick = !epilogue_.late && !(other.there && epilogue_.residual_last) && epilogue_.high == __builtin_inff();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / band_count_;
    const Band& band = bands_[task % band_count_];
    const float* x = x_.at(run) + n * x_.stride[kN] - pad_[1] * x_.stride[kW] +
                     (band.row * (pool_ ? 2 : 1) * stride_[0] - pad_[0]) * x_.stride[kH];
    if (strided_) {
      split(x, band, reinterpret_cast<float*>(run.scratch));
      x = reinterpret_cast<float*>(run.scratch);
    }
    float* const y = y_.at(run) + n * y_.stride[kN] + band.row * y_.stride[kH];
    const float* const residual =
        other.there ? other.at(run) + n * other.stride[kN] + band.row * other.stride[kH] : nullptr;
    b.band = &band;
    b.weight = weight_;
    for (int64_t i = 0, channel = 0; i < block_count_; channel += blocks_[i++]) {
      b.x = x + channel / group_channels * group_;
      b.bias = bias_ + channel;
      b.y = y + channel * y_.stride[kC];
      b.residual = residual ? residual + channel * other.stride[kC] : nullptr;
      run_block(b, blocks_[i]);
      b.weight += depth_ * blocks_[i];
    }
  }
}

}  // namespace
}  // namespace planar

Op* make_planar_conv(const Fields& f) { return new planar::PlanarConv(f); }

}  // namespace PK_ISA
}  // namespace pk
