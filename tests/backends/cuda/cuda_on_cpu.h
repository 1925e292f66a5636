// Runs a .cu file of peftk on the CPU: csrc/cuda/launch.h includes this where the compiler is not nvcc.
//
// Every thread of a block is a fiber. A fiber runs until it parks at a barrier; when nothing can run any more, the
// barriers that are complete are released, and if there is none, that is a deadlock and is reported with its line.
// Blocks run one after another. `cuda_on_cpu::order` says in which order the fibers of a block take their turns:
// a right kernel gives the same bits in each.
//
// AddressSanitizer sees every overrun, because shared memory is on the heap in its exact size, and full of NaNs before
// each block. ThreadSanitizer sees every race within a block: fibers are threads to it, and only barriers order them.
// Not covered: races between blocks, memory fences, tensor cores, asynchronous copies, and nvcc's own rounding.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <source_location>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define CUDA_ON_CPU_ASAN(...) __VA_ARGS__
#else
#define CUDA_ON_CPU_ASAN(...)
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define CUDA_ON_CPU_TSAN(...) __VA_ARGS__
#else
#define CUDA_ON_CPU_TSAN(...)
#endif
// The scheduler touches what all fibers touch, and must not look like one of them.
#define CUDA_ON_CPU_SCHEDULER __attribute__((no_sanitize_thread))

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define CUDA_ON_CPU_SHARED(type, name, dims)                         \
  typedef type name##_type dims;                                     \
  static cuda_on_cpu::SharedArray name##_array(sizeof(name##_type)); \
  auto& name = *static_cast<name##_type*>(name##_array.data())

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };

inline uint3 threadIdx{}, blockIdx{};
inline dim3 blockDim, gridDim;

namespace cuda_on_cpu {

using Where = std::source_location;

enum class Order { up, down, shuffled };
inline Order order = Order::up;
// A test's way to plant a race: the line of a __syncthreads that threads run past.
inline unsigned missing_barrier = 0;
inline const char* missing_barrier_file = "";
inline cudaError_t last_error = cudaSuccess;

constexpr int kWarp = 32;
constexpr size_t kMostShared = 48 << 10;  // without asking the driver for more
constexpr size_t kStack = 256 << 10;

// Shared memory of fixed size: a static object where it is declared.
class SharedArray {
 public:
  explicit SharedArray(size_t bytes) : bytes_(bytes), data_(std::malloc(bytes)) {
    poison();
    all().push_back(this);
  }
  void* data() { return data_; }
  CUDA_ON_CPU_SCHEDULER void poison() { std::memset(data_, 0xff, bytes_); }
  static std::vector<SharedArray*>& all() {
    static std::vector<SharedArray*> arrays;
    return arrays;
  }

 private:
  size_t bytes_;
  void* data_;
};

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Fiber {
  ucontext_t context;
  char* stack;
  uint3 thread;
  int index;
  State state;
  unsigned mask;       // of the warp barrier at which it waits
  bool orders_memory;  // __syncwarp does, a shuffle does not
  Where where;
  unsigned exchanges;
  void *fake_stack, *tsan;
};

// Two slots for each lane, used in turn: then a shuffle needs one barrier, not two.
struct Exchange {
  alignas(16) unsigned char slots[2][kWarp][16];
};

// Plain arrays: what the scheduler calls would be instrumented again.
constexpr int kMostThreads = 1024;
inline Fiber fibers[kMostThreads];
inline int fiber_count = 0;
inline Exchange exchanges[kMostThreads / kWarp];
inline Fiber* running = nullptr;
inline ucontext_t scheduler;
inline void *scheduler_fake_stack, *scheduler_tsan;
inline const void* scheduler_stack;
inline size_t scheduler_stack_size;
inline const std::function<void()>* body;
inline void* dynamic_memory = nullptr;

inline void* dynamic_shared() { return dynamic_memory; }

[[noreturn]] CUDA_ON_CPU_SCHEDULER inline void fail(const char* what, const Fiber& fiber) {
  std::fprintf(stderr, "cuda_on_cpu: %s: %s:%u, block (%u, %u, %u), thread %d\n", what, fiber.where.file_name(),
               static_cast<unsigned>(fiber.where.line()), blockIdx.x, blockIdx.y, blockIdx.z, fiber.index);
  std::fflush(nullptr);
  std::_Exit(3);
}

CUDA_ON_CPU_SCHEDULER inline void leave_fiber([[maybe_unused]] bool forever) {
  Fiber* fiber = running;
  CUDA_ON_CPU_ASAN(
      __sanitizer_start_switch_fiber(forever ? nullptr : &fiber->fake_stack, scheduler_stack, scheduler_stack_size);)
  CUDA_ON_CPU_TSAN(__tsan_switch_to_fiber(scheduler_tsan, __tsan_switch_to_fiber_no_sync);)
  swapcontext(&fiber->context, &scheduler);
  CUDA_ON_CPU_ASAN(__sanitizer_finish_switch_fiber(fiber->fake_stack, &scheduler_stack, &scheduler_stack_size);)
}

CUDA_ON_CPU_SCHEDULER inline void enter_fiber(Fiber& fiber) {
  running = &fiber;
  threadIdx = fiber.thread;
  CUDA_ON_CPU_ASAN(__sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack, kStack);)
  CUDA_ON_CPU_TSAN(__tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);)
  swapcontext(&scheduler, &fiber.context);
  CUDA_ON_CPU_ASAN(__sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);)
}

