"""One question about one picture: the answer, and how sure the model is of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from csp_jax.calibration.protocols import EdgeTree, confidence_choice, expected_confidence
from csp_jax.config import ParallelConfig
from csp_jax.data.batch import Packer, Sample
from csp_jax.data.pictures import check_slots, show
from csp_jax.data.recipes.base import Asker
from csp_jax.evaluate import Scorer
from csp_jax.families.interface import open_image
from csp_jax.families.registry import open_family
from csp_jax.models.registry import load_model
from csp_jax.rollout import greedy_answer
from csp_jax.scenes import shape_of, shared_prompt
from csp_jax.sharding import make_mesh
from csp_jax.text import Prompts, parse_confidence


def ask_picture(
    folder: Path, image: Path, question: str, prompts: Prompts | None = None, adapter: Path | None = None
) -> dict[str, Any]:
    """Answer, mean confidence in [0, 1], and the confidence that the model says (None: it says none).

    Raises UserError for a picture that cannot be read or a folder that is no checkpoint.
    """
    prompts = prompts or Prompts()
    family = open_family(folder)
    picture = show(family, open_image(image, str(image)))
    model = load_model(folder, adapter=adapter)
    answer = greedy_answer(model, family, picture, prompts.ask(question))
    asker = Asker(family, prompts, picture)
    prompt = shared_prompt(asker)
    tree = EdgeTree()
    choice = confidence_choice(tree, asker, question, answer, len(prompt))
    sample = check_slots(family, Sample(prompt, (picture,), (tree.tree,)))
    packer = Packer(shape_of([sample], 1))
    packer.add(sample)
    scorer = Scorer(model, make_mesh(ParallelConfig(data=1), jax.local_devices()[:1]))
    log_probs, top = (np.asarray(x)[0] for x in scorer(packer.batch))
    said = choice.greedy(tree.tree.choices, top)
    distribution = np.exp(choice.log_probs(log_probs))
    return {
        "question": question,
        "answer": answer,
        "confidence": float(expected_confidence(distribution)),
        "said": None if said is None else parse_confidence(choice.texts[said]),
        "distribution": [round(float(p), 6) for p in distribution],
    }
