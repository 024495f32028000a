// Checks and times the tile kernel of NF4 products without torch: seconds to build, seconds to run.
//
//   nf4_linear check                         every tile against a plain kernel, awkward sizes, twice for equal bits
//   nf4_linear quick                         the small ones of them, for compute-sanitizer
//   nf4_linear time CUBLAS [m ...]           microseconds of graph replays over rotated weights, next to cuBLAS's bf16
//   nf4_linear sweep CUBLAS [m ...]          the same, for each width of tile and with and without shared units
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "cuda/device/launch.cuh"
#include "cuda/device/numbers.cuh"
#include "cuda/nf4_linear_tiles.h"
#include "fastpeft/nf4.h"
#include "fastpeft/nf4_linear.h"

using namespace fastpeft;
using namespace fastpeft::cuda;
namespace tiles = fastpeft::cuda::nf4_tiles;

#define CK FASTPEFT_CUDA_CHECK

// --- data ------------------------------------------------------------------------------------------------------------
__host__ __device__ inline uint32_t hash(uint32_t x) {
  x ^= x >> 16, x *= 0x7feb352du, x ^= x >> 15, x *= 0x846ca68bu, x ^= x >> 16;
  return x;
}
template <typename T>
__global__ void fill_normal(T* p, size_t count, uint32_t seed, float scale) {  // sum of four uniforms
  for (size_t i = blockIdx.x * size_t{256} + threadIdx.x; i < count; i += size_t{256} * gridDim.x) {
    const uint32_t a = hash(static_cast<uint32_t>(i) * 2 + seed), b = hash(a ^ 0x9e3779b9u);
    const float v = ((a & 0xffff) + (a >> 16) + (b & 0xffff) + (b >> 16)) * (1.0f / 65536.0f) - 2.0f;
    p[i] = from_float<T>(v * 1.7320508f * scale);
  }
}
__global__ void fill_bytes(uint8_t* p, size_t count, uint32_t seed) {
  for (size_t i = blockIdx.x * size_t{256} + threadIdx.x; i < count; i += size_t{256} * gridDim.x) {
    p[i] = static_cast<uint8_t>(hash(static_cast<uint32_t>(i) + seed));
  }
}
template <typename T>
T* allocate(size_t count) {
  void* p;
  CK(cudaMalloc(&p, count * sizeof(T)));
  return static_cast<T*>(p);
}

struct Weight {
  NF4View view;
  void* decoded[2];  // by dtype: fp16, bf16; null until asked for
  int n, k;
};

Weight make_weight(int n, int k, int block_size, bool nested, uint32_t seed) {
  const int64_t numel = int64_t{n} * k, blocks = (numel + block_size - 1) / block_size, outer = (blocks + 255) / 256;
  uint8_t* codes = allocate<uint8_t>((numel + 1) / 2);
  fill_bytes<<<1024, 256>>>(codes, (numel + 1) / 2, seed);
  Weight w{{codes, nullptr, nullptr, nullptr, nullptr, numel, block_size}, {}, n, k};
  if (nested) {
    uint8_t* absmax = allocate<uint8_t>(blocks);
    fill_bytes<<<1024, 256>>>(absmax, blocks, seed + 1);
    std::vector<float> map(256), scales(outer);
    for (int i = 0; i < 256; ++i) map[i] = (i - 128) / 128.0f;
    for (int64_t i = 0; i < outer; ++i) scales[i] = 0.2f + 0.3f * (hash(seed + 7 * i) & 0xffff) / 65536.0f;
    const float offset = 0.9f;
    float *dmap = allocate<float>(256), *dscales = allocate<float>(outer), *doffset = allocate<float>(1);
    CK(cudaMemcpy(dmap, map.data(), 1024, cudaMemcpyHostToDevice));
    CK(cudaMemcpy(dscales, scales.data(), 4 * outer, cudaMemcpyHostToDevice));
    CK(cudaMemcpy(doffset, &offset, 4, cudaMemcpyHostToDevice));
    w.view.absmax = absmax, w.view.nested_absmax = dscales, w.view.nested_map = dmap, w.view.offset = doffset;
  } else {
    float* absmax = allocate<float>(blocks);
    fill_normal<<<1024, 256>>>(absmax, blocks, seed + 1, 1.0f);
    w.view.absmax = absmax;
  }
  return w;
}
void* decoded(Weight& w, DType dtype) {
  void*& to = w.decoded[dtype == DType::kBFloat16];
  if (to == nullptr) {
    to = allocate<uint16_t>(w.view.numel);
    cuda::nf4_dequantize({w.view, 0, w.view.numel, to, dtype}, {});
  }
  return to;
}
void release(Weight& w) {
  for (const void* p :
       {static_cast<const void*>(w.view.codes), w.view.absmax, static_cast<const void*>(w.view.nested_absmax),
        static_cast<const void*>(w.view.nested_map), static_cast<const void*>(w.view.offset),
        static_cast<const void*>(w.decoded[0]), static_cast<const void*>(w.decoded[1])}) {
    cudaFree(const_cast<void*>(p));
  }
}

