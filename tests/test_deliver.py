"What 12b_deliver cannot show on a page: hostile captions in a browser, real photographs by one command, exports twice and in place, estimates against the truth, a key under the command."
import html
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from conftest import ROOT, borrow, one_line, recap

from recap.core import RecapError
from recap.corpus import open_corpus
from recap.deliver import (EXPORTS, deliver, estimate, estimate_text, export_captions, mean_interval, merge_texts, pick_pictures,
                           quality, remarks, write_sheet)
from recap.relabel import relabel
from test_faults import HOSTILE

REAL = Path(os.environ.get("RECAP_REAL") or "/none")/"skimage-photos"
KEY = f"sk-{os.urandom(16).hex()}"


class Says:
    "A captioner that says what it is told, in turn."
    def __init__(self, texts, flags=None): self.texts, self.flags, self.n = texts, flags or {}, 0
    name, hash = "says", "1"
    def caption_rows(self, images):
        rows = [dict(caption=self.texts[(self.n + i) % len(self.texts)], flags=self.flags.get(self.n + i, ""), tokens=3) for i in range(len(images))]
        self.n += len(images)
        return rows


def folder(path, texts, suffix="png"):
    "Pictures, each of its own colour, with sidecars."
    path.mkdir(parents=True)
    for i, t in enumerate(texts):
        Image.new("RGB", (24, 16), (7*i % 256, 3*i % 256, 99)).save(path/f"{i:03d}.{suffix}")
        if t is not None: (path/f"{i:03d}.txt").write_text(t)
    return path


def sidecars(path): return {p.stem: p.read_bytes() for p in sorted(path.glob("*.txt"))}
def pictures(path): return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.suffix in (".png", ".jpg", ".tar", ".parquet") and "captions" not in p.parts}


# --- quality

def test_counts_of_a_known_column(tmp_path):
    texts = ["one two", "one two", "one two three four", "", "a b c d e f", "kept as it was"]
    src = folder(tmp_path/"in", ["x", None, "y z", "w", "v", "kept  as it\nwas"])
    relabel(src, Says(texts, {3: "refusal,apology", 4: "cut"}), ["dsc"], tmp_path/"out")
    q = quality(open_corpus(src, tmp_path/"out"/"captions"), ["dsc"])["dsc"]
    assert (q["n"], q["empty"], q["repeated"], q["copied"], q["flagged"], q["flags"]) == (6, 1, 1, 1, 2, {"refusal": 1, "apology": 1, "cut": 1})
    assert q["words"] == [2, 4, 4, 6]                        # of 2 2 4 4 6: the 0th, 2nd and 3rd, and the most


def test_what_could_not_be_read_has_a_reason(tmp_path):
    src = folder(tmp_path/"in", ["a", "b", "c"])
    (src/"003.jpg").write_text("<html>"); (src/"004.png").write_bytes((src/"000.png").read_bytes()[:60])
    relabel(src, Says(["some text here"]), ["dsc"], tmp_path/"out")
    q = quality(open_corpus(src, tmp_path/"out"/"captions"), ["dsc"])["dsc"]
    assert q["n"] == 3 and sum(q["failures"].values()) == 2 and q["failures"]["HTML page"] == 1


def test_37_loops_and_apologies_are_told_with_their_rate(tmp_path):
    from recap.captioners import CaptionMaker
    class Bad(CaptionMaker):
        name = "bad"
        def write(self, images, style, max_len): return [dict(caption="I'm sorry, but I can't describe this." if i % 5 == 0 else "a cat " * 9 if i % 5 == 1 else f"a good caption of picture {i}") for i, _ in enumerate(images)]
    src = folder(tmp_path/"in", [None]*10)
    relabel(src, Bad(), ["dsc"], tmp_path/"out")
    found = quality(open_corpus(src, tmp_path/"out"/"captions"), ["dsc"])
    assert found["dsc"]["flags"] == {"refusal": 2, "apology": 2, "loop": 2} and any(r.startswith("dsc: 40% of the captions were flagged") for r in remarks(found))


