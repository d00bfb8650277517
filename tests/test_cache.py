"The encoded corpus: what is computed again and what is not, what survives a fault, how much memory it takes."
import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from recap.cache import Cache, CacheConfig, _read, _save, build_cache, cache_size, load_cache
from recap.core import RecapError, foundation
from recap.corpus import CorpusConfig, make_world, open_corpus


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A corpus of two shards with alt and dsc, and its cache."
    home = tmp_path_factory.mktemp("cache")
    make_world(CorpusConfig(n=12, shard_size=6, truth_styles="dsc"), home/"corpus")
    build_cache(CacheConfig(corpus=str(home/"corpus"), styles="alt,dsc"), home/"cache")
    return home


@pytest.fixture
def copy(home, tmp_path):
    import shutil
    shutil.copytree(home, tmp_path/"home")
    return tmp_path/"home"


def build(home, **more):
    "Build again; the files that were written."
    before = {f.name: f.stat().st_mtime_ns for f in (home/"cache").glob("0*.safetensors")}
    build_cache(CacheConfig(corpus=str(home/"corpus"), styles="alt,dsc", **more), home/"cache")
    after = {f.name: f.stat().st_mtime_ns for f in (home/"cache").glob("0*.safetensors")}
    assert not list((home/"cache").glob(".*.tmp"))
    return sorted(n for n in after if before.get(n) != after[n])


def other_vae(home):
    from diffusers import AutoencoderKL
    vae = AutoencoderKL.from_pretrained(foundation("vae"))
    vae.register_to_config(scaling_factor=2*vae.config.scaling_factor)
    vae.save_pretrained(home/"vae")
    return str(home/"vae")


def tell(home, shard="00001", key="000010003", text="Another caption."):
    "Change one caption of one shard."
    corpus = open_corpus(home/"corpus")
    corpus.write_captions("dsc", shard, [dict(key=k, caption=text if k == key else c) for (_, k), c in corpus.captions("dsc", shard).items()])


def test_only_what_changed_is_computed_again(copy):
    assert build(copy) == []
    old = load_cache(copy/"cache").x0(range(12))
    tell(copy)
    assert build(copy) == ["00001.text-dsc.safetensors"]
    assert load_cache(copy/"cache").columns["dsc"]["00001", "000010003"] == "Another caption."
    assert build(copy, vae=other_vae(copy)) == ["00000.latents.safetensors", "00001.latents.safetensors"]
    assert torch.allclose(load_cache(copy/"cache").x0(range(12)), 2*old, atol=2e-2)


def test_what_nobody_asks_for_is_kept_while_it_holds(copy):
    cfg = CacheConfig(corpus=str(copy/"corpus"), styles="alt")
    build_cache(cfg, copy/"cache")
    assert list(load_cache(copy/"cache").columns) == ["alt", "dsc"]
    tell(copy)
    build_cache(cfg, copy/"cache")       # dsc is out of date now, and goes
    assert list(load_cache(copy/"cache").columns) == ["alt"] and not list((copy/"cache").glob("*text-dsc*"))
    for f in (copy/"corpus").glob("00001*"): f.unlink()
    build_cache(cfg, copy/"cache")       # and so does a shard that the corpus has no more
    assert len(load_cache(copy/"cache").keys) == 6 and not list((copy/"cache").glob("00001*"))


@pytest.mark.parametrize("damage", ["cut", "empty", "header", "longer"])
@pytest.mark.parametrize("name", ["00000.latents.safetensors", "00001.text-dsc.safetensors"])
def test_a_damaged_file_is_named_and_made_again(copy, name, damage):
    path = copy/"cache"/name
    whole, (tensors, said) = path.read_bytes(), _read(path)
    tensors = {k: v.clone() for k, v in tensors.items()}
    path.write_bytes({"cut": whole[:-7], "empty": b"", "header": b"\xff"*len(whole), "longer": whole + b"more"}[damage])
    with pytest.raises(RecapError, match=name): load_cache(copy/"cache")
    with pytest.warns(UserWarning, match=name): assert build(copy) == [name]
    again, also = _read(path)
    assert also == said and all(torch.equal(v, tensors[k]) for k, v in again.items()) and len(load_cache(copy/"cache").keys) == 12


