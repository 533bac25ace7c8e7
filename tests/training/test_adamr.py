"""AdamR: the formula of DAREx-L2 written a second time, its invariants, resuming, and real Trainer runs."""

from __future__ import annotations

import copy
import io
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY
from torch import Tensor, nn
from training.steps import AtEachStep, copies, pruned_are_positive_zero
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
)

from sparse_ft.masks import MaskSet
from sparse_ft.models import named_weights
from sparse_ft.training import AdamR, MaskCallback, adamr_groups, latest_complete_checkpoint
from sparse_ft.training.adamr_update import gradient_scale

MakeTrainer = Callable[..., Trainer]
SparseModel = Callable[..., tuple[PreTrainedModel, MaskSet]]


def tensors(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (5, 4), "b": (7,), "c": (3, 2, 2)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for name, shape in shapes.items()}


def give_gradients(parameters: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = (gradient * 0.3).to(parameter.dtype)


def by_hand(
    start: dict[str, Tensor], base: dict[str, Tensor], steps: int, *, lr: float, decay: float, form: str, amsgrad: bool
) -> dict[str, Tensor]:
    """The steps of section 4.2 of the paper, one entry of one tensor after another."""
    names = [(name, i) for name in start for i in range(start[name].numel())]
    w = {key: float(start[key[0]].flatten()[key[1]]) for key in names}
    w0 = {key: float(base[key[0]].flatten()[key[1]]) for key in names}
    m, v, top = (dict.fromkeys(names, 0.0) for _ in range(3))
    for t in range(1, steps + 1):
        parameters = {name: nn.Parameter(start[name].clone()) for name in start}
        give_gradients(parameters, t)
        hat = {}
        for key in names:
            g = float(parameters[key[0]].grad.flatten()[key[1]])  # type: ignore[union-attr]
            m[key] = 0.9 * m[key] + 0.1 * g
            v[key] = 0.99 * v[key] + 0.01 * g * g
            top[key] = max(top[key], v[key])
            hat[key] = (top if amsgrad else v)[key] / (1 - 0.99**t)
        s = math.sqrt(sum(hat.values()) / len(hat)) or 1.0
        for key in names:
            delta, pull = w[key] - w0[key], lr * decay / s
            if form == "l2":
                w[key] -= pull * delta
            elif form == "l1":
                w[key] -= pull * ((delta > 0) - (delta < 0))
            w[key] -= lr / (1 - 0.9**t) * m[key] / (math.sqrt(hat[key]) + 1e-8)
            if form == "shrink":
                delta = w[key] - w0[key]
                w[key] = w0[key] + math.copysign(max(abs(delta) - pull, 0.0), delta)
    return {
        name: torch.tensor([w[name, i] for i in range(start[name].numel())]).reshape(start[name].shape)
        for name in start
    }


@pytest.mark.parametrize("foreach", [True, False], ids=["lists", "plain"])
@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("form", ["l2", "l1", "shrink"])
def test_steps_are_the_papers(form: str, amsgrad: bool, foreach: bool) -> None:
    parameters, base = tensors(0), {name: p.detach() for name, p in tensors(1).items()}
    start = {name: p.detach().clone() for name, p in parameters.items()}
    options: dict[str, Any] = dict(lr=0.05, decay=0.7, form=form, amsgrad=amsgrad)
    optimizer = AdamR(parameters.items(), betas=(0.9, 0.99), base=base, foreach=foreach, **options)
    for step in range(1, 6):
        give_gradients(parameters, step)
        optimizer.step()
    for name, wanted in by_hand(start, base, 5, **options).items():
        torch.testing.assert_close(parameters[name].detach(), wanted.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", ["l2", "l1", "shrink"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lists_and_the_plain_form_give_the_same_bits(form: Any, dtype: torch.dtype) -> None:
    runs = []
    for foreach in (True, False):
        parameters = tensors(0, dtype)
        optimizer = AdamR(parameters.values(), lr=0.05, decay=0.7, form=form, amsgrad=True, foreach=foreach)
        for step in range(4):
            give_gradients(parameters, step)
            if step == 1:
                parameters["b"].grad = None  # its count of steps stays behind
            optimizer.step()
        runs.append(parameters)
    for name, parameter in runs[0].items():
        assert torch.equal(parameter, runs[1][name]), name


@pytest.mark.parametrize("amsgrad", [False, True])
def test_without_decay_it_is_adam(amsgrad: bool) -> None:
    ours, theirs = tensors(dtype=torch.float32), tensors(dtype=torch.float32)
    optimizers = (
        AdamR(ours.values(), lr=0.01, decay=0.0, amsgrad=amsgrad),
        torch.optim.Adam(theirs.values(), lr=0.01, amsgrad=amsgrad),
    )
    for step in range(20):
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            give_gradients(parameters, step)
            optimizer.step()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-6, atol=1e-7)
    assert all("base" not in state for state in optimizers[0].state.values()), "no memory for a base nobody uses"


def test_without_gradients_weights_return_geometrically() -> None:
    parameters, base = tensors(0), {name: p.detach() for name, p in tensors(1).items()}
    start = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = AdamR(parameters.items(), lr=0.1, decay=0.5, base=base)
    for _ in range(10):
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert optimizer.scale == 1.0
    for name, parameter in parameters.items():
        wanted = base[name] + (start[name] - base[name]) * (1 - 0.1 * 0.5) ** 10
        torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["l2", "l1", "shrink"])
