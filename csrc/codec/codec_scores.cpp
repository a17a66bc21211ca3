// codec_scores on a CPU: sorted lines while nothing is chosen, then lists of near rows.
#include "codec/codec_scores.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "codec/codec_scan_cpu.h"
#include "codec/doors.h"
#include "codec/line.h"
#include "common/cpu.h"
#include "common/tasks_cpu.h"

namespace fastunlearn {
namespace {

// ---- nothing chosen

// One feature's keys and rows, sorted by least significant digit first: stable, so that rows stay
// in order among equal keys.
template <typename Key>
class SortedLine {
 public:
  explicit SortedLine(int64_t rows)
      : count_(rows), keys_(rows), rows_(rows), other_keys_(rows), other_rows_(rows) {}

  Key* keys() { return keys_.data(); }
  const int32_t* rows() const { return rows_.data(); }

  void sort() {
    constexpr int kDigits = sizeof(Key), kBins = 256;
    int32_t counts[kDigits][kBins] = {};
    for (int64_t i = 0; i < count_; ++i) {
      rows_[i] = static_cast<int32_t>(i);
      for (int d = 0; d < kDigits; ++d) ++counts[d][keys_[i] >> (8 * d) & 0xff];
    }
    for (int d = 0; d < kDigits; ++d) {
      if (counts[d][keys_[0] >> (8 * d) & 0xff] == count_) continue;  // all alike in this digit
      int32_t place = 0;
      for (int bin = 0; bin < kBins; ++bin) {
        const int32_t here = counts[d][bin];
        counts[d][bin] = place;
        place += here;
      }
      for (int64_t i = 0; i < count_; ++i) {
        const int32_t to = counts[d][keys_[i] >> (8 * d) & 0xff]++;
        other_keys_[to] = keys_[i];
        other_rows_[to] = rows_[i];
      }
      keys_.swap(other_keys_);
      rows_.swap(other_rows_);
    }
  }

 private:
  int64_t count_;
  std::vector<Key> keys_;
  std::vector<int32_t> rows_;
  std::vector<Key> other_keys_;
  std::vector<int32_t> other_rows_;
};

constexpr int64_t kLineColumns = 16;  // sorted per task: whole cache lines of the feature matrix

template <typename T>
void score_lines(const CodecScoresDoor& door, int64_t* sums) {
  const auto* features = static_cast<const T*>(door.features.const_data_ptr());
  const int64_t n = door.rows, p = door.columns;
  const int32_t* rank = door.rank();
  struct Scratch {
    explicit Scratch(int64_t rows) : line(rows), keys(kLineColumns * rows) {}
    SortedLine<LineKey<T>> line;
    std::vector<LineKey<T>> keys;  // [kLineColumns, n]
  };
  for_each_task((p + kLineColumns - 1) / kLineColumns, [&] { return Scratch(n); },
                [&](Scratch& scratch, int64_t task) {
                  const int64_t first = task * kLineColumns,
                                last = std::min(p, first + kLineColumns);
                  for (int64_t i = 0; i < n; ++i) {
                    for (int64_t c = first; c < last; ++c)
                      scratch.keys[(c - first) * n + i] = line_key(features[i * p + c]);
                  }
                  for (int64_t c = first; c < last; ++c) {
                    if (!door.wanted()[c]) continue;
                    const LineKey<T>* column = scratch.keys.data() + (c - first) * n;
                    std::copy(column, column + n, scratch.line.keys());
                    scratch.line.sort();
                    int64_t sum = 0;
                    for (int place = 0; place < n; ++place) {
                      const int nearest = nearest_on_line<T>(
                          scratch.line.keys(), scratch.line.rows(), static_cast<int>(n), place);
                      if (nearest >= 0)
                        sum += std::min(rank[scratch.line.rows()[place]], rank[nearest]);
                    }
                    sums[c] = sum;
                  }
                });
}

// ---- something chosen

// The lists of the nearest rows of every row, in storage of their own.
template <typename T>
class NearRows {
 public:
  NearRows(const T* distances, int64_t rows) : rows_(rows) {
    // Joined with a feature as wide as the one behind the distances, the nearest of n uniform
    // points is farther than the first k in one case of e^(pi k^2 / 4n): 27,000 at k = sqrt(13 n).
    wanted_ = std::min(rows - 1, static_cast<int64_t>(std::sqrt(13.0 * static_cast<double>(rows))));
    most_ = wanted_ + wanted_ / 4;
    lists_.capacity = most_ + 1;  // the last place takes what is not kept
    distances_ = std::make_unique_for_overwrite<T[]>(rows * lists_.capacity);
    places_ = std::make_unique_for_overwrite<int32_t[]>(rows * lists_.capacity);
    counts_.resize(rows);
    radii_.resize(rows);
    lists_.distances = distances_.get();
    lists_.rows = places_.get();
    lists_.counts = counts_.data();
    lists_.radii = radii_.data();
    torch::stable::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
      T radius{1};
      for (int64_t i = begin; i < end; ++i) fill(i, distances + i * rows, radius);
    });
  }

