// Counts the tile instructions of the AMX kernels, on emulated tiles. Compile it and
// gemm/amx_emulated.cc with KTJAX_COUNT_TILES.
#include <numeric>

#include "gemm/isa.h"
#include "testing/tile_count_suite.h"

int main() {
  std::vector<int> rows(ktjax::kAmxEmulatedKernels.max_rows);
  std::iota(rows.begin(), rows.end(), 1);
  ktjax::TestTileCounts(ktjax::kAmxEmulatedKernels, ktjax::amx_emulated_counts, rows,
                        768);
  return ktjax::ReportChecks();
}
