"""Read a checkpoint tensor by tensor, memory-mapped, whether it is one file or many.

Everything that can be known without reading a weight is checked when the reader is made: headers against file sizes,
the index against the files it names, names that occur twice. Each tensor is mapped on its own and its pages leave
memory with it, so a streaming command holds the tensors it is working on and no more.

    reader = CheckpointReader("checkpoint")
    for name in reader:
        weight = reader.get(name)      # pages are read when touched
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparse_ft.checkpoints.header import TensorInfo, read_header
from sparse_ft.checkpoints.resolve import member, weights_file
from sparse_ft.naming import did_you_mean


class CheckpointReader(Mapping[str, Tensor]):
    """The tensors of a checkpoint as a read-only mapping from name to tensor.

    Args:
        path: a directory with `model.safetensors` or an index and its shards, or one `.safetensors` file.
        allow_pickle: read `pytorch_model.bin` where there is no safetensors (with `weights_only=True`).

    Raises:
        FileNotFoundError: if the weights, or a file named by the index, are missing.
        ValueError: if a file is damaged, the index and its files disagree, or a name leads out of the directory.
    """

    def __init__(self, path: str | Path, *, allow_pickle: bool = False) -> None:
        self.path = Path(path)
        self._infos: dict[str, TensorInfo] = {}
        self._file_of: dict[str, Path] = {}
        self._pickled: dict[str, Tensor] = {}
        self._metadata: dict[str, str] = {}
        self._shards: list[tuple[str, list[str]]] = []
        opening = self._opening_file(allow_pickle)
        self.directory = opening.parent
        files, weight_map = self._files(opening)
        for file in files:
            self._add_pickle(file) if file.suffix == ".bin" else self._add_safetensors(file)
        self._check_index(opening, weight_map)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._infos:
            raise KeyError(name)
        return self.get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    @property
    def shards(self) -> list[tuple[str, list[str]]]:
        """File names and the tensors in each, in file order; the names are those of safetensors files even when the
        weights are pickled, so they can be given to `CheckpointWriter`."""
        return [(name, list(names)) for name, names in self._shards]

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of the first file (transformers writes `{"format": "pt"}`)."""
        return dict(self._metadata)

    def names(self) -> list[str]:
        """All tensor names, shard by shard."""
        return list(self._infos)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self._info(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, from the header."""
        return self._info(name).dtype

    def place(self, name: str) -> tuple[Path, TensorInfo]:
        """The file of a tensor and its place there, for reading a part of it.

        Raises:
            ValueError: if the checkpoint has no such tensor, or it is pickled.
        """
        info = self._info(name)
        if name in self._pickled:
            raise ValueError(f"'{self.path}' has pickled weights, of which no part can be read; save as safetensors.")
        return self._file_of[name], info

    def get(self, name: str, *, copy: bool = False) -> Tensor:  # type: ignore[override]
        """One tensor, on the CPU. Unlike `dict.get` it has no default: a missing tensor is an error.

        It is mapped from the file: reading is lazy, writing to it changes this process's pages only, never the file.

        Args:
            name: tensor name.
            copy: read it into memory of its own, for work that outlives the file.

        Raises:
            ValueError: if the checkpoint has no such tensor, or its file was changed since the reader was made.
        """
        self._info(name)
        if name in self._pickled:
            tensor = self._pickled[name]
            return tensor.clone() if copy else tensor
        file = self._file_of[name]
        try:
            # One opening per tensor: a handle kept for the whole file would keep every page ever touched.
            with safe_open(file, framework="pt", device="cpu") as handle:
                tensor = handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"Cannot read tensor '{name}' from '{file}': {error}; was the file changed?") from error
        return tensor.clone() if copy else tensor

    def _info(self, name: str) -> TensorInfo:
        if name not in self._infos:
            hint = did_you_mean(name, self._infos, otherwise="Use a name that `names()` gives.")
            raise ValueError(f"'{self.path}' has no tensor '{name}' among its {len(self._infos)}. {hint}")
        return self._infos[name]

    def _opening_file(self, allow_pickle: bool) -> Path:
        if self.path.is_file():
            return member(self.path.parent, self.path.name)
        if not self.path.is_dir():
            raise FileNotFoundError(f"No checkpoint at '{self.path}'; give a directory or a .safetensors file.")
        return weights_file(self.path, allow_pickle=allow_pickle)

    def _files(self, opening: Path) -> tuple[list[Path], dict[str, str] | None]:
        if opening.suffix != ".json":
            return [opening], None
        weight_map = read_index(opening)
        return [member(self.directory, name) for name in sorted(set(weight_map.values()))], weight_map

    def _add_safetensors(self, file: Path) -> None:
        infos, metadata = read_header(file)
        self._add(file, file.name, infos)
        if not self._metadata:
            self._metadata = metadata

    def _add_pickle(self, file: Path) -> None:
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except UnpicklingError:
            raise ValueError(
                f"'{file}' holds more than plain tensors, so opening it could run code; save the model's state_dict as "
                f"safetensors, on a machine where you trust the file."
            ) from None
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ValueError(f"Cannot open '{file}' as a file of plain tensors: {reason}") from error
        if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
            raise ValueError(f"'{file}' does not hold a plain dictionary of tensors; save the model's state_dict.")
        # A save_file of two tensors over one memory is refused: of tied tensors only the first is kept, as
        # save_pretrained does.
        first: dict[tuple[int, tuple[int, ...]], str] = {}
        kept = {
            name: tensor
            for name, tensor in tensors.items()
            if first.setdefault((tensor.data_ptr(), tuple(tensor.shape)), name) == name or tensor.numel() == 0
        }
        name = file.name.removesuffix(".bin").replace("pytorch_model", "model") + ".safetensors"
        self._pickled.update(kept)
        self._add(file, name, {key: TensorInfo(t.dtype, tuple(t.shape), 0, t.nbytes) for key, t in kept.items()})

    def _add(self, file: Path, name: str, infos: Mapping[str, TensorInfo]) -> None:
        for key in infos:
            if key in self._infos:
                raise ValueError(
                    f"Tensor '{key}' is in both '{self._file_of[key].name}' and '{file.name}' of '{self.directory}'; "
                    f"remove the file that does not belong to the checkpoint."
                )
        self._infos.update(infos)
        self._file_of.update(dict.fromkeys(infos, file))
        self._shards.append((name, list(infos)))

    def _check_index(self, opening: Path, weight_map: Mapping[str, str] | None) -> None:
        for name, file in (weight_map or {}).items():
            if opening.name.endswith(".safetensors.index.json") and name not in self._infos:
                raise ValueError(f"'{opening}' says that tensor '{name}' is in '{file}', but that file lacks it.")
            if name in self._file_of and self._file_of[name] != self.directory / file:
                raise ValueError(
                    f"'{opening}' says that tensor '{name}' is in '{file}', but it is in '{self._file_of[name].name}'."
                )


def read_index(path: Path) -> dict[str, str]:
    """The `weight_map` of an index file: tensor name to file name.

    Raises:
        ValueError: if it is not an index.
    """
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The index '{path}' is not valid JSON ({error}); download or write it again.") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"The index '{path}' has no weight_map from tensor names to files; write it again.")
    suffix = ".bin" if path.name.endswith(".bin.index.json") else ".safetensors"
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(suffix):
            raise ValueError(f"The index '{path}' puts tensor '{name}' in {file!r}, which is no {suffix} file.")
    return weight_map
