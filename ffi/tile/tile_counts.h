// Counts of tile instructions, in builds with KTJAX_COUNT_TILES only.
#ifndef KTJAX_FFI_TILE_TILE_COUNTS_H_
#define KTJAX_FFI_TILE_TILE_COUNTS_H_

#include <cstddef>
#include <cstdint>

#include "tile/tile_config.h"

namespace ktjax {

struct TileCounts {
  int64_t configurations = 0;
  int64_t loads = 0;
  int64_t stores = 0;
  int64_t products = 0;
};

// Of all threads together, without synchronisation: count in one thread.
extern TileCounts amx_bf16_counts;
extern TileCounts amx_emulated_counts;

namespace {

// Tiles whose instructions are counted in kCounts.
template <typename Tiles, TileCounts& kCounts>
struct CountingTiles {
  static void Configure(const TileConfig& config) {
    ++kCounts.configurations;
    Tiles::Configure(config);
  }
  static void Release() { Tiles::Release(); }
  template <int kTile>
  static void Zero() {
    Tiles::template Zero<kTile>();
  }
  template <int kTile, int kOffset = 0>
  static void Load(const void* base, ptrdiff_t stride) {
    ++kCounts.loads;
    Tiles::template Load<kTile, kOffset>(base, stride);
  }
  template <int kTile>
  static void Store(void* base, ptrdiff_t stride) {
    ++kCounts.stores;
    Tiles::template Store<kTile>(base, stride);
  }
  template <int kC, int kA, int kB>
  static void Dot() {
    ++kCounts.products;
    Tiles::template Dot<kC, kA, kB>();
  }
  template <int kC, int kA, int kB>
  static void DotInt8() {
    ++kCounts.products;
    Tiles::template DotInt8<kC, kA, kB>();
  }
};

}  // namespace
}  // namespace ktjax

#endif  // KTJAX_FFI_TILE_TILE_COUNTS_H_
