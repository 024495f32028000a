// NF4 products for any number of tokens on any GPU since Ampere, in both directions:
//   forward   y[m,n] = x[m,k] @ W[n,k]^T (+ bias),   backward   y[m,k] = x[m,n] @ W[n,k]   (x is dy, y is dx).
//
// Layout   W      codes and scales over the flattened (n, k) tensor (fastpeft/nf4.h), in blocks of any size
//          x, y   T, row-major; `outs` are the columns of y, `depth` is what is summed over
//          smem   tiles of x and W as panels of 64 columns: a row of a panel is 128 bytes, whose 16-byte chunks change
//                 places by row % 8, so that neither ldmatrix nor a store meets a bank twice
// Plan     A thread block owns a tile of tokens by outs and steps through the depth. Per step a thread holds the 32
//          codes of one run of a W row in registers, fetched steps ahead, and decodes it once into shared memory while
//          the tensor cores work on the tile before; x comes by cp.async. Both directions share the decoded tile
//          [n][k]: ldmatrix reads it as it lies or transposed. Few tokens get smaller tiles and deeper steps: the warps
//          divide the depth of a step, and their sums meet in shared memory at the end, in a fixed order.
// Limits   kFast: k % 64 == 0, blocks of 64 or more, depth % 8 == 0, x and codes at 16-byte boundaries. Otherwise the
//          same loop moves element by element. m, n and k below 2^30; no limit on their products.
// Numerics the weights of nf4_dequantize to the bit, sums in float32, the bias added there, one rounding to T.
// Source   fragment layouts: PTX ISA, mma.m16n8k16 and ldmatrix.
#pragma once

#include "common/integer.h"
#include "common/nf4_checks.h"
#include "common/nf4_levels.h"
#include "cuda/device/launch.cuh"
#include "cuda/device/nf4_decode.cuh"
#include "cuda/device/numbers.cuh"
#include "cuda/device/ptx.cuh"
#include "fastpeft/nf4.h"
#include "fastpeft/nf4_linear.h"

