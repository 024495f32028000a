// How the NF4 product is cut up: tiles, waves, the ring of decoded blocks and the numbers in its counters. No CUDA: the
// kernels, the launcher and the host simulation all take their arithmetic from here.
//
// Tile     128 rows of out x 256 tokens x 64 of depth (a step). Forward: out = n, depth = k; backward: out = k, depth =
//          n.
// Strip    128 rows of out; chunk: 256 of depth (4 steps); block: a strip's chunk, decoded to 64 KB of bf16 in one slot
//          of the ring.
// Unit     a tile's whole sum, taken by one seat (a thread block, or a cluster of two with neighbouring strips and the
//          same tokens).
// Wave     as many units as there are seats. Its blocks follow each other chunk by chunk, strip by strip, so that all
//          seats find their next block decoded when they need it and the ring's length bounds how far the decoders run
//          ahead. A strip that two waves share is decoded in both: the ring then never has to keep anything from one
//          wave to the next, whatever the depth.
// Split    when the last wave leaves most seats empty, its units are cut in `split` parts of equal depth; part 0 adds
//          the others' sums in their order, so the result does not depend on timing.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define LAB_HD __host__ __device__ __forceinline__
#else
#define LAB_HD inline
#endif

namespace lab {

constexpr int kTileOut = 128, kTileTokens = 256, kStep = 64;
constexpr int kChunkSteps = 4, kChunk = kChunkSteps * kStep;
constexpr int kStages = 4;
constexpr int kItems = 8;        // a block is decoded by eight warps, an item each
constexpr int kDecodeWarps = 3;  // a thread block
constexpr uint32_t kTileBytes = kTileOut * kStep * 2, kSlotBytes = kChunkSteps * kTileBytes;
constexpr int kMaxSlots = 512;
constexpr uint32_t kPartialBytes = kTileOut * kTileTokens * 4;

// A slot's counters only grow within a launch. `ready` counts items decoded into it, `done` the readers that are
// through with it; the first reader of a block adds what makes every block's readers sum to kReaders, so that neither
// depends on how many there are.
constexpr int kReaders = 4096;
LAB_HD int ready_target(int occupancy) { return kItems * (occupancy + 1); }
LAB_HD int done_target(int occupancy) { return kReaders * occupancy; }

// Workspace: counters (32 bytes apart), then partial sums, then the ring. The caller zeroes the counters once; every
// launch leaves them zero.
constexpr int kCounterWords = 8;
constexpr int kReadyWord = 0, kDoneWord = kMaxSlots * kCounterWords, kTicketWord = 2 * kMaxSlots * kCounterWords;
constexpr int kPartialFlagWord = kTicketWord + kCounterWords, kMaxPartials = 160;
constexpr uint32_t kHeaderBytes = 65536;
static_assert((kPartialFlagWord + 2 * kMaxPartials * kCounterWords) * 4 <= static_cast<int>(kHeaderBytes));

struct Plan {
  int m, out, depth;
  int cluster;                   // thread blocks a seat
  int grid;                      // thread blocks
  int strip_units, token_tiles;  // strips by seat, token tiles
  int group;                     // token tiles walked together: a strip is decoded once for each group
  int steps, chunks;             // of the depth
  int units, waves;
  int split;  // parts of the last wave's units
  int slots;  // ring
};

struct Wave {
  int first, count;         // units
  int parts, chunks;        // chunks a part
  int first_strip, strips;  // in the order of the walk, where every group has its own strip_units of them
  int columns;              // blocks of one chunk
};

struct Work {
  bool any;
  int strip_unit, token_tile, part;
  int chunk, steps;  // first chunk, steps in all
  int column;        // of the seat's first thread block
  int weight;        // added to `done`
  int tail;          // unit within its wave
};

LAB_HD int min_int(int a, int b) { return a < b ? a : b; }
LAB_HD int ceil_div(int a, int b) { return (a + b - 1) / b; }

struct WalkUnit {
  int strip, token_tile;  // strip in the order of the walk
  int begin, size;        // the strip's units
};
LAB_HD WalkUnit walk(const Plan& p, int unit) {
  const int per_group = p.group * p.strip_units, g = unit / per_group;
  WalkUnit u;
  u.size = min_int(p.group, p.token_tiles - g * p.group);
  const int s = (unit - g * per_group) / u.size;
  u.strip = g * p.strip_units + s;
  u.begin = g * per_group + s * u.size;
  u.token_tile = g * p.group + unit - u.begin;
  return u;
}

LAB_HD Wave wave_of(const Plan& p, int w) {
  const int seats = p.grid / p.cluster;
  Wave v;
  v.first = w * seats;
  v.count = min_int(seats, p.units - v.first);
  v.parts = w == p.waves - 1 ? p.split : 1;
  v.chunks = p.chunks / v.parts;
  v.first_strip = walk(p, v.first).strip;
  v.strips = walk(p, v.first + v.count - 1).strip - v.first_strip + 1;
  v.columns = v.strips * v.parts * p.cluster;
  return v;
}

LAB_HD Work work_of(const Plan& p, const Wave& v, int seat) {
  Work k;
  k.any = seat < v.count * v.parts;
  if (!k.any) return k;
  k.part = seat / v.count;
  k.tail = seat % v.count;
  const int unit = v.first + k.tail;
  const WalkUnit u = walk(p, unit);
  k.strip_unit = u.strip % p.strip_units;
  k.token_tile = u.token_tile;
  k.chunk = k.part * v.chunks;
  k.steps = min_int(p.steps, (k.chunk + v.chunks) * kChunkSteps) - k.chunk * kChunkSteps;
  k.column = (k.part * v.strips + u.strip - v.first_strip) * p.cluster;
  const int begin = u.begin > v.first ? u.begin : v.first;
  const int readers = min_int(u.begin + u.size, v.first + v.count) - begin;
  k.weight = unit == begin ? kReaders - (readers - 1) : 1;
  return k;
}

// Block `index` of a wave: which strip and which chunk of it.
struct Block {
  int strip, chunk;
};
LAB_HD Block block_of(const Plan& p, const Wave& v, int index) {
  const int column = index % v.columns, rank = column % p.cluster, rest = column / p.cluster;
  Block b;
  b.strip = (v.first_strip + rest % v.strips) % p.strip_units * p.cluster + rank;
  b.chunk = rest / v.strips * v.chunks + index / v.columns;
  return b;
}

// The walk of one decoding warp over all items of a launch: item, item + workers, ... in the order of the blocks.
struct ItemWalk {
  int item, wave, first_item, base;  // base: blocks before the wave
  Wave v;
};
LAB_HD ItemWalk start_items(const Plan& p, int worker) { return {worker, 0, 0, 0, wave_of(p, 0)}; }
LAB_HD bool find_item(const Plan& p, ItemWalk& w) {  // false when there is none left
  for (;;) {
    const int blocks = w.v.columns * w.v.chunks;
    if (w.item < w.first_item + blocks * kItems) return true;
    w.first_item += blocks * kItems, w.base += blocks;
    if (++w.wave == p.waves) return false;
    w.v = wave_of(p, w.wave);
  }
}

// ---- index maps -----------------------------------------------------------------------------------------------------
// Byte offset in a tile of 128-byte rows under TMA's 128-byte swizzle: 16-byte chunk ^ row mod 8.
LAB_HD uint32_t swizzle(uint32_t row, uint32_t byte) {
  return row * 128 + (((byte >> 4) ^ (row & 7)) << 4) + (byte & 15);
}

// What a lane decodes in a pass (of four) of an item. Two lanes share 64 weights of a row: lane h takes the 8-weight
// pieces 2 j + h, so that each store of the pair is a whole 32-byte sector. Neighbouring pairs take neighbouring
// 64-blocks of a row: whole lines are read.
struct Piece {
  int row, block;   // of W, within the block's rows and 64-blocks
  uint32_t offset;  // in the slot: the 128-byte row those 64 weights fill
};
LAB_HD Piece piece_of(bool backward, int item, int pass, int lane) {
  const int pair = lane >> 1;
  Piece p;
  if (!backward) {  // 128 rows x 4 blocks: a step's tile is one block wide
    p.row = item * 16 + pass * 4 + (pair >> 2), p.block = pair & 3;
    p.offset = p.block * kTileBytes + p.row * 128;
  } else {  // 256 rows x 2 blocks: a step's tile is 64 rows, one block after the other
    p.row = item * 32 + pass * 8 + (pair >> 1), p.block = pair & 1;
    p.offset = (p.row >> 6) * kTileBytes + p.block * (kTileBytes / 2) + (p.row & 63) * 128;
  }
  return p;
}

// Where a block of the ring begins in W.
struct Origin {
  int row, block;  // block: of 64 columns
};
LAB_HD Origin origin_of(bool backward, const Block& b) {
  if (backward) return {b.chunk * kChunk, b.strip * (kTileOut / 64)};
  return {b.strip * kTileOut, b.chunk * (kChunk / 64)};
}

// Epilogue: stmatrix.x4.trans row address of a lane for tokens 16 j.. of a 64 x 64 staging tile.
LAB_HD uint32_t staging_offset(int warp, int lane, int j) {
  return swizzle(j * 16 + (lane >> 4) * 8 + (lane & 7), (2 * warp + ((lane >> 3) & 1)) * 16);
}

// ---- choices --------------------------------------------------------------------------------------------------------
struct Limits {
  int sms = 132;
  uint64_t workspace_bytes = 32u << 20;
  int slots = kMaxSlots;  // at most
  int group = 16;         // at most
  int split = 8;          // at most; 1: never
};

// Cycles of a step and of fetching, adding and sending one partial sum: rough, only their ratio decides.
constexpr double kStepCycles = 1040, kPartialCycles = 5000;

inline Plan make_plan(int m, int out, int depth, int cluster, const Limits& limits) {
  Plan p = {};
  p.m = m, p.out = out, p.depth = depth, p.cluster = cluster;
  p.strip_units = ceil_div(out, kTileOut * cluster), p.token_tiles = ceil_div(m, kTileTokens);
  p.steps = ceil_div(depth, kStep), p.chunks = ceil_div(p.steps, kChunkSteps);
  const int groups = ceil_div(p.token_tiles, limits.group);
  p.group = ceil_div(p.token_tiles, groups);
  p.units = p.strip_units * p.token_tiles;
  const int seats = limits.sms / cluster;
  p.waves = ceil_div(p.units, seats);
  const int tail = p.units - (p.waves - 1) * seats;
  p.split = 1;
  double best = p.chunks * kChunkSteps * kStepCycles;
  uint64_t partials = 0;
  for (int s = 2; s <= limits.split; ++s) {  // equal parts of whole chunks only
    const int count = tail * cluster * (s - 1);
    if (p.chunks % s != 0 || tail * s > seats || count > kMaxPartials) continue;
    const double cycles = p.chunks / s * kChunkSteps * kStepCycles + (s - 1) * kPartialCycles;
    if (cycles < best) best = cycles, p.split = s, partials = count;
  }
  p.grid = (p.waves > 1 ? seats : p.units * p.split) * cluster;
  const uint64_t ring_bytes = limits.workspace_bytes - kHeaderBytes - partials * kPartialBytes;
  const int fit = static_cast<int>(ring_bytes / kSlotBytes);
  p.slots = min_int(min_int(fit, limits.slots), kMaxSlots);
  return p;
}
inline uint64_t partial_bytes(const Plan& p) {
  const int tail = p.units - (p.waves - 1) * (p.grid / p.cluster);
  return p.split == 1 ? 0 : static_cast<uint64_t>(tail) * p.cluster * (p.split - 1) * kPartialBytes;
}

}  // namespace lab
