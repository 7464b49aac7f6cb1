"""FOLDER/model once more as transformers wants it: processor, chat template and a link to the weights. Runs in the
environment of TRL."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from transformers import CLIPImageProcessor, GenerationConfig, LlavaProcessor, PreTrainedTokenizerFast

# The string that `LlavaHost` makes: USER: <image> question ASSISTANT: answer. (Templates may not change lists.)
WORDS = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
)
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}USER: "
    "{% if message['content'] is not string %}{% for part in message['content'] if part['type'] == 'image' %}"
    "{{ '<image>\\n' }}{% endfor %}{% endif %}" + WORDS + "{% else %}{{ ' ASSISTANT:' }}"
    "{% generation %}{{ ' ' }}" + WORDS + "{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)


def main(folder: Path) -> None:
    hub = folder / "hub"
    hub.mkdir(exist_ok=True)
    config = json.loads((folder / "model" / "config.json").read_text())
    pixels, patch = (config["vision_config"][name] for name in ("image_size", "patch_size"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "model" / "tokenizer.json"),
        extra_special_tokens={"image_token": "<image>"},
        chat_template=TEMPLATE,
        model_max_length=2048,
        **named,
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": pixels}, crop_size={"height": pixels, "width": pixels}
        ),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(hub)
    GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=4).save_pretrained(hub)
    config["image_token_id"] = config["image_token_index"]
    (hub / "config.json").write_text(json.dumps(config, indent=1))
    weights = hub / "model.safetensors"
    weights.unlink(missing_ok=True)
    try:
        weights.symlink_to((folder / "model" / "model.safetensors").resolve())
    except OSError:
        shutil.copyfile(folder / "model" / "model.safetensors", weights)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
