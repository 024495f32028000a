// Bindings of fastpeft/rope.h.
#include "fastpeft/rope.h"

#include "bindings/bindings.h"

namespace py = pybind11;

namespace fastpeft::bindings {
namespace {

using Strides = std::tuple<int64_t, int64_t, int64_t>;  // of batch, head and token

RopeTensor rope_tensor(Address in, Address out, int64_t heads, const Strides& of_in, const Strides& of_out) {
  return {at<void>(in),        at<void>(out),       heads,
          std::get<0>(of_in),  std::get<1>(of_in),  std::get<2>(of_in),
          std::get<0>(of_out), std::get<1>(of_out), std::get<2>(of_out)};
}

}  // namespace

void bind_rope(py::module_& m) {
  m.def(
      "rope",
      [](bool on_cuda, Address q, Address q_out, int64_t q_heads, const Strides& q_strides,
         const Strides& q_out_strides, Address k, Address k_out, int64_t k_heads, const Strides& k_strides,
         const Strides& k_out_strides, Address cos, int64_t cos_batch_stride, int64_t cos_token_stride, Address sin,
         int64_t sin_batch_stride, int64_t sin_token_stride, int dtype, int angle_dtype, int64_t batch, int64_t tokens,
         int64_t dim, int64_t rotary, bool backward, const Context& context) {
        const RopeArgs args{rope_tensor(q, q_out, q_heads, q_strides, q_out_strides),
                            rope_tensor(k, k_out, k_heads, k_strides, k_out_strides),
                            {at<void>(cos), cos_batch_stride, cos_token_stride},
                            {at<void>(sin), sin_batch_stride, sin_token_stride},
                            static_cast<DType>(dtype),
                            static_cast<DType>(angle_dtype),
                            batch,
                            tokens,
                            dim,
                            rotary,
                            backward};
        run(on_cuda, cpu::rope, cuda::rope, args, context);
      },
      py::arg("on_cuda"), py::arg("q"), py::arg("q_out"), py::arg("q_heads"), py::arg("q_strides"),
      py::arg("q_out_strides"), py::arg("k"), py::arg("k_out"), py::arg("k_heads"), py::arg("k_strides"),
      py::arg("k_out_strides"), py::arg("cos"), py::arg("cos_batch_stride"), py::arg("cos_token_stride"),
      py::arg("sin"), py::arg("sin_batch_stride"), py::arg("sin_token_stride"), py::arg("dtype"),
      py::arg("angle_dtype"), py::arg("batch"), py::arg("tokens"), py::arg("dim"), py::arg("rotary"),
      py::arg("backward"), py::arg("context"));
}

}  // namespace fastpeft::bindings
