// The torch ops, over torch's stable ABI: one build loads in torch 2.10 and every later one, with
// CUDA or without. Fake kernels, CPU kernels and the slow path are registered from Python (ops.py):
// they need torch.distributed or symbolic sizes, which the stable ABI does not have.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cfloat>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "binding/slow_path.h"
#include "host/workspace.h"

// In libtorch_cuda alone. Weak, so that a CPU-only torch loads this library too.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace gan {

namespace {
thread_local std::string slow_path_error;
}  // namespace
void set_slow_path_error(const std::string& text) { slow_path_error = text; }
std::string take_slow_path_error() { return std::exchange(slow_path_error, {}); }

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Not STD_TORCH_CHECK: users read this text, and where in this file it was written does not help
// them.
void require(bool condition, const char* text) {
  if (!condition) throw std::runtime_error(text);
}

std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(t.size(i));
  return text + "]";
}

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Float:
      return DType::kFloat32;
    default:
      throw std::runtime_error(
          "x: bfloat16, float16 or float32 is required; got another dtype; convert it");
  }
}

bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) != b.size(i)) return false;
  }
  return true;
}

// What the tensor reaches must be there: a storage can be resized, to nothing too, under a tensor
// that keeps its shape. A kernel that read it would take the CUDA context with it.
void check_memory(const Tensor& t, const char* name) {
  if (t.numel() == 0) return;
  int64_t reached = t.numel();
  if (!t.is_contiguous()) {
    reached = 1;
    for (int64_t i = 0; i < t.dim(); ++i) reached += (t.size(i) - 1) * t.stride(i);
  }
  const int64_t needed = (t.storage_offset() + reached) * static_cast<int64_t>(t.element_size());
  int64_t bytes = 0;
  require(aoti_torch_get_storage_size(t.get(), &bytes) == AOTI_TORCH_SUCCESS,
          "torch: a tensor with a storage is required; got one without; pass a plain tensor");
  if (needed <= bytes) return;
  throw std::runtime_error(std::string(name) + ": a storage of at least " + std::to_string(needed) +
                           " bytes is required; got one of " + std::to_string(bytes) +
                           ", which was resized; pass a tensor whose memory is there");
}

bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % kPackBytes == 0; }

// The tensor itself, or a copy that kernels can read in 16-byte packs.
Tensor packed(const Tensor& t) {
  if (!t.is_contiguous()) return torch::stable::contiguous(t);
  return is_aligned(t.data_ptr()) ? t : torch::stable::clone(t);
}

struct Span {
  const char *begin, *end;
};
Span span_of(const Tensor& t) {
  const char* begin = static_cast<const char*>(t.data_ptr());
  return {begin, begin + t.numel() * t.element_size()};
}
bool overlap(const Tensor& a, const Tensor& b) {
  const Span s = span_of(a), t = span_of(b);
  return s.begin < t.end && t.begin < s.end;
}
bool disjoint_or_same(const Tensor& out, const Tensor& in) {
  return out.data_ptr() == in.data_ptr() || !overlap(out, in);
}

void check_like_x(const Tensor& t, const Tensor& x, const char* name) {
  const bool alike = t.scalar_type() == x.scalar_type() && same_shape(t, x) &&
                     t.is_cuda() == x.is_cuda() && t.get_device_index() == x.get_device_index();
  if (alike) return check_memory(t, name);
  throw std::runtime_error(std::string(name) + ": the shape, dtype and device of x, " +
                           shape_text(x) + ", are required; got " + shape_text(t) +
                           " or another dtype or device; convert or move it");
}

void check_weight(const Tensor& w, const Tensor& x, int64_t hidden, const char* name) {
  const bool fits = w.dim() == 1 && w.size(0) == hidden &&
                    (w.scalar_type() == x.scalar_type() || w.scalar_type() == ScalarType::Float) &&
                    w.is_cuda() == x.is_cuda() && w.get_device_index() == x.get_device_index();
  if (fits) return check_memory(w, name);
  throw std::runtime_error(std::string(name) + ": the shape [" + std::to_string(hidden) +
                           "], x's dtype or float32, and x's device are required; got " +
                           shape_text(w) + " or another dtype or device; convert or move it");
}

