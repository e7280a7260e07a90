"""Chat templates: which one counts and what tokens it gives, held against transformers; BlueLM's own."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import transformers

from bluelm.config import ModelConfig
from bluelm.errors import InputError
from bluelm.system.files import demo_checkpoint
from bluelm.text.added_tokens import CHATGLM_TOKENS
from bluelm.text.templates import template_files
from bluelm.text.tokenizer import Message, Tokenizer, copy_files
from compress.formats.plain import write_tokenizer as write_plain
from tests.bluelm.text.test_begins import settings
from tests.export.gguf.test_bpe import write_tokenizer

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be kind; it's <b>bold</b>."},
    {"role": "user", "content": "你好\n  What is 12 + 30?  "},
    {"role": "assistant", "content": "", "reasoning_content": "12 + 30", "tool_calls": [
        {"type": "function", "function": {"name": "add", "arguments": {"a": 12, "b": "三十"}}}]},
    {"role": "tool", "name": "add", "content": "42"},
    {"role": "assistant", "content": [{"type": "text", "text": "It is 42."}]},
    {"role": "user", "content": "Thanks", "extra": None},
]  # fmt: skip
TOOLS = [{"type": "function", "function": {
    "name": "add", "description": "Adds <two> numbers: \"a\" & 'b'",
    "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "string"}}}}}]  # fmt: skip
DOCUMENTS = [{"title": "One", "text": "a text"}, {"title": "二", "text": "文"}]
TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|begin|>' + m.role + '\\n' }}{{ m.content if m.content is string else "
    "m.content[0].text }}{{ '<|end|>\\n' }}{% endfor %}{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}",
    "words": "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ pad_token is defined }}|{{ nothing }}",
    "json": "{{ tools | tojson }}{{ tools | tojson(indent=2) }}{{ messages | tojson(separators=(',', ':')) }}"
    "{{ messages[2] | tojson(ensure_ascii=True, sort_keys=True) }}{{ documents | tojson }}",
    "blocks": "  {% set ns = namespace(found=false) %}\n{% for m in messages if m.role != 'tool' %}\n"
    "    {% if m.role == 'system' %}\n  {% continue %}\n  {% endif %}\n"
    "  {% generation %}\n{{ loop.index }}{{ m.role | upper }}\n{% set ns.found = true %}{% endgeneration %}\n"
    "    {%- if loop.index > 3 %}\n{% break %}{% endif %}\n{% endfor %}\n{{ ns.found }}\n\n",
    "macros": "{% macro show(v, depth=0) %}{% if v is mapping %}{% for k, w in v | dictsort %}{{ k }}={{ show(w, depth"
    " + 1) }};{% endfor %}{% elif v is iterable and v is not string %}[{% for w in v %}{{ show(w) }},{% endfor %}]"
    "{% else %}{{ v | trim }}{% endif %}{% endmacro %}{{ show(messages) }}{{ show(tools) }}",
    "python": "{% set u = messages[1].content %}{{ u.split('What')[-1].strip() }}{{ u[:2] }}"
    "{{ messages[::-1] | length }}"
    "{{ messages[2].get('none', 'else') }}{{ dict(a=1, b=2).items() | list }}{{ range(3) | join(',') }}"
    "{{ '%s-%d' % ('x', 3) }}{{ u.startswith('你') }}{{ messages | map(attribute='role') | unique | list }}",
    "reasoning": "{% for m in messages %}{{ m.thinking }}{{ m.reasoning_content }}"
    "{% if 'extra' in m %}!{% endif %}{% endfor %}",
    "date": "{{ strftime_now('%d %b %Y') }}{% if strftime_now is defined %}.{% endif %}",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE with `<|begin|>` and `<|end|>`; tests put templates beside it."""
    made = tmp_path_factory.mktemp("template")
    write_tokenizer(made, "llama-bpe")
    return settings(made, tokenizer_class="PreTrainedTokenizerFast", unk_token="!")


def with_template(folder: Path, to: Path, **config: Any) -> Path:
    shutil.copytree(folder, to, dirs_exist_ok=True)
    return settings(to, **config)


def theirs(folder: Path, chat: Any = CHAT, **options: Any) -> list[int]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if not options.get("continue_final_message"):
        options["add_generation_prompt"] = chat[-1]["role"] != "assistant"
    return tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False, **options)


@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_are_those_of_apply_chat_template(name: str, folder: Path, tmp_path: Path) -> None:
    with_template(folder, tmp_path, chat_template=TEMPLATES[name])
    now = datetime.now()
    ours = Tokenizer.from_folder(tmp_path).chat(CHAT, tools=TOOLS, documents=DOCUMENTS, now=now)
    assert ours == theirs(tmp_path, tools=TOOLS, documents=DOCUMENTS)
    if name not in ("json", "python", "reasoning"):  # which ask for later messages
        assert Tokenizer.from_folder(tmp_path).chat(CHAT[:2], now=now) == theirs(tmp_path, CHAT[:2])


