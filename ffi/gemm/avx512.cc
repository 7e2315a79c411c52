// Kernels for AVX-512 (F, BW, DQ, VL) without 8-bit or bfloat16 dot products:
// Skylake.
#include "gemm/decode_avx512.h"
#include "gemm/decode_blocks_avx512.h"
#include "gemm/epilogue_impl.h"
#include "gemm/fma_gemm.h"
#include "gemm/int8_blocks.h"
#include "gemm/int8_rows.h"
#include "gemm/isa.h"
#include "gemm/kernel.h"
#include "gemm/pack_avx512.h"
#include "gemm/pack_generic.h"

namespace ktjax {

const Kernels kAvx512Kernels = {
    .name = "avx512",
    .max_rows = 2 * kTileRows,
    .row_step = 1,
    .near_rows = 0,
    .gemm = FmaGemm,
    .transpose = Avx512Transpose,
    .contract_outputs = nullptr,
    .pack_outputs_f32 = Avx512PackOutputs<float>,
    .pack_outputs_bf16 = Avx512PackOutputs<bf16>,
    .pack_depths_f32 = Avx512PackDepths<float>,
    .pack_depths_bf16 = Avx512PackDepths<bf16>,
    .pack_outputs_low = Avx512PackOutputs<float, Part::kLow>,
    .pack_depths_low = Avx512PackDepths<float, Part::kLow>,
    .to_bf16 = Avx512ToBf16<Part::kHigh>,
    .to_bf16_low = Avx512ToBf16<Part::kLow>,
    .enter = NoTileState,
    .leave = NoTileState,
    .epilogues = &kEpilogues,
    .gemm_int8 = VectorInt8Gemm,
    .quantize_rows = QuantizeRows,
    .decode = Decode<Avx512Decoder, Avx512BlockDecoder>,
    .dot_codes = nullptr,
    .contract_codes = nullptr,
    .adapters_f32 = nullptr,
    .adapters_bf16 = nullptr,
};

}  // namespace ktjax
