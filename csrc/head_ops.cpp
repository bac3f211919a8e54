// Registers the head's native ops with torch: tensors to the plain arrays of cpu/head.h. As in ops.cpp, what is checked
// here is what keeps memory access in bounds.
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <memory>
#include <optional>
#include <tuple>

#include "cpu/head.h"
#include "cpu/kernels.h"
#include "cpu/plan.h"

namespace l3m {
namespace {

using at::Tensor;

// The last layer of the model, in the order of the schemas.
struct HeadArguments {
  Tensor weight;
  std::optional<Tensor> bias;
  double softcap, temperature;
  int64_t workspace;
  bool low_memory;
};

struct Batch {
  Tensor hidden, targets, cu_seqlens;
  int64_t ignore_index;
};

// Rows one after the other in memory, whatever their distance.
Tensor with_rows(const Tensor& matrix) {
  const bool rows = matrix.size(1) <= 1 || matrix.stride(1) == 1;
  return rows && matrix.stride(0) >= matrix.size(1) ? matrix : matrix.contiguous();
}

// `part`: of the vocabulary. A target outside it is in another.
void check(Batch& batch, HeadArguments& head, bool part = false) {
  const Tensor &hidden = batch.hidden, &weight = head.weight;
  TORCH_CHECK_VALUE(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1),
                    "head: wanted hidden (T, D) and weight (V, D), got ", hidden.sizes(), " and ", weight.sizes());
  TORCH_CHECK_TYPE(hidden.scalar_type() == weight.scalar_type(), "head: hidden is ", hidden.scalar_type(),
                   ", weight is ", weight.scalar_type());
  const int64_t T = hidden.size(0), V = weight.size(0);
  TORCH_CHECK_VALUE(batch.targets.sizes() == at::IntArrayRef{T} && batch.targets.scalar_type() == at::kLong,
                    "head: targets must be (T,) int64, got ", batch.targets.sizes());
  batch.targets = batch.targets.contiguous();
  const int64_t* target = batch.targets.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < T; ++t) {
    TORCH_CHECK_INDEX(part || target[t] == batch.ignore_index || (0 <= target[t] && target[t] < V), "head: targets[", t,
                      "] = ", target[t], " is outside the vocabulary [0, ", V, ")");
  }
  TORCH_CHECK_VALUE(batch.cu_seqlens.dim() == 1 && batch.cu_seqlens.numel() >= 1, "head: cu_seqlens must be (N + 1,)");
  batch.cu_seqlens = batch.cu_seqlens.to(at::kLong).contiguous();
  const int64_t* offset = batch.cu_seqlens.const_data_ptr<int64_t>();
  const int64_t N = batch.cu_seqlens.numel() - 1;
  bool ordered = offset[0] == 0 && offset[N] == T;
  for (int64_t n = 0; n < N; ++n) ordered = ordered && offset[n] <= offset[n + 1];
  TORCH_CHECK_VALUE(ordered, "head: cu_seqlens must start at 0, never decrease and end at T");
  if (head.bias) {
    TORCH_CHECK_VALUE(head.bias->sizes() == at::IntArrayRef{V} && head.bias->scalar_type() == weight.scalar_type(),
                      "head: bias must be (V,) in weight's dtype");
    head.bias = head.bias->contiguous();
  }
  batch.hidden = with_rows(hidden);
  head.weight = with_rows(weight);
}

at::ScalarType compute_type(const Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

struct Statistics {
  Tensor sequence, length, token, lse;
};

struct Gradients {
  Tensor hidden, weight, bias;
};

// Uninitialised, on memory that goes back to the shelf when the tensor's is freed.
Tensor on_shelf(cpu::Shelf& shelf, at::IntArrayRef sizes, const at::TensorOptions& options) {
  const size_t bytes = c10::multiply_integers(sizes) * options.dtype().itemsize();
  if (bytes < size_t(1) << 20) return at::empty(sizes, options);
  struct Owner {
    cpu::Memory memory;
    cpu::Shelf& shelf;
  };
  auto* owner = new Owner{shelf.take(bytes, true), shelf};
  at::DataPtr data(
      owner->memory.buffer.get(), owner,
      [](void* context) {
        const std::unique_ptr<Owner> owner(static_cast<Owner*>(context));
        owner->shelf.give(std::move(owner->memory), false);
      },
      at::kCPU);
  const c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, std::move(data), at::getCPUAllocator(), true);
  return at::empty({0}, options).set_(storage, 0, sizes);
}

