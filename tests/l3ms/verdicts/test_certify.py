"""`l3ms certify` on run folders of tiny models: verdicts and exit codes, what is sampled, what is refused."""

import json
import math
import re
from typing import Any

import pytest
import torch
import yaml
from run_folders import strict_json, write_project, write_run

from l3ms.commands.command_line import main
from l3ms.config.yaml_reader import ConfigError
from l3ms.runs.folder import prepare_output
from l3ms.verdicts.certifying import draw, repeats, stream
from l3ms.verdicts.options import CertifyOptions


@pytest.fixture
def make_run(tmp_path, tokenizer, make_model):
    """make_run(constraints=[...], ...) -> the run folder; responses are about 10 tokens long."""
    return lambda **changes: write_run(tmp_path, tokenizer, make_model(seed=1), make_model(seed=2), **changes)


def certify(run, *arguments):
    return main(["certify", str(run), *map(str, arguments)])


def certificate(run):
    return strict_json(run / "certificate.json")


def test_the_three_verdicts_and_their_exit_codes(make_run, capsys):
    run = make_run()
    capsys.readouterr()
    assert certify(run) == 0, capsys.readouterr().err
    found = certificate(run)
    assert found["verdict"] == "SATISFIED"
    assert (found["samples"], found["prompts"], found["one_sided_bounds"], found["level_of_each"]) == (
        150,
        150,
        2,
        0.975,
    )
    length = found["constraints"][0]
    assert (length["min"], length["max"], length["method"], length["range"]) == (1.5, 15.5, "t", [1, 16])
    assert 1.5 < length["lower"] < length["mean"] < length["upper"] < 15.5
    assert length["mean"] == pytest.approx(found["length"]["mean"])
    said = capsys.readouterr()
    assert "SATISFIED" in said.out
    assert "no verdict is wrong" in said.out
    assert said.err == ""

    mean = length["mean"]
    values = yaml.safe_load((run / "config.yaml").read_text())
    for limit, word, code in ((mean - 3, "VIOLATED", 3), (mean + 0.05, "INCONCLUSIVE", 4)):
        values["constraints"][0]["max"] = limit
        (run / "config.yaml").write_text(yaml.safe_dump(values))
        assert certify(run) == code
        assert certificate(run)["verdict"] == word
    assert "need about" in capsys.readouterr().out
    assert certify(run, "--method", "bernstein") == 4
    assert certificate(run)["constraints"][0]["method"] == "bernstein"


def test_a_certificate_can_be_repeated_and_another_seed_is_another_sample(make_run):
    run = make_run()

    def once(*arguments):
        certify(run, *arguments)
        found = certificate(run)
        del found["seconds"]
        return found

    first = once()
    state = torch.get_rng_state()
    assert once() == first
    assert torch.equal(torch.get_rng_state(), state)
    assert once("--seed", 1)["constraints"] != first["constraints"]
    last = once("--weights", "last")
    assert last["sha256"] != first["sha256"]
    assert last["weights"] == "last"


def test_the_samples_are_not_those_of_training_or_evaluation():
    assert (
        len({stream(0, 0, "responses"), stream(0, 1, "responses"), stream(1, 0, "responses"), stream(0, 0, "prompts")})
        == 4
    )
    assert all(stream(seed, 0, "responses") > 2**32 for seed in range(50))


def test_rows_are_drawn_once_before_any_is_drawn_again():
    rows = [{"prompt": f"p{i // 2}"} for i in range(20)]  # each prompt twice
    drawn, keys = draw(rows, None, 7)
    assert sorted(map(id, drawn)) == sorted(map(id, rows))
    assert repeats(keys) == [
        "20 samples of 10 different prompts: responses to one prompt are not independent, so the bounds count 10 groups"
    ]
    drawn, _ = draw(rows, 50, 7)
    counts = [sum(row is other for other in drawn) for row in rows]
    assert set(counts) == {2, 3}
    assert repeats(["a", "b"]) == []


