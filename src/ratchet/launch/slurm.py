"""`--slurm`: each program of a run as a job of its own, through submitit.

    here            try the file system ─► submit what is not queued or running yet ─► slurm/jobs.jsonl
    in each job     Job: start the program, pass signals on, queue again when it stopped on request
    the program     `python -m ratchet.cli.job KIND NAME`, the resolved configuration on its input

One job for the trainer, with a task on each of its nodes; one for the orchestrator; one for each server. They share
the run directory and meet there (`cluster.py`); they are told nothing of each other.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec

from ratchet import config_io
from ratchet.attempts import KINDS
from ratchet.config import RLConfig, SFTConfig, SlurmConfig, SlurmRoleConfig
from ratchet.errors import EXIT_CRASH, EXIT_OK, EXIT_STOPPED, RatchetError, Refusal
from ratchet.launch import filesystem
from ratchet.launch.join import newest
from ratchet.launch.preflight import disk_warning
from ratchet.log import LOGGER
from ratchet.paths import RunPaths

FOLDER = "slurm"
JOBS = "jobs.jsonl"
POLL_S = 2.0
SILENT_S = 30.0
"""A controller that does not answer is left alone for so long."""
_WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
# States of Slurm in which a job will still do something.
_ALIVE = {
    *("PENDING", "RUNNING", "REQUEUED", "SUSPENDED", "COMPLETING", "CONFIGURING", "RESIZING", "REQUEUE_HOLD"),
    *("SIGNALING", "STAGE_OUT", "STOPPED", "REQUEUE_FED", "SPECIAL_EXIT"),
}


class Submitted(msgspec.Struct, frozen=True):
    """A job that was submitted: one line of jobs.jsonl."""

    name: str
    """Of the program: `trainer`, `orchestrator`, `inference`, `inference_1`."""
    job: str
    executor: str


@dataclass
class Job:
    """What runs inside a job, on each of its machines: one program of a run, from its start to the end of the run."""

    kind: str
    name: str
    config: str
    """The resolved configuration as TOML."""
    folder: str
    word: str
    """A file in `folder` that the submitting machine made: this one must see it."""
    requeue_on_term: bool
    """Slurm itself queues a preempted job again; where nothing does, submitit is asked to."""

    def __call__(self) -> int:
        """Run the program to its end; asked to stop, save and be queued again. Raises: RatchetError"""
        if not filesystem.appears(Path(self.folder) / self.word, filesystem.VISIBLE_S):
            raise Refusal(
                f"{socket.gethostname()} does not see within {filesystem.VISIBLE_S:g} s what the submitting machine "
                f"wrote in {self.folder}: put --output-dir on a file system that all machines share."
            )
        requeue = signal.getsignal(signal.SIGUSR2)
        asked: list[int] = []
        code = self._run_program(asked)
        if asked and code == EXIT_STOPPED and (self.requeue_on_term or set(asked) - {signal.SIGTERM}):
            signal.signal(signal.SIGUSR2, requeue)
            os.kill(os.getpid(), signal.SIGUSR2)  # submitit's own way: `checkpoint`, then requeue
        if code not in (EXIT_OK, EXIT_STOPPED):
            raise RatchetError(f"The {self.name} ended with exit code {code}.")
        return code

    def _placed(self) -> str:
        """The configuration of this task: which node of the trainer it is; the first says where they meet."""
        if self.name != "trainer":
            return self.config
        config = config_io.parse_toml(KINDS[self.kind], self.config.encode(), "the job's configuration")
        assert isinstance(config, SFTConfig | RLConfig)
        if config.trainer.nnodes == 1:
            return self.config
        node = _submitit().JobEnvironment().node
        where: dict[str, Any] = {"node_rank": node}
        if node == 0 and config.trainer.rendezvous is None:
            where["rendezvous"] = f"{socket.gethostname()}:{_free_port()}"
        trainer = config.trainer.model_copy(update=where)
        return config_io.to_toml(config.model_copy(update={"trainer": trainer})).decode()

    def _run_program(self, asked: list[int]) -> int:
        """Run the program to its exit code; a signal asks it to stop, and is noted in `asked`."""
        config = self._placed()
        child: list[subprocess.Popen[bytes]] = []

        def stop(number: int, frame: FrameType | None) -> None:
            asked.append(number)
            if child:
                child[0].send_signal(signal.SIGTERM)

        signal.signal(signal.SIGTERM, stop)
        # Slurm sends these to every process of a job. What is ignored when a process starts stays ignored in it and
        # in those that it starts: they are asked by SIGTERM alone.
        for number in _WARNINGS:
            signal.signal(number, signal.SIG_IGN)
        command = [sys.executable, "-m", "ratchet.cli.job", self.kind, self.name]
        environment = {**os.environ, "RATCHET_PARENT": str(os.getpid())}
        child.append(subprocess.Popen(command, stdin=subprocess.PIPE, env=environment))
        for number in _WARNINGS:
            signal.signal(number, stop)
        stdin = child[0].stdin
        assert stdin is not None
        stdin.write(config.encode())
        stdin.close()
        if asked:
            child[0].send_signal(signal.SIGTERM)
        return child[0].wait()

    def checkpoint(self) -> Any:
        """submitit asks what to run when the job starts again: the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def submit(kind: str, config: SFTConfig | RLConfig, settings: SlurmConfig) -> int:
    """Submit the jobs of a run that are not there already. With `slurm.wait` stay until they have ended.

    Raises: Refusal
    """
    paths = RunPaths(config.output_dir)
    folder = paths.root.resolve() / FOLDER
    names = _names(config, settings)
    filesystem.require(paths.root)
    if warning := disk_warning(config):
        LOGGER.warning("%s", warning)
    folder.mkdir(exist_ok=True)
    word = f"seen-{secrets.token_hex(4)}"
    (folder / word).touch()
    jobs: dict[str, Any] = {}
    for name in names:
        job = _find(folder, name, settings)
        if job is None:
            local = settings.executor == "local"
            task = Job(kind, name, config_io.to_toml(config).decode(), str(folder), word, local)
            job = _executor(folder, name, config, settings, jobs).submit(task)
            _note(folder, Submitted(name, job.job_id, settings.executor))
            LOGGER.info("%s: job %s, its log is %s", name, job.job_id, job.paths.stderr)
        else:
            LOGGER.info("%s: job %s is there already", name, job.job_id)
        jobs[name] = job
    if not settings.wait:
        LOGGER.info("The run is in %s; the same command says how its jobs stand.", paths.root)
        return EXIT_OK
    return _wait(paths, jobs, settings)


