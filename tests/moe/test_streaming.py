"""Text as it streams: whole characters, the text of all tokens, and not a letter after its end."""

import json
from collections.abc import Callable, Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from blyan_node.moe.stop_strings import StopStrings
from blyan_node.moe.text import Text, Windows

SPECIAL = ["<unk>", "<s>", "</s>", "<|call|>"]
LINES = [
    "größe und Maß, 日本語の文章です。",
    "🎉🎊 party 👩‍👩‍👧 time!",
    "the cat  sat; naïve café — ok\n\n",
] * 9


def byte_level() -> Tokenizer:
    """Byte-level BPE whose merges also cross the borders of characters, as in gpt_oss."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    built.train_from_iterator(LINES, trainer)
    return built


def with_byte_fallback() -> Tokenizer:
    """Sentencepiece's BPE, as in Mixtral: words begin with ▁, unknown characters are bytes."""
    letters = [*"▁abcdefghijklmnopqrstuvwxyz.,!é", "▁t", "▁th", "he", "▁the"]
    words = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    bpe = models.BPE(
        vocab={word: number for number, word in enumerate(words)},
        merges=[("▁", "t"), ("▁t", "h"), ("h", "e"), ("▁t", "he")],
        byte_fallback=True,
        unk_token="<unk>",
        fuse_unk=True,
    )
    built = Tokenizer(bpe)
    built.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    built.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    built.add_special_tokens(SPECIAL)
    return built


def unigram() -> Tokenizer:
    """Sentencepiece's unigrams with ▁ for spaces."""
    words = [*SPECIAL, "▁", "▁the", "▁cat", "s", "at", "▁", "é", "日", "🎉", "▁日"]
    built = Tokenizer(models.Unigram([(word, -1.0) for word in dict.fromkeys(words)], unk_id=0))
    built.pre_tokenizer = pre_tokenizers.Metaspace()
    built.decoder = decoders.Metaspace()
    built.add_special_tokens(SPECIAL)
    return built


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "byte fallback": with_byte_fallback,
    "unigram": unigram,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def text(request: pytest.FixtureRequest) -> Text:
    return Text({"tokenizer.json": TOKENIZERS[request.param]().to_str().encode()})


@pytest.fixture(scope="module")
def bytewise() -> Text:
    return Text({"tokenizer.json": byte_level().to_str().encode()})


def streamed(text: Text, ids: Sequence[int]) -> list[str]:
    windows, special = Windows(), set(text.special.values())

    def said(parts: tuple[Sequence[int], Sequence[int]], *, last: bool = False) -> str:
        before, after = map(text.decode, parts)
        return windows.take(before, after, last=last)

    shown = [said(windows.add(token)) for token in ids if token not in special]
    return [*shown, said(windows.now(), last=True)]


def size(text: Text) -> int:
    return text._tokenizer.get_vocab_size()


def test_a_character_is_never_cut(bytewise: Text) -> None:
    pieces = streamed(bytewise, bytewise.encode("größe 日本 🎉! ☃"))
    assert "".join(pieces) == "größe 日本 🎉! ☃"
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(bool(piece) for piece in pieces) > 5


@given(st.text())
def test_any_text_comes_back(bytewise: Text, prompt: str) -> None:
    prompt = prompt.encode(errors="ignore").decode()
    assume(not any(word in prompt for word in SPECIAL))  # which have no text
    pieces = streamed(bytewise, bytewise.encode(prompt))
    assert "".join(pieces) == prompt
    if "\ufffd" not in prompt:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.data())
def test_any_text_streams_as_it_is_decoded(text: Text, data: st.DataObject) -> None:
    """Prompts, with special tokens between any two tokens."""
    ids = text.encode(data.draw(st.text("the cat日é🎉 .,\n☃", max_size=30)))
    places = data.draw(st.lists(st.integers(0, len(ids)), max_size=5))
    for place in places:
        ids.insert(place, data.draw(st.sampled_from(sorted(text.special.values()))))
    pieces, whole = streamed(text, ids), text.decode(ids)
    if "\ufffd" not in whole:
        assert "".join(pieces) == whole
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.data())
def test_any_tokens_stream(text: Text, data: st.DataObject) -> None:
    """Also those that no text makes, and ids that the tokenizer has not."""
    ids = data.draw(st.lists(st.integers(0, size(text) + 5), max_size=60))
    pieces, whole = streamed(text, ids), text.decode(ids)
    if "\ufffd" not in whole:
        assert "".join(pieces) == whole
    longest = held = 0
    for piece in pieces:
        held = 0 if piece else held + 1
        longest = max(longest, held)
    silent = sum(not text.decode([token]).strip("\ufffd ") for token in ids)
    assert longest <= 8 + silent


