// Element types as plain integers, shared by translation units that do not see PyTorch's headers.
#pragma once

namespace m2f {

enum class DType : int { kFloat64, kFloat32, kBFloat16, kFloat16 };

inline int element_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace m2f
