"""A real Slurm with several virtual nodes on this machine: munged, slurmctld and one slurmd a node, all under one directory.

Needs root and Debian's slurm-wlm. Where the kernel lets us, each node is a namespace of its own (host name, processes, mounts), so that
killing its first process is a power cut; `Cluster.can_cut_power` says whether. Everything listens on 127.0.0.1. Times that sites count
in minutes are seconds here. Only processes that we started are ended, by their number; they end with us whatever ends us.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PORT = 17002
DAEMONS = ("munged", "slurmctld", "slurmd")
MARK = "# tests/slurm"
GPUS, CPUS = 8, 64  # of a node; nobody checks

SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire, 120 s by default, is also what a requeued job waits before it starts again
AuthInfo=socket={root}/munge/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SrunPortRange={srun_first}-{srun_last}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/state/slurmctld.pid
SlurmdPidFile={root}/spool/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
# one kernel under all nodes: no cgroups, no binding
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
LaunchParameters=enable_nss_slurm
PropagateResourceLimits=NONE
MailProg=/bin/true
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
# pretended sizes are taken on trust
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=0,batch_sched_delay=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
JobRequeue=1
KillWait=20
CompleteWait=0
MinJobAge=3600
SlurmctldTimeout=30
SlurmdTimeout=10
BatchStartTimeout=10
MessageTimeout=10
TCPTimeout=2
UnkillableStepTimeout=30
WaitTime=0
PartitionName=normal Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 State=UP OverSubscribe=NO PriorityTier=1
PartitionName=urgent Nodes=ALL Default=NO MaxTime=INFINITE DefaultTime=60 State=UP OverSubscribe=NO PriorityTier=2
"""


def why_not() -> str | None:
    """Why there can be no cluster here; None where there can."""
    missing = [name for name in DAEMONS if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: apt-get install slurm-wlm)"
    return "only root can start Slurm's daemons" if os.geteuid() else None


