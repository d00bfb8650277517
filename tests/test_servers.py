"What 06_servers cannot show on a page: kills, threads, redirects, real waits, the faults of CONVENTIONS one by one, keys in every corner."
import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback

import pytest
from PIL import Image

pytest.importorskip("openai")
from recap.core import RecapError, project_root
from recap.servers import Gate, Loopback, Reply, ReplyStore, Server, ServerConfig, Stopped, as_picture, message, picture_url, text_flags, tidy_text

KEY = f"sk-{os.urandom(16).hex()}"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("RECAP_API_KEY", KEY)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")     # what a company's machine has: a loopback server must not go through it
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-for-everybody")


def quick(server, **settings): return Server(ServerConfig(server.url, "toy", **dict(cache="", backoff=.01, concurrency=4) | settings))
def error(status, headers={}, **body): return status, headers, json.dumps({"error": body}).encode()
def asked(n): return [[message(f"number {i}")] for i in range(n)]
def told(body): return body["messages"][-1]["content"]


# --- 31 to 35: waiting, stopping, trying again

def test_31_retry_after_is_waited_for_by_everybody():
    arrived = []
    def busy_once(body, n):
        arrived.append(time.monotonic())
        return error(429, {"Retry-After": "1"}, message="slow down") if n == 0 else f"reply to {told(body)}"
    with Loopback(busy_once) as server:
        client = quick(server, concurrency=1)
        assert [r.text for r in client.ask_many(asked(3))] == [f"reply to number {i}" for i in range(3)]
    assert arrived[1] - arrived[0] >= 1 and client.spent == {"calls": 4, "retries": 1, "tokens": 3*14}


def test_31_a_date_will_do():
    import email.utils
    with Loopback(lambda body, n: error(429, {"Retry-After": email.utils.formatdate(time.time() + 1.5, usegmt=True)}, message="x") if n == 0 else "fine") as server:
        began = time.monotonic()
        assert quick(server).ask([message("hello")]).text == "fine" and .3 < time.monotonic() - began < 8


def test_32_quota_stops_at_once_and_keeps_what_was_answered(tmp_path):
    def poor(body, n): return f"reply to {told(body)}" if n < 10 else error(429, {"Retry-After": "1"}, message="You exceeded your current quota", type="insufficient_quota", code="insufficient_quota")
    with Loopback(poor) as server:
        client, got = quick(server, cache=str(tmp_path), concurrency=2), []
        with pytest.raises(Stopped, match="quota is used up"):
            for r in client.ask_many(asked(50)): got.append(r.text)
        assert len(server.requests) <= 12                              # the two that were under way, and no retry
        server.answer = lambda body, n: f"later {told(body)}"
        before = len(server.requests)
        texts = [r.text for r in quick(server, cache=str(tmp_path)).ask_many(asked(50))]
    assert sum(t.startswith("reply") for t in texts) == 10 and len(server.requests) - before == 40


@pytest.mark.parametrize("limit, stops", [(200, True), (400, False)])
def test_33_long_waits_by_a_stated_limit(limit, stops):
    now = [0.]
    gate = Gate(clock=lambda: now[0], pause=lambda s: now.__setitem__(0, now[0] + s))
    with Loopback(lambda body, n: error(429, {"Retry-After": "300"}, message="come back later") if n == 0 else "fine") as server:
        client = Server(ServerConfig(server.url, "toy", cache="", longest_wait=limit), gate)
        if stops:
            with pytest.raises(Stopped, match="asks to wait 300 s, longer than longest_wait=200"): client.ask([message("hello")])
            assert now[0] == 0 and len(server.requests) == 1
        else: assert client.ask([message("hello")]).text == "fine" and 300 <= now[0] < 301


@pytest.mark.parametrize("bad", [error(500, message="x"), error(502, message="x"), None, "sleep", (500, {"Content-Type": "text/html"}, b"<html>"), error(408, message="x")], ids=str)
def test_34_faults_of_the_moment(bad, tmp_path):
    def answer(body, n):
        if told(body) == "number 1" and not healed:
            if bad == "sleep": time.sleep(1.2); return "too late"
            return bad
        return f"reply to {told(body)}"
    healed = []
    with Loopback(answer) as server:
        client = quick(server, retries=2, timeout=.6, cache=str(tmp_path))
        replies = list(client.ask_many(asked(4)))
        assert [r.flags for r in replies] == [(), ("failed",), (), ()] and replies[1].why and client.spent["calls"] == 6
        healed.append(True)
        again = quick(server, cache=str(tmp_path))
        assert [r.text for r in again.ask_many(asked(4))] == [f"reply to number {i}" for i in range(4)] and again.spent["calls"] == 1


