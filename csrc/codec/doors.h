// The doors of the codec operators: checks, shapes, contiguous inputs.
#pragma once

#include <optional>

#include "common/check.h"

namespace fastunlearn {

// 46,340^2 < 2^31: sums of ranks over the rows fit int32 lanes, and n^3 int64.
inline constexpr int64_t kCodecMaxRows = 46340;

// [n, n], float32 or float64.
inline void check_distances(const char* op, const Tensor& distances) {
  check(is_real(distances) && distances.dim() == 2 && distances.size(0) == distances.size(1), op,
        ": distances is ", describe(distances), "; expected float32 or float64 [n, n]");
}

inline void check_rank_terms(const char* op, const Tensor& terms, int64_t rows,
                             const Tensor& beside) {
  check(terms.scalar_type() == ScalarType::Int && terms.dim() == 2 && terms.size(0) == 2 &&
            terms.size(1) == rows && same_device(terms, beside),
        op, ": rank_terms is ", describe(terms), ", expected int32 [2, ", rows, "] beside ",
        describe(beside));
}

struct CodecScoresDoor {
  Tensor features, rank_terms, candidates;
  std::optional<Tensor> distances;
  int64_t rows, columns;

  CodecScoresDoor(const Tensor& scores, const Tensor& features_, const Tensor& rank_terms_,
                  const std::optional<Tensor>& distances_, const Tensor& candidates_)
      : features(features_), rank_terms(rank_terms_), candidates(candidates_) {
    constexpr const char* op = "codec_scores";
    check(is_real(features) && features.dim() == 2, op, ": features is ", describe(features),
          "; expected float32 or float64 [n, p]");
    rows = features.size(0);
    columns = features.size(1);
    check(rows >= 2 && rows <= kCodecMaxRows, op, ": features is ", describe(features), "; 2 to ",
          kCodecMaxRows, " rows are needed");
    check_rank_terms(op, rank_terms, rows, features);
    check(candidates.scalar_type() == ScalarType::Bool && candidates.dim() == 1 &&
              candidates.size(0) == columns && same_device(candidates, features),
          op, ": candidates is ", describe(candidates), ", expected bool [", columns, "] beside ",
          describe(features));
    check_output(op, "scores", scores);
    check(scores.scalar_type() == ScalarType::Double && scores.dim() == 1 &&
              scores.size(0) == columns && same_device(scores, features),
          op, ": scores is ", describe(scores), ", expected float64 [", columns, "] beside ",
          describe(features));
    if (distances_) {
      check_distances(op, *distances_);
      check(distances_->scalar_type() == features.scalar_type() && distances_->size(0) == rows &&
                same_device(*distances_, features),
            op, ": distances is ", describe(*distances_), " but features ", describe(features),
            "; they must have one dtype, number of rows and device");
      distances = torch::stable::contiguous(*distances_);
    }
    features = torch::stable::contiguous(features);
    rank_terms = torch::stable::contiguous(rank_terms);
    candidates = torch::stable::contiguous(candidates);
    for (const Tensor* input : {&features, &rank_terms, &candidates}) {
      check(!overlap(*input, scores), op, ": scores shares memory with an input; pass a copy");
    }
    check(!distances || !overlap(*distances, scores), op,
          ": scores shares memory with distances; pass a copy");
  }

  const int32_t* rank() const { return static_cast<const int32_t*>(rank_terms.const_data_ptr()); }
  const int32_t* base() const { return rank() + rows; }
  const bool* wanted() const { return static_cast<const bool*>(candidates.const_data_ptr()); }
};

struct CodecChooseDoor {
  Tensor column;
  int64_t rows;

  CodecChooseDoor(const Tensor& distances, const Tensor& rank_terms, const Tensor& column_) {
    constexpr const char* op = "codec_choose_";
    check_distances(op, distances);
    check_output(op, "distances", distances);
    rows = distances.size(0);
    check(rows >= 2 && rows <= kCodecMaxRows, op, ": distances is ", describe(distances), "; 2 to ",
          kCodecMaxRows, " rows are needed");
    check_rank_terms(op, rank_terms, rows, distances);
    check_output(op, "rank_terms", rank_terms);
    check(column_.scalar_type() == distances.scalar_type() && column_.dim() == 1 &&
              column_.size(0) == rows && same_device(column_, distances),
          op, ": column is ", describe(column_), " but distances ", describe(distances),
          "; expected one number per row, alike");
    column = torch::stable::contiguous(column_);
    check(!overlap(distances, rank_terms) && !overlap(column, distances) &&
              !overlap(column, rank_terms),
          op, ": distances, rank_terms and column share memory; pass copies");
  }
};

struct ColumnNoiseDoor {
  Tensor scales;
  int64_t rows, columns;

  ColumnNoiseDoor(const Tensor& values, const Tensor& scales_) {
    constexpr const char* op = "add_column_noise_";
    check(is_real(values) && values.dim() == 2, op, ": values is ", describe(values),
          "; expected float32 or float64 [n, p]");
    check_output(op, "values", values);
    rows = values.size(0);
    columns = values.size(1);
    check(scales_.scalar_type() == values.scalar_type() && scales_.dim() == 1 &&
              scales_.size(0) == columns && same_device(scales_, values),
          op, ": scales is ", describe(scales_), " but values ", describe(values),
          "; expected one number per column, alike");
    scales = torch::stable::contiguous(scales_);
    check(!overlap(scales, values), op, ": scales shares memory with values; pass a copy");
  }
};

}  // namespace fastunlearn
