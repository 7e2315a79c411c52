// Kernels for any CPU. The compiler vectorises what it can.
#include "gemm/decode_blocks_generic.h"
#include "gemm/decode_generic.h"
#include "gemm/epilogue_impl.h"
#include "gemm/int8_portable.h"
#include "gemm/int8_rows.h"
#include "gemm/isa.h"
#include "gemm/kernel.h"
#include "gemm/pack_generic.h"

namespace ktjax {
namespace {

constexpr int kMaxRows = 8;

void Gemm(const Term* terms, int n_terms, int rows, int strips, float* c,
          bool accumulate, Prefetch*) {
  for (int r = 0; r < rows; ++r) {
    float* row = c + r * kPanel;
    if (!accumulate) std::memset(row, 0, sizeof(float) * kStrip * strips);
    for (const Term* term = terms; term < terms + n_terms; ++term) {
      const bf16* a = term->a + r * term->a_stride;
      const int step = term->strip_step;
      const int width = (strips - term->first_strip + step - 1) / step;
      for (int s = 0; s < width; ++s) {
        float* out = row + (term->first_strip + s * step) * kStrip;
        F32x16 sum;
        Load(out, sum);
        for (int d = 0; d < term->depth; d += 2) {
          U32x16 pairs;
          std::memcpy(&pairs, term->b + (d / 2 * width + s) * 2 * kStrip, 64);
          F32x16 even, odd;
          const U32x16 low = pairs << 16, high = pairs & 0xffff0000u;
          std::memcpy(&even, &low, 64);
          std::memcpy(&odd, &high, 64);
          sum += ToFloat(a[d]) * even;
          sum += ToFloat(a[d + 1]) * odd;
        }
        Store(sum, out);
      }
    }
  }
}

}  // namespace

const Kernels kPortableKernels = {
    .name = "portable",
    .max_rows = kMaxRows,
    .row_step = 1,
    .near_rows = 0,
    .gemm = Gemm,
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
    .gemm_int8 = PortableInt8Gemm,
    .quantize_rows = QuantizeRows,
    .decode = Decode<GenericDecoder, GenericBlockDecoder>,
    .dot_codes = nullptr,
    .contract_codes = nullptr,
    .adapters_f32 = nullptr,
    .adapters_bf16 = nullptr,
};

}  // namespace ktjax
