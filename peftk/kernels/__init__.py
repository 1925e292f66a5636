"""The backends, one package each; that of Triton is `peftk.triton_kernels`."""
