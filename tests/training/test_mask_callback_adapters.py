"""Frozen sparse bases under an adapter, with `Trainer` and `SFTTrainer`, and full fine-tuning with `SFTTrainer`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import VOCABULARY
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from sparse_ft.adapters import MaskLoraConfig, merge_perp, prepare_perp
from sparse_ft.checkpoints import check_weights, read_sidecars
from sparse_ft.masks import MASKS_FILE, MaskSet
from sparse_ft.models import load_model, named_weights
from sparse_ft.training import MaskCallback

SparseModel = Callable[..., tuple[PreTrainedModel, MaskSet]]
MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<s>": 0, "</s>": 1, "<pad>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    fast = Tokenizer(WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture
def rows() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    return Dataset.from_dict({"input_ids": torch.randint(3, VOCABULARY, (16, 12), generator=generator).tolist()})


def sft_config(directory: Path, **more: Any) -> SFTConfig:
    return SFTConfig(
        output_dir=str(directory),
        use_cpu=True,
        bf16=False,
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_steps=2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        **more,
    )


class Gradients(TrainerCallback):
    """Which parameters have a gradient at the step."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        self.names = {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_sft_full_fine_tuning(
    sparse_model: SparseModel, tokenizer: PreTrainedTokenizerFast, rows: Dataset, tmp_path: Path
) -> None:
    model, masks = sparse_model()
    before = {name: weight.detach().clone() for name, weight in named_weights(model).items()}
    trainer = SFTTrainer(
        model, sft_config(tmp_path), train_dataset=rows, processing_class=tokenizer, callbacks=[MaskCallback(masks)]
    )
    trainer.train()
    masks.verify(trainer.model)
    assert not torch.equal(before["model.norm.weight"], trainer.model.model.norm.weight)
    saved, record = read_sidecars(tmp_path / "checkpoint-4")
    assert saved == masks
    check_weights(saved, record, load_model(tmp_path / "checkpoint-4"))


def test_sft_with_mask_lora_stays_sparse_when_merged(
    sparse_model: SparseModel, tokenizer: PreTrainedTokenizerFast, rows: Dataset, tmp_path: Path
) -> None:
    model, masks = sparse_model()
    base = {name: weight.detach().clone() for name, weight in named_weights(model).items()}
    gradients = Gradients()
    trainer = SFTTrainer(
        model,
        sft_config(tmp_path),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=MaskLoraConfig(r=4, masks=masks, task_type="CAUSAL_LM"),
        callbacks=[MaskCallback(masks), gradients],
    )
    assert isinstance(trainer.model, PeftModel)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Adapter .* updates pruned layers densely")
        trainer.train()
    assert gradients.names and all("lora_" in name for name in gradients.names)
    assert trainer.state.log_history[0]["sparsity/total"] == pytest.approx(masks.sparsity())
    masks.verify(trainer.model)
    merged = trainer.model.merge_and_unload()
    masks.verify(merged)
    changed = sum(int((named_weights(merged)[name] != base[name]).sum()) for name in masks)
    assert changed > 0.9 * sum(kept for kept, _ in masks.counts().values())
    restored = PeftModel.from_pretrained(sparse_model()[0], tmp_path / "checkpoint-4").merge_and_unload()
    for name, weight in named_weights(merged).items():
        torch.testing.assert_close(named_weights(restored)[name], weight)


def test_masks_of_a_peft_model_are_taken_from_its_base(sparse_model: SparseModel, make_trainer: MakeTrainer) -> None:
    model, masks = sparse_model("gpt2")
    callback = MaskCallback()
    peft_model = get_peft_model(model, MaskLoraConfig(r=2, masks=masks, task_type="CAUSAL_LM"))
    make_trainer(peft_model, [callback], max_steps=2).train()
    assert callback.masks == masks


def test_a_base_weight_revived_under_an_adapter_is_found(sparse_model: SparseModel, make_trainer: MakeTrainer) -> None:
    model, masks = sparse_model()
    peft_model = get_peft_model(model, MaskLoraConfig(r=2, masks=masks, task_type="CAUSAL_LM"))

    class Vandal(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            name = next(iter(masks))
            named_weights(peft_model)[name].detach()[tuple((~masks[name]).nonzero()[0])] = 1.0

    with pytest.raises(RuntimeError, match="1 pruned weights"):
        make_trainer(peft_model, [Vandal(), MaskCallback(masks)]).train()


def test_ordinary_lora_is_warned_of(sparse_model: SparseModel, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    model, masks = sparse_model()
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.warns(UserWarning, match=r"Adapter 'default' \(LORA\) updates pruned layers densely"):
        make_trainer(peft_model, [MaskCallback(masks)], max_steps=2, save_strategy="steps", save_steps=2).train()
    assert MaskSet.load(tmp_path / "run" / "checkpoint-2" / MASKS_FILE) == masks
    merged = peft_model.merge_and_unload()
    assert masks.revived(merged), "the warning is right: merging makes it dense"


def test_lora_on_dense_layers_is_not_warned_of(sparse_model: SparseModel, make_trainer: MakeTrainer) -> None:
    model, masks = sparse_model()
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Adapter .* updates pruned layers densely")
        make_trainer(peft_model, [MaskCallback(masks)], max_steps=2).train()
    masks.verify(peft_model.merge_and_unload())


class Preference(TrainerCallback):
    """Gives the model of step 4 the best mark, so that the best is not the last and has to be loaded."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        metrics["eval_mark"] = float(state.global_step == 4)


@pytest.mark.parametrize("method", ["mask_lora", "mask_lora+norms", "scale_lora", "norms"])
def test_the_best_of_an_adapters_checkpoints_is_what_the_user_gets(
    method: str, sparse_model: SparseModel, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    model, masks = sparse_model()
    trainer = make_trainer(
        prepare_perp(model, method, masks, r=4),
        [MaskCallback(masks), Preference()],
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=2,
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_mark",
        learning_rate=0.05,
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-4" and losses[2] != pytest.approx(losses[1], rel=1e-6)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[1], rel=1e-6)
    merged = merge_perp(trainer.model)
    masks.verify(merged)
    if method == "norms":
        restored = load_model(best)
    else:
        restored = merge_perp(PeftModel.from_pretrained(sparse_model()[0], best))
    for name, weight in named_weights(merged).items():
        torch.testing.assert_close(named_weights(restored)[name], weight, msg=name)
