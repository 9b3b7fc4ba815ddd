"""The best weights of a run by a metric of the validation images, and early stopping.

Section 4.3 of the paper uses "early-stopping, and report[s] the best validation accuracy achieved
during training"; Figure 4 reports the few-shot accuracy of these weights.

Everything here is a function of the evaluations in metrics.jsonl, and of the step at which the run
was made longer. So a run that resumes keeps the same weights, and stops at the same step, as one
that was never interrupted. At the end of the run model.safetensors gets the best weights, and
last.safetensors the last ones. Three writes follow
each other at a new best value: the checkpoint, best.safetensors, and the record in metrics.jsonl. A
resume after any of them repeats the others.
"""

import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitcli.config.schema import Recipe
from vitcli.errors import VitcliError
from vitcli.files import replacing
from vitcli.train.checkpoint import TrainState
from vitcli.train.defaults import DEFAULT_METRICS
from vitcli.train.ema import averaged
from vitcli.train.fsdp import gather_tensors
from vitcli.train.lora import merged, save_adapters
from vitcli.weights.loaded import LoadedModel
from vitcli.weights.store import save_model

if TYPE_CHECKING:
    from vitcli.train.loop import Loop
    from vitcli.train.signals import SignalFlag

BEST_FILE, LAST_FILE = "best.safetensors", "last.safetensors"
ADAPTERS_FILE, BEST_ADAPTERS_FILE = "lora.safetensors", "best_lora.safetensors"
SPLIT = "validation"  # never the test images: choosing by them would make their accuracy too high
LOWER_IS_BETTER = ("loss", "mae", "rmse")


@dataclass
class BestWeights:
    """The evaluations of a run so far, and the best of them.

    Attributes:
        metric: name of the metric.
        patience: evaluations without a better value after which the run stops; None for never.
        values: step -> value of the metric; steps increase.
        since: the step at which the run was made longer; the patience counts from there again.
    """

    metric: str
    patience: int | None = None
    values: dict[int, float] = field(default_factory=dict)
    since: int = 0

    @property
    def step(self) -> int | None:
        """The step of the best value, the latest of equal ones; None before an evaluation."""
        # A few validation images give equal accuracies often, and the later weights have seen more
        # images at a smaller rate.
        steps = [step for step, value in self.values.items() if not math.isnan(value)]
        return max(steps, key=lambda step: (self._score(self.values[step]), step), default=None)

    @property
    def is_over(self) -> bool:
        """True if the last `patience` evaluations were not better than one before them.

        A value that only equals the best one does not start the count anew.

        Evaluations before `since` do not count: a run that has stopped early and is made longer
        would stop again at once.
        """
        if self.patience is None or self.step is None:
            return False
        best = self.values[self.step]
        start = max(self.since, min(step for step, value in self.values.items() if value == best))
        return sum(step > start for step in self.values) >= self.patience

    def is_better(self, value: float) -> bool:
        """True if no value so far is better than `value`; NaN is never the best."""
        if math.isnan(value):
            return False
        return self.step is None or self._score(value) >= self._score(self.values[self.step])

    def restore(self, records: Iterable[Mapping[str, Any]], since: int = 0) -> None:
        """Take over the evaluations in the records of a run that was made longer at `since`."""
        name, self.since = f"{SPLIT}/{self.metric}", since
        self.values = {r["step"]: r[name] for r in records if name in r}

    def forget_after(self, step: int) -> None:
        """Forget the evaluations after `step`, which a rewind repeats."""
        self.values = {at: value for at, value in self.values.items() if at <= step}

    def to_json(self) -> dict[str, Any] | None:
        """The best value as result.json has it; None without an evaluation."""
        if self.step is None:
            return None
        value = self.values[self.step]
        return {"split": SPLIT, "metric": self.metric, "value": value, "step": self.step}

    def _score(self, value: float) -> float:
        return -value if self.metric in LOWER_IS_BETTER else value


def best_weights(recipe: Recipe, splits: Iterable[str], metrics: list[str]) -> BestWeights | None:
    """What the recipe asks to keep; None if it asks for nothing.

    Args:
        metrics: the metrics that an evaluation of this run has.

    Raises:
        VitcliError: there are no validation images, there is no such metric, or nothing is
            evaluated between steps.
    """
    train = recipe.train
    metric = train.best_metric
    if metric is None and train.patience is None:
        return None
    if SPLIT not in splits:
        key = "train.patience" if metric is None else "train.best_metric"
        raise VitcliError(
            f"`{key}={train.patience if metric is None else metric}` needs validation images, and "
            "the data has none: weights that are chosen on test images look better than they are",
            f"`--set data.validation_fraction=0.1`, or remove `{key}`",
        )
    if metric is None:  # a network without a head has only few-shot accuracy, if any
        metric = next(
            (name for name in (*DEFAULT_METRICS, *metrics) if name in metrics), "accuracy"
        )
    if metric not in metrics:
        raise VitcliError(
            f"`train.best_metric` is `{metric}`, and an evaluation of this run has "
            f"{', '.join(metrics) or 'no metrics'}",
            "use one of these; `--set train.fewshot_shots=5` adds `fewshot_accuracy`",
        )
    if train.patience is not None and train.budget is not None and train.eval_steps is None:
        raise VitcliError(
            "`train.patience` counts evaluations, and a run with a budget has one, at its end",
            "`--set train.eval_steps=N`",
        )
    return BestWeights(metric, train.patience)


