// Depthwise convolution over channels-last data: a vector of channels at a time, and several output pixels of a row
// at once, so that every input and every weight is loaded once for all the taps and pixels that use it.
//
// Border pixels read zeros from the halo. Fields: x, y, weight [taps, output channels padded to whole vectors],
// channels (that padded number), kernel, stride, padding (the low end), dilation: three each, for d, h, w;
// multiplier: output channels per input channel; an Epilogue.
#include "../epilogue.h"
#include "../math.h"
#include "../strided.h"

namespace pk {
namespace PK_ISA {
namespace {

constexpr int kTile = 7;  // output pixels at once: divides the widths of ImageNet's maps; 7 + 7 taps + 1 registers

constexpr int64_t kBand = 14;    // lines
constexpr int64_t kChunk = 128;  // channels: the inputs of a tile of three lines stay in the first cache

struct Tile {
  const float *x, *residual;  // of the first pixel and channel 0
  float* y;
  int64_t residual_step;      // from pixel to pixel
  int64_t begin, end;         // channels
};

struct Depthwise : Op {
  using TileFn = void (*)(const Depthwise&, const Tile&, int64_t pixels);

  explicit Depthwise(const Fields& f) : x(f.view("x")), y(f.view("y")), end(Epilogue::of(f)) {
    weight = f.address<float>("weight");
    channels = f.integer("channels");
    multiplier = f.integer("multiplier", 1);
    f.copy("kernel", 3, kernel);
    f.copy("stride", 3, stride);
    f.copy("padding", 3, padding);
    f.copy("dilation", 3, dilation);
    const int64_t rows = kernel[0] * kernel[1];
    row_at = new int64_t[rows];
    for (int64_t r = 0; r < rows; ++r)
      row_at[r] = r / kernel[1] * dilation[0] * x.stride[kD] + r % kernel[1] * dilation[1] * x.stride[kH];
    for (int a = 0; a < 3; ++a) corner -= padding[a] * x.stride[kD + a];
    choose();
    lines = y.size[kN] * y.size[kD] * y.size[kH];
    if (y.size[kC] == 0 || y.size[kW] == 0) lines = 0;
    tasks = pieces(lines, lines * y.size[kW] * y.size[kC] * rows * kernel[2], f.threads());
  }
  ~Depthwise() override { delete[] row_at; }
  Depthwise(const Depthwise&) = delete;

  void choose();

  void run(const Run& run, int64_t begin, int64_t last) const override {
    const Range range(lines, tasks, begin, last);
    for (int64_t line = range.begin; line < range.end;) {  // bands of a few lines, which share inputs
      int64_t count = y.size[kH] - line % y.size[kH];
      if (count > range.end - line) count = range.end - line;
      if (count > kBand) count = kBand;
      band(run, line, count);
      line += count;
    }
  }

  void band(const Run& run, int64_t line, int64_t count) const {
    const int64_t h = line % y.size[kH], d = line / y.size[kH] % y.size[kD], n = line / y.size[kH] / y.size[kD];
    const View& r = end.residual;
    const float* from = x.at(run) + corner + n * x.stride[kN] + d * stride[0] * x.stride[kD] +
                        h * stride[1] * x.stride[kH];
    float* to = y.at(run) + n * y.stride[kN] + d * y.stride[kD] + h * y.stride[kH];
    const float* residual = r.there ? r.at(run) + n * r.stride[kN] + d * r.stride[kD] + h * r.stride[kH] : nullptr;
    const int64_t across = (y.size[kW] + kTile - 1) / kTile;
    for (int64_t i = 0; i < across; ++i) {  // tiles of a line differ by one pixel at most
      const int64_t w = y.size[kW] * i / across, next = y.size[kW] * (i + 1) / across;
      for (int64_t c = 0; c < y.size[kC]; c += kChunk)
        for (int64_t j = 0; j < count; ++j) {
          Tile tile;
          tile.x = from + w * stride[2] * x.stride[kW] + j * stride[1] * x.stride[kH];
          tile.y = to + w * y.stride[kW] + j * y.stride[kH];
          tile.residual = residual ? residual + w * r.stride[kW] + j * r.stride[kH] : nullptr;
          tile.residual_step = r.stride[kW];
          tile.begin = c;
          tile.end = y.size[kC] - c < kChunk ? y.size[kC] : c + kChunk;
          tiles[next - w](*this, tile, next - w);
        }
    }
    for (int64_t j = 0; end.late && j < count; ++j)
      finish(to + j * y.stride[kH], residual ? residual + j * r.stride[kH] : nullptr);
  }

