"""The length of a run, and its resume: what may differ, and more or fewer steps than planned."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from vitcli.config.recipe import check, differing_keys, lay_over, read_toml
from vitcli.config.schema import DURATIONS, Recipe, Settings, TrainSection, parse_duration
from vitcli.data.source import Source
from vitcli.errors import VitcliError, counted
from vitcli.files import is_intact
from vitcli.run import EXTENSIONS, RUNS, Run
from vitcli.train.agreement import min_over_processes
from vitcli.train.budget import Budget, Timeline, plan_budget, warn_of_few_steps
from vitcli.train.build import held_out_images
from vitcli.train.checkpoint import list_checkpoints, load_checkpoint, step_of
from vitcli.train.lora import ADAPTER
from vitcli.train.recorded_images import RecordedImages
from vitcli.train.schedules import schedule_factor

if TYPE_CHECKING:
    from vitcli.train.loop import Loop

NUM_EVALUATIONS = 5  # in a run without `train.eval_steps`
EVALUATIONS = "evaluations"  # in provenance.json: the number of evaluations between steps
LENGTH_KEYS = {f"train.{name}" for name in DURATIONS}
# The data may have moved; their content is compared later.
FREE_KEYS = {"data.name", "schedule.extension", *LENGTH_KEYS}


def is_run(path: Path) -> bool:
    """True for a run directory."""
    return Run(path).recipe_file.is_file()


def resumed_recipe(run: Run, changes: Settings, command: str) -> Recipe:
    """The recipe of a run with the `changes` of the command line; `reopen_run` judges them.

    Raises:
        VitcliError: invalid settings, or a run of another command.
    """
    settings = read_toml(run.recipe_file)
    if (started := settings.get("command")) != command:
        raise VitcliError(
            f"`{run.path}` is not a run of `{command}`", f"`vitcli {started} --resume {run.path}`"
        )
    lay_over(settings, changes)
    return check(Recipe, settings, f"`{run.recipe_file}`", typed=changes)


def reopen_run(path: Path, recipe: Recipe) -> Run | None:
    """The run at `path`, which must have the same recipe except `FREE_KEYS`.

    None if the path is free.

    Raises:
        VitcliError: the recipes differ, recipe.toml is damaged, or the path is not a run.
    """
    run = Run(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    if not run.recipe_file.is_file():
        raise VitcliError(
            f"`{path}` is not a run: it has no recipe.toml", "give the path of a run with `--out`"
        )
    before = run.recipe()
    if not is_intact(run.recipe_file.read_text(encoding="utf-8")):
        raise VitcliError(
            f"`{run.recipe_file}` has changed since vitcli wrote it, so the run cannot continue",
            f"undo the change, or start a new run: `vitcli {before.command} --recipe "
            f"{run.recipe_file} --out OTHER`",
        )
    if keys := [key for key in differing_keys(before, recipe) if key not in FREE_KEYS]:
        raise VitcliError(
            f"`{path}` was started with another recipe; these differ: {', '.join(keys)}",
            f"`vitcli {before.command} --resume {path}` continues it as it was started; only "
            "`--epochs`, `--steps` and `--budget` may change",
        )
    return run


def check_resumable(out: Path | None, runs: Path = RUNS) -> None:
    """Check that `--resume` comes with `--out`.

    Raises:
        VitcliError: `out` is None; the hint names the newest unfinished run.
    """
    if out is not None:
        return
    started = [Run(p) for p in runs.iterdir()] if runs.is_dir() else []
    started = [run for run in started if run.recipe_file.is_file() and not run.finished]
    newest = max(started, key=lambda run: run.recipe_file.stat().st_mtime_ns, default=None)
    hint = "add `--out RUN`"
    if newest is not None:
        hint = f"add `--out {newest.path}` for the newest unfinished run"
    raise VitcliError("`--resume` needs the run directory, and `--out` is missing", hint)


def choose_steps(
    loop: "Loop",
    started: float,
    source: Source,
    machine: dict[str, Any],
    images: RecordedImages | None = None,
    *,
    extends: bool = False,
) -> None:
    """Set the number of steps of the run, and load its last checkpoint if there is one.

    A budget becomes a number of steps once, at the start of the run. Provenance stores it, because
    a second measurement on resume would give another number and another schedule.

    Args:
        machine: the result of `machine_facts`.
        extends: the recipe has another length than the run so far.
    """
    run, train, watch = loop.run, loop.recipe.train, loop.watch
    is_main, known = loop.accelerator.is_main_process, run.provenance().get("steps")
    # Only epochs need the number of training images, which a stream does not know.
    num_images = 0 if train.epochs is None else len(source.splits["train"])
    total = train.total_steps(num_images)
    done = check_length(run, train, total) if extends else 0
    # A budget has time for evaluations between steps only if the best weights need them.
    between = NUM_EVALUATIONS - 1 if loop.best is not None or not train.budget else 0
    if train.budget and known is not None:
        between = run.provenance().get(EVALUATIONS, 0)
    if total is None and not extends:
        total = known
    if total is None:
        used = run.trained_seconds() if extends else 0.0
        plan = remaining_budget(loop, started, source, used, between)
        # All processes make as many steps as the slowest of them has time for.
        total = done + min_over_processes(loop.accelerator, plan.steps)
        between = min_over_processes(loop.accelerator, plan.evaluations)
        watch.note(
            f"budget {train.budget}: about {counted(total, 'step', 'steps')}, adapted to the speed "
            "of this machine"
        )
        trained: Any = source.splits["train"]
        if trained.kind != "stream":  # its length is unknown
            warn_of_few_steps(loop, total, plan, len(trained))
    if known is None and is_main:
        facts = facts_of(loop, source, machine)
        facts["data"]["content"] = None if images is None else images.content
        run.write_provenance({**facts, "steps": total, EVALUATIONS: between})
    if extends and is_main:
        record_extension(run, loop.recipe, done, total)
    loop.accelerator.wait_for_everyone()  # all processes read the same provenance
    loop.state.timeline = Timeline.of(total)
    default = max(1, total // (between + 1)) if between else None
    loop.eval_steps = train.eval_steps or default
    factor = loop.recipe.optim.rate_factor(train.batch_size)
    if factor != 1.0:
        optim = loop.recipe.optim
        watch.note(
            f"lr {optim.lr:g} is for {optim.lr_batch_size} images per step; for "
            f"{train.batch_size} it becomes {optim.lr * factor:g}"
        )
    watch.note(
        f"run `{run.path}`: {counted(total, 'step', 'steps')} of {train.batch_size} images, "
        f"{machine['precision']}"
    )
    if found := list_checkpoints(run.checkpoints):
        load_checkpoint(found[-1], loop.state)
        extend_timeline(loop, total, run.provenance())
        watch.note(f"resuming from step {loop.state.step} of {loop.total_steps}")
    elif run.metrics_file.is_file():
        watch.note("there is no checkpoint yet: starting from step 0")
    if is_main and run.metrics_file.is_file():
        run.drop_records_after(loop.state.step)
    loop.accelerator.wait_for_everyone()  # all processes read the records that are left
    if loop.best is not None and run.metrics_file.is_file():
        extensions = run.provenance().get(EXTENSIONS, [])
        loop.best.restore(run.records(), extensions[-1]["step"] if extensions else 0)


def facts_of(loop: "Loop", source: Source, machine: dict[str, Any]) -> dict[str, Any]:
    """What provenance.json says about model, data and machine."""
    recipe, model = loop.recipe, loop.loaded
    return {
        "lr_factor": recipe.optim.rate_factor(recipe.train.batch_size),
        "trained": sum(p.numel() for p in model.network.parameters() if p.requires_grad),
        "model": model.load_report.provenance() if model.load_report else None,
        "data": {
            "name": recipe.data.name,
            "fingerprint": source.fingerprint,
            **source.splitting,
        },
        "window": model.preprocess.window if model.preprocess else None,
        **_facts_of_classes(loop),
        "parameters": num_parameters(model.network),
        **machine,
    }


def _facts_of_classes(loop: "Loop") -> dict[str, Any]:
    """The class sizes and the weights that the loss of a run has, if it has any."""
    weights = getattr(getattr(loop.state.objective, "class_loss", None), "class_weights", None)
    facts = {
        "class_counts": loop.loaded.class_counts,
        "class_weights": None if weights is None else weights.tolist(),
    }
    return {name: value for name, value in facts.items() if value is not None}


def num_parameters(model: nn.Module) -> int:
    """The number of parameters without adapters, which are merged into others at the end."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.endswith(ADAPTER))


