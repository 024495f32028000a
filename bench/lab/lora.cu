// LoRA linears without torch: every kernel against a plain one, then times next to cuBLAS's frozen product.
//
// Checked one by one, each from what the kernels before it gave, so that an error is of one rounding: xa from x, y from
// x and xa, dxa and dB from dy and xa, dx from dy and dxa, dA from dxa and x. Masks come from the dropout kernel.
#include "cuda/lora_plan.h"
#include "cuda/nf4_linear_tiles.h"
#include "fastpeft/dropout.h"
#include "fastpeft/lora.h"
#include "lab.cuh"

namespace {

namespace tiles = fastpeft::cuda::nf4_tiles;

constexpr double kScale = 2.0;
constexpr int64_t kWorkspace = int64_t{128} << 20;

template <typename T>
struct Layer {
  int m, n, k, r, rp;
  double p;
  uint64_t seed = 12345;
  Weight* w;
  T *x, *dy, *y, *dx, *a16, *xa, *dxa, *bias;
  float *a, *b, *da, *db;
  uint8_t* workspace;
  unsigned* counters;
  DType dtype;

  bool early = false;   // the product starts before the down-projection has ended
  bool beside = false;  // what can be is made beside the products
  int blocks = -1;      // that many thread blocks for it; -1: as planned
  float* db_sums;
  cudaStream_t stream = nullptr;

