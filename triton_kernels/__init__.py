"""Backend "triton": kernels for GPUs. Imported as ``peftk.triton_kernels``."""

if __name__ == "triton_kernels":
    raise ImportError(
        "triton_kernels: this folder is the source of peftk.triton_kernels, not the package triton_kernels of the "
        "Triton project; got an import from peftk's checkout. Import peftk.triton_kernels, or leave the folder."
    )