Gradients empty_gradients(const Batch& batch, const HeadArguments& head, at::ScalarType dtype, bool need_hidden,
                          bool need_weight, bool need_bias) {
  const auto options = batch.hidden.options().dtype(dtype);
  cpu::Shelves& shelves = cpu::Shelves::all();
  return {need_hidden ? on_shelf(shelves.d_hidden, batch.hidden.sizes(), options).zero_() : at::empty({0}, options),
          need_weight ? on_shelf(shelves.d_weight, head.weight.sizes(), options) : at::empty({0}, options),
          at::empty({need_bias ? head.weight.size(0) : 0}, options)};
}

// What a call asks of the rows: u of each, empty where no gradient is wanted. `known`: lse; token of a part's rows too.
template <typename In, typename Out, typename Mul, typename Acc>
void run(const Batch& batch, const HeadArguments& head, const Tensor& upstream, const Statistics& known,
         Statistics* found, Gradients* gradients) {
  cpu::HeadProblem<In, Out, Acc> problem{};
  const auto pointer = [](const Tensor& tensor) { return static_cast<const In*>(tensor.const_data_ptr()); };
  problem.hidden_size = batch.hidden.size(1);
  problem.vocabulary = head.weight.size(0);
  problem.hidden = pointer(batch.hidden);
  problem.weight = pointer(head.weight);
  problem.bias = head.bias ? pointer(*head.bias) : nullptr;
  problem.hidden_stride = batch.hidden.stride(0);
  problem.weight_stride = head.weight.stride(0);
  problem.targets = batch.targets.const_data_ptr<int64_t>();
  problem.softcap = head.softcap;
  problem.temperature = head.temperature;
  problem.workspace = head.workspace;
  problem.low_memory = head.low_memory;
  const Acc* u = upstream.defined() ? upstream.const_data_ptr<Acc>() : nullptr;
  for (int64_t t = 0; t < batch.hidden.size(0); ++t) {
    if (problem.targets[t] == batch.ignore_index) continue;
    (u && u[t] != 0 ? problem.gradient_rows : problem.forward_rows).push_back(t);
  }
  problem.upstream = u;
  if (known.token.defined()) problem.known_token = known.token.const_data_ptr<Acc>();
  if (known.lse.defined()) {
    problem.known_lse = known.lse.const_data_ptr<Acc>();
    problem.forward_rows.clear();  // nothing to be found out about them
  }
  if (found) {
    problem.token = found->token.mutable_data_ptr<Acc>();
    problem.lse = found->lse.defined() ? found->lse.mutable_data_ptr<Acc>() : nullptr;
  }
  if (gradients) {
    const auto output = [](Tensor& tensor) { return tensor.numel() ? tensor.mutable_data_ptr() : nullptr; };
    if (known.token.defined())
      problem.d_hidden_sums = static_cast<Acc*>(output(gradients->hidden));
    else
      problem.d_hidden = static_cast<Out*>(output(gradients->hidden));
    problem.d_weight = static_cast<Out*>(output(gradients->weight));
    problem.d_bias = static_cast<Out*>(output(gradients->bias));
  }
  cpu::run_head<In, Out, Mul, Acc>(problem);
}

void dispatch(const Batch& batch, const HeadArguments& head, const Tensor& upstream, const Statistics& known,
              Statistics* found, Gradients* gradients) {
  using cpu::BFloat16, cpu::Float16;
  switch (batch.hidden.scalar_type()) {
    case at::kBFloat16:
      // Words of two numbers: an odd hidden size has a number left over.
      if (cpu::path().brgemm_bfloat16 && batch.hidden.size(1) % 2 == 0) {
        return run<BFloat16, BFloat16, BFloat16, float>(batch, head, upstream, known, found, gradients);
      }
      return run<BFloat16, BFloat16, float, float>(batch, head, upstream, known, found, gradients);
    case at::kHalf:
      if (gradients && gradients->weight.scalar_type() == at::kFloat) {
        return run<Float16, float, float, float>(batch, head, upstream, known, found, gradients);
      }
      return run<Float16, Float16, float, float>(batch, head, upstream, known, found, gradients);
    case at::kFloat:
      return run<float, float, float, float>(batch, head, upstream, known, found, gradients);
    case at::kDouble:
      return run<double, double, double, double>(batch, head, upstream, known, found, gradients);
    default:
      TORCH_CHECK_TYPE(false, "head: wanted float32, bfloat16, float16 or float64, got ", batch.hidden.scalar_type());
  }
}

Statistics empty_statistics(const Batch& batch, bool with_lse) {
  const auto options = batch.hidden.options().dtype(compute_type(batch.hidden));
  const int64_t T = batch.hidden.size(0), N = batch.cu_seqlens.numel() - 1;
  return {at::empty({N}, options), at::empty({N}, options.dtype(at::kLong)), at::zeros({T}, options),
          with_lse ? at::zeros({T}, options) : Tensor()};
}