  Context context() const { return {reinterpret_cast<uintptr_t>(stream)}; }
  LoraAdapter adapter() const { return {a, b, n, r, kScale}; }
  NF4LinearArgs product(bool transposed) const {
    NF4LinearArgs args{w->view,
                       transposed,
                       transposed ? dy : x,
                       transposed ? nullptr : bias,
                       transposed ? dx : y,
                       dtype,
                       m,
                       n,
                       k,
                       g_workspace,
                       34 << 20,
                       g_counters,
                       true};
    NF4LinearAdapter& a = args.adapter;
    a.r = rp, a.xa = transposed ? dxa : xa, a.xa_pitch = rp;
    a.factor = transposed ? this->a : b, a.factor_rank = r, a.scale = transposed ? 1.0 : kScale;
    a.p = transposed ? p : 0.0, a.seed = seed;
    if (!besides(transposed)) return args;
    NF4LinearBeside& side = a.beside;
    side.ranks = r, side.adapters[0] = adapter(), side.rounded = workspace;
    if (!transposed) return args;
    side.xa = xa, side.xa_pitch = rp, side.db = db, side.db_sums = db_sums;
    if (p > 0) return args;
    side.gradient_ranks = r, side.x = x, side.dxa = dxa, side.da[0] = da, side.da_r[0] = r;
    return args;
  }
  bool besides(bool) const { return beside && r % 8 == 0 && r <= tiles::kMostBesideRanks && p == 0; }
  tiles::Plan plan(bool transposed, bool adapter = true) const {
    const int out = transposed ? k : n, depth = transposed ? n : k, sms = device_limits().sms;
    if (!adapter) return tiles::make_plan(m, out, depth, sms, !transposed);
    if (!besides(transposed)) return tiles::make_plan(m, out, depth, sms, !transposed, tiles::kAdapterTokens);
    const tiles::Beside work{r, transposed && p == 0 ? r : 0};
    return tiles::choose_beside(m, out, depth, sms, !transposed, work, blocks);
  }
  void project() const {
    LoraProjectArgs args{x, dtype, m, k, {adapter()}, 1, a16, xa, p, seed};
    lora_project(args, context());
  }
  void forward_product() const {
    NF4LinearArgs args = product(false);
    args.adapter.early = early;
    nf4_linear_tiles(args, plan(false), context());
  }
  void plain_product(bool transposed) const {
    NF4LinearArgs args = product(transposed);
    args.adapter = {};
    nf4_linear_tiles(args, plan(transposed, false), context());
  }
  void dy_pass() const {
    lora_backward({dy, dtype, m, adapter(), xa, rp, dxa, rp, db, workspace, kWorkspace}, context());
  }
  void backward_product(bool add = false) const {
    NF4LinearArgs args = product(true);
    args.adapter.add_to_y = add;
    nf4_linear_tiles(args, plan(true), context());
  }
  void gradient() const {
    LoraGradientArgs args{x, dtype, m, k, dxa, 1, {da}, {r}, p, seed, workspace, kWorkspace, counters};
    lora_gradient(args, context());
  }
  void forward() const {
    if (!besides(false) || !plan(false).makes) project();
    forward_product();
  }
  void backward() const {
    if (!besides(true) || !plan(true).makes) dy_pass();
    if (!besides(true) || !plan(true).makes_gradient) gradient();
    backward_product();
  }
};

template <typename T>
Layer<T> make_layer(int m, int n, int k, int r, double p, Weight* w, DType dtype) {
  Layer<T> l{m, n, k, r, (r + 7) / 8 * 8, p};
  l.w = w, l.dtype = dtype;
  l.x = allocate<T>(size_t(m) * k), l.dx = allocate<T>(size_t(m) * k);
  l.dy = allocate<T>(size_t(m) * n), l.y = allocate<T>(size_t(m) * n);
  l.a16 = allocate<T>(size_t(l.rp) * k), l.db_sums = allocate<float>(size_t(n) * r * tiles::kMostBesideBlocks);
  l.xa = allocate<T>(size_t(m) * l.rp), l.dxa = allocate<T>(size_t(m) * l.rp), l.bias = allocate<T>(n);
  l.a = allocate<float>(size_t(r) * k), l.da = allocate<float>(size_t(r) * k);
  l.b = allocate<float>(size_t(n) * r), l.db = allocate<float>(size_t(n) * r);
  l.workspace = allocate<uint8_t>(kWorkspace);
  l.counters = allocate<unsigned>(1024);
  CK(cudaMemset(l.counters, 0, 4096));
  fill_normal<<<1024, 256>>>(l.x, size_t(m) * k, 3, 1.0f / std::sqrt(float(k)));
  fill_normal<<<1024, 256>>>(l.dy, size_t(m) * n, 4, 1.0f / std::sqrt(float(n)));
  fill_normal<<<1024, 256>>>(l.a, size_t(r) * k, 5, 1.0f);
  fill_normal<<<1024, 256>>>(l.b, size_t(n) * r, 6, 1.0f / std::sqrt(float(r)));
  fill_normal<<<1024, 256>>>(l.bias, n, 7, 1.0f);
  CK(cudaDeviceSynchronize());
  return l;
}
template <typename T>
void release(Layer<T>& l) {
  for (void* p :
       {(void*)l.x, (void*)l.dx, (void*)l.dy, (void*)l.y, (void*)l.a16, (void*)l.db_sums, (void*)l.xa, (void*)l.dxa,
        (void*)l.bias, (void*)l.a, (void*)l.da, (void*)l.b, (void*)l.db, (void*)l.workspace, (void*)l.counters}) {
    CK(cudaFree(p));
  }
}

// --- check -----------------------------------------------------------------------------------------------------------
// An operand of a plain product: element (i, j) at i * row + j * column; rounded to T first, and times keep.
template <typename From, typename T>
struct Operand {
  const From* at;
  int64_t row, column;
  const float* keep;  // of the same places, or null
  float scale = 1.0f;
  __device__ double operator()(int64_t i, int64_t j) const {
    const double v = to_float(from_float<T>(to_float(at[i * row + j * column]) * scale));
    return keep == nullptr ? v : v * keep[i * row + j * column];
  }
};
template <typename A, typename B>
__global__ void plain(A a, B b, int rows, int columns, int depth, double scale, const float* keep, bool add,
                      double* out) {
  const int j = blockIdx.x * 32 + threadIdx.x % 32, i = blockIdx.y * 8 + threadIdx.x / 32;
  if (i >= rows || j >= columns) return;
  double sum = 0;
  for (int l = 0; l < depth; ++l) sum += a(i, l) * b(l, j);
  const size_t at = size_t(i) * columns + j;
  sum *= scale * (keep == nullptr ? 1.0 : keep[at]);
  out[at] = add ? out[at] + sum : sum;
}
template <typename T>
__global__ void add_bias(double* y, const T* bias, int m, int n) {
  const size_t at = blockIdx.x * size_t{256} + threadIdx.x;
  if (at < size_t(m) * n) y[at] += to_float(bias[at % n]);
}

struct Verdict {
  bool ok;
  double worst;
};
template <typename T>
Verdict compare(const T* got, const double* want, int rows, int columns, int pitch, double allowed,
                std::vector<T>* keep) {
  std::vector<T> mine(size_t(rows) * pitch);
  std::vector<double> expected(size_t(rows) * columns);
  CK(cudaMemcpy(mine.data(), got, mine.size() * sizeof(T), cudaMemcpyDeviceToHost));
  CK(cudaMemcpy(expected.data(), want, expected.size() * 8, cudaMemcpyDeviceToHost));
  double square = 0, worst = 0;
  for (const double e : expected) square += e * e;
  const double rms = std::sqrt(square / expected.size());
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < columns; ++j) {
      const double v = static_cast<double>(static_cast<float>(mine[size_t(i) * pitch + j])),
                   e = expected[size_t(i) * columns + j];
      const double error = std::abs(v - e) / (rms + std::abs(e));
      worst = std::max(worst, std::isnan(v) ? 1e9 : error);
    }
    for (int j = columns; j < pitch; ++j) {
      if (static_cast<float>(mine[size_t(i) * pitch + j]) != 0.0f) worst = 1e8;
    }
  }
  const bool same = keep->empty() || std::memcmp(keep->data(), mine.data(), mine.size() * sizeof(T)) == 0;
  *keep = mine;
  return {worst < allowed && same, same ? worst : 1e7};
}

