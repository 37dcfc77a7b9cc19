// A network of Ops, and the fields they are made from.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "op.h"

namespace pk {

struct Value {
  std::vector<int64_t> integers;
  double number = 0;
  bool is_list = false;
};

struct FieldValues {
  std::string kind, step;                            // for messages
  std::unordered_map<std::string, Value> values;
  int64_t threads = 1;
};

// What the Python side describes (backends/cpu/native.py).
struct Recipe {
  std::string isa;                                   // empty: the best that this machine has
  int64_t threads = 1;
  int64_t arena = 0;                                 // bytes
  int64_t slices = 1;                                // of the batch, one after another or on several threads
  std::vector<int64_t> slice_bytes;                  // per input or output: from one slice to the next
  std::vector<FieldValues> ops;
  // Groups of ops that are cut into chains: a group is the first op of every chain, and the end of the last one. A
  // chain runs on one thread from end to end; what flows through it stays in that thread's own memory (`local` bytes,
  // the base after all others).
  std::vector<std::vector<int64_t>> groups;
  int64_t local = 0;
};

class Network {
 public:
  explicit Network(Recipe recipe);
  ~Network();

  // Ops [begin, end) for all slices. addresses: one per input and output, in the Recipe's order. arena: memory to
  // use (with one slice only), or null for memory of the network's own. Any number of threads may call.
  void run(int64_t begin, int64_t end, char* arena, char* const* addresses, int64_t count) const;

  // The same, op by op: nanoseconds of each of all ops (times has size() entries).
  void time(char* arena, char* const* addresses, int64_t count, int64_t* times) const;

  int64_t size() const { return int64_t(ops_.size()); }

 private:
  class Workspace;
  void run_slices(int64_t begin, int64_t end, char* const* addresses) const;
  void run_ops(int64_t begin, int64_t end, char* const* bases, int64_t threads) const;
  void run_chain(int64_t begin, int64_t end, char* const* bases) const;
  std::unique_ptr<Workspace> acquire() const;
  void release(std::unique_ptr<Workspace> space) const;

  Recipe recipe_;
  std::vector<std::unique_ptr<Fields>> fields_;      // Ops keep addresses into them
  std::vector<std::unique_ptr<Op>> ops_;
  std::vector<int64_t> group_at_;                    // of each op: the group that starts there, or -1
  int64_t scratch_ = 64;                             // bytes that the hungriest op wants
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Workspace>> free_;
};

// The instruction sets that this build has and this machine can run, best first.
std::vector<std::string> instruction_sets();
// Whether it multiplies bf16 numbers here (kernels/bf16.h).
bool runs_bf16(const std::string& isa);
// Floats in a register.
int64_t lanes(const std::string& isa);
// Vectors of columns in a panel of packed weights (kernels/microkernel.h).
int64_t panel_vectors(const std::string& isa);
Op* make_op(const std::string& isa, const Fields& fields);
// Transparent huge pages for what lies in [address, address + bytes), where the system has them.
void advise_huge(void* address, int64_t bytes);

}  // namespace pk
