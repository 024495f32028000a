// What both backends refuse of attention over pages.
#pragma once

#include "common/error.h"
#include "common/integer.h"
#include "fastpeft/paged_attention.h"

namespace fastpeft {

inline void check_paged_attention(const PagedAttentionArgs& args) {
  check(args.kv_heads > 0 && args.heads % args.kv_heads == 0, "paged_attention: ", args.heads,
        " heads of q cannot share ", args.kv_heads, " heads of k");
  check(is_power_of_two(args.page_size), "paged_attention: a page has ", args.page_size,
        " tokens; it must be a power of two");
  check(args.rotary >= 0 && args.rotary % 2 == 0 && args.rotary <= args.dim, "paged_attention: cos and sin have ",
        args.rotary, " columns; it must be an even number, at most the head dimension, ", args.dim);
  check(args.window >= 0 && args.softcap >= 0, "paged_attention: window ", args.window, " and softcap ", args.softcap,
        " must not be negative");
}

inline void check_paged_store(const PagedStoreArgs& args) {
  check(args.kv_heads > 0 && args.dim > 0, "paged_store_: tokens have ", args.kv_heads, " heads of ", args.dim,
        " elements; both must be positive");
}

}  // namespace fastpeft
