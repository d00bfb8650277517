"Corpora in and out: round trips with any text, kills, other people's readers, checks in both directions."
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st
from PIL import Image

from recap.core import RecapError, project_root
from recap.corpus import Corpus, Source, one_line, open_corpus
from recap.formats import TARGETS, clean_key, clip_tokens, convert_corpus, inspect_corpus, validate_corpus
from test_faults import HOSTILE, files, parts, picture, shard

REAL = Path(os.environ["RECAP_REAL"]) if os.environ.get("RECAP_REAL") else None
real = pytest.mark.skipif(REAL is None, reason="RECAP_REAL names no folder of real files")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch): monkeypatch.setattr(os, "fsync", lambda file: None)   # thousands of small files; a kill does not need it


class Given(Corpus):
    "A corpus with any keys and texts, over picture files on disk."
    kind = "given"

    def __init__(self, folder, shards, dsc):
        super().__init__(folder)
        self.folder, self._shards, self._dsc = folder, shards, dsc
        self.shards, self.size = list(shards), sum(map(len, shards.values()))

    def sources(self, shard): return self._shards[shard]
    def shard_hash(self, shard): return "given"
    def inside_styles(self): return ["dsc"]
    def inside(self, style, shard): return {s.key: self._dsc[shard, s.key] for s in self.sources(shard)}


def given_corpus(home, rows):
    "rows: (key, alt, dsc), the first three in one shard, the others in a second one; pictures of three formats."
    home.mkdir()
    paths = [files(home, **{f"p{i}": picture(colour=(40*i, 90, 30), format=f)})/f"p{i}" for i, f in enumerate(("PNG", "JPEG", "WEBP"))]
    shards, dsc = {"00000": [], "00001": []}, {}
    for i, (key, alt, long) in enumerate(rows):
        name = "00000" if i < 3 else "00001"
        shards[name].append(Source(key, paths[i % 3], 0, -1, alt))
        dsc[name, key] = long
    return Given(home, shards, dsc)


def content(corpus, styles=("alt", "dsc")):
    "(texts..., bytes) by key, in order."
    told = {s: corpus.captions(s) for s in styles}
    return [((sh, s.key), tuple(told[x].get((sh, s.key), "") for x in styles), s.read()) for sh in corpus.shards for s in corpus.sources(sh)]


def source_keys(out, corpus):
    "The keys of a converted corpus before they were cleaned, as far as they were."
    renamed = {}
    if (out/"keys.jsonl").exists():
        for line in (out/"keys.jsonl").read_text(encoding="utf8").split("\n")[:-1]:
            row = json.loads(line)
            assert row["key"] not in renamed
            renamed[row["key"]] = row["source_key"]
    tar = corpus.kind == "img2dataset"
    return [renamed.get(k, k if tar else os.path.splitext(k)[0]) for (_, k), *_ in content(corpus, ("alt",))]


