"""A real Slurm on this host: munge, a controller, and nodes that are all this machine. It needs root and Debian's packages."""

import contextlib
import getpass
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

NODES = tuple(f"n{number}" for number in range(1, 10))
GPUS = 8
"""Of each node. They are null devices."""
PARTITIONS = {
    "main": "Nodes=n[1-2] Default=YES PriorityTier=1",
    "grace": "Nodes=n3 PriorityTier=1 GraceTime=20",
    "nograce": "Nodes=n4 PriorityTier=1 GraceTime=0",
    "briefly": "Nodes=n5 PriorityTier=1 GraceTime=3",
    "high": "Nodes=n[3-5] PriorityTier=10 PreemptMode=OFF",  # takes nodes from the three above
    "mortal": "Nodes=n[6-7] PriorityTier=1",
    "torn": "Nodes=n[8-9] PriorityTier=1",
}
COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
WAIT_SECONDS = 60


def missing() -> str:
    """Why no cluster can be started here; empty if one can."""
    absent = [name for name in COMMANDS if shutil.which(name) is None]
    if absent:
        return f"a real Slurm needs Debian's slurmctld, slurmd, slurm-client and munge; not found: {', '.join(absent)}"
    return "" if os.geteuid() == 0 else "a real Slurm is started by root"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Cluster:
    """Its files, its daemons, and its commands."""

    folder: Path
    environment: dict[str, str]
    daemons: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    def run(self, *words: str, check: bool = True, **environment: str) -> str:
        """What a command of Slurm prints."""
        found = subprocess.run(
            words, env={**self.environment, **environment}, cwd=self.folder, capture_output=True, text=True, timeout=WAIT_SECONDS
        )
        assert not check or found.returncode == 0, f"{words}: {found.stdout}{found.stderr}"
        return found.stdout

    def submit(self, script: Path, *arguments: str, flags: tuple[str, ...] = (), **environment: str) -> str:
        """The number of a new job."""
        return self.run("sbatch", "--parsable", *flags, str(script), *arguments, **environment).strip().split(";")[0]

    def state(self, job: str) -> str:
        """RUNNING, COMPLETED, PENDING …"""
        return self.fact(job, "JobState")

    def fact(self, job: str, name: str) -> str:
        """One of those that `scontrol show job` tells."""
        words = self.run("scontrol", "--oneliner", "show", "job", job, check=False).split()
        return next((word.split("=", 1)[1] for word in words if word.startswith(f"{name}=")), "")

    def restarts(self, job: str) -> int:
        return int(self.fact(job, "Restarts") or 0)

    def log(self, job: str) -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob(f"*-{job}.log")))

    def wait_for(self, job: str, *states: str, seconds: float = 180) -> str:
        """Returns once the job is in one of these states. Fails with its log when time runs out."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job)) not in states:
            assert time.monotonic() < deadline, f"job {job} is {state}, not {states}:\n{self.log(job)[-4000:]}"
            time.sleep(0.2)
        return state

    def start_node(self, name: str) -> None:
        command = ["slurmd", "-D", "-N", name, "-f", str(self.folder / "slurm.conf")]
        self.daemons[name] = self._start(command, name)

    def kill_node(self, name: str) -> None:
        """As if its plug were pulled: the daemon and all processes of its jobs."""
        self.daemons[name].kill()
        self.daemons[name].wait()
        self.kill_processes(node=name)

    def kill_processes(self, *, node: str = "") -> None:
        """Ends what this cluster has started and no daemon waits for: steps, which have sessions of their own, and their jobs.
        Their environment says whose they are. Args: node: only those of this one."""
        mine = {int(path.parent.name): _variables(path) for path in Path("/proc").glob("[0-9]*/environ")}
        conf = self.environment["SLURM_CONF"]
        mine = {pid: found for pid, found in mine.items() if found.get("SLURM_CONF") == conf and pid != os.getpid()}
        chosen = {pid for pid, found in mine.items() if node in ("", found.get("SLURMD_NODENAME", ""))}
        chosen |= {parent for parent in map(_parent, chosen) if _is_step(parent)}
        chosen -= {daemon.pid for daemon in self.daemons.values()}
        for number in (signal.SIGSTOP, signal.SIGKILL):  # else a step tells the controller of its job's death before its own
            for pid in sorted(chosen, key=_is_step, reverse=True):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def _start(self, command: list[str], name: str, *, user: str = "") -> "subprocess.Popen[bytes]":
        with (self.folder / f"{name}.out").open("ab") as out:
            return subprocess.Popen(
                command, env=self.environment, stdout=out, stderr=out, start_new_session=True, **({"user": user} if user else {})
            )


def _variables(path: Path) -> dict[str, str]:
    with contextlib.suppress(OSError):
        words = path.read_bytes().decode(errors="replace").split("\0")
        return dict(word.split("=", 1) for word in words if "=" in word)
    return {}


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rsplit(")", 1)[1].split()[1])
    return 0


def _is_step(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"slurmstepd")
    return False


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """All of PARTITIONS, with nodes that are nothing but a slurmd each."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # munge's own user must get there, and to no other folder of the tests
    folder.chmod(0o755)
    munge = folder / "munge"
    munge.mkdir()
    key = munge / "key"
    key.write_bytes(os.urandom(128))
    user = pwd.getpwnam("munge")
    for path in (munge, key):
        os.chown(path, user.pw_uid, user.pw_gid)
    munge.chmod(0o755)
    key.chmod(0o400)
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    cluster = Cluster(folder, environment)
    _write_config(folder, cores=os.cpu_count() or 1)
    try:
        words = ["munged", "--foreground", "--force", f"--socket={munge}/socket", f"--key-file={key}", f"--pid-file={munge}/pid"]
        words += [f"--log-file={munge}/log", f"--seed-file={munge}/seed"]
        cluster.daemons["munged"] = cluster._start(words, "munged", user="munge")
        _until(lambda: (munge / "socket").exists(), "munged's socket", cluster)
        cluster.daemons["slurmctld"] = cluster._start(["slurmctld", "-D", "-f", str(folder / "slurm.conf")], "slurmctld")
        for name in NODES:
            cluster.start_node(name)
        _until(lambda: set(cluster.run("sinfo", "-h", "-N", "-o", "%t", check=False).split()) == {"idle"}, "idle nodes", cluster)
        yield cluster
    finally:
        subprocess.run(["scancel", f"--user={getpass.getuser()}"], env=environment, capture_output=True, timeout=WAIT_SECONDS)
        for daemon in reversed(cluster.daemons.values()):
            daemon.kill()
            daemon.wait()
        cluster.kill_processes()
        shutil.rmtree(folder, ignore_errors=True)


