"""What installing, deploying, breaking and upgrading ReSqlite must show on real hosts.

Started by `tests/hosts/run` in namespaces of its own. Each function is a
scenario and says in its name what it shows; they run in the order in which
they are written, for each finds the hosts as the one before has left them;
arguments choose those whose names contain one of them.
"""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time

import hosts
from hosts import GATEWAY, RUN, WORK, Failed, Host, check, run, wait_for
from load import Load

ELECTION_TIMEOUT_MS = 1000
DAEMONS = ("resqlite-raftd", "resqlite-sqlited")
PROGRAM = str(RUN / "program/usr/bin/resqlite")
CERTIFICATES = RUN / "certificates"
# For the command line of this side; the playbook makes the files.
CLIENT_FILES = {
    "RESQLITE_CA": str(CERTIFICATES / "ca/ca.crt"),
    "RESQLITE_CERT": str(CERTIFICATES / "admin/admin.crt"),
    "RESQLITE_KEY": str(CERTIFICATES / "admin/admin.key"),
}
REPOSITORY_LINES = rf"""
mkdir -p /etc/apt/keyrings
cp /root/resqlite.gpg /etc/apt/keyrings/resqlite.gpg
printf 'Types: deb\nURIs: http://{GATEWAY}:8000\nSuites: stable\nComponents: main\nSigned-By: /etc/apt/keyrings/resqlite.gpg\n' \
    > /etc/apt/sources.list.d/resqlite.sources
apt-get update -q
"""


# ---------------------------------------------------------------- the stage


