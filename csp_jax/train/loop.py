"""The one training loop: whatever the stage, batches go in, steps run, checkpoints come out.

    data -> step -> late metrics -> checkpoint

Nothing here waits for the device but the metrics of the step before.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from csp_jax.config import TrainConfig, read_yaml
from csp_jax.data.batch import Batch, Shape
from csp_jax.data.recipes import RECIPES
from csp_jax.data.recipes.base import Drawn, Objective, Recipe
from csp_jax.data.shards import ShardSource, record_dataset, record_stream
from csp_jax.errors import Interrupted, UserError
from csp_jax.models.hub import HubConfig
from csp_jax.models.interface import VisionLanguageModel
from csp_jax.models.lora import add_adapter, merge_adapter
from csp_jax.models.peft import load_adapter
from csp_jax.models.registry import checkpoint_folder, load_model, new_model
from csp_jax.sharding import (
    compile_parts,
    compile_step,
    make_mesh,
    put_batch,
    put_parts,
    rows_over_hosts,
    state_shardings,
)
from csp_jax.text import Prompts
from csp_jax.train import hosts
from csp_jax.train.checkpoint import Checkpoints, export_adapter, export_model
from csp_jax.train.configured import check_attention, check_heads, configured_step, make_optimizer
from csp_jax.train.flops import UpdateFlops
from csp_jax.train.folder import note_plan, note_versions, prepare_folder
from csp_jax.train.profile import ProfileWindow
from csp_jax.train.rates import Rates, mesh_peak
from csp_jax.train.state import TrainState, new_state, split_model
from csp_jax.train.telemetry import Telemetry
from csp_jax.train.watch import Watch
from csp_jax.train.weights_and_biases import Board, require_wandb
from csp_jax.train.window import Collate, Window, Windows


def read_prompts(file: str) -> Prompts:
    """The package's prompts or those of a YAML file."""
    return Prompts.from_mapping(read_yaml(Path(file))) if file else Prompts()


def batch_shape(config: TrainConfig, rows: int, cell: tuple[int, int]) -> Shape:
    """The static sizes of a micro-batch of so many rows; `cell` is the family's."""
    sizes = config.data.recipe.shape
    if config.loss.name == "grpo":
        said = config.rollout.max_tokens
        sizes = sizes.model_copy(
            update={"groups": config.rollout.samples, "length": max(said - 1, 1), "targets": said}
            | {"responses": config.rollout.samples}
        )
    return Shape(
        rows=rows,
        prompt=sizes.prompt,
        groups=sizes.groups,
        length=sizes.length,
        targets=sizes.targets,
        responses=sizes.responses,
        pictures=sizes.samples,
        canvas=cell,
        cells=sizes.cells,
    )


def wrap_model(model: VisionLanguageModel, config: TrainConfig) -> dict[str, Any]:
    """Put the configured attention and adapter on a model; the fields of the adapter that it goes on from."""
    check_heads(config.model.attention, model)
    model.attention = config.model.attention
    lora = config.model.lora
    if lora is None:
        return {}
    dtype = jnp.dtype(lora.dtype)
    if lora.adapter:
        return load_adapter(model, Path(lora.adapter), dropout=lora.dropout, dtype=dtype)
    add_adapter(
        model, lora.targets, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, seed=config.seed, dtype=dtype
    )
    return {}


def place_state(
    model: VisionLanguageModel, optimizer: optax.GradientTransformation, freeze: Sequence[str], mesh: Mesh
) -> tuple[TrainState, TrainState]:
    """Where every leaf of the first state belongs, and that state there; the model's own arrays are given up.

    Moments are made where they belong, so no device ever holds all of them.
    """
    start = functools.partial(new_state, optimizer=optimizer, freeze=freeze)
    shardings = state_shardings(mesh, nnx.eval_shape(start, model))
    graphdef, values = nnx.split(model)
    values = jax.device_put(values, state_shardings(mesh, values))
    make = jax.jit(lambda values: start(nnx.merge(graphdef, values)), out_shardings=shardings, donate_argnums=0)
    return shardings, make(values)


