"""What `--slurm` asks sbatch for, by a stand-in that keeps the script; what it refuses; what it submits again."""

import os
import re
import stat
from pathlib import Path

import pytest

from ratchet import config_io
from ratchet.config import RLConfig
from ratchet.config_io import load
from ratchet.errors import Refusal
from ratchet.launch.slurm import Job, submit

RUN = ("@", "examples/reverse_text/rl.toml")
TABLE = """
[slurm]
partition = "gpu"
account = "lab"
time_min = 90
grace_s = 60
extra = { qos = "high" }

[slurm.trainer]
gpus = 4
cpus = 16
mem_gb = 64
extra = { constraint = "a100" }

[slurm.inference]
gpus = 2
"""

SBATCH = """#!/bin/sh
n=$(ls {folder} | grep -c '^script') ; n=$((n + 1))
cp "$1" {folder}/script.$n
echo "Submitted batch job 10$n"
"""
SQUEUE = """#!/bin/sh
echo "{state}"
"""
GONE = """#!/bin/sh
echo "slurm_load_jobs error: Invalid job id specified" >&2
exit 1
"""
SILENT = """#!/bin/sh
echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2
exit 1
"""


def tool(folder, name, text):
    path = folder / name
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def bin_folder(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


@pytest.fixture
def slurm(tmp_path, bin_folder):
    """A cluster that keeps the scripts and runs nothing."""
    tool(bin_folder, "sbatch", SBATCH.format(folder=tmp_path))
    tool(bin_folder, "srun", "#!/bin/sh\n")
    tool(bin_folder, "squeue", SQUEUE.format(state="RUNNING"))
    return tmp_path


def config(tmp_path, *arguments, table=TABLE):
    (tmp_path / "slurm.toml").write_text(table)
    command = [*RUN, "@", str(tmp_path / "slurm.toml"), "--output-dir", str(tmp_path / "run"), *arguments]
    return load(RLConfig, command)


def options(path):
    found = re.findall(r"^#SBATCH --(\S+?)(?:=(.*))?$", Path(path).read_text(), re.MULTILINE)
    return dict(found)


def test_everything_of_the_table_reaches_sbatch(slurm):
    run = config(slurm)
    assert submit("rl", run, run.slurm) == 0
    trainer, orchestrator, inference = (options(slurm / f"script.{n}") for n in (1, 2, 3))
    for job in (trainer, orchestrator, inference):
        assert (job["partition"], job["account"], job["time"], job["qos"]) == ("gpu", "lab", "90", "high")
        assert (job["signal"], job["nodes"], job["ntasks-per-node"]) == ("USR2@60", "1", "1")
        assert "requeue" in job
    assert (trainer["gpus-per-node"], trainer["cpus-per-task"], trainer["mem"]) == ("4", "16", "64GB")
    assert trainer["constraint"] == "a100"
    assert "dependency" not in trainer
    assert (orchestrator["dependency"], inference["dependency"]) == ("after:101", "after:101")
    assert inference["gpus-per-node"] == "2"
    assert "constraint" not in inference
    assert trainer["job-name"] == "run-trainer"


@pytest.mark.parametrize("squeue", [SQUEUE.format(state="TIMEOUT"), GONE], ids=["ended", "forgotten"])
def test_jobs_that_are_there_are_not_submitted_again_and_those_that_ended_are(slurm, bin_folder, squeue):
    run = config(slurm)
    submit("rl", run, run.slurm)
    submit("rl", run, run.slurm)
    assert len(list(slurm.glob("script.*"))) == 3
    tool(bin_folder, "squeue", squeue)
    submit("rl", run, run.slurm)
    assert len(list(slurm.glob("script.*"))) == 6


def test_while_slurm_is_silent_nothing_is_submitted_twice(slurm, bin_folder):
    run = config(slurm)
    submit("rl", run, run.slurm)
    tool(bin_folder, "squeue", SILENT)
    with pytest.raises(
        Refusal, match=r"does not say how job 101 stands .*give the command again when it does"
    ):
        submit("rl", run, run.slurm)
    assert len(list(slurm.glob("script.*"))) == 3


def test_the_trainer_gets_its_nodes_and_each_server_a_job(slurm):
    run = config(slurm, "--trainer.nnodes", "2", "--inference.replicas", "2")
    submit("rl", run, run.slurm)
    jobs = [options(slurm / f"script.{n}") for n in (1, 2, 3, 4)]
    assert [job["job-name"] for job in jobs] == [
        *("run-trainer", "run-orchestrator", "run-inference_0", "run-inference_1")
    ]
    assert [job["nodes"] for job in jobs] == ["2", "1", "1", "1"]
    assert [job.get("gpus-per-node") for job in jobs] == ["4", "0", "2", "2"]


def test_what_cannot_be_submitted_is_refused(tmp_path, monkeypatch):
    run = config(tmp_path, "--slurm.executor", "local", "--trainer.nnodes", "2")
    with pytest.raises(
        Refusal, match=r"trainer.nnodes is 2: the local executor has one machine; set it to 1"
    ):
        submit("rl", run, run.slurm)
    run = config(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Refusal, match=r"submit from a machine with sbatch, or correct the \[slurm\] table"):
        submit("rl", run, run.slurm)


def test_a_machine_that_does_not_see_the_run_directory_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("ratchet.launch.filesystem.VISIBLE_S", 0.1)
    with pytest.raises(Refusal, match="put --output-dir on a file system that all machines share"):
        Job("rl", "trainer", "", str(tmp_path), "seen-1", requeue_on_term=True)()


def test_where_the_nodes_meet_is_not_what_tells_two_commands_apart(tmp_path):
    """A trainer that is queued again may begin on another machine, under another job."""
    asked = config(tmp_path, "--trainer.nnodes", "2")
    there = [
        asked.model_copy(update={"trainer": asked.trainer.model_copy(update=where)})
        for where in ({"rendezvous": "a:20001"}, {"rendezvous": "b:20002", "node_rank": 1})
    ]
    assert config_io.is_same(*there)
    assert config_io.is_same(asked, there[0])
    assert not config_io.is_same(asked, config(tmp_path, "--trainer.nnodes", "3"))
