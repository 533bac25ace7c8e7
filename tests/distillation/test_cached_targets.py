"""Targets on disk: what is looked up is the teacher's top k of that very row, and anything else is refused."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TINY, VOCABULARY
from torch import Tensor

from sparse_ft.distillation import CachedTargets, Head, kl_loss, top_k_targets, write_targets

Predict = Callable[[Tensor, Tensor], tuple[Tensor, Head | None]]
LENGTHS = [5, 12, 1, 9, 16, 9, 3, 12]


def rows(seed: int = 0, lengths: list[int] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="module")
def model() -> Any:
    model = TINY["llama"]()
    model.lm_head.weight.data.mul_(30)  # peaked, as a trained teacher is
    return model


@pytest.fixture(scope="module")
def predict(model: Any) -> Predict:
    def states(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Head]:
        assert not torch.is_grad_enabled()
        hidden = model.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden, Head(model.lm_head.weight)

    return states


def table(vocabulary: int = VOCABULARY, seed: int = 7) -> Predict:
    """A teacher whose logits depend on the token alone, to the bit and whatever the batch."""
    logits = torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3
    return lambda input_ids, attention_mask: (logits[input_ids], None)


def write(directory: Path, sequences: Any, predict: Predict, **settings: Any) -> CachedTargets:
    given = {"k": 6, "vocabulary": VOCABULARY, "progress": False, "batch_size": 3, **settings}
    return CachedTargets.open(write_targets(directory, sequences, predict, **given))


def padded(sequences: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
    longest = max(map(len, sequences)) + 2
    ids, mask = torch.full((len(sequences), longest), 2), torch.zeros(len(sequences), longest, dtype=torch.int64)
    for row, tokens in enumerate(sequences):
        place = slice(0, len(tokens)) if side == "right" else slice(longest - len(tokens), longest)
        ids[row, place], mask[row, place] = torch.tensor(tokens), 1
    return ids, mask


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize("side", ["left", "right"])
def test_lookup_is_the_teachers_top_k_of_each_row(tmp_path: Path, model: Any, predict: Predict, side: str) -> None:
    sequences, k, temperature = rows(), 6, 2.0
    targets = write(tmp_path / "t", sequences, predict, dtype=torch.float32, temperature=temperature)
    order = [4, 2, 7, 0, 6, 1]
    ids, mask = padded([sequences[i] for i in order], side)
    found = targets.lookup(ids, mask)
    assert found.temperature == temperature and found.log_probs.shape == (*ids.shape, k)
    assert found.indices.dtype == torch.int32 and found.tail.shape == ids.shape
    assert found.log_probs.isfinite().all() and found.tail.isfinite().all()
    for row, number in enumerate(order):
        with torch.no_grad():
            logits = model(torch.tensor([sequences[number]])).logits[0].double()
        probabilities = torch.softmax(logits / temperature, -1)
        valid = mask[row].bool()
        chosen = found.indices[row][valid].long()
        torch.testing.assert_close(
            probabilities.gather(-1, chosen), found.log_probs[row][valid].double().exp(), rtol=1e-4, atol=1e-6
        )
        best = probabilities.topk(k, -1).values
        torch.testing.assert_close(found.log_probs[row][valid].double().exp(), best, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.tail[row][valid].double().exp(), 1 - best.sum(-1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_loss_is_that_of_targets_made_on_the_spot(tmp_path: Path, dtype: torch.dtype) -> None:
    sequences, teacher = rows(1), table()
    targets = write(tmp_path / "t", sequences, teacher, dtype=dtype, shard_bytes=400)
    ids, mask = padded(sequences, "left")
    direct = top_k_targets(teacher(ids, mask)[0], 6, dtype=dtype)
    found, valid = targets.lookup(ids, mask), mask.bool()
    for one, other in zip(found[:3], direct[:3], strict=True):
        assert one.dtype == other.dtype and torch.equal(one[valid], other[valid])
    labels = ids.masked_fill(~valid, -100)
    labels[:, :-1].masked_fill_(~valid[:, :-1], -100)
    # position i predicts token i + 1: drop the label that a pad on the left would predict
    labels[:, 1:].masked_fill_(~valid[:, :-1], -100)
    student = torch.randn(*ids.shape, VOCABULARY)
    assert torch.equal(kl_loss(student, found, labels), kl_loss(student, direct, labels))


def test_the_whole_vocabulary_gives_the_full_kl(tmp_path: Path) -> None:
    sequences, teacher = rows(2), table()
    targets = write(tmp_path / "t", sequences, teacher, k=VOCABULARY, dtype=torch.float32)
    ids, mask = padded(sequences, "right")
    found = targets.lookup(ids, mask)
    assert (found.tail[mask.bool()] == -torch.inf).all()
    labels = ids.masked_fill(mask == 0, -100)
    student = torch.randn(*ids.shape, VOCABULARY)
    full = kl_loss(student, teacher(ids, mask)[0], labels)
    torch.testing.assert_close(kl_loss(student, found, labels), full, rtol=1e-5, atol=1e-6)


def test_the_tail_survives_in_every_dtype(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        targets = write(tmp_path / str(dtype), [[5, 6]], table(), k=VOCABULARY, dtype=dtype)
        assert targets.lookup(torch.tensor([[5, 6]])).tail.tolist() == [[-torch.inf, -torch.inf]]


def test_batches_of_other_sizes_give_the_same_but_for_rounding(tmp_path: Path, predict: Predict) -> None:
    sequences = rows(3)
    ids, mask = padded(sequences, "right")
    one, other = (
        write(tmp_path / str(size), sequences, predict, batch_size=size, dtype=torch.float32).lookup(ids, mask)
        for size in (1, 8)
    )
    torch.testing.assert_close(one.log_probs, other.log_probs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one.tail, other.tail, rtol=1e-4, atol=1e-4)


def test_rows_may_come_in_any_form(tmp_path: Path) -> None:
    sequences = rows(4)
    ids, mask = padded(sequences, "left")
    columns = {"input_ids": ids.tolist(), "attention_mask": mask.tolist(), "labels": ids.tolist()}
    dataset = datasets.Dataset.from_dict(columns)
    forms: dict[str, Any] = {
        "lists": sequences,
        "tensors": [torch.tensor(tokens) for tokens in sequences],
        "numpy": [torch.tensor(tokens).numpy() for tokens in sequences],
        "stream": iter(sequences),
        "mappings": ({"input_ids": row, "attention_mask": m} for row, m in zip(ids, mask, strict=True)),
        "dataset": dataset,
        "formatted": dataset.with_format("torch"),
    }
    written = [contents(write(tmp_path / name, form, table()).directory) for name, form in forms.items()]
    assert all(other == written[0] for other in written[1:])


def test_padding_in_a_batch_is_small(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    sequences = rows(5, torch.randint(1, 40, (300,), generator=generator).tolist())
    teacher, shapes = table(), []

    def watched(ids: Tensor, mask: Tensor) -> tuple[Tensor, None]:
        shapes.append(ids.shape)
        assert torch.equal(mask, mask.sort(1, descending=True).values), "padding is on the right"
        return teacher(ids, mask)[0], None

    targets = write(tmp_path / "t", sequences, watched, batch_size=4)
    assert max(shape[0] for shape in shapes) == 4
    assert sum(shape.numel() for shape in shapes) < 1.1 * targets.layout.tokens


def test_other_tokens_are_not_found(tmp_path: Path) -> None:
    first, second, *_ = sequences = rows(6)
    targets = write(tmp_path / "t", sequences, table())
    strangers = [
        first[:-1],  # another sequence length
        first + second[:1],
        [first[0] + 1, *first[1:]] if first[0] + 1 < VOCABULARY else [first[0] - 1, *first[1:]],
        first[::-1],
        first + second,  # packed, where the rows were not
    ]
    for stranger in strangers:
        ids, mask = padded([second, stranger], "right")
        with pytest.raises(
            ValueError, match=f"Row 1.* with {len(stranger)} tokens, .* the 8 sequences of '.*/t': make"
        ):
            targets.lookup(ids, mask)
    with pytest.raises(ValueError, match="Row 0"):
        targets.lookup(padded([first], "right")[0])  # without the mask padding is tokens


def test_a_packed_row_is_found_as_a_packed_row_only(tmp_path: Path) -> None:
    first, second, *_ = rows(6)
    targets = write(tmp_path / "t", [first + second], table())
    assert targets.lookup(torch.tensor([first + second])).tail.shape == (1, len(first) + len(second))
    for part in (first, second, second + first):
        with pytest.raises(ValueError, match="not among the 1 sequences"):
            targets.lookup(torch.tensor([part]))


def test_the_key_is_a_digest_of_little_endian_int64(tmp_path: Path) -> None:
    sequences = rows(7)
    write(tmp_path / "t", sequences, table())
    keys = sorted(
        hashlib.blake2b(b"".join(i.to_bytes(8, "little") for i in tokens), digest_size=16).digest()
        for tokens in sequences
    )
    stored = load_file(tmp_path / "t" / "index.safetensors")["digests"]
    assert [row.numpy().tobytes() for row in stored] == keys
    targets = CachedTargets.open(tmp_path / "t")
    narrow = targets.lookup(torch.tensor(sequences[:1], dtype=torch.int32))
    assert torch.equal(narrow.tail, targets.lookup(torch.tensor(sequences[:1])).tail)


def test_duplicates_and_empty_rows_are_not_stored(tmp_path: Path) -> None:
    sequences = rows(8)
    ids, mask = padded(sequences[:2], "left")
    again = [{"input_ids": row, "attention_mask": m} for row, m in zip(ids, mask, strict=True)]
    once = write(tmp_path / "one", sequences, table())
    twice = write(tmp_path / "two", [*sequences, [], *again, *sequences[:3]], table())
    assert contents(once.directory) == contents(twice.directory)
    assert len(twice) == len(sequences) and twice.layout.tokens == sum(LENGTHS)
    nothing = twice.lookup(torch.tensor([sequences[0], [0] * LENGTHS[0]]), torch.tensor([[1] * 5, [0] * 5]))
    assert not nothing.log_probs[1].any() and nothing.log_probs[0].all()


def test_files_are_bounded_and_add_up(tmp_path: Path) -> None:
    sequences = rows(9)
    whole = write(tmp_path / "whole", sequences, table())
    per_token = 6 * (2 + 2) + 2
    parts = write(tmp_path / "parts", sequences, table(), shard_bytes=20 * per_token)
    tiny = write(tmp_path / "tiny", sequences, table(), shard_bytes=1)
    assert max(parts.layout.shards) <= 20 and len(parts.layout.shards) > 3
    assert len(tiny.layout.shards) == len(sequences)
    for side in ("left", "right"):
        batch = padded(sequences, side)
        for other in (parts, tiny):
            assert all(
                torch.equal(a, b) for a, b in zip(whole.lookup(*batch)[:3], other.lookup(*batch)[:3], strict=True)
            )
    shards = sorted((tmp_path / "parts").glob("targets-*.safetensors"))
    assert [len(load_file(path)["tail"]) for path in shards] == list(parts.layout.shards)


@pytest.mark.parametrize(("vocabulary", "index", "size"), [(65536, torch.uint16, 2), (65537, torch.int32, 4)])
def test_indices_take_two_bytes_where_they_can(tmp_path: Path, vocabulary: int, index: torch.dtype, size: int) -> None:
    def last_ones(ids: Tensor, mask: Tensor) -> tuple[Tensor, None]:
        return torch.arange(vocabulary).float().expand(*ids.shape, -1) / 1000, None

    targets = write(tmp_path / "t", [[1, 65535]], last_ones, vocabulary=vocabulary, k=64)
    found = targets.lookup(torch.tensor([[1, 65535]]))
    assert found.indices[0, 0].tolist() == list(range(vocabulary - 1, vocabulary - 65, -1))
    stored = load_file(tmp_path / "t" / "targets-00001.safetensors")
    assert stored["indices"].dtype == index
    described = json.loads((tmp_path / "t" / "targets.json").read_text())
    assert described["bytes_per_token"] == 64 * (2 + size) + 2 == sum(t.nbytes for t in stored.values()) / 2


def test_what_the_directory_says_of_itself(tmp_path: Path) -> None:
    targets = write(tmp_path / "t", rows(), table(), teacher="teacher-7b", temperature=2, dtype=torch.float16)
    described = json.loads((tmp_path / "t" / "targets.json").read_text())
    assert described == {
        "format": 1, "teacher": "teacher-7b", "k": 6, "temperature": 2.0, "dtype": "float16", "vocabulary": VOCABULARY,
        "sequences": 8, "tokens": sum(LENGTHS), "bytes_per_token": 26, "shards": [sum(LENGTHS)],
    }  # fmt: skip
    assert (targets.k, targets.temperature, targets.vocabulary, targets.teacher) == (6, 2.0, VOCABULARY, "teacher-7b")
    with pytest.raises(ValueError, match=r"made at temperature 2\.0"):
        kl_loss(torch.zeros(1, 5, VOCABULARY), targets.lookup(torch.tensor(rows()[:1])), torch.tensor(rows()[:1]))


def test_a_second_writing_gives_the_same_bytes(tmp_path: Path, predict: Predict) -> None:
    one = write(tmp_path / "one", rows(), predict, shard_bytes=500)
    other = write(tmp_path / "other", rows(), predict, shard_bytes=500)
    assert len(contents(one.directory)) > 4 and contents(one.directory) == contents(other.directory)


def test_a_writer_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    sequences, teacher = rows(), table()
    calls = iter(range(100))

    def failing(ids: Tensor, mask: Tensor) -> tuple[Tensor, None]:
        if next(calls) % 2:
            raise KeyboardInterrupt
        return teacher(ids, mask)[0], None

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "t", sequences, failing, shard_bytes=1)
    assert os.listdir(tmp_path) == []
    write(tmp_path / "t", sequences, teacher)
    before = contents(tmp_path / "t")
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "t", sequences, failing, shard_bytes=1, overwrite=True)
    assert os.listdir(tmp_path) == ["t"] and contents(tmp_path / "t") == before


_KILLED = """
import sys, time, torch
from pathlib import Path
from sparse_ft.distillation import write_targets
def predict(ids, mask):
    if len(list(Path(sys.argv[1]).parent.glob(".t.partial-*/targets-*"))) >= 2:
        print("half", flush=True)
        time.sleep(60)
    return torch.zeros(*ids.shape, 50), None
