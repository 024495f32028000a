// Times of AdamW: resident state against a device copy, and state on the host against the link.
#include "adamw.cuh"

namespace {

struct Timer {
  cudaEvent_t start, stop;
  Timer() {
    CK(cudaEventCreate(&start));
    CK(cudaEventCreate(&stop));
  }
  // Median ms of one call, of five rounds of `calls` on the default stream.
  template <typename Body>
  double operator()(int calls, const Body& body) {
    body();
    std::vector<double> ms;
    for (int round = 0; round < 5; ++round) {
      CK(cudaEventRecord(start));
      for (int i = 0; i < calls; ++i) body();
      CK(cudaEventRecord(stop));
      CK(cudaEventSynchronize(stop));
      float elapsed;
      CK(cudaEventElapsedTime(&elapsed, start, stop));
      ms.push_back(elapsed / calls);
    }
    std::sort(ms.begin(), ms.end());
    return ms[2];
  }
};

double copy_rate(Timer& timer) {  // GB/s, read and written
  const int64_t bytes = int64_t{4} << 30;
  std::byte *from = allocate<std::byte>(bytes), *to = allocate<std::byte>(bytes);
  fill_bytes<<<1024, 256>>>(reinterpret_cast<uint8_t*>(from), bytes, 3);
  const double ms = timer(5, [&] { CK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, nullptr)); });
  CK(cudaFree(from));
  CK(cudaFree(to));
  return 2e-6 * bytes / ms;
}

template <typename P, typename G>
void time_list(Timer& timer, const char* name, const std::vector<int64_t>& numels, bool eight_bit, double copy,
               bool stochastic = false) {
  Tensors<P, G> tensors(numels, 0, 1);
  tensors.draw_grads(1);
  const int64_t bytes = state_bytes(tensors.numels, eight_bit);
  std::byte* state = tensors.template own<std::byte>(bytes);
  CK(cudaMemset(state, 0, bytes));
  AdamWList list = tensors.list(state, eight_bit);
  tensors.add_table(list);
  int64_t numel = 0;
  for (const int64_t n : numels) numel += n;
  const AdamWStepArgs args = tensors.step_args(list, stochastic);
  const double ms = timer(10, [&] { cuda::adamw_step(args, {}); });
  const double moved = numel * (2.0 * sizeof(P) + sizeof(G)) + 2.0 * bytes;
  const double norm_ms = timer(10, [&] { cuda::adamw_norm(tensors.norm_args(1.0), {}); });
  printf("%-36s %8.3f ms  %5.0f GB/s  %.3f of copy | norm %.3f ms %5.0f GB/s\n", name, ms, moved / ms * 1e-6,
         moved / ms * 1e-6 / copy, norm_ms, numel * double{sizeof(G)} / norm_ms * 1e-6);
  fflush(stdout);
}

// --- the link --------------------------------------------------------------------------------------------------------

// GB/s each way of copies from and to host memory at the same time, or in one direction.
double link_rate(Timer& timer, std::byte* host, int64_t bytes, bool in, bool out) {
  std::byte* device[2] = {allocate<std::byte>(bytes / 2), allocate<std::byte>(bytes / 2)};
  cudaStream_t streams[2];
  cudaEvent_t start, done[2];
  CK(cudaEventCreateWithFlags(&start, cudaEventDisableTiming));
  for (int i = 0; i < 2; ++i) {
    CK(cudaStreamCreateWithFlags(&streams[i], cudaStreamNonBlocking));
    CK(cudaEventCreateWithFlags(&done[i], cudaEventDisableTiming));
  }
  const int64_t piece = 8 << 20;
  const double ms = timer(1, [&] {
    CK(cudaEventRecord(start, nullptr));
    for (int i = 0; i < 2; ++i) {
      if (!(i == 0 ? in : out)) continue;
      CK(cudaStreamWaitEvent(streams[i], start, 0));
      for (int64_t at = 0; at < bytes / 2; at += piece) {
        std::byte* there = host + i * (bytes / 2) + at;
        CK(cudaMemcpyAsync(i == 0 ? device[0] + at : there, i == 0 ? there : device[1] + at, piece, cudaMemcpyDefault,
                           streams[i]));
      }
      CK(cudaEventRecord(done[i], streams[i]));
      CK(cudaStreamWaitEvent(nullptr, done[i], 0));
    }
  });
  for (int i = 0; i < 2; ++i) {
    CK(cudaFree(device[i]));
    CK(cudaStreamDestroy(streams[i]));
    CK(cudaEventDestroy(done[i]));
  }
  CK(cudaEventDestroy(start));
  return 0.5e-6 * bytes / ms;
}

