// The arithmetic of one row of logits, an element at a time: from a logit x to z = softcap(x + bias) / temperature, to
// the log-likelihood of the target, and to the gradient with respect to the product x. For the host too, where it is
// tested. Letters: V vocabulary, p the softmax of a row, u the upstream gradient of the row's log-likelihood.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define L3M_HOST_DEVICE_ __host__ __device__ __forceinline__
#else
#define L3M_HOST_DEVICE_ inline
#endif

namespace l3m::row {

// HUGE_VALF and NAN are macros of the C library on both sides.
constexpr float kMinusInfinity = -HUGE_VALF;

struct Transform {
  float softcap;              // 0: none
  float inverse_softcap;      // its reciprocal
  float inverse_temperature;  // of the distribution
};

struct Value {
  float z;      // what the softmax sees
  float slope;  // dz / dx times the temperature: 1, or 1 - tanh^2
};

// x: the product, and the bias if there is one
L3M_HOST_DEVICE_ Value transform(float x, const Transform& transform) {
  if (transform.softcap == 0.0f) return {x * transform.inverse_temperature, 1.0f};
  // tanh and its derivative from e = exp(-2 |y|):
  // 1 - tanh^2 would have no digits left where tanh is near 1, nor 1 - e near 0.
  const float y = x * transform.inverse_softcap;
  const float e = expf(-2.0f * fabsf(y));
  const float reciprocal = 1.0f / (1.0f + e);
  const float t = copysignf(expm1f(-2.0f * fabsf(y)) * reciprocal, y);
  return {transform.softcap * t * transform.inverse_temperature, 4.0f * e * reciprocal * reciprocal};
}

// What exp is taken relative to: the maximum, but not -inf, where -inf - -inf would be NaN.
L3M_HOST_DEVICE_ float origin(float maximum) { return maximum == kMinusInfinity ? 0.0f : maximum; }

// Sum of exp(z - origin(maximum)). A NaN is in the sum, which it never leaves, and not in the maximum: fmaxf drops it.
struct Sum {
  float maximum;
  float total;

  // The sum seen from a maximum that is at least its own.
  L3M_HOST_DEVICE_ float from(float other) const { return total * expf(maximum - origin(other)); }

  // kCount more numbers: one rescaling for all of them.
  template <int kCount>
  L3M_HOST_DEVICE_ void add(const float (&z)[kCount]) {
    float larger = maximum;
    for (int i = 0; i < kCount; ++i) larger = fmaxf(larger, z[i]);
    total = from(larger);
    maximum = larger;
    const float zero = origin(larger);
    for (int i = 0; i < kCount; ++i) total += expf(z[i] - zero);
  }
};

L3M_HOST_DEVICE_ Sum combine(const Sum& a, const Sum& b) {
  const float maximum = fmaxf(a.maximum, b.maximum);
  return {maximum, a.from(maximum) + b.from(maximum)};
}

struct Statistics {
  float token;  // log p of the target
  float lse;    // log of the sum of all exp(z)
  float zero;   // p[i] = exp(z[i] - zero) * reciprocal
  float reciprocal;
  float complement;  // 1 - p of the target, without the cancellation
};

// others: the sum over all but the target; target: its z. A row whose z are all -inf is NaN, as in torch.
L3M_HOST_DEVICE_ Statistics statistics(const Sum& others, float target) {
  const float maximum = fmaxf(others.maximum, target);  // of a NaN target: that of the others
  const float zero = origin(maximum);
  const float own = expf(target - zero);
  const float rest = others.from(maximum);
  const float sum = rest + own;
  const float log_sum = logf(sum);
  Statistics found;
  // Where the target is the largest, own is 1: log1p keeps the digits of a likelihood near 1.
  found.token = target >= others.maximum ? -log1pf(rest) : (target - zero) - log_sum;
  found.lse = zero + log_sum;
  found.zero = zero;
  found.reciprocal = 1.0f / sum;
  found.complement = rest * found.reciprocal;
  if (maximum == kMinusInfinity || sum != sum) found.token = found.lse = found.reciprocal = found.complement = NAN;
  return found;
}

// The same with lse as it was found before; z may be of a part of the vocabulary.
L3M_HOST_DEVICE_ Statistics statistics_of(float lse, float target) {
  return {target - lse, lse, lse, 1.0f, -expm1f(target - lse)};
}

L3M_HOST_DEVICE_ float probability(float z, const Statistics& row) { return expf(z - row.zero) * row.reciprocal; }

// scale: u / temperature, 0 where the row has no gradient, whatever its p.
L3M_HOST_DEVICE_ float gradient(const Value& value, const Statistics& row, float scale) {
  return scale == 0.0f ? 0.0f : -scale * probability(value.z, row) * value.slope;
}

L3M_HOST_DEVICE_ float target_gradient(float complement, float slope, float scale) {
  return scale == 0.0f ? 0.0f : scale * complement * slope;
}

}  // namespace l3m::row