def test_a_column_that_another_tool_wrote(tmp_path):
    src = folder(tmp_path/"in", ["a", "b"])
    import pyarrow as pa
    (tmp_path/"c"/"dsc").mkdir(parents=True)
    pq.write_table(pa.table({"key": ["000.png", "001.png"], "caption": ["new a", None]}), tmp_path/"c"/"dsc"/"00000.parquet")
    corpus = open_corpus(src, tmp_path/"c")
    assert quality(corpus, ["dsc"])["dsc"]["empty"] == 1 and len(pick_pictures(corpus, ["dsc"])) == 2
    write_sheet(corpus, ["dsc"], tmp_path/"s.html")
    assert export_captions(corpus, "dsc", "kohya", tmp_path/"k")["pictures"] == 2 and sidecars(tmp_path/"k") == {"000": b"new a", "001": b"b"}


def test_what_a_manifest_remembers(tmp_path):
    import importlib.metadata
    src = folder(tmp_path/"in", ["a", "b"]); (src/"002.jpg").write_text("<html>")
    told = relabel(src, Says(["x", ""]), ["dsc"], tmp_path/"out")["dsc"]
    kept = open_corpus(src, tmp_path/"out"/"captions").manifest("dsc")
    versions = kept.pop("versions")
    assert kept == told and (kept["captioner"], kept["images"], kept["empty"], kept["failures"], kept["complete"]) == ({"name": "says", "hash": "1"}, 2, 1, {"HTML page": 1}, True)
    assert {"recap", "torch", "transformers", "open_clip_torch"} <= set(versions) and versions["torch"] == importlib.metadata.version("torch")


# --- the sheet

class Page(HTMLParser):
    "What a parser makes of a page."
    def __init__(self, text):
        super().__init__(); self.tags, self.attributes, self.texts, self.bdi = [], [], [], 0
        self.feed(text)
    def handle_starttag(self, tag, attrs): self.tags.append(tag); self.attributes += attrs; self.bdi += tag == "bdi"
    def handle_endtag(self, tag): self.bdi -= tag == "bdi"
    def handle_data(self, data):
        if self.bdi: self.texts.append(data)


def test_19_hostile_captions_stay_text(tmp_path):
    worst = [*HOSTILE, "</bdi></p></div><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "&lt;b&gt; &amp;amp;", "]]><!-- -->", "' onmouseover='x"]
    src = folder(tmp_path/"in", [None]*len(worst))
    for i, t in enumerate(worst): (src/f"{i:03d}.txt").write_text(t, newline="")
    relabel(src, Says(worst), ["dsc"], tmp_path/"out")
    corpus = open_corpus(src, tmp_path/"out"/"captions")
    text = write_sheet(corpus, ["dsc"], tmp_path/"sheet.html", n=99).read_text()
    page = Page(text)
    assert "script" not in page.tags and not [a for a in page.attributes if a[0].startswith("on") or a[0] == "href"] and page.tags.count("img") == len(worst)
    assert all(v.startswith("data:image/") for k, v in page.attributes if k == "src") and "\u202e" not in text and "\x00" not in text
    plain = lambda t: "".join(c if c.isprintable() or c == "\u200d" else "\N{REPLACEMENT CHARACTER}" for c in " ".join(t.replace("\ufeff", "").split()))
    shown = set(page.texts)
    assert {plain(t) for t in corpus.captions("dsc").values() if t} <= shown


@pytest.mark.skipif(not Path("/usr/bin/chromium").exists() or importlib.util.find_spec("playwright") is None, reason="no chromium or playwright")
@pytest.mark.slow
def test_the_sheet_in_a_browser(tmp_path):
    from playwright.sync_api import sync_playwright
    src = folder(tmp_path/"in", ["old"]*5)
    relabel(src, Says(["猫がいる。", "<script>document.title='owned'</script>", "w"*500, "\u202eevil", "fine"]), ["dsc"], tmp_path/"out")
    path = write_sheet(open_corpus(src, tmp_path/"out"/"captions"), ["dsc"], tmp_path/"sheet.html")
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"])
        page, faults = browser.new_page(viewport=dict(width=390, height=800)), []
        page.on("console", lambda m: faults.append(m.text)); page.on("pageerror", lambda e: faults.append(str(e)))
        page.goto(path.as_uri())
        assert page.title() == "in" and page.locator(".card").count() == 5 and faults == []
        assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")          # nothing runs out of a telephone
        browser.close()


