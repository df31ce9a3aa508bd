"""A small base with data, and a run that was killed half-way.
"""
import json
import random

import pytest

pytest.register_assert_rewrite("tests.testing")  # its asserts say what differs

import train  # noqa: E402
from tests.testing import OPTIONS, at_step, crash, make_base, options  # noqa: E402


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder with a random checkpoint `base`, `data.jsonl`, `val.jsonl` and a config file `c.py`."""
    home = tmp_path_factory.mktemp("runs")
    make_base(home / "base")
    rng = random.Random(0)
    for name, n in (("data", 48), ("val", 8)):
        lines = []
        for _ in range(n):
            a, b = rng.randrange(50), rng.randrange(50)
            lines.append(json.dumps(dict(prompt=f"Tom has {a} apples and buys {b} more. How many apples has Tom?" + " Well?" * rng.randrange(5),
                                         response=f" {a} + {b} = {a + b}. #### {a + b}", answer=str(a + b))))
        (home / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    options = dict(OPTIONS, model=str(home / "base"), dataset=str(home / "data.jsonl"), val_dataset=str(home / "val.jsonl"))
    (home / "c.py").write_text("".join(f"{k} = {v!r}\n" for k, v in options.items()))
    return home


@pytest.fixture(scope="module")
def half(home, tmp_path_factory):
    """An out_dir with states after 3 and 6 steps, as a kill in step 8 leaves it; and that of the whole run."""
    folder = tmp_path_factory.mktemp("half")
    train.main(options(home, out_dir=folder / "whole"))
    with pytest.MonkeyPatch.context() as m:
        at_step(m, 7, crash)
        with pytest.raises(ZeroDivisionError):
            train.main(options(home, out_dir=folder / "half"))
    return folder
