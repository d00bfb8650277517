"What 04_corpus cannot show on a page: real files, damaged files, processes."
import hashlib, io, json, os, shutil, subprocess, sys, tarfile, time
from pathlib import Path

import numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest
from PIL import Image

from recap.core import RecapError, project_root
from recap.corpus import CorpusConfig, index_tar, make_world, open_corpus, write_caption_table
from recap.formats import inspect_corpus, validate_corpus
from recap.pictures import BadImage, decode_image, to_rgb
from recap.world import facts_of, render, visible_scene

REAL = Path(os.environ["RECAP_REAL"]) if os.environ.get("RECAP_REAL") else None
real = pytest.mark.skipif(REAL is None, reason="RECAP_REAL names no folder of real files")
HOSTILE = ["", " ", "None", "<script>alert(1)</script>", "a\u2028b\x85c", "naïve 猫 🐈‍⬛", "=cmd()", 'she said "no", then\\left', "../../etc/passwd", "x" * 5000, "two\nlines\r\n"]


def png(size=(8, 6), colour=(200, 30, 30), mode="RGB", **kw):
    buf = io.BytesIO()
    Image.new(mode, size, colour).save(buf, "PNG", **kw)
    return buf.getvalue()


def tar_of(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def sample(key, text=None, data=None):
    return [(f"{key}.png", png() if data is None else data), (f"{key}.json", b"{}"), (f"{key}.txt", (text if text is not None else f"text of {key}").encode())]


def read_all(corpus, **kw):
    return [s for shard in corpus.shards for s in corpus.read_shard(shard, **kw)]


def tree(folder):
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"}


# --- real files

@real
def test_img2dataset_shards_as_they_come():
    corpus = open_corpus(REAL/"img2dataset")
    samples = read_all(corpus, threads=2)
    assert (corpus.kind, len(corpus.shards), corpus.size, len(samples)) == ("img2dataset", 4, 195, 195)
    assert {s.image.mode for s in samples} == {"RGB"} and not corpus.faults and not corpus.warnings
    told, given = corpus.captions("alt"), {}
    for shard in corpus.shards:
        given |= {(shard, r["key"]): r["caption"] or "" for r in pq.read_table(REAL/"img2dataset"/f"{shard}.parquet").to_pylist() if r["status"] == "success"}
    assert {k: v.encode() for k, v in told.items()} == {k: v.encode() for k, v in given.items()}
    assert sum(not t for t in told.values()) == 2
    assert {(s.shard, s.key): s.alt for s in samples} == told


@real
def test_img2dataset_without_parquet_and_stats(tmp_path):
    for t in (REAL/"img2dataset").glob("*.tar"): (tmp_path/t.name).write_bytes(t.read_bytes())
    bare, whole = open_corpus(tmp_path), open_corpus(REAL/"img2dataset")
    assert bare.captions("alt") == whole.captions("alt") and bare.size == 195


@real
def test_one_tar_is_a_corpus():
    assert open_corpus(REAL/"img2dataset"/"00003.tar").size == 6


@real
def test_files_that_break_loaders():
    corpus = open_corpus(REAL/"pillow-edge")
    samples = read_all(corpus)
    files = [p for p in (REAL/"pillow-edge").iterdir() if p.suffix in (".tif", ".png", ".gif", ".jpg", ".webp")]
    assert {s.key for s in samples} | {f.key for f in corpus.faults} == {p.name for p in files}
    assert len(samples) + len(corpus.faults) == len(files)
    assert {s.image.mode for s in samples} == {"RGB"}
    reasons = {f.key: f.reason for f in corpus.faults}
    assert reasons["truncated_jpeg.jpg"] == "truncated" and reasons["decompression_bomb.gif"] == "too large" and "broken.png" in reasons
    seen = {s.key: s.image for s in samples}
    upright = np.asarray(seen["hopper_orientation_6.jpg"])
    assert upright.shape == (128, 128, 3)
    deep = np.asarray(seen["16bit.cropped.tif"])
    assert set(np.unique(deep)) == {1, 2}   # values of 291 to 694 out of 65535: dark, as stored, and not burnt out


@real
def test_photographs_and_single_image():
    found = inspect_corpus(REAL/"skimage-photos")
    assert (found["kind"], found["images"], found["faults"]) == ("flat", 7, {})
    one = open_corpus(REAL/"skimage-photos"/"chelsea.png")
    keys, pixels = one.images(32)
    assert (one.kind, keys, pixels.shape) == ("image", [("00000", "chelsea.png")], (1, 32, 32, 3))


# --- single pictures

@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16"])
def test_any_mode_becomes_rgb(mode):
    im = to_rgb(Image.new(mode, (5, 4)))
    assert (im.mode, im.size) == ("RGB", (5, 4))


def test_sixteen_bits_keep_their_upper_eight():
    deep = Image.fromarray(np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16))
    buf = io.BytesIO(); deep.save(buf, "PNG")
    assert np.abs(np.asarray(decode_image(buf.getvalue()))[..., 0].ravel().astype(int) - np.arange(256)).max() <= 1


