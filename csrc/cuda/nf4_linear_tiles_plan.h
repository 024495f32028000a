// How an NF4 product is cut up for the tile kernel (nf4_linear_tiles_kernel.cuh): pure arithmetic, the same on the
// host, on the device and in the tests.
//
// Names    out, depth: n and k forward (y = x W^T), k and n backward (dx = dy W).
// Tile     kTileOut rows of out by `tokens` tokens; a step is kStep of the depth, a chunk four steps, the last one
//          filled up with zeros.
// Unit     the whole sums of a tile, or of two tiles next to each other in tokens, whose thread blocks form a cluster
//          and decode half of the weights each. Units follow each other strip by strip (a strip: kTileOut of out), all
//          tokens of a strip next to each other, in groups of kGroupTokens.
// Seat     a thread block, or a cluster, of the persistent grid. As many whole waves of units as there are go round the
//          seats; the `shared` units that are left are laid end to end and divided among the seats in equal shares of
//          chunks, so that all finish together (stream-K, arXiv 2301.03598); their parts are added by those who come
//          to a meeting last (add_parts).
// Item     what a seat does without pause: a unit or a part of one.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/host_device.h"

namespace fastpeft::cuda::nf4_tiles {

constexpr int kTileOut = 128;
constexpr int kStep = 64;
constexpr int kChunkSteps = 4;
constexpr int kGroupTokens = 1024;
constexpr int kSmemBytes = 227 * 1024;  // at most, of a thread block
constexpr int64_t kMostWorkspace = int64_t{32} << 20;
constexpr int64_t kMostResident = int64_t{24} << 20;  // of a Hopper's 50 MB of L2
constexpr int kCountersEach = 2;
constexpr int kMostRank = 256;       // of an adapter
constexpr int kPieceRank = 16;       // of it, that join the sums together
constexpr int kAdapterTokens = 256;  // of the tiles that take one: the others have no registers for it
constexpr int kConsumers = 2;        // warpgroups that multiply: each counts the arrivals of its own half of a tile

// Division by a number that the host knows, for numerators below 2^31: a multiplication and a shift.
// Source: Granlund and Montgomery, "Division by Invariant Integers using Multiplication", PLDI 1994.
struct Divisor {
  uint32_t value, multiplier, shift;

