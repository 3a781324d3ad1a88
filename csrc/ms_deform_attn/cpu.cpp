// Binding of the CPU kernels: argument checks, the division into tasks, scratch memory.

#include "ms_deform_attn/cpu_kernel.h"

#include <algorithm>
#include <numeric>
#include <tuple>

#include "ms_deform_attn/torch_levels.h"
#include "torch/args.h"
#include "torch/cpu_binding.h"

namespace m2f {
namespace {

using IntList = std::vector<int64_t>;
using OptionalTensor = std::optional<Tensor>;

const MSDeformAttnKernels& kernels() { return M2F_IN_USE(ms_deform_attn_kernels)(); }

// A sampling tensor [N, Q, H, K, 2] or [N, Q, H, K], copied where its rows are not contiguous.
Tensor dense_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  const bool dense = tensor.stride(last) == 1 && (last == 3 || tensor.stride(3) == tensor.size(last));
  return dense ? tensor : torch::stable::contiguous(tensor);
}

// In an encoder the queries are the positions of value. They are visited in 2-D tiles of their level, so that
// neighbours read the same rows of value while those are in L1 or L2.
constexpr int64_t kTile = 16;

std::vector<int32_t> tiled_order(const MSDeformAttnArgs& args) {
  std::vector<int32_t> order;
  if (args.queries != args.positions || args.queries > INT32_MAX) return order;
  order.reserve(args.queries);
  for (int l = 0; l < args.levels.count; ++l) {
    const int64_t height = args.levels.height[l], width = args.levels.width[l], start = args.levels.start[l];
    for (int64_t y0 = 0; y0 < height; y0 += kTile)
      for (int64_t x0 = 0; x0 < width; x0 += kTile)
        for (int64_t y = y0; y < std::min(y0 + kTile, height); ++y)
          for (int64_t x = x0; x < std::min(x0 + kTile, width); ++x)
            order.push_back(static_cast<int32_t>(start + y * width + x));
  }
  // If the levels do not cover value exactly, the queries are not its positions.
  if (static_cast<int64_t>(order.size()) != args.queries) order.clear();
  return order;
}

// The tensors that a call reads, kept alive for its duration, and the kernel arguments made from them.
struct Call {
  Tensor value, locations, weights;
  OptionalTensor reference;
  std::vector<int32_t> order;
  MSDeformAttnArgs args{};

  Call(const Tensor& value_, const IntList& levels, const OptionalTensor& spatial_shapes,
       const OptionalTensor& level_start_index, const OptionalTensor& reference_, const Tensor& locations_,
       const Tensor& weights_, const IntList& points_per_level, double offset_scale, bool backward)
      : value(value_), locations(locations_), weights(weights_), reference(reference_) {
    STD_TORCH_CHECK(value.dim() == 4, "value: expected [N, S, H, D]");
    STD_TORCH_CHECK(weights.dim() == 4, "attention weights: expected [N, Q, H, K]");
    STD_TORCH_CHECK(locations.dim() == 5, "sampling locations: expected [N, Q, H, K, 2]");
    value = unit_stride_last(value);
    locations = dense_rows(locations);
    weights = dense_rows(weights);
    args.batch = value.size(0);
    args.positions = value.size(1);
    args.heads = value.size(2);
    args.channels = value.size(3);
    args.queries = weights.size(1);
    args.levels = read_levels(levels, spatial_shapes, level_start_index, points_per_level, args.positions, true);
    STD_TORCH_CHECK(args.positions < (int64_t{1} << 28), "value: expected fewer than 2^28 positions, got ",
                    args.positions);
    const int64_t k = args.levels.points_total;
    check_sizes(weights, "attention weights", {args.batch, args.queries, args.heads, k});
    check_sizes(locations, "sampling locations", {args.batch, args.queries, args.heads, k, 2});
    args.value = rows_of(value, "value");
    args.locations = rows_of(locations, "sampling locations");
    args.weights = rows_of(weights, "attention weights");
    if (reference.has_value()) {
      STD_TORCH_CHECK(reference->dim() == 4, "reference_points: expected [N, Q, L, 2 or 4]");
      reference = unit_stride_last(*reference);
      args.from_offsets = true;
      args.reference_dim = static_cast<int>(reference->size(reference->dim() - 1));
      STD_TORCH_CHECK(args.reference_dim == 2 || args.reference_dim == 4,
                      "reference_points: expected 2 or 4 coordinates");
      check_sizes(*reference, "reference_points", {args.batch, args.queries, args.levels.count, args.reference_dim});
      args.reference = rows_of(*reference, "reference_points");
      args.offset_scale = offset_scale;
    }
    order = tiled_order(args);
    args.order = order.empty() ? nullptr : order.data();

    // Packing reads and writes each position once. It pays if at least as many rows are then gathered. It is also
    // needed where the channels do not fill whole vectors, and for gradients of 16-bit values, which are summed in
    // float32.
    const int64_t lanes = kernels().vector_bytes / (args.value.dtype == DType::kFloat64 ? 8 : 4);
    const bool narrow = element_size(args.value.dtype) == 2;
    args.packed = 4 * args.queries * k >= args.positions || args.channels % lanes != 0 || (backward && narrow);
    const int64_t threads = std::max<int64_t>(torch::stable::get_num_threads(), 1);
    const int64_t heads = std::max<int64_t>(args.batch * args.heads, 1);
    // Every thread gets the same number of tasks. In backward, tasks that share a head need one gradient panel each;
    // without panels the gradient is accumulated in place, and a head cannot be shared.
    args.parts = threads / std::gcd(threads, heads);
    if (backward) args.parts = args.packed ? std::min<int64_t>(args.parts, 8) : 1;
    args.parts = std::clamp<int64_t>(args.queries / 64, 1, args.parts);
  }

