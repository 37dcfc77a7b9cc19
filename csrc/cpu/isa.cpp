// Which instruction set runs: kernel units are compiled once for each that the build has, and chosen here by CPUID.
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "engine.h"

#define PK_OP(name) Op* make_##name(const Fields&);
namespace pk {
#ifdef PK_X86
namespace avx512 {
#include "ops.def"
}
namespace avx2 {
#include "ops.def"
}
#endif
namespace portable {
#include "ops.def"
}
#undef PK_OP

namespace {

using Factory = Op* (*)(const Fields&);

struct Entry {
  const char* name;
  Factory factory;
};

#define PK_OP(name) {#name, make_##name},
#ifdef PK_X86
namespace entries512 {
using namespace avx512;
const Entry all[] = {
#include "ops.def"
};
}  // namespace entries512
namespace entries2 {
using namespace avx2;
const Entry all[] = {
#include "ops.def"
};
}  // namespace entries2
#endif
namespace entries_portable {
using namespace portable;
const Entry all[] = {
#include "ops.def"
};
}  // namespace entries_portable
#undef PK_OP

struct Isa {
  const char* name;
  int64_t lanes, panel;
  const Entry* entries;
  bool (*runs)();
};

const Isa kIsas[] = {
#ifdef PK_X86
    {"avx512", 16, 4, entries512::all, [] {
       return bool(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("fma"));
     }},
    {"avx2", 8, 2, entries2::all, [] {
       return bool(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"));
     }},
#endif
    {"portable", 4, 2, entries_portable::all, [] { return true; }},
};

constexpr size_t kOps = sizeof(entries_portable::all) / sizeof(Entry);

const Isa& isa_named(const std::string& name) {
  for (const Isa& isa : kIsas)
    if (name == isa.name && isa.runs()) return isa;
  throw std::invalid_argument("no instruction set " + name + " here");
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> found;
  for (const Isa& isa : kIsas)
    if (isa.runs()) found.emplace_back(isa.name);
  return found;
}

bool runs_bf16(const std::string& isa) {
#ifdef PK_X86
  if (isa_named(isa).entries == entries512::all) return __builtin_cpu_supports("avx512bf16");
#endif
  return false;
}

int64_t lanes(const std::string& isa) { return isa_named(isa).lanes; }
int64_t panel_vectors(const std::string& isa) { return isa_named(isa).panel; }

Op* make_op(const std::string& isa, const Fields& fields) {
  const std::string& kind = static_cast<const FieldValues*>(fields.impl)->kind;
  const Entry* entries = isa_named(isa).entries;
  for (size_t i = 0; i < kOps; ++i)
    if (kind == entries[i].name) return entries[i].factory(fields);
  throw std::invalid_argument("no such op");
}

}  // namespace pk
