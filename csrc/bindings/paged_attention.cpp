// Bindings of fastpeft/paged_attention.h.
#include "fastpeft/paged_attention.h"

#include "bindings/bindings.h"
#include "cuda/paged_attention_config.h"

namespace py = pybind11;

namespace fastpeft::bindings {
namespace {

using Rows = std::tuple<Address, int64_t, int64_t>;  // values, strides of row and head

HeadRows head_rows(const Rows& rows) { return {at<void>(std::get<0>(rows)), std::get<1>(rows), std::get<2>(rows)}; }

}  // namespace

void bind_paged_attention(py::module_& m) {
  m.def(
      "paged_attention_plan",
      [](int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim, int64_t most_tokens, int architecture, int sms,
         int smem_bytes, bool wgmma) {
        const auto plan =
            cuda::paged_attention_plan(rows, heads, kv_heads, dim, most_tokens, {architecture, sms, smem_bytes, wgmma});
        return std::make_tuple(plan.parts, plan.floats, plan.counters);
      },
      py::arg("rows"), py::arg("heads"), py::arg("kv_heads"), py::arg("dim"), py::arg("most_tokens"),
      py::arg("architecture"), py::arg("sms"), py::arg("smem_bytes"), py::arg("wgmma"));
  m.def(
      "paged_attention",
      [](bool on_cuda, const Rows& q, const Rows& k, const Rows& v, Address k_pages, Address v_pages, Address table,
         Address lengths, Address cos, Address sin, Address out, int dtype, int64_t rows, int64_t heads,
         int64_t kv_heads, int64_t dim, int64_t rotary, int64_t page_size, int64_t row_pages, int64_t window,
         double scale, double softcap, int64_t parts, Address partial, Address counters, const Context& context) {
        const PagedAttentionArgs args{head_rows(q),
                                      head_rows(k),
                                      head_rows(v),
                                      at<void>(k_pages),
                                      at<void>(v_pages),
                                      at<int32_t>(table),
                                      at<int32_t>(lengths),
                                      at<void>(cos),
                                      at<void>(sin),
                                      at<void>(out),
                                      static_cast<DType>(dtype),
                                      rows,
                                      heads,
                                      kv_heads,
                                      dim,
                                      rotary,
                                      page_size,
                                      row_pages,
                                      window,
                                      scale,
                                      softcap,
                                      parts,
                                      at<float>(partial),
                                      at<unsigned>(counters)};
        run(on_cuda, cpu::paged_attention, cuda::paged_attention, args, context);
      },
      py::arg("on_cuda"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("k_pages"), py::arg("v_pages"),
      py::arg("table"), py::arg("lengths"), py::arg("cos"), py::arg("sin"), py::arg("out"), py::arg("dtype"),
      py::arg("rows"), py::arg("heads"), py::arg("kv_heads"), py::arg("dim"), py::arg("rotary"), py::arg("page_size"),
      py::arg("row_pages"), py::arg("window"), py::arg("scale"), py::arg("softcap"), py::arg("parts"),
      py::arg("partial"), py::arg("counters"), py::arg("context"));
  m.def(
      "paged_store",
      [](bool on_cuda, const Rows& k, const Rows& v, Address k_pages, Address v_pages, Address pages, Address offsets,
         int dtype, int64_t tokens, int64_t kv_heads, int64_t dim, int64_t page_size, int64_t page_count,
         const Context& context) {
        const PagedStoreArgs args{head_rows(k),
                                  head_rows(v),
                                  at<void>(k_pages),
                                  at<void>(v_pages),
                                  at<int32_t>(pages),
                                  at<int32_t>(offsets),
                                  static_cast<DType>(dtype),
                                  tokens,
                                  kv_heads,
                                  dim,
                                  page_size,
                                  page_count};
        run(on_cuda, cpu::paged_store, cuda::paged_store, args, context);
      },
      py::arg("on_cuda"), py::arg("k"), py::arg("v"), py::arg("k_pages"), py::arg("v_pages"), py::arg("pages"),
      py::arg("offsets"), py::arg("dtype"), py::arg("tokens"), py::arg("kv_heads"), py::arg("dim"),
      py::arg("page_size"), py::arg("page_count"), py::arg("context"));
}

}  // namespace fastpeft::bindings
