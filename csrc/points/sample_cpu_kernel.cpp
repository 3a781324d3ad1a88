// Point sampling and the choice of uncertain points on CPU; compiled once per instruction set.
//
// Sampling many channels: indices and weights of the samples are computed once per image and used for one channel after
// the other. So all random reads fall into one plane, which fits L2: a stride-4 plane of a 1024 x 1024 image has
// 256 KiB, all 256 of them 64 MiB. The next plane is prefetched meanwhile, since hardware prefetchers do not follow
// random reads.
//
// Uncertain points: a mask's candidates are drawn, sampled and ranked within the cache. Radix selection on the bits of
// |logit| ranks them: three passes with a histogram, instead of a sort.

#include "points/sample_cpu_kernel.h"

#include <algorithm>

#include "cpu/variant.h"
#include "points/bilinear_simd.h"
#include "points/philox_simd.h"

namespace m2f {
namespace {

// ---------------------------------------------------------------- sampling
struct Prepared {
  SamplePoints* points;  // by vectors
  int64_t first, count;  // points of the part
};

int64_t part_size(const PointSampleArgs& args) { return (args.k + args.parts - 1) / args.parts; }

int64_t vectors(int64_t count) { return (count + kFloatLanes - 1) / kFloatLanes; }

size_t sample_scratch(const PointSampleArgs& args) {
  return static_cast<size_t>(vectors(part_size(args))) * sizeof(SamplePoints);
}

Prepared prepare(const PointSampleArgs& args, int64_t n, int64_t part, void* scratch) {
  const int64_t size = part_size(args);
  Prepared p{static_cast<SamplePoints*>(scratch), part * size, 0};
  p.count = args.k - p.first < size ? args.k - p.first : size;
  const float* points = args.points + (n * args.k + p.first) * 2;
  for (int64_t k = 0; k < p.count; k += kFloatLanes) {
    FloatVec x, y;
    load_points(points + 2 * k, p.count - k, x, y);
    p.points[k / kFloatLanes] = sample_points(x, y, args.height, args.width);
  }
  return p;
}

template <typename O>
M2F_INLINE void store_samples(O* out, int64_t count, FloatVec value) {
  if (count >= kFloatLanes)
    store(out, value);
  else
    store_first(out, static_cast<int>(count), value);
}

template <typename E, typename O>
void sample_channel(const PointSampleArgs& args, const Prepared& p, const E* plane, const E* next, O* out) {
  const int64_t size = args.height * args.width;
  const int64_t bytes = next ? size * static_cast<int64_t>(sizeof(E)) : 0;
  const int64_t steps = vectors(p.count);
  const int64_t ahead = (bytes / 64 + steps) / steps * 64;  // bytes of the next plane to fetch per step
  for (int64_t i = 0; i < steps; ++i) {
    for (int64_t byte = i * ahead; byte < (i + 1) * ahead && byte < bytes; byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(next) + byte, 0, 2);
    const FloatVec value = sample_plane(plane, size, p.points[i]);
    store_samples(out + i * kFloatLanes, p.count - i * kFloatLanes, value);
  }
}

template <typename E>
void sample_any(const PointSampleArgs& args, int64_t first, int64_t last, void* scratch) {
  Prepared p{nullptr, 0, 0};
  for (int64_t task = first; task < last; ++task) {
    const int64_t c = task % args.channels, part = task / args.channels % args.parts,
                  n = task / args.channels / args.parts;
    if (task == first || c == 0) p = prepare(args, n, part, scratch);
    if (p.count <= 0) continue;
    const E* plane = static_cast<const E*>(args.input) + n * args.stride[0] + c * args.stride[1];
    const E* next = task + 1 < last && c + 1 < args.channels ? plane + args.stride[1] : nullptr;
    const int64_t offset = (n * args.channels + c) * args.k + p.first;
    with_type<false>(args.output_type, [&](auto v) {
      sample_channel(args, p, plane, next, static_cast<decltype(v)*>(args.output) + offset);
    });
  }
}

void sample(const PointSampleArgs& args, int64_t first, int64_t last, void* scratch) {
  with_pixels({args.input, args.type, args.height, args.width}, [&](auto pixels) {
    sample_any<std::remove_const_t<std::remove_pointer_t<decltype(pixels)>>>(args, first, last, scratch);
  });
}

// ---------------------------------------------------------------- targets that are not masks
// Points [first, last) of a map. Its pixels are read once and compared with the id of each target.
template <typename E>
void sample_map(const TargetSampleArgs& args, const E* map, int64_t first, int64_t last) {
  const Plane& shape = args.targets[0].plane;
  const int64_t size = shape.height * shape.width;
  for (int64_t k = first; k < last; k += kFloatLanes) {
    FloatVec x, y;
    load_points(args.points + 2 * k, last - k, x, y);
    const SamplePoints at = sample_points(x, y, shape.height, shape.width);
    IdVec<E> a, b, c, d;
    gather_id_pair(map, size, at.index, at.step, a, b);
    gather_id_pair(map, size, at.index + at.down, at.step, c, d);
    for (int64_t t = 0; t < args.count; ++t) {
      const int64_t id = args.targets[t].id;
      const FloatVec value = weigh_corners(at, one_where(a, id), one_where(b, id), one_where(c, id), one_where(d, id));
      store_samples(args.output + t * args.k + k, last - k, value);
    }
  }
}

void sample_run_lengths(const TargetSampleArgs& args, int64_t first, int64_t last) {
  for (int64_t t = 0; t < args.count; ++t) {
    const Target& target = args.targets[t];
    const RunPixels runs{target.ends, target.count, target.run_height};
    for (int64_t k = first; k < last; k += kFloatLanes) {
      FloatVec x, y;
      load_points(args.points + 2 * k, last - k, x, y);
      const FloatVec value = sample_runs(runs, x, y, target.plane.height, target.plane.width);
      store_samples(args.output + t * args.k + k, last - k, value);
    }
  }
}

void sample_targets(const TargetSampleArgs& args, int64_t first, int64_t last) {
  const int64_t start = first * kPointsPerStretch, end = std::min(last * kPointsPerStretch, args.k);
  const Target& target = args.targets[0];
  if (target.kind == TargetKind::kRuns) return sample_run_lengths(args, start, end);
  with_map(target, [&](auto map) { sample_map(args, map.data, start, end); });
}

template <typename E>
void sample_backward_any(const PointSampleArgs& args, int64_t first, int64_t last, float* scratch) {
  const int64_t size = args.height * args.width;
  for (int64_t task = first; task < last; ++task) {
    E* out = static_cast<E*>(args.grad_input) + task * size;
    const E* grad = static_cast<const E*>(args.output) + task * args.k;
    float* plane = scratch;
    if constexpr (std::is_same_v<E, float>) plane = out;
    std::memset(plane, 0, static_cast<size_t>(size) * sizeof(float));
    const float* points = args.points + task / args.channels * args.k * 2;
    for (int64_t k = 0; k < args.k; k += kFloatLanes) {
      const int count = args.k - k < kFloatLanes ? static_cast<int>(args.k - k) : kFloatLanes;
      FloatVec x, y;
      load_points(points + 2 * k, args.k - k, x, y);
      const FloatVec g = count == kFloatLanes ? load(grad + k) : load_first(grad + k, count);
      scatter_plane(plane, sample_points(x, y, args.height, args.width), g, count);
    }
    if constexpr (!std::is_same_v<E, float>) store_run(out, size, plane);
  }
}

void sample_backward(const PointSampleArgs& args, int64_t first, int64_t last, float* scratch) {
  with_type<false>(args.output_type, [&](auto v) { sample_backward_any<decltype(v)>(args, first, last, scratch); });
}

// ---------------------------------------------------------------- uncertain points
constexpr int kBins = 2048;

struct Candidates {
  float *x, *y;
  uint32_t* key;  // bits of |logit| as an integer, which has the same order, plus 1; 0 for NaN
  uint32_t* bins;
};

int64_t padded_candidates(const UncertainPointsArgs& args) {
  return (args.candidates + 2 * kFloatLanes - 1) / (2 * kFloatLanes) * (2 * kFloatLanes);
}

size_t uncertain_scratch(const UncertainPointsArgs& args) {
  return static_cast<size_t>(padded_candidates(args)) * 3 * sizeof(float) + kBins * sizeof(uint32_t);
}

template <typename E>
void draw_candidates(const UncertainPointsArgs& args, const E* plane, uint32_t stream, const Candidates& found) {
  const int64_t size = args.height * args.width;
  for (int64_t k = 0; k < args.candidates; k += 2 * kFloatLanes) {
    FloatVec x[2], y[2];
    uniform_points(static_cast<uint32_t>(k / 2), stream, args.seed, x, y);
    for (int half = 0; half < 2; ++half) {
      const int64_t at = k + half * kFloatLanes;
      const FloatVec logit = sample_plane(plane, size, sample_points(x[half], y[half], args.height, args.width));
      const UInt32Vec bits = reinterpret_cast<UInt32Vec>(logit) & 0x7fffffffu;
      const UInt32Vec key = logit == logit ? bits + 1u : UInt32Vec{};
      store(found.x + at, x[half]);
      store(found.y + at, y[half]);
      std::memcpy(found.key + at, &key, sizeof(key));
    }
  }
}

// The largest key to keep, and how many keys equal to it.
struct Threshold {
  uint32_t key;
  int64_t equal;
};

Threshold select(const uint32_t* key, int64_t count, int64_t keep, uint32_t* bins) {
  constexpr int kShift[3] = {20, 10, 0}, kWidth[3] = {11, 10, 10};
  uint32_t prefix = 0;
  int64_t wanted = keep;  // the wanted rank among the keys that begin with `prefix`
  for (int pass = 0; pass < 3; ++pass) {
    const uint32_t mask = (1u << kWidth[pass]) - 1;
    std::memset(bins, 0, sizeof(uint32_t) << kWidth[pass]);
    if (pass == 0) {
      for (int64_t i = 0; i < count; ++i) ++bins[key[i] >> kShift[0]];
    } else {
      const int above = kShift[pass - 1];
      for (int64_t i = 0; i < count; ++i)
        if (key[i] >> above == prefix) ++bins[(key[i] >> kShift[pass]) & mask];
    }
    uint32_t bin = 0;
    while (static_cast<int64_t>(bins[bin]) < wanted) wanted -= bins[bin++];
    prefix = prefix << kWidth[pass] | bin;
  }
  return {prefix, wanted};
}

void keep_uncertain(const Candidates& from, int64_t count, int64_t keep, float* out) {
  if (keep == 0) return;
  const Threshold threshold = select(from.key, count, keep, from.bins);
  int64_t kept = 0, equal = threshold.equal;
  for (int64_t i = 0; i < count && kept < keep; ++i) {
    const bool tie = from.key[i] == threshold.key && equal > 0;
    // Writes every point and only advances past those that are kept: there is no branch to mispredict.
    out[2 * kept] = from.x[i];
    out[2 * kept + 1] = from.y[i];
    kept += from.key[i] < threshold.key || tie;
    equal -= tie;
  }
}

void draw_fresh(const UncertainPointsArgs& args, uint32_t stream, float* out) {
  const int64_t end = args.candidates + args.fresh;
  for (int64_t k = args.candidates / 2 * 2; k < end; k += 2 * kFloatLanes) {
    FloatVec x[2], y[2];
    uniform_points(static_cast<uint32_t>(k / 2), stream, args.seed, x, y);
    for (int i = 0; i < 2 * kFloatLanes; ++i) {
      const int64_t at = k + i - args.candidates;
      if (at < 0 || at >= args.fresh) continue;
      out[2 * at] = x[i / kFloatLanes][i % kFloatLanes];
      out[2 * at + 1] = y[i / kFloatLanes][i % kFloatLanes];
    }
  }
}

void uncertain(const UncertainPointsArgs& args, int64_t first, int64_t last, void* scratch) {
  const int64_t padded = padded_candidates(args);
  Candidates found;
  found.x = static_cast<float*>(scratch);
  found.y = found.x + padded;
  found.key = reinterpret_cast<uint32_t*>(found.y + padded);
  found.bins = found.key + padded;
  for (int64_t m = first; m < last; ++m) {
    const uint32_t stream = args.first_stream + static_cast<uint32_t>(m);
    float* out = args.points + m * (args.keep + args.fresh) * 2;
    if (args.keep > 0) {
      with_pixels({args.logits, args.type, args.height, args.width},
                  [&](auto pixels) { draw_candidates(args, pixels + args.rows[m] * args.stride, stream, found); });
    }
    keep_uncertain(found, args.candidates, args.keep, out);
    draw_fresh(args, stream, out + 2 * args.keep);
  }
}

}  // namespace

const PointSampleKernels& M2F_FOR_VARIANT(point_sample_kernels)() {
  static const PointSampleKernels kernels = {sample_scratch,    sample,   sample_targets, sample_backward,
                                             uncertain_scratch, uncertain};
  return kernels;
}

}  // namespace m2f
