// codec_scores on a CPU: sorted lines while nothing is chosen, then lists of near rows.
#include "codec/codec_scores.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <bit>
#include <cstring>
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

// Calls visit(place) for every flag that is 1, ascending. flags [count, padded to a multiple of 8].
template <typename Visit>
void for_each_flag(uint8_t* flags, int64_t count, const Visit& visit) {
  std::fill(flags + count, flags + (count + 7) / 8 * 8, uint8_t{0});
  for (int64_t start = 0; start < count; start += 8) {
    uint64_t word;  // eight flags; most words are 0 or nearly so
    std::memcpy(&word, flags + start, sizeof(word));
    if constexpr (std::endian::native == std::endian::big) word = __builtin_bswap64(word);
    for (; word != 0; word &= word - 1) visit(start + std::countr_zero(word) / 8);
  }
}

// ---- nothing chosen

// One feature's keys with their rows, sorted by least significant digit first: stable, so that rows
// stay in order among equal keys.
template <typename T>
class SortedLine {
 public:
  using Key = LineKey<T>;

  explicit SortedLine(int64_t rows)
      : count_(static_cast<int>(rows)),
        entries_(rows),
        other_(rows),
        keys_(rows),
        rows_(rows),
        values_(rows + 3),
        ranks_(rows + 3),
        lower_(rows),
        unclear_((rows + 7) / 8 * 8) {
    values_[0] = values_[1] = -std::numeric_limits<T>::infinity();
    values_[rows + 2] = std::numeric_limits<T>::infinity();
  }

  void set(int64_t row, T value) { entries_[row] = {line_key(value), static_cast<int32_t>(row)}; }

  // sum_i min(R_i, R_M(i)) of the feature that was set.
  int64_t sum_of_ranks(const int32_t* rank) {
    sort();
    for (int place = 0; place < count_; ++place) {
      keys_[place] = entries_[place].key;
      rows_[place] = entries_[place].row;
      values_[place + 2] = line_value<T>(entries_[place].key);
      ranks_[place + 2] = rank[entries_[place].row];
    }
    // The nearer of the two neighbours; which it is stays unclear among equals and beside infinity.
    int64_t sum = 0;
    line_ranks_cpu(values_.data(), ranks_.data(), count_, lower_.data(), unclear_.data());
    for (int place = 0; place < count_; ++place) sum += lower_[place];
    for_each_flag(unclear_.data(), count_, [&](int64_t place) {
      const int nearest =
          nearest_on_line<T>(keys_.data(), rows_.data(), count_, static_cast<int>(place));
      sum += (nearest < 0 ? 0 : std::min(ranks_[place + 2], rank[nearest])) - lower_[place];
    });
    return sum;
  }

 private:
  struct Entry {
    Key key;
    int32_t row;
  };

  void sort() {
    constexpr int kDigits = sizeof(Key), kBins = 256;
    int32_t counts[kDigits][kBins] = {};
    for (const Entry& entry : entries_) {
      for (int d = 0; d < kDigits; ++d) ++counts[d][entry.key >> (8 * d) & 0xff];
    }
    for (int d = 0; d < kDigits; ++d) {
      if (counts[d][entries_[0].key >> (8 * d) & 0xff] == count_) continue;  // all alike here
      int32_t place = 0;
      for (int bin = 0; bin < kBins; ++bin) {
        const int32_t here = counts[d][bin];
        counts[d][bin] = place;
        place += here;
      }
      for (const Entry& entry : entries_) other_[counts[d][entry.key >> (8 * d) & 0xff]++] = entry;
      entries_.swap(other_);
    }
  }

  int count_;
  std::vector<Entry> entries_, other_;
  std::vector<Key> keys_;
  std::vector<int32_t> rows_;
  std::vector<T> values_;       // [n + 3]: two of -infinity before, one of +infinity behind
  std::vector<int32_t> ranks_;  // [n + 3], of the rows in this order
  std::vector<int32_t> lower_;  // [n]: min(R_i, R_M(i))
  std::vector<uint8_t> unclear_;
};

constexpr int64_t kLineColumns = 8;  // sorted per task: parts of cache lines of the feature matrix

template <typename T>
void score_lines(const CodecScoresDoor& door, int64_t* sums) {
  const auto* features = static_cast<const T*>(door.features.const_data_ptr());
  const int64_t n = door.rows, p = door.columns;
  struct Scratch {
    explicit Scratch(int64_t rows) : line(rows), columns(kLineColumns * rows) {}
    SortedLine<T> line;
    std::vector<T> columns;  // [kLineColumns, n]
  };
  for_each_task((p + kLineColumns - 1) / kLineColumns, [&] { return Scratch(n); },
                [&](Scratch& scratch, int64_t task) {
                  const int64_t first = task * kLineColumns,
                                last = std::min(p, first + kLineColumns);
                  for (int64_t i = 0; i < n; ++i) {
                    for (int64_t c = first; c < last; ++c)
                      scratch.columns[(c - first) * n + i] = features[i * p + c];
                  }
                  for (int64_t c = first; c < last; ++c) {
                    if (!door.wanted()[c]) continue;
                    for (int64_t i = 0; i < n; ++i)
                      scratch.line.set(i, scratch.columns[(c - first) * n + i]);
                    sums[c] = scratch.line.sum_of_ranks(door.rank());
                  }
                });
}

