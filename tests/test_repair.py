"Selecting and mending captions: with a judge that knows the truth, with one that is wrong, and with replies as servers send them."
import re

import numpy as np
import pytest
from recap.caption_eval import score_facts
from recap.core import RecapError, keyed_rng
from recap.language import alt_text, descriptive_caption, short_caption
from recap.reader import compare, one_way, read_facts
from recap.repair import Beliefs, RepairConfig, best_of, cuts, drop_denied, ground, rewrite_all, rewriter, score_methods, tidy, _general
from recap.scorers import change_one
from recap.servers import Loopback, Server, ServerConfig, message
from recap.world import WorldConfig, facts_of, nouns, sample_scene, visible_scene

WORLDS = [WorldConfig.parse(w) for w in ("easy", "whole,words=0.5")]
SCENES = [visible_scene(sample_scene(21, i, WORLDS[i % 2], split="test"), 64) for i in range(80)]
TRUTH = [(s, facts_of(s)) for s in SCENES]
LIES = [descriptive_caption(change_one(s, keyed_rng(3, i)), keyed_rng(4, i)) for i, s in enumerate(SCENES)]   # one fact of each is wrong


class Knows:
    "A judge that knows the truth, or (p below one half) says the opposite."
    def __init__(self, truth, p=.98): self.truth, self.p = [f | {("family", nouns()[x[1]].family) for x in f if x[0] == "object"} for f in truth], p
    def check(self, images, facts): return [[self.p if f in self.truth[i] else 1 - self.p for f in row] for i, row in zip(images, facts)]


def beliefs(texts, p=.98): return Beliefs(Knows([f for _, f in TRUTH], p), range(len(TRUTH)), texts)


def test_a_judge_that_knows_takes_out_every_lie_and_nothing_else():
    b = beliefs([[t] for t in LIES])
    mended = [drop_denied(t, lambda text, i=i: b.gain(i, text)) for i, t in enumerate(LIES)]
    before, after = score_facts(LIES, TRUTH), score_facts(mended, TRUTH)
    assert before["hallucination"]["mean"] > .08 and after["hallucination"]["mean"] < .005
    assert after["coverage"]["mean"] > before["coverage"]["mean"] - .02
    assert [t for t, m in zip(LIES, mended) if not compare(t, TRUTH[LIES.index(t)][1]).invented and t != m] == []


def test_a_judge_that_is_wrong_makes_it_worse():
    b = beliefs([[t] for t in LIES], p=.02)
    worse = score_facts([drop_denied(t, lambda text, i=i: b.gain(i, text)) for i, t in enumerate(LIES)], TRUTH)
    before = score_facts(LIES, TRUTH)
    assert worse["coverage"]["mean"] < .7*before["coverage"]["mean"] and worse["hallucination"]["mean"] > before["hallucination"]["mean"]


def test_what_a_cut_leaves_is_a_sentence():
    bad, n = re.compile(r"\b(is|are|the|a|an|of|and|while|with)[.,;]|,[.,;]|\b(is|are) and\b|\.\.| ,|  |\ba [aeio]|there there|is there is", re.I), 0
    for i, s in enumerate(SCENES):
        for write in (descriptive_caption, short_caption):
            text = write(s, keyed_rng(0, i))
            for cut in cuts(text):
                if not _general(one_way(read_facts(cut).facts)) <= _general(one_way(read_facts(text).facts)): continue
                n += 1
                assert not bad.search(cut) and not cut[0].islower() and cut[-1] == ".", (text, cut)
    assert n > 800


def test_captions_of_other_kinds_survive():
    for text in ("", "a red dog", "IMG_2041.jpg", "Une maison bleue!", "No stop, no capital, and a comma,"):
        assert drop_denied(text, lambda t: 0.) == text
        assert isinstance(tidy(text), str) and isinstance(ground(text, "Sale ends today!"), str)


