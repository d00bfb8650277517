"Evaluation with painters and scorers whose answers are known."
import json, types
import numpy as np
import pytest
from PIL import Image
from recap import evaluate as ev
from recap.core import RecapError
from recap.corpus import open_corpus

class Blind:
    "A detector and scorer that sees only whether a picture is black."
    def dark(self, x): return np.asarray(x).mean() < 1
    def check(self, pictures, facts): return [[0.0 if self.dark(x) else 1.0 for _ in fs] for x, fs in zip(pictures, facts)]
    def score(self, pictures, texts): return np.array([0.0 if self.dark(x) else 0.3 for x in pictures])
    def image_features(self, pictures): return np.ones((len(pictures), 1))
    def text_features(self, texts): return np.ones((len(texts), 1))

@pytest.fixture(scope="module")
def truth(): return open_corpus("toy").truth()

@pytest.fixture
def arm(tmp_path, monkeypatch):
    "An arm folder whose painter paints black for odd seeds; it keeps what it was asked."
    calls = []
    class Painter:
        @classmethod
        def from_pretrained(cls, path, device): return cls()
        def paint(self, prompts, seeds, guidance_scale, num_inference_steps, batch_size):
            calls.append((list(prompts), list(seeds)))
            return np.stack([np.full((64, 64, 3), 0 if s % 2 else 200, np.uint8) for s in seeds])
    monkeypatch.setitem(__import__("sys").modules, "recap.train", types.SimpleNamespace(Painter=Painter))
    (tmp_path/"arm").mkdir(); (tmp_path/"arm"/"model.json").write_text("{}")
    return tmp_path/"arm", calls

def test_rows_are_json_and_the_same_twice(arm, tmp_path):
    cfg = ev.EvaluateConfig(model=str(arm[0]), prompts=12, repeats=2)
    a, b = (ev.evaluate(cfg, tmp_path/n, seed=3, detector=Blind(), scorer=Blind()) for n in "ab")
    assert json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    assert a["kind"] == "arm" and all(len(a["texts"][t]["rows"]) == 24 for t in ev.TEXTS)
    assert len(list((tmp_path/"a").glob("images/*/*.png"))) == 72
    for x in (tmp_path/"a").rglob("*.png"): assert x.read_bytes() == (tmp_path/"b"/x.relative_to(tmp_path/"a")).read_bytes()

def test_pictures_prompts_and_rows_belong_together(arm, tmp_path):
    ev_out = ev.evaluate(ev.EvaluateConfig(model=str(arm[0]), prompts=12, repeats=2), tmp_path/"o", detector=Blind(), scorer=Blind())
    prompts = {p["index"]: p for p in json.loads((tmp_path/"o"/"prompts.json").read_text())}
    for t in ev.TEXTS:
        for row in ev_out["texts"][t]["rows"]:
            black = Blind().dark(Image.open(tmp_path/"o"/"images"/t/f"{row['index']:05d}_{row['repeat']}.png"))
            assert row.get("painted", row["prompt"]) == prompts[row["index"]][t] and set(row["right"]) == {0 if black else 1}

def test_all_arms_get_the_same_noise_and_both_texts_the_same_prompts_as_the_ceiling(arm):
    ev.evaluate(ev.EvaluateConfig(model=str(arm[0]), prompts=12, repeats=2), seed=1, detector=Blind(), scorer=Blind())
    (people, seeds), (descriptive, again), (rewritten, once_more) = arm[1]
    assert seeds == again == once_more and len(set(seeds)) == 24
    real = ev.evaluate(ev.EvaluateConfig(model="real", prompts=12), seed=1, detector=Blind(), scorer=Blind())
    assert [r["prompt"] for r in real["texts"]["people"]["rows"]] == people[::2]
    assert [r["prompt"] for r in real["texts"]["descriptive"]["rows"]] == descriptive[::2]
    assert [r.get("painted", r["prompt"]) for r in real["texts"]["rewritten"]["rows"]] == rewritten[::2] != people[::2]

def test_a_rewritten_prompt_is_held_to_the_original(truth):
    wild = types.SimpleNamespace(rewrite=lambda prompts: [types.SimpleNamespace(text=f"a huge castle on fire, {p}") for p in prompts])
    asked = ev.ask(truth, 12, upsampler=wild)[0]
    assert all(q.prompts["rewritten"].startswith("a huge castle") and q.original("rewritten") == q.prompts["people"] and q.facts["rewritten"] == q.facts["people"] for q in asked)
    pictures = ev.corpus_pictures("toy", [q.key for q in asked])
    rows, plain = (ev.evaluate_text(pictures, asked, t, Blind(), Blind()) for t in ("rewritten", "people"))
    assert [{k: v for k, v in r.items() if k != "painted"} for r in rows] == plain and all(r["painted"] != r["prompt"] for r in rows)

def test_facts_asked_are_true_and_readable(truth):
    for q in ev.ask(truth, 30)[0]:
        for t in q.facts: assert q.facts[t] and set(q.facts[t]) <= set(truth[q.key][1])

def test_a_scorer_that_says_the_same_of_everything_earns_nothing(truth):
    asked = ev.ask(truth, 12)[0]
    rows = ev.evaluate_text(ev.corpus_pictures("toy", [q.key for q in asked]), asked, "people", Blind(), Blind())
    s = ev.summarise(rows)
    assert s["first"]["mean"] == 0 and s["facts"]["mean"] == 1 and s["floor"]["mean"] == 1 and s["kinds"]["count"]["mean"] is None

def test_a_corpus_without_truth_is_refused_in_one_line(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path/"a.png")
    with pytest.raises(RecapError, match="only 0 usable scenes") as e: ev.evaluate(ev.EvaluateConfig(corpus=str(tmp_path), prompts=2), detector=Blind(), scorer=Blind())
    assert "\n" not in str(e.value)

def test_unknown_models_and_settings_are_refused(tmp_path):
    with pytest.raises(RecapError, match="no trained model"): ev.paint(str(tmp_path), [], "people", ev.EvaluateConfig())
    with pytest.raises(RecapError, match="promts"): ev.EvaluateConfig.from_dict(dict(promts=3))
    with pytest.raises(RecapError, match="repeats must be at least 1"): ev.EvaluateConfig(repeats=0)
