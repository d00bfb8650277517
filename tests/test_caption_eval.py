"What captions tell, miss and invent, against errors that were planted."
import pytest
from recap.caption_eval import CaptionEvalConfig, evaluate_captions, plant, score_column, share_interval
from recap.core import RecapError, keyed_rng
from recap.language import descriptive_caption, one_way
from recap.statistics import bootstrap_ratio
from recap.world import KINDS, WorldConfig, sample_scene, visible_facts

SCENES = {("0", f"{i:03d}"): sample_scene(11, i, WorldConfig(max_things=2, max_count=2), split="scorer") for i in range(40)}
TRUTH = {k: (s, visible_facts(s, 64)) for k, s in SCENES.items()}


def told(lies=()):
    "Descriptive captions; of the keys in `lies` they describe a scene with one fact of that kind made wrong."
    lies = dict(lies)
    return {k: descriptive_caption(plant(s, lies[k], keyed_rng(0, *k)) if k in lies else s, keyed_rng(1, *k), bank="people") for k, s in SCENES.items()}


def test_true_captions_invent_nothing():
    score = score_column(told(), TRUTH)
    assert score["hallucination"]["mean"] == 0 and score["coverage"]["mean"] > 0.85
    assert score["coverage_by_kind"]["place"]["mean"] == 1 and score["empty"] == 0


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "relation"])
def test_each_planted_lie_is_counted_once_under_its_kind(kind):
    keys = [k for k in sorted(SCENES)][:10]
    score = score_column(told({k: kind for k in keys}), TRUTH)
    bad = score["hallucination_by_kind"][kind]
    assert round(bad["mean"] * bad["of"]) >= 9                        # a lie the words leave out is no lie
    others = [k for k in KINDS if k != kind and k not in ("object", "relation")]
    if kind not in ("object", "position"):                            # another noun brings its attributes, another side its relations
        assert all(score["hallucination_by_kind"].get(k, {"mean": 0})["mean"] == 0 for k in others)


def test_relations_are_counted_one_way():
    pair = next(k for k, s in SCENES.items() if len(s.things) == 2)
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
