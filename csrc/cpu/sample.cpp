// Drawing tokens on the host: rows share the threads.
#include "fastpeft/sample.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/sample_math.h"
#include "cpu/numbers.h"
#include "cpu/parallel.h"

namespace fastpeft::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <typename T>
class Row {
 public:
  Row(const SampleArgs& args, int64_t row)
      : args_(args), row_(row), logits_(static_cast<const T*>(args.logits) + row * args.stride) {}

  void run() {
    if (args_.lengths[row_] < 0) return;
    read();
    const float temperature = args_.temperature[row_] > 0 ? args_.temperature[row_] : 1.0f;
    const int64_t token = args_.temperature[row_] > 0 ? draw(temperature) : largest();
    double sum = 0;
    float most = -kInfinity;
    for (int64_t i = 0; i < args_.v; ++i) most = std::max(most, logit(i));
    for (int64_t i = 0; i < args_.v; ++i) sum += std::exp((logit(i) - most) / temperature);
    args_.token[row_] = token;
    args_.logprob[row_] = (logit(token) - most) / temperature - static_cast<float>(std::log(sum));
    if (args_.seen != nullptr) args_.seen[row_ * args_.v + token] = 1;
    ++args_.lengths[row_];
    ++args_.drawn[row_];
  }

 private:
  float logit(int64_t i) const { return static_cast<float>(to_float(logits_[i])); }

  void read() {
    x_.resize(args_.v);
    const uint8_t* seen = args_.seen == nullptr ? nullptr : args_.seen + row_ * args_.v;
    const bool may_stop = args_.drawn[row_] >= args_.least[row_];
    for (int64_t i = 0; i < args_.v; ++i) {
      x_[i] = seen != nullptr && seen[i] != 0 ? penalised(logit(i), args_.penalty[row_]) : logit(i);
      if (!may_stop && is_one_of(i, args_.stop_ids, args_.stop_count)) x_[i] = -kInfinity;
    }
  }

  int64_t largest() const { return std::max_element(x_.begin(), x_.end()) - x_.begin(); }

  int64_t draw(float temperature) {
    const float most = x_[largest()];
    const auto mass = [&](float x) {
      const float share = std::exp((x - most) / temperature) * kMassOfLargest;
      return share >= 0 ? static_cast<uint64_t>(share) : 0;  // none for NaN
    };
    const float least = least_kept(mass);
    uint64_t total = 0;
    for (const float x : x_) total += x >= least ? mass(x) : 0;
    if (total == 0) return 0;  // logits that are no numbers, as the log-probability tells
    uint64_t place = drawn_place(total, args_.seed[row_], args_.drawn[row_]);
    for (int64_t i = 0; i < args_.v; ++i) {
      const uint64_t own = x_[i] >= least ? mass(x_[i]) : 0;
      if (place < own) return i;
      place -= own;
    }
    return 0;
  }

  template <typename Mass>
  float least_kept(const Mass& mass) const {
    const int64_t k = args_.top_k[row_];
    const float p = args_.top_p[row_];
    if ((k <= 0 || k >= args_.v) && p >= 1) return -kInfinity;
    std::vector<float> falling = x_;
    std::sort(falling.begin(), falling.end(), std::greater<>());
    const float of_k = k > 0 && k < args_.v ? falling[k - 1] : -kInfinity;
    if (p >= 1) return of_k;
    uint64_t total = 0, before = 0;
    for (const float x : falling) total += x >= of_k ? mass(x) : 0;
    const uint64_t limit = top_p_limit(total, p);
    float least = falling[0];
    for (const float x : falling) {
      if (x < of_k || before >= limit) break;
      least = x, before += mass(x);
    }
    return least;
  }

  const SampleArgs& args_;
  const int64_t row_;
  const T* logits_;
  std::vector<float> x_;
};

}  // namespace

void sample(const SampleArgs& args, const Context& context) {
  check_sample(args);
  dispatch(args.dtype, [&](auto zero) {
    parallel_for(args.rows, 1, context.threads, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) Row<decltype(zero)>(args, row).run();
    });
  });
}

}  // namespace fastpeft::cpu
