// AdamW without torch: every kernel against a plain double reference, and far state against near state, to the bit.
//
//   adamw check | quick | time | paged
#include "adamw.cuh"

#include "common/dynamic_map.h"

namespace {

int g_failed = 0;

void report(bool good, const std::string& what, double error) {
  if (!good) ++g_failed;
  printf("%s  %-64s %.2e\n", good ? "ok    " : "FAILED", what.c_str(), error);
}

template <typename T>
std::vector<T> host(const void* from, int64_t count) {
  std::vector<T> to(count);
  CK(cudaMemcpy(to.data(), from, count * sizeof(T), cudaMemcpyDefault));
  return to;
}
double number(float x) { return x; }
double number(BFloat16 x) { return __bfloat162float(x); }
double number(Float16 x) { return __half2float(x); }

// --- one step against double -----------------------------------------------------------------------------------------

template <bool kSigned>
double worst_code(const std::vector<uint8_t>& codes, const std::vector<float>& scales,
                  const std::vector<double>& exact) {
  static const DynamicMap<kSigned> map;
  double worst = 0;
  for (size_t i = 0; i < codes.size(); ++i) {
    const double scale = scales[i / kAdamWBlock], x = scale > 0 ? exact[i] / scale : 0;
    double nearest = 1e9;
    for (int code = 0; code < 256; ++code) nearest = std::min(nearest, std::fabs(map.values[code] - x));
    const double off = std::fabs(map.values[codes[i]] - x) - nearest;
    const bool lifted = !kSigned && codes[i] == 1 && exact[i] > 0;  // never to zero
    if (!lifted) worst = std::max(worst, off);
  }
  return worst;
}

template <typename P, typename G>
void check_steps(const char* name, std::vector<int64_t> numels, int64_t shift, bool eight_bit, double max_norm,
                 double allowed) {
  Tensors<P, G> tensors(std::move(numels), shift, 11);
  const int64_t bytes = state_bytes(tensors.numels, eight_bit);
  std::byte* state = tensors.template own<std::byte>(bytes);
  CK(cudaMemset(state, 0, bytes));
  AdamWList list = tensors.list(state, eight_bit);
  tensors.add_table(list);
  float* scale = tensors.template own<float>(1);
  const float scale_value = 8.0f;
  CK(cudaMemcpy(scale, &scale_value, 4, cudaMemcpyHostToDevice));

  double wrong = 0, reached = 0, wrong_state = 0, norm_error = 0;
  for (int step = 1; step <= 3; ++step) {
    tensors.draw_grads(step, 8.0f);
    std::vector<std::vector<P>> params;
    std::vector<std::vector<std::byte>> states;
    std::vector<std::vector<G>> grads;
    double sum = 0;
    for (size_t i = 0; i < tensors.numels.size(); ++i) {
      params.push_back(host<P>(tensors.params[i], tensors.numels[i]));
      grads.push_back(host<G>(tensors.grads[i], tensors.numels[i]));
      for (const G g : grads[i]) sum += number(g) * number(g);
    }
    const std::vector<std::byte> before = host<std::byte>(state, bytes);
    cuda::adamw_norm(tensors.norm_args(max_norm, scale), {});
    cuda::adamw_step(tensors.step_args(list), {});
    CK(cudaDeviceSynchronize());
    const AdamWControl control = host<AdamWControl>(tensors.control, 1)[0];
    const double norm = std::sqrt(sum) / 8, factor = std::min(1.0, max_norm / (norm + 1e-6)) / 8;
    norm_error =
        std::max({norm_error, std::fabs(control.grad_norm / norm - 1), std::fabs(control.grad_factor / factor - 1)});
    const std::vector<std::byte> after = host<std::byte>(state, bytes);

    int64_t end = 0;
    for (size_t i = 0; i < tensors.numels.size(); ++i) {
      const int64_t n = tensors.numels[i];
      const StateLayout at(end, n, eight_bit);
      end = at.end;
      const std::vector<P> p_after = host<P>(tensors.params[i], n);
      static const DynamicMap<true> first_map;
      static const DynamicMap<false> second_map;
      const auto* codes = reinterpret_cast<const uint8_t*>(before.data());
      const auto scales = [&](int64_t from) { return reinterpret_cast<const float*>(before.data() + from); };
      std::vector<double> ms(n), vs(n);
      for (int64_t j = 0; j < n; ++j) {
        double& m = ms[j];
        double& v = vs[j];
        m = eight_bit ? first_map.values[codes[at.offset + j]] * scales(at.absmax)[j / kAdamWBlock]
                      : scales(at.offset)[j];
        v = eight_bit ? second_map.values[codes[at.v + j]] * scales(at.absmax_sq)[j / kAdamWBlock] : scales(at.v)[j];
        const double g = number(grads[i][j]) * factor, p = number(params[i][j]);
        m += (1 - kBeta1) * (g - m), v = kBeta2 * v + (1 - kBeta2) * g * g;
        const double exact = p * (1 - kLr * kDecay) - kLr / (1 - std::pow(kBeta1, step)) * m /
                                                          (std::sqrt(v / (1 - std::pow(kBeta2, step))) + kEps);
        wrong += std::pow(number(p_after[j]) - exact, 2), reached += std::pow(exact - p, 2);
        if (!eight_bit) {
          const auto* floats = reinterpret_cast<const float*>(after.data());
          wrong_state = std::max({wrong_state, std::fabs(floats[at.offset / 4 + j] - m) / (std::fabs(m) + std::fabs(g)),
                                  std::fabs(floats[at.v / 4 + j] - v) / (v + 1e-9)});
        }
      }
      if (eight_bit && n > 0) {
        const auto part = [&](int64_t from) {
          const auto* bytes_after = reinterpret_cast<const uint8_t*>(after.data()) + from;
          return std::vector<uint8_t>(bytes_after, bytes_after + n);
        };
        const auto scales_after = [&](int64_t from) {
          const auto* floats = reinterpret_cast<const float*>(after.data() + from);
          return std::vector<float>(floats, floats + scales_of(n));
        };
        wrong_state = std::max({wrong_state, worst_code<true>(part(at.offset), scales_after(at.absmax), ms),
                                worst_code<false>(part(at.v), scales_after(at.absmax_sq), vs)});
      }
    }
  }
  const double error = std::sqrt(wrong / reached);
  report(error < allowed, std::string(name) + ": update", error);
  report(wrong_state < 1e-5, std::string(name) + ": state", wrong_state);
  report(norm_error < 1e-5, std::string(name) + ": norm and factor", norm_error);
}

void check_skip() {
  Tensors<float, float> tensors({5000, 77}, 0, 3);
  const int64_t bytes = state_bytes(tensors.numels, false);
  std::byte* state = tensors.own<std::byte>(bytes);
  CK(cudaMemset(state, 0, bytes));
  AdamWList list = tensors.list(state, false);
  tensors.add_table(list);
  tensors.draw_grads(1);
  cuda::adamw_step(tensors.step_args(list), {});
  const auto everything = [&] {
    std::vector<std::byte> all = host<std::byte>(state, bytes);
    for (size_t i = 0; i < tensors.numels.size(); ++i) {
      const auto part = host<std::byte>(tensors.params[i], 4 * tensors.numels[i]);
      all.insert(all.end(), part.begin(), part.end());
    }
    const auto steps = host<std::byte>(tensors.steps, 4 * tensors.numels.size());
    all.insert(all.end(), steps.begin(), steps.end());
    return all;
  };
  const auto before = everything();
  const float bad[2] = {NAN, INFINITY};
  for (int i = 0; i < 2; ++i) {
    CK(cudaMemcpy(tensors.grads[1] + 76, &bad[i], 4, cudaMemcpyHostToDevice));
    cuda::adamw_norm(tensors.norm_args(1.0), {});
    cuda::adamw_step(tensors.step_args(list), {});
  }
  CK(cudaDeviceSynchronize());
  const auto control = host<AdamWControl>(tensors.control, 1)[0];
  report(everything() == before && control.skip == 1 && control.skipped == 2, "a gradient that is not finite: no write",
         static_cast<double>(control.skipped));
}

// --- the same bits wherever the state lies ---------------------------------------------------------------------------

constexpr int64_t kPage = cuda::kArenaPage;

// Parameters and state after three steps, in host memory. Without an arena all state is in plain device memory; else
// that of the first `near` tensors is on pages of the device, and the rest behind them on the host, in two pieces each.
template <typename P>
std::vector<std::byte> run_steps(bool eight_bit, cuda::Arena* arena, size_t near, bool stochastic) {
  const std::vector<int64_t> numels = {99999, 3, 700001, 1 << 21, 0, 256, 1 << 20};
  Tensors<P, P> tensors(numels, 0, 5);
  std::vector<StateLayout> layouts;
  int64_t end = 0, near_pages = 0;
  for (size_t i = 0; i < numels.size(); ++i) {
    if (arena != nullptr && i == near) near_pages = (end + kPage - 1) / kPage, end = near_pages * kPage;
    end = layouts.emplace_back(end, numels[i], eight_bit).end;
  }
  if (arena == nullptr) near = numels.size();
  std::byte* plain = arena == nullptr ? tensors.template own<std::byte>(end) : nullptr;
  const auto place = [&](int64_t offset, int64_t bytes) {
    return arena ? arena->view(offset, bytes).address : plain + offset;
  };
  if (arena != nullptr) arena->move(0, arena->bytes() / kPage, false, {});
  CK(cudaDeviceSynchronize());
  CK(cudaMemset(place(0, end), 0, end));
  if (arena != nullptr) arena->move(0, near_pages, true, {});
  CK(cudaDeviceSynchronize());

  std::vector<AdamWList> lists;
  std::vector<std::vector<size_t>> tensors_of;  // for each row of a list
  for (const bool is_near : {true, false}) {
    AdamWList list{{}, {}, dtype_of<P>(), eight_bit, 0};
    tensors_of.emplace_back();
    for (size_t i = 0; i < numels.size(); ++i) {
      list.tensors.push_back({tensors.steps + i, static_cast<int64_t>(i), (i < near) == is_near});
      if ((i < near) != is_near) continue;
      const StateLayout& at = layouts[i];
      std::byte* base = place(at.offset, at.end - at.offset);
      const int64_t each = eight_bit ? 1 : 4, cut = is_near ? numels[i] : numels[i] / 3 / kAdamWBlock * kAdamWBlock;
      for (const auto& [first, behind] : {std::pair{int64_t{0}, cut}, std::pair{cut, numels[i]}}) {
        if (first == behind) continue;
        const int64_t block = 4 * (first / kAdamWBlock);
        list.rows.push_back({tensors.params[i] + first, base + first * each, base + (at.v - at.offset) + first * each,
                             reinterpret_cast<float*>(base + (at.absmax - at.offset) + block),
                             reinterpret_cast<float*>(base + (at.absmax_sq - at.offset) + block), behind - first, first,
                             static_cast<int64_t>(i)});
        tensors_of.back().push_back(i);
      }
    }
    list.given = list.rows.size();
    if (!is_near && list.given > 0) cuda::adamw_stage(list, *arena);
    tensors.add_table(list);
    lists.push_back(std::move(list));
  }
  cudaStream_t stream;
  CK(cudaStreamCreate(&stream));
  const Context context{reinterpret_cast<uintptr_t>(stream)};
  for (int step = 1; step <= 3; ++step) {
    tensors.draw_grads(step);
    CK(cudaDeviceSynchronize());
    cuda::adamw_norm(tensors.norm_args(5.0), context);
    for (size_t l = 0; l < lists.size(); ++l) {
      if (lists[l].given == 0) continue;
      AdamWStepArgs args = tensors.step_args(lists[l], stochastic);
      args.grads.clear();
      for (const size_t i : tensors_of[l]) args.grads.push_back(tensors.grads[i]);
      cuda::adamw_step(args, context);
    }
    CK(cudaStreamSynchronize(stream));
  }
  CK(cudaStreamDestroy(stream));
  std::vector<std::byte> all;
  const auto append = [&](const void* from, int64_t bytes) {
    const std::vector<std::byte> part = host<std::byte>(from, bytes);
    all.insert(all.end(), part.begin(), part.end());
  };
  for (size_t i = 0; i < numels.size(); ++i) {
    const StateLayout& at = layouts[i];
    append(tensors.params[i], numels[i] * static_cast<int64_t>(sizeof(P)));
    append(place(at.offset, at.end - at.offset), at.end - at.offset);
  }
  return all;
}

template <typename P>
void check_far(const char* name, bool eight_bit, bool stochastic) {
  const std::vector<std::byte> near = run_steps<P>(eight_bit, nullptr, 0, stochastic);
  for (const cuda::ArenaMode mode : {cuda::ArenaMode::kPinned, cuda::ArenaMode::kManaged}) {
    if (mode == cuda::ArenaMode::kManaged && !cuda::Arena::has_managed()) continue;
    cuda::Arena arena(64 << 20, mode, 4 << 20);
    for (const size_t near_tensors : {0, 3}) {
      const std::vector<std::byte> far = run_steps<P>(eight_bit, &arena, near_tensors, stochastic);
      size_t differing = near.size() == far.size() ? 0 : near.size();
      for (size_t i = 0; i < std::min(near.size(), far.size()); ++i) differing += near[i] != far[i];
      report(differing == 0,
             concat(name, mode == cuda::ArenaMode::kManaged ? ", managed, " : ", pinned, ", near_tensors,
                    " tensors near: same bits"),
             static_cast<double>(differing));
    }
  }
}

int check(bool quick) {
  const std::vector<int64_t> odd = {1, 7, 4096, 4097, 255, 256, 257, 100003, 0, 12345};
  check_steps<float, float>("fp32", odd, 0, false, 1e30, 1e-5);
  check_steps<float, float>("fp32, 8-bit", odd, 0, true, 1.0, 1e-5);
  check_skip();
  if (!quick) {
    check_steps<float, float>("fp32, off the grid", odd, 1, false, 1.0, 1e-5);
    check_steps<BFloat16, BFloat16>("bf16", odd, 0, false, 1.0, 0.15);
    check_steps<BFloat16, float>("bf16, fp32 gradients", odd, 3, false, 1.0, 0.15);
    check_steps<Float16, Float16>("fp16", odd, 0, false, 1.0, 0.03);
    check_steps<float, BFloat16>("fp32, bf16 gradients", odd, 0, false, 1.0, 1e-5);
    check_steps<BFloat16, BFloat16>("bf16, 8-bit, off the grid", odd, 1, true, 1.0, 0.15);
    check_steps<BFloat16, BFloat16>("bf16, 8-bit", odd, 0, true, 1.0, 0.15);
    std::vector<int64_t> many(2500, 33);
    many[17] = 70000;
    check_steps<float, float>("2500 tensors", many, 0, false, 1.0, 1e-5);
  }
  check_far<float>("fp32", false, false);
  check_far<BFloat16>("bf16, 8-bit, stochastic", true, true);
  if (!quick) {
    check_far<BFloat16>("bf16, stochastic", false, true);
    check_far<float>("fp32, 8-bit", true, false);
  }
  printf("%d failed\n", g_failed);
  return g_failed > 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string command = argc > 1 ? argv[1] : "check";
  if (command == "check" || command == "quick") return check(command == "quick");
  if (command == "time") return time_steps();
  if (command == "paged") return time_paged();
  printf("adamw check | quick | time | paged\n");
  return 2;
}
