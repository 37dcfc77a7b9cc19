// Threads that help whoever calls. One pool a process; the caller always works too, and can finish alone, so a busy
// machine slows a run down but never stops it (there is no barrier to wait at).
#pragma once

#include <cstdint>

namespace pk {

using TaskFn = void (*)(const void* context, int64_t begin, int64_t end);

// Calls fn on [0, tasks) in pieces of `grain`, on at most `threads` threads at once, this one included. Returns when
// all is done. May be called from many threads at a time; fn must not call parallel with more than one thread. Where fn
// throws, whoever it was for, the first exception is thrown here, and pieces that had not begun are left out.
void parallel(int64_t threads, int64_t tasks, int64_t grain, TaskFn fn, const void* context);

// At least `bytes` of memory of the calling thread's own, 64-byte aligned, valid until its next call. Throws bad_alloc.
char* thread_scratch(int64_t bytes);

}  // namespace pk
