#include "../block_diagonal.h"

#include "launch.h"
#include "pieces.h"

namespace peftk {
namespace {

constexpr int kThreads = 128;
constexpr int kWarp = 32;
// How many blocks of threads share the rows, at most. Tests lower it, so that few rows take several turns.
int most_blocks = 1024;
// Sums that the threads of a block add up at once.
constexpr int kTogether = 8;

// Forward and backward are one pass over the rows. Forward, `in` is x and `out` is y; backward, `in` is the incoming
// gradient, `out` is dx, and the products of `in` and `x` are summed for the gradient of the blocks.
struct Pass {
  const void* in = nullptr;
  const void* x = nullptr;
  const float* blocks = nullptr;
  void* out = nullptr;       // null if not wanted
  float* partial = nullptr;  // (chunks, features / size, size, size); null if not wanted
  // One block that serves all has rows of no meaning: then the data is cut into rows of a convenient width, and
  // `total` says where the last one ends.
  int64_t rows = 0, features = 0, total = 0;
  int64_t block_stride = 0;  // 0 if one block serves all
  int size = 0;
  int lanes = 0;      // threads side by side in a row; the others take further rows
  int chunks = 0;     // the rows are dealt to this many blocks of threads, which sum apart
  bool flip = false;  // out_j = sum_k in_k * block[j][k] instead of block[k][j]
};

// What one thread does in a row: a piece of sixteen bytes of `out`.
template <typename T, int kBlock>
struct Share {
  static constexpr int kPiece = Piece<T>::kSize;
  // Threads that share a block, or 1 where a piece holds one or several.
  static constexpr int kMates = kBlock > kPiece ? kBlock / kPiece : 1;
  static constexpr int kInputs = kMates * kPiece;
  static constexpr int kProducts = kBlock * kPiece;

  // Where the k-th input of the thread's element v lies among those it has gathered.
  static __device__ __forceinline__ constexpr int input(int k, int v) {
    return kMates > 1 ? k : v / kBlock * kBlock + k;
  }
  // Its row in the block. A thread gathers its own piece first and its mates' after it.
  static __device__ __forceinline__ int row(int k, int mate) {
    return kMates > 1 ? ((k / kPiece) ^ mate) * kPiece + k % kPiece : k;
  }
};

// Add up what the groups of a block of threads have summed: in a tree, so always in the same order.
__device__ __forceinline__ void reduce_groups(float* shared, int lanes) {
  const int group = threadIdx.x / lanes;
  __syncthreads();
  for (int half = kThreads / lanes / 2; half > 0; half /= 2) {
    if (group < half)
#pragma unroll
      for (int e = 0; e < kTogether; ++e)
        shared[e * kThreads + threadIdx.x] += shared[e * kThreads + threadIdx.x + half * lanes];
    __syncthreads();
  }
}

// kBlock is a power of two, pointers are aligned to 16 bytes and rows are made of whole pieces.
template <typename T, int kBlock, bool kGradient>
__global__ void __launch_bounds__(kThreads) rotate_kernel(Pass p) {
  using S = Share<T, kBlock>;
  constexpr int kPiece = S::kPiece, kRows = kGradient ? 2 : 4;
  // (kBlock, kPiece / 4, lanes) times four floats while rows are visited.
  PEFTK_DYNAMIC_SHARED(float, shared);
  const int lane = threadIdx.x % p.lanes, group = threadIdx.x / p.lanes, groups = kThreads / p.lanes;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * p.lanes + lane) * kPiece;
  const int mate = lane % S::kMates;
  const bool inside = column < p.features;

  for (int i = group; i < S::kProducts; i += groups) {
    const int k = i / kPiece, v = i % kPiece, j = static_cast<int>((column + v) % kBlock), row = S::row(k, mate);
    const float* block = p.blocks + (column + v) / kBlock * p.block_stride;
    const float weight = inside ? block[p.flip ? j * kBlock + row : row * kBlock + j] : 0.0f;
    shared[((k * (kPiece / 4) + v / 4) * p.lanes + lane) * 4 + v % 4] = weight;
  }
  __syncthreads();

