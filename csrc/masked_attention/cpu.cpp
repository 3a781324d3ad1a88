// Binding of the CPU kernels of masked attention: argument checks, the division into tasks, scratch memory.

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>

#include "masked_attention/cpu_kernel.h"
#include "torch/args.h"
#include "torch/cpu_binding.h"

namespace m2f {
namespace {

using IntList = std::vector<int64_t>;

const MaskedAttentionKernels& kernels() { return M2F_IN_USE(masked_attention_kernels)(); }

// How many parts the keys are divided into depends on their number alone, so that results do not depend on the number
// of threads. Heads are independent of each other, and are divided so that every thread has a task.
constexpr int64_t kTilesPerPart = 16, kMostParts = 8, kTasksPerThread = 2;

void divide(MaskedAttentionArgs& args) {
  const int64_t tiles = (args.keys + kTileKeys - 1) / kTileKeys;
  const int64_t wanted = kTasksPerThread * torch::stable::get_num_threads();
  args.parts = std::clamp<int64_t>(tiles / kTilesPerPart, 1, kMostParts);
  const int64_t tasks = std::max<int64_t>(args.batch * args.parts, 1);
  args.head_groups = std::clamp<int64_t>((wanted + tasks - 1) / tasks, 1, std::max<int64_t>(args.heads, 1));
}

// A contiguous tensor [N, positions, H, D] as rows of D by (n, h, position).
Rows merged_heads(const Tensor& tensor, const char* name) {
  return {tensor.data_ptr(), dtype_of(tensor, name), {tensor.stride(0), tensor.stride(2), tensor.stride(1)}};
}

// A tensor [N, H, Q, *] of any strides.
BiasRows bias_rows(const Tensor& tensor, const char* name) { return {rows_of(tensor, name), tensor.stride(3)}; }

struct Bias {
  Tensor by_row, by_column;
};

// The tensors that a call reads, kept alive for its duration, and the kernel arguments made from them.
struct Call {
  Tensor query, key, value, bits, row_any;
  std::optional<Bias> bias;
  MaskedAttentionArgs args{};

  Call(const Tensor& query_, const Tensor& key_, const Tensor& value_, const Tensor& bits_, const Tensor& row_any_,
       double scale, std::optional<Bias> bias_ = std::nullopt)
      : query(query_), key(key_), value(value_), bits(bits_), row_any(row_any_), bias(std::move(bias_)) {
    STD_TORCH_CHECK(query.dim() == 4, "query: expected [N, H, Q, D]");
    STD_TORCH_CHECK(key.dim() == 4, "key: expected [N, H, S, D]");
    const DType dtype = dtype_of(query, "query");
    STD_TORCH_CHECK(dtype != DType::kFloat64,
                    "query: expected float32, bfloat16 or float16; float64 runs through the reference");
    STD_TORCH_CHECK(dtype_of(key, "key") == dtype && dtype_of(value, "value") == dtype,
                    "key, value: expected query's dtype");
    query = unit_stride_last(query);
    key = unit_stride_last(key);
    value = unit_stride_last(value);
    args.batch = query.size(0);
    args.heads = query.size(1);
    args.queries = query.size(2);
    args.channels = query.size(3);
    args.keys = key.size(2);
    args.words = (args.keys + 31) / 32;
    args.scale = scale;
    STD_TORCH_CHECK(args.keys >= 1 && args.channels >= 1, "key: expected at least one key and one channel");
    STD_TORCH_CHECK(args.queries < INT32_MAX, "query: expected fewer than 2^31 queries");
    check_sizes(key, "key", {args.batch, args.heads, args.keys, args.channels});
    check_sizes(value, "value", {args.batch, args.heads, args.keys, args.channels});
    STD_TORCH_CHECK(bits.dim() == 3 && bits.size(1) <= args.queries,
                    "bits: expected [N, R, words], R at most the queries");
    args.masked = bits.size(1);
    check_sizes(bits, "bits", {args.batch, args.masked, args.words});
    check_sizes(row_any, "row_any", {args.batch, args.masked});
    STD_TORCH_CHECK(bits.scalar_type() == ScalarType::Int, "bits: expected int32");
    STD_TORCH_CHECK(row_any.scalar_type() == ScalarType::Bool, "row_any: expected bool");
    bits = torch::stable::contiguous(bits);
    row_any = torch::stable::contiguous(row_any);
    args.query = rows_of(query, "query");
    args.key = rows_of(key, "key");
    args.value = rows_of(value, "value");
    args.bits = static_cast<const int32_t*>(bits.data_ptr());
    args.row_any = static_cast<const bool*>(row_any.data_ptr());
    if (bias) take_bias();
    divide(args);
  }

  void take_bias() {
    const Tensor &by_row = bias->by_row, &by_column = bias->by_column;
    STD_TORCH_CHECK(by_row.dim() == 4 && by_column.dim() == 4,
                    "by_row, by_column: expected [N, H, Q, h] and [N, H, Q, w]");
    args.height = by_row.size(3);
    args.width = by_column.size(3);
    check_sizes(by_row, "by_row", {args.batch, args.heads, args.queries, args.height});
    check_sizes(by_column, "by_column", {args.batch, args.heads, args.queries, args.width});
    STD_TORCH_CHECK(args.height * args.width == args.keys, "by_row, by_column: expected h * w = S");
    args.by_row = bias_rows(by_row, "by_row");
    args.by_column = bias_rows(by_column, "by_column");
    const DType dtype = dtype_of(query, "query");
    STD_TORCH_CHECK(args.by_row.rows.dtype == dtype && args.by_column.rows.dtype == dtype,
                    "by_row, by_column: expected query's dtype");
  }

  int64_t heads() const { return args.batch * args.heads; }

