"""The choice of a method: every branch of the pipeline, with the numbers it says it decided on."""

from __future__ import annotations

import pytest
import torch
from deltas.delta_models import batches, bits, finetuned_model, linear_names
from tiny_models import TINY

from sparse_ft.deltas import DeltaProbe, choose, is_decoder
from sparse_ft.models import named_weights


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [("llama", True), ("gpt2", True), ("opt", True), ("neox", True), ("mixtral", True), ("bert", False)],
)
def test_decoders_are_told_by_what_their_first_token_sees(architecture: str, expected: bool) -> None:
    model = TINY[architecture]()
    ids = batches(1)[0]["input_ids"]
    assert is_decoder(model, ids) is expected
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    assert is_decoder(model, {"input_ids": ids, "attention_mask": mask}) is expected
    assert not is_decoder(model, ids[:, :1])
    assert is_decoder(model, torch.full((1, 6), 7)) is expected


def test_small_deltas_at_an_easy_density_are_plain_dare_and_the_numbers_are_measured() -> None:
    model, base = finetuned_model(size=1e-3)
    before = {name: tensor.detach().clone() for name, tensor in named_weights(model).items()}
    choice = choose(model, base, batches(2), density=0.1)
    assert choice.method == "dare" and choice.scale == 0.1
    delta = torch.cat([(before[name].double() - base[name].double()).abs().flatten() for name in before])
    weight = torch.cat([base[name].double().abs().flatten() for name in before])
    measured = choice.measurements
    assert measured["mean_abs_delta"] == pytest.approx(delta.mean().item(), rel=1e-5)
    assert measured["mean_abs_base"] == pytest.approx(weight.mean().item(), rel=1e-5)
    assert measured["unchanged"] == pytest.approx((delta == 0).double().mean().item())
    assert measured["decoder"] and measured["compared"] == "logits"
    assert list(measured["output_change"]) == pytest.approx([0.1, 0.2, 0.5, 1.0])
    assert all(change > 0 for change in measured["output_change"].values())
    text = " ".join(choice.reasons)
    assert f"{measured['mean_abs_delta']:.3g}" in text and f"{measured['magnitude_change']:.3g}" in text
    assert "plain DARE is enough" in text
    assert all(torch.equal(bits(named_weights(model)[name]), bits(before[name])) for name in before)


def test_a_choice_under_autocast_is_made_on_the_weights_as_they_are() -> None:
    """The casts autocast keeps of weights that need gradients would hide every change after the first measurement."""
    model, base = finetuned_model(size=8e-3)
    options = {"density": 0.05, "names": linear_names(model), "seeds": (0,)}
    found = []
    for cached in (True, False):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            found.append(choose(model, base, batches(2), metric=None, **options))
    assert found[0].measurements == found[1].measurements and found[0].scale == found[1].scale
    assert min(found[0].measurements["output_change"].values()) > 0
    assert len(set(found[0].measurements["search"].values())) > 1


def test_large_deltas_are_ranked_by_what_changes_the_outputs_less() -> None:
    model, base = finetuned_model(size=0.05)
    choice = choose(model, base, batches(2), density=0.05)
    changes = {name: choice.measurements[f"{name}_change"] for name in ("wanda", "magnitude")}
    assert choice.method == min(changes, key=changes.__getitem__) and choice.scale == 1.0
    assert "Large deltas do not survive" in choice.reasons[-1]


def test_a_wrong_base_is_named() -> None:
    model, _ = finetuned_model(size=1e-3)
    other = {name: tensor + 0.03 for name, tensor in TINY["llama"](seed=9).state_dict().items()}
    choice = choose(model, other, batches(1), density=0.1)
    assert any("wrong base" in reason for reason in choice.reasons)
    assert choice.method in ("magnitude", "wanda")


def test_a_decoder_without_labels_gets_one_scale_searched_on_the_outputs() -> None:
    model, base = finetuned_model(size=8e-3)
    choice = choose(model, base, batches(2), density=0.01, names=linear_names(model), seeds=(0, 1))
    scores = choice.measurements["search"]
    assert next(iter(scores)) == 0.01
    assert choice.scale == max(scores, key=scores.__getitem__)
    assert choice.method == ("dare" if choice.scale == 0.01 else "darex_q")
    assert "per_layer_score" not in choice.measurements


def test_an_encoder_is_also_searched_per_layer() -> None:
    model, base = finetuned_model("bert", size=8e-3)
    choice = choose(model, base, batches(1), density=0.01, names=linear_names(model), seeds=(0,))
    assert choice.measurements["compared"] == "hidden"
    per_layer, whole = choice.measurements["per_layer_score"], max(choice.measurements["search"].values())
    assert isinstance(choice.scale, dict) == (per_layer > whole)
    with DeltaProbe(model, base, density=0.01, names=linear_names(model)) as probe:
        probe.prune(choice.scale)  # whatever it is, the probe takes it
    assert choice.method == ("dare" if choice.scale == 0.01 else "darex_q")


def test_scales_per_layer_win_where_they_score_higher() -> None:
    """A metric that reads the scales off the weights and is the larger the more the two layers' scales differ."""
    model, base = finetuned_model("bert", size=8e-3)
    names = linear_names(model)[:6:5]
    with DeltaProbe(model, base, density=0.01, names=names) as probe:
        kept = {name: probe.kept_delta(name) for name in names}

    def spread(model: torch.nn.Module) -> float:
        weights = named_weights(model)
        moved = [float((weights[name].detach() - base[name]).abs().sum() / kept[name].abs().sum()) for name in names]
        return round(abs(1 / moved[0] - 1 / moved[1]), 3)

    choice = choose(model, base, batches(1), density=0.01, names=names, seeds=(0,), metric=spread)
    assert choice.method == "darex_q" and isinstance(choice.scale, dict)
    assert set(choice.scale) == set(names) and len(set(choice.scale.values())) == 2
    assert "one scale per layer" in choice.reasons[-1]


def test_labels_decide_where_they_are_given() -> None:
    """A metric that is best where the weights are nearest to those of the scale 0.05."""
    model, base = finetuned_model(size=8e-3)
    name = linear_names(model)[0]
    with DeltaProbe(model, base, density=0.01, names=[name]) as probe:
        target = base[name] + probe.kept_delta(name) / 0.05
    choice = choose(
        model, base, batches(1), density=0.01, names=[name], seeds=(0,),
        metric=lambda model: -float((named_weights(model)[name] - target).abs().sum()),
    )  # fmt: skip
    assert choice.method == "darex_q" and choice.scale == pytest.approx(0.05, abs=3e-3)
    assert "your metric" in choice.reasons[-1]
    constant = choose(model, base, batches(1), density=0.01, names=[name], seeds=(0,), metric=lambda model: 1.0)
    assert constant.method == "dare" and constant.scale == 0.01


def test_fine_tuning_again_comes_first() -> None:
    model, base = finetuned_model(size=0.05)
    choice = choose(model, base, batches(1), density=0.01, can_finetune_again=True)
    assert choice.method == "darex_l2" and "AdamR" in choice.reasons[-1]


def test_refusals() -> None:
    model, base = finetuned_model()
    with pytest.raises(ValueError, match="no samples"):
        choose(model, base, [], density=0.1)
    with pytest.raises(ValueError, match="density is 0"):
        choose(model, base, batches(1), density=0.0)
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        choose(model.train(), base, batches(1), density=0.1)
