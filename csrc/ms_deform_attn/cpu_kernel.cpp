// Multi-scale deformable attention on CPU, forward and backward; compiled once per instruction set.
//
// One task is one head of one image, or a part of its queries. Nearly all of its time goes into gathering: K samples
// per query, each of four rows of D channels. Three things make gathers cheap:
//   - The head's value is packed once into a *panel*: its pixels are adjacent instead of H*D elements apart, and zeros
//     frame each level. A head then fits the caches: 21504 pixels x 32 channels x 4 bytes = 2.75 MB, instead of cache
//     lines spread over 22 MB. Neighbouring pixels share pages. No corner needs a bounds check: the frame supplies the
//     zeros, and the index of a sample that contributes nothing points into the frame.
//   - All K samples of a query are prepared at once, one per vector lane: floor, fractions, corner weights, panel
//   index.
//     Only broadcasts and multiply-adds along D are left in the gather loop.
//   - In an encoder the queries are pixels themselves. They are visited in 2-D tiles, whose samples share L1 and L2.
// In a decoder there are too few queries to pay for packing. Corners are then addressed in place, with bounds checks.
//
// Backward visits the queries in the same order. The dot products of the output gradient with the four corners stay
// vectors, which a merging tree reduces together. The value gradient is added into a panel of the same layout that
// belongs to this task alone, and is copied out at the end. So there are no atomics and no serial section, and every
// run gives the same bits.

#include "ms_deform_attn/cpu_kernel.h"

#include "cpu/simd.h"
#include "cpu/variant.h"
#include "ms_deform_attn/cpu_samples.h"

