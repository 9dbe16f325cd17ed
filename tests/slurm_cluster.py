"""A real Slurm on this machine: one controller and two nodes, on free ports, in a temporary directory, as this user."""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

DAEMONS = ("slurmctld", "slurmd", "sbatch", "squeue")
SEARCHED = f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/usr/local/sbin"

CONFIG = """\
ClusterName=one
SlurmctldHost=localhost
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/node.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdParameters=config_overrides
MpiDefault=none
NodeName=node[0-1] NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]},{ports[2]} CPUs=8 State=UNKNOWN
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def is_here():
    """Whether Slurm's programs are installed."""
    return all(shutil.which(name, path=SEARCHED) for name in DAEMONS)


@contextlib.contextmanager
def cluster():
    """Start the daemons; yields the environment in which Slurm's commands find them."""
    # A short name: Slurm keeps sockets there.
    with tempfile.TemporaryDirectory(prefix="slurm-") as name, _daemons(Path(name)) as environment:
        yield environment


@contextlib.contextmanager
def _daemons(folder):
    ports = _free_ports(3)
    (folder / "state").mkdir()
    path = folder / "slurm.conf"
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    path.write_text(CONFIG.format(user=user, ports=ports, folder=folder))
    environment = {"SLURM_CONF": str(path), "PATH": SEARCHED}
    commands = [["slurmctld", "-D"], *(["slurmd", "-D", "-N", f"node{n}"] for n in (0, 1))]
    daemons = []
    try:
        for command in commands:
            with (folder / f"{command[0]}.{command[-1]}.log").open("wb") as log:
                daemons.append(
                    subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log)
                )
        _wait(environment, folder)
        yield environment
    finally:
        subprocess.run(["scancel", "--user", user], env=os.environ | environment, check=False)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait()


def _free_ports(count):
    with contextlib.ExitStack() as held:
        servers = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]


def _wait(environment, folder):
    """Until both nodes are idle."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        command = ["sinfo", "--noheader", "--Node", "--format", "%T"]
        said = subprocess.run(
            command, env=os.environ | environment, capture_output=True, text=True, check=False
        )
        if said.stdout.split() == ["idle", "idle"]:
            return
        time.sleep(0.2)
    logs = "\n".join(log.read_text()[-2000:] for log in folder.glob("*.log"))
    raise AssertionError(f"Slurm did not come up:\n{logs}")
