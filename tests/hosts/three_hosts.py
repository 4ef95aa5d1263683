"""What deploying, breaking, mending and upgrading a cluster of three hosts must show.

Each function is a scenario and says in its name what it shows; they run in the
order of the list at the end, for each finds the hosts as the one before has left them.
"""

import contextlib
import os
import sqlite3
import time

from hosts import RUN, Failed, check, run, wait_for
from load import Load
from stage import CERTIFICATES, CLIENT_FILES, DAEMONS, PROGRAM

ELECTION_TIMEOUT_MS = 1000


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

    def refusal(environment):
        try:
            run(PROGRAM, "shell", "--endpoints", endpoint, "-c", "select 1", timeout=60, env=environment)
        except Failed as failure:
            return str(failure)
        raise Failed("somebody without a certificate was served")

    refusal(plain)
    why = refusal({**plain, "RESQLITE_CA": CLIENT_FILES["RESQLITE_CA"]})
    check("certificate" in why.lower().split("error:", 1)[1], f"the refusal does not give the reason: {why}")


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


def a_backup_is_fetched_that_sqlite_reads_and_a_cluster_takes_back(stage):
    directory = RUN / "backups"
    stage.playbook("backup.yml", "-e", f"resqlite_backup_dir={directory}", expected_hosts=1)
    (backup,) = directory.glob("hosts-test-*.db")
    with contextlib.closing(sqlite3.connect(backup)) as database:
        check(database.execute("pragma integrity_check").fetchone() == ("ok",), "the backup is damaged")
        (rows,) = database.execute("select count(*) from notes").fetchone()
    notes = stage.sql("select count(*) from notes")
    check(str(rows) == notes, f"the backup has {rows} notes, not {notes}")
    for host in stage.members:
        check(host.ssh("ls -d /tmp/resqlite-backup-* 2>/dev/null || true") == "", f"{host.name} has a copy still")
    stage.sql("delete from notes")
    stage.resqlite("restore", "--force", str(backup))
    for host in stage.members:
        check(stage.sql("select count(*) from notes", host) == notes, f"{host.name} does not have the notes again")


def the_playbooks_go_on_when_everybody_is_asked_who_they_are(stage):
    first = stage.members[0]
    root = "resqlite {} --endpoints unix:/var/lib/resqlite/sql/admin.sock"
    first.ssh("printf 'correct horse battery staple' > /root/password && chmod 600 /root/password")
    first.ssh(root.format("user add") + " admin --role admin --new-password-file /root/password")
    first.ssh(root.format("auth on"))
    changed = stage.playbook("site.yml")
    check(not any(changed.values()), f"site.yml changed {changed}")
    check(stage.sql("select count(*) from notes") != "0", "the operators' certificate does not name the user")
    first.ssh(root.format("auth off"))


def a_damaged_member_is_filled_by_the_others(stage):
    damaged = stage.members[1]
    damaged.ssh("systemctl stop resqlite")
    damaged.ssh("dd if=/dev/urandom of=/var/lib/resqlite/raft/hard_state bs=4096 count=2 conv=notrunc 2>/dev/null")
    damaged.ssh("! systemctl start resqlite")
    check("resqlite node replace" in damaged.ssh("journalctl -u resqlite-raftd -n 30"), "raftd does not name the way")
    damaged.ssh("systemctl stop resqlite && resqlite node replace && systemctl start resqlite", seconds=120)
    stage.wait_until_healthy()
    stage.sql("insert into notes values ('after the damage')", damaged)


def a_lost_host_is_replaced(stage):
    lost = stage.members[2]
    lost.lose()
    serves_without(stage, lost)
    lost.put_another_in_its_place()
    wait_for(f"another {lost.name} to boot", lost.booted)
    stage.playbook("replace.yml", "-e", f"resqlite_replaced={lost.name}", expected_hosts=1)
    stage.wait_until_healthy()
    rows = {stage.sql("select count(*) from notes", host) for host in stage.members}
    check(len(rows) == 1, f"the hosts hold different numbers of notes: {rows}")
    changed = stage.playbook("site.yml")
    check(not any(changed.values()), f"after the replacement site.yml changed {changed}")


def a_survivor_of_a_lost_majority_serves_alone(stage):
    first, second, survivor = stage.members
    notes = stage.sql("select count(*) from notes", survivor)
    for lost in (first, second):
        lost.lose()
    survivor.ssh("systemctl stop resqlite")
    check("applied index" in survivor.ssh("resqlite cluster recover --show"), "it does not say what it holds")
    # Another cluster: another name, this member alone, and a certificate of it by the authority of before.
    survivor.ssh("sed -i -e 's/^  name: .*/  name: recovered/' -e '/- id: [12]$/,/sql:/d' /etc/resqlite/resqlite.yaml")
    made = RUN / "recovered"
    name = ("--cluster", "recovered", "--id", "3", "--host", survivor.address)
    run(PROGRAM, "cert", "node", "--ca-dir", CERTIFICATES / "ca", *name, "--out", made)
    for file in ("raftd/peer.crt", "raftd/peer.key", "sqlited/sql.crt", "sqlited/sql.key"):
        # Into the file that is there, so that it stays its daemon's own.
        (survivor.root / "etc/resqlite/tls" / file).write_bytes((made / file.split("/")[1]).read_bytes())
    survivor.ssh("resqlite cluster recover --yes && systemctl start resqlite")
    check(stage.sql("select count(*) from notes", survivor) == notes, "the survivor does not hold what it held")


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
    wait_for(f"{leader.name} to boot", lambda: leader.booted() and leader.boot_id() != before, seconds=120)
    stage.wait_until_healthy()


def a_changed_setting_is_applied_host_by_host(stage):
    stage.settings["resqlite_sqlited_settings"] = {"readers": 6}
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
    a_backup_is_fetched_that_sqlite_reads_and_a_cluster_takes_back,
    the_playbooks_go_on_when_everybody_is_asked_who_they_are,
    a_damaged_member_is_filled_by_the_others,
    a_lost_host_is_replaced,
    a_survivor_of_a_lost_majority_serves_alone,
]