def test_more_samples_than_prompts(make_run, capsys):
    """Of the quarter of the rows that the run has not been trained on."""
    run = make_run(rows=20, data={"train": "rows.jsonl", "evaluation_share": 0.25, "chat_template": False})
    certify(run, "--samples", 100)
    found = certificate(run)
    assert (found["samples"], found["prompts"], found["constraints"][0]["groups"]) == (100, 5, 5)
    assert "100 samples of 5 different prompts" in capsys.readouterr().out


def test_one_prompt_is_judged_by_independent_responses(make_run, tmp_path, capsys):
    run = make_run(rows=20)
    (tmp_path / "one.jsonl").write_text('{"prompt": "a b c"}\n')
    assert certify(run, "--prompts", tmp_path / "one.jsonl", "--samples", 60) == 0
    found = certificate(run)
    assert (found["prompts"], found["constraints"][0]["groups"]) == (1, 60)
    words = " ".join(capsys.readouterr().out.split())
    assert "60 responses to one prompt: the verdict is of this prompt alone" in words
    assert "more" not in words


def test_repeated_rows_of_other_data_are_counted_once(make_run, tmp_path, capsys):
    """And its rows do not become more by --samples."""
    rows = (tmp_path / "other.jsonl", tmp_path / "held.jsonl")
    lines = [json.dumps({"prompt": f"a b {word}", "completion": "c d e"}) for word in "abcdef"]
    data = {"train": "other.jsonl", "evaluation": "held.jsonl", "chat_template": False}
    for path in rows:
        path.write_text("\n".join(lines))
    other = {"type": "data_nll", "name": "other", "data": data, "max": 9.0}
    run = make_run(rows=20, constraints=[other])
    bounds = []
    for times in (1, 20):
        rows[1].write_text("\n".join(lines * times))
        certify(run, "--samples", 8)
        (found,) = certificate(run)["constraints"]
        assert (found["groups"], found["samples"]) == (6, 6 * times)
        bounds.append((found["lower"], found["upper"]))
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-5)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["constraints"][0]["max"] = found["mean"] + 1e-3
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    capsys.readouterr()
    assert certify(run, "--samples", 8) == 4
    assert "more held-out rows in its own data, which --samples does not change" in " ".join(
        capsys.readouterr().out.split()
    )


def test_prompts_from_a_file(make_run, tmp_path, capsys):
    run = make_run()
    trained = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])["prompt"]
    path = tmp_path / "more.jsonl"
    path.write_text("".join(f"{json.dumps({'prompt': prompt})}\n" for prompt in [*"abcdef", trained]))
    certify(run, "--prompts", path, "--json", tmp_path / "here.json")
    assert not (run / "certificate.json").exists()
    found = strict_json(tmp_path / "here.json")
    assert (found["prompts"], found["perplexity"]) == (7, None)
    config = yaml.safe_load((run / "config.yaml").read_text())
    (tmp_path / "rows.jsonl").unlink()
    assert certify(run, "--prompts", path) in (0, 4)
    assert "whether these prompts were trained on is not known" in capsys.readouterr().out
    assert config["data"]["train"].endswith("rows.jsonl")


def test_prompts_that_were_trained_on_are_said_to_be(make_run, tmp_path, capsys):
    run = make_run()
    certify(run, "--prompts", tmp_path / "rows.jsonl")
    assert "150 of 300 prompts are in the training data: not held out" in capsys.readouterr().out


def reward(tmp_path, name, **bounds):
    return {"type": "function", "name": name, "function": f"{tmp_path}/rewards.py:{name}", **bounds}