CUDA_ON_CPU_SCHEDULER inline void run_fiber() {
  CUDA_ON_CPU_ASAN(__sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);)
  (*body)();
  running->state = State::done;
  leave_fiber(true);
}

CUDA_ON_CPU_SCHEDULER inline void park(State state, unsigned mask, bool orders_memory, const Where& where) {
  Fiber& fiber = *running;
  fiber.state = state;
  fiber.mask = mask;
  fiber.orders_memory = orders_memory;
  fiber.where = where;
  leave_fiber(false);
}

struct Members {
  Fiber* list[kMostThreads];
  int count = 0;
};
inline Members members;

// To ThreadSanitizer: every member signals an object, then every member waits for it. It is a new one for each
// barrier, so that nothing is ordered but what this barrier orders.
CUDA_ON_CPU_SCHEDULER inline void order_members() {
#if defined(__SANITIZE_THREAD__)
  char* barrier = static_cast<char*>(std::malloc(8));
  for (int i = 0; i < members.count; ++i) {
    __tsan_switch_to_fiber(members.list[i]->tsan, __tsan_switch_to_fiber_no_sync);
    __tsan_release(barrier);
  }
  for (int i = 0; i < members.count; ++i) {
    __tsan_switch_to_fiber(members.list[i]->tsan, __tsan_switch_to_fiber_no_sync);
    __tsan_acquire(barrier);
  }
  __tsan_switch_to_fiber(scheduler_tsan, __tsan_switch_to_fiber_no_sync);
  std::free(barrier);
#endif
}

CUDA_ON_CPU_SCHEDULER inline void release_members(bool orders_memory) {
  if (orders_memory) order_members();
  for (int i = 0; i < members.count; ++i) members.list[i]->state = State::ready;
}

CUDA_ON_CPU_SCHEDULER inline bool release_block_barrier() {
  members.count = 0;
  for (int i = 0; i < fiber_count; ++i) {
    if (fibers[i].state == State::at_block_barrier)
      members.list[members.count++] = &fibers[i];
    else if (fibers[i].state != State::done)
      return false;
  }
  const unsigned line = members.list[0]->where.line();
  for (int i = 1; i < members.count; ++i)
    if (members.list[i]->where.line() != line)
      fail("divergent barrier: the threads of a block wait at different lines; one is", *members.list[i]);
  if (members.count < fiber_count)
    fail("divergent barrier: other threads of the block have returned", *members.list[0]);
  release_members(true);
  return true;
}

CUDA_ON_CPU_SCHEDULER inline bool release_warp_barriers() {
  bool any = false;
  for (int i = 0; i < fiber_count; ++i) {
    const Fiber& one = fibers[i];
    if (one.state != State::at_warp_barrier) continue;
    const int first = i / kWarp * kWarp;
    bool complete = true;
    members.count = 0;
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!(one.mask >> lane & 1)) continue;
      Fiber& f = fibers[first + lane];
      if (first + lane >= fiber_count || f.state == State::done)
        fail("the mask of a warp names a lane that is not there", one);
      complete &= f.state == State::at_warp_barrier && f.mask == one.mask && f.where.line() == one.where.line();
      members.list[members.count++] = &f;
    }
    if (!complete) continue;
    release_members(one.orders_memory);
    any = true;
  }
  return any;
}

