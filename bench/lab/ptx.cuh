// One wrapper for each PTX instruction the NF4 product needs, named after it. Shared memory is addressed by 32-bit
// offsets throughout.
//
// Source   PTX ISA, the sections of the instructions' names; memory ordering: "Memory Consistency Model".
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace lab {

#define LAB_DEV __device__ __forceinline__

LAB_DEV uint32_t smem_u32(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
LAB_DEV uint32_t lds32(uint32_t a) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(a) : "memory");
  return v;
}
LAB_DEV void sts32(uint32_t a, uint32_t v) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(a), "r"(v) : "memory"); }
LAB_DEV void stmatrix4_trans(uint32_t a, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(a), "r"(r0), "r"(r1),
               "r"(r2), "r"(r3)
               : "memory");
}
// ---- mbarrier -------------------------------------------------------------------------------------------------------
LAB_DEV void mbar_init(uint32_t bar, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
LAB_DEV void mbar_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
LAB_DEV void mbar_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
LAB_DEV void mbar_arrive_expect(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
// No .release.cluster: it costs a MEMBAR a stage, and what it would order (wgmma's reads) is over when the wgmmas are.
LAB_DEV void mbar_arrive_remote(uint32_t bar, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 a;\nmapa.shared::cluster.u32 a, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [a];\n}\n" ::"r"(
          bar),
      "r"(rank)
      : "memory");
}
LAB_DEV bool mbar_try_wait(uint32_t bar, uint32_t parity) {  // may sleep a while
  uint32_t ok;
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
               : "=r"(ok)
               : "r"(bar), "r"(parity)
               : "memory");
  return ok != 0;
}
LAB_DEV bool mbar_test_wait(uint32_t bar, uint32_t parity) {  // does not
  uint32_t ok;
  asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
               : "=r"(ok)
               : "r"(bar), "r"(parity)
               : "memory");
  return ok != 0;
}

// ---- waits that end -------------------------------------------------------------------------------------------------
enum WaitId {
  kWaitEmpty = 1,
  kWaitFull,
  kWaitReady,
  kWaitDone,
  kWaitDrain,
  kWaitPartial,
  kWaitUnit,
  kSmemBase,
  kWaitIds
};

// Reports if `bad` to host-mapped memory (err[4 id ..] = {65536 + block, thread, a, b}), and stores to address 16 if
// `fault`, which ends the context. Predicated stores, not __trap(): its exit block, shared by all roles, makes ptxas
// hold the consumers to the entry's register cap and serialise their wgmmas (C7512).
LAB_DEV void fail_if(bool bad, bool fault, int* err, int id, int a, int b) {
  asm volatile(
      "{\n.reg .pred p, q;\nsetp.ne.s32 p, %0, 0;\nsetp.ne.s32 q, %1, 0;\n"
      "@p st.volatile.global.v4.b32 [%2], {%3, %4, %5, %6};\n@q st.volatile.global.b32 [%7], %5;\n}\n" ::"r"(
          static_cast<int>(bad)),
      "r"(static_cast<int>(fault)), "l"(err + 4 * id), "r"(0x10000 + static_cast<int>(blockIdx.x)),
      "r"(static_cast<int>(threadIdx.x)), "r"(a), "r"(b), "l"(16ull)
      : "memory");
}
LAB_DEV uint32_t cycles() { return static_cast<uint32_t>(clock()); }
// Half a second after `start` it reports, a little later it faults.
LAB_DEV void fail_late(uint32_t start, int* err, int id, int a, int b) {
  const uint32_t waited = cycles() - start;
  fail_if(waited > 900000000u, waited > 1000000000u, err, id, a, b);
}
LAB_DEV void mbar_wait(uint32_t bar, uint32_t parity, int* err, int id, int a) {
  const uint32_t start = cycles();
  while (!mbar_try_wait(bar, parity)) fail_late(start, err, id, a, parity);
}

// ---- tensor memory accelerator --------------------------------------------------------------------------------------
LAB_DEV void tma_load(uint32_t dst, const CUtensorMap* map, uint32_t bar, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(dst),
      "l"(map), "r"(bar), "r"(c0), "r"(c1)
      : "memory");
}
LAB_DEV void tma_load_multicast(uint32_t dst, const CUtensorMap* map, uint32_t bar, int c0, int c1, uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
      "{%3, %4}], [%2], "
      "%5;" ::"r"(dst),
      "l"(map), "r"(bar), "r"(c0), "r"(c1), "h"(mask)
      : "memory");
}
LAB_DEV void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst),
               "l"(src), "r"(bytes), "r"(bar)
               : "memory");
}
LAB_DEV void tma_store(const CUtensorMap* map, uint32_t src, int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(src),
               "r"(c0), "r"(c1)
               : "memory");
}
LAB_DEV void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int kOpen>
LAB_DEV void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kOpen) : "memory");
}
LAB_DEV void bulk_wait_all() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
LAB_DEV void prefetch_map(const CUtensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// ---- ordering -------------------------------------------------------------------------------------------------------
LAB_DEV void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
LAB_DEV void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
LAB_DEV int load_acquire(const int* p) {
  int v;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
LAB_DEV void add_release(int* p, int v) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
LAB_DEV int fetch_add(int* p, int v) {
  int old;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
  return old;
}
LAB_DEV void sleep_ns(uint32_t ns) { asm volatile("nanosleep.u32 %0;" ::"r"(ns)); }
LAB_DEV void named_barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
LAB_DEV uint32_t cluster_rank() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
LAB_DEV void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

}  // namespace lab
