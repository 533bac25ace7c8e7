"""Perplexity against formulas written here: a plain loop in float64 over windows and positions."""

from __future__ import annotations

import gzip
import math
import warnings
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import CAUSAL, TINY, VOCABULARY
from torch import nn

from sparse_ft.evaluation import perplexity

DENSE_LLAMA_WT2 = {240: 42.07, 480: 37.15}  # README beside the model, windows of 256


def random_ids(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def nll_of(model: nn.Module, window: list[int], position: int) -> float:
    """-log p(window[position] | window[:position]) in float64, by the definition of softmax."""
    row = model(input_ids=torch.tensor([window[:position]])).logits[0, -1].double()
    shifted = row - row.max()
    return float(shifted.exp().sum().log() - shifted[window[position]])


def scored_once(length: int, total: int, stride: int) -> list[tuple[int, int]]:
    """(window start, position in the text) of each scored token: the first window that reaches it with any context."""
    pairs, seen = [], set()
    for start in range(0, total - length + 1, stride):
        for position in range(start + 1, start + length):
            if position not in seen:
                seen.add(position)
                pairs.append((start, position))
    return pairs


class Uniform(nn.Module):
    """Logits that are equal, or that a function of the token ids gives."""

    def __init__(self, vocabulary: int, value: float = 0.5) -> None:
        super().__init__()
        self.vocabulary, self.value = vocabulary, value
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        shape = (*input_ids.shape, self.vocabulary)
        return SimpleNamespace(logits=torch.full(shape, self.value, dtype=self.scale.dtype) * self.scale)


@pytest.mark.parametrize("name", CAUSAL)
def test_equals_a_plain_loop(name: str) -> None:
    model, ids = TINY[name](), random_ids(50)
    result = perplexity(model, ids, sequence_length=12)
    nlls = [
        nll_of(model, ids[start : start + 12].tolist(), position)
        for start in (0, 12, 24, 36)
        for position in range(1, 12)
    ]
    assert (result.windows, result.tokens) == (4, 44)
    assert result.nll == pytest.approx(sum(nlls) / 44, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(sum(nlls) / 44), rel=1e-5)


@pytest.mark.parametrize("stride", [1, 3, 5, 7, 8])
def test_stride_scores_each_new_token_once_with_its_context(stride: int) -> None:
    model, ids = TINY["llama"](), random_ids(31)
    result = perplexity(model, ids, sequence_length=8, stride=stride)
    pairs = scored_once(8, 31, stride)
    expected = sum(nll_of(model, ids[start : start + 8].tolist(), p - start) for start, p in pairs) / len(pairs)
    assert result.tokens == len(pairs)
    assert result.nll == pytest.approx(expected, rel=1e-5)


def test_stride_of_the_whole_length_is_the_default() -> None:
    model, ids = TINY["opt"](), random_ids(40)
    default, explicit = (perplexity(model, ids, sequence_length=8, stride=stride) for stride in (None, 8))
    assert default == explicit
    assert explicit.tokens == 5 * 7


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("stride", [None, 3])
def test_batch_size_changes_nothing(name: str, stride: int | None) -> None:
    model, ids = TINY[name](), random_ids(90)
    results = [perplexity(model, ids, sequence_length=10, stride=stride, batch_size=size) for size in (1, 4, 64)]
    assert results[0].protocol == results[1].protocol == results[2].protocol
    for other in results[1:]:
        assert other.nll == pytest.approx(results[0].nll, rel=1e-6)


def test_chunking_the_logits_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = TINY["llama"](), random_ids(64)
    whole = perplexity(model, ids, sequence_length=16, stride=9)
    module = import_module("sparse_ft.evaluation.perplexity")  # the package's attribute of that name is the function
    monkeypatch.setattr(module, "_LOGITS_PER_CHUNK", 5 * VOCABULARY)
    assert perplexity(model, ids, sequence_length=16, stride=9).nll == pytest.approx(whole.nll, rel=1e-9)


@pytest.mark.parametrize("vocabulary", [2, 96, 5000])
def test_uniform_logits_give_the_size_of_the_vocabulary(vocabulary: int) -> None:
    ids = torch.randint(0, vocabulary, (40,), generator=torch.Generator().manual_seed(1))
    assert perplexity(Uniform(vocabulary), ids, sequence_length=10).perplexity == pytest.approx(vocabulary, rel=1e-6)


def test_low_precision_logits_are_summed_in_float32() -> None:
    ids = torch.randint(0, 5000, (2000,), generator=torch.Generator().manual_seed(1))
    model = Uniform(5000).to(torch.bfloat16)
    assert perplexity(model, ids, sequence_length=100).perplexity == pytest.approx(5000, rel=1e-6)


def test_max_windows_takes_the_first() -> None:
    model, ids = TINY["llama"](), random_ids(100)
    some = perplexity(model, ids, sequence_length=10, max_windows=3)
    same = perplexity(model, ids[:30], sequence_length=10)
    assert (some.windows, some.tokens, some.nll) == (3, 27, same.nll)
    assert perplexity(model, ids, sequence_length=10, max_windows=99).windows == 10


def test_protocol_line_states_what_was_done() -> None:
    model, ids = TINY["llama"](), random_ids(100)
    ids[0] = model.config.bos_token_id
    result = perplexity(
        model, ids, sequence_length=10, stride=5, dtype=torch.bfloat16, dataset="corpus-x", split="held-out"
    )
    for fact in ("corpus-x held-out", "19 windows of 10", "stride 5", "99 of 100 tokens", "float32 weights"):
        assert fact in str(result)
    assert "bfloat16 autocast" in str(result) and "sdpa attention" in str(result) and "start of the text" in str(result)
    assert f"{result.perplexity:.4g}" in str(result)
    assert result.to_dict(label="dense")["protocol"]["stride"] == 5


def test_autocast_dtype_is_used() -> None:
    model, ids = TINY["llama"](), random_ids(100)
    plain, cast = (perplexity(model, ids, sequence_length=10, dtype=dtype).nll for dtype in (None, torch.bfloat16))
    assert plain != cast
    assert plain == pytest.approx(cast, rel=1e-2)


def test_model_is_left_as_it_was() -> None:
    model = TINY["gpt2"]().train()  # with dropout
    first, second = (perplexity(model, random_ids(40), sequence_length=10).nll for _ in range(2))
    assert first == second
    assert model.training and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("poison", "check"), [(math.nan, math.isnan), (math.inf, math.isnan)])
