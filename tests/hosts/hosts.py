"""Debian hosts with systemd as PID 1, in the namespaces that we were started in.

A host is a systemd-nspawn container on an overlay of one installed base
system, reached by ssh over a bridge. Nothing here knows of ReSqlite. Nobody
cleans up, because the kernel does: processes, mounts and network belong to
namespaces that end with this process. Only control groups stay, and `run`
removes those.
"""

import os
import pathlib
import shlex
import shutil
import subprocess
import threading
import time

WORK = pathlib.Path("target/hosts").resolve()
RUN = WORK / "run"
CGROUPS = pathlib.Path("/sys/fs/cgroup")
GATEWAY = "10.83.0.1"
SSH_OPTIONS = [
    "-i", f"{RUN}/key", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
    "-o", "LogLevel=ERROR", "-o", "ConnectTimeout=2", "-o", "ServerAliveInterval=2",
    # One login for each host, not one for each command: it is what a command would spend most of its time on.
    "-o", "ControlMaster=auto", "-o", "ControlPersist=yes", "-o", "ControlPath=/run/ssh-%h",
]  # fmt: skip
# What a host says of itself when it has not booted well.
TROUBLE = """
systemctl --failed --no-legend --plain
for unit in $(systemctl --failed --no-legend --plain | cut -d' ' -f1); do journalctl --boot --no-pager --lines=30 --unit="$unit"; done
"""


class Failed(Exception):
    """A check failed, or a command did; the message says which and how."""


def check(condition, message):
    """What `assert` is, whatever flags Python was given."""
    if not condition:
        raise Failed(message)


def run(*command, **options):
    """Runs a command on this machine and returns its standard output."""
    try:
        result = subprocess.run(command, text=True, capture_output=True, **options)
    except subprocess.TimeoutExpired as late:
        raise Failed(str(late)) from None
    if result.returncode != 0:
        raise Failed(f"{shlex.join(map(str, command))}: status {result.returncode}\n{result.stdout}{result.stderr}")
    return result.stdout.strip()