@pytest.mark.parametrize("text", ["unigram"], indirect=True)
@pytest.mark.parametrize("silent", [1, 2, 60])
def test_what_says_nothing_at_the_start_does_not_swallow_a_space(text: Text, silent: int) -> None:
    """An id that the tokenizer has not, then two spaces of which the first is not written."""
    space = text._tokenizer.token_to_id("▁")
    ids = [size(text) + 1] * silent + [space, space]
    assert "".join(streamed(text, ids)) == text.decode(ids) == " "


def test_a_special_token_does_not_swallow_the_space_after_it() -> None:
    """Some decoders drop the space at the start of what they are given."""
    text = Text({"tokenizer.json": with_byte_fallback().to_str().encode()})
    ids = text.encode("the cat")
    assert text.decode(ids[2:]) == "cat"
    ids.insert(2, text.special["<|call|>"])
    assert "".join(streamed(text, ids)) == text.decode(ids) == "the cat"


def test_borders_of_characters_inside_tokens_hold_nothing_back_for_long(bytewise: Text) -> None:
    """A token that ends one character and begins the next passes the first one on."""
    crossing = [
        word for word, id in bytewise._tokenizer.get_vocab().items()
        if len(word) > 1 and bytewise.decode([id]).count("\ufffd") > 0
    ]  # fmt: skip
    assert crossing
    windows = Windows()
    windows.add(1), windows.add(2)
    assert windows.take("", "\ufffd") == ""
    assert windows.take("", "日\ufffd") == "日"
    assert windows.take("", "日本\ufffd") == "本"
    assert windows.take("", "日本語") == "語"


# Stop strings --------------------------------------------------------------------------------


def cut(strings: Sequence[str], pieces: Sequence[str]) -> tuple[list[str], bool]:
    stop = StopStrings(strings)
    passed = [stop.add(piece) for piece in pieces]
    return [*passed, stop.finish()], stop.found


def test_text_ends_before_a_stop_string() -> None:
    assert cut(["\nUser:"], ["Hello", "\n", "Us", "er", ": and more"]) == (
        ["Hello", "", "", "", "", ""], True
    )  # fmt: skip


def test_what_only_began_like_one_is_passed_on() -> None:
    assert cut(["abcd"], ["xab", "c", "ab", "cx"]) == (["x", "", "abc", "abcx", ""], False)
    assert cut(["abcd"], ["ab"]) == (["", "ab"], False)


def test_the_one_that_ends_first_counts() -> None:
    assert cut(["abc", "b"], ["abc"]) == (["a", ""], True)
    assert cut(["bc", "abc"], ["xabc"]) == (["x", ""], True)


def naive(strings: Sequence[str], text: str) -> tuple[str, bool]:
    """Letter by letter, with all that was said in view."""
    for end in range(len(text) + 1):
        found = [one for one in strings if text[:end].endswith(one)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@given(
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    st.lists(st.text("abc", max_size=6), max_size=12),
)
def test_how_the_text_was_cut_changes_nothing(strings: list[str], pieces: list[str]) -> None:
    passed, found = cut(strings, pieces)
    assert ("".join(passed), found) == naive(strings, "".join(pieces))


@given(st.text("ab", min_size=1, max_size=4), st.text("ab", max_size=20))
def test_no_more_is_withheld_than_may_be_a_beginning(string: str, text: str) -> None:
    stop = StopStrings([string])
    shown = "".join(map(stop.add, text))
    if not stop.found:
        assert string.startswith(text[len(shown) :]) and len(text) - len(shown) < len(string)


@given(st.data())
def test_stop_strings_of_streamed_text(text: Text, data: st.DataObject) -> None:
    ids = text.encode(data.draw(st.text("the cat日é🎉 ", max_size=25)))
    whole = text.decode(ids)
    strings = data.draw(st.lists(st.text("thecat日é🎉 ", min_size=1, max_size=3), max_size=3))
    passed, found = cut(strings, streamed(text, ids))
    if "\ufffd" not in whole:
        assert ("".join(passed), found) == naive(strings, whole)


def test_the_tokenizers_are_what_they_say() -> None:
    """Characters of several tokens, tokens across characters: else the tests above show nothing."""
    for name, make in TOKENIZERS.items():
        built = make()
        assert json.loads(built.to_str())["added_tokens"][0]["special"], name
    many = with_byte_fallback()
    assert len(many.encode("☃").ids) == 4  # with the ▁ before it
