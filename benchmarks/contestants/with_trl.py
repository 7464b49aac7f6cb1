"""TRL: SFTTrainer, GRPOTrainer, and CPOTrainer's SimPO, which knows no pictures and is given them here."""

from __future__ import annotations

import functools
from typing import Any

from turns import Turns, arguments, asked, open_hub, trainer_turns

PROJECTIONS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def main() -> None:
    given = arguments()
    turns = Turns()
    folder, processor, model, rows = open_hub(given)
    for row in rows:
        row["image"] = str(folder / row["image"])
    settings = {
        "output_dir": str(folder / "trl"),
        "max_steps": 100_000,
        "per_device_train_batch_size": given.rows * (given.samples if given.task == "grpo" else 1),
        "gradient_accumulation_steps": given.accumulation,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "disable_tqdm": True,
    }
    shared = {"model": model, "callbacks": [trainer_turns(turns, [])()], "peft_config": adapter(given.rank)}
    make = {"sft": sft, "simpo": simpo, "grpo": grpo}[given.task]
    make(given, rows, processor, settings, shared).train()


def adapter(rank: int) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=PROJECTIONS, task_type="CAUSAL_LM") if rank else None


def user(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def with_pictures(rows: list[dict[str, Any]]) -> Any:
    from datasets import Dataset, Image

    return Dataset.from_list(rows).cast_column("image", Image())


def sft(given: Any, rows: list[dict], processor: Any, settings: dict, shared: dict) -> Any:
    from trl import SFTConfig, SFTTrainer

    data = [
        {
            "image": row["image"],
            "prompt": user(row["question"]),
            "completion": [{"role": "assistant", "content": row["chosen"]}],
        }
        for row in rows
    ]
    config = SFTConfig(**settings, max_length=None, completion_only_loss=True)
    return SFTTrainer(args=config, train_dataset=with_pictures(data), processing_class=processor, **shared)


def grpo(given: Any, rows: list[dict], processor: Any, settings: dict, shared: dict) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    def exact(prompts: list, completions: list, truth: list, **_: Any) -> list[float]:
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        return [float(text.strip().lower() == right) for text, right in zip(texts, truth)]

    data = [{"image": row["image"], "prompt": user(row["question"]), "truth": row["truth"]} for row in rows]
    config = GRPOConfig(
        **settings, num_generations=given.samples, max_completion_length=given.tokens, temperature=1.0, beta=0.04,
        epsilon=0.2, epsilon_high=0.28, loss_type="grpo",
    )  # fmt: skip
    return GRPOTrainer(
        args=config, reward_funcs=exact, train_dataset=with_pictures(data), processing_class=processor, **shared
    )


def simpo(given: Any, rows: list[dict], processor: Any, settings: dict, shared: dict) -> Any:
    import torch
    from datasets import Dataset
    from PIL import Image
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    class PictureCPO(CPOTrainer):
        """The trainer's own pass over chosen and rejected sequences, each with its picture."""

        def tokenize_row(self, feature: dict, model: Any = None) -> dict:
            return {"chosen_labels": [0], "rejected_labels": [0]}  # the collator does it, together with the picture

        def concatenated_forward(self, model: Any, batch: dict) -> Any:
            text = {name: value for name, value in batch.items() if name != "pixel_values"}
            pictures = torch.cat([batch["pixel_values"]] * 2)
            return super().concatenated_forward(functools.partial(model, pixel_values=pictures), text)

    end = processor.tokenizer.eos_token

    def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
        text = asked(processor, [row["question"] for row in examples])
        pictures = [[Image.open(e["image"]).convert("RGB")] for e in examples]
        prompts = processor(images=pictures, text=text, add_special_tokens=False)
        batch = {"pixel_values": torch.stack([torch.as_tensor(p) for p in prompts["pixel_values"]])}
        for name in ("chosen", "rejected"):
            said = [processor.tokenizer(f" {e[name]}{end}", add_special_tokens=False)["input_ids"] for e in examples]
            whole = [[*prompt, *answer] for prompt, answer in zip(prompts["input_ids"], said)]
            labels = [[-100] * len(prompt) + answer for prompt, answer in zip(prompts["input_ids"], said)]
            longest = max(map(len, whole))
            batch[f"{name}_input_ids"] = torch.tensor([one + [4] * (longest - len(one)) for one in whole])
            batch[f"{name}_attention_mask"] = torch.tensor([[1] * len(o) + [0] * (longest - len(o)) for o in whole])
            batch[f"{name}_labels"] = torch.tensor([one + [-100] * (longest - len(one)) for one in labels])
        return batch

    config = CPOConfig(
        **settings, loss_type="simpo", beta=2.0, simpo_gamma=1.0, cpo_alpha=0.0, remove_unused_columns=False
    )
    data = Dataset.from_list([{**row, "prompt": row["question"]} for row in rows])
    return PictureCPO(
        args=config, train_dataset=data, processing_class=processor.tokenizer, data_collator=collate, **shared
    )


if __name__ == "__main__":
    main()
