"""Ours under `compat: mergekit` beside mergekit itself, on the same random models: the largest difference of a weight.

    python tests/benchmarks/peer_merge.py --peer_python PYTHON     # the interpreter of a venv that has mergekit

Methods without random masks only: mergekit draws from one global generator, so its masks cannot be had again; those
methods are compared in the tests, with masks given. A tiny fp32 Llama and two fine-tunes, weights drawn at random.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from bench_merge import mergekit_version
from results import REPOSITORY, write_result
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_ft.merging import merge_checkpoints, prepare_merge

CONFIG = dict(
    hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, vocab_size=300,
    tie_word_embeddings=False,
)  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "linear": {"weight": [0.7, 0.4]},
    "task_arithmetic": {"weight": [0.7, 0.4], "lambda": 0.9},
    "ties": {"weight": [0.7, 0.4], "density": [0.3, 0.5]},
    "breadcrumbs": {"weight": [0.7, 0.4], "density": [0.8, 0.9], "gamma": [0.01, 0.02]},
    "breadcrumbs_ties": {"weight": [0.7, 0.4], "density": [0.8, 0.9], "gamma": [0.01, 0.02]},
    "slerp": {"t": [0.0, 0.3, 1.0]},
}


def build(place: Path) -> None:
    """`base`, `a` and `b` below a directory."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).float()
    model.save_pretrained(place / "base")
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    for label in ("a", "b"):
        with torch.no_grad():
            for name, weight in model.state_dict().items():
                weight.copy_(start[name] + 0.01 * torch.randn_like(weight))
        model.save_pretrained(place / label)


def merge_file(place: Path, method: str) -> Path:
    """The YAML of a method."""
    settings = SHAPES[method]
    of_model = {key: value for key, value in settings.items() if isinstance(value, list) and key != "t"}
    content: dict[str, Any] = {
        "merge_method": method,
        "dtype": "float32",
        "models": [
            {"model": str(place / label), "parameters": {key: value[k] for key, value in of_model.items()}}
            for k, label in enumerate("ab")
        ],
        "parameters": {key: value for key, value in settings.items() if key not in of_model},
    }
    if method == "slerp":
        content["models"] = [{"model": str(place / "base")}, {"model": str(place / "a")}]
    if method != "linear":
        content["base_model"] = str(place / "base")
    file = place / f"{method}.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return file


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def main() -> None:
    """Merge both ways, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer_python", required=True, help="interpreter of a venv that has mergekit")
    parser.add_argument("--output", default=str(REPOSITORY / "docs/results/merging/peer.json"))
    args = parser.parse_args()
    program = Path(args.peer_python).with_name("mergekit-yaml")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        build(place)
        for method in SHAPES:
            file = merge_file(place, method)
            command = [str(program), str(file), str(place / f"{method}-theirs"), "--no-copy-tokenizer"]
            subprocess.run(command, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
            merge_checkpoints(prepare_merge(file, compat="mergekit"), place / f"{method}-ours", progress=False)
            theirs, ours = weights(place / f"{method}-theirs"), weights(place / f"{method}-ours")
            assert theirs.keys() == ours.keys(), f"{method}: other tensors"
            worst = max(float((theirs[name] - ours[name]).abs().max()) for name in ours)
            rows.append({"method": method, "tensors": len(ours), "largest_difference": worst})
            print(rows[-1], flush=True)
    protocol = {"model": CONFIG, "dtype": "float32", "mergekit": mergekit_version(args.peer_python)}
    print(write_result(args.output, __file__, rows, protocol, [0]))


if __name__ == "__main__":
    main()
