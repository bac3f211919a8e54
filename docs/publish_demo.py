"""Brings a finished demo of the real model into docs/ and the README: python docs/publish_demo.py out/demo-real"""

import sys
from pathlib import Path

from l3ms.demo.readme import publish

if __name__ == "__main__":
    publish(Path(sys.argv[1]), Path(__file__).resolve().parents[1])
