// The contract (gemma_ar_norm/reference.py) once more, in plain C++: one element after the other,
// one IEEE operation at a time. What the kernels under test must give, bit for bit.
//
// Nothing here comes from csrc/device but the names of the dtypes, so that one mistake is not made
// in both. test_emulator.py compares it with reference.py.
#pragma once
#include <cstdint>
#include <vector>

#include "device/params.h"

namespace gan::testing {

// What is done with each row once it is summed.
struct Epilogue {
  DType dtype = DType::kBFloat16;
  uint32_t hidden = 0;
  bool weights_fp32 = false;          // weight and post_weight are fp32, whatever the dtype is
  const void* weight = nullptr;       // [hidden]
  const void* post_weight = nullptr;  // [hidden]; null: not the sandwich form
  float eps = 0.0f, bias = 0.0f;
};

uint32_t bytes_of_element(DType dtype);

// A row of `dtype` in fp32, and back, rounded to nearest even.
std::vector<float> widen(DType dtype, const void* row, uint32_t hidden);
void round_to(DType dtype, const std::vector<float>& values, void* row);

// One row as one rank returns it. `x`: every rank's row, in rank order. residual: null in the plain
// form. The outputs may be any of the inputs.
void contract_row(const Epilogue& epilogue, const std::vector<const void*>& x, const void* residual,
                  void* norm_out, void* residual_out);

// Whether two rows are the same to the contract: bit for bit, but NaN equals NaN.
bool same_element(DType dtype, const void* a, const void* b, uint32_t index);
bool is_nan_element(DType dtype, const void* row, uint32_t index);

}  // namespace gan::testing
