import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.export import Dim
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from infra.errors import TesseraError
from training.export import OPSET
from training.parts.pisr import PisrConfig, Relations, encode

FEATURES, CATEGORIES, INSTANCES, CHANNELS = 5, 3, 4, 32
CONFIG = PisrConfig(instances=INSTANCES, channels=CHANNELS)
BOTH = {"reweighted": CONFIG, "not reweighted": replace(CONFIG, reweighting=False)}
each_config = pytest.mark.parametrize("config", BOTH.values(), ids=BOTH)
Inputs = tuple[Tensor, Tensor, Tensor]


def module_of(config: PisrConfig = CONFIG, dtype: torch.dtype = torch.float32) -> Relations:
    """With weights of a trained one: none is 0, 1 or the identity."""
    torch.manual_seed(0)
    module = Relations(config, FEATURES, CATEGORIES).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, dtype=dtype)
    return module


def inputs(images: int = 2, size: tuple[int, int] = (4, 6), dtype: torch.dtype = torch.float32) -> Inputs:
    """Features, probabilities and heat maps; these as a base's formula gives them, below 0 far from a centre."""
    generator = torch.Generator().manual_seed(1)
    features, logits, heat = (
        torch.randn(images, count, *size, generator=generator, dtype=torch.float64)
        for count in (FEATURES, CATEGORIES, INSTANCES)
    )
    return features.to(dtype), (2 * logits).softmax(1).to(dtype), (heat + 0.5).to(dtype)


