"""Each argument of transformers' Trainer does what it says, or is refused by name."""

import copy
import math
import types
from typing import Any

import pytest
import torch
import transformers
from accelerate.utils import extract_model_from_parallel
from training_runs import CONSTRAINTS, assert_same_weights, log_likelihood, losses, rows

import l3ms
from l3ms.training.honoured import check_arguments, check_parallelism


def nothing(*args, **kwargs):
    raise AssertionError("called")


def make(tmp_path, tokenizer, model, *, settings=None, constraints=CONSTRAINTS, data=None, **options):
    plain = {
        "output_dir": str(tmp_path), "max_steps": 2, "per_device_train_batch_size": 4, "constraint_batch_size": 6,
        "max_new_tokens": 8, "learning_rate": 0.05, "optim": "sgd", "save_strategy": "no", "use_cpu": True,
        "report_to": [], "disable_tqdm": True, "logging_steps": 1,
    }  # fmt: skip
    return l3ms.L3MTrainer(
        model, l3ms.L3MConfig(**{**plain, **(settings or {})}), constraints=constraints,
        **{"train_dataset": rows() if data is None else data, "processing_class": tokenizer, **options},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "options", "line"),
    [
        ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor must be 0: .*, got 0.1"),
        ({"label_names": ["start"]}, {}, r'label_names must be \["labels"\]'),
        ({"label_names": ["labels", "start"]}, {}, r'label_names must be \["labels"\], .*where a data_collator gives'),
        (
            {"solver": "none"},
            {"optimizers": ([nothing, nothing], None)},
            r'optimizers: solver="none" steps one optimizer',
        ),
        (
            {},
            {"data": {"train": rows(), "test": rows()}},
            "train_dataset must be one data set, got several: 'train', 'test'",
        ),
        ({}, {"constraints": l3ms.Length(max=3)}, "constraints must be a list of l3ms.Constraint objects, got Length"),
        ({"constraint_batch_size": 6.0}, {}, "constraint_batch_size must be a whole number, got 6.0"),
        ({"max_new_tokens": True}, {}, "max_new_tokens must be a whole number, got True"),
        ({"temperature": "1"}, {}, "temperature must be a number, got '1'"),
        ({"smoothing": True}, {}, "smoothing must be trend, ema or a number in"),
        ({}, {"processing_class": nothing}, "processing_class must be the model's tokenizer, got function"),
        ({"use_liger_kernel": True}, {}, "use_liger_kernel must be False"),
        ({"auto_find_batch_size": True}, {}, "auto_find_batch_size must be False"),
        ({"debug": "underflow_overflow"}, {}, "debug must not hold underflow_overflow"),
        ({"optim": "lomo"}, {}, "optim='lomo' steps while gradients are made"),
        ({"optim": "galore_adamw_layerwise"}, {}, "optim='galore_adamw_layerwise' steps while"),
        ({}, {"compute_loss_func": nothing}, "compute_loss_func is not taken"),
        ({}, {"model_init": nothing}, "model_init is not taken"),
        ({}, {"processing_class": None}, "processing_class is None: constraint 'length' samples responses"),
        ({}, {"data": [{"text": "a b"}] * 8}, r"prompts: rows must hold input_ids, labels, prompt .*got \['text'\]"),
        ({}, {"eval_dataset": [{"text": "a"}]}, r"eval_dataset: rows must hold input_ids, labels .*got \['text'\]"),
        ({}, {"eval_dataset": {"one": [{"text": "a"}]}}, r"eval_dataset\['one'\]: rows must hold"),
    ],
)
def test_what_would_have_no_effect_is_refused_by_name(tmp_path, tokenizer, make_model, settings, options, line):
    with pytest.raises(ValueError, match=line):
        make(tmp_path, tokenizer, make_model(), settings=settings, **options)


def test_embeddings_in_place_of_tokens_are_refused(tmp_path, make_model):
    trainer = make(tmp_path, None, make_model(), settings={"solver": "none"}, constraints=(), data_collator=nothing)
    with pytest.raises(ValueError, match=r"must hold input_ids and labels, .*got \['inputs_embeds', 'labels'\]"):
        trainer.compute_loss(trainer.model, {"inputs_embeds": torch.zeros(1, 2, 8), "labels": torch.zeros(1, 2)})


