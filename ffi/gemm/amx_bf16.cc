// Kernels for AMX with bfloat16 tiles (Sapphire Rapids and later).
#include "gemm/amx_impl.h"
#include "gemm/contract_avx512.h"
#include "gemm/decode_avx512.h"
#include "gemm/decode_blocks_avx512.h"
#include "gemm/epilogue_impl.h"
#include "gemm/few_rows_avx512.h"
#include "gemm/int8_amx.h"
#include "gemm/int8_rows.h"
#include "gemm/isa.h"
#include "gemm/kernel.h"
#include "gemm/pack_avx512.h"
#include "tile/amx_real.h"
#ifdef KTJAX_COUNT_TILES
#include "tile/tile_counts.h"
#endif

namespace ktjax {

#ifdef KTJAX_COUNT_TILES
TileCounts amx_bf16_counts;
using AmxBf16Tiles = CountingTiles<RealTiles, amx_bf16_counts>;
#else
using AmxBf16Tiles = RealTiles;
#endif
using AmxBf16Gemm = AmxGemm<AmxBf16Tiles>;
using AmxBf16Int8Gemm = AmxInt8Gemm<AmxBf16Tiles>;

const Kernels kAmxBf16Kernels = {
    .name = "amx",
    .max_rows = kAmxMaxRows,
    .row_step = kAmxRowStep,
    .near_rows = 0,
    .gemm = AmxBf16Gemm::Gemm,
    .transpose = Avx512Transpose,
    .contract_outputs = Avx512ContractOutputs,
    .pack_outputs_f32 = Avx512PackOutputs<float>,
    .pack_outputs_bf16 = Avx512PackOutputs<bf16>,
    .pack_depths_f32 = Avx512PackDepths<float>,
    .pack_depths_bf16 = Avx512PackDepths<bf16>,
    .pack_outputs_low = Avx512PackOutputs<float, Part::kLow>,
    .pack_depths_low = Avx512PackDepths<float, Part::kLow>,
    .to_bf16 = Avx512ToBf16<Part::kHigh>,
    .to_bf16_low = Avx512ToBf16<Part::kLow>,
    .enter = AmxBf16Gemm::Enter,
    .leave = AmxBf16Gemm::Leave,
    .epilogues = &kEpilogues,
    .gemm_int8 = AmxBf16Int8Gemm::Gemm,
    .quantize_rows = QuantizeRows,
    .decode = Decode<Avx512Decoder, Avx512BlockDecoder>,
    .dot_codes = Avx512DotCodes,
    .contract_codes = Avx512ContractCodes,
    .adapters_f32 = nullptr,
    .adapters_bf16 = nullptr,
};

}  // namespace ktjax
