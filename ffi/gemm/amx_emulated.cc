// The AMX kernels on emulated tiles: the same code path, on any CPU. For tests.
#include "tile/amx_emulated.h"

#include "gemm/amx_impl.h"
#include "gemm/decode_blocks_generic.h"
#include "gemm/decode_generic.h"
#include "gemm/epilogue_impl.h"
#include "gemm/int8_amx.h"
#include "gemm/int8_rows.h"
#include "gemm/isa.h"
#include "gemm/kernel.h"
#include "gemm/pack_generic.h"
#ifdef KTJAX_COUNT_TILES
#include "tile/tile_counts.h"
#endif

namespace ktjax {

#ifdef KTJAX_COUNT_TILES
TileCounts amx_emulated_counts;
using AmxEmulatedTiles = CountingTiles<EmulatedTiles, amx_emulated_counts>;
#else
using AmxEmulatedTiles = EmulatedTiles;
#endif
using AmxEmulatedGemm = AmxGemm<AmxEmulatedTiles>;
using AmxEmulatedInt8Gemm = AmxInt8Gemm<AmxEmulatedTiles>;

const Kernels kAmxEmulatedKernels = {
    .name = "amx_emulated",
    .max_rows = kAmxMaxRows,
    .row_step = kAmxRowStep,
    .near_rows = 0,
    .gemm = AmxEmulatedGemm::Gemm,
    .transpose = GenericTranspose,
    .contract_outputs = nullptr,
    .pack_outputs_f32 = GenericPackOutputs<float>,
    .pack_outputs_bf16 = GenericPackOutputs<bf16>,
    .pack_depths_f32 = GenericPackDepths<float>,
    .pack_depths_bf16 = GenericPackDepths<bf16>,
    .pack_outputs_low = GenericPackOutputs<float, Part::kLow>,
    .pack_depths_low = GenericPackDepths<float, Part::kLow>,
    .to_bf16 = GenericToBf16<Part::kHigh>,
    .to_bf16_low = GenericToBf16<Part::kLow>,
    .enter = AmxEmulatedGemm::Enter,
    .leave = AmxEmulatedGemm::Leave,
    .epilogues = &kEpilogues,
    .gemm_int8 = AmxEmulatedInt8Gemm::Gemm,
    .quantize_rows = QuantizeRows,
    .decode = Decode<GenericDecoder, GenericBlockDecoder>,
    .dot_codes = nullptr,
    .contract_codes = nullptr,
    .adapters_f32 = nullptr,
    .adapters_bf16 = nullptr,
};

}  // namespace ktjax
