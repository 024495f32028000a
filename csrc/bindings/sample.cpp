// Bindings of fastpeft/sample.h.
#include "fastpeft/sample.h"

#include "bindings/bindings.h"
#include "cuda/sample_config.h"

namespace py = pybind11;

namespace fastpeft::bindings {

void bind_sample(py::module_& m) {
  m.def("sample_workspace_bytes", &cuda::sample_workspace_bytes, py::arg("rows"), py::arg("v"));
  m.def(
      "sample",
      [](bool on_cuda, Address logits, int dtype, int64_t rows, int64_t v, int64_t stride, Address temperature,
         Address top_p, Address penalty, Address top_k, Address least, Address seed, Address seen, Address stop_ids,
         int64_t stop_count, Address lengths, Address drawn, Address token, Address logprob, Address partial,
         const Context& context) {
        const SampleArgs args{at<void>(logits),
                              static_cast<DType>(dtype),
                              rows,
                              v,
                              stride,
                              at<float>(temperature),
                              at<float>(top_p),
                              at<float>(penalty),
                              at<int32_t>(top_k),
                              at<int32_t>(least),
                              at<int64_t>(seed),
                              at<uint8_t>(seen),
                              at<int64_t>(stop_ids),
                              stop_count,
                              at<int32_t>(lengths),
                              at<int64_t>(drawn),
                              at<int64_t>(token),
                              at<float>(logprob),
                              at<void>(partial)};
        run(on_cuda, cpu::sample, cuda::sample, args, context);
      },
      py::arg("on_cuda"), py::arg("logits"), py::arg("dtype"), py::arg("rows"), py::arg("v"), py::arg("stride"),
      py::arg("temperature"), py::arg("top_p"), py::arg("penalty"), py::arg("top_k"), py::arg("least"), py::arg("seed"),
      py::arg("seen"), py::arg("stop_ids"), py::arg("stop_count"), py::arg("lengths"), py::arg("drawn"),
      py::arg("token"), py::arg("logprob"), py::arg("partial"), py::arg("context"));
}

}  // namespace fastpeft::bindings
