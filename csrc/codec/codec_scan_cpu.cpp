// Written once and compiled for the registers of three instruction sets.
#include "codec/codec_scan_cpu.h"

#include <algorithm>
#include <limits>
#include <type_traits>

#include "common/cpu.h"

namespace fastunlearn {
namespace {

template <typename T>
using LaneInteger = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

// A broadcast that stays in a register: the compiler would rather load it again for every use, and
// loads are what the loop below has too many of.
template <typename Vector>
FASTUNLEARN_INLINE Vector in_register(Vector value) {
#ifdef __AVX512F__
  __asm__("" : "+v"(value));
#endif
  return value;
}

// Least distance of one candidate to row `self`, lanes being rows: the rank behind it, 0 if none.
template <int kBytes, typename T>
FASTUNLEARN_INLINE T scan_column(const T* column, const T* distances, const T* ranks, int64_t rows,
                                 int64_t self) {
  using Vector = typename VectorOf<T, kBytes>::unaligned;
  typedef LaneInteger<T> Places __attribute__((vector_size(kBytes)));
  constexpr int kLanes = VectorOf<T, kBytes>::kLanes;
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  const T here = column[self];
  Vector best = kInfinity - Vector{};
  Places place = {}, step;
  for (int lane = 0; lane < kLanes; ++lane) step[lane] = lane;
  auto visit = [&](int64_t first, int64_t last) __attribute__((always_inline)) {
    int64_t j = first;
    for (; j + kLanes <= last; j += kLanes) {
      const Vector difference = *reinterpret_cast<const Vector*>(column + j) - here;
      const Vector joined =
          difference * difference + *reinterpret_cast<const Vector*>(distances + j);
      const auto closer = joined < best;
      best = closer ? joined : best;
      place = closer ? step + static_cast<LaneInteger<T>>(j) : place;
    }
    for (; j < last; ++j) {  // into lane 0, whose places so far are smaller
      const T joined = (column[j] - here) * (column[j] - here) + distances[j];
      if (joined < best[0]) {
        best[0] = joined;
        place[0] = static_cast<LaneInteger<T>>(j);
      }
    }
  };
  visit(0, self);
  visit(self + 1, rows);
  T least = best[0];
  LaneInteger<T> nearest = place[0];
  for (int lane = 1; lane < kLanes; ++lane) {
    if (best[lane] < least || (best[lane] == least && place[lane] < nearest)) {
      least = best[lane];
      nearest = place[lane];
    }
  }
  return least < kInfinity ? ranks[nearest] : T{0};
}

template <int kParts, int kBytes, typename T>
FASTUNLEARN_INLINE void scan_tile(const CodecScan<T>& scan, int64_t first, int64_t last,
                                  int64_t* sums) {
  using Vector = typename VectorOf<T, kBytes>::type;
  typedef LaneInteger<T> Integers __attribute__((vector_size(kBytes)));
  constexpr int kLanes = VectorOf<T, kBytes>::kLanes;
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  const NearLists<T>& near = scan.near;
  Integers total[kParts] = {};
  for (int64_t visit = first; visit < last; ++visit) {
    const int64_t i = scan.order[visit];
    const auto* own = reinterpret_cast<const Vector*>(scan.tile) + i * kParts;
    Vector here[kParts], best[kParts], best_rank[kParts];
    for (int v = 0; v < kParts; ++v) {
      here[v] = own[v];
      best[v] = kInfinity - Vector{};
      best_rank[v] = Vector{};
    }
    const int32_t* rows = near.rows + i * near.capacity;
    const T* distances = near.distances + i * near.capacity;
    const T radius = near.radii[i];
    const int64_t count = radius < 0 ? 0 : near.counts[i];
    for (int64_t e = 0; e < count; ++e) {
      const int64_t j = rows[e];
      const auto* at = reinterpret_cast<const Vector*>(scan.tile) + j * kParts;
      const Vector distance = distances[e] - Vector{};
      const Vector rank = in_register(scan.ranks[j] - Vector{});
      for (int v = 0; v < kParts; ++v) {
        const Vector difference = at[v] - here[v];
        const Vector joined = difference * difference + distance;
        const auto closer = joined < best[v];
        best[v] = closer ? joined : best[v];
        best_rank[v] = closer ? rank : best_rank[v];
      }
    }
    Integers open = {};
    for (int v = 0; v < kParts; ++v) open |= ~(best[v] <= radius);
    LaneInteger<T> any = 0;
    for (int lane = 0; lane < kLanes; ++lane) any |= open[lane];
    if (any) {
      T* nearest = reinterpret_cast<T*>(best);
      T* nearest_rank = reinterpret_cast<T*>(best_rank);
      for (int64_t lane = 0; lane < kParts * kLanes; ++lane) {
        if (nearest[lane] <= radius) continue;
        nearest_rank[lane] =
            scan_column<kBytes>(scan.columns + lane * scan.rows, scan.distances + i * scan.rows,
                                scan.ranks, scan.rows, i);
      }
    }
    const Vector rank = scan.ranks[i] - Vector{};
    for (int v = 0; v < kParts; ++v) {
      const Vector lower = best_rank[v] < rank ? best_rank[v] : rank;
      total[v] += __builtin_convertvector(lower, Integers);
    }
  }
  for (int v = 0; v < kParts; ++v) {
    for (int lane = 0; lane < kLanes; ++lane) sums[v * kLanes + lane] += total[v][lane];
  }
}

template <int kBytes, typename T>
FASTUNLEARN_INLINE void scan_any(const CodecScan<T>& scan, int vectors, int64_t first, int64_t last,
                                 int64_t* sums) {
  constexpr int kSplit = kCodecVectorBytes / kBytes;
  switch (vectors) {
    case 1:
      return scan_tile<1 * kSplit, kBytes>(scan, first, last, sums);
    case 2:
      return scan_tile<2 * kSplit, kBytes>(scan, first, last, sums);
    case 3:
      return scan_tile<3 * kSplit, kBytes>(scan, first, last, sums);
    default:
      return scan_tile<4 * kSplit, kBytes>(scan, first, last, sums);
  }
}

template <typename T>
FASTUNLEARN_INLINE int64_t count_within(const T* values, int64_t count, T bound) {
  LaneInteger<T> within = 0;
  for (int64_t j = 0; j < count; ++j) within += values[j] <= bound;
  return within;
}

template <typename T>
FASTUNLEARN_INLINE void flag_within(const T* values, int64_t count, T bound, uint8_t* flags) {
  for (int64_t j = 0; j < count; ++j) flags[j] = values[j] <= bound;
}

template <typename T>
FASTUNLEARN_INLINE void line_ranks(const T* values, const int32_t* ranks, int64_t count,
                                   int32_t* lower, uint8_t* unclear) {
  for (int64_t k = 0; k < count; ++k) {
    const T below = values[k + 2] - values[k + 1], above = values[k + 3] - values[k + 2];
    const int32_t neighbour = below < above ? ranks[k + 1] : ranks[k + 3];
    lower[k] = neighbour < ranks[k + 2] ? neighbour : ranks[k + 2];
    // Of values that occur twice the first row counts: the one above is that, the one below is not.
    // Written so that NaN, the difference of infinities, is unclear too.
    unclear[k] = !((below < above) | (above < below)) | !(below > 0) | !(above > 0) |
                 (values[k] == values[k + 1]);
  }
}

template <typename T>
FASTUNLEARN_INLINE int64_t join_feature(T* row, const T* column, int64_t count, int64_t self) {
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  const T here = column[self];
  for (int64_t j = 0; j < count; ++j) row[j] += (column[j] - here) * (column[j] - here);
  // Blocks first: the minimum of a block is a vector loop, its place is looked up once.
  constexpr int64_t kBlock = 64;
  const T own = row[self];
  row[self] = kInfinity;
  T least = kInfinity;
  int64_t block = -1;
  for (int64_t start = 0; start < count; start += kBlock) {
    T lowest[kBlock];
    const int64_t size = std::min(kBlock, count - start);
    for (int64_t j = 0; j < kBlock; ++j) {
      const T value = j < size ? row[start + j] : kInfinity;
      lowest[j] = value < kInfinity ? value : kInfinity;  // NaN would hide what it is compared with
    }
    for (int64_t half = kBlock / 2; half > 0; half /= 2) {
      for (int64_t j = 0; j < half; ++j)
        lowest[j] = lowest[j + half] < lowest[j] ? lowest[j + half] : lowest[j];
    }
    if (lowest[0] < least) {
      least = lowest[0];
      block = start;
    }
  }
  int64_t nearest = block;
  while (nearest >= 0 && row[nearest] != least) ++nearest;
  row[self] = own;
  return nearest;
}

}  // namespace

#define FASTUNLEARN_CODEC(attribute, T, bytes)                                            \
  attribute void codec_scan_version(const CodecScan<T>& scan, int vectors, int64_t first, \
                                    int64_t last, int64_t* sums) {                        \
    scan_any<bytes>(scan, vectors, first, last, sums);                                    \
  }
#ifdef FASTUNLEARN_CPU_VERSIONS
FASTUNLEARN_CODEC(__attribute__((target("arch=x86-64-v4"))), float, 64)
FASTUNLEARN_CODEC(__attribute__((target("arch=x86-64-v4"))), double, 64)
FASTUNLEARN_CODEC(__attribute__((target("arch=x86-64-v3"))), float, 32)
FASTUNLEARN_CODEC(__attribute__((target("arch=x86-64-v3"))), double, 32)
FASTUNLEARN_CODEC(__attribute__((target("default"))), float, 16)
FASTUNLEARN_CODEC(__attribute__((target("default"))), double, 16)
#else
FASTUNLEARN_CODEC(, float, 16)
FASTUNLEARN_CODEC(, double, 16)
#endif
#undef FASTUNLEARN_CODEC

void codec_scan_cpu(const CodecScan<float>& scan, int vectors, int64_t first, int64_t last,
                    int64_t* sums) {
  codec_scan_version(scan, vectors, first, last, sums);
}

void codec_scan_cpu(const CodecScan<double>& scan, int vectors, int64_t first, int64_t last,
                    int64_t* sums) {
  codec_scan_version(scan, vectors, first, last, sums);
}

FASTUNLEARN_CPU_CLONES
int64_t count_within_cpu(const float* values, int64_t count, float bound) {
  return count_within(values, count, bound);
}

FASTUNLEARN_CPU_CLONES
int64_t count_within_cpu(const double* values, int64_t count, double bound) {
  return count_within(values, count, bound);
}

FASTUNLEARN_CPU_CLONES
void flag_within_cpu(const float* values, int64_t count, float bound, uint8_t* flags) {
  flag_within(values, count, bound, flags);
}

FASTUNLEARN_CPU_CLONES
void flag_within_cpu(const double* values, int64_t count, double bound, uint8_t* flags) {
  flag_within(values, count, bound, flags);
}

FASTUNLEARN_CPU_CLONES
void line_ranks_cpu(const float* values, const int32_t* ranks, int64_t count, int32_t* lower,
                    uint8_t* unclear) {
  line_ranks(values, ranks, count, lower, unclear);
}

FASTUNLEARN_CPU_CLONES
void line_ranks_cpu(const double* values, const int32_t* ranks, int64_t count, int32_t* lower,
                    uint8_t* unclear) {
  line_ranks(values, ranks, count, lower, unclear);
}

FASTUNLEARN_CPU_CLONES
int64_t join_feature_cpu(float* row, const float* column, int64_t count, int64_t self) {
  return join_feature(row, column, count, self);
}

FASTUNLEARN_CPU_CLONES
int64_t join_feature_cpu(double* row, const double* column, int64_t count, int64_t self) {
  return join_feature(row, column, count, self);
}

}  // namespace fastunlearn
