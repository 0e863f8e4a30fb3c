// The activations of an FFN, elementwise in float32. The order is that of KERNELS in lowering/cpu/ffn.py.
#pragma once

#include <cmath>
#include <cstdint>

namespace topk {

enum class Activation : int64_t { RELU, RELU2, GELU, GELU_TANH, SILU, QUICK_GELU, SIGMOID };

inline float relu(float x) { return x < 0.0f ? 0.0f : x; }  // NaN stays
inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

inline float gelu(float x) { return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f)); }

inline float gelu_tanh(float x) {
  return 0.5f * x * (1.0f + std::tanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
}

template <typename Function>
void map(const float* x, int64_t count, float* result, Function function) {
  for (int64_t n = 0; n < count; n++) result[n] = function(x[n]);
}

// result[n] = act(x[n])
inline void activate(Activation activation, const float* x, int64_t count, float* result) {
  switch (activation) {
    case Activation::RELU: return map(x, count, result, relu);
    case Activation::RELU2: return map(x, count, result, [](float v) { return relu(v) * relu(v); });
    case Activation::GELU: return map(x, count, result, gelu);
    case Activation::GELU_TANH: return map(x, count, result, gelu_tanh);
    case Activation::SILU: return map(x, count, result, [](float v) { return v / (1.0f + std::exp(-v)); });
    case Activation::QUICK_GELU: return map(x, count, result, [](float v) { return v * sigmoid(1.702f * v); });
    case Activation::SIGMOID: return map(x, count, result, sigmoid);
  }
}

}  // namespace topk