void check_out(const Tensor& out, const Tensor& x, const char* name) {
  check_like_x(out, x, name);
  // An output without elements may lie anywhere.
  if (!out.is_contiguous() || (out.numel() > 0 && !is_aligned(out.data_ptr()))) {
    throw std::runtime_error(std::string(name) +
                             ": a contiguous tensor, aligned to 16 bytes, is required; got "
                             "another; pass a tensor of torch.empty");
  }
}

// The op comes here when any of its tensors is on a GPU.
int32_t cuda_device_of(const Tensor& x) {
  require(x.is_cuda(),
          "x: a CUDA tensor is required where another argument is one; got one elsewhere; move it");
  return x.get_device_index();
}

// The arguments of a call, checked; kernels get what is in `arguments`. The tensors keep it alive
// until it is queued.
struct Call {
  Tensor x, weight;
  OptionalTensor residual, post_weight;
  CallArguments arguments;
};

Call make_call(const Tensor& x, const Tensor& weight, const OptionalTensor& residual,
               const OptionalTensor& post_weight, double eps, double weight_bias) {
  const DType dtype = dtype_of(x);
  const int64_t dim = x.dim();
  require(dim >= 1, "x: a shape [..., hidden] is required; got no dimension; pass x.unsqueeze(0)");
  const int64_t hidden = x.size(dim - 1);
  const int64_t pack = static_cast<int64_t>(kPackBytes / x.element_size());
  if (hidden < 1 || hidden % pack != 0 || hidden > static_cast<int64_t>(kMaxHidden)) {
    throw std::runtime_error("x: a last dimension that is a multiple of " + std::to_string(pack) +
                             " up to " + std::to_string(kMaxHidden) + " is required; got " +
                             std::to_string(hidden) + "; pad the rows");
  }
  check_memory(x, "x");
  check_weight(weight, x, hidden, "weight");
  if (post_weight) {
    check_weight(*post_weight, x, hidden, "post_weight");
    require(post_weight->scalar_type() == weight.scalar_type(),
            "post_weight: the dtype of weight is required; got another; convert it");
    require(residual.has_value(),
            "post_weight: a residual beside it is required; got None; pass the residual");
  }
  if (residual) check_like_x(*residual, x, "residual");
  // NaN is in no range. What lies beyond float32's has no conversion to it.
  require(eps >= 0 && eps <= FLT_MAX,
          "eps: a finite number, 0 or more, in the range of float32 is required; got another; see "
          "the model's configuration");
  require(weight_bias >= -FLT_MAX && weight_bias <= FLT_MAX,
          "weight_bias: a finite number in the range of float32 is required; got another; see the "
          "model's configuration");

  Call call{packed(x), packed(weight), residual, post_weight, {}};
  if (residual) call.residual = packed(*residual);
  if (post_weight) call.post_weight = packed(*post_weight);
  RowParams& row = call.arguments.row;
  row.x = call.x.data_ptr();
  row.weight = call.weight.data_ptr();
  row.residual = residual ? call.residual->data_ptr() : nullptr;
  row.post_weight = post_weight ? call.post_weight->data_ptr() : nullptr;
  row.row_packs = static_cast<uint32_t>(hidden / pack);
  row.hidden = static_cast<float>(hidden);
  row.hidden_reciprocal = 1.0f / row.hidden;
  row.eps = static_cast<float>(eps);
  row.weight_bias = static_cast<float>(weight_bias);
  row.weights_fp32 = dtype != DType::kFloat32 && weight.scalar_type() == ScalarType::Float;
  call.arguments.dtype = dtype;
  call.arguments.rows = static_cast<uint64_t>(x.numel() / hidden);
  return call;
}

void set_outputs(Call& call, const Tensor& norm_out, const Tensor& residual_out) {
  call.arguments.row.norm_out = norm_out.data_ptr();
  call.arguments.row.residual_out = residual_out.data_ptr();
}

