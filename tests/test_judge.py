"What 23_judge cannot show on a page: replies of every form, a server that fails in the middle of a paid run, folders of every layout, the command, a real `transformers serve`."
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from conftest import ROOT, environment, recap
from hypothesis import given, settings, strategies as st
from PIL import Image

from recap.command import run_command
from recap.core import RecapError
from recap.judge import (CHOICES, PLANTS, VERDICTS, Choice, FactJudge, ServerJudge, Verdict, draw_cases, judge_cases, judge_folder, judge_prompts, measure_judge,
                         open_judge, read_pictures, summarise_verdicts)
from recap.reader import read_facts
from recap.scorers import Shown
from recap.servers import last_word, Loopback, Server, ServerConfig, Stopped, as_picture, picture_url
from recap.vqa import Known
from recap.world import render

pytestmark = pytest.mark.usefixtures("one_thread")


def dots(n, seed=0): return [Image.fromarray(np.random.default_rng((seed, i)).integers(0, 256, (8, 8, 3), dtype=np.uint8)) for i in range(n)]


# --- the last word

ENDINGS = st.sampled_from(["", ".", "!", "**", ".**", "\n", " \n\n", '"', "”.", ")", "`", "*.", " ✅"])
OPENINGS = st.sampled_from(["", "**", "Verdict: ", "**Verdict:** ", "Final answer:\n\n", '"', "(", "### ", "\n\n*"])


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60), st.sampled_from(VERDICTS), st.sampled_from([str.lower, str.title, str.upper]), OPENINGS, ENDINGS)
def test_the_verdict_is_found_behind_whatever_was_said_before(before, word, case, opening, ending):
    assert last_word(f"{before}. All in all. {opening}{case(word)}{ending}", VERDICTS) == word


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60), st.sampled_from(VERDICTS), st.sampled_from(["as far as I see", "?", "I think", "5/5", "-ish", "because the cat is red", "ly"]))
def test_a_reply_that_ends_with_anything_else_has_no_verdict(before, word, after):
    assert last_word(f"{before} {word} {after}", VERDICTS) == ""


def test_a_substring_would_be_wrong_where_the_last_word_is_right():
    "The failing rule of other evaluators, on replies as judges write them."
    replies = [(f"The {n} is there. The colour is {'as asked' if ok else 'not correct, it is blue'}. {'Correct' if ok else 'Incorrect'}.", ok) for n in ("cat", "cup", "boat") for ok in (True, False)]
    assert all((last_word(text, VERDICTS) == "correct") is ok for text, ok in replies)
    assert sum(("correct" in text.lower()) is not ok for text, ok in replies) == 3


def test_a_choice_is_a_capital_letter_or_tie():
    for text, word in (("Picture B has more. B", "B"), ("I choose A!", "A"), ("a", ""), ("cut off in the middle of a", ""), ("It is a Tie", "tie"), ("A or B", ""), ("A and B", "B"), ("not B", ""), ("B, 90 %", "")):
        assert last_word(text, CHOICES) == word, text


# --- a server

def served(answer, tmp_path, **settings):
    server = Loopback(answer)
    return server, lambda: ServerJudge(Server(ServerConfig(**dict(url=server.url, cache=str(tmp_path/"kept"), retries=1, backoff=.01, concurrency=2) | settings)))


def content(body): return body["messages"][0]["content"]
def urls(body): return [p["image_url"]["url"] for p in content(body) if p["type"] == "image_url"]


def test_what_is_sent_is_the_rules_the_caption_and_the_pictures_in_their_order(tmp_path):
    a, b = dots(2)
    hostile = 'a "cat"\n{caption} {x} %s \\ <b>ignore this</b>'
    server, judge = served(lambda body, n: "Good.\n\nA" if len(urls(body)) == 2 else "Good.\n\ncorrect", tmp_path)
    with server:
        assert judge().judge([a], [hostile])[0].correct is True
        found = judge().compare([a], [b], [hostile])[0]
    one, *two = sorted(server.requests, key=lambda r: len(urls(r)))
    told = content(one)[-1]["text"]
    assert urls(one) == [picture_url(a)] and 'Caption: a "cat" {caption} {x} %s \\ <b>ignore this</b>\n' in told and told.startswith(judge_prompts()["picture"][:200])
    assert sorted(map(urls, two)) == sorted([[picture_url(a), picture_url(b)], [picture_url(b), picture_url(a)]])
    assert [[p.get("text", "")[:10] for p in content(r)] for r in two] == [["Picture A:", "", "Picture B:", "", judge_prompts()["pair"][:10]]]*2
    assert (found.choice, found.flipped, [o["shown"] for o in found.orders], [o["choice"] for o in found.orders]) == ("tie", True, ["AB", "BA"], ["A", "B"])   # fault 43


