"""The commands in a row on real directories; zeros are counted in the files with numpy, not by the code under test."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cli.workspace import Result, save_model, tree
from safetensors.numpy import load_file
from tiny_models import TINY
from transformers import AutoModelForCausalLM

from sparse_ft.cli.main import main
from sparse_ft.masks import MaskSet

Command = Callable[..., Result]
Arrays = dict[str, np.ndarray]


def arrays(directory: Path) -> Arrays:
    """Every tensor of a checkpoint, read with numpy."""
    found: Arrays = {}
    for file in sorted(directory.glob("model*.safetensors")):
        found.update(load_file(file))
    return found


def matrices(directory: Path) -> Arrays:
    """The matrices inside the blocks."""
    return {n: a for n, a in arrays(directory).items() if ".layers." in n or ".h." in n if a.ndim == 2}


def digest_of_files(directory: Path) -> str:
    sha = hashlib.sha256()
    for name, array in sorted(arrays(directory).items()):
        sha.update(name.encode() + array.tobytes())
    return sha.hexdigest()


def retrain(command: Command, source: Path, text: Path, target: Path, *words: object) -> Result:
    fixed = ["--model_name_or_path", source, "--output_dir", target, "--dataset", text, "--sequence_length", 16]
    result = command("retrain", *fixed, "--max_steps", 4, "--logging_steps", 1, "--learning_rate", "1e-2", *words)
    assert result.code == 0, result.err
    return result


def test_pruned_files_have_exactly_the_zeros_of_the_pattern(dense: Path, pruned: Path) -> None:
    before, after = matrices(dense), matrices(pruned)
    assert set(before) == set(after) and len(after) == 14
    for name, array in after.items():
        groups = array.reshape(array.shape[0], -1, 4)
        assert ((groups == 0).sum(-1) == 2).all(), name
        kept = groups != 0
        assert (groups[kept] == before[name].reshape(groups.shape)[kept]).all(), f"{name}: a kept weight changed"
        largest = np.sort(np.abs(before[name].reshape(groups.shape)), axis=-1)[..., 2:]
        assert (np.sort(np.abs(groups), axis=-1)[..., 2:] == largest).all(), f"{name}: not the largest were kept"
    rest = {name for name in arrays(dense) if name not in after}
    assert rest and all((arrays(dense)[name] == arrays(pruned)[name]).all() for name in rest)


def test_pruned_directory_is_an_ordinary_model_with_sidecars(pruned: Path) -> None:
    names = {path.name for path in pruned.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "sparse_masks.safetensors", "sparse_ft.json"} <= names
    assert {"report.html", "report.json"} <= names
    assert "sparsity_config" not in json.loads((pruned / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(pruned)
    MaskSet.load(pruned).verify(model)
    record = json.loads((pruned / "sparse_ft.json").read_text())
    assert record["command"] == "prune" and record["pattern"] == "2:4" and record["sparsity"] == 0.5
    assert record["arguments"]["method"] == "magnitude" and record["arguments"]["pattern"] == "2:4"
    assert [entry["label"] for entry in record["evaluation"]] == ["dense", "pruned"]


def test_perplexities_are_those_of_the_model(dense: Path, pruned: Path, text: Path) -> None:
    """The whole test text in windows of 32, the loss by transformers."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(dense)((text / "test.txt").read_text(), return_tensors="pt").input_ids[0]
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)
    entries = json.loads((pruned / "sparse_ft.json").read_text())["evaluation"]
    for entry, directory in zip(entries, (dense, pruned), strict=True):
        model = AutoModelForCausalLM.from_pretrained(directory)
        with torch.no_grad():
            loss = model(input_ids=windows, labels=windows).loss
        assert entry["nll"] == pytest.approx(float(loss), rel=1e-5)
        assert entry["protocol"]["windows"] == len(windows) and entry["protocol"]["split"] == "test"


