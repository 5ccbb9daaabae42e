"""Published weights: where they are read from, and what of them arrived."""

import hashlib
import re
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from infra.errors import TesseraError
from infra.opening import Unfit, check_size, read_regular
from infra.store import open_store
from infra.text import quoted
from preprocessing.files import leads_outside

State = dict[str, Tensor]

_SOURCES = "hub:ORGANISATION/NAME[@REVISION], package:MODULE/FILE, a path, or s3://bucket/key"
_MOST = 1 << 34
"""Bytes of the largest file that is taken for published weights: 8 billion elements of 16 bits."""
_ON_HUB = re.compile(
    r"(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}(?:@[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)*)?", re.ASCII
)
"""Names that no cache takes for a path elsewhere."""


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
    """The bytes of a source: of a regular file or an object, whatever its name leads to; nothing is imported."""
    if source.startswith("hub:"):
        return _hub_file(source.removeprefix("hub:"))
    if source.startswith("package:"):
        return _package_file(source.removeprefix("package:"))
    remote = source.startswith("s3://")
    if not source or ("://" in source and not remote):
        raise TesseraError(f"weights {quoted(source)}: a source is {_SOURCES}")
    try:
        return _object(source) if remote else read_regular(Path(source).expanduser(), _MOST)
    except (TesseraError, OSError, RuntimeError, ValueError) as error:  # no such user's home, NUL in a name
        raise TesseraError(f"weights {source}: {error}; a source is {_SOURCES}") from error


def _object(url: str) -> bytes:
    folder, _, name = url.rpartition("/")
    return open_store(folder).read_named(name, _MOST)


def _hub_file(name: str) -> bytes:
    from huggingface_hub import DryRunFileInfo, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if not _ON_HUB.fullmatch(name):
        raise TesseraError(f"weights hub:{name}: expected hub:ORGANISATION/NAME[@REVISION]")
    repository, _, revision = name.partition("@")
    try:
        found = hf_hub_download(repository, "model.safetensors", revision=revision or None, dry_run=True)
        assert isinstance(found, DryRunFileInfo)
        check_size(found.file_size or 0, _MOST)  # before it fills the disk
        return read_regular(hf_hub_download(repository, "model.safetensors", revision=revision or None), _MOST)
    except Unfit as error:
        raise TesseraError(f"weights hub:{name}: {error}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise TesseraError(
            f"weights hub:{name}: neither in this machine's cache nor to be had from the hub ({type(error).__name__}); "
            "where there is no way out, download model.safetensors elsewhere and give its path"
        ) from error


def _package_file(name: str) -> bytes:
    """A file of an installed package, which is looked up and not imported: a dotted name would import its parents."""
    package, _, file = name.partition("/")
    if not package.isidentifier() or not file or leads_outside(file):
        raise TesseraError(f"weights package:{name}: expected package:MODULE/FILE, a package and a file inside it")
    try:
        spec = find_spec(package)
        folders = (spec and spec.submodule_search_locations) or []
        if not folders:
            raise ValueError(f"there is no package {package}; is it installed?")
        return read_regular(Path(folders[0], file), _MOST)
    except (OSError, ValueError) as error:
        raise TesseraError(f"weights package:{name}: {error}") from error


def few(names: tuple[str, ...]) -> str:
    """How many, and the first of them."""
    shown = ", ".join(names[:4])
    return f"{len(names)} ({shown}{', ...' if len(names) > 4 else ''})" if names else "none"
