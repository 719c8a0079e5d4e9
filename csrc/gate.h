// The objectives' gates as numbers: what the single-read form evaluates between the statistics of a
// row and its gradient, while the row is still on chip.
//
//   gate = [low <= p <= high] * a / (a + eps) * p^a * (H / entropy_scale)^entropy_power
//
// with `a` a constant, the collision probability, or Cayley's function of p, and H the entropy of
// the row or of its top k. megatron_deft/objectives.py holds the numbers of every objective
// (`Gate`); the two-pass form evaluates the objectives there, and a test holds them equal.
#pragma once

#include <cmath>

#include "vocab_loss.h"

namespace megatron_deft {

enum class Exponent { kConstant, kCollision, kCayley };

struct Gate {
  Exponent exponent_of;
  float exponent;  // of kConstant
  float eps;
  float low, high;  // -inf and inf: every p
  float entropy_power;  // 0: no entropy
  float entropy_scale;
  int64_t topk;  // 0: H is the whole row's
};

// What gate_grad needs to know of a row.
struct RowGradient {
  float scale;        // gate / S1
  float target_grad;  // gate * expm1(logp)
};

// Entropy in nats of softmax over `k` logits, of which top[0] is the largest; -inf entries count 0.
// log1p of the others' sum, so that an entropy near 0 keeps its digits.
MDEFT_HOST_DEVICE float entropy_of(const float* top, int64_t k) {
  float s = 0.0f, sh = 0.0f;
  for (int64_t i = 1; i < k; ++i) {
    const float d = top[i] - top[0];
    const float e = expf(d);
    s += e;
    if (e != 0.0f) sh += e * d;  // nan stays nan; 0 * -inf would be one
  }
  return log1pf(s) - sh / (1.0f + s);
}

// z_y: the target's logit. entropy: of the top k if gate.topk > 0, else unused.
MDEFT_HOST_DEVICE RowGradient gradient_of_row(const Gate& gate, const Sums& sums, float z_y,
                                              float topk_entropy) {
  const float s1 = 1.0f + sums.rest, log_s1 = log1pf(sums.rest);
  const float logp = z_y - sums.m - log_s1;
  const float p = expf(logp);
  const bool kept = !(p < gate.low) && !(p > gate.high);  // nan is kept, to be seen
  float value = 0.0f;
  if (kept) {
    float a = gate.exponent;
    if (gate.exponent_of == Exponent::kCollision) a = sums.s2 / (s1 * s1);
    if (gate.exponent_of == Exponent::kCayley) {
      a = (p - 1e-8f) / (2.0f + 2e-8f - p);
      a = a < 1e-3f ? 1e-3f : (a > 1.0f ? 1.0f : a);
    }
    value = a == 0.0f ? 1.0f : expf(a * logp);
    if (gate.eps > 0.0f) value *= a / (a + gate.eps);
    if (gate.entropy_power > 0.0f) {
      float h = gate.topk > 0 ? topk_entropy : log_s1 - sums.sh / s1;
      h = h < 0.0f ? 0.0f : h / gate.entropy_scale;
      value *= gate.entropy_power == 1.0f ? h : powf(h, gate.entropy_power);
    }
  }
  return {value / s1, value * expm1f(logp)};
}

}  // namespace megatron_deft
