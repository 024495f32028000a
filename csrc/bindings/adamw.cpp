// Bindings of fastpeft/adamw.h.
#include "fastpeft/adamw.h"

#include "bindings/bindings.h"
#include "common/adamw_table.h"
#include "common/dynamic_map.h"
#include "common/error.h"
#include "cuda/adamw_far_plan.h"
#include "fastpeft/arena.h"

namespace py = pybind11;

namespace fastpeft::bindings {
namespace {

using Addresses = std::vector<Address>;

std::vector<const void*> pointers(const Addresses& addresses) {
  std::vector<const void*> found;
  found.reserve(addresses.size());
  for (const Address address : addresses) found.push_back(at<const void>(address));
  return found;
}

AdamWList make_list(const Addresses& params, const Addresses& exp_avgs, const Addresses& exp_avg_sqs,
                    const Addresses& absmaxes, const Addresses& absmax_sqs, const std::vector<int64_t>& numels,
                    const std::vector<int64_t>& offsets, const std::vector<int64_t>& tensors, const Addresses& steps,
                    const std::vector<int64_t>& numbers, const std::vector<int64_t>& advances, int param_dtype,
                    bool eight_bit) {
  const size_t rows = params.size();
  check(exp_avgs.size() == rows && exp_avg_sqs.size() == rows && absmaxes.size() == rows && absmax_sqs.size() == rows &&
            numels.size() == rows && offsets.size() == rows && tensors.size() == rows,
        "adamw: the lists of tensors differ in length");
  check(numbers.size() == steps.size() && advances.size() == steps.size(),
        "adamw: the lists of step counts differ in length");
  AdamWList list{{}, {}, static_cast<DType>(param_dtype), eight_bit, rows};
  for (size_t i = 0; i < rows; ++i) {
    check(tensors[i] >= 0 && static_cast<size_t>(tensors[i]) < steps.size(), "adamw: tensor ", tensors[i],
          " has no step count");
    list.rows.push_back({at<void>(params[i]), at<void>(exp_avgs[i]), at<void>(exp_avg_sqs[i]), at<float>(absmaxes[i]),
                         at<float>(absmax_sqs[i]), numels[i], offsets[i], tensors[i]});
  }
  for (size_t i = 0; i < steps.size(); ++i) list.tensors.push_back({at<float>(steps[i]), numbers[i], advances[i]});
  return list;
}

Address address_of(const void* pointer) { return reinterpret_cast<Address>(pointer); }

template <bool kSigned>
std::vector<float> map_values() {
  static constexpr DynamicMap<kSigned> kMap;
  return {std::begin(kMap.values), std::end(kMap.values)};
}

}  // namespace

void bind_adamw(py::module_& m) {
  py::class_<AdamWList>(m, "AdamWList")
      .def(py::init(&make_list), py::arg("params"), py::arg("exp_avgs"), py::arg("exp_avg_sqs"), py::arg("absmaxes"),
           py::arg("absmax_sqs"), py::arg("numels"), py::arg("offsets"), py::arg("tensors"), py::arg("steps"),
           py::arg("numbers"), py::arg("advances"), py::arg("param_dtype"), py::arg("eight_bit"))
      .def("table_bytes", &adamw_table_bytes)
      .def("stage", &cuda::adamw_stage)
      .def("set_table", [](AdamWList& list, Address table) { list.table = at<void>(table); });
  // The batches of a list whose state is on the host, with slots at address 0: for tests without a GPU.
  m.def("adamw_far_plan", [](AdamWList list, int64_t slot_bytes) {
    cuda::adamw_plan_far(list, nullptr, slot_bytes, cuda::kArenaSlots);
    py::list batches;
    for (const AdamWBatch& batch : list.batches) {
      py::list copies, rows;
      for (const AdamWCopy& copy : batch.copies) {
        copies.append(py::make_tuple(address_of(copy.host), address_of(copy.slot), copy.bytes));
      }
      for (int64_t i = batch.first_row; i < batch.first_row + batch.rows; ++i) {
        const AdamWRow& row = list.rows[i];
        rows.append(py::make_tuple(list.sources[i], row.offset, row.numel, address_of(row.param),
                                   address_of(row.exp_avg), address_of(row.exp_avg_sq), address_of(row.absmax),
                                   address_of(row.absmax_sq)));
      }
      batches.append(py::make_tuple(copies, rows));
    }
    return batches;
  });
  m.attr("ADAMW_SUMS") = kAdamWSums;
  m.def("dynamic_map", [](bool is_signed) { return is_signed ? map_values<true>() : map_values<false>(); });
  m.def(
      "adamw_step",
      [](bool on_cuda, AdamWList& list, const Addresses& grads, int grad_dtype, Address control, double lr,
         Address lr_address, double beta1, double beta2, double eps, double weight_decay, bool maximize,
         bool stochastic, uint64_t seed, const Context& context) {
        const AdamWStepArgs args{&list,
                                 pointers(grads),
                                 static_cast<DType>(grad_dtype),
                                 at<AdamWControl>(control),
                                 lr,
                                 at<const float>(lr_address),
                                 beta1,
                                 beta2,
                                 eps,
                                 weight_decay,
                                 maximize,
                                 stochastic,
                                 seed};
        run(on_cuda, cpu::adamw_step, cuda::adamw_step, args, context);
      },
      py::arg("on_cuda"), py::arg("list"), py::arg("grads"), py::arg("grad_dtype"), py::arg("control"), py::arg("lr"),
      py::arg("lr_address"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"),
      py::arg("maximize"), py::arg("stochastic"), py::arg("seed"), py::arg("context"));
  m.def(
      "adamw_norm",
      [](bool on_cuda, const std::vector<Addresses>& grads, const std::vector<std::vector<int64_t>>& numels,
         const std::vector<int>& dtypes, Address control, Address sums, double max_norm, Address grad_scale,
         Address found_inf, const Context& context) {
        check(grads.size() == numels.size() && grads.size() == dtypes.size(),
              "adamw_norm: the lists of gradients differ in length");
        AdamWNormArgs args{{},       at<AdamWControl>(control),   at<float>(sums),
                           max_norm, at<const float>(grad_scale), at<const float>(found_inf)};
        for (size_t i = 0; i < grads.size(); ++i) {
          check(grads[i].size() == numels[i].size(), "adamw_norm: the lists of gradients differ in length");
          AdamWGradients gradients{{}, static_cast<DType>(dtypes[i])};
          for (size_t j = 0; j < grads[i].size(); ++j) {
            gradients.list.push_back({at<const void>(grads[i][j]), numels[i][j]});
          }
          args.gradients.push_back(std::move(gradients));
        }
        run(on_cuda, cpu::adamw_norm, cuda::adamw_norm, args, context);
      },
      py::arg("on_cuda"), py::arg("grads"), py::arg("numels"), py::arg("dtypes"), py::arg("control"), py::arg("sums"),
      py::arg("max_norm"), py::arg("grad_scale"), py::arg("found_inf"), py::arg("context"));
}

}  // namespace fastpeft::bindings
