"""A causal language model by transformers, from its folder or from a GGUF file, asked in batches."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from csp_jax.errors import UserError
from csp_jax.text import Prompts
from data_prep.checkpoints import choose_device, choose_dtype, hash_folder, local_folder
from data_prep.config import ModelKeywords, hash_of


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

    @torch.inference_mode()
    def __call__(self, pairs: list[tuple[str, str]]) -> list[str]:
        """What the model says to each (question, response)."""
        texts = [self.prompt(*pair) for pair in pairs]
        fed = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(self.device)
        said = self.model.generate(
            **fed,
            max_new_tokens=self.config.new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return self.tokenizer.batch_decode(said[:, fed["input_ids"].shape[1] :], skip_special_tokens=True)