def test_34_a_server_that_is_gone_does_not_take_the_night():
    with Loopback(lambda body, n: "x") as server: pass
    client = quick(server, retries=1, give_up=3)
    with pytest.raises(Stopped, match="requests failed one after the other, the last: no connection"): list(client.ask_many(asked(1000)))
    assert client.spent["calls"] <= 2*(3 + 2*4)


NONSENSE = [(200, {"Content-Type": "text/html"}, b"<html>Welcome to the hotel"), (200, {}, b'{"choices": [{"mes'), (200, {}, b""), {"choices": None}, {"choices": []}, {"choices": [{"message": None}]}, {"choices": [{"message": 3}]},
            {"error": {"message": "overloaded"}}, [1, 2], "null"]

@pytest.mark.parametrize("bad", NONSENSE, ids=str)
def test_35_what_is_no_reply_is_tried_again_and_never_stored(bad, tmp_path):
    sent = (200, {}, b"null") if bad == "null" else (200, {}, json.dumps(bad).encode()) if isinstance(bad, list) else bad
    with Loopback(lambda body, n: sent if n == 0 else "fine") as server:
        assert quick(server, cache=str(tmp_path)).ask([message("a")]).text == "fine" and len(server.requests) == 2
    with Loopback(lambda body, n: sent) as server:
        (reply,) = quick(server, cache=str(tmp_path/"other"), retries=1).ask_many([[message("a")]])
        assert reply.finish == "failed" and ReplyStore(tmp_path/"other").db.execute("select count(*) from replies").fetchone() == (0,)


# --- 36, 37: what is no answer

@pytest.mark.parametrize("answer, flag", [(Loopback.reply(None, refusal="I can't."), "refusal"), (Loopback.reply("half", "content_filter"), "filtered"), (error(400, message="policy", code="content_filter"), "filtered"),
                                          (error(400, message="policy", code="content_filter", type=None), "filtered"), (Loopback.reply("a red cat on a", "length"), "cut"), (Loopback.reply("", "stop"), "empty"), (Loopback.reply("I'm sorry, I can't assist with that."), "refusal")], ids=str)
def test_36_endings_are_labelled_and_not_paid_for_twice(answer, flag, tmp_path):
    with Loopback(lambda body, n: answer) as server:
        (reply,) = quick(server, cache=str(tmp_path), retries=1).ask_many([[message("a")]])
        assert flag in reply.flags
        again = quick(server, cache=str(tmp_path), retries=0)
        (same,) = again.ask_many([[message("a")]])
        assert same.flags == reply.flags and again.spent["calls"] == (flag == "empty")    # an empty reply may be better next time


BAD = ["I'm sorry, but I can't assist with that request.", "I’m sorry, but I can’t identify people in images.", "Sorry, I can't help with this one.", "Unfortunately, I cannot view the image.", "I am unable to process this image.",
       "As an AI language model, I don't have the ability to see pictures.", "I apologize, but I won't be able to continue.", "My apologies, something went wrong.", "I cannot comply.", "Please provide the image you would like me to describe.",
       "There is no image attached.", "No image was provided, so I cannot describe it.", "I don't have access to the image."]
GOOD = ["A man says sorry to a dog.", "A sign on the door reads \"Sorry, we are closed\".", "There is no image on the wall, only a frame.", "I can see a cat.", "A cat that can't reach the fish.", "Please ring the bell, says the sign.", "A very, very, very large dog.",
        "A red cat, a blue cat and a green cat.", "Two dogs. One dog is red. One dog is blue.", "A dog; a dog; a cat", "Apology note on a table.", "NO NO NO NO says the poster", "1, 2, 3, 4, 5 on a ruler", "Unfinished house beside a lake", "A tired pilot, afraid of nothing"]

def test_37_apologies_and_loops():
    assert [t for t in BAD if not {"refusal", "apology"} & set(text_flags(t))] == [] and [t for t in GOOD if text_flags(t)] == []
    loops = ["a cat " * 3, "and and and and and", "It is red. It is red. It is red.", "The sky is blue over the hills. The sky is blue over the hills.", "the dog, the dog, the dog, the dog", "红色的猫坐在海滩上红色的猫坐在海滩上红色的猫坐在海滩上红色的猫坐在海滩上", "ha"*40]
    assert [t for t in loops if text_flags(t) != ["loop"]] == []
    began = time.process_time()
    text_flags("a b " * 5 + "xy" * 20000); text_flags(" ".join(map(str, range(3000))))
    assert time.process_time() - began < 2