template <typename T>
int check_layer(int m, int n, int k, int r, double p, DType dtype, bool overlapped, bool beside) {
  Weight w = make_weight(n, k, 64, true, 17 * n + k);
  Layer<T> l = make_layer<T>(m, n, k, r, p, &w, dtype);
  l.early = overlapped, l.beside = beside;
  if (beside && overlapped) l.blocks = 4;  // whatever is planned
  float* keep = allocate<float>(size_t(m) * k);
  {
    std::vector<float> ones(size_t(m) * k, 1.0f);
    CK(cudaMemcpy(keep, ones.data(), ones.size() * 4, cudaMemcpyHostToDevice));
    cuda::dropout({keep, keep, DType::kFloat32, int64_t{m}, int64_t{k}, p, l.seed}, {});
  }
  const size_t most = std::max({size_t(m) * std::max(n, k), size_t(n) * r, size_t(r) * k});
  double* want = allocate<double>(most);
  const T* dense = static_cast<const T*>(decoded(w, dtype));
  const double tight = dtype == DType::kBFloat16 ? 4.1e-3 : 6e-4;
  const auto grid = [](int rows, int columns) { return dim3((columns + 31) / 32, (rows + 7) / 8); };
  std::vector<T> keep_xa, keep_y, keep_dxa, keep_dx;
  std::vector<float> keep_db, keep_da;
  int bad = 0;
  const auto report = [&](const char* what, Verdict v) {
    if (v.ok) return;
    printf("FAIL %s m %d n %d k %d r %d p %.2f %s overlapped %d beside %d: worst %.2e\n", what, m, n, k, r, p,
           dtype == DType::kBFloat16 ? "bf16" : "fp16", overlapped, beside, v.worst);
    ++bad;
  };
  using Sixteen = Operand<T, T>;
  using Master = Operand<float, T>;
  using ScaledMaster = Operand<float, T>;
  for (int run = 0; run < 2; ++run) {
    const std::vector<std::pair<void*, size_t>> outputs = {
        {l.xa, size_t(m) * l.rp * 2},   {l.y, size_t(m) * n * 2},        {l.dxa, size_t(m) * l.rp * 2},
        {l.dx, size_t(m) * k * 2},      {l.da, size_t(r) * k * 4},       {l.db, size_t(n) * r * 4},
        {l.a16, size_t(l.rp) * k * 2},  {l.db_sums, size_t(n) * r * 16}, {l.workspace, size_t(kWorkspace)},
        {g_workspace, size_t(34) << 20}};
    for (const auto& output : outputs) CK(cudaMemset(output.first, 0xff, output.second));
    l.forward();
    CK(cudaDeviceSynchronize());
    l.backward();
    CK(cudaDeviceSynchronize());
    const float* mask = p > 0 ? keep : nullptr;
    // The float32 factors are rounded to T; the mask carries 1 / (1 - p).
    plain<<<grid(m, r), 256>>>(Sixteen{l.x, k, 1, mask}, Master{l.a, 1, k, nullptr}, m, r, k, 1.0, nullptr, false,
                               want);
    report("xa", compare(l.xa, want, m, r, l.rp, tight, &keep_xa));
    plain<<<grid(m, n), 256>>>(Sixteen{l.x, k, 1, nullptr}, Sixteen{dense, 1, k, nullptr}, m, n, k, 1.0, nullptr, false,
                               want);
    plain<<<grid(m, n), 256>>>(Sixteen{l.xa, l.rp, 1, nullptr}, ScaledMaster{l.b, 1, r, nullptr, kScale}, m, n, r, 1.0,
                               nullptr, true, want);
    add_bias<<<unsigned((size_t(m) * n + 255) / 256), 256>>>(want, l.bias, m, n);
    report("y", compare(l.y, want, m, n, n, tight, &keep_y));
    plain<<<grid(m, r), 256>>>(Sixteen{l.dy, n, 1, nullptr}, Master{l.b, r, 1, nullptr}, m, r, n, kScale, nullptr,
                               false, want);
    report("dxa", compare(l.dxa, want, m, r, l.rp, tight, &keep_dxa));
    plain<<<grid(n, r), 256>>>(Sixteen{l.dy, 1, n, nullptr}, Sixteen{l.xa, l.rp, 1, nullptr}, n, r, m, kScale, nullptr,
                               false, want);
    report("dB", compare(l.db, want, n, r, r, 1e-4, &keep_db));
    plain<<<grid(m, k), 256>>>(Sixteen{l.dxa, l.rp, 1, nullptr}, Master{l.a, k, 1, nullptr}, m, k, r, 1.0, mask, false,
                               want);
    plain<<<grid(m, k), 256>>>(Sixteen{l.dy, n, 1, nullptr}, Sixteen{dense, k, 1, nullptr}, m, k, n, 1.0, nullptr, true,
                               want);
    report("dx", compare(l.dx, want, m, k, k, tight, &keep_dx));
    plain<<<grid(r, k), 256>>>(Sixteen{l.dxa, 1, l.rp, nullptr}, Sixteen{l.x, k, 1, mask}, r, k, m, 1.0, nullptr, false,
                               want);
    report("dA", compare(l.da, want, r, k, k, 1e-4, &keep_da));
  }
  // Added to what is there: both are rounded.
  CK(cudaMemset(l.db, 0xff, size_t(n) * r * 4));
  l.backward_product(true);
  CK(cudaDeviceSynchronize());
  plain<<<grid(m, k), 256>>>(Sixteen{l.dxa, l.rp, 1, nullptr}, Master{l.a, k, 1, nullptr}, m, k, r, 2.0,
                             p > 0 ? keep : nullptr, false, want);
  plain<<<grid(m, k), 256>>>(Sixteen{l.dy, n, 1, nullptr}, Sixteen{dense, k, 1, nullptr}, m, k, n, 2.0, nullptr, true,
                             want);
  std::vector<T> none;
  report("dx added", compare(l.dx, want, m, k, k, 2 * tight, &none));
  std::vector<unsigned> counters(4096);
  CK(cudaMemcpy(counters.data(), g_counters, 16384, cudaMemcpyDeviceToHost));
  if (std::any_of(counters.begin(), counters.end(), [](unsigned v) { return v != 0; }))
    printf("FAIL counters\n"), ++bad;
  CK(cudaMemcpy(counters.data(), l.counters, 4096, cudaMemcpyDeviceToHost));
  if (std::any_of(counters.begin(), counters.begin() + 1024, [](unsigned v) { return v != 0; }))
    printf("FAIL counters of the gradient\n"), ++bad;
  release(l);
  ::release(w);
  CK(cudaFree(keep));
  CK(cudaFree(want));
  return bad;
}