@pytest.mark.parametrize(
    ("family", "method"),
    [("gpt2", "sparsegpt"), ("opt", "wanda"), ("neox", "magnitude"), ("qwen", "sparsegpt"), ("mixtral", "magnitude")],
)
def test_chain_on_other_families(family: str, method: str, tmp_path: Path, text: Path, command: Command) -> None:
    """prune, retrain, eval and report; the zeros of the pruned model are in the retrained one."""
    source = save_model(tmp_path / "dense", family)
    sparse, recovered = tmp_path / "sparse", tmp_path / "recovered"
    words = ["--dataset", text, "--sequence_length", 16, "--method", method]
    words += [] if method == "magnitude" else ["--samples", 8]
    result = command("prune", "--model_name_or_path", source, "--output_dir", sparse, "--pattern", "2:4", *words)
    assert result.code == 0, result.err
    retrain(command, sparse, text, recovered)
    masks = MaskSet.load(recovered)
    assert masks == MaskSet.load(sparse) and masks.sparsity() == 0.5
    before, after = arrays(sparse), arrays(recovered)
    assert set(before) == set(after) and all(before[name].shape == after[name].shape for name in before)
    zeros = {name: array == 0 for name, array in before.items() if (array == 0).mean() > 0.4}
    pruned_count = sum(total - kept for kept, total in masks.counts().values())
    assert sum(int(z.sum()) for name, z in zeros.items() if before[name].ndim > 1) >= pruned_count
    for name, zero in zeros.items():
        if before[name].ndim > 1:
            assert (after[name][zero] == 0).all(), f"{name}: a pruned weight revived"
    assert any((before[name] != after[name]).any() for name in zeros), "nothing was trained"
    assert command("eval", recovered, "--dataset", text, "--sequence_length", 16).code == 0
    result = command("report", recovered)
    assert result.code == 0 and "retrain" in result.out and "50.00%" in result.out


@pytest.mark.parametrize("method", ["mask_lora", "full"])
def test_retraining(method: str, pruned: Path, text: Path, tmp_path: Path, command: Command) -> None:
    target = tmp_path / "out"
    result = retrain(command, pruned, text, target, "--method", method, "--sequence_length", 32)
    before, after = matrices(pruned), matrices(target)
    for name, array in after.items():
        assert ((array == 0) == (before[name] == 0)).all(), name
        assert (array != before[name]).any(), f"{name} was not trained"
    rest = {name for name in arrays(pruned) if name not in after}
    changed = [name for name in rest if (arrays(pruned)[name] != arrays(target)[name]).any()]
    assert bool(changed) == (method == "full"), "MaskLoRA trains nothing but the adapters, full trains everything"
    record = json.loads((target / "sparse_ft.json").read_text())
    labels = [entry["label"] for entry in record["evaluation"]]
    assert labels == ["dense", "pruned", "retrained"]
    values = [entry["perplexity"] for entry in record["evaluation"]]
    assert values[2] < values[1], "four steps at this rate lower the perplexity"
    assert [step["command"] for step in record["history"]] == ["prune"]
    report = json.loads((target / "report.json").read_text())
    assert [step["command"] for step in report["steps"]] == ["prune"]
    losses = [entry["loss"] for entry in report["history"][method] if "loss" in entry]
    assert len(losses) == 4
    assert "retrain" in report["command"] and "--max_steps 4" in report["command"]
    assert not (tmp_path / "out.run").exists()
    assert "verified" in result.out and "retrained" in result.out
    AutoModelForCausalLM.from_pretrained(target)


def test_saved_files_are_the_source_s_but_for_the_weights(
    pruned: Path, text: Path, tmp_path: Path, command: Command
) -> None:
    retrain(command, pruned, text, tmp_path / "out", "--no_eval")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (pruned / name).read_bytes(), name