@pytest.mark.parametrize("at", [0, 1])
def test_disk_full(copy, monkeypatch, at):
    "Fault 24: the error says so, what was good can be used, and the next run goes on."
    for shard in ("00000", "00001"): tell(copy, shard, f"{shard}0003")
    calls, fsync = [], os.fsync
    def full(fd):
        calls.append(fd)
        if len(calls) == at + 1: raise OSError(errno.ENOSPC, "No space left on device")
        fsync(fd)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RecapError, match=f"disk full while writing .*0000{at}.text-dsc.safetensors.*is kept"): build(copy)
    monkeypatch.setattr(os, "fsync", fsync)
    assert not list((copy/"cache").glob(".*.tmp"))
    cache = load_cache(copy/"cache")
    said = [cache.columns["dsc"][f"0000{i}", f"0000{i}0003"] == "Another caption." for i in (0, 1)]
    assert len(cache.keys) == 12 and said == [at == 1, False]
    assert build(copy) == [f"0000{i}.text-dsc.safetensors" for i in (0, 1)][at:]


def test_disk_full_between_two_autoencoders(copy, monkeypatch):
    "Latents of two encoders are never mixed: such a cache says that it is not finished."
    vae, calls, fsync = other_vae(copy), [], os.fsync
    def full(fd):
        calls.append(fd)
        if len(calls) == 2: raise OSError(errno.ENOSPC, "No space left on device")
        fsync(fd)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RecapError, match="disk full"): build(copy, vae=vae)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(RecapError, match="another encoder"): load_cache(copy/"cache")
    assert build(copy, vae=vae) == ["00001.latents.safetensors"]
    load_cache(copy/"cache")


def test_changed_pictures_never_meet_old_captions(copy, monkeypatch):
    "The pictures of a shard change, and the run stops before their captions are encoded."
    import shutil
    make_world(CorpusConfig(n=18, shard_size=6, truth_styles="dsc"), copy/"more")
    for f in (copy/"more").glob("00002*"): shutil.copy(f, copy/"corpus"/f.name.replace("00002", "00001"))
    import recap.cache
    monkeypatch.setattr(recap.cache, "cache_texts", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): build(copy)      # stops at the first shard: the second is as it was
    assert len(load_cache(copy/"cache").keys) == 12
    monkeypatch.setattr(recap.cache, "cache_texts", lambda corpus, shard, *a: (_ for _ in ()).throw(KeyboardInterrupt) if shard == "00001" else False)
    with pytest.raises(KeyboardInterrupt): build(copy)
    with pytest.raises(RecapError, match="page 14a_cache again"): load_cache(copy/"cache")


def test_size_is_told_beforehand(tmp_path):
    make_world(CorpusConfig(n=150, shard_size=15, truth_styles="ssc,dsc"), tmp_path/"corpus")
    for size, more in ((64, {}), (32, {"buckets": 8})):
        cfg, out = CacheConfig(corpus=str(tmp_path/"corpus"), styles="alt,ssc,dsc", size=size, **more), tmp_path/str(size)
        told = cache_size(open_corpus(tmp_path/"corpus"), cfg, sample=60)      # of 150
        made = build_cache(cfg, out)["megabytes"]
        on_disk = sum(f.stat().st_size for f in out.glob("0*.safetensors"))
        assert told["latents"] == pytest.approx(1e6*made["latents"], rel=.001)
        assert told["text"] == pytest.approx(1e6*made["text"], rel=.05)
        assert told["total"] == pytest.approx(on_disk, rel=.05)


def write_fake(home, n, per=250, width=256, side=8):
    "A cache of random numbers with two columns."
    rng = torch.Generator().manual_seed(0)
    for a in range(0, n, per):
        shard, keys = f"{a//per:05d}", [f"{a + i:09d}" for i in range(per)]
        _save(home/f"{shard}.latents.safetensors", {"latents": torch.randn(per, 8, side, side, generator=rng).half()}, made_by={"encoder": "a", "pictures": shard}, keys=keys)
        for style in ("alt", "dsc"):
            lengths = torch.randint(5, 45, (per,), generator=rng, dtype=torch.int32)
            _save(home/f"{shard}.text-{style}.safetensors", {"values": torch.randn(int(lengths.sum()), width, generator=rng).half(), "lengths": lengths},
                  made_by={"encoder": "a", "captions": [f"a caption of {k}, and of much else besides" for k in keys]})
    _save(home/"empty.safetensors", {"state": torch.randn(2, width, generator=rng)}, made_by={"encoder": "a"})


