// The head: hidden states x vocabulary matrix -> log-likelihoods of the targets and gradients, tile by tile.
//
// Letters: T rows of the batch, n of them scored, D hidden size, V vocabulary, X hidden, W weight. A block is up to a
// few hundred scored rows. For a row m, t its target, z[v, m] its logits, u the gradient of the loss in its log pi:
//
//   E[v, m]     = exp(z[v, m] - r)        r: a reference near the logits, the target's logit z_t
//   S           = sum_v E[v, m]
//   log pi      = (z_t - r) - log S
//   d z[v, m]   = u ([v = t] - E[v, m] / S)
//   d hidden[m] = u (1 - p_t) W[t]                 - (u / S) sum_(v != t) E[v, m] W[v]
//   d W[v]      = sum_(m: t = v) u (1 - p_t) X[m]  - sum_(m: t != v) E[v, m] (u / S) X[m]
//
// S enters after the sums over v, so one pass over the vocabulary gives S and d hidden, and leaves E behind for d W.
// The target's own terms are added in full precision: where p_t is nearly 1, 1 - p_t = sum_(v != t) E / S has no
// cancellation.
#pragma once

#include <cstdint>
#include <vector>

namespace l3m::cpu {

template <typename In, typename Out, typename Acc>
struct HeadProblem {
  int64_t hidden_size, vocabulary;  // D, V
  const In* hidden;                 // (T, D), rows hidden_stride apart
  const In* weight;                 // (V, D), rows weight_stride apart
  const In* bias;                   // (V,) or null
  int64_t hidden_stride, weight_stride;
  const int64_t* targets;              // (T,); with known_token, one outside [0, V) is in another part
  double softcap, temperature;         // softcap 0: none
  std::vector<int64_t> gradient_rows;  // scored rows that need a gradient
  std::vector<int64_t> forward_rows;   // scored rows that need none
  const Acc* upstream;                 // (T,) u, where there are gradient rows
  const Acc* known_lse;                // (T,) log sum exp of the logits from an earlier forward, or null
  const Acc* known_token;              // (T,) log pi likewise, or null; given, the V rows are a part of the vocabulary
  int64_t workspace;                   // bytes
  bool low_memory;                     // recompute instead of keeping exponentials
  Acc* token;                          // (T,) log-likelihoods of the scored rows, or null
  Acc* lse;                            // (T,) or null
  Out* d_hidden;                       // (T, D) zeroed, or null
  Acc* d_hidden_sums;                  // (T, D) zeroed, in its place where other parts are to be added, or null
  Out* d_weight;                       // (V, D), or null; written whole
  Out* d_bias;                         // (V,), or null; written whole
};

// Mul: the type of the products' operands.
template <typename In, typename Out, typename Mul, typename Acc>
void run_head(const HeadProblem<In, Out, Acc>& problem);

}  // namespace l3m::cpu
