// Kernels for AVX2 with FMA: Haswell and Zen, and later CPUs without AVX-512.
#include "gemm/decode_avx2.h"
#include "gemm/decode_blocks_generic.h"
#include "gemm/epilogue_impl.h"
#include "gemm/fma_gemm.h"
#include "gemm/int8_blocks.h"
#include "gemm/int8_rows.h"
#include "gemm/isa.h"
#include "gemm/kernel.h"
#include "gemm/pack_generic.h"

namespace ktjax {

const Kernels kAvx2Kernels = {
    .name = "avx2",
    .max_rows = 4 * kTileRows,
    .row_step = 1,
    .near_rows = 0,
    .gemm = FmaGemm,
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
    .enter = NoTileState,
    .leave = NoTileState,
    .epilogues = &kEpilogues,
    .gemm_int8 = VectorInt8Gemm,
    .quantize_rows = QuantizeRows,
    .decode = Decode<Avx2Decoder, GenericBlockDecoder>,
    .dot_codes = nullptr,
    .contract_codes = nullptr,
    .adapters_f32 = nullptr,
    .adapters_bf16 = nullptr,
};

}  // namespace ktjax