namespace fastpeft::cuda::nf4_mma {

struct Problem {
  NF4View w;
  const void* x;
  const void* bias;  // may be null
  void* y;
  int m, n, k;
  int block_shift;     // log2 of the block size
  bool paired_stores;  // pairs of outs lie at 4-byte boundaries of y
};

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kStages = 3;  // tiles of x in the ring
constexpr int kPanel = 64;  // columns of a panel
constexpr int kPanelRowBytes = 2 * kPanel;
constexpr int kRun = 32;                         // weights a thread decodes a step
constexpr int kTileBytes = 2 * kThreads * kRun;  // of a tile of W, and of x too
constexpr int kNestedMapBytes = 4 * 256;
constexpr int kSmemBytes = (2 + kStages) * kTileBytes + kNestedMapBytes;  // two blocks fill an A100's multiprocessor

// Sizes of a thread block's tile and how its eight warps divide it; of the depth, each takes 64 a step.
template <bool backward, int tokens, int outs, int token_warps, int out_warps, int ahead, int blocks = 2>
struct Tile {
  static constexpr bool kBackward = backward;
  static constexpr int kTokens = tokens, kOuts = outs, kTokenWarps = token_warps, kOutWarps = out_warps;
  static constexpr int kDepthWarps = kWarps / (token_warps * out_warps), kDepth = kDepthWarps * kPanel;
  static constexpr int kWarpTokens = tokens / token_warps, kWarpOuts = outs / out_warps;
  static constexpr int kRows = backward ? kDepth : outs, kColumns = backward ? outs : kDepth;  // of the tile of W
  static constexpr int kAhead = ahead;    // steps between the fetch of codes and their use, plus one
  static constexpr int kBlocks = blocks;  // that share a multiprocessor, if its shared memory allows
  static_assert(2 * kRows * kColumns == kTileBytes && 2 * tokens * kDepth <= kTileBytes);
  static_assert(kColumns % kPanel == 0 && kWarpTokens % 16 == 0 && kWarpOuts % 16 == 0 && ahead % 2 == 0);
};
template <bool kBackward>
using LargeTile = Tile<kBackward, 128, 128, 2, 4, 2>;
template <bool kBackward>
using MediumTile = Tile<kBackward, 64, 64, 2, 2, 4>;
template <bool kBackward>
using GeneralTile = Tile<kBackward, 64, 64, 2, 2, 2, 1>;  // of kFast = false
// Backward takes twice the outs, or it would use half of each 32-byte sector of codes.
template <bool kBackward>
using SmallTile = Tile<kBackward, 32, kBackward ? 64 : 32, 1, kBackward ? 4 : 2, 4>;

// Byte offset of chunk `column` / 8 in a tile of `rows` rows.
__device__ inline int tile_offset(int row, int column, int rows) {
  return (column / kPanel * rows + row) * kPanelRowBytes + ((column / 8 ^ row) % 8) * 16;
}

// --- weight ----------------------------------------------------------------------------------------------------------

struct Scale {
  uint32_t code;  // 8-bit scale, when double quantised
  float scale;    // its nested scale then, else the scale itself
};

__device__ inline Scale load_scale(const NF4View& w, int64_t block) {
  if (w.nested_absmax == nullptr) return {0, __ldg(static_cast<const float*>(w.absmax) + block)};
  return {__ldg(static_cast<const uint8_t*>(w.absmax) + block), __ldg(w.nested_absmax + block / kNestedBlock)};
}

__device__ inline float finish_scale(const NF4View& w, const Scale& scale, const float* nested_map, float offset) {
  if (w.nested_absmax == nullptr) return scale.scale;
  return __fadd_rn(mul_ftz(nested_map[scale.code], scale.scale), offset);
}

// What a thread fetches of the weight ahead of its decoding.
struct Run {
  uint4 codes;
  Scale scale;
};

__device__ inline Run fetch_run(const Problem& p, int row, int column) {
  if (row >= p.n || column >= p.k) return {uint4{0x77777777, 0x77777777, 0x77777777, 0x77777777}, {0, 0.0f}};  // zeros
  const int64_t first = static_cast<int64_t>(row) * p.k + column;
  return {__ldg(reinterpret_cast<const uint4*>(p.w.codes + first / 2)), load_scale(p.w, first >> p.block_shift)};
}

// Eight weights of any place, element by element; lane i of the warp brings level i % 16.
template <typename T>
__device__ inline uint4 decode_elements(const Problem& p, int row, int column, const float* nested_map, float offset,
                                        float level) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float values[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int64_t at = static_cast<int64_t>(row) * p.k + column + 2 * i + j;
      const bool present = row < p.n && column + 2 * i + j < p.k;
      const uint32_t byte = present ? p.w.codes[at / 2] : 0x77;
      const float scale = present ? finish_scale(p.w, load_scale(p.w, at >> p.block_shift), nested_map, offset) : 0.0f;
      values[j] = mul_ftz(__shfl_sync(0xffffffff, level, at % 2 == 0 ? byte >> 4 : byte & 15), scale);
    }
    pairs[i] = pack_pair<T>(values[0], values[1]);
  }
  return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

__device__ inline uint4 decode_eight(const LevelTable& table, uint32_t codes) {
  uint4 eight;
  look_up(table, codes, eight.x, eight.y);
  look_up(table, codes >> 16, eight.z, eight.w);
  return eight;
}

// --- x ---------------------------------------------------------------------------------------------------------------

// Starts the copy of x's tile at (token, column) into `to`; zeros where there is no x.
template <typename T, typename Tile, bool kFast>
__device__ inline void copy_x(char* to, const Problem& p, int token, int column) {
  constexpr int kRowChunks = Tile::kDepth / 8;
  const int depth = Tile::kBackward ? p.n : p.k;
  const int chunk = threadIdx.x % kRowChunks * 8;
  column += chunk;
#pragma unroll
  for (int i = 0; i < Tile::kTokens * kRowChunks / kThreads; ++i) {
    const int r = threadIdx.x / kRowChunks + i * (kThreads / kRowChunks);
    char* slot = to + tile_offset(r, chunk, Tile::kTokens);
    const bool present = token + r < p.m && column < depth;
    const T* from = static_cast<const T*>(p.x);
    if (present) from += static_cast<int64_t>(token + r) * depth + column;
    if constexpr (kFast) {
      copy_async_16(static_cast<uint32_t>(__cvta_generic_to_shared(slot)), from, present ? 16 : 0);
    } else {
      Pack<T, 8> pack;
#pragma unroll
      for (int j = 0; j < 8; ++j) pack.values[j] = present && column + j < depth ? from[j] : from_float<T>(0.0f);
      store_pack(reinterpret_cast<T*>(slot), pack);
    }
  }
}