  const NearLists<T>& lists() const { return lists_; }

 private:
  // Row i's list, of wanted_ to most_ rows. The search begins and ends at `radius`.
  void fill(int64_t i, const T* distances, T& radius) {
    using Key = LineKey<T>;
    constexpr Key kFactorTwo = Key{1} << (sizeof(T) == 8 ? 52 : 23);
    // Bits of distances sort as they do, so that a bisection of them ends, whatever their scale.
    const Key top = bits_of(std::numeric_limits<T>::max());
    Key low = 0, high = top, middle = bits_of(radius);
    for (;;) {
      const T bound = number_of(middle);
      const int64_t within = count_within_cpu(distances, rows_, bound) - (distances[i] <= bound);
      const bool many = within > most_, few = within < wanted_;
      if ((many && middle > low) || (few && middle < high)) {
        if (many) {
          high = middle;
        } else {
          low = middle + 1;
        }
        if (low > 0 && high < top) {
          middle = low + (high - low) / 2;
        } else {  // one side is still open
          middle =
              many ? middle - std::min(middle, kFactorTwo) : std::min(middle + kFactorTwo, top);
        }
        continue;
      }
      lists_.radii[i] = many ? T{-1} : bound;
      lists_.counts[i] = many ? 0 : static_cast<int32_t>(within);
      if (many) return;
      radius = bound;
      break;
    }
    int32_t* places = lists_.rows + i * lists_.capacity;
    int64_t count = 0;
    auto append = [&](int64_t first, int64_t last) {
      for (int64_t j = first; j < last; ++j) {  // no branch: what is not kept is written over
        places[count] = static_cast<int32_t>(j);
        count += distances[j] <= radius;
      }
    };
    append(0, i);
    append(i + 1, rows_);
    for (int64_t e = 0; e < count; ++e)
      lists_.distances[i * lists_.capacity + e] = distances[places[e]];
  }

  int64_t rows_, wanted_, most_;
  NearLists<T> lists_;
  std::unique_ptr<T[]> distances_;
  std::unique_ptr<int32_t[]> places_;
  std::vector<int32_t> counts_;
  std::vector<T> radii_;
};

