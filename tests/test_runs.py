"Stages as processes: refused parameters, locks, deaths, secrets, full disks."
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import code_page, environment, one_line, recap


def papermill(root, page, out, *args):
    return subprocess.run([sys.executable, "-m", "papermill", f"nbs/{page}.ipynb", str(out), "-k", "python3", "--no-progress-bar", *args],
                          cwd=root, env=environment(root), capture_output=True, text=True)


def alive(pid):
    try: return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError: return False


def wait_for(what, seconds=60):
    end = time.time() + seconds
    while time.time() < end:
        if found := what(): return found
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def start(root, *args, **env):
    code = "from recap.command import main; main()"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], cwd=root, env=environment(root, **env), stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True)


def test_plain_papermill_is_as_safe(project, tmp_path):
    ok = papermill(project, "04_count", tmp_path/"a.ipynb", "-p", "steps", "2")
    assert ok.returncode == 0, ok.stderr
    assert json.loads((project/"runs/page/04_count/results.json").read_text())["steps"] == 2
    bad = papermill(project, "04_count", tmp_path/"b.ipynb", "-p", "stepps", "2")
    assert bad.returncode != 0 and "has no parameter 'stepps' (did you mean 'steps'?)" in bad.stderr


def test_page_without_its_tag_is_refused(project):
    page = project/"nbs/04_count.ipynb"
    nb = json.loads(page.read_text())
    for c in nb["cells"]: c["metadata"] = {}
    page.write_text(json.dumps(nb))
    one_line(recap(project, "stage", "04_count"), "0 cells tagged `parameters`")


def test_parameters_are_refused_in_one_line(project):
    for given, words in [("nothing=3", "has no parameter"), ("steps=many", "is str"), ("pause=sk-aaaaaaaaaaaaaaaaaaaaaaa", "is str"),
                         ("out=hf_abcdefghijklmnopqrstu", "looks like a secret"), ("steps", "name=value")]:
        one_line(recap(project, "stage", "04_count", "-p", given), words)
    one_line(recap(project, "stage", "04_count", "-p", "out=xx very-secret-9", MY_TOKEN="very-secret-9"), "looks like a secret")
    assert not (project/"runs").exists()


def test_a_secret_that_a_page_prints_is_not_kept(project):
    code_page(project, "06_leak", [], "print('the key is', os.environ['THEIR_API_KEY'])\nrun.finish({})")
    done = recap(project, "stage", "06_leak", THEIR_API_KEY="planted-\"secret\"-12345")
    assert done.returncode == 0, done.stderr
    for name in ("page.ipynb", "log.txt"):
        text = (project/"runs/page/06_leak"/name).read_text()
        assert "the key is ***" in text and "planted-" not in text


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="parent-death signals are Linux's")
@pytest.mark.parametrize("victim", ["launcher", "papermill"])
def test_the_kernel_dies_with_its_parents(project, victim):
    import psutil
    launcher = start(project, "stage", "04_count", "-p", "steps=1000", "-p", "pause=0.05")
    beats = project/"runs/page/04_count/beats"
    wait_for(lambda: beats.exists() and beats.read_text())
    kernel = int(beats.read_text().split()[0])
    family = [p.pid for p in psutil.Process(launcher.pid).children(recursive=True)]
    assert kernel in family and len(family) >= 2
    os.kill(launcher.pid if victim == "launcher" else psutil.Process(kernel).ppid(), signal.SIGKILL)
    killed = time.time()
    launcher.wait(30)
    wait_for(lambda: not any(alive(p) for p in family), 5)
    assert float(beats.read_text().split()[-1]) < killed + 0.5, "it wrote on after its parent had died"


def test_a_survivor_keeps_the_folder_to_itself(project):
    survivor = subprocess.Popen([sys.executable, "-c", "import sys, time\nfrom recap.runs import lock_folder\nlock_folder(sys.argv[1]); print('held', flush=True); time.sleep(60)",
                                 str(project/"runs/page/04_count")], stdout=subprocess.PIPE, env=environment(project))
    survivor.stdout.readline()
    try:
        one_line(recap(project, "stage", "04_count"), f"(process {survivor.pid})", "wait until it ends")
        assert not (project/"runs/page/04_count/results.json").exists()
    finally: survivor.kill(); survivor.wait()
    assert recap(project, "stage", "04_count").returncode == 0


