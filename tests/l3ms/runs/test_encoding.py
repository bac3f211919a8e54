"""A row of tokens is what the chat template renders of the whole conversation, split where a rollout starts; else it is counted."""

import pytest
from transformers import PreTrainedTokenizerFast

from l3ms.config.yaml_reader import ConfigError
from l3ms.rollouts.prompts import encode_prompt
from l3ms.runs.encoding import encode
from l3ms.runs.examples import Example

WORDS = [
    *("user", "assistant", "system", "tool", ":", "hot", "cold", "rain", "sun", "f", "g", "[", "]", "<call>"),
    *("think", "/think", "<|end|>", "<s>", "\ue000"),
]
TURN = "{{ m.role }} : {{ m.content }} <|end|> "
OPEN = "{% if add_generation_prompt %}assistant : {% endif %}"
CHAT = "{% for m in messages %}" + TURN + "{% endfor %}" + OPEN
CALLS = (
    "{% if tools %}[ {% for t in tools %}{{ t.name }} {% endfor %}] {% endif %}{% for m in messages %}{{ m.role }} : "
    "{% if m.reasoning_content %}think {{ m.reasoning_content }} /think {% endif %}{{ m.content }} "
    "{% for c in m.tool_calls or [] %}<call> {{ c.function.name }} {% endfor %}<|end|> {% endfor %}" + OPEN
)
USER, ANSWER = {"role": "user", "content": "hot"}, {"role": "assistant", "content": "cold"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}


def words(chat=None, *, bos=None, adds_bos=False):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    inner = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(["<pad>", "<unk>", *WORDS])}, unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|end|>",
        bos_token=bos,
        chat_template=chat,
    )
    if adds_bos:
        special = [("<s>", made.convert_tokens_to_ids("<s>"))]
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=special)
    return made


def one(tokenizer, example, **options):
    """-> (the row's text, its scored text, notes)."""
    encoded = encode([example], tokenizer, max_length=64, **options)
    (row,) = encoded.rows
    scored = [token for token in row["labels"] if token != -100]
    assert row["input_ids"][-len(scored) :] == scored
    return str(tokenizer.decode(row["input_ids"])), str(tokenizer.decode(scored)), encoded.notes("x")


def rendered(tokenizer, messages, **options):
    return tokenizer.decode(tokenizer.apply_chat_template(messages, return_dict=False, **options))


@pytest.mark.parametrize(
    ("prompt", "turn", "tools", "scored"),
    [
        ([USER], ANSWER, None, "cold <|end|>"),
        ([USER], ANSWER, [{"name": "g"}], "cold <|end|>"),
        ([USER], CALL, [{"name": "g"}, {"name": "f"}], "<call> f <|end|>"),
        ([USER], ANSWER | {"reasoning_content": "rain"}, None, "think rain /think cold <|end|>"),
        ([USER, CALL, {"role": "tool", "content": "rain"}], ANSWER, [{"name": "f"}], "cold <|end|>"),
        ([USER], ANSWER | CALL | {"content": "sun"}, [{"name": "f"}], "sun <call> f <|end|>"),
    ],
)
def test_the_row_is_what_the_template_renders(prompt, turn, tools, scored):
    tokenizer = words(CALLS)
    options = {"tools": tools} if tools else {}
    example = Example(prompt, turn["content"] if turn is ANSWER else turn, options=options)
    text, answer, notes = one(tokenizer, example)
    assert text == rendered(tokenizer, [*prompt, turn], tools=tools)
    assert (answer, notes) == (scored, [])
    row = encode([example], tokenizer, max_length=64).rows[0]
    head = encode_prompt(tokenizer, prompt, **options)
    assert row["input_ids"][: len(head)] == head
    assert row["labels"][: len(head)] == [-100] * len(head)
    assert row["labels"][len(head)] != -100
    assert row["prompt"] == prompt


