// The element-wise steps between a product and memory, written once with the compiler's
// vector extension.
// Everything is static: a file compiled with ISA flags must not share code with others.
#ifndef KTJAX_FFI_GEMM_EPILOGUE_IMPL_H_
#define KTJAX_FFI_GEMM_EPILOGUE_IMPL_H_

#include <cstring>

#include "base/types.h"
#include "gemm/dropout_impl.h"
#include "gemm/kernel.h"
#include "gemm/vector_types.h"
#if defined(__AVX512F__)
#include "gemm/pack_avx512.h"
#endif

namespace ktjax {
namespace {

// Vectors are passed by reference: by value, their ABI would depend on the ISA flags.
inline void Load(const float* src, F32x16& value) { std::memcpy(&value, src, 64); }
inline void Store(const F32x16& value, float* dst) { std::memcpy(dst, &value, 64); }

inline void Load(const bf16* src, F32x16& value) {
  U16x16 bits;
  std::memcpy(&bits, src, 32);
  const U32x16 wide = __builtin_convertvector(bits, U32x16) << 16;
  std::memcpy(&value, &wide, 64);
}

// Round to nearest even; NaN stays NaN (quiet) instead of rounding up to infinity.
inline void Store(const F32x16& value, bf16* dst) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst),
                      (__m256i)_mm512_cvtneps_pbh((__m512)value));
#else
  U32x16 bits;
  std::memcpy(&bits, &value, 64);
  const U32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const U32x16 quiet = (bits >> 16) | 0x40;
  const U32x16 result = (bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded;
  const U16x16 narrow = __builtin_convertvector(result, U16x16);
  std::memcpy(dst, &narrow, 32);
#endif
}

template <typename T>
void StoreSome(const F32x16& value, int count, T* dst) {
  if (count >= kStrip) return Store(value, dst);
  T lanes[kStrip];
  Store(value, lanes);
  std::memcpy(dst, lanes, sizeof(T) * count);
}

// sum = sum * x + c, in one rounding where the instruction set has it.
inline void MulAdd(F32x16& sum, const F32x16& x, float c) {
#if defined(__AVX512F__)
  sum = (F32x16)_mm512_fmadd_ps((__m512)sum, (__m512)x, _mm512_set1_ps(c));
#else
  sum = sum * x + c;
#endif
}

