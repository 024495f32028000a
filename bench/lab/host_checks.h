// Checks of plan.h that need no GPU: the index maps, the walk, and the ring's protocol run by a scheduler that
// interleaves at random.
#pragma once

#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <array>
#include <memory>
#include <random>
#include <vector>

#include "decode.h"
#include "plan.h"

namespace lab {

inline bool check(const char* what, long bad) {
  printf("  %-66s %s", what, bad ? "FAIL" : "PASS");
  if (bad) printf(" (%ld wrong)", bad);
  printf("\n");
  return bad == 0;
}

inline long check_pieces(bool backward) {
  long bad = 0;
  std::vector<int> slot(kSlotBytes / 16, -1);  // 16-byte pieces: row << 8 | 8-weight piece of the block's columns
  for (int item = 0; item < kItems; ++item)
    for (int pass = 0; pass < 4; ++pass)
      for (int lane = 0; lane < 32; ++lane) {
        const Piece p = piece_of(backward, item, pass, lane);
        for (int j = 0; j < 4; ++j) {
          const int piece = 2 * j + (lane & 1);
          const uint32_t at = p.offset + ((piece ^ (p.row & 7)) << 4);  // as store_item writes
          if (at % 16 != 0 || at >= kSlotBytes || slot[at / 16] != -1)
            ++bad;
          else
            slot[at / 16] = p.row << 8 | (p.block * 8 + piece);
        }
      }
  // As TMA would have written the tiles: forward one box of 128 rows x 64 a step, backward two of 64 rows x 64.
  for (int row = 0; row < (backward ? 256 : 128); ++row)
    for (int piece = 0; piece < (backward ? 16 : 32); ++piece) {
      const uint32_t box =
          backward ? (row / 64) * kTileBytes + (piece / 8) * (kTileBytes / 2) : (piece / 8) * kTileBytes;
      const uint32_t at = box + swizzle(backward ? row % 64 : row, piece % 8 * 16);
      if (slot[at / 16] != (row << 8 | piece)) ++bad;
    }
  return bad;
}

inline long check_look_up() {
  long bad = 0;
  for (const float scale : {0.0371f, 3.1f, 1e-30f, 0.0f}) {
    const Table t = make_table(scale);
    for (uint32_t g = 0; g < 65536; ++g) {  // two bytes, four weights, the high nibble first
      uint32_t v[2];
      look_up(t, g | g * 0x9e370000u, v[0], v[1]);  // what lies above must not matter
      for (int i = 0; i < 4; ++i) {
        const uint32_t byte = g >> (8 * (i / 2)), code = i % 2 ? byte & 15 : byte >> 4 & 15;
        bad += (v[i / 2] >> (16 * (i % 2)) & 0xffff) != (pack_bf16(fastpeft::kNF4Levels[code] * scale, 0.0f) & 0xffff);
      }
    }
  }
  return bad;
}

inline long check_staging() {
  long bad = 0;
  std::vector<int> tile(64 * 64, -1);
  for (int warp = 0; warp < 4; ++warp)
    for (int lane = 0; lane < 32; ++lane)
      for (int j = 0; j < 8; ++j)
        for (int i = 0; i < 4; ++i) {  // accumulator 4 j + i: row g + 8 (i >> 1), token 8 j + 2 t + (i & 1)
          const int g = lane >> 2, t = lane & 3, token = 8 * j + 2 * t + (i & 1), out = 16 * warp + g + 8 * (i >> 1);
          // stmatrix.trans: matrix q, this lane holds row 2 t + (i & 1), column g of it; a row's address comes from
          // lane 8 q + row.
          const int q = 2 * (j & 1) + (i >> 1), row = 2 * t + (i & 1);
          const uint32_t at = staging_offset(warp, 8 * q + row, j >> 1) + 2 * g;
          if (at >= 8192 || tile[at / 2] != -1)
            ++bad;
          else
            tile[at / 2] = token * 64 + out;
        }
  for (int token = 0; token < 64; ++token)
    for (int out = 0; out < 64; ++out) bad += tile[swizzle(token, out * 2) / 2] != token * 64 + out;
  return bad;
}

// Every output's every step exactly once, and every block's readers add up.
inline long check_plan(const Plan& p) {
  long bad = 0;
  std::vector<int> seen(static_cast<size_t>(p.strip_units) * p.token_tiles * p.steps, 0);
  for (int w = 0; w < p.waves; ++w) {
    const Wave v = wave_of(p, w);
    std::vector<int> weight(v.columns, 0);
    for (int seat = 0; seat < p.grid / p.cluster; ++seat) {
      const Work k = work_of(p, v, seat);
      if (!k.any) {
        bad += w != p.waves - 1;
        continue;
      }
      if (k.steps <= 0 || k.tail > 0xffff || k.column < 0 || k.column + p.cluster > v.columns) {
        ++bad;
        continue;
      }
      for (int rank = 0; rank < p.cluster; ++rank) {
        weight[k.column + rank] += k.weight;
        const Block b = block_of(p, v, k.column + rank);
        bad += b.strip != k.strip_unit * p.cluster + rank || b.chunk != k.chunk;
      }
      for (int s = 0; s < k.steps; ++s)
        ++seen[(static_cast<size_t>(k.strip_unit) * p.token_tiles + k.token_tile) * p.steps + k.chunk * kChunkSteps +
               s];
    }
    for (int x : weight) bad += x != kReaders;
  }
  for (int x : seen) bad += x != 1;
  return bad;
}

// The whole product on the host: blocks decoded piece by piece, tiles read as wgmma reads them, parts added.
inline long check_product(bool backward, int m, int n, int k, int cluster, int sms) {
  Limits limits;
  limits.sms = sms, limits.group = 2;
  const int out = backward ? k : n, depth = backward ? n : k, blocks = k / 64;
  const Plan p = make_plan(m, out, depth, cluster, limits);
  std::mt19937 rng(m + n + k);
  std::vector<uint32_t> words(static_cast<size_t>(n) * k / 8);  // eight codes each, as little-endian bytes
  std::vector<float> scales(static_cast<size_t>(n) * blocks), x(static_cast<size_t>(m) * depth);
  for (auto& w : words) w = rng();
  for (auto& s : scales) s = 0.01f + 0.001f * (rng() % 64);
  for (auto& v : x) v = static_cast<int>(rng() % 17) - 8;
  auto to_float = [](uint32_t bf16) {
    const uint32_t bits = bf16 << 16;
    float v;
    memcpy(&v, &bits, 4);
    return v;
  };
  std::vector<double> y(static_cast<size_t>(m) * out, 0.0);
  std::vector<uint8_t> slot(kSlotBytes);
  for (int w = 0; w < p.waves; ++w) {
    const Wave v = wave_of(p, w);
    for (int seat = 0; seat < p.grid / p.cluster; ++seat) {
      const Work work = work_of(p, v, seat);
      for (int rank = 0; work.any && rank < p.cluster; ++rank)
        for (int s = 0; s < work.steps; ++s) {
          if (s % kChunkSteps == 0) {
            const Block b = block_of(p, v, s / kChunkSteps * v.columns + work.column + rank);
            const Origin origin = origin_of(backward, b);
            std::fill(slot.begin(), slot.end(), 0xff);
            for (int i = 0; i < kItems * 4 * 32; ++i) {
              const int lane = i % 32;
              const Piece piece = piece_of(backward, i / 128, i / 32 % 4, lane);
              const int row = origin.row + piece.row, block = origin.block + piece.block;
              const bool inside = row < n && block < blocks;
              const size_t at = static_cast<size_t>(row) * blocks + block;
              const Table t = make_table(inside ? scales[at] : 0.0f);
              for (int j = 0; j < 4; ++j) {
                const int c = 2 * j + (lane & 1);
                const uint32_t word = inside ? words[at * 8 + c] : 0;
                uint32_t v4[4];
                look_up(t, word, v4[0], v4[1]);
                look_up(t, word >> 16, v4[2], v4[3]);
                memcpy(&slot[piece.offset + ((c ^ (piece.row & 7)) << 4)], v4, 16);
              }
            }
          }
          const uint8_t* tile = &slot[s % kChunkSteps * kTileBytes];
          const int out0 = (work.strip_unit * p.cluster + rank) * kTileOut, m0 = work.token_tile * kTileTokens;
          const int at = (work.chunk * kChunkSteps + s) * kStep;
          for (int r = 0; r < kTileOut && out0 + r < out; ++r)
            for (int c = 0; c < kStep && at + c < depth; ++c) {
              const uint32_t half = r / 64 * (kTileBytes / 2);  // a consumer warpgroup's
              const uint32_t where = half + (backward ? swizzle(c, r % 64 * 2) : swizzle(r % 64, c * 2));
              uint16_t bits;
              memcpy(&bits, tile + where, 2);
              const double weight = to_float(bits);
              for (int token = m0; token < min_int(m0 + kTileTokens, m); ++token)
                y[static_cast<size_t>(token) * out + out0 + r] +=
                    weight * x[static_cast<size_t>(token) * depth + at + c];
            }
        }
    }
  }
  long bad = 0;
  for (int token = 0; token < m; token += 7)
    for (int o = 0; o < out; ++o) {
      double want = 0;
      for (int c = 0; c < depth; ++c) {
        const size_t at = backward ? static_cast<size_t>(c) * k + o : static_cast<size_t>(o) * k + c;
        const uint32_t byte = words[at / 8] >> (at / 2 % 4 * 8) & 255, code = at % 2 ? byte & 15 : byte >> 4;
        want += static_cast<double>(to_float(pack_bf16(fastpeft::kNF4Levels[code] * scales[at / 64], 0.0f) & 0xffff)) *
                x[static_cast<size_t>(token) * depth + c];
      }
      const double e = y[static_cast<size_t>(token) * out + o] - want;
      bad += !(e < 1e-6 && e > -1e-6);
    }
  return bad;
}

// ---- the protocol ---------------------------------------------------------------------------------------------------
// Producers, consumers and decoder warps as state machines over the counters of plan.h, in the order of the kernel's
// instructions. The ring's real contents are kept beside: a read of a slot that does not hold its block whole, or a
// write into one that somebody still has to read, is an error, and so is a state in which nobody can go on.
class ProtocolSim {
 public:
  ProtocolSim(const Plan& plan, uint32_t seed) : p(plan), rng(seed) {
    int base = 0;
    for (int w = 0; w < p.waves; ++w) {
      const Wave v = wave_of(p, w);
      readers.resize(base + v.columns * v.chunks, 0);
      for (int seat = 0; seat < p.grid / p.cluster; ++seat) {
        const Work k = work_of(p, v, seat);
        for (int r = 0; k.any && r < p.cluster; ++r)
          for (int c = 0; c * kChunkSteps < k.steps; ++c) ++readers[base + c * v.columns + k.column + r];
      }
      base += v.columns * v.chunks;
    }
    content.assign(p.slots, {});
    for (auto& c : content) c.fill(-1);
    ready.assign(p.slots, 0), done.assign(p.slots, 0);
    producers.resize(p.grid), loads.resize(p.grid), consumed.resize(p.grid, 0), x_issued.resize(p.grid, 0);
    for (int b = 0; b < p.grid; ++b) {
      producers[b].block = b;
      for (int w = 0; w < kDecodeWarps; ++w) decoders.push_back({start_items(p, w * p.grid + b), 0, 0});
    }
  }
  long run() {
    const int agents = p.grid * 2 + static_cast<int>(decoders.size());
    std::vector<int> weight(agents);  // some run much more often than others
    for (auto& w : weight) w = rng() % 4 == 0 ? 1 : 1 + rng() % 20;
    std::discrete_distribution<int> pick(weight.begin(), weight.end());
    while (bad == 0) {
      bool moved = false;
      for (int i = 0; i < 64; ++i) moved |= step(pick(rng));
      if (moved) continue;
      for (int a = 0; a < agents; ++a) moved |= step(a);
      if (moved) continue;
      break;
    }
    if (bad) return bad;
    for (auto& a : producers) bad += a.state != kEnd;  // stuck
    for (auto& d : decoders) bad += d.state != 3;
    for (int b = 0; b < p.grid; ++b) bad += consumed[b] != loads[b].size();
    for (int r : readers) bad += r != 0;
    const int blocks = static_cast<int>(readers.size());
    for (int s = 0; s < p.slots; ++s) {
      const int uses = blocks / p.slots + (s < blocks % p.slots);
      bad += ready[s] != ready_target(uses - 1) || done[s] != done_target(uses);
    }
    return bad;
  }

