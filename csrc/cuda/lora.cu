// Launches the small products of a LoRA linear (lora_*_kernel.cuh), and checks what they are given.
//
// Limits   k % 8 == 0 and n % 8 == 0, rows at 16-byte boundaries, sizes below 2^30. Ranks beyond what a kernel holds
//          go by slices, each with a pass of its own.
#include "fastpeft/lora.h"

#include "cuda/device/launch.cuh"
#include "cuda/device/tensor_map.cuh"
#include "cuda/lora_backward_kernel.cuh"
#include "cuda/lora_backward_tma_kernel.cuh"
#include "cuda/lora_cast.cuh"
#include "cuda/lora_gradient_kernel.cuh"
#include "cuda/lora_plan.h"
#include "cuda/lora_project_kernel.cuh"
#include "cuda/lora_project_tma_kernel.cuh"

namespace fastpeft::cuda {
namespace {

void check_sizes(const char* function, int64_t m, int64_t columns, const char* name, double p) {
  constexpr int64_t kMostSize = 1 << 30;
  check(m >= 0 && columns > 0 && m < kMostSize && columns < kMostSize && columns % 8 == 0, function, ": m is ", m,
        " and ", name, " is ", columns, "; needs sizes below 2^30, and ", name, " a multiple of 8");
  check(p >= 0.0 && p <= kMostFusedDropout, function, ": p is ", p, "; it must be at least 0 and at most ",
        kMostFusedDropout);
}

void check_aligned(const char* function, std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers) {
    check(is_aligned(pointer), function, ": a 16-bit matrix is not aligned to 16 bytes");
  }
}

// --- down-projection -------------------------------------------------------------------------------------------------

template <typename T, int kTiles, bool kDropout>
void launch_project(const lora_xa::Problem& p, const lora_xa::Plan& plan, DType dtype, const Context& context) {
  const auto what = [&] { return concat("lora_project of m = ", p.m, ", k = ", p.k, ", rank ", p.r); };
  if (device_limits().wgmma) {
    launch(what, lora_xa::tma_kernel<T, kTiles, kDropout>,
           Grid{.blocks = static_cast<unsigned>(plan.blocks),
                .threads = lora_xa::TmaConfig<kTiles>::kTmaThreads,
                .smem_bytes = lora_xa::TmaConfig<kTiles>::kBytes,
                .cluster = static_cast<unsigned>(plan.cluster),
                .overlap_launch = true},
           context, activation_map(dtype, p.x, p.m, p.k, lora_xa::kTokens),
           activation_map(dtype, p.a, p.r, p.k, lora_xa::TmaConfig<kTiles>::kRank), p);
  } else {
    launch(what, lora_xa::kernel<T, kTiles, kDropout>,
           Grid{.blocks = static_cast<unsigned>(plan.blocks),
                .threads = lora_xa::kThreads,
                .smem_bytes = lora_xa::Config<kTiles>::kBytes},
           context, p);
  }
}

template <typename T, int kTiles>
void launch_project(const lora_xa::Problem& p, const lora_xa::Plan& plan, DType dtype, const Context& context) {
  if (p.mask.threshold_twice != 0) {
    launch_project<T, kTiles, true>(p, plan, dtype, context);
  } else {
    launch_project<T, kTiles, false>(p, plan, dtype, context);
  }
}

template <typename T>
void choose_project(const lora_xa::Problem& p, const lora_xa::Plan& plan, DType dtype, const Context& context) {
  if (p.r <= 16) return launch_project<T, 2>(p, plan, dtype, context);
  if (p.r <= 32) return launch_project<T, 4>(p, plan, dtype, context);
  return launch_project<T, 8>(p, plan, dtype, context);
}

template <typename T>
void cast(const lora_cast::Segments& segments, const Context& context) {
  Grid grid = cover(lora_cast::total(segments), lora_cast::kThreads, lora_cast::kThreads);
  grid.overlap_launch = device_limits().wgmma;
  launch([&] { return concat("lora: copies of ", segments.count, " matrices"); }, lora_cast::kernel<T>, grid, context,
         segments);
}

// --- backward --------------------------------------------------------------------------------------------------------

template <typename T, int kRank>
void launch_backward(const lora_dy::Problem& p, const lora_dy::Finish& f, DType dtype, const Context& context) {
  const bool overlap = device_limits().wgmma;
  const auto what = [&] { return concat("lora_backward of m = ", p.m, ", n = ", p.n, ", rank ", p.r); };
  const auto blocks = static_cast<unsigned>(p.plan.column_blocks * p.plan.slabs);
  if (device_limits().wgmma) {
    using C = lora_dy::TmaConfig<kRank>;
    launch(what, lora_dy::tma_kernel<T, kRank>,
           Grid{.blocks = blocks,
                .threads = lora_dy::kTmaThreads,
                .smem_bytes = C::kBytes,
                .cluster = static_cast<unsigned>(p.plan.cluster),
                .overlap_launch = true},
           context, activation_map(dtype, p.dy, p.m, p.n, lora_dy::kTmaTokens),
           tensor_map(map_type(dtype), 2, C::kXaSwizzle, p.xa, p.m, static_cast<int>(padded_rank(p.r)),
                      lora_dy::kTmaTokens, kRank, p.xa_pitch),
           p);
  } else {
    launch(what, lora_dy::kernel<T, kRank>,
           Grid{.blocks = blocks, .threads = lora_dy::kThreads, .smem_bytes = lora_dy::Config<kRank>::kBytes}, context,
           p);
  }
  Grid grid = cover((f.m + f.n) * (kRank / 4), lora_dy::kFinishThreads, lora_dy::kFinishThreads);
  grid.overlap_launch = overlap;
  launch(what, lora_dy::finish_kernel<T>, grid, context, f);
}

// --- gradient by A ---------------------------------------------------------------------------------------------------

template <typename T, int kRank>
void launch_gradient(const lora_da::Problem& p, const Context& context) {
  const auto go = [&](auto kernel) {
    launch([&] { return concat("lora_gradient of m = ", p.m, ", k = ", p.k, ", rank ", p.r); }, kernel,
           Grid{.blocks = static_cast<unsigned>(p.plan.blocks),
                .threads = lora_da::kThreads,
                .smem_bytes = lora_da::Config<kRank>::kBytes,
                .overlap_launch = device_limits().wgmma},
           context, p);
  };
  if (p.mask.threshold_twice != 0) {
    go(lora_da::kernel<T, kRank, true>);
  } else {
    go(lora_da::kernel<T, kRank, false>);
  }
}

}  // namespace

