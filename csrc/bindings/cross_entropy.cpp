// Bindings of fastpeft/cross_entropy.h.
#include "fastpeft/cross_entropy.h"

#include "bindings/bindings.h"

namespace py = pybind11;

namespace fastpeft::bindings {

void bind_cross_entropy(py::module_& m) {
  py::class_<LogitRows>(m, "LogitRows")
      .def(py::init([](Address logits, int dtype, int64_t rows, int64_t v, int64_t stride, Address target,
                       int64_t ignore_index, double label_smoothing, double logit_scale, double softcap) {
             return LogitRows{
                 at<void>(logits), static_cast<DType>(dtype), rows,        v,      stride, at<int64_t>(target),
                 ignore_index,     label_smoothing,           logit_scale, softcap};
           }),
           py::arg("logits"), py::arg("dtype"), py::arg("rows"), py::arg("v"), py::arg("stride"), py::arg("target"),
           py::arg("ignore_index"), py::arg("label_smoothing"), py::arg("logit_scale"), py::arg("softcap"));
  m.def(
      "cross_entropy",
      [](bool on_cuda, const LogitRows& x, Address loss, Address lse, Address entropy, bool gradient, Address divisor,
         bool hold_rows, const Context& context) {
        const CrossEntropyArgs args{x,        at<void>(loss),    at<void>(lse), at<void>(entropy),
                                    gradient, at<void>(divisor), hold_rows};
        run(on_cuda, cpu::cross_entropy, cuda::cross_entropy, args, context);
      },
      py::arg("on_cuda"), py::arg("x"), py::arg("loss"), py::arg("lse"), py::arg("entropy"), py::arg("gradient"),
      py::arg("divisor"), py::arg("hold_rows"), py::arg("context"));
  m.def(
      "cross_entropy_backward",
      [](bool on_cuda, const LogitRows& x, Address lse, Address grad, const Context& context) {
        const CrossEntropyBackwardArgs args{x, at<void>(lse), at<void>(grad)};
        run(on_cuda, cpu::cross_entropy_backward, cuda::cross_entropy_backward, args, context);
      },
      py::arg("on_cuda"), py::arg("x"), py::arg("lse"), py::arg("grad"), py::arg("context"));
  m.def(
      "scale",
      [](bool on_cuda, Address x, int dtype, int64_t numel, Address factor, Address divisor, const Context& context) {
        const ScaleArgs args{at<void>(x), static_cast<DType>(dtype), numel, at<void>(factor), at<void>(divisor)};
        run(on_cuda, cpu::scale, cuda::scale, args, context);
      },
      py::arg("on_cuda"), py::arg("x"), py::arg("dtype"), py::arg("numel"), py::arg("factor"), py::arg("divisor"),
      py::arg("context"));
}

}  // namespace fastpeft::bindings
