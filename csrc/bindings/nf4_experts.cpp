// Bindings of fastpeft/nf4_experts.h, and of the choice whether its kernel takes a call.
#include "fastpeft/nf4_experts.h"

#include "bindings/bindings.h"
#include "cuda/nf4_experts_config.h"

namespace py = pybind11;

namespace fastpeft::bindings {

void bind_nf4_experts(py::module_& m) {
  m.def(
      "nf4_experts_plan",
      [](int64_t rows, int64_t experts, int64_t n, int64_t k, bool transposed, int64_t block_size, int dtype,
         bool aligned, int architecture, int sms, int smem_bytes, bool wgmma) {
        const cuda::NF4ExpertsPlan plan =
            cuda::nf4_experts_plan({rows, experts, n, k, transposed, block_size, static_cast<DType>(dtype), aligned},
                                   {architecture, sms, smem_bytes, wgmma});
        return py::make_tuple(plan.fused, plan.workspace_bytes, plan.reason);
      },
      py::arg("m"), py::arg("experts"), py::arg("n"), py::arg("k"), py::arg("transposed"), py::arg("block_size"),
      py::arg("dtype"), py::arg("aligned"), py::arg("architecture"), py::arg("sms"), py::arg("smem_bytes"),
      py::arg("wgmma"));
  m.def(
      "nf4_linear_experts",
      [](bool transposed, Address x, Address ends, Address codes, Address absmax, Address nested_absmax,
         Address nested_map, Address offset, int64_t block_size, Address y, int dtype, int64_t rows, int64_t experts,
         int64_t n, int64_t k, Address workspace, int64_t workspace_bytes, const Context& context) {
        const NF4ExpertsArgs args{
            nf4_view(codes, absmax, nested_absmax, nested_map, offset, experts * n * k, block_size),
            transposed,
            at<void>(x),
            at<int>(ends),
            at<void>(y),
            static_cast<DType>(dtype),
            rows,
            experts,
            n,
            k,
            at<void>(workspace),
            workspace_bytes};
        py::gil_scoped_release unlocked;
        cuda::nf4_linear_experts(args, context);
      },
      py::arg("transposed"), py::arg("x"), py::arg("ends"), py::arg("codes"), py::arg("absmax"),
      py::arg("nested_absmax"), py::arg("nested_map"), py::arg("offset"), py::arg("block_size"), py::arg("y"),
      py::arg("dtype"), py::arg("m"), py::arg("experts"), py::arg("n"), py::arg("k"), py::arg("workspace"),
      py::arg("workspace_bytes"), py::arg("context"));
}

}  // namespace fastpeft::bindings
