// Bindings of fastpeft/adamw.h.
#include "fastpeft/adamw.h"

#include "bindings/bindings.h"
#include "common/error.h"

namespace py = pybind11;

namespace fastpeft::bindings {

void bind_adamw(py::module_& m) {
  m.def(
      "adamw",
      [](bool on_cuda, const std::vector<Address>& params, const std::vector<Address>& grads,
         const std::vector<Address>& exp_avgs, const std::vector<Address>& exp_avg_sqs,
         const std::vector<int64_t>& numels, int param_dtype, int grad_dtype, double lr, double beta1, double beta2,
         double eps, double weight_decay, int64_t step, bool maximize, const Context& context) {
        const size_t count = params.size();
        check(
            grads.size() == count && exp_avgs.size() == count && exp_avg_sqs.size() == count && numels.size() == count,
            "adamw: the lists of tensors differ in length");
        AdamWArgs args{{},
                       static_cast<DType>(param_dtype),
                       static_cast<DType>(grad_dtype),
                       lr,
                       beta1,
                       beta2,
                       eps,
                       weight_decay,
                       step,
                       maximize};
        args.tensors.reserve(count);
        for (size_t i = 0; i < count; ++i) {
          args.tensors.push_back(
              {at<void>(params[i]), at<void>(grads[i]), at<float>(exp_avgs[i]), at<float>(exp_avg_sqs[i]), numels[i]});
        }
        run(on_cuda, cpu::adamw, cuda::adamw, args, context);
      },
      py::arg("on_cuda"), py::arg("params"), py::arg("grads"), py::arg("exp_avgs"), py::arg("exp_avg_sqs"),
      py::arg("numels"), py::arg("param_dtype"), py::arg("grad_dtype"), py::arg("lr"), py::arg("beta1"),
      py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"), py::arg("step"), py::arg("maximize"),
      py::arg("context"));
}

}  // namespace fastpeft::bindings