def test_what_the_template_leaves_out_is_said():
    calling = Example([USER], CALL | {"content": "sun"}, options={"tools": [{"name": "f"}]})
    thinking = Example([USER], ANSWER | {"reasoning_content": "rain"})
    encoded = encode([calling, thinking, Example([USER], "cold")], words(CHAT), max_length=64)
    assert len(encoded.rows) == 3
    assert [note.split(" rows")[0] for note in encoded.notes("x")] == [
        "x: reasoning_content of 1 of 3", "x: tool_calls of 1 of 3", "x: tools of 1 of 3",
    ]  # fmt: skip
    silent = encode([Example([USER], CALL)], words(CHAT), max_length=64)  # nothing is left of the answer
    assert (silent.rows, silent.bent) == ([], 1)
    assert "1 of 1 rows were dropped (the chat template does not render the answer" in silent.notes("x")[0]
    assert silent.nothing(9).startswith("no row can be trained on: the chat template")
    plain = encode([Example("hot", "cold", options={"tools": [{"name": "f"}]})], words(), max_length=64)
    assert "tools of 1 of 1 rows" in plain.notes("x")[0]


THOUGHT = CHAT.replace("assistant : {% endif %}", "assistant : think {% endif %}")


def test_an_answer_without_the_thought_that_the_prompt_opens():
    """Trained on as the template renders it, sampled from there, and said."""
    tokenizer = words(THOUGHT)
    text, answer, notes = one(tokenizer, Example([USER], "cold"))
    assert text == rendered(tokenizer, [USER, ANSWER]) == "user : hot <|end|> assistant : cold <|end|>"
    assert answer == "cold <|end|>"
    assert "1 of 1 answers begin before the generation prompt of the chat template ends" in notes[0]
    # one that begins with what is a thought: where the thought begins is no place that other answers have
    text, answer, notes = one(tokenizer, Example([USER], "think rain /think cold"))
    assert (text, answer) == (
        "user : hot <|end|> assistant : think rain /think cold <|end|>",
        "rain /think cold <|end|>",
    )
    assert notes == []
    closed = words(
        THOUGHT.replace(
            TURN, "{{ m.role }} : {% if m.role == 'assistant' %}think /think {% endif %}{{ m.content }} <|end|> "
        )
    )
    assert one(closed, Example([USER], "cold")) == (
        "user : hot <|end|> assistant : think /think cold <|end|>", "/think cold <|end|>", [],
    )  # fmt: skip


@pytest.mark.parametrize(
    "chat",
    [
        "{% if messages[-1].role == 'user' %}system : {% endif %}" + CHAT,  # the beginning
        "{% for m in messages %}{% if loop.last or m.role == 'system' %}" + TURN + "{% endif %}{% endfor %}" + OPEN,  # the last alone
        CHAT.replace("assistant : {% endif %}", "tool : {% endif %}"),  # another opening
        "hot",
        "{% for m in messages if m.role != 'assistant' %}" + TURN + "{% endfor %}" + OPEN,
        "{% for m in messages %}{% if not loop.first %}<|end|> {% endif %}{{ m.content }} {% endfor %}",  # an end before the answer
    ],
)  # fmt: skip
def test_templates_that_do_not_go_on_from_the_prompt_lose_the_row(chat):
    encoded = encode([Example([USER], "cold"), Example([USER, ANSWER, USER], "rain")], words(chat), max_length=64)
    assert (encoded.rows, encoded.bent) == ([], 2)
    assert "2 of 2 rows were dropped" in encoded.notes("x")[0]


def test_turns_that_are_rewritten_for_all_alike_are_no_trouble():
    """Of earlier assistant turns the thought is left out, in the prompt as in the whole."""
    chat = (
        "{% for m in messages %}{{ m.role }} : {% if m.role == 'assistant' and not loop.last %}{{ m.content.split('/think')[-1] }}"
        "{% else %}{{ m.content }}{% endif %} <|end|> {% endfor %}" + OPEN
    )
    earlier = {"role": "assistant", "content": "think sun /think rain"}
    tokenizer = words(chat)
    text, answer, notes = one(tokenizer, Example([USER, earlier, USER], "think sun /think cold"))
    assert (
        text
        == "user : hot <|end|> assistant : rain <|end|> user : hot <|end|> assistant : think sun /think cold <|end|>"
    )
    assert (answer, notes) == ("think sun /think cold <|end|>", [])


