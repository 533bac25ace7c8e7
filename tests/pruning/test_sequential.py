"""Calibrated pruning against a slow reference: run the whole, already pruned model again for every block."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from tiny_models import TINY, tiny_batch
from torch import Tensor, nn

from sparse_ft.masks import MaskSet
from sparse_ft.models import Target, find_blocks, find_targets, matrix_view
from sparse_ft.pruning import SecondMoment, prune, sparsegpt
from sparse_ft.pruning.calibration import TOKENS_PER_FORWARD, prepare_calibration
from sparse_ft.pruning.observation import BlockObserver
from sparse_ft.pruning.replay import BlockReplay


def batches(model: Any, count: int = 3, batch: int = 8) -> list[dict[str, Tensor]]:
    return [tiny_batch(model, batch=batch, seed=seed) for seed in range(count)]


def collected_inputs(model: nn.Module, targets: list[Target], data: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The inputs (T, d) of each matrix of some targets, from plain forwards of the whole model."""
    found: dict[str, list[Tensor]] = {}

    def linear(name: str) -> Any:
        return lambda module, args, kwargs: found.setdefault(name, []).append(
            (args[0] if args else next(iter(kwargs.values()))).flatten(0, -2)
        )

    def experts(prefix: str) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            hidden, chosen = args[0], args[1]
            for expert in range(module.num_experts):
                rows = torch.tensor([bool((row == expert).any()) for row in chosen])
                gate, up = (hidden[rows] @ module.gate_up_proj[expert].T).chunk(2, -1)
                found.setdefault(f"{prefix}gate_up_proj[{expert}]", []).append(hidden[rows])
                found.setdefault(f"{prefix}down_proj[{expert}]", []).append(nn.functional.silu(gate) * up)

        return hook

    hooks = []
    for module_name in dict.fromkeys(target.module for target in targets):
        kind = next(target.kind for target in targets if target.module == module_name)
        hook = experts(f"{module_name}.") if kind == "experts" else linear(f"{module_name}.weight")
        hooks.append(model.get_submodule(module_name).register_forward_pre_hook(hook, with_kwargs=True))
    with torch.no_grad():
        for batch in data:
            model(**batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts).double() for name, parts in found.items()}


def reference(model: nn.Module, data: list[dict[str, Any]], method: str, sparsity: float) -> dict[str, Tensor]:
    """Prune block by block; formulas written out here."""
    masks: dict[str, Tensor] = {}
    for block, _ in find_blocks(model):
        targets = [target for target in find_targets(model) if target.block == block]
        inputs = collected_inputs(model, targets, data)
        for target in targets:
            parameter = model.get_parameter(target.name)
            view = matrix_view(parameter.data, target.input_dim)
            names = [target.name]
            matrices = [view]
            if target.kind == "experts":
                names, matrices = [f"{target.name}[{e}]" for e in range(len(view))], list(view)
            parts = []
            for name, weight in zip(names, matrices, strict=True):
                x = inputs[name]
                if method == "wanda":
                    scores = weight.double().abs() * x.square().sum(0).sqrt()
                    order = scores.argsort(dim=1, stable=True)[:, : int(sparsity * weight.shape[1])]
                    keep = torch.ones_like(scores, dtype=torch.bool).scatter_(1, order, False)
                    weight.masked_fill_(~keep, 0)
                else:
                    result = sparsegpt(weight, (2 / len(x) * x.T @ x).float(), sparsity=sparsity)
                    keep = result.mask
                    weight.copy_(result.weight)
                parts.append(keep)
            whole = torch.stack(parts) if target.kind == "experts" else parts[0]
            masks[target.name] = matrix_view(whole, target.input_dim)
    return masks


def disagreement(left: Any, right: Any) -> float:
    wrong = sum(int((left[name] != right[name]).sum()) for name in right)
    return wrong / sum(right[name].numel() for name in right)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("name", TINY)
def test_equals_rerunning_the_pruned_model_for_each_block(name: str, method: str) -> None:
    model, slow = TINY[name](), TINY[name]()
    data = batches(model)
    expected = reference(slow, prepare_calibration(slow, data, method), method, 0.6)
    masks = prune(model, sparsity=0.6, method=method, calibration=data, progress=False)
    # fp32 sums in another order may swap two scores that are all but equal
    assert disagreement(masks, expected) < (1e-3 if method == "wanda" else 5e-3)
    for target in find_targets(model):
        ours, theirs = model.get_parameter(target.name).detach(), slow.get_parameter(target.name).detach()
        assert float((ours - theirs).norm() / theirs.norm()) < 0.05