def test_a_model_under_the_autocast_of_an_earlier_trainer_is_refused(tmp_path, make_model):
    model, plain = make_model(), {"solver": "none", "learning_rate": 0.0}
    make(tmp_path, None, model, settings=plain | {"bf16": True}, constraints=()).train()
    with pytest.raises(
        ValueError, match="computes in the mixed precision of an earlier trainer, and this one has none"
    ):
        make(tmp_path, None, model, settings=plain, constraints=())
    alone = extract_model_from_parallel(model, keep_fp32_wrapper=False)
    found: list[Any] = [make(tmp_path, None, item, settings=plain, constraints=()) for item in (alone, make_model())]
    mine, fresh = (item.compute_loss(item.model.train(), item.data_collator(rows(4))) for item in found)
    assert torch.equal(mine, fresh)


def test_a_padding_token_without_an_embedding_is_refused(tmp_path, tokenizer, make_model):
    padded = copy.deepcopy(tokenizer)
    padded.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(ValueError, match=r"^processing_class: the tokenizer's padding token 17 is not in the model's"):
        make(tmp_path, padded, make_model())


def test_other_arguments_and_a_wrapped_optimizer_are_refused(tmp_path, tokenizer, make_model):
    with pytest.raises(ValueError, match=r"args must be an l3ms.L3MConfig, got TrainingArguments"):
        l3ms.L3MTrainer(make_model(), transformers.TrainingArguments(str(tmp_path), report_to=[]))  # type: ignore[arg-type]
    model = make_model()
    ours = l3ms.L3MOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), [l3ms.Length(max=6)])
    with pytest.raises(ValueError, match="optimizers: give the plain optimizer"):
        make(tmp_path, tokenizer, model, optimizers=(ours, None))


@pytest.mark.parametrize("settings", [{"max_steps": 10}, {"max_steps": -1, "num_train_epochs": 2}])
def test_fewer_rows_than_a_batch_are_refused(tmp_path, tokenizer, make_model, settings):
    trainer = make(tmp_path, tokenizer, make_model(), settings=settings, data=rows(3))
    with pytest.raises(ValueError, match="3 rows are fewer than one batch of per_device_train_batch_size=4"):
        trainer.train()
    kept = {**settings, "dataloader_drop_last": False, "max_steps": 2}
    trainer = make(tmp_path, tokenizer, make_model(), settings=kept, data=rows(3))
    assert trainer.train().global_step == 2


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, given):
        self.given = given

    def __iter__(self):
        return iter(self.given)


def test_a_stream_of_rows_is_trained_on_and_prompts_are_rows(tmp_path, tokenizer, make_model):
    with pytest.raises(ValueError, match=r"in random order, which Stream cannot give; give a list of rows as prompts="):
        make(tmp_path, tokenizer, make_model(), data=Stream(rows()))
    trainer = make(tmp_path, tokenizer, make_model(), data=Stream(rows(8)), prompts=rows(5, seed=3))
    trainer.train()
    with torch.no_grad():
        total, count = log_likelihood(make_model(), trainer.data_collator(rows(8)[:4]))
    assert losses(trainer)[0] == pytest.approx(-(total / count).mean().item(), rel=1e-6)
    general = l3ms.DataNLL("general", rows(8, seed=4), max=9.0)
    assert make(tmp_path, None, make_model(), data=Stream(rows(8)), constraints=[general]).train().global_step == 2
    with pytest.raises(ValueError, match=r"[Bb]atch"):
        make(tmp_path, None, make_model(), data=Stream([]), constraints=[general]).train()


# ---- the task loss is the mean over all sequences, however they come ----


def unequal(count=10):
    """Rows, of which some have nothing scored: micro-batches with unlike numbers of sequences."""
    made = rows(count)
    for row in made[1:4]:
        row["labels"] = [-100] * len(row["labels"])
    return made


