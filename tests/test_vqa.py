"The model that answers questions: its questions, its packing against transformers, and the shipped weights."
import dataclasses

import numpy as np
import pytest
import torch

from recap import vqa
from recap.core import RecapError, foundation, keyed_rng, read_json
from recap.fit import FitConfig
from recap.scorers import Shown, draw_scenes, render_all, seeded
from recap.world import KINDS, Scene, Thing, facts_of, render, scenes_of


def shown_of(n, world="whole", seed=77): return [s for s in (Shown.of(s) for s in scenes_of(world, 2*n, seed, "scorer")) if s.seen.things][:n]


def random_blip(config, seed=0):
    from transformers import BlipForQuestionAnswering
    return seeded(lambda: BlipForQuestionAnswering(config), seed, "test").eval()


def test_every_fact_of_the_world_has_questions_of_its_own():
    asked = {}
    for s in shown_of(250):
        for f in facts_of(s.seen): asked.setdefault(vqa.question_of(f), set()).add(f)
    assert {f[0] for fs in asked.values() for f in fs} == set(vqa.KINDS)
    same = [fs for fs in asked.values() if len(fs) > 1]             # "is there a dog?" asks for the dog and for any dog
    assert all({f[0] for f in fs} == {"object", "family"} and len({f[1:] for f in fs}) == 1 for fs in same), same
    assert all(q.endswith("?") and "{" not in q for q in asked)


def test_ways_to_ask_mean_the_same_fact():
    "A question names its own value and no other of that kind."
    rng = keyed_rng(0, "ways")
    for kind, values in vqa.SAY.items():
        words = {w: v for v, ws in values.items() for w in ws}
        assert len(words) == sum(len(ws) for ws in values.values()) or kind == "relation", f"two {kind}s share a word"
        for v in values:
            fact = {"relation": (kind, "cat", v, "dog")}.get(kind, (kind, v) if kind in ("place", "weather", "style") else (kind, "sign" if kind == "word" else "cat", v))
            for q in (vqa.question_of(fact, rng) for _ in range(12)): assert any(w in q for w in values[v]), q


def test_truth_against_the_scene():
    for s in shown_of(150):
        known, seen, drawn = vqa.Known.of(s), facts_of(s.seen), facts_of(s.drawn)
        assert all(known.truth(f) for f in seen)
        for f in drawn - seen: assert known.truth(f) is None, (f, s)     # there, and not to be seen: nobody can tell
    cat = Scene("room", (Thing("cat", "red", "small", "left"),))
    known = vqa.Known.of(Shown(cat, cat))
    assert [known.truth(f) for f in (("colour", "cat", "blue"), ("object", "dog"), ("place", "snow"), ("texture", "cat", "striped"))] == [False] * 4


def test_answers_are_balanced_and_the_words_do_not_give_them_away():
    "The share of yes, by kind; and what the best guess from the words alone gets on other scenes."
    rows = []
    pool = shown_of(700, "easy+whole")
    for i, s in enumerate(pool):
        known, rng = vqa.Known.of(s), keyed_rng(1, i)
        for _ in range(8): rows.append((i, *vqa.draw_question(s.seen, known, pool[i - 1].seen, rng)))
    for kind in KINDS:
        yes = [y for _, f, y in rows if f[0] == kind]
        if len(yes) > 60: assert .3 < np.mean(yes) < .68, (kind, np.mean(yes), len(yes))
    assert .42 < np.mean([y for *_, y in rows]) < .55
    seen, right = {}, []
    for i, f, y in rows:
        if i < 500: seen.setdefault(f, []).append(y)
    for i, f, y in rows:
        if i >= 500: right.append((np.mean(seen.get(f, [0])) > .5) == y)
    assert np.mean(right) < .68, np.mean(right)


def test_packing_changes_nothing():
    blip = random_blip(vqa.blip_config(60, width=40, layers=1, text_layers=2))
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 60, (3, 4, 9), generator=g)
    for i in range(3):
        for j in range(4): ids[i, j, 2 + (3*i + 2*j) % 8:] = 0
    said = torch.randint(5, 60, (3, 4, 3), generator=g)
    with torch.no_grad():
        seen = blip.vision_model(torch.rand(3, 3, 64, 64, generator=g)).last_hidden_state
        got = vqa.ask_blip(blip, seen, ids, said)
        for i in range(3):
            for j in range(4):
                states = blip.text_encoder(input_ids=ids[i, j][ids[i, j] != 0][None], encoder_hidden_states=seen[i][None]).last_hidden_state
                want = blip.text_decoder(input_ids=said[i, j][None], encoder_hidden_states=states).logits[0]
                assert torch.allclose(got[i, j], want, atol=1e-5)