  const T* in = static_cast<const T*>(p.in);
  const T* other = static_cast<const T*>(p.x);
  T* out = static_cast<T*>(p.out);
  float sums[kGradient ? S::kProducts : 1] = {};
  const int64_t step = static_cast<int64_t>(p.chunks) * groups;
  // Every thread makes every turn: the exchange needs whole warps.
  for (int64_t first = 0; first < p.rows; first += step * kRows) {
    Piece<T> own[kRows], own_x[kGradient ? kRows : 1];
    bool valid[kRows];
    int64_t at[kRows];
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const int64_t row = first + u * step + static_cast<int64_t>(blockIdx.y) * groups + group;
      at[u] = row * p.features + column;
      valid[u] = inside && row < p.rows && at[u] < p.total;
      own[u] = valid[u] ? *reinterpret_cast<const Piece<T>*>(in + at[u]) : zero_piece<T>();
      if constexpr (kGradient)
        own_x[u] = valid[u] ? *reinterpret_cast<const Piece<T>*>(other + at[u]) : zero_piece<T>();
    }
    float inputs[kRows][S::kInputs];
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      widen(own[u], inputs[u]);
#pragma unroll
      for (int i = 1; i < S::kMates; ++i) widen(exchange(own[u], i), inputs[u] + i * kPiece);
    }
    if (out != nullptr) {
      float results[kRows][kPiece] = {};
#pragma unroll
      for (int k = 0; k < kBlock; ++k)
#pragma unroll
        for (int q = 0; q < kPiece / 4; ++q) {
          const float4 w = reinterpret_cast<const float4*>(shared)[(k * (kPiece / 4) + q) * p.lanes + lane];
          const float weights[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
          for (int u = 0; u < kRows; ++u)
#pragma unroll
            for (int e = 0; e < 4; ++e)
              results[u][q * 4 + e] = fmaf(inputs[u][S::input(k, q * 4 + e)], weights[e], results[u][q * 4 + e]);
        }
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        Piece<T> piece;
#pragma unroll
        for (int v = 0; v < kPiece; ++v) from_float(results[u][v], piece.values[v]);
        if (valid[u]) *reinterpret_cast<Piece<T>*>(out + at[u]) = piece;
      }
    }
    if constexpr (kGradient) {
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        float x[kPiece];
        widen(own_x[u], x);
#pragma unroll
        for (int k = 0; k < kBlock; ++k)
#pragma unroll
          for (int v = 0; v < kPiece; ++v)
            sums[k * kPiece + v] = fmaf(inputs[u][S::input(k, v)], x[v], sums[k * kPiece + v]);
      }
    }
  }

  if constexpr (kGradient) {
    float* partial = p.partial + blockIdx.y * p.features * kBlock;
#pragma unroll
    for (int i = 0; i < S::kProducts; i += kTogether) {
      // The weights, and the sums of the turn before, have been read.
      __syncthreads();
#pragma unroll
      for (int e = 0; e < kTogether; ++e) shared[e * kThreads + threadIdx.x] = sums[i + e];
      reduce_groups(shared, p.lanes);
      if (group == 0 && inside)
#pragma unroll
        for (int e = 0; e < kTogether; ++e) {
          const int k = (i + e) / kPiece, v = (i + e) % kPiece, row = S::row(k, mate);
          const int j = static_cast<int>((column + v) % kBlock);
          const int64_t block = (column + v) / kBlock * (kBlock * kBlock);
          partial[block + (p.flip ? j * kBlock + row : row * kBlock + j)] = shared[e * kThreads + threadIdx.x];
        }
    }
  }
}

