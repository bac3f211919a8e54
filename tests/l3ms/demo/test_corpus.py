"""The demo's data and base: what is mined, how it is split, and a cache that can be trusted."""

import ast
import json
import logging
import random
import sys
from pathlib import Path

import pytest
import torch

from l3ms.demo import base, corpus
from l3ms.demo.corpus import Pair

SMALL = base.Recipe(
    vocab_size=300,
    hidden_size=16,
    layers=1,
    heads=2,
    intermediate_size=24,
    max_positions=64,
    steps=4,
    batch_size=2,
    block=16,
    warmup_steps=2,
)
SENTENCE = "return the list of all open files in this folder or raise an error when it is closed by another process"


def function(name: str, docstring: str, arguments: str = "a, b=1") -> str:
    return f'def {name}({arguments}):\n    """{docstring}"""\n\n'


@pytest.fixture
def packages(tmp_path):
    """A site-packages of 60 good files of 6 functions each, and everything that should be left out."""
    root = tmp_path / "site-packages"
    rng = random.Random(0)
    for number in range(60):
        text = "".join(
            function(f"f{number}_{k}", " ".join(rng.choices(SENTENCE.split(), k=rng.randint(4, 15))).capitalize() + ".")
            for k in range(6)
        )
        path = root / f"package{number % 7}" / f"module{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    odd = root / "odd"
    for folder in (odd / "tests", root / "l3ms", root / "l3m_kernels"):
        folder.mkdir(parents=True)
        (folder / "left_out.py").write_text(function("left_out", "Never to be seen by the demo."))
    (odd / "broken.py").write_text("def f(:\n" + function("broken", "Cannot be parsed as it stands."))
    (odd / "null.py").write_bytes(b"\0" + function("null", "Has a null byte before it.").encode())
    (odd / "latin.py").write_bytes(
        b"# -*- coding: latin-1 -*-\n# \xe9\n" + function("latin", "An old encoding.").encode()
    )
    (odd / "nonsense.py").write_bytes(b"\xff\xfe\xff" + function("nonsense", "Not a text at all.").encode())
    (odd / "nested.py").write_text(
        function("nested", "So deep that the parser gives up.") + "x = " + "(" * 3000 + ")" * 3000
    )
    (odd / "huge.py").write_text(function("huge", "A table of numbers.") + "#" * corpus.MAX_FILE_BYTES)
    (odd / "empty.py").write_text("")
    (odd / "acts.py").write_text(
        f"open({str(tmp_path / 'imported')!r}, 'w')\n" + function("acts", "Acts when imported.")
    )
    (odd / "note.txt").write_text(function("note", "Not a Python file at all."))
    return root


@pytest.fixture
def only_these(packages, monkeypatch):
    monkeypatch.setattr(corpus, "roots", lambda: [packages])


def test_mines_the_same_pairs_in_this_process_and_in_children(packages, tmp_path):
    files = corpus.sources([packages])
    seen: list[tuple[int, int]] = []
    pairs = corpus.mine(lambda done, total: seen.append((done, total)), files=files, workers=2)
    assert pairs == corpus.mine(files=files, workers=0) == sorted(pairs)
    names = {pair.prompt[4:].partition("(")[0] for pair in pairs}
    assert len(pairs) > 300
    assert {"latin", "acts", "f0_0", "f59_5"} <= names
    assert not names & {"left_out", "broken", "null", "nonsense", "nested", "huge", "note"}
    assert not (tmp_path / "imported").exists()
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (sum(file.bytes for file in files),) * 2


def test_every_prompt_and_every_response_occurs_once(tmp_path):
    (tmp_path / "a.py").write_text(function("one", "Return the first.") + function("two", "Return the second."))
    (tmp_path / "b.py").write_text(function("one", "Return another one.") + function("three", "return the SECOND"))
    assert corpus.mine(files=corpus.sources([tmp_path]), workers=0) == [
        Pair("def one(a, b=1):\n", "Return the first."),
        Pair("def two(a, b=1):\n", "Return the second."),
    ]


