"""Plans: which tensors, of which layers, with which settings, from which models; some are carried out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from merging.checkpoints import merge, near, prepare, tensors_of, write
from torch.testing import assert_close

from sparse_ft.merging.plan import TensorPlan
from sparse_ft.merging.planning import Planned, shard_layout

LINEAR = "merge_method: linear\nmodels: [{model: @a, parameters: {weight: %s}}, {model: @b, parameters: {weight: 1}}]\n"
TASK = "merge_method: task_arithmetic\nbase_model: @base\nmodels:\n"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A base and two fine-tunes."""
    base = tensors_of()
    write(tmp_path / "base", base)
    write(tmp_path / "a", near(base, 1))
    write(tmp_path / "b", near(base, 2))
    return tmp_path


def weights(planned: Planned, model: int, parameter: str = "weight") -> dict[str, float]:
    found = {}
    for tensor in planned.plan.tensors:
        for source in tensor.sources:
            if source.model == model:
                found[tensor.name] = source.parameters[parameter]
    return found


def test_a_gradient_runs_over_the_layers_and_the_rest_has_its_first_value(place: Path) -> None:
    found = weights(prepare(place, LINEAR % "[0.2, 1.0]").planned, 0)
    assert [found[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(3)] == [0.2, pytest.approx(0.6), 1.0]
    assert found["lm_head.weight"] == found["model.embed_tokens.weight"] == found["model.norm.weight"] == 0.2


def test_filters_and_gradients_together(place: Path) -> None:
    found = weights(prepare(place, LINEAR % "[{filter: mlp, value: [0, 1]}, {value: 0.4}]").planned, 0)
    assert found["model.layers.1.mlp.up_proj.weight"] == 0.5
    assert found["model.layers.1.self_attn.q_proj.weight"] == found["lm_head.weight"] == 0.4


def test_one_layer_is_at_the_end_of_a_gradient(tmp_path: Path) -> None:
    for i, name in enumerate("ab"):
        write(tmp_path / name, tensors_of(1, seed=i))
    found = weights(prepare(tmp_path, LINEAR % "[0, 1]").planned, 0)
    assert found["model.layers.0.mlp.up_proj.weight"] == 1.0 and found["lm_head.weight"] == 0.0


def test_task_arithmetic_and_linear_by_hand(place: Path) -> None:
    base, a, b = (_read(place, name) for name in ("base", "a", "b"))
    out = merge(place, TASK + "- {model: @a, parameters: {weight: 0.3}}\n- {model: @b, parameters: {weight: 0.6}}\n")
    for name, tensor in base.items():
        assert_close(out[name], tensor + 0.3 * (a[name] - tensor) + 0.6 * (b[name] - tensor))
    out = merge(place, LINEAR % 3)
    for name in base:
        assert_close(out[name], (3 * a[name] + b[name]) / 4)


def test_the_base_is_no_task_vector_listed_or_not(place: Path) -> None:
    text = TASK + "- {model: @a, parameters: {weight: 0.5}}\n"
    listed = prepare(place, text + "- {model: @base}\n").planned.plan
    added = prepare(place, text).planned.plan
    assert listed.tensors == added.tensors
    assert all(t.base is not None and len(t.sources) == 1 for t in added.tensors)


def test_slices_stack_and_renumber_layers(place: Path) -> None:
    a, b = _read(place, "a"), _read(place, "b")
    text = """
merge_method: linear
slices:
- sources: [{model: @a, layer_range: [0, 2], parameters: {weight: 1}}]
- sources: [{model: @b, layer_range: [1, 3], parameters: {weight: 1}}]
"""
    out = merge(place, text)
    for i, (source, layer) in enumerate([(a, 0), (a, 1), (b, 1), (b, 2)]):
        for rest in ("mlp.up_proj.weight", "self_attn.q_proj.weight"):
            assert torch.equal(out[f"model.layers.{i}.{rest}"], source[f"model.layers.{layer}.{rest}"])
    assert torch.equal(out["model.embed_tokens.weight"], a["model.embed_tokens.weight"]), "of the first slice"
    assert torch.equal(out["lm_head.weight"], b["lm_head.weight"]), "of the last slice"
    config = json.loads((place / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 4 and len(out) == 3 + 4 * 2


def test_lists_with_an_entry_per_layer_follow_the_layers(tmp_path: Path) -> None:
    write(tmp_path / "a", tensors_of(), layer_types=["x", "y", "z"])
    sources = "[{sources: [{model: @a, layer_range: [1, 3], parameters: {weight: 1}}]}]"
    merge(tmp_path, f"merge_method: linear\nslices: {sources}")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["layer_types"] == ["y", "z"]


def test_positions_begin_anew_in_every_slice(place: Path) -> None:
    source = "{sources: [{model: @a, layer_range: [%d, %d]}, {model: @b, layer_range: [%d, %d]}]}"
    slices = f"[{source % (0, 2, 0, 2)}, {source % (0, 3, 0, 3)}]"
    found = weights(
        prepare(place, f"merge_method: linear\nslices: {slices}\nparameters: {{weight: [1, 3]}}").planned, 0
    )
    assert [found[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(5)] == [1, 3, 1, 2, 3]


def test_a_slice_overrides_the_whole_and_a_source_the_slice(place: Path) -> None:
    sources = "[{model: @a, layer_range: [0, 3]}, {model: @b, layer_range: [0, 3], parameters: {weight: 5}}]"
    text = (
        f"merge_method: linear\nslices: [{{sources: {sources}, parameters: {{weight: 2}}}}]\nparameters: {{weight: 1}}"
    )
    planned = prepare(place, text).planned
    assert set(weights(planned, 0).values()) == {2.0} and set(weights(planned, 1).values()) == {5.0}


def test_slices_with_differences_take_the_base_of_the_same_layers(place: Path) -> None:
    text = "merge_method: task_arithmetic\nbase_model: @base\nslices: [{sources: [%s]}]"
    one = "{model: @a, layer_range: [1, 3], parameters: {weight: 1}}"
    planned = prepare(place, text % one).planned
    tensor = next(t for t in planned.plan.tensors if t.name == "model.layers.0.mlp.up_proj.weight")
    assert tensor.base is not None and tensor.base.name == "model.layers.1.mlp.up_proj.weight"
    two = "{model: @b, layer_range: [0, 2], parameters: {weight: 1}}"
    with pytest.raises(ValueError, match="list the base with the layer_range that is meant"):
        prepare(place, text % f"{one}, {two}")


def test_slerp_takes_its_t_by_name_of_the_tensor_and_layer(place: Path) -> None:
    base, a = _read(place, "base"), _read(place, "a")
    t = "[{filter: self_attn, value: [0, 1]}, {filter: mlp, value: [1, 0]}, {value: 1}]"
    out = merge(place, f"merge_method: slerp\nbase_model: @base\nmodels: [{{model: @a}}]\nparameters: {{t: {t}}}")
    for name, wanted in [("model.layers.0.self_attn.q_proj.weight", base), ("model.layers.0.mlp.up_proj.weight", a)]:
        assert_close(out[name], wanted[name])
    assert_close(out["lm_head.weight"], a["lm_head.weight"])


def test_a_required_parameter_is_asked_for_by_tensor_and_model(place: Path) -> None:
    with pytest.raises(ValueError, match=r"'weight' of '.*/b' for tensor '.*weight' is not given"):
        prepare(place, TASK + "- {model: @a, parameters: {weight: 1}}\n- {model: @b}\n")
    with pytest.raises(ValueError, match="Parameter 't' for tensor"):
        prepare(place, "merge_method: slerp\nbase_model: @base\nmodels: [{model: @a}]")


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ("density: -0.1", "must lie between 0 and 1, got -0.1"),
        ("density: 50", "between 0 and 1, got 50. It is the share that is kept"),
        ("density: nan", "must be a finite number"),
        ("density: 0.9, epsilon: 0.2", "outside 0..1; lower epsilon"),
        ("gamma: 2", "between 0 and 1"),
        ("normalize: 2", "must be true or false"),
    ],
)
def test_values_out_of_range_name_model_and_tensor(place: Path, parameters: str, reason: str) -> None:
    method = "breadcrumbs" if "gamma" in parameters else "della"
    text = f"merge_method: {method}\nbase_model: @base\nmodels: [{{model: @a, parameters: {{weight: 1}}}}]\n"
    with pytest.raises(ValueError, match=reason):
        prepare(place, text + f"parameters: {{{parameters}}}")


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "della", "breadcrumbs", "breadcrumbs_ties"])
def test_density_zero_is_the_base_and_one_the_model(place: Path, method: str, density: float) -> None:
    models = f"- {{model: @a, parameters: {{weight: 1, density: {density}, gamma: 0}}}}\n"
    out = merge(place, f"merge_method: {method}\nbase_model: @base\nmodels:\n{models}")
    expected = _read(place, "a" if density else "base")
    for name, tensor in expected.items():
        assert_close(out[name], tensor)


