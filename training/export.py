"""The network of a finished run as one file that needs no Tessera: ONNX or a torch.export program.

The file takes uint8 images on the run's grid, any number at once, and gives the network's outputs; decoding stays
outside. It says of itself what a user needs: method and options, grid, labels, input, outputs. It is compared with the
run before it gets its name, so what lies at OUT is whole and checked.

exit code: 0 written, 1 refused
"""

import argparse
import json
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from io import BytesIO
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

from infra import artifacts, logs
from infra.errors import TesseraError
from infra.store import Store, open_store
from infra.version import code_version
from preprocessing.geometry import PADDING
from training.methods.base import Method, Outputs
from training.run import open_run

log = logging.getLogger("tessera.export")

OPSET = 20
"""Of the ONNX files; onnxruntime reads it from 1.17 on."""
TOLERANCE = 1e-3
"""Most that any output may differ from the run's own, as a share of its largest value; of 1 where that is less."""
INPUT = "images"
METADATA = "metadata.json"
"""The extra file of a .pt2 that holds its metadata."""
_INPUT = {
    False: "whole image squashed to the grid (bicubic, aspect ratio not kept), RGB 0-255; normalised inside",
    True: "whole image scaled to fit the grid (bicubic, aspect ratio kept) at its upper left, the rest of RGB "
    f"{', '.join(map(str, PADDING))}; 0-255; normalised inside",
}
"""What to put in, by Frame.keep_aspect."""
_ONNX_LIMIT = 2**31 - 2**24  # bytes of weights: protobuf ends at 2 GiB, the graph needs a little

Facts = dict[str, Any]
Network = Callable[[Tensor], tuple[Tensor, ...]]
"""What a file computes: uint8 images (B, 3, H, W) -> the outputs."""


@dataclass(frozen=True)
class Format:
    """A kind of file."""

    packages: tuple[str, ...]
    """What it takes beyond Tessera's own dependencies."""
    write: Callable[[ExportedProgram, Facts], bytes]
    load: Callable[[bytes], Network]


def main(arguments: Sequence[str]) -> int:
    """Export in this process. Returns the exit code."""
    about, _, ending = (__doc__ or "").rpartition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m training.export", None, about, ending, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="Folder of a finished run: <storage>/train/<hash>, or on s3://.")
    parser.add_argument("out", metavar="OUT", help="The file, .onnx or .pt2; a path or s3://bucket/key. Is replaced.")
    named = parser.parse_args(arguments)
    try:
        export(named.run, named.out)
    except TesseraError as error:
        log.error("error: %s", error)
        return 1
    return 0


def export(run: str, out: str) -> float:
    """Write the network of the finished run at the URL `run` to `out`; see the module. Logs what it did.

    Returns the largest difference between the file's outputs and the run's, on random images. Raises TesseraError for
    a name that is neither .onnx nor .pt2, for packages that are missing, where there is no finished run, and if the
    difference is more than TOLERANCE; nothing is written then.
    """
    form, (folder, name) = _format(out), _target(out)
    storage, path = artifacts.split_url(run, "train")
    recipe, method = open_run(storage, path)
    facts = {"tessera": code_version(), "recipe": recipe.name, "run": path} | describe(method)
    content = serialise(trace(method.requires_grad_(False)), facts, form)
    difference = largest_difference(method, form.load(content))
    if not difference <= TOLERANCE:  # nor a NaN
        raise TesseraError(f"{out}: differs from the run by {difference:.1e}, over {TOLERANCE:.0e}; not written")
    folder.write(name, content)
    log.info("%s: %.1f MB, %s", folder.url_for(name), len(content) / 1e6, ", ".join(facts["outputs"]))
    log.info("largest difference from the run on random images: %.1e (at most %.0e)", difference, TOLERANCE)
    return difference


def describe(method: Method) -> Facts:
    """What the file says of itself, ready for JSON; a category's position in `labels` is its channel and number."""
    outputs = _tensors(method.predict(torch.zeros(1, 3, *method.grid, dtype=torch.uint8)))
    described = zip(method.output_notes.items(), outputs, strict=True)
    options, keep_aspect = asdict(method.config), method.frame.keep_aspect
    options.pop("backbone")  # of no use to decoding, and its weights' URL is nobody's business
    return {
        "method": type(method).__name__,
        "options": options,
        "grid": list(method.grid),
        "labels": method.labels.to_coco(),
        "input": {"name": INPUT, "dtype": "uint8", "shape": ["batch", 3, *method.grid], "what": _INPUT[keep_aspect]},
        "outputs": {
            name: {"dtype": str(value.dtype).removeprefix("torch."), "shape": ["batch", *value.shape[1:]], "what": note}
            for (name, note), value in described
        },
    }