ROWS = st.lists(st.tuples(st.text(max_size=30), st.text(max_size=60), st.text(max_size=60)), min_size=1, max_size=6, unique_by=lambda r: r[0])
often = settings(max_examples=int(os.environ.get("RECAP_EXAMPLES", 30)), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


# --- round trips

@pytest.mark.parametrize("to", TARGETS)
@often
@given(rows=ROWS)
@example(rows=[(f"k{i}", t, t) for i, t in enumerate(HOSTILE[:6])])
@example(rows=[(f"k{i}", t, t) for i, t in enumerate(HOSTILE[6:])])
@example(rows=[(k, k, k) for k in ("../x", "..", "a/../../b", "a", "A", "22.05", "22_05", "n\x00l", "x"*300, "猫"*60, "con.", " lead")])
@example(rows=[(k, k, k) for k in ("a.png", "a.jpg", "a", "captions/x", "metadata", "__hidden", ".dot", "metadata.jsonl", "keys.jsonl")])
@example(rows=[(k, k, k) for k in ("", "0", "PNG", "jpg")])   # a name that reads like a suffix is a name
def test_any_key_and_any_text_comes_back(to, rows):
    with tempfile.TemporaryDirectory() as home, contextlib.redirect_stderr(io.StringIO()):
        home = Path(home)
        corpus = given_corpus(home/"in", rows)
        done = convert_corpus(corpus, to, home/"out"/to, shard_size=2, styles="alt" if to == "sidecar" else "")
        new = open_corpus(home/"out"/to)
        assert (done["images"], done["skipped"], new.size) == (len(rows), {}, len(rows)) and not new.faults
        assert {p.name for p in home.iterdir()} == {"in", "out"} and [p.name for p in (home/"out").iterdir()] == [to]
        styles = ("alt",) if to == "sidecar" else ("alt", "dsc")
        norm = one_line if to == "sidecar" else str
        wanted = sorted((k, tuple(norm(t) for t in texts[:len(styles)]), s) for (k, *texts), (_, _, s) in zip(rows, content(corpus)))
        got = sorted((k, *c[1:]) for k, c in zip(source_keys(home/"out"/to, new), content(new, styles)))
        # a folder's file `a.png` was the key `a.png` or `a`: compare without a picture's suffix
        bare = lambda c: [(k.removesuffix(".png").removesuffix(".jpg"), *rest) for k, *rest in c]
        assert sorted(bare(got)) == sorted(bare(wanted))


@often
@given(rows=ROWS)
def test_three_conventions_in_a_row_change_nothing(rows):
    with tempfile.TemporaryDirectory() as home:
        home = Path(home)
        rows = [(clean_key(k), alt, dsc) for k, alt, dsc in rows]
        convert_corpus(given_corpus(home/"in", rows), "webdataset", home/"a", shard_size=2)
        convert_corpus(home/"a", "imagefolder", home/"b", shard_size=3)
        convert_corpus(home/"b", "open_clip", home/"c", shard_size=2)
        one, two = open_corpus(home/"a"), open_corpus(home/"c")
        assert sorted((k, *rest) for (_, k), *rest in content(one)) == sorted((k, *rest) for (_, k), *rest in content(two))
        assert not (home/"b"/"keys.jsonl").exists() or len({k.casefold() for k, *_ in rows}) < len(rows)


@often
@given(text=st.text(max_size=80), most=st.integers(20, 200), dots=st.booleans())
@example(text="../" * 40, most=60, dots=True)
def test_a_clean_key_stays_where_it_is_put(text, most, dots):
    key = clean_key(text, dots, most)
    assert key and len(key.encode()) <= most and clean_key(key, dots, most) == key
    assert not key.startswith(("/", ".")) and ".." not in key.split("/") and "\\" not in key and "\0" not in key
    assert dots or "." not in key.rpartition("/")[2]
    assert Path("/x", key).resolve().is_relative_to("/x")


@given(text=st.text())
@often
def test_one_line_is_one_line_and_stays(text):
    line = one_line(text)
    assert len(line.splitlines()) <= 1 and line == one_line(line) == line.strip() and "\ufeff" not in line
    assert line.split() == text.replace("\ufeff", "").split()


# --- what other readers make of it

def test_webdataset_reads_what_we_write(tmp_path):
    wds = pytest.importorskip("webdataset")
    corpus = given_corpus(tmp_path/"in", [(f"{i}", t, t[::-1]) for i, t in enumerate(HOSTILE)])
    convert_corpus(corpus, "open_clip", tmp_path/"out", styles="alt,dsc", shard_size=5)
    tars = sorted(map(str, (tmp_path/"out").glob("*.tar")))
    got = list(wds.WebDataset(tars, shardshuffle=False))
    assert [s["__key__"] for s in got] == [str(i) for i in range(len(HOSTILE))] and [s["txt"].decode() for s in got] == HOSTILE
    for sample, text in zip(got, HOSTILE):
        told = json.loads(sample["json"])
        assert (told["alt"], told["dsc"]) == (text, text[::-1])                 # --json-text-key "dsc;alt"
        assert Image.open(io.BytesIO(next(sample[s] for s in ("png", "jpg", "webp") if s in sample))).size == (40, 24)


def test_what_open_clip_would_drop_is_told(tmp_path):
    files(tmp_path/"in", **{f"{f}.{s}": picture(format=f) for f, s in (("PNG", "png"), ("GIF", "jpg"), ("TIFF", "tif"), ("BMP", "bmp"))}, **{"g2.gif": picture(format="GIF")})
    done = convert_corpus(tmp_path/"in", "open_clip", tmp_path/"out", shard_size=2)
    assert done["images"] == 5 and done["warnings"] == ["open_clip reads png, jpg, jpeg, webp and drops the rest in silence: 2 gif, 1 bmp, 1 tif"]
    assert convert_corpus(tmp_path/"in", "open_clip", tmp_path/"out", shard_size=2) == done
    assert convert_corpus(tmp_path/"in", "webdataset", tmp_path/"tars")["warnings"] == []


def test_tables_and_stats_are_img2datasets(tmp_path):
    files(tmp_path/"in", **{"a.png": picture(), "b.jpg": b"<html>", "c.webp": picture(format="WEBP"), "a.txt": "of a"})
    done = convert_corpus(tmp_path/"in", "webdataset", tmp_path/"out")
    rows = pq.read_table(tmp_path/"out"/"00000.parquet").to_pylist()
    assert [(r["key"], r["status"], r["error_message"], r["caption"], r["width"]) for r in rows] == [
        ("a", "success", None, "of a", 40), ("b", "failed_to_decode", "HTML page", "", 0), ("c", "success", None, "", 40)]
    stats = json.loads((tmp_path/"out"/"00000_stats.json").read_text())
    assert (stats["count"], stats["successes"], stats["status_dict"]) == (3, 2, {"success": 2, "failed_to_decode": 1})
    assert done["skipped"] == {"HTML page": 1} and json.loads((tmp_path/"out"/"quarantine.jsonl").read_text())["key"] == "b.jpg"
    new = open_corpus(tmp_path/"out")
    assert new.size == 2 and not new.faults and not new.warnings and validate_corpus(new)["ok"]
    if REAL:
        names = set(pq.read_schema(REAL/"img2dataset"/"00000.parquet").names)
        assert names <= set(pq.read_schema(tmp_path/"out"/"00000.parquet").names)


@real
def test_img2dataset_shards_through_every_convention(tmp_path):
    source = open_corpus(REAL/"img2dataset")
    texts, data = sorted(source.captions().values()), sorted(s.read() for sh in source.shards for s in source.sources(sh))
    at = REAL/"img2dataset"
    for to in ("imagefolder", "webdataset", "open_clip"):
        done = convert_corpus(at, to, tmp_path/to, shard_size=70)
        new = open_corpus(at := tmp_path/to)
        assert (done["images"], done["skipped"], new.size) == (195, {}, 195)
        assert sorted(new.captions().values()) == texts and sorted(s.read() for sh in new.shards for s in new.sources(sh)) == data
    done = convert_corpus(at, "sidecar", tmp_path/"sidecar")
    assert done["empty"] == sum(not one_line(t) for t in texts) and sorted(open_corpus(tmp_path/"sidecar").captions().values()) == sorted(map(one_line, texts))
    url = next(r for r in pq.read_table(REAL/"img2dataset"/"00000.parquet").to_pylist() if r["status"] == "success")
    convert_corpus(REAL/"img2dataset", "webdataset", tmp_path/"direct")
    assert next(r for r in pq.read_table(tmp_path/"direct"/"00000.parquet").to_pylist() if r["key"] == url["key"])["url"] == url["url"]


@real
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc")
def test_files_that_break_loaders_stay_under_a_gigabyte(tmp_path):
    code = ("import sys, json; from recap.formats import *; found = inspect_corpus(sys.argv[1]); c = convert_corpus(sys.argv[1], 'webdataset', sys.argv[2]); "
            "v = validate_corpus(sys.argv[1], sys.argv[2] + '/q.jsonl'); "
            "print(json.dumps([found['images'], c['images'], v['images'], next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM'))/2**20]))")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, REAL/"pillow-edge", tmp_path/"out"], capture_output=True, text=True)
    *counts, gigabytes = json.loads(done.stdout)
    files = [p.name for p in (REAL/"pillow-edge").iterdir() if not p.name.startswith("LICENSE")]
    listed = [json.loads(line)["key"] for line in (tmp_path/"out"/"q.jsonl").read_text().splitlines()]
    assert counts == [len(files) - len(listed)]*3 and gigabytes < 1 and set(listed) < set(files)


