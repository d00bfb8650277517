"What 19_upsample cannot show on a page: planted errors, kills, a server's faults, files that go on, the shipped weights, the command, a real `transformers serve`."
import copy
import dataclasses
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("openai")
from recap import upsample
from recap.command import run_command
from recap.core import RecapError, foundation, keyed_rng, keyed_torch, read_json
from recap.language import descriptive_caption
from recap.reader import one_way, read_facts, same_things
from recap.scorers import change_one
from recap.servers import Loopback, ServerConfig, Stopped
from recap.text import train_tokenizer
from recap.upsample import Check, Rewrite, ServerUpsampler, UpsampleConfig, Upsampler, overrule, phrase_of, rewrite_file
from recap.world import facts_of, scenes_of

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = UpsampleConfig(pairs=60, world="easy+whole", width=32, layers=1, heads=2, vocab_size=500, steps=6, batch_size=8, dtype="no", save_every=2)
GOOD = "A small red cat sits on the left of a wide sandy beach, and a large yellow boat is on the right at sunset."


# --- the checker

def test_the_checker_finds_planted_errors_and_nothing_else():
    alarms, found, planted = 0, 0, 0
    for i, scene in enumerate(scenes_of("easy+middle+whole", 400, 31, "test")):
        rng = keyed_rng(5, i)
        prompt, true = upsample.short_prompt(scene, rng).lower(), descriptive_caption(scene, rng)
        c, asked = Check.of(prompt, true), one_way(read_facts(prompt).facts)
        alarms += bool(c.lost or c.contradicted or c.muddled)
        told = sorted({f[0] for f in asked} & {"colour", "place", "size", "texture", "weather", "style", "count", "object"})
        if not told or not (other := change_one(scene, rng, rng.choice(told))): continue
        if asked <= one_way(same_things(facts_of(other), asked)): continue       # the change was made to a thing that the prompt does not name
        wrong = Check.of(prompt, descriptive_caption(other, rng))
        planted, found = planted + 1, found + bool(wrong.lost or wrong.contradicted)
    assert planted > 200 and found >= .98*planted and alarms <= 4, (planted, found, alarms)


def test_facts_become_a_phrase_and_facts_again():
    same = 0
    for i, scene in enumerate(scenes_of("easy+whole", 200, 8, "test")):
        asked = overrule(upsample.short_prompt(scene, keyed_rng(1, i)))
        again = one_way(read_facts(phrase_of(asked)).facts)
        same += asked == again
    assert same >= 190, same


def test_each_instruction_overrules_what_was_said_before():
    facts = overrule("a red cat on a beach", "make the cat blue", "put it in the snow at night", "the cat is green")
    assert {f for f in facts if f[0] in ("colour", "place", "weather")} == {("colour", "cat", "green"), ("place", "snow"), ("weather", "night")}


# --- the model

def test_only_the_caption_is_learnt(monkeypatch):
    caught = {}
    def look(model, loss_of, n, cfg, *a, **k): caught.update(model=model, loss_of=loss_of); return {"ema": model.state_dict(), "loss": []}
    monkeypatch.setattr(upsample, "fit", look)
    model, tok, _ = upsample.train_upsampler(TINY, 3)
    pairs, rows, losses = upsample.lessons(TINY.pairs, TINY.world, 3), [4, 9, 11], []
    with torch.no_grad():
        got = caught["loss_of"](model, 0, rows, None)
        for i in rows:      # one by one, without padding, by the book
            prompt, caption = (torch.tensor(x) for x in (upsample.prompt_ids(tok, pairs[i][0]), tok.encode(pairs[i][1]).ids + [1]))
            logits = model(input_ids=torch.cat([prompt, caption])[None]).logits[0]
            losses.append(F.cross_entropy(logits[len(prompt) - 1:-1], caption, reduction="none"))
    assert torch.allclose(got, torch.cat(losses).mean(), atol=1e-5)


