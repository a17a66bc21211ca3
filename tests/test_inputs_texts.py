"""Text files, chats, prompts with completions and multiple choice: samples, labels, topics, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastunlearn.inputs import DataOptions, Loader, Samples, open_samples, select
from fastunlearn.inputs.texts import open_questions

WORDS = ["[PAD]", "[UNK]", "<s>", "</s>", "user", "assistant", "system", ":", "the", "cat", "sat", "dog", "ran", "off"]
CHATML = "{% for m in messages %}<s> {{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}"
PROMPTED = CHATML + "{% if add_generation_prompt %}<s> assistant : {% endif %}"
MARKED = (
    "{% for m in messages %}<s> {{ m['role'] }} : {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    " </s> {% endgeneration %}{% else %}{{ m['content'] }} </s> {% endif %}{% endfor %}"
)
# The template writes of earlier answers only the first letter, as those do that drop earlier thoughts.
FORGETFUL = (
    "{% for m in messages %}<s> {{ m['role'] }} : {{ m['content'] if loop.last else 'off' }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant : {% endif %}"
)
CHAT = [
    {"role": "system", "content": "the dog"},
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat off"},
    {"role": "user", "content": "dog"},
    {"role": "assistant", "content": "ran"},
]
Write = Callable[[Path], str]


def tokenizer(template: str | None = None, begin: bool = False, **more: Any) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begin:
        words.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 2), ("</s>", 3)])
    given = {"pad_token": "[PAD]", "unk_token": "[UNK]"} | more
    made = PreTrainedTokenizerFast(tokenizer_object=words, name_or_path="models/words", **given)
    made.chat_template = template
    return made


def bytes_tokenizer() -> Any:
    """As GPT-2's: a space belongs to the word after it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: n for n, letter in enumerate([*letters, "Ġc", "Ġca", "Ġcat", "ca", "cat", "<pad>"])}
    merges = [("Ġ", "c"), ("Ġc", "a"), ("Ġca", "t"), ("c", "a"), ("ca", "t")]
    made = Tokenizer(models.BPE(vocabulary, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>")


def words_of(tokens: torch.Tensor) -> str:
    return " ".join(WORDS[token] if token >= 0 else "-" for token in tokens.tolist())


def said(samples: Samples, row: int = 0) -> tuple[str, str]:
    batch = samples.batch(torch.tensor([row]))
    return words_of(batch["input_ids"][0]), words_of(batch["labels"][0])


def written(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def lines(path: Path, *rows: Any) -> str:
    return written(path, "\n".join(map(json.dumps, rows)))


# Text files

POEM = "the cat\nsat\n\n\n the dog\n  \nran off\r\n\r\noff\n"


@pytest.mark.parametrize(
    ("split", "texts"),
    [
        (None, ["the cat sat", "the dog", "ran off", "off"]),
        ("paragraph", ["the cat sat", "the dog", "ran off", "off"]),
        ("line", ["the cat", "sat", "the dog", "ran off", "off"]),
        ("file", ["the cat sat the dog ran off off"]),
    ],
)
def test_a_text_file_is_split_as_asked(tmp_path: Path, split: str | None, texts: list[str]) -> None:
    path = written(tmp_path / "poem.txt", POEM)
    samples = open_samples(path, options=DataOptions(text_split=split), tokenizer=tokenizer())
    batch = samples.batch(torch.arange(len(samples)))
    assert [words_of(row[row != 0]) for row in batch["input_ids"]] == texts
    assert torch.equal(batch["labels"], batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100))
    assert torch.equal(batch["attention_mask"], (batch["input_ids"] != 0).long())
    assert samples.ids == [str(n) for n in range(len(texts))] and samples.labels.tolist() == [0] * len(texts)
    assert all(value.dtype == torch.int64 for value in batch.values())


@pytest.mark.parametrize("count", [1, 4, 5, 8, 9, 10])
def test_blocks_are_the_text_cut_into_equal_parts_without_a_loss(tmp_path: Path, count: int) -> None:
    words = [WORDS[8 + n % 6] for n in range(count)]
    path = written(tmp_path / "a.txt", " ".join(words))
    samples = open_samples(path, options=DataOptions(text_split="block", text_length=4), tokenizer=tokenizer())
    batch = samples.batch(torch.arange(len(samples)))
    assert batch["input_ids"].shape == (len(samples), 4)
    found = words_of(batch["input_ids"][batch["attention_mask"].bool()]).split()
    alone = count > 1 and count % 4 == 1  # a last token that nothing predicts
    assert found == words[: count - alone] and len(samples) == -(-(count - alone) // 4)


def test_blocks_are_as_long_as_the_model_takes_without_an_option(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", "the cat sat off " * 3)
    samples = open_samples(path, options=DataOptions(text_split="block"), tokenizer=tokenizer(model_max_length=6))
    assert len(samples) == 2 and samples.signature()["input_ids"]["shape"] == [6]


def test_folders_of_a_folder_are_topics_and_paths_are_ids(tmp_path: Path) -> None:
    for name, text in {"cats/b/2.txt": "cat", "cats/1.txt": "the cat sat\n\noff", "dogs/1.TXT": "dog ran"}.items():
        written(tmp_path / "set" / name, text)
    written(tmp_path / "set" / "README.md", "beside the topics")
    written(tmp_path / "set" / ".hidden" / "x.bin", "-")
    samples = open_samples(str(tmp_path / "set"), tokenizer=tokenizer())
    assert samples.ids == ["cats/1.txt", "cats/b/2.txt", "dogs/1.TXT"] and samples.classes == ["cats", "dogs"]
    assert said(samples) == ("the cat sat off", "the cat sat off")
    forget = Loader(samples, select(samples, "class:cats"), 8)
    assert [len(batch["labels"]) for batch in forget] == [2]
    pieces = open_samples(str(tmp_path / "set"), options=DataOptions(text_split="paragraph"), tokenizer=tokenizer())
    assert pieces.ids == ["cats/1.txt:0", "cats/1.txt:1", "cats/b/2.txt:0", "dogs/1.TXT:0"]
    assert pieces.labels.tolist() == [0, 0, 0, 1]
    blocks = DataOptions(text_split="block", text_length=2)
    streams = open_samples(str(tmp_path / "set"), options=blocks, tokenizer=tokenizer())
    assert streams.ids == ["cats/1.txt:0", "cats/1.txt:1", "cats/b/2.txt:0", "dogs/1.TXT:0"]
    known = open_samples(str(tmp_path / "set"), tokenizer=tokenizer(), classes=["birds", "cats", "dogs"])
    assert known.labels.tolist() == [1, 1, 2]


def test_a_folder_without_folders_has_one_class(tmp_path: Path) -> None:
    written(tmp_path / "a.txt", "the cat")
    written(tmp_path / "b.txt", "the dog")
    samples = open_samples(str(tmp_path), tokenizer=tokenizer())
    assert samples.classes is None and samples.ids == ["a.txt", "b.txt"] and samples.labels.tolist() == [0, 0]


def test_images_with_texts_beside_them_are_still_images(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "cats").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "cats" / "1.png")
    written(tmp_path / "about.txt", "the cat")
    assert open_samples(str(tmp_path)).signature() == {"shape": [3, 4, 4], "dtype": "float32"}


def test_texts_with_hidden_images_beside_them_are_still_texts(tmp_path: Path) -> None:
    written(tmp_path / "cats" / "1.txt", "the cat")
    written(tmp_path / ".thumbnails" / "1.png", "")
    written(tmp_path / "cats" / ".1.png", "")
    assert open_samples(str(tmp_path), tokenizer=tokenizer()).ids == ["cats/1.txt"]


def test_texts_are_padded_on_the_right_whatever_the_tokenizer_does_for_chats(tmp_path: Path) -> None:
    words = tokenizer()
    words.padding_side = "left"
    path = written(tmp_path / "a.txt", "the cat\n\nran")
    batch = open_samples(path, tokenizer=words).batch(torch.tensor([0, 1]))
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert (batch["labels"] != -100).tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize("split", ["paragraph", "block"])
def test_the_digest_sees_words_that_the_tokenizer_does_not_know(tmp_path: Path, split: str) -> None:
    options = DataOptions(text_split=split, text_length=4)
    digests = {
        open_samples(written(tmp_path / "a.txt", text), options=options, tokenizer=tokenizer()).digest()
        for text in ("the bird", "the Bird", "the bird")
    }
    assert len(digests) == 2


# Chats


@pytest.mark.parametrize("template", [PROMPTED, MARKED], ids=["by prefixes", "by marks"])
def test_of_a_chat_the_assistant_s_turns_are_labelled(tmp_path: Path, template: str) -> None:
    short = [CHAT[1], CHAT[4]]
    path = lines(tmp_path / "chats.jsonl", {"messages": CHAT}, {"messages": short})
    samples = open_samples(path, tokenizer=tokenizer(template))
    full = "<s> system : the dog </s> <s> user : the cat </s> <s> assistant : sat off </s> <s> user : dog </s> "
    full += "<s> assistant : ran </s>"
    answers = "- " * (6 + 6 + 3) + "sat off </s> " + "- " * (5 + 3) + "ran </s>"
    assert said(samples) == (full, answers)
    tokens, labels = said(samples, 1)
    assert tokens == "<s> user : the cat </s> <s> assistant : ran </s>" + " [PAD]" * 17
    assert labels == "- " * 9 + "ran </s>" + " -" * 17
    assert samples.batch(torch.arange(2))["attention_mask"].sum(1).tolist() == [28, 11]


def test_a_template_without_a_prompt_for_the_answer_labels_the_whole_turn(tmp_path: Path) -> None:
    path = lines(tmp_path / "c.jsonl", {"messages": [CHAT[1], CHAT[4]]})
    assert said(open_samples(path, tokenizer=tokenizer(CHATML)))[1] == "- " * 6 + "<s> assistant : ran </s>"


def test_a_conversation_that_the_assistant_begins_is_labelled_from_its_first_token(tmp_path: Path) -> None:
    path = lines(tmp_path / "c.jsonl", {"messages": [CHAT[4], CHAT[1]]})
    assert said(open_samples(path, tokenizer=tokenizer(PROMPTED)))[1] == "<s> assistant : ran </s>" + " -" * 6


def test_topics_and_ids_of_chats_are_columns(tmp_path: Path) -> None:
    rows = [
        {"messages": [CHAT[1], CHAT[4]], "topic": topic, "key": key, "kind": kind}
        for topic, key, kind in [("dogs", "x", "b"), ("cats", "y", "a"), ("dogs", "z", "a")]
    ]
    path = lines(tmp_path / "c.jsonl", *rows)
    samples = open_samples(path, options=DataOptions(id="key"), tokenizer=tokenizer(PROMPTED))
    assert samples.classes == ["cats", "dogs"] and samples.ids == ["x", "y", "z"]
    assert select(samples, "class:dogs").tolist() == [0, 2]
    other = open_samples(path, options=DataOptions(targets="kind"), tokenizer=tokenizer(PROMPTED))
    assert other.labels.tolist() == [1, 0, 0] and other.classes == ["a", "b"]


def test_text_length_cuts_and_pads_chats(tmp_path: Path) -> None:
    path = lines(tmp_path / "c.jsonl", {"messages": CHAT})
    long = open_samples(path, options=DataOptions(text_length=40), tokenizer=tokenizer(PROMPTED))
    assert long.signature()["labels"]["shape"] == [40]
    cut = open_samples(path, options=DataOptions(text_length=17), tokenizer=tokenizer(PROMPTED))
    assert said(cut)[1] == "- " * 15 + "sat off"
    assert said(open_samples(path, tokenizer=tokenizer(PROMPTED, model_max_length=16)))[1] == "- " * 15 + "sat"


def test_the_digest_sees_every_message(tmp_path: Path) -> None:
    digests = set()
    for word in ("bird", "Bird"):
        row = {"messages": [{"role": "user", "content": word}, CHAT[4]]}
        digests.add(open_samples(lines(tmp_path / "c.jsonl", row), tokenizer=tokenizer(PROMPTED)).digest())
    assert len(digests) == 2


# Prompts with completions


def test_of_a_prompt_with_a_completion_the_completion_is_labelled(tmp_path: Path) -> None:
    rows = [{"prompt": "the cat", "completion": " sat off"}, {"prompt": "", "completion": "dog ran"}]
    samples = open_samples(lines(tmp_path / "p.jsonl", *rows), tokenizer=tokenizer())
    assert said(samples) == ("the cat sat off", "- - sat off")
    assert said(samples, 1) == ("dog ran [PAD] [PAD]", "dog ran - -")


def test_special_tokens_belong_to_the_side_they_stand_on(tmp_path: Path) -> None:
    path = lines(tmp_path / "p.jsonl", {"prompt": "the cat", "completion": " sat"})
    assert said(open_samples(path, tokenizer=tokenizer(begin=True))) == ("<s> the cat sat </s>", "- - - sat </s>")


@pytest.mark.parametrize(("prompt", "completion"), [("a", " cat"), ("a ", "cat")])
def test_a_space_between_prompt_and_completion_belongs_to_the_completion_s_first_token(
    tmp_path: Path, prompt: str, completion: str
) -> None:
    words = bytes_tokenizer()
    path = lines(tmp_path / "p.jsonl", {"prompt": prompt, "completion": completion})
    batch = open_samples(path, tokenizer=words).batch(torch.tensor([0]))
    assert batch["input_ids"][0].tolist() == words("a cat")["input_ids"]
    assert batch["labels"][0].tolist() == [-100, words.convert_tokens_to_ids("Ġcat")]


def test_chats_and_completions_may_lie_in_one_file(tmp_path: Path) -> None:
    path = lines(tmp_path / "p.jsonl", {"prompt": "the", "completion": " cat"}, {"messages": [CHAT[1], CHAT[4]]})
    samples = open_samples(path, tokenizer=tokenizer(PROMPTED))
    assert said(samples)[1].split()[:2] == ["-", "cat"] and said(samples, 1)[1] == "- " * 9 + "ran </s>"


def test_a_table_whose_inputs_are_named_is_a_table(tmp_path: Path) -> None:
    path = lines(tmp_path / "p.jsonl", {"prompt": "the cat", "completion": " sat", "label": "yes"})
    samples = open_samples(path, options=DataOptions(inputs="prompt"), tokenizer=tokenizer())
    assert samples.classes == ["yes"] and samples.batch(torch.tensor([0]))["labels"].tolist() == [0]


@pytest.mark.parametrize("template", [PROMPTED, MARKED])
def test_a_model_s_loss_is_that_of_the_answers(tmp_path: Path, template: str) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=len(WORDS), n_positions=32, n_embd=8, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    path = lines(tmp_path / "c.jsonl", {"messages": CHAT}, {"messages": [CHAT[1], CHAT[4]]})
    batch = open_samples(path, tokenizer=tokenizer(template)).batch(torch.tensor([0, 1]))
    logits = model(input_ids=batch["input_ids"]).logits.detach().double().log_softmax(-1)
    spoken = [(0, t) for t in (15, 16, 17, 26, 27)] + [(1, 9), (1, 10)]
    expected = -sum(float(logits[n, t - 1, batch["input_ids"][n, t]]) for n, t in spoken) / len(spoken)
    assert float(model(**batch).loss.detach()) == pytest.approx(expected, rel=1e-5)


# Multiple choice


def test_questions_are_read_with_answers_by_position_or_by_text(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "q.jsonl",
        {"question": "the cat", "choices": ["sat", "ran off"], "answer": 1},
        {"question": "the dog ", "choices": ["ran", "sat", "off"], "answer": "sat"},
    )
    first, second = open_questions(path, tokenizer())
    assert first.prompt == (8, 9) and first.choices == ((10,), (12, 13)) and first.answer == 1
    assert second.choices == ((12,), (10,), (13,)) and second.answer == 1
    with_space = open_questions(lines(tmp_path / "b.jsonl", {"question": "a", "choices": ["cat", " t"], "answer": 0}),
                                bytes_tokenizer())  # fmt: skip
    assert [len(choice) for choice in with_space[0].choices] == [1, 2]


# What is wrong is said in one line that names the file and the line

EMPTY: dict[str, Any] = {}


def refused(name: str, content: str | bytes, *says: str, options: Any = EMPTY, words: Any = None) -> Any:
    return pytest.param(name, content, says, options, words or (lambda: tokenizer(PROMPTED)), id=" ".join(says))


def rows(*given: Any) -> str:
    return "\n\n".join(map(json.dumps, given))  # a row on every other line


GOOD = {"messages": [CHAT[1], CHAT[4]]}


@pytest.mark.parametrize(
    ("name", "content", "says", "options", "words"),
    [
        refused("a.txt", "", "a.txt", "empty"),
        refused("a.txt", " \n\t\n", "a.txt", "empty"),
        refused("a.txt", b"the cat\n\n\xff\xfe", "a.txt", "line 3", "UTF-8"),
        refused("a.txt", "the cat", "a.txt", "needs a tokenizer", words=lambda: None),
        refused("a.txt", "the cat", "a.txt", "padding token", words=lambda: tokenizer(pad_token=None)),
        refused("a.txt", "the cat", "option text_split", "text_split must be one of", options={"text_split": "word"}),
        refused("a.txt", "the cat", "blocks", "text_length", options={"text_split": "block"}),
        refused("a.txt", "the cat", "got 1", options={"text_split": "block", "text_length": 1}),
        refused("a.txt", "the cat", "option scale", options={"scale": 2.0}),
        refused("a.txt", "the cat", "option targets", options={"targets": "y"}),
        refused("c.jsonl", rows(GOOD), "option text_split is for text files", options={"text_split": "line"}),
        refused("c.csv", "a,y\n1,0\n", "option text_split is for text files", options={"text_split": "line"}),
        refused("c.jsonl", rows(GOOD), "needs a tokenizer", words=lambda: None),
        refused("c.jsonl", rows(GOOD), "line 1", "'models/words'", "no chat template", words=tokenizer),
        refused("c.jsonl", rows(GOOD, {"messages": []}), "line 3", "list of one or more"),
        refused("c.jsonl", rows(GOOD, {"messages": "hello"}), "line 3", "'hello'"),
        refused("c.jsonl", rows(GOOD, {"messages": ["hello"]}), "line 3", "message 0", "role"),
        refused("c.jsonl", rows({"messages": [{"role": "user"}]}), "line 1", "message 0", "content of text"),
        refused("c.jsonl", rows({"messages": [{"role": "user", "content": [1]}]}), "line 1", "content of text"),
        refused("c.jsonl", rows({"messages": [{"role": "user", "content": "\ud800"}]}), "line 1", "no Unicode"),
        refused("c.jsonl", rows(GOOD, {"messages": [CHAT[1]]}), "line 3", "no message has the role 'assistant'"),
        refused("c.jsonl", rows(GOOD, GOOD | {"tools": [{"name": "f"}]}), "line 3 has tools"),
        refused("c.jsonl", rows(GOOD, {"text": "x"}), "line 3", "messages, or a prompt and a completion"),
        refused("c.jsonl", rows(GOOD, {"prompt": "x"}), "line 3", "completion is None"),
        refused("c.jsonl", rows({"prompt": 1, "completion": "x"}), "line 1", "prompt is 1"),
        refused("c.jsonl", rows({"prompt": "the c", "completion": "at"}), "line 1", "the token 'cat'", "completion"),
        refused("c.jsonl", rows({"prompt": "cat", "completion": ""}), "line 1", "nothing of its first 1 tokens"),
        refused("c.jsonl", rows({"prompt": "", "completion": "cat"}), "line 1", "nothing of its first 1 tokens"),
        refused("c.jsonl", rows({"messages": CHAT}), "line 1", "first 5 tokens", options={"text_length": 5}),
        refused("c.jsonl", rows({"messages": CHAT}), "'models/words'", "up to message 2 otherwise", "generation",
                words=lambda: tokenizer(FORGETFUL)),
        refused("c.jsonl", rows(GOOD), "line 1", "chat template raised", "no dogs",
                words=lambda: tokenizer("{{ raise_exception('no dogs') }}")),
        refused("c.jsonl", rows(GOOD), "line 1", "labels nothing", words=lambda: tokenizer(
            "{% for m in messages %}{{ m['content'] }} {% endfor %}{% generation %}{% endgeneration %}")),
        refused("c.jsonl", rows(GOOD), "'q' (option targets)", options={"targets": "q"}),
        refused("c.jsonl", rows(GOOD), "'q' (option id)", options={"id": "q"}),
        refused("c.jsonl", rows(GOOD | {"topic": "a"}, GOOD), "line 3 has no 'topic'"),
        refused("c.jsonl", rows(GOOD) + "\n{", "line 2 is no JSON"),
        refused("c.jsonl", rows(GOOD, GOOD) + "\n[1]", "line 4 holds a list"),
    ],
)  # fmt: skip
def test_texts_that_can_not_be_used_are_refused_in_one_line(
    tmp_path: Path, name: str, content: str | bytes, says: tuple[str, ...], options: Any, words: Any
) -> None:
    path = written(tmp_path / name, content)
    with pytest.raises(ValueError) as raised:
        open_samples(path, options=DataOptions(**options), tokenizer=words())
    message = str(raised.value)
    assert "\n" not in message and (name in message or "text_split must" in message)
    assert all(part in message for part in says if part != "option text_split" or "must" not in message), message


def test_folders_of_texts_that_would_be_read_by_half_are_refused(tmp_path: Path) -> None:
    written(tmp_path / "cats" / "1.txt", "the cat")
    written(tmp_path / "cats" / "2.md", "the cat")
    with pytest.raises(ValueError, match=re.escape("'cats/2.md' is no .txt file")):
        open_samples(str(tmp_path), tokenizer=tokenizer())
    (tmp_path / "cats" / "2.md").unlink()
    written(tmp_path / "a.txt", "the dog")
    with pytest.raises(ValueError, match=re.escape("'a.txt' lies beside folders of topics")):
        open_samples(str(tmp_path), tokenizer=tokenizer())
    written(tmp_path / "cats" / "0.txt", "\n")
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ValueError, match=re.escape("'cats/0.txt' is empty")):
        open_samples(str(tmp_path), tokenizer=tokenizer())
    with pytest.raises(ValueError, match="for a folder within a folder"):
        open_samples(f"{tmp_path}::cats", tokenizer=tokenizer())


QUESTION = {"question": "the cat", "choices": ["sat", "ran"], "answer": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": ""}, "line 3: question must be a text"),
        ({"choices": ["sat"]}, "line 3: choices must be a list of two"),
        ({"choices": ["sat", 3]}, "line 3: choices must be texts, got 3"),
        ({"answer": 2}, "line 3: answer must be one of the choices or its position from 0 to 1, got 2"),
        ({"answer": "off"}, "line 3: answer must be"),
        ({"answer": True}, "line 3: answer must be"),
        ({"choices": ["sat", "sat"], "answer": "sat"}, "line 3: answer must be"),
        ({"question": "\ud800 cat"}, "line 3 is .* no Unicode"),
        ({"question": "cat " * 9}, "line 3 has 10 tokens, the model takes 8"),
    ],
)
def test_questions_that_can_not_be_asked_are_refused_in_one_line(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = written(tmp_path / "q.jsonl", rows(QUESTION, QUESTION | change))
    with pytest.raises(ValueError, match=message) as raised:
        open_questions(path, tokenizer(model_max_length=8))
    assert "q.jsonl" in str(raised.value) and "\n" not in str(raised.value)


def test_files_of_questions_that_are_not_there_or_empty_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file of questions"):
        open_questions(tmp_path / "q.jsonl", tokenizer())
    with pytest.raises(ValueError, match="has no question"):
        open_questions(written(tmp_path / "q.jsonl", "\n"), tokenizer())
