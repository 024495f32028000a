// Attention of one new token a row over a cache in pages.
//
// Layout   k_pages, v_pages [pages, kv_heads, page_size, dim]
// Plan     paged_attention_parts.cuh says what a block does; 16-bit types go through the tensor cores, float32 does
// not. Limits   dim is whole packs of 16 bytes, at most 32: 256 elements, of float32 128.
#include "fastpeft/paged_attention.h"

#include "common/paged_attention_checks.h"
#include "cuda/device/launch.cuh"
#include "cuda/paged_attention_float_kernel.cuh"
#include "cuda/paged_attention_mma_kernel.cuh"

namespace fastpeft::cuda {
namespace {

using paged::Cut;

template <typename Kernel>
void launch_kernel(Kernel kernel, int smem_bytes, const PagedAttentionArgs& args, const Cut& cut,
                   const Context& context) {
  const int64_t blocks = args.rows * cut.blocks * cut.parts;
  check(blocks <= INT32_MAX, "paged_attention: ", args.rows, " rows of ", args.heads, " heads are too many");
  launch([&] { return concat("paged_attention of ", args.rows, " rows of ", args.heads, " heads of ", args.dim); },
         kernel,
         Grid{.blocks = static_cast<unsigned>(blocks),
              .threads = paged::kThreads,
              .smem_bytes = static_cast<unsigned>(smem_bytes),
              .overlap_launch = device_limits().wgmma},
         context, args, cut);
}

template <int kLanes, int kGroup>
void launch_float(const PagedAttentionArgs& args, const Cut& cut, const Context& context) {
  launch_kernel(paged::float_kernel<kLanes, kGroup>, paged::float_bytes<kGroup>(static_cast<int>(args.dim)), args, cut,
                context);
}

template <int kLanes>
void choose_group(const PagedAttentionArgs& args, int group, const Cut& cut, const Context& context) {
  if (group == 1) return launch_float<kLanes, 1>(args, cut, context);
  if (group == 4) return launch_float<kLanes, 4>(args, cut, context);
  launch_float<kLanes, 8>(args, cut, context);
}

template <typename T, int kDim>
void launch_mma(const PagedAttentionArgs& args, const Cut& cut, const Context& context) {
  launch_kernel(paged::mma_kernel<T, kDim>, paged::MmaLayout<kDim>::end, args, cut, context);
}

template <typename T>
void choose_dim(const PagedAttentionArgs& args, int group, const Cut& cut, const Context& context) {
  if constexpr (std::is_same_v<T, float>) {
    const int64_t packs = args.dim / paged::kEach;
    if (packs <= 8) return choose_group<8>(args, group, cut, context);
    if (packs <= 16) return choose_group<16>(args, group, cut, context);
    choose_group<32>(args, group, cut, context);
  } else {
    if (args.dim <= 64) return launch_mma<T, 64>(args, cut, context);
    if (args.dim <= 128) return launch_mma<T, 128>(args, cut, context);
    launch_mma<T, 256>(args, cut, context);
  }
}

}  // namespace

void paged_attention(const PagedAttentionArgs& args, const Context& context) {
  check_paged_attention(args);
  const DeviceLimits device = device_limits();
  const PagedAttentionPlan plan =
      paged_attention_plan(args.rows, args.heads, args.kv_heads, args.dim, args.row_pages * args.page_size, device);
  check(args.parts == plan.parts, "paged_attention: got workspace for ", args.parts, " parts, needs ", plan.parts);
  dispatch("paged_attention", args.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int64_t kPack = 16 / sizeof(T);
    check(args.dim % kPack == 0 && args.dim <= 32 * kPack, "paged_attention: heads have ", args.dim,
          " elements; on CUDA it must be a multiple of ", kPack, ", at most ", 32 * kPack);
    check(is_aligned(args.k_pages) && is_aligned(args.v_pages), "paged_attention: pages must lie on 16-byte borders");
    const float scale = static_cast<float>(args.scale);
    const Cut cut{static_cast<int>(args.heads / args.kv_heads), static_cast<int>(plan.blocks),
                  static_cast<int>(plan.parts), log2_of(args.page_size),
                  args.softcap > 0 ? scale : scale * paged::kLog2E};
    choose_dim<T>(args, plan.group, cut, context);
  });
}

}  // namespace fastpeft::cuda