template <typename T>
void score_joined(const CodecScoresDoor& door, int64_t* sums) {
  const auto* features = static_cast<const T*>(door.features.const_data_ptr());
  const int64_t n = door.rows, p = door.columns;
  const std::vector<T> ranks(door.rank(), door.rank() + n);
  const auto* distances = static_cast<const T*>(door.distances->const_data_ptr());
  const NearRows<T> near(distances, n);
  // Rows equally far from the first one are visited together: with one feature chosen, or two,
  // their lists then share most of their rows, which stay in the cache.
  std::vector<int32_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    const LineKey<T> x = line_key(distances[a]), y = line_key(distances[b]);  // also with NaN
    return x < y || (x == y && a < b);
  });

  constexpr int64_t kLanes = kCodecLanes<T>, kWidth = kCodecVectors * kLanes;
  const int64_t tiles = (p + kWidth - 1) / kWidth;
  // Few tiles are cut by rows as well, so that all threads have enough of them.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t pieces = std::clamp<int64_t>((8 * threads + tiles - 1) / tiles, 1, (n + 63) / 64);
  const int64_t piece = (n + pieces - 1) / pieces;
  struct Scratch {
    std::vector<CacheLine> tile;
    std::vector<T> columns;
    int64_t packed = -1;
  };
  for_each_task(
      tiles * pieces, [] { return Scratch{}; },
      [&](Scratch& scratch, int64_t task) {
        const int64_t first = task / pieces * kWidth;
        const int64_t width = std::min(kWidth, p - first);
        const bool* wanted = door.wanted() + first;
        if (std::none_of(wanted, wanted + width, [](bool one) { return one; })) return;
        const auto vectors = static_cast<int>((width + kLanes - 1) / kLanes);
        const int64_t stride = vectors * kLanes;
        if (scratch.packed != first) {
          scratch.tile.resize(n * vectors);
          scratch.columns.resize(n * stride);
          auto* tile = reinterpret_cast<T*>(scratch.tile.data());
          constexpr int64_t kBlock = 64 / sizeof(T);  // rows: a cache line of every column
          for (int64_t start = 0; start < n; start += kBlock) {
            const int64_t end = std::min(n, start + kBlock);
            for (int64_t i = start; i < end; ++i) {
              // The lanes left over repeat the last candidate: zeros would all be equally near.
              T* to = std::copy_n(features + i * p + first, width, tile + i * stride);
              std::fill(to, tile + (i + 1) * stride, to[-1]);
            }
            for (int64_t c = 0; c < stride; ++c) {
              for (int64_t i = start; i < end; ++i)
                scratch.columns[c * n + i] = tile[i * stride + c];
            }
          }
          scratch.packed = first;
        }
        const CodecScan<T> scan{near.lists(),
                                distances,
                                ranks.data(),
                                order.data(),
                                reinterpret_cast<const T*>(scratch.tile.data()),
                                scratch.columns.data(),
                                n};
        int64_t lane_sums[kWidth] = {};
        const int64_t begin = task % pieces * piece;
        codec_scan_cpu(scan, vectors, begin, std::min(n, begin + piece), lane_sums);
        for (int64_t c = 0; c < width; ++c)
          __atomic_fetch_add(sums + first + c, lane_sums[c], __ATOMIC_RELAXED);
      });
}

void codec_scores_cpu(const Tensor& scores, const Tensor& features, const Tensor& rank_terms,
                      const std::optional<Tensor>& distances, const Tensor& candidates) {
  const CodecScoresDoor door(scores, features, rank_terms, distances, candidates);
  std::vector<int64_t> sums(door.columns);
  const bool wide = features.scalar_type() == ScalarType::Double;
  if (door.distances) {
    wide ? score_joined<double>(door, sums.data()) : score_joined<float>(door, sums.data());
  } else {
    wide ? score_lines<double>(door, sums.data()) : score_lines<float>(door, sums.data());
  }
  const bool chosen = door.distances.has_value();
  CodecFormula formula{chosen ? 1 : door.rows, 0, 0};
  for (int64_t i = 0; i < door.rows; ++i)
    add_row(formula, chosen, door.rows, door.rank()[i], door.base()[i]);
  auto* out = static_cast<double*>(scores.mutable_data_ptr());
  for (int64_t c = 0; c < door.columns; ++c) {
    out[c] =
        door.wanted()[c] ? codec_score(formula, sums[c]) : -std::numeric_limits<double>::infinity();
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastunlearn, CPU, m) {
  m.impl("codec_scores_", TORCH_BOX(&codec_scores_cpu));
}

}  // namespace fastunlearn
