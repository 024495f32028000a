// Stands in for the CUDA backend in a build without nvcc: every call says so.
#include "common/error.h"
#include "fastpeft/adamw.h"
#include "fastpeft/arena.h"
#include "fastpeft/capture.h"
#include "fastpeft/cross_entropy.h"
#include "fastpeft/dropout.h"
#include "fastpeft/experts.h"
#include "fastpeft/glu.h"
#include "fastpeft/lora.h"
#include "fastpeft/lora_few.h"
#include "fastpeft/nf4.h"
#include "fastpeft/nf4_experts.h"
#include "fastpeft/nf4_linear.h"
#include "fastpeft/paged_attention.h"
#include "fastpeft/rms_norm.h"
#include "fastpeft/rope.h"
#include "fastpeft/sample.h"

namespace fastpeft::cuda {
namespace {

[[noreturn]] void refuse(const char* function) {
  throw CudaError(concat(function,
                         ": got a CUDA tensor, but this fastpeft was built for the CPU alone. Put nvcc on PATH (or set "
                         "CUDA_HOME) and install again: pip install --force-reinstall --no-deps ."));
}

}  // namespace

uint64_t capture_id(const Context&) { return 0; }
void nf4_quantize(const NF4QuantizeArgs&, const Context&) { refuse("nf4_quantize"); }
void nf4_quantize_scales(const NF4QuantizeScalesArgs&, const Context&) { refuse("nf4_quantize_scales"); }
void nf4_dequantize(const NF4DequantizeArgs&, const Context&) { refuse("nf4_dequantize"); }
void nf4_linear(const NF4LinearArgs&, const Context&) { refuse("nf4_linear"); }
void nf4_linear_experts(const NF4ExpertsArgs&, const Context&) { refuse("nf4_linear_experts"); }
void dropout(const DropoutArgs&, const Context&) { refuse("dropout"); }
void experts_route(const ExpertsRouteArgs&, const Context&) { refuse("route"); }
void experts_spread(const ExpertsSpreadArgs&, const Context&) { refuse("spread_rows"); }
void experts_collect(const ExpertsCollectArgs&, const Context&) { refuse("collect_rows"); }
void experts_dots(const ExpertsDotsArgs&, const Context&) { refuse("experts_dots"); }
void lora_project(const LoraProjectArgs&, const Context&) { refuse("lora_project"); }
void lora_backward(const LoraBackwardArgs&, const Context&) { refuse("lora_backward"); }
void lora_gradient(const LoraGradientArgs&, const Context&) { refuse("lora_gradient"); }
void lora_few_project(const LoraFewArgs&, const Context&) { refuse("lora_few_project"); }
void lora_few_add(const LoraFewArgs&, const Context&) { refuse("lora_few_add"); }
void adamw_norm(const AdamWNormArgs&, const Context&) { refuse("adamw_norm"); }
void adamw_step(const AdamWStepArgs&, const Context&) { refuse("adamw"); }
void adamw_stage(AdamWList&, Arena&) { refuse("adamw"); }
void rms_norm(const RmsNormArgs&, const Context&) { refuse("rms_norm"); }
void rms_norm_backward(const RmsNormBackwardArgs&, const Context&) { refuse("rms_norm"); }
void rope(const RopeArgs&, const Context&) { refuse("rope"); }
void glu(const GluArgs&, const Context&) { refuse("glu"); }
void glu_backward(const GluBackwardArgs&, const Context&) { refuse("glu"); }
void cross_entropy(const CrossEntropyArgs&, const Context&) { refuse("cross_entropy"); }
void cross_entropy_backward(const CrossEntropyBackwardArgs&, const Context&) { refuse("cross_entropy_backward"); }
void paged_attention(const PagedAttentionArgs&, const Context&) { refuse("paged_attention"); }
void paged_store(const PagedStoreArgs&, const Context&) { refuse("paged_store_"); }
void sample(const SampleArgs&, const Context&) { refuse("sample"); }
void scale(const ScaleArgs&, const Context&) { refuse("scale"); }

struct Arena::State {};
Arena::Arena(int64_t, ArenaMode, int64_t) { refuse("Arena"); }
Arena::~Arena() = default;
bool Arena::has_managed() { refuse("Arena"); }
int64_t Arena::bytes() const { refuse("Arena"); }
ArenaMode Arena::mode() const { refuse("Arena"); }
ArenaView Arena::view(int64_t, int64_t) const { refuse("Arena"); }
const std::vector<bool>& Arena::on_device() const { refuse("Arena"); }
void Arena::move(int64_t, int64_t, bool, const Context&) { refuse("Arena"); }

}  // namespace fastpeft::cuda
