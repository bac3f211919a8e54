"""Where a rollout starts is what the chat template renders, with all that it reads."""

import pytest

from l3ms import rollout
from l3ms.rollouts.prompts import chat_text, encode_prompt, template_options


def test_the_chat_template_gets_tools_and_may_refuse(make_model, tokenizer, monkeypatch):
    chat = (
        "{% for tool in tools or [] %}{{ tool.name }} {% endfor %}{% for m in messages %}{{ m.content }} {% endfor %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", chat + "{% if loud %}def {% endif %}")
    messages = [{"role": "user", "content": "a b", "name": None}]
    columns = {"tools": [[{"name": "name"}], None], "chat_template_kwargs": [None, {"loud": True}]}
    out = rollout(make_model(seed=1), tokenizer, [messages] * 2, max_new_tokens=3, columns=columns)
    assert [tokenizer.decode(ids[:3]) for ids in out.input_ids] == ["name a b", "a b def"]
    assert out.columns == columns
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no') }}")
    with pytest.raises(ValueError, match=r"rollout: prompts\[0\]: the chat template refuses it: no"):
        rollout(make_model(seed=1), tokenizer, [messages], max_new_tokens=3)


# ---- what the template is given beside messages ----


def name(a: int) -> int:
    """A tool.

    Args:
        a: a number
    """
    return a


TOOL = {"name": "name"}


@pytest.mark.parametrize(
    ("tools", "count"),
    [([TOOL], 1), ((TOOL, TOOL), 2), ('[{"name": "name"}]', 1), ([name], 1), (None, 0), ([], 0), ("", 0), ("null", 0)],
)
def test_tools_are_schemas_functions_or_a_json_text(tokenizer, tools, count):
    found = template_options({"tools": [tools]}, 0)
    assert len(found.get("tools", [])) == count
    chat = "{% for tool in tools or [] %}{{ tool.name or tool.function.name }} {% endfor %}"
    assert chat_text(tokenizer, [{"role": "user", "content": "a"}], chat_template=chat, **found) == "name " * count


@pytest.mark.parametrize("given", [{"loud": True}, '{"loud": true}', '  {"loud": true}'])
def test_options_of_the_template_are_a_mapping_or_a_json_text(given):
    assert template_options({"chat_template_kwargs": [given]}, 0) == {"loud": True}
    assert template_options({"chat_template_kwargs": [None]}, 0) == {}


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"tools": ["name"]}, "tools must be a list of JSON schemas or functions, or a JSON text of one, got 'name'"),
        ({"tools": ['{"name": "f"}']}, "tools must be a list"),
        ({"tools": [[3]]}, r"tools must be a list .* got \[3\]"),
        ({"tools": [TOOL]}, "tools must be a list"),
        ({"chat_template_kwargs": ["loud"]}, "chat_template_kwargs must be a dict, or a JSON text of one, got 'loud'"),
        ({"chat_template_kwargs": [[1]]}, "chat_template_kwargs must be a dict"),
        ({"chat_template_kwargs": [{"tokenize": False}]}, "and 'tokenize' is not its own"),
        ({"chat_template_kwargs": [{"add_generation_prompt": False}]}, "and 'add_generation_prompt' is not its own"),
        ({"chat_template_kwargs": [{"messages": []}]}, "and 'messages' is not its own"),
    ],
)
def test_what_is_neither_is_refused_by_its_row(make_model, tokenizer, columns, words):
    with pytest.raises(ValueError, match=rf"^rollout: prompts\[0\]: .*{words}"):
        rollout(make_model(), tokenizer, ["a"], columns=columns)


def test_an_option_of_the_template_may_have_the_name_of_an_argument_of_ours(tokenizer):
    chat = "{{ prompt }} {{ tokenizer }}"
    options = {"prompt": "a", "tokenizer": "b", "chat_template": chat}
    assert tokenizer.decode(encode_prompt(tokenizer, [{"role": "user", "content": "c"}], **options)) == "a b"


# ---- contents in parts ----

PARTS = [{"type": "text", "text": "a "}, {"text": "b"}]


def test_parts_of_text_are_the_text(tokenizer, monkeypatch):
    whole = encode_prompt(tokenizer, [{"role": "user", "content": "a b"}])
    assert encode_prompt(tokenizer, [{"role": "user", "content": PARTS}]) == whole
    only = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", only)
    for content in ("a b", PARTS):
        assert chat_text(tokenizer, [{"role": "user", "content": content}]) == "a b"


@pytest.mark.parametrize(("part", "kind"), [({"type": "image"}, "image"), ("a", "str"), ({"type": "text"}, "text")])
def test_parts_of_another_kind_are_refused(make_model, tokenizer, part, kind):
    wanted = rf"rollout: prompts\[0\]: .*a part of type '{kind}': a language model reads parts of type 'text' alone"
    with pytest.raises(ValueError, match=wanted):
        rollout(make_model(), tokenizer, [[{"role": "user", "content": [part]}]])
