"""What `reconstruct` changes and what it leaves alone; the errors it reports are those of the model it leaves."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from reconstruction.pairs import (
    FAMILIES,
    QUICK,
    bits,
    block_calls,
    changed,
    hidden,
    input_of,
    mean_square,
    only,
    pair,
    texts,
)
from torch import nn
from transformers import AlbertConfig, AlbertForMaskedLM

from sparse_ft.masks import MaskSet
from sparse_ft.models import find_blocks
from sparse_ft.reconstruction import blocks as blocks_module
from sparse_ft.reconstruction import reconstruct
from sparse_ft.reconstruction.blocks import BlockReconstruction
from sparse_ft.reconstruction.trained import ADAPTERS

pytestmark = pytest.mark.filterwarnings("ignore:.*blocks run attention and MLP:UserWarning")
GRANULARITIES = ["attn_mlp", "block", pytest.param("linear", marks=pytest.mark.filterwarnings("ignore:granularity"))]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", FAMILIES)
def test_zeros_stay_and_errors_fall(name: str, granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros are looked at after every window, their sign too; nothing but masked weights changes, all of them do."""
    model, masks, dense = pair(name)
    before, dense_before = bits(model), bits(dense)
    fit = BlockReconstruction._fit

    def fit_and_look(self: BlockReconstruction, index: int, piece: Any) -> Any:
        row = fit(self, index, piece)
        for key, weight in masks.weights_in(dict(model_names)):
            pruned = weight[~masks[key]]
            assert not pruned.any() and not pruned.signbit().any(), key
        return row

    model_names = dict(model.named_parameters())
    monkeypatch.setattr(BlockReconstruction, "_fit", fit_and_look)
    result = reconstruct(model, masks, dense, calibration=texts(), granularity=granularity, **QUICK)
    assert changed(model, before) == set(masks) and not changed(dense, dense_before)
    assert all(row.loss_after < row.loss_before and row.improved and row.iterations == 6 for row in result.windows)
    assert {row.block for row in result.windows} == {block for block, _ in find_blocks(model)}
    masks.verify(model)


@pytest.mark.filterwarnings("ignore:granularity")
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in FAMILIES]
    + [(name, {"train": "mask_lora"}) for name in ("llama", "mixtral", "t5")]
    + [(name, {"granularity": how}) for name in ("llama", "gpt2", "t5") for how in ("block", "linear")]
    + [("llama", {"granularity": "linear", "train": "mask_lora"})],
)
@pytest.mark.parametrize("place", [0, -1])
def test_one_block_leaves_the_others_alone(name: str, options: dict[str, Any], place: int) -> None:
    model, masks, dense = pair(name)
    block = find_blocks(model)[place][0]
    before = bits(model)
    chosen = only(masks, lambda key: key.startswith(f"{block}."))
    result = reconstruct(model, chosen, dense, calibration=texts(), **options, **QUICK)
    assert changed(model, before) == set(chosen) and {row.block for row in result.windows} == {block}


