"Questions about pictures: official files, the chunker on all official prompts, models in the real formats against transformers, servers, and what must be refused."
import json
import math
import os
import re
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recap import questions as q
from recap.core import RecapError, foundation, keyed_rng
from recap.scorers import Shown, seeded
from recap.servers import Loopback
from recap.vqa import VQAScorer
from recap.world import Scene, Thing, facts_of, render, scenes_of

pytestmark = pytest.mark.usefixtures("one_thread")
REAL = Path(os.environ.get("RECAP_REAL") or "/nowhere")/"t2i-compbench"
official = pytest.mark.skipif(not REAL.is_dir(), reason="T2I-CompBench's files: set RECAP_REAL")
PICTURES = [render(Scene("beach", (Thing("car", c, "large", "left"), Thing("dog", "blue", "large", "right")))) for c in ("red", "green", "yellow")]


class Fixed:
    "Answers that were written down before."
    room, whole = None, "{text}?"
    def __init__(self, rows): self.rows, self.asked = rows, None
    def answer(self, images, questions):
        self.asked = questions
        return [self.rows[i] for i in images]


def official_prompts(name): return [line.strip() for line in (REAL/f"dataset/{name}_val.txt").read_text().splitlines() if line.strip()]


# B-VQA

@official
def test_the_official_example_file(tmp_path):
    path = REAL/"reward/vqa_result.json"
    got = q.read_vqa_results(path)
    assert [r["score"] for r in got.rows] == [.7110, .9217, .8554]
    assert got.mean.mean == pytest.approx((.7110 + .9217 + .8554)/3, abs=1e-12)
    assert got.mean.lo <= got.mean.mean <= got.mean.hi and got.left_out == 0
    q.write_vqa_results(got.rows, tmp_path/"again.json")
    assert (tmp_path/"again.json").read_bytes() == path.read_bytes().strip()


def test_products_as_the_official_code_takes_them(tmp_path):
    "Its way: a table of eight columns filled up with 1, answers rounded to four places, products rounded again."
    rng = np.random.default_rng(0)
    rows = [rng.random(k).tolist() for k in (1, 2, 3, 8, 8)]
    prompts = [" and ".join(f"a {w}" for w in "cat dog car boat tree house ball cup bird".split()[:k]) for k in (1, 2, 3, 8, 9)]
    table = np.ones((5, 8))
    for i, r in enumerate(rows): table[i, :len(r)] = [float(f"{p:.4f}") for p in r]
    want = [float(f"{x:.4f}") for x in table.prod(1)]
    vqa = Fixed(rows)
    got = q.b_vqa(vqa, range(5), prompts, by="rules")
    assert [len(x) for x in vqa.asked] == [1, 2, 3, 8, 8] and vqa.asked[1] == ["a cat?", "a dog?"]   # the ninth phrase is not asked for, there as here
    assert np.allclose([r["score"] for r in got.rows], want, atol=2e-4)
    q.write_vqa_results(got.rows, tmp_path/"vqa_result.json")
    again = q.read_vqa_results(tmp_path/"vqa_result.json")
    assert again.mean.mean == pytest.approx(np.mean(want), abs=2e-4)
    assert json.loads((tmp_path/"vqa_result.json").read_text())[2]["question_id"] == 2


@pytest.mark.parametrize("text, told", [("{}", "no list"), ("[]", "no list"), ('[{"answer": "0.5"}]', "no question_id"), ('[{"question_id": 0, "answer": "1.5"}]', "no probability"),
                                        ('[{"question_id": 0, "answer": "nan"}]', "no probability"), ('[{"question_id": 0, "answer": "0.5"}, {"question_id": 0, "answer": "0.5"}]', "twice")])
def test_a_file_of_something_else_is_refused(tmp_path, text, told):
    (tmp_path/"x.json").write_text(text)
    with pytest.raises(RecapError, match=told): q.read_vqa_results(tmp_path/"x.json")


# noun phrases

