"""The common ground: one model with random weights, pictures and questions, for us and in the hub's layout for others.

FOLDER/model     checkpoint, as `csp bench` makes it        FOLDER/hub        the same weights with a processor
FOLDER/records   shards                                     FOLDER/rows.json  the same questions; pictures beside it
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

from csp_jax.bench.made import MODELS, Lengths, write_model, write_shards
from csp_jax.data.shards import ShardSource
from csp_jax.families.registry import open_family
from csp_jax.records import Record
from csp_jax.text import Prompts

HERE = Path(__file__).parent


def prepare(folder: Path, model: str, prompt: int, peers: Path) -> None:
    """Everything that is not there yet."""
    sizes = MODELS[model]
    checkpoint = write_model(folder / "model", sizes)
    write_shards(folder / "records", open_family(checkpoint), Lengths(prompt, 64, sizes.pixels))
    source, several = (ShardSource(folder / "records", split) for split in ("train", "test"))
    rows = []
    (folder / "pictures").mkdir(exist_ok=True)
    for number in range(len(source)):
        record, name = source[number], f"pictures/{number}.png"
        (folder / name).write_bytes(record.images[0])
        item = record.items[0]
        query = Prompts().ask_confidence(item.question, item.response)
        row = {"image": name, "question": item.question, "chosen": item.response, "rejected": item.rejected}
        rows.append({**row, "query": query, "truth": item.truth, "protocol": protocol(several[number])})
    (folder / "rows.json").write_text(json.dumps(rows, indent=1))
    if not (folder / "hub" / "preprocessor_config.json").exists() and (peers / "trl").exists():
        subprocess.run([peers / "trl/bin/python", HERE / "hub_folder.py", folder], check=True)


def protocol(record: Record) -> list[str]:
    """All that an evaluation asks about a picture: each question, and the confidence in each of its candidates."""
    prompts, asked = Prompts(), []
    for item in record.items:
        asked += [prompts.ask(item.question), *(prompts.ask_confidence(item.question, c) for c in item.candidates)]
    return asked


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="llava-112", choices=MODELS)
    parser.add_argument("--prompt", type=int, default=115)
    parser.add_argument("--peers", type=Path, default=Path("build/peers"))
    given = parser.parse_args()
    prepare(given.folder, given.model, given.prompt, given.peers)