  // Activations that were not done in registers, over one line.
  void finish(float* to, const float* residual) const {
    const View& r = end.residual;
    const bool dense = y.stride[kW] == y.size[kC] && y.stride[kC] == 1;
    if (dense) activate_row(end.act, to, y.size[kW] * y.size[kC], end.constants);
    for (int64_t w = 0; w < y.size[kW]; ++w) {
      float* pixel = to + w * y.stride[kW];
      if (!dense && y.stride[kC] == 1) activate_row(end.act, pixel, y.size[kC], end.constants);
      for (int64_t c = 0; y.stride[kC] != 1 && c < y.size[kC]; ++c)
        activate_row(end.act, pixel + c * y.stride[kC], 1, end.constants);
      if (residual && end.residual_last)
        for (int64_t c = 0; c < y.size[kC]; ++c)
          pixel[c * y.stride[kC]] += residual[w * r.stride[kW] + c * r.stride[kC]];
    }
  }

  View x, y;
  Epilogue end;
  const float* weight;
  int64_t channels, multiplier, kernel[3], stride[3], padding[3], dilation[3], lines;
  int64_t* row_at;      // where each row of taps begins
  int64_t corner = 0;   // the first tap of the first pixel
  TileFn tiles[kTile + 1] = {};
};

// What of the epilogue is done in registers; `late`: the activation comes afterwards, and with it a residual that is
// `last`.
PK_INLINE vec finished(vec acc, vec residual, vec low, vec high, bool last, bool late) {
  if (!last) return clamp(add(acc, residual), low, high);
  return late ? acc : add(clamp(acc, low, high), residual);
}

// Keeps the compiler from loading a value again at every use.
PK_INLINE void in_register(vec& x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__AVX2__)
  asm("" : "+x"(x));
#else
  (void)x;
#endif
}

// T pixels of kLanes channels (or those of the mask). K taps in a row and stride S along w are known when compiled;
// K = 0: any, then every tap loads its inputs anew.
template <int K, int S, int T, bool tail>
PK_INLINE void channels_of(const Depthwise& o, const Tile& tile, int64_t c, lanemask m) {
  const int64_t rows = o.kernel[0] * o.kernel[1], taps = o.kernel[2], pitch = o.x.stride[kW];
  vec acc[T];
  const vec bias = o.end.bias ? load(o.end.bias + c) : zero();
  for (int t = 0; t < T; ++t) acc[t] = bias;
  const float* weight = o.weight + c;
  for (int64_t r = 0; r < rows; ++r) {
    const float* x = tile.x + o.row_at[r] + c;
    if constexpr (K > 0) {
      vec w[K];
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) w[k] = load(weight + k * o.channels);
#pragma GCC unroll 24
      for (int j = 0; j < (T - 1) * S + K; ++j) {
        vec in = tail ? load(x + j * pitch, m) : load(x + j * pitch);
        in_register(in);
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k)
          if (j >= k && (j - k) % S == 0 && (j - k) / S < T) acc[(j - k) / S] = fma(in, w[k], acc[(j - k) / S]);
      }
    } else {
      const int64_t step = o.stride[2] * pitch, dilated = o.dilation[2] * pitch;
      for (int64_t k = 0; k < taps; ++k) {
        const vec w = load(weight + k * o.channels);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
          const float* p = x + k * dilated + t * step;
          acc[t] = fma(tail ? load(p, m) : load(p), w, acc[t]);
        }
      }
    }
    weight += taps * o.channels;
  }
  const vec low = set(o.end.low), high = set(o.end.high);
  const bool last = o.end.residual_last, late = o.end.late;
  const float* residual = tile.residual ? tile.residual + c : nullptr;
  const int64_t y_step = o.y.stride[kW], residual_step = tile.residual_step;
  float* y = tile.y + c;
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    vec out = acc[t];
    if (residual) {
      const float* r = residual + t * residual_step;
      const vec more = tail ? load(r, m) : load(r);
      out = finished(out, more, low, high, last, late);
    } else {
      out = clamp(out, low, high);
    }
    if (tail) store(y + t * y_step, out, m);
    else store(y + t * y_step, out);
  }
}