def test_alpha_over_white_and_palette_transparency():
    assert decode_image(png(mode="RGBA", colour=(0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 3)
    palette.putpalette([10, 20, 30]*8)
    buf = io.BytesIO(); palette.save(buf, "PNG", transparency=3)
    assert decode_image(buf.getvalue()).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_upright(orientation):
    upright = np.zeros((48, 64, 3), np.uint8)
    upright[:16, :16] = 255                                # a white corner, top left
    undo = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}[orientation]
    exif = Image.Exif(); exif[274] = orientation
    buf = io.BytesIO(); Image.fromarray(upright).transpose(undo).save(buf, "JPEG", quality=95, exif=exif)
    got = decode_image(buf.getvalue())
    assert got.size == (64, 48) and got.getpixel((4, 4))[0] > 240 and got.getpixel((60, 44))[0] < 15


@pytest.mark.parametrize("data, reason", [(b"", "empty file"), (b"\n <!DOCTYPE html><html>", "HTML page"), (b"hello", "not an image"), (png()[:50], "truncated"),
                                          (png((64, 64), mode="1", colour=1)[:-30], "truncated")])
def test_reasons(data, reason):
    with pytest.raises(BadImage) as e: decode_image(data)
    assert e.value.reason in (reason, "unreadable")


def test_bomb_is_refused_before_it_is_unpacked():
    import tracemalloc
    bomb = png((8900, 9100), mode="1", colour=0)
    tracemalloc.start()
    with pytest.raises(BadImage) as e: decode_image(bomb, 64)
    assert e.value.reason == "too large" and tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (3, 300)])
def test_odd_shapes(size):
    for fit in ("crop", "squash"): assert decode_image(png(size), 64, fit).size == (64, 64)


# --- shards

def test_no_byte_of_a_cut_tar_is_silent(tmp_path):
    tar_of(tmp_path/"00000.tar", sum((sample(k) for k in "abc"), []))
    whole = (tmp_path/"00000.tar").read_bytes()
    members, problems = index_tar(tmp_path/"00000.tar")
    assert list(members) == ["a", "b", "c"] and not problems
    end = max(o + n for parts in members.values() for o, n in parts.values())
    for cut in [0, 1, 300, 512, 700, *range(1024, end, 512), end]:
        (tmp_path/"00000.tar").write_bytes(whole[:cut])
        corpus = open_corpus(tmp_path)
        got = [s.key for s in read_all(corpus)]
        assert got == sorted(got) and set(got) <= set("abc")
        assert corpus.warnings and corpus.faults[0].reason == "damaged tar", cut


def test_empty_tar_does_not_stop_the_others(tmp_path):
    (tmp_path/"00000.tar").write_bytes(b""); tar_of(tmp_path/"00001.tar", sample("a"))
    corpus = open_corpus(tmp_path)
    assert [(s.shard, s.key) for s in read_all(corpus)] == [("00001", "a")]
    assert corpus.faults[0].shard == "00000" and "empty" in corpus.faults[0].detail


