// What the engine runs: an Op is one step of a network at one shape, made once, run many times, from any thread.
//
// Kernel units (kernels/*.cpp) define classes derived from Op and a factory `Op* make_NAME(const Fields&)` in the
// namespace of their instruction set, and list the name in ops.def. They are compiled for instruction sets that this
// machine may not have, so nothing but their factories may be called from outside, and they must not instantiate
// standard templates (std::vector, std::max of a non-inlined build, ...): the linker would merge those with everybody
// else's copies.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pk {

// What a run is given. Bases are addresses that Views refer to by number: 0 is the arena; 1... are inputs and outputs
// of this call. Weights have addresses of their own. scratch is private to the calling thread, and as large as the
// largest Op of the network wants; 64-byte aligned.
struct Run {
  char* const* base;
  char* scratch;
};

// Where a tensor lies. Axes: n, c, d, h, w (missing ones have size 1); strides in elements. Channels-last means
// stride c = 1; planar means stride w = 1.
struct View {
  int64_t base = 0;      // number in Run::base
  int64_t offset = 0;    // bytes
  int64_t size[5] = {1, 1, 1, 1, 1};
  int64_t stride[5] = {0, 0, 0, 0, 0};
  bool there = false;

  float* at(const Run& run) const { return reinterpret_cast<float*>(run.base[base] + offset); }
};

enum Axis { kN, kC, kD, kH, kW };

// The named arguments an Op is made from, as Python gave them. Missing ones without a default raise (fail()).
class Fields {
 public:
  int64_t integer(const char* name) const;
  int64_t integer(const char* name, int64_t missing) const;
  double number(const char* name, double missing) const;
  // A list of integers; *count is how many. The memory lives as long as the network.
  const int64_t* list(const char* name, int64_t* count) const;
  // Integers as a list of exactly `count`.
  void copy(const char* name, int64_t count, int64_t* to) const;
  // An address: of weights or a table that outlives the network. null where it is missing or 0.
  template <typename T>
  const T* address(const char* name) const { return reinterpret_cast<const T*>(pointer(name)); }
  // A View: [base, offset in bytes, 5 sizes, 5 strides]; `there` is false where it is missing.
  View view(const char* name) const;
  int64_t threads() const;      // that the network runs with

  void* impl = nullptr;         // the engine's

 private:
  const void* pointer(const char* name) const;
};

// Raises in Python, naming the step.
[[noreturn]] void fail(const char* message);

class Op {
 public:
  virtual ~Op();
  // Does tasks [begin, end) of `tasks`; tasks are independent of each other.
  virtual void run(const Run& run, int64_t begin, int64_t end) const = 0;

  int64_t tasks = 1;      // pieces it can be cut into, for threads; a few per thread at least where work allows
  int64_t scratch = 0;    // bytes of Run::scratch that a task uses
};

// Elementwise functions: kinds as numbered by prunekern/backends/cpu/native.py.
enum class Act : int64_t {
  none, relu, leaky_relu, elu, gelu, gelu_tanh, silu, mish, hardswish, hardsigmoid, sigmoid, tanh, softplus, softsign,
  log_sigmoid, clamp, clamp_min, clamp_max, threshold, hardshrink, softshrink, exp, log, log1p, sqrt, rsqrt, square,
  abs, neg, sin, cos, erf, sign, round, floor, ceil, reciprocal, pow
};

}  // namespace pk