def _names(config: SFTConfig | RLConfig, settings: SlurmConfig) -> tuple[str, ...]:
    """The jobs of a run, the trainer first: the others wait for it. Raises: Refusal"""
    if config.trainer.nnodes > 1 and settings.executor == "local":
        raise Refusal(
            f"trainer.nnodes is {config.trainer.nnodes}: the local executor has one machine; set it to 1, or start the "
            "nodes yourself, the same command with --trainer.node-rank."
        )
    if not isinstance(config, RLConfig):
        return ("trainer",)
    servers = config.inference.names if config.inference is not None else ()
    return ("trainer", "orchestrator", *servers)


def _executor(
    folder: Path, name: str, config: SFTConfig | RLConfig, settings: SlurmConfig, others: dict[str, Any]
) -> Any:
    """submitit's executor with everything that the settings ask for. Raises: Refusal"""
    submitit = _submitit()
    try:
        executor = submitit.AutoExecutor(
            folder=folder / name, cluster=settings.executor, slurm_max_num_timeout=settings.requeues
        )
        executor.update_parameters(**parameters(name, config, settings, others))
    except (RuntimeError, ValueError, NameError) as error:
        raise Refusal(
            f"submitit cannot use executor {settings.executor!r} for slurm.{_role(name)} ({error}): submit from a "
            "machine with sbatch, or correct the [slurm] table."
        ) from None
    return executor


