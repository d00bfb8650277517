"Buckets: every picture in its own shape, every sample in its turn, whoever asks."
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from recap.buckets import assign, bucket_indices, bucket_report, fit_bucket, make_buckets
from recap.core import RecapError
from recap.fit import step_indices

SAMPLES = {(8, 8): np.arange(0, 400, 2), (6, 10): np.arange(1, 181, 2), (10, 6): np.arange(401, 441), (4, 16): np.arange(500, 507)}


def test_the_nearest_ratio_by_trying_all():
    rng = random.Random(0)
    for _ in range(2000):
        buckets = make_buckets(rng.choice((64, 256, 1024))**2, rng.choice((8, 16)) if rng.random() < .3 else 64) if rng.random() < .5 else make_buckets(64**2, 8)
        w, h = rng.randint(1, 4000), rng.randint(1, 4000)
        kept = {b: min(w/b[1], h/b[0])**2*b[0]*b[1]/(w*h) for b in buckets}      # the largest box of that shape inside the picture
        assert kept[assign(w, h, buckets)] >= max(kept.values())*(1 - 1e-8)


def test_the_picture_is_scaled_alike_in_both_directions():
    "A grid of lines: their distances after the transform, across and down."
    for w, h in ((512, 512), (1024, 512), (640, 1280), (2048, 300)):
        y, x = np.indices((h, w))
        waves = 127 + 60*np.cos(2*np.pi*x/32) + 60*np.cos(2*np.pi*y/32)
        bucket = assign(w, h, make_buckets(256**2, 32))
        found = np.asarray(fit_bucket(Image.fromarray(waves.astype(np.uint8)).convert("RGB"), bucket))[..., 0].astype(float)
        def wavelength(line):      # of the strongest wave, by its phase at both ends
            t, best = np.arange(len(line)), None
            for period in np.linspace(4, 40, 3601):
                power = abs(((line - line.mean())*np.hanning(len(line))*np.exp(-2j*np.pi*t/period)).sum())
                if best is None or power > best[0]: best = power, period
            return best[1]
        across, down = wavelength(found.mean(0)), wavelength(found.mean(1))
        assert abs(across/down - 1) < .01, (w, h, across, down)


def test_report_against_pictures():
    "Shares counted in pixels of pictures that were really cropped and padded."
    buckets, rng = make_buckets(64**2, 8), random.Random(1)
    sizes = [(rng.randint(60, 500), rng.randint(60, 500)) for _ in range(40)]
    left, empty = [], []
    for w, h in sizes:
        b = assign(w, h, buckets)
        ramp = np.linspace(0, 255, max(w, h)).astype(np.uint8)
        ramp = np.tile(ramp[:w], (h, 1)) if w/h > b[1]/b[0] else np.tile(ramp[:h, None], (1, w))      # runs along the side that is cropped
        full, seen = np.ptp(ramp.astype(int)), np.ptp(np.asarray(fit_bucket(Image.fromarray(ramp), b)).astype(int))
        left.append(1 - seen/max(1, full))
        empty.append((np.asarray(fit_bucket(Image.new("RGB", (w, h), "black"), b, "pad"))[..., 0] > 128).mean())
    told = bucket_report(sizes, buckets)
    assert told["cropped"] == pytest.approx(np.mean(left), abs=.02) and told["padded"] == pytest.approx(np.mean(empty), abs=.02)


@pytest.mark.parametrize("batch_size", [4, 16, 64])
def test_every_sample_in_its_turn(batch_size):
    n = sum(map(len, SAMPLES.values()))
    drawn = [bucket_indices(SAMPLES, batch_size, s, 3) for s in range(8*n//batch_size)]
    count = Counter()
    for epoch in range(1, 8):
        a, b = (sum(e*len(v)//batch_size for v in SAMPLES.values()) for e in (epoch - 1, epoch))
        for d in drawn[a:b]: count.update(d.tolist())
        for v in SAMPLES.values():
            seen = [count[i] for i in v]
            assert max(seen) - min(seen) <= 1                                     # none twice before all had their turn
            assert 0 <= epoch*len(v) - sum(seen) < batch_size                     # owed: fewer than a batch
    assert all(sum(set(d) <= set(v) for v in SAMPLES.values()) == 1 and len(d) == batch_size for d in drawn)
    shapes = [next(k for k, v in SAMPLES.items() if d[0] in v) for d in drawn]
    assert len({tuple(shapes[i:i + 20]) for i in range(0, len(shapes) - 20, 20)}) == max(1, (len(shapes) - 1)//20)      # another order each epoch


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_same_samples_for_any_number_of_processes(processes):
    "Faults 26 and 28: what a process reads follows from seed, step and its number alone, from any step on."
    code = ("import sys, json, numpy as np; from recap.buckets import bucket_indices; r, n = map(int, sys.argv[1:]); "
            "S = {(8, 8): np.arange(0, 400, 2), (6, 10): np.arange(1, 181, 2), (10, 6): np.arange(401, 441), (4, 16): np.arange(500, 507)}; "
            "print(json.dumps([bucket_indices(S, 16, s, 5)[r::n].tolist() for s in range(17, 41)]))")
    import json
    if processes == 4: parts = [[bucket_indices(SAMPLES, 16, s, 5)[r::4].tolist() for s in reversed(range(17, 41))][::-1] for r in range(4)]      # in another order
    else: parts = [json.loads(subprocess.run([sys.executable, "-c", code, str(r), str(processes)], capture_output=True, text=True, check=True).stdout) for r in range(processes)]
    for i, s in enumerate(range(17, 41)): assert sorted(x for p in parts for x in p[i]) == sorted(bucket_indices(SAMPLES, 16, s, 5).tolist())


def test_one_shape_is_drawn_as_ever():
    for n, batch_size in ((37, 8), (5, 8), (64, 64)):
        for s in range(30): assert np.array_equal(bucket_indices({(8, 8): np.arange(n)}, batch_size, s, 2), step_indices(n, batch_size, s, 2))


def test_mistakes():
    for call in (lambda: make_buckets(20**2, 64), lambda: make_buckets(64**2, 8, (4, .25)), lambda: fit_bucket(Image.new("RGB", (4, 4)), (8, 8), "stretch"),
                 lambda: bucket_report([], [(8, 8)]), lambda: bucket_indices({}, 4, 0), lambda: bucket_indices({(8, 8): []}, 4, 0)):
        with pytest.raises(RecapError) as e: call()
        assert "\n" not in str(e.value)
