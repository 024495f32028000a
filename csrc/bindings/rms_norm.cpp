// Bindings of fastpeft/rms_norm.h.
#include "fastpeft/rms_norm.h"

#include "bindings/bindings.h"
#include "cuda/rms_norm_config.h"

namespace py = pybind11;

namespace fastpeft::bindings {

void bind_rms_norm(py::module_& m) {
  m.def("rms_norm_partial_rows", &cuda::rms_norm_partial_rows, py::arg("rows"), py::arg("width"),
        py::arg("element_bytes"), py::arg("sms"));
  m.def(
      "rms_norm",
      [](bool on_cuda, int64_t rows, int64_t width, int dtype, int weight_dtype, double offset, bool cast_first,
         Address x, int64_t x_stride, Address residual, int64_t residual_stride, Address weight, double eps, Address y,
         Address h, Address rstd, const Context& context) {
        const RmsNormShape shape{rows,   width,     static_cast<DType>(dtype), static_cast<DType>(weight_dtype),
                                 offset, cast_first};
        const RmsNormArgs args{shape, at<void>(x), x_stride,    at<void>(residual), residual_stride, at<void>(weight),
                               eps,   at<void>(y), at<void>(h), at<void>(rstd)};
        run(on_cuda, cpu::rms_norm, cuda::rms_norm, args, context);
      },
      py::arg("on_cuda"), py::arg("rows"), py::arg("width"), py::arg("dtype"), py::arg("weight_dtype"),
      py::arg("offset"), py::arg("cast_first"), py::arg("x"), py::arg("x_stride"), py::arg("residual"),
      py::arg("residual_stride"), py::arg("weight"), py::arg("eps"), py::arg("y"), py::arg("h"), py::arg("rstd"),
      py::arg("context"));
  m.def(
      "rms_norm_backward",
      [](bool on_cuda, int64_t rows, int64_t width, int dtype, int weight_dtype, double offset, bool cast_first,
         Address dy, int64_t dy_stride, Address dh, int64_t dh_stride, Address h, int64_t h_stride, Address rstd,
         Address weight, Address dx, Address dweight, Address partials, int64_t partial_rows, const Context& context) {
        const RmsNormShape shape{rows,   width,     static_cast<DType>(dtype), static_cast<DType>(weight_dtype),
                                 offset, cast_first};
        const RmsNormBackwardArgs args{
            shape,       at<void>(dy),   dy_stride,        at<void>(dh), dh_stride,         at<void>(h),
            h_stride,    at<void>(rstd), at<void>(weight), at<void>(dx), at<void>(dweight), at<void>(partials),
            partial_rows};
        run(on_cuda, cpu::rms_norm_backward, cuda::rms_norm_backward, args, context);
      },
      py::arg("on_cuda"), py::arg("rows"), py::arg("width"), py::arg("dtype"), py::arg("weight_dtype"),
      py::arg("offset"), py::arg("cast_first"), py::arg("dy"), py::arg("dy_stride"), py::arg("dh"),
      py::arg("dh_stride"), py::arg("h"), py::arg("h_stride"), py::arg("rstd"), py::arg("weight"), py::arg("dx"),
      py::arg("dweight"), py::arg("partials"), py::arg("partial_rows"), py::arg("context"));
}

}  // namespace fastpeft::bindings
