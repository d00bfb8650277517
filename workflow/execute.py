"""Run the pages with their default parameters and keep what they show: `make pages [PAGES="02 17"]`."""
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent


def scrub(text):
    "Without the folder of this machine and addresses in memory."
    return re.sub(r" at 0x[0-9a-f]+", "", text.replace(f"{ROOT}/", "").replace(str(ROOT), "."))


def tidy(outputs):
    "Without warnings and progress, second copies of a picture, and what only this machine knows."
    kept = [o for o in outputs if not (o.output_type == "stream" and o.name == "stderr")]
    for o in kept:
        data = o.get("data", {})
        if "image/png" in data:
            for kind in ("image/jpeg", "text/plain"): data.pop(kind, None)
        for kind in data.keys() & {"text/plain", "text/html", "text/markdown"}: data[kind] = scrub(data[kind])
        if o.output_type == "stream": o.text = scrub(o.text)
    return kept


def execute(path):
    nb = nbformat.read(path, as_version=4)
    shutil.rmtree(ROOT/"runs/page"/path.stem, ignore_errors=True)   # as a fresh clone: an old run's settings are nothing to tell
    NotebookClient(nb, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    for c in nb.cells:
        c.metadata.pop("execution", None)
        if c.cell_type == "code": c.outputs, c.execution_count = ([] if c.source.startswith("#| hide") else tidy(c.outputs)), None
    nb.metadata.pop("widgets", None)
    nbformat.write(nb, path)
    print(f"{path.stem}: {path.stat().st_size/1024:.0f} KB", flush=True)


if __name__ == "__main__":
    pages = sorted((ROOT/"nbs").glob("*.ipynb"))
    asked = sys.argv[1:]
    for page in pages:
        if not asked or any(page.stem.startswith(a) for a in asked): execute(page)
    subprocess.run([Path(sys.executable).parent/"nbdev_clean"], cwd=ROOT, check=True)
