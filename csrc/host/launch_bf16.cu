#include "host/kernel_table.cuh"

template struct gan::KernelTable<gan::DType::kBFloat16>;