// Those that the caller gave: our own need no checks.
void check_outputs(const Call& call, const Tensor& x, const Tensor& norm_out,
                   const Tensor& residual_out) {
  check_out(norm_out, x, "norm_out");
  check_out(residual_out, x, "residual_out");
  require(!overlap(norm_out, residual_out),
          "out: norm_out and residual_out in memory of their own are required; got two that "
          "overlap; pass two tensors");
  for (const auto& [out, name] :
       {std::pair{&norm_out, "norm_out"}, std::pair{&residual_out, "residual_out"}}) {
    // call.x and call.residual are copies where the originals could not be read in packs: those may
    // overlap as they like.
    const bool apart = disjoint_or_same(*out, call.x) &&
                       (!call.residual || disjoint_or_same(*out, *call.residual)) &&
                       !overlap(*out, call.weight) &&
                       (!call.post_weight || !overlap(*out, *call.post_weight));
    if (apart) continue;
    throw std::runtime_error(std::string(name) +
                             ": memory apart from all inputs', or exactly x or residual, is "
                             "required; got memory that overlaps a part of one; pass another "
                             "tensor");
  }
}

cudaStream_t current_stream(int32_t device) {
  require(aoti_torch_get_current_cuda_stream != nullptr,
          "torch: a build with CUDA is required; got one without; install it");
  void* stream = nullptr;
  require(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS,
          "torch: a current CUDA stream is required; got none; see torch.cuda.current_stream()");
  return static_cast<cudaStream_t>(stream);
}

void throw_if_failed(const Workspace& workspace) {
  if (workspace.has_overlapped()) {
    throw std::runtime_error(
        "WorkspaceError: calls one after the other are required; got two that ran at the same "
        "time; "
        "order the replays of graphs that were captured with it");
  }
  if (workspace.disagreement()) {
    throw std::runtime_error(
        "WorkspaceError: the same call on all ranks is required; got calls that differ; "
        "gemma_ar_norm.check() says in what; close() the workspace and init() a new one");
  }
  const auto record = workspace.failure();
  if (!record) return;
  throw std::runtime_error(
      "PeerTimeoutError: rank " + std::to_string(record->peer) + " did not come to call " +
      std::to_string(record->call) + " (row " + std::to_string(record->row) +
      ") in time; close() the workspace and init() a new one over the ranks that are left");
}

// What needs Python: groups without a fused workspace. See ops.py.
void call_slow_path(const Tensor& x, const Tensor& weight, const OptionalTensor& residual,
                    const OptionalTensor& post_weight, double eps, double weight_bias,
                    const std::string& group_name, const std::string& algorithm,
                    const Tensor& norm_out, const Tensor& residual_out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 10> stack{
      from(x),           from(weight),     from(residual),  from(post_weight), from(eps),
      from(weight_bias), from(group_name), from(algorithm), from(norm_out),    from(residual_out)};
  take_slow_path_error();
  const AOTITorchError status =
      torch_call_dispatcher("gemma_ar_norm::_slow_path", "", stack.data(), TORCH_ABI_VERSION);
  const std::string error = take_slow_path_error();
  if (!error.empty()) throw std::runtime_error(error);
  require(status == AOTI_TORCH_SUCCESS,
          "gemma_ar_norm: the Python side is required; got a failure in it");
}

void run_call(Call& call, const Tensor& x, const Tensor& weight, const OptionalTensor& residual,
              const OptionalTensor& post_weight, double eps, double weight_bias,
              const std::string& group_name, const std::string& algorithm, const Tensor& norm_out,
              const Tensor& residual_out) {
  set_outputs(call, norm_out, residual_out);
  const bool unfused = algorithm == "unfused";
  call.arguments.algorithm = algorithm_named(algorithm);
  require(call.arguments.algorithm || unfused || algorithm == "auto",
          "algorithm: 'auto', 'one_shot', 'two_shot' or 'unfused' is required; got another; pass "
          "'auto'");
  const bool has_rows = call.arguments.rows != 0;
  const int32_t device = x.get_device_index();
  if (group_name.empty() && !call.arguments.algorithm) {  // one rank
    if (has_rows) run_local(device, call.arguments, current_stream(device));
    return;
  }
  const auto slow_path = [&] {
    call_slow_path(x, weight, residual, post_weight, eps, weight_bias, group_name, algorithm,
                   norm_out, residual_out);
  };
  const std::shared_ptr<Workspace> workspace = find_workspace(group_name);
  // It refuses unfused calls of a local group.
  if (workspace == nullptr || (unfused && workspace->is_local())) return slow_path();
  throw_if_failed(*workspace);
  if (workspace->device() != device) {
    throw std::runtime_error(
        "x: a tensor on cuda:" + std::to_string(workspace->device()) +
        ", where this group's workspace is, is required; got cuda:" + std::to_string(device) +
        "; move it, or call init() with that device current");
  }
  if (has_rows && !unfused) return workspace->run(call.arguments, current_stream(device));
  // Without rows there is nothing to do, on any rank: the protocol counts no such call.
  if (workspace->is_debug_mode())
    workspace->announce(call.arguments, unfused, current_stream(device));
  if (!has_rows) return;
  throw_if_failed(*workspace);  // what has been announced
  slow_path();
}

