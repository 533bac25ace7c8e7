"""`sparse-ft merge`: YAML as it is written for mergekit runs end to end on tiny checkpoints that transformers loads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from cli.workspace import Result, save_model, tree
from merging.checkpoints import near, read, write_tokenizer
from merging.lora import write_lora
from safetensors.torch import save_file
from torch.testing import assert_close

from sparse_ft.masks import MaskSet
from sparse_ft.models import load_model

Command = Callable[..., Result]
REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES = sorted((REPOSITORY / "recipes" / "merge").glob("*.yaml"))

SHAPES = {
    "task_arithmetic": """
merge_method: task_arithmetic
base_model: @base
models:
  - model: @math
    parameters: {weight: 0.35}
  - model: @code
    parameters: {weight: 0.65}
dtype: bfloat16
""",
    "ties with density gradients": """
models:
  - model: @base
  - model: @math
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: @code
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: @base
parameters:
  normalize: true
  int8_mask: true
dtype: float16
""",
    "slerp with filters": """
slices:
  - sources:
      - model: @base
        layer_range: [0, 2]
      - model: @math
        layer_range: [0, 2]
merge_method: slerp
base_model: @base
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: bfloat16
""",
    "dare_ties with weights": """
models:
  - model: @base
  - model: @math
    parameters: {density: 0.53, weight: 0.4}
  - model: @code
    parameters: {density: 0.53, weight: 0.3}
merge_method: dare_ties
base_model: @base
parameters: {int8_mask: true}
dtype: bfloat16
""",
    "linear soup": """
models:
  - model: @math
    parameters: {weight: 1.0}
  - model: @code
    parameters: {weight: 0.3}
merge_method: linear
dtype: float16
""",
    "stacked layers": """
merge_method: linear
slices:
  - sources:
      - model: @math
        layer_range: [0, 2]
        parameters: {weight: 1}
  - sources:
      - model: @math
        layer_range: [0, 1]
        parameters: {weight: 0.5}
      - model: @code
        layer_range: [1, 2]
        parameters: {weight: 0.5}
dtype: float16
tokenizer_source: base
""",
    "breadcrumbs": """
merge_method: breadcrumbs
base_model: @base
models:
  - {model: @math, parameters: {weight: 0.5, density: 0.9, gamma: 0.01}}
  - {model: @code, parameters: {weight: 0.5, density: 0.9, gamma: 0.01}}
dtype: float32
out_dtype: bfloat16
""",
    "della": """
merge_method: della
base_model: @base
models:
  - model: @math
    parameters: {weight: 0.5, density: 0.5, epsilon: 0.1}
  - model: @code
    parameters: {weight: [0.2, 0.8], density: 0.6, epsilon: 0.05}
parameters: {normalize: true, lambda: 1.1, rescale: true}
seed: 42
""",
    "tokenizer union": """
merge_method: dare_linear
base_model: @base
models:
  - model: @words
    parameters: {weight: 0.5, density: 0.5}
tokenizer:
  source: union
  pad_to_multiple_of: 16
  tokens:
    "<new>": {source: @words}
    "<s>": {source: {kind: model_token, model: @base, token: "</s>"}, force: true}
chat_template: chatml
""",
    "adapters as models": """
merge_method: ties
base_model: @base
models:
  - model: @base+@lora1
    parameters: {weight: 1, density: 0.5}
  - model: @math+@lora2
    parameters: {weight: 1, density: 0.5}
""",
    "modules": """
merge_method: task_arithmetic
base_model: @base
modules:
  text_decoder:
    slices:
      - sources:
          - {model: @base, layer_range: [0, 2]}
          - {model: @code, layer_range: [0, 2], parameters: {weight: 1}}
""",
    "darex_q, compat and one more level": """
merge_method: darex_q
base_model: @base
models:
  - {model: @math, parameters: {density: 0.5}}
parameters: {weight: 1, q: 0.7}
compat: mergekit
""",
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, two fine-tunes, one with more words, two adapters. Read only."""
    place = tmp_path_factory.mktemp("zoo")
    save_model(place / "base")
    base = read(place / "base")
    for seed, name in enumerate(("math", "code", "words"), 1):
        shutil.copytree(place / "base", place / name)
        save_file(near(base, seed), place / name / "model.safetensors", {"format": "pt"})
    ids = json.loads((place / "base" / "tokenizer.json").read_text())["model"]["vocab"]
    write_tokenizer(place / "words", {**ids, "<new>": len(ids)})
    for i, rank in ((1, 2), (2, 3)):
        factors = {
            f"model.layers.{j}.self_attn.q_proj.weight": (torch.ones(rank, 32), torch.ones(32, rank)) for j in (0, 1)
        }
        write_lora(place / f"lora{i}", factors, alpha=1)
    return place


