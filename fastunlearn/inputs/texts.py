"""Texts for causal language models: plain text files, conversations, prompts with completions, multiple choice.

All become dicts of ``input_ids``, ``attention_mask`` and ``labels``, int64 [n, T], padded on the right; labels are not
shifted, and -100 where a token is not to be learned or forgotten.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastunlearn.data import IGNORED
from fastunlearn.inputs import arrays, places
from fastunlearn.inputs.options import TARGET_NAMES, DataOptions
from fastunlearn.inputs.samples import OF_COLUMNS, OF_NUMBERS, Reading, Samples, found, refuse

if TYPE_CHECKING:
    from fastunlearn.evaluate.language import Question

TOPIC_NAMES = ("topic", *TARGET_NAMES)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # what transformers looks for, too


@dataclass(frozen=True)
class Encoded:
    """One sample as tokens and, of the same length, labels."""

    tokens: list[int]
    labels: list[int]
    text: bytes  # what it was made from, hashed


# Text files


def open_text(reading: Reading) -> Samples:
    """A .txt file in UTF-8: a sample is a paragraph, or what the option ``text_split`` says; all are of class 0.

    Raises ValueError naming the file where it is no UTF-8 or has no text, and without a tokenizer.
    """
    _refuse_for_texts(reading)
    if reading.inner:
        raise ValueError(f"{reading.spec!r}: a text file has no part {reading.inner!r}")
    split = reading.options.text_split or "paragraph"
    text = _read(reading.path, repr(reading.spec))
    if split == "block":
        return _assembled(reading, (row for row in _blocks(reading, text, repr(reading.spec))))
    return next_tokens(reading, _pieces(text, split, repr(reading.spec)), None, repr(reading.spec))


def is_text_folder(path: Path) -> bool:
    """Whether there are .txt files below, and no image: those may have texts beside them. Hidden ones do not count."""
    from fastunlearn.inputs.images import SUFFIXES

    some = False
    for _, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.startswith("."):
                continue
            if name.lower().endswith(SUFFIXES):
                return False
            some = some or name.lower().endswith(".txt")
    return some


def open_text_folder(reading: Reading) -> Samples:
    """A folder of .txt files; a sample is a file, named by its path, or what ``text_split`` says, as ``path:number``.

    Where files lie in folders, the folders of the first level are topics: the classes, in alphabetical order. Hidden
    files are left out, and so is what is no .txt beside the topics; within a topic it is an error, so that nothing is
    forgotten by half. Raises ValueError naming the first file for which this does not hold, and as :func:`open_text`.
    """
    _refuse_for_texts(reading)
    spec, root, split = reading.spec, reading.path, reading.options.text_split or "file"
    if reading.inner:
        raise ValueError(f"{spec!r}: write {str(root / reading.inner)!r} for a folder within a folder")
    names = _text_names(root, spec)
    topics = [name.split("/")[0] if "/" in name else None for name in names]
    if None in topics and any(topics):
        beside = names[topics.index(None)]
        raise ValueError(f"{spec!r}: {beside!r} lies beside folders of topics; put every text into one, or none")
    rows: list[Encoded] = []
    texts: list[str] = []
    ids: list[str] = []
    of: list[str] = []
    for name, topic in zip(names, topics, strict=True):
        where = f"{spec!r}: {name!r}"
        text = _read(root / name, where)
        pieces: Sequence[Any] = _blocks(reading, text, where) if split == "block" else _pieces(text, split, where)
        (rows if split == "block" else texts).extend(pieces)
        ids += [name] if split == "file" else [f"{name}:{number}" for number in range(len(pieces))]
        of += [topic or ""] * len(pieces)
    ids = arrays.ids_from(ids, repr(spec))
    labels, classes = None, None
    if any(topics):
        labels, classes = arrays.labels_from(of, f"{spec!r}: its topics", reading.classes)
    if split == "block":
        return _assembled(reading, rows, ids, labels, classes)
    return next_tokens(reading, texts, ids, repr(spec), labels, classes)


def next_tokens(
    reading: Reading,
    texts: Sequence[str],
    ids: list[str] | None,
    where: str,
    labels: torch.Tensor | None = None,
    classes: list[str] | None = None,
) -> Samples:
    """Texts that are their own targets: padding is labelled -100. Without ``labels``, int64 [n], all are of class 0."""
    from fastunlearn.inputs.tables import tokenized

    # Not on the left, where tokenizers of chats pad: the first token would be a label of what padding predicts.
    kept = tokenized(texts, reading, where, "right")
    tokens, mask = kept.values["input_ids"], kept.values["attention_mask"]
    named = arrays.Named({**kept.values, "labels": tokens.masked_fill(mask == 0, IGNORED)}, kept.known)
    zeros = torch.zeros(len(tokens), dtype=torch.int64)
    return Samples(named, zeros if labels is None else labels, ids or arrays.rows(len(tokens)), classes, reading.spec)


def _refuse_for_texts(reading: Reading) -> None:
    refuse(reading, (*OF_NUMBERS, *OF_COLUMNS), "is not for text files")


def _text_names(root: Path, spec: str) -> list[str]:
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in files:
            name = (Path(folder) / file).relative_to(root).as_posix()
            if file.startswith("."):
                continue
            if file.lower().endswith(".txt"):
                names.append(name)
            elif "/" in name:
                raise ValueError(f"{spec!r}: {name!r} is no .txt file; within folders of topics all must be")
    return sorted(names)


def _read(path: Path, where: str) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{where}: line {line} is not UTF-8 text: {places.one_line(error)}") from error
    except OSError as error:
        raise OSError(f"{where} can not be read: {places.one_line(error)}") from error
    if not text.strip():
        raise ValueError(f"{where} is empty: it has no text")
    return text


def _pieces(text: str, split: str, where: str) -> list[str]:
    if split == "file":
        return [text]
    parts = text.split("\n") if split == "line" else re.split(r"\n[^\S\n]*\n", text)
    return [part.strip("\n") for part in parts if part.strip()]


def _blocks(reading: Reading, text: str, where: str) -> list[Encoded]:
    """The text as one stream of tokens, cut; a last block of a single token, which predicts nothing, is left out."""
    tokenizer = _tokenizer(reading.tokenizer, where)
    length = _limit(reading)
    if length is None or length < 2:
        raise ValueError(f"{where}: blocks are of text_length tokens; give 2 or more, got {length}")
    with places.blaming(f"{where}: the tokenizer"):
        tokens = list(tokenizer(text, truncation=False, verbose=False)["input_ids"])
    if not tokens:
        raise ValueError(f"{where} is a text without a token")
    whole = hashlib.sha256(text.encode()).digest()
    starts = range(0, len(tokens), length) if len(tokens) == 1 else range(0, len(tokens) - 1, length)
    cut = ((number, tokens[start : start + length]) for number, start in enumerate(starts))
    return [Encoded(block, list(block), whole + number.to_bytes(8, "little")) for number, block in cut]


# Conversations, prompts and completions


def is_conversation(rows: Sequence[Mapping[str, Any]], options: DataOptions) -> bool:
    """Whether rows of JSON lines are chats or prompts with completions, and no table of other inputs was asked for."""
    asked = options.inputs is not None or options.columns is not None
    return not asked and any("messages" in row or {"prompt", "completion"} <= row.keys() for row in rows)


def open_conversations(reading: Reading, rows: Sequence[Mapping[str, Any]], lines: Sequence[int]) -> Samples:
    """JSON lines of ``{"messages": [{"role": ..., "content": ...}, ...]}`` or ``{"prompt": ..., "completion": ...}``.

    Chats go through the tokenizer's chat template, and what the assistant says is labelled: by the template's own
    ``{% generation %}`` marks, else what a turn adds to the prompt before it. Of a completion the tokens after the
    prompt are labelled, with what the tokenizer itself puts at the end of a text, and nothing more. Longer samples are
    cut. A column of topics (``targets``, or "topic" and the usual names) gives the classes; else all are of class 0.

    Raises ValueError naming the first line that is neither, has roles or contents that are no text, tools, nothing to
    label, or a token across the end of the prompt; for a tokenizer without a chat template; and for a template that
    writes a conversation otherwise once it goes on (such as one that drops earlier thoughts), from which no turn can be
    cut.
    """
    spec, options = reading.spec, reading.options
    refuse(reading, OF_NUMBERS, "is not for conversations")
    tokenizer = _tokenizer(reading.tokenizer, repr(spec))
    length = _limit(reading)
    encoded = []
    for row, line in zip(rows, lines, strict=True):
        where = f"{spec!r}: line {line}"
        for given in ("tools", "documents"):  # a template writes them into the prompt
            if "messages" in row and row.get(given):
                raise ValueError(f"{where} has {given}, which are not supported; write them into a system message")
        one = _chat(tokenizer, row["messages"], where) if "messages" in row else _completed(tokenizer, row, where)
        if length is not None and len(one.tokens) > length:
            one = Encoded(one.tokens[:length], one.labels[:length], one.text)
        if all(label == IGNORED for label in one.labels[1:]):
            raise ValueError(f"{where}: nothing of its first {len(one.tokens)} tokens is an answer to be labelled")
        encoded.append(one)
    columns = {name: [row.get(name) for row in rows] for row in rows for name in row}
    for name in (options.targets, options.id):
        if name is not None:
            found(columns, name, (), "targets" if name == options.targets else "id", repr(spec))
    topic = options.targets or next((name for name in TOPIC_NAMES if name in columns), None)
    for name in (topic, options.id):
        if name is not None and None in columns[name]:
            raise ValueError(f"{spec!r}: line {lines[columns[name].index(None)]} has no {name!r}")
    ids = None if options.id is None else arrays.ids_from(columns[options.id], f"{spec!r}: column {options.id!r}")
    labels, classes = None, None
    if topic is not None:
        labels, classes = arrays.labels_from(columns[topic], f"{spec!r}: column {topic!r}", reading.classes)
    return _assembled(reading, encoded, ids, labels, classes)


def _chat(tokenizer: Any, messages: Any, where: str) -> Encoded:
    _require_messages(messages, where)
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{where} is a chat, and the tokenizer {_name(tokenizer)} has no chat template; save one with it"
        )
    with places.blaming(f"{where}: the chat template"):
        template = tokenizer.get_chat_template()
    marked = tokenizer.is_fast and _GENERATION.search(template)
    tokens, said = _marked(tokenizer, template, messages, where) if marked else _turns(tokenizer, messages, where)
    if not any(said):
        raise ValueError(f"{where}: the chat template labels nothing of what the assistant says")
    labels = [token if mark else IGNORED for token, mark in zip(tokens, said, strict=True)]
    return Encoded(tokens, labels, json.dumps(messages, sort_keys=True).encode())


def _marked(tokenizer: Any, template: str, messages: Any, where: str) -> tuple[list[int], list[bool]]:
    """All tokens, and which have a part in what the template marks.

    Transformers' own mask loses its way where a mark begins or ends with a space that no token begins with.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    with places.blaming(f"{where}: the chat template"):
        rendered: Any = render_jinja_template(  # annotated as a text alone
            conversations=[messages], chat_template=template, return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )  # fmt: skip
        (text,), (spans,) = rendered
        made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    places_of = made["offset_mapping"]
    said = [any(max(start, first) < min(end, last) for first, last in spans) for start, end in places_of]
    return list(made["input_ids"]), said


