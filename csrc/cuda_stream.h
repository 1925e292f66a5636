// The CUDA side of a host function: the tensor's device made current, and its stream.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

// Torch's header declares it for torch's own CUDA builds only. A torch without CUDA does not have it: there it is weak,
// so that the extension still loads; no CUDA tensor can ever reach it.
#ifdef PEFTK_TORCH_CUDA
#define PEFTK_STREAM_LINKAGE
#else
#define PEFTK_STREAM_LINKAGE __attribute__((weak))
#endif
extern "C" PEFTK_STREAM_LINKAGE AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace peftk {

class CudaStream {
 public:
  explicit CudaStream(const torch::stable::Tensor& t) : guard_(t.get_device_index()) {
#ifndef PEFTK_TORCH_CUDA
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "peftk._C was built with a torch without CUDA");
#endif
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_) == AOTI_TORCH_SUCCESS,
                    "the current CUDA stream of device ", t.get_device_index(), " is unknown");
  }
  void* get() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace peftk