def test_the_base_is_a_fixed_point(form: Any) -> None:
    parameters = tensors(dtype=torch.bfloat16)
    optimizer = AdamR(parameters.values(), lr=0.1, decay=0.5, form=form)
    before = copy.deepcopy(parameters)
    for _ in range(3):
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert all(torch.equal(parameter, before[name]) for name, parameter in parameters.items())


@pytest.mark.parametrize("form", ["l2", "shrink"])
def test_a_larger_decay_never_gives_a_larger_delta(form: Any) -> None:
    """Least squares from the base at 0; the solution without decay is far from it."""
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(30, 6, generator=generator), torch.randn(30, generator=generator)
    norms = []
    for decay in (0.0, 0.01, 0.03, 0.1, 0.3, 1.0):
        weight = nn.Parameter(torch.zeros(6))
        optimizer = AdamR([weight], lr=0.01, decay=decay, form=form)
        for _ in range(300):
            optimizer.zero_grad()
            (inputs @ weight - targets).square().mean().backward()
            optimizer.step()
        norms.append(float(weight.detach().norm()))
    assert norms == sorted(norms, reverse=True) and norms[-1] < 0.8 * norms[0]


def test_the_partition_into_groups_changes_no_bit() -> None:
    runs = []
    for parts in (["a", "b", "c"],), (["b"], ["c", "a"]), (["c"], ["b"], ["a"]):
        parameters = tensors(dtype=torch.float32)
        optimizer = AdamR([{"params": [parameters[name] for name in part]} for part in parts], lr=0.05, decay=0.7)
        for step in range(5):
            give_gradients(parameters, step)
            optimizer.step()
        runs.append((parameters, optimizer.scale))
    for parameters, scale in runs[1:]:
        assert scale == runs[0][1]
        assert all(torch.equal(parameter, runs[0][0][name]) for name, parameter in parameters.items())


def test_shrink_leaves_exact_zeros_of_the_delta_and_l1_does_not() -> None:
    same = {}
    for form in ("l1", "shrink"):
        parameters = tensors(dtype=torch.float32)
        before = copy.deepcopy(parameters)
        optimizer = AdamR(parameters.values(), lr=0.01, decay=2.0, form=form)  # type: ignore[arg-type]
        for step in range(10):
            give_gradients(parameters, step)
            optimizer.step()
        same[form] = sum(int((p == before[name]).sum()) for name, p in parameters.items())
    assert same["shrink"] > 0 == same["l1"]


def test_scale_of_nothing_and_of_zero_is_one() -> None:
    assert gradient_scale([], 0) == gradient_scale([0.0], 5) == 1.0
    assert gradient_scale([3.0, 6.0], 9) == 1.0
    assert gradient_scale([1e16, 1.0, -1e16], 4) == 0.5, "the sum is exact"