def test_the_reference_would_notice_dense_inputs() -> None:
    """Statistics of the dense model give clearly other masks, so the comparison above means something."""
    model, data = TINY["llama"](), batches(None)
    masks = prune(model, sparsity=0.6, method="wanda", calibration=data, progress=False)
    dense = TINY["llama"]()
    targets = [t for t in find_targets(dense) if t.block == "model.layers.1"]
    inputs = collected_inputs(dense, targets, [{"input_ids": batch["input_ids"]} for batch in data])
    different = []
    for target in targets:
        weight = dense.get_parameter(target.name).detach()
        scores = weight.abs() * inputs[target.name].square().sum(0).sqrt()
        dropped = scores.argsort(dim=1)[:, : int(0.6 * weight.shape[1])]
        keep = torch.ones_like(masks[target.name]).scatter_(1, dropped, False)
        different.append(float((keep != masks[target.name]).float().mean()))
    assert max(different) > 0.01


def pad(batch: Tensor, lengths: list[int], side: str, fill: int) -> dict[str, Tensor]:
    """Rows of `batch` cut to lengths and padded to a common one."""
    width = max(lengths) + 3
    ids = torch.full((len(batch), width), fill)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        where = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, where], mask[row, where] = batch[row, :length], 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("name", TINY)
def test_padding_does_not_matter(name: str, method: str) -> None:
    lengths = [5, 16, 9, 5, 12, 16, 16, 7]
    ids = tiny_batch(None, batch=8)["input_ids"]
    plain = [{"input_ids": ids[row : row + 1, :length]} for row, length in enumerate(lengths)]
    variants = [plain, [pad(ids, lengths, "right", 2)], [pad(ids, lengths, "left", 2)], [pad(ids, lengths, "left", 7)]]
    results = []
    for data in variants:
        model = TINY[name]()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few tokens for some experts
            masks = prune(model, sparsity=0.5, method=method, calibration=data, progress=False)
        results.append((masks, masks.weights_digest(model)))
    assert all(masks == results[0][0] and digest == results[0][1] for masks, digest in results)


@pytest.mark.parametrize("name", ["llama", "mixtral", "t5"])
def test_batching_and_order_do_not_matter(name: str) -> None:
    ids = tiny_batch(None, batch=24)["input_ids"]
    shuffled = ids[torch.randperm(24, generator=torch.Generator().manual_seed(1))]
    variants: list[Any] = [[ids], ids.split(1), shuffled.split(5), [{"input_ids": row} for row in shuffled]]
    variants.append(iter(ids.split(8)))
    results = []
    for data in variants:
        model = TINY[name]()
        masks = prune(model, sparsity=0.5, method="sparsegpt", calibration=data, progress=False)
        results.append((masks, masks.weights_digest(model)))
    assert all(result == results[0] for result in results)