def test_37_no_caption_of_the_world_looks_bad():
    from recap.core import keyed_rng
    from recap.language import alt_text, descriptive_caption, short_caption
    from recap.world import scenes_of
    texts = [f(s, keyed_rng(0, i, f.__name__)) for i, s in enumerate(scenes_of("easy+middle+whole", 300, seed=3)) for f in (alt_text, descriptive_caption, short_caption)]
    assert [t for t in texts if t.strip() and text_flags(t)] == [] and [t for t in texts if tidy_text(t) != " ".join(t.split()) and '"' not in t] == []


# --- 38: keys

def everything(e):
    "A traceback with every local variable of every frame but this file's, which knows the key."
    found = traceback.TracebackException.from_exception(e, capture_locals=True)
    found.stack = traceback.StackSummary([f for f in found.stack if f.filename != __file__])
    assert len(found.stack) >= 1 and all(f.locals is not None for f in found.stack)
    return "".join(found.format())


@pytest.mark.parametrize("answer", [error(401, message=f"Incorrect API key provided: {KEY}."), error(401, message="nothing"), error(403, message=f"key {KEY} may not"), (401, {}, KEY.encode()), error(400, message=f"odd {KEY}"), (200, {}, KEY.encode()), None,
                                    error(429, message=KEY, code="insufficient_quota")], ids=["401", "401 bare", "403", "401 text", "400", "200", "hangs up", "429"])
def test_38_the_key_is_nowhere(answer, capfd):
    with Loopback(lambda body, n: answer) as server:
        with pytest.raises(RecapError) as caught: quick(server, retries=1).ask([message("a")])
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    full = everything(caught.value)
    assert KEY not in full and KEY[3:] not in full and caught.value.__cause__ is None and caught.value.__context__ is None
    assert KEY not in "".join(capfd.readouterr())
    if answer and answer[0] == 401: assert "does not accept the key in RECAP_API_KEY" in str(caught.value) and len(server.requests) == 1


def test_38_whose_key_goes_where(monkeypatch):
    with Loopback(lambda body, n: error(401, message="who are you?")) as server:
        monkeypatch.delenv("RECAP_API_KEY")
        with pytest.raises(Stopped, match="wants a key.*RECAP_API_KEY"): quick(server).ask([message("a")])
        assert server.headers[0]["Authorization"] == "Bearer none"              # OpenAI's key stays at home
    assert Server(ServerConfig("https://api.openai.com/v1", "m")).client.api_key == "sk-not-for-everybody"
    monkeypatch.setenv("OWN", " sk-own\n")
    assert Server(ServerConfig("https://example.org/v1", "m", key_env="OWN")).client.api_key == "sk-own"
    monkeypatch.setenv("OWN", "sk-ключ")
    with pytest.raises(RecapError, match="a character that no key has") as caught: Server(ServerConfig("https://example.org/v1", "m", key_env="OWN"))
    assert "ключ" not in everything(caught.value)
    assert "sk-" not in repr(ServerConfig("https://example.org/v1", key_env="OWN").to_dict())


# --- turns, budgets, threads

def test_concurrency_and_order():
    under_way, most, lock = [0], [0], threading.Lock()
    def slow(body, n):
        with lock: under_way[0] += 1; most[0] = max(most[0], under_way[0])
        time.sleep(.02*(n % 3))
        with lock: under_way[0] -= 1
        return f"reply to {told(body)}"
    with Loopback(slow) as server:
        for wide in (1, 5):
            most[0] = 0
            assert [r.text for r in quick(server, concurrency=wide).ask_many(asked(30))] == [f"reply to number {i}" for i in range(30)] and most[0] <= wide
        assert most[0] > 1


def test_requests_are_read_as_they_are_needed():
    taken = []
    def lazily():
        for i in range(1000): taken.append(i); yield [message(f"number {i}")]
    with Loopback(lambda body, n: "x") as server:
        replies = quick(server, concurrency=2).ask_many(lazily())
        next(replies); assert len(taken) <= 5
        replies.close(); time.sleep(.1); assert len(server.requests) <= 6


def test_rate():
    arrived = []
    with Loopback(lambda body, n: arrived.append(time.monotonic()) or "x") as server: list(quick(server, per_minute=1200, concurrency=8).ask_many(asked(12)))
    assert max(arrived) - min(arrived) >= 11*.05 - .06