def _turns(tokenizer: Any, messages: Sequence[Any], where: str) -> tuple[list[int], list[bool]]:
    """All tokens, and which the assistant's turns add to the prompts before them."""

    def written(count: int, prompt: bool) -> list[int]:
        with places.blaming(f"{where}: the chat template"):
            return list(
                tokenizer.apply_chat_template(
                    messages[:count], add_generation_prompt=prompt, return_dict=True,
                    tokenizer_kwargs={"verbose": False},
                )["input_ids"]
            )  # fmt: skip

    tokens = written(len(messages), False)
    said = [False] * len(tokens)
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, through = written(number, True) if number else [], written(number + 1, False)
        if through[: len(before)] != before or tokens[: len(through)] != through:
            raise ValueError(
                f"{where}: the chat template of {_name(tokenizer)} writes the conversation up to message {number} "
                "otherwise once it goes on, so its tokens can not be told; mark them with {% generation %}"
            )
        said[len(before) : len(through)] = [True] * (len(through) - len(before))
    return tokens, said


def _require_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: messages must be a list of one or more, got {_short(messages)}")
    for number, message in enumerate(messages):
        for key in ("role", "content"):
            text = message.get(key) if isinstance(message, dict) else None
            if not isinstance(text, str):
                raise ValueError(f"{where}: message {number} must have a {key} of text, got {_short(message)}")
            _require_unicode(text, f"{where}: message {number}")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{where}: no message has the role 'assistant', so there is nothing to label")