namespace m2f {
namespace {

// ---------------------------------------------------------------- addressing the four corners
// In the panel one index gives all four corners.
template <typename V>
struct PackedCorners {
  V* panel;
  template <typename T>
  M2F_INLINE void operator()(const Samples<T>& s, int64_t k, int64_t d, V* out[4]) const {
    V* top = panel + static_cast<int64_t>(s.pixel[k]) * d;
    V* bottom = top + static_cast<int64_t>(s.row[k]) * d;
    out[0] = top;
    out[1] = top + d;
    out[2] = bottom;
    out[3] = bottom + d;
  }
};

// In place: the address of a corner outside the level is `outside`, a row of zeros whose writes are discarded.
template <typename V>
struct DirectCorners {
  V* origin;  // value of this image and head
  V* outside;
  const Levels* levels;
  int64_t stride;
  template <typename T>
  M2F_INLINE void operator()(const Samples<T>& s, int64_t k, int64_t, V* out[4]) const {
    const int l = s.level[k];
    const int64_t width = levels->width[l], height = levels->height[l];
    const int64_t x = s.x0[k], y = s.y0[k];
    const bool inside = s.contributes[k] != 0;
    const bool left = inside && x >= 0, right = inside && x + 1 < width;
    const bool top = y >= 0, bottom = y + 1 < height;
    V* p = origin + (levels->start[l] + y * width + x) * stride;
    out[0] = left && top ? p : outside;
    out[1] = right && top ? p + stride : outside;
    out[2] = left && bottom ? p + width * stride : outside;
    out[3] = right && bottom ? p + (width + 1) * stride : outside;
  }
};

// With few queries the rows are in no cache. Prefetch all rows of a query before the first is used.
template <typename T, typename V>
M2F_INLINE void prefetch_corners(const Samples<T>& s, const DirectCorners<V>& corners, int64_t d) {
  for (int64_t k = 0; k < s.k; ++k) {
    V* p[4];
    corners(s, k, d, p);
    for (V* corner : p)
      for (int64_t byte = 0; byte < d * static_cast<int64_t>(sizeof(V)); byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(corner) + byte);
  }
}

template <typename T, typename V>
M2F_INLINE void prefetch_corners(const Samples<T>&, const PackedCorners<V>&, int64_t) {}

// ---------------------------------------------------------------- gather and scatter of kBlock vectors of channels
// Inlined, so that constant channel counts become immediate offsets of corner addresses. The samples are copied, so
// that the compiler need not reload their pointers after a store.
template <int kBlock, typename V, typename T, typename Corners, typename Channels>
M2F_INLINE void gather(const Samples<T>& samples, const Corners& corners, Channels d, int64_t channel, Vec<T>* out) {
  const Samples<T> s = samples;
  Vec<T> upper[kBlock] = {}, lower[kBlock] = {};  // two chains of additions: half the latency
  for (int64_t k = 0; k < s.k; ++k) {
    V* p[4];
    corners(s, k, d, p);
    const Vec<T> w0 = splat(s.corner[0][k]), w1 = splat(s.corner[1][k]);
    const Vec<T> w2 = splat(s.corner[2][k]), w3 = splat(s.corner[3][k]);
    Vec<T> value[4][kBlock];
    for (int corner = 0; corner < 4; ++corner) load_block<kBlock>(p[corner] + channel, value[corner]);
    for (int v = 0; v < kBlock; ++v) {
      upper[v] += w0 * value[0][v];
      lower[v] += w2 * value[2][v];
      upper[v] += w1 * value[1][v];
      lower[v] += w3 * value[3][v];
    }
  }
  for (int v = 0; v < kBlock; ++v) out[v] = upper[v] + lower[v];
}

// Adds `grad` to the value gradient, and stores the products of `grad` with the corner values in s.partial.
template <int kBlock, bool kScatter, typename V, typename T, typename Corners, typename GradCorners, typename Channels>
M2F_INLINE void scatter(const Samples<T>& samples, const Corners& corners, const GradCorners& grad_corners, Channels d,
                        int64_t channel, const V* grad_row) {
  const Samples<T> s = samples;
  Vec<T> grad[kBlock];
  load_block<kBlock>(grad_row + channel, grad);
  for (int64_t k = 0; k < s.k; ++k) {
    V* p[4];
    corners(s, k, d, p);
    T* g[4];
    if constexpr (kScatter) grad_corners(s, k, d, g);
    for (int corner = 0; corner < 4; ++corner) {
      Vec<T>* partial = s.partial + corner * s.padded + k;
      Vec<T> product = channel == 0 ? Vec<T>{} : *partial;
      Vec<T> value[kBlock];
      load_block<kBlock>(p[corner] + channel, value);
      for (int v = 0; v < kBlock; ++v) product += grad[v] * value[v];
      *partial = product;
      if constexpr (kScatter) {
        const Vec<T> weight = splat(s.corner[corner][k]);
        for (int v = 0; v < kBlock; ++v) {
          T* target = g[corner] + channel + v * kLanes<T>;
          store(target, load(target) + weight * grad[v]);
        }
      }
    }
  }
}

// Calls f(block, channel) over all channels, in blocks of up to four vectors; d is a whole number of vectors.
template <typename T, typename Channels, typename F>
M2F_INLINE void for_each_block(Channels d, F&& f) {
  int64_t channel = 0;
  for (; channel + 4 * kLanes<T> <= d; channel += 4 * kLanes<T>) f(std::integral_constant<int, 4>{}, channel);
  for (; channel + 2 * kLanes<T> <= d; channel += 2 * kLanes<T>) f(std::integral_constant<int, 2>{}, channel);
  for (; channel < d; channel += kLanes<T>) f(std::integral_constant<int, 1>{}, channel);
}

// The common widths as compile-time constants, so that corner addresses become immediate offsets.
template <typename F>
inline void with_constant_channels(int64_t d, F&& f) {
  switch (d) {
    case 16: return f(std::integral_constant<int64_t, 16>{});
    case 32: return f(std::integral_constant<int64_t, 32>{});
    case 64: return f(std::integral_constant<int64_t, 64>{});
    default: return f(d);
  }
}

// Prefetches locations and weights. A head's rows lie H rows apart and are visited in tiles, which hardware prefetchers
// do not follow. Without this, forward waits for them two thirds of its time (39 ms instead of 13 on one thread).
constexpr int64_t kPrefetchQueries = 8;

// Must be inlined: GCC regards a function that only prefetches as one without effect, and removes calls to it.
M2F_INLINE void prefetch_row(const Rows& rows, int64_t n, int64_t q, int64_t h, int64_t count) {
  const int64_t size = element_size(rows.dtype);
  const char* p = static_cast<const char*>(rows.data) + rows.offset(n, q, h) * size;
  for (int64_t byte = 0; byte < count * size + 63; byte += 64) __builtin_prefetch(p + byte);
}

template <typename F>
inline void for_each_query(const MSDeformAttnArgs& args, int64_t n, int64_t h, int64_t part, F&& f) {
  const int64_t first = args.queries * part / args.parts, last = args.queries * (part + 1) / args.parts;
  const auto query = [&](int64_t i) { return args.order ? static_cast<int64_t>(args.order[i]) : i; };
  for (int64_t i = first; i < last; ++i) {
    if (i + kPrefetchQueries < last) {
      const int64_t ahead = query(i + kPrefetchQueries);
      prefetch_row(args.locations, n, ahead, h, 2 * args.levels.points_total);
      prefetch_row(args.weights, n, ahead, h, args.levels.points_total);
      if (args.from_offsets) prefetch_row(args.reference, n, ahead, 0, args.levels.count * args.reference_dim);
      if (args.output.data) prefetch_row(args.output, n, ahead, h, args.channels);
      if (args.grad_output.data) prefetch_row(args.grad_output, n, ahead, h, args.channels);
      if (args.needs_sampling) {
        prefetch_row(args.grad_locations, n, ahead, h, 2 * args.levels.points_total);
        prefetch_row(args.grad_weights, n, ahead, h, args.levels.points_total);
      }
    }
    f(query(i));
  }
}

// ---------------------------------------------------------------- forward
template <typename V>
size_t forward_layout(const MSDeformAttnArgs& args, Pieces& memory, Samples<Arithmetic<V>>& s, V*& row, V*& panel) {
  using T = Arithmetic<V>;
  const Panel shape = make_panel<T>(args);
  s = take_samples<T>(args, memory, false);
  row = memory.take<V>(shape.d);
  panel = memory.take<V>(args.packed ? shape.pixels * shape.d : shape.d);
  return memory.used;
}

template <typename V>
void forward(const MSDeformAttnArgs& args, int64_t first_task, int64_t last_task, void* scratch) {
  using T = Arithmetic<V>;
  Pieces memory{static_cast<char*>(scratch)};
  Samples<T> s;
  V *row, *panel;
  forward_layout<V>(args, memory, s, row, panel);
  const Panel shape = make_panel<T>(args);
  set_constants(args, shape, s);
  if (!args.packed) std::memset(panel, 0, shape.d * sizeof(V));
  V* output = static_cast<V*>(args.output.data);
  int64_t packed_head = -1;
  for (int64_t task = first_task; task < last_task; ++task) {
    const int64_t head = task / args.parts, n = head / args.heads, h = head % args.heads;
    if (args.packed && head != packed_head) {
      pack_value<V>(args, shape, n, h, panel);
      packed_head = head;
    }
    const auto walk = [&](const auto& corners) {
      with_constant_channels(shape.d, [&](auto d) {
        for_each_query(args, n, h, task % args.parts, [&](int64_t q) {
          if (args.from_offsets) load_reference(args, n, q, s);
          prepare(args, n, q, h, s);
          prefetch_corners(s, corners, d);
          V* out = output + args.output.offset(n, q, h);
          V* whole = args.channels == shape.d ? out : row;
          for_each_block<T>(d, [&](auto block, int64_t channel) {
            Vec<T> sum[block];
            gather<block, V>(s, corners, d, channel, sum);
            store_block<block>(whole + channel, sum);
          });
          if (whole != out) std::memcpy(out, row, args.channels * sizeof(V));
        });
      });
    };
    if (args.packed) {
      walk(PackedCorners<V>{panel});
    } else {
      V* origin = static_cast<V*>(args.value.data) + args.value.offset(n, 0, h);
      walk(DirectCorners<V>{origin, panel, &args.levels, args.value.stride[1]});
    }
  }
}

// ---------------------------------------------------------------- backward
template <typename V>
struct BackwardMemory {
  Samples<Arithmetic<V>> samples;
  V* panel;                   // value
  Arithmetic<V>* grad_panel;  // its gradient; null where it lives elsewhere
  V* row;                     // output gradient of the current query, padded to whole vectors
  Arithmetic<V>*out_xy, *out_weight;