CUDA_ON_CPU_SCHEDULER inline void run_block(uint64_t seed) {
  int turns[kMostThreads];
  for (int i = 0; i < fiber_count; ++i) turns[i] = order == Order::down ? fiber_count - 1 - i : i;
  for (;;) {
    if (order == Order::shuffled)
      for (int i = fiber_count - 1; i > 0; --i) {
        seed = seed * 6364136223846793005ull + 1442695040888963407ull;
        const int other = static_cast<int>((seed >> 33) % static_cast<uint64_t>(i + 1)), kept = turns[i];
        turns[i] = turns[other];
        turns[other] = kept;
      }
    for (int i = 0; i < fiber_count; ++i)
      if (fibers[turns[i]].state == State::ready) enter_fiber(fibers[turns[i]]);
    int done = 0;
    for (int i = 0; i < fiber_count; ++i) done += fibers[i].state == State::done;
    if (done == fiber_count) return;
    if (release_block_barrier() || release_warp_barriers()) continue;
    for (int i = 0; i < fiber_count; ++i)
      if (fibers[i].state != State::done) fail("deadlock: threads wait at different barriers; one is", fibers[i]);
  }
}

CUDA_ON_CPU_SCHEDULER inline void prepare(Fiber& f, int index, dim3 block, char* stack) {
  const unsigned i = static_cast<unsigned>(index);
  f.stack = stack;
  f.thread = {i % block.x, i / block.x % block.y, i / block.x / block.y};
  f.index = index;
  f.state = State::ready;
  f.exchanges = 0;
  f.fake_stack = nullptr;
  CUDA_ON_CPU_ASAN(__asan_unpoison_memory_region(stack, kStack);)
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = stack;
  f.context.uc_stack.ss_size = kStack;
  f.context.uc_link = &scheduler;
  makecontext(&f.context, run_fiber, 0);
  // Kept for the next block: making one is slow.
  CUDA_ON_CPU_TSAN(if (f.tsan == nullptr) f.tsan = __tsan_create_fiber(0);)
}

// To ThreadSanitizer: what the caller, and every block before, did is over before a block starts; and the reverse.
CUDA_ON_CPU_SCHEDULER inline void order_with_caller([[maybe_unused]] bool start) {
#if defined(__SANITIZE_THREAD__)
  static char started[8], joined[8];
  if (start) __tsan_release(started);
  for (int i = 0; i < fiber_count; ++i) {
    __tsan_switch_to_fiber(fibers[i].tsan, __tsan_switch_to_fiber_no_sync);
    start ? __tsan_acquire(started) : __tsan_release(joined);
  }
  __tsan_switch_to_fiber(scheduler_tsan, __tsan_switch_to_fiber_no_sync);
  if (!start) __tsan_acquire(joined);
#endif
}

CUDA_ON_CPU_SCHEDULER inline void launch(dim3 grid, dim3 block, size_t bytes, cudaStream_t,
                                         const std::function<void()>& kernel) {
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  if (threads < 1 || threads > kMostThreads || bytes > kMostShared || grid.x < 1 || grid.x > 0x7fffffffu ||
      grid.y < 1 || grid.y > 65535 || grid.z < 1 || grid.z > 65535) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  static char* const stacks = static_cast<char*>(std::malloc(kMostThreads * kStack));
  gridDim = grid;
  blockDim = block;
  body = &kernel;
  fiber_count = static_cast<int>(threads);
  CUDA_ON_CPU_TSAN(scheduler_tsan = __tsan_get_current_fiber();)
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        dynamic_memory = bytes > 0 ? std::malloc(bytes) : nullptr;
        if (bytes > 0) std::memset(dynamic_memory, 0xff, bytes);
        for (SharedArray* array : SharedArray::all()) array->poison();
        for (int i = 0; i < fiber_count; ++i) prepare(fibers[i], i, block, stacks + i * kStack);
        order_with_caller(true);
        run_block((z * 65536ull + y) * 0x100000000ull + x + 1);
        order_with_caller(false);
        std::free(dynamic_memory);
      }
}

