// What this machine can do at most, measured by the instructions that the kernels are made of: multiply-adds on
// registers, and loads of a buffer that stays where it fits. Both leave a sum behind, so that nothing is optimised away.
#include "../op.h"
#include "../vec.h"

namespace pk {
namespace PK_ISA {
namespace {

// Chains of dependent multiply-adds: enough to hide their latency, and all in registers.
constexpr int kChains = 12;

struct FmaPeak final : Op {
  float* sink;
  int64_t rounds;      // multiply-adds of each chain in a task

  void run(const Run&, int64_t begin, int64_t end) const override {
    for (int64_t task = begin; task < end; ++task) {
      vec chain[kChains];
      for (int i = 0; i < kChains; ++i) chain[i] = set(float(task + i));
      const vec shrink = set(0.5f), shift = set(0.25f);      // towards 0.5: neither subnormal nor infinite
      for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
        for (int i = 0; i < kChains; ++i) chain[i] = fma(chain[i], shrink, shift);
      }
      vec total = zero();
      for (int i = 0; i < kChains; ++i) total = add(total, chain[i]);
      sink[task] = sum(total);
    }
  }
};

struct ReadPeak final : Op {
  const float* from;
  float* sink;
  int64_t count, rounds;      // floats in a task's own part of the buffer; times that it is read

  void run(const Run&, int64_t begin, int64_t end) const override {
    constexpr int kLoads = 8;
    constexpr int64_t kStep = kLoads * kLanes;
    for (int64_t task = begin; task < end; ++task) {
      const float* part = from + task * count;
      vec total[kLoads];
      for (int i = 0; i < kLoads; ++i) total[i] = zero();
      for (int64_t round = 0; round < rounds; ++round) {
        for (int64_t at = 0; at + kStep <= count; at += kStep) {
#pragma GCC unroll 8
          for (int i = 0; i < kLoads; ++i) total[i] = add(total[i], load(part + at + i * kLanes));
        }
        asm volatile("" ::: "memory");      // the next round reads again
      }
      vec all = zero();
      for (int i = 0; i < kLoads; ++i) all = add(all, total[i]);
      sink[task] = sum(all);
    }
  }
};

}  // namespace

// tasks; rounds; sink: address of one float a task. A task is rounds x 12 x kLanes multiply-adds.
Op* make_fma_peak(const Fields& fields) {
  FmaPeak* op = new FmaPeak;
  op->tasks = fields.integer("tasks");
  op->rounds = fields.integer("rounds");
  op->sink = const_cast<float*>(fields.address<float>("sink"));
  return op;
}

// tasks; rounds; count: floats a task reads each round, a multiple of 128; from: address of tasks x count floats;
// sink: address of one float a task.
Op* make_read_peak(const Fields& fields) {
  ReadPeak* op = new ReadPeak;
  op->tasks = fields.integer("tasks");
  op->rounds = fields.integer("rounds");
  op->count = fields.integer("count");
  op->from = fields.address<float>("from");
  op->sink = const_cast<float*>(fields.address<float>("sink"));
  if (op->count % (8 * kLanes)) fail("read_peak: count must be a multiple of 8 registers");
  return op;
}

}  // namespace PK_ISA
}  // namespace pk