def test_a_judge_that_follows_the_picture_is_believed_and_one_that_follows_the_order_is_not(tmp_path):
    a, b = dots(6), dots(6, 1)
    better = {picture_url(x) for x in a[:4] + b[4:]}
    honest, position = (lambda body, n: f"So.\n\n{'AB'[urls(body)[1] in better]}"), (lambda body, n: "So.\n\nB")
    for answer, choices, flipped in ((honest, ["A"]*4 + ["B"]*2, 0), (position, ["tie"]*6, 6)):
        server, judge = served(answer, tmp_path/str(flipped))
        with server: found = judge().compare(a, b, ["x"]*6)
        assert [c.choice for c in found] == choices and sum(c.flipped for c in found) == flipped
        rows = [dict(choice=c.choice, fault=c.fault, index=i, category="", orders=c.orders, flipped=c.flipped) for i, c in enumerate(found)]
        told = summarise_verdicts(rows)
        assert told["flipped"] == flipped and told["first_shown_chosen"] == (.5 if not flipped else 0.) and told["win_rate_A"]["mean"] == pytest.approx(4/6 if not flipped else .5, abs=1e-4)


FAULTY = {"html": ((200, {"Content-Type": "text/html"}, b"<html>correct</html>"), "failed"), "no choices": ({"choices": []}, "failed"), "null": ({"choices": None}, "failed"),
          "error": ((500, {}, b"{}"), "failed"), "refusal": ("I'm sorry, but I can't help with judging this.", "refusal"), "field": (Loopback.reply("", refusal="no"), "refusal"),
          "filter": (Loopback.reply("correct", "content_filter"), "filtered"), "cut": (Loopback.reply("It is correct", "length"), "cut"), "mute": ("", "empty"),
          "vague": ("What a picture.", "no verdict"), "apology": ("Unfortunately, the cup is red.\n\nincorrect", "")}


def test_every_fault_is_named_and_none_becomes_a_verdict(tmp_path):
    server, judge = served(lambda body, n: FAULTY[content(body)[-1]["text"].split("Caption: ")[1].split("\n")[0]][0], tmp_path, give_up=99)
    with server:
        said = dict(zip(FAULTY, judge().judge(dots(len(FAULTY)), list(FAULTY))))
        assert {k: v.fault for k, v in said.items()} == {k: f for k, (_, f) in FAULTY.items()}
        assert {k for k, v in said.items() if v.verdict} == {"apology"} and said["apology"].why == "Unfortunately, the cup is red."
        pair = judge().compare(dots(1), dots(1, 1), ["html"])[0]
        assert (pair.choice, pair.fault) == ("", "failed")
        before = len(server.requests)
        judge().judge(dots(len(FAULTY)), list(FAULTY))
    again = [content(r)[-1]["text"].split("Caption: ")[1].split("\n")[0] for r in server.requests[before:]]
    assert set(again) == {k for k, (_, f) in FAULTY.items() if f in ("failed", "empty")}    # what was paid for is not asked again


def test_numbers_that_differ_are_refused(tmp_path):
    server, judge = served(lambda body, n: "correct", tmp_path)
    with server:
        with pytest.raises(RecapError, match="2 pictures for 1 prompts"): judge().judge(dots(2), ["x"])
        with pytest.raises(RecapError, match="1 pictures for 2 prompts"): judge().compare(dots(2), dots(1), ["x", "y"])
    assert not server.requests


# --- a folder

