// Bindings of fastpeft/glu.h.
#include "fastpeft/glu.h"

#include "bindings/bindings.h"

namespace py = pybind11;

namespace fastpeft::bindings {

void bind_glu(py::module_& m) {
  m.def(
      "glu",
      [](bool on_cuda, int64_t rows, int64_t width, int dtype, int kind, Address gate, int64_t gate_stride, Address up,
         int64_t up_stride, Address out, int64_t out_stride, const Context& context) {
        const GluShape shape{rows, width, static_cast<DType>(dtype), static_cast<GluKind>(kind)};
        const GluArgs args{shape, at<void>(gate), at<void>(up), at<void>(out), gate_stride, up_stride, out_stride};
        run(on_cuda, cpu::glu, cuda::glu, args, context);
      },
      py::arg("on_cuda"), py::arg("rows"), py::arg("width"), py::arg("dtype"), py::arg("kind"), py::arg("gate"),
      py::arg("gate_stride"), py::arg("up"), py::arg("up_stride"), py::arg("out"), py::arg("out_stride"),
      py::arg("context"));
  m.def(
      "glu_backward",
      [](bool on_cuda, int64_t rows, int64_t width, int dtype, int kind, Address dy, int64_t dy_stride, Address gate,
         int64_t gate_stride, Address up, int64_t up_stride, Address dgate, int64_t dgate_stride, Address dup,
         int64_t dup_stride, const Context& context) {
        const GluShape shape{rows, width, static_cast<DType>(dtype), static_cast<GluKind>(kind)};
        const GluBackwardArgs args{shape,           at<void>(dy),  at<void>(gate), at<void>(up),
                                   at<void>(dgate), at<void>(dup), dy_stride,      gate_stride,
                                   up_stride,       dgate_stride,  dup_stride};
        run(on_cuda, cpu::glu_backward, cuda::glu_backward, args, context);
      },
      py::arg("on_cuda"), py::arg("rows"), py::arg("width"), py::arg("dtype"), py::arg("kind"), py::arg("dy"),
      py::arg("dy_stride"), py::arg("gate"), py::arg("gate_stride"), py::arg("up"), py::arg("up_stride"),
      py::arg("dgate"), py::arg("dgate_stride"), py::arg("dup"), py::arg("dup_stride"), py::arg("context"));
}

}  // namespace fastpeft::bindings
