"""ms-swift: `swift sft` and `swift rlhf` (SimPO, GRPO without vLLM), with a callback that takes the turns."""

from __future__ import annotations

import json
from pathlib import Path

from turns import Turns, arguments, trainer_turns

REWARD = """
from swift.rewards import ORM, orms

class Exact(ORM):
    def __call__(self, completions, truth=None, **_):
        return [float(text.strip().lower() == right) for text, right in zip(completions, truth)]

orms["exact_truth"] = Exact
"""


def main() -> None:
    given = arguments()
    turns = Turns()
    import torch

    torch.set_num_threads(given.threads)
    folder = Path(given.folder)
    take_turns(turns)
    command = {
        "model": folder / "hub",
        "model_type": "llava1_5_hf",
        "dataset": write_data(folder, given.task),
        "output_dir": folder / "swift",
        "torch_dtype": "float32",
        "attn_impl": "sdpa",
        "max_steps": 100_000,
        "per_device_train_batch_size": given.rows * (given.samples if given.task == "grpo" else 1),
        "gradient_accumulation_steps": given.accumulation,
        "gradient_checkpointing": "false",
        "max_length": 512,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0,
        "save_strategy": "no",
        "eval_strategy": "no",
        "split_dataset_ratio": 0,
        "logging_steps": 1,
        "report_to": "none",
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
    }
    if given.rank:
        command |= {"tuner_type": "lora", "lora_rank": given.rank, "lora_alpha": 2 * given.rank}
        command |= {"target_modules": "all-linear", "freeze_vit": "true", "freeze_aligner": "true"}
    else:
        command |= {"tuner_type": "full", "freeze_vit": "false", "freeze_aligner": "false"}
    if given.task == "simpo":
        command |= {"rlhf_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0}
    if given.task == "grpo":
        plugin = folder / "swift_reward.py"
        plugin.write_text(REWARD)
        command |= {"rlhf_type": "grpo", "external_plugins": plugin, "reward_funcs": "exact_truth", "beta": 0.04}
        command |= {"num_generations": given.samples, "max_completion_length": given.tokens, "temperature": 1.0}
        command |= {"epsilon": 0.2, "epsilon_high": 0.28, "loss_type": "grpo", "use_vllm": "false"}
        command |= {"remove_unused_columns": "false"}
    from swift import pipelines

    run = pipelines.sft_main if given.task == "sft" else pipelines.rlhf_main
    run([word for name, value in command.items() for word in (f"--{name}", str(value))])


def take_turns(turns: Turns) -> None:
    """Every trainer of this process gets the callback."""
    from transformers.trainer_callback import CallbackHandler

    one_update = trainer_turns(turns, [])
    before = CallbackHandler.__init__

    def init(self: CallbackHandler, callbacks: list, *rest: object, **named: object) -> None:
        before(self, [*callbacks, one_update()], *rest, **named)

    CallbackHandler.__init__ = init


def write_data(folder: Path, task: str) -> Path:
    """The questions in ms-swift's columns."""
    rows = []
    for row in json.loads((folder / "rows.json").read_text()):
        said = [] if task == "grpo" else [{"role": "assistant", "content": row["chosen"]}]
        asked = {"role": "user", "content": f"<image>{row['question']}"}
        made = {"messages": [asked, *said], "images": [str(folder / row["image"])]}
        made |= {"rejected_response": row["rejected"]} if task == "simpo" else {}
        made |= {"truth": row["truth"]} if task == "grpo" else {}
        rows.append(made)
    file = folder / f"swift-{task}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


if __name__ == "__main__":
    main()
