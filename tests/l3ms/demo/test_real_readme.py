"""The README says of the real model's demo what its report says, and what a model wrote cannot break its table."""

import json
from pathlib import Path
from typing import Any

import pytest

from l3ms.config.yaml_reader import ConfigError
from l3ms.demo.readme import BEGIN, END, publish, section

ROOT = Path(__file__).resolve().parents[3]


def summary(length: float, share: float, perplexity: float) -> dict[str, Any]:
    return {"length": {"mean": length}, "perplexity": perplexity, "constraints": {"sentence": {"mean": share}}}


REPORT = {
    "seconds": 1205.0, "threads": 2, "format": "sentence", "bounds": {"min": 12, "max": 16},
    "sft": summary(21.26, 0.5, 20.0), "average": summary(14.04, 0.925, 21.0),
    "examples": [{"prompt": "def f(a):", "sft": "One. Two.", "average": "A | `b` *c*\n<script>d_e."}],
}  # fmt: skip


def test_numbers_and_responses_are_the_report_s():
    text = section(REPORT)
    for wanted in (
        "12 to 16 tokens long on average, and nine of ten one sentence",
        "(SFT) writes 21.3 tokens and 50% single sentences; the constrained one 14.0 tokens and 92% single sentences",
        "at 1.05 times its perplexity. 20 minutes on 2 threads of a CPU",
        r"| `def f(a):` | One. Two. | A \| \`b\` \*c\* \<script\>d\_e. |",
    ):
        assert wanted in text


def test_publish_writes_report_picture_and_readme(tmp_path):
    for name in ("docs", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "README.md").write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    with pytest.raises(FileNotFoundError):
        publish(tmp_path / "run", tmp_path)
    (tmp_path / "run" / "report.json").write_text("[]")
    with pytest.raises(ConfigError, match="must be an object"):
        publish(tmp_path / "run", tmp_path)
    (tmp_path / "run" / "report.json").write_text(json.dumps(REPORT))
    (tmp_path / "run" / "report.png").write_bytes(b"png")
    publish(tmp_path / "run", tmp_path)
    assert (tmp_path / "README.md").read_text() == f"before\n{BEGIN}\n{section(REPORT)}\n{END}\nafter\n"
    assert (tmp_path / "docs" / "demo-real.png").read_bytes() == b"png"
    publish(tmp_path / "run", tmp_path)
    assert (tmp_path / "README.md").read_text().count(BEGIN) == 1


def test_the_readme_is_what_the_committed_report_says():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    committed = ROOT / "docs" / "demo-real.json"
    between = readme[readme.index(BEGIN) + len(BEGIN) : readme.index(END)].strip()
    assert between == (section(json.loads(committed.read_text(encoding="utf-8"))) if committed.exists() else "")
