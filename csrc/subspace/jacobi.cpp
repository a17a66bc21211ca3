// orthogonal_rows_ on a CPU: one matrix per task, in float64 whatever the dtype.
#include "subspace/jacobi.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <vector>

#include "common/cpu.h"
#include "common/tasks_cpu.h"
#include "subspace/lowrank_doors.h"

namespace fastunlearn {
namespace {

using Vector = VectorOf<double>::type;
inline constexpr int kLanes = VectorOf<double>::kLanes;

struct PairSums {
  double aa, bb, ab;
};

// Rows are padded to whole vectors with zeros.
FASTUNLEARN_CPU_CLONES
PairSums pair_sums(const double* a, const double* b, int64_t padded) {
  Vector aa = {}, bb = {}, ab = {};
  for (int64_t i = 0; i < padded; i += kLanes) {
    const Vector x = *reinterpret_cast<const Vector*>(a + i);
    const Vector y = *reinterpret_cast<const Vector*>(b + i);
    aa += x * x;
    bb += y * y;
    ab += x * y;
  }
  PairSums sums{};
  for (int lane = 0; lane < kLanes; ++lane) {
    sums.aa += aa[lane];
    sums.bb += bb[lane];
    sums.ab += ab[lane];
  }
  return sums;
}

FASTUNLEARN_CPU_CLONES
void rotate_rows(double* a, double* b, int64_t padded, double cosine, double sine) {
  for (int64_t i = 0; i < padded; i += kLanes) {
    auto* x = reinterpret_cast<Vector*>(a + i);
    auto* y = reinterpret_cast<Vector*>(b + i);
    const Vector turned = *x * cosine - *y * sine;
    *y = *x * sine + *y * cosine;
    *x = turned;
  }
}

// Returns the sweeps taken, -1 where kMaxSweeps did not suffice.
int64_t orthogonalise(double* rows, double* rotation, int32_t k, int64_t padded) {
  if (k < 2) return 0;
  const int32_t players = k + k % 2;
  for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
    const double tolerance = jacobi_tolerance<double>(sweep);
    bool turned = false;
    for (int32_t round = 0; round < players - 1; ++round) {
      for (int32_t index = 0; index < players / 2; ++index) {
        const RowPair pair = tournament_pair(round, index, players);
        if (pair.second >= k) continue;
        double* a = rows + pair.first * padded;
        double* b = rows + pair.second * padded;
        const PairSums sums = pair_sums(a, b, padded);
        if (!(std::fabs(sums.ab) > tolerance * std::sqrt(sums.aa) * std::sqrt(sums.bb))) continue;
        turned = true;
        const double zeta = (sums.bb - sums.aa) / (2 * sums.ab);
        const double tangent =
            std::copysign(1.0, zeta) / (std::fabs(zeta) + std::sqrt(1 + zeta * zeta));
        const double cosine = 1 / std::sqrt(1 + tangent * tangent);
        rotate_rows(a, b, padded, cosine, cosine * tangent);
        if (rotation) {
          rotate_rows(rotation + pair.first * padded, rotation + pair.second * padded, padded,
                      cosine, cosine * tangent);
        }
      }
    }
    if (!turned) return sweep + 1;
  }
  return -1;
}

template <typename T>
void orthogonal_rows(const Tensor& rows, const std::optional<Tensor>& rotation,
                     const Tensor& sweeps) {
  const int64_t k = rows.size(1);
  const int64_t padded = (k + kLanes - 1) / kLanes * kLanes;
  T* data = static_cast<T*>(rows.mutable_data_ptr());
  T* turns = rotation ? static_cast<T*>(rotation->mutable_data_ptr()) : nullptr;
  auto* taken = static_cast<int64_t*>(sweeps.mutable_data_ptr());
  auto make_scratch = [&] { return std::vector<CacheLine>(2 * k * padded / kLanes); };
  for_each_task(rows.size(0), make_scratch, [&](std::vector<CacheLine>& scratch, int64_t i) {
    auto* a = reinterpret_cast<double*>(scratch.data());
    double* q = rotation ? a + k * padded : nullptr;
    for (int64_t r = 0; r < k; ++r) {
      for (int64_t c = 0; c < padded; ++c) {
        a[r * padded + c] = c < k ? static_cast<double>(data[(i * k + r) * k + c]) : 0;
        if (q) q[r * padded + c] = r == c;
      }
    }
    taken[i] = orthogonalise(a, q, static_cast<int32_t>(k), padded);
    for (int64_t r = 0; r < k; ++r) {
      for (int64_t c = 0; c < k; ++c) {
        data[(i * k + r) * k + c] = static_cast<T>(a[r * padded + c]);
        if (q) turns[(i * k + r) * k + c] = static_cast<T>(q[r * padded + c]);
      }
    }
  });
}

void orthogonal_rows_cpu(const Tensor& rows, const std::optional<Tensor>& rotation,
                         const Tensor& sweeps) {
  const JacobiDoor door(rows, rotation, sweeps);
  if (rows.size(1) == 0) return;
  if (rows.scalar_type() == ScalarType::Double)
    return orthogonal_rows<double>(rows, rotation, sweeps);
  orthogonal_rows<float>(rows, rotation, sweeps);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastunlearn, CPU, m) {
  m.impl("orthogonal_rows_", TORCH_BOX(&orthogonal_rows_cpu));
}

}  // namespace fastunlearn
