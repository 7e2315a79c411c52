// What this machine can do at best, measured: the denominator of "% of peak".
#ifndef KTJAX_FFI_POOL_PEAK_H_
#define KTJAX_FFI_POOL_PEAK_H_

#include <string>

#include "base/cpu.h"
#include "pool/worker_pool.h"

namespace ktjax {

// Over all threads of the pool together. A multiply-add counts as two operations.
struct Peaks {
  double bf16_gflops = 0;    // products of bfloat16 values, summed in float32
  double int8_gops = 0;      // products of 8-bit values, summed in 32 bits
  double f32_gflops = 0;     // float32 multiply-adds
  double dram_read_gbs = 0;  // 1e9 bytes read per second, from memory, not caches
  // The instruction that each of the first three was measured with. Without bfloat16
  // instructions the products are float32 ones: that is then the ceiling of a kernel.
  std::string bf16_instruction;
  std::string int8_instruction;
  std::string f32_instruction;
};

// Measures each figure for about `seconds` with the strongest instructions that `cpu`
// has, and keeps the best fifth, as other programs can only slow it down. Takes at
// least 512 MiB of memory meanwhile. Throws std::invalid_argument unless seconds > 0.
Peaks MeasurePeaks(WorkerPool& pool, double seconds,
                   const CpuFeatures& cpu = ThisCpu());

}  // namespace ktjax

#endif  // KTJAX_FFI_POOL_PEAK_H_
