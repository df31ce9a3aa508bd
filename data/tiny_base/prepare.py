"""What the embedded base is pretrained on (config/tiny_base.py): generated, see data/tiny/prepare.py."""
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
from data import download  # noqa: E402
from data.tiny import prepare  # noqa: E402


def main(source=None):
    download.write_all(__file__, prepare.base_splits())


if __name__ == "__main__":
    download.run(main)