def test_which_pictures_come_on_a_sheet(tmp_path):
    src = folder(tmp_path/"in", [None]*60)
    relabel(src, Says([f"text {i}" for i in range(60)], {i: "cut" for i in range(0, 60, 3)}), ["dsc"], tmp_path/"out")
    corpus = open_corpus(src, tmp_path/"out"/"captions")
    got = [int(k[:3]) for _, k in pick_pictures(corpus, ["dsc"], 12)]
    assert [i % 3 == 0 for i in got] == [True]*4 + [False]*8 and len(set(got)) == 12
    assert len({k for seed in range(40) for _, k in pick_pictures(corpus, ["dsc"], 12, seed)}) == 60       # everything has its chance


# --- estimates

@pytest.mark.parametrize("k", [3, 4, 6, 20])
def test_the_interval_is_students(k):
    stats = pytest.importorskip("scipy.stats")
    x = np.random.default_rng(k).normal(5, 2, k)
    low, high = stats.t.interval(.95, k - 1, x.mean(), stats.sem(x))
    assert mean_interval([*x])[0] == pytest.approx(x.mean()) and mean_interval([*x])[1] == pytest.approx((high - low)/2, rel=.035)


class Slow(Says):
    "Takes the same time for every picture."
    def caption_rows(self, images): time.sleep(.004*len(images)); return super().caption_rows(images)


def test_an_estimate_and_what_came_of_it(tmp_path):
    src = folder(tmp_path/"in", ["old"]*300)
    texts = [" ".join(["word"]*(5 + i % 9)) + f" {i}" for i in range(300)]
    before = pictures(tmp_path)
    told = estimate(src, Slow(texts), ["dsc"], out=tmp_path/"out", sample=65)
    assert not (tmp_path/"out").exists() and pictures(tmp_path) == before
    assert (told["images"], told["todo"], told["sampled"]) == (300, {"dsc": 300}, 65) and told["tokens"][1] == pytest.approx(900)
    assert told["seconds"][1] >= 300*.004                                                   # cannot be quicker
    assert estimate(src, Slow(texts), ["dsc"], sample=65, engine="ray", workers=4)["seconds"][1] < told["seconds"][1]*.75
    relabel(src, Slow(texts), ["dsc"], tmp_path/"out")
    size = sum(p.stat().st_size for p in (tmp_path/"out").rglob("*.parquet"))
    assert size/2 < told["bytes"] < size*2
    (tmp_path/"out"/"captions"/"dsc"/"00001.parquet").unlink()
    assert estimate(src, Slow(texts), ["dsc"], out=tmp_path/"out", sample=9)["todo"] == {"dsc": 44}


def test_money_estimated_and_paid(tmp_path):
    pytest.importorskip("openai")
    from recap.servers import Loopback, ServerConfig
    from recap.captioners import ServerCaptioner
    src = folder(tmp_path/"in", [None]*120)
    with Loopback(lambda body, n: " ".join(f"word{i}" for i in range(4 + n*7 % 11))) as server:
        where = lambda cache: ServerConfig(server.url, "toy", cache=str(tmp_path/cache), price_in=3., price_out=15., tokens_per_minute=10**6)
        told = estimate(src, where("kept"), ["dsc"], out=tmp_path/"out", sample=41)
        assert not (tmp_path/"out").exists() and len(server.requests) == 41
        maker = ServerCaptioner(where("kept"))
        relabel(src, maker, ["dsc"], tmp_path/"out")
        assert len(server.requests) == 120 and maker.server.spent["kept"] == 41             # the dry run's replies are not paid for twice
        paid = (10*120*3 + 15*sum(len(t.split()) for t in open_corpus(src, tmp_path/"out"/"captions").captions("dsc").values()))/1e6
        assert told["money"][0] <= paid <= told["money"][2] and told["money"][2] < 1.5*told["money"][0]
        assert "money" in estimate_text(told) and estimate_text(told).endswith("nothing was written")
        with pytest.raises(RecapError, match="another with --seed"): estimate(src, where("kept"), ["dsc"], sample=41)
        limited = estimate(src, ServerConfig(server.url, "toy", cache="", per_minute=1200), ["dsc"], sample=9)
    assert limited["seconds"][1] >= 120/1200*60


