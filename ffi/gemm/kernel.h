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
// The value of c[r][n] never depends on how the rows were split over calls: this is
// what makes results bit-identical for any number of threads.
#ifndef KTJAX_FFI_GEMM_KERNEL_H_
#define KTJAX_FFI_GEMM_KERNEL_H_

#include <cstddef>
#include <cstdint>

#include "base/types.h"
#include "format/format.h"
#include "gemm/dropout.h"

namespace ktjax {

// One term of the sum. `depth` is even. Both operands are readable, and zero, up to
// depth rounded up to kDepth, for kernels that work in whole tiles.
struct Term {
  const bf16* a;
  ptrdiff_t a_stride;  // elements between rows of a
  const bf16* b;
  int depth;
  // The strips of c that this term feeds: all (0, 1), or the even (0, 2) or odd (1, 2)
  // ones of a panel of two or four.
  // Its panel holds these strips only. Strips alternate gate, up, gate, up in the fused
  // gate/up panels, so a LoRA term of `gate` feeds strips {0, 2}.
  int first_strip = 0;
  int strip_step = 1;
};

// Contiguous bytes.
struct ByteSpan {
  const char* first;
  int64_t size;
};

// Cache lines to fetch while the product runs: `chunks` runs of `chunk_bytes`, `stride`
// bytes apart. The kernel issues at most a few prefetches per depth pair and advances
// `position` (bytes issued so far), so that consecutive calls share one schedule.
// Memory is busy only as long as lines are asked for: a rate that fits lasts as long as
// the product, and one twice as high leaves memory idle in its second half.
struct Prefetch {
  const char* base = nullptr;
  ptrdiff_t stride = 0;
  int64_t chunk_bytes = 0;  // above 0 where total_bytes is
  int64_t total_bytes = 0;  // chunks * chunk_bytes
  int64_t position = 0;
  int rate = kPerPair;  // sixteenths of a cache line per depth pair
  // Not 0: what is fetched is used just so many bytes later, and goes to L1; else to
  // L2. Kernels that heed it fetch as many lines as they read, and scales likewise.
  int near_bytes = 0;
  // What to fetch after all that, in this order.
  const ByteSpan* more = nullptr;
  int more_count = 0;
  // Contiguous bytes to fetch beside all that, to L2, evenly over the product: scales,
  // which are few and lie apart from the codes that are fetched near. A hint.
  const char* scales = nullptr;
  int64_t scales_bytes = 0;

  static constexpr int kPerPair = 16;    // a line per pair
  static constexpr int kMaxPerPair = 4;  // lines

  [[gnu::always_inline]] int64_t Lines() const {
    int64_t bytes = total_bytes;
    for (int i = 0; i < more_count; ++i) bytes += more[i].size;
    return CeilDiv(bytes, 64);
  }
  // Spreads the lines over a product of so many depth pairs in all: the fewer there are
  // to hide behind, the more lines per pair. Codes of one line a pair have scales
  // beside: up to a thirty-second more is no reason for a higher rate.
  [[gnu::always_inline]] void Spread(int64_t pairs) {
    const int64_t lines = Lines();
    const int64_t needed = CeilDiv((lines - lines / 32) * kPerPair, pairs);
    constexpr int64_t kMost = kMaxPerPair * kPerPair;
    rate = static_cast<int>(needed < kPerPair ? kPerPair
                            : needed > kMost  ? kMost
                                              : needed);
  }
  // Whether it is time to begin, with so many depth pairs to come after the next call:
  // what is fetched too early pushes out of L2 what is in use.
  bool Due(int64_t pairs) const {
    return base && (position || 2 * pairs <= 3 * Lines());
  }
};

// Rows of operand a of a product over a panel's outputs: for every strip of the panel,
// where the first row's 16 values lie, and the elements between rows.
struct StripRows {
  const bf16* strip[kPanelStrips];
  ptrdiff_t stride;
};
inline constexpr int kMaxContractRows = 8;

// Source rows of a packing routine: row i starts at base + index[i] * stride elements,
// or at base + i * stride when index is null.
template <typename T>
struct Rows {
  const T* base;
  ptrdiff_t stride;
  const int32_t* index = nullptr;
  [[gnu::always_inline]] const T* row(int i) const {
    return base + (index ? index[i] : i) * stride;
  }
};

// A value is carried as one bfloat16, or as the sum of two where it must be exact to
// float32: high = bf16(v), low = bf16(v - high), or 0 where high is infinite.
enum class Part { kHigh, kLow };

// Rows of such values: high parts, and low parts `low` elements further, or none (0).
struct SplitRows {
  bf16* high;
  ptrdiff_t stride;
  ptrdiff_t low;
};

// The depths that share a scale in 8-bit rows. Sums of 128 products of 127 * 255 stay
// below 2^24: exact in int32 and in float32 alike.
inline constexpr int kInt8Group = 128;

// The depths whose codes have a sum in rows for weights in blocks, however many depths
// a sub-block has: matrices of several formats share rows.
inline constexpr int kBlockSumDepths = 16;

// Rows of signed 8-bit codes. What row r holds at depth d is
//     values[r * stride + d] * scales[r * scale_stride + d / kInt8Group].
// Codes are within +-127, and 0 from the depth up to its multiple of kDepth.
struct Int8Rows {
  int8_t* values;
  ptrdiff_t stride;
  float* scales;
  ptrdiff_t scale_stride;
  int32_t* sums;  // of the codes of `group` depths: sums[r * sum_stride + d / group]
  ptrdiff_t sum_stride;
  // 32 or 64 where the weights have such groups, kBlockSumDepths where they are in
  // blocks, else kInt8Group.
  int group;
};

// Element-wise steps between a product and memory, on a tile c (row stride kPanel).
struct Epilogues {
  // c's strips alternate gate, up. For every pair of strips p:
  //   h[r][16 p + i] = silu(gate) * up
  // and gate and up themselves go to row index[r] (r when index is null) of two arrays,
  // when these are not null.
  void (*swiglu)(const float* c, int rows, int strips, SplitRows h,
                 const int32_t* index, SplitRows gate, SplitRows up);

