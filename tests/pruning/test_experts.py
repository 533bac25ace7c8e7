"""Statistics of fused experts, whatever way a model calls them, against the products the model really computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import TINY
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    JetMoeConfig,
    JetMoeForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
)

from sparse_ft.models import find_blocks, find_targets
from sparse_ft.pruning import SecondMoment
from sparse_ft.pruning.calibration import prepare_calibration
from sparse_ft.pruning.observation import BlockObserver
from sparse_ft.pruning.plan import matrix_names
from sparse_ft.pruning.replay import BlockReplay

_SIZES: dict[str, Any] = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=2,
)  # fmt: skip


def _gpt_oss() -> nn.Module:
    """Stacks (E, in, out) with biases and a gate of its own, gate and up interleaved."""
    config = GptOssConfig(**_SIZES, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
    model = GptOssForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("_bias"):
            nn.init.normal_(parameter)  # they begin at zero, where forgetting one changes nothing
    return model


def _llama4() -> nn.Module:
    """Every expert is given all tokens, those not meant for it as zeros."""
    config = Llama4TextConfig(
        **_SIZES, head_dim=8, intermediate_size_mlp=48, num_local_experts=4, num_experts_per_tok=1,
        attention_chunk_size=16,
    )  # fmt: skip
    return Llama4ForCausalLM(config)


def _jetmoe() -> nn.Module:
    """Tokens sorted by expert, with the number of each."""
    sizes = {k: v for k, v in _SIZES.items() if k not in ("num_attention_heads", "num_key_value_heads")}
    config = JetMoeConfig(**sizes, num_key_value_heads=2, kv_channels=8, num_local_experts=4, num_experts_per_tok=2)
    return JetMoeForCausalLM(config)


def _deepseek() -> nn.Module:
    config = DeepseekV3Config(
        **_SIZES, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
        first_k_dense_replace=0, n_group=1, topk_group=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    return DeepseekV3ForCausalLM(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mixtral": TINY["mixtral"], "gpt_oss": _gpt_oss, "llama4": _llama4, "jetmoe": _jetmoe, "deepseek": _deepseek,
}  # fmt: skip


class Products(TorchDispatchMode):
    """Records, by matrix name, the left factor of every matrix product with a slice of some stacks `(E, ., .)`."""

    def __init__(self, stacks: dict[str, Tensor]) -> None:
        super().__init__()
        self._stacks = stacks
        self.inputs: dict[str, list[Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            left, right = args[-2:]
            for name, stack in self._stacks.items():
                first, rest = divmod(right.data_ptr() - stack.data_ptr(), stack.stride(0) * stack.element_size())
                if 0 <= first < len(stack) and rest == 0:
                    for offset, rows in enumerate(left if left.ndim == 3 else [left]):
                        self.inputs.setdefault(f"{name}[{first + offset}]", []).append(rows.clone())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MODELS)
def test_each_expert_is_calibrated_on_what_it_multiplies(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.config._experts_implementation = "eager"
    data = prepare_calibration(model, [torch.randint(3, 96, (6, n)) for n in (12, 16)], "wanda")
    block = find_blocks(model)[0][0]
    targets = [t for t in find_targets(model) if t.block == block and t.kind == "experts"]
    with torch.no_grad(), Products({t.name: model.get_parameter(t.name).detach() for t in targets}) as products:
        for batch in data:
            model(**batch)

    observed = [(t, model.get_submodule(t.module)) for t in targets]
    with BlockReplay(model, find_blocks(model), data) as replay, BlockObserver(observed, SecondMoment) as observer:
        replay.run(0, before_batch=observer.start_batch)
    found = {matrix: group for group in observer.groups for matrix in group.matrices}
    assert set(found) == {matrix for t in targets for matrix in matrix_names(t)}
    for matrix, parts in products.inputs.items():
        rows = torch.cat(parts)
        rows = rows[rows.any(-1)].double()
        assert found[matrix].tokens == len(rows), matrix
        if len(rows):
            moment = found[matrix].statistic.second_moment().double()  # type: ignore[union-attr]
            torch.testing.assert_close(moment, rows.square().mean(0), rtol=1e-4, atol=1e-8)
    assert any(group.tokens for group in observer.groups)
    assert set(products.inputs) >= {matrix for matrix, group in found.items() if group.tokens}
