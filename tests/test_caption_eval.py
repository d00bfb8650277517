"What captions tell, miss and invent, against errors that were planted."
import pytest
from recap.caption_eval import CaptionEvalConfig, evaluate_captions, score_column, share_interval
from recap.core import RecapError, keyed_rng
from recap.language import descriptive_caption
from recap.reader import one_way
from recap.scorers import change_one
from recap.statistics import bootstrap_ratio
from recap.world import KINDS, WorldConfig, facts_of, sample_scene, visible_scene


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
        assert score["hallucination"]["mean"] == 0 and score["coverage"]["mean"] > 0.8
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


def test_relations_are_counted_one_way():
    pair = next(k for k, s in SCENES.items() if len({t.position for t in s.things}) == 2)
    a, b = (t.noun for t in SCENES[pair].things)
    score = score_column({pair: f"the {b} is left of the {a}."}, {pair: TRUTH[pair]})
    assert score["hallucination_by_kind"]["relation"] == {"mean": 1.0, "lo": 1.0, "hi": 1.0, "of": 1}
    assert sum(f[0] == "relation" for f in one_way(TRUTH[pair][1])) == 1


def test_missing_captions_are_missed_not_left_out():
    half = {k: v for i, (k, v) in enumerate(told().items()) if i % 2}
    score = score_column({**half, **{k: None for k in list(SCENES)[::4]}}, TRUTH)
    assert score["captions"] == 40 and score["empty"] == 20 and 0.3 < score["coverage"]["mean"] < 0.65


def test_interval_is_the_one_of_the_statistics_page():
    part, whole = [1, 4, 2, 0, 5, 3, 3, 2] * 6, [3, 5, 4, 2, 5, 6, 3, 4] * 6
    ours, theirs = share_interval(part, whole, n=8000), bootstrap_ratio(part, whole, n=8000, seed=9)
    assert ours["mean"] == pytest.approx(theirs.mean, abs=1e-4)
    assert ours["lo"] == pytest.approx(theirs.lo, abs=0.01) and ours["hi"] == pytest.approx(theirs.hi, abs=0.01)


def test_results_are_ready_for_the_report():
    results = evaluate_captions(CaptionEvalConfig(n=20, examples=3))
    assert [len(results["styles"]), len(results["examples"])] == [3, 3]
    assert set(results["examples"][0]["styles"]["dsc"]) == {"caption", "told", "missed", "invented", "unread"}
    assert all(results["styles"][s]["captions"] == 20 for s in results["styles"])


def test_a_corpus_without_truth_is_refused(tmp_path):
    from PIL import Image
    Image.new("RGB", (64, 64)).save(tmp_path/"a.png")
    with pytest.raises(RecapError, match="no truth"): evaluate_captions(CaptionEvalConfig(corpus=str(tmp_path)))
