"""The exported chat template against written-out prompts, and against what training renders."""

import itertools
import json
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data_pipelines.media.rules import MediaLayout
from data_pipelines.template import encode_prompt, encode_record
from nemovl_train.convert.hf_config import CHAT_TEMPLATE

HEAD = "<s><SPECIAL_10>System\n"
OFF, ON = "<SPECIAL_11>Assistant\n<think></think>", "<SPECIAL_11>Assistant\n<think>\n"


def render(messages: list[dict[str, Any]], *, generate: bool = True, tools: list | None = None) -> str:
    """As Transformers renders templates: sandboxed, with its two block options and two helpers."""

    def fail(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = fail
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    template = environment.from_string(CHAT_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(messages=messages, add_generation_prompt=generate, tools=tools)


def user(text: str, *, images: int = 0, videos: int = 0) -> dict[str, Any]:
    media = [{"type": "image", "image": f"{i}.png"} for i in range(images)]
    media += [{"type": "video", "video": f"{i}.mp4"} for i in range(videos)]
    return {"role": "user", "content": [*media, {"type": "text", "text": text}]}


def test_text_only_has_an_empty_system_block() -> None:
    expected = f"{HEAD}\n<SPECIAL_11>User\nHi\n{OFF}"
    assert render([{"role": "user", "content": "Hi"}]) == expected
    assert render([user("Hi")]) == expected


def test_system_and_history() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2?"},
    ]
    turns = "<SPECIAL_11>User\n1+1?\n<SPECIAL_11>Assistant\n<think></think>2\n<SPECIAL_12>\n<SPECIAL_11>User\n2+2?\n"
    assert render(messages) == f"{HEAD}Be brief.\n{turns}{OFF}"
    assert render(messages, generate=False) == f"{HEAD}Be brief.\n{turns}"


@pytest.mark.parametrize(
    ("images", "videos", "before"),
    [
        (1, 0, "<image>\n"),
        (2, 0, "<image 1><image> <image 2><image>\n"),
        (3, 0, "<image 1><image> <image 2><image> <image 3><image>\n"),
        (0, 1, "<video>\n"),
        (0, 2, "<video>\n<video>\n"),
        (1, 1, "<image>\n<video>\n"),
    ],
)
def test_media_come_before_the_text(images: int, videos: int, before: str) -> None:
    assert render([user("What?", images=images, videos=videos)]) == f"{HEAD}\n<SPECIAL_11>User\n{before}What?\n{OFF}"


def test_media_after_the_text_still_come_first() -> None:
    content = [{"type": "text", "text": "What?"}, {"type": "image"}]
    assert "User\n<image>\nWhat?\n" in render([{"role": "user", "content": content}])


def test_a_tag_in_the_text_is_the_place_of_the_image() -> None:
    assert "User\nLeft: <image> or?\n" in render([user("Left: <image> or?", images=1)])


@pytest.mark.parametrize(
    ("texts", "end"),
    [
        (["/think"], ON),
        (["/no_think"], OFF),
        (["/think", "/no_think"], OFF),
        (["/no_think", "/think"], ON),
        (["/think then /no_think"], OFF),
        (["/no_think then /think"], ON),
        (["about </think> tags"], OFF),
    ],
)
def test_the_last_switch_wins(texts: list[str], end: str) -> None:
    messages = [{"role": "user", "content": f"a{t}b"} for t in texts]
    rendered = render(messages)
    assert rendered.endswith(end)
    body = rendered.removesuffix(end)
    assert "/no_think" not in body
    assert body.count("/think") == sum(t.count("</think>") for t in texts)


def test_system_switch_and_protected_end_tag() -> None:
    rendered = render([{"role": "system", "content": "Help. /think"}, {"role": "user", "content": "x</think>y/think"}])
    assert rendered == f"{HEAD}Help. \n<SPECIAL_11>User\nx</think>y\n{ON}"


def test_tools_calls_and_results() -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": '{"sum": 2}'},
        {"role": "assistant", "content": "2"},
    ]
    rendered = render(messages, tools=tools, generate=False)
    assert '<AVAILABLE_TOOLS>[{"name": "add", "parameters": {"type": "object"}}]</AVAILABLE_TOOLS>' in rendered
    one = '{"name": "add", "arguments": {"a": 1}}'
    tail = (
        f"{OFF}<TOOLCALL>[{one}, {one}]</TOOLCALL>\n<SPECIAL_12>\n"
        '<SPECIAL_11>User\n<TOOL_RESPONSE>[2, {"sum": 2}]</TOOL_RESPONSE>\n'
        f"{OFF}2\n<SPECIAL_12>\n"
    )
    assert rendered.endswith(f"<SPECIAL_11>User\n1+1?\n{tail}")


