// Attention over pages on the host: the rows' heads of k share the threads.
#include "fastpeft/paged_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/paged_attention_checks.h"
#include "cpu/numbers.h"
#include "cpu/parallel.h"

namespace fastpeft::cpu {
namespace {

constexpr int kLanes = 16;  // sums side by side, in an order that does not depend on the vector unit

template <typename T>
void to_compute(const T* from, int64_t count, ComputeType<T>* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
}

template <typename T>
ComputeType<T> dot(const ComputeType<T>* q, const T* k, int64_t dim) {
  ComputeType<T> sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += q[i + lane] * to_float(k[i + lane]);
  }
  for (; i < dim; ++i) sums[i % kLanes] += q[i] * to_float(k[i]);
  ComputeType<T> sum = 0;
  for (const ComputeType<T> lane : sums) sum += lane;
  return sum;
}

// One head of k of one row, with the heads of q that share it.
template <typename T>
class Head {
  using Compute = ComputeType<T>;

 public:
  Head(const PagedAttentionArgs& args, int64_t row, int64_t kv_head)
      : args_(args), row_(row), kv_head_(kv_head), group_(args.heads / args.kv_heads), q_(args.dim), sum_(args.dim) {}

  void run() {
    const int64_t length = args_.lengths[row_];
    T* out = static_cast<T*>(args_.out) + (row_ * args_.heads + kv_head_ * group_) * args_.dim;
    if (length < 0) {
      std::fill(out, out + group_ * args_.dim, T{});
      return;
    }
    join(length);
    const int64_t first = args_.window > 0 ? std::max<int64_t>(0, length + 1 - args_.window) : 0;
    for (int64_t i = 0; i < group_; ++i) attend(i, first, length + 1, out + i * args_.dim);
  }

 private:
  T* at(void* pages, int64_t token) const {
    const int64_t page = args_.table[row_ * args_.row_pages + token / args_.page_size];
    return static_cast<T*>(pages) +
           ((page * args_.kv_heads + kv_head_) * args_.page_size + token % args_.page_size) * args_.dim;
  }

  const T* of(const HeadRows& x, int64_t head) const {
    return static_cast<const T*>(x.values) + row_ * x.row_stride + head * x.head_stride;
  }

  // Rotated and rounded, as the cache holds it.
  T rotated(const T* x, int64_t i) const {
    const int64_t half = args_.rotary / 2;
    if (i >= args_.rotary) return x[i];
    const Compute cos = to_float(static_cast<const T*>(args_.cos)[row_ * args_.rotary + i]);
    const Compute sin = to_float(static_cast<const T*>(args_.sin)[row_ * args_.rotary + i]);
    const Compute other = i < half ? -to_float(x[i + half]) : to_float(x[i - half]);
    return from_compute<T>(to_float(x[i]) * cos + other * sin);
  }

  void join(int64_t length) const {
    const T *k = of(args_.k, kv_head_), *v = of(args_.v, kv_head_);
    T* to = at(args_.k_pages, length);
    for (int64_t i = 0; i < args_.dim; ++i) to[i] = rotated(k, i);
    std::copy(v, v + args_.dim, at(args_.v_pages, length));
  }

  void attend(int64_t head, int64_t first, int64_t end, T* out) {
    const T* q = of(args_.q, kv_head_ * group_ + head);
    for (int64_t i = 0; i < args_.dim; ++i) q_[i] = to_float(rotated(q, i));
    scores_.resize(end - first);
    Compute most = -std::numeric_limits<Compute>::infinity();
    for (int64_t token = first; token < end; ++token) {
      Compute score = static_cast<Compute>(args_.scale) * dot(q_.data(), at(args_.k_pages, token), args_.dim);
      if (args_.softcap > 0) {
        const Compute cap = static_cast<Compute>(args_.softcap);
        score = cap * std::tanh(score / cap);
      }
      scores_[token - first] = score;
      most = std::max(most, score);
    }
    Compute total = 0;
    std::fill(sum_.begin(), sum_.end(), Compute{0});
    for (int64_t token = first; token < end; ++token) {
      const Compute weight = std::exp(scores_[token - first] - most);
      const T* v = at(args_.v_pages, token);
      total += weight;
      for (int64_t i = 0; i < args_.dim; ++i) sum_[i] += weight * to_float(v[i]);
    }
    for (int64_t i = 0; i < args_.dim; ++i) out[i] = from_compute<T>(sum_[i] / total);
  }

  const PagedAttentionArgs& args_;
  const int64_t row_, kv_head_, group_;
  std::vector<Compute> q_, sum_, scores_;
};

}  // namespace

void paged_attention(const PagedAttentionArgs& args, const Context& context) {
  check_paged_attention(args);
  for (int64_t row = 0; row < args.rows; ++row) {
    check(args.lengths[row] < args.row_pages * args.page_size, "paged_attention: row ", row, " has ", args.lengths[row],
          " tokens; its ", args.row_pages, " pages have no room for another");
  }
  dispatch(args.dtype, [&](auto zero) {
    parallel_for(args.rows * args.kv_heads, 1, context.threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Head<decltype(zero)>(args, i / args.kv_heads, i % args.kv_heads).run();
      }
    });
  });
}

}  // namespace fastpeft::cpu
