// codec_scores: conditional dependence T(Y, candidate | chosen) of every candidate feature.
//
// Row i's nearest neighbour M(i) with a candidate x joined is the j that minimises
// distances[i, j] + (x_i - x_j)^2, since squared distances add up over features; what the score
// needs of it is min(R_i, R_M(i)). Those are integers, so their sums are exact in any order, and
// every way of cutting the work gives the same bits. Of equally near rows the lowest counts; a row
// that has none at a finite distance counts 0.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/host_device.h"

namespace fastunlearn {

// T from S = sum_i min(R_i, R_M(i)). Something chosen: (S - sum B) / sum(R - B), with
// B_i = min(R_i, R_N(i)). Nothing chosen: (n S - sum L^2) / sum L (n - L), with L_i the number of
// y_j >= y_i. A denominator of 0 leaves nothing to explain: 0.
struct CodecFormula {
  int64_t scale, offset, denominator;
};

// The sums behind the formula, row by row. `base` is B where something is chosen, else L.
FASTUNLEARN_HOST_DEVICE void add_row(CodecFormula& sums, bool chosen, int64_t n, int64_t rank,
                                     int64_t base) {
  sums.offset += chosen ? base : base * base;
  sums.denominator += chosen ? rank - base : base * (n - base);
}

FASTUNLEARN_HOST_DEVICE double codec_score(const CodecFormula& formula, int64_t sum) {
  if (formula.denominator == 0) return 0;
  return static_cast<double>(formula.scale * sum - formula.offset) /
         static_cast<double>(formula.denominator);
}

// ---- CUDA: a thread owns pairs of a row and a candidate, and walks over all rows j.
inline constexpr int kCodecWarps = 8;     // of a block: each has other rows ...
inline constexpr int kCodecSteps = 16;    // ... and all share tiles of so many rows j
inline constexpr int kLineThreads = 512;  // of the block that sorts one feature
inline constexpr int kFormulaThreads = 256;

// Pairs of a thread: x_i, the least distance and the rank behind it are 96 registers (80 for
// double). Candidates of neighbouring lanes are neighbours in memory: 16 bytes each.
template <typename Scalar>
struct CodecTile {
  static constexpr int kRows = 8;
  static constexpr int kCandidates = 16 / static_cast<int>(sizeof(Scalar));
  static constexpr int kBlockRows = kCodecWarps * kRows;
  static constexpr int kBlockCandidates = 32 * kCandidates;
};

template <typename Scalar>
struct CodecParams {
  const Scalar* features;    // [rows, candidates]
  const int32_t* rank;       // [rows]
  const Scalar* distances;   // [rows, rows], symmetric; its diagonal does not count
  unsigned long long* sums;  // [candidates], zero beforehand
  int64_t rows, candidates, row_blocks;
};

template <typename Scalar>
struct CodecLineParams {
  const Scalar* features;    // [rows, candidates]
  const int32_t* rank;       // [rows]
  const bool* wanted;        // [candidates]
  unsigned long long* sums;  // [candidates]
  void* workspace;           // [blocks, line_bytes], or null: a line is in shared memory
  int64_t rows, candidates;
  int32_t padded;  // rows, rounded up to a power of two
};

// Keys and rows of one feature.
FASTUNLEARN_HOST_DEVICE int64_t line_bytes(int64_t padded, int64_t element_bytes) {
  return padded * (element_bytes + static_cast<int64_t>(sizeof(int32_t)));
}

struct LinePlan {
  int32_t padded = 1;
  int64_t blocks = 0, shared_bytes = 0, workspace_bytes = 0;
};

// A feature in shared memory if it fits; else a few blocks go through all features in a workspace
// that stays in L2.
inline LinePlan plan_line(int64_t rows, int64_t candidates, int64_t element_bytes,
                          int64_t multiprocessors, int64_t max_shared_bytes) {
  constexpr int64_t kStaticBytes = 1024;  // more than the kernel's own shared arrays
  LinePlan plan;
  while (plan.padded < rows) plan.padded *= 2;
  const int64_t bytes = line_bytes(plan.padded, element_bytes);
  if (bytes <= max_shared_bytes - kStaticBytes) {
    plan.blocks = candidates;
    plan.shared_bytes = bytes;
  } else {
    plan.blocks = std::min(candidates, 2 * multiprocessors);
    plan.workspace_bytes = plan.blocks * bytes;
  }
  return plan;
}

struct CodecFinishParams {
  double* scores;                  // [candidates]
  const unsigned long long* sums;  // [candidates]
  const int32_t* rank_terms;       // [2, rows]
  const bool* wanted;              // [candidates]
  int64_t rows, candidates;
  bool chosen;
};

}  // namespace fastunlearn