@pytest.fixture
def merge(zoo: Path, tmp_path: Path, command: Command) -> Callable[..., Result]:
    """Run the command on a YAML in which `@name` stands for a model of the zoo; the output is `tmp_path / "out"`."""

    def run(text: str, *words: object) -> Result:
        (tmp_path / "merge.yaml").write_text(text.replace("@", f"{zoo}/"))
        return command("merge", tmp_path / "merge.yaml", tmp_path / "out", *words)

    return run


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_that_are_in_use_run_and_load(
    name: str, merge: Callable[..., Result], zoo: Path, tmp_path: Path
) -> None:
    before = tree(zoo)
    result = merge(SHAPES[name])
    assert result.code == 0, result.err
    assert "tensors merged" in result.out and tree(zoo) == before
    wanted = yaml.safe_load(SHAPES[name].replace("@", ""))
    model = load_model(tmp_path / "out")
    dtype = wanted.get("out_dtype", wanted.get("dtype", "float32"))
    assert str(model.dtype) == f"torch.{dtype}" and model.config.num_hidden_layers == (3 if "stacked" in name else 2)
    with torch.no_grad():
        logits = model.float()(torch.arange(8)[None]).logits
    assert torch.isfinite(logits).all() and logits.shape[-1] == len(read(tmp_path / "out")["lm_head.weight"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "merge_method" in card and ("base_model" not in wanted or "base` (base)" in card)
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["method"] == wanted["merge_method"] and record["seed"] == wanted.get("seed", 0)
    assert record["command"][:2] == ["sparse-ft", "merge"]


def test_adapters_of_different_rank_are_their_products(merge: Callable[..., Result], zoo: Path, tmp_path: Path) -> None:
    text = SHAPES["adapters as models"].replace("ties", "task_arithmetic").replace("density: 0.5", "density: 1")
    assert merge(text).code == 0
    base, math, out = read(zoo / "base"), read(zoo / "math"), read(tmp_path / "out")
    name = "model.layers.1.self_attn.q_proj.weight"
    # alpha / r * B A of ones is 1 everywhere, whatever the rank
    assert_close(out[name], base[name] + 1 + (math[name] + 1 - base[name]), atol=1e-5, rtol=0)


def test_compat_changes_the_formula_and_the_seed_the_draw(merge: Callable[..., Result], tmp_path: Path) -> None:
    def weights(*words: object) -> dict[str, torch.Tensor]:
        result = merge(SHAPES["dare_ties with weights"].replace("bfloat16", "float32"), "--overwrite", *words)
        assert result.code == 0, result.err
        return read(tmp_path / "out")

    first, again, seeded, other = (
        weights(),
        weights("--threads", 1),
        weights("--seed", 1),
        weights("--compat", "mergekit"),
    )
    name = "model.layers.0.mlp.up_proj.weight"
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first[name], seeded[name]) and not torch.equal(first[name], other[name])
    assert "mergekit's (`compat: mergekit`)" in (tmp_path / "out" / "README.md").read_text()


def test_a_dry_run_reports_and_writes_nothing(merge: Callable[..., Result], tmp_path: Path, command: Command) -> None:
    for word in ("--dry_run", "--plan"):
        result = merge(SHAPES["task_arithmetic"], word)
        assert result.code == 0 and "mean |delta|" in result.out and "output: 21 tensors" in result.out
        assert [path.name for path in tmp_path.iterdir()] == ["merge.yaml"]
    assert command("merge", tmp_path / "merge.yaml", "--dry-run").code == 0, "no output directory is needed"


def test_shards_and_the_index(merge: Callable[..., Result], tmp_path: Path) -> None:
    assert merge(SHAPES["linear soup"], "--max_shard_size", "20kB").code == 0
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    load_model(tmp_path / "out")


def test_side_files_of_the_base_come_along_and_its_records_do_not(
    merge: Callable[..., Result], zoo: Path, tmp_path: Path
) -> None:
    shutil.copytree(zoo, tmp_path / "zoo")
    base = tmp_path / "zoo" / "base"
    for name in ("LICENSE", "merge.json", "trainer_state.json"):
        (base / name).write_text("{}")
    text = SHAPES["task_arithmetic"].replace("@", f"{tmp_path}/zoo/")
    assert merge(text).code == 0
    out = tmp_path / "out"
    assert (out / "LICENSE").exists() and not (out / "trainer_state.json").exists()
    assert json.loads((out / "merge.json").read_text())["method"] == "task_arithmetic"
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


# -- sparse models -----------------------------------------------------------------------------------------------------


@pytest.fixture
def sparse(pruned: Path, tmp_path: Path) -> Path:
    """Two fine-tunes that share the masks of a pruned model, and one pruned otherwise."""
    masks, weights = MaskSet.load(pruned), read(pruned)
    for seed, name in enumerate("ab", 1):
        shutil.copytree(pruned, tmp_path / name)
        tuned = near(weights, seed, 1e-2)
        masks.apply_({name: tuned[name] for name in masks})
        save_file(tuned, tmp_path / name / "model.safetensors", {"format": "pt"})
    shutil.copytree(pruned, tmp_path / "c")
    other = MaskSet.from_scores({n: -weights[n].abs() for n in masks}, pattern="2:4")
    tuned = near(weights, 3, 1e-2)
    other.apply_({name: tuned[name] for name in other})
    save_file(tuned, tmp_path / "c" / "model.safetensors", {"format": "pt"})
    other.save(tmp_path / "c")
    return tmp_path


SOUP = "merge_method: linear\nmodels: [{model: %s/a}, {model: %s/%s}]\nparameters: {weight: 1}\n"


def test_a_soup_of_models_that_share_a_mask_keeps_it(
    sparse: Path, merge: Callable[..., Result], command: Command
) -> None:
    result = merge(SOUP % (sparse, sparse, "b"))
    assert result.code == 0 and "50.00% sparse" in result.out
    masks, out = MaskSet.load(sparse / "out"), read(sparse / "out")
    assert masks == MaskSet.load(sparse / "a")
    masks.verify(out)
    name = next(iter(masks))
    assert int((out[name] == 0).sum()) == out[name].numel() // 2
    assert_close(out[name], (read(sparse / "a")[name] + read(sparse / "b")[name]) / 2)
    assert command("report", sparse / "out").code == 0, "a sparse checkpoint like any other"


def test_models_with_different_masks_fill_up_unless_told(sparse: Path, merge: Callable[..., Result]) -> None:
    text = SOUP % (sparse, sparse, "c")
    result = merge(text)
    assert result.code == 0 and "their zeros fill up" in result.out and not (sparse / "out" / MASKS).exists()
    assert (
        "use intersection, union, base or a pattern" in merge(text + "preserve_masks: shared", "--overwrite").complaint
    )
    both = MaskSet.load(sparse / "a"), MaskSet.load(sparse / "c")
    for policy, expected in (("intersection", both[0] & both[1]), ("union", both[0] | both[1])):
        result = merge(text + f"preserve_masks: {policy}", "--overwrite")
        assert result.code == 0, result.err
        masks = MaskSet.load(sparse / "out")
        assert all(torch.equal(masks[name], expected[name]) for name in expected)
        masks.verify(read(sparse / "out"))


def test_a_merge_is_pruned_again_to_a_pattern(sparse: Path, merge: Callable[..., Result]) -> None:
    result = merge(SOUP % (sparse, sparse, "c") + "preserve_masks: {pattern: 2:4}")
    assert result.code == 0, result.err
    masks, out = MaskSet.load(sparse / "out"), read(sparse / "out")
    assert {str(pattern) for pattern in masks.patterns.values()} == {"2:4"}
    name = next(iter(masks))
    mean = (read(sparse / "a")[name] + read(sparse / "c")[name]) / 2
    groups = mean.abs().view(-1, 4)
    kept = groups >= groups.sort(dim=1, descending=True).values[:, 1:2]
    assert torch.equal(out[name].view(-1, 4) != 0, kept & (groups > 0))


MASKS = "sparse_masks.safetensors"

# -- refusals ----------------------------------------------------------------------------------------------------------

TASK = SHAPES["task_arithmetic"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--sede", "1"], "Unknown option '--sede'. Did you mean '--seed'?"),
        (["--threads", "0"], "--threads is 0"),
        (["--threads", "x"], "threads: invalid int value"),
        (["--compat", "mergekat"], "Unknown compat 'mergekat'"),
        (["--max_shard_size", "big"], "give a size like 500MB"),
        (["third"], "Unexpected argument 'third'"),
        (["--output_dir", "elsewhere"], "output_dir is given twice"),
    ],
)
def test_wrong_words(merge: Callable[..., Result], tmp_path: Path, words: list[str], reason: str) -> None:
    result = merge(TASK, *words)
    assert result.code == 2 and reason in result.complaint
    assert [path.name for path in tmp_path.iterdir()] == ["merge.yaml"]


