// Runs every CUDA kernel on the CPU, through cuda_on_cpu.h, against naive loops in double precision.
//
//   kernels ORDER [few]             ORDER is up, down or shuffled; prints the number of checks and a hash of all
//   results kernels without FILE LINE       runs past the __syncthreads of that line: ThreadSanitizer must see a race
//   kernels planted-...             an error on purpose, to show that it would be found
#include <limits>
#include <string>

#include "../../csrc/cuda/block_diagonal.cu"
#include "../../csrc/cuda/cayley.cu"

namespace {

using namespace peftk;
using cuda_on_cpu::Order;

constexpr double kFloatUnit = std::numeric_limits<float>::epsilon() / 2.0;

int64_t checks = 0;
uint64_t bits_hash = 14695981039346656037ull;
bool planted_write = false;

// Exactly `count` elements of the heap, `offset` elements away from an aligned address.
template <typename T>
class Heap {
 public:
  explicit Heap(int64_t count, int64_t offset = 0)
      : count_(count), start_(static_cast<T*>(std::malloc((count + offset) * sizeof(T)))), data_(start_ + offset) {
    // Whatever a kernel forgets to write stays a NaN.
    if (count > 0) std::memset(static_cast<void*>(start_), 0xff, (count + offset) * sizeof(T));
  }
  ~Heap() { std::free(start_); }
  Heap(const Heap&) = delete;
  Heap& operator=(const Heap&) = delete;
  T* get() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  int64_t count() const { return count_; }

 private:
  int64_t count_;
  T *start_, *data_;
};

uint64_t state = 1;

double uniform() {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<double>(state >> 11) / static_cast<double>(1ull << 53) * 2.0 - 1.0;
}

template <typename T>
void fill(Heap<T>& values, double spread = 1.0) {
  for (int64_t i = 0; i < values.count(); ++i) from_float(static_cast<float>(uniform() * spread), values[i]);
}

template <typename T>
std::vector<double> doubles(Heap<T>& values) {
  std::vector<double> result;
  for (int64_t i = 0; i < values.count(); ++i) result.push_back(to_float(values[i]));
  return result;
}

template <typename T>
void hash(Heap<T>& values) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(values.get());
  for (size_t i = 0; i < values.count() * sizeof(T); ++i) bits_hash = (bits_hash ^ bytes[i]) * 1099511628211ull;
}

// `magnitude` bounds the sum of the absolute values of what was added up, and `operations` how often it was rounded.
void expect(double actual, double truth, double magnitude, double operations, double unit, const char* what) {
  ++checks;
  const double limit = operations * kFloatUnit * magnitude + unit * std::abs(truth) + 0x1p-25;
  if (!(std::abs(actual - truth) <= limit)) {
    std::printf("%s: expected %.9g within %.3g; got %.9g\n", what, truth, limit, actual);
    std::exit(1);
  }
}

template <typename T>
constexpr Dtype kDtype = Dtype::float32;
template <>
constexpr Dtype kDtype<__nv_bfloat16> = Dtype::bfloat16;
template <>
constexpr Dtype kDtype<__half> = Dtype::float16;

// Unit roundoff of an output: bfloat16 keeps 8 significant bits, float16 11, and a float 24.
template <typename T>
constexpr double kUnit = kDtype<T> == Dtype::bfloat16  ? 0x1p-8
                         : kDtype<T> == Dtype::float16 ? 0x1p-11
                                                       : 0x1p-24;

struct Rotation {
  int64_t rows, count, size;
  bool shared, transpose;
  int64_t offset;  // elements that pointers are off from an aligned address

  int64_t features() const { return count * size; }
  int64_t block(int64_t n, int64_t k, int64_t j) const {
    return ((shared ? 0 : n) * size + (transpose ? j : k)) * size + (transpose ? k : j);
  }
  // The kernels see a shared block as rows of one block.
  int64_t kernel_rows() const { return shared ? rows * count : rows; }
  int64_t kernel_count() const { return shared ? 1 : count; }
  std::string name(const char* what) const {
    return std::string(what) + " rows " + std::to_string(rows) + " count " + std::to_string(count) + " size " +
           std::to_string(size) + (shared ? " shared" : "") + (transpose ? " transposed" : "") + " offset " +
           std::to_string(offset);
  }
};

template <typename T>
void check_rotate(const Rotation& r) {
  const int64_t b = r.size, features = r.features();
  Heap<T> x(r.rows * features, r.offset), y(r.rows * features - planted_write, r.offset);
  Heap<float> blocks(r.kernel_count() * b * b);
  fill(x);
  fill(blocks);
  const std::string what = r.name("block_rotate");
  block_rotate_cuda({x.get(), blocks.get(), y.get(), r.kernel_rows(), r.kernel_count(), b, r.transpose, kDtype<T>},
                    nullptr);
  for (int64_t t = 0; t < r.rows; ++t)
    for (int64_t n = 0; n < r.count; ++n)
      for (int64_t j = 0; j < b; ++j) {
        double truth = 0, magnitude = 0;
        for (int64_t k = 0; k < b; ++k) {
          const double term = static_cast<double>(to_float(x[t * features + n * b + k])) * blocks[r.block(n, k, j)];
          truth += term;
          magnitude += std::abs(term);
        }
        expect(to_float(y[t * features + n * b + j]), truth, magnitude, static_cast<double>(b + 1), kUnit<T>,
               what.c_str());
      }
  hash(y);
}

