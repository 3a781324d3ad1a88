// Binding of the CPU kernels of point sampling: argument checks, the division into tasks, scratch memory.

#include "points/sample_cpu_kernel.h"

#include <algorithm>

#include "points/torch_pixels.h"
#include "torch/cpu_binding.h"

namespace m2f {
namespace {

const PointSampleKernels& kernels() { return M2F_IN_USE(point_sample_kernels)(); }

// The least number of points in a task: with fewer, starting a thread takes longer than the task.
constexpr int64_t kPointsPerTask = 4096;

int64_t grain(int64_t points_per_task) {
  return std::max<int64_t>(kPointsPerTask / std::max<int64_t>(points_per_task, 1), 1);
}

Tensor point_sample(const Tensor& input_, const Tensor& points_, bool exact) {
  STD_TORCH_CHECK(input_.dim() == 4, "input: expected [N, C, h, w]");
  const Tensor input = dense_planes(input_, "input");
  const Tensor points = float_points(points_, "points");
  PointSampleArgs args{};
  args.batch = input.size(0);
  args.channels = input.size(1);
  args.height = input.size(2);
  args.width = input.size(3);
  args.k = points.size(1);
  check_sizes(points, "points", {args.batch, args.k, 2});
  args.input = input.data_ptr();
  args.type = pixel_type_of(input, "input");
  args.stride[0] = input.stride(0);
  args.stride[1] = input.stride(1);
  args.points = static_cast<const float*>(points.data_ptr());
  const bool narrow = !exact && (args.type == PixelType::kBFloat16 || args.type == PixelType::kFloat16);
  STD_TORCH_CHECK(args.type != PixelType::kFloat64, "input: float64 runs through the reference");
  Tensor output = torch::stable::new_empty(input, std::vector<int64_t>{args.batch, args.channels, args.k},
                                           narrow ? input.scalar_type() : ScalarType::Float);
  if (output.numel() == 0) return output;
  args.output = output.data_ptr();
  args.output_type = dtype_of(output, "output");
  // Threads share the channels. They share the points of one image only where there are too few channels.
  const int64_t threads = std::max<int64_t>(torch::stable::get_num_threads(), 1);
  args.parts =
      args.batch * args.channels >= 4 * threads ? 1 : std::clamp<int64_t>(args.k / kPointsPerTask, 1, 4 * threads);
  const PointSampleKernels& kernel = kernels();
  torch::stable::parallel_for(0, args.batch * args.parts * args.channels, grain(args.k / args.parts),
                              [&](int64_t first, int64_t last) {
                                const Scratch scratch = allocate_scratch(kernel.sample_scratch(args));
                                kernel.sample(args, first, last, scratch.get());
                              });
  return output;
}

Tensor sample_targets(const Tensor& pixels_, const Tensor& marks, const Tensor& points_) {
  Tensor pixels = pixels_;
  const std::vector<Target> targets = targets_of(pixels, &marks);
  STD_TORCH_CHECK(points_.dim() == 2 && points_.size(1) == 2 && points_.scalar_type() == ScalarType::Float,
                  "points: expected a float32 tensor [K, 2]");
  const Tensor points = points_.is_contiguous() ? points_ : torch::stable::contiguous(points_);
  TargetSampleArgs args{};
  args.count = pixels.size(0);
  args.k = points.size(0);
  Tensor output = torch::stable::new_empty(points, std::vector<int64_t>{args.count, args.k}, ScalarType::Float);
  if (output.numel() == 0) return output;
  args.targets = targets.data();
  args.points = static_cast<const float*>(points.data_ptr());
  args.output = static_cast<float*>(output.data_ptr());
  const PointSampleKernels& kernel = kernels();
  torch::stable::parallel_for(0, (args.k + kPointsPerStretch - 1) / kPointsPerStretch,
                              grain(kPointsPerStretch * args.count),
                              [&](int64_t first, int64_t last) { kernel.sample_targets(args, first, last); });
  return output;
}

Tensor point_sample_backward(const Tensor& grad_output_, const Tensor& points_, int64_t height, int64_t width) {
  STD_TORCH_CHECK(grad_output_.dim() == 3, "grad_output: expected [N, C, K]");
  const Tensor grad_output = grad_output_.is_contiguous() ? grad_output_ : torch::stable::contiguous(grad_output_);
  const Tensor points = float_points(points_, "points");
  PointSampleArgs args{};
  args.batch = grad_output.size(0);
  args.channels = grad_output.size(1);
  args.k = grad_output.size(2);
  args.height = height;
  args.width = width;
  check_sizes(points, "points", {args.batch, args.k, 2});
  args.points = static_cast<const float*>(points.data_ptr());
  args.output = grad_output.data_ptr();
  args.output_type = dtype_of(grad_output, "grad_output");
  STD_TORCH_CHECK(args.output_type != DType::kFloat64, "grad_output: float64 runs through the reference");
  Tensor grad_input = empty_like_sizes(grad_output, {args.batch, args.channels, height, width});
  args.grad_input = grad_input.data_ptr();
  const size_t plane =
      args.output_type == DType::kFloat32 ? 0 : static_cast<size_t>(height * width + 16) * sizeof(float);
  const PointSampleKernels& kernel = kernels();
  torch::stable::parallel_for(0, args.batch * args.channels, grain(args.k + height * width),
                              [&](int64_t first, int64_t last) {
                                const Scratch scratch = allocate_scratch(plane);
                                kernel.sample_backward(args, first, last, static_cast<float*>(scratch.get()));
                              });
  return grad_input;
}

Tensor uncertain_points(const Tensor& mask_logits, const Tensor& rows, const Tensor& seed, int64_t first_stream,
                        int64_t candidates, int64_t keep, int64_t fresh) {
  STD_TORCH_CHECK(mask_logits.dim() == 3, "mask_logits: expected [P, h, w]");
  STD_TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == ScalarType::Long, "seed: expected an int64 tensor [1]");
  STD_TORCH_CHECK(0 <= keep && keep <= candidates && fresh >= 0 && candidates + fresh < (int64_t{1} << 31),
                  "candidates: expected at least keep and fewer than 2^31 points");
  const Tensor logits = dense_planes(mask_logits, "mask_logits");
  UncertainPointsArgs args{};
  args.m = rows.numel();
  args.planes = logits.size(0);
  args.height = logits.size(1);
  args.width = logits.size(2);
  args.logits = logits.data_ptr();
  args.type = pixel_type_of(logits, "mask_logits");
  args.stride = logits.stride(0);
  args.rows = checked_rows(rows, "rows", args.planes);
  args.seed = *static_cast<const uint64_t*>(seed.data_ptr());
  args.first_stream = static_cast<uint32_t>(first_stream);
  args.candidates = candidates;
  args.keep = keep;
  args.fresh = fresh;
  Tensor points = torch::stable::new_empty(logits, std::vector<int64_t>{args.m, keep + fresh, 2}, ScalarType::Float);
  args.points = static_cast<float*>(points.data_ptr());
  const PointSampleKernels& kernel = kernels();
  torch::stable::parallel_for(0, args.m, grain(candidates), [&](int64_t first, int64_t last) {
    const Scratch scratch = allocate_scratch(kernel.uncertain_scratch(args));
    kernel.uncertain(args, first, last, scratch.get());
  });
  return points;
}

}  // namespace
}  // namespace m2f

STABLE_TORCH_LIBRARY_IMPL(m2f, CPU, m) {
  m.impl("point_sample", TORCH_BOX(&m2f::point_sample));
  m.impl("sample_targets", TORCH_BOX(&m2f::sample_targets));
  m.impl("point_sample_backward", TORCH_BOX(&m2f::point_sample_backward));
  m.impl("uncertain_points", TORCH_BOX(&m2f::uncertain_points));
}