def test_calibration_is_regrouped_into_forwards_of_a_few_thousand_tokens() -> None:
    model = TINY["llama"]()
    data = [{"input_ids": torch.full((1, 64), 5), "labels": torch.full((1, 64), 5)} for _ in range(100)]
    prepared = prepare_calibration(model, data, "wanda")
    assert [tuple(batch["input_ids"].shape) for batch in prepared] == [(TOKENS_PER_FORWARD // 64, 64), (36, 64)]
    assert all(set(batch) == {"input_ids"} for batch in prepared)


def test_a_decoder_gets_its_inputs_from_labels_and_padding_of_either_side_goes() -> None:
    model = TINY["t5"]()
    ids = torch.tensor([[5, 6, 7, 2], [8, 9, 10, 11]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    labels = torch.tensor([[20, 21, -100], [22, -100, -100]])
    prepared = prepare_calibration(model, [{"input_ids": ids, "attention_mask": mask, "labels": labels}], "wanda")
    found = {tuple(b["input_ids"][0].tolist()): b["decoder_input_ids"].tolist() for b in prepared}
    assert found == {(5, 6, 7): [[0, 20]], (8, 9, 10, 11): [[0]]}


def test_padding_that_cannot_be_taken_out_is_refused() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    batch = {
        "input_ids": torch.ones(2, 3, dtype=torch.long),
        "attention_mask": mask,
        "position_ids": torch.arange(3)[None],
    }
    with pytest.raises(ValueError, match="position_ids"):
        prune(TINY["llama"](), sparsity=0.5, method="wanda", calibration=[batch], progress=False)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_training_mode_is_left_as_it_was_and_dropout_is_off(name: str) -> None:
    plain = TINY[name]()
    model = TINY[name]().train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    data = batches(model)
    expected = prune(plain, sparsity=0.5, method="wanda", calibration=data, progress=False)
    assert prune(model, sparsity=0.5, method="wanda", calibration=data, progress=False) == expected
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


ADDED: Counter[int] = Counter()


class Counting(SecondMoment):
    """Counts how often inputs of each size are added."""

    def add(self, inputs: Tensor) -> None:
        ADDED[inputs.shape[1]] += 1
        super().add(inputs)


DISTINCT_INPUTS = {
    "llama": {32: 3, 48: 1},  # q k v · o · gate up · down
    "gpt2": {32: 3, 48: 1},  # c_attn · c_proj · c_fc · c_proj
    "neox": {32: 3, 48: 1},
    "opt": {32: 3, 48: 1},
    "bert": {32: 3, 48: 1},
    "mixtral": {32: 2 + 4, 48: 4},  # q k v · o · per expert
}


@pytest.mark.parametrize("name", DISTINCT_INPUTS)
def test_layers_that_share_an_input_share_one_statistic(name: str) -> None:
    model = TINY[name]()
    data = prepare_calibration(model, [tiny_batch(model, batch=8, length=n) for n in (10, 12, 14)], "wanda")
    blocks, targets = find_blocks(model), find_targets(model)
    ADDED.clear()
    observed = [(t, model.get_submodule(t.module)) for t in targets if t.block == blocks[0][0]]
    with BlockReplay(model, blocks, data) as replay, BlockObserver(observed, Counting) as observer:
        replay.run(0, before_batch=observer.start_batch)
    assert dict(ADDED) == {size: count * len(data) for size, count in DISTINCT_INPUTS[name].items()}
    assert sum(len(group.matrices) for group in observer.groups) == sum(
        t.shape[0] if t.kind == "experts" else 1 for t, _ in observed
    )


def test_the_last_product_of_a_block_is_not_computed_for_statistics() -> None:
    model = TINY["llama"]()
    data = [tiny_batch(model, batch=4, length=length) for length in (8, 9, 10, 11)]
    calls: Counter[str] = Counter()
    for name in ("model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"):
        model.get_submodule(name).register_forward_hook(lambda m, a, o, n=name: calls.update([n[-9:]]))
    prune(model, sparsity=0.5, method="wanda", calibration=data, progress=False)
    assert calls == {"p.up_proj": 2 * 4, "down_proj": 1 + 4}  # dense: the first batch only; pruned: all


def test_excluding_one_of_several_sharing_layers() -> None:
    model, whole = TINY["llama"](), TINY["llama"]()
    data = batches(model)
    masks = prune(model, sparsity=0.5, method="wanda", calibration=data, exclude=["q_proj"], progress=False)
    expected = prune(whole, sparsity=0.5, method="wanda", calibration=data, progress=False)
    name = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(masks[name], expected[name])


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_experts_without_tokens_fall_back_to_magnitude_and_are_named(method: str) -> None:
    model = TINY["mixtral"]()
    chosen: set[int] = set()
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.zero_()  # a tie: every token goes to the same two experts
        layer.mlp.experts.register_forward_pre_hook(lambda m, args: chosen.update(args[1].flatten().tolist()))
    dense = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.warns(UserWarning, match=r"fewer than 32 calibration tokens") as caught:
        masks = prune(model, sparsity=0.5, method=method, calibration=batches(model), progress=False)
    starved = sorted({0, 1, 2, 3} - chosen)
    assert len(starved) == 2 and "8 matrices saw" in str(caught[0].message)
    for layer_number in (0, 1):
        for stack in ("gate_up_proj", "down_proj"):
            name = f"model.layers.{layer_number}.mlp.experts.{stack}"
            for expert in range(4):
                weight, keep = dense[name][expert].abs(), masks[name][expert]
                by_magnitude = all(
                    float(row[~kept].max()) <= float(row[kept].min())
                    for row, kept in (zip(weight, keep, strict=True) if method == "wanda" else [(weight, keep)])
                )
                assert by_magnitude == (expert in starved)
                assert (f"{name}[{expert}]" in str(caught[0].message)) == (expert in starved)


@pytest.mark.parametrize(("tokens", "starved"), [(31, True), (32, False)])
def test_an_expert_needs_thirty_two_tokens_where_others_saw_more(tokens: int, starved: bool) -> None:
    """Expert 3 gets `tokens` tokens: with fewer than the minimum its statistic is noise and is not used."""
    model = TINY["mixtral"]()

    def route(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        experts = torch.tensor([0, 1]).repeat(len(args[0]), 1)
        experts[:tokens, 1] = 3
        return args[0], experts, args[2]

    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(route)
    with pytest.warns(UserWarning, match="fewer than 32") as caught:
        prune(model, sparsity=0.5, method="wanda", calibration=batches(model, count=1), progress=False)
    assert ("gate_up_proj[3]" in str(caught[0].message)) == starved
    assert "gate_up_proj[2]" in str(caught[0].message) and "gate_up_proj[1]" not in str(caught[0].message)


def test_a_stack_of_blocks_that_never_runs_is_pruned_by_magnitude() -> None:
    class TwoTowers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(96, 16)
            self.used = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2))
            self.unused = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2))

        def forward(self, input_ids: Tensor) -> Tensor:
            hidden = self.embed(input_ids)
            for block in self.used:
                hidden = block(hidden)
            return hidden

    model = TwoTowers()
    dense = model.unused[1][0].weight.detach().clone()
    with pytest.warns(UserWarning, match=r"2 matrices.*unused\.0\.0\.weight"):
        masks = prune(
            model, sparsity=0.5, method="sparsegpt", calibration=[tiny_batch(None)["input_ids"]], progress=False
        )
    mask = masks["unused.1.0.weight"]
    assert float(dense[~mask].abs().max()) <= float(dense[mask].abs().min())
    masks.verify(model)


def test_statistics_of_other_methods_see_tokens_not_calls() -> None:
    """A thousand rows in one call weigh as much as in a thousand calls."""
    x = torch.randn(1000, 6)
    whole, single = SecondMoment(6), SecondMoment(6)
    whole.add(x)
    for row in x:
        single.add(row[None])
    assert whole.tokens == single.tokens == 1000
    torch.testing.assert_close(whole.second_moment(), single.second_moment())


def test_progress_is_silent_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    model = TINY["llama"]()
    prune(model, sparsity=0.5, method="wanda", calibration=batches(model), progress=False)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == ""


def test_pruned_by_peft_names_are_canonical() -> None:
    peft = pytest.importorskip("peft")
    plain, model = TINY["llama"](), TINY["llama"]()
    data = batches(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    masks = prune(wrapped, sparsity=0.5, method="wanda", calibration=data, progress=False)
    expected = prune(plain, sparsity=0.5, method="wanda", calibration=data, progress=False)
    assert masks == expected and isinstance(masks, MaskSet)


def test_models_of_text_and_images_can_be_calibrated() -> None:
    """CLIP has no single input embedding, so there is no vocabulary to check ids against."""
    from transformers import CLIPConfig, CLIPModel

    part = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config=dict(part, vocab_size=96, bos_token_id=0, eos_token_id=1, pad_token_id=2),
            vision_config=dict(part, image_size=16, patch_size=4),
            projection_dim=8,
        )
    ).eval()
    ids, pixels = torch.randint(3, 96, (4, 12)), torch.randn(4, 3, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # both towers are calibrated: nothing falls back to magnitude
        masks = prune(
            model, pattern="2:4", method="wanda", calibration=[{"input_ids": ids, "pixel_values": pixels}],
            progress=False,
        )  # fmt: skip
    assert {name.split(".")[0] for name in masks} == {"text_model", "vision_model"}
    masks.verify(model)


def test_a_config_without_a_limit_of_positions_takes_any_length() -> None:
    model = TINY["llama"]()
    model.config.max_position_embeddings = -1  # what XLNet's says
    assert prepare_calibration(model, [torch.ones(1, 65, dtype=torch.long)], "wanda")[0]["input_ids"].shape == (1, 65)


class InPlaceAndAgain(nn.Module):
    """One block that writes into what it gave to a linear before giving it to the next, and uses one linear twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.ModuleDict({name: nn.Linear(4, 4) for name in ("first", "second")})])
        self.layers[0].forward = self._block

    def _block(self, x: Tensor) -> Tensor:
        first, second = self.layers[0].values()  # type: ignore[operator]
        y = first(x)
        x.mul_(3)
        return second(second(x)) + y

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x.clone())


def test_inputs_changed_in_place_and_linears_used_twice_are_counted_as_they_were() -> None:
    model = InPlaceAndAgain()
    second = model.get_submodule("layers.0.second")
    data = [{"x": torch.randn(20, 4)} for _ in range(3)]
    observed = [(target, model.get_submodule(target.module)) for target in find_targets(model)]
    with BlockReplay(model, find_blocks(model), data) as replay, BlockObserver(observed, SecondMoment) as observer:
        replay.run(0, before_batch=observer.start_batch)
    found = {group.matrices[0]: group.statistic for group in observer.groups}
    x = torch.cat([batch["x"] for batch in data])
    twice = torch.cat([3 * x, second(3 * x).detach()])
    assert set(found) == {"layers.0.first.weight", "layers.0.second.weight"}
    for name, rows in (("first", x), ("second", twice)):
        statistic = found[f"layers.0.{name}.weight"]
        assert statistic is not None and statistic.tokens == len(rows)
        torch.testing.assert_close(statistic.second_moment(), rows.square().mean(0))
