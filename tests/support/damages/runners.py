"""What an artifact's own program reads wrongly, each with the figure in that program that must tell of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from executorch.exir._serialize._program import PTEFile
from executorch.exir.schema import Double
from gguf import GGUFReader
from onnx import numpy_helper

from bluelm.config import ModelConfig
from bluelm.rope import rope_table
from export.artifacts.artifact import Artifact
from tests.support import damage
from tests.support.damages.files import in_program
from tests.support.damages.metadata import attributes, coreai, decoder, edited, mlx, model, settings
from tests.support.damages.record import Damage
from tests.support.edits import litert, litert_lm, xnnpack
from tests.support.files.gguf_files import rewrite

Files = Callable[[Artifact], Artifact]
TOKENS, CHATS, ENDS = "runner_token_mismatches", "runner_chat_mismatches", "runner_end_faults"
KL, REFUSED = "runner_kl_excess", "runner_refusals"
MARKS, SWAPPED = (4, 5), ("▁s", "ea")  # pieces of the demo: the marks of turns; two that merge in each other's turn
CONTENTS = "{% for m in messages %}{{ m.content }}{% endfor %}"
TURNS = "{% for m in messages %}[|Human|]:{{ m.content }}[|AI|]:{% endfor %}"
TALK = "{% for m in messages %}[|Human|]:{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}[|AI|]:"
PARTS = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
BASE = 500.0  # of rope
GGML = "tokenizer.ggml."
PTE, LM = "executorch-xnnpack", "litert-lm"
COREAI = "model/tokenizer"


def gguf(**values: Any) -> Files:
    """model.gguf with other values of keys, "__" for "."; None takes one out, a function is given what was there."""

    def files(artifact: Artifact) -> Artifact:
        path = artifact.path("model")
        named = {key.replace("__", "."): value for key, value in values.items()}
        held = GGUFReader(path).fields
        rewrite(path, {key: value(held) if callable(value) else value for key, value in named.items()})
        return damage.again(artifact)

    return files


def plain_marks(held: Any) -> list[int]:
    """Kinds of pieces, those of the marks of turns as of any other."""
    return [1 if at in MARKS else kind for at, kind in enumerate(held[f"{GGML}token_type"].contents())]


def swapped_scores(held: Any) -> list[float]:
    """Two pieces' in each other's place."""
    first, second = map(held[f"{GGML}tokens"].contents().index, SWAPPED)
    scores = list(held[f"{GGML}scores"].contents())
    scores[first], scores[second] = scores[second], scores[first]
    return scores


def swapped_merges(table: dict[str, Any]) -> None:
    """What makes two pieces, in each other's place."""
    merges = table["model"]["merges"]
    first, second = ([i for i, pair in enumerate(merges) if pair.replace(" ", "") == text] for text in SWAPPED)
    for a, b in zip(first, second, strict=False):
        merges[a], merges[b] = merges[b], merges[a]


def unmarked(table: dict[str, Any]) -> None:
    """The marks of turns are plain pieces."""
    table["added_tokens"] = [token for token in table["added_tokens"] if token["id"] not in MARKS]


def template(text: str | None, name: str = "chat_template.jinja") -> Files:
    """Another chat template beside the model; None: none."""

    def files(artifact: Artifact) -> Artifact:
        path = artifact.folder / name
        if text is None:
            path.unlink()
            kept = [file for file in artifact.files if file.path != name]
            artifact.model_copy(update={"files": tuple(kept)}).save(artifact.folder)
            return Artifact.open(artifact.folder)
        path.write_text(text, encoding="utf-8")
        return damage.again(artifact)

    return files