@pytest.mark.parametrize("limit, calls", [(dict(max_calls=7), 7), (dict(max_total_tokens=80, max_tokens=20), 4), (dict(max_money=.00015, price_in=1., price_out=2., max_tokens=20), 6)])
def test_budgets_hold_and_the_next_run_goes_on(limit, calls, tmp_path):
    with Loopback(lambda body, n: "one two three four five") as server:      # 10 tokens in, 5 out; a request of 20 at most
        client = quick(server, cache=str(tmp_path), concurrency=2, **limit)
        with pytest.raises(Stopped, match="budget is used up"): list(client.ask_many(asked(20)))
        assert client.spent["calls"] == calls == len(server.requests)
        rest = quick(server, cache=str(tmp_path), max_tokens=limit.get("max_tokens", 512))
        assert len(list(rest.ask_many(asked(20)))) == 20 and rest.spent["kept"] == calls and len(server.requests) == 20


@pytest.mark.parametrize("limits", [dict(max_money=.02, price_in=3., price_out=15.), dict(max_total_tokens=3000)])
def test_no_budget_is_passed_by_what_is_under_way(limits):
    "Replies of every length, requests of every size, eight at once: the server keeps the bill."
    bill, lock = [0., 0], threading.Lock()
    def answer(body, n):
        asked_, told_ = 2*(len(told(body)) + 16)//4, 1 + hash(told(body)) % 90      # twice as many tokens as we guess
        with lock: bill[0] += (3*asked_ + 15*told_)/1e6; bill[1] += asked_ + told_
        time.sleep(.002*(n % 5))
        return Loopback.reply("x") | {"usage": {"prompt_tokens": asked_, "completion_tokens": told_}}
    with Loopback(answer) as server:
        client = quick(server, concurrency=8, max_tokens=90, **limits)
        with pytest.raises(Stopped, match="the next request may"): list(client.ask_many([message(f"{i}" + "w"*(i % 7*40))] for i in range(1000)))
    most = 2*74 + 90, (3*2*74 + 15*90)/1e6
    if "max_money" in limits: assert limits["max_money"] - 1.2*most[1] < bill[0] <= limits["max_money"] and client.spent["money"] == pytest.approx(bill[0])
    else: assert 3000 - 1.2*most[0] < bill[1] <= 3000 and client.spent["tokens"] == bill[1]


def test_what_was_sent_and_not_answered_counts_as_the_dearest():
    prices = dict(price_in=1., price_out=1., max_tokens=90, retries=0)
    with Loopback(lambda body, n: None) as server:
        client = quick(server, max_money=1., **prices)
        list(client.ask_many(asked(3)))
        assert client.spent["money"] == pytest.approx(3*(6 + 90)/1e6)            # "number 0": 2 tokens, and 4 for a message
        with pytest.raises(Stopped, match="max_money"): list(quick(server, max_money=.0003, give_up=99, **prices).ask_many(asked(9)))
        assert len(server.requests) == 6
    gone = quick(server, max_money=1., **prices)
    list(gone.ask_many(asked(3)))
    assert gone.spent["failed"] == 3 and gone.spent["money"] == 0                # nobody heard them


def test_money_is_counted_without_a_limit_too():
    with Loopback(lambda body, n: "a red cat") as server:
        client = quick(server, price_in=.4, price_out=1.6)
        list(client.ask_many(asked(10)))
    assert client.spent["money"] == pytest.approx(10*(10*.4 + 3*1.6)/1e6) and "money" not in quick(server).spent


def test_tokens_a_minute_over_the_wire():
    arrived = []
    with Loopback(lambda body, n: arrived.append(time.monotonic()) or "one two three four five") as server:
        client = quick(server, tokens_per_minute=3000, max_tokens=20, concurrency=4)     # 50 a second, 15 a request
        list(client.ask_many(asked(9)))
    assert max(arrived) - min(arrived) >= 8*.3 - .1
    assert max(arrived) - min(arrived) < 8*.3 + 2.5                                    # the guesses were settled


