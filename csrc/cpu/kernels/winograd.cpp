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
constexpr int64_t kBlockBytes = 256 << 10;
// Fewer tiles than this would read the weights too often: one from memory costs as much as some dozen products.
constexpr int64_t kFewestTiles = 24, kMostTiles = 168;
// What makes it worth to wake another thread: products, and tiles where there are few.
constexpr int64_t kTaskProducts = 24000, kRowsAtLeast = 6;

PK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PK_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Tiles in order over (image, row, column).
struct Position {
  int64_t image, row, column;
};

// Where a tile's results go; rows and columns that there are from here on.
struct Corner {
  float* y;
  const float* residual;
  int64_t channel, rows, columns;
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
    x_.stride[kH] = f.integer("row");           // a View has 0 for an axis of size 1, but here it has a halo
    x_.stride[kW] = f.integer("column");
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
    for (int width = 1; width <= kMaxVectors; ++width)
      for (int rows = 1; rows <= rows_for(width); ++rows) product_[width][rows] = product_of(rows, width);
    plan(f.threads());
  }

  void run(const Run& run, int64_t begin, int64_t end) const override {
    float* const v = reinterpret_cast<float*>(run.scratch);
    float* const m = v + kElements * v_plane_;
    int64_t transformed = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task / strips_, strip = task % strips_;
      const int64_t first = block * tiles_ / blocks_, last = (block + 1) * tiles_ / blocks_;
      const Groups tiles = groups(last - first);
      if (block != transformed) input(run, first, tiles, v);
      transformed = block;
      const int64_t from = strip * panels_ / strips_, to = (strip + 1) * panels_ / strips_;
      products(v, m, tiles, from, to);
      output(run, first, last - first, from, to, m);
    }
  }

 private:
  static constexpr int64_t kElements = (M + 2) * (M + 2);

  void plan(int64_t threads) {
    const int64_t tile_bytes = 4 * kElements * kLanes * (channel_vectors_ + vectors_);
    const int64_t most = smaller(larger(kBlockBytes / tile_bytes, kFewestTiles), kMostTiles);
    blocks_ = (tiles_ + most - 1) / most;
    strips_ = 1;
    if (threads > 1) {
      // Blocks of few tiles read the weights once more each; strips repeat the transform of the input.
      const int64_t wanted = smaller(tiles_ * kElements * channels_ * outputs_ / kTaskProducts, 4 * threads);
      blocks_ = larger(blocks_, smaller(wanted, tiles_ * 2 / kFewestTiles));
      const int64_t each = smaller(wanted, 2 * threads);
      if (blocks_ < each) strips_ = smaller(panels_, (each + blocks_ - 1) / blocks_);
      const int64_t last_resort = smaller(smaller(wanted, threads), tiles_ / kRowsAtLeast);
      if (blocks_ * strips_ < threads) blocks_ = larger(blocks_, last_resort);
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

  // Tiles of a block lie in groups of rows for `product`, as even as can be.
  struct Groups {
    int64_t count, start[kMostTiles + 1];
  };

  Groups groups(int64_t tiles) const {
    Groups found;
    found.count = (tiles + block_rows_ - 1) / block_rows_;
    for (int64_t g = 0; g <= found.count; ++g) found.start[g] = g * tiles / found.count;
    return found;
  }

  void input(const Run& run, int64_t first, const Groups& groups, float* v) const {
    const float* x = x_.at(run) - pad_h_ * x_.stride[kH] - pad_w_ * x_.stride[kW];
    Position p = position(first);
    for (int64_t g = 0; g < groups.count; ++g) {
      const int64_t start = groups.start[g], rows = groups.start[g + 1] - start;
      for (int64_t row = 0; row < rows; ++row, step(p)) {
        const int64_t h = p.row * M, w = p.column * M;
        const Patch patch{x + p.image * x_.stride[kN] + h * x_.stride[kH] + w * x_.stride[kW], x_.stride[kH],
                          x_.stride[kW], y_.size[kH] + 2 - h, y_.size[kW] + 2 - w};
        float* to = v + (start * channel_vectors_ + row) * kLanes;
        transform_input<M>(patch, channels_, to, v_plane_, rows * kLanes);
      }
    }
  }

  void products(const float* v, float* m, const Groups& groups, int64_t from, int64_t to) const {
    const int64_t tiles = groups.start[groups.count];
    for (int64_t e = 0; e < kElements; ++e, v += v_plane_, m += m_plane_) {
      const float* weight = weight_ + (e * vectors_ + panel_start(from)) * channels_ * kLanes;
      float* c = m;
      for (int64_t panel = from; panel < to; ++panel) {
        const int64_t width = panel_start(panel + 1) - panel_start(panel);
        for (int64_t g = 0; g < groups.count; ++g) {
          const int64_t start = groups.start[g], rows = groups.start[g + 1] - start;
          product_[width][rows](v + start * channel_vectors_ * kLanes, weight, c + start * width * kLanes, channels_);
        }
        weight += width * channels_ * kLanes;
        c += width * tiles * kLanes;
      }
    }
  }

  void output(const Run& run, int64_t first, int64_t tiles, int64_t from, int64_t to, const float* m) const {
    for (int64_t panel = from; panel < to; ++panel) {
      const int64_t start = panel_start(panel), width = panel_start(panel + 1) - start;
      Position p = position(first);
      for (int64_t t = 0; t < tiles; ++t, step(p))
        for (int64_t v = 0; v < width; ++v, m += kLanes) finish(run, p, (start + v) * kLanes, m);
    }
  }

  // kLanes channels of a tile.
  void finish(const Run& run, const Position& p, int64_t channel, const float* m) const {
    const int64_t h = p.row * M, w = p.column * M;
    const View& r = epilogue_.residual;
    Corner to{y_.at(run) + p.image * y_.stride[kN] + h * y_.stride[kH] + w * y_.stride[kW] + channel, nullptr,
              channel, y_.size[kH] - h, y_.size[kW] - w};
    if (r.there) to.residual = r.at(run) + p.image * r.stride[kN] + h * r.stride[kH] + w * r.stride[kW] + channel;
    const bool whole = to.rows >= M && to.columns >= M && outputs_ - channel >= kLanes;
    if (epilogue_.late) whole ? store_tile<true, Ending::late>(m, to) : store_tile<false, Ending::late>(m, to);
    else if (r.there) whole ? store_tile<true, Ending::residual>(m, to) : store_tile<false, Ending::residual>(m, to);
    else whole ? store_tile<true, Ending::plain>(m, to) : store_tile<false, Ending::plain>(m, to);
  }

  // late: an activation that is a function of its own, with or without a residual.
  enum class Ending { plain, residual, late };

  // WHOLE: all elements and channels are there.
  template <bool WHOLE, Ending ENDING>
  __attribute__((noinline)) void store_tile(const float* m, const Corner& to) const {
    vec t[M + 2][M];
    transform_columns<M>(m, m_plane_, t);
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      vec y[M];
      transform_row<M>(t, i, y);
      if (WHOLE || i < to.rows) store_row<WHOLE, ENDING>(y, i, to);
    }
  }

  template <bool WHOLE, Ending ENDING>
  PK_INLINE void store_row(vec (&y)[M], int64_t row, const Corner& to) const {
    const View& r = epilogue_.residual;
    const lanemask mask = first(outputs_ - to.channel);
    const vec bias = epilogue_.bias ? load(epilogue_.bias + to.channel) : zero();
    float* const place = to.y + row * y_.stride[kH];
    const float* const residual = ENDING != Ending::plain && r.there ? to.residual + row * r.stride[kH] : nullptr;
    vec extra[M];
#pragma GCC unroll 4
    for (int j = 0; j < M; ++j) {
      extra[j] = zero();
      if (residual && (WHOLE || j < to.columns)) extra[j] = read<WHOLE>(residual + j * r.stride[kW], mask);
    }
    const bool before = residual && !epilogue_.residual_last, after = residual && epilogue_.residual_last;
#pragma GCC unroll 4
    for (int j = 0; j < M; ++j) {
      y[j] = add(y[j], bias);
      if (before) y[j] = add(y[j], extra[j]);
      y[j] = clamp(y[j], set(epilogue_.low), set(epilogue_.high));
    }
    if constexpr (ENDING == Ending::late) {
      float values[M * kLanes];
      for (int j = 0; j < M; ++j) store(values + j * kLanes, y[j]);
      activate_row(epilogue_.act, values, M * kLanes, epilogue_.constants);
      for (int j = 0; j < M; ++j) y[j] = load(values + j * kLanes);
    }
#pragma GCC unroll 4
    for (int j = 0; j < M; ++j) {
      if (!WHOLE && j >= to.columns) continue;
      const vec x = after ? add(y[j], extra[j]) : y[j];
      if (WHOLE) store(place + j * y_.stride[kW], x);
      else store(place + j * y_.stride[kW], x, mask);
    }
  }

  Epilogue epilogue_;
  View x_, y_;
  const float* weight_;
  int64_t pad_h_, pad_w_, channels_, outputs_, channel_vectors_, vectors_, panels_, block_rows_;
  ProductFn product_[kMaxVectors + 1][kMaxRows + 1];
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
