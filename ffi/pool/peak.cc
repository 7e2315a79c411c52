#include "pool/peak.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "base/aligned.h"

// The loops are assembly: compilers spill an array of accumulators around intrinsics,
// and this way the file needs no ISA flags. Compiled for plain x86-64, the compiler
// itself uses only the low halves of registers 0 to 15, so these are all that is
// clobbered; vzeroupper spares the SSE code that follows the penalty for dirty upper
// halves.
#define KTJAX_CLOBBERS                                                            \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", \
      "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "cc", "memory"

// Enough independent sums to hide the latency of 4 to 10 cycles at two instructions a
// cycle: 24 in 32 registers, 12 in 16.
#define KTJAX_SUMS_24 \
  ".irp r,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23\n"
#define KTJAX_SUMS_12 ".irp r,0,1,2,3,4,5,6,7,8,9,10,11\n"

// Defines a function that runs BODY `count` times. Everything is zero before, so that
// no denormal or NaN slows it down.
#define KTJAX_LOOP(NAME, ZERO_ALL, BODY, AFTER)                                \
  void NAME(int64_t count) {                                                   \
    asm volatile(ZERO_ALL ".p2align 5\n1:\n" BODY "sub $1, %0\njnz 1b\n" AFTER \
                 : "+r"(count)                                                 \
                 :                                                             \
                 : KTJAX_CLOBBERS);                                            \
  }

#define KTJAX_ZERO_ZMM                           \
  KTJAX_SUMS_24                                  \
  "vpxord %%zmm\\r, %%zmm\\r, %%zmm\\r\n.endr\n" \
  ".irp r,28,29,30,31\nvpxord %%zmm\\r, %%zmm\\r, %%zmm\\r\n.endr\n"
#define KTJAX_ZERO_YMM                             \
  ".irp r,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n" \
  "vpxor %%ymm\\r, %%ymm\\r, %%ymm\\r\n.endr\n"
#define KTJAX_ZERO_XMM \
  ".irp r,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\npxor %%xmm\\r, %%xmm\\r\n.endr\n"

