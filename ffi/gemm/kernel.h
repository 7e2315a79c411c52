// The contract between the drivers in moe/ and the kernels of one instruction set.
//
// Everything ktjax computes with matrices is a product of ROWS with a PANEL:
//
//     c[r][n] (+)= sum_d a[r][d] * b[d][n]        r < rows, n < 16 * strips
//
// * `a` is row-major bfloat16, one row per token (or per LoRA rank).
// * `b` is a panel: up to 64 outputs, packed as [depth / 2][16 * strips][2], so that a
//   32-bit lane holds the two neighbouring depths of one output. This is the operand
//   layout of VDPBF16PS and of the AMX B tile alike, so one packing serves every ISA.
// * `c` is a row-major float32 tile with a row stride of kPanel, in L1. Epilogues
//   (SwiGLU, scatter, ...) read it from there, so no kernel knows what it is used for.
//
// The value of c[r][n] never depends on how the rows were split over calls: this is what
// makes results bit-identical for any number of threads.
#ifndef KTJAX_FFI_GEMM_KERNEL_H_
#define KTJAX_FFI_GEMM_KERNEL_H_

#include <cstddef>
#include <cstdint>

#include "base/types.h"

namespace ktjax {

// One term of the sum. `depth` is even. Both operands are readable, and zero, up to
// depth rounded up to kDepth, for kernels that work in whole tiles.
struct Term {
  const bf16* a;
  ptrdiff_t a_stride;  // elements between rows of a
  const bf16* b;
  int depth;
  // The strips of c that this term feeds: first_strip, first_strip + strip_step, ...
  // Its panel holds these strips only. Strips alternate gate, up, gate, up in the fused
  // gate/up panels, so a LoRA term of `gate` feeds strips {0, 2}.
  int first_strip = 0;
  int strip_step = 1;
};

// Cache lines to fetch while the product runs: `chunks` runs of `chunk_bytes`, `stride`
// bytes apart. The kernel issues at most a few prefetches per depth pair and advances
// `position` (bytes issued so far), so that consecutive calls share one schedule.
struct Prefetch {
  const char* base = nullptr;
  ptrdiff_t stride = 0;
  int64_t chunk_bytes = 0;  // a multiple of 2048
  int64_t total_bytes = 0;  // chunks * chunk_bytes
  int64_t position = 0;
};

// Source rows of a packing routine: row i starts at base + index[i] * stride elements,
// or at base + i * stride when index is null.
template <typename T>
struct Rows {
  const T* base;
  ptrdiff_t stride;
  const int32_t* index = nullptr;
  const T* row(int i) const { return base + (index ? index[i] : i) * stride; }
};

// All that one instruction set provides. Instances are constants, one per file.
struct Kernels {
  const char* name;

  // A call to gemm takes 1..max_rows rows; it works in steps of row_step, so callers
  // split M rows into equal multiples of it.
  int max_rows;
  int row_step;

  // c (+)= sum over terms. `strips` is the width of c. Adds to c when `accumulate`,
  // else overwrites. `prefetch` may be null.
  void (*gemm)(const Term* terms, int n_terms, int rows, int strips, float* c,
               bool accumulate, Prefetch* prefetch);

  // Transposes `blocks` blocks of 16 outputs x 32 depths of a panel, so that depths
  // become outputs: out-of-place [16 pairs][16 outputs][2] -> [8 pairs][32 outputs][2].
  // Block i reads src + i * 16 * src_stride and writes dst + i * 64. Strides are elements
  // between consecutive depth pairs.
  void (*transpose)(const bf16* src, ptrdiff_t src_stride, int blocks, bf16* dst,
                    ptrdiff_t dst_stride);

  // Packs a panel from source rows that are OUTPUTS (the contraction is contiguous):
  // dst[d / 2][n][d % 2] = bf16(src.row(n)[d]) for n < outputs, d < depth. Zero for the
  // outputs up to 16 * strips and the depths up to RoundUp(depth, kDepth).
  void (*pack_outputs_f32)(Rows<float> src, int outputs, int depth, bf16* dst,
                           int strips);
  void (*pack_outputs_bf16)(Rows<bf16> src, int outputs, int depth, bf16* dst,
                            int strips);

  // Packs a panel from source rows that are DEPTHS (the outputs are contiguous):
  // dst[d / 2][n][d % 2] = bf16(src.row(d)[n]), zero-padded in the same way.
  void (*pack_depths_f32)(Rows<float> src, int depth, int outputs, bf16* dst,
                          int strips);
  void (*pack_depths_bf16)(Rows<bf16> src, int depth, int outputs, bf16* dst,
                           int strips);

  // dst[i] = bf16(src[i]), round to nearest even.
  void (*to_bf16)(const float* src, bf16* dst, int64_t count);

  // Called once by each thread before and after it uses gemm in a job (AMX tile
  // configuration); no-ops elsewhere.
  void (*enter)();
  void (*leave)();

  // Element-wise steps on c; see moe/epilogue.h.
  const struct Epilogues* epilogues;
};

}  // namespace ktjax

#endif  // KTJAX_FFI_GEMM_KERNEL_H_
