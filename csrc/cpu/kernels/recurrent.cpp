// Recurrent layers, one direction of one layer: h' = cell(x W_ih + b, h W_hh) for time steps in order. What does not
// depend on the state, x W_ih + b, is there already: one matrix product for all time steps (backends/cpu/recurrent.py).
//
// Weights are packed so that a register block is a few hidden units with all of their gates next to each other, so a
// cell is finished in registers, and the only memory a time step touches is the weights, the state, and its output.
// LSTM: S. Hochreiter, J. Schmidhuber, "Long Short-Term Memory" (1997), with forget gates (F. Gers et al., 2000); GRU:
// K. Cho et al. (2014), as torch has it, with the reset gate behind the product; RNN: J. Elman (1990).
#include "microkernel.h"

namespace pk {
namespace PK_ISA {
namespace {

enum class Cell : int64_t { lstm, gru, rnn_tanh, rnn_relu };

// Registers of hidden units in a panel and gates: their product is the width of a register block. A plain RNN has one
// gate only, so it takes two registers of units: two sums at a time hide what one would wait for.
constexpr int units_of(Cell cell) { return cell == Cell::lstm || cell == Cell::gru ? 1 : 2; }
constexpr int gates_of(Cell cell) { return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1; }
constexpr int block_rows(int vectors) { return kRegisters == 32 ? (vectors == 4 ? 6 : 8) : (vectors == 2 ? 6 : 3); }

constexpr int64_t kTaskMacs = 24000;     // worth a thread

// One row of one panel: where its parts are, at the panel's first unit. x: W_ih x + b of all gates, panel by panel.
struct Place {
  const float *x, *h, *c;         // h, c: of the time step before; null: zeros
  float *y, *h_last, *c_next;     // h_last: null but in the last time step
};

template <Cell cell>
struct Panel {
  static constexpr int kUnits = units_of(cell), kGates = gates_of(cell), kVectors = kUnits * kGates;
  static constexpr int kWidth = kUnits * kLanes;      // hidden units

  // What a sum starts with. The new gate of a GRU is not added to its part of the input before it is reset.
  static PK_INLINE vec start(const float* x, const float* bias, int v) {
    return cell == Cell::gru && v == 2 ? (bias ? load(bias) : zero()) : load(x + v * kLanes);
  }

  // The cell, from sums of all gates. count: how many units of this register there are.
  static PK_INLINE void finish(const vec* sum, const Place& at, int64_t unit, int64_t count) {
    const vec one = set(1.f);
    vec h;
    if constexpr (cell == Cell::lstm) {
      const vec before = at.c ? load_first(at.c + unit, count) : zero();
      const vec c = fma(sigmoid(sum[1]), before, mul(sigmoid(sum[0]), tanh(sum[2])));
      store_first(at.c_next + unit, c, count);
      h = mul(sigmoid(sum[3]), tanh(c));
    } else if constexpr (cell == Cell::gru) {
      const vec before = at.h ? load_first(at.h + unit, count) : zero(), update = sigmoid(sum[1]);
      const vec fresh = tanh(fma(sigmoid(sum[0]), sum[2], load(at.x + 2 * kLanes)));
      h = fma(update, before, mul(sub(one, update), fresh));
    } else {
      h = cell == Cell::rnn_tanh ? tanh(sum[0]) : max(zero(), sum[0]);
    }
    store_first(at.y + unit, h, count);
    if (at.h_last) store_first(at.h_last + unit, h, count);
  }

  // Rows of one panel. block: the rows of h, the weights, and their depth; without segments h is zero.
  template <int MR, class W>
  static void tile(const Block& block, const Place* rows, const float* bias, int64_t count) {
    vec acc[MR][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] = start(rows[r].x, bias, v);
    accumulate<MR, kVectors, W>(acc, block);
    alignas(64) float sums[MR][kVectors * kLanes];      // so that what follows is a loop, not MR copies
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) store(sums[r] + v * kLanes, acc[r][v]);
#pragma GCC unroll 1
    for (int r = 0; r < MR; ++r) {
      for (int u = 0; u < kUnits && u * kLanes < count; ++u) {
        vec gate[kGates];
#pragma GCC unroll 4
        for (int g = 0; g < kGates; ++g) gate[g] = load(sums[r] + (g * kUnits + u) * kLanes);
        finish(gate, rows[r], u * kLanes, count - u * kLanes);
      }
    }
  }

  template <class W>
  static void rows(int count, const Block& block, const Place* rows, const float* bias, int64_t units) {
    constexpr int kMost = block_rows(kVectors);
    switch (count) {
      case 1: return tile<1, W>(block, rows, bias, units);
      case 2: return tile<2, W>(block, rows, bias, units);
      case 3: return tile<3, W>(block, rows, bias, units);
      default: break;
    }
    if constexpr (kMost >= 6) {
      switch (count) {
        case 4: return tile<4, W>(block, rows, bias, units);
        case 5: return tile<5, W>(block, rows, bias, units);
        case 6: return tile<6, W>(block, rows, bias, units);
        default: break;
      }
    }
    if constexpr (kMost >= 8) return count == 7 ? tile<7, W>(block, rows, bias, units)
                                                : tile<8, W>(block, rows, bias, units);
  }
};

// Fields: x [time, batch, gates in panels], y [time, batch, hidden]; h0, c0 (optional), h1, c1 [batch, hidden]; weight,
// half, bias (of a GRU's new gate); first, count: time steps, in the order in which they are done; reverse: the last
// one is done first; split: 0: tasks are rows of the batch for all these time steps, 1: panels of one time step.
template <Cell cell>
class Recurrent final : public Op {
  using P = Panel<cell>;