def changes_length(run: Run, recipe: Recipe) -> bool:
    """True if `recipe` has another number of epochs or steps, or another budget, than the run."""
    return bool(LENGTH_KEYS & set(differing_keys(run.recipe(), recipe)))


def check_length(run: Run, train: TrainSection, total: int | None) -> int:
    """The finished steps of a run that shall get `total` steps; None stands for a budget.

    Raises:
        VitcliError: it has made more steps already, or it has no checkpoint to continue from.
    """
    found = list_checkpoints(run.checkpoints)
    if run.finished and not found:
        raise VitcliError(
            f"`{run.path}` has finished and has no checkpoint, so it cannot train longer",
            f"`vitcli finetune DATA --model {run.path}` starts from its weights",
        )
    done = step_of(found[-1]) if found else 0
    if total is not None and total < done:
        key = next(name for name in DURATIONS if getattr(train, name) is not None)
        given = f"`--{key} {getattr(train, key):g}`" + (
            f" ({counted(total, 'step', 'steps')})" * (key != "steps")
        )
        raise VitcliError(
            f"{given} is less than the {counted(done, 'step', 'steps')} that `{run.path}` has made",
            f"give a larger `--{key}`, or start a new run with another `--out`",
        )
    return done


def remaining_budget(
    loop: "Loop", started: float, source: Source, used: float, evaluations: int
) -> Budget:
    """Plan the rest of a budget, of which `used` seconds are over."""
    budget = parse_duration(loop.recipe.train.budget or "")
    left = budget - used - (time.monotonic() - started)
    if used and left <= 0:
        raise VitcliError(
            f"`--budget {loop.recipe.train.budget}` is less than the {used:.0f} s that "
            f"`{loop.run.path}` has trained",
            "give a longer `--budget`",
        )
    plan = plan_budget(loop, left, held_out_images(source), evaluations)
    loop.deadline = plan.deadline
    return plan