 private:
  enum { kAsk, kWaitStage, kFetchX, kWaitBlock, kFetchW, kRetire, kDrain, kEnd };
  struct Entry {
    size_t last;
    int slot, weight;
  };
  struct Producer {
    int block = 0, state = kAsk, wave = -1, base = 0, s = 0, slot = 0, target = 0, current = 0;
    size_t waited = 0;  // the step whose stage it last waited for
    bool up = false;
    Wave v = {};
    Work k = {};
    std::vector<Entry> pending;  // oldest first
  };
  struct Decoder {
    ItemWalk walk;
    int state, tail;
  };
  struct Load {
    int slot, block;
    bool ends;
  };

  bool whole(int slot, int block) const {
    for (int x : content[slot])
      if (x != block) return false;
    return true;
  }
  size_t freed(int b) const {  // steps whose stage all readers have released
    size_t f = consumed[b];
    for (int r = 0; r < p.cluster; ++r) f = std::min(f, consumed[b / p.cluster * p.cluster + r]);
    return f;
  }
  // The kernel asks a barrier's parity or knows from its last wait; an answer of two phases ago would be taken for "not
  // yet".
  bool retire(Producer& a) {
    bool any = false;
    while (!a.pending.empty() && freed(a.block) > a.pending.front().last) {
      const size_t last = a.pending.front().last, known = a.waited < 3 ? 0 : a.waited - 3;
      if (last >= known && (freed(a.block) - last + kStages - 1) / kStages % 2 == 0) break;
      done[a.pending.front().slot] += a.pending.front().weight;
      a.pending.erase(a.pending.begin());
      any = true;
    }
    return any;
  }
  bool step(int agent) {
    if (agent < p.grid) return produce(producers[agent]);
    if (agent < 2 * p.grid) return consume(agent - p.grid);
    return decode(decoders[agent - 2 * p.grid]);
  }
  bool produce(Producer& a) {
    switch (a.state) {
      case kAsk: {
        if (a.wave < 0 || !a.k.any || a.s == a.k.steps) {  // next unit
          if (a.wave >= 0) a.base += a.v.columns * a.v.chunks;
          if (++a.wave == p.waves) {
            a.state = kDrain;
            return true;
          }
          a.v = wave_of(p, a.wave), a.k = work_of(p, a.v, a.block / p.cluster), a.s = 0;
          return true;
        }
        if (a.s % kChunkSteps == 0) {
          a.current = a.base + a.s / kChunkSteps * a.v.columns + a.k.column + a.block % p.cluster;
          a.slot = a.current % p.slots, a.target = ready_target(a.current / p.slots);
          a.up = ready[a.slot] - a.target >= 0;
        }
        a.state = kWaitStage;
        return true;
      }
      case kWaitStage:
        if (freed(a.block) + kStages <= loads[a.block].size()) return false;  // the kernel only waits here
        a.waited = loads[a.block].size();
        a.state = kFetchX;
        return true;
      case kFetchX:
        ++x_issued[a.block];
        a.state = a.up ? kFetchW : kWaitBlock;
        return true;
      case kWaitBlock:
        if (ready[a.slot] - a.target < 0) return retire(a);
        a.up = true, a.state = kFetchW;
        return true;
      case kFetchW: {
        bad += !whole(a.slot, a.current);
        const bool ends = a.s % kChunkSteps == kChunkSteps - 1 || a.s == a.k.steps - 1;
        if (ends) a.pending.push_back({loads[a.block].size(), a.slot, a.k.weight});
        loads[a.block].push_back({a.slot, a.current, ends});
        bad += a.pending.size() > 5;
        ++a.s, a.state = kRetire;
        return true;
      }
      case kRetire:
        retire(a);
        a.state = kAsk;
        return true;
      case kDrain:
        if (a.pending.empty()) {
          a.state = kEnd;
          return true;
        }
        return retire(a);
    }
    return false;
  }
  bool consume(int b) {
    const size_t at = consumed[b];
    if (at >= loads[b].size()) return false;
    for (int r = 0; r < p.cluster; ++r)
      if (x_issued[b / p.cluster * p.cluster + r] <= at) return false;
    const Load& l = loads[b][at];
    bad += !whole(l.slot, l.block);  // the copy may have read as late as this
    readers[l.block] -= l.ends;
    ++consumed[b];
    return true;
  }
  bool decode(Decoder& d) {
    if (d.state == 3) return false;
    if (d.state == 0) {
      d.state = find_item(p, d.walk) ? 1 : 3;
      return true;
    }
    const int block = d.walk.item / kItems, slot = block % p.slots, sub = d.walk.item % kItems;
    if (d.state == 1) {
      if (block >= p.slots && done[slot] - done_target(block / p.slots) < 0) return false;
      bad += block >= p.slots && readers[block - p.slots] != 0;
      bad += block >= p.slots && content[slot][sub] != block - p.slots;
      content[slot][sub] = -1;  // half written
      d.state = 2;
      return true;
    }
    content[slot][sub] = block;
    ++ready[slot];
    d.walk.item += p.grid * kDecodeWarps, d.state = 0;
    return true;
  }

