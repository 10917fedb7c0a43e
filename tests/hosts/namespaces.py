"""Several hosts on one machine: each has its own network, processes, host name, temp folder, shared memory and home,
and an sshd. Its home outlives a crash, nothing else does. They hang on one bridge, 10.77.0.0/24; nothing of it is in
the machine's own network. After a shell script of this project's earlier days.

``adm`` is the one that knows everybody's ssh key; ``h0``, ``h1``, ... are at 10.77.0.10 and up; ``out`` has no key.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

NETWORK = "10.77.0"
FREE_PORTS = range(20000, 24000)
"""What Linux gives there to whom names no port."""
TOOLS = ("ip", "unshare", "nsenter", "sshd", "ssh", "ssh-keygen", "rsync")
LAUNCHER, STRANGER = "adm", "out"
_PREFIX = "baton-"
"""Of namespaces of the network, which are known to the whole machine."""
_STARTED_WITHIN = 10.0

_INIT = """
hostname {host}; mount --make-rprivate /
mount -t tmpfs -o size=1m keep /mnt; n=0
for folder in {keep}; do mkdir /mnt/$n; mount --bind $folder /mnt/$n; n=$((n+1)); done
mount -t tmpfs -o size=2g tmp /tmp; chmod 1777 /tmp; mkdir /tmp/home; n=0
for folder in {keep}; do mkdir -p $folder; mount --bind /mnt/$n $folder; n=$((n+1)); done
mount --bind {own}/home /tmp/home
mount -t tmpfs -o size=2g shm /dev/shm; mount -t tmpfs -o size=16m run /run; mkdir -p /run/sshd
mount --bind {own}/passwd /etc/passwd; mount --bind {own}/hosts /etc/hosts
ip link set lo up; sysctl -qw net.ipv4.ip_local_port_range="{first} {last}"
cp {own}/profile /tmp/home/.bash_profile; touch /tmp/home/.bashrc
exec >>{own}/sshd.log 2>&1
{sshd}
touch {own}/started
while :; do wait; sleep 1; done
"""
_SSHD = """Port 22
HostKey {folder}/host
AuthorizedKeysFile {folder}/id.pub
StrictModes no
UsePAM no
PidFile none
PermitRootLogin prohibit-password
PasswordAuthentication no
MaxStartups 100
UseDNS no
"""


def missing() -> str:
    """Why there can be no hosts here; empty where there can."""
    if os.geteuid() != 0:
        return "namespaces need root"
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    tools = [tool for tool in TOOLS if shutil.which(tool, path=path) is None]
    if tools:
        return f"{', '.join(tools)} not found: apt-get install openssh-server rsync iproute2"
    made = subprocess.run(["ip", "netns", "add", _PREFIX + "try"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", _PREFIX + "try"], capture_output=True)
    return made.stderr.strip()


class Hosts:
    """``count`` hosts besides ``adm`` and ``out``, from ``up`` to ``down``."""

    def __init__(self, folder: Path, count: int, profile: str, keep: list[Path]) -> None:
        """``profile``: shell commands of each login. ``keep``: folders that every host sees as they are."""
        self.folder = folder
        self.names = [f"h{number}" for number in range(count)]
        self._keep = " ".join(str(each) for each in [folder, *keep] if str(each).startswith("/tmp/"))
        self._profile = profile
        self._inits: dict[str, int] = {}
        self._outer: list[subprocess.Popen[bytes]] = []

    def address(self, host: str) -> str:
        return f"{NETWORK}.{ {LAUNCHER: 1, STRANGER: 2}.get(host) or 10 + int(host[1:]) }"

    def up(self) -> None:
        for key in ("id", "host"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key))
        (self.folder / "sshd_config").write_text(_SSHD.format(folder=self.folder))
        hub = _PREFIX + LAUNCHER
        _run("ip", "netns", "add", hub)
        _run("ip", "-n", hub, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", hub, "addr", "add", f"{self.address(LAUNCHER)}/24", "dev", "br0")
        _run("ip", "-n", hub, "link", "set", "br0", "up")
        _run("ip", "-n", hub, "link", "set", "lo", "up")
        for host in [STRANGER, *self.names]:
            space = _PREFIX + host
            _run("ip", "netns", "add", space)
            _run("ip", "-n", hub, "link", "add", f"v{host}", "type", "veth", "peer", "name", "eth0", "netns", space)
            _run("ip", "-n", hub, "link", "set", f"v{host}", "master", "br0", "up")
            _run("ip", "-n", space, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            _run("ip", "-n", space, "link", "set", "eth0", "up")
            _run("ip", "-n", space, "link", "set", "lo", "up")
            _run("ip", "-n", space, "route", "add", "default", "via", self.address(LAUNCHER))
        for host in [LAUNCHER, STRANGER, *self.names]:
            self.boot(host)

    def boot(self, host: str) -> None:
        own = self.folder / host
        (own / "home" / ".ssh").mkdir(parents=True, exist_ok=True)
        (own / "started").unlink(missing_ok=True)
        users = Path("/etc/passwd").read_text().splitlines()
        root = "root:x:0:0:root:/tmp/home:/bin/bash"
        (own / "passwd").write_text("\n".join([root, *(user for user in users if not user.startswith("root:"))]) + "\n")
        others = "".join(f"{self.address(name)} {name}\n" for name in [LAUNCHER, *self.names])
        (own / "hosts").write_text(f"127.0.0.1 localhost\n{others}")
        (own / "profile").write_text(self._profile)
        listen = f"-o ListenAddress={self.address(host)}"
        sshd = f"/usr/sbin/sshd -D -e -f {self.folder}/sshd_config {listen} &" if host in self.names else ""
        (own / "init.sh").write_text(
            _INIT.format(host=host, keep=self._keep, own=own, sshd=sshd, first=FREE_PORTS[0], last=FREE_PORTS[-1])
        )
        command = ["ip", "netns", "exec", _PREFIX + host, "unshare", "-mpuif", "--mount-proc", "--kill-child"]
        with (own / "boot.log").open("ab") as log:
            outer = subprocess.Popen(
                [*command, "bash", str(own / "init.sh")],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
            self._outer.append(outer)
        deadline = time.monotonic() + _STARTED_WITHIN
        while not (own / "started").exists():
            assert time.monotonic() < deadline and outer.poll() is None, (own / "boot.log").read_text()
            time.sleep(0.02)
        (inner,) = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        self._inits[host] = int(inner)

    def command(self, host: str, *command: str) -> list[str]:
        """``command``, as one that runs on ``host`` after a login."""
        enter = ["nsenter", "-t", str(self._inits[host]), "-m", "-n", "-p", "-u", "-i", "--", "env", "-i"]
        login = ["HOME=/tmp/home", "USER=root", "TERM=dumb", "bash", "--login", "-c", 'cd; exec "$@"', "_"]
        return [*enter, *login, *command]

    def run(self, host: str, *command: str, within: float = 120, code: int = 0) -> str:
        """What it prints on its standard output."""
        done = subprocess.run(
            self.command(host, *command), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=within
        )
        assert done.returncode == code, f"{host}: {' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def cut(self, host: str) -> None:
        """From the network."""
        _run("ip", "-n", _PREFIX + LAUNCHER, "link", "set", f"v{host}", "down")

    def heal(self, host: str) -> None:
        _run("ip", "-n", _PREFIX + LAUNCHER, "link", "set", f"v{host}", "up")

    def crash(self, host: str) -> None:
        """All of its processes end at once, and so does what it had in memory."""
        os.kill(self._inits[host], signal.SIGKILL)

    def listening(self, host: str) -> set[int]:
        """The TCP ports of it that others can connect to."""
        table = "".join(Path(f"/proc/{self._inits[host]}/net/{name}").read_text() for name in ("tcp", "tcp6"))
        found = set()
        for line in table.splitlines():
            fields = line.split()
            if len(fields) > 3 and fields[3] == "0A":  # LISTEN; addresses are in the byte order of the host
                address, _, port = fields[1].partition(":")
                if address not in ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"):
                    found.add(int(port, 16))
        return found

    def processes(self, host: str) -> list[str]:
        """Command lines of what runs there but for the host itself and this question."""
        listed = self.run(host, "ps", "-eo", "args=").splitlines()
        own = ("bash " + str(self.folder), "sleep 1", "sshd: ", "/usr/sbin/sshd", "ps -eo args=")
        return [line for line in listed if not line.startswith(own)]

    def down(self) -> None:
        for init in self._inits.values():
            try:
                os.kill(init, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for outer in self._outer:
            outer.wait()
        for host in [STRANGER, *self.names, LAUNCHER]:
            subprocess.run(["ip", "netns", "del", _PREFIX + host], capture_output=True)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