// ---- the ops ----

std::tuple<Tensor, Tensor> fused_allreduce_rmsnorm(const Tensor& x, const Tensor& weight,
                                                   const OptionalTensor& residual,
                                                   const OptionalTensor& post_weight, double eps,
                                                   double weight_bias,
                                                   const std::string& group_name,
                                                   const std::string& algorithm) {
  const torch::stable::accelerator::DeviceGuard guard(cuda_device_of(x));
  Call call = make_call(x, weight, residual, post_weight, eps, weight_bias);
  // Of the contiguous call.x: empty_like keeps strides.
  Tensor norm_out = torch::stable::empty_like(call.x),
         residual_out = torch::stable::empty_like(call.x);
  run_call(call, x, weight, residual, post_weight, eps, weight_bias, group_name, algorithm,
           norm_out, residual_out);
  return {norm_out, residual_out};
}

void fused_allreduce_rmsnorm_out(const Tensor& x, const Tensor& weight,
                                 const OptionalTensor& residual, const OptionalTensor& post_weight,
                                 double eps, double weight_bias, const std::string& group_name,
                                 const std::string& algorithm, const Tensor& norm_out,
                                 const Tensor& residual_out) {
  const torch::stable::accelerator::DeviceGuard guard(cuda_device_of(x));
  Call call = make_call(x, weight, residual, post_weight, eps, weight_bias);
  check_outputs(call, x, norm_out, residual_out);
  run_call(call, x, weight, residual, post_weight, eps, weight_bias, group_name, algorithm,
           norm_out, residual_out);
}

void add_rmsnorm_out(const Tensor& x, const Tensor& weight, const OptionalTensor& residual,
                     const OptionalTensor& post_weight, double eps, double weight_bias,
                     const Tensor& norm_out, const Tensor& residual_out) {
  const torch::stable::accelerator::DeviceGuard guard(cuda_device_of(x));
  Call call = make_call(x, weight, residual, post_weight, eps, weight_bias);
  check_outputs(call, x, norm_out, residual_out);
  set_outputs(call, norm_out, residual_out);
  if (call.arguments.rows == 0) return;
  run_local(x.get_device_index(), call.arguments, current_stream(x.get_device_index()));
}

}  // namespace
}  // namespace gan

STABLE_TORCH_LIBRARY(gemma_ar_norm, m) {
  m.def(
      "fused_allreduce_rmsnorm(Tensor x, Tensor weight, Tensor? residual, Tensor? post_weight, "
      "float eps, "
      "float weight_bias, str group_name, str algorithm) -> (Tensor norm_out, Tensor "
      "residual_out)");
  m.def(
      "fused_allreduce_rmsnorm.out(Tensor x, Tensor weight, Tensor? residual, Tensor? post_weight, "
      "float eps, "
      "float weight_bias, str group_name, str algorithm, *, Tensor(a!) norm_out, Tensor(b!) "
      "residual_out) -> ()");
  m.def(
      "add_rmsnorm.out(Tensor x, Tensor weight, Tensor? residual, Tensor? post_weight, float eps, "
      "float weight_bias, *, "
      "Tensor(a!) norm_out, Tensor(b!) residual_out) -> ()");
  m.def(
      "_slow_path(Tensor x, Tensor weight, Tensor? residual, Tensor? post_weight, float eps, float "
      "weight_bias, "
      "str group_name, str algorithm, Tensor(a!) norm_out, Tensor(b!) residual_out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gemma_ar_norm, CUDA, m) {
  m.impl("fused_allreduce_rmsnorm", TORCH_BOX(&gan::fused_allreduce_rmsnorm));
  m.impl("fused_allreduce_rmsnorm.out", TORCH_BOX(&gan::fused_allreduce_rmsnorm_out));
  m.impl("add_rmsnorm.out", TORCH_BOX(&gan::add_rmsnorm_out));
}
