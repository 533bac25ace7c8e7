"""Two processes on one machine train as one process does, and refuse in all of them what one alone would get wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from training import ddp_run
from training.two_processes import launch

from sparse_ft.checkpoints import check_weights, read_sidecars
from sparse_ft.masks import MASKS_FILE, MaskSet
from sparse_ft.models import load_model, named_weights
from sparse_ft.training import is_complete_checkpoint, latest_complete_checkpoint

pytestmark = pytest.mark.distributed
SCRIPT = Path(__file__).with_name("ddp_run.py")


ONE_MICRO_BATCH = [name for name in ddp_run.CASES if name != "full, two micro-batches"]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory in which two processes left the results of every case."""
    directory = tmp_path_factory.mktemp("both")
    done = launch(SCRIPT, directory)
    assert done.returncode == 0, done.stderr[-3000:]
    return directory


def weights_of(directory: Path, process: int = 0) -> dict[str, Tensor]:
    return load_file(directory / f"{process}.safetensors")


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def told_by(directory: Path, process: int = 0) -> dict[str, object]:
    told = json.loads((directory / f"{process}.json").read_text())
    assert isinstance(told, dict)
    return told


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[dict[str, Tensor], MaskSet, list[float]]]:
    """`alone(case)`: weights, masks and gradient norms of one process that takes the micro-batches one by one."""

    def run(name: str, **more: object) -> tuple[dict[str, Tensor], MaskSet, list[float]]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        model, masks, logs = ddp_run.run_case(name, tmp_path_factory.mktemp("alone"), **{"together": 2, **more})
        torch.set_num_threads(threads)
        weights = {name: weight.detach() for name, weight in named_weights(model).items()}
        return weights, masks, [entry["grad_norm"] for entry in logs if "grad_norm" in entry]

    return run


def norms_of(directory: Path) -> list[float]:
    logs = told_by(directory)["logs"]
    assert isinstance(logs, list)
    return [entry["grad_norm"] for entry in logs if "grad_norm" in entry]


@pytest.mark.parametrize("name", [name for name in ONE_MICRO_BATCH if not ddp_run.CASES[name].dropout])
def test_two_processes_are_one_that_accumulates(name: str, both: Path, alone: Callable[..., object]) -> None:
    """Bit for bit: g1/2 + g2/2 of losses scaled by 2 is the sum g1 + g2 in floating point too."""
    weights, masks, norms = alone(name)  # type: ignore[misc]
    found = weights_of(both / name)
    assert found.keys() == weights.keys()
    assert norms_of(both / name) == norms
    for key, weight in weights.items():
        assert torch.equal(bits(found[key]), bits(weight)), key
    assert told_by(both / name)["masks"] == masks.digest()


@pytest.mark.parametrize("arguments", [{"together": 2}, {"per_device_train_batch_size": 4}], ids=["4 x 2", "2 x 4"])
def test_sums_in_another_order_agree_to_their_rounding(
    arguments: dict[str, int], both: Path, alone: Callable[..., object]
) -> None:
    name = "full, two micro-batches"
    weights, masks, norms = alone(name, **{"together": 1, **arguments})  # type: ignore[misc]
    assert norms_of(both / name) == pytest.approx(norms, rel=1e-5)
    found = weights_of(both / name)
    for key, weight in weights.items():
        torch.testing.assert_close(found[key], weight, rtol=1e-5, atol=1e-7)
    masks.verify(found)


@pytest.mark.parametrize("name", ddp_run.CASES)
def test_both_processes_end_with_the_same_bits_and_every_zero(name: str, both: Path) -> None:
    first, second = weights_of(both / name), weights_of(both / name, 1)
    assert first.keys() == second.keys()
    for key, weight in first.items():
        assert torch.equal(bits(weight), bits(second[key])), key
    _, masks = ddp_run.sparse_model(ddp_run.CASES[name])
    assert [told_by(both / name, process)["masks"] for process in (0, 1)] == [masks.digest()] * 2
    for key, mask in masks.items() if not ddp_run.CASES[name].quantised else ():  # packed weights do not move
        assert int(first[key].view(torch.int32)[~mask].abs().sum()) == 0, f"{key} is not +0 where it is pruned"


@pytest.mark.parametrize("name", [name for name, case in ddp_run.CASES.items() if case.dropout])
def test_resumed_is_straight(name: str, both: Path) -> None:
    """With dropout: each process takes up its own random state."""
    for process in (0, 1):
        straight, resumed = weights_of(both / name, process), weights_of(both / f"{name}, again", process)
        assert all(torch.equal(weight, resumed[key]) for key, weight in straight.items())


def test_a_checkpoint_of_two_processes_is_whole(both: Path) -> None:
    run = both / "resumed" / "run"
    for step in (2, 4):
        checkpoint = run / f"checkpoint-{step}"
        names = {path.name for path in checkpoint.iterdir()}
        assert {"rng_state_0.pth", "rng_state_1.pth", MASKS_FILE} <= names and is_complete_checkpoint(checkpoint)
        masks, record = read_sidecars(checkpoint)
        check_weights(masks, record, load_model(checkpoint))
    assert latest_complete_checkpoint(run) == str(run / "checkpoint-4")


def test_every_process_refuses_masks_that_differ(both: Path) -> None:
    heard = [told_by(both / "refusals", process)["other masks"] for process in (0, 1)]
    assert heard[0] == heard[1]
    assert "ValueError: Process 1 has masks with digest" in str(heard[0])
    assert not list((both / "refusals" / "other masks").glob("checkpoint-*"))


def test_every_process_finds_a_revived_weight_and_the_checkpoint_is_disowned(both: Path) -> None:
    heard = [told_by(both / "refusals", process)["revived"] for process in (0, 1)]
    assert heard[0] == heard[1] and "at the save of step 2" in str(heard[0])
    run = both / "refusals" / "revived"
    assert latest_complete_checkpoint(run) == str(run / "checkpoint-1")