void* g_workspace;
unsigned* g_counters;

struct Case {
  int m, n, k;
  bool transposed;
};
// tokens 0: the plan's own choice; whole: nothing shared.
tiles::Plan plan_of(const Case& c, int tokens = 0, int cluster = 1, bool whole = false, bool fragments = false) {
  const int out = c.transposed ? c.k : c.n, depth = c.transposed ? c.n : c.k, sms = device_limits().sms;
  if (tokens == 0) return tiles::make_plan(c.m, out, depth, sms, !c.transposed);
  tiles::Plan plan = tiles::plan_for(c.m, out, depth, sms, tokens, cluster, fragments);
  if (!whole) return tiles::choose_sharing(plan, 1000).plan;
  tiles::set_sharing(plan, tiles::ceil_divide(plan.strips * plan.columns, plan.seats), 0);
  return plan;
}
NF4LinearArgs args_of(const Case& c, const Weight& w, const void* x, const void* bias, void* y, DType dtype) {
  return {w.view, c.transposed, x, bias, y, dtype, c.m, c.n, c.k, g_workspace, 34 << 20, g_counters, true};
}

void product(const NF4LinearArgs& args, const tiles::Plan& plan, const Context& context) {
  plan.fragments ? nf4_linear_fragments(args, plan, context) : nf4_linear_tiles(args, plan, context);
}

// --- check -----------------------------------------------------------------------------------------------------------
template <typename T>
__global__ void plain_product(const T* x, const T* w, const T* bias, int m, int n, int k, bool transposed, double* y) {
  const int out = transposed ? k : n, depth = transposed ? n : k, o = blockIdx.x * 64 + threadIdx.x;
  if (o >= out) return;
  double sum = bias != nullptr ? static_cast<double>(to_float(bias[o])) : 0.0;
  for (int c = 0; c < depth; ++c) {
    sum += static_cast<double>(to_float(x[size_t{blockIdx.y} * depth + c])) *
           static_cast<double>(to_float(transposed ? w[size_t{static_cast<unsigned>(c)} * k + o]
                                                   : w[size_t{static_cast<unsigned>(o)} * k + c]));
  }
  y[size_t{blockIdx.y} * out + o] = sum;
}