def test_a_killed_training_ends_with_the_same_weights(tmp_path, monkeypatch):
    straight, _, losses = upsample.train_upsampler(TINY, 1)
    kept, calls = upsample.pad, []
    def dies(*a):
        calls.append(1)
        if len(calls) == 8: raise KeyboardInterrupt      # two calls a step
        return kept(*a)
    monkeypatch.setattr(upsample, "pad", dies)
    with pytest.raises(KeyboardInterrupt): upsample.train_upsampler(TINY, 1, tmp_path)
    monkeypatch.setattr(upsample, "pad", kept)
    resumed, _, again = upsample.train_upsampler(TINY, 1, tmp_path)
    assert losses == again and len(losses) == 6
    for a, b in zip(straight.state_dict().values(), resumed.state_dict().values()): assert torch.equal(a, b)
    with pytest.raises(RecapError, match="lr"): upsample.train_upsampler(dataclasses.replace(TINY, lr=1e-3), 1, tmp_path)


@pytest.fixture(scope="module")
def tiny():
    torch.set_num_threads(1)
    texts = [t for p, c in upsample.lessons(60, "easy+whole") for t in (" " + p.lower(), c)]
    tok = train_tokenizer(texts, 500)
    torch.manual_seed(0)
    return upsample.make_llama(UpsampleConfig(width=32, layers=2, heads=2), tok.get_vocab_size()).eval(), tok


def test_sampling_is_what_a_loop_without_cache_and_padding_does(tiny):
    model, tok = tiny
    ours = Upsampler(model, tok, temperature=.8, top_p=.9, seed=5)
    prompts = ["a red cat", "two very small dogs on the beach at night", "a boat"]
    for prompt, got in zip(prompts, ours.write(prompts, 2)):
        ids, g = torch.tensor([upsample.prompt_ids(tok, prompt)]), keyed_torch(5, "upsample", prompt, 2)
        start = ids.shape[1]
        while ids.shape[1] < start + 140 and (ids.shape[1] == start or ids[0, -1] != 1):
            with torch.no_grad(): p = (model(input_ids=ids).logits[0, -1]/.8).softmax(-1)
            p, order = p.sort(descending=True)
            p = torch.where(p.cumsum(0) - p < .9, p, 0.)            # the likeliest that hold so much together
            noise = -(-torch.rand(len(p), generator=g).log()).log()
            scores = torch.full_like(p, -torch.inf).scatter(0, order, p.log()) + noise
            ids = torch.cat([ids, scores.argmax()[None, None]], 1)
        assert tok.decode([t for t in ids[0, start:].tolist() if t > 2]).strip() == got


def test_a_prompt_with_marks_in_it_is_a_prompt(tiny):
    model, tok = tiny
    up = Upsampler(model, tok)
    ids = upsample.prompt_ids(tok, "a cat</s><s> A dog is <pad>")
    assert ids[-1] == 2 and not {0, 1, 2} & set(ids[:-1]) and len(up.write(["a cat</s><s> A dog is <pad>"])) == 1


# --- rewriting, with a model that writes what it is told to

class Told(Upsampler):
    "An upsampler whose drafts are given: prompt -> one for each attempt."
    def __init__(self, drafts, model, tok, **how): super().__init__(model, tok, **how); self.drafts, self.asked = drafts, []
    def write(self, prompts, attempt=0, batch_size=64): self.asked += [(p, attempt) for p in prompts]; return [self.drafts[p][min(attempt, len(self.drafts[p]) - 1)] for p in prompts]


def test_the_first_good_draft_is_taken_and_nothing_good_means_the_prompt(tiny):
    drafts = {"a red cat": [GOOD.replace("red", "blue"), "A red cat.", GOOD, GOOD.replace("small", "large")], "a cow": [GOOD], "a boat": [GOOD]}
    up = Told(drafts, *tiny, tries=5)
    cat, cow, love, boat, again = up.rewrite(["a red cat", "a cow", "love", "a boat", "a red cat"])
    assert cat.text == GOOD and cat == again and cat.kept == (("colour", "cat", "red"), ("object", "cat")) and ("place", "beach") in cat.added
    assert (cow.ok, cow.text) == (False, "a cow") and "object cow" in cow.why and boat.ok and not love.ok
    assert [a for p, a in up.asked if p == "a red cat"] == [0, 1, 2] and [a for p, a in up.asked if p == "a cow"] == [0, 1, 2, 3, 4] and [p for p, _ in up.asked].count("a boat") == 1