def test_parameters_of_other_methods_are_noted_not_refused(place: Path) -> None:
    prepared = prepare(place, (LINEAR % 1) + "parameters: {density: 0.5, int8_mask: true}")
    assert "Parameter 'density' is not used by 'linear'." in prepared.report.notes
    assert not any("int8_mask" in note for note in prepared.report.notes)


def test_integer_buffers_and_tables_are_copied(place: Path) -> None:
    for i, name in enumerate(("base", "a", "b")):
        extra = {"model.position_ids": torch.arange(7) + i, "model.rotary_emb.inv_freq": torch.full((2,), 1 / 3 + i)}
        extra["model.layers.0.self_attn.cos_cached"] = torch.full((3,), 0.25 + i)
        write(place / name, _read(place, name) | extra)
    out = merge(place, TASK + "- {model: @a, parameters: {weight: 1}}\nout_dtype: bfloat16")
    assert torch.equal(out["model.position_ids"], torch.arange(7)) and out["model.position_ids"].dtype == torch.int64
    assert out["model.rotary_emb.inv_freq"].dtype == torch.bfloat16 and out["lm_head.weight"].dtype == torch.bfloat16
    assert torch.equal(out["model.rotary_emb.inv_freq"], torch.full((2,), 1 / 3).bfloat16())
    assert torch.equal(out["model.layers.0.self_attn.cos_cached"], torch.full((3,), 0.25).bfloat16())


