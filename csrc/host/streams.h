// Streams of the host's machine: work runs at once, or is recorded while a graph is captured.
#pragma once

#include "cuda_on_host.h"

namespace pk::host {

struct Stream {
  bool capturing = false;
  std::vector<std::function<void()>> tape;
};

inline void enqueue(void* stream, std::function<void()> work) {
  auto* const to = static_cast<Stream*>(stream);
  if (to != nullptr && to->capturing)
    to->tape.push_back(std::move(work));
  else
    work();
}

}  // namespace pk::host
