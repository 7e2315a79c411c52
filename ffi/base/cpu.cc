#include "base/cpu.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace ktjax {
namespace {

struct CpuidResult {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// All zero for a leaf that this CPU does not have.
CpuidResult Cpuid(unsigned leaf, unsigned subleaf = 0) {
  CpuidResult r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

constexpr bool Bit(uint64_t word, int bit) { return (word >> bit) & 1; }

// The register states that the operating system saves. In assembly because the
// intrinsic wants -mxsave for the whole file.
uint64_t ReadXcr0() {
  uint32_t low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

std::string Brand() {
  std::array<CpuidResult, 3> words;
  for (unsigned i = 0; i < 3; ++i) words[i] = Cpuid(0x80000002u + i);
  char text[sizeof(words) + 1] = {};
  std::memcpy(text, words.data(), sizeof(words));
  std::string brand(text);
  const size_t first = brand.find_first_not_of(' ');
  if (first == std::string::npos) return "unknown CPU";
  return brand.substr(first, brand.find_last_not_of(' ') - first + 1);
}

// Bit 18 of the extended states is XTILEDATA. Asking for the permission without
// checking that the kernel knows it would fail with a misleading error.
bool RequestAmxPermission() {
  constexpr int kArchGetXcompSupp = 0x1021;
  constexpr int kArchReqXcompPerm = 0x1023;
  constexpr int kXtileData = 18;
  uint64_t supported = 0;
  if (syscall(SYS_arch_prctl, kArchGetXcompSupp, &supported) != 0) return false;
  if (!Bit(supported, kXtileData)) return false;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXtileData) == 0;
}

CpuFeatures Detect() {
  CpuFeatures f;
  f.brand = Brand();
  const CpuidResult leaf1 = Cpuid(1);
  const CpuidResult leaf7 = Cpuid(7, 0);
  const CpuidResult leaf7_1 = leaf7.eax >= 1 ? Cpuid(7, 1) : CpuidResult{};
  f.fma = Bit(leaf1.ecx, 12);
  f.f16c = Bit(leaf1.ecx, 29);
  f.avx2 = Bit(leaf7.ebx, 5);
  f.avx512f = Bit(leaf7.ebx, 16);
  f.avx512dq = Bit(leaf7.ebx, 17);
  f.avx512bw = Bit(leaf7.ebx, 30);
  f.avx512vl = Bit(leaf7.ebx, 31);
  f.avx512_vnni = Bit(leaf7.ecx, 11);
  f.avx512_bf16 = Bit(leaf7_1.eax, 5);
  f.amx_bf16 = Bit(leaf7.edx, 22);
  f.amx_tile = Bit(leaf7.edx, 24);
  f.amx_int8 = Bit(leaf7.edx, 25);
  if (Bit(leaf1.ecx, 27)) {  // OSXSAVE: xgetbv exists
    const uint64_t xcr0 = ReadXcr0();
    const auto saves = [xcr0](uint64_t mask) { return (xcr0 & mask) == mask; };
    f.os_avx = saves(0x6);      // SSE, AVX
    f.os_avx512 = saves(0xe6);  // and opmask, upper halves, zmm16..31
    f.os_amx = saves(0x60000);  // XTILECFG, XTILEDATA
  }
  if (f.amx_tile && f.os_amx) f.amx_permitted = RequestAmxPermission();
  return f;
}

struct Requirement {
  bool found;
  const char* name;
};

std::vector<Requirement> Requirements(Isa isa, const CpuFeatures& f) {
  std::vector<Requirement> needs;
  const auto add = [&needs](std::initializer_list<Requirement> more) {
    for (const Requirement& need : more) needs.push_back(need);
  };
  if (isa == Isa::kPortable || isa == Isa::kAmxEmulated) return needs;
  add({{f.avx2, "avx2"}, {f.fma, "fma"}, {f.f16c, "f16c"}, {f.os_avx, "os_avx"}});
  if (isa == Isa::kAvx2) return needs;
  add({{f.avx512f, "avx512f"},
       {f.avx512bw, "avx512bw"},
       {f.avx512dq, "avx512dq"},
       {f.avx512vl, "avx512vl"},
       {f.os_avx512, "os_avx512"}});
  if (isa == Isa::kAvx512) return needs;
  add({{f.avx512_vnni, "avx512_vnni"}});
  if (isa == Isa::kAvx512Vnni) return needs;
  add({{f.avx512_bf16, "avx512_bf16"}});
  if (isa == Isa::kAmx) {
    add({{f.amx_tile, "amx_tile"},
         {f.amx_bf16, "amx_bf16"},
         {f.amx_int8, "amx_int8"},
         {f.os_amx, "os_amx"},
         {f.amx_permitted, "amx_permission"}});
  }
  return needs;
}

std::string Join(const std::vector<std::string>& items) {
  std::string text;
  for (const std::string& item : items) text += (text.empty() ? "" : ", ") + item;
  return text;
}

constexpr Isa kAll[] = {Isa::kPortable,   Isa::kAvx2,       Isa::kAvx512,
                        Isa::kAvx512Vnni, Isa::kAvx512Bf16, Isa::kAmx,
                        Isa::kAmxEmulated};

std::string SupportedNames(const CpuFeatures& cpu) {
  std::vector<std::string> names;
  for (Isa isa : SupportedIsas(cpu)) names.push_back(IsaName(isa));
  return Join(names);
}

}  // namespace

const CpuFeatures& ThisCpu() {
  static const CpuFeatures features = Detect();
  return features;
}

std::string IsaName(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return "portable";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Vnni:
      return "avx512_vnni";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAmx:
      return "amx";
    case Isa::kAmxEmulated:
      return "amx_emulated";
  }
  throw std::invalid_argument("IsaName: not an Isa");
}

std::vector<std::string> MissingFeatures(Isa isa, const CpuFeatures& cpu) {
  std::vector<std::string> missing;
  for (const Requirement& need : Requirements(isa, cpu)) {
    if (!need.found) missing.push_back(need.name);
  }
  return missing;
}

std::vector<Isa> SupportedIsas(const CpuFeatures& cpu) {
  std::vector<Isa> supported;
  for (Isa isa : kAll) {
    if (MissingFeatures(isa, cpu).empty()) supported.push_back(isa);
  }
  return supported;
}

Isa ChooseIsa(const char* forced, const CpuFeatures& cpu) {
  if (forced == nullptr || *forced == '\0') {
    const std::vector<Isa> supported = SupportedIsas(cpu);
    return supported[supported.size() - 2];  // the last one is kAmxEmulated
  }
  for (Isa isa : kAll) {
    if (IsaName(isa) != forced) continue;
    const std::vector<std::string> missing = MissingFeatures(isa, cpu);
    if (missing.empty()) return isa;
    throw std::invalid_argument("instruction set '" + std::string(forced) +
                                "' was asked for, but this machine (" + cpu.brand +
                                ") lacks " + Join(missing) + "; it supports " +
                                SupportedNames(cpu));
  }
  throw std::invalid_argument("unknown instruction set '" + std::string(forced) +
                              "'; this machine (" + cpu.brand + ") supports " +
                              SupportedNames(cpu));
}

std::string ExplainIsa(Isa chosen, const CpuFeatures& cpu) {
  std::vector<std::string> found;
  for (const Requirement& need : Requirements(chosen, cpu)) {
    if (need.found) found.push_back(need.name);
  }
  std::string text = IsaName(chosen) + ": ";
  text += found.empty() ? "needs no CPU feature" : "found " + Join(found);
  for (Isa isa : kAll) {
    if (isa <= chosen || isa == Isa::kAmxEmulated) continue;
    const std::vector<std::string> missing = MissingFeatures(isa, cpu);
    if (missing.empty()) {
      text += "; " + IsaName(isa) + " is supported too";
    } else {
      text += "; " + IsaName(isa) + " lacks " + Join(missing);
    }
  }
  return text;
}

}  // namespace ktjax
