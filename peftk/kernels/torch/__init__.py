"""Backend "torch": plain PyTorch on any device and dtype."""
