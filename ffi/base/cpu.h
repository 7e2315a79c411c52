// What this CPU and kernel can run, and which instruction set the kernels shall use.
#ifndef KTJAX_FFI_BASE_CPU_H_
#define KTJAX_FFI_BASE_CPU_H_

#include <string>
#include <vector>

namespace ktjax {

// From the weakest to the strongest; each needs what those before it need. (No CPU has
// AVX-512 BF16 without VNNI.)
enum class Isa {
  kPortable,
  kAvx2,         // AVX2, FMA, F16C
  kAvx512,       // kAvx2 and AVX-512 F, BW, DQ, VL
  kAvx512Vnni,   // kAvx512 and VNNI: integer dot products
  kAvx512Bf16,   // kAvx512Vnni and BF16: bfloat16 dot products
  kAmx,          // kAvx512Bf16 and AMX TILE, BF16, INT8, with the kernel's permission
  kAmxEmulated,  // the AMX code with its tile instructions in plain C++; tests only
};

// Feature bits as CPUID reports them, and what the operating system saves and restores
// (XCR0): an instruction set is usable only with both.
struct CpuFeatures {
  std::string brand;
  bool avx2 = false, fma = false, f16c = false;
  bool avx512f = false, avx512bw = false, avx512dq = false, avx512vl = false;
  bool avx512_vnni = false, avx512_bf16 = false;
  bool amx_tile = false, amx_bf16 = false, amx_int8 = false;
  bool os_avx = false, os_avx512 = false, os_amx = false;
  // Linux hands out the 8 KiB of tile state on request only.
  bool amx_permitted = false;
};

// Detected by the first call. That call also asks Linux for the AMX tile state, a
// permission of the process, which must come before its use: WorkerPool makes it.
const CpuFeatures& ThisCpu();

// "portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx", "amx_emulated".
std::string IsaName(Isa isa);

// What `cpu` lacks for `isa`, by name; empty when it is supported.
std::vector<std::string> MissingFeatures(Isa isa, const CpuFeatures& cpu = ThisCpu());

// All that `cpu` can run, weakest first; kAmxEmulated, always possible, comes last.
std::vector<Isa> SupportedIsas(const CpuFeatures& cpu = ThisCpu());

// The instruction set called `forced`, or the best one when `forced` is null or empty
// (never kAmxEmulated). Throws std::invalid_argument for a name that does not exist and
// for an instruction set that `cpu` lacks, naming what is missing and what is there.
Isa ChooseIsa(const char* forced, const CpuFeatures& cpu = ThisCpu());

// One line for people: which features made `chosen` possible and what the better ones
// lack. For example "avx512_bf16: found avx2, ...; amx lacks amx_tile, amx_bf16".
std::string ExplainIsa(Isa chosen, const CpuFeatures& cpu = ThisCpu());

}  // namespace ktjax

#endif  // KTJAX_FFI_BASE_CPU_H_