@pytest.mark.parametrize("method", ["mask_lora", "full"])
def test_bf16_checkpoints_stay_bf16(method: str, text: Path, tmp_path: Path, command: Command) -> None:
    model = TINY["llama"]().to(torch.bfloat16)
    save_model(tmp_path / "dense")
    model.save_pretrained(tmp_path / "dense")
    words = ["--model_name_or_path", tmp_path / "dense", "--sparsity", 0.6, "--output_dir", tmp_path / "sparse"]
    assert command("prune", *words).code == 0
    retrain(command, tmp_path / "sparse", text, tmp_path / "out", "--method", method, "--bf16")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    masks = MaskSet.load(tmp_path / "out")
    masks.verify(loaded)
    assert masks.sparsity() == pytest.approx(0.6, abs=0.001)


def test_adapter_by_itself_equals_the_merged_model(pruned: Path, text: Path, tmp_path: Path, command: Command) -> None:
    retrain(command, pruned, text, tmp_path / "out", "--save_adapter", tmp_path / "adapter", "--r", 4)
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "sparse_masks.safetensors", "sparse_ft.json"} <= names
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4
    words = ["--dataset", text, "--sequence_length", 16, "--no_record"]
    merged, adapter = command("eval", tmp_path / "out", *words), command("eval", tmp_path / "adapter", *words)
    assert merged.code == adapter.code == 0
    assert float(merged.out.split()[1]) == pytest.approx(float(adapter.out.split()[1]), abs=2e-3)


def test_masks_are_taken_from_zeros_when_there_are_none(
    pruned: Path, text: Path, tmp_path: Path, command: Command
) -> None:
    foreign = tmp_path / "foreign"
    shutil.copytree(pruned, foreign, ignore=shutil.ignore_patterns("sparse_*", "report*"))
    result = retrain(command, foreign, text, tmp_path / "out", "--no_eval")
    assert "taken from its zeros, pattern 2:4" in result.out and "0 kept weights are zero" in result.out
    assert MaskSet.load(tmp_path / "out") == MaskSet.load(pruned)


def test_eval_of_any_directory_leaves_it_alone(dense: Path, text: Path, command: Command) -> None:
    before = tree(dense)
    result = command("eval", dense, "--dataset", text, "--sequence_length", 32, "--max_windows", 3)
    assert result.code == 0
    assert "3 windows of 32 tokens" in result.out and "float32" in result.out
    assert tree(dense) == before


def test_eval_is_recorded_once_per_protocol(pruned: Path, text: Path, tmp_path: Path, command: Command) -> None:
    own = tmp_path / "own"
    shutil.copytree(pruned, own)
    for length in (32, 16, 16):
        assert command("eval", own, "--dataset", text, "--sequence_length", length).code == 0
    record = json.loads((own / "sparse_ft.json").read_text())
    lengths = [(entry["label"], entry["protocol"]["sequence_length"]) for entry in record["evaluation"]]
    assert lengths == [("dense", 32), ("pruned", 32), ("pruned", 16)]
    assert record["weights_digest"] == json.loads((pruned / "sparse_ft.json").read_text())["weights_digest"]
    report = json.loads((own / "report.json").read_text())
    assert report["command"].startswith("sparse-ft prune ") and len(report["evaluation"]) == 3
    before = tree(own)
    assert command("eval", own, "--dataset", text, "--sequence_length", 8, "--no_record").code == 0
    assert tree(own) == before


def test_eval_into_a_directory_of_its_own(dense: Path, text: Path, tmp_path: Path, command: Command) -> None:
    target = tmp_path / "result"
    assert command("eval", dense, "--dataset", text, "--sequence_length", 32, "--output_dir", target).code == 0
    assert {path.name for path in target.iterdir()} == {"report.html", "report.json"}


def test_report_of_a_dense_model(dense: Path, command: Command) -> None:
    before = tree(dense)
    result = command("report", dense)
    assert result.code == 0 and "dense" in result.out
    assert tree(dense) == before


