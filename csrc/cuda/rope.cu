// Rotary embedding on CUDA: queries and keys in one launch, forward and backward by the same kernel.
//
// Plan     A thread owns the same columns, 16 bytes of each half, of four heads of one token, so that it reads their
//          angles once. The heads of q and of k are numbered through; neighbouring threads have neighbouring columns,
//          then neighbouring heads, which lie side by side where q is a view of [batch, tokens, heads, dim]. Columns
//          that pass through are copied by threads of their own, two packs each.
// Limits   The vector kernel needs every pointer and stride on the 16-byte grid and whole packs in each half; the same
//          kernel with packs of one element takes the rest.
#include "fastpeft/rope.h"

#include <algorithm>
#include <type_traits>

#include "common/integer.h"
#include "common/rope_checks.h"
#include "cuda/device/launch.cuh"
#include "cuda/device/numbers.cuh"
#include "cuda/device/ptx.cuh"

namespace fastpeft::cuda {
namespace {

constexpr int kHeads = 4;  // of a thread
constexpr int kMostThreads = 128;
constexpr int kBlocksAnSm = 5;  // 80 KB of loads under way

// How the threads of a block lie over tokens; a token has groups * columns of them.
struct Split {
  unsigned groups;   // of heads
  unsigned columns;  // packs of a half, then pairs of packs that pass through
  unsigned tokens_per_block, blocks_per_token;
};

// --- kernel ----------------------------------------------------------------------------------------------------------

template <typename T, int kN>
__device__ Pack<T, kN> load_once(bool wanted, const T* from) {
  if constexpr (kN * sizeof(T) % 16 == 0) {
    return load_pack_once_if<T, kN>(wanted, from);
  } else {
    static_assert(kN == 1);
    return {wanted ? *from : T{}};
  }
}

// Angles are shared by the heads of a token: they go through L1.
template <typename A, int kN>
__device__ Pack<A, kN> load_angles(bool wanted, const A* from) {
  if constexpr (kN * sizeof(A) % 16 == 0) {
    return load_pack_if<A, kN>(wanted, from);
  } else {
    static_assert(kN == 1);
    return {wanted ? *from : A{}};
  }
}

template <typename T, int kN>
__device__ void store(bool wanted, T* to, const Pack<T, kN>& pack) {
  if constexpr (kN * sizeof(T) % 16 == 0) {
    store_pack_if(wanted, to, pack);
  } else if (wanted) {
    *to = pack.values[0];
  }
}

// The heads of q and then those of k at one token, numbered through.
template <typename T>
struct Heads {
  T *q, *k;
  int q_stride, k_stride;
  unsigned q_heads;

  __device__ T* operator[](unsigned head) const {
    const bool of_q = head < q_heads;
    return (of_q ? q : k) + static_cast<int64_t>(static_cast<int>(head)) * (of_q ? q_stride : k_stride);
  }
};

template <typename T, typename A, int kN, bool kBackward>
__global__ void __launch_bounds__(kMostThreads, kBlocksAnSm)
    rope_kernel(const __grid_constant__ RopeArgs args, const __grid_constant__ Split split) {
  let_next_kernel_start();
  wait_for_kernel_before();
  const unsigned of_token = split.groups * split.columns, tokens = static_cast<unsigned>(args.tokens);
  unsigned block_token = blockIdx.x, item = threadIdx.x, place = 0;
  if (split.blocks_per_token > 1) {
    block_token = blockIdx.x / split.blocks_per_token;
    item += blockIdx.x % split.blocks_per_token * blockDim.x;
  } else {
    place = item / of_token;
    item -= place * of_token;
  }
  const unsigned index = block_token * split.tokens_per_block + place;
  if (place >= split.tokens_per_block || item >= of_token || index >= args.batch * args.tokens) return;
  const unsigned sample = index / tokens, token = index % tokens;
  const unsigned group = item / split.columns, column = item % split.columns;

  const unsigned rotary = static_cast<unsigned>(args.rotary), half = rotary / 2;
  const bool rotates = column < half / kN;
  const unsigned passed = rotary + 2 * (column - half / kN) * kN;
  const unsigned first = rotates ? column * kN : passed;
  const unsigned second = rotates ? half + column * kN : passed + kN;
  const bool has_second = second < args.dim;

  const unsigned q_heads = static_cast<unsigned>(args.q.heads), heads = q_heads + static_cast<unsigned>(args.k.heads);
  const auto in_of = [&](const RopeTensor& t) {
    return static_cast<const T*>(t.in) + sample * t.in_batch_stride + token * t.in_token_stride;
  };
  const auto out_of = [&](const RopeTensor& t) {
    return static_cast<T*>(t.out) + sample * t.out_batch_stride + token * t.out_token_stride;
  };
  const Heads<const T> in{in_of(args.q), in_of(args.k) - q_heads * args.k.in_head_stride,
                          static_cast<int>(args.q.in_head_stride), static_cast<int>(args.k.in_head_stride), q_heads};
  Pack<T, kN> a[kHeads], b[kHeads];
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const unsigned head = group + i * split.groups;
    a[i] = load_once<T, kN>(head < heads, in[head] + first);
    b[i] = load_once<T, kN>(head < heads && has_second, in[head] + second);
  }
  // Columns that pass through read the first angles and drop them.
  const A* cos =
      static_cast<const A*>(args.cos.values) + sample * args.cos.batch_stride + token * args.cos.token_stride;
  const A* sin =
      static_cast<const A*>(args.sin.values) + sample * args.sin.batch_stride + token * args.sin.token_stride;
  const unsigned angle_a = rotates ? first : 0, angle_b = rotates ? second : 0;
  const bool any = half > 0;
  auto cos_a = load_angles<A, kN>(any, cos + angle_a), cos_b = load_angles<A, kN>(any, cos + angle_b);
  // Backward is the transposed map: the sines change places and signs.
  auto sin_a = load_angles<A, kN>(any, sin + (kBackward ? angle_b : angle_a));
  auto sin_b = load_angles<A, kN>(any, sin + (kBackward ? angle_a : angle_b));
  const Heads<T> out{out_of(args.q), out_of(args.k) - q_heads * args.k.out_head_stride,
                     static_cast<int>(args.q.out_head_stride), static_cast<int>(args.k.out_head_stride), q_heads};
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    if constexpr (kN > 1) {
      keep_packed(cos_a), keep_packed(cos_b), keep_packed(sin_a), keep_packed(sin_b);
      keep_packed(a[i]), keep_packed(b[i]);
    }
    if (rotates) {
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const float x = to_float(a[i].values[j]), y = to_float(b[i].values[j]);
        // Spelled out, as paged_attention.cu rotates to the same bits.
        const float x_sin = __fmul_rn(x, to_float(sin_b.values[j])), y_sin = __fmul_rn(y, to_float(sin_a.values[j]));
        a[i].values[j] = from_float<T>(fmaf(x, to_float(cos_a.values[j]), kBackward ? y_sin : -y_sin));
        b[i].values[j] = from_float<T>(fmaf(y, to_float(cos_b.values[j]), kBackward ? -x_sin : x_sin));
      }
    }
    const unsigned head = group + i * split.groups;
    store(head < heads, out[head] + first, a[i]);
    store(head < heads && has_second, out[head] + second, b[i]);
  }
}

