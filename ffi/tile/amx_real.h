// The AMX tile instructions.
//
// In assembly: the compiler's own intrinsics take the tile's number as a preprocessor
// token, and those of gcc 12 misstate which memory they touch (_tile_loadconfig
// declares 8 of its 64 bytes, _tile_storeconfig and _tile_loadd none). Everything is
// static: a file compiled with ISA flags must not share code with others.
#ifndef KTJAX_FFI_TILE_AMX_REAL_H_
#define KTJAX_FFI_TILE_AMX_REAL_H_

#include <cstddef>

#include "tile/tile_config.h"

namespace ktjax {
namespace {

struct RealTiles {
  static void Configure(const TileConfig& config) {
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  static void Release() { asm volatile("tilerelease"); }

  template <int kTile>
  static void Zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  // Rows are `stride` bytes apart, the first at base + kOffset bytes.
  template <int kTile, int kOffset = 0>
  static void Load(const void* base, ptrdiff_t stride) {
    asm volatile("tileloadd %c0(%1,%2,1), %%tmm%c3"
                 :
                 : "i"(kOffset), "r"(base), "r"(stride), "i"(kTile)
                 : "memory");
  }
  template <int kTile>
  static void Store(void* base, ptrdiff_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)"
                 :
                 : "r"(base), "r"(stride), "i"(kTile)
                 : "memory");
  }
  // c += a . b, with a of rows x 32 bfloat16 and b of 16 depth pairs x 16 outputs.
  template <int kC, int kA, int kB>
  static void Dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0"
                 :
                 : "i"(kC), "i"(kA), "i"(kB));
  }
  // c += a . b in int32, with a of rows x 4 k signed bytes and b of k groups of four
  // depths x 16 outputs, unsigned bytes.
  template <int kC, int kA, int kB>
  static void DotInt8() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
  }
};

}  // namespace
}  // namespace ktjax

#endif  // KTJAX_FFI_TILE_AMX_REAL_H_
