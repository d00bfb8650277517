"The voting page: nothing lost, nothing counted twice, nobody told who painted what; in a browser, by many at once, against ill will."
import http.client, io, json, math, random, re, signal, socket, sqlite3, subprocess, sys, threading, time
from collections import Counter
from pathlib import Path
import pytest
from PIL import Image
from conftest import ROOT, environment, recap
from test_report import CHROMIUM, FLAGS, HOSTILE
from benchmarks.vote import thousand, votes_by_task
from recap import vote as v
from recap.core import RecapError

pytest.importorskip("fastapi", reason="fastapi is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed")

COLOURS = dict(red=(200, 30, 30), green=(30, 160, 60), blue=(40, 60, 200))

def folders(root, n=6, names=("red", "green"), prompt="a square, number NUMBER"):
    "A folder a system; each paints in its own colour, so that a picture tells the test who made it."
    for name in names:
        (root/name).mkdir(parents=True)
        for i in range(n): Image.new("RGB", (32, 32), COLOURS[name]).save(root/name/f"{i:05d}_0.png")
        (root/name/"prompts.jsonl").write_text("".join(json.dumps(dict(index=i, prompt=prompt.replace("NUMBER", str(i)))) + "\n" for i in range(n)), encoding="utf8")
    return {name: root/name for name in names}

@pytest.fixture
def study(tmp_path): return v.pair_study(folders(tmp_path), per_pair=2, every=5)

def refusal(f, *args):
    try: f(*args)
    except v.Refused as e: return e.status

# --- the ledger

def test_many_random_acts_agree_with_a_list_kept_beside(tmp_path):
    study, rng = v.pair_study(folders(tmp_path, 8), per_pair=3, every=4), random.Random(1)
    ballots = v.Ballots(tmp_path/"votes.db", study)
    raters = [ballots.rater(f"link {k}") for k in range(4)]
    stand, order, turns = {}, {r: [] for r in raters}, Counter()     # (rater, shown) -> answer; the rater's answers in order; how often answered
    for _ in range(600):
        r, what = rng.choice(raters), rng.random()
        if rng.random() < .02: ballots.close(); ballots = v.Ballots(tmp_path/"votes.db", study)      # a restart
        state = ballots.state(r)
        assert state["done"] == len(order[r]) and (state["undo"] or {}).get("id") == (order[r][-1] if order[r] else None)
        known = [i for q, i in stand if q == r]
        if what < .6 and state["tasks"]:
            t, a = state["tasks"][0], rng.choice(v.PAIR)
            ballots.vote(r, t["id"], t["turn"], a); stand[r, t["id"]] = a; order[r].append(t["id"]); turns[t["id"]] += 1
        elif what < .75 and known:                                   # the same once more, or another one
            i = rng.choice(known); a = rng.choice(v.PAIR)
            assert refusal(ballots.vote, r, i, turns[i] - 1, a) == (None if a == stand[r, i] else 409)
        elif what < .85 and order[r]:
            i = order[r].pop(); ballots.undo(r, i, turns[i] - 1); old = stand.pop((r, i))
            assert refusal(ballots.vote, r, i, turns[i] - 1, old) == 409              # late copy of what was taken back
            ballots.undo(r, i, turns[i] - 1)                                          # taken back twice is once
        elif what < .95 and len(order[r]) > 1: assert refusal(ballots.undo, r, order[r][-2], turns[order[r][-2]] - 1) == 409
        else: assert refusal(ballots.vote, r, rng.randrange(500, 10**6), 0, "left") == 404
    assert {i: [a] for (_, i), a in stand.items()} == votes_by_task(tmp_path/"votes.db")
    assert len(v.votes_of(tmp_path/"votes.db")) == len(stand) and ballots._db.execute("SELECT COUNT(*) FROM answers").fetchone()[0] == sum(turns.values())