template <typename T>
void check_rotate_backward(const Rotation& r, bool need_x, bool need_blocks, bool aliased) {
  const int64_t b = r.size, features = r.features(), elements = r.rows * features;
  Heap<T> grad(elements, r.offset), x(need_blocks ? elements : 0, r.offset);
  Heap<T> own_dx(need_x && !aliased ? elements : 0, r.offset);
  Heap<float> blocks(r.kernel_count() * b * b), dblocks(need_blocks ? blocks.count() : 0);
  fill(grad);
  fill(x);
  fill(blocks);
  const std::vector<double> g = doubles(grad), in = doubles(x);
  const std::string what = r.name("block_rotate_backward");
  Heap<T>& dx = aliased ? grad : own_dx;
  BlockRotateBackwardParams p{grad.get(),
                              need_blocks && r.rows > 0 ? x.get() : nullptr,
                              blocks.get(),
                              need_x ? dx.get() : nullptr,
                              nullptr,
                              r.kernel_rows(),
                              r.kernel_count(),
                              b,
                              0,
                              r.transpose,
                              kDtype<T>};
  Heap<float> partial(need_blocks ? block_rotate_partials_cuda(p) : 0);
  p.partial = need_blocks ? partial.get() : nullptr;
  block_rotate_backward_cuda(p, need_blocks ? dblocks.get() : nullptr, nullptr);
  for (int64_t t = 0; need_x && t < r.rows; ++t)
    for (int64_t n = 0; n < r.count; ++n)
      for (int64_t k = 0; k < b; ++k) {
        double truth = 0, magnitude = 0;
        for (int64_t j = 0; j < b; ++j) {
          const double term = g[t * features + n * b + j] * blocks[r.block(n, k, j)];
          truth += term;
          magnitude += std::abs(term);
        }
        expect(to_float(dx[t * features + n * b + k]), truth, magnitude, static_cast<double>(b + 1), kUnit<T>,
               what.c_str());
      }
  if (need_x) hash(dx);
  if (!need_blocks) return;
  std::vector<double> truth(blocks.count()), magnitude(blocks.count());
  for (int64_t t = 0; t < r.rows; ++t)
    for (int64_t n = 0; n < r.count; ++n)
      for (int64_t k = 0; k < b; ++k)
        for (int64_t j = 0; j < b; ++j) {
          const double term = in[t * features + n * b + k] * g[t * features + n * b + j];
          truth[r.block(n, k, j)] += term;
          magnitude[r.block(n, k, j)] += std::abs(term);
        }
  const double terms = static_cast<double>(r.rows * (r.shared ? r.count : 1));
  for (int64_t i = 0; i < blocks.count(); ++i)
    expect(dblocks[i], truth[i], magnitude[i], terms + 1, kFloatUnit, what.c_str());
  hash(dblocks);
}

template <typename T>
void check_rotations(const Rotation& r) {
  check_rotate<T>(r);
  check_rotate_backward<T>(r, true, true, (r.rows + r.count) % 2 == 0);
  if (r.rows == 5) {
    check_rotate_backward<T>(r, true, false, r.transpose);
    check_rotate_backward<T>(r, false, true, false);
  }
}

void run_rotations(bool few) {
  for (int64_t size = 2; size <= kCudaRotateSize; ++size)
    for (const int64_t rows : {0, 1, 5, 75})
      for (const int64_t count : {1, 4, 11, 37}) {
        // Many blocks beside each other need few rows, and the reverse.
        if ((count > 4 && rows == 75) || (count == 37 && rows == 5) || (few && (rows != 5 || count != 4))) continue;
        const bool turn = (rows + count + size) % 2 == 0;
        for (const bool shared : {false, true}) {
          const Rotation plain{rows, count, size, shared, turn != shared, 0};
          check_rotations<float>(plain);
          check_rotations<__nv_bfloat16>(plain);
          if (rows > 5) continue;
          check_rotations<__half>(plain);
          if (rows != 5) continue;
          check_rotations<float>({rows, count, size, shared, !plain.transpose, 0});
          check_rotations<float>({rows, count, size, shared, plain.transpose, 1});
          check_rotations<__nv_bfloat16>({rows, count, size, shared, !plain.transpose, 1});
        }
      }
  // So many partial sums that several threads share an element.
  check_rotations<__nv_bfloat16>({600, 2, 16, true, false, 0});
  most_blocks = 4;
  for (const int64_t size : {4, 5, 16}) {
    check_rotations<float>({40, 3, size, false, false, 0});
    check_rotations<__nv_bfloat16>({40, 4, size, false, true, 0});
  }
  most_blocks = 1024;
}

