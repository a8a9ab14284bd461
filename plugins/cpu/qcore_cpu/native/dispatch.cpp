#include "dispatch.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

namespace qcore {
namespace {

struct Registers { uint32_t eax, ebx, ecx, edx; };

Registers cpuid(uint32_t leaf, uint32_t part) {
  Registers r{};
  if (!__get_cpuid_count(leaf, part, &r.eax, &r.ebx, &r.ecx, &r.edx)) return {};
  return r;
}

// The register states that the operating system saves (XCR0).
uint64_t saved_states() {
  if (!(cpuid(1, 0).ecx & (1u << 27))) return 0;
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

bool has(uint32_t word, int bit) { return word >> bit & 1; }

bool has_avx2() {
  const Registers one = cpuid(1, 0), seven = cpuid(7, 0);
  return (saved_states() & 0x6) == 0x6 && has(one.ecx, 12) && has(one.ecx, 29) && has(seven.ebx, 5);  // fma, f16c, avx2
}

bool has_avxvnni() { return has_avx2() && has(cpuid(7, 1).eax, 4); }

bool has_avx512() {
  const Registers seven = cpuid(7, 0);
  return has_avx2() && (saved_states() & 0xe6) == 0xe6 && has(seven.ebx, 16) && has(seven.ebx, 17) && has(seven.ebx, 30) &&
         has(seven.ebx, 31) && has(seven.ecx, 11);  // f, dq, bw, vl, vnni
}

bool has_avx512bf16() { return has_avx512() && has(cpuid(7, 1).eax, 5); }

// Linux lets a process use tiles when it asks.
bool has_amx() {
  const Registers seven = cpuid(7, 0);
  if (!has_avx512bf16() || (saved_states() & 0x60000) != 0x60000) return false;
  if (!has(seven.edx, 22) || !has(seven.edx, 24) || !has(seven.edx, 25)) return false;  // bf16, tile, int8
  constexpr int kRequestPermission = 0x1023, kTileData = 18;                             // of arch_prctl
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

struct Choice {
  bool (*present)();
  const Kernels* (*kernels)();
};

constexpr Choice kChoices[] = {  // the best first
    {has_amx, kernels_amx},
    {has_avx512bf16, kernels_avx512bf16},
    {has_avx512, kernels_avx512},
    {has_avxvnni, kernels_avxvnni},
    {has_avx2, kernels_avx2},
};

}  // namespace

const Kernels* kernels_named(const char* name) {
  for (const Choice& choice : kChoices)
    if (choice.present() && (!*name || !std::strcmp(choice.kernels()->name, name))) return choice.kernels();
  return nullptr;
}

const Kernels* chosen_kernels() {
  const char* const wanted = std::getenv("QCORE_CPU_ISA");
  static const Kernels* const chosen = kernels_named(wanted ? wanted : "");
  return chosen;
}

}  // namespace qcore

QCORE_API const char* qcore_isa() {
  const qcore::Kernels* kernels = qcore::chosen_kernels();
  return kernels ? kernels->name : "";
}

QCORE_API const char* qcore_isas() {
  static char names[128];
  names[0] = 0;
  for (const qcore::Choice& choice : qcore::kChoices) {
    if (!choice.present()) continue;
    if (*names) std::strcat(names, " ");
    std::strcat(names, choice.kernels()->name);
  }
  return names;
}

// A digest of the sources that this was built from.
QCORE_API const char* qcore_sources() { return QCORE_SOURCES; }
