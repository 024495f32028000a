// Keys and values of many tokens into pages on the host: tokens share the threads.
#include <algorithm>

#include "common/paged_attention_checks.h"
#include "cpu/numbers.h"
#include "cpu/parallel.h"
#include "fastpeft/paged_attention.h"

namespace fastpeft::cpu {
namespace {

template <typename T>
void store(const PagedStoreArgs& args, int64_t token) {
  for (int64_t head = 0; head < args.kv_heads; ++head) {
    const int64_t row = (args.pages[token] * args.kv_heads + head) * args.page_size + args.offsets[token];
    const auto copy = [&](const HeadRows& x, void* pages) {
      const T* from = static_cast<const T*>(x.values) + token * x.row_stride + head * x.head_stride;
      std::copy(from, from + args.dim, static_cast<T*>(pages) + row * args.dim);
    };
    copy(args.k, args.k_pages);
    copy(args.v, args.v_pages);
  }
}

}  // namespace

void paged_store(const PagedStoreArgs& args, const Context& context) {
  check_paged_store(args);
  for (int64_t token = 0; token < args.tokens; ++token) {
    const int64_t page = args.pages[token], offset = args.offsets[token];
    check(page < 0 || (page < args.page_count && offset >= 0 && offset < args.page_size), "paged_store_: token ", token,
          " goes to place ", offset, " of page ", page, "; there are ", args.page_count, " pages of ", args.page_size);
  }
  dispatch(args.dtype, [&](auto zero) {
    parallel_for(args.tokens, 16, context.threads, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        if (args.pages[token] >= 0) store<decltype(zero)>(args, token);
      }
    });
  });
}

}  // namespace fastpeft::cpu
