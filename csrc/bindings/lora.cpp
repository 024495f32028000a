// Bindings of fastpeft/lora.h, and of the choice whether its kernels are used.
#include "fastpeft/lora.h"

#include <algorithm>

#include "bindings/bindings.h"
#include "common/error.h"
#include "cuda/lora_linear_config.h"

namespace py = pybind11;

namespace fastpeft::bindings {
namespace {

using Sizes = std::vector<int64_t>;

template <typename T>
void copy(const char* function, const char* what, const std::vector<T>& from, T (&to)[kMostAdapters], size_t count) {
  check(from.size() == count && count <= kMostAdapters, function, ": ", from.size(), " ", what, " for ", count,
        " adapters; needs as many, and at most ", kMostAdapters);
  std::copy(from.begin(), from.end(), to);
}

template <typename T>
void copy(const char* function, const char* what, const std::vector<Address>& from, T* (&to)[kMostAdapters],
          size_t count) {
  Address addresses[kMostAdapters] = {};
  copy(function, what, from, addresses, count);
  std::transform(addresses, addresses + count, to, at<T>);
}

}  // namespace

void bind_lora(py::module_& m) {
  py::class_<LoraAdapter>(m, "LoraAdapter")
      .def(py::init([](Address a, Address b, int64_t n, int64_t r, double scale) {
             return LoraAdapter{at<float>(a), at<float>(b), n, r, scale};
           }),
           py::arg("a"), py::arg("b"), py::arg("n"), py::arg("r"), py::arg("scale"));
  m.def(
      "lora_linear_plan",
      [](int64_t rows, int64_t k, const Sizes& n, const Sizes& r, const Sizes& block_sizes, int dtype, bool aligned,
         bool aligned_factors, double p, int architecture, int sms, int smem_bytes, bool wgmma) {
        cuda::LoraLinearSizes sizes{};
        sizes.m = rows, sizes.k = k, sizes.count = static_cast<int64_t>(n.size());
        if (n.size() <= kMostAdapters) {  // more are refused by their count
          copy("lora_linear_plan", "sizes", n, sizes.n, n.size());
          copy("lora_linear_plan", "ranks", r, sizes.r, n.size());
          copy("lora_linear_plan", "block sizes", block_sizes, sizes.block_size, n.size());
        }
        sizes.dtype = static_cast<DType>(dtype), sizes.aligned = aligned;
        sizes.aligned_factors = aligned_factors, sizes.p = p;
        const cuda::LoraLinearPlan plan = cuda::lora_linear_plan(sizes, {architecture, sms, smem_bytes, wgmma});
        const std::vector<bool> dxa_beside(plan.dxa_beside,
                                           plan.dxa_beside + std::min<size_t>(n.size(), kMostAdapters));
        return py::make_tuple(plan.fused, plan.beside, plan.xa_beside, dxa_beside, plan.da_beside, plan.da_after,
                              plan.forward_bytes, plan.backward_bytes, plan.xa_bytes, plan.dxa_bytes, plan.sums_bytes,
                              plan.after_bytes, plan.counters, plan.reason);
      },
      py::arg("m"), py::arg("k"), py::arg("n"), py::arg("r"), py::arg("block_sizes"), py::arg("dtype"),
      py::arg("aligned"), py::arg("aligned_factors"), py::arg("p"), py::arg("architecture"), py::arg("sms"),
      py::arg("smem_bytes"), py::arg("wgmma"));
  m.def(
      "lora_project",
      [](Address x, int dtype, int64_t rows, int64_t k, const std::vector<LoraAdapter>& adapters, Address a16,
         Address xa, double p, uint64_t seed, const Context& context) {
        LoraProjectArgs args{};
        args.x = at<void>(x), args.dtype = static_cast<DType>(dtype), args.m = rows, args.k = k;
        args.count = static_cast<int64_t>(adapters.size());
        copy("lora_project", "adapters", adapters, args.adapters, adapters.size());
        args.a16 = at<void>(a16), args.xa = at<void>(xa), args.p = p, args.seed = seed;
        py::gil_scoped_release unlocked;
        cuda::lora_project(args, context);
      },
      py::arg("x"), py::arg("dtype"), py::arg("m"), py::arg("k"), py::arg("adapters"), py::arg("a16"), py::arg("xa"),
      py::arg("p"), py::arg("seed"), py::arg("context"));
  m.def(
      "lora_backward",
      [](Address dy, int dtype, int64_t rows, const LoraAdapter& adapter, Address xa, int64_t xa_pitch, Address dxa,
         int64_t dxa_pitch, Address db, Address workspace, int64_t workspace_bytes, const Context& context) {
        const LoraBackwardArgs args{at<void>(dy),   static_cast<DType>(dtype),
                                    rows,           adapter,
                                    at<void>(xa),   xa_pitch,
                                    at<void>(dxa),  dxa_pitch,
                                    at<float>(db),  at<void>(workspace),
                                    workspace_bytes};
        py::gil_scoped_release unlocked;
        cuda::lora_backward(args, context);
      },
      py::arg("dy"), py::arg("dtype"), py::arg("m"), py::arg("adapter"), py::arg("xa"), py::arg("xa_pitch"),
      py::arg("dxa"), py::arg("dxa_pitch"), py::arg("db"), py::arg("workspace"), py::arg("workspace_bytes"),
      py::arg("context"));
  m.def(
      "lora_gradient",
      [](Address x, int dtype, int64_t rows, int64_t k, Address dxa, const std::vector<Address>& da, const Sizes& r,
         double p, uint64_t seed, Address workspace, int64_t workspace_bytes, Address counters,
         const Context& context) {
        LoraGradientArgs args{};
        args.x = at<void>(x), args.dtype = static_cast<DType>(dtype), args.m = rows, args.k = k;
        args.dxa = at<void>(dxa), args.count = static_cast<int64_t>(da.size());
        copy("lora_gradient", "gradients", da, args.da, da.size());
        copy("lora_gradient", "ranks", r, args.r, da.size());
        args.p = p, args.seed = seed, args.workspace = at<void>(workspace), args.workspace_bytes = workspace_bytes;
        args.counters = at<unsigned>(counters);
        py::gil_scoped_release unlocked;
        cuda::lora_gradient(args, context);
      },
      py::arg("x"), py::arg("dtype"), py::arg("m"), py::arg("k"), py::arg("dxa"), py::arg("da"), py::arg("r"),
      py::arg("p"), py::arg("seed"), py::arg("workspace"), py::arg("workspace_bytes"), py::arg("counters"),
      py::arg("context"));
}

}  // namespace fastpeft::bindings
