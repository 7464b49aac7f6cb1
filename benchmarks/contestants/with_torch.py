"""Plain torch, written as well as one can without leaving transformers' modules: the head on response tokens alone, the
tower once a picture, a pair as one row [prompt, chosen, rejected] with a block mask."""

from __future__ import annotations

import itertools

from turns import Turns, arguments, asked, open_hub


def main() -> None:
    given = arguments()
    turns = Turns()
    import numpy as np
    import torch
    import torch.nn.functional as functional
    from PIL import Image

    folder, processor, model, questions = open_hub(given)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    image_token = model.config.image_token_id
    stream = itertools.cycle(questions)
    names = ("chosen", "rejected") if given.task == "simpo" else ("chosen",)

    def read(count: int) -> tuple[list[list[int]], torch.Tensor, list[list[list[int]]]]:
        """Prompts, pixels, and each row's responses."""
        rows = list(itertools.islice(stream, count))
        text = asked(processor, [row["question"] for row in rows])
        pictures = [[Image.open(folder / row["image"]).convert("RGB")] for row in rows]
        batch = processor(images=pictures, text=text, add_special_tokens=False)
        end = processor.tokenizer.eos_token

        def answer(words: str) -> list[int]:
            return processor.tokenizer(f" {words}{end}", add_special_tokens=False)["input_ids"]

        answers = [[answer(row[name]) for name in names] for row in rows]
        return batch["input_ids"], torch.as_tensor(np.array(batch["pixel_values"])), answers

    def log_probs(prompts: list[list[int]], pixels: torch.Tensor, answers: list[list[list[int]]]) -> torch.Tensor:
        """[rows, responses, tokens]; prompts are of one length, and so are responses."""
        responses, said = len(names), len(answers[0][0])
        start = len(prompts[0])
        fed = [prompt + [token for answer in row for token in answer[:-1]] for prompt, row in zip(prompts, answers)]
        tokens = torch.tensor(fed)
        length = tokens.shape[1]
        own = torch.arange(length) - start
        group = torch.where(own < 0, -1, own // (said - 1))
        position = torch.where(own < 0, torch.arange(length), start + own % (said - 1))
        seen = (group[:, None] == group) | (group == -1)
        mask = torch.where(seen.tril(), 0.0, torch.finfo(torch.float32).min)[None, None]
        features = model.get_image_features(pixels)
        features = getattr(features, "pooler_output", features)
        features = torch.stack(list(features)) if isinstance(features, list | tuple) else features
        embedded = model.get_input_embeddings()(tokens)
        slots = (tokens == image_token).unsqueeze(-1).expand_as(embedded)
        embedded = embedded.masked_scatter(slots, features.reshape(-1).to(embedded.dtype))
        hidden = model.model.language_model(
            inputs_embeds=embedded,
            attention_mask=mask.expand(len(tokens), 1, length, length),
            position_ids=position.expand(len(tokens), length),
            use_cache=False,
        ).last_hidden_state
        first = torch.full((responses, 1), start - 1)
        rest = start + torch.arange(responses * (said - 1)).reshape(responses, -1)
        logits = model.lm_head(hidden[:, torch.cat([first, rest], dim=1)])
        return logits.log_softmax(-1).gather(-1, torch.tensor(answers)[..., None])[..., 0]

    while True:
        turns.wait()
        for _ in range(given.accumulation):
            found = log_probs(*read(given.rows))
            if given.task == "simpo":
                chosen, rejected = found.mean(-1).unbind(1)
                loss = -functional.logsigmoid(2.0 * (chosen - rejected) - 1.0).mean()
            else:
                loss = -found.mean()
            (loss / given.accumulation).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        turns.done(loss=loss.item())


if __name__ == "__main__":
    main()