@pytest.mark.parametrize("clipped", [False, True])
def test_accumulated_micro_batches_weigh_every_sequence_alike(tmp_path, tokenizer, make_model, clipped):
    """As one batch of all of them: also where the last is smaller, or has rows with nothing scored."""
    settings = {
        "solver": "none", "train_sampling_strategy": "sequential", "dataloader_drop_last": False, "max_steps": 1,
        "max_grad_norm": 1.0 if clipped else 0.0,
    }  # fmt: skip
    found = {}
    for size, steps in ((10, 1), (4, 3), (2, 5)):
        more = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = make(tmp_path, None, make_model(), settings=settings | more, constraints=(), data=unequal())
        trainer.train()
        found[size] = trainer
        assert losses(trainer) == pytest.approx(losses(found[10]), rel=1e-6)
        assert_same_weights(trainer.model, found[10].model, 1e-6)


def collators(tokenizer):
    flat = transformers.DataCollatorWithFlattening
    return {
        "position_ids": flat(),
        "cu_seq_lens": flat(return_flash_attn_kwargs=True, return_position_ids=False),
        "seq_idx": flat(return_seq_idx=True, return_position_ids=False),
        "numbered mask": numbered,
        "padded": transformers.DataCollatorForSeq2Seq(tokenizer),
    }


def numbered(features):
    """Two sequences in each row, numbered in the mask."""
    pairs = [features[i : i + 2] for i in range(0, len(features), 2)]
    width = max(sum(len(row["input_ids"]) for row in pair) for pair in pairs)
    batch = {"input_ids": [], "labels": [], "attention_mask": []}
    for pair in pairs:
        rest = width - sum(len(row["input_ids"]) for row in pair)
        batch["input_ids"].append([t for row in pair for t in row["input_ids"]] + [0] * rest)
        batch["labels"].append([t for row in pair for t in row["labels"]] + [-100] * rest)
        batch["attention_mask"].append([n for n, row in enumerate(pair, 1) for _ in row["input_ids"]] + [0] * rest)
    return {name: torch.tensor(values) for name, values in batch.items()}


@pytest.mark.parametrize(
    ("kind", "accumulated"),
    [
        pytest.param(kind, count, marks=[] if (kind == "position_ids") == (count == 2) else pytest.mark.slow)
        for kind in ("position_ids", "cu_seq_lens", "seq_idx", "numbered mask", "padded")
        for count in (1, 2)
    ],
)
def test_a_collator_of_somebody_else_trains_on_the_same_sequences(tmp_path, tokenizer, make_model, kind, accumulated):
    data = [{name: row[name] for name in ("input_ids", "labels", "prompt")} for row in rows(8)]
    only = [{name: row[name] for name in ("input_ids", "labels")} for row in data]
    settings = {"train_sampling_strategy": "sequential", "gradient_accumulation_steps": accumulated, "solver": "none"}
    settings["per_device_train_batch_size"] = 8 // accumulated
    found = []
    for options in ({}, {"data_collator": collators(tokenizer)[kind]}):
        trainer = make(
            tmp_path, None, make_model(), settings=settings, constraints=(), data=only, eval_dataset=only, **options
        )
        trainer.train()
        found.append((losses(trainer), trainer.evaluate()["eval_loss"], trainer.model))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5)
    assert_same_weights(found[1][2], found[0][2], 1e-5)


def test_packed_batches_are_told_however_they_come(tmp_path, tokenizer, make_model):
    only = [{name: row[name] for name in ("input_ids", "labels")} for row in rows(4)]
    trainer = make(tmp_path, None, make_model(), settings={"solver": "none"}, constraints=(), data=only)
    whole = trainer.compute_loss(trainer.model, trainer.data_collator(only))
    for kind in ("position_ids", "numbered mask"):
        packed = collators(tokenizer)[kind](only)
        torch.testing.assert_close(trainer.compute_loss(trainer.model, packed), whole)


# ---- what the Trainer does with its other arguments ----


