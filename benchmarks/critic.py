"""What scoring the training set costs, against what a sample costs in phase 2.

python benchmarks/critic.py CURATED [PIXELS] [STEP_MS] [IMAGES]

CURATED: a curated set; PIXELS: side of the critic's pictures; STEP_MS: CPU milliseconds of a
training step a sample, all processes together; IMAGES: what a round trains on. The defaults are
the demo's.
"""

import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from components.curation.shards import list_shards
from components.feedback import classifier
from components.feedback.pixels import small_pictures

LIMITS = {"picture_bytes": 10**8, "text_bytes": 10**6, "pixels": 10**8}
SHARE = 0.05  # of the step time that scoring may cost


def main():
    curated = Path(sys.argv[1])
    side, step, images = (
        float(given) for given in [*sys.argv[2:], *("32", "20", "12000")[len(sys.argv) - 2 :]]
    )
    network = classifier.build(0)
    pictures, read = [], -time.process_time()
    for shard in list_shards(curated):
        pictures += [array for _, array in small_pictures(shard, int(side), LIMITS)]
    read += time.process_time()
    arrays = np.stack(pictures)
    classifier.score(network, arrays[:256])
    judge = -time.process_time()
    classifier.score(network, arrays)
    judge += time.process_time()
    n = len(arrays)
    each = 1e3 * (read + judge) / n
    print(f"{n} pictures of {int(side)} px, CPU ms a picture in one thread:")
    print(
        f"reading and decoding {1e3 * read / n:.2f}, network {1e3 * judge / n:.2f}, sum {each:.2f}"
    )
    print(
        f"a round of {images:.0f} images at {step:g} ms: scoring the set ahead costs "
        f"{each * n / (step * images):.1%} of the steps' time"
    )
    print(f"{SHARE:.0%} are reached at {SHARE * step / each:.2f} pictures a trained image")


if __name__ == "__main__":
    main()