def wait_for(what, condition, seconds=60):
    """Asks until the condition is true (its last result is returned), for so long."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if result := condition():
                return result
            last = "it is not so"
        except Failed as failure:
            last = str(failure)
        if time.monotonic() > deadline:
            raise Failed(f"waited {seconds} s for {what}: {last}")
        # The pace of asking, not what is waited for.
        time.sleep(0.1)


def prepare():
    """A bridge with our own address, on which every host will be, and room for what the hosts write."""
    RUN.mkdir(parents=True, exist_ok=True)
    # In memory: gone with our namespace, and an overlay's upper layer may not lie on another overlay.
    run("mount", "-t", "tmpfs", "-o", "size=8g", "tmpfs", RUN)
    # What nspawn and ssh leave in /run is gone with our namespace, too.
    run("mount", "-t", "tmpfs", "tmpfs", "/run")
    # One hierarchy, whatever the outer machine has.
    run("mount", "-t", "cgroup2", "cgroup2", CGROUPS)
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", RUN / "key")
    for command in ("set lo up", "add hosts type bridge", "set hosts up"):
        run("ip", "link", *command.split())
    run("ip", "address", "add", f"{GATEWAY}/24", "dev", "hosts")


class Host:
    """One machine. Boots when it is made; `booted` once it has done so."""

    def __init__(self, name, number):
        self.name = name
        self.address = f"10.83.0.{10 + number}"
        self.root = RUN / name / "root"
        self._group = CGROUPS / os.environ["HOSTS_CONTROL_GROUP"] / name
        self._install()

    def _install(self):
        self._mount()
        self._configure()
        self._power = threading.Thread(target=self._keep_powered, daemon=True)
        self._power.start()

    def lose(self):
        """Takes the machine away, with everything on it; what it had in memory, too."""
        (self._group / "cgroup.kill").write_text("1")
        self._power.join()
        run("umount", "--lazy", self.root)
        shutil.rmtree(RUN / self.name)

    def put_another_in_its_place(self):
        """A new machine of the same name and address, with nothing on it but Debian."""
        self._install()

    def _keep_powered(self):
        """Boots, and boots again when the host says so."""
        command = [
            "systemd-nspawn", "--quiet", "--boot", f"--directory={self.root}", f"--machine={self.name}",
            "--network-bridge=hosts", "--link-journal=no", "--resolv-conf=off", "--console=pipe",
            # The outer machine may not run systemd: nothing to register with, no unit to be in.
            "--register=no", "--keep-unit",
        ]  # fmt: skip
        with open(RUN / self.name / "console", "wb") as log:
            # With --keep-unit a reboot ends nspawn with this status, for whoever keeps the unit.
            while 133 == subprocess.call(
                ["sh", "-c", 'echo 0 > "$0"/cgroup.procs && exec "$@"', self._control_group(), *command],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            ):  # fmt: skip
                pass

    def _control_group(self):
        """An empty control group of this host's own.

        With --keep-unit a container's groups lie below the one in which nspawn was started. In a common one the
        hosts' units of one name share a group: a unit that ends on one host removes it while the same unit starts on
        another, which then fails.
        """
        if self._group.exists():
            # What was killed takes a moment to end.
            wait_for("the last boot's processes to end", lambda: "populated 0" in (self._group / "cgroup.events").read_text())
        for left, _, _ in os.walk(self._group, topdown=False):
            os.rmdir(left)
        self._group.mkdir(parents=True)
        return self._group

    def _mount(self):
        upper, scratch = RUN / self.name / "upper", RUN / self.name / "scratch"
        for directory in (upper, scratch, self.root):
            directory.mkdir(parents=True)
        layers = f"lowerdir={WORK / 'base'},upperdir={upper},workdir={scratch}"
        run("mount", "-t", "overlay", "overlay", "-o", layers, self.root)

    def _configure(self):
        def write(path, text):
            file = self.root / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

        write("etc/hostname", f"{self.name}\n")
        write("etc/hosts", f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n")
        write("etc/machine-id", "")
        write("etc/systemd/network/10-host0.network", f"[Match]\nName=host0\n[Network]\nAddress={self.address}/24\n")
        write("root/.ssh/authorized_keys", (RUN / "key.pub").read_text())
        # Fails now and then in a container: it talks to the kernel's audit, which is not the container's own.
        (self.root / "etc/systemd/system/systemd-update-utmp.service").symlink_to("/dev/null")
        # Out of reach from here.
        write("etc/apt/sources.list", "")
        wants = self.root / "etc/systemd/system/multi-user.target.wants"
        (wants / "systemd-networkd.service").symlink_to("/lib/systemd/system/systemd-networkd.service")

    def ssh(self, command, seconds=120):
        """Runs a shell command there and returns its standard output."""
        return run("ssh", *SSH_OPTIONS, f"root@{self.address}", command, timeout=seconds)

    def booted(self):
        """Whether it has booted to the end, with every unit well."""
        state = self.ssh("systemctl is-system-running || true")
        check(state == "running", f"{self.name} is {state}\n{self.ssh(TROUBLE)}")
        return True

    def console(self):
        """What its console has shown last."""
        return (RUN / self.name / "console").read_text(errors="replace")[-2000:]

    def boot_id(self):
        """Another one after each boot."""
        # A container shares the kernel's own boot id, but PID 1 starts anew.
        return self.ssh("systemctl show --property=UserspaceTimestampMonotonic --value")

    def pull_network(self):
        """Takes the cable out."""
        run("ip", "link", "set", f"vb-{self.name}", "down")

    def plug_network(self):
        """Puts it back."""
        run("ip", "link", "set", f"vb-{self.name}", "up")

    def property(self, unit, name):
        """What systemd knows of a unit."""
        return self.ssh(f"systemctl show --property={name} --value {unit}")