class Cluster:
    """Slurm's daemons under `root`, with `names` as nodes. Start it by `running_cluster`."""

    def __init__(self, root: Path, num_nodes: int) -> None:
        self.root = root
        self.names = [f"node{number}" for number in range(1, num_nodes + 1)]
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        self.environment |= {"SLURM_CONF": str(root / "slurm.conf")}
        self.can_cut_power = subprocess.run(
            ["unshare", "--uts", "--pid", "--fork", "--mount-proc", "true"], capture_output=True, check=False
        ).returncode == 0  # fmt: skip
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Write the files, start the daemons, and wait until every node takes work."""
        for name in ("munge", "log", "state", "spool", "dev"):
            (self.root / name).mkdir(parents=True)
        for path in (self.root, self.root / "munge"):
            path.chmod(0o755)  # munge wants to be sure of who writes there
        key = self.root / "munge/munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        for number in range(GPUS):
            os.mknod(self.root / f"dev/nvidia{number}", 0o020666, os.makedev(1, 3))  # gres.conf must name character devices
        self._write_hosts()
        self._write_conf()
        munge = self.root / "munge"
        self._spawn("munged", "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={munge}/munge.socket",
                    f"--pid-file={munge}/munged.pid", f"--log-file={munge}/munged.log", f"--seed-file={munge}/munged.seed")  # fmt: skip
        wait_for(lambda: (munge / "munge.socket").exists(), 10, "munge does not answer")
        self._spawn("slurmctld", "slurmctld", "-D", "-i", "-f", str(self.root / "slurm.conf"))
        for node in self.names:
            self.power_on(node)
        self.wait_for_nodes()

    def power_on(self, node: str) -> None:
        """Start a node's slurmd, in a namespace of its own where that is possible."""
        (self.root / "spool" / node).mkdir(exist_ok=True)
        slurmd = ["slurmd", "-D", "-N", node, "-f", str(self.root / "slurm.conf")]
        if self.can_cut_power:
            # bash is the first process of the node: it adopts orphans, and with it every process of the node ends
            script = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && { "$@" & wait $!; }'
            slurmd = ["unshare", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child=SIGKILL", "bash", "-c", script, node,
                      str(self.root / f"hosts.{node}"), *slurmd]  # fmt: skip
        self._spawn(node, *slurmd)

    def cut_power(self, node: str) -> None:
        """Every process of the node is gone at once; nobody is told."""
        assert self.can_cut_power
        self._daemons[node].kill()
        self._daemons[node].wait()

    def wait_for_nodes(self, seconds: float = 60) -> None:
        """Until every node is idle or at work."""

        def ready() -> bool:
            states = self.ask("sinfo", "--noheader", "--Node", "--format=%N %t").splitlines()
            up = {line.split()[0] for line in states if line.split()[1] in ("idle", "mix", "alloc", "comp")}
            return up == set(self.names)

        wait_for(ready, seconds, "the nodes do not come up")

    def stop(self) -> None:
        """End jobs, then daemons: a job's processes outlive them by design."""
        with contextlib.suppress(subprocess.SubprocessError):
            self.ask("scancel", "--user=root")
            wait_for(lambda: not self.ask("squeue", "--noheader"), 40, "jobs do not end")
        for name, daemon in reversed(self._daemons.items()):
            daemon.send_signal(signal.SIGKILL if name in self.names and self.can_cut_power else signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._restore_hosts()

    def ask(self, *command: str) -> str:
        """What one of Slurm's commands prints; CalledProcessError where it fails."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True, timeout=30).stdout

    def _spawn(self, name: str, *command: str) -> None:
        with open(self.root / "log" / f"{name}.out", "ab") as log:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command], env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def _write_conf(self) -> None:
        values = dict(
            host=socket.gethostname().split(".")[0], port=PORT, root=self.root, srun_first=PORT + 1000, srun_last=PORT + 1999
        )
        lines = [SLURM_CONF.format(**values)]
        for number, node in enumerate(self.names, start=1):
            host = node if self.can_cut_power else values["host"]
            lines.append(
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={PORT + number} CPUs={CPUS} Sockets=1 "
                f"CoresPerSocket={CPUS} ThreadsPerCore=1 RealMemory=256000 Gres=gpu:{GPUS} State=UNKNOWN\n"
            )
        (self.root / "slurm.conf").write_text("".join(lines))
        nodes = f"node[1-{len(self.names)}]"
        (self.root / "gres.conf").write_text(f"NodeName={nodes} Name=gpu File={self.root}/dev/nvidia[0-{GPUS - 1}]\n")

    def _write_hosts(self) -> None:
        """Names for the nodes. A node calls itself 127.0.0.1 and the others 127.0.1.N, so that it knows which one it is."""
        host = socket.gethostname().split(".")[0]
        ours = [f"127.0.0.1 {host}", *(f"127.0.1.{n} {node}" for n, node in enumerate(self.names, start=1))]
        self._restore_hosts()
        with open("/etc/hosts", "a") as hosts:
            hosts.writelines(f"{line} {MARK}\n" for line in ours)
        for me in self.names:
            others = "".join(f"127.0.1.{n} {node}\n" for n, node in enumerate(self.names, start=1) if node != me)
            (self.root / f"hosts.{me}").write_text(f"127.0.0.1 localhost {me}\n{others}")

    def _restore_hosts(self) -> None:
        lines = Path("/etc/hosts").read_text().splitlines(keepends=True)
        Path("/etc/hosts").write_text(
            "".join(line if line.endswith("\n") else f"{line}\n" for line in lines if MARK not in line)
        )


@contextlib.contextmanager
def running_cluster(root: Path, num_nodes: int = 2) -> Iterator[Cluster]:
    """A cluster for the length of a `with`."""
    cluster = Cluster(root, num_nodes)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def wait_for(condition: Callable[[], object], seconds: float, otherwise: str) -> None:
    """Ask until the condition holds; AssertionError with `otherwise` where it does not in time. A command that fails is no answer yet."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(subprocess.SubprocessError):
            if condition():
                return
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.2)