@pytest.mark.parametrize(
    "settings",
    [
        {"train_sampling_strategy": "group_by_length"},
        {"remove_unused_columns": True},
        {"neftune_noise_alpha": 5.0},
        {"bf16": True},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "loss", "eval_strategy": "steps",
         "eval_steps": 1, "save_strategy": "steps", "save_steps": 1},
        {"optim": "adamw_torch_fused"},
        *(
            pytest.param(settings, marks=pytest.mark.slow)
            for settings in (
                {"train_sampling_strategy": "batch_rebalance"},
                {"include_num_input_tokens_seen": "non_padding"},
                {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}},
                {"accelerator_config": {"split_batches": True}},
                {"optim": "adafactor"},
                {"optim": "rmsprop"},
                {"eval_strategy": "epoch", "eval_on_start": True, "max_steps": 6},
                {"torch_empty_cache_steps": 1},
                {"full_determinism": True},
            )
        ),
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)  # fmt: skip
def test_the_others_train_and_constrain(tmp_path, tokenizer, make_model, settings):
    before = torch.are_deterministic_algorithms_enabled()
    try:
        trainer = make(tmp_path, tokenizer, make_model(), settings=settings, eval_dataset=rows(6, seed=3))
        trainer.train()
    finally:
        torch.use_deterministic_algorithms(before)
    assert trainer.l3m_optimizer is not None
    assert trainer.l3m_optimizer.constraint_steps == trainer.state.global_step >= 2
    assert all(math.isfinite(loss) for loss in losses(trainer))
    if "include_num_input_tokens_seen" in settings:
        assert trainer.state.num_input_tokens_seen > 0


@pytest.mark.parametrize("norm", [0.0, -1.0])
def test_a_norm_that_is_not_positive_clips_nothing(tmp_path, tokenizer, make_model, norm):
    optimizer: Any = make(tmp_path, tokenizer, make_model(), settings={"max_grad_norm": norm}).create_optimizer()
    assert optimizer.max_grad_norm is None


def test_data_seed_orders_the_prompts(tmp_path, tokenizer, make_model):
    def taken(**settings):
        trainer = make(tmp_path, tokenizer, make_model(), settings=settings)
        assert trainer.prompts is not None
        return [row["number"] for row in trainer.prompts.take(8)]

    assert taken(seed=1, data_seed=7) == taken(seed=2, data_seed=7) == taken(seed=7)
    assert taken(seed=1) != taken(seed=2)


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch, tmp_path):
    """As accelerate leaves them on CPUs without use_cpu; each would train and write alone."""
    args = l3ms.L3MConfig(output_dir=str(tmp_path), report_to="none")
    check_arguments(args)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="use_cpu must be True where 2 processes are started on CPUs"):
        check_arguments(args)


def parallel(**options):
    """What `check_parallelism` takes of a trainer."""
    plugin = types.SimpleNamespace(fsdp_version=options.pop("version", 2))
    sizes = {f"get_{name}_size": (lambda: 1) for name in ("tp", "cp", "sp")}
    return types.SimpleNamespace(
        args=types.SimpleNamespace(fsdp=options.pop("fsdp", True), solver="barrier", device=torch.device("cpu")),
        accelerator=types.SimpleNamespace(state=types.SimpleNamespace(fsdp_plugin=plugin)), is_deepspeed_enabled=False,
        **{"is_fsdp_enabled": True, "model": torch.nn.Linear(1, 1), **sizes, **options},
    )  # fmt: skip


class Split(torch.nn.Linear):
    """As fully_shard leaves a module."""

    def unshard(self): ...

    def reshard(self): ...


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"is_fsdp_enabled": False}, "fsdp is asked for, and accelerate does not shard on cpu"),
        ({"version": 1}, "fsdp_config: version 1"),
        ({"fsdp": False, "is_fsdp_enabled": False, "model": Split(1, 1)}, "model is in parts already"),
    ],
)
def test_other_ways_of_sharding_are_refused_in_one_line(options, line):
    check_parallelism(parallel())
    with pytest.raises(ValueError, match=line) as found:
        check_parallelism(parallel(**options))
    assert "\n" not in str(found.value)