def test_estimates_that_cannot_be_made(tmp_path):
    src = folder(tmp_path/"in", [None]*4)
    for i in range(4): (src/f"{i:03d}.png").write_text("<html>")
    with pytest.raises(RecapError, match="0 can be read"): estimate(src, Says(["x"]), ["dsc"])
    two = folder(tmp_path/"two", [None]*3)
    assert estimate(two, Says(["x"]), ["dsc"])["seconds"][0] is None and "too small a sample" in estimate_text(estimate(two, Says(["x"]), ["dsc"]))


# --- exports

@pytest.mark.parametrize("policy, wanted", [("overwrite", ["A new one.", "A new one.", "old c"]), ("append", ["old a, A new one.", "A new one.", "old c"]),
                                            ("prepend", ["A new one. old a", "A new one.", "old c"]), ("skip", ["old a", "A new one.", "old c"])])
def test_policies_twice_and_in_place(tmp_path, policy, wanted):
    src = folder(tmp_path/"in", ["\ufeffold a\r\n", None, "old c", None])
    relabel(src, Says(["A new one.", "A new one.", "", ""], {2: "refusal", 3: "refusal"}), ["dsc"], tmp_path/"out")
    before, corpus = pictures(src), lambda: open_corpus(src, tmp_path/"out"/"captions")
    wanted = {f"{i:03d}": w.encode() for i, w in enumerate(wanted)}                        # no caption, no text: no file
    for _ in range(2):
        export_captions(corpus(), "dsc", "kohya", tmp_path/"k", policy)
        assert sidecars(tmp_path/"k") == wanted and pictures(tmp_path/"k") == before
    assert (tmp_path/"k"/"000.png").stat().st_ino != (src/"000.png").stat().st_ino         # a copy: whoever shrinks it does not shrink the original
    for _ in range(2):
        export_captions(corpus(), "dsc", "kohya", src, policy)
        assert sidecars(src) == (wanted if policy != "skip" else wanted | {"000": "\ufeffold a\r\n".encode()}) and pictures(src) == before
    (src/"001.txt").write_text("by hand")
    export_captions(corpus(), "dsc", "kohya", src, policy)
    assert (src/"001.txt").read_text() == merge_texts("by hand", "A new one.", policy)
    export_captions(corpus(), "dsc", "kohya", src, "append")
    assert (src/"000.txt").read_text() == "old a, A new one." and (src/"001.txt").read_text() == "by hand, A new one."


def test_every_text_file_is_one_line_of_utf8(tmp_path):
    src = folder(tmp_path/"in", [None]*len(HOSTILE))
    relabel(src, Says(HOSTILE), ["dsc"], tmp_path/"out")
    export_captions(src, "dsc", "kohya", tmp_path/"k", captions_dir=tmp_path/"out"/"captions")
    for name, data in sidecars(tmp_path/"k").items(): assert data.decode("utf8").strip() and b"\n" not in data and b"\r" not in data and not data.startswith(b"\xef\xbb\xbf"), name
    assert len(sidecars(tmp_path/"k")) == sum(bool(" ".join(t.replace("\ufeff", "").split())) for t in HOSTILE)


def test_kohya_of_shards_with_odd_keys(tmp_path):
    from test_faults import parts, shard
    shard(tmp_path/"in", [*parts("one/a"), *parts("naïve 猫"), *parts("same")], "00000")
    shard(tmp_path/"in", [*parts("same"), *parts("../out")], "00001")
    relabel(tmp_path/"in", Says(["first", "second", "third", "fourth", "fifth"]), ["dsc"], tmp_path/"out")
    export_captions(tmp_path/"in", "dsc", "kohya", tmp_path/"k"/"deep", captions_dir=tmp_path/"out"/"captions")
    texts = {p.relative_to(tmp_path/"k"/"deep").with_suffix("").as_posix(): p.read_text() for p in (tmp_path/"k").rglob("*.txt")}
    assert sorted(texts.values()) == sorted(["first", "second", "third", "fourth", "fifth"]) and all((tmp_path/"k"/"deep"/f"{n}.png").exists() for n in texts)
    assert {"one/a", "naïve 猫", "same", "same-00001"} <= set(texts)


def test_two_pictures_of_one_name(tmp_path):
    src = folder(tmp_path/"in", [None])
    Image.new("RGB", (9, 9)).save(src/"000.jpg")
    relabel(src, Says(["of the jpg", "of the png"]), ["dsc"], tmp_path/"out")
    export_captions(src, "dsc", "kohya", tmp_path/"k", captions_dir=tmp_path/"out"/"captions")
    assert sidecars(tmp_path/"k") == {"000": b"of the jpg", "000-png": b"of the png"} and (tmp_path/"k"/"000-png.png").exists()