def test_what_one_model_lacks_the_others_merge_and_what_one_only_has_is_copied(place: Path) -> None:
    base, a = _read(place, "base"), _read(place, "a")
    del a["model.layers.0.mlp.up_proj.weight"]
    a["model.layers.0.mlp.bias"] = torch.ones(6)
    write(place / "a", a)
    text = TASK + "- {model: @a, parameters: {weight: 1}}\n- {model: @b, parameters: {weight: 1}}\n"
    prepared = prepare(place, text)
    out = merge(place, text)
    assert torch.equal(out["model.layers.0.mlp.bias"], torch.ones(6))
    name = "model.layers.0.mlp.up_proj.weight"
    assert_close(out[name], base[name] + (_read(place, "b")[name] - base[name]))
    notes = "\n".join(prepared.report.notes)
    assert f"lacks '{name}'" in notes and "only model that has it: 'model.layers.0.mlp.bias'" in notes


def test_a_tensor_that_only_the_base_lacks_has_no_difference(place: Path) -> None:
    for name in "ab":
        write(place / name, _read(place, name) | {"model.extra.weight": torch.ones(2)})
    with pytest.raises(ValueError, match=r"'model.extra.weight' is in .* but not in the base"):
        prepare(place, TASK + "- {model: @a, parameters: {weight: 1}}\n- {model: @b, parameters: {weight: 1}}\n")


def test_tied_weights_stored_twice_are_written_once(place: Path) -> None:
    for name in ("base", "a"):
        tensors = _read(place, name)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        write(place / name, tensors, tie_word_embeddings=True)
    out = merge(place, TASK + "- {model: @a, parameters: {weight: 1}}\n")
    assert "lm_head.weight" not in out
    assert json.loads((place / "out" / "config.json").read_text())["tie_word_embeddings"] is True


