"""A real inference server on a free port, published weights for it, and plain HTTP to talk to it.

The suite runs on every engine; where two may differ, the difference is an attribute of their class here.
"""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ratchet import rng, weights
from ratchet.config import ModelConfig
from ratchet.models.build import build, save
from ratchet.paths import RunPaths
from ratchet.stage import Stage

ROOT = Path(__file__).parents[2]
SLOTS = 4
LONG = 2048
TOLERANCE = 1e-4
"""Between the logprobs of one policy, however they were computed in fp32."""


def make_model(directory, **changes):
    """The reverse-text model with changes to its config; by default it takes long sequences."""
    shutil.copytree(ROOT / "examples" / "reverse_text" / "model", directory)
    path = directory / "config.json"
    config = json.loads(path.read_text()) | {"max_position_embeddings": LONG} | changes
    path.write_text(json.dumps(config))
    return directory


def publish(root, step, model, seed, change=None):
    """Publish random weights of a model as weights/step_N; tied ones are stored once."""
    paths = RunPaths(root)
    for directory in (paths.staging, paths.weights):
        directory.mkdir(parents=True, exist_ok=True)
    stage = Stage.open(paths, f"{step:03d}.trainer.1")
    source = ModelConfig(name=str(model), random_init=True)
    built = build(source, seed=seed)
    # Matrices as large as a trained model's: near-uniform logits would hide mistakes.
    tensors = {n: p.detach() * (4 if p.dim() == 2 else 1) for n, p in built.named_parameters()}
    if change is not None:
        tensors = change(tensors)
    directory = stage.begin(f"weights_{step}")
    save(directory, tensors, source)
    weights.commit(stage, directory, step=step, attempt=1)
    return paths.weight(step)


class Torch:
    """The embedded engine: its answers are a function of weights, prompt and seed, bit for bit."""

    name = "torch"
    settings = {}
    facts = {"threads": 1, "batch_invariant": True}
    does = frozenset()
    """What the others refuse by name."""
    drains_queue = True
    """Whether a pause with mode `wait` also waits for requests that had no slot yet."""
    stopping = "503"
    """What a client is told whose request is cut by a server that stops."""

    @staticmethod
    def options():
        return []

    @staticmethod
    def seed_of_choice(seed, index):
        return rng.derive(seed, "n", index)

    @staticmethod
    def are_equal(one, other):
        """Whether two answers to one request are the same."""
        return one == other

    @staticmethod
    def assert_sampled_from(directory, choice, prompt, seed):
        """An answer is that of a policy which was never anything else."""
        assert values(choice) == in_this_process(directory, prompt, seed, len(choice["token_ids"]))
        assert_logprobs(directory, prompt, *values(choice))


class Vllm:
    """vLLM: its answers have the logprobs of the policy; of other requests in flight they may keep a trace."""

    name = "vllm"
    facts = {"weight_transfer": "ratchet", "logprobs_mode": "processed_logprobs"}
    does = frozenset({"top_p", "top_k", "logprobs", "presence_penalty", "stream", "no content"})
    does |= {("temperature", 1e-9), ("beam", 3)}  # a very low one is raised; unknown names are passed over
    drains_queue = False
    stopping = ""

    def __init__(self, python):
        self.python = python
        self.settings = {"engine": "vllm", "vllm": {"python": python}}

    def options(self):
        return ["--inference.engine", "vllm", "--inference.vllm.python", self.python]

    @staticmethod
    def seed_of_choice(seed, index):
        return seed + index

    @staticmethod
    def are_equal(one, other):
        (tokens, logprobs), (other_tokens, other_logprobs) = one, other
        return tokens == other_tokens and logprobs == pytest.approx(other_logprobs, abs=TOLERANCE)

    @staticmethod
    def assert_sampled_from(directory, choice, prompt, seed):
        assert_logprobs(directory, prompt, *values(choice))


def command(engine, port, model, *more):
    return [
        Path(sys.executable).parent / "inference", "--model.name", model, "--model.random-init",
        "--inference.port", port, "--inference.slots", SLOTS, "--inference.max-model-len", LONG,
        *engine.options(), *more,
    ]  # fmt: skip


