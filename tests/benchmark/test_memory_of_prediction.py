"""Memory: predicting with a large set streams over its members."""

from __future__ import annotations

import subprocess
import sys

import pytest

# A set whose members are drawn on the fly, written block by block into a memory-mapped file, as a run does; the peak is
# the process's own high-water mark above what it held with network and images in memory.
MEASURE = """
import sys
from pathlib import Path
import numpy as np, torch
from multiplicity_bench.benchmark.networks import Network
from multiplicity_bench.benchmark.predict import predict
from multiplicity_bench.generators.modelset import DiagonalSet

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

torch.set_num_threads(1)
members, count, file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
network = Network({"name": "smallcnn"}, 1, 28, 2)
params, buffers = network.init(0)
sd = torch.full((sum(p.numel() for p in params.values()),), 0.01)
drawn = DiagonalSet(members, {}, buffers, mean=params, factors={"sd": sd}, seed=1)
images = torch.randint(0, 256, (count, 1, 28, 28)).to(torch.uint8)
predict(network, DiagonalSet(2, {}, buffers, mean=params, factors={"sd": sd}, seed=1), images[:64], strategy="loop")
logits = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=(members, count, 2))
held = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")

def write(block, values):
    logits[block.start : block.start + block.size] = values.numpy()
    logits.flush()

predict(network, drawn, images, strategy="loop", write=write)
print(status("VmHWM") - held, drawn.bytes_per_member())
"""


def measure(members: int, count: int, file: str) -> tuple[int, int]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(members), str(count), file], capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr
    peak, per_member = done.stdout.split()
    return int(peak), int(per_member)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self")
def test_a_thousand_members_of_smallcnn_predict_far_below_two_gigabytes(tmp_path):
    members, count = 1000, 200
    peak, per_member = measure(members, count, str(tmp_path / "logits.npy"))
    # Weights of 1,000 members are 94 MB, one block of at most 256 MB; a batch of 256 images of one member is 100 MB.
    # With 10,000 images only the logits grow: 8 bytes per member and image, 80 MB per 1,000 images.
    logits = 8 * members * count
    grown = peak - logits + 8 * members * 10_000
    assert per_member == 4 * 23_538 and grown < 2 * 2**30, f"{peak / 2**20:.0f} MB at {count} images"