def trace(method: Method) -> ExportedProgram:
    """The network as a graph with a free number of images, on the grid."""
    images_B3HW = torch.zeros(2, 3, *method.grid, dtype=torch.uint8)  # two: one would be taken for a constant
    with _exporting():
        return torch.export.export(method.network, (images_B3HW,), dynamic_shapes=({0: Dim("batch", min=1)},))


def serialise(program: ExportedProgram, facts: Facts, form: Format) -> bytes:
    """The content of the file. TesseraError for a network that is too large for ONNX."""
    size = sum(t.nbytes for t in program.state_dict.values())
    if form is FORMATS[".onnx"] and size > _ONNX_LIMIT:
        raise TesseraError(f"{size / 1e9:.1f} GB of weights: one ONNX file holds 2 GiB; export to .pt2 instead")
    with _exporting():
        return form.write(program, facts)


def largest_difference(method: Method, network: Network) -> float:
    """Between the outputs of `network` and of the method's own, on a batch of one and one of three random images; as
    TOLERANCE says."""
    generator, found = torch.Generator().manual_seed(0), []
    for count in (1, 3):
        images_B3HW = torch.randint(0, 256, (count, 3, *method.grid), dtype=torch.uint8, generator=generator)
        with torch.no_grad():
            pairs = zip(network(images_B3HW), _tensors(method.predict(images_B3HW)), strict=True)
            found += [_apart(a, b) for a, b in pairs]
    return float(torch.tensor(found).max())  # a NaN stays one


def _apart(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        return math.inf
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1))


def _to_onnx(program: ExportedProgram, facts: Facts) -> bytes:
    made = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        input_names=[INPUT],
        output_names=list(facts["outputs"]),
        dynamic_shapes=({0: "batch"},),
        verbose=False,
    )
    assert made is not None
    model = made.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # stack traces with this machine's paths, classes
    for key, value in facts.items():
        model.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    return model.SerializeToString()


def _from_onnx(content: bytes) -> Network:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: tuple(torch.from_numpy(made) for made in session.run(None, {INPUT: images.numpy()}))


def _to_pt2(program: ExportedProgram, facts: Facts) -> bytes:
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # with this machine's paths
    stream = BytesIO()
    torch.export.save(program, stream, extra_files={METADATA: json.dumps(facts)})
    return stream.getvalue()


def _from_pt2(content: bytes) -> Network:
    network = torch.export.load(BytesIO(content)).module()
    return lambda images: _tensors(network(images))


FORMATS = {
    ".onnx": Format(("onnx", "onnxscript", "onnxruntime"), _to_onnx, _from_onnx),
    ".pt2": Format((), _to_pt2, _from_pt2),
}
"""By the ending of the file's name."""


def _format(out: str) -> Format:
    form = next((form for ending, form in FORMATS.items() if out.endswith(ending)), None)
    if form is None:
        raise TesseraError(f"{out}: the name must end in {' or '.join(FORMATS)}")
    missing = [package for package in form.packages if find_spec(package) is None]
    if missing:
        raise TesseraError(f"{out}: not installed: {', '.join(missing)}; pip install {' '.join(form.packages)}")
    return form


def _target(out: str) -> tuple[Store, str]:
    """The store and key of a file."""
    folder, _, name = open_store(out).url.rpartition("/")
    if folder == "s3:/":
        raise TesseraError(f"{out}: expected s3://bucket/key")
    return open_store(folder or "/"), name


def _tensors(outputs: Outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


@contextmanager
def _exporting() -> Iterator[None]:
    """Plain attention while tracing, and nothing of what the exporters tell of their own insides.

    The CPU's fast attention lays its result out so that Swin's next reshape becomes a view, which fails with any other
    attention, ONNX's included. The graph names no kernel: whoever runs it takes the fastest.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # torchvision is not there; each folded constant
    try:
        with warnings.catch_warnings(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


if __name__ == "__main__":
    logs.to_stream(sys.stdout)
    sys.exit(main(sys.argv[1:]))