template <typename T>
bool check_case(const Case& c, int tokens, int cluster, bool whole, bool fragments, int block_size, bool nested,
                bool with_bias, DType dtype) {
  if (getenv("VERBOSE") != nullptr) {
    const tiles::Plan p = plan_of(c, tokens, cluster, whole, fragments);
    printf("m %d n %d k %d %s block %d nested %d bias %d dtype %d tokens %d x %d shared %d\n", c.m, c.n, c.k,
           c.transposed ? "dx" : "fwd", block_size, nested, with_bias, static_cast<int>(dtype),
           p.fragments ? -p.tokens : p.tokens, p.cluster, p.shared);
    fflush(stdout);
  }
  Weight w = make_weight(c.n, c.k, block_size, nested, 17 * c.n + c.k);
  const int out = c.transposed ? c.k : c.n, depth = c.transposed ? c.n : c.k;
  const size_t count = size_t(c.m) * out, guard = 4096;
  T *x = allocate<T>(size_t(c.m) * depth), *y = allocate<T>(count + guard), *bias = allocate<T>(out);
  fill_normal<<<1024, 256>>>(x, size_t(c.m) * depth, 3, 1.0f / std::sqrt(float(depth)));
  fill_normal<<<1024, 256>>>(bias, out, 5, 1.0f);
  double* want = allocate<double>(count);
  plain_product<<<dim3((out + 63) / 64, c.m), 64>>>(x, static_cast<const T*>(decoded(w, dtype)),
                                                    with_bias ? bias : nullptr, c.m, c.n, c.k, c.transposed, want);
  const auto run = [&] {
    std::vector<uint16_t> got(count + guard);
    CK(cudaMemset(y, 0xff, (count + guard) * 2));
    CK(cudaMemset(g_workspace, 0xff, 34 << 20));
    product(args_of(c, w, x, with_bias ? bias : nullptr, y, dtype), plan_of(c, tokens, cluster, whole, fragments), {});
    CK(cudaDeviceSynchronize());
    CK(cudaMemcpy(got.data(), y, got.size() * 2, cudaMemcpyDeviceToHost));
    return got;
  };
  const auto first = run(), second = run();
  std::vector<double> expected(count);
  CK(cudaMemcpy(expected.data(), want, count * 8, cudaMemcpyDeviceToHost));
  double square = 0, worst = 0;
  long spilt = 0;
  for (const double e : expected) square += e * e;
  const double rms = std::sqrt(square / count);
  for (size_t i = 0; i < count; ++i) {
    T value;
    memcpy(&value, &first[i], 2);
    const double e = std::abs(double(static_cast<float>(value)) - expected[i]);
    worst = std::max(worst, std::isnan(e) ? 1e9 : e / (rms + std::abs(expected[i])));
  }
  for (size_t i = count; i < count + guard; ++i) spilt += first[i] != 0xffff;
  std::vector<unsigned> counters(4096);
  CK(cudaMemcpy(counters.data(), g_counters, 16384, cudaMemcpyDeviceToHost));
  const bool clean = std::all_of(counters.begin(), counters.end(), [](unsigned v) { return v == 0; });
  const double rounded_levels = fragments && tokens <= 64 ? 4.0 : 1.0;  // not the decoded weight: levels are rounded
  const bool ok =
      worst < rounded_levels * (dtype == DType::kBFloat16 ? 4.1e-3 : 6e-4) && first == second && spilt == 0 && clean;
  if (!ok) {
    const tiles::Plan p = plan_of(c, tokens, cluster, whole, fragments);
    printf(
        "FAIL m %d n %d k %d %s block %d %s %s tokens %d x %d shared %d: worst %.2e, moved %d, spilt %ld, counters "
        "%d\n",
        c.m, c.n, c.k, c.transposed ? "dx" : "fwd", block_size, nested ? "nested" : "plain",
        dtype == DType::kBFloat16 ? "bf16" : "fp16", p.fragments ? -p.tokens : p.tokens, p.cluster, p.shared, worst,
        first != second, spilt, !clean);
  }
  release(w);
  for (void* p : {static_cast<void*>(x), static_cast<void*>(y), static_cast<void*>(bias), static_cast<void*>(want)}) {
    CK(cudaFree(p));
  }
  return ok;
}

int check(bool quick) {
  const int shapes[][3] = {{1, 128, 64},     {17, 128, 64},    {64, 8, 256},      {100, 100, 192},   {65, 4104, 4160},
                           {257, 1112, 832}, {700, 200, 2048}, {1000, 1024, 640}, {128, 4096, 4096}, {2304, 2176, 320}};
  long cases = 0, bad = 0;
  for (const auto& s : shapes) {
    if (quick && int64_t{s[0]} * s[1] * s[2] > 1 << 23) continue;
    for (const bool transposed : {false, true}) {
      if (transposed && s[1] % 8 != 0) continue;
      for (const auto [tokens, cluster, fragments, cycles] : tiles::kTiles) {
        if (fragments && transposed) continue;
        for (const bool whole : {false, true}) {
          const Case c{s[0], s[1], s[2], transposed};
          const int block = cases % 5 == 1 ? 256 : 64;
          const bool nested = cases % 3 != 2, bias = !transposed && cases % 2 == 1;
          bad +=
              cases % 4 == 3
                  ? !check_case<Float16>(c, tokens, cluster, whole, fragments, block, nested, bias, DType::kFloat16)
                  : !check_case<BFloat16>(c, tokens, cluster, whole, fragments, block, nested, bias, DType::kBFloat16);
          ++cases;
        }
      }
    }
  }
  printf("check: %ld of %ld cases failed\n", bad, cases);
  return bad != 0;
}