def test_max_files_takes_the_same_spread_of_files(packages):
    everything = [file.name for file in corpus.sources([packages])]
    some = [file.name for file in corpus.sources([packages], max_files=7)]
    assert everything == sorted(everything)
    assert len(some) == 7
    assert some == [everything[i * len(everything) // 7] for i in range(7)]
    assert corpus.sources([packages], max_files=10**6) == corpus.sources([packages])


@pytest.mark.parametrize(
    "name", ["VERSION", "MAX_PROMPT_CHARS", "MIN_RESPONSE_CHARS", "MAX_RESPONSE_CHARS", "HELD_OUT_PERCENT"]
)
def test_the_fingerprint_follows_the_recipe(packages, monkeypatch, name):
    files = corpus.sources([packages])
    before = corpus.fingerprint(files)
    monkeypatch.setattr(corpus, name, getattr(corpus, name) + 1)
    assert corpus.fingerprint(files) != before


def test_the_fingerprint_follows_names_and_sizes_not_places(packages):
    files = corpus.sources([packages])
    moved = [file._replace(path="/elsewhere") for file in files]
    assert corpus.fingerprint(moved) == corpus.fingerprint(files)
    assert corpus.fingerprint(files[1:]) != corpus.fingerprint(files)
    assert corpus.fingerprint([files[0]._replace(bytes=1), *files[1:]]) != corpus.fingerprint(files)


def test_a_child_that_dies_is_an_error_that_names_the_file(packages, monkeypatch):
    files = corpus.sources([packages], max_files=3)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    largest = max(files, key=lambda file: file.bytes)
    with pytest.raises(RuntimeError, match=Path(largest.path).name):
        corpus.mine(files=files, workers=2)


def test_an_error_in_progress_ends_the_children(packages):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        corpus.mine(stop, files=corpus.sources([packages]), workers=2)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def f(): ...", "def f():\n"),
        (
            "def f(self, a: int, b: str = 'x', *rest, c, d=None, **more) -> int: ...",
            "def f(a, b='x', *rest, c, d=None, **more):\n",
        ),
        ("async def f(cls, /, a, *, b=-1): ...", "def f(a, *, b=-1):\n"),
        ("def f(a=[1, 2], b=x.y, c='a very long default value'): ...", "def f(a=..., b=x.y, c=...):\n"),
        ("def f(a='\\u00e9', b='\\n'): ...", "def f(a=..., b='\\n'):\n"),
    ],
)
def test_signature(code, expected):
    node = ast.parse(code).body[0]
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    assert corpus.signature(node) == expected


def test_a_long_signature_is_cut_at_a_parameter():
    node = ast.parse(f"def f({', '.join(f'parameter_{i}' for i in range(40))}): ...").body[0]
    assert isinstance(node, ast.FunctionDef)
    shown = corpus.signature(node)
    assert shown.startswith("def f(parameter_0, parameter_1, ")
    assert shown.endswith(", ...):\n")
    assert len(shown) <= corpus.MAX_PROMPT_CHARS + 3


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Return a thing.", "Return a thing."),
        ("Return a thing\nthat is two lines long.", "Return a thing that is two lines long."),
        ("Return a thing.\n\nIt is new.\n\nArgs:\n    x: a number", "Return a thing. It is new."),
        ("Return a thing.\n\nParameters\n----------\nx : int", "Return a thing."),
        ("Return a thing.\nArgs:\n    x: a number", "Return a thing."),
        ("Return a thing.\n\n- one\n- two", "Return a thing."),
        ("Return a thing.\n\n>>> f(1)\n2", "Return a thing."),
        ("Return a thing.\n:param x: a number", "Return a thing."),
        ("Return a thing\n\nIt is new.", "Return a thing"),
        ("Use :class:`~a.B`, ``c`` and `d <http://e>`_.", "Use a.B, c and d."),
        ("Use [`Name`] or [text](url), *never* **this**.", "Use Name or text, never this."),
        ("Call it like this::\n\n    f(1)", "Call it like this."),
        ("Return caf\u00e9 in a cup.", ""),
        ("Helper.", ""),
        ("12345 67890 12345", ""),
        (">>> f(1)\n2", ""),
        (":param x: a number", ""),
        ("A first sentence. " + "And a second one " * 20 + ".", "A first sentence."),
        ("No end in sight " * 30, ""),
        ("A first one. " + "x" * 150 + ".\n\n" + "y" * 150 + ".", "A first one. " + "x" * 150 + "."),
        ("A first one. " + "x" * 150 + ".\n\n" + "y" * 100 + ".", "A first one. " + "x" * 150 + ". " + "y" * 100 + "."),
    ],
)
def test_clean(docstring, expected):
    assert corpus.clean(docstring) == expected