// A step over 256M parameters of which the first `near` in 16 have their state on the device.
void time_far(Timer& timer, cuda::ArenaMode mode, int64_t slot_bytes, bool eight_bit, int near, double duplex) {
  const std::vector<int64_t> numels(16, 1 << 24);
  Tensors<float, float> tensors(numels, 0, 1);
  tensors.draw_grads(1);
  const int64_t bytes = state_bytes(numels, eight_bit), each = bytes / 16;
  cuda::Arena arena(bytes, mode, slot_bytes);
  const int64_t near_pages = near * each / cuda::kArenaPage;
  arena.move(0, near_pages, true, {});
  AdamWList lists[2];
  for (const int part : {0, 1}) {  // near, far
    const int begin = part == 0 ? 0 : near, end = part == 0 ? near : 16;
    if (begin == end) continue;
    std::byte* base = arena.view(begin * each, (end - begin) * each).address;
    AdamWList list = tensors.list(base - begin * each, eight_bit);
    list.rows.assign(list.rows.begin() + begin, list.rows.begin() + end);
    for (int i = 0; i < 16; ++i) list.tensors[i].advance = i >= begin && i < end;
    list.given = list.rows.size();
    if (part == 1) cuda::adamw_stage(list, arena);
    tensors.add_table(list);
    lists[part] = std::move(list);
  }
  double ms[3] = {};
  for (const int what : {0, 1, 2}) {  // near alone, far alone, both
    ms[what] = timer(2, [&] {
      for (const int part : {0, 1}) {
        if (lists[part].given == 0 || (what < 2 && what != part)) continue;
        AdamWStepArgs args = tensors.step_args(lists[part]);
        args.grads.assign(args.grads.begin() + (part == 0 ? 0 : near), args.grads.begin() + (part == 0 ? near : 16));
        cuda::adamw_step(args, {});
      }
    });
  }
  const double rate = (16 - near) * each / ms[1] * 1e-6;
  printf(
      "%s, slots %2d MB, %s, %2d of 16 near: near %6.2f ms, far %7.2f ms = %5.1f GB/s each way %.3f of duplex, both "
      "%7.2f ms\n",
      mode == cuda::ArenaMode::kManaged ? "managed" : "pinned ", static_cast<int>(slot_bytes >> 20),
      eight_bit ? "8-bit" : "fp32 ", near, ms[0], ms[1], rate, rate / duplex, ms[2]);
  fflush(stdout);
}

}  // namespace

int time_steps() {
  Timer timer;
  const double copy = copy_rate(timer);
  printf("device copy %.0f GB/s\n", copy);
  const std::vector<int64_t> one = {int64_t{1} << 29};
  time_list<float, float>(timer, "512M, fp32", one, false, copy);
  time_list<BFloat16, BFloat16>(timer, "512M, bf16, fp32 state", one, false, copy);
  time_list<BFloat16, BFloat16>(timer, "512M, bf16, stochastic", one, false, copy, true);
  time_list<BFloat16, BFloat16>(timer, "512M, bf16, 8-bit state", one, true, copy);
  time_list<float, float>(timer, "512M, fp32, 8-bit state", one, true, copy);
  std::vector<int64_t> lora;  // the adapters of rank 16 of an 8B model
  for (int layer = 0; layer < 32; ++layer) {
    for (const auto& [n, k] : {std::pair{4096, 4096},
                               {1024, 4096},
                               {1024, 4096},
                               {4096, 4096},
                               {14336, 4096},
                               {14336, 4096},
                               {4096, 14336}}) {
      lora.push_back(16 * k), lora.push_back(16 * n);
    }
  }
  time_list<float, float>(timer, "448 LoRA tensors, fp32", lora, false, copy);
  time_list<float, float>(timer, "448 LoRA tensors, 8-bit state", lora, true, copy);
  time_list<float, float>(timer, "4M in one tensor, fp32", {1 << 22}, false, copy);
  printf("device copy %.0f GB/s\n", copy_rate(timer));
  return 0;
}

int time_paged() {
  Timer timer;
  const int64_t bytes = int64_t{2} << 30;
  double duplex = 0;
  for (const cuda::ArenaMode mode : {cuda::ArenaMode::kPinned, cuda::ArenaMode::kManaged}) {
    if (mode == cuda::ArenaMode::kManaged && !cuda::Arena::has_managed()) continue;
    cuda::Arena arena(bytes, mode, 8 << 20);
    std::byte* host = arena.view(0, bytes).address;
    const double in = link_rate(timer, host, bytes, true, false), out = link_rate(timer, host, bytes, false, true);
    const double both = link_rate(timer, host, bytes, true, true);
    duplex = std::max(duplex, both);
    printf("%s memory copied: in %.1f, out %.1f, both %.1f GB/s each way\n",
           mode == cuda::ArenaMode::kManaged ? "managed" : "pinned", in, out, both);
    const int64_t pages = bytes / cuda::kArenaPage;
    const double away = timer(1, [&] { arena.move(0, pages, true, {}), arena.move(0, pages, false, {}); });
    printf("  moved to the device and back: %.1f GB/s\n", 2e-6 * bytes / away);
  }
  for (const cuda::ArenaMode mode : {cuda::ArenaMode::kPinned, cuda::ArenaMode::kManaged}) {
    if (mode == cuda::ArenaMode::kManaged && !cuda::Arena::has_managed()) continue;
    for (const int64_t slot : {4, 8, 16}) time_far(timer, mode, slot << 20, false, 0, duplex);
    time_far(timer, mode, 16 << 20, false, 8, duplex);
    time_far(timer, mode, 16 << 20, true, 0, duplex);
  }
  return 0;
}