@pytest.mark.parametrize("text, phrases", [
    ("a green bench and a blue bowl", ["a green bench", "a blue bowl"]),
    ("rubber gloves and leather gloves", ["rubber gloves", "leather gloves"]),
    ("A long, narrow yellow kitchen with black and white floor tiles.", ["A long, narrow yellow kitchen", "black and white floor tiles"]),
    ("a round pizza and a rectangular piece of lasagna", ["a round pizza", "a rectangular piece", "lasagna"]),
    ("The leather belt and fluffy hat hang on the metallic hook by the glass door.", ["The leather belt", "fluffy hat", "the metallic hook", "the glass door"]),
    ("The wooden spoon and metallic ladle stir the soup", ["The wooden spoon", "metallic ladle", "the soup"]),
    ("a cylindrical can of soup and a trophy stand", ["a cylindrical can", "soup", "a trophy stand"]),
    ("a black cat on the left of an orange", ["a black cat", "an orange"]),
    ("Two toilet stall, one blue and the other orange.", ["Two toilet stall"]),
    ("the other dog and her three big umbrellas", ["the other dog", "her three big umbrellas"]),
    ("A brightly coloured parrot sits quickly down", ["A brightly coloured parrot"]),
    ("hand cream", ["hand cream"]), ("an oval dining table", ["an oval dining table"]), ("", []), ("it is over there", []), ("11:44, and?", []), ("ein grünes Café", ["ein grünes Café"])])
def test_the_chunker_by_hand(text, phrases): assert q.chunk(text) == phrases


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60) | st.lists(st.sampled_from("a the two red orange other and , . of can stand cat dog reading brightly only sits on next to".split()), max_size=14).map(" ".join))
def test_phrases_of_any_text_are_pieces_of_it_in_order(text):
    at = 0
    for phrase in q.chunk(text):
        assert phrase and (at := text.index(phrase, at) + len(phrase))


@official
def test_the_chunker_on_all_900_validation_prompts(capsys):
    "Of the plain form \"a LOOK THING and a LOOK THING\" the phrases are known: what stands left and right of the and."
    plain = re.compile(r"((?:an?|the) [\w'-]+(?: (?!of\b|with\b|dominated\b)[\w'-]+){1,3}) and ((?:an?|the) [\w'-]+(?: (?!of\b|with\b|dominated\b)[\w'-]+){1,4})\.?", re.I)
    counts, known, odd = Counter(), 0, []
    for name in ("color", "shape", "texture"):
        prompts = official_prompts(name)
        assert len(prompts) == 300
        for p in prompts:
            found = q.chunk(p)
            assert found and all(x in p for x in found), p
            counts[len(found)] += 1
            if m := plain.fullmatch(p):
                known += 1
                if found != list(m.groups()): odd.append((p, found))
            elif len(found) < 2: odd.append((p, found))
            lower = p.lower()
            for colour in ("red", "green", "blue", "white", "wooden", "metallic", "fluffy", "rectangular", "triangular"):   # a look stays with its thing
                if name != "color" and re.search(rf"\b{colour} \w", lower): assert any(colour in x.lower() for x in found), (p, found)
    with capsys.disabled(): print(f"\n  900 prompts by noun phrases {dict(sorted(counts.items()))}; {known} of plain form; odd: {odd}")
    assert known > 600 and len(odd) <= 2 and counts[2] > 700 and max(counts) <= 8


def test_spacy_is_used_where_it_is(monkeypatch):
    fake = types.SimpleNamespace(load=lambda name: lambda text: types.SimpleNamespace(noun_chunks=[types.SimpleNamespace(text=f"{name}:{text}")]))
    q._spacy.cache_clear(); q.noun_phrases.cache_clear()
    monkeypatch.setitem(sys.modules, "spacy", fake)
    assert q.noun_phrases("a dog") == ("spacy", ("en_core_web_sm:a dog",)) and q.noun_phrases("a dog", "rules") == ("rules", ("a dog",))
    def missing(name): raise OSError("[E050] Can't find model 'en_core_web_sm'")
    for module in (None, types.SimpleNamespace(load=missing)):   # not installed; installed without its model
        q._spacy.cache_clear(); q.noun_phrases.cache_clear()
        monkeypatch.setitem(sys.modules, "spacy", module)
        assert q.noun_phrases("a dog") == ("rules", ("a dog",))
        with pytest.raises(RecapError, match="pip install spacy"): q.noun_phrases("a dog", "spacy")
    q._spacy.cache_clear(); q.noun_phrases.cache_clear()