  int64_t tasks() const { return args.batch * args.heads * args.parts; }

  // The least number of tasks per thread: starting a thread costs about as much as 2^15 multiply-adds.
  int64_t grain() const {
    const int64_t work = std::max<int64_t>(args.queries / args.parts * args.levels.points_total * args.channels * 4, 1);
    return std::max<int64_t>((int64_t{1} << 15) / work, 1);
  }
};

Tensor run_forward(Call& call) {
  MSDeformAttnArgs& args = call.args;
  Tensor output = empty_like_sizes(call.value, {args.batch, args.queries, args.heads * args.channels});
  if (output.numel() == 0) return output;
  args.output = {output.data_ptr(),
                 args.value.dtype,
                 {args.queries * args.heads * args.channels, args.heads * args.channels, args.channels}};
  const MSDeformAttnKernels& kernel = kernels();
  torch::stable::parallel_for(0, call.tasks(), call.grain(), [&](int64_t first, int64_t last) {
    const Scratch scratch = allocate_scratch(kernel.forward_scratch(args));
    kernel.forward(args, first, last, scratch.get());
  });
  return output;
}

struct Gradients {
  Tensor value, locations, weights, reference;
};

// A contiguous tensor [N, Q, H, ...] and its rows.
Rows contiguous_rows(const Tensor& tensor, int64_t row) {
  return {tensor.data_ptr(),
          dtype_of(tensor, "gradient"),
          {tensor.size(1) * tensor.size(2) * row, tensor.size(2) * row, row}};
}

Tensor new_contiguous(const Tensor& like) {
  const auto sizes = like.sizes();
  return torch::stable::new_empty(like, IntList(sizes.begin(), sizes.end()));
}

Tensor not_needed(const Tensor& like) { return empty_like_sizes(like, {0}); }

// Sum over heads of [N, H, Q, L, C] into [N, Q, L, C] of the reference points' dtype.
Tensor sum_heads(const Tensor& partial, const Tensor& like) {
  const int64_t heads = 1;
  Tensor sum = torch::stable::sum(partial, torch::headeronly::IntHeaderOnlyArrayRef(&heads, 1));
  return torch::stable::to(sum, like.scalar_type());
}

Gradients run_backward(Call& call, const Tensor& grad_output_, bool needs_value, bool needs_reference,
                       bool needs_sampling) {
  MSDeformAttnArgs& args = call.args;
  const Tensor grad_output = unit_stride_last(grad_output_);
  check_sizes(grad_output, "grad_output", {args.batch, args.queries, args.heads * args.channels});
  STD_TORCH_CHECK(dtype_of(grad_output, "grad_output") == args.value.dtype, "grad_output: expected value's dtype");
  args.grad_output = {
      grad_output.data_ptr(), args.value.dtype, {grad_output.stride(0), grad_output.stride(1), args.channels}};
  args.needs_value = needs_value;
  args.needs_sampling = needs_sampling;

  Gradients grads{needs_value ? new_contiguous(call.value) : not_needed(call.value),
                  needs_sampling ? new_contiguous(call.locations) : not_needed(call.locations),
                  needs_sampling ? new_contiguous(call.weights) : not_needed(call.weights),
                  not_needed(call.reference.has_value() ? *call.reference : call.value)};
  if (needs_value) args.grad_value = contiguous_rows(grads.value, args.channels);
  if (needs_sampling) {
    args.grad_locations = contiguous_rows(grads.locations, 2 * args.levels.points_total);
    args.grad_weights = contiguous_rows(grads.weights, args.levels.points_total);
  }
  OptionalTensor partial_reference;
  if (needs_reference) {
    const auto dtype = args.value.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
    partial_reference = torch::stable::new_zeros(
        call.value, IntList{args.batch, args.heads, args.queries, args.levels.count, args.reference_dim}, dtype);
    args.grad_reference = partial_reference->data_ptr();
  }

  const MSDeformAttnKernels& kernel = kernels();
  if (args.batch * args.queries > 0) {
    Scratch panels;
    if (args.parts > 1 && needs_value) {
      panels = allocate_scratch(static_cast<size_t>(call.tasks()) * kernel.grad_panel(args));
      args.grad_panels = panels.get();
    }
    torch::stable::parallel_for(0, call.tasks(), call.grain(), [&](int64_t first, int64_t last) {
      const Scratch scratch = allocate_scratch(kernel.backward_scratch(args));
      kernel.backward(args, first, last, scratch.get());
    });
    if (panels) {
      const int64_t rows = std::accumulate(args.levels.height, args.levels.height + args.levels.count, int64_t{0});
      torch::stable::parallel_for(0, args.batch * args.heads * rows, 16, [&](int64_t first, int64_t last) {
        const Scratch row = allocate_scratch((args.channels + 64) * sizeof(double));
        kernel.combine_parts(args, first, last, row.get());
      });
    }
  } else if (needs_value) {
    torch::stable::zero_(grads.value);
  }
  if (needs_reference) grads.reference = sum_heads(*partial_reference, *call.reference);
  return grads;
}

Tensor ms_deform_attn(const Tensor& value, IntList levels, OptionalTensor spatial_shapes,
                      OptionalTensor level_start_index, const Tensor& sampling_locations,
                      const Tensor& attention_weights, IntList points_per_level) {
  Call call(value, levels, spatial_shapes, level_start_index, std::nullopt, sampling_locations, attention_weights,
            points_per_level, 0, false);
  return run_forward(call);
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(const Tensor& grad_output, const Tensor& value,
                                                           IntList levels, OptionalTensor spatial_shapes,
                                                           OptionalTensor level_start_index,
                                                           const Tensor& sampling_locations,
                                                           const Tensor& attention_weights, IntList points_per_level,
                                                           bool needs_value, bool needs_sampling) {
  Call call(value, levels, spatial_shapes, level_start_index, std::nullopt, sampling_locations, attention_weights,
            points_per_level, 0, true);
  Gradients grads = run_backward(call, grad_output, needs_value, false, needs_sampling);
  return {grads.value, grads.locations, grads.weights};
}

Tensor ms_deform_attn_from_offsets(const Tensor& value, IntList levels, OptionalTensor spatial_shapes,
                                   OptionalTensor level_start_index, const Tensor& reference_points,
                                   const Tensor& sampling_offsets, const Tensor& attention_logits,
                                   IntList points_per_level, double offset_scale) {
  Call call(value, levels, spatial_shapes, level_start_index, reference_points, sampling_offsets, attention_logits,
            points_per_level, offset_scale, false);
  return run_forward(call);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ms_deform_attn_from_offsets_backward(
    const Tensor& grad_output, const Tensor& value, IntList levels, OptionalTensor spatial_shapes,
    OptionalTensor level_start_index, const Tensor& reference_points, const Tensor& sampling_offsets,
    const Tensor& attention_logits, IntList points_per_level, double offset_scale, bool needs_value,
    bool needs_reference, bool needs_sampling) {
  Call call(value, levels, spatial_shapes, level_start_index, reference_points, sampling_offsets, attention_logits,
            points_per_level, offset_scale, true);
  Gradients grads = run_backward(call, grad_output, needs_value, needs_reference, needs_sampling);
  return {grads.value, grads.reference, grads.locations, grads.weights};
}

}  // namespace
}  // namespace m2f

STABLE_TORCH_LIBRARY_IMPL(m2f, CPU, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&m2f::ms_deform_attn));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&m2f::ms_deform_attn_backward));
  m.impl("ms_deform_attn_from_offsets", TORCH_BOX(&m2f::ms_deform_attn_from_offsets));
  m.impl("ms_deform_attn_from_offsets_backward", TORCH_BOX(&m2f::ms_deform_attn_from_offsets_backward));
}
