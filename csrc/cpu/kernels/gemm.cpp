// Convolutions and linear layers as matrix products over strided views: y[row] = epilogue(sum_s x[row, s] * W).
//
// The geometry is in two tables made in Python (backends/cpu/convs.py): where each output position's window starts,
// and the segments of a window. Nothing is copied (implicit im2col); 1-D to 3-D, strides, dilation, groups, phases of
// transposed convolutions and plain linear layers are all the same loop.
#include "bf16.h"
#include "microkernel.h"

namespace pk {
namespace PK_ISA {
namespace {

// Input that is worked on with one panel of weights before the next one: stays in the second cache.
constexpr int64_t kChunkBytes = 384 << 10;
// Depth that is summed up at once: its part of a panel stays in the second cache, and rounding errors stay small.
constexpr int64_t kStretch = 512;
constexpr int64_t kTaskMacs = 24000;

struct Rows {             // of one chunk, in order over (image, position)
  int64_t image, place;
};

class Gemm final : public Op {
 public:
  explicit Gemm(const Fields& f) : epilogue_(Epilogue::of(f)), x_(f.view("x")), y_(f.view("y")) {
    weight_ = f.address<char>("weight");
    half_ = f.integer("half", 0) != 0;
    pairs_ = f.integer("pairs", 0) != 0;        // x and weights are pairs of bf16, each of which counts as one float
    if (pairs_ && !kHasBf16) fail("this instruction set has no bf16");
    outputs_ = f.integer("outputs");            // columns a group
    groups_ = f.integer("groups", 1);
    group_in_ = f.integer("group_in", 0);
    places_ = f.integer("places");
    in_ = f.address<int32_t>("in_table");
    out_ = f.address<int32_t>("out_table");
    residual_ = f.address<int32_t>("residual_table");
    int64_t count = 0;
    segments_ = reinterpret_cast<const Segment*>(f.list("segments", &count));
    segment_count_ = count / 2;
    for (int64_t s = 0; s < segment_count_; ++s) depth_ += segments_[s].length;
    rows_ = x_.size[kN] * places_;
    vectors_ = (outputs_ + kLanes - 1) / kLanes;
    panels_ = (vectors_ + kMaxVectors - 1) / kMaxVectors;
    for (int v = 1; v <= kMaxVectors; ++v)
      for (int r = 1; r <= rows_for(v); ++r) tiles_[v][r] = tile_for(r, v);
    plan(f.threads(), f.integer("chunk", 0));
  }

  void run(const Run& run, int64_t begin, int64_t end) const override {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task / strips_, strip = task % strips_;
      const int64_t first = chunk * chunk_, last = first + chunk_ < rows_ ? first + chunk_ : rows_;
      const int64_t all = panels_ * groups_;
      for (int64_t p = strip * all / strips_; p < (strip + 1) * all / strips_; ++p)
        panel(run, p / panels_, p % panels_, first, last);
    }
  }

 private:
  void plan(int64_t threads, int64_t chunk) {
    const int64_t bytes = 4 * x_.size[kN] * x_.size[kC] * x_.size[kD] * x_.size[kH] * x_.size[kW];
    const int64_t each = bytes / (rows_ ? rows_ : 1) + 1;
    chunk_ = chunk ? chunk : kChunkBytes / each;
    if (chunk_ < 4 * kMaxRows) chunk_ = 4 * kMaxRows;
    if (chunk_ > rows_) chunk_ = rows_ ? rows_ : 1;
    block_depth_ = kStretch;
    strips_ = 1;
    if (threads > 1) {
      const int64_t macs = rows_ * depth_ * outputs_ * groups_;
      int64_t wanted = macs / kTaskMacs;
      if (wanted > 4 * threads) wanted = 4 * threads;
      const int64_t smallest = 2 * rows_for(panel_vectors(0));
      if (wanted > 1 && (rows_ + chunk_ - 1) / chunk_ < wanted) {
        const int64_t by_rows = rows_ / smallest < wanted ? rows_ / smallest : wanted;
        // Rows are shared out where there are many, else columns: then every weight is still read once.
        if (by_rows >= wanted / 2 && by_rows > 1) {
          chunk_ = (rows_ + by_rows - 1) / by_rows;
        } else {
          strips_ = panels_ * groups_ < wanted ? panels_ * groups_ : wanted;
        }
      }
    }
    tasks = (rows_ + chunk_ - 1) / chunk_ * strips_;
    if (rows_ == 0) tasks = 0;
    scratch = depth_ > block_depth_ ? 4 * chunk_ * kMaxVectors * kLanes : 0;
  }

  // Vectors are shared out evenly among a group's panels; Python packs by the same rule (backends/cpu/pack.py).
  int64_t panel_start(int64_t panel) const { return panel * vectors_ / panels_; }
  int64_t panel_vectors(int64_t panel) const { return panel_start(panel + 1) - panel_start(panel); }