def test_two_servers_on_one_file_hand_out_no_place_twice(tmp_path):
    study = v.pair_study(folders(tmp_path, 10), per_pair=2, every=0)
    v.Ballots(tmp_path/"votes.db", study).close()
    def go(k):
        ballots = v.Ballots(tmp_path/"votes.db", study); r = ballots.rater(f"link {k}")
        while tasks := ballots.state(r)["tasks"]: ballots.vote(r, tasks[0]["id"], 0, "left")
        ballots.close()
    threads = [threading.Thread(target=go, args=(k,)) for k in range(6)]
    for t in threads: t.start()
    for t in threads: t.join()
    votes = v.votes_of(tmp_path/"votes.db")
    assert Counter(x["task"] for x in votes) == {i: 2 for i in range(10)} and len({(x["rater"], x["task"]) for x in votes}) == 20

@pytest.mark.parametrize("per_pair", [2, 3])
def test_every_pair_and_system_stands_as_often_on_either_side(tmp_path, per_pair):
    study = v.pair_study(folders(tmp_path, 9, COLOURS), per_pair=per_pair, every=0)
    ballots = v.Ballots(tmp_path/"votes.db", study)
    v.simulate(ballots, 5, lambda *_: "tie")
    votes = v.votes_of(tmp_path/"votes.db")
    assert len(votes) == 27*per_pair and {abs(2*n - per_pair) for n in Counter((x["task"], x["left"]) for x in votes).values()} == {per_pair % 2}
    for name in COLOURS:
        left, met = sum(x["left"] == name for x in votes), sum(name in x["systems"] for x in votes)
        assert abs(2*left - met) <= 2     # one for each of its two pairings

def test_a_task_whose_rater_left_goes_to_another_and_a_late_answer_counts(tmp_path):
    now = [1000.]
    study = v.pair_study(folders(tmp_path, 1), per_pair=1, every=0)
    ballots = v.Ballots(tmp_path/"votes.db", study, lambda: now[0])
    ann, ben = ballots.rater("a"), ballots.rater("b")
    first = ballots.state(ann)["tasks"][0]
    assert ballots.state(ben)["tasks"] == []
    now[0] += ballots.lease + 1
    second = ballots.state(ben)["tasks"][0]
    assert ballots.state(ann)["tasks"] == [] and ballots.look(first["id"])[0] == ballots.look(second["id"])[0]
    assert ballots.vote(ben, second["id"], 0, "left")["done"] == ballots.vote(ann, first["id"], 0, "tie")["done"] == 1
    assert len(v.votes_of(tmp_path/"votes.db")) == 2

def test_one_who_waits_too_long_keeps_the_task_while_there_is_room(tmp_path):
    now = [0.]
    ballots = v.Ballots(tmp_path/"votes.db", v.pair_study(folders(tmp_path, 3), per_pair=2, every=0), lambda: now[0])
    r = ballots.rater("a"); before = ballots.state(r)["tasks"]; now[0] += 10*ballots.lease
    assert ballots.state(r)["tasks"] == before

def test_a_full_disk_acknowledges_nothing_and_goes_on_later(tmp_path, study):
    with served(study, tmp_path/"votes.db") as (port, ballots):
        r = ballots.rater("link 1"); token = ballots.token(r)
        ballots._db.execute("PRAGMA wal_checkpoint(TRUNCATE)"); ballots._db.execute("CREATE TABLE filling(x)")
        ballots._db.execute(f"PRAGMA max_page_count = {ballots._db.execute('PRAGMA page_count').fetchone()[0]}")
        statuses = []
        with pytest.raises(sqlite3.OperationalError, match="full"):
            for _ in range(100): ballots._db.execute("INSERT INTO filling VALUES (zeroblob(2000))")
        for _ in range(400):
            status, told = post(port, "/api/join", dict(invitation=ballots.sign("invitation"), nonce=f"{random.randrange(2**128):032x}"), "")
            statuses.append(status)
            if status == 503: break
        assert statuses[-1] == 503
        ballots._db.execute("PRAGMA max_page_count = 1000000")
        status, told = post(port, "/api/state", {}, token); assert status == 200
        assert post(port, "/api/vote", dict(id=told["tasks"][0]["id"], turn=0, answer="tie"), token)[1]["done"] == 1

