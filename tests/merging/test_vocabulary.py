"""Vocabularies: each token's row of the output is, bit for bit, the row of the model it comes from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from merging.checkpoints import merge, near, prepare, read, tensors_of, write, write_tokenizer
from merging.lora import write_lora
from safetensors.torch import load_file, save_file

from sparse_ft.merging.plan import NO_ROW, ZERO_ROW
from sparse_ft.merging.references import ModelRef
from sparse_ft.merging.token_config import TokenSource
from sparse_ft.merging.vocabulary import Tokens, match_rows

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BASE = {"<unk>": 0, "a": 1, "b": 2, "c": 3}
OTHER = {"<unk>": 0, "c": 1, "new": 2, "a": 3, "b": 4}
THIRD = {"<unk>": 0, "new": 1, "a": 2}
UNION = "merge_method: task_arithmetic\nbase_model: @base\nmodels: [{model: @other, parameters: {weight: 1}}]\n"
BOTH = """
merge_method: task_arithmetic
base_model: @base
models: [{model: @other, parameters: {weight: 1}}, {model: @third, parameters: {weight: 0.5}}]
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Three models of different vocabularies; the base has two rows of padding."""
    base = tensors_of(1, rows=6)
    write(tmp_path / "base", base, BASE)
    for seed, (name, ids) in enumerate([("other", OTHER), ("third", THIRD)], 1):
        inside = {n: t for n, t in near(base, seed).items() if n not in (EMBED, HEAD)}
        rows = {n: t for n, t in tensors_of(1, seed=seed, rows=len(ids)).items() if n in (EMBED, HEAD)}
        write(tmp_path / name, inside | rows, ids)
    return tmp_path


words = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 11), min_size=1)


@given(words.filter(lambda d: len(set(d.values())) == len(d)), words, st.integers(1, 12), st.integers(1, 5))
def test_rows_are_those_of_the_same_token(ids: dict[str, int], own: dict[str, int], rows: int, multiple: int) -> None:
    found = match_rows(ids, {"m": Tokens(own, rows)}, multiple=multiple)
    assert found.size % multiple == 0 and found.size > max(ids.values())
    mine = found.rows.get("m", np.arange(found.size))
    for token, place in ids.items():
        expected = own[token] if token in own and own[token] < rows else NO_ROW
        assert mine[place] == expected
    assert (mine < rows).all()


def test_the_same_vocabulary_changes_nothing_padding_included() -> None:
    found = match_rows(BASE, {"m": Tokens(BASE, 6)}, least_rows=6)
    assert found.size == 6 and not found.rows


def test_padding_repeats_the_row_of_the_padding_token() -> None:
    found = match_rows(BASE, {"m": Tokens(BASE, 4)}, multiple=8, padding="b")
    assert found.rows["m"].tolist() == [0, 1, 2, 3, 2, 2, 2, 2]


def test_sources_of_single_tokens() -> None:
    models = {"m": Tokens(BASE, 4), "n": Tokens(OTHER, 5)}
    sources = {
        "a": TokenSource(ModelRef("n", "n"), None, True),
        "new": TokenSource(ModelRef("m", "m"), "b"),
        "c": TokenSource(None),
    }
    found = match_rows({**BASE, "new": 4}, models, sources=sources)
    assert found.rows["m"].tolist() == [0, NO_ROW, 2, 3, NO_ROW] and found.rows["n"].tolist() == [0, NO_ROW, 4, 1, 2]
    fallbacks = {label: rows.tolist() for label, rows in found.fallbacks}
    assert fallbacks == {"n": [NO_ROW, 3, *[NO_ROW] * 3], "m": [*[NO_ROW] * 4, 2]}
    forced = match_rows(BASE, models, sources={"c": TokenSource(None, None, True)})
    assert forced.rows["m"][3] == forced.rows["n"][3] == ZERO_ROW
    with pytest.raises(ValueError, match="which does not have it"):
        match_rows(BASE, models, sources={"a": TokenSource(ModelRef("m", "m"), "new")})
    with pytest.raises(ValueError, match="which the output's vocabulary does not"):
        match_rows(BASE, models, sources={"zzz": TokenSource(None)})


def test_without_a_word_on_tokenizers_other_rows_are_refused_or_cut(place: Path) -> None:
    with pytest.raises(ValueError, match=r"'.*third' has 3 embedding rows but '.*base' has 6: give tokenizer_source"):
        prepare(place, BOTH)
    prepared = prepare(place, UNION, truncate_embeddings=True)
    assert any("the last 1 embedding rows of" in warning for warning in prepared.report.warnings)
    out = merge(place, UNION, truncate_embeddings=True)
    assert torch.allclose(out[EMBED], read(place / "other")[EMBED][:5], atol=1e-6)
    assert json.loads((place / "out" / "config.json").read_text())["vocab_size"] == 5


def test_the_base_s_vocabulary_takes_rows_by_token(place: Path) -> None:
    out = merge(place, UNION + "tokenizer_source: base")
    for name in (EMBED, HEAD):
        base, other = read(place / "base")[name], read(place / "other")[name]
        assert out[name].shape == base.shape, "the base's padding stays"
        for token, row in BASE.items():
            assert torch.allclose(out[name][row], other[OTHER[token]], atol=1e-6)
        assert torch.equal(out[name][4:], base[4:]) or torch.allclose(out[name][4], other[0], atol=1e-6)
    assert (place / "out" / "tokenizer.json").read_bytes() == (place / "base" / "tokenizer.json").read_bytes()


def test_rows_of_tokens_that_the_output_lacks_are_left_out_and_said_to_be(place: Path) -> None:
    notes = prepare(place, BOTH + "tokenizer_source: base").report.notes
    (note,) = [note for note in notes if "that the output lacks" in note and "other'" in note]
    assert note.endswith("has 1 tokens that the output lacks, the first 'new': their rows are left out.")
    notes = prepare(place, BOTH + "tokenizer_source: union").report.notes
    assert not any("that the output lacks" in note for note in notes), "a union has every token"


def test_a_union_has_every_token_with_the_row_it_comes_from(place: Path) -> None:
    out = merge(place, BOTH + "tokenizer_source: union")
    models = {name: read(place / name) for name in ("base", "other", "third")}
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place / "out")
    ids = tokenizer.get_vocab()
    assert set(ids) == set(BASE) | set(OTHER) | set(THIRD) and all(ids[token] == BASE[token] for token in BASE)
    assert tokenizer("a new c").input_ids == [ids["a"], ids["new"], ids["c"]]
    assert ids["new"] < len(out[EMBED])
    for name in (EMBED, HEAD):
        base, other, third = (models[m][name] for m in ("base", "other", "third"))
        mean = (other[OTHER["new"]] + third[THIRD["new"]]) / 2
        expected = mean + (other[OTHER["new"]] - mean) + 0.5 * (third[THIRD["new"]] - mean)
        assert torch.allclose(out[name][ids["new"]], expected, atol=1e-6), "the base takes the mean of those having it"
        b = base[BASE["b"]]
        assert torch.allclose(out[name][BASE["b"]], b + (other[OTHER["b"]] - b), atol=1e-6), "the third has no say"
    assert json.loads((place / "out" / "config.json").read_text())["vocab_size"] == len(out[EMBED])


def test_a_token_of_one_model_only_keeps_its_row_bit_for_bit(place: Path) -> None:
    out = merge(place, UNION.replace("weight: 1", "weight: 0.3") + "tokenizer_source: union")
    ids = json.loads((place / "out" / "tokenizer.json").read_text())
    place_of_new = next(entry["id"] for entry in ids["added_tokens"] if entry["content"] == "new")
    for name in (EMBED, HEAD):
        assert torch.equal(out[name][place_of_new], read(place / "other")[name][OTHER["new"]])


def test_forced_tokens_zeros_and_padding(place: Path) -> None:
    tokens = (
        "{a: {source: @third, force: true}, b: {source: {kind: zero}, force: true},"
        " c: {source: {kind: model_token, model: @other, token: new}, force: true}}"
    )
    out = merge(place, UNION + f"tokenizer: {{source: base, pad_to_multiple_of: 8, tokens: {tokens}}}")
    for name in (EMBED, HEAD):
        assert out[name].shape[0] == 8
        assert torch.equal(out[name][BASE["a"]], read(place / "third")[name][THIRD["a"]])
        assert not out[name][BASE["b"]].any()
        assert torch.equal(out[name][BASE["c"]], read(place / "other")[name][OTHER["new"]])
        assert torch.isfinite(out[name]).all()


def test_tokens_named_without_being_known_are_added(place: Path) -> None:
    out = merge(place, UNION + "tokenizer: {source: base, tokens: {new: {source: @other}}}")
    assert torch.equal(out[EMBED][4], read(place / "other")[EMBED][OTHER["new"]]), "in a row that was padding"


def test_the_tokenizer_of_a_model(place: Path) -> None:
    out = merge(place, UNION + "tokenizer_source: @other")
    assert out[EMBED].shape[0] == 5
    assert torch.allclose(out[EMBED], read(place / "other")[EMBED], atol=1e-6)
    assert (place / "out" / "tokenizer.json").read_bytes() == (place / "other" / "tokenizer.json").read_bytes()


def test_a_linear_merge_without_a_base_gives_missing_tokens_the_others_rows(place: Path) -> None:
    text = "merge_method: linear\nmodels: [{model: @other}, {model: @third}]\nparameters: {weight: 1}\n"
    out = merge(place, text + "tokenizer_source: union")
    other, third = read(place / "other")[EMBED], read(place / "third")[EMBED]
    assert torch.allclose(out[EMBED][OTHER["c"]], other[OTHER["c"]], atol=1e-6)
    assert torch.allclose(out[EMBED][OTHER["a"]], (other[OTHER["a"]] + third[THIRD["a"]]) / 2, atol=1e-6)


def test_chat_templates(place: Path) -> None:
    text = "{{ messages }}"
    for name in ("base", "other"):
        (place / name / "chat_template.jinja").write_text(f"{text}{name}")
    same = UNION + "tokenizer_source: base\nchat_template: "
    for wanted, expected in [("'{{ x }}'", "{{ x }}"), ("chatml", "<|im_start|>"), ("auto", text)]:
        merge(place, same + wanted)
        assert expected in (place / "out" / "chat_template.jinja").read_text()
    with pytest.raises(ValueError, match=r"Unknown chat_template 'chatlm'. Did you mean 'chatml'"):
        prepare(place, same + "chatlm")


def test_templates_are_valid_and_open_the_answer() -> None:
    jinja2 = pytest.importorskip("jinja2")
    from sparse_ft.merging.chat_templates import CHAT_TEMPLATES

    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    for template in CHAT_TEMPLATES.values():
        shown = jinja2.Template(template).render(
            messages=messages, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
        )
        assert shown.index("hi") < shown.index("yes")


def test_an_adapter_that_brings_tokens_and_embeddings_of_its_own(place: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    lora = write_lora(place / "lora", {name: (torch.ones(1, 4), torch.ones(6, 1))})
    write_tokenizer(lora, {**BASE, "new": 6})
    own = {key: torch.randn(7, 4) for key in (EMBED, HEAD)}
    file = lora / "adapter_model.safetensors"
    save_file(load_file(file) | {f"base_model.model.{key}": tensor for key, tensor in own.items()}, file)
    text = UNION.replace("@other", "@base+@lora")
    for source in ("@base+@lora", "union"):
        out = merge(place, text + f"tokenizer_source: {source}")
        ids = json.loads((place / "out" / "tokenizer.json").read_text())
        row = ids["model"]["vocab"].get("new") or next(t["id"] for t in ids["added_tokens"] if t["content"] == "new")
        for key in (EMBED, HEAD):
            assert torch.allclose(out[key][:4], own[key][:4], atol=1e-6) and torch.equal(out[key][row], own[key][6])


def test_a_missing_tokenizer_is_named(place: Path) -> None:
    (place / "other" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"No usable tokenizer in '.*other'"):
        prepare(place, UNION + "tokenizer_source: union")
