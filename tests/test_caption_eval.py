"What captions tell, miss and invent, against errors that were planted; and what can be said without any truth."
import json
import random
import re

import numpy as np
import pytest
from conftest import ROOT
from recap.caption_eval import (CaptionEvalConfig, TERMS, answer_score, audit_terms, distribution_distance, evaluate_captions, find_terms, manner_of,
                                jensen_shannon, length_of, object_check, plant_error, score_column, share_interval, token_counters, variety_of)
from recap.core import RecapError, keyed_rng
from recap.language import descriptive_caption, main_subject, short_caption
from recap.reader import compare, one_way
from recap.scorers import change_one
from recap.statistics import bootstrap_ratio
from recap.world import COLOURS, KINDS, WorldConfig, facts_of, sample_scene, visible_scene


def seen(n, world): return {("0", f"{i:03d}"): visible_scene(sample_scene(11, i, world, split="scorer"), 64) for i in range(n)}


SCENES, WORLD = seen(40, WorldConfig(max_things=2, max_count=2)), seen(80, WorldConfig.parse("whole,words=0.4"))
TRUTH = {k: (s, facts_of(s)) for k, s in SCENES.items()}


def told(scenes=SCENES, lies=()):
    "Descriptive captions; of the keys in `lies` they describe the changed scene."
    lies = dict(lies)
    return {k: descriptive_caption(lies.get(k, s), keyed_rng(1, *k), bank="people") for k, s in scenes.items()}


