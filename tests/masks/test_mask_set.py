"""The stored mask is the truth: counts, files, digests, arithmetic and verification."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import TINY

from sparse_ft.masks import MASKS_FILE, MaskSet, Pattern, pack_bits, unpack_bits
from sparse_ft.models import find_targets, matrix_view, named_weights


def random_masks(seed: int = 0, share: float = 0.5) -> MaskSet:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (5, 7), "b.weight": (3, 4, 6), "c.weight": (11,)}
    return MaskSet({n: torch.rand(s, generator=generator) > share for n, s in shapes.items()})


def sparse_model(family: str, pattern: str = "2:4") -> tuple[torch.nn.Module, MaskSet]:
    model = TINY[family]()
    targets = find_targets(model)
    weights = named_weights(model)
    scores = {t.name: weights[t.name].detach().abs() for t in targets}
    share = 0.6 if pattern == "unstructured" else None
    dims = {t.name: t.input_dim for t in targets}
    masks = MaskSet.from_scores(scores, pattern=pattern, sparsity=share, input_dims=dims)
    return model, masks.apply_(model)


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=0, max_size=40))
def test_bit_i_of_byte_j_is_element_8j_plus_i(bits: list[bool]) -> None:
    packed = pack_bits(torch.tensor(bits, dtype=torch.bool))
    assert len(packed) == (len(bits) + 7) // 8
    for index, bit in enumerate(bits):
        assert (int(packed[index // 8]) >> (index % 8)) & 1 == bit
    assert unpack_bits(packed, (len(bits),)).tolist() == bits


def test_integer_masks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be torch.bool, got torch.int64"):
        MaskSet({"a": torch.tensor([[1, 0]])})
    with pytest.raises(ValueError, match=r"must be torch.bool"):
        pack_bits(torch.tensor([1, 0]))


def test_damaged_bits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"needs 2 bytes"):
        unpack_bits(torch.zeros(3, dtype=torch.uint8), (9,))
    with pytest.raises(ValueError, match=r"bits set after its last element"):
        unpack_bits(torch.tensor([0, 2], dtype=torch.uint8), (9,))


def test_a_mask_set_cannot_be_changed_through_what_it_returns() -> None:
    masks = random_masks()
    before = masks.digest()
    masks["a.weight"].fill_(True)
    assert masks.digest() == before


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1:4"])
def test_apply_and_verify(family: str, pattern: str) -> None:
    model, masks = sparse_model(family, pattern)
    dense = named_weights(TINY[family]())
    for name, weight in named_weights(model).items():
        if name not in masks:
            assert torch.equal(weight, dense[name])
            continue
        assert not weight[~masks[name]].any()
        assert not torch.signbit(weight[~masks[name]]).any(), "pruned weights are +0, not -0"
        assert torch.equal(weight[masks[name]], dense[name][masks[name]])
        assert masks.patterns[name].violations(matrix_view(masks[name], masks.input_dims[name])) == 0
    masks.verify(model)
    assert masks.sparsity() == pytest.approx({"unstructured": 0.6, "2:4": 0.5, "1:4": 0.75}[pattern], abs=1e-3)


@pytest.mark.parametrize("value", [1e-30, float("nan"), -1.0])
def test_verify_names_the_one_revived_weight(value: float) -> None:
    model, masks = sparse_model("llama")
    name = next(iter(masks))
    weight = named_weights(model)[name]
    position = tuple((~masks[name]).nonzero()[3].tolist())
    with torch.no_grad():
        weight[position] = value
    assert masks.revived(model) == {name: 1}
    with pytest.raises(RuntimeError, match=rf"1 pruned weights in 1 tensors are not zero, the first 1 in '{name}'"):
        masks.verify(model)


def test_tensors_of_a_lazy_mapping_are_read_one_at_a_time() -> None:
    """Verifying a checkpoint on disk must not hold it: when the next tensor is read, the one before is gone."""
    model, masks = sparse_model("llama")
    tensors, alive = named_weights(model), list[weakref.ref]()

    class Lazy(Mapping[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            assert sum(ref() is not None for ref in alive) <= 1
            copy = tensors[name].detach().clone()
            alive.append(weakref.ref(copy))
            return copy

        def __iter__(self) -> Iterator[str]:
            return iter(tensors)

        def __len__(self) -> int:
            return len(tensors)

    masks.verify(Lazy())
    assert masks.weights_digest(Lazy()) == masks.weights_digest(model)
    assert len(alive) == 2 * len(masks)


def test_masks_of_another_model_are_refused() -> None:
    _, masks = sparse_model("llama")
    with pytest.raises(ValueError, match=r"no tensor 'model.layers.0.self_attn.q_proj.weight'"):
        masks.verify(TINY["gpt2"]())
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(ValueError, match=r"has shape \(32, 32\) but the weight has \(32, 16\)"):
        masks.apply_({**named_weights(TINY["llama"]()), name: torch.zeros(32, 16)})


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "t5"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_from_zeros_finds_the_mask_again(family: str, pattern: str) -> None:
    model, masks = sparse_model(family, pattern)
    assert MaskSet.from_zeros(model, pattern=pattern) == masks


def test_from_zeros_with_a_pattern_keeps_weights_that_are_zero_by_chance() -> None:
    model, masks = sparse_model("llama")
    name = next(iter(masks))
    kept = tuple(masks[name].nonzero()[0].tolist())
    with torch.no_grad():
        named_weights(model)[name][kept] = 0
    found = MaskSet.from_zeros(model, pattern="2:4")
    assert found.counts() == masks.counts()
    assert found.surprises(model) == {name: (1, 0)}
    assert MaskSet.from_zeros(model).counts()[name][0] == masks.counts()[name][0] - 1


def test_from_zeros_refuses_dense_models_and_wrong_patterns() -> None:
    with pytest.raises(ValueError, match=r"model is dense: 0 of its"):
        MaskSet.from_zeros(TINY["llama"]())
    model, _ = sparse_model("llama", "unstructured")
    with pytest.raises(ValueError, match=r"is not 1:4 sparse"):
        MaskSet.from_zeros(model, pattern="1:4")


def test_a_few_zeros_by_chance_do_not_make_a_tensor_pruned() -> None:
    model, masks = sparse_model("llama")
    name = next(iter(masks))
    dense = TINY["llama"]()
    with torch.no_grad():
        weight = named_weights(model)[name]
        weight.copy_(named_weights(dense)[name])
        weight[0, 0] = 0
    found = MaskSet.from_zeros(model)
    assert bool(found[name].all())
    assert found.surprises(model)[name] == (1, 0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_save_load_save_is_byte_equal(family: str, tmp_path: Path) -> None:
    _, masks = sparse_model(family)
    first = masks.save(tmp_path / "one")
    loaded = MaskSet.load(tmp_path / "one")
    second = loaded.save(tmp_path / "two")
    assert loaded == masks and loaded.patterns == masks.patterns and loaded.input_dims == masks.input_dims
    assert first.name == MASKS_FILE and first.read_bytes() == second.read_bytes()
    total = sum(count for _, count in masks.counts().values())
    assert sum(t.numel() for t in load_file(first).values()) <= total / 8 + len(masks)


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    masks = random_masks()
    file = masks.save(tmp_path)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    packed = load_file(file)
    packed["a.weight"][0] ^= 1
    save_file(packed, file, metadata=metadata)
    with pytest.raises(ValueError, match=r"it was changed after it was written"):
        MaskSet.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header["tensors"]["a.weight"].update(input_dim=7), "is damaged"),
        (lambda header: header["tensors"]["a.weight"].update(input_dim="x"), "is damaged"),
        (lambda header: header["tensors"]["a.weight"].update(shape=[500, 7]), "is damaged"),
        (lambda header: header["tensors"]["a.weight"].update(shape=["a", 7]), "is damaged"),
        (lambda header: header["tensors"]["a.weight"].update(pattern="9:4"), "is damaged"),
        (lambda header: header.update(format_version=2), "has format 2, this version reads 1; upgrade"),
        (
            lambda header: header["tensors"].pop("a.weight"),
            "'a.weight' is in its header or its tensors but not in both",
        ),
    ],
)
def test_a_header_of_another_version_or_of_other_tensors_is_refused(
    change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    file = random_masks().save(tmp_path)
    with safe_open(file, "pt") as opened:
        ((key, text),) = opened.metadata().items()
    header = json.loads(text)
    change(header)
    save_file(load_file(file), file, metadata={key: json.dumps(header)})
    with pytest.raises(ValueError, match=message):
        MaskSet.load(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "foreign"])
def test_damaged_files_are_refused_in_one_sentence(damage: str, tmp_path: Path) -> None:
    file = random_masks().save(tmp_path)
    content = file.read_bytes()
    if damage == "foreign":
        save_file({"x": torch.zeros(2)}, file)
    else:
        file.write_bytes({"truncated": content[:-3], "empty": b"", "text": b"not a mask file at all"}[damage])
    with pytest.raises(ValueError, match=r"is no mask file, or is damaged"):
        MaskSet.load(tmp_path)


def test_missing_masks_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No masks at"):
        MaskSet.load(tmp_path)


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = random_masks(0)
    old.save(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"No space left"):
        random_masks(1).save(tmp_path)
    assert MaskSet.load(tmp_path) == old
    assert [p.name for p in tmp_path.iterdir()] == [MASKS_FILE]


def test_killed_saves_leave_a_whole_file(tmp_path: Path) -> None:
    """Kill a process that saves for ever: whatever moment it dies in, the file loads."""
    random_masks().save(tmp_path)
    code = (
        "import sys, torch; from sparse_ft.masks import MaskSet; print('ready', flush=True)\n"
        "for i in range(10**9): MaskSet({'a': torch.rand(400, 400) > 0.5}).save(sys.argv[1])"
    )
    for delay in (0.02, 0.05, 0.11):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        MaskSet.load(tmp_path)


def test_digest_ignores_order_and_sees_everything_else() -> None:
    masks = {"a": torch.rand(4, 8) > 0.5, "b": torch.rand(8, 4) > 0.5}
    one = MaskSet(masks)
    assert one.digest() == MaskSet(dict(reversed(masks.items()))).digest()
    flipped = {**masks, "a": masks["a"] ^ torch.nn.functional.one_hot(torch.tensor(3), 8).bool()}
    others = [
        MaskSet(flipped),
        MaskSet({"a": masks["a"], "c": masks["b"]}),
        MaskSet({**masks, "b": masks["b"].view(4, 8)}),
        MaskSet(masks, input_dims={"b": 0}),
        MaskSet(masks, pattern="4:4"),
    ]
    assert len({one.digest(), *(o.digest() for o in others)}) == 6


def test_weights_digest_is_of_values_not_of_dtype_or_order() -> None:
    model, masks = sparse_model("llama")
    model = model.to(torch.bfloat16)
    digest = masks.weights_digest(model)
    tensors = named_weights(model)
    assert masks.weights_digest(dict(reversed(tensors.items()))) == digest
    assert masks.weights_digest(model.float()) == digest
    parts = {n: hashlib.sha256(tensors[n].detach().float().numpy().tobytes()).hexdigest() for n in masks}
    assert digest == hashlib.sha256("".join(f"{n}|{parts[n]}|" for n in sorted(parts)).encode()).hexdigest()
    with torch.no_grad():
        tensors[next(iter(masks))].view(-1)[-1] += 1
    assert masks.weights_digest(model) != digest


def test_union_intersection_and_subset() -> None:
    a, b = random_masks(1), random_masks(2)
    union, both = a | b, a & b
    for name in a:
        assert torch.equal(union[name], a[name] | b[name]) and torch.equal(both[name], a[name] & b[name])
    assert both <= a <= union and not union <= a
    extra = MaskSet({"z": torch.tensor([[True, False]])})
    assert not a <= extra and (a & extra) <= extra
    assert bool((a | extra)["z"].all())
    with pytest.raises(ValueError, match=r"have shapes"):
        _ = a | MaskSet({"a.weight": torch.ones(2, 2, dtype=torch.bool)})


def test_union_of_n_m_masks_keeps_the_pattern_only_where_it_holds() -> None:
    scores = torch.rand(4, 8)
    one, other = (MaskSet.from_scores({"w": s}, pattern="2:4") for s in (scores, -scores))
    assert (one | one).patterns["w"] == Pattern(2, 4)
    assert (one & other).patterns["w"] == Pattern(2, 4)
    assert (one | other).patterns["w"] == Pattern()


def test_n_m_masks_are_checked_on_construction() -> None:
    with pytest.raises(ValueError, match=r"breaks pattern 2:4 in 1 groups"):
        MaskSet({"w": torch.tensor([[True, True, True, False]])}, pattern="2:4")
    conv = torch.tensor([[True], [True], [False], [False]])
    assert MaskSet({"w": conv}, pattern="2:4", input_dims={"w": 0}).sparsity() == 0.5


@pytest.mark.parametrize("scope", ["tensor", "row", "global"])
def test_from_scores_counts(scope: str) -> None:
    scores = {"a": torch.ones(5, 7), "b": torch.rand(6, 9)}
    masks = MaskSet.from_scores(scores, sparsity=0.37, scope=scope)
    removed = {name: total - kept for name, (kept, total) in masks.counts().items()}
    expected = {
        "tensor": {"a": round(0.37 * 35), "b": round(0.37 * 54)},
        "row": {"a": 5 * int(0.37 * 7), "b": 6 * int(0.37 * 9)},
    }
    if scope == "global":
        assert sum(removed.values()) == round(0.37 * 89)
    else:
        assert removed == expected[scope]


@pytest.mark.parametrize("sparsity", [None, 1.0, -0.1, float("nan"), "0.5", True])
def test_bad_sparsity_is_refused(sparsity: object) -> None:
    with pytest.raises(ValueError, match=r"sparsity"):
        MaskSet.from_scores({"a": torch.rand(4, 4)}, sparsity=sparsity)  # type: ignore[arg-type]


def test_no_scores_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at least one tensor"):
        MaskSet.from_scores({}, sparsity=0.5, scope="global")


def test_contradicting_sparsity_is_refused() -> None:
    with pytest.raises(ValueError, match=r"fixes sparsity at 0.5, got 0.7"):
        MaskSet.from_scores({"a": torch.rand(4, 4)}, pattern="2:4", sparsity=0.7)


@pytest.mark.parametrize("text", ["4:2", "0:4", "2:4:8", "half", "2/4", ""])
def test_bad_patterns_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"[Pp]attern"):
        Pattern.parse(text)


def test_density_one_and_zero() -> None:
    weight = torch.randn(4, 8)
    before = weight.clone()
    MaskSet.from_scores({"w": weight.abs()}, sparsity=0.0).apply_({"w": weight})
    assert torch.equal(weight, before)
    nothing = MaskSet({"w": torch.zeros(4, 8, dtype=torch.bool)})
    nothing.apply_({"w": weight.fill_(float("inf"))})
    assert torch.equal(weight, torch.zeros(4, 8)) and nothing.sparsity() == 1.0


def test_push_to_hub_uploads_the_file_that_load_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the network call is replaced: what would be uploaded is read back."""
    import huggingface_hub

    uploaded = {}

    class Api(huggingface_hub.HfApi):
        def create_repo(self, repo_id: str, **_: object) -> None:  # type: ignore[override]
            uploaded["repo"] = repo_id

        def upload_file(self, *, path_or_fileobj: str, path_in_repo: str, **_: object) -> object:  # type: ignore[override]
            uploaded[path_in_repo] = Path(path_or_fileobj).read_bytes()
            return type("Commit", (), {"commit_url": "commit-1"})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    masks = random_masks()
    assert masks.push_to_hub("me/masks") == "commit-1" and uploaded["repo"] == "me/masks"
    (tmp_path / MASKS_FILE).write_bytes(uploaded[MASKS_FILE])
    assert MaskSet.load(tmp_path) == masks