void lora_project(const LoraProjectArgs& args, const Context& context) {
  check_sizes("lora_project", args.m, args.k, "k", args.p);
  check(args.count >= 1 && args.count <= kMostAdapters, "lora_project: ", args.count, " adapters; needs 1 to ",
        kMostAdapters);
  check_aligned("lora_project", {args.x, args.a16, args.xa});
  dispatch_16bit("lora_project", args.dtype, [&](auto zero) {
    using T = decltype(zero);
    lora_cast::Segments segments{};
    int64_t rank = 0;
    for (int64_t i = 0; i < args.count; ++i) {
      const LoraAdapter& a = args.adapters[i];
      const int64_t padded = padded_rank(a.r);
      check(a.r >= 1, "lora_project: adapter ", i, " has rank ", a.r);
      lora_cast::append(segments, a.a, static_cast<T*>(args.a16) + rank * args.k, a.r, args.k, padded);
      rank += padded;
    }
    cast<T>(segments, context);
    if (args.m == 0) return;
    const lora_xa::Plan plan = lora_xa::make_plan(args.m, args.k, device_limits());
    for (int64_t first = 0; first < rank; first += lora_xa::kMostRank) {
      lora_xa::Problem p{};
      p.x = args.x;
      p.a = static_cast<const T*>(args.a16) + first * args.k;
      p.xa = static_cast<T*>(args.xa) + first;
      p.m = static_cast<int>(args.m), p.k = static_cast<int>(args.k);
      p.r = static_cast<int>(std::min<int64_t>(rank - first, lora_xa::kMostRank));
      p.xa_pitch = static_cast<int>(rank);
      p.mask = make_mask(args.p, args.seed);
      p.tiles = plan.tiles, p.chunks = plan.chunks;
      choose_project<T>(p, plan, args.dtype, context);
    }
  });
}

