// Matching cost and point loss on CPU, forward and backward; compiled once per instruction set.
//
// Matching cost: a task takes a block of queries and one stretch of points at a time. It computes softplus and sigmoid
// of the stretch once. They stay in L1, where both products with the targets read them. Logits are read once, and only
// the two costs are written.
//
// Point loss: a task takes one mask at a time. Logit and label of each point are sampled and summed up in registers.
// Probability and label are kept: backward computes the gradients from them, without exponentials, and adds them to the
// mask's plane. Each plane has one writer and a fixed order.

#include "points/loss_cpu_kernel.h"

#include "cpu/variant.h"
#include "points/bilinear_simd.h"

namespace m2f {
namespace {

// Sums over at most this many points are taken in float, lane by lane, and then added up in double.
constexpr int64_t kStretch = 1024;

constexpr float kLog2E = 1.4426950408889634f;

// sigmoid(x) and softplus(x) = log(1 + e^x), from one exponential of -|x|.
M2F_INLINE void sigmoid_softplus(FloatVec x, FloatVec& sigmoid, FloatVec& softplus) {
  const FloatVec magnitude = reinterpret_cast<FloatVec>(reinterpret_cast<UInt32Vec>(x) & 0x7fffffffu);
  const FloatVec e = exp2(magnitude * -kLog2E);
  // One division serves both quotients.
  const FloatVec one = 1.0f + e, two = 2.0f + e, quotient = 1.0f / (one * two);
  const FloatVec inverse = quotient * two;
  sigmoid = x < 0.0f ? e * inverse : inverse;
  // log(1 + e) = 2 artanh(e / (2 + e)), whose argument is at most 1/3.
  const FloatVec s = e * (quotient * one), s2 = s * s;
  FloatVec p = splat(2.0f / 15);
  p = fused(p, s2, splat(2.0f / 13));
  p = fused(p, s2, splat(2.0f / 11));
  p = fused(p, s2, splat(2.0f / 9));
  p = fused(p, s2, splat(2.0f / 7));
  p = fused(p, s2, splat(2.0f / 5));
  p = fused(p, s2, splat(2.0f / 3));
  p = fused(p, s2, splat(2.0f));
  const FloatVec positive = x < 0.0f ? FloatVec{} : x;  // NaN stays
  softplus = fused(p, s, positive);
}

M2F_INLINE double sum(FloatVec x) { return static_cast<double>(sum_lanes<float>(x)[0]); }

M2F_INLINE FloatVec first_lanes(FloatVec x, int64_t count) {
  if (count >= kFloatLanes) return x;
  for (int i = 0; i < kFloatLanes; ++i) x[i] = i < count ? x[i] : 0.0f;
  return x;
}

// ---------------------------------------------------------------- matching cost
constexpr int kTile = 4;  // queries by targets whose products are summed together, in registers

struct CostScratch {
  float *x, *sigmoid;           // [kQueriesPerTask][kStretch]
  float* labels;                // [kTile][kStretch], padded with zeros for targets and points beyond the end
  double *x_sum, *sigmoid_sum;  // [kQueriesPerTask][T], products with the targets
};

size_t cost_scratch(const MatchingCostArgs& args) {
  return (2 * kQueriesPerTask + kTile) * kStretch * sizeof(float) + 2 * kQueriesPerTask * args.t * sizeof(double);
}

// Multiplies kTile rows of x or sigmoid with kTile rows of labels, over `steps` vectors, and adds the first
// queries x targets products to `sums`.
M2F_INLINE void multiply_tile(const float* a, const float* const* labels, int64_t steps, int64_t queries,
                              int64_t targets, double* sums, int64_t t) {
  FloatVec total[kTile * kTile] = {};
  for (int64_t i = 0; i < steps; ++i) {
    FloatVec label[kTile];
    for (int j = 0; j < kTile; ++j) label[j] = load(labels[j] + i * kFloatLanes);
    for (int q = 0; q < kTile; ++q) {
      const FloatVec value = load(a + q * kStretch + i * kFloatLanes);
      for (int j = 0; j < kTile; ++j) total[q * kTile + j] = fused(value, label[j], total[q * kTile + j]);
    }
  }
  static_assert(kTile * kTile % kFloatLanes == 0, "whole vectors of sums");
  for (int i = 0; i < kTile * kTile; i += kFloatLanes) {
    const FloatVec each = sum_each<float>(total + i);
    for (int lane = 0; lane < kFloatLanes; ++lane) {
      const int q = (i + lane) / kTile, j = (i + lane) % kTile;
      if (q < queries && j < targets) sums[q * t + j] += static_cast<double>(each[lane]);
    }
  }
}

void cost_block(const MatchingCostArgs& args, int64_t block, const CostScratch& s) {
  const int64_t first = block * kQueriesPerTask;
  const int64_t queries = args.queries - first < kQueriesPerTask ? args.queries - first : kQueriesPerTask;
  double softplus_sum[kQueriesPerTask] = {}, sigmoid_sum[kQueriesPerTask] = {};
  std::memset(s.x_sum, 0, 2 * kQueriesPerTask * args.t * sizeof(double));
  if (queries < kQueriesPerTask) std::memset(s.x, 0, 2 * kQueriesPerTask * kStretch * sizeof(float));
  for (int64_t k = 0; k < args.k; k += kStretch) {
    const int64_t count = args.k - k < kStretch ? args.k - k : kStretch;
    const int64_t steps = (count + kFloatLanes - 1) / kFloatLanes;
    for (int64_t q = 0; q < queries; ++q) {
      const float* row = args.logits + (first + q) * args.k + k;
      FloatVec softplus_total{}, sigmoid_total{};
      for (int64_t i = 0; i < count; i += kFloatLanes) {
        const int64_t left = count - i;
        const FloatVec x = left >= kFloatLanes ? load(row + i) : load_first(row + i, static_cast<int>(left));
        FloatVec sigmoid, softplus;
        sigmoid_softplus(x, sigmoid, softplus);
        sigmoid = first_lanes(sigmoid, left);
        softplus_total += first_lanes(softplus, left);
        sigmoid_total += sigmoid;
        store(s.x + q * kStretch + i, x);
        store(s.sigmoid + q * kStretch + i, sigmoid);
      }
      softplus_sum[q] += sum(softplus_total);
      sigmoid_sum[q] += sum(sigmoid_total);
    }
    const bool whole = count % kFloatLanes == 0;
    for (int64_t t = 0; t < args.t; t += kTile) {
      const float* labels[kTile];
      const int64_t targets = args.t - t < kTile ? args.t - t : kTile;
      for (int64_t j = 0; j < kTile; ++j) {
        float* copy = s.labels + j * kStretch;
        const int64_t copied = j < targets ? count : 0;
        labels[j] = args.labels + (t + j) * args.k + k;
        if (whole && j < targets) continue;
        std::memcpy(copy, labels[j], static_cast<size_t>(copied) * sizeof(float));
        std::memset(copy + copied, 0, static_cast<size_t>(steps * kFloatLanes - copied) * sizeof(float));
        labels[j] = copy;
      }
      for (int64_t q = 0; q < queries; q += kTile) {
        const int64_t at = q * args.t + t;
        multiply_tile(s.x + q * kStretch, labels, steps, queries - q, targets, s.x_sum + at, args.t);
        multiply_tile(s.sigmoid + q * kStretch, labels, steps, queries - q, targets, s.sigmoid_sum + at, args.t);
      }
    }
  }
  for (int64_t q = 0; q < queries; ++q) {
    for (int64_t t = 0; t < args.t; ++t) {
      const int64_t at = q * args.t + t, out = (first + q) * args.t + t;
      args.cross_entropy[out] = static_cast<float>((softplus_sum[q] - s.x_sum[at]) / static_cast<double>(args.k));
      const double overlap = 2 * s.sigmoid_sum[at] + 1, total = sigmoid_sum[q] + args.label_sums[t] + 1;
      args.dice[out] = static_cast<float>(1 - overlap / total);
    }
  }
}

void cost(const MatchingCostArgs& args, int64_t first, int64_t last, void* scratch) {
  CostScratch s;
  s.x = static_cast<float*>(scratch);
  s.sigmoid = s.x + kQueriesPerTask * kStretch;
  s.labels = s.sigmoid + kQueriesPerTask * kStretch;
  s.x_sum = reinterpret_cast<double*>(s.labels + kTile * kStretch);
  s.sigmoid_sum = s.x_sum + kQueriesPerTask * args.t;
  for (int64_t block = first; block < last; ++block) cost_block(args, block, s);
}

// ---------------------------------------------------------------- point loss
struct LossSums {
  double cross_entropy, probability, label, both;
};

// `target` points to pixels, or is MapPixels or RunPixels.
template <typename E, typename Pixels>
LossSums sample_losses(const PointLossArgs& args, const E* plane, Pixels target, const Plane& shape, int64_t m) {
  const float* points = args.points + m * args.k * 2;
  float* probability = args.probability + m * args.k;
  float* labels = args.labels + m * args.k;
  const int64_t size = args.height * args.width, target_size = shape.height * shape.width;
  const bool same = shape.height == args.height && shape.width == args.width;
  LossSums sums{};
  for (int64_t k = 0; k < args.k; k += kStretch) {
    const int64_t end = args.k - k < kStretch ? args.k : k + kStretch;
    FloatVec cross_entropy_total{}, probability_total{}, label_total{}, both_total{};
    for (int64_t i = k; i < end; i += kFloatLanes) {
      const int64_t left = args.k - i;
      FloatVec x, y;
      load_points(points + 2 * i, left, x, y);
      const SamplePoints at = sample_points(x, y, args.height, args.width);
      const FloatVec logit = sample_plane(plane, size, at);
      FloatVec label;
      if constexpr (std::is_same_v<Pixels, RunPixels>) {
        label = sample_runs(target, x, y, shape.height, shape.width);
      } else {
        label = sample_plane(target, target_size, same ? at : sample_points(x, y, shape.height, shape.width));
      }
      FloatVec s, softplus;
      sigmoid_softplus(logit, s, softplus);
      FloatVec terms[4] = {softplus - logit * label, s, label, s * label};
      if (left < kFloatLanes) {
        for (FloatVec& term : terms) term = first_lanes(term, left);
        store_first(probability + i, static_cast<int>(left), s);
        store_first(labels + i, static_cast<int>(left), label);
      } else {
        store(probability + i, s);
        store(labels + i, label);
      }
      cross_entropy_total += terms[0];
      probability_total += terms[1];
      label_total += terms[2];
      both_total += terms[3];
    }
    sums.cross_entropy += sum(cross_entropy_total);
    sums.probability += sum(probability_total);
    sums.label += sum(label_total);
    sums.both += sum(both_total);
  }
  return sums;
}

void loss(const PointLossArgs& args, int64_t first, int64_t last) {
  for (int64_t m = first; m < last; ++m) {
    const Target& target = args.targets[m];
    LossSums sums{};
    with_pixels({args.logits, args.type, args.height, args.width}, [&](auto logits) {
      with_target(target, [&](auto labels) {
        sums = sample_losses(args, logits + args.rows[m] * args.stride, labels, target.plane, m);
      });
    });
    args.cross_entropy[m] = static_cast<float>(sums.cross_entropy / static_cast<double>(args.k));
    args.dice[m] = static_cast<float>(1 - (2 * sums.both + 1) / (sums.probability + sums.label + 1));
  }
}

// d cross_entropy / dx = (s - t) / K
// d dice / dx = s (1 - s) (N / D - 2 t) / D, with N = 2 sum(s t) + 1 and D = sum(s) + sum(t) + 1
void scatter_mask(const PointLossBackwardArgs& args, int64_t m, float* plane) {
  const float* points = args.points + m * args.k * 2;
  const float* probability = args.probability + m * args.k;
  const float* labels = args.labels + m * args.k;
  double both = 0, total = 0;
  for (int64_t k = 0; k < args.k; k += kStretch) {
    const int64_t end = args.k - k < kStretch ? args.k : k + kStretch;
    FloatVec both_total{}, sum_total{};
    for (int64_t i = k; i < end; i += kFloatLanes) {
      const int count = args.k - i < kFloatLanes ? static_cast<int>(args.k - i) : kFloatLanes;
      const FloatVec s = count == kFloatLanes ? load(probability + i) : load_first(probability + i, count);
      const FloatVec t = count == kFloatLanes ? load(labels + i) : load_first(labels + i, count);
      both_total = fused(s, t, both_total);
      sum_total += s + t;
    }
    both += sum(both_total);
    total += sum(sum_total);
  }
  const double overlap = 2 * both + 1, denominator = total + 1;
  const float ratio = static_cast<float>(overlap / denominator);
  const float dice_scale = static_cast<float>(args.grad_dice[m] / denominator);
  const float entropy_scale = static_cast<float>(args.grad_cross_entropy[m] / static_cast<double>(args.k));
  for (int64_t i = 0; i < args.k; i += kFloatLanes) {
    const int count = args.k - i < kFloatLanes ? static_cast<int>(args.k - i) : kFloatLanes;
    const FloatVec s = count == kFloatLanes ? load(probability + i) : load_first(probability + i, count);
    const FloatVec t = count == kFloatLanes ? load(labels + i) : load_first(labels + i, count);
    const FloatVec slope = s * (1.0f - s) * dice_scale;
    const FloatVec gradient = fused(slope, ratio - 2.0f * t, (s - t) * entropy_scale);
    FloatVec x, y;
    load_points(points + 2 * i, args.k - i, x, y);
    scatter_plane(plane, sample_points(x, y, args.height, args.width), gradient, count);
  }
}

void loss_backward(const PointLossBackwardArgs& args, int64_t first, int64_t last) {
  const int64_t size = args.height * args.width;
  for (int64_t p = first; p < last; ++p) {
    float* plane = args.grad_logits + p * size;
    std::memset(plane, 0, static_cast<size_t>(size) * sizeof(float));
    for (int64_t i = args.start[p]; i < args.start[p + 1]; ++i) scatter_mask(args, args.order[i], plane);
  }
}

}  // namespace

const PointLossKernels& M2F_FOR_VARIANT(point_loss_kernels)() {
  static const PointLossKernels kernels = {cost_scratch, cost, loss, loss_backward};
  return kernels;
}

}  // namespace m2f
