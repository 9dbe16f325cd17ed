"""Make the fixtures of one version: runs that are killed in the middle, each in a directory with all that it needs.

`python tests/compat/make.py NAME`, with the source of that version first on PYTHONPATH: see README.md.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
EXAMPLE = HERE.parents[1] / "examples" / "reverse_text"
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
SIZES |= {"head_dim": 8, "intermediate_size": 16}

SFT = """
output_dir = "run"
max_steps = 6
[model]
name = "model"
random_init = true
[data]
name = "sft.jsonl"
batch_size = 8
[trainer]
precision = "fp32"
[ckpt]
interval = 2
"""
RL = """
output_dir = "run"
max_steps = 8
[model]
name = "model"
random_init = true
[trainer]
precision = "fp32"
[orchestrator]
batch_size = 16
group_size = 4
[orchestrator.sampling]
max_tokens = 24
[[orchestrator.env]]
id = "reverse_text"
args = { data = "train.jsonl", eval_data = "eval.jsonl" }
[orchestrator.eval]
interval = 4
tasks = 4
[inference]
max_model_len = 64
slots = 2
[ckpt]
interval = 3
"""
RUNS = {"sft": ("sft", SFT), "rl": ("rl", RL), "rl-deterministic": ("rl", f"deterministic = true\n{RL}")}


def lay_out(root: Path, config: str) -> None:
    """A tiny model and a few rows of data."""
    shutil.copytree(EXAMPLE / "model", root / "model")
    path = root / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | SIZES, indent=1))
    for name in ("sft", "train", "eval"):
        lines = (EXAMPLE / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (root / f"{name}.jsonl").write_text("".join(lines[:40]))
    (root / "run.toml").write_text(config)


def is_in_the_middle(kind: str, run: Path) -> bool:
    """SFT: behind its checkpoint. RL: two batches behind it, and a rollout more in the journal."""
    saved = (run / "checkpoints" / f"step_{2 if kind == 'sft' else 3}" / "MANIFEST.json").exists()
    if kind == "sft":
        rows = run / "metrics" / "trainer.jsonl"
        return saved and rows.read_bytes().count(b"\n") >= 3
    batch = run / "batches" / "step_4" / "MANIFEST.json"
    if not (saved and batch.exists()):
        return False
    return any(path.stat().st_mtime > batch.stat().st_mtime + 0.05 for path in run.glob("journal/*.log"))


def make(name: str, version: str) -> None:
    kind, config = RUNS[name]
    root = Path(tempfile.mkdtemp())
    lay_out(root, config)
    process = subprocess.Popen([kind, "@", "run.toml"], cwd=root, start_new_session=True)
    while not is_in_the_middle(kind, root / "run"):
        if process.poll() is not None:
            raise SystemExit(f"{name} ended with {process.returncode} before it was to be killed")
        time.sleep(0.0005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1)  # what it started dies with it
    (root / "run" / "lock").write_text("pid 1 on somewhere\n")
    with tarfile.open(HERE / f"{version}.{name}.tar.xz", "w:xz", preset=9) as archive:
        for path in sorted(root.iterdir()):
            archive.add(path, path.name, filter=_anonymous)
    shutil.rmtree(root)


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


if __name__ == "__main__":
    for one in RUNS:
        make(one, sys.argv[1])
