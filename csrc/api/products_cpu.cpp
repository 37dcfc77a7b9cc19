// Convolutions and linear layers as ops of the CPU engine (csrc/cpu/kernels/gemm.cpp, depthwise.cpp): the implicit GEMM
// of prunekern/backends/cpu/gemm.py, without its tuner.
#include <algorithm>

#include "planner.h"

namespace pk::api {

namespace {

// start + sum of index * step over all indices, the last one fastest.
std::vector<int32_t> grid(const std::vector<int64_t>& counts, const std::vector<int64_t>& steps, int64_t start) {
  std::vector<int64_t> found = {start};
  for (size_t i = 0; i < counts.size(); ++i) {
    std::vector<int64_t> next;
    for (int64_t base : found)
      for (int64_t k = 0; k < counts[i]; ++k) next.push_back(base + k * steps[i]);
    found = next;
  }
  return std::vector<int32_t>(found.begin(), found.end());
}

// Offsets of taps and the channels at each, as [offset, length, ...]: those that touch are one.
std::vector<int64_t> runs(const std::vector<int32_t>& taps, int64_t channels) {
  std::vector<int64_t> found;
  for (int64_t tap : taps) {
    if (!found.empty() && found[found.size() - 2] + found.back() == tap)
      found.back() += channels;
    else
      found.insert(found.end(), {tap, channels});
  }
  return found;
}

std::vector<int64_t> spatial_strides(const Array& x) {
  std::vector<int64_t> found(3, 0);
  for (size_t i = 2; i < x.rank(); ++i) found[3 - x.rank() + i] = x.stride[i];
  return found;
}

}  // namespace

// [groups, outputs, depth] in panels of a few registers of columns: [panel][depth][columns] (backends/cpu/pack.py).
std::vector<float> Planner::pack_cpu(const std::vector<float>& matrix, int64_t groups, int64_t outputs,
                                     int64_t depth) const {
  const std::string isa = options_.isa.empty() ? instruction_sets().front() : options_.isa;
  const int64_t lane = lanes(isa), most = panel_vectors(isa), vectors = (outputs + lane - 1) / lane;
  const int64_t panels = (vectors + most - 1) / most;
  std::vector<float> packed;
  packed.reserve(size_t(groups * vectors * lane * depth));
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t panel = 0; panel < panels; ++panel)
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t o = panel * vectors / panels * lane; o < (panel + 1) * vectors / panels * lane; ++o)
          packed.push_back(o < outputs ? matrix[size_t((g * outputs + o) * depth + k)] : 0.f);
  return packed;
}

void Planner::conv_cpu(const Step& step, const Window& w) {
  const Array x = want_last(step.inputs[0], halo_of(w, step.inputs[0]->dims.size()));
  const Array y = write(step.outputs[0], true);
  const std::string& name = step.weights.at("weight");
  if (w.groups == w.channels && w.groups > 1) {
    const int64_t lane = lanes(options_.isa.empty() ? instruction_sets().front() : options_.isa);
    const int64_t padded = round_up(w.outputs, lane);
    const void* const weight = store_.keep("depthwise " + name, [&] {
      const std::vector<float> from = program_.weight(name).floats();
      std::vector<float> to(size_t(w.taps() * padded));
      for (int64_t o = 0; o < w.outputs; ++o)
        for (int64_t tap = 0; tap < w.taps(); ++tap) to[size_t(tap * padded + o)] = from[size_t(o * w.taps() + tap)];
      return as(Type::f32, to);
    });
    std::optional<Array> residual;
    if (step.residual) residual = want_last(step.residual, {});
    const float* const bias = step.bias.empty() ? nullptr : vector_of(step.bias);
    Item& item = emit("depthwise");
    set(item, "x", image(x));
    set(item, "y", image(y));
    set(item, "weight", weight);
    set(item, "channels", padded);
    set(item, "multiplier", w.outputs / w.channels);
    set(item, "kernel", std::vector<int64_t>(w.kernel, w.kernel + 3));
    set(item, "stride", std::vector<int64_t>(w.stride, w.stride + 3));
    set(item, "padding", std::vector<int64_t>(w.low, w.low + 3));
    set(item, "dilation", std::vector<int64_t>(w.dilation, w.dilation + 3));
    if (bias) set(item, "bias", static_cast<const void*>(bias));
    if (residual) {
      set(item, "residual", image(*residual));
      set(item, "residual_last", int64_t(step.residual_last));
    }
    activation(item, step);
    plan_.algorithms[step.name] = "depthwise";
    return;
  }
  const int64_t in = w.channels / w.groups;
  const std::vector<float> from = program_.weight(name).floats();
  std::vector<float> rows(from.size());      // [outputs][taps][channels]
  for (int64_t o = 0; o < w.outputs; ++o)
    for (int64_t c = 0; c < in; ++c)
      for (int64_t tap = 0; tap < w.taps(); ++tap)
        rows[size_t((o * w.taps() + tap) * in + c)] = from[size_t((o * in + c) * w.taps() + tap)];
  gemm_cpu(step, w, x, y, rows);
  plan_.algorithms[step.name] = w.taps() == 1 ? "1x1 GEMM" : "implicit GEMM";
}