def test_what_was_written_is_kept_by_content(tiny, tmp_path):
    drafts = {"a red cat": [GOOD], "a cow": [GOOD]}
    new = lambda **how: Told(drafts, *tiny, cache=str(tmp_path), tries=2, **{"weights": "abc"} | how)
    first, again = new(), new()
    done = first.rewrite(["a red cat", "a cow"])
    assert again.rewrite(["a cow", "a red cat"]) == done[::-1] and again.asked == []
    for other in (new(weights="abd"), new(temperature=.5), new(seed=1)): assert other.rewrite(["a red cat"])[0].ok and len(other.asked) == 1
    nameless = new(weights="")
    nameless.rewrite(["a red cat"])
    assert nameless.asked and nameless.store is None


def test_a_revision_changes_what_it_is_told_and_little_else(tiny):
    blue, far = GOOD.replace("red", "blue"), "A large blue cat is in the middle in a forest, and two small white owls are on the right."
    up = Told({}, *tiny, tries=3)
    up.write = lambda prompts, attempt=0: [[GOOD, far, blue][attempt]]
    first = Rewrite.good("a red cat", GOOD, Check.of("a red cat", GOOD))
    new = up.revise(first, "make the cat blue")
    assert new.ok and new.text == blue and [s for s, _ in new.turns] == ["a red cat", "make the cat blue"] and ("colour", "cat", "blue") in new.kept
    no = up.revise(first, "make the cat green")
    assert not no.ok and no.text == GOOD and "green" in no.why


def test_a_list_goes_on_where_it_stopped(tmp_path):
    class Slow:
        name, seen = "slow", []
        def rewrite(self, prompts):
            if len(self.seen) >= 4: raise KeyboardInterrupt
            self.seen += prompts
            return [Rewrite.bad(p, "no answer", failed=True) if p == "p1" else Rewrite.good(p, f"{p} at length", turns=((p, "x"),)) for p in prompts]
    prompts, out, up = [f"p{i}" for i in range(9)], tmp_path/"out.jsonl", Slow()
    with pytest.raises(KeyboardInterrupt): rewrite_file(prompts, up, out, every=2)
    assert len(out.read_text().splitlines()) == 4
    up.seen.clear()
    up.rewrite, calls = lambda ps: calls.append(ps) or [Rewrite.good(p, f"{p} at length", turns=((p, "x"),)) for p in ps], []
    done = rewrite_file(prompts, up, out, every=2)
    assert sum(calls, []) == ["p1", "p4", "p5", "p6", "p7", "p8"] and all(r.ok for r in done)      # the failed one, and the rest
    assert [r.text for r in done] == [f"{p} at length" for p in prompts] and rewrite_file(prompts, up, out) == done and len(calls) == 3
    with pytest.raises(RecapError, match="other prompts"): rewrite_file(["else", *prompts[1:]], up, out)
    up.name = "another"
    with pytest.raises(RecapError, match="another upsampler"): rewrite_file(prompts, up, out)
    out.write_text("<html>")
    with pytest.raises(RecapError, match="no file of JSON lines"): rewrite_file(prompts, up, out)


# --- servers: the faults of CONVENTIONS that reach rewriting

def remote(service, **how): return ServerUpsampler(ServerConfig(service.url, "toy", **dict(cache="", backoff=.01, retries=1, concurrency=1) | how))
def error(status, **body): return status, {}, json.dumps({"error": body}).encode()


@pytest.mark.parametrize("answer, why", [
    (Loopback.reply(None, refusal="I won't."), "refusal"), (Loopback.reply(GOOD[:60], "length"), "cut"), (Loopback.reply("", "content_filter"), "filtered"),
    ("I'm sorry, but I can't help with that.", "refusal"), ("a cat and " * 40, "loop"), (GOOD.replace("red", "blue"), "colour cat red"), (GOOD + " word" * 1 + " so it goes on" * 16, "loop"),
    ("A red cat.", "3 words"), (" ".join(f"thing{i}" for i in range(90)), "90 words")])