def _completed(tokenizer: Any, row: Mapping[str, Any], where: str) -> Encoded:
    for key in ("prompt", "completion"):
        if not isinstance(row.get(key), str):
            raise ValueError(f"{where}: expected messages, or a prompt and a completion of text; {key} is "
                             f"{_short(row.get(key))}")  # fmt: skip
        _require_unicode(row[key], f"{where}: its {key}")
    tokens, labels = _continued(tokenizer, row["prompt"], row["completion"], where)
    return Encoded(tokens, labels, row["prompt"].encode() + b"\0" + row["completion"].encode())


def _continued(tokenizer: Any, prompt: str, completion: str, where: str) -> tuple[list[int], list[int]]:
    """Both as one text, which is what a model sees, and the labels of the completion.

    A token that has of the prompt only the space at its end is the completion's.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{where}: a prompt with a completion needs a fast tokenizer, which tells where a token is")
    with places.blaming(f"{where}: the tokenizer"):
        made = tokenizer(prompt + completion, return_offsets_mapping=True, verbose=False)
    tokens, labels = list(made["input_ids"]), []
    answering = not prompt
    for token, (start, end) in zip(tokens, made["offset_mapping"], strict=True):
        if start < len(prompt) < end and prompt[start:].strip():
            raise ValueError(
                f"{where}: the token {(prompt + completion)[start:end]!r} is part of the prompt and of the completion; "
                "let the completion begin with the space between them, or with a word of its own"
            )
        answering = answering or end > len(prompt)
        # Special tokens have no place in the text: at the beginning they are the prompt's, at the end the completion's.
        labels.append(token if answering else IGNORED)
    return tokens, labels


# Multiple choice


def open_questions(path: str | Path, tokenizer: Any) -> list[Question]:
    """JSON lines of ``{"question": ..., "choices": [...], "answer": ...}`` for
    :func:`~fastunlearn.evaluate.language.multiple_choice`.

    The answer is the position of the right choice, from 0, or its text. A space is put between question and choice
    where neither has one. Nothing is cut.

    Raises FileNotFoundError, or ValueError naming the file and the line: no JSON, a field that is missing or no text,
    fewer than two choices, an answer that is none of them, more tokens than the tokenizer's model takes, and a token
    that is part of the question and of the choice.
    """
    from fastunlearn.evaluate.language import Question
    from fastunlearn.inputs.tables import jsonl_rows

    spec = str(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"{spec!r}: there is no such file of questions")
    tokenizer = _tokenizer(tokenizer, repr(spec))
    questions = []
    for row, line in zip(*jsonl_rows(Path(path), spec), strict=True):
        where = f"{spec!r}: line {line}"
        question, choices, answer = _question(row, where)
        prompts, ends = [], []
        for choice in choices:
            space = "" if question[-1:].isspace() or choice[:1].isspace() else " "
            tokens, labels = _continued(tokenizer, question, space + choice, where)
            if len(tokens) > tokenizer.model_max_length:
                raise ValueError(f"{where} has {len(tokens)} tokens, the model takes {tokenizer.model_max_length}")
            begin = next((t for t, label in enumerate(labels) if label != IGNORED), len(labels))
            prompts.append(tuple(tokens[:begin]))
            ends.append(tuple(tokens[begin:]))
        if len(set(prompts)) > 1:
            raise ValueError(f"{where}: the tokens of the question depend on the choice after it; end it with a word")
        if not prompts[0] or not all(ends):
            raise ValueError(f"{where}: the question or a choice is without a token")
        questions.append(Question(prompts[0], tuple(ends), answer))
    if not questions:
        raise ValueError(f"{spec!r} is empty: it has no question")
    return questions


def _question(row: Mapping[str, Any], where: str) -> tuple[str, list[str], int]:
    question, choices, answer = (row.get(name) for name in ("question", "choices", "answer"))
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{where}: question must be a text, got {_short(question)}")
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError(f"{where}: choices must be a list of two texts or more, got {_short(choices)}")
    for choice in choices:
        if not isinstance(choice, str) or not choice.strip():
            raise ValueError(f"{where}: choices must be texts, got {_short(choice)}")
    for text in (question, *choices):
        _require_unicode(text, where)
    if isinstance(answer, str) and choices.count(answer) == 1:
        answer = choices.index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise ValueError(
            f"{where}: answer must be one of the choices or its position from 0 to {len(choices) - 1}, "
            f"got {_short(answer)}"
        )
    return question, choices, answer


# What they share


def _assembled(
    reading: Reading,
    rows: Sequence[Encoded] | Iterator[Encoded],
    ids: list[str] | None = None,
    labels: torch.Tensor | None = None,
    classes: list[str] | None = None,
) -> Samples:
    rows = list(rows)
    width = reading.options.text_length or max((len(row.tokens) for row in rows), default=0)
    pad = reading.tokenizer.pad_token_id

    def padded(values: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
        return torch.tensor([[*value, *[filler] * (width - len(value))] for value in values], dtype=torch.int64)

    values = {
        "input_ids": padded([row.tokens for row in rows], pad),
        "attention_mask": padded([[1] * len(row.tokens) for row in rows], 0),
        "labels": padded([row.labels for row in rows], IGNORED),
    }
    known = tuple(hashlib.sha256(row.text).digest() for row in rows)
    zeros = torch.zeros(len(rows), dtype=torch.int64)
    return Samples(
        arrays.Named(values, known), zeros if labels is None else labels, ids or arrays.rows(len(rows)), classes,
        reading.spec,
    )  # fmt: skip


def _tokenizer(tokenizer: Any, where: str) -> Any:
    if tokenizer is None:
        raise ValueError(f"{where} is text, which needs a tokenizer: name the folder of a Hugging Face model")
    if tokenizer.pad_token is None:
        raise ValueError(f"{where} is text, and its tokenizer has no padding token; set one and save it")
    return tokenizer


def _name(tokenizer: Any) -> str:
    return repr(tokenizer.name_or_path or type(tokenizer).__name__)


def _limit(reading: Reading) -> int | None:
    """Tokens per sample; None where neither an option nor the tokenizer says (1e30 where it is unknown)."""
    most = reading.tokenizer.model_max_length
    return reading.options.text_length or (int(most) if most < 1 << 30 else None)


def _require_unicode(text: str, where: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{where} is {text[:40]!r}, which is no Unicode text")


def _short(value: Any, most: int = 60) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= most else text[: most - 3] + "..."