READ_ALL = """
import sys, numpy as np, torch
from recap.blend import parse_recipe, blend_styles
from recap.cache import load_cache
def own(): return int(next(l.split()[1] for l in open("/proc/self/smaps_rollup") if l.startswith("Anonymous:")))*1024
def read(folder):
    cache = load_cache(folder); n = len(cache.keys)
    styles = blend_styles(parse_recipe("dsc95"), cache.columns, cache.keys)
    order = np.random.default_rng(0).permutation(n)
    for i in range(0, n, 64): cache.x0(order[i:i + 64]); cache.states(order[i:i + 64], [styles[j] for j in order[i:i + 64]])
    return cache
read(sys.argv[1])      # what is loaded once is loaded
before = own(); cache = read(sys.argv[2]); print(own() - before, sum(cache.nbytes.values()))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="/proc/self/smaps_rollup tells a process's own memory")
def test_memory_is_flat_in_the_number_of_pictures(tmp_path):
    for n in (500, 5000): (tmp_path/str(n)).mkdir(); write_fake(tmp_path/str(n), n)
    grown = {}
    for n in (500, 5000):
        done = subprocess.run([sys.executable, "-c", READ_ALL, str(tmp_path/"500"), str(tmp_path/str(n))], capture_output=True, text=True, env={**os.environ, "MALLOC_TRIM_THRESHOLD_": "65536"})
        assert done.returncode == 0, done.stderr
        grown[n], size = map(int, done.stdout.split())
    assert size > 100e6 and grown[5000] - grown[500] < 3e6, (grown, size)      # all of it in memory would be 100 MB and more


def test_reads_what_was_written(tmp_path):
    "Against the files themselves, in one piece, as safetensors reads them."
    from safetensors.torch import load_file
    write_fake(tmp_path, 40, per=10, width=16)
    cache = load_cache(tmp_path)
    latents = torch.cat([load_file(tmp_path/f"{i:05d}.latents.safetensors")["latents"] for i in range(4)])
    order = np.random.default_rng(1).permutation(40)
    assert torch.equal(cache.x0(order), latents[order].float()) and torch.equal(cache.latents, latents)
    texts = {s: [load_file(tmp_path/f"{i:05d}.text-{s}.safetensors") for i in range(4)] for s in ("alt", "dsc")}
    rows = {s: [r for t in texts[s] for r in t["values"].split(t["lengths"].tolist())] for s in texts}
    styles = [("alt", "dsc", "")[i % 3] for i in range(40)]
    states, mask = cache.states(order, styles)
    for i, s, got, m in zip(order, styles, states, mask):
        want = (rows[s][i] if s else load_file(tmp_path/"empty.safetensors")["state"]).float()
        assert torch.equal(got[:len(want)], want) and not got[len(want):].any() and m.sum() == len(want) and m[:len(want)].all()
    assert [cache.keys[i] for i in (0, 9, 10, 39, -1)] == [("00000", "000000000"), ("00000", "000000009"), ("00001", "000000010"), ("00003", "000000039"), ("00003", "000000039")]
    assert list(cache.keys)[10:12] == cache.keys[10:12] and cache.columns["alt"].get(("00009", "x")) is None
    with pytest.raises(IndexError): cache.x0([40])


def test_a_cache_of_an_earlier_version_opens(tmp_path):
    write_fake(tmp_path, 20, per=10)      # its last file does not list the shards
    assert isinstance(load_cache(tmp_path), Cache) and len(load_cache(tmp_path).keys) == 20
    (tmp_path/"empty.safetensors").unlink()
    with pytest.raises(RecapError, match="empty.safetensors"): load_cache(tmp_path)
    with pytest.raises(RecapError, match="nothing encoded"): load_cache(tmp_path/"nowhere")


def test_shapes_are_not_mixed(tmp_path):
    from PIL import Image
    (tmp_path/"in").mkdir()
    rng = np.random.default_rng(0)
    for i, (w, h) in enumerate([(64, 64), (100, 60), (60, 100), (200, 60), (64, 64), (98, 61)]):
        Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)).save(tmp_path/"in"/f"{i}.png")
        (tmp_path/"in"/f"{i}.txt").write_text(f"picture {i}")
    made = build_cache(CacheConfig(corpus=str(tmp_path/"in"), styles="alt", buckets=16), tmp_path/"out")
    cache = load_cache(tmp_path/"out")
    from recap.buckets import assign, fit_bucket, make_buckets
    from recap.latents import encode, load_vae
    buckets = make_buckets(64**2, 16)
    for sample in open_corpus(tmp_path/"in").read_shard("00000"):
        i = int(sample.key[0])
        h, w = assign(*sample.image.size, buckets)
        assert i in cache.buckets[h//8, w//8]
        assert torch.allclose(cache.x0([i])[0], encode(load_vae(), np.asarray(fit_bucket(sample.image, (h, w)))[None])[0], atol=1e-2)
    assert sum(map(len, cache.buckets.values())) == 6 and sum(made["buckets"].values()) == 6
    assert cache.x0([5, 1]).shape == (2, 8, 6, 10)
    with pytest.raises(RecapError, match="not of one shape"): cache.x0([0, 1])
    assert json.loads(json.dumps(made))["shares"]["square"] > made["shares"]["cropped"]