 public:
  explicit Recurrent(const Fields& f)
      : x_(f.view("x")), y_(f.view("y")), h0_(f.view("h0")), c0_(f.view("c0")), h1_(f.view("h1")), c1_(f.view("c1")),
        weight_(f.address<char>("weight")), bias_(f.address<float>("bias")), half_(f.integer("half", 0) != 0),
        reverse_(f.integer("reverse", 0) != 0), split_(f.integer("split", 0) != 0), first_(f.integer("first")),
        count_(f.integer("count")) {
    steps_ = y_.size[kD];
    batch_ = y_.size[kH];
    hidden_ = y_.size[kW];
    panels_ = (hidden_ + P::kWidth - 1) / P::kWidth;
    if (split_ && count_ != 1) fail("panels are shared out within one time step only");
    const int64_t most = split_ ? panels_ : batch_;
    const int64_t worth = count_ * batch_ * hidden_ * panels_ * P::kWidth * P::kGates / kTaskMacs;
    tasks = most < f.threads() ? most : f.threads();
    if (tasks > worth) tasks = worth > 1 ? worth : 1;
    if (batch_ == 0 || hidden_ == 0) tasks = 0;
  }

  void run(const Run& run, int64_t begin, int64_t end) const override {
    const int64_t from[2] = {begin * batch_ / tasks, begin * panels_ / tasks};
    const int64_t to[2] = {end * batch_ / tasks, end * panels_ / tasks};
    for (int64_t s = first_; s < first_ + count_; ++s)
      step(run, s, split_ ? 0 : from[0], split_ ? batch_ : to[0], split_ ? from[1] : 0, split_ ? to[1] : panels_);
  }

 private:
  static float* row(const View& view, const Run& run, int64_t n) { return view.at(run) + n * view.stride[kH]; }

  float* output(const Run& run, int64_t s, int64_t n) const {
    return row(y_, run, n) + (reverse_ ? steps_ - 1 - s : s) * y_.stride[kD];
  }

  // Panels [begin, end) of rows [low, high) at one time step.
  void step(const Run& run, int64_t s, int64_t low, int64_t high, int64_t begin, int64_t end) const {
    const int64_t time = reverse_ ? steps_ - 1 - s : s, panel_floats = hidden_ * P::kVectors * kLanes;
    const Segment all{0, hidden_};
    Block block;
    block.segments = &all;
    block.segment_count = s > 0 || h0_.there ? 1 : 0;
    Place places[block_rows(P::kVectors)];
    const int64_t blocks = (high - low + block_rows(P::kVectors) - 1) / block_rows(P::kVectors);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t unit = p * P::kWidth;
      block.b = weight_ + (half_ ? 2 : 4) * p * panel_floats;
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t n0 = low + i * (high - low) / blocks, n1 = low + (i + 1) * (high - low) / blocks;
        for (int64_t n = n0; n < n1; ++n) {
          const float* h = s > 0 ? output(run, s - 1, n) : h0_.there ? row(h0_, run, n) : nullptr;
          Place& at = places[n - n0];
          block.a[n - n0] = h;
          at.x = row(x_, run, n) + time * x_.stride[kD] + p * P::kVectors * kLanes;
          at.h = h ? h + unit : nullptr;
          at.y = output(run, s, n) + unit;
          at.h_last = s + 1 == steps_ ? row(h1_, run, n) + unit : nullptr;
          if (cell == Cell::lstm) {
            at.c_next = row(c1_, run, n) + unit;
            at.c = s > 0 ? at.c_next : c0_.there ? row(c0_, run, n) + unit : nullptr;
          }
        }
        const float* bias = bias_ ? bias_ + unit : nullptr;
        (half_ ? P::template rows<uint16_t> : P::template rows<float>)(int(n1 - n0), block, places, bias,
                                                                       hidden_ - unit);
      }
    }
  }

  View x_, y_, h0_, c0_, h1_, c1_;
  const char* weight_;
  const float* bias_;
  bool half_, reverse_, split_;
  int64_t first_, count_, steps_, batch_, hidden_, panels_;
};

}  // namespace

Op* make_recurrent(const Fields& f) {
  switch (static_cast<Cell>(f.integer("kind"))) {
    case Cell::lstm: return new Recurrent<Cell::lstm>(f);
    case Cell::gru: return new Recurrent<Cell::gru>(f);
    case Cell::rnn_tanh: return new Recurrent<Cell::rnn_tanh>(f);
    case Cell::rnn_relu: return new Recurrent<Cell::rnn_relu>(f);
  }
  fail("no such kind of cell");
}

}  // namespace PK_ISA
}  // namespace pk
