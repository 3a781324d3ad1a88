// Binding of the CPU kernels of attention masks: argument checks, the division into tasks, scratch memory.

#include "attention_mask/cpu_kernel.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "torch/args.h"
#include "torch/cpu_binding.h"

namespace m2f {
namespace {

using IntList = std::vector<int64_t>;

const AttentionMaskKernels& kernels() { return M2F_IN_USE(attention_mask_kernels)(); }

void check_not_float64(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(dtype_of(tensor, name) != DType::kFloat64, name,
                  ": expected float32, bfloat16 or float16; float64 runs through the reference");
}

// For each output coordinate of an axis: the two input indices, and the weight of the second (align_corners=False).
struct Axis {
  std::vector<int32_t> index;
  std::vector<float> weight;

  Axis(int64_t input, int64_t output) : index(2 * output), weight(output) {
    for (int64_t i = 0; i < output; ++i) {
      const double source = std::max((i + 0.5) * static_cast<double>(input) / output - 0.5, 0.0);
      const int64_t lower = std::min(static_cast<int64_t>(source), input - 1);
      index[2 * i] = static_cast<int32_t>(lower);
      index[2 * i + 1] = static_cast<int32_t>(std::min(lower + 1, input - 1));
      weight[i] = static_cast<float>(source - lower);
    }
  }
};

int64_t centre_ratio(int64_t height, int64_t width, int64_t h, int64_t w) {
  for (const int64_t ratio : {2, 4, 8})
    if (h * ratio == height && w * ratio == width) return ratio;
  return 0;
}

Tensor resize_mask_features(const Tensor& mask_features, IntList sizes) {
  STD_TORCH_CHECK(mask_features.dim() == 4, "mask_features: expected [N, C, H, W]");
  check_not_float64(mask_features, "mask_features");
  STD_TORCH_CHECK(sizes.size() % 2 == 0, "sizes: expected (h, w) per level");
  const Tensor input = unit_stride_last(mask_features);
  ResizeArgs args{};
  args.batch = input.size(0);
  args.channels = input.size(1);
  args.height = input.size(2);
  args.width = input.size(3);
  STD_TORCH_CHECK(args.height >= 1 && args.width >= 1 && args.height < INT32_MAX && args.width < INT32_MAX,
                  "mask_features: expected at least one pixel");
  args.input = rows_of(input, "mask_features");
  args.levels = static_cast<int>(sizes.size() / 2);
  STD_TORCH_CHECK(args.levels >= 1 && args.levels <= kMaxResizeLevels, "sizes: expected 1 to ", kMaxResizeLevels,
                  " levels, got ", args.levels);
  std::vector<Axis> axes;
  axes.reserve(sizes.size());
  int64_t total = 0, widest = 0;
  for (int l = 0; l < args.levels; ++l) {
    ResizeLevel& level = args.level[l];
    level.height = sizes[2 * l];
    level.width = sizes[2 * l + 1];
    STD_TORCH_CHECK(level.height >= 1 && level.width >= 1, "sizes: expected at least 1, got ", level.height, " x ",
                    level.width);
    level.start = total;
    level.ratio = static_cast<int>(centre_ratio(args.height, args.width, level.height, level.width));
    if (!level.ratio) {
      axes.emplace_back(args.height, level.height);
      level.rows = axes.back().index.data();
      level.row_weight = axes.back().weight.data();
      axes.emplace_back(args.width, level.width);
      level.columns = axes.back().index.data();
      level.column_weight = axes.back().weight.data();
    }
    total += level.height * level.width;
    widest = std::max(widest, level.width);
  }
  // The finest level comes first: it reads the plane in order, and the other levels then find it in the cache.
  std::stable_sort(args.level, args.level + args.levels,
                   [](const ResizeLevel& a, const ResizeLevel& b) { return a.height > b.height; });
  Tensor output = empty_like_sizes(input, {args.batch, args.channels, total});
  args.output = {output.data_ptr(), args.input.dtype, {args.channels * total, total, 0}};
  const size_t scratch_bytes = (args.width + widest + 2 * 64) * sizeof(float);
  torch::stable::parallel_for(0, args.batch * args.channels, 1, [&](int64_t first, int64_t last) {
    const Scratch scratch = allocate_scratch(scratch_bytes);
    kernels().resize(args, first, last, static_cast<float*>(scratch.get()));
  });
  return output;
}

struct Packed {
  Tensor bits, row_any;
  int32_t* bits_data() { return static_cast<int32_t*>(bits.data_ptr()); }
  bool* row_any_data() { return static_cast<bool*>(row_any.data_ptr()); }
};

Packed new_packed(const Tensor& like, int64_t n, int64_t q, int64_t s) {
  return {torch::stable::new_empty(like, IntList{n, q, (s + 31) / 32}, ScalarType::Int),
          torch::stable::new_zeros(like, IntList{n, q}, ScalarType::Bool)};
}

std::tuple<Tensor, Tensor> predict_attention_mask(const Tensor& mask_embed, const Tensor& level_features) {
  STD_TORCH_CHECK(mask_embed.dim() == 3, "mask_embed: expected [N, Q, C]");
  STD_TORCH_CHECK(level_features.dim() == 3, "level_features: expected [N, C, S]");
  check_not_float64(mask_embed, "mask_embed");
  check_not_float64(level_features, "level_features");
  const Tensor embed = unit_stride_last(mask_embed), features = unit_stride_last(level_features);
  PredictArgs args{};
  args.batch = embed.size(0);
  args.queries = embed.size(1);
  args.channels = embed.size(2);
  args.keys = features.size(2);
  check_sizes(features, "level_features", {args.batch, args.channels, args.keys});
  args.embed = {embed.data_ptr(), dtype_of(embed, "mask_embed"), {embed.stride(0), embed.stride(1), 0}};
  args.features = {
      features.data_ptr(), dtype_of(features, "level_features"), {features.stride(0), features.stride(1), 0}};
  Packed packed = new_packed(embed, args.batch, args.queries, args.keys);
  args.bits = packed.bits_data();
  args.row_any = packed.row_any_data();
  if (args.batch * args.queries * args.keys == 0) return {packed.bits, packed.row_any};
  const AttentionMaskKernels& kernel = kernels();
  const size_t image_bytes = kernel.packed_embed(args);
  const Scratch embeds = allocate_scratch(args.batch * image_bytes);
  args.packed_embed = static_cast<const float*>(embeds.get());
  for (int64_t image = 0; image < args.batch; ++image)
    kernel.pack_embed(args, image, static_cast<float*>(embeds.get()) + image * (image_bytes / sizeof(float)));
  const int64_t groups = (args.keys + kKeysPerTask - 1) / kKeysPerTask;
  torch::stable::parallel_for(0, args.batch * groups, 1, [&](int64_t first, int64_t last) {
    const Scratch scratch = allocate_scratch(kernel.predict_scratch(args));
    kernel.predict(args, first, last, scratch.get());
  });
  return {packed.bits, packed.row_any};
}

std::tuple<Tensor, Tensor> pack_attention_mask(const Tensor& mask_) {
  STD_TORCH_CHECK(mask_.dim() == 3, "mask: expected [N, Q, S]");
  const bool logits = mask_.scalar_type() != ScalarType::Bool;
  if (logits) check_not_float64(mask_, "mask");
  const Tensor mask = torch::stable::contiguous(mask_);
  const int64_t n = mask.size(0), q = mask.size(1), s = mask.size(2);
  Packed packed = new_packed(mask, n, q, s);
  PackArgs args{};
  args.rows = n * q;
  args.keys = s;
  args.mask = mask.data_ptr();
  args.logits = logits;
  if (logits) args.dtype = dtype_of(mask, "mask");
  args.stride = s;
  args.bits = packed.bits_data();
  args.row_any = packed.row_any_data();
  const int64_t grain = std::max<int64_t>((int64_t{1} << 16) / std::max<int64_t>(s, 1), 1);
  torch::stable::parallel_for(0, args.rows, grain,
                              [&](int64_t first, int64_t last) { kernels().pack(args, first, last); });
  return {packed.bits, packed.row_any};
}

}  // namespace
}  // namespace m2f

STABLE_TORCH_LIBRARY_IMPL(m2f, CPU, m) {
  m.impl("resize_mask_features", TORCH_BOX(&m2f::resize_mask_features));
  m.impl("predict_attention_mask", TORCH_BOX(&m2f::predict_attention_mask));
  m.impl("pack_attention_mask", TORCH_BOX(&m2f::pack_attention_mask));
}
