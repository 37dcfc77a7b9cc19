// Runs a saved network on files of raw numbers, without Python and without torch:
//
//   run_network FOLDER DEVICE BATCH INPUT... OUTPUT...
//
// FOLDER is what Lowered.save wrote (or "program" inside what Result.save wrote), DEVICE cpu or cuda. Every input and
// output is a file of its tensor's bytes, as numpy's tofile writes them. With no files, says what the network takes.
#include <prunekern.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

namespace {

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "run_network: %s\n", what.c_str());
  std::exit(1);
}

int64_t bytes_of(const std::string& dtype) {
  if (dtype == "float64" || dtype == "int64") return 8;
  if (dtype == "float32" || dtype == "int32") return 4;
  return dtype == "float16" || dtype == "bfloat16" || dtype == "int16" ? 2 : 1;
}

// Prints a tensor's dtype and shape; gives its bytes.
int64_t describe(const prunekern_network* network, int output, int index) {
  int64_t shape[16] = {};
  const int rank = prunekern_shape(network, output, index, shape, 16);
  const std::string dtype = prunekern_dtype(network, output, index);
  int64_t bytes = bytes_of(dtype);
  std::printf("%s %d: %s [", output ? "output" : "input", index, dtype.c_str());
  for (int i = 0; i < rank; ++i) {
    std::printf(i ? ", %lld" : "%lld", static_cast<long long>(shape[i]));
    bytes *= shape[i];
  }
  std::printf("]\n");
  return bytes;
}

}  // namespace

int main(int count, char** words) {
  if (count < 4) fail("usage: run_network FOLDER DEVICE BATCH INPUT... OUTPUT...");
  const std::unique_ptr<prunekern_network, void (*)(prunekern_network*)> network(
      prunekern_open(words[1], words[2], std::atoll(words[3]), 1), prunekern_close);
  if (!network) fail(prunekern_error());
  const int inputs = prunekern_input_count(network.get()), outputs = prunekern_output_count(network.get());
  std::vector<std::vector<char>> given, made;
  const bool runs = count == 4 + inputs + outputs;
  for (int i = 0; i < inputs; ++i) {
    const int64_t bytes = describe(network.get(), 0, i);
    if (!runs) continue;
    std::ifstream file(words[4 + i], std::ios::binary);
    given.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    if (int64_t(given.back().size()) != bytes)
      fail(std::string(words[4 + i]) + " has " + std::to_string(given.back().size()) + " bytes, not " + std::to_string(bytes));
  }
  for (int i = 0; i < outputs; ++i) made.emplace_back(size_t(describe(network.get(), 1, i)));
  if (!runs) return count == 4 ? 0 : (fail("give one file for each input and each output"), 1);

  std::vector<const void*> from;
  std::vector<void*> to;
  for (const auto& each : given) from.push_back(each.data());
  for (auto& each : made) to.push_back(each.data());
  const auto start = std::chrono::steady_clock::now();
  if (prunekern_run_host(network.get(), from.data(), to.data())) fail(prunekern_error());
  const std::chrono::duration<double, std::micro> time = std::chrono::steady_clock::now() - start;
  std::printf("one call: %.1f us\n", time.count());
  for (int i = 0; i < outputs; ++i) {
    std::ofstream file(words[4 + inputs + i], std::ios::binary);
    file.write(made[size_t(i)].data(), std::streamsize(made[size_t(i)].size()));
    if (!file) fail(std::string(words[4 + inputs + i]) + " cannot be written");
  }
  return 0;
}