def test_exports_as_others_read_them(tmp_path):
    src = folder(tmp_path/"in", ["old a", "old b", "old c", None])
    relabel(src, Says(["new a", "new b", "", "new d"]), ["ssc", "dsc"], tmp_path/"out")
    corpus = open_corpus(src, tmp_path/"out"/"captions")
    corpus_texts = {k: t for (_, k), t in corpus.captions("dsc").items()}
    export_captions(corpus, ["ssc", "dsc"], "imagefolder", tmp_path/"hf")
    rows = {r["file_name"]: r for r in map(json.loads, open(tmp_path/"hf"/"metadata.jsonl"))}
    assert {n: r["text"] for n, r in rows.items()} == {n: t or {"002.png": "old c"}.get(n, "old b" if n == "001.png" else "old a" if n == "000.png" else "") for n, t in corpus_texts.items()}
    assert rows["000.png"]["original"] == "old a" and set(rows["000.png"]) == {"file_name", "text", "ssc", "dsc", "original"}
    if importlib.util.find_spec("datasets"):
        from datasets import load_dataset
        read = load_dataset("imagefolder", data_dir=str(tmp_path/"hf"), split="train", cache_dir=str(tmp_path/"cache"))
        assert sorted(read["text"]) == sorted(r["text"] for r in rows.values()) and len(read) == 4
    export_captions(corpus, ["ssc", "dsc"], "parquet", tmp_path/"all.parquet")
    table = pq.read_table(tmp_path/"all.parquet").to_pandas()
    assert list(table.columns) == ["shard", "key", "original", "ssc", "ssc_flags", "dsc", "dsc_flags"] and dict(zip(table["key"], table["dsc"])) == corpus_texts
    export_captions(corpus, ["ssc", "dsc"], "open_clip", tmp_path/"oc")
    import tarfile
    with tarfile.open(tmp_path/"oc"/"00000.tar") as tar: told = [json.loads(tar.extractfile(m).read()) for m in tar if m.name.endswith(".json")]
    assert [t["dsc"] for t in told] == list(corpus_texts.values()) and [t["alt"] for t in told] == ["old a", "old b", "old c", ""]


def test_exports_that_cannot_be(tmp_path):
    src = folder(tmp_path/"in", ["a"])
    relabel(src, Says(["x"]), ["dsc"], tmp_path/"out")
    corpus = open_corpus(src, tmp_path/"out"/"captions")
    for to in EXPORTS[:3]:
        with pytest.raises(RecapError, match="lies in the folder"): export_captions(corpus, "dsc", to, src/"inside")
    with pytest.raises(RecapError, match="one export"): deliver(corpus, "dsc", tmp_path/"out", exports="kohya,parquet", export_out=tmp_path/"x")
    assert sorted(p.name for p in src.iterdir()) == ["000.png", "000.txt"]


# --- the command

@pytest.fixture(scope="module")
def root(tmp_path_factory): return borrow(tmp_path_factory.mktemp("command"))


needs_weights = pytest.mark.skipif(not (ROOT/"data/foundation/captioner").is_dir(), reason="foundation weights missing: captioner")


@needs_weights
@pytest.mark.skipif(not REAL.is_dir(), reason="RECAP_REAL has no skimage-photos")
def test_from_photographs_to_kohya_in_one_command(root, tmp_path, record_property):
    before, began = {p.name: p.read_bytes() for p in REAL.iterdir()}, time.perf_counter()
    done = recap(root, "relabel", REAL, "--out", tmp_path/"out", "--export", "kohya", "--json")
    record_property("seconds", round(time.perf_counter() - began, 1))
    print(f"photographs to kohya: {time.perf_counter() - began:.1f} s")
    assert done.returncode == 0, done.stderr
    told, names = json.loads(done.stdout), {n for n in before if n.endswith((".png", ".jpg"))}
    k = tmp_path/"out"/"kohya"
    assert told["exports"]["kohya"]["texts"] == told["images"] == len(names) == 7 and {p.name for p in REAL.iterdir()} == set(before)
    assert {n: (k/n).read_bytes() for n in names} == {n: before[n] for n in names}
    assert {Path(n).stem for n in names} == {p.stem for p in k.glob("*.txt")} and all(t and b"\n" not in t for t in sidecars(k).values())
    page = Page((tmp_path/"out"/"sheet.html").read_text())
    assert page.tags.count("img") == 7 and told["sheet"] == str(tmp_path/"out"/"sheet.html")


