// What the checks and the times of AdamW share: tensors with state, on the device or in an arena.
#pragma once

#include "common/adamw_table.h"
#include "fastpeft/adamw.h"
#include "fastpeft/arena.h"
#include "lab.cuh"

constexpr double kLr = 1e-2, kBeta1 = 0.9, kBeta2 = 0.99, kEps = 1e-8, kDecay = 0.1;

template <typename T>
constexpr DType dtype_of() {
  return std::is_same_v<T, float> ? DType::kFloat32 : std::is_same_v<T, Float16> ? DType::kFloat16 : DType::kBFloat16;
}

inline int64_t scales_of(int64_t numel) { return (numel + kAdamWBlock - 1) / kAdamWBlock; }
inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// State of a tensor, one part behind the other: m, v and, of 8 bits, their scales.
struct StateLayout {
  int64_t offset, v, absmax, absmax_sq, end;
  StateLayout(int64_t from, int64_t numel, bool eight_bit) : offset(from) {
    const int64_t each = eight_bit ? 1 : 4, scales = eight_bit ? 4 * scales_of(numel) : 0;
    v = round_up(offset + numel * each, 16);
    absmax = round_up(v + numel * each, 16);
    absmax_sq = round_up(absmax + scales, 16);
    end = round_up(absmax_sq + scales, 256);
  }
};

inline int64_t state_bytes(const std::vector<int64_t>& numels, bool eight_bit) {
  int64_t end = 0;
  for (const int64_t numel : numels) end = StateLayout(end, numel, eight_bit).end;
  return end;
}

// Parameters and gradients of some sizes, with a control; state comes from outside.
template <typename P, typename G>
struct Tensors {
  std::vector<int64_t> numels;
  int64_t shift;  // elements that every parameter is off the 16-byte grid
  std::vector<P*> params;
  std::vector<G*> grads;
  float* steps;
  AdamWControl* control;
  float* sums;
  std::vector<void*> owned;

  Tensors(std::vector<int64_t> sizes, int64_t shift_, uint32_t seed) : numels(std::move(sizes)), shift(shift_) {
    for (size_t i = 0; i < numels.size(); ++i) {
      params.push_back(own<P>(numels[i] + shift) + shift);
      grads.push_back(own<G>(numels[i] + shift) + shift);
      fill_normal<<<1024, 256>>>(params[i], numels[i], seed + static_cast<uint32_t>(i), 0.2f);
    }
    steps = own<float>(numels.size());
    control = own<AdamWControl>(1);
    sums = own<float>(kAdamWSums);
    CK(cudaMemset(steps, 0, numels.size() * sizeof(float)));
    const AdamWControl start{.grad_factor = 1.0f};
    CK(cudaMemcpy(control, &start, sizeof(start), cudaMemcpyHostToDevice));
  }
  ~Tensors() {
    for (void* memory : owned) cudaFree(memory);
  }
  Tensors(const Tensors&) = delete;
  Tensors& operator=(const Tensors&) = delete;

  template <typename T>
  T* own(int64_t count) {
    T* memory = allocate<T>(std::max<int64_t>(count, 1));
    owned.push_back(memory);
    return memory;
  }
  void draw_grads(uint32_t seed, float scale = 1.0f) {
    for (size_t i = 0; i < numels.size(); ++i) {
      if (numels[i] > 0) fill_normal<<<1024, 256>>>(grads[i], numels[i], seed * 977 + static_cast<uint32_t>(i), scale);
    }
  }
  // A list over state that begins at `state`, laid out one tensor behind the other.
  AdamWList list(std::byte* state, bool eight_bit) {
    AdamWList made{{}, {}, dtype_of<P>(), eight_bit, numels.size()};
    int64_t end = 0;
    for (size_t i = 0; i < numels.size(); ++i) {
      const StateLayout at(end, numels[i], eight_bit);
      end = at.end;
      made.rows.push_back({params[i], state + at.offset, state + at.v, reinterpret_cast<float*>(state + at.absmax),
                           reinterpret_cast<float*>(state + at.absmax_sq), numels[i], 0, static_cast<int64_t>(i)});
      made.tensors.push_back({steps + i, static_cast<int64_t>(i), 1});
    }
    return made;
  }
  void add_table(AdamWList& made) { made.table = own<std::byte>(adamw_table_bytes(made)); }

  AdamWStepArgs step_args(AdamWList& made, bool stochastic = false) const {
    return {&made,
            {grads.begin(), grads.end()},
            dtype_of<G>(),
            control,
            kLr,
            nullptr,
            kBeta1,
            kBeta2,
            kEps,
            kDecay,
            false,
            stochastic,
            7};
  }
  AdamWNormArgs norm_args(double max_norm, const float* grad_scale = nullptr) const {
    AdamWNormArgs args{{{{}, dtype_of<G>()}}, control, sums, max_norm, grad_scale, nullptr};
    for (size_t i = 0; i < numels.size(); ++i) args.gradients[0].list.push_back({grads[i], numels[i]});
    return args;
  }
};

// Rates, times and the link (adamw_time.cu).
int time_steps();
int time_paged();
