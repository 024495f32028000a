// Times the block kernels and variants of them without torch: graph replays over rotated tensors, variants in turns.
//
//   blocks [copy|norm|add_norm|heads|swiglu|swiglu_bwd|norm_bwd|dweight|add_dweight ...]     all of them without a name
//
// A row: median us, per cent of 3023 GB/s, time over the first row's, and the error against a plain kernel in units of
// the largest allowed. "now" is the kernel of csrc/cuda. L is how loads are hinted, S stores, T threads, P packs a
// thread.
#include "blocks_kernels.cuh"
#include "cuda/rms_norm_config.h"
#include "fastpeft/glu.h"
#include "fastpeft/rms_norm.h"

using namespace variants;

namespace {

constexpr int kSets = 4, kRounds = 15;
constexpr double kCopyRoof = 3023e3;  // bytes a us
cudaStream_t g_stream;
int g_sms;

Context context() { return {reinterpret_cast<uintptr_t>(g_stream)}; }
std::string what() { return "lab"; }

T16* normal(size_t count, uint32_t seed, float scale = 1.0f) {
  T16* p = allocate<T16>(count);
  fill_normal<<<2048, 256>>>(p, count, seed, scale);
  return p;
}
template <typename Args>
void go(void (*kernel)(Args), unsigned blocks, unsigned threads, bool overlap, const Args& args, unsigned smem = 0) {
  launch(what, kernel, Grid{.blocks = blocks, .threads = threads, .smem_bytes = smem, .overlap_launch = overlap},
         context(), args);
}

// --- plain kernels, for what is right
// ----------------------------------------------------------------------------------

__global__ void plain_norm(const T16* x, const T16* r, const T16* w, T16* y, T16* h, float* rstd, int n, float eps) {
  __shared__ double sums[256];
  const int64_t start = int64_t{blockIdx.x} * n;
  double sum = 0;
  for (int i = threadIdx.x; i < n; i += 256) {
    const float v = to_float(x[start + i]) + (r != nullptr ? to_float(r[start + i]) : 0.0f);
    if (h != nullptr) h[start + i] = from_float<T16>(v);
    const double rounded = to_float(from_float<T16>(v));
    sum += rounded * rounded;
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  sum = 0;
  for (int i = 0; i < 256; ++i) sum += sums[i];
  const float factor = static_cast<float>(1.0 / sqrt(sum / n + eps));
  if (threadIdx.x == 0) rstd[blockIdx.x] = factor;
  for (int i = threadIdx.x; i < n; i += 256) {
    const float v = to_float(from_float<T16>(to_float(x[start + i]) + (r != nullptr ? to_float(r[start + i]) : 0.0f)));
    y[start + i] = from_float<T16>(to_float(from_float<T16>(v * factor)) * to_float(w[i]));
  }
}
__global__ void plain_backward(const T16* dy, const T16* h, const T16* dh, const T16* w, const float* rstd, T16* dx,
                               int n) {
  __shared__ double sums[256];
  const int64_t start = int64_t{blockIdx.x} * n;
  const double factor = rstd[blockIdx.x];
  double sum = 0;
  for (int i = threadIdx.x; i < n; i += 256) {
    sum += double(to_float(dy[start + i])) * to_float(w[i]) * to_float(h[start + i]) * factor;
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  sum = 0;
  for (int i = 0; i < 256; ++i) sum += sums[i];
  for (int i = threadIdx.x; i < n; i += 256) {
    const double n_i = to_float(h[start + i]) * factor, g = double(to_float(dy[start + i])) * to_float(w[i]);
    dx[start + i] =
        from_float<T16>(float(factor * (g - n_i * sum / n) + (dh != nullptr ? double(to_float(dh[start + i])) : 0.0)));
  }
}
__global__ void plain_dweight(const T16* dy, const T16* h, const float* rstd, T16* dweight, int rows, int n) {
  __shared__ double sums[256];
  double sum = 0;
  for (int row = threadIdx.x; row < rows; row += 256) {
    const int64_t at = int64_t{row} * n + blockIdx.x;
    sum += double(to_float(dy[at])) * to_float(from_float<T16>(to_float(h[at]) * rstd[row]));
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sum = 0;
  for (int i = 0; i < 256; ++i) sum += sums[i];
  dweight[blockIdx.x] = from_float<T16>(static_cast<float>(sum));
}
__global__ void plain_glu(const T16* gate, const T16* up, const T16* dy, T16* out, T16* dgate, T16* dup,
                          int64_t count) {
  for (int64_t i = blockIdx.x * int64_t{256} + threadIdx.x; i < count; i += int64_t{gridDim.x} * 256) {
    const double x = to_float(gate[i]), s = 1.0 / (1.0 + exp(-x)), u = to_float(up[i]);
    if (dy == nullptr) {
      out[i] = from_float<T16>(float(x * s * u));
    } else {
      const double g = to_float(dy[i]);
      dgate[i] = from_float<T16>(float(g * u * s * (1 + x * (1 - s))));
      dup[i] = from_float<T16>(float(g * x * s));
    }
  }
}

__global__ void worst_error(const T16* got, const T16* want, size_t count, float rms, unsigned* worst) {
  float most = 0.0f;
  for (size_t i = blockIdx.x * size_t{256} + threadIdx.x; i < count; i += size_t{256} * gridDim.x) {
    const float w = to_float(want[i]), error = fabsf(to_float(got[i]) - w) / (rms + fabsf(w));
    most = error == error ? fmaxf(most, error) : 1e9f;
  }
  atomicMax(worst, __float_as_uint(most));
}

// --- rows
// -------------------------------------------------------------------------------------------------------------

// An output of set 0 and what it should be.
struct Expected {
  T16* got;
  T16* want;
  size_t count;
  float rms;
};

struct Table {
  std::string title;
  double bytes;
  std::vector<Contender> list;
  std::vector<Expected> expected;
  std::vector<std::string> checks;

  // Keeps what a plain kernel left in `got`.
  void expect(T16* got, size_t count) {
    Expected e{got, allocate<T16>(count), count, 0.0f};
    CK(cudaDeviceSynchronize());
    CK(cudaMemcpy(e.want, got, 2 * count, cudaMemcpyDeviceToDevice));
    std::vector<T16> some(std::min<size_t>(count, 1 << 16));
    CK(cudaMemcpy(some.data(), got, 2 * some.size(), cudaMemcpyDeviceToHost));
    for (const T16 v : some) e.rms += static_cast<float>(v) * static_cast<float>(v) / some.size();
    e.rms = std::sqrt(e.rms);
    expected.push_back(e);
  }
  void add(const std::string& name, std::function<void(int)> run, bool checked = true) {
    for (const Expected& e : expected) CK(cudaMemset(e.got, 0xff, 2 * e.count));
    CK(cudaDeviceSynchronize());
    run(0);
    CK(cudaDeviceSynchronize());
    unsigned* bits = allocate<unsigned>(1);
    CK(cudaMemset(bits, 0, 4));
    for (const Expected& e : expected) worst_error<<<1024, 256>>>(e.got, e.want, e.count, e.rms, bits);
    float worst;
    CK(cudaMemcpy(&worst, bits, 4, cudaMemcpyDeviceToHost));
    cudaFree(bits);
    char text[32];
    snprintf(text, sizeof text, worst < 8e-3f ? "%.2f" : "WRONG %.3g", worst / 8e-3f);
    checks.push_back(checked ? text : "-");
    list.push_back({name, std::move(run)});
  }
  void print() {
    measure(list, 256, g_stream, kRounds, kSets);
    printf("== %s: %.1f MB\n", title.c_str(), bytes / 1e6);
    for (size_t i = 0; i < list.size(); ++i) {
      printf("  %-44s %8.2f us %6.1f%%  %.3f  %s\n", list[i].name.c_str(), list[i].us,
             100 * bytes / kCopyRoof / list[i].us, list[i].us / list[0].us, checks[i].c_str());
    }
    fflush(stdout);
    for (const Expected& e : expected) cudaFree(e.want);
  }
};

const char* kLoads[] = {"plain", "once", "first", "once+first", "cs", "once+256B"};
const char* kStores[] = {"plain", "cs", "first"};

// How a variant is launched: overlapped or not, and what is fetched before the wait.
struct How {
  bool overlap = true;
  int waves = 0;  // of blocks that fetch early
  int ahead = 0;  // waves that each block fetches ahead
  std::string text() const {
    std::string s = overlap ? "" : " alone";
    if (waves > 0) s += " early" + std::to_string(waves);
    if (ahead > 0) s += " ahead" + std::to_string(ahead);
    return s;
  }
};

template <typename Args>
unsigned wave_of(void (*kernel)(Args), int threads, unsigned smem = 0) {
  int an_sm = 0;
  CK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&an_sm, kernel, threads, smem));
  return static_cast<unsigned>(an_sm * g_sms);
}

template <typename Args>
std::function<void(int)> runner(void (*kernel)(Args), std::vector<Args> sets, unsigned blocks, int threads, How how) {
  const unsigned wave = wave_of(kernel, threads);
  for (Args& a : sets) a.early = {how.waves * wave, how.ahead * wave};
  return [=](int i) { go(kernel, blocks, threads, how.overlap, sets[i % kSets]); };
}

template <int kOp, int kT, int kP, int kL, int kS, int kMin = 1>
void element(Table& table, const std::vector<ElementArgs>& sets, std::vector<How> hows) {
  const auto kernel = element_kernel<kOp, kT, kP, kL, kS, kMin>;
  const int64_t blocks = (sets[0].packs + kT * kP - 1) / (kT * kP);
  for (const How& how : hows) {
    char name[96];
    snprintf(name, sizeof name, "T%d P%d L %s S %s x%u%s", kT, kP, kLoads[kL], kStores[kS], wave_of(kernel, kT) / g_sms,
             how.text().c_str());
    table.add(name, runner(kernel, sets, static_cast<unsigned>(blocks), kT, how));
  }
}

// The same list of shapes and hints for each of the element-wise operations.
template <int kOp>
void elements(Table& table, const std::vector<ElementArgs>& sets) {
  const How on{}, off{false}, early{true, 1}, early2{true, 2}, ahead{true, 1, 1};
  element<kOp, 256, 1, kOnce, kKeep>(table, sets, {on, off, early, early2, ahead});
  element<kOp, 128, 1, kOnce, kKeep>(table, sets, {on, early});
  element<kOp, 512, 1, kOnce, kKeep>(table, sets, {on, early});
  element<kOp, 1024, 1, kOnce, kKeep>(table, sets, {on, early});
  element<kOp, 128, 2, kOnce, kKeep>(table, sets, {on, early});
  element<kOp, 256, 2, kOnce, kKeep>(table, sets, {on, off, early, ahead});
  element<kOp, 512, 2, kOnce, kKeep>(table, sets, {on, early});
  element<kOp, 128, 4, kOnce, kKeep>(table, sets, {on, early});
  element<kOp, 256, 4, kOnce, kKeep>(table, sets, {on, early, ahead});
  element<kOp, 512, 4, kOnce, kKeep>(table, sets, {on, off, early});
  element<kOp, 512, 4, kPlain, kKeep>(table, sets, {on, off, early});
  element<kOp, 256, 2, kOnce, kKeep, 4>(table, sets, {early});
  element<kOp, 256, 1, kPlain, kKeep>(table, sets, {on, early});
  element<kOp, 256, 1, kFirst, kKeep>(table, sets, {on, early});
  element<kOp, 256, 1, kOnceFirst, kKeep>(table, sets, {on, early});
  element<kOp, 256, 1, kStreamed, kKeep>(table, sets, {early});
  element<kOp, 256, 1, kFetch256, kKeep>(table, sets, {early});
  element<kOp, 256, 1, kOnce, kCs>(table, sets, {on, early});
  element<kOp, 256, 1, kOnce, kOut>(table, sets, {early});
  element<kOp, 256, 1, kOnceFirst, kOut>(table, sets, {early});
  element<kOp, 256, 2, kPlain, kKeep>(table, sets, {early});
  element<kOp, 256, 2, kOnceFirst, kKeep>(table, sets, {early});
  element<kOp, 256, 2, kOnce, kCs>(table, sets, {early});
  element<kOp, 256, 2, kStreamed, kCs>(table, sets, {early});
}

template <int kStages, int kBytes>
void bulk(Table& table, const std::vector<ElementArgs>& sets, int an_sm) {
  const auto kernel = bulk_copy_kernel<kStages, kBytes>;
  char name[96];
  snprintf(name, sizeof name, "bulk copies, %d stages of %d, x%d", kStages, kBytes, an_sm);
  table.add(name, [=](int i) {
    go(kernel, static_cast<unsigned>(an_sm * g_sms), 32, true, sets[i % kSets], kStages * kBytes);
  });
}

void copy() {
  const int64_t packs = 8192 * 4096 / kN;
  Table table{"copy 8192 x 4096", 32.0 * packs, {}, {}, {}};
  std::vector<ElementArgs> sets;
  for (int s = 0; s < kSets; ++s) {
    sets.push_back({{normal(packs * kN, s), nullptr, nullptr}, {allocate<T16>(packs * kN), nullptr}, packs, {}});
  }
  CK(cudaMemcpy(sets[0].out[0], sets[0].in[0], packs * 16, cudaMemcpyDeviceToDevice));
  table.expect(sets[0].out[0], packs * kN);
  table.add("cudaMemcpyAsync", [=](int i) {
    CK(cudaMemcpyAsync(sets[i % kSets].out[0], sets[i % kSets].in[0], packs * 16, cudaMemcpyDeviceToDevice, g_stream));
  });
  elements<kCopy>(table, sets);
  bulk<4, 16384>(table, sets, 1);
  bulk<8, 16384>(table, sets, 1);
  bulk<4, 8192>(table, sets, 2);
  bulk<8, 8192>(table, sets, 2);
  bulk<8, 4096>(table, sets, 4);
  table.print();
  for (auto& s : sets) cudaFree(const_cast<T16*>(s.in[0])), cudaFree(s.out[0]);
}

void swiglu(bool backward) {
  const int64_t rows = 8192, width = 14336, count = rows * width, packs = count / kN;
  Table table{
      backward ? "SwiGLU backward 8192 x 14336" : "SwiGLU 8192 x 14336", (backward ? 10.0 : 6.0) * count, {}, {}, {}};
  std::vector<ElementArgs> sets;
  for (int s = 0; s < kSets; ++s) {
    ElementArgs a{};
    a.packs = packs;
    for (int i = 0; i < (backward ? 3 : 2); ++i) a.in[i] = normal(count, 5 * s + i);
    for (int i = 0; i < (backward ? 2 : 1); ++i) a.out[i] = allocate<T16>(count);
    sets.push_back(a);
  }
  const ElementArgs& a = sets[0];
  plain_glu<<<4096, 256>>>(a.in[0], a.in[1], a.in[2], a.out[0], a.out[0], a.out[1], count);
  for (int i = 0; i < (backward ? 2 : 1); ++i) table.expect(a.out[i], count);
  const GluShape shape{rows, width, DType::kBFloat16, GluKind::kSilu};
  table.add("now", [=](int i) {
    const ElementArgs& b = sets[i % kSets];
    if (backward) {
      cuda::glu_backward({shape, b.in[2], b.in[0], b.in[1], b.out[0], b.out[1], width, width, width, width, width},
                         context());
    } else {
      cuda::glu({shape, b.in[0], b.in[1], b.out[0], width, width, width}, context());
    }
  });
  backward ? elements<kGluBackward>(table, sets) : elements<kGlu>(table, sets);
  table.print();
  for (auto& s : sets) {
    for (const T16* p : s.in) cudaFree(const_cast<T16*>(p));
    for (T16* p : s.out) cudaFree(p);
  }
}

std::vector<variants::NormArgs> norm_sets(int rows, int width, bool residual, Table& table) {
  const size_t count = size_t(rows) * width;
  std::vector<variants::NormArgs> sets;
  const T16* w = normal(width, 99);
  for (int s = 0; s < kSets; ++s) {
    variants::NormArgs a{};
    a.x = normal(count, 3 * s), a.weight = w, a.y = allocate<T16>(count), a.rstd = allocate<float>(rows);
    if (residual) a.residual = normal(count, 3 * s + 1), a.h = allocate<T16>(count);
    a.rows = rows, a.packs = width / kN, a.inverse_width = 1.0f / width, a.eps = 1e-5f;
    sets.push_back(a);
  }
  const auto& a = sets[0];
  plain_norm<<<rows, 256>>>(a.x, a.residual, a.weight, a.y, a.h, a.rstd, width, a.eps);
  table.expect(a.y, count);
  if (residual) table.expect(a.h, count);
  return sets;
}
void release(const std::vector<variants::NormArgs>& sets) {
  for (const auto& s : sets) {
    cudaFree(const_cast<T16*>(s.x)), cudaFree(const_cast<T16*>(s.residual)), cudaFree(s.y), cudaFree(s.h);
    cudaFree(s.rstd);
  }
  cudaFree(const_cast<T16*>(sets[0].weight));
}
void add_norm_now(Table& table, const std::vector<variants::NormArgs>& sets) {
  table.add("now", [=](int i) {
    const auto& a = sets[i % kSets];
    const int64_t width = a.packs * kN;
    cuda::rms_norm({{a.rows, width, DType::kBFloat16, DType::kBFloat16, 0.0, true},
                    a.x,
                    width,
                    a.residual,
                    a.residual != nullptr ? width : 0,
                    a.weight,
                    1e-5,
                    a.y,
                    a.h,
                    a.rstd},
                   context());
  });
}

template <int kT, int kP, int kL, int kS, bool kResidual, bool kEarlyWeight = false, int kMin = 1>
void norm_row(Table& table, const std::vector<variants::NormArgs>& sets, std::vector<How> hows) {
  const auto kernel = norm_kernel<kT, kP, kL, kS, kResidual, kEarlyWeight, kMin>;
  for (const How& how : hows) {
    char name[96];
    snprintf(name, sizeof name, "T%d P%d L %s S %s x%u%s%s", kT, kP, kLoads[kL], kStores[kS],
             wave_of(kernel, kT) / g_sms, kEarlyWeight ? " w" : "", how.text().c_str());
    table.add(name, runner(kernel, sets, sets[0].rows, kT, how));
  }
}
template <int kT, int kP, int kD>
void norm_ring_row(Table& table, const std::vector<variants::NormArgs>& sets, std::vector<How> hows) {
  const auto kernel = norm_ring_kernel<kT, kP, kD, kOnce, kKeep>;
  for (const How& how : hows) {
    char name[96];
    snprintf(name, sizeof name, "ring T%d P%d D%d x%u%s", kT, kP, kD, wave_of(kernel, kT) / g_sms, how.text().c_str());
    table.add(name, runner(kernel, sets, wave_of(kernel, kT), kT, how));
  }
}

template <bool kResidual>
void norm() {
  Table table{
      kResidual ? "add + norm 8192 x 4096" : "norm 8192 x 4096", (kResidual ? 8.0 : 4.0) * 8192 * 4096, {}, {}, {}};
  const auto sets = norm_sets(8192, 4096, kResidual, table);
  const How on{}, off{false}, early{true, 1}, early2{true, 2}, ahead{true, 1, 1};
  add_norm_now(table, sets);
  norm_row<128, 4, kOnce, kKeep, kResidual>(table, sets, {on, off, early, early2, ahead});
  norm_row<128, 4, kOnce, kKeep, kResidual, true>(table, sets, {on, early});
  norm_row<256, 2, kOnce, kKeep, kResidual>(table, sets, {on, off, early, early2, ahead});
  norm_row<256, 2, kOnce, kKeep, kResidual, true>(table, sets, {on, early});
  norm_row<256, 2, kOnce, kKeep, kResidual, false, 6>(table, sets, {on, early});
  norm_row<256, 2, kOnce, kKeep, kResidual, false, 8>(table, sets, {on, early});
  norm_row<256, 2, kPlain, kKeep, kResidual>(table, sets, {on, off, early});
  norm_row<256, 2, kFirst, kKeep, kResidual>(table, sets, {on, early});
  norm_row<256, 2, kOnceFirst, kKeep, kResidual>(table, sets, {early});
  norm_row<256, 2, kStreamed, kKeep, kResidual>(table, sets, {early});
  norm_row<256, 2, kFetch256, kKeep, kResidual>(table, sets, {early});
  norm_row<256, 2, kOnce, kCs, kResidual>(table, sets, {on, early});
  norm_row<256, 2, kOnce, kOut, kResidual>(table, sets, {early});
  norm_row<512, 1, kOnce, kKeep, kResidual>(table, sets, {on, early, ahead});
  norm_row<512, 1, kOnce, kKeep, kResidual, true>(table, sets, {early});
  norm_row<512, 1, kOnce, kKeep, kResidual, false, 4>(table, sets, {on, early});
  if constexpr (!kResidual) {
    norm_ring_row<512, 1, 2>(table, sets, {early});
    norm_ring_row<512, 1, 3>(table, sets, {on, early});
    norm_ring_row<256, 2, 2>(table, sets, {on, early});
  }
  table.print();
  release(sets);
}

template <int kT, int kLanes, int kP, int kR, int kL, int kS, bool kEarlyWeight = false, int kMin = 1>
void heads_row(Table& table, const std::vector<variants::NormArgs>& sets, std::vector<How> hows) {
  const auto kernel = heads_kernel<kT, kLanes, kP, kR, kL, kS, kEarlyWeight, kMin>;
  constexpr int kRows = kT / kLanes * kR;
  for (const How& how : hows) {
    char name[96];
    snprintf(name, sizeof name, "T%d lanes%d P%d R%d L %s S %s x%u%s%s", kT, kLanes, kP, kR, kLoads[kL], kStores[kS],
             wave_of(kernel, kT) / g_sms, kEarlyWeight ? " w" : "", how.text().c_str());
    table.add(name, runner(kernel, sets, (sets[0].rows + kRows - 1) / kRows, kT, how));
  }
}

void heads() {
  const int rows = 8192 * 40;
  Table table{"norm 8192 x 40 x 128", 4.0 * rows * 128, {}, {}, {}};
  const auto sets = norm_sets(rows, 128, false, table);
  const How on{}, off{false}, early{true, 1}, early2{true, 2}, ahead{true, 1, 1};
  add_norm_now(table, sets);
  heads_row<128, 8, 2, 1, kOnce, kKeep>(table, sets, {on, off, early, early2, ahead});
  heads_row<128, 8, 2, 1, kOnce, kKeep, true>(table, sets, {on, early});
  heads_row<128, 16, 1, 1, kOnce, kKeep>(table, sets, {on, early});
  heads_row<128, 16, 1, 2, kOnce, kKeep>(table, sets, {on, off, early, ahead});
  heads_row<128, 16, 1, 2, kOnce, kKeep, true>(table, sets, {on, early});
  heads_row<128, 16, 1, 2, kPlain, kKeep>(table, sets, {on, off, early});
  heads_row<128, 16, 1, 4, kOnce, kKeep>(table, sets, {on, early});
  heads_row<128, 16, 1, 4, kOnce, kKeep, true>(table, sets, {early});
  heads_row<256, 16, 1, 1, kOnce, kKeep>(table, sets, {on, early});
  heads_row<256, 16, 1, 2, kOnce, kKeep>(table, sets, {on, off, early, ahead});
  heads_row<256, 16, 1, 2, kOnce, kKeep, true>(table, sets, {on, early});
  heads_row<256, 16, 1, 2, kPlain, kKeep>(table, sets, {on, early});
  heads_row<256, 16, 1, 2, kOnceFirst, kKeep>(table, sets, {on, early});
  heads_row<256, 16, 1, 2, kOnce, kCs>(table, sets, {early});
  heads_row<256, 16, 1, 2, kFetch256, kKeep>(table, sets, {early});
  heads_row<256, 16, 1, 4, kOnce, kKeep>(table, sets, {on, early});
  heads_row<256, 8, 2, 1, kOnce, kKeep>(table, sets, {on, early});
  heads_row<256, 8, 2, 2, kOnce, kKeep>(table, sets, {on, early});
  heads_row<512, 16, 1, 1, kOnce, kKeep>(table, sets, {on, early});
  heads_row<512, 16, 1, 2, kOnce, kKeep>(table, sets, {on, early});
  table.print();
  release(sets);
}

// --- norm backward
// ----------------------------------------------------------------------------------------------------

std::vector<variants::BackwardArgs> backward_sets(int rows, int width, bool with_dh, bool dweight, Table& table) {
  const size_t count = size_t(rows) * width;
  std::vector<variants::BackwardArgs> sets;
  const T16* w = normal(width, 99);
  float* partials = allocate<float>(size_t{1056} * width);
  unsigned* arrived = allocate<unsigned>(1);
  for (int s = 0; s < kSets; ++s) {
    variants::BackwardArgs a{};
    a.dy = normal(count, 3 * s), a.h = normal(count, 3 * s + 1), a.weight = w, a.dx = allocate<T16>(count);
    if (with_dh) a.dh = normal(count, 3 * s + 2);
    float* rstd = allocate<float>(rows);
    fill_normal<<<64, 256>>>(rstd, rows, 7 * s, 1.0f);
    a.rstd = rstd, a.dweight = allocate<T16>(width), a.partials = partials, a.arrived = arrived;
    a.rows = rows, a.packs = width / kN, a.inverse_width = 1.0f / width;
    sets.push_back(a);
  }
  const auto& a = sets[0];
  plain_backward<<<rows, 256>>>(a.dy, a.h, a.dh, a.weight, a.rstd, a.dx, width);
  plain_dweight<<<width, 256>>>(a.dy, a.h, a.rstd, a.dweight, rows, width);
  table.expect(a.dx, count);
  if (dweight) table.expect(a.dweight, width);
  const int64_t partial_rows = cuda::rms_norm_partial_rows(rows, width, 2, g_sms);
  table.add("now", [=](int i) {
    const auto& b = sets[i % kSets];
    const int64_t n = b.packs * kN;
    cuda::rms_norm_backward({{b.rows, n, DType::kBFloat16, DType::kBFloat16, 0.0, true},
                             b.dy,
                             n,
                             b.dh,
                             b.dh != nullptr ? n : 0,
                             b.h,
                             n,
                             b.rstd,
                             b.weight,
                             b.dx,
                             dweight ? b.dweight : nullptr,
                             b.partials,
                             partial_rows},
                            context());
  });
  return sets;
}
void release(const std::vector<variants::BackwardArgs>& sets) {
  for (const auto& s : sets) {
    for (const T16* p : {s.dy, s.h, s.dh}) cudaFree(const_cast<T16*>(p));
    cudaFree(const_cast<float*>(s.rstd)), cudaFree(s.dx), cudaFree(s.dweight);
  }
  cudaFree(const_cast<T16*>(sets[0].weight)), cudaFree(sets[0].partials), cudaFree(sets[0].arrived);
}

template <int kT, int kP, int kL, int kS, bool kDh, int kMin = 1>
void backward_row(Table& table, const std::vector<variants::BackwardArgs>& sets, std::vector<How> hows) {
  const auto kernel = variants::backward_kernel<kT, kP, kL, kS, kDh, kMin>;
  for (const How& how : hows) {
    char name[96];
    snprintf(name, sizeof name, "T%d P%d L %s S %s x%u%s", kT, kP, kLoads[kL], kStores[kS], wave_of(kernel, kT) / g_sms,
             how.text().c_str());
    table.add(name, runner(kernel, sets, sets[0].rows, kT, how));
  }
}

template <bool kDh>
void norm_backward() {
  Table table{kDh ? "add + norm backward, frozen, 8192 x 4096" : "norm backward, frozen, 8192 x 4096",
              (kDh ? 8.0 : 6.0) * 8192 * 4096,
              {},
              {},
              {}};
  const auto sets = backward_sets(8192, 4096, kDh, false, table);
  const How on{}, off{false}, early{true, 1}, ahead{true, 1, 1};
  backward_row<128, 4, kOnce, kKeep, kDh>(table, sets, {on, off, early, ahead});
  backward_row<256, 2, kOnce, kKeep, kDh>(table, sets, {on, early, ahead});
  backward_row<256, 2, kOnce, kKeep, kDh, 4>(table, sets, {early});
  backward_row<256, 2, kPlain, kKeep, kDh>(table, sets, {early});
  backward_row<256, 2, kOnceFirst, kKeep, kDh>(table, sets, {early});
  backward_row<512, 1, kOnce, kKeep, kDh>(table, sets, {on, early, ahead});
  backward_row<512, 1, kOnce, kKeep, kDh, 3>(table, sets, {early});
  table.print();
  release(sets);
}

enum Sum { kNone, kSecondKernel, kInside };

template <int kT, int kP, int kD, bool kDh, int kSum, int kL = kOnce, int kS = kKeep, int kAnSm = 512 / kT>
void dweight_row(Table& table, const std::vector<variants::BackwardArgs>& sets, std::vector<How> hows) {
  const auto kernel = dweight_kernel < kT, kP, kD, kL, kS, kDh, kSum == kInside, kAnSm > ;
  const unsigned blocks = std::min<unsigned>(wave_of(kernel, kT), kAnSm * g_sms);
  for (const How& how : hows) {
    char name[96];
    snprintf(name, sizeof name, "T%d P%d D%d L %s S %s x%u%s%s", kT, kP, kD, kLoads[kL], kStores[kS], blocks / g_sms,
             how.text().c_str(),
             kSum == kNone     ? " NO SUM"
             : kSum == kInside ? " grid barrier"
                               : "");
    auto run = runner(kernel, sets, blocks, kT, how);
    table.add(
        name,
        [=](int i) {
          if (kSum == kInside && i == 0) CK(cudaMemsetAsync(sets[0].arrived, 0, 4, g_stream));
          run(i);
          if (kSum != kSecondKernel) return;
          const auto& a = sets[i % kSets];
          launch(
              what, sum_kernel,
              Grid{.blocks = static_cast<unsigned>(a.packs * kN / 32), .threads = 512, .overlap_launch = how.overlap},
              context(), static_cast<const float*>(a.partials), static_cast<int>(blocks), a.packs * kN, a.dweight);
        },
        kSum != kNone);
  }
}

template <bool kDh>
void dweight() {
  Table table{kDh ? "add + norm backward, trained, 8192 x 4096" : "norm backward, trained, 8192 x 4096",
              (kDh ? 8.0 : 6.0) * 8192 * 4096,
              {},
              {},
              {}};
  const auto sets = backward_sets(8192, 4096, kDh, true, table);
  const How on{}, off{false}, early{true, 1};
  dweight_row<512, 1, 1, kDh, kSecondKernel>(table, sets, {on});
  dweight_row<512, 1, 2, kDh, kSecondKernel>(table, sets, {on, early});
  dweight_row<512, 1, 3, kDh, kSecondKernel>(table, sets, {on, off, early});
  dweight_row<512, 1, 3, kDh, kNone>(table, sets, {on, early});
  dweight_row<512, 1, 3, kDh, kInside>(table, sets, {on, early});
  dweight_row<512, 1, 4, kDh, kSecondKernel>(table, sets, {on, early});
  dweight_row<512, 1, 4, kDh, kSecondKernel, kPlain>(table, sets, {early});
  dweight_row<512, 1, 4, kDh, kSecondKernel, kOnceFirst>(table, sets, {early});
  dweight_row<512, 1, 4, kDh, kSecondKernel, kOnce, kCs>(table, sets, {early});
  if constexpr (!kDh) dweight_row<512, 1, 6, kDh, kSecondKernel>(table, sets, {on, early});
  dweight_row<256, 2, 1, kDh, kSecondKernel>(table, sets, {on, early});
  if constexpr (!kDh) dweight_row<256, 2, 2, kDh, kSecondKernel>(table, sets, {on, early});
  if constexpr (!kDh) dweight_row<256, 2, 3, kDh, kSecondKernel>(table, sets, {early});
  if constexpr (!kDh) dweight_row<256, 2, 2, kDh, kInside>(table, sets, {early});
  dweight_row<512, 1, 1, kDh, kSecondKernel, kOnce, kKeep, 2>(table, sets, {on, early});
  dweight_row<256, 2, 1, kDh, kSecondKernel, kOnce, kKeep, 3>(table, sets, {early});
  table.print();
  release(sets);
}

}  // namespace

int main(int argc, char** argv) {
  CK(cudaStreamCreateWithFlags(&g_stream, cudaStreamNonBlocking));
  g_sms = device_limits().sms;
  const std::vector<std::pair<std::string, std::function<void()>>> tables = {
      {"copy", copy},
      {"norm", norm<false>},
      {"add_norm", norm<true>},
      {"heads", heads},
      {"swiglu", [] { swiglu(false); }},
      {"swiglu_bwd", [] { swiglu(true); }},
      {"norm_bwd", norm_backward<false>},
      {"add_norm_bwd", norm_backward<true>},
      {"dweight", dweight<false>},
      {"add_dweight", dweight<true>},
  };
  for (const auto& [name, run] : tables) {
    bool wanted = argc == 1;
    for (int i = 1; i < argc; ++i) wanted = wanted || name == argv[i];
    if (wanted) run();
  }
}