// value = e^value, to about 3 ulp in [-87, 88] and clamped outside. Cody-Waite
// reduction by ln 2 in two parts, then the Taylor polynomial of degree 6 on |r| <=
// ln(2) / 2, where the rest is below 1.2e-7.
inline void Exp(F32x16& value) {
  const F32x16 zero = {};
  const F32x16 top = zero + 88.3762626647949f, bottom = zero - 87.3365447504019f;
  F32x16 x = value > top ? top : value;
  x = x < bottom ? bottom : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const F32x16 shifted = x * 1.44269504088896341f + magic;
  const F32x16 n = shifted - magic;
  const F32x16 r = (x - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
  F32x16 p = zero + 1.3888888889e-3f;
  MulAdd(p, r, 8.3333333333e-3f);
  MulAdd(p, r, 4.1666666667e-2f);
  MulAdd(p, r, 1.6666666667e-1f);
  MulAdd(p, r, 0.5f);
  MulAdd(p, r, 1.0f);
  MulAdd(p, r, 1.0f);
  // 2^n: the low bits of `shifted` hold the integer n.
  I32x16 bits;
  std::memcpy(&bits, &shifted, 64);
  bits = (bits - 0x4b400000 + 127) << 23;
  F32x16 scale;
  std::memcpy(&scale, &bits, 64);
  value = p * scale;
}

inline void Sigmoid(const F32x16& x, F32x16& sigma) {
  F32x16 e = -x;
  Exp(e);
  e += 1.0f;
#if defined(__AVX512F__)
  // An estimate to 2^-14 and a Newton step: a division would take as long as all of
  // Exp.
  const F32x16 estimate = (F32x16)_mm512_rcp14_ps((__m512)e);
  sigma = estimate * (2.0f - e * estimate);
#else
  sigma = 1.0f / e;
#endif
}

// Halves are added to halves: a chain of 15 additions would take as long as the rest of
// a row.
inline float SumLanes(const F32x16& value) {
  float lanes[kStrip];
  Store(value, lanes);
  for (int width = kStrip / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

inline void LoadSplit(const SplitRows& rows, ptrdiff_t at, F32x16& value) {
  Load(rows.high + at, value);
  if (rows.low) {
    F32x16 low;
    Load(rows.high + at + rows.low, low);
    value += low;
  }
}

// The first `count` lanes, in both parts where there are two.
inline void StoreSplit(const F32x16& value, int count, const SplitRows& rows,
                       ptrdiff_t at) {
  if (rows.low) {
    bf16 lanes[kStrip];
    F32x16 rounded;
    Store(value, lanes);
    Load(lanes, rounded);
    const F32x16 zero = {};
    const F32x16 infinity = zero + __builtin_inff();
    const auto infinite = (rounded == infinity) | (rounded == -infinity);
    StoreSome(infinite ? zero : value - rounded, count, rows.high + at + rows.low);
  }
  StoreSome(value, count, rows.high + at);
}

// One or two neighbouring strips. Two are one store of a whole line where they can be:
// half as many stores wait for their lines.
inline void StoreStrips(const F32x16 (&values)[2], int count, const SplitRows& rows,
                        ptrdiff_t at) {
#if defined(__AVX512BF16__)
  if (count == 2 && !rows.low) {
    _mm512_storeu_si512(rows.high + at, RoundTwo((__m512)values[0], (__m512)values[1]));
    return;
  }
#endif
  StoreSplit(values[0], kStrip, rows, at);
  if (count == 2) StoreSplit(values[1], kStrip, rows, at + kStrip);
}

inline void SwiGlu(const float* c, int rows, int strips, SplitRows h,
                   const int32_t* index, SplitRows gate, SplitRows up) {
  const int pairs = strips / 2;
  for (int r = 0; r < rows; ++r) {
    const ptrdiff_t kept = (index ? index[r] : r) * gate.stride;
    for (int p = 0; p < pairs; p += 2) {
      const int count = pairs - p < 2 ? 1 : 2;
      F32x16 g[2], u[2], value[2];
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        if (i == count) break;
        const float* pair = c + r * kPanel + 2 * kStrip * (p + i);
        Load(pair, g[i]);
        Load(pair + kStrip, u[i]);
        F32x16 sigma;
        Sigmoid(g[i], sigma);
        value[i] = g[i] * sigma * u[i];
      }
      StoreStrips(value, count, h, r * h.stride + kStrip * p);
      if (gate.high) {
        StoreStrips(g, count, gate, kept + kStrip * p);
        StoreStrips(u, count, up, kept + kStrip * p);
      }
    }
  }
}

inline void SwiGluGrad(const float* c, int rows, int strips, const float* weights,
                       const int32_t* index, SplitRows gate, SplitRows up,
                       SplitRows d_gate, SplitRows d_up, SplitRows h, float* dots,
                       ptrdiff_t dots_stride) {
  for (int r = 0; r < rows; ++r) {
    F32x16 dot = {};
    const ptrdiff_t kept = (index ? index[r] : r) * gate.stride;
    for (int s = 0; s < strips; s += 2) {
      const int count = strips - s < 2 ? 1 : 2;
      F32x16 dg[2], du[2], value[2];
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        if (i == count) break;
        const ptrdiff_t in = kept + kStrip * (s + i);
        F32x16 dh, g, u, sigma;
        Load(c + r * kPanel + kStrip * (s + i), dh);
        LoadSplit(gate, in, g);
        LoadSplit(up, in, u);
        Sigmoid(g, sigma);
        const F32x16 silu = g * sigma;
        value[i] = silu * u;
        dot += dh * value[i];
        dh *= weights[r];
        dg[i] = dh * u * (sigma * (1.0f + g * (1.0f - sigma)));
        du[i] = dh * silu;
      }
      const ptrdiff_t out = r * d_gate.stride + kStrip * s;
      StoreStrips(dg, count, d_gate, out);
      StoreStrips(du, count, d_up, out);
      if (h.high) StoreStrips(value, count, h, out);
    }
    dots[r * dots_stride] = SumLanes(dot);
  }
}

inline void ScatterAdd(const float* c, int rows, int strips, const int32_t* tokens,
                       const float* weights, float* out, ptrdiff_t stride) {
  for (int r = 0; r < rows; ++r) {
    float* row = out + tokens[r] * stride;
    const float weight = weights ? weights[r] : 1.0f;
    for (int s = 0; s < strips; ++s) {
      F32x16 value, sum;
      Load(c + r * kPanel + kStrip * s, value);
      Load(row + kStrip * s, sum);
      Store(sum + weight * value, row + kStrip * s);
    }
  }
}

inline void Transpose(F32x16 (&block)[kStrip]) {
#if defined(__AVX512F__)
  Transpose16x16(reinterpret_cast<__m512i*>(block));
#else
  float lanes[kStrip][kStrip];
  for (int i = 0; i < kStrip; ++i) Store(block[i], lanes[i]);
  for (int i = 0; i < kStrip; ++i) {
    for (int j = 0; j < kStrip; ++j) block[i][j] = lanes[j][i];
  }
#endif
}

// Past the caches where a store is a whole line of one.
template <typename T>
void Stream(const F32x16& value, int count, T* dst) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(float)) {
    if (count >= kStrip && reinterpret_cast<uintptr_t>(dst) % 64 == 0) {
      return _mm512_stream_ps(dst, (__m512)value);
    }
  }