@pytest.mark.parametrize(("name", "config", "files"), [
    ("a text", "config", {}),
    ("a list", [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}], {}),
    ("a file before the configuration", "config", {"chat_template.jinja": "file"}),
    ("files before a list", [{"name": "tool_use", "template": "t"}], {"chat_template.jinja": "file"}),
    ("more files", None, {"chat_template.jinja": "file", "additional_chat_templates/tool_use.jinja": "more"}),
    ("a default among them", None, {"chat_template.jinja": "f", "additional_chat_templates/default.jinja": "more"}),
    ("no file for all", "config", {"additional_chat_templates/tool_use.jinja": "more"}),
    ("a line's end", None, {"chat_template.jinja": "file\r\nline\n"}),
    ("none", None, {}),
])  # fmt: skip
@pytest.mark.parametrize("copied", [False, True])
def test_the_template_that_counts(
    name: str, config: Any, files: dict[str, str], copied: bool, folder: Path, tmp_path: Path
) -> None:
    del name
    with_template(folder, tmp_path / "a", **({"chat_template": config} if config else {}))
    for path, text in files.items():
        (tmp_path / "a" / path).parent.mkdir(exist_ok=True)
        (tmp_path / "a" / path).write_bytes(text.encode())
    if copied:  # what a quantized checkpoint and an artifact get
        (tmp_path / "b").mkdir()
        copy_files(tmp_path / "a", tmp_path / "b")
        assert not (tmp_path / "b" / "additional_chat_templates").exists()
    read = Tokenizer.from_folder(tmp_path / ("b" if copied else "a"))
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    for tools in (None, TOOLS):
        try:
            wanted = reference.apply_chat_template(CHAT, tools=tools, tokenize=True, return_dict=False)
        except ValueError:
            if read.template is None:
                assert config is None and not files
                continue
            with pytest.raises(InputError, match="no chat template is called 'default', found tool_use"):
                read.chat(CHAT, tools=tools)
        else:
            assert read.chat(CHAT, tools=tools) == wanted


@pytest.mark.parametrize("template", [TEMPLATES["chatml"], "{% for m in messages %}<|begin|>{{ m.content | trim }}"
                                      "<|end|>{% endfor %}"])  # fmt: skip
def test_the_last_message_is_continued(template: str, folder: Path, tmp_path: Path) -> None:
    with_template(folder, tmp_path, chat_template=template)
    ours = Tokenizer.from_folder(tmp_path)
    for text in ("It is", "It is ", " It is\n"):
        chat = [*CHAT[:2], {"role": "assistant", "content": text}]
        assert ours.chat(chat, resume=True) == theirs(tmp_path, chat, continue_final_message=True)
    for last in ({"role": "assistant"}, {"role": "assistant", "content": [{"type": "image"}]}):
        with pytest.raises(InputError, match="no text to continue"):
            ours.chat([*CHAT[:2], last], resume=True)
    with_template(folder, tmp_path, chat_template="{{ messages[0].content }}")
    with pytest.raises(InputError, match="leaves out the end"):
        Tokenizer.from_folder(tmp_path).chat([*CHAT[:2], {"role": "assistant", "content": "x"}], resume=True)


@pytest.mark.parametrize(
    "text", ["say <|end|>", "<|begin|><|end|>x", "a<|begin|>assistant\nb", "\ufdd0<|end|>\ufdd1\ufdd0"]
)
def test_a_users_control_tokens_are_spelled_out(text: str, folder: Path, tmp_path: Path) -> None:
    """As transformers does where it is asked to; it reads the same and no turn ends there."""
    with_template(folder, tmp_path, chat_template=TEMPLATES["chatml"])
    chat = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    ours = Tokenizer.from_folder(tmp_path)
    found = ours.chat(chat)
    bare = text.replace("\ufdd0", "").replace("\ufdd1", "")
    clean = [message | {"content": bare} for message in chat]
    assert found == theirs(tmp_path, clean, sanitize_control_tokens=True)
    assert (found.count(320), found.count(321)) == (2, 2)
    whole: Any = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert whole.decode(found) == whole.apply_chat_template(clean, tokenize=False)


def test_a_template_may_refuse_a_chat(folder: Path, tmp_path: Path) -> None:
    source = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}x"
    with_template(folder, tmp_path, chat_template=source)
    ours = Tokenizer.from_folder(tmp_path)
    ours.check_roles(["user"])
    with pytest.raises(InputError, match="refuses this chat: System role not supported") as caught:
        ours.check_roles(["system", "user"])
    assert str(tmp_path / "tokenizer_config.json") in str(caught.value)


