// Bindings of fastpeft/nf4_linear.h, and of the choice between its kernels.
#include "fastpeft/nf4_linear.h"

#include <algorithm>
#include <array>
#include <vector>

#include "bindings/bindings.h"
#include "common/error.h"
#include "cuda/nf4_linear_config.h"

namespace py = pybind11;

namespace fastpeft::bindings {

void bind_nf4_linear(py::module_& m) {
  py::class_<NF4LinearAdapter>(m, "NF4LinearAdapter")
      .def(py::init([](Address xa, int64_t xa_pitch, Address factor, int64_t rank, double scale, double p,
                       uint64_t seed, bool add_to_y, bool early) {
             NF4LinearAdapter adapter{};
             adapter.r = padded_rank(rank), adapter.xa = at<void>(xa), adapter.xa_pitch = xa_pitch;
             adapter.factor = at<float>(factor), adapter.factor_rank = rank, adapter.scale = scale;
             adapter.p = p, adapter.seed = seed, adapter.add_to_y = add_to_y, adapter.early = early;
             return adapter;
           }),
           py::arg("xa"), py::arg("xa_pitch"), py::arg("factor"), py::arg("rank"), py::arg("scale"), py::arg("p"),
           py::arg("seed"), py::arg("add_to_y"), py::arg("early"))
      .def(
          "make_xa",
          [](NF4LinearAdapter& adapter, const std::vector<LoraAdapter>& adapters, Address workspace) {
            check(adapters.size() <= kMostAdapters, "make_xa: ", adapters.size(), " adapters; at most ", kMostAdapters);
            NF4LinearBeside& beside = adapter.beside;
            std::copy(adapters.begin(), adapters.end(), beside.adapters);
            for (const LoraAdapter& each : adapters) beside.ranks += each.r;
            beside.rounded = at<void>(workspace);
          },
          py::arg("adapters"), py::arg("workspace"))
      .def(
          "make_dxa",
          [](NF4LinearAdapter& adapter, const LoraAdapter& own, Address xa, int64_t xa_pitch, Address db,
             Address workspace) {
            NF4LinearBeside& beside = adapter.beside;
            beside.ranks = own.r, beside.adapters[0] = own;
            beside.xa = at<void>(xa), beside.xa_pitch = xa_pitch, beside.db = at<float>(db);
            beside.rounded = at<void>(workspace);
            beside.db_sums = at<float>(workspace == 0 ? 0 : workspace + 2 * own.n * own.r);
          },
          py::arg("own"), py::arg("xa"), py::arg("xa_pitch"), py::arg("db"), py::arg("workspace"))
      .def(
          "make_da",
          [](NF4LinearAdapter& adapter, Address x, Address dxa, const std::vector<Address>& da,
             const std::vector<int64_t>& ranks) {
            check(da.size() == ranks.size() && da.size() <= kMostAdapters, "make_da: ", da.size(), " gradients of ",
                  ranks.size(), " adapters; needs as many, and at most ", kMostAdapters);
            NF4LinearBeside& beside = adapter.beside;
            beside.x = at<void>(x), beside.dxa = at<void>(dxa);
            for (size_t i = 0; i < da.size(); ++i) {
              beside.da[i] = at<float>(da[i]), beside.da_r[i] = ranks[i];
              beside.gradient_ranks += ranks[i];
            }
          },
          py::arg("x"), py::arg("dxa"), py::arg("da"), py::arg("ranks"));
  m.def(
      "nf4_linear_plan",
      [](int64_t rows, int64_t n, int64_t k, bool transposed, int64_t block_size, int dtype, bool aligned,
         int architecture, int sms, int smem_bytes, bool wgmma) {
        static constexpr const char* kNames[] = {"dequantise", "decode", "fragments", "tiles", "mma"};
        const cuda::NF4LinearPlan plan =
            cuda::nf4_linear_plan({rows, n, k, transposed, block_size, static_cast<DType>(dtype), aligned, true},
                                  {architecture, sms, smem_bytes, wgmma});
        return py::make_tuple(kNames[static_cast<int>(plan.kernel)], plan.workspace_bytes, plan.counters, plan.can_add,
                              plan.reason);
      },
      py::arg("m"), py::arg("n"), py::arg("k"), py::arg("transposed"), py::arg("block_size"), py::arg("dtype"),
      py::arg("aligned"), py::arg("architecture"), py::arg("sms"), py::arg("smem_bytes"), py::arg("wgmma"));
  m.def(
      "nf4_linear_group_plan",
      [](int64_t rows, const std::vector<int64_t>& n, int64_t k, int dtype, int architecture, int sms, int smem_bytes,
         bool wgmma) {
        check(n.size() <= kMostGroupedWeights, "nf4_linear_group_plan: ", n.size(), " weights; at most ",
              kMostGroupedWeights);
        cuda::NF4LinearSizes sizes{rows, 0, k, false, 64, static_cast<DType>(dtype), true, true};
        std::copy(n.begin(), n.end(), sizes.group);
        const cuda::NF4LinearPlan plan = cuda::nf4_linear_group_plan(sizes, {architecture, sms, smem_bytes, wgmma});
        return py::make_tuple(plan.kernel != cuda::NF4LinearKernel::kDequantise, plan.workspace_bytes, plan.counters);
      },
      py::arg("m"), py::arg("n"), py::arg("k"), py::arg("dtype"), py::arg("architecture"), py::arg("sms"),
      py::arg("smem_bytes"), py::arg("wgmma"));
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
         Address workspace, int64_t workspace_bytes, Address counters, bool wgmma, bool add_to_y,
         const NF4LinearAdapter* adapter, const Context& context) {
        const NF4View view = nf4_view(codes, absmax, nested_absmax, nested_map, offset, n * k, block_size);
        const NF4LinearArgs args{view,
                                 transposed,
                                 at<void>(x),
                                 at<void>(bias),
                                 at<void>(y),
                                 static_cast<DType>(dtype),
                                 rows,
                                 n,
                                 k,
                                 at<void>(workspace),
                                 workspace_bytes,
                                 at<unsigned>(counters),
                                 wgmma,
                                 add_to_y,
                                 adapter == nullptr ? NF4LinearAdapter{} : *adapter};
        py::gil_scoped_release unlocked;
        cuda::nf4_linear(args, context);
      },
      py::arg("transposed"), py::arg("x"), py::arg("codes"), py::arg("absmax"), py::arg("nested_absmax"),
      py::arg("nested_map"), py::arg("offset"), py::arg("block_size"), py::arg("bias"), py::arg("y"), py::arg("dtype"),
      py::arg("m"), py::arg("n"), py::arg("k"), py::arg("workspace"), py::arg("workspace_bytes"), py::arg("counters"),
      py::arg("wgmma"), py::arg("add_to_y"), py::arg("adapter").none(true), py::arg("context"));
  m.def(
      "nf4_linear_group",
      [](Address x, const std::vector<std::array<Address, 5>>& weights, const std::vector<int64_t>& n, Address y,
         int dtype, int64_t rows, int64_t k, Address workspace, int64_t workspace_bytes, Address counters,
         const Context& context) {
        check(weights.size() == n.size() && n.size() > 1 && n.size() <= kMostGroupedWeights,
              "nf4_linear_group: ", weights.size(), " weights with ", n.size(), " sizes; needs as many, 2 to ",
              kMostGroupedWeights);
        NF4LinearArgs args{};
        args.x = at<void>(x), args.y = at<void>(y), args.dtype = static_cast<DType>(dtype), args.m = rows, args.k = k;
        args.workspace = at<void>(workspace), args.workspace_bytes = workspace_bytes;
        args.counters = at<unsigned>(counters), args.wgmma = true;
        args.group.count = static_cast<int>(n.size());
        for (size_t i = 0; i < n.size(); ++i) {
          const auto& [codes, absmax, nested_absmax, nested_map, offset] = weights[i];
          args.group.w[i] = nf4_view(codes, absmax, nested_absmax, nested_map, offset, n[i] * k, 64);
          args.group.n[i] = n[i], args.n += n[i];
        }
        args.w = args.group.w[0];
        py::gil_scoped_release unlocked;
        cuda::nf4_linear(args, context);
      },
      py::arg("x"), py::arg("weights"), py::arg("n"), py::arg("y"), py::arg("dtype"), py::arg("m"), py::arg("k"),
      py::arg("workspace"), py::arg("workspace_bytes"), py::arg("counters"), py::arg("context"));
}

}  // namespace fastpeft::bindings
