"""From the plan of a tensor to the job of its method: operands opened, settings looked up, random bits keyed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparse_ft.deltas.random_mask import GAP_BLOCK, GAPS_UP_TO, random_keep, random_uniform
from sparse_ft.merging.chunks import Draw, Job, Workspace
from sparse_ft.merging.families import REQUIRED, default_of
from sparse_ft.merging.methods import BY_ROWS
from sparse_ft.merging.operands import Inputs, operands_of
from sparse_ft.merging.plan import MergePlan, TensorPlan


def make_job(plan: MergePlan, tensor: TensorPlan, inputs: Inputs, workspace: Workspace) -> Job:
    """The job of one tensor that is merged.

    Raises:
        ValueError: if a required setting is missing, or a shape does not fit.
    """
    base, models = operands_of(tensor, inputs, workspace)
    for source in (*([tensor.base] if tensor.base else []), *tensor.sources):
        shape = inputs.shape(source)
        if source.rows is None and math.prod(shape) != math.prod(tensor.shape):
            raise ValueError(
                f"'{source.name}' of '{plan.models[source.model].label}' has shape {shape} but the output's "
                f"'{tensor.name}' has {tensor.shape}; the models are of different architectures."
            )

    def each(parameter: str, unused: float) -> list[float]:
        return [_setting(plan, tensor, source.parameters, parameter, unused) for source in tensor.sources]

    def one(parameter: str, unused: float) -> Any:
        return _setting(plan, tensor, tensor.parameters, parameter, unused)

    densities = each("density", 1.0)
    return Job(
        tensor.name, tensor.shape, base, models,
        weights=each("weight", 1.0), densities=densities, gammas=each("gamma", 0.0),
        epsilons=each("epsilon", 0.0), scales=each("q", 1.0), normalize=bool(one("normalize", 0)),
        rescale=bool(one("rescale", 0)), lam=float(one("lambda", 1.0)), t=float(one("t", 0.0)),
        compatibility=plan.compatibility, dtype=tensor.dtype, draw=_draw(plan, tensor, densities, workspace),
        labels=[plan.models[source.model].label for source in tensor.sources],
        workspace=workspace, by_rows=plan.method in BY_ROWS,
    )  # fmt: skip


def _setting(plan: MergePlan, tensor: TensorPlan, given: Mapping[str, Any], parameter: str, unused: float) -> Any:
    """A parameter's value: the plan's, else the method's default; `unused` if the method has no such parameter."""
    if parameter in given:
        return given[parameter]
    try:
        default = default_of(plan.method, parameter, plan.compatibility)
    except KeyError:
        return unused
    if default is REQUIRED:
        raise ValueError(f"{plan.method} needs '{parameter}' for '{tensor.name}'; add it to the parameters.")
    return default


def _draw(plan: MergePlan, tensor: TensorPlan, densities: Sequence[float], workspace: Workspace) -> Draw:
    """Random bits keyed by (seed, the model's label unless it is shared, the output tensor's name, position)."""
    roles = ["" if tensor.parameters.get("shared_drop") else plan.models[s.model].label for s in tensor.sources]
    if plan.method in BY_ROWS:
        return lambda k, start, stop: random_uniform(
            stop - start, seed=plan.seed, name=tensor.name, role=roles[k], start=start
        )
    blocks: dict[int, tuple[int, NDArray[np.bool_]]] = {}

    def keep(k: int, start: int, stop: int, out: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
        name, role = tensor.name, roles[k]
        return random_keep(stop - start, densities[k], seed=plan.seed, name=name, role=role, start=start, out=out)

    def draw(k: int, start: int, stop: int) -> NDArray[np.bool_]:
        # Gaps are drawn a block at a time, from its beginning.
        if densities[k] > GAPS_UP_TO:
            return keep(k, start, stop, workspace.bools("draw", stop - start))
        block = start // GAP_BLOCK
        if blocks.get(k, (-1,))[0] != block:
            blocks[k] = block, keep(k, block * GAP_BLOCK, min((block + 1) * GAP_BLOCK, math.prod(tensor.shape)))
        return blocks[k][1][start % GAP_BLOCK : start % GAP_BLOCK + stop - start]

    return draw
