"""Where the checkout is that these tests lie in."""

import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[3]