void Planner::gemm_cpu(const Step& step, const Window& w, const Array& x, const Array& y, const std::vector<float>& rows) {
  const int64_t in = w.channels / w.groups, out = w.outputs / w.groups, depth = w.taps() * in;
  const std::vector<int64_t> strides = spatial_strides(x), counts(w.out, w.out + 3), kernel(w.kernel, w.kernel + 3);
  std::vector<int64_t> steps(3), taps(3);
  int64_t start = 0;
  for (size_t i = 0; i < 3; ++i) {
    steps[i] = strides[i] * w.stride[i];
    taps[i] = strides[i] * w.dilation[i];
    start -= strides[i] * w.low[i];
  }
  const void* const weight = store_.keep("gemm " + step.weights.at("weight"), [&] {
    return as(Type::f32, pack_cpu(rows, w.groups, out, depth));
  });
  std::optional<Array> residual;
  if (step.residual) residual = want_last(step.residual, {});
  const void* bias = nullptr;
  if (!step.bias.empty()) {
    const int64_t lane = lanes(options_.isa.empty() ? instruction_sets().front() : options_.isa), padded = round_up(out, lane);
    bias = store_.keep("bias " + step.bias + " " + std::to_string(w.groups), [&] {
      const std::vector<float> given = program_.weight(step.bias).floats();
      std::vector<float> found(size_t(w.groups * padded));
      for (int64_t o = 0; o < w.outputs; ++o) found[size_t(o / out * padded + o % out)] = given[size_t(o)];
      return as(Type::f32, found);
    });
  }
  Item& item = emit("gemm");
  set(item, "x", image(x));
  set(item, "y", image(y));
  set(item, "places", w.positions());
  set(item, "in_table", table(grid(counts, steps, start)));
  set(item, "out_table", table(grid(counts, spatial_strides(y), 0)));
  set(item, "segments", runs(grid(kernel, taps, 0), in));
  set(item, "outputs", out);
  set(item, "groups", w.groups);
  set(item, "group_in", in);
  set(item, "weight", weight);
  if (bias) set(item, "bias", bias);
  if (residual) {
    set(item, "residual", image(*residual));
    set(item, "residual_last", int64_t(step.residual_last));
    set(item, "residual_table", table(grid(counts, spatial_strides(*residual), 0)));
  }
  activation(item, step);
}