// --- launcher --------------------------------------------------------------------------------------------------------

void check_strides(const RopeTensor& tensor) {
  check(std::max(tensor.in_head_stride, tensor.out_head_stride) <= INT32_MAX, "rope: heads are ", tensor.in_head_stride,
        " elements apart; at most 2^31 - 1 are supported");
}

template <typename T>
bool fits_packs(const RopeTensor& tensor) {
  const int64_t strides = tensor.in_batch_stride | tensor.in_head_stride | tensor.in_token_stride |
                          tensor.out_batch_stride | tensor.out_head_stride | tensor.out_token_stride;
  return is_aligned(tensor.in) && is_aligned(tensor.out) && strides % (16 / sizeof(T)) == 0;
}

template <typename A>
bool fits_packs(const RopeAngles& angles) {
  return is_aligned(angles.values) && (angles.batch_stride | angles.token_stride) % (16 / sizeof(A)) == 0;
}

template <typename T, typename A, int kN>
void launch_rope(const RopeArgs& args, const Context& context) {
  const int64_t heads = args.q.heads + args.k.heads;
  const int64_t passed = ceil_div(args.dim - args.rotary, 2 * kN);
  const int64_t columns = args.rotary / 2 / kN + passed, groups = ceil_div(heads, kHeads);
  const int64_t of_token = groups * columns, tokens = args.batch * args.tokens;
  if (of_token == 0 || tokens == 0) return;
  const int64_t tokens_per_block = std::max<int64_t>(1, kMostThreads / of_token);
  const int64_t blocks_per_token = ceil_div(of_token, kMostThreads);
  const int64_t blocks = ceil_div(tokens, tokens_per_block) * blocks_per_token;
  check(blocks <= INT32_MAX, "rope: ", tokens, " tokens of ", heads, " x ", args.dim,
        " elements are too many for one call");
  const Split split{static_cast<unsigned>(groups), static_cast<unsigned>(columns),
                    static_cast<unsigned>(tokens_per_block), static_cast<unsigned>(blocks_per_token)};
  const int64_t used = std::min<int64_t>(kMostThreads, tokens_per_block * of_token);
  launch([&] { return concat("rope of ", tokens, " tokens of ", heads, " heads of ", args.dim); },
         args.backward ? rope_kernel<T, A, kN, true> : rope_kernel<T, A, kN, false>,
         Grid{.blocks = static_cast<unsigned>(blocks),
              .threads = static_cast<unsigned>(ceil_div(used, 32) * 32),
              .overlap_launch = device_limits().wgmma},
         context, args, split);
}

}  // namespace

void rope(const RopeArgs& args, const Context& context) {
  check_rope(args);
  check_strides(args.q);
  check_strides(args.k);
  dispatch("rope", args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto run = [&](auto angle_zero) {
      using A = decltype(angle_zero);
      constexpr int kN = 16 / static_cast<int>(sizeof(T));
      const bool packs = args.rotary % (2 * kN) == 0 && args.dim % kN == 0 && fits_packs<T>(args.q) &&
                         fits_packs<T>(args.k) && fits_packs<A>(args.cos) && fits_packs<A>(args.sin);
      if (packs) {
        launch_rope<T, A, kN>(args, context);
      } else {
        launch_rope<T, A, 1>(args, context);
      }
    };
    if (args.angle_dtype == args.dtype) {
      run(zero);
    } else {
      run(float{});
    }
  });
}

}  // namespace fastpeft::cuda