def test_one_untied_model_unties_the_output(place: Path) -> None:
    base = _read(place, "base")
    del base["lm_head.weight"]
    write(place / "base", base, tie_word_embeddings=True)
    out = merge(place, TASK + "- {model: @a, parameters: {weight: 0.5}}\n")
    own = base["model.embed_tokens.weight"]
    assert_close(out["lm_head.weight"], own + 0.5 * (_read(place, "a")["lm_head.weight"] - own))
    assert json.loads((place / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_dtypes(place: Path) -> None:
    write(place / "base", {n: t.bfloat16() for n, t in _read(place, "base").items()}, torch_dtype="bfloat16")
    text = TASK + "- {model: @a, parameters: {weight: 1}}\n"
    assert {t.dtype for t in prepare(place, text).planned.plan.tensors} == {torch.bfloat16}, "the base's"
    assert {t.dtype for t in prepare(place, text + "dtype: float32").planned.plan.tensors} == {torch.float32}
    both = prepare(place, text + "dtype: float32\nout_dtype: float16")
    assert {t.dtype for t in both.planned.plan.tensors} == {torch.float16}
    merge(place, text + "dtype: float32\nout_dtype: float16")
    assert json.loads((place / "out" / "config.json").read_text())["torch_dtype"] == "float16"


def test_modules_have_methods_settings_of_their_own(tmp_path: Path) -> None:
    names = [f"{part}.block.{i}.wi.weight" for part in ("encoder", "decoder") for i in range(2)] + ["shared.weight"]
    for i, model in enumerate("ab"):
        write(tmp_path / model, {name: torch.full((2, 2), float(i)) for name in names}, num_layers=2)
    models = "[{model: @a, parameters: {weight: [1, 2]}}, {model: @b, parameters: {weight: %d}}]"
    decoder = "{models: %s, parameters: {normalize: false}}"
    text = f"merge_method: linear\nmodules: {{encoder: {{models: %s}}, decoder: {decoder}}}"
    out = merge(tmp_path, text % (models % 1, models % 3))
    assert_close(out["encoder.block.0.wi.weight"], torch.full((2, 2), 1 / 2))
    assert_close(out["encoder.block.1.wi.weight"], torch.full((2, 2), 1 / 3))
    assert_close(out["decoder.block.1.wi.weight"], torch.full((2, 2), 3.0))
    assert_close(out["shared.weight"], torch.full((2, 2), 1 / 2)), "outside both: with the first"
    with pytest.raises(ValueError, match="No tensor has 'vision' in its name"):
        prepare(
            tmp_path,
            "merge_method: linear\nmodules: {encoder: {models: %s}, vision: {models: %s}}" % ((models % 1,) * 2),
        )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("merge_method: linear\nslices: [{sources: [{model: @a, layer_range: [2, 4]}]}]", "ends behind its 3 layers"),
        ("merge_method: linear\nmodels: [{model: @a}, {model: @b/}]\nparameters: {weight: 1}", "are the same model"),
    ],
)
def test_ranges_and_names_that_do_not_fit(place: Path, text: str, reason: str) -> None:
    (place / "b").joinpath("x").write_text("")
    text = text.replace("@b/", "@a/.")
    with pytest.raises(ValueError, match=reason):
        prepare(place, text)


def test_shapes_that_differ_are_refused_by_name(place: Path) -> None:
    tensors = _read(place, "b")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(8, 4)
    write(place / "b", tensors)
    with pytest.raises(ValueError, match=r"up_proj.weight' has shape \(6, 4\) in .* but \(8, 4\) in"):
        prepare(place, LINEAR % 1)


def test_files_are_filled_in_order_up_to_their_size() -> None:
    tensors = [TensorPlan(f"t{i}", (size,), torch.float32, None, ()) for i, size in enumerate((2, 2, 5, 1))]
    layout = shard_layout(tensors, 16)
    assert [names for _, names in layout] == [("t0", "t1"), ("t2",), ("t3",)]
    assert [file for file, _ in layout] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert shard_layout(tensors, 1000) == (("model.safetensors", ("t0", "t1", "t2", "t3")),)


def test_the_result_does_not_depend_on_the_size_of_the_files(place: Path) -> None:
    text = TASK + "- {model: @a, parameters: {weight: 0.3}}\n"
    one = merge(place, text)
    many = merge(place, text, max_shard_size=200)
    assert len(list((place / "out").glob("*.safetensors"))) > 3
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)


def _read(place: Path, name: str) -> dict[str, torch.Tensor]:
    from merging.checkpoints import read

    return read(place / name)