def test_more_than_the_whole_delta_is_never_taken() -> None:
    weight = nn.Parameter(torch.full((4,), 2.0))
    optimizer = AdamR([("w", weight)], lr=1e-3, decay=1.0, base={"w": torch.ones(4)})
    weight.grad = torch.full((4,), 1e-6)  # s is 1e-6, lr·λ/s a thousand
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((4,), 1.0 - 1e-3), rtol=0, atol=1e-4)


# -- what may happen to parameters and gradients -----------------------------------------------------------------------


def test_parameters_without_gradient_stay_and_do_not_count() -> None:
    parameters = tensors()
    base = {name: torch.zeros_like(p) for name, p in parameters.items()}
    alone = nn.Parameter(parameters["a"].detach().clone())
    frozen = parameters["b"].requires_grad_(False).clone()
    both = AdamR(parameters.items(), lr=0.05, decay=0.7, base=base)
    one = AdamR([("a", alone)], lr=0.05, decay=0.7, base=base)
    for step in range(3):
        give_gradients(parameters, step)
        alone.grad = parameters["a"].grad
        parameters["b"].grad = parameters["c"].grad = None
        both.step()
        one.step()
    assert both.scale == one.scale
    assert torch.equal(parameters["a"], alone)
    assert torch.equal(parameters["b"], frozen) and torch.equal(parameters["c"], tensors()["c"])


def test_bfloat16_weights_have_moments_in_fp32_and_are_rounded_once() -> None:
    low, high = tensors(dtype=torch.bfloat16), tensors(dtype=torch.float32)
    for name in high:
        high[name].data.copy_(low[name])
    optimizers = [AdamR(parameters.values(), lr=0.05, decay=0.7) for parameters in (low, high)]
    for parameters, optimizer in zip((low, high), optimizers, strict=True):
        give_gradients(parameters, 0)
        for p in parameters.values():
            p.grad = p.grad.to(torch.bfloat16).to(p.dtype)  # type: ignore[union-attr]
        optimizer.step()
    for name, parameter in low.items():
        assert optimizers[0].state[parameter]["exp_avg_sq"].dtype == torch.float32
        assert torch.equal(parameter.detach(), high[name].detach().to(torch.bfloat16))


def test_a_bfloat16_copy_of_a_bfloat16_base_is_exact() -> None:
    base = {name: p.detach() for name, p in tensors(1, torch.bfloat16).items()}
    runs = []
    for dtype in (None, torch.bfloat16):
        parameters = tensors(dtype=torch.float32)
        optimizer = AdamR(parameters.items(), lr=0.05, decay=0.7, base=base, base_dtype=dtype, base_device="cpu")
        for step in range(3):
            give_gradients(parameters, step)
            optimizer.step()
        runs.append(parameters)
    assert all(torch.equal(parameter, runs[1][name]) for name, parameter in runs[0].items())


def test_the_base_is_a_copy_that_training_does_not_move() -> None:
    parameters = tensors()
    given = {name: p.detach() for name, p in parameters.items()}  # aliases the live parameters
    before = {name: value.clone() for name, value in given.items()}
    for optimizer in (AdamR(parameters.items(), base=given), AdamR(parameters.values())):
        give_gradients(parameters, 0)
        for name, parameter in parameters.items():
            parameter.data.copy_(before[name])
            assert torch.equal(optimizer.state[parameter]["base"], before[name])
        optimizer.step()
        assert all(torch.equal(optimizer.state[p]["base"], before[name]) for name, p in parameters.items())
        assert not torch.equal(parameters["a"], before["a"])


def test_the_base_is_found_by_name_in_any_order() -> None:
    first, second = (nn.Parameter(torch.ones(3, 3)) for _ in range(2))
    base = {"second": torch.full((3, 3), 2.0), "unused": torch.zeros(1), "first": torch.full((3, 3), 3.0)}
    optimizer = AdamR([("module.first", first), ("second", second)], base=base)
    assert float(optimizer.state[first]["base"][0, 0]) == 3.0
    assert float(optimizer.state[second]["base"][0, 0]) == 2.0


