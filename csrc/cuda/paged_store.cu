// Keys and values of many tokens into pages on CUDA, both in one launch.
//
// Plan     A thread copies a unit of a token's key and the same of its value, loaded before either is stored;
//          neighbouring threads have neighbouring units, then heads, then tokens. A unit is 16 bytes where every
//          address, stride and head allows it, else an element.
#include "common/integer.h"
#include "common/paged_attention_checks.h"
#include "cuda/device/launch.cuh"
#include "cuda/device/numbers.cuh"
#include "cuda/device/ptx.cuh"
#include "fastpeft/paged_attention.h"

namespace fastpeft::cuda {
namespace {

constexpr int kThreads = 256;

// --- kernel ----------------------------------------------------------------------------------------------------------

// Strides and `dim` count units.
template <typename Unit>
__global__ void __launch_bounds__(kThreads) paged_store_kernel(const __grid_constant__ PagedStoreArgs args) {
  let_next_kernel_start();
  wait_for_kernel_before();
  const unsigned dim = static_cast<unsigned>(args.dim), kv_heads = static_cast<unsigned>(args.kv_heads);
  const unsigned item = blockIdx.x * kThreads + threadIdx.x;
  const unsigned column = item % dim, head = item / dim % kv_heads;
  const int64_t token = item / dim / kv_heads;
  if (token >= args.tokens) return;
  const int64_t page = args.pages[token], offset = args.offsets[token];
  if (page < 0 || page >= args.page_count || offset < 0 || offset >= args.page_size) return;
  const auto read = [&](const HeadRows& x) {
    return static_cast<const Unit*>(x.values)[token * x.row_stride + head * x.head_stride + column];
  };
  const Unit k = read(args.k), v = read(args.v);
  const int64_t to = ((page * kv_heads + head) * args.page_size + offset) * dim + column;
  static_cast<Unit*>(args.k_pages)[to] = k;
  static_cast<Unit*>(args.v_pages)[to] = v;
}

// --- launcher --------------------------------------------------------------------------------------------------------

template <typename Unit>
void launch_store(PagedStoreArgs args, int64_t each, const Context& context) {
  args.dim /= each;
  for (HeadRows* x : {&args.k, &args.v}) x->row_stride /= each, x->head_stride /= each;
  const int64_t items = args.tokens * args.kv_heads * args.dim;
  check(items <= INT32_MAX, "paged_store_: ", args.tokens, " tokens are too many for one call");
  Grid grid = cover(items, kThreads, kThreads);
  grid.overlap_launch = device_limits().wgmma;
  launch([&] { return concat("paged_store_ of ", args.tokens, " tokens of ", args.kv_heads, " heads"); },
         paged_store_kernel<Unit>, grid, context, args);
}

}  // namespace

void paged_store(const PagedStoreArgs& args, const Context& context) {
  check_paged_store(args);
  dispatch("paged_store_", args.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int64_t kEach = 16 / sizeof(T);
    const int64_t strides = args.k.row_stride | args.k.head_stride | args.v.row_stride | args.v.head_stride;
    const bool in_packs = (strides | args.dim) % kEach == 0 && is_aligned(args.k.values) && is_aligned(args.v.values) &&
                          is_aligned(args.k_pages) && is_aligned(args.v_pages);
    if (in_packs) {
      launch_store<uint4>(args, kEach, context);
    } else {
      launch_store<T>(args, 1, context);
    }
  });
}

}  // namespace fastpeft::cuda
