import ast
import json
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram

import training.export
from infra.errors import TesseraError
from infra.store import Store
from preprocessing.labels import LabelTable
from preprocessing.synthetic import CATEGORIES
from tests.support.examples import batch_of, scenes
from tests.support.finished_run import finished_run
from training.backbones import AnyBackboneConfig, LiteConfig, PyramidConfig
from training.export import FORMATS, METADATA, OPSET, Format, describe, largest_difference, main, serialise, trace
from training.methods.base import Method
from training.recipe import Recipe
from training.recipes import panoptic_deeplab
from training.recipes.generalist import debug, demo
from training.run import open_run

Network = Callable[[Tensor], list[Tensor]]


def on_a_backbone(backbone: AnyBackboneConfig) -> Recipe:
    base = debug()
    return replace(base, method=replace(base.method, backbone=backbone), shards=replace(base.shards, grid=(64, 96)))


RECIPES = {
    "vit": debug(),
    "stem": demo(),
    "lite": on_a_backbone(LiteConfig(weights=None)),
    "resnet": on_a_backbone(PyramidConfig(name="resnet-50")),
    "swin": on_a_backbone(PyramidConfig(name="swin-tiny")),
    "pvt": on_a_backbone(PyramidConfig(name="pvt-v2-b0")),
    "deeplab": panoptic_deeplab.debug_crop(),
    "pisr": panoptic_deeplab.debug_pisr(),
}
LONG = {"lite", "resnet", "swin", "pvt", "deeplab"}
"""Each takes ten seconds of a free core; PISR's network holds all of Panoptic-DeepLab's."""
each_format = pytest.mark.parametrize("ending", FORMATS)


def need(ending: str) -> None:
    """Skips where the packages of a format are not installed."""
    for package in FORMATS[ending].packages:
        pytest.importorskip(package, reason=f"{ending} takes {', '.join(FORMATS[ending].packages)}")


def opened(ending: str, content: bytes) -> tuple[Network, dict[str, Any]]:
    """Network and metadata of a file, by nothing of ours."""
    if ending == ".pt2":
        extra = {METADATA: ""}
        module = torch.export.load(BytesIO(content), extra_files=extra).module()
        return lambda images: list(module(images)), json.loads(extra[METADATA])
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    found = session.get_modelmeta().custom_metadata_map
    plain = {"tessera", "recipe", "run", "method"}
    metadata = {name: text if name in plain else json.loads(text) for name, text in found.items()}
    names = list(metadata["outputs"])
    return lambda images: [torch.from_numpy(o) for o in session.run(names, {"images": images.numpy()})], metadata


def fresh(recipe: Recipe) -> Method:
    """With heads that say something: some begin undecided."""
    torch.manual_seed(0)
    method = recipe.build(CATEGORIES).eval()
    for module in method.modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.std() < 0.005:
            torch.nn.init.normal_(module.weight, std=0.5)
    return method


def assert_same(network: Network, method: Method, batches: tuple[int, ...] = (1, 3)) -> None:
    for count in batches:
        images = batch_of(*scenes(count, method.grid)).images_B3HW
        for made, wanted in zip(network(images), method.predict(images), strict=True):
            assert wanted.std() > 0.01
            torch.testing.assert_close(made.detach(), wanted.clone(), atol=1e-3, rtol=0)


@pytest.fixture(
    scope="module", params=[pytest.param(n, marks=pytest.mark.slow if n in LONG else ()) for n in RECIPES if n != "vit"]
)
def traced(request: pytest.FixtureRequest) -> tuple[Method, ExportedProgram]:
    """One of the networks that the command's test has not."""
    method = fresh(RECIPES[request.param])
    return method, trace(method)


@each_format
def test_a_file_of_each_kind_of_backbone_computes_what_the_network_does(
    traced: tuple[Method, ExportedProgram], ending: str
):
    need(ending)
    method, program = traced
    facts = json.loads(json.dumps(describe(method)))
    network, metadata = opened(ending, serialise(program, facts, FORMATS[ending]))
    assert metadata == facts
    assert_same(network, method)


@pytest.mark.parametrize(
    ("ending", "store"), [(".onnx", "folder"), (".pt2", "s3")], indirect=["store"], ids=["onnx", "pt2"]
)
def test_the_command_writes_a_file_that_explains_itself(
    ending: str, store: Store, tmp_path: Path, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
):
    need(ending)
    caplog.set_level("INFO", "tessera")
    run, out = finished_run(tmp_path, store.url), store.url_for(f"exported/net{ending}")
    assert main([run, out]) == 0
    where, difference = caplog.messages
    assert where.startswith(f"{out}: ")
    assert float(difference.split(": ")[1].split()[0]) < 1e-4
    assert capfd.readouterr() == ("", "")
    content = store.read(f"exported/net{ending}")
    assert str(Path(__file__).parents[2]).encode() not in content  # as .pt2 is a zip that does not compress
    if ending == ".onnx":
        assert_clear(content)
    network, metadata = opened(ending, content)
    _, path = split(run)
    recipe, method = open_run(store.url, path)
    assert (metadata["recipe"], metadata["run"], metadata["method"]) == (recipe.name, path, "Generalist")
    assert LabelTable.from_coco(metadata["labels"]) == method.labels
    assert metadata["grid"] == [32, 32]
    assert metadata["input"]["shape"] == ["batch", 3, 32, 32]
    assert metadata["outputs"]["classes"]["shape"] == ["batch", len(method.labels), 32, 32]
    assert metadata["options"]["decode"]["grid"] == recipe.method.decode.grid
    assert "backbone" not in metadata["options"]
    assert_same(network, method, (1, 3, 5))
    assert not any(t.requires_grad for t in network(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)))
    assert_segments_alike(network, method)
    with pytest.raises(Exception, match="32"):  # each library has its own
        network(torch.zeros(1, 3, 40, 32, dtype=torch.uint8))