  const Plan p;
  std::mt19937 rng;
  std::vector<int> readers, ready, done;
  std::vector<std::array<int, kItems>> content;
  std::vector<Producer> producers;
  std::vector<Decoder> decoders;
  std::vector<std::vector<Load>> loads;
  std::vector<size_t> consumed, x_issued;
  long bad = 0;
};

inline bool host_checks() {
  bool ok = check("NF4 codes to bf16 by PRMT, every pair of bytes", check_look_up());
  ok &= check("forward: where decoded pieces go, against TMA's tiles", check_pieces(false));
  ok &= check("backward: the same", check_pieces(true));
  ok &= check("epilogue staging", check_staging());
  long bad = 0, plans = 0, splits = 0;
  std::mt19937 rng(7);
  for (const int n : {128, 200, 1112, 4096, 14336, 28672})
    for (const int k : {64, 832, 4096, 8192, 14336})
      for (const int m : {1, 256, 300, 512, 1024, 2048, 2304, 4096, 8192})
        for (const int cluster : {1, 2})
          for (const int group : {8, 16}) {
            Limits limits;
            limits.group = group;
            const Plan p = make_plan(m, n, k, cluster, limits);
            bad += check_plan(p), ++plans, splits += p.split > 1;
            const uint64_t used = kHeaderBytes + partial_bytes(p) + static_cast<uint64_t>(p.slots) * kSlotBytes;
            bad += used > limits.workspace_bytes || p.slots < 64 || p.grid > limits.sms || p.grid % cluster != 0;
          }
  char what[96];
  snprintf(what, sizeof what, "%ld plans (%ld with a split): every step once, 32 MB at most", plans, splits);
  ok &= check(what, bad);
  bad = 0;
  for (const int cluster : {1, 2})
    for (const int sms : {4, 14})  // several waves; one with a split
      bad += check_product(false, 300, 200, 576, cluster, sms) + check_product(true, 300, 584, 192, cluster, sms);
  ok &= check("both products on the host, decoded and read as the kernels do", bad);

  bad = 0;
  constexpr int kRuns = 1500;
  long blocks = 0, clustered = 0;
  splits = 0;
  for (int i = 0; i < kRuns; ++i) {
    Limits limits;
    const int cluster = 1 + rng() % 2;
    limits.sms = cluster * (1 + rng() % 6), limits.group = 1 + rng() % 6;
    const int m = 1 + rng() % 1800, out = 1 + rng() % 900, depth = 1 + rng() % (rng() % 2 ? 300 : 2500);
    Plan p = make_plan(m, out, depth, cluster, limits);
    p.slots = 1 + cluster + rng() % (rng() % 2 ? 4 : 60);
    bad += check_plan(p);
    ProtocolSim sim(p, rng());
    const long wrong = sim.run();
    if (wrong && bad < 5)
      printf("    m %d out %d depth %d cluster %d grid %d group %d split %d slots %d: %ld wrong\n", m, out, depth,
             cluster, p.grid, p.group, p.split, p.slots, wrong);
    bad += wrong, splits += p.split > 1, clustered += cluster == 2;
    for (int w = 0; w < p.waves; ++w) blocks += wave_of(p, w).columns * wave_of(p, w).chunks;
  }
  snprintf(what, sizeof what, "protocol: %d runs, %ld blocks, %ld split, %ld in pairs", kRuns, blocks, splits,
           clustered);
  ok &= check(what, bad);
  return ok;
}

}  // namespace lab