# means over questions

def test_means_against_numpy_and_scipy():
    from scipy.stats import gmean
    rng = np.random.default_rng(1)
    rows = [rng.random(k).tolist() for k in rng.integers(1, 9, 30)] + [[0., .9], [1.]]
    asked = [["a dog?"] * len(r) for r in rows]
    am, gm = (q.soft_tifa(Fixed(rows), range(len(rows)), asked, geometric=g) for g in (False, True))
    assert np.allclose([r["score"] for r in am.rows], [np.mean(r) for r in rows])
    with np.errstate(divide="ignore"): assert np.allclose([r["score"] for r in gm.rows], [gmean(r) for r in rows])
    assert am.mean.mean == pytest.approx(np.mean([np.mean(r) for r in rows]))


def test_dsg_against_the_definition():
    "Random graphs; numbers from 1 and 0 for \"needs none\", as in DSG's files."
    rng = np.random.default_rng(2)
    for _ in range(50):
        k = int(rng.integers(1, 8))
        parents = {i: sorted({int(j) for j in rng.integers(0, i, 2)} - {0}) or [0] for i in range(1, k + 1)}
        said = {i: "yes" if rng.random() < .6 else "no" for i in range(1, k + 1)}
        want = sum(said[i] == "yes" and not any(p and said[p] == "no" for p in parents[i]) for i in said)/k
        asked = [q.Asked(f"is {i} there?", tuple(p - 1 for p in parents[i] if p)) for i in said]
        assert q.dsg(Fixed([[float(a == "yes") for a in said.values()]]), [0], [asked]).mean.mean == pytest.approx(want)


def test_facts_of_the_whole_world_become_graphs():
    for s in [Shown.of(s) for s in scenes_of("whole", 60, 5, "scorer")]:
        facts = facts_of(s.seen)
        asked = q.fact_questions(facts)
        assert {a.fact for a in asked} >= facts
        for i, a in enumerate(asked):
            assert all(n < i and asked[n].fact[0] in ("object", "family") and asked[n].fact[1] in a.fact for n in a.needs), a
            assert len(a.needs) == {"relation": 2, "object": 0, "family": 0, "place": 0, "weather": 0, "style": 0}.get(a.fact[0], 1)


def test_missing_answers_are_left_out_and_counted():
    rows = [[.5, .5], [math.nan, 1.], [1., 1.]]
    asked = [["a dog?", "a cat?"]] * 3
    for got in (q.soft_tifa(Fixed(rows), range(3), asked), q.dsg(Fixed(rows), range(3), [[q.Asked("a dog?"), q.Asked("a cat?")]] * 3), q.b_vqa(Fixed(rows), range(3), ["a dog and a cat"] * 3)):
        assert got.left_out == 1 and got.rows[1]["score"] is None
    assert q.soft_tifa(Fixed(rows), range(3), asked, groups=["x", "y", "x"]).mean.mean == .75
    with pytest.raises(RecapError, match="none of 1 pictures has a score"): q.soft_tifa(Fixed(rows), [1], [asked[0]])
    with pytest.raises(RecapError, match="2 labels for 3 pictures"): q.soft_tifa(Fixed(rows), range(3), asked, groups=["x", "y"])
    with pytest.raises(RecapError, match="gave 2 answers to 1 questions"): q.soft_tifa(Fixed(rows), [0], [["a dog?"]])


