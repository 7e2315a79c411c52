// The AMX tile instructions in plain C++, so that the AMX kernels run on any CPU.
//
// TDPBF16PS as its documentation has it: even and odd depths are summed apart, by fused
// multiply-adds in float32, and join at the end; rounding is to nearest even, denormal
// inputs and results count as zero, and MXCSR has no say. TDPBSUD is exact. What a CPU
// faults on (a tile that is not configured, shapes that do not fit) traps here too.
// Everything is static: it is part of the file that includes it.
#ifndef KTJAX_FFI_TILE_AMX_EMULATED_H_
#define KTJAX_FFI_TILE_AMX_EMULATED_H_

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "tile/tile_config.h"

namespace ktjax {
namespace {

struct TileState {
  TileConfig config{.palette = 0};
  alignas(64) uint8_t data[kTiles][kTileMaxRows][kTileRowBytes] = {};
};
thread_local TileState tile_state;

// A float32 result that is denormal becomes zero of the same sign; `value` is exact, or
// rounded to 53 bits, so that rounding it again to 24 gives what one rounding gives.
inline float RoundAndFlush(double value) {
  // What rounds to the least normal number with an unlimited exponent range stays.
  constexpr double kLeast = 0x1p-126 * (1 - 0x1p-25);
  const double zero = 0.0 * value;
  return static_cast<float>(std::fabs(value) < kLeast ? zero : value);
}

inline float Float32(uint32_t bits) {
  if ((bits & 0x7f800000u) == 0) bits &= 0x80000000u;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct EmulatedTiles {
  static void Configure(const TileConfig& config) {
    tile_state = TileState{config};
    for (int tile = 0; tile < kTiles; ++tile) {
      if (config.rows[tile] > kTileMaxRows || config.row_bytes[tile] > kTileRowBytes) {
        __builtin_trap();
      }
    }
  }
  static void Release() { tile_state = TileState{}; }

  template <int kTile>
  static void Zero() {
    CheckConfigured(kTile);
    std::memset(tile_state.data[kTile], 0, sizeof tile_state.data[kTile]);
  }
  template <int kTile, int kOffset = 0>
  static void Load(const void* base, ptrdiff_t stride) {
    Zero<kTile>();
    const char* src = static_cast<const char*>(base) + kOffset;
    for (int r = 0; r < Rows(kTile); ++r) {
      std::memcpy(tile_state.data[kTile][r], src + r * stride, RowBytes(kTile));
    }
  }
  template <int kTile>
  static void Store(void* base, ptrdiff_t stride) {
    CheckConfigured(kTile);
    for (int r = 0; r < Rows(kTile); ++r) {
      std::memcpy(static_cast<char*>(base) + r * stride, tile_state.data[kTile][r],
                  RowBytes(kTile));
    }
  }
  template <int kC, int kA, int kB>
  static void Dot() {
    static_assert(kC != kA && kC != kB && kA != kB);
    DotBf16(kC, kA, kB);
  }
  template <int kC, int kA, int kB>
  static void DotInt8() {
    static_assert(kC != kA && kC != kB && kA != kB);
    DotSignedUnsigned(kC, kA, kB);
  }

 private:
  static int Rows(int tile) { return tile_state.config.rows[tile]; }
  static int RowBytes(int tile) { return tile_state.config.row_bytes[tile]; }
  static void CheckConfigured(int tile) {
    if (tile_state.config.palette != 1 || !Rows(tile) || !RowBytes(tile)) {
      __builtin_trap();
    }
  }

  // What a product of any type needs of its shapes.
  static void CheckShapes(int c, int a, int b) {
    CheckConfigured(c);
    CheckConfigured(a);
    CheckConfigured(b);
    if (Rows(a) != Rows(c) || Rows(b) != RowBytes(a) / 4 ||
        RowBytes(b) != RowBytes(c)) {
      __builtin_trap();
    }
  }

  // TDPBSUD: sums modulo 2^32.
  static void DotSignedUnsigned(int c, int a, int b) {
    CheckShapes(c, a, b);
    for (int m = 0; m < Rows(c); ++m) {
      int8_t values[kTileRowBytes];
      uint32_t sums[kTileRowBytes / 4];
      std::memcpy(values, tile_state.data[a][m], sizeof values);
      std::memcpy(sums, tile_state.data[c][m], sizeof sums);
      for (int d = 0; d < RowBytes(a); ++d) {
        for (int n = 0; n < RowBytes(c) / 4; ++n) {
          const int product = values[d] * tile_state.data[b][d / 4][4 * n + d % 4];
          sums[n] += static_cast<uint32_t>(product);
        }
      }
      std::memcpy(tile_state.data[c][m], sums, sizeof sums);
    }
  }

  static void DotBf16(int c, int a, int b) {
    CheckShapes(c, a, b);
    const int pairs = RowBytes(a) / 4;
    constexpr int kPairs = kTileRowBytes / 4, kOutputs = kTileRowBytes / 4;
    double even[kPairs][kOutputs], odd[kPairs][kOutputs];
    for (int k = 0; k < pairs; ++k) {
      uint32_t row[kOutputs];
      std::memcpy(row, tile_state.data[b][k], sizeof row);
      for (int n = 0; n < kOutputs; ++n) {
        even[k][n] = Float32(row[n] << 16);
        odd[k][n] = Float32(row[n] & 0xffff0000u);
      }
    }
    for (int m = 0; m < Rows(c); ++m) {
      uint32_t row[kPairs];
      std::memcpy(row, tile_state.data[a][m], sizeof row);
      // Products of bfloat16 are exact in float64; their sums with a float32 rounded to
      // 53 bits and then to 24 are the fused result, since 53 >= 2 * 24 + 2.
      float even_sum[kOutputs] = {}, odd_sum[kOutputs] = {};
      for (int k = 0; k < pairs; ++k) {
        const double even_a = Float32(row[k] << 16);
        const double odd_a = Float32(row[k] & 0xffff0000u);
        for (int n = 0; n < kOutputs; ++n) {
          even_sum[n] = RoundAndFlush(even_sum[n] + even_a * even[k][n]);
          odd_sum[n] = RoundAndFlush(odd_sum[n] + odd_a * odd[k][n]);
        }
      }
      uint32_t sums[kOutputs];
      std::memcpy(sums, tile_state.data[c][m], sizeof sums);
      for (int n = 0; n < RowBytes(c) / 4; ++n) {
        const float sum = RoundAndFlush(double{even_sum[n]} + odd_sum[n]);
        const float result = RoundAndFlush(double{Float32(sums[n])} + sum);
        std::memcpy(&sums[n], &result, sizeof result);
      }
      std::memcpy(tile_state.data[c][m], sums, sizeof sums);
    }
  }
};

}  // namespace
}  // namespace ktjax

#endif  // KTJAX_FFI_TILE_AMX_EMULATED_H_