  size_t layout(const MSDeformAttnArgs& args, Pieces& memory) {
    using T = Arithmetic<V>;
    const Panel shape = make_panel<T>(args);
    samples = take_samples<T>(args, memory, true);
    row = memory.take<V>(shape.d);
    out_xy = memory.take<T>(2 * samples.padded);
    out_weight = memory.take<T>(samples.padded);
    panel = memory.take<V>(args.packed ? shape.pixels * shape.d : shape.d);
    const bool own_grad = args.packed && args.parts == 1 && args.needs_value;
    grad_panel = memory.take<T>(own_grad ? shape.pixels * shape.d : shape.d);
    return memory.used;
  }
};

// Gradients of locations (in pixels) and weights from the four dot products.
template <typename T>
inline void finish_samples(Samples<T>& s) {
  for (int64_t k = 0; k < s.padded; k += kLanes<T>) {
    const IntVec<T> inside = load_int<T>(s.contributes + k);
    Vec<T> dot[4];
    for (int corner = 0; corner < 4; ++corner) dot[corner] = sum_each<T>(s.partial + corner * s.padded + k);
    const Vec<T> fx = load(s.fx + k), fy = load(s.fy + k), weight = load(s.weight + k);
    const Vec<T> upper = dot[0] + fx * (dot[1] - dot[0]), lower = dot[2] + fx * (dot[3] - dot[2]);
    const Vec<T> across = (T(1) - fy) * (dot[1] - dot[0]) + fy * (dot[3] - dot[2]);
    store(s.grad_weight + k, select<T>(inside, (T(1) - fy) * upper + fy * lower, Vec<T>{}));
    store(s.grad_x + k, select<T>(inside, weight * across, Vec<T>{}));
    store(s.grad_y + k, select<T>(inside, weight * (lower - upper), Vec<T>{}));
  }
}

// Applies the chain rule from pixels and weights to the tensors that were passed in, and stores the gradients.
template <typename V, typename T = Arithmetic<V>>
inline void store_gradients(const MSDeformAttnArgs& args, int64_t n, int64_t q, int64_t h, BackwardMemory<V>& m) {
  Samples<T>& s = m.samples;
  const T* grad_weight = s.grad_weight;
  if (args.from_offsets) {
    Vec<T> mean{};
    for (int64_t k = 0; k < s.padded; k += kLanes<T>) mean += load(s.probability + k) * load(s.grad_weight + k);
    const Vec<T> expected = sum_lanes<T>(mean);
    for (int64_t k = 0; k < s.padded; k += kLanes<T>)
      store(m.out_weight + k, load(s.probability + k) * (load(s.grad_weight + k) - expected));
    grad_weight = m.out_weight;
    if (args.grad_reference) {
      T* out = static_cast<T*>(args.grad_reference) +
               ((n * args.heads + h) * args.queries + q) * args.levels.count * args.reference_dim;
      int64_t k = 0;
      for (int l = 0; l < args.levels.count; ++l, out += args.reference_dim) {
        T sum[4] = {};
        for (int p = 0; p < args.levels.points_per_level[l]; ++p, ++k) {
          const T gx = s.grad_x[k] * s.width[k], gy = s.grad_y[k] * s.height[k];
          const T unit = s.inverse_count[k] * static_cast<T>(args.offset_scale);
          sum[0] += gx;
          sum[1] += gy;
          // A sample that does not contribute may have an infinite offset, and 0 * infinity would be NaN.
          if (!s.contributes[k]) continue;
          sum[2] += gx * s.raw_xy[2 * k] * unit;
          sum[3] += gy * s.raw_xy[2 * k + 1] * unit;
        }
        for (int c = 0; c < args.reference_dim; ++c) out[c] = sum[c];
      }
    }
  }
  if (!args.needs_sampling) return;
  for (int64_t k = 0; k < s.padded; k += kLanes<T>) {
    Vec<T> gx = load(s.grad_x + k), gy = load(s.grad_y + k);
    if (!args.from_offsets) {
      gx *= load(s.width + k);
      gy *= load(s.height + k);
    } else if (args.reference_dim == 4) {
      const Vec<T> unit = load(s.inverse_count + k) * static_cast<T>(args.offset_scale);
      gx *= load(s.width + k) * unit * load(s.reference + 2 * s.padded + k);
      gy *= load(s.height + k) * unit * load(s.reference + 3 * s.padded + k);
      const IntVec<T> inside = load_int<T>(s.contributes + k);
      gx = select<T>(inside, gx, Vec<T>{});
      gy = select<T>(inside, gy, Vec<T>{});
    }
    store(m.out_xy + 2 * k, interleave<T, 0>(gx, gy));
    store(m.out_xy + 2 * k + kLanes<T>, interleave<T, 1>(gx, gy));
  }
  store_run(args.grad_locations.data, args.grad_locations.dtype, args.grad_locations.offset(n, q, h), 2 * s.k,
            m.out_xy);
  store_run(args.grad_weights.data, args.grad_weights.dtype, args.grad_weights.offset(n, q, h), s.k, grad_weight);
}

// Sums rows [first, last) of one level of one head's gradient over `parts` panels, into grad_value.
template <typename V, typename T = Arithmetic<V>>
void unpack_rows(const MSDeformAttnArgs& args, const Panel& shape, const T* panels, int64_t n, int64_t h, int l,
                 int64_t first, int64_t last, V* row) {
  const int64_t width = args.levels.width[l], panel_size = shape.pixels * shape.d;
  for (int64_t y = first; y < last; ++y) {
    const T* source = panels + (shape.level[l].first + (y + 2) * shape.level[l].row + 1) * shape.d;
    V* out = static_cast<V*>(args.grad_value.data) + args.grad_value.offset(n, args.levels.start[l] + y * width, h);
    for (int64_t x = 0; x < width; ++x, source += shape.d, out += args.grad_value.stride[1]) {
      V* whole = args.channels == shape.d ? out : row;
      for_each_block<T>(shape.d, [&](auto block, int64_t channel) {
        Vec<T> sum[block];
        for (int v = 0; v < block; ++v) {
          const T* p = source + channel + v * kLanes<T>;
          sum[v] = load(p);
          for (int64_t part = 1; part < args.parts; ++part) sum[v] += load(p + part * panel_size);
        }
        store_block<block>(whole + channel, sum);
      });
      if (whole != out) std::memcpy(out, row, args.channels * sizeof(V));
    }
  }
}

template <typename V>
void backward(const MSDeformAttnArgs& args, int64_t first_task, int64_t last_task, void* scratch) {
  using T = Arithmetic<V>;
  Pieces memory{static_cast<char*>(scratch)};
  BackwardMemory<V> m;
  m.layout(args, memory);
  const Panel shape = make_panel<T>(args);
  Samples<T>& s = m.samples;
  set_constants(args, shape, s);
  std::memset(m.row, 0, shape.d * sizeof(V));
  std::memset(static_cast<void*>(s.partial), 0, 4 * s.padded * sizeof(Vec<T>));
  if (!args.packed) std::memset(m.panel, 0, shape.d * sizeof(V));
  int64_t packed_head = -1;
  for (int64_t task = first_task; task < last_task; ++task) {
    const int64_t head = task / args.parts, n = head / args.heads, h = head % args.heads;
    T* grad_panel = m.grad_panel;
    if (args.packed) {
      if (head != packed_head) pack_value<V>(args, shape, n, h, m.panel);
      packed_head = head;
      if (args.parts > 1) grad_panel = static_cast<T*>(args.grad_panels) + task * shape.pixels * shape.d;
      if (args.needs_value) std::memset(grad_panel, 0, shape.pixels * shape.d * sizeof(T));
    } else if (args.needs_value) {
      for (int64_t position = 0; position < args.positions; ++position)
        std::memset(static_cast<V*>(args.grad_value.data) + args.grad_value.offset(n, position, h), 0,
                    args.channels * sizeof(V));
    }
    const auto walk = [&](auto kScatter, const auto& corners, const auto& grad_corners) {
      with_constant_channels(shape.d, [&](auto d) {
        for_each_query(args, n, h, task % args.parts, [&](int64_t q) {
          if (args.from_offsets) load_reference(args, n, q, s);
          prepare(args, n, q, h, s);
          prefetch_corners(s, corners, d);
          const V* grad = static_cast<const V*>(args.grad_output.data) + args.grad_output.offset(n, q, h);
          if (args.channels != shape.d)
            grad = static_cast<const V*>(std::memcpy(m.row, grad, args.channels * sizeof(V)));
          for_each_block<T>(d, [&](auto block, int64_t channel) {
            scatter<block, kScatter, V>(s, corners, grad_corners, d, channel, grad);
          });
          finish_samples(s);
          store_gradients<V>(args, n, q, h, m);
        });
      });
    };
    const auto walk_either = [&](const auto& corners, const auto& grad_corners) {
      if (args.needs_value) {
        walk(std::true_type{}, corners, grad_corners);
      } else {
        walk(std::false_type{}, corners, grad_corners);
      }
    };
    if (args.packed) {
      walk_either(PackedCorners<V>{m.panel}, PackedCorners<T>{grad_panel});
      if (args.needs_value && args.parts == 1)
        for (int l = 0; l < args.levels.count; ++l)
          unpack_rows<V>(args, shape, grad_panel, n, h, l, 0, args.levels.height[l], m.row);
    } else if constexpr (std::is_same_v<V, T>) {
      V* origin = static_cast<V*>(args.value.data) + args.value.offset(n, 0, h);
      V* grad_origin = static_cast<V*>(args.grad_value.data);
      if (args.needs_value) grad_origin += args.grad_value.offset(n, 0, h);
      // Additions to corners outside the level go to m.grad_panel, which is not read.
      walk_either(DirectCorners<V>{origin, m.panel, &args.levels, args.value.stride[1]},
                  DirectCorners<T>{grad_origin, m.grad_panel, &args.levels, args.grad_value.stride[1]});
    }
  }
}

template <typename V>
void combine_parts(const MSDeformAttnArgs& args, int64_t first_task, int64_t last_task, void* scratch) {
  using T = Arithmetic<V>;
  const Panel shape = make_panel<T>(args);
  int64_t rows = 0;
  for (int l = 0; l < args.levels.count; ++l) rows += args.levels.height[l];
  for (int64_t task = first_task; task < last_task; ++task) {
    const int64_t head = task / rows;
    int64_t y = task % rows;
    int l = 0;
    for (; y >= args.levels.height[l]; ++l) y -= args.levels.height[l];
    const T* panels = static_cast<const T*>(args.grad_panels) + head * args.parts * shape.pixels * shape.d;
    unpack_rows<V>(args, shape, panels, head / args.heads, head % args.heads, l, y, y + 1, static_cast<V*>(scratch));
  }
}

// ---------------------------------------------------------------- dispatch over the element type of value
size_t forward_scratch(const MSDeformAttnArgs& args) {
  return with_type(args.value.dtype, [&](auto v) {
    using V = decltype(v);
    Pieces measure{nullptr};
    Samples<Arithmetic<V>> s;
    V *row, *panel;
    return forward_layout<V>(args, measure, s, row, panel);
  });
}

void forward_any(const MSDeformAttnArgs& args, int64_t first_task, int64_t last_task, void* scratch) {
  with_type(args.value.dtype, [&](auto v) { forward<decltype(v)>(args, first_task, last_task, scratch); });
}

size_t backward_scratch(const MSDeformAttnArgs& args) {
  return with_type(args.value.dtype, [&](auto v) {
    Pieces measure{nullptr};
    return BackwardMemory<decltype(v)>{}.layout(args, measure);
  });
}

void backward_any(const MSDeformAttnArgs& args, int64_t first_task, int64_t last_task, void* scratch) {
  with_type(args.value.dtype, [&](auto v) { backward<decltype(v)>(args, first_task, last_task, scratch); });
}

size_t grad_panel(const MSDeformAttnArgs& args) {
  return with_type(args.value.dtype, [&](auto v) {
    using T = Arithmetic<decltype(v)>;
    const Panel shape = make_panel<T>(args);
    return static_cast<size_t>(shape.pixels * shape.d) * sizeof(T);
  });
}

void combine_any(const MSDeformAttnArgs& args, int64_t first_task, int64_t last_task, void* scratch) {
  with_type(args.value.dtype, [&](auto v) { combine_parts<decltype(v)>(args, first_task, last_task, scratch); });
}

}  // namespace

const MSDeformAttnKernels& M2F_FOR_VARIANT(ms_deform_attn_kernels)() {
  static const MSDeformAttnKernels kernels = {kVectorBytes, forward_scratch, forward_any, backward_scratch,
                                              backward_any, grad_panel,      combine_any};
  return kernels;
}

}  // namespace m2f