def test_the_command_with_a_server(root, tmp_path):
    pytest.importorskip("openai")
    from recap.servers import Loopback
    src = folder(tmp_path/"in", ["old"]*9)
    with Loopback(lambda body, n: f"a new caption, number {n}") as server:
        where = f"{server.url}?cache={tmp_path}/kept&price_in=1&price_out=2&concurrency=1#toy"
        dry = recap(root, "relabel", src, "--styles", "ssc,dsc", "--out", tmp_path/"out", "--captioner", where, "--dry-run", "--sample", 5)
        assert dry.returncode == 0 and "9 pictures to caption (9 in ssc, 9 in dsc)" in dry.stdout and "money" in dry.stdout and not (tmp_path/"out").exists(), dry.stderr
        assert len(server.requests) == 10
        done = recap(root, "relabel", src, "--styles", "ssc", "--style", "dsc", "--out", tmp_path/"out", "--captioner", where, "--export", "kohya,parquet", "--policy", "append")
        assert done.returncode == 0 and len(server.requests) == 18, done.stderr
        assert "8 calls" in done.stdout and "money" in done.stdout and "sheet: " in done.stdout and "captions.parquet" in done.stdout
        assert all(t.startswith(b"old, a new caption") for t in sidecars(tmp_path/"out"/"kohya").values())
        told = recap(root, "corpus", "convert", src, "--to", "kohya", "--out", tmp_path/"k", "--relabelled", tmp_path/"out", "--style", "ssc", "--policy", "prepend")
        assert told.returncode == 0 and all(t.endswith(b", old") for t in sidecars(tmp_path/"k").values()), told.stderr
        before = len(server.requests)
        broke = recap(root, "relabel", src, "--style", "own", "--out", tmp_path/"out2", "--captioner", where)
        one_line(broke, "data/prompts/captions/own.txt")
        for wrong in (["--export", "kohia"], ["--policy", "replace", "--export", "kohya"], ["--sheet", tmp_path/"x.png"], ["--export", "kohya,parquet", "--export-out", tmp_path/"x"], ["--engine", "spark"], ["--export", "kohya", "--export-out", src/"inside"]):
            bad = recap(root, "relabel", src, "--out", tmp_path/"out3", "--captioner", where, *wrong)
            assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and not (tmp_path/"out3").exists(), (wrong, bad.stderr)
        assert len(server.requests) == before


def test_38_no_key_under_the_command(root, tmp_path):
    "A server that repeats the key in whatever it says: the key is in no line, no traceback, no file."
    pytest.importorskip("openai")
    from recap.servers import Loopback
    src = folder(tmp_path/"in", [None]*3)
    answers = {"401": lambda n: (401, {}, json.dumps({"error": {"message": f"bad key {KEY}"}}).encode()), "500": lambda n: (500, {}, KEY.encode()),
               "400": lambda n: (400, {}, json.dumps({"error": {"message": KEY}}).encode()), "page": lambda n: (200, {}, f"<html>{KEY}".encode())}
    for name, answer in answers.items():
        with Loopback(lambda body, n: answer(n)) as server:
            done = recap(root, "relabel", src, "--out", tmp_path/name, "--captioner", f"{server.url}?retries=0&cache={tmp_path}/kept&concurrency=1#toy", RECAP_API_KEY=KEY, RECAP_DEBUG="1")
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
        said = done.stdout + done.stderr
        assert KEY not in said and KEY[3:] not in said and (done.returncode == 1) == (name == "401"), (name, said)
        for path in [*(tmp_path/name).rglob("*"), *(tmp_path/"kept").rglob("*")]: assert path.is_dir() or KEY.encode() not in path.read_bytes(), path
    one_line(recap(root, "relabel", src, "--out", tmp_path/"x", "--captioner", f"http://me:{KEY}@127.0.0.1:1/v1#toy"), "a password in the address")