def test_report_makes_a_lost_page_again(pruned: Path, tmp_path: Path, command: Command) -> None:
    own = tmp_path / "own"
    shutil.copytree(pruned, own, ignore=shutil.ignore_patterns("report*"))
    result = command("report", own)
    assert result.code == 0, result.err
    report = json.loads((own / "report.json").read_text())
    assert report["sparsity"]["sparsity"] == 0.5 and "--pattern 2:4" in report["command"]
    assert "perplexity" in result.out and "magnitude 2:4" in result.out


def test_targets_come_from_the_configuration_alone(tmp_path: Path, command: Command) -> None:
    save_model(tmp_path / "model", "gpt2")
    (tmp_path / "model" / "model.safetensors").unlink()
    result = command("report", tmp_path / "model", "--targets", "--exclude", "c_proj")
    assert result.code == 0, result.err
    lines = [line.split() for line in result.out.splitlines()[1:-1]]
    assert [line[0] for line in lines] == [
        f"transformer.h.{block}.{name}.weight" for block in (0, 1) for name in ("attn.c_attn", "mlp.c_fc")
    ]
    assert "32 x 96" in result.out and "(in, out) conv1d" in result.out
    assert "4 prunable tensors in 2 blocks" in result.out


def test_overwrite_replaces_the_whole_directory(dense: Path, tmp_path: Path, command: Command) -> None:
    words = ["prune", "--model_name_or_path", dense, "--output_dir", tmp_path / "out"]
    assert command(*words, "--sparsity", 0.5).code == 0
    (tmp_path / "out" / "stray.txt").write_text("old")
    assert command(*words, "--sparsity", 0.7, "--overwrite").code == 0
    assert not (tmp_path / "out" / "stray.txt").exists()
    assert MaskSet.load(tmp_path / "out").sparsity() == pytest.approx(0.7, abs=0.001)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_seed_decides_random_pruning(dense: Path, tmp_path: Path, command: Command) -> None:
    digests = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        words = ["--method", "random", "--sparsity", 0.5, "--seed", seed, "--output_dir", tmp_path / name]
        assert command("prune", "--model_name_or_path", dense, *words).code == 0
        digests[name] = digest_of_files(tmp_path / name)
    assert digests["a"] == digests["b"] != digests["c"]


