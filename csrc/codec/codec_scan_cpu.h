// The inner loops of codec_scores on a CPU: lanes are candidates, so that a row j is read as a
// whole and the distances over the chosen features are shared by all of them.
//
// A candidate only adds distance. So if the nearest of the rows within a radius of row i is, with
// the candidate, still within it, no row outside can beat or equal it. Most pairs of a row and a
// candidate settle on the list of the row's nearest; the few that do not scan all rows, lanes being
// rows then. The answer is exactly the full scan's.
#pragma once

#include <cstdint>

namespace fastunlearn {

inline constexpr int kCodecVectorBytes = 64;  // of candidates; a tile has 1 to kCodecVectors
inline constexpr int kCodecVectors = 4;
template <typename T>
inline constexpr int kCodecLanes = kCodecVectorBytes / static_cast<int>(sizeof(T));

// Per row i the rows within radii[i], i itself left out, in order of index.
template <typename T>
struct NearLists {
  int64_t capacity;  // places per list
  T* distances;      // [n, capacity]
  int32_t* rows;     // [n, capacity]
  int32_t* counts;   // [n]
  T* radii;          // [n]; -1 where too many rows are equally near for a list
};

template <typename T>
struct CodecScan {
  NearLists<T> near;
  const T* distances;    // [n, n]
  const T* ranks;        // [n]
  const int32_t* order;  // [n]: rows as they are visited, near ones close together
  const T* tile;         // [n, vectors, lanes]: the candidates of this tile, 64-byte aligned
  const T* columns;      // [vectors * lanes, n]: the same, a candidate after the other
  int64_t rows;
};

// Visits first to last of scan.order: sums[lane] += min(R_i, R_M(i)) for every lane of the tile.
void codec_scan_cpu(const CodecScan<float>& scan, int vectors, int64_t first, int64_t last,
                    int64_t* sums);
void codec_scan_cpu(const CodecScan<double>& scan, int vectors, int64_t first, int64_t last,
                    int64_t* sums);

// How many of values[0, count) are no larger than bound.
int64_t count_within_cpu(const float* values, int64_t count, float bound);
int64_t count_within_cpu(const double* values, int64_t count, double bound);

// flags[j] = values[j] <= bound.
void flag_within_cpu(const float* values, int64_t count, float bound, uint8_t* flags);
void flag_within_cpu(const double* values, int64_t count, double bound, uint8_t* flags);

// Sorted values[2 .. count + 1], two of -infinity before and one of +infinity behind, with the
// ranks of their rows: lower[k] is the lesser of a row's rank and of its nearer neighbour's.
// unclear[k]: both are equally near, or one of the values occurs twice, or is not finite.
void line_ranks_cpu(const float* values, const int32_t* ranks, int64_t count, int32_t* lower,
                    uint8_t* unclear);
void line_ranks_cpu(const double* values, const int32_t* ranks, int64_t count, int32_t* lower,
                    uint8_t* unclear);

// row[j] += (column[j] - here)^2 for all j; the least j != self of the least sum, -1 if none is
// finite.
int64_t join_feature_cpu(float* row, const float* column, int64_t count, int64_t self);
int64_t join_feature_cpu(double* row, const double* column, int64_t count, int64_t self);

}  // namespace fastunlearn
