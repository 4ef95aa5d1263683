"""A constant load of writes, by the command line's shell, each write measured.

Every write inserts a number of its own and returns it, so that in the end
what was acknowledged can be compared with what is there.
"""

import subprocess
import threading
import time

from hosts import Failed, check

PACE_SECONDS = 0.02


class Load:
    """Writes from the moment it is made until `stop`."""

    def __init__(self, program, endpoints, first_number):
        self.acknowledged = []
        self.longest_pause_ms = 0.0
        self._stopping = threading.Event()
        self._number = first_number
        self._failure = None
        self._shell = subprocess.Popen(
            [program, "shell", "--mode", "list", "--endpoints", ",".join(endpoints)],
            text=True, bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._thread = threading.Thread(target=self._write)
        self._thread.start()

    def _write(self):
        while not self._stopping.is_set():
            sent = time.monotonic()
            self._shell.stdin.write(f"INSERT INTO load VALUES ({self._number}) RETURNING number;\n")
            answer = self._shell.stdout.readline().strip()
            if answer != str(self._number):
                self._failure = f"the write of {self._number} was answered with {answer!r}"
                return
            self.longest_pause_ms = max(self.longest_pause_ms, (time.monotonic() - sent) * 1e3)
            self.acknowledged.append(self._number)
            self._number += 1
            # A constant load, not all that the machine can take: the hosts have work of their own.
            self._stopping.wait(PACE_SECONDS)

    def stop(self):
        """Ends the load; fails if a write did."""
        self._stopping.set()
        self._thread.join()
        try:
            _, errors = self._shell.communicate(timeout=40)
        except subprocess.TimeoutExpired:
            self._shell.kill()
            raise Failed("the shell did not end with its input")
        check(self._failure is None, f"{self._failure}; the shell said: {errors}")
        check(self._shell.returncode == 0, f"the shell ended with {self._shell.returncode}: {errors}")