def folder_of(path, pictures, prompts, layout="prompts"):
    path.mkdir(parents=True)
    for i, im in enumerate(pictures): im.save(path/(f"{i:05d}_0.png" if layout == "prompts" else f"p{i}.PNG"))
    rows = [dict(index=i, prompt=p, category="ab"[i % 2]) if layout == "prompts" else dict(file_name=f"p{i}.PNG", text=p) for i, p in enumerate(prompts)]
    (path/f"{'prompts' if layout == 'prompts' else 'metadata'}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_a_run_that_stops_goes_on_without_paying_twice(tmp_path):
    made = folder_of(tmp_path/"made", dots(10), [f"prompt {i}" for i in range(10)])
    right = {picture_url(im) for im in dots(10)[:7]}
    server, judge = served(lambda body, n: "So.\n\ncorrect" if urls(body)[0] in right else "So.\n\nincorrect", tmp_path, max_calls=6, concurrency=1)
    with server:
        with pytest.raises(Stopped, match="budget is used up after 6 calls"): judge_folder(made, judge(), batch_size=2)
        with open(tmp_path/"made_judged"/"verdicts.jsonl", "a") as f: f.write('{"key": "cut by a ki')
        told = judge_folder(made, judge(), batch_size=2)
        assert (told["judged"], told["kept"], len(server.requests)) == (10, 6, 10)
        assert told["correct"]["mean"] == .7 and told["categories"]["a"]["mean"] == .8 and told["categories"]["b"]["mean"] == .6
        rows = [json.loads(line) for line in (tmp_path/"made_judged"/"verdicts.jsonl").read_text().splitlines()]
        assert [r["prompt"] for r in rows] == [f"prompt {i}" for i in range(10)] and [r["verdict"] for r in rows] == ["correct"]*7 + ["incorrect"]*3 and rows[0]["reply"] == "So. correct"
        judge_folder(made, judge()); assert len(server.requests) == 10
        dots(1, 5)[0].save(made/"00000_0.png")                                   # another picture of the same name is asked for
        assert judge_folder(made, judge())["correct"]["mean"] == .6 and len(server.requests) == 11


def test_a_picture_that_cannot_be_read_and_a_request_that_failed_are_excluded_and_asked_again(tmp_path):
    made, server_up = folder_of(tmp_path/"made", dots(4), list("abcd")), []
    (made/"00002_0.png").write_bytes(b"<html>gone")
    server, judge = served(lambda body, n: "correct" if server_up or "Caption: b\n" not in content(body)[-1]["text"] else (500, {}, b"{}"), tmp_path)
    with server:
        told = judge_folder(made, judge())
        assert told["excluded"] == {"failed": 1, "no picture": 1} and told["correct"] == {"mean": 1., "lo": 1., "hi": 1., "n": 2}
        server_up.append(True)
        told = judge_folder(made, judge())
        assert told["excluded"] == {"no picture": 1} and told["judged"] == 3 and told["kept"] == 2


def test_layouts_and_what_is_wrong_with_them(tmp_path):
    meta = folder_of(tmp_path/"meta", dots(3), ["a", "b", "c"], "metadata")
    assert [(f["name"], f["prompt"]) for f in read_pictures(meta)] == [("p0.PNG", "a"), ("p1.PNG", "b"), ("p2.PNG", "c")]
    two = folder_of(tmp_path/"two", dots(2), ["a", "b"])
    dots(1)[0].save(two/"00001_1.png")
    assert [(f["name"], f["index"]) for f in read_pictures(two)] == [("00000_0.png", 0), ("00001_0.png", 1), ("00001_1.png", 1)]
    lines = tmp_path/"lines.txt"
    lines.write_bytes(b"\xef\xbb\xbfa\r\n\r\nb\r\n")                            # an empty line keeps its number
    dots(1)[0].save(two/"00002_0.png")
    with pytest.raises(RecapError, match="2 of 4 pictures have no prompt in .*lines.txt, the first: 00001_0.png"): read_pictures(two, lines)
    for name in ("00001_0.png", "00001_1.png"): (two/name).unlink()
    assert [f["prompt"] for f in read_pictures(two, lines)] == ["a", "b"]
    geneval = tmp_path/"geneval"
    for n in ("00000", "00001"): (geneval/"images"/n/"samples").mkdir(parents=True); dots(1)[0].save(geneval/"images"/n/"samples"/"0000.png")
    (geneval/"prompts.jsonl").write_text("".join(json.dumps(dict(index=i, category="counting", prompt=f"prompt {i}", files=[f"{i:05d}/samples/0000.png"])) + "\n" for i in range(2)))
    assert [(f["name"], f["prompt"]) for f in read_pictures(geneval)] == [(f"{i:05d}/samples/0000.png", f"prompt {i}") for i in range(2)]
    for text, said in (('{"index": 0}\n', "line 1: no JSON object with prompt"), ('{"index": 0, "prompt"\n', "line 1: no JSON"), ('{"index": 0, "prompt": "a"}\n'*2, "two prompts for 0")):
        (tmp_path/"bad.jsonl").write_text(text)
        with pytest.raises(RecapError, match=said): read_pictures(two, tmp_path/"bad.jsonl")


def test_two_folders_must_hold_the_same_pictures(tmp_path):
    a, b = folder_of(tmp_path/"a", dots(3), list("abc")), folder_of(tmp_path/"b", dots(3, 1), list("abc"))
    (b/"00002_0.png").rename(b/"00002_1.png")
    with pytest.raises(RecapError, match="00002_0.png is in only one of them"): judge_folder(a, "detector", against=b)


# --- what the measurement says of judges that we know

@pytest.fixture(scope="module")
def cases(): return [c for kind in PLANTS for c in draw_cases("easy", kind, 8, seed=7)]


class Seer:
    "Knows what each picture shows; misses a planted error of one kind in a share of the cases."
    def __init__(self, cases, blind="", share=0.): self.shown, self.blind, self.share, self.kind = {}, blind, share, {}; self.learn(cases)
    def learn(self, cases):
        for i, c in enumerate(cases):
            for s in (c.right, c.wrong): self.shown[render(s, 64).tobytes()] = Known.of(Shown.of(s)); self.kind[render(s, 64).tobytes()] = c.kind, i
    def check(self, images, facts):
        def of(im, row):
            known, (kind, i) = self.shown[as_picture(im).tobytes()], self.kind[as_picture(im).tobytes()]
            return [float(known.truth(f) is not False or kind == self.blind and i % 8 < 8*self.share) for f in row]
        return [of(im, row) for im, row in zip(images, facts)]


def test_the_truth_is_measured_as_the_truth_and_a_blind_eye_as_blind(cases):
    told = measure_judge(judge_cases(FactJudge(Seer(cases), "truth"), cases))
    assert set(told) == {*PLANTS, "all"} and told["all"]["cases"] == 56
    for v in told.values(): assert (v["verdict"]["mean"], v["pair"]["mean"], v["alpha"], v["excluded"]) == (1., 1., 1., 0)
    told = measure_judge(judge_cases(FactJudge(Seer(cases, "colour", .75), "colour-blind"), cases))
    assert told["colour"]["caught"]["mean"] == .25 and told["colour"]["passed"]["mean"] == 1. and told["colour"]["verdict"]["mean"] == .625 and told["colour"]["pair"]["mean"] == .625
    assert all(v["verdict"]["mean"] == 1. for k, v in told.items() if k not in ("colour", "all"))


def test_any_model_that_answers_questions_judges_any_prompt(cases):
    "A folder of a BLIP: the same verdicts as the foundation's by name where the reader knows every word, and the whole caption as one question where not."
    from recap.core import foundation
    named, folder, few = open_judge("vqa"), open_judge(str(foundation("vqa"))), cases[::4]
    images, prompts = [render(c.right, 64) for c in few], [c.prompt for c in few]
    known = [i for i, p in enumerate(prompts) if not read_facts(p).unread]
    a, b = named.ask(images, prompts), folder.ask(images, prompts)
    assert len(known) > 4 and all([q for q, _ in a[i]] == [q for q, _ in b[i]] for i in known)
    assert np.allclose([p for i in known for _, p in a[i]], [p for i in known for _, p in b[i]], atol=1e-4)
    (question, p), = folder.ask(images[:1], ["a heron wading"])[0]
    assert "a heron wading" in question and 0 <= p <= 1


def test_planted_errors_change_one_thing_that_the_prompt_tells(cases):
    for c in cases:
        told, wrong, right = read_facts(c.prompt).facts, Known.of(Shown.of(c.wrong)), Known.of(Shown.of(c.right))
        assert any(wrong.truth(f) is False for f in told) and not any(right.truth(f) is False for f in told)
        assert (c.wrong.place, c.wrong.seed, c.wrong.weather, c.wrong.style) == (c.right.place, c.right.seed, c.right.weather, c.right.style)
        nouns = [{t.noun for t in s.things} for s in (c.right, c.wrong)]
        assert len(nouns[0] - nouns[1]) == (c.kind in ("object", "missing")) and len(nouns[1] - nouns[0]) == (c.kind == "object")
    assert {k: sum(c.kind == k for c in cases) for k in PLANTS} == dict.fromkeys(PLANTS, 8)


def test_intervals_hold_the_truth_as_often_as_they_say():
    "A judge that is right in 80 % of all cases: 95 % intervals over 60 cases hold .8 in nearly all of 20 repetitions."
    inside = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        say = lambda true: Verdict(VERDICTS[int((rng.random() < .8) != true)])
        rows = [dict(kind="colour", prompt="", right=say(True), wrong=say(False), pair=Choice("AB"[rng.random() < .3])) for _ in range(60)]
        v = measure_judge(rows, seed)["colour"]
        inside += v["verdict"]["lo"] <= .8 <= v["verdict"]["hi"]
    assert inside >= 16                                                          # 19 expected


# --- the command

def test_the_command(tmp_path, capsys):
    made = folder_of(tmp_path/"made", dots(4), ["a red cat"]*4)
    server, _ = served(lambda body, n: "So.\n\n" + ("A" if len(urls(body)) == 2 else "incorrect"), tmp_path)
    def call(*args): return run_command(["judge", *map(str, args)]), *capsys.readouterr()
    with server:
        address = f"{server.url}?cache={tmp_path}/kept#toy"
        done = recap(ROOT, "judge", made, "--judge", address, "--json")
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert (told["judge"], told["judged"], told["correct"]["mean"], told["spent"]["calls"]) == ("toy", 4, 0., 4)
        code, out, err = call(made, "--judge", address, "--against", made, "--out", tmp_path/"pairs")
        assert (code, err) == (0, "") and "choices: 4 tie; flipped with the order: 4" in out
        (made/"00000_0.png").write_bytes(b"")
        code, out, err = call(made, "--judge", address, "--out", tmp_path/"again")
        assert (code, err) == (1, "") and "excluded: 1 no picture" in out
    for args, said in (([tmp_path/"none"], "is no folder of pictures"), ([made, "--judge", "orcale"], "unknown judge 'orcale'")):
        code, out, err = call(*args)
        assert (code, out, err.count("\n")) == (2, "", 1) and said in err


# --- long ones

@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path):
    "SIGKILL while the server answers: nothing that was answered is asked for again."
    made = folder_of(tmp_path/"made", dots(24), [f"prompt {i}" for i in range(24)])
    server, judge = served(lambda body, n: time.sleep(.15) or "So.\n\ncorrect", tmp_path)
    with server:
        code = f"from recap.judge import judge_folder; judge_folder({str(made)!r}, '{server.url}?cache={tmp_path}/kept&concurrency=1#toy', batch_size=4)"
        child = subprocess.Popen([sys.executable, "-c", code], env=environment(ROOT))
        while len(server.requests) < 9: assert child.poll() is None; time.sleep(.02)
        child.send_signal(signal.SIGKILL); child.wait()
        told = judge_folder(made, f"{server.url}?cache={tmp_path}/kept&concurrency=1#toy", batch_size=4)
        assert told["judged"] == 24 and told["kept"] >= 4 and len(server.requests) <= 24 + 1     # at most the one under way twice


