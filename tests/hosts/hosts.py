"""Debian hosts with systemd as PID 1, in the namespaces that we were started in.

A host is a systemd-nspawn container on an overlay of one installed base
system, reached by ssh over a bridge. Nothing here knows of ReSqlite. Nobody
cleans up, because the kernel does: processes, mounts and network belong to
namespaces that end with this process.
"""

import os
import pathlib
import shlex
import subprocess
import threading
import time

WORK = pathlib.Path("target/hosts").resolve()
RUN = WORK / "run"
GATEWAY = "10.83.0.1"
SSH_OPTIONS = [
    "-i", f"{RUN}/key", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
    "-o", "LogLevel=ERROR", "-o", "ConnectTimeout=2", "-o", "ServerAliveInterval=2",
]  # fmt: skip


class Failed(Exception):
    """A check failed, or a command did; the message says which and how."""


def check(condition, message):
    """What `assert` is, whatever flags Python was given."""
    if not condition:
        raise Failed(message)


def run(*command, **options):
    """Runs a command on this machine and returns its standard output."""
    result = subprocess.run(command, text=True, capture_output=True, **options)
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


def prepare_network():
    """A bridge with our own address, on which every host will be."""
    RUN.mkdir(parents=True)
    # What nspawn leaves in /run is gone with our namespace, too.
    run("mount", "-t", "tmpfs", "tmpfs", "/run")
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", RUN / "key")
    for command in ("set lo up", "add hosts type bridge", "set hosts up"):
        run("ip", "link", *command.split())
    run("ip", "address", "add", f"{GATEWAY}/24", "dev", "hosts")


class Host:
    """One machine. Boots when it is made; `answers` once ssh does."""

    def __init__(self, name, number):
        self.name = name
        self.address = f"10.83.0.{10 + number}"
        self.root = RUN / name / "root"
        self._mount()
        self._configure()
        threading.Thread(target=self._keep_powered, daemon=True).start()

    def _keep_powered(self):
        """Boots, and boots again when the host says so."""
        command = [
            "systemd-nspawn", "--quiet", "--boot", f"--directory={self.root}", f"--machine={self.name}",
            "--network-bridge=hosts", "--link-journal=no", "--resolv-conf=off", "--console=pipe",
            # The outer machine may not run systemd: nothing to register with, no unit to be in.
            "--register=no", "--keep-unit",
        ]  # fmt: skip
        environment = {**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"}
        with open(RUN / self.name / "console", "wb") as log:
            # With --keep-unit a reboot ends nspawn with this status, for whoever keeps the unit.
            while 133 == subprocess.call(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            ):
                pass

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

    def answers(self):
        """Whether it has booted to the end, with every unit well."""
        state = self.ssh("systemctl is-system-running || systemctl --failed --no-legend --plain")
        check(state == "running", state)
        return True

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
