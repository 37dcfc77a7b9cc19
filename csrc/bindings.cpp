// The extension's one door: the schemas of torch's operators, and the Python module through which networks run.
// Kernels live in csrc/cpu/ (and csrc/cuda/); torch operators have a STABLE_TORCH_LIBRARY_IMPL each.
//
// Only Python's limited API and torch's stable ABI are used: one binary serves every CPython >= 3.11 and every
// torch >= 2.11. Networks are run by a plain method of the module: measured, a torch operator takes ten times as long
// to get here.
#include <Python.h>

#include <torch/csrc/stable/library.h>

#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/engine.h"

STABLE_TORCH_LIBRARY(prunekern, m) {
  m.def("im2col_nhwc(Tensor x, int[] kernel, int[] stride, int[] dilation) -> Tensor");
}

namespace {

constexpr const char* kCapsule = "prunekern._C.Network";

struct PythonError {};      // Python knows already

void check(bool good) {
  if (!good) throw PythonError();
}

int64_t integer(PyObject* object) {
  const long long value = PyLong_AsLongLong(object);
  check(value != -1 || PyErr_Occurred() == nullptr);
  return int64_t(value);
}

std::string text(PyObject* object) {
  Py_ssize_t size = 0;
  const char* data = PyUnicode_AsUTF8AndSize(object, &size);
  check(data != nullptr);
  return std::string(data, size_t(size));
}

pk::Value value(PyObject* object) {
  pk::Value result;
  if (PyFloat_Check(object)) {
    result.number = PyFloat_AsDouble(object);
  } else if (PyLong_Check(object)) {
    result.integers.push_back(integer(object));
    result.number = double(result.integers[0]);
  } else if (PyList_Check(object)) {
    result.is_list = true;
    for (Py_ssize_t i = 0; i < PyList_Size(object); ++i) result.integers.push_back(integer(PyList_GetItem(object, i)));
  } else {
    throw std::invalid_argument("a field is neither an int, a float nor a list of ints");
  }
  return result;
}

PyObject* item(PyObject* dict, const char* name) {
  PyObject* found = PyDict_Check(dict) ? PyDict_GetItemString(dict, name) : nullptr;
  if (found == nullptr) throw std::invalid_argument(std::string("the recipe has no ") + name);
  return found;
}

pk::FieldValues fields(PyObject* dict) {
  pk::FieldValues result;
  result.kind = text(item(dict, "op"));
  result.step = text(item(dict, "step"));
  Py_ssize_t position = 0;
  PyObject *key = nullptr, *field = nullptr;
  PyObject* const all = item(dict, "fields");
  while (PyDict_Next(all, &position, &key, &field)) result.values.emplace(text(key), value(field));
  return result;
}

pk::Recipe recipe(PyObject* dict) {
  pk::Recipe result;
  result.isa = text(item(dict, "isa"));
  result.threads = integer(item(dict, "threads"));
  result.arena = integer(item(dict, "arena"));
  result.slices = integer(item(dict, "slices"));
  result.slice_bytes = value(item(dict, "slice_bytes")).integers;
  result.local = integer(item(dict, "local"));
  PyObject* const groups = item(dict, "groups");
  for (Py_ssize_t i = 0; i < PyList_Size(groups); ++i)
    result.groups.push_back(value(PyList_GetItem(groups, i)).integers);
  PyObject* const ops = item(dict, "ops");
  for (Py_ssize_t i = 0; i < PyList_Size(ops); ++i) result.ops.push_back(fields(PyList_GetItem(ops, i)));
  return result;
}

template <typename F>
PyObject* guarded(F&& body) {
  try {
    return body();
  } catch (const PythonError&) {
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  }
  return nullptr;
}

pk::Network* network(PyObject* capsule) {
  void* pointer = PyCapsule_GetPointer(capsule, kCapsule);
  check(pointer != nullptr);
  return static_cast<pk::Network*>(pointer);
}

// The capsule owns the network, and what its addresses point into ("keep"): a call that runs while all else forgets the
// network still has both.
PyObject* build(PyObject*, PyObject* dict) {
  return guarded([&] {
    auto made = std::make_unique<pk::Network>(recipe(dict));
    PyObject* const keep = item(dict, "keep");
    PyObject* capsule = PyCapsule_New(made.get(), kCapsule, [](PyObject* self) {
      delete static_cast<pk::Network*>(PyCapsule_GetPointer(self, kCapsule));
      Py_XDECREF(static_cast<PyObject*>(PyCapsule_GetContext(self)));
    });
    if (capsule != nullptr) {
      made.release();
      Py_INCREF(keep);
      PyCapsule_SetContext(capsule, keep);
    }
    return capsule;
  });
}

// Runs f without the GIL.
template <typename F>
void unlocked(F&& f) {
  PyThreadState* const state = PyEval_SaveThread();
  try {
    f();
  } catch (...) {
    PyEval_RestoreThread(state);
    throw;
  }
  PyEval_RestoreThread(state);
}

// run(network, begin, end, arena, *addresses)
PyObject* run(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return guarded([&]() -> PyObject* {
    if (count < 4) throw std::invalid_argument("run takes a network, a range of ops, an arena and addresses");
    const pk::Network* const self = network(args[0]);
    const int64_t begin = integer(args[1]), end = integer(args[2]);
    char* const arena = reinterpret_cast<char*>(integer(args[3]));
    const int64_t given = count - 4;
    constexpr int64_t kFew = 16;
    char* few[kFew];
    std::unique_ptr<char*[]> many(given > kFew ? new char*[size_t(given)] : nullptr);
    char** const addresses = many ? many.get() : few;
    for (int64_t i = 0; i < given; ++i) addresses[i] = reinterpret_cast<char*>(integer(args[4 + i]));
    unlocked([&] { self->run(begin, end, arena, addresses, given); });
    Py_RETURN_NONE;
  });
}

// times(network, arena, *addresses) -> nanoseconds of every op
PyObject* times(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return guarded([&]() -> PyObject* {
    if (count < 2) throw std::invalid_argument("times takes a network, an arena and addresses");
    const pk::Network* const self = network(args[0]);
    char* const arena = reinterpret_cast<char*>(integer(args[1]));
    std::vector<char*> addresses;
    for (Py_ssize_t i = 2; i < count; ++i) addresses.push_back(reinterpret_cast<char*>(integer(args[i])));
    std::vector<int64_t> found(size_t(self->size()));
    unlocked([&] { self->time(arena, addresses.data(), int64_t(addresses.size()), found.data()); });
    PyObject* list = PyList_New(Py_ssize_t(found.size()));
    check(list != nullptr);
    for (size_t i = 0; i < found.size(); ++i) PyList_SetItem(list, Py_ssize_t(i), PyLong_FromLongLong(found[i]));
    return list;
  });
}

// How many ops a network has.
PyObject* size(PyObject*, PyObject* capsule) {
  return guarded([&] { return PyLong_FromLongLong(network(capsule)->size()); });
}

PyObject* instruction_sets(PyObject*, PyObject*) {
  return guarded([&]() -> PyObject* {
    PyObject* list = PyList_New(0);
    check(list != nullptr);
    for (const std::string& name : pk::instruction_sets()) {
      PyObject* word = PyUnicode_FromString(name.c_str());
      const bool good = word != nullptr && PyList_Append(list, word) == 0;
      Py_XDECREF(word);
      if (!good) {
        Py_DECREF(list);
        return nullptr;
      }
    }
    return list;
  });
}

PyObject* lanes(PyObject*, PyObject* isa) {
  return guarded([&] { return PyLong_FromLongLong(pk::lanes(text(isa))); });
}

PyObject* runs_bf16(PyObject*, PyObject* isa) {
  return guarded([&] { return PyBool_FromLong(pk::runs_bf16(text(isa))); });
}

PyObject* panel_vectors(PyObject*, PyObject* isa) {
  return guarded([&] { return PyLong_FromLongLong(pk::panel_vectors(text(isa))); });
}

// advise_huge(address, bytes)
PyObject* advise_huge(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return guarded([&]() -> PyObject* {
    if (count != 2) throw std::invalid_argument("advise_huge takes an address and a number of bytes");
    pk::advise_huge(reinterpret_cast<void*>(integer(args[0])), integer(args[1]));
    Py_RETURN_NONE;
  });
}

template <typename F>
PyCFunction method(F* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

}  // namespace

PyMODINIT_FUNC PyInit__C(void) {
  static PyMethodDef methods[] = {
      {"build", build, METH_O, "A network made from a recipe (backends/cpu/native.py)."},
      {"run", method(run), METH_FASTCALL, "run(network, begin, end, arena, *addresses)"},
      {"times", method(times), METH_FASTCALL, "times(network, arena, *addresses) -> nanoseconds of every op"},
      {"size", size, METH_O, "Number of ops of a network."},
      {"instruction_sets", instruction_sets, METH_NOARGS, "What this machine can run, best first."},
      {"lanes", lanes, METH_O, "Floats in a register of an instruction set."},
      {"runs_bf16", runs_bf16, METH_O, "Whether an instruction set multiplies bf16 numbers here."},
      {"panel_vectors", panel_vectors, METH_O, "Most registers in a panel of packed weights."},
      {"advise_huge", method(advise_huge), METH_FASTCALL, "advise_huge(address, bytes)"},
      {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", "The CPU engine; importing it also registers torch.ops.prunekern.", -1, methods,
      nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