@pytest.mark.parametrize("wrong", [[1], [1, 1, 2, 3], [.5, 1, 2]])
def test_tokens_a_minute_in_any_minute(wrong):
    "Requests that start within sixty seconds take what a minute allows, and one more; wrong guesses cancel out."
    import random
    for seed in range(10):
        rng, now, started, due = random.Random(seed), [0.], [], []
        gate = Gate(tokens_per_minute=1000, clock=lambda: now[0], pause=lambda s: now.__setitem__(0, now[0] + s))
        for _ in range(60):
            used = rng.randrange(1, 400)
            guess = used*rng.choice(wrong)
            gate.enter(guess); started.append((now[0], used)); due.append((now[0] + rng.random()*5, used - guess))
            now[0] += rng.random()
            for d in [d for d in due if d[0] <= now[0]]: gate.settle(d[1]); due.remove(d)
        total, span = sum(u for _, u in started[:-1]), started[-1][0]
        assert 700 < total/span*60 < 1000 + 400*60/span + 1e-6                         # and the limit is used
        for t, _ in started if wrong == [1] else (): assert sum(u for s, u in started if t <= s < t + 60) <= 1000 + 400


def test_a_budget_in_tokens_or_money_needs_a_server_that_counts():
    with Loopback(lambda body, n: Loopback.reply("a cat") | {"usage": None}) as server:
        for limit in (dict(max_total_tokens=1000), dict(max_money=1., price_in=1.)):
            with pytest.raises(Stopped, match="give max_calls instead"): quick(server, **limit).ask([message("a")])
        assert quick(server, tokens_per_minute=10**6).ask([message("a")]).tokens is None


def test_the_same_request_at_the_same_time_is_paid_for_once(tmp_path):
    def slow(body, n): time.sleep(.1); return "once"
    with Loopback(slow) as server:
        assert [r.text for r in quick(server, cache=str(tmp_path), concurrency=6).ask_many([[message("same")]]*6)] == ["once"]*6 and len(server.requests) == 1


# --- what is kept

CHILD = '''
import sys
from recap.servers import Server, ServerConfig, message
client = Server(ServerConfig(sys.argv[1], "toy", cache=sys.argv[2], concurrency=3))
for r in client.ask_many([[message(f"number {i}")] for i in range(60)]): print(r.text, flush=True)
'''

def test_killed_and_started_again_pays_for_nothing_twice(tmp_path):
    def answer(body, n): time.sleep(.01); return f"reply to {told(body)}"
    env = os.environ | {"PYTHONPATH": str(project_root())}
    with Loopback(answer) as server:
        child = subprocess.Popen([sys.executable, "-c", CHILD, server.url, tmp_path], stdout=subprocess.PIPE, text=True, env=env)
        said = [child.stdout.readline() for _ in range(15)]
        child.send_signal(signal.SIGKILL); child.wait()
        assert said[14] == "reply to number 14\n"
        first = len(server.requests)
        texts = [r.text for r in quick(server, cache=str(tmp_path)).ask_many(asked(60))]
    assert texts == [f"reply to number {i}" for i in range(60)] and first < 60
    assert len(server.requests) <= 60 + 3                           # but those that were on their way


RELABEL = '''
import sys
from recap.relabel import relabel
from recap.servers import ServerConfig
relabel(sys.argv[1], ServerConfig(sys.argv[2], "toy", cache=sys.argv[3], concurrency=3), ["dsc"], sys.argv[4], batch_size=4)
'''

@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_22_relabelling_killed_at_random_moments_pays_once(kills, tmp_path):
    "However often it is killed, nothing that was saved is asked for again: only what was on its way at a kill."
    import random
    from recap.corpus import open_corpus
    rng, n = random.Random(kills), 10*kills + 20
    (tmp_path/"in").mkdir()
    for i in range(n): Image.new("RGB", (16, 16), (i, 2*i % 256, 7)).save(tmp_path/"in"/f"{i:03d}.png")
    def colour(body, number=0): return "colour %d %d %d" % as_picture(base64.b64decode(body["messages"][0]["content"][0]["image_url"]["url"].split(",")[1])).getpixel((0, 0))
    def answer(body, number): time.sleep(.03); return colour(body)
    env = os.environ | {"PYTHONPATH": str(project_root()), "OMP_NUM_THREADS": "1"}
    with Loopback(answer) as server:
        args = [sys.executable, "-c", RELABEL, tmp_path/"in", server.url, tmp_path/"kept", tmp_path/"out"]
        killed = 0
        for _ in range(kills):
            child, before, deadline = subprocess.Popen(args, env=env), len(server.requests), time.time() + 120
            while len(server.requests) == before and child.poll() is None and time.time() < deadline: time.sleep(.005)
            time.sleep(rng.random()*.3)
            child.send_signal(signal.SIGKILL); killed += child.wait() == -signal.SIGKILL
        subprocess.run(args, env=env, check=True)
        assert killed and len(server.requests) <= n + 3*killed
    texts = open_corpus(tmp_path/"in", tmp_path/"out"/"captions").captions("dsc")
    assert list(texts.values()) == [f"colour {i} {2*i % 256} 7" for i in range(n)]