def tool_talk(first: str, said: str, answer: str) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """A record that calls two tools, and the same for the chat template: its messages and tools."""
    tools = [
        {
            "name": "weather",
            "description": "It's here",
            "parameters": {"type": "object", "properties": {"b": 1, "a": 2}},
        },
        {"name": "add"},
    ]
    calls = [{"name": "weather", "arguments": '{"city": "K\u00f6ln"}'}, {"name": "add", "arguments": "{}"}]
    messages = [
        {"role": "system", "content": "Be brief."},
        user(first),
        {"role": "assistant", "content": said, "tool_calls": calls},
        {"role": "tool", "content": '{"t": 7} /think <image>'},
        {"role": "tool", "content": "[]"},
        {"role": "assistant", "content": answer},
        user("And now?"),
        {"role": "assistant", "content": "Done."},
    ]
    texts = [json.dumps(tool, ensure_ascii=False) for tool in tools]
    return {"id": "r", "tools": texts, "messages": messages}, messages, tools


@pytest.mark.parametrize(
    ("first", "said", "answer"),
    [
        ("Weather?", "", "7 degrees."),
        ("Weather? /think", "<think>\nask\n</think>Let me see.\n", "<think>\nso\n</think>7"),
        ("Weather?", "<think>\nask\n</think>", "7"),
        ("Weather?", " ", ""),
    ],
)
def test_tools_are_rendered_as_in_training(first: str, said: str, answer: str) -> None:
    record, messages, tools = tool_talk(first, said, answer)
    tokenizer = Characters()
    trained = encode_record(record, [], tokenizer, tokens_per_tile=1)  # type: ignore[arg-type]
    assert tokenizer.decode(trained.input_ids.tolist()) == render(messages, generate=False, tools=tools)
    # The prompt behind a tool's results, which is where the model goes on.
    cut = {**record, "messages": messages[:5]}
    prompt = encode_prompt(cut, [], tokenizer, tokens_per_tile=1)  # type: ignore[arg-type]
    assert tokenizer.decode(prompt.input_ids.tolist()) == render(messages[:5], tools=tools)


def test_only_what_the_assistant_writes_of_a_tool_turn_is_in_the_loss() -> None:
    record, _, _ = tool_talk("Weather?", "Let me see.", "7")
    tokenizer = Characters()
    sample = encode_record(record, [], tokenizer, tokens_per_tile=1)  # type: ignore[arg-type]
    trained = tokenizer.decode(sample.labels[sample.labels != -100].tolist())
    weather = '{"name": "weather", "arguments": {"city": "K\u00f6ln"}}'
    call = f'<TOOLCALL>[{weather}, {{"name": "add", "arguments": {{}}}}]</TOOLCALL>'
    assert trained == (
        f"<think></think>Let me see.\n\n{call}\n<SPECIAL_12>\n<think></think>7\n<SPECIAL_12>\n"
        "<think></think>Done.\n<SPECIAL_12>\n"
    )
    everything = tokenizer.decode(sample.input_ids.tolist())
    assert '<SPECIAL_11>User\n<TOOL_RESPONSE>[{"t": 7} /think <image>, []]</TOOL_RESPONSE>\n' in everything
    assert '[{{"name": "tool_name1", "arguments": "tool_args1"}}, ' in everything
    assert set(sample.turns[sample.labels != -100].tolist()) == {0, 1, 2}


def test_misplaced_or_unknown_role_is_an_error() -> None:
    for role in ("system", "narrator"):
        with pytest.raises(jinja2.TemplateError, match=f"message 1 has role {role}"):
            render([{"role": "user", "content": "a"}, {"role": role, "content": "b"}])


