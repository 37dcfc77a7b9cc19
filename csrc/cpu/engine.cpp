#include "engine.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#include <sys/mman.h>

#include "pool.h"

namespace pk {

// ---- fields ------------------------------------------------------------------------------------------------------

namespace {

const FieldValues& of(const Fields& fields) { return *static_cast<const FieldValues*>(fields.impl); }

const Value* find(const Fields& fields, const char* name) {
  const auto& values = of(fields).values;
  const auto it = values.find(name);
  return it == values.end() ? nullptr : &it->second;
}

const Value& get(const Fields& fields, const char* name) {
  const Value* value = find(fields, name);
  if (value == nullptr) fail((of(fields).kind + " needs the field " + name).c_str());
  return *value;
}

constexpr int64_t kHuge = 2 << 20;

char* allocate(int64_t bytes) {
  const int64_t alignment = bytes >= kHuge ? kHuge : 64;
  char* memory = static_cast<char*>(std::aligned_alloc(size_t(alignment),
                                                       size_t((bytes + alignment - 1) / alignment * alignment)));
  if (memory == nullptr) throw std::bad_alloc();
  advise_huge(memory, bytes);
  std::memset(memory, 0, size_t(bytes));      // halos that nobody writes stay 0
  return memory;
}

}  // namespace

Op::~Op() = default;

void fail(const char* message) { throw std::invalid_argument(message); }

int64_t Fields::integer(const char* name) const {
  const Value& value = get(*this, name);
  if (value.is_list || value.integers.size() != 1) fail((std::string(name) + " is not an integer").c_str());
  return value.integers[0];
}

int64_t Fields::integer(const char* name, int64_t missing) const {
  return find(*this, name) == nullptr ? missing : integer(name);
}

double Fields::number(const char* name, double missing) const {
  const Value* value = find(*this, name);
  return value == nullptr ? missing : value->number;
}

const int64_t* Fields::list(const char* name, int64_t* count) const {
  const Value& value = get(*this, name);
  *count = int64_t(value.integers.size());
  return value.integers.data();
}

void Fields::copy(const char* name, int64_t count, int64_t* to) const {
  int64_t there = 0;
  const int64_t* from = list(name, &there);
  if (there != count) fail((std::string(name) + " has " + std::to_string(there) + " entries, not " +
                            std::to_string(count)).c_str());
  std::copy(from, from + count, to);
}

View Fields::view(const char* name) const {
  View view;
  if (find(*this, name) == nullptr) return view;
  int64_t all[12];
  copy(name, 12, all);
  view.base = all[0];
  view.offset = all[1];
  std::copy(all + 2, all + 7, view.size);
  std::copy(all + 7, all + 12, view.stride);
  view.there = true;
  return view;
}

const void* Fields::pointer(const char* name) const {
  const Value* value = find(*this, name);
  return value == nullptr ? nullptr : reinterpret_cast<const void*>(value->integers.at(0));
}

int64_t Fields::threads() const { return of(*this).threads; }

void advise_huge(void* address, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t first = (reinterpret_cast<uintptr_t>(address) + 4095) / 4096 * 4096;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(address) + uintptr_t(bytes)) / 4096 * 4096;
  if (last > first && bytes >= kHuge) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)address; (void)bytes;
#endif
}

// ---- running -----------------------------------------------------------------------------------------------------

// What one slice at a time needs for itself.
class Network::Workspace {
 public:
  Workspace(int64_t arena, size_t bases) : arena_(allocate(std::max<int64_t>(arena, 64))), bases(bases + 1) {
    this->bases[0] = arena_;
  }
  ~Workspace() { std::free(arena_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

 private:
  char* arena_;

 public:
  std::vector<char*> bases;
};

Network::Network(Recipe recipe) : recipe_(std::move(recipe)) {
  if (recipe_.isa.empty()) recipe_.isa = instruction_sets().front();
  for (FieldValues& values : recipe_.ops) {
    values.threads = recipe_.slices > 1 ? 1 : recipe_.threads;
    fields_.push_back(std::make_unique<Fields>());
    fields_.back()->impl = &values;
    try {
      ops_.emplace_back(make_op(recipe_.isa, *fields_.back()));
    } catch (const std::exception& error) {
      throw std::invalid_argument("step " + values.step + " (" + values.kind + "): " + error.what());
    }
    scratch_ = std::max(scratch_, ops_.back()->scratch);
  }
  scratch_ = (scratch_ + 63) / 64 * 64;
  group_at_.assign(ops_.size(), -1);
  for (size_t i = 0; i < recipe_.groups.size(); ++i) group_at_.at(size_t(recipe_.groups[i].at(0))) = int64_t(i);
}

Network::~Network() = default;

std::unique_ptr<Network::Workspace> Network::acquire() const {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!free_.empty()) {
      std::unique_ptr<Workspace> space = std::move(free_.back());
      free_.pop_back();
      return space;
    }
  }
  return std::make_unique<Workspace>(recipe_.arena, recipe_.slice_bytes.size());
}