def test_what_a_study_painted_can_be_voted_on_as_it_lies(tmp_path):
    from recap.command import _systems
    from recap.core import read_json
    from recap.results import toy_study
    home = toy_study(tmp_path/"toy", n=6)
    of = lambda arm: home/f"evaluate_{arm}"/"images"/"people"
    study = v.pair_study(_systems([of("alt"), of("dsc95")]), real=of("real"), every=2)
    told = {str(r["index"]): r["prompt"] for r in read_json(home/"evaluate_alt"/"results.json")["texts"]["people"]["rows"]}
    assert {t.systems for t in study.tasks} == {("evaluate_alt", "evaluate_dsc95"), ("check", "check")} and {t.known for t in study.tasks} == {"", "tie", "0"}
    assert all(t.text == told[t.key] for t in study.tasks if not t.known) and study.left_out == 0

# --- what the votes say

def test_two_systems_have_the_elo_of_their_odds(tmp_path):
    study = v.pair_study(folders(tmp_path, 20), per_pair=1, every=0)
    ballots = v.Ballots(tmp_path/"votes.db", study)
    v.simulate(ballots, 1, lambda r, t, first: v.PAIR[(0 if int(t.key) < 15 else 1) ^ first])      # red wins 15, green 5, whatever the side
    found = v.vote_results(tmp_path/"votes.db", simulated=True, n=50)
    assert found["pairs"][0] | dict(rate=None) == dict(a="red", b="green", wins=15, losses=5, ties=0, rate=None) and found["pairs"][0]["rate"]["mean"] == .75
    assert found["elo"]["red"]["mean"] - found["elo"]["green"]["mean"] == pytest.approx(400*math.log10(3), abs=1e-6)
    assert {x["left"] for x in v.votes_of(tmp_path/"votes.db")} == {"red", "green"}        # and the side shown is kept (fault 43)

def test_an_unbeaten_system_has_a_finite_rating_and_says_why(tmp_path):
    ballots = v.Ballots(tmp_path/"votes.db", v.pair_study(folders(tmp_path, 5), per_pair=1, every=0))
    v.simulate(ballots, 1, lambda r, t, first: v.PAIR[first])
    found = v.vote_results(tmp_path/"votes.db", simulated=True, n=50)
    assert found["alpha"] == .5 and found["elo"]["red"]["mean"] - found["elo"]["green"]["mean"] == pytest.approx(400*math.log10(5.5/.5)) and "half a win" in "\n".join(v.vote_lines(found))

def test_people_and_programs_are_never_in_one_number(tmp_path):
    study = v.pair_study(folders(tmp_path, 6), per_pair=2, every=0)
    ballots = v.Ballots(tmp_path/"votes.db", study)
    person = ballots.rater("link 1")
    while tasks := ballots.state(person)["tasks"]: ballots.vote(person, tasks[0]["id"], 0, v.PAIR[ballots.look(tasks[0]["id"])[1]])    # a person for red
    v.simulate(ballots, 1, lambda r, t, first: v.PAIR[1 - first])                                                                       # a program for green
    people, programs = v.vote_results(tmp_path/"votes.db", n=20), v.vote_results(tmp_path/"votes.db", simulated=True, n=20)
    assert (people["evidence"], people["pairs"][0]["wins"], people["pairs"][0]["losses"], people["simulated"]) == ("people", 6, 0, 6)
    assert (programs["evidence"], programs["pairs"][0]["wins"], programs["people"]) == ("simulated", 0, 6) and any("SIMULATED" in x for x in v.vote_lines(programs))

def test_who_fails_the_checks_is_counted_and_left_out(tmp_path):
    study = v.pair_study(folders(tmp_path, 30), per_pair=3, every=5)
    ballots = v.Ballots(tmp_path/"votes.db", study)
    v.simulate(ballots, 3, lambda r, t, first: "tie" if t.known and r != 2 else "left")
    found = v.vote_results(tmp_path/"votes.db", simulated=True, n=20)
    assert {c["rater"]: c["excluded"] for c in found["checks"]} == {1: False, 2: True, 3: False} and found["votes"] + found["excluded_votes"] == 90
    assert all(c["asked"] >= 6 for c in found["checks"])
    rows = v.votes_of(tmp_path/"votes.db")
    assert len(rows) == 90 + sum(c["asked"] for c in found["checks"])               # the file keeps them all
    assert v.vote_results(tmp_path/"votes.db", simulated=True, least=0., n=20)["votes"] == 90