def test_split_is_disjoint_complete_and_stable():
    pairs = [Pair(f"def f{i}(a):\n", f"Return the number {i}.") for i in range(5000)]
    train, held_out = corpus.split(pairs)
    assert sorted(train + held_out) == sorted(pairs)
    assert not set(train) & set(held_out)
    assert len(held_out) == pytest.approx(len(pairs) * corpus.HELD_OUT_PERCENT / 100, rel=0.2)
    fewer = corpus.split(pairs[::2])
    assert set(fewer[0]) <= set(train)
    assert set(fewer[1]) <= set(held_out)


def test_what_is_installed_here_is_minable():
    pairs = corpus.mine(files=corpus.sources(max_files=120), workers=0)
    assert len(pairs) > 100
    assert len({pair.prompt for pair in pairs}) == len({pair.response for pair in pairs}) == len(pairs)
    for prompt, response in pairs:
        assert prompt.startswith("def ")
        assert prompt.endswith("):\n")
        assert prompt.count("\n") == 1
        assert corpus.MIN_RESPONSE_CHARS <= len(response) <= corpus.MAX_RESPONSE_CHARS
        assert response.isascii()
        assert response.isprintable()


@pytest.mark.slow
def test_everything_installed_here_gives_enough():
    pairs = corpus.mine()
    train, held_out = corpus.split(pairs)
    assert len(pairs) >= 20_000
    assert len(held_out) >= 1_500
    assert len(train) > 10 * len(held_out)


def weights(ready: base.Base) -> dict[str, torch.Tensor]:
    return ready.model.state_dict()


def same(one: base.Base, other: base.Base) -> bool:
    return (
        all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(one).items())
        and one.tokenizer.get_vocab() == other.tokenizer.get_vocab()
        and one.train_pairs == other.train_pairs
        and one.held_out_pairs == other.held_out_pairs
    )


@pytest.mark.usefixtures("only_these")
def test_the_base_is_built_once_and_read_back_exactly(tmp_path):
    stages: list[tuple[str, int, int, str]] = []
    before = torch.random.get_rng_state()
    built = base.prepare(lambda *news: stages.append(news), tmp_path / "cache", SMALL)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not built.from_cache
    assert list(dict.fromkeys(stage for stage, *_ in stages)) == [
        "mining docstrings",
        "training the tokenizer",
        "pre-training",
    ]
    assert stages[-1][1:3] == (SMALL.steps, SMALL.steps)
    assert stages[-1][3].startswith("loss ")

    stages.clear()
    read = base.prepare(lambda *news: stages.append(news), tmp_path / "cache", SMALL)
    assert read.from_cache
    assert not stages
    assert same(built, read)
    assert same(built, base.prepare(None, tmp_path / "another", SMALL))
    assert read.model.dtype == torch.float32
    assert not read.model.training
    assert read.model.generation_config.eos_token_id == read.tokenizer.eos_token_id
    assert {path.suffix for path in (tmp_path / "cache").rglob("*") if path.is_file()} == {".safetensors", ".json"}
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.usefixtures("only_these")
def test_the_base_leaves_the_task_to_the_fine_tune(tmp_path):
    ready = base.prepare(None, tmp_path, SMALL)
    tokenizer = ready.tokenizer
    assert tokenizer.padding_side == "left"
    special = set(tokenizer.all_special_ids)
    assert len(special) == 2
    assert len(tokenizer) == SMALL.vocab_size
    assert ready.train_pairs
    assert ready.held_out_pairs
    assert not set(ready.train_pairs) & set(ready.held_out_pairs)
    for pair in (
        ready.held_out_pairs + ready.train_pairs[:20] + [Pair("def \u00e9():\n", "\u4e2d \U0001f600 never seen.")]
    ):
        ids = tokenizer(base.text(pair))["input_ids"]
        assert tokenizer.decode(ids) == base.text(pair)
        assert not special & set(ids)
        apart = tokenizer(pair.prompt)["input_ids"] + tokenizer(pair.response)["input_ids"]
        assert tokenizer(pair.prompt + pair.response)["input_ids"] == apart


