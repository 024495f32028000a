// Bindings of fastpeft/nf4_linear.h, and of the choice between its kernels.
#include "fastpeft/nf4_linear.h"

#include "bindings/bindings.h"
#include "cuda/nf4_linear_config.h"

namespace py = pybind11;

namespace fastpeft::bindings {

void bind_nf4_linear(py::module_& m) {
  m.def(
      "nf4_linear_plan",
      [](int64_t rows, int64_t n, int64_t k, bool transposed, int64_t block_size, int dtype, bool aligned,
         int architecture, int sms, int smem_bytes, bool wgmma) {
        static constexpr const char* kNames[] = {"dequantise", "decode", "fragments", "tiles", "mma"};
        const cuda::NF4LinearPlan plan =
            cuda::nf4_linear_plan({rows, n, k, transposed, block_size, static_cast<DType>(dtype), aligned, true},
                                  {architecture, sms, smem_bytes, wgmma});
        return py::make_tuple(kNames[static_cast<int>(plan.kernel)], plan.workspace_bytes, plan.counters, plan.reason);
      },
      py::arg("m"), py::arg("n"), py::arg("k"), py::arg("transposed"), py::arg("block_size"), py::arg("dtype"),
      py::arg("aligned"), py::arg("architecture"), py::arg("sms"), py::arg("smem_bytes"), py::arg("wgmma"));
  m.def(
      "nf4_linear_tiles_items",
      [](int rows, int out, int depth, int sms, bool forward) {
        namespace tiles = cuda::nf4_tiles;
        const tiles::Plan plan = tiles::make_plan(rows, out, depth, sms, forward);
        py::list items;
        tiles::Item item;
        for (int seat = 0; seat < tiles::grid(plan) / plan.cluster; ++seat) {
          for (int index = 0; tiles::find_item(plan, seat, index, item); ++index) {
            items.append(py::make_tuple(seat, item.out0, item.m0, item.first_chunk, item.chunks, item.parts, item.part,
                                        item.unit, item.slot, item.last_slot));
          }
        }
        return py::make_tuple(plan.tokens, plan.cluster, plan.chunks, items);
      },
      py::arg("m"), py::arg("out"), py::arg("depth"), py::arg("sms"), py::arg("forward"));
  m.def(
      "nf4_linear",
      [](bool transposed, Address x, Address codes, Address absmax, Address nested_absmax, Address nested_map,
         Address offset, int64_t block_size, Address bias, Address y, int dtype, int64_t rows, int64_t n, int64_t k,
         Address workspace, int64_t workspace_bytes, Address counters, bool wgmma, const Context& context) {
        const NF4View view = nf4_view(codes, absmax, nested_absmax, nested_map, offset, n * k, block_size);
        const NF4LinearArgs args{
            view, transposed, at<void>(x), at<void>(bias),      at<void>(y),     static_cast<DType>(dtype),
            rows, n,          k,           at<void>(workspace), workspace_bytes, at<unsigned>(counters),
            wgmma};
        py::gil_scoped_release unlocked;
        cuda::nf4_linear(args, context);
      },
      py::arg("transposed"), py::arg("x"), py::arg("codes"), py::arg("absmax"), py::arg("nested_absmax"),
      py::arg("nested_map"), py::arg("offset"), py::arg("block_size"), py::arg("bias"), py::arg("y"), py::arg("dtype"),
      py::arg("m"), py::arg("n"), py::arg("k"), py::arg("workspace"), py::arg("workspace_bytes"), py::arg("counters"),
      py::arg("wgmma"), py::arg("context"));
}

}  // namespace fastpeft::bindings