  template <typename Kernel>
  void run(size_t scratch_bytes, int64_t partial_floats, Kernel kernel, Kernel combine) {
    Scratch partial;
    if (args.parts > 1) {
      partial = allocate_scratch(heads() * args.parts * partial_floats * sizeof(float));
      args.partial = static_cast<float*>(partial.get());
    }
    torch::stable::parallel_for(0, args.batch * args.head_groups * args.parts, 1, [&](int64_t first, int64_t last) {
      const Scratch scratch = allocate_scratch(scratch_bytes);
      kernel(args, first, last, scratch.get());
    });
    if (args.parts == 1) return;
    torch::stable::parallel_for(0, heads(), 1, [&](int64_t first, int64_t last) {
      const Scratch scratch = allocate_scratch((args.channels + 64) * sizeof(float));
      combine(args, first, last, scratch.get());
    });
  }
};

std::tuple<Tensor, Tensor> forward(Call call) {
  MaskedAttentionArgs& args = call.args;
  Tensor output = empty_like_sizes(call.query, {args.batch, args.queries, args.heads, args.channels});
  Tensor logsumexp =
      torch::stable::new_empty(call.query, IntList{args.batch, args.heads, args.queries}, ScalarType::Float);
  if (output.numel() == 0) return {output, logsumexp};
  args.output = merged_heads(output, "output");
  args.logsumexp = static_cast<float*>(logsumexp.data_ptr());
  const MaskedAttentionKernels& kernel = kernels();
  call.run(kernel.forward_scratch(args), kernel.forward_partial(args), kernel.forward, kernel.combine_forward);
  return {output, logsumexp};
}

struct Gradients {
  Tensor query, key, value, by_row, by_column;  // the last two undefined without a bias
};

Gradients backward(Call call, const Tensor& grad_output_, const Tensor& output_, const Tensor& logsumexp_) {
  MaskedAttentionArgs& args = call.args;
  const Tensor grad_output = unit_stride_last(grad_output_), output = unit_stride_last(output_);
  const Tensor logsumexp = torch::stable::contiguous(logsumexp_);
  check_sizes(grad_output, "grad_output", {args.batch, args.queries, args.heads, args.channels});
  check_sizes(output, "output", {args.batch, args.queries, args.heads, args.channels});
  check_sizes(logsumexp, "logsumexp", {args.batch, args.heads, args.queries});
  STD_TORCH_CHECK(logsumexp.scalar_type() == ScalarType::Float, "logsumexp: expected float32");
  args.grad_output = merged_heads(grad_output, "grad_output");
  args.saved_output = merged_heads(output, "output");
  args.saved_logsumexp = static_cast<const float*>(logsumexp.data_ptr());
  Gradients grad;
  grad.query = empty_like_sizes(call.query, {args.batch, args.queries, args.heads, args.channels});
  grad.key = empty_like_sizes(call.query, {args.batch, args.keys, args.heads, args.channels});
  grad.value = empty_like_sizes(call.query, {args.batch, args.keys, args.heads, args.channels});
  args.grad_query = merged_heads(grad.query, "gradient");
  args.grad_key = merged_heads(grad.key, "gradient");
  args.grad_value = merged_heads(grad.value, "gradient");
  if (call.bias) {
    grad.by_row = empty_like_sizes(call.query, {args.batch, args.heads, args.queries, args.height});
    grad.by_column = empty_like_sizes(call.query, {args.batch, args.heads, args.queries, args.width});
    args.grad_by_row = rows_of(grad.by_row, "gradient");
    args.grad_by_column = rows_of(grad.by_column, "gradient");
  }
  const MaskedAttentionKernels& kernel = kernels();
  call.run(kernel.backward_scratch(args), kernel.backward_partial(args), kernel.backward, kernel.combine_backward);
  return grad;
}

std::tuple<Tensor, Tensor> masked_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                            const Tensor& bits, const Tensor& row_any, double scale) {
  return forward({query, key, value, bits, row_any, scale});
}

std::tuple<Tensor, Tensor, Tensor> masked_attention_backward(const Tensor& grad_output, const Tensor& query,
                                                             const Tensor& key, const Tensor& value, const Tensor& bits,
                                                             const Tensor& row_any, const Tensor& output,
                                                             const Tensor& logsumexp, double scale) {
  const Gradients grad = backward({query, key, value, bits, row_any, scale}, grad_output, output, logsumexp);
  return {grad.query, grad.key, grad.value};
}

std::tuple<Tensor, Tensor> masked_attention_with_bias(const Tensor& query, const Tensor& key, const Tensor& value,
                                                      const Tensor& bits, const Tensor& row_any, const Tensor& by_row,
                                                      const Tensor& by_column, double scale) {
  return forward({query, key, value, bits, row_any, scale, Bias{by_row, by_column}});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> masked_attention_with_bias_backward(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& bits,
    const Tensor& row_any, const Tensor& by_row, const Tensor& by_column, const Tensor& output, const Tensor& logsumexp,
    double scale) {
  const Gradients grad =
      backward({query, key, value, bits, row_any, scale, Bias{by_row, by_column}}, grad_output, output, logsumexp);
  return {grad.query, grad.key, grad.value, grad.by_row, grad.by_column};
}

}  // namespace
}  // namespace m2f

STABLE_TORCH_LIBRARY_IMPL(m2f, CPU, m) {
  m.impl("masked_attention", TORCH_BOX(&m2f::masked_attention));
  m.impl("masked_attention_backward", TORCH_BOX(&m2f::masked_attention_backward));
  m.impl("masked_attention_with_bias", TORCH_BOX(&m2f::masked_attention_with_bias));
  m.impl("masked_attention_with_bias_backward", TORCH_BOX(&m2f::masked_attention_with_bias_backward));
}
