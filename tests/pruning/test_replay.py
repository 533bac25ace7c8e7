"""`BlockReplay` runs blocks exactly as the model itself does, once, and leaves the model as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import TINY, tiny_batch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
)

from sparse_ft.models import find_blocks
from sparse_ft.pruning.calibration import prepare_calibration
from sparse_ft.pruning.replay import BlockReplay, StopForward

_COMMON: dict[str, Any] = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)


def _gemma3() -> nn.Module:
    """Sliding and full layers in turn, each with its own mask and its own position embeddings."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            **_COMMON, num_hidden_layers=3, num_key_value_heads=2, head_dim=8, sliding_window=4, layer_types=kinds
        )
    )


def _gemma3n() -> nn.Module:
    """Late layers read keys and values that earlier ones left in a dictionary."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    config = Gemma3nTextConfig(
        **_COMMON, num_hidden_layers=4, num_key_value_heads=2, head_dim=8, sliding_window=4, layer_types=kinds,
        num_kv_shared_layers=2, vocab_size_per_layer_input=96, hidden_size_per_layer_input=8, laurel_rank=8,
        altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 4,
    )  # fmt: skip
    return Gemma3nForCausalLM(config)


def _mistral() -> nn.Module:
    config = MistralConfig(**_COMMON, num_hidden_layers=2, num_key_value_heads=2, sliding_window=4)
    return MistralForCausalLM(config)


def _build(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def seeded() -> nn.Module:
        torch.manual_seed(0)
        return make().eval()

    return seeded


MODELS = {**TINY, "gemma3": _build(_gemma3), "gemma3n": _build(_gemma3n), "mistral": _build(_mistral)}


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.clone()]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in tensors(item)] if isinstance(value, (list, tuple)) else []


class Recorder:
    """Clones of what every block took in and gave back, by block name and call."""

    def __init__(self, model: nn.Module) -> None:
        self.inputs: dict[str, list[list[Tensor]]] = {}
        self.outputs: dict[str, list[list[Tensor]]] = {}
        self.hooks: list[Any] = []
        for name, block in find_blocks(model):
            self.inputs[name], self.outputs[name] = [], []
            self.hooks.append(block.register_forward_hook(self._record(name), with_kwargs=True))

    def _record(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            self.inputs[name].append(tensors(args) + tensors(kwargs))
            self.outputs[name].append(tensors(output))

        return hook

    def stop(self) -> None:
        for hook in self.hooks:
            hook.remove()


def equal(left: list[list[Tensor]], right: list[list[Tensor]]) -> bool:
    return len(left) == len(right) and all(
        len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("name", MODELS)
def test_blocks_get_and_give_what_they_do_in_a_plain_forward(name: str) -> None:
    model = MODELS[name]()
    batches = prepare_calibration(model, [tiny_batch(model, batch=3, length=n) for n in (9, 12)], "wanda")
    plain = Recorder(model)
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)
    plain.stop()

    blocks = find_blocks(model)
    replayed = Recorder(model)
    order = []
    with BlockReplay(model, blocks, batches) as replay:
        while (index := replay.next_block()) is not None:
            order.append(blocks[index][0])
            replay.run(index, record=True)
    replayed.stop()

    assert order == [block for block, _ in blocks], "every block, in the order of the model"
    for block in order:
        assert equal(plain.inputs[block], replayed.inputs[block]), f"{block} was called with other arguments"
        assert equal(plain.outputs[block], replayed.outputs[block])


@pytest.mark.parametrize("name", MODELS)
def test_only_the_running_block_costs_time(name: str) -> None:
    model = MODELS[name]()
    batches = prepare_calibration(model, [tiny_batch(model, batch=3, length=n) for n in (9, 12)], "wanda")
    calls: Counter[str] = Counter()
    blocks = find_blocks(model)
    for block_name, block in blocks:
        block.register_forward_hook(lambda m, a, o, n=block_name: calls.update([n]))
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda m, a, o: calls.update(["head"]))
    with BlockReplay(model, blocks, batches) as replay:
        while (index := replay.next_block()) is not None:
            replay.run(index)
            replay.run(index, record=True)
    assert calls == {block_name: 2 * len(batches) for block_name, _ in blocks}


def test_the_model_is_as_before_even_after_an_error() -> None:
    model = TINY["t5"]().train()
    model.encoder.block[0].eval()
    before = {name: (module, module.training) for name, module in model.named_modules()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    batches = prepare_calibration(model, [tiny_batch(model)], "wanda")
    with pytest.raises(ZeroDivisionError), BlockReplay(model, find_blocks(model), batches) as replay:
        index = replay.next_block()
        assert index == 0 and not model.training
        replay.run(index, record=True, before_batch=lambda number: 1 // 0)
    after = {name: (module, module.training) for name, module in model.named_modules()}
    assert list(before) == list(after)
    assert all(after[name][0] is module and after[name][1] == mode for name, (module, mode) in before.items())
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_block_that_is_called_again_and_again_is_observed_each_time() -> None:
    torch.manual_seed(0)
    config = AlbertConfig(**{**_COMMON, "embedding_size": 16}, num_hidden_layers=3)
    model = AlbertForMaskedLM(config).eval()
    batches = prepare_calibration(model, [tiny_batch(model)], "wanda")
    blocks = find_blocks(model)
    calls: Counter[str] = Counter()
    blocks[0][1].register_forward_hook(lambda m, a, o: calls.update(["block"]))
    with BlockReplay(model, blocks, batches) as replay:
        assert replay.next_block() == 0
        replay.run(0)
    assert calls["block"] == 3


class Block(nn.Module):
    """Adds to its input, in place if asked to."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.in_place = in_place
        self.kind = "toy"

    def forward(self, hidden: Tensor) -> Tensor:
        change = self.linear(hidden)
        return hidden.add_(change) if self.in_place else hidden + change


