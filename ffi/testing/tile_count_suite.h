// How many tile instructions the AMX kernels spend on a product; needs a build with
// KTJAX_COUNT_TILES.
#ifndef KTJAX_FFI_TESTING_TILE_COUNT_SUITE_H_
#define KTJAX_FFI_TESTING_TILE_COUNT_SUITE_H_

#include <algorithm>

#include "gemm/kernel.h"
#include "testing/check.h"
#include "testing/gemm_case.h"
#include "tile/tile_counts.h"

namespace ktjax {

// A tile product takes 16 cycles, and a tile from L1 takes 8 cycles of the two load
// ports: at 0.6 products per load, those of c included, loads hide behind products with
// room to spare.
inline constexpr double kProductsPerLoad = 0.6;

inline void TestTileCounts(const Kernels& kernels, TileCounts& counts,
                           const std::vector<int>& row_counts, int depth) {
  kernels.enter();
  double least = 1e9;
  for (int strips = 1; strips <= kPanelStrips; ++strips) {
    const GemmCase gemm_case(kernels.max_rows, strips, {{depth}}, strips);
    for (const int rows : row_counts) {
      counts = {};
      gemm_case.Run(kernels, rows, false);
      const int64_t products = CeilDiv(rows, kTileMaxRows) * strips * (depth / kDepth);
      KTJAX_CHECK(counts.products == products,
                  "rows %d strips %d: %lld products, not %lld", rows, strips,
                  static_cast<long long>(counts.products),
                  static_cast<long long>(products));
      KTJAX_CHECK(counts.configurations <= 2, "rows %d strips %d: %lld configurations",
                  rows, strips, static_cast<long long>(counts.configurations));
      // A single tile of c has two operands to load for each product.
      const bool single = strips == 1 && rows % kernels.row_step <= kTileMaxRows &&
                          rows % kernels.row_step != 0;
      if (single) continue;
      const double ratio =
          static_cast<double>(counts.products) / static_cast<double>(counts.loads);
      KTJAX_CHECK(ratio >= kProductsPerLoad,
                  "rows %d strips %d: %.3f products per load", rows, strips, ratio);
      least = std::min(least, ratio);
      if (rows == kernels.max_rows && strips == kPanelStrips) {
        std::printf(
            "%s, %d rows x %d outputs x %d: %lld products, %lld loads, "
            "%lld stores: %.3f products per load\n",
            kernels.name, rows, kPanel, depth, static_cast<long long>(counts.products),
            static_cast<long long>(counts.loads), static_cast<long long>(counts.stores),
            ratio);
      }
    }
  }
  std::printf("%s: at least %.3f products per load for any shape\n", kernels.name,
              least);
  kernels.leave();
}

}  // namespace ktjax

#endif  // KTJAX_FFI_TESTING_TILE_COUNT_SUITE_H_
