// The extension's one door: every operator's schema, and the empty Python module whose import registers them.
// Kernels live in csrc/cpu/ (and csrc/cuda/), one operator a file, each with its own STABLE_TORCH_LIBRARY_IMPL.
//
// Only Python's limited API and torch's stable ABI are used: one binary serves every CPython >= 3.11 and every
// torch >= 2.11.
#include <Python.h>

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(prunekern, m) {
  m.def("im2col_nhwc(Tensor x, int[] kernel, int[] stride, int[] dilation) -> Tensor");
}

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", "Registers torch.ops.prunekern.", -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