// ---- something chosen

// The lists of the nearest rows of every row, in storage of their own.
template <typename T>
class NearRows {
 public:
  NearRows(const T* distances, const std::vector<int32_t>& order, int64_t rows, int64_t wanted)
      : rows_(rows), wanted_(wanted), most_(wanted + wanted / 4) {
    lists_.capacity = most_;
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
      std::vector<uint8_t> flags((rows + 7) / 8 * 8);
      for (int64_t visit = begin; visit < end; ++visit) {
        const int64_t i = order[visit];
        fill(i, distances + i * rows, radius, flags.data());
      }
    });
  }

  const NearLists<T>& lists() const { return lists_; }

 private:
  // Row i's list, of wanted_ to most_ rows. The search begins and ends at `radius`.
  void fill(int64_t i, const T* distances, T& radius, uint8_t* flags) {
    using Key = LineKey<T>;
    constexpr Key kFactorTwo = Key{1} << (sizeof(T) == 8 ? 52 : 23);
    // Bits of distances sort as they do, so that a bisection of them ends, whatever their scale.
    const Key top = bits_of(std::numeric_limits<T>::max());
    Key low = 0, high = top + 1, middle = bits_of(radius);  // open sides: 0 and infinity
    for (;;) {
      const T bound = number_of(middle);
      const int64_t within = count_within_cpu(distances, rows_, bound) - (distances[i] <= bound);
      const bool many = within > most_, few = within < wanted_;
      if ((many && middle > low) || (few && middle < top)) {
        if (many) {
          high = middle;
        } else {
          low = middle + 1;
        }
        if (low > 0 && high <= top) {
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
    flag_within_cpu(distances, rows_, radius, flags);
    flags[i] = 0;
    int64_t at = i * lists_.capacity;
    for_each_flag(flags, rows_, [&](int64_t j) {
      lists_.rows[at] = static_cast<int32_t>(j);
      lists_.distances[at++] = distances[j];
    });
  }

  int64_t rows_, wanted_, most_;
  NearLists<T> lists_;
  std::unique_ptr<T[]> distances_;
  std::unique_ptr<int32_t[]> places_;
  std::vector<int32_t> counts_;
  std::vector<T> radii_;
};

// How long the lists should be: the cheapest length for a sample of rows and candidates.
template <typename T>
int64_t list_length(const CodecScoresDoor& door, const T* features, const T* distances) {
  constexpr int64_t kRows = 8, kShortest = 8;
  // Measured with AVX-512 at n = 1,000 and 4,000, in units of a candidate's share of an entry.
  constexpr double kFullScan = 2;
  const int64_t n = door.rows, p = door.columns;
  const int64_t candidates = std::clamp<int64_t>(p / 16, 12, 64);
  std::vector<T> column(n), joined(n);
  std::vector<int64_t> needed;
  for (int64_t s = 0; s < candidates; ++s) {
    const int64_t c = (2 * s + 1) * p / (2 * candidates);
    for (int64_t i = 0; i < n; ++i) column[i] = features[i * p + c];
    for (int64_t r = 0; r < kRows; ++r) {
      const int64_t i = (2 * r + 1) * n / (2 * kRows);
      std::copy_n(distances + i * n, n, joined.data());
      const int64_t nearest = join_feature_cpu(joined.data(), column.data(), n, i);
      needed.push_back(nearest < 0 ? n : count_within_cpu(distances + i * n, n, joined[nearest]));
    }
  }
  std::sort(needed.begin(), needed.end());
  const auto samples = static_cast<double>(needed.size());
  int64_t best = kShortest;
  double least = kFullScan * static_cast<double>(n);
  for (size_t s = 0; s < needed.size(); ++s) {
    const double beyond = (samples - static_cast<double>(s)) / samples;  // this one still is
    const double cost =
        static_cast<double>(needed[s]) + beyond * kFullScan * static_cast<double>(n);
    if (cost < least) {
      least = cost;
      best = needed[s];
    }
  }
  return std::min(std::max(best, kShortest), n - 1);
}

template <typename T>
void score_joined(const CodecScoresDoor& door, int64_t* sums) {
  const auto* features = static_cast<const T*>(door.features.const_data_ptr());
  const int64_t n = door.rows, p = door.columns;
  const std::vector<T> ranks(door.rank(), door.rank() + n);
  const auto* distances = static_cast<const T*>(door.distances->const_data_ptr());
  // Rows equally far from the first one are visited together: with one feature chosen, or two,
  // their lists then share most of their rows, which stay in the cache.
  std::vector<int32_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    const LineKey<T> x = line_key(distances[a]), y = line_key(distances[b]);  // also with NaN
    return x < y || (x == y && a < b);
  });
  const NearRows<T> near(distances, order, n, list_length(door, features, distances));

  constexpr int64_t kLanes = kCodecLanes<T>, kWidth = kCodecVectors * kLanes;
  const int64_t tiles = (p + kWidth - 1) / kWidth;
  // Few tiles are cut by rows as well, so that all threads have enough of them.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t pieces = std::clamp<int64_t>((4 * threads + tiles - 1) / tiles, 1, (n + 63) / 64);
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
  if (door.columns == 0) return;
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
