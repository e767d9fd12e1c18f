"""The weights of a training: fp32 master weights that the optimizer moves, and the network that computes with them.

Master weights have the names in the model's file; in GmP form they are r and theta. The network is always a plain CLIP,
in the precision of the computation. In GmP form W = r * theta / ‖theta‖ per row, which is constant within an optimizer
step, and dW → (dr, dtheta) is linear. So the network holds W, micro-batches sum dW in fp32, and once per step

    dr = <dW, u>,  dtheta = (r / ‖theta‖) (dW - u <dW, u>),  u = theta / ‖theta‖  (per row)

That equals autograd through the normalisation (Salimans and Kingma 2016, arXiv:1602.07868, equation 3) and costs less.
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

MASTER_DTYPE = torch.float32
# The lower bound of torch's `normalize` for norms, so that a theta of zeros gives no NaN.
_MIN_NORM = 1e-12
# On a CPU, layers are processed in blocks of rows with this many values, each of which is read from memory only once.
_BLOCK = 2**18


class _Fold(NamedTuple):
    """A weight [out, in] of the network with its r [out, 1] and theta [out, in]; `norms` [out, 1] is a buffer for
    ‖theta‖."""

    weight: nn.Parameter
    r: nn.Parameter
    theta: nn.Parameter
    norms: Tensor


class MasterWeights:
    """Keeps `masters`, the trained parameters by name, and `network`, which computes in `dtype`.

    Where a master weight has the form and dtype that the network needs, the network's parameter is the master weight
    itself. Elsewhere the network has its own parameter: `refresh` gives it its value, and a hook passes its gradient on
    to the master weight during backward. Call `finish_gradients` after the last backward of a step.
    """

    def __init__(
        self, model: FullCLIP, trains: Callable[[str], bool], *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.model = model
        self.masters: dict[str, nn.Parameter] = {
            name: nn.Parameter(tensor.to(device, MASTER_DTYPE, copy=True))
            for name, tensor in model.state_dict.items()
            if trains(name) and not name.endswith((".running_mean", ".running_var"))
        }
        self._copies: list[tuple[nn.Parameter, nn.Parameter]] = []  # (the network's parameter, its master weight)
        self._folds: list[_Fold] = []
        plain = skeleton(model.architecture, device="meta")
        always_fp32 = {*SCALARS, *_stored_norm_names(plain)}
        weights = {
            name: self._weight(name, device, MASTER_DTYPE if name in always_fp32 or dtype == torch.float32 else dtype)
            for name in plain.state_dict()
        }
        self.network = network_of(model.architecture, weights)
        # A folded weight's gradient waits at theta, which has its shape, until `finish_gradients`.
        for own, master in [*self._copies, *((fold.weight, fold.theta) for fold in self._folds)]:
            own.register_post_accumulate_grad_hook(functools.partial(_move_gradient, master=master))
        self.refresh()
        self.choose(lambda name: True)

    def _weight(self, name: str, device: torch.device, dtype: torch.dtype) -> nn.Parameter | Tensor:
        """Return the network's tensor of this name; if it is a copy or folded, only `refresh` gives it its value."""
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
        """Let only the master weights that `trains` names get gradients."""
        own = {id(master): own for own, master in self._copies} | {id(fold.theta): fold.weight for fold in self._folds}
        self.network.requires_grad_(False)
        for name, master in self.masters.items():
            master.requires_grad_(trains(name))
            if id(master) in own:
                own[id(master)].requires_grad_(master.requires_grad)

    @torch.no_grad()
    def refresh(self) -> None:
        """Give the network the values of the master weights; call it whenever these have changed."""
        if self._copies:
            torch._foreach_copy_([own for own, _ in self._copies], [master for _, master in self._copies])
        for fold in self._folds:
            for rows in _row_blocks(fold.theta):
                theta, norms = fold.theta[rows], fold.norms[rows]
                torch.linalg.vector_norm(theta, dim=1, keepdim=True, out=norms).clamp_min_(_MIN_NORM)
                fold.weight[rows] = theta * (fold.r[rows] / norms)

    @torch.no_grad()
    def finish_gradients(self) -> None:
        """Turn the gradients dW of folded weights, which wait at theta, into those of r and theta, in place."""
        for fold in self._folds:
            if fold.theta.grad is None:
                continue
            fold.r.grad = torch.empty_like(fold.r)
            for rows in _row_blocks(fold.theta):
                theta, gradient, norms = fold.theta[rows], fold.theta.grad[rows], fold.norms[rows]
                along = torch.linalg.vecdot(gradient, theta).unsqueeze(1) / norms  # <dW, u>
                fold.r.grad[rows] = along
                scale = fold.r[rows] / norms
                # scale * dW - scale * <dW, u> * theta / ‖theta‖, without a temporary of theta's size
                gradient.mul_(scale).addcmul_(theta, along * scale / norms, value=-1)

    def tensors(self) -> dict[str, Tensor]:
        """Return the whole current model under the names of its file; what does not train is the original's own."""
        return {name: self.masters.get(name, tensor) for name, tensor in self.model.state_dict.items()}


def _move_gradient(own: nn.Parameter, *, master: nn.Parameter) -> None:
    """Add the gradient to the master weight's and free it here. Sums are in fp32, so that small micro-batches count."""
    if own.grad is None:
        return
    if master.grad is None:
        master.grad = own.grad.to(master.dtype)
    else:
        master.grad += own.grad
    own.grad = None


def _row_blocks(weight: Tensor) -> Iterator[slice]:
    count, width = weight.shape
    step = count if weight.device.type != "cpu" else max(1, _BLOCK // width)
    return (slice(start, start + step) for start in range(0, count, step))


def _stored_norm_names(network: nn.Module) -> set[str]:
    """Return the names of the tensors of a ResNet's BatchNorm layers, which torch computes in fp32 whatever comes
    in."""
    return {
        f"{module_name}.{name}"
        for module_name, module in network.named_modules()
        if isinstance(module, StoredNorm)
        for name in module.state_dict()
    }