  FASTPEFT_HOST_DEVICE int divide(int n) const {
    const auto m = static_cast<uint32_t>(n);
    return static_cast<int>(value == 1 ? m : static_cast<uint32_t>((uint64_t{m} * multiplier) >> 32) >> shift);
  }
};
inline Divisor divisor(int value) {
  Divisor d{static_cast<uint32_t>(value), 0, 0};
  while ((uint64_t{1} << (d.shift + 1)) < d.value) ++d.shift;
  if (value > 1) d.multiplier = static_cast<uint32_t>(((uint64_t{1} << (32 + d.shift)) + d.value - 1) / d.value);
  return d;
}

struct Plan {
  int m, out, depth;
  int tokens, cluster;         // of a tile; tiles of a unit, a thread block each
  bool fragments;              // by nf4_linear_fragments_kernel.cuh
  int strips, columns;         // units: strips of out by columns of tokens
  int group, last_group;       // columns walked together; of the last group
  int chunks;                  // of the depth
  int seats;                   // clusters
  int whole_waves;             // of whole units
  int shared, shared_chunks;   // units divided among the seats, the first of the walk, and their chunks
  int share;                   // chunks of them that a seat takes; the last seats may have fewer, or none
  int beside_blocks;           // thread blocks of lora_beside_kernel.cuh
  bool makes, makes_gradient;  // they: xa, or dxa and dB; dA
  Divisor by_group_units, by_group, by_last_group, by_chunks, by_share;
};

struct Item {
  int out0, m0;  // of the cluster's first tile
  int first_chunk, chunks;
  int parts, part;           // of the unit
  int unit;                  // among the shared ones
  int slot, last_slot;       // of its partial sum; parts lie next to each other, the unit's last in last_slot
  int w_row = 0, m_end = 0;  // among experts: where the expert's weight begins, and where its tokens end
};

FASTPEFT_HOST_DEVICE inline int ceil_divide(int a, int b) { return (a + b - 1) / b; }
FASTPEFT_HOST_DEVICE inline int smaller(int a, int b) { return a < b ? a : b; }

FASTPEFT_HOST_DEVICE inline void place(const Plan& p, int unit, Item& item) {
  const int group = p.by_group_units.divide(unit), first = group * p.group;
  const int in_group = unit - group * static_cast<int>(p.by_group_units.value);
  const Divisor& size = first + p.group > p.columns ? p.by_last_group : p.by_group;
  const int strip = size.divide(in_group);
  item.out0 = strip * kTileOut;
  item.m0 = (first + in_group - strip * static_cast<int>(size.value)) * p.tokens * p.cluster;
}

// Item `index` of a seat; false when it has no more. Those of shared units come first (at most two).
FASTPEFT_HOST_DEVICE inline bool find_item(const Plan& p, int seat, int index, Item& item) {
  const int begin = smaller(p.share * seat, p.shared_chunks), end = smaller(begin + p.share, p.shared_chunks);
  const int first_unit = p.by_chunks.divide(begin);
  const int in_shared = begin == end ? 0 : p.by_chunks.divide(end - 1) - first_unit + 1;
  if (index >= in_shared) {
    const int wave = index - in_shared, unit = p.shared + wave * p.seats + seat;
    if (wave >= p.whole_waves || unit >= p.strips * p.columns) return false;
    place(p, unit, item);
    item.first_chunk = 0, item.chunks = p.chunks;
    item.parts = 1, item.part = 0, item.unit = 0, item.slot = 0, item.last_slot = 0;
    return true;
  }
  item.unit = first_unit + index;
  place(p, item.unit, item);
  const int unit_begin = item.unit * p.chunks;
  const int from = (index == 0 ? begin : unit_begin) - unit_begin, to = smaller(end - unit_begin, p.chunks);
  item.first_chunk = from, item.chunks = to - from;
  const int first_seat = p.by_share.divide(unit_begin), last_seat = p.by_share.divide(unit_begin + p.chunks - 1);
  item.parts = last_seat - first_seat + 1;
  item.part = seat - first_seat;
  item.slot = seat + item.unit;
  item.last_slot = last_seat + item.unit;
  return true;
}

inline int grid(const Plan& p) {
  const int shares = p.shared == 0 ? 0 : ceil_divide(p.shared_chunks, p.share);
  const int units = p.strips * p.columns - p.shared;
  return p.cluster * std::max(shares, smaller(p.seats, units));
}
FASTPEFT_HOST_DEVICE constexpr int64_t partial_bytes(int tokens) { return int64_t{4} * kTileOut * tokens; }
// One for each part of a shared unit.
inline int slots(const Plan& p) { return p.shared == 0 ? 0 : ceil_divide(p.shared_chunks, p.share) + p.shared - 1; }
inline int64_t workspace_bytes(const Plan& p) { return slots(p) * p.cluster * partial_bytes(p.tokens); }
inline int product_counters(const Plan& p) { return slots(p) * p.cluster * kConsumers * kCountersEach; }
// Behind the product's: of each kReadyTokens tokens, of the product's thread blocks, and four of the blocks beside it.
constexpr int kReadyTokens = 256;
constexpr unsigned kReadyWriters = 2;  // warpgroups that write to each of them
inline int beside_counters(const Plan& p) { return p.beside_blocks == 0 ? 0 : ceil_divide(p.m, kReadyTokens) + 5; }
inline int counters(const Plan& p) { return product_counters(p) + beside_counters(p); }

// --- choice ----------------------------------------------------------------------------------------------------------

// Fixed cycles of an item, and of adding up parts (bench/LOG.md, 2026-11-26).
struct Tile {
  int tokens, cluster;
  bool fragments;      // forward only
  double step_cycles;  // measured (bench/LOG.md, 2026-11-26)
};
constexpr double kStepCyclesOfPairs = 1100;
// Those that are compiled.
constexpr Tile kTiles[] = {{32, 1, false, 690},  {64, 1, false, 700},   {128, 1, false, 820},
                           {128, 2, false, 760}, {256, 1, false, 1500}, {256, 2, false, kStepCyclesOfPairs},
                           {32, 1, true, 500},   {64, 1, true, 580},    {256, 1, true, 1400}};
constexpr double kItemCycles = 1500, kSharedCycles = 8000, kSharedCyclesPerToken = 64;
// The fragments kernel adds few tokens' parts all at once (its add_parts): it costs by the part.
constexpr int kMostFlatTokens = 64;
constexpr double kPartCycles = 2000, kPartCyclesPerToken = 22;

inline double sharing_cycles(const Plan& p) {
  if (p.fragments && p.tokens <= kMostFlatTokens) {
    return ceil_divide(p.chunks, p.share) * (kPartCycles + kPartCyclesPerToken * p.tokens);
  }
  return kSharedCycles + kSharedCyclesPerToken * p.tokens;
}

struct Choice {
  Plan plan;
  double cycles;
};

inline void set_sharing(Plan& p, int whole_waves, int shared) {
  p.whole_waves = whole_waves, p.shared = shared, p.shared_chunks = shared * p.chunks;
  p.share = ceil_divide(p.shared_chunks, p.seats);
  p.by_share = divisor(std::max(1, p.share));
}

inline Choice choose_sharing(Plan p, double step) {
  const int units = p.strips * p.columns;
  set_sharing(p, ceil_divide(units, p.seats), 0);
  Choice best{p, p.whole_waves * (p.chunks * kChunkSteps * step + kItemCycles)};
  // The units beyond the last full wave, alone or with a wave of whole ones.
  for (int waves = units / p.seats; waves >= 0 && waves >= units / p.seats - 1; --waves) {
    set_sharing(p, waves, units - waves * p.seats);
    // Seats at different depths read different parts of x: all of it then has to stay in L2.
    if (waves > 0 && int64_t{2} * p.m * p.depth > kMostResident) continue;
    if (p.shared == 0 || p.shared_chunks < p.seats || p.chunks > (1 << 15) || workspace_bytes(p) > kMostWorkspace)
      continue;
    const double cycles = waves * (p.chunks * kChunkSteps * step + kItemCycles) + p.share * kChunkSteps * step +
                          kItemCycles + sharing_cycles(p);
    if (cycles < best.cycles) best = {p, cycles};
  }
  return best;
}

inline Plan plan_for(int m, int out, int depth, int sms, int tokens, int cluster, bool fragments) {
  Plan p{};
  p.fragments = fragments;
  p.m = m, p.out = out, p.depth = depth, p.tokens = tokens, p.cluster = cluster, p.seats = sms / cluster;
  p.strips = ceil_divide(out, kTileOut), p.columns = ceil_divide(m, tokens * cluster);
  p.group = ceil_divide(p.columns, ceil_divide(p.columns, std::max(1, kGroupTokens / (tokens * cluster))));
  p.last_group = p.columns - (ceil_divide(p.columns, p.group) - 1) * p.group;
  p.chunks = ceil_divide(depth, kStep * kChunkSteps);
  p.by_group_units = divisor(p.group * p.strips), p.by_group = divisor(p.group);
  p.by_last_group = divisor(p.last_group), p.by_chunks = divisor(p.chunks);
  return p;
}

// --- beside the product (lora_beside_kernel.cuh) ---------------------------------------------------------------------

constexpr int kMostBesideRanks = 64, kMostBesideBlocks = 8;
constexpr int kLeastBesideTokens = 1024;    // below, the first items would wait
constexpr int kMostBesideTokens = 1 << 19;  // for want of counters

// What may be made beside: xa or, backward, dxa and dB, of `ranks`; and, backward, dA of `gradient_ranks`.
struct Beside {
  int ranks = 0, gradient_ranks = 0;
};

// Measured, for ranks up to 16, 32 and 64 (bench/LOG.md, 2026-11-26): bytes of x or dy a cycle, of a thread block
// beside the product, and of the whole device by kernels of their own.
struct BesideRates {
  double xa, dxa, da;
  double own_xa, own_dxa, own_da;
};
constexpr BesideRates kBesideRates[] = {
    {60, 36, 95, 1800, 1400, 2000}, {55, 22, 80, 1500, 1200, 1600}, {46, 13, 64, 1250, 950, 1250}};
constexpr double kMostSumsShare = 0.03;  // of dy's bytes, that sums of dB may take
constexpr double kOwnCycles = 4000;      // of a launch
// Of an item, for the adapter's product and each piece of its rank.
constexpr double kAdapterCycles = 1800, kPieceCycles = 700;
constexpr int rank_class(int ranks) { return ranks <= 16 ? 16 : ranks <= 32 ? 32 : 64; }
inline const BesideRates& beside_rates(int ranks) { return kBesideRates[ranks <= 16 ? 0 : ranks <= 32 ? 1 : 2]; }

// The cheapest way to all of it: how many thread blocks make which part beside the product, and what is left to kernels
// of its own.
inline Plan choose_beside(int m, int out, int depth, int sms, bool forward, Beside work, int only_blocks = -1) {
  const double depth_bytes = 2.0 * m * depth, out_bytes = 2.0 * m * out;
  const BesideRates &rates = beside_rates(work.ranks), &gradient_rates = beside_rates(work.gradient_ranks);
  Choice best{{}, 1e30};
  for (int blocks = 0; blocks <= kMostBesideBlocks; blocks += 2) {
    for (const bool makes : {false, true}) {
      for (const bool gradient : {false, true}) {
        // dA needs all of dxa: it cannot come before the product where dxa does not.
        if ((blocks > 0) != (makes || gradient) || (makes && work.ranks == 0) ||
            (gradient && work.gradient_ranks == 0) || (makes && !gradient && work.gradient_ranks > 0) ||
            (makes && !forward && 4 * work.ranks * (blocks - 1) > kMostSumsShare * 2 * m) ||
            (only_blocks >= 0 && blocks != only_blocks))
          continue;
        Choice c{{}, 1e30};
        for (const Tile& tile : kTiles) {
          if (tile.tokens < kAdapterTokens || tile.fragments || (blocks > 0 && tile.cluster != 2)) continue;
          const Choice one =
              choose_sharing(plan_for(m, out, depth, sms - blocks, tile.tokens, tile.cluster, false), tile.step_cycles);
          if (one.cycles < c.cycles) c = one;
        }
        const int items = ceil_divide(c.plan.strips * c.plan.columns, c.plan.seats);
        c.cycles += items * (kAdapterCycles + kPieceCycles * ceil_divide(work.ranks, kPieceRank));
        c.plan.beside_blocks = blocks, c.plan.makes = makes, c.plan.makes_gradient = gradient;
        double beside = 0, own = 0;
        const auto add = [&](bool here, double bytes, double rate, double own_rate) {
          here ? beside += bytes / (blocks * rate) : own += kOwnCycles + bytes / own_rate;
        };
        if (work.ranks > 0)
          add(makes, depth_bytes, forward ? rates.xa : rates.dxa, forward ? rates.own_xa : rates.own_dxa);
        if (work.gradient_ranks > 0) add(gradient, out_bytes, gradient_rates.da, gradient_rates.own_da);
        c.cycles = std::max(c.cycles, beside) + own;
        if (c.cycles < best.cycles) best = c;
      }
    }
  }
  return best.plan;
}

// By the fragments kernel for few tokens.
inline Plan make_flat_plan(int m, int out, int depth, int sms) {
  Choice best{{}, 1e30};
  for (const Tile& tile : kTiles) {
    if (!tile.fragments || tile.tokens > kMostFlatTokens) continue;
    const Choice choice =
        choose_sharing(plan_for(m, out, depth, sms, tile.tokens, tile.cluster, true), tile.step_cycles);
    if (choice.cycles < best.cycles) best = choice;
  }
  return best.plan;
}

inline Plan make_plan(int m, int out, int depth, int sms, bool forward, int least_tokens = 0, Beside beside = {}) {
  if (beside.ranks > 0 || beside.gradient_ranks > 0) return choose_beside(m, out, depth, sms, forward, beside);
  Choice best{{}, 1e30};
  for (const Tile& tile : kTiles) {
    if (tile.fragments && (!forward || least_tokens > 0)) continue;
    if (tile.tokens < least_tokens) continue;
    const Choice choice =
        choose_sharing(plan_for(m, out, depth, sms, tile.tokens, tile.cluster, tile.fragments), tile.step_cycles);
    if (choice.cycles < best.cycles) best = choice;
  }
  return best.plan;
}

}  // namespace fastpeft::cuda::nf4_tiles
