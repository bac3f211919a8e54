// The filter of level and trend, a reward at a time, once for C++ and CUDA C++. What it is and where its numbers come
// from is in l3m_kernels/trend.py; every sum and product is in that file's order, so the bits are the same.
#pragma once

#include "barrier.h"

namespace l3m {

constexpr int kModels = 3;  // at rest, in a line, changing its speed

// A model's part of the state, in the order of trend.MODEL.
struct Model {
  double probability, level, trend, level_variance, covariance, trend_variance;
};

// A row of the filter's state: the columns of a moving average first.
struct Trend {
  Average average;
  Model models[kModels];
};

static_assert(sizeof(Trend) == 23 * sizeof(double));

// The tables as functions: device code does not see a constant array.
L3M_HOST_DEVICE inline double at(int model, double rest, double line, double manoeuvre) {
  return model == 0 ? rest : model == 1 ? line : manoeuvre;
}
L3M_HOST_DEVICE inline double prior(int model) { return at(model, 0.85, 0.12, 0.03); }
L3M_HOST_DEVICE inline double trend_prior(int model) { return at(model, 0.0, 0.02, 1.5); }
L3M_HOST_DEVICE inline double level_noise(int model) { return at(model, 1e-4, 0.0, 0.0); }
L3M_HOST_DEVICE inline double trend_noise(int model) { return at(model, 0.0, 0.001, 0.08); }
L3M_HOST_DEVICE inline double change(int from, int to) {
  return from == 0   ? at(to, 0.9937, 0.0035, 0.0028)
         : from == 1 ? at(to, 0.005, 0.991, 0.004)
                     : at(to, 0.001, 0.004, 0.995);
}
constexpr double kPooling = 0.1;
constexpr double kFreedom = 31.0;
constexpr double kLeast = 1.0 / (1LL << 40);
constexpr double kMost = static_cast<double>(1LL << 50);

// torch's maximum: a NaN stays NaN.
L3M_HOST_DEVICE inline double maximum(double a, double b) { return a != a || a > b ? a : b; }

L3M_HOST_DEVICE inline double relative(double square, double variance) {
  return square / clamp_min(maximum(variance, kLeast * square), kSmallest);
}

// The square root of x >= 1 by Heron's rule: the same bits everywhere.
L3M_HOST_DEVICE inline double heron_root(double x) {
  double root = 0.5 * (1.0 + x);
  for (int i = 0; i < 10; ++i) root = 0.5 * (root + x / root);
  return root;
}

// What model `to` says of the next batch.
L3M_HOST_DEVICE inline Model foretell(const Model* models, int to, double pooled, double noise) {
  double shares[kModels], probability = 0.0;  // of who may have gone over to it
  for (int i = 0; i < kModels; ++i) {
    shares[i] = change(i, to) * models[i].probability;
    probability = i == 0 ? shares[i] : probability + shares[i];
  }
  for (double& share : shares) share = share / probability;
  double level = models[to].level, trend = models[to].trend;
  for (int i = 0; i < kModels; ++i) {
    level = level + shares[i] * (models[i].level - models[to].level);
    trend = trend + shares[i] * (models[i].trend - models[to].trend);
  }
  double level_variance = 0.0, covariance = 0.0, trend_variance = 0.0;
  for (int i = 0; i < kModels; ++i) {
    const double dl = models[i].level - level, dt = models[i].trend - trend;
    const double scale = clamp_min(maximum(pooled, kLeast * maximum(dl * dl, dt * dt)), kSmallest);
    level_variance = level_variance + shares[i] * (models[i].level_variance + dl * dl / scale);
    covariance = covariance + shares[i] * (models[i].covariance + dl * dt / scale);
    trend_variance = trend_variance + shares[i] * (models[i].trend_variance + dt * dt / scale);
  }
  if (to == 0) return {probability, level, 0.0, level_variance + level_noise(0) * noise, 0.0, 0.0};
  return {probability,
          level + trend,
          trend,
          level_variance + 2.0 * covariance + trend_variance + level_noise(to) * noise,
          covariance + trend_variance,
          trend_variance + trend_noise(to) * noise};
}

// A model after the batch's mean was `e` away from what it had foretold; its probability is not normalised yet.
L3M_HOST_DEVICE inline Model update(const Model& model, double e, double pooled, double noise) {
  const double total = model.level_variance + noise;
  const double gain = model.level_variance / total, trend_gain = model.covariance / total;
  const double fall = relative(e * e, pooled) / (kFreedom * total);
  double power = 1.0 + (fall > kMost ? kMost : fall);
  for (int i = 0; i < 4; ++i) power = power * power;
  return {model.probability / (heron_root(total / noise) * power),
          model.level + gain * e,
          model.trend + trend_gain * e,
          model.level_variance - gain * model.level_variance,
          model.covariance - gain * model.covariance,
          model.trend_variance - trend_gain * model.covariance};
}

// One step of the filter.
L3M_HOST_DEVICE inline Trend advance(const Trend& old, const Sums& sums) {
  if (!(sums.count > 0.0)) return old;
  const double n = clamp_min(sums.count, 1.0), mean = sums.total / n, noise = 1.0 / n;
  double within = sums.count > 1.0 ? clamp_min(sums.squares - sums.total * mean, 0.0) : 0.0;
  double dof = clamp_min(sums.count - 1.0, 0.0);
  Trend next;
  if (!(old.average.weight > 0.0)) {
    next.average = {1.0, mean, kPooling * within, kPooling * dof, noise};
    for (int i = 0; i < kModels; ++i) next.models[i] = {prior(i), mean, 0.0, noise, 0.0, trend_prior(i) * noise};
    return next;
  }
  const double before = old.average.squares / clamp_min(old.average.dof, kSmallest);
  double single = 0.0;
  for (int i = 0; i < kModels; ++i) {
    const Model& model = next.models[i] = foretell(old.models, i, before, noise);
    const double e = mean - model.level;
    single = single + model.probability * (e * e / (model.level_variance + noise)) * noise;
  }
  // A batch of one has no spread of its own; how far it is from what was foretold stands in for it.
  if (sums.count == 1.0) within = single, dof = 1.0;
  const double squares = (1.0 - kPooling) * old.average.squares + kPooling * within;
  dof = (1.0 - kPooling) * old.average.dof + kPooling * dof;
  const double pooled = squares / clamp_min(dof, kSmallest);

  double likelihood = 0.0;
  for (int i = 0; i < kModels; ++i) {
    next.models[i] = update(next.models[i], mean - next.models[i].level, pooled, noise);
    likelihood = i == 0 ? next.models[i].probability : likelihood + next.models[i].probability;
  }
  double estimate = next.models[0].level;
  for (int i = 0; i < kModels; ++i) {
    next.models[i].probability = next.models[i].probability / likelihood;
    if (i > 0) estimate = estimate + next.models[i].probability * (next.models[i].level - next.models[0].level);
  }
  double spread = 0.0;
  for (int i = 0; i < kModels; ++i) {
    const double distance = next.models[i].level - estimate;
    spread =
        spread + next.models[i].probability * (next.models[i].level_variance + relative(distance * distance, pooled));
  }
  next.average = {1.0, estimate, squares, dof, spread};
  return next;
}

// A reward's state before and after a batch, of either kind. `width` is the count of its columns.
L3M_HOST_DEVICE inline Average advance_row(const double* old, double* next, int64_t width, const Sums& sums,
                                           double smoothing) {
  if (width == static_cast<int64_t>(sizeof(Trend) / sizeof(double))) {
    const Trend row = advance(*reinterpret_cast<const Trend*>(old), sums);
    *reinterpret_cast<Trend*>(next) = row;
    return row.average;
  }
  const Average row = advance(*reinterpret_cast<const Average*>(old), sums, smoothing);
  *reinterpret_cast<Average*>(next) = row;
  return row;
}

}  // namespace l3m
