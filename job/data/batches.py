"""The pipeline: sample numbers -> batches of pixels and tokens, decoded ahead by threads.

Threads, not processes: torchvision's JPEG decoder and torch's resize release the GIL, so two threads decode nearly as much as two
processes, and there is no fork, no /dev/shm and one LMDB environment. What has been prefetched is not state: the position
moves in train_step alone.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from job.data.captions import Captions, Known, TokenGroups
from job.data.gpu_jpeg import GpuJpegs
from job.data.order import uniforms
from job.data.pixels import CROP_NUMBERS, BadImage, Decoded, Encoded, View, decode, random_crop_view, whole_view

CROP_STREAM = 0
BATCHES_AHEAD = 3
BYTES_AHEAD = 2**31
"""Very large batches are prepared fewer ahead."""
CHUNK = 16
"""Images per task: enough to make the queue's cost vanish, few enough to spread one batch over all threads."""

ROOMY = 2.0
"""Times the pixels of the view; images that have more are cheaper packed."""

T = TypeVar("T")

Augment = tuple[Callable[[Decoded, NDArray[np.float64]], Decoded], Callable[[NDArray[np.int64]], NDArray[np.float64]]]
"""(image, numbers) -> view, and positions -> numbers (B, k)."""

Read = Callable[[str], Encoded | None]
"""From a key to the encoded image, if there is one."""


class ImageSource(Protocol):
    def reading(self) -> AbstractContextManager[Read]: ...


class Keys(Protocol):
    def __getitem__(self, row: int) -> str: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Samples:
    """What one batch consists of: sample numbers of the run, and the CSV rows that they stand for, both (B,)."""

    positions: NDArray[np.int64]
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class Loaded:
    """The images of a batch. One that can't be decoded keeps its position but is left out of the pixels."""

    pixels: Tensor
    """uint8 (b, 3, H, W), b <= B"""
    good: NDArray[np.int64]
    """(b,): places in the batch that the pixels belong to."""
    bad: tuple[tuple[str, str], ...]
    """(key, reason) of each image left out."""


@dataclass(frozen=True)
class Batch:
    """One global batch as the step takes it."""

    images: Tensor
    """uint8 (B, 3, H, W), or float32 (B, D), what a locked image tower makes of them; without those that can't be decoded."""
    tokens: TokenGroups
    """tokens.text_of is (B,): image i and caption i are one pair."""
    bad: tuple[tuple[str, str], ...]
    """(key, reason) of each image left out."""


