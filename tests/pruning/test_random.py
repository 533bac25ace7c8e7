"""Random masks: keyed by (seed, name), exact counts, uniform over positions."""

from __future__ import annotations

import pytest
import torch

from sparse_ft.pruning.random import named_generator, random_mask, random_scores


def test_depends_on_seed_and_name_only():
    torch.manual_seed(0)
    first = {name: random_mask((8, 16), name, 3, sparsity=0.5) for name in ("a", "b")}
    torch.manual_seed(99)
    torch.rand(7)
    second = {name: random_mask((8, 16), name, 3, sparsity=0.5) for name in ("b", "a")}
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["a"], first["b"])
    assert not torch.equal(first["a"], random_mask((8, 16), "a", 4, sparsity=0.5))


def test_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    random_scores((8, 16), "a", 0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_seed_and_name_do_not_run_into_each_other():
    assert named_generator(1, "1w").initial_seed() != named_generator(11, "w").initial_seed()


def test_the_stream_is_pinned():
    # Masks are regenerated from (seed, name) by later versions: this number must never change.
    assert named_generator(0, "model.layers.0.self_attn.q_proj.weight").initial_seed() == 2436828551


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.77, 0.999])
def test_counts_are_exact(sparsity):
    assert int((~random_mask((7, 13), "w", 0, sparsity=sparsity)).sum()) == round(sparsity * 91)
    assert int((~random_mask((7, 13), "w", 0, removed=17)).sum()) == 17


def test_groups_and_experts():
    mask = random_mask((3, 5, 10), "experts", 0, pattern="1:4")
    assert (mask[..., :8].reshape(3, 5, 2, 4).sum(-1) == 1).all()
    assert mask[..., 8:].all()


def test_every_position_is_equally_likely():
    kept = torch.stack([random_mask((4, 6), "w", seed, sparsity=0.5) for seed in range(400)]).float().mean(0)
    assert (kept - 0.5).abs().max() < 5 * 0.5 / 400**0.5  # five standard deviations


def test_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match="sparsity"):
        random_mask((4, 4), "w", 0, sparsity=1.5)
    with pytest.raises(ValueError, match="pattern"):
        random_mask((4, 4), "w", 0, pattern="most", sparsity=0.5)