def test_scattered_doubled_and_dotted_members(tmp_path):
    a, b = sample("a"), sample("b")
    tar_of(tmp_path/"00000.tar", [a[0], b[0], a[1], b[2], a[2], b[1], ("a.png", png(colour=0)), ("22.05.png", png()), ("22.05.txt", b"x"), ("dir/c.PNG", png()), ("d.json", b"{}")])
    corpus = open_corpus(tmp_path)
    samples = read_all(corpus)
    assert [(s.key, s.alt) for s in samples[:2]] == [("a", "text of a"), ("b", "text of b")]
    assert [s.key for s in samples] == ["a", "b", "22", "dir/c"] and samples[0].image.getpixel((0, 0)) == (200, 30, 30)
    assert any("twice" in w for w in corpus.warnings)
    assert [(f.key, f.reason) for f in corpus.faults] == [("d", "no image in the sample")]


def test_same_key_in_two_shards_and_stats_that_disagree(tmp_path):
    for n in "01": tar_of(tmp_path/f"0000{n}.tar", sample("a", f"of shard {n}"))
    (tmp_path/"00001_stats.json").write_text('{"successes": 64}')
    corpus = open_corpus(tmp_path)
    assert corpus.captions() == {("00000", "a"): "of shard 0", ("00001", "a"): "of shard 1"}
    assert corpus.warnings == ["00001: the stats say 64 images, the tar has 1"]


def test_parquet_decides_and_may_be_broken(tmp_path):
    tar_of(tmp_path/"00000.tar", sample("a", "tar") + sample("b", "tar"))
    rows = [dict(key="a", caption="parquet", status="success"), dict(key="b", caption=None, status="success"), dict(key="c", caption="c", status="success"), dict(key="d", caption="d", status="failed_to_download")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path/"00000.parquet")
    corpus = open_corpus(tmp_path)
    assert list(corpus.captions().values()) == ["parquet", ""]
    assert [(f.key, f.reason) for f in corpus.faults] == [("c", "listed, not in the tar")]
    (tmp_path/"00000.parquet").write_bytes(b"PAR1 no")
    corpus = open_corpus(tmp_path)
    assert list(corpus.captions().values()) == ["tar", "tar"] and "cannot be read" in corpus.warnings[0]


def test_faults_do_not_depend_on_threads(tmp_path):
    tar_of(tmp_path/"00000.tar", sum((sample(f"{i:02d}", data=png() if i % 3 else b"<html>") for i in range(20)), []))
    one, many = open_corpus(tmp_path), open_corpus(tmp_path)
    assert [s.key for s in read_all(one)] == [s.key for s in read_all(many, threads=4, depth=3)]
    assert one.faults == many.faults and len(one.faults) == 7


# --- folders

def folder(tmp_path, **files):
    for name, data in files.items():
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return tmp_path


def test_imagefolder_is_checked_in_both_directions(tmp_path):
    lines = [json.dumps({"file_name": n, "text": t}, ensure_ascii=False) for n, t in (("a.png", HOSTILE[4]), ("./sub/b.png", "b"), ("gone.png", "g"))]
    folder(tmp_path, **{"a.png": png(), "sub/b.png": png(), "bare.png": png(), "metadata.jsonl": "\n".join(lines) + "\n"})
    corpus = open_corpus(tmp_path)
    assert corpus.kind == "imagefolder" and {k: v for (_, k), v in corpus.captions().items()} == {"a.png": HOSTILE[4], "bare.png": "", "sub/b.png": "b"}
    assert [(f.key, f.reason) for f in corpus.faults] == [("gone.png", "row without an image")]
    assert corpus.warnings == ["1 of 3 images have no text"]


def test_metadata_in_csv_parquet_and_misnamed(tmp_path):
    folder(tmp_path, **{"one/a.png": png(), "one/metadata.csv": "file_name,caption\r\na.png,from csv\r\n", "two/b.png": png(), "Metadata.json": "{}"})
    pq.write_table(pa.table({"file_name": ["b.png"], "text": ["from parquet"]}), tmp_path/"two"/"metadata.parquet")
    corpus = open_corpus(tmp_path)
    assert list(corpus.captions().values()) == ["from csv", "from parquet"] and "Metadata.json is not read" in corpus.warnings[0]
    (tmp_path/"one"/"metadata.csv").write_text("name,text\nx,y\n")
    with pytest.raises(RecapError, match="file_name"): open_corpus(tmp_path)


