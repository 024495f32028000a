// Bindings of fastpeft/nf4_linear.h, and of the choice between its kernels.
#include "fastpeft/nf4_linear.h"

#include "bindings/bindings.h"
#include "cuda/nf4_linear_config.h"

namespace py = pybind11;

namespace fastpeft::bindings {

void bind_nf4_linear(py::module_& m) {
  m.def(
      "nf4_linear_plan",
      [](int64_t rows, int64_t n, int64_t k, int64_t block_size, int dtype, bool aligned, int architecture, int sms,
         int smem_bytes) {
        const cuda::NF4LinearPlan plan = cuda::nf4_linear_plan(rows, n, k, block_size, static_cast<DType>(dtype),
                                                               aligned, {architecture, sms, smem_bytes});
        return py::make_tuple(plan.decode, plan.reason);
      },
      py::arg("m"), py::arg("n"), py::arg("k"), py::arg("block_size"), py::arg("dtype"), py::arg("aligned"),
      py::arg("architecture"), py::arg("sms"), py::arg("smem_bytes"));
  m.def(
      "nf4_linear",
      [](Address x, Address codes, Address absmax, Address nested_absmax, Address nested_map, Address offset,
         int64_t block_size, Address bias, Address y, int dtype, int64_t rows, int64_t n, int64_t k,
         const Context& context) {
        const NF4View view = nf4_view(codes, absmax, nested_absmax, nested_map, offset, n * k, block_size);
        const NF4LinearArgs args{view, at<void>(x), at<void>(bias), at<void>(y), static_cast<DType>(dtype), rows, n, k};
        py::gil_scoped_release unlocked;
        cuda::nf4_linear(args, context);
      },
      py::arg("x"), py::arg("codes"), py::arg("absmax"), py::arg("nested_absmax"), py::arg("nested_map"),
      py::arg("offset"), py::arg("block_size"), py::arg("bias"), py::arg("y"), py::arg("dtype"), py::arg("m"),
      py::arg("n"), py::arg("k"), py::arg("context"));
}

}  // namespace fastpeft::bindings