def test_learning_rate_schedulers_and_closures_work() -> None:
    weight = nn.Parameter(torch.full((4,), 2.0, dtype=torch.float64))
    optimizer = AdamR([("w", weight)], lr=0.1, decay=1.0, base={"w": torch.zeros(4, dtype=torch.float64)})
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)

    def closure() -> float:
        assert torch.is_grad_enabled()
        weight.grad = torch.zeros_like(weight)
        return 3.5

    for _ in range(2):
        assert optimizer.step(closure) == 3.5
        scheduler.step()
    torch.testing.assert_close(weight.detach(), torch.full((4,), 2.0 * 0.9 * 0.95, dtype=torch.float64))


def test_grad_scaler_hands_over_unscaled_gradients() -> None:
    runs = []
    for scaled in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(6, 1)
        optimizer = AdamR(layer.parameters(), lr=0.05, decay=0.7)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(layer(inputs).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        runs.append((layer.weight.detach(), optimizer.scale))
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-6, atol=1e-7)
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-6)


def test_reduce_adds_up_what_processes_hold() -> None:
    whole, parts = tensors(dtype=torch.float32), tensors(dtype=torch.float32)
    one = AdamR(whole.values(), lr=0.05, decay=0.7)
    board: list[Tensor] = []

    def first_hears_of_the_second(mine: Tensor) -> Tensor:
        assert mine.dtype == torch.float64 and mine.shape == (2,)
        return mine + board[0]

    def second_tells(mine: Tensor) -> Tensor:
        board[:] = [mine]
        return mine

    second = AdamR([parts["b"], parts["c"]], lr=0.05, decay=0.7, reduce=second_tells)
    first = AdamR([parts["a"]], lr=0.05, decay=0.7, reduce=first_hears_of_the_second)
    give_gradients(whole, 0)
    give_gradients(parts, 0)
    for optimizer in (one, second, first):
        optimizer.step()
    assert first.scale == pytest.approx(one.scale, rel=1e-12)
    torch.testing.assert_close(parts["a"], whole["a"], rtol=1e-7, atol=0)


# -- groups of a model -------------------------------------------------------------------------------------------------


def test_a_new_head_is_left_out_by_name_and_said(caplog: pytest.LogCaptureFixture) -> None:
    base = TINY["llama"]()
    base.config.pad_token_id = 2
    model = LlamaForSequenceClassification(base.config)
    model.model.load_state_dict(base.model.state_dict())
    with caplog.at_level(logging.WARNING):
        groups = adamr_groups(model, base)
    assert "score.weight" in caplog.text
    assert [name for name, _ in groups[1]["params"]] == ["score.weight"] and groups[1]["decay"] == 0.0
    optimizer = AdamR(groups, lr=0.01, decay=0.5)
    for name, parameter in model.named_parameters():
        assert ("base" in optimizer.state.get(parameter, {})) == (name != "score.weight")
        parameter.grad = torch.zeros_like(parameter)
    head = model.score.weight.detach().clone()
    model.model.norm.weight.data.add_(1.0)
    optimizer.step()
    assert torch.equal(model.score.weight, head)
    torch.testing.assert_close(model.model.norm.weight.detach(), base.model.norm.weight.detach() + 0.995)


def test_a_base_without_the_models_prefix_is_understood() -> None:
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    groups = adamr_groups(BertForSequenceClassification(config), BertModel(config))
    assert {name.split(".")[0] for name, _ in groups[0]["params"]} == {"bert"}
    assert {name.split(".")[0] for name, _ in groups[1]["params"]} == {"classifier"}


def test_excluded_and_frozen_parameters_are_not_pulled() -> None:
    model = TINY["llama"]()
    model.model.embed_tokens.weight.requires_grad_(False)
    groups = adamr_groups(model, model, exclude=["model.norm", "model.layers.1"])
    names = [name for name, _ in groups[0]["params"]]
    assert names and not any(name.startswith(("model.norm", "model.layers.1", "model.embed")) for name in names)
    assert {name.rpartition(".")[0] for name, _ in groups[1]["params"]} > {"model.norm"}
    with pytest.raises(ValueError, match=r"exclude names 'model\.nrom'"):
        adamr_groups(model, model, exclude=["model.nrom"])