  void panel(const Run& run, int64_t group, int64_t panel, int64_t first, int64_t last) const {
    const int64_t start = panel_start(panel) * kLanes;
    const int vectors = int(panel_vectors(panel));
    const int64_t bytes = half_ ? 2 : 4;
    Block block;
    block.epilogue = &epilogue_;
    block.columns = outputs_ - start;
    block.bias = epilogue_.bias ? epilogue_.bias + group * vectors_ * kLanes + start : nullptr;
    block.partial = reinterpret_cast<float*>(run.scratch);
    const char* weight = weight_ + bytes * (group * vectors_ * kLanes + start) * depth_;
    const float* x = x_.at(run) + group * group_in_;
    float* y = y_.at(run) + group * outputs_ + start;
    const float* residual = epilogue_.residual.there ? epilogue_.residual.at(run) + group * outputs_ + start : nullptr;
    // The depth in stretches of whole segments, or parts of one that is too long.
    int64_t s = 0, done = 0, inside = 0;
    Segment parts[kMaxParts];
    while (done < depth_) {
      int64_t count = 0, depth = 0;
      while (s < segment_count_ && count < kMaxParts && depth < block_depth_) {
        const int64_t left = segments_[s].length - inside, room = block_depth_ - depth;
        const int64_t take = left <= room + room / 2 ? left : room;
        parts[count++] = {segments_[s].offset + inside, take};
        depth += take;
        inside += take;
        if (inside == segments_[s].length) { ++s; inside = 0; }
      }
      block.segments = parts;
      block.segment_count = count;
      block.b = weight + bytes * done * vectors * kLanes;
      block.first = done == 0;
      done += depth;
      block.last = done == depth_;
      sweep(block, vectors, x, y, residual, first, last);
    }
  }

  void sweep(Block& block, int vectors, const float* x, float* y, const float* residual, int64_t first,
             int64_t last) const {
    const int64_t most = rows_for(vectors), count = (last - first + most - 1) / most;
    const TileFn* const tiles = tiles_[vectors];
    float* const partial = block.partial;
    int64_t image = first / places_, place = first % places_, row = first;
    for (int64_t i = 0; i < count; ++i) {        // blocks as even as can be: 49 rows are 5 and 6, not 6 and 1
      const int64_t stop = first + (i + 1) * (last - first) / count;
      const int rows = int(stop - row);
      for (int r = 0; r < rows; ++r) {
        block.a[r] = x + image * x_.stride[kN] + in_[place];
        block.y[r] = y + image * y_.stride[kN] + out_[place];
        if (residual) block.residual[r] = residual + image * epilogue_.residual.stride[kN] + residual_[place];
        if (++place == places_) { place = 0; ++image; }
      }
      block.partial = partial + (row - first) * vectors * kLanes;
      tiles[rows](block);
      row = stop;
    }
    block.partial = partial;
  }

  TileFn tile_for(int rows, int vectors) const {
    if constexpr (kHasBf16)
      if (pairs_) return tile_of<Pair>(rows, vectors);
    return half_ ? tile_of<uint16_t>(rows, vectors) : tile_of<float>(rows, vectors);
  }

  static constexpr int64_t kMaxParts = 128;
  Epilogue epilogue_;
  View x_, y_;
  const char* weight_;
  bool half_, pairs_;
  int64_t outputs_, groups_, group_in_, places_;
  const int32_t *in_, *out_, *residual_;
  const Segment* segments_;
  int64_t segment_count_ = 0, depth_ = 0, rows_, vectors_, panels_;
  int64_t chunk_, strips_, block_depth_;
  TileFn tiles_[kMaxVectors + 1][kMaxRows + 1] = {};
};

// Explicit im2col: the windows as rows of a matrix, [image, position][window].
class Im2col final : public Op {
 public:
  explicit Im2col(const Fields& f) : x_(f.view("x")), y_(f.view("y")) {
    places_ = f.integer("places");
    in_ = f.address<int32_t>("in_table");
    int64_t count = 0;
    segments_ = reinterpret_cast<const Segment*>(f.list("segments", &count));
    segment_count_ = count / 2;
    for (int64_t s = 0; s < segment_count_; ++s) depth_ += segments_[s].length;
    rows_ = x_.size[kN] * places_;
    const int64_t pieces = rows_ * depth_ / kTaskMacs;
    tasks = pieces < 1 ? (rows_ ? 1 : 0) : pieces < 4 * f.threads() ? pieces : 4 * f.threads();
  }

  void run(const Run& run, int64_t begin, int64_t end) const override {
    const int64_t first = begin * rows_ / tasks, last = end * rows_ / tasks;
    int64_t image = first / places_, place = first % places_;
    float* y = y_.at(run) + first * depth_;
    for (int64_t row = first; row < last; ++row) {
      const float* x = x_.at(run) + image * x_.stride[kN] + in_[place];
      for (int64_t s = 0; s < segment_count_; ++s) {
        const int64_t length = segments_[s].length;
        for (int64_t k = 0; k < length; k += kLanes)
          store_first(y + k, load_first(x + segments_[s].offset + k, length - k), length - k);
        y += length;
      }
      if (++place == places_) { place = 0; ++image; }
    }
  }

 private:
  View x_, y_;
  int64_t places_, rows_, segment_count_ = 0, depth_ = 0;
  const int32_t* in_;
  const Segment* segments_;
};

}  // namespace

Op* make_gemm(const Fields& f) { return new Gemm(f); }
Op* make_im2col(const Fields& f) { return new Im2col(f); }

}  // namespace PK_ISA
}  // namespace pk