def _until(condition, what: str, cluster: Cluster) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        logs = "\n".join(f"{path.name}: {path.read_text(errors='replace')[-1500:]}" for path in cluster.folder.glob("*.out"))
        assert time.monotonic() < deadline, f"no {what}\n{logs}"
        time.sleep(0.1)


def _write_config(folder: Path, *, cores: int) -> None:
    host = socket.gethostname().split(".")[0]
    for name in ("state", *(f"spool/{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    for number in range(GPUS):  # null devices
        os.mknod(folder / f"gpu{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    settings: Mapping[str, str] = {
        "ClusterName": "test",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": str(free_port()),
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder}/munge/socket,cred_expire=5",
        "CryptoType": "crypto/munge",
        "StateSaveLocation": f"{folder}/state",
        "SlurmdSpoolDir": f"{folder}/spool/%n",
        "SlurmctldPidFile": f"{folder}/slurmctld.pid",
        "SlurmdPidFile": f"{folder}/slurmd-%n.pid",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "SlurmdParameters": "config_overrides",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "GresTypes": "gpu",
        "KillWait": "10",
        "SlurmdTimeout": "10",
        "MinJobAge": "3600",
        "ReturnToService": "2",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "SchedulerParameters": "bf_interval=1,sched_interval=1,requeue_setup_env_fail",
        "MailProg": "/bin/true",
    }
    lines = [f"{name}={value}" for name, value in settings.items()]
    node = f"NodeHostname={host} NodeAddr=127.0.0.1 CPUs={4 * cores} Gres=gpu:{GPUS}"
    lines += [f"NodeName={name} Port={free_port()} {node}" for name in NODES]
    lines += [f"PartitionName={name} {rest} MaxTime=INFINITE State=UP" for name, rest in PARTITIONS.items()]
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
    (folder / "gres.conf").write_text(f"NodeName=n[1-9] Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")