def test_bad_weights_are_reported_as_such(poison: float, check: object) -> None:
    model = TINY["llama"]()
    with torch.no_grad():
        model.lm_head.weight[5] = poison
    with pytest.warns(UserWarning, match="not finite"):
        result = perplexity(model, random_ids(40), sequence_length=10)
    assert not math.isfinite(result.perplexity) and check(result.perplexity)  # type: ignore[operator]


def test_an_impossible_token_gives_infinity() -> None:
    class Impossible(Uniform):
        def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
            logits = super().forward(input_ids).logits
            logits[..., 7] = -math.inf
            return SimpleNamespace(logits=logits)

    with pytest.warns(UserWarning, match="1 of 9 log-likelihoods"):
        result = perplexity(Impossible(9), torch.tensor([0, 1, 2, 3, 7, 4, 5, 6, 8, 0]), sequence_length=10)
    assert result.nll == math.inf and result.perplexity == math.inf


def test_a_hopeless_model_overflows_to_infinity_quietly() -> None:
    class Wrong(Uniform):
        def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
            logits = super().forward(input_ids).logits
            logits[..., 0] = 5000.0
            return SimpleNamespace(logits=logits)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = perplexity(Wrong(9), torch.ones(20, dtype=torch.long), sequence_length=10)
    assert result.nll == pytest.approx(4999.5) and result.perplexity == math.inf


