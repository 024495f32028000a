// What the binding files share: pointers come in as integers, and a flag picks the backend.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "fastpeft/types.h"

namespace fastpeft::bindings {

using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Runs the CPU or the CUDA version of a function without the GIL.
template <typename Args>
void run(bool on_cuda, void (*on_cpu)(const Args&, const Context&), void (*on_gpu)(const Args&, const Context&),
         const Args& args, const Context& context) {
  pybind11::gil_scoped_release unlocked;
  (on_cuda ? on_gpu : on_cpu)(args, context);
}

void bind_nf4(pybind11::module_& m);
void bind_nf4_linear(pybind11::module_& m);
void bind_dropout(pybind11::module_& m);
void bind_adamw(pybind11::module_& m);

}  // namespace fastpeft::bindings
