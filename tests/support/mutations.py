"""Random damage to files of adapters, and what tests of it compare."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file, save_file

from .checkpoint_files import container, header_end


def damage(rng, raw):
    """Return bytes with some of them changed, taken out, put in, exchanged, or cut off."""
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 3)):
        at, size = rng.randrange(len(raw)), rng.randint(1, 12)
        match rng.randrange(6):
            case 0:
                raw[at] ^= 1 << rng.randrange(8)
            case 1:
                raw[at] = rng.randrange(256)
            case 2:
                del raw[at : at + size]
            case 3:
                raw[at:at] = rng.randbytes(size)
            case 4:
                other = rng.randrange(len(raw))
                raw[at : at + size], raw[other : other + size] = raw[other : other + size], raw[at : at + size]
            case 5:
                del raw[at + 1 :]
    return bytes(raw)


def edit_header(rng, raw):
    """Change a claim of the header of a safetensors file, as someone who keeps the format would."""
    end = header_end(raw)
    header = json.loads(raw[8:end])
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    match rng.randrange(5):
        case 0:
            header[name + rng.choice([".x", ""])[:2]] = header.pop(name)
            header[name.replace("fc", rng.choice(["f", "fd", "head"]))] = header.pop(name + ".x", header.get(name))
        case 1:
            header[name]["dtype"] = rng.choice(["F16", "BF16", "I32", "F64", "U8", "C64", 3])
        case 2:
            header[name]["shape"] = rng.choice([header[name]["shape"][::-1], [-1], [10**30], "x", []])
        case 3:
            other = rng.choice(names)
            header[name], header[other] = header[other], header[name]
        case 4:
            metadata = header.get("__metadata__", {})
            metadata[rng.choice([*metadata, "new"])] = rng.choice(["", "x", "{}", "0" * 64])
            header["__metadata__"] = metadata
    return container(header, raw[end:])


def edit_tensors(rng, file):
    """Save other tensors, by the library of the format, with or without what the metadata says."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() if rng.random() < 0.5 else {"format": "pt"}
    tensors = load_file(file)
    name = rng.choice(list(tensors))
    match rng.randrange(6):
        case 0:
            del tensors[name]
        case 1:
            one = tensors[name] if tensors[name].dim() else tensors[name].repeat(2)
            tensors[name] = one.T.contiguous() if one.dim() == 2 else one[:-1].clone()
        case 2:
            tensors[name].view(-1)[0] = rng.choice([float("nan"), float("inf")])
        case 3:
            tensors[name] = tensors[name].to(rng.choice([torch.int32, torch.bool, torch.complex64]))
        case 4:
            tensors[name + "x"] = tensors.pop(name)
        case 5:
            tensors[name] += 1.0
    save_file(tensors, file, metadata)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, [type(m) for m in model.modules()]


def same(before, after):
    (a, kinds), (b, others) = before, after
    return kinds == others and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
