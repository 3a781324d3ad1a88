// Multi-scale deformable attention on CUDA: the bindings. The kernels are in cuda_kernels.cu.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <tuple>

#include "ms_deform_attn/cuda_launches.h"
#include "ms_deform_attn/torch_levels.h"
#include "torch/args.h"

namespace m2f {
namespace {

using torch::stable::new_zeros;
using torch::stable::accelerator::DeviceGuard;

// A choice between a general kernel and a successor, which serves the calls that it can.
class Choice {
 public:
  // `variable`, an environment variable, chooses unless `choose` does. `preferred` serves without either.
  Choice(const char* variable, const char* preferred, const char* successor) : successor_(successor) {
    const char* wish = std::getenv(variable);
    succeeded_ = std::strcmp(wish != nullptr ? wish : preferred, successor) == 0;
  }

  bool succeeded() const { return succeeded_; }

  // Returns 0, or 1 where there is no such kernel.
  int choose(const char* name) {
    const bool succeeded = std::strcmp(name, successor_) == 0;
    if (!succeeded && std::strcmp(name, "general") != 0) return 1;
    succeeded_ = succeeded;
    return 0;
  }

 private:
  const char* successor_;
  std::atomic<bool> succeeded_{false};
};

// No GPU has run the lean forward or the gathered value gradient yet. Switching is one word each.
Choice& forward_choice() {
  static Choice choice("M2F_CUDA_FORWARD", "general", "lean");
  return choice;
}

Choice& backward_choice() {
  static Choice choice("M2F_CUDA_BACKWARD", "general", "gathered");
  return choice;
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

DeviceTraits traits_of(const Tensor& tensor) {
  const int device = tensor.get_device_index();
  DeviceTraits traits{};
  int major = 0, minor = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&traits.multiprocessors, cudaDevAttrMultiProcessorCount, device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  traits.architecture = 10 * major + minor;
  return traits;
}

void check_device(const Tensor& tensor, const Tensor& value, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == value.get_device_index(), name,
                  ": expected a tensor on value's device");
}

// The stride of an axis; 0 where there is nothing to step over, so that it cannot forbid vector accesses.
int64_t stride_of(const Tensor& tensor, int64_t axis) { return tensor.size(axis) > 1 ? tensor.stride(axis) : 0; }

Strided strided(const Tensor& tensor, const char* name) {
  return {tensor.data_ptr(),    dtype_of(tensor, name), false, stride_of(tensor, 0), stride_of(tensor, 1),
          stride_of(tensor, 2), stride_of(tensor, 3)};
}

// The arguments of all operators. `points` are sampling locations or offsets, `weights` attention weights or logits;
// holds the copies that some strides ask for while a kernel is launched.
struct Arguments {
  Tensor value, points, weights;
  std::optional<Tensor> reference, grad_output;
  DeformAttnArgs kernel{};

  Arguments(const Tensor& value_, const std::vector<int64_t>& levels, const std::optional<Tensor>& spatial_shapes,
            const std::optional<Tensor>& level_start_index, const std::optional<Tensor>& reference_points,
            const Tensor& points_, const Tensor& weights_, const std::vector<int64_t>& points_per_level,
            double offset_scale)
      : value(value_), points(points_), weights(weights_) {
    const char* points_name = reference_points.has_value() ? "sampling_offsets" : "sampling_locations";
    const char* weights_name = reference_points.has_value() ? "attention_logits" : "attention_weights";
    STD_TORCH_CHECK(value.dim() == 4, "value: expected [N, S, H, D]");
    STD_TORCH_CHECK(points.dim() == 5, points_name, ": expected [N, Q, H, K, 2]");
    constexpr int64_t limit = std::numeric_limits<int>::max();
    const int64_t queries = points.size(1);
    STD_TORCH_CHECK(value.size(1) <= limit && queries <= limit && value.size(2) >= 1 && value.size(2) <= limit &&
                        value.size(3) >= 1 && value.size(3) <= limit,
                    "value: expected at most 2^31 - 1 positions, queries, heads and channels per head");

    kernel.dtype = dtype_of(value, "value");
    kernel.batch = value.size(0);
    kernel.positions = static_cast<int>(value.size(1));
    kernel.heads = static_cast<int>(value.size(2));
    kernel.channels = static_cast<int>(value.size(3));
    kernel.queries = static_cast<int>(queries);
    kernel.levels = read_levels(levels, spatial_shapes, level_start_index, points_per_level, value.size(1), false);
    if (levels.empty()) {
      check_device(*spatial_shapes, value, "spatial_shapes");
      check_device(*level_start_index, value, "level_start_index");
      kernel.device_shapes = static_cast<const int64_t*>(spatial_shapes->data_ptr());
      kernel.device_starts = static_cast<const int64_t*>(level_start_index->data_ptr());
    }
    const int64_t samples = kernel.levels.points_total;
    check_sizes(points, points_name, {kernel.batch, queries, kernel.heads, samples, 2});
    check_sizes(weights, weights_name, {kernel.batch, queries, kernel.heads, samples});
    check_device(points, value, points_name);
    check_device(weights, value, weights_name);

    value = unit_stride_last(value);
    if (stride_of(value, 1) * element_size(kernel.dtype) > kMaxRowBytes) value = torch::stable::contiguous(value);
    const int64_t row = static_cast<int64_t>(kernel.heads) * kernel.channels;
    STD_TORCH_CHECK(stride_of(value, 1) * element_size(kernel.dtype) <= kMaxRowBytes && row <= kMaxRowBytes / 8,
                    "value: expected less than 2^29 channels over all heads");
    kernel.value = value.data_ptr();
    kernel.value_n = stride_of(value, 0);
    kernel.value_s = stride_of(value, 1);
    kernel.value_h = stride_of(value, 2);
    points = unit_stride_last(points);
    kernel.points = strided(points, points_name);
    kernel.weights = strided(weights, weights_name);  // scalars: any stride over samples
    if (reference_points.has_value()) {
      const int64_t size = reference_points->dim() == 4 ? reference_points->size(3) : 0;
      STD_TORCH_CHECK(size == 2 || size == 4, "reference_points: expected [N, Q, L, 2 or 4]");
      check_sizes(*reference_points, "reference_points", {kernel.batch, queries, kernel.levels.count, size});
      check_device(*reference_points, value, "reference_points");
      reference = unit_stride_last(*reference_points);
      kernel.reference = strided(*reference, "reference_points");
      kernel.reference.k = kernel.reference.h;  // levels
      kernel.reference.h = 0;
      kernel.reference_size = static_cast<int>(size);
      kernel.offset_scale = offset_scale;
    }
  }