def test_raters_who_contradict_each_other_do_not_agree(tmp_path):
    study = v.pair_study(folders(tmp_path, 12), per_pair=2, every=0)
    for name, decide, alpha in (("same", lambda r, t, first: v.PAIR[int(t.key) % 2 ^ first], 1.), ("against", lambda r, t, first: v.PAIR[(r + int(t.key)) % 2 ^ first], -1 + 2*1/24)):
        v.simulate(v.Ballots(tmp_path/f"{name}.db", study), 2, decide)
        found = v.vote_results(tmp_path/f"{name}.db", simulated=True, n=20)["agreement"]
        assert found["equal"] == (name == "same") and found["alpha"] == pytest.approx(1. if name == "same" else 1 - 1/(12/23))     # two answers, 12 of each: chance of a difference 12/23

# --- through HTTP

class served:
    "The app in a thread, on a port of its own."
    def __init__(self, study, db, port=0): self.app, self.sock = v.make_app(study, db), socket.create_server(("127.0.0.1", port))
    def __enter__(self):
        self.server = uvicorn.Server(uvicorn.Config(self.app, log_level="error", server_header=False, lifespan="off"))
        self.thread = threading.Thread(target=self.server.run, kwargs=dict(sockets=[self.sock]), daemon=True); self.thread.start()
        while not self.server.started: time.sleep(.01)
        return self.sock.getsockname()[1], self.app.state.ballots
    def __exit__(self, *_): self.server.should_exit = True; self.server.force_exit = True; self.thread.join(5)

def post(port, path, body, token, **headers):
    c = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    c.request("POST", path, body if isinstance(body, (bytes, str)) else json.dumps(body), {"Content-Type": "application/json", "Authorization": f"Bearer {token}"} | headers)
    r = c.getresponse(); data = r.read(); c.close()
    return r.status, json.loads(data) if data[:1] in b"{[" else data

def test_ill_formed_requests_change_nothing(tmp_path, study):
    with served(study, tmp_path/"votes.db") as (port, ballots):
        r = ballots.rater("link 1"); token, t = ballots.token(r), ballots.state(r)["tasks"][0]
        good = dict(id=t["id"], turn=0, answer="left")
        bad = ["", "{", "null", "[]", "[" * 4000, '{"id": NaN}', b"\xff\xfe", json.dumps(good | dict(id=10**400)), json.dumps(good | dict(id=-1)), json.dumps(good | dict(turn=-1)), json.dumps(good | dict(answer=["left"])),
               json.dumps(good | dict(answer="\ud800")), json.dumps(good | dict(answer="left\0")), json.dumps(good | dict(rater=2)), "x"*5000, json.dumps(good) + " "*5000]
        seen = [post(port, "/api/vote", b, token)[0] for b in bad]
        assert all(400 <= s < 500 for s in seen), seen
        assert seen[-1] == 413 and post(port, "/api/vote", json.dumps(good), token, **{"Content-Type": "text/plain"})[0] == 422      # what a form of another site could send
        for wrong in ("", "0.0", token[:-1], token.upper(), f"{r + 1}{token[1:]}", "'; DROP TABLE raters; --"): assert post(port, "/api/vote", good, wrong)[0] == 401, wrong
        assert v.votes_of(tmp_path/"votes.db") == []
        assert post(port, "/api/vote", good, token)[0] == 200 and len(v.votes_of(tmp_path/"votes.db")) == 1

