"""Runs what installing, deploying, breaking and upgrading ReSqlite must show on real hosts.

Started by `tests/hosts/run` in namespaces of its own. Arguments choose the
scenarios whose names contain one of them.
"""

import os
import sys
import time

import one_host
import three_hosts
from hosts import TROUBLE, Failed
from stage import CLIENT_FILES, Stage


def explain(stage):
    """What the hosts have to say about a failure."""
    for host in (stage.newcomer, *stage.members):
        try:
            journal = host.ssh(f"{TROUBLE}\njournalctl --no-pager -n 60 -u 'resqlite*'", seconds=20)
        except Failed as failure:
            journal = str(failure)
        print(f"---- {host.name}\n{journal}", file=sys.stderr)


def main():
    began = time.monotonic()
    only = sys.argv[1:]
    os.environ.update(CLIENT_FILES)
    try:
        stage = Stage()
    except Failed as failure:
        print(f"FAILED  the hosts boot\n{failure}", file=sys.stderr)
        return 1
    print(f"ok  {time.monotonic() - began:5.1f} s  four hosts have booted", flush=True)
    for scenario in one_host.SCENARIOS + three_hosts.SCENARIOS:
        if only and not any(part in scenario.__name__ for part in only):
            continue
        name, began = scenario.__name__.replace("_", " "), time.monotonic()
        try:
            scenario(stage)
        except Failed as failure:
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
