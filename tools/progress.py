"""How far a tool is: a bar with the time left; without a terminal a line a minute."""
import sys
import time

from lib.log import clock


class Progress:
    """total: how many things there are to do, done: how many were done before. show: False prints nothing."""

    def __init__(self, name, total, done=0, show=True):
        self.name, self.total, self.done, self.before, self.show = name, total, done, done, show
        self.start = self.last = time.time()
        self.terminal = sys.stderr.isatty()

    def seconds(self):
        return max(time.time() - self.start, 1e-9)

    def step(self, n=1, note=""):
        """n more are done. note: what else stands in the line."""
        self.done += n
        if not self.show or (not self.terminal and time.time() - self.last < 60):
            return
        self.last = time.time()
        left = clock(self.seconds() * (self.total - self.done) / max(1, self.done - self.before))
        bar = "#" * (20 * self.done // self.total)
        text = f"{self.name} [{bar:20}] {self.done}/{self.total}{note}, {left} left"
        if self.terminal:
            print("\r" + text, end=" ", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def end(self):
        if self.show and self.terminal and self.total:
            print(file=sys.stderr)