# --- several captions an image

def test_an_imagefolder_may_hold_several_captions(tmp_path):
    rows = [{"file_name": "a.png", "text": ["one", "two"], "dsc": "long a", "score": 3, "tags": ["x"]}, {"file_name": "b.png", "text": "only", "dsc": ""},
            {"file_name": "b.png", "text": "again"}, {"file_name": "a.png", "text": "three"}, {"file_name": "b.png", "text": "again"}]
    files(tmp_path/"hf", **{"a.png": picture(), "b.png": picture(), "metadata.jsonl": "\n".join(map(json.dumps, rows))})
    corpus = open_corpus(tmp_path/"hf")
    assert corpus.styles() == ["alt", "alt_2", "alt_3", "dsc", "tags"]
    told = {s: {k: t for (_, k), t in corpus.captions(s).items()} for s in corpus.styles()}
    assert told["alt"] == {"a.png": "one", "b.png": "only"} and told["alt_2"] == {"a.png": "two", "b.png": "again"} and told["alt_3"] == {"a.png": "three"}
    assert told["dsc"] == {"a.png": "long a", "b.png": ""}
    corpus.write_captions("dsc", "00000", [dict(key="a.png", caption="ours")])           # a table of ours comes first
    assert corpus.captions("dsc") == {("00000", "a.png"): "ours"}
    convert_corpus(corpus, "webdataset", tmp_path/"out", "alt,alt_2")
    assert open_corpus(tmp_path/"out").captions("alt_2") == {("00000", "a"): "two", ("00000", "b"): "again"}