def test_peft_wrapped_model_gives_the_same() -> None:
    from peft import LoraConfig, get_peft_model

    ids = random_ids(60)
    plain = perplexity(TINY["llama"](), ids, sequence_length=10, stride=4)
    wrapped = get_peft_model(TINY["llama"](), LoraConfig(target_modules=["q_proj"]))
    assert perplexity(wrapped, ids, sequence_length=10, stride=4).nll == pytest.approx(plain.nll, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sequence_length": 1}, ["sequence_length is 1", "2 or more"]),
        ({"sequence_length": 65}, ["65", "64 positions"]),
        ({"sequence_length": 60}, ["50 tokens", "60", "longer text"]),
        ({"stride": 0}, ["stride is 0", "10"]),
        ({"stride": 11}, ["stride is 11", "10"]),
        ({"max_windows": 0}, ["max_windows is 0"]),
        ({"batch_size": 0}, ["batch_size is 0"]),
        ({"dtype": torch.float64}, ["float64", "bfloat16"]),
        ({"ids": random_ids(50).view(1, 50)}, ["(1, 50)", "(T,)"]),
        ({"ids": torch.rand(50)}, ["float32", "int64"]),
        ({"ids": random_ids(50) + VOCABULARY}, [str(VOCABULARY), "tokenizer"]),
        ({"ids": random_ids(50) - VOCABULARY}, ["token id -", "tokenizer"]),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(change: dict[str, object], said: list[str]) -> None:
    arguments: dict[str, object] = {"ids": random_ids(50), "sequence_length": 10, **change}
    with pytest.raises(ValueError) as error:
        perplexity(TINY["llama"](), **arguments)  # type: ignore[arg-type]
    message = str(error.value)
    assert all(part in message for part in said), message
    assert "\n" not in message and message.endswith(".")


@pytest.mark.parametrize(("name", "said"), [("bert", "both sides"), ("t5", "encoder-decoder")])
def test_models_that_are_not_causal_are_refused(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        perplexity(TINY[name](), random_ids(50), sequence_length=10)


def test_bert_with_a_causal_head_but_no_causal_mask_is_refused() -> None:
    from transformers import BertLMHeadModel

    config = TINY["bert"]().config
    with pytest.raises(ValueError, match="both sides"):
        perplexity(BertLMHeadModel(config), random_ids(50), sequence_length=10)
    config.is_decoder = True
    model, ids = BertLMHeadModel(config).eval(), random_ids(20)
    expected = sum(nll_of(model, ids[:10].tolist(), p) for p in range(1, 10)) / 9
    assert perplexity(model, ids, sequence_length=10, max_windows=1).nll == pytest.approx(expected, rel=1e-5)


def test_a_classifier_is_refused() -> None:
    from transformers import LlamaForSequenceClassification

    with pytest.raises(ValueError, match=r"logits of shape \(5, 2\)"):
        config = TINY["llama"]().config
        perplexity(LlamaForSequenceClassification(config), random_ids(50), sequence_length=10)


@pytest.fixture(scope="module")
def llama_wt2(shared_dir: Path) -> tuple[nn.Module, torch.Tensor]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = shared_dir / "models" / "llama-wt2"
    with gzip.open(shared_dir / "data" / "wikitext-2" / "test.txt.gz", "rt", encoding="utf-8") as file:
        ids = AutoTokenizer.from_pretrained(path)(file.read(), add_special_tokens=False, verbose=False)["input_ids"]
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), torch.tensor(ids)


@pytest.mark.realdata
def test_real_model_equals_an_independent_formula(llama_wt2: tuple[nn.Module, torch.Tensor]) -> None:
    model, ids = llama_wt2
    result = perplexity(model, ids, sequence_length=256, max_windows=24)
    log_likelihood, tokens = 0.0, 0
    with torch.no_grad():
        for window in ids[: 24 * 256].view(24, 256):
            probabilities = model(input_ids=window[None]).logits[0].double().softmax(-1)
            log_likelihood += float(probabilities[:-1].gather(1, window[1:, None]).log().sum())
            tokens += 255
    assert result.tokens == tokens
    assert result.perplexity == pytest.approx(math.exp(-log_likelihood / tokens), rel=1e-5)


@pytest.mark.realdata
@pytest.mark.parametrize("windows", [240, pytest.param(480, marks=pytest.mark.slow)])
def test_dense_reference_figures(llama_wt2: tuple[nn.Module, torch.Tensor], windows: int) -> None:
    model, ids = llama_wt2
    result = perplexity(model, ids, sequence_length=256, max_windows=windows, dtype=torch.bfloat16)
    assert result.perplexity == pytest.approx(DENSE_LLAMA_WT2[windows], rel=0.005)
