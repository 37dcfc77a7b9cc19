#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <thread>

#include <pthread.h>
#ifdef __linux__
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pk {
namespace {

struct Job {
  TaskFn fn;
  const void* context;
  int64_t tasks, grain;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;      // of who failed first; read once all helpers have left

  // Nothing may leave a helper's thread (that would end the process), nor the caller's while helpers see this job.
  void work() noexcept {
    try {
      for (;;) {
        const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
        if (begin >= tasks) return;
        fn(context, begin, begin + grain < tasks ? begin + grain : tasks);
      }
    } catch (...) {
      next.store(tasks, std::memory_order_relaxed);      // what has not begun is not worth beginning
      if (!failed.exchange(true)) error = std::current_exception();
    }
  }
};

// A place where one caller at a time offers its job. A helper announces itself in `helpers` before it looks at `job`;
// the caller takes the job away and then waits until no helper is announced.
struct alignas(64) Slot {
  std::atomic<bool> taken{false};
  std::atomic<Job*> job{nullptr};
  std::atomic<int64_t> helpers{0}, wanted{0};
  std::atomic<int> cpu{-1};      // that the caller is on
};

int current_cpu() {
#ifdef __linux__
  return sched_getcpu();
#else
  return -1;
#endif
}

thread_local bool t_aside = false;      // kept off a core

// Leaves a core to the caller. A helper that wakes up is often put beside who woke it, even where another core is idle,
// and then both take turns on one for as long as the system lets them. Of the cores that the process may use (its main
// thread's), all but that one; false where there is no other.
bool step_aside(int cpu) {
#ifdef __linux__
  cpu_set_t cores;
  if (sched_getaffinity(getpid(), sizeof cores, &cores) != 0) return true;
  CPU_CLR(size_t(cpu), &cores);
  if (CPU_COUNT(&cores) == 0) return false;
  t_aside = sched_setaffinity(0, sizeof cores, &cores) == 0;
#else
  (void)cpu;
#endif
  return true;
}

// The same from the caller's side, for a helper that sleeps and is about to be woken.
void keep_off(int cpu, const std::atomic<int>* helpers, int64_t count) {
#ifdef __linux__
  cpu_set_t cores;
  if (cpu < 0 || sched_getaffinity(getpid(), sizeof cores, &cores) != 0) return;
  CPU_CLR(size_t(cpu), &cores);
  if (CPU_COUNT(&cores) == 0) return;
  for (int64_t i = 0; i < count; ++i) {
    const int thread = helpers[i].load(std::memory_order_relaxed);
    if (thread > 0) sched_setaffinity(thread, sizeof cores, &cores);
  }
#else
  (void)cpu; (void)helpers; (void)count;
#endif
}

// All cores again, before a sleep: the next caller may be on any of them.
void step_back() {
#ifdef __linux__
  cpu_set_t cores;
  if (t_aside && sched_getaffinity(getpid(), sizeof cores, &cores) == 0) sched_setaffinity(0, sizeof cores, &cores);
#endif
  t_aside = false;
}

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

constexpr int kSlots = 16;
constexpr int64_t kPlaced = 8;      // helpers that a caller keeps off its core; with more, some core is idle anyway
constexpr auto kSpin = std::chrono::microseconds(80);    // longer than the gap between two steps of a network

class Pool {
 public:
  Pool() : cores_(int64_t(std::thread::hardware_concurrency())) {
    if (cores_ < 1) cores_ = 1;
  }

  void run(int64_t threads, Job& job) {
    Slot* slot = grow(threads - 1) ? claim() : nullptr;
    if (slot == nullptr) {
      job.work();
      return;
    }
    slot->wanted.store(threads - 1, std::memory_order_relaxed);
    slot->cpu.store(current_cpu(), std::memory_order_relaxed);
    slot->job.store(&job);
    wake();
    job.work();
    slot->job.store(nullptr);
    for (int spins = 0; slot->helpers.load() != 0; ++spins) {
      if (spins < 2000) relax();
      else std::this_thread::yield();
    }
    slot->taken.store(false, std::memory_order_release);
  }

 private:
  // Whether there are any workers, after making sure of up to `count`.
  bool grow(int64_t count) {
    if (workers_.load(std::memory_order_acquire) >= count) return true;
    std::lock_guard<std::mutex> lock(mutex_);
    while (workers_.load() < count) {
      try {
        const int64_t number = workers_.load();
        std::thread([this, number] {
#ifdef __linux__
          if (number < kPlaced) threads_[number].store(int(syscall(SYS_gettid)));
#endif
          help();
        }).detach();
      } catch (const std::exception&) {
        break;      // the system gives no more threads
      }
      workers_.fetch_add(1);
    }
    return workers_.load() > 0;
  }

  Slot* claim() {
    for (Slot& slot : slots_) {
      if (!slot.taken.load(std::memory_order_relaxed) && !slot.taken.exchange(true)) return &slot;
    }
    return nullptr;
  }

  void wake() {
    epoch_.fetch_add(1);
    if (sleepers_.load() == 0) return;
    keep_off(current_cpu(), threads_, workers_.load() < kPlaced ? workers_.load() : kPlaced);
    { std::lock_guard<std::mutex> lock(mutex_); }
    condition_.notify_all();
  }

  bool look() {
    bool worked = false;
    for (Slot& slot : slots_) {
      if (slot.job.load(std::memory_order_relaxed) == nullptr) continue;
      const int64_t before = slot.helpers.fetch_add(1);
      Job* const job = slot.job.load();      // `wanted` is this job's only when it is read after it
      const int cpu = slot.cpu.load(std::memory_order_relaxed);
      if (job != nullptr && before < slot.wanted.load(std::memory_order_relaxed) &&
          (cpu < 0 || cpu != current_cpu() || step_aside(cpu))) {
        job->work();
        worked = true;
      }
      slot.helpers.fetch_sub(1);
    }
    return worked;
  }

  void help() {
    using Clock = std::chrono::steady_clock;
    Clock::time_point idle_since = Clock::now();
    for (;;) {
      const uint64_t seen = epoch_.load();
      if (look()) {
        idle_since = Clock::now();
        continue;
      }
      // More threads than cores would only take the cores from each other.
      if (workers_.load(std::memory_order_relaxed) < cores_ && Clock::now() - idle_since < kSpin) {
        for (int i = 0; i < 16; ++i) relax();
        continue;
      }
      step_back();
      std::unique_lock<std::mutex> lock(mutex_);
      sleepers_.fetch_add(1);
      condition_.wait(lock, [&] { return epoch_.load() != seen; });
      sleepers_.fetch_sub(1);
      idle_since = Clock::now();
    }
  }

  Slot slots_[kSlots];
  std::atomic<uint64_t> epoch_{0};
  std::atomic<int64_t> workers_{0}, sleepers_{0};
  std::atomic<int> threads_[kPlaced] = {};      // of the first helpers, as the system numbers them
  int64_t cores_;
  std::mutex mutex_;
  std::condition_variable condition_;
};

// Never destroyed: its threads may outlive main. After a fork the child has none of them, and gets a pool of its own.
Pool* g_pool = nullptr;

Pool& pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    g_pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] { g_pool = new Pool; });
  });
  return *g_pool;
}

struct Scratch {
  char* memory = nullptr;
  int64_t size = 0;
  ~Scratch() { std::free(memory); }
};

}  // namespace

void parallel(int64_t threads, int64_t tasks, int64_t grain, TaskFn fn, const void* context) {
  if (tasks <= 0) return;
  const int64_t pieces = (tasks + grain - 1) / grain;
  if (threads > pieces) threads = pieces;
  if (threads <= 1) {
    fn(context, 0, tasks);
    return;
  }
  Job job{fn, context, tasks, grain};
  pool().run(threads, job);
  if (job.error) std::rethrow_exception(job.error);
}

char* thread_scratch(int64_t bytes) {
  static thread_local Scratch scratch;
  if (scratch.size < bytes) {
    std::free(scratch.memory);
    scratch.size = (bytes + 4095) / 4096 * 4096;
    scratch.memory = static_cast<char*>(std::aligned_alloc(64, size_t(scratch.size)));
    if (scratch.memory == nullptr) {
      scratch.size = 0;
      throw std::bad_alloc();
    }
  }
  return scratch.memory;
}

}  // namespace pk