def test_a_picture_is_seen_only_by_its_signature(tmp_path, study):
    with served(study, tmp_path/"votes.db") as (port, ballots):
        state = ballots.state(ballots.rater("link 1"))
        def get(path):
            c = http.client.HTTPConnection("127.0.0.1", port, timeout=10); c.request("GET", path); r = c.getresponse(); d = r.read(); c.close()
            return r.status, r.headers, d
        url = state["tasks"][0]["pictures"][0]
        status, headers, data = get(url)
        name = {c: n for n, c in COLOURS.items()}[Image.open(io.BytesIO(data)).getpixel((0, 0))]
        assert status == 200 and name == ballots.look(state["tasks"][0]["id"])[0].systems[ballots.look(state["tasks"][0]["id"])[1]]
        assert not re.search("red|green|00000|Last-Modified|etag", str(headers) + url, re.I) and data.count(b"tEXt") + data.count(b"eXIf") == 0
        other = url.replace("-0-", "-1-")
        for path in (other, url[:-1], url + "/", url + "%00", "/i/", "/i/../votes.db", "/i/%2e%2e%2fvotes.db", "//etc/passwd", "/vote.html", "/i/" + "9"*400 + "-0-" + "0"*32): assert get(path)[0] in (404, 405, 307), path

def test_the_command_serves_restarts_with_the_same_links_and_counts(tmp_path):
    made = folders(tmp_path)
    args = [sys.executable, "-u", "-c", "from recap.command import main; main()", "vote", *map(str, made.values()), "--raters", "2", "--port", "0", "--db", str(tmp_path/"votes.db"), "--per-pair", "2"]
    links = []
    for how, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):
        p = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(ROOT), cwd=tmp_path)
        said = [p.stdout.readline() for _ in range(3)]
        assert said[0].startswith("6 tasks and 2 checks") and "http://127.0.0.1:" in said[1]
        port, token = re.search(r":(\d+)/#rater=(\S+)", said[1]).groups()
        for _ in range(100):
            try: status, state = post(int(port), "/api/state", {}, token); break
            except OSError: time.sleep(.1)
        status, state = post(int(port), "/api/vote", dict(id=state["tasks"][0]["id"], turn=0, answer="left"), token)
        links.append((token, state["done"])); p.send_signal(how)
        assert p.wait(20) == code
    assert links == [(links[0][0], 1), (links[0][0], 2)]                                   # the killed server's vote is there
    done = recap(ROOT, "vote", "--results", tmp_path/"votes.db", "--export", tmp_path/"votes.csv")
    assert done.returncode == 0 and "SIMULATED" not in done.stdout and len((tmp_path/"votes.csv").read_text().strip().split("\n")) == 3

def test_programs_that_misbehave_and_a_server_that_is_killed(tmp_path):
    found = thousand(tmp_path, 60, 4, 1)
    assert (found["lost"], found["twice"], found["wrong"], found["killed"], found["same_rater_twice"], found["raters_a_pair"]) == (0, 0, [], 1, 0, [4])

@pytest.mark.slow
def test_a_thousand_votes_and_three_kills(tmp_path):
    found = thousand(tmp_path, 1000, 8, 3)
    assert (found["lost"], found["twice"], found["wrong"], found["killed"], found["same_rater_twice"], found["raters_a_pair"]) == (0, 0, [], 3, 0, [4]) and found["votes"] >= 1000 and found["taken_back"] > 10