void lora_backward(const LoraBackwardArgs& args, const Context& context) {
  const LoraAdapter& a = args.adapter;
  check_sizes("lora_backward", args.m, a.n, "n", 0.0);
  check(a.r >= 1 && args.xa_pitch % 8 == 0 && args.dxa_pitch % 8 == 0, "lora_backward: rank ", a.r,
        ", rows of xa and dxa every ", args.xa_pitch, " and ", args.dxa_pitch, " elements; needs multiples of 8");
  check_aligned("lora_backward", {args.dy, args.xa, args.dxa, args.workspace});
  const lora_dy::Plan plan = lora_dy::make_plan(std::max<int64_t>(args.m, 1), a.n, device_limits());
  const int64_t needed = lora_dy::workspace_bytes(plan, args.m, a.n, a.r);
  check(args.workspace_bytes >= needed, "lora_backward: the workspace has ", args.workspace_bytes, " bytes; needs ",
        needed);
  check(args.m > 0, "lora_backward: m is 0; there is nothing to sum");
  dispatch_16bit("lora_backward", args.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t first = 0; first < a.r; first += lora_dy::kMostRank) {
      const int64_t r = std::min<int64_t>(a.r - first, lora_dy::kMostRank);
      const int64_t stored = lora_dy::stored_rank(r);
      lora_dy::Problem p{};
      p.dy = args.dy;
      p.b = a.b + first;
      p.xa = static_cast<const T*>(args.xa) + first;
      p.m = static_cast<int>(args.m), p.n = static_cast<int>(a.n), p.r = static_cast<int>(r);
      p.b_pitch = static_cast<int>(a.r), p.xa_pitch = static_cast<int>(args.xa_pitch);
      p.dxa_parts = static_cast<float*>(args.workspace);
      const int dxa_parts = plan.column_blocks / plan.cluster;
      p.db_parts = p.dxa_parts + dxa_parts * args.m * stored;
      p.plan = plan;
      lora_dy::Finish f{};
      f.dxa_parts = p.dxa_parts, f.db_parts = p.db_parts;
      f.m = args.m, f.n = a.n, f.rank = static_cast<int>(stored), f.r = p.r;
      f.dxa_width = static_cast<int>(padded_rank(r));
      f.column_blocks = dxa_parts, f.slabs = plan.slabs;
      f.scale = static_cast<float>(a.scale);
      f.dxa = static_cast<T*>(args.dxa) + first, f.dxa_pitch = static_cast<int>(args.dxa_pitch);
      f.db = args.db + first, f.db_pitch = static_cast<int>(a.r);
      switch (stored) {
        case 16: launch_backward<T, 16>(p, f, args.dtype, context); break;
        case 32: launch_backward<T, 32>(p, f, args.dtype, context); break;
        default: launch_backward<T, 64>(p, f, args.dtype, context); break;
      }
    }
  });
}

void lora_gradient(const LoraGradientArgs& args, const Context& context) {
  check_sizes("lora_gradient", args.m, args.k, "k", args.p);
  check(args.count >= 1 && args.count <= kMostAdapters, "lora_gradient: ", args.count, " adapters; needs 1 to ",
        kMostAdapters);
  check_aligned("lora_gradient", {args.x, args.dxa, args.workspace});
  check(args.m > 0, "lora_gradient: m is 0; there is nothing to sum");
  int64_t rank = 0;
  for (int64_t i = 0; i < args.count; ++i) {
    check(args.r[i] >= 1 && is_aligned(args.da[i]), "lora_gradient: gradient ", i, " has rank ", args.r[i],
          ", or is not aligned to 16 bytes");
    rank += padded_rank(args.r[i]);
  }
  const lora_da::Plan plan = lora_da::make_plan(args.m, args.k, device_limits());
  const int64_t needed = lora_da::workspace_bytes(plan, rank);
  check(args.workspace_bytes >= needed, "lora_gradient: the workspace has ", args.workspace_bytes, " bytes; needs ",
        needed);
  dispatch_16bit("lora_gradient", args.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t first = 0; first < rank; first += lora_da::kMostRank) {
      lora_da::Problem p{};
      p.x = args.x;
      p.dxa = static_cast<const T*>(args.dxa) + first;
      p.m = static_cast<int>(args.m), p.k = static_cast<int>(args.k);
      p.r = static_cast<int>(std::min<int64_t>(rank - first, lora_da::kMostRank));
      p.dxa_pitch = static_cast<int>(rank);
      p.mask = make_mask(args.p, args.seed);
      p.plan = plan;
      p.parts = static_cast<float*>(args.workspace), p.counters = args.counters;
      int64_t row = -first;  // of an adapter's first, among this launch's
      for (int64_t i = 0; i < args.count; ++i) {
        p.rows.to[i] = args.da[i];
        p.rows.first[i] = static_cast<int>(row), p.rows.end[i] = static_cast<int>(row + args.r[i]);
        row += padded_rank(args.r[i]);
      }
      if (p.r <= 16) {
        launch_gradient<T, 16>(p, context);
      } else if (p.r <= 32) {
        launch_gradient<T, 32>(p, context);
      } else {
        launch_gradient<T, 64>(p, context);
      }
    }
  });
}

}  // namespace fastpeft::cuda
