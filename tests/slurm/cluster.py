"""A real Slurm on emulated nodes of this machine, for tests; needs root and Debian's Slurm.

    python tests/slurm/cluster.py sbatch --wait job.sbatch       a cluster for one command on its login node
    python tests/slurm/cluster.py bash

Every machine (login, node1, node2) has network, hostname, mounts and processes of its own (Linux namespaces), so that
127.0.0.1 as the master's address hangs here as it does on a cluster, and killing a machine's first process is a power
cut. login runs munged and slurmctld, the nodes slurmd. All other folders are the machine's and serve as the shared
file system. Everything ends with this process; nothing outside a folder in /tmp is written.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from benchmarks.processes import wait_until  # noqa: E402

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare", "setpriv")
NAMESPACES = ("--net", "--uts", "--mount", "--pid")
SUBNET = "10.99.77"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")

CONF = """\
ClusterName=test
SlurmctldHost=login({subnet}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits as long as credentials last, 120 s by default
AuthInfo=socket={dir}/munge/socket,cred_expire=5
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool/%n
SlurmctldPidFile={dir}/run/slurmctld.pid
SlurmdPidFile={dir}/run/slurmd.%n.pid
SlurmctldLogFile={dir}/log/slurmctld
SlurmdLogFile={dir}/log/slurmd.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
# nodes claim more than this machine has
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
SlurmdTimeout=20
KillWait=10
ReturnToService=1
JobRequeue=1
MinJobAge=86400
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
NodeName=DEFAULT CPUs=16 Sockets=1 CoresPerSocket=16 ThreadsPerCore=1 RealMemory=64000 Gres=gpu:8 State=UNKNOWN
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=1-0 PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=1-0 PriorityTier=2 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why no cluster can be started here; None if it can."""
    if os.geteuid() != 0:
        return "not root (network namespaces)"
    absent = [name for name in PROGRAMS if shutil.which(name, path=search_path()) is None]
    if absent:
        packages = "slurmctld slurmd slurm-client munge iproute2 util-linux"
        return f"no {', '.join(absent)} (apt-get install --no-install-recommends {packages})"
    trial = subprocess.run(["unshare", *NAMESPACES, "--fork", "true"], capture_output=True, text=True)
    return f"namespaces are not permitted ({trial.stderr.strip()})" if trial.returncode else None


def search_path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class Machine:
    """Namespaces with a first process; switched off by killing it."""

    def __init__(self, name: str, address: str, folder: Path):
        self.name, self.address, self.folder = name, address, folder
        self.start()

    def start(self) -> None:
        clean = {"PATH": search_path(), "HOME": "/root", "LANG": "C.UTF-8"}
        with (self.folder / "log" / f"{self.name}.boot").open("a") as log:
            self.process = subprocess.Popen(  # dies with this process: no cluster outlives its tests
                ["setpriv", "--pdeathsig", "KILL", "unshare", *NAMESPACES, "--fork", "--kill-child",
                 "bash", str(HERE / "machine.sh"), self.name, self.address, str(self.folder)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=clean, cwd="/", start_new_session=True,
            )  # fmt: skip
        wait_until(self._children, what=lambda: f"first process of {self.name}")
        self.pid = int(self._children()[0])

    def _children(self) -> list[str]:
        return Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()

    def off(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, 9)
        self.process.kill()
        self.process.wait()

    def inside(self, *command: str) -> list[str]:
        enter = ["nsenter", "--target", str(self.pid), *NAMESPACES, f"--wdns={os.getcwd()}", "--"]
        return [*enter, *command]


class Cluster:
    """A context: two nodes of 16 claimed CPUs and 8 GPUs that do not exist, partitions `batch` and `urgent`."""

    def __init__(self, nodes: int = 2):
        self.nodes = {f"node{i + 1}": f"{SUBNET}.{11 + i}" for i in range(nodes)}

    def __enter__(self) -> Cluster:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: unix sockets take 108 bytes
        self.folder.chmod(0o755)
        self.machines: dict[str, Machine] = {}
        try:
            self._write_files()
            self.machines["login"] = Machine("login", f"{SUBNET}.1", self.folder)
            # nodes that register before slurmctld listens would try again only seconds later
            wait_until(lambda: "is UP" in self.run("scontrol", "ping").stdout, what=lambda: "slurmctld")
            for name in self.nodes:
                self._boot(name)
            wait_until(lambda: self.idle() == len(self.nodes), what=lambda: "idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for machine in reversed(self.machines.values()):
            machine.off()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write_files(self) -> None:
        for name in ("munge", "state", "spool", "run", "log", "dev"):
            (self.folder / name).mkdir()
        nodes = "\n".join(f"NodeName={name} NodeAddr={address}" for name, address in self.nodes.items())
        conf = CONF.format(dir=self.folder, subnet=SUBNET, nodes=nodes)
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/dev/gpu[0-7]\n")
        for i in range(8):  # Slurm wants devices to count; behind these is /dev/null
            os.mknod(self.folder / "dev" / f"gpu{i}", 0o20666, os.makedev(1, 3))
        hosts = {"localhost": "127.0.0.1", "login": f"{SUBNET}.1"} | self.nodes
        (self.folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in hosts.items()))
        text = Path("/etc/nsswitch.conf").read_text()  # no DNS: unknown names would take seconds
        (self.folder / "nsswitch.conf").write_text(re.sub("^hosts:.*", "hosts: files", text, flags=re.MULTILINE))
        (self.folder / "munge" / "key").write_bytes(os.urandom(128))
        (self.folder / "munge" / "key").chmod(0o600)

    def _boot(self, name: str) -> None:
        self.machines[name] = Machine(name, self.nodes[name], self.folder)
        login, cable = self.machines["login"], f"to-{name}"
        subprocess.run(login.inside("ip", "link", "del", cable), capture_output=True)  # of a life before
        pid = str(self.machines[name].pid)
        ip = [*("nsenter", "--target", str(login.pid), "--net", "--"), "ip", "link"]  # that pid is outside login's
        subprocess.run([*ip, "add", cable, "type", "veth", "peer", "name", "eth0", "netns", pid], check=True)
        subprocess.run([*ip, "set", cable, "master", "br0", "up"], check=True)

    # ------------------------------------------------------------------------------------------------------- use

    def run(self, *command: str, env: dict[str, str] | None = None, on: str = "login") -> subprocess.CompletedProcess:
        """A command on a machine, from the present folder."""
        environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), **(env or {})}
        return subprocess.run(self.machines[on].inside(*command), capture_output=True, text=True, env=environment)

    def sbatch(self, *arguments: str, env: dict[str, str] | None = None) -> str:
        """The job id."""
        done = self.run("sbatch", "--parsable", *arguments, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def idle(self) -> int:
        return self.run("sinfo", "-h", "-N", "-o", "%t", "-p", "batch").stdout.split().count("idle")

    def fields(self, job: str) -> list[dict[str, str]]:
        """What `scontrol show job` says; one entry a task of an array."""
        lines = self.run("scontrol", "-o", "show", "job", job).stdout.splitlines()
        return [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines]

    def states(self, job: str) -> list[str]:
        return [entry["JobState"] for entry in self.fields(job)]

    def wait(self, job: str) -> list[str]:
        """Until the job (or every task of an array) has ended; its states."""
        wait_until(
            lambda: all(state in ENDED for state in self.states(job)),
            lambda: self.states(job),
            lambda: f"end of job {job}",
        )
        return self.states(job)

    def crash(self, name: str) -> None:
        self.machines.pop(name).off()

    def boot(self, name: str) -> None:
        """Switch a crashed node on again, once Slurm has given it up: it then takes the node back by itself.

        Before, it would have to notice the reboot by the uptime, which is that of the real machine.
        """

        def state() -> str:
            found = re.search(r"State=(\S+)", self.run("scontrol", "-o", "show", "node", name).stdout)
            return found[1] if found else "DOWN"

        wait_until(lambda: "DOWN" in state(), what=lambda: f"Slurm notices that {name} is gone")
        self._boot(name)
        wait_until(lambda: not re.search(r"DOWN|\*", state()), what=lambda: f"{name} is back")


def main() -> int:
    reason = missing()
    if reason:
        print(f"error: no Slurm here: {reason}", file=sys.stderr)
        return 2
    with Cluster() as cluster:
        environment = {**os.environ, "SLURM_CONF": str(cluster.folder / "slurm.conf")}
        return subprocess.run(
            cluster.machines["login"].inside(*(sys.argv[1:] or ["sinfo"])), env=environment
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