def test_rewards_that_are_missing_not_finite_or_all_the_same(make_run, tmp_path, capsys):
    names = {"gaps": {"min": 1.2}, "holes": {"min": 0.1}, "same": {"min": 0.1}, "even": {"min": 0.1, "max": 0.9}}
    run = make_run(constraints=[reward(tmp_path, name, **bounds) for name, bounds in names.items()])
    assert certify(run) == 2
    assert "constraints.0.function: would import" in capsys.readouterr().err
    assert certify(run, "--allow-code", "--range", "even=0,1") == 4
    found = {item["name"]: item for item in certificate(run)["constraints"]}
    assert (found["gaps"]["verdict"], found["gaps"]["method"], found["gaps"]["missing"]) == ("SATISFIED", "t", 38)
    assert found["holes"]["verdict"] == "INCONCLUSIVE"
    assert found["holes"]["nonfinite"] > 0
    assert found["holes"]["lower"] > 0.1  # the others alone would do
    assert found["same"]["verdict"] == "INCONCLUSIVE"
    assert found["same"]["lower"] is None
    assert (found["even"]["verdict"], found["even"]["method"]) == ("SATISFIED", "t")
    assert all(math.isclose(item["delta"], 0.01) for item in found.values())  # five one-sided bounds
    assert certify(run, "--allow-code", "--range", "same=0,1", "--range", "even=0,1") == 4
    assert {item["name"]: item for item in certificate(run)["constraints"]}["same"]["verdict"] == "SATISFIED"
    said = capsys.readouterr().out
    assert "holes:" in said
    assert "NaN or infinite" in said
    assert "the mean is at the bound" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "best"], "--weights: must be average or last, got 'best'"),
        (["--delta", "0"], "--delta: must be at least 1e-12"),
        (["--delta", "1e-17"], "--delta: must be at least 1e-12"),
        (["--json", "."], "--json: is a folder"),
        (["--prices"], "--prices: need at least 32 held-out rows"),
        (["--samples", "1"], "--samples: must be at least 2"),
        (["--method", "bootstrap"], "--method: must be auto, bernstein or t"),
        (["--range", "length=3"], "--range: wanted NAME=LOW,HIGH"),
        (["--range", "length=3,nan"], "--range: wanted NAME=LOW,HIGH"),
        (["--range", "length=3,3"], "--range: wanted NAME=LOW,HIGH with LOW below HIGH"),
        (["--range", "length=1,16", "--range", "length=1,99"], "--range: 'length' has two of them, wanted one"),
        (["--probes", "64"], "--probes: are for the prices: add --prices"),
        (["--range", "polite=0,1"], "--range: no constraint is called 'polite'; there are length"),
        (["--prompts", "nowhere.jsonl"], "--prompts: no such file"),
        (["--json", "no/where.json"], "--json: no such folder"),
        (["--prices", "--prompts", "PROMPTS"], "--prices: are those of the run's own task"),
        (["--prompts", "EMPTY"], "--prompts: "),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(make_run, tmp_path, capsys, arguments, message):
    run = make_run(rows=20)
    capsys.readouterr()
    (tmp_path / "empty.jsonl").write_text("\n")
    paths = {"PROMPTS": str(tmp_path / "rows.jsonl"), "EMPTY": str(tmp_path / "empty.jsonl")}
    assert certify(run, *(paths.get(word, word) for word in arguments)) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (run / "certificate.json").exists()


def test_options_of_a_program_are_as_those_of_the_command(tmp_path):
    (tmp_path / "p.jsonl").write_text("{}")
    paths: Any = {"prompts": str(tmp_path / "p.jsonl"), "json": str(tmp_path / "c.json")}
    options = CertifyOptions(**paths)
    assert (options.prompts, options.json) == (tmp_path / "p.jsonl", tmp_path / "c.json")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"samples": 8.0}, "--samples: must be a whole number, got 8.0"),
        ({"seed": None}, "--seed: must be a whole number, got None"),
        ({"probes": 8, "prices": True}, "--probes: must be at least 32, got 8"),
        ({"ranges": {"polite": (1.0, 0.0)}}, "--range: wanted NAME=LOW,HIGH with LOW below HIGH, got polite=1,0"),
    ]
    for wrong, message in cases:
        with pytest.raises(ConfigError, match=re.escape(message)):
            CertifyOptions(**wrong)


def test_a_range_of_a_share_is_refused(make_run, capsys):
    run = make_run(rows=20, constraints=[{"type": "length", "quantile": 0.05, "min": 2}])
    assert certify(run, "--range", "length=1,16") == 2
    assert "--range: the values of 'length' are 0 and 1, which is known; leave it out" in capsys.readouterr().err
    assert not (run / "certificate.json").exists()


