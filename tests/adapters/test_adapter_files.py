"""Saved adapters: every way to load one gives the same logits; what is saved, and saved again, byte for byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from adapters.saved_adapter import CONFIG, WEIGHTS, Route, Saved, by_peft_model, every_route, files
from adapters.sparse_models import CONFIGS, FAMILIES, adapted, every_method, logits, perturb, sparse_model
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparse_ft.adapters import MaskLoraConfig
from sparse_ft.masks import MASKS_FILE, MaskSet


@pytest.fixture(params=list(CONFIGS))
def saved(tmp_path: Path, request: pytest.FixtureRequest) -> Saved:
    return Saved(tmp_path, method=request.param)


@every_route
def test_every_route_gives_the_same_logits(saved: Saved, route: Route) -> None:
    assert torch.equal(logits(route(saved, saved.adapter)), saved.logits)


@pytest.mark.parametrize(
    ("name", "method"),
    [("gpt2", "mask_lora"), ("mixtral", "mask_lora"), ("gpt2", "scale_lora"), ("mixtral", "scale_lora")],
)
@every_route
def test_every_route_on_other_layouts(tmp_path: Path, name: str, method: str, route: Route) -> None:
    saved = Saved(tmp_path, name, method)
    assert torch.equal(logits(route(saved, saved.adapter)), saved.logits)


@every_method
@pytest.mark.parametrize("name", FAMILIES)
def test_save_load_save_gives_the_same_bytes(tmp_path: Path, name: str, method: str) -> None:
    model, masks = sparse_model(name)
    options = (
        {"rank_pattern": {"k_proj": 3}, "break_symmetry": True} if method == "scale_lora" else {"use_rslora": True}
    )
    peft_model = adapted(model, masks, method=method, bias="lora_only", **options)
    wanted = logits(peft_model)
    peft_model.save_pretrained(tmp_path / "first")
    loaded = PeftModel.from_pretrained(sparse_model(name)[0], tmp_path / "first")
    assert torch.equal(logits(loaded), wanted)
    loaded.save_pretrained(tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "first")


def test_directory_is_pefts_own_and_the_masks(saved: Saved) -> None:
    assert set(files(saved.adapter)) == {"README.md", CONFIG, WEIGHTS, MASKS_FILE}
    assert MaskSet.load(saved.adapter) == saved.masks
    config = json.loads((saved.adapter / CONFIG).read_text())
    assert (
        config["peft_type"]
        == {"mask_lora": "MASKLORA", "scale_lora": "SCALELORA", "lora_prune": "LORAPRUNE"}[saved.method]
    )
    assert "masks" not in config
    assert config["weights_digest"] == saved.masks.weights_digest(saved.load_base())
    tensors = load_file(saved.adapter / WEIGHTS)
    assert {key.rsplit(".", 2)[-2] for key in tensors} == {"lora_A", "lora_B", "lora_mask"}
    assert sum(t.numel() for key, t in tensors.items() if "lora_mask" in key) == 32 * len(saved.masks)


def test_named_adapters_live_in_their_own_folders(saved: Saved, tmp_path: Path) -> None:
    model = by_peft_model(saved, saved.adapter)
    model.add_adapter("second", saved.config(r=2))
    perturb(model, adapter="second", seed=3)
    model.set_adapter("second")
    wanted = logits(model)
    model.save_pretrained(tmp_path / "both")
    assert MASKS_FILE in files(tmp_path / "both") and f"second/{MASKS_FILE}" in files(tmp_path / "both")
    loaded = PeftModel.from_pretrained(saved.load_base(), tmp_path / "both")
    assert torch.equal(logits(loaded), saved.logits)
    loaded.load_adapter(tmp_path / "both", "other", subfolder="second")
    loaded.set_adapter("other")
    assert torch.equal(logits(loaded), wanted)
    alone = PeftModel.from_pretrained(saved.load_base(), tmp_path / "both", subfolder="second")
    assert torch.equal(logits(alone), wanted)


def test_transformers_own_add_and_save(saved: Saved, tmp_path: Path) -> None:
    model = saved.load_base()
    model.add_adapter(saved.config())
    perturb(model)
    assert torch.equal(logits(model), saved.logits)
    model.save_pretrained(tmp_path / "mine")
    assert MASKS_FILE in files(tmp_path / "mine")
    assert torch.equal(logits(PeftModel.from_pretrained(saved.load_base(), tmp_path / "mine")), saved.logits)
    model.disable_adapters()
    assert torch.equal(logits(model), saved.plain)
    model.enable_adapters()
    model.delete_adapter("default")
    assert torch.equal(logits(model), saved.plain)


def test_saved_while_merged_is_the_same_adapter(saved: Saved, tmp_path: Path) -> None:
    model = by_peft_model(saved, saved.adapter)
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    assert files(tmp_path / "merged") == files(saved.adapter)


def test_merged_model_saves_as_an_ordinary_sparse_checkpoint(saved: Saved, tmp_path: Path) -> None:
    merged = by_peft_model(saved, saved.adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    saved.masks.verify(loaded)
    assert torch.equal(logits(loaded), logits(merged))
    if saved.method != "lora_prune":
        torch.testing.assert_close(logits(loaded), saved.logits, rtol=1e-4, atol=1e-5)


def test_a_bf16_base_in_fp32_is_the_same_base(tmp_path: Path) -> None:
    model, masks = sparse_model(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapted(wide, masks).save_pretrained(tmp_path / "adapter")
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    PeftModel.from_pretrained(narrow, tmp_path / "adapter")


def test_masks_may_be_given_by_place(saved: Saved) -> None:
    config = saved.config(masks=saved.adapter)
    assert config.masks == saved.masks
    get_peft_model(saved.load_base(), config)


def test_safetensors_metadata_is_what_peft_writes(saved: Saved, tmp_path: Path) -> None:
    tensors = load_file(saved.adapter / WEIGHTS)
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    assert (tmp_path / WEIGHTS).read_bytes() == (saved.adapter / WEIGHTS).read_bytes()


# -- the Hub's cache -------------------------------------------------------------------------------------------------


@pytest.fixture
def mask_lora(tmp_path: Path) -> Saved:
    return Saved(tmp_path)


@pytest.fixture
def hub(mask_lora: Saved) -> Iterator[Callable[..., str]]:
    """Put the adapter into the offline Hub cache as a repository of links, optionally in a subfolder."""
    from huggingface_hub.constants import HF_HUB_CACHE

    made = []

    def publish(subfolder: str | None = None, *, without: str | None = None) -> str:
        repository = Path(HF_HUB_CACHE) / "models--someone--adapter"
        made.append(repository)
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        snapshot = repository / "snapshots" / ("0" * 40) / (subfolder or "")
        snapshot.mkdir(parents=True)
        (repository / "blobs").mkdir()
        for file in mask_lora.adapter.iterdir():
            if file.name != without:
                shutil.copy(file, repository / "blobs" / file.name)
                (snapshot / file.name).symlink_to(repository / "blobs" / file.name)
        return "someone/adapter"

    yield publish
    for repository in made:
        shutil.rmtree(repository)


def test_adapter_from_the_hub_cache(mask_lora: Saved, hub: Callable[..., str]) -> None:
    assert torch.equal(logits(PeftModel.from_pretrained(mask_lora.load_base(), hub())), mask_lora.logits)


def test_masks_from_a_subfolder_of_the_hub_cache(mask_lora: Saved, hub: Callable[..., str]) -> None:
    assert MaskLoraConfig.from_pretrained(hub("nested"), subfolder="nested").masks == mask_lora.masks


def test_adapter_from_the_hub_cache_without_masks(mask_lora: Saved, hub: Callable[..., str]) -> None:
    with pytest.raises(FileNotFoundError, match=f"adapter in 'someone/adapter' has no {MASKS_FILE}"):
        PeftModel.from_pretrained(mask_lora.load_base(), hub(without=MASKS_FILE))


def test_adapter_from_a_snapshot_of_links(mask_lora: Saved, hub: Callable[..., str]) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    hub()
    snapshot = Path(HF_HUB_CACHE) / "models--someone--adapter" / "snapshots" / ("0" * 40)
    assert torch.equal(logits(by_peft_model(mask_lora, snapshot)), mask_lora.logits)
