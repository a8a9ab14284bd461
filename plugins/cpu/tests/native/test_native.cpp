// The kernels of every instruction set that the processor has, against sums in double. Memory ends where a weight ends, so that
// sanitizers see a read past it.
//
//     test_native [SEED] [ISA ...]      prints a line for each instruction set; exit status 1 where one is wrong
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cases.h"
#include "dispatch.h"

using namespace qcore;

namespace {

bool passes(const Kernels& kernels) {
  Tally tally;
  for (const auto cases : {linear_cases, grid_cases, product_cases, score_cases, attention_cases}) cases(kernels, tally);
  std::printf("%s: %d of %d cases wrong; greatest errors %.2g (float32), %.2g (float16), %.2g (bfloat16)\n", kernels.name, tally.wrong, tally.cases, tally.most[0], tally.most[1],
              tally.most[2]);
  std::fflush(stdout);
  return !tally.wrong;
}

}  // namespace

int main(int count, char** arguments) {
  generator.seed(count > 1 ? static_cast<unsigned>(std::atoi(arguments[1])) : 1);
  bool good = blocks_are_taken_apart();
  std::vector<std::string> names(arguments + (count > 2 ? 2 : count), arguments + count);
  const bool named = !names.empty();
  if (!named) names = {"amx", "avx512bf16", "avx512", "avxvnni", "avx2"};
  for (const std::string& name : names) {
    const Kernels* const kernels = kernels_named(name.c_str());
    if (kernels) good = passes(*kernels) && good;
    else if (named) std::printf("%s: not on this processor\n", name.c_str()), good = false;
  }
  return good ? 0 : 1;
}