def test_what_a_reply_depends_on(tmp_path):
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    with Loopback(lambda body, n: f"reply {n}") as server:
        ask = lambda picture=red, text="what?", **s: quick(server, cache=str(tmp_path), **s).ask([message(text, [picture])]).text
        first = ask()
        assert ask() == ask(red.convert("P")) == ask(concurrency=1, timeout=9., retries=9) == first
        others = [ask(blue), ask(text="why?"), ask(temperature=.5), ask(max_tokens=9), ask(longest_side=4), ask(seed=1), ask(logprobs=True), ask(extra='{"top_p": 0.1}')]
        assert len({first, *others}) == 9 and len(server.requests) == 9


def test_several_processes_share_the_file(tmp_path):
    stores = [ReplyStore(tmp_path) for _ in range(4)]
    def write(s): [s.put(f"{i % 50}", Reply(f"text {i % 50}")) for i in range(60)]
    threads = [threading.Thread(target=write, args=(s,)) for s in stores]
    for t in threads: t.start()
    for t in threads: t.join()
    assert all(ReplyStore(tmp_path).get(str(i)).text == f"text {i}" for i in range(50))


# --- what is sent

def test_what_a_server_sees():
    with Loopback(lambda body, n: "x") as server:
        quick(server, max_tokens=99, temperature=None, seed=5, extra='{"top_k": 3}', longest_side=32).ask([message("be brief", role="system"), message("what?", [Image.new("L", (64, 16), 77)])])
    body = server.requests[0]
    url = body["messages"][1]["content"][0]["image_url"]["url"]
    assert as_picture(base64.b64decode(url.split(",")[1])).size == (32, 8) and body["messages"][0] == {"role": "system", "content": "be brief"}
    assert {k: v for k, v in body.items() if k != "messages"} == {"model": "toy", "max_tokens": 99, "seed": 5, "top_k": 3}


def test_log_probabilities_are_summed():
    places = {"content": [{"token": "a", "logprob": -.5}, {"token": "b", "logprob": -.25}]}
    def answer(body, n):
        reply = Loopback.reply("a b"); reply["choices"][0]["logprobs"] = places if body.get("logprobs") else None
        return reply
    with Loopback(answer) as server:
        assert (quick(server, logprobs=True).ask([message("a")]).logprob, quick(server).ask([message("a")]).logprob) == (-.75, None)


def test_the_newer_name_of_a_limit():
    def modern(body, n): return error(400, message="Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", param="max_tokens") if "max_tokens" in body else f"at most {body['max_completion_tokens']}"
    with Loopback(modern) as server: assert [r.text for r in quick(server, max_tokens=7, concurrency=1).ask_many(asked(3))] == ["at most 7"]*3 and len(server.requests) == 4


def test_the_servers_only_model_needs_no_name():
    with Loopback(lambda body, n: body["model"], models=["a/b"]) as server: assert Server(ServerConfig(server.url, cache="")).ask([message("a")]).text == "a/b"
    with Loopback(lambda body, n: "x", models=["one", "two"]) as server:
        with pytest.raises(RecapError, match="2 models .one, two.: name one behind #"): Server(ServerConfig(server.url, cache="")).ask([message("a")])
    with pytest.raises(RecapError, match="no connection"): Server(ServerConfig(server.url, cache="")).ask([message("a")])


def test_thinking_is_taken_off():
    with Loopback(lambda body, n: Loopback.reply("<think>a cat? a dog?</think>\n\nA cat.")) as server: assert quick(server).ask([message("a")]).text == "A cat."


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "YCbCr", "LAB", "F"])
def test_any_picture_can_be_sent(mode):
    im = Image.new("L", (40, 30), 200).convert("I;16" if mode == "I;16" else "RGB" if mode == "LAB" else mode)
    if mode == "LAB":
        from PIL import ImageCms
        im = ImageCms.applyTransform(im, ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"))
    back = as_picture(base64.b64decode(picture_url(im, 20).split(",")[1]))
    assert back.mode == "RGB" and back.size == (20, 15)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (4000, 2), (300, 300)])
def test_any_shape_can_be_sent(size):
    back = as_picture(base64.b64decode(picture_url(Image.new("RGB", size), 256).split(",")[1]))
    assert max(back.size) == min(256, max(size)) and min(back.size) >= 1
