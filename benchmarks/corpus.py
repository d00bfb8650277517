"""Reading a corpus: samples a second against webdataset with torchvision's transforms, and peak memory by size.

    python -m benchmarks.corpus [--quick]

Both read the same img2dataset-like shards of 256-pixel JPEGs, decode, resize to 64 x 64 (bicubic, central square) and stack float
tensors of 64 samples with their captions; once in one thread, once with two workers (ours: threads, theirs: processes of a DataLoader).
They take turns and the medians are compared. Memory: the peak of a process that reads 1,000 and one that reads 50,000 samples."""
import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import say
from recap.corpus import open_corpus, pack_tar

SIZE, BATCH, LIMIT = 64, 64, .05  # growth of the peak from 1,000 to 50,000 samples


def jpegs(count=40, side=256):
    "Photograph-like noise over soft colours: about 20 KB each."
    rng, found = np.random.default_rng(0), []
    for i in range(count):
        soft = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)).resize((side + 32*(i % 4), side), Image.Resampling.BICUBIC)
        pixels = np.asarray(soft).astype(int) + rng.integers(-12, 12, (side, soft.width, 3))
        out = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
        found.append(out.getvalue())
    return found


def make(out, n, pictures, shard_size=1000):
    "Shards as img2dataset writes them, without parquet."
    out.mkdir(parents=True)
    for start in range(0, n, shard_size):
        keys = [f"{i:09d}" for i in range(start, min(n, start + shard_size))]
        pack_tar(out/f"{start//shard_size:05d}.tar", ((f"{k}.{s}", d) for i, k in enumerate(keys)
                 for s, d in (("jpg", pictures[i % len(pictures)]), ("json", json.dumps({"key": k}).encode()), ("txt", f"picture {k}".encode()))))
    return out


def ours(folder, threads=0):
    "Samples read by recap.corpus."
    import torch
    corpus, n, batch = open_corpus(folder), 0, []
    def stack(): return torch.from_numpy(np.stack([np.asarray(s.image) for s in batch])).permute(0, 3, 1, 2).float().div_(255), [s.alt for s in batch]
    for shard in corpus.shards:
        for sample in corpus.read_shard(shard, SIZE, threads):
            batch.append(sample)
            if len(batch) == BATCH: n += len(stack()[0]); batch = []
    if batch: n += len(stack()[0])
    return n


def theirs(folder, workers=0):
    "Samples read by webdataset and torchvision."
    import torch, webdataset as wds
    from torchvision import transforms as T
    change = T.Compose([T.Resize(SIZE, T.InterpolationMode.BICUBIC), T.CenterCrop(SIZE), T.ToTensor()])
    data = wds.WebDataset(sorted(map(str, Path(folder).glob("*.tar"))), shardshuffle=False, empty_check=False).decode("pilrgb").to_tuple("jpg", "txt").map_tuple(change, str).batched(BATCH)
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers) if workers else data
    return sum(len(images) for images, _ in loader)


def peak(folder):
    "Peak memory in MB of a process that reads a corpus through."
    code = ("import sys; from recap.corpus import open_corpus; c = open_corpus(sys.argv[1]); "
            "n = sum(1 for s in c.shards for _ in c.read_shard(s, 64, threads=2)); "
            "print(n, next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM'))/1024)")
    n, mb = subprocess.run([sys.executable, "-c", code, str(folder)], check=True, capture_output=True, text=True).stdout.split()
    return int(n), float(mb)


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--quick", action="store_true", help="1,000 samples three times, memory up to 5,000")
    args = args.parse_args()
    try: import torch, torchvision, webdataset  # noqa: F401
    except ImportError as e:
        print(f"benchmarks.corpus: {e.name} is missing: pip install webdataset torchvision")
        return say("read a corpus (samples/s)", None, reason=f"{e.name} is missing")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    n, rounds, many = (1000, 3, 5000) if args.quick else (10_000, 5, 50_000)
    with tempfile.TemporaryDirectory() as home:
        folder = make(Path(home)/"read", n, jpegs())
        ways = {"ours, 1 thread": lambda: ours(folder), "webdataset, 1 thread": lambda: theirs(folder),
                "ours, 2 workers": lambda: ours(folder, 2), "webdataset, 2 workers": lambda: theirs(folder, 2)}
        times = {k: [] for k in ways}
        for _ in range(rounds):
            for name, read in ways.items():
                began = time.perf_counter()
                assert read() == n, name
                times[name].append(time.perf_counter() - began)
        rate = {k: n/statistics.median(t) for k, t in times.items()}
        for k, t in times.items(): print(f"{k:22} {rate[k]:7.0f} samples/s   ({', '.join(f'{s:.2f}' for s in sorted(t))} s for {n})")
        tiny = jpegs(20, 48)
        peaks = {count: peak(make(Path(home)/f"peak{count}", count, tiny)) for count in (1000, many)}
        for count, (read, mb) in peaks.items(): print(f"peak memory at {read:6} samples: {mb:.1f} MB")
    growth = peaks[many][1]/peaks[1000][1] - 1
    print(f"growth: {growth:.1%} (limit {LIMIT:.0%})")
    say("read a corpus (samples/s)", round(rate["ours, 1 thread"]), round(rate["webdataset, 1 thread"]), share_of_limit=round(growth/LIMIT, 3), samples=n, rounds=rounds,
        two_workers=dict(ours=round(rate["ours, 2 workers"]), peer=round(rate["webdataset, 2 workers"])), peak_mb={str(c): round(mb, 1) for c, (_, mb) in peaks.items()}, limit_growth=LIMIT)


if __name__ == "__main__": main()