def test_grounding_with_a_judge_that_knows_adds_nothing_false():
    alts = [alt_text(s, keyed_rng(5, i)) for i, s in enumerate(SCENES)]
    plain = [short_caption(s, keyed_rng(6, i)) for i, s in enumerate(SCENES)]
    b = beliefs(list(zip(plain, alts)))
    fused = [ground(t, a, lambda f, i=i: b.of(i, f)) if a else t for i, (t, a) in enumerate(zip(plain, alts))]
    before, after = score_facts(plain, TRUTH), score_facts(fused, TRUTH)
    assert after["coverage"]["mean"] > before["coverage"]["mean"] + .03 and after["hallucination"]["mean"] == 0
    assert sum(a != t for a, t in zip(fused, plain)) > 15


def test_names_and_lettering_come_from_the_alt_text():
    named = signs = 0
    for i, (s, truth) in enumerate(TRUTH):
        for t in s.things:
            family = nouns()[t.noun].family
            if family != t.noun and family in nouns() and sum(nouns()[x.noun].family == family for x in s.things) == 1:
                done = ground(f"A {t.colour} {family} is in the picture.", f"our {t.noun}")
                assert ("object", t.noun) in compare(done, truth).told and ("colour", t.noun, t.colour) in compare(done, truth).told
                named += 1
            if t.word:
                assert ("word", t.noun, t.word) in compare(ground("A sign stands here.", f'"{t.word}" on a sign'), truth).told
                signs += 1
    assert named >= 8 and signs >= 5


def test_a_species_that_the_judge_sees_is_not_overruled():
    believe = lambda f: .9 if f == ("object", "poodle") else .7
    assert "poodle" in ground("A white poodle.", "dachshund", believe) and "dachshund" in ground("A white poodle.", "dachshund")


def test_selection_takes_the_best_and_scores_say_so():
    rows = [[dict(caption=c) for c in (LIES[i], descriptive_caption(s, keyed_rng(4, i)), short_caption(s, keyed_rng(4, i)))] for i, s in enumerate(SCENES)]
    b = beliefs([[r["caption"] for r in row] for row in rows])
    gain = np.array([[b.gain(i, r["caption"]) for r in row] for i, row in enumerate(rows)])
    scored = score_methods({"greedy": [row[0]["caption"] for row in rows], "chosen": best_of(rows, gain, 3), "first": best_of(rows, gain, 1), "worst": best_of(rows, -gain, 3)}, TRUTH)
    assert scored["chosen"]["hallucination"]["mean"] < .01 and scored["chosen"]["hallucination_gained"]["hi"] < 0 < scored["chosen"]["coverage_gained"]["lo"]
    assert scored["first"]["coverage_gained"] == {"mean": 0., "lo": 0., "hi": 0.} and scored["first"]["changed"]["mean"] == 0
    assert scored["worst"]["coverage_gained"]["hi"] < 0


def test_a_server_can_be_the_rewriter():
    said = ["Caption: A red dachshund called Wally.", "I'm sorry, but I can't assist with that.", "A dog. " * 60]
    with Loopback(lambda body, i: said[min(i, 2)]) as there:
        server = Server(ServerConfig(url=there.url, cache="", concurrency=1))
        out, kept = rewrite_all(["A red dog."]*3, ["Wally the dachshund"]*3, rewriter(lambda prompt: server.ask([message(prompt)]).text))
        assert "Wally the dachshund" in str(there.requests[0]) and "A red dog." in str(there.requests[0])
    assert out == ["A red dachshund called Wally.", "A red dog.", "A red dog."] and sum(kept.values()) == 2 and "refusal" in kept


def test_settings_are_checked():
    for wrong in (dict(ks="0,1"), dict(ks=""), dict(n=1)):
        with pytest.raises(RecapError): RepairConfig(**wrong)
    with pytest.raises(RecapError, match="must pair up"): rewrite_all(["a"], [], ground)