@pytest.mark.parametrize("verb", ["prune", "retrain", "report"])
def test_a_revived_weight_fails_the_command(
    verb: str, dense: Path, pruned: Path, text: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that come out with a pruned weight alive are not published, and the exit code says so."""
    own = tmp_path / "own"
    shutil.copytree(pruned, own)
    if verb == "report":
        _revive(own)
        _forge_record(own)
        assert command("report", own).code == 1
        return
    import sparse_ft.cli.publishing as publishing

    real = publishing.written_weights

    def revived_on_the_way(directory: Path, masks: MaskSet) -> object:
        _revive(directory)
        return real(directory, masks)

    monkeypatch.setattr(publishing, "written_weights", revived_on_the_way)
    if verb == "prune":
        words = ["--model_name_or_path", dense, "--pattern", "2:4"]
    else:
        words = ["--model_name_or_path", own, "--dataset", text, "--sequence_length", 16, "--max_steps", 1]
    result = command(verb, *words, "--output_dir", tmp_path / "out")
    assert result.code == 1, result.err
    assert "not zero" in result.complaint and "q_proj" in result.complaint
    assert not (tmp_path / "out").exists()


def _revive(directory: Path) -> None:
    """Make one pruned weight of the file alive."""
    from safetensors.numpy import save_file

    tensors = load_file(directory / "model.safetensors")
    weight = tensors["model.layers.1.self_attn.q_proj.weight"]
    weight.reshape(-1)[np.flatnonzero(weight.reshape(-1) == 0)[0]] = 0.5
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _forge_record(directory: Path) -> None:
    """Give the record the digest of the changed weights, as somebody who edits both would."""
    masks, weights = MaskSet.load(directory), AutoModelForCausalLM.from_pretrained(directory)
    record = json.loads((directory / "sparse_ft.json").read_text())
    record["weights_digest"] = masks.weights_digest(weights)
    (directory / "sparse_ft.json").write_text(json.dumps(record))


def test_main_reads_the_words_of_the_process(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["prune", "--model_name_or_path", str(dense), "--sparsity", "0.5", "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["sparse-ft", *words])
    assert main() == 0
    assert (tmp_path / "out" / "sparse_ft.json").is_file()


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_models_that_do_not_predict_the_next_token(family: str, text: Path, tmp_path: Path, command: Command) -> None:
    """They can be pruned with calibration; perplexity is left out and said to be, retraining is refused."""
    source = save_model(tmp_path / "dense", family)
    options = ["--method", "wanda", "--sparsity", 0.5, "--dataset", text, "--sequence_length", 16, "--samples", 4]
    result = command("prune", "--model_name_or_path", source, "--output_dir", tmp_path / "sparse", *options)
    assert result.code == 0, result.err
    assert "Not evaluated: perplexity is for causal language models" in result.out
    masks = MaskSet.load(tmp_path / "sparse")
    assert masks.sparsity() == pytest.approx(0.5, abs=0.01)
    words = ["--model_name_or_path", tmp_path / "sparse", "--dataset", text, "--output_dir", tmp_path / "out"]
    result = command("retrain", *words)
    assert result.code == 2 and "next-token" in result.complaint and "MaskCallback" in result.complaint
    assert not (tmp_path / "out").exists()


def test_a_text_without_test_split_is_not_evaluated_on(
    dense: Path, text: Path, tmp_path: Path, command: Command
) -> None:
    words = ["prune", "--model_name_or_path", dense, "--sparsity", 0.5, "--dataset", text / "train.txt"]
    result = command(*words, "--output_dir", tmp_path / "out")
    assert result.code == 0 and "Not evaluated" in result.out and "--eval_dataset" in result.out
    result = command(*words, "--output_dir", tmp_path / "second", "--eval_dataset", text / "test.txt")
    assert result.code == 0 and "pruned" in result.out and "Not evaluated" not in result.out


def test_pickled_weights_when_they_are_allowed(dense: Path, text: Path, tmp_path: Path, command: Command) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(dense, pickled)
    state = AutoModelForCausalLM.from_pretrained(dense).state_dict()
    torch.save(state, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    for source, target in ((dense, "a"), (pickled, "b")):
        words = ["--sparsity", 0.5, "--output_dir", tmp_path / target, "--allow_pickle"]
        assert command("prune", "--model_name_or_path", source, *words).code == 0
    assert MaskSet.load(tmp_path / "a") == MaskSet.load(tmp_path / "b")
    assert digest_of_files(tmp_path / "a") == digest_of_files(tmp_path / "b")
    words = ["--dataset", text, "--sequence_length", 32]
    one, other = command("eval", dense, *words), command("eval", pickled, *words, "--allow_pickle")
    assert one.code == other.code == 0 and one.out == other.out.replace(str(pickled), str(dense))


def test_access_tokens_are_not_written_down(pruned: Path, text: Path, tmp_path: Path, command: Command) -> None:
    retrain(command, pruned, text, tmp_path / "out", "--no_eval", "--hub_token", "hf_secret", "--hub-token=hf_secret")
    for name in ("sparse_ft.json", "report.html", "report.json"):
        assert "hf_secret" not in (tmp_path / "out" / name).read_text(), name


def test_evaluation_during_training(pruned: Path, text: Path, tmp_path: Path, command: Command) -> None:
    retrain(command, pruned, text, tmp_path / "out", "--eval_strategy", "steps", "--eval_steps", 2)
    history = json.loads((tmp_path / "out" / "report.json").read_text())["history"]["mask_lora"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [2, 4]
