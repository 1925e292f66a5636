// Runs every CUDA kernel on the CPU, through cuda_on_cpu.h, against naive loops in double precision.
// The checks of a family stand in <family>.h, and its name in `families` below.
//
//   kernels ORDER [few]             ORDER is up, down or shuffled; prints the number of checks and a hash of all
//   results kernels without FILE LINE       runs past the __syncthreads of that line: ThreadSanitizer must see a race
//   kernels planted-...             an error on purpose, to show that it would be found
#include "block_diagonal.h"
#include "butterfly.h"
#include "cayley.h"
#include "circulant.h"
#include "hadamard.h"
#include "kronecker.h"

namespace {

struct Family {
  std::string file;  // in csrc/cuda/
  void (*run)(bool few);
};

const std::vector<Family> families{
    {"block_diagonal.cu", run_rotations}, {"butterfly.cu", run_butterfly}, {"cayley.cu", run_cayley},
    {"circulant.cu", run_circulant},      {"hadamard.cu", run_hadamard},   {"kronecker.cu", run_kronecker}};

__global__ void divergent_kernel() {
  if (threadIdx.x < 5) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void early_return_kernel() {
  if (threadIdx.x == 7) return;
  __syncthreads();
}

__global__ void deadlock_kernel() {
  if (threadIdx.x < 32)
    __syncwarp();
  else
    __syncthreads();
  if (threadIdx.x == 0) __syncwarp();
  __syncthreads();
}

__global__ void shared_overrun_kernel(int past) {
  PEFTK_DYNAMIC_SHARED(float, values);
  values[threadIdx.x + past] = 1.0f;
}

// A tree whose steps are not ordered: what removing a barrier from a kernel does.
__global__ void race_kernel(float* out) {
  PEFTK_SHARED(float, values, [64]);
  values[threadIdx.x] = 1.0f;
  if (threadIdx.x == 0) out[0] = values[63];
}

int plant(const std::string& what) {
  Heap<float> out(1);
  if (what == "planted-write") {
    planted_write = true;
    check_rotate<float>({5, 3, 4, false, false, 0});
  } else if (what == "planted-shared") {
    PEFTK_LAUNCH(shared_overrun_kernel, dim3(1), dim3(32), 32 * sizeof(float), nullptr, 1);
  } else if (what == "planted-shift") {
    std::printf("%d\n", 1 << (20 + static_cast<int>(what.size())));
  } else if (what == "planted-race") {
    PEFTK_LAUNCH(race_kernel, dim3(1), dim3(64), 0, nullptr, out.get());
  } else if (what == "planted-divergence") {
    PEFTK_LAUNCH(divergent_kernel, dim3(1), dim3(32), 0, nullptr);
  } else if (what == "planted-return") {
    PEFTK_LAUNCH(early_return_kernel, dim3(1), dim3(32), 0, nullptr);
  } else if (what == "planted-deadlock") {
    PEFTK_LAUNCH(deadlock_kernel, dim3(1), dim3(64), 0, nullptr);
  } else if (what == "planted-launch") {
    try {
      PEFTK_LAUNCH(race_kernel, dim3(1), dim3(2048), 0, nullptr, out.get());
    } catch (const std::runtime_error& error) {
      std::printf("%s\n", error.what());
      return 1;
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "up", second = argc > 2 ? argv[2] : "";
  if (mode.starts_with("planted")) return plant(mode);
  if (mode == "without") {
    cuda_on_cpu::missing_barrier_file = argv[2];
    cuda_on_cpu::missing_barrier = static_cast<unsigned>(std::atoi(argv[3]));
    for (const Family& family : families)
      if (family.file == second) family.run(true);
    return 0;
  }
  cuda_on_cpu::order = mode == "down" ? Order::down : mode == "shuffled" ? Order::shuffled : Order::up;
  for (const Family& family : families) family.run(second == "few");
  std::printf("%lld checks, hash %016llx\n", static_cast<long long>(checks),
              static_cast<unsigned long long>(bits_hash));
  return 0;
}