def test_true_captions_invent_nothing():
    for scenes in (SCENES, WORLD):
        score = score_column(told(scenes), {k: (s, facts_of(s)) for k, s in scenes.items()})
        assert score["hallucination"]["mean"] == 0 and score["coverage"]["mean"] > 0.8 and score["clean"]["mean"] == 1
        assert score["coverage_by_kind"]["place"]["mean"] == 1 and score["empty"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_lie_is_counted_under_its_kind(kind):
    lies = {k: lie for k, s in WORLD.items() if (lie := change_one(s, keyed_rng(0, *k), kind))}
    truth = {k: (WORLD[k], facts_of(WORLD[k])) for k in lies}
    score = score_column(told({k: WORLD[k] for k in lies}, lies), truth)
    bad = score["hallucination_by_kind"][kind]
    least = 0.2 if kind == "relation" else 0.4                         # a lie that the words leave out is no lie, and relations often are
    assert round(bad["mean"] * bad["of"]) >= least * len(lies) > 2
    if kind not in ("object", "family", "position", "relation"):       # another noun brings its attributes, another side its relations
        assert all(score["hallucination_by_kind"].get(k, {"mean": 0})["mean"] == 0 for k in KINDS if k != kind)


SWAPS = {"colour": list(COLOURS), "position": ["left", "right"], "count": ["two", "three", "four"],   # words as people write them, replaced in their own sentences
         "place": ["beach", "meadow", "forest", "desert", "kitchen"], "weather": ["night", "sunset", "rain", "fog"], "size": ["small", "big", "tiny", "large"]}
VALUE = {"two": "2", "three": "3", "four": "4", "big": "large", "tiny": "small"}


def by_hand():
    "Captions that people's stand-ins wrote from pictures alone, with the facts they noted; only what the reader has right."
    for name in ("open", "aside_1", "aside_2", "aside_3"):
        for row in map(json.loads, (ROOT/f"data/captions/{name}.jsonl").read_text().splitlines()):
            for r in (row["short"], row["long"]):
                truth = {tuple(f) for f in r["facts"]}
                if not (read := compare(r["text"], truth)).invented - {f for f in read.invented if f[0] == "family"}: yield r["text"], truth


def plant_by_hand(text, kind, truth, rng): # one word replaced, all its places; None where the word does not state a fact
    stated = {f[-1] for f in truth if f[0] == kind}
    there = [w for w in SWAPS[kind] if re.search(rf"\b{w}\b", text) and VALUE.get(w, w) in stated]
    other = [w for w in SWAPS[kind] if VALUE.get(w, w) not in stated]
    return re.sub(rf"\b{there[0]}\b", rng.choice(other), text) if there and other else None


@pytest.mark.parametrize("kind", SWAPS)
def test_errors_planted_in_captions_that_were_written_by_hand(kind):
    "Neither words nor facts are the generator's, and a word is replaced whatever the reader thinks of it."
    found = []
    for i, (text, truth) in enumerate(by_hand()):
        if lie := plant_by_hand(text, kind, truth, random.Random(i)): found.append(any(f[0] in (kind, "relation"*(kind == "position")) for f in compare(lie, truth).invented))
    assert len(found) >= 20 and np.mean(found) >= .9, (len(found), np.mean(found))


def test_things_added_to_and_dropped_from_captions_that_were_written_by_hand():
    added, dropped = [], []
    for text, truth in by_hand():
        noun = next(n for n in ("tractor", "penguin", "guitar") if n not in text and ("object", n) not in truth)
        added.append(("object", noun) in compare(text.rstrip(". ") + f". There is also a purple {noun} on the left.", truth).invented)
        sentences = re.split(r"(?<=\.) ", text)
        for i in range(len(sentences)):
            rest = " ".join(sentences[:i] + sentences[i + 1:])
            gone = [n for k, n in (f for f in truth if f[0] == "object") if re.search(rf"\b{n}", sentences[i]) and not re.search(rf"\b{n}", rest) and ("object", n) in compare(text, truth).told]
            if gone and rest: dropped += [("object", n) in compare(rest, truth).missed for n in gone]
    assert len(added) > 300 and np.mean(added) > .97 and len(dropped) >= 100 and np.mean(dropped) > .8, (np.mean(added), np.mean(dropped), len(dropped))


def test_relations_are_counted_one_way():
    pair = next(k for k, s in SCENES.items() if len({t.position for t in s.things}) == 2)
    a, b = (t.noun for t in SCENES[pair].things)
    score = score_column({pair: f"the {b} is left of the {a}."}, {pair: TRUTH[pair]})
    wrong = score["hallucination_by_kind"]["relation"]
    assert (wrong["mean"], wrong["of"]) == (1.0, 1) and wrong["lo"] < .1     # one wrong of one proves little
    assert sum(f[0] == "relation" for f in one_way(TRUTH[pair][1])) == 1


def test_missing_captions_are_missed_not_left_out():
    half = {k: v for i, (k, v) in enumerate(told().items()) if i % 2}
    score = score_column({**half, **{k: None for k in list(SCENES)[::4]}}, TRUTH)
    assert score["captions"] == 40 and score["empty"] == 20 and 0.3 < score["coverage"]["mean"] < 0.65
    assert score["main_subject"]["of"] == 40 and score["main_subject"]["mean"] <= .5


def test_short_captions_name_the_main_subject_and_others_do_not():
    truth = {k: (s, facts_of(s)) for k, s in WORLD.items() if len(s.things) > 1}
    short = {k: short_caption(s, keyed_rng(0, *k)) for k, (s, _) in truth.items()}
    small = {k: "a " + min((t for t in s.things if t is not main_subject(s)), key=lambda t: t.size == "large").noun for k, (s, _) in truth.items()}
    assert score_column(short, truth)["main_subject"]["mean"] > .97 and score_column(small, truth)["main_subject"]["mean"] == 0


def test_what_was_not_understood_counts_as_false_beside_the_rest():
    score = score_column({k: "A blorb and a gizmo frumple." for k in SCENES}, TRUTH)
    assert score["hallucination"]["of"] == 0 and score["hallucination_unread_false"]["mean"] == 1 and score["unread"]["mean"] >= .5


def test_interval_is_the_one_of_the_statistics_page():
    part, whole = [1, 4, 2, 0, 5, 3, 3, 2] * 6, [3, 5, 4, 2, 5, 6, 3, 4] * 6
    ours, theirs = share_interval(part, whole, n=8000), bootstrap_ratio(part, whole, n=8000, seed=9)
    assert ours["mean"] == pytest.approx(theirs.mean, abs=1e-4)
    assert ours["lo"] == pytest.approx(theirs.lo, abs=0.01) and ours["hi"] == pytest.approx(theirs.hi, abs=0.01)


def test_the_formula_for_many_pictures_agrees_with_the_bootstrap():
    rng = np.random.default_rng(0)
    whole = rng.integers(0, 9, 10_001)
    part = rng.binomial(whole, .2)
    many, few = share_interval(part, whole), share_interval(part[:10_000], whole[:10_000])
    assert many["lo"] == pytest.approx(few["lo"], abs=6e-4) and many["hi"] == pytest.approx(few["hi"], abs=6e-4)


def test_the_interval_covers_the_true_share():
    rng, inside = np.random.default_rng(1), 0
    for i in range(300):
        whole = rng.integers(1, 6, 150)
        r = share_interval(rng.binomial(whole, .1), whole, n=400, seed=i)
        inside += r["lo"] <= .1 <= r["hi"]
    assert .9 <= inside/300 <= .99


def test_results_are_ready_for_the_report():
    results = evaluate_captions(CaptionEvalConfig(n=20, examples=3))
    assert [len(results["styles"]), len(results["examples"])] == [3, 3]
    assert set(results["examples"][0]["styles"]["dsc"]) == {"caption", "told", "missed", "invented", "unread"}
    assert all(results["styles"][s]["captions"] == 20 for s in results["styles"])
    assert results["styles"]["alt"]["distance"] is None and results["styles"]["dsc"]["distance"]["words"]["mean"] > .1
    json.dumps(results, allow_nan=False)


@pytest.fixture
def folder(tmp_path):
    from PIL import Image
    rows = [("a", "Portrait of an old man", "A man with grey hair looks at a dog.", "man; dog"), ("b", "her car", "A red car. A red car. A red car.", "car"), ("c", "", "A cat on a sofa.", "cat")]
    with open(tmp_path/"metadata.jsonl", "w") as f:
        for name, alt, long, objects in rows:
            Image.new("RGB", (32, 32), "red").save(tmp_path/f"{name}.png")
            f.write(json.dumps({"file_name": f"{name}.png", "text": alt, "long": long, "objects": objects}) + "\n")
    return tmp_path


def test_a_corpus_without_truth_tells_what_can_be_told(folder):
    cfg = CaptionEvalConfig(corpus=str(folder), styles="alt,long", objects="objects")
    asked = []
    results = evaluate_captions(cfg, answer=lambda images, questions: asked.extend(questions) or [.25]*len(questions), similarity=lambda images, texts: np.ones(len(texts)))
    long = results["styles"]["long"]
    assert long["coverage"] is None and long["hallucination_by_kind"] is None and "no truth" in next(iter(results["untold"].values()))
    assert long["manner"]["loops"]["mean"] == pytest.approx(1/3, abs=1e-3) and long["answers"]["denied"]["mean"] == 1 and long["answers"]["questions"] == 5
    assert long["objects"]["chair_i"]["mean"] == 0 and long["objects"]["named"]["mean"] == 1
    assert long["terms"]["age"]["dropped"]["of"] == 3 and long["terms"]["age"]["dropped"]["per_1000"] == pytest.approx(333.3, abs=.1)
    assert long["terms"]["gender"]["added"]["per_1000"] == 0 and long["similarity"]["mean"] == 1
    assert any("A red car." in q for q in asked) and len(results["examples"]) == 3
    json.dumps(results, allow_nan=False)
    bare = evaluate_captions(CaptionEvalConfig(corpus=str(folder), styles="long", reference=""))
    assert bare["styles"]["long"]["answers"] is None and {"answers", "objects", "distance", "similarity"} <= bare["untold"].keys()


def test_references_and_settings_that_are_wrong_are_refused(folder):
    with pytest.raises(RecapError, match="neither a column"): evaluate_captions(CaptionEvalConfig(corpus=str(folder), styles="long", reference="coco.txt"))
    (folder/"coco.txt").write_text("A man with a dog.\nA cat on a sofa.\n")
    near = evaluate_captions(CaptionEvalConfig(corpus=str(folder), styles="long", reference=str(folder/"coco.txt")))["styles"]["long"]["distance"]
    assert 0 <= near["words"]["mean"] < 1
    with pytest.raises(RecapError, match="one probability for each"): answer_score([1], ["A cat."], lambda i, q: [float("nan")])
    with pytest.raises(RecapError, match="must pair up"): answer_score([1, 2], ["A cat."], lambda i, q: [1.])


def test_distance_has_its_floor_and_its_ends():
    words = "red blue green cat dog sits runs on under the a mat house tree".split()
    write = lambda seed, n, pool: [" ".join(random.Random(f"{seed}{i}").choices(pool, k=8)) for i in range(n)]
    same = distribution_distance(write("a", 300, words), write("b", 300, words))["words"]
    other = distribution_distance(write("a", 300, words[:7]), write("b", 300, words[7:]))["words"]
    assert same["mean"] < 2*same["floor"] < .02 and other["mean"] == pytest.approx(1) and distribution_distance(["a"], []) is None
    from scipy.spatial.distance import jensenshannon
    a, b = [5, 1, 0, 3], [2, 2, 7, 0]
    assert jensen_shannon(a, b) == pytest.approx(jensenshannon(a, b, base=2)**2)


def test_tokens_are_those_of_the_libraries():
    import open_clip
    text = "A tiny turquoise pufferfish hovers over an umbrella, 12 m away!"
    ids = open_clip.tokenizer.SimpleTokenizer()([text])[0]
    assert token_counters()["clip"][1]([text]) == [int((ids != 0).sum())] and token_counters()["clip"][0] == len(ids)
    from recap.text import TextEncoder
    encoder = TextEncoder.from_pretrained()
    assert token_counters()["t5"][1]([text]) == [len(encoder.tokens([text])[0][0])]
    assert length_of([text])["t5"]["limit"] == encoder.max_tokens
    from recap.captioner import load_captioner
    from recap.core import foundation
    assert token_counters()["captioner"][1]([text]) == [load_captioner(foundation("captioner")).words.encode([text], 999).shape[1]]


def test_loops_and_variety():
    looped = manner_of(["a bus and a bus and a bus and a bus", "word " * 5000, " ".join(map(str, range(5000))), "A cat is left of a dog. A dog is right of a cat."])
    assert looped["loops"]["mean"] == .5 and looped["refuses"]["mean"] == 0
    assert manner_of(["The fish is to the right of the fish.", "The fish is to the right of the shark."])["relates a thing to itself"]["mean"] == .5
    assert variety_of(["same words here now"] * 50)["overlap"]["mean"] == 1 and variety_of([f"w{i} x{i} y{i}" for i in range(50)])["overlap"]["mean"] == 0


PLANTED_TERMS = [  # text, groups that are there; the traps are words that merely contain others, or say nothing of a person
    ("A woman's hat", {"gender"}), ("women\u2019s shoes for girls", {"gender", "age"}), ("an Asian businessman", {"gender", "origin"}), ("Two old, bearded men", {"gender", "age", "looks"}),
    ("a bald eagle over an old mill", set()), ("the human mandate of a Roman emperor", set()), ("white house, black dog, short fence", set()), ("a pretty dress, a French bulldog", set()),
    ("An elderly Japanese couple", {"age", "origin"}), ("the toddlers play", {"age"}), ("a 12-year-old girl", {"gender", "age"}), ("a 12-year-old whisky", set()),
    ("her", {"gender"}), ("heritage sheriff", set()), ("a young, slim woman", {"gender", "age", "looks"}), ("The man is very tall.", {"gender", "looks"}), ("snow men and a baby elephant", set()),
    ("WOMEN IN STEM", {"gender"}), ("a person", set()), ("beautiful sunset behind a girl", {"gender", "age"}), ("a yearbook girl", {"gender", "age"})]


@pytest.mark.parametrize("text,groups", PLANTED_TERMS)
def test_planted_words_about_people(text, groups): assert {g for g, _, _ in find_terms(text)} == groups


def test_the_audit_counts_what_was_added_and_dropped():
    n, rng = 400, random.Random(0)
    was = {i: "portrait of a violinist" if i % 4 else "portrait of an old woman" for i in range(n)}
    planted = set(rng.sample(range(n), 60))
    now = {i: "A beautiful young lady plays." if i in planted else "A person plays." for i in range(n)}
    a = audit_terms(now, was)
    women = {i for i in was if i % 4 == 0}
    assert a["gender"]["added"]["per_1000"] == 1000*len(planted - women)/n and a["gender"]["dropped"]["per_1000"] == 1000*len(women - planted)/n
    assert a["looks"]["added"]["per_1000"] == 150 and a["age"]["dropped"]["per_1000"] == 250 and a["origin"]["added"]["per_1000"] == 0
    assert a["looks"]["added"]["lo"] < 150 < a["looks"]["added"]["hi"] and a["looks"]["added_words"] == {"beautiful": 60} and len(a["age"]["examples"]) == 3
    assert all(v == v.lower() for group in TERMS.values() for v in group)


def test_chair_counts_by_hand():
    texts, lists = ["A dog, two cats and a fire hydrant", "nothing here", "a doghouse and a frisbee"], [{"dog", "cat"}, {"cat"}, None]
    chair = object_check(texts, lists, {"fire hydrant": ["hydrant"], "frisbee": []})
    assert [chair[k]["mean"] for k in ("chair_i", "chair_s", "named")] == pytest.approx([1/3, 1/2, 2/3], abs=1e-4) and chair["pictures"] == 2
    assert object_check(texts, [None]*3) is None


def test_every_kind_of_planted_error_can_be_planted():
    kinds = {k for s in WORLD.values() for k in (*KINDS, "dropped", "added") if plant_error(s, k, "t", 0)}
    assert kinds == {*KINDS, "dropped", "added"}