int check() {
  int bad = 0, cases = 0;
  const int shapes[][3] = {{128, 128, 64},    {100, 136, 192},   {257, 1112, 832},   {700, 200, 2048},
                           {1000, 1024, 640}, {2304, 2176, 320}, {1024, 4096, 4096}, {333, 512, 4160}};
  for (const auto& s : shapes) {
    for (const int r : {16, 1, 64, 8, 24, 40, 100, 200, 256}) {
      if (r > 64 && s[0] > 700) continue;
      for (const double p : {0.0, 0.3}) {
        for (const bool beside : {false, true}) {
          const bool overlapped = cases % 2 == 1;
          const int failed = cases % 4 == 3
                                 ? check_layer<Float16>(s[0], s[1], s[2], r, p, DType::kFloat16, overlapped, beside)
                                 : check_layer<BFloat16>(s[0], s[1], s[2], r, p, DType::kBFloat16, overlapped, beside);
          bad += failed != 0, ++cases;
        }
      }
    }
  }
  printf("lora check: %d of %d cases failed\n", bad, cases);
  return bad != 0;
}

// --- time ------------------------------------------------------------------------------------------------------------
void time_shape(const Cublas& cublas, int m, int n, int k, cudaStream_t stream, bool variants) {
  constexpr int kSets = 3;
  std::vector<Weight> ws;
  for (int i = 0; i < kSets; ++i) ws.push_back(make_weight(n, k, 64, true, 100 + i));
  for (Weight& w : ws) decoded(w, DType::kBFloat16);
  for (const int r : {16, 64}) {
    for (const double p : {0.0, 0.05}) {
      std::vector<Layer<BFloat16>> sets;
      for (int i = 0; i < kSets; ++i) {
        sets.push_back(make_layer<BFloat16>(m, n, k, r, p, &ws[i], DType::kBFloat16));
        sets[i].stream = stream;
      }
      std::vector<Contender> list;
      const auto add = [&](const char* name, auto body) {
        list.push_back({name, [&sets, body](int i) { body(sets[i % kSets]); }});
      };
      const auto with = [](const Layer<BFloat16>& l, bool beside, int blocks = -1) {
        Layer<BFloat16> copy = l;
        copy.early = true, copy.beside = beside, copy.blocks = blocks;
        return copy;
      };
      add("cublas y", [&](auto& l) { cublas({m, n, k, false}, l.x, l.w->decoded[1], l.y); });
      add("cublas dx", [&](auto& l) { cublas({m, n, k, true}, l.dy, l.w->decoded[1], l.dx); });
      add("nf4 y", [](auto& l) { l.plain_product(false); });
      add("nf4 dx", [](auto& l) { l.plain_product(true); });
      add("xa", [](auto& l) { l.project(); });
      add("y+", [](auto& l) { l.forward_product(); });
      add("dxa,dB", [](auto& l) { l.dy_pass(); });
      add("dx+", [](auto& l) { l.backward_product(); });
      add("dA", [](auto& l) { l.gradient(); });
      const int forward_from = static_cast<int>(list.size());
      add("fwd", [=](auto& l) { with(l, false).forward(); });
      add("fwd beside", [=](auto& l) { with(l, true).forward(); });
      const int backward_from = static_cast<int>(list.size());
      add("bwd", [=](auto& l) { with(l, false).backward(); });
      add("bwd beside", [=](auto& l) { with(l, true).backward(); });
      const int variants_from = static_cast<int>(list.size());
      if (variants && p == 0) {
        for (const int blocks : {2, 4, 6}) {
          add("F", [=](auto& l) { with(l, true, blocks).forward(); });
          add("B", [=](auto& l) { with(l, true, blocks).backward(); });
        }
      }
      measure(list, 12, stream);
      printf("m %d n %d k %d r %d p %.2f |", m, n, k, r, p);
      for (const Contender& c : list) printf(" %s %.1f", c.name.c_str(), c.us);
      const tiles::Plan fp = with(sets[0], true).plan(false), bp = with(sets[0], true).plan(true);
      printf(" | planned: forward %d blocks, backward %d blocks for %s%s", fp.beside_blocks, bp.beside_blocks,
             bp.makes ? "dxa and dB " : "", bp.makes_gradient ? "dA" : "");
      const auto best = [&](int from, int to) {
        return std::min_element(list.begin() + from, list.begin() + to,
                                [](const Contender& a, const Contender& b) { return a.us < b.us; });
      };
      const float dense = list[0].us + list[1].us;
      const auto fwd = best(forward_from, backward_from), bwd = best(backward_from, variants_from);
      printf(" | of dense: nf4 %.3f, plain order %.3f, best (%s, %s) %.3f\n", (list[2].us + list[3].us) / dense,
             (list[forward_from].us + list[backward_from].us) / dense, fwd->name.c_str(), bwd->name.c_str(),
             (fwd->us + bwd->us) / dense);
      printf("    read of x %.2f TB/s, of dy %.2f, of x again %.2f\n", 2e-6 * m * k / list[4].us,
             2e-6 * m * n / list[6].us, 2e-6 * m * k / list[8].us);
      fflush(stdout);
      for (auto& l : sets) release(l);
    }
  }
  for (Weight& w : ws) ::release(w);
}

}  // namespace

int lora(const char* cublas_path, std::vector<int> ms) {
  const int failed = check();
  if (cublas_path == nullptr) return failed;
  cudaStream_t stream;
  CK(cudaStreamCreate(&stream));
  const Cublas cublas(cublas_path, stream);
  if (ms.empty()) ms = {8192};
  for (const int m : ms) {
    for (const auto& [n, k] : {std::pair{4096, 4096}, {14336, 4096}, {4096, 14336}})
      time_shape(cublas, m, n, k, stream, std::getenv("VARIANTS") != nullptr);
  }
  return failed;
}