def test_a_bad_row_does_not_take_the_others_along(tmp_path):
    good = [json.dumps({"file_name": f"{k}.png", "text": f"of {k}"}) for k in "ab"]
    bad = ["{cut", '{"text": "no name"}', "[1, 2]", "null", "[" * 100_000, '{"file_name": null, "text": "x"}']
    folder(tmp_path, **{"a.png": png(), "b.png": png(), "metadata.jsonl": "\n".join([good[0], *bad, "", good[1]])})
    corpus = open_corpus(tmp_path)
    assert list(corpus.captions().values()) == ["of a", "of b"] and corpus.lost == {"unreadable row": len(bad)}
    assert [f.key for f in corpus.faults] == [f"metadata.jsonl line {i}" for i in range(2, 2 + len(bad))]
    found = validate_corpus(tmp_path)
    assert not found["ok"] and found["lost"] == {"unreadable row": len(bad)} and found["images"] == 2
    (tmp_path/"metadata.jsonl").write_text("\n".join(bad))
    with pytest.raises(RecapError, match="no row can be read.*line 1") as e: open_corpus(tmp_path)
    assert "\n" not in str(e.value)
    (tmp_path/"metadata.jsonl").unlink()
    (tmp_path/"metadata.csv").write_text(f"file_name,text\na.png,of a\n,nameless\nb.png,{'x'*200_000}\nb.png,of b\n")
    corpus = open_corpus(tmp_path)
    assert list(corpus.captions().values()) == ["of a", "of b"] and [f.key for f in corpus.faults] == ["metadata.csv line 3", "metadata.csv line 4"]


def test_sidecars(tmp_path):
    folder(tmp_path, **{"a.PNG": png(), "a.txt": b"\xef\xbb\xbfa cat\r\n", "b.jpeg": png(), "b.caption": "wrong suffix, right content", "c.webp": b"", ".hidden.png": png(), "notes.md": "x"})
    corpus = open_corpus(tmp_path)
    assert corpus.kind == "sidecar" and list(corpus.captions().values()) == ["a cat", "wrong suffix, right content", ""]
    assert [s.key for s in read_all(corpus)] == ["a.PNG", "b.jpeg"] and corpus.faults[0].reason == "empty file"


def test_names_and_texts_that_are_no_utf8(tmp_path):
    folder(tmp_path, **{"a.png": png(), "metadata.jsonl": json.dumps({"file_name": "a.png", "text": "half \ud83d"})})
    with open(os.fsencode(tmp_path) + b"/caf\xe9.png", "wb") as f: f.write(png())
    corpus = open_corpus(tmp_path)
    assert [(s.key, s.alt) for s in read_all(corpus)] == [("a.png", "half ?"), ("caf\\xe9.png", "")]
    corpus.write_captions("dsc", "00000", [dict(key=k, caption=c or "none") for (_, k), c in corpus.captions().items()])
    assert list(corpus.captions("dsc").values()) == ["half ?", "none"]


@pytest.mark.parametrize("code, odd", [("utf8", 0), ("utf-8-sig", 0), ("utf-16", 0), ("cp1252", 1), ("latin1", 1)])
def test_texts_in_other_encodings(tmp_path, code, odd):
    text = "café\x81" if code == "latin1" else "café “à la carte”" if code == "cp1252" else "café 猫"
    line = json.dumps({"file_name": "a.png", "text": text}, ensure_ascii=False)
    folder(tmp_path/"side", **{"a.png": png(), "a.txt": text.encode(code)})
    folder(tmp_path/"json", **{"a.png": png(), "metadata.jsonl": line.encode(code)})
    folder(tmp_path/"csv", **{"a.png": png(), "metadata.csv": f"file_name,text\r\na.png,{text}\r\n".encode(code)})
    (tmp_path/"tar").mkdir()
    tar_of(tmp_path/"tar"/"00000.tar", sample("a", "")[:1] + [("a.txt", text.encode(code)), ("b.png", png()), ("b.json", json.dumps({"caption": text}, ensure_ascii=False).encode(code))])
    for kind in ("side", "json", "csv", "tar"):
        corpus = open_corpus(tmp_path/kind)
        assert {t.removeprefix("\ufeff") for t in corpus.captions().values()} == {text}, kind
        found = validate_corpus(tmp_path/kind)
        assert len(found["warnings"]) == odd and found["ok"], kind
        if odd: assert {"side": "a.txt", "json": "metadata.jsonl line 1", "csv": "metadata.csv line 2", "tar": "2 texts"}[kind] in found["warnings"][0]


