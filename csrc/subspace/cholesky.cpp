// cholesky_inverse_ on a CPU: one matrix per task.
#include "subspace/cholesky.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <vector>

#include "common/cpu.h"
#include "subspace/lowrank_doors.h"

namespace fastunlearn {
namespace {

// row[c] -= factor * pivot[c]
FASTUNLEARN_CPU_CLONES
void subtract_multiple(double* row, const double* pivot, double factor, int64_t count) {
  for (int64_t c = 0; c < count; ++c) row[c] -= factor * pivot[c];
}

int64_t factor(double* gram, double* inverse, int64_t k, double tolerance) {
  std::vector<double> diagonal(k);
  bool finite = true;
  for (int64_t j = 0; j < k; ++j) {
    diagonal[j] = gram[j * k + j];
    finite = finite && std::isfinite(diagonal[j]);
  }
  int64_t rank = 0;
  for (int64_t j = 0; j < k; ++j) {
    double* pivot = gram + j * k;
    const bool keep = finite && pivot[j] > tolerance * diagonal[j];
    const double scale = keep ? 1 / std::sqrt(pivot[j]) : 0;
    rank += keep;
    for (int64_t c = 0; c < j; ++c) pivot[c] = 0;
    for (int64_t c = j; c < k; ++c) pivot[c] = keep ? pivot[c] * scale : 0;
    for (int64_t r = j + 1; keep && r < k; ++r)
      subtract_multiple(gram + r * k + r, pivot + r, pivot[r], k - r);
    for (int64_t c = 0; c < k; ++c) inverse[j * k + c] = 0;
    inverse[j * k + j] = scale;
  }
  // R X = I, last row first: row i of X is (e_i - sum over j > i of R_ij X_j) / R_ii.
  for (int64_t i = k - 1; i >= 0; --i) {
    double* row = inverse + i * k;
    const double scale = row[i];
    if (scale == 0) continue;
    row[i] = 1;
    for (int64_t j = i + 1; j < k; ++j)
      subtract_multiple(row + j, inverse + j * k + j, gram[i * k + j], k - j);
    for (int64_t c = i; c < k; ++c) row[c] *= scale;
  }
  return finite ? rank : -1;
}

void cholesky_inverse_cpu(const Tensor& grams, const Tensor& inverses, const Tensor& ranks,
                          double tolerance) {
  const CholeskyDoor door(grams, inverses, ranks);
  const int64_t k = grams.size(1);
  auto* gram = static_cast<double*>(grams.mutable_data_ptr());
  auto* inverse = static_cast<double*>(inverses.mutable_data_ptr());
  auto* rank = static_cast<int64_t*>(ranks.mutable_data_ptr());
  torch::stable::parallel_for(0, grams.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      rank[i] = factor(gram + i * k * k, inverse + i * k * k, k, tolerance);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastunlearn, CPU, m) {
  m.impl("cholesky_inverse_", TORCH_BOX(&cholesky_inverse_cpu));
}

}  // namespace fastunlearn
