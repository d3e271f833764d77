"""JPEGs decoded on a GPU, for nodes with few cores to a GPU: nvJPEG, which torchvision's wheels bring.

They are cropped and resized there too, and come back to the host as the small uint8 views that a batch consists of. So nothing else
has to know where they were made; see docs/decisions/0018-tried-before-it-is-used.md.
"""

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from job.data.pixels import Encoded, decode_common_jpegs, pixels_of_common_jpeg
from job.runtime.device import device_failure

log = logging.getLogger(__name__)

AT_ONCE = 2
"""Tasks on the GPU: one decodes while the other resizes."""
ROUND_PIXELS = 2**26 // 3
"""Of the images that a task has on the GPU at a time: 64 MB, so that training keeps its memory. The one that is resized is there in
float32 besides."""
SMALLEST = 8
"""Images that go to the CPU together, where one of them can't be decoded on the GPU."""

T = TypeVar("T")


class GpuJpegs:
    """Decodes on one device, from any number of threads."""

    chunk = 128
    """Images per task."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._told = threading.Event()
        self._streams: queue.Queue[torch.cuda.Stream | None] = queue.Queue()
        for _ in range(AT_ONCE):
            self._streams.put(torch.cuda.Stream(device) if device.type == "cuda" else None)

    def each(self, encoded: Mapping[int, Encoded], view: Callable[[int, Tensor], T]) -> dict[int, T]:
        """What `view` makes of each image that is a common JPEG, by place. The rest is for the CPU, which also knows what is wrong
        with an image.

        Args: view: gets the place and uint8 (H, W, 3) on the device; what it makes must be on the host when it returns.
        """
        pixels = {place: pixels_of_common_jpeg(data) for place, data in encoded.items()}
        done: dict[int, T] = {}
        with self._turn():
            for places in _rounds({place: count for place, count in pixels.items() if 0 < count <= ROUND_PIXELS}):
                try:
                    decoded = self._decoded({place: encoded[place] for place in places})
                    while decoded:  # freed one by one
                        place, image = decoded.popitem()
                        done[place] = view(place, image)
                except torch.OutOfMemoryError as error:
                    decoded = {}
                    self._tell(error)
        return done

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """In here this thread's work on the device waits for no training step, nor that for it."""
        stream = self._streams.get()
        try:
            with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
                yield
        finally:
            self._streams.put(stream)

    def _decoded(self, encoded: Mapping[int, Encoded]) -> dict[int, Tensor]:
        """Those that can be decoded: one that can't fails all that are decoded with it, so these are tried in halves."""
        try:
            return dict(zip(encoded, decode_common_jpegs(list(encoded.values()), device=self._device), strict=True))
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or device_failure(error) is not error:
                raise
            self._tell(error)
        if len(encoded) <= SMALLEST:
            return {}
        places = list(encoded)
        halves = places[: len(places) // 2], places[len(places) // 2 :]
        return {place: image for half in halves for place, image in self._decoded({at: encoded[at] for at in half}).items()}

    def _tell(self, error: Exception) -> None:
        if not self._told.is_set():
            self._told.set()
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            log.warning("the GPU could not decode some JPEGs, so the CPU does: %s", reason)


def _rounds(pixels: Mapping[int, int]) -> Iterator[Sequence[int]]:
    """Places, as many at a time as have at most ROUND_PIXELS together."""
    places: list[int] = []
    for place in pixels:
        if places and sum(pixels[at] for at in (*places, place)) > ROUND_PIXELS:
            yield places
            places = []
        places.append(place)
    if places:
        yield places
