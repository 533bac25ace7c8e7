"""Losses that pull a student towards a teacher: hidden states (SquareHead and others) and output distributions (KL)."""

from sparse_ft.distillation.cached_targets import CachedTargets
from sparse_ft.distillation.config import DistillationConfig
from sparse_ft.distillation.distiller import Distiller, check_targets
from sparse_ft.distillation.features import cosine_layer, cosine_loss, mse_layer, mse_loss
from sparse_ft.distillation.head import Head, TokenLoss
from sparse_ft.distillation.kl import ce_kl_loss, kl_loss
from sparse_ft.distillation.layers import layer_pairs
from sparse_ft.distillation.output_head import check_head, output_head, output_module
from sparse_ft.distillation.positions import loss_positions
from sparse_ft.distillation.recording import predictor
from sparse_ft.distillation.self_teacher import SharedBytes, self_teacher, self_teacher_bytes
from sparse_ft.distillation.squarehead import squarehead_layer, squarehead_loss, teacher_energy
from sparse_ft.distillation.states import FeatureLoss
from sparse_ft.distillation.teacher import check_pair, check_tokenizers, load_teacher
from sparse_ft.distillation.top_k import TopK, top_k_targets
from sparse_ft.distillation.trainer import distilling
from sparse_ft.distillation.write_targets import write_targets

__all__ = [
    "CachedTargets",
    "DistillationConfig",
    "Distiller",
    "FeatureLoss",
    "Head",
    "SharedBytes",
    "TokenLoss",
    "TopK",
    "ce_kl_loss",
    "check_head",
    "check_pair",
    "check_targets",
    "check_tokenizers",
    "cosine_layer",
    "cosine_loss",
    "distilling",
    "kl_loss",
    "layer_pairs",
    "load_teacher",
    "loss_positions",
    "mse_layer",
    "mse_loss",
    "output_head",
    "output_module",
    "predictor",
    "self_teacher",
    "self_teacher_bytes",
    "squarehead_layer",
    "squarehead_loss",
    "teacher_energy",
    "top_k_targets",
    "write_targets",
]