class Characters:
    """Stands in for the tokenizer: every character and every special token is one id that can be read back."""

    specials: list[str] = []  # noqa: RUF012 (shared on purpose: ids stay valid over instances)

    def encode_text(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def special(self, name: str) -> int:
        if name not in self.specials:
            self.specials.append(name)
        return -1 - self.specials.index(name)

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i) if i >= 0 else self.specials[-1 - i] for i in ids)


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("question", ["What is it?", "Think. /think", "No. /think /no_think", "a</think>b"])
@pytest.mark.parametrize("system", [None, "", "Be brief."])
def test_prompt_equals_the_one_of_training(images: int, question: str, system: str | None) -> None:
    messages = [user(question, images=images)]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    layouts = [MediaLayout(kind="image", grid=(1, 1), thumbnail=False) for _ in range(images)]
    tokenizer = Characters()
    record = {"id": "r", "messages": messages}
    ids = encode_prompt(record, layouts, tokenizer, tokens_per_tile=1).input_ids.tolist()  # type: ignore[arg-type]
    # After templating the processor replaces every <image> by <img>, one <image> per visual token, and </img>.
    assert tokenizer.decode(ids) == render(messages).replace("<image>", "<img><image></img>")


@pytest.mark.parametrize(
    "texts",
    [
        ["<ima", "ge> x"],
        ["<im/thinkage> x"],
        ["<im/no/think_thinkage> x"],
        ["<ima</think>ge>", "<image>"],
        ["/think", "</", "think>"],
    ],
)
def test_tags_are_counted_as_in_training(texts: list[str]) -> None:
    content = [{"type": "image", "image": "0.png"}, *({"type": "text", "text": text} for text in texts)]
    messages = [{"role": "user", "content": content}]
    tokenizer = Characters()
    layouts = [MediaLayout(kind="image", grid=(1, 1), thumbnail=False)]
    ids = encode_prompt({"id": "r", "messages": messages}, layouts, tokenizer, tokens_per_tile=1).input_ids.tolist()  # type: ignore[arg-type]
    assert tokenizer.decode(ids).replace("<img><image></img>", "<image>") == render(messages)


def test_a_count_that_training_refuses_is_refused() -> None:
    with pytest.raises(jinja2.TemplateError, match=r"2 <image> in the text of a message with 1 image"):
        render([user("<image> <im/thinkage>", images=1)])


@pytest.mark.parametrize(
    ("questions", "answers"),
    [
        (("a", "b", "c"), ("1", "2")),
        (("a /think", "b", "c"), ("<think>\nwhy\n</think>1", "2")),
        (("a /think", "b /no_think", "c"), ("<think>\nwhy\n</think>1", "2")),
        (("a", "b /think", "c"), ("1", "<think>\nwhy\n</think>2")),
        (("a", "b", "c"), ("<think></think>1", "<think>why</think>2")),
        (("a </think> /think", "b", "c /no_think"), ("1", "")),
    ],
)
def test_earlier_turns_are_rendered_as_in_training(questions: tuple[str, ...], answers: tuple[str, ...]) -> None:
    messages = [user(questions[0], images=1)]
    for answer, question in zip(answers, questions[1:], strict=True):
        messages += [{"role": "assistant", "content": answer}, user(question)]
    tokenizer = Characters()

    def shown(ids: np.ndarray) -> str:
        return tokenizer.decode(ids.tolist()).replace("<img><image></img>", "<image>")

    layouts = [MediaLayout(kind="image", grid=(1, 1), thumbnail=False)]
    prompt = encode_prompt({"id": "r", "messages": messages}, layouts, tokenizer, tokens_per_tile=1)  # type: ignore[arg-type]
    assert shown(prompt.input_ids) == render(messages)
    finished = [*messages, {"role": "assistant", "content": "end"}]
    trained = encode_record({"id": "r", "messages": finished}, layouts, tokenizer, tokens_per_tile=1)  # type: ignore[arg-type]
    assert shown(trained.input_ids) == render(finished, generate=False)


def test_the_prompt_of_every_turn_begins_with_the_one_before() -> None:
    messages = [user("a", images=1), user("b /think"), user("c"), user("d /no_think")]
    answers = ["1", "<think>\nwhy\n</think>2", "<think>\nso\n</think>3"]
    prompts, history = [], []
    for question, answer in zip(messages, [*answers, ""], strict=True):
        history.append(question)
        prompts.append(render(history))
        history.append({"role": "assistant", "content": answer})
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(prompts))


def test_transformers_renders_the_exported_folder(folders: dict[str, Path]) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folders["vlm"], local_files_only=True)
    messages = [user("What?", images=2)]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == render(messages)