// --- kernel ----------------------------------------------------------------------------------------------------------

template <typename T, typename Tile, bool kFast>
__global__ void __launch_bounds__(kThreads, Tile::kBlocks) kernel(const __grid_constant__ Problem p) {
  extern __shared__ __align__(128) char smem[];
  constexpr bool kBackward = Tile::kBackward;
  constexpr int kTokenUnits = Tile::kWarpTokens / 16, kOutPairs = Tile::kWarpOuts / 16;
  char* const w_tiles = smem;
  char* const x_tiles = smem + 2 * kTileBytes;
  float* const nested_map = reinterpret_cast<float*>(smem + (2 + kStages) * kTileBytes);
  const int outs = kBackward ? p.k : p.n, depth = kBackward ? p.n : p.k;
  const int steps = (depth + Tile::kDepth - 1) / Tile::kDepth;
  // Neighbouring blocks share x, which is four times the codes.
  const unsigned out_tiles = (outs + Tile::kOuts - 1) / Tile::kOuts;
  const int first_token = blockIdx.x / out_tiles * Tile::kTokens, first_out = blockIdx.x % out_tiles * Tile::kOuts;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_out = warp % Tile::kOutWarps * Tile::kWarpOuts;
  const int warp_token = warp / Tile::kOutWarps % Tile::kTokenWarps * Tile::kWarpTokens;
  const int warp_depth = warp / (Tile::kOutWarps * Tile::kTokenWarps) * kPanel;

  // The run of weights of this thread, in the tile of W: two threads a row of a panel.
  const int run_row = threadIdx.x / 2 % Tile::kRows;
  const int run_column = threadIdx.x / (2 * Tile::kRows) * kPanel + threadIdx.x % 2 * kRun;
  const int run_offset = tile_offset(run_row, run_column, Tile::kRows);
  const int w_row = run_row + (kBackward ? 0 : first_out), w_column = run_column + (kBackward ? first_out : 0);
  const auto row_at = [&](int step) { return w_row + (kBackward ? step * Tile::kDepth : 0); };
  const auto column_at = [&](int step) { return w_column + (kBackward ? 0 : step * Tile::kDepth); };
  [[maybe_unused]] Run runs[Tile::kAhead];  // runs[i] is of a step that is i modulo kAhead
  if constexpr (kFast) {
#pragma unroll
    for (int i = 0; i < Tile::kAhead; ++i) runs[i] = fetch_run(p, row_at(i), column_at(i));
  }
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    copy_x<T, Tile, kFast>(x_tiles + i * kTileBytes, p, first_token, i * Tile::kDepth);
    commit_async();
  }
  float offset = 0.0f;
  if (p.w.nested_absmax != nullptr) {
    nested_map[threadIdx.x] = __ldg(p.w.nested_map + threadIdx.x);
    offset = __ldg(p.w.offset);
  }
  __syncthreads();
  [[maybe_unused]] const float level = kFast ? 0.0f : nf4_level(lane % 16);

  // Chunk i of four of this thread's run for `step`, decoded into a tile of W.
  const auto table_of = [&](const Run& run) {
    return make_level_table<T>(finish_scale(p.w, run.scale, nested_map, offset));
  };
  const auto decode_chunk = [&](char* tile, int i, int step, const Run& run, const LevelTable& table) {
    uint4 eight;
    if constexpr (kFast) {
      eight = decode_eight(table, i == 0 ? run.codes.x : i == 1 ? run.codes.y : i == 2 ? run.codes.z : run.codes.w);
    } else {
      eight = decode_elements<T>(p, row_at(step), column_at(step) + 8 * i, nested_map, offset, level);
    }
    *reinterpret_cast<uint4*>(tile + (run_offset ^ 16 * i)) = eight;
  };
  {
    LevelTable table{};
    if constexpr (kFast) table = table_of(runs[0]);
#pragma unroll
    for (int i = 0; i < 4; ++i) decode_chunk(w_tiles, i, 0, runs[0], table);
  }

  // Where this lane's matrices lie: of x 16 tokens by 16 of depth, of W 16 outs by 16 of depth, or its transpose.
  const int r = lane % 8, upper_rows = lane / 8 % 2 * 8, upper_columns = lane / 16 * 8;
  const uint32_t x_lane = static_cast<uint32_t>(__cvta_generic_to_shared(x_tiles)) +
                          tile_offset(warp_token + upper_rows + r, warp_depth + upper_columns, Tile::kTokens);
  const uint32_t w_lane = static_cast<uint32_t>(__cvta_generic_to_shared(w_tiles)) +
                          (kBackward ? tile_offset(warp_depth + upper_rows + r, warp_out + upper_columns, Tile::kRows)
                                     : tile_offset(warp_out + upper_columns + r, warp_depth + upper_rows, Tile::kRows));

  float acc[kTokenUnits][2 * kOutPairs][4] = {};
  int x_slot = 0;
  for (int first = 0; first < steps; first += Tile::kAhead) {
#pragma unroll
    for (int u = 0; u < Tile::kAhead; ++u) {
      const int step = first + u;
      if (step >= steps) break;
      wait_async<kStages - 2>();
      __syncthreads();  // x and W of this step are complete, and all are done with the tiles filled next
      const int x_free = x_slot == 0 ? kStages - 1 : x_slot - 1;
      copy_x<T, Tile, kFast>(x_tiles + x_free * kTileBytes, p, first_token, (step + kStages - 1) * Tile::kDepth);
      commit_async();
      uint32_t x_here = x_lane + x_slot * kTileBytes, w_here = w_lane + u % 2 * kTileBytes;
      asm volatile(""
                   : "+r"(x_here), "+r"(w_here));  // or the addresses of all i are kept in registers through the loop
      LevelTable table{};
      const Run& next = runs[(u + 1) % Tile::kAhead];
      if constexpr (kFast) {
        runs[u] = fetch_run(p, row_at(step + Tile::kAhead), column_at(step + Tile::kAhead));
        table = table_of(next);
      }
#pragma unroll
      for (int i = 0; i < kPanel / 16; ++i) {
        uint32_t x[kTokenUnits][4], w[kOutPairs][4];
#pragma unroll
        for (int j = 0; j < kOutPairs; ++j) {
          load_matrices<kBackward>(w[j], kBackward ? (w_here ^ 32 * j) + 16 * kPanelRowBytes * i
                                                   : (w_here ^ 32 * i) + 16 * kPanelRowBytes * j);
        }
#pragma unroll
        for (int j = 0; j < kTokenUnits; ++j) {
          load_matrices<false>(x[j], (x_here ^ 32 * i) + 16 * kPanelRowBytes * j);
        }
#pragma unroll
        for (int j = 0; j < kTokenUnits; ++j) {
#pragma unroll
          for (int l = 0; l < 2 * kOutPairs; ++l) {
            mma_m16n8k16<T>(acc[j][l], x[j], w[l / 2][l % 2 * 2], w[l / 2][l % 2 * 2 + 1]);
          }
        }
        decode_chunk(w_tiles + (u + 1) % 2 * kTileBytes, i, step + 1, next, table);
      }
      x_slot = x_slot + 1 == kStages ? 0 : x_slot + 1;
    }
  }

  if constexpr (Tile::kDepthWarps > 1) {
    constexpr int kGroup = kThreads / Tile::kDepthWarps, kSums = kTokenUnits * kOutPairs * 8;
    static_assert(4 * (kThreads - kGroup) * kSums <= kSmemBytes);
    float* const sums = &acc[0][0][0];
    float* const partial = reinterpret_cast<float*>(smem) + threadIdx.x % kGroup;
    const int group = threadIdx.x / kGroup;
    wait_async<0>();  // or zeros copied past the end of x would land on the sums
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      if (group > 0) partial[((group - 1) * kSums + i) * kGroup] = sums[i];
    }
    __syncthreads();
    if (group > 0) return;