def test_numbers_in_a_csv_are_no_captions(tmp_path):
    files(tmp_path, **{"a.png": picture(), "metadata.csv": "file_name,text,width,dsc\na.png,1984,512,a long one\n"})
    corpus = open_corpus(tmp_path)
    assert corpus.styles() == ["alt", "dsc"] and list(corpus.captions().values()) == ["1984"]


def test_which_text_goes_where_only_one_can(tmp_path):
    corpus = given_corpus(tmp_path/"in", [("k", "the alt", "the dsc")])
    for style, text in (("", "the alt"), ("dsc", "the dsc")):
        convert_corpus(corpus, "sidecar", tmp_path/f"side{style}", style)
        assert (tmp_path/f"side{style}"/"k.txt").read_text() == text
    convert_corpus(corpus, "imagefolder", tmp_path/"hf", "dsc")
    assert json.loads((tmp_path/"hf"/"metadata.jsonl").read_text()) == {"file_name": "k.png", "text": "the dsc"}
    convert_corpus(corpus, "imagefolder", tmp_path/"both", "dsc,alt")
    assert json.loads((tmp_path/"both"/"metadata.jsonl").read_text()) == {"file_name": "k.png", "text": "the alt", "dsc": "the dsc"}


# --- refusals, kills

@pytest.mark.parametrize("change, said", [(dict(to="parquet"), "unknown format 'parquet'"), (dict(styles="dcs"), "did you mean 'dsc'"), (dict(to="sidecar", styles="alt,dsc"), "one caption"),
                                          (dict(shard_size=0), "shard_size"), (dict(out="in/new"), "never changed"), (dict(out="in"), "never changed"), (dict(out="full"), "not empty"),
                                          (dict(out="file"), "is a file"), (dict(out="begun", to="imagefolder"), "to webdataset -> imagefolder"), (dict(out="begun", styles="alt"), "styles")])