def test_without_the_packages_one_line_says_what_to_install(tmp_path, study, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(RecapError, match=r"pip install -e '.\[vote\]'"): v.make_app(study, tmp_path/"votes.db")
    assert not (tmp_path/"votes.db").exists()

# --- in a browser

@pytest.fixture(scope="module")
def browser():
    if not Path(CHROMIUM).exists(): pytest.skip(f"no browser at {CHROMIUM}")
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield b
        b.close()

class Tab:
    "A window of one rater that notes complaints and requests."
    def __init__(self, browser, link, width=1000, height=700, **kw):
        self.said, self.asked = [], []
        self.context = browser.new_context(viewport=dict(width=width, height=height), **kw)
        self.page = self.context.new_page()
        self.page.on("console", lambda m: self.said.append(m.text)); self.page.on("pageerror", lambda e: self.said.append(str(e)))
        self.page.on("request", lambda r: self.asked.append(r.url))
        self.page.goto(link); self.page.wait_for_selector("body:not([data-view=wait])")
    def view(self): return self.page.get_attribute("body", "data-view")
    def ready(self): self.page.wait_for_function("() => document.body.dataset.view == 'done' || document.body.dataset.ready && document.body.dataset.ready == document.body.dataset.task"); return self
    def do(self, act):
        "Act, and wait until another task, or the end, is there."
        self.ready(); before = self.page.get_attribute("body", "data-task"); self.page.wait_for_timeout(270)
        act(self.page)
        self.page.wait_for_function("b => document.body.dataset.view == 'done' || document.body.dataset.task != b", arg=before)
        return self.ready()
    def press(self, key): return self.do(lambda p: p.keyboard.press(key))
    def count(self): return int(self.page.inner_text("#count").split()[0])

def test_two_raters_at_once_with_keys_a_reload_and_a_second_window(browser, tmp_path):
    study = v.pair_study(folders(tmp_path, 4), per_pair=2, every=0)
    with served(study, tmp_path/"votes.db") as (port, ballots):
        raters = [ballots.rater(f"link {k}") for k in (1, 2)]
        tabs = [Tab(browser, f"http://127.0.0.1:{port}/#rater={ballots.token(r)}") for r in raters]
        for t in tabs: assert t.view() == "intro"; t.page.keyboard.press("Enter")
        for t, key in zip(tabs, ("ArrowLeft", "2")): t.press(key)
        for t, key in zip(tabs, ("Space", "ArrowRight")): t.press(key)
        assert [x["answer"] for x in v.votes_of(tmp_path/"votes.db")] == ["left", "right", "tie", "right"]
        first = tabs[0]
        task = first.page.get_attribute("body", "data-task"); first.page.reload(); first.ready()
        assert first.page.get_attribute("body", "data-task") == task and first.count() == 2          # a reload shows the same task
        first.press("Backspace"); assert first.count() == 1
        first.press("1"); assert first.count() == 2
        second = Tab(browser, f"http://127.0.0.1:{port}/#rater={ballots.token(raters[0])}").ready()  # the same rater's other window
        assert second.page.get_attribute("body", "data-task") == first.page.get_attribute("body", "data-task")
        first.press("ArrowLeft"); second.press("ArrowRight")                                         # two windows, two answers to one task: the first stands
        assert first.count() == 3 == second.count() and len([x for x in v.votes_of(tmp_path/"votes.db") if x["rater"] == raters[0]]) == 3
        first.do(lambda p: p.evaluate("for (let i = 0; i < 5; i++) dispatchEvent(new KeyboardEvent('keydown', {key: '3'}))"))   # a nervous finger is one vote
        assert first.view() == "done" and [x["answer"] for x in v.votes_of(tmp_path/"votes.db")][-2:] == ["left", "tie"]
        while tabs[1].view() != "done": tabs[1].press("ArrowDown")
        for t in tabs: assert [u for u in t.asked if not u.startswith((f"http://127.0.0.1:{port}/", "data:"))] == [] and t.said == []
        assert second.said == [] or all("409" in s for s in second.said)
        votes = v.votes_of(tmp_path/"votes.db")
        assert Counter(x["task"] for x in votes if not x["check"]) == {i: 2 for i in range(4)} and len({(x["rater"], x["task"]) for x in votes}) == len(votes)
        shown = "".join(t.page.content() + " ".join(t.asked) for t in tabs)
        assert not re.search(r"\bred\b|\bgreen\b|00000_0", shown)
        for t in [*tabs, second]: t.context.close()

def test_the_server_goes_away_and_comes_back(browser, tmp_path, study):
    with served(study, tmp_path/"votes.db") as (port, ballots):
        tab = Tab(browser, f"http://127.0.0.1:{port}/#rater={ballots.token(ballots.rater('link 1'))}")
        tab.page.keyboard.press("Enter"); tab.press("ArrowLeft")
    tab.page.wait_for_timeout(300); tab.page.keyboard.press("ArrowLeft")
    tab.page.wait_for_function("() => document.querySelector('#status').textContent.includes('sent again')")
    ballots.close()
    with served(study, tmp_path/"votes.db", port) as (port, ballots):
        tab.page.wait_for_function("() => document.querySelector('#count').textContent.startsWith('2 ')", timeout=20000)
        assert len(v.votes_of(tmp_path/"votes.db")) == 2
    tab.context.close()

@pytest.mark.parametrize("width, height, scheme", [(360, 640, "dark"), (1280, 800, "light")])
def test_hostile_prompts_on_a_phone_and_a_desk(browser, tmp_path, width, height, scheme):
    made = folders(tmp_path, 3, prompt=HOSTILE + " NUMBER " + "W"*400)
    study = v.pair_study({f"<script>{n}": f for n, f in made.items()}, per_pair=1, every=0)
    with served(study, tmp_path/"votes.db") as (port, ballots):
        tab = Tab(browser, f"http://127.0.0.1:{port}/#join={ballots.sign('invitation')}", width, height, color_scheme=scheme, has_touch=width < 500)
        tab.page.click("#start"); tab.ready()
        page = tab.page
        assert page.inner_text("#text").startswith("</p><script>") and page.evaluate("window.bad") is None
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the window"
        assert page.evaluate("document.documentElement.scrollHeight <= innerHeight + 1"), "one has to scroll to answer"
        boxes = [page.query_selector(f"[data-answer={a}]").bounding_box() for a in v.PAIR]
        assert all(b["width"] >= 44 and b["height"] >= 44 and b["x"] >= 0 and b["x"] + b["width"] <= width for b in boxes)
        assert page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0] < 128") == (scheme == "dark")
        tab.do(lambda p: p.tap("[data-answer=right]") if width < 500 else p.click("[data-answer=right]"))
        assert "#rater=" in page.url
        page.reload(); tab.ready(); assert tab.count() == 1                        # the invitation has become a rater's own link
        tab.do(lambda p: p.click("[data-answer=tie]")); tab.do(lambda p: p.click("#undo")); tab.press("ArrowLeft"); tab.press("ArrowRight")
        assert tab.view() == "done" and tab.said == [] and [x["answer"] for x in v.votes_of(tmp_path/"votes.db")] == ["right", "left", "right"]
        tab.context.close()

