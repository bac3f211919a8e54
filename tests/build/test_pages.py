"""The pages of the site: every public name is described, every page is in the navigation. The workflows call what there is."""

import re
from pathlib import Path

import pytest
import yaml

import l3m_kernels
import l3ms

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("package", [l3ms, l3m_kernels], ids=lambda package: package.__name__)
def test_every_public_name_is_described(package):
    page = (ROOT / "docs" / "api" / f"{package.__name__}.md").read_text(encoding="utf-8")
    named = set(re.findall(r"::: [\w.]*?(\w+)$", page, re.MULTILINE))
    named |= {name.strip() for group in re.findall(r"members: \[(.*)\]", page) for name in group.split(",")}
    assert set(package.__all__) - named == set()


def test_what_is_described_exists():
    for path in sorted((ROOT / "docs" / "api").glob("*.md")):
        for name in re.findall(r"::: ([\w.]+)", path.read_text(encoding="utf-8")):
            stems = [name.replace(".", "/"), name.rpartition(".")[0].replace(".", "/")]
            places = [ROOT / folder / f"{stem}.py" for folder in (".", "python") for stem in stems]
            assert any(place.exists() for place in places), name


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]
    assert [page for page in pages if f": {page}\n" not in text] == []


def test_workflows_call_what_there_is():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert [path.stem for path in workflows] == ["audit", "docs", "tests", "wheels"]
    for path in workflows:
        text = path.read_text(encoding="utf-8")
        assert yaml.safe_load(text)["jobs"]
        for goals in re.findall(r"run: make ([a-z -]+)", text):
            for goal in goals.split():
                assert re.search(rf"^{goal}:", makefile, re.MULTILINE), goal
