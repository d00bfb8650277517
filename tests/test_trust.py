"The check of the scorers: what it measures, what it excludes, and that the report obeys."
import numpy as np
import pytest

from recap import claims, results, trust
from recap.scorers import Shown
from recap.vqa import Known
from recap.world import KINDS, facts_of, render, scenes_of


@pytest.fixture(scope="module")
def shown(): return [s for s in (Shown.of(s) for s in scenes_of("easy", 40, 5, "test")) if s.seen.things][:16]


class Judge:
    "Right about everything but a share of one kind of fact."
    def __init__(self, shown, kind, wrong, seed=0): self.of, self.kind, self.wrong, self.rng = shown, kind, wrong, np.random.default_rng(seed)
    def check(self, pictures, facts):
        truth = [[Known.of(s).truth(f) for f in row] for s, row in zip(self.of, facts)]
        return [[float(t != (f[0] == self.kind and self.rng.random() < self.wrong)) for f, t in zip(row, ts)] for row, ts in zip(facts, truth)]


def test_a_judge_is_measured_as_wrong_as_it_is(shown):
    table = trust.by_kind(trust.judge(Judge(shown, "colour", .3), shown, shown))
    assert abs(table["colour"]["mean"] - .7) < .17 and table["colour"]["lo"] < .7 < table["colour"]["hi"]
    assert all(v["mean"] == v["lo"] == v["hi"] == 1 for k, v in table.items() if k != "colour")
    assert trust.excluded_kinds({"rendered": table}) == ["colour"]
    assert {k: v["n_true"] for k, v in table.items()} == {k: sum(f[0] == k for s in shown for f in facts_of(s.seen)) for k in table}


def test_balance_does_not_depend_on_how_many_of_each_are_asked():
    rng = np.random.default_rng(0)
    true = np.array([True]*300 + [False]*40)
    right = np.where(true, rng.random(340) < .9, rng.random(340) < .6)
    got = trust.balanced(np.arange(340), true, right)
    assert got.mean == pytest.approx((right[true].mean() + right[~true].mean())/2)
    spread = 1.96*np.sqrt(.9*.1/300 + .6*.4/40)/2                      # of the mean of two independent shares
    assert (got.hi - got.lo)/2 == pytest.approx(spread, rel=.25)


def test_painting_over_is_keyed_and_stays_near(shown):
    painter = trust.Painter.from_pretrained()
    real = np.stack([np.asarray(render(s.drawn)) for s in shown[:4]])
    a, b, c = (trust.paint_over(real, painter, .2, seed) for seed in (1, 1, 2))
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    alone = trust.paint_over(real[:2], painter, .2, 1)                 # in whatever batch
    assert np.abs(alone.astype(int) - a[:2]).max() <= 1
    far = [np.abs(trust.paint_over(real, painter, t, 1).astype(int) - real).mean() for t in (.05, .3, .9)]
    assert far == sorted(far) and far[0] < 8


def test_the_report_leaves_out_what_the_check_excludes():
    study = {"trust": dict(results=dict(least=.9, excluded=dict(detector=["size"], clip_scorer=["relation"], vqa=[])), run={})}
    assert claims.readable_kinds(study) == [k for k in KINDS if k != "size"]
    told = results._trust_sentence(study)
    assert "detector: size" in told and "clip scorer: relation" in told and "vqa: nothing" in told and "90 %" in told
    assert results._trust_sentence({}) == "" and claims.readable_kinds({}) == list(KINDS)
