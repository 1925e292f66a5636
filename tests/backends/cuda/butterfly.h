#pragma once

#include "../../../csrc/cuda/butterfly.cu"
#include "../native/butterfly_dense.h"
#include "checks.h"

namespace {

void check_butterfly(int64_t stages, int64_t count, int64_t size) {
  const int64_t area = count * size * size, group = size << (stages - 1), groups = count >> (stages - 1);
  Heap<float> factors(stages * area), blocks(groups * group * group), grad(blocks.count()), dfactors(stages * area);
  fill(factors);
  fill(grad);
  const std::string what = "butterfly m " + std::to_string(stages) + " size " + std::to_string(size);
  butterfly_compose_cuda({factors.get(), blocks.get(), stages, count, size}, nullptr);
  butterfly_compose_backward_cuda({grad.get(), factors.get(), dfactors.get(), stages, count, size}, nullptr);
  const DenseButterfly dense{stages, count, size, doubles(factors)};
  const double operations = static_cast<double>(stages * (size + 2) + group);
  const DenseMatrix truth = dense.product(0, stages, false), magnitude = dense.product(0, stages, true);
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t i = 0; i < group; ++i)
      for (int64_t j = 0; j < group; ++j)
        expect(blocks[(g * group + i) * group + j], truth[dense.at(g, i, j)], magnitude[dense.at(g, i, j)], operations,
               kFloatUnit, what.c_str());
  for (int64_t stage = 0; stage < stages; ++stage) {
    const std::vector<double> expected = dense.gradient(stage, doubles(grad), false);
    const std::vector<double> bound = dense.gradient(stage, doubles(grad), true);
    for (int64_t i = 0; i < area; ++i)
      expect(dfactors[stage * area + i], expected[i], bound[i], operations, kFloatUnit, what.c_str());
  }
  hash(blocks);
  hash(dfactors);
}

void run_butterfly(bool few) {
  check_butterfly(3, 4, 4);
  check_butterfly(4, 8, 2);
  check_butterfly(1, 2, 5);
  check_butterfly(2, 4, 6);
  if (few) return;
  for (const int64_t size : {2, 4, 6, 16, 32}) check_butterfly(2, 2, size);
  for (const int64_t size : {1, 3, 64}) check_butterfly(1, 1, size);
  check_butterfly(3, 8, 10);
  check_butterfly(4, 8, 8);
  check_butterfly(6, 32, 2);
}

}  // namespace
