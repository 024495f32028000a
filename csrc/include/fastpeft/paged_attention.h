// Attention of one new token a row over a cache that lies in pages, which the token's key and value join first.
//
//   s[j] = scale * q . k[j], then softcap * tanh(s / softcap) if there is a cap;   out = softmax(s) V
//
// over the last `window` of the row's tokens, the new one included. With angles, q and the new k are rotated by them
// (rope.h) and rounded before anything else. A row whose length is below 0 is idle: nothing joins, its output is zero.
//
// paged_store puts the keys and values of many tokens into pages, as a prompt has them.
//
// Layout   pages [pages, kv_heads, page_size, dim]; token j of a row lies in page table[row][j / page_size].
// Source   pages: Kwon et al., "Efficient Memory Management for LLM Serving with PagedAttention", arXiv 2309.06180.
#pragma once

#include "fastpeft/types.h"

namespace fastpeft {

// [rows, heads, dim], elements of a head side by side.
struct HeadRows {
  const void* values;
  int64_t row_stride, head_stride;
};

struct PagedAttentionArgs {
  HeadRows q, k, v;  // heads of q, kv_heads of the others
  void *k_pages, *v_pages;
  const int32_t* table;    // [rows, row_pages]
  const int32_t* lengths;  // [rows] of tokens that are there before the new one
  const void *cos, *sin;   // [rows, rotary] of dtype, or null
  void* out;               // [rows, heads, dim]
  DType dtype;             // float64 on the CPU only
  int64_t rows, heads, kv_heads, dim, rotary;
  int64_t page_size;  // a power of two
  int64_t row_pages;
  int64_t window;  // 0: all tokens
  double scale;
  double softcap;  // 0: none
  // CUDA: each row's tokens are cut into at most this many parts, of which the last block to end makes the sum.
  int64_t parts = 1;
  float* partial = nullptr;      // [rows, heads, parts, dim + 2], if there are several
  unsigned* counters = nullptr;  // [rows, blocks of heads]: zero, and zero again afterwards
};

struct PagedStoreArgs {
  HeadRows k, v;  // [tokens, kv_heads, dim]
  void *k_pages, *v_pages;
  const int32_t* pages;    // [tokens]; below 0: not stored
  const int32_t* offsets;  // [tokens], places in the page; those of tokens that are stored differ
  DType dtype;             // float64 on the CPU only
  int64_t tokens, kv_heads, dim;
  int64_t page_size, page_count;
};

namespace cpu {
void paged_attention(const PagedAttentionArgs& args, const Context& context);
void paged_store(const PagedStoreArgs& args, const Context& context);
}  // namespace cpu

namespace cuda {
void paged_attention(const PagedAttentionArgs& args, const Context& context);
void paged_store(const PagedStoreArgs& args, const Context& context);
}  // namespace cuda

}  // namespace fastpeft