namespace ktjax {
namespace {

KTJAX_LOOP(FmaZmm, KTJAX_ZERO_ZMM,
           KTJAX_SUMS_24 "vfmadd231ps %%zmm31, %%zmm30, %%zmm\\r\n.endr\n",
           "vzeroupper\n")
KTJAX_LOOP(Bf16Zmm, KTJAX_ZERO_ZMM,
           KTJAX_SUMS_24 "vdpbf16ps %%zmm31, %%zmm30, %%zmm\\r\n.endr\n",
           "vzeroupper\n")
KTJAX_LOOP(Int8Zmm, KTJAX_ZERO_ZMM,
           KTJAX_SUMS_24 "vpdpbusd %%zmm31, %%zmm30, %%zmm\\r\n.endr\n", "vzeroupper\n")
// Without VNNI: products in pairs (16 bits), pairs of these (32 bits), sum.
KTJAX_LOOP(Int8PairsZmm, KTJAX_ZERO_ZMM,
           KTJAX_SUMS_24
           "vpmaddubsw %%zmm31, %%zmm30, %%zmm29\n"
           "vpmaddwd %%zmm28, %%zmm29, %%zmm29\n"
           "vpaddd %%zmm29, %%zmm\\r, %%zmm\\r\n.endr\n",
           "vzeroupper\n")
KTJAX_LOOP(FmaYmm, KTJAX_ZERO_YMM,
           KTJAX_SUMS_12 "vfmadd231ps %%ymm15, %%ymm14, %%ymm\\r\n.endr\n",
           "vzeroupper\n")
KTJAX_LOOP(Int8PairsYmm, KTJAX_ZERO_YMM,
           KTJAX_SUMS_12
           "vpmaddubsw %%ymm15, %%ymm14, %%ymm13\n"
           "vpmaddwd %%ymm12, %%ymm13, %%ymm13\n"
           "vpaddd %%ymm13, %%ymm\\r, %%ymm\\r\n.endr\n",
           "vzeroupper\n")
// SSE2 multiplies in place: the product needs a register, and a move, of its own.
KTJAX_LOOP(MulAddXmm, KTJAX_ZERO_XMM,
           KTJAX_SUMS_12
           "movaps %%xmm15, %%xmm13\n"
           "mulps %%xmm14, %%xmm13\n"
           "addps %%xmm13, %%xmm\\r\n.endr\n",
           "")
// SSE2 has no 8-bit products; values widened to 16 bits are the best it can do.
KTJAX_LOOP(Int16PairsXmm, KTJAX_ZERO_XMM,
           KTJAX_SUMS_12
           "movdqa %%xmm15, %%xmm13\n"
           "pmaddwd %%xmm14, %%xmm13\n"
           "paddd %%xmm13, %%xmm\\r\n.endr\n",
           "")

// Eight tiles of 16 rows of 64 bytes: six sums and two operands.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);
constexpr TileConfig kTiles;

#define KTJAX_TILE_LOOP(NAME, INSTRUCTION)                   \
  void NAME(int64_t count) {                                 \
    asm volatile(                                            \
        "ldtilecfg %1\n"                                     \
        ".irp r,0,1,2,3,4,5,6,7\ntilezero %%tmm\\r\n.endr\n" \
        ".p2align 5\n1:\n"                                   \
        ".irp r,0,1,2,3,4,5\n" INSTRUCTION                   \
        " %%tmm7, %%tmm6, %%tmm\\r\n.endr\n"                 \
        "sub $1, %0\njnz 1b\ntilerelease\n"                  \
        : "+r"(count)                                        \
        : "m"(kTiles)                                        \
        : "cc");                                             \
  }
KTJAX_TILE_LOOP(Bf16Tile, "tdpbf16ps")
KTJAX_TILE_LOOP(Int8Tile, "tdpbssd")

struct Loop {
  Isa needs;
  const char* instruction;
  void (*run)(int64_t count);
  double operations;  // per count
};

// Strongest first.
constexpr Loop kF32[] = {
    {Isa::kAvx512, "vfmadd231ps zmm", FmaZmm, 24 * 16 * 2},
    {Isa::kAvx2, "vfmadd231ps ymm", FmaYmm, 12 * 8 * 2},
    {Isa::kPortable, "mulps + addps xmm", MulAddXmm, 12 * 4 * 2},
};
constexpr Loop kBf16[] = {
    {Isa::kAmx, "tdpbf16ps", Bf16Tile, 6 * 16 * 16 * 32 * 2},
    {Isa::kAvx512Bf16, "vdpbf16ps zmm", Bf16Zmm, 24 * 32 * 2},
    kF32[0],
    kF32[1],
    kF32[2],
};
constexpr Loop kInt8[] = {
    {Isa::kAmx, "tdpbssd", Int8Tile, 6 * 16 * 16 * 64 * 2},
    {Isa::kAvx512Vnni, "vpdpbusd zmm", Int8Zmm, 24 * 64 * 2},
    {Isa::kAvx512, "vpmaddubsw + vpmaddwd + vpaddd zmm", Int8PairsZmm, 24 * 64 * 2},
    {Isa::kAvx2, "vpmaddubsw + vpmaddwd + vpaddd ymm", Int8PairsYmm, 12 * 32 * 2},
    {Isa::kPortable, "pmaddwd + paddd xmm", Int16PairsXmm, 12 * 8 * 2},
};

// Reads `bytes` (a multiple of 512), prefetching 4 KiB ahead: one core alone does not
// keep enough loads in flight to fill the memory bus. STEP is 8 registers wide.
#define KTJAX_READ(NAME, OR, STEP, AFTER)               \
  void NAME(const char* data, int64_t bytes) {          \
    const char* const end = data + bytes;               \
    asm volatile(                                       \
        ".p2align 5\n1:\n"                              \
        ".irp r,0,1,2,3,4,5,6,7\n" OR                   \
        "\n.endr\n"                                     \
        ".irp line,0,64,128,192,256,320,384,448\n"      \
        ".if \\line < " STEP                            \
        "\nprefetcht0 4096+\\line(%0)\n.endif\n.endr\n" \
        "add $" STEP ", %0\ncmp %1, %0\njb 1b\n" AFTER  \
        : "+r"(data)                                    \
        : "r"(end)                                      \
        : KTJAX_CLOBBERS);                              \
  }
KTJAX_READ(ReadZmm, "vpord \\r*64(%0), %%zmm\\r, %%zmm\\r", "512", "vzeroupper\n")
KTJAX_READ(ReadYmm, "vpor \\r*32(%0), %%ymm\\r, %%ymm\\r", "256", "vzeroupper\n")
KTJAX_READ(ReadXmm, "por \\r*16(%0), %%xmm\\r", "128", "")

template <size_t kCount>
const Loop& Strongest(const Loop (&loops)[kCount], const CpuFeatures& cpu) {
  return *std::find_if(std::begin(loops), std::end(loops), [&cpu](const Loop& loop) {
    return MissingFeatures(loop.needs, cpu).empty();
  });
}

// Work per second of all workers together, in units of 1e9. `chunk` does a little work
// and returns how much.
double BestRate(WorkerPool& pool, double seconds,
                const std::function<double(Worker&)>& chunk) {
  using Clock = std::chrono::steady_clock;
  constexpr int kParts = 5;
  double best = 0;
  for (int part = 0; part < kParts; ++part) {
    std::vector<double> rates(pool.thread_count());
    pool.Run([&](Worker& worker) {
      if (!worker.Barrier()) return;
      const Clock::time_point start = Clock::now();
      double work = 0;
      double elapsed = 0;
      do {
        work += chunk(worker);
        elapsed = std::chrono::duration<double>(Clock::now() - start).count();
      } while (elapsed < seconds / kParts);
      rates[worker.index()] = work / elapsed;
    });
    double sum = 0;
    for (double rate : rates) sum += rate;
    best = std::max(best, sum);
  }
  return best / 1e9;
}

double MeasureLoop(WorkerPool& pool, double seconds, const Loop& loop) {
  constexpr int64_t kCount = 1000;  // 10 to 50 us: the clock's 50 ns do not matter
  return BestRate(pool, seconds, [&loop](Worker&) {
    loop.run(kCount);
    return kCount * loop.operations;
  });
}

double MeasureRead(WorkerPool& pool, double seconds, const CpuFeatures& cpu) {
  // At least 32 MiB a thread as well: twice the largest share of a last-level cache.
  constexpr int64_t kTotal = int64_t{512} << 20;
  constexpr int64_t kAtLeast = int64_t{32} << 20;
  constexpr int64_t kChunk = int64_t{4} << 20;
  const int64_t share = (kTotal / pool.thread_count() + kChunk - 1) / kChunk * kChunk;
  const int64_t bytes = std::max(share, kAtLeast);
  const auto read = MissingFeatures(Isa::kAvx512, cpu).empty() ? ReadZmm
                    : MissingFeatures(Isa::kAvx2, cpu).empty() ? ReadYmm
                                                               : ReadXmm;
  struct alignas(128) Stream {
    AlignedBuffer memory;
    int64_t position = 0;
  };
  std::vector<Stream> streams(pool.thread_count());
  pool.Run([&](Worker& worker) {
    AlignedBuffer memory(bytes);
    // Written here, so that the pages lie on the reader's node; and not with zeros, as
    // untouched pages are all the same one.
    std::memset(memory.data(), 1, bytes);
    streams[worker.index()].memory = std::move(memory);
  });
  return BestRate(pool, seconds, [&](Worker& worker) {
    Stream& stream = streams[worker.index()];
    read(static_cast<const char*>(stream.memory.data()) + stream.position, kChunk);
    stream.position = (stream.position + kChunk) % bytes;
    return static_cast<double>(kChunk);
  });
}

}  // namespace

Peaks MeasurePeaks(WorkerPool& pool, double seconds, const CpuFeatures& cpu) {
  if (!(seconds > 0)) {
    throw std::invalid_argument("MeasurePeaks: seconds must be positive, got " +
                                std::to_string(seconds));
  }
  const Loop& bf16 = Strongest(kBf16, cpu);
  const Loop& int8 = Strongest(kInt8, cpu);
  const Loop& f32 = Strongest(kF32, cpu);
  Peaks peaks;
  peaks.bf16_instruction = bf16.instruction;
  peaks.int8_instruction = int8.instruction;
  peaks.f32_instruction = f32.instruction;
  peaks.bf16_gflops = MeasureLoop(pool, seconds, bf16);
  peaks.int8_gops = MeasureLoop(pool, seconds, int8);
  peaks.f32_gflops = MeasureLoop(pool, seconds, f32);
  peaks.dram_read_gbs = MeasureRead(pool, seconds, cpu);
  return peaks;
}

}  // namespace ktjax