def test_a_base_that_does_not_fit_is_refused() -> None:
    model = TINY["llama"]()
    with pytest.raises(ValueError, match=r"none of the .* 'model\.embed_tokens\.weight'.*'x'"):
        adamr_groups(model, {"x": torch.ones(1)})
    base = dict(model.state_dict())
    rows = base["model.embed_tokens.weight"][:-1]
    with pytest.raises(ValueError, match=r"\(96, 32\) but \(95, 32\).*resize"):
        adamr_groups(model, {**base, "model.embed_tokens.weight": rows})
    with pytest.raises(ValueError, match="not finite"):
        adamr_groups(model, {**base, "model.norm.weight": torch.full((32,), torch.nan)})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "lr"),
        ({"decay": -0.1}, "decay"),
        ({"decay": float("nan")}, "decay"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": 0.0}, "eps"),
        ({"form": "l3"}, "form"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AdamR(tensors().values(), **options)


def test_what_cannot_be_trained_is_refused() -> None:
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"weight_decay is 0\.1"):
        AdamR([{"params": [weight], "weight_decay": 0.1}])
    with pytest.raises(ValueError, match="by names"):
        AdamR([weight], base={"w": torch.ones(2)})
    with pytest.raises(ValueError, match="has no 'w'"):
        AdamR([("w", weight)], base={"v": torch.ones(2)})
    with pytest.raises(ValueError, match="real floating-point"):
        AdamR([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    optimizer = AdamR([weight], decay=0.0)
    weight.grad = torch.ones(2)
    optimizer.param_groups[0]["decay"] = 0.1
    with pytest.raises(RuntimeError, match="no base"):
        optimizer.step()
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        AdamR(table.parameters()).step()


# -- saving and resuming -----------------------------------------------------------------------------------------------


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


@pytest.mark.parametrize("given", [True, False], ids=["base given", "base taken"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_is_straight(given: bool, dtype: torch.dtype) -> None:
    base = {name: p.detach() for name, p in tensors(1, dtype).items()} if given else None
    straight = tensors(dtype=dtype)
    optimizer = AdamR(straight.items(), lr=0.05, decay=0.7, base=base)
    for step in range(3):
        give_gradients(straight, step)
        optimizer.step()
    saved = through_a_file(optimizer.state_dict())
    assert all(("base" in state) != given for state in saved["state"].values()), "a given base is not stored"
    resumed = copy.deepcopy(straight)  # what a script finds when it opens the checkpoint's weights
    again = AdamR(resumed.items(), lr=0.05, decay=0.7, base=base)
    again.load_state_dict(saved)
    for parameters, one in ((straight, optimizer), (resumed, again)):
        for step in range(3, 6):
            give_gradients(parameters, step)
            one.step()
    for name, parameter in straight.items():
        assert torch.equal(parameter, resumed[name]), name
        for key, value in optimizer.state[parameter].items():
            other = again.state[resumed[name]][key]
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other)), key
            assert not isinstance(value, Tensor) or value.dtype == other.dtype


def test_another_base_is_refused_on_resuming() -> None:
    parameters = tensors()
    base, other = ({name: p.detach() for name, p in tensors(seed).items()} for seed in (1, 2))
    saved = AdamR(parameters.items(), base=base).state_dict()
    AdamR(parameters.items(), base=dict(reversed(base.items()))).load_state_dict(saved)
    for wrong in (other, None):
        optimizer = AdamR(parameters.items(), base=wrong)
        with pytest.raises(ValueError, match="digest"):
            optimizer.load_state_dict(saved)
    taken = AdamR(parameters.items()).state_dict()
    with pytest.raises(ValueError, match="digest"):
        AdamR(parameters.items(), base=other).load_state_dict(taken)
    AdamR(parameters.items(), base={n: p.detach() for n, p in parameters.items()}).load_state_dict(taken)
    with pytest.raises(ValueError, match="not the state of AdamR"):
        AdamR(parameters.items()).load_state_dict(torch.optim.Adam(parameters.values()).state_dict())


def test_a_deep_copy_goes_on_alike() -> None:
    parameters = tensors()
    optimizer = AdamR(parameters.values(), lr=0.05, decay=0.7)
    give_gradients(parameters, 0)
    optimizer.step()
    twin_parameters, twin = copy.deepcopy((parameters, optimizer))
    for one, other in ((parameters, optimizer), (twin_parameters, twin)):
        give_gradients(one, 1)
        other.step()
    assert all(torch.equal(parameter, twin_parameters[name]) for name, parameter in parameters.items())


# -- Trainer -----------------------------------------------------------------------------------------------------------


def test_trainer_by_optimizers_and_by_class_train_alike(make_trainer: MakeTrainer) -> None:
    results = []
    for way in ("optimizers", "class with groups", "class"):
        model = TINY["llama"]()
        if way == "optimizers":
            optimizer = AdamR(adamr_groups(model, model), lr=1e-2, decay=0.5)
            trainer = make_trainer(model, optimizers=(optimizer, None), lr_scheduler_type="linear")
        else:
            options: dict[str, Any] = {"lr": 1e-2, "decay": 0.5}
            if way == "class with groups":
                options["params"] = adamr_groups(model, model)
            trainer = make_trainer(model, weight_decay=0.0, lr_scheduler_type="linear")
            trainer.optimizer_cls_and_kwargs = (AdamR, options)
        trainer.train()
        results.append(copies(model))
    for other in results[1:]:
        assert all(torch.equal(other[name], weight) for name, weight in results[0].items())
    untrained = named_weights(TINY["llama"]())
    assert all(not torch.equal(weight, untrained[name]) for name, weight in results[0].items())


def test_the_delta_of_a_real_run_gets_smaller_with_decay(make_trainer: MakeTrainer) -> None:
    sizes = []
    for decay in (0.0, 0.1):
        model, base = TINY["llama"](), named_weights(TINY["llama"]())
        optimizer = AdamR(adamr_groups(model, model), lr=1e-2, decay=decay)
        make_trainer(model, optimizers=(optimizer, None), max_steps=12).train()
        sizes.append(sum(float((w - base[n]).detach().abs().sum()) for n, w in named_weights(model).items()))
    assert sizes[1] < 0.8 * sizes[0]


class Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= 3


@pytest.mark.parametrize("way", ["given", "taken", "class"])
def test_a_resumed_trainer_run_is_a_straight_one(way: str, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def run(name: str, callbacks: list[TrainerCallback], resume: bool = False) -> dict[str, Tensor]:
        model = TINY["llama"]()
        saving = dict(save_strategy="steps", save_steps=3, output_dir=str(tmp_path / name), weight_decay=0.0)
        if way == "class":
            trainer = make_trainer(model, callbacks, lr_scheduler_type="linear", **saving)
            trainer.optimizer_cls_and_kwargs = (AdamR, {"lr": 1e-2, "decay": 0.5})  # made after the weights are loaded
        else:
            groups: Any = adamr_groups(model, TINY["llama"]()) if way == "given" else model.parameters()
            optimizer = AdamR(groups, lr=1e-2, decay=0.5)
            trainer = make_trainer(model, callbacks, optimizers=(optimizer, None), lr_scheduler_type="linear", **saving)
        trainer.train(resume_from_checkpoint=latest_complete_checkpoint(tmp_path / name) if resume else None)
        return copies(model)

    straight = run("straight", [])
    run("cut", [Stop()])
    resumed = run("cut", [], resume=True)
    assert all(torch.equal(resumed[name], weight) for name, weight in straight.items())


def test_masked_weights_stay_zero_though_the_base_is_dense(
    sparse_model: SparseModel, make_trainer: MakeTrainer
) -> None:
    model, masks = sparse_model()
    optimizer = AdamR(adamr_groups(model, TINY["llama"]()), lr=1e-2, decay=1.0)
    seen: list[bool] = []
    watch = AtEachStep(lambda live: seen.append(pruned_are_positive_zero(live, masks)))
    make_trainer(model, [MaskCallback(masks), watch], optimizers=(optimizer, None)).train()
    assert len(seen) == 6 and all(seen)