def test_36_37_what_is_no_rewrite_never_becomes_one(answer, why):
    with Loopback(lambda body, n: answer) as service: found, = remote(service).rewrite(["a red cat"])
    assert (found.ok, found.text, found.failed) == (False, "a red cat", False) and why in found.why, found
    assert 1 <= len(service.requests) <= 3 + 2


def test_35_a_web_page_is_asked_again_and_34_a_dead_row_is_marked():
    with Loopback(lambda body, n: (200, {"Content-Type": "text/html"}, b"<html>busy") if n == 0 else GOOD) as service: assert remote(service).rewrite(["a red cat"])[0].text == GOOD
    with Loopback(lambda body, n: None if "cow" in body["messages"][-1]["content"] else GOOD) as service: cat, cow = remote(service).rewrite(["a red cat", "a cow"])
    assert cat.ok and (cow.ok, cow.failed, cow.text) == (False, True, "a cow") and "did not answer" in cow.why


def test_32_quota_stops_and_what_was_written_is_kept(tmp_path):
    prompts = [f"a red cat {w}" for w in ("on a beach", "at the beach", "on the seashore", "at sunset", "please", "on the left")]
    with Loopback(lambda body, n: GOOD if n < 4 else error(429, message="quota", code="insufficient_quota")) as service:
        with pytest.raises(Stopped, match="quota"): rewrite_file(prompts, remote(service, cache=str(tmp_path/"kept")), tmp_path/"out.jsonl", every=2)
        assert len((tmp_path/"out.jsonl").read_text().splitlines()) == 4
        service.answer, before = lambda body, n: GOOD, len(service.requests)
        done = rewrite_file(prompts, remote(service, cache=str(tmp_path/"kept")), tmp_path/"out.jsonl", every=2)
    assert [r.ok for r in done] == [True]*6 and len(service.requests) == before + 2


def test_22_a_reply_that_was_paid_for_is_never_asked_twice(tmp_path):
    wrong_first = lambda body, n: GOOD if len(body["messages"]) > 2 else GOOD.replace("red", "blue")
    with Loopback(wrong_first) as service:
        first = remote(service, cache=str(tmp_path)).rewrite(["a red cat"])
        assert len(service.requests) == 2 and first[0].ok
        assert remote(service, cache=str(tmp_path)).rewrite(["a red cat"]) == first and len(service.requests) == 2


def test_38_no_key_in_what_is_said(monkeypatch):
    monkeypatch.setenv("RECAP_API_KEY", key := f"sk-{os.urandom(12).hex()}")
    with Loopback(lambda body, n: error(401, message=f"wrong key {key}")) as service, pytest.raises(RecapError) as e: remote(service).rewrite(["a red cat"])
    assert key not in str(e.value) and "RECAP_API_KEY (401)" in str(e.value)


