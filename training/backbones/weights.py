"""Published weights: where they are read from, and what of them arrived."""

import hashlib
import zipfile
from dataclasses import dataclass
from importlib import resources
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from infra.errors import TesseraError
from infra.store import open_store

State = dict[str, Tensor]

_SOURCES = "hub:ORGANISATION/NAME[@REVISION], package:MODULE/FILE, a path, or s3://bucket/key"


@dataclass(frozen=True)
class LoadReport:
    """What became of a state dict."""

    loaded: int
    """Elements of the backbone, running statistics included, that the source filled."""
    total: int
    """Elements of the backbone."""
    missing: tuple[str, ...]
    """Entries of the backbone that the source does not have."""
    unexpected: tuple[str, ...]
    """Entries of the source that the backbone has no place for."""

    def __str__(self) -> str:
        share = f"{self.loaded / max(1, self.total):.2%} of {self.total / 1e6:.1f}M loaded"
        return f"{share}; missing {few(self.missing)}; unexpected {few(self.unexpected)}"


def read_weights(source: str) -> State:
    """The state dict at `source`, on the CPU: safetensors, or a pickle of tensors only.

    Sources: `hub:ORGANISATION/NAME[@REVISION]` (model.safetensors on the Hugging Face hub), `package:MODULE/FILE` (a
    file that an installed Python package carries), a local path, or `s3://bucket/key`. Raises TesseraError.
    """
    return parse(_read(source), source)


def fingerprint(source: str | None) -> str | None:
    """What tells one content of a source from another: the name of a hub's revision, the sha256 of a file."""
    if source is None or source.startswith("hub:"):
        return source
    return hashlib.sha256(_read(source)).hexdigest()


def parse(content: bytes, name: str) -> State:
    """A state dict from the bytes of a safetensors or .pth file; nested under "model" or "state_dict" or not."""
    found: Any
    try:
        found = load(content)
    except Exception:  # noqa: BLE001 (of a file that is no safetensors it says so in many ways)
        try:
            found = load_plain(content)
        except Exception as error:
            raise TesseraError(f"weights {name}: expected safetensors or a PyTorch file of tensors") from error
    for nest in ("state_dict", "model"):
        found = found.get(nest, found) if isinstance(found, dict) else found
    tensors = {k: v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, dict) else {}
    if not tensors:
        raise TesseraError(f"weights {name}: expected a dict of tensors by name, found {type(found).__name__}")
    inflated = tuple(k for k, v in tensors.items() if not _is_held(v))
    if inflated:
        raise TesseraError(f"weights {name}: entries with more elements than the file holds: {few(inflated)}")
    spoiled = tuple(k for k, v in tensors.items() if v.is_floating_point() and not v.isfinite().all())
    if spoiled:
        raise TesseraError(f"weights {name}: not finite: {few(spoiled)}")
    return tensors


def load_plain(content: bytes) -> Any:
    """What torch.save wrote: tensors and plain values, on the CPU. Nothing in it is run.

    ValueError if it holds anything else, or would inflate to more than it is; otherwise what torch raises, which is
    whatever the damage leads to.
    """
    if zipfile.is_zipfile(BytesIO(content)):
        with zipfile.ZipFile(BytesIO(content)) as parts:
            if sum(part.file_size for part in parts.infolist()) > len(content):
                raise ValueError("its parts are compressed, as torch never writes them")
    try:
        return torch.load(BytesIO(content), map_location="cpu", weights_only=True)
    except UnpicklingError as error:  # torch's own text advises to load it all the same
        raise ValueError("it holds something other than tensors and plain values, or is damaged") from error


def _is_held(tensor: Tensor) -> bool:
    """Whether each element has bytes of its own: a pickle may repeat one as often as it likes, or have none."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _read(source: str) -> bytes:
    if source.startswith("hub:"):
        return _hub_file(source.removeprefix("hub:")).read_bytes()
    if source.startswith("package:"):
        return _package_file(source.removeprefix("package:"))
    remote = source.startswith("s3://")
    if not source or ("://" in source and not remote):
        raise TesseraError(f"weights {source!r}: a source is {_SOURCES}")
    folder, _, name = source.rpartition("/")
    try:
        return open_store(folder).read(name) if remote else Path(source).expanduser().read_bytes()
    except (TesseraError, OSError) as error:
        raise TesseraError(f"weights {source}: {error}; a source is {_SOURCES}") from error


def _hub_file(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        return Path(hf_hub_download(repository, "model.safetensors", revision=revision or None))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise TesseraError(
            f"weights hub:{name}: neither in this machine's cache nor to be had from the hub ({type(error).__name__}); "
            "where there is no way out, download model.safetensors elsewhere and give its path"
        ) from error


def _package_file(name: str) -> bytes:
    module, _, file = name.partition("/")
    try:
        return resources.files(module).joinpath(file).read_bytes()
    except (ImportError, OSError, ValueError, TypeError) as error:  # by what is wrong with the name
        raise TesseraError(f"weights package:{name}: {error}; is the package installed?") from error


def few(names: tuple[str, ...]) -> str:
    """How many, and the first of them."""
    shown = ", ".join(names[:4])
    return f"{len(names)} ({shown}{', ...' if len(names) > 4 else ''})" if names else "none"
