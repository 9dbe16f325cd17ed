"""What the tests of inputs are given: a project with a reward and helpers, and a model with weights in two files."""

import json
import shutil
import subprocess

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from programs import BIN, ROOT, start

MODEL = ROOT / "examples" / "reverse_text" / "model"
REWARD = """import helper

def reward(completion, row):
    import later
    return helper.share(completion) + later.bonus(completion)
"""
HELPERS = {
    "helper.py": "def share(text):\n    return sum(c in 'aeiou' for c in text) / max(len(text), 1)\n",
    "later.py": "def bonus(text):\n    return 0.1 * ('e' in text)\n",
}
SHORT = (
    *("--deterministic", "--inference.slots", "16", "--launch.max-restarts", "0", "--ckpt.interval", "2"),
    *("--orchestrator.batch-size", "8", "--orchestrator.group-size", "4", "--max-steps", "4"),
    *("--orchestrator.sampling.max-tokens", "4", "--orchestrator.eval.tasks", "4"),
)
RL = ("rl", "@", "rl.toml", *SHORT)


def run(project, command, *flags, code=0, **extra):
    """Run a command in a project to its end; returns what it said."""
    process = start(command, *flags, cwd=project, **extra)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == code, f"exit code {process.returncode}:\n{said}"
    assert "Traceback" not in said, said
    return said


def make_project(root):
    """Of `ratchet init`, with a reward that imports one module at once and one later, and a declared file."""
    subprocess.run([BIN / "ratchet", "init", root], cwd=ROOT, check=True, capture_output=True)
    (root / "reward.py").write_text(REWARD)
    for name, text in HELPERS.items():
        (root / name).write_text(text)
    (root / "units.json").write_text('{"vowels": "aeiou"}\n')
    settings = (root / "rl.toml").read_text()
    given = '\nargs = { data = "tasks.jsonl"'
    assert given in settings
    (root / "rl.toml").write_text(settings.replace(given, f'\ninputs = ["units.json"]{given}'))
    return root


def make_model(root):
    """Random weights in two files with an index, as a hub has them: no manifest states their hashes."""
    shutil.copytree(MODEL, root)
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(root), dtype=torch.float32)
    words = {name: (root / name).read_bytes() for name in ("config.json", "generation_config.json")}
    made.save_pretrained(root, max_shard_size="900KB")
    for name, data in words.items():
        (root / name).write_bytes(data)
    assert len(list(root.glob("*.safetensors"))) == 2
    return root


def accept(said):
    """The flag that a refusal prints."""
    return said[said.index("--accept-changes ") :].split()[:2]


def swap_two_tokens(path):
    """The same tokenizer, but for the ids of two letters."""
    value = json.loads(path.read_text())
    words = value["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    path.write_text(json.dumps(value))


def scale(path, factor=1.05):
    """Every tensor of a file times a factor: the same names, shapes and size."""
    size = path.stat().st_size
    save_file({n: t * factor for n, t in load_file(path).items()}, path, metadata={"format": "pt"})
    assert path.stat().st_size == size


def flip(path, at, mask=1):
    """Change one byte."""
    data = bytearray(path.read_bytes())
    data[at] ^= mask
    path.write_bytes(data)