// Not memcpy, which ThreadSanitizer would see: lanes order their exchange by the barrier in between.
CUDA_ON_CPU_SCHEDULER __attribute__((noinline)) inline void copy_bytes(void* to, const void* from, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) static_cast<volatile char*>(to)[i] = static_cast<const volatile char*>(from)[i];
}

template <typename T>
CUDA_ON_CPU_SCHEDULER T exchange_lanes(unsigned mask, const T& value, int source, const Where& where) {
  static_assert(sizeof(T) <= 16);
  Fiber& fiber = *running;
  fiber.where = where;
  Exchange& warp = exchanges[fiber.index / kWarp];
  const unsigned turn = fiber.exchanges++ & 1;
  if (!(mask >> (fiber.index % kWarp) & 1)) fail("a lane takes part that the mask does not name", fiber);
  if (!(mask >> source & 1)) fail("a shuffle reads a lane that the mask does not name", fiber);
  copy_bytes(warp.slots[turn][fiber.index % kWarp], &value, sizeof value);
  park(State::at_warp_barrier, mask, false, where);
  T result;
  copy_bytes(&result, warp.slots[turn][source], sizeof result);
  return result;
}

CUDA_ON_CPU_SCHEDULER inline int lane() { return running->index % kWarp; }

// To nearest, ties to even: drop the lowest `shift` bits.
inline uint32_t round_off(uint32_t bits, int shift) {
  const uint32_t half = 1u << (shift - 1), odd = bits >> shift & 1u;
  return (bits + half - 1 + odd) >> shift;
}

}  // namespace cuda_on_cpu

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = cuda_on_cpu::last_error;
  cuda_on_cpu::last_error = cudaSuccess;
  return error;
}

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

inline void __syncthreads(cuda_on_cpu::Where where = cuda_on_cpu::Where::current()) {
  if (where.line() == cuda_on_cpu::missing_barrier && std::strstr(where.file_name(), cuda_on_cpu::missing_barrier_file))
    return;
  cuda_on_cpu::park(cuda_on_cpu::State::at_block_barrier, 0, true, where);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, cuda_on_cpu::Where where = cuda_on_cpu::Where::current()) {
  cuda_on_cpu::park(cuda_on_cpu::State::at_warp_barrier, mask, true, where);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              cuda_on_cpu::Where where = cuda_on_cpu::Where::current()) {
  const int first = cuda_on_cpu::lane() & ~(width - 1);
  return cuda_on_cpu::exchange_lanes(mask, value, first | (source & (width - 1)), where);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32,
                  cuda_on_cpu::Where where = cuda_on_cpu::Where::current()) {
  const int lane = cuda_on_cpu::lane(), source = lane ^ flip;
  return cuda_on_cpu::exchange_lanes(mask, value, source > (lane | (width - 1)) ? lane : source, where);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   cuda_on_cpu::Where where = cuda_on_cpu::Where::current()) {
  const int lane = cuda_on_cpu::lane(), source = lane + static_cast<int>(delta);
  return cuda_on_cpu::exchange_lanes(mask, value, source > (lane | (width - 1)) ? lane : source, where);
}

inline float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (std::isnan(value)) return {0x7fff};
  return {static_cast<uint16_t>(cuda_on_cpu::round_off(bits, 16))};
}

inline float __half2float(__half value) {
  const uint32_t sign = value.bits >> 15, exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
  float size = std::ldexp(static_cast<float>(exponent ? fraction | 1024 : fraction),
                          static_cast<int>(exponent ? exponent : 1) - 25);
  if (exponent == 31) size = fraction ? NAN : INFINITY;
  return sign ? -size : size;
}

inline __half __float2half_rn(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const float size = std::fabs(value);
  if (std::isnan(value)) return {0x7fff};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  // Below the smallest normal number the steps are 2^-24; the library rounds to even as the hardware does.
  if (size < 0x1p-14f) return {static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(size * 0x1p24f)))};
  return {static_cast<uint16_t>(sign | cuda_on_cpu::round_off((bits & 0x7fffffffu) - (112u << 23), 13))};
}