template <int K, int S, int T>
void tile_of(const Depthwise& o, const Tile& tile, int64_t) {
  const int64_t n = tile.end;
  int64_t c = tile.begin;
  for (; c + kLanes <= n; c += kLanes) channels_of<K, S, T, false>(o, tile, c, first(kLanes));
  if (c < n) channels_of<K, S, T, true>(o, tile, c, first(n - c));
}

// Any strides, any multiplier: inputs are gathered.
void tile_any(const Depthwise& o, const Tile& tile, int64_t pixels) {
  const int64_t rows = o.kernel[0] * o.kernel[1], taps = o.kernel[2], n = tile.end;
  const View& residual = o.end.residual;
  for (int64_t t = 0; t < pixels; ++t)
    for (int64_t c = tile.begin; c < n; c += kLanes) {
      const int64_t lanes = n - c < kLanes ? n - c : kLanes;
      float in[kLanes] = {}, add_to[kLanes] = {};
      vec acc = o.end.bias ? load(o.end.bias + c) : zero();
      for (int64_t k = 0; k < rows * taps; ++k) {
        const float* x = tile.x + o.row_at[k / taps] + (k % taps * o.dilation[2] + t * o.stride[2]) * o.x.stride[kW];
        for (int64_t l = 0; l < lanes; ++l) in[l] = x[(c + l) / o.multiplier * o.x.stride[kC]];
        acc = fma(load(in), load(o.weight + k * o.channels + c), acc);
      }
      for (int64_t l = 0; tile.residual && l < lanes; ++l)
        add_to[l] = tile.residual[t * tile.residual_step + (c + l) * residual.stride[kC]];
      store(in, finished(acc, load(add_to), set(o.end.low), set(o.end.high), o.end.residual_last, o.end.late));
      for (int64_t l = 0; l < lanes; ++l) tile.y[t * o.y.stride[kW] + (c + l) * o.y.stride[kC]] = in[l];
    }
}

template <int K, int S>
void fill(Depthwise::TileFn* tiles) {
  tiles[1] = tile_of<K, S, 1>;
  tiles[2] = tile_of<K, S, 2>;
  tiles[3] = tile_of<K, S, 3>;
  tiles[4] = tile_of<K, S, 4>;
  tiles[5] = tile_of<K, S, 5>;
  tiles[6] = tile_of<K, S, 6>;
  tiles[7] = tile_of<K, S, 7>;
}

void Depthwise::choose() {
  const bool last = x.stride[kC] == 1 && y.stride[kC] == 1 && multiplier == 1 &&
                    (!end.residual.there || end.residual.stride[kC] == 1);
  const int64_t k = dilation[2] == 1 ? kernel[2] : 0, s = stride[2];
  if (!last)
    for (TileFn& tile : tiles) tile = tile_any;
  else if (k == 3 && s == 1) fill<3, 1>(tiles);
  else if (k == 3 && s == 2) fill<3, 2>(tiles);
  else if (k == 5 && s == 1) fill<5, 1>(tiles);
  else if (k == 5 && s == 2) fill<5, 2>(tiles);
  else if (k == 7 && s == 1) fill<7, 1>(tiles);
  else if (k == 7 && s == 2) fill<7, 2>(tiles);
  else fill<0, 0>(tiles);
}

}  // namespace

Op* make_depthwise(const Fields& f) { return new Depthwise(f); }

}  // namespace PK_ISA
}  // namespace pk