def test_a_token_over_the_border_is_cut_there():
    """Where two line ends are one token, the prompt's is its own, as a rollout has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({sign: i for i, sign in enumerate([*alphabet, "ĊĊ"])}, [("Ċ", "Ċ")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    chat = "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}<|e|>{% endfor %}{% if add_generation_prompt %}<assistant>\n{% endif %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|e|>", chat_template=chat)
    text, answer, notes = one(tokenizer, Example([USER], "\ncold"), chat_template=True)
    assert text == "<user>\nhot<|e|><assistant>\n\ncold<|e|>"
    assert (answer, notes) == ("\ncold<|e|>", [])


@pytest.mark.parametrize("strips", [False, True])
def test_a_tokenizer_that_begins_texts_with_a_space_puts_none_between(strips):
    """SentencePiece: the prompt's last space is a part of the answer's first token, which alone has one of its own."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces = ["<unk>", "<e>", "\u2581", "\u2581hot", "\u2581cold", ":", "cold"]
    inner = Tokenizer(models.Unigram([(piece, -1.0 if len(piece) > 2 else -6.0) for piece in pieces], unk_id=0))
    scheme = "always" if strips else "first"
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)  # type: ignore[assignment]
    inner.decoder = decoders.Metaspace(prepend_scheme=scheme)  # type: ignore[assignment]
    if strips:  # what stands before a text is no help then
        inner.normalizer = normalizers.Strip(left=True, right=False)  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<e>", unk_token="<unk>")
    assert one(tokenizer, Example("hot:", " cold"))[::2] == ("hot: cold<e>", [])
    text, _, notes = one(tokenizer, Example("hot: ", "cold"))
    assert text == ("hot:  cold<e>" if strips else "hot: cold<e>")
    assert ["white space before them that the data has not" in note for note in notes] == [True] * strips


@pytest.mark.parametrize(
    "completion", ["cold", "cold <|end|>", "cold <|end|> <|end|>", "cold <|end|>\n", "cold<|end|> "]
)
@pytest.mark.parametrize("prompt", ["hot ", [USER]])
def test_one_end_token_is_scored(prompt, completion):
    tokenizer = words(CHAT)
    _, answer, _ = one(tokenizer, Example(prompt, completion), chat_template=False)
    assert answer.count("<|end|>") == 1
    assert answer.endswith("cold <|end|>")
    inside = one(tokenizer, Example(prompt, "cold <|end|> rain"), chat_template=False)[1]
    assert inside == "cold <|end|> rain <|end|>"  # data like any other


def test_an_empty_answer_is_its_end():
    assert one(words(CHAT), Example([USER], ""))[1] == "<|end|>"
    assert one(words(), Example("hot", "<|end|>"))[1] == "<|end|>"


def test_bos_opens_a_text_once():
    both = words("{{ bos_token }} " + CHAT, bos="<s>", adds_bos=True)
    assert one(both, Example([USER], "cold"))[0].split().count("<s>") == 1
    for prompt in ("<s> hot", "hot"):
        assert one(both, Example(prompt, "cold"), chat_template=False)[0] == "<s> hot cold <|end|>"
    assert one(both, Example("", "<s> user : hot", is_text=True))[0] == "<s> user : hot <|end|>"
    ids = both.convert_tokens_to_ids(["<s>", "<s>", "hot"])
    assert encode_prompt(both, "<s> <s> hot") == ids  # what was written
    assert encode_prompt(words(bos="<s>"), "<s> <s> hot") == ids


def test_an_end_token_that_the_prompt_has_is_its_own():
    assert one(words(), Example("hot <|end|>", "cold"))[0] == "hot <|end|> cold <|end|>"


