// What the binding files share: pointers come in as integers, and a flag picks the backend.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "fastpeft/nf4.h"
#include "fastpeft/types.h"

namespace fastpeft::bindings {

using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

inline NF4View nf4_view(Address codes, Address absmax, Address nested_absmax, Address nested_map, Address offset,
                        int64_t numel, int64_t block_size) {
  return {
      at<uint8_t>(codes), at<void>(absmax), at<float>(nested_absmax), at<float>(nested_map), at<float>(offset), numel,
      block_size};
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
void bind_nf4_experts(pybind11::module_& m);
void bind_lora(pybind11::module_& m);
void bind_lora_few(pybind11::module_& m);
void bind_dropout(pybind11::module_& m);
void bind_adamw(pybind11::module_& m);
void bind_arena(pybind11::module_& m);
void bind_rms_norm(pybind11::module_& m);
void bind_rope(pybind11::module_& m);
void bind_experts(pybind11::module_& m);
void bind_glu(pybind11::module_& m);
void bind_cross_entropy(pybind11::module_& m);
void bind_paged_attention(pybind11::module_& m);
void bind_sample(pybind11::module_& m);

}  // namespace fastpeft::bindings
