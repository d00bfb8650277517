"What the tests share: the project's folder, copies of it that runs may write in, toy projects, the smoke study."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("settings.ini", "nbs", "recap", "workflow", "scales", "data")


def environment(root, **more):
    "The environment for a command that works in another project folder."
    return {**os.environ, "RECAP_ROOT": str(root), **more}


def recap(root, *args, timeout=900, **env):
    "Run the command in a project folder."
    code = "from recap.command import main; main()"
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], env=environment(root, **env), capture_output=True, text=True,
                          timeout=timeout, cwd=root)


def one_line(done, *words):
    "The command failed as it should: exit code 2, nothing but one line, with these words in it."
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    lines = done.stderr.strip().split("\n")
    assert len(lines) == 1 and lines[0].startswith("recap: "), done.stderr
    for w in words: assert w in lines[0], lines[0]


def borrow(root: Path) -> Path:
    "A project folder that reads this one's files and has runs of its own."
    root.mkdir(parents=True, exist_ok=True)
    for name in PARTS: (root/name).symlink_to(ROOT/name)
    return root


def code_page(root, name, parameters, body):
    "Write a stage page: its parameters and what it does between begin and the end."
    common = [f'out = "runs/page/{name}"', "seed = 0", "threads = 0"]
    cells = [("\n".join(common + parameters), ["parameters"]),
             ("import os, time\nfrom pathlib import Path\nfrom recap.core import RecapError, atomic_write, keyed_rng, read_json, resolve_path, write_json\n"
              "from recap.runs import begin", []),
             (f'run = begin("{name}", globals())\n{body}', [])]
    run_it = dict(cell_type="markdown", id="m", metadata={}, source="## Run it")
    nb = dict(nbformat=4, nbformat_minor=5,
              metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")),
              cells=[run_it] + [dict(cell_type="code", id=f"c{i}", metadata=dict(tags=t) if t else {}, source=s, outputs=[], execution_count=None)
                     for i, (s, t) in enumerate(cells)])
    (root/f"nbs/{name}.ipynb").write_text(json.dumps(nb))


# Counts slowly and keeps its count in a file, as a training stage keeps checkpoints; says in `beats` who wrote when.
COUNTING = """
done = read_json(run.out/"state.json") if (run.out/"state.json").exists() else {"step": 0, "sum": start}
while done["step"] < steps:
    done = {"step": done["step"] + 1, "sum": done["sum"] + keyed_rng(seed, "step", done["step"]).random()}
    write_json(run.out/"state.json", done)
    with open(run.out/"beats", "a") as f: f.write(f"{os.getpid()} {time.time()}\\n")
    time.sleep(pause)
run.note(fresh=run.fresh)
run.finish({"sum": done["sum"], "steps": done["step"]})
"""


@pytest.fixture
def project(tmp_path):
    "A small project: `count` counts slowly, `double` needs it; scale `tiny`."
    root = tmp_path/"project"
    for d in ("nbs", "scales/tiny", "workflow", "recap"): (root/d).mkdir(parents=True)
    (root/"settings.ini").touch()
    shutil.copy(ROOT/"workflow/Snakefile", root/"workflow/Snakefile")
    (root/"workflow/graph.yaml").write_text("study:\n  count: {needs: []}\n  double: {needs: [count]}\n")
    code_page(root, "04_count", ["steps = 3", "pause = 0.0", "start = 0.0"], COUNTING)
    code_page(root, "05_double", ['made = ""'], "run.finish({'double': 2*read_json(resolve_path(made)/'results.json')['sum']})")
    (root/"scales/tiny/count.yaml").write_text("# page: 04_count\nout: runs/tiny/count\nsteps: 12\npause: 0.25\nstart: 0.0\n")
    (root/"scales/tiny/double.yaml").write_text("# page: 05_double\nout: runs/tiny/double\nmade: runs/tiny/count\n")
    return root


def study_ready(scale) -> str:
    "Why a study of this scale cannot run here, or an empty string."
    from recap.core import RecapError
    from recap.study import read_stage, stage_inputs, study_graph
    from recap.runs import page_path
    try:
        for stage in study_graph(scale):
            page_path(read_stage(scale, stage)[0])
            stage_inputs(scale, stage)
    except RecapError as e: return str(e)
    return ""


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    "The project folder of a finished study at smoke scale, made once a session."
    why = study_ready("smoke")
    if why: pytest.skip(f"the smoke study cannot run yet: {why}")
    root = borrow(tmp_path_factory.mktemp("smoke"))
    done = recap(root, "study", "--scale", "smoke", PLANTED_API_KEY="planted-secret-1234567")
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return root


@pytest.fixture
def one_thread():
    "One thread for torch while a test runs: `pytestmark = pytest.mark.usefixtures(\"one_thread\")`."
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
