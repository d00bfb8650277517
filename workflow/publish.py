"""Copy the weights of `make foundation` to data/foundation, in half precision, with a manifest: `make publish`, or `python workflow/publish.py NAME ...` for some.

Do this only when they are better than what is there: every edition stays in the repository's history for ever."""
import shutil
import sys
from pathlib import Path

from recap.core import RecapError, hash_folder, project_root, read_json, write_json

# data/foundation/NAME <- runs/foundation/FOLDER, trained by STAGE
WEIGHTS = {"vae": ("vae/vae", "vae"), "text": ("text/text", "text"), "captioner": ("captioner", "captioner"),
           "clip_scorer": ("scorers/clip_scorer", "scorers"), "detector": ("scorers/detector", "scorers"), "vqa": ("vqa/vqa", "vqa"),
           "denoiser": ("denoiser", "denoiser"), "upsampler": ("upsampler/upsampler", "upsampler")}
PART = {"clip_scorer": "clip", "detector": "detector"}  # of its stage's results, where one stage trains two
KEEP = {".safetensors", ".json"}
ONLY = {"denoiser": ("unet", "transformer", "model.json")}  # its encoders are published beside it
RECORDS = {"run.json", "results.json", "begun.json"}


def halve(path: Path):
    "Store float32 tensors as float16; a file without any is left byte for byte."
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file
    with safe_open(path, "pt") as f: tensors, meta = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()
    if any(v.dtype == torch.float32 for v in tensors.values()): save_file({k: v.half() if v.dtype == torch.float32 else v for k, v in tensors.items()}, path, meta)


def publish(*names):
    root = project_root()
    if unknown := set(names) - set(WEIGHTS): raise RecapError(f"no weights are called {', '.join(sorted(unknown))}: {', '.join(WEIGHTS)}")
    for name, (folder, stage) in WEIGHTS.items():
        if names and name not in names: continue
        source, target, record = root/"runs/foundation"/folder, root/"data/foundation"/name, root/"runs/foundation"/stage
        if not (record/"results.json").exists(): print(f"{name}: {record} is not finished, left as it is"); continue
        if not source.is_dir(): raise RecapError(f"{source} does not exist: the stage {stage} should have made it")
        shutil.rmtree(target, ignore_errors=True)
        for f in sorted(p for p in source.rglob("*") if p.suffix in KEEP and p.name not in RECORDS and not p.relative_to(source).parts[0].startswith((".", "checkpoint"))):
            if f.relative_to(source).parts[0] not in ONLY.get(name, (f.relative_to(source).parts[0],)): continue
            to = target/f.relative_to(source)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(f, to)
            if to.suffix == ".safetensors": halve(to)
        run = read_json(record/"run.json")
        made = {k: run.get(k) for k in ("page", "params", "seconds", "machine", "versions", "revision")}
        made["params"] = {k: v for k, v in run["params"].items() if k not in ("out", "threads")}
        size = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
        found = read_json(record/"results.json")
        if name in PART: found = {"parameters": found[PART[name]]["parameters"]} | found[PART[name]]["quality"]
        made |= {"hash": hash_folder(target), "megabytes": round(size/2**20, 2), "licence": "Apache-2.0", "quality": found}
        write_json(target/"manifest.json", made)
        print(f"{name}: {size/2**20:.1f} MB, {made['hash']}")


if __name__ == "__main__": publish(*sys.argv[1:])
