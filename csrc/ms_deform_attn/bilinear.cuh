// Bilinear interpolation at a pixel coordinate: the four corners around it, each inside the image or absent.
#pragma once

#include "ms_deform_attn/launch.cuh"

namespace m2f {

template <typename T>
struct alignas(16) Quad {
  T at[4];
};

// Corners in the order (y0, x0), (y0, x1), (y1, x0), (y1, x1).
template <typename A>
struct Corners {
  Quad<int> position;  // y * width + x; -1 for a corner outside the image
  A fx, fy;            // the fractions of a pixel from (y0, x0)
  bool contributes;    // true if the coordinate lies in (-1, size) on both axes; false for NaN and infinity
};

template <typename A>
__device__ __forceinline__ Corners<A> find_corners(A x, A y, int height, int width) {
  Corners<A> out;
  out.contributes = x > A(-1) && x < static_cast<A>(width) && y > A(-1) && y < static_cast<A>(height);
  const A x_floor = out.contributes ? floor(x) : A(0);
  const A y_floor = out.contributes ? floor(y) : A(0);
  const int x0 = static_cast<int>(x_floor);
  const int y0 = static_cast<int>(y_floor);
  out.fx = out.contributes ? x - x_floor : A(0);
  out.fy = out.contributes ? y - y_floor : A(0);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int cx = x0 + (i & 1);
    const int cy = y0 + (i >> 1);
    // An unsigned comparison covers both ends: a negative coordinate is a large number.
    const bool inside = out.contributes && static_cast<unsigned>(cx) < static_cast<unsigned>(width) &&
                        static_cast<unsigned>(cy) < static_cast<unsigned>(height);
    out.position.at[i] = inside ? cy * width + cx : -1;
  }
  return out;
}

// Interpolation weights times `scale`. Absent corners get exactly 0, even if `scale` is not finite.
template <typename A>
__device__ __forceinline__ Quad<A> corner_weights(const Corners<A>& corners, A scale) {
  const A left = scale * (1 - corners.fx);
  const A right = scale * corners.fx;
  const Quad<A> weights{{left * (1 - corners.fy), right * (1 - corners.fy), left * corners.fy, right * corners.fy}};
  Quad<A> out;
#pragma unroll
  for (int i = 0; i < 4; ++i) out.at[i] = corners.position.at[i] >= 0 ? weights.at[i] : A(0);
  return out;
}

}  // namespace m2f