#endif
  StoreSome(value, count, dst);
}

template <typename T, bool kStream = false>
void StoreRows(const float* c, int rows, int columns, T* dst, ptrdiff_t stride) {
  for (int r = 0; r < rows; ++r) {
    for (int n = 0; n < columns; n += kStrip) {
      F32x16 value;
      Load(c + r * kPanel + n, value);
      (kStream ? Stream<T> : StoreSome<T>)(value, columns - n, dst + r * stride + n);
    }
  }
}

template <typename T>
void StreamColumns(const float* c, int rows, int columns, T* dst, ptrdiff_t stride) {
  for (int r = 0; r < rows; r += kStrip) {
    const int count = rows - r < kStrip ? rows - r : kStrip;
    for (int n = 0; n < columns; n += kStrip) {
      const int width = columns - n < kStrip ? columns - n : kStrip;
      F32x16 block[kStrip];
      if (count == kStrip && width == kStrip) {  // without a test per row
#pragma GCC unroll 16
        for (int i = 0; i < kStrip; ++i) Load(c + (r + i) * kPanel + n, block[i]);
        Transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < kStrip; ++i) {
          Stream(block[i], kStrip, dst + (n + i) * stride + r);
        }
        continue;
      }
      for (int i = 0; i < kStrip; ++i) {
        block[i] = F32x16{};
        if (i < count) Load(c + (r + i) * kPanel + n, block[i]);
      }
      Transpose(block);
      for (int i = 0; i < width; ++i) {
        StoreSome(block[i], count, dst + (n + i) * stride + r);
      }
    }
  }
}

inline void StoreScaled(const float* c, int rows, int columns, int padded, float scale,
                        SplitRows dst) {
  for (int r = 0; r < rows; ++r) {
    for (int n = 0; n < columns; n += kStrip) {
      F32x16 value;
      Load(c + r * kPanel + n, value);
      StoreSplit(value * scale, columns - n, dst, r * dst.stride + n);
    }
    if (padded == columns) continue;
    bf16* rest = dst.high + r * dst.stride + columns;
    std::memset(rest, 0, sizeof(bf16) * (padded - columns));
    if (dst.low) std::memset(rest + dst.low, 0, sizeof(bf16) * (padded - columns));
  }
}

constexpr Epilogues kEpilogues = {
    .swiglu = SwiGlu,
    .swiglu_grad = SwiGluGrad,
    .scatter_add = ScatterAdd,
    .store_split = StoreScaled,
    .store_rows_f32 = StoreRows<float>,
    .store_rows_bf16 = StoreRows<bf16>,
    .stream_rows_f32 = StoreRows<float, true>,
    .stream_rows_bf16 = StoreRows<bf16, true>,
    .stream_columns_f32 = StreamColumns<float>,
    .stream_columns_bf16 = StreamColumns<bf16>,
    .copy_kept = CopyKept,
    .drop_from_panel = DropFromPanel,
    .add_kept = AddKept,
};

}  // namespace
}  // namespace ktjax

#endif  // KTJAX_FFI_GEMM_EPILOGUE_IMPL_H_
