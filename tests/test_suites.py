"Suites: the official files, the official layouts, pictures of any model, resume, refusals."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from conftest import ROOT, recap

from recap import suites as su
from recap.core import RecapError, read_json

pytestmark = pytest.mark.usefixtures("one_thread")
REAL = Path(os.environ.get("RECAP_REAL") or "/nowhere")
real = pytest.mark.skipif(not REAL.is_dir(), reason="RECAP_REAL is not set: official files are not shipped")
DALLE3 = REAL/"dalle3-eval"/"prompts"


def colours(prompts, seeds): return [Image.new("RGB", (16, 16), (s % 256, s//256 % 256, s//65536 % 256)) for s in seeds]
def painter(**settings): return su.Model(colours, {"model": "colours", **settings})
def colour_of(index, repeat, seed=0): s = su.picture_seed(seed, index, repeat); return s % 256, s//256 % 256, s//65536 % 256


# --- the official files

@real
def test_drawbench():
    "200 prompts in eleven categories, whose sizes the paper's sheet has (Saharia et al., 2022)."
    suite = su.load_suite("drawbench", DALLE3/"drawbench.txt")
    assert len(suite) == 200 and list(suite.categories.values()) == [25, 10, 19, 20, 20, 10, 10, 20, 7, 38, 21]
    by = {c: [a.prompt for a in suite.asks if a.category == c] for c in suite.categories}
    assert all("olor" in p or "and a" in p for p in by["Colors"]) and all("street" in p or "grass" in p for p in by["Counting"])
    assert all(len(p.split()) <= 2 for p in by["Rare Words"]) and all("'" in p for p in by["Text"])


@real
def test_drawbench_with_rewritten_prompts():
    "Both prompts stand in a line: the original is what is asked, also where it is not quite the list's own."
    plain, both = (su.load_suite("drawbench", DALLE3/f) for f in ("drawbench.txt", "drawbench_upsampled.txt"))
    assert both.categories == plain.categories
    told = lambda a: a.prompt.rstrip(" .")
    differ = [i for i, (a, b) in enumerate(zip(plain.asks, both.asks)) if told(a) != told(b)]
    assert differ == [167], [(plain.asks[i].prompt, both.asks[i].prompt) for i in differ]
    assert [i for i, a in enumerate(both.asks) if a.meta["rewritten"] == a.prompt] == [153] and not plain.asks[0].meta     # "some skittles" alone
    lines = (DALLE3/"drawbench_upsampled.txt").read_text().split("\n")
    for a in both.asks:
        assert lines[a.index].startswith(told(a)) and lines[a.index].strip().endswith(a.meta["rewritten"]) and (a.index == 153 or len(a.meta["rewritten"]) > 60)


@real
def test_partiprompts():
    "1,632 prompts, 12 categories, 11 challenges; quotation marks are letters."
    suite = su.load_suite("partiprompts", REAL/"partiprompts"/"PartiPrompts.tsv")
    assert len(suite) == 1632 and len(suite.categories) == 12 and len({a.meta["challenge"] for a in suite.asks}) == 11
    assert suite.categories["Animals"] == 314 and sum('"' in a.prompt for a in suite.asks) > 5
    assert any(a.prompt.startswith('"G I G G L E" painted') for a in suite.asks)


@real
def test_t2i_compbench():
    "The folder: 300 validation prompts for each of eight categories. Every list of the project by its own number."
    home = REAL/"t2i-compbench"/"dataset"
    suite = su.load_suite("t2i-compbench", home)
    assert suite.categories == {c: 300 for c in ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")}
    assert not any("\r" in a.prompt for a in suite.asks) and suite.asks[0].prompt == "a green bench and a blue bowl"
    for f in sorted(home.glob("*.txt")):
        if f.stem == "new_objects": continue           # words, no prompts
        one = su.load_suite("t2i-compbench", f)
        assert [a.prompt for a in one.asks] == [x.strip() for x in f.read_bytes().decode().split("\n") if x.strip()]
    assert len(su.load_suite("t2i-compbench", home/"color.txt")) == 860
    with pytest.raises(RecapError, match="expected a list of T2I-CompBench"): su.load_suite("t2i-compbench", home/"new_objects.txt")
    theirs = su.load_suite("t2i-compbench", DALLE3/"t2i compbench")      # a folder with a space, a file with a hyphen
    assert theirs.categories == {c: 300 for c in ("color", "shape", "texture", "non_spatial", "complex")}
    for a in suite.asks: assert su.picture_file(suite, a).name == f"{a.prompt}_{a.index:06d}.png"     # no official prompt is changed


@real
def test_geneval():
    suite = su.load_suite("geneval", REAL/"geneval"/"prompts"/"evaluation_metadata.jsonl")
    assert suite.categories == {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
    assert [a.prompt for a in suite.asks] == (REAL/"geneval"/"prompts"/"generation_prompts.txt").read_text().split("\n")[:553]
    with pytest.raises(RecapError, match="evaluation_metadata.jsonl"): su.load_suite("geneval", REAL/"geneval"/"prompts"/"generation_prompts.txt")


@real
def test_coco_captions_keep_their_positions():
    suite = su.load_suite("coco", DALLE3/"8k_coco.txt")
    lines = (DALLE3/"8k_coco.txt").read_text().split("\n")
    assert len(suite) == 8192 and len(lines) == 8213 and suite.asks[-1].index == 8212
    assert {*range(8213)} - {a.index for a in suite.asks} == {i for i, x in enumerate(lines) if not x.strip()} and 356 not in {a.index for a in suite.asks}
    assert all(a.prompt == lines[a.index].strip() for a in suite.asks)


@real
def test_captions_of_the_human_evaluation(): assert len(su.load_suite("prompts", DALLE3/"dalle3_eval.txt")) == 170


@real
def test_files_of_another_suite_are_refused():
    files = {"drawbench": DALLE3/"drawbench.txt", "partiprompts": REAL/"partiprompts"/"PartiPrompts.tsv", "geneval": REAL/"geneval"/"prompts"/"evaluation_metadata.jsonl",
             "t2i-compbench": REAL/"t2i-compbench"/"dataset"/"shape_val.txt"}
    for name in (*files, "dpg-bench"):
        for other, path in files.items():
            if name == other: continue
            with pytest.raises(RecapError, match="expected|this has|is a folder"): su.load_suite(name, path)


@real
def test_the_officials_own_pictures():
    "Four pictures that the authors of T2I-CompBench ship, by their names; and their example of results."
    home = REAL/"t2i-compbench"
    names = {p.stem[:-7]: int(p.stem[-6:]) for p in (home/"samples").glob("*.png")}
    suite = su.Suite("t2i-compbench", tuple(su.Ask(i, p, "color") for p, i in sorted(names.items(), key=lambda x: x[1])))
    found, missing = su.find_pictures(home, suite)
    assert [(p.ask.index, p.repeat, p.path.name) for p in found] == [(i, 0, f"{p}_{i:06d}.png") for p, i in sorted(names.items(), key=lambda x: x[1])] and missing == []
    assert {su.load_picture(p).size for p in found} == {(512, 512)}
    with pytest.raises(RecapError, match="1 pictures that no prompt.*a horse on the right of a car_000003.png"): su.find_pictures(home, su.load_suite("t2i-compbench", home/"dataset"/"color_val.txt"))
    said = su.official_scores("t2i-compbench", home/"reward"/"vqa_result.json")
    assert said["overall"]["mean"] == round((.7110 + .9217 + .8554)/3, 4)


OFFICIAL = {"drawbench": "dalle3-eval/prompts/drawbench.txt", "partiprompts": "partiprompts/PartiPrompts.tsv", "t2i-compbench": "t2i-compbench/dataset", "geneval": "geneval/prompts/evaluation_metadata.jsonl",
            "coco": "dalle3-eval/prompts/8k_coco.txt"}


@real
@pytest.mark.parametrize("name", OFFICIAL)
def test_official_prompts_painted_and_read_back(tmp_path, name):
    "Three prompts of each category, two pictures each, through a whole evaluation and again as a stranger's folder."
    suite = su.load_suite(name, REAL/OFFICIAL[name])
    said = su.evaluate_suite(painter(), suite, tmp_path/"a", n=2, limit=3, scorers=su.Scorers())
    assert said["categories"] == {c: 6 for c in suite.categories} and said["missing"] == []
    (tmp_path/"a"/"prompts.jsonl").unlink()
    again = su.evaluate_images(tmp_path/"a"/"images", suite, limit=3, scorers=su.Scorers())
    assert again["rows"] == said["rows"] and again["pictures"] == 6*len(suite.categories)
    for p in su.find_pictures(tmp_path/"a"/"images", suite, limit=3)[0]: assert su.load_picture(p).getpixel((0, 0)) == colour_of(p.ask.index, p.repeat)
    if name == "geneval":
        lines = (REAL/OFFICIAL[name]).read_text().split("\n")
        for a in suite.head(3).asks: assert json.loads((tmp_path/"a"/"images"/f"{a.index:05d}"/"metadata.jsonl").read_text()) == json.loads(lines[a.index])


def test_drawbench_as_a_table(tmp_path):
    (tmp_path/"d.csv").write_text("Prompts,Category\n" + "".join(f'"A cat, number {i}",Colors\n' for i in range(200)))
    suite = su.load_suite("drawbench", tmp_path/"d.csv")
    assert suite.categories == {"Colors": 200} and suite.asks[7].prompt == "A cat, number 7"
    (tmp_path/"d.txt").write_text("\n".join(f"prompt {i}" for i in range(200)))
    assert su.load_suite("drawbench", tmp_path/"d.txt").categories == {"": 200}       # another order: no categories are guessed


def test_dpg_bench(tmp_path):
    "1,065 files of one prompt each."
    for i in range(1065): (tmp_path/f"{'partiprompts' if i % 2 else 'COCOval2014'}{i}.txt").write_bytes(f"\ufeffA long text,\r\nnumber {i}.".encode())
    suite = su.load_suite("dpg-bench", tmp_path)
    assert len(suite) == 1065 and {a.meta["stem"]: a.prompt for a in suite.asks}["partiprompts7"] == "A long text, number 7."
    (tmp_path/"partiprompts7.txt").unlink()
    with pytest.raises(RecapError, match="1065 files of one prompt each, this has 1064"): su.load_suite("dpg-bench", tmp_path)


def test_coco_annotations(tmp_path):
    (tmp_path/"captions_val2014.json").write_text(json.dumps({"annotations": [{"image_id": 9, "id": 3, "caption": "A cat.\n"}, {"image_id": 9, "id": 4, "caption": "A  dog."}]}))
    assert [(a.index, a.prompt, a.meta["image_id"]) for a in su.load_suite("coco", tmp_path/"captions_val2014.json").asks] == [(0, "A cat.", 9), (1, "A dog.", 9)]
    (tmp_path/"x.json").write_text("{}")
    with pytest.raises(RecapError, match="with annotations"): su.load_suite("coco", tmp_path/"x.json")


# --- the bench of the project

def test_the_bench_is_what_its_code_makes(tmp_path):
    su.save_bench(tmp_path)
    kept = ROOT/"data"/"prompts"/"bench"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in kept.glob("*.jsonl"))
    for p in tmp_path.iterdir(): assert p.read_bytes() == (kept/p.name).read_bytes(), p.name


def test_the_bench_asks_for_what_its_categories_say():
    from recap.language import COLOUR_WORDS, COUNT_WORDS, PLACE_NAMES, PLACE_WORDS, POSITION_WORDS, SIZE_WORDS, TEXTURE_WITH, TEXTURE_WORDS
    from recap.world import Scene, held_out, sample_scene
    suite = su.load_suite("sprite-world")
    kinds = {"colour": "colour", "texture": "texture", "count": "count", "relation": "relation", "lettering": "word"}
    trained = {repr(sample_scene(0, i)) for i in range(300)}
    for a in suite.asks:
        facts = [tuple(f) for f in a.meta["facts"]]
        if a.category in kinds: assert any(f[0] == kinds[a.category] for f in facts), a.prompt
        if a.category == "unusual": assert any(held_out(*f[1:]) for f in facts if f[0] in ("colour", "texture", "relation")), a.prompt
        else: assert not any(held_out(*f[1:]) for f in facts if f[0] in ("colour", "texture")), a.prompt
        for f in facts:      # each fact has its word in the prompt
            words = {"colour": COLOUR_WORDS, "texture": {k: (*TEXTURE_WORDS[k], *TEXTURE_WITH[k]) for k in TEXTURE_WORDS}, "count": COUNT_WORDS, "size": SIZE_WORDS, "position": POSITION_WORDS}.get(f[0])
            if words: assert any(w in a.prompt for w in words[f[2]]), (a.prompt, f)
            if f[0] == "word": assert f[2] in a.prompt
            if f[0] == "place": assert any(w in a.prompt for w in (*PLACE_WORDS[f[1]], *PLACE_NAMES[f[1]])), (a.prompt, f)
        assert repr(Scene.from_dict(a.meta["scene"])) not in trained
    words = lambda c: np.mean([len(a.prompt.split()) for a in suite.asks if a.category == c])
    assert words("short") < 9 < 20 < words("long")


def test_a_judge_that_reads_nothing_is_not_trusted():
    class Yes:
        def check(self, images, facts): return [[1.]*len(f) for f in facts]
    table = su.detector_trust(Yes(), su.load_suite("sprite-world").head(2).asks)
    assert all(v["found"] == 1 and v["refused"] == 0 and not v["trusted"] for kinds in table.values() for v in kinds.values() if "refused" in v)


# --- layouts

def some(name, n=5, **meta):
    if name == "geneval": return su.Suite(name, tuple(su.Ask(2*i, f"a photo of {i}", "counting", {"metadata": {"tag": "counting", "include": [], "prompt": f"a photo of {i}"}}) for i in range(n)))
    if name == "dpg-bench": return su.Suite(name, tuple(su.Ask(i, f"text {i}", "", {"stem": f"COCOval{i}"}) for i in range(n)))
    if name == "t2i-compbench": return su.Suite(name, tuple(su.Ask(i, f"a {i} bench and a {i} bowl", c) for c in ("color", "shape") for i in range(n)))
    return su.Suite(name, tuple(su.Ask(3*i, f"prompt {i}", f"c{i % 2}") for i in range(n)))


@pytest.mark.parametrize("name, n", [("geneval", 4), ("dpg-bench", 4), ("dpg-bench", 1), ("t2i-compbench", 1), ("t2i-compbench", 10), ("partiprompts", 2), ("prompts", 1)])
def test_layouts_round_trip(tmp_path, name, n):
    suite = some(name)
    su.paint_suite(painter(), suite, tmp_path, n=n, batch_size=7)
    found, missing = su.find_pictures(tmp_path, suite, n if name == "dpg-bench" else 0)
    assert missing == [] and [(p.ask, p.repeat) for p in found] == [(a, r) for a in suite.asks for r in range(n)]
    for p in found: assert su.load_picture(p).getpixel((8, 8)) == colour_of(p.ask.index, p.repeat) and su.load_picture(p).size == (16, 16)


def test_the_official_scripts_find_prompt_and_picture(tmp_path):
    "What GenEval's and T2I-CompBench's scorers do with a folder, done by hand."
    gen, t2i = some("geneval"), some("t2i-compbench")
    su.paint_suite(painter(), gen, tmp_path/"g", n=4); su.paint_suite(painter(), t2i, tmp_path/"t", n=2)
    assert sorted(os.listdir(tmp_path/"g")) == [f"{2*i:05d}" for i in range(5)]
    for a in gen.asks:
        assert json.loads((tmp_path/"g"/f"{a.index:05d}"/"metadata.jsonl").read_text()) == a.meta["metadata"]
        assert sorted(os.listdir(tmp_path/"g"/f"{a.index:05d}"/"samples")) == [f"{r:04d}.png" for r in range(4)]
    names = sorted(os.listdir(tmp_path/"t"/"color"/"samples"), key=lambda x: int(x.split("_")[-1].split(".")[0]))
    assert [x.split("_")[0] for x in names] == [a.prompt for a in t2i.asks if a.category == "color" for _ in range(2)]


def test_hostile_prompts_stay_in_the_folder(tmp_path):
    prompts = ["../../up", "/etc/passwd", "a_b", "x"*900, "🙂"*300, "\0", "..", "a\nb\rc", "C:\\x", "漢"*200]
    suite = su.Suite("t2i-compbench", tuple(su.Ask(i, p, "color") for i, p in enumerate(prompts)))
    su.paint_suite(painter(), suite, tmp_path/"in"/"images")
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(written) == len(prompts) and all(p.parent == tmp_path/"in"/"images"/"color"/"samples" and p.name.count("_") == 1 for p in written)
    assert [p.ask.index for p in su.find_pictures(tmp_path/"in"/"images", suite)[0]] == list(range(len(prompts)))


def test_a_prompt_that_stands_twice_shares_its_pictures_in_order(tmp_path):
    suite = su.Suite("t2i-compbench", tuple(su.Ask(i, p, "color") for i, p in enumerate(("a cat", "a dog", "a cat"))))
    su.paint_suite(painter(), suite, tmp_path, n=2)
    assert [load.getpixel((0, 0)) for load in map(su.load_picture, su.find_pictures(tmp_path, suite)[0])] == [colour_of(i, r) for i in range(3) for r in range(2)]


def test_folders_as_other_systems_leave_them(tmp_path):
    "Numbers without zeros, other formats, numbers that do not start at 0, a grid beside the samples."
    suite = some("prompts")
    for a in suite.asks: Image.new("RGB", (8, 8), (a.index, 0, 0)).save(tmp_path/f"{a.index}.webp", lossless=True)
    assert [su.load_picture(p).getpixel((0, 0))[0] for p in su.find_pictures(tmp_path, suite)[0]] == [a.index for a in suite.asks]
    gen = some("geneval", 2)
    for a in gen.asks:
        (home := tmp_path/"g"/f"{a.index:05d}"/"samples").mkdir(parents=True)
        for r in range(2): Image.new("RGB", (8, 8)).save(home/f"{r:05d}.png")
        Image.new("RGB", (8, 8)).save(home.parent/"grid.png")
    assert len(su.find_pictures(tmp_path/"g", gen)[0]) == 4
    t2i = su.Suite("t2i-compbench", tuple(su.Ask(i, p, "color") for i, p in enumerate(("a cat", "a dog"))))
    (tmp_path/"t"/"samples").mkdir(parents=True)
    for name in ("a dog_000301", "a cat_000299", "a cat_000300", "a dog_000302"): Image.new("RGB", (8, 8)).save(tmp_path/"t"/"samples"/f"{name}.png")
    assert [p.path.stem for p in su.find_pictures(tmp_path/"t", t2i)[0]] == ["a cat_000299", "a cat_000300", "a dog_000301", "a dog_000302"]


# --- numbers that differ (fault 45)

@pytest.mark.parametrize("name", ["prompts", "geneval", "t2i-compbench", "dpg-bench"])
def test_numbers_of_pictures_and_prompts_differ(tmp_path, name):
    suite, n = some(name), 4 if name == "dpg-bench" else 2
    su.paint_suite(painter(), suite, tmp_path, n=n)
    lost = su.picture_file(suite, suite.asks[3], n - 1, n)
    (tmp_path/lost).unlink()
    with pytest.raises(RecapError, match=f"{len(suite)} prompts, .* 1 prompts lack some of their {n}: "): su.find_pictures(tmp_path, suite, n)
    found, missing = su.find_pictures(tmp_path, suite, n, skip_missing=True)
    assert len(missing) == 1 and suite.asks[3] not in [p.ask for p in found] and len(found) == n*(len(suite) - 1)
    said = su.evaluate_images(tmp_path, suite, n, skip_missing=True, scorers=su.Scorers())
    assert (said["prompts"], said["pictures"], said["missing"]) == (len(suite) - 1, len(found), missing)


def test_pictures_of_other_prompts_are_refused(tmp_path):
    suite = some("prompts")
    su.paint_suite(painter(), suite, tmp_path/"images")
    (tmp_path/"prompts.jsonl").write_text(json.dumps(dict(index=3, prompt="something else")) + "\n")
    with pytest.raises(RecapError, match="number 3 is 'something else'"): su.find_pictures(tmp_path/"images", suite)
    gen = some("geneval")
    su.paint_suite(painter(), gen, tmp_path/"g")
    (tmp_path/"g"/"00002"/"metadata.jsonl").write_text(json.dumps({"prompt": "x"}))
    with pytest.raises(RecapError, match="asks for 'x'"): su.find_pictures(tmp_path/"g", gen)
    Image.new("RGB", (8, 8)).save(tmp_path/"images"/"00001_0.png")
    (tmp_path/"prompts.jsonl").unlink()
    with pytest.raises(RecapError, match="no prompt of prompts asks for: 00001_0.png"): su.find_pictures(tmp_path/"images", suite)


def test_a_broken_picture_is_named(tmp_path):
    suite = some("prompts")
    su.paint_suite(painter(), suite, tmp_path)
    data = (tmp_path/"00003_0.png").read_bytes(); (tmp_path/"00003_0.png").write_bytes(data[:len(data)//2])
    with pytest.raises(RecapError, match="00003_0.png is not a picture that can be read"): su.evaluate_images(tmp_path, suite, scorers=su.Scorers())


# --- painting, resume, records

def test_resume_paints_what_is_missing_and_nothing_else(tmp_path):
    suite, calls = some("prompts"), []
    def paint(prompts, seeds): calls.append(list(prompts)); return colours(prompts, seeds)
    def dies(prompts, seeds):
        if len(calls) == 1: raise KeyboardInterrupt
        return paint(prompts, seeds)
    go = lambda p, **more: su.evaluate_suite(su.Model(p, {"model": "x"}), suite, tmp_path/"a", n=2, batch_size=3, scorers=su.Scorers(), **more)
    with pytest.raises(KeyboardInterrupt): go(dies)
    assert len(list((tmp_path/"a"/"images").iterdir())) == 3
    (tmp_path/"a"/"images"/".00003_0.png.abc.tmp").write_bytes(b"half")
    go(paint)
    assert sum(map(len, calls)) == 10 and not list((tmp_path/"a").rglob("*.tmp"))
    straight = su.evaluate_suite(su.Model(colours, {"model": "x"}), suite, tmp_path/"b", n=2, batch_size=16, scorers=su.Scorers())
    same = lambda f: {p.name: p.read_bytes() for p in (tmp_path/f/"images").iterdir()}
    assert same("a") == same("b") and (tmp_path/"a"/"results.json").read_bytes() == (tmp_path/"b"/"results.json").read_bytes() and straight["pictures"] == 10


def test_another_run_in_the_same_folder_is_refused(tmp_path):
    suite = some("prompts")
    go = lambda model, s=suite, **more: su.evaluate_suite(model, s, tmp_path, scorers=su.Scorers(), **more)
    go(painter(steps=5), limit=1)
    assert go(painter(steps=5))["pictures"] == 5          # more of the same suite: goes on
    for again, said in ((lambda: go(painter(steps=6)), "steps 5 -> 6"), (lambda: go(painter(steps=5), seed=1), "seed 0 -> 1"), (lambda: go(painter(steps=5), n=2), "n 1 -> 2"),
                        (lambda: go(painter(steps=5), some("prompts", 4)), "prompts '"), (lambda: go(painter(steps=5), upsample="given"), "upsample None -> 'given'")):
        with pytest.raises(RecapError, match=f"holds pictures of another run .*{said}"): again()
    assert len(list((tmp_path/"images").iterdir())) == 5


def test_scores_are_of_the_original_prompt(tmp_path):
    "The model reads the rewritten text; CLIP reads the prompt."
    painted, scored = [], []
    suite = su.Suite("prompts", tuple(su.Ask(i, p, "", {"rewritten": f"a very long text about {p}"}) for i, p in enumerate(("a cat", "a dog"))))
    class Reads:
        def score(self, images, texts): scored.extend(texts); return np.full(len(texts), .25)
    def paint(prompts, seeds): painted.extend(prompts); return colours(prompts, seeds)
    said = su.evaluate_suite(su.Model(paint, {"model": "x"}), suite, tmp_path, upsample="given", scorers=su.Scorers(clip=Reads()))
    assert painted == ["a very long text about a cat", "a very long text about a dog"] and scored == ["a cat", "a dog"]
    assert said["summary"]["clip"]["overall"] == dict(mean=25., lo=25., hi=25., n=2)
    rows = [json.loads(x) for x in (tmp_path/"prompts.jsonl").read_text().splitlines()]
    assert [(r["prompt"], r["text"], r["files"]) for r in rows] == [("a cat", painted[0], ["00000_0.png"]), ("a dog", painted[1], ["00001_0.png"])]


def test_an_upsampler_is_asked_once_for_each_prompt(tmp_path, monkeypatch):
    import types
    asked = []
    class Writes:
        def rewrite(self, prompts):
            asked.extend(prompts)
            return [types.SimpleNamespace(text=p if "1" in p else p.upper(), ok="1" not in p, why="it lost a fact" if "1" in p else "") for p in prompts]
    monkeypatch.setitem(sys.modules, "recap.upsample", types.SimpleNamespace(open_upsampler=lambda source: Writes()))
    suite = some("prompts")
    assert su.rewritten(suite.head(1), "", tmp_path/"r.jsonl") == {("c0", 0): "PROMPT 0", ("c1", 3): "prompt 1"}
    assert len(su.rewritten(suite, "", tmp_path/"r.jsonl")) == 5 and asked == [f"prompt {i}" for i in range(5)]
    assert [r["why"] for r in map(json.loads, (tmp_path/"r.jsonl").read_text().splitlines())] == ["", "it lost a fact", "", "", ""]


# --- any diffusers model

@pytest.fixture(scope="module")
def stable(tmp_path_factory):
    "A tiny Stable Diffusion 1 with random weights, saved by diffusers itself."
    import torch
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    from transformers import AutoTokenizer
    from test_pretrained import tiny_unet, tiny_vae
    from test_text import clip_folder
    root = tmp_path_factory.mktemp("stable")
    text = clip_folder(root)
    words = AutoTokenizer.from_pretrained(root/"tokenizer", local_files_only=True)
    schedule = PNDMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1)
    torch.manual_seed(0)
    StableDiffusionPipeline(vae=tiny_vae(), text_encoder=text, tokenizer=words, unet=tiny_unet(1), scheduler=schedule, safety_checker=None, feature_extractor=None, requires_safety_checker=False).save_pretrained(root/"sd")
    return root/"sd"


def test_stable_diffusion_as_diffusers_draws_it(stable, tmp_path):
    import torch
    from diffusers import StableDiffusionPipeline
    suite = su.Suite("coco", (su.Ask(4, "a cat on a sofa"), su.Ask(9, "a dog")))
    su.evaluate_suite(str(stable), suite, tmp_path, n=2, num_inference_steps=2, guidance_scale=3., device="cpu", batch_size=4)
    pipe = StableDiffusionPipeline.from_pretrained(stable, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    alone = pipe("a dog", num_inference_steps=2, guidance_scale=3., generator=torch.Generator().manual_seed(su.picture_seed(0, 9, 1))).images[0]
    ours = np.asarray(Image.open(tmp_path/"images"/"00009_1.png"), float)
    assert ours.std() > 1 and np.abs(ours - np.asarray(alone, float)).max() <= 1
    assert read_json(tmp_path/"results.json")["summary"] == {}     # photographs: nothing scores them unless it is given
    assert read_json(tmp_path/"asked.json")["weights"] == su.hash_folder(stable)
    assert read_json(tmp_path/"results.json")["cut"] == []


def test_what_the_model_cannot_read_is_told(stable, tmp_path):
    "Stable Diffusion reads 77 tokens, start and end among them, and diffusers drops the rest."
    fits, over = " ".join(["cat"]*75), " ".join(["cat"]*76)
    said = su.evaluate_suite(str(stable), su.Suite("prompts", (su.Ask(0, fits), su.Ask(1, over))), tmp_path, num_inference_steps=1, device="cpu")
    assert said["cut"] == [over] and any("1 prompts, such as 'cat cat" in x for x in su.remarks(said, tmp_path))


def test_a_pipeline_of_ours_and_the_painter_draw_the_same(tmp_path):
    from recap.train import Painter
    Painter.from_pretrained().save(tmp_path/"arm")
    kept = su.open_model(str(tmp_path/"arm"), num_inference_steps=3)           # with our card: the painter
    (tmp_path/"arm"/"model.json").unlink()
    plain = su.open_model(str(tmp_path/"arm"), num_inference_steps=3)          # without: diffusers, with our own pipeline.py
    a, b = (np.asarray(m.paint(["a red car"], [5])[0], float) for m in (kept, plain))
    assert np.abs(a - b).mean() < 2                                           # bf16 there, fp32 here
    (tmp_path/"arm"/"pipeline.py").write_text((tmp_path/"arm"/"pipeline.py").read_text() + "\nraise SystemExit('a stranger')\n")
    with pytest.raises(RecapError, match="cannot be loaded"): su.open_model(str(tmp_path/"arm"))


def test_models_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, said in ((tmp_path/"none", "does not exist"), ("a/b/c", "does not exist"), ("nobody/nothing", "cannot be loaded as a diffusers pipeline"), (tmp_path, "neither model_index.json")):
        with pytest.raises(RecapError, match=said): su.open_model(str(name))


# --- sums

def test_overall_is_the_mean_of_the_categories():
    rng = np.random.default_rng(0)
    rows = [dict(category=c, index=i, repeat=r, clip=float(rng.normal(m, 1))) for c, m, n in (("a", 10, 40), ("b", 30, 4)) for i in range(n) for r in range(2)]
    said = su.summarise_rows(rows)["clip"]
    by = {c: [x["clip"] for x in rows if x["category"] == c] for c in "ab"}
    assert np.isclose(said["overall"]["mean"], np.mean([np.mean(v) for v in by.values()]), atol=1e-4) and said["overall"]["n"] == 88
    for c, v in by.items(): assert np.isclose(said["categories"][c]["mean"], np.mean(v), atol=1e-4)


def test_the_interval_is_that_of_a_stratified_mean():
    "Independent prompts: variance of a mean of means by the formula of stratified sampling."
    rng = np.random.default_rng(1)
    a, b = rng.normal(0, 2, 300), rng.normal(5, 1, 150)
    said = su.mean_of_means([*a, *b], ["a"]*300 + ["b"]*150, list(range(450)))
    half = 1.96*np.sqrt(a.var()/300 + b.var()/150)/2
    assert np.allclose([said.mean, said.lo, said.hi], [(a.mean() + b.mean())/2 + d for d in (0, -half, half)], atol=.015)


def test_geneval_is_the_mean_of_six_tags(tmp_path):
    import pandas as pd
    rng = np.random.default_rng(2)
    rows = [dict(filename=f"{i}/samples/{r}.png", tag=t, prompt=f"{t} {i}", correct=bool(rng.random() < .3 + .1*k)) for k, (t, n) in enumerate(su.GENEVAL.items()) for i in range(n) for r in range(2)]
    pd.DataFrame(rows).to_json(tmp_path/"results.jsonl", orient="records", lines=True)     # as the official scorer writes
    said = su.official_scores("geneval", tmp_path/"results.jsonl")
    theirs = pd.read_json(tmp_path/"results.jsonl", orient="records", lines=True).groupby("tag", sort=False)["correct"].mean()
    assert abs(said["overall"]["mean"] - np.mean(theirs)) < 1e-4 and abs(np.mean([r["correct"] for r in rows]) - np.mean(theirs)) > 1e-3
    (tmp_path/"five.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows if r["tag"] != "colors"))
    with pytest.raises(RecapError, match="tags"): su.official_scores("geneval", tmp_path/"five.jsonl")


# --- the command

def test_command_scores_a_folder(tmp_path, capsys):
    from recap.command import run_command
    suite = su.load_suite("sprite-world").head(1)
    (tmp_path/"in").mkdir()
    for a, im in zip(suite.asks, su.bench_pictures(suite.asks)): im.save(tmp_path/"in"/f"{a.index}.png")
    go = lambda *more: run_command(["evaluate", "--suite", "sprite-world", "--images", str(tmp_path/"in"), "--limit", "1", *more])
    assert go("--out", str(tmp_path/"out"), "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["pictures"] == 10 and said["summary"]["facts"]["overall"]["mean"] > .9 and said == read_json(tmp_path/"out"/"results.json")
    (tmp_path/"in"/"300.png").unlink()
    assert go() == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "10 prompts, 9 pictures" in told and "00300_0.png" in told


@pytest.mark.slow
def test_command_is_killed_and_goes_on(tmp_path):
    "kill -9 in the middle: the same command ends with the pictures of a run that was not killed."
    (tmp_path/"p.txt").write_text("\n".join(f"a red cat number {i}" for i in range(12)))
    args = ["evaluate", "foundation", "--suite", "prompts", "--prompts", tmp_path/"p.txt", "--num-inference-steps", 4, "--batch-size", 2, "--out"]
    child = subprocess.Popen([sys.executable, "-c", "from recap.command import main; main()", *map(str, args), str(tmp_path/"killed")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while child.poll() is None and len(list((tmp_path/"killed").glob("images/*.png"))) < 3: time.sleep(.02)
    child.send_signal(signal.SIGKILL); child.wait()
    assert 0 < len(list((tmp_path/"killed").glob("images/0*.png"))) < 12
    for f in ("killed", "straight"): assert recap(ROOT, *args, tmp_path/f).returncode == 0
    for p in (tmp_path/"straight"/"images").iterdir(): assert p.read_bytes() == (tmp_path/"killed"/"images"/p.name).read_bytes()
    assert (tmp_path/"straight"/"results.json").read_bytes() == (tmp_path/"killed"/"results.json").read_bytes()


# --- scorers of other pages

def test_questions_are_about_the_original_prompt(tmp_path):
    "B-VQA multiplies over noun phrases in T2I-CompBench's attribute categories alone; a prompt without one has no score."
    pytest.importorskip("recap.questions")
    suite = su.Suite("t2i-compbench", (su.Ask(0, "a red cat and a blue dog", "color"), su.Ask(1, "It is.", "color"), su.Ask(0, "a cat on a dog", "spatial")))
    asked = []
    class Knows:
        room, whole = None, "{text}?"
        def answer(self, images, questions): asked.extend(questions); return [[.5 if "dog" in q else .8 for q in qs] for qs in questions]
    su.paint_suite(painter(), suite, tmp_path)
    said = su.evaluate_images(tmp_path, suite, scorers=su.Scorers(vqa=Knows()))
    assert [r.get("b_vqa") for r in said["rows"]] == [.4, None, None] and [r.get("vqa_score") for r in said["rows"]] == [None, None, .5]
    assert asked == [["a red cat?", "a blue dog?"], ["a cat on a dog?"]]
    assert said["summary"]["b_vqa"]["categories"]["color"]["n"] == 1


def test_distances_from_real_pictures(tmp_path):
    "As the page of distances computes them from arrays; the same pictures are at distance 0."
    pytest.importorskip("recap.distances")
    class Sees:      # two features: mean of red, mean of green
        def image_features(self, images): return np.stack([np.asarray(im, float)[..., :2].mean((0, 1))/255 + .1 for im in images])
        def score(self, images, texts): return np.zeros(len(images))
    suite = su.Suite("prompts", tuple(su.Ask(i, f"prompt {i}") for i in range(12)))
    su.paint_suite(painter(), suite, tmp_path/"a"); su.paint_suite(painter(), suite, tmp_path/"b", seed=5)
    go = lambda reference: su.evaluate_images(tmp_path/"a", suite, scorers=su.Scorers(clip=Sees()), reference=reference)["distances"]
    rows = [np.array([colour_of(i, 0, s)[:2] for i in range(12)])/255 + .1 for s in (5, 0)]
    gap, (va, vb) = rows[0].mean(0) - rows[1].mean(0), (np.cov(r, rowvar=False) for r in rows)
    import scipy.linalg
    expected = gap @ gap + np.trace(va + vb - 2*scipy.linalg.sqrtm(va @ vb).real)
    assert abs(go(tmp_path/"b")["fid"] - expected) < 1e-3 and go(tmp_path/"b")["reference"] == 12 and go(tmp_path/"b")["features"] == "CLIP"
    assert abs(go(tmp_path/"a")["fid"]) < 1e-3
    with pytest.raises(RecapError, match="expected a folder of real pictures"): go(tmp_path/"nothing")
    with pytest.raises(RecapError, match="needs features"): su.evaluate_images(tmp_path/"a", suite, scorers=su.Scorers(), reference=tmp_path/"b")


def test_a_prompt_longer_than_the_vqa_model_reads_is_asked_in_parts(tmp_path):
    from recap.questions import open_vqa
    vqa, prompt = open_vqa(), ", ".join(["a red cat on the left", "a green boat on the right"]*6)
    assert vqa.tokens(vqa.whole.replace("{text}", prompt)) > vqa.room
    Image.new("RGB", (64, 64), "red").save(path := tmp_path/"0_0.png")
    row, = su.score_pictures([su.Picture(su.Ask(0, prompt), 0, path)], su.Scorers(vqa=vqa))
    assert 0 <= row["vqa_score"] <= 1
