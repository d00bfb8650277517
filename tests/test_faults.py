"""The fault matrix of CONVENTIONS, rows 1 to 20: one function a row, over files that it makes itself. Nothing is lost without a name and a reason.

Rows 21 and up belong to the pages they happen in. What these rows cannot make is read from outside, in test_corpus.py and test_formats.py."""
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from recap.corpus import open_corpus
from recap.formats import convert_corpus, validate_corpus
from recap.pictures import BadImage, decode_image

HOSTILE = ["", " ", "None", "null", "<script>alert(1)</script>", "a\u2028b\x85c", "naïve 猫 🐈‍⬛", "=cmd()", 'she said "no", then\\left', "../../etc/passwd", "x"*5000,
           "two\nlines\r\n", "\ufeffmark", "tab\tand\x00nul", "%s {0} $HOME", "\u202eright to left"]
ROWS = {}


def row(number, fault):
    "Register the test of a row."
    def keep(test):
        ROWS[number] = (fault, test)
        return test
    return keep


def picture(mode="RGB", size=(40, 24), colour=None, format="PNG", **kw):
    "The bytes of a picture of one colour."
    out = io.BytesIO()
    im = mode if isinstance(mode, Image.Image) else Image.new(mode, size, (200, 30, 30) if mode == "RGB" and colour is None else colour or 0)
    im.save(out, format, **kw)
    return out.getvalue()


def parts(key, text=None, data=None):
    "The three files of a sample."
    return [(f"{key}.png", picture() if data is None else data), (f"{key}.json", b"{}"), (f"{key}.txt", (f"text of {key}" if text is None else text).encode())]


def shard(folder, files, name="00000"):
    "Write a tar of (name, bytes) pairs."
    folder.mkdir(exist_ok=True, parents=True)
    with tarfile.open(folder/f"{name}.tar", "w") as tar:
        for n, data in files:
            info = tarfile.TarInfo(n)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return folder/f"{name}.tar"


def samples(keys): return sum((parts(k) for k in keys), [])


def read(path):
    "The corpus, (shard, key) of each sample that could be read, and reasons of the rest by (shard, key)."
    corpus = open_corpus(path)
    found = [(s.shard, s.key) for sh in corpus.shards for s in corpus.read_shard(sh, 32, threads=2)]
    return corpus, found, {(f.shard, f.key): f.reason for f in corpus.faults}