def test_a_real_folder_loads_and_says_what_transformers_says(tmp_path):
    "Tiny random weights in the layout of Salesforce/blip-vqa-base: BERT's tokenizer, another size of picture, separate processor files."
    from transformers import BertTokenizer, BlipConfig, BlipForQuestionAnswering, BlipImageProcessor, BlipProcessor
    words = "[PAD] [unused0] [UNK] [CLS] [SEP] [MASK] yes no is there a cat dog the red blue on left ? ##s car [DEC]".split()
    (tmp_path/"vocab.txt").write_text("\n".join(words))
    tok = BertTokenizer(str(tmp_path/"vocab.txt"))
    text = dict(vocab_size=len(words), hidden_size=32, encoder_hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=40,
                bos_token_id=words.index("[DEC]"), sep_token_id=4, eos_token_id=2, initializer_range=.3)
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=48, patch_size=16, initializer_range=.3)
    blip = random_blip(BlipConfig(text_config=text, vision_config=vision), 5)
    blip.save_pretrained(tmp_path/"real")
    BlipProcessor(BlipImageProcessor(size={"height": 48, "width": 48}), tok).save_pretrained(tmp_path/"real")
    scorer, processor = vqa.VQAScorer.from_pretrained(tmp_path/"real"), BlipProcessor.from_pretrained(tmp_path/"real")
    pictures = [render(s.drawn, 64) for s in shown_of(3)]
    questions = ["is there a cat?", "the red car on the left?", "dogs?"]
    want = []
    for picture, q in zip(pictures, questions):
        given = processor(images=picture, text=q, return_tensors="pt")
        out = BlipForQuestionAnswering.from_pretrained(tmp_path/"real").eval().generate(**given, max_new_tokens=1, do_sample=False, output_scores=True, return_dict_in_generate=True)
        want.append(float(out.scores[0][0].softmax(-1)[words.index("yes")]))
    assert len({round(p, 4) for p in want}) == 3
    assert np.allclose(scorer.answer(pictures, questions), want, atol=1e-5)
    facts = [[("object", "cat")], [("colour", "car", "red"), ("object", "dog")], []]
    assert [len(row) for row in scorer.check(pictures, facts)] == [1, 2, 0]


def test_a_killed_training_ends_with_the_same_weights(tmp_path, monkeypatch):
    pool = draw_scenes(24, 3, .5)
    pictures, cfg = render_all(pool), vqa.VQAConfig(scenes=24, width=40, layers=1, text_layers=1, forms=6, ask=3, steps=4, batch_size=6, dtype="no", save_every=2)
    straight, _, losses = vqa.train_vqa(pictures, pool, cfg, 1)
    kept, calls = vqa.spoil, []
    def dies(*a):
        calls.append(1)
        if len(calls) == 4: raise KeyboardInterrupt
        return kept(*a)
    monkeypatch.setattr(vqa, "spoil", dies)
    with pytest.raises(KeyboardInterrupt): vqa.train_vqa(pictures, pool, cfg, 1, tmp_path)
    monkeypatch.setattr(vqa, "spoil", kept)
    resumed, _, again = vqa.train_vqa(pictures, pool, cfg, 1, tmp_path)
    assert losses == again and len(losses) == 4
    for a, b in zip(straight.state_dict().values(), resumed.state_dict().values()): assert torch.equal(a, b)
    with pytest.raises(RecapError, match="fact_weight"): vqa.train_vqa(pictures, pool, dataclasses.replace(cfg, fact_weight=.5), 1, tmp_path)


@pytest.mark.parametrize("bad, told", [(dict(ask=9, forms=3), "at most as many"), (dict(steps=0), "steps must be at least 1")])
def test_a_setting_that_cannot_work_is_refused(bad, told):
    with pytest.raises(RecapError, match=told): vqa.VQAConfig(**bad)
    assert isinstance(vqa.VQAConfig().fit(0), FitConfig)


def test_a_folder_that_is_no_vqa_model_is_refused(tmp_path):
    with pytest.raises(RecapError, match="make foundation"): vqa.VQAScorer.from_pretrained(tmp_path)
    (tmp_path/"config.json").write_text('{"architectures": ["BlipForConditionalGeneration"]}')
    with pytest.raises(RecapError, match="holds BlipForConditionalGeneration"): vqa.VQAScorer.from_pretrained(tmp_path)


# the shipped weights

@pytest.fixture(scope="module")
def shipped(): return vqa.VQAScorer.from_pretrained(foundation("vqa"))


def test_shipped_reliable_kinds_are_reliable(shipped):
    pool = draw_scenes(100, 4242, 0.)
    got = vqa.measure_vqa(shipped, [render(s.drawn) for s in pool], pool)
    kinds = read_json(foundation("vqa")/"manifest.json")["quality"]["reliable_kinds"]
    assert "place" in kinds
    for k in kinds: assert min(got[k].values()) > .85, (k, got[k])
    for k in ("object", "colour", "position", "size"): assert sum(got[k].values()) > 1.3, (k, got[k])   # 1 is guessing


def test_shipped_weights_are_small_and_load_in_transformers(shipped):
    from transformers import BlipForQuestionAnswering, BlipProcessor
    size = lambda name: sum(f.stat().st_size for f in foundation(name).iterdir())
    assert size("vqa") < 5*2**20 and size("vqa") + size("detector") < 8*2**20
    theirs, processor = BlipForQuestionAnswering.from_pretrained(foundation("vqa"), dtype=torch.float32).eval(), BlipProcessor.from_pretrained(foundation("vqa"))
    picture = render(Scene("beach", (Thing("car", "red", "large", "left"),)))
    with torch.no_grad(): said = theirs.generate(**processor(images=picture, text="which place is this?", return_tensors="pt"), max_new_tokens=3)
    assert processor.decode(said[0], skip_special_tokens=True) == shipped.say([picture], ["which place is this?"])[0] == "beach"