  // c is the gradient of h before the routing weight. For row r:
  //   dots[r * dots_stride] = <c[r], h[r]>, then with dh = weights[r] * c[r]
  //   d_gate = dh * up * silu'(gate), d_up = dh * silu(gate), h = silu(gate) * up.
  // gate and up are read from row index[r] (r when index is null). h may be null.
  void (*swiglu_grad)(const float* c, int rows, int strips, const float* weights,
                      const int32_t* index, SplitRows gate, SplitRows up,
                      SplitRows d_gate, SplitRows d_up, SplitRows h, float* dots,
                      ptrdiff_t dots_stride);

  // out[tokens[r] * stride + n] += weights[r] * c[r][n]; weights may be null (ones).
  // Tokens of one call may repeat: rows are added in order.
  void (*scatter_add)(const float* c, int rows, int strips, const int32_t* tokens,
                      const float* weights, float* out, ptrdiff_t stride);

  // dst[r][n] = scale * c[r][n] for n < columns, zero up to `padded`.
  void (*store_split)(const float* c, int rows, int columns, int padded, float scale,
                      SplitRows dst);

  // dst[r * stride + n] = c[r][n], in either dtype, n < columns.
  void (*store_rows_f32)(const float* c, int rows, int columns, float* dst,
                         ptrdiff_t stride);
  void (*store_rows_bf16)(const float* c, int rows, int columns, bf16* dst,
                          ptrdiff_t stride);
  // The same for gradients, which nobody reads soon: past the caches where that can be,
  // since a cache would read a line from memory before it is overwritten. Callers fence
  // before others may read. And transposed: dst[n * stride + r] = c[r][n].
  void (*stream_rows_f32)(const float* c, int rows, int columns, float* dst,
                          ptrdiff_t stride);
  void (*stream_rows_bf16)(const float* c, int rows, int columns, bf16* dst,
                           ptrdiff_t stride);
  void (*stream_columns_f32)(const float* c, int rows, int columns, float* dst,
                             ptrdiff_t stride);
  void (*stream_columns_bf16)(const float* c, int rows, int columns, bf16* dst,
                              ptrdiff_t stride);

