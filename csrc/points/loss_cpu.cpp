// Binding of the CPU kernels of matching cost and point loss: argument checks, the division into tasks, scratch memory.

#include "points/loss_cpu_kernel.h"

#include <algorithm>
#include <numeric>
#include <tuple>

#include "points/torch_pixels.h"
#include "torch/cpu_binding.h"

namespace m2f {
namespace {

const PointLossKernels& kernels() { return M2F_IN_USE(point_loss_kernels)(); }

Tensor contiguous_floats(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, ": expected float32");
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

const float* floats(const Tensor& tensor) { return static_cast<const float*>(tensor.data_ptr()); }

Tensor new_floats(const Tensor& like, std::vector<int64_t> sizes) {
  return torch::stable::new_empty(like, std::move(sizes), ScalarType::Float);
}

float* mutable_floats(Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

std::tuple<Tensor, Tensor> mask_matching_cost(const Tensor& logits_, const Tensor& labels_) {
  STD_TORCH_CHECK(logits_.dim() == 2 && labels_.dim() == 2, "logits, labels: expected [Q, K] and [T, K]");
  const Tensor logits = contiguous_floats(logits_, "logits"), labels = contiguous_floats(labels_, "labels");
  MatchingCostArgs args{};
  args.queries = logits.size(0);
  args.k = logits.size(1);
  args.t = labels.size(0);
  STD_TORCH_CHECK(args.k >= 1, "logits: expected at least one point");
  check_sizes(labels, "labels", {args.t, args.k});
  Tensor cross_entropy = new_floats(logits, {args.queries, args.t}), dice = new_floats(logits, {args.queries, args.t});
  if (args.queries * args.t == 0) return {cross_entropy, dice};
  args.logits = floats(logits);
  args.labels = floats(labels);
  args.cross_entropy = mutable_floats(cross_entropy);
  args.dice = mutable_floats(dice);
  std::vector<double> label_sums(args.t);
  for (int64_t t = 0; t < args.t; ++t)
    label_sums[t] = std::accumulate(args.labels + t * args.k, args.labels + (t + 1) * args.k, 0.0);
  args.label_sums = label_sums.data();
  const PointLossKernels& kernel = kernels();
  const int64_t blocks = (args.queries + kQueriesPerTask - 1) / kQueriesPerTask;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    const Scratch scratch = allocate_scratch(kernel.cost_scratch(args));
    kernel.cost(args, first, last, scratch.get());
  });
  return {cross_entropy, dice};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> point_mask_loss(const Tensor& mask_logits, const Tensor& rows,
                                                           std::vector<Tensor> targets_, const Tensor& target_rows,
                                                           const Tensor& points_) {
  STD_TORCH_CHECK(mask_logits.dim() == 3, "mask_logits: expected [P, h, w]");
  const Tensor logits = dense_planes(mask_logits, "mask_logits");
  const Tensor points = float_points(points_, "points");
  PointLossArgs args{};
  args.m = rows.numel();
  args.k = points.size(1);
  check_sizes(points, "points", {args.m, args.k, 2});
  STD_TORCH_CHECK(args.k >= 1, "points: expected at least one point");
  args.height = logits.size(1);
  args.width = logits.size(2);
  args.logits = logits.data_ptr();
  args.type = pixel_type_of(logits, "mask_logits");
  args.stride = logits.stride(0);
  args.rows = checked_rows(rows, "rows", logits.size(0));
  args.points = floats(points);

  // The list has each image's pixels, followed by its marks unless they are masks.
  std::vector<Tensor> pixels;
  std::vector<Target> all;
  for (size_t i = 0; i < targets_.size(); ++i) {
    pixels.push_back(targets_[i]);
    const bool marked = i + 1 < targets_.size() && targets_[i + 1].dim() == 1;
    const std::vector<Target> found = targets_of(pixels.back(), marked ? &targets_[++i] : nullptr);
    all.insert(all.end(), found.begin(), found.end());
  }
  check_sizes(target_rows, "target_rows", {args.m});
  const int64_t* chosen = checked_rows(target_rows, "target_rows", static_cast<int64_t>(all.size()));
  std::vector<Target> targets(args.m);
  for (int64_t m = 0; m < args.m; ++m) targets[m] = all[chosen[m]];
  args.targets = targets.data();

  Tensor cross_entropy = new_floats(logits, {args.m}), dice = new_floats(logits, {args.m});
  Tensor probability = new_floats(logits, {args.m, args.k}), labels = new_floats(logits, {args.m, args.k});
  args.cross_entropy = mutable_floats(cross_entropy);
  args.dice = mutable_floats(dice);
  args.probability = mutable_floats(probability);
  args.labels = mutable_floats(labels);
  const PointLossKernels& kernel = kernels();
  torch::stable::parallel_for(0, args.m, std::max<int64_t>(2048 / args.k, 1),
                              [&](int64_t first, int64_t last) { kernel.loss(args, first, last); });
  return {cross_entropy, dice, probability, labels};
}

Tensor point_mask_loss_backward(const Tensor& grad_cross_entropy_, const Tensor& grad_dice_, const Tensor& rows,
                                const Tensor& points_, const Tensor& probability_, const Tensor& labels_,
                                int64_t planes, int64_t height, int64_t width) {
  const Tensor grad_cross_entropy = contiguous_floats(grad_cross_entropy_, "grad_cross_entropy");
  const Tensor grad_dice = contiguous_floats(grad_dice_, "grad_dice");
  const Tensor points = float_points(points_, "points");
  const Tensor probability = contiguous_floats(probability_, "probability");
  const Tensor labels = contiguous_floats(labels_, "labels");
  const int64_t m = rows.numel();
  PointLossBackwardArgs args{};
  args.k = points.size(1);
  args.height = height;
  args.width = width;
  check_sizes(grad_cross_entropy, "grad_cross_entropy", {m});
  check_sizes(grad_dice, "grad_dice", {m});
  check_sizes(points, "points", {m, args.k, 2});
  check_sizes(probability, "probability", {m, args.k});
  check_sizes(labels, "labels", {m, args.k});
  const int64_t* plane = checked_rows(rows, "rows", planes);
  // Groups masks by plane, in order, so that each plane has one writer.
  std::vector<int64_t> start(planes + 1), order(m);
  for (int64_t i = 0; i < m; ++i) ++start[plane[i] + 1];
  std::partial_sum(start.begin(), start.end(), start.begin());
  std::vector<int64_t> next(start.begin(), start.end() - 1);
  for (int64_t i = 0; i < m; ++i) order[next[plane[i]]++] = i;
  args.order = order.data();
  args.start = start.data();
  args.points = floats(points);
  args.probability = floats(probability);
  args.labels = floats(labels);
  args.grad_cross_entropy = floats(grad_cross_entropy);
  args.grad_dice = floats(grad_dice);
  Tensor grad_logits = new_floats(probability, {planes, height, width});
  args.grad_logits = mutable_floats(grad_logits);
  const PointLossKernels& kernel = kernels();
  torch::stable::parallel_for(0, planes, std::max<int64_t>(8192 / std::max<int64_t>(height * width, 1), 1),
                              [&](int64_t first, int64_t last) { kernel.loss_backward(args, first, last); });
  return grad_logits;
}

}  // namespace
}  // namespace m2f

STABLE_TORCH_LIBRARY_IMPL(m2f, CPU, m) {
  m.impl("mask_matching_cost", TORCH_BOX(&m2f::mask_matching_cost));
  m.impl("point_mask_loss", TORCH_BOX(&m2f::point_mask_loss));
  m.impl("point_mask_loss_backward", TORCH_BOX(&m2f::point_mask_loss_backward));
}
