// What `bkdfast doctor` asks: the instruction set the CPU kernels use, or what is wrong with BKDFAST_CPU.

#include "../common/isa.h"

extern "C" __attribute__((visibility("default"))) const char* bkdfast_cpu_isa() {
  const bkdfast::IsaChoice& choice = bkdfast::isa_choice();
  return choice.error.empty() ? bkdfast::isa_name(choice.isa) : choice.error.c_str();
}