  // Dropout. dst = src where the mask keeps it, else 0, in all parts of src; `columns`
  // is a multiple of 16.
  void (*copy_kept)(const DropoutMask& mask, SplitRows src, int rows, int columns,
                    SplitRows dst);
  // The same in place in a panel whose depths are the rows and whose outputs are the
  // columns, and in its low part unless that is null.
  void (*drop_from_panel)(const DropoutMask& mask, int rows, int strips, bf16* high,
                          bf16* low);
  // c += src where the mask keeps it; src is a tile like c.
  void (*add_kept)(const DropoutMask& mask, const float* src, int rows, int strips,
                   float* c);
};

// Products of few rows with a LoRA matrix as it lies in memory: rows of values of type
// T (float or bf16), which are rounded to bfloat16 on the way. Nobody packs them, which
// for 1 to kMaxContractRows rows takes longer than the products. Rows of m are in order
// (m.index is null). Tiles c have a row stride of kPanel. dot and add_dot have the bits
// of gemm on panels of the same, so that a token's result does not depend on how many
// others its expert has.
template <typename T>
struct AdapterKernels {
  // c[r][n] = sum_d a[r * a_stride + d] * bf16(m.row(n)[d]) for n < outputs <= kPanel.
  // a is readable, and finite, up to depth rounded up to kDepth.
  void (*dot)(const bf16* a, ptrdiff_t a_stride, int rows, Rows<T> m, int outputs,
              int depth, float* c);
  // The same for rows of a few values in one or two parts, added to every strip_step-th
  // strip of c. a is zero from `depth` up to its multiple of kDepth.
  void (*add_dot)(SplitRows a, int rows, Rows<T> m, int outputs, int depth, float* c,
                  int strip_step);
  // c[r][n] (+)= sum_d a[r][d] * bf16(m.row(d)[n]) for n < outputs <= kPanel. a may
  // have two parts, and is zero up to an even depth. Whole strips of c are written.
  void (*contract)(SplitRows a, int rows, Rows<T> m, int depth, int outputs, float* c,
                   bool accumulate);

  // Gradients, for 0 to kMaxContractRows source rows. low_rank has a row per rank, in
  // two parts, with a value per source row, zero from there up to an even count.
  // Stored as gradients are (Epilogues::stream_rows_f32).
  //   dst[i * dst_stride + n] = sum_r low_rank[i][r] * source.row(r)[n]   i < rank
  void (*outer_rows)(SplitRows low_rank, int rank, Rows<bf16> source, int rows,
                     int columns, T* dst, ptrdiff_t dst_stride);
  //   dst[n * dst_stride + i] = the same
  void (*outer_columns)(SplitRows low_rank, int rank, Rows<bf16> source, int rows,
                        int columns, T* dst, ptrdiff_t dst_stride);
};

// All that one instruction set provides. Instances are constants, one per file.
struct Kernels {
  const char* name;

  // A call to gemm takes 1..max_rows rows; it works in steps of row_step, so callers
  // split M rows into equal multiples of it.
  int max_rows;
  int row_step;

  // So many rows, in one call, go through a panel once and in order, with values or
  // with codes as integers, and heed Prefetch::near_bytes. 0: none do.
  int near_rows;

  // c (+)= sum over terms. `strips` is the width of c. Adds to c when `accumulate`,
  // else overwrites. `prefetch` may be null.
  void (*gemm)(const Term* terms, int n_terms, int rows, int strips, float* c,
               bool accumulate, Prefetch* prefetch);

  // Transposes `blocks` blocks of 16 outputs x 32 depths of a panel, so that depths
  // become outputs: out-of-place [16 pairs][16 outputs][2] -> [8 pairs][32 outputs][2].
  // Block i reads src + i * 16 * src_stride and writes dst + i * 64. Strides are
  // elements between consecutive depth pairs.
  void (*transpose)(const bf16* src, ptrdiff_t src_stride, int blocks, bf16* dst,
                    ptrdiff_t dst_stride);

  // The product over a panel's outputs, for 1 to kMaxContractRows rows:
  //   c[r][d] += sum_{s, i} a.strip[s][r * a.stride + i] * panel[d][16 s + i]
  // for the depths d < 2 * pairs; pairs is a multiple of 16. Where there is none
  // (null), panels are transposed first, which costs a round trip through L2.
  void (*contract_outputs)(const StripRows& a, int rows, const bf16* panel, int strips,
                           int pairs, float* c, ptrdiff_t c_stride, Prefetch* prefetch);

  // Packs strips of a panel from source rows that are OUTPUTS (the contraction is
  // contiguous): dst[(d / 2) * dst_stride + 2 n + d % 2] = bf16(src.row(n)[d]) for
  // n < outputs, d < depth; zero for the outputs up to 16 * strips and the depths up to
  // RoundUp(depth, kDepth). `dst_stride` is 32 elements times the panel's strips, so
  // that several sources can fill one panel side by side.
  void (*pack_outputs_f32)(Rows<float> src, int outputs, int depth, int strips,
                           bf16* dst, ptrdiff_t dst_stride);
  void (*pack_outputs_bf16)(Rows<bf16> src, int outputs, int depth, int strips,
                            bf16* dst, ptrdiff_t dst_stride);

  // The same from source rows that are DEPTHS (the outputs are contiguous):
  // dst[(d / 2) * dst_stride + 2 n + d % 2] = bf16(src.row(d)[n]).
  void (*pack_depths_f32)(Rows<float> src, int depth, int outputs, int strips,
                          bf16* dst, ptrdiff_t dst_stride);
  void (*pack_depths_bf16)(Rows<bf16> src, int depth, int outputs, int strips,
                           bf16* dst, ptrdiff_t dst_stride);