class Repository:
    """Serves one of the two apt repositories, the one without the next version at first."""

    def __init__(self):
        self.directory = WORK / "apt"
        outer = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *arguments):
                super().__init__(*arguments, directory=outer.directory)

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer((GATEWAY, 8000), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()

    def publish_next(self):
        self.directory = WORK / "apt-next"

    def publish_first(self):
        self.directory = WORK / "apt"


class Stage:
    """The machines of all scenarios: one for itself, and a cluster of three."""

    def __init__(self):
        hosts.prepare_network()
        self.repository = Repository()
        self.newcomer = Host("newcomer", 0)
        self.members = [Host(f"db{number}", number) for number in (1, 2, 3)]
        for host in (self.newcomer, *self.members):
            wait_for(f"{host.name} to boot", host.answers)
        # The command line for this side of the network, as the package has it.
        run("dpkg-deb", "-x", *map(str, (WORK / "apt/pool").glob("resqlite_*.deb")), RUN / "program")
        self.inventory = RUN / "inventory.json"
        self.inventory.write_text(json.dumps(self._inventory()))

    def _inventory(self):
        return {
            "resqlite": {
                "hosts": {
                    host.name: {"ansible_host": host.address, "resqlite_node_id": number}
                    for number, host in enumerate(self.members, 1)
                },
                "vars": {
                    "ansible_user": "root",
                    "ansible_ssh_common_args": " ".join(hosts.SSH_OPTIONS),
                    # No sockets of shared connections, which would be left behind.
                    "ansible_ssh_args": "-C",
                    "ansible_pipelining": True,
                    "ansible_python_interpreter": "/usr/bin/python3",
                    "resqlite_cluster_name": "hosts-test",
                    "resqlite_apt_repository": f"http://{GATEWAY}:8000",
                    "resqlite_apt_key": str(WORK / "apt/resqlite.gpg"),
                    "resqlite_cert_program": PROGRAM,
                    "resqlite_certificates": str(CERTIFICATES),
                },
            }
        }

    def playbook(self, name, *arguments, expected_hosts=3):
        """Runs a playbook and returns how many tasks changed something, host by host."""
        output = run("ansible-playbook", "-i", self.inventory, name, *arguments, cwd="deploy", timeout=300)
        recap = re.findall(r"^(\w+) +: ok=\d+ +changed=(\d+) +unreachable=0 +failed=0 ", output, re.MULTILINE)
        check(len(recap) == expected_hosts, f"{name} did not reach every host:\n{output}")
        return {host: int(changed) for host, changed in recap}

    def endpoints(self, first=0):
        """All members' addresses, beginning with one of them."""
        return [f"{host.address}:50051" for host in self.members[first:] + self.members[:first]]

    def sql(self, text, member=None):
        """Runs SQL through one member only, or through any."""
        endpoints = [f"{member.address}:50051"] if member else self.endpoints()
        return run(PROGRAM, "shell", "--endpoints", ",".join(endpoints), "-c", text, timeout=60)

    def status(self):
        """What every member says of itself."""
        return json.loads(run(PROGRAM, "status", "--json", "--endpoints", ",".join(self.endpoints()), timeout=60))

    def leader(self):
        """The member that leads, by the word of all that answer."""

        def agreed():
            leaders = {node["leader_id"] for node in self.status() if node["reachable"]}
            return leaders.pop() if len(leaders) == 1 else None

        return self.members[wait_for("one leader", agreed) - 1]

    def wait_until_healthy(self):
        """Until all three are well, agree on the leader, and hold all that is committed."""

        def healthy():
            nodes = self.status()
            well = [n for n in nodes if n["health"] == "ok" and n["lag_entries"] == 0 and n["leader_id"]]
            if len(well) == 3 and len({n["leader_id"] for n in well}) == 1:
                return True
            raise Failed(json.dumps(nodes))

        wait_for("every member to be healthy", healthy)

    def others(self, host):
        return [member for member in self.members if member is not host]


# ---------------------------------------------------------------- one host


def apt_install_leaves_a_working_single_node(stage):
    host = stage.newcomer
    key = (WORK / "apt/resqlite.gpg").read_bytes()
    (host.root / "root/resqlite.gpg").write_bytes(key)
    host.ssh(REPOSITORY_LINES)
    host.ssh("apt-get install -y -q resqlite")
    host.ssh("systemctl start resqlite")
    check(host.ssh('resqlite shell -c "select 1"') == "1", "select 1 is not 1")
    host.ssh("resqlite shell -c \"create table kept(a); insert into kept values ('kept')\"")
    for page in ("resqlite", "raftd", "sqlited", "resqlite.yaml", "resqlite-shell"):
        host.ssh(f"ls /usr/share/man/man?/{page}.*.gz")


def each_daemon_is_confined(stage):
    host = stage.newcomer
    for unit in DAEMONS:
        report = host.ssh(f"systemd-analyze security --no-pager {unit}")
        exposure = float(re.search(r"Overall exposure level for \S+: ([0-9.]+)", report).group(1))
        print(f"  {unit}: exposure {exposure}")
        check(exposure <= 1.5, report)
    may = {"resqlite-raft": "/var/lib/resqlite/raft/hard_state", "resqlite-sql": "/var/lib/resqlite/sql/resqlite.db"}
    for user in may:
        for owner, file in may.items():
            readable = host.ssh(f"runuser -u {user} -- test -r {file} && echo yes || echo no")
            check(readable == ("yes" if user == owner else "no"), f"{user} may read {file}: {readable}")
    socket = "/run/resqlite/raftd.sock"
    check(host.ssh(f"runuser -u resqlite-sql -- test -w {socket} && echo yes") == "yes", "sqlited has no socket")
    check(host.ssh(f"runuser -u nobody -- test -w {socket} || echo no") == "no", "anybody may open the socket")
    check(host.ssh(f"stat -c '%U %G %a' {socket}") == "resqlite-raft resqlite 770", host.ssh(f"stat {socket}"))


def the_handle_acts_on_both_and_waits_for_them(stage):
    host = stage.newcomer

    def pids():
        return [host.property(unit, "MainPID") for unit in DAEMONS]

    def states():
        return [host.property(unit, "ActiveState") for unit in DAEMONS]

    def starts(unit):
        return int(host.ssh(f"journalctl -u {unit} | grep -c ' Starting {unit}'"))

    before, starts_before = pids(), [starts(unit) for unit in DAEMONS]
    host.ssh("systemctl reload resqlite")
    check(pids() == before, "a reload has restarted a daemon")
    host.ssh("systemctl restart resqlite")
    check(not set(pids()) & set(before), "a restart has left a daemon running")
    check([starts(unit) - 1 for unit in DAEMONS] == starts_before, "a restart has started a daemon more than once")
    host.ssh("systemctl stop resqlite")
    check(states() == ["inactive", "inactive"], f"after stop: {states()}")
    host.ssh("systemctl start resqlite")
    check(states() == ["active", "active"], f"after start: {states()}")
    wait_for("raftd's status line", lambda: host.property(DAEMONS[0], "StatusText").startswith("Leader, term "))
    wait_for("sqlited's status line", lambda: host.property(DAEMONS[1], "StatusText").startswith("serving; "))
    check("Leader, term " in host.ssh("systemctl status --no-pager 'resqlite*'"), "no status line")


def a_crash_of_one_daemon_leaves_the_other_running(stage):
    host = stage.newcomer
    for crashing, other in (DAEMONS, DAEMONS[::-1]):
        crashed_pid, other_pid = (host.property(unit, "MainPID") for unit in (crashing, other))
        host.ssh(f"systemctl kill --kill-who=main --signal=KILL {crashing}")
        wait_for(f"{crashing} to come back", lambda: host.property(crashing, "MainPID") not in ("0", crashed_pid))
        check(host.ssh('resqlite shell -c "select a from kept"') == "kept", "the data is gone")
        check(host.property(other, "MainPID") == other_pid, f"{other} did not outlive {crashing}")


def a_daemon_that_hangs_is_killed_by_the_watchdog(stage):
    host = stage.newcomer
    pid = host.property("resqlite-sqlited", "MainPID")
    host.ssh("systemctl kill --kill-who=main --signal=STOP resqlite-sqlited")
    wait_for("the watchdog", lambda: host.property("resqlite-sqlited", "MainPID") not in ("0", pid), seconds=90)
    check("Watchdog timeout" in host.ssh("journalctl -u resqlite-sqlited"), "something else has killed it")
    check(host.ssh('resqlite shell -c "select a from kept"') == "kept", "the data is gone")


def a_mistake_in_the_configuration_is_told_and_not_tried_again(stage):
    host = stage.newcomer
    host.ssh("cp /etc/resqlite/resqlite.yaml /root/ && sed -i 's/^node_id: 1/node_id: 9/' /etc/resqlite/resqlite.yaml")
    host.ssh("! systemctl restart resqlite")
    for unit in DAEMONS:
        wait_for(f"{unit} to give up", lambda: host.property(unit, "ActiveState") == "failed")
        check(host.property(unit, "ExecMainStatus") == "78", f"{unit}: {host.property(unit, 'ExecMainStatus')}")
        journal = host.ssh(f"journalctl -u {unit}")
        check("/etc/resqlite/resqlite.yaml:5: node_id: 9 is not a member" in journal, journal)
    host.ssh("cp /root/resqlite.yaml /etc/resqlite/ && systemctl start resqlite")
    check(host.ssh('resqlite shell -c "select a from kept"') == "kept", "the data is gone")


def an_upgrade_keeps_data_and_an_edited_configuration(stage):
    host = stage.newcomer
    host.ssh("printf '  readers: 5\\n' >> /etc/resqlite/resqlite.yaml")
    before = [host.property(unit, "MainPID") for unit in DAEMONS]
    stage.repository.publish_next()
    host.ssh("apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get -y -q -o Dpkg::Options::=--force-confold upgrade")
    stage.repository.publish_first()
    check(host.ssh("dpkg-query -W -f '${Version}' resqlite").endswith("+next"), "it was not upgraded")
    check(host.ssh("tail -n 1 /etc/resqlite/resqlite.yaml").strip() == "readers: 5", "the edited configuration is gone")
    check(host.ssh("ls /etc/resqlite") == "resqlite.yaml\nresqlite.yaml.dpkg-dist\ntls", host.ssh("ls /etc/resqlite"))
    check(not set(before) & {host.property(unit, "MainPID") for unit in DAEMONS}, "a daemon was not restarted")
    raftd, sqlited = (int(host.property(unit, "ActiveEnterTimestampMonotonic")) for unit in DAEMONS)
    check(raftd < sqlited, "sqlited was started before raftd")
    check(host.property("resqlite", "UnitFileState") == "enabled", "the upgrade has disabled the service")
    check(host.ssh('resqlite shell -c "select a from kept"') == "kept", "the data is gone")


def remove_stops_and_keeps_and_purge_deletes(stage):
    host = stage.newcomer
    host.ssh("apt-get remove -y -q resqlite")
    for unit in DAEMONS:
        check(host.ssh(f"systemctl is-active {unit} || true") == "inactive", f"{unit} still runs")
    host.ssh("test -f /var/lib/resqlite/sql/resqlite.db && grep 'readers: 5' /etc/resqlite/resqlite.yaml")
    # The version that is there to be had is the first one again: going back keeps the data, too.
    host.ssh("apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q -o Dpkg::Options::=--force-confold resqlite")
    check(host.ssh('resqlite shell -c "select a from kept"') == "kept", "the data is gone")
    host.ssh("apt-get purge -y -q resqlite")
    for path in ("/var/lib/resqlite", "/etc/resqlite", "/run/resqlite", "/usr/sbin/raftd"):
        check(host.ssh(f"test -e {path} || echo gone") == "gone", f"{path} is still there")
    check(host.ssh("find /etc/systemd /var/lib/systemd -name '*resqlite*'") == "", "systemd remembers it")
    host.ssh("id resqlite-raft && id resqlite-sql")
    check(host.ssh("systemctl --failed --no-legend") == "", "a unit has failed")


# ---------------------------------------------------------------- three hosts


def the_playbook_makes_a_serving_cluster_and_then_changes_nothing(stage):
    changed = stage.playbook("site.yml")
    check(all(changed.values()), f"the first run changed {changed}")
    changed = stage.playbook("site.yml")
    check(not any(changed.values()), f"the second run changed {changed}")


def each_daemon_can_read_its_own_key_only(stage):
    host = stage.members[0]
    may = {"resqlite-raft": "raftd/peer.key", "resqlite-sql": "sqlited/sql.key"}
    for user in (*may, "nobody"):
        for owner, file in may.items():
            readable = host.ssh(f"runuser -u {user} -- test -r /etc/resqlite/tls/{file} && echo yes || echo no")
            check(readable == ("yes" if user == owner else "no"), f"{user} may read {file}: {readable}")


def whoever_may_not_attach_is_refused_whatever_the_files_mode(stage):
    host = stage.members[0]
    host.ssh("chmod 777 /run/resqlite/raftd.sock && chmod 755 /run/resqlite")
    refused = host.ssh("runuser -u nobody -- timeout 20 resqlite raft propose --socket /run/resqlite/raftd.sock x 2>&1 || echo refused")
    host.ssh("chmod 770 /run/resqlite/raftd.sock && chmod 2750 /run/resqlite")
    check(refused.endswith("refused"), refused)
    check("who may not use the socket was refused" in host.ssh("journalctl -u resqlite-raftd"), "raftd does not say so")


def nobody_gets_in_without_a_certificate(stage):
    endpoint = stage.endpoints()[0]
    plain = {name: value for name, value in os.environ.items() if name not in CLIENT_FILES}
    for environment in (plain, {**plain, "RESQLITE_CA": CLIENT_FILES["RESQLITE_CA"]}):
        try:
            run(PROGRAM, "shell", "--endpoints", endpoint, "-c", "select 1", timeout=60, env=environment)
        except Failed:
            continue
        raise Failed("somebody without a certificate was served")


def certificates_rotate_while_everything_is_served(stage):
    def shown(host):
        return host.ssh("cat /etc/resqlite/tls/raftd/peer.crt /etc/resqlite/tls/sqlited/sql.crt")

    def pids():
        return [host.property(unit, "MainPID") for host in stage.members for unit in DAEMONS]

    before, processes, loads = [shown(host) for host in stage.members], pids(), start_loads(stage, 100_000_000)
    changed = stage.playbook("rotate-certificates.yml")
    end_loads(stage, loads)
    check(all(changed.values()), f"the rotation changed {changed}")
    check(not set(before) & {shown(host) for host in stage.members}, "a host has its old certificate")
    check(pids() == processes, "a daemon was restarted")
    for host in stage.members:
        for unit in DAEMONS:
            check("certificates reloaded" in host.ssh(f"journalctl -u {unit}"), f"{host.name}: {unit} has not reloaded")
    changed = stage.playbook("site.yml")
    check(not any(changed.values()), f"after the rotation site.yml changed {changed}")


def a_lost_host_is_replaced(stage):
    lost = stage.members[2]
    lost.ssh("systemctl stop resqlite && apt-get purge -y -q resqlite")
    check(lost.ssh("test -e /var/lib/resqlite || echo gone") == "gone", "there is something left of it")
    serves_without(stage, lost)
    stage.playbook("replace.yml", "-e", f"resqlite_replaced={lost.name}", expected_hosts=1)
    stage.wait_until_healthy()
    rows = {stage.sql("select count(*) from notes", host) for host in stage.members}
    check(len(rows) == 1, f"the hosts hold different numbers of notes: {rows}")


def what_is_written_through_one_host_is_read_on_the_others(stage):
    first, second, third = stage.members
    stage.sql("create table notes(text); create table load(number integer primary key)", first)
    for number, host in enumerate(stage.members):
        stage.sql(f"insert into notes values ('note {number}')", host)
    for host in stage.members:
        check(stage.sql("select count(*) from notes", host) == "3", f"{host.name} does not have all notes")


def serves_without(stage, lost):
    """The rest takes a write; says how long that took."""
    rest = stage.others(lost)
    began = time.monotonic()
    endpoints = ",".join(f"{host.address}:50051" for host in rest)
    run(PROGRAM, "shell", "--endpoints", endpoints, "-c", f"insert into notes values ('without {lost.name}')", timeout=60)
    print(f"  the rest took a write {(time.monotonic() - began) * 1e3:.0f} ms after")


def a_killed_leader_is_replaced_and_comes_back(stage):
    leader = stage.leader()
    leader.ssh("systemctl kill --kill-who=main --signal=KILL resqlite-raftd")
    serves_without(stage, leader)
    stage.wait_until_healthy()


def a_leader_without_network_is_replaced_and_catches_up(stage):
    leader = stage.leader()
    leader.pull_network()
    serves_without(stage, leader)
    wait_for("another leader", lambda: stage.leader() is not leader)
    leader.plug_network()
    stage.wait_until_healthy()
    check(stage.sql("select count(*) from notes", leader) == "5", f"{leader.name} has not caught up")


def a_rebooted_host_comes_back_by_itself(stage):
    leader = stage.leader()
    before = leader.boot_id()
    leader.ssh("systemctl reboot --no-block")
    serves_without(stage, leader)
    wait_for(f"{leader.name} to boot", lambda: leader.answers() and leader.boot_id() != before, seconds=120)
    stage.wait_until_healthy()


def a_changed_setting_is_applied_host_by_host(stage):
    inventory = stage._inventory()
    inventory["resqlite"]["vars"]["resqlite_sqlited_settings"] = {"readers": 6}
    stage.inventory.write_text(json.dumps(inventory))
    loads = start_loads(stage, 1_000_000)
    stage.playbook("site.yml")
    end_loads(stage, loads)
    for host in stage.members:
        host.ssh("grep 'readers: 6' /etc/resqlite/resqlite.yaml")


def a_rolling_upgrade_loses_no_write_and_hardly_pauses(stage):
    stage.repository.publish_next()
    loads = start_loads(stage, 10_000_000)
    changed = stage.playbook("upgrade.yml")
    end_loads(stage, loads)
    check(all(changed.values()), f"the upgrade changed {changed}")
    for host in stage.members:
        version = host.ssh("dpkg-query -W -f '${Version}' resqlite")
        check(version.endswith("+next"), f"{host.name} is at {version}")
        check(host.ssh("systemctl is-enabled resqlite") == "enabled", f"{host.name}: disabled by the upgrade")
    changed = stage.playbook("upgrade.yml")
    check(not any(changed.values()), f"a second upgrade changed {changed}")


def start_loads(stage, first_number):
    """Three clients, each with another member as its first."""
    return [Load(PROGRAM, stage.endpoints(first), first_number * (first + 1)) for first in range(3)]


def end_loads(stage, loads):
    """Everything acknowledged is there, on every host, and nothing paused for long."""
    for load in loads:
        load.stop()
    acknowledged = {number for load in loads for number in load.acknowledged}
    pause_ms = max(load.longest_pause_ms for load in loads)
    print(f"  {len(acknowledged)} writes, the longest pause {pause_ms:.0f} ms")
    stage.wait_until_healthy()
    for host in stage.members:
        there = {int(line) for line in stage.sql("select number from load", host).split()}
        check(acknowledged <= there, f"{host.name} lacks {sorted(acknowledged - there)[:5]} …")
    check(pause_ms < 2 * ELECTION_TIMEOUT_MS, f"a write took {pause_ms:.0f} ms")


SCENARIOS = [
    apt_install_leaves_a_working_single_node,
    each_daemon_is_confined,
    the_handle_acts_on_both_and_waits_for_them,
    a_crash_of_one_daemon_leaves_the_other_running,
    a_daemon_that_hangs_is_killed_by_the_watchdog,
    a_mistake_in_the_configuration_is_told_and_not_tried_again,
    an_upgrade_keeps_data_and_an_edited_configuration,
    remove_stops_and_keeps_and_purge_deletes,
    the_playbook_makes_a_serving_cluster_and_then_changes_nothing,
    each_daemon_can_read_its_own_key_only,
    whoever_may_not_attach_is_refused_whatever_the_files_mode,
    nobody_gets_in_without_a_certificate,
    what_is_written_through_one_host_is_read_on_the_others,
    a_killed_leader_is_replaced_and_comes_back,
    a_leader_without_network_is_replaced_and_catches_up,
    a_rebooted_host_comes_back_by_itself,
    a_changed_setting_is_applied_host_by_host,
    certificates_rotate_while_everything_is_served,
    a_rolling_upgrade_loses_no_write_and_hardly_pauses,
    a_lost_host_is_replaced,
]


def explain(stage):
    """What the hosts have to say about a failure."""
    for host in (stage.newcomer, *stage.members):
        try:
            journal = host.ssh("journalctl --no-pager -n 60 -u 'resqlite*'", seconds=20)
        except (Failed, subprocess.TimeoutExpired) as failure:
            journal = str(failure)
        print(f"---- {host.name}\n{journal}", file=sys.stderr)


def main():
    began = time.monotonic()
    only = sys.argv[1:]
    os.environ.update(CLIENT_FILES)
    stage = Stage()
    print(f"ok  {time.monotonic() - began:5.1f} s  four hosts have booted", flush=True)
    for scenario in SCENARIOS:
        if only and not any(part in scenario.__name__ for part in only):
            continue
        name, began = scenario.__name__.replace("_", " "), time.monotonic()
        try:
            scenario(stage)
        except (Failed, subprocess.TimeoutExpired) as failure:
            print(f"FAILED  {name}\n{failure}", file=sys.stderr)
            explain(stage)
            return 1
        print(f"ok  {time.monotonic() - began:5.1f} s  {name}", flush=True)
    return 0


if __name__ == "__main__":
    # Without waiting for threads of a failed scenario: what they wait for ends with our namespaces.
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
