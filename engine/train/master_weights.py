"""The weights of a training: the masters, which the optimizer moves, and the network that computes with them.

Masters are in fp32 under the names in the file, in GmP form r and theta. The network is a plain CLIP in the precision
of the computation. In GmP form W = r · theta / ‖theta‖ is constant within an optimizer step, and dW → (dr, dtheta) is
linear: so the network holds W, dW is summed in fp32 over the micro-batches, and once a step

    dr = ⟨dW, u⟩,  dtheta = (r / ‖theta‖) (dW − u ⟨dW, u⟩),  u = theta / ‖theta‖  (by row)

which is what autograd gives through the normalisation (Salimans and Kingma 2016, arXiv:1602.07868, equation 3).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..clip.full_clip import FullCLIP
from ..clip.gmp import gmp_to_weight
from ..clip.network import StoredNorm, network_of, skeleton
from .optim.parameter_info import SCALARS

MASTERS = torch.float32
# As torch's `normalize`, so that a theta of zeros gives no NaN.
_SHORTEST = 1e-12
# Values of a layer that are worked on at once on a CPU, so that they are fetched from memory once.
_BLOCK = 2**18


class _Fold(NamedTuple):
    """A weight [out, in] of the network, its r [out, 1], theta [out, in], and the norms [out, 1] of theta's rows."""

    weight: nn.Parameter
    r: nn.Parameter
    theta: nn.Parameter
    lengths: Tensor


class MasterWeights:
    """`masters` by name, those that `trains` names; `network` computes in `dtype`.

    The network's parameter is the master itself where the two have the same form and dtype; any other gets its value by
    `refresh` and gives its gradient to the master as soon as it is there. `finish_gradients` follows the last backward.
    """

    def __init__(self, model: FullCLIP, trains: Callable[[str], bool], *, device: torch.device, dtype: torch.dtype):
        self.model = model
        self.masters: dict[str, nn.Parameter] = {
            name: nn.Parameter(tensor.to(device, MASTERS, copy=True))
            for name, tensor in model.state_dict.items()
            if trains(name) and not name.endswith((".running_mean", ".running_var"))
        }
        self._copies: list[tuple[nn.Parameter, nn.Parameter]] = []  # the network's, the master
        self._folds: list[_Fold] = []
        plain = skeleton(model.architecture, device="meta")
        exact = {*SCALARS, *_of_stored_norms(plain)}
        weights = {}
        for name in plain.state_dict():
            weights[name] = self._weight(name, device, MASTERS if name in exact or dtype == torch.float32 else dtype)
        self.network = network_of(model.architecture, weights)
        for own, master in self._copies:
            own.register_post_accumulate_grad_hook(functools.partial(_give, master=master))
        for fold in self._folds:
            fold.weight.register_post_accumulate_grad_hook(functools.partial(_give, master=fold.theta))
        self.refresh()
        self.choose(lambda name: True)

    def _weight(self, name: str, device: torch.device, dtype: torch.dtype) -> nn.Parameter | Tensor:
        """What the network computes with under a plain name; its value may come with `refresh`."""
        state, layer = self.model.state_dict, name.removesuffix(".weight")
        if f"{layer}.theta" in self.masters:
            r, theta = self.masters[f"{layer}.r"], self.masters[f"{layer}.theta"]
            own = nn.Parameter(torch.empty_like(theta, dtype=dtype))
            self._folds.append(_Fold(own, r, theta, torch.empty_like(r, requires_grad=False)))
            return own
        if f"{layer}.theta" in state:
            return gmp_to_weight(state[f"{layer}.r"], state[f"{layer}.theta"], dtype).to(device)
        if name not in self.masters:
            return state[name].to(device, dtype, copy=True)
        master = self.masters[name]
        if master.dtype == dtype:
            return master
        own = nn.Parameter(torch.empty_like(master, dtype=dtype))
        self._copies.append((own, master))
        return own

    def choose(self, trains: Callable[[str], bool]) -> None:
        """Let gradients reach the masters of these names alone; nothing else of the network ever has any."""
        own = {id(master): own for own, master in self._copies} | {id(fold.theta): fold.weight for fold in self._folds}
        self.network.requires_grad_(False)
        for name, master in self.masters.items():
            master.requires_grad_(trains(name))
            if id(master) in own:
                own[id(master)].requires_grad_(master.requires_grad)

    @torch.no_grad()
    def refresh(self) -> None:
        """Give the network the masters' values; after each change of these."""
        if self._copies:
            torch._foreach_copy_(*map(list, zip(*self._copies, strict=True)))
        for fold in self._folds:
            for rows in _row_blocks(fold.theta):
                theta, lengths = fold.theta[rows], fold.lengths[rows]
                torch.linalg.vector_norm(theta, dim=1, keepdim=True, out=lengths).clamp_min_(_SHORTEST)
                fold.weight[rows] = theta * (fold.r[rows] / lengths)

    @torch.no_grad()
    def finish_gradients(self) -> None:
        """Turn the gradients of folded weights, which lie at theta, into those of r and theta, in their place."""
        for fold in self._folds:
            if fold.theta.grad is None:
                continue
            fold.r.grad = torch.empty_like(fold.r)
            for rows in _row_blocks(fold.theta):
                theta, change, lengths = fold.theta[rows], fold.theta.grad[rows], fold.lengths[rows]
                along = torch.linalg.vecdot(change, theta).unsqueeze(1) / lengths
                fold.r.grad[rows] = along
                scale = fold.r[rows] / lengths
                change.mul_(scale).addcmul_(theta, along * scale / lengths, value=-1)

    def tensors(self) -> dict[str, Tensor]:
        """The whole model as it is now, under the names of its file; what does not train is the model's own."""
        return {name: self.masters.get(name, tensor) for name, tensor in self.model.state_dict.items()}


def _give(own: nn.Parameter, *, master: nn.Parameter) -> None:
    """Add the gradient to the master's, and keep none here."""
    if master.grad is None:
        master.grad = own.grad.to(master.dtype)
    else:
        master.grad += own.grad
    own.grad = None


def _row_blocks(weight: Tensor) -> Iterator[slice]:
    count, width = weight.shape
    step = count if weight.device.type != "cpu" else max(1, _BLOCK // width)
    return (slice(start, start + step) for start in range(0, count, step))


def _of_stored_norms(network: nn.Module) -> set[str]:
    """The names of the tensors of a ResNet's BatchNorm layers, which torch computes with in fp32 whatever comes in."""
    return {
        f"{module_name}.{name}"
        for module_name, module in network.named_modules()
        if isinstance(module, StoredNorm)
        for name in module.state_dict()
    }
