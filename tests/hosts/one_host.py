"""What installing and running ReSqlite must show on one host, as a newcomer has it.

Each function is a scenario and says in its name what it shows; they run in the
order of the list at the end, for each finds the host as the one before has left it.
"""

import re

from hosts import GATEWAY, RUN, WORK, check, run, wait_for
from stage import DAEMONS

REPOSITORY_LINES = rf"""
mkdir -p /etc/apt/keyrings
cp /root/resqlite.gpg /etc/apt/keyrings/resqlite.gpg
printf 'Types: deb\nURIs: http://{GATEWAY}:8000\nSuites: stable\nComponents: main\nSigned-By: /etc/apt/keyrings/resqlite.gpg\n' \
    > /etc/apt/sources.list.d/resqlite.sources
apt-get update -q
"""


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
    for program in ("resqlite", "raftd", "sqlited"):
        host.ssh(
            f"cd /usr/share && ls bash-completion/completions/{program} "
            f"zsh/vendor-completions/_{program} fish/vendor_completions.d/{program}.fish"
        )
    # The package of the symbols belongs to this very version: left there it would be in the way of an upgrade.
    host.ssh("apt-get install -y -q resqlite-dbgsym")
    for program in ("bin/resqlite", "sbin/raftd", "sbin/sqlited"):
        notes = run("readelf", "--notes", "--sections", "--wide", RUN / "program/usr" / program)
        build_id = re.search("Build ID: (..)(.*)", notes)
        check(".debug_line" not in notes, f"{program} is not stripped")
        host.ssh(f"test -s /usr/lib/debug/.build-id/{build_id[1]}/{build_id[2]}.debug")
    host.ssh("apt-get remove -y -q resqlite-dbgsym")


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
    role_and_lag = re.compile(r"serving; leader of term \d+, lag \d+ entries")
    wait_for("sqlited's status line", lambda: role_and_lag.fullmatch(host.property(DAEMONS[1], "StatusText")))
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
    for unit in DAEMONS:
        check(host.property(unit, "WatchdogUSec") == "30s", f"{unit} has no watchdog of 30 s")
    # The same in less time.
    host.ssh(
        "mkdir -p /run/systemd/system/resqlite-sqlited.service.d && cd /run/systemd/system/resqlite-sqlited.service.d && "
        "printf '[Service]\\nWatchdogSec=3s\\n' > short.conf && systemctl daemon-reload && systemctl restart resqlite"
    )
    pid = host.property("resqlite-sqlited", "MainPID")
    host.ssh("systemctl kill --kill-who=main --signal=STOP resqlite-sqlited")
    wait_for("the watchdog", lambda: host.property("resqlite-sqlited", "MainPID") not in ("0", pid))
    host.ssh("rm -r /run/systemd/system/resqlite-sqlited.service.d && systemctl daemon-reload && systemctl restart resqlite")
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


SCENARIOS = [
    apt_install_leaves_a_working_single_node,
    each_daemon_is_confined,
    the_handle_acts_on_both_and_waits_for_them,
    a_crash_of_one_daemon_leaves_the_other_running,
    a_daemon_that_hangs_is_killed_by_the_watchdog,
    a_mistake_in_the_configuration_is_told_and_not_tried_again,
    an_upgrade_keeps_data_and_an_edited_configuration,
    remove_stops_and_keeps_and_purge_deletes,
]