// Sums in double over each sequence's tokens -> their weighted sum.
// A weight of 0 drops its sequence, whatever its likelihood.
template <typename Acc>
double sum_sequences(const Batch& batch, const Statistics& found, const Acc* seq_weight) {
  const int64_t N = batch.cu_seqlens.numel() - 1;
  const int64_t* offset = batch.cu_seqlens.const_data_ptr<int64_t>();
  const int64_t* target = batch.targets.const_data_ptr<int64_t>();
  const Acc* token = found.token.const_data_ptr<Acc>();
  double weighted = 0;
  for (int64_t n = 0; n < N; ++n) {
    double sum = 0;
    int64_t length = 0;
    for (int64_t t = offset[n]; t < offset[n + 1]; ++t) {
      sum += token[t];
      length += target[t] != batch.ignore_index;
    }
    found.sequence.mutable_data_ptr<Acc>()[n] = Acc(sum);
    found.length.mutable_data_ptr<int64_t>()[n] = length;
    if (seq_weight && seq_weight[n] != 0) weighted += double(seq_weight[n]) * sum;
  }
  return weighted;
}

double sum_sequences(const Batch& batch, const Statistics& found, const Tensor& seq_weight) {
  if (compute_type(batch.hidden) == at::kDouble) {
    return sum_sequences<double>(batch, found, seq_weight.defined() ? seq_weight.const_data_ptr<double>() : nullptr);
  }
  return sum_sequences<float>(batch, found, seq_weight.defined() ? seq_weight.const_data_ptr<float>() : nullptr);
}

// (T,) values of the sequences, one per row, times `sign`; plus those of the rows where given.
template <typename Acc>
Tensor spread(const Batch& batch, const Tensor& per_sequence, Acc sign, const Tensor& per_row) {
  Tensor rows = per_row.defined() ? per_row.clone() : at::zeros({batch.hidden.size(0)}, per_sequence.options());
  const int64_t* offset = batch.cu_seqlens.const_data_ptr<int64_t>();
  const Acc* values = per_sequence.const_data_ptr<Acc>();
  Acc* out = rows.mutable_data_ptr<Acc>();
  for (int64_t n = 0; n + 1 < batch.cu_seqlens.numel(); ++n) {
    for (int64_t t = offset[n]; t < offset[n + 1]; ++t) out[t] += sign * values[n];
  }
  return rows;
}

Tensor spread(const Batch& batch, const Tensor& per_sequence, double sign, const Tensor& per_row = {}) {
  return compute_type(batch.hidden) == at::kDouble ? spread<double>(batch, per_sequence, sign, per_row)
                                                   : spread<float>(batch, per_sequence, float(sign), per_row);
}

Tensor per_sequence(const char* name, const Batch& batch, const Tensor& values) {
  TORCH_CHECK_VALUE(values.sizes() == at::IntArrayRef{batch.cu_seqlens.numel() - 1}, "head: ", name,
                    " must be (N,), one per sequence, got ", values.sizes());
  return values.to(compute_type(batch.hidden)).contiguous();
}

