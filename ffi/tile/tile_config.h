// The AMX tile configuration, as LDTILECFG reads it.
#ifndef KTJAX_FFI_TILE_TILE_CONFIG_H_
#define KTJAX_FFI_TILE_TILE_CONFIG_H_

#include <cstdint>

namespace ktjax {

inline constexpr int kTiles = 8;
inline constexpr int kTileMaxRows = 16;
inline constexpr int kTileRowBytes = 64;

struct alignas(64) TileConfig {
  uint8_t palette = 1;  // the only one: eight tiles of up to 16 rows of 64 bytes
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};  // per tile; the last eight stay zero
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

}  // namespace ktjax

#endif  // KTJAX_FFI_TILE_TILE_CONFIG_H_