class Toy(nn.Module):
    """A model of blocks, called as `forward` says."""

    def __init__(self, forward: Callable[[Toy, Tensor], Tensor], in_place: bool = False, blocks: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(in_place) for _ in range(blocks))
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def chain(model: Toy, x: Tensor) -> Tensor:
    hidden = x * 2
    for block in model.blocks:
        assert block.kind == "toy"  # models read attributes of their blocks
        hidden = block(hidden)
        hidden *= 0.5
    return hidden


@pytest.mark.parametrize("in_place", [False, True])
def test_writing_in_place_does_not_reach_what_is_recorded(in_place: bool) -> None:
    model = Toy(chain, in_place)
    batches = [{"x": torch.randn(3, 4)} for _ in range(2)]
    plain = Recorder(model)
    with torch.no_grad():
        for batch in batches:
            model(batch["x"].clone())
    plain.stop()
    expected = {name: [[t.clone() for t in call] for call in calls] for name, calls in plain.outputs.items()}
    blocks = find_blocks(model)
    replayed = Recorder(model)
    with BlockReplay(model, blocks, batches) as replay:
        while (index := replay.next_block()) is not None:
            for _ in range(2):
                replay.run(index)
            replay.run(index, record=True)
    for name, _ in blocks:
        for start in (0, 2, 4):
            assert equal(replayed.outputs[name][start : start + 2], expected[name])


def test_recorded_tensors_do_not_pile_up() -> None:
    model = Toy(chain, blocks=6)
    batches = [{"x": torch.randn(3, 4)} for _ in range(2)]
    alive = []
    with BlockReplay(model, find_blocks(model), batches) as replay:
        while (index := replay.next_block()) is not None:
            replay.run(index)
            alive.append(
                sum(t.numel() for calls in replay._recorded[0].values() for c in calls for t in tensors(c.output))
            )
            replay.run(index, record=True)
    assert max(alive) <= 2 * 12, "more than the last two outputs are kept"


def late_reader(model: Toy, x: Tensor) -> Tensor:
    first = model.blocks[0](x)
    hidden = model.blocks[1](first)
    hidden = model.blocks[2](hidden)
    return model.blocks[3](hidden + first)


def test_a_tensor_read_too_late_is_nan_and_pruning_says_so() -> None:
    from sparse_ft.pruning import prune

    class Late(Toy):
        def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
            return self._forward(self, input_ids[..., None].float().expand(-1, -1, 4))

    with pytest.raises(ValueError, match="NaN"):
        prune(
            Late(late_reader), sparsity=0.5, method="wanda", calibration=[torch.arange(64).view(2, 32)], progress=False
        )


def test_blocks_are_found_in_the_order_they_run_and_absent_ones_are_left() -> None:
    model = Toy(lambda self, x: self.blocks[0](self.blocks[3](self.blocks[1](x))))
    order = []
    with BlockReplay(model, find_blocks(model), [{"x": torch.randn(2, 4)}]) as replay:
        while (index := replay.next_block()) is not None:
            order.append(index)
            replay.run(index, record=True)
    assert order == [1, 3, 0]


def test_a_block_missing_from_a_later_batch_is_an_error() -> None:
    model = Toy(lambda self, x: self.blocks[0](x) if x.sum() > 0 else x)
    batches = [{"x": torch.ones(2, 4)}, {"x": -torch.ones(2, 4)}]
    with (
        BlockReplay(model, find_blocks(model), batches) as replay,
        pytest.raises(RuntimeError, match=r"blocks\.0.*batch 1"),
    ):
        replay.run(0)


def test_a_hook_may_stop_the_forward() -> None:
    model = Toy(chain)
    seen = []

    def stop(module: nn.Module, args: Any) -> None:
        seen.append(module)
        raise StopForward

    model.blocks[0].linear.register_forward_pre_hook(stop)
    with BlockReplay(model, find_blocks(model), [{"x": torch.ones(2, 4)}] * 3) as replay:
        replay.run(0)
    assert len(seen) == 3
