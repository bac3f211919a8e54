"""Where a rollout starts is what the chat template renders, with all that it reads."""

import pytest

from l3ms import rollout


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
