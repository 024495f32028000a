// Bindings of fastpeft/experts.h.
#include "fastpeft/experts.h"

#include "bindings/bindings.h"

namespace py = pybind11;

namespace fastpeft::bindings {
namespace {

PlacedRows placed_rows(Address place, int64_t tokens, int64_t top_k, int64_t width, int dtype) {
  return {at<int32_t>(place), tokens, top_k, width, static_cast<DType>(dtype)};
}

}  // namespace

void bind_experts(py::module_& m) {
  m.def(
      "experts_route",
      [](Address ids, int64_t count, int64_t experts, Address place, Address ends, const Context& context) {
        const ExpertsRouteArgs args{at<int64_t>(ids), count, experts, at<int32_t>(place), at<int32_t>(ends)};
        py::gil_scoped_release unlocked;
        cuda::experts_route(args, context);
      },
      py::arg("ids"), py::arg("count"), py::arg("experts"), py::arg("place"), py::arg("ends"), py::arg("context"));
  m.def(
      "experts_spread",
      [](Address x, Address weights, Address out, Address place, int64_t tokens, int64_t top_k, int64_t width,
         int dtype, const Context& context) {
        const ExpertsSpreadArgs args{placed_rows(place, tokens, top_k, width, dtype), at<float>(weights), at<void>(x),
                                     at<void>(out)};
        py::gil_scoped_release unlocked;
        cuda::experts_spread(args, context);
      },
      py::arg("x"), py::arg("weights"), py::arg("out"), py::arg("place"), py::arg("tokens"), py::arg("top_k"),
      py::arg("width"), py::arg("dtype"), py::arg("context"));
  m.def(
      "experts_collect",
      [](Address y, Address weights, Address out, Address place, int64_t tokens, int64_t top_k, int64_t width,
         int dtype, const Context& context) {
        const ExpertsCollectArgs args{placed_rows(place, tokens, top_k, width, dtype), at<float>(weights), at<void>(y),
                                      at<void>(out)};
        py::gil_scoped_release unlocked;
        cuda::experts_collect(args, context);
      },
      py::arg("y"), py::arg("weights"), py::arg("out"), py::arg("place"), py::arg("tokens"), py::arg("top_k"),
      py::arg("width"), py::arg("dtype"), py::arg("context"));
  m.def(
      "experts_dots",
      [](Address x, Address y, Address dots, Address place, int64_t tokens, int64_t top_k, int64_t width, int dtype,
         const Context& context) {
        const ExpertsDotsArgs args{placed_rows(place, tokens, top_k, width, dtype), at<void>(x), at<void>(y),
                                   at<float>(dots)};
        py::gil_scoped_release unlocked;
        cuda::experts_dots(args, context);
      },
      py::arg("x"), py::arg("y"), py::arg("dots"), py::arg("place"), py::arg("tokens"), py::arg("top_k"),
      py::arg("width"), py::arg("dtype"), py::arg("context"));
}

}  // namespace fastpeft::bindings