def turned(artifact: Artifact) -> Artifact:
    """model.onnx with rope tables of another base."""
    path, config = artifact.path("model"), artifact.model
    other = ModelConfig(**{**vars(config), "rope_theta": BASE})
    found = onnx.load(path, load_external_data=False)
    for name, angles in zip(("rope.cos", "rope.sin"), rope_table(other, artifact.context), strict=True):
        kept = next(tensor for tensor in found.graph.initializer if tensor.name == name)
        half = np.ascontiguousarray(angles.numpy()[:, : config.head_dim // 2])
        kept.CopyFrom(numpy_helper.from_array(half, name))
    onnx.save(found, path)
    return damage.again(artifact)


def fewer_ends(file: PTEFile) -> None:
    """`get_eos_ids` without its last one."""
    xnnpack.plan(file, "get_eos_ids").outputs.pop()


def other_base(model: Any, contents: list[bytearray]) -> None:
    """The cosines of a rope table of another base."""
    tensor = litert.tensors(model, "rope.cos.table")[0]
    positions, size = map(int, tensor.shape)
    angles = np.arange(positions)[:, None] * BASE ** (-np.arange(0, size, 2) / size)[None]
    contents[tensor.buffer][:] = np.cos(np.concatenate([angles, angles], 1)).astype(np.float32).tobytes()


def another_signature(model: Any, contents: list[bytearray]) -> None:
    """LiteRT-LM decodes by the name `decode`."""
    found = next(one for one in model.signatureDefs if one.signatureKey == b"decode")
    found.signatureKey = b"decodo"


def begun_by_7(told: Any) -> None:
    told.start_token.token_ids.ids[:] = [7]


def chat_template(text: str) -> Files:
    """In the metadata of a .litertlm."""
    return litert_lm.told(lambda told: setattr(told, "jinja_prompt_template", text))


SEEN: dict[str, tuple[str, str, Files]] = {
    "gguf: marks of a plain kind": ("gguf", TOKENS, gguf(tokenizer__ggml__token_type=plain_marks)),
    "gguf: swapped scores": ("gguf", TOKENS, gguf(tokenizer__ggml__scores=swapped_scores)),
    "gguf: a space before text": ("gguf", TOKENS, gguf(tokenizer__ggml__add_space_prefix=True)),
    "gguf: no begin token": ("gguf", TOKENS, gguf(tokenizer__ggml__add_bos_token=False)),
    "gguf: another begin token": ("gguf", TOKENS, gguf(tokenizer__ggml__bos_token_id=7)),
    "gguf: no template": ("gguf", CHATS, gguf(tokenizer__chat_template=None)),
    "gguf: another template": ("gguf", CHATS, gguf(tokenizer__chat_template=CONTENTS)),
    "gguf: two begin tokens in chats": ("gguf", CHATS, gguf(tokenizer__chat_template=f"<s><s>{TURNS}")),
    "gguf: one end token of two": ("gguf", ENDS, gguf(tokenizer__ggml__eot_token_id=None)),
    "gguf: eps 0.1": ("gguf", KL, gguf(llama__attention__layer_norm_rms_epsilon=0.1)),
    "gguf: rope base 500": ("gguf", KL, gguf(llama__rope__freq_base=BASE)),
    "gguf: another context": ("gguf", REFUSED, gguf(llama__context_length=4096)),
    "gguf: other kv heads": ("gguf", REFUSED, gguf(llama__attention__head_count_kv=2)),
    "genai: marks of a plain kind": ("onnx-genai", TOKENS, edited("tokenizer.json", unmarked)),
    "genai: swapped scores": ("onnx-genai", TOKENS, edited("tokenizer.json", swapped_merges)),
    "genai: a space before text": (
        "onnx-genai", TOKENS,
        edited("tokenizer.json", lambda t: t["decoder"]["decoders"].append({"type": "Strip", "content": " "})),
    ),
    "genai: text cut as Llama 3's": (
        "onnx-genai", TOKENS, edited("tokenizer.json", lambda t: t.update(pre_tokenizer=None))
    ),
    "genai: no template": ("onnx-genai", CHATS, template(None)),
    "genai: another template": ("onnx-genai", CHATS, template(CONTENTS)),
    "genai: no begin token in chats": ("onnx-genai", CHATS, template(TURNS)),
    "genai: two begin tokens in chats": ("onnx-genai", CHATS, template(f"<s><s>{TURNS}")),
    "genai: one end token of two": ("onnx-genai", ENDS, model(eos_token_id=2)),
    "genai: eps 0.1": ("onnx-genai", KL, attributes("SkipSimplifiedLayerNormalization", epsilon=0.1)),
    "genai: rope base 500": ("onnx-genai", KL, turned),
    "genai: attention window of 200": ("onnx-genai", KL, attributes("GroupQueryAttention", local_window_size=200)),
    "genai_config: another context": ("onnx-genai", REFUSED, model(context_length=8192)),
    "genai: other kv heads": ("onnx-genai", REFUSED, attributes("GroupQueryAttention", kv_num_heads=2)),
    "genai_config: a missing file": ("onnx-genai", REFUSED, decoder(filename="other.onnx")),
    "genai_config: sliding window": ("onnx-genai", REFUSED, decoder(sliding_window={"window_size": 200})),
    "mlx: marks of a plain kind": ("mlx", TOKENS, edited("model/tokenizer.json", unmarked)),
    "mlx: swapped merges": ("mlx", TOKENS, edited("model/tokenizer.json", swapped_merges)),
    "mlx: nothing begins a text": ("mlx", TOKENS, mlx("tokenizer", post_processor=None)),
    "mlx: no template": ("mlx", CHATS, template(None, "model/chat_template.jinja")),
    "mlx: another template": ("mlx", CHATS, template(CONTENTS, "model/chat_template.jinja")),
    "mlx: two begin tokens in chats": ("mlx", CHATS, template(f"<s><s>{TURNS}", "model/chat_template.jinja")),
    "mlx: one end token of two": ("mlx", ENDS, mlx("generation_config", eos_token_id=[2])),
    "mlx: eps 0.1": ("mlx", KL, mlx(rms_norm_eps=0.1)),
    "mlx: rope base 500": ("mlx", KL, mlx(rope_theta=BASE)),
    "mlx: another context": ("mlx", REFUSED, mlx(max_position_embeddings=4096)),
    "coreai: marks of a plain kind": ("coreai", TOKENS, edited(f"{COREAI}/tokenizer.json", unmarked)),
    "coreai: swapped merges": ("coreai", TOKENS, edited(f"{COREAI}/tokenizer.json", swapped_merges)),
    "coreai: nothing begins a text": (
        "coreai", TOKENS, edited(f"{COREAI}/tokenizer.json", lambda t: t.update(post_processor=None))
    ),
    "coreai: no template": ("coreai", CHATS, template(None, f"{COREAI}/chat_template.jinja")),
    "coreai: another template": ("coreai", CHATS, template(CONTENTS, f"{COREAI}/chat_template.jinja")),
    "coreai: one end token of two": ("coreai", ENDS, settings(additional_special_tokens=[])),
    "coreai: another context": ("coreai", REFUSED, coreai(max_context_length=4096)),
    "coreai: another vocabulary": ("coreai", REFUSED, coreai(vocab_size=4096)),
    "coreai: another function": ("coreai", REFUSED, coreai(function_map={"main": ["other"]})),
    "pte: marks of a plain kind": (PTE, TOKENS, edited("tokenizer.json", unmarked)),
    "pte: swapped merges": (PTE, TOKENS, edited("tokenizer.json", swapped_merges)),
    "pte: nothing begins a text": (PTE, TOKENS, edited("tokenizer.json", lambda t: t.update(post_processor=None))),
    "pte: no template": (PTE, CHATS, template(None)),
    "pte: another template": (PTE, CHATS, template(CONTENTS)),
    "pte: two begin tokens in chats": (PTE, CHATS, template(f"<s><s>{TURNS}")),
    "pte: one end token of two": (PTE, ENDS, in_program(fewer_ends)),
    "pte: another context": (PTE, REFUSED, in_program(xnnpack.answer("get_max_context_len", 4096))),
    "pte: longer steps": (PTE, REFUSED, in_program(xnnpack.answer("get_max_seq_len", 512))),
    "pte: no cache": (PTE, REFUSED, in_program(xnnpack.answer("use_kv_cache", False))),
    "pte: scores times 0.3": (PTE, KL, in_program(xnnpack.argument("custom_sdpa", 7, Double(double_val=0.3)))),
    "lm: marks of a plain kind": (LM, TOKENS, litert_lm.table(unmarked)),
    "lm: swapped merges": (LM, TOKENS, litert_lm.table(swapped_merges)),
    "lm: nothing begins a text": (LM, TOKENS, litert_lm.told(lambda told: told.ClearField("start_token"))),
    "lm: another begin token": (LM, TOKENS, litert_lm.told(begun_by_7)),
    "lm: no template": (LM, CHATS, litert_lm.told(lambda told: told.ClearField("jinja_prompt_template"))),
    "lm: another template": (LM, CHATS, chat_template(PARTS)),
    "lm: a template of texts alone": (LM, CHATS, chat_template(TURNS)),
    "lm: two begin tokens in chats": (LM, CHATS, chat_template(f"<s>{TALK}")),
    "lm: one end token of two": (LM, ENDS, litert_lm.told(lambda told: told.stop_tokens.pop())),
    "lm: eps 0.1": (LM, KL, litert_lm.graph(litert.number("epsilon", 0, lambda x: 0.1))),
    "lm: rope base 500": (LM, KL, litert_lm.graph(other_base)),
    "lm: another context": (LM, REFUSED, litert_lm.told(lambda told: setattr(told, "max_num_tokens", 256))),
    "lm: a signature's name": (LM, REFUSED, litert_lm.graph(another_signature)),
}  # fmt: skip
"""By name: the format, the figure, and what is done."""
ROWS = tuple(Damage(name, (kind,), files=change) for name, (kind, _, change) in SEEN.items())