class Server:
    """A server process and its address."""

    def __init__(self, arguments, log, **popen):
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                list(map(str, arguments)), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, **popen
            )
        self.log = log
        self.url = self._wait_until_ready()

    def _wait_until_ready(self):
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := re.search(r"serving .* at (http://\S+)", self.log.read_text()):
                return found[1]
            time.sleep(0.05)
        self.kill()
        raise AssertionError(f"the server did not start:\n{self.log.read_text()}")

    @property
    def port(self):
        return int(self.url.rpartition(":")[2])

    def call(self, method, path, body=None):
        """One request; returns the status and the decoded body."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}  # without it vLLM answers 400
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                status, text = response.status, response.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        try:
            return status, json.loads(text) if text else None
        except ValueError:  # a stream of events
            return status, text.decode()

    def post(self, path, body=None):
        """One request that must succeed."""
        status, answer = self.call("POST", path, {} if body is None else body)
        assert status == 200, (path, status, answer)
        return answer

    def refused(self, status, path, body=None):
        """One request that must be refused; returns the sentence."""
        found, answer = self.call("POST", path, {} if body is None else body)
        assert found == status, (path, found, answer)
        assert set(answer["error"]) >= {"message", "type", "code"}
        return answer["error"]["message"]

    def info(self):
        return self.call("GET", "/weight_info")[1]

    def generate(self, prompt, **sampling):
        """One completion with its logprobs."""
        params = {"max_tokens": 16, "temperature": 1.0, "logprobs": 0, "ignore_eos": True} | sampling
        answer = self.post("/inference/v1/generate", {"token_ids": prompt, "sampling_params": params})
        return answer["choices"][0]

    def load(self, directory):
        self.post("/start_weight_update")
        self.post("/update_weights", {"update_info": {"path": str(directory)}})

    def adopt(self, directory, version, mode="keep"):
        """vLLM's whole sequence."""
        self.post(f"/pause?mode={mode}")
        self.load(directory)
        self.post("/finish_weight_update", {"weight_version": version})
        self.post("/reset_prefix_cache")
        self.post("/resume")

    def wait_until(self, claim):
        deadline = time.monotonic() + 120
        while not claim(self.info()):
            assert time.monotonic() < deadline, self.info()
            time.sleep(0.01)

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(timeout=60)

    def kill(self):
        self.process.kill()
        self.process.wait()


class Background:
    """Requests in threads: the test goes on while they are in flight."""

    def __init__(self, server):
        self.server = server
        self.pool = ThreadPoolExecutor(16)

    def generate(self, count, **sampling):
        return [
            self.pool.submit(self.server.generate, [5, 6, 7 + i], seed=i, **sampling) for i in range(count)
        ]


def values(choice):
    """What must be equal for equal weights, prompt and seed."""
    return choice["token_ids"], [item["logprob"] for item in choice["logprobs"]["content"]]


def in_this_process(directory, prompt, seed, count):
    """The same completion by an engine that never had other weights."""
    from ratchet.inference.engine import Engine, Sequence
    from ratchet.inference.slots import SlotModel

    torch.set_num_threads(1)
    model = build(ModelConfig(name=str(directory)), seed=0)
    engine = Engine(SlotModel(model, SLOTS, LONG), lambda ids: "")
    sequence = Sequence(prompt, count, 1.0, seed)
    engine.submit(sequence)
    engine.run()
    return sequence.token_ids, sequence.logprobs


def distributions_of(directory, prompt, token_ids):
    """The logprobs of every token at each place of an answer and after it, by one plain forward pass."""
    torch.set_num_threads(1)
    model = build(ModelConfig(name=str(directory), attention="eager"), seed=0).eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompt + token_ids]), use_cache=False).logits[0].double()
    return logits.log_softmax(-1)[len(prompt) - 1 :]


def logprobs_of(directory, prompt, token_ids):
    """What a policy gives each token of an answer."""
    chosen = distributions_of(directory, prompt, token_ids)[:-1]
    return chosen.gather(-1, torch.tensor(token_ids)[:, None])[:, 0].tolist()


def assert_logprobs(directory, prompt, token_ids, logprobs):
    assert logprobs == pytest.approx(logprobs_of(directory, prompt, token_ids), abs=TOLERANCE)