@pytest.mark.slow
@pytest.mark.skipif(any(importlib.util.find_spec(m) is None for m in ("fastapi", "uvicorn")), reason="transformers serve needs fastapi and uvicorn: pip install -e '.[dev]'")
def test_transformers_serve(tmp_path):
    "A real server with a random model: gibberish, so that everything is excluded and counted, for single pictures and for pairs."
    import torch
    from test_captioners import make_llava
    torch.manual_seed(1)
    for part in make_llava(tmp_path/"llava"): part.save_pretrained(tmp_path/"llava")
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    (tmp_path/"hub").mkdir()
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path/"hub"), "OMP_NUM_THREADS": "1"}
    log = open(tmp_path/"log", "w")
    process = subprocess.Popen([os.path.join(os.path.dirname(sys.executable), "transformers"), "serve", str(tmp_path/"llava"), "--device", "cpu", "--port", str(port)], env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.time() + 240
        while True:
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5); break
            except OSError: assert process.poll() is None and time.time() < deadline, (tmp_path/"log").read_text()[-3000:]; time.sleep(.5)
        a, b = folder_of(tmp_path/"a", dots(3), ["a red cat"]*3), folder_of(tmp_path/"b", dots(3, 1), ["a red cat"]*3)
        source = f"http://127.0.0.1:{port}/v1?concurrency=2&max_tokens=12&cache={tmp_path}/kept&timeout=300#{tmp_path/'llava'}"
        for more, n in ((dict(), 3), (dict(against=b, out=tmp_path/"pairs"), 3)):
            told = judge_folder(a, source, **more)
            assert told["judged"] == 0 and sum(told["excluded"].values()) == n and "failed" not in told["excluded"], told
            assert told.get("correct", told.get("win_rate_A")) is None
        rows = [json.loads(line) for line in (tmp_path/"pairs"/"verdicts.jsonl").read_text().splitlines()]
        assert all(o["reply"] for r in rows for o in r["orders"])
        told = measure_judge(judge_cases(open_judge(source), draw_cases("easy", "colour", 2)))
        assert told["all"]["excluded"] == 4 and told["all"]["verdict"] is None
    finally: os.killpg(process.pid, signal.SIGTERM); process.wait(30)


@pytest.mark.slow
def test_the_benchmark_runs():
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", "benchmarks.judge", "--quick"], cwd=ROOT, env=environment(ROOT, OMP_NUM_THREADS="1"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.strip().split("\n")[-1])
    assert said["peer"] == .5 and .5 < said["ours"] <= 1 and said["settings"]["lo"] <= said["ours"] <= said["settings"]["hi"]
