"""From unpickled objects to named tensors: state dicts, training checkpoints, and modules whose classes are stubs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import shown
from .pickle_check import MAX_NESTING, MAX_OBJECTS, Refused

_MAX_NAME = 200
_MAX_SHARING = 8  # how often tied weights may be counted; they are stored once
_NESTED = ("state_dict", "model_state_dict", "model")  # where training checkpoints hold the weights


class Stub:
    """Stands for an object of a class that must not be made; it keeps attributes and does nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update({name: value for name, value in state.items() if isinstance(name, str)})


def make_stub(name: str) -> type[Stub]:
    """Return a stub class with the full name of the class that it stands for."""
    module, _, short = name.rpartition(".")
    return type(short, (Stub,), {"__module__": module})


def named_tensors(loaded: object) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return the tensors of a state dict, a training checkpoint or a module by name, and a module's numbers of heads.

    The heads go by the names in `Hints.sizes`; there are both or none.
    """
    # dict's own methods throughout: a pickle can set attributes such as `items` on an OrderedDict.
    for _ in _NESTED:  # a checkpoint may hold a checkpoint
        if isinstance(loaded, dict):
            nested = [dict.get(loaded, name) for name in _NESTED]
            loaded = next((value for value in nested if isinstance(value, (Stub, dict))), loaded)
    if isinstance(loaded, dict):
        return _detached(dict(dict.items(loaded))), {}
    if not isinstance(loaded, Stub):
        raise Refused("does not hold named weights; use a .safetensors file of this model.")
    modules = dict(_modules(loaded, "", [MAX_OBJECTS], 0))
    tensors = {
        f"{prefix}{name}": tensor for prefix, module in modules.items() for name, tensor in _own_tensors(module).items()
    }
    heads = {
        field: getattr(modules.get(f"{tower}transformer.resblocks.0.attn."), "num_heads", None)
        for field, tower in (("vision_heads", "visual."), ("text_heads", ""))
    }
    known = {field: count for field, count in heads.items() if type(count) is int}
    return tensors, known if len(known) == 2 else {}


def _modules(module: Stub, prefix: str, budget: list[int], depth: int) -> Iterator[tuple[str, Stub]]:
    """Yield a module and all below it with the prefixes of their names; `budget` [1] is shared by the recursion.

    One module may be held in many places, so a small file could describe a tree without end.
    """
    children = module.__dict__.get("_modules")
    children = children if isinstance(children, dict) else module.__dict__  # a scripted module has no _modules
    budget[0] -= 1 + len(children) + sum(len(value) for value in module.__dict__.values() if isinstance(value, dict))
    if budget[0] < 0 or depth > MAX_NESTING or len(prefix) > _MAX_NAME:
        raise Refused("holds a model without end, which was not read; use a .safetensors file of this model.")
    yield prefix, module
    for name, child in dict.items(children):
        if isinstance(child, Stub) and isinstance(name, str):
            yield from _modules(child, f"{prefix}{name}.", budget, depth + 1)


def _own_tensors(module: Stub) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers of a pickled module; of a scripted one, every tensor."""
    attributes = module.__dict__
    parameters, buffers, skipped = (
        attributes.get(name) for name in ("_parameters", "_buffers", "_non_persistent_buffers_set")
    )
    if not isinstance(parameters, dict):
        return _detached(attributes)
    tensors = dict(dict.items(parameters))
    if isinstance(buffers, dict):
        skipped = skipped if isinstance(skipped, set) else set()
        tensors |= {name: value for name, value in dict.items(buffers) if name not in skipped}
    return _detached(tensors)


def _detached(values: Mapping[Any, object]) -> dict[str, Tensor]:
    """Return the tensors with a name among some values."""
    return {
        name: value.detach() for name, value in values.items() if isinstance(name, str) and isinstance(value, Tensor)
    }


def check_storages(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that repeat their data: copied, a few bytes of it could fill any memory."""
    for name, tensor in tensors.items():
        if not _fills_its_storage(tensor):
            raise Refused(f"claims more values for {shown(name)} than it holds; download or save it again.")
    stored = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    if sum(tensor.nbytes for tensor in tensors.values()) > _MAX_SHARING * sum(stored.values()):
        raise Refused("claims the same values under very many names; download or save it again.")


def _fills_its_storage(tensor: Tensor) -> bool:
    """Return whether the storage has room for each value of a tensor, and for its last index; torch does not check."""
    if tensor.layout != torch.strided or any(size < 0 for size in tensor.shape):
        return False
    last = tensor.storage_offset() + sum((n - 1) * by for n, by in zip(tensor.shape, tensor.stride(), strict=True))
    elements = max(int(last) + 1, tensor.numel()) if tensor.numel() else 0
    return elements * tensor.element_size() <= tensor.untyped_storage().nbytes()