#pragma unroll
    for (int i = 0; i < (Tile::kDepthWarps - 1) * kSums; ++i) sums[i % kSums] += partial[i * kGroup];
  }

  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int l = 0; l < 2 * kOutPairs; ++l) {
    const int out = first_out + warp_out + 8 * l + 2 * t;
    if (out >= outs) continue;
    const bool second = out + 1 < outs;
    const T* const bias = static_cast<const T*>(p.bias);
    const float bias0 = bias == nullptr ? 0.0f : to_float(bias[out]);
    const float bias1 = bias == nullptr || !second ? 0.0f : to_float(bias[out + 1]);
#pragma unroll
    for (int i = 0; i < 2 * kTokenUnits; ++i) {
      const int token = first_token + warp_token + 8 * i + g;
      if (token >= p.m) continue;
      T* const to = static_cast<T*>(p.y) + static_cast<int64_t>(token) * outs + out;
      const float y0 = acc[i / 2][l][i % 2 * 2] + bias0, y1 = acc[i / 2][l][i % 2 * 2 + 1] + bias1;
      if (p.paired_stores) {
        *reinterpret_cast<uint32_t*>(to) = pack_pair<T>(y0, y1);
      } else {
        to[0] = from_float<T>(y0);
        if (second) to[1] = from_float<T>(y1);
      }
    }
  }
}

