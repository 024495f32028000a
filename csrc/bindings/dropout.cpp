// Bindings of fastpeft/dropout.h.
#include "fastpeft/dropout.h"

#include "bindings/bindings.h"

namespace py = pybind11;

namespace fastpeft::bindings {

void bind_dropout(py::module_& m) {
  m.def(
      "dropout",
      [](bool on_cuda, Address x, Address out, int dtype, int64_t rows, int64_t columns, double p, uint64_t seed,
         const Context& context) {
        const DropoutArgs args{at<void>(x), at<void>(out), static_cast<DType>(dtype), rows, columns, p, seed};
        run(on_cuda, cpu::dropout, cuda::dropout, args, context);
      },
      py::arg("on_cuda"), py::arg("x"), py::arg("out"), py::arg("dtype"), py::arg("rows"), py::arg("columns"),
      py::arg("p"), py::arg("seed"), py::arg("context"));
}

}  // namespace fastpeft::bindings