@pytest.mark.parametrize("metric", [q.b_vqa, q.vqa_score, q.soft_tifa, q.dsg])
def test_numbers_that_differ_are_an_error(metric):
    asked = ["a dog"] * 2 if metric in (q.b_vqa, q.vqa_score) else [[q.Asked("a dog?")]] * 2
    with pytest.raises(RecapError, match="3 pictures for 2"): metric(Fixed([]), range(3), asked)


def test_long_texts_are_split_without_losing_a_word():
    class Counts(Fixed):
        room = 7
        def tokens(self, text): return len(text.split())
    rng = keyed_rng(0, "split")
    for _ in range(60):
        text = " ".join(w + rng.choice(["", "", "", ",", "."]) for w in rng.choices("red dog car boat small on the".split(), k=rng.randrange(1, 40)))
        vqa = Counts([[.25] * 40])
        parts = q._parts(text, lambda t: vqa.tokens(t) <= 7)
        assert re.findall(r"\w+", " ".join(parts)) == re.findall(r"\w+", text) and all(vqa.tokens(p) <= 7 for p in parts)
    row = [[.25, 1.]]
    assert q.vqa_score(Counts(row), [0], ["a red dog on the beach, and a blue car in the snow"], long="split").mean.mean == pytest.approx(.5)
    with pytest.raises(RecapError, match="long='split'"): q.vqa_score(Counts(row), [0], ["a red dog on the beach, and a blue car in the snow"])
    assert q.LIN_QUESTION.replace("{text}", "a dog") == 'Does this figure show "a dog"? Please answer yes or no.'


# models in the real formats, with tiny random weights

WORDS = "[PAD] [unused0] [UNK] [CLS] [SEP] [MASK] yes no is there a cat dog the red blue on left ? ##s car".split()


def make_blip_vqa(folder, last):
    "As Salesforce/blip-vqa-base lies on disk: BERT's tokenizer, a processor, safetensors."
    from transformers import BertTokenizer, BlipConfig, BlipForQuestionAnswering, BlipImageProcessor, BlipProcessor
    words = [*WORDS, *last]
    (folder/"vocab.txt").write_text("\n".join(words))
    tok = BertTokenizer(str(folder/"vocab.txt"))
    text = dict(vocab_size=len(words), hidden_size=32, encoder_hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=40,
                bos_token_id=words.index("[DEC]"), sep_token_id=4, eos_token_id=2, initializer_range=.3)
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=48, patch_size=16, initializer_range=.3)
    seeded(lambda: BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=vision)), 5, "test").save_pretrained(folder/"real")
    BlipProcessor(BlipImageProcessor(size={"height": 48, "width": 48}), tok).save_pretrained(folder/"real")
    return folder/"real"


ASKED = [["is there a cat?", "the red car on the left?", "dogs?"], [], ["a blue dog?"]]


@pytest.mark.parametrize("last", [["[DEC]"], ["[DEC]", "[ENC]"]], ids=["as transformers asks", "as Salesforce asks"])
def test_a_blip_folder_says_what_transformers_says(tmp_path, last):
    from transformers import BlipForQuestionAnswering, BlipProcessor
    vqa = q.open_vqa(make_blip_vqa(tmp_path, last), "cpu")
    blip, processor = BlipForQuestionAnswering.from_pretrained(tmp_path/"real").eval(), BlipProcessor.from_pretrained(tmp_path/"real")
    want = []
    for picture, qs in zip(PICTURES, ASKED):
        want.append([])
        for question in qs:
            given = processor(images=picture, text=question, return_tensors="pt")
            if len(last) == 2: given["input_ids"][0, 0] = len(WORDS) + 1
            out = blip.generate(**given, max_new_tokens=1, do_sample=False, output_scores=True, return_dict_in_generate=True)
            yes, no = out.scores[0][0][[WORDS.index("yes"), WORDS.index("no")]].softmax(-1).tolist()
            want[-1].append(yes)
    got = vqa.answer(PICTURES, ASKED)
    assert [len(r) for r in got] == [3, 0, 1] and len({round(p, 3) for r in want for p in r}) >= 3
    for a, b in zip(got, want): assert np.allclose(a, b, atol=1e-5)
    assert np.allclose(vqa.answer(PICTURES, ASKED, batch_size=1)[0], want[0], atol=1e-5)
    with pytest.raises(RecapError, match="the model reads 40"): vqa.answer(PICTURES[:1], [["the dog on the left is the dog on the right " * 5]])
    with pytest.raises(RecapError, match="3 pictures for 1"): vqa.answer(PICTURES, [["a dog?"]])