def files(folder, **named):
    folder.mkdir(exist_ok=True, parents=True)
    for name, data in named.items():
        (folder/name).parent.mkdir(exist_ok=True, parents=True)
        (folder/name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


# --- shards

@row(1, "tar cut in the middle of a member")
def _(home):
    tar = shard(home, samples("abc"))
    with tarfile.open(tar) as t: last = [m for m in t if m.name == "c.png"][0]
    tar.write_bytes(tar.read_bytes()[:last.offset_data + last.size//2])
    corpus, found, faults = read(home)
    assert [k for _, k in found] == ["a", "b"] and faults == {("00000", ""): "damaged tar"}
    assert corpus.warnings == ["00000: the tar is cut; 2 samples are whole"]


@row(2, "tar cut at a header")
def _(home):
    tar = shard(home, samples("abc"))
    with tarfile.open(tar) as t: starts = [m.offset for m in t]
    whole = tar.read_bytes()
    for start in starts[1:]:
        tar.write_bytes(whole[:start])
        corpus, found, faults = read(home)
        assert faults[("00000", "")] == "damaged tar" and corpus.lost["damaged tar"] == 1 and len(found) >= starts.index(start)//3
    assert not validate_corpus(home)["ok"]


@row(3, "zero-byte tar")
def _(home):
    (home/"00000.tar").write_bytes(b"")
    shard(home, samples("a"), "00001")
    corpus, found, faults = read(home)
    assert found == [("00001", "a")] and faults == {("00000", ""): "damaged tar"} and "empty" in corpus.warnings[0]


@row(4, "stats say 64, the tar has 60")
def _(home):
    shard(home, samples([f"{i:03d}" for i in range(60)]))
    (home/"00000_stats.json").write_text('{"successes": 64}')
    corpus, found, _ = read(home)
    assert len(found) == 60 and corpus.warnings == ["00000: the stats say 64 images, the tar has 60"]


@row(5, "no parquet or stats")
def _(home):
    shard(home, samples("ab") + [("c.png", picture()), ("c.json", b'{"caption": "from the json"}'), ("d.png", picture())])
    corpus, found, faults = read(home)
    assert len(found) == 4 and not faults and not corpus.warnings
    assert [t for _, t in corpus.captions().items()] == ["text of a", "text of b", "from the json", ""]


@row(6, "a sample's members interleaved with others")
def _(home):
    a, b = parts("a"), parts("b")
    shard(home, [a[0], b[2], b[0], a[1], a[2], b[1]])
    corpus, found, faults = read(home)
    assert [k for _, k in found] == ["a", "b"] and not faults and list(corpus.captions().values()) == ["text of a", "text of b"]


@row(7, "duplicate key in a shard")
def _(home):
    shard(home, parts("a") + parts("b") + parts("a", "another", picture(colour=(0, 0, 0))))
    corpus, found, faults = read(home)
    assert [k for _, k in found] == ["a", "b"] and not faults
    assert corpus.warnings == ["00000: 1 samples stand twice, the first is used (a); 2 samples are whole"]
    assert corpus.captions()["00000", "a"] == "text of a"


@row(8, "the same key in two shards")
def _(home):
    for n in "01": shard(home/"in", parts("a", f"of shard {n}"), f"0000{n}")
    corpus, found, _ = read(home/"in")
    assert found == [("00000", "a"), ("00001", "a")] and list(corpus.captions().values()) == ["of shard 0", "of shard 1"]
    for to in ("webdataset", "imagefolder", "sidecar"):
        convert_corpus(home/"in", to, home/to)
        new = open_corpus(home/to)
        assert new.size == 2 and sorted(new.captions().values()) == ["of shard 0", "of shard 1"], to


@row(9, "dotted, unicode, very long or ../ keys")
def _(home):
    keys = ["22.05", "naïve 猫 🐈‍⬛", "../../etc/passwd", "/abs", "a/b/c", "x"*90, "-rf", "CON", "con"]
    shard(home/"in", sum(([(f"{k}.png", picture()), (f"{k}.txt", f"text of {k}".encode())] for k in keys), []))
    corpus, found, faults = read(home/"in")
    assert [k for _, k in found][:2] == ["22", "naïve 猫 🐈‍⬛"] and len(found) == len(keys) and not faults   # webdataset's rule: the first dot
    for to in ("webdataset", "imagefolder", "sidecar"):
        before = sorted(os.walk(home.parent))
        convert_corpus(home/"in", to, home/"out"/to)
        new, _, bad = read(home/"out"/to)
        assert sorted(new.captions().values()) == sorted(corpus.captions().values()) and not bad, to
        strayed = {os.path.join(d, f) for d, _, fs in os.walk(home.parent) for f in fs} - {os.path.join(d, f) for d, _, fs in before for f in fs}
        assert all(f.startswith(str(home/"out")) for f in strayed)
        renamed = {json.loads(line)["source_key"] for line in (home/"out"/to/"keys.jsonl").read_text().splitlines()}
        assert "../../etc/passwd" in renamed and not renamed & {"a/b/c", "-rf", "naïve 猫 🐈‍⬛"}


@row(10, "caption missing, empty or null")
def _(home):
    shard(home/"tar", parts("a", "") + parts("b", "of b")[:2] + parts("c", "kept"))
    pq.write_table(pa.table({"key": ["a", "b", "c"], "caption": ["", None, "kept"], "status": ["success"]*3}), home/"tar"/"00000.parquet")
    corpus, found, _ = read(home/"tar")
    assert len(found) == 3 and list(corpus.captions().values()) == ["", "", "kept"]     # policy: kept, with an empty text
    from recap.formats import inspect_corpus
    assert inspect_corpus(home/"tar")["captions"]["alt"]["empty"] == 2                  # and counted
    lines = [{"file_name": "a.png", "text": None}, {"file_name": "b.png"}, {"file_name": "c.png", "text": "kept"}]
    hf = files(home/"hf", **{f"{k}.png": picture() for k in "abcd"}, **{"metadata.jsonl": "\n".join(map(json.dumps, lines))})
    corpus = open_corpus(hf)
    assert list(corpus.captions().values()) == ["", "", "kept", ""] and corpus.warnings == ["1 of 4 images have no text"]


# --- pictures

@row(11, "zero-byte or HTML file named .jpg")
def _(home):
    files(home, **{"a.jpg": b"", "b.jpg": b"\n <!DOCTYPE html><html>404", "c.jpg": picture(), "d.jpg": b"\xef\xbb\xbf<html>", "e.jpg": b"error 503"})
    corpus, found, faults = read(home)
    assert [k for _, k in found] == ["c.jpg"] and [faults["00000", f"{k}.jpg"] for k in "abde"] == ["empty file", "HTML page", "HTML page", "not an image"]
    assert corpus.lost == {"empty file": 1, "HTML page": 2, "not an image": 1}


@row(12, "truncated JPEG or PNG")
def _(home):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    whole = {f: picture(noise, format=f) for f in ("JPEG", "PNG")}
    files(home, **{f"{f}{share}": whole[f][:int(len(whole[f])*share)] for f in whole for share in (.2, .5, .9, .99)}, good=whole["PNG"])
    corpus, found, faults = read(home)
    assert [k for _, k in found] == ["good"] and len(faults) == 8 and set(faults.values()) <= {"truncated", "unreadable", "not an image"}


@row(13, "CMYK, L, LA, palette + transparency, 16-bit, 1-bit, LAB")
def _(home):
    for mode in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16"):
        for format in ("PNG", "TIFF", "JPEG", "WEBP"):
            try: data = picture(mode, format=format); Image.open(io.BytesIO(data)).load()
            except (OSError, KeyError, ValueError): continue      # a mode that the format has not
            got = decode_image(data, 16)
            assert (got.mode, got.size, np.asarray(got).dtype) == ("RGB", (16, 16), np.uint8), (mode, format)
    clear = picture("RGBA", colour=(0, 0, 0, 0))
    assert decode_image(clear).getpixel((0, 0)) == (255, 255, 255)              # alpha over white
    palette = Image.new("P", (4, 4), 3); palette.putpalette([10, 20, 30]*8)
    assert decode_image(picture(palette, transparency=3)).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.full((4, 4), 32768, np.uint16))
    assert decode_image(picture(deep)).getpixel((0, 0)) == (127, 127, 127)      # not clipped to white


@row(14, "EXIF orientation 2-8")
def _(home):
    upright = np.zeros((48, 64, 3), np.uint8)
    upright[:16, :16] = 255                     # a white corner, top left
    T = Image.Transpose
    stored = {1: None, 2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE, 6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270}
    for orientation, undo in stored.items():
        for format in ("JPEG", "PNG", "WEBP"):
            exif = Image.Exif(); exif[274] = orientation
            im = Image.fromarray(upright)
            data = picture(im if undo is None else im.transpose(undo), format=format, exif=exif)
            got = decode_image(data)
            assert got.size == (64, 48) and got.getpixel((4, 4))[0] > 240 and got.getpixel((60, 44))[0] < 15, (orientation, format)
            small = decode_image(data, 24)      # a small version is turned too
            assert small.size == (24, 24) and decode_image(data, 32, "inside").size == (32, 24)


@row(15, "GIF, WEBP, APNG, MPO")
def _(home):
    frames = [Image.new("RGB", (32, 32), c) for c in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    for format in ("GIF", "WEBP", "PNG", "MPO"):
        data = picture(frames[0], format=format, save_all=True, append_images=frames[1:], **({"lossless": True} if format == "WEBP" else {}))
        r, g, b = decode_image(data).getpixel((8, 8))
        assert r > 240 and g < 15 and b < 15, format           # the first frame


@row(16, "wrong or upper-case extension")
def _(home):
    files(home, **{"a.JPG": picture(format="JPEG"), "b.png": picture(format="JPEG"), "c.jpeg": picture(), "d": picture(format="WEBP"), "e.jpg_large": picture(format="GIF"),
                   "notes.txt": "no picture", "data.bin": b"\0"*99})
    corpus, found, faults = read(home)
    assert [k for _, k in found] == ["a.JPG", "b.png", "c.jpeg", "d", "e.jpg_large"] and not faults
    convert_corpus(home, "webdataset", home.parent/"by_content")
    with tarfile.open(home.parent/"by_content"/"00000.tar") as tar: names = [n for n in tar.getnames() if not n.endswith(("json", "txt"))]
    assert [n.rpartition(".")[2] for n in names] == ["jpg", "jpg", "png", "webp", "gif"]


def zip_bomb(chunk):
    "A PNG whose compressed text or pixels unpack to 200 MB."
    def block(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    text = block(b"zTXt", b"comment\0\0" + zlib.compress(bytes(200_000_000), 9)) if chunk == "text" else b""
    side = 4 if chunk == "text" else 14_000
    pixels = zlib.compress(bytes((side + 1)*side), 9) if chunk == "pixels" else zlib.compress(bytes(20), 9)
    return b"\x89PNG\r\n\x1a\n" + block(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)) + text + block(b"IDAT", pixels) + block(b"IEND", b"")


@row(17, "decompression bomb, PNG zip bomb")
def _(home):
    for kind in ("text", "pixels"):
        bomb = zip_bomb(kind)
        assert len(bomb) < 1e6
        tracemalloc.start()
        with pytest.raises(BadImage) as e: decode_image(bomb, 64)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert e.value.reason == "too large" and peak < 20e6, kind
        (home/f"{kind}.png").write_bytes(bomb)
    code = ("import sys; from recap.corpus import open_corpus; c = open_corpus(sys.argv[1]); assert not list(c.read_shard('00000', 64)); "
            "print(next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM'))//1024)")
    if not os.path.exists("/proc/self/status"): return
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(home)], capture_output=True, text=True)
    assert int(done.stdout) < 200, done.stderr      # MB, of the whole process; the pixels alone would be 600


@row(18, "1x1, zero width, 1:100")
def _(home):
    for size in ((1, 1), (1, 100), (100, 1), (1, 30_000), (3, 2)):
        for fit in ("crop", "squash"): assert decode_image(picture(size=size), 64, fit).size == (64, 64)
        assert max(decode_image(picture(size=size), 64, "inside").size) <= 64
    flat = b"GIF89a" + struct.pack("<HH", 0, 8) + b"\0\0\0;"
    with pytest.raises(BadImage) as e: decode_image(flat, 64)
    assert e.value.reason in ("no pixels", "not an image")


# --- texts

@row(19, "hostile strings as captions")
def _(home):
    shard(home/"in", sum((parts(f"{i:03d}", t) for i, t in enumerate(HOSTILE)), []))
    corpus = open_corpus(home/"in")
    assert list(corpus.captions().values()) == HOSTILE                              # through tar
    corpus.write_captions("dsc", "00000", [dict(key=k, caption=t) for (_, k), t in corpus.captions().items()])
    assert list(corpus.captions("dsc").values()) == HOSTILE                         # through parquet
    for to in ("webdataset", "open_clip", "imagefolder"):
        convert_corpus(home/"in", to, home/to)
        new = open_corpus(home/to)                                                  # through json, parquet, jsonl
        for style in ("alt", "dsc"): assert [t.encode() for t in new.captions(style).values()] == [t.encode() for t in HOSTILE], (to, style)
    # escaped in HTML: tests/test_report.py, over the report of a study


@row(20, "newline, CRLF, BOM in .txt")
def _(home):
    texts = {"a": b"\xef\xbb\xbfa cat\r\n", "b": b"a cat\nasleep\n", "c": b"\r\n\r\n", "d": b"a\tcat  asleep", "e": "caf\xe9".encode("latin1")}
    files(home/"in", **{f"{k}.png": picture() for k in texts}, **{f"{k}.txt": t for k, t in texts.items()})
    corpus = open_corpus(home/"in")
    assert list(corpus.captions().values()) == ["a cat", "a cat asleep", "", "a cat asleep", "café"]   # stripped on reading
    assert corpus.warnings == ["1 texts are no UTF-8 and were read as Windows-1252 (e.txt)"]
    shard(home/"tar", sum((parts(f"{i:02d}", t) for i, t in enumerate(HOSTILE)), []))
    done = convert_corpus(home/"tar", "sidecar", home/"out")                                                  # one line on writing
    for i, text in enumerate(HOSTILE):
        path = home/"out"/f"{i:02d}.txt"
        line = " ".join(text.replace("\ufeff", "").split())
        assert path.exists() == bool(line)
        if line: assert path.read_bytes() == line.encode() and b"\n" not in path.read_bytes()
    assert done["empty"] == 2 and done["changed"] > 3


def test_a_link_to_nothing_is_named_and_the_rest_goes_on(tmp_path):
    files(tmp_path/"in", **{"a.png": picture(), "a.txt": "of a", "c.png": picture()})
    for name in ("b.png", "c.txt"): (tmp_path/"in"/name).symlink_to(tmp_path/"nowhere")
    corpus, found, faults = read(tmp_path/"in")
    assert [k for _, k in found] == ["a.png", "c.png"] and faults == {("00000", "b.png"): "unreadable"} and corpus.warnings[-1].startswith("c.txt cannot be read")
    corpus.write_captions("dsc", "00000", [dict(key="a.png", caption="ours")])
    assert corpus.has_captions("dsc", "00000")
    for to in ("webdataset", "imagefolder"):
        done = convert_corpus(tmp_path/"in", to, tmp_path/to)
        assert (done["images"], done["skipped"]) == (2, {"unreadable": 1})
    shard(tmp_path/"tars", samples("a"), "00001")
    (tmp_path/"tars"/"00000.tar").symlink_to(tmp_path/"nowhere")
    corpus, found, faults = read(tmp_path/"tars")
    assert found == [("00001", "a")] and faults == {("00000", ""): "damaged tar"} and "cannot be reached" in corpus.warnings[0]
    assert convert_corpus(tmp_path/"tars", "imagefolder", tmp_path/"out")["images"] == 1


@pytest.mark.parametrize("number", range(1, 21), ids=lambda n: f"{n}: {ROWS[n][0]}")
def test_fault(number, tmp_path):
    (tmp_path/"home").mkdir()
    ROWS[number][1](tmp_path/"home")