def test_texts_are_scored_whole():
    text, scored, _ = one(words(CHAT, bos="<s>", adds_bos=True), Example("", "hot <|end|> rain cold", is_text=True))
    assert (text, scored) == ("<s> hot <|end|> rain cold <|end|>", "hot <|end|> rain cold <|end|>")
    tokenizer = words(CHAT)
    encoded = encode([Example("", "hot rain", is_text=True), Example("", "", is_text=True)], tokenizer, max_length=9)
    (row,) = encoded.rows  # nothing predicts the first token: it is where a rollout starts
    assert tokenizer.decode(row["input_ids"]) == "hot rain <|end|>"
    assert row["labels"] == [-100, *row["input_ids"][1:]]
    assert row["prompt"] == "hot"
    assert encoded.dropped == 1


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        (
            "{{ raise_exception('roles must alternate') }}",
            "a.jsonl, line 7: the chat template refuses it: roles must alternate",
        ),
        ("{{ messages.nothing.more }}", "a.jsonl, line 7: the chat template refuses it: UndefinedError: "),
        ("{{ 1 / 0 }}", "a.jsonl, line 7: the chat template refuses it: ZeroDivisionError: "),
        ("{{ messages[0].content + 1 }}", "a.jsonl, line 7: the chat template refuses it: TypeError: "),
    ],
)
def test_a_row_that_the_template_refuses_is_named(chat, message):
    with pytest.raises(ConfigError) as caught:
        encode([Example([USER], "cold", where="a.jsonl, line 7")], words(chat), max_length=64, name="data.evaluation")
    assert str(caught.value).startswith(f"data.evaluation: {message}")
    with pytest.raises(ConfigError, match=r"data\.train: row 1: the chat template refuses"):
        encode([Example("hot", "cold")], words(chat), max_length=64)


@pytest.mark.parametrize("chat", ["{% for %}", "{{ messages", "{% if x %}", "{{ x | nothing }}"])
def test_a_broken_template_is_the_models(chat):
    with pytest.raises(ConfigError, match=r"^model: its chat template is none: line 1: "):
        encode([Example("hot", "cold")], words(chat), max_length=64)
    assert encode([Example("hot", "cold")], words(chat), max_length=64, chat_template=False).rows


def test_a_template_that_reads_parts_alone_gets_parts():
    chat = (
        "{% for m in messages %}{{ m.role }} : {% for c in m.content %}{{ c.text }} {% endfor %}<|end|> {% endfor %}"
        + OPEN
    )
    assert one(words(chat), Example([USER], "cold"))[0] == "user : hot <|end|> assistant : cold <|end|>"


def test_what_the_template_reads_beside_messages():
    tokenizer = words("{% if soft %}system : rain {% endif %}" + CHAT)
    text, _, notes = one(tokenizer, Example([USER], "cold", options={"soft": True}))
    assert (text.startswith("system : rain user : hot"), notes) == (True, [])
    assert "loud of 1 of 1 rows" in one(tokenizer, Example([USER], "cold", options={"loud": True}))[2][0]


def test_columns_that_are_left_out_are_said():
    columns = {"answer": 1, "completion_ids": 2, "trainer_state": 3, "log_metric": 4, "my column": 5}
    examples = [Example("hot", "cold", columns), Example("hot", "rain", columns | {"extra": 1})]
    encoded = encode(examples, words(), max_length=9)
    assert set(encoded.rows[0]) == {"input_ids", "labels", "prompt", "answer"}
    assert encoded.notes("x") == [
        "x: left out, since reward functions are given something else by these names: completion_ids, log_metric, trainer_state",
        "x: column 'extra' is left out: only 1 of 2 rows have it",
        "x: column 'my column' is left out: no argument of a reward function can have this name",
    ]


def test_turns_after_the_answer_are_counted():
    assert "1 of 1 conversations go on" in one(words(CHAT), Example([USER], "cold", left_out=2))[2][0]