def test_a_model_that_is_told_in_words(tmp_path):
    "A LLaVA: questions of different length in one batch, against one forward pass each."
    from test_captioners import make_llava
    from transformers import AutoModelForImageTextToText, AutoProcessor
    model, processor = seeded(lambda: make_llava(tmp_path), 3, "test")
    model.save_pretrained(tmp_path/"llava"); processor.save_pretrained(tmp_path/"llava")
    vqa = q.open_vqa(tmp_path/"llava", "cpu")
    asked = [["a cat?", "is there a very long red car on the left of the picture?"], ["Is it a dog? Answer yes or no."]]
    got = vqa.answer(PICTURES[:2], asked)
    model, processor = AutoModelForImageTextToText.from_pretrained(tmp_path/"llava").eval(), AutoProcessor.from_pretrained(tmp_path/"llava")
    words = processor.tokenizer
    first = lambda w: {words(s + f, add_special_tokens=False).input_ids[0] for s in ("", " ") for f in (w, w.title(), w.upper())}
    yes, no = first("yes") - first("no"), first("no") - first("yes")
    told = q.question_prompts()["answer"]
    for picture, qs, ps in zip(PICTURES, asked, got):
        for question, p in zip(qs, ps):
            text = question if "yes or no" in question else told.replace("{question}", question)
            chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]
            given = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
            with torch.no_grad(): out = model(**given).logits[0, -1].softmax(-1)
            a, b = (float(out[sorted(ids)].sum()) for ids in (yes, no))
            assert p == pytest.approx(a/(a + b), abs=1e-4)


def test_a_model_that_takes_no_instruction_is_refused(tmp_path):
    from test_captioners import make_git
    model, processor = make_git(tmp_path)
    model.save_pretrained(tmp_path/"git"); processor.save_pretrained(tmp_path/"git")
    with pytest.raises(RecapError, match="no chat template"): q.open_vqa(tmp_path/"git", "cpu")


def test_sources():
    vqa = q.open_vqa("", "cpu")
    assert isinstance(vqa, q.BlipVQA) and vqa.whole == "{text}?" and q.open_vqa(vqa) is vqa and isinstance(q.open_vqa(vqa.scorer), q.BlipVQA)
    assert isinstance(vqa.scorer, VQAScorer)
    for source in ("no/such/folder", foundation("vae")):
        with pytest.raises(RecapError, match="answers no questions"): q.open_vqa(source)


@official
def test_the_official_samples_get_scores():
    "Pictures of other sizes, the prompts from their names; with our small model the numbers mean nothing."
    from PIL import Image
    files = sorted((REAL/"samples").glob("*.png"), key=lambda f: int(f.stem.rsplit("_", 1)[1]))
    got = q.b_vqa(q.open_vqa("", "cpu"), [Image.open(f) for f in files], [f.stem.rsplit("_", 1)[0] for f in files], by="rules")
    assert got.rows[0]["phrases"] == ("a green bench", "a blue bowl") and all(0 <= r["score"] <= 1 and len(r["p"]) == 2 for r in got.rows)


# servers