def record_extension(run: Run, recipe: Recipe, done: int, total: int) -> None:
    """Write that a run gets another length, and remove the mark that it has finished."""
    known = run.provenance()
    earlier = [entry for entry in known.get(EXTENSIONS, []) if entry["step"] < done]
    entry = {
        "step": done,
        "from": known.get("steps"),
        "steps": total,
        "schedule": recipe.schedule.extension,
    }
    # In this order: a process that is killed in between can repeat the same command.
    run.update_provenance({"steps": total, EXTENSIONS: [*earlier, entry]})
    run.write_recipe(recipe)
    run.result_file.unlink(missing_ok=True)


def extend_timeline(loop: "Loop", total: int, known: dict[str, Any]) -> None:
    """After the checkpoint is loaded: give the run the length of its last extension, if due."""
    state, recipe = loop.state, loop.recipe
    last = next(iter(known.get(EXTENSIONS, [])[-1:]), None)
    # A checkpoint from after the extension has its timeline already.
    if last is None or last["steps"] != total or state.step > last["step"]:
        return
    before, step = state.timeline, state.step
    if last["schedule"] == "restart":
        state.timeline = Timeline(planned=total - step, total=total, since=step)
    else:
        state.timeline = Timeline.of(total)
    exact = last["schedule"] == "continue" and len(known[EXTENSIONS]) == 1
    exact = exact and _same_start(recipe, before, total, step)
    text = f"`{loop.run.path}` gets {total:,} steps instead of {before.total:,}"
    if exact:
        loop.watch.note(f"{text}: the same bits as a run of {total:,} steps from the start")
        return
    factors = [
        schedule_factor(recipe.schedule, line.at(at), line.planned)
        for line, at in ((before, max(0, step - 1)), (state.timeline, step))
    ]
    way = "starts again" if last["schedule"] == "restart" else f"continues as in {total:,} steps"
    loop.watch.note(
        f"{text}: the schedule {way}, and the learning rate goes from {factors[0]:.0%} to "
        f"{factors[1]:.0%} of its peak; the result is not that of a run of this length from the "
        "start, but interruptions from here on do not change it"
    )


def _same_start(recipe: Recipe, before: Timeline, total: int, steps: int) -> bool:
    """True if the first `steps` steps are the same in a run of `total` steps."""
    if before.since or before.total != before.planned:
        return False
    train, old = recipe.train, before.planned
    return all(
        schedule_factor(recipe.schedule, step, old) == schedule_factor(recipe.schedule, step, total)
        and train.side_at(step, old) == train.side_at(step, total)
        and train.patch_drop_at(step, old) == train.patch_drop_at(step, total)
        for step in range(steps)
    )