def test_33_to_35_under_the_command(tmp_path, capsys):
    "Stops with a line and goes on from there; a web page never becomes a caption."
    pytest.importorskip("openai")
    from recap.command import run_command
    from recap.servers import Loopback
    src, state = folder(tmp_path/"in", [None]*6), dict(bad=None)
    with Loopback(lambda body, n: state["bad"] if state["bad"] and n % 3 == 2 else f"caption number {n}") as server:
        def run(out, cache):
            code = run_command(["relabel", str(src), "--out", str(tmp_path/out), "--captioner", f"{server.url}?retries=0&cache={tmp_path}/{cache}&concurrency=1#toy"])
            return code or 0, *capsys.readouterr()
        state["bad"] = 429, {"Retry-After": "300"}, b'{"error": {"message": "later"}}'
        code, _, said = run("o33", "k33")
        assert code == 1 and said.count("\n") == 1 and "asks to wait 300 s" in said
        assert not [*(tmp_path/"o33").rglob("*.parquet")]
        asked, state["bad"] = len(server.requests), None
        assert run("o33", "k33")[0] == 0 and len(server.requests) - asked == 4                 # two were answered before
        for name, bad in (("o34", (500, {}, b"oh")), ("o35", (200, {"Content-Type": "text/html"}, b"<html>Welcome"))):
            state["bad"] = bad
            server.requests.clear()
            code, said, _ = run(name, name + "k")
            assert code == 0 and "no answer from the captioner: 2" in said, said
            texts = open_corpus(src, tmp_path/name/"captions").captions("dsc")
            assert sum(not t for t in texts.values()) == 2 and not any("html" in t for t in texts.values())
            state["bad"] = None
            assert run(name, name + "k")[0] == 0 and len(server.requests) == 8 and all(open_corpus(src, tmp_path/name/"captions").captions("dsc").values())


# --- a real server

@pytest.mark.slow
@pytest.mark.skipif(any(importlib.util.find_spec(m) is None for m in ("fastapi", "uvicorn")), reason="transformers serve needs fastapi and uvicorn: pip install -e '.[dev]'")
def test_relabel_through_transformers_serve(root, tmp_path):
    "The whole command against an OpenAI-compatible server with a tiny random model: the same captions as the model writes in this process."
    from test_captioners import make_llava
    import torch
    torch.manual_seed(0)
    model, processor = make_llava(tmp_path/"llava")
    model.save_pretrained(tmp_path/"llava"); processor.save_pretrained(tmp_path/"llava")
    src = folder(tmp_path/"in", ["old"]*4)
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    (tmp_path/"hub").mkdir()
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path/"hub"), "OMP_NUM_THREADS": "1"}
    log = open(tmp_path/"log", "w")
    process = subprocess.Popen([os.path.join(os.path.dirname(sys.executable), "transformers"), "serve", str(tmp_path/"llava"), "--device", "cpu", "--port", str(port)], env=env, stdout=log, stderr=log)
    try:
        deadline = time.time() + 240
        while True:
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5); break
            except OSError: assert process.poll() is None and time.time() < deadline, (tmp_path/"log").read_text()[-3000:]; time.sleep(.5)
        where = f"http://127.0.0.1:{port}/v1?max_tokens=9&timeout=300&price_in=1&price_out=1&max_money=1&cache={tmp_path}/kept#{tmp_path/'llava'}"
        done = recap(root, "relabel", src, "--styles", "ssc,dsc", "--out", tmp_path/"out", "--captioner", where, "--export", "parquet", "--json")
        assert done.returncode == 0, done.stderr
    finally: process.terminate(); process.wait(30)
    told = json.loads(done.stdout)
    spent = told["spent"]["dsc"]
    assert spent["calls"] == 8 and told["images"] == 4 and 0 < spent["money"] == pytest.approx(spent["tokens"]/1e6)
    from recap.captioners import TransformersCaptioner
    table = pq.read_table(tmp_path/"out"/"parquet"/"captions.parquet").to_pylist()
    here = TransformersCaptioner(tmp_path/"llava", device="cpu")
    for style in ("ssc", "dsc"):
        rows = here.caption_rows([Image.open(src/r["key"]) for r in table], style, max_len=9)
        assert [r[f"{style}_flags"].split(",")[0] for r in table] == [r["flags"].split(",")[0] for r in rows] and [r[style] for r in table] == [r["caption"] for r in rows]