def flip_a_byte(entry: Path) -> None:
    file = entry / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def empty(entry: Path) -> None:
    for path in entry.iterdir():
        path.unlink()


def become_a_file(entry: Path) -> None:
    empty(entry)
    entry.rmdir()
    entry.write_text("{}")


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_byte,
        empty,
        become_a_file,
        lambda entry: (entry / "pairs.json").unlink(),
        lambda entry: (entry / "manifest.json").unlink(),
        lambda entry: (entry / "manifest.json").write_text('{"sha256": {"pairs.js'),
        lambda entry: (entry / "manifest.json").write_text('{"sha256": {}}'),
        lambda entry: (entry / "manifest.json").write_text("[]"),
    ],
)
@pytest.mark.usefixtures("only_these")
def test_a_damaged_entry_is_rebuilt(tmp_path, damage, caplog):
    built = base.prepare(None, tmp_path, SMALL)
    (entry,) = tmp_path.glob("demo-base-*")
    damage(entry)
    with caplog.at_level(logging.WARNING):
        again = base.prepare(None, tmp_path, SMALL)
    assert "damaged" in caplog.text
    assert not again.from_cache
    assert same(built, again)
    assert base.prepare(None, tmp_path, SMALL).from_cache
    assert list(tmp_path.glob("*demo-base-*")) == [entry]


@pytest.mark.usefixtures("only_these")
def test_of_two_writers_the_first_wins(tmp_path, monkeypatch):
    first = base.prepare(None, tmp_path, SMALL)
    (entry,) = tmp_path.glob("demo-base-*")
    before = {path.name: path.stat().st_mtime_ns for path in entry.iterdir()}
    base._store(first, SMALL, entry)
    assert {path.name: path.stat().st_mtime_ns for path in entry.iterdir()} == before
    assert list(tmp_path.glob("*demo-base-*")) == [entry]


@pytest.mark.usefixtures("only_these")
def test_another_recipe_or_library_is_another_entry(tmp_path, monkeypatch):
    files = corpus.sources()
    keys = {base._key(SMALL, files), base._key(base.Recipe(), files), base._key(SMALL, files[1:])}
    monkeypatch.setattr(torch, "__version__", "0.0")
    keys.add(base._key(SMALL, files))
    assert len(keys) == 4


@pytest.mark.usefixtures("only_these")
def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        ready = base.prepare(None, tmp_path / "file", SMALL)
    assert ready.held_out_pairs
    assert "could not be cached" in caplog.text


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("L3M_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert base.cache_folder() == Path("/one")
    monkeypatch.delenv("L3M_CACHE")
    assert base.cache_folder() == Path("/two/l3m-kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert base.cache_folder() == Path.home() / ".cache" / "l3m-kernels"


def test_nothing_to_learn_from_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "roots", lambda: [tmp_path])
    with pytest.raises(ValueError, match="docstrings to learn from: 0 Python files gave 0 pairs"):
        base.prepare(None, tmp_path / "cache", SMALL)


@pytest.mark.parametrize(("field", "value"), [("vocab_size", 200), ("hidden_size", 18), ("steps", 0), ("block", 0)])
def test_a_recipe_that_makes_no_model_is_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}: wanted .*, got {value}"):
        base.Recipe(**{field: value})


def test_the_demo_s_model_has_the_size_it_says():
    config = json.loads(base.new_config(base.Recipe()).to_json_string())
    assert config["tie_word_embeddings"]
    with torch.device("meta"):
        model = base.LlamaForCausalLM(base.new_config(base.Recipe()))
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_066_112
