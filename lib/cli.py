"""What the command lines of the tools share: positional arguments and --name=value, errors in one sentence.
"""
import difflib
import sys
import traceback

from config import UserError

BOOLS = {"True": True, "true": True, "False": False, "false": False}


def options(argv, usage, positional, **defaults):
    """argv -> (positional arguments, {name: value}). A value has the type of its default.
    positional: (fewest, most). UserError: an unknown name, a wrong type, a wrong number; -h prints
    the usage and exits."""
    if "-h" in argv or "--help" in argv:
        print(usage.strip())
        raise SystemExit(0)
    plain, out = [a for a in argv if not a.startswith("--")], {"debug": False, **defaults}
    for arg in (a for a in argv if a.startswith("--")):
        name, equals, value = arg[2:].partition("=")
        if name not in out or not equals:
            near = difflib.get_close_matches(name, out, 1, 0.5)
            raise UserError(f"{arg} is no option of the form --name=value"
                            + (f"; did you mean --{near[0]}?" if near else f": there are {', '.join(out)}"))
        kind = type(out[name])
        try:
            out[name] = BOOLS[value] if kind is bool else kind(value)
        except (KeyError, ValueError):
            wanted = "True or False" if kind is bool else f"of type {kind.__name__}"
            raise UserError(f"{arg}: {name} must be {wanted}") from None
    if not positional[0] <= len(plain) <= positional[1]:
        wanted = " to ".join(str(n) for n in sorted(set(positional)))
        raise UserError(f"expected {wanted} arguments besides the options, not {len(plain)}; -h shows how")
    return plain, out


def split_options(argv, usage, **own):
    """For a tool that takes train.py's options too -> (its own, as options() reads them; the arguments that
    are left for config.load)."""
    mine = [a for a in argv if a in ("-h", "--help") or a.partition("=")[0].removeprefix("--") in own]
    return options(mine, usage, (0, 0), **own)[1], [a for a in argv if a not in mine]


def tolerant_output():
    """A terminal or a file that cannot show a character (latin-1) gets its escape instead of a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def run(main):
    """The command line: main(argv). A UserError is the last line of stderr; --debug=True adds the
    traceback."""
    tolerant_output()
    try:
        main(sys.argv[1:])
    except UserError as e:
        if {"--debug=True", "--debug=true"} & set(sys.argv):
            traceback.print_exc()
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
