"""AdamR: Adam that pulls the weights back to the model it starts from, so that the delta stays small enough to prune.

With w0 the base, g the gradient and one scale s for the whole model, step t of DAREx-L2 is

    m <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g²;   v^ = v / (1 - b2^t)        all tensors
    s  = sqrt(sum of v^ / number of entries)             over all tensors with a gradient; 1 where that is 0
    w <- w - lr·λ/s · (w - w0)                           "l1": sign(w - w0) in place of the difference
    w <- w - lr/(1 - b1^t) · m / (sqrt(v^) + eps)

λ is `decay`. Dividing by s makes one λ fit models whose gradients have other sizes. "l1" swings around w0 by lr·λ/s and
leaves no exact zero; "shrink" is its proximal form: after the Adam step the delta is moved towards 0 by lr·λ/s and
stops there, so entries that did not pay are the base's, bit for bit. Prune deltas of "l2" by DARE, those of "l1" and
"shrink" by magnitude.

Source: Deng et al., DARE the Extreme, ICLR 2025, arXiv 2410.09344 (AdamR, section 4.2); the scale: AdamS, Xie et al.,
arXiv 2011.11152.

Example:
    >>> groups = adamr_groups(model, base=model)         # a new head has no base: leave it out, it is then not pulled
    >>> optimizer = AdamR(groups, lr=2e-5, decay=0.01)
    >>> Trainer(model=model, args=arguments, train_dataset=data, optimizers=(optimizer, None)).train()

Several processes: with a whole copy of the model in each (DDP), gradients and with them s are the same everywhere and
nothing has to be sent. Where each process holds a part of the parameters, `reduce` has to add up two numbers.

Limits: λ and s follow the gradients the optimizer sees, so with clipping s is that of the clipped ones. A parameter
without a gradient in a step is left alone in it. lr·λ/s is cut at 1 in "l2": more would jump past the base.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from sparse_ft.masks.mask_set import tensor_digest
from sparse_ft.models import canonical_name, named_weights
from sparse_ft.training.adamr_groups import check_base
from sparse_ft.training.adamr_update import (
    MOMENTS,
    Form,
    Work,
    gradient_scale,
    second_moment,
    update_moments,
    update_weights,
)


class AdamR(torch.optim.Optimizer):
    """Adam with a decay towards the base, see the module's docstring.

    Moments and arithmetic are fp32 (fp64 for fp64 parameters); a 16-bit parameter is rounded once per step. Gradients
    have to be unscaled, as `GradScaler.step` and the Trainer see to by themselves. Options may differ between groups.

    A checkpoint of the optimizer holds the base if that was taken from the parameters. One that was given has to be
    given again on resuming, and its digest is compared.

    Args:
        params: groups from `adamr_groups`, `model.named_parameters()`, or anything `torch.optim` takes. A group may
            have a `base`: its tensors by canonical name.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the denominator.
        decay: λ, how strongly weights are pulled to the base; 0 is Adam.
        form: "l2", "l1" or "shrink".
        amsgrad: use the running maximum of v.
        base: for groups that have none of their own; None takes a copy of the parameters as they are now.
        base_dtype: dtype of the copy; None is the parameter's. bfloat16 is exact for bases stored in it.
        base_device: where the copy is kept; None is with the parameter, "cpu" saves an accelerator's memory.
        reduce: takes the fp64 tensor (sum of v^, number of entries) of this process and returns that of all processes,
            if each holds other parameters. Called once in every step.
        foreach: treat all tensors of a group at once, where base and parameter are of one dtype, fp32 or fp64.

    Attributes:
        scale: s of the last step.

    Raises:
        ValueError: for options out of range, a base that does not fit, or a `weight_decay`, which is another thing.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        decay: float = 1e-4,
        *,
        form: Form = "l2",
        amsgrad: bool = False,
        base: Mapping[str, Tensor] | None = None,
        base_dtype: torch.dtype | None = None,
        base_device: torch.device | str | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
        foreach: bool = True,
    ) -> None:
        self._base, self._base_dtype, self._base_device = base, base_dtype, base_device
        self.reduce, self.foreach, self.scale = reduce, foreach, 1.0
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, decay=decay, form=form, amsgrad=amsgrad))
        self._base = None

    # -- the base ----------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and copy its base.

        Raises:
            ValueError: as when the optimizer is made.
        """
        group = dict(param_group)
        base = group.pop("base", self._base)
        _check_options({**self.defaults, **group})
        super().add_param_group(group)
        group = self.param_groups[-1]
        group["base_digest"] = None
        try:
            self._take_base(group, base)
        except ValueError:
            del self.param_groups[-1]
            raise

    def _take_base(self, group: dict[str, Any], base: Mapping[str, Tensor] | None) -> None:
        """Copy the base of a new group into the state: what was given, else the parameters themselves."""
        for parameter in group["params"]:
            if not parameter.is_floating_point():
                raise ValueError(f"AdamR trains real floating-point parameters, but one is {parameter.dtype}.")
        if base is None:
            for parameter in group["params"] if group["decay"] > 0 else ():
                self.state[parameter]["base"] = self._copy(parameter, parameter)
            return
        if "param_names" not in group:
            raise ValueError("A base is found by names: give AdamR model.named_parameters() or adamr_groups(model, …).")
        known = named_weights(dict(base))
        found = []
        for name, parameter in zip(map(canonical_name, group["param_names"]), group["params"], strict=True):
            value = known.get(name)
            if value is not None:
                check_base(name, parameter, value)
                found.append((parameter, value))
            elif group["decay"] > 0:
                raise ValueError(
                    f"The base has no '{name}', which shall be pulled to it with decay {group['decay']:g}; put it into "
                    f"a group with decay 0, as adamr_groups does."
                )
        for parameter, value in found:
            self.state[parameter]["base"] = self._copy(value, parameter)
        group["base_digest"] = _digest(self.state[parameter]["base"] for parameter, _ in found)

    def _copy(self, value: Tensor, parameter: Tensor) -> Tensor:
        device, dtype = self._base_device or parameter.device, self._base_dtype or parameter.dtype
        return value.detach().to(device=device, dtype=dtype, copy=True)

    # -- one step ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            The closure's loss.

        Raises:
            RuntimeError: for sparse gradients, or a group with a decay whose parameters have no base.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [self._collect(group) for group in self.param_groups]
        for part in work:
            update_moments(part, self.foreach)
        self.scale = self._global_scale(work)
        for part in work:
            update_weights(part, part.group["lr"] * part.group["decay"] / self.scale, self.foreach)
        return loss

    def _collect(self, group: dict[str, Any]) -> Work:
        """Parameters with a gradient; their moments are made on first use."""
        params = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in params:
            if parameter.grad.is_sparse:
                raise RuntimeError("AdamR takes no sparse gradients; make the embedding with sparse=False.")
            state = self.state[parameter]
            if group["decay"] > 0 and "base" not in state:
                raise RuntimeError(
                    f"A group's decay became {group['decay']:g} but AdamR has no base for a parameter of shape "
                    f"{tuple(parameter.shape)}; make the optimizer with the base, or leave this decay at 0."
                )
            if "step" not in state:
                wide = torch.promote_types(parameter.dtype, torch.float32)
                names = MOMENTS if group["amsgrad"] else MOMENTS[:2]
                state["step"] = 0
                state.update({name: torch.zeros_like(parameter, dtype=wide) for name in names})
            state["step"] += 1
        return Work(group, params, [self.state[parameter] for parameter in params])

    def _global_scale(self, work: Sequence[Work]) -> float:
        """s over all groups, and over all processes with `reduce`."""
        sums, corrections, count = [], [], 0
        for group, params, states in work:
            name = second_moment(group)
            sums += [state[name].sum() for state in states]
            corrections += [1 - group["betas"][1] ** state["step"] for state in states]
            count += sum(parameter.numel() for parameter in params)
        device = sums[0].device if sums else None
        values = torch.stack([value.to(device, torch.float32) for value in sums]).tolist() if sums else []
        squares = [value / correction for value, correction in zip(values, corrections, strict=True)]
        if self.reduce is None:
            return gradient_scale(squares, count)
        total = self.reduce(torch.tensor([math.fsum(squares), count], dtype=torch.float64))
        return gradient_scale([float(total[0])], float(total[1]))

    # -- saving and resuming -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Moments and options; the base where it was taken from the parameters, else its digest."""
        packed: dict[str, Any] = super().state_dict()
        given = {index for group in packed["param_groups"] if group["base_digest"] for index in group["params"]}
        states = {
            index: {name: value for name, value in state.items() if name != "base" or index not in given}
            for index, state in packed["state"].items()
        }
        return {**packed, "state": {index: state for index, state in states.items() if state}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state; moments stay fp32 whatever the parameters are.

        Raises:
            ValueError: if it is not AdamR's, or was saved with another base.
        """
        bases = [self._bases(group) for group in self.param_groups]
        digests = [group["base_digest"] for group in self.param_groups]
        for group, saved, mine in zip(self.param_groups, state_dict["param_groups"], bases, strict=False):
            if "base_digest" not in saved:
                raise ValueError("This is not the state of AdamR: its groups say nothing of a base.")
            _check_same_base(group["base_digest"], mine, saved, state_dict["state"])
        super().load_state_dict(state_dict)
        for number, (group, saved) in enumerate(zip(self.param_groups, state_dict["param_groups"], strict=True)):
            group["base_digest"] = digests[number]
            for parameter, index in zip(group["params"], saved["params"], strict=True):
                stored = state_dict["state"].get(index, {})
                for name in MOMENTS:
                    if name in stored:
                        wide = torch.promote_types(parameter.dtype, torch.float32)
                        self.state[parameter][name] = stored[name].to(parameter.device, wide, copy=True)
                if "base" in stored and digests[number] is None:
                    self.state[parameter]["base"] = self._copy(stored["base"], parameter)
                elif parameter in bases[number]:
                    self.state[parameter]["base"] = bases[number][parameter]

    def _bases(self, group: dict[str, Any]) -> dict[Tensor, Tensor]:
        return {p: self.state[p]["base"] for p in group["params"] if p in self.state and "base" in self.state[p]}

    def __getstate__(self) -> dict[str, Any]:
        own = ("_base", "_base_dtype", "_base_device", "reduce", "foreach", "scale")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}


def _check_options(options: Mapping[str, Any]) -> None:
    """Refuse options out of range."""
    for name in ("lr", "decay"):
        if not 0.0 <= float(options[name]) < math.inf:
            raise ValueError(f"{name} of AdamR must be a number from 0 on, got {options[name]}.")
    if not all(0.0 <= beta < 1.0 for beta in options["betas"]):
        raise ValueError(f"betas of AdamR must lie in [0, 1), got {options['betas']}.")
    if not options["eps"] > 0.0:
        raise ValueError(f"eps of AdamR must be above 0, got {options['eps']}: entries without gradient are 0 / eps.")
    if options["form"] not in get_args(Form):
        raise ValueError(f"form of AdamR is one of {', '.join(get_args(Form))}, got '{options['form']}'.")
    if options.get("weight_decay"):
        raise ValueError(
            f"AdamR pulls weights to the base, not to 0, but weight_decay is {options['weight_decay']}; set it to 0 "
            f"and use decay."
        )


def _digest(bases: Iterable[Tensor]) -> str:
    return hashlib.sha256("".join(map(tensor_digest, bases)).encode()).hexdigest()


def _check_same_base(own: str | None, bases: Mapping[Tensor, Tensor], saved: Any, states: Mapping[Any, Any]) -> None:
    """Compare the base of this optimizer with that of a saved group, where one of them was given by the user."""
    if own is None and saved["base_digest"] is None:
        return
    stored = [states[index]["base"] for index in saved["params"] if "base" in states.get(index, {})]
    before, now = saved["base_digest"] or _digest(stored), own or _digest(bases.values())
    if before != now:
        raise ValueError(
            f"The run to be resumed was pulled to a base with digest {before[:12]}, this AdamR has one with digest "
            f"{now[:12]}; give it the same base, in the same base_dtype."
        )