void Network::release(std::unique_ptr<Workspace> space) const {
  std::lock_guard<std::mutex> lock(mutex_);
  free_.push_back(std::move(space));
}

void Network::run(int64_t begin, int64_t end, char* arena, char* const* addresses, int64_t count) const {
  if (count != int64_t(recipe_.slice_bytes.size())) throw std::invalid_argument("wrong number of addresses");
  begin = std::clamp<int64_t>(begin, 0, size());
  end = std::clamp<int64_t>(end, begin, size());
  if (recipe_.slices > 1 && arena == nullptr) return run_slices(begin, end, addresses);
  std::unique_ptr<Workspace> space = arena == nullptr ? acquire() : nullptr;
  constexpr int64_t kFew = 15;
  char* few[kFew + 1];
  std::vector<char*> many;
  char** bases = space ? space->bases.data() : few;
  if (!space && count > kFew) {
    many.resize(size_t(count) + 1);
    bases = many.data();
  }
  if (!space) bases[0] = arena;
  std::copy(addresses, addresses + count, bases + 1);
  run_ops(begin, end, bases, recipe_.threads);
  if (space) release(std::move(space));
}

namespace {

struct OpCall {
  const Op* op;
  char* const* bases;
  int64_t scratch;
};

void run_tasks(const void* context, int64_t begin, int64_t end) {
  const OpCall& call = *static_cast<const OpCall*>(context);
  call.op->run(Run{call.bases, thread_scratch(call.scratch)}, begin, end);
}

}  // namespace

void Network::run_ops(int64_t begin, int64_t end, char* const* bases, int64_t threads) const {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t group = group_at_[size_t(i)];
    if (group < 0) {
      const OpCall call{ops_[size_t(i)].get(), bases, scratch_};
      parallel(threads, call.op->tasks, 1, run_tasks, &call);
      continue;
    }
    struct Context {
      const Network* network;
      const std::vector<int64_t>* chains;
      char* const* bases;
    } context{this, &recipe_.groups[size_t(group)], bases};
    parallel(threads, int64_t(context.chains->size()) - 1, 1, [](const void* opaque, int64_t first, int64_t last) {
      const Context& c = *static_cast<const Context*>(opaque);
      for (int64_t chain = first; chain < last; ++chain)
        c.network->run_chain((*c.chains)[size_t(chain)], (*c.chains)[size_t(chain) + 1], c.bases);
    }, &context);
    i = context.chains->back() - 1;
  }
}

void Network::run_chain(int64_t begin, int64_t end, char* const* bases) const {
  char* const scratch = thread_scratch(scratch_ + recipe_.local);
  const size_t count = recipe_.slice_bytes.size() + 1;
  constexpr size_t kFew = 32;
  char* few[kFew + 1];
  std::vector<char*> many(count > kFew ? count + 1 : 0);
  char** const own = many.empty() ? few : many.data();
  std::copy(bases, bases + count, own);
  own[count] = scratch + scratch_;
  for (int64_t i = begin; i < end; ++i) {
    const Op& op = *ops_[size_t(i)];
    if (op.tasks > 0) op.run(Run{own, scratch}, 0, op.tasks);
  }
}

void Network::time(char* arena, char* const* addresses, int64_t count, int64_t* times) const {
  if (count != int64_t(recipe_.slice_bytes.size())) throw std::invalid_argument("wrong number of addresses");
  std::vector<char*> bases(addresses, addresses + count);
  bases.insert(bases.begin(), arena);
  using Clock = std::chrono::steady_clock;
  std::fill(times, times + size(), 0);
  for (int64_t i = 0, next = 0; i < size(); i = next) {
    const int64_t group = group_at_[size_t(i)];
    next = group < 0 ? i + 1 : recipe_.groups[size_t(group)].back();
    const Clock::time_point start = Clock::now();
    run_ops(i, next, bases.data(), recipe_.slices > 1 ? 1 : recipe_.threads);
    times[i] = std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start).count();
  }
}

void Network::run_slices(int64_t begin, int64_t end, char* const* addresses) const {
  struct Context {
    const Network* network;
    int64_t begin, end;
    char* const* addresses;
  } context{this, begin, end, addresses};
  parallel(recipe_.threads, recipe_.slices, 1, [](const void* opaque, int64_t first, int64_t last) {
    const Context& c = *static_cast<const Context*>(opaque);
    std::unique_ptr<Workspace> space = c.network->acquire();
    const std::vector<int64_t>& bytes = c.network->recipe_.slice_bytes;
    for (int64_t slice = first; slice < last; ++slice) {
      for (size_t i = 0; i < bytes.size(); ++i) space->bases[i + 1] = c.addresses[i] + slice * bytes[i];
      c.network->run_ops(c.begin, c.end, space->bases.data(), 1);
    }
    c.network->release(std::move(space));
  }, &context);
}

}  // namespace pk
