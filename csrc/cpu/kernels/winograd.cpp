// Winograd's convolution of channels-last images: 3 x 3, stride 1, in tiles of m x m outputs (m = 2 or 4).
//
// Tiles of all images in a row are cut into blocks. A block's transformed input V, [element of a tile][tile][channel],
// and the products M = V U of one strip of output channels stay in the second cache from one stage to the next. All
// tasks (block, strip) are independent; whoever does several strips of a block transforms its input once.
#include "winograd.h"

namespace pk {
namespace PK_ISA {
namespace {

// What a block's V and M may take.
constexpr int64_t kBlockBytes = 640 << 10;
// Fewer tiles than this would read the weights too often: one from memory costs as much as some dozen products.
constexpr int64_t kFewestTiles = 24, kMostTiles = 168;
constexpr int64_t kTaskProducts = 24000;

PK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PK_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Tiles in order over (image, row, column).
struct Position {
  int64_t image, row, column;
};

// Pixels of an image from some one of them on.
struct Grid {
  float* data;
  int64_t row_stride, column_stride;

  PK_INLINE float* at(int64_t row, int64_t column) const { return data + row * row_stride + column * column_stride; }
};

template <bool WHOLE>
PK_INLINE vec read(const float* p, lanemask mask) {
  return WHOLE ? load(p) : load(p, mask);
}

template <int M>
class Winograd final : public Op {
 public:
  explicit Winograd(const Fields& f) : epilogue_(Epilogue::of(f)), x_(f.view("x")), y_(f.view("y")) {
    weight_ = f.address<float>("weight");
    pad_h_ = f.integer("pad_h", 0);
    pad_w_ = f.integer("pad_w", 0);
    channels_ = x_.size[kC];
    outputs_ = y_.size[kC];
    channel_vectors_ = (channels_ + kLanes - 1) / kLanes;
    vectors_ = (outputs_ + kLanes - 1) / kLanes;
    panels_ = (vectors_ + kMaxVectors - 1) / kMaxVectors;
    block_rows_ = rows_for(int((vectors_ + panels_ - 1) / panels_));
    tile_rows_ = (y_.size[kH] + M - 1) / M;
    tile_columns_ = (y_.size[kW] + M - 1) / M;
    tiles_ = y_.size[kN] * tile_rows_ * tile_columns_;
    plan(f.threads(), f.integer("tiles", 0), f.integer("strips", 0));
  }

  void run(const Run& run, int64_t begin, int64_t end) const override {
    float* const v = reinterpret_cast<float*>(run.scratch);
    float* const m = v + kElements * v_plane_;
    int64_t transformed = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task / strips_, strip = task % strips_;
      const int64_t first = block * tiles_ / blocks_, last = (block + 1) * tiles_ / blocks_;
      if (block != transformed) input(run, first, last, v);
      transformed = block;
      const int64_t from = strip * panels_ / strips_, to = (strip + 1) * panels_ / strips_;
      products(v, m, last - first, from, to);
      output(run, first, last, from, to, m);
    }
  }

 private:
  static constexpr int64_t kElements = (M + 2) * (M + 2);

  void plan(int64_t threads, int64_t tiles, int64_t strips) {
    const int64_t tile_bytes = 4 * kElements * kLanes * (channel_vectors_ + vectors_);
    const int64_t most = tiles ? tiles : smaller(larger(kBlockBytes / tile_bytes, kFewestTiles), kMostTiles);
    blocks_ = (tiles_ + most - 1) / most;
    strips_ = strips ? smaller(strips, panels_) : 1;
    if (threads > 1 && !tiles && !strips) {
      const int64_t wanted = smaller(tiles_ * kElements * channels_ * outputs_ / kTaskProducts, 4 * threads);
      const int64_t by_tiles = smaller(wanted, tiles_ / block_rows_);
      // Blocks of few tiles read the weights once more each; strips only repeat the transform of the input.
      if (by_tiles > blocks_) blocks_ = larger(blocks_, smaller(by_tiles, tiles_ / kFewestTiles));
      if (blocks_ < wanted) strips_ = smaller(panels_, (wanted + blocks_ - 1) / blocks_);
      if (blocks_ * strips_ < threads) blocks_ = larger(blocks_, smaller(by_tiles, threads));
    }
    tasks = blocks_ * strips_;
    if (tasks == 0) return;
    const int64_t block_tiles = (tiles_ + blocks_ - 1) / blocks_;
    const int64_t strip_panels = (panels_ + strips_ - 1) / strips_;
    const int64_t strip_vectors = smaller(strip_panels * ((vectors_ + panels_ - 1) / panels_), vectors_);
    // An odd number of lines between elements: else the stores of one transform meet in one set of the cache.
    v_plane_ = (block_tiles * channel_vectors_ | 1) * kLanes;
    m_plane_ = (block_tiles * strip_vectors | 1) * kLanes;
    scratch = 4 * kElements * (v_plane_ + m_plane_);
  }

  // The rule by which all packed weights are shared out among panels (backends/cpu/pack.py).
  int64_t panel_start(int64_t panel) const { return panel * vectors_ / panels_; }

  Position position(int64_t tile) const {
    const int64_t row = tile / tile_columns_;
    return {row / tile_rows_, row % tile_rows_, tile % tile_columns_};
  }

  void step(Position& p) const {
    if (++p.column < tile_columns_) return;
    p.column = 0;
    if (++p.row < tile_rows_) return;
    p.row = 0;
    ++p.image;
  }

  // Tiles are laid out in groups of rows for `product`, as even as can be.
  int64_t groups(int64_t tiles) const { return (tiles + block_rows_ - 1) / block_rows_; }