// The inverse of a general matrix by elimination with the largest pivots.
std::vector<double> inverse(std::vector<double> a, int64_t n) {
  std::vector<double> result(n * n);
  for (int64_t i = 0; i < n; ++i) result[i * n + i] = 1.0;
  for (int64_t p = 0; p < n; ++p) {
    int64_t best = p;
    for (int64_t i = p; i < n; ++i)
      if (std::abs(a[i * n + p]) > std::abs(a[best * n + p])) best = i;
    for (int64_t j = 0; j < n; ++j) {
      std::swap(a[p * n + j], a[best * n + j]);
      std::swap(result[p * n + j], result[best * n + j]);
    }
    for (int64_t i = 0; i < n; ++i) {
      if (i == p) continue;
      const double factor = a[i * n + p] / a[p * n + p];
      for (int64_t j = 0; j < n; ++j) {
        a[i * n + j] -= factor * a[p * n + j];
        result[i * n + j] -= factor * result[p * n + j];
      }
    }
  }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) result[i * n + j] /= a[i * n + i];
  return result;
}

void check_cayley(int64_t count, int64_t n, double spread) {
  const int64_t triangle = n * (n - 1) / 2, area = n * n;
  Heap<float> packed(count * triangle), blocks(count * area), grad(count * area), dpacked(count * triangle);
  fill(packed, spread);
  fill(grad);
  const std::string what = "cayley size " + std::to_string(n) + " spread " + std::to_string(spread);
  cayley_cuda({packed.get(), nullptr, 0, n, blocks.get()}, count, nullptr);
  cayley_backward_cuda({grad.get(), packed.get(), blocks.get(), nullptr, 0, n, dpacked.get()}, count, nullptr);
  for (int64_t c = 0; c < count; ++c) {
    std::vector<double> plus(area), m(area), left(area);
    int64_t at = c * triangle;
    for (int64_t i = 0; i < n; ++i) {
      plus[i * n + i] = 1.0;
      for (int64_t j = i + 1; j < n; ++j, ++at) {
        plus[i * n + j] = packed[at];
        plus[j * n + i] = -static_cast<double>(packed[at]);
      }
    }
    const std::vector<double> inverted = inverse(plus, n);
    const float* r = blocks.get() + c * area;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) {
        // Doubles leave an error of |S|^2 roundings of them, far below a float's.
        expect(r[i * n + j], 2.0 * inverted[i * n + j] - (i == j), 1.0, 1.0, kFloatUnit, what.c_str());
        double product = i == j ? -1.0 : 0.0;
        for (int64_t k = 0; k < n; ++k) product += static_cast<double>(r[i * n + k]) * r[j * n + k];
        if (!(std::abs(product) < 1e-6)) {
          std::printf("%s: R R^T - I is %.3g\n", what.c_str(), product);
          std::exit(1);
        }
        m[j * n + i] = r[i * n + j] + static_cast<double>(i == j);
      }
    // -M G M / 2 with M = (R + I)^T, from the float32 result, as the kernel has it; and its magnitude.
    const float* g = grad.get() + c * area;
    std::vector<double> d(area), size(area), left_size(area);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t k = 0; k < n; ++k)
        for (int64_t j = 0; j < n; ++j) {
          left[i * n + j] += m[i * n + k] * g[k * n + j];
          left_size[i * n + j] += std::abs(m[i * n + k] * g[k * n + j]);
        }
    for (int64_t i = 0; i < n; ++i)
      for (int64_t k = 0; k < n; ++k)
        for (int64_t j = 0; j < n; ++j) {
          d[i * n + j] -= 0.5 * left[i * n + k] * m[k * n + j];
          size[i * n + j] += 0.5 * left_size[i * n + k] * std::abs(m[k * n + j]);
        }
    at = c * triangle;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = i + 1; j < n; ++j, ++at)
        expect(dpacked[at], d[i * n + j] - d[j * n + i], size[i * n + j] + size[j * n + i],
               2.0 * static_cast<double>(n) + 4.0, kFloatUnit, what.c_str());
  }
  hash(blocks);
  hash(dpacked);
}

void run_cayley(bool few) {
  check_cayley(0, 4, 1.0);
  if (few) {
    for (const int64_t size : {1, 5, 16, 20, 33}) check_cayley(2, size, 1.0);
    return;
  }
  for (int64_t size = 1; size <= 34; ++size) check_cayley(size < 10 ? 3 : 1, size, size % 2 ? 1.0 : 0.1);
  for (const int64_t size : {40, 47, 63, 64}) check_cayley(1, size, 0.3);
  for (const int64_t size : {2, 8, 13, 32, 64}) check_cayley(1, size, 100.0);
}

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
    second == "cayley.cu" ? run_cayley(true) : run_rotations(true);
    return 0;
  }
  cuda_on_cpu::order = mode == "down" ? Order::down : mode == "shuffled" ? Order::shuffled : Order::up;
  run_rotations(second == "few");
  run_cayley(second == "few");
  std::printf("%lld checks, hash %016llx\n", static_cast<long long>(checks),
              static_cast<unsigned long long>(bits_hash));
  return 0;
}
