// The CUDA kernels, compiled for the host by cuda_shim.h, as functions of NumPy arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ms_deform_attn/cuda_kernels.cu"

namespace py = pybind11;

namespace {

// An array, and the element type that its bytes stand for: NumPy has no bfloat16.
using Array = std::pair<py::array, std::string>;

m2f::DType dtype_of(const std::string& name) {
  if (name == "float64") return m2f::DType::kFloat64;
  if (name == "float32") return m2f::DType::kFloat32;
  if (name == "bfloat16") return m2f::DType::kBFloat16;
  if (name == "float16") return m2f::DType::kFloat16;
  throw std::invalid_argument("dtype: " + name);
}

// Lets kernels access the bytes that an array spans.
void* allow(const py::array& array) {
  auto* data = static_cast<unsigned char*>(const_cast<void*>(array.data()));
  int64_t last = array.itemsize();
  for (py::ssize_t i = 0; i < array.ndim(); ++i) {
    if (array.shape(i) == 0) return data;
    last += array.strides(i) * (array.shape(i) - 1);
  }
  const auto first = reinterpret_cast<uintptr_t>(data);
  m2f_shim::machine().buffers.push_back({first, first + static_cast<uintptr_t>(last)});
  return data;
}

int64_t stride_of(const py::array& array, int axis) {
  return array.shape(axis) > 1 ? array.strides(axis) / array.itemsize() : 0;
}

m2f::Strided strided(const Array& x) {
  return {allow(x.first),        dtype_of(x.second),   false, stride_of(x.first, 0), stride_of(x.first, 1),
          stride_of(x.first, 2), stride_of(x.first, 3)};
}

struct Problem {
  m2f::DeformAttnArgs args{};
  m2f::DeviceTraits device{};

  // levels: 3L integers, or with `on_device` the same numbers as the kernels would find them in device memory.
  Problem(const Array& value, const std::vector<int64_t>& levels, bool on_device,
          const std::vector<int>& points_per_level, const Array& points, const Array& weights,
          const std::optional<Array>& reference, double offset_scale, int architecture, int multiprocessors,
          bool reversed) {
    auto& machine = m2f_shim::machine();
    machine.buffers.clear();
    machine.architecture = device.architecture = architecture;
    machine.reversed = reversed;
    device.multiprocessors = multiprocessors;
    args.dtype = dtype_of(value.second);
    args.batch = value.first.shape(0);
    args.positions = static_cast<int>(value.first.shape(1));
    args.heads = static_cast<int>(value.first.shape(2));
    args.channels = static_cast<int>(value.first.shape(3));
    args.queries = static_cast<int>(points.first.shape(1));
    args.levels.count = static_cast<int>(points_per_level.size());
    for (int l = 0; l < args.levels.count; ++l) {
      args.levels.points_per_level[l] = points_per_level[l];
      args.levels.points_total += points_per_level[l];
      shapes_.insert(shapes_.end(), {levels[3 * l], levels[3 * l + 1]});
      starts_.push_back(levels[3 * l + 2]);
      if (on_device) continue;
      args.levels.height[l] = levels[3 * l];
      args.levels.width[l] = levels[3 * l + 1];
      args.levels.start[l] = levels[3 * l + 2];
    }
    if (on_device) {
      args.device_shapes = shapes_.data();
      args.device_starts = starts_.data();
      const auto shapes = reinterpret_cast<uintptr_t>(shapes_.data());
      const auto starts = reinterpret_cast<uintptr_t>(starts_.data());
      machine.buffers.push_back({shapes, shapes + 8 * shapes_.size()});
      machine.buffers.push_back({starts, starts + 8 * starts_.size()});
    }
    args.value = allow(value.first);
    args.value_n = stride_of(value.first, 0);
    args.value_s = stride_of(value.first, 1);
    args.value_h = stride_of(value.first, 2);
    args.points = strided(points);
    args.weights = strided(weights);
    if (reference.has_value()) {
      args.reference = strided(*reference);
      args.reference.k = args.reference.h;
      args.reference.h = 0;
      args.reference_size = static_cast<int>(reference->first.shape(3));
      args.offset_scale = offset_scale;
    }
  }

  bool empty() const { return args.batch == 0 || args.queries == 0; }

  // Returns whether the lean kernel served the call.
  bool forward(py::array output, bool lean) {
    args.output = allow(output);
    if (empty()) return false;
    if (lean && m2f::launch_lean_forward(args, device, nullptr)) return true;
    m2f::launch_ms_deform_attn(args, device, nullptr);
    return false;
  }

