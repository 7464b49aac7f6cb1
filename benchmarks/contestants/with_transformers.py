"""transformers: greedy `generate`. `query`: the answer to one confidence query a picture; `verbal` and `eval`: to
all that an evaluation asks about each picture."""

from __future__ import annotations

from turns import Turns, arguments, asked, open_hub


def main() -> None:
    given = arguments()
    turns = Turns()
    import torch
    from PIL import Image

    folder, processor, model, questions = open_hub(given)
    processor.tokenizer.padding_side = "left"
    model.eval()
    rows = questions[: given.rows]
    if given.task in ("eval", "verbal"):
        rows = [{**row, "query": text} for row in rows for text in row["protocol"]]
    while True:
        turns.wait()
        said: list[str] = []
        for start in range(0, len(rows), 16):
            part = rows[start : start + 16]
            text = asked(processor, [row["query"] for row in part])
            pictures = [[Image.open(folder / row["image"]).convert("RGB")] for row in part]
            batch = processor(images=pictures, text=text, padding=True, add_special_tokens=False, return_tensors="pt")
            with torch.inference_mode():
                out = model.generate(
                    **batch, max_new_tokens=given.tokens, do_sample=False, eos_token_id=None, pad_token_id=4
                )
            said += processor.batch_decode(out[:, batch["input_ids"].shape[1] :])
        turns.done(prompt_tokens=batch["input_ids"].shape[1])


if __name__ == "__main__":
    main()