def test_a_dead_kernel_is_told(project):
    code_page(project, "06_dies", [], "os.kill(os.getpid(), 9)")
    one_line(recap(project, "stage", "06_dies"), "kernel was killed")


def test_a_full_disk_is_told_and_loses_nothing(project):
    where = project/"runs/page/04_count"
    where.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(where)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        assert recap(project, "stage", "04_count").returncode == 0
        good = (where/"results.json").read_bytes()
        state = (where/"state.json").read_bytes()
        (where/"page.ipynb").unlink()
        with open(where/"beats", "ab", buffering=0) as f:  # a file of the stage's own grows until the disk is full
            try:
                while f.write(b"x"*1024): pass
            except OSError: pass
        one_line(recap(project, "stage", "04_count", "-p", "steps=4"), "disk full")
        assert (where/"state.json").exists() or (where/".stale/state.json").read_bytes() == state
        (where/".stale/beats").unlink(missing_ok=True); (where/"beats").unlink(missing_ok=True)
        assert recap(project, "stage", "04_count").returncode == 0
        assert (where/"results.json").read_bytes() == good
    finally: subprocess.run(["umount", str(where)], check=True)


def test_enospc_becomes_one_line(tmp_path, monkeypatch):
    import errno
    from recap.core import RecapError, atomic_write, write_json
    write_json(tmp_path/"a.json", {"old": 1})
    def full(fd): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RecapError, match="disk full"): write_json(tmp_path/"a.json", {"new": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"] and "old" in (tmp_path/"a.json").read_text()
    with pytest.raises(RecapError, match="disk full"):
        with atomic_write(tmp_path/"b"): raise OSError(errno.ENOSPC, "No space left on device")


def test_other_parameters_start_anew_and_the_same_continue(project):
    from recap.core import read_json
    run = start(project, "stage", "04_count", "-p", "steps=40", "-p", "pause=0.1")
    state = project/"runs/page/04_count/state.json"
    wait_for(lambda: state.exists() and read_json(state)["step"] >= 3)
    os.killpg(run.pid, signal.SIGKILL); run.wait()
    steps = read_json(state)["step"]
    assert recap(project, "stage", "04_count", "-p", "steps=40", "-p", "pause=0.1", "-p", "threads=1").returncode == 0
    assert read_json(state.with_name("run.json"))["fresh"] is False
    assert len((state.with_name("beats")).read_text().split("\n")) - 1 <= 41, "the second run did not begin at 0"
    assert steps >= 3
    assert recap(project, "stage", "04_count", "-p", "steps=4").returncode == 0
    assert read_json(state.with_name("run.json"))["fresh"] is True
    assert not state.with_name(".stale").exists()


@pytest.mark.parametrize("fault, calls", [("Kernel died before replying to kernel_info", 2), ("something else", 1)])
def test_a_kernel_that_never_answered_is_started_once_more(monkeypatch, capsys, fault, calls):
    import io, nbformat, papermill
    from recap import runs
    seen = []
    def execute(*given, **how):
        seen.append(how)
        if len(seen) < 2: raise RuntimeError(fault)
    monkeypatch.setattr(papermill, "execute_notebook", execute)
    monkeypatch.setattr(runs, "die_with_parent", lambda pid: None)
    monkeypatch.setenv("RECAP_LAUNCHER", "")
    orders = dict(parent=os.getpid(), page=nbformat.v4.new_notebook(), to="nowhere.ipynb", params={}, cwd=".")
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(orders)))
    if calls == 2: runs._child()
    else:
        with pytest.raises(SystemExit): runs._child()
        assert fault in capsys.readouterr().out
    assert len(seen) == calls and seen[0] == seen[-1]