  // Wanted gradients are written into the arrays given. value_sum is the zeroed accumulator; for 16-bit values,
  // grad_value takes its rounded copy. Returns the bytes that were added to memory. `gathered`: the value gradient by
  // that kernel where it serves the call.
  int64_t backward(const Array& grad_output, const std::optional<py::array>& value_sum,
                   const std::optional<py::array>& grad_value, const std::optional<py::array>& grad_points,
                   const std::optional<py::array>& grad_weights, const std::optional<py::array>& reference_parts,
                   const std::optional<Array>& grad_reference, bool gathered) {
    m2f_shim::machine().reduced_bytes = 0;
    if (empty()) return 0;
    args.gathered = gathered;
    args.grad_output = allow(grad_output.first);
    args.grad_output_n = stride_of(grad_output.first, 0);
    args.grad_output_q = stride_of(grad_output.first, 1);
    if (value_sum) args.grad_value = allow(*value_sum);
    if (grad_points) args.grad_points = allow(*grad_points);
    if (grad_weights) args.grad_weights = allow(*grad_weights);
    if (reference_parts) args.grad_reference = allow(*reference_parts);
    m2f::launch_ms_deform_attn(args, device, nullptr);
    if (grad_value) {
      m2f::launch_round_gradient(static_cast<const float*>(args.grad_value), allow(*grad_value), args.dtype,
                                 value_sum->size(), device, nullptr);
    }
    if (grad_reference) {
      m2f::launch_sum_over_heads(args.grad_reference, args.dtype == m2f::DType::kFloat64, allow(grad_reference->first),
                                 dtype_of(grad_reference->second), args.batch * args.queries, args.heads,
                                 args.levels.count * args.reference_size, device, nullptr);
    }
    return m2f_shim::machine().reduced_bytes;
  }

 private:
  std::vector<int64_t> shapes_, starts_;
};

// ---------------------------------------------------------------- the shim itself

void broken_kernel(int kind, float* memory) {
  M2F_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x;
  if (kind == 0 && lane < 16) __syncwarp();
  if (kind == 1) {
    if (lane < 16) {
      __shfl_xor_sync(0xffffffffu, lane, 1);
    } else {
      __shfl_xor_sync(0xffffffffu, lane, 1);
    }
  }
  if (kind == 2) __ldg(memory + lane);
  if (kind == 3) shared[lane] = 0;
  if (kind == 4) __ldg(reinterpret_cast<float*>(reinterpret_cast<unsigned char*>(memory) + 1));
  if (kind == 5 && lane != 0) __syncthreads();
}

// Runs one warp of a kernel that makes the mistake `kind`, on 16 floats and 16 bytes of shared memory.
void run_broken_kernel(int kind, py::array_t<float> memory) {
  auto& machine = m2f_shim::machine();
  machine.buffers.clear();
  float* data = static_cast<float*>(allow(memory));
  m2f::launch(broken_kernel, dim3(1), dim3(32), 16, nullptr, kind, data);
}

float round_trip(float x, bool half) {
  return half ? __half2float(__float2half_rn(x)) : __bfloat162float(__float2bfloat16_rn(x));
}

}  // namespace

PYBIND11_MODULE(m2f_cuda_on_host, m) {
  py::class_<Problem>(m, "Problem")
      .def(py::init<const Array&, const std::vector<int64_t>&, bool, const std::vector<int>&, const Array&,
                    const Array&, const std::optional<Array>&, double, int, int, bool>(),
           py::arg("value"), py::arg("levels"), py::arg("on_device"), py::arg("points_per_level"), py::arg("points"),
           py::arg("weights"), py::arg("reference"), py::arg("offset_scale"), py::arg("architecture"),
           py::arg("multiprocessors"), py::arg("reversed"))
      .def("forward", &Problem::forward, py::arg("output"), py::arg("lean") = false)
      .def("backward", &Problem::backward, py::arg("grad_output"), py::arg("value_sum"), py::arg("grad_value"),
           py::arg("grad_points"), py::arg("grad_weights"), py::arg("reference_parts"), py::arg("grad_reference"),
           py::arg("gathered") = false);
  m.def("run_broken_kernel", &run_broken_kernel);
  m.def("round_trip", py::vectorize(round_trip));
}