@pytest.mark.parametrize("make, said", [(lambda p: p/"nothing", "does not exist"), (lambda p: p, "no images")])
def test_nothing_to_read_is_one_line(tmp_path, make, said):
    with pytest.raises(RecapError, match=said) as e: open_corpus(make(tmp_path))
    assert "\n" not in str(e.value)


# --- columns

def test_hostile_captions_come_back(tmp_path):
    tar_of(tmp_path/"00000.tar", sum((sample(f"{i:03d}", t) for i, t in enumerate(HOSTILE)), []))
    corpus = open_corpus(tmp_path)
    assert list(corpus.captions().values()) == HOSTILE
    corpus.write_captions("dsc", "00000", [dict(key=f"{i:03d}", caption=t) for i, t in enumerate(HOSTILE)])
    assert list(corpus.captions("dsc").values()) == HOSTILE and corpus.styles() == ["alt", "dsc"]
    with pytest.raises(RecapError, match="no captions of style 'ssc'"): corpus.captions("ssc")
    with pytest.raises(RecapError, match="alt"): corpus.write_captions("alt", "00000", [])


def test_a_table_counts_only_for_the_pictures_it_was_made_from(tmp_path):
    folder(tmp_path, **{"a.png": png()})
    corpus = open_corpus(tmp_path)
    corpus.write_captions("dsc", "00000", [dict(key="a.png", caption="a")])
    assert corpus.has_captions("dsc", "00000")
    folder(tmp_path, **{"b.png": png((9, 9))})
    assert not open_corpus(tmp_path).has_captions("dsc", "00000")


def test_a_full_disk_leaves_the_old_table(tmp_path, monkeypatch):
    table = tmp_path/"dsc"/"00000.parquet"
    write_caption_table(table, [dict(key="a", caption="old")])
    before = table.read_bytes()
    def full(*a, **k): raise OSError(28, "No space left on device")
    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(RecapError, match="disk full"): write_caption_table(table, [dict(key="a", caption="new")])
    assert table.read_bytes() == before and [p.name for p in table.parent.iterdir()] == ["00000.parquet"]


# --- Sprite World

def test_workers_do_not_change_a_byte(tmp_path):
    cfg = dict(n=20, shard_size=6, size=32, truth_styles="ssc,dsc")
    one = make_world(CorpusConfig(**cfg), tmp_path/"one")
    two = make_world(CorpusConfig(**cfg, workers=2), tmp_path/"two")
    assert one == two and tree(tmp_path/"one") == tree(tmp_path/"two")
    corpus = open_corpus(tmp_path/"two")
    assert (corpus.size, len(corpus.shards), corpus.styles(), corpus.warnings) == (20, 4, ["alt", "dsc", "ssc"], [])
    truth = corpus.truth()
    assert list(truth) == list(corpus.captions()) and all(facts for _, facts in truth.values())
    make_world(CorpusConfig(**cfg | dict(seed=1)), tmp_path/"seed")
    assert tree(tmp_path/"seed")["00000.tar"] != tree(tmp_path/"one")["00000.tar"]


def test_pictures_show_what_was_drawn_and_words_what_can_be_seen(tmp_path):
    cfg = CorpusConfig(n=40, shard_size=25, size=48, width=72, world="whole", truth_styles="dsc", split="test")
    make_world(cfg, tmp_path)
    corpus = open_corpus(tmp_path)
    drawn, truth, hidden = corpus.drawn(), corpus.truth(), 0
    for shard in corpus.shards:
        assert corpus.truth(shard) == {k: t for k, t in truth.items() if k[0] == shard} and list(corpus.drawn(shard)) == list(corpus.captions("dsc", shard))
        for sample in corpus.read_shard(shard):
            scene, (seen, facts) = drawn[shard, sample.key], truth[shard, sample.key]
            assert sample.image.size == (72, 48) and sample.image.tobytes() == render(scene, 48, 72).tobytes()
            assert seen == visible_scene(scene, 48, 72) and facts == facts_of(seen)
            hidden += seen != scene
    assert len(truth) == 40 and hidden, "the whole world hides something at 48 pixels"
    assert make_world(cfg, tmp_path)["world"] == "whole"