def assert_clear(content: bytes) -> None:
    """A sound ONNX file that states opset, free batch and fixed grid."""
    import onnx

    model = onnx.load_from_string(content)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import if o.domain == ""] == [("", OPSET)]
    for value in (*model.graph.input, *model.graph.output):
        first, *others = value.type.tensor_type.shape.dim
        assert first.dim_param == "batch"
        assert all(d.dim_value > 0 for d in others)
    assert [i.name for i in model.graph.input] == ["images"]
    assert [o.name for o in model.graph.output] == ["classes", "centroids"]


def assert_segments_alike(network: Network, method: Method) -> None:
    images, sizes = batch_of(*scenes(3, method.grid)).images_B3HW, [method.grid, (50, 60), (17, 9)]
    decoded = method.decode(tuple(network(images)), sizes)
    for one, other in zip(decoded, method.segment(images, sizes), strict=True):
        assert (one.ids != other.ids).mean() < 0.01


@pytest.mark.parametrize("encoding", ["embedding", "direct", "classes"])
def test_each_encoding_is_explained(encoding: str):
    method = fresh(replace(debug(), method=replace(debug().method, encoding=encoding)))
    centroids = json.loads(json.dumps(describe(method)))["outputs"]["centroids"]
    assert centroids["shape"] == ["batch", method.config.instance_channels, 32, 32]
    assert centroids["dtype"] == "float32"


def test_the_largest_difference_is_that_of_the_worst_value_of_any_output_and_batch():
    method = fresh(debug())

    largest = [1.0]

    def off_by_half(images: Tensor) -> tuple[Tensor, ...]:
        logits, codes = (t.clone() for t in method.predict(images))
        largest.append(float(codes.abs().max()))
        codes[len(images) // 3, 0, 0, 0] -= 0.5 * (len(images) == 3)
        return logits, codes

    assert largest_difference(method, method.predict) == 0
    assert largest_difference(method, off_by_half) == pytest.approx(0.5 / max(largest))


def test_the_largest_difference_is_never_small_for_what_is_not_finite_or_of_another_shape():
    method = fresh(debug())
    for change, expected in ((torch.nan, np.nan), (torch.inf, np.inf)):
        found = largest_difference(method, lambda x, change=change: tuple(t + change for t in method.predict(x)))
        np.testing.assert_equal(found, expected)
    assert largest_difference(method, lambda images: tuple(t[:1] for t in method.predict(images))) == np.inf


@pytest.mark.parametrize("wrong", [0.01, torch.nan])
def test_a_file_that_differs_is_not_written_and_an_earlier_one_stays(
    wrong: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    run = finished_run(tmp_path, str(tmp_path / "store"))
    _, method = open_run(*split(run))
    monkeypatch.setattr("training.export.trace", lambda method: None)
    monkeypatch.setattr("training.export.serialise", lambda *_: b"spoiled")
    monkeypatch.setitem(
        FORMATS, ".pt2", Format((), lambda *_: b"", lambda _: lambda x: tuple(t + wrong for t in method.predict(x)))
    )
    (tmp_path / "old.pt2").write_bytes(b"earlier")
    for name in ("old.pt2", "new.pt2"):
        assert main([run, str(tmp_path / name)]) == 1
        assert "differs from the run by" in caplog.messages[-1]
    assert (tmp_path / "old.pt2").read_bytes() == b"earlier"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "old.pt2", "store"]


def split(run: str) -> tuple[str, str]:
    storage, _, name = run.rpartition("/train/")
    return storage, f"train/{name}"


def test_what_cannot_be_exported_is_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def refused(*arguments: str) -> str:
        assert main(arguments) == 1
        return caplog.messages[-1]

    run, out = str(tmp_path / "store" / "train" / "0"), str(tmp_path / "net.pt2")
    assert "must end in .onnx or .pt2" in refused(run, str(tmp_path / "net.pth"))
    assert "s3://bucket/key" in refused(run, "s3://net.pt2")
    assert "no finished run" in refused(run, out)
    assert "expected the URL of what is finished" in refused("/a", out)
    monkeypatch.setattr("training.export.find_spec", lambda name: None if name == "onnxscript" else "there")
    said = refused(run, str(tmp_path / "net.onnx"))
    assert said.endswith("not installed: onnxscript; pip install onnx onnxscript onnxruntime")
    assert list(tmp_path.iterdir()) == []


def test_a_network_beyond_onnx_is_sent_to_the_other_format(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("training.export._ONNX_LIMIT", 999)
    large = SimpleNamespace(state_dict={"weight": torch.zeros(250)})
    with pytest.raises(TesseraError, match=r"export to \.pt2 instead"):
        serialise(large, {}, FORMATS[".onnx"])


def test_onnx_is_imported_where_it_is_needed_alone():
    top = ast.parse(Path(training.export.__file__).read_text()).body
    named = [alias.name for node in top if isinstance(node, ast.Import) for alias in node.names]
    named += [node.module for node in top if isinstance(node, ast.ImportFrom)]
    assert "torch" in named
    assert not [name for name in named if name.startswith("onnx")]
