// The baseline CPU kernels on fixed inputs, for comparing CPUs: built with each compiler, run (under an emulator
// if need be), and the numbers that come out compared. Needs no PyTorch.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "masked_attention/cpu_kernel.h"
#include "points/sample_cpu_kernel.h"

namespace {

uint32_t state = 1;

// Uniform in [-1, 1), the same everywhere.
float next() {
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(static_cast<int32_t>(state) >> 8) / (1 << 23);
}

std::vector<float> random(int64_t count) {
  std::vector<float> x(count);
  for (float& v : x) v = next();
  return x;
}

uint16_t bfloat16(float x) {
  union {
    float f;
    uint32_t u;
  } bits{x};
  return static_cast<uint16_t>((bits.u + 0x8000) >> 16);
}

struct Memory {
  explicit Memory(size_t size) : data(std::aligned_alloc(64, (size + 127) / 64 * 64)) {}
  ~Memory() { std::free(data); }
  void* data;
};

void print(const char* name, const std::vector<float>& x) {
  std::printf("%s", name);
  for (float v : x) std::printf(" %.9g", v);
  std::printf("\n");
}

void attention(int64_t q, int64_t s, int64_t d) {
  const int64_t heads = 2;
  auto query = random(heads * q * d), key = random(heads * s * d), value = random(heads * s * d);
  auto grad_output = random(heads * q * d);
  m2f::MaskedAttentionArgs args{};
  args.n = 1, args.h = heads, args.q = q, args.s = s, args.d = d, args.scale = 1 / std::sqrt(static_cast<double>(d));
  args.words = (s + 31) / 32;
  std::vector<int32_t> bits(q * args.words);
  std::vector<char> any(q, 0);
  for (int64_t i = 0; i < q; ++i)
    for (int64_t k = 0; k < s; ++k)
      if (i > 0 && next() > 0) bits[i * args.words + k / 32] |= static_cast<int32_t>(1u << (k % 32)), any[i] = 1;
  const auto rows = [&](std::vector<float>& x, int64_t length) {
    return m2f::Rows{x.data(), m2f::DType::kFloat32, {heads * length * d, length * d, d}};
  };
  std::vector<float> output(heads * q * d), sums(heads * q), gq(heads * q * d), gk(heads * s * d), gv(heads * s * d);
  args.query = rows(query, q), args.key = rows(key, s), args.value = rows(value, s), args.output = rows(output, q);
  args.bits = bits.data(), args.row_any = reinterpret_cast<const bool*>(any.data()), args.logsumexp = sums.data();
  args.parts = args.head_groups = 1;
  const auto& kernels = m2f::masked_attention_kernels_baseline();
  Memory forward(kernels.forward_scratch(args));
  kernels.forward(args, 0, 1, forward.data);
  print("attention", output);
  print("logsumexp", sums);
  args.grad_output = rows(grad_output, q), args.saved_output = rows(output, q), args.saved_logsumexp = sums.data();
  args.grad_query = rows(gq, q), args.grad_key = rows(gk, s), args.grad_value = rows(gv, s);
  Memory backward(kernels.backward_scratch(args));
  kernels.backward(args, 0, 1, backward.data);
  print("grad_query", gq);
  print("grad_key", gk);
  print("grad_value", gv);
}

void points(m2f::PixelType type) {
  const int64_t c = 3, h = 9, w = 7, k = 50;
  const auto pixels = random(c * h * w);
  std::vector<uint16_t> halves;
  for (float v : pixels) halves.push_back(bfloat16(v));
  auto coordinates = random(2 * k);
  for (float& v : coordinates) v = v * 0.6f + 0.5f;
  std::vector<float> samples(c * k);
  m2f::PointSampleArgs args{};
  args.n = 1, args.c = c, args.height = h, args.width = w, args.k = k, args.type = type, args.parts = 1;
  args.input = type == m2f::PixelType::kFloat32 ? static_cast<const void*>(pixels.data()) : halves.data();
  args.stride[0] = c * h * w, args.stride[1] = h * w;
  args.points = coordinates.data(), args.output = samples.data(), args.output_type = m2f::DType::kFloat32;
  const auto& kernels = m2f::point_sample_kernels_baseline();
  Memory scratch(kernels.sample_scratch(args));
  kernels.sample(args, 0, c, scratch.data);
  print("samples", samples);

  const int64_t row = 1;
  m2f::UncertainPointsArgs draw{};
  draw.m = 1, draw.planes = c, draw.height = h, draw.width = w, draw.logits = args.input, draw.type = type;
  draw.stride = h * w, draw.rows = &row, draw.seed = 0x123456789abcdef, draw.first_stream = 5;
  draw.candidates = 60, draw.keep = 15, draw.fresh = 5;
  std::vector<float> drawn(2 * 20);
  draw.points = drawn.data();
  Memory uncertain(kernels.uncertain_scratch(draw));
  kernels.uncertain(draw, 0, 1, uncertain.data);
  print("points", drawn);
}

}  // namespace

int main() {
  attention(5, 150, 32);
  attention(9, 33, 20);
  points(m2f::PixelType::kFloat32);
  points(m2f::PixelType::kBFloat16);
}