def test_several_worlds_in_turn(tmp_path):
    make_world(CorpusConfig(n=12, size=32, world="easy,nouns=1+whole"), tmp_path)
    easy = [{t.noun for t in s.things} for s in open_corpus(tmp_path).drawn().values()]
    assert len(set().union(*easy[0::2])) == 1 < len(set().union(*easy[1::2]))


def test_the_worlds_version_knows_sprites_and_code(tmp_path, monkeypatch):
    import recap.corpus as c
    read, version = [], c.world_version()
    monkeypatch.setattr(c, "hash_file", lambda path, keep=c.hash_file: read.append(path.name) or keep(path))
    assert c.world_version() == version and {"world.py", "drawing.py", "language.py", "cat.svg"} <= set(read) and "core.py" not in read
    shutil.copytree(project_root()/"data"/"sprites", tmp_path/"data"/"sprites")
    monkeypatch.setattr(c, "project_root", lambda: tmp_path)
    assert c.world_version() == version
    with open(tmp_path/"data"/"sprites"/"cat.svg", "a") as f: f.write(" ")
    assert c.world_version() != version


def test_an_unfinished_world_is_finished(tmp_path):
    cfg = CorpusConfig(n=9, shard_size=3, size=32)
    make_world(cfg, tmp_path/"c")
    whole = tree(tmp_path/"c")
    for name in ("00001_stats.json", "00001.parquet", "00002_stats.json"): (tmp_path/"c"/name).unlink()
    (tmp_path/"c"/"00002.tar").write_bytes(b"half")
    kept = (tmp_path/"c"/"00000.tar").stat().st_mtime_ns
    make_world(cfg, tmp_path/"c")
    assert tree(tmp_path/"c") == whole and (tmp_path/"c"/"00000.tar").stat().st_mtime_ns == kept


def test_a_killed_world_leaves_nobody_writing(tmp_path):
    cfg = dict(n=30, shard_size=3, size=32, workers=2)
    code = "import sys; from pathlib import Path; from recap.corpus import CorpusConfig, make_world; make_world(CorpusConfig(**%r), sys.argv[1])" % cfg
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path/"c"], env=os.environ | {"PYTHONPATH": str(project_root())})
    deadline = time.time() + 60
    while not (tmp_path/"c"/"00001_stats.json").exists() and time.time() < deadline: time.sleep(.01)
    process.kill(); process.wait()
    time.sleep(.2)
    left = tree(tmp_path/"c")
    time.sleep(.5)
    assert tree(tmp_path/"c") == left
    make_world(CorpusConfig(**cfg | dict(workers=1)), tmp_path/"c")
    make_world(CorpusConfig(**cfg), tmp_path/"straight")
    assert tree(tmp_path/"c") == tree(tmp_path/"straight")


def test_other_settings_are_refused_or_start_over(tmp_path):
    make_world(CorpusConfig(n=4, size=32, truth_styles="dsc"), tmp_path/"c")
    with pytest.raises(RecapError, match="n 4 -> 3"): make_world(CorpusConfig(n=3, size=32, truth_styles="dsc"), tmp_path/"c")
    assert make_world(CorpusConfig(n=3, size=32), tmp_path/"c", overwrite=True)["captions"].keys() == {"alt"}
    tar_of(tmp_path/"00000.tar", sample("a"))
    with pytest.raises(RecapError, match="not made here"): make_world(CorpusConfig(n=3), tmp_path, overwrite=True)


@pytest.mark.parametrize("bad, said", [(dict(n=0), "n=0"), (dict(split="dev"), "dev"), (dict(truth_styles="haiku"), "haiku"), (dict(world="easy,nouns=999"), "nouns"), (dict(world="hard"), "hard"), (dict(workers=0), "workers"), (dict(width=3), "width=3 must be between 8 and 4096, or 0"), (dict(width=-1), "width=-1"), (dict(pictures=3), "pictures")])
def test_bad_settings_are_one_line(bad, said):
    with pytest.raises(RecapError, match=said) as e: CorpusConfig.from_dict(bad)
    assert "\n" not in str(e.value)