// Any block size up to kCudaRotateSize and any alignment: a thread for each element of a row, as many whole blocks
// side by side as there are threads for.
template <typename T, bool kGradient>
__global__ void __launch_bounds__(kThreads) rotate_any_kernel(Pass p) {
  constexpr int kMost = kCudaRotateSize, kRows = 4;
  PEFTK_SHARED(float, inputs, [kRows][kThreads]);
  const int thread = threadIdx.x, width = kThreads / p.size * p.size, j = thread % p.size;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * width + thread;
  const bool inside = thread < width && column < p.features;
  const float* block = p.blocks + column / p.size * p.block_stride;
  float weights[kMost], sums[kMost];
#pragma unroll
  for (int k = 0; k < kMost; ++k) {
    weights[k] = inside && k < p.size ? block[p.flip ? j * p.size + k : k * p.size + j] : 0.0f;
    sums[k] = 0.0f;
  }
  const T* in = static_cast<const T*>(p.in);
  const T* other = static_cast<const T*>(p.x);
  T* out = static_cast<T*>(p.out);
  for (int64_t first = blockIdx.y; first < p.rows; first += static_cast<int64_t>(p.chunks) * kRows) {
    bool valid[kRows];
    int64_t at[kRows];
    float x[kRows];
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const int64_t row = first + static_cast<int64_t>(u) * p.chunks;
      at[u] = row * p.features + column;
      valid[u] = inside && row < p.rows && at[u] < p.total;
      inputs[u][thread] = valid[u] ? to_float(in[at[u]]) : 0.0f;
      x[u] = kGradient && valid[u] ? to_float(other[at[u]]) : 0.0f;
    }
    // Also what lets `out` be `in`: all elements of a block have been read before one is written.
    __syncthreads();
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      float result = 0.0f;
#pragma unroll
      for (int k = 0; k < kMost; ++k)
        if (inside && k < p.size) {
          const float input = inputs[u][thread - j + k];
          result = fmaf(input, weights[k], result);
          if constexpr (kGradient) sums[k] = fmaf(input, x[u], sums[k]);
        }
      if (valid[u] && out != nullptr) from_float(result, out[at[u]]);
    }
    __syncthreads();
  }
  if constexpr (kGradient) {
    float* partial = p.partial + (static_cast<int64_t>(blockIdx.y) * p.features + (column - j)) * p.size;
#pragma unroll
    for (int k = 0; k < kMost; ++k)
      if (inside && k < p.size) partial[p.flip ? j * p.size + k : k * p.size + j] = sums[k];
  }
}

// out[i] = the sum of terms[t * stride + i] over t. A team of threads shares an element, and adds in a fixed order.
__global__ void __launch_bounds__(kThreads)
    sum_partials_kernel(const float* terms, int64_t count, int64_t stride, int team, float* out) {
  PEFTK_SHARED(float, sums, [kThreads]);
  const int elements = kThreads / team, thread = threadIdx.x, member = thread / elements;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * elements + thread % elements;
  float sum = 0.0f;
  if (i < stride)
    for (int64_t t = member; t < count; t += team) sum += terms[t * stride + i];
  sums[thread] = sum;
  __syncthreads();
  for (int half = team / 2; half > 0; half /= 2) {
    if (member < half) sums[thread] += sums[thread + half * elements];
    __syncthreads();
  }
  if (member == 0 && i < stride) out[i] = sums[thread];
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int power_up(int64_t value, int limit) {
  int power = 1;
  while (power < value && power < limit) power *= 2;
  return power;
}

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

struct Plan {
  Pass pass;
  bool pieces;  // sixteen bytes at a time
  int64_t columns;
};

// From shapes and alignment alone, so that equal calls add in equal order on every GPU.
template <typename Params>
Plan plan_pass(const Params& p, Pass pass, bool gradient) {
  const int64_t b = p.size, piece = 16 / bytes_of(p.dtype), total = p.rows * p.count * b;
  const bool one = p.count == 1;
  pass.blocks = p.blocks;
  pass.size = static_cast<int>(b);
  pass.block_stride = one ? 0 : b * b;
  pass.total = total;
  Plan plan{pass, false, 0};
  plan.pieces = (b & (b - 1)) == 0 && (one ? total : p.count * b) % piece == 0 && aligned(pass.in) && aligned(pass.x) &&
                aligned(pass.out);
  Pass& q = plan.pass;
  const int64_t any_width = kThreads / b * b, wide = plan.pieces ? kWarp * piece : any_width;
  q.features = one ? wide : p.count * b;
  q.rows = one ? divide_up(total, wide) : p.rows;
  q.lanes = plan.pieces ? power_up(q.features / piece, kWarp) : kThreads;
  plan.columns = divide_up(q.features, plan.pieces ? q.lanes * piece : any_width);
  const int64_t turn = (kThreads / q.lanes) * (plan.pieces && gradient ? 2 : 4);
  const int64_t wanted = divide_up(gradient ? most_blocks / 2 : most_blocks, plan.columns),
                possible = divide_up(q.rows, turn);
  q.chunks = static_cast<int>(wanted < possible ? wanted : (possible > 0 ? possible : 1));
  return plan;
}

template <typename T, int kBlock, bool kGradient>
void start_pieces(const Plan& plan, dim3 grid, cudaStream_t stream) {
  const size_t weights = static_cast<size_t>(Share<T, kBlock>::kProducts) * plan.pass.lanes;
  const size_t sums = kGradient ? kTogether * kThreads : 0;
  const size_t bytes = (weights > sums ? weights : sums) * sizeof(float);
  PEFTK_LAUNCH((rotate_kernel<T, kBlock, kGradient>), grid, dim3(kThreads), bytes, stream, plan.pass);
}

template <typename T, bool kGradient>
void start_typed(const Plan& plan, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(plan.columns), static_cast<unsigned>(plan.pass.chunks));
  if (!plan.pieces) {
    PEFTK_LAUNCH((rotate_any_kernel<T, kGradient>), grid, dim3(kThreads), 0, stream, plan.pass);
    return;
  }
  switch (plan.pass.size) {
    case 2: return start_pieces<T, 2, kGradient>(plan, grid, stream);
    case 4: return start_pieces<T, 4, kGradient>(plan, grid, stream);
    case 8: return start_pieces<T, 8, kGradient>(plan, grid, stream);
    default: return start_pieces<T, 16, kGradient>(plan, grid, stream);
  }
}