class Run:
    """Everything that a configured run needs, made once."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.out = Path(config.run.out)
        self.source_folder = checkpoint_folder(config.model.checkpoint)
        self.mesh = make_mesh(config.parallel)
        check_attention(config, self.mesh.devices.flat[0].platform)
        self.rows = rows_over_hosts(config.batch.rows, self.mesh)
        self.samples = config.data.recipe.shape.samples  # of a row
        self.source = ShardSource(config.data.shards, config.data.split)
        self.steps = self._steps()
        self.optimizer = make_optimizer(config.optimizer, self.steps)
        model = self._model()
        self.adapter_config = wrap_model(model, config)
        self.graphdef, _, _ = split_model(model, config.model.freeze)
        self.shardings, self.state = place_state(model, self.optimizer, config.model.freeze, self.mesh)

    def _steps(self) -> int:
        config = self.config
        records = len(self.source)
        per_step = config.batch.rows * config.batch.accumulation * self.samples
        return config.run.steps or max(int(config.run.epochs * records) // per_step, 1)

    def _model(self) -> VisionLanguageModel:
        dtype = jnp.dtype(self.config.model.param_dtype)
        if self.config.model.random_init:
            return new_model(HubConfig.read(self.source_folder), self.config.seed, dtype)
        return merge_adapter(load_model(self.source_folder, dtype=dtype, mesh=self.mesh))

    @functools.cached_property
    def recipe(self) -> Recipe:
        """What makes samples of records."""
        config = self.config
        objective: Objective = "simpo" if config.loss.name == "simpo" else "sft"
        make = RECIPES[config.data.recipe.name]
        return make(config.data.recipe, str(self.source_folder), read_prompts(config.prompts), objective)

    def dataset(self, collate: Callable[[list[Drawn]], Any] | None = None) -> Any:
        """The run's windows as a Grain data set, or what else `collate` makes of what an update draws."""
        config = self.config
        if collate is None:
            shape = batch_shape(config, self.rows, self.recipe.family.cell)
            collate = Collate(shape, config.batch.accumulation, self.samples, whole=jax.process_count() > 1)
        return record_dataset(
            self.source,
            batch_size=self.rows * config.batch.accumulation * self.samples,
            seed=config.seed,
            host_index=jax.process_index(),
            host_count=jax.process_count(),
            num_workers=config.data.workers,
            transform=self.recipe,
            collate=collate,
        )

    def drawn(self, position: int) -> Drawn:
        """What stands at a position of the run's data, whichever host and update draws it."""
        return record_stream(self.source, seed=self.config.seed, transform=self.recipe)[position]

    def step_function(self) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
        """The compiled training step."""
        step = configured_step(self.config, self.graphdef, self.optimizer, self.mesh)
        if self.config.parallel.strategy == "pmap":
            return compile_parts(step, self.mesh)
        return compile_step(step, self.mesh, self.shardings)

    def put(self, batch: Batch) -> Batch:
        """This host's rows on its devices."""
        return (put_parts if self.config.parallel.strategy == "pmap" else put_batch)(batch, self.mesh)

    def model(self) -> VisionLanguageModel:
        """The model as it stands."""
        return nnx.merge(self.graphdef, self.state.trainable, self.state.frozen)


Batches = Callable[[Run], Windows]


def from_data(run: Run) -> Windows:
    """The windows of a run whose batches depend on its data alone."""
    if run.config.loss.name == "grpo":
        raise ValueError("grpo's batches are sampled: give `policy.batches_for(config)`")
    return iter(run.dataset())


def train(config: TrainConfig, *, title: str = "train", batches: Batches = from_data) -> Path:
    """Run a configured training to its end, resuming what is there; returns the trained model's folder.

    `batches` makes the run's windows once, before a checkpoint is restored. They may look at `run.state` whenever one
    is asked for: it is then the state between two steps, and gone with the next one.

    Raises Interrupted after SIGTERM or SIGINT, with the state saved. Of several processes, one that fails or finds
    another one gone ends at once with a message, so that none waits for it.
    """
    require_wandb(config.run.wandb)
    hosts.join(config.run.heartbeat_seconds)
    final = Path(config.run.out) / "model"
    if hosts.is_first():
        prepare_folder(config)
    hosts.wait_for_all("folder")
    if final.exists():
        return final
    if hosts.is_first():
        note_versions(final.parent)
    watch = Watch(config.run.hang_seconds, say, hosts.leave if config.run.hang_exit else None)
    with watch, hosts.ending_together(lambda: watch.waiting):
        train_in(config, final, watch, title, batches)
    return final


def say(text: str) -> None:
    """A line for whoever runs the training."""
    print(f"csp: {text}", file=sys.stderr, flush=True)


