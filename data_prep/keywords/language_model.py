"""A causal language model by transformers, from its folder or from a GGUF file, asked in batches."""

from __future__ import annotations

import copy
import functools
import importlib.util
from pathlib import Path
from typing import Any

import torch

from csp_jax.errors import UserError
from csp_jax.text import Prompts
from data_prep.checkpoints import choose_device, choose_dtype, hash_folder, local_folder
from data_prep.config import ModelKeywords
from data_prep.hashes import hash_of


def gguf_file(config: ModelKeywords) -> tuple[Path, str]:
    """The folder and name of the GGUF file that a configuration names; UserError when there is none.

    `checkpoint` is a folder, or a Python package that ships one.
    """
    folder = Path(config.checkpoint)
    if not folder.is_dir():
        spec = importlib.util.find_spec(config.checkpoint) if config.checkpoint.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                "neither a folder nor an installed package",
                field="keywords.model.checkpoint",
                value=config.checkpoint,
                mend="`make smollm2` installs the default, or set keywords.model={name: rule}",
            )
        folder = Path(next(iter(spec.submodule_search_locations)))
    names = [config.file] if config.file else sorted(path.name for path in folder.glob("*.gguf"))
    if len(names) != 1 or not (folder / names[0]).is_file():
        problem = f"{len(names)} GGUF files lie there" if not config.file else f"there is no {config.file}"
        raise UserError(problem, file=folder, field="keywords.model.file", mend="Name one of the folder's files")
    return folder, names[0]


class LanguageModel:
    """Greedy answers of a chat model to the keyword prompt."""

    def __init__(self, config: ModelKeywords, prompts: Prompts):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.config, self.prompts = config, prompts
        self.device = choose_device(config.device, "keywords.model.device")
        more: dict[str, Any] = {}
        if config.name == "gguf":
            folder, name = gguf_file(config)
            more["gguf_file"] = name
            weights = hash_folder(folder, (name,))
        else:
            folder = local_folder(config.checkpoint, "keywords.model.checkpoint")
            weights = hash_folder(folder)
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left", **more)
            dtype = choose_dtype(config.dtype, self.device)
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **more)
        except (OSError, ValueError, ImportError, KeyError) as error:
            mend = "It must be a causal language model that transformers can load; GGUF needs the `prep` extra"
            raise UserError(f"cannot be loaded ({error})", file=folder, field="keywords.model", mend=mend) from error
        self.model = model.to(self.device).eval()
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.weights = weights
        self.identity = hash_of(["model", weights, prompts.ask_keyword("{q}", "{r}"), config.new_tokens, config.dtype])

    def prompt(self, question: str, response: str) -> str:
        """The text that the model goes on from."""
        turns = [{"role": who, "content": words} for who, words in self.prompts.ask_keyword(question, response)]
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def _tokens(self, pair: tuple[str, str]) -> list[int]:
        return self.tokenizer(self.prompt(*pair), add_special_tokens=False)["input_ids"]

    @functools.cached_property
    def _shared(self) -> tuple[list[int], Any]:
        """The tokens with which every prompt begins (instruction and examples), and the model's keys and values."""
        first, second = self._tokens(("x", "y")), self._tokens(("z", "w"))
        length = next(i for i, (a, b) in enumerate(zip(first, second)) if a != b)
        fed = torch.tensor([first[:length]], device=self.device)
        return first[:length], self.model(input_ids=fed, use_cache=True, logits_to_keep=1).past_key_values

    @torch.inference_mode()
    def __call__(self, pairs: list[tuple[str, str]]) -> list[str]:
        """What the model says to each (question, response); what all prompts share is computed once."""
        prefix, cache = self._shared
        prompts = [self._tokens(pair) for pair in pairs]
        if any(tokens[: len(prefix)] != prefix for tokens in prompts):
            prefix, cache = [], None
        else:
            cache = copy.deepcopy(cache)
            cache.batch_repeat_interleave(len(pairs))
        longest = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id
        # Padding stands between what is shared and what is not.
        rows = [[*prefix, *[pad] * (longest - len(tokens)), *tokens[len(prefix) :]] for tokens in prompts]
        kept = [
            [1] * len(prefix) + [0] * (longest - len(tokens)) + [1] * (len(tokens) - len(prefix)) for tokens in prompts
        ]
        said = self.model.generate(
            input_ids=torch.tensor(rows, device=self.device),
            attention_mask=torch.tensor(kept, device=self.device),
            past_key_values=cache,
            max_new_tokens=self.config.new_tokens,
            do_sample=False,
            pad_token_id=pad,
        )
        return self.tokenizer.batch_decode(said[:, longest:], skip_special_tokens=True)
