"""A teacher in the student's memory: it is the dense original bit for bit, costs little and touches nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapters.sparse_models import adapted, pruned, snapshot, train
from tiny_models import TINY, tiny_batch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparse_ft.adapters import MaskLoraConfig, prepare_perp
from sparse_ft.distillation import self_teacher, self_teacher_bytes
from sparse_ft.distillation.pruned_values import PrunedValues, first_zeros, restore, restore_anywhere
from sparse_ft.distillation.stacks import find_stacks
from sparse_ft.masks import MaskSet, pack_bits
from sparse_ft.masks.blocks import PIECE
from sparse_ft.models import find_targets, load_model

FAMILIES = ["llama", "gpt2", "qwen", "opt", "t5", "bert", "mixtral"]
BF16 = torch.bfloat16


def make(
    name: str = "llama", *, dtype: torch.dtype = torch.float32, pattern: str = "unstructured", sparsity: float = 0.5
) -> tuple[PreTrainedModel, PreTrainedModel, MaskSet]:
    """The dense original, a frozen pruned student, and its masks."""
    dense = TINY[name]().to(dtype)
    student, masks = pruned(copy.deepcopy(dense), pattern=pattern, sparsity=sparsity)
    return dense, student.requires_grad_(False), masks


@torch.no_grad()
def outputs(model: nn.Module, *, autocast: bool = False) -> list[Tensor]:
    """Logits and hidden states of the fixed batch."""
    with torch.autocast("cpu", BF16, enabled=autocast):
        out = model(**tiny_batch(model), output_hidden_states=True)
    states = getattr(out, "hidden_states", None) or (*out.encoder_hidden_states, *out.decoder_hidden_states)
    return [out.logits, out.loss, *states]


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone().reshape(-1).view(torch.uint8) for name, value in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    now = bits(model)
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], value) for name, value in before.items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
def test_it_computes_what_the_dense_original_computes(family: str, dtype: torch.dtype) -> None:
    dense, student, masks = make(family, dtype=dtype)
    before = bits(student)
    teacher = self_teacher(student, masks, dense)
    assert type(teacher) is type(dense) and not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert_same(outputs(teacher), outputs(dense))
    assert_same(outputs(teacher, autocast=True), outputs(dense, autocast=True))
    assert not torch.equal(outputs(teacher)[0], outputs(student)[0])
    assert_untouched(student, before)
    assert [stack.depth for stack in find_stacks(teacher)] == [stack.depth for stack in find_stacks(dense)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("pattern", "limit"), [("unstructured", 0.6), ("2:4", 0.6), ("1:4", 0.85)])
def test_it_lies_in_the_students_memory(family: str, pattern: str, limit: float) -> None:
    dense, student, masks = make(family, dtype=BF16, pattern=pattern)
    teacher = self_teacher(student, masks, dense)
    own = {name: parameter.data_ptr() for name, parameter in student.named_parameters(remove_duplicate=False)}
    for name, parameter in teacher.named_parameters(remove_duplicate=False):
        live = name.replace("parametrizations.", "").removesuffix(".original")
        assert parameter.data_ptr() == own[live], name
    parts = {n: module for n, module in teacher.named_modules() if isinstance(module, PrunedValues)}
    assert len(parts) == len(masks)
    counts = masks.counts()
    for path, part in parts.items():
        name = path.replace("parametrizations.", "").removesuffix(".0")
        assert part.packed.data_ptr() == masks.packed(name).data_ptr()
        assert part.values.numel() == counts[name][1] - counts[name][0]
    size = self_teacher_bytes(teacher, student)
    assert size.pruned_values == sum(2 * (total - kept) for kept, total in counts.values())
    assert size.shared == sum(p.nbytes for p in student.parameters())
    buffers = sum(buffer.nbytes for buffer in dense.buffers())
    assert size.dense == size.shared + buffers
    assert buffers <= size.copied <= buffers + 8 * len(masks)
    assert size.added == size.pruned_values + size.copied
    assert size.share <= limit


def test_ties_stay_ties() -> None:
    dense, student, masks = make("qwen")
    teacher = self_teacher(student, masks, dense)
    assert teacher.lm_head.weight is teacher.model.embed_tokens.weight
    student.requires_grad_(True)
    copied = self_teacher(student, masks, dense)
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    assert copied.lm_head.weight.data_ptr() != student.lm_head.weight.data_ptr()
    assert_same(outputs(copied), outputs(dense))


def test_what_is_untied_in_the_original_is_untied_in_the_teacher() -> None:
    dense, student, masks = make("qwen")
    dense.lm_head.weight = nn.Parameter(dense.lm_head.weight.detach() + 1)
    teacher = self_teacher(student, masks, dense)
    assert teacher.lm_head.weight is not teacher.model.embed_tokens.weight
    assert_same(outputs(teacher), outputs(dense))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen", "mixtral", "t5"])
def test_the_original_may_be_a_directory(family: str, tmp_path: Path) -> None:
    dense, student, masks = make(family)
    dense.save_pretrained(tmp_path)
    teacher = self_teacher(student, masks, tmp_path)
    assert_same(outputs(teacher), outputs(load_model(tmp_path)))
    assert self_teacher_bytes(teacher, student).share < 0.6


def test_a_directory_is_opened_in_the_students_dtype(tmp_path: Path) -> None:
    TINY["llama"]().save_pretrained(tmp_path)
    dense = load_model(tmp_path, dtype=BF16)
    student, masks = pruned(copy.deepcopy(dense), sparsity=0.5)
    teacher = self_teacher(student.requires_grad_(False), masks, str(tmp_path))
    assert_same(outputs(teacher), outputs(dense))
    assert self_teacher_bytes(teacher, student).share < 0.6


def test_the_original_may_be_tensors_by_name() -> None:
    dense, student, masks = make("gpt2", dtype=BF16)
    tensors = dict(dense.named_parameters())
    teacher = self_teacher(student, masks, tensors)
    before = outputs(teacher)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.zero_()  # the teacher holds nothing of what it was given
    assert_same(outputs(teacher), before)
    assert_same(before, outputs(TINY["gpt2"]().to(BF16)))


def test_changed_kept_values_are_copied() -> None:
    dense, student, masks = make("llama")
    changed = find_targets(student)[0].name
    student.get_parameter(changed).data.mul_(1.5)
    teacher = self_teacher(student, masks, dense)
    assert_same(outputs(teacher), outputs(dense))
    assert teacher.get_parameter(changed).data_ptr() != student.get_parameter(changed).data_ptr()
    assert sum(isinstance(module, PrunedValues) for module in teacher.modules()) == len(masks) - 1


def test_a_single_changed_bit_of_a_kept_zero_is_seen() -> None:
    dense, student, masks = make("llama")
    name = find_targets(student)[0].name
    place = masks[name].nonzero()[-1].tolist()
    with torch.no_grad():
        dense.get_parameter(name)[tuple(place)] = 0.0
        student.get_parameter(name)[tuple(place)] = -0.0
    teacher = self_teacher(student, masks, dense)
    assert torch.equal(bits(teacher)[name], bits(dense)[name])


def test_training_the_adapter_leaves_the_teacher_alone() -> None:
    dense, base, masks = make("llama")
    student = adapted(base, masks)
    teacher = self_teacher(student, masks, dense)
    before = outputs(teacher)
    assert_same(before, outputs(dense))
    assert self_teacher_bytes(teacher, student).share < 0.6
    start = outputs(student)[0]
    train(student, steps=2)
    assert not torch.equal(outputs(student.eval())[0], start)
    assert_same(outputs(teacher), before)
    assert not any(parameter is mine for parameter in teacher.parameters() for mine in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("method", ["norms", "biases+norms", "mask_lora+norms", "mask_lora+biases+norms+embeddings"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
def test_trained_groups_are_copied(method: str, dtype: torch.dtype) -> None:
    dense, base, masks = make("opt", dtype=dtype)
    if "embeddings" in method:
        dense.config.tie_word_embeddings = base.config.tie_word_embeddings = False
        base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone(), requires_grad=False)
        dense.lm_head.weight = nn.Parameter(dense.lm_head.weight.detach().clone())
    student = prepare_perp(base, method, masks)
    before = snapshot(student)
    teacher = self_teacher(student, masks, dense)
    trained = {parameter.data_ptr() for parameter in student.parameters() if parameter.requires_grad}
    assert trained and not trained & {parameter.data_ptr() for parameter in teacher.parameters()}
    assert {parameter.dtype for parameter in teacher.parameters()} == {dtype}
    assert_same(outputs(teacher), outputs(dense))
    with torch.autocast("cpu", BF16, enabled=dtype == BF16):
        train(student, steps=2)
    assert any(not torch.equal(before[name], value) for name, value in snapshot(student).items())
    assert_same(outputs(teacher), outputs(dense))
    assert self_teacher_bytes(teacher, student).share < 0.75


def test_a_student_that_is_wholly_trained_gets_a_copy() -> None:
    dense, student, masks = make("llama")
    student.requires_grad_(True)
    teacher = self_teacher(student, masks, dense)
    size = self_teacher_bytes(teacher, student)
    assert size.shared == size.pruned_values == 0 and size.added == size.dense
    train(student, steps=1)
    assert_same(outputs(teacher), outputs(dense))


def test_a_student_that_is_pruned_later_by_these_masks_leaves_the_teacher_dense() -> None:
    dense, _, masks = make("llama")
    student = copy.deepcopy(dense).requires_grad_(False)
    teacher = self_teacher(student, masks, dense)
    masks.apply_(student)
    assert_same(outputs(teacher), outputs(dense))


def test_a_copied_and_a_cast_teacher_leave_the_student_alone() -> None:
    dense, student, masks = make("gpt2")
    before = bits(student)
    teacher = self_teacher(student, masks, dense)
    assert_same(outputs(copy.deepcopy(teacher)), outputs(dense))
    teacher.to(BF16)
    assert_same(outputs(teacher), outputs(copy.deepcopy(dense).to(BF16)))
    assert_untouched(student, before)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_stacks_of_experts_are_rebuilt_once_for_each_pass(experts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = TINY["mixtral"]()
    dense.set_experts_implementation(experts)
    student, masks = pruned(copy.deepcopy(dense))
    teacher = self_teacher(student.requires_grad_(False), masks, dense)
    assert teacher.config._experts_implementation == experts
    calls: list[torch.Size] = []

    def counting(weight: Tensor, *args: Tensor) -> Tensor:
        calls.append(weight.shape)
        return restore(weight, *args)

    monkeypatch.setattr("sparse_ft.distillation.pruned_values.restore", counting)
    assert_same(outputs(teacher), outputs(dense))
    assert len(calls) == len(masks)
    assert all(module._held is None for module in teacher.modules() if isinstance(module, PrunedValues))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_computed_as_in_the_student(attention: str) -> None:
    dense = TINY["llama"]()
    dense.set_attn_implementation(attention)
    student, masks = pruned(copy.deepcopy(dense))
    teacher = self_teacher(student.requires_grad_(False), masks, dense)
    assert teacher.config._attn_implementation == attention
    assert_same(outputs(teacher), outputs(dense))


@pytest.mark.parametrize("numel", [1, 7, 8, 9, 1000, PIECE, 4 * PIECE + 11])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_restoring_is_exact(numel: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(numel)
    dense = torch.randn(numel, generator=generator).to(dtype)
    for density in (0.0, 0.03, 0.5, 0.99):
        mask = torch.rand(numel, generator=generator) < density
        mask[int(torch.randint(numel, (), generator=generator))] = False
        packed = pack_bits(mask)
        garbage = torch.where(mask, dense, torch.tensor(float("nan"), dtype=dtype))
        for threads in (1, 2):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                rebuilt = restore(garbage, packed, dense[~mask], first_zeros(packed, numel))
            finally:
                torch.set_num_threads(before)
            assert torch.equal(rebuilt, dense)


def _narrow(dense: PreTrainedModel) -> object:
    tensors = dict(dense.named_parameters())
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]
    return tensors


def _without_norm(dense: PreTrainedModel) -> object:
    return {name: tensor for name, tensor in dense.named_parameters() if name != "model.norm.weight"}


@pytest.mark.parametrize(
    ("original", "message"),
    [
        (_narrow, r"'model.norm.weight' has shape \(31,\) in the original but \(32,\) in the student"),
        (_without_norm, "The original has no tensor 'model.norm.weight', which LlamaForCausalLM needs"),
        (lambda dense: TINY["gpt2"](), "The original has no tensor 'model.embed_tokens.weight'"),
    ],
)
def test_an_original_that_does_not_fit_is_refused(original: Callable[[PreTrainedModel], object], message: str) -> None:
    dense, student, masks = make("llama")
    with pytest.raises(ValueError, match=message):
        self_teacher(student, masks, original(dense))


def test_an_original_that_is_sparse_already_is_refused() -> None:
    _, student, masks = make("llama")
    with pytest.raises(ValueError, match="are 0 in the original too"):
        self_teacher(student, masks, student)


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    _, student, masks = make("llama")
    with pytest.raises(FileNotFoundError):
        self_teacher(student, masks, tmp_path / "nowhere")


def test_masks_of_another_model_are_refused() -> None:
    dense, student, _ = make("llama")
    with pytest.raises(ValueError, match="Another model's masks"):
        self_teacher(student, make("gpt2")[2], dense)


def test_a_quantised_student_is_refused() -> None:
    dense, student, masks = make("llama")
    layer = student.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"quantised \(torch.int8\).* load the teacher as a checkpoint of its own"):
        self_teacher(student, masks, dense)


def test_a_sharded_student_is_refused() -> None:
    dense, student, masks = make("llama")
    student.model.norm.weight = nn.Parameter(torch.empty(0))
    with pytest.raises(ValueError, match=r"'model.norm.weight' of the student is sharded among processes"):
        self_teacher(student, masks, dense)


def test_a_student_that_is_no_transformers_model_is_refused() -> None:
    dense, _, masks = make("llama")
    with pytest.raises(ValueError, match="The student is a Linear"):
        self_teacher(nn.Linear(2, 2), masks, dense)


def test_mask_lora_on_all_families_shares_what_is_frozen() -> None:
    for family in ("gpt2", "mixtral", "t5"):
        dense, base, masks = make(family)
        options = {"task_type": None} if family == "t5" else {}
        student = adapted(base, masks, **options)
        assert isinstance(next(iter(student.peft_config.values())), MaskLoraConfig)
        teacher = self_teacher(student, masks, dense)
        assert_same(outputs(teacher), outputs(dense))
        assert sum(isinstance(module, PrunedValues) for module in teacher.modules()) == len(masks)
        assert self_teacher_bytes(teacher, student).share < 0.6


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_it_is_the_dense_original_on_a_gpu(family: str) -> None:
    dense, student, masks = make(family, dtype=BF16)
    batch = {name: value.cuda() for name, value in tiny_batch(dense).items()}
    dense.cuda()
    teacher = self_teacher(student.cuda(), masks, dense)
    with torch.no_grad():
        assert torch.equal(teacher(**batch).logits, dense(**batch).logits)
    assert self_teacher_bytes(teacher, student).share < 0.65  # its masks are on the GPU too


def test_the_masks_may_be_elsewhere_than_the_weights() -> None:
    dense = torch.randn(3, 50)
    mask = torch.rand(3, 50) < 0.5
    part = PrunedValues(pack_bits(mask), dense[~mask], dense.numel())
    moved = copy.deepcopy(part).to("meta")
    assert moved.packed.is_meta and not moved.bits_of_set.is_meta
    assert torch.equal(part(dense * mask), dense)
    assert torch.equal(restore_anywhere(dense * mask, part.packed, part.values), dense)
