// Bindings of fastpeft/lora_few.h.
#include "fastpeft/lora_few.h"

#include <algorithm>
#include <vector>

#include "bindings/bindings.h"
#include "common/error.h"
#include "cuda/lora_few_config.h"

namespace py = pybind11;

namespace fastpeft::bindings {
namespace {

LoraFewArgs few_args(const char* function, Address x, int dtype, int64_t rows, int64_t k,
                     const std::vector<LoraAdapter>& adapters, Address sums) {
  check(adapters.size() <= kMostAdapters, function, ": ", adapters.size(), " adapters; at most ", kMostAdapters);
  LoraFewArgs args{};
  args.x = at<void>(x), args.dtype = static_cast<DType>(dtype), args.m = rows, args.k = k;
  std::copy(adapters.begin(), adapters.end(), args.adapters);
  args.count = static_cast<int64_t>(adapters.size());
  args.sums = at<float>(sums);
  return args;
}

}  // namespace

void bind_lora_few(py::module_& m) {
  m.def(
      "lora_few_floats",
      [](int64_t rows, int64_t k, const std::vector<int64_t>& ranks, int dtype, int architecture) {
        return cuda::lora_few_floats(rows, k, ranks.data(), static_cast<int64_t>(ranks.size()),
                                     static_cast<DType>(dtype), architecture);
      },
      py::arg("m"), py::arg("k"), py::arg("ranks"), py::arg("dtype"), py::arg("architecture"));
  m.def(
      "lora_few_project",
      [](Address x, int dtype, int64_t rows, int64_t k, const std::vector<LoraAdapter>& adapters, Address sums,
         const Context& context) {
        const LoraFewArgs args = few_args("lora_few_project", x, dtype, rows, k, adapters, sums);
        py::gil_scoped_release unlocked;
        cuda::lora_few_project(args, context);
      },
      py::arg("x"), py::arg("dtype"), py::arg("m"), py::arg("k"), py::arg("adapters"), py::arg("sums"),
      py::arg("context"));
  m.def(
      "lora_few_add",
      [](int dtype, int64_t rows, int64_t k, const std::vector<LoraAdapter>& adapters, Address sums,
         const std::vector<Address>& ys, const std::vector<int64_t>& pitches, const Context& context) {
        LoraFewArgs args = few_args("lora_few_add", 0, dtype, rows, k, adapters, sums);
        check(ys.size() == adapters.size() && pitches.size() == adapters.size(), "lora_few_add: ", ys.size(),
              " outputs of ", pitches.size(), " pitches for ", adapters.size(), " adapters; needs one of each");
        std::transform(ys.begin(), ys.end(), args.y, at<void>);
        std::copy(pitches.begin(), pitches.end(), args.y_pitch);
        py::gil_scoped_release unlocked;
        cuda::lora_few_add(args, context);
      },
      py::arg("dtype"), py::arg("m"), py::arg("k"), py::arg("adapters"), py::arg("sums"), py::arg("ys"),
      py::arg("pitches"), py::arg("context"));
}

}  // namespace fastpeft::bindings
