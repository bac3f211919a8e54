#include "cpu/head.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cpu/statistics.h"
#include "cpu/tiles.h"
#include "cpu/weight_gradient.h"

namespace l3m::cpu {
namespace {

// A power of 2 near the largest upstream gradient: products of 16-bit numbers flush what is below 1e-38 to 0.
template <typename In, typename Out, typename Acc>
Acc power_near_largest(const HeadProblem<In, Out, Acc>& problem) {
  Acc largest = 0;
  for (int64_t row : problem.gradient_rows) {
    const Acc size = std::abs(problem.upstream[row]);
    if (std::isfinite(size)) largest = std::max(largest, size);
  }
  return largest > 0 ? std::ldexp(Acc(1), std::clamp(std::ilogb(largest), -120, 120)) : Acc(1);
}

}  // namespace

template <typename In, typename Out, typename Mul, typename Acc>
void run_head(const HeadProblem<In, Out, Acc>& problem) {
  Tiles<In, Out, Mul, Acc> tiles(problem);
  Statistics<In, Out, Mul, Acc> statistics(problem, tiles);
  if (!problem.forward_rows.empty()) statistics.run(statistics.make_batch(problem.forward_rows, false, 1));

  const std::vector<int64_t>& rows = problem.gradient_rows;
  const int64_t n = rows.size();
  const Acc scale = std::is_same_v<Mul, BFloat16> ? power_near_largest(problem) : Acc(1);
  const bool need_weight = problem.d_weight || problem.d_bias;
  WeightGradient<In, Out, Mul, Acc> weight(problem, tiles);
  const int64_t chunk = need_weight ? weight.rows_per_chunk() : n, chunks = n == 0 ? 0 : ceil_div(n, chunk);
  for (int64_t c = 0; c < chunks; ++c) {
    auto batch =
        statistics.make_batch({rows.begin() + c * chunk, rows.begin() + std::min(n, (c + 1) * chunk)}, true, scale);
    if (need_weight) weight.keep(batch);
    statistics.run(batch);
    if (need_weight) weight.add(batch, c == 0, c + 1 == chunks);
  }
  if (need_weight) weight.finish(chunks, scale);
}

template void run_head<BFloat16, BFloat16, BFloat16>(const HeadProblem<BFloat16, BFloat16, float>&);
template void run_head<BFloat16, BFloat16, float>(const HeadProblem<BFloat16, BFloat16, float>&);
template void run_head<Float16, Float16, float>(const HeadProblem<Float16, Float16, float>&);
template void run_head<Float16, float, float>(const HeadProblem<Float16, float, float>&);
template void run_head<float, float, float>(const HeadProblem<float, float, float>&);
template void run_head<double, double, double>(const HeadProblem<double, double, double>&);

}  // namespace l3m::cpu