// As a plain convolution of the image with zeros between its pixels, the window turned round.
void Planner::conv_transpose_cpu(const Step& step, Window w) {
  const Array x = read(step.inputs[0]);
  const size_t rank = x.rank() - 2, skip = 3 - rank;
  Shape wide = {x.shape[0], x.shape[1]};
  Array inside;
  Window plain = w;
  for (size_t i = 0; i < 3; ++i) {
    const int64_t reach = w.dilation[i] * (w.kernel[i] - 1), spread = (w.size[i] - 1) * w.stride[i] + 1;
    plain.stride[i] = 1;
    plain.low[i] = std::max<int64_t>(0, reach - w.low[i]);      // zeros before the image; a negative number crops it
    plain.size[i] = spread;
    plain.high[i] = std::max<int64_t>(0, w.out[i] + reach - spread - plain.low[i] + std::max<int64_t>(0, w.low[i] - reach));
    if (i >= skip) wide.push_back(plain.low[i] + spread + plain.high[i]);
  }
  const Array room = allocate(Type::f32, wide, true);
  fill(room, 0);
  inside = room;
  for (size_t i = 0; i < rank; ++i) inside = inside.narrow(2 + i, plain.low[skip + i], w.size[skip + i], w.stride[skip + i]);
  copy(x, inside);
  for (size_t i = 0; i < 3; ++i) {
    plain.size[i] += plain.low[i] + plain.high[i];
    plain.low[i] = -std::max<int64_t>(0, w.low[i] - w.dilation[i] * (w.kernel[i] - 1));
  }
  const int64_t in = w.channels / w.groups, out = w.outputs / w.groups, taps = w.taps();
  const std::vector<float> from = program_.weight(step.weights.at("weight")).floats();      // [I, O/g, taps]
  std::vector<float> rows(from.size());
  for (int64_t g = 0; g < w.groups; ++g)
    for (int64_t o = 0; o < out; ++o)
      for (int64_t tap = 0; tap < taps; ++tap)
        for (int64_t c = 0; c < in; ++c)
          rows[size_t(((g * out + o) * taps + taps - 1 - tap) * in + c)] = from[size_t(((g * in + c) * out + o) * taps + tap)];
  const Array y = write(step.outputs[0], true);
  gemm_cpu(step, plain, room, y, rows);
  plan_.algorithms[step.name] = "implicit GEMM";
}

void Planner::linear_cpu(const Step& step) {
  const std::string& name = step.weights.at("weight");
  const Weight& weight = program_.weight(name);
  const int64_t outputs = weight.shape.at(0), inputs = weight.shape.at(1);
  const auto flat = flat_.find(step.inputs[0]->name);
  const auto last_dense = [&](const Array& a) { return a.stride.back() == 1 || a.shape.back() == 1 ? a : dense(a); };
  Array x = flat != flat_.end() ? read(flat->second) : last_dense(read(step.inputs[0]));
  const Array y = write(step.outputs[0], false);
  std::optional<Array> residual;
  if (step.residual) residual = last_dense(read(step.residual));
  const auto leading = [](const Array& a) { return std::vector<int64_t>(a.stride.begin(), a.stride.end() - 1); };
  const std::vector<int64_t> counts(y.shape.begin(), y.shape.end() - 1);
  std::vector<int32_t> starts;
  std::vector<int64_t> segments;
  int64_t channels = inputs, positions = 1;
  if (flat != flat_.end()) {
    channels = x.shape[1];
    positions = inputs / channels;
    starts = grid({x.shape[0]}, {x.stride[0]}, 0);
    segments = runs(grid(Shape(x.shape.begin() + 2, x.shape.end()), Shape(x.stride.begin() + 2, x.stride.end()), 0), channels);
  } else {
    starts = grid(counts, leading(x), 0);
    segments = {0, inputs};
  }
  const void* const packed = store_.keep("linear " + name + " " + std::to_string(positions), [&] {
    const std::vector<float> from = weight.floats();
    std::vector<float> rows(from.size());
    for (int64_t o = 0; o < outputs; ++o)
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t p = 0; p < positions; ++p)
          rows[size_t((o * positions + p) * channels + c)] = from[size_t((o * channels + c) * positions + p)];
    return as(Type::f32, pack_cpu(rows, 1, outputs, inputs));
  });
  Item& item = emit("gemm");
  set(item, "x", whole(x));
  set(item, "y", whole(y));
  set(item, "places", product(counts));
  set(item, "in_table", table(starts));
  set(item, "out_table", table(grid(counts, leading(y), 0)));
  set(item, "segments", segments);
  set(item, "outputs", outputs);
  set(item, "weight", packed);
  if (!step.bias.empty()) set(item, "bias", static_cast<const void*>(vector_of(step.bias)));
  if (residual) {
    set(item, "residual", whole(*residual));
    set(item, "residual_last", int64_t(step.residual_last));
    set(item, "residual_table", table(grid(counts, leading(*residual), 0)));
  }
  activation(item, step);
  plan_.algorithms[step.name] = "GEMM";
}

}  // namespace pk::api
