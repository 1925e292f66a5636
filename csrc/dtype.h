// The dtypes of activations.
#pragma once

namespace peftk {

// The kernels on the CPU take the first two; float64 stays with the torch backend everywhere.
enum class Dtype { float32, bfloat16, float16 };

}  // namespace peftk