  // The same for the low parts of float32 values.
  void (*pack_outputs_low)(Rows<float> src, int outputs, int depth, int strips,
                           bf16* dst, ptrdiff_t dst_stride);
  void (*pack_depths_low)(Rows<float> src, int depth, int outputs, int strips,
                          bf16* dst, ptrdiff_t dst_stride);

  // dst[i] = bf16(src[i]), round to nearest even; and the low parts.
  void (*to_bf16)(const float* src, bf16* dst, int64_t count);
  void (*to_bf16_low)(const float* src, bf16* dst, int64_t count);

  // Called once by each thread before and after it uses gemm in a job (AMX tile
  // configuration); no-ops elsewhere.
  void (*enter)();
  void (*leave)();

  const Epilogues* epilogues;

  // The product of 8-bit rows with a panel of integer codes: kInt8 with one scale for
  // all depths, or kInt4, with scales in float32 or bfloat16. Over the groups G of
  // kInt8Group depths and in each the groups g of a.group, in ascending order,
  //   c[r][n] = sum_G a.scales[r][G] * sum_{g in G} scale[n] *
  //             float(sum_{d in g} a[r][d] * code[d][n] - zero[n] * a.sums[r][g])
  // for n < 16 * b.strips, where the number in brackets is exact: no sum saturates or
  // is rounded. zero[n] and scale[n] are those of the panel's group with g in it:
  // b.group is a.group where that is below kInt8Group, and depth is a multiple of it
  // then; else b.group is a multiple of kInt8Group, or not below `depth`. The panel is
  // readable up to depth rounded up to kDepth. c, rows and `prefetch` as for gemm.
  //
  // Or with a panel in blocks (b.format is format's, a.group is kBlockSumDepths and
  // depth a multiple of its blocks). Over the sub-blocks g in G, with what
  // format/blocks.h calls scale and min,
  //   c[r][n] = sum_G a.scales[r][G] * sum_{g in G}
  //             (scale[n] * float(sum_{d in g} a[r][d] * (code[d][n] - zero)) -
  //              min[n] * float(sum_{d in g} a[r][d]))
  // to strips b.apart apart. Weights are not rounded.
  void (*gemm_int8)(const FormatSpec& format, const Int8Rows& a, const QuantPanel& b,
                    int depth, int rows, float* c, Prefetch* prefetch);

  // Fills dst's values (zeros up to depth rounded up to kDepth included), scales and
  // sums from rows of `depth` values: with the arithmetic of float32,
  //   scale = max |v| / 127, code = rint(v / scale)
  // over a group of kInt8Group; both are 0 where the scale would be below 2^-126. A NaN
  // or an infinity in a group makes its scale NaN and its codes 0, so that results are
  // NaN.
  void (*quantize_rows)(SplitRows src, int rows, int depth, const Int8Rows& dst);

  // Decodes a panel of quantised weights (format/format.h), depth pairs [first_pair,
  // first_pair + pairs), multiples of 16, into a panel of these depths: dst[pair -
  // first_pair][16 strips][2], which has 2 * pairs * 16 * strips elements, and `apart`
  // times as many where strips are apart. Not for Format::kBf16. `prefetch` may be
  // null. In a panel of four strips a pair has one cache line of codes of 4 bits, two
  // of 8 bits: a prefetch of that many lines per pair fetches a panel like this one.
  void (*decode)(const QuantPanel& panel, int first_pair, int pairs, bf16* dst,
                 Prefetch* prefetch);

  // Products of few rows with a panel as it is, or false where decoding it first is
  // better: that depends on the format and its groups alone. Null where it always is.
  // c[r][n] = sum_d a[r * a_stride + d] * value[d][n] for d < depth, a multiple of
  // kDepth, and rows <= kMaxContractRows; c as for gemm, with the strips of a panel
  // `apart` in it.
  bool (*dot_codes)(const bf16* a, ptrdiff_t a_stride, int rows,
                    const QuantPanel& panel, int depth, float* c, Prefetch* prefetch);
  // contract_outputs for the depth pairs [first_pair, first_pair + pairs), multiples of
  // 16.
  bool (*contract_codes)(const StripRows& a, int rows, const QuantPanel& panel,
                         int first_pair, int pairs, float* c, ptrdiff_t c_stride,
                         Prefetch* prefetch);

  // Both null where adapters are always packed.
  const AdapterKernels<float>* adapters_f32;
  const AdapterKernels<bf16>* adapters_bf16;
};

}  // namespace ktjax

#endif  // KTJAX_FFI_GEMM_KERNEL_H_
