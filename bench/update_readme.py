"""Writes the README's benchmark section from the committed results: python bench/update_readme.py"""

from pathlib import Path

from l3ms.benchmark.readme import rewrite
from l3ms.benchmark.results import read

if __name__ == "__main__":
    root = Path(__file__).resolve().parents[1]
    found = [read(path) for path in sorted((root / "bench" / "results").glob("*.json"))]
    print("README.md changed" if rewrite(root / "README.md", found) else "README.md is up to date")