template <bool kGradient>
void start(const Plan& plan, Dtype dtype, cudaStream_t stream) {
  switch (dtype) {
    case Dtype::float32: return start_typed<float, kGradient>(plan, stream);
    case Dtype::bfloat16: return start_typed<__nv_bfloat16, kGradient>(plan, stream);
    case Dtype::float16: return start_typed<__half, kGradient>(plan, stream);
  }
}

// dx_k = sum_j grad_j * block[k][j], which is the forward pass with the other orientation.
Plan plan_backward(const BlockRotateBackwardParams& p, bool gradient) {
  return plan_pass(p, Pass{.in = p.grad, .x = p.x, .out = p.dx, .partial = p.partial, .flip = !p.transpose}, gradient);
}

}  // namespace

void block_rotate_cuda(const BlockRotateParams& p, void* stream) {
  if (p.rows == 0) return;
  start<false>(plan_pass(p, Pass{.in = p.x, .out = p.y, .flip = p.transpose}, false), p.dtype,
               static_cast<cudaStream_t>(stream));
}

int64_t block_rotate_partials_cuda(const BlockRotateBackwardParams& p) {
  const Pass pass = plan_backward(p, true).pass;
  return pass.chunks * pass.features * p.size;
}

void block_rotate_backward_cuda(const BlockRotateBackwardParams& p, float* dblocks, void* stream) {
  const Plan plan = plan_backward(p, dblocks != nullptr);
  const auto queue = static_cast<cudaStream_t>(stream);
  if (dblocks == nullptr) {
    if (p.rows > 0) start<false>(plan, p.dtype, queue);
    return;
  }
  if (p.rows > 0) start<true>(plan, p.dtype, queue);
  const int64_t elements = p.count * p.size * p.size;
  const int64_t terms = p.rows > 0 ? plan.pass.chunks * (plan.pass.features / (p.count * p.size)) : 0;
  const int team = power_up(terms / 32, kThreads);
  const dim3 grid(static_cast<unsigned>(divide_up(elements, kThreads / team)));
  PEFTK_LAUNCH(sum_partials_kernel, grid, dim3(kThreads), 0, queue, p.partial, terms, elements, team, dblocks);
}

}  // namespace peftk