def train_in(config: TrainConfig, final: Path, watch: Watch, title: str, batches: Batches) -> None:
    """The run itself, to its exported model."""
    run = Run(config)
    if hosts.is_first():
        note_plan(run.out, config, run.mesh, run.state, run.shardings)
    iterator = batches(run)
    checkpoints = Checkpoints(run.out / "checkpoints", config.run, say)
    watch.note("the restored checkpoint")
    run.state, start = checkpoints.restore(run.state, iterator)
    try:
        run_steps(run, iterator, checkpoints, watch, start, title)
    finally:
        if jax.process_count() == 1 or not isinstance(sys.exception(), jax.errors.JaxRuntimeError):
            watch.note("the checkpoint that is being written")
            checkpoints.close()
    watch.note("the exported model")
    model = hosts.whole(run.model())
    if hosts.is_first() and config.model.lora is None:
        export_model(final, model, run.source_folder)
    elif hosts.is_first():
        base = "world" if config.model.checkpoint == "world" else str(run.source_folder.resolve())
        export_adapter(final, model, run.source_folder, base, run.adapter_config)
    hosts.wait_for_all("exported")


def open_telemetry(run: Run, start: int, title: str, peak: float | None) -> Telemetry:
    """Where this process writes its metrics; `peak`: FLOP/s of all devices, where known."""
    config, first = run.config.run, hosts.is_first()
    values = run.config.model_dump(mode="json")
    return Telemetry(
        hosts.own_folder(run.out),
        total=run.steps,
        start=start,
        title=title,
        progress=config.progress and first,
        log_every=config.log_every,
        rates=Rates(peak),
        board=Board(config.wandb, run.out, values) if config.wandb and first else None,
    )


def run_steps(
    run: Run, iterator: Iterator[Window], checkpoints: Checkpoints, watch: Watch, start: int, title: str
) -> None:
    """Steps `start`..`steps`; the metrics of a step are fetched while the next one runs."""
    config = run.config.run
    step_function = run.step_function()
    peak = mesh_peak(config, run.mesh)
    telemetry = open_telemetry(run, start, title, peak)
    profile = ProfileWindow(config.profile, hosts.own_folder(run.out))
    flops = UpdateFlops(run.config, run.graphdef, run.state, run.mesh) if peak is not None else None
    late: tuple[int, dict[str, jax.Array], Window] | None = None
    number, stopping = start, False
    losses: list[float] = []  # since the last checkpoint

    def report(entry: tuple[int, dict[str, jax.Array], Window]) -> None:
        number, metrics, window = entry
        watch.note(f"step {number} on the devices")
        work = flops(window.batch) if flops else None
        values = {**window.metrics, **jax.device_get(metrics)}
        telemetry.log(number, values, window.counts, work)
        profile.after(number)
        losses.append(float(values["loss"]))
        check_skipped(int(values["skipped"]), config.skip_limit, number)

    with telemetry, profile, hosts.StopSignal() as stop:
        for number in range(start + 1, run.steps + 1):
            watch.note(f"the data of step {number}")
            with telemetry.rates.waiting_for_data():
                window = next(iterator)
            batch = run.put(window.batch)
            profile.before(number)
            watch.note(f"the start of step {number}")
            with jax.transfer_guard("disallow"):
                run.state, metrics = step_function(run.state, batch)
            if late is not None:
                report(late)
            late = (number, metrics, window)
            stopping = hosts.told_to_stop(number, stop.received)
            due = config.checkpoint_every and number % config.checkpoint_every == 0
            if due or number == run.steps or stopping:
                report(late)  # before the checkpoint: a run that goes on from there will not say it again
                late = None
                watch.note(f"the checkpoint of step {number}")
                checkpoints.save(number, run.state, iterator, float(np.mean(losses)))
                losses.clear()
            if stopping:
                break
        if late is not None:
            report(late)
    if stopping and number < run.steps:
        raise Interrupted(f"stopped after step {number} of {run.steps}; the same command goes on from there")


def check_skipped(skipped: int, limit: int, step: int) -> None:
    """UserError if more updates than allowed were left out because they were not finite."""
    if limit and skipped > limit:
        raise UserError(
            f"{skipped} of {step} updates had a loss or a gradient that is not finite and were left out",
            field="run.skip_limit",
            value=limit,
            mend="Lower optimizer.learning_rate, raise optimizer.epsilon or model.param_dtype, or look at the data",
        )
