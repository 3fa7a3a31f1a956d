"""generation_config.json: how a model's author means it to be sampled, and where its answers end.

Read strictly: a setting of a wrong kind or out of its range is refused by name, and so is one that
would change the tokens and that this version does not know how to follow. The rest of the file
(lengths, caches, what to return) is about other programs.
"""

from collections.abc import Mapping
from typing import Any

from blyan_node.moe.sampling import ALLOWED, Sampling
from blyan_node.moe.strict_json import parse_json, refuse, show, token_ids

FILE = "generation_config.json"
# Settings that choose other tokens, each with the values that change nothing.
_NOT_FOLLOWED: dict[str, tuple[object, ...]] = {
    "bad_words_ids": (),
    "begin_suppress_tokens": (),
    "constraints": (),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_decoder_ids": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": (),
    "stop_strings": (),
    "suppress_tokens": (),
    "top_h": (),
    "typical_p": (1,),
    "watermarking_config": (),
}


def stop_ids(files: Mapping[str, bytes]) -> frozenset[int]:
    """The tokens that end an answer: of generation_config.json, else of config.json."""
    for name in (FILE, "config.json"):
        value = parse_json(files[name], name).get("eos_token_id") if name in files else None
        if value is not None:
            return frozenset(token_ids(value, f"{name}: eos_token_id"))
    return frozenset()


def default_sampling(files: Mapping[str, bytes]) -> Sampling:
    """What to use where a request says nothing; greedy unless `do_sample` is true.

    What the file leaves out changes nothing (temperature 1, no top-k). As in `transformers`, a
    repetition penalty counts for greedy answers too. Raises `Refused` (BAD_MODEL).
    """
    fields = parse_json(files[FILE], FILE) if FILE in files else {}
    given = {name: _setting(fields, name) for name in ALLOWED if fields.get(name) is not None}
    for name, neutral in _NOT_FOLLOWED.items():
        value = fields.get(name)
        if value is not None and value != [] and value not in neutral:
            _refuse(name, value, "this version samples without it")
    sampled = fields.get("do_sample")
    if sampled is not None and type(sampled) is not bool:
        _refuse("do_sample", sampled, "expected true or false")
    if not sampled:
        penalty = given.get("repetition_penalty")
        return Sampling() if penalty is None else Sampling(repetition_penalty=penalty)
    return Sampling(**{"temperature": 1.0} | given)


def check_generation(files: Mapping[str, bytes]) -> None:
    """Raises `Refused` (BAD_MODEL) for what answers could not be made by."""
    stop_ids(files)
    default_sampling(files)


def _setting(fields: Mapping[str, Any], name: str) -> Any:
    value, allowed = fields[name], ALLOWED[name]
    if not allowed.holds(value):
        _refuse(name, value, f"expected {allowed.words}")
    return value if allowed.whole else float(value)


def _refuse(name: str, value: object, why: str) -> None:
    refuse(f"{FILE}: {name} is {show(value)}, {why}", field=name)