def test_captions_are_rated_with_five_keys_and_a_wrong_link_is_told(browser, tmp_path):
    (tmp_path/"c").mkdir()
    for i in range(2): Image.new("RGB", (40, 60), (80*i, 9, 9)).save(tmp_path/"c"/f"{i}.png")
    (tmp_path/"c"/"metadata.jsonl").write_text("".join(json.dumps(dict(file_name=f"{i}.png", text=HOSTILE, dsc=f"a panel {i}")) + "\n" for i in range(2)), encoding="utf8")
    study = v.caption_study(tmp_path/"c", ["alt", "dsc"], per_pair=1, every=3)
    with served(study, tmp_path/"votes.db") as (port, ballots):
        tab = Tab(browser, f"http://127.0.0.1:{port}/#rater={ballots.token(ballots.rater('link 1'))}", 360, 700)
        tab.page.click("#start"); tab.ready()
        assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth && document.documentElement.scrollHeight <= innerHeight + 1") and tab.page.evaluate("window.bad") is None
        tab.press("5"); tab.do(lambda p: p.click("[data-answer='2']"))
        while tab.view() != "done": tab.press("1")
        votes = v.votes_of(tmp_path/"votes.db")
        assert [x["answer"] for x in votes[:3]] == ["5", "2", "1"] and sum(not x["check"] for x in votes) == 4 and any(x["check"] for x in votes) and tab.said == []
        wrong = Tab(browser, f"http://127.0.0.1:{port}/#rater=1.{'0'*32}"); wrong.page.wait_for_selector("[data-view=problem]")
        late = Tab(browser, f"http://127.0.0.1:{port}/#rater={ballots.token(ballots.rater('link 2'))}")
        assert late.view() == "done" and "Others have taken" in late.page.inner_text("#kept")       # all places are taken: it says so
        for t in (tab, wrong, late): t.context.close()