@pytest.mark.parametrize("stream", ["sparse", "dense", "sparse_to_dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "train"), [*((name, "full") for name in FAMILIES), ("llama", "mask_lora"), ("t5", "scale_lora")]
)
def test_a_model_that_is_not_pruned_has_no_error(name: str, train: str, dtype: torch.dtype, stream: str) -> None:
    _, masks, dense = pair(name, dtype=dtype)
    _, _, model = pair(name, dtype=dtype)
    full = MaskSet({key: torch.ones_like(masks[key]) for key in masks})
    before = bits(model)
    result = reconstruct(model, full, dense, calibration=texts(), stream=stream, train=train, **QUICK)
    assert all(row.loss_before == row.loss_after == 0 and row.iterations == 0 for row in result.windows)
    assert result.windows and not changed(model, before)


@pytest.mark.parametrize("name", FAMILIES)
def test_without_steps_all_granularities_agree(name: str) -> None:
    """The MLP's window ends where the block ends: without training it has the block's error, and nothing changes."""
    model, masks, dense = pair(name)
    before = bits(model)
    settings = dict(calibration=texts(), iterations=0, progress=False)
    parts = reconstruct(model, masks, dense, **settings)
    whole = reconstruct(model, masks, dense, granularity="block", **settings)
    last = {row.block: row for row in parts.windows}
    for row in whole.windows:
        assert (
            last[row.block].loss_before == row.loss_before == row.loss_after > 0
            and row.iterations == 0
            and not row.improved
        )
    assert not changed(model, before)


@pytest.mark.parametrize("train", ["full", *ADAPTERS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mixtral", "opt"])
def test_reported_errors_are_those_of_the_result(name: str, dtype: torch.dtype, train: str) -> None:
    """Against the final model's own forward: merged, and in its dtype. Both windows of every block."""
    model, masks, dense = pair(name, dtype=dtype)
    result = reconstruct(model, masks, dense, calibration=texts(rows=4), train=train, batch_size=4, **QUICK)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not any("lora" in key for key, _ in model.named_modules())
    masks.verify(model)
    rows = {(row.block, row.window): row for row in result.windows}
    stops = {"llama": "post_attention_layernorm", "gpt2": "ln_2", "bert": "intermediate", "opt": "final_layer_norm"}
    stop = stops.get(name, "post_attention_layernorm")
    teachers = dict(find_blocks(dense))
    calls = block_calls(model, texts(rows=4)[0])
    for block, module in find_blocks(model):
        args, kwargs, out = calls[block]
        with torch.no_grad():
            target = hidden(teachers[block](*args, **kwargs))
        assert rows[block, "mlp"].loss_after == pytest.approx(mean_square(out, target), rel=1e-4)
        ends = [input_of(one.get_submodule(stop), partial(one, *args, **kwargs)) for one in (module, teachers[block])]
        assert rows[block, "attn"].loss_after == pytest.approx(mean_square(*ends), rel=1e-4)


def test_errors_against_the_dense_stream_are_those_of_the_whole_model() -> None:
    model, masks, dense = pair("llama")
    result = reconstruct(model, masks, dense, calibration=texts(), stream="sparse_to_dense", batch_size=6, **QUICK)
    ours, theirs = block_calls(model, texts()[0]), block_calls(dense, texts()[0])
    for row in result.windows:
        if row.window == "mlp":
            assert row.loss_after == pytest.approx(mean_square(ours[row.block][2], theirs[row.block][2]), rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "t5", "mixtral", "neox"])
def test_with_the_dense_stream_the_order_of_windows_does_not_matter(name: str) -> None:
    """All at once, or window by window from the last to the first."""
    model, masks, dense = pair(name)
    settings = dict(calibration=texts(), stream="dense", **QUICK)
    result = reconstruct(model, masks, dense, **settings)
    other, _, _ = pair(name)
    rows = []
    for block, _ in reversed(find_blocks(other)):
        attention = [key for key in masks if key.startswith(block) and ("att" in key.lower() or ".layer.0." in key)]
        rest = [key for key in masks if key.startswith(block) and key not in attention]
        parts = [attention + rest] if name == "neox" else [rest, attention]
        for names in parts:
            rows += reconstruct(other, only(masks, names.__contains__), dense, **settings).windows
    assert sorted(rows, key=str) == sorted(result.windows, key=str)
    assert not changed(other, bits(model))


@pytest.mark.filterwarnings("ignore:granularity")
@pytest.mark.parametrize("name", ["opt", "gpt2"])
def test_a_single_matrix_converges_to_least_squares(name: str) -> None:
    """Row by row: the kept weights that come closest to the dense row's outputs, by the normal equations."""
    model, masks, dense = pair(name)
    key = {"opt": "model.decoder.layers.0.fc1.weight", "gpt2": "transformer.h.0.mlp.c_fc.weight"}[name]
    chosen = only(masks, key.__eq__)
    module = model.get_submodule(key.removesuffix(".weight"))
    batch = texts(rows=16)[0]
    inputs = input_of(module, lambda: block_calls(model, batch)).reshape(-1, 32).double()
    turn = (lambda t: t) if name == "opt" else torch.Tensor.t
    weight, mask = turn(dense.get_parameter(key).detach().double()), turn(masks[key])
    expected = torch.zeros_like(weight)
    for row, kept in enumerate(mask):
        x = inputs[:, kept]
        expected[row, kept] = torch.linalg.solve(x.T @ x, x.T @ (inputs @ weight[row]))
    result = reconstruct(
        model, chosen, dense, calibration=[batch], granularity="linear", batch_size=16, iterations=1500,
        learning_rate=1e-2, autocast=False, progress=False,
    )  # fmt: skip
    found = turn(model.get_parameter(key).detach().double())
    assert torch.allclose(found, expected, atol=1e-5) and not torch.allclose(found, weight * mask, atol=1e-3)
    best = float((inputs @ (expected - weight).T).square().mean())
    assert result.windows[0].loss_after == pytest.approx(best, rel=1e-4)


def test_padding_and_batching_do_not_matter() -> None:
    plain = texts(rows=6)[0]["input_ids"]
    padded = torch.cat([plain[:4], torch.full((4, 5), 2)], dim=1)
    mask = torch.cat([torch.ones_like(plain[:4]), torch.zeros(4, 5, dtype=torch.long)], dim=1)
    whole = {"input_ids": plain, "attention_mask": torch.ones_like(plain)}
    parts = [{key: value[rows] for key, value in whole.items()} for rows in (slice(5, 6), slice(0, 2), slice(2, 5))]
    rest = {key: value[4:] for key, value in whole.items()}
    forms = [[whole], parts, [{"input_ids": padded, "attention_mask": mask}, rest]]
    found = []
    for calibration in forms:
        model, masks, dense = pair("llama")
        found.append((reconstruct(model, masks, dense, calibration=calibration, **QUICK), bits(model)))
    for result, weights in found[1:]:
        assert result == found[0][0]
        assert all(torch.equal(weights[key], found[0][1][key]) for key in weights)


@pytest.mark.parametrize(("train", "batch_size"), [("full", 2), ("mask_lora", 6)])
def test_the_seed_decides(train: str, batch_size: int) -> None:
    """On the order of the batches; of only one batch, on an adapter's random factors."""
    found = []
    for seed in (0, 0, 1):
        model, masks, dense = pair("llama")
        torch.manual_seed(seed + len(found))  # the global state has no say
        state = torch.get_rng_state()
        reconstruct(model, masks, dense, calibration=texts(), train=train, batch_size=batch_size, seed=seed, **QUICK)
        assert torch.equal(torch.get_rng_state(), state)
        found.append(bits(model))
    key = "model.layers.0.mlp.up_proj.weight"
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not torch.equal(found[0][key], found[2][key])


@pytest.mark.parametrize(
    ("name", "train", "tails"),
    [
        ("llama", "norms", ("layernorm.weight",)),
        ("opt", "biases", ("bias",)),
        ("opt", "full+norms+biases", ("bias", "layer_norm.weight")),
        ("gpt2", "mask_lora+norms", ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias")),
        ("t5", "full+norms", ("layer_norm.weight",)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups(name: str, train: str, tails: tuple[str, ...], dtype: torch.dtype) -> None:
    """Exactly the groups inside the blocks are trained, in fp32, and cast back."""
    model, masks, dense = pair(name, dtype=dtype)
    before, inside = bits(model), tuple(f"{block}." for block, _ in find_blocks(model))
    # A key's bias shifts all scores of a query alike, so it has no gradient but rounding.
    wanted = {
        n for n, _ in model.named_parameters() if n.startswith(inside) and n.endswith(tails) and "k_proj" not in n
    }
    wanted |= set(masks) if "full" in train or "lora" in train else set()
    rate = 2e-3 if dtype == torch.float32 or "full" in train else 2e-2  # less is lost in rounding norms
    result = reconstruct(model, masks, dense, calibration=texts(), train=train, **QUICK | {"learning_rate": rate})
    touched = {n for n in changed(model, before) if "k_proj.bias" not in n}
    assert touched and touched <= wanted
    if dtype == torch.float32:
        assert touched == wanted and all(row.improved for row in result.windows)
    assert result.train == train and {p.dtype for p in model.parameters()} == {dtype}
    masks.verify(model)


@pytest.mark.parametrize("stream", ["sparse", "dense"])
def test_windows_that_get_worse_keep_their_weights(stream: str) -> None:
    """A learning rate that ruins everything: the model, and what the next blocks see, are as before."""
    model, masks, dense = pair("llama")
    before = bits(model)
    settings = dict(calibration=texts(), stream=stream, progress=False)
    untrained = reconstruct(model, masks, dense, iterations=0, **settings)
    result = reconstruct(model, masks, dense, iterations=4, learning_rate=1e4, **settings)
    assert not changed(model, before)
    assert [row.loss_before for row in result.windows] == [row.loss_before for row in untrained.windows]
    assert all(row.loss_after == row.loss_before and not row.improved and row.iterations > 0 for row in result.windows)


def test_activations_that_are_not_finite_leave_their_windows_alone() -> None:
    model, masks, dense = pair("llama")
    with torch.no_grad():
        dense.get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0] = torch.inf
    before = bits(model)
    result = reconstruct(model, masks, dense, calibration=texts(), **QUICK)
    improved = {(row.block[-1], row.window): row.improved for row in result.windows}
    assert improved == {("0", "attn"): True, ("0", "mlp"): False, ("1", "attn"): True, ("1", "mlp"): True}
    assert not any("layers.0.mlp" in key for key in changed(model, before))


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_activations_in_files_give_the_same(name: str, tmp_path: Any) -> None:
    for stream in ("sparse", "sparse_to_dense"):
        model, masks, dense = pair(name)
        other, _, _ = pair(name)
        first = reconstruct(model, masks, dense, calibration=texts(), stream=stream, **QUICK)
        second = reconstruct(
            other, masks, dense, calibration=texts(), stream=stream, activations_dir=tmp_path / "new", **QUICK
        )
        assert first == second and not changed(other, bits(model))
        assert (tmp_path / "new").is_dir() and not list((tmp_path / "new").iterdir())


def dtypes_of_products(model: nn.Module, masks: MaskSet, dense: nn.Module, **options: Any) -> set[tuple[bool, Any]]:
    """Of all linear layers called: whether it was in training, and the dtype of the output."""
    dtypes = set()
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: (
            dtypes.add((torch.is_grad_enabled(), output.dtype)) if isinstance(module, nn.Linear) else None
        )
    )
    try:
        reconstruct(model, masks, dense, calibration=texts(), **QUICK | options)
    finally:
        hook.remove()
    return dtypes


@pytest.mark.parametrize(
    ("stored", "autocast", "fast", "in_training"),
    [
        (torch.float32, None, False, torch.float32),
        (torch.float32, None, True, torch.bfloat16),
        (torch.float32, True, False, torch.bfloat16),
        (torch.float32, False, True, torch.float32),
        (torch.bfloat16, None, False, torch.bfloat16),
        (torch.bfloat16, False, True, torch.float32),
        (torch.float16, None, False, torch.float32),
    ],
)
def test_training_and_measuring_have_their_own_dtypes(
    stored: Any, autocast: bool | None, fast: bool, in_training: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training is in bfloat16 if the model is, if that is fast, or asked; errors of fp32 weights are measured with the
    products of training, others as the model will run."""
    monkeypatch.setattr(blocks_module, "multiplies_bfloat16", lambda device: fast)
    model, masks, dense = pair("llama", dtype=stored)
    assert dtypes_of_products(model, masks, dense, autocast=autocast) == {
        (True, in_training),
        (False, in_training if stored == torch.float32 else stored),
    }
    masks.verify(model)


def test_autocast_comes_close_to_exact_training() -> None:
    _, masks, dense = pair("llama")
    exact = reconstruct(pair("llama")[0], masks, dense, calibration=texts(), **QUICK)
    result = reconstruct(pair("llama")[0], masks, dense, calibration=texts(), **QUICK | {"autocast": True})
    assert result.autocast and not exact.autocast
    for row, other in zip(result.windows, exact.windows, strict=True):
        assert row.loss_before == pytest.approx(other.loss_before, rel=0.05)
        assert row.loss_after == pytest.approx(other.loss_after, rel=0.05) and row.loss_after != other.loss_after


def test_models_are_as_they_were() -> None:
    """Modes, gradients, hooks; the dense model is in training mode and stays out of the way."""
    model, masks, dense = pair("opt")
    model.train()
    dense.train()
    model.get_parameter("model.decoder.embed_tokens.weight").requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    expected = pair("opt")[0]
    reconstruct(expected, masks, pair("opt")[2], calibration=texts(), **QUICK)
    reconstruct(model, masks, dense, calibration=texts(), **QUICK)
    assert not changed(model, bits(expected)), "no dropout, whatever the mode"
    for one in (model, dense):
        assert all(module.training for module in one.modules())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in one.modules())
        assert all(parameter.grad is None for parameter in one.parameters())
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def test_routers_are_not_trained() -> None:
    model, masks, dense = pair("mixtral")
    before = bits(model)
    reconstruct(model, masks, dense, calibration=texts(), train="full+norms", **QUICK)
    assert not any("gate.weight" in key or "router" in key for key in changed(model, before))
    assert {key for key in changed(model, before) if "experts" in key}


def test_blocks_without_a_cut_are_said_to_be_whole() -> None:
    model, masks, dense = pair("neox")
    with pytest.warns(UserWarning, match="2 blocks run attention and MLP side by side"):
        result = reconstruct(model, masks, dense, calibration=texts(), **QUICK)
    assert result.whole_blocks == ("gpt_neox.layers.0", "gpt_neox.layers.1")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert not reconstruct(
            pair("neox")[0], masks, dense, calibration=texts(), granularity="block", **QUICK
        ).whole_blocks


def test_single_matrices_come_with_a_warning() -> None:
    model, masks, dense = pair("llama")
    with pytest.warns(UserWarning, match="granularity 'linear'") as caught:
        reconstruct(model, masks, dense, calibration=texts(), granularity="linear", **QUICK)
    assert len([one for one in caught if "granularity" in str(one.message)]) == 1


def test_layers_that_share_their_weights_are_refused_before_they_change() -> None:
    torch.manual_seed(0)
    sizes = dict(vocab_size=96, embedding_size=16, hidden_size=32, intermediate_size=48, num_attention_heads=4)
    model, dense = (AlbertForMaskedLM(AlbertConfig(**sizes, num_hidden_layers=3, pad_token_id=2)) for _ in range(2))
    targets = {n: p for n, p in model.named_parameters() if p.ndim == 2 and "albert_layers" in n}
    masks = MaskSet({name: torch.rand_like(weight) > 0.5 for name, weight in targets.items()})
    masks.apply_(model)
    before = bits(model)
    with pytest.raises(RuntimeError, match="3 times in one forward"):
        reconstruct(model, masks, dense, calibration=texts(), **QUICK)
    assert not changed(model, before)


@pytest.mark.parametrize(
    ("name", "train", "rate"),
    [
        ("llama", "full+norms", 0.8 / 32),
        ("gpt2", "full", 0.8 / 32),
        ("t5", "full", 0.8 / 32),
        ("opt", "mask_lora", 5e-4),
    ],
)
def test_learning_rates_by_default(name: str, train: str, rate: float) -> None:
    """Kept weights: by the inputs of the narrowest matrix, which GPT-2 stores first."""
    model, masks, dense = pair(name)
    settings = dict(calibration=texts(), train=train, iterations=1, progress=False)
    assert reconstruct(model, masks, dense, **settings).learning_rate == rate


def test_result_as_plain_values() -> None:
    model, masks, dense = pair("llama")
    result = reconstruct(model, masks, dense, calibration=texts(), stream="dense", **QUICK)
    plain = result.to_dict()
    assert plain["stream"] == "dense" and plain["samples"] == 6 and plain["train"] == "full"
    assert [row["window"] for row in plain["windows"]] == ["attn", "mlp"] * 2
