// The module fastpeft._C: build information, errors, and the functions of the other binding files.
#include "bindings/bindings.h"
#include "common/error.h"
#include "cpu/features.h"
#include "fastpeft/capture.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = FASTPEFT_VERSION;
#ifdef FASTPEFT_WITH_CUDA
  info["cuda"] = true;
  info["cuda_version"] = FASTPEFT_CUDA_VERSION;
  info["cuda_archs"] = py::str(FASTPEFT_CUDA_ARCHS).attr("split")(",");
#else
  info["cuda"] = false;
  info["cuda_version"] = py::none();
  info["cuda_archs"] = py::list();
#endif
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  info["cpu_features"] = py::cast(fastpeft::cpu::feature_names());
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastpeft's native core: pointers come in as integers; nothing here knows torch.";
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const fastpeft::CudaError& failure) {
      const py::object type = py::module_::import("fastpeft.errors").attr("CudaError");
      PyErr_SetString(type.ptr(), failure.what());
    }
  });
  py::class_<fastpeft::Context>(m, "Context")
      .def(py::init<std::uintptr_t, int>(), py::arg("stream") = 0, py::arg("threads") = 1);
  m.def("build_info", &build_info);
  m.def("capture_id", &fastpeft::cuda::capture_id, py::arg("context"));
  fastpeft::bindings::bind_nf4(m);
  fastpeft::bindings::bind_nf4_linear(m);
  fastpeft::bindings::bind_nf4_experts(m);
  fastpeft::bindings::bind_lora(m);
  fastpeft::bindings::bind_lora_few(m);
  fastpeft::bindings::bind_dropout(m);
  fastpeft::bindings::bind_arena(m);
  fastpeft::bindings::bind_adamw(m);
  fastpeft::bindings::bind_rms_norm(m);
  fastpeft::bindings::bind_rope(m);
  fastpeft::bindings::bind_experts(m);
  fastpeft::bindings::bind_glu(m);
  fastpeft::bindings::bind_cross_entropy(m);
  fastpeft::bindings::bind_paged_attention(m);
  fastpeft::bindings::bind_sample(m);
}
