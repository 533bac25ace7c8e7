"""One random mask for all models: the merged delta is as sparse as each of theirs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from merging import merge_formulas as formulas
from merging.checkpoints import merge, prepare, read, write
from torch import Tensor

from sparse_ft.deltas import random_keep

NAME = "model.layers.0.mlp.up_proj.weight"
TEXT = """
merge_method: %s
base_model: @base
models:
  - {model: @a, parameters: {weight: 0.75, density: %g}}
  - {model: @b, parameters: {weight: 0.5, density: %g}}
parameters: {shared_drop: %s, normalize: false}
seed: 3
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A base of zeros and two fine-tunes, so that the output is the merged delta."""
    generator = torch.Generator().manual_seed(0)
    write(tmp_path / "base", {NAME: torch.zeros(64, 96)})
    for name in "ab":
        write(tmp_path / name, {NAME: torch.randn(64, 96, generator=generator)})
    return tmp_path


def mask(density: float, role: str = "") -> Tensor:
    return torch.from_numpy(random_keep(64 * 96, density, seed=3, name=NAME, role=role)).view(64, 96)


@pytest.mark.parametrize("density", [0.3, 0.01])
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_the_merged_delta_is_as_sparse_as_each(place: Path, method: str, density: float) -> None:
    found = merge(place, TEXT % (method, density, density, "true"))[NAME]
    keep = mask(density)
    assert torch.equal(found != 0, keep)
    deltas = [read(place / name)[NAME].double() * keep / density for name in "ab"]
    if method == "dare_ties":
        expected = formulas.elected(torch.zeros(64, 96), deltas, [0.75, 0.5], False, 1.0, False)
    else:
        expected = formulas.weighted_sum(torch.zeros(64, 96), deltas, [0.75, 0.5], False, 1.0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert "`shared_drop` draws one mask" in (place / "out" / "README.md").read_text()


def test_without_it_masks_differ_and_the_merged_delta_has_their_union(place: Path) -> None:
    found = merge(place, TEXT % ("dare_linear", 0.3, 0.3, "false"))[NAME]
    assert torch.equal(found != 0, mask(0.3, f"{place}/a") | mask(0.3, f"{place}/b"))
    assert "one mask" not in (place / "out" / "README.md").read_text()


def test_masks_of_different_density_lie_in_each_other(place: Path) -> None:
    found = merge(place, TEXT % ("dare_linear", 0.2, 0.6, "true"))[NAME]
    assert torch.equal(found != 0, mask(0.6)) and bool((mask(0.2) <= mask(0.6)).all())


def test_methods_that_drop_nothing_at_random_do_not_use_it(place: Path) -> None:
    notes = prepare(place, TEXT % ("ties", 0.3, 0.3, "true")).report.notes
    assert "Parameter 'shared_drop' is not used by 'ties'." in notes
    with pytest.raises(ValueError, match="must be true or false"):
        prepare(place, TEXT % ("dare_ties", 0.3, 0.3, "2"))