// --- time ------------------------------------------------------------------------------------------------------------
struct Cublas {
  void* handle = nullptr;
  int (*gemm_ex)(void*, int, int, int, int, int, const void*, const void*, int, int, const void*, int, int, const void*,
                 void*, int, int, int, int) = nullptr;
  Cublas(const char* path, cudaStream_t stream) {
    std::string dir(path);
    dir = dir.substr(0, dir.rfind('/'));
    for (const char* lt : {"/libcublasLt.so.13", "/libcublasLt.so.12"}) {
      if (dlopen((dir + lt).c_str(), RTLD_NOW | RTLD_GLOBAL)) break;
    }
    void* lib = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
    if (lib == nullptr) {
      printf("no cuBLAS: %s\n", dlerror());
      exit(1);
    }
    reinterpret_cast<int (*)(void**)>(dlsym(lib, "cublasCreate_v2"))(&handle);
    reinterpret_cast<int (*)(void*, cudaStream_t)>(dlsym(lib, "cublasSetStream_v2"))(handle, stream);
    reinterpret_cast<int (*)(void*, void*, size_t)>(dlsym(lib, "cublasSetWorkspace_v2"))(
        handle, allocate<uint8_t>(64 << 20), 64 << 20);
    gemm_ex = reinterpret_cast<decltype(gemm_ex)>(dlsym(lib, "cublasGemmEx"));
  }
  void operator()(const Case& c, const void* x, const void* w, void* y) const {
    const float one = 1.0f, zero = 0.0f;
    const int out = c.transposed ? c.k : c.n, depth = c.transposed ? c.n : c.k;
    gemm_ex(handle, c.transposed ? 0 : 1, 0, out, c.m, depth, &one, w, CUDA_R_16BF, c.k, x, CUDA_R_16BF, depth, &zero,
            y, CUDA_R_16BF, out, 68, -1);
  }
};