class DecodeTally:
    """What decoding has cost up to now. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._images = self._pixels = 0
        self._seconds = 0.0

    def add(self, *, images: int, pixels: int, seconds: float) -> None:
        """Args: pixels: of the images as they are stored. seconds: of one thread, to read, decode and resize them."""
        with self._lock:
            self._images += images
            self._pixels += pixels
            self._seconds += seconds

    def remedy(self, *, threads: int, cores: int, view: View, gpu: str = "none") -> str:
        """What makes a pipeline faster that its device waits for, as a sentence.

        Args: threads, cores: of this rank. gpu: none, idle (it could decode), or decodes.
        """
        if not self._images:
            return ""
        cost = f"An image takes {1000 * self._seconds / self._images:.1f} ms of a thread"
        if threads < cores and gpu != "decodes":
            return f"{cost}, and {threads} of {cores} cores decode: start again with --threads {cores}."
        if self._pixels / self._images > ROOMY * view.height * view.width:
            shortest = round(max(view.height, view.width) * 8 / 7)
            side = math.sqrt(self._pixels / self._images)
            remedy = f"pack the files anew with `clipjob pack --resize {shortest}`"
            return f"{cost}, for it has about {side:.0f} x {side:.0f} pixels: {remedy}."
        if gpu == "decodes":
            return ""
        instead = ", or, for JPEGs, --jpeg-decoder gpu" if gpu == "idle" else ""
        return f"{cost}, and all {cores} cores decode: more cores for each GPU are what helps{instead}."


def load_batches(
    samples: Iterable[Samples],
    *,
    keys: Keys,
    images: ImageSource,
    captions: Captions,
    view: View,
    threads: int,
    seed: int,
    crop_scale: float,
    known_images: Known | None = None,
    known_captions: Known | None = None,
    tally: DecodeTally | None = None,
    gpu_jpegs: GpuJpegs | None = None,
    pin_memory: bool = False,
    stopping: Callable[[], bool] = lambda: False,
) -> Generator[Batch]:
    """Batches for training, in the order of samples, prepared ahead by threads.

    Args:
        crop_scale: smallest share of an image that a random crop keeps; 1: the evaluation view instead.
        known_images, known_captions: features of locked towers, by key and by caption; with them nothing is decoded or tokenised.
        tally: counts what decoding costs.
        gpu_jpegs: decodes the JPEGs that it can.
        stopping: asked twice a second while a batch is not ready; true ends the batches.
    """

    def finish(asked: Samples, loaded: Loaded) -> Batch:
        texts = captions.at(asked.rows[loaded.good], asked.positions[loaded.good])
        tokens = captions.known(texts, known_captions) if known_captions else captions.tokens(texts)
        return Batch(loaded.pixels, tokens.pinned() if pin_memory else tokens, loaded.bad)

    def crop(image: Decoded, numbers: NDArray[np.float64]) -> Decoded:
        return random_crop_view(image, view, numbers=numbers, smallest=crop_scale)

    def numbers_at(positions: NDArray[np.int64]) -> NDArray[np.float64]:
        return uniforms(positions, CROP_NUMBERS, seed=seed, stream=CROP_STREAM)

    if known_images:
        return _known_batches(samples, keys=keys, known=known_images, finish=finish, pin_memory=pin_memory, stopping=stopping)
    augment = (crop, numbers_at) if crop_scale < 1 else None
    return load_images(
        samples,
        keys=keys,
        images=images,
        view=view,
        threads=threads,
        finish=finish,
        augment=augment,
        tally=tally,
        gpu_jpegs=gpu_jpegs,
        pin_memory=pin_memory,
        stopping=stopping,
    )


def _known_batches(
    samples: Iterable[Samples],
    *,
    keys: Keys,
    known: Known,
    finish: Callable[[Samples, Loaded], Batch],
    pin_memory: bool,
    stopping: Callable[[], bool],
) -> Generator[Batch]:
    """Batches of features that are there already, which takes no thread."""
    for asked in samples:
        if stopping():
            return
        names = [keys[int(row)] for row in asked.rows]
        places = np.array([known.place_of.get(name, -1) for name in names], dtype=np.int64)
        good = np.flatnonzero(places >= 0)
        features = known.features[torch.from_numpy(places[good])]
        bad = tuple((names[at], "it is missing or can't be decoded") for at in np.flatnonzero(places < 0))
        yield finish(asked, Loaded(features.pin_memory() if pin_memory else features, good, bad))


def load_images(
    samples: Iterable[Samples],
    *,
    keys: Keys,
    images: ImageSource,
    view: View,
    threads: int,
    finish: Callable[[Samples, Loaded], T],
    augment: Augment | None = None,
    tally: DecodeTally | None = None,
    gpu_jpegs: GpuJpegs | None = None,
    pin_memory: bool = False,
    stopping: Callable[[], bool] = lambda: False,
) -> Generator[T]:
    """What `finish` makes of the images of each batch, in order, a few batches ahead. Close the iterator to end its threads.

    Args:
        finish: called on a decode thread, once for each batch.
        augment: None: the evaluation view.
    """
    chunk = gpu_jpegs.chunk if gpu_jpegs else CHUNK

    def submit(asked: Samples) -> Future[T]:
        names = [keys[int(row)] for row in asked.rows]
        # A pixel's colours lie side by side, as decoders and resize have them; the device, which is faster, rearranges them.
        slots = torch.empty((len(names), view.height, view.width, 3), dtype=torch.uint8, pin_memory=pin_memory)
        pixels = slots.numpy()
        numbers = augment[1](asked.positions) if augment else None

        def fill(at: int, image: Encoded | Decoded | None) -> tuple[str, int]:
            """Args: image: as the LMDB has it, or decoded. Returns: why it could not, and the pixels that are stored of it."""
            if image is None:
                return "it is not in the LMDB", 0
            try:
                decoded = decode(image) if isinstance(image, Encoded) else image
                made = whole_view(decoded, view) if augment is None or numbers is None else augment[0](decoded, numbers[at])
            except BadImage as error:
                return str(error), 0
            if isinstance(made, Tensor):
                slots[at].copy_(made)
            else:
                pixels[at] = made
            return "", decoded.shape[0] * decoded.shape[1]

        def load_chunk(start: int) -> list[str]:
            began = time.monotonic()
            places = range(start, min(start + chunk, len(names)))
            done: dict[int, tuple[str, int]] = {}
            with images.reading() as read:
                encoded = {at: read(names[at]) for at in places}
                if gpu_jpegs:
                    done = gpu_jpegs.each({at: data for at, data in encoded.items() if data is not None}, fill)
                done |= {at: fill(at, data) for at, data in encoded.items() if at not in done}
            if tally:
                stored = sum(count for _, count in done.values())
                tally.add(images=len(done), pixels=stored, seconds=time.monotonic() - began)
            return [done[at][0] for at in places]

        chunks = [pool.submit(load_chunk, start) for start in range(0, len(names), chunk)]

        def collect() -> T:
            reasons = [reason for chunk in chunks for reason in chunk.result()]
            good = np.array([at for at, reason in enumerate(reasons) if not reason], dtype=np.int64)
            bad = tuple((names[at], reason) for at, reason in enumerate(reasons) if reason)
            kept = slots if not bad else slots[torch.from_numpy(good)]
            kept = kept.pin_memory() if pin_memory else kept  # the same, unless some were left out
            return finish(asked, Loaded(kept.permute(0, 3, 1, 2), good, bad))

        return pool.submit(collect)  # queued behind its chunks, so waiting for them can't block the pool

    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode", initializer=_one_torch_thread)
    waiting: deque[Future[T]] = deque()
    try:
        for asked in samples:
            waiting.append(submit(asked))
            batch_bytes = len(asked.rows) * 3 * view.height * view.width
            if len(waiting) >= min(BATCHES_AHEAD, max(1, BYTES_AHEAD // batch_bytes)):
                if not _ready(waiting[0], stopping):
                    return
                yield waiting.popleft().result()
        while waiting:
            if not _ready(waiting[0], stopping):
                return
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _ready(batch: Future[T], stopping: Callable[[], bool]) -> bool:
    """Waits for a batch. False: stopping() became true first."""
    while not wait([batch], timeout=0.5).done:
        if stopping():
            return False
    return True


def _one_torch_thread() -> None:
    """Each decode thread would start a team of OpenMP threads of its own otherwise, and note gradients that nobody wants."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
