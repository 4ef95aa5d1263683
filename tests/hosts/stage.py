"""The machines of all scenarios, the repository that they install from, and what is asked of the cluster from here."""

import http.server
import json
import re
import threading

import hosts
from hosts import GATEWAY, RUN, WORK, Failed, Host, check, run, wait_for

DAEMONS = ("resqlite-raftd", "resqlite-sqlited")
PROGRAM = str(RUN / "program/usr/bin/resqlite")
CERTIFICATES = RUN / "certificates"
# For the command line of this side; the playbook makes the files.
CLIENT_FILES = {
    "RESQLITE_CA": str(CERTIFICATES / "ca/ca.crt"),
    "RESQLITE_CERT": str(CERTIFICATES / "admin/admin.crt"),
    "RESQLITE_KEY": str(CERTIFICATES / "admin/admin.key"),
}


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
        self.settings = {}
        hosts.prepare()
        self.repository = Repository()
        self.newcomer = Host("newcomer", 0)
        self.members = [Host(f"db{number}", number) for number in (1, 2, 3)]
        for host in (self.newcomer, *self.members):
            try:
                wait_for(f"{host.name} to boot", host.booted)
            except Failed as failure:
                raise Failed(f"{failure}\n---- its console\n{host.console()}") from None
        # The command line for this side of the network, as the package has it.
        run("dpkg-deb", "-x", *map(str, (WORK / "apt/pool").glob("resqlite_*.deb")), RUN / "program")
        self.inventory = RUN / "inventory.json"

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
                    # Those are all: no compression, and the shared connections are ours.
                    "ansible_ssh_args": "",
                    "ansible_pipelining": True,
                    "ansible_python_interpreter": "/usr/bin/python3",
                    "resqlite_cluster_name": "hosts-test",
                    "resqlite_apt_repository": f"http://{GATEWAY}:8000",
                    "resqlite_apt_key": str(WORK / "apt/resqlite.gpg"),
                    "resqlite_cert_program": PROGRAM,
                    "resqlite_certificates": str(CERTIFICATES),
                    **self.settings,
                },
            }
        }

    def playbook(self, name, *arguments, expected_hosts=3):
        """Runs a playbook and returns how many tasks changed something, host by host."""
        self.inventory.write_text(json.dumps(self._inventory()))
        output = run("ansible-playbook", "-i", self.inventory, name, *arguments, cwd="deploy", timeout=300)
        recap = re.findall(r"^(\w+) +: ok=\d+ +changed=(\d+) +unreachable=0 +failed=0 ", output, re.MULTILINE)
        check(len(recap) == expected_hosts, f"{name} did not reach every host:\n{output}")
        return {host: int(changed) for host, changed in recap}

    def endpoints(self, first=0):
        """All members' addresses, beginning with one of them."""
        return [f"{host.address}:50051" for host in self.members[first:] + self.members[:first]]

    def resqlite(self, *arguments, member=None):
        """Runs the command line on this side, through one member only or through any."""
        endpoints = [f"{member.address}:50051"] if member else self.endpoints()
        subcommand, *rest = arguments
        return run(PROGRAM, subcommand, "--endpoints", ",".join(endpoints), *rest, timeout=60)

    def sql(self, text, member=None):
        """Runs SQL through one member only, or through any."""
        return self.resqlite("shell", "-c", text, member=member)

    def status(self):
        """What every member says of itself."""
        return json.loads(self.resqlite("status", "--json"))

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
