// Many callers of csrc/cpu/pool.cpp at once; run under the thread sanitizer by tests/unit/test_cpu_threads.py.
#include "pool.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

[[noreturn]] void fail(const char* message) {
  std::fprintf(stderr, "%s\n", message);
  std::exit(1);
}

// Tasks write to plain memory, each to its own, that the caller reads afterwards: it must be visible to it.
void sums(int64_t threads, int64_t tasks, int64_t grain) {
  std::vector<int64_t> done(static_cast<size_t>(tasks), 0);
  pk::parallel(threads, tasks, grain, [](const void* context, int64_t begin, int64_t end) {
    int64_t* const all = static_cast<int64_t*>(const_cast<void*>(context));
    char* const scratch = pk::thread_scratch(64 + 64 * (begin % 7));
    std::memset(scratch, int(begin), 64);
    for (int64_t i = begin; i < end; ++i) all[i] += i + 1;
    if (scratch[63] != char(begin)) fail("scratch is shared");
  }, done.data());
  for (int64_t i = 0; i < tasks; ++i)
    if (done[size_t(i)] != i + 1) fail("a task was not done once");
}

// An exception of any task reaches its own caller, after all helpers have left.
void throws(int64_t threads, int64_t tasks, int64_t bad) {
  struct Context {
    int64_t bad;
    std::atomic<int64_t> running{0};
  } context;
  context.bad = bad;
  bool caught = false;
  try {
    pk::parallel(threads, tasks, 1, [](const void* opaque, int64_t begin, int64_t) {
      Context& c = *static_cast<Context*>(const_cast<void*>(opaque));
      c.running.fetch_add(1);
      std::this_thread::yield();
      c.running.fetch_sub(1);
      if (begin == c.bad) throw std::runtime_error("task " + std::to_string(begin));
    }, &context);
  } catch (const std::runtime_error& error) {
    caught = error.what() == "task " + std::to_string(bad);
  }
  if (!caught) fail("the exception is lost");
  if (context.running.load() != 0) fail("a helper is still at work");
}

void caller(int number, int rounds) {
  for (int i = 0; i < rounds; ++i) {
    sums(1 + (number + i) % 4, 1 + (i * 13 + number) % 97, 1 + i % 3);
    if (i % 5 == 0) throws(2 + i % 3, 12, (i + number) % 12);
    if (i % 50 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));      // helpers fall asleep
  }
}

}  // namespace

int main() {
  sums(4, 100, 1);
  std::vector<std::thread> callers;
  for (int i = 0; i < 20; ++i) callers.emplace_back(caller, i, 150);      // more than the pool has places for
  for (std::thread& each : callers) each.join();
  std::puts("good");
  return 0;
}