rows = [[i % 50, i // 50, 3] for i in range(200)]
write_targets(sys.argv[1], rows, predict, k=2, vocabulary=50, shard_bytes=1, overwrite=True, progress=False)
"""


def test_a_killed_writer_leaves_the_old_directory(tmp_path: Path) -> None:
    sequences = rows()
    old = write(tmp_path / "t", sequences, table())
    before = contents(tmp_path / "t")
    child = subprocess.Popen([sys.executable, "-c", _KILLED, str(tmp_path / "t")], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "half\n"
    child.kill()
    child.wait()
    child.stdout.close()
    assert len(os.listdir(tmp_path)) == 2 and contents(tmp_path / "t") == before
    ids, mask = padded(sequences, "right")
    assert torch.equal(CachedTargets.open(tmp_path / "t").lookup(ids, mask).tail, old.lookup(ids, mask).tail)
    write(tmp_path / "t", sequences, table(), overwrite=True)
    assert os.listdir(tmp_path) == ["t"] and contents(tmp_path / "t") == before


def test_opening_reads_the_index_only_and_a_lookup_its_own_shard(tmp_path: Path) -> None:
    sequences = rows(10)
    whole = write(tmp_path / "t", sequences, table(), shard_bytes=1)
    wanted = whole.lookup(torch.tensor(sequences[4:5])).tail
    for path in (tmp_path / "t").glob("targets-*.safetensors"):
        if len(load_file(path)["tail"]) != LENGTHS[4]:
            path.write_bytes(b"\xff" * path.stat().st_size)
    targets = CachedTargets.open(tmp_path / "t")
    assert torch.equal(targets.lookup(torch.tensor(sequences[4:5])).tail, wanted)
    with pytest.raises(ValueError, match=r"targets-.*header"):
        targets.lookup(torch.tensor(sequences[:1]))


STATM = Path("/proc/self/statm")
linux_only = pytest.mark.skipif(not STATM.exists(), reason="reads Linux's account of memory")


def resident() -> tuple[int, int]:
    """Bytes of this process in memory: of its own, and of mapped files."""
    own_and_mapped, mapped = (int(pages) * os.sysconf("SC_PAGE_SIZE") for pages in STATM.read_text().split()[1:3])
    return own_and_mapped - mapped, mapped


@linux_only
def test_a_lookup_touches_its_rows_only(tmp_path: Path) -> None:
    vocabulary, length = 4096, 64
    logits = torch.randn(length, vocabulary)

    def predict(ids: Tensor, mask: Tensor) -> tuple[Tensor, None]:
        return logits.expand(len(ids), -1, -1), None

    sequences = [[number, *range(1, length)] for number in range(100)]
    write(tmp_path / "t", sequences, predict, vocabulary=vocabulary, k=1024)  # 26 MB in one file
    targets = CachedTargets.open(tmp_path / "t")
    targets.lookup(torch.tensor(sequences[:1]))
    own, mapped = resident()
    targets.lookup(torch.tensor(sequences[50:51]))
    assert resident()[0] - own < 4e6 and resident()[1] - mapped < 8e6  # the system maps some pages around each
    targets.lookup(torch.tensor(sequences))
    assert resident()[1] - mapped > 20e6, "the measure sees pages of the file"


@linux_only
def test_a_million_sequences_open_at_once(tmp_path: Path) -> None:
    count = 1_000_000
    write(tmp_path / "t", [[5]], table())
    described = json.loads((tmp_path / "t" / "targets.json").read_text())
    described |= {"sequences": count}
    (tmp_path / "t" / "targets.json").write_text(json.dumps(described))
    key = torch.tensor(list(hashlib.blake2b((5).to_bytes(8, "little"), digest_size=16).digest()), dtype=torch.uint8)
    keys = torch.randint(0, 256, (count, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    keys[-1] = key
    order = torch.from_numpy(keys.numpy().view("S16")[:, 0].argsort())
    index = {"digests": keys[order], "starts": torch.zeros(count, dtype=torch.int64)}
    save_file({**index, "lengths": torch.ones(count, dtype=torch.int32)}, tmp_path / "t" / "index.safetensors")
    (own, _), start = resident(), time.perf_counter()
    targets = CachedTargets.open(tmp_path / "t")
    targets.lookup(torch.tensor([[5]]))
    assert time.perf_counter() - start < 1
    assert resident()[0] - own < 5e6, "16 MB of digests are in the file"


def test_it_travels_to_other_processes_as_a_path(tmp_path: Path) -> None:
    targets = write(tmp_path / "t", rows(), table())
    ids = torch.tensor(rows()[:1])
    wanted = targets.lookup(ids)
    packed = pickle.dumps(targets)
    assert len(packed) < 1000 and torch.equal(pickle.loads(packed).lookup(ids).log_probs, wanted.log_probs)


def test_a_directory_that_was_replaced_is_noticed(tmp_path: Path) -> None:
    sequences = rows()
    targets = write(tmp_path / "t", sequences, table(seed=1))
    write(tmp_path / "t", sequences, table(seed=2), overwrite=True)
    with pytest.raises(ValueError, match="written again since it was opened"):
        targets.lookup(torch.tensor(sequences[:1]))


def not_called(ids: Tensor, mask: Tensor) -> tuple[Tensor, None]:
    raise AssertionError("the teacher was run before the settings were checked")


def ends_early() -> Iterator[list[int]]:
    raise AssertionError("rows were read before the settings were checked")
    yield []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k is 0 but the vocabulary has 96 entries"),
        ({"k": 97}, "k is 97 but the vocabulary has 96 entries"),
        ({"temperature": 0.0}, "The temperature is 0.0"),
        ({"temperature": -1.0}, "The temperature is -1.0"),
        ({"temperature": float("nan")}, "The temperature is nan"),
        ({"dtype": torch.int8}, "dtype is torch.int8, .* bfloat16, float16, float32"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"shard_bytes": 0}, "shard_bytes is 0"),
    ],
)
def test_settings_out_of_range_are_refused_before_any_work(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "t", ends_early(), not_called, **settings)
    assert os.listdir(tmp_path) == []


def test_a_directory_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        write(tmp_path, ends_early(), not_called)
    assert os.listdir(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([[1, 2], [3, 96]], "Sequence 1 holds the token id 96, but a vocabulary of 96 has ids from 0 to 95"),
        ([[1, -100]], "Sequence 0 holds the token id -100"),
        ([[1], [0.5]], "Sequence 1 is torch.float32 of shape"),
        ([[[1, 2], [3, 4]]], r"Sequence 0 is torch.int64 of shape \(2, 2\)"),
        (["a text"], "Sequence 0 is no list of token ids"),
        ([{"text": "a"}], r"Sequence 0 has the columns \['text'\] but no 'input_ids'"),
        ([{"input_ids": [1, 2], "attention_mask": [1]}], "Sequence 0 has 2 token ids but an attention mask of shape"),
        ([], "no sequence with a token"),
        ([[], []], "no sequence with a token"),
    ],
)
def test_rows_that_are_no_token_ids_are_refused(tmp_path: Path, sequences: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "t", sequences, not_called)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("teacher", "error", "message"),
    [
        (table(100), ValueError, "100 logits per token but the vocabulary was given as 96"),
        (lambda ids, mask: (torch.zeros(len(ids), VOCABULARY), None), ValueError, "predict returned states of shape"),
        (lambda ids, mask: (torch.full((*ids.shape, 96), torch.nan), None), RuntimeError, "logits are not finite"),
        (lambda ids, mask: (torch.full((*ids.shape, 96), torch.inf), None), RuntimeError, "logits are not finite"),
    ],
)
def test_predictions_that_are_none_are_refused(
    tmp_path: Path, teacher: Predict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        write(tmp_path / "t", rows(), teacher)
    assert os.listdir(tmp_path) == []


def damage(directory: Path, what: str) -> None:
    shard, described = directory / "targets-00001.safetensors", directory / "targets.json"
    index = directory / "index.safetensors"
    content = json.loads(described.read_text())
    if what == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif what == "longer":
        shard.write_bytes(shard.read_bytes() + b"\0")
    elif what == "gone":
        shard.unlink()
    elif what == "index truncated":
        index.write_bytes(index.read_bytes()[:-1])
    elif what == "another index":
        described.write_text(json.dumps(content | {"sequences": 7}))
    elif what == "newer":
        described.write_text(json.dumps({"format": 2}))
    elif what == "k":
        described.write_text(json.dumps(content | {"k": "6"}))
    elif what == "tokens":
        described.write_text(json.dumps(content | {"tokens": 1}))
    elif what == "no json":
        described.write_text("{")
    elif what == "list":
        described.write_text("[1]")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("truncated", "targets-00001.safetensors' has .* bytes but its targets need"),
        ("longer", "targets-00001.safetensors' has .* bytes but its targets need"),
        ("gone", "lacks the file 'targets-00001.safetensors'"),
        ("index truncated", "index.safetensors' is truncated"),
        ("another index", "index.safetensors' does not hold what targets.json says"),
        ("newer", "has format 2, this version reads 1; upgrade"),
        ("k", "damaged"),
        ("tokens", "damaged"),
        ("no json", "damaged"),
        ("list", "damaged"),
    ],
)
def test_a_damaged_directory_is_refused_when_it_is_opened(tmp_path: Path, what: str, message: str) -> None:
    write(tmp_path / "t", rows(), table())
    damage(tmp_path / "t", what)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        CachedTargets.open(tmp_path / "t")


def test_what_is_no_directory_of_targets_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(FileNotFoundError, match=r"No targets.json in .* that write_targets made"):
            CachedTargets.open(place)


def test_a_batch_of_the_wrong_form_is_refused(tmp_path: Path) -> None:
    targets = write(tmp_path / "t", rows(), table())
    ids, mask = padded(rows(), "right")
    with pytest.raises(ValueError, match=r"attention mask has shape \(8, 1, 18, 18\) but input_ids \(8, 18\)"):
        targets.lookup(ids, mask[:, None, None].expand(8, 1, 18, 18))
    for wrong in (ids[0], ids.float()):
        with pytest.raises(ValueError, match="integers"):
            targets.lookup(wrong)