def test_a_server_with_logprobs_is_read_and_not_paid_twice(tmp_path):
    def say(body, n):
        answer, top = Loopback.reply("No."), [{"token": t, "logprob": math.log(p)} for t, p in (("No", .5), (" no", .1), ("Yes", .3), ("Maybe", .1))]
        answer["choices"][0]["logprobs"] = {"content": [top[0] | {"top_logprobs": top}, {"token": ".", "logprob": -.1, "top_logprobs": []}]}
        return answer
    with Loopback(say) as server:
        ask = lambda: q.open_vqa(f"{server.url}?cache={tmp_path}#toy").answer(PICTURES[:2], [["a dog?", "a cat?"], []])
        first, again = ask(), ask()
    assert first == again and len(server.requests) == 2
    assert first[0] == pytest.approx([.3/.9] * 2) and first[1] == []
    assert server.requests[0]["logprobs"] is True and "a dog?" in json.dumps(server.requests)


@pytest.mark.parametrize("text, p", [("yes", 1.), ("No.", 0.), ("Yes, there is a dog.", 1.), ("I cannot tell", None), ("No image was given", None), ("", None), ("yes no", None)])
def test_a_server_without_logprobs(text, p):
    with Loopback(lambda body, n: text) as server:
        vqa = q.open_vqa(f"{server.url}?cache=&logprobs=false&retries=0#toy")
        got = vqa.answer(PICTURES[:1], [["a dog?"]])[0][0]
    assert math.isnan(got) if p is None else got == p
    assert vqa.unread == (p is None) and "logprobs" not in server.requests[0]


def test_a_server_that_fails_at_times():
    def say(body, n): return (400, {"Content-Type": "application/json"}, b'{"error": {"message": "bad picture"}}') if "a cat?" in json.dumps(body) else "yes"
    with Loopback(say) as server: got = q.soft_tifa(q.open_vqa(f"{server.url}?cache=#toy"), PICTURES, [["a dog?"], ["a cat?"], ["a car?"]])
    assert (got.left_out, got.mean.mean, got.rows[1]["score"]) == (1, 1., None)


def test_a_server_that_knows_no_logprobs_says_so_in_one_line():
    def say(body, n): return (400, {"Content-Type": "application/json"}, b'{"error": {"message": "logprobs is not supported"}}') if body.get("logprobs") else "yes"
    with Loopback(say) as server:
        with pytest.raises(RecapError, match=r"logprobs is not supported.*\?logprobs=false"): q.open_vqa(f"{server.url}?cache=#toy").answer(PICTURES[:1], [["a dog?"]])
        assert q.open_vqa(f"{server.url}?cache=&logprobs=false#toy").answer(PICTURES[:1], [["a dog?"]]) == [[1.]]


def test_a_refusal_is_no_answer():
    with Loopback(lambda body, n: Loopback.reply("", refusal="I will not.") if n else Loopback.reply("no", finish="content_filter")) as server:
        vqa = q.open_vqa(f"{server.url}?cache=&logprobs=false&retries=0&concurrency=1#toy")
        assert np.isnan(vqa.answer(PICTURES[:1], [["a dog?", "a cat?"]])).all() and vqa.unread == 2


def test_questions_from_a_language_model():
    good = '[{"question": "are there cups?", "needs": []},\n {"question": "are the cups red?", "needs": [1]}]'
    replies = {"one": good, "two": f"```json\n{good}\n```", "three": "1. are there cups?", "four": good[:-1], "five": good.replace("[1]", "[2]"), "six": f"Here you are: {good}"}
    with Loopback(lambda body, n: replies[body["messages"][0]["content"].split()[-1]]) as server:
        got = q.write_questions(list(replies), f"{server.url}?cache=#toy")
    want = [q.Asked("are there cups?"), q.Asked("are the cups red?", (0,))]
    assert got[:2] == [want, want] and got[2:5] == [None] * 3 and got[5] in (None, want)   # what the server page unwraps is unwrapped
    score = q.dsg(Fixed([[0., 1.]] * 6), range(6), got)
    assert score.left_out == sum(x is None for x in got) and score.mean.mean == 0
    assert "two red cups beside a plate" in server.requests[0]["messages"][0]["content"]