def test_folders_that_are_no_finished_run(make_run, tmp_path, capsys):
    assert certify(tmp_path / "nowhere") == 2
    assert "is not a run folder" in capsys.readouterr().err
    run = make_run(rows=20)
    (run / "average").rename(run / "gone")
    assert certify(run) == 2
    assert "has no average/" in capsys.readouterr().err
    values = yaml.safe_load((run / "config.yaml").read_text())
    values |= {"constraints": [], "train": values["train"] | {"solver": "none"}}
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    assert certify(run, "--weights", "last") == 2
    assert "nothing to certify" in capsys.readouterr().err


def test_prices_of_a_run(make_run, capsys):
    run = make_run(constraints=[{"type": "length", "max": 8.0}, {"type": "length", "name": "far", "max": 15.5}])
    certify(run, "--prices", "--probes", 32)
    prices = certificate(run)["prices"]
    bound, far = prices["bounds"]
    assert (bound["name"], bound["side"], bound["limit"], bound["step"], bound["unit"]) == (
        "length",
        "max",
        8,
        1,
        "tokens",
    )
    assert bound["inactive"] == ""
    assert bound["rate"] is None or bound["rate"] >= 0
    assert "away from it" in far["inactive"]
    assert bound["sentence"] in " ".join(capsys.readouterr().out.split())


def test_a_trained_run_is_certified_and_replaced_with_its_certificate(tmp_path, tokenizer, make_model, capsys):
    config = write_project(tmp_path, tokenizer, make_model(seed=1), rows=60)
    assert main(["train", str(config)]) == 0, capsys.readouterr().err
    assert certify(tmp_path / "out") in (0, 4)
    assert (tmp_path / "out" / "certificate.json").exists()
    prepare_output(tmp_path / "out")
    assert not (tmp_path / "out" / "certificate.json").exists()


SHORT_OR_CUT = [{"type": "length", "min": 4, "max": 15}]


def test_single_answers_under_a_mean_are_told_of(make_run, capsys):
    run = make_run(constraints=[*SHORT_OR_CUT, {"type": "length", "name": "watched", "monitor": True}])
    certify(run, "--samples", 100)
    found, said = certificate(run), capsys.readouterr().out
    single = found["constraints"][0]["single_answers"]
    assert single["below"] == pytest.approx(0.8)
    assert (single["short"], single["cut"]) == (0, pytest.approx(1 - found["ended"]))
    assert single["cut"] > 0.05
    line = f"length: of single answers 0% are below 0.8 tokens, a fifth of the bound, and {100 * single['cut']:.3g}% are cut at 16"
    assert f"{line}; the mean alone says nothing of them, bound them too: {{type: reward, name: ended, " in said
    assert "single_answers" not in found["constraints"][1]

    values = yaml.safe_load((run / "config.yaml").read_text())
    values["constraints"].append({"type": "length", "name": "tail", "quantile": 0.95, "max": 14})
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    certify(run, "--samples", 100)
    said = capsys.readouterr().out
    assert f"{line}\n" in said  # told, and no more is advised


def test_a_quantile_is_certified_as_the_share_that_it_is(make_run, capsys):
    length = {"type": "length", "quantile": 0.05, "min": 2, "name": "brief"}
    run = make_run(constraints=[length, {**length, "name": "never", "min": 16}])
    assert certify(run) == 3
    found, said = certificate(run), capsys.readouterr().out
    brief, never = found["constraints"]
    assert (brief["quantile"], brief["min"], brief["threshold"]) == (0.05, 2, None)
    assert (brief["method"], brief["range"]) == ("exact", [0, 1])
    assert [(bound["side"], bound["limit"]) for bound in brief["bounds"]] == [("min", 0.95)]
    assert (brief["quantile_found"] >= 2) == (brief["mean"] >= 0.95)
    assert (never["verdict"], never["quantile_found"] < 16) == ("VIOLATED", True)
    assert found["one_sided_bounds"] == 2
    words = " ".join(said.split())
    assert "P(brief >= 2)" in words
    assert "0.95 (5% quantile >= 2)" in words
    assert f"brief: the 5% quantile of the fresh responses is {brief['quantile_found']:g} tokens" in said