def write_weights(
    path: Path, model: LoadedModel, state: TrainState, recipe: Recipe, *, is_main: bool
) -> None:
    """Write the averaged weights, with merged adapters; every process must call this."""
    with averaged(state.objective, state.ema):
        # Every process must take part in this, and one of them writes.
        sharded = recipe.train.fully_shard
        tensors = gather_tensors(model.state_dict()) if sharded else None
        if is_main:
            trained = replace(model, head_trained=model.config.num_classes > 0)
            # Merged, so that the weights load everywhere; the adapters are stored separately too.
            with merged(model.network):
                save_model(path, trained, recipe_hash=recipe.fingerprint(), tensors=tensors)


def write_adapters(path: Path, model: LoadedModel, state: TrainState, recipe: Recipe) -> None:
    """Write the LoRA adapters, if there are any."""
    with averaged(state.objective, state.ema):
        save_adapters(path, model.network, recipe.lora, str(recipe.model.name))


def keep_best(loop: "Loop", best: BestWeights | None, metrics: Mapping[str, float]) -> None:
    """Add an evaluation, and write the weights if none before was better."""
    step = loop.state.step
    if best is None or step in best.values:  # a resume repeats the last evaluation of a run
        return
    value = metrics.get(best.metric, math.nan)  # R2 of equal numbers is not defined
    if best.is_better(value):
        if loop.saved_step != step:
            loop.save()  # no resume begins before the best step, whose weights are the only copy
        is_main = loop.accelerator.is_main_process
        path = loop.run.path / BEST_FILE
        if is_main:
            adapters = loop.run.path / BEST_ADAPTERS_FILE
            write_adapters(adapters, loop.loaded, loop.state, loop.recipe)
        write_weights(path, loop.loaded, loop.state, loop.recipe, is_main=is_main)
    best.values[step] = value


@dataclass(frozen=True)
class FinalEvaluation:
    """The last evaluation of a run, and the weights that it chose.

    Attributes:
        weights: `best` if an earlier step is better on the validation images, else `last`.
        step: the step of these weights.
        metrics: their metrics on each held-out split, with its name; the test split comes last.
    """

    weights: str
    step: int
    metrics: list[dict[str, Any]]


def evaluate_at_end(loop: "Loop") -> FinalEvaluation:
    """Choose the weights on the validation images, and evaluate them once on the test images."""
    names, step, best = list(loop.evaluations), loop.state.step, loop.best
    found = {name: loop.evaluate(name) for name in names if name == SPLIT or best is None}
    if best is None or best.step in (None, step):
        found |= {name: loop.evaluate(name) for name in names if name not in found}
        chosen = FinalEvaluation("last", step, [])
    else:
        from vitcli.weights.load import load_model

        # The file has merged adapters, averaged and unsharded weights, as `predict` loads them.
        model = load_model(loop.run.path / BEST_FILE)
        model.network.to(loop.device)
        if names[-1] == SPLIT:
            found[SPLIT] = loop.measure(SPLIT, model)
        else:
            found[SPLIT] = _recorded(loop, best.step)
            for name in names:
                if name != SPLIT:
                    found[name] = loop.measure(name, model)
                    loop.recorder.log_evaluation(loop.state.step, name, found[name])
        chosen = FinalEvaluation("best", best.step or 0, [])
    chosen.metrics.extend({"split": n, "weights": chosen.weights, **found[n]} for n in names)
    return chosen


def _recorded(loop: "Loop", step: int | None) -> dict[str, float]:
    """The metrics of the validation images at a step, from metrics.jsonl."""
    prefix = f"{SPLIT}/"
    records = (record for record in loop.run.records() if record.get("step") == step)
    return {
        name.removeprefix(prefix): value
        for record in records
        for name, value in record.items()
        if name.startswith(prefix)
    }


def write_final_weights(loop: "Loop", weights: str) -> None:
    """Write model.safetensors; if it has the `best` weights, the last ones are written beside it.

    Every process must call this.
    """
    run, is_main = loop.run, loop.accelerator.is_main_process
    last = run.path / LAST_FILE if weights == "best" else run.weights_file
    write_weights(last, loop.loaded, loop.state, loop.recipe, is_main=is_main)
    if not is_main:
        return
    write_adapters(run.path / ADAPTERS_FILE, loop.loaded, loop.state, loop.recipe)
    if weights == "best":
        copies = [(BEST_FILE, run.weights_file.name), (BEST_ADAPTERS_FILE, ADAPTERS_FILE)]
        for source, target in copies:
            if (run.path / source).is_file():
                with replacing(run.path / target) as temporary:
                    shutil.copyfile(run.path / source, temporary)
    else:  # of an earlier end, before the run was extended
        (run.path / LAST_FILE).unlink(missing_ok=True)


def catch_up(loop: "Loop", best: BestWeights | None, signals: "SignalFlag") -> None:
    """Make the evaluation that belongs to the checkpoint of a resume, if it was interrupted."""
    step = loop.state.step
    if best is None or loop.eval_steps is None or not 0 < step < loop.total_steps:
        return
    if step % loop.eval_steps == 0 and step not in best.values:
        loop.evaluate_between_steps(signals)
    stop_early(loop, best)


def stop_early(loop: "Loop", best: BestWeights | None) -> None:
    """End the run with this step if the patience is used up."""
    if best is None or not best.is_over:
        return
    step = loop.state.step
    loop.timeline.replan(step, step)
    loop.watch.note(
        f"stopping at step {step}: {best.patience} evaluations in turn without a better "
        f"{best.metric} than that of step {best.step}"
    )
