"""The embedded base's tokenizer: byte-level BPE with digits apart, so that `73%` is digits and a sign."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from csp_jax.families.interface import IMAGE_MARK
from csp_jax.text import CONFIDENCE_ANSWERS, Prompts
from csp_jax.world.config import WorldConfig
from csp_jax.world.world import World

SPECIAL = ("<unk>", "<s>", "</s>", IMAGE_MARK, "<pad>")


def world_texts(world: World, scenes: int) -> list[str]:
    """What the base reads and says about the first scenes of the world's base split."""
    prompts = Prompts()
    texts = ["USER: \n ASSISTANT:", *(f" {answer}" for answer in CONFIDENCE_ANSWERS)]
    names = [f" {name}" for entry in world.classes for name in (entry.name, entry.plural)]
    for index in range(scenes):
        for item in world.record("base", index).items:
            texts.append(f"USER: \n{prompts.ask(item.question)} ASSISTANT: {item.response}")
            texts.append(f"USER: \n{prompts.ask_confidence(item.question, item.response)} ASSISTANT: 100%")
    return texts + names * 50 + [" scene"] * 50


def build_tokenizer(config: WorldConfig, *, scenes: int = 400, vocab_size: int = 1024) -> Tokenizer:
    """Train the tokenizer; the same configuration gives the same tokenizer."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d|%|[^\S ]| ?\p{L}+| ?[^\s\p{L}\d]+| "), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(world_texts(World(config), scenes), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    return tokenizer
