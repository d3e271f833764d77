"""What is made before a run: an LMDB of images, a folder of pretrained weights."""

from pathlib import Path
from typing import Any

import click

from job.errors import ConfigError
from job.runtime.stop import StopSignal


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--folder", type=click.Path(path_type=Path), help="Where the images of a CSV lie. [default: beside the CSV]")
@click.option("--csv", "csv_output", type=click.Path(path_type=Path), help="Also write a CSV of what was packed.")
@click.option(
    "--resize", type=click.IntRange(0), default=0, metavar="PIXELS", help="Re-encode larger images to this short side, such as 256."
)
@click.option("--quality", type=click.IntRange(1, 100), default=85, show_default=True, help="JPEG quality of re-encoded images.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["jpeg", "ppm"]),
    default="jpeg",
    show_default=True,
    help="jpeg: what is not larger is stored as it is. ppm: all as plain pixels, eight times the bytes, faster to load.",
)
@click.option("--threads", type=click.IntRange(0), default=0, help="Threads that read and re-encode. [default: one per core]")
@click.option(
    "--max-bad-samples",
    type=click.FloatRange(0, 1),
    default=0.01,
    show_default=True,
    help="Highest share of files that may be no images.",
)
@click.option("--csv-separator", "separator", default="auto", show_default=True)
@click.option("--image-column", default="auto", show_default=True)
@click.option("--caption-column", default="auto", show_default=True)
@click.pass_obj
def pack(stop: StopSignal, /, source: Path, output: Path, **options: Any) -> int:
    """Put images into an LMDB. SOURCE is a folder of images or a CSV that lists them; OUTPUT is the LMDB to make.

    Killed or stopped, the same command goes on where it was; OUTPUT appears once it is complete.
    """
    from job.data.pack import pack as pack_images
    from job.runtime.log import set_up_logging

    set_up_logging()
    packed = pack_images(source, output, stopping=lambda: stop.requested, **options)
    left_out = f", {len(packed.bad)} left out" if packed.bad else ""
    click.echo(f"{packed.images} images in {output} ({packed.output_bytes / 1e6:.1f} MB){left_out}")
    return 0


@click.command()
@click.argument("tag")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--model", default="ViT-B-32", show_default=True, help="open_clip model name.")
def fetch(tag: str, folder: Path, model: str) -> int:
    """Download pretrained weights into FOLDER, for machines without a network: give it to them as --pretrained FOLDER."""
    from job.model.build import write_base
    from job.runtime.log import set_up_logging
    from job.storage.files import explained

    set_up_logging()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not an empty folder. Choose another one.")
    with explained(str(folder), "writing", writing=True):
        write_base(folder, model=model, pretrained=tag, seed=0)
    click.echo(f"{model} with {tag} is in {folder}. Use it with: --model {model} --pretrained {folder}")
    return 0