def slow_encodings(weigh: torch.nn.Sequential | None, features: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """(M, F) of one image."""
    result = np.zeros((len(maps), len(features)))
    for m, f in np.ndindex(result.shape):
        total = sum(maps[m, y, x] * features[f, y, x] for y, x in np.ndindex(maps.shape[1:]))
        result[m, f] = total / maps[m].sum()
    if weigh is not None:
        (first, first_bias), (second, second_bias) = (
            (weigh[i].weight.double().detach().numpy(), weigh[i].bias.double().detach().numpy()) for i in (0, 2)
        )
        for m in range(len(maps)):
            hidden = [max(0.0, float(row @ result[m]) + b) for row, b in zip(first, first_bias, strict=True)]
            result[m] /= 1 + math.exp(-(float(second[0] @ hidden) + second_bias[0]))
    return result


def slow_convolution(features: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """3x3, zeros around it."""
    _, height, width = features.shape
    result = np.zeros((len(kernel), height, width))
    for c, y, x in np.ndindex(result.shape):
        result[c, y, x] = bias[c]
        for f, dy, dx in np.ndindex(kernel.shape[1:]):
            v, u = y + dy - 1, x + dx - 1
            if 0 <= v < height and 0 <= u < width:
                result[c, y, x] += kernel[c, f, dy, dx] * features[f, v, u]
    return result


def slow_relations(module: Relations, given: Inputs) -> np.ndarray:
    """The equations one by one, in the paper's order, pixel by pixel."""
    weights = {name: p.double().detach().numpy() for name, p in module.named_parameters()}
    results = []
    for features, semantic, heat in zip(*(t.double().numpy() for t in given), strict=True):
        encodings = slow_encodings(module.weigh, features, np.concatenate([semantic, np.maximum(heat, 0)]))
        keys, values = encodings @ weights["keys.weight"].T, encodings @ weights["values.weight"].T
        local = slow_convolution(features, weights["local.weight"], weights["local.bias"])
        panoptic = np.zeros_like(local)
        for y, x in np.ndindex(local.shape[1:]):
            relations = [float(key @ local[:, y, x]) / math.sqrt(len(local)) for key in keys]
            mixed = weights["mix_MM"] @ relations + weights["mix_bias_M"]
            for m, value in enumerate(values):
                panoptic[:, y, x] += mixed[m] * value
        for start in range(0, len(local), 16):
            group = panoptic[start : start + 16]
            group[:] = (group - group.mean()) / math.sqrt(group.var() + 1e-5)
        scaled = panoptic * weights["norm.weight"][:, None, None] + weights["norm.bias"][:, None, None]
        results.append(np.maximum(local + scaled, 0))
    return np.stack(results)


@each_config
def test_it_equals_the_papers_equations(config: PisrConfig):
    module, given = module_of(config), inputs()
    expected = slow_relations(module, given)
    assert (expected > 0.1).mean() > 0.2
    np.testing.assert_allclose(module(*given).detach().numpy(), expected, atol=1e-5)
    exact, given = module_of(config, torch.float64), inputs(dtype=torch.float64)
    np.testing.assert_allclose(exact(*given).detach().numpy(), slow_relations(exact, given), atol=1e-12)


def test_g_p_starts_as_the_identity():
    module = Relations(CONFIG, FEATURES, CATEGORIES)
    torch.testing.assert_close(module.mix_MM.detach(), torch.eye(CATEGORIES + INSTANCES), atol=0, rtol=0)
    assert not module.mix_bias_M.any()


@each_config
def test_an_order_of_instances_is_known_to_g_p_alone(config: PisrConfig):
    module, (features, semantic, heat) = module_of(config), inputs()
    order = torch.tensor([2, 0, 3, 1])
    rows = torch.cat([torch.arange(CATEGORIES), CATEGORIES + order])
    with torch.no_grad():
        before, moved = module(features, semantic, heat), module(features, semantic, heat[:, order])
        assert (before - moved).abs().max() > 0.01
        module.mix_MM.copy_(module.mix_MM[rows][:, rows])
        module.mix_bias_M.copy_(module.mix_bias_M[rows])
        torch.testing.assert_close(module(features, semantic, heat[:, order]), before, atol=1e-5, rtol=1e-5)


@each_config
def test_images_of_a_batch_do_not_see_each_other(config: PisrConfig):
    module, given = module_of(config), inputs(3)
    alone = torch.cat([module(*(t[b : b + 1] for t in given)) for b in range(3)])
    torch.testing.assert_close(module(*given), alone, atol=1e-5, rtol=1e-5)


def test_the_scale_of_a_map_does_not_matter():
    module, (features, semantic, heat) = module_of(), inputs()
    scales = torch.tensor([1e-3, 0.5, 7.0, 1e4]).view(1, -1, 1, 1)
    expected = module(features, semantic, heat)
    torch.testing.assert_close(module(features, semantic, scales * heat), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(module(features, 0.1 * semantic, heat), expected, atol=1e-5, rtol=1e-5)
    assert (module(features, semantic, heat.flip(2)) - expected).abs().max() > 0.01


def test_doubling_the_resolution_leaves_encodings_as_they_are():
    features, semantic, heat = inputs()
    maps = torch.cat([semantic, heat.relu()], 1)
    fine, coarse = (t.repeat_interleave(2, 2).repeat_interleave(2, 3) for t in (maps, features))
    torch.testing.assert_close(encode(fine, coarse), encode(maps, features), atol=1e-6, rtol=1e-5)


def test_an_encoding_of_one_segment_is_its_mean():
    features, _, _ = inputs()
    mask = torch.zeros(2, 1, 4, 6)
    mask[:, :, 1:3, 2:5] = 0.7
    torch.testing.assert_close(encode(mask, features)[:, 0], features[:, :, 1:3, 2:5].mean((2, 3)))


def test_an_encoding_fades_with_a_map_that_has_hardly_mass():
    features, _, _ = inputs()
    mask = torch.zeros(2, 1, 4, 6)
    mask[:, :, 1, 2:5] = 1
    full = encode(mask, features)
    least = 1e-5 * 24 / 3  # a mean of 1e-5
    torch.testing.assert_close(encode(1.01 * least * mask, features), full)
    torch.testing.assert_close(encode(0.5 * least * mask, features), 0.5 * full)
    assert encode(1e-30 * mask, features).abs().max() < 1e-20


@pytest.mark.parametrize("strength", [1.0, 1e-3, 1e-6, 1e-12, 1e-36, 0.0])
def test_the_gradient_of_a_weak_map_is_bounded(strength: float):
    """And it is the same for two of its pixels that have the same features: both are weights of one mean."""
    features, _, _ = inputs()
    features[:, :, 1, 3] = features[:, :, 1, 2]
    maps = torch.zeros(2, 1, 4, 6)
    maps[:, :, 1, 2] = strength
    maps.requires_grad_()
    encode(maps, features).sum().backward()
    assert maps.grad is not None
    assert maps.grad.abs().max() <= 2 * features.abs().sum(1).max() / (1e-5 * 24)
    torch.testing.assert_close(maps.grad[..., 1, 2], maps.grad[..., 1, 3])


EMPTY: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "no heat": lambda s, h: (s, 0 * h),
    "negative heat": lambda s, h: (s, -h.abs() - 1),
    "one class certain": lambda s, h: (torch.eye(CATEGORIES)[:1].view(1, -1, 1, 1) + 0 * s, h),
    "nothing": lambda s, h: (0 * s, 0 * h),
    "hardly anything": lambda s, h: (1e-30 * s, 1e-38 * h),
}


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("empty", EMPTY.values(), ids=EMPTY)
def test_maps_without_mass_give_finite_outputs_and_gradients(
    empty: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], bf16: bool
):
    module, (features, semantic, heat) = module_of(), inputs()
    given = [t.detach().requires_grad_() for t in (features, *empty(semantic, heat))]
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = module(*given)
    output.float().square().mean().backward()
    assert output.isfinite().all()
    gradients = [t.grad for t in (*given, *module.parameters())]
    assert [i for i, grad in enumerate(gradients) if grad is None or not grad.isfinite().all()] == []


def test_a_class_that_a_softmax_rules_out_has_a_small_gradient():
    """Its encoding may change fast with its probability, but that hardly changes with its logit."""
    module, (features, _, heat) = module_of(), inputs()
    for low in (-5.0, -20.0, -60.0, -200.0):
        logits = torch.randn(2, CATEGORIES, 4, 6, generator=torch.Generator().manual_seed(2))
        logits[:, 1] += low
        logits.requires_grad_()
        module(features, logits.softmax(1), heat).square().mean().backward()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()
        assert 0 < logits.grad.abs().max() < 10


@each_config
def test_maps_without_mass_have_no_part(config: PisrConfig):
    """So it does not matter how far K exceeds the instances of an image."""
    module, (features, semantic, heat) = module_of(config), inputs()
    heat[:, 2:] = 0
    expected = module(features, semantic, heat)
    few = Relations(replace(config, instances=2), FEATURES, CATEGORIES)
    weights = module.state_dict()
    weights["mix_MM"], weights["mix_bias_M"] = weights["mix_MM"][:-2, :-2], weights["mix_bias_M"][:-2]
    few.load_state_dict(weights)
    torch.testing.assert_close(few(features, semantic, heat[:, :2]), expected, atol=1e-5, rtol=1e-5)


@each_config
def test_every_parameter_and_input_has_a_gradient(config: PisrConfig):
    module, given = module_of(config), [t.requires_grad_() for t in inputs()]
    module(*given).square().mean().backward()
    named = {**dict(module.named_parameters()), **dict(zip(("features", "semantic", "heat"), given, strict=True))}
    assert [name for name, t in named.items() if t.grad is None or not t.grad.abs().max() > 1e-6] == []


@each_config
def test_gradients_are_those_of_the_function(config: PisrConfig):
    small = replace(config, channels=16)
    module = module_of(small, torch.float64)
    features, semantic, heat = inputs(2, (2, 3), torch.float64)
    given = [t.requires_grad_() for t in (features, semantic, heat)]
    parameters = dict(module.named_parameters())

    def of(*values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(parameters, values[3:], strict=True)), values[:3])

    assert torch.autograd.gradcheck(of, (*given, *parameters.values()), fast_mode=True)