  void input(const Run& run, int64_t first, int64_t last, float* v) const {
    const float* x = x_.at(run) - pad_h_ * x_.stride[kH] - pad_w_ * x_.stride[kW];
    Position p = position(first);
    const int64_t tiles = last - first, count = groups(tiles);
    for (int64_t g = 0, t = 0; g < count; ++g) {
      const int64_t start = t, stop = (g + 1) * tiles / count;
      for (; t < stop; ++t, step(p)) {
        const int64_t h = p.row * M, w = p.column * M;
        const Patch patch{x + p.image * x_.stride[kN] + h * x_.stride[kH] + w * x_.stride[kW], x_.stride[kH],
                          x_.stride[kW], y_.size[kH] + 2 - h, y_.size[kW] + 2 - w};
        float* to = v + (start * channel_vectors_ + t - start) * kLanes;
        transform_input<M>(patch, channels_, to, v_plane_, (stop - start) * kLanes);
      }
    }
  }

  void products(const float* v, float* m, int64_t tiles, int64_t from, int64_t to) const {
    const int64_t count = groups(tiles), begin = panel_start(from);
    for (int64_t e = 0; e < kElements; ++e, v += v_plane_, m += m_plane_) {
      const float* weight = weight_ + e * channels_ * vectors_ * kLanes;
      for (int64_t panel = from; panel < to; ++panel) {
        const int64_t start = panel_start(panel), width = panel_start(panel + 1) - start;
        float* c = m + (start - begin) * tiles * kLanes;
        for (int64_t g = 0, t = 0; g < count; ++g) {
          const int64_t stop = (g + 1) * tiles / count;
          product_of(stop - t, width)(v + t * channel_vectors_ * kLanes, weight + start * channels_ * kLanes,
                                      c + t * width * kLanes, channels_);
          t = stop;
        }
      }
    }
  }

  void output(const Run& run, int64_t first, int64_t last, int64_t from, int64_t to, const float* m) const {
    Position p = position(first);
    for (int64_t t = 0; t < last - first; ++t, step(p)) {
      for (int64_t panel = from; panel < to; ++panel) {
        const int64_t start = panel_start(panel), width = panel_start(panel + 1) - start;
        const float* c = m + ((start - panel_start(from)) * (last - first) + t * width) * kLanes;
        for (int64_t v = 0; v < width; ++v) {
          vec y[M][M];
          transform_output<M>(c + v * kLanes, m_plane_, y);
          finish_tile(run, p, (start + v) * kLanes, y);
        }
      }
    }
  }

  void finish_tile(const Run& run, const Position& p, int64_t channel, vec (&y)[M][M]) const {
    const int64_t h = p.row * M, w = p.column * M, left = outputs_ - channel;
    const View& r = epilogue_.residual;
    const int64_t from = p.image * r.stride[kN] + h * r.stride[kH] + w * r.stride[kW] + channel;
    const Grid residual{r.there ? r.at(run) + from : nullptr, r.stride[kH], r.stride[kW]};
    const int64_t to = p.image * y_.stride[kN] + h * y_.stride[kH] + w * y_.stride[kW] + channel;
    const Grid place{y_.at(run) + to, y_.stride[kH], y_.stride[kW]};
    const bool whole = left >= kLanes && y_.size[kH] - h >= M && y_.size[kW] - w >= M;
    if (whole) finish<true>(y, place, residual, channel, M, M);
    else finish<false>(y, place, residual, channel, y_.size[kH] - h, y_.size[kW] - w);
  }

  // Elements (i, j) with i < rows and j < columns of a tile; without WHOLE also only the channels that there are.
  template <bool WHOLE>
  PK_INLINE void finish(vec (&y)[M][M], Grid to, Grid residual, int64_t channel, int64_t rows, int64_t columns) const {
    const lanemask mask = pk::PK_ISA::first(outputs_ - channel);
    const bool before = residual.data && !epilogue_.residual_last, after = residual.data && epilogue_.residual_last;
    const vec bias = epilogue_.bias ? load(epilogue_.bias + channel) : zero();
    const vec low = set(epilogue_.low), high = set(epilogue_.high);
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < M; ++j) {
        vec x = add(y[i][j], bias);
        if (before && (WHOLE || (i < rows && j < columns))) x = add(x, read<WHOLE>(residual.at(i, j), mask));
        y[i][j] = clamp(x, low, high);
      }
    }
    if (epilogue_.late) late(y);
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < M; ++j) {
        if (!WHOLE && (i >= rows || j >= columns)) continue;
        const vec x = after ? add(y[i][j], read<WHOLE>(residual.at(i, j), mask)) : y[i][j];
        if (WHOLE) store(to.at(i, j), x);
        else store(to.at(i, j), x, mask);
      }
    }
  }

  // Activations that are functions of their own, all of a tile's values in one call.
  __attribute__((noinline)) void late(vec (&y)[M][M]) const {
    float values[M * M * kLanes];
    for (int i = 0; i < M * M; ++i) store(values + i * kLanes, y[i / M][i % M]);
    activate_row(epilogue_.act, values, M * M * kLanes, epilogue_.constants);
    for (int i = 0; i < M * M; ++i) y[i / M][i % M] = load(values + i * kLanes);
  }

  Epilogue epilogue_;
  View x_, y_;
  const float* weight_;
  int64_t pad_h_, pad_w_, channels_, outputs_, channel_vectors_, vectors_, panels_, block_rows_;
  int64_t tile_rows_, tile_columns_, tiles_, blocks_, strips_, v_plane_ = 0, m_plane_ = 0;
};

}  // namespace

Op* make_winograd(const Fields& f) {
  const int64_t m = f.integer("m");
  if (m != 2 && m != 4) fail("m must be 2 or 4");
  if (m == 2) return new Winograd<2>(f);
  return new Winograd<4>(f);
}

}  // namespace PK_ISA
}  // namespace pk