def test_refused_in_one_line(tmp_path, change, said):
    corpus = given_corpus(tmp_path/"in", [("k", "alt", "dsc")])
    files(tmp_path/"full", other="x"); (tmp_path/"file").write_text("")
    convert_corpus(corpus, "webdataset", tmp_path/"begun")
    what = dict(to="webdataset", out="out", styles="", shard_size=10) | change
    with pytest.raises(RecapError, match=said) as e: convert_corpus(corpus, what["to"], tmp_path/what["out"], what["styles"], what["shard_size"])
    assert "\n" not in str(e.value) and not (tmp_path/"out").exists() or not any((tmp_path/"out").glob("*"))


def test_a_finished_conversion_is_not_done_again(tmp_path):
    corpus = given_corpus(tmp_path/"in", [(f"{i}", "alt", "dsc") for i in range(5)])
    first = convert_corpus(corpus, "imagefolder", tmp_path/"out", shard_size=2)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path/"out").rglob("*") if p.name != ".lock"}
    assert convert_corpus(corpus, "imagefolder", tmp_path/"out", shard_size=2) == first
    assert {p: p.stat().st_mtime_ns for p in (tmp_path/"out").rglob("*") if p.name != ".lock"} == before
    corpus._dsc["00000", "0"] = "another text"
    with pytest.raises(RecapError, match="source"): convert_corpus(corpus, "imagefolder", tmp_path/"out", shard_size=2)


@pytest.mark.parametrize("to", TARGETS)
def test_a_corpus_without_a_picture_that_can_be_read(tmp_path, to):
    files(tmp_path/"in", **{"a.png": b"<html>", "b.jpg": b"", "c.png": b"<html>", "a.txt": "of a"})
    (tmp_path/"in"/"d.png").symlink_to(tmp_path/"nowhere")
    corpus = open_corpus(tmp_path/"in")
    corpus.write_captions("dsc", "00000", [dict(key="a.png", caption="ours")])
    for _ in range(2):
        with pytest.raises(RecapError, match=r"no picture can be read \(2 HTML page, 1 empty file, 1 unreadable\)") as e: convert_corpus(tmp_path/"in", to, tmp_path/"out", shard_size=3)
        assert e.value.code == 1 and [p.name for p in (tmp_path/"out").rglob("*")] in ([], [".lock"])
    (tmp_path/"in"/"b.jpg").write_bytes(picture())
    assert convert_corpus(tmp_path/"in", to, tmp_path/"out")["images"] == 1