Tensor per_row(const char* name, const Batch& batch, const Tensor& values) {
  TORCH_CHECK_VALUE(values.sizes() == batch.targets.sizes(), "head: ", name, " must be (T,), one per row, got ",
                    values.sizes());
  return values.to(compute_type(batch.hidden)).contiguous();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> log_likelihood(const Tensor& hidden, const Tensor& targets,
                                                          const Tensor& cu_seqlens, const Tensor& weight,
                                                          const std::optional<Tensor>& bias,
                                                          std::optional<double> softcap, double temperature,
                                                          int64_t workspace, bool low_memory, int64_t ignore_index) {
  Batch batch{hidden, targets, cu_seqlens, ignore_index};
  HeadArguments head{weight, bias, softcap.value_or(0), temperature, workspace, low_memory};
  check(batch, head);
  Statistics found = empty_statistics(batch, true);
  dispatch(batch, head, {}, {}, &found, nullptr);
  sum_sequences(batch, found, Tensor());
  return {found.sequence, found.length, found.token, found.lse};
}

std::tuple<Tensor, Tensor, Tensor> log_likelihood_backward(const Tensor& grad_sequence, const Tensor& grad_token,
                                                           const Tensor& hidden, const Tensor& targets,
                                                           const Tensor& cu_seqlens, const Tensor& lse,
                                                           const Tensor& weight, const std::optional<Tensor>& bias,
                                                           std::optional<double> softcap, double temperature,
                                                           int64_t workspace, bool low_memory, int64_t ignore_index,
                                                           bool need_hidden, bool need_weight, bool need_bias) {
  Batch batch{hidden, targets, cu_seqlens, ignore_index};
  HeadArguments head{weight, bias, softcap.value_or(0), temperature, workspace, low_memory};
  check(batch, head);
  const Tensor upstream =
      spread(batch, per_sequence("grad_sequence", batch, grad_sequence), 1.0, per_row("grad_token", batch, grad_token));
  Gradients gradients = empty_gradients(batch, head, hidden.scalar_type(), need_hidden, need_weight, need_bias);
  dispatch(batch, head, upstream, {{}, {}, {}, per_row("lse", batch, lse)}, nullptr, &gradients);
  return {gradients.hidden, gradients.weight, gradients.bias};
}

std::tuple<Tensor, Tensor, Tensor> part_backward(const Tensor& upstream, const Tensor& hidden, const Tensor& targets,
                                                 const Tensor& lse, const Tensor& token, const Tensor& weight,
                                                 const std::optional<Tensor>& bias, std::optional<double> softcap,
                                                 double temperature, int64_t workspace, bool low_memory,
                                                 int64_t ignore_index, bool need_hidden, bool need_weight,
                                                 bool need_bias) {
  const int64_t T = targets.numel();  // in one sequence: nothing here is per sequence
  Batch batch{hidden, targets, at::arange(0, T + 1, T ? T : 1, targets.options()), ignore_index};
  HeadArguments head{weight, bias, softcap.value_or(0), temperature, workspace, low_memory};
  check(batch, head, true);
  Gradients gradients = empty_gradients(batch, head, hidden.scalar_type(), false, need_weight, need_bias);
  if (need_hidden) gradients.hidden = at::zeros(hidden.sizes(), hidden.options().dtype(compute_type(hidden)));
  const Statistics known{{}, {}, per_row("token", batch, token), per_row("lse", batch, lse)};
  dispatch(batch, head, per_row("upstream", batch, upstream), known, nullptr, &gradients);
  return {gradients.hidden, gradients.weight, gradients.bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> weighted_log_likelihood(
    const Tensor& hidden, const Tensor& targets, const Tensor& seq_weight, const Tensor& cu_seqlens,
    const Tensor& weight, const std::optional<Tensor>& bias, std::optional<double> softcap, double temperature,
    int64_t workspace, bool low_memory, int64_t ignore_index, bool need_hidden, bool need_weight, bool need_bias) {
  Batch batch{hidden, targets, cu_seqlens, ignore_index};
  HeadArguments head{weight, bias, softcap.value_or(0), temperature, workspace, low_memory};
  check(batch, head);
  const Tensor weights = per_sequence("seq_weight", batch, seq_weight);
  const bool any = need_hidden || need_weight || need_bias;
  // Small fp16 gradients stay fp32 until the loss scale has multiplied them: rounded first, they would be 0.
  const auto dtype = hidden.scalar_type() == at::kHalf ? at::kFloat : hidden.scalar_type();
  Gradients gradients = empty_gradients(batch, head, dtype, need_hidden, need_weight, need_bias);
  Statistics found = empty_statistics(batch, false);
  dispatch(batch, head, any ? spread(batch, weights, -1.0) : Tensor(), {}, &found, &gradients);
  const double loss = -sum_sequences(batch, found, weights);
  return {at::full({}, loss, found.sequence.options()),
          found.sequence,
          found.length,
          found.token,
          gradients.hidden,
          gradients.weight,
          gradients.bias};
}

}  // namespace

#define L3M_HEAD \
  "Tensor weight, Tensor? bias, float? softcap, float temperature, int workspace, bool low_memory, int ignore_index"
#define L3M_NEEDS "bool need_hidden, bool need_weight, bool need_bias"

TORCH_LIBRARY_FRAGMENT(l3m_kernels, m) {
  m.def("cpp_log_likelihood(Tensor hidden, Tensor targets, Tensor cu_seqlens, " L3M_HEAD
        ") -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cpp_log_likelihood_backward(Tensor grad_sequence, Tensor grad_token, Tensor hidden, Tensor targets, Tensor "
      "cu_seqlens, Tensor lse, " L3M_HEAD ", " L3M_NEEDS ") -> (Tensor, Tensor, Tensor)");
  m.def("cpp_part_backward(Tensor upstream, Tensor hidden, Tensor targets, Tensor lse, Tensor token, " L3M_HEAD
        ", " L3M_NEEDS ") -> (Tensor, Tensor, Tensor)");
  m.def("cpp_weighted_log_likelihood(Tensor hidden, Tensor targets, Tensor seq_weight, Tensor cu_seqlens, " L3M_HEAD
        ", " L3M_NEEDS ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(l3m_kernels, CPU, m) {
  m.impl("cpp_log_likelihood", &log_likelihood);
  m.impl("cpp_log_likelihood_backward", &log_likelihood_backward);
  m.impl("cpp_part_backward", &part_backward);
  m.impl("cpp_weighted_log_likelihood", &weighted_log_likelihood);
}

}  // namespace l3m
