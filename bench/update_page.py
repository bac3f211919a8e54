"""Writes the tables of docs/benchmarks.md from the committed results: python bench/update_page.py"""

from pathlib import Path

from l3ms.benchmark.page import rewrite
from l3ms.benchmark.results import read

if __name__ == "__main__":
    root = Path(__file__).resolve().parents[1]
    found = [read(path) for path in sorted((root / "bench" / "results").glob("*.json"))]
    page = root / "docs" / "benchmarks.md"
    print(f"{page.name} changed" if rewrite(page, found) else f"{page.name} is up to date")
