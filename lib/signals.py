"""Signals that ask a run to stop: it ends between two steps, or in the middle of an evaluation, and saves first.
"""
import os
import signal

from lib import dist

WANTED = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP


class Interrupted(Exception):
    """A signal came."""


class Signals:
    """Inside `with Signals() as stop`, SIGINT, SIGTERM, SIGUSR1 and SIGHUP are only noted, and stop.check() says so. A
    second Ctrl-C quits at once (not under torchrun, which passes on a Ctrl-C that the terminal has sent already). A
    SIGHUP that is ignored, as nohup has it, stays ignored."""

    def __init__(self):
        self.received = []
        self.before = []

    def __enter__(self):
        for signum in WANTED:
            if signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN:
                continue
            self.before.append((signum, signal.signal(signum, self.handle)))
        return self

    def __exit__(self, *_):
        for signum, old in self.before:
            signal.signal(signum, old)

    def handle(self, signum, frame):
        if signum == signal.SIGINT and signum in self.received and dist.world() == 1:
            os._exit(130)
        if not self.received:
            again = b" (Ctrl-C again: at once)" if signum == signal.SIGINT else b""
            try:
                os.write(2, b"stopping after this step" + again + b"\n")
            except OSError:
                pass  # a terminal that has hung up
        self.received.append(signum)

    def check(self):
        """Interrupted, on all ranks, when a signal came to any of them."""
        if dist.add(len(self.received))[0]:
            raise Interrupted

    def name(self):
        if self.received:
            return signal.Signals(self.received[0]).name
        return "a signal to another rank"
