"""What every method computes, as functions of a base layer, tensors and settings.

No layer of `peftk.nn` and no adapter's name is in here: whoever owns the tensors calls these functions, `peftk.nn` as
well as layers of other libraries. A module describes one adapter of its method on one layer by a named tuple, and has

- `linear`, and where the method has them `conv` (`conv2d` if only images are meant) and `embedding`: the forward pass
  of a base layer with adapters. The base layer is run inside of the operator where nobody would notice, else called;
- `update` or `rotation`: the dense matrix that the adapter stands for;
- `merged`: the weight, and where the method changes it the bias, with the adapter in them.
"""
