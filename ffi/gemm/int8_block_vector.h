// Codes and scales of GGUF's blocks as operands of the integer product, in vector
// registers, for AVX2, AVX-512 and VNNI. int8_block_generic.h has the same for any CPU.
// Everything is static: a file compiled with ISA flags must not share code with others.
#ifndef KTJAX_FFI_GEMM_INT8_BLOCK_VECTOR_H_
#define KTJAX_FFI_GEMM_INT8_BLOCK_VECTOR_H_

#include "format/blocks.h"
#include "gemm/int8_rows.h"
#include "gemm/int8_vector.h"
#include "gemm/kernel.h"

namespace ktjax {
namespace {

// How the codes of a format lie in a block: all that the product depends on, so formats
// that agree in it share their machine code.
template <int kCodeBits, bool kTableCodes, int kSubDepths, bool kMinima>
struct BlockCodes {
  static constexpr int kBits = kCodeBits;
  static constexpr int kDepths = kSubDepths;  // of a sub-block
  static constexpr int kSubs = kDepth / kDepths;
  static constexpr bool kMins = kMinima;
  // Whether unpacking costs next to nothing beside the products of a tile of rows.
  static constexpr bool kCheap = kBits % 4 == 0 && !kTableCodes;

  // The codes of quad kQuad (see QuantPanel) of IntVector::kLanes outputs as unsigned
  // bytes. Words are `stride` bytes apart.
  template <int kQuad>
  [[gnu::always_inline]] static IntVector::Int Quad(const uint8_t* words,
                                                    ptrdiff_t stride) {
    if constexpr (kBits == 8) {
      return IntVector::Load(words + kQuad * stride);
    } else {
      constexpr int kLow = kBits < 4 ? 2 : 4, kPerWord = 8 / kLow, kHigh = kBits - kLow;
      constexpr int kShift = kLow * (kQuad % kPerWord);
      // Bits that come from the neighbouring byte are masked.
      IntVector::Int codes =
          Shift<-kShift>(IntVector::Load(words + kQuad / kPerWord * stride));
      if constexpr (kHigh > 0) {
        constexpr int kAt = kHigh == 1 ? kQuad : 2 * (kQuad % 4);
        const IntVector::Int high =
            IntVector::Load(words + (kLow + kHigh * kQuad / 8) * stride);
        codes =
            IntVector::Select(Bytes((1 << kLow) - 1), codes, Shift<kLow - kAt>(high));
      }
      codes = IntVector::And(codes, Bytes((1 << kBits) - 1));
      return kTableCodes ? IntVector::LookUp(kIq4Codes, codes) : codes;
    }
  }

 private:
  static IntVector::Int Bytes(int value) {
    return IntVector::Broadcast(0x01010101 * value);
  }
  // To the left, or to the right where kCount is below 0.
  template <int kCount>
  static IntVector::Int Shift(IntVector::Int bits) {
    if constexpr (kCount > 0) return IntVector::ShiftLeft16<kCount>(bits);
    if constexpr (kCount < 0) return IntVector::ShiftRight16<-kCount>(bits);
    return bits;
  }
};

template <Format kFormat>
struct BlockCodesOf {
  static constexpr BlockSpec kSpec = *FindBlocks(kFormat);
  using Type = BlockCodes<kSpec.bits, kSpec.table, SubDepths(kSpec), kSpec.mins>;
  // Of codes that are unpacked.
  using Bytes = BlockCodes<8, false, SubDepths(kSpec), kSpec.mins>;
};

// Fills the scales of `count` depths from `begin` on.
template <Format kFormat>
void LoadBlockScales(const QuantPanel& b, int begin, int count, BlockScales& out) {
  using Float = IntVector::Float;
  constexpr BlockSpec kSpec = *FindBlocks(kFormat);
  constexpr int kSubDepths = SubDepths(kSpec);
  const int lanes = kStrip * b.strips;
  for (int n = 0; n < lanes; n += IntVector::kLanes) {
    Float of_block[2];  // scale and minimum
    for (int i = 0; i < count / kSubDepths; ++i) {
      const int d = begin + i * kSubDepths;
      if (i == 0 || d % kSpec.depths == 0) {
        const ptrdiff_t at = ptrdiff_t{d / kSpec.depths} * lanes + n;
        of_block[0] =
            IntVector::LoadHalves(static_cast<const uint16_t*>(b.scales) + at);
        if constexpr (kSpec.mins) of_block[1] = IntVector::LoadHalves(b.mins + at);
      }
      Float scale = of_block[0], min = kSpec.mins ? of_block[1] : IntVector::Zero();
      if constexpr (kSpec.sub > 0) {
        const ptrdiff_t at = ptrdiff_t{d / kSubDepths} * lanes + n;
        IntVector::Int code = IntVector::WidenBytes(b.sub_scales + at);
        if constexpr (kSpec.sub_mins == SubMins::kPacked) {
          const IntVector::Int upper = IntVector::ShiftRight16<4>(code);
          min = IntVector::Mul(min, IntVector::ToFloat(upper));
          code = IntVector::And(code, IntVector::Broadcast(15));
        }
        if constexpr (kSpec.sub_mins == SubMins::kBytes) {
          const IntVector::Int sub_min = IntVector::WidenBytes(b.sub_mins + at);
          min = IntVector::Mul(min, IntVector::ToFloat(sub_min));
        }
        code = IntVector::Sub(code, IntVector::Broadcast(kSpec.sub_zero));
        scale = IntVector::Mul(scale, IntVector::ToFloat(code));
      }
      IntVector::Store(scale, out.scale + i * lanes + n);
      if constexpr (kSpec.mins) IntVector::Store(min, out.min + i * lanes + n);
    }
  }
}

// The codes of `count` depths from `begin` on as bytes, in the layout of 8-bit codes.
template <Format kFormat>
void UnpackBlocks(const QuantPanel& b, int begin, int count, uint8_t* bytes) {
  using B = typename BlockCodesOf<kFormat>::Type;
  const ptrdiff_t stride = ptrdiff_t{4} * kStrip * b.strips;
  const uint8_t* words = b.codes + begin / kDepth * B::kBits * stride;
  const auto unpack = [&]<int kQuad>(ptrdiff_t n) __attribute__((always_inline)) {
    IntVector::Store(B::template Quad<kQuad>(words + n, stride),
                     bytes + kQuad * stride + n);
  };
  for (int d = 0; d < count; d += kDepth) {
    for (ptrdiff_t n = 0; n < stride; n += 4 * IntVector::kLanes) {
      unpack.template operator()<0>(n);
      unpack.template operator()<1>(n);
      unpack.template operator()<2>(n);
      unpack.template operator()<3>(n);
      unpack.template operator()<4>(n);
      unpack.template operator()<5>(n);
      unpack.template operator()<6>(n);
      unpack.template operator()<7>(n);
    }
    words += B::kBits * stride;
    bytes += kDepth / 4 * stride;
  }
}

}  // namespace
}  // namespace ktjax

#endif  // KTJAX_FFI_GEMM_INT8_BLOCK_VECTOR_H_
