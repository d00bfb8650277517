"The study as a whole: killed, run twice, run again, asked for nonsense."
import os
import random
import signal
import subprocess
import time

import pytest
from conftest import borrow, one_line, recap, study_ready
from test_runs import alive, start, wait_for


def family(pid):
    import psutil
    try: return [p.pid for p in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess: return []


def kill_hard(run):
    "Kill the study's own process alone; whatever it started must go too."
    children = family(run.pid)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    wait_for(lambda: not any(alive(p) for p in children), 10)


def test_runs_once_then_has_nothing_to_do(project):
    done = recap(project, "study", "--scale", "tiny")
    assert done.returncode == 0 and "double: done in" in done.stdout and "left" in done.stdout, done.stdout + done.stderr
    began = time.time()
    again = recap(project, "study", "--scale", "tiny")
    assert again.returncode == 0 and "nothing to do" in again.stdout
    assert time.time() - began < 45


def test_only_what_changed_runs_again(project):
    assert recap(project, "study", "--scale", "tiny").returncode == 0
    page = project/"nbs/05_double.ipynb"
    page.write_text(page.read_text().replace("2*", "3*"))
    done = recap(project, "study", "--scale", "tiny")
    assert "double: done" in done.stdout and "count: done" not in done.stdout
    unrelated = project/"recap/other.py"
    unrelated.write_text("x = 1")
    assert "nothing to do" in recap(project, "study", "--scale", "tiny").stdout


def test_killed_study_continues_to_the_same_result(project):
    whole = recap(project, "study", "--scale", "tiny")
    assert whole.returncode == 0
    results = {p: p.read_bytes() for p in project.glob("runs/tiny/*/results.json")}
    assert len(results) == 2
    for p in project.glob("runs/tiny/*"): subprocess.run(["rm", "-rf", p], check=True)
    for at in (2, 5):
        run = start(project, "study", "--scale", "tiny")
        beats = project/"runs/tiny/count/beats"
        wait_for(lambda: beats.exists() and beats.read_text().count("\n") >= at)
        kill_hard(run)
    done = recap(project, "study", "--scale", "tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {p: p.read_bytes() for p in project.glob("runs/tiny/*/results.json")} == results
    assert beats.read_text().count("\n") <= 12 + 2, "it began again instead of continuing"
    assert len({line.split()[0] for line in beats.read_text().splitlines()}) == 3


def test_second_study_in_the_same_folder_is_refused(project):
    run = start(project, "study", "--scale", "tiny")
    try:
        wait_for(lambda: (project/"runs/tiny/count/beats").exists())
        one_line(recap(project, "study", "--scale", "tiny"), "another `recap study --scale tiny`", f"(process {run.pid})")
        one_line(recap(project, "stage", "count", "--scale", "tiny"), "another run of 04_count")
    finally: out, _ = run.communicate(timeout=120)
    assert run.returncode == 0, out


def test_interrupt_keeps_what_was_finished(project):
    run = start(project, "study", "--scale", "tiny")
    wait_for(lambda: (project/"runs/tiny/count/beats").exists())
    children = family(run.pid)
    os.kill(run.pid, signal.SIGINT)
    out, _ = run.communicate(timeout=60)
    assert run.returncode == 130 and "the same command continues" in out and "Traceback" not in out, out
    wait_for(lambda: not any(alive(p) for p in children), 10)


def test_mistakes_are_one_line(project):
    one_line(recap(project, "study", "--scale", "tinny"), "did you mean 'tiny'")
    one_line(recap(project, "stage", "doubel", "--scale", "tiny"), "did you mean 'double'")
    one_line(recap(project, "stage", "double", "--scale", "tiny"), "recap stage count")
    yaml = project/"scales/tiny/count.yaml"
    good = yaml.read_text()
    for bad, words in [(good + "stepps: 3\n", "has no parameter 'stepps'"), (good.replace("steps: 12\n", ""), "no value for steps"),
                       (good.replace("steps: 12", "steps: [1"), "not valid YAML"), (good.replace("# page: 04_count", "#"), "first line must name the page")]:
        yaml.write_text(bad)
        one_line(recap(project, "study", "--scale", "tiny"), words)
    yaml.unlink()
    one_line(recap(project, "study", "--scale", "tiny"), "count.yaml is missing")


def test_study_on_a_full_disk_is_refused(project):
    runs = project/"runs/tiny"
    runs.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(runs)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try: one_line(recap(project, "study", "--scale", "tiny"), "disk full", "MB left")
    finally: subprocess.run(["umount", str(runs)], check=True)


@pytest.mark.slow
def test_killed_many_times(project):
    rng = random.Random(0)
    assert recap(project, "study", "--scale", "tiny").returncode == 0
    results = {p: p.read_bytes() for p in project.glob("runs/tiny/*/results.json")}
    for p in project.glob("runs/tiny/*"): subprocess.run(["rm", "-rf", p], check=True)
    for _ in range(25):
        run = start(project, "study", "--scale", "tiny")
        time.sleep(rng.uniform(0.1, 6))
        kill_hard(run)
    assert recap(project, "study", "--scale", "tiny").returncode == 0
    assert {p: p.read_bytes() for p in project.glob("runs/tiny/*/results.json")} == results


# The real path, at the scale of a test.

def kill_in(root, stage):
    "Start the smoke study, kill it while the stage is at work."
    run = start(root, "study", "--scale", "smoke")
    begun, results = root/f"runs/smoke/{stage}/begun.json", root/f"runs/smoke/{stage}/results.json"
    wait_for(lambda: begun.exists() or run.poll() is not None, 600)
    assert run.poll() is None, run.stdout.read()[-3000:]
    time.sleep(1)
    kill_hard(run)
    return results.exists()


def compare_smoke(a, b):
    from recap.study import study_graph
    for stage in [*study_graph("smoke"), "."]:
        one, two = [(r/"runs/smoke"/stage/"results.json").read_text().replace(str(r), "") for r in (a, b)]
        assert one == two, f"{stage}: results differ after kills"


@pytest.mark.xdist_group("smoke")
def test_smoke_study(smoke):
    runs = smoke/"runs/smoke"
    assert (runs/"report.html").stat().st_size > 10_000 and (runs/"results.json").exists()
    planted = [p for p in runs.rglob("*") if p.is_file() and p.suffix in (".ipynb", ".json", ".txt", ".html", ".log")
               and b"planted-secret-1234567" in p.read_bytes()]
    assert planted == [], "a secret of the environment was written"
    for p in runs.glob("*/run.json"):
        made = __import__("json").loads(p.read_text())
        assert made["peak_memory_mb"] < 4096 and made["versions"]["python"] and "seconds" in made, p


@pytest.mark.xdist_group("smoke")
def test_smoke_again_does_nothing(smoke):
    began = time.time()
    again = recap(smoke, "study", "--scale", "smoke")
    assert again.returncode == 0 and "nothing to do" in again.stdout, again.stdout + again.stderr
    assert time.time() - began < 45


@pytest.mark.xdist_group("smoke")
def test_smoke_killed_twice_ends_the_same(smoke, tmp_path):
    root = borrow(tmp_path/"killed")
    for stage in ("relabel", "train_dsc95"): kill_in(root, stage)
    done = recap(root, "study", "--scale", "smoke")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    compare_smoke(smoke, root)


@pytest.mark.slow
@pytest.mark.xdist_group("smoke")
def test_smoke_killed_in_every_stage_ends_the_same(smoke, tmp_path):
    from recap.study import study_graph
    root = borrow(tmp_path/"killed")
    for stage in study_graph("smoke"): kill_in(root, stage)
    assert recap(root, "study", "--scale", "smoke").returncode == 0
    compare_smoke(smoke, root)