int time_all(const char* cublas_path, std::vector<int> ms, bool sweep) {
  cudaStream_t stream;
  CK(cudaStreamCreate(&stream));
  const Cublas cublas(cublas_path, stream);
  const Context context{reinterpret_cast<uintptr_t>(stream)};
  cudaEvent_t start, stop;
  CK(cudaEventCreate(&start));
  CK(cudaEventCreate(&stop));
  if (ms.empty()) ms = {32, 64, 128, 256, 512, 1024, 2048, 4096, 8192};
  struct Row {
    Case c;
    double ours, dense;
  };
  std::vector<Row> rows;
  for (const auto& [n, k] : {std::pair{4096, 4096}, {14336, 4096}, {4096, 14336}, {28672, 8192}}) {
    if (getenv("N") != nullptr && (atoi(getenv("N")) != n || atoi(getenv("K")) != k)) continue;  // one shape only
    const int copies = std::max(3, static_cast<int>(300e6 / (0.52 * n * k))), dense_copies = std::min(copies, 6);
    std::vector<Weight> ws;
    for (int i = 0; i < copies; ++i) ws.push_back(make_weight(n, k, 64, true, 100 + i));
    for (int i = 0; i < dense_copies; ++i) decoded(ws[i], DType::kBFloat16);
    const int most = *std::max_element(ms.begin(), ms.end());
    BFloat16 *x = allocate<BFloat16>(size_t(most) * std::max(n, k)),
             *y = allocate<BFloat16>(size_t(most) * std::max(n, k));
    fill_normal<<<1024, 256>>>(x, size_t(most) * std::max(n, k), 3, 0.01f);
    CK(cudaDeviceSynchronize());
    for (const int m : ms) {
      for (const bool transposed : {false, true}) {
        const Case c{m, n, k, transposed};
        struct Contender {
          std::string name;
          std::function<void(int)> run;
          cudaGraphExec_t graph = nullptr;
          int launches = 0;
          std::vector<float> us;
        };
        std::vector<Contender> list;
        list.push_back({"cublas", [&](int i) { cublas(c, x, ws[i % dense_copies].decoded[1], y); }});
        const auto add = [&](const std::string& name, const tiles::Plan& p) {
          list.push_back(
              {name + (p.fragments ? "f" : "") + std::to_string(p.tokens) + (p.cluster > 1 ? "x2" : "") +
                   (p.shared ? "s" + std::to_string(p.shared) : ""),
               [&, p](int i) { product(args_of(c, ws[i % copies], x, nullptr, y, DType::kBFloat16), p, context); }});
        };
        add("*", plan_of(c));
        if (sweep) {
          for (const auto [tokens, cluster, fragments, cycles] : tiles::kTiles) {
            if (fragments && transposed) continue;
            if (tokens < 256 && m > 2 * tokens * cluster) continue;
            if (tokens * cluster > 32 && tokens * cluster / 2 >= m) continue;
            add("", plan_of(c, tokens, cluster, true, fragments));
            const tiles::Plan shared = plan_of(c, tokens, cluster, false, fragments);
            if (shared.shared > 0) add("", shared);
          }
        }
        for (auto& a : list) {
          a.run(0);
          CK(cudaStreamSynchronize(stream));
          CK(cudaEventRecord(start, stream));
          for (int i = 0; i < 3; ++i) a.run(i);
          CK(cudaEventRecord(stop, stream));
          CK(cudaEventSynchronize(stop));
          float ms_taken;
          CK(cudaEventElapsedTime(&ms_taken, start, stop));
          a.launches = std::clamp(static_cast<int>(1.5f / (ms_taken / 3)), 2, 4 * copies);
          cudaGraph_t graph;
          CK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
          for (int i = 0; i < a.launches; ++i) a.run(i);
          CK(cudaStreamEndCapture(stream, &graph));
          CK(cudaGraphInstantiate(&a.graph, graph, 0));
          CK(cudaGraphDestroy(graph));
        }
        for (int round = 0; round < 5; ++round) {
          for (auto& a : list) {
            CK(cudaEventRecord(start, stream));
            CK(cudaGraphLaunch(a.graph, stream));
            CK(cudaEventRecord(stop, stream));
            CK(cudaEventSynchronize(stop));
            float ms_taken;
            CK(cudaEventElapsedTime(&ms_taken, start, stop));
            a.us.push_back(1000 * ms_taken / a.launches);
          }
        }
        printf("%s %5d %5d m %4d |", transposed ? "dx " : "fwd", n, k, m);
        for (auto& a : list) {
          std::sort(a.us.begin(), a.us.end());
          CK(cudaGraphExecDestroy(a.graph));
          printf(" %s %.1f (%.3f)", a.name.c_str(), a.us[2], a.us[2] / list[0].us[2]);
        }
        printf(" | %.0f TF %.2f TB/s\n", 2e-6 * m * n * k / list[1].us[2], 0.516e-6 * n * k / list[1].us[2]);
        fflush(stdout);
        rows.push_back({c, list[1].us[2], list[0].us[2]});
      }
    }
    for (Weight& w : ws) release(w);
    CK(cudaFree(x));
    CK(cudaFree(y));
  }
  for (const int m : ms) {
    for (const bool transposed : {false, true}) {
      double log_sum = 0;
      int count = 0;
      for (const Row& r : rows) {
        if (r.c.m == m && r.c.transposed == transposed) log_sum += std::log(r.ours / r.dense), ++count;
      }
      printf("geometric mean %s m %4d: %.3f of cuBLAS's time\n", transposed ? "dx " : "fwd", m,
             std::exp(log_sum / count));
    }
  }
  return 0;
}

int main(int argc, char** argv) {
  CK(cudaMalloc(&g_workspace, 34 << 20));
  g_counters = allocate<unsigned>(4096);
  CK(cudaMemset(g_counters, 0, 16384));
  const std::string what = argc > 1 ? argv[1] : "check";
  std::vector<int> ms;
  for (int i = 3; i < argc; ++i) ms.push_back(atoi(argv[i]));
  try {
    return what == "check" || what == "quick" ? check(what == "quick") : time_all(argv[2], ms, what == "sweep");
  } catch (const std::exception& error) {
    printf("%s\n", error.what());
    return 1;
  }
}
