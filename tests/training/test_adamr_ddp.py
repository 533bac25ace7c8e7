"""AdamR in two processes: one scale for all of them, and the weights that one process gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training import adamr_run
from training.two_processes import launch

pytestmark = pytest.mark.distributed
SCRIPT = Path(__file__).with_name("adamr_run.py")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory in which two processes left weights and scales."""
    directory = tmp_path_factory.mktemp("both")
    done = launch(SCRIPT, directory)
    assert done.returncode == 0, done.stderr[-3000:]
    return directory


def test_two_processes_have_one_scale_and_the_weights_of_one(both: Path, tmp_path: Path) -> None:
    """Bit for bit, as the average of two gradients is the sum of two halves."""
    weights, scales = adamr_run.run_ddp(tmp_path, together=2)
    first, second = (json.loads((both / f"{rank}.json").read_text())["ddp"] for rank in (0, 1))
    assert first == second == scales and len(scales) == 4
    for rank in (0, 1):
        found = load_file(both / f"ddp-{rank}.safetensors")
        assert all(torch.equal(found[name], weight) for name, weight in weights.items())


def test_parameters_held_by_different_processes_share_a_scale(both: Path) -> None:
    weights, scales = adamr_run.run_held(0, 1)
    first, second = (json.loads((both / f"{rank}.json").read_text())["held"] for rank in (0, 1))
    assert first == second == pytest.approx(scales, rel=1e-12)
    found = {**load_file(both / "held-0.safetensors"), **load_file(both / "held-1.safetensors")}
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=1e-7)
