"""Runs a generated program in a process of its own, with limits (HumanEval, only with --execute=True).

    check(program, seconds=5) -> "passed", or why not: "AssertionError: ...", "out of time", "out of memory"

The child has an empty environment and an empty directory, which is removed afterwards. The kernel limits its
time, CPU time, memory, file sizes and open files; where it lets us, the child has a network namespace of its
own, with nothing in it. Before the program runs, an audit hook, which Python code cannot take off again,
forbids sockets, new processes and native libraries, and to write, rename or remove anything outside that
directory. When its time ends, its process group is killed.

That stops a language model's mistakes and mischief. It is no virtual machine: the program can read what you
can read (and has no way to send it anywhere), and who attacks Python's own memory gets out. Evaluate a model
you distrust in a container.
"""
import os
import signal
import subprocess
import sys
import tempfile

CHILD = r'''
import os, resource, signal, sys

def hook_for(home):
    one = "mkdir", "remove", "rmdir", "truncate", "chmod", "chown", "utime", "mkfifo", "mknod"
    two = "rename", "link", "symlink"
    paths = {f"os.{name}": n for n, names in ((1, one), (2, two)) for name in names} | {"shutil.rmtree": 1}
    forbidden = ("socket.", "subprocess.", "ctypes.", "os.system", "os.exec", "os.fork", "os.spawn",
                 "os.posix_spawn", "os.kill", "pty.")
    changes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    realpath, isdir, sep, fsdecode = os.path.realpath, os.path.isdir, os.sep, os.fsdecode

    def inside(path):
        if isinstance(path, int):  # a file that was opened before
            return True
        return isinstance(path, (str, bytes)) and (realpath(fsdecode(path)) + sep).startswith(home + sep)

    def hook(event, args):
        if event == "open":
            bad = (args[2] & changes or isdir(args[0])) and not inside(args[0])
        elif event in paths:
            bad = not all(inside(p) for p in args[:paths[event]])
        else:
            bad = event.startswith(forbidden)
        if bad:
            raise PermissionError(f"{event} is not allowed here")
    return hook

def main(home, seconds, megabytes):
    program, report, leave = sys.stdin.read(), os.dup(1), os._exit
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    try:
        import ctypes
        ctypes.CDLL(None).unshare(0x10000000 | 0x40000000)  # CLONE_NEWUSER | CLONE_NEWNET; else silent
    except (ImportError, OSError, AttributeError):  # not Linux
        pass
    limits = dict(CPU=seconds + 1, AS=megabytes << 20, FSIZE=1 << 20, NOFILE=64, CORE=0)
    for name, most in limits.items():
        try:
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
        except (ValueError, OSError):  # macOS limits no address space
            pass
    sys.addaudithook(hook_for(home))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})
        said = "passed"
    except MemoryError:
        said = "out of memory"
    except BaseException as e:
        said = f"{type(e).__name__}: {e}".split("\n")[0][:200]
    os.write(report, said.encode(errors="replace"))
    leave(0)

main(os.path.realpath(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
'''


def check(program, seconds=5, megabytes=1024):
    """Runs a program (its source). "passed" if it ends without an exception, else why not, in one line."""
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryFile() as report:
        command = [sys.executable, "-I", "-B", "-c", CHILD, home, str(seconds), str(megabytes)]
        child = subprocess.Popen(command, cwd=home, env={"TMPDIR": home}, stdin=subprocess.PIPE, stdout=report,
                                 stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            child.communicate(program.encode(errors="replace"), timeout=seconds + 20)  # Python starts
        except subprocess.TimeoutExpired:
            pass
        finally:
            try:
                os.killpg(child.pid, signal.SIGKILL)  # and what it may have left behind
            except ProcessLookupError:
                pass
            child.wait()
        report.seek(0)
        said = report.read(1000).decode(errors="replace")
    if not said and child.returncode in (-signal.SIGALRM, -signal.SIGXCPU, -signal.SIGKILL):
        return "out of time"
    return said or f"ended early (exit status {child.returncode})"
