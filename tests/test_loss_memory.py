"""The loss of a large global batch needs memory for this rank's share of it, not for the square of the whole."""

import subprocess
import sys
from pathlib import Path

import pytest

RANKS, WIDTH = 8, 128
MEASURE = """
import sys, torch
from benchmarks.machine import peak_rss_bytes
from job.model.loss import contrastive_loss
from job.runtime.ranks import Ranks
from job.runtime.world import World

share, kind = int(sys.argv[1]), sys.argv[2]

class OneOfEight(World):
    '''Stands where a rank among eight would; the others' rows are copies of its own.'''
    def gather(self, rows):
        return rows.repeat(8, *[1] * (rows.ndim - 1))

torch.manual_seed(0)
image, text = (torch.nn.functional.normalize(torch.randn(share, 128), dim=-1) for _ in range(2))
world = OneOfEight(Ranks(3, 8, 3, 8))
def loss(rows):
    return contrastive_loss(
        image[:rows], text[:rows], valid_b=torch.ones(rows, dtype=torch.bool), text_id_b=torch.arange(rows),
        logit_scale=torch.tensor(10.0), logit_bias=torch.tensor(-5.0), loss=kind, world=world,
    )
loss(16)
before = peak_rss_bytes()
found = loss(share)
assert found.pairs == 8 * share and found.image.isfinite().all()
print(peak_rss_bytes() - before)
"""


def peak_bytes(share: int, kind: str) -> int:
    found = subprocess.run(
        [sys.executable, "-c", MEASURE, str(share), kind], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    return int(found.stdout)


@pytest.mark.parametrize(("kind", "shares"), [("clip", (2048, 4096)), ("siglip", (4096,))])
def test_memory_of_the_loss_is_linear_in_the_local_batch(kind: str, shares: tuple[int, ...]) -> None:
    peaks = [peak_bytes(share, kind) for share in shares]
    print({RANKS * share: f"{peak / 1e6:.0f} MB" for share, peak in zip(shares, peaks, strict=True)})
    chunk = 64 * 2**20
    for share, peak in zip(shares, peaks, strict=True):
        features = 2 * RANKS * share * WIDTH * 4  # of the global batch, both towers: what must be held
        assert peak < 2.5 * features + 6 * chunk
    assert peaks[-1] < shares[-1] * RANKS * shares[-1] * 4  # less than a single b x N matrix, of which a step computes six
    assert peaks[-1] < 2 * peaks[0]
