"""What becomes of the zeros when sparse models are merged.

    preserve_masks: auto                                        # the default: models that share their masks keep them
    preserve_masks: shared | intersection | union | base | off
    preserve_masks: {pattern: 2:4}                              # prune the merged weights again, by magnitude
    preserve_masks: {pattern: unstructured, sparsity: 0.5}

Models that were pruned independently of each other merge to the union of what they keep, so sparsity collapses; models
that share a mask (sparse model soups, arXiv 2306.16788) keep it. The mask is imposed on the merged weights, so a dense
adapter or a random drop cannot break it (`imposing.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

from sparse_ft.masks import MASKS_FILE, MaskSet, Pattern
from sparse_ft.masks.pattern import check_sparsity
from sparse_ft.merging.plan import MergePlan
from sparse_ft.naming import did_you_mean

POLICIES = ("auto", "shared", "intersection", "union", "base", "off")


@dataclass(frozen=True)
class PreserveMasks:
    """A policy by name, or a pattern to prune to (then `policy` is `"reprune"`)."""

    policy: str = "auto"
    pattern: str = "unstructured"
    sparsity: float | None = None


def parse_preserve_masks(raw: object) -> PreserveMasks:
    """Read `preserve_masks` of a configuration.

    Raises:
        ValueError: if it is neither a policy nor a pattern.
    """
    if raw is None:
        return PreserveMasks()
    if raw is False:  # YAML 1.1 reads off so
        return PreserveMasks("off")
    if isinstance(raw, str):
        if raw not in POLICIES:
            raise ValueError(f"Unknown preserve_masks '{raw}'. {did_you_mean(raw, POLICIES)}")
        return PreserveMasks(raw)
    if not isinstance(raw, Mapping):
        raise ValueError(f"preserve_masks must be one of {', '.join(POLICIES)}, or have a pattern, got {raw!r:.60}.")
    for key in raw:
        if key not in ("pattern", "sparsity"):
            raise ValueError(
                f"preserve_masks has the unknown key '{key}'. {did_you_mean(str(key), ('pattern', 'sparsity'))}"
            )
    pattern, sparsity = Pattern.parse(str(raw.get("pattern", "unstructured"))), raw.get("sparsity")
    if sparsity is not None and (isinstance(sparsity, bool) or not isinstance(sparsity, (int, float))):
        raise ValueError(f"preserve_masks.sparsity must be a number, got {sparsity!r}.")
    check_sparsity(pattern, sparsity)
    return PreserveMasks("reprune", str(pattern), sparsity)


def preserved_masks(
    how: PreserveMasks, plan: MergePlan, base: int | None, *, renumbered: bool
) -> tuple[MaskSet | None, list[str]]:
    """The masks the merged weights will have, as far as they follow from the inputs'.

    Args:
        how: the policy. `"reprune"` makes its masks from the merged weights, later.
        plan: the merge.
        base: index of the base among its models.
        renumbered: whether layers of the output have other numbers than in the inputs.

    Returns:
        The masks, or None, and what the report should say.

    Raises:
        ValueError: if the policy cannot be followed.
    """
    if how.policy in ("off", "reprune"):
        return None, []
    sets = {i: MaskSet.load(m.path) for i, m in enumerate(plan.models) if (m.path / MASKS_FILE).is_file()}
    if not sets:
        if how.policy == "auto":
            return None, []
        raise ValueError(f"preserve_masks is '{how.policy}' but no model has masks ({MASKS_FILE}); prune one first.")
    if renumbered:
        if how.policy == "auto":
            return None, ["The layers are renumbered, so the masks of the models are not kept."]
        raise ValueError(f"preserve_masks '{how.policy}' cannot follow renumbered layers; use 'off' or a pattern.")
    used = sorted(_used(plan))
    dense = [plan.models[i].label for i in used if i not in sets]
    chosen, notes = _choose(how.policy, plan, sets, used, base, dense)
    if chosen is not None:
        _check_fit(chosen, plan)
        notes.append(f"The output is {chosen.sparsity():.2%} sparse over {len(chosen)} masked tensors ({how.policy}).")
    return chosen, notes


def _choose(
    policy: str, plan: MergePlan, sets: Mapping[int, MaskSet], used: Sequence[int], base: int | None, dense: list[str]
) -> tuple[MaskSet | None, list[str]]:
    if policy == "base":
        if base is None or base not in sets:
            raise ValueError(f"preserve_masks is 'base' but the base model has no {MASKS_FILE}; prune it first.")
        return sets[base], []
    own = [sets[i] for i in used if i in sets]
    if not own:
        return None, []
    different = dense or any(masks != own[0] for masks in own[1:])
    if policy in ("auto", "shared") and not different:
        return own[0], []
    labels = " and ".join(f"'{plan.models[i].label}'" for i in used if i in sets)
    reason = f"'{dense[0]}' has none" if dense else f"those of {labels} differ"
    if policy == "shared":
        raise ValueError(f"preserve_masks is 'shared' but {reason}; use intersection, union, base or a pattern.")
    if policy == "auto":
        hint = "set preserve_masks to intersection, union, base or a pattern to keep zeros"
        return None, [f"warning: some models are sparse, but {reason}: their zeros fill up; {hint}."]
    if dense and policy == "union":
        raise ValueError(f"preserve_masks is 'union' but {reason}, so nothing would be zero; use base or intersection.")
    return reduce(lambda a, b: a & b if policy == "intersection" else a | b, own), []


def _used(plan: MergePlan) -> set[int]:
    """Indices of the models the output is made of."""
    found: set[int] = set()
    for tensor in plan.tensors:
        found |= {source.model for source in (*tensor.sources, *filter(None, (tensor.base, tensor.copy)))}
    return found


def _check_fit(masks: MaskSet, plan: MergePlan) -> None:
    shapes = {tensor.name: tensor.shape for tensor in plan.tensors}
    for name in masks:
        if shapes.get(name) != masks.shape(name):
            raise ValueError(
                f"The mask of '{name}' has shape {masks.shape(name)} but the output's tensor has {shapes.get(name)}; "
                f"set preserve_masks to off, and prune the result."
            )
