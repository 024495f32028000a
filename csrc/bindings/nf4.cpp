// Bindings of fastpeft/nf4.h.
#include "fastpeft/nf4.h"

#include "bindings/bindings.h"
#include "common/nf4_levels.h"

namespace py = pybind11;

namespace fastpeft::bindings {

void bind_nf4(py::module_& m) {
  m.def("nf4_levels", [] { return std::vector<float>(std::begin(kNF4Levels), std::end(kNF4Levels)); });
  m.def(
      "nf4_quantize",
      [](bool on_cuda, Address w, int dtype, int64_t numel, int64_t block_size, Address codes, Address absmax,
         const Context& context) {
        const NF4QuantizeArgs args{at<void>(w), static_cast<DType>(dtype), numel,
                                   block_size,  at<uint8_t>(codes),        at<float>(absmax)};
        run(on_cuda, cpu::nf4_quantize, cuda::nf4_quantize, args, context);
      },
      py::arg("on_cuda"), py::arg("w"), py::arg("dtype"), py::arg("numel"), py::arg("block_size"), py::arg("codes"),
      py::arg("absmax"), py::arg("context"));
  m.def(
      "nf4_quantize_scales",
      [](bool on_cuda, Address absmax, Address offset, Address nested_map, int64_t blocks, Address quantized,
         Address nested_absmax, const Context& context) {
        const NF4QuantizeScalesArgs args{at<float>(absmax),      at<float>(offset),       at<float>(nested_map), blocks,
                                         at<uint8_t>(quantized), at<float>(nested_absmax)};
        run(on_cuda, cpu::nf4_quantize_scales, cuda::nf4_quantize_scales, args, context);
      },
      py::arg("on_cuda"), py::arg("absmax"), py::arg("offset"), py::arg("nested_map"), py::arg("blocks"),
      py::arg("quantized"), py::arg("nested_absmax"), py::arg("context"));
  m.def(
      "nf4_dequantize",
      [](bool on_cuda, Address codes, Address absmax, Address nested_absmax, Address nested_map, Address offset,
         int64_t numel, int64_t block_size, int64_t begin, int64_t end, Address out, int dtype,
         const Context& context) {
        const NF4View view = nf4_view(codes, absmax, nested_absmax, nested_map, offset, numel, block_size);
        const NF4DequantizeArgs args{view, begin, end, at<void>(out), static_cast<DType>(dtype)};
        run(on_cuda, cpu::nf4_dequantize, cuda::nf4_dequantize, args, context);
      },
      py::arg("on_cuda"), py::arg("codes"), py::arg("absmax"), py::arg("nested_absmax"), py::arg("nested_map"),
      py::arg("offset"), py::arg("numel"), py::arg("block_size"), py::arg("begin"), py::arg("end"), py::arg("out"),
      py::arg("dtype"), py::arg("context"));
}

}  // namespace fastpeft::bindings