def _role(name: str) -> str:
    """The table of `[slurm]` that a job goes by."""
    return "inference" if name.startswith("inference") else name


def parameters(
    name: str, config: SFTConfig | RLConfig, settings: SlurmConfig, others: dict[str, Any]
) -> dict[str, Any]:
    """What submitit is told for one job, by its names. The others start when the trainer's job has started."""
    wanted: SlurmRoleConfig = getattr(settings, _role(name))
    after = {"dependency": f"after:{others['trainer'].job_id}"} if "trainer" in others else {}
    extra = {"requeue": True, **after, **settings.extra, **wanted.extra}
    given = {
        "name": f"{config.output_dir.name}-{name}",
        "timeout_min": settings.time_min,
        "nodes": config.trainer.nnodes if name == "trainer" else 1,
        "tasks_per_node": 1,
        "gpus_per_node": wanted.gpus,
        "cpus_per_task": wanted.cpus,
        "mem_gb": wanted.mem_gb,
        "slurm_partition": settings.partition,
        "slurm_account": settings.account,
        "slurm_signal_delay_s": settings.grace_s,
        "slurm_additional_parameters": extra,
    }
    return {name: value for name, value in given.items() if value is not None}


def _submitit() -> Any:
    try:
        import submitit
    except ImportError:
        raise Refusal(
            "--slurm needs submitit, which is not here: `uv sync --extra slurm` installs it."
        ) from None
    return submitit


def _note(folder: Path, job: Submitted) -> None:
    with (folder / JOBS).open("ab") as file:
        file.write(msgspec.json.encode(job) + b"\n")


def _find(folder: Path, name: str, settings: SlurmConfig) -> Any:
    """The job of a program that was submitted before and has not ended; None without one. Raises: Refusal"""
    lines = (folder / JOBS).read_bytes().splitlines() if (folder / JOBS).exists() else []
    submitted = [msgspec.json.decode(line, type=Submitted) for line in lines]
    mine = [job for job in submitted if job.name == name and job.executor == settings.executor]
    if not mine:
        return None
    submitit = _submitit()
    if settings.executor == "local":
        job = submitit.LocalJob(folder / name, mine[-1].job)
        return job if _is_local_job(mine[-1].job, folder / name) else None
    return submitit.SlurmJob(folder / name, mine[-1].job) if _is_queued(mine[-1].job) else None


def _is_queued(job: str) -> bool:
    """Whether Slurm has a job that will still do something: it knows that at once, and without any accounting.

    Raises: Refusal if Slurm cannot be asked
    """
    command = ["squeue", "--noheader", "--format", "%T", "--jobs", job]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    if asked.returncode and "Invalid job id" not in asked.stderr:
        raise Refusal(
            f"Slurm does not say how job {job} stands ({asked.stderr.strip()}): give the command again when it does."
        )
    return asked.stdout.strip() in _ALIVE


def _is_local_job(pid: str, folder: Path) -> bool:
    """Whether a process is the controller of a local job of this folder."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return b"submitit.local._local" in line and str(folder).encode() in line


def _wait(paths: RunPaths, jobs: dict[str, Any], settings: SlurmConfig) -> int:
    """Until every job has ended; the exit code of the run."""
    while any(_is_alive(job, settings) for job in jobs.values()):
        time.sleep(POLL_S)
    record = newest(paths)
    if record is None or record.outcome is None:
        LOGGER.error("The jobs have ended and the run has not: see their logs in %s.", paths.root / FOLDER)
        return EXIT_CRASH
    LOGGER.info("attempt %d: %s", record.attempt, record.outcome.reason)
    return record.outcome.code


def _is_alive(job: Any, settings: SlurmConfig) -> bool:
    """Whether a job may still do something; so does one of which Slurm says nothing for a while."""
    if settings.executor == "local":
        return not job.done()
    try:
        return _is_queued(job.job_id)
    except Refusal as error:
        LOGGER.warning("%s", error)
        time.sleep(SILENT_S)
        return True