// --- launcher --------------------------------------------------------------------------------------------------------

template <typename Tile>
int64_t tile_count(const Problem& p) {
  return ceil_div(p.m, Tile::kTokens) * ceil_div(Tile::kBackward ? p.k : p.n, Tile::kOuts);
}

template <typename T, typename Tile, bool kFast>
void launch_tile(const Problem& p, const Context& context) {
  launch(
      [&] {
        return concat("nf4_linear, ", Tile::kBackward ? "backward" : "forward", ", of m = ", p.m, ", n = ", p.n,
                      ", k = ", p.k, ", mma with tiles of ", Tile::kTokens, " by ", Tile::kOuts);
      },
      kernel<T, Tile, kFast>, Grid{static_cast<unsigned>(tile_count<Tile>(p)), kThreads, kSmemBytes}, context, p);
}

template <typename T, bool kBackward>
void choose_tile(const Problem& p, bool fast, const Context& context) {
  if (!fast) return launch_tile<T, GeneralTile<kBackward>, false>(p, context);
  if (p.m <= SmallTile<kBackward>::kTokens) return launch_tile<T, SmallTile<kBackward>, true>(p, context);
  // Large tiles decode half as often; medium ones reach more multiprocessors.
  if (4 * tile_count<LargeTile<kBackward>>(p) >= 3 * device_limits().sms) {
    return launch_tile<T, LargeTile<kBackward>, true>(p, context);
  }
  return launch_tile<T, MediumTile<kBackward>, true>(p, context);
}

// The plan has seen to sizes below 2^30: indices of a tile past the end stay within 32 bits.
inline Problem make_problem(const NF4LinearArgs& args, bool backward) {
  const int block_shift = log2_of(args.w.block_size);
  const bool paired = (backward ? args.k : args.n) % 2 == 0 && reinterpret_cast<uintptr_t>(args.y) % 4 == 0;
  return {args.w,
          args.x,
          args.bias,
          args.y,
          static_cast<int>(args.m),
          static_cast<int>(args.n),
          static_cast<int>(args.k),
          block_shift,
          paired};
}

inline bool is_fast(const NF4LinearArgs& args, bool backward) {
  return args.k % kPanel == 0 && args.w.block_size >= kPanel && (!backward || args.n % 8 == 0) && is_aligned(args.x) &&
         is_aligned(args.w.codes);
}

template <typename T>
void launch_mma(const NF4LinearArgs& args, const Context& context) {
  const Problem problem = make_problem(args, args.transposed);
  const bool fast = is_fast(args, args.transposed);
  return args.transposed ? choose_tile<T, true>(problem, fast, context) : choose_tile<T, false>(problem, fast, context);
}

}  // namespace fastpeft::cuda::nf4_mma