@pytest.mark.parametrize("value", [3, ["x"], [{"name": "default"}], [{"name": 3, "template": "x"}], {"default": "x"},
                                   "x" * (2**20 + 1)])  # fmt: skip
def test_what_is_no_template_is_named(value: Any, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="chat_template must be a text"):
        Tokenizer.from_folder(with_template(folder, tmp_path, chat_template=value))


def test_files_of_templates_must_lie_in_the_folder(folder: Path, tmp_path: Path) -> None:
    with_template(folder, tmp_path / "a")
    (tmp_path / "x.jinja").write_text("x")
    (tmp_path / "a" / "chat_template.jinja").symlink_to(tmp_path / "x.jinja")
    with pytest.raises(InputError, match="points outside"):
        Tokenizer.from_folder(tmp_path / "a")
    assert template_files(tmp_path / "a") == ["chat_template.jinja"]


def test_without_a_template_a_chat_is_completed_as_text(folder: Path) -> None:
    ours = Tokenizer.from_folder(folder)
    assert ours.template is None
    chat = [Message("user", "one <|end|>"), Message("assistant", "two")]
    assert ours.chat(chat) == ours.encode("one <|end|>\ntwo", bos=True)
    ours.check_roles(["whoever"])


@pytest.mark.parametrize("marks", [("<|im_start|>", "<|im_end|>"), ("[|Human|]:", "[|AI|]:"), ("<reserved_106>",)])
def test_nothing_is_guessed_from_token_names(marks: tuple[str, ...], tmp_path: Path) -> None:
    shutil.copy(demo_checkpoint() / "tokenizer.model", tmp_path)
    settings(tmp_path, "added_tokens.json", **{mark: 6144 + i for i, mark in enumerate(marks) if mark[0] == "<"})
    assert Tokenizer.from_folder(settings(tmp_path, "config.json", model_type="llama")).template is None
    known = Tokenizer.from_folder(settings(tmp_path, "config.json", model_type="BlueLM")).template
    assert known is not None and not known.own


def test_a_template_of_its_own_counts_for_a_bluelm_too(tmp_path: Path) -> None:
    shutil.copy(demo_checkpoint() / "tokenizer.model", tmp_path)
    settings(tmp_path, "config.json", architectures=["BlueLMForCausalLM"])
    ours = Tokenizer.from_folder(settings(tmp_path, chat_template="{{ bos_token }}{{ messages[0].content }}!"))
    assert ours.chat([Message("user", "你好")]) == [1, *ours.encode("你好!")]


def test_bluelms_template_goes_with_a_checkpoint_for_other_tools(tmp_path: Path) -> None:
    """The folder says it is a Llama: transformers, vLLM and servers need the template written out."""
    shutil.copytree(demo_checkpoint(), tmp_path / "demo")
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好"},
            {"role": "assistant", "content": "Yes."}, {"role": "function", "content": "42"}]  # fmt: skip
    for begins in (True, False):
        settings(tmp_path / "demo", add_bos_token=begins)
        out = tmp_path / f"plain{begins}"
        out.mkdir()
        write_plain(tmp_path / "demo", out, ModelConfig.from_folder(demo_checkpoint()))
        settings(out, "config.json", model_type="llama")
        ours = Tokenizer.from_folder(tmp_path / "demo").chat(chat)
        assert ours == theirs(out, chat) == Tokenizer.from_folder(out).chat(chat)
        assert ours[0] == (1 if begins else ours[0]) and (1 in ours) is begins


def test_bluelms_template_takes_parts_and_refuses_tools() -> None:
    ours = Tokenizer.from_folder(demo_checkpoint())
    parts = [{"role": "user", "content": [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]}]
    assert ours.chat(parts) == ours.chat([Message("user", "你好")])
    with pytest.raises(InputError, match="no form for tools"):
        ours.chat([Message("user", "x")], tools=TOOLS)


def test_chatglm_adds_its_tokens_behind_the_pieces(tmp_path: Path) -> None:
    """ChatGLM's class over a SentencePiece model of ours; its folder names none of the added tokens."""
    shutil.copy(demo_checkpoint() / "tokenizer.model", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "chatglm", "eos_token_id": 2}))
    chatglm = Tokenizer.from_folder(tmp_path)
    assert chatglm.vocab_size == 6144 + len(CHATGLM_TOKENS)
    assert [chatglm.pieces.id(text) for text in CHATGLM_TOKENS] == list(range(6144, 6144 + 9))