def test_a_conversation_takes_turns():
    def answer(body, n):
        roles = [m["role"] for m in body["messages"]]
        assert roles == ["system"] + ["user", "assistant"]*((len(roles) - 2)//2) + ["user"]
        said = " ".join(m["content"] for m in body["messages"] if m["role"] == "user")
        text = GOOD.replace("red", "blue" if "blue" in said else "red").replace("sandy beach", "snowy field" if "snow" in said else "sandy beach")
        return text if n % 2 else "Sure! Here it is: " + text.replace("cat", "dog")       # wrong at first, every time
    with Loopback(answer) as service:
        up = remote(service)
        r = up.rewrite(["a red cat"])[0]
        for said in ("make the cat blue", "put it in the snow"): r = up.revise(r, said); assert r.ok, r.why
    assert len(service.requests) == 6 and [len(t) for t in r.turns] == [2, 2, 2] and {("colour", "cat", "blue"), ("place", "snow")} <= set(r.kept)
    assert "dog" not in r.text and all("dog" not in t for _, t in r.turns)


@pytest.mark.parametrize("reply, ok", [("Ada is there. Yes.", True), ("The dress is gone. No.", False), ("I cannot say whether it is.", False), ("", False)])
def test_outside_the_world_a_judge_decides(reply, ok):
    text = "A portrait of Ada Lovelace in a dark dress, seated beside a tall window with soft morning light on her papers."
    with Loopback(lambda body, n: reply if "verdict" in body["messages"][0]["content"] else text) as service: found, = remote(service, give_up=99).rewrite(["a portrait of Ada Lovelace in a dress"])
    assert found.ok is ok and (ok or found.text == found.prompt)
    asked = []
    with Loopback(lambda body, n: text) as service:
        own = ServerUpsampler(ServerConfig(service.url, "toy", cache=""), judge=lambda ps, ts: asked.append((ps, ts)) or [""]*len(ps))
        assert own.rewrite(["a portrait of Ada Lovelace in a dress"])[0].ok and asked == [(["a portrait of Ada Lovelace in a dress"], [text])] and len(service.requests) == 1


# --- the shipped weights

@pytest.fixture(scope="module")
def shipped():
    torch.set_num_threads(1)
    return Upsampler.from_pretrained(foundation("upsampler"))


def test_shipped_weights_keep_facts(shipped):
    prompts, dsc = upsample.held_out_prompts(100, "easy", 77)
    done = shipped.rewrite(prompts)
    good = [r for r in done if r.ok]
    told = upsample.measure_rewrites([r.prompt for r in good], [r.text for r in good])
    assert len(good) >= 95 and told["in_bounds"]["mean"] == 1 and told["added"]["least"] >= 4 and told["distinct"] == 1
    assert told["words_kept"]["mean"] >= .95, told["words_kept"]                                  # the count that the reader has no part in
    drafts = upsample.measure_rewrites(prompts, shipped.write(prompts))
    assert drafts["kept"]["mean"] > .85 and drafts["contradicted"]["mean"] < .08, drafts


def test_shipped_rewrites_do_not_depend_on_the_batch(shipped):
    prompts, _ = upsample.held_out_prompts(24, "easy+whole", 5)
    together, alone = shipped.rewrite(prompts), [shipped.rewrite([p])[0] for p in prompts[:8]]
    assert together[:8] == alone and shipped.rewrite(prompts[::-1])[::-1] == together


def test_shipped_weights_are_small_and_load_in_transformers(shipped, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder = foundation("upsampler")
    assert sum(f.stat().st_size for f in folder.iterdir()) < 5*2**20
    model, words = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    ids = words.apply_chat_template([{"role": "system", "content": "x"}, {"role": "user", "content": "A red CAT"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"}], tokenize=True, return_dict=True)["input_ids"]
    assert ids == upsample.prompt_ids(shipped.tok, "A red CAT")
    with torch.no_grad(): said = model.generate(torch.tensor([ids]), max_new_tokens=90, do_sample=False)[0, len(ids):]
    text = words.decode(said, skip_special_tokens=True)
    assert "red cat" in text and 5 < len(text.split()) < 80
    shipped.save_pretrained(tmp_path/"again")
    assert Upsampler.from_pretrained(tmp_path/"again").write(["a red cat"]) == shipped.write(["a red cat"])


def test_the_manifest_says_how_they_were_made():
    told = read_json(foundation("upsampler")/"manifest.json")
    assert told["page"] == "19_upsample" and told["quality"]["drafts"]["easy"]["kept"]["of"] > 300 and told["megabytes"] < 5


@pytest.mark.parametrize("folder, told", [("", "make foundation"), ("nowhere", "does not exist")])
def test_a_folder_without_an_upsampler_is_named(tmp_path, folder, told):
    with pytest.raises(RecapError, match=told): upsample.open_upsampler(str(tmp_path/folder))


# --- the command

def call(capsys, *args):
    code = run_command(["upsample", *map(str, args)])
    return code, *capsys.readouterr()


def test_the_command_writes_a_file_and_goes_on(tmp_path, capsys, monkeypatch):
    (tmp_path/"prompts.txt").write_text("a red cat\n\na boat at the beach\na red dragon\n", encoding="utf8")
    code, said, err = call(capsys, "--file", tmp_path/"prompts.txt", "--out", tmp_path/"out.jsonl")
    rows = [json.loads(line) for line in (tmp_path/"out.jsonl").read_text().splitlines()]
    assert code == 1 and [r["ok"] for r in rows] == [True, True, False] and "dragon" in err and rows[2]["text"] == "a red dragon"
    monkeypatch.setattr(Upsampler, "write", None)          # nothing is written again
    assert call(capsys, "--file", tmp_path/"prompts.txt", "--out", tmp_path/"out.jsonl", "--json")[0] == 1
    code, said, err = call(capsys, "a red cat", "--json")
    assert code == 0 and json.loads(said)[0]["text"] == rows[0]["text"]


@pytest.mark.parametrize("args, told", [([], "what should be rewritten"), (["--file", "nowhere.txt"], "nowhere.txt"), (["a cat", "--source", "nowhere"], "nowhere"), (["a cat", "--source", "http://"], "no address")])
def test_the_command_says_what_is_missing(capsys, args, told):
    code, said, err = call(capsys, *args)
    assert code == 2 and told in err and len(err.strip().splitlines()) == 1, err


def test_the_command_asks_a_server(tmp_path, capsys):
    with Loopback(lambda body, n: GOOD) as service: code, said, err = call(capsys, "a red cat", "--source", f"{service.url}?cache={tmp_path}#toy")
    assert (code, said.strip()) == (0, GOOD) and len(service.requests) == 1


# --- a real server

def serve(folder, tmp_path):
    "`transformers serve` of a folder: its process and its address."
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    (tmp_path/"hub").mkdir(exist_ok=True)
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path/"hub"), "OMP_NUM_THREADS": "1"}
    log = open(tmp_path/"log", "w")
    process = subprocess.Popen([os.path.join(os.path.dirname(sys.executable), "transformers"), "serve", str(folder), "--device", "cpu", "--port", str(port)], env=env, stdout=log, stderr=log, start_new_session=True)
    deadline = time.time() + 240
    while True:
        try: urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5); return process, f"http://127.0.0.1:{port}/v1"
        except OSError: assert process.poll() is None and time.time() < deadline, (tmp_path/"log").read_text()[-3000:]; time.sleep(.5)


@pytest.mark.slow
@pytest.mark.skipif(any(importlib.util.find_spec(m) is None for m in ("fastapi", "uvicorn")), reason="transformers serve needs fastapi and uvicorn: pip install -e '.[dev]'")
@pytest.mark.parametrize("kind", ["random", "shipped"])
def test_transformers_serve(kind, tiny, tmp_path):
    "A random Llama is refused in several turns; our own weights behind the same door rewrite."
    folder = foundation("upsampler")
    if kind == "random":
        folder, (model, tok) = tmp_path/"random", tiny
        Upsampler(copy.deepcopy(model), tok).save_pretrained(folder)
    process, url = serve(folder, tmp_path)
    try:
        up = upsample.open_upsampler(f"{url}?concurrency=2&timeout=300&max_tokens=100&cache={tmp_path}/kept#{folder}")
        done = up.rewrite(prompts := ["a red cat", "a large boat on the beach", "two dogs in the snow"])
        assert len(done) == 3 and all(r.text == r.prompt and r.why and not r.failed for r in done if not r.ok)
        turns, first = up.server.spent["calls"], next((r for r in done if r.ok), done[0])
        if kind == "random": assert not any(r.ok for r in done) and turns > 3
        else: assert sum(r.ok for r in done) >= 2
        revised = up.revise(first, "at night")            # the template of ours reads the first turn alone: either answer will do, a crash will not
        assert revised.prompt == first.prompt and (revised.ok or revised.why)
        again = upsample.open_upsampler(f"{url}?concurrency=2&timeout=300&max_tokens=100&cache={tmp_path}/kept#{folder}")
        assert again.rewrite(prompts) == done and again.server.spent["calls"] == 0
    finally: os.killpg(process.pid, signal.SIGTERM); process.wait(30)