def tree(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"}


@pytest.mark.parametrize("to", ["webdataset", "imagefolder"])
def test_a_killed_conversion_goes_on(tmp_path, to, kills=3):
    texts = [t for t in HOSTILE if "\x00" not in t]
    files(tmp_path/"in", **{f"{i:03d}.png": picture(colour=(i, 0, 0), size=(200, 200)) for i in range(120)}, **{f"{i:03d}.txt": texts[i % len(texts)] for i in range(120)})
    (tmp_path/"in"/"050.png").write_bytes(b"")
    convert_corpus(tmp_path/"in", to, tmp_path/"straight", shard_size=10)
    many = len(tree(tmp_path/"straight"))
    code = "import sys; from recap.formats import convert_corpus; convert_corpus(sys.argv[1], sys.argv[2], sys.argv[3], shard_size=10)"
    env, count = os.environ | {"PYTHONPATH": str(project_root())}, lambda: sum(len(fs) for _, _, fs in os.walk(tmp_path/"out"))
    for kill in range(1, kills + 1):
        process, wanted = subprocess.Popen([sys.executable, "-c", code, tmp_path/"in", to, tmp_path/"out"], env=env), many*kill//(kills + 1)
        while count() < wanted and process.poll() is None: time.sleep(.001)
        process.kill(); process.wait()
    convert_corpus(tmp_path/"in", to, tmp_path/"out", shard_size=10)
    assert tree(tmp_path/"out") == tree(tmp_path/"straight")
    assert not [n for n in tree(tmp_path/"out") if n.endswith(".tmp")]


@pytest.mark.slow
@pytest.mark.parametrize("to", ["webdataset", "imagefolder"])
def test_many_kills(tmp_path, to): test_a_killed_conversion_goes_on(tmp_path, to, kills=25)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    corpus = given_corpus(tmp_path/"in", [(f"{i}", "alt", "dsc") for i in range(5)])
    def full(*a): raise OSError(28, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(os, "replace", full)
        with pytest.raises(RecapError, match="No space|disk full"): convert_corpus(corpus, "imagefolder", tmp_path/"out")
    assert convert_corpus(corpus, "imagefolder", tmp_path/"out")["images"] == 5


# --- checks

def reasons(path, **kw):
    found = validate_corpus(path, **kw)
    listed = [json.loads(line) for line in Path(found["quarantine"]).read_text().splitlines()] if found["quarantine"] else []
    assert sum(found["lost"].values()) == len(listed) and found["ok"] == (not listed)
    return {(r["shard"], r["key"]): r["reason"] for r in listed}


def test_imagefolders_are_checked_in_both_directions(tmp_path):
    rows = "\n".join(json.dumps({"file_name": n, "text": "t"}) for n in ("a.png", "gone.png", "sub/b.png"))
    files(tmp_path, **{"a.png": picture(), "bare.png": picture(), "sub/b.png": picture(), "metadata.jsonl": rows})
    assert reasons(tmp_path) == {("", "gone.png"): "row without an image", ("", "bare.png"): "image without a row"}


@pytest.mark.parametrize("name", ["metadata.json", "Metadata.jsonl", "METADATA.csv"])
def test_a_misnamed_metadata_file(tmp_path, name):
    files(tmp_path, **{"a.png": picture(), name: '{"file_name": "a.png", "text": "lost"}'})
    assert reasons(tmp_path) == {("", name): "metadata file of the wrong name"}
    assert name in validate_corpus(tmp_path)["warnings"][0]


def test_columns_are_matched_with_the_pictures(tmp_path):
    for n in "01": shard(tmp_path, parts("a") + parts("b"), f"0000{n}")
    corpus = open_corpus(tmp_path)
    corpus.write_captions("dsc", "00000", [dict(key="a", caption="x"), dict(key="gone", caption="y")])
    found = validate_corpus(tmp_path)
    assert found["ok"] and found["quarantine"] is None and sorted(found["warnings"]) == ["column dsc: 1 captions without a picture", "column dsc: 3 pictures without a caption"]
    (tmp_path/"captions"/"dsc"/"00001.parquet").write_bytes(b"PAR1 no")
    assert reasons(tmp_path) == {("00001", ""): "unreadable captions"}
    with pytest.raises(RecapError, match="00001.parquet cannot be read"): corpus.captions("dsc")


def test_the_quarantine_file(tmp_path):
    files(tmp_path/"in", **{"a.png": picture(), "b.png": b"<html>"})
    assert reasons(tmp_path/"in", quarantine=tmp_path/"else.jsonl") == {("00000", "b.png"): "HTML page"} and not (tmp_path/"in"/"validate.jsonl").exists()
    assert reasons(tmp_path/"in") == {("00000", "b.png"): "HTML page"}
    (tmp_path/"in"/"b.png").write_bytes(picture())
    assert reasons(tmp_path/"in") == {} and (tmp_path/"in"/"validate.jsonl").read_text() == ""


def test_what_convert_left_out_stays_on_record(tmp_path):
    files(tmp_path/"in", **{"a.png": picture(), "b.png": b"<html>"})
    for to in ("webdataset", "imagefolder"):
        convert_corpus(tmp_path/"in", to, tmp_path/to)
        record = (tmp_path/to/"quarantine.jsonl").read_bytes()
        assert reasons(tmp_path/to) == {} and b"b.png" in record
        (tmp_path/to/"more.jpg").write_bytes(b"")
        validate_corpus(tmp_path/to)
        assert (tmp_path/to/"quarantine.jsonl").read_bytes() == record


def test_a_corpus_that_cannot_be_written_to(tmp_path, monkeypatch):
    import recap.formats as f
    files(tmp_path/"in", **{"a.png": b""})
    @contextlib.contextmanager
    def refuse(path, mode): raise RecapError(f"cannot write {path}"); yield
    monkeypatch.setattr(f, "atomic_write", refuse)
    found = validate_corpus(tmp_path/"in")
    assert (found["ok"], found["quarantine"], found["lost"]) == (False, None, {"empty file": 1}) and "--quarantine" in found["warnings"][-1]
    with pytest.raises(RecapError, match="cannot write"): validate_corpus(tmp_path/"in", tmp_path/"q.jsonl")


def test_more_faults_than_are_remembered(tmp_path):
    files(tmp_path, **{f"{i:03d}.jpg": b"" for i in range(50)}, ok=picture())
    corpus = open_corpus(tmp_path)
    corpus.keep = 10
    found = validate_corpus(corpus)
    assert len(corpus.faults) == 10 and found["lost"] == {"empty file": 50} and len(Path(found["quarantine"]).read_text().splitlines()) == 50


# --- a look inside

def test_inspect_counts(tmp_path):
    texts = ["a cat", "a cat", "a cat", "", " ", "a dog on a very long walk", "word " * 100]
    shard(tmp_path, sum((parts(f"{i}", t) for i, t in enumerate(texts)), []) + [("bad.jpg", b"x")])
    corpus = open_corpus(tmp_path)
    corpus.write_captions("dsc", "00000", [dict(key="0", caption="only one")])
    found = inspect_corpus(tmp_path, sheet=tmp_path/"sheet.png")
    alt = found["captions"]["alt"]
    assert (found["images"], found["faults"], found["formats"], found["width"]) == (7, {"not an image": 1}, {"png": 7}, [40]*4)
    assert (alt["n"], alt["empty"], alt["repeated"], alt["common"]) == (8, 3, 2, ["3 x a cat"]) and alt["words"] == [2, 2, 7, 100]
    assert alt["longest"].startswith("word word") and (alt["over_77_tokens"] in (None, .2)) and found["captions"]["dsc"]["n"] == 1
    with Image.open(tmp_path/"sheet.png") as sheet: assert sheet.size > (400, 200)
    again = tmp_path/"again.png"
    inspect_corpus(tmp_path, sheet=again)
    assert again.read_bytes() == (tmp_path/"sheet.png").read_bytes()


def test_clip_tokens_are_never_underestimated():
    pytest.importorskip("open_clip")
    from open_clip.tokenizer import SimpleTokenizer
    tok = SimpleTokenizer()
    for text in (*HOSTILE, "猫" * 25, "猫" * 30, "word " * 20, "Ünïcödé " * 9):
        real = len(tok.encode(text)) + 2
        assert (clip_tokens(text) > 77) == (real > 77), text[:20]


def test_nothing_to_show_is_one_line(tmp_path):
    files(tmp_path, **{"a.jpg": b"<html>"})
    assert inspect_corpus(tmp_path)["images"] == 0
    with pytest.raises(RecapError, match="no picture can be read"): inspect_corpus(tmp_path, sheet=tmp_path/"s.png")