def test_outputs_that_cannot_be(merge: Callable[..., Result], zoo: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "merge.yaml").write_text(TASK.replace("@", f"{zoo}/"))
    file = tmp_path / "merge.yaml"
    assert "No output directory was given" in command("merge", file).complaint
    assert "yaml is missing" in command("merge").complaint
    assert "is also an input" in command("merge", file, zoo / "math", "--overwrite").complaint
    assert "would delete the input" in command("merge", file, zoo, "--overwrite").complaint
    assert "is a file" in command("merge", file, file).complaint
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    assert "is not empty" in command("merge", file, tmp_path / "full").complaint
    assert "No merge configuration" in command("merge", tmp_path / "absent.yaml", tmp_path / "out").complaint
    assert "is a shipped template" in command("merge", "merge/dare_ties", tmp_path / "out").complaint
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_had_offline(merge: Callable[..., Result], tmp_path: Path) -> None:
    result = merge(TASK.replace("@math", "no-such-owner/no-such-model"))
    assert result.code == 2 and "'no-such-owner/no-such-model'" in result.complaint
    assert not (tmp_path / "out").exists()


def test_other_vocabularies_name_the_option(merge: Callable[..., Result], zoo: Path, tmp_path: Path) -> None:
    tensors = read(zoo / "math")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:90].clone()
    shutil.copytree(zoo / "math", tmp_path / "short")
    save_file(tensors, tmp_path / "short" / "model.safetensors", {"format": "pt"})
    text = TASK.replace("@math", str(tmp_path / "short"))
    assert "--truncate_embeddings to keep the first 90" in merge(text).complaint
    result = merge(text, "--truncate_embeddings")
    assert result.code == 0, result.err
    assert load_model(tmp_path / "out").config.vocab_size == 90


