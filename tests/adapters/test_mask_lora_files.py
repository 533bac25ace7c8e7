"""Saved adapters: every way to load one gives the same logits or fails, never other logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from adapters.sparse_models import adapted, logits, perturb, sparse_model, train
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import tiny_batch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from sparse_ft.adapters import MaskLoraConfig
from sparse_ft.masks import MASKS_FILE, MaskSet
from sparse_ft.models import named_weights

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Saved:
    """A saved base, an adapter on it, and the logits they give together."""

    def __init__(self, directory: Path, name: str = "llama") -> None:
        self.name, self.base, self.adapter = name, directory / "base", directory / "adapter"
        model, self.masks = sparse_model(name)
        model.save_pretrained(self.base)
        model = AutoModelForCausalLM.from_pretrained(self.base)
        self.plain = logits(model)
        peft_model = adapted(model, self.masks, task_type="CAUSAL_LM")
        self.logits = logits(peft_model)
        peft_model.save_pretrained(self.adapter)

    def load_base(self, **options: object) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.base, **options)


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    return Saved(tmp_path)


def files(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


# every way an adapter reaches a model; each takes base directory and adapter directory
def by_peft_model(saved: Saved, adapter: Path) -> torch.nn.Module:
    return PeftModel.from_pretrained(saved.load_base(), adapter)


def by_low_memory(saved: Saved, adapter: Path) -> torch.nn.Module:
    return PeftModel.from_pretrained(saved.load_base(), adapter, low_cpu_mem_usage=True)


def by_auto_peft(saved: Saved, adapter: Path) -> torch.nn.Module:
    return AutoPeftModelForCausalLM.from_pretrained(adapter)


def by_second_adapter(saved: Saved, adapter: Path) -> torch.nn.Module:
    model = get_peft_model(saved.load_base(), MaskLoraConfig(r=2, masks=saved.masks))
    model.load_adapter(adapter, "second")
    model.set_adapter("second")
    return model


def by_reloading_into_an_adapter(saved: Saved, adapter: Path) -> torch.nn.Module:
    model = get_peft_model(saved.load_base(), MaskLoraConfig(r=4, masks=saved.masks))
    model.load_adapter(adapter, "default")
    return model.eval()


def by_config(saved: Saved, adapter: Path) -> torch.nn.Module:
    return PeftModel.from_pretrained(saved.load_base(), adapter, config=MaskLoraConfig.from_pretrained(adapter))


def by_transformers(saved: Saved, adapter: Path) -> torch.nn.Module:
    model = saved.load_base()
    model.load_adapter(str(adapter))
    return model


def by_transformers_with_config(saved: Saved, adapter: Path) -> torch.nn.Module:
    model = saved.load_base()
    model.load_adapter(str(adapter), peft_config=MaskLoraConfig.from_pretrained(adapter), adapter_name="mine")
    return model


def by_auto_model(saved: Saved, adapter: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(adapter)


PEFT_ROUTES = [by_peft_model, by_low_memory, by_auto_peft, by_second_adapter, by_config, by_transformers_with_config]
ROUTES = [*PEFT_ROUTES, by_reloading_into_an_adapter, by_transformers, by_auto_model]
Route = Callable[[Saved, Path], torch.nn.Module]
every_route = pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.__name__)


@every_route
def test_every_route_gives_the_same_logits(saved: Saved, route: Route) -> None:
    assert torch.equal(logits(route(saved, saved.adapter)), saved.logits)


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
@every_route
def test_every_route_on_other_layouts(tmp_path: Path, name: str, route: Route) -> None:
    saved = Saved(tmp_path, name)
    assert torch.equal(logits(route(saved, saved.adapter)), saved.logits)


def test_directory_is_pefts_own_and_the_masks(saved: Saved) -> None:
    assert set(files(saved.adapter)) == {"README.md", CONFIG, WEIGHTS, MASKS_FILE}
    assert MaskSet.load(saved.adapter) == saved.masks
    config = json.loads((saved.adapter / CONFIG).read_text())
    assert config["peft_type"] == "MASKLORA"
    assert "masks" not in config
    assert config["weights_digest"] == saved.masks.weights_digest(saved.load_base())
    tensors = load_file(saved.adapter / WEIGHTS)
    assert {key.rsplit(".", 2)[-2] for key in tensors} == {"lora_A", "lora_B", "lora_mask"}
    assert sum(t.numel() for key, t in tensors.items() if "lora_mask" in key) == 32 * len(saved.masks)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_save_load_save_gives_the_same_bytes(tmp_path: Path, name: str) -> None:
    saved = Saved(tmp_path, name)
    by_peft_model(saved, saved.adapter).save_pretrained(tmp_path / "again")
    assert files(tmp_path / "again") == files(saved.adapter)


def test_named_adapters_live_in_their_own_folders(saved: Saved, tmp_path: Path) -> None:
    model = by_peft_model(saved, saved.adapter)
    model.add_adapter("second", MaskLoraConfig(r=2, masks=saved.masks))
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
    model.add_adapter(MaskLoraConfig(r=4, masks=saved.masks))
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
    torch.testing.assert_close(logits(loaded), saved.logits, rtol=1e-4, atol=1e-5)


# -- the Hub's cache -------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(saved: Saved) -> Callable[[str | None], str]:
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
        for file in saved.adapter.iterdir():
            if file.name != without:
                shutil.copy(file, repository / "blobs" / file.name)
                (snapshot / file.name).symlink_to(repository / "blobs" / file.name)
        return "someone/adapter"

    yield publish
    for repository in made:
        shutil.rmtree(repository)


def test_adapter_from_the_hub_cache(saved: Saved, hub: Callable[..., str]) -> None:
    assert torch.equal(logits(PeftModel.from_pretrained(saved.load_base(), hub())), saved.logits)


def test_masks_from_a_subfolder_of_the_hub_cache(saved: Saved, hub: Callable[..., str]) -> None:
    assert MaskLoraConfig.from_pretrained(hub("nested"), subfolder="nested").masks == saved.masks


def test_adapter_from_the_hub_cache_without_masks(saved: Saved, hub: Callable[..., str]) -> None:
    with pytest.raises(FileNotFoundError, match=f"adapter in 'someone/adapter' has no {MASKS_FILE}"):
        PeftModel.from_pretrained(saved.load_base(), hub(without=MASKS_FILE))


def test_adapter_from_a_snapshot_of_links(saved: Saved, hub: Callable[..., str]) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    hub()
    snapshot = Path(HF_HUB_CACHE) / "models--someone--adapter" / "snapshots" / ("0" * 40)
    assert torch.equal(logits(by_peft_model(saved, snapshot)), saved.logits)


# -- what must fail --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", PEFT_ROUTES, ids=lambda route: route.__name__)
def test_without_its_masks_it_does_not_load(saved: Saved, route: Route) -> None:
    (saved.adapter / MASKS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {MASKS_FILE}"):
        route(saved, saved.adapter)


@every_route
def test_with_other_masks_it_does_not_load(saved: Saved, route: Route) -> None:
    name = next(iter(saved.masks))
    kept = saved.masks[name]
    kept.view(-1)[kept.view(-1).nonzero()[0]] = False
    other = MaskSet({**saved.masks, name: kept})
    model = saved.load_base()
    other.apply_(model)
    adapted(model, other).save_pretrained(saved.adapter)
    (saved.base / MASKS_FILE).unlink(missing_ok=True)
    saved.masks.save(saved.adapter)
    with pytest.raises((ValueError, RuntimeError, FileNotFoundError), match=r"mask"):
        route(saved, saved.adapter)


@every_route
def test_on_another_base_it_does_not_load(saved: Saved, route: Route) -> None:
    model = saved.load_base()
    with torch.no_grad():
        weight = named_weights(model)["model.layers.1.mlp.down_proj.weight"]
        weight.view(-1)[int(weight.view(-1).nonzero()[3])] += 1e-3
    model.save_pretrained(saved.base)
    with pytest.raises((ValueError, RuntimeError), match=r"base (weights|model)"):
        route(saved, saved.adapter)


def test_in_another_precision_it_does_not_load(saved: Saved) -> None:
    with pytest.raises(ValueError, match="in the same precision"):
        PeftModel.from_pretrained(saved.load_base(dtype=torch.bfloat16), saved.adapter)


def test_a_bf16_base_in_fp32_is_the_same_base(tmp_path: Path) -> None:
    model, masks = sparse_model(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapted(wide, masks).save_pretrained(tmp_path / "adapter")
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    PeftModel.from_pretrained(narrow, tmp_path / "adapter")


def test_on_a_model_of_another_size_it_does_not_load(saved: Saved) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    larger = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    with pytest.raises(ValueError, match=r"has shape \(32, 32\) but the weight has \(64, 64\)"):
        PeftModel.from_pretrained(LlamaForCausalLM(larger), saved.adapter)


def test_on_a_dense_model_it_does_not_load(saved: Saved) -> None:
    from tiny_models import TINY

    with pytest.raises(RuntimeError, match="pruned weights in 14 tensors are not zero"):
        PeftModel.from_pretrained(TINY["llama"](), saved.adapter)


def test_damaged_masks_do_not_load(saved: Saved) -> None:
    file = saved.adapter / MASKS_FILE
    for damage in (b"", file.read_bytes()[:-100], b"not safetensors at all"):
        file.write_bytes(damage)
        with pytest.raises(ValueError, match="damaged"):
            by_peft_model(saved, saved.adapter)


def test_tensors_of_ordinary_lora_do_not_load_as_masked(saved: Saved, tmp_path: Path) -> None:
    modules = [name.removesuffix(".weight") for name in saved.masks]
    get_peft_model(saved.load_base(), LoraConfig(r=4, target_modules=modules)).save_pretrained(tmp_path / "lora")
    shutil.copy(tmp_path / "lora" / WEIGHTS, saved.adapter / WEIGHTS)
    with pytest.raises(RuntimeError, match="were not saved by MaskLoRA"):
        by_peft_model(saved, saved.adapter)


def test_tensors_of_other_masks_do_not_load_through_any_state_dict(saved: Saved) -> None:
    fewer = MaskSet({name: saved.masks[name] & (torch.rand(saved.masks.shape(name)) > 0.1) for name in saved.masks})
    model = saved.load_base()
    fewer.apply_(model)
    model = adapted(model, fewer)
    tensors = load_file(saved.adapter / WEIGHTS)
    with pytest.raises(RuntimeError, match="saved with another mask or another base model"):
        peft.set_peft_model_state_dict(model, tensors)
    with pytest.raises(RuntimeError, match="saved with another mask or another base model"):
        model.load_state_dict(by_peft_model(saved, saved.adapter).state_dict())


def test_transformers_state_dict_of_other_masks_fails_at_the_first_forward(saved: Saved) -> None:
    fewer = MaskSet({name: saved.masks[name] & (torch.rand(saved.masks.shape(name)) > 0.1) for name in saved.masks})
    model = saved.load_base()
    fewer.apply_(model)
    tensors = load_file(saved.adapter / WEIGHTS)
    model.load_adapter(peft_config=MaskLoraConfig(r=4, masks=fewer), adapter_state_dict=tensors)
    with pytest.raises(RuntimeError, match="saved with another mask or another base model"):
        logits(model)


def test_transformers_finds_masks_with_zeros_among_the_kept_only_beside_the_base(saved: Saved, tmp_path: Path) -> None:
    model = saved.load_base()
    name = next(iter(saved.masks))
    with torch.no_grad():
        weight = named_weights(model)[name].view(-1)
        weight[int(weight.nonzero()[0])] = 0  # kept, but zero: the zeros are not the mask any more
    model.save_pretrained(saved.base)
    peft_model = adapted(saved.load_base(), saved.masks)
    wanted = logits(peft_model)
    peft_model.save_pretrained(saved.adapter)
    with pytest.raises(FileNotFoundError, match="neither beside the base model nor its zeros"):
        by_transformers(saved, saved.adapter)
    assert torch.equal(logits(by_transformers_with_config(saved, saved.adapter)), wanted)
    saved.masks.save(saved.base)
    assert torch.equal(logits(by_transformers(saved, saved.adapter)), wanted)


def test_a_config_without_masks_is_neither_used_nor_saved(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs the masks"):
        get_peft_model(saved.load_base(), MaskLoraConfig())
    with pytest.raises(ValueError, match="needs the masks"):
        get_peft_model(saved.load_base(), MaskLoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="without masks cannot be saved"):
        MaskLoraConfig().save_pretrained(tmp_path / "config")


def test_masks_may_be_given_by_place(saved: Saved) -> None:
    config = MaskLoraConfig(r=4, masks=saved.adapter)
    assert config.masks == saved.masks
    get_peft_model(saved.load_base(), config)


# -- Trainer ---------------------------------------------------------------------------------------------------------


class Examples(torch.utils.data.Dataset):
    """Eight fixed sequences."""

    def __init__(self, model: PreTrainedModel) -> None:
        batch = tiny_batch(model, batch=8)
        self.rows = [{key: value[i] for key, value in batch.items()} for i in range(8)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


def trainer(saved: Saved, output_dir: Path, *, masks: MaskSet | None = None, base: PreTrainedModel | None = None):
    model = base if base is not None else saved.load_base()
    torch.manual_seed(7)
    peft_model = get_peft_model(model, MaskLoraConfig(r=4, masks=masks or saved.masks, task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    return Trainer(model=peft_model, args=arguments, train_dataset=Examples(model))


def test_trainer_checkpoints_carry_the_masks_and_resume_exactly(saved: Saved, tmp_path: Path) -> None:
    straight = trainer(saved, tmp_path / "run")
    straight.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert MASKS_FILE in files(checkpoint)
    resumed = trainer(saved, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    expected, found = straight.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    saved.masks.verify(resumed.model.merge_and_unload())


def test_trainer_does_not_resume_with_other_masks_or_another_base(saved: Saved, tmp_path: Path) -> None:
    trainer(saved, tmp_path / "run").train()
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    fewer = MaskSet({name: saved.masks[name] & (torch.rand(saved.masks.shape(name)) > 0.1) for name in saved.masks})
    pruned_again = saved.load_base()
    fewer.apply_(pruned_again)
    changed = saved.load_base()
    train(changed, steps=1)
    saved.masks.apply_(changed)
    for masks, base in ((fewer, pruned_again), (saved.masks, changed)):
        resumed = trainer(saved, tmp_path / "resumed", masks=masks, base=base)
        with pytest.raises(RuntimeError, match="saved with another mask or another base model"):
            resumed.train(resume_from_checkpoint=checkpoint)


def test_safetensors_metadata_is_what_peft_writes(saved: Saved, tmp_path: Path) -> None:
    tensors = load_file(saved.adapter / WEIGHTS)
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    assert (tmp_path / WEIGHTS).read_bytes() == (saved.adapter / WEIGHTS).read_bytes()