  void set_grad_output(const Tensor& tensor) {
    const int64_t row = static_cast<int64_t>(kernel.heads) * kernel.channels;
    check_sizes(tensor, "grad_output", {kernel.batch, kernel.queries, row});
    check_device(tensor, value, "grad_output");
    STD_TORCH_CHECK(dtype_of(tensor, "grad_output") == kernel.dtype, "grad_output: expected value's dtype");
    grad_output = unit_stride_last(tensor);
    kernel.grad_output = grad_output->data_ptr();
    kernel.grad_output_n = stride_of(*grad_output, 0);
    kernel.grad_output_q = stride_of(*grad_output, 1);
  }

  bool empty() const { return kernel.batch == 0 || kernel.queries == 0; }

  Tensor forward() {
    const DeviceGuard guard(value.get_device_index());
    const int64_t row = static_cast<int64_t>(kernel.heads) * kernel.channels;
    Tensor output = empty_like_sizes(value, {kernel.batch, kernel.queries, row});
    if (empty()) return output;
    kernel.output = output.data_ptr();
    kernel.lean = forward_choice().succeeded();
    launch_ms_deform_attn(kernel, traits_of(value), current_stream(value));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return output;
  }

  struct Gradients {
    Tensor value, reference, points, weights;
  };

  Gradients backward(bool needs_value, bool needs_reference, bool needs_sampling) {
    const DeviceGuard guard(value.get_device_index());
    const DType dtype = kernel.dtype;
    const int64_t samples = kernel.levels.points_total;
    const bool is_double = dtype == DType::kFloat64;
    const ScalarType accumulator = is_double ? ScalarType::Double : ScalarType::Float;
    const auto gradient = [](const Tensor& like, bool needed, std::vector<int64_t> sizes) {
      return torch::stable::new_empty(like, needed ? sizes : std::vector<int64_t>{0});
    };
    // Sums of 16-bit gradients are kept in fp32 and rounded by a second kernel.
    const bool rounded = !empty() && (dtype == DType::kBFloat16 || dtype == DType::kFloat16);
    const std::vector<int64_t> value_sizes{kernel.batch, kernel.positions, kernel.heads, kernel.channels};
    const int64_t value_count = kernel.batch * kernel.positions * kernel.heads * kernel.channels;
    Gradients out{needs_value && !rounded ? new_zeros(value, value_sizes) : gradient(value, needs_value, value_sizes),
                  gradient(reference.has_value() ? *reference : value, needs_reference,
                           {kernel.batch, kernel.queries, kernel.levels.count, kernel.reference_size}),
                  gradient(points, needs_sampling, {kernel.batch, kernel.queries, kernel.heads, samples, 2}),
                  gradient(weights, needs_sampling, {kernel.batch, kernel.queries, kernel.heads, samples})};
    if (empty() || !(needs_value || needs_reference || needs_sampling)) return out;

    std::optional<Tensor> value_sum, reference_parts;
    if (needs_value) {
      if (rounded) value_sum = new_zeros(value, value_sizes, accumulator);
      kernel.grad_value = (rounded ? *value_sum : out.value).data_ptr();
    }
    if (needs_sampling) {
      kernel.grad_points = out.points.data_ptr();
      kernel.grad_weights = out.weights.data_ptr();
    }
    if (needs_reference) {
      reference_parts = torch::stable::new_empty(
          value,
          std::vector<int64_t>{kernel.batch, kernel.queries, kernel.heads, kernel.levels.count, kernel.reference_size},
          accumulator);
      kernel.grad_reference = reference_parts->data_ptr();
    }
    kernel.gathered = backward_choice().succeeded();
    const DeviceTraits device = traits_of(value);
    const cudaStream_t stream = current_stream(value);
    launch_ms_deform_attn(kernel, device, stream);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    if (value_sum.has_value()) {
      launch_round_gradient(static_cast<const float*>(value_sum->data_ptr()), out.value.data_ptr(), dtype, value_count,
                            device, stream);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    if (needs_reference) {
      launch_sum_over_heads(reference_parts->data_ptr(), is_double, out.reference.data_ptr(), kernel.reference.dtype,
                            kernel.batch * kernel.queries, kernel.heads, kernel.levels.count * kernel.reference_size,
                            device, stream);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    return out;
  }
};

Tensor ms_deform_attn(const Tensor& value, std::vector<int64_t> levels, std::optional<Tensor> spatial_shapes,
                      std::optional<Tensor> level_start_index, const Tensor& sampling_locations,
                      const Tensor& attention_weights, std::vector<int64_t> points_per_level) {
  return Arguments(value, levels, spatial_shapes, level_start_index, std::nullopt, sampling_locations,
                   attention_weights, points_per_level, 0)
      .forward();
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(
    const Tensor& grad_output, const Tensor& value, std::vector<int64_t> levels, std::optional<Tensor> spatial_shapes,
    std::optional<Tensor> level_start_index, const Tensor& sampling_locations, const Tensor& attention_weights,
    std::vector<int64_t> points_per_level, bool needs_value, bool needs_sampling) {
  Arguments arguments(value, levels, spatial_shapes, level_start_index, std::nullopt, sampling_locations,
                      attention_weights, points_per_level, 0);
  arguments.set_grad_output(grad_output);
  auto gradients = arguments.backward(needs_value, false, needs_sampling);
  return {gradients.value, gradients.points, gradients.weights};
}

Tensor ms_deform_attn_from_offsets(const Tensor& value, std::vector<int64_t> levels,
                                   std::optional<Tensor> spatial_shapes, std::optional<Tensor> level_start_index,
                                   const Tensor& reference_points, const Tensor& sampling_offsets,
                                   const Tensor& attention_logits, std::vector<int64_t> points_per_level,
                                   double offset_scale) {
  return Arguments(value, levels, spatial_shapes, level_start_index, reference_points, sampling_offsets,
                   attention_logits, points_per_level, offset_scale)
      .forward();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ms_deform_attn_from_offsets_backward(
    const Tensor& grad_output, const Tensor& value, std::vector<int64_t> levels, std::optional<Tensor> spatial_shapes,
    std::optional<Tensor> level_start_index, const Tensor& reference_points, const Tensor& sampling_offsets,
    const Tensor& attention_logits, std::vector<int64_t> points_per_level, double offset_scale, bool needs_value,
    bool needs_reference, bool needs_sampling) {
  Arguments arguments(value, levels, spatial_shapes, level_start_index, reference_points, sampling_offsets,
                      attention_logits, points_per_level, offset_scale);
  arguments.set_grad_output(grad_output);
  auto gradients = arguments.backward(needs_value, needs_reference, needs_sampling);
  return {gradients.value, gradients.reference, gradients.points, gradients.weights};
}

}  // namespace
}  // namespace m2f

// Choose a kernel for this process, "general" or its successor; return 0, or 1 where there is no such kernel.
extern "C" __attribute__((visibility("default"))) int m2f_cuda_set_forward(const char* name) {
  return m2f::forward_choice().choose(name);
}
extern "C" __attribute__((visibility("default"))) int m2f_cuda_set_backward(const char* name) {
  return m2f::backward_choice().choose(name);
}

// Not m2f: there m2f_kernels/dispatch.py chooses, call by call, between these and others.
STABLE_TORCH_LIBRARY_IMPL(m2f_cuda, CUDA, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&m2f::ms_deform_attn));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&m2f::ms_deform_attn_backward));
  m.impl("ms_deform_attn_from_offsets", TORCH_BOX(&m2f::ms_deform_attn_from_offsets));
  m.impl("ms_deform_attn_from_offsets_backward", TORCH_BOX(&m2f::ms_deform_attn_from_offsets_backward));
}
