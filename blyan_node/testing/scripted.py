"""Models that say what a test wants: after each word comes the one that the script says.

The embedding is the identity, attention and experts add nothing, and the head maps a word to its
successor, or to several that are equally likely. So greedy answers are known, and everything else
about the model is real: its blocks, its experts on other nodes, its tokenizer and its chat
template. A token is a whole word of text; the last token of a prompt decides how the answer begins.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from blyan_node.moe.harmony import MARKS, RETURN
from blyan_node.testing.checkpoints import make_checkpoint

LIKELY = 4.0  # how much the logit of the successor is above all others, before the last norm
# A gpt_oss model that thinks "Hm so" or answers "Paris is nice", whichever is drawn, until it ends.
THINKER = {
    "assistant": "<|channel|>", "<|channel|>": ("analysis", "final"), "analysis": "<|message|>",
    "final": "<|message|>", "<|message|>": ("Hm", "Paris"), "Hm": "so", "so": "<|end|>",
    "<|end|>": "<|start|>", "<|start|>": "assistant", "Paris": "is", "is": "nice",
    "nice": "<|return|>", "<|return|>": "<end>",
}  # fmt: skip
THINKS_FIRST = 4  # a seed with which it thinks once in the analysis channel, then answers


def make_scripted(
    family: str,
    path: Path,
    words: Sequence[str],
    after: Mapping[str, str | Sequence[str]],
    *,
    special: Sequence[str] = ("<unk>", "<end>"),
    template: str,
    generation: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a directory of `family` whose greedy answers follow `after`; `<end>` ends them."""
    vocabulary = list(dict.fromkeys([*special, *words]))
    ids = {word: number for number, word in enumerate(vocabulary)}
    size = -(-len(vocabulary) // 16) * 16
    make_checkpoint(
        family, path, vocab_size=size, hidden_size=size, num_hidden_layers=2,
        sliding_window=4096, eos_token_id=ids["<end>"],
    )  # fmt: skip
    weights = load_file(path / "model.safetensors")
    save_file(
        {name: _written(name, w, ids, after) for name, w in weights.items()},
        path / "model.safetensors",
        {"format": "pt"},
    )
    _write_text(path, ids, special, template)
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def make_thinker(path: Path, template: str) -> Path:
    """Writes a gpt_oss directory that follows `THINKER`; its own settings are to sample from 2."""
    words = [*THINKER, "developer", "user", "system", "hello"]
    special = ["<unk>", "<end>", *MARKS]
    own = {"do_sample": True, "top_k": 2, "eos_token_id": [1, special.index(RETURN)]}
    return make_scripted(
        "gpt_oss", path, words, THINKER, special=special, template=template, generation=own
    )


def _written(
    name: str,
    weight: torch.Tensor,
    ids: Mapping[str, int],
    after: Mapping[str, str | Sequence[str]],
) -> torch.Tensor:
    if "embed_tokens" in name:
        return torch.eye(*weight.shape)
    if "lm_head" in name:
        head = torch.zeros(weight.shape)
        for word, successors in after.items():
            for one in [successors] if isinstance(successors, str) else successors:
                head[ids[one], ids[word]] = LIKELY
        return head
    if any(part in name for part in ("o_proj", "down_proj", ".w2.")):
        return torch.zeros(weight.shape)
    return weight


def _write_text(path: Path, ids: Mapping[str, int], special: Sequence[str], template: str) -> None:
    built = Tokenizer(models.WordLevel(vocab=dict(ids), unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    built.add_special_tokens(list(special))
    built.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "chat_template.jinja").write_text(template)