@each_config
def test_bfloat16_comes_near_float32(config: PisrConfig):
    torch.manual_seed(0)
    module, given = Relations(config, FEATURES, CATEGORIES), inputs(2, (32, 48))
    with torch.no_grad():
        expected = module(*given)
        with torch.autocast("cpu", torch.bfloat16):
            found = module(*given)
    assert found.dtype == torch.bfloat16
    error = (found.float() - expected).square().mean().sqrt()
    assert 0 < error < 0.02 * expected.square().mean().sqrt()


def test_channels_last_computes_the_same():
    module, given = module_of(), inputs()
    expected = module(*given)
    last = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found = last(*(t.to(memory_format=torch.channels_last) for t in given))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def captured(module: Relations) -> Callable[..., Tensor]:
    return torch.compile(module, fullgraph=True, backend="aot_eager")


def compiled(module: Relations) -> Callable[..., Tensor]:
    return torch.compile(module, fullgraph=True)


def exported(module: Relations) -> Any:
    """A program with any number of images."""
    batch = {0: Dim("batch", min=1)}
    with torch.no_grad():
        return torch.export.export(module, inputs(2), dynamic_shapes=(batch, batch, batch))


def as_onnx(module: Relations) -> Callable[..., Tensor]:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    batch, names = {0: "batch"}, ["features", "semantic", "heat"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own insides
        made = torch.onnx.export(
            exported(module),
            dynamo=True,
            opset_version=OPSET,
            input_names=names,
            output_names=["relations"],
            dynamic_shapes=(batch, batch, batch),
            verbose=False,
        )
    assert made is not None
    session = onnxruntime.InferenceSession(made.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda *given: torch.from_numpy(
        session.run(None, {name: t.numpy() for name, t in zip(names, given, strict=True)})[0]
    )


WAYS = {
    "captured": captured,
    "compiled": compiled,
    "exported": lambda module: exported(module).module(),
    "onnx": as_onnx,
}


@each_config
@pytest.mark.parametrize(
    "way", [pytest.param(way, id=n, marks=pytest.mark.slow if n == "compiled" else ()) for n, way in WAYS.items()]
)
def test_a_graph_of_it_computes_the_same(config: PisrConfig, way: Callable[[Relations], Callable[..., Tensor]]):
    module = module_of(config)
    graph = way(module)
    with torch.no_grad():
        for images in (1, 2, 3):
            given = inputs(images)
            torch.testing.assert_close(graph(*given), module(*given), atol=1e-4, rtol=1e-4)


class _Largest(TorchDispatchMode):
    """Notes the most numbers of any tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.numbers = max(self.numbers, *(t.numel() for t in tree_leaves(made) if isinstance(t, Tensor)), 0)
        return made


def test_cost_and_memory_on_cityscapes_are_the_papers():
    """419.5 to 575.0 billion multiply-adds at 1024 x 2048, stride 4, of which the second heads are about 13."""
    with torch.device("meta"):
        module = Relations(PisrConfig(), 384, 19)
        given = [torch.empty(2, count, 256, 512, requires_grad=True) for count in (384, 19, 100)]
        with FlopCounterMode(display=False) as counter:
            output = module(*given)
        assert counter.get_total_flops() / 2 / 2 == pytest.approx(575.0e9 - 419.5e9 - 13e9, rel=0.1)
        assert output.shape == (2, 256, 256, 512)
        with _Largest() as largest:
            module(*given).sum().backward()
        assert largest.numbers == given[0].numel()


def test_without_reweighting_its_parameters_are_gone():
    weighed, plain = (Relations(config, FEATURES, CATEGORIES).state_dict() for config in BOTH.values())
    assert weighed.keys() - plain.keys() == {f"weigh.{i}.{name}" for i, name in product((0, 2), ("weight", "bias"))}
    assert plain.keys() <= weighed.keys()
    assert sum(t.numel() for t in plain.values()) < sum(t.numel() for t in weighed.values())


@pytest.mark.parametrize(
    "change",
    [
        {"instances": 0},
        {"channels": 0},
        {"channels": -16},
        {"channels": 8},
        {"channels": 40},
        {"intermediate": -0.1},
        {"intermediate": math.inf},
        {"intermediate": math.nan},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(change: dict):
    with pytest.raises(TesseraError, match=f"pisr: {next(iter(change))}"):
        PisrConfig(**change)


def test_options_at_the_ends_of_their_ranges_are_taken():
    config = PisrConfig(instances=1, channels=16, intermediate=0)
    module = Relations(config, FEATURES, CATEGORIES)
    features, semantic, heat = inputs()
    assert module(features, semantic, heat[:, :1]).shape == (2, 16, 4, 6)


def test_another_number_of_maps_is_refused():
    module, (features, semantic, heat) = module_of(), inputs()
    for maps in ((semantic, heat[:, 1:]), (semantic[:, 1:], heat), (heat, semantic)):
        with pytest.raises(TesseraError, match=r"instance maps, not 3 and 4"):
            module(features, *maps)