def test_values_that_are_no_numbers_are_refused_and_nothing_stays(
    merge: Callable[..., Result], zoo: Path, tmp_path: Path
) -> None:
    tensors = read(zoo / "math")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = float("nan")
    shutil.copytree(zoo / "math", tmp_path / "nan")
    save_file(tensors, tmp_path / "nan" / "model.safetensors", {"format": "pt"})
    result = merge(TASK.replace("@math", str(tmp_path / "nan")))
    assert result.code == 2 and "'model.layers.0.mlp.up_proj.weight'" in result.complaint
    assert not (tmp_path / "out").exists()


# -- what is loaded ----------------------------------------------------------------------------------------------------


def test_a_merge_loads_no_model_library_until_a_tokenizer_is_asked_for(zoo: Path, tmp_path: Path) -> None:
    for i, name in enumerate(("linear soup", "adapters as models", "tokenizer union")):
        (tmp_path / f"{i}.yaml").write_text(SHAPES[name].replace("@", f"{zoo}/"))
    code = (
        "import sys\nfrom sparse_ft.cli.main import main\nfor i in range(3):\n"
        f"    assert main(['merge', f'{tmp_path}/{{i}}.yaml', f'{tmp_path}/{{i}}']) == 0\n"
        "    print('LOADED', *[m for m in ('transformers', 'peft', 'trl') if m in sys.modules])"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    loaded = [set(line.split()[1:]) for line in done.stdout.splitlines() if line.startswith("LOADED")]
    assert loaded == [set(), set(), {"transformers"}]


# -- recipes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_run(path: Path, merge: Callable[..., Result], zoo: Path) -> None:
    text = path.read_text()
    names = sorted({ref for ref in ("org/base", "org/math", "org/code", "org/lora-a", "org/lora-b") if ref in text})
    assert names and "sparse-ft merge" in text
    for ref, model in zip(
        ("org/base", "org/math", "org/code", "org/lora-a", "org/lora-b"), ("base", "math", "code", "lora1", "lora2"),
        strict=True,
    ):  # fmt: skip
        text = text.replace(ref, str(zoo / model))
    result = merge(text.replace("[0, 24]", "[0, 2]").replace("[8, 32]", "[1, 2]"))
    if path.stem == "sparse_soup":
        assert "no model has masks" in result.complaint
        return
    assert result.code == 0, result.err
