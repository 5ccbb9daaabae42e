"""A finished run at work on anybody's pictures: no shards, no Ray, no Prefect."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from evaluation.images import UserImage, read_image
from infra.errors import TesseraError
from preprocessing.labels import LabelTable
from preprocessing.opening import within_memory
from preprocessing.panoptic_map import PanopticMap
from preprocessing.pictures import Picture, overlay_at
from training.methods.base import Method
from training.run import open_run


@dataclass(frozen=True)
class Prediction:
    """What a run says of one picture."""

    image_HW3: Picture
    """uint8 RGB, as `read_image` decoded it: upright."""
    panoptic: PanopticMap
    """Of the same height and width."""
    labels: LabelTable
    """Its categories."""
    notes: tuple[str, ...] = ()
    """What was done to the picture before; see images.read_image."""
    empty: str = ""
    """Where there is no segment at all: why, as far as that can be told."""

    def overlay(self, longest: int | None = None) -> Picture:
        """The segments over the picture, uint8 RGB; its longer side shrunk to at most `longest` pixels, if given."""
        height, width = self.panoptic.size
        share = min(1.0, (longest or max(height, width)) / max(height, width))
        size = max(1, round(share * height)), max(1, round(share * width))
        return overlay_at(self.image_HW3, self.panoptic, self.labels, size)


class Predictor:
    """A trained method on a device.

    predictor = Predictor.load("/data/tessera", "train/0123456789abcdef")
    prediction = predictor(Path("photo.jpg").read_bytes())
    """

    def __init__(self, method: Method) -> None:
        self.method = method.eval()

    @classmethod
    def load(
        cls, store_url: str, run: str, device: str | None = None, options: Mapping[str, Any] | None = None
    ) -> "Predictor":
        """The finished run at `run`, a folder under the store's root; `device` as torch names it.

        options: other ones of decoding than the run's, {"method.decode.min_stuff_area": 0.01}, as `pipelines.tune`
        prints them.
        Without a device: CUDA where there is one, else the CPU. Raises TesseraError as open_run does, for a run
        that another version has written, and for a device that this machine lacks.
        """
        place = _device(device)
        _, method = open_run(store_url, run, options)
        return cls(method.to(place))

    @property
    def labels(self) -> LabelTable:
        """The categories that it knows."""
        return self.method.labels

    def __call__(self, image: bytes) -> Prediction:
        """The bytes of one image file -> what the run says of it, upright and at its own size.

        Raises TesseraError as read_image does.
        """
        return self.batch([read_image(image)])[0]

    def batch(self, images: Sequence[UserImage]) -> list[Prediction]:
        """As many at once as the method takes.

        Raises TesseraError where the network's output is not finite, and where the memory does not suffice.
        """
        with _within_torchs_memory():
            return self._predictions(images)

    def _predictions(self, images: Sequence[UserImage]) -> list[Prediction]:
        maps: list[PanopticMap] = []
        for start in range(0, len(images), self.method.images_at_once):
            pictures = [image.rgb_HW3 for image in images[start : start + self.method.images_at_once]]
            sizes = [(picture.shape[0], picture.shape[1]) for picture in pictures]
            maps += self.method.segment(self.method.inputs(pictures), sizes)
        return [
            Prediction(
                image.rgb_HW3, panoptic, self.labels, image.notes, "" if panoptic.segments else self._why_empty(image)
            )
            for image, panoptic in zip(images, maps, strict=True)
        ]

    def _why_empty(self, image: UserImage) -> str:
        """The decoder's options, and which other value of one of them would have kept something.

        All that can be said of a method that is not known: the values are those that its decode config names as
        candidates for tuning.
        """
        height, width = image.rgb_HW3.shape[:2]
        outputs = self.method.predict(self.method.inputs([image.rgb_HW3]))
        config, decode = self.method.config, self.method.config.decode
        used = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(decode).items())
        finds = []
        try:
            for name, values in getattr(decode, "candidates", {}).items():
                for value in values:
                    changed = dataclasses.replace(decode, **{name: value})
                    self.method.config = dataclasses.replace(config, decode=changed)
                    count = len(self.method.decode(outputs, [(height, width)])[0].segments)
                    finds += [f"{name} {value} would give {count}"] if count else []
        finally:
            self.method.config = config
        hint = "; ".join(finds) or (
            "nor does any other value that `pipelines.tune` would try: the network itself sees nothing here; was the "
            "run trained long enough, and on images like this one?"
        )
        return f"no segment; decoded with {used}; {hint}"


@contextmanager
def _within_torchs_memory() -> Iterator[None]:
    """As `within_memory`, also for what torch raises on a GPU and on a CPU."""
    with within_memory():
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                raise MemoryError from error
            raise


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise TesseraError(f"device {name!r} is not to be had here ({reason}); 'cpu' always is") from error
    return device
