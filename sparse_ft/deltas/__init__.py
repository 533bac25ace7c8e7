"""Fine-tuning deltas: what a fine-tune changed, pruned, stored small, and applied again; start in `random_mask.py`."""

from sparse_ft.deltas.apply import apply_checkpoint
from sparse_ft.deltas.choose import DeltaChoice, choose, is_decoder
from sparse_ft.deltas.dare import add_delta, dare, keep_mask
from sparse_ft.deltas.darex import (
    LayerScaleSearch,
    ScaleSearch,
    search_eta,
    search_grid,
    search_scale,
    search_scales_per_layer,
)
from sparse_ft.deltas.darex_analytic import (
    LayerStatistics,
    analytic_scales,
    closed_form_eta,
    closed_form_mse,
    collect_statistics,
    kearns_saul,
    layer_statistics,
    published_scale,
    row_statistics,
)
from sparse_ft.deltas.darex_learned import LearnedScales, learn_scales
from sparse_ft.deltas.darex_moments import InputMoments, collect_moments
from sparse_ft.deltas.darex_objectives import (
    OutputChange,
    average_over_seeds,
    label_objective,
    output_change,
    output_objective,
    top_logits_change,
)
from sparse_ft.deltas.extract import Settings, Summary, extract_delta
from sparse_ft.deltas.lora import LoraAdapter, LoraTarget, load_lora
from sparse_ft.deltas.magnitude import GlobalMagnitude, global_magnitude, magnitude_delta, magnitude_keep
from sparse_ft.deltas.probe import DeltaProbe
from sparse_ft.deltas.random_mask import GENERATOR, random_keep, random_positions
from sparse_ft.deltas.resident import Delta, swap
from sparse_ft.deltas.scope import Entry, Scope, Selection, align
from sparse_ft.deltas.store import DeltaFile, rescale
from sparse_ft.deltas.structural import NeuronGroup, drop_neurons, neuron_groups, structural_delta, structural_keep
from sparse_ft.deltas.wanda import wanda_delta, wanda_keep

__all__ = [
    "GENERATOR",
    "Delta",
    "DeltaChoice",
    "DeltaFile",
    "DeltaProbe",
    "Entry",
    "GlobalMagnitude",
    "InputMoments",
    "LayerScaleSearch",
    "LayerStatistics",
    "LearnedScales",
    "LoraAdapter",
    "LoraTarget",
    "NeuronGroup",
    "OutputChange",
    "ScaleSearch",
    "Scope",
    "Selection",
    "Settings",
    "Summary",
    "add_delta",
    "align",
    "analytic_scales",
    "apply_checkpoint",
    "average_over_seeds",
    "choose",
    "closed_form_eta",
    "closed_form_mse",
    "collect_moments",
    "collect_statistics",
    "dare",
    "drop_neurons",
    "extract_delta",
    "global_magnitude",
    "is_decoder",
    "kearns_saul",
    "keep_mask",
    "label_objective",
    "layer_statistics",
    "learn_scales",
    "load_lora",
    "magnitude_delta",
    "magnitude_keep",
    "neuron_groups",
    "output_change",
    "output_objective",
    "published_scale",
    "random_keep",
    "random_positions",
    "rescale",
    "row_statistics",
    "search_eta",
    "search_grid",
    "search_scale",
    "search_scales_per_layer",
    "structural_delta",
    "structural_keep",
    "swap",
    "top_logits_change",
    "wanda_delta",
    "wanda_keep",
]
